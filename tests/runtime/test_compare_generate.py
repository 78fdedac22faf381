"""The comparison with transformers' `generate`, on a tiny model: the peer is the same model, and all arms are timed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.runtime.conftest import drafter_folder, reference_folder


@pytest.fixture
def script():
    path = Path(__file__).parents[2] / "scripts/compare_generate.py"
    spec = importlib.util.spec_from_file_location("compare_generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UPCYCLED = {
    "hybrid_layer_pattern": [0] * 4,
    "sliding_window": None,
    "sliding_window_size": None,
    "add_swa_attention_sink_bias": False,
    "partial_rotary_factor": 1.0,
    "attention_value_scale": None,
}


@pytest.mark.parametrize("changes", [{"swa_num_key_value_heads": 4}, UPCYCLED], ids=["windows", "upcycled"])
def test_arms_are_timed_on_the_same_model(tmp_path, tiny_config, make_model, script, monkeypatch, capsys, changes):
    config = tiny_config | changes
    folder = reference_folder(tmp_path / "model", config, make_model(config))
    drafter_folder(folder / "dflash", config)
    monkeypatch.setattr(script, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(script, "encode", lambda tokenizer, text: [ord(c) % 500 for c in text[:20]])
    out = tmp_path / "out.json"
    command = ["compare_generate.py", folder, "--reference", folder, "--limit", 1, "--max_new_tokens", 6]
    command += ["--dtype", "float32", "--device", "cpu", "--max_len", 256, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(c) for c in command])
    script.main()
    document = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert document["peer_logit_difference"] < 1e-4
    rates = document["tokens_per_s"]
    assert set(rates) == {"runtime", "runtime with drafter", "generate", "generate, static"} and min(rates.values()) > 0
    assert document["records"][0]["name"] == "speedup_vs_transformers"


def test_a_model_that_the_peer_cannot_hold_is_refused(tmp_path, tiny_config, make_model, script):
    config = tiny_config | {"swa_num_key_value_heads": tiny_config["num_key_value_heads"]}
    folder = reference_folder(tmp_path / "model", config, make_model(config))
    with pytest.raises(ValueError, match="mimo_v2_flash has other weights"):
        script.peer(str(folder), script.DTYPES["float32"], "cpu")
