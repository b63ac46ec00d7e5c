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
    """Cross-entropy of each span over all other spans of all processes; its partner is row r XOR 1.

    loss_r = -log( exp(s[r, r ^ 1]) / sum_{j != r} exp(s[r, j]) ),  s = h @ h_all.T in fp32
    h: (n, D), n even, the same n on all processes   ->   the sum over the n local rows"""
    n = len(h)
    rows = world()[0] * n + torch.arange(n, device=h.device)
    everyone = all_gather_with_grad(h.float())  # (W·n, D)
    with torch.autocast(h.device.type, enabled=False):
        scores = h.float() @ everyone.T
    scores = scores.scatter(1, rows[:, None], float("-inf"))
    loss = F.cross_entropy(scores, rows ^ 1, reduction="sum")
    return Term(loss, n, (scores.argmax(1) == rows ^ 1).sum())


def span_backward(
    accelerator: Accelerator, model: nn.Module, batch: dict, seed: int, size: int
) -> dict[str, Term]:
    """The training step of coCondenser with `size` spans encoded at a time (GradCache). It adds the
    gradients of the plain step and returns its loss terms, detached. model: the prepared one"""
    labels = accelerator.unwrap_model(model).corrupt(batch, seed)[1].sum()
    labels = accelerator.reduce(labels, "sum").clamp(min=1)  # of all chunks and processes
    sums = {name: Term(0, 0, 0) for name in ("encoder", "decoder")}

    def encode(part: slice) -> tuple[Tensor, Tensor | float]:
        width = int(batch["attention_mask"][part].sum(1).max())
        chunk = {name: batch[name][part, :width] for name in ("input_ids", "attention_mask")}
        terms, h = model(batch | chunk | {"rows": batch["rows"][part]}, seed, chunk=True)
        for name, (loss, count, correct, _) in terms.items():
            before = sums[name]
            loss = before.loss + loss.detach()
            sums[name] = Term(loss, before.labels + count, before.correct + correct)
        return h, sum(accelerator.num_processes * term.loss / labels for term in terms.values())

    def contrast(reps: list[Tensor]) -> tuple[Tensor, Term]:
        term = span_contrast(torch.cat(reps))
        return term.loss / term.labels, term._replace(loss=term.loss.detach())

    parts = [slice(start, start + size) for start in range(0, len(batch["rows"]), size)]
    dropout_seed = step_seed(seed, DROPOUT, batch["micro_step"], accelerator.process_index)
    encoders = [partial(encode, part) for part in parts]
    _, term = cached_backward(accelerator, model, encoders, contrast, dropout_seed)
    return {**sums, "contrast": term}
