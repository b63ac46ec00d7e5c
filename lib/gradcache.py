"""Large contrastive batches on small memory: GradCache (Gao et al., arXiv 2101.06983). The only
copy in the project.

A contrastive loss needs all representations at once, but not all activations. So: encode everything
in chunks without gradient; take the gradient of the loss at the representations; encode each chunk
again, with gradient, and push its share of that gradient through. The price is one more forward
pass.

Dropout is a function of (seed, chunk), so the second pass of a chunk drops what its first pass
dropped; otherwise the cached gradient would belong to other representations (COCO-DR: dropout in
the first pass only). accelerator.backward divides by the accumulation and scales for fp16, once per
chunk; the gradient at the representations is neither. Processes exchange gradients in the last
chunk."""

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.text import step_seed


def contrastive_backward(
    accelerator: Accelerator, model: nn.Module, batch: dict, loss_fn: Callable, seed: int
) -> tuple[Tensor, dict]:
    """Encode both sides of a batch chunk by chunk, compute `loss_fn(q_reps, p_reps) -> (scalar,
    stats)`, backpropagate into the parameters. Returns (loss, stats), detached; the loss is neither
    scaled nor divided by the accumulation.

    model     the prepared (DDP-wrapped) one; model(query, passage) encodes both sides, or one side
              where the other is None
    batch     "query" and "passage" as lib/groups.py makes them
    loss_fn   gets (B, D) and (B·P·M, D) in query-major order, may gather over processes, and must
              depend on the model through the representations alone

    Call it under `accelerator.accumulate(model)`."""
    query, passage = batch["query"], batch["passage"]
    queries = len(query["chunks"])

    encoders = [lambda chunk=chunk: (model(chunk, None)[0], 0.0) for chunk in query["chunks"]]
    encoders += [lambda chunk=chunk: (model(None, chunk)[1], 0.0) for chunk in passage["chunks"]]

    def loss_of(reps: list[Tensor]) -> tuple[Tensor, dict]:
        q_reps = torch.cat(reps[:queries])[query["order"]]
        p_reps = torch.cat(reps[queries:])[passage["order"]]
        return loss_fn(q_reps, p_reps)

    return cached_backward(accelerator, model, encoders, loss_of, seed)


def cached_backward(
    accelerator: Accelerator,
    model: nn.Module,
    encoders: list[Callable],
    loss_fn: Callable,
    seed: int,
) -> tuple[Tensor, object]:
    """encoders: for each chunk a function () -> (its reps (n, D), a loss that belongs to the chunk
    alone, or 0), called twice; loss_fn(list of the reps) -> (scalar, stats). Backpropagates the sum
    of all losses; returns those of loss_fn, detached."""

    def replay(index: int) -> tuple[Tensor, Tensor | float]:
        torch.manual_seed(step_seed(seed, index))
        return encoders[index]()

    with torch.no_grad():
        reps = [replay(index)[0] for index in range(len(encoders))]
    reps = [chunk.requires_grad_() for chunk in reps]  # (n, D) each
    loss, stats = loss_fn(reps)
    for index, grad in enumerate(torch.autograd.grad(loss, reps)):
        last = index == len(encoders) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            again, own = replay(index)
            # the gradient of this product at the reps is `grad`
            accelerator.backward((again * grad).sum() + own)
    return loss.detach(), stats
