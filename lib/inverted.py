"""Inverted lists: exact search of sparse vectors (LexMAE, SPLADE); lib/bm25.py is the same with
other weights.

    score of a passage = sum over the query's terms of (weight in query) · (weight in passage)

Results are as lib/search.py describes them, without passages that have no common term. A score is
added up in float32 in the order of the query's terms: it has the same bits from `search` and
`score`, and on any number of processes, each of which searches its own tiles. A tile is TILE rows
of the corpus; its scores stay in the cache of a core while lists are added to them.

An index is a folder of memory-mapped arrays (see Lists) and a manifest.json that states what was
indexed and how. A posting takes 6 bytes (4 or 3 with quantised weights), a list 16; the zeros in
frequent lists (FULL) add 7 to 14 %. Every posting of a query's terms is added up: bounds on what
a list (MaxScore) or a block (BMP, arXiv 2405.01117) can still contribute exclude almost nothing
of learned weights at depth 1000, and at depth 10 less than they cost.

Shapes: Q queries, N passages, V terms, k depth, P postings, L lists, T tiles, W processes.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from tqdm import tqdm

from lib.embeddings import Embeddings
from lib.files import UserError, atomic, map_array, read_json, write_json
from lib.search import (
    DEVICE_QUERY_TILE,
    EMPTY,
    KEYS_AT_A_TIME,
    push,
    scan_device,
    search_in_parts,
    top_keys,
)

TILE = 1 << 15  # scores of 128 KB; at most 1 << 16, because `documents` are uint16
FULL = 4  # a list of more than a quarter of a tile's documents is stored with all: see _add
QUERIES = 256  # that a thread takes through all tiles together: they share the cache
DEVICE_QUERIES = 8192  # held on a GPU as a dense matrix: 1 GB
WEIGHTS = {32: np.float32, 16: np.uint16, 8: np.uint8}


# numba's cache names the three classes: delete lib/__pycache__ after renaming one
class Lists(NamedTuple):
    """The arrays of an index; each is a file, `documents.bin` and so on."""

    documents: np.ndarray  # uint16 (P,), row within its tile: by tile, by term, ascending
    weights: np.ndarray  # (P,) float32; or uint16 or uint8, times the list's scale
    offsets: np.ndarray  # int64 (L + 1,), where each list begins
    scales: np.ndarray  # float32 (L,); 1 where weights are float32
    terms: np.ndarray  # int32 (L,), the term of each list, ascending within a tile
    tiles: np.ndarray  # int64 (T + 1,), which list each tile begins with


class Tiling(NamedTuple):
    """How the rows of a corpus are cut, and which tiles are searched here."""

    tile: int  # rows of a tile; the last has fewer
    count: int  # N
    first: int
    stop: int


class Rows(NamedTuple):
    """Texts or queries: row q has terms[starts[q] : starts[q + 1]] and their weights."""

    starts: np.ndarray  # int64 (Q + 1,)
    terms: np.ndarray  # int32; a query's weights are added up in this order
    weights: np.ndarray  # float32


# the index: written
@numba.njit(nogil=True, cache=True)
def _invert(rows, full, places, documents, weights):
    """Rows of terms -> lists of documents. places (V,): where a term's list begins; changed."""
    for row in range(len(rows.starts) - 1):
        for j in range(rows.starts[row], rows.starts[row + 1]):
            term = rows.terms[j]
            at = places[term]
            if full[term]:
                at += row
            else:
                places[term] += 1
            documents[at] = row
            weights[at] = rows.weights[j]


def write(folder: Path, tiles: Iterable[csr_matrix], bits: int) -> None:
    """Write the lists of tiles (TILE rows each, the last fewer; no entry twice). Needs the memory
    of some copies of one tile."""
    folder.mkdir(parents=True)
    postings, lists = 0, 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(_file(folder, name), "wb")) for name in Lists._fields]
        out = Lists(*files)
        np.int64([0]).tofile(out.offsets)
        np.int64([0]).tofile(out.tiles)
        for tile in tiles:
            counts = np.bincount(tile.indices, minlength=tile.shape[1])
            known = np.flatnonzero(counts)
            full = counts * FULL > tile.shape[0]
            lengths = np.where(full, tile.shape[0], counts)
            starts = np.cumsum(lengths) - lengths
            documents = np.zeros(lengths.sum(), dtype=np.uint16)
            weights = np.zeros(len(documents), dtype=np.float32)
            _invert(as_rows(tile), full, starts.copy(), documents, weights)
            for start in starts[full]:  # of all documents, most may weigh 0
                documents[start : start + tile.shape[0]] = np.arange(tile.shape[0])
            scales = np.ones(len(known), dtype=np.float32)
            if bits < 32 and len(known):  # a list is scaled by its own largest weight
                largest = np.maximum.reduceat(weights, starts[known])
                smallest = np.finfo(np.float32).tiny  # a scale of 0 cannot be divided by
                scales = np.maximum(largest / np.float32(2**bits - 1), smallest)
                weights = np.rint(weights / np.repeat(scales, lengths[known]))
            documents.tofile(out.documents)
            weights.astype(WEIGHTS[bits], copy=False).tofile(out.weights)
            (postings + starts[known] + lengths[known]).tofile(out.offsets)
            scales.tofile(out.scales)
            known.astype(np.int32).tofile(out.terms)
            postings += len(documents)
            lists += len(known)
            np.int64([lists]).tofile(out.tiles)


