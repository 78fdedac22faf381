"""python scripts/qad_study.py --teacher runs/teacher --data packed.safetensors --work runs/study --seconds 1200

What docs/results/qad.md states, measured in one process on one GPU: an upcycled mixture whose experts were made
different (recipes/qat/diversify.yaml) is quantized in every way, trained back in every way, and compared on the same
held-out rows. Runs come in order of importance; one that would not end in time is left out and listed. The JSON file
is rewritten after each of them, so an interrupted study keeps what it has; its finished runs are not repeated. With
--arms and --skip two GPUs share the work; scripts/qad_report.py joins their files.
"""

import argparse
import functools
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from study import Study, study_parser

from mimo_qat import data, plan_model
from mimo_qat.evaluate import FP8_ROW, NOISE, REFERENCE, Bench, Table, exchanged, quantized
from mimo_qat.models.load import save_trained
from mimo_qat.qat.config import QatConfig
from mimo_qat.qat.train import Trainer

PLAIN = "RTN even"


def ties_toward_zero(master: torch.Tensor) -> torch.Tensor:
    """What an exporter writes that rounds ties toward zero, from masters in BF16 with the rceil rule (as ModelOpt)."""
    x = master.to(torch.bfloat16).float().unflatten(-1, (-1, 32))
    amax = x.abs().amax(-1, keepdim=True)
    k = torch.ceil(torch.log2(amax.double() / 6)).clamp(-126, 125).float()
    k = torch.where(amax > 0, k, 0)
    y = torch.ldexp(x, -k.int())
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=x.device)
    value = grid[torch.bucketize(y.abs(), middles)] * torch.sign(y)
    return torch.ldexp(value, k.int()).flatten(-2).to(torch.bfloat16)


