"""What `bench` counts, on rounds and texts worked by hand, and the commands end to end on a tiny release."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimo_qat.card import read_results
from mimo_runtime import model
from mimo_runtime.bench import acceptance, compare, forced_drafts, measure, whole_rounds
from mimo_runtime.cli import main
from mimo_runtime.config import BenchConfig, EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine, Generation
from mimo_runtime.prompts import Prompt, encode, load_prompts, load_tokenizer
from mimo_runtime.quality import compare_logits, cut_windows, perplexity
from mimo_runtime.speculate import Round

ROOT = Path(__file__).parents[2]


def test_acceptance_by_hand():
    """Rounds of 4 and 1 and of 2, 4, 4 tokens with blocks of 4: 5 rounds, 15 tokens."""
    a = acceptance([[4, 1], [2, 4, 4], []], block=4)
    assert a["length"] == 3.0 and a["rounds"] == 5 and a["cap"] == 4
    assert a["length_mean_of_prompts"] == pytest.approx((2.5 + 10 / 3) / 2)
    assert a["survival"] == [0.8, 0.6, 0.6] and a["hit_rate"][0] == 0.8
    assert a["ci95"] == [2.5, pytest.approx(10 / 3, abs=1e-3)]
    assert acceptance([[], []], block=4)["length"] is None


def test_a_stop_token_ends_a_round_and_a_budget_cuts_it():
    rounds = [Round([1, 2, 3], 3, 2, False), Round([4, 5], 3, 3, True)]
    assert whole_rounds(Generation(tokens=[0, 1, 2, 3, 4, 5], rounds=rounds, finish="stop")) == [3, 2]
    assert whole_rounds(Generation(tokens=[0, 1, 2, 3, 4, 5], rounds=rounds, finish="length")) == [3]


@pytest.mark.parametrize("trees", [0, 4])
def test_every_way_is_warmed_up_before_it_is_timed(trees):
    """The first call of a way captures its graph; a short one that is not counted has to come before."""
    calls = []

    class Spy:
        drafter = "there is one"

        def padded(self, length):
            return None

        def generate(self, ids, sampling, *, speculate=True, tree=True, forced_acceptance=None):
            calls.append((speculate, speculate and tree, sampling.max_new_tokens))
            return Generation(tokens=[1])

    prompts = [(Prompt("a", "code"), [1]), (Prompt("b", "code"), [2])]
    measure(Spy(), prompts, BenchConfig(folder="f", max_new_tokens=64, tree_budget=trees))  # type: ignore[arg-type]
    ways = [(False, False), (True, False), *([(True, True)] if trees else [])]
    assert calls == [(*way, length) for length in (16, 64, 64) for way in ways]


def test_forced_drafts_have_the_length_as_their_mean():
    assert set(forced_drafts(6)) == {5} and set(forced_drafts(1)) == {0} and forced_drafts(None) is None
    drafts = forced_drafts(6.3)
    assert sum(drafts) == 530 and set(drafts) == {5, 6}
    assert all(sum(drafts[i : i + 10]) == 53 for i in range(0, 100, 10))


def test_divergence_and_perplexity_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]), torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    got = compare_logits(p.log() + 3.0, q.log() - 1.0, torch.tensor([2, 1]))
    kl = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(got["kl"], kl)
    assert got["agree"].tolist() == [False, True]
    torch.testing.assert_close(got["nll"], -q[0, 1].log()[None])
    table = perplexity([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])], seed=0)
    assert table["perplexity"] == pytest.approx(torch.tensor(2.0).exp().item())
    assert table["perplexity_ci95"] == pytest.approx([table["perplexity"]] * 2)


def test_comparison_does_not_depend_on_its_chunks():
    logits = torch.randn(2, 150, 20, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(150) % 20
    got = compare_logits(logits[0], logits[1], ids)
    log_p, log_q = logits.log_softmax(-1)
    torch.testing.assert_close(
        got["kl"], torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    )
    torch.testing.assert_close(got["nll"], torch.nn.functional.cross_entropy(logits[1, :-1], ids[1:], reduction="none"))


def test_a_comparison_holds_the_logits_of_one_row(reference, monkeypatch):
    """Those of a whole prompt of 256K tokens would be 160 GB; the gap is that of the row where the texts part."""
    engine = Engine(reference, EngineConfig(dtype="float32", device="cpu", max_len=128, prefill_chunk=16))
    prompt = [i * 7 % 500 for i in range(90)]
    plain = engine.generate(prompt, SamplingConfig(max_new_tokens=12)).tokens
    top = engine.logits(prompt + plain[:9])[-1].topk(2).values
    seen, linear = [], model.linear
    monkeypatch.setattr(
        model, "linear", lambda x, w: seen.append(len(x) if w is engine.target.head else 0) or linear(x, w)
    )
    found = compare(engine, prompt, plain, [*plain[:9], plain[9] + 1, 0, 0])
    assert found["at"] == 9 and found["gap"] == pytest.approx(float(top[0] - top[1]), abs=1e-4)
    assert max(seen) == 1


def test_windows_are_spread_over_the_text():
    assert cut_windows(iter([[0, 1, 2], [3, 4, 5, 6, 7, 8]]), 3, 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(ValueError, match="give more text"):
        cut_windows(iter([[1, 2]]), 2, 2)


def test_the_bundled_prompts():
    prompts = load_prompts()
    assert [sum(p.domain == d for p in prompts) for d in ("code", "reasoning", "chat")] == [8, 8, 8]
    assert {p.domain for p in load_prompts(limit=3)} == {"code", "reasoning", "chat"}
    assert len({p.text for p in prompts}) == 24


# --- the commands, on a tiny release with a tokenizer -----------------------------------------------------------------


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_bench_command(with_tokenizer, capsys):
    release, _ = with_tokenizer
    flags = ["--limit=2", "--max_new_tokens=24", "--dtype=float32", "--device=cpu", "--max_len=512"]
    assert main(["bench", str(release), *flags]) == 0
    doc = last_line(capsys)
    assert doc["identical"] is True and doc["ok"] is True and doc["prompts"] == 2
    assert doc["acceptance"]["cap"] == 8 and 1 <= doc["acceptance"]["length"] <= 8
    assert doc["conditions"]["settings"]["max_new_tokens"] == 24 and doc["conditions"]["versions"]["torch"]
    assert main(["bench", str(release), *flags, "--forced_acceptance=6"]) == 0
    doc = last_line(capsys)
    assert doc["acceptance"]["length"] == 6.0 and doc["forced_acceptance"] == 6 and "tree" not in doc
    for wrong, why in (("0.5", "a round yields 1 token or more"), ("9", "a block of 8 cannot yield more")):
        assert main(["bench", str(release), *flags, f"--forced_acceptance={wrong}"]) != 0
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("forced", [None, 4])
def test_bench_of_trees_beside_chains(with_tokenizer, capsys, tmp_path, forced):
    release, _ = with_tokenizer
    flags = ["--limit=2", "--max_new_tokens=24", "--dtype=float32", "--device=cpu", "--max_len=512"]
    flags += ["--tree_budget=21", f"--output={tmp_path / 'out.json'}"]
    flags += [f"--forced_acceptance={forced}"] if forced else []
    assert main(["bench", str(release), *flags]) == 0
    doc = last_line(capsys)
    assert doc["identical"] is True and doc["tree"]["acceptance"]["cap"] == 8
    assert doc["tree"]["speedup"] == pytest.approx(doc["tree"]["tokens_per_second"] / doc["plain_tokens_per_second"])
    if forced:
        assert doc["acceptance"]["length"] == doc["tree"]["acceptance"]["length"] == 4.0
    names = {r["name"]: r for r in read_results([str(tmp_path / "out.json")])}
    assert names["tree_acceptance_length"]["value"] == doc["tree"]["acceptance"]["length"]
    assert names["tree_tokens_per_s"]["conditions"]["tree_budget"] == 21


def test_drafts_stay_below_the_tokenizer(with_tokenizer):
    release, _ = with_tokenizer
    engine = Engine(release, EngineConfig(dtype="float32", device="cpu", max_len=128))
    assert engine.drafter is not None and engine.drafter.vocab_size == 258
    out = engine.generate([5, 6, 7], SamplingConfig(max_new_tokens=100))
    assert all(r.drafted == 7 for r in out.rounds) and max(out.tokens) > 257


def test_output_keeps_the_printed_document_with_records(with_tokenizer, capsys, tmp_path):
    release, reference = with_tokenizer
    out = tmp_path / "new/bench.json"
    flags = ["--limit=2", "--max_new_tokens=12", "--dtype=float32", "--device=cpu", "--max_len=512"]
    assert main(["bench", str(release), *flags, "--output", str(out)]) == 0
    printed = last_line(capsys)
    assert json.loads(out.read_text()) == printed and "output" not in printed["conditions"]["settings"]
    found = {r["name"]: r for r in read_results([str(out)])}
    assert found["tokens_per_s"]["value"] == printed["tokens_per_second"]
    assert found["acceptance_length"]["value"] == printed["acceptance"]["length"]
    assert found["acceptance_length"]["conditions"]["block"] == 8
    flags = ["--windows=2", "--length=16", "--device=cpu", "--drafter=null"]
    out = tmp_path / "quality.json"
    assert main(["quality", str(release), "--reference", str(reference), *flags, "--output", str(out)]) == 0
    printed = last_line(capsys)
    assert json.loads(out.read_text()) == printed
    rows = {(r["conditions"]["row"], r["name"]): r for r in read_results([str(out)])}
    assert len(rows) == 4 * len(printed["rows"])
    kl = rows["release", "kl_mean"]
    assert kl["value"] == printed["rows"]["release"]["kl_mean"] and kl["unit"] == "nats/token"
    assert kl["conditions"]["text"] == "source of Python's standard library" and kl["conditions"]["windows"] == 2


def test_lossless_writes_records(with_tokenizer, capsys, tmp_path, monkeypatch):
    """In the form of docs/results/lossless-cpu.json, which the same script measured."""
    release, _ = with_tokenizer
    spec = importlib.util.spec_from_file_location("lossless", ROOT / "scripts/lossless.py")
    lossless = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lossless)
    out = tmp_path / "lossless.json"
    flags = ["--limit=2", "--max_new_tokens=12", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [str(ROOT / "scripts/lossless.py"), str(release), *flags])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # else of pytest, where it runs as a module
    assert lossless.main() == 0
    printed, found = last_line(capsys), read_results([str(out)])
    published = json.loads((ROOT / "docs/results/lossless-cpu.json").read_text())
    assert [r["name"] for r in found] == [r["name"] for r in published]
    for ours, theirs in zip(found, published, strict=True):
        assert ours.keys() == theirs.keys() and ours["conditions"].keys() == theirs["conditions"].keys()
        assert ours["conditions"]["settings"].keys() >= theirs["conditions"]["settings"].keys()
        assert ours["value"] == 2 and ours["unit"] == "of 2 prompts"
        assert ours["command"].startswith(f"python scripts/lossless.py {release}")
    assert found[2]["conditions"]["acceptance_length"] == printed["ways"]["forced 0 to B-1"]["acceptance_length"]


def test_quality_command(with_tokenizer, capsys):
    release, reference = with_tokenizer
    flags = ["--windows=3", "--length=32", "--dtype=float32", "--device=cpu"]
    assert main(["quality", str(release), "--reference", str(reference), *flags]) == 0
    rows = last_line(capsys)["rows"]
    assert rows["reference"]["kl_mean"] == 0.0 and rows["reference"]["top1_agreement"] == 1.0
    noise, low, plain, release_row = (
        rows[n]["kl_mean"] for n in ("noise: other chunks", "noise: bfloat16", "plain MXFP4 (even)", "release")
    )
    assert noise < 1e-9 < low < plain < release_row  # the release also quantised its spine


def test_generate_command(with_tokenizer, capsys, tmp_path):
    release, _ = with_tokenizer
    settings = tmp_path / "settings.yaml"
    settings.write_text("max_new_tokens: 12\nmax_len: 64\ndevice: cpu\nprompt: hello\n")
    assert main(["generate", str(release), "--config", str(settings)]) == 0
    out = capsys.readouterr()
    assert "5 prompt tokens" in out.err and "12 tokens" in out.err
    tokenizer, engine = load_tokenizer(release), Engine(release, EngineConfig(max_len=64, device="cpu"))
    tokens = engine.generate(encode(tokenizer, "hello"), SamplingConfig(max_new_tokens=12)).tokens
    assert out.out == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False) + "\n"


@pytest.mark.parametrize("fault", ["no folder", "no tokenizer", "cut file", "wrong drafter", "prompt too long"])
def test_faults_are_one_line(fault, with_tokenizer, capsys, tmp_path):
    release, _ = with_tokenizer
    args, message = [str(release)], ""
    if fault == "no folder":
        args, message = [str(tmp_path / "nowhere")], "is not a folder"
    elif fault == "no tokenizer":
        (release / "tokenizer.json").unlink()
        (release / "tokenizer_config.json").unlink()
        message = "has no tokenizer"
    elif fault == "cut file":
        file = next(release.glob("model_pp0_ep0_*"))
        file.write_bytes(file.read_bytes()[:-10])
        message = file.name
    elif fault == "wrong drafter":
        config = json.loads((release / "dflash" / "config.json").read_text())
        config["dflash_config"]["target_layer_ids"] = [0, 1, 2, 40]
        config.pop("num_target_layers")
        (release / "dflash" / "config.json").write_text(json.dumps(config))
        message = "40"
    else:
        args, message = [*args, "--max_len=16"], "raise max_len"
    assert main(["bench", *args, "--device=cpu", "--max_new_tokens=4"]) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in captured.err


@pytest.mark.parametrize("args", [[], ["nonsense"], ["bench", "x", "--tempature=1"], ["generate"]], ids=str)
def test_wrong_usage_exits_2(args, capsys):
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and "Traceback" not in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    root = Path(__file__).parents[2]
    code = (
        "import sys; sys.path[:0] = ['.', 'kernels', 'runtime']\n"
        "from mimo_runtime.cli import main\n"
        "try: main(['bench', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "forced_acceptance" in done.stdout, done.stderr


def test_a_benchmark_setting_is_checked():
    with pytest.raises(ValueError, match="top_p"):
        BenchConfig(folder="x", top_p=0)
