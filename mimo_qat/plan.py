"""mimo-qat plan recipes/model/mimo-v2.5.json --gpus 64 --strategy fsdp2: does it fit, how long, at what cost.

Memory is counted from the model's own tensors on the meta device; the state of a single process is exact to the byte.
Activations and time are formulas, `activation_bytes` and `flops_per_token` in `plan_model`, and say so.
`--runtime true` prints the bytes a rank of a release under tensor parallelism instead.

What the strategies hold on each GPU:
    single, ddp   everything
    zero2         BF16 weights and the teacher's experts whole; masters, Adam and gradients 1/N
    zero3, fsdp2  everything 1/N, and on top two gathered layers, embedding and head, and one layer's BF16 gradients;
                  fsdp2 splits experts by whole experts, so the largest part is ceil(E/N) of E
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mimo_qat.plan_model import ModelShape, activation_bytes, flops_per_token, kl_bytes, read_shape

GIB = 2**30
Strategy = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
FROM_RECIPE = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
PLANNED = {"train": "experts", "engine": "snapped", "master_dtype": "float32"}  # what the formulas are of
BUDGETS = {"35M": 35_000_000, "0.5B": 500_000_000}
MOST_GPUS = 4096


@dataclass(kw_only=True)
class PlanConfig:
    """Memory, time and traffic of expert QAD (or of decoding a release) from a configuration alone."""

    model: str
    """config JSON (recipes/model/*.json) or a folder with a config.json"""
    recipe: str | None = None
    """QAT recipe (YAML); sets the four fields of the batch below"""
    gpus: int = 8
    """number of GPUs"""
    gpus_per_node: int = 8
    """GPUs that share NVLink"""
    strategy: Strategy = "fsdp2"
    """what the GPUs share; single needs gpus 1"""
    teacher: Literal["device", "host"] = "device"
    """where the teacher's experts live; from the host they pass through one layer's buffer"""
    max_length: int = 8192
    """tokens a packed row"""
    per_device_train_batch_size: int = 1
    """rows a micro-batch and GPU"""
    gradient_accumulation_steps: int = 1
    """micro-batches a step"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass"""
    gpu_memory_gib: float = 139.0
    """memory of one GPU (H200: 139 GiB usable)"""
    reserve_gib: float = 6.0
    """of it, for the CUDA context, communication buffers and fragmentation"""
    peak_tflops: float = 989.0
    """dense BF16 peak of one GPU"""
    mfu: float = 0.3
    """fraction of the peak that a step reaches in its matrix products"""
    memory_gb_s: float = 4800.0
    """peak memory bandwidth of one GPU, 1e9 bytes a second"""
    memory_fraction: float = 0.8
    """fraction of it that snap and optimizer reach"""
    link_gb_s: float = 450.0
    """bandwidth a GPU inside a node, one direction, 1e9 bytes a second"""
    network_gb_s: float = 50.0
    """bandwidth a GPU between nodes, 1e9 bytes a second"""
    gpu_hour_price: float = 0.0
    """price of one GPU hour; 0 leaves money out"""
    runtime: bool = False
    """plan decoding of a MiMo-V2 release instead of training"""
    tp: int = 8
    """ranks of the runtime"""
    prefill_chunk: int = 2048
    """tokens of one prefill pass of the runtime"""


def state_bytes(shape: ModelShape) -> dict[str, int]:
    """Bytes of what one process holds between steps, and of the gradients inside one; W trained weights in n tensors.

    frozen weights and buffers; BF16 copies 2 W; teacher's BF16 experts 2 W; FP32 masters 4 W; Adam's two FP32 moments
    8 W and one float32 step a tensor; FP32 gradients 4 W.
    """
    w, n = shape.expert_weights, len(shape.trained)
    return {
        "frozen": shape.frozen_bytes,
        "copies": 2 * w,
        "teacher": 2 * w,
        "masters": 4 * w,
        "adam": 8 * w + 4 * n,
        "gradients": 4 * w,
    }


def memory(shape: ModelShape, config: PlanConfig, gpus: int) -> dict[str, int]:
    """Bytes on the fullest GPU by what they are for; "host" is pinned memory of a node, beside the total."""
    full, row = state_bytes(shape), config.max_length
    whole = config.strategy in ("single", "ddp")
    split_weights = config.strategy in ("fsdp2", "zero3")
    by_experts = math.ceil(shape.experts / gpus) / shape.experts if config.strategy == "fsdp2" else 1 / gpus

    def held(what: str, split: bool) -> int:
        share = 1 if whole or not split else 1 / gpus if what == "frozen" else by_experts
        return math.ceil(full[what] * share)

    out = {what: held(what, split_weights or what in ("masters", "adam", "gradients")) for what in full}
    largest = max(layer.expert_weights for layer in shape.layers)
    # The BF16 gradient of one parameter lives until it is in its FP32 buffer; sharded, that of a whole layer does.
    out["in_flight"] = 2 * (largest if split_weights else max(shape.trained))
    if split_weights:
        out["in_flight"] += 2 * shape.largest_layer_bytes + 2 * shape.embedding_and_head
    host = 0
    if config.teacher == "host":
        host, out["teacher"] = out["teacher"] * min(gpus, config.gpus_per_node), 2 * largest
    tokens = row * config.per_device_train_batch_size
    out["activations"] = activation_bytes(shape, tokens, row, config.gradient_checkpointing)
    out["kl"] = kl_bytes(shape)
    out["total"] = sum(out.values())
    out["host"] = host
    return out


def capacity(config: PlanConfig) -> int:
    """Bytes that a plan may use of one GPU."""
    return int((config.gpu_memory_gib - config.reserve_gib) * GIB)


def smallest(shape: ModelShape, config: PlanConfig) -> int | None:
    """The smallest number of GPUs that holds the run: 1, 2, 4, ..., then whole nodes; None where none does."""
    counts = [2**i for i in range(config.gpus_per_node.bit_length()) if 2**i < config.gpus_per_node]
    counts += range(config.gpus_per_node, MOST_GPUS + 1, config.gpus_per_node)
    if config.strategy in ("single", "ddp"):
        counts = counts[:1]  # more GPUs do not make it smaller
    return next((n for n in counts if memory(shape, config, n)["total"] <= capacity(config)), None)


def communication(shape: ModelShape, config: PlanConfig) -> dict[str, float]:
    """Bytes that one GPU sends in a step, and the seconds of that at the slowest link it crosses.

    ddp sums FP32 gradients once a step; zero2 scatters them and gathers the BF16 copies once; zero3 and fsdp2 gather
    all weights three times a micro-batch (teacher, student, backward) and scatter BF16 expert gradients.
    """
    n, w = config.gpus, shape.expert_weights
    weights = 2 * w + shape.frozen_bytes
    volume = {
        "single": 0,
        "ddp": 2 * 4 * w,
        "zero2": 4 * w + 2 * w,
        "zero3": config.gradient_accumulation_steps * (3 * weights + 2 * w),
        "fsdp2": config.gradient_accumulation_steps * (3 * weights + 2 * w),
    }[config.strategy]
    sent = volume * (n - 1) / n
    rate = (config.link_gb_s if n <= config.gpus_per_node else config.network_gb_s) * 1e9
    return {"bytes_per_step": round(sent), "seconds": sent / rate}


def step_time(shape: ModelShape, config: PlanConfig) -> dict[str, Any]:
    """Seconds of one step, and what follows from them. Traffic overlaps with products; what is longer shows.

    Snap reads a master and the old copy and writes the new one: 8 bytes a weight. AdamW reads four and writes three
    FP32 arrays, clipping reads and writes gradients: 40 bytes a weight. Replicated states pay for all of W.
    """
    row, shards = config.max_length, 1 if config.strategy in ("single", "ddp") else config.gpus
    tokens = row * config.per_device_train_batch_size * config.gradient_accumulation_steps
    flops = flops_per_token(shape, row, config.gradient_checkpointing)
    bandwidth = config.memory_gb_s * 1e9 * config.memory_fraction
    products = tokens * sum(flops.values()) / (config.peak_tflops * 1e12 * config.mfu)
    snap, optimizer = (shape.expert_weights / shards * b / bandwidth for b in (8, 40))
    traffic = communication(shape, config)
    seconds = max(products, traffic["seconds"]) + snap + optimizer
    per_day = tokens * config.gpus * 86400 / seconds
    hours = {name: budget / per_day * 24 * config.gpus for name, budget in BUDGETS.items()}
    return {
        "flops_per_token": flops | {"total": sum(flops.values())},
        "tokens_per_step": tokens * config.gpus,
        "products_s": products,
        "communication_s": traffic["seconds"],
        "communication_bytes": traffic["bytes_per_step"],
        "snap_s": snap,
        "optimizer_s": optimizer,
        "step_s": seconds,
        "tokens_per_day": per_day,
        "gpu_hours": hours,
        "price": {k: h * config.gpu_hour_price for k, h in hours.items()} if config.gpu_hour_price else None,
    }


def with_recipe(config: PlanConfig) -> PlanConfig:
    """`config` with the batch of its recipe; ValueError for a field that QatConfig does not have."""
    if config.recipe is None:
        return config
    import yaml

    from mimo_qat.qat.train import QatConfig

    if not Path(config.recipe).is_file():
        raise ValueError(f"{config.recipe}: no such recipe; give a YAML file, e.g. of recipes/qat")
    stated = yaml.safe_load(Path(config.recipe).read_text()) or {}
    defaults = {f.name: f.default for f in fields(QatConfig)}
    odd = sorted(stated.keys() - defaults.keys())
    if odd:
        raise ValueError(f"{config.recipe}: {odd[0]} is not a field of QatConfig; see mimo-qat qat --help")
    for name, planned in PLANNED.items():
        if stated.get(name, planned) != planned:
            raise ValueError(f"{config.recipe}: {name} {stated[name]} is not planned, only {planned}")
    values = {name: stated.get(name, defaults[name]) for name in FROM_RECIPE}
    for field in fields(PlanConfig):
        asked = getattr(config, field.name)
        if field.name in values and asked not in (field.default, values[field.name]):
            raise ValueError(f"{field.name} is {asked}, the recipe's is {values[field.name]}; leave one of them out")
    return PlanConfig(**{**vars(config), **values})


def _check(config: PlanConfig) -> None:
    if config.strategy == "single" and config.gpus != 1:
        raise ValueError(f"strategy single with {config.gpus} GPUs; use --gpus 1 or another strategy")
    for name in (
        "gpus",
        "gpus_per_node",
        "max_length",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "tp",
        "prefill_chunk",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; give at least 1")
    if not 0 < config.mfu <= 1 or not 0 < config.memory_fraction <= 1:
        raise ValueError("mfu and memory_fraction are fractions in (0, 1]")


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"


def training(config: PlanConfig) -> dict[str, Any]:
    """The training plan, printed and returned."""
    config = with_recipe(config)
    _check(config)
    shape, _ = read_shape(config.model)
    needed, best, time = memory(shape, config, config.gpus), smallest(shape, config), step_time(shape, config)
    fits = needed["total"] <= capacity(config)
    print(
        f"{shape.name}: {shape.parameters / 1e9:,.2f} B parameters, {shape.active / 1e9:,.2f} B active; "
        f"{shape.expert_weights / 1e9:,.2f} B expert weights in {len(shape.trained)} tensors are trained"
    )
    print(
        f"{config.gpus} GPUs, {config.strategy}, teacher on {config.teacher}, rows of {config.max_length}, "
        f"{config.per_device_train_batch_size} a micro-batch x {config.gradient_accumulation_steps}, "
        f"checkpointing {'on' if config.gradient_checkpointing else 'off'}\n"
    )
    for name, size in needed.items():
        print(f"  {name:<14} {gib(size):>18}" + ("   a node, pinned" if name == "host" else ""))
    verdict = "fits" if fits else "DOES NOT FIT"
    print(f"  {verdict}: {gib(needed['total'])} of {gib(capacity(config))} usable a GPU")
    alternative = f"{best} GPUs hold it" if best else f"no number of GPUs up to {MOST_GPUS} holds it"
    print(f"  smallest for {config.strategy}: {alternative}\n")
    print(f"  {'TFLOP a token':<22} {time['flops_per_token']['total'] / 1e12:>12.3f}")
    for name in ("products_s", "communication_s", "snap_s", "optimizer_s", "step_s"):
        print(f"  {name:<22} {time[name]:>12.4f}")
    print(f"  {'tokens a step':<22} {time['tokens_per_step']:>12,}")
    print(f"  {'tokens a day':<22} {time['tokens_per_day'] / 1e6:>12,.1f} M")
    for budget, hours in time["gpu_hours"].items():
        price = f", {hours * config.gpu_hour_price:,.0f} at {config.gpu_hour_price} an hour" * bool(
            config.gpu_hour_price
        )
        print(f"  {'GPU hours for ' + budget:<22} {hours:>12,.1f}{price}")
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "active_parameters": shape.active,
        "expert_weights": shape.expert_weights,
        "gpus": config.gpus,
        "strategy": config.strategy,
        "memory": needed,
        "usable": capacity(config),
        "fits": fits,
        "smallest_gpus": best,
        "time": time,
    }


def decoding(config: PlanConfig) -> dict[str, Any]:
    """The runtime plan, printed and returned."""
    from mimo_qat.checkpoint.geometry import read_json
    from mimo_qat.plan_runtime import runtime_bytes

    _check(config)
    path = Path(config.model)
    source = read_json(path / "config.json" if path.is_dir() else path)
    if not str(source.get("model_type", "")).startswith("mimo_v2"):
        raise ValueError(f"{config.model} is a {source.get('model_type')}; the runtime decodes MiMo-V2 releases")
    contexts = [8192, 262144, 1048576]
    found = runtime_bytes(source, config.tp, contexts, config.prefill_chunk)
    usable = capacity(config)
    print(f"{config.model} at TP {config.tp}, bytes a rank, one sequence\n")
    fixed = sum(found[name] for name in ("experts", "spine", "drafter", "workspace"))
    for name in ("experts", "spine", "drafter", "workspace"):
        print(f"  {name:<16} {gib(found[name]):>16}")
    totals = {}
    for context, size in found["kv"].items():
        totals[context] = fixed + size
        verdict = "fits" if totals[context] <= usable else "DOES NOT FIT"
        print(f"  KV {int(context):>9,} {gib(size):>20}   total {gib(totals[context])}: {verdict}")
    smallest_tp = {context: _smallest_tp(source, int(context), config) for context in totals}
    for context, tp in smallest_tp.items():
        print(f"  smallest TP for {int(context):,}: {tp or 'none up to 64'}")
    rate = config.memory_gb_s * 1e9 * config.memory_fraction / found["read_per_token"]
    print(f"  {gib(found['read_per_token'])} read a token; at most {rate:,.0f} tokens/s without drafts")
    return {
        "model": config.model,
        "tp": config.tp,
        **found,
        "totals": totals,
        "usable": usable,
        "smallest_tp": smallest_tp,
        "tokens_per_s_bound": rate,
    }


def _smallest_tp(source: dict[str, Any], context: int, config: PlanConfig) -> int | None:
    from mimo_qat.plan_runtime import runtime_bytes

    for tp in (1, 2, 4, 8, 16, 32, 64):
        try:
            found = runtime_bytes(source, tp, [context], config.prefill_chunk)
        except ValueError:  # does not divide
            continue
        fixed = sum(found[name] for name in ("experts", "spine", "drafter", "workspace"))
        if fixed + found["kv"][str(context)] <= capacity(config):
            return tp
    return None


def main(config: PlanConfig) -> dict[str, Any]:
    """Prints the plan as a table and returns it."""
    return decoding(config) if config.runtime else training(config)
