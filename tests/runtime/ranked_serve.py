"""One of two processes that `test_serve_ranks` starts: argv is the job, a JSON document.

{"folder": a release, "report": where to write, "decode": bool, "then": how it ends}

Rank 0 gives out jobs, the other follows; each writes what it saw of every job to REPORT-RANK.json. Then in one more job
rank 1 "fails" on its own, or rank 0 "hangs".
"""

import json
import sys
import time
from pathlib import Path

import torch

from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.rounds import Rounds
from mimo_runtime.serve_ranks import Control, SharedEngine

PROMPT = [(7 * i) % 512 for i in range(20)]  # two prefill chunks
SAMPLINGS = [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "seed": 4}]
TOO_LONG = list(range(130))
CUTS = (0, 3)  # calls of on_tokens that end a job


def settings(**changes) -> EngineConfig:
    fields = {"device": "cpu", "dtype": "float32", "max_len": 128, "prefill_chunk": 16, "tree_budget": 12}
    return EngineConfig(**(fields | {"rank_timeout": 6.0} | changes))


class GaveUp(Exception):
    """What a client's end raises in the engine."""


class Watched:
    """An engine that notes what became of each call: [tokens, the error's type, collectives begun]. Odd calls draft
    chains, even ones trees; on rank 1 `fail` raises after the third round."""

    def __init__(self, engine: Engine):
        self.engine, self.target, self.drafter, self.device = engine, engine.target, engine.drafter, engine.device
        self.ranks, self.seen, self.fail = engine.ranks, [], False

    def generate(self, prompt, sampling, *, on_tokens):
        tokens, calls, rounds = [], self.ranks.watch.calls, 0

        def after(new):
            nonlocal rounds
            rounds += 1
            tokens.extend(new)
            if self.fail and rounds == 3:
                raise RuntimeError("no memory left")
            on_tokens(new)

        kind = "finished"
        try:
            return self.engine.generate(prompt, sampling, tree=len(self.seen) % 2 == 1, on_tokens=after)
        except Exception as error:
            kind = "refused" if isinstance(error, ValueError) else "ended"
            raise
        finally:
            self.seen.append([tokens, kind, self.ranks.watch.calls - calls])


def jobs(shared: SharedEngine) -> None:
    """Every way that a job may end, with chains and with trees, each before one that goes well."""

    def run(prompt, sampling, cut=None):
        count = 0

        def on_tokens(_):
            nonlocal count
            if count == cut:
                raise GaveUp
            count += 1

        shared.generate(prompt, SamplingConfig(max_new_tokens=20, **sampling), on_tokens=on_tokens)

    for sampling in SAMPLINGS:
        for _ in range(2):
            run(PROMPT, sampling)
    for cut in CUTS:
        for _ in range(2):
            try:
                run(PROMPT, {}, cut)
                raise AssertionError("the client's end was not noticed")
            except GaveUp:
                pass
    try:
        run(TOO_LONG, {})
        raise AssertionError("too long a prompt was taken")
    except ValueError:
        pass
    run(PROMPT, {})


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    control = Control("cpu")
    engine = Engine(job["folder"], settings())
    engine.rounds = Rounds(engine.state, 3, False, engine.ranks)  # ahead, as on a GPU
    watched = Watched(engine)
    shared = SharedEngine(watched, control)
    path = Path(f"{job['report']}-{engine.ranks.rank}.json")
    if engine.ranks.rank:
        control.meet()
        if not job["decode"]:
            watched.fail = job["then"] == "fails"
        shared.follow()
        path.write_text(json.dumps(watched.seen))
        return
    with shared:
        if job["decode"]:
            jobs(shared)
        else:
            hang = time.sleep if job["then"] == "hangs" else abs
            shared.generate(PROMPT, SamplingConfig(max_new_tokens=60), on_tokens=lambda tokens: hang(60))
    path.write_text(json.dumps(watched.seen))


if __name__ == "__main__":
    main()
