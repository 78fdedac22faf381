"""The drafter that a run starts with: random weights fit to a target, or the weights of an earlier drafter."""

from pathlib import Path
from typing import Any

import torch

from mimo_qat.checkpoint.geometry import Geometry, default_target_layer_ids
from mimo_qat.distill.config import DistillConfig
from mimo_qat.models.dflash_files import load_drafter
from mimo_qat.models.modeling_dflash import DFlashConfig, DFlashDraftModel

HEAD_KEYS = ("conv_kernel_size", "selector_rank", "selector_top_k")
# Parameters that a drafter without the head does not have.
HEAD_PARTS = ("attention_conv.", "mlp_conv.", "candidate_selector.")


def tapped_layers(config: DistillConfig, t: Any) -> list[int]:
    """The target layers to read: those named, else `num_taps` of them spread as the published drafters do."""
    layers = t.num_hidden_layers
    if config.target_layer_ids:
        return list(config.target_layer_ids)
    if not 1 <= config.num_taps <= layers:
        raise ValueError(f"num_taps is {config.num_taps}, the target has {layers} layers; take 1 to {layers}")
    return default_target_layer_ids(Geometry.from_config(t.to_dict()), config.num_taps)


def draft_config(config: DistillConfig, t: Any, mask_token_id: int) -> DFlashConfig:
    """The configuration of a new drafter for a target with configuration `t`."""
    return DFlashConfig(
        vocab_size=t.vocab_size,
        hidden_size=t.hidden_size,
        intermediate_size=config.intermediate_size or t.intermediate_size,
        num_hidden_layers=config.num_draft_layers,
        num_attention_heads=config.num_attention_heads or t.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or t.num_key_value_heads,
        head_dim=config.head_dim or getattr(t, "v_head_dim", None) or t.head_dim,
        num_target_layers=t.num_hidden_layers,
        target_layer_ids=tapped_layers(config, t),
        block_size=config.block_size,
        mask_token_id=mask_token_id,
        is_causal=False,
        use_sliding_window=True,
        sliding_window=config.sliding_window,
        attention_value_scale=config.attention_value_scale,
        attention_sink_bias=config.attention_sink_bias,
        conv_kernel_size=config.conv_kernel_size,
        selector_rank=config.selector_rank,
        selector_top_k=config.selector_top_k,
        partial_rotary_factor=config.partial_rotary_factor,
        rope_theta=config.rope_theta,
        max_position_embeddings=t.max_position_embeddings,
        rms_norm_eps=t.rms_norm_eps,
        bos_token_id=t.bos_token_id,
        eos_token_id=t.eos_token_id,
    )


def new_drafter(config: DistillConfig, target: Any, mask_token_id: int) -> DFlashDraftModel:
    """A drafter for `target`: random weights, except the final norm.

    That is the target's, which its frozen head was trained with, scaled so that the logits of a random direction have
    unit variance: an untrained drafter is then unsure (loss about log V) and not wrong with confidence. The mask
    vector starts at the size of an embedding row.
    """
    t = target.config
    draft = draft_config(config, t, mask_token_id)
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


def warm_start(folder: str | Path, config: DistillConfig, target: Any) -> tuple[DFlashDraftModel, dict[str, int]]:
    """The drafter of `folder` for further training with this target, in float32, and counts of what became of it.

    Its geometry and every tensor are kept. The block size is `config`'s (no tensor depends on it), the vocabulary the
    target's (codebooks get new rows, as one published configuration states fewer than its target has), and the parts
    of the DFlash2 head that `config` asks for and the folder lacks are added as the identity. The mask vector is
    trained further. ValueError where the drafter is another target's or its head has another shape.
    """
    source, t = load_drafter(folder, torch.float32), target.config
    old = source.config
    for what, have, want in (
        ("hidden_size", old.hidden_size, t.hidden_size),
        ("num_target_layers", old.num_target_layers or t.num_hidden_layers, t.num_hidden_layers),
    ):
        if have != want:
            raise ValueError(f"{folder}: {what} is {have}, the target's {want}; take a drafter of this target")
    if not all(0 <= i < t.num_hidden_layers for i in old.target_layer_ids or ()):
        raise ValueError(f"{folder}: target_layer_ids {old.target_layer_ids} leave the target's layers; correct them")
    values = {k: v for k, v in old.published().items() if k not in ("architectures", "auto_map", "torch_dtype")}
    values |= {"vocab_size": t.vocab_size, "num_target_layers": t.num_hidden_layers, "block_size": config.block_size}
    nested = values["dflash_config"]
    values["dflash_config"] = {k: v for k, v in nested.items() if k not in ("block_size", *HEAD_KEYS)}
    for key in HEAD_KEYS:
        wanted, held = getattr(config, key), getattr(old, key)
        part = "selector_rank" if key == "selector_top_k" else key
        if held and getattr(config, part) and wanted != held:
            raise ValueError(f"{key} is {wanted}, {folder} was trained with {held}; keep it")
        values[key] = held or wanted
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        drafter = DFlashDraftModel(DFlashConfig(**values)).float()
    return drafter, _fill(drafter, source, folder)


@torch.no_grad()
def _fill(drafter: DFlashDraftModel, source: DFlashDraftModel, folder: str | Path) -> dict[str, int]:
    """Copies every parameter of `source`; what it does not hold must be part of the new head."""
    wanted, extended = dict(drafter.named_parameters()), 0
    for name, value in source.named_parameters():
        rows: torch.Tensor = wanted.pop(name)
        if name.endswith("_codebook") and rows.shape[0] > value.shape[0]:
            rows, extended = rows[: value.shape[0]], extended + 1
        if rows.shape != value.shape:
            raise ValueError(f"{folder}: {name} is {tuple(value.shape)}, needed is {tuple(rows.shape)}; train it anew")
        rows.copy_(value)
    assert all(any(part in name for part in HEAD_PARTS) for name in wanted), f"left out: {sorted(wanted)}"
    return {"copied": len(dict(source.named_parameters())), "extended": extended, "added": len(wanted)}


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
