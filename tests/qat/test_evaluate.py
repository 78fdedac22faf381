"""Evaluation on a tiny model: every figure against an independent computation, and what is refused."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.reader import load_model
from mimo_qat.data import pack, pack_rows, read_split
from mimo_qat.evaluate import (
    Bench,
    EvaluateConfig,
    compare,
    evaluate,
    evaluation_rows,
    exchanged,
    main,
    overlap,
    parse_candidates,
    quantized,
)
from mimo_qat.evaluate_report import survival
from mimo_qat.models.experts import expert_parameters
from mimo_qat.models.upcycle import save_bf16
from tests.qat.conftest import character_tokenizer

ROWS = ["reference", "noise", "FP8 block", "RTN floor", "RTN even", "RTN rceil", "RTN mse"]


@pytest.fixture
def folder(tiny_model, tmp_path):
    """model/, half/ (experts half way from RTN to the reference) and rows.jsonl."""
    save_bf16(tiny_model, character_tokenizer(), tmp_path / "model")
    with torch.no_grad():
        for param in expert_parameters(tiny_model).values():
            param.copy_((param.float() + mxfp4.snap(param).float()) / 2)
    save_bf16(tiny_model, character_tokenizer(), tmp_path / "half")
    rows = [{"text": f"row {i}: " + "the quick brown fox jumps over the lazy dog. "[i % 7 :] * 3} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def config(folder, **changes):
    settings = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "dataset_name": str(folder / "rows.jsonl"),
        "held_out": 1.0,
        "rows": 6,
        "max_length": 48,
        "batch_size": 4,
        "device": "cpu",
    }
    return EvaluateConfig(**settings | changes)


@pytest.fixture
def loaded(folder):
    """(config, model, packed rows, Bench)."""
    c = config(folder)
    model = load_model(folder / "model", torch.bfloat16)
    rows = evaluation_rows(c, character_tokenizer())
    return c, model, rows, Bench(model, rows, c.batch_size)


def test_comparison_of_logits_by_hand():
    # One state of size 1 and a head of three rows: logits are the head times the state.
    head = torch.tensor([[0.0], [math.log(2.0)], [math.log(5.0)]])
    p, q = [1 / 8, 2 / 8, 5 / 8], [1 / 3] * 3
    values = compare(torch.ones(1, 1), torch.zeros(1, 1), (head, head), torch.tensor([2]))
    assert values[0].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-6)
    assert values[1].item() == 0  # 2 against 0, the first of three equal logits
    assert values[2].item() == pytest.approx(math.log(3), rel=1e-6)
    assert compare(torch.ones(1, 1), torch.ones(1, 1), (head, head), torch.tensor([-100])).flatten().tolist() == [
        0,
        1,
        0,
    ]


def test_comparison_against_float64_with_heads_that_differ():
    torch.manual_seed(0)
    a, b = torch.randn(5000, 16), torch.randn(5000, 16)  # several chunks
    heads, labels = (torch.randn(900, 16), torch.randn(900, 16)), torch.randint(0, 900, (5000,))
    log_p, log_q = (F.linear(x.double(), h.double()).log_softmax(-1) for x, h in zip((a, b), heads, strict=True))
    values = compare(a, b, heads, labels).double()
    assert torch.allclose(values[0], F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1), rtol=1e-4)
    assert torch.equal(values[1].bool(), log_p.argmax(-1) == log_q.argmax(-1))
    assert torch.allclose(values[2], -log_q.gather(1, labels[:, None])[:, 0], rtol=1e-5)


def test_tiny_divergences_survive_float32():
    torch.manual_seed(0)
    head, state = torch.randn(500, 8).double(), torch.randn(4, 8).double()
    other = state + 1e-5 * torch.randn(4, 8)
    log_p, log_q = (F.linear(x, head).log_softmax(-1) for x in (state, other))
    exact = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert exact.min() > 1e-11 and exact.max() < 1e-8
    found = compare(state.float(), other.float(), (head.float(), head.float()), torch.zeros(4, dtype=torch.long))[0]
    assert torch.allclose(found.double(), exact, rtol=0.2, atol=2e-11)


def test_overlap_by_hand():
    a = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    b = torch.tensor([[1, 0], [3, 9], [8, 9], [7, 6]])
    assert overlap(a, b).item() == (2 + 1 + 0 + 2) / 8
    assert overlap(a, a.flip(1)).item() == 1


def test_survival_by_hand():
    curve = dict(survival(np.arange(1, 1001) / 1000.0, points=4))  # shares 1, 0.1, 0.01, 0.001
    assert list(curve) == pytest.approx([1, 0.1, 0.01, 0.001])
    assert list(curve.values()) == pytest.approx([0.001, 0.9001, 0.99001, 0.999001])


def test_row_figures_against_plain_forward_passes(loaded):
    """One document at a time, no packing, no chunks, logits in float64: the same per-token results."""
    _, model, rows, bench = loaded
    values = {n: quantized(n, p.data, "even", False) for n, p in expert_parameters(model).items()}
    with exchanged(expert_parameters(model), values):
        measured = bench.measure(model)
    expected, documents = [], []
    for ids, docs in zip(rows["input_ids"], rows["doc_ids"], strict=True):
        documents += [ids[docs == d][None] for d in range(int(docs.max()) + 1)]

    def log_probs(ids):
        with torch.no_grad():
            state = model.model(ids).last_hidden_state[0]
        return F.linear(state.double(), model.lm_head.weight.double()).log_softmax(-1)

    references = [log_probs(ids) for ids in documents]
    with exchanged(expert_parameters(model), values):
        quantised = [log_probs(ids) for ids in documents]
    for log_p, log_q, ids in zip(references, quantised, documents, strict=True):
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        nll = F.pad(-log_q[:-1].gather(1, ids[0, 1:, None])[:, 0], (0, 1))
        expected.append(torch.stack((kl, (log_p.argmax(-1) == log_q.argmax(-1)).double(), nll)))
    expected = torch.cat(expected, 1)
    assert measured.values.shape == expected.shape == (3, int((rows["doc_ids"] >= 0).sum()))
    # BF16 sums differ with the shapes of the products, so single tokens may differ; means hardly.
    assert measured.values[0].mean().item() == pytest.approx(expected[0].mean().item(), rel=0.02)
    assert measured.values[1].mean().item() == pytest.approx(expected[1].mean().item(), abs=0.02)
    assert torch.allclose(measured.values[2].double(), expected[2], atol=0.03)


def test_quantized_rows_against_independent_paths(loaded):
    _, model, _, _ = loaded
    for name, param in expert_parameters(model).items():
        for rule in mxfp4.RULES:
            found = quantized(name, param.data, rule, False)
            assert torch.equal(found, mxfp4.dequantize(*mxfp4.quantize(param.data, rule)))
            there = quantized(name, param.data.transpose(1, 2).contiguous(), rule, True)
            assert torch.equal(there.transpose(1, 2), found)
        found, parts = quantized(name, param.data, "fp8", False), 2 if "gate_up" in name else 1
        for expert in range(len(param)):
            for mine, whole in zip(found[expert].chunk(parts), param.data[expert].chunk(parts), strict=True):
                assert torch.equal(mine, fp8.dequantize(*fp8.quantize(whole)))


def test_table(folder):
    c = config(folder, candidates=[f"half={folder / 'half'}", f"same={folder / 'model'}"])
    document = evaluate(c)
    rows = document["rows"]
    assert list(rows) == [*ROWS, "half", "same"]
    even, half = rows["RTN even"], rows["half"]
    for name in ("reference", "same"):  # the same weights in the same batches: not one bit differs
        assert [rows[name][k] for k in ("kl_mean", "kl_p99.9", "weight_error")] == [0, 0, 0]
        assert [rows[name][k] for k in ("top1_agreement", "perplexity_ratio", "router_overlap")] == [1, 1, 1]
        assert rows[name]["codes_changed"] is None and rows[name]["kl_ci95"] == [0, 0]
        assert rows[name]["gap_closed"] == pytest.approx(1, abs=0.05)
    assert rows["noise"]["kl_mean"] < 0.02 * even["kl_mean"] and rows["noise"]["gap_closed"] == 1
    assert even["gap_closed"] == 0 and even["gap_closed_ci95"] == [0, 0] and even["codes_changed"] == 0
    assert 0 < rows["FP8 block"]["kl_mean"] < 0.3 * even["kl_mean"]
    assert rows["FP8 block"]["codes_changed"] is None
    assert all(0.005 < rows[f"RTN {rule}"]["codes_changed"] < 0.5 for rule in ("floor", "rceil", "mse"))
    assert 0.010 < even["weight_error"] < 0.015  # 12.6 thousandths on Gaussian weights
    assert rows["RTN mse"]["weight_error"] < even["weight_error"] < rows["RTN rceil"]["weight_error"]
    # Half the error in the weights is a quarter of the squared error, and about a quarter of the KL.
    assert half["weight_error"] == pytest.approx(even["weight_error"] / 4, rel=0.02)
    assert half["gap_closed"] == pytest.approx(0.75, abs=0.1)
    assert half["gap_closed_ci95"][0] < half["gap_closed"] < half["gap_closed_ci95"][1]
    assert even["router_overlap"] < 1 and len(even["router_overlap_layers"]) == 3
    assert even["kl_median"] < even["kl_mean"] < even["kl_p99"] < even["kl_p99.9"]
    assert even["kl_ci95"][0] < even["kl_mean"] < even["kl_ci95"][1] < even["kl_max_window"] * 1.01
    ratio = half["perplexity"] / rows["reference"]["perplexity"]
    assert half["perplexity_ratio"] == pytest.approx(ratio, rel=1e-9) and ratio != 1
    assert [(t["first"], t["second"]) for t in document["tests"]] == [
        ("half", "RTN even"), ("same", "RTN even"), ("half", "same")
    ]  # fmt: skip
    test = document["tests"][0]
    assert test["difference"] == pytest.approx(half["kl_mean"] - even["kl_mean"]) and test["ci95"][1] < 0
    assert test["p"] < 0.01
    assert evaluate(replace(c, rows=6))["rows"]["RTN mse"]["kl_ci95"] == rows["RTN mse"]["kl_ci95"]


def test_a_release_is_the_rtn_row_of_its_rule(bf16_folder, release, tmp_path):
    """Converting a BF16 folder rounds its experts to nearest: the release must land on that row, bit for bit."""
    torch.manual_seed(0)
    examples = [{"input_ids": torch.randint(0, 500, (40,)).tolist(), "loss_mask": [1] * 40} for _ in range(6)]
    write_packed(tmp_path / "rows.safetensors", pack(examples, 48, 0), pack(examples, 48, 0))
    settings = {"model": str(release.source.path), "dataset_name": str(tmp_path / "rows.safetensors")}
    rows = evaluate(config(tmp_path, candidates=[str(release.path)], **settings))["rows"]
    assert rows["release"]["codes_changed"] == 0 and rows["release"]["weight_error"] == rows["RTN even"]["weight_error"]


def test_without_baselines_there_is_no_gap(folder):
    document = evaluate(config(folder, baselines=False, candidates=[str(folder / "half")]))
    assert list(document["rows"]) == ["reference", "noise", "half"] and document["tests"] == []
    assert document["rows"]["half"]["gap_closed"] is None


def test_files_and_command_line(folder):
    pytest.importorskip("matplotlib")
    arguments = ["--model", folder / "model", "--output_dir", folder / "out", "--candidates", f"[half={folder}/half]"]
    arguments += ["--dataset_name", folder / "rows.jsonl", "--held_out", "1", "--rows", "4", "--max_length", "48"]
    command = [sys.executable, "-m", "mimo_qat", "evaluate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    stored = json.loads((folder / "out/evaluate.json").read_text())
    assert last["rows"]["half"]["gap_closed"] == stored["rows"]["half"]["gap_closed"]
    assert last["figures"] == ["gap_closed.png", "kl_survival.png", "weight_error.png"]
    assert all((folder / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in last["figures"])
    text = (folder / "out/evaluate.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("| half")]
    assert len(tables) == 3 and f"{stored['rows']['half']['kl_mean']:.3g} [" in tables[0]
    assert f"{stored['rows']['half']['gap_closed']:.1%} [" in tables[1]
    assert stored["conditions"]["tokens"] == stored["conditions"]["labels"] + sum(  # a document's last token has none
        int(row.max()) + 1 for row in evaluation_rows(config(folder, rows=4), character_tokenizer())["doc_ids"]
    )
    assert json.loads((folder / "out/provenance.json").read_text())["config"]["rows"] == 4


def test_help_lists_every_field():
    done = subprocess.run([sys.executable, "-m", "mimo_qat", "evaluate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"--{name}" in done.stdout for name in EvaluateConfig.__dataclass_fields__)


def test_packed_file_gives_its_held_out_rows(folder):
    c = config(folder, held_out=0.5)
    sides = read_split(c.dataset_name, c.held_out, c.seed)
    kept, held = (pack_rows(side, character_tokenizer(), c.max_length) for side in sides)
    write_packed(folder / "rows.safetensors", kept, held)
    rows = evaluation_rows(replace(c, dataset_name=str(folder / "rows.safetensors"), rows=3), None)
    drawn = torch.randperm(len(held["input_ids"]), generator=torch.Generator().manual_seed(0))[:3]
    assert all(torch.equal(rows[name], held[name][drawn]) for name in held) and len(drawn) == 3
    again = evaluation_rows(replace(c, rows=1000), character_tokenizer())  # from the text: the same split, all of it
    assert sorted(again["input_ids"].tolist()) == sorted(held["input_ids"].tolist())


def write_packed(path, train, held_out):
    """What `mimo-qat pack` stores of packed rows."""
    from safetensors.torch import save_file

    parts = {"train": train, "held_out": held_out}
    save_file({f"{part}.{n}": rows[n].contiguous() for part, rows in parts.items()
               for n in ("input_ids", "loss_mask", "doc_ids")}, path)  # fmt: skip


def test_names_of_candidates():
    assert parse_candidates(["runs/a", "b=runs/c", "runs/lr=1e-5/x"]) == {
        "a": "runs/a", "b": "runs/c", "x": "runs/lr=1e-5/x"
    }  # fmt: skip
    for clash in (["runs/a", "other/a"], ["noise=runs/a"], ["RTN even=runs/a"]):
        with pytest.raises(ValueError, match="two rows are named"):
            parse_candidates(clash)


def test_refusals(folder, bf16_folder):
    with pytest.raises(ValueError, match=r"embed_tokens.weight is absent|is \(|must be a quantization"):
        evaluate(config(folder, baselines=False, candidates=[f"other={other_model(folder)}"]))
    with pytest.raises(ValueError, match="task_limit is 0; give at least 1"):
        main(config(folder, task_limit=0))
    with pytest.raises(ValueError, match="rows is 1; give at least 2"):
        main(config(folder, rows=1))
    with pytest.raises(ValueError, match="packed held-out rows; give more text"):
        evaluate(config(folder, held_out=0.001))
    with pytest.raises(ValueError, match="humaneval runs programs"):
        main(config(folder, tasks=["humaneval"]))


def other_model(folder):
    """A model with half the experts."""
    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
    from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM

    stored = MiMoV2Config.from_pretrained(folder / "model")
    stored.n_routed_experts = 4
    save_bf16(MiMoV2ForCausalLM(stored), character_tokenizer(), folder / "other")
    return folder / "other"
