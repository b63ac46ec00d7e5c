"""The head of a masked language model, without its logits: a vocabulary of 30,000 times the tokens of a batch is
gigabytes.

Legend: B texts, L tokens of the longest, D hidden size, V vocabulary, n labelled positions. `hidden` is what the LM
head's transform gives, `weight` (V, D) and `bias` (V,) its output layer. Products are in autocast's precision, maxima,
softmaxes and losses in fp32. Logits exist for CHUNK_LOGITS / V rows, or POOLED_LOGITS / (B·L) terms, at a time.
"""

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURES = (
    "bert",
    "roberta",
    "distilbert",
)  # config.model_type: those whose LM head we take apart


CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}  # fp32 logits held at a time: 64 MB, on a GPU 256 MB


POOLED_LOGITS = {
    "cpu": 2**21,
    "cuda": 2**26,
}  # by max_pooled_logits, which reads them once: best from the cache


def head_transform(lm: nn.Module, hidden: Tensor) -> Tensor:
    """The LM head up to its output layer: dense, activation, norm. (n, D) -> (n, D)"""
    if lm.config.model_type == "bert":
        return lm.cls.predictions.transform(hidden)
    if lm.config.model_type == "roberta":
        return lm.lm_head.layer_norm(F.gelu(lm.lm_head.dense(hidden)))
    return lm.vocab_layer_norm(lm.activation(lm.vocab_transform(hidden)))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, dtype, with_grad):
        n, w = len(hidden), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        leaves = [
            (x, with_grad and need)
            for x, need in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        grads = [torch.zeros_like(x, dtype=torch.float32) if need else None for x, need in leaves]
        needs = [need for _, need in leaves]
        rows = min(max(1, CHUNK_LOGITS.get(hidden.device.type, 2**26) // len(weight)), max(n, 1))
        # one buffer for all chunks: fresh memory of this size is given back and zeroed page by page each time
        buffer = torch.empty(rows, len(weight), device=hidden.device)
        products = buffer if dtype == torch.float32 else torch.empty_like(buffer, dtype=dtype)
        for start in range(0, n, rows):
            h, y = hidden[start : start + rows].to(dtype), labels[start : start + rows, None]
            logits, low = buffer[: len(h)], products[: len(h)]
            torch.mm(h, w.T, out=low)
            if dtype != torch.float32:
                logits.copy_(low)
            if bias is not None:
                logits += bias
            highest, at_label = logits.amax(1, keepdim=True), logits.gather(1, y)
            correct += (at_label >= highest).sum()
            probs = torch.softmax(logits, 1, out=logits)
            # log of the sum of exponentials: highest - log(probability of the highest)
            loss += (highest - probs.amax(1, keepdim=True).log() - at_label).sum()
            if not any(needs):
                continue
            grad = probs.scatter_add_(1, y, torch.full_like(at_label, -1.0))  # d loss / d logits
            if needs[2]:
                grads[2] += grad.sum(0)
            grad = grad if dtype == torch.float32 else low.copy_(grad)
            if needs[0]:
                grads[0][start : start + rows] = grad @ w
            if needs[1] and dtype == torch.float32:
                grads[1].addmm_(grad.T, h)  # no second (V, D)
            elif needs[1]:
                grads[1] += grad.T @ h
        ctx.grads, ctx.dtypes = (
            grads,
            [None if x is None else x.dtype for x in (hidden, weight, bias)],
        )
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, upstream, _):
        grads = [
            None if g is None else (g * upstream).to(t)
            for g, t in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies, number of labels that score highest) of a large output layer, without its logits.

    loss = sum_i -log softmax(hidden[i] @ weight.T + bias)[labels[i]]
    hidden: (n, D), n >= 0   weight: (V, D)   bias: (V,) or None   labels: (n,) int64, none to ignore   ->   scalars
    Logits exist for CHUNK_LOGITS / V rows at a time. Their gradient is known as soon as they are, so the forward pass
    multiplies it with both factors, and the backward pass only scales: no logits are kept or computed twice. Products
    are in autocast's precision, softmax, loss and sums in fp32. The gradient of the *sum* of the losses is of order 1
    and needs no loss scale of its own in fp16; GradScaler's arrives in the backward pass, in fp32."""
    assert hidden.shape[1:] == weight.shape[1:] and labels.shape == hidden.shape[:1]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, dtype, torch.is_grad_enabled())


@numba.njit(nogil=True, cache=True)
def _running_max(logits, mask, highest, where):
    """Maxima of logits (B, L, T) over the positions that mask (B, L) keeps, into (B, T), and the first position of
    each. A NaN stays one. On a CPU a twentieth of the time of torch.max, and less than that of torch.amax."""
    for b in range(len(logits)):
        highest[b] = -np.inf
        for position in range(logits.shape[1]):
            if mask[b, position]:
                line, best, at = logits[b, position], highest[b], where[b]
                for v in range(len(line)):  # no branch, so that the compiler compares 16 at a time
                    better = (line[v] > best[v]) | (line[v] != line[v])
                    best[v] = line[v] if better else best[v]
                    at[v] = position if better else at[v]


def _max_over_positions(logits: Tensor, mask: Tensor, highest: Tensor, where: Tensor) -> None:
    if logits.device.type == "cpu":
        values, places = (
            torch.empty(len(logits), logits.shape[2], dtype=kind)
            for kind in (torch.float32, torch.int32)
        )
        _running_max(logits.float().numpy(), mask.numpy(), values.numpy(), places.zero_().numpy())
    else:
        values, places = logits.masked_fill_(~mask[..., None], float("-inf")).max(1)
    highest.copy_(values)
    where.copy_(places)


class _MaxPooledLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, mask, dtype):
        B, L, D = hidden.shape
        h = hidden.to(dtype).flatten(0, 1)
        pooled = torch.empty(B, len(weight), device=hidden.device)
        where = torch.empty(B, len(weight), dtype=torch.int32, device=hidden.device)
        terms = max(1, POOLED_LOGITS.get(hidden.device.type, 2**26) // (B * L))
        buffer = torch.empty(B * L * min(terms, len(weight)), dtype=dtype, device=hidden.device)
        for start in range(0, len(weight), terms):
            block = slice(start, start + terms)
            w, b = weight[block].to(dtype), bias[block].to(dtype)
            logits = torch.addmm(b, h, w.T, out=buffer[: B * L * len(w)].view(B * L, -1)).view(
                B, L, -1
            )
            _max_over_positions(logits, mask, pooled[:, block], where[:, block])
        ctx.save_for_backward(hidden, weight, where)
        return pooled

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, where = ctx.saved_tensors
        grad, flat = grad.float(), hidden.flatten(0, 1).float()
        where = (
            where + hidden.shape[1] * torch.arange(len(hidden), device=grad.device)[:, None]
        )  # into flat
        # each (text, term) with a gradient adds grad · weight[term] to one position, and grad · hidden[position] to
        # one term: two weighted sums of rows, without a (B, V, D) tensor, over what a ReLU behind this lets through
        term, text = grad.T.nonzero(as_tuple=True)  # by term
        place, share = where[text, term], grad[text, term]
        to_weight = _sum_rows(flat, place, share, term, len(weight))  # (V, D)
        by_place = place.argsort()
        place, term, share = place[by_place], term[by_place], share[by_place]
        to_hidden = _sum_rows(weight.float(), term, share, place, len(flat))  # (B·L, D)
        return (
            to_hidden.view_as(hidden).to(hidden.dtype),
            to_weight.to(weight.dtype),
            grad.sum(0),
            None,
            None,
        )


def _sum_rows(
    rows: Tensor, index: Tensor, factor: Tensor, group: Tensor, num_groups: int
) -> Tensor:
    """out[g] = sum of factor[i] · rows[index[i]] over the i with group[i] == g; group ascends. -> (num_groups, D)"""
    first = torch.searchsorted(group, torch.arange(num_groups, device=group.device))
    return F.embedding_bag(index, rows, first, mode="sum", per_sample_weights=factor)


def max_pooled_logits(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The highest logit of each term of the vocabulary over the positions of a text, without the (B, L, V) logits.

    pooled[b, v] = max_{l: mask[b, l]} (hidden[b, l] @ weight[v] + bias[v]);   0 for a text without a position
    hidden: (B, L, D)   weight: (V, D)   bias: (V,)   mask: (B, L) bool, True = counts   ->   (B, V) fp32
    Keeps the position of each maximum (the first of equals), through which alone the gradient goes back: at most B·V
    weighted rows, where the gradient of the full logits is two products of the size of the forward pass."""
    assert (
        hidden.shape[:2] == mask.shape
        and hidden.shape[2:] == weight.shape[1:]
        and mask.dtype == torch.bool
    )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    pooled = _MaxPooledLogits.apply(hidden, weight, bias, mask, dtype)
    return pooled.masked_fill(~mask.any(1, keepdim=True), 0.0)
