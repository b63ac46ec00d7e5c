"""pytest tests/test_lm_head.py — output layers without logits, against the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from lib import lm_head
from lib.lm_head import linear_cross_entropy, max_pooled_logits


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 23])
def test_linear_cross_entropy_is_the_plain_formula(monkeypatch, n, with_bias):
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", {"cpu": 5 * 50})
    torch.manual_seed(n)
    leaves = [torch.randn(n, 6), torch.randn(50, 6), torch.randn(50)][: 2 + with_bias]
    leaves = [x.requires_grad_() for x in leaves]
    hidden, weight, bias = [*leaves, None][:3]
    labels = torch.randint(0, 50, (n,))
    tied = hidden + weight[:n]  # the weight has a second use, as tied embeddings do
    logits = F.linear(tied, weight, bias)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    loss, count, correct, _ = linear_cross_entropy(tied, weight, bias, labels)
    assert count == n
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-6)
    assert correct == (logits.argmax(1) == labels).sum() and not correct.requires_grad
    ours, theirs = (
        torch.autograd.grad(1024 * x / 3, leaves, retain_graph=True) for x in (loss, plain)
    )  # a loss scale
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_cross_entropy(tied, weight, bias, labels).loss
    assert low.dtype == torch.float32 and torch.allclose(low, plain, rtol=0.05)
    for a, b in zip(
        torch.autograd.grad(low, leaves, retain_graph=True),
        torch.autograd.grad(plain, leaves),
        strict=True,
    ):
        assert a.dtype == torch.float32 and torch.allclose(
            a, b, atol=0.05 * (1 + b.abs().max()) if n else 0
        )


def plain_pooling(hidden, weight, bias, mask):
    logits = F.linear(hidden, weight, bias).masked_fill(~mask[..., None], float("-inf"))
    return logits.max(1).values.float().masked_fill(~mask.any(1, keepdim=True), 0.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_max_pooled_logits_are_the_plain_formula(monkeypatch, autocast):
    monkeypatch.setattr(lm_head, "POOLED_LOGITS", {"cpu": 7 * 4 * 9})  # 7 terms at a time, of 50
    torch.manual_seed(0)
    leaves = [torch.randn(4, 9, 6), torch.randn(50, 6), torch.randn(50)]
    leaves = [x.requires_grad_() for x in leaves]
    mask = torch.rand(4, 9) < 0.6
    mask[2] = False  # a text without a position
    upstream = torch.randn(4, 50).relu()  # as behind a ReLU: many zeros
    found = []
    for function in (max_pooled_logits, plain_pooling):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            pooled = function(*leaves, mask)
        assert pooled.dtype == torch.float32 and not pooled[2].any()
        found.append([pooled, *torch.autograd.grad((pooled * upstream).sum(), leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(
            ours, plain, atol=0.05 if autocast else 1e-5, rtol=0.02 if autocast else 1e-5
        )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(max_pooled_logits(*leaves, mask), found[0][0])
    assert torch.equal(found[0][0], found[1][0]) or not autocast, "rounded alike under autocast"
    assert not found[0][1][2].any() and not found[0][1][~mask].any()


def test_of_equal_maxima_the_first_has_the_gradient():
    hidden = torch.ones(1, 3, 2, requires_grad=True)
    mask = torch.tensor([[False, True, True]])
    max_pooled_logits(hidden, torch.ones(5, 2), torch.zeros(5), mask).sum().backward()
    assert hidden.grad[0].tolist() == [[0, 0], [5, 5], [0, 0]]


def test_maxima_of_what_is_not_a_number_are_none():
    hidden, weight = torch.ones(2, 3, 2), torch.ones(5, 2)
    hidden[1, 1] = torch.nan
    pooled = max_pooled_logits(hidden, weight, torch.zeros(5), torch.ones(2, 3, dtype=torch.bool))
    assert pooled[0].tolist() == [2.0] * 5 and pooled[1].isnan().all()
