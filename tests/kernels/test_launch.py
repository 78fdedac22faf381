"""Programmatic dependent launch: the keywords, and where compiled kernels wait (the rules are in `launch`).

Whether the chain of kernels is right on a GPU, tests/gpu/test_launch_order_gpu.py says.
"""

import re

import pytest
import torch

from tests.kernels.triton_tools import compile_for_sm90, compiled_for_sm90, needs_tools, outside

pytest.importorskip("triton")

WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
MEMORY = re.compile(r"\b(?:ld|st|atom|red)\.(?:\w+\.)*?global|\bld\.(?:v\d\.)?[bsuf]\d+\b|\bcp\.async\.(?!wait|commit)")
# Of SASS. Constants (LDC, ULDC) are the arguments; LDS and STS are shared memory.
ACCESS = re.compile(r"LDG|LD\.|STG|ST\.|LDGSTS|ATOM|RED\.|UBLKCP|UTMA")


def _attend(window, splits):
    pointers = dict.fromkeys(("Q", "KEYS", "VALUES"), "*bf16") | dict.fromkeys(("START", "DEPTHS"), "*i64")
    pointers |= {"OUT": "*fp32" if splits > 1 else "*bf16", "STATS": "*fp32", "SINK": "*fp32", "ANCESTORS": "*u8"}
    constants = {
        "GROUP": 8, "HEAD": 128, "TAIL": 64, "V": 128, "WINDOW": window, "TREE": False, "HAS_SINK": True,
        "MAX_TOKENS": 16, "SPLITS": splits, "BM": 64, "BN": 64, "AHEAD": 144 if window else 0,
    }  # fmt: skip
    return ("attention", "_attend_kernel", pointers | {"scale": "fp32"}, constants, 4, 3)


def _linear(fp8):
    pointers = {"OUT": "*fp32", "W": "*u8" if fp8 else "*bf16", "SCALES": "*fp32" if fp8 else "*bf16", "X": "*bf16"}
    constants = {
        "K": 4096, "FP8": fp8, "GROUP": 64, "BM": 64, "BN": 8, "BK": 128, "PTX": True, "LINES": 4 if fp8 else 8,
    }  # fmt: skip
    return ("linear", "_linear_kernel", pointers, constants, 2 if fp8 else 4, 4)


def _heads():
    pointers = dict.fromkeys(("Q", "KEYS", "VALUES", "QKV", "COS", "SIN", "Q_NORM", "K_NORM"), "*bf16")
    constants = {
        "N": 16, "G": 2, "K": 192, "V": 128, "HALF": 32, "HALF_BLOCK": 32, "REST": 128, "K_BLOCK": 256, "V_BLOCK": 128,
        "NORM": False, "RING": True,
    }  # fmt: skip
    types = pointers | {"START": "*i64", "value_scale": "fp32", "eps": "fp32"}
    return ("heads", "_split_heads_kernel", types, constants, 1, 3)


def _allreduce(fused):
    from mimo_kernels import allreduce
    from mimo_kernels.allreduce_triton import receive_ptx

    types = dict.fromkeys(("OUT", "NORMED", "X", "RESIDUAL", "WEIGHT", "PEERS"), "*i64")
    types |= dict.fromkeys(("EPOCHS", "FAILED", "FAILED_HOST"), "*i32")
    constants = {
        "RANKS": 4, "CAPACITY": 16384, "SPACE": allreduce.CELL, "RECEIVE": receive_ptx(4, 16384 * 16), "PHASE": 0,
    } | ({"PER_ROW": 1024, "BLOCK": 1024, "PARTS": 8} if fused else {})  # fmt: skip
    name = "_sum_add_norm_kernel" if fused else "_sum_kernel"
    return ("allreduce", name, types | {"cycles": "i64", "eps": "fp32"}, constants, 32 if fused else 4, 3)


