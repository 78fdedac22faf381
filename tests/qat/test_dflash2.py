"""The DFlash2 head: identity at the start, the selector's chain, folder and findings, other readers, compiling."""

import hashlib
import json
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from mimo_qat.checkpoint.check import CheckConfig
from mimo_qat.checkpoint.check import main as check
from mimo_qat.checkpoint.layout import LayoutConfig, drafter_tensors
from mimo_qat.checkpoint.layout import main as layout
from mimo_qat.checkpoint.reader import read_draft_config
from mimo_qat.checkpoint.writer import write_drafter
from mimo_qat.convert import ConvertConfig
from mimo_qat.convert import main as convert
from mimo_qat.distill.blocks import block_sparse_mask, dense_mask, make_blocks
from mimo_qat.models.dflash_files import load_drafter, save_drafter
from mimo_qat.models.modeling_dflash import DFlashConfig, DFlashDraftModel, best_candidate
from tests.qat.drafters import BLOCK, HEAD, HIDDEN, TAPS, config, drafter, sequence, training_rows

VOCABULARY = 64


def fresh_head(plain):
    """A drafter with an untrained head and the weights of `plain`."""
    model = DFlashDraftModel(config(**HEAD)).float().eval()
    missing, unknown = model.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 2 * 4 + 3 and not unknown
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_head_changes_no_bit(dtype):
    plain = drafter(seed=7)
    model = fresh_head(plain).to(dtype)
    plain.to(dtype)
    ids, embed, taps = sequence()
    embed, taps = embed.to(dtype), taps.to(dtype)
    rows = training_rows(plain, ids, embed, taps, [3, 9, 17])
    assert torch.equal(training_rows(model, ids, embed, taps, [3, 9, 17]), rows)
    head = torch.randn(VOCABULARY, HIDDEN).to(dtype)
    head[40] = head[7]  # equal logits: the choice among them must not depend on how the best are found
    logits = rows @ head.T
    logits[:, :, [7, 40]] += 100
    assert (logits.argmax(-1) == 7).all()
    anchors = ids[0, [3, 9, 17]]
    with torch.no_grad():
        assert torch.equal(model.draft_tokens(rows, logits, anchors), plain.draft_tokens(rows, logits, anchors))
        assert torch.equal(model.draft_tokens(rows, rows @ head.T, anchors), (rows @ head.T).argmax(-1))


def test_chain_by_hand():
    """One block, every score written out, in float64."""
    selector = drafter(seed=2, **HEAD).candidate_selector
    hidden, logits = torch.randn(3, BLOCK - 1, HIDDEN), torch.randn(3, BLOCK - 1, VOCABULARY)
    a, b, w = (p.detach().double() for p in selector.parameters())
    assert (a.shape, b.shape, w.shape) == ((VOCABULARY, 5), (VOCABULARY, 5), (5, HIDDEN))
    with torch.no_grad():
        got = selector.chain(hidden, logits, torch.tensor([5, 6, 7])).tolist()
    changed = 0
    for row, anchor in enumerate((5, 6, 7)):
        before = anchor
        for slot in range(BLOCK - 1):
            candidates = sorted(range(VOCABULARY), key=lambda t: -logits[row, slot, t].item())[:4]
            gate = w @ hidden[row, slot].double()
            scores = {t: logits[row, slot, t].item() + (a[before] * gate * b[t]).sum().item() for t in candidates}
            best = max(scores, key=scores.__getitem__)
            changed += best != candidates[0]
            assert got[row][slot] == best, (row, slot)
            before = best
    assert changed  # the selector mattered


def test_the_anchor_and_every_choice_reach_the_next_slot():
    selector = drafter(seed=2, **HEAD).candidate_selector
    with torch.no_grad():
        selector.hidden_projection.weight.mul_(10)
        hidden, logits = torch.randn(1, 3, HIDDEN), torch.randn(1, 3, VOCABULARY) * 0.1
        chains = {tuple(selector.chain(hidden, logits, torch.tensor([t]))[0].tolist()) for t in range(VOCABULARY)}
    assert len({c[0] for c in chains}) > 1
    followers: dict[tuple, set] = {}
    for chain in chains:
        for slot, (before, after) in enumerate(pairwise(chain)):
            followers.setdefault((slot, before), set()).add(after)
    assert all(len(after) == 1 for after in followers.values())  # a slot depends on its predecessor and nothing earlier


def test_among_equal_scores_the_lowest_id_is_chosen():
    scores, ids = torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([[4, 9, 6, 1]])
    assert best_candidate(scores, ids).tolist() == [6]


