"""The chunked gradient is the gradient: with dropout on, under accumulation, under fp16 loss
scaling.

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
    """The interface of the bi-encoder, with dropout; a chunk is a tensor of inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4))

    def forward(self, query, passage):
        return [None if chunk is None else self.layers(chunk) for chunk in (query, passage)]


def sides(queries, passages, size):
    """A batch in chunks of `size` texts, whose rows stand in another order than the texts."""
    batch = {}
    for name, texts in (("query", queries), ("passage", passages)):
        place = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        rows = torch.empty_like(texts)
        rows[place] = texts
        batch[name] = {"chunks": rows.split(size), "order": place}
    return batch


def loss_fn(kind):
    positives, mask = torch.arange(B) * P, torch.ones(B, B * P, dtype=torch.bool)

    def loss(batch, q_reps, p_reps):
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


def reference(model, batch, loss, seed):
    """One graph over all chunks, dropout seeded per chunk as the chunked path does."""
    query, passage = batch["query"], batch["passage"]
    reps = []
    for index, chunk in enumerate([*query["chunks"], *passage["chunks"]]):
        torch.manual_seed(step_seed(seed, index))
        reps.append(model.layers(chunk))
    split = len(query["chunks"])
    q_reps = torch.cat(reps[:split])[query["order"]]
    p_reps = torch.cat(reps[split:])[passage["order"]]
    value, _ = loss(batch, q_reps, p_reps)
    return value, torch.autograd.grad(value, list(model.parameters()))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("kind", ["info_nce", "triplet"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_equals_the_unchunked_gradient_with_dropout(kind, size):
    model, loss = Encoder().train(), loss_fn(kind)
    one = sides(*batch(), size)
    value, expected = reference(model, one, loss, seed=7)
    got, stats = contrastive_backward(Accelerator(cpu=True), model, one, loss, 7)
    assert got.item() == pytest.approx(value.item(), abs=1e-6)
    assert stats["scores"].shape == (B, B * P)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-5)


def test_dropout_is_on_and_drawn_anew_at_another_seed():
    losses = [
        contrastive_backward(
            Accelerator(cpu=True), Encoder().train(), sides(*batch(), 4), loss_fn("info_nce"), seed
        )[0]
        for seed in (7, 7, 8)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_plain_and_chunked_agree_without_dropout():
    model, loss = Encoder().eval(), loss_fn("info_nce")
    contrastive_backward(Accelerator(cpu=True), model, sides(*batch(), 4), loss, 7)
    queries, passages = batch()
    value, _ = loss(None, model.layers(queries), model.layers(passages))
    for parameter, grad in zip(
        model.parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-5)


def test_accumulation_divides_once_and_fp16_scales_once():
    model, loss = Encoder().eval(), loss_fn("info_nce")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    # what --mixed_precision fp16 has on a GPU
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = 0
    for seed in (1, 2):
        one = sides(*batch(seed), 4)
        value, grads = reference(model, one, loss, 7)
        expected = expected + torch.cat([g.flatten() for g in grads]) / 2
        with accelerator.accumulate(model):
            got, _ = contrastive_backward(accelerator, model, one, loss, 7)
        # what the log shows is neither scaled nor divided
        assert got.item() == pytest.approx(value.item(), abs=1e-6)
    assert accelerator.sync_gradients
    got = torch.cat([p.grad.flatten() for p in model.parameters()]) / 1024
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
