"""Findings about the values of a checkpoint: codes, scales, block maxima, copies, dead blocks.

Every weight is read with plain reads and let go again, so that a checkpoint of any size can be looked at.
"""

import hashlib

import torch

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.findings import Report, few
from mimo_qat.checkpoint.folder import TensorFolder
from mimo_qat.checkpoint.reader import Checkpoint

E2M1 = ("0", "0.5", "1", "1.5", "2", "3", "4", "6")
SMALL_BYTES = 2**24
ROWS_BYTES = 2**25


def sample(names: list[str], samples: int) -> list[str]:
    """At most `samples` names, evenly spread; all of them for -1."""
    if samples < 0 or len(names) <= samples:
        return names
    return [names[i * len(names) // samples] for i in range(samples)]


def packed_weights(checkpoint: Checkpoint) -> list[str]:
    """Names of the stored MXFP4 code tensors."""
    ends = (".weight", ".weight_packed")
    return [n for n, s in checkpoint.specs.items() if s.dtype == "U8" and n.endswith(ends)]


def expert_values(checkpoint: Checkpoint, samples: int, report: Report) -> None:
    """MXFP4 codes and scales: legal bytes, no -0, and the histogram that narrows down the scale rule."""
    names = sample(packed_weights(checkpoint), samples)
    histogram, negative_zeros, low, high = torch.zeros(8, dtype=torch.long), 0, 255, 0
    dead: list[str] = []
    dead_blocks = blocks = 0
    for name in names:
        base = name.removesuffix("_packed").removesuffix(".weight")
        if base + ".weight_scale" not in checkpoint:
            report.add("scale-missing", f"{name} has no {base}.weight_scale beside it")
            continue
        scales = checkpoint.scale_bytes(base)
        report.expect((scales != 255).all(), "scale-nan", f"{base}.weight_scale holds the byte 255")
        codes = mxfp4.unpack(checkpoint.rows(name)).unflatten(-1, (-1, mxfp4.BLOCK))
        negative_zeros += int((codes == 8).sum())
        largest = (codes & 7).amax(-1)
        alive = largest > 0
        blocks, dead_blocks = blocks + largest.numel(), dead_blocks + int((~alive).sum())
        # A scale at the lower end of its range says nothing about the rule that chose it.
        histogram += torch.bincount(largest[alive & (scales > 1)].flatten().long(), minlength=8)
        if alive.any():
            low, high = min(low, int(scales[alive].min())), max(high, int(scales[alive].max()))
        else:
            dead.append(base)
    report.expect(not negative_zeros, "minus-zero", f"{negative_zeros} codes in {len(names)} sampled weights")
    report.expect(not dead, "dead-experts", f"every weight is zero in {few(dead)}")
    if not histogram.sum():
        return
    share = dead_blocks / blocks
    report.expect(share <= 0.01 or dead, "dead-blocks", f"{share:.1%} of {blocks:,} blocks are all zero")
    _rule(histogram, low, high, report)


def _rule(histogram: torch.Tensor, low: int, high: int, report: Report) -> None:
    """What the largest codes of the blocks say about the rule that chose their scales."""
    blocks = int(histogram.sum())
    share = {value: round(int(n) / blocks, 4) for value, n in zip(E2M1, histogram, strict=True)}
    small = round(1 - share["4"] - share["6"], 4)
    # "even" and "floor" always leave 4 or 6; their shares of the two depend on the weights, so they tell no more.
    fits = ["rceil", "mse"] if small > 0.01 else ["even", "floor", "mse"]
    report.facts |= {"max_code_share": share, "rules_that_fit": fits, "scale_exponents": [low - 127, high - 127]}
    report.expect(small <= 0.01, "small-max-code", f"{small:.1%} of {blocks:,} blocks have a largest code below 4")
    report.expect(high - low <= 15, "scale-span", f"block scales span {high - low} powers of two in the sample")
    stated = report.facts.get("scale_rule")
    report.expect(
        stated in (None, "unknown", *fits) or blocks < 1000,
        "scale-rule",
        f"the index says {stated!r}, the largest codes fit {' or '.join(fits)}",
    )


def fp8_values(checkpoint: Checkpoint, samples: int, report: Report) -> None:
    """Every non-zero 128x128 block holds a code of magnitude 448, or its row map is not the one it was written with."""
    names = [n for n, s in checkpoint.specs.items() if s.dtype == "F8_E4M3"]
    report.facts["fp8_weights"] = len(names)
    for kind, end in (("qkv-block-amax", "qkv_proj.weight"), ("fp8-block-amax", "")):
        members = [n for n in names if n.endswith("qkv_proj.weight") == bool(end)]
        for name in sample(members, samples):
            base = name.removesuffix(".weight")
            if base + ".weight_scale_inv" not in checkpoint:
                report.add("scale-missing", f"{name} has no {base}.weight_scale_inv beside it")
                continue
            codes = checkpoint.rows(name).view(torch.uint8) & 0x7F
            scales = checkpoint.rows(base + ".weight_scale_inv")
            report.expect((codes != 0x7F).all(), "fp8-nan", f"{name} holds NaN codes")
            report.expect((scales.isfinite() & (scales > 0)).all(), "fp8-scale", f"{base}: a scale is <= 0 or NaN")
            tops = block_amax(codes, checkpoint.chunk_rows(base))
            wrong = int(((tops != 0x7E) & (tops != 0)).sum())
            report.expect(not wrong, kind, f"{name}: {wrong} of {tops.numel()} blocks have no code of magnitude 448")


def block_amax(codes: torch.Tensor, chunk_rows: int | None) -> torch.Tensor:
    """Largest code [row blocks, column blocks] of uint8 magnitudes [N, K], the grid restarting at each chunk."""
    blocks = []
    for chunk in codes.split(chunk_rows or codes.shape[0]):
        rows, cols = chunk.shape
        padded = torch.nn.functional.pad(chunk, (0, -cols % fp8.BLOCK, 0, -rows % fp8.BLOCK))
        blocks.append(padded.unflatten(0, (-1, fp8.BLOCK)).unflatten(2, (-1, fp8.BLOCK)).amax((1, 3)))
    return torch.cat(blocks)


def float_values(checkpoint: Checkpoint, samples: int, report: Report) -> None:
    """Unquantised tensors are finite: the small ones (norms, sinks, routers, block scales), all of them for -1."""
    floats = [n for n, s in checkpoint.specs.items() if s.dtype in ("BF16", "F16", "F32")]
    if samples >= 0:
        floats = sample([n for n in floats if checkpoint.specs[n].nbytes <= SMALL_BYTES], 512)
    bad = [n for n in floats if not finite(checkpoint, n)]
    report.expect(not bad, "not-finite", few(bad))


def finite(checkpoint: TensorFolder, name: str) -> bool:
    """Whether every value of a float tensor is finite; rows are read a few at a time."""
    spec = checkpoint.specs[name]
    if not spec.shape or not spec.nbytes:
        return bool(checkpoint.rows(name).isfinite().all())
    step = max(1, ROWS_BYTES // (spec.nbytes // spec.shape[0]))
    parts = range(0, spec.shape[0], step)
    return all(bool(checkpoint.rows(name, i, min(i + step, spec.shape[0])).isfinite().all()) for i in parts)


def copies(checkpoint: Checkpoint, report: Report) -> None:
    """No two expert projections hold the same bytes: a copy is a sharding or an index mistake."""
    seen: dict[bytes, str] = {}
    twins = []
    for name, spec in checkpoint.specs.items():
        if ".experts." not in name or not name.endswith((".weight", ".weight_packed")) or not spec.nbytes:
            continue
        digest = hashlib.sha256()
        for piece in checkpoint.pieces(name):
            digest.update(piece)
        first = seen.setdefault(digest.digest(), name)
        if first != name and _alive(checkpoint, name):
            twins.append(f"{name} = {first}")
    report.expect(not twins, "duplicate-experts", few(twins))


def _alive(checkpoint: Checkpoint, name: str) -> bool:
    return any(any(piece) for piece in checkpoint.pieces(name))
