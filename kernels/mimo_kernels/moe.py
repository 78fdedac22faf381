"""Mixture of SwiGLU experts with MXFP4 weights and BF16 activations, for the 1 to 16 tokens of a decode step.

    y[t] = sum over experts e of c[t, e] * down_e(silu(gate_e(x[t])) * up_e(x[t]))
    c[t, e] = the sum of weights[t, j] with ids[t, j] == e; 0 where e is not routed

`reference` is the definition, in float32 or float64 from the codes and scale bytes of a checkpoint. `moe` is what a
runtime calls, on weights that `pack_experts` has rearranged once. On a GPU of compute capability 9 or more it runs
    up to 8 tokens   CUDA C++ (`moe_cuda`), where the GPU and the shapes are its own (`cuda.usable`, `moe_cuda.fits`)
    otherwise        Triton (`moe_triton`)
and the reference elsewhere. Kernels round the hidden activations to BF16 and sum in float32, experts in ascending id:
those of the token in CUDA, inside fixed ranges of ids in Triton. So the bits of a token depend on its own routing, on
the shapes and on which of the two runs (another is up to 8 tokens, and up to 16), not on its neighbours, on timing, or
on the run.

The packed layout. Whoever unpacks four-bit codes pays in integer instructions, and a GPU that streams weights at full
speed has about four a weight in all. Here three of four codes cost a shift and an AND for two weights.
    word   16 bits, the four codes at k = 4j .. 4j + 3. A code's BF16 bits are its sign at 15 and its other three bits
           at 8..6, which is code * 2**-126. Code 0 is stored so; codes 1 and 2 the same, 3 and 6 bits lower. Code 3
           fills the holes: sign at 14, exponent at 11..10, mantissa at 13. Mask 0x81C0 finds the first three.
    scale  one byte b + 126 for 32 weights, b the E8M0 byte. Shifted left by 7 it is the BF16 number 2**(b - 1), and
           code * 2**-126 * 2**(b - 1) = code * 2**(b - 127) without rounding. It needs b <= 128.
    page   16 rows x 128 weights: int16 [16, 32] words and uint8 [16, 4] scales. The pages of 16 rows follow each
           other, so whoever works on some rows reads memory in one direction: 0.53125 bytes a weight.
    rows   of gate and up are interleaved by eight, gates first: an MMA leaves rows r and r + 8 in the same thread.
    K and the rows are padded to multiples of 128 with zeros.
As word j holds four neighbours, step i of four multiplies codes i of 32 words by x[4j + i]. The kernels keep
activations in that order: position 32 i + j of 128 is element 4 j + i.

    Worked: codes 1, 9, 2, 15 (0.5, -0.5, 1, -6) make 0x0040 | 0x8040 >> 3 | 0x0080 >> 6 | 0x6C00 = 0x7C4A.

Why not Marlin, triton_kernels or tl.dot_scaled: those group rows by expert and pad them, which costs more than it
saves at 8 tokens, and the plain Triton forms need seven instructions a weight. Given up: more than 16 tokens, clamped
or biased SwiGLU, scale bytes above 128 (weights above 12).
"""

import threading
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad, silu

from . import mxfp4
from .router import Router

MAX_TOKENS = 16
MAX_SCALE_BYTE = 128
PAGE_ROWS, PAGE_K = 16, 128
_HALF = PAGE_ROWS // 2
_AT_ONCE = 16  # experts that torch's operations pack together, which bounds the memory in between
SCALE_BIAS = 126
_FIELDS = 0x81C0  # where BF16 keeps the sign and the three other bits of a code


@dataclass(frozen=True)
class Experts:
    """MXFP4 experts as a checkpoint has them: codes uint8, two a byte, and E8M0 scales uint8. Gate rows come first."""

    gate_up: torch.Tensor  # [E, 2I, H/2]
    gate_up_scales: torch.Tensor  # [E, 2I, H/32]
    down: torch.Tensor  # [E, H, I/2]
    down_scales: torch.Tensor  # [E, H, I/32]


