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
    line_of,
    lines,
    read_json,
    split_columns,
    write_json,
    write_lines,
)

ID_KEYS, TEXT_KEYS = (
    ("_id", "docid", "id", "pid", "qid"),
    ("text", "contents", "body", "passage", "query"),
)


ROWS_PER_BATCH = 1024  # rows of one Arrow record batch: the unit of a sequential read


SPAN = "\n\x1e\n"  # between the spans of a document that comes cut into spans: a record separator, in no ordinary text


FIELD = "\x1f"  # between url and title of a document, in the place of a title: a unit separator, white space to str


TEXTS_VERSION = 2  # part of the cache key: raise it when what build_texts writes changes


# texts: corpora and queries
def text_key(title: str, text: str) -> int:
    """Signed 64-bit key, equal for passages of exactly equal text (white space at the ends apart); the title counts
    only where there is no text."""
    return xxhash.xxh3_64_intdigest((text.strip() or title.strip()).encode()) - (1 << 63)


def _row(record: dict, place: str) -> tuple[str, str, str]:
    key = next((k for k in ID_KEYS if k in record), None)
    body = next((k for k in TEXT_KEYS if k in record and k != key), None)
    if body is None and isinstance(record.get("spans"), list):
        if not all(isinstance(span, str) for span in record["spans"]):
            raise UserError(
                f"{place}: spans must be strings, not ids of some tokenizer — write the texts"
            )
        number = place.rstrip("]").replace("[", ":").rpartition(":")[2]
        return (
            str(record[key] if key else number),
            record.get("title") or "",
            SPAN.join(record["spans"]),
        )
    if key is None or body is None:
        missing = (
            f"an id ({', '.join(ID_KEYS)})" if key is None else f"a text ({', '.join(TEXT_KEYS)})"
        )
        raise UserError(
            f"{place}: no field for {missing}, only {', '.join(map(str, record)) or 'nothing'} — rename the field"
        )
    identifier, title, text = record[key], record.get("title") or "", record[body]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(
            f"{place}: the id in {key} is {identifier!r} — it must be a string or an integer"
        )
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f"{place}: title and {body} must be strings — mend the line")
    return str(identifier), title, text


def _tsv_row(path, number, line) -> tuple[str, str, str]:
    columns = split_columns(path, number, line, "\t", (2, 3, 4), "a TSV of texts")
    if len(columns) == 4:  # MS MARCO documents: docid, url, title, body
        columns[1:3] = [FIELD.join(columns[1:3])]
    return (
        (columns[0], "", columns[1]) if len(columns) == 2 else (columns[0], columns[1], columns[2])
    )


def _read_file(path) -> Iterator[tuple[str, str, str, str]]:
    width = None
    for number, line in lines(path):
        place = f"{path}:{number}"
        if line.lstrip()[0] == "{" and width is None:
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: not JSON ({error.msg}) — mend the line") from error
            yield place, *_row(record, place)
        else:
            if width not in (None, line.count("\t")):
                raise UserError(
                    f"{place}: {line.count(chr(9)) + 1} columns after lines of {width + 1} — mend the line"
                )
            width = line.count("\t")
            yield place, *_tsv_row(path, number, line)


def _read_dataset(source) -> Iterator[tuple[str, str, str, str]]:
    import datasets

    path = Path(source)
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet":
            table = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True
            )
        else:
            name, _, config = str(source).partition(
                ":"
            )  # NAME or NAME:CONFIG, as in BeIR/scifact:corpus
            table = datasets.load_dataset(name, config or None, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source}: not a file, a save_to_disk folder or a reachable hub data set ({reason}) — check the name"
        ) from error
    if hasattr(
        table, "keys"
    ):  # several splits: take the only one, or the one that corpora and queries are published under
        splits = list(table.keys())
        name = next((s for s in ("corpus", "queries", "train") if s in splits), splits[0])
        if len(splits) > 1 and name == splits[0] and name not in ("corpus", "queries", "train"):
            raise UserError(
                f"{source}: several splits ({', '.join(splits)}) — save the one you mean with save_to_disk"
            )
        table = table[name]
    for number, record in enumerate(table):
        yield f"{source}[{number}]", *_row(record, f"{source}[{number}]")