PUBLISHED_NAMES = {
    "candidate_selector.hidden_projection.weight": [5, HIDDEN],
    "candidate_selector.predecessor_codebook": [VOCABULARY, 5],
    "candidate_selector.successor_codebook": [VOCABULARY, 5],
    **{
        f"layers.{i}.{conv}.{name}": shape
        for i in range(2)
        for conv in ("attention_conv", "mlp_conv")
        for name, shape in (
            ("base_kernel", [2, 2, HIDDEN]),
            ("kernel_projection.weight", [4 * HIDDEN // 16, HIDDEN]),
        )
    },
}


def test_folder_has_the_published_names_and_comes_back_whole(tmp_path):
    model = drafter(**HEAD)
    save_drafter(model, tmp_path)
    with safe_open(tmp_path / "dflash_draft_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    plain = {n for n in drafter().state_dict() if n != "mask_embedding"}
    assert {n: s for n, s in shapes.items() if n not in plain} == PUBLISHED_NAMES
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == ["DFlash2DraftModel"]
    head = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 5, "selector_top_k": 4}
    assert head.items() <= values["dflash_config"].items() and not head.keys() & values.keys()
    loaded = load_drafter(tmp_path, torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name
    again = save_drafter(loaded, tmp_path / "again")
    for name in ("dflash_draft_model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (again / name).read_bytes(), name
    top = {k: v for k, v in values.items() if k != "dflash_config"} | head
    inner = {k: v for k, v in values["dflash_config"].items() if k not in head}
    names = ("architectures", "auto_map", "torch_dtype", "add_swa_attention_sink_bias")
    moved = DFlashConfig(**{k: v for k, v in top.items() if k not in names}, dflash_config=inner)
    assert moved.published()["dflash_config"] == loaded.config.published()["dflash_config"]
    assert drafter_tensors(top | {"dflash_config": inner}).keys() == shapes.keys()


def test_a_plain_drafter_is_written_as_before_the_head_existed(tmp_path):
    save_drafter(drafter(), tmp_path)
    digests = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:16]
        for name in ("config.json", "model.safetensors.index.json")
    }
    assert digests == {"config.json": "5e6f89ab490a83a6", "model.safetensors.index.json": "9cd34110fb2b54e3"}


def test_either_part_alone():
    conv = DFlashDraftModel(config(conv_kernel_size=2))
    assert conv.candidate_selector is None and conv.layers[0].mlp_conv is not None
    selector = DFlashDraftModel(config(selector_rank=8))
    assert selector.candidate_selector.top_k == 16 and selector.layers[0].mlp_conv is None
    for model in (conv, selector):
        values = model.config.published()
        assert values["architectures"] == ["DFlash2DraftModel"]
        wanted = {n: list(p.shape) for n, p in model.named_parameters() if n != "mask_embedding"}
        assert {n: list(s.shape) for n, s in drafter_tensors(values).items()} == wanted
    off = config(conv_kernel_size=0, selector_rank=0)
    assert off.published() == config().published()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size 3"),
        ({"conv_kernel_size": 2, "conv_group_size": 5}, "conv_group_size 5"),
        ({"selector_rank": 4, "selector_top_k": 65}, "selector_top_k 65"),
        ({"selector_rank": 4, "dflash_config": {"selector_rank": 5}}, "selector_rank is 4 at the top and 5 inside"),
    ],
)
def test_a_head_that_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def findings(folder):
    return {f["name"]: f for f in check(CheckConfig(folder=str(folder)))["findings"]}


def test_check_and_layout_know_the_head(tmp_path):
    save_drafter(drafter(**HEAD), tmp_path)
    clean = findings(tmp_path)
    assert not {"drafter-tensors", "drafter-class"} & clean.keys(), clean
    assert layout(LayoutConfig(config_json=str(tmp_path)))["drafter"]["tensors"] == 3 + 2 * 12 + 11
    weights, index = tmp_path / "dflash_draft_model.safetensors", tmp_path / "model.safetensors.index.json"
    tensors, weight_map = load_file(weights), json.loads(index.read_text())
    book = "candidate_selector.successor_codebook"
    faults = {
        "missing": {k: v for k, v in tensors.items() if k != book},
        "unknown": tensors | {"candidate_selector.bias": torch.zeros(5).bfloat16()},
        "shape": tensors | {book: tensors[book][:-1].clone()},
    }
    for kind, held in faults.items():
        save_file(held, weights)
        names = dict.fromkeys(held, weights.name)
        index.write_text(json.dumps(weight_map | {"weight_map": names}))
        found = findings(tmp_path)["drafter-tensors"]
        assert kind in str(found) and "candidate_selector" in str(found), found
        with pytest.raises(ValueError, match=kind):
            load_drafter(tmp_path)


