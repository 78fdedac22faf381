"""python scripts/soak.py --synthetic flash --layers 4 --rounds 10000

Thousands of rounds of a synthetic model, with accepted drafts drawn at random: does memory grow, do ranks stay equal?
Sequences run to the end of the caches and begin again with one of two prompts. All ranks compare the bits of their
activations after every round (`check_ranks`; without it, under `--cuda_graphs`) and those of the tokens after every
sequence. Memory of GPU and host is read after a tenth of the rounds and at the end. Starts under torchrun as well. The
last line is one JSON document; the exit code is 1 where memory grew or ranks differed.
"""

import argparse
import gc
import json
import time
from itertools import cycle
from typing import Any

import torch

from mimo_qat.provenance import resident_bytes
from mimo_runtime.bench import conditions
from mimo_runtime.config import BenchConfig, SamplingConfig
from mimo_runtime.engine import Forced
from mimo_runtime.parallel import checksum
from mimo_runtime.synthetic import SyntheticEngine, drafter_config, model_config, random_prompts

PROMPTS, PROMPT_TOKENS = 2, 16
# A host's allocator keeps pages back; a leak of 1 KiB a round is more than this in 10,000 rounds. A GPU's is exact.
ALLOWED = {"host": 8 << 20, "gpu_allocated": 0, "gpu_reserved": 0}


class Soaked(SyntheticEngine):
    """Decodes plainly once a prompt, not before every sequence whose drafts are to be the model's own tokens."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.truths: dict[tuple[int, ...], list[int]] = {}

    def _forced(self, prompt_ids: list[int], sampling: SamplingConfig, lengths: int | list[int]) -> Forced:
        key = tuple(prompt_ids)
        if key not in self.truths:
            self.truths[key] = super()._forced(prompt_ids, sampling, lengths).truth
        return Forced(self.truths[key], len(key), [lengths] if isinstance(lengths, int) else lengths)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process holds now, on the host and on its GPU."""
    gc.collect()
    held = {"host": resident_bytes()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held["gpu_allocated"] = torch.cuda.memory_allocated(device)
        held["gpu_reserved"] = torch.cuda.memory_reserved(device)
    return held


def grown(growth: dict[str, int]) -> list[str]:
    """What grew by more than it may, of {name: bytes}."""
    return [name for name, size in growth.items() if size > ALLOWED[name]]


def soak(engine: Soaked, rounds: int, seed: int) -> dict[str, Any]:
    """Plays at least so many rounds and two sequences; what is found holds for all ranks, growth is the worst one's."""
    vocab_size, most = engine.target.geometry.vocab_size, engine.cfg.max_len - PROMPT_TOKENS
    prompts, sampling = random_prompts(vocab_size, PROMPT_TOKENS, PROMPTS, seed), SamplingConfig(max_new_tokens=most)
    generator = torch.Generator().manual_seed(seed)
    for prompt in prompts:  # the model's own tokens of each, and every kernel and graph
        engine.generate(prompt, sampling, forced_acceptance=engine.block - 1)
    samples: list[tuple[int, dict[str, int]]] = []
    played, sequences, same, equal = 0, 0, 0, True
    began = time.perf_counter()
    for prompt in cycle(prompts):
        lengths = torch.randint(engine.block, (most,), generator=generator).tolist()
        out = engine.generate(prompt, sampling, forced_acceptance=lengths)
        played, sequences = played + len(out.rounds), sequences + 1
        same += out.tokens == engine.truths[tuple(prompt)]
        marks = engine.ranks.gather(checksum(torch.tensor(out.tokens, device=engine.device))[None])
        equal = len(set(marks.tolist())) == 1
        ended = not equal or (played >= rounds and bool(samples))
        if ended or (not samples and 10 * played >= rounds):
            samples.append((played, memory(engine.device)))
        if ended:
            break
    (_, first), (_, last) = samples[0], samples[-1]
    growth = torch.tensor([last[name] - first[name] for name in first], device=engine.device)
    return {
        "rounds": played,
        "seconds": time.perf_counter() - began,
        "growth_bytes": dict(zip(first, engine.ranks.gather(growth[:, None]).amax(-1).tolist(), strict=True)),
        "checksums_equal": equal,
        "sequences": sequences,
        "sequences_like_plain": same,
        "samples": samples,
    }


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", required=True, help="flash, pro or a config.json")
    parser.add_argument("--layers", type=int, help="the first so many layers alone")
    parser.add_argument("--ranks", type=int, default=1, help="in one process: the share of one of so many ranks")
    parser.add_argument("--rounds", type=int, default=10_000, help="at least so many, and two sequences")
    parser.add_argument("--max_len", type=int, default=1024, help="tokens of a sequence; the caches are this long")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--collectives", choices=("auto", "nccl", "symmetric"), default="nccl")
    parser.add_argument("--cuda_graphs", action="store_true", help="replay graphs; ranks then compare sequences alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.max_len < PROMPT_TOKENS + 2:
        parser.error(
            f"max_len is {options.max_len}; give {PROMPT_TOKENS + 2} or more, prompts have {PROMPT_TOKENS} tokens"
        )
    settings = {k: v for k, v in vars(options).items() if k != "rounds"}
    cfg = BenchConfig(**settings, uniform_routing=True, check_ranks=not options.cuda_graphs)
    config = model_config(options.synthetic, options.layers)
    engine = Soaked(config, drafter_config(cfg, config), cfg, uniform_routing=True, ranks=options.ranks)
    try:
        found = soak(engine, options.rounds, options.seed)
    except ValueError as error:
        if "ranks differ" not in str(error):
            raise
        found = {"rounds": None, "checksums_equal": False, "growth_bytes": {}, "error": str(error)}
    found["grown"] = grown(found["growth_bytes"])
    found["ok"] = found["checksums_equal"] and not found["grown"]
    if engine.ranks.rank == 0:
        print(", ".join(f"{name} {value}" for name, value in found.items() if name != "samples"))
        print(json.dumps(found | {"conditions": conditions(engine, vars(options))}))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
