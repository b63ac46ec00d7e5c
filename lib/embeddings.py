"""Embeddings: a folder of shards, written by encode.py.

    shard-00000.npy      dense vectors (n, D), float16 or float32
    shard-00000.npz      or sparse ones: a CSR matrix (n, V) as scipy.sparse.load_npz reads it
    shard-00000.ids.txt  the id of the text of each vector
    meta.json            how they were made; written last, so without it the folder is incomplete

A text of several chunks (MaxP) has a vector for each, one after the other, with its id in each.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, save_npz, vstack

from lib.files import UserError, atomic, read_json, write_json, write_lines
from lib.lines import lines, one_line
from lib.texts import find_rows, id_hashes


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def shard_file(index: int, sparse: bool) -> str:
    return f"{shard_name(index)}.{'npz' if sparse else 'npy'}"


def write_shard(folder, index: int, array: np.ndarray | csr_matrix, ids: list[str]) -> None:
    """Write one shard (n, D). The ids come first: a shard whose array exists is whole."""
    assert array.ndim == 2 and array.shape[0] == len(ids)
    sparse = isinstance(array, csr_matrix)
    write_lines(Path(folder) / f"{shard_name(index)}.ids.txt", ids)
    with atomic(Path(folder) / shard_file(index, sparse)) as temporary:
        with open(temporary, "wb") as stream:
            save_npz(stream, array, compressed=False) if sparse else np.save(stream, array)


def finish_embeddings(folder, meta: dict) -> None:
    write_json(Path(folder) / "meta.json", meta)


def _checked(path) -> contextlib.AbstractContextManager:
    return one_line(f"{path}: damaged", "remove the folder and encode again")


def _opens(ids: np.ndarray) -> np.ndarray:
    """(n,) ids of vectors -> (n,) bool, True for the first vector of a text."""
    return np.append(True, ids[1:] != ids[:-1])


class Embeddings:
    """A finished folder. Dense shards are memory-mapped; sparse ones are read when their rows are
    asked for, and given as float32 CSR matrices.

    Rows count through all shards. They are texts in len, ids and rows, and in what searches
    return; blocks and take count vectors. The two differ only with max_chunks > 1. Such a folder
    has in memory, and others have as None:
        first     (N + 1,) int64, the first vector of each text; last, the number of vectors
        text_of   (num_vectors,) int32, the text that each vector belongs to"""

    def __init__(self, folder):
        """UserError: the folder is absent, incomplete, damaged or not as meta.json states."""
        self.folder, self.source = Path(folder), str(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder — encode.py writes it")
        if not (self.folder / "meta.json").is_file():
            raise UserError(f"{folder}: no meta.json, it is unfinished — run encode.py again")
        self.meta = read_json(self.folder / "meta.json")
        with _checked(folder):
            self.sparse = self.meta.get("head") == "sparse"
            self.dim = self.meta["dim"]
            self.max_chunks = self.meta.get("max_chunks", 1)
            self.paths = sorted(self.folder.glob("shard-*.npz" if self.sparse else "shard-*.npy"))
            shapes = [self._shape(path) for path in self.paths]
            # first vector of each shard, the end
            self.starts = np.cumsum([0, *(n for n, _ in shapes)])
            self.num_vectors = int(self.starts[-1])
            self.text_starts, self.first, self.text_of = self.starts, None, None
            self._ids, self._index = {}, None
            if self.max_chunks > 1:
                opens = [_opens(self._vector_ids(shard)) for shard in range(len(self.paths))]
                self.text_starts = np.cumsum([0, *(part.sum() for part in opens)])
                self.first = np.flatnonzero(np.concatenate([*opens, [True]]))
                self.text_of = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.first))
            found = len(self), self.num_vectors, {dim for _, dim in shapes}
            stated = self.meta["count"], self.meta.get("vectors", self.meta["count"]), {self.dim}
            if found != stated:
                raise ValueError("the shards do not hold what meta.json states")

    def _shape(self, path) -> tuple[int, int]:
        with _checked(path):
            if not self.sparse:
                return np.load(path, mmap_mode="r").shape
            with np.load(path) as parts:
                return tuple(parts["shape"].tolist())

    def _read(self, shard: int) -> np.ndarray | csr_matrix:
        path = self.paths[shard]
        with _checked(path):
            if not self.sparse:
                return np.load(path, mmap_mode="r")
            with np.load(path) as parts:  # to float32: scipy computes with no float16
                arrays = parts["data"].astype(np.float32), parts["indices"], parts["indptr"]
                matrix = csr_matrix(arrays, shape=tuple(parts["shape"]))
            matrix.check_format()  # numbers out of range would crash the process
            return matrix

    def __len__(self) -> int:
        return int(self.text_starts[-1])

    def _vector_ids(self, shard: int) -> np.ndarray:
        path = self.paths[shard].with_suffix(".ids.txt")
        ids = np.array([line for _, line in lines(path)])
        with _checked(path):
            if len(ids) != self.starts[shard + 1] - self.starts[shard]:
                raise ValueError("it has not one line for each vector")
        return ids

    def _shard_ids(self, shard: int) -> np.ndarray:
        """The ids of the texts of a shard."""
        if shard not in self._ids:
            ids = self._vector_ids(shard)
            self._ids[shard] = ids if self.first is None else ids[_opens(ids)]
        return self._ids[shard]

    def ids(self, rows) -> list[str]:
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self.text_starts, rows, side="right") - 1
        places = zip(shards, rows - self.text_starts[shards], strict=True)
        return [str(self._shard_ids(shard)[at]) for shard, at in places]

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int64 rows, -1 for an unknown id."""
        if self._index is None:
            parts = [self._shard_ids(shard).tolist() for shard in range(len(self.paths))]
            hashes = np.concatenate([id_hashes(part) for part in parts])
            order = np.argsort(hashes, kind="stable")
            self._index = hashes[order], order
        return find_rows(ids, *self._index)

    def blocks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(row of the first, (n, D) view of at most `size`) over the vectors [start, stop); a
        shard is held only while its blocks are read."""
        for shard, edge in enumerate(self.starts[:-1]):
            low, high = max(start, edge), min(stop, self.starts[shard + 1])
            if low < high:
                array = self._read(shard)
                for row in range(low, high, size):
                    yield int(row), array[row - edge : min(row + size, high) - edge]

    def take(self, rows) -> np.ndarray | csr_matrix:
        """(len(rows), D) float32: the vectors with these numbers, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        if self.sparse:
            order = np.argsort(shards, kind="stable")
            parts = [csr_matrix((0, self.dim), dtype=np.float32)]
            for shard in np.unique(shards):
                parts.append(self._read(shard)[rows[shards == shard] - self.starts[shard]])
            return vstack(parts, "csr")[np.argsort(order)]
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._read(shard)[rows[here] - self.starts[shard]]
        return out