def test_a_release_carries_the_head(bf16_folder, drafter_folder, tensors_of, tmp_path):
    inner = drafter_folder.config["dflash_config"] | HEAD
    values = drafter_folder.config | {"architectures": ["DFlash2DraftModel"], "dflash_config": inner}
    tensors = tensors_of(drafter_tensors(values), seed=5)
    write_drafter(tmp_path / "drafter", values, tensors, drafter_folder.mask)
    out = tmp_path / "release"
    convert(ConvertConfig(target=str(bf16_folder.path), drafter=str(tmp_path / "drafter"), out=str(out)))
    state = load_drafter(out).state_dict()
    assert state.keys() == tensors.keys() | {"mask_embedding"} and len(tensors) == 3 + 2 * 12 + 11
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    document = check(CheckConfig(folder=str(out)))
    assert document["ok"] and not {"drafter-class", "drafter-tensors"} & {f["name"] for f in document["findings"]}


def test_a_head_under_the_name_of_a_plain_drafter_is_a_finding(tmp_path, edit_json):
    save_drafter(drafter(**HEAD), tmp_path)
    edit_json(tmp_path / "config.json", {"architectures": ["DFlashDraftModel"]})
    assert "drafter-class" in findings(tmp_path)
    save_drafter(drafter(), tmp_path / "plain")
    assert "drafter-class" not in findings(tmp_path / "plain")


def test_remote_code_loads_the_head(tmp_path, remote_code):
    """from_pretrained initialises what it does not find; nothing that it did find may be touched."""
    save_drafter(drafter(**HEAD), tmp_path / "dflash")
    expected = load_drafter(tmp_path / "dflash", torch.float32)
    model = AutoModel.from_pretrained(tmp_path / "dflash", trust_remote_code=True, dtype=torch.float32)
    assert type(model) is not DFlashDraftModel and model.candidate_selector is not None
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ids, embed, taps = sequence()
    noise = embed(torch.cat((ids[:, 9:10], torch.full((1, BLOCK - 1), 63)), 1))
    with torch.no_grad():
        rows = [m.eval()(noise, taps[:, :9]).last_hidden_state for m in (model, expected)]
    assert torch.equal(*rows)


def test_a_published_style_config_reads_the_same(tmp_path):
    """As z-lab writes it: no drafting key at the top, rope only in rope_parameters, and here a trailing comma."""
    save_drafter(drafter(**HEAD), tmp_path)
    values = read_draft_config(tmp_path / "config.json")
    for name in ("block_size", "target_layer_ids", "mask_token_id", "rope_theta", "partial_rotary_factor", "auto_map"):
        del values[name]
    text = json.dumps(values, indent=2)
    (tmp_path / "config.json").write_text(text[:-2] + ",\n}")
    with pytest.warns(UserWarning, match="trailing comma"):
        loaded = load_drafter(tmp_path, torch.float32)
    assert loaded.config.published() == drafter(**HEAD).config.published()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_all_layers_of_all_drafters_of_a_shape_share_one_compilation(kind):
    """As training calls them: another mask in every step, flex attention inside the graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    build = dense_mask if kind == "dense" else block_sparse_mask
    for seed in range(2):
        model = drafter(seed, **HEAD | {"sliding_window": 100, "block_size": 8})
        layers = [torch.compile(m, backend="eager", dynamic=False, fullgraph=True) for m in model.layers]
        assert len(layers) > 1
        for step in range(3):
            g = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 60, (2, 128), generator=g)
            documents = (torch.arange(128) // (50 + step)).repeat(2, 1)
            batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids), "doc_ids": documents}
            blocks = make_blocks(batch | {"position_ids": torch.arange(128).repeat(2, 1)}, 8, 16, g)
            rows = torch.randn(2, 16 * 8, HIDDEN, generator=g)
            with torch.no_grad():
                context = model.fuse(torch.randn(2, 128, TAPS * HIDDEN, generator=g))
                inputs = rows, context, blocks.position_ids
                masks = {rule: build(blocks, 8, rule) for rule in model.rules()}
                got = model.run_layers(*inputs, masks, layers=layers)
                expected = model.run_layers(*inputs, {rule: dense_mask(blocks, 8, rule) for rule in model.rules()})
            assert (got - expected).abs().max() < 1e-4 and expected.std() > 0.1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
