"""python scripts/lossless.py runs/demo/release: proves on real prompts that drafts change no token.

Greedy output without a drafter is compared, token for token, with the output of the release's own drafter, of a
drafter with random weights, and of forced acceptance lengths 0, 1, ..., block - 1 in turn. Prints one JSON document
last, writes the figures as records with `--out docs/results/NAME.json`, and exits with 1 if any token differs.
"""

import argparse
import json
import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from mimo_qat.drafting import mean_rounds
from mimo_qat.provenance import write_json
from mimo_runtime.bench import conditions, record, whole_rounds
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine, Generation
from mimo_runtime.prompts import encode, load_prompts, load_tokenizer


def randomised(part: Any) -> Any:
    """The same part of a drafter with random matrices: what it proposes is noise."""
    if isinstance(part, torch.Tensor):
        return part if part.dim() < 2 else torch.randn_like(part) * part.float().std().to(part.dtype)
    if isinstance(part, tuple):
        return tuple(map(randomised, part))
    if is_dataclass(part):
        return replace(part, **{f.name: randomised(getattr(part, f.name)) for f in fields(part)})
    return part


def records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of the printed document in the form of docs/results/: one record a way of drafting."""
    made = document["conditions"]
    made = made | {"command": f"python scripts/{made['command']}"}
    where = {k: made[k] for k in ("hardware", "versions", "block", "settings")} | {"tokens": document["tokens"]}
    return [
        record(
            "lossless_identical_" + re.sub(r"\W+", "_", way),
            row["identical"],
            f"of {row['of']} prompts",
            where | {"acceptance_length": row["acceptance_length"]},
            made,
        )
        for way, row in document["ways"].items()
    ]


def main() -> int:
    """Runs every prompt in every way; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="release with its drafter in dflash/")
    parser.add_argument("--prompts", help=".jsonl file; the bundled prompts without it")
    parser.add_argument("--limit", type=int, default=20, help="how many of the prompts, evenly spread")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to generate for each prompt")
    parser.add_argument("--max_len", type=int, default=1024, help="longest prompt and output together, in tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--cuda_graphs", action="store_true", help="on a GPU: replay rounds as graphs")
    parser.add_argument("--out", help="JSON file to write the figures to, as records")
    options = parser.parse_args()
    cfg = EngineConfig(dtype=options.dtype, max_len=options.max_len, cuda_graphs=options.cuda_graphs)
    engine, noisy = Engine(options.folder, cfg), Engine(options.folder, cfg)  # graphs keep the drafter they began with
    if noisy.drafter is None:
        parser.error(f"{options.folder} has no drafter; give a release with dflash/")
    torch.manual_seed(0)
    noisy.drafter = replace(noisy.drafter, fc=randomised(noisy.drafter.fc), layers=randomised(noisy.drafter.layers))
    tokenizer = load_tokenizer(options.folder)
    sampling = SamplingConfig(max_new_tokens=options.max_new_tokens)
    every_length = list(range(engine.block))
    runs: dict[str, list[Generation]] = {"plain": [], "drafter": [], "random drafter": [], "forced 0 to B-1": []}
    for prompt in tqdm(load_prompts(options.prompts, options.limit), desc="prompts"):
        ids = encode(tokenizer, prompt.text)
        runs["plain"].append(engine.generate(ids, sampling, speculate=False))
        runs["drafter"].append(engine.generate(ids, sampling))
        runs["random drafter"].append(noisy.generate(ids, sampling))
        runs["forced 0 to B-1"].append(engine.generate(ids, sampling, forced_acceptance=every_length))
    plain = [run.tokens for run in runs.pop("plain")]
    result = {}
    for way, found in runs.items():
        same = sum(run.tokens == tokens for run, tokens in zip(found, plain, strict=True))
        length = mean_rounds([whole_rounds(run) for run in found])
        result[way] = {"identical": same, "of": len(plain), "acceptance_length": length}
        print(f"{way:16} {same}/{len(plain)} identical, acceptance length {length:.2f}")
    ok = all(row["identical"] == row["of"] for row in result.values())
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    document = {"ok": ok, "tokens": sum(map(len, plain)), "ways": result, "conditions": conditions(engine, settings)}
    if options.out:
        write_json(options.out, records(document))
    print(json.dumps(document))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
