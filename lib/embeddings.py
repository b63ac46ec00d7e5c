"""The contract between the scripts: every file format, read as the field writes it, written in one form.

    corpus       {"_id": "7", "title": "Ants", "text": "Ants are ..."}   JSONL (BEIR; tevatron has "docid");
                 Parquet, a save_to_disk folder, a hub name (NAME or NAME:CONFIG)
                 {"spans": ["Ants are ...", "A queen ..."]}   JSONL of cut documents (coCondenser), _id optional
                 7 \t Ants are ...      7 \t Ants \t Ants are ...   TSV of 2 or 3 columns (MS MARCO, LexMAE)
                 D7 \t http://... \t Ants \t Ants are ...      MS MARCO documents (url and title: see FIELD)
    queries      {"_id": "q1", "text": "do ants sleep"}      q1 \t do ants sleep
    qrels        q1 0 7 1 (TREC, MS MARCO)      q1 \t 7 (RetroMAE)
                 query-id \t corpus-id \t score, then q1 \t 7 \t 1 (BEIR)
    negatives    q1 \t 9,4,12      best first; or a TREC run
    run          q1 Q0 7 1 13.25 tag (TREC)      q1 \t 7 \t 1 (MS MARCO: qid, pid, rank)
    candidates   q1 \t 7 \t do ants sleep \t Ants are ... (top1000.dev); or a run
    triples      do ants sleep \t Ants are ... \t Bees are ... (texts)      q1 \t 7 \t 9 (ids)
    scores       q1 \t 7 \t 8.31      clusters   q1 \t 12      titles   7 \t Ants
    embeddings   shard-00000.npy (n, D) float16/32, shard-00000.ids.txt, ..., meta.json (written last); sparse ones
                 shard-00000.npz, a CSR matrix (n, V) as scipy.sparse.load_npz reads it; a text of several chunks has
                 as many rows one after the other, with its id in each
    impacts      {"id": "7", "vector": {"ant": 113, "##s": 20}} (Anserini's JsonVectorCollection)
                 q1 \t ant ant ant ##s (its queries, each token as often as it weighs)

Every text file may be gzipped. Ids are strings. Readers stream, and stop at a bad line with `file:line: what is wrong
— what to do`.
"""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, save_npz, vstack

from lib.files import UserError, atomic, lines, read_json, write_json, write_lines
from lib.texts import find_rows, id_hashes


# embeddings
def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def shard_file(index: int, sparse: bool) -> str:
    return f"{shard_name(index)}.{'npz' if sparse else 'npy'}"


def write_shard(folder, index: int, array: np.ndarray | csr_matrix, ids: list[str]) -> None:
    """One shard of embeddings (n, D), dense as .npy or CSR as .npz; the ids come first, so that a shard whose array
    exists is whole."""
    assert array.ndim == 2 and array.shape[0] == len(ids)
    sparse = isinstance(array, csr_matrix)
    write_lines(Path(folder) / f"{shard_name(index)}.ids.txt", ids)
    with atomic(Path(folder) / shard_file(index, sparse)) as temporary:
        with open(temporary, "wb") as stream:
            save_npz(stream, array, compressed=False) if sparse else np.save(stream, array)


def finish_embeddings(folder, meta: dict) -> None:
    """meta.json is written last: without it the folder is not complete."""
    write_json(Path(folder) / "meta.json", meta)


def _read_sparse(path) -> csr_matrix:
    """float32 whatever is stored: scipy computes with no float16."""
    with np.load(path) as parts:
        arrays = parts["data"].astype(np.float32), parts["indices"], parts["indptr"]
        return csr_matrix(arrays, shape=tuple(parts["shape"]))


def _opens(ids: np.ndarray) -> np.ndarray:
    """(n,) ids of vectors -> (n,) bool, True for the first vector of a text."""
    return np.append(True, ids[1:] != ids[:-1])


