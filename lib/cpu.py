"""Matrix products with a constant matrix on a CPU: its memory is laid out once as oneDNN's kernels read it, instead of
at every call. What torch.compile does to frozen weights; a tenth faster than what torch does by itself.

oneDNN keeps code, about half a megabyte, for each number of rows it meets: give it few (blocks of one size, lengths in
steps), or memory grows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    sdpa_mask,
)


def onednn(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN, and oneDNN kernels of that dtype for this CPU (bf16: from AVX-512 on)."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    ):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """weight (N, K), bias (N,) -> a function of x (..., K) that gives x @ weight.T + bias (..., N), all of weight's
    dtype. The plain product where there is no oneDNN for it."""
    if not onednn(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """A Linear for inference. Inputs are cast to `dtype`, outputs have it."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.product, self.dtype = product(linear.weight.detach().to(dtype), bias), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.to(self.dtype))


def pack_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace all Linears below `module`, for inference alone."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, dtype))


PIECE = 2**21  # probabilities at a time


NAME = "sdpa_in_pieces"


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention of (B, H, L, d), (B, H, S, d), (B, H, S, d) -> (B, H, L, d).

    mask: bool, True = visible, or floats to add; broadcast over (B, H, L, S). dropout: the probability of zeroing, 0
    when not training; drawn in steps of 1/65536, by a seed that torch's generator gives. PyTorch's own function on
    other devices and without dropout."""
    if q.device.type != "cpu" or not dropout:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = int(torch.randint(2**62, ()))
    return _Attention.apply(q, k, v, mask, dropout, scale, seed)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, dropout, scale, seed):
        ctx.save_for_backward(q, k, v, mask)
        ctx.how = dropout, scale, seed
        out = torch.empty_like(q)
        for part, probs, dropped, rest in _pieces(q, k, mask, *ctx.how):
            torch.matmul(probs.masked_fill_(dropped, 0.0).to(v.dtype), v[part], out=out[part])
            out[part] /= rest
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask = ctx.saved_tensors
        dropout, scale, seed = ctx.how
        to_q, to_k, to_v = (torch.empty_like(x) for x in (q, k, v))
        for part, probs, dropped, rest in _pieces(q, k, mask, dropout, scale, seed):
            g = grad[part] / rest
            to_probs = (g @ v[part].transpose(-1, -2)).float().masked_fill_(dropped, 0.0)
            torch.matmul(
                probs.masked_fill(dropped, 0.0).to(v.dtype).transpose(-1, -2), g, out=to_v[part]
            )
            to_probs -= (to_probs * probs).sum(-1, keepdim=True)
            to_scores = to_probs.mul_(probs).mul_(scale).to(q.dtype)
            torch.matmul(to_scores, k[part], out=to_q[part])
            torch.matmul(to_scores.transpose(-1, -2), q[part], out=to_k[part])
        return to_q, to_k, to_v, None, None, None, None


def _pieces(q, k, mask, dropout, scale, seed):
    """(texts, probabilities (n, H, L, S) in fp32, which of them are dropped, share that is not) of each piece."""
    B, H, L, _ = q.shape
    n, cut = max(PIECE // (H * L * k.shape[2]), 1), round(dropout * 2**16)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, B, n):
        part = slice(start, start + n)
        scores = ((q[part] * scale) @ k[part].transpose(-1, -2)).float()
        here = mask if mask is None or mask.shape[0] == 1 or mask.ndim < 4 else mask[part]
        if here is not None:
            scores = (
                scores.masked_fill_(~here, torch.finfo(scores.dtype).min)
                if here.dtype == torch.bool
                else scores + here
            )
        words = torch.empty(
            -(-scores.numel() // 4), dtype=torch.int64
        )  # four draws of 16 bits in each
        draws = words.random_(-(2**63), None, generator=generator).view(torch.int16)[
            : scores.numel()
        ]
        yield (
            part,
            torch.softmax(scores, -1, out=scores),
            draws.view(scores.shape) < cut - 2**15,
            1 - cut / 2**16,
        )


def _forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As transformers calls an attention: (B, H, L, d) -> ((B, L, H, d), None)."""
    if not dropout or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    return attention(query, key, value, attention_mask, dropout, scaling).transpose(
        1, 2
    ).contiguous(), None


def _mask(attention_mask=None, mask_function=None, **how):
    """As transformers asks for a mask: bool, True = visible, or None if all is."""
    plain = (
        mask_function is bidirectional_mask_function
        and attention_mask is not None
        and attention_mask.ndim == 2
    )
    if (
        not plain
        or attention_mask.device.type != "cpu"
        or attention_mask.shape[1] != how["kv_length"]
    ):
        return sdpa_mask(attention_mask=attention_mask, mask_function=mask_function, **how)
    return None if attention_mask.all() else attention_mask.bool()[:, None, None]


def economize(model: nn.Module, checkpointing: bool = False) -> None:
    """Let a transformers encoder that attends by PyTorch's function do so by this one; another is left as it is.
    checkpointing: also keep only the inputs of its layers, each of which then runs once more in the backward pass."""
    if checkpointing:
        newer = getattr(
            model, "activation_checkpointing_enable", None
        )  # the name since transformers 5.22
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        AttentionInterface.register(NAME, _forward)
        AttentionMaskInterface.register(NAME, _mask)
        model.set_attn_implementation(NAME)
