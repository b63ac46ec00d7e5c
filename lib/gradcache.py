"""Large contrastive batches on small memory: GradCache (Gao et al., arXiv 2101.06983). The only copy in the project.

A contrastive loss needs all representations at once, but not all activations. So: encode everything in chunks without
gradient; take the gradient of the loss at the representations; encode each chunk again, with gradient, and push its
share of that gradient through. The price is one more forward pass.
"""

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.text import step_seed


def contrastive_backward(
    accelerator: Accelerator,
    model: nn.Module,
    queries: list,
    passages: list,
    loss_fn: Callable,
    seed: int,
    chunked: bool,
) -> tuple[Tensor, dict]:
    """Encode both sides, compute `loss_fn(q_reps, p_reps) -> (scalar, stats)`, backpropagate into the parameters.
    Returns (loss, stats), detached; the loss is neither scaled nor divided by the accumulation.

    model: the prepared (DDP-wrapped) one; model(queries, passages) encodes two lists of chunks to (B, D) and (B·P, D),
    in order, and either may be None   chunked=False: the plain path, one forward and one backward
    loss_fn may gather over processes, and must depend on the model through the representations alone.

    Dropout is a function of (seed, chunk), so the second pass of a chunk drops what its first pass dropped; otherwise
    the cached gradient would belong to other representations (COCO-DR: dropout in the first pass only).
    Call it under `accelerator.accumulate(model)`. accelerator.backward divides by the accumulation and scales for
    fp16, once per chunk; the gradient at the representations is neither. Processes exchange gradients in the last."""
    if not chunked:
        torch.manual_seed(step_seed(seed))
        loss, stats = loss_fn(*model(queries, passages))
        accelerator.backward(loss)
        return loss.detach(), stats

    chunks = [("query", chunk) for chunk in queries] + [("passage", chunk) for chunk in passages]

    def encode(index: int) -> Tensor:
        side, chunk = chunks[index]
        torch.manual_seed(step_seed(seed, index))
        return model([chunk], None)[0] if side == "query" else model(None, [chunk])[1]

    with torch.no_grad():
        reps = [encode(index) for index in range(len(chunks))]
    q_reps = torch.cat(reps[: len(queries)]).requires_grad_()  # (B, D)
    p_reps = torch.cat(reps[len(queries) :]).requires_grad_()  # (B·P, D)
    loss, stats = loss_fn(q_reps, p_reps)
    rep_grads = torch.cat(torch.autograd.grad(loss, (q_reps, p_reps))).split([len(r) for r in reps])

    for index, grad in enumerate(rep_grads):
        last = index == len(chunks) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            accelerator.backward((encode(index) * grad).sum())  # the gradient of this at the representations is `grad`
    return loss.detach(), stats
