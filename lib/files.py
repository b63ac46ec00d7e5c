"""The contract between the scripts: every file format, read as the field writes it, written in one form.

    corpus       {"_id": "7", "title": "Ants", "text": "Ants are ..."}   JSONL (BEIR; tevatron has "docid");
                 Parquet, a save_to_disk folder, a hub name (NAME or NAME:CONFIG)
                 {"spans": ["Ants are ...", "A queen ..."]}   JSONL of cut documents (coCondenser), _id optional
                 7 \\t Ants are ...      7 \\t Ants \\t Ants are ...   TSV of 2 or 3 columns (MS MARCO, LexMAE)
                 D7 \\t http://... \\t Ants \\t Ants are ...      MS MARCO documents (url and title: see FIELD)
    queries      {"_id": "q1", "text": "do ants sleep"}      q1 \\t do ants sleep
    qrels        q1 0 7 1 (TREC, MS MARCO)      q1 \\t 7 (RetroMAE)
                 query-id \\t corpus-id \\t score, then q1 \\t 7 \\t 1 (BEIR)
    negatives    q1 \\t 9,4,12      best first; or a TREC run
    run          q1 Q0 7 1 13.25 tag (TREC)      q1 \\t 7 \\t 1 (MS MARCO: qid, pid, rank)
    candidates   q1 \\t 7 \\t do ants sleep \\t Ants are ... (top1000.dev); or a run
    triples      do ants sleep \\t Ants are ... \\t Bees are ... (texts)      q1 \\t 7 \\t 9 (ids)
    scores       q1 \\t 7 \\t 8.31      clusters   q1 \\t 12      titles   7 \\t Ants
    embeddings   shard-00000.npy (n, D) float16/32, shard-00000.ids.txt, ..., meta.json (written last); sparse ones
                 shard-00000.npz, a CSR matrix (n, V) as scipy.sparse.load_npz reads it; a text of several chunks has
                 as many rows one after the other, with its id in each
    impacts      {"id": "7", "vector": {"ant": 113, "##s": 20}} (Anserini's JsonVectorCollection)
                 q1 \\t ant ant ant ##s (its queries, each token as often as it weighs)

Every text file may be gzipped. Ids are strings. Readers stream, and stop at a bad line with `file:line: what is wrong
— what to do`.
"""

import contextlib
import gzip
import json
import os
import shutil
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from scipy.sparse import csr_matrix, save_npz, vstack

ID_KEYS, TEXT_KEYS = ("_id", "docid", "id", "pid", "qid"), ("text", "contents", "body", "passage", "query")
ROWS_PER_BATCH = 1024  # rows of one Arrow record batch: the unit of a sequential read
SPAN = "\n\x1e\n"  # between the spans of a document that comes cut into spans: a record separator, in no ordinary text
FIELD = "\x1f"  # between url and title of a document, in the place of a title: a unit separator, white space to str
TEXTS_VERSION = 2  # part of the cache key: raise it when what build_texts writes changes


class UserError(Exception):
    """A mistake the user can mend. The message names the place and the remedy; launch.run prints it as one line and
    exits with 1."""


# ---------------------------------------------------------------------------------------------------------------------
# plain files


