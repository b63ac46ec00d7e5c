"""Corpora and queries: read as the field writes them, opened by row and id from a memory-mapped
copy.

    {"_id": "7", "title": "Ants", "text": "Ants are ..."}   JSONL (BEIR; tevatron and MS MARCO v2
                                                            have other keys)
    7 \\t Ants are ...    7 \\t Ants \\t Ants are ...          TSV (MS MARCO, LexMAE)
    D7 \\t http://... \\t Ants \\t Ants are ...                TSV of MS MARCO documents
    Parquet, a save_to_disk folder, a hub name (NAME or NAME:CONFIG)

A text is (titles, text): titles is () or ("Ants",), and of a document with an address
("http://...", "Ants")."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from lib.files import (
    UserError,
    atomic,
    json_object,
    line_of,
    lines,
    read_json,
    write_json,
    write_lines,
)

# In this order: MS MARCO v2 names the document `docid` beside the passage's own `pid`.
ID_KEYS = ("_id", "pid", "docid", "id", "qid")
TEXT_KEYS = ("text", "contents", "body", "passage", "segment", "query")
ROWS_PER_BATCH = 1024  # rows of one Arrow record batch: the unit of a sequential read
TEXTS_VERSION = 3  # part of the cache key: raise it when what _build_texts writes changes
SCHEMA = pa.schema([("id", pa.string()), ("titles", pa.list_(pa.string())), ("text", pa.string())])

Row = tuple[str, tuple[str, ...], str]  # id, titles, text


def text_key(titles: tuple[str, ...], text: str) -> int:
    """Signed 64-bit key, equal for passages of exactly equal text (white space at the ends apart);
    titles count only where there is no text."""
    string = text.strip() or " ".join(titles).strip()
    return xxhash.xxh3_64_intdigest(string.encode()) - (1 << 63)


# ------------------------------------------------------------------------------------------------
# read and write


def _row(record: dict, place: str) -> Row:
    key = next((name for name in ID_KEYS if name in record), None)
    body = next((name for name in TEXT_KEYS if name in record and name != key), None)
    if key is None or body is None:
        what, keys = ("an id", ID_KEYS) if key is None else ("a text", TEXT_KEYS)
        found = ", ".join(map(str, record)) or "nothing"
        raise UserError(
            f"{place}: no field for {what} ({', '.join(keys)}), only {found} — rename the field"
        )
    identifier, title, text = record[key], record.get("title") or "", record[body] or ""
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(
            f"{place}: the id in {key} is {identifier!r}, not a string or an integer — correct it"
        )
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f"{place}: title and {body} must be strings — correct the line")
    return str(identifier), (title,) if title.strip() else (), text


def _read_file(path) -> Iterator[tuple[str, Row]]:
    width = None  # columns of a TSV, 0 for JSONL
    for number, line in lines(path):
        place = f"{path}:{number}"
        if width is None:
            width = 0 if line.lstrip().startswith("{") else line.count("\t") + 1
        if width == 0:
            yield place, _row(json_object(path, number, line), place)
            continue
        columns = line.split("\t")
        if len(columns) != width:
            raise UserError(
                f"{place}: {len(columns)} columns after lines of {width} — correct the line"
            )
        if width not in (2, 3, 4):
            raise UserError(
                f"{place}: {width} columns, a TSV of texts has 2, 3 or 4 — correct the line"
            )
        identifier, *titles, text = columns
        yield place, (identifier, tuple(title for title in titles if title.strip()), text)


def _read_dataset(source) -> Iterator[tuple[str, Row]]:
    import datasets

    path = Path(source)
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet":
            files = {"data_files": str(path), "split": "train", "streaming": True}
            table = datasets.load_dataset("parquet", **files)
        else:
            name, _, config = str(source).partition(":")  # as in BeIR/scifact:corpus
            table = datasets.load_dataset(name, config or None, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source}: not a file, a save_to_disk folder or a reachable hub data set ({reason}) — "
            "check the name"
        ) from error
    if hasattr(table, "keys"):  # several splits: the only one, or the one with a usual name
        splits = list(table.keys())
        usual = [name for name in ("corpus", "queries", "train") if name in splits]
        if len(splits) > 1 and not usual:
            raise UserError(
                f"{source}: several splits ({', '.join(splits)}) — save the one you mean with "
                "save_to_disk"
            )
        table = table[usual[0] if usual else splits[0]]
    for number, record in enumerate(table):
        place = f"{source}[{number}]"
        yield place, _row(record, place)


def read_texts(source) -> Iterator[Row]:
    """(id, titles, text) of a corpus or of queries, in any format of the list above, streaming.

    UserError: a malformed line, or an id that is empty or has white space. A text may be empty."""
    path = Path(source)
    plain = path.is_file() and path.suffix != ".parquet"
    for place, row in _read_file(path) if plain else _read_dataset(source):
        if not row[0] or any(c.isspace() for c in row[0]):
            raise UserError(
                f"{place}: the id {row[0]!r} is empty or has white space, which run files cannot "
                "hold — rename it"
            )
        yield row


def write_texts(path, rows: Iterable[Row]) -> None:
    """JSONL corpus or queries; a missing title is left out."""
    titled = ((i, {"title": " ".join(titles)} if titles else {}, text) for i, titles, text in rows)
    records = ({"_id": i, **title, "text": text} for i, title, text in titled)
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


# ------------------------------------------------------------------------------------------------
# ids to rows


def id_hashes(ids: Iterable[str]) -> np.ndarray:
    """uint64 hash of each id; equal hashes are taken for equal ids (a corpus in which two ids
    collide is refused)."""
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
    found = np.full(len(at), -1, dtype=np.int64)
    found[at >= 0] = rows[at[at >= 0]]
    return found


def require_rows(texts, ids: list[str], path, what: str, *beside: str) -> np.ndarray:
    """(n,) int64 rows of ids in `texts` (or embeddings). UserError for an unknown id, with the line
    of `path` that holds it (and the ids `beside`); `what` names the kind of id, "query" or
    "passage"."""
    rows = texts.rows(ids)
    if len(rows) and rows.min() < 0:
        unknown = ids[int(rows.argmin())]
        raise UserError(
            f"{line_of(path, unknown, *beside)}: {what} {unknown} is not in {texts.source} "
            f"({(rows < 0).sum()} unknown ids in all) — give the files that belong together"
        )
    return rows


# ------------------------------------------------------------------------------------------------
# the memory-mapped copy


def cache_root() -> Path:
    """Where copies are kept: $ISTHMUS_CACHE, else `isthmus` in the Hugging Face cache
    ($HF_HOME)."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(home) / "isthmus")


