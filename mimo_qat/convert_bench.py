"""mimo-qat convert --bench true --out /scratch/bench

How fast is the conversion of one MiMo-V2.5-Pro MoE layer's experts (384 of them, block FP8 to MXFP4)? Three figures of
one run, on the same synthetic files, each after the page cache was asked to forget them:
    convert             `mimo-qat convert` as a user runs it: read, transcode, write, hash, sync, put in place
    copy                the same files copied by the kernel and synced: what the disks allow
    compressed-tensors  the same work with its own functions (dequantize, scales, compress) and safetensors, on some of
                        the experts, since it is the slowest of the three
Rates count the bytes that are read. `--bench_experts` makes the layer smaller; OUT is deleted at the end.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mimo_kernels import fp8
from mimo_qat.checkpoint.layout import Config, TensorSpec, files_of, quantization_config, target_tensors, totals
from mimo_qat.checkpoint.writer import FileWriter, write_index
from mimo_qat.provenance import hardware, versions
from mimo_qat.workers import usable_cores

if TYPE_CHECKING:
    from mimo_qat.convert import ConvertConfig

COMPARED_EXPERTS = 6
# One dense and one MoE layer; only what surrounds the experts is small.
PRO_LAYER: Config = {
    "model_type": "mimo_v2",
    "architectures": ["MiMoV2ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 6144,
    "intermediate_size": 128,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 192,
    "v_head_dim": 128,
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "sliding_window": 128,
    "rope_theta": 10000000,
    "attention_projection_layout": "fused_qkv",
    "num_experts_per_tok": 8,
    "layernorm_epsilon": 1e-5,
}


def synthetic(folder: Path, config: Config, experts: str = "fp8", mtp_layers: int = 0) -> dict[str, TensorSpec]:
    """A checkpoint of any size: Gaussian weights from a pool that every tensor reads at another place."""
    spine = "bf16" if experts == "bf16" else "fp8"
    specs = target_tensors(config, experts=experts, spine=spine, mtp_layers=mtp_layers)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, 6144, generator=generator) * 0.02
    codes, scales = fp8.quantize(values)
    pools = {
        "F8_E4M3": codes.flatten().view(torch.uint8),
        "BF16": values.bfloat16().flatten().view(torch.uint8),
        "F32": scales.repeat(64, 1).flatten().view(torch.uint8),
    }
    folder.mkdir(parents=True)
    for file, members in files_of(specs).items():
        with FileWriter(folder / file, members) as writer:
            for i, spec in enumerate(members):
                for part in _from_pool(pools[spec.dtype], spec.nbytes, i * 2**12):
                    writer.append(spec.name, part)
    config = dict(config)
    if experts != "bf16":
        config["quantization_config"] = quantization_config(config, "fp8", "fp8", mtp_layers)
    write_index(folder, specs, {"save_format": experts, "tp_size": config["num_key_value_heads"]})
    (folder / "config.json").write_text(json.dumps(config))
    return specs


def _from_pool(pool: torch.Tensor, size: int, start: int) -> Iterator[memoryview]:
    view, start = pool.numpy().data, start % pool.numel()
    while size:
        part = view[start : start + size]
        yield part
        size, start = size - len(part), 0


def forget(folder: Path) -> None:
    """Asks the system to drop the folder's pages from its cache, so that the next reader reads the disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds to copy the files of a folder, data on the disk at the end."""
    forget(source)
    target.mkdir()
    began = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)  # inside the kernel, where the system can
        with (target / path.name).open("rb") as f:
            os.fsync(f.fileno())
    return time.perf_counter() - began


def compressed_tensors_seconds(source: Path, target: Path, experts: int) -> tuple[float, int]:
    """(seconds, FP8 bytes read) of the same work on some experts with compressed-tensors' functions.

    Dequantized to bfloat16, which halves the traffic that float32 would have: the faster of its two ways.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams
    from safetensors import safe_open
    from safetensors.torch import save_file

    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    fp8_args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    assert scheme.weights is not None
    forget(source)
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    names = [f"model.layers.1.mlp.experts.{e}.{w}_proj" for e in range(experts) for w in ("down", "gate", "up")]
    out: dict[str, torch.Tensor] = {}
    began, read = time.perf_counter(), 0
    for name in names:
        with safe_open(source / weight_map[name + ".weight"], framework="pt") as file:
            codes, scale = file.get_tensor(name + ".weight"), file.get_tensor(name + ".weight_scale_inv")
        weight = dequantize(codes, scale.bfloat16(), args=fp8_args, dtype=torch.bfloat16)
        groups = weight.unflatten(-1, (-1, 32))
        scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        packed = compressor.compress({"weight": weight, "weight_scale": scales}, scheme)
        out |= {f"{name}.{key}": value.contiguous() for key, value in packed.items()}
        read += codes.numel() + 4 * scale.numel()
    target.mkdir()
    save_file(out, target / "model.safetensors", metadata={"format": "pt"})
    with (target / "model.safetensors").open("rb") as f:
        os.fsync(f.fileno())
    return time.perf_counter() - began, read


def bench(cfg: "ConvertConfig") -> dict[str, Any]:
    """The three measurements; `ok` says whether the bars of the conversion's speed are met."""
    from mimo_qat.convert import ConvertConfig, main

    cores = usable_cores()
    root = Path(tempfile.mkdtemp(prefix="bench.", dir=cfg.out or None))
    try:
        specs = synthetic(root / "in", PRO_LAYER | {"n_routed_experts": max(8, cfg.bench_experts)})
        size = totals(specs)[1]
        copied = copy_seconds(root / "in", root / "copy")
        shutil.rmtree(root / "copy")
        forget(root / "in")
        began = time.perf_counter()
        task = ConvertConfig(target=str(root / "in"), out=str(root / "out"), rule=cfg.rule)
        made = main(replace(task, device=cfg.device, workers=cfg.workers))
        seconds = time.perf_counter() - began
        shutil.rmtree(root / "out")
        other, other_read = compressed_tensors_seconds(
            root / "in", root / "other", min(COMPARED_EXPERTS, cfg.bench_experts)
        )
    finally:
        shutil.rmtree(root)
    rate, copy_rate, other_rate = size / seconds, size / copied, other_read / other
    bar = min(4 * other_rate, 0.6 * copy_rate)
    document = {
        "ok": rate >= bar,
        "experts": cfg.bench_experts,
        "bytes_in": size,
        "bytes_out": made["bytes"],
        "cores": cores,
        "convert_seconds": round(seconds, 2),
        "convert_gbps": round(rate / 1e9, 4),
        "convert_gbps_per_core": round(rate / 1e9 / cores, 4),
        "copy_gbps": round(copy_rate / 1e9, 4),
        "convert_fraction_of_copy": round(rate / copy_rate, 4),
        "compressed_tensors_gbps": round(other_rate / 1e9, 4),
        "compressed_tensors_experts": min(COMPARED_EXPERTS, cfg.bench_experts),
        "convert_ratio_vs_compressed_tensors": round(rate / other_rate, 3),
        "peak_rss_gb": round(made["peak_rss_bytes"] / 1e9, 3),
        "versions": versions(),
        "hardware": hardware(),
    }
    for key in ("convert_gbps", "copy_gbps", "compressed_tensors_gbps", "convert_ratio_vs_compressed_tensors"):
        print(f"{key:<38}{document[key]}")
    return document
