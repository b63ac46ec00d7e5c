"""What the loaders of the two training scripts yield. Text becomes ids here, in the workers; every
draw is a function of (seed, step, row)."""

import os
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset

from lib.launch import end_with_parent
from lib.text import step_seed


class StepSampler:
    """Batch sampler without end and without state: micro-step m takes positions m*W*B ... (m+1)*W*B
    of the concatenated epochs, this process its B of them. So W processes of batch B see what one
    of batch W*B sees, and a resume starts at any micro-step.

    Yields [(example, micro_step, global_row), ...] of length B; global_row counts within the batch
    of the whole world. Each epoch is a permutation by (seed, epoch), or epoch_order(epoch); a batch
    that runs over the end of an epoch is filled from the next."""

    def __init__(
        self,
        num_examples: int,
        per_device_batch_size: int,
        rank: int,
        world: int,
        seed: int,
        start: int = 0,
        epoch_order: Callable[[int], np.ndarray] | None = None,
    ):
        assert num_examples > 0 and 0 <= rank < world
        self.num_examples, self.batch, self.rank, self.world = (
            num_examples,
            per_device_batch_size,
            rank,
            world,
        )
        self.start, self.epoch_order = (
            start,
            epoch_order or (lambda epoch: permutation(num_examples, seed, epoch)),
        )

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order, micro_step = -1, None, self.start
        while True:
            batch = []
            for row in range(self.rank * self.batch, (self.rank + 1) * self.batch):
                now, offset = divmod(micro_step * self.world * self.batch + row, self.num_examples)
                if now != epoch:
                    epoch, order = now, self.epoch_order(now)
                batch.append((int(order[offset]), micro_step, row))
            yield batch
            micro_step += 1


def load(dataset: Dataset, collate: Callable, sampler, num_workers: int, device) -> Iterator[dict]:
    """Batches without end, made by loader workers. sampler: of batches; None = the dataset yields
    them whole."""
    # without it tokenizers warns at every fork of a worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    how = {"batch_sampler": sampler} if sampler else {"batch_size": None}
    how |= {
        "num_workers": num_workers,
        "worker_init_fn": end_with_parent,
        "pin_memory": device.type == "cuda",
    }
    return iter(DataLoader(dataset, collate_fn=collate, **how))


def permutation(size: int, seed: int, *place: int) -> np.ndarray:
    return np.random.default_rng(step_seed(seed, *place)).permutation(size)
