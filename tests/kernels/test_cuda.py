"""Kernels in CUDA C++ without a GPU: how they are called, which shapes they have, and their machine code for an H100 or
H200, compiled by NVRTC as on the day. That their arithmetic fits together, test_fragments shows; that they are right on
a GPU, tests/gpu.
"""

import ctypes
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

from mimo_kernels import allreduce, bench, cuda, linear, linear_cuda, moe_cuda, norm_cuda, router_cuda, window_cuda
from mimo_kernels.router import Router
from tests.kernels import sass
from tests.kernels.triton_tools import needs_tools

ROWS, WINDOW = 8, 128
SHARED_LIMIT = 227 * 1024  # bytes of a block
WAIT, RELEASE = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents
RECIPES = Path(__file__).parents[2] / "recipes/model"
GEOMETRIES = {name: bench.Geometry.read(RECIPES / f"{name}.json") for name in ("mimo-v2.5", "mimo-v2.5-pro")}
SHARES = [(name, tp) for name in GEOMETRIES for tp in (1, 2, 4, 8)]


@cache
def _missing() -> str:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # finds the library
    except Exception as error:
        return f"no NVRTC: {error!s:.80}"
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_missing()), reason=_missing())


def bf16(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


@pytest.fixture
def launched(monkeypatch):
    """launched(call): the kernels that call() launches, on tensors without memory."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)

    def kernels(call):
        seen = []
        monkeypatch.setattr(cuda, "launch", lambda kernel, blocks, args, *, dependent: seen.append(kernel))
        call()
        return seen

    return kernels


def machine(kernel):
    """Its machine code; holds what is the same for all: no spill, one wait that everybody passes, room on a GPU (so at
    most 128 registers where a block has 512 threads)."""
    code = sass.read(cuda.cubin(kernel.source, kernel.shapes))[kernel.name]
    assert code.local == 0 and not code.named("LDL") and not code.named("STL")
    assert code.registers * kernel.threads <= 2**16
    assert code.shared + kernel.shared <= SHARED_LIMIT
    assert len(code.named(WAIT)) == 1 and code.named(RELEASE)
    assert not any(i.op.startswith("EXIT") for i in code.reached_without(WAIT))
    return code


def early(code):
    """Opcodes of the accesses to memory that come before the wait."""
    return [i.op for i in code.reached_without(WAIT) if i.is_global]


def always_releases(code):
    return not any(i.op.startswith("EXIT") for i in code.reached_without(RELEASE))


def borders(code):
    """Whether every release comes after the wait."""
    return not any(i.op == RELEASE for i in code.reached_without(WAIT))


# ---- how they are called


def test_arguments_have_c_types():
    tensor = torch.zeros(3)
    values, types = cuda._packed((tensor, 7, 0.5))
    assert values == (tensor.data_ptr(), 7, 0.5)
    assert types == (ctypes.c_void_p, ctypes.c_int, ctypes.c_float)
    with pytest.raises(KeyError):  # a bool or None would come as something else than is meant
        cuda._packed((tensor, True))


def test_a_processor_has_none_of_it_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cuda.usable.__wrapped__(torch.device("cpu"))
        assert not cuda.usable.__wrapped__(torch.device("meta"))


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_have_none_of_it(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert not cuda.usable.__wrapped__(torch.device("cuda"))


def test_missing_bindings_are_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for module in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.warns(UserWarning, match="pip install cuda-bindings"):
        assert not cuda.usable.__wrapped__(torch.device("cuda"))


@needs_nvrtc
def test_the_compilers_words():
    """Of a K that 16 warps cannot share."""
    with pytest.raises(RuntimeError, match=r"linear.cu with {'K': 100, .*(?s:.*)static assertion"):
        cuda.cubin("linear.cu", (("K", 100), ("FP8", 0), ("GROUP_ROWS", 64)))


# ---- which shapes they have


@pytest.mark.parametrize(
    ("hidden", "inter", "tokens", "top_k", "fits"),
    [
        *((4096, 2048 // tp, 8, 8, True) for tp in (1, 2, 4, 8)),  # MiMo-V2.5 Flash
        *((6144, 2048 // tp, 8, 8, True) for tp in (1, 2, 4, 8)),  # and Pro
        (4096, 512, 9, 8, False),  # Triton up to 16
        (4096, 512, 8, 9, False),
        (4096, 384, 8, 8, False),  # three pages are no whole number of chunks
        (14336, 512, 8, 8, False),  # activations fill more than the shared memory
        (576, 1536, 8, 2, False),  # SmolLM2-135M
    ],
)
def test_shapes_of_experts(hidden, inter, tokens, top_k, fits):
    experts = bench.synthetic_experts(bench.Geometry("", hidden, inter, 16, top_k), 1, "meta")
    assert moe_cuda.fits(experts, tokens, top_k) is fits


@pytest.mark.parametrize(
    ("n", "k", "fp8", "tokens", "fits"),
    [
        (3712, 4096, True, 8, True),  # QKV of Flash at TP 4
        (3392, 6144, True, 8, True),  # of Pro at TP 8
        (4096, 2048, False, 1, True),  # O
        (3712, 4096, True, 9, False),
        (14848, 4096, True, 8, False),  # QKV of Flash at TP 1, and the head at TP 4: Triton streams better
        (38144, 4096, False, 8, False),
        (960, 576, False, 8, False),  # SmolLM2-135M
        (576, 1536, False, 8, True),  # but its last product of an MLP is 3 loads a warp
        (4096, 512, True, 8, False),  # half a load
    ],
)
def test_shapes_of_products(n, k, fp8, tokens, fits):
    weight = linear.Fp8Weight(bf16(n, k), bf16(1)) if fp8 else bf16(n, k)
    assert linear_cuda.fits(weight, tokens) is fits


def test_shapes_of_routers():
    assert [router_cuda.fits(hidden) for hidden in (4096, 6144, 1024, 576, 1536)] == [True, True, True, False, False]


def test_shapes_of_norms():
    assert [norm_cuda.fits(columns) for columns in (4096, 6144, 1024, 8192, 576, 1536)] == 4 * [True] + 2 * [False]
    assert [norm_cuda.fits(4096, cluster) for cluster in norm_cuda.CLUSTERS] == 4 * [True]
    assert [norm_cuda.fits(6144, cluster) for cluster in norm_cuda.CLUSTERS] == [False] + 3 * [True]  # 1536 threads


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"heads": 128, "groups": 8}, True),
        ({"heads": 6}, False),  # 16 rows are no whole number of tokens of 3 heads
        ({"heads": 9, "groups": 3}, False),  # SmolLM2-135M
        ({"count": 9, "slots": 256}, False),
        ({"slots": 134}, False),  # less than the window and the new rows
        ({"slots": 264}, False),
        ({"k_dim": 64, "v_dim": 64, "half": 32}, False),
        ({"half": 16}, False),
    ],
)
def test_shapes_of_attention(change, fits):
    case = {"heads": 16, "groups": 2, "k_dim": 192, "v_dim": 128, "half": 32, "slots": 136, "count": 8} | change
    assert window_cuda.fits(*_projected(case), case["count"], WINDOW) is fits


def _projected(case):
    """qkv, cos, keys, values."""
    groups, k_dim, v_dim, rows = case["groups"], case["k_dim"], case["v_dim"], case["count"]
    qkv = bf16(rows, (case["heads"] + groups) * k_dim + groups * v_dim)
    return qkv, bf16(rows, case["half"]), bf16(groups, case["slots"], k_dim), bf16(groups, case["slots"], v_dim)


# ---- their machine code


# Instructions a weight in the shortest loop of the second product, by pages of a row. Where a row is more than one
# chunk of four pages that loop is a chunk; else it is a whole turn, with its copies and stores.
DOWN = {16: 2.6, 8: 2.6, 4: 3.0, 2: 3.4}


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize(("name", "tp"), SHARES)
def test_machine_code_of_experts(name, tp, launched):
    """Four instructions a weight is what a GPU has at full speed; 2.6 leave it time for memory. Rows are read before
    the wait, nothing else.

    `experts` releases in the last turn of a block; a block without any ends, which is the same.
    """
    g = GEOMETRIES[name]
    packed = bench.synthetic_experts(g, tp, "meta")
    ids, weights = (torch.empty(ROWS, g.top_k, dtype=t, device="meta") for t in (torch.int32, torch.float32))
    assert moe_cuda.fits(packed, ROWS, g.top_k)
    experts, combine = launched(lambda: moe_cuda.moe(bf16(ROWS, g.hidden), ids, weights, packed))
    code, pages = machine(experts), packed.padded[1] // 128
    assert code.registers <= 128
    assert early(code) == g.hidden // 8 * ROWS // 512 * ["LDG.E.NA.128"]  # of 512 threads
    weights_a_lane = dict(experts.shapes)["AHEAD"] * 16 * 128 / 32
    up, *others = sorted(code.loops(), key=lambda loop: (loop[0].at, len(loop)))[1:]  # the first are the items
    down = min((loop for loop in others if loop[0].at > up[-1].at), key=len)
    assert len(up) / weights_a_lane <= 2.6
    assert len(down) / weights_a_lane <= DOWN[pages]
    for loop in (up, down):
        assert sum(i.op.startswith("HMMA") for i in loop) == weights_a_lane / 8
    code = machine(combine)
    assert always_releases(code) and not early(code)
    # The same with the choice in it, before which the bias is read, and the position that says which.
    logits = torch.empty(ROWS, g.experts, device="meta")
    steering = Router(logits, torch.empty(9, g.experts, device="meta"), g.top_k, normalise=True)
    positions = torch.empty(ROWS, dtype=torch.int64, device="meta")
    (chosen,) = launched(lambda: moe_cuda.routed(bf16(ROWS, g.hidden), logits, steering, positions, packed))
    code = machine(chosen)
    assert code.registers <= 128
    loads = (1 + -(-g.experts // 32)) * ["LDG.E"] + g.hidden // 8 * ROWS // 512 * ["LDG.E.NA.128"]
    assert sorted(early(code)) == loads


def _products():
    for name, tp in SHARES:
        for matrix, n, k, is_fp8 in bench.matrices(GEOMETRIES[name], tp):
            codes = torch.empty(n, k, dtype=torch.float8_e4m3fn if is_fp8 else torch.bfloat16, device="meta")
            weight = linear.Fp8Weight(codes, torch.empty(-(-n // 64), k // 128, device="meta")) if is_fp8 else codes
            if linear_cuda.fits(weight, ROWS):
                yield pytest.param(weight, id=f"{name}-{tp}-{matrix}")


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize("weight", [*_products()])
def test_machine_code_of_products(weight, launched):
    """The loads of a thread's first step, which is all of its weights on a rank of four or eight of Flash, stand before
    the wait; nothing else does."""
    (kernel,) = launched(lambda: linear_cuda.linear(bf16(ROWS, weight.shape[1]), weight))
    code, is_fp8 = machine(kernel), isinstance(weight, linear.Fp8Weight)
    assert code.registers <= 128 and always_releases(code)
    units = weight.shape[1] // (16 * (64 if is_fp8 else 32))  # loads of a warp's share of a row
    step = next(n for n in (4, 3, 2, 1) if units % n == 0)
    assert sorted(early(code)) == step * is_fp8 * ["LDG.E"] + step * 4 * ["LDG.E.NA.128"]
    weights = [i for i in code.code if i.op == "LDG.E.NA.128"]
    assert len(weights) == (1 if units == step else 2) * step * 4  # again in the loop, for the next step


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize("name", GEOMETRIES)
def test_machine_code_of_routers(name, launched):
    """All weights are asked for before the wait, and nothing else is. The release comes after it: it is a border."""
    g = GEOMETRIES[name]
    router = torch.empty(g.experts, g.hidden, device="meta")
    (kernel,) = launched(lambda: router_cuda.logits(bf16(ROWS, g.hidden), router))
    code = machine(kernel)
    assert code.registers <= 128 and always_releases(code) and borders(code)
    assert early(code) == [i.op for i in code.code if i.op == "LDG.E.NA.128"] == g.hidden // 1024 * ["LDG.E.NA.128"]


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("slots", [136, 144])
@pytest.mark.parametrize(("name", "tp"), SHARES)
def test_machine_code_of_attention(name, tp, slots, sink, launched):
    """The ring, the position and the sinks of a thread's two rows are asked for before the wait: keys by loads, values
    by copies. The release comes after it."""
    a = next(a for a in GEOMETRIES[name].attention if a.window).local(tp)
    case = {"heads": a.heads, "groups": a.kv_heads, "k_dim": a.k_dim, "v_dim": a.v_dim, "half": a.rotated // 2}
    qkv, cos, keys, values = _projected(case | {"slots": slots, "count": ROWS})
    assert window_cuda.fits(qkv, cos, keys, values, ROWS, a.window)
    start = torch.empty((), dtype=torch.int64, device="meta")
    sinks = torch.empty(a.heads, device="meta") if sink else None
    kw = {"scale": 0.1, "sink": sinks, "value_scale": 1.0}
    (kernel,) = launched(lambda: window_cuda.attend(qkv, cos, cos, keys, values, start, ROWS, a.window, **kw))
    code = machine(kernel)
    assert always_releases(code) and borders(code)
    keys_of_a_warp = -(-slots // 8 // 8)  # tiles of 8; 16 bytes of every 32 elements
    loads = keys_of_a_warp * a.k_dim // 32 * ["LDG.E.NA.128"]
    assert sorted(early(code)) == (1 + 2 * sink) * ["LDG.E"] + loads + ["LDGSTS.E.BYPASS.128"]


def one_trip(code, cluster):
    """Whether what blocks of a cluster give to each other needs no fence, which would wait for all writes, and one
    store a warp; all arrive at the cluster, and wait there, once."""
    assert not code.named("MEMBAR") and not code.named("ERRBAR")
    assert len(code.named("UCGABAR_ARV")) == len(code.named("UCGABAR_WAIT")) == len(code.named("STAS")) == 1
    assert code.named("UCGABAR_ARV")[0] < code.named(WAIT)[0] < code.named("UCGABAR_WAIT")[0] < code.named("STAS")[0]
    return code.shared >= cluster * 4


def asked_together(code, count):
    """Whether the first `count` accesses to memory after the wait are loads, and nothing is computed before the last:
    so that there is one wait for memory."""
    (wait,) = code.named(WAIT)
    ops = [i.op for i in code.code[wait + 1 :]]
    last = [i for i, op in enumerate(ops) if op.startswith("LDG")][count - 1]
    return not any(op.startswith(("FADD", "FMUL", "FFMA", "F2FP", "HADD2", "STG", "BAR", "SHFL")) for op in ops[:last])


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize("cluster", [4, norm_cuda.CLUSTER])
@pytest.mark.parametrize(("parts", "dtype"), [(0, None), (1, torch.bfloat16), (8, torch.float32), (16, torch.float32)])
@pytest.mark.parametrize("columns", [4096, 6144, 8192])
def test_machine_code_of_norms(columns, parts, dtype, cluster, launched):
    """The weight is asked for before the wait, all else together after it."""
    update = torch.empty(parts, ROWS, columns, dtype=dtype, device="meta") if parts else None
    (kernel,) = launched(
        lambda: norm_cuda.add_rms_norm(bf16(ROWS, columns), update, bf16(columns), 1e-5, cluster=cluster)
    )
    code = machine(kernel)
    assert code.registers <= 96 and always_releases(code) and early(code) == ["LDG.E.NA.64"]
    assert len(code.named("LDG")) == 1 + 1 + parts and asked_together(code, 1 + parts)
    assert len(code.named("STG")) == 1 + (parts > 0) and one_trip(code, cluster)


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize("parts", [0, 8])
@pytest.mark.parametrize(("ranks", "columns"), [(2, 4096), (4, 4096), (8, 4096), (4, 6144), (8, 6144), (8, 8192)])
def test_machine_code_of_sums_with_norms(ranks, columns, parts, launched):
    """Payload and flag in one access of 16 bytes at system scope, all sends before all polls, and no other wait for
    memory between the loads and the sends."""
    channel = allreduce.open_channel(0, [0] * ranks, allreduce.capacity(columns), 1.0, "meta")
    x = torch.empty(ROWS, parts, columns, device="meta").transpose(0, 1) if parts else bf16(ROWS, columns)
    (kernel,) = launched(
        lambda: norm_cuda.all_reduce_add_norm(x, bf16(ROWS, columns), bf16(columns), 1e-5, channel=channel)
    )
    code = machine(kernel)
    assert code.registers <= 96 and always_releases(code) and early(code) == ["LDG.E.NA.64"]
    sends, polls = ([i for i, c in enumerate(code.code) if c.op == f"{op}.E.128.STRONG.SYS"] for op in ("STG", "LDG"))
    assert len(sends) == len(polls) == ranks and max(sends) < min(polls)
    assert all("STRONG" not in c.op for i, c in enumerate(code.code) if i not in sends + polls)
    loads = max(parts, 1) + 3 + ranks + 1  # the residual, an epoch, a failure, and where the buffers are
    assert len(code.named("LDG")) == 1 + loads + ranks and asked_together(code, loads)
    assert not code.named("ATOM") and not code.named("RED") and one_trip(code, norm_cuda.CLUSTER)
