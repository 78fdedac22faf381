"""Golden bytes, safetensors' own serialiser as the oracle, and what happens when something is wrong."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from mimo_qat.checkpoint.folder import TORCH_DTYPES
from mimo_qat.checkpoint.layout import TensorSpec, default_drafter_config, drafter_tensors, target_tensors
from mimo_qat.checkpoint.reader import Checkpoint, read_drafter
from mimo_qat.checkpoint.writer import FileWriter, write_bf16_folder, write_drafter, write_tensors

FILE = "x.safetensors"


def spec(name, dtype, *shape):
    return TensorSpec(name, dtype, shape, FILE)


def test_golden_bytes_of_a_tiny_shard(tmp_path):
    # Two codes in a byte, their scale, a BF16 pair, and an F32 that comes first because files go by dtype, then name.
    specs = [spec("e.weight", "U8", 1, 2), spec("e.weight_scale", "U8", 1, 1)]
    specs += [spec("n", "BF16", 2), spec("z", "F32", 1)]
    with FileWriter(tmp_path / FILE, specs) as writer:
        writer.write("n", torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
        writer.write("e.weight_scale", torch.tensor([[127]], dtype=torch.uint8))
        writer.write("z", torch.tensor([1.5]))
        writer.write("e.weight", torch.tensor([[0x21, 0x7F]], dtype=torch.uint8))
    header = (
        '{"__metadata__":{"format":"pt"},'
        '"z":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"n":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]},'
        '"e.weight":{"dtype":"U8","shape":[1,2],"data_offsets":[8,10]},'
        '"e.weight_scale":{"dtype":"U8","shape":[1,1],"data_offsets":[10,11]}}'
    )
    header = header.encode("ascii")
    header += b" " * (-len(header) % 8)
    payload = bytes.fromhex("0000c03f" + "803f00c0" + "217f" + "7f")
    assert (tmp_path / FILE).read_bytes() == struct.pack("<Q", len(header)) + header + payload


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abé.10", min_size=1, max_size=6),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(1, 4), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_bytes_are_those_of_safetensors(tmp_path_factory, table, with_metadata):
    metadata = {"format": "pt"} if with_metadata else None
    specs = [spec(name, dtype, *shape) for name, (dtype, shape) in table.items()]
    generator = torch.Generator().manual_seed(len(table))
    tensors = {
        s.name: torch.randint(0, 100, (s.nbytes,), dtype=torch.uint8, generator=generator)
        .view(TORCH_DTYPES[s.dtype])
        .reshape(s.shape)
        for s in specs
    }
    path = tmp_path_factory.mktemp("w") / FILE
    with FileWriter(path, specs, metadata) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert path.read_bytes() == save(tensors, metadata)


def test_complete_file_is_recognised(tmp_path):
    specs = [spec("a", "BF16", 4), spec("b", "F32", 2)]
    writer = FileWriter(tmp_path / FILE, specs)
    assert not writer.is_complete()
    with writer:
        writer.write("a", torch.ones(4, dtype=torch.bfloat16))
        writer.write("b", torch.ones(2))
    assert FileWriter(tmp_path / FILE, specs).is_complete()
    assert not FileWriter(tmp_path / FILE, specs, {"format": "np"}).is_complete()
    assert not FileWriter(tmp_path / FILE, [spec("a", "BF16", 4), spec("c", "F32", 2)]).is_complete()
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-1])
    assert not FileWriter(tmp_path / FILE, specs).is_complete()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.zeros(4), "a is F32 .4., the layout says BF16 .4."),
        ("a", torch.zeros(2, 2, dtype=torch.bfloat16), "a is BF16 .2, 2., the layout says"),
        ("a", torch.zeros(4, dtype=torch.int64), "a is torch.int64"),
        ("b", torch.zeros(4), "tensor b is not in the layout"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_left(tmp_path, name, tensor, message):
    with pytest.raises(ValueError, match=message), FileWriter(tmp_path / FILE, [spec("a", "BF16", 4)]) as writer:
        writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_comes_once(tmp_path):
    specs = [spec("a", "F32", 1), spec("b", "F32", 1)]
    with pytest.raises(ValueError, match="a was written before"), FileWriter(tmp_path / FILE, specs) as writer:
        writer.write("a", torch.zeros(1))
        writer.write("a", torch.zeros(1))
    gap = pytest.raises(ValueError, match="1 tensors were not given, the first b")
    with gap, FileWriter(tmp_path / FILE, specs) as writer:
        writer.write("a", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not those of one file"):
        FileWriter(tmp_path / FILE, [spec("a", "F32", 1)] * 2)


def test_an_old_file_survives_a_failure(tmp_path):
    (tmp_path / FILE).write_bytes(b"old")
    with pytest.raises(RuntimeError), FileWriter(tmp_path / FILE, [spec("a", "F32", 1)]):
        raise RuntimeError
    assert (tmp_path / FILE).read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_file_of_a_folder_appears_when_one_tensor_lacks(tmp_path):
    specs = {s.name: s for s in (spec("a", "F32", 1), TensorSpec("b", "F32", (1,), "y.safetensors"))}
    for some in ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}):
        with pytest.raises(ValueError, match="not given"):
            write_tensors(tmp_path, specs, some)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="tensor c is not in the layout"):
        write_tensors(tmp_path, specs, {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)})


def test_bf16_folder_takes_pairs_in_any_order_and_callables(tmp_path, config, tensors_of):
    specs = target_tensors(config, experts="bf16", spine="bf16")
    tensors = tensors_of(specs)
    made = []

    def later(name):
        def make():
            made.append(name)
            return tensors[name]

        return make

    write_bf16_folder(tmp_path / "a", config | {"quantization_config": {}}, ((n, later(n)) for n in reversed(specs)))
    write_bf16_folder(tmp_path / "b", config, tensors)
    assert made == list(reversed(specs))
    for name in ("config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    held = load_file(tmp_path / "a" / "model-00001-of-00001.safetensors")
    assert all(torch.equal(held[n], t) for n, t in tensors.items()) and set(held) == set(tensors)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"save_format": "bf16", "total_size": sum(s.nbytes for s in specs.values())}


def test_shards_are_cut_at_the_limit(bf16_folder):
    files = sorted(p.name for p in bf16_folder.path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((bf16_folder.path / f).stat().st_size < 420_000 for f in files)
    read = Checkpoint(bf16_folder.path)
    assert all(torch.equal(read.raw(n), t) for n, t in bf16_folder.tensors.items())


def test_drafter_round_trip(drafter_folder):
    config, tensors, mask = read_drafter(drafter_folder.path)
    assert torch.equal(mask, drafter_folder.mask)
    assert set(tensors) == set(drafter_folder.tensors)
    assert all(torch.equal(tensors[n], t) for n, t in drafter_folder.tensors.items())
    assert config["is_causal"] is False and config["dflash_config"]["causal"] is False
    saved = torch.load(drafter_folder.path / "mask_embedding.pt", weights_only=True)
    assert set(saved) == {"mask_token_id", "embedding"} and saved["mask_token_id"] == 511
    header = (drafter_folder.path / "dflash_draft_model.safetensors").read_bytes()[8:60]
    assert b"__metadata__" not in header  # as published


def test_drafter_needs_a_finite_mask(tmp_path, config, tensors_of):
    draft = default_drafter_config(config, num_hidden_layers=1)
    tensors = tensors_of(drafter_tensors(draft))
    with pytest.raises(ValueError, match="mask embedding"):
        write_drafter(tmp_path, draft, tensors, torch.full((96,), float("nan")))
