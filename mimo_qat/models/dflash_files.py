"""A drafter's folder: written in the published form, read strictly. The model itself travels as remote code."""

import shutil
from pathlib import Path
from typing import Any

import torch

from mimo_qat.checkpoint.reader import read_drafter
from mimo_qat.checkpoint.writer import write_drafter
from mimo_qat.models import modeling_dflash
from mimo_qat.models.modeling_dflash import DFlashConfig, DFlashDraftModel
from mimo_qat.provenance import atomic_write


def save_drafter(model: DFlashDraftModel, folder: str | Path) -> Path:
    """Writes BF16 tensors, index, mask embedding, config.json and remote code `dflash.py`, each whole or not at all."""
    folder = Path(folder)
    state = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
    row = state.pop("mask_embedding")
    write_drafter(folder, model.config.published(), state, row)
    with atomic_write(folder / "dflash.py") as path:
        shutil.copyfile(modeling_dflash.__file__, path)
    return folder


def load_drafter(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", **changes: Any
) -> DFlashDraftModel:
    """The drafter of a drafter folder or of a release, in evaluation mode.

    Every tensor fills one parameter and every parameter is filled, or ValueError names the odd one. `changes` replace
    configuration entries, for example `attn_implementation="eager"`.
    """
    values, state, row = read_drafter(folder)
    values = {k: v for k, v in values.items() if k not in ("torch_dtype", "dtype", "architectures", "auto_map")}
    with torch.device("meta"):
        model = DFlashDraftModel(DFlashConfig(**values | changes))
    state = {**state, "mask_embedding": row}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(wanted.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else None
        if found != wanted.get(name):
            raise ValueError(
                f"{folder}: {name} is {found}, its config.json asks for {wanted.get(name)}; export it again"
            )
    model.load_state_dict({n: t.to(device, dtype) for n, t in state.items()}, assign=True)
    return model.eval()
