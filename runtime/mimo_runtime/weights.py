"""The forms that a matrix of a model has in memory. `model.linear` multiplies with each of them as its type says.

A `torch.Tensor` of values is for torch's linear. A `KernelWeight` holds bfloat16 values too: up to 16 rows take the
kernel of `mimo_kernels.linear`, more take torch's linear. An `Fp8Weight` holds block-FP8 codes, half the bytes: up to
16 rows take the kernel, and for more it is dequantised, at every product.
"""

from dataclasses import dataclass

import torch

from mimo_kernels.linear import GROUP_ROWS, Fp8Weight, fits


@dataclass(frozen=True)
class KernelWeight:
    """A contiguous bfloat16 matrix [N, K], K a multiple of 64, for `mimo_kernels.linear.linear`."""

    values: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


Weight = torch.Tensor | KernelWeight | Fp8Weight


def kernel_weight(values: torch.Tensor) -> torch.Tensor | KernelWeight:
    """`values` [N, K] for the kernel if it takes them, as they are if not."""
    return KernelWeight(values) if fits(values) else values


def rows_from(w: Weight, first: int) -> Weight:
    """The rows `first`.. of a matrix, without a copy; of FP8 codes `first` is a multiple of 64."""
    if isinstance(w, KernelWeight):
        return KernelWeight(w.values[first:])
    if isinstance(w, Fp8Weight):
        assert first % GROUP_ROWS == 0
        return Fp8Weight(w.codes[first:], w.scales[first // GROUP_ROWS :])
    return w[first:]
