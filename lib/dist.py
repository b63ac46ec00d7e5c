"""What the processes of a run exchange. On one process every function is the identity."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor

from lib.files import UserError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_main(accelerator, decide: Callable[[], T]) -> T:
    """What decide() returns on the main process, given to all. A UserError or OSError there is
    raised on all of them, because the others already wait for the answer."""
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except (UserError, OSError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1]:
        raise answer[1]
    return answer[0]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        parts = [part.contiguous() for part in grad.chunk(world()[1])]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def all_gather_with_grad(x: Tensor) -> Tensor:
    """x (n, ...) of every process -> (W·n, ...) in the order of the ranks; the same n everywhere.
    Backward, x receives the sum of what the losses of all processes say of it.

    No factor W is needed: process r holds L_r, the mean over its own B queries, and the loss of the
    whole batch is L = (1/W) sum_r L_r. Process r sends sum_s dL_s/d(reps of r) through its own
    reps; DDP averages over processes; (1/W) sum_r sum_s dL_s/dθ through the reps of r is dL/dθ.
    (RetroMAE has gradient in its own slice alone, dL/dθ / W. LexMAE has it in its own queries, and
    loses what other processes say about its passages.)"""
    return _AllGather.apply(x) if world()[1] > 1 else x


def all_gather(x: Tensor) -> Tensor:
    """The same concatenation without gradient: keys, masks, numbers for the log."""
    x = x.detach().contiguous()
    if world()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x)
    return torch.cat(parts)
