"""mimo-qat distill --config recipes/distill/demo.yaml --target TARGET --data answers.jsonl --output_dir OUT

Trains a DFlash drafter against a frozen target. Several GPUs: accelerate launch -m mimo_qat.distill.train --config ...
Laptop size: --num_draft_layers 1 --num_anchors 32 --max_length 256 --max_steps 50.

Batches and anchors are functions of (seed, step) and of nothing else, so a killed run that resumes ends with the
same bytes, and the loss does not depend on how the global batch is split over micro-batches and processes.
"""

import hashlib
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mimo_qat.checkpoint.reader import load_model
from mimo_qat.data import load_packed, load_tokenizer, pack_rows, read_held_out, read_rows, read_split
from mimo_qat.distill.blocks import Blocks, attention_masks, blocks_at, sample_anchors
from mimo_qat.distill.config import FREE_ON_RESUME, DistillConfig
from mimo_qat.distill.evaluate import evaluate
from mimo_qat.distill.generate import end_token_ids, prompt_ids, question
from mimo_qat.distill.objective import Objective, Sums, head_loss, metrics
from mimo_qat.distill.optim import MasterOptimizer, learning_rate_factor
from mimo_qat.distill.start import new_drafter, pick_mask_token, warm_start
from mimo_qat.distill.taps import Taps
from mimo_qat.graphs import Graph
from mimo_qat.models.compiled import use_training_kernels
from mimo_qat.models.dflash_files import save_drafter
from mimo_qat.models.modeling_dflash import DFlashDraftModel
from mimo_qat.provenance import JsonlLog, atomic_write, write_provenance

Batch = dict[str, torch.Tensor]


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draft_rows(
    drafter: Any, embed: Any, input_ids: torch.Tensor, blocks: Blocks, taps: torch.Tensor, run_layers: Any = None
) -> torch.Tensor:
    """Hidden rows [B, N, b-1, D] of slots 1..b-1 of every block, ready for the target's head.

    taps [B, S, T*D] are the whole row's: the mask, and nothing else, keeps a block from its own future. `run_layers` is
    the drafter's own, or a compiled form of it.
    """
    size = drafter.config.block_size
    masks = attention_masks(blocks, size, drafter.rules())
    x = drafter.block_rows(embed(input_ids.gather(1, blocks.anchors)))
    hidden = (run_layers or drafter.run_layers)(x, drafter.fuse(taps), blocks.position_ids, masks)
    return hidden.unflatten(1, (-1, size))[:, :, 1:]


