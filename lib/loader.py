"""The batches of the two training scripts: their examples, and the workers that make them."""

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count

import numpy as np
from torch.utils.data import DataLoader, Dataset

from lib.launch import end_with_parent
from lib.text import step_seed


def step_batches(
    dataset: Dataset, batch_size: int, rank: int, world: int, start: int = 0
) -> Iterator[list[tuple[int, int, int]]]:
    """Batches [(example, micro_step, row), ...] from micro-step `start` on, without end; row counts
    in the batch of all processes. dataset: has a length, and order(epoch), the examples of an epoch

    Micro-step m takes positions m*W*B ... (m+1)*W*B of the concatenated epochs, this process its B
    of them. So W processes of batch B see what one of batch W*B sees."""
    order = lru_cache(maxsize=1)(dataset.order)
    for micro_step in count(start):
        batch = []
        for row in range(rank * batch_size, (rank + 1) * batch_size):
            epoch, offset = divmod(micro_step * world * batch_size + row, len(dataset))
            batch.append((int(order(epoch)[offset]), micro_step, row))
        yield batch


def load(dataset, collate: Callable, sampler, num_workers: int, device=None) -> Iterator:
    """Batches made by loader workers. sampler: of batches; None = each item is a batch."""
    if num_workers:  # tokenizers would warn at every fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        dataset,
        batch_size=1 if sampler else None,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        pin_memory=device is not None and device.type == "cuda",
    )
    return iter(loader)


def permutation(size: int, seed: int, *place: int) -> np.ndarray:
    return np.random.default_rng(step_seed(seed, *place)).permutation(size)
