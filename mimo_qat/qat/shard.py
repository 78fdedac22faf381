"""Sharding a model with FSDP2, and taking it whole again."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mimo_qat.models.experts import experts_modules
from mimo_qat.models.load import body_and_head


def shard(model: Any, device: torch.device) -> None:
    """Shards the decoder along dimension 0 over all processes, with FSDP2; mark what is trained before.

    Units are the experts of a layer, a router that is trained in float32 (a unit has gradients of one type), the rest
    of the layer, and the rest of the decoder. Gradients are summed, not averaged, and in float32: the loss of a
    micro-batch is already divided by the tokens of the whole step. The head, which the loss needs whole in every
    micro-batch, stays whole.
    """
    body, _ = body_and_head(model)
    keep_head_whole(model, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    experts = list(experts_modules(body).values())
    routers = [m for m in body.modules() if m not in experts and _trains_float32(m)]
    for unit in (*experts, *routers, *body.layers, body):  # type: ignore[misc]
        # Everything is gathered anew in each pass, so that the teacher's weights are never met in a student's.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other; NCCL's scaled sum is not needed


def _trains_float32(module: torch.nn.Module) -> bool:
    return any(p.requires_grad and p.dtype == torch.float32 for p in module.parameters(recurse=False))


def keep_head_whole(model: Any, device: torch.device) -> None:
    """Moves the head to `device` and gives it a weight of its own, if it shares the embedding's."""
    _, head = body_and_head(model)
    if head is model.get_input_embeddings().weight:
        model.lm_head.weight = torch.nn.Parameter(head.detach().clone(), requires_grad=False)
    model.lm_head.to(device)


def gather(model: Any, engine: Any, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model, on the host of the processes that `keep` it; every process must call it.

    One tensor is whole on the device at a time.
    """
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    state = {}
    for name, tensor in model.state_dict().items():
        whole = engine.whole(name, tensor)
        if keep:
            state[name] = whole.to("cpu", copy=True)
    if tied and keep:  # the writers know shared weights by their memory
        embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        state["lm_head.weight"] = state[f"{embedding}.weight"]
    return state
