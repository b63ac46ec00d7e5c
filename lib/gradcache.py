"""Large contrastive batches on small memory: GradCache (Gao et al., arXiv 2101.06983). The only copy in the project.

A contrastive loss needs all representations at once, but not all activations. So: encode everything in chunks without
gradient; take the gradient of the loss at the representations; encode each chunk again, with gradient, and push its
share of that gradient through. The price is one more forward pass.

Dropout is a function of (seed, chunk), so the second pass of a chunk drops what its first pass dropped; otherwise the
cached gradient would belong to other representations (COCO-DR: dropout in the first pass only). accelerator.backward
divides by the accumulation and scales for fp16, once per chunk; the gradient at the representations is neither.
Processes exchange gradients in the last chunk.
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

    Call it under `accelerator.accumulate(model)`."""
    if not chunked:
        torch.manual_seed(step_seed(seed))
        loss, stats = loss_fn(*model(queries, passages))
        accelerator.backward(loss)
        return loss.detach(), stats

    chunks = [*queries, *passages]

    def encode(index: int) -> tuple[Tensor, float]:
        chunk = [chunks[index]]
        return (model(chunk, None)[0] if index < len(queries) else model(None, chunk)[1]), 0.0

    return cached_backward(
        accelerator,
        model,
        encode,
        len(chunks),
        lambda reps: loss_fn(torch.cat(reps[: len(queries)]), torch.cat(reps[len(queries) :])),
        seed,
    )


def cached_backward(
    accelerator: Accelerator,
    model: nn.Module,
    encode: Callable,
    num_chunks: int,
    loss_fn: Callable,
    seed: int,
) -> tuple[Tensor, object]:
    """encode(index) -> (reps of a chunk (n, D), a loss that belongs to the chunk alone, or 0), called twice;
    loss_fn(list of the reps) -> (scalar, stats). Backpropagates the sum of all losses; returns loss_fn's, detached."""

    def replay(index: int) -> tuple[Tensor, Tensor | float]:
        torch.manual_seed(step_seed(seed, index))
        return encode(index)

    with torch.no_grad():
        reps = [replay(index)[0] for index in range(num_chunks)]
    reps = [chunk.requires_grad_() for chunk in reps]  # (n, D) each
    loss, stats = loss_fn(reps)
    for index, grad in enumerate(torch.autograd.grad(loss, reps)):
        last = index == num_chunks - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            again, own = replay(index)
            accelerator.backward(
                (again * grad).sum() + own
            )  # the gradient of the product at the reps is `grad`
    return loss.detach(), stats
