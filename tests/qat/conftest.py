"""Tiny checkpoints on disk: a BF16 folder, a drafter, and the release that conversion makes of them."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest


def random_tensors(specs, seed=0, spread=0.05):
    """Random finite tensors of the layout's unquantised dtypes and shapes, the same for the same seed."""
    import torch

    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(spec.shape, generator=generator) * spread).to(dtypes[spec.dtype])
        for name, spec in specs.items()
    }


def write_tokenizer(folder, size):
    """The smallest tokenizer.json that has `size` ids."""
    vocabulary = {f"t{i}": i for i in range(size)}
    document = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.fixture
def config(tiny_config):
    """The tiny config with one MTP block."""
    return tiny_config | {"num_nextn_predict_layers": 1}


@pytest.fixture
def tensors_of():
    return random_tensors


_BUILT: dict = {}


@pytest.fixture
def built_once(tmp_path, tmp_path_factory):
    """built_once(name, build) runs build(path) once a session; returns (fresh copy of the folder, build's result)."""

    def get(name, build):
        if name not in _BUILT:
            path = tmp_path_factory.mktemp("built") / name
            _BUILT[name] = path, build(path)
        path, result = _BUILT[name]
        return shutil.copytree(path, tmp_path / name), result

    return get


@pytest.fixture
def bf16_folder(built_once, config):
    """A BF16 folder with experts off the grid: .path, .tensors, .config."""
    from mimo_qat.checkpoint.layout import target_tensors
    from mimo_qat.checkpoint.writer import write_bf16_folder

    def build(path):
        tensors = random_tensors(target_tensors(config, experts="bf16", spine="bf16"))
        write_bf16_folder(path, config, tensors, max_shard_bytes=400_000)
        write_tokenizer(path, 500)
        return tensors

    path, tensors = built_once("bf16", build)
    return SimpleNamespace(path=path, tensors=tensors, config=config)


@pytest.fixture
def drafter_folder(built_once, config):
    """A two-layer drafter for the tiny model: .path, .tensors, .config, .mask."""
    import torch

    from mimo_qat.checkpoint.layout import default_drafter_config, drafter_tensors
    from mimo_qat.checkpoint.writer import write_drafter

    draft = default_drafter_config(config, num_hidden_layers=2)
    mask = torch.linspace(-1, 1, config["hidden_size"]).bfloat16()

    def build(path):
        tensors = random_tensors(drafter_tensors(draft), seed=1)
        write_drafter(path, draft, tensors, mask)
        return tensors

    path, tensors = built_once("drafter", build)
    return SimpleNamespace(path=path, tensors=tensors, config=draft, mask=mask)


@pytest.fixture
def release(built_once, bf16_folder, drafter_folder):
    """The release of the two: .path, .source, .drafter, .result."""
    from mimo_qat.convert import ConvertConfig, main

    def build(path):
        return main(ConvertConfig(target=str(bf16_folder.path), drafter=str(drafter_folder.path), out=str(path)))

    path, result = built_once("release", build)
    return SimpleNamespace(path=path, source=bf16_folder, drafter=drafter_folder, result=result)


@pytest.fixture
def edit_json():
    """edit_json(path, {key: value or None}) changes the top level of a JSON file; None removes a key."""

    def edit(path, changes):
        document = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in document.items() if v is not None or k not in changes}))

    return edit


@pytest.fixture
def rewrite():
    """rewrite(folder, {name: tensor or None}) replaces or drops tensors of an indexed folder, index included."""

    def change(folder, changes):
        from safetensors.torch import load_file, save_file

        index_path = folder / "model.safetensors.index.json"
        index = json.loads(index_path.read_text())
        weight_map = index["weight_map"]
        first = sorted(set(weight_map.values()))[0]
        homes = {name: weight_map.get(name, first) for name in changes}
        for file in sorted(set(homes.values())):
            held = {k: v.clone() for k, v in load_file(folder / file).items()}
            for name in (n for n, home in homes.items() if home == file):
                held.pop(name, None)
                weight_map.pop(name, None)
                if changes[name] is not None:
                    held[name] = changes[name].contiguous()
                    weight_map[name] = file
            save_file(held, folder / file, metadata={"format": "pt"})
        index_path.write_text(json.dumps(index))

    return change


@pytest.fixture
def remote_code(tmp_path, monkeypatch):
    """Remote code is cached in a folder of the test, and no module of another test's cache is still there."""

    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("modules")])
    forget()
    yield
    forget()


def character_tokenizer():
    """One id a character, so that a tiny vocabulary can spell anything."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="\x00", unk_token="?")


@pytest.fixture
def learnable(tiny_model, tmp_path):
    """model/, a BF16 folder, and rows.jsonl, text that it can learn."""
    from mimo_qat.models.upcycle import save_bf16

    save_bf16(tiny_model, character_tokenizer(), tmp_path / "model")
    rows = [{"text": f"row {i}: " + "the quick brown fox jumps over the lazy dog. "[i % 7 :] * 3} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path
