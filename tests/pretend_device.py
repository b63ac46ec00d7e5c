"""A device of PyTorch that does not exist, so that code for a GPU runs where there is none: every
`device.type == "cpu"` is false for it, and a tensor that was left on the CPU cannot be combined
with its tensors. Its numbers are computed by the CPU.

    python tests/pretend_device.py FOLDER      the checks of bench/gpu_right.py, a line of JSON each

It cannot be taken back, so it has a process of its own."""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", backend_module=Backend())
PRETEND = torch.device("pretend:0")
aten = torch.ops.aten
# what copies from device to device, or takes indices from the CPU, on a GPU too
BETWEEN = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}
BETWEEN.add(aten._index_put_impl_.default)


class There(torch.Tensor):
    """A tensor on the device. raw: its numbers, on the CPU"""

    @staticmethod
    def __new__(cls, raw):
        facts = {"dtype": raw.dtype, "device": PRETEND, "requires_grad": False}
        facts |= {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), **facts)

    def __init__(self, raw):
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self):
        return self.raw.tolist()

    def new_tensor(self, data):
        return There(torch.tensor(data, dtype=self.dtype))


class Factories(TorchDispatchMode):
    """Also functions that are given no tensor but the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """Call an operator with the numbers of the tensors. RuntimeError: some are on the CPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    # a number may be on the CPU, but cannot take a result
    here = [x for x in tensors if not isinstance(x, There) and x.ndim]
    if function._schema.is_mutable and not isinstance(args[0], There | list):
        here.append(args[0])
    if there and here and function not in BETWEEN:
        raise RuntimeError(f"{function}: a tensor of {tuple(here[0].shape)} is on the CPU")
    to = there
    if kwargs.get("device") is not None:
        to = torch.device(kwargs["device"]).type == PRETEND.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    raw = tree_map(lambda x: x.raw if isinstance(x, There) else x, (args, kwargs))
    found = function(*raw[0], **raw[1])
    if not to:
        return found
    found = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, found)
    return return_and_correct_aliasing(function, args, kwargs, found) if there else found


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """What scaled_dot_product_attention computes; PyTorch chooses a kernel by the device."""
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def main(folder: Path) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["ISTHMUS_CACHE"] = str(folder / "cache")
    from bench.gpu_right import Right
    from lib import launch
    from lib.objectives import OBJECTIVES

    make = launch.make_accelerator

    def make_accelerator(*args, **options):
        accelerator = make(*args, **options)
        if os.environ["ACCELERATE_USE_CPU"] == "false":
            for state in (accelerator.state, PartialState()):  # one is refreshed from the other
                state.device = PRETEND
        return accelerator

    right = Right(folder, PRETEND.type, tiny=True)
    right.precisions = ["no"]

    def report(checks):
        for one in checks:
            print(json.dumps(vars(one)), flush=True)

    forward = OBJECTIVES["mlm"].forward

    def forgetful(self, batch, seed):
        terms = forward(self, batch, seed)
        loss = terms["encoder"].loss + torch.zeros(2).sum(0, keepdim=True)
        return {"encoder": terms["encoder"]._replace(loss=loss[0])}

    with (
        patch.object(launch, "make_accelerator", make_accelerator),
        patch.object(F, "scaled_dot_product_attention", attention),
        Factories(),
    ):
        report(right.objectives())
        report(right.heads_and_losses())
        report(right.lamb())
        with patch.object(OBJECTIVES["mlm"], "forward", forgetful):
            report(right.compare("forgetful", "pretrain_mae", right.pretraining("mlm")))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(Path(sys.argv[1]))
