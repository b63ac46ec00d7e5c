"""pytest tests/test_losses.py — losses and masks against naive loops and the worked examples of
their docstrings."""

import math

import pytest
import torch

from lib.files import UserError
from lib.losses import (
    candidate_mask,
    distillation,
    flops,
    in_batch_accuracy,
    info_nce,
    kl_divergence,
    margin_mse,
    own_group,
    sparsity,
    spread,
    stop_on_collapse,
    triplet_nll,
)


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.fixture
def case():
    torch.manual_seed(0)
    B, P, W, rank = 3, 4, 2, 1
    scores = torch.randn(B, W * B * P) * 3
    positives = torch.arange(B) * P + rank * B * P
    mask = (torch.rand(scores.shape) < 0.7).scatter(1, positives[:, None], True)
    return scores, positives, mask, P


def test_info_nce_is_the_naive_loop(case):
    scores, positives, mask, _ = case
    for i, loss in enumerate(info_nce(scores, positives, mask)):
        total = sum(math.exp(scores[i, j]) for j in range(scores.shape[1]) if mask[i, j])
        assert loss.item() == pytest.approx(
            -math.log(math.exp(scores[i, positives[i]]) / total), abs=1e-5
        )


def test_triplet_is_the_naive_loop(case):
    scores, positives, mask, P = case
    mask = mask & own_group(positives, scores.shape[1], P)
    for i, loss in enumerate(triplet_nll(scores, positives, mask)):
        start = int(positives[i])
        terms = [
            softplus(float(scores[i, j] - scores[i, start]))
            for j in range(start + 1, start + P)
            if mask[i, j]
        ]
        assert loss.item() == pytest.approx(sum(terms) / max(len(terms), 1), abs=1e-5)


def test_worked_examples():
    zero, all_true = torch.tensor([0]), torch.ones(1, 2, dtype=torch.bool)
    assert info_nce(torch.tensor([[2.0, 0.0]]), zero, all_true).item() == pytest.approx(
        0.1269, abs=1e-4
    )
    assert info_nce(torch.tensor([[2.0, 0.0]]), zero, torch.tensor([[True, False]])).item() == 0
    scores = torch.tensor([[2.0, 0.0, 3.0]])
    assert triplet_nll(scores, zero, torch.ones(1, 3, dtype=torch.bool)).item() == pytest.approx(
        0.7201, abs=1e-4
    )
    assert triplet_nll(scores, zero, torch.tensor([[True, False, False]])).item() == 0
    pair = torch.tensor([[1.3, -0.4]])
    assert triplet_nll(pair, zero, all_true).item() == pytest.approx(
        -pair.log_softmax(1)[0, 0].item(), abs=1e-6
    )
    a, b, c = 11, 12, 13
    mask = candidate_mask(
        zero, torch.zeros(4, dtype=torch.bool), torch.tensor([a, b, a, c]), torch.tensor([[a, c]])
    )
    assert mask.tolist() == [[True, True, False, False]]


def test_candidate_mask_is_the_naive_loop():
    torch.manual_seed(1)
    B, P = 5, 3
    passage_keys = torch.randint(
        0, 6, (B * P,)
    )  # few keys: many passages stand in the batch several times
    filler = torch.rand(B * P) < 0.2
    positives = torch.arange(B) * P
    filler[positives] = False
    positive_keys = torch.stack([passage_keys[positives], torch.randint(0, 6, (B,))], dim=1)
    mask = candidate_mask(positives, filler, passage_keys, positive_keys)
    for i in range(B):
        for j in range(B * P):
            judged = passage_keys[j] in positive_keys[i]
            assert mask[i, j] == (j == positives[i] or not (filler[j] or judged))


def test_masked_columns_get_no_gradient(case):
    scores, positives, mask, _ = case
    for loss in (info_nce, triplet_nll):
        leaf = scores.clone().requires_grad_()
        loss(leaf, positives, mask).mean().backward()
        assert leaf.grad[~mask].abs().max() == 0
        assert (leaf.grad[mask].abs() > 0).all()


def test_losses_survive_large_scores():
    scores = torch.tensor(
        [[700.0, 768.0]], dtype=torch.bfloat16
    )  # LayerNorm heads score in the hundreds
    mask, positives = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0])
    assert info_nce(scores, positives, mask).item() == pytest.approx(68, abs=1e-3)
    assert triplet_nll(scores, positives, mask).item() == pytest.approx(68, abs=1e-3)


def test_accuracy_counts_a_tie_as_a_miss_and_ignores_masked_columns():
    scores, positives = torch.tensor([[1.0, 0.0, 5.0], [0.0, 2.0, 2.0]]), torch.tensor([0, 1])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert in_batch_accuracy(scores, positives, mask).item() == 0.5