WORDS = {"W": "*i16", "S": "*u8", "LIST": "*i16", "COMBINE": "*fp32", "HIDDEN": "*bf16"}
TILE = {"BM": 64, "BN": 8, "BK": 256, "PTX": True}
CHOICE = {
    "E": 256, "BLOCK": 256, "SLICES": 8, "TOP_K": 8, "K_BLOCK": 8, "NORMALISE": True, "PLACED": False,
}  # fmt: skip
JOIN = {"V": 128, "HAS_SINK": True, "SPLITS": 64, "BN": 64, "VB": 32}
ROUTED = {"WEIGHTS": "*fp32", "IDS": "*i32"}
# module, kernel, types, constants, warps, stages, whether it prefetches: all of a layer
KERNELS = [
    (*_linear(True), True),
    (*_linear(False), True),
    (*_heads(), False),
    (*_attend(128, 1), True),
    (*_attend(0, 64), False),
    ("attention", "_join_kernel",
     {"OUT": "*bf16", "PARTS": "*fp32", "STATS": "*fp32", "START": "*i64", "SINK": "*fp32"}, JOIN, 4, 3, False),
    ("residual", "_add_rms_norm_kernel",
     dict.fromkeys(("SUM", "NORMED", "X", "UPDATE", "WEIGHT"), "*bf16") | {"eps": "fp32"},
     {"H": 4096, "PARTS": 1, "BLOCK": 4096}, 16, 3, True),
    ("swiglu", "_silu_mul_kernel", {"OUT": "*bf16", "X": "*bf16"},
     {"COLUMNS": 4096, "BLOCK": 512, "LIBRARY": True}, 4, 3, False),
    ("rows", "_begin_kernel",
     dict.fromkeys(("POSITIONS", "START", "TOKENS"), "*i64")
     | dict.fromkeys(("ROTATED", "ROWS", "TABLE", "EMBED"), "*bf16"),
     {"H": 4096, "HALF": 32, "COUNT": 4, "HALF_BLOCK": 32, "COUNT_BLOCK": 4, "BLOCK": 1024}, 4, 3, False),
    ("choice", "_best_kernel", {"PAIRS": "*i64", "LOGITS": "*bf16"}, {"COLUMNS": 38144, "BLOCK": 4096}, 4, 3, False),
    ("choice", "_accept_kernel",
     dict.fromkeys(("ANCHOR", "POSITION", "LEFT", "TURN", "RECORD", "RECORDS", "SLOT", "OWN", "DRAFTS"), "*i64")
     | {"STOPS": "*u8"}, {"ROWS": 8, "PARTS": 64}, 1, 3, False),
    ("router", "_logits_kernel", {"PARTS": "*fp32", "X": "*bf16", "W": "*fp32"},
     {"E": 256, "H": 4096, "BE": 4, "BH": 512, "GROUP": 8}, 1, 3, True),
    ("router", "_choose_kernel",
     ROUTED | {"PARTS": "*fp32", "BIAS": "*fp32", "POSITIONS": "*i32", "scaling": "fp32"}, CHOICE, 1, 3, True),
    ("moe", "_prepare_kernel", WORDS | ROUTED | {"OUT": "*bf16", "X": "*bf16"},
     {"K": 4096, "TOP_K": 8, "P": 64, "BN": 8, "SLOTS": 16}, 4, 3, False),
    ("moe", "_gate_up_kernel", WORDS | {"X": "*bf16"}, TILE | {"K": 4096, "ROWS": 1024}, 4, 4, False),
    ("moe", "_down_kernel", WORDS | {"OUT": "*fp32"}, TILE | {"K": 512, "ROWS": 4096}, 4, 4, False),
    ("moe", "_sum_kernel", {"OUT": "*bf16", "PARTS": "*fp32"}, {"COUNT": 8, "N": 256}, 4, 3, False),
    (*_allreduce(False), False),
    (*_allreduce(True), True),
]  # fmt: skip


def _kernel(module, name):
    import importlib

    return getattr(importlib.import_module(f"mimo_kernels.{module}_triton"), name)


