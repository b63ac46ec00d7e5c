"""Inverted lists: exact search of sparse vectors (LexMAE, SPLADE); lib/bm25.py is the same with
other weights.

    score of a passage = sum over the query's terms of (weight in query) · (weight in passage)

Results are as lib/search.py describes them, without passages that have no common term. A score is
added up in float32 in the order of the query's terms: it has the same bits from `search` and
`score`, and on any number of processes, each of which searches its own tiles. A tile is TILE rows
of the corpus; its scores stay in the cache of a core while lists are added to them.

An index is a folder of memory-mapped arrays (see Lists) and a manifest.json that states what was
indexed and how. A posting takes 6 bytes, a list 12. Every posting of a query's terms is added up:
bounds on what a list (MaxScore) or a block (BMP, arXiv 2405.01117) can still contribute exclude
almost nothing of learned weights at depth 1000, and at depth 10 less than they cost.

Shapes: Q queries, N passages, V terms, k depth, P postings, L lists, T tiles.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import torch
from accelerate import PartialState
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from tqdm import tqdm

from lib.dist import from_main
from lib.embeddings import Embeddings
from lib.files import UserError, file_fingerprint, make_once, map_array, read_json, write_json
from lib.search import EMPTY, own_part, push, search_in_parts, top_keys

TILE = 1 << 15  # scores of 128 KB; at most 1 << 16, because `documents` are uint16
QUERIES = 256  # that a thread takes through all tiles together: they share the cache


# numba's cache names the two classes: delete lib/__pycache__ after renaming one
class Lists(NamedTuple):
    """The arrays of an index; each is a file, `documents.bin` and so on."""

    documents: np.ndarray  # uint16 (P,), row within its tile: by tile, by term, ascending
    weights: np.ndarray  # float32 (P,)
    offsets: np.ndarray  # int64 (L + 1,), where each list begins
    terms: np.ndarray  # int32 (L,), the term of each list, ascending within a tile
    tiles: np.ndarray  # int64 (T + 1,), which list each tile begins with


class Tiling(NamedTuple):
    """How the rows of a corpus are cut, and which tiles are searched here."""

    tile: int  # rows of a tile; the last has fewer
    count: int  # N
    first: int
    stop: int


# the index: written
def write(folder: Path, tiles: Iterable[csr_matrix]) -> None:
    """Write the lists of tiles (TILE rows each, the last fewer; no entry twice)."""
    folder.mkdir(parents=True)

    def append(**arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            with open(_file(folder, name), "ab") as stream:
                array.tofile(stream)

    append(offsets=np.int64([0]), tiles=np.int64([0]))
    postings, lists = 0, 0
    for tile in tiles:
        columns = tile.tocsc()
        lengths = np.diff(columns.indptr)
        known = np.flatnonzero(lengths)
        append(
            documents=columns.indices.astype(np.uint16),
            weights=columns.data,
            offsets=postings + columns.indptr[known + 1].astype(np.int64),
            terms=known.astype(np.int32),
            tiles=np.int64([lists + len(known)]),
        )
        postings += len(columns.data)
        lists += len(known)


def _file(folder, name: str) -> Path:
    return Path(folder) / f"{name}.bin"


def open_folder(folder, manifest: dict, build: Callable[[Path], None]) -> None:
    """The main process builds the index in `folder` if the folder is absent, build(temporary
    name). UserError on every process: the folder holds anything but what `manifest` states, or is
    damaged (a search with numbers out of range would crash the process)."""
    folder = Path(folder)

    def content(of: Path) -> str:
        return file_fingerprint(*sorted(of.glob("*.bin")))

    def make(temporary: Path) -> None:
        build(temporary)
        write_json(temporary / "manifest.json", {**manifest, "files": content(temporary)})

    def open_or_make() -> None:
        make_once(folder, make)
        stored = read_json(folder / "manifest.json")
        stored = stored if isinstance(stored, dict) else {}
        for key, value in manifest.items():
            if stored.get(key) != value:
                problem = f"{folder}: an index with {key} {stored.get(key)}, not {value}"
                raise UserError(f"{problem} — remove it or choose another folder")
        if stored.get("files") != content(folder):
            raise UserError(f"{folder}: the index is damaged — remove it; it is then built again")

    from_main(PartialState(), open_or_make)


# the index: searched
@numba.njit(nogil=True, cache=True)
def _offer(totals, first_row, keys, count, bar):
    """`push` for the scores of the rows from first_row on; returns the new (count, bar)."""
    for start in range(0, len(totals), 64):
        line = totals[start : start + 64]
        hit = False
        for j in range(len(line)):  # no branch, so that the compiler compares 16 at a time
            hit |= line[j] > bar
        if hit:
            for j in range(len(line)):
                if line[j] > bar:
                    count, bar = push(line[j], first_row + start + j, keys, count, bar)
    return count, bar


@numba.njit(nogil=True, cache=True)
def _find(numbers, start, stop, number):
    """Where `number` stands in the ascending numbers[start:stop], or -1."""
    at = start + np.searchsorted(numbers[start:stop], number)
    return at if at < stop and numbers[at] == number else -1


@numba.njit(nogil=True, cache=True)
def _scan_tiles(lists, tiling, queries, part, keys):
    """Fill keys (Q, 2·k) of the queries part[0] ... part[1] - 1 with the best of some tiles.
    queries: the arrays of a CSR matrix; weights are added up in their order."""
    starts, terms, weights = queries
    totals = np.zeros(tiling.tile, dtype=np.float32)
    counts = np.zeros(part[1], dtype=np.int64)
    bars = np.zeros(part[1], dtype=np.float32)  # a document without a term scores 0: not above
    for t in range(tiling.first, tiling.stop):
        here = totals[: min(tiling.tile, tiling.count - t * tiling.tile)]
        for q in range(part[0], part[1]):
            touched = False
            for i in range(starts[q], starts[q + 1]):
                at = _find(lists.terms, lists.tiles[t], lists.tiles[t + 1], terms[i])
                if at >= 0:
                    for j in range(lists.offsets[at], lists.offsets[at + 1]):
                        here[lists.documents[j]] += weights[i] * lists.weights[j]
                    touched = True
            if touched:
                found = _offer(here, t * tiling.tile, keys[q], counts[q], bars[q])
                counts[q], bars[q] = found
                here[:] = 0


@numba.njit(nogil=True, cache=True)
def _score_rows(lists, tiling, queries, q, rows):
    """The scores of query q with given rows, added up in the order of _scan_tiles."""
    starts, terms, weights = queries
    totals = np.zeros(len(rows), dtype=np.float32)
    for i in range(starts[q], starts[q + 1]):
        t, at = -1, -1  # the tile of the row before, and the term's list there
        for r in range(len(rows)):
            if rows[r] // tiling.tile != t:
                t = rows[r] // tiling.tile
                at = _find(lists.terms, lists.tiles[t], lists.tiles[t + 1], terms[i])
            if at >= 0:
                start, stop = lists.offsets[at], lists.offsets[at + 1]
                j = _find(lists.documents, start, stop, rows[r] % tiling.tile)
                if j >= 0:
                    totals[r] += weights[i] * lists.weights[j]
    return totals


def _arrays(queries: csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return queries.indptr.astype(np.int64), queries.indices.astype(np.int32), queries.data


class Inverted:
    """An index of open_folder, and its search. as_matrix(queries) makes a matrix (Q, V) of what is
    asked."""

    def __init__(self, folder, as_matrix: Callable[..., csr_matrix]):
        self.as_matrix = as_matrix
        meta = read_json(Path(folder) / "manifest.json")
        dtypes = Lists(np.uint16, np.float32, np.int64, np.int32, np.int64)
        parts = zip(Lists._fields, dtypes, strict=True)
        self.lists = Lists(*(map_array(_file(folder, name), dtype) for name, dtype in parts))
        first, stop = own_part(len(self.lists.tiles) - 1)
        self.tiling = Tiling(meta["tile"], meta["count"], first, stop)

    def search(self, queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Q queries -> (scores (Q, k), rows (Q, k)), the same on every process."""
        asked = self.as_matrix(queries)
        return search_in_parts(lambda part: self._best(asked[part], k), asked.shape[0], k)

    def score(self, queries, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows, 0 without a common term: Q queries and Q arrays of rows -> Q
        float32 arrays."""
        asked = _arrays(self.as_matrix(queries))
        lists = [np.asarray(some, dtype=np.int64) for some in rows]
        return [_score_rows(self.lists, self.tiling, asked, q, r) for q, r in enumerate(lists)]

    def _best(self, queries: csr_matrix, k: int) -> Tensor:
        """The best keys (Q, k) in the tiles of this process."""
        number, threads = queries.shape[0], torch.get_num_threads()
        arrays = _arrays(queries)
        keys = np.full((number, 2 * min(k, self.tiling.count)), EMPTY)
        size = max(min(QUERIES, -(-number // threads)), 1)

        def scan(start: int) -> None:
            part = start, min(start + size, number)
            _scan_tiles(self.lists, self.tiling, arrays, part, keys)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(scan, range(0, number, size)))
        return top_keys(torch.from_numpy(keys), k)


# sparse vectors
def open_sparse(corpus: Embeddings, folder) -> Inverted:
    """The index of `corpus` in `folder`, which is built if the folder is absent, in the memory of
    a few tiles. Its queries are matrices (Q, V). All processes call it.

    UserError: the folder holds an index of other vectors or settings; a weight is negative or not
    finite, here or in a query."""
    made = {**corpus.meta, "model": None, "input": None}  # two names, which may change
    made |= {"content": corpus.fingerprint, "tile": TILE}
    open_folder(folder, made, partial(write, tiles=_tiles(corpus)))
    return Inverted(folder, partial(_queries, terms=corpus.dim))


def _queries(queries: csr_matrix, terms: int) -> csr_matrix:
    assert queries.shape[1] == terms, "queries and passages are of different checkpoints"
    return _clean(csr_matrix(queries, dtype=np.float32, copy=True), "the queries")


def _tiles(corpus: Embeddings) -> Iterator[csr_matrix]:
    """The corpus in tiles. A shard that does not end with a tile is read again for the next."""
    for start in tqdm(range(0, len(corpus), TILE), "inverted lists", leave=False, delay=5):
        blocks = corpus.blocks(start, min(start + TILE, len(corpus)), TILE)
        yield _clean(vstack([block for _, block in blocks], "csr"), corpus.folder)


def _clean(matrix: csr_matrix, place) -> csr_matrix:
    """Add up entries that are given twice and remove zeros, in place. UserError: a weight is
    negative or not finite."""
    if not (np.isfinite(matrix.data) & (matrix.data >= 0)).all():
        raise UserError(f"{place}: a weight is negative or not finite — encode again")
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix
