"""The verdicts of scripts/node_check.sh, on documents that the commands printed and on ones changed by hand."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_runtime.verdict import VerdictConfig, judge, main, read_steps

ROOT = Path(__file__).parents[2]

# Recorded on a tiny random release (bench --limit 6 --max_new_tokens 32; quality --windows 4 --length 64), shortened.
ENV = {
    "commit": "38383d0ac64b",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "hardware": {"cpu": "AMD EPYC", "cores": 2, "threads": 1, "gpus": []},
}
CHECK = {"ok": True, "folder": "release", "errors": 0, "expert_tensors": 144, "files": 1, "findings": []}
CODE = {
    "prompts": 2,
    "plain_tokens_per_second": 326.2227335767687,
    "lookup_length": 1.625,
    "tokens_per_second": 182.52950679960674,
    "acceptance": {"length": 1.0163934426229508, "ci95": [1.0, 1.0333333333333334], "cap": 8, "rounds": 61},
}
REASONING = {
    "prompts": 2,
    "plain_tokens_per_second": 319.329612184928,
    "lookup_length": 1.65625,
    "tokens_per_second": 179.8360463194972,
    "acceptance": {"length": 1.0508474576271187, "ci95": [1.0, 1.1071428571428572], "cap": 8, "rounds": 59},
}
BENCH = {
    "ok": True,
    "prompts": 6,
    "plain_tokens_per_second": 317.0373742352428,
    "tokens_per_second": 175.85569411811818,
    "domains": {"code": CODE, "reasoning": REASONING},
    "identical": True,
    "divergences": [],
    "forced_acceptance": None,
    "conditions": {"settings": {"max_new_tokens": 32, "temperature": 0.0, "dtype": "bfloat16", "device": "cpu"}},
}
QUALITY = {
    "ok": True,
    "rows": {
        "reference": {"kl_mean": 0.0, "top1_agreement": 1.0, "perplexity": 606.7624967970446},
        "plain MXFP4 (even)": {"kl_mean": 0.00060343146788, "top1_agreement": 0.890625, "perplexity": 605.42958},
        "release": {"kl_mean": 0.001095750466561185, "top1_agreement": 0.8359375, "perplexity": 605.3014940766848},
    },
}


@pytest.fixture
def keep(tmp_path):
    """keep(env=..., ...) -> a folder as the script leaves it; a document None is a command that failed."""

    def write(**documents):
        for name, document in documents.items():
            (tmp_path / f"{name}.command").write_text(f"mimo-runtime {name} 'a release'")
            last = "error: it is broken" if document is None else json.dumps(document)
            (tmp_path / f"{name}.log").write_text(f"{{a line that is no document\n{last}\nwarning at exit\n")
        return tmp_path

    return write


def verdicts(folder) -> dict[str, str]:
    return {row.claim: row.verdict for row in judge(read_steps(folder))}


def test_the_recorded_run(keep, capsys):
    document = main(VerdictConfig(folder=str(keep(env=ENV, check=CHECK, bench=BENCH, quality=QUALITY))))
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "AMD EPYC, 2 cores, no GPU; torch 2.13.0+cpu; commit 38383d0ac64b",
        "6 prompts, 32 tokens each, temperature 0.0, bfloat16, batch 1 on cpu; published for 1.02 T parameters on one "
        "8-GPU node",
        "",
        "| claim | published | measured here | verdict |",
        "|---|---|---|---|",
        "| release is whole | - | 0 errors, 144 expert tensors in 1 files | yes |",
        "| same output with and without drafts | lossless | 6 of 6 prompts identical | yes |",
        "| speed, all prompts | 1,000 to 1,200 tokens/s | 175.9 tokens/s (317.0 without drafts) | not reached |",
        "| speed, code | 1,000 to 1,200 tokens/s | 182.5 tokens/s (326.2 without drafts) | not reached |",
        "| speed, reasoning | 1,000 to 1,200 tokens/s | 179.8 tokens/s (319.3 without drafts) | not reached |",
        "| acceptance length, code | 6.30 of 8 | 1.02 (1.00 to 1.03) of 8; n-gram copier 1.62 | not reached |",
        "| acceptance length, reasoning | 5.56 of 8 | 1.05 (1.00 to 1.11) of 8; n-gram copier 1.66 | not reached |",
        "| quality | on par (here: at most +1%) | perplexity 605.301, -0.24% of the reference's; KL 0.0011 (round to "
        "nearest 0.0006); top-1 agreement 83.6% | reached |",
    ]
    assert document["ok"] is True and document["failed"] == []  # not reached is no failure
    assert [r["verdict"] for r in document["rows"]].count("not reached") == 5
    assert document["documents"]["bench"] == BENCH and document["commands"]["bench"][-1] == "a release"


@pytest.mark.parametrize(
    ("length", "high", "verdict"),
    [
        (6.30, 6.5, "reached"),
        (6.29, 6.30, "open: the interval holds the claim"),
        (6.29, 6.2999, "not reached"),
        (5.56, 5.6, "not reached"),  # enough for reasoning only
    ],
)
def test_acceptance_is_judged_with_its_interval(keep, length, high, verdict):
    bench = copy.deepcopy(BENCH)
    bench["domains"]["code"]["acceptance"] |= {"length": length, "ci95": [5.0, high]}
    bench["domains"]["reasoning"]["acceptance"] |= {"length": length, "ci95": [5.0, high]}
    got = verdicts(keep(check=CHECK, bench=bench))
    assert got["acceptance length, code"] == verdict and got["acceptance length, reasoning"] == "reached"


@pytest.mark.parametrize(("speed", "verdict"), [(1000.0, "reached"), (999.99, "not reached")])
def test_speed_is_judged_where_it_was_measured(keep, speed, verdict):
    bench = copy.deepcopy(BENCH)
    bench["domains"]["code"]["tokens_per_second"] = speed
    got = verdicts(keep(check=CHECK, bench=bench))
    assert got["speed, code"] == verdict and got["speed, all prompts"] == "not reached"


def test_quality_is_judged_by_perplexity(keep):
    quality = copy.deepcopy(QUALITY)
    for factor, verdict in ((1.0099, "reached"), (1.0101, "not reached")):
        quality["rows"]["release"]["perplexity"] = factor * quality["rows"]["reference"]["perplexity"]
        assert verdicts(keep(check=CHECK, bench=BENCH, quality=quality))["quality"] == verdict


def test_what_was_not_measured_is_said(keep):
    assert verdicts(keep(check=CHECK))["speed"] == "not measured"
    got = verdicts(keep(check=CHECK, bench=BENCH | {"forced_acceptance": 5}))
    assert got["quality"] == "not measured: give --reference"
    assert {v for c, v in got.items() if c.startswith("speed")} == {"not measured: the acceptance was forced"}
    assert got["acceptance length, code"].startswith("not measured")
    plain = {k: v for k, v in CODE.items() if k not in ("tokens_per_second", "acceptance")}
    bench = {k: v for k, v in BENCH.items() if k != "tokens_per_second"} | {"identical": None}
    bench |= {"domains": {"code": plain}, "plain_tokens_per_second": 1001.0}
    got = verdicts(keep(check=CHECK, bench=bench))
    assert got["same output with and without drafts"] == "not measured" and got["speed, all prompts"] == "reached"
    assert got["acceptance length, code"].startswith("not measured") and "speed, reasoning" not in got


def test_what_failed_fails(keep, capsys):
    apart = BENCH | {"ok": False, "identical": False, "divergences": [{"prompt": p, "way": "drafted"} for p in (0, 2)]}
    folder = keep(env=ENV, check=CHECK | {"ok": False, "errors": 3}, bench=apart, quality=None)
    document = main(VerdictConfig(folder=str(folder)))
    assert document["ok"] is False and document["failed"] == ["bench", "check", "quality"]
    rows = {r["claim"]: r for r in document["rows"]}
    assert rows["release is whole"]["verdict"] == "FAILED" and "3 errors" in rows["release is whole"]["measured"]
    assert rows["same output with and without drafts"]["verdict"] == "FAILED"
    assert rows["same output with and without drafts"]["measured"] == "4 of 6 prompts identical"
    assert rows["quality"]["verdict"].startswith("FAILED") and "quality.log" in capsys.readouterr().out
    near = verdicts(keep(bench=apart | {"ok": True}))
    assert near["same output with and without drafts"] == "up to rounding of near-ties"
    assert verdicts(keep(check=None, bench=None))["speed"].startswith("FAILED")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"node_check\.sh"):
        read_steps(tmp_path)


def run(*arguments):
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts/node_check.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_script_end_to_end(reference, tmp_path):
    """With the commands as they are today: what the table reads has to be there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mimo_qat.convert import ConvertConfig
    from mimo_qat.convert import main as convert

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(reference)
    release, out = tmp_path / "a release", tmp_path / "out"
    convert(ConvertConfig(target=str(reference), out=str(release)))
    flags = ["--out", out, "--quick", "--", "--limit", 3, "--max_new_tokens", 8, "--device", "cpu"]
    done = run(release, "--reference", reference, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["ok"] and set(document["documents"]) == {"env", "check", "bench", "quality"}
    table = {row["claim"]: row for row in document["rows"]}
    assert len(table) == 8 and table["release is whole"]["verdict"] == "yes"
    speed = document["documents"]["bench"]["domains"]["code"]["tokens_per_second"]
    assert table["speed, code"]["measured"].startswith(f"{speed:,.1f} tokens/s")
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1  # the steps' documents are inside of it


def test_the_script_goes_on_after_a_failed_step_and_exits_with_one(tmp_path):
    done = run(tmp_path / "nowhere", "--out", tmp_path / "out", "--quick")
    assert done.returncode == 1 and "is not a folder" in done.stdout
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["failed"] == ["bench", "check"] and document["documents"]["env"]["versions"]
    assert run("a", "b").returncode == 2 and run("--nonsense").returncode == 2
