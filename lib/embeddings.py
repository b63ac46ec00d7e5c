"""Embeddings: a folder of shards, written by encode.py.

    shard-00000.npy      dense vectors (n, D), float16 or float32
    shard-00000.npz      or sparse ones: a CSR matrix (n, V) as scipy.sparse.load_npz reads it
    shard-00000.ids.txt  the id of the text of each vector
    meta.json            how they were made; written last, so without it the folder is incomplete

A text of several chunks (MaxP) has a vector for each, one after the other, with its id in each.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from scipy.sparse import csr_matrix, load_npz, save_npz, vstack

from lib.files import UserError, atomic, read_json, write_json, write_lines
from lib.lines import lines, one_line
from lib.texts import find_rows, id_hashes

IDS = ".ids.txt"
AGAIN = "remove the folder and encode again"
IDS_AT_ONCE = 1 << 16
SAMPLE = 1 << 16  # bytes of the beginning and of the end of a file that a fingerprint takes


def shard_file(index: int, sparse: bool) -> str:
    return f"shard-{index:05d}.{'npz' if sparse else 'npy'}"


def write_shard(folder, index: int, array: np.ndarray | csr_matrix, ids: list[str]) -> None:
    """Write one shard (n, D). The ids come first: a shard whose array exists is whole."""
    assert array.ndim == 2 and array.shape[0] == len(ids)
    sparse = isinstance(array, csr_matrix)
    path = Path(folder) / shard_file(index, sparse)
    write_lines(path.with_suffix(IDS), ids)
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        save_npz(stream, array, compressed=False) if sparse else np.save(stream, array)


def finish_embeddings(folder, meta: dict) -> None:
    write_json(Path(folder) / "meta.json", meta)


class Embeddings:
    """A finished folder. Dense shards are memory-mapped; sparse ones are read when their rows are
    asked for, and given as float32 CSR matrices.

    Rows count through all shards: texts in len, ids and rows, and in what searches return; vectors
    in blocks and take. The two differ only with max_chunks > 1; else these are None:
        first     (N + 1,) int64, the first vector of each text; last, the number of vectors
        text_of   (num_vectors,) int32, the text that each vector belongs to"""

    def __init__(self, folder):
        """UserError: the folder is absent, incomplete, damaged or not as meta.json states."""
        self.folder, self.source = Path(folder), str(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder — encode.py writes it")
        if not (self.folder / "meta.json").is_file():
            raise UserError(f"{folder}: no meta.json, it is unfinished — run encode.py again")
        with one_line(f"{folder}/meta.json: damaged", AGAIN):
            self.meta = read_json(self.folder / "meta.json")
            self.sparse = self.meta.get("head") == "sparse"
            self.dim, self.max_chunks = self.meta["dim"], int(self.meta.get("max_chunks", 1))
            stated = self.meta["count"], self.meta.get("vectors", self.meta["count"])
        self.paths = sorted(self.folder.glob("shard-*.npz" if self.sparse else "shard-*.npy"))
        rows = [self._rows_of(path) for path in self.paths]
        self.starts = np.cumsum([0, *rows])  # first vector of each shard, the end
        self.num_vectors = int(self.starts[-1])
        self.first, self.text_of = None, None
        if self.max_chunks > 1:
            ids = self._vector_ids()
            new = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
            self.first = np.flatnonzero(np.concatenate([[True], new, [True]]))
            self.text_of = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.first))
        if not self.paths or (len(self), self.num_vectors) != stated:
            wrong = f"{folder}: the shards do not hold what meta.json states"
            raise UserError(f"{wrong} — {AGAIN}")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of meta.json (without two names, which may change) and of the size, beginning and
        end of every file."""
        made = {**self.meta, "model": None, "input": None}
        digest = xxhash.xxh3_64(json.dumps(made, sort_keys=True).encode())
        for path in (file for shard in self.paths for file in (shard, shard.with_suffix(IDS))):
            size = path.stat().st_size
            with open(path, "rb") as stream:
                digest.update(f"{size} ".encode() + stream.read(SAMPLE))
                stream.seek(max(size - SAMPLE, 0))
                digest.update(stream.read())
        return digest.hexdigest()

    def _rows_of(self, path: Path) -> int:
        with one_line(f"{path}: damaged", AGAIN):
            if self.sparse:
                with np.load(path) as parts:
                    rows, dim = parts["shape"].tolist()
            else:
                array = np.load(path, mmap_mode="r")
                rows, dim = array.shape
                if array.dtype.kind != "f":
                    raise ValueError(f"numbers of type {array.dtype}")
            if dim != self.dim:
                raise ValueError(f"vectors of {dim} dimensions, not {self.dim} as meta.json states")
        return rows

    def _read(self, shard: int) -> np.ndarray | csr_matrix:
        if not self.sparse:
            return np.load(self.paths[shard], mmap_mode="r")
        with one_line(f"{self.paths[shard]}: damaged", AGAIN):
            matrix = load_npz(self.paths[shard])
            matrix.data = matrix.data.astype(np.float32, copy=False)  # scipy knows no float16
            matrix.check_format(full_check=True)  # an index out of range would crash the process
        return matrix

    def refuse_not_finite(self, vectors: np.ndarray) -> None:
        """UserError if there are any: the numbers of vectors that are not finite."""
        if len(vectors):
            text = vectors[0] if self.text_of is None else self.text_of[vectors[0]]
            wrong = f"{self.folder}: the vector of {self.ids([text])[0]} is not finite"
            raise UserError(f"{wrong} — {AGAIN}")

    def __len__(self) -> int:
        return self.num_vectors if self.first is None else len(self.first) - 1

    def _vector_ids(self) -> pa.LargeStringArray:
        parts = [pa.array([], pa.large_string())]
        for path, wanted in zip(self.paths, np.diff(self.starts), strict=True):
            path = path.with_suffix(IDS)
            ids = pa.array((line for _, line in lines(path)), pa.large_string())
            if len(ids) != wanted:
                raise UserError(f"{path}: {len(ids)} ids of {wanted} vectors — {AGAIN}")
            parts.append(ids)
        return pa.concat_arrays(parts)

    @cached_property
    def _ids(self) -> pa.LargeStringArray:
        """(len(self),) ids of the texts."""
        ids = self._vector_ids()
        return ids if self.first is None else ids.take(self.first[:-1])

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """The sorted hashes of all ids, and their rows."""
        starts = range(0, len(self), IDS_AT_ONCE)
        parts = [id_hashes(self._ids[at : at + IDS_AT_ONCE].to_pylist()) for at in starts]
        hashes = np.concatenate(parts)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def ids(self, rows) -> list[str]:
        return self._ids.take(np.asarray(rows, dtype=np.int64)).to_pylist()

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int64 rows, -1 for an unknown id."""
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
        """(len(rows), D) float32: the vectors with these numbers, in their order. UserError: one is
        not finite."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        if self.sparse:
            order = np.argsort(shards, kind="stable")
            parts = [csr_matrix((0, self.dim), dtype=np.float32)]
            for shard in np.unique(shards):
                parts.append(self._read(shard)[rows[shards == shard] - self.starts[shard]])
            found = vstack(parts, "csr")[np.argsort(order)]
        else:
            found = np.empty((len(rows), self.dim), dtype=np.float32)
            for shard in np.unique(shards):
                here = shards == shard
                found[here] = self._read(shard)[rows[here] - self.starts[shard]]
        if not np.isfinite(found.sum()):  # fast, and a sum may overflow: then look closely
            values = (vector.data if self.sparse else vector for vector in found)
            self.refuse_not_finite(rows[[not np.isfinite(one).all() for one in values]])
        return found