def as_rows(matrix: csr_matrix) -> Rows:
    starts, terms = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32, copy=False)
    return Rows(starts, terms, matrix.data)


def _file(folder, name: str) -> Path:
    return Path(folder) / f"{name}.bin"


def open_folder(
    folder, what: str, manifest: dict, build: Callable[[Path], None], accelerator
) -> None:
    """The main process builds the index in `folder` if the folder is absent, build(temporary
    name); every process checks that the folder holds what `manifest` states."""
    folder = Path(folder)
    if accelerator is None or accelerator.is_main_process:
        if not folder.exists():
            with atomic(folder) as temporary:
                build(temporary)
                write_json(temporary / "manifest.json", manifest)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: there is no {what} index in it — choose another folder")
    stored = read_json(folder / "manifest.json")
    for key, value in manifest.items():
        if stored.get(key) != value:
            raise UserError(
                f"{folder}: a {what} index with {key} {stored.get(key)}, not {value} — remove it "
                "or choose another folder"
            )


# the index: searched
@numba.njit(nogil=True, cache=True)
def _add(totals, documents, weights, weight):
    """Add a list to the scores of its tile. A list of all documents needs no addresses, so that
    the compiler adds 16 at a time: faster from a quarter of the documents on."""
    if len(documents) == len(totals):
        for j in range(len(totals)):
            totals[j] += weight * np.float32(weights[j])
    else:
        for j in range(len(documents)):
            totals[documents[j]] += weight * np.float32(weights[j])


@numba.njit(nogil=True, cache=True)
def _offer(totals, first_row, keys, count, bar):
    """Offer the scores of the rows from first_row on to the list of a query; (count, bar) then."""
    above = np.empty(64, dtype=np.int64)
    for start in range(0, len(totals), 64):
        line = totals[start : start + 64]
        hit = False
        for j in range(len(line)):  # no branch, so that the compiler compares 16 at a time
            hit |= line[j] > bar
        if hit:
            number = 0
            for j in range(len(line)):  # no branch, because the processor could only guess it
                above[number] = start + j
                number += line[j] > bar
            for j in above[:number]:
                if totals[j] > bar:
                    count, bar = push(totals[j], first_row + j, keys, count, bar)
    return count, bar


@numba.njit(nogil=True, cache=True)
def _find(numbers, number):
    """Where `number` stands in the ascending `numbers`, or -1."""
    at = np.searchsorted(numbers, number)
    return at if at < len(numbers) and numbers[at] == number else -1


@numba.njit(nogil=True, cache=True)
def _scan_tiles(lists, tiling, queries, part, keys):
    """Fill keys (Q, 2·k) of the queries part[0] ... part[1] - 1 with the best of some tiles."""
    totals = np.zeros(tiling.tile, dtype=np.float32)
    counts = np.zeros(part[1], dtype=np.int64)
    bars = np.zeros(part[1], dtype=np.float32)  # a document without a term scores 0: not above
    for t in range(tiling.first, tiling.stop):
        here = totals[: min(tiling.tile, tiling.count - t * tiling.tile)]
        known = lists.terms[lists.tiles[t] : lists.tiles[t + 1]]
        for q in range(part[0], part[1]):
            touched = False
            for i in range(queries.starts[q], queries.starts[q + 1]):
                at = _find(known, queries.terms[i])
                if at >= 0:
                    at += lists.tiles[t]
                    mine = slice(lists.offsets[at], lists.offsets[at + 1])
                    weight = queries.weights[i] * lists.scales[at]
                    _add(here, lists.documents[mine], lists.weights[mine], weight)
                    touched = True
            if touched:
                row = t * tiling.tile
                counts[q], bars[q] = _offer(here, row, keys[q], counts[q], bars[q])
                here[:] = 0
    for q in range(part[0], part[1]):
        keys[q, counts[q] :] = EMPTY