def test_spread_is_the_naive_loop():
    reps = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 1
    std, cosine = spread(reps)
    cosines = [
        torch.cosine_similarity(reps[i], reps[j], dim=0)
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert cosine.item() == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert std.item() == pytest.approx(reps.numpy().std(axis=0).mean(), abs=1e-6)
    assert spread(reps[:1].expand(6, 5))[1].item() == pytest.approx(1, abs=1e-6)


def test_distillation_is_the_naive_loop():
    torch.manual_seed(2)
    scores, teacher = (torch.randn(5, 4, requires_grad=True) * 3 for _ in range(2))
    mask = torch.tensor(
        [
            [True] * 4,
            [True, False, True, True],
            [True, True, False, False],
            [True] + [False] * 3,
            [True] * 4,
        ]
    )
    kl, margins = kl_divergence(scores, teacher, mask), margin_mse(scores, teacher, mask)
    for i in range(5):
        kept = [j for j in range(4) if mask[i, j]]
        s, t = (torch.softmax(x[i, kept].double(), 0).tolist() for x in (scores, teacher))
        expected = sum(b * (math.log(b) - math.log(a)) for a, b in zip(s, t, strict=True))
        assert kl[i].item() == pytest.approx(expected, abs=1e-5)
        gap = (scores - teacher)[i].tolist()
        gaps = [(gap[0] - gap[j]) ** 2 for j in kept[1:]]
        assert margins[i].item() == pytest.approx(sum(gaps) / max(len(gaps), 1), rel=1e-5)
    whole = torch.ones_like(mask)
    torch_kl = torch.nn.KLDivLoss(reduction="batchmean")(scores.log_softmax(1), teacher.softmax(1))
    assert kl_divergence(scores, teacher, whole).mean().item() == pytest.approx(
        torch_kl.item(), abs=1e-5
    )
    with pytest.warns(UserWarning, match="batchmean"):
        official = torch.nn.KLDivLoss(reduction="mean")(
            scores.log_softmax(1), teacher.softmax(1)
        )  # RetroMAE's
    assert kl_divergence(scores, teacher, whole).mean().item() / 4 == pytest.approx(
        official.item(), abs=1e-5
    )
    (grad,) = torch.autograd.grad((kl + margins).sum(), scores)
    assert grad.isfinite().all() and not grad[~mask].any() and not grad[3].any()


def test_worked_examples_of_distillation():
    two = torch.ones(1, 2, dtype=torch.bool)
    assert kl_divergence(
        torch.zeros(1, 2), torch.tensor([[math.log(3), 0]]), two
    ).item() == pytest.approx(0.1308, abs=1e-4)
    assert margin_mse(torch.tensor([[5.0, 3.0]]), torch.tensor([[9.0, 6.0]]), two).item() == 1
    scores, mask = torch.tensor([[7.0, 5.0, 3.0, 7.0]]), torch.ones(1, 4, dtype=torch.bool)
    found = distillation(scores, torch.tensor([1]), mask, torch.tensor([[9.0, 6.0]]))
    assert found["margin_mse"].item() == 1


def test_flops_squares_the_mean_over_what_counts():
    torch.manual_seed(3)
    reps, counts = (
        torch.rand(6, 9).requires_grad_(),
        torch.tensor([True, True, False, True, True, True]),
    )
    means = [sum(reps[n, v].item() for n in range(6) if counts[n]) / 5 for v in range(9)]
    loss = flops(reps, counts)
    assert loss.item() == pytest.approx(sum(mean**2 for mean in means), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, reps)
    assert (
        grad[0].tolist() == pytest.approx([2 * mean / 5 for mean in means], rel=1e-5)
        and not grad[2].any()
    )


def test_terms_are_counted_and_collapse_is_named():
    q, p = (
        torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, 0]]),
        torch.tensor([[1.0, 1, 0, 1], [0, 0, 0, 1]]),
    )
    found = sparsity(q, p, torch.tensor([True, True]))
    counts = {name: found[name].item() for name in ("q_terms", "p_terms", "shared_terms")}
    assert counts == {"q_terms": 1.5, "p_terms": 2, "shared_terms": 1.0}
    found = sparsity(q, p.repeat_interleave(2, 0), torch.tensor([True, True, True, False]))
    assert found["p_terms"].item() == pytest.approx(7 / 3) and found["shared_terms"].item() == 1

    def check(q_terms, p_terms, settled):
        values = {"q_terms": q_terms, "p_terms": p_terms, "q_cosine": 0.5, "p_cosine": 0.5}
        stop_on_collapse(7, values, vocabulary=1000, settled=settled)

    check(20, 100, True)
    check(600, 900, False)
    for few in ((0.2, 100, False), (20, 0, True)):
        with pytest.raises(UserError, match="step 7: .* nearly empty — lower --flops"):
            check(*few)
    with pytest.raises(UserError, match="still dense — raise --flops"):
        check(20, 501, True)
