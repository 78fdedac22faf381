"""python scripts/compare_drafters.py --model runs/moe --data runs/data.safetensors --out docs/results/drafters.json

Training of a DFlash drafter on one GPU by three programs: this project, SpecForge and speculators. Target, tokens,
shape of the drafter, initial weights, blocks a step, loss (cross-entropy, the same decay a slot) and learning rate are
the same; model code, masks, loss kernels, precision and optimizer are each project's own. The target's forward is
part of every step, the optimizer too. The last line printed is the JSON document.

Two layouts of the same documents: "packed" (as `mimo-qat pack` wrote them) and "single" (one document a row, padded),
because SpecForge knows no documents: on packed rows its blocks see and predict across their borders.

What a peer lacks to be run this way becomes part of the result, and so does an exception. Neither peer needs sglang,
vLLM or a server here: their training modules take the target's hidden states as tensors. SpecForge's FSDP wrapper is
left out (one process), and so is the logging of either.
"""

import argparse
import gc
import hashlib
import inspect
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import Qwen3Config

from mimo_qat import data
from mimo_qat.checkpoint.reader import load_model
from mimo_qat.distill.blocks import make_blocks, valid_anchors
from mimo_qat.distill.config import DistillConfig
from mimo_qat.distill.objective import default_gamma
from mimo_qat.distill.start import new_drafter
from mimo_qat.distill.taps import Taps
from mimo_qat.distill.train import Distiller
from mimo_qat.models.modeling_dflash import DFlashDraftModel
from mimo_qat.provenance import command_line, commit, hardware, versions, write_json

Batch = dict[str, torch.Tensor]
ARMS = ("ours_adamw", "ours_muon", "specforge", "speculators", "speculators_eager")
LAYOUTS = ("packed", "single")
STRETCH = 4  # steps that are timed together


@dataclass(frozen=True)
class Task:
    """What all arms of one comparison share: the frozen target, rows [R, S], the drafter to start from."""

    target: Any
    rows: Batch
    drafter: DFlashDraftModel
    config: DistillConfig

    def batch(self, step: int) -> Batch:
        """Rows of `step` on the target's device; the last step ends with the last row."""
        size = self.config.per_device_train_batch_size
        return {k: v[step * size : (step + 1) * size].to(self.target.device) for k, v in self.rows.items()}

    @torch.no_grad()
    def states(self, batch: Batch, layer_ids: list[int]) -> torch.Tensor:
        """Outputs of the target's layers, before its final norm, joined: [B, S, layers * D]."""
        with Taps(self.target, layer_ids) as taps:
            places = {"position_ids": batch["position_ids"], "document_ids": batch["doc_ids"]}
            self.target.model(batch["input_ids"], **places, use_cache=False)
            return taps.take()

    def qwen3_config(self, attention: str, **extra: Any) -> Qwen3Config:
        """The drafter's shape as both peers read it: full attention in every layer."""
        c = self.drafter.config
        names = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings rms_norm_eps"
        ).split()
        config = Qwen3Config(
            **{name: getattr(c, name) for name in names},
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            layer_types=["full_attention"] * c.num_hidden_layers,
            attention_bias=False,
            **extra,
        )
        config._attn_implementation = attention
        return config

    def initial(self) -> dict[str, torch.Tensor]:
        """The drafter's weights under their published names; the mask vector is no parameter of either peer."""
        return {n: p.detach() for n, p in self.drafter.state_dict().items() if n != "mask_embedding"}


