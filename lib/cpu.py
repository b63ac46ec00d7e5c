"""What makes a run on a CPU fast. Without it results differ only by rounding and by the dropout
that is drawn. oneDNN keeps half a megabyte of code for each number of rows that it meets: give it
few different ones, or memory grows."""

from collections.abc import Callable

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa_in_pieces"  # of our attention, in the registry of transformers
PIECE = 2**21  # probabilities that the attention holds at a time


def onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN with kernels of that dtype for this CPU (bf16 needs AVX-512)."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_reorder_linear_weight"):
        return False
    return dtype != torch.bfloat16 or operators._is_mkldnn_bf16_supported()


def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """F.linear as a function of x (..., K); weight (N, K), bias (N,) and x have one dtype. A tenth
    faster: oneDNN lays the weight out once, and not at every call."""
    if not onednn(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def pack_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every Linear of a model compute by `product`, from inputs of any dtype to outputs of
    `dtype`, for inference only. The modules and weights stay: T5's code looks at them."""
    for linear in model.modules():
        if type(linear) is nn.Linear:
            bias = None if linear.bias is None else linear.bias.detach().to(dtype)
            packed = product(linear.weight.detach().to(dtype), bias)
            linear.forward = lambda x, packed=packed: packed(x.to(dtype))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """scaled_dot_product_attention of (B, H, L, d), (B, H, S, d), (B, H, S, d) -> (B, H, L, d).

    mask: bool, True = visible, of four dimensions that broadcast. dropout: 0 when not training; its
    seed comes from torch's generator. With dropout on a CPU, PyTorch's own function keeps all
    probabilities for the backward pass; here they are computed again, piece by piece."""
    if q.device.type != "cpu" or not dropout:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return _Attention.apply(q, k, v, mask, dropout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, dropout):
        ctx.save_for_backward(q, k, v, mask)
        ctx.dropout = dropout
        ctx.seed = int(torch.randint(2**62, ()))
        out = torch.empty_like(q)
        for part, probs, dropped, kept in _pieces(q, k, mask, dropout, ctx.seed):
            torch.matmul(probs.masked_fill_(dropped, 0.0).to(v.dtype), v[part], out=out[part])
            out[part] /= kept
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask = ctx.saved_tensors
        to_q, to_k, to_v = (torch.empty_like(x) for x in (q, k, v))
        for part, probs, dropped, kept in _pieces(q, k, mask, ctx.dropout, ctx.seed):
            g = grad[part] / kept
            to_probs = (g @ v[part].transpose(-1, -2)).float().masked_fill_(dropped, 0.0)
            visible = probs.masked_fill(dropped, 0.0).to(v.dtype)
            torch.matmul(visible.transpose(-1, -2), g, out=to_v[part])
            to_probs -= (to_probs * probs).sum(-1, keepdim=True)
            to_scores = to_probs.mul_(probs).mul_(q.shape[-1] ** -0.5).to(q.dtype)
            torch.matmul(to_scores, k[part], out=to_q[part])
            torch.matmul(to_scores.transpose(-1, -2), q[part], out=to_k[part])
        return to_q, to_k, to_v, None, None


def _pieces(q, k, mask, dropout, seed):
    """For each piece: (slice of texts, probabilities (n, H, L, S) fp32, bool: zeroed by dropout,
    share of the probabilities that stay). Dropout is drawn in steps of 1/65536."""
    B, H, L, d = q.shape
    texts = max(PIECE // (H * L * k.shape[2]), 1)
    threshold = round(dropout * 2**16)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, B, texts):
        part = slice(start, start + texts)
        scores = ((q[part] * d**-0.5) @ k[part].transpose(-1, -2)).float()
        if mask is not None:
            hidden = ~mask.expand(B, -1, -1, -1)[part]
            scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        words = torch.empty(-(-scores.numel() // 4), dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator)  # four draws of 16 bits in each
        draws = words.view(torch.int16)[: scores.numel()].view(scores.shape)
        probs = torch.softmax(scores, -1, out=scores)
        yield part, probs, draws < threshold - 2**15, 1 - threshold / 2**16


def speed_up_attention(model: nn.Module) -> None:
    """Make a transformers model that attends by PyTorch's function use `attention`."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        AttentionInterface.register(NAME, _forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As transformers calls an attention: (B, H, L, d) -> ((B, L, H, d), None)."""
    plain = scaling in (None, query.shape[-1] ** -0.5) and query.shape[1] == key.shape[1]
    if dropout and query.device.type == "cpu" and plain and not getattr(module, "is_causal", True):
        out = attention(query, key, value, attention_mask, dropout)
        return out.transpose(1, 2).contiguous(), None
    kwargs |= {"dropout": dropout, "scaling": scaling}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable  # torch.compile cannot follow numba
def max_over_positions(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima (B, T) fp32, first position of each (B, T) int32) of logits (B, L, T) where mask
    (B, L) is True; -inf and 0 without a position. Twenty times as fast as torch.max."""
    B, _, T = logits.shape
    highest = torch.empty(B, T)
    where = torch.zeros(B, T, dtype=torch.int32)
    _running_max(logits.float().numpy(), mask.numpy(), highest.numpy(), where.numpy())
    return highest, where


@numba.njit(nogil=True, cache=True)
def _running_max(logits, mask, highest, where):
    """A NaN stays one."""
    for b in range(len(logits)):
        highest[b] = -np.inf
        for position in range(logits.shape[1]):
            if mask[b, position]:
                line, best, at = logits[b, position], highest[b], where[b]
                for v in range(len(line)):  # no branch, so that the compiler compares 16 at a time
                    better = (line[v] > best[v]) | (line[v] != line[v])
                    best[v] = line[v] if better else best[v]
                    at[v] = position if better else at[v]
