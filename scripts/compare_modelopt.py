"""python scripts/compare_modelopt.py --model runs/moe --data runs/data.safetensors --out docs/results/modelopt.json

The same FP4 distillation of the routed experts on one GPU: with this project's snapped copies (under two scale rules),
and with NVIDIA ModelOpt's MXFP4 fake quantization over FP32 and over BF16 parameters (its examples train BF16). Model,
rows, loss (forward KL), optimizer and evaluation are shared. What differs is how the experts are quantized and hence
computed (ModelOpt turns the grouped matmul into a loop over experts) and where the teacher comes from (a second model
as in ModelOpt's QADTrainer, or the originals swapped in). The last line printed is the JSON document.

Each run also answers whether the file holds what was trained: held-out KL and weights of the trained forward, against
those read back from what the tool's own exporter writes. Needs nvidia-modelopt, nvcc and ninja: MXFP4 fake
quantization is a CUDA extension there, compiled at its first call; there is no other path.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from mimo_kernels import mxfp4
from mimo_qat import data
from mimo_qat.checkpoint.reader import load_model
from mimo_qat.models.compiled import use_training_kernels
from mimo_qat.models.experts import expert_parameters
from mimo_qat.provenance import command_line, commit, hardware, versions, write_json
from mimo_qat.qat.objective import agreement, forward_kl
from mimo_qat.qat.snap import SnappedCopy

Batch = dict[str, torch.Tensor]
VARIANTS = ("snapped_even", "snapped_rceil", "modelopt_fp32", "modelopt_bf16")  # ModelOpt's rule is rceil
WARM_UP = 3  # steps that the median leaves out
EXPERTS_ONLY: dict[str, Any] = {  # ModelOpt's MXFP4_MLP_WEIGHT_ONLY_CFG, narrowed to the routed experts
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "*mlp.experts*weight_quantizer",
            "cfg": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
        },
    ],
    "algorithm": None,
}


def frozen_model(options: argparse.Namespace) -> Any:
    return load_model(options.model, dtype=torch.bfloat16, device=options.device).requires_grad_(False)


def hidden(model: Any, batch: Batch) -> torch.Tensor:
    """Final hidden states [real tokens, hidden] of packed rows."""
    out = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return out.last_hidden_state[batch["doc_ids"] >= 0]


class Snapped:
    """This project's engine: BF16 copies of FP32 masters, snapped once a step; the teacher is the same model."""

    def __init__(self, options: argparse.Namespace, rule: mxfp4.Rule):
        self.model = frozen_model(options)
        if options.device == "cuda":
            use_training_kernels(self.model)  # as the trainer does
        self.engine, self.rule = SnappedCopy(expert_parameters(self.model), rule), rule
        self.trained = list(self.engine.masters.values())
        self.facts: dict[str, Any] = {"scale_rule": rule}

    def teacher(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), self.engine.teacher():
            return hidden(self.model, batch)

    def after_step(self) -> None:
        self.engine.snap()

    def forward_weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.engine.params.items()}

    def exported(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a reader of the packed file gets, and how it was written."""
        read = {n: mxfp4.decode(*mxfp4.encode(p.detach(), self.rule)) for n, p in self.engine.params.items()}
        return read, {"path": "mimo_kernels.mxfp4.encode"}


class ModelOpt:
    """NVIDIA ModelOpt: a fake quantizer for each expert's matrix, called in every forward; the teacher is a copy."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype):
        import modelopt.torch.quantization as mtq

        self.teacher_model, self.model = frozen_model(options), frozen_model(options)
        mtq.quantize(self.model, EXPERTS_ONLY)
        quantizers = [m for m in self.model.modules() if type(m).__name__ == "TensorQuantizer"]
        self.params = expert_parameters(self.model)
        self.facts = {
            "version": metadata.version("nvidia-modelopt"),
            "scale_rule": "rceil",
            "expert_matrices": sum(len(p) for p in self.params.values()),
            "quantizers_inserted": len(quantizers),
            "quantizers_enabled": len([m for m in quantizers if m.is_enabled]),
            "experts_implementation": self.model.config._experts_implementation,
        }
        for name, param in self.params.items():
            param.data = param.data.to(dtype)
            param.requires_grad_(True)
            if dtype == torch.float32 and name.endswith("down_proj"):
                # BF16 products of FP32 parameters; outside the experts nothing changes, the router stays in float32.
                module = self.model.get_submodule(name.rpartition(".")[0])
                module.forward = torch.autocast(options.device, torch.bfloat16)(module.forward)
        self.trained = list(self.params.values())

    def teacher(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return hidden(self.teacher_model, batch)

    def after_step(self) -> None:
        gc.collect()  # QATTrainer.training_step does so before each step; its time is reported apart

    def _quantizers(self, name: str) -> nn.ModuleList:
        module, _, which = name.rpartition(".")
        return getattr(self.model.get_submodule(module), f"{which}_weight_quantizers")

    @torch.no_grad()
    def forward_weights(self) -> dict[str, torch.Tensor]:
        return {
            n: torch.stack([q(w) for q, w in zip(self._quantizers(n), p, strict=True)]).to(torch.bfloat16)
            for n, p in self.params.items()
        }

    def exported(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a reader of the exported folder gets, and what the folder says about itself."""
        from modelopt.torch.export import export_hf_checkpoint

        names = list(self.params)
        with tempfile.TemporaryDirectory() as folder:
            export_hf_checkpoint(self.model, dtype=torch.bfloat16, export_dir=folder)
            settings = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config", {})
            stored: dict[str, torch.Tensor] = {}
            for file in Path(folder).glob("*.safetensors"):
                with safe_open(file, "pt") as handle:
                    stored |= {k: handle.get_tensor(k) for k in handle.keys() if ".experts." in k}  # noqa: SIM118
        read = {n: read_experts(stored, n) for n in names}
        facts = {k: settings.get(k) for k in ("quant_method", "quant_algo", "group_size", "config_groups")}
        minus_zeros = sum(int((mxfp4.unpack(t) == 8).sum()) for k, t in stored.items() if k.endswith("weight"))
        return read, {"path": "export_hf_checkpoint", "quantization_config": facts, "minus_zeros": minus_zeros}


def read_experts(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """bfloat16 [E, N, K] of the fused parameter `name` from packed matrices of one expert and projection each."""
    base, _, which = name.rpartition(".")
    projections = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
    experts: list[torch.Tensor] = []
    while f"{base}.{len(experts)}.{projections[0]}.weight" in stored:
        keys = [f"{base}.{len(experts)}.{p}.weight" for p in projections]
        experts.append(torch.cat([mxfp4.decode(stored[k], stored[k + "_scale"]) for k in keys]))
    return torch.stack(experts)


def copies(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: w.to("cpu", copy=True) for n, w in weights.items()}


def compare_weights(trained: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> dict[str, float]:
    """Fractions of elements and of blocks of 32 whose value differs, and the squared error relative to the weights."""
    differing = blocks = elements = 0
    error = square = 0.0
    for name, value in trained.items():
        other = read[name].to(value.device)
        unequal = value != other
        differing += int(unequal.sum())
        blocks += int(unequal.unflatten(-1, (-1, mxfp4.BLOCK)).any(-1).sum())
        elements += value.numel()
        error += float((value.float() - other.float()).square().sum())
        square += float(value.float().square().sum())
    return {
        "elements_differing": differing / elements,
        "blocks_differing": blocks * mxfp4.BLOCK / elements,
        "relative_squared_error": error / square,
    }


@torch.no_grad()
def judge(options: argparse.Namespace, rows: Batch, weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Held-out KL (nats a token) and top-1 agreement of each set of expert weights, all by the same BF16 model."""
    teacher, student = frozen_model(options), frozen_model(options)
    experts, head, results = expert_parameters(student), teacher.lm_head.weight, {}
    for label, values in weights.items():
        for name, param in experts.items():
            param.copy_(values[name])
        kl, same, tokens = 0.0, 0, 0
        for start in range(0, len(rows["input_ids"]), options.batch):
            batch = {k: v[start : start + options.batch] for k, v in rows.items()}
            ours, theirs = hidden(student, batch), hidden(teacher, batch)
            kl += float(forward_kl(ours, theirs, head))
            same += agreement(ours, theirs, head)
            tokens += len(ours)
        results[label] = {"kl": kl / tokens, "top1": same / tokens, "tokens": tokens}
    return results


def train(variant: Snapped | ModelOpt, rows: Batch, options: argparse.Namespace) -> dict[str, Any]:
    """`options.steps` steps; seconds of each, and the peak memory of all of them."""
    optimizer = torch.optim.AdamW(variant.trained, options.learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True)
    head, seconds, after, tokens, kls = variant.model.lm_head.weight, [], [], [], []
    order = torch.randperm(len(rows["input_ids"]), generator=torch.Generator().manual_seed(0))
    gpu = torch.cuda if options.device == "cuda" else None
    wait = gpu.synchronize if gpu else torch.cpu.synchronize
    if gpu:
        gpu.reset_peak_memory_stats()
    for step in range(options.steps):
        picked = order[torch.arange(step * options.batch, (step + 1) * options.batch) % len(order)]
        batch = {k: v[picked] for k, v in rows.items()}
        began = time.perf_counter()
        teacher, student = variant.teacher(batch), hidden(variant.model, batch)
        loss = forward_kl(student, teacher, head) / len(student)
        loss.backward()
        for param in variant.trained:
            if param.grad is None:  # no token reached this layer's experts
                param.grad = torch.zeros_like(param)
        torch.nn.utils.clip_grad_norm_(variant.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        ended = time.perf_counter()
        variant.after_step()
        kls.append(loss.item())
        wait()
        seconds.append(time.perf_counter() - began)
        after.append(time.perf_counter() - ended)
        tokens.append(len(student))
    timed = seconds[WARM_UP:] or seconds
    median = statistics.median(timed)
    return {
        "step_seconds": median,
        "step_seconds_range": [min(timed), max(timed)],
        "of_which_snap_or_gc": statistics.median(after),
        "tokens_per_s": statistics.mean(tokens) / median,
        "tokens": sum(tokens),
        "train_kl": kls,
        "peak_gb": gpu.max_memory_allocated() / 1e9 if gpu else None,
    }


def run(name: str, options: argparse.Namespace, train_rows: Batch, held_out: Batch) -> dict[str, Any]:
    """One variant from start to finish; an exception of the tool becomes part of the result."""
    result: dict[str, Any] = {}
    try:
        tool, _, kind = name.partition("_")
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        made_of: Any = dtypes.get(kind, kind)
        variant: Any = ModelOpt(options, made_of) if tool == "modelopt" else Snapped(options, made_of)
        result |= variant.facts
        began = time.perf_counter()
        weights = {"ptq": copies(variant.forward_weights())}
        result["first_quantization_seconds"] = time.perf_counter() - began  # compiles, where something has to be
        result |= train(variant, train_rows, options)
        weights["trained"] = copies(variant.forward_weights())
        result["codes_changed"] = compare_weights(weights["ptq"], weights["trained"])["elements_differing"]
        try:
            weights["exported"], result["export"] = variant.exported()
            result["export"] |= compare_weights(weights["trained"], weights["exported"])
        except Exception:
            result["export_error"] = traceback.format_exc(limit=-2)
        del variant
        gc.collect()
        result["held_out"] = judge(options, held_out, weights)
    except Exception:
        result["error"] = traceback.format_exc(limit=-3)
    gc.collect()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="BF16 MiMo-V2 folder")
    parser.add_argument("--data", required=True, help="file of mimo-qat pack")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="packed rows a step")
    parser.add_argument("--eval_rows", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    parts = data.load_packed(options.data)
    train_rows, held_out = ({k: v.to(options.device) for k, v in part.items()} for part in parts)
    held_out = {k: v[: options.eval_rows] for k, v in held_out.items()}
    results: dict[str, Any] = {"options": vars(options), "hardware": hardware(), "versions": versions()}
    results |= {"command": command_line(), "commit": commit()}
    for name in options.variants:
        results[name] = run(name, options, train_rows, held_out)
        if options.out:
            write_json(options.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
