"""The contrast of coCondenser between spans of documents, and its training step in chunks."""

from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from lib.dist import all_gather_with_grad, world
from lib.gradcache import cached_backward
from lib.lm_head import Term
from lib.masking import DROPOUT
from lib.text import step_seed


def span_contrast(h: Tensor) -> Term:
    """Cross-entropy of each span over all other spans of all processes. The right one is its
    partner, row r XOR 1.

    loss_r = -log( exp(s[r, r ^ 1]) / sum_{j != r} exp(s[r, j]) ),  s = h @ h_all.T in fp32
    h: (n, D), n even, the same n on all processes   ->   the sum over the n local rows
    Spans of a copy of the document are negatives too."""
    n = len(h)
    everyone = all_gather_with_grad(h.float())  # (W·n, D)
    rows = world()[0] * n + torch.arange(n, device=h.device)
    with torch.autocast(h.device.type, enabled=False):
        scores = h.float() @ everyone.T
    scores = scores.scatter(1, rows[:, None], float("-inf"))
    loss = F.cross_entropy(scores, rows ^ 1, reduction="sum")
    return Term(loss, n, (scores.argmax(1) == rows ^ 1).sum())


def span_backward(
    accelerator: Accelerator, model: nn.Module, batch: dict, seed: int, size: int
) -> dict[str, Term]:
    """The training step of coCondenser with `size` spans encoded at a time (GradCache). It adds the
    gradients of the plain step and returns its loss terms, detached.

    model: the prepared CoCondenser. The MLM losses belong to a chunk, the contrast to all chunks.
    Each chunk's share of the MLM means needs the labels of all chunks and processes, counted
    first."""
    chunks = []
    for start in range(0, len(batch["rows"]), size):
        part = slice(start, start + size)
        width = int(batch["attention_mask"][part].sum(1).max())
        texts = {name: batch[name][part, :width] for name in ("input_ids", "attention_mask")}
        chunks.append(batch | texts | {"rows": batch["rows"][part]})
    labels = accelerator.unwrap_model(model).corrupt(batch, seed)[1].sum()
    labels = accelerator.reduce(labels, "sum").clamp(min=1)
    W = accelerator.num_processes
    found = {"encoder": [], "decoder": []}  # terms of each chunk

    def encode(chunk: dict) -> tuple[Tensor, Tensor | float]:
        terms, h = model(chunk, seed, chunk=True)
        for name, term in terms.items():
            found[name].append(term._replace(loss=term.loss.detach()))
        return h, sum(W * term.loss / labels for term in terms.values())

    def contrast(reps: list[Tensor]) -> tuple[Tensor, Term]:
        term = span_contrast(torch.cat(reps))
        return term.loss / term.labels, term._replace(loss=term.loss.detach())

    dropout_seed = step_seed(seed, DROPOUT, batch["micro_step"], accelerator.process_index)
    encoders = [partial(encode, chunk) for chunk in chunks]
    _, term = cached_backward(accelerator, model, encoders, contrast, dropout_seed)
    sums = {name: Term(*(sum(t[i] for t in found[name]) for i in range(3))) for name in found}
    return {**sums, "contrast": term}
