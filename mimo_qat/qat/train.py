"""mimo-qat qat --model runs/moe --output_dir runs/qat: FP4 quantization-aware distillation of the routed experts.

Also: accelerate launch --config_file recipes/accelerate/ddp.yaml -m mimo_qat.qat.train --config recipes/qat/demo.yaml

Teacher and student are one model: everything but the experts is frozen and shared, and the teacher's forward runs with
the original experts swapped in. The loss is forward KL. The output folder holds the snapped experts in BF16, which any
MXFP4 packer reproduces exactly, and the FP32 masters are in its checkpoints.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mimo_qat import data
from mimo_qat.checkpoint.reader import load_model
from mimo_qat.models.upcycle import save_bf16
from mimo_qat.provenance import JsonlLog, write_json, write_provenance
from mimo_qat.qat.experts import TokenCounts, expert_parameters
from mimo_qat.qat.objective import agreement, forward_kl
from mimo_qat.qat.snap import SnappedCopy


@dataclass(kw_only=True)
class QatConfig:
    """FP4 quantization-aware distillation of the routed experts; everything else is frozen."""

    model: str
    """BF16 (or FP8) MiMo-V2 folder; its experts are the teacher's"""
    output_dir: str
    """folder to write: snapped BF16 model, metrics.jsonl, held_out.jsonl, checkpoints/"""
    dataset_name: str = "stdlib"
    """training rows: a .jsonl file, a hub dataset, or "stdlib" """
    held_out: float = 0.1
    """fraction of rows, chosen by a hash of the prompt, that is evaluated and never trained on"""
    eval_rows: int = 8
    """packed rows of held-out text in one evaluation"""
    max_length: int = 512
    """tokens a packed row"""
    scale_rule: Literal["even", "floor", "rceil", "mse"] = "even"
    """MXFP4 block-scale rule"""
    max_steps: int = 100
    """optimizer steps"""
    per_device_train_batch_size: int = 4
    """packed rows a micro-batch and process"""
    gradient_accumulation_steps: int = 1
    """micro-batches a step"""
    learning_rate: float = 1e-5
    """peak learning rate; scale it with sigma_w / 0.02, and prefer twice as much below 200 steps"""
    min_learning_rate: float = 0.1
    """floor of the cosine schedule, as a fraction of learning_rate"""
    warmup_ratio: float = 0.05
    """fraction of the steps with a rising learning rate"""
    max_grad_norm: float = 1.0
    """gradient clipping; 0 turns it off"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass"""
    logging_steps: int = 5
    """steps between lines of metrics.jsonl"""
    eval_steps: int = 50
    """steps between held-out evaluations; the last step is always evaluated"""
    save_steps: int = 50
    """steps between checkpoints; 0 for none"""
    resume_from_checkpoint: bool = True
    """continue from the newest checkpoint in output_dir"""
    report_to: Literal["none", "wandb", "trackio"] = "none"
    """experiment tracker besides metrics.jsonl"""
    run_name: str | None = None
    """name of the run in the tracker"""
    seed: int = 0
    """order of the data"""