class Embeddings:
    """A finished folder of embedding shards; rows count through all shards. Dense shards are memory-mapped, sparse
    ones read when their rows are asked for, and given as CSR matrices in place of arrays.

    A row is that of a text: in len, ids and rows, and in what searches return. A text has one vector, or with
    max_chunks > 1 (see lib/text.py) one for each of its chunks, side by side; blocks and take count vectors. Only such
    a folder has, in memory,
        first     (N + 1,) int64, the first vector of each text; last, the number of vectors
        text_of   (num_vectors,) int32, the text that each vector belongs to"""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder — encode.py writes it")
        if not (self.folder / "meta.json").is_file():
            raise UserError(
                f"{folder}: no meta.json, the encoding has not ended — run the same encode.py command again"
            )
        self.meta = read_json(self.folder / "meta.json")
        self.sparse, self.dim = self.meta.get("head") == "sparse", self.meta["dim"]
        self.paths = sorted(self.folder.glob("shard-*.npz" if self.sparse else "shard-*.npy"))
        try:
            shapes = [self._shape(path) for path in self.paths]
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{folder}: a damaged shard ({error}) — remove the folder and encode again"
            ) from error
        self.starts = np.cumsum(
            [0, *(n for n, _ in shapes)]
        )  # first vector of each shard, and the end
        self.num_vectors, self.max_chunks = int(self.starts[-1]), self.meta.get("max_chunks", 1)
        self._ids, self._index = {}, None
        self.text_starts, self.first, self.text_of = (
            self.starts,
            None,
            None,
        )  # text_starts: first text of each shard
        if self.max_chunks > 1:
            opens = [_opens(self._vector_ids(shard)) for shard in range(len(self.paths))]
            self.text_starts = np.cumsum([0, *(part.sum() for part in opens)])
            self.first = np.flatnonzero(np.concatenate([*opens, [True]]))
            self.text_of = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.first))
        found = len(self), self.num_vectors, {dim for _, dim in shapes}
        stated = self.meta["count"], self.meta.get("vectors", self.meta["count"]), {self.dim}
        if found != stated or (self.first is not None and self.first[-1] != self.num_vectors):
            raise UserError(
                f"{folder}: the shards do not hold what meta.json states — remove the folder and encode again"
            )

    def _shape(self, path) -> tuple[int, int]:
        if not self.sparse:
            return np.load(path, mmap_mode="r").shape
        with np.load(path) as parts:
            return tuple(parts["shape"].tolist())

    def _read(self, shard: int) -> np.ndarray | csr_matrix:
        return (
            _read_sparse(self.paths[shard])
            if self.sparse
            else np.load(self.paths[shard], mmap_mode="r")
        )

    def __len__(self) -> int:
        return int(self.text_starts[-1])

    def _vector_ids(self, shard: int) -> np.ndarray:
        return np.array([line for _, line in lines(self.paths[shard].with_suffix(".ids.txt"))])

    def _shard_ids(self, shard: int) -> np.ndarray:
        """Of its texts."""
        if shard not in self._ids:
            ids = self._vector_ids(shard)
            self._ids[shard] = ids if self.first is None else ids[_opens(ids)]
        return self._ids[shard]

    def ids(self, rows) -> list[str]:
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self.text_starts, rows, side="right") - 1
        return [
            str(self._shard_ids(s)[r - self.text_starts[s]])
            for r, s in zip(rows, shards, strict=True)
        ]

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int64 rows, -1 for an unknown id."""
        if self._index is None:
            hashes = np.concatenate(
                [id_hashes(self._shard_ids(s).tolist()) for s in range(len(self.paths))]
            )
            order = np.argsort(hashes, kind="stable")
            self._index = hashes[order], order
        return find_rows(ids, *self._index)

    def blocks(
        self, start: int, stop: int, size: int
    ) -> Iterator[tuple[int, np.ndarray | csr_matrix]]:
        """(place of the first, (n, D) view of at most `size`) over the vectors [start, stop); a shard is held only
        while its blocks are read."""
        for shard in range(len(self.paths)):
            low, high = max(start, self.starts[shard]), min(stop, self.starts[shard + 1])
            if low < high:
                array = self._read(shard)
                for row in range(low, high, size):
                    yield (
                        int(row),
                        array[
                            row - self.starts[shard] : min(row + size, high) - self.starts[shard]
                        ],
                    )

    def take(self, rows) -> np.ndarray | csr_matrix:
        """(len(rows), D) float32: the vectors of these places, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        if self.sparse:
            order = np.argsort(rows, kind="stable")
            parts = [
                self._read(s)[rows[order[shards[order] == s]] - self.starts[s]]
                for s in np.unique(shards)
            ]
            return vstack([*parts, csr_matrix((0, self.dim), dtype=np.float32)], "csr")[
                np.argsort(order)
            ]
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._read(shard)[rows[here] - self.starts[shard]]
        return out
