"""Sums of a few rows over the GPUs of one host, in one launch a rank: definition, channel, and the public functions.

Each rank holds a contribution x [T, H]. All get the same bits: contributions added in rank order in float32 and rounded
once. Every rank writes its contribution into a receive buffer of every rank, itself included, waits for the others'
and adds what has come to its own buffer. Payload and flag travel in one 8-byte word (a low-latency, "LL" protocol), so
that there is no barrier and no second trip; twice the bytes are the price, which for so few rows is less than a trip.

Where NCCL is as good, use NCCL: this is for at most 16 rows, inside CUDA graphs, between GPUs that map each other's
memory. Multicast is not used, because it adds in an order of its own.

    packet    16 bytes: four BF16 and their flag twice, each pair of BF16 in one word with a flag
    cell      128 packets; has an epoch, the number of sums that it was part of; its low bit chooses the half
    buffer    [2 halves][ranks as sources][capacity / 4 packets] on each rank
"""

from dataclasses import dataclass

import torch

MAX_TOKENS = 16
MAX_RANKS = 8
PACKET = 4  # BF16 elements
CELL = 128  # packets
WIDEST_NORM = 8192  # columns of a row that is summed and normed in one launch
CLOCK_HZ = 2.0e9  # of no Hopper GPU is the clock higher: a wait is at least as long as asked for


@torch.no_grad()
def reference(parts: torch.Tensor) -> torch.Tensor:
    """[T, H] of the contributions parts [R, T, H]: added in rank order in float32, rounded once to their dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


@torch.no_grad()
def reference_add_norm(
    parts: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + sum, its RMSNorm times weight), both [T, H]; every step rounds to the dtype, the norm is float32."""
    x = residual + reference(parts)
    return x, torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def capacity(hidden: int) -> int:
    """Elements that a channel for rows of `hidden` has room for: MAX_TOKENS rows, in whole cells."""
    return -(-MAX_TOKENS * hidden // (PACKET * CELL)) * PACKET * CELL


def buffer_words(ranks: int, elements: int) -> int:
    """int64 words of the receive buffer of each rank, for a capacity in elements."""
    return 2 * ranks * (elements // PACKET) * 2


@dataclass(frozen=True)
class Channel:
    """One rank's end. The ranks make the same calls in the same order, on one stream each.

    peers int64 [R]: where rank r's buffer is mapped in this process; it was zero on all ranks before the first call.
    epochs int32 [cells]: advanced by the kernels themselves, so that a CUDA graph can be replayed.
    failed int32 [1]: 0, or 1 + the rank whose contribution did not come within `seconds`. From then on nothing is sent
    and nothing is waited for, so that no rank computes on with a wrong sum: the channel is to be thrown away.
    failed_host int32 [1]: the same in pinned memory, for a host that does not want to wait for the device.
    """

    rank: int
    elements: int
    seconds: float
    peers: torch.Tensor
    epochs: torch.Tensor
    failed: torch.Tensor
    failed_host: torch.Tensor

    @property
    def ranks(self) -> int:
        return len(self.peers)


def open_channel(rank: int, addresses: list[int], elements: int, seconds: float, device: torch.device | str) -> Channel:
    """The channel of `rank` over buffers of buffer_words(len(addresses), elements) words. ValueError for a bad size."""
    if not 2 <= len(addresses) <= MAX_RANKS or not 0 <= rank < len(addresses):
        raise ValueError(f"rank {rank} of {len(addresses)}: give 2 to {MAX_RANKS} ranks, one buffer each")
    if elements < 1 or elements % (PACKET * CELL):
        raise ValueError(f"elements: {elements} is no multiple of {PACKET * CELL}; use capacity(hidden)")
    if seconds <= 0:
        raise ValueError(f"seconds: {seconds}; a wait has to end after more than 0")
    cells = elements // (PACKET * CELL)
    return Channel(
        rank,
        elements,
        seconds,
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.zeros(cells, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda"),
    )


def _check(channel: Channel, x: torch.Tensor, multiple: int) -> None:
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] % multiple or not x.is_contiguous():
        raise ValueError(
            f"x: {x.dtype} {list(x.shape)}, expected contiguous torch.bfloat16 [T, multiple of {multiple}]"
        )
    if not 1 <= len(x) <= MAX_TOKENS or x.numel() > channel.elements:
        raise ValueError(
            f"x: {list(x.shape)} where the channel takes 1 to {MAX_TOKENS} rows and {channel.elements} elements; "
            "use torch.distributed for more"
        )
    if not x.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(x.device)[0] < 9:
        raise ValueError(f"x: on {x.device}, expected a CUDA device of capability 9 or more; use torch.distributed")


@torch.no_grad()
def all_reduce(x: torch.Tensor, channel: Channel) -> torch.Tensor:
    """BF16 [T, H], the same bits on all ranks, of this rank's contribution x BF16 [T, H], T <= 16, H % 4 == 0.

    ValueError for other arguments. A rank that does not come is no error here: see `Channel.failed`.
    """
    _check(channel, x, PACKET)
    from . import allreduce_triton

    return allreduce_triton.all_reduce(x, channel)


@torch.no_grad()
def all_reduce_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, channel: Channel
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + sum, its RMSNorm times weight [H]), BF16 [T, H], H % 512 == 0 and at most 8192. See `all_reduce`.

    x may be float32 [P, T, H], the transpose of a contiguous [T, P, H]: it is added over P in order and rounded first.
    """
    if x.ndim == 3 and x.dtype == torch.float32 and x.transpose(0, 1).is_contiguous():
        _check(channel, residual, PACKET * CELL)
    else:
        _check(channel, x, PACKET * CELL)
    if residual.shape[1] > WIDEST_NORM:
        raise ValueError(
            f"x: rows of {residual.shape[1]} are too long for one launch; use all_reduce and a norm of its own"
        )
    for name, tensor, shape in (("residual", residual, x.shape[-2:]), ("weight", weight, x.shape[-1:])):
        if tensor.dtype != torch.bfloat16 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}, expected contiguous BF16 {list(shape)}")
    from . import allreduce_triton, cuda, norm_cuda

    own = cuda.usable(residual.device) and norm_cuda.fits(residual.shape[1])
    return (norm_cuda if own else allreduce_triton).all_reduce_add_norm(x, residual, weight, eps, channel)