@numba.njit(nogil=True, cache=True)
def _score_rows(lists, tiling, queries, q, rows):
    """The scores of query q with given rows, added up in the order of _scan_tiles."""
    mine = slice(queries.starts[q], queries.starts[q + 1])
    terms, weights = queries.terms[mine], queries.weights[mine]
    totals = np.zeros(len(rows), dtype=np.float32)
    places = np.empty(len(terms), dtype=np.int64)  # the lists of the query's terms in tile t
    t = -1
    for r in range(len(rows)):
        if rows[r] // tiling.tile != t:
            t = rows[r] // tiling.tile
            for i in range(len(terms)):
                at = _find(lists.terms[lists.tiles[t] : lists.tiles[t + 1]], terms[i])
                places[i] = at + lists.tiles[t] if at >= 0 else -1
        for i in range(len(terms)):
            if places[i] >= 0:
                start, stop = lists.offsets[places[i]], lists.offsets[places[i] + 1]
                at = _find(lists.documents[start:stop], rows[r] % tiling.tile)
                if at >= 0:
                    weight = np.float32(lists.weights[start + at])
                    totals[r] += weights[i] * lists.scales[places[i]] * weight
    return totals


class Inverted:
    """A finished index and its search. A subclass has _queries, which makes Rows of queries."""

    at_a_time = 1 << 16

    def __init__(self, folder, accelerator=None):
        self.folder, self.accelerator = Path(folder), accelerator
        self.meta = read_json(self.folder / "manifest.json")
        weights = WEIGHTS[self.meta.get("bits", 32)]
        dtypes = Lists(np.uint16, weights, np.int64, np.float32, np.int32, np.int64)
        parts = zip(Lists._fields, dtypes, strict=True)
        self.lists = Lists(*(map_array(_file(folder, name), dtype) for name, dtype in parts))
        rank = accelerator.process_index if accelerator else 0
        self.world = accelerator.num_processes if accelerator else 1
        tiles = len(self.lists.tiles) - 1
        edges = [tiles * r // self.world for r in (rank, rank + 1)]
        self.tiling = Tiling(self.meta["tile"], self.meta["count"], *edges)

    def search(self, queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Q texts (BM25) or queries (Q, V) -> (scores (Q, k), rows (Q, k)), the same on every
        process. UserError: another number of terms, a weight negative or not finite."""
        asked = self._queries(queries)
        at_a_time = min(max(KEYS_AT_A_TIME // (k * self.world), 1), self.at_a_time)

        def best(part: slice) -> Tensor:
            return self._best(asked._replace(starts=asked.starts[part.start : part.stop + 1]), k)

        return search_in_parts(best, len(asked.starts) - 1, k, at_a_time, self.accelerator)

    def score(self, queries, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows, 0 without a common term: Q queries and Q arrays of rows -> Q
        float32 arrays."""
        asked, found = self._queries(queries), []
        for query, some in enumerate(rows):
            some = np.asarray(some, dtype=np.int64)
            found.append(_score_rows(self.lists, self.tiling, asked, query, some))
        return found

    def _best(self, queries: Rows, k: int) -> Tensor:
        """The best keys (Q, k) in the tiles of this process."""
        number, threads = len(queries.starts) - 1, torch.get_num_threads()
        keys = np.full((number, 2 * min(k, self.tiling.count)), EMPTY)
        size = max(min(QUERIES, -(-number // threads)), 1)

        def scan(start: int) -> None:
            part = start, min(start + size, number)
            _scan_tiles(self.lists, self.tiling, queries, part, keys)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(scan, range(0, number, size)))
        return top_keys(torch.from_numpy(keys), k)


# sparse vectors
def _check_weights(matrix: csr_matrix, corpus: Embeddings | None, start: int = 0) -> None:
    """UserError if a weight is not finite or negative. The rows are those from `start` on of the
    corpus, or queries where it is None."""
    good = np.isfinite(matrix.data) & (matrix.data >= 0)
    if not good.all():
        row = start + int(np.searchsorted(matrix.indptr, good.argmin(), side="right")) - 1
        place = f"query vector {row}"
        if corpus is not None:
            place = f"{corpus.folder}: {corpus.ids([row])[0]}"
        raise UserError(f"{place} has a weight that is negative or not finite — encode again")


def _tiles(corpus: Embeddings) -> Iterator[csr_matrix]:
    """The corpus in tiles; each shard is read once."""
    parts, rows = [], 0
    with tqdm(total=len(corpus), desc="inverted lists", leave=False, delay=5) as bar:
        for start, block in corpus.blocks(0, len(corpus), TILE):
            _check_weights(block, corpus, start)
            bar.update(block.shape[0])
            while block.shape[0]:
                parts.append(block[: TILE - rows])
                block = block[TILE - rows :]
                rows += parts[-1].shape[0]
                if rows == TILE:
                    yield _clean(vstack(parts, "csr"))
                    parts, rows = [], 0
    if parts:
        yield _clean(vstack(parts, "csr"))


def _clean(matrix: csr_matrix) -> csr_matrix:
    """Add up entries that are given twice and remove zeros, in place."""
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


class Sparse(Inverted):
    """Inner-product search over a folder of sparse embeddings, exact but for quantisation.

    With 8 or 16 bits, weights are whole multiples of a step: the largest weight of the term in a
    tile / (2^bits - 1). For each term a score is off by at most half a step times the query's
    weight: with 8 bits, by 1/510 of the greatest score that the query could have.

    On a GPU, torch multiplies tiles as sparse matrices and adds up in another order, so scores
    may differ from `score` in the last bits."""

    def __init__(self, folder, accelerator=None):
        super().__init__(folder, accelerator)
        self.dim = self.meta["dim"]
        self.device = accelerator.device if accelerator else torch.device("cpu")
        if self.device.type == "cuda":
            self.at_a_time = DEVICE_QUERIES

    @classmethod
    def open(cls, corpus: Embeddings, folder, bits: int = 32, accelerator=None) -> "Sparse":
        """The index of `corpus` in `folder`, which is built if the folder is absent, in the memory
        of a few tiles. bits: 32 (float32), 16 or 8. All processes call it. UserError: the folder
        holds an index of other vectors or settings; a weight is negative or not finite."""
        if bits not in WEIGHTS:
            raise UserError(f"--bits {bits}: unknown — choose 32, 16 or 8")
        assert corpus.sparse
        made = {**corpus.meta, "model": None, "input": None}  # two names, which may change
        manifest = {**made, "bits": bits, "tile": TILE}
        build = partial(write, tiles=_tiles(corpus), bits=bits)
        open_folder(folder, "sparse", manifest, build, accelerator)
        return cls(folder, accelerator)

    def _queries(self, queries: csr_matrix) -> Rows:
        if queries.shape[1] != self.dim:
            raise UserError(
                f"{self.folder}: vectors over {self.dim} terms, but queries over "
                f"{queries.shape[1]} — encode both with one checkpoint"
            )
        queries = csr_matrix(queries, dtype=np.float32, copy=True)
        _check_weights(queries, None)
        return as_rows(_clean(queries))

    def _best(self, queries: Rows, k: int) -> Tensor:
        on_gpu = self.device.type == "cuda"
        return self._best_device(queries, k) if on_gpu else super()._best(queries, k)

    def _best_device(self, queries: Rows, k: int) -> Tensor:
        mine = slice(queries.starts[0], queries.starts[-1])
        own = Rows(queries.starts - mine.start, queries.terms[mine], queries.weights[mine])
        asked = self._matrix(own, self.dim).to_dense()  # (Q, V)
        best = torch.full((len(asked), k), EMPTY, device=self.device)
        lists, size = self.lists, self.tiling.tile
        for t in range(self.tiling.first, self.tiling.stop):
            some = slice(lists.tiles[t], lists.tiles[t + 1])
            ends = lists.offsets[some.start : some.stop + 1]
            mine = slice(ends[0], ends[-1])
            weights = lists.weights[mine] * np.repeat(lists.scales[some], np.diff(ends))
            postings = Rows(ends - ends[0], lists.documents[mine], weights)
            rows = min(size, self.tiling.count - t * size)
            tile = self._matrix(postings, rows)  # (terms of the tile, rows)
            known = torch.from_numpy(lists.terms[some].astype(np.int64)).to(self.device)
            for at in range(0, len(asked), DEVICE_QUERY_TILE):
                part = slice(at, at + DEVICE_QUERY_TILE)
                scores = asked[part][:, known] @ tile
                best[part] = scan_device(scores, t * size, best[part], k)
        return best.masked_fill_(best < 1 << 32, EMPTY)  # scores of 0: no common term

    def _matrix(self, rows: Rows, width: int) -> Tensor:
        """The rows as a CSR matrix on the device."""
        parts = rows.starts.astype(np.int32), rows.terms.astype(np.int32), rows.weights
        with warnings.catch_warnings():  # of torch, that it does not check its new sparse matrices
            warnings.simplefilter("ignore")
            parts = [torch.from_numpy(part).to(self.device) for part in parts]
            return torch.sparse_csr_tensor(*parts, size=(len(rows.starts) - 1, width))