def _with_titles(rows, titles) -> Iterator[tuple[str, str, str, str]]:
    """Join a `pid \\t title` file. Both are read in step, so equal order needs no memory; rows that come early wait in
    a dict."""
    ahead, title_lines = {}, lines(titles)
    for place, identifier, title, text in rows:
        while identifier not in ahead:
            number, line = next(title_lines, (0, ""))
            if not number:
                raise UserError(
                    f"{place}: {identifier} has no title in {titles} — complete that file or leave it out"
                )
            pid, _, value = line.partition("\t")
            ahead[pid] = value.strip()
        yield place, identifier, ahead.pop(identifier) or title, text


def read_texts(source, titles=None) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of a corpus or of queries in any format of the table above, streaming. `titles`: a `pid \\t
    title` file to join.
    UserError on a malformed line, an empty id, or an entry with neither title nor text."""
    path = Path(source)
    rows = (
        _read_file(path) if path.is_file() and path.suffix != ".parquet" else _read_dataset(source)
    )
    for place, identifier, title, text in _with_titles(rows, titles) if titles else rows:
        if not identifier or any(c.isspace() for c in identifier):
            raise UserError(
                f"{place}: the id {identifier!r} is empty or has white space, which run files cannot hold — rename it"
            )
        if not text.strip() and not title.strip():
            raise UserError(f"{place}: {identifier} has neither title nor text — remove the line")
        yield identifier, title, text


def write_texts(path, rows: Iterable[tuple[str, str, str]]) -> None:
    """JSONL corpus or queries; an empty title is left out."""
    write_lines(
        path,
        (
            json.dumps({"_id": i, **({"title": t} if t else {}), "text": x}, ensure_ascii=False)
            for i, t, x in rows
        ),
    )


def cache_root() -> Path:
    """Where memory-mapped copies are kept: $ISTHMUS_CACHE, else `isthmus` in the Hugging Face cache
    ($HF_HOME)."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(home) / "isthmus")


def id_hashes(ids: Iterable[str]) -> np.ndarray:
    """uint64 hash of each id; equality of hashes is taken for equality of ids (Texts refuses a corpus in which two ids
    collide)."""
    return np.fromiter((xxhash.xxh3_64_intdigest(i.encode()) for i in ids), dtype=np.uint64)


