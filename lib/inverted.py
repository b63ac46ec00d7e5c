"""Inverted lists: exact search of sparse vectors (LexMAE, SPLADE) and BM25, which is the same with other weights.

    score of a passage = sum over the terms of the query of (weight in the query) · (weight in the passage)

Results are as lib/index.py states them; passages without a common term are not among them. A passage's score is added
up in float32 in the order of the query's terms, so it has the same bits from `search` and `score` and on any number of
processes, each of which searches its own range of rows.

The corpus is cut into tiles of TILE rows, small enough for a tile's scores to stay in the cache of a core while lists
are added to them. An index is a folder of arrays, memory-mapped and shared by all processes:

    documents.npy  uint16 (P)       row within its tile: by tile, by term, ascending
    weights.npy    (P)              float32; or uint16 or uint8, times the list's scale
    offsets.npy    int64 (L + 1)    where each list begins
    scales.npy     float32 (L)      1 where weights are float32
    terms.npy      int32 (L)        the term of each list, ascending within a tile
    tiles.npy      int64 (T + 1)    which list each tile begins with
    vocabulary.npy uint64 (V)       BM25: the sorted hashes of the terms
    manifest.json                   what was indexed and how

A posting takes 6 bytes (4 or 3 with quantised weights), a list 16; the zeros of frequent lists (FULL) add 7 to 14 %.

Every posting of a query's terms is added up, without bounds on what a list (MaxScore) or a block of documents (BMP,
arXiv 2405.01117) can still contribute: learned weights are spread over so many terms that at depth 1000 the bounds
rule out next to nothing, and at depth 10 less than it costs to keep them.

Shapes: Q queries, N passages, V terms, k depth, P postings, L lists, T tiles, W processes.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from tqdm import tqdm

from lib.embeddings import Embeddings
from lib.files import UserError, atomic, read_json, write_json
from lib.search import (
    DEVICE_QUERY_TILE,
    EMPTY,
    KEYS_AT_A_TIME,
    merge,
    push,
    scan_device,
    top_keys,
    unpack,
)

TILE = 1 << 15  # scores of 128 KB; at most 1 << 16, for documents.npy


FULL = 4  # a list of more than n / 4 of a tile's n documents is stored with all n, zeros among them: see _add


QUERIES = 256  # that a thread takes through all tiles: they share what the cache holds of a tile


DEVICE_QUERIES = 8192  # held on a GPU as a dense matrix: 1 GB


# the index: written
@contextlib.contextmanager
def _growing(path, dtype):
    """A stream for the content of a one-dimensional .npy file, whose length is put into its header at the end (numpy
    leaves room for the digits)."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (0,)}
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        start = stream.tell()
        yield stream
        header["shape"] = ((stream.tell() - start) // np.dtype(dtype).itemsize,)
        stream.seek(0)
        np.lib.format.write_array_header_1_0(stream, header)
        assert stream.tell() == start


@numba.njit(nogil=True, cache=True)
def _invert(starts, terms, weights, full, places, documents, out):
    """Rows of terms -> lists of documents. places (V): where the list of a term begins; changed."""
    for row in range(len(starts) - 1):
        for j in range(starts[row], starts[row + 1]):
            term = terms[j]
            at = places[term]
            if full[term]:
                at += row
            else:
                places[term] += 1
            documents[at], out[at] = row, weights[j]


def write(folder: Path, tiles: Iterable[csr_matrix], bits: int) -> None:
    """The lists of tiles (TILE rows each, the last fewer; no entry twice). Memory: some copies of one tile, and 16
    bytes for each list."""
    dtype = {32: np.float32, 16: np.uint16, 8: np.uint8}[bits]
    offsets, scales, terms, first_lists = [np.zeros(1, dtype=np.int64)], [], [], [0]
    folder.mkdir(parents=True)
    with (
        _growing(folder / "documents.npy", np.uint16) as to_documents,
        _growing(folder / "weights.npy", dtype) as out,
    ):
        for tile in tiles:
            rows = tile.shape[0]
            counts = np.bincount(tile.indices, minlength=tile.shape[1])
            full, known = counts * FULL > rows, np.flatnonzero(counts)
            lengths = np.where(full, rows, counts)
            ends = np.cumsum(lengths)
            starts = ends - lengths
            documents, weights = (
                np.zeros(ends[-1], dtype=np.uint16),
                np.zeros(ends[-1], dtype=np.float32),
            )
            rowwise = (
                tile.indptr.astype(np.int64),
                tile.indices.astype(np.int32, copy=False),
                tile.data,
            )
            _invert(*rowwise, full, starts.copy(), documents, weights)
            for start in starts[full]:
                documents[start : start + rows] = np.arange(rows)
            scale = np.ones(len(known), dtype=np.float32)
            if (
                bits < 32
            ):  # each list by its own largest weight; no scale of 0 from one that is hardly a number
                largest = np.maximum.reduceat(weights, starts[known]) if len(known) else scale
                scale = np.maximum(largest / np.float32(2**bits - 1), np.finfo(np.float32).tiny)
                weights = np.rint(weights / np.repeat(scale, lengths[known])).astype(dtype)
            to_documents.write(documents)
            out.write(weights)
            offsets.append(offsets[-1][-1:] + ends[known])
            scales.append(scale)
            terms.append(known.astype(np.int32))
            first_lists.append(first_lists[-1] + len(known))
    np.save(folder / "offsets.npy", np.concatenate(offsets))
    np.save(folder / "scales.npy", np.concatenate([np.zeros(0, dtype=np.float32), *scales]))
    np.save(folder / "terms.npy", np.concatenate([np.zeros(0, dtype=np.int32), *terms]))
    np.save(folder / "tiles.npy", np.array(first_lists, dtype=np.int64))


def open_folder(
    folder, what: str, manifest: dict, build: Callable[[Path, dict], None], accelerator
) -> None:
    """Have rank 0 build the index in `folder` if the folder is absent; see that it holds what `manifest` states."""
    folder = Path(folder)
    if accelerator is None or accelerator.is_main_process:
        if not folder.exists():
            with atomic(folder) as temporary:
                build(temporary, manifest)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no {what} index — choose another folder")
    stored = read_json(folder / "manifest.json")
    for key, value in manifest.items():
        if stored.get(key) != value:
            raise UserError(
                f"{folder}: a {what} index with {key} {stored.get(key)}, not {value} — remove it or choose another "
                "folder"
            )


# the index: searched
@numba.njit(nogil=True, cache=True)
def _add(totals, documents, weights, weight):
    """Add a list to the scores of its tile. A list of all documents needs no addresses, so that the compiler adds 16
    at a time: worth it from a quarter of the documents on."""
    if len(documents) == len(totals):
        for j in range(len(totals)):
            totals[j] += weight * np.float32(weights[j])
    else:
        for j in range(len(documents)):
            totals[documents[j]] += weight * np.float32(weights[j])


@numba.njit(nogil=True, cache=True)
def _offer(totals, first_row, keys, count, bar, k):
    """Offer the scores of rows first_row ... to the list of one query; its (count, bar) after that."""
    bits, above = totals.view(np.int32), np.empty(64, dtype=np.int64)
    for start in range(0, len(totals), 64):
        line, hit = totals[start : start + 64], False
        for j in range(len(line)):  # no branch, so that the compiler compares 16 at a time
            hit |= line[j] > bar
        if hit:
            number = 0
            for j in range(
                len(line)
            ):  # nor here, where the processor could only guess which way it goes
                above[number] = start + j
                number += line[j] > bar
            for j in above[:number]:
                if totals[j] > bar:
                    count, bar = push(totals[j], bits[j], first_row + j, keys, count, bar, k)
    return count, bar


@numba.njit(nogil=True, cache=True)
def _find(numbers, number):
    """Where `number` stands in the ascending `numbers`, -1 if it does not."""
    at = np.searchsorted(numbers, number)
    return at if at < len(numbers) and numbers[at] == number else -1


@numba.njit(nogil=True, cache=True)
def _scan_tiles(
    queries,
    tile_range,
    tile,
    rows,
    starts,
    terms,
    weights,
    keys,
    k,
    documents,
    values,
    offsets,
    scales,
    names,
    tiles,
):
    """The k best keys of queries[0] ... queries[1] - 1 among the documents of some tiles. `rows`: N."""
    totals = np.zeros(tile, dtype=np.float32)
    counts = np.zeros(queries[1], dtype=np.int64)
    bars = np.zeros(
        queries[1], dtype=np.float32
    )  # a document without a term scores 0: not above the bar
    for t in range(tile_range[0], tile_range[1]):
        here, known = totals[: min(tile, rows - t * tile)], names[tiles[t] : tiles[t + 1]]
        for q in range(queries[0], queries[1]):
            touched = False
            for i in range(starts[q], starts[q + 1]):
                at = _find(known, terms[i])
                if at >= 0:
                    at += tiles[t]
                    mine = slice(offsets[at], offsets[at + 1])
                    _add(here, documents[mine], values[mine], weights[i] * scales[at])
                    touched = True
            if touched:
                counts[q], bars[q] = _offer(here, t * tile, keys[q], counts[q], bars[q], k)
                here[:] = 0
    for q in range(queries[0], queries[1]):
        keys[q, counts[q] :] = EMPTY


@numba.njit(nogil=True, cache=True)
def _score_rows(rows, tile, terms, weights, documents, values, offsets, scales, names, tiles):
    """The scores of one query with given rows, in the order of addition of `_scan_tiles`: the same float32."""
    totals, lists, t = (
        np.zeros(len(rows), dtype=np.float32),
        np.empty(len(terms), dtype=np.int64),
        -1,
    )
    for r in range(len(rows)):
        if rows[r] // tile != t:
            t = rows[r] // tile
            for i in range(len(terms)):
                at = _find(names[tiles[t] : tiles[t + 1]], terms[i])
                lists[i] = at + tiles[t] if at >= 0 else -1
        for i in range(len(terms)):
            if lists[i] >= 0:
                start = offsets[lists[i]]
                at = _find(documents[start : offsets[lists[i] + 1]], rows[r] % tile)
                if at >= 0:
                    totals[r] += weights[i] * scales[lists[i]] * np.float32(values[start + at])
    return totals


class Inverted:
    """A finished index, and search with queries given as terms: query q has terms[starts[q] : starts[q + 1]] (int, in
    the order of addition) and their weights (float32)."""

    def __init__(self, folder, accelerator=None):
        self.folder, self.accelerator = Path(folder), accelerator
        self.meta = read_json(self.folder / "manifest.json")
        self.count, self.tile = self.meta["count"], self.meta["tile"]
        parts = "documents", "weights", "offsets", "scales", "terms", "tiles"
        self.lists = [np.load(self.folder / f"{part}.npy", mmap_mode="r") for part in parts]
        rank, world = (
            (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        )
        tiles = -(-self.count // self.tile)
        self.tile_range = tiles * rank // world, tiles * (rank + 1) // world
        self.at_a_time, self.world = 1 << 16, world

    def _search(self, starts: np.ndarray, terms: np.ndarray, weights: np.ndarray, k: int):
        assert k > 0
        queries = len(starts) - 1
        scores, rows = (
            np.empty((queries, k), dtype=np.float32),
            np.empty((queries, k), dtype=np.int64),
        )
        at_a_time = min(max(KEYS_AT_A_TIME // (k * self.world), 1), self.at_a_time)
        for at in range(0, queries, at_a_time):
            keys = self._best(starts[at : at + at_a_time + 1], terms, weights, k)
            scores[at : at + at_a_time], rows[at : at + at_a_time] = unpack(
                merge(keys, k, self.accelerator)
            )
        return scores, rows

    def _best(self, starts: np.ndarray, terms: np.ndarray, weights: np.ndarray, k: int) -> Tensor:
        """The best keys (Q, k) in the tiles of this process."""
        queries, depth = len(starts) - 1, min(k, self.count)
        keys, threads = np.full((queries, 2 * depth), EMPTY), torch.get_num_threads()
        size = max(min(QUERIES, -(-queries // threads)), 1)

        def scan(start: int) -> None:
            part = start, min(start + size, queries)
            _scan_tiles(
                part,
                self.tile_range,
                self.tile,
                self.count,
                starts,
                terms,
                weights,
                keys,
                depth,
                *self.lists,
            )

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(scan, range(0, queries, size)))
        return top_keys(torch.from_numpy(keys), k)

    def _score(
        self, starts: np.ndarray, terms: np.ndarray, weights: np.ndarray, rows: Sequence[np.ndarray]
    ):
        return [
            _score_rows(
                np.asarray(r, dtype=np.int64), self.tile, terms[a:b], weights[a:b], *self.lists
            )
            for a, b, r in zip(starts[:-1], starts[1:], rows, strict=True)
        ]


# sparse vectors
def _check_weights(matrix: csr_matrix, place: Callable[[int], str]) -> None:
    """UserError if a weight is not finite or negative; place(row) names it."""
    good = np.isfinite(matrix.data) & (matrix.data >= 0)
    if not good.all():
        row = int(np.searchsorted(matrix.indptr, good.argmin(), side="right")) - 1
        raise UserError(f"{place(row)} has a weight that is negative or not finite — encode again")


def _tiles(corpus: Embeddings) -> Iterator[csr_matrix]:
    """The corpus in tiles; each shard is read once."""
    parts, rows = [], 0

    def joined():
        tile = vstack(parts, "csr")
        tile.sum_duplicates()
        tile.eliminate_zeros()
        return tile

    with tqdm(total=len(corpus), desc="inverted lists", unit=" rows", leave=False, delay=5) as bar:
        for start, block in corpus.blocks(0, len(corpus), TILE):
            _check_weights(
                block, lambda row, start=start: f"{corpus.folder}: {corpus.ids([start + row])[0]}"
            )
            bar.update(block.shape[0])
            while block.shape[0]:
                parts.append(block[: TILE - rows])
                block, rows = block[TILE - rows :], rows + parts[-1].shape[0]
                if rows == TILE:
                    yield joined()
                    parts, rows = [], 0
    if parts:
        yield joined()


class Sparse(Inverted):
    """Inner-product search over a folder of sparse embeddings, exact but for the quantisation that is asked for.

    With 8 or 16 bits, weights are whole multiples of a step, the largest weight of the term in a tile / (2^bits - 1).
    A score is off by at most half a step times the weight in the query for each term: with 8 bits, by 1/510 of the
    greatest score that the query could have. A weight below half a step counts as 0.

    On a GPU, tiles are multiplied as sparse matrices; the order of addition is the library's, so scores there may
    differ from `score` in the last bits."""

    def __init__(self, folder, accelerator=None):
        super().__init__(folder, accelerator)
        self.dim = self.meta["dim"]
        self.device = accelerator.device if accelerator else torch.device("cpu")
        if self.device.type == "cuda":
            self.at_a_time = DEVICE_QUERIES

    @classmethod
    def open(cls, corpus: Embeddings, folder, bits: int = 32, accelerator=None) -> "Sparse":
        """The index of `corpus` in `folder`, built there if the folder is absent, in the memory of a few tiles. bits:
        32 (float32), 16 or 8. To be called by all processes. UserError if the folder holds an index of other vectors
        or settings, or a weight is negative or not finite."""
        if bits not in (8, 16, 32):
            raise UserError(f"weights of {bits} bits — choose 32, 16 or 8")
        assert corpus.sparse
        made = {
            key: value for key, value in corpus.meta.items() if key not in ("model", "input")
        }  # names may change
        open_folder(
            folder,
            "sparse",
            {**made, "bits": bits, "tile": TILE},
            partial(cls._build, corpus),
            accelerator,
        )
        return cls(folder, accelerator)

    @staticmethod
    def _build(corpus: Embeddings, folder: Path, manifest: dict) -> None:
        write(folder, _tiles(corpus), manifest["bits"])
        write_json(folder / "manifest.json", manifest)

    def _queries(self, queries: csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if queries.shape[1] != self.dim:
            raise UserError(
                f"{self.folder}: vectors over {self.dim} terms, but queries over {queries.shape[1]} — encode both "
                "with one checkpoint"
            )
        queries = csr_matrix(queries, dtype=np.float32, copy=True)
        _check_weights(queries, lambda row: f"query vector {row}")
        queries.sum_duplicates()
        queries.eliminate_zeros()
        return queries.indptr.astype(np.int64), queries.indices.astype(np.int32), queries.data

    def search(self, queries: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """queries (Q, V) -> (scores (Q, k), rows (Q, k)), the same on every process. UserError if the number of terms
        is another, or a weight negative or not finite."""
        return self._search(*self._queries(queries), k)

    def score(self, queries: csr_matrix, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows, 0 without a common term: for each query an array of rows -> a float32 array."""
        return self._score(*self._queries(queries), rows)

    def _best(self, *queries) -> Tensor:
        return (
            self._best_device(*queries) if self.device.type == "cuda" else super()._best(*queries)
        )

    def _best_device(
        self, starts: np.ndarray, terms: np.ndarray, weights: np.ndarray, k: int
    ) -> Tensor:
        mine = slice(starts[0], starts[-1])
        queries = self._matrix(starts, terms[mine], weights[mine], self.dim).to_dense()  # (Q, V)
        best = torch.full((len(queries), k), EMPTY, device=self.device)
        documents, values, offsets, scales, names, tiles = self.lists
        for t in range(*self.tile_range):
            ends, lists = offsets[tiles[t] : tiles[t + 1] + 1], slice(tiles[t], tiles[t + 1])
            mine, rows = slice(ends[0], ends[-1]), min(self.tile, self.count - t * self.tile)
            scaled = values[mine] * np.repeat(scales[lists], np.diff(ends))
            tile = self._matrix(ends, documents[mine], scaled, rows)  # (terms of the tile, rows)
            known = torch.from_numpy(names[lists].astype(np.int64)).to(self.device)
            for at in range(0, len(queries), DEVICE_QUERY_TILE):
                part = slice(at, at + DEVICE_QUERY_TILE)
                best[part] = scan_device(
                    queries[part][:, known] @ tile, t * self.tile, best[part], k
                )
        return best.masked_fill_(best < 1 << 32, EMPTY)  # the keys of scores of 0: no common term

    def _matrix(
        self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, width: int
    ) -> Tensor:
        """Rows that begin at starts - starts[0] -> a CSR matrix (len(starts) - 1, width) on the device."""
        parts = (starts - starts[0]).astype(np.int32), columns.astype(np.int32), values
        with (
            warnings.catch_warnings()
        ):  # torch says that its sparse matrices are new, and that it does not check them
            warnings.simplefilter("ignore")
            parts = [torch.from_numpy(part).to(self.device) for part in parts]
            return torch.sparse_csr_tensor(*parts, size=(len(starts) - 1, width))
