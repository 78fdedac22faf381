"""Tiny checkpoints on disk: a BF16 folder, a drafter, and the release that conversion makes of them."""

import json
import shutil
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


@pytest.fixture
def bf16_folder(tmp_path, config):
    """A BF16 folder with experts off the grid: .path, .tensors, .config."""
    from mimo_qat.checkpoint.layout import target_tensors
    from mimo_qat.checkpoint.writer import write_bf16_folder

    path = tmp_path / "bf16"
    tensors = random_tensors(target_tensors(config, experts="bf16", spine="bf16"))
    write_bf16_folder(path, config, tensors, max_shard_bytes=400_000)
    write_tokenizer(path, 500)
    return SimpleNamespace(path=path, tensors=tensors, config=config)


@pytest.fixture
def drafter_folder(tmp_path, config):
    """A two-layer drafter for the tiny model: .path, .tensors, .config, .mask."""
    import torch

    from mimo_qat.checkpoint.layout import default_drafter_config, drafter_tensors
    from mimo_qat.checkpoint.writer import write_drafter

    path = tmp_path / "drafter"
    draft = default_drafter_config(config, num_hidden_layers=2)
    tensors = random_tensors(drafter_tensors(draft), seed=1)
    mask = torch.linspace(-1, 1, config["hidden_size"]).bfloat16()
    write_drafter(path, draft, tensors, mask)
    return SimpleNamespace(path=path, tensors=tensors, config=draft, mask=mask)


@pytest.fixture
def release(tmp_path, bf16_folder, drafter_folder):
    """The release of the two: .path, .source, .drafter, .result."""
    from mimo_qat.convert import ConvertConfig, main

    path = tmp_path / "release"
    result = main(ConvertConfig(target=str(bf16_folder.path), drafter=str(drafter_folder.path), out=str(path)))
    return SimpleNamespace(path=path, source=bf16_folder, drafter=drafter_folder, result=result)


@pytest.fixture
def edit_json():
    """edit_json(path, {key: value or None}) changes the top level of a JSON file; None removes a key."""

    def edit(path, changes):
        document = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

    return edit


@pytest.fixture
def rewrite():
    """rewrite(folder, {name: tensor or None}) replaces or drops tensors of an indexed folder, index included."""

    def change(folder, changes):
        from safetensors.torch import load_file, save_file

        index_path = folder / "model.safetensors.index.json"
        index = json.loads(index_path.read_text())
        for name, tensor in changes.items():
            path = folder / index["weight_map"].get(name, sorted(set(index["weight_map"].values()))[0])
            held = {k: v.clone() for k, v in load_file(path).items()}
            held.pop(name, None)
            index["weight_map"].pop(name, None)
            if tensor is not None:
                held[name] = tensor.contiguous()
                index["weight_map"][name] = path.name
            save_file(held, path, metadata={"format": "pt"})
        index_path.write_text(json.dumps(index))

    return change


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(folder) is a copy to damage."""

    def copy(folder):
        return shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}")

    return copy