def lines(path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline) of a plain or gzipped UTF-8 file, streaming; lines of white space
    alone are passed over."""
    path, number = Path(path), 0
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'} — check the path")
    with open(path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.open(raw) if compressed else raw
        try:
            for number, line in enumerate(stream, 1):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line and not line.isspace():
                    yield number, line
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 ({error.reason}) — convert the file, for example with iconv"
            ) from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path}:{number + 1}: truncated or damaged gzip — fetch or write the file again"
            ) from error


@contextlib.contextmanager
def atomic(path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder; it takes the name `path` when the block ends well and is
    removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():  # a folder cannot replace a folder in one step
            aside = path.with_name(f".old-{os.getpid()}-{path.name}")
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_lines(path, rows: Iterable[str]) -> None:
    """One line per row, atomically; gzipped if the name ends in .gz (without a time stamp, so equal content gives
    equal bytes)."""
    with atomic(path) as temporary, open(temporary, "wb") as raw:
        stream = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if str(path).endswith(".gz") else raw
        for row in rows:
            stream.write(f"{row}\n".encode())
        if stream is not raw:
            stream.close()


def write_json(path, content) -> None:
    """Indented JSON, atomically: a reader sees the old file or the new one, never half of it."""
    write_lines(path, [json.dumps(content, indent=1, ensure_ascii=False)])


def read_json(path) -> dict:
    """A JSON object; UserError names the line when it does not parse."""
    text = "\n".join(line for _, line in lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}) — repair or remove the file") from error


def _columns(path, number, line, separator, allowed, what) -> list[str]:
    columns = line.split(separator)
    if len(columns) not in allowed:
        raise UserError(
            f"{path}:{number}: {len(columns)} columns where {what} has {' or '.join(map(str, allowed))} — mend "
            "the line"
        )
    return columns


# ---------------------------------------------------------------------------------------------------------------------
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
            raise UserError(f"{place}: spans must be strings, not ids of some tokenizer — write the texts")
        number = place.rstrip("]").replace("[", ":").rpartition(":")[2]
        return str(record[key] if key else number), record.get("title") or "", SPAN.join(record["spans"])
    if key is None or body is None:
        missing = f"an id ({', '.join(ID_KEYS)})" if key is None else f"a text ({', '.join(TEXT_KEYS)})"
        raise UserError(
            f"{place}: no field for {missing}, only {', '.join(map(str, record)) or 'nothing'} — rename the field"
        )
    identifier, title, text = record[key], record.get("title") or "", record[body]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(f"{place}: the id in {key} is {identifier!r} — it must be a string or an integer")
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f"{place}: title and {body} must be strings — mend the line")
    return str(identifier), title, text


def _tsv_row(path, number, line) -> tuple[str, str, str]:
    columns = _columns(path, number, line, "\t", (2, 3, 4), "a TSV of texts")
    if len(columns) == 4:  # MS MARCO documents: docid, url, title, body
        columns[1:3] = [FIELD.join(columns[1:3])]
    return (columns[0], "", columns[1]) if len(columns) == 2 else (columns[0], columns[1], columns[2])


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
            table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            name, _, config = str(source).partition(":")  # NAME or NAME:CONFIG, as in BeIR/scifact:corpus
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
                raise UserError(f"{place}: {identifier} has no title in {titles} — complete that file or leave it out")
            pid, _, value = line.partition("\t")
            ahead[pid] = value.strip()
        yield place, identifier, ahead.pop(identifier) or title, text


def read_texts(source, titles=None) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of a corpus or of queries in any format of the table above, streaming. `titles`: a `pid \\t
    title` file to join.
    UserError on a malformed line, an empty id, or an entry with neither title nor text."""
    path = Path(source)
    rows = _read_file(path) if path.is_file() and path.suffix != ".parquet" else _read_dataset(source)
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
        (json.dumps({"_id": i, **({"title": t} if t else {}), "text": x}, ensure_ascii=False) for i, t, x in rows),
    )


