"""Matrices for the kernels of a decode step, by their definition: FP8 codes as stored, and BF16 values."""

from dataclasses import replace

import pytest
import torch

from mimo_kernels.linear import Fp8Weight, pack_fp8, unpack_fp8
from mimo_qat.checkpoint.reader import Checkpoint
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.load import LoadConfig, Moe, load_target
from mimo_runtime.load_drafter import load_drafter
from mimo_runtime.model import linear, new_caches, target_forward
from mimo_runtime.parallel import Ranks
from mimo_runtime.shards import Shards
from mimo_runtime.weights import KernelWeight, kernel_weight, rows_from
from tests.runtime.conftest import WIDE, assert_own_tokens, drafter_folder, release_folder

KINDS = "plain", "kernel"


def loaded(folder, linears, rank=0, size=1):
    return load_target(folder, LoadConfig("cpu", torch.bfloat16, linears=linears, ranks=Ranks(rank, size)))


@pytest.fixture
def wide(tmp_path, tiny_config, make_model):
    """A release whose matrices the kernels take, with its drafter."""
    config = tiny_config | WIDE
    folder = release_folder(tmp_path / "wide", config, make_model(config))
    drafter_folder(folder / "dflash", config)
    return folder


@pytest.mark.parametrize("size", [1, 2])
def test_shares_hold_what_a_plain_share_means(wide, size):
    """Bits, of every rank: FP8 decoded again, BF16 as it is; and FP8 takes half the bytes and its scales."""
    for rank in range(size):
        plain, kernel = (loaded(wide, kind, rank, size) for kind in KINDS)
        pairs = [(plain.head, kernel.head)]
        for a, b in zip(plain.layers, kernel.layers, strict=True):
            pairs.append((a.attention.o, b.attention.o))
            codes = [(a.attention.qkv, b.attention.qkv)]
            if not isinstance(a.mlp, Moe):
                codes += [(a.mlp.gate_up, b.mlp.gate_up), (a.mlp.down, b.mlp.down)]
            for values, w in codes:
                assert isinstance(w, Fp8Weight) and torch.equal(unpack_fp8(w), values)
                n, k = values.shape
                assert w.nbytes == n * k + -(-n // 64) * k // 128 * 4
        for values, w in pairs:
            assert isinstance(w, KernelWeight) and torch.equal(w.values, values) and w.nbytes == values.nbytes
        drafter = load_drafter(wide / "dflash", kernel, LoadConfig("cpu", linears="kernel", ranks=Ranks(rank, size)))
        for w in (drafter.fc, *drafter.layers[0].weights()):
            assert isinstance(w, KernelWeight)


@pytest.mark.parametrize(
    ("changes", "size", "stay"),  # gate_up, down, QKV of full attention, of a window
    [
        ({}, 2, "yes yes yes yes"),
        ({"hidden_size": 96}, 2, "no yes no no"),  # columns that are no whole tiles
        ({"head_dim": 96, "swa_head_dim": 96}, 1, "yes yes no yes"),  # the second chunk's K begins inside a group of 64
        ({"attention_projection_layout": "split"}, 2, "yes yes yes yes"),
        ({"intermediate_size": 192}, 2, "no no yes yes"),  # gate's 96 rows end inside a group; columns, inside a tile
    ],
    ids=str,
)
def test_shapes_decide_what_stays_fp8(tmp_path, tiny_config, make_model, changes, size, stay):
    """The decision is made without values, and is that of `pack_fp8`, whose scales are random here."""
    config = tiny_config | WIDE | changes
    folder = release_folder(tmp_path / "release", config, make_model(config))
    for rank in range(size):
        shards = Shards(Checkpoint(folder), Ranks(rank, size))
        target = loaded(folder, "kernel", rank, size)
        gate_up = [shards.row_box(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up")]
        matrices = [(gate_up, target.layers[0].mlp.gate_up)]
        matrices.append(([shards.column_box("model.layers.0.mlp.down_proj")], target.layers[0].mlp.down))
        matrices += [(shards.qkv_boxes(i), target.layers[i].attention.qkv) for i in range(2)]
        for boxes, w in matrices:
            try:
                packed = pack_fp8(*shards.fp8_codes(boxes)(), 1)
            except ValueError:
                packed = None
            assert shards.stays_fp8(boxes) == (packed is not None) == isinstance(w, Fp8Weight)
            assert packed is not None or isinstance(w, torch.Tensor if w.shape[1] % 64 else KernelWeight)
        assert [isinstance(w, Fp8Weight) for _, w in matrices] == [word == "yes" for word in stay.split()]


def test_a_bf16_spine_has_no_codes(release_of_bf16_spine):
    target = loaded(release_of_bf16_spine, "kernel")
    assert all(isinstance(layer.attention.qkv, torch.Tensor) for layer in target.layers)  # 96 columns
    assert all(isinstance(layer.attention.o, KernelWeight) for layer in target.layers)  # 128


def test_products_of_every_form():
    """All three agree up to their rounding, for few rows and for many; parts of rows are parts of the product."""
    g = torch.Generator().manual_seed(0)
    codes = (64 * torch.randn(320, 256, generator=g)).to(torch.float8_e4m3fn)
    packed = pack_fp8(codes, torch.rand(3, 2, generator=g) / 64)
    values = unpack_fp8(packed)
    forms = [values, kernel_weight(values), packed]
    assert isinstance(forms[1], KernelWeight) and kernel_weight(values.float()).dtype == torch.float32
    for rows in (1, 8, 16, 17, 40):
        x = torch.randn(rows, 256, generator=g).bfloat16()
        exact = x.double() @ values.double().T
        for w in forms:
            assert (linear(x, w).double() - exact).norm() < 4e-3 * exact.norm()
            assert (linear(x, rows_from(w, 192)).double() - exact[:, 192:]).norm() < 4e-3 * exact.norm()
            assert rows <= 16 or torch.equal(linear(x, w), linear(x, values))


@pytest.mark.parametrize("rows", [1, 8, 16, 21])
def test_a_forward_pass_is_that_of_plain_matrices(wide, rows):
    """Up to where the two round; 21 rows are more than the kernels take, and have the bits of plain ones."""
    ids = torch.randint(0, 500, (rows,), generator=torch.Generator().manual_seed(rows))
    found = {}
    for kind in KINDS:
        target = loaded(wide, kind)
        found[kind] = target_forward(target, new_caches(target, 64, 32), ids, 0)[0]
    error = (found["kernel"] - found["plain"]).norm() / found["plain"].norm()
    assert 0 < error < 0.02 if rows <= 16 else error == 0


@pytest.mark.parametrize("block", [8, 16])
def test_drafts_change_no_token(wide, tmp_path, tiny_config, block):
    """Blocks of the two shapes of the kernels; every token is the plain model's own, up to a near tie."""
    drafter_folder(tmp_path / "drafter", tiny_config | WIDE, block_size=block)
    cfg = EngineConfig(device="cpu", max_len=128, drafter=str(tmp_path / "drafter"), linears="kernel")
    engine, plain = Engine(wide, cfg), Engine(wide, replace(cfg, linears="plain"))
    assert engine.block == engine.min_rows == block
    assert_own_tokens(engine, plain)


def test_kernels_of_a_step_together(wide):
    cfg = EngineConfig(device="cpu", experts="packed", attention="kernel", linears="kernel", max_len=128)
    engine, sampling = Engine(wide, cfg), SamplingConfig(max_new_tokens=30, stop_token_ids=(-1,))
    tokens = engine.generate([3, 1, 4, 1, 5], sampling, speculate=False).tokens
    assert engine.generate([3, 1, 4, 1, 5], sampling).tokens == tokens


def test_what_cannot_run_is_refused_or_left_plain(wide):
    with pytest.raises(ValueError, match="linears kernel needs bfloat16"):
        load_target(wide, LoadConfig("cpu", torch.float32, linears="kernel"))
    for dtype in (torch.float32, torch.bfloat16):  # a CPU runs no decode kernels unless it is told to
        target = load_target(wide, LoadConfig("cpu", dtype, linears="auto"))
        assert all(isinstance(w, torch.Tensor) for w in (target.head, *target.layers[0].weights()))
