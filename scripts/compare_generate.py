"""python scripts/compare_generate.py runs/release --reference runs/qad --cuda_graphs --out runs/generate.json

Decoding of one sequence on one device: mimo-runtime without and with the release's drafter, beside transformers'
`generate` with its own class for these models (`mimo_v2_flash`), dynamic cache and static cache, which transformers
compiles on a GPU. The peer holds the reference's values in --dtype: `transformers` has no kernel for this MXFP4 layout,
and decoding the codes at every token would only slow it down. Its logits are compared with our class's first.

Greedy, a fixed number of tokens a prompt; a decode step is what tokens after the first one take. The last line printed
is the JSON document.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mimo_qat.checkpoint.reader import Checkpoint, load_model
from mimo_qat.provenance import write_json
from mimo_runtime.bench import conditions, record
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import DTYPES, Engine
from mimo_runtime.prompts import encode, load_prompts, load_tokenizer

SAME = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim v_head_dim attention_value_scale n_routed_experts num_experts_per_tok "
    "tie_word_embeddings max_position_embeddings"
).split()
Arm = Callable[[list[int]], tuple[int, float]]  # prompt -> (tokens after the first, their seconds)


def peer(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """(transformers' model, ours) with the weights of a BF16 folder. ValueError where transformers' class, which ties
    the heads of windows to those of full attention, cannot hold them."""
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    checkpoint, ours = Checkpoint(folder), load_model(folder, dtype, device).eval()
    c, given = ours.config, checkpoint.config
    theta = {"full_attention": c.rope_theta, "sliding_attention": c.swa_rope_theta}
    rope = {"rope_type": "default", "partial_rotary_factor": c.partial_rotary_factor}
    config = MiMoV2FlashConfig(
        **{k: given[k] for k in SAME if k in given},
        rms_norm_eps=c.layernorm_epsilon,
        sliding_window=c.sliding_window or c.max_position_embeddings,  # without windows it has to be some number
        layer_types=c.layer_types,
        mlp_layer_types=["sparse" if moe else "dense" for moe in given["moe_layer_freq"]],
        rope_parameters={kind: rope | {"rope_theta": float(t)} for kind, t in theta.items()},
        attn_implementation="eager",
    )
    state = {name.replace("attention_sink_bias", "sinks"): t for name, t in ours.state_dict().items()}
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}.self_attn."
        if state.pop(f"{at}qkv_proj.weight", None) is not None:
            parts = checkpoint.qkv(i, dtype)
            state |= {f"{at}{n}_proj.weight": t.to(device) for n, t in zip("qkv", parts, strict=True)}
    with torch.device("meta"):
        theirs = MiMoV2FlashForCausalLM(config)
    try:
        theirs.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: transformers' mimo_v2_flash has other weights: {str(error)[:300]}") from None
    theirs.tie_weights()
    for name, buffer in theirs.named_buffers():
        if buffer.is_meta:  # rotary frequencies, which are in no file
            module, _, leaf = name.rpartition(".")
            with torch.device("cpu"):
                source = type(theirs.get_submodule(module))(config)
            theirs.get_submodule(module)._buffers[leaf] = source._buffers[leaf].to(device)
    return theirs.eval(), ours


def transformers_arm(model: Any, static: bool, new: int) -> Arm:
    """`generate` of `new` tokens less the time of one token, which is the prefill's."""
    more = {"cache_implementation": "static"} if static else {}

    def run(ids: list[int], count: int) -> float:
        x = torch.tensor([ids], device=model.device)
        began = time.perf_counter()
        out = model.generate(x, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **more)
        tokens = out[0].tolist()  # waits
        assert len(tokens) == len(ids) + count
        return time.perf_counter() - began

    return lambda ids: (new - 1, run(ids, new) - run(ids, 1))


def runtime_arm(engine: Engine, speculate: bool, new: int) -> Arm:
    sampling = SamplingConfig(max_new_tokens=new, stop_token_ids=(-1,))

    def run(ids: list[int]) -> tuple[int, float]:
        out = engine.generate(ids, sampling, speculate=speculate, tree=False)
        return len(out.tokens) - 1, out.decode_seconds

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", help="folder that mimo-runtime decodes")
    parser.add_argument("--reference", required=True, help="BF16 folder that the release was made of")
    parser.add_argument("--prompts", help=".jsonl file; the bundled prompts without it")
    parser.add_argument("--limit", type=int, default=6, help="how many of the prompts, evenly spread")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens a prompt, at least 2")
    parser.add_argument("--max_len", type=int, default=1024, help="longest prompt and output together, in tokens")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cuda_graphs", action="store_true", help="mimo-runtime replays rounds as graphs")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    if options.max_new_tokens < 2:
        parser.error(f"max_new_tokens is {options.max_new_tokens}; give 2 or more, the first one is the prefill's")
    cfg = EngineConfig(
        device=options.device, dtype=options.dtype, max_len=options.max_len, cuda_graphs=options.cuda_graphs
    )
    engine, tokenizer = Engine(options.release, cfg), load_tokenizer(options.release)
    prompts = [encode(tokenizer, p.text) for p in load_prompts(options.prompts, options.limit)]
    theirs, ours = peer(options.reference, DTYPES[options.dtype], options.device)
    with torch.no_grad():
        x = torch.tensor([prompts[0]], device=options.device)
        difference = float((theirs(x).logits.float() - ours(x).logits.float()).abs().max())
    del ours
    new = options.max_new_tokens
    arms: dict[str, Arm] = {"runtime": runtime_arm(engine, False, new)}
    if engine.drafter is not None:
        arms["runtime with drafter"] = runtime_arm(engine, True, new)
    arms |= {"generate": transformers_arm(theirs, False, new), "generate, static": transformers_arm(theirs, True, new)}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for turn, ids in enumerate(tqdm([prompts[0], *prompts], desc="prompts")):
        for name, arm in arms.items():
            tokens, seconds = arm(ids)
            if turn:  # the first one compiles and captures
                rates[name].append(tokens / seconds)
    found = {name: statistics.median(of) for name, of in rates.items()}
    best = max(found[n] for n in found if n.startswith("generate"))
    fastest = max(found[n] for n in found if n.startswith("runtime"))
    made = conditions(engine, asdict(cfg) | {"prompts": len(prompts), "max_new_tokens": new})
    where = {k: made[k] for k in ("hardware", "versions", "settings", "block")} | {"tokens_per_s": found}
    document = {
        "ok": True,
        "tokens_per_s": found,
        "speedup_vs_transformers": fastest / best,
        "peer_logit_difference": difference,
        "records": [record("speedup_vs_transformers", fastest / best, "ratio", where, made)],
    }
    for name, rate in found.items():
        print(f"{name:22} {rate:8.1f} tokens/s")
    if options.out:
        write_json(Path(options.out), document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
