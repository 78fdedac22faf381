"""One of several processes that `test_synthetic` starts: argv is {"config": its file, "uniform": bool, "report": path,
"settings": of the engine}.

Writes the tokens and the experts of every routed layer's last call to REPORT-RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import torch

from mimo_qat.checkpoint.layout import default_drafter_config
from mimo_runtime.breakdown import chosen_experts
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.synthetic import SyntheticEngine, model_config, random_prompts

WAYS = ({"speculate": False}, {}, {"forced_acceptance": [5, 0, 7]})


def decoded(config: dict, uniform: bool, settings: dict) -> dict:
    """Tokens of every way to draft, and the experts of the first rounds."""
    fields = {"device": "cpu", "dtype": "float32", "max_len": 96, "prefill_chunk": 16, "check_ranks": True}
    cfg = EngineConfig(**(fields | settings))
    engine = SyntheticEngine(config, default_drafter_config(config), cfg, uniform_routing=uniform)
    prompt = random_prompts(engine.target.geometry.vocab_size, 20, 1, seed=3)[0]
    tokens = [
        engine.generate(prompt, SamplingConfig(max_new_tokens=24, temperature=t), **way).tokens
        for t in (0.0, 1.0)
        for way in WAYS
    ]
    with chosen_experts(engine) as notes:
        engine.generate(prompt, SamplingConfig(max_new_tokens=8))
    return {"tokens": tokens, "experts": [calls[-1].tolist() for calls in notes]}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    found = decoded(model_config(job["config"], None), job["uniform"], job["settings"])
    Path(f"{job['report']}-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
