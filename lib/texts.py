"""Corpora and queries: read in any format of docs/formats.md, opened by row and id from a
memory-mapped copy. A text is (titles, text); titles are (), ("Ants",) or ("http://...", "Ants")."""

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from huggingface_hub.constants import HF_HOME

from lib.files import UserError, line_of, make_once, read_json, write_json, write_lines
from lib.lines import entries, id_of, one_line, value_of

# in this order: MS MARCO v2 names the document `docid` beside the passage's own `pid`
ID_KEYS = ("_id", "pid", "docid", "id", "qid", "doc_id", "query_id", "passage_id")
TEXT_KEYS = ("text", "contents", "body", "passage", "segment", "query")
FIELDS = (ID_KEYS, ("url", ""), ("title", ""), TEXT_KEYS)  # of a TSV; "" = may be absent
ROWS_PER_BATCH = 4096  # rows of one Arrow record batch: the unit of a sequential read
TEXTS_VERSION = 4  # part of the cache key: raise it when what _build_texts writes changes
SCHEMA = pa.schema([("id", pa.string()), ("titles", pa.list_(pa.string())), ("text", pa.string())])

Row = tuple[str, tuple[str, ...], str]  # id, titles, text


def text_key(titles: tuple[str, ...], text: str) -> int:
    """Signed 64-bit key, equal for passages of exactly equal text (white space at the ends apart);
    titles count only where there is no text."""
    string = text.strip() or " ".join(titles).strip()
    return xxhash.xxh3_64_intdigest(string.encode()) - (1 << 63)


# ---- read and write


def read_texts(source) -> Iterator[Row]:
    """(id, titles, text) of a corpus or of queries, streaming. A text may be empty. UserError: a
    malformed line, or an id that is empty or has white space."""
    path = Path(source)
    on_hub = not (os.path.exists(path) or path.suffix or path.is_absolute())
    if on_hub or os.path.isdir(path):
        rows = _dataset_rows(source)
    else:
        expected = "a TSV of texts has 2, 3 or 4, and its header, if any, names id and text"
        rows = entries(path, (2, 3, 4), expected, FIELDS, "\t")
    for place, entry in rows:
        if isinstance(entry, dict):  # null is an empty text
            title, text = entry.get("title"), value_of(TEXT_KEYS, entry, place)
            parts = ("" if value is None else value for value in (title, text))
            entry = [value_of(ID_KEYS, entry, place), *parts]
        identifier, *titles, text = entry
        if not all(isinstance(value, str) for value in (*titles, text)):
            raise UserError(f"{place}: title and text must be strings — correct the line")
        yield id_of(identifier, place), tuple(title for title in titles if title.strip()), text


def _dataset_rows(source) -> Iterator[tuple[str, dict]]:
    """(place, record) of a save_to_disk folder or of a data set on the hub."""
    import datasets

    wrong = f"{source}: not a file, a save_to_disk folder or a reachable hub data set"
    with one_line(wrong, "check the name"):
        if os.path.isdir(source):
            rows = datasets.load_from_disk(str(source))
        else:
            name, _, config = str(source).partition(":")  # as in BeIR/scifact:corpus
            rows = datasets.load_dataset(name, config or None, streaming=True)
        if isinstance(rows, dict):
            usual = [split for split in ("corpus", "queries", "train") if split in rows]
            if not usual and len(rows) > 1:
                several = f"{source}: several splits"
                raise UserError(f"{several} — save the one you mean with save_to_disk")
            rows = rows[[*usual, *rows][0]]
        if os.path.isdir(source):
            rows.data.validate(full=True)  # reading damaged Arrow would crash the process
        for number, record in enumerate(rows):
            yield f"{source}[{number}]", record


def write_texts(path, rows: Iterable[Row]) -> None:
    """JSONL corpus or queries; a missing title is left out."""
    titled = ((i, {"title": " ".join(titles)} if titles else {}, text) for i, titles, text in rows)
    records = ({"_id": i, **title, "text": text} for i, title, text in titled)
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


# ---- ids to rows


def id_hashes(ids: Iterable[str]) -> np.ndarray:
    """uint64 hash of each id. A corpus in which two ids have the same hash is refused."""
    return np.fromiter((xxhash.xxh3_64_intdigest(i.encode()) for i in ids), dtype=np.uint64)


