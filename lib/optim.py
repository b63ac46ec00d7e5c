"""Parameter groups and the learning rate."""

from torch import nn


def lr_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Linear warm-up to the peak, linear decay to zero; step counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (max_steps - step) / max(max_steps - warmup_steps, 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer, BERT's recipe: matrices and embeddings decay; biases and norms (one dimension) do not.
    Frozen parameters are left out, a tied parameter stands once, an empty group is not returned."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