def cache_root() -> Path:
    """Where memory-mapped copies are kept: $BOTTLENECK_CACHE, else `bottleneck` in the Hugging Face cache
    ($HF_HOME)."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("BOTTLENECK_CACHE") or Path(home) / "bottleneck")


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
        writer.write_batch(pa.record_batch([pa.array(c, pa.string()) for c in (ids, heads, texts)], schema=schema))
        hashes.append(id_hashes(ids))
        keys.append(np.array([text_key(t, x) for t, x in zip(heads, texts, strict=True)], dtype=np.int64))
        digest.update("\0".join(part for row in batch for part in row).encode())
        batch.clear()

    with pa.OSFile(str(folder / "texts.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
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
        names = [(n, row[0]) for n, row in enumerate(read_texts(source, titles)) if n in (first, second)]
        raise UserError(
            f"{source}: entries {names[0][0] + 1} and {names[1][0] + 1} have the same id {names[1][1]} — ids "
            "must be unique"
        )
    np.save(folder / "id_hashes.npy", ordered)
    np.save(folder / "id_rows.npy", order)
    np.save(folder / "text_keys.npy", np.concatenate(keys))
    write_json(folder / "meta.json", {"source": str(source), "count": len(hashes), "fingerprint": digest.hexdigest()})


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
            stamp += [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(path.glob("*"))]
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
        self.source, self.count, self.fingerprint = meta["source"], meta["count"], meta["fingerprint"]
        self.text_keys = np.load(self.folder / "text_keys.npy", mmap_mode="r")  # (N,) int64, see text_key
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


# ---------------------------------------------------------------------------------------------------------------------
# judgments, negatives, runs


def _integer(value, path, number, what) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{path}:{number}: {what} {value!r} is not an integer — mend the line") from None


def _number(value, path, number, what) -> float:
    try:
        result = float(value.strip("[]"))
    except ValueError:
        result = float("nan")
    if result != result:
        raise UserError(f"{path}:{number}: {what} {value!r} is not a number — mend the line")
    return result


def read_qrels(path) -> dict[str, dict[str, int]]:
    """qrels[qid][pid] = relevance, told apart by shape: 4 columns TREC / MS MARCO (qid, 0, pid, relevance), 3 columns
    with BEIR's header,
    2 columns RetroMAE (qid, pid; relevance 1). Anything else stops: 3 columns without header may be a run, a comma in
    column 2 a negatives file."""
    qrels, width = {}, None
    for number, line in lines(path):
        columns = line.split("\t") if "\t" in line else line.split()
        columns = line.split() if len(columns) not in (2, 3, 4) else [c.strip() for c in columns]
        if width is None:
            width = len(columns)
            if width == 6:
                raise UserError(f"{path}:{number}: 6 columns, a run and not judgments — give the qrels file")
            if width == 3:
                if [c.lower() for c in columns[:2]] == ["query-id", "corpus-id"]:
                    continue
                raise UserError(
                    f"{path}:{number}: 3 columns without BEIR's header may be judgments or a run — put "
                    "`query-id\\tcorpus-id\\tscore` first"
                )
            if width not in (2, 4):
                raise UserError(
                    f"{path}:{number}: {width} columns — qrels have 4 (TREC), 3 with a header (BEIR) or 2 (RetroMAE)"
                )
        if len(columns) != width:
            raise UserError(f"{path}:{number}: {len(columns)} columns after lines of {width} — mend the line")
        if width == 2:
            qid, pid, relevance = columns[0], columns[1], 1
            if "," in pid:
                raise UserError(
                    f"{path}:{number}: several passages in column 2, as in a negatives file — qrels have one per line"
                )
        else:
            qid, pid = columns[0], columns[2 if width == 4 else 1]
            grade = columns[-1]
            relevance = (
                int(_number(grade, path, number, "relevance"))
                if "." in grade
                else _integer(grade, path, number, "relevance")
            )
        if qrels.setdefault(qid, {}).setdefault(pid, relevance) != relevance:
            raise UserError(f"{path}:{number}: {qid} {pid} is judged twice with different grades — keep one line")
    if not qrels:
        raise UserError(f"{path}: no judgments in it — is it the right file?")
    return qrels


def line_of(path, *fields) -> str:
    """`file:line` of the first line that holds all `fields` as columns or list items, for an error found after
    reading; else `file`."""
    for number, line in lines(path):
        if set(fields) <= set(line.replace(",", " ").split()):
            return f"{path}:{number}"
    return str(path)


def read_negatives(path) -> Iterator[tuple[str, list[str]]]:
    """(qid, [pid, ...] best first) from `qid \\t pid,pid,...` or a TREC run (in rank order). A qid may come again
    later: extend its list."""
    group, width = (None, []), None
    for number, line in lines(path):
        columns = line.split()
        width = width or len(columns)
        if width == 6:
            columns = _columns(path, number, line, None, (6,), "a TREC run")
            entry = (_integer(columns[3], path, number, "rank"), columns[2])
            if columns[0] == group[0]:
                group[1].append(entry)
                continue
            if group[1]:
                yield group[0], [pid for _, pid in sorted(group[1], key=lambda e: e[0])]
            group = (columns[0], [entry])
        else:
            qid, tab, pids = line.partition("\t")
            if not tab or "\t" in pids:
                raise UserError(
                    f"{path}:{number}: not `qid<TAB>pid,pid,...` — negatives are that or a TREC run of 6 columns"
                )
            pids = [p.strip() for p in pids.split(",")]
            if "" in pids and len(pids) > 1:
                raise UserError(f"{path}:{number}: an empty passage id in the list — mend the line")
            yield qid.strip(), list(dict.fromkeys(p for p in pids if p))
    if group[1]:
        yield group[0], [pid for _, pid in sorted(group[1], key=lambda e: e[0])]


def write_negatives(path, rows: Iterable[tuple[str, list[str]]]) -> None:
    write_lines(path, (f"{qid}\t{','.join(pids)}" for qid, pids in rows))


class RunList(NamedTuple):
    """What a run holds for one query, in the order of the file."""

    pids: list[str]
    scores: np.ndarray  # (n,) float32; -rank where the file states no score
    ranks: np.ndarray  # (n,) int32


def read_run(path) -> dict[str, RunList]:
    """run[qid] from TREC's 6 columns or MS MARCO's 3 (qid, pid, rank). A passage twice for a query stops."""
    gathered, names, width = {}, {}, None
    for number, line in lines(path):
        columns = line.split()
        width = width or len(columns)
        if len(columns) != width or width not in (3, 6):
            raise UserError(
                f"{path}:{number}: {len(columns)} columns — a run has 6 (TREC) or 3 (qid, pid, rank), the same "
                "in every line"
            )
        pid, rank = (columns[1], columns[2]) if width == 3 else (columns[2], columns[3])
        pid = names.setdefault(pid, pid)  # one string for all its lines
        rank = _integer(rank, path, number, "rank")
        score = float(-rank) if width == 3 else _number(columns[4], path, number, "score")
        if columns[0] not in gathered:
            gathered[columns[0]] = {}, array("f"), array("i")
        entry = gathered[columns[0]]
        if pid in entry[0]:
            raise UserError(f"{path}:{number}: {pid} is listed twice for query {columns[0]} — remove the duplicate")
        entry[0][pid] = None
        entry[1].append(score)
        entry[2].append(rank)
    if not gathered:
        raise UserError(f"{path}: an empty run — is it the right file?")
    run = {}
    for qid in list(gathered):
        pids, scores, ranks = gathered.pop(qid)
        run[qid] = RunList(list(pids), np.array(scores, dtype=np.float32), np.array(ranks, dtype=np.int32))
    return run


def write_run(path, rows: Iterable[tuple[str, list[str], Iterable[float]]], tag: str = "bottleneck") -> None:
    """TREC run; ranks from 1 in the order given. Nine digits bring a float32 score back unchanged."""
    write_lines(
        path,
        (
            f"{qid} Q0 {pid} {rank} {score:.9g} {tag}"
            for qid, pids, scores in rows
            for rank, (pid, score) in enumerate(zip(pids, scores, strict=True), 1)
        ),
    )


def read_candidates(path) -> dict[str, list[str]]:
    """candidates[qid] = [pid, ...] from top1000.dev (qid, pid, query, passage) or a run."""
    _, first = next(lines(path), (0, ""))
    if len(first.split("\t")) != 4:
        return {qid: entry.pids for qid, entry in read_run(path).items()}
    candidates = {}
    for number, line in lines(path):
        columns = _columns(path, number, line, "\t", (4,), "a file like top1000.dev")
        candidates.setdefault(columns[0], {})[columns[1]] = None
    return {qid: list(pids) for qid, pids in candidates.items()}


def write_qrels(path, qrels: dict[str, dict[str, int]]) -> None:
    write_lines(path, (f"{qid} 0 {pid} {grade}" for qid, judged in qrels.items() for pid, grade in judged.items()))


def read_scores(path) -> Iterator[tuple[str, str, float]]:
    """(qid, pid, teacher score); white space between, the score bare or in [ ] as RetroMAE's cross-encoder writes
    it."""
    for number, line in lines(path):
        qid, pid, score = _columns(path, number, line, None, (3,), "a file of teacher scores")
        yield qid, pid, _number(score, path, number, "score")


def write_scores(path, rows: Iterable[tuple[str, str, float]]) -> None:
    write_lines(path, (f"{qid}\t{pid}\t{score:.9g}" for qid, pid, score in rows))


def read_clusters(path) -> Iterator[tuple[str, int]]:
    for number, line in lines(path):
        qid, cluster = _columns(path, number, line, None, (2,), "a file of clusters")
        yield qid, _integer(cluster, path, number, "cluster")


def read_triples(path) -> Iterator[tuple[str, str, str]]:
    """(query, positive passage, negative passage) as texts: triples.train.small.tsv."""
    for number, line in lines(path):
        query, positive, negative = _columns(path, number, line, "\t", (3,), "a file of text triples")
        yield query, positive, negative


def read_id_triples(path) -> Iterator[tuple[str, str, str]]:
    """(qid, positive pid, negative pid): qidpidtriples.train.*"""
    for number, line in lines(path):
        qid, positive, negative = _columns(path, number, line, None, (3,), "a file of id triples")
        yield qid, positive, negative


# ---------------------------------------------------------------------------------------------------------------------
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
            raise UserError(f"{folder}: a damaged shard ({error}) — remove the folder and encode again") from error
        self.starts = np.cumsum([0, *(n for n, _ in shapes)])  # first vector of each shard, and the end
        self.num_vectors, self.max_chunks = int(self.starts[-1]), self.meta.get("max_chunks", 1)
        self._ids, self._index = {}, None
        self.text_starts, self.first, self.text_of = self.starts, None, None  # text_starts: first text of each shard
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
        return _read_sparse(self.paths[shard]) if self.sparse else np.load(self.paths[shard], mmap_mode="r")

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
        return [str(self._shard_ids(s)[r - self.text_starts[s]]) for r, s in zip(rows, shards, strict=True)]

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """(len(ids),) int64 rows, -1 for an unknown id."""
        if self._index is None:
            hashes = np.concatenate([id_hashes(self._shard_ids(s).tolist()) for s in range(len(self.paths))])
            order = np.argsort(hashes, kind="stable")
            self._index = hashes[order], order
        return find_rows(ids, *self._index)

    def blocks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, np.ndarray | csr_matrix]]:
        """(place of the first, (n, D) view of at most `size`) over the vectors [start, stop); a shard is held only
        while its blocks are read."""
        for shard in range(len(self.paths)):
            low, high = max(start, self.starts[shard]), min(stop, self.starts[shard + 1])
            if low < high:
                array = self._read(shard)
                for row in range(low, high, size):
                    yield int(row), array[row - self.starts[shard] : min(row + size, high) - self.starts[shard]]

    def take(self, rows) -> np.ndarray | csr_matrix:
        """(len(rows), D) float32: the vectors of these places, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        if self.sparse:
            order = np.argsort(rows, kind="stable")
            parts = [self._read(s)[rows[order[shards[order] == s]] - self.starts[s]] for s in np.unique(shards)]
            return vstack([*parts, csr_matrix((0, self.dim), dtype=np.float32)], "csr")[np.argsort(order)]
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._read(shard)[rows[here] - self.starts[shard]]
        return out
