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
    does not decay. Norms stay on the device, so that no step waits for it; a group lies on one
    device. fp32."""

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "LAMB takes no closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            m = [self.state[p]["exp_avg"] for p in params]
            v = [self.state[p]["exp_avg_sq"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            u = torch._foreach_sqrt(v)
            torch._foreach_add_(u, group["eps"])
            # m / u in one call would need a second tensor of the size of the model
            torch._foreach_reciprocal_(u)
            torch._foreach_mul_(u, m)
            if group["weight_decay"]:
                torch._foreach_add_(u, params, alpha=group["weight_decay"])
            weight_norms = torch.stack(torch._foreach_norm(params))
            norms = torch.stack(torch._foreach_norm(u))
            ratios = weight_norms.clamp(max=10) / norms
            ratios = torch.where((weight_norms > 0) & (norms > 0), ratios, 1.0)
            torch._foreach_addcmul_(params, u, (-group["lr"] * ratios).unbind())


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
