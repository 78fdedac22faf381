"""Opens any fused-experts model for training, MiMo-V2 or a Mixture of Experts of transformers, and saves it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimo_qat.data import load_tokenizer
from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
from mimo_qat.provenance import put_in_place

# What some families do to the logits after the head; a loss that computes them from hidden states would miss it.
LOGIT_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")

NEED_MASKS = ("gpt_oss", "afmoe")  # transformers 5.17 to 5.23 give their mask builders no position_ids


def load_for_training(folder: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """(causal language model in evaluation mode, tokenizer) of a checkpoint folder; nothing in it is executed.

    MiMo-V2 folders may be stored in any format that the project reads, others must be plain floats. ValueError where a
    tensor is missing, unknown or misshapen, where logits are not a plain product with the head, and where documents of
    a packed row reach each other.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder)
    stored = json.loads((folder / "config.json").read_text())
    if str(stored.get("model_type", "")).startswith("mimo_v2"):
        from mimo_qat.checkpoint.reader import load_model

        return load_model(folder, dtype=dtype, device=device), tokenizer
    if stored.get("quantization_config"):
        method = stored["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{folder} is quantized ({method}); train from its BF16 form, e.g. dequantize and save it first"
        )
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            first = sorted(map(str, info[kind]))[0]
            raise ValueError(
                f"{folder}: {len(info[kind])} {kind.replace('_', ' ')}, the first {first}; "
                "the files and config.json belong to different models, fetch the folder again"
            )
    model = model.to(device).eval()
    prove_documents_are_separate(model)
    return model, tokenizer


def body_and_head(model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """(the decoder, whose call gives `last_hidden_state` [B, S, H]; the head's weight [V, H]) of a causal LM.

    ValueError where logits are anything but `last_hidden_state @ weight.T`.
    """
    what = type(model).__name__
    body, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
        raise ValueError(f"{what} has no `model` with an `lm_head` beside it; give a text-only causal language model")
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or getattr(head, "bias", None) is not None:
        raise ValueError(f"{what}.lm_head is not a linear layer without a bias, which the KL objective needs")
    for key in LOGIT_KEYS:
        if getattr(getattr(model, "config", None), key, None) not in (None, 1, 1.0):
            raise ValueError(
                f"{what} changes its logits by {key}, which the KL objective does not; it cannot be trained"
            )
    return body, weight


def final_hidden(
    model: nn.Module,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
    decoder: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Hidden states after the last norm [B, S, H] of packed rows; `position_ids` [B, S] restart at every document.

    `decoder` is called in the place of the model's own, which it wraps: DeepSpeed's engine.
    Most families make a mask from such positions. Those in `NEED_MASKS` leave them out of their masks, so that every
    document would see all before it; they get masks made here.
    """
    body, _ = body_and_head(model)
    config: Any = body.config
    if config.model_type in NEED_MASKS:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        like = torch.empty((*position_ids.shape, 1), dtype=body.dtype, device=position_ids.device)  # type: ignore
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        kwargs["attention_mask"] = {
            kind: makers[kind](
                config=config, inputs_embeds=like, attention_mask=None, past_key_values=None, position_ids=position_ids
            )
            for kind in sorted(set(config.layer_types))
        }
    return (decoder or body)(input_ids, position_ids=position_ids, use_cache=False, **kwargs).last_hidden_state


def prove_documents_are_separate(model: nn.Module) -> None:
    """ValueError where a document of a packed row reaches another; one pass of six tokens, forward and backward.

    A gradient that is exactly zero proves it whatever the precision. Recurrent layers carry a state over the border,
    and attention does where a family forgets the positions in its mask.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedded = embedding.weight.detach()[:6][None].clone().requires_grad_(True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=embedded.device)
    out = final_hidden(model, None, positions, inputs_embeds=embedded)
    (grad,) = torch.autograd.grad(out[:, 3:].float().square().sum(), embedded)
    if grad[:, :3].any():
        raise ValueError(
            f"{type(model).__name__}: documents of a packed row see each other; this family cannot be trained on "
            "packed rows with this version of transformers"
        )


def save_trained(model: Any, tokenizer: Any, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the model with its tokenizer; a new folder appears whole or not at all, in an old one each file does.

    Experts go back to one tensor an expert projection where the family has them so on the hub. `state` is the state
    dict to write where the model's own is sharded.
    """
    from mimo_qat.models.upcycle import save_bf16

    if isinstance(model.config, MiMoV2Config):
        return save_bf16(model, tokenizer, folder, state)
    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work, max_shard_size="5GB", state_dict=state)
    tokenizer.save_pretrained(work)
    return put_in_place(work, folder)
