"""Parameter groups, the learning rate, a step, and LAMB."""

import math

import torch
from torch import Tensor, nn


def lr_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Linear warm-up to the peak, linear decay to zero; step counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (max_steps - step) / max(max_steps - warmup_steps, 1)


def steps_of(warmup: float, max_steps: int) -> int:
    """Warm-up steps: `warmup` itself, or below 1 that share of the steps, as in transformers."""
    return round(warmup * max_steps) if warmup < 1 else round(warmup)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: matrices and embeddings decay; biases and norms (one dimension) do
    not. Frozen parameters are left out, and an empty group is not returned."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962) as ANCE, SEED-Encoder and COCO-DR train with it. A tensor p with the
    gradient g goes

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g²       without bias correction
        u = m / (sqrt(v) + eps) + weight_decay p
        p = p - lr r u,  r = min(|p|, 10) / |u|              r = 1 where a norm is 0

    Most others correct the bias, clip the gradient inside, bound r itself, or take r = 1 for what
    does not decay. Norms stay on the device, so that no step waits for it. fp32."""

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "LAMB takes no closure"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                m = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                v = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                u = m / v.sqrt().add_(group["eps"])
                u.add_(p, alpha=group["weight_decay"])
                weight_norm, norm = p.norm(), u.norm()
                ratio = weight_norm.clamp(max=10) / norm
                ratio = torch.where((weight_norm > 0) & (norm > 0), ratio, 1.0)
                p.sub_(u.mul_(group["lr"] * ratio))


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float):
    """adamw or lamb, both with betas 0.9 and 0.999, eps 1e-8."""
    groups = parameter_groups(model, weight_decay)
    return Lamb(groups, lr=lr) if name == "lamb" else torch.optim.AdamW(groups, lr=lr, fused=True)


def descend(
    accelerator, model: nn.Module, optimizer, loss: Tensor, lr: float, max_grad_norm: float
) -> tuple[Tensor, bool]:
    """After the backward pass of a micro-step: clip the gradient (0 = not), step, clear. Returns
    (its norm before, are loss and gradient finite); if not, nothing is stepped. An infinite
    gradient of fp16 is left to the scaler, which passes over the step. Within an accumulated step
    only the loss is looked at, and the norm is 0."""
    norm = torch.zeros_like(loss)
    if accelerator.sync_gradients:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr
    finite = bool(torch.isfinite(loss if accelerator.scaler else loss + norm))
    if finite:
        optimizer.step()
        optimizer.zero_grad()
    return norm, finite


def recompute_activations(model: nn.Module) -> None:
    """Make a transformers model keep only the inputs of its layers, and run each layer again in the
    backward pass. The numbers are the same."""
    # gradient_checkpointing_enable is the name before transformers 5.22
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
