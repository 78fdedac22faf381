"""Routing: definition, kernels in Triton's interpreter, and the machine code that they become."""

import pytest
import torch

from mimo_kernels import router
from mimo_runtime import model
from mimo_runtime.load import Moe
from tests.kernels.triton_tools import compile_for_sm90, inside, needs_tools, outside, pass_in_the_interpreter, spills

# experts, hidden size, experts a row: SmolLM2, MiMo-V2.5, Pro at a shorter H, and odd ones
SHAPES = [(8, 576, 2), (256, 1024, 8), (384, 768, 8), (512, 512, 16), (1, 8, 1), (5, 24, 5), (33, 520, 7)]


def random_case(seed, rows, experts, hidden):
    """x bf16, router and bias float32, with logits of about 2 and a bias as large as the gaps between scores."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=g).bfloat16()
    weight = torch.randn(experts, hidden, generator=g) * 2 / hidden**0.5
    return x, weight, torch.randn(experts, generator=g) / 10


def exact_case(rows, experts, hidden):
    """Small integers: logits are exact in any order of summation, and many are equal."""
    g = torch.Generator().manual_seed(experts)
    x = torch.randint(-2, 3, (rows, hidden), generator=g).bfloat16()
    weight = torch.randint(-1, 2, (experts, hidden), generator=g).float() * (torch.rand(hidden, generator=g) < 0.02)
    return x, weight, torch.zeros(experts)


def check(y, x, weight, bias, *, normalise, scaling, positions=None):
    """Ids are a choice that float64 allows within rounding, in descending order; weights are those of the ids."""
    weights, ids = y
    top_k = ids.shape[1]
    scores = (x.double() @ weight.double().T).sigmoid()
    biased = scores + (bias if bias.ndim == 1 else bias[positions % len(bias)]).double()
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32 and weights.shape == (len(x), top_k)
    assert all(len(set(row)) == top_k for row in ids.tolist()) and ids.min() >= 0 and ids.max() < len(weight)
    chosen = biased.gather(1, ids.long())
    assert (chosen - biased.sort(dim=-1, descending=True).values[:, :top_k]).abs().max() < 3e-6
    expected = scores.gather(1, ids.long())
    if normalise:
        expected = expected / (expected.sum(-1, keepdim=True) + 1e-20)
    assert ((weights - expected * scaling).abs() <= 3e-6 * expected.amax(-1, keepdim=True) * scaling).all()


# ---- the definition


@outside
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_what_the_model_does(shape, normalise, assert_same_bits):
    experts, hidden, top_k = shape
    x, weight, bias = random_case(1, 5, experts, hidden)
    kw = {"normalise": normalise, "scaling": 2.5}
    check(router.route(x, weight, bias, top_k, **kw), x, weight, bias, **kw)
    table, positions = torch.randn(3, experts) / 10, torch.tensor([0, 7, 2, 3, 100])
    for b, p in ((bias, None), (table, positions)):
        moe = Moe(weight, b, top_k, normalise, 2.5, None, None)
        weights, ids = router.route(x, weight, b, top_k, positions=p, **kw)
        expected, chosen = model.route(moe, x, p)
        assert_same_bits(weights, expected)
        assert torch.equal(ids.long(), chosen)


@outside
def test_ties_go_to_the_lower_id():
    x, weight, bias = exact_case(4, 64, 128)
    _, ids = router.route(x, weight, bias, 8, normalise=True)
    logits = x.float() @ weight.T
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(64), key=lambda e: (-row[e], e))[:8]


@outside
def test_refusals():
    x, weight, bias = random_case(0, 4, 8, 64)
    table, positions = bias.expand(3, -1), torch.arange(4)
    for message, args in {
        "router: torch.bfloat16": (x, weight.bfloat16(), bias, 2),
        "contiguous": (x, weight.T.contiguous().T, bias, 2),
        "at most 512 experts": (x, weight.new_zeros(513, 64), bias, 2),
        "multiple of 8 columns": (x[:, :60], weight[:, :60].contiguous(), bias, 2),
        "x: torch.float32": (x.float(), weight, bias, 2),
        r"expected torch.bfloat16 \[rows, 64\]": (x[:, :56], weight, bias, 2),
        "17 rows; give 1 to 16": (x[:1].expand(17, -1), weight, bias, 2),
        "bias: torch.float64": (x, weight, bias.double(), 2),
        r"bias: torch.float32 \[7\]": (x, weight, bias[:7], 2),
        r"bias: torch.float32 \[0, 8\]": (x, weight, table[:0], 2, positions),
        "top_k: 9, expected 1 to 8 of 8": (x, weight, bias, 9),
        "top_k: 0": (x, weight, bias, 0),
        "positions: missing": (x, weight, table, 2),
        r"positions: torch.int64 \[3\]": (x, weight, table, 2, positions[:3]),
        "positions: torch.float32": (x, weight, table, 2, positions.float()),
    }.items():
        *args, at = args if len(args) == 5 else (*args, None)
        with pytest.raises(ValueError, match=message):
            router.route(*args, normalise=True, positions=at)


# ---- the kernels in the interpreter


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, 42)


@pytest.fixture
def kernels():
    from mimo_kernels import router_triton

    return router_triton


@inside
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernels, shape, rows):
    """With more experts a program than on a GPU: the interpreter's time is a program's."""
    experts, hidden, top_k = shape
    config = kernels.Config(128, 512)
    x, weight, bias = random_case(rows, rows, experts, hidden)
    kw = {"normalise": rows != 3, "scaling": 1.0 if rows == 8 else 2.5}
    check(kernels.route(x, weight, bias, top_k, config=config, **kw), x, weight, bias, **kw)


@inside
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_bias_for_each_position(kernels, dtype):
    x, weight, _ = random_case(0, 6, 33, 72)
    bias, positions = torch.randn(5, 33), torch.tensor([0, 4, 5, 6, 1003, 2**31 - 1], dtype=dtype)
    kw = {"normalise": True, "scaling": 1.0, "positions": positions}
    check(kernels.route(x, weight, bias, 4, **kw), x, weight, bias, **kw)


@inside
def test_positions_of_any_stride(kernels, assert_same_bits):
    x, weight, _ = random_case(0, 6, 33, 72)
    bias, positions = torch.randn(5, 33), torch.arange(12)
    weights, ids = kernels.route(x, weight, bias, 4, normalise=True, positions=positions[::2])
    expected, chosen = kernels.route(x, weight, bias, 4, normalise=True, positions=positions[::2].clone())
    assert_same_bits(weights, expected)
    assert torch.equal(ids, chosen)


@inside
@pytest.mark.parametrize("config", range(5))
def test_every_configuration(kernels, config):
    x, weight, bias = random_case(config, 9, 33, 1160)
    kw = {"normalise": True, "scaling": 1.0}
    y = kernels.route(x, weight, bias, 8, config=kernels.CONFIGS[config], **kw)
    check(y, x, weight, bias, **kw)


@inside
@pytest.mark.parametrize("bias", [0.0, -0.0, 1.0])
def test_ties_go_to_the_lower_id_in_the_kernel(kernels, bias, assert_same_bits):
    """Exact logits, many of them equal; a bias that leaves few or no bits of a difference between scores."""
    x, weight, zero = exact_case(7, 64, 128)
    _, ids = kernels.route(x, weight, zero + bias, 16, normalise=False)
    scores = (x.float() @ weight.T).sigmoid() + bias
    assert torch.equal(ids.long(), scores.sort(dim=-1, descending=True, stable=True).indices[:, :16])
    weights, ids = kernels.route(x * 0, weight, zero + bias, 16, normalise=True)
    assert torch.equal(ids, torch.arange(16).int().expand(7, -1)) and (weights == 1 / 16).all()


@inside
def test_extreme_logits(kernels):
    """Scores of exactly 0 and 1, biases that exclude an expert or force it, sums of zero; nothing is NaN."""
    x = torch.zeros(3, 64).bfloat16()
    x[0, 0], x[1, 0], x[2, 0] = 1e4, -1e4, 3e38
    weight, bias = torch.zeros(12, 64), torch.zeros(12)
    weight[:, 0] = torch.tensor([1, -1, 1, -1, 2, -2, 0, 0, 5, -5, 1, -1])
    bias[0], bias[7] = float("-inf"), float("inf")
    weights, ids = kernels.route(x, weight, bias, 4, normalise=True)
    assert ids.tolist() == [[7, 2, 4, 8], [7, 1, 3, 5], [7, 2, 4, 8]]
    assert torch.allclose(weights, torch.tensor([0.5, 1, 1, 1]).expand(3, -1) / 3.5)
    bias[1::2], bias[::2] = 0, -2  # only experts of score zero
    weights, ids = kernels.route(x[:1], weight[[1, 3, 5]], torch.tensor([3.0, 1.0, 2.0]), 2, normalise=True)
    assert ids.tolist() == [[0, 2]] and not weights.any()


@inside
def test_nan_keeps_ids_valid(kernels):
    """A broken row must not make another kernel read outside of its experts; other rows do not see it."""
    x, weight, bias = random_case(2, 3, 33, 72)
    good = kernels.route(x, weight, bias, 8, normalise=True)
    for bad in (float("nan"), torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16).item()):
        broken = x.clone()
        broken[1] = bad
        weights, ids = kernels.route(broken, weight, bias, 8, normalise=True)
        assert ids[1].tolist() == list(range(8)) and weights[1].isnan().all()
        assert torch.equal(ids[::2], good[1][::2]) and torch.equal(weights[::2], good[0][::2])


@inside
def test_bits_depend_on_the_row_alone(kernels, assert_same_bits):
    x, weight, bias = random_case(3, 16, 33, 1160)
    y = kernels.route(x, weight, bias, 8, normalise=True)
    for rows in (1, 8):
        for a, b in zip(kernels.route(x[:rows], weight, bias, 8, normalise=True), y, strict=True):
            assert_same_bits(a, b[:rows])
    others = torch.full_like(x, 3)
    others[9] = x[9]
    for a, b in zip(kernels.route(others, weight, bias, 8, normalise=True), y, strict=True):
        assert_same_bits(a[9], b[9])


# ---- the machine code


@outside
@needs_tools
@pytest.mark.parametrize(("experts", "hidden"), [(8, 576), (256, 4096), (384, 6144)])
def test_machine_code_of_the_logits(experts, hidden):
    """All weights of a program are on their way, 16 bytes a load, before the first is used; float32 products."""
    import mimo_kernels.router_triton as rt

    config = rt.CONFIGS[0]
    constants = {"E": experts, "H": hidden, "BE": config.experts, "BH": config.columns, "GROUP": 8}
    types = {"PARTS": "*fp32", "X": "*bf16", "W": "*fp32"}
    code, registers, shared = compile_for_sm90(rt._logits_kernel, types, constants, 1, 3)
    ops = [op for _, op, _ in code]
    weights = [i for i, op in enumerate(ops) if op.startswith("LDG.E.128")]
    assert len(weights) == config.experts * config.columns // 128
    assert weights[-1] < next(i for i, op in enumerate(ops) if op.startswith(("FFMA", "FMUL")))
    assert not spills(code) and registers <= 128 and shared <= 1024
    assert not any("MMA" in op and not op.startswith(("HFMA2", "IMMA")) for op in ops)
    # 4 programs a multiprocessor, one a scheduler: 2,000 instructions are 1.1 us, about what the bytes take.
    assert len(code) <= 2100
    assert -(-experts // config.experts) * -(-hidden // config.columns) >= 100 or experts == 8


@outside
@needs_tools
@pytest.mark.parametrize("experts", [8, 256, 384, 512])
def test_machine_code_of_the_choice(experts):
    """A warp alone: no barrier, no shared memory, and its maxima are single instructions."""
    import mimo_kernels.router_triton as rt

    constants = {
        "E": experts, "BLOCK": 1 << (experts - 1).bit_length(), "SLICES": 8, "TOP_K": 8, "K_BLOCK": 8,
        "NORMALISE": True, "PLACED": True,
    }  # fmt: skip
    types = {"WEIGHTS": "*fp32", "IDS": "*i32", "PARTS": "*fp32", "BIAS": "*fp32", "POSITIONS": "*i64"}
    code, registers, shared = compile_for_sm90(rt._choose_kernel, types | {"scaling": "fp32"}, constants, 1, 3)
    ops = [op for _, op, _ in code]
    assert not spills(code) and registers <= 128 and shared == 0 and not any(op.startswith("BAR") for op in ops)
    assert experts == 8 or sum(op.startswith("REDUX") for op in ops) == 24
    assert len(code) <= 450 + 3 * experts
