"""Training a drafter against a target whose forward pass is replayed as a CUDA graph.

pytest -q -m gpu tests/gpu/test_distill_gpu.py
"""

import copy

import pytest
import torch

from mimo_qat.distill.start import new_drafter
from mimo_qat.distill.train import Distiller
from tests.qat.test_distill import HEAD, packed_rows, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def trainer(model, folder, graphs: bool, **changes) -> Distiller:
    config = settings(
        folder,
        max_steps=4,
        gradient_accumulation_steps=2,
        bf16=True,
        cuda_graphs=graphs,
        use_cpu=False,
        **changes,
        **HEAD,
    )
    target = copy.deepcopy(model).bfloat16()
    torch.manual_seed(0)
    return Distiller(config, target, new_drafter(config, target, 511), packed_rows(6), packed_rows(3))


@pytest.mark.parametrize("loss", ["dpace", "tv"], ids=["taps", "taps and states"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_replayed_target_is_a_launched_one(tiny_model, tmp_path, compiled, loss):
    """The bits of its states for each batch, and training with two micro-batches and a judgement that share a graph."""
    launched, replayed = (trainer(tiny_model, tmp_path, on, compile=compiled, loss=loss) for on in (False, True))
    for micro in range(6):
        batch = launched.on_device(launched.batch(micro)[1])
        for ours, theirs in zip(replayed.target_states(batch), launched.target_states(batch), strict=True):
            assert torch.equal(ours, theirs) if theirs is not None else ours is None
    for step in range(4):
        for run in (launched, replayed):
            run.train_step()
        torch.testing.assert_close(replayed.window, launched.window, rtol=1e-3, atol=1e-3)
        if step == 1:
            scores = [run.teacher_forced()["eval_loss"] for run in (launched, replayed)]
            assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    for run in (launched, replayed):
        run.close()
