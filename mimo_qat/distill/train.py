"""mimo-qat distill --config recipes/distill/demo.yaml --target TARGET --data answers.jsonl --output_dir OUT

Trains a DFlash drafter against a frozen target. Several GPUs: accelerate launch -m mimo_qat.distill.train --config ...
Laptop size: --num_draft_layers 1 --num_anchors 32 --max_length 256 --max_steps 50.

Batches and anchors are functions of (seed, step) and of nothing else, so a killed run that resumes ends with the
same bytes, and the loss does not depend on how the global batch is split over micro-batches and processes.
"""

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mimo_qat.checkpoint.geometry import Geometry, default_target_layer_ids
from mimo_qat.checkpoint.reader import load_model
from mimo_qat.data import load_tokenizer, pack, read_rows, split_rows, tokenize_rows
from mimo_qat.distill.answers import end_token_ids, prompt_ids, questions
from mimo_qat.distill.blocks import Blocks, attention_masks, make_blocks
from mimo_qat.distill.evaluate import evaluate
from mimo_qat.distill.objective import Sums, head_loss, metrics
from mimo_qat.distill.optim import MasterOptimizer, learning_rate_factor
from mimo_qat.distill.taps import Taps
from mimo_qat.models.dflash_files import load_drafter, save_drafter
from mimo_qat.models.modeling_dflash import DFlashConfig, DFlashDraftModel
from mimo_qat.provenance import JsonlLog, atomic_write, write_provenance

Batch = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class DistillConfig:
    """Fields of `mimo-qat distill`; names follow transformers' TrainingArguments where it has them."""

    target: str
    """checkpoint folder of the frozen target"""
    output_dir: str
    """receives metrics.jsonl, checkpoint.pt, provenance.json and the drafter as dflash/"""
    data: str
    """rows the target answered itself (`mimo-qat answer`): a .jsonl file or a dataset on the hub"""
    eval_data: str | None = None
    """held-out rows; None holds out `eval_fraction` of `data` by a hash of the prompt"""
    eval_fraction: float = 0.05
    """share of `data` held out when `eval_data` is None"""
    init_drafter: str | None = None
    """drafter folder to start from instead of random weights; its geometry replaces the fields below"""

    num_draft_layers: int = 5
    """decoder layers of the drafter; 1 or 2 are enough for a small target"""
    block_size: int = 8
    """anchor and drafts of one pass; the acceptance length cannot exceed it"""
    num_taps: int = 5
    """target layers to read, spread from the first to the last; `target_layer_ids` names them instead"""
    target_layer_ids: list[int] | None = None
    """0-based target layers whose output the drafter reads"""
    intermediate_size: int | None = None
    """of the drafter's MLPs; None takes the target's dense one"""
    num_attention_heads: int | None = None
    """None takes the target's"""
    num_key_value_heads: int | None = None
    """None takes the target's"""
    head_dim: int | None = None
    """None takes the target's v_head_dim"""
    sliding_window: int = 1024
    """keys a drafter query sees, itself included"""
    rope_theta: float = 10000.0
    """base of the drafter's rotary embedding"""
    partial_rotary_factor: float = 0.5
    """share of each head that rotates"""
    attention_value_scale: float = 0.612
    """factor of the drafter's values, the published one in every size"""
    attention_sink_bias: bool = True
    """one learned sink logit a head"""
    mask_token_id: int | None = None
    """an id that no text holds; None looks for one in the tokenizer"""

    max_length: int = 2048
    """tokens of a packed row"""
    per_device_train_batch_size: int = 1
    """rows a process and micro-batch"""
    gradient_accumulation_steps: int = 1
    """micro-batches a step"""
    num_anchors: int = 512
    """blocks a row, drawn anew at every step"""
    max_steps: int = 1000
    """optimizer steps"""
    learning_rate: float = 6e-4
    """peak learning rate, of Muon and AdamW alike"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the matrices and leaves norms, sinks and the mask vector to AdamW"""
    weight_decay: float = 0.0
    """decoupled, on every parameter"""
    adam_beta1: float = 0.9
    """first moment of AdamW"""
    adam_beta2: float = 0.95
    """second moment of AdamW"""
    max_grad_norm: float = 1.0
    """gradient norm limit"""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, then linear decay over the last `decay_ratio`"""
    warmup_ratio: float = 0.04
    """share of steps with a rising rate"""
    decay_ratio: float = 0.24
    """share of steps with a falling rate (wsd)"""
    min_lr_ratio: float = 0.0
    """last rate relative to the peak"""
    loss: Literal["ce", "dpace"] = "ce"
    """ce: cross-entropy with a decaying weight a slot; dpace: weights from the drafter's confidence"""
    loss_decay_gamma: float | None = None
    """decay constant of ce; None takes 4 for blocks of 8, 5 for 10, 7 for 16"""
    loss_chunk_blocks: int = 128
    """blocks whose logits exist at a time"""
    cache_taps: bool = False
    """keep the taps of every row in memory after its first use: rows x max_length x taps x hidden x 2 bytes"""
    bf16: bool = True
    """compute in bfloat16 with float32 masters; else all float32"""
    use_cpu: bool = False
    """train on the CPU even where there is a GPU"""

    logging_steps: int = 10
    """steps between lines of metrics.jsonl"""
    eval_steps: int = 0
    """steps between teacher-forced evaluations on held-out rows; 0 evaluates at the end only"""
    save_steps: int = 200
    """steps between checkpoints; 0 writes none"""
    resume_from_checkpoint: bool = True
    """continue from output_dir/checkpoint.pt if it is there"""
    eval_prompts: int = 32
    """held-out prompts to decode at the end; 0 skips decoding"""
    eval_max_new_tokens: int = 128
    """tokens a prompt of that decoding"""
    seed: int = 0
    """of initialisation, batches and anchors"""
    report_to: str = "none"
    """none, or a tracker that accelerate knows: tensorboard, wandb, trackio"""


