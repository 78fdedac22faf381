"""The engine over DeepSpeed ZeRO-2 and ZeRO-3: its FP32 partitions are the masters, its BF16 copies are snapped.

DeepSpeed owns sharding, reduction, clipping and the step. Its step ends with BF16 copies of the FP32 partitions; `snap`
then overwrites those that this process holds with Q(FP32), and under ZeRO-2, where every process has all of the copies,
gathers them once more. A partition is a piece of a flattened tensor, so blocks stay whole only if its borders fall
between them: `_refuse_cut_blocks`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.utils import safe_get_local_fp32_param, set_z3_leaf_modules
from torch import nn

from mimo_kernels import mxfp4
from mimo_qat.models.experts import experts_modules
from mimo_qat.qat.config import QatConfig
from mimo_qat.qat.snap import SnappedCopy, Span, adamw, exchange, sum_over_processes

MOMENTS = ("exp_avg", "exp_avg_sq")


def _refuse_cut_blocks(stage: int, experts: dict[str, nn.Parameter], world: int) -> None:
    """ValueError where a border between two processes would fall into a block of 32 weights."""
    sizes = {name: p.numel() for name, p in experts.items()} if stage == 3 else {}
    sizes = sizes or {"the experts together": sum(p.numel() for p in experts.values())}  # ZeRO-2 cuts one long row
    for name, size in sizes.items():
        if size % (mxfp4.BLOCK * world):
            raise ValueError(
                f"ZeRO-{stage} gives each of {world} processes {size}/{world} weights of {name}, which cuts MXFP4 "
                "blocks of 32; use the FSDP2 recipe, which shards whole rows, or a number of processes that divides"
            )


def _configure(accelerator: Accelerator, config: QatConfig) -> int:
    """Settles what correctness needs in the launch's DeepSpeed configuration; the ZeRO stage, 2 or 3."""
    plugin = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    zero = settings["zero_optimization"]
    if zero["stage"] not in (2, 3):
        raise ValueError(f"ZeRO stage {zero['stage']} is not supported; set zero_stage to 2 or 3, or launch with DDP")
    for what in ("offload_optimizer", "offload_param"):
        if (zero.get(what) or {}).get("device", "none") != "none":
            raise ValueError(f"{what} is not supported, masters are snapped on the GPU; set {what}_device to none")
    settings |= {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": True},
        # Sums over micro-batches and processes in float32, as in the other engines.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    settings.pop("train_batch_size", None)
    # A persistent parameter has a second copy, which neither the snap nor the teacher would reach.
    zero["stage3_param_persistence_threshold"] = 0
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    return zero["stage"]


def _protect_float32(body: nn.Module) -> None:
    """Turns frozen float32 parameters (routers) into buffers, which DeepSpeed neither rounds to BF16 nor partitions."""
    for module in body.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.dtype == torch.float32 and not param.requires_grad:
                delattr(module, name)
                module.register_buffer(name, param.data)


class ZeroEngine(SnappedCopy):
    """`SnappedCopy` for parameters that DeepSpeed partitions. `decoder` is DeepSpeed's engine around the decoder.

    `originals` are partitions under ZeRO-3 and whole under ZeRO-2. The teacher's and the student's forward passes
    alternate, so ZeRO-3's trace of the module order breaks in each backward pass, which then gathers without prefetch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        experts: dict[str, nn.Parameter],
        config: QatConfig,
        *,
        transposed: frozenset[str] = frozenset(),
        others: dict[str, nn.Parameter] | None = None,
    ):
        if transposed:
            raise ValueError(
                f"{min(transposed)} contracts along dimension 1, so DeepSpeed's flat partitions cut its blocks; "
                "use the FSDP2 recipe"
            )
        for name, param in (others or {}).items():
            if param.dtype != torch.bfloat16:
                raise ValueError(f"DeepSpeed would round {name} ({param.dtype}) to BF16; train it with DDP or FSDP2")
        self.rule = None if config.scale_rule == "none" else config.scale_rule
        self.experts, self.transposed = experts, transposed
        self.params = experts | (others or {})
        self.sharded, self._named = True, dict(model.named_parameters())
        self._world, self._rank = accelerator.num_processes, accelerator.process_index
        self._accumulate, self._backwards = config.gradient_accumulation_steps, 0
        self._numel = {name: p.numel() for name, p in self.params.items()}
        self.stage = _configure(accelerator, config)
        _refuse_cut_blocks(self.stage, experts, self._world)
        _protect_float32(model.model)
        blocks = {type(model.get_submodule(n.rpartition(".")[0])) for n in experts_modules(model)}
        if self.stage == 3:  # which experts a batch reaches differs between processes: gather a block as one
            set_z3_leaf_modules(model.model, list(blocks))
            # Of a module whose input has no gradient, ZeRO-3 releases the weights before its backward pass.
            model.enable_input_require_grads()
        groups = [list(experts.values()), list((others or {}).values())]
        weights = adamw([p for group in groups for p in group])
        weights.param_groups = [weights.param_groups[0] | {"params": group} for group in groups if group]
        self.decoder, wrapped = accelerator.prepare(model.model, weights)
        self._zero = wrapped.optimizer
        self.optimizer = self._zero.optimizer
        self.masters = {name: self._master(p) for name, p in self.params.items()}
        for moments in self.optimizer.state.values():  # ZeRO-3 makes them by a step of nothing
            moments["step"].zero_()
        self.originals = {name: self._content(p).clone() for name, p in self.params.items()}
        self._snapped = {name: self.shown(name).clone() for name in experts}
        self.snap()

    # ---- where DeepSpeed keeps things

    def _master(self, param: Any) -> torch.Tensor:
        if self.stage == 3:
            return safe_get_local_fp32_param(param)
        return param._hp_mapping.hp_fragment if param._hp_mapping else torch.empty(0, device=param.device)

    def _content(self, param: Any) -> torch.Tensor:
        """The BF16 memory that forward passes read: this process's partition, or all of the parameter."""
        return param.ds_tensor.data if self.stage == 3 else param.data

    def _begin(self, name: str) -> int:
        """Where in the flattened parameter the partition of this process begins."""
        if self.stage == 3:
            return self._rank * self.masters[name].numel()
        mapping = self.params[name]._hp_mapping  # type: ignore[attr-defined]
        return mapping.lp_fragment_address.start if mapping else 0

    def shown(self, name: str) -> torch.Tensor:
        content = self._content(self.params[name])
        if self.stage == 3:
            return content
        return content.view(-1)[self._begin(name) :][: self.masters[name].numel()]

    # ---- a step

    def backward(self, loss: torch.Tensor) -> None:
        self._backwards += 1
        last = self._backwards % self._accumulate == 0
        self.decoder.set_gradient_accumulation_boundary(last)
        self.decoder.backward(loss * self._world, scale_wrt_gas=False)  # DeepSpeed averages over the processes
        if not last:
            self.decoder.step()  # only counts

    def gradient_norm(self) -> tuple[float, str | None]:
        names = {id(p): name for name, p in self.params.items()}
        groups = self._zero.fp16_groups if self.stage == 3 else self._zero.params_in_partition
        gradients = {
            names[id(param)]: gradient
            for i, group in enumerate(groups)
            for param, gradient in zip(group, self._zero.averaged_gradients[i], strict=False)  # one may be padding
        }
        squares = torch.zeros((), device=self._zero.device)
        for gradient in gradients.values():
            squares += gradient.float().square().sum()
        norm = float(sum_over_processes(squares).sqrt())
        spread = {name: gradients.get(name, torch.zeros(1, device=squares.device)) for name in self.params}
        return norm, self._spoiled(spread, norm)

    def step(self, rate: float, max_norm: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.decoder.step()

    @torch.no_grad()
    def snap(self) -> int:
        if not self.rule:
            return 0  # DeepSpeed has rounded the masters to BF16
        held = [name for name in self.experts if self.masters[name].numel()]
        flips = mxfp4.snap_each_(
            {name: self._snapped[name] for name in held}, {name: self.masters[name].data for name in held}, self.rule
        )
        self._rewrite({name: self._snapped[name] for name in held})
        return self._over_all(flips)

    def _rewrite(self, values: dict[str, torch.Tensor]) -> None:
        """Writes this process's part of BF16 parameters, and makes it known to whoever reads them."""
        with self._no_gather():
            for name, value in values.items():
                self.shown(name).copy_(value)
        if self.stage == 3:
            return
        zero = self._zero
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    @contextmanager
    def _no_gather(self) -> Iterator[None]:
        """Inside the block partitions may be written: no gathered parameter is left, and none is being gathered.

        ZeRO-3 gathers on a stream of its own that does not wait for writers.
        """
        if self.stage == 3:
            self.decoder.empty_partition_cache()
            get_accelerator().synchronize()
        yield
        if self.stage == 3:
            get_accelerator().synchronize()

    # ---- the teacher and its distance

    def _swap(self) -> None:
        with self._no_gather():
            for name, param in self.params.items():
                exchange(self._content(param), self.originals[name])

    def changed_against_ptq(self) -> float:
        if not self.rule:
            return 0.0
        changed = 0
        for name, param in self.experts.items():
            rounded = mxfp4.snap(self.originals[name].view(-1), self.rule, name=name)
            changed += int((rounded != self._content(param).view(-1)).sum())
        return (self._over_all(changed) if self.stage == 3 else changed) / self.numel()

    def numel(self) -> int:
        return sum(self._numel[name] for name in self.experts)

    # ---- what a checkpoint holds

    def state(self) -> dict[str, Span]:
        flats = (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        by_memory = {flat.untyped_storage().data_ptr(): flat for flat in flats}
        spans: dict[str, Span] = {}
        for name, master in self.masters.items():
            begin = self._begin(name)
            size = max(0, min(master.numel(), self._numel[name] - begin))  # without the padding of the last process
            spans[f"master.{name}"] = master.detach()[:size], begin
            if not size:
                spans |= {f"{key}.{name}": (master.detach()[:0], begin) for key in MOMENTS}
                continue
            flat = by_memory[master.untyped_storage().data_ptr()]
            moments, offset = self.optimizer.state[flat], master.storage_offset() - flat.storage_offset()
            if not moments:
                moments["step"] = torch.zeros((), device=flat.device)
                moments |= {key: torch.zeros_like(flat) for key in MOMENTS}
            spans |= {f"{key}.{name}": (moments[key].view(-1)[offset:][:size], begin) for key in MOMENTS}
        return spans

    @torch.no_grad()
    def restored(self, step: int) -> None:
        for moments in self.optimizer.state.values():
            moments["step"].fill_(step)
        self._rewrite(self.masters)
        self.snap()

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        param = self._named.get(name)
        if param is None or not hasattr(param, "ds_id"):
            return tensor
        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()
