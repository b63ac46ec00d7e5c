"""Our scripts called in this process, on any device and in any precision, and their steps
recorded."""

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from lib import checkpoint, launch
from lib.files import UserError


def words_of(flags: dict) -> list[str]:
    """{"name": value} -> a command line. True is a flag without a value, None leaves it out."""
    found = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        found.append(f"--{name}")
        if value is not True:
            found += map(str, value if isinstance(value, list) else [value])
    return found


def environment_of(device: str, precision: str) -> dict[str, str]:
    """What makes Accelerate take this device ("cpu" or "cuda") and precision (no, bf16, fp16)."""
    return {
        "ACCELERATE_USE_CPU": "true" if device == "cpu" else "false",
        "ACCELERATE_MIXED_PRECISION": precision,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def forget_accelerator() -> None:
    """What Accelerate knows of this process; else the next Accelerator would be as the last."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def call(script: str, flags: dict, device: str, precision: str = "no", **environment) -> str:
    """Run main() of a script in this process; returns what it printed. RuntimeError: it stopped
    with an error."""
    forget_accelerator()
    output = io.StringIO()
    argv = [f"{script}.py", *words_of(flags)]
    main = importlib.import_module(script).main
    with (
        patch.dict(os.environ, environment_of(device, precision) | environment),
        patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            main()
        except (UserError, SystemExit) as error:
            raise RuntimeError(f"{output.getvalue()}\n{argv[0]}: {error}") from error
        finally:
            launch.release_output()
            forget_accelerator()
    return output.getvalue()


def log_of(folder) -> list[dict]:
    """The lines of a training run's log."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@dataclass
class Recorded:
    """What a script has computed until it was stopped."""

    losses: list[float] = field(default_factory=list)  # one for each backward pass
    gradients: list[list[Tensor]] = field(default_factory=list)  # of each step, on the CPU


class Enough(Exception):
    """Stops a script."""


def without_rehearsal():
    """A context: trainers do not save and read back a checkpoint before their first step."""
    return patch.object(checkpoint, "check_checkpoint", lambda *_: None)


@contextlib.contextmanager
def recording(steps: int) -> Iterator[Recorded]:
    """Record `steps` optimizer steps of a script that is called inside, and stop it then."""
    found = Recorded()
    backward, clip = Accelerator.backward, Accelerator.clip_grad_norm_

    def recorded_backward(self, loss, **options):
        found.losses.append(loss.item())
        backward(self, loss, **options)

    def recorded_clip(self, parameters, *args, **options):
        parameters = list(parameters)
        norm = clip(self, parameters, *args, **options)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        found.gradients.append([grad.float().cpu() for grad in gradients])
        if len(found.gradients) == steps:
            raise Enough
        return norm

    with (
        patch.object(Accelerator, "backward", recorded_backward),
        patch.object(Accelerator, "clip_grad_norm_", recorded_clip),
        without_rehearsal(),
        contextlib.suppress(Enough),
    ):
        yield found


def fp16(make: Callable, device: str, scale: float) -> Callable:
    """lib/launch.make_accelerator with fp16 and a loss scale that begins at `scale`; 1/2^30 of it
    after an overflow. On a CPU, for which Accelerate has no fp16, autocast emulates it."""

    def made(*args, **options) -> Accelerator:
        accelerator = make(*args, **options)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(device, init_scale=scale, backoff_factor=2.0**-30)
        made.accelerator = accelerator
        return accelerator

    return made


@contextlib.contextmanager
def fp16_from(device: str, scale: float) -> Iterator[Callable]:
    """The scripts that are called inside train in fp16; gives the function of `fp16`."""
    made = fp16(launch.make_accelerator, device, scale)
    with patch.object(launch, "make_accelerator", made):
        yield made