def load_initial(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies the drafter's weights into a peer's model; every trainable parameter of it must be among them."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == weights.keys(), sorted(trained ^ weights.keys())
    model.load_state_dict(weights, strict=False)


class Ours:
    """This project: `Distiller.train_step`. It shuffles the rows itself: one epoch of the same rows."""

    def __init__(self, task: Task):
        self.run = Distiller(task.config, task.target, task.drafter, task.rows, task.rows)
        names = ("optimizer", "max_grad_norm", "compile", "cuda_graphs")
        self.facts: dict[str, Any] = {n: getattr(task.config, n) for n in names} | {"documents": "separate"}

    def step(self, number: int) -> torch.Tensor:
        self.run.window.zero_()
        self.run.train_step()
        return self.run.window[0] / self.run.window[1]

    def blocks(self, batch: Batch) -> int:
        config = self.run.config
        cpu = {k: v.cpu() for k, v in batch.items()}
        return int(make_blocks(cpu, config.block_size, config.num_anchors).valid.sum())

    def weights(self) -> dict[str, torch.Tensor]:
        return self.run.drafter.state_dict()


class SpecForge:
    """SpecForge: its OnlineDFlashModel in its TrainerCore, with its BF16Optimizer (AdamW over float32 masters)."""

    def __init__(self, task: Task):
        from specforge.algorithms.common import dflash_family_model
        from specforge.modeling.draft import dflash
        from specforge.optimizer import BF16Optimizer
        from specforge.training import controller
        from specforge.training.backend import FSDPTrainingBackend, ParallelConfig
        from specforge.training.strategies.base import DFlashTrainStrategy

        self.task, c = task, task.config
        attention = "flex_attention" if task.target.device.type == "cuda" else "sdpa"
        shape = task.drafter.config
        draft = dflash.DFlashDraftModel(
            task.qwen3_config(
                attention,
                block_size=c.block_size,
                num_target_layers=shape.num_target_layers,
                dflash_config={"target_layer_ids": shape.target_layer_ids, "mask_token_id": shape.mask_token_id},
            )
        )
        load_initial(draft, task.initial())
        self.model = dflash_family_model.OnlineDFlashModel(
            draft,
            task.target.get_output_embeddings(),
            task.target.get_input_embeddings(),
            shape.mask_token_id,
            block_size=c.block_size,
            attention_backend=attention,
            num_anchors=c.num_anchors,
            loss_decay_gamma=default_gamma(c.block_size),
        ).to(task.target.device, task.target.dtype)
        backend = FSDPTrainingBackend(ParallelConfig())
        backend.prepare_model(self.model, wrap=False)
        backend.set_optimizer(
            BF16Optimizer(
                draft, c.learning_rate, total_steps=c.max_steps + 1, warmup_ratio=0.0, lr_scheduler="constant"
            )
        )
        self.core = controller.TrainerCore(DFlashTrainStrategy(self.model), backend)
        self.facts = provenance("specforge", dflash_family_model, dflash, controller) | {
            "optimizer": "BF16Optimizer: AdamW, clipped at 0.5",
            "attention": attention,
            "documents": "not known: positions run on, blocks see and predict across borders",
        }

    def step(self, number: int) -> torch.Tensor:
        from specforge.runtime.contracts import TrainBatch

        batch = self.task.batch(number)
        taps = self.task.states(batch, self.task.drafter.config.target_layer_ids)
        tensors = {"input_ids": batch["input_ids"], "hidden_states": taps, "loss_mask": batch["loss_mask"]}
        ids = [str(i) for i in range(len(taps))]
        result = self.core.train_step(TrainBatch(sample_ids=ids, strategy="dflash", tensors=tensors))
        return result.loss

    def blocks(self, batch: Batch) -> int:
        mask = batch["loss_mask"]
        return int(self.model._sample_anchor_positions(mask.shape[1], mask, mask.device)[1].sum())

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.draft_model.state_dict()


class Speculators:
    """speculators: its compiled DFlashDraftModel over float32 weights under autocast, its Muon + AdamW, its clipping.

    It takes one packed row: the batch is laid end to end, with document numbers that stay apart. `eager` is its other
    loss, without a kernel of its own: torch 2.11 cannot compile its model with the fused one.
    """

    def __init__(self, task: Task, eager: bool = False):
        from speculators.losses import resolve_loss_config
        from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig, core, metrics
        from speculators.train.config.schema import OptimizerArgs
        from speculators.train.optimizers import build_optimizers

        self.task, c, target = task, task.config, task.target
        cuda = target.device.type == "cuda"
        attention = "simple_flex_attention" if cuda else "eager"
        config = DFlashSpeculatorConfig(
            transformer_layer_config=task.qwen3_config(attention),
            draft_vocab_size=target.config.vocab_size,
            block_size=c.block_size,
            aux_hidden_state_layer_ids=[i + 1 for i in task.drafter.config.target_layer_ids],
            mask_token_id=task.drafter.config.mask_token_id,
        )
        self.model = DFlashDraftModel(config)
        load_initial(self.model, task.initial())
        with torch.no_grad():
            self.model.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
            self.model.verifier_norm.weight.copy_(target.model.norm.weight)
            for head in (self.model.lm_head, self.model.verifier_lm_head):
                head.weight.copy_(target.get_output_embeddings().weight)
        self.model.to(target.device).train()
        self.call = {
            "loss_config": resolve_loss_config("ce", "fused" if cuda and not eager else "eager"),
            "gamma": default_gamma(c.block_size),
            "max_anchors": c.num_anchors * c.per_device_train_batch_size,
            "per_position_loss_weight": "fixed-exp-decay",
        }
        args = OptimizerArgs(lr=c.learning_rate, muon_lr=c.learning_rate)
        self.optimizers = build_optimizers(self.model, args)
        self.facts = provenance("speculators", core, metrics, inspect.getmodule(build_optimizers)) | {
            "optimizer": f"{args.optimizer}, clipped at 1.0",
            "attention": attention,
            "loss": "eager" if eager or not cuda else "fused",
            "documents": "separate for attention and positions; labels and losses run on across borders",
            "labels": "argmax of the target's own logits, computed in every step",
            "loss_scale": "divided by the number of slots; the other arms divide by the sum of their weights",
        }

    def inputs(self, batch: Batch) -> Batch:
        """One row of all documents: ids, masks and positions [1, B*S], and the target's states [1, B*S, ...]."""
        layer_ids = self.task.drafter.config.target_layer_ids
        states = self.task.states(batch, [*layer_ids, self.task.target.config.num_hidden_layers - 1])
        taps, last = states.flatten(0, 1)[None].tensor_split([-self.task.target.config.hidden_size], dim=-1)
        documents = batch["doc_ids"]
        apart = documents + torch.arange(len(documents), device=documents.device)[:, None] * (documents.max() + 1)
        documents = torch.where(documents >= 0, apart, -1)
        rows = {n: batch[n] for n in ("input_ids", "loss_mask", "position_ids")} | {"document_ids": documents}
        rows = {n: values.reshape(1, -1) for n, values in rows.items()}
        return rows | {"hidden_states": taps, "verifier_last_hidden_states": last}

    def step(self, number: int) -> torch.Tensor:
        batch = self.task.batch(number)
        inputs = self.inputs(batch)
        bf16 = inputs["hidden_states"].dtype == torch.bfloat16
        with torch.autocast(inputs["hidden_states"].device.type, torch.bfloat16, enabled=bf16):
            _, loss, _ = self.model(**inputs, **self.call)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def blocks(self, batch: Batch) -> int:
        from speculators.models.dflash.utils import select_anchors

        mask = batch["loss_mask"].reshape(1, -1)
        return int(select_anchors(mask, self.call["max_anchors"], self.task.config.block_size)[1].sum())

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


def provenance(package: str, *modules: ModuleType | None) -> dict[str, Any]:
    """Version of a peer and the digests of the files that were timed."""
    files = [Path(str(inspect.getsourcefile(m))) for m in modules if m is not None]
    digests = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}
    return {"version": metadata.version(package), "sha256": digests}