def find_rows(ids: Iterable[str], sorted_hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Row of each id, -1 where unknown, by binary search in the sorted hashes."""
    wanted = id_hashes(ids)
    if not len(sorted_hashes):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(sorted_hashes, wanted), len(sorted_hashes) - 1)
    return np.where(sorted_hashes[at] == wanted, rows[at], -1).astype(np.int64)


def _build_texts(folder: Path, source, titles) -> None:
    schema = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
    hashes, keys, batch, digest = [], [], [], xxhash.xxh3_128()
    folder.mkdir(parents=True)

    def flush(writer):
        ids, heads, texts = zip(*batch, strict=True)
        writer.write_batch(
            pa.record_batch([pa.array(c, pa.string()) for c in (ids, heads, texts)], schema=schema)
        )
        hashes.append(id_hashes(ids))
        keys.append(
            np.array([text_key(t, x) for t, x in zip(heads, texts, strict=True)], dtype=np.int64)
        )
        digest.update("\0".join(part for row in batch for part in row).encode())
        batch.clear()

    with (
        pa.OSFile(str(folder / "texts.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for row in read_texts(source, titles):
            batch.append(row)
            if len(batch) == ROWS_PER_BATCH:
                flush(writer)
        if batch:
            flush(writer)
    if not hashes:
        raise UserError(f"{source}: no text in it — is it the right file?")
    hashes = np.concatenate(hashes)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        names = [
            (n, row[0]) for n, row in enumerate(read_texts(source, titles)) if n in (first, second)
        ]
        raise UserError(
            f"{source}: entries {names[0][0] + 1} and {names[1][0] + 1} have the same id {names[1][1]} — ids "
            "must be unique"
        )
    np.save(folder / "id_hashes.npy", ordered)
    np.save(folder / "id_rows.npy", order)
    np.save(folder / "text_keys.npy", np.concatenate(keys))
    write_json(
        folder / "meta.json",
        {"source": str(source), "count": len(hashes), "fingerprint": digest.hexdigest()},
    )


def open_texts(source, titles=None) -> "Texts":
    """A corpus or queries for random access by row or id. The first use writes a memory-mapped Arrow copy to the
    cache; a file that has changed since (name, size, time) gets a new one. On several processes call it first on one:
    `with accelerator.main_process_first():`"""
    stamp = [TEXTS_VERSION]
    for path in [source, *([titles] if titles else [])]:
        path = Path(path)
        if path.is_file():
            stamp += [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        elif path.is_dir():
            stamp += [
                [str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns]
                for p in sorted(path.glob("*"))
            ]
        elif path.suffix or path.is_absolute():
            raise UserError(f"{path}: no such file — check the path")
        else:
            stamp.append(str(source))  # a hub name: a new revision needs a new cache folder
    folder = cache_root() / f"texts-{xxhash.xxh3_64_hexdigest(json.dumps(stamp).encode())}"
    if not (folder / "meta.json").is_file():
        with atomic(folder) as temporary:
            _build_texts(temporary, source, titles)
    return Texts(folder)


class Texts:
    """Texts by row: `texts[row] -> (title, text)`. Arrow, memory-mapped, shared by all processes and workers; nothing
    is held in memory."""

    def __init__(self, folder):
        self.folder = Path(folder)
        meta = read_json(self.folder / "meta.json")
        self.source, self.count, self.fingerprint = (
            meta["source"],
            meta["count"],
            meta["fingerprint"],
        )
        self.text_keys = np.load(
            self.folder / "text_keys.npy", mmap_mode="r"
        )  # (N,) int64, see text_key
        self._hashes = np.load(self.folder / "id_hashes.npy", mmap_mode="r")
        self._rows = np.load(self.folder / "id_rows.npy", mmap_mode="r")
        self._reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "texts.arrow")))
        self._batches = {}  # views into the mapped file, made on first use

    def __reduce__(self):  # workers started by spawn open the files again
        return Texts, (self.folder,)

    def __len__(self) -> int:
        return self.count

    def _cell(self, row: int, column: int) -> str:
        batch, offset = divmod(int(row), ROWS_PER_BATCH)
        if batch not in self._batches:
            self._batches[batch] = self._reader.get_batch(batch)
        return self._batches[batch].column(column)[offset].as_py()

    def __getitem__(self, row: int) -> tuple[str, str]:
        return self._cell(row, 1), self._cell(row, 2)

    def id(self, row: int) -> str:
        return self._cell(row, 0)

    def ids(self, rows) -> list[str]:
        return [self._cell(row, 0) for row in rows]

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int64 rows, -1 for an unknown id."""
        return find_rows(ids, self._hashes, self._rows)

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, str, str]]:
        """(id, title, text) of rows [start, stop), read batch by batch without mapping, so that resident memory stays
        flat."""
        stop = self.count if stop is None else min(stop, self.count)
        with pa.OSFile(str(self.folder / "texts.arrow"), "rb") as source:
            reader = pa.ipc.open_file(source)
            for number in range(start // ROWS_PER_BATCH, -(-stop // ROWS_PER_BATCH)):
                first = number * ROWS_PER_BATCH
                batch = reader.get_batch(number).slice(
                    max(start - first, 0), min(stop - first, ROWS_PER_BATCH) - max(start - first, 0)
                )
                yield from zip(*(batch.column(c).to_pylist() for c in range(3)), strict=True)


def require_rows(texts, ids: list[str], path, what: str, *beside: str) -> np.ndarray:
    """(n,) int64 rows of ids in `texts` (Texts or Embeddings). UserError for an unknown id, with
    the line of `path` that holds it (and the fields `beside` it)."""
    rows = texts.rows(ids)
    if len(rows) and rows.min() < 0:
        unknown, count = ids[int(rows.argmin())], int((rows < 0).sum())
        raise UserError(
            f"{line_of(path, unknown, *beside)}: {what} {unknown} is not in {texts.source} ({count} "
            "such) — give the files that belong together"
        )
    return rows


known_rows = require_rows  # the old name, until every caller has the new one