# What may change between a killed run and its continuation without changing the weights.
FREE_ON_RESUME = frozenset(
    "target output_dir data logging_steps eval_steps save_steps resume_from_checkpoint eval_prompts "
    "eval_max_new_tokens report_to cache_taps loss_chunk_blocks".split()
)


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def tapped_layers(config: DistillConfig, target: Any) -> list[int]:
    """The target layers to read: those named, else `num_taps` of them spread as the published drafters do."""
    layers = target.config.num_hidden_layers
    if config.target_layer_ids:
        return list(config.target_layer_ids)
    if not 1 <= config.num_taps <= layers:
        raise ValueError(f"num_taps is {config.num_taps}, the target has {layers} layers; take 1 to {layers}")
    return default_target_layer_ids(Geometry.from_config(target.config.to_dict()), config.num_taps)


def new_drafter(config: DistillConfig, target: Any, mask_token_id: int) -> DFlashDraftModel:
    """A drafter for `target`: random weights, except the final norm.

    That is the target's, which its frozen head was trained with, scaled so that the logits of a random direction have
    unit variance: an untrained drafter is then unsure (loss about log V) and not wrong with confidence. The mask
    vector starts at the size of an embedding row.
    """
    t = target.config
    draft = DFlashConfig(
        vocab_size=t.vocab_size,
        hidden_size=t.hidden_size,
        intermediate_size=config.intermediate_size or t.intermediate_size,
        num_hidden_layers=config.num_draft_layers,
        num_attention_heads=config.num_attention_heads or t.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or t.num_key_value_heads,
        head_dim=config.head_dim or getattr(t, "v_head_dim", None) or t.head_dim,
        num_target_layers=t.num_hidden_layers,
        target_layer_ids=tapped_layers(config, target),
        block_size=config.block_size,
        mask_token_id=mask_token_id,
        is_causal=False,
        use_sliding_window=True,
        sliding_window=config.sliding_window,
        attention_value_scale=config.attention_value_scale,
        attention_sink_bias=config.attention_sink_bias,
        partial_rotary_factor=config.partial_rotary_factor,
        rope_theta=config.rope_theta,
        max_position_embeddings=t.max_position_embeddings,
        rms_norm_eps=t.rms_norm_eps,
        bos_token_id=t.bos_token_id,
        eos_token_id=t.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        drafter = DFlashDraftModel(draft).float()
        norm, head = target.model.norm.weight.float(), target.get_output_embeddings().weight
        embedding_rms = torch.linalg.vector_norm(target.get_input_embeddings().weight, dtype=torch.float32)
        embedding_rms /= (t.vocab_size * t.hidden_size) ** 0.5
        logit_std = (norm * torch.linalg.vector_norm(head, dim=0, dtype=torch.float32)).norm() / t.vocab_size**0.5
        with torch.no_grad():
            drafter.norm.weight.copy_(norm / logit_std)
            drafter.mask_embedding.copy_(torch.randn(t.hidden_size) * embedding_rms.cpu())
    return drafter


def draft_rows(drafter: Any, embed: Any, input_ids: torch.Tensor, blocks: Blocks, taps: torch.Tensor) -> torch.Tensor:
    """Hidden rows [B, N, b-1, D] of slots 1..b-1 of every block, ready for the target's head.

    taps [B, S, T*D] are the whole row's: the mask, and nothing else, keeps a block from its own future.
    """
    size = drafter.config.block_size
    masks = attention_masks(blocks, size, drafter.rules())
    x = drafter.block_rows(embed(input_ids.gather(1, blocks.anchors)))
    hidden = drafter.run_layers(x, drafter.fuse(taps), blocks.position_ids, masks)
    return hidden.unflatten(1, (-1, size))[:, :, 1:]


def on_cpu(config: DistillConfig) -> bool:
    """Said to accelerate outright: it ignores the ranks of a CPU launch otherwise."""
    return config.use_cpu or not torch.accelerator.is_available()


class Distiller:
    """The training loop's state: target, drafter, optimizer, packed rows [R, S], counters."""

    def __init__(self, config: DistillConfig, target: Any, drafter: DFlashDraftModel, rows: Batch, held_out: Batch):
        trackers = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(cpu=on_cpu(config), log_with=trackers, project_dir=config.output_dir)
        self.config, self.rows, self.held_out = config, rows, held_out
        self.device = self.accelerator.device
        self.target = target.to(self.device).eval().requires_grad_(False)
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.drafter = drafter.to(self.device)
        self.optimizer = MasterOptimizer(
            self.drafter, config.optimizer, (config.adam_beta1, config.adam_beta2), config.weight_decay
        )
        self.drafter.to(self.dtype)
        self.step = 0
        self.window = torch.zeros(2 + 2 * config.block_size, dtype=torch.float64)  # sums since the last log line
        self.tap_cache: dict[int, torch.Tensor] = {}
        self.checkpoint_path = Path(config.output_dir) / "checkpoint.pt"

    def batch(self, micro: int) -> tuple[list[int], Batch]:
        """Rows of one micro-batch of this step: slices of an endless stream of shuffled epochs."""
        size, world = self.config.per_device_train_batch_size, self.accelerator.num_processes
        per_step = size * world * self.config.gradient_accumulation_steps
        start = self.step * per_step + (micro * world + self.accelerator.process_index) * size
        count = self.rows["input_ids"].shape[0]
        chosen = []
        for i in range(start, start + size):
            epoch, place = divmod(i, count)
            chosen.append(int(torch.randperm(count, generator=stream(self.config.seed, "epoch", epoch))[place]))
        return chosen, {name: values[chosen] for name, values in self.rows.items()}

    @torch.no_grad()
    def taps(self, batch: Batch) -> torch.Tensor:
        """The target's taps of a batch [B, S, T*D]."""
        with Taps(self.target, self.drafter.config.target_layer_ids) as taps:
            self.target.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            return taps.take().to(self.dtype)

    def training_taps(self, chosen: list[int], batch: Batch) -> torch.Tensor:
        """As `taps`, from memory where `cache_taps` asks for it; row by row, so that the bits do not depend on
        which rows met in a batch before."""
        if not self.config.cache_taps:
            return self.taps(batch)
        for at, row in enumerate(chosen):
            if row not in self.tap_cache:
                self.tap_cache[row] = self.taps({n: v[at : at + 1] for n, v in batch.items()})
        return torch.cat([self.tap_cache[row] for row in chosen])

    def forward(self, batch: Batch, blocks: Blocks, taps: torch.Tensor) -> Sums:
        hidden = draft_rows(self.drafter, self.target.get_input_embeddings(), batch["input_ids"], blocks, taps)
        return head_loss(
            hidden,
            self.target.get_output_embeddings().weight,
            blocks.labels,
            blocks.supervised,
            loss=self.config.loss,
            gamma=self.config.loss_decay_gamma,
            chunk_blocks=self.config.loss_chunk_blocks,
        )

    def train_step(self) -> dict[str, float]:
        """One optimizer step; denominators are summed over micro-batches and processes before they divide."""
        c, world = self.config, self.accelerator.num_processes
        self.drafter.train()
        total = torch.zeros_like(self.window)
        for micro in range(c.gradient_accumulation_steps):
            chosen, batch = self.batch(micro)
            number = micro * world + self.accelerator.process_index
            blocks = make_blocks(batch, c.block_size, c.num_anchors, stream(c.seed, "anchors", self.step, number))
            batch = {name: values.to(self.device) for name, values in batch.items()}
            sums = self.forward(batch, blocks.to(self.device), self.training_taps(chosen, batch))
            sums.loss.backward()
            self.optimizer.accumulate()
            total += sums.vector().cpu()
        if world > 1:
            total = self.accelerator.reduce(total.to(self.device)).cpu()
            for gradient in self.optimizer.gradients():
                torch.distributed.all_reduce(gradient)
        factor = learning_rate_factor(c.schedule, self.step, c.max_steps, c.warmup_ratio, c.decay_ratio, c.min_lr_ratio)
        rate = c.learning_rate * factor
        norm = self.optimizer.step(rate, total[1].item(), c.max_grad_norm)
        self.step += 1
        self.window += total
        return {"learning_rate": rate, "grad_norm": norm}

    @torch.no_grad()
    def teacher_forced(self) -> dict[str, Any]:
        """Loss and accuracy on the held-out rows, the same anchors every time."""
        self.drafter.eval()
        total = torch.zeros_like(self.window)
        size = self.config.per_device_train_batch_size
        for start in range(0, self.held_out["input_ids"].shape[0], size):
            batch = {name: values[start : start + size] for name, values in self.held_out.items()}
            anchors = stream(self.config.seed, "eval", start)
            blocks = make_blocks(batch, self.config.block_size, self.config.num_anchors, anchors)
            batch = {name: values.to(self.device) for name, values in batch.items()}
            total += self.forward(batch, blocks.to(self.device), self.taps(batch)).vector().cpu()
        return {f"eval_{name}": value for name, value in metrics(total).items()}

    def save(self) -> None:
        """Everything that a resumed run needs, in one file that is whole or absent."""
        if not self.accelerator.is_main_process:
            return
        state = {"step": self.step, "config": asdict(self.config), "window": self.window}
        with atomic_write(self.checkpoint_path) as path:
            torch.save({**state, "optimizer": self.optimizer.state_dict()}, path)

    def resume(self) -> None:
        state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        now = asdict(self.config)
        for name in sorted(now.keys() - FREE_ON_RESUME):
            if state["config"].get(name) != now[name]:
                raise ValueError(
                    f"{self.checkpoint_path} was made with {name} {state['config'].get(name)!r}, this run has "
                    f"{now[name]!r}; keep it, or choose another output_dir"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.window = state["step"], state["window"].cpu()

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
        while self.step < c.max_steps:
            started = time.perf_counter()
            values: dict[str, Any] = self.train_step()
            seconds = time.perf_counter() - started
            bar.update()
            due = self.step % c.logging_steps == 0 or self.step == c.max_steps
            if due:
                last = metrics(self.window) | values
                values, self.window = {**last, "seconds_per_step": round(seconds, 4)}, torch.zeros_like(self.window)
                bar.set_postfix(loss=f"{last['loss']:.3f}", prefix=f"{last['prefix_length']:.2f}")
            evaluation = self.step == c.max_steps or (c.eval_steps and self.step % c.eval_steps == 0)
            if evaluation and self.held_out["input_ids"].shape[0]:
                scores = self.teacher_forced()
                values, last, due = values | scores, last | scores, True
            if due and log is not None:
                log.write(step=self.step, **values)
                self.accelerator.log({k: v for k, v in values.items() if not isinstance(v, list)}, step=self.step)
            if c.save_steps and (self.step % c.save_steps == 0 or self.step == c.max_steps):
                self.save()
        bar.close()
        if not last and self.held_out["input_ids"].shape[0]:
            last = self.teacher_forced()  # the run was complete before
        self.accelerator.end_training()  # the other processes are done; the first one writes and decodes alone
        return last


def pick_mask_token(tokenizer: Any, vocab_size: int, used: set[int]) -> int:
    """An id for mask slots that no text holds: a token named mask, else a row beyond the tokenizer, else a special
    token that neither `used` nor the tokenizer's own roles contain. ValueError when there is none."""
    for name in ("<|MASK|>", "<|mask|>", "<mask>"):
        index = tokenizer.convert_tokens_to_ids(name)
        if index is not None and index != tokenizer.unk_token_id and index not in used:
            return index
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    free = sorted(special - roles - used)
    if not free:
        raise ValueError("the tokenizer has no unused special token for mask slots; give mask_token_id")
    return free[-1]


def load_data(config: DistillConfig, tokenizer: Any) -> tuple[Batch, Batch, list[list[int]], set[int]]:
    """(training rows, held-out rows, held-out prompts as token ids, every id that occurs)."""
    rows = read_rows(config.data)
    if config.eval_data is None:
        kept, held = split_rows(rows, config.eval_fraction, config.seed)
    else:
        kept, held = rows, read_rows(config.eval_data)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    packed = [pack(tokenize_rows(part, tokenizer, config.max_length), config.max_length, pad) for part in (kept, held)]
    if not packed[0]["loss_mask"].any():
        raise ValueError(
            f"{config.data} leaves no assistant token to train on after holding rows out; give more answers"
        )
    prompts = prompt_ids(tokenizer, questions([r for r in held if "messages" in r][: config.eval_prompts]))
    used = {int(i) for part in packed for i in part["input_ids"].unique()}
    return packed[0], packed[1], prompts, used


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
        save_drafter(run.drafter, Path(config.output_dir) / "dflash")
        write_provenance(config.output_dir, config)
        if prompts:
            document["decoding"] = evaluate(run.target, run.drafter, prompts, config.eval_max_new_tokens, eos_token_ids)
    return document


def main(config: DistillConfig) -> dict[str, Any]:
    """Trains a DFlash drafter on rows that the frozen target answered, and measures its acceptance length."""
    tokenizer = load_tokenizer(config.target)
    rows, held_out, prompts, used = load_data(config, tokenizer)
    device = Accelerator(cpu=on_cpu(config)).device
    target = load_model(config.target, torch.bfloat16 if config.bf16 else torch.float32, device)
    if config.init_drafter is not None:
        drafter = load_drafter(config.init_drafter, torch.float32)
    else:
        mask = config.mask_token_id
        mask = pick_mask_token(tokenizer, target.config.vocab_size, used) if mask is None else mask
        if mask in used or not 0 <= mask < target.config.vocab_size:
            raise ValueError(f"mask_token_id {mask} occurs in the data or is no token; choose an unused id")
        drafter = new_drafter(config, target, mask)
    return distill(config, target, drafter, rows, held_out, prompts, end_token_ids(target, tokenizer))


if __name__ == "__main__":
    from mimo_qat.commands import run_one

    raise SystemExit(run_one("mimo_qat.distill.train", DistillConfig, main))