@dataclass(frozen=True)
class PackedExperts:
    """The same weights in pages, H and I padded to Hp and Ip (multiples of 128). `hidden` = H, `inter` = I."""

    gate_up: torch.Tensor  # int16 [E, 2Ip/16, Hp/128, 16, 32]
    gate_up_scales: torch.Tensor  # uint8 [E, 2Ip/16, Hp/128, 16, 4]
    down: torch.Tensor  # int16 [E, Hp/16, Ip/128, 16, 32]
    down_scales: torch.Tensor  # uint8 [E, Hp/16, Ip/128, 16, 4]
    hidden: int
    inter: int

    @property
    def padded(self) -> tuple[int, int]:
        """(Hp, Ip)."""
        return self.gate_up.shape[2] * PAGE_K, self.down.shape[2] * PAGE_K

    @property
    def bytes_per_expert(self) -> int:
        tensors = (self.gate_up, self.gate_up_scales, self.down, self.down_scales)
        return sum(t[0].numel() * t.element_size() for t in tensors)


# ---- the definition


@torch.no_grad()
def reference(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Experts, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`dtype` [T, H] of x [T, H], ids [T, top_k] and float32 weights [T, top_k]; experts are added in ascending id.

    An id may repeat in a row: its weights add up. ValueError for an id outside [0, E).
    """
    _check_routing(x, ids, weights)
    used = ids.unique().tolist()
    if used and not 0 <= used[0] <= used[-1] < len(experts.down):
        raise ValueError(f"ids: {used[0]} to {used[-1]}, not 0 to {len(experts.down) - 1}; whose router made them?")
    x = x.to(dtype)
    y = torch.zeros_like(x)
    for e in used:
        gate_up = mxfp4.decode(experts.gate_up[e], experts.gate_up_scales[e], torch.float32, name="gate_up").to(dtype)
        down = mxfp4.decode(experts.down[e], experts.down_scales[e], torch.float32, name="down").to(dtype)
        routed = (ids == e).any(-1)
        gate, up = (x[routed] @ gate_up.T).chunk(2, -1)
        c = torch.where(ids == e, weights, 0.0)[routed].to(dtype).sum(-1, keepdim=True)
        y[routed] += c * ((silu(gate) * up) @ down.T)
    return y


@torch.no_grad()
def moe(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """BF16 [T, H] of x BF16 [T, H], T <= 16, ids int32 or int64 [T, top_k] and weights float32 [T, top_k].

    On a GPU nothing waits for the host, so there ids must lie in [0, E): that is not checked. ValueError for shapes,
    dtypes or more than 16 tokens.
    """
    _check_tokens(x, ids, weights, experts)
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9:
        from . import cuda, moe_cuda, moe_triton

        few = cuda.usable(x.device) and moe_cuda.fits(experts, *ids.shape)
        return (moe_cuda if few else moe_triton).moe(x, ids, weights, experts)
    used, local = ids.unique(return_inverse=True)
    return reference(x, local, weights, unpack_experts(experts, used)).to(torch.bfloat16)


@torch.no_grad()
def parts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """What `moe` adds up last, for whoever reads it anyway; arguments and errors as of `moe`.

    float32 [P, T, H] whose sum over P, in order and rounded to BF16 (`combine`), is `moe`'s result. Where no kernel
    leaves parts it is that result, BF16 [T, H]. x must be older than what `router.route` does, whose first launch is a
    border (`launch`), or come from torch.
    """
    from . import cuda, moe_cuda

    if cuda.usable(x.device) and ids.ndim == 2 and moe_cuda.fits(experts, *ids.shape):
        _check_tokens(x, ids, weights, experts)
        return moe_cuda.parts(x, ids, weights, experts)
    return moe(x, ids, weights, experts)


@torch.no_grad()
def routed(
    x: torch.Tensor, router: Router, experts: PackedExperts, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`parts`, weights float32 [T, k], ids int32 [T, k]) of what `router` chooses for x BF16 [T, H] at `positions`.

    Where CUDA's kernels take the shapes, the experts' chooses from logits: a launch less than `router.route` and then
    `parts`. Errors as of these two, and ValueError for a router of another number of experts.
    """
    from . import cuda, moe_cuda, router_cuda

    router.check(x, positions)
    if len(router.weight) != len(experts.down):
        raise ValueError(f"router: {len(router.weight)} experts, of which {len(experts.down)} are given; whose is it?")
    fits = router_cuda.fits(x.shape[1]) and moe_cuda.fits(experts, len(x), router.top_k)
    if not (fits and cuda.usable(x.device)):
        weights, ids = router.route(x, positions)
        return parts(x, ids, weights, experts), weights, ids
    _check_x(x, experts)
    # What the experts read early comes before the logits, which are the border.
    x, bias = x.contiguous(), router.bias.contiguous()
    at = None if bias.ndim == 1 or positions is None else positions.long().contiguous()
    logits = router_cuda.logits(x, router.weight)
    return moe_cuda.routed(x, logits, replace(router, bias=bias), at, experts)


def combine(update: torch.Tensor) -> torch.Tensor:
    """BF16 [T, H] of what `parts` gave."""
    if update.ndim == 2:
        return update
    from . import cuda, moe_cuda

    if cuda.usable(update.device) and update.transpose(0, 1).is_contiguous():
        return moe_cuda.combine(update)
    total = update[0]
    for part in update[1:]:
        total = total + part
    return total.to(torch.bfloat16)


# ---- the packed layout


Matrices = tuple[torch.Tensor, torch.Tensor]  # codes uint8 [n, R, K/2] and scale bytes uint8 [n, R, K/32]


class Packer:
    """Packed experts that are filled some at a time, in the order of the device's stream and without waiting for it.

    `packed` holds all `count` experts from the start, their memory not set. ValueError for sizes that are no multiples
    of 32.
    """

    def __init__(self, count: int, hidden: int, inter: int, device: torch.device | str):
        _check_sizes(hidden, inter)
        self.device = torch.device(device)
        hp, ip = (-(-size // PAGE_K) * PAGE_K for size in (hidden, inter))

        def pages(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            shape = count, rows // PAGE_ROWS, k // PAGE_K, PAGE_ROWS
            words = torch.empty(*shape, PAGE_K // 4, dtype=torch.int16, device=device)
            return words, torch.empty(*shape, PAGE_K // mxfp4.BLOCK, dtype=torch.uint8, device=device)

        self.packed = PackedExperts(*pages(2 * ip, hp), *pages(hp, ip), hidden=hidden, inter=inter)
        self._lock = threading.Lock()  # a GPU's kernel is atomic where it must be
        self._largest = torch.zeros(2, dtype=torch.int32, device=device)  # scale bytes of gate_up and of down

    @torch.no_grad()
    def put(self, first: int, gate: Matrices, up: Matrices, down: Matrices) -> None:
        """Packs n experts to the places from `first` on: gate and up [n, I, H] and of the same strides, down [n, H, I].

        Dimension 0 may have any stride, the others are contiguous. Threads may pack at once, on a GPU on any streams.
        """
        if self.device.type == "meta":
            return
        cuda = self.device.type == "cuda" and torch.version.hip is None
        if cuda and torch.cuda.get_device_capability(self.device)[0] >= 9:
            from . import moe_pack_triton

            moe_pack_triton.pack(self.packed, first, gate, up, down, self._largest)
            return
        with self._lock:
            self._put(first, gate, up, down)

    def _put(self, first: int, gate: Matrices, up: Matrices, down: Matrices) -> None:
        p = self.packed
        for i in range(0, len(down[0]), _AT_ONCE):
            some = slice(i, i + _AT_ONCE)
            codes, scales = (torch.cat([g[some], u[some]], 1) for g, u in zip(gate, up, strict=True))
            down_codes, down_scales = (t[some] for t in down)
            made = *_pack(_interleave(codes), _interleave(scales)), *_pack(down_codes, down_scales)
            places = slice(first + i, first + i + len(codes))
            for place, pages in zip((p.gate_up, p.gate_up_scales, p.down, p.down_scales), made, strict=True):
                place[places] = pages
            if scales.numel():
                largest = torch.stack([scales.max(), down_scales.max()]).int()
                torch.maximum(self._largest, largest, out=self._largest)

    def check(self) -> None:
        """Waits for the device. ValueError where a scale byte was above 128; then `packed` is of no use."""
        if self.device.type == "meta":
            return
        for name, byte in zip(("gate_up_scales", "down_scales"), self._largest.tolist(), strict=True):
            if byte > MAX_SCALE_BYTE:
                raise ValueError(
                    f"{name}: byte {byte}, above {MAX_SCALE_BYTE} (weights above 12); the packed layout has no such "
                    "scale, run this layer from BF16 weights"
                )


@torch.no_grad()
def pack_experts(experts: Experts) -> PackedExperts:
    """Rearrange the experts for the kernels, on their device. ValueError for a scale byte above 128."""
    _check_experts(experts)
    count, hidden, inter = len(experts.down), experts.down.shape[1], experts.gate_up.shape[1] // 2
    codes, scales = (t.contiguous() for t in (experts.gate_up, experts.gate_up_scales))
    gate, up = (codes[:, :inter], scales[:, :inter]), (codes[:, inter:], scales[:, inter:])
    packer = Packer(count, hidden, inter, codes.device)
    packer.put(0, gate, up, (experts.down.contiguous(), experts.down_scales.contiguous()))
    packer.check()
    return packer.packed


@torch.no_grad()
def unpack_experts(packed: PackedExperts, which: torch.Tensor | None = None) -> Experts:
    """The inverse of `pack_experts`, bit for bit; `which` int64 [n] picks experts, None takes all."""
    tensors = (packed.gate_up, packed.gate_up_scales, packed.down, packed.down_scales)
    gate_up, gate_up_scales, down, down_scales = tensors if which is None else (t[which] for t in tensors)
    gate_up, gate_up_scales = _unpack(gate_up, gate_up_scales, packed.hidden)
    down, down_scales = _unpack(down, down_scales, packed.inter)
    return Experts(
        _deinterleave(gate_up, packed.inter),
        _deinterleave(gate_up_scales, packed.inter),
        down[:, : packed.hidden].contiguous(),
        down_scales[:, : packed.hidden].contiguous(),
    )


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """int16 [...] of integer codes [..., 4], each 0..15."""
    c0, c1, c2, c3 = codes.int().unbind(-1)
    field = [((c & 8) << 12) | ((c & 7) << 6) for c in (c0, c1, c2)]
    last = ((c3 & 8) << 11) | ((c3 & 6) << 9) | ((c3 & 1) << 13)
    return (field[0] | (field[1] >> 3) | (field[2] >> 6) | last).to(torch.int16)


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., 4] of int16 words [...]; the inverse of `pack_words`."""
    w = words.int() & 0xFFFF
    fields = [w & _FIELDS, (w << 3) & _FIELDS, (w << 6) & _FIELDS]
    codes = [((f >> 12) & 8) | ((f >> 6) & 7) for f in fields]
    codes.append(((w >> 11) & 8) | ((w >> 9) & 6) | ((w >> 13) & 1))
    return torch.stack(codes, -1).to(torch.uint8)


def _pack(packed: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of words and scales of matrices: packed uint8 [n, R, K/2], scales uint8 [n, R, K/32]."""
    words = pack_words(mxfp4.unpack(packed).unflatten(-1, (-1, 4)))
    words = _pages(words, PAGE_K // 4, 0)
    return words, _pages(scales + SCALE_BIAS, PAGE_K // mxfp4.BLOCK, SCALE_BIAS)


def _unpack(words: torch.Tensor, scales: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [..., R, k/2], scales uint8 [..., R, k/32]) of pages, padded rows included."""
    codes = unpack_words(words.transpose(-3, -2).flatten(-4, -3).flatten(-2)).flatten(-2)
    scales = scales.transpose(-3, -2).flatten(-4, -3).flatten(-2) - SCALE_BIAS
    return mxfp4.pack(codes[..., :k]), scales[..., : k // mxfp4.BLOCK]


def _pages(x: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    """[n, R, C] -> contiguous [n, rows/16, columns/width, 16, width], R padded to 128 and C to `width` with `fill`."""
    x = pad(x, (0, -x.shape[2] % width, 0, -x.shape[1] % PAGE_K), value=fill)
    return x.unflatten(1, (-1, PAGE_ROWS)).unflatten(3, (-1, width)).transpose(2, 3).contiguous()


def _interleave(x: torch.Tensor) -> torch.Tensor:
    """Rows [n, 2I, C], gates then ups -> [n, 2Ip, C], alternately eight of each; padding rows are zero."""
    gate_up = x.unflatten(1, (2, -1))
    gate_up = pad(gate_up, (0, 0, 0, -gate_up.shape[2] % PAGE_K))
    return gate_up.unflatten(2, (-1, _HALF)).transpose(1, 2).flatten(1, 3)


def _deinterleave(x: torch.Tensor, inter: int) -> torch.Tensor:
    """[..., 2Ip, C] -> [..., 2I, C]; the inverse of `_interleave`."""
    return x.unflatten(-2, (-1, 2, _HALF)).transpose(-4, -3).flatten(-3, -2)[..., :inter, :].flatten(-3, -2)


# ---- refusals


def _check_tokens(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> None:
    _check_routing(x, ids, weights)
    _check_x(x, experts)


def _check_x(x: torch.Tensor, experts: PackedExperts) -> None:
    if x.dtype != torch.bfloat16 or x.shape[1] != experts.hidden:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected torch.bfloat16 [tokens, {experts.hidden}]")
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ValueError(f"x: {len(x)} tokens; give 1 to {MAX_TOKENS} at a time, use `moe_many` for more")


def _check_routing(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    if x.ndim != 2 or ids.ndim != 2 or ids.shape != weights.shape or len(ids) != len(x):
        raise ValueError(
            f"x {list(x.shape)}, ids {list(ids.shape)}, weights {list(weights.shape)}: expected [T, H] and twice [T, k]"
        )
    if ids.dtype not in (torch.int32, torch.int64) or weights.dtype != torch.float32:
        raise ValueError(f"ids {ids.dtype}, weights {weights.dtype}: expected int32 or int64, and float32")


def _check_experts(experts: Experts) -> None:
    count, rows, half = experts.gate_up.shape
    hidden, inter = 2 * half, rows // 2
    expected = {
        "gate_up": [count, 2 * inter, hidden // 2],
        "gate_up_scales": [count, 2 * inter, hidden // mxfp4.BLOCK],
        "down": [count, hidden, inter // 2],
        "down_scales": [count, hidden, inter // mxfp4.BLOCK],
    }
    for name, shape in expected.items():
        tensor = getattr(experts, name)
        if tensor.dtype != torch.uint8 or list(tensor.shape) != shape:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}, expected torch.uint8 {shape} for {count} experts of "
                f"hidden size {hidden} and intermediate size {inter}; give the codes and scales of one layer"
            )
    _check_sizes(hidden, inter)


def _check_sizes(hidden: int, inter: int) -> None:
    if hidden % mxfp4.BLOCK or inter % mxfp4.BLOCK:
        raise ValueError(f"experts: hidden {hidden} and intermediate {inter} must divide by {mxfp4.BLOCK}")