class QadStudy(Study):
    """The runs and their shared settings."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        self.doc["eval_rows"] = options.eval_rows
        self.doc.setdefault("rows", {})
        self.rate = 0.0  # tokens a second of the last run
        self.bench: Bench | None = None

    def config(self, **changes: Any) -> QatConfig:
        options = self.options
        settings = {
            "model": options.teacher,
            "dataset_name": options.data,
            "max_length": options.max_length,
            "per_device_train_batch_size": options.batch,
            "eval_rows": options.batch,
            "learning_rate": options.learning_rate,
            "max_steps": options.short_steps,
            "eval_steps": 10**6,
            "save_steps": 0,
            "logging_steps": 4,
            "deterministic": False,
        }
        return QatConfig(**settings | changes)

    def train(self, name: str, **changes: Any) -> None:
        """`_train`; an arm that fails is recorded, and the study goes on."""
        try:
            self._train(name, **changes)
        except (ValueError, RuntimeError) as error:
            self.leave_out(name, f"failed: {error}"[:500])

    def _train(self, name: str, **changes: Any) -> None:
        """One QAD or QAT run from the teacher, judged at its end and, for `curve`, on the way."""
        curve = changes.pop("curve", [])
        mismatch, save = changes.pop("exported_like_modelopt", False), changes.pop("save", False)
        if self.options.tiny:
            changes["max_steps"] = min(3, changes.get("max_steps", 3))
        config = self.config(output_dir=str(self.work / name.replace(" ", "-")), **changes)
        tokens = config.max_steps * config.per_device_train_batch_size * config.max_length
        if name in self.doc["runs"]:
            return
        if self.rate and self.left() < tokens / self.rate * 1.1 + 15:
            return self.leave_out(name, f"{tokens / self.rate:.0f} s needed, {self.left():.0f} s left")
        trainer, began = Trainer(config), time.monotonic()
        if self.bench is None:
            self.baselines(trainer)
        assert self.bench is not None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        steps, points = [], []
        while trainer.step < config.max_steps:
            steps.append(trainer.train_step())
            if trainer.step in curve:
                kl = float(self.bench.measure(trainer.model).values[0].double().mean())
                points.append({"step": trainer.step, "tokens": sum(s["tokens"] for s in steps), "kl": kl})
                self.doc["unfinished"] = {name: points}
                self.save()
            if trainer.step % 50 == 0:
                print(name, json.dumps(steps[-1]), flush=True)
        self.rate = sorted(s["tokens_per_s"] for s in steps)[len(steps) // 2]
        self.row(name, trainer)
        run = {
            "changes": changes,
            "tokens": sum(s["tokens"] for s in steps),
            "seconds": round(time.monotonic() - began, 1),
            "tokens_per_s": round(self.rate),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
            "codes_changed": trainer.engine.changed_against_ptq(),
            "curve": points,
            "steps": [{k: s[k] for k in ("loss", "flip_fraction", "grad_norm")} for s in steps],
        }
        self.add(name, run)
        self.doc.pop("unfinished", None)
        if mismatch:
            self.export_mismatch(trainer)
        if save:
            save_trained(trainer.model, trainer.tokenizer, trainer.out)
        self.save()
        del trainer
        gc.collect()
        torch.cuda.empty_cache()

    def row(self, name: str, trainer: Trainer) -> None:
        """One row of the table: the weights that the model has now."""
        assert self.bench is not None
        smaller = max(1, self.options.batch // 4) if name == NOISE else None
        figures = self.table.add(name, self.bench.measure(trainer.model, batch_size=smaller))
        if PLAIN in self.table.sums:
            figures |= self.table.gap_closed(name, PLAIN)
        self.doc["rows"][name] = figures
        print(f"{name:24} KL {figures['kl_mean']:.4f} top-1 {figures['top1_agreement']:.4f} "
              f"closed {figures.get('gap_closed')}", flush=True)  # fmt: skip

    def baselines(self, trainer: Trainer) -> None:
        """The rows that need no training; the reference comes first."""
        _, held = data.load_packed(self.options.data, self.options.max_length)
        order = torch.randperm(len(held["input_ids"]), generator=torch.Generator().manual_seed(1))
        rows = {k: v[order[: self.options.eval_rows]] for k, v in held.items()}
        engine = trainer.engine
        originals = {n: engine.originals[n] for n in engine.experts}
        with exchanged(engine.experts, originals):
            self.bench = Bench(trainer.model, rows, self.options.batch)
            self.table = Table(self.bench, seed=0)
            for name in (REFERENCE, NOISE):
                self.row(name, trainer)
        for name, how in ((PLAIN, "even"), *((f"RTN {r}", r) for r in ("floor", "rceil", "mse")), (FP8_ROW, "fp8")):
            with exchanged(engine.experts, {n: quantized(n, w, how, False) for n, w in originals.items()}):
                self.row(name, trainer)
        self.save()

    def export_mismatch(self, trainer: Trainer) -> None:
        """The cost of exporting masters with another rounding than the forward's."""
        masters = trainer.engine.masters
        with exchanged(trainer.engine.experts, {n: ties_toward_zero(masters[n].data) for n in trainer.engine.experts}):
            self.row("exported like ModelOpt", trainer)

    def step_times(self) -> None:
        """Medians of a step with and without the quantizer and the teacher, and of the snap alone."""
        out: dict[str, Any] = self.doc.setdefault("step_times", {})
        arms = {"qad": {}, "sft": {"scale_rule": "none", "kl_weight": 0.0, "ce_weight": 1.0}}
        arms["ce_qat"] = {"kl_weight": 0.0, "ce_weight": 1.0}
        for name in ("qad", "sft"):  # as at the scale where activations do not fit: SFT repeats a forward, too
            arms[f"{name}_checkpointed"] = arms[name] | {"gradient_checkpointing": True}
        for name, changes in arms.items():
            out |= self._step_time(name, changes)
            self.save()
            gc.collect()
            torch.cuda.empty_cache()
        out |= {"snap_fraction_of_step": out["snap"] / out["qad"], "qad_over_sft_step": out["qad"] / out["sft"]}
        out["qad_over_sft_step_checkpointed"] = out["qad_checkpointed"] / out["sft_checkpointed"]
        print(json.dumps(out), flush=True)
        self.save()

    def _step_time(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        trainer = Trainer(self.config(output_dir=str(self.work / "times"), max_steps=8, **changes))
        torch.cuda.reset_peak_memory_stats()
        rates = [trainer.train_step() for _ in range(8)][3:]
        out = {name: sorted(s["tokens"] / s["tokens_per_s"] for s in rates)[2]}
        out[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if name != "qad":
            return out
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            trainer.engine.snap()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        shape = plan_model.shape_of(trainer.model, "study")
        flops = plan_model.flops_per_token(shape, self.options.max_length, False)
        return out | {"snap": sorted(times)[3], "flops_per_token": flops, "tokens_per_step": rates[0]["tokens"]}


def arms(rate: float, short: int, long: int) -> list[tuple[str, dict[str, Any]]]:
    """(name, what differs from a short QAD run), in order of importance; each group answers one question."""
    ce = {"kl_weight": 0.0, "ce_weight": 1.0}
    curve = sorted({long // 64, long // 32, long // 16, long // 8, long // 4, long // 2} - {0})
    return [
        ("qad short", {}),
        ("ce short", ce),
        ("qad long", {"max_steps": long, "curve": curve, "save": True}),
        ("qad short rceil", {"scale_rule": "rceil", "exported_like_modelopt": True}),
        ("qad short lr x3", {"learning_rate": 3 * rate}),
        ("qad short lr x0.3", {"learning_rate": 0.3 * rate}),
        ("qad short floor", {"scale_rule": "floor"}),
        ("qad short mse", {"scale_rule": "mse"}),
        ("qad short bf16 masters", {"master_dtype": "bfloat16"}),
        ("qad short bf16 masters lr x0.1", {"master_dtype": "bfloat16", "learning_rate": 0.1 * rate}),
        ("qad short lr x0.1", {"learning_rate": 0.1 * rate}),
        ("kl + 0.1 ce short", {"ce_weight": 0.1}),
        ("kl + hidden short", {"hidden_weight": 1.0}),
        ("experts+router short", {"train": "experts+router"}),
        ("body short", {"train": "body"}),
        ("qad quarter lr x3", {"learning_rate": 3 * rate, "max_steps": short // 4}),
        ("qad quarter", {"max_steps": short // 4}),
        ("qad quarter lr x0.3", {"learning_rate": 0.3 * rate, "max_steps": short // 4}),
        ("qad short seed 1", {"seed": 1}),
        ("ce short seed 1", {"seed": 1} | ce),
        ("qad short seed 2", {"seed": 2}),
        ("ce short seed 2", {"seed": 2} | ce),
    ]


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--teacher", required=True, help="folder of recipes/qat/diversify.yaml")
    parser.add_argument("--data", required=True, help="file of mimo-qat pack")
    parser.add_argument("--until", help="no run begins once this file is there")
    parser.add_argument("--times", action="store_true", help="measure step times as well")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval_rows", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--short_steps", type=int, default=64, help="of an ablation")
    parser.add_argument("--long_steps", type=int, default=1060)
    parser.add_argument("--tiny", action="store_true", help="three steps a run, to test the script")
    options = parser.parse_args()
    data.load_packed = functools.cache(data.load_packed)  # one copy for all runs of this process
    study = QadStudy(options)
    for name, changes in arms(options.learning_rate, options.short_steps, options.long_steps):
        if options.until and Path(options.until).exists():
            raise SystemExit(f"{options.until} is there; arms from {name} on are left for another call")
        if study.chosen(name):
            study.train(name, **changes)
    if options.times:
        study.step_times()
    study.end()


if __name__ == "__main__":
    main()
