"""mimo-runtime quality runs/demo/release --reference runs/demo/qat --windows 8

What quantisation cost, position by position: the divergence KL(reference || row) of the next-token distributions over
the whole vocabulary, in float32, on text that neither was trained for. A release stands between two rows: noise (the
reference itself, computed in other chunks or another type) and plain round-to-nearest quantisation of the reference's
experts. The last line is one JSON document, which `--output` keeps in a file; its "records" are the figures for model
cards and docs/results/.
"""

import json
import math
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mimo_qat.provenance import write_json
from mimo_runtime.bench import conditions, record
from mimo_runtime.config import QualityConfig
from mimo_runtime.engine import Engine
from mimo_runtime.prompts import encode_messages, load_tokenizer

STDLIB = ("textwrap", "heapq", "statistics", "configparser", "shlex", "fractions", "csv", "sched", "queue", "calendar")
UNITS = {"kl_mean": "nats/token", "kl_p99": "nats/token", "top1_agreement": "fraction", "perplexity": ""}
CHUNK = 64  # positions whose full distributions are in memory at once


def read_text(path: str | None, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document: lines {"text"} or {"messages"} of a .jsonl, a .txt, or standard library modules."""
    if path is None:
        for name in STDLIB:
            source = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
            yield tokenizer.encode(source.read_text(encoding="utf-8"), add_special_tokens=False)
        return
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; give a .jsonl or .txt file, or leave --text out")
    text = Path(path).read_text(encoding="utf-8")
    if not path.endswith(".jsonl"):
        yield tokenizer.encode(text, add_special_tokens=False)
        return
    for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
        try:
            row = json.loads(line)
            messages = row.get("messages")
            ids = tokenizer.encode(row["text"]) if messages is None else encode_messages(tokenizer, messages)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{path} line {number} has neither "text" nor "messages"; correct it') from None
        yield ids


def cut_windows(documents: Iterator[list[int]], count: int, length: int) -> list[list[int]]:
    """`count` stretches of `length` tokens, evenly spaced over the joined documents."""
    ids = [t for document in documents for t in document]
    if len(ids) < count * length:
        raise ValueError(
            f"the text has {len(ids)} tokens, {count} windows of {length} need {count * length}; "
            "give more text, or fewer or shorter windows"
        )
    step = (len(ids) - length) // max(count - 1, 1)
    return [ids[i * step : i * step + length] for i in range(count)]


def compare_logits(reference: torch.Tensor, row: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per position, from float32 logits [T, vocabulary]: kl in nats, agree (same top token), nll of the next token
    (one fewer)."""
    kl, agree, nll = [], [], []
    for start in range(0, len(ids), CHUNK):
        p, q = reference[start : start + CHUNK], row[start : start + CHUNK]
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        # p log(p/q) + q - p: the same sum with terms that are all positive, so that tiny divergences survive float32.
        gap = log_p - log_q
        kl.append((log_p.exp() * (torch.expm1(-gap) + gap)).sum(-1).clamp_(min=0))
        agree.append(p.argmax(-1) == q.argmax(-1))
        after = ids[start + 1 : start + 1 + len(q)]
        nll.append(-log_q[: len(after)].gather(1, after[:, None])[:, 0])
    return {"kl": torch.cat(kl).cpu(), "agree": torch.cat(agree).cpu(), "nll": torch.cat(nll).cpu()}


def perplexity(nll: list[torch.Tensor], seed: int, resamples: int = 1000) -> dict[str, Any]:
    """exp of the mean negative log-likelihood, with a 95 % bootstrap interval over windows."""
    rng, means = random.Random(seed), [float(n.mean()) for n in nll]
    draws = sorted(math.exp(sum(rng.choices(means, k=len(means))) / len(means)) for _ in range(resamples))
    return {
        "perplexity": math.exp(sum(means) / len(means)),
        "perplexity_ci95": [draws[int(0.025 * (resamples - 1))], draws[int(0.975 * (resamples - 1))]],
    }


def judge(reference: Engine, row: Engine, windows: list[list[int]], chunk: int, seed: int) -> dict[str, Any]:
    """One row of the table: `row` (computed `chunk` tokens at once) against the reference."""
    parts = []
    for ids in windows:
        theirs = row.logits(ids, chunk).to(reference.device)
        parts.append(compare_logits(reference.logits(ids), theirs, torch.tensor(ids, device=reference.device)))
    kl = torch.cat([p["kl"] for p in parts]).double()
    marks = kl.quantile(torch.tensor([0.5, 0.99, 0.999], dtype=torch.float64)).tolist()
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": marks[0],
        "kl_p99": marks[1],
        "kl_p99.9": marks[2],
        "top1_agreement": float(torch.cat([p["agree"] for p in parts]).double().mean()),
        **perplexity([p["nll"] for p in parts], seed),
    }


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    print(f"{'':24} {'KL mean':>10} {'median':>10} {'p99':>10} {'p99.9':>10} {'top-1':>7} {'perplexity [95 %]':>28}")
    for name, r in rows.items():
        interval = f"{r['perplexity']:.3f} [{r['perplexity_ci95'][0]:.3f}, {r['perplexity_ci95'][1]:.3f}]"
        print(f"{name:24} {r['kl_mean']:10.2e} {r['kl_median']:10.2e} {r['kl_p99']:10.2e} {r['kl_p99.9']:10.2e} "
              f"{r['top1_agreement']:7.2%} {interval:>28}")  # fmt: skip


def main(cfg: QualityConfig) -> dict[str, Any]:
    """Compares a release with its unquantised reference, beside plain quantisation and numerical noise."""
    windows = cut_windows(read_text(cfg.text, load_tokenizer(cfg.reference)), cfg.windows, cfg.length)
    engine_cfg = replace(cfg, drafter=None, max_len=cfg.length, prefill_chunk=cfg.length)
    reference = Engine(cfg.reference, engine_cfg)
    rows = {"reference": judge(reference, reference, windows, cfg.length, cfg.seed)}
    rows["noise: other chunks"] = judge(reference, reference, windows, max(cfg.length // 4, 1), cfg.seed)
    if cfg.dtype == "float32":
        other = Engine(cfg.reference, replace(engine_cfg, dtype="bfloat16"))
        rows["noise: bfloat16"] = judge(reference, other, windows, cfg.length, cfg.seed)
        del other
    plain = Engine(cfg.reference, engine_cfg, rtn=cfg.rule)
    rows[f"plain MXFP4 ({cfg.rule})"] = judge(reference, plain, windows, cfg.length, cfg.seed)
    del plain
    release = Engine(cfg.folder, engine_cfg)
    if release.target.geometry.vocab_size != reference.target.geometry.vocab_size:
        raise ValueError(f"{cfg.folder} and {cfg.reference} have different vocabularies; they are not of one model")
    rows["release"] = judge(reference, release, windows, cfg.length, cfg.seed)
    _print_table(rows)
    made = conditions(reference, asdict(cfg))
    document = {"ok": True, "rows": rows, "conditions": made, "records": _records(rows, made)}
    if cfg.output:
        write_json(cfg.output, document)
    return document


def _records(rows: dict[str, dict[str, Any]], made: dict[str, Any]) -> list[dict[str, Any]]:
    """The main figures of every row."""
    settings = made["settings"]
    where = {k: settings[k] for k in ("windows", "length", "dtype", "seed")}
    where["text"] = settings["text"] or "source of Python's standard library"
    where |= made["hardware"] | made["versions"]
    return [
        record(name, row[name], unit, {"row": label} | where, made)
        for label, row in rows.items()
        for name, unit in UNITS.items()
    ]
