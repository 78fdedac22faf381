"""The batched decoder in CUDA graphs against one token at a time, on a device that is not the current one."""

import pytest
import torch

from mimo_qat.distill import decoder as decoding
from mimo_qat.distill.decoder import Decoder, Job
from mimo_qat.distill.evaluate import greedy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_decode_what_plain_steps_do(tiny_model, monkeypatch, temperature):
    """A capture on the wrong device would replay nothing and repeat one token. Float32 is never captured, and has an
    oracle without near ties."""
    monkeypatch.setattr(decoding, "CHECK_EVERY", 3)
    monkeypatch.setattr(decoding, "FEWEST_SLOTS", 1)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(0)
    model = tiny_model.to(device)
    prompts = [[17, 3, 99, 200, 41, 7], [5], [60, 61, 62], list(range(100, 133)), [9, 8]]
    jobs = [Job(prompt, temperature, str(i)) for i, prompt in enumerate(prompts)]
    exact = Decoder(model, 3, 40, 40)
    tokens = [d.tokens for d in exact.run(jobs)]
    assert not exact.graphs
    if temperature == 0:
        assert tokens == [greedy(model, prompt, 40) for prompt in prompts]
    plain, graphs = (Decoder(model.bfloat16(), 3, 40, 40, cuda_graph=on) for on in (False, True))
    assert [d.tokens for d in graphs.run(jobs)] == [d.tokens for d in plain.run(jobs)]
    assert graphs.graphs and not plain.graphs