def _build_texts(folder: Path, source) -> None:
    hashes, keys, digest, empty = [], [], xxhash.xxh3_128(), 0
    folder.mkdir(parents=True)
    rows = read_texts(source)
    with (
        pa.OSFile(str(folder / "texts.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        while batch := [row for _, row in zip(range(ROWS_PER_BATCH), rows, strict=False)]:
            ids, titles, texts = zip(*batch, strict=True)
            columns = [
                pa.array(x, f.type) for x, f in zip((ids, titles, texts), SCHEMA, strict=True)
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            hashes.append(id_hashes(ids))
            keys.append(np.array([text_key(t, x) for _, t, x in batch], dtype=np.int64))
            flat = (part for i, t, x in batch for part in (i, *t, "\0", x))
            digest.update("\0".join(flat).encode())
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
        pair = {int(order[twice[0]]), int(order[twice[0] + 1])}
        names = [(n + 1, row[0]) for n, row in enumerate(read_texts(source)) if n in pair]
        raise UserError(
            f"{source}: entries {names[0][0]} and {names[1][0]} have the same id {names[1][1]} — "
            "ids must be unique"
        )
    np.save(folder / "id_hashes.npy", ordered)
    np.save(folder / "id_rows.npy", order)
    np.save(folder / "text_keys.npy", np.concatenate(keys))
    meta = {"source": str(source), "count": len(hashes), "fingerprint": digest.hexdigest()}
    write_json(folder / "meta.json", meta)


def open_texts(source) -> "Texts":
    """A corpus or queries for random access by row or id. The first use writes a memory-mapped
    Arrow copy to the cache; a file that has changed since (name, size, time) gets a new one. On
    several processes call it first on one: `with accelerator.main_process_first():`"""
    path = Path(source)
    if path.is_file() or path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stamp = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in found]
    elif path.suffix or path.is_absolute():
        raise UserError(f"{path}: no such file — check the path")
    else:
        stamp = [str(source)]  # a hub name: a new revision needs a new cache folder
    key = xxhash.xxh3_64_hexdigest(json.dumps([TEXTS_VERSION, stamp]).encode())
    folder = cache_root() / f"texts-{key}"
    if not (folder / "meta.json").is_file():
        with atomic(folder) as temporary:
            _build_texts(temporary, source)
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
        self._reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "texts.arrow")))
        self._batches = {}  # views into the mapped file, made on first use

    def __reduce__(self):  # workers started by spawn open the files again
        return Texts, (self.folder,)

    def __len__(self) -> int:
        return self.count

    def _cell(self, row: int, column: int):
        batch, offset = divmod(int(row), ROWS_PER_BATCH)
        if batch not in self._batches:
            self._batches[batch] = self._reader.get_batch(batch)
        return self._batches[batch].column(column)[offset].as_py()

    def __getitem__(self, row: int) -> tuple[tuple[str, ...], str]:
        return tuple(self._cell(row, 1)), self._cell(row, 2)

    def id(self, row: int) -> str:
        return self._cell(row, 0)

    def ids(self, rows) -> list[str]:
        return [self._cell(row, 0) for row in rows]

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int64 rows, -1 for an unknown id."""
        return find_rows(ids, self._hashes, self._rows)

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """(id, titles, text) of rows [start, stop), read batch by batch without mapping, so that
        resident memory stays flat."""
        stop = self.count if stop is None else min(stop, self.count)
        with pa.OSFile(str(self.folder / "texts.arrow"), "rb") as source:
            reader = pa.ipc.open_file(source)
            for number in range(start // ROWS_PER_BATCH, -(-stop // ROWS_PER_BATCH)):
                low = number * ROWS_PER_BATCH
                first, last = max(start - low, 0), min(stop - low, ROWS_PER_BATCH)
                batch = reader.get_batch(number).slice(first, last - first)
                ids, titles, texts = (batch.column(c).to_pylist() for c in range(3))
                yield from zip(ids, map(tuple, titles), texts, strict=True)
