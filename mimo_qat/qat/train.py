"""mimo-qat qat --model runs/moe --output_dir runs/qat: FP4 quantization-aware distillation of the routed experts.

Also: accelerate launch --config_file recipes/accelerate/ddp.yaml -m mimo_qat.qat.train --config recipes/qat/demo.yaml

Teacher and student are one model: everything but the experts is frozen and shared, and the teacher's forward runs with
the original experts swapped in. The loss is forward KL. The output folder holds the snapped experts in BF16, which any
MXFP4 packer reproduces exactly, and the FP32 masters are in its checkpoints.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from tqdm import tqdm
from transformers.integrations import unset_hf_deepspeed_config

from mimo_qat import data
from mimo_qat.models import cpu_experts
from mimo_qat.models.compiled import use_training_kernels
from mimo_qat.models.experts import TokenCounts, expert_parameters, match_report, transposed_experts
from mimo_qat.models.load import final_hidden, load_for_training, save_trained
from mimo_qat.provenance import JsonlLog, write_json, write_provenance
from mimo_qat.qat import shard, state
from mimo_qat.qat.config import FREE, QatConfig, learning_rate
from mimo_qat.qat.hook import HookEngine
from mimo_qat.qat.objective import agreement, chunked_loss, hidden_loss, next_tokens
from mimo_qat.qat.plots import plot_run
from mimo_qat.qat.snap import SnappedCopy


def other_parameters(model: Any, which: str) -> dict[str, nn.Parameter]:
    """The parameters that are trained beside the experts; `which` is QatConfig.train."""
    experts = expert_parameters(model).keys()
    if which == "experts":
        return {}
    if which == "experts+router":
        routers = [n for n, m in model.named_modules() if hasattr(m, "experts")]
        wanted = {f"{n}.{r}.weight" for n in routers for r in ("gate", "router")}
        return {n: p for n, p in model.named_parameters() if n in wanted}
    ends = {
        id(p) for end in ("get_input_embeddings", "get_output_embeddings") for p in getattr(model, end)().parameters()
    }
    return {n: p for n, p in model.named_parameters() if n not in experts and id(p) not in ends}


def sharding(config: QatConfig, accelerator: Accelerator) -> str:
    """ "none", "fsdp2" or "zero": what the configuration asks for, and by default how the run was launched."""
    launched = accelerator.distributed_type
    kind = {DistributedType.FSDP: "fsdp2", DistributedType.DEEPSPEED: "zero"}.get(launched, "none")
    if config.sharding != "auto" and kind == "zero":
        raise ValueError(f"sharding {config.sharding} under a DeepSpeed launch; use another accelerate recipe")
    if launched == DistributedType.FSDP:
        _check_fsdp_plugin(accelerator.state.fsdp_plugin)
    kind = kind if config.sharding == "auto" else config.sharding
    if kind == "fsdp2" and accelerator.num_processes < 2:
        raise ValueError("fsdp2 shards over processes and there is one; launch more, or use sharding none")
    if kind == "zero" and (config.engine == "hook" or config.master_dtype != "float32"):
        raise ValueError("DeepSpeed keeps FP32 masters of its own; use engine snapped and master_dtype float32")
    return kind


def _check_fsdp_plugin(plugin: Any) -> None:
    """ValueError for settings of an FSDP launch that the engines do not follow."""
    offload = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
    for wrong, remedy in (
        (plugin.fsdp_version != 2, "fsdp_version: 2 (FSDP1 flattens parameters across MXFP4 blocks)"),
        (offload, "fsdp_offload_params: false (masters are snapped on the GPU)"),
        (not plugin.reshard_after_forward, "fsdp_reshard_after_forward: true (teacher and student are gathered anew)"),
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading: false (every process reads the model)"),
    ):
        if wrong:
            raise ValueError(f"this FSDP launch is not supported; set {remedy}, as in recipes/accelerate/fsdp2.yaml")


class Trainer:
    """One run: data, engine, optimizer, and what a step, an evaluation and a checkpoint are."""

    def __init__(self, config: QatConfig):
        self.config = config
        log_with = None if config.report_to == "none" else config.report_to
        # Said outright, because accelerate ignores the ranks of a CPU launch by torchrun otherwise; but where it is
        # said, it ignores DeepSpeed.
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        on_cpu = not (torch.accelerator.is_available() or deepspeed)
        self.accelerator = Accelerator(cpu=on_cpu, log_with=log_with, project_dir=config.output_dir)
        self.out = Path(config.output_dir)
        set_seed(config.seed)
        # Resuming must give the same bytes. CUDA kernels without a deterministic form warn and run.
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        # A debugging aid that costs a sixth of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.sharding = sharding(config, self.accelerator)
        unset_hf_deepspeed_config()  # transformers would partition a model before its experts are found and counted
        # Where the model is to be sharded it may not fit on one device; sharding moves it there layer by layer.
        device = self.accelerator.device if self.sharding == "none" else "cpu"
        self.model, self.tokenizer = load_for_training(config.model, torch.bfloat16, device)
        if self.accelerator.device.type != "cpu" and self.model.config._experts_implementation == cpu_experts.NAME:
            self.model.set_experts_implementation("grouped_mm")  # the reader took the model for one of a CPU
        self.model.requires_grad_(False)
        self.model.config.use_cache = False
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in self.model.modules():  # not train(), which turns on dropout and the jitter of some routers
                module.training = getattr(module, "gradient_checkpointing", False)
        if config.compile and self.accelerator.device.type == "cuda":
            use_training_kernels(self.model, modules=self.sharding == "none")
        self.matched = match_report(self.model)
        self.counts = TokenCounts(self.model)
        self.engine = self._engine()
        self.biases = [b for n, b in self.model.named_buffers() if n.endswith("e_score_correction_bias")]
        if config.balance_rate and not self.biases:
            raise ValueError("balance_rate needs routers with an e_score_correction_bias; leave it at 0 for this model")
        self.train_rows, self.eval_rows = self._data()
        self.step = 0

    def _engine(self) -> Any:
        """The engine of the configuration; it takes the trained parameters, sharded where the launch says so."""
        config, model = self.config, self.model
        experts, others = expert_parameters(model), other_parameters(model, config.train)
        rule = None if config.scale_rule == "none" else config.scale_rule
        transposed = transposed_experts(model)
        if config.engine == "hook":
            for param in experts.values():
                param.data = param.data.float()
        for param in (*experts.values(), *others.values()):
            param.requires_grad_(True)
        if self.sharding == "fsdp2":
            shard.shard(model, self.accelerator.device)
            now = dict(model.named_parameters())
            experts, others = ({name: now[name] for name in names} for names in (experts, others))
        if self.sharding == "zero":
            from mimo_qat.qat.zero import ZeroEngine  # imports DeepSpeed

            shard.keep_head_whole(model, self.accelerator.device)
            return ZeroEngine(self.accelerator, model, experts, config, transposed=transposed, others=others)
        if config.engine == "hook":
            return HookEngine(model, experts, rule, transposed=transposed)
        dtype = getattr(torch, config.master_dtype)
        return SnappedCopy(experts, rule, transposed=transposed, others=others, master_dtype=dtype)

    def _data(self) -> tuple[data.Packed, data.Packed]:
        config, per_step = self.config, self.rows_a_step()
        if config.dataset_name.endswith(".safetensors"):
            train, held_out = data.load_packed(config.dataset_name, config.max_length)
        else:
            train, held_out = self._pack(per_step * config.max_steps)
        if len(train["input_ids"]) < per_step or not len(held_out["input_ids"]):
            raise ValueError(
                f"{config.dataset_name}: {len(train['input_ids'])} packed training rows for steps of {per_step}, and "
                f"{len(held_out['input_ids'])} held-out rows; give more data or a smaller batch or max_length"
            )
        order = torch.randperm(len(held_out["input_ids"]), generator=torch.Generator().manual_seed(config.seed))
        return train, {k: v[order[: config.eval_rows]] for k, v in held_out.items()}

    def _pack(self, wanted: int) -> tuple[data.Packed, data.Packed]:
        """At least `wanted` packed training rows and `eval_rows` held-out ones of the dataset, where it has them."""
        config = self.config
        # A packed row takes few rows of text; reading and tokenizing more would outlast a short run.
        texts = 4 * max(1, config.max_length // 256)
        limit = None if config.dataset_name in data.CORPORA else texts * (wanted + config.eval_rows)
        while True:
            sides = data.read_split(config.dataset_name, config.held_out, config.seed, limit)
            train, held_out = (
                data.pack_first(rows, self.tokenizer, config.max_length, count, texts)
                for rows, count in zip(sides, (wanted, config.eval_rows), strict=True)
            )
            enough = len(train["input_ids"]) >= wanted and len(held_out["input_ids"]) >= config.eval_rows
            if enough or limit is None or sum(map(len, sides)) < limit:
                break
            limit *= 2  # the rows are short
        if self.accelerator.is_main_process:
            data.write_rows(self.out / "held_out.jsonl", sides[1])
        return train, held_out

    def micro_batches(self, step: int) -> Iterator[data.Packed]:
        """The micro-batches of this process at `step`; a function of the step alone, so resuming needs no cursor."""
        config, rows = self.config, len(self.train_rows["input_ids"])
        size, rank = config.per_device_train_batch_size, self.accelerator.process_index
        per_step = self.rows_a_step()
        steps_an_epoch = rows // per_step
        generator = torch.Generator().manual_seed(config.seed + step // steps_an_epoch)
        order = torch.randperm(rows, generator=generator)
        mine = order[(step % steps_an_epoch) * per_step :][rank * size * config.gradient_accumulation_steps :]
        for i in range(config.gradient_accumulation_steps):
            picked = mine[i * size : (i + 1) * size]
            yield {k: v[picked].to(self.accelerator.device) for k, v in self.train_rows.items()}

    def hidden(self, batch: data.Packed) -> torch.Tensor:
        """Final hidden states [real tokens, hidden] of a packed batch."""
        decoder = self.engine.decoder if self.sharding == "zero" else None
        return final_hidden(self.model, batch["input_ids"], batch["position_ids"], decoder)[batch["doc_ids"] >= 0]

    def micro_step(self, batch: data.Packed, all_tokens: int) -> torch.Tensor:
        """Forward and backward of one micro-batch; float32 [loss, KL, CE], each divided by the tokens of the step."""
        config, teacher = self.config, None
        if config.kl_weight or config.hidden_weight:
            with torch.no_grad(), self.engine.teacher():
                teacher = self.hidden(batch)
        with self.counts.recording():
            student = self.hidden(batch)
        labels = next_tokens(batch)[batch["doc_ids"] >= 0] if config.ce_weight else None
        against = teacher if config.kl_weight else None
        head = self.model.lm_head.weight
        loss, kl, ce = chunked_loss(student, against, labels, head, config.kl_weight, config.ce_weight)
        if config.hidden_weight:
            assert teacher is not None
            loss = loss + config.hidden_weight * hidden_loss(student, teacher)
        self.engine.backward(loss / all_tokens)
        return torch.stack((loss.detach(), kl, ce)) / all_tokens

    def train_step(self) -> dict[str, Any]:
        """One optimizer step and one snap."""
        began, config = time.perf_counter(), self.config
        batches = list(self.micro_batches(self.step))
        tokens = torch.tensor(sum(int((b["doc_ids"] >= 0).sum()) for b in batches), device=self.accelerator.device)
        all_tokens = int(self.accelerator.reduce(tokens, "sum"))
        counted = self.counts.counts.clone()
        losses = sum(self.micro_step(batch, all_tokens) for batch in batches)
        norm, spoiled = self.engine.gradient_norm()
        if spoiled:
            raise ValueError(
                f"step {self.step + 1}: the gradient of {spoiled} is not finite; the newest checkpoint in "
                f"{self.out / 'checkpoints'} is whole: lower the learning rate or look at the data, then resume"
            )
        rate = learning_rate(config, self.step)
        self.engine.step(rate, config.max_grad_norm)
        flips = self.engine.snap()
        if config.balance_rate:
            self._balance(self.counts.counts - counted.to(self.counts.counts.device))
        self.step += 1
        loss, kl, ce = self.accelerator.reduce(losses, "sum").tolist()
        seconds = time.perf_counter() - began
        return {
            "step": self.step,
            "loss": loss,
            **({"kl": kl} if config.kl_weight else {}),
            **({"ce": ce} if config.ce_weight else {}),
            "learning_rate": rate,
            "grad_norm": norm,
            "flips": flips,
            "flip_fraction": flips / self.engine.numel(),
            "tokens": all_tokens,
            "tokens_per_s": all_tokens / seconds,
        }

    def expert_tokens(self) -> list[list[int]]:
        """Tokens that each expert of each MoE layer got since the last call, on all processes."""
        counts = torch.tensor(self.counts.take(), device=self.accelerator.device)
        return self.accelerator.reduce(counts, "sum").tolist()

    @torch.no_grad()
    def _balance(self, load_LE: torch.Tensor) -> None:
        load_LE = self.accelerator.reduce(load_LE.to(self.accelerator.device), "sum").float()
        for bias, load_E in zip(self.biases, load_LE, strict=True):
            bias += self.config.balance_rate * torch.sign(load_E.mean() - load_E)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out KL to the teacher, cross-entropy (nats a token) and top-1 agreement of the experts as they are."""
        kl, ce, same, tokens, labelled = 0.0, 0.0, 0, 0, 0
        head, size = self.model.lm_head.weight, self.config.per_device_train_batch_size
        for start in range(0, len(self.eval_rows["input_ids"]), size):
            batch = {k: v[start : start + size].to(self.accelerator.device) for k, v in self.eval_rows.items()}
            student, labels = self.hidden(batch), next_tokens(batch)[batch["doc_ids"] >= 0]
            with self.engine.teacher():
                teacher = self.hidden(batch)
            _, batch_kl, batch_ce = chunked_loss(student, teacher, labels, head, 1.0, 1.0)
            kl, ce = kl + float(batch_kl), ce + float(batch_ce)
            same += agreement(student, teacher, head)
            tokens, labelled = tokens + len(student), labelled + int((labels >= 0).sum())
        return {
            "eval_kl": kl / tokens,
            "eval_ce": ce / max(1, labelled),
            "eval_top1": same / tokens,
            "eval_tokens": tokens,
        }

    def rows_a_step(self) -> int:
        """Packed rows of one optimizer step, over micro-batches and processes."""
        config = self.config
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return size * self.accelerator.num_processes

    def save_checkpoint(self) -> None:
        """checkpoints/step-N: masters, Adam's moments, step and configuration. Every process must call it."""
        spans = self.engine.state() if self.engine.sharded or self.accelerator.is_main_process else {}
        document = {
            "step": self.step,
            "rows_a_step": self.rows_a_step(),
            "biases": [b.tolist() for b in self.biases] if self.config.balance_rate else [],
            "config": asdict(self.config),
        }
        state.save(self.out / "checkpoints" / f"step-{self.step:06d}", spans, document, self.accelerator)

    def resume(self) -> None:
        """Continues from the newest checkpoint, if there is one; refuses one of another configuration.

        Another number of processes, another engine or another sharding may continue it, with as many rows a step.
        """
        found = state.complete(self.out / "checkpoints")
        if not found or not self.config.resume_from_checkpoint:
            return
        document = json.loads((found[-1] / "state.json").read_text())
        theirs = document["config"] | {"rows_a_step": document["rows_a_step"]}
        ours = asdict(self.config) | {"rows_a_step": self.rows_a_step()}
        differing = [k for k in ours if k not in FREE and theirs.get(k) != ours[k]]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{found[-1]} was made with {key} {theirs.get(key)!r}, now {ours[key]!r}; "
                "use the same configuration, another output_dir, or --resume_from_checkpoint false"
            )
        state.load(found[-1], self.engine.state())
        self.step = document["step"]
        self.engine.restored(self.step)
        for bias, value in zip(self.biases, document["biases"], strict=False):
            bias.copy_(torch.tensor(value))

    def save_model(self) -> None:
        """The trained model with its tokenizer in output_dir, written by the main process; every process must call."""
        whole = None
        if self.sharding != "none" or self.config.engine == "hook":
            whole = shard.gather(self.model, self.engine, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.model.config.use_cache = True
            save_trained(self.model, self.tokenizer, self.out, whole)
        self.accelerator.wait_for_everyone()


def run(trainer: Trainer, save_model: bool = True) -> dict[str, Any]:
    """Trains to the last step, writes the model and returns the figures."""
    config, accelerator = trainer.config, trainer.accelerator
    main_process = accelerator.is_main_process
    accelerator.print(trainer.matched)
    accelerator.print(f"{len(trainer.train_rows['input_ids'])} packed training rows")
    ptq = trainer.evaluate()  # the masters are still the originals, so this is round-to-nearest PTQ
    trainer.resume()
    log = JsonlLog(trainer.out / "metrics.jsonl", keep_until=trainer.step) if main_process else None
    if config.report_to != "none":
        accelerator.init_trackers("mimo-qat", asdict(config), {config.report_to: {"name": config.run_name}})
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
            expert_tokens = trainer.expert_tokens()
            if log:
                log.write(**metrics, expert_tokens=expert_tokens)
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", ptq=f"{ptq['eval_kl']:.4f}", flips=metrics["flips"])
        bar.update()
        if config.save_steps and (last or trainer.step % config.save_steps == 0):
            trainer.save_checkpoint()
    bar.close()
    trained = trainer.evaluate()
    report = {
        "folder": str(trainer.out),
        "kl_rtn": ptq["eval_kl"],
        "kl_qad": trained["eval_kl"],
        "ce_rtn": ptq["eval_ce"],
        "ce_qad": trained["eval_ce"],
        "top1_rtn": ptq["eval_top1"],
        "top1_qad": trained["eval_top1"],
        "eval_tokens": trained["eval_tokens"],
        "codes_changed": trainer.engine.changed_against_ptq(),
        "scale_rule": config.scale_rule,
        "steps": config.max_steps,
    }
    if save_model:
        trainer.save_model()
    if main_process and save_model:
        write_provenance(trainer.out, config)
        write_json(trainer.out / "qat.json", report)
        plot_run(trainer.out)
    accelerator.end_training()
    return report


def main(config: QatConfig) -> dict[str, Any]:
    """Runs the training, or returns the report of a finished one with the same configuration."""
    return run(Trainer(config))


if __name__ == "__main__":
    from mimo_qat.commands import run_one

    raise SystemExit(run_one("mimo_qat.qat.train", QatConfig, main))