@outside
@needs_tools
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: f"{case[0]}{case[1]}")
def test_nothing_is_read_or_written_before_the_wait(case):
    """One release and one wait, in this order (in the other in a border) and before every access to memory but the
    prefetches, in the code of both levels: neither Triton nor the assembler moved anything. (Kernels in CUDA C++ may
    load some things early: test_cuda.)"""
    module, name, types, constants, warps, stages, prefetches = case
    kernel = _kernel(module, name)
    types = {k: v for k, v in types.items() if k in kernel.arg_names}
    ptx = compiled_for_sm90(kernel, types, constants, warps, stages).asm["ptx"]
    assert ptx.count(WAIT) == ptx.count(RELEASE) == 1
    border = name in ("_begin_kernel", "_logits_kernel")
    first, second = (WAIT, RELEASE) if border else (RELEASE, WAIT)
    before, after = ptx.split(first)
    between, after = after.split(second)
    assert not MEMORY.search(before) and not MEMORY.search(between) and MEMORY.search(after)
    assert "bra" not in re.sub(r"//.*", "", before)  # no program goes around it
    assert ("prefetch.global.L2" in before) == prefetches and "prefetch" not in after
    code, *_ = compile_for_sm90(kernel, types, constants, warps, stages)
    ops = [op for _, op, _ in code]
    (wait,), (release,) = ([i for i, op in enumerate(ops) if op.startswith(o)] for o in ("ACQBULK", "PREEXIT"))
    accesses = [i for i, op in enumerate(ops) if ACCESS.match(op)]
    assert (wait < release if border else release < wait) and max(wait, release) < accesses[0]
    assert not any(op.startswith(("BRA", "EXIT", "BAR")) for op in ops[: max(wait, release)])
    asked = [i for i, op in enumerate(ops) if op.startswith("CCTL")]
    assert bool(asked) == prefetches and all(i < wait for i in asked)


@outside
@needs_tools
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: f"{case[0]}{case[1]}")
def test_off_leaves_no_trace(case):
    module, name, types, constants, warps, stages, _ = case
    kernel = _kernel(module, name)
    types = {k: v for k, v in types.items() if k in kernel.arg_names}
    ptx = compiled_for_sm90(kernel, types, constants | {"PDL": False}, warps, stages).asm["ptx"]
    assert "griddepcontrol" not in ptx and "prefetch" not in ptx


@outside
def test_every_kernel_of_a_step_is_listed():
    """All kernels of the modules of a decode step; those in CUDA C++ are in test_cuda."""
    import importlib

    import triton

    for module in (
        "linear",
        "heads",
        "attention",
        "residual",
        "swiglu",
        "choice",
        "rows",
        "router",
        "moe",
        "allreduce",
    ):
        loaded = importlib.import_module(f"mimo_kernels.{module}_triton")
        names = {n for n, f in vars(loaded).items() if isinstance(f, triton.JITFunction) and n.endswith("_kernel")}
        of_prompts = {"_unpack_kernel"}
        assert names - of_prompts == {case[1] for case in KERNELS if case[0] == module}


@outside
def test_keywords(monkeypatch):
    from mimo_kernels import launch

    assert launch.dependent(torch.empty(1)) == {"PDL": False}
    for value, on in (("0", False), ("1", True)):
        monkeypatch.setenv("MIMO_KERNELS_PDL", value)
        assert launch.switched_on.__wrapped__() is on
    monkeypatch.delenv("MIMO_KERNELS_PDL")
    assert launch.switched_on.__wrapped__()


@outside
def test_how_much_is_prefetched():
    """A slice of K of QKV and O of MiMo-V2.5 at TP 4 whole, of a head the first four steps."""
    from mimo_kernels import launch

    assert launch.prefetched_lines(64, 512) == 4
    assert launch.prefetched_lines(64, 1024) == 8
    assert launch.prefetched_lines(64, 8192) == 8
    assert launch.prefetched_lines(64, 768) == 6
