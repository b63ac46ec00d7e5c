"""Search: the k best passages of each query, as keys, and dense search (exact or faiss); lib/inverted.py searches
sparse vectors and BM25.

Every search returns (scores (Q, k) float32, rows (Q, k) int64): score descending, then corpus row, also for ties at
the cut, so the same on every run; row -1 and score -inf where there are fewer than k. Rows count through the whole
corpus. With W processes each searches its own range of rows, and all of them get the merged lists; the score matrix is
never kept.

A text of several chunks (ANCE's MaxP) has a vector for each. Its score is that of its best one. Each of the k best
texts has one among the k·M best vectors, if none has more than M: a search goes so deep, and is as exact as any other.

A score and a row are held as one int64 key whose order is the order of the results (see `pack`). Keys are unique, so
the k largest are the k best passages whatever selects them, and merging lists is sorting keys.

Shapes: Q queries, N passages, D dimensions, k depth, M chunks of a passage at most, W processes.
"""

import mmap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numba
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib.cpu import product
from lib.dist import all_gather
from lib.embeddings import Embeddings
from lib.files import UserError

EMPTY = np.iinfo(np.int64).min  # the key of "no passage": below every other


ROW_MASK = (1 << 32) - 1


KEYS_AT_A_TIME = 1 << 24  # bound on Q·k of a pass over the corpus, all processes together


QUERY_TILE, ROW_TILE = 1024, 2048  # scores computed at a time by each thread of a CPU: 8 MB


DEVICE_QUERY_TILE, DEVICE_ROW_TILE = 2048, 65536  # on a GPU: 512 MB


