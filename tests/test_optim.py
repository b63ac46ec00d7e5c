"""pytest tests/test_optim.py — LAMB against its definition and a public one, resume, GradScaler, no
waiting."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lib.optim import Lamb, make_optimizer

SHAPES = [(7, 5), (5,), (40, 30), (3, 2, 4), (1,), (6, 6), (2, 3)]


def tensors(seed=0):
    """Parameters with norms below and far above 10, one of zeros, one that never gets a
    gradient."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    with torch.no_grad():
        params[1].zero_()
        params[2].mul_(3)
    assert params[2].norm() > 50 and params[0].norm() < 10
    return params


def give_gradients(params, step):
    """Of very different sizes; the fourth's is zero for two steps, the last one has none."""
    generator = torch.Generator().manual_seed(1000 + step)
    for number, p in enumerate(params[:-1]):
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (2 - 2 * number)
    if step < 2:
        params[3].grad.zero_()


def groups(params, weight_decay):
    return [
        {"params": params[:2], "weight_decay": weight_decay},
        {"params": params[2:4], "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6},
        {"params": params[4:], "lr": 0.1, "weight_decay": weight_decay / 2},
    ]


class Naive:
    """The definition for one tensor, in float64, without a thought for speed."""

    def __init__(self, p, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.p = p.detach().numpy().astype(np.float64)
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)
        self.settings = lr, *betas, eps, weight_decay

    def step(self, gradient):
        lr, b1, b2, eps, weight_decay = self.settings
        g = gradient.numpy().astype(np.float64)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        u = self.m / (np.sqrt(self.v) + eps) + weight_decay * self.p
        weight_norm, norm = np.sqrt((self.p**2).sum()), np.sqrt((u**2).sum())
        ratio = 1.0 if weight_norm == 0 or norm == 0 else min(weight_norm, 10.0) / norm
        self.p = self.p - lr * ratio * u


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_each_step_is_the_definition(weight_decay):
    params, lr = tensors(), 0.02
    optimizer, naive = Lamb(groups(params, weight_decay), lr=lr), []
    for group in optimizer.param_groups:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        naive += [Naive(p, **settings) for p in group["params"]]
    start = [p.detach().clone() for p in params]
    for step in range(8):
        give_gradients(params, step)
        optimizer.step()
        for p, expected in zip(params[:-1], naive, strict=False):
            expected.step(p.grad)
            np.testing.assert_allclose(p.detach().numpy(), expected.p, rtol=1e-5, atol=1e-7)
        assert torch.equal(params[3], start[3]) == (step < 2)  # zero gradients: u = 0, no step
    assert torch.equal(params[-1], start[-1]) and params[-1] not in optimizer.state
    assert not torch.equal(params[1], start[1])  # zeros do move, with ratio 1


def test_the_rules_one_by_one():
    """First step on a tensor of n equal numbers a, gradient c > 0: u = 0.1 / sqrt(0.001)
    everywhere."""
    u = 0.1 / 0.001**0.5
    for a, moved in (
        (0.5, 0.5),
        (0.0, u),
        (20.0, 10 / 4),
    ):  # |p| / |u| · u = a;  ratio 1;  |p| = 80 counts as 10
        p = nn.Parameter(torch.full((16,), a))
        p.grad = torch.full((16,), 7.0)
        Lamb([p], lr=0.01).step()
        assert torch.allclose(a - p.detach(), torch.tensor(0.01 * moved), rtol=1e-4), a
    p.grad = None
    Lamb([p], lr=0.01).step()  # nothing to do


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_a_public_implementation(weight_decay):
    """pytorch-optimizer's definition is ours with weight_decouple=False (decay inside u, p itself
    not shrunk), adam_debias=True (else it divides the step by 1 - b1^t, the bias correction of the
    first moment) and its defaults grad_averaging=True (the 1 - b1), pre_norm=False (no clipping
    inside), weight norms up to 10. It adds eps to |u| in the ratio too, which is below rounding
    while |u| is not tiny."""
    theirs = pytest.importorskip("pytorch_optimizer").Lamb
    a, b = tensors(), tensors()
    ours = Lamb(groups(a, weight_decay), lr=0.02)
    theirs = theirs(
        groups(b, weight_decay), lr=0.02, eps=1e-8, weight_decouple=False, adam_debias=True
    )
    for step in range(20):
        give_gradients(a, step)
        give_gradients(b, step)
        ours.step()
        theirs.step()
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert torch.allclose(x, y, rtol=2e-5, atol=1e-7), (step, number)


def test_resumes_bit_identically(tmp_path):
    straight = tensors()
    optimizer = Lamb(groups(straight, 0.1), lr=0.02)
    for step in range(6):
        if step == 3:
            torch.save(
                ([p.detach().clone() for p in straight], optimizer.state_dict()),
                tmp_path / "state.pt",
            )
        give_gradients(straight, step)
        optimizer.step()
    values, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = [nn.Parameter(value) for value in values]
    again = Lamb(groups(resumed, 0.0), lr=1.0)  # its settings come with the state
    again.load_state_dict(state)
    for step in range(3, 6):
        give_gradients(resumed, step)
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_gradient_that_comes_late():
    """State begins with the first gradient, whatever the others of the group have done before."""
    params, late = tensors(), nn.Parameter(torch.ones(3))
    alone = copy.deepcopy(late)
    together, apart = Lamb([*params, late], lr=0.02), Lamb([alone], lr=0.02)
    for step in range(4):
        give_gradients(params, step)
        if step == 2:
            late.grad = alone.grad = torch.tensor([1.0, -2.0, 0.5])
        together.step()
        apart.step()
    assert torch.equal(late, alone) and not torch.equal(late, torch.ones(3))


def test_under_grad_scaler():
    """A scale of a power of two changes nothing; a step with an infinite gradient is left out."""
    plain, scaled = nn.Parameter(torch.arange(1.0, 5.0)), nn.Parameter(torch.arange(1.0, 5.0))
    a, b = Lamb([plain], lr=0.1), Lamb([scaled], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 3.0):
        a.zero_grad()
        b.zero_grad()
        (plain**2).sum().mul(factor).backward()
        scaler.scale((scaled**2).sum() * factor).backward()
        if factor < float("inf"):
            a.step()
        scaler.step(b)
        scaler.update()
        assert torch.equal(plain, scaled)


def test_nothing_is_read_back_from_the_device():
    """Tensors without values: what asked for one, as `if norm == 0` does, would raise. On a GPU it
    would wait."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    for p in params:
        p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError):
        bool(params[0].norm() == 0)
    Lamb(params, lr=0.1, weight_decay=0.1).step()


def test_the_choice():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for name, kind in (("lamb", Lamb), ("adamw", torch.optim.AdamW)):
        optimizer = make_optimizer(name, model, 2e-3, 0.1)
        assert type(optimizer) is kind
        assert [
            (g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in optimizer.param_groups
        ] == [(2e-3, 0.1, (0.9, 0.999), 1e-8), (2e-3, 0.0, (0.9, 0.999), 1e-8)]
