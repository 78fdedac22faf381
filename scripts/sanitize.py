"""compute-sanitizer --tool racecheck --report-api-errors no --error-exitcode 9 python scripts/sanitize.py

Every CUDA C++ kernel of a decode step but the sum over ranks, each a few times on small shapes, for a tool that makes
kernels hundreds of times as slow: memcheck, racecheck, initcheck, synccheck. Inputs are made on the CPU, where results
are compared with the definitions, so that next to nothing else runs on the GPU. (`--report-api-errors no`: NVIDIA's
bindings ask the driver for functions that it does not have, which is an answer and no fault.)
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from mimo_kernels import attention, cuda, fp8, heads, linear, moe, residual, router, window

SEED, ROUNDING = 0, 1e-2
KERNELS = {"experts", "combine", "linear", "logits", "attend", "add_norm"}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of results on any device."""
    found, expected = found.cpu().double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def on_gpu(weights: Any) -> Any:
    """The same dataclass with its tensors there."""
    moved = {k: v.cuda() for k, v in vars(weights).items() if isinstance(v, torch.Tensor)}
    return replace(weights, **moved)


def six_experts(g: torch.Generator) -> moe.Experts:
    """2048 x 128."""
    codes = [torch.randint(0, 256, s, generator=g, dtype=torch.uint8) for s in ((6, 256, 1024), (6, 2048, 64))]
    scales = [torch.randint(114, 122, s, generator=g, dtype=torch.uint8) for s in ((6, 256, 64), (6, 2048, 4))]
    return moe.Experts(codes[0], scales[0], codes[1], scales[1])


def experts(g: torch.Generator, tokens: int) -> Iterator[tuple[str, float]]:
    """2 of 6, given, and chosen from logits."""
    weights, x, at = six_experts(g), torch.randn(tokens, 2048, generator=g).bfloat16(), torch.arange(tokens)
    packed = on_gpu(moe.pack_experts(weights))
    steering = router.Router(torch.randn(6, 2048, generator=g) / 45, torch.randn(3, 6, generator=g), 2, normalise=True)
    shares, ids = steering.route(x, at)
    expected = moe.reference(x, ids, shares, weights, torch.float64)
    yield "experts and combine", error(moe.moe(x.cuda(), ids.cuda(), shares.cuda(), packed), expected)
    found, *_ = moe.routed(x.cuda(), on_gpu(steering), packed, at.cuda())
    yield "experts that are chosen", error(found.cpu().sum(0), expected)


def products(g: torch.Generator, tokens: int) -> Iterator[tuple[str, float]]:
    """FP8 and BF16, 192 x 1024."""
    weight, x = torch.randn(192, 1024, generator=g), torch.randn(tokens, 1024, generator=g).bfloat16()
    packed = linear.pack_fp8(*fp8.quantize(weight))
    yield "linear, FP8", error(linear.linear(x.cuda(), on_gpu(packed)), linear.reference(x, packed, torch.float64))
    dense = weight.bfloat16()
    yield "linear, BF16", error(linear.linear(x.cuda(), dense.cuda()), linear.reference(x, dense, torch.float64))


def routing(g: torch.Generator, tokens: int) -> tuple[str, float]:
    """16 experts of 1024, 4 a token."""
    x, matrix = torch.randn(tokens, 1024, generator=g).bfloat16(), torch.randn(16, 1024, generator=g)
    bias = torch.zeros(16)
    found, _ = router.route(x.cuda(), matrix.cuda(), bias.cuda(), 4, normalise=True)
    expected, _ = router.reference(x, matrix, bias, 4, normalise=True)
    return "logits", error(found, expected)


def windowed(g: torch.Generator, tokens: int) -> tuple[str, float]:
    """One head of keys for 4 of queries, a window of 16 in a ring of 24."""
    groups, count, sizes = 1, 4, (192, 128)
    qkv = torch.randn(tokens, (count + groups) * sizes[0] + groups * sizes[1], generator=g).bfloat16()
    angles = torch.rand(tokens, 32, generator=g)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    keys, values = (torch.randn(groups, 24, d, generator=g).bfloat16() for d in sizes)
    start, sink = torch.tensor(77), torch.randn(count, generator=g)
    kw = {"scale": 0.07, "window": 16, "sink": sink}
    q, k, v = heads.reference(qkv, cos, sin, (groups, *sizes), dtype=torch.float64)
    place = (start + torch.arange(tokens)) % 24
    after = keys.clone(), values.clone()
    after[0][:, place], after[1][:, place] = k.transpose(0, 1), v.transpose(0, 1)
    expected = attention.reference(q, *after, start, dtype=torch.float64, **kw)
    args = [t.cuda() for t in (qkv, cos, sin, keys, values, start)]
    return "attend", error(window.attend(*args, count=tokens, **kw | {"sink": sink.cuda()}), expected)


def norms(g: torch.Generator, tokens: int) -> Iterator[tuple[str, float]]:
    """1024 columns, of one part and of three."""
    x, weight = torch.randn(tokens, 1024, generator=g).bfloat16(), torch.rand(1024, generator=g).bfloat16()
    for update in (torch.randn(tokens, 1024, generator=g).bfloat16(), torch.randn(3, tokens, 1024, generator=g)):
        _, found = residual.add_rms_norm(x.cuda(), update.cuda(), weight.cuda(), 1e-5)
        _, expected = residual.reference(x, update, weight, 1e-5)
        yield f"norm, {update.ndim}D update", error(found, expected)


def main() -> int:
    if not torch.cuda.is_available() or not cuda.usable(torch.device("cuda")):
        print("error: these kernels need a GPU of compute capability 9 and cuda-bindings", file=sys.stderr)
        return 1
    ran, launch, wrong = set(), cuda.launch, 0

    def noted(kernel: cuda.Kernel, *args: Any, **kw: Any) -> None:
        ran.add(kernel.name)
        launch(kernel, *args, **kw)

    cuda.launch = noted
    for tokens in (1, 3, 8):
        g = torch.Generator().manual_seed(SEED + tokens)
        found = [*experts(g, tokens), *products(g, tokens), routing(g, tokens), windowed(g, tokens)]
        found += norms(g, tokens)
        for name, e in found:
            print(f"{tokens} rows, {name}: relative error {e:.1e}")
            wrong += not e < ROUNDING
    if ran != KERNELS:
        print(f"error: {sorted(KERNELS - ran)} did not run: another kernel took these shapes", file=sys.stderr)
    return 1 if wrong or ran != KERNELS else 0


if __name__ == "__main__":
    sys.exit(main())
