"""The head of a masked language model without its logits, which would take gigabytes.

Legend: B texts, L tokens of the longest, D hidden size, V vocabulary, n positions with a label.
`hidden` is what the transform of the LM head returns; `weight` (V, D) and `bias` (V,) are its
output layer. Products are in autocast's precision; maxima, softmaxes and losses in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cpu import max_over_positions

ARCHITECTURES = ("bert", "roberta", "distilbert")  # config.model_type of known LM heads
# fp32 logits that linear_cross_entropy holds at a time: 64 MB on a CPU, 256 MB on a GPU
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}
# logits that max_pooled_logits holds at a time: it reads them once, fastest from a CPU's cache
POOLED_LOGITS = {"cpu": 2**21, "cuda": 2**26}


class Term(NamedTuple):
    """One loss term of a batch: a sum, so that the caller can divide by the labels of all
    processes."""

    loss: Tensor  # sum over the labels
    labels: int
    correct: Tensor  # number of labels that scored highest
    weight: float = 1.0  # of the mean in the total loss


def head_transform(lm: nn.Module, hidden: Tensor) -> Tensor:
    """The LM head up to its output layer: dense, activation, norm. (n, D) -> (n, D)"""
    if lm.config.model_type == "bert":
        return lm.cls.predictions.transform(hidden)
    if lm.config.model_type == "roberta":
        return lm.lm_head.layer_norm(F.gelu(lm.lm_head.dense(hidden)))
    return lm.vocab_layer_norm(lm.activation(lm.vocab_transform(hidden)))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Term:
    """Cross-entropy of a large output layer.

    loss = sum_i -log softmax(hidden[i] @ weight.T + bias)[labels[i]]
    hidden: (n, D), n >= 0   weight: (V, D)   bias: (V,) or None   labels: (n,) int64
    The gradient of the logits is known as soon as they are. So the forward pass multiplies it with
    both factors chunk by chunk, and the backward pass only scales: no logits are kept or computed
    twice. The gradient of the *sum* is of order 1, so fp16 needs no loss scale inside; GradScaler's
    scale arrives in the backward pass, in fp32."""
    assert hidden.shape[1:] == weight.shape[1:] and labels.shape == hidden.shape[:1]
    with_grad = torch.is_grad_enabled()
    loss, correct = _LinearCrossEntropy.apply(hidden, weight, bias, labels, with_grad)
    return Term(loss, len(labels), correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, with_grad):
        dtype = _product_dtype(hidden)
        n, w = len(hidden), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        needs = [need and with_grad for need in ctx.needs_input_grad[:3]]
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(x, dtype=torch.float32) if need else None
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        )
        rows = min(max(1, CHUNK_LOGITS.get(hidden.device.type, 2**26) // len(weight)), max(n, 1))
        # one buffer for all chunks: the system would zero fresh memory of this size page by page
        buffer = torch.empty(rows, len(weight), device=hidden.device)
        products = buffer if dtype == torch.float32 else torch.empty_like(buffer, dtype=dtype)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            h = hidden[part].to(dtype)
            y = labels[part, None]
            logits = buffer[: len(h)]
            low = torch.mm(h, w.T, out=products[: len(h)])  # in autocast's precision
            if dtype != torch.float32:
                logits.copy_(low)
            if bias is not None:
                logits += bias
            highest = logits.amax(1, keepdim=True)
            at_label = logits.gather(1, y)
            correct += (at_label >= highest).sum()
            probs = torch.softmax(logits, 1, out=logits)
            # log of the sum of exponentials: highest - log(probability of the highest)
            loss += (highest - probs.amax(1, keepdim=True).log() - at_label).sum()
            if not any(needs):
                continue
            grad = probs.scatter_add_(1, y, torch.full_like(at_label, -1.0))  # d loss / d logits
            if to_bias is not None:
                to_bias += grad.sum(0)
            grad = grad if dtype == torch.float32 else low.copy_(grad)
            if to_hidden is not None:
                to_hidden[part] = grad @ w
            if to_weight is not None and dtype == torch.float32:
                to_weight.addmm_(grad.T, h)  # no second (V, D)
            elif to_weight is not None:
                to_weight += grad.T @ h
        ctx.grads = to_hidden, to_weight, to_bias
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, upstream, _):
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        grads = [None if grad is None else (grad * upstream).to(dtype) for grad, dtype in pairs]
        return *grads, None, None


def max_pooled_logits(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The highest logit of each term of the vocabulary over the positions of a text.

    pooled[b, v] = max_{l: mask[b, l]} (hidden[b, l] @ weight[v] + bias[v]);  0 without a position
    hidden: (B, L, D)   weight: (V, D)   bias: (V,)   mask: (B, L) bool, True = take
    -> (B, V) fp32
    Keeps the position of each maximum (of equal ones the first), and the gradient goes back through
    this position alone: at most B·V weighted rows in place of two products as large as the forward
    pass."""
    assert hidden.shape[:2] == mask.shape and mask.dtype == torch.bool
    pooled = _MaxPooledLogits.apply(hidden, weight, bias, mask)
    return pooled.masked_fill(~mask.any(1, keepdim=True), 0.0)


class _MaxPooledLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, mask):
        dtype = _product_dtype(hidden)
        B, L, D = hidden.shape
        V = len(weight)
        h = hidden.to(dtype).flatten(0, 1)
        pooled = torch.empty(B, V, device=hidden.device)
        where = torch.empty(B, V, dtype=torch.int32, device=hidden.device)
        terms = max(1, POOLED_LOGITS.get(hidden.device.type, 2**26) // (B * L))
        buffer = torch.empty(B * L * min(terms, V), dtype=dtype, device=hidden.device)
        for start in range(0, V, terms):
            block = slice(start, start + terms)
            w, b = weight[block].to(dtype), bias[block].to(dtype)
            out = buffer[: B * L * len(w)].view(B * L, -1)
            logits = torch.addmm(b, h, w.T, out=out).view(B, L, -1)
            if hidden.device.type == "cpu":
                highest, places = max_over_positions(logits, mask)
            else:
                highest, places = logits.masked_fill_(~mask[..., None], float("-inf")).max(1)
            pooled[:, block] = highest
            where[:, block] = places
        ctx.save_for_backward(hidden, weight, where)
        return pooled

    @staticmethod
    def backward(ctx, grad):
        """Each (text, term) with a gradient adds grad · weight[term] to one position and
        grad · hidden[position] to one term: two weighted sums of rows, without a (B, V, D)
        tensor."""
        hidden, weight, where = ctx.saved_tensors
        grad = grad.float()
        flat = hidden.flatten(0, 1).float()
        first = hidden.shape[1] * torch.arange(len(hidden), device=grad.device)[:, None]
        term, text = grad.T.nonzero(as_tuple=True)  # in the order of the terms
        place = (where + first)[text, term]  # rows of flat
        share = grad[text, term]
        to_weight = _sum_rows(flat, place, share, term, len(weight))  # (V, D)
        order = place.argsort()
        rows = _sum_rows(weight.float(), term[order], share[order], place[order], len(flat))
        to_hidden = rows.view_as(hidden).to(hidden.dtype)
        return to_hidden, to_weight.to(weight.dtype), grad.sum(0), None


def _sum_rows(rows: Tensor, index: Tensor, factor: Tensor, group: Tensor, groups: int) -> Tensor:
    """out[g] = sum of factor[i] · rows[index[i]] over all i with group[i] == g; `group` must
    ascend. -> (groups, D)"""
    first = torch.searchsorted(group, torch.arange(groups, device=group.device))
    return F.embedding_bag(index, rows, first, mode="sum", per_sample_weights=factor)