def single_documents(rows: Batch, length: int) -> Batch:
    """Every document of packed rows [R, S] that can be trained on, in a row of its own [documents, length].

    A document is cut at `length`; the rest of a row is padding: doc_ids -1, loss_mask 0, and input id 0.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("input_ids", "loss_mask", "doc_ids")}
    for row in range(len(rows["doc_ids"])):
        for number in rows["doc_ids"][row].unique().tolist():
            where = rows["doc_ids"][row] == number
            ids, mask = (rows[n][row][where][:length] for n in ("input_ids", "loss_mask"))
            documents = torch.zeros_like(ids)
            if number < 0 or not valid_anchors(mask[None], documents[None]).any():
                continue
            for name, values, fill in (("input_ids", ids, 0), ("loss_mask", mask, 0), ("doc_ids", documents, -1)):
                found[name].append(torch.nn.functional.pad(values, (0, length - len(ids)), value=fill))
    out = {name: torch.stack(values) for name, values in found.items()}
    return out | {"position_ids": data.positions(out["doc_ids"])}


def train(arm: Any, task: Task, warm_up: int) -> dict[str, Any]:
    """All steps of one arm; seconds and peak memory of those after the first `warm_up`, which compile.

    Steps are timed STRETCH at a time, as training runs: nobody looks at the device in between, so that a host which
    need not wait for it may prepare the next step.
    """
    cuda = task.target.device.type == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else torch.cpu.synchronize
    timed, losses, began, first = [], [], time.perf_counter(), 0.0
    held = torch.cuda.memory_allocated() / 1e9 if cuda else None
    for step in range(task.config.max_steps):
        if (step - warm_up) % STRETCH == 0:
            wait()
            if step > warm_up:
                timed.append((time.perf_counter() - began) / STRETCH)
            elif cuda:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        losses.append(arm.step(step))
        if step == 0:
            wait()
            first = time.perf_counter() - began
    wait()
    timed.append((time.perf_counter() - began) / STRETCH)
    median = statistics.median(timed)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    tokens = int((task.rows["doc_ids"] >= 0).sum()) / task.config.max_steps
    blocks = statistics.mean(arm.blocks(task.batch(step)) for step in range(task.config.max_steps))
    return {
        "step_seconds": median,
        "step_seconds_range": [min(timed), max(timed)],
        "first_step_seconds": first,
        "tokens_a_step": tokens,
        "tokens_per_s": tokens / median,
        "blocks_a_step": blocks,
        "blocks_per_s": blocks / median,
        "held_before_gb": held,
        "peak_gb": peak,
        "loss": [float(loss) for loss in losses],
    }


def start_drafter(config: DistillConfig, target: Any, mask_token_id: int) -> DFlashDraftModel:
    """The drafter that every arm starts from. Mask slots begin as the target's embedding of the mask token: the peers
    know no other, this project trains it on."""
    drafter = new_drafter(config, target, mask_token_id)
    with torch.no_grad():
        drafter.mask_embedding.copy_(target.get_input_embeddings().weight[mask_token_id])
    return drafter


def judge(target: Any, drafter: DFlashDraftModel, weights: Batch, held_out: Batch, config: DistillConfig) -> dict:
    """Loss, accuracy and prefix length of trained weights on the same blocks of held-out packed rows, by this
    project. `drafter` still has the mask slots of a peer, and gives the shape."""
    kept = {n: weights[n] for n in drafter.state_dict() if n in weights}
    drafter.load_state_dict(drafter.state_dict() | kept)
    return Distiller(config, target, drafter, held_out, held_out).teacher_forced()


def distill_config(options: argparse.Namespace, block_size: int, layout: str, optimizer: str) -> DistillConfig:
    """This project's settings, reduced to what the peers can do: full attention, no sink, plain rotary embedding."""
    share = options.batch if layout == "packed" else options.single_batch
    length = options.length if layout == "packed" else options.single_length
    return DistillConfig(
        target=options.model,
        output_dir=options.scratch,
        data=options.data,
        num_draft_layers=options.num_draft_layers,
        block_size=block_size,
        num_taps=options.num_taps,
        sliding_window=length + block_size,  # sees the whole row
        partial_rotary_factor=1.0,
        attention_value_scale=1.0,
        attention_sink_bias=False,
        max_length=length,
        per_device_train_batch_size=share,
        num_anchors=options.anchors // share,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        optimizer=optimizer,  # type: ignore[arg-type]
        schedule="constant",
        warmup_ratio=0.0,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
        bf16=options.device == "cuda",
        use_cpu=options.device == "cpu",
    )


