"""The losses of drafter training: values and gradients against float64 autograd, weights and metrics by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from mimo_qat.distill.objective import (
    Objective,
    decay_weights,
    default_gamma,
    dpace_weights,
    expected_prefix,
    head_loss,
    metrics,
    slot_terms,
)
from mimo_qat.models.modeling_dflash import CandidateSelector, DFlashConfig

BLOCKS, SLOTS, SIZE, VOCABULARY, RANK, TOP = 11, 7, 12, 40, 5, 6
LOSSES = ["ce", "dpace", "tv", "e2e-tv"]


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, target = (torch.randn(BLOCKS, SLOTS, SIZE, generator=g) for _ in range(2))
    supervised = (torch.rand(BLOCKS, SLOTS, generator=g) > 0.2).cumprod(1).bool()
    assert not supervised[:, 0].all() and not supervised.all(1).all()
    return {
        "hidden": hidden,
        "head": torch.randn(VOCABULARY, SIZE, generator=g) * 0.5,
        "labels": torch.randint(0, VOCABULARY, (BLOCKS, SLOTS), generator=g),
        "supervised": supervised,
        "target_hidden": target,
        "anchor_ids": torch.randint(0, VOCABULARY, (BLOCKS,), generator=g),
    }


def trained_selector(seed=3):
    torch.manual_seed(seed)
    config = DFlashConfig(
        vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=1, target_layer_ids=[0], block_size=SLOTS + 1,
        mask_token_id=0, selector_rank=RANK, selector_top_k=TOP,
    )  # fmt: skip
    selector = CandidateSelector(config)
    for parameter in selector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return selector


def naive(objective, hidden, head, labels, supervised, target_hidden, anchor_ids, selector=None):
    """(loss, weights) in the dtype of the inputs by autograd, everything at once, as the formulas are written."""
    logits, gamma = hidden @ head.T, objective.gamma or 5.0
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    accept = 1 - (logits.softmax(-1) - (target_hidden @ head.T).softmax(-1)).abs().sum(-1) / 2
    weights = torch.exp(-torch.arange(SLOTS) / gamma).to(ce) * supervised
    if objective.loss == "dpace":
        weights = torch.zeros_like(ce)
        for m in range(BLOCKS):
            for j in range(SLOTS):
                for last in range(j, SLOTS):
                    if supervised[m, : last + 1].all():
                        weights[m, j] += torch.prod(0.5 * torch.exp(-ce[m, : last + 1]) + 0.5).item()
    if objective.loss in ("ce", "dpace"):
        loss = (ce * weights).sum()
    elif objective.loss == "tv":
        loss = (weights * (0.1 * ce + 0.9 * (1 - accept))).sum()
    else:
        loss = torch.zeros((), dtype=ce.dtype)
        for m in range(BLOCKS):
            if supervised[m, 0]:
                cut = int(supervised[m].sum())
                loss = loss + 1 - sum(torch.prod(accept[m, : j + 1]) for j in range(cut)) / SLOTS
    if selector is not None:
        a, b, w = selector
        ids = logits.topk(TOP, -1).indices
        for m in range(BLOCKS):
            for k in range(SLOTS):
                if supervised[m, k] and labels[m, k] in ids[m, k]:
                    before = anchor_ids[m] if k == 0 else labels[m, k - 1]
                    scores = logits[m, k, ids[m, k]] + b[ids[m, k]] @ (a[before] * (w @ hidden[m, k]))
                    truth = (ids[m, k] == labels[m, k]).nonzero()[0]
                    nll = F.cross_entropy(scores[None], truth)
                    loss = loss + objective.selector_weight * weights[m, k].detach() * nll
    return loss, weights


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("with_selector", [False, True])
def test_loss_and_gradients_equal_autograd(loss, with_selector):
    objective = Objective(loss, gamma=4.0, selector_weight=0.7)
    given, selector = inputs(), trained_selector() if with_selector else None
    given["hidden"].requires_grad_()
    sums = head_loss(**given, objective=objective, selector=selector, chunk_blocks=4)
    parameters = [given["hidden"]]
    if selector is not None:
        parameters += [
            selector.predecessor_codebook, selector.successor_codebook, selector.hidden_projection.weight
        ]  # fmt: skip
    grads = torch.autograd.grad(3 * sums.loss, parameters)
    exact = {n: t.detach().double() if t.is_floating_point() else t for n, t in given.items()}
    leaves = [p.detach().double().requires_grad_() for p in parameters]
    expected, weights = naive(objective, **exact | {"hidden": leaves[0]}, selector=leaves[1:] or None)
    expected_grads = torch.autograd.grad(3 * expected, leaves)
    assert math.isclose(sums.loss.item(), expected.item(), rel_tol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max() and wanted.abs().max() > 1e-3
    anchors = given["supervised"][:, 0].sum().item()
    denominator = anchors if loss in ("dpace", "e2e-tv") else weights.sum().item()
    assert math.isclose(sums.denominator.item(), denominator, rel_tol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_do_not_matter_and_no_gradient_is_made_without_need(loss):
    objective, selector = Objective(loss, selector_weight=0.5), trained_selector()
    given = inputs()
    results = []
    for chunk in (1, 3, 11, 100):
        given["hidden"] = given["hidden"].detach().requires_grad_()
        sums = head_loss(**given, objective=objective, selector=selector, chunk_blocks=chunk)
        grads = torch.autograd.grad(sums.loss, [given["hidden"], selector.successor_codebook])
        results.append((sums.vector(), *grads))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    with torch.no_grad():
        assert torch.allclose(head_loss(**given, objective=objective, selector=selector).vector(), results[0][0])


def test_slot_terms_are_the_derivatives_of_the_sum():
    """Central differences in float64 by every cross-entropy and every acceptance probability."""
    g = torch.Generator().manual_seed(2)
    ce, accept = torch.rand(3, 5, generator=g).double() * 3, torch.rand(3, 5, generator=g).double()
    accept[0, 1] = 0.0  # no division by a probability
    supervised = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    for loss in ("ce", "tv", "e2e-tv"):
        objective, h = Objective(loss, gamma=3.0), 1e-6
        _, _, by_ce, by_accept = slot_terms(objective, ce, accept, supervised)
        for weights, values in ((by_ce, ce), (by_accept, accept)):
            for at in () if weights is None else [(m, k) for m in range(3) for k in range(5)]:
                sides = []
                for sign in (1, -1):
                    moved = values.clone()
                    moved[at] += sign * h
                    pair = (moved, accept) if values is ce else (ce, moved)
                    sides.append(slot_terms(objective, *pair, supervised)[0])
                assert abs((sides[0] - sides[1]) / (2 * h) - weights[at]) < 1e-6, (loss, at)


def test_the_expected_prefix_is_that_of_independent_trials():
    accept = torch.tensor([[0.9, 0.5, 0.8], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    prefix, _ = expected_prefix(accept)
    assert torch.allclose(prefix, torch.tensor([0.9 + 0.45 + 0.36, 3.0, 0.0]))
    trials = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0)) < accept[0]
    assert abs(trials.int().cumprod(1).sum(1).double().mean() - prefix[0]) < 0.01


def test_a_drafter_equal_to_the_target_has_no_distance_left():
    given = inputs()
    given |= {"target_hidden": given["hidden"], "supervised": torch.ones(BLOCKS, SLOTS, dtype=torch.bool)}
    hidden = given["hidden"] = given["hidden"].clone().requires_grad_()
    sums = head_loss(**given, objective=Objective("e2e-tv"))
    (grad,) = torch.autograd.grad(sums.loss, hidden)
    assert abs(sums.loss.item()) < 1e-4 and grad.abs().max() < 1e-4
    tv, ce = (head_loss(**given, objective=Objective(name)).loss for name in ("tv", "ce"))
    assert math.isclose(tv.item(), 0.1 * ce.item(), rel_tol=1e-4)


def test_decay_constants_are_the_published_ones():
    assert [default_gamma(b) for b in (8, 10, 16)] == [4.0, 5.0, 7.0]
    assert torch.allclose(decay_weights(4, 2.0), torch.tensor([1.0, math.exp(-0.5), math.exp(-1.0)]))


def test_dpace_weights_by_hand():
    ce = torch.log(torch.tensor([[1.0, 2.0, 4.0]]))  # probabilities 1, 1/2, 1/4 -> s = 1, 3/4, 5/8
    weights = dpace_weights(ce, torch.ones(1, 3, dtype=torch.bool))
    products = [1.0, 0.75, 0.75 * 0.625]
    assert torch.allclose(weights, torch.tensor([[sum(products), sum(products[1:]), products[2]]]))
    cut = dpace_weights(ce, torch.tensor([[True, True, False]]))
    assert torch.allclose(cut, torch.tensor([[1.75, 0.75, 0.0]]))


def test_metrics_by_hand():
    head = torch.eye(4)
    labels = torch.tensor([[0, 1, 2], [3, 3, 3], [1, 1, 1]])
    says = torch.tensor([[0, 1, 3], [0, 3, 3], [1, 1, 0]])
    supervised = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0]]).bool()
    got = metrics(head_loss(10 * F.one_hot(says, 4).float(), head, labels, supervised, Objective()).vector())
    # Prefixes 2, 0 and 1: the second block misses its first slot, and the third has one slot that counts.
    assert got["prefix_length"] == got["plain_prefix_length"] == 1 + 3 / 3
    assert got["accuracy_by_slot"] == [0.6667, 1.0, 0.5] and got["accuracy"] == got["candidate_recall"] == 5 / 7


def test_prefix_length_is_that_of_the_greedy_chain():
    """The true predecessor may stand in for the chosen one: up to the first miss they are the same token."""
    selector, given = trained_selector(), inputs(5)
    supervised = torch.ones_like(given["supervised"])
    logits = given["hidden"] @ given["head"].T
    with torch.no_grad():
        drafts = selector.chain(given["hidden"], logits, given["anchor_ids"])
        given["labels"] = torch.where(torch.arange(SLOTS) < torch.arange(BLOCKS)[:, None] % 5, drafts, 0)
        got = metrics(
            head_loss(**given | {"supervised": supervised}, objective=Objective(), selector=selector).vector()
        )
    accepted = (drafts == given["labels"]).int().cumprod(1).sum().item()
    assert got["prefix_length"] == 1 + accepted / BLOCKS > 2
    plain = (logits.argmax(-1) == given["labels"]).int().cumprod(1).sum().item()
    assert got["plain_prefix_length"] == 1 + plain / BLOCKS != got["prefix_length"]
    recalled = (logits.topk(TOP).indices == given["labels"][..., None]).any(-1).double().mean().item()
    assert math.isclose(got["candidate_recall"], recalled)


@pytest.mark.parametrize(
    "values, message",
    [({"loss": "kl"}, "kl"), ({"gamma": -1.0}, "loss_decay_gamma"), ({"selector_weight": -1.0}, "selector_weight")],
)
def test_what_is_no_objective_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Objective(**values)


def test_tv_without_the_target_is_refused():
    given = inputs() | {"target_hidden": None}
    with pytest.raises(ValueError, match="final hidden states"):
        head_loss(**given, objective=Objective("tv"))
