"""Search: keys of scored rows, and the exact search of dense vectors.

Every search returns scores (Q, k) float32 and rows (Q, k) int64: score descending, then corpus
row, also for ties at the cut, so that every run gives the same; row -1 and score -inf where there
are fewer than k. With W processes each searches its own range of rows and all receive the merged
lists; the matrix of all scores is never kept.

A text of several chunks (MaxP) has a vector for each and scores as the best of them. A search for
k texts takes the k·M best vectors, so it cannot miss one.

Shapes: Q queries, D dimensions, k depth, M most chunks of a passage, W processes.
"""

import mmap
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numba
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from lib.cpu import product
from lib.dist import all_gather, world
from lib.embeddings import Embeddings

EMPTY = np.iinfo(np.int64).min  # the key of "no passage": below every other
ROW_MASK = (1 << 32) - 1
KEYS_AT_A_TIME = 1 << 24  # bound on Q·k of a pass over the corpus, all processes together
QUERIES_AT_A_TIME = 256, 1 << 16  # least, whatever KEYS_AT_A_TIME says, and most
QUERY_TILE, ROW_TILE = 1024, 2048  # scores that a thread of a CPU computes at a time: 8 MB
DEVICE_QUERY_TILE, DEVICE_ROW_TILE = 2048, 65536  # on a GPU: 512 MB