def places(wanted: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """(n,) int64 place of each number in `ascending`, -1 where it is absent."""
    if not len(ascending):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return np.where(ascending[at] == wanted, at, -1)


def find_rows(ids: Iterable[str], sorted_hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) int64 row of each id, -1 where unknown."""
    at = places(id_hashes(ids), sorted_hashes)
    return np.where(at < 0, -1, rows[at])


def require_rows(texts, ids: list[str], path, what: str) -> np.ndarray:
    """(n,) int64 rows of ids in `texts` (or embeddings); `what` is "query" or "passage". UserError
    for an unknown id, with the first line of `path` that holds it."""
    rows = texts.rows(ids)
    if len(rows) and rows.min() < 0:
        unknown = ids[int(rows.argmin())]
        absent = f"{what} {unknown} is not in {texts.source} ({(rows < 0).sum()} unknown ids)"
        raise UserError(f"{line_of(path, unknown)}: {absent} — give files that belong together")
    return rows


# ---- the memory-mapped copy


def _build_texts(folder: Path, source) -> None:
    hashes, keys, digest, empty = [], [], xxhash.xxh3_128(), 0
    folder.mkdir()
    rows = read_texts(source)
    with pa.ipc.new_file(str(folder / "texts.arrow"), SCHEMA) as writer:
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            columns = dict(zip(SCHEMA.names, zip(*batch, strict=True), strict=True))
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
            hashes.append(id_hashes(columns["id"]))
            keys.append(np.array([text_key(t, x) for _, t, x in batch], dtype=np.int64))
            flat = (f"{part}\0" for i, t, x in batch for part in (i, *t, "\0", x))
            digest.update("".join(flat).encode())
            empty += sum(not text.strip() and not titles for _, titles, text in batch)
    if not hashes:
        raise UserError(f"{source}: the file has no texts — check the path")
    if empty:
        print(f"note: {source}: {empty} texts are empty; they are kept", flush=True)
    hashes = np.concatenate(hashes)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        first, second = np.sort(order[twice[0] : twice[0] + 2]).tolist()
        name = next(islice(read_texts(source), first, None))[0]
        wrong = f"{source}: entries {first + 1} and {second + 1} have the same id {name}"
        raise UserError(f"{wrong} — ids must be unique")
    np.save(folder / "id_hashes.npy", ordered)
    np.save(folder / "id_rows.npy", order)
    np.save(folder / "text_keys.npy", np.concatenate(keys))
    meta = {"source": str(source), "count": len(hashes), "fingerprint": digest.hexdigest()}
    write_json(folder / "meta.json", meta)


def open_texts(source) -> "Texts":
    """A corpus or queries for random access by row or id. The first use writes a memory-mapped
    Arrow copy to the cache; after a change of any file (name, size, time) there is a new one. On
    several processes one writes it, and the others wait."""
    path = Path(source)
    found = sorted(path.rglob("*")) if os.path.isdir(path) else [path]
    found = [path for path in found if os.path.isfile(path)]
    stamp = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in found]
    stamp = stamp or [str(source)]  # a hub name: a new revision needs a new cache folder
    key = xxhash.xxh3_64_hexdigest(json.dumps([TEXTS_VERSION, stamp]).encode())
    cache = Path(os.environ.get("ISTHMUS_CACHE") or Path(HF_HOME) / "isthmus")
    folder = cache / f"texts-{key}"
    make_once(folder, partial(_build_texts, source=source))
    damaged = f"{folder}: the copy of {source} is damaged"
    with one_line(damaged, "remove it", (OSError, ValueError)):
        return Texts(folder)


class Texts:
    """Texts by row: `texts[row] -> (titles, text)`. Arrow, memory-mapped, shared by all processes
    and workers; nothing is held in memory."""

    def __init__(self, folder):
        self.folder = Path(folder)
        meta = read_json(self.folder / "meta.json")
        self.source, self.count = meta["source"], meta["count"]
        self.fingerprint = meta["fingerprint"]
        self.text_keys = np.load(self.folder / "text_keys.npy", mmap_mode="r")  # (N,) int64
        self._hashes = np.load(self.folder / "id_hashes.npy", mmap_mode="r")
        self._rows = np.load(self.folder / "id_rows.npy", mmap_mode="r")
        mapped = pa.memory_map(str(self.folder / "texts.arrow"))
        self._columns = pa.ipc.open_file(mapped).read_all().columns  # views into the mapped file

    def __reduce__(self):  # workers started by spawn open the files again
        return Texts, (self.folder,)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[tuple[str, ...], str]:
        _, titles, texts = self._columns
        return tuple(titles[int(row)].as_py()), texts[int(row)].as_py()

    def id(self, row: int) -> str:
        return self._columns[0][int(row)].as_py()

    def ids(self, rows) -> list[str]:
        return [self.id(row) for row in rows]

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int64 rows, -1 for an unknown id."""
        return find_rows(ids, self._hashes, self._rows)

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Rows [start, stop), read without mapping, so that resident memory stays flat."""
        stop = self.count if stop is None else min(stop, self.count)
        with pa.OSFile(str(self.folder / "texts.arrow"), "rb") as source:
            reader = pa.ipc.open_file(source)
            while start < stop:
                number, first = divmod(start, ROWS_PER_BATCH)
                batch = reader.get_batch(number).slice(first, stop - start)
                ids, titles, texts = (column.to_pylist() for column in batch.columns)
                yield from zip(ids, map(tuple, titles), texts, strict=True)
                start += len(batch)
