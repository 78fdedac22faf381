"""The same forward passes on a GPU; the CPU in float32 is the oracle."""

import pytest
import torch

from mimo_qat.checkpoint.reader import Checkpoint
from mimo_runtime import experts, staging
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.load import LoadConfig, load_target
from mimo_runtime.parallel import Ranks
from mimo_runtime.synthetic import tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPT = [(11 * i) % 512 for i in range(40)]


def test_logits_equal_those_of_the_cpu(release):
    cpu, gpu = (Engine(release, EngineConfig(device=d, dtype="float32", max_len=128)) for d in ("cpu", "cuda"))
    for chunk in (64, 7, 1):
        torch.testing.assert_close(gpu.logits(PROMPT, chunk).cpu(), cpu.logits(PROMPT), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("slot", [1000, 2**23])
def test_what_threads_read_has_the_bytes_of_the_files(release, monkeypatch, slot):
    """Through pinned buffers, small ones used again many times, while the stream still computes; columns as well."""
    monkeypatch.setattr(staging, "SLOT_BYTES", slot)
    mapped, reader = Checkpoint(release), staging.StagedCheckpoint(release, "cuda")
    busy, found = torch.ones(4096, 4096, device="cuda"), {}
    for name in mapped.names:
        shape = mapped.spec(name).shape
        busy = busy @ busy * 2**-12
        found[name] = reader.raw(name)
        if len(shape) == 2 and shape[1] > 1:
            found[name, "columns"] = reader.box(name, range(shape[0]), range(shape[1] // 2))
    reader.close()
    for key, tensor in found.items():
        name, halved = key if isinstance(key, tuple) else (key, None)
        expected = mapped.raw(name)
        expected = expected[:, : expected.shape[1] // 2].contiguous() if halved else expected
        assert torch.equal(tensor.cpu().view(torch.uint8), expected.view(torch.uint8)), key


def test_what_is_handed_over_has_the_bytes_of_the_files(release, monkeypatch):
    """In many copies a job, whose memory is used again while slow uses wait, many times over."""
    monkeypatch.setattr(staging, "SLOT_BYTES", 1000)
    mapped, reader = Checkpoint(release), staging.StagedCheckpoint(release, "cuda")
    names, busy = [n for n in mapped.names if ".experts." in n], torch.ones(2048, 2048, device="cuda")
    found = {(turn, n): torch.zeros(mapped.spec(n).nbytes, dtype=torch.uint8, device="cuda")
             for turn in range(8) for n in names}  # fmt: skip

    def use(key, data):
        for _ in range(4):
            busy @ busy
        found[key].copy_(data)

    jobs = [([(n, *map(range, mapped.spec(n).shape))], len(out), lambda data, key=(turn, n): use(key, data))
            for (turn, n), out in found.items()]  # fmt: skip
    reader.hand(jobs).wait()
    got = {key: tensor.clone() for key, tensor in found.items()}  # on this stream, after all uses
    reader.close()
    for (turn, name), tensor in got.items():
        assert torch.equal(tensor.cpu(), mapped.raw(name).view(torch.uint8).flatten()), (turn, name)


@pytest.mark.parametrize(("slot", "job"), [(1000, 1), (1000, 2**28), (2**24, 2**28)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_loaded_share_has_the_bits_of_the_cpu(release, monkeypatch, slot, job, size):
    """Packed experts, FP8 codes and values; small buffers, used again many times, jobs of an expert and of many."""
    monkeypatch.setattr(staging, "SLOT_BYTES", slot)
    monkeypatch.setattr(experts, "JOB_BYTES", job)
    loaded = (
        load_target(release, LoadConfig(device, experts="packed", linears="kernel", ranks=Ranks(size - 1, size)))
        for device in ("cuda", "cpu")
    )
    for gpu, cpu in zip(*map(tensors_of, loaded), strict=True):
        assert torch.equal(gpu.cpu().flatten().view(torch.uint8), cpu.flatten().view(torch.uint8))


def test_noise_has_the_same_bits_as_on_the_cpu():
    """The hash is integer arithmetic; only the two logarithms may differ in the last place."""
    from mimo_runtime.speculate import gumbel_noise

    positions, ids = torch.arange(5, 25), torch.arange(1000)[None]
    torch.testing.assert_close(
        gumbel_noise(7, positions.cuda(), ids.cuda()).cpu(), gumbel_noise(7, positions, ids), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", [{}, {"forced_acceptance": [7, 2, 0, 5]}], ids=str)
def test_drafts_change_no_token(release, dtype, temperature, how):
    engine = Engine(release, EngineConfig(device="cuda", dtype=dtype, max_len=160))
    sampling = SamplingConfig(max_new_tokens=80, temperature=temperature, seed=1)
    assert engine.generate(PROMPT, sampling, **how).tokens == engine.generate(PROMPT, sampling, speculate=False).tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", [{}, {"forced_acceptance": [7, 2, 0, 5]}], ids=str)
def test_trees_change_no_token(release, temperature, how):
    """In float32: in bfloat16 a tree's rows, more than a chain's, may round another way where two tokens tie."""
    engine = Engine(release, EngineConfig(device="cuda", dtype="float32", max_len=160, tree_budget=21))
    sampling = SamplingConfig(max_new_tokens=80, temperature=temperature, seed=1)
    assert engine.generate(PROMPT, sampling, **how).tokens == engine.generate(PROMPT, sampling, speculate=False).tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_change_no_token(release, temperature):
    """Plain, chains and trees, each captured and replayed, on two prompts in turn."""
    sampling = SamplingConfig(max_new_tokens=60, temperature=temperature, seed=1)
    eager, graphs = (
        Engine(release, EngineConfig(device="cuda", dtype="float32", max_len=160, tree_budget=21, cuda_graphs=on))
        for on in (False, True)
    )
    for prompt in (PROMPT, PROMPT[:3]):
        expected = eager.generate(prompt, sampling, speculate=False).tokens
        for how in ({"speculate": False}, {"tree": False}, {}, {"forced_acceptance": [7, 2, 0]}):
            assert graphs.generate(prompt, sampling, **how).tokens == expected, how
