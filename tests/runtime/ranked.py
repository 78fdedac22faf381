"""One of several processes that `test_parallel` starts: argv is the job, a JSON document.

{"folder": a release, "drafter": its folder, "report": where to write, "decode": bool, "then": how it ends}

Writes what it decoded to REPORT-RANK.json, then the last rank misbehaves: it "differs", "dies", "hangs" or "ends".
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.rounds import Rounds

PROMPT = [(7 * i) % 512 for i in range(20)]  # two prefill chunks
SAMPLINGS = [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "seed": 4}]
HOW = [{"speculate": False}, {"tree": False}, {}, {"forced_acceptance": [7, 0, 3]}]
TREE = 12


def settings(**changes) -> EngineConfig:
    fields = {"device": "cpu", "dtype": "float32", "max_len": 128, "prefill_chunk": 16, "tree_budget": TREE}
    return EngineConfig(**(fields | {"check_ranks": True, "rank_timeout": 6.0} | changes))


def everything(engine: Engine) -> list[list[int]]:
    """The tokens of all samplings and ways to draft; a tree_budget makes `{}` a tree."""
    return [
        engine.generate(PROMPT, SamplingConfig(max_new_tokens=20, **sampling), **how).tokens
        for sampling in SAMPLINGS
        for how in HOW
    ]


def misbehave(engine: Engine, then: str) -> str:
    """What a long generation says when the last rank does `then` after its third round."""
    parts = []

    def after(tokens: list[int]) -> None:
        parts.append(tokens)
        if len(parts) != 4 or engine.ranks.rank != engine.ranks.size - 1:
            return
        if then == "differs":
            engine.target.layers[1].post_norm.weight[3] += 1e-6
        elif then == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif then == "hangs":
            time.sleep(60)
        elif then == "ends":
            raise RuntimeError("a reason of its own")

    try:
        engine.generate(PROMPT, SamplingConfig(max_new_tokens=60), tree=False, on_tokens=after)
    except ValueError as error:
        return str(error)
    return "nothing"


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    report = {}
    if job["decode"]:
        other = Engine(job["folder"], settings(drafter=job["drafter"], dtype="bfloat16", tree_adaptive=True))
        report["bfloat16"] = other.generate(PROMPT, SamplingConfig(max_new_tokens=20, temperature=1.0)).tokens
    engine = Engine(job["folder"], settings(drafter=job["drafter"]))
    if job["decode"]:
        report["tokens"] = everything(engine)
        one = engine.rounds
        engine.rounds = Rounds(engine.state, 3, False, engine.ranks)  # ahead, as on a GPU
        report["ahead"] = [
            engine.generate(PROMPT, SamplingConfig(max_new_tokens=20), tree=tree).tokens for tree in (False, True)
        ]
        engine.rounds = one
        engine._sizes = [64]  # as on a GPU
        report["padded"] = [
            engine.generate(PROMPT, SamplingConfig(max_new_tokens=20), tree=tree).tokens for tree in (False, True)
        ]
        engine._sizes = []
    path = Path(f"{job['report']}-{engine.ranks.rank}.json")
    path.write_text(json.dumps(report))
    report["said"] = misbehave(engine, job["then"])
    path.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
