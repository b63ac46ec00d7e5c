"""Two gloo processes on this machine, for tests of what processes do together."""

import os
import socket

import torch
import torch.multiprocessing as mp


def spawn_two(function, *arguments) -> None:
    """Call function(rank, *arguments) in two new processes, which Accelerator() then connects.
    `function` must be at the top level of its module, and leaves its results in files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    mp.spawn(_one_of_two, (port, function, arguments), nprocs=2)


def _one_of_two(rank: int, port: str, function, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    torch.set_num_threads(1)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()
    os._exit(0)  # at the end of the interpreter a thread of gloo's may abort
