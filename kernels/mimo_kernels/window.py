"""Attention of the rows of a decode step from their fused QKV projection: `heads.split_heads`, then
`attention.attention`, which define it. Of a layer with a window, for at most 8 rows, both are one CUDA launch
(`window_cuda`) on a GPU of compute capability 9: rotating rows again in every block is cheaper than a launch between.

Bits of the one launch. There is one softmax, and both sums go by the slots of the ring, in order, the call's own rows
in theirs. So the bits of a row depend on its own query, its position, the keys that it sees and the shapes; not on
which of these keys came with its call, on rows it does not see, on how many there are, or on timing.
"""

import torch

from . import attention, heads


@torch.no_grad()
def attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    *,
    count: int,
    scale: float,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    value_scale: float = 1.0,
    norms: heads.HeadNorms | None = None,
    tree: attention.TreeRows | None = None,
) -> torch.Tensor:
    """BF16 [T, N, V] of qkv BF16 [T, (N+G)*K + G*V], whose first `count` rows are real: others repeat the last of them.

    keys, values and start must be older than the pass, whose first kernel is a border (`launch`).

    The real rows' keys and values go into keys BF16 [G, S, K] and values BF16 [G, S, V]. `cos` and `sin` are BF16
    [T, R/2]; the rest is as in `split_heads` and `attention`, and so are the errors.
    """
    whole = sink is None or sink.is_contiguous()  # it is read early, when a copy of it might not be there
    if window is not None and norms is None and tree is None and whole:
        from . import cuda, window_cuda

        if cuda.usable(qkv.device) and window_cuda.fits(qkv, cos, keys, values, count, window):
            return window_cuda.attend(
                qkv, cos, sin, keys, values, start, count, window, scale=scale, sink=sink, value_scale=value_scale
            )
    q = heads.split_heads(qkv, cos, sin, keys, values, start, count=count, value_scale=value_scale, norms=norms)
    return attention.attention(
        q[:count], keys, values, start, scale=scale, window=window, sink=sink, tree=tree, padded=len(q)
    )
