"""One command for any machine with CUDA: are the numbers right there, and how fast are they made?

    python -m bench.gpu > gpu.md              under ten minutes on one modern GPU
    python -m bench.gpu --device cpu --tiny   all of it at toy sizes, to try the command itself

Right: a training step of every pre-training objective, head and loss (with GradCache, MaxP, DRO;
LAMB) gives on the device the loss and gradient of the CPU: in fp32 to 1e-4, in bf16 and fp16 within
the bounds printed. Training in fp16 goes on after an overflow. Vectors and search results are
those of the CPU. A run killed by kill -9 and resumed with --deterministic ends in the same files.

Fast: BERT-base with random weights on generated texts: pre-training of every objective,
fine-tuning, encoding, exact search of as many vectors as MS MARCO has; speed, memory, share of the
device's peak, beside sentence-transformers and faiss where they are installed, in turns; with and
without torch.compile. Batches shrink on a device with little memory, and the output says so. What
--minutes leaves no time for is left out, and named.

Needs no network; writes to a temporary folder (--folder says where: it takes 16 GB if there is
room). Prints Markdown. Exit status 1: a number is wrong. Without CUDA: one line, status 0, or 2
with --require."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

NO_CUDA = "no CUDA device here — run it where there is one, or add --device cpu --tiny"


def prepare() -> None:
    """Settings of this process. They must be made before CUDA starts."""
    # one GPU: some peers would take all
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def heading(device: str) -> list[str]:
    from lib.launch import versions

    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    return [f"# {name}", "", f"CUDA {torch.version.cuda}, {packages}", ""]


def check(folder: Path, device: str, tiny: bool) -> list[str]:
    """Print the table of checks; returns the names of those that failed."""
    from bench.gpu_right import Right

    print("## Right\n\n| check | found | bound | |\n| --- | --- | --- | --- |", flush=True)
    wrong = []
    for one in Right(folder, device, tiny).checks():
        verdict = "right" if one.right else "**wrong**"
        print(f"| {one.name} | {one.found} | {one.bound} | {verdict} |", flush=True)
        if not one.right:
            wrong.append(one.name)
    print()
    return wrong


def measure(folder: Path, args, deadline: float) -> None:
    """Print the table of timings."""
    from bench.gpu_fast import Fast

    fast = Fast(folder, args.device, args.tiny)
    for line in ("## Fast", *fast.notes(), ""):
        print(f"{line}\n" if line else line, end="\n" if line else "")
    print("| what | speed | of the peak | memory | waited for data |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for one in fast.timings(deadline):
        used = "" if one.used is None else f"{one.used:.1%}"
        memory = "" if one.memory is None else f"{one.memory:.1f} GB"
        waited = "" if one.waited is None else f"{one.waited:.1%}"
        print(f"| {one.name} | {one.speed} | {used} | {memory} | {waited} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--require", action="store_true", help="status 2 if there is no CUDA")
    parser.add_argument("--only", choices=("right", "fast"), help="one half")
    parser.add_argument("--minutes", type=float, default=8, help="begin no timing later")
    parser.add_argument("--folder", help="where the temporary folder is made")
    args = parser.parse_args()
    prepare()
    deadline = time.monotonic() + 60 * args.minutes
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_CUDA)
        sys.exit(2 if args.require else 0)
    wrong = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.environ["ISTHMUS_CACHE"] = f"{folder}/cache"
        print(*heading(args.device), sep="\n", flush=True)
        for name in ("right", "fast"):
            (Path(folder) / name).mkdir()
        if args.only != "fast":
            wrong = check(Path(folder) / "right", args.device, args.tiny)
        if args.only != "right":
            measure(Path(folder) / "fast", args, deadline)
    if wrong:
        sys.exit(f"wrong on {args.device}: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