def compare(name: str, layout: str, block_size: int, parts: dict[str, Batch], options: argparse.Namespace) -> dict:
    """One arm from start to finish; an exception becomes part of the result."""
    result: dict[str, Any] = {}
    began = time.perf_counter()
    torch.compiler.reset()  # shapes of an earlier arm would make this one compile for symbolic sizes
    torch.manual_seed(0)
    try:
        config = distill_config(options, block_size, layout, "muon" if name == "ours_muon" else "adamw")
        rows = first_rows(parts[layout], config.max_steps * config.per_device_train_batch_size)
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        target = load_model(config.target, dtype=dtype, device=options.device).eval().requires_grad_(False)
        task = Task(target, rows, start_drafter(config, target, options.mask_token_id), config)
        makers = {"ours": Ours, "specforge": SpecForge, "speculators": Speculators}
        arm = Speculators(task, eager=True) if name == "speculators_eager" else makers[name.partition("_")[0]](task)
        result |= arm.facts | {"rows": config.per_device_train_batch_size, "anchors_a_row": config.num_anchors}
        result |= train(arm, task, options.warm_up)
        weights = {n: w.detach().to("cpu", torch.float32, copy=True) for n, w in arm.weights().items()}
        del arm, task
        config = distill_config(options, block_size, "packed", "adamw")
        drafter = start_drafter(config, target, options.mask_token_id)
        result["held_out"] = judge(target, drafter, weights, parts["held_out"], config)
    except Exception:
        result["error"] = traceback.format_exc(limit=-4)
    result["total_seconds"] = time.perf_counter() - began  # with loading, compilation and judging
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="BF16 MiMo-V2 folder of the target")
    parser.add_argument("--data", required=True, help="file of mimo-qat pack")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--specforge", help="folder that holds the package specforge; default: the installed one")
    parser.add_argument("--speculators", help="folder that holds the package speculators; default: the installed one")
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--block_sizes", nargs="*", type=int, default=[8, 16])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm_up", type=int, default=4, help="steps that timing and peak memory leave out")
    parser.add_argument("--batch", type=int, default=4, help="packed rows a step")
    parser.add_argument("--single_batch", type=int, default=16, help="rows of one document a step")
    parser.add_argument("--single_length", type=int, default=512, help="tokens of a row of one document")
    parser.add_argument("--anchors", type=int, default=2048, help="blocks a step, shared evenly by its rows")
    parser.add_argument("--num_draft_layers", type=int, default=2)
    parser.add_argument("--num_taps", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--compile", action="store_true", help="compile the layers of our drafter too")
    parser.add_argument("--cuda_graphs", action="store_true", help="replay the target's forward of our arms as a graph")
    parser.add_argument("--eval_rows", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.steps <= options.warm_up or (options.steps - options.warm_up) % STRETCH:
        parser.error(
            f"--steps {options.steps}: {STRETCH} steps are timed together; add a multiple of that to --warm_up"
        )
    return options


def first_rows(rows: Batch, count: int) -> Batch:
    """`count` rows, from the first on and around."""
    chosen = torch.arange(count) % len(rows["input_ids"])
    return {k: v[chosen] for k, v in rows.items()}


def main() -> None:
    options = parse()
    sys.path[:0] = [folder for folder in (options.specforge, options.speculators) if folder]
    packed, held_out = data.load_packed(options.data)
    options.length = packed["input_ids"].shape[1]
    config = json.loads((Path(options.model) / "config.json").read_text())
    used = set(torch.cat([packed["input_ids"], held_out["input_ids"]]).unique().tolist())
    options.mask_token_id = max(set(range(config["vocab_size"])) - used)
    parts = {"packed": packed, "single": single_documents(packed, options.single_length)}
    parts["held_out"] = first_rows(held_out, min(options.eval_rows, len(held_out["input_ids"])))
    results: dict[str, Any] = {
        "command": command_line(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "runs": {},
    }
    results["options"] = dict(vars(options))
    with tempfile.TemporaryDirectory() as options.scratch:
        for block_size, layout, name in product(options.block_sizes, options.layouts, options.arms):
            results["runs"][f"b{block_size}/{layout}/{name}"] = compare(name, layout, block_size, parts, options)
            if options.out:
                write_json(options.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
