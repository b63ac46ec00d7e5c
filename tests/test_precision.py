"""pytest tests/test_precision.py — what a GPU does, where there is none: training in fp16 through
an overflow, steps on a device that is not the CPU, and bench/gpu.py at toy sizes."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from bench import gpu
from bench.gpu_right import FINETUNING, Right
from bench.gpu_scripts import call, fp16_from, log_of
from lib.objectives import OBJECTIVES

OVERFLOWS = {name: {"objective": name} for name in OBJECTIVES}
OVERFLOWS |= {"cocondenser, GradCache": {"objective": "cocondenser", "chunk_size": 3}}
OVERFLOWS |= FINETUNING


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return Right(tmp_path_factory.mktemp("right"), "cpu", tiny=True)


@contextmanager
def weights_before_each_step():
    """A list that is filled: all weights (n,) before each optimizer step of what runs inside."""
    found, clip = [], Accelerator.clip_grad_norm_

    def noted(self, parameters, *args, **options):
        parameters = list(parameters)
        found.append(torch.cat([p.detach().flatten() for p in parameters]))
        return clip(self, parameters, *args, **options)

    with patch.object(Accelerator, "clip_grad_norm_", noted):
        yield found


@pytest.mark.parametrize("name", OVERFLOWS)
def test_fp16_passes_over_an_overflow_and_trains_on(right, name):
    flags = OVERFLOWS[name] | {"max_steps": 3}
    script = "pretrain_mae" if "objective" in flags else "finetune_biencoder"
    flags = right.pretraining(**flags) if "objective" in flags else right.finetuning(**flags)
    with weights_before_each_step() as weights, fp16_from("cpu", 2.0**40) as made:
        call(script, flags, "cpu")
    log = log_of(flags["output_dir"])
    assert [bool(np.isfinite(line["grad_norm"])) for line in log] == [False, True, True]
    assert all(np.isfinite(line["loss"]) for line in log)
    assert made.accelerator.scaler.get_scale() == 2.0**10  # from 2.0**40, by one overflow
    first, second, third = weights
    assert torch.equal(first, second) and not torch.equal(second, third)
    saved = load_file(flags["output_dir"] / "model.safetensors").values()
    assert all(weight.isfinite().all() for weight in saved)


def test_on_another_device_nothing_is_left_on_the_cpu(tmp_path):
    script = Path(__file__).with_name("pretend_device.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    *checks, forgetful = map(json.loads, done.stdout.splitlines())
    assert len(checks) > len(OBJECTIVES) + len(FINETUNING)
    assert [one["name"] for one in checks if not one["right"]] == []
    assert forgetful["name"] == "forgetful, fp32" and not forgetful["right"]
    assert "a tensor of (1,) is on the CPU" in forgetful["found"]


def run_bench(monkeypatch, capsys, *flags):
    """(exit status, stdout) of bench/gpu.py in this process."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    for name in ("ISTHMUS_CACHE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # they are put back
    try:
        gpu.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


def test_bench_at_toy_sizes(monkeypatch, capsys):
    status, printed = run_bench(monkeypatch, capsys, "--device", "cpu", "--tiny")
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    checks = [row for row in rows if row.endswith("right |")]
    assert status == 0 and "wrong" not in printed
    assert "left out" not in printed and "failed" not in printed
    for name in (*OBJECTIVES, *FINETUNING):
        assert sum(row.startswith(f"| {name}, f") for row in checks) >= 2, name
    for name in OBJECTIVES:
        assert f"| pre-training, {name} |" in printed
    assert printed.count("torch.compile |") == 3
    assert "| mlm, fp16 | loss 0.0e+00, gradient 0.0e+00 |" not in printed, "fp16 is emulated"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_bench_without_cuda_says_so(monkeypatch, capsys):
    for flags, expected in ((), 0), (("--require",), 2):
        status, printed = run_bench(monkeypatch, capsys, *flags)
        assert (status, printed) == (expected, f"{gpu.NO_CUDA}\n")


def test_bench_fails_on_a_wrong_number(monkeypatch, capsys, right):
    """A gradient of the device that is wrong by a hundredth of one weight matrix."""
    step, calls = Right.step, []

    def wrong(self, *args):
        found = step(self, *args)
        calls.append(args)
        if len(calls) == 2:  # the first is the CPU's
            found.gradients[-1][0] *= 1.01
        return found

    monkeypatch.setattr(Right, "step", wrong)
    compared = right.compare("mlm", "pretrain_mae", right.pretraining("mlm"))
    monkeypatch.setattr(Right, "checks", lambda self: compared)
    status, printed = run_bench(monkeypatch, capsys, "--device", "cpu", "--tiny", "--only", "right")
    assert status == "wrong on cpu: mlm, fp32"
    assert printed.count("**wrong**") == 1
