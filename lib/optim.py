"""Parameter groups."""

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer, BERT's recipe: matrices and embeddings decay; biases and norms (one dimension) do not.
    Frozen parameters are left out, a tied parameter stands once, an empty group is not returned."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
