"""The chunked gradient is the gradient: with dropout on, under accumulation, under fp16 loss scaling.

Run: python -m pytest tests/test_gradcache.py
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from lib.gradcache import contrastive_backward
from lib.losses import info_nce, own_group, triplet_nll
from lib.text import step_seed

B, P = 6, 3


class Encoder(nn.Module):
    """The interface of the bi-encoder: lists of chunks in, representations out; with dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4))

    def forward(self, queries, passages):
        return [
            None if side is None else torch.cat([self.layers(x) for x in side])
            for side in (queries, passages)
        ]


def loss_fn(kind):
    positives, mask = torch.arange(B) * P, torch.ones(B, B * P, dtype=torch.bool)

    def loss(q_reps, p_reps):
        scores = q_reps @ p_reps.T
        if kind == "info_nce":
            return info_nce(scores, positives, mask).mean(), {"scores": scores.detach()}
        return triplet_nll(scores, positives, own_group(positives, B * P, P)).mean(), {
            "scores": scores.detach()
        }

    return loss


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 8, generator=generator), torch.randn(B * P, 8, generator=generator)


def reference(model, queries, passages, loss, seed):
    """One graph over all chunks, dropout seeded per chunk as the chunked path does."""
    reps = []
    for index, chunk in enumerate([*queries, *passages]):
        torch.manual_seed(step_seed(seed, index))
        reps.append(model.layers(chunk))
    value, _ = loss(torch.cat(reps[: len(queries)]), torch.cat(reps[len(queries) :]))
    return value, torch.autograd.grad(value, list(model.parameters()))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("kind", ["info_nce", "triplet"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_equals_the_unchunked_gradient_with_dropout(kind, size):
    model, loss = Encoder().train(), loss_fn(kind)
    queries, passages = (x.split(size) for x in batch())
    value, expected = reference(model, queries, passages, loss, seed=7)
    got, stats = contrastive_backward(
        Accelerator(cpu=True), model, queries, passages, loss, 7, chunked=True
    )
    assert got.item() == pytest.approx(value.item(), abs=1e-6) and stats["scores"].shape == (
        B,
        B * P,
    )
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-5)


def test_dropout_is_on_and_drawn_anew_at_another_seed():
    losses = [
        contrastive_backward(
            Accelerator(cpu=True), Encoder().train(), [q], [p], loss_fn("info_nce"), seed, chunked
        )[0]
        for q, p in [batch()]
        for seed, chunked in [(7, True), (7, True), (8, True), (7, False), (7, False), (8, False)]
    ]
    assert losses[0] == losses[1] != losses[2] and losses[3] == losses[4] != losses[5]


def test_plain_and_chunked_agree_without_dropout():
    grads = []
    for chunked in (False, True):
        model = Encoder().eval()
        queries, passages = (x.split(4) for x in batch())
        contrastive_backward(
            Accelerator(cpu=True), model, queries, passages, loss_fn("info_nce"), 7, chunked
        )
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunked", [True, False])
def test_accumulation_divides_once_and_fp16_scales_once(chunked):
    model, loss = Encoder().eval(), loss_fn("info_nce")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler(
        "cpu", init_scale=1024.0
    )  # what --mixed_precision fp16 has on a GPU
    expected = 0
    for seed in (1, 2):
        queries, passages = (x.split(4) for x in batch(seed))
        value, grads = reference(model, queries, passages, loss, 7)
        expected = expected + torch.cat([g.flatten() for g in grads]) / 2
        with accelerator.accumulate(model):
            got, _ = contrastive_backward(accelerator, model, queries, passages, loss, 7, chunked)
        assert got.item() == pytest.approx(
            value.item(), abs=1e-6
        )  # what the log shows is neither scaled nor divided
    assert accelerator.sync_gradients
    got = torch.cat([p.grad.flatten() for p in model.parameters()]) / 1024
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
