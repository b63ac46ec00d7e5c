"""Matrix products with a constant matrix on a CPU: its memory is laid out once as oneDNN's kernels read it, instead of
at every call. What torch.compile does to frozen weights; a tenth faster than what torch does by itself.

oneDNN keeps code, about half a megabyte, for each number of rows it meets: give it few (blocks of one size, lengths in
steps), or memory grows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def onednn(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN, and oneDNN kernels of that dtype for this CPU (bf16: from AVX-512 on)."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
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