# keys
def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """int64 keys of float32 scores and their rows: greater = better score, then lower row; EMPTY where the row is -1.

    The bits of a float, read as an integer, are in the order of the floats; of negative ones in the opposite order,
    which flipping their 31 low bits mends. They stand above the 32 bits of the row, counted downwards."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0 becomes 0, they are equal scores
    keys = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (ROW_MASK - rows)
    return keys.masked_fill_(rows < 0, EMPTY)


def unpack(keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """keys -> (scores float32, rows int64); -inf and -1 for EMPTY."""
    high, empty = keys >> 32, keys == EMPTY
    scores = torch.where(high < 0, high ^ 0x7FFFFFFF, high).to(torch.int32).view(torch.float32)
    rows = (ROW_MASK - (keys & ROW_MASK)).masked_fill_(empty, -1)
    return scores.masked_fill_(empty, -torch.inf).cpu().numpy(), rows.cpu().numpy()


def top_keys(keys: Tensor, k: int) -> Tensor:
    """The k largest of each row, best first, filled up with EMPTY."""
    best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=EMPTY)


@numba.njit(nogil=True, cache=True)
def _flip(bits):
    return bits ^ 0x7FFFFFFF if bits < 0 else bits


@numba.njit(nogil=True, cache=True)
def _best_first(keys, k):
    """Quickselect: reorder unique keys so that the k largest come first; the k-th. (np.partition takes numba 5 s to
    compile, this a tenth of a second.)"""
    low, high = 0, len(keys) - 1
    while low < high:
        pivot, i, j = keys[(low + high) // 2], low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return keys[k - 1]


@numba.njit(nogil=True, cache=True)
def push(score, bits, row, keys, count, bar, k):
    """Put one score above `bar` into keys[:count]; (count, bar) after that. `bits`: the score as int32.

    `keys` has more than k places; when it is full, the k best stay and the worst of them is the new bar. Rows come in
    ascending order, so that a later row which ties with the bar has lost already."""
    high = _flip(np.int64(bits)) if score != 0 else np.int64(0)
    keys[count] = (high << 32) | (0xFFFFFFFF - row)
    count += 1
    if count == len(keys):
        bar = np.int32(_flip(_best_first(keys, k) >> 32)).view(np.float32)
        count = k
    return count, bar


@numba.njit(nogil=True, cache=True)
def _scan(scores, first_row, keys, counts, bars, k):
    """Offer the scores (n, Q) of rows first_row ... to the lists of Q queries."""
    bits = scores.view(np.int32)
    for j in range(len(scores)):
        for start in range(0, scores.shape[1], 64):
            line, least, hit = scores[j, start : start + 64], bars[start : start + 64], False
            for i in range(len(line)):  # no branch, so that the compiler compares 16 at a time
                hit |= line[i] > least[i]
            if hit:
                for i in range(len(line)):
                    if line[i] > least[i]:
                        q = start + i
                        counts[q], bars[q] = push(
                            line[i], bits[j, q], first_row + j, keys[q], counts[q], bars[q], k
                        )


def best_of_texts(keys: Tensor, text_of: np.ndarray, k: int) -> Tensor:
    """Keys (Q, k·M) of vectors, best first -> (Q, k) of the texts that they belong to, each with the best of its
    scores."""
    scores, rows = unpack(keys)
    texts = torch.from_numpy(np.where(rows < 0, -1, text_of[rows]).astype(np.int64))
    texts, at = texts.sort(dim=1, stable=True)  # the best of a text stays its first
    again = torch.nn.functional.pad(texts[:, 1:] == texts[:, :-1], (1, 0))
    return top_keys(pack(torch.from_numpy(scores).gather(1, at), texts.masked_fill(again, -1)), k)


def merge(keys: Tensor, k: int, accelerator) -> Tensor:
    """Keys (Q, k) that each process found in its rows -> the best (Q, k) of all, the same on every process."""
    if accelerator is None or accelerator.num_processes == 1:
        return keys
    lists = all_gather(keys.to(accelerator.device)).cpu().chunk(accelerator.num_processes)
    return top_keys(torch.cat(lists, 1), k)


# dense
def check_pair(queries: Embeddings, corpus: Embeddings, factory: str | None = None) -> None:
    """UserError unless the two folders are queries and passages of one checkpoint, and dense if faiss is to search."""
    for part, kind in ((queries, "query"), (corpus, "passage")):
        if part.meta["kind"] != kind:
            raise UserError(
                f"{part.folder}: embeddings of kind {part.meta['kind']}, not {kind} — swap the folders?"
            )
    if queries.meta["model_hash"] != corpus.meta["model_hash"]:
        raise UserError(
            f"{queries.folder}: made by another checkpoint than {corpus.folder} — encode both with one"
        )
    if queries.sparse != corpus.sparse:  # of a plain folder, which states no head
        part = queries if queries.sparse else corpus
        raise UserError(
            f"{part.folder}: sparse vectors, the others are dense — encode both with the same --head"
        )
    if corpus.sparse and factory:
        raise UserError(
            "--index is for dense vectors — leave it out; --bits 8 makes an index of sparse ones small"
        )


def scan_device(scores: Tensor, first_row: int, best: Tensor, k: int) -> Tensor:
    """The k best keys (Q, k) of `best` (Q, k) and of the scores (Q, n) of rows first_row ..., fp32, all on one device.

    topk takes any of the entries that tie at the cut, so the queries where more than k reach it are selected again by
    their keys, which do not tie."""
    kept = min(k, scores.shape[1])
    top, at = scores.topk(kept, sorted=False)
    new = pack(top, at + first_row)
    tied = (scores >= top.min(1, keepdim=True).values).sum(1) > kept
    if tied.any():
        rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
        new[tied] = top_keys(pack(scores[tied], rows.expand(int(tied.sum()), -1)), kept)
    return top_keys(torch.cat([best, new], 1), k)


class DenseIndex:
    """Inner-product search over a folder of embeddings: exact, by blocks over the memory-mapped shards, or through any
    faiss factory string, with search parameters after a colon (IVF4096,Flat:nprobe=32  HNSW32:efSearch=128  PQ48).

    `search` and `score` count texts; what they call counts vectors (see Embeddings), up to best_of_texts."""

    def __init__(
        self, corpus: Embeddings, accelerator=None, factory: str | None = None, seed: int = 0
    ):
        assert corpus.num_vectors <= ROW_MASK, "a row has 32 bits of a key"
        self.corpus, self.accelerator = corpus, accelerator
        rank, self.world = (
            (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        )
        edges = [
            len(corpus) * r // self.world for r in (rank, rank + 1)
        ]  # a text is not split between processes
        self.start, self.stop = edges if corpus.first is None else corpus.first[edges].tolist()
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.approximate = self._build(factory, seed) if factory else None

    def _blocks(self, size: int, what: str) -> Iterator[tuple[int, np.ndarray]]:
        """The blocks of this process's vectors. Pages that were read are given back at once: a shard that stays mapped
        would count as ours until its end."""
        shown, total = (
            not self.accelerator or self.accelerator.is_main_process,
            self.stop - self.start,
        )
        with tqdm(
            total=total, desc=what, unit=" rows", leave=False, disable=not shown, delay=5
        ) as bar:
            for row, block in self.corpus.blocks(self.start, self.stop, size):
                yield row, block
                bar.update(len(block))
                if hasattr(mmap, "MADV_DONTNEED") and getattr(block, "_mmap", None) is not None:
                    block._mmap.madvise(mmap.MADV_DONTNEED)

    def search(
        self, queries: np.ndarray, k: int, at_a_time: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """queries (Q, D) -> (scores (Q, k) float32, rows (Q, k) int64) of distinct texts, the same on every process.
        `at_a_time` queries to a pass over the corpus; None: as many as keep the lists of all processes within 128 MB.
        """
        if queries.ndim != 2 or queries.shape[1] != self.corpus.dim:
            raise UserError(
                f"{self.corpus.folder}: vectors of {self.corpus.dim} dimensions, but queries of "
                f"{queries.shape[-1]} — encode both with one checkpoint"
            )
        assert k > 0
        if not np.isfinite(queries).all():
            raise UserError(
                f"query vector {int(np.isfinite(queries).all(1).argmin())} is not finite — encode the queries again"
            )
        scores, rows = (
            np.empty((len(queries), k), dtype=np.float32),
            np.empty((len(queries), k), dtype=np.int64),
        )
        exact = self._search_device if self.device.type == "cuda" else self._search_cpu
        find, depth = (
            exact if self.approximate is None else self._search_faiss,
            k * self.corpus.max_chunks,
        )
        at_a_time = at_a_time or min(max(KEYS_AT_A_TIME // (depth * self.world), 256), 1 << 16)
        for at in range(0, len(queries), at_a_time):
            part = torch.from_numpy(
                np.ascontiguousarray(queries[at : at + at_a_time], dtype=np.float32)
            )
            keys = find(part, depth)
            if self.corpus.max_chunks > 1:
                keys = torch.cat(
                    [best_of_texts(tile, self.corpus.text_of, k) for tile in keys.split(QUERY_TILE)]
                )
            scores[at : at + at_a_time], rows[at : at + at_a_time] = unpack(
                merge(keys, k, self.accelerator)
            )
        return scores, rows

    def _search_cpu(self, queries: Tensor, k: int) -> Tensor:
        depth = min(k, self.stop - self.start)
        if depth == 0:  # more processes than rows
            return torch.full((len(queries), k), EMPTY)
        keys = np.full((len(queries), 2 * depth), EMPTY)
        counts, bars = (
            np.zeros(len(queries), dtype=np.int64),
            np.full(len(queries), -np.inf, dtype=np.float32),
        )
        threads = torch.get_num_threads()
        size = min(-(-len(queries) // threads), QUERY_TILE)
        parts = [slice(at, at + size) for at in range(0, len(queries), size)]
        products = [product(queries[part].contiguous()) for part in parts]

        @torch.inference_mode()
        def scan(number: int, block: Tensor, row: int) -> None:
            part = parts[number]
            for at in range(0, len(block), ROW_TILE):
                scores = products[number](block[at : at + ROW_TILE]).numpy()  # (n, Q)
                if number == 0:
                    self._check_finite(scores[:, 0], row + at)
                _scan(scores, row + at, keys[part], counts[part], bars[part], depth)

        # each thread multiplies and scans for its own queries, so that none waits for another within a block
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for row, block in self._blocks(8 * ROW_TILE, "exact search"):
                    with (
                        warnings.catch_warnings()
                    ):  # torch says that a mapped array is read-only; nobody writes to it
                        warnings.simplefilter("ignore")
                        block = torch.from_numpy(block).float()
                    list(pool.map(scan, range(len(parts)), repeat(block), repeat(row)))
        finally:
            torch.set_num_threads(threads)
        keys[np.arange(2 * depth) >= counts[:, None]] = EMPTY
        return top_keys(torch.from_numpy(keys), k)

    def _search_device(self, queries: Tensor, k: int) -> Tensor:
        queries = queries.to(self.device)
        best = torch.full((len(queries), k), EMPTY, device=self.device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # no TF32
        try:
            for row, block in self._blocks(DEVICE_ROW_TILE, "exact search"):
                block = torch.from_numpy(np.array(block)).to(self.device).float()
                self._check_finite((block @ queries[0]).cpu().numpy(), row)
                for at in range(0, len(queries), DEVICE_QUERY_TILE):
                    part = slice(at, at + DEVICE_QUERY_TILE)
                    best[part] = scan_device(queries[part] @ block.T, row, best[part], k)
        finally:
            torch.set_float32_matmul_precision(precision)
        return best

    def _check_finite(self, scores: np.ndarray, row: int) -> None:
        """scores: of one query with consecutive rows. Whatever the query, the score of a vector with a NaN or an
        infinity is none."""
        if not np.isfinite(scores).all():
            row += int(np.isfinite(scores).argmin())
            row = row if self.corpus.text_of is None else self.corpus.text_of[row]
            raise UserError(
                f"{self.corpus.folder}: the vector of {self.corpus.ids([row])[0]} is not finite or too large — "
                "encode the corpus again"
            )

    def _build(self, factory: str, seed: int):
        import faiss

        description, _, parameters = factory.partition(":")
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            index = faiss.index_factory(self.corpus.dim, description, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UserError(
                f"--index {factory}: faiss cannot make it — see faiss' index factory"
            ) from error
        if (
            not index.is_trained
        ):  # on the same sample everywhere, so that the parts are parts of one index
            inverted = faiss.try_extract_index_ivf(index)
            wanted = max(1 << 16, 64 * inverted.nlist if inverted else 0)
            sample = np.random.default_rng(seed).permutation(self.corpus.num_vectors)[:wanted]
            try:
                index.train(self.corpus.take(np.sort(sample)))
            except RuntimeError as error:
                raise UserError(
                    f"--index {factory}: {len(sample)} vectors cannot train it — choose a smaller index"
                ) from error
        for row, block in self._blocks(1 << 16, f"faiss {description}"):
            block = np.ascontiguousarray(block, dtype=np.float32)
            self._check_finite(block.sum(1), row)
            index.add(block)
        if parameters:
            try:
                faiss.ParameterSpace().set_index_parameters(index, parameters)
            except RuntimeError as error:
                raise UserError(
                    f"--index {factory}: faiss does not know {parameters} — nprobe=32 or efSearch=128, for example"
                ) from error
        return index

    def _search_faiss(self, queries: Tensor, k: int) -> Tensor:
        scores, rows = self.approximate.search(queries.numpy(), k)  # faiss fills up with row -1
        return pack(
            torch.from_numpy(scores), torch.from_numpy(np.where(rows < 0, -1, rows + self.start))
        )

    def score(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows: queries (Q, D), for each an array of rows -> for each a float32 array."""
        return [self._score(q.astype(np.float32), r) for q, r in zip(queries, rows, strict=True)]

    def _score(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        first = self.corpus.first
        if first is None or not len(rows):
            return self.corpus.take(rows) @ query
        counts = first[rows + 1] - first[rows]
        starts = np.cumsum(counts) - counts
        vectors = np.arange(counts.sum()) + np.repeat(first[rows] - starts, counts)
        return np.maximum.reduceat(self.corpus.take(vectors) @ query, starts)