# keys
def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """int64 keys of float32 scores and their rows. The greater key has the better score or, at the
    same score, the lower row; no two are equal.

    The high 32 bits are those of the score, which have the order of integers where it is positive
    and the opposite order where it is negative (so 31 of them are flipped there); the low 32 bits
    are ROW_MASK - row."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 makes 0 of -0, which is an equal score
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (ROW_MASK - rows)


def unpack(keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """-> (scores float32, rows int64); -inf and -1 for EMPTY."""
    high, empty = keys >> 32, keys == EMPTY
    scores = torch.where(high < 0, high ^ 0x7FFFFFFF, high).to(torch.int32).view(torch.float32)
    rows = (ROW_MASK - (keys & ROW_MASK)).masked_fill_(empty, -1)
    return scores.masked_fill_(empty, -torch.inf).cpu().numpy(), rows.cpu().numpy()


def top_keys(keys: Tensor, k: int) -> Tensor:
    """The k largest keys of each row, best first; EMPTY fills short rows."""
    best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return pad(best, (0, k - best.shape[1]), value=EMPTY)


@numba.njit(nogil=True, cache=True)
def best_of_texts(keys, text_of, k):
    """Keys (Q, k·M) of vectors, best first -> keys (Q, k) of their texts, each with its best
    score. text_of (num_vectors,): the text that a vector belongs to."""
    best = np.full((len(keys), k), EMPTY)
    seen_by = np.full(text_of[-1] + 1, -1)  # the last query that has found each text
    for q in range(len(keys)):
        found = 0
        for key in keys[q]:
            if key == EMPTY or found == k:
                break
            text = text_of[ROW_MASK - (key & ROW_MASK)]
            if seen_by[text] != q:
                seen_by[text] = q
                best[q, found] = (key & ~ROW_MASK) | (ROW_MASK - text)
                found += 1
    return best


def own_part(count: int) -> list[int]:
    """The first, and the end, of those of `count` things that this process searches."""
    rank, processes = world()
    return [count * rank // processes, count * (rank + 1) // processes]


def merge(keys: Tensor, k: int) -> Tensor:
    """Keys (Q, k) that each process found -> the best (Q, k) of all, the same on every process."""
    processes = world()[1]
    if processes == 1:
        return keys
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    lists = all_gather(keys.to(device)).cpu().chunk(processes)
    return top_keys(torch.cat(lists, 1), k)


def search_in_parts(
    find: Callable[[slice], Tensor], queries: int, k: int, chunks: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(scores (Q, k), rows (Q, k)) of all processes, from find(part of the queries) -> keys (n, k)
    of this process, which needs k · chunks keys for each."""
    scores = np.empty((queries, k), dtype=np.float32)
    rows = np.empty((queries, k), dtype=np.int64)
    least, most = QUERIES_AT_A_TIME
    at_a_time = min(max(KEYS_AT_A_TIME // (k * chunks * world()[1]), least), most)
    for start in range(0, queries, at_a_time):
        part = slice(start, min(start + at_a_time, queries))
        scores[part], rows[part] = unpack(merge(find(part), k))
    return scores, rows


# selection on a CPU: a query has a list of 2·k keys, which is cut to the k best when it is full
@numba.njit(nogil=True, cache=True)
def _best_first(keys, k):
    """Quickselect: reorder unique keys so that the k largest come first; returns the k-th.
    (np.partition takes twice as long, and numba 10 s to compile it.)"""
    low, high = 0, len(keys) - 1
    while low < high:
        pivot = keys[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return keys[k - 1]


@numba.njit(nogil=True, cache=True)
def push(score, row, keys, count, bar):
    """Put a float32 score above `bar` into keys[:count] of 2·k; returns the new (count, bar).

    When `keys` is full, the k best stay and the worst of them is the new bar. Rows come in
    ascending order, so a later row with the score of the bar cannot enter the top k any more."""
    bits = np.int64(np.float32(score + 0.0).view(np.int32))
    high = bits ^ 0x7FFFFFFF if bits < 0 else bits  # see pack
    keys[count] = (high << 32) | (0xFFFFFFFF - row)
    count += 1
    if count == len(keys):
        count = len(keys) // 2
        high = _best_first(keys, count) >> 32
        keys[count:] = EMPTY
        bar = np.int32(high ^ 0x7FFFFFFF if high < 0 else high).view(np.float32)
    return count, bar


@numba.njit(nogil=True, cache=True)
def _scan(scores, first_row, keys, counts, bars):
    """Offer the scores (n, Q) of the rows from first_row on to the lists of Q queries."""
    for j in range(len(scores)):
        for start in range(0, scores.shape[1], 64):
            line = scores[j, start : start + 64]
            least = bars[start : start + 64]
            hit = False
            for i in range(len(line)):  # no branch, so that the compiler compares 16 at a time
                hit |= line[i] > least[i]
            if hit:
                for i in range(len(line)):
                    if line[i] > least[i]:
                        q = start + i
                        found = push(line[i], first_row + j, keys[q], counts[q], bars[q])
                        counts[q], bars[q] = found


def scan_device(scores: Tensor, first_row: int, best: Tensor, k: int) -> Tensor:
    """The k best keys (Q, k) of `best` (Q, k) and of the scores (Q, n), fp32, of the rows from
    first_row on; all on one device.

    topk leaves ties at the cut to chance: there the selection is made again by keys."""
    kept = min(k, scores.shape[1])
    top, at = scores.topk(kept, sorted=False)
    new = pack(top, at + first_row)
    tied = (scores >= top.min(1, keepdim=True).values).sum(1) > kept
    if tied.any():
        rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
        new[tied] = top_keys(pack(scores[tied], rows.expand(int(tied.sum()), -1)), kept)
    return top_keys(torch.cat([best, new], 1), k)


class DenseIndex:
    """Exact inner-product search over a folder of dense embeddings.

    The rows of `search` and `score` are texts; those of the private methods are vectors."""

    def __init__(self, corpus: Embeddings, device="cpu"):
        assert corpus.num_vectors <= ROW_MASK, "a row has 32 bits of a key"
        self.corpus, self.device = corpus, torch.device(device)
        self.start, self.stop = own_part(len(corpus))
        if corpus.first is not None:  # the vectors of a text all belong to the same process
            self.start, self.stop = corpus.first[[self.start, self.stop]].tolist()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """queries (Q, D) -> (scores (Q, k), rows (Q, k)) of distinct texts, see the module."""
        find = self._search_device if self.device.type == "cuda" else self._search_cpu
        chunks, text_of = self.corpus.max_chunks, self.corpus.text_of
        queries = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))

        def best(part: slice) -> Tensor:
            keys = find(queries[part], k * chunks)
            if text_of is None:
                return keys
            return torch.from_numpy(best_of_texts(keys.cpu().numpy(), text_of, k))

        return search_in_parts(best, len(queries), k, chunks)

    def score(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given texts: queries (Q, D) and Q arrays of rows -> Q float32 arrays."""
        return [self._score(q.astype(np.float32), r) for q, r in zip(queries, rows, strict=True)]

    def _score(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        first = self.corpus.first
        if first is None or not len(rows):
            return self.corpus.take(rows) @ query
        vectors = [np.arange(first[row], first[row + 1]) for row in rows]
        starts = np.cumsum([0, *map(len, vectors[:-1])])
        return np.maximum.reduceat(self.corpus.take(np.concatenate(vectors)) @ query, starts)

    def _blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """The blocks (n, D) of this process's vectors, float32, each with the number of its first.
        Pages that were read are given back at once; else a mapped shard counts as memory of this
        process. UserError: a vector is not finite, and would never or always be found."""
        total, quiet = self.stop - self.start, world()[0] > 0
        with tqdm(total=total, desc="search", leave=False, disable=quiet, delay=5) as bar:
            for row, block in self.corpus.blocks(self.start, self.stop, size):
                with warnings.catch_warnings():  # of torch, that a mapped array is read-only
                    warnings.simplefilter("ignore")
                    tensor = torch.from_numpy(block).to(self.device).float()
                if not tensor.sum().isfinite():  # fast, and a sum may overflow: then look closely
                    bad = ~tensor.isfinite().all(1).cpu().numpy()
                    self.corpus.refuse_not_finite(row + np.flatnonzero(bad))
                yield row, tensor
                bar.update(len(block))
                block._mmap.madvise(mmap.MADV_DONTNEED)

    def _search_cpu(self, queries: Tensor, k: int) -> Tensor:
        depth = min(k, self.stop - self.start)
        keys = np.full((len(queries), 2 * depth), EMPTY)
        counts = np.zeros(len(queries), dtype=np.int64)
        bars = np.full(len(queries), -np.inf, dtype=np.float32)
        threads = torch.get_num_threads()
        size = min(-(-len(queries) // threads), QUERY_TILE)
        parts = [slice(at, at + size) for at in range(0, len(queries), size)]
        products = [product(queries[part]) for part in parts]

        def scan(block: Tensor, row: int, part: slice, times_queries: Callable) -> None:
            for at in range(0, len(block), ROW_TILE):
                scores = times_queries(block[at : at + ROW_TILE]).numpy()  # (n, Q)
                _scan(scores, row + at, keys[part], counts[part], bars[part])

        # each thread multiplies and scans for its own queries, so that none waits for another
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for row, block in self._blocks(8 * ROW_TILE):
                    list(pool.map(partial(scan, block, row), parts, products))
        finally:
            torch.set_num_threads(threads)
        return top_keys(torch.from_numpy(keys), k)

    def _search_device(self, queries: Tensor, k: int) -> Tensor:
        queries = queries.to(self.device)
        best = torch.full((len(queries), k), EMPTY, device=self.device)
        for row, block in self._blocks(DEVICE_ROW_TILE):
            for at in range(0, len(queries), DEVICE_QUERY_TILE):
                part = slice(at, at + DEVICE_QUERY_TILE)
                best[part] = scan_device(queries[part] @ block.T, row, best[part], k)
        return best
