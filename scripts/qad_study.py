"""python scripts/qad_study.py --model runs/moe --data packed.safetensors --work runs/study --seconds 1200

What docs/results/qad.md states, measured in one process: the experts of an upcycled mixture are made different by
continued training, then quantized in every way, trained back in every way, and compared on the same held-out rows.
Runs come in order of importance; one that would not end in time is left out and listed. study.json is rewritten after
each of them, so an interrupted study keeps what it has; its finished runs are not repeated.
"""

import argparse
import functools
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch

from mimo_qat import data, plan_model
from mimo_qat.evaluate import FP8_ROW, NOISE, REFERENCE, Bench, Table, exchanged, quantized
from mimo_qat.provenance import commit, hardware, versions, write_json
from mimo_qat.qat.config import QatConfig
from mimo_qat.qat.train import Trainer, run

PLAIN = "RTN even"
PEAK_BF16 = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}  # dense, from NVIDIA's data sheets
SHORT = 64  # steps of an ablation


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


class Study:
    """The runs, their shared settings, the clock and study.json."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.work = options, Path(options.work)
        self.began, self.path = time.monotonic(), Path(options.out or Path(options.work) / "study.json")
        self.doc: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.doc |= {"commit": commit(), "versions": versions(), "hardware": hardware(), "options": vars(options)}
        for key in ("rows", "runs", "left_out"):
            self.doc.setdefault(key, {})
        self.rate = 0.0  # tokens a second of the last run
        self.bench: Bench | None = None

    def config(self, model: str, **changes: Any) -> QatConfig:
        options = self.options
        settings = {
            "model": model,
            "dataset_name": options.data,
            "max_length": options.max_length,
            "per_device_train_batch_size": options.batch,
            "eval_rows": options.batch,
            "learning_rate": options.learning_rate,
            "max_steps": SHORT if not options.tiny else 3,
            "eval_steps": 10**6,
            "save_steps": 0,
            "logging_steps": 4,
            "deterministic": False,
        }
        return QatConfig(**settings | changes)

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.began)

    def train(self, name: str, **changes: Any) -> None:
        """`_train`; an arm that fails is recorded, and the study goes on."""
        try:
            self._train(name, **changes)
        except (ValueError, RuntimeError) as error:
            print(f"{name} failed: {error}", flush=True)
            self.doc["left_out"][name] = f"failed: {error}"[:500]
            self.save()

    def _train(self, name: str, **changes: Any) -> None:
        """One QAD or QAT run from the teacher, judged at its end and, for `curve`, on the way."""
        curve = changes.pop("curve", [])
        after = changes.pop("after", None)
        config = self.config(str(self.work / "teacher"), output_dir=str(self.work / name), **changes)
        tokens = config.max_steps * config.per_device_train_batch_size * config.max_length
        if name in self.doc["runs"]:
            return
        if self.rate and self.left() < tokens / self.rate * 1.1 + 15:
            self.doc["left_out"][name] = f"{tokens / self.rate:.0f} s needed, {self.left():.0f} s left"
            return
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
        self.doc["runs"][name] = {
            "changes": changes,
            "tokens": sum(s["tokens"] for s in steps),
            "seconds": round(time.monotonic() - began, 1),
            "tokens_per_s": round(self.rate),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
            "codes_changed": trainer.engine.changed_against_ptq(),
            "curve": points,
            "steps": [{k: s[k] for k in ("loss", "flip_fraction", "grad_norm")} for s in steps],
        }
        self.doc.pop("unfinished", None)
        if after:
            after(trainer)
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
        _, held = data.load_packed(self.options.data)
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

    def diversify(self) -> None:
        """Continued training of everything but embeddings and head, until the experts differ."""
        if (self.work / "teacher" / "qat.json").is_file():
            return
        options = self.options
        config = self.config(
            options.model,
            output_dir=str(self.work / "teacher"),
            scale_rule="none",
            train="body",
            kl_weight=0.0,
            ce_weight=1.0,
            balance_rate=1e-3,
            learning_rate=options.diversify_rate,
            max_steps=options.diversify_steps,
            logging_steps=20,
            seed=100,
        )
        trainer, began = Trainer(config), time.monotonic()
        before = next(iter(trainer.engine.experts.values())).detach()[:2].float()
        figures = run(trainer)
        after = next(iter(trainer.engine.experts.values())).detach()[:2].float()
        self.doc["diversified"] = figures | {
            "seconds": round(time.monotonic() - began, 1),
            "tokens": options.diversify_steps * options.batch * options.max_length,
            "distance_of_two_experts": float((after[0] - after[1]).norm() / after[0].norm()),
            "distance_before": float((before[0] - before[1]).norm() / before[0].norm()),
        }
        print("diversified", json.dumps(self.doc["diversified"]), flush=True)
        self.save()
        del trainer
        gc.collect()
        torch.cuda.empty_cache()

    def export_mismatch(self, trainer: Trainer) -> None:
        """The cost of exporting masters with another rounding than the forward's."""
        masters = trainer.engine.masters
        with exchanged(trainer.engine.experts, {n: ties_toward_zero(masters[n].data) for n in trainer.engine.experts}):
            self.row("exported like ModelOpt", trainer)

    def step_times(self) -> None:
        """Medians of a step with and without the quantizer and the teacher, and of the snap alone."""
        if "step_times" in self.doc:
            return
        out: dict[str, Any] = {}
        arms = {"qad": {}, "sft": {"scale_rule": "none", "kl_weight": 0.0, "ce_weight": 1.0}}
        arms["ce_qat"] = {"kl_weight": 0.0, "ce_weight": 1.0}
        for name in ("qad", "sft"):  # as at the scale where activations do not fit: SFT repeats a forward, too
            arms[f"{name}_checkpointed"] = arms[name] | {"gradient_checkpointing": True}
        for name, changes in arms.items():
            trainer = Trainer(
                self.config(str(self.work / "teacher"), output_dir=str(self.work / "times"), max_steps=8, **changes)
            )
            torch.cuda.reset_peak_memory_stats()
            rates = [trainer.train_step() for _ in range(8)][3:]
            out[name] = sorted(s["tokens"] / s["tokens_per_s"] for s in rates)[2]
            out[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if name == "qad":
                times = []
                for _ in range(7):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    trainer.engine.snap()
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                out["snap"] = sorted(times)[3]
                shape = plan_model.shape_of(trainer.model, "study")
                flops = plan_model.flops_per_token(shape, self.options.max_length, False)
                out["flops_per_token"] = flops
                out["tokens_per_step"] = rates[0]["tokens"]
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
        out |= {"snap_fraction_of_step": out["snap"] / out["qad"], "qad_over_sft_step": out["qad"] / out["sft"]}
        out["qad_over_sft_step_checkpointed"] = out["qad_checkpointed"] / out["sft_checkpointed"]
        self.doc["step_times"] = out
        print(json.dumps(out), flush=True)
        self.save()

    def save(self) -> None:
        write_json(self.path, self.doc)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="upcycled BF16 folder")
    parser.add_argument("--data", required=True, help="file of mimo-qat pack")
    parser.add_argument("--work", required=True)
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run begins that would end later")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--eval_rows", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--diversify_rate", type=float, default=3e-4)
    parser.add_argument("--diversify_steps", type=int, default=960)
    parser.add_argument("--long_steps", type=int, default=1060)
    parser.add_argument("--tiny", action="store_true", help="three steps a run, to test the script")
    options = parser.parse_args()
    data.load_packed = functools.cache(data.load_packed)  # one copy for all runs of this process
    study, rate = Study(options), options.learning_rate
    ce = {"kl_weight": 0.0, "ce_weight": 1.0}
    study.diversify()
    study.train("qad short")
    if torch.cuda.is_available():
        study.step_times()
    study.train("ce short", **ce)
    long = options.long_steps
    study.train("qad long", max_steps=long, curve=[long // 64, long // 32, long // 16, long // 8, long // 4, long // 2])
    study.train("qad short rceil", scale_rule="rceil", after=study.export_mismatch)
    for seed in (1, 2):
        study.train(f"qad short seed {seed}", seed=seed)
        study.train(f"ce short seed {seed}", seed=seed, **ce)
    for rule in ("floor", "mse"):
        study.train(f"qad short {rule}", scale_rule=rule)
    for factor in (3.0, 0.3, 0.1):
        study.train(f"qad short lr x{factor}", learning_rate=factor * rate)
    study.train("qad short bf16 masters", master_dtype="bfloat16")
    study.train("qad short bf16 masters lr x0.1", master_dtype="bfloat16", learning_rate=0.1 * rate)
    study.train("kl + 0.1 ce short", ce_weight=0.1)
    study.train("kl + hidden short", hidden_weight=1.0)
    study.train("experts+router short", train="experts+router")
    study.train("body short", train="body")
    for factor in (3.0, 0.3):
        steps = SHORT // 4 if not options.tiny else 2
        study.train(f"qad {steps} steps lr x{factor}", learning_rate=factor * rate, max_steps=steps)
    print(json.dumps({"left_out": study.doc["left_out"], "seconds": time.monotonic() - study.began}))


if __name__ == "__main__":
    main()
