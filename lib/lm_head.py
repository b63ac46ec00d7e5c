"""The head of a masked language model without its logits, which would take gigabytes.

B texts, L tokens of the longest, D hidden size, V vocabulary, n tokens with a label. `hidden` is
what the transform of the LM head returns; `weight` (V, D) and `bias` (V,) are its output layer.
Products are in autocast's precision; maxima, softmaxes and losses in fp32."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.cpu import max_over_positions

# fp32 logits that linear_cross_entropy holds at a time: 64 MB on a CPU, 256 MB on a GPU
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}
# logits that max_pooled_logits holds at a time: it reads them once, fastest from a CPU's cache
POOLED_LOGITS = {"cpu": 2**21, "cuda": 2**26}


class Term(NamedTuple):
    """One loss term of a batch; the caller divides the sum by the labels of all processes."""

    loss: Tensor  # sum over the labels
    labels: int
    correct: Tensor  # number of labels that scored highest
    weight: float = 1.0  # of the mean in the total loss


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
    twice. The gradient of the *sum* is of order 1: fp16 needs no loss scale before the backward
    pass, where GradScaler's arrives in fp32."""
    assert hidden.shape[1:] == weight.shape[1:] and labels.shape == hidden.shape[:1]
    with_grad = torch.is_grad_enabled()
    loss, correct = _LinearCrossEntropy.apply(hidden, weight, bias, labels, with_grad)
    return Term(loss, len(labels), correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, with_grad):
        dtype = _product_dtype(hidden)
        w = weight.to(dtype)
        n, V = len(hidden), len(weight)
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        if with_grad:
            to_hidden = torch.zeros_like(hidden, dtype=torch.float32)
            to_weight = torch.zeros_like(weight, dtype=torch.float32)
            to_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
            ctx.grads = to_hidden, to_weight, to_bias
        rows = min(max(1, CHUNK_LOGITS.get(hidden.device.type, 2**26) // V), max(n, 1))
        # one buffer for all chunks: the system would zero fresh memory of this size page by page
        buffer = torch.empty(rows, V, device=hidden.device)
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
            if not with_grad:
                continue
            grad = probs.scatter_add_(1, y, torch.full_like(at_label, -1.0))  # d loss / d logits
            if bias is not None:
                to_bias += grad.sum(0)
            grad = grad if dtype == torch.float32 else low.copy_(grad)
            to_hidden[part] = grad @ w
            if dtype == torch.float32:
                to_weight.addmm_(grad.T, h)  # no second (V, D)
            else:
                to_weight += grad.T @ h
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, upstream, _):
        """fp32; autograd casts each gradient to the dtype of its input."""
        return *(None if grad is None else grad * upstream for grad in ctx.grads), None, None


def max_pooled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """The highest logit of each term of the vocabulary over the positions of a text.

    pooled[b, v] = max_{l: mask[b, l]} (hidden[b, l] @ weight[v] + bias[v]);  0 without a position
    hidden: (B, L, D)   mask: (B, L) bool, True = take   ->   (B, V) fp32
    The gradient goes back through the position of each maximum alone, of equal ones the first: at
    most B·V weighted rows in place of two products as large as the forward pass."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
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
        for start in range(0, V, terms):
            block = slice(start, start + terms)
            w, b = weight[block].to(dtype), bias[block].to(dtype)
            logits = torch.addmm(b, h, w.T).view(B, L, -1)
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
        grad · hidden[position] to one term: two weighted sums of rows."""
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
        return rows.view_as(hidden), to_weight, grad.sum(0), None


def _sum_rows(rows: Tensor, index: Tensor, factor: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, D) sum of factor[i] · rows[index[i]] over all i with group[i] == g, ascending."""
    first = torch.searchsorted(group, torch.arange(groups, device=group.device))
    return F.embedding_bag(index, rows, first, mode="sum", per_sample_weights=factor)


def bag_of_words(
    logits: Tensor, ids: Tensor, ordinary: Tensor, divisor: Tensor | None = None
) -> Term:
    """The loss of predicting which tokens a text has, from one logit for each of the vocabulary.

    loss = sum over texts of (1/|T|) sum_{v in T} -log softmax(logits)[v], T = the distinct tokens
    logits: (B, V)   ids: (B, L)   ordinary: (B, L) bool, True = counts as a token of the text
    divisor: (B,) in the place of |T|
    The labels are the texts with a token; `correct` counts those whose highest term is in T."""
    tokens = ids.masked_fill(~ordinary, -1).sort(1).values
    distinct = (tokens >= 0) & (tokens != F.pad(tokens[:, :-1], (1, 0), value=-1))
    found = logits.gather(1, tokens.clamp(min=0))  # (B, L)
    loss = ((logits.logsumexp(1, keepdim=True) - found) * distinct).sum(1)
    loss = loss / (distinct.sum(1) if divisor is None else divisor).clamp(min=1)
    correct = ((found == logits.amax(1, keepdim=True)) & distinct).any(1).sum()
    return Term(loss.sum(), int(ordinary.any(1).sum()), correct)
