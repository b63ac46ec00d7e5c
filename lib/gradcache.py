"""Large contrastive batches on small memory: GradCache (Gao et al., arXiv 2101.06983).

A contrastive loss needs all representations at once, but not all activations. So: encode everything
in chunks without gradient; take the gradient of the loss at the representations; encode each chunk
again, with gradient, and push its share of that gradient through. The price is one more forward
pass.

Dropout is a function of (seed, chunk), so that both passes of a chunk drop the same (COCO-DR:
dropout in the first pass only). Processes exchange gradients in the last chunk."""

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.text import step_seed


def contrastive_backward(
    accelerator: Accelerator, model: nn.Module, batch: dict, loss_fn: Callable, seed: int
) -> tuple[Tensor, dict]:
    """Forward and backward pass of a batch of lib/groups.py, chunk by chunk, under
    `accelerator.accumulate(model)` -> what loss_fn returned, the loss detached.

    model     the prepared one: model(query, passage), either of which may be None
    loss_fn   (batch, q_reps (B, D), p_reps (B·P·M, D), query-major) -> (scalar, stats)"""
    query = batch["query"]
    passage = batch["passage"]
    queries = len(query["chunks"])
    encoders = [lambda chunk=chunk: (model(chunk, None)[0], 0.0) for chunk in query["chunks"]]
    encoders += [lambda chunk=chunk: (model(None, chunk)[1], 0.0) for chunk in passage["chunks"]]

    def loss_of(reps: list[Tensor]) -> tuple[Tensor, dict]:
        q_reps = torch.cat(reps[:queries])[query["order"]]
        p_reps = torch.cat(reps[queries:])[passage["order"]]
        return loss_fn(batch, q_reps, p_reps)

    return cached_backward(accelerator, model, encoders, loss_of, seed)


def cached_backward(
    accelerator: Accelerator, model: nn.Module, encoders: list, loss_fn: Callable, seed: int
) -> tuple[Tensor, object]:
    """encoders: for each chunk a function () -> (its reps (n, D), a loss that belongs to the chunk
    alone, or 0), called twice; loss_fn(list of the reps) -> (scalar, stats). Backpropagates the sum
    of all losses; returns those of loss_fn, detached, neither scaled nor divided by the
    accumulation."""

    def replay(index: int) -> tuple[Tensor, Tensor | float]:
        torch.manual_seed(step_seed(seed, index))
        return encoders[index]()

    with torch.no_grad():
        reps = [replay(index)[0] for index in range(len(encoders))]
    reps = [chunk.requires_grad_() for chunk in reps]
    loss, stats = loss_fn(reps)
    for index, grad in enumerate(torch.autograd.grad(loss, reps)):
        last = index == len(encoders) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            again, own = replay(index)
            if again.requires_grad:  # not from a table of fixed weights
                # the gradient of this product at the reps is `grad`
                accelerator.backward((again * grad).sum() + own)
    return loss.detach(), stats