def learning_rate(config: QatConfig, step: int) -> float:
    """Linear warm-up, then cosine down to the floor; `step` counts from 0."""
    warmup = math.ceil(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    floor = config.min_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """One run: data, engine, optimizer, and what a step, an evaluation and a checkpoint are."""

    def __init__(self, config: QatConfig):
        self.config = config
        log_with = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(log_with=log_with, project_dir=config.output_dir)
        self.out = Path(config.output_dir)
        set_seed(config.seed)
        # Resuming must give the same bytes. CUDA kernels without a deterministic form warn and run.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A debugging aid that costs a sixth of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.tokenizer = data.load_tokenizer(config.model)
        self.model = load_model(config.model, dtype=torch.bfloat16, device=self.accelerator.device)
        self.model.requires_grad_(False)
        self.model.config.use_cache = False
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        self.engine = SnappedCopy(expert_parameters(self.model), config.scale_rule)
        self.counts = TokenCounts(self.model)
        self.optimizer = torch.optim.AdamW(
            self.engine.masters.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.train_rows, self.eval_rows = self._data()
        self.step = 0

    def _data(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        config = self.config
        kept, held = data.split_rows(data.read_rows(config.dataset_name), config.held_out, config.seed)
        if self.accelerator.is_main_process:
            data.write_rows(self.out / "held_out.jsonl", held)
        pad = self.tokenizer.pad_token_id or 0
        per_step = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        )
        packed = []
        for rows, limit in ((kept, per_step * config.max_steps), (held, config.eval_rows)):
            # Tokenizing the whole of a large dataset for a short run would take longer than the run.
            rows = rows[: 4 * limit * max(1, config.max_length // 256)]
            examples = data.tokenize_rows(rows, self.tokenizer, config.max_length)
            packed.append(data.pack(examples, config.max_length, pad))
        train, held_out = packed
        if len(train["input_ids"]) < per_step or not len(held_out["input_ids"]):
            raise ValueError(
                f"{config.dataset_name}: {len(train['input_ids'])} packed training rows for steps of {per_step}, and "
                f"{len(held_out['input_ids'])} held-out rows; give more data or a smaller batch or max_length"
            )
        order = torch.randperm(len(held_out["input_ids"]), generator=torch.Generator().manual_seed(config.seed))
        return train, {k: v[order[: config.eval_rows]] for k, v in held_out.items()}

    def micro_batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of this process at `step`; a function of the step alone, so resuming needs no cursor."""
        config, rows = self.config, len(self.train_rows["input_ids"])
        size, rank = config.per_device_train_batch_size, self.accelerator.process_index
        per_step = size * config.gradient_accumulation_steps * self.accelerator.num_processes
        steps_an_epoch = rows // per_step
        generator = torch.Generator().manual_seed(config.seed + step // steps_an_epoch)
        order = torch.randperm(rows, generator=generator)
        mine = order[(step % steps_an_epoch) * per_step :][rank * size * config.gradient_accumulation_steps :]
        for i in range(config.gradient_accumulation_steps):
            picked = mine[i * size : (i + 1) * size]
            yield {k: v[picked].to(self.accelerator.device) for k, v in self.train_rows.items()}

    def hidden(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Final hidden states [real tokens, hidden] of a packed batch."""
        out = self.model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        return out.last_hidden_state[batch["doc_ids"] >= 0]

    def train_step(self) -> dict[str, Any]:
        """One optimizer step and one snap."""
        began, config = time.perf_counter(), self.config
        batches = list(self.micro_batches(self.step))
        tokens = torch.tensor(sum(int((b["doc_ids"] >= 0).sum()) for b in batches), device=self.accelerator.device)
        all_tokens = int(self.accelerator.reduce(tokens, "sum"))
        total = torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            with torch.no_grad(), self.engine.teacher():
                teacher = self.hidden(batch)
            with self.counts.recording():
                student = self.hidden(batch)
            loss = forward_kl(student, teacher, self.model.lm_head.weight) / all_tokens
            self.accelerator.backward(loss)
            total += loss.detach()
        masters = list(self.engine.masters.values())
        for master in masters:
            if master.grad is None:  # no token of any micro-batch reached this layer's experts
                master.grad = torch.zeros_like(master)
            if self.accelerator.num_processes > 1:
                master.grad = self.accelerator.reduce(master.grad, "sum")
        norm = torch.nn.utils.clip_grad_norm_(masters, config.max_grad_norm or math.inf)
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        flips = self.engine.snap()
        self.step += 1
        seconds = time.perf_counter() - began
        kl = float(self.accelerator.reduce(total, "sum"))
        return {
            "step": self.step,
            "loss": kl,
            "kl": kl,
            "learning_rate": rate,
            "grad_norm": float(norm),
            "flips": flips,
            "flip_fraction": flips / self.engine.numel(),
            "tokens": all_tokens,
            "tokens_per_s": all_tokens / seconds,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out KL to the teacher (nats a token) and top-1 agreement of the experts as they are now."""
        kl, same, tokens = 0.0, 0, 0
        head, size = self.model.lm_head.weight, self.config.per_device_train_batch_size
        for start in range(0, len(self.eval_rows["input_ids"]), size):
            batch = {k: v[start : start + size].to(self.accelerator.device) for k, v in self.eval_rows.items()}
            student = self.hidden(batch)
            with self.engine.teacher():
                teacher = self.hidden(batch)
            kl += float(forward_kl(student, teacher, head))
            same += agreement(student, teacher, head)
            tokens += len(student)
        return {"eval_kl": kl / tokens, "eval_top1": same / tokens, "eval_tokens": tokens}

    def save_checkpoint(self) -> None:
        """checkpoints/step-N: masters, optimizer, step and configuration; the folder appears whole, older ones go."""
        folder = self.out / "checkpoints" / f"step-{self.step:06d}"
        work = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_file({n: m.data.contiguous() for n, m in self.engine.masters.items()}, work / "masters.safetensors")
        torch.save(self.optimizer.state_dict(), work / "optimizer.pt")
        write_json(work / "state.json", {"step": self.step, "config": asdict(self.config)})
        work.rename(folder)
        for other in folder.parent.glob("step-*"):
            if other != folder:
                shutil.rmtree(other)

    def resume(self) -> None:
        """Continues from the newest checkpoint, if there is one; refuses one of another configuration."""
        found = sorted((self.out / "checkpoints").glob("step-*"))
        if not found or not self.config.resume_from_checkpoint:
            return
        state = json.loads((found[-1] / "state.json").read_text())
        theirs, ours = state["config"], asdict(self.config)
        free = {"logging_steps", "save_steps", "eval_steps", "report_to", "run_name", "output_dir"}
        free.add("resume_from_checkpoint")
        differing = [k for k in ours if k not in free and theirs.get(k) != ours[k]]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{found[-1]} was made with {key} {theirs.get(key)!r}, now {ours[key]!r}; "
                "use the same configuration, another output_dir, or --resume_from_checkpoint false"
            )
        self.engine.load_masters(load_file(found[-1] / "masters.safetensors", device=str(self.accelerator.device)))
        where = self.accelerator.device
        self.optimizer.load_state_dict(torch.load(found[-1] / "optimizer.pt", map_location=where, weights_only=True))
        self.step = state["step"]


def run(trainer: Trainer) -> dict[str, Any]:
    """Trains to the last step, writes the model and returns the figures."""
    config, accelerator = trainer.config, trainer.accelerator
    main_process = accelerator.is_main_process
    accelerator.print(
        f"{len(trainer.engine.params)} expert parameters matched, {trainer.engine.numel() / 1e6:.1f} M weights; "
        f"{len(trainer.train_rows['input_ids'])} packed training rows"
    )
    ptq = trainer.evaluate()  # the masters are still the originals, so this is round-to-nearest PTQ
    trainer.resume()
    log = JsonlLog(trainer.out / "metrics.jsonl", keep_until=trainer.step) if main_process else None
    if config.report_to != "none":
        accelerator.init_trackers("mimo-qat", asdict(config), {config.report_to: {"name": config.run_name}})
    metrics: dict[str, Any] = {}
    bar = tqdm(total=config.max_steps, initial=trainer.step, desc="QAD", unit="step", disable=not main_process)
    while trainer.step < config.max_steps:
        metrics = trainer.train_step()
        last = trainer.step == config.max_steps
        evaluating = last or trainer.step % config.eval_steps == 0
        if evaluating:
            metrics |= trainer.evaluate()
        if evaluating or trainer.step % config.logging_steps == 0:
            metrics["codes_changed"] = trainer.engine.changed_against_ptq()
            accelerator.log(metrics, step=trainer.step)
            if log:
                log.write(**metrics, expert_tokens=trainer.counts.take())
        bar.set_postfix(kl=f"{metrics['kl']:.4f}", ptq=f"{ptq['eval_kl']:.4f}", flips=metrics["flips"])
        bar.update()
        if config.save_steps and main_process and (last or trainer.step % config.save_steps == 0):
            trainer.save_checkpoint()
    bar.close()
    trained = trainer.evaluate()
    report = {
        "folder": str(trainer.out),
        "kl_rtn": ptq["eval_kl"],
        "kl_qad": trained["eval_kl"],
        "top1_rtn": ptq["eval_top1"],
        "top1_qad": trained["eval_top1"],
        "eval_tokens": trained["eval_tokens"],
        "codes_changed": trainer.engine.changed_against_ptq(),
        "scale_rule": config.scale_rule,
        "steps": config.max_steps,
    }
    accelerator.wait_for_everyone()
    if main_process:
        trainer.model.config.use_cache = True
        save_bf16(trainer.model, trainer.tokenizer, trainer.out)
        write_provenance(trainer.out, config)
        write_json(trainer.out / "qat.json", report)
    accelerator.end_training()
    return report


def main(config: QatConfig) -> dict[str, Any]:
    """Runs the training, or returns the report of a finished one with the same configuration."""
    if config.max_steps < 1:
        raise ValueError(f"max_steps is {config.max_steps}; train for at least one step")
    return run(Trainer(config))


if __name__ == "__main__":
    from mimo_qat.commands import run_one

    raise SystemExit(run_one("mimo_qat.qat.train", QatConfig, main))