def target_rows(final: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Rows [B, N, b-1, D] of the target's final hidden states [B, S, D] whose head predicts each slot's label.

    Slot k of anchor a is the token a + k, which the target predicts at position a + k - 1.
    """
    rows, length, _ = final.shape
    offsets = torch.arange(blocks.labels.shape[2], device=final.device)
    index = (blocks.anchors[:, :, None] + offsets).clamp(max=length - 1)
    return final.flatten(0, 1)[index + length * torch.arange(rows, device=final.device)[:, None, None]]


def on_cpu(config: DistillConfig) -> bool:
    """Said to accelerate outright: it ignores the ranks of a CPU launch otherwise."""
    return config.use_cpu or not torch.accelerator.is_available()


class Distiller:
    """The training loop's state: target, drafter, optimizer, packed rows [R, S], counters.

    Between two log lines the host never waits for the device: sums stay there, batches and anchors come from pinned
    memory, and every shape is the same in every step.
    """

    def __init__(self, config: DistillConfig, target: Any, drafter: DFlashDraftModel, rows: Batch, held_out: Batch):
        trackers = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(cpu=on_cpu(config), log_with=trackers, project_dir=config.output_dir)
        self.config, self.rows, self.held_out = config, rows, held_out
        self.device = self.accelerator.device
        self.target = target.to(self.device).eval().requires_grad_(False)
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.drafter = drafter.to(self.device)
        betas = (config.adam_beta1, config.adam_beta2)
        self.optimizer = MasterOptimizer(self.drafter, config.optimizer, betas, config.weight_decay, config.ema_decay)
        self.drafter.to(self.dtype)
        if config.compile and self.device.type == "cuda":
            use_training_kernels(self.target)
        # Layer by layer: one compilation serves all layers, and the next drafter of the same shape.
        layers = [torch.compile(layer, dynamic=False) for layer in self.drafter.layers] if config.compile else None
        self.run_layers = partial(self.drafter.run_layers, layers=layers)
        if config.cuda_graphs and self.device.type != "cuda":
            raise ValueError("cuda_graphs needs a GPU; leave it out on a CPU")
        self.graph: Graph | None = None
        self.step, self.tokens = 0, 0
        self.window = self.no_sums()  # sums since the last log line
        self.orders: dict[int, torch.Tensor] = {}
        self.tap_cache: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.checkpoint_path = Path(config.output_dir) / "checkpoint.pt"

    def close(self) -> None:
        """Ends training: the target runs uncompiled again, because what was compiled for training decodes slowly."""
        self.graph = None
        self.accelerator.end_training()
        for module in self.target.modules():
            module.__dict__.pop("forward", None)

    def no_sums(self) -> torch.Tensor:
        return torch.zeros(4 + 2 * self.config.block_size, dtype=torch.float64, device=self.device)

    def order(self, epoch: int) -> torch.Tensor:
        """The shuffled rows of an epoch; two epochs are kept, because a step may reach into the next."""
        if epoch not in self.orders:
            count = self.rows["input_ids"].shape[0]
            self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = torch.randperm(count, generator=stream(self.config.seed, "epoch", epoch))
        return self.orders[epoch]

    def rows_a_step(self) -> int:
        """Packed rows of one optimizer step, over micro-batches and processes."""
        c = self.config
        return c.per_device_train_batch_size * c.gradient_accumulation_steps * self.accelerator.num_processes

    def batch(self, micro: int) -> tuple[list[int], Batch]:
        """Rows of one micro-batch of this step: slices of an endless stream of shuffled epochs."""
        size, world = self.config.per_device_train_batch_size, self.accelerator.num_processes
        start = self.step * self.rows_a_step() + (micro * world + self.accelerator.process_index) * size
        places = [divmod(i, self.rows["input_ids"].shape[0]) for i in range(start, start + size)]
        chosen = [int(self.order(epoch)[place]) for epoch, place in places]
        return chosen, {name: values[chosen] for name, values in self.rows.items()}

    def on_device(self, batch: Batch) -> Batch:
        """A batch copied to the device; the host goes on at once."""
        if self.device.type != "cuda":
            return {name: values.to(self.device) for name, values in batch.items()}
        return {name: values.pin_memory().to(self.device, non_blocking=True) for name, values in batch.items()}

    def blocks(self, batch: Batch, *key: int | str) -> tuple[Batch, Blocks]:
        """(the batch on the device, blocks at anchors drawn from the stream of `key`)."""
        c = self.config
        anchors, valid = sample_anchors(batch["loss_mask"], batch["doc_ids"], c.num_anchors, stream(c.seed, *key))
        moved = self.on_device({**batch, "anchors": anchors, "valid": valid})
        anchors, valid = moved.pop("anchors"), moved.pop("valid")
        return moved, blocks_at(moved, anchors, valid, c.block_size)

    @torch.no_grad()
    def target_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The target's taps [B, S, T*D] of a batch, and its final hidden states [B, S, D] if some loss needs them; with
        `cuda_graphs` in memory that the next whole batch overwrites."""
        inputs = batch["input_ids"], batch["position_ids"], batch["doc_ids"]
        whole = len(inputs[0]) == self.config.per_device_train_batch_size  # the last rows of an evaluation may be fewer
        if not self.config.cuda_graphs or not whole:
            return self._target_states(*inputs)
        self.graph = self.graph or Graph(self._target_states, inputs)
        return self.graph(*inputs)

    def _target_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, doc_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with Taps(self.target, self.drafter.config.target_layer_ids) as taps:
            out = self.target.model(input_ids, position_ids=position_ids, document_ids=doc_ids, use_cache=False)
            final = out.last_hidden_state.to(self.dtype) if self.config.needs_target() else None
            return taps.take().to(self.dtype), final

    def training_states(self, chosen: list[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `target_states`, from memory where `cache_taps` asks for it; row by row, so that the bits do not depend
        on which rows met in a batch before."""
        if not self.config.cache_taps:
            return self.target_states(batch)
        for at, row in enumerate(chosen):
            if row not in self.tap_cache:
                self.tap_cache[row] = self.target_states({n: v[at : at + 1] for n, v in batch.items()})
        taps, final = zip(*(self.tap_cache[row] for row in chosen), strict=True)
        return torch.cat(taps), torch.cat(final) if final[0] is not None else None

    def forward(self, batch: Batch, blocks: Blocks, states: tuple, objective: Objective) -> Sums:
        taps, final = states
        embed = self.target.get_input_embeddings()
        return head_loss(
            draft_rows(self.drafter, embed, batch["input_ids"], blocks, taps, self.run_layers),
            self.target.get_output_embeddings().weight,
            blocks.labels,
            blocks.supervised,
            objective,
            target_hidden=target_rows(final, blocks) if objective.needs_target else None,
            selector=self.drafter.candidate_selector,
            anchor_ids=batch["input_ids"].gather(1, blocks.anchors),
        )

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; denominators are summed over micro-batches and processes before they divide."""
        c, world = self.config, self.accelerator.num_processes
        objective, total = c.objective(self.step), self.no_sums()
        for micro in range(c.gradient_accumulation_steps):
            chosen, batch = self.batch(micro)
            self.tokens += int((batch["doc_ids"] >= 0).sum())
            number = micro * world + self.accelerator.process_index
            batch, blocks = self.blocks(batch, "anchors", self.step, number)
            sums = self.forward(batch, blocks, self.training_states(chosen, batch), objective)
            sums.loss.backward()
            self.optimizer.accumulate()
            total += sums.vector()
        if world > 1:
            for tensor in (total, *self.optimizer.gradients()):
                torch.distributed.all_reduce(tensor)
        factor = learning_rate_factor(c.schedule, self.step, c.max_steps, c.warmup_ratio, c.decay_ratio, c.min_lr_ratio)
        rate = c.learning_rate * factor
        norm = self.optimizer.step(rate, total[1], c.max_grad_norm)
        self.step += 1
        self.window += total
        return {"learning_rate": rate, "grad_norm": norm}

    @torch.no_grad()
    def teacher_forced(self) -> dict[str, Any]:
        """Loss and accuracy on the held-out rows, the same anchors every time; of the averaged weights if there are."""
        total, size = self.no_sums(), self.config.per_device_train_batch_size
        with self.optimizer.averaged():
            for start in range(0, self.held_out["input_ids"].shape[0], size):
                batch = {name: values[start : start + size] for name, values in self.held_out.items()}
                batch, blocks = self.blocks(whole(batch, size), "eval", start)
                total += self.forward(batch, blocks, self.target_states(batch), self.config.objective(0)).vector()
        return {f"eval_{name}": value for name, value in metrics(total).items()}

    def check_finite(self) -> None:
        """ValueError where the loss since the last log line is not a number; waits for the device."""
        if not math.isfinite(self.window[0].item()):
            raise ValueError(
                f"step {self.step}: the loss is not finite; the last checkpoint in {self.config.output_dir} is from "
                "before: lower learning_rate or look at the data, then resume"
            )

    def save(self) -> None:
        """Everything that a resumed run needs, in one file that is whole or absent."""
        self.check_finite()
        if not self.accelerator.is_main_process:
            return
        state = {"step": self.step, "config": asdict(self.config), "window": self.window}
        state["rows_a_step"] = self.rows_a_step()
        with atomic_write(self.checkpoint_path) as path:
            torch.save({**state, "optimizer": self.optimizer.state_dict()}, path)

    def resume(self) -> None:
        # To the CPU: torch's loader knows no "cpu:0", and AdamW reads its step counters on the host.
        state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        now = asdict(self.config) | {"rows_a_step": self.rows_a_step()}
        then = now | state["config"] | {k: state[k] for k in ("rows_a_step",) if k in state}
        for name in sorted(now.keys() - FREE_ON_RESUME):
            if then[name] != now[name]:
                raise ValueError(
                    f"{self.checkpoint_path} was made with {name} {then[name]!r}, this run has {now[name]!r}; keep it "
                    "(with as many processes), or choose another output_dir"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.window = state["step"], state["window"].to(self.device)

    def report(self, step: dict[str, Any], began: tuple[float, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(metrics since the last line, its timing): waits for the device once and starts a new window.

        `began` is the time and the step at which the window began, evaluations and checkpoints left out. tokens_per_s
        counts tokens of packed rows, padding left out, over all processes.
        """
        self.check_finite()
        last = {**metrics(self.window), **step, "grad_norm": float(step["grad_norm"])}
        seconds, steps = time.perf_counter() - began[0], self.step - began[1]
        tokens = self.accelerator.reduce(torch.tensor(float(self.tokens), device=self.device)).item()
        timing = {"seconds_per_step": round(seconds / steps, 4), "tokens_per_s": round(tokens / seconds, 1)}
        if self.device.type == "cuda":
            timing["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.window, self.tokens = self.no_sums(), 0
        return last, timing

    def run(self) -> dict[str, Any]:
        """Trains to `max_steps`; returns the last logged metrics."""
        c, main = self.config, self.accelerator.is_main_process
        if c.resume_from_checkpoint and self.checkpoint_path.exists():
            self.resume()
        log = JsonlLog(Path(c.output_dir) / "metrics.jsonl", keep_until=self.step) if main else None
        if c.report_to != "none":
            self.accelerator.init_trackers("distill", config=vars(c))
        bar = tqdm(total=c.max_steps, initial=self.step, desc="distill", disable=None if main else True)
        last: dict[str, Any] = {}
        began = time.perf_counter(), self.step
        while self.step < c.max_steps:
            step, values = self.train_step(), {}
            bar.update()
            if self.step % c.logging_steps == 0 or self.step == c.max_steps:
                last, timing = self.report(step, began)
                values, began = last | timing, (time.perf_counter(), self.step)
                bar.set_postfix(loss=f"{last['loss']:.3f}", prefix=f"{last['prefix_length']:.2f}")
            evaluating = self.step == c.max_steps or (c.eval_steps and self.step % c.eval_steps == 0)
            saving = c.save_steps and (self.step % c.save_steps == 0 or self.step == c.max_steps)
            if (evaluating or saving) and self.device.type == "cuda":
                torch.cuda.synchronize()  # the steps before are not part of the pause
            paused = time.perf_counter()
            if evaluating and self.held_out["input_ids"].shape[0]:
                scores = self.teacher_forced()
                values, last = values | scores, last | scores
            if values and log is not None:
                log.write(step=self.step, **values)
                self.accelerator.log({k: v for k, v in values.items() if not isinstance(v, list)}, step=self.step)
            if saving:
                self.save()
            began = began[0] + time.perf_counter() - paused, began[1]
        bar.close()
        if not last and self.held_out["input_ids"].shape[0]:
            last = self.teacher_forced()  # the run was complete before
        self.close()  # the other processes are done; the first one writes and decodes alone
        return last


def whole(batch: Batch, size: int) -> Batch:
    """The batch with rows of padding up to `size` rows, so that its shapes are those of every other batch."""
    missing = size - batch["input_ids"].shape[0]
    blank = {"input_ids": 0, "loss_mask": 0, "doc_ids": -1, "position_ids": 0}
    return {n: torch.cat((v, v.new_full((missing, v.shape[1]), blank[n]))) for n, v in batch.items()}


def load_data(config: DistillConfig, tokenizer: Any) -> tuple[Batch, Batch, list[list[int]], set[int]]:
    """(training rows, held-out rows, held-out prompts as token ids, every id that occurs)."""
    held_rows = read_held_out(config.eval_data) if config.eval_data is not None else None
    if config.data.endswith(".safetensors"):
        train, held = load_packed(config.data, config.max_length)
        if held_rows is None and config.eval_prompts:
            raise ValueError(f"{config.data} holds no prompts to decode; give eval_data, or set eval_prompts to 0")
        held = held if held_rows is None else pack_rows(held_rows, tokenizer, config.max_length)
    else:
        if held_rows is not None:
            kept = read_rows(config.data)
        else:
            kept, held_rows = read_split(config.data, config.eval_fraction, config.seed)
        train, held = (pack_rows(rows, tokenizer, config.max_length) for rows in (kept, held_rows))
    if not train["loss_mask"].any():
        raise ValueError(
            f"{config.data} leaves no assistant token to train on after holding rows out; give more answers"
        )
    # A prompt that was answered at several temperatures is decoded once.
    asked = {str(question(row)): question(row) for row in held_rows or () if "messages" in row}
    prompts = list(asked.values())[: config.eval_prompts]
    used = {int(i) for part in (train, held) for i in part["input_ids"].unique()}
    return train, held, prompt_ids(tokenizer, prompts), used


def distill(
    config: DistillConfig,
    target: Any,
    drafter: DFlashDraftModel,
    rows: Batch,
    held_out: Batch,
    prompts: list[list[int]],
    eos_token_ids: list[int],
) -> dict[str, Any]:
    """Trains `drafter`, writes it to output_dir/dflash and decodes held-out prompts with it."""
    started = time.perf_counter()
    run = Distiller(config, target, drafter, rows, held_out)
    last = run.run()
    document: dict[str, Any] = {
        "ok": True,
        "drafter": str(Path(config.output_dir) / "dflash"),
        "parameters": sum(p.numel() for p in run.drafter.parameters()),
        "training_rows": rows["input_ids"].shape[0],
        "steps": run.step,
        **last,
        "train_seconds": round(time.perf_counter() - started, 1),
    }
    if run.accelerator.is_main_process:
        with run.optimizer.averaged():
            save_drafter(run.drafter, Path(config.output_dir) / "dflash")
            write_provenance(config.output_dir, config)
            if prompts:
                document["decoding"] = evaluate(
                    run.target, run.drafter, prompts, config.eval_max_new_tokens, eos_token_ids
                )
            elif config.eval_prompts:
                print(
                    "no held-out chats to decode, so acceptance is not measured; give eval_data, or mimo-qat acceptance"
                )
    return document


def main(config: DistillConfig) -> dict[str, Any]:
    """Trains a DFlash drafter on rows that the frozen target answered, and measures its acceptance length."""
    tokenizer = load_tokenizer(config.target)
    rows, held_out, prompts, used = load_data(config, tokenizer)
    accelerator = Accelerator(cpu=on_cpu(config))
    target = load_model(config.target, torch.bfloat16 if config.bf16 else torch.float32, accelerator.device)
    if config.init_drafter is not None:
        drafter, counts = warm_start(config.init_drafter, config, target)
        done = ", ".join(f"{count} tensors {what}" for what, count in counts.items())
        accelerator.print(f"{config.init_drafter}: {done}")
    else:
        mask = config.mask_token_id
        mask = pick_mask_token(tokenizer, target.config.vocab_size, used) if mask is None else mask
        drafter = new_drafter(config, target, mask)
    mask = drafter.config.mask_token_id
    assert mask is not None
    if mask in used or not 0 <= mask < target.config.vocab_size:
        raise ValueError(f"mask_token_id {mask} occurs in the data or is no token; choose an unused id")
    return distill(config, target, drafter, rows, held_out, prompts, end_token_ids(target, tokenizer))


if __name__ == "__main__":
    from mimo_qat.commands import run_one

    raise SystemExit(run_one("mimo_qat.distill.train", DistillConfig, main))
