"""scripts/compare_modelopt.py: hand-worked comparisons, a run on the CPU, and ModelOpt itself where it is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimo_kernels import mxfp4

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_modelopt.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_modelopt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed(tmp_path):
    """12 training rows and 4 held-out rows of 32 tokens in two documents, the last four positions padding."""
    documents = torch.tensor([0] * 20 + [1] * 8 + [-1] * 4)
    tensors = {}
    for part, rows in (("train", 12), ("held_out", 4)):
        generator = torch.Generator().manual_seed(rows)
        tensors[f"{part}.input_ids"] = torch.randint(0, 500, (rows, 32), generator=generator, dtype=torch.int32)
        tensors[f"{part}.loss_mask"] = torch.ones(rows, 32, dtype=torch.uint8)
        tensors[f"{part}.doc_ids"] = documents.short().expand(rows, 32).clone()
    save_file(tensors, tmp_path / "packed.safetensors")
    return tmp_path / "packed.safetensors"


def compare(script, monkeypatch, folder, packed, *variants):
    """The script's document for three steps of four rows."""
    out = folder.parent / "compared.json"
    arguments = ["--model", folder, "--data", packed, "--out", out, "--steps", 3, "--batch", 4, "--device", "cpu"]
    arguments += ["--learning_rate", 1e-3, "--variants", *variants]
    monkeypatch.setattr("sys.argv", ["compare_modelopt.py", *map(str, arguments)])
    script.main()
    return json.loads(out.read_text())


def test_compare_weights_by_hand(script):
    trained = torch.ones(2, 64)  # four blocks; squares add up to 128
    read = trained.clone()
    read[0, 3] = 3.0
    read[0, 5] = 1.5
    read[1, 40] = 0.0
    found = script.compare_weights({"w": trained}, {"w": read})
    assert found == {
        "elements_differing": 3 / 128,
        "blocks_differing": 2 / 4,
        "relative_squared_error": (4 + 0.25 + 1) / 128,
    }


def test_read_experts_joins_gate_and_up(script):
    generator = torch.Generator().manual_seed(0)
    fused = mxfp4.snap(torch.randn(3, 8, 32, generator=generator))
    stored = {}
    for expert, matrix in enumerate(fused):
        for name, half in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True):
            key = f"layers.0.mlp.experts.{expert}.{name}.weight"
            stored[key], stored[key + "_scale"] = mxfp4.encode(half)
    assert torch.equal(script.read_experts(stored, "layers.0.mlp.experts.gate_up_proj"), fused)


def test_snapped_copy_exports_what_it_trained(script, monkeypatch, bf16_folder, packed):
    result = compare(script, monkeypatch, bf16_folder.path, packed, "snapped_even")["snapped_even"]
    assert "error" not in result and "export_error" not in result
    assert result["tokens"] == 3 * 4 * 28
    assert len(result["train_kl"]) == 3 and result["codes_changed"] > 0
    assert result["export"]["elements_differing"] == 0
    assert result["held_out"]["trained"] == result["held_out"]["exported"]
    assert result["held_out"]["ptq"]["tokens"] == 4 * 28


def test_modelopt_trains_the_same_and_exports_something_else(script, monkeypatch, bf16_folder, packed):
    """With the rceil rule and ties to even in place of its CUDA kernel, ModelOpt over FP32 takes the same steps."""
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.quantization import tensor_quant

    class Kernel:
        class Types:
            E2M1 = E8M0 = None

        @staticmethod
        def fused_amax_convert(weight, block_size, *_):
            assert block_size == mxfp4.BLOCK
            return mxfp4.snap(weight, "rceil").to(weight.dtype)

    monkeypatch.setattr(tensor_quant, "get_cuda_ext_mx", lambda **_: Kernel)
    document = compare(script, monkeypatch, bf16_folder.path, packed, "snapped_rceil", "modelopt_fp32")
    ours, theirs = document["snapped_rceil"], document["modelopt_fp32"]
    assert "error" not in theirs and "export_error" not in theirs
    assert theirs["quantizers_enabled"] == theirs["expert_matrices"]
    assert theirs["experts_implementation"] == "eager"
    assert theirs["train_kl"] == pytest.approx(ours["train_kl"], rel=1e-3)
    assert theirs["export"]["elements_differing"] > 0  # ties toward zero


def test_an_exception_is_a_result(script, monkeypatch, bf16_folder, packed):
    """Without ModelOpt the reason is in the document."""
    monkeypatch.setitem(sys.modules, "modelopt", None)
    result = compare(script, monkeypatch, bf16_folder.path, packed, "modelopt_fp32")["modelopt_fp32"]
    assert "ModuleNotFoundError" in result["error"] and "modelopt" in result["error"]
