"""Key-value caches that speculative decoding rolls back for free.

A row at absolute position p always lives in slot p % capacity, and what a slot holds follows from the committed length
alone. So a rejected draft needs no clean-up: the length does not advance, its slot reads as the older position that
the window has already left, and the next round overwrites it. Nothing is copied, nothing is reset between prompts.

Letters: G key-value heads, K query/key head size, V value head size, T new rows, S keys that a call returns.
"""

import torch

Position = int | torch.Tensor  # a tensor [] where the device decides how far a sequence is

BUCKET = 64  # keys are handed out in multiples of this, so that neighbouring steps run kernels of one shape


class RingCache:
    """The last `window` positions, plus the `block` rows of one verification that may all be rejected.

    Queries at start..start+block-1 need the keys start-window+1..start+block-1, so a capacity of window + block never
    lets a rejected row overwrite a key that the next round still sees. So it is with the keys of a drafter's own block.

    A call whose position is a tensor reads all slots, unless `reach` says that it ends before that position.
    """

    def __init__(self, shape: tuple[int, int, int], capacity: int, window: int | None, *, block: int, **kw):
        """`shape` is (G, K, V); `window` counts the query's own position, None means all; `kw` is dtype and device."""
        heads, k_dim, v_dim = shape
        assert window is None or capacity >= window + block
        self.capacity, self.window, self.block = capacity, window, block
        self.reach = capacity
        # Zeros, not garbage: a masked key has weight zero, and zero times NaN is not zero.
        self.k = torch.zeros(heads, capacity, k_dim, **kw)
        self.v = torch.zeros(heads, capacity, v_dim, **kw)

    def write(self, k: torch.Tensor, v: torch.Tensor, start: Position, end: torch.Tensor | None = None) -> None:
        """Stores k [T, G, K] and v [T, G, V] of positions start..start+T-1; only the last `capacity` rows stay.

        Rows from position `end` [] on are padding. Without a window they are stored like rejected ones.
        """
        if end is not None and self.window is not None:
            self._write_until(k, v, start, end)
            return
        if isinstance(start, torch.Tensor):
            assert len(k) <= self.capacity
            slots = self.slots(start + torch.arange(len(k), device=k.device))
            self.k.index_copy_(1, slots, k.transpose(0, 1))
            self.v.index_copy_(1, slots, v.transpose(0, 1))
            return
        skip = max(len(k) - self.capacity, 0)
        k, v, start = k[skip:].transpose(0, 1), v[skip:].transpose(0, 1), start + skip
        first = start % self.capacity
        fit = min(k.shape[1], self.capacity - first)
        for cache, new in ((self.k, k), (self.v, v)):
            cache[:, first : first + fit] = new[:, :fit]
            cache[:, : new.shape[1] - fit] = new[:, fit:]

    def _write_until(self, k: torch.Tensor, v: torch.Tensor, start: Position, end: torch.Tensor) -> None:
        """Into every slot its row before `end`, as padding would take the slots of rows that the window still holds."""
        slots = torch.arange(self.capacity, device=k.device)
        row = end - 1 - (end - 1 - slots) % self.capacity - start
        new, row = (row >= 0)[None, :, None], row.clamp_(min=0)
        for cache, rows in ((self.k, k), (self.v, v)):
            cache.copy_(torch.where(new, rows.index_select(0, row).transpose(0, 1), cache))

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Where rows at `positions` live; the same for all caches of one `capacity`."""
        return positions % self.capacity

    def keep(self, held: torch.Tensor, place: torch.Tensor) -> None:
        """Moves what is in the slots `held` [A] to the slots `place` [A], as if all at once."""
        self.k.index_copy_(1, place, self.k.index_select(1, held))
        self.v.index_copy_(1, place, self.v.index_select(1, held))

    def ring(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots, keys [G, S, K] and values [G, S, V], as `mimo_kernels.attention` takes them."""
        return self.k, self.v

    def used(self, end: Position) -> int:
        """How many ring slots a call that ends before position `end` reads."""
        most = self.reach if isinstance(end, torch.Tensor) else end
        return min(self.capacity, -(-most // BUCKET) * BUCKET)

    def positions(self, end: Position) -> torch.Tensor:
        """The position [S] that each slot holds once rows 0..end-1 are committed; negative where there is none."""
        slots = torch.arange(self.used(end), device=self.k.device)
        return end - 1 - (end - 1 - slots) % self.capacity

    def extend(
        self, k: torch.Tensor, v: torch.Tensor, start: Position, end: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores T new rows as `write`, and returns keys [G, S, K] and values [G, S, V] whose positions are
        `extended(start, T)`.

        More rows than `block` (a prefill chunk) do not fit beside a full window: they are joined to the window's older
        keys first and written after.
        """
        rows = len(k)
        if self.fits(rows):
            assert end is None or self.window is None
            self.write(k, v, start)
            used = self.used(start + rows)
            return self.k[:, :used], self.v[:, :used]
        assert isinstance(start, int)
        older = self._older(start) % self.capacity
        keys = torch.cat((self.k[:, older], k.transpose(0, 1)), dim=1)
        values = torch.cat((self.v[:, older], v.transpose(0, 1)), dim=1)
        self.write(k, v, start, end)
        return keys, values

    def extended(self, start: Position, rows: int) -> torch.Tensor:
        """Positions [S] of the keys that `extend` returns for `rows` rows at `start`."""
        if self.fits(rows):
            return self.positions(start + rows)
        assert isinstance(start, int)
        new = torch.arange(start, start + rows, device=self.k.device)
        return torch.cat((self._older(start), new))

    def fits(self, rows: int) -> bool:
        """Whether so many rows are stored before they are attended from. Else `extend` returns the `window` - 1 older
        keys and theirs, in order."""
        return self.window is None or rows <= self.block

    def _older(self, start: int) -> torch.Tensor:
        assert self.window is not None
        return torch.arange(start - self.window + 1, start, device=self.k.device)


class LinearCache(RingCache):
    """Every position up to `max_len`: a ring that is never full."""

    def __init__(self, shape: tuple[int, int, int], max_len: int, **kw):
        super().__init__(shape, -(-max_len // BUCKET) * BUCKET, None, block=0, **kw)


def visible(q_pos: torch.Tensor, k_pos: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [T, S]: query q sees key k iff 0 <= k <= q and, in a window, q - k < window."""
    q, k = q_pos[:, None], k_pos[None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (q - k < window)
