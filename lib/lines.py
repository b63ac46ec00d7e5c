"""How files of others are read: lines, columns and JSON, from plain text, gzip or Parquet. Readers
stream, and stop at a bad line with `file:line: what is wrong — what to do`."""

import contextlib
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

NO_TEXT = {  # how files begin that are no text
    rb"BZh[1-9](1AY&SY|\x17rE8P)": "a bzip2 file — unpack it with bunzip2",
    rb"\xfd7zXZ": "an xz file — unpack it with unxz",
    rb"\x28\xb5\x2f\xfd": "a zstd file — unpack it with unzstd",
    rb"PK\x03\x04": "a zip archive — unpack it with unzip",
    rb".{257}ustar": "a tar archive — unpack it with tar -xf",
    rb"PAR1|\x1f\x8b": "Parquet or gzip inside gzip — unpack it with gunzip",
    rb"\xff\xfe|\xfe\xff": "UTF-16 — convert it with iconv -f UTF-16 -t UTF-8",
}
# A line is a header if its first column is the name of an id, or if all are made of these words.
ID_NAME = re.compile(
    r"_?id|[dpq]id|number|docno|(corpus|docs?|document|passage|query|question|topic)[-_ ]?(id|no)?"
)
NAMES = frozenset(
    "id pid qid docid url title text body passage contents content segment query question answer "
    "document doc corpus score grade rel relevance label rank iter iteration run tag".split()
)
NO_ID = re.compile(r"[\s\0\ufeff]")  # NUL ends a string of numpy, a byte order mark is read away
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
csv.field_size_limit(2**27)  # characters of a quoted field; a quote that is not closed ends there


class UserError(Exception):
    """A mistake that the user can correct. The message names the place and the remedy; launch.run
    prints it as one line and exits with status 1."""


def lines(path, whole: bool = False) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline) of a plain or gzipped UTF-8 file, without
    blank lines. A row of a Parquet file is a line of JSON. UserError: the file is absent, cannot be
    read, is damaged, or is no text.

    whole: blank lines and newlines are kept"""
    if not os.path.isfile(path):  # a pipe could not be read twice
        what = "no regular file" if os.path.exists(path) else "no such file"
        raise UserError(f"{path}: {what} — check the path")
    number, line = 0, b""
    try:
        with open(path, "rb") as raw:
            start = raw.peek(4)
            if start.startswith(b"PAR1"):
                rows = pq.ParquetFile(path).iter_batches(1024)
                for number, row in enumerate(chain.from_iterable(b.to_pylist() for b in rows), 1):
                    yield number, json.dumps(row, ensure_ascii=False, default=lambda x: [repr(x)])
                return
            stream = gzip.open(raw) if start.startswith(b"\x1f\x8b") else raw
            start = stream.peek(512)
            for pattern, what in NO_TEXT.items():
                if re.match(pattern, start, re.DOTALL):
                    raise UserError(f"{path}: this is {what}")
            for number, line in enumerate(stream, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if whole or (text and not text.isspace()):
                    yield number, text if whole else text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        binary = "not text — give a text file or Parquet"
        wrong = binary if b"\0" in line else "not UTF-8 — convert the file with iconv"
        raise UserError(f"{path}:{number}: {wrong}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        wrong = f"{path}:{number + 1}: truncated or damaged gzip"
        raise UserError(f"{wrong} — download or write the file again") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        wrong = f"{path}:{number + 1}: cannot be read ({brief(error)})"
        raise UserError(f"{wrong} — check the file and its permissions") from error


def brief(error: Exception) -> str:
    """The message of a library's error as a part of one line, with the file of a system's error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split())[:300]


@contextlib.contextmanager
def one_line(wrong: str, remedy: str, kinds=Exception) -> Iterator[None]:
    """A UserError for errors of these kinds. Libraries raise errors of all kinds."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        # others, such as a KeyError, say little without their kind
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{wrong} ({kind}{brief(error)}) — {remedy}") from error


def first_line(path) -> str:
    """The first line of a file that is not blank, or an empty string."""
    return next(lines(path), (0, ""))[1]


def is_json(line: str) -> bool:
    """Whether JSON begins here. (An id may begin with a bracket, too.)"""
    return re.match(r'\s*(\{\s*["}]|\{$|\[\s*\{|\[$)', line) is not None


def header(columns: list[str]) -> list[str]:
    """The names of columns in lower case, if they are a header; else an empty list."""
    names = [column.strip(' "').lower() for column in columns]
    words = [re.findall(r"[^\W_]+", name) for name in names]
    named = all(some and NAMES.issuperset(some) for some in words)
    return names if named or ID_NAME.fullmatch(names[0]) else []


def entries(
    path, widths: tuple, expected: str, fields: tuple = (), separator=None
) -> Iterator[tuple[str, dict | list[str]]]:
    """(`file:line`, entry) of a text file or of Parquet. An entry is an object of JSON, or a list
    of columns, split at the separator or at white space.

    fields: the order of the columns where the file has a header, each with the names that it may
    have; "" says that it may be absent. Fields may be quoted if the header is, or is DPR's.
    UserError with the text `expected`: a line has another number of columns than `widths`, or than
    the first; a header without the fields"""
    number, first = next(lines(path), (0, ""))
    if is_json(first):
        for number, record in json_lines(path):
            yield f"{path}:{number}", record
        return
    names = header(first.split(separator))
    order = [next((k for k in keys if not k or k in names), None) for keys in fields]
    if names and (None in order or not order):
        raise UserError(f"{path}:{number}: a header with other columns — {expected}; remove it")
    order = [names.index(key) for key in order if key and names]
    rows = ((number, line.split(separator)) for number, line in lines(path))
    if names[:2] == ["id", "text"] or (names and first.startswith('"')):
        rows = _quoted_rows(path)
    width = len(names)
    head = next(rows)[1] if names else None
    for number, columns in rows:
        if columns == head:
            raise UserError(f"{path}:{number}: the header once more — remove the line")
        if width == 0 and len(columns) in widths:
            width = len(columns)
        if len(columns) != width:
            after = f" after lines of {width}" if width else ""
            raise UserError(f"{path}:{number}: {len(columns)} columns{after} — {expected}")
        yield f"{path}:{number}", [columns[at] for at in order] if names else columns


def _quoted_rows(path) -> Iterator[tuple[int, list[str]]]:
    """(first line, columns) of a TSV whose fields are quoted where they hold a tab, a quote or a
    newline."""
    rows = csv.reader((line for _, line in lines(path, whole=True)), delimiter="\t", strict=True)
    number = 1
    try:
        for columns in rows:
            if columns:
                yield number, columns
            number = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number}: a damaged quoted field ({error}) — fix it") from error


def json_lines(path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of JSONL. Half a surrogate pair is no character: it becomes U+FFFD,
    and the number of such halves is printed."""
    replaced = 0
    for number, line in lines(path):
        record = parse_json(line, path, number, dict)
        if "\\ud" in line or "\\uD" in line:
            whole, count = LONE_SURROGATE.subn("\ufffd", json.dumps(record, ensure_ascii=False))
            record = json.loads(whole)
            replaced += count
        yield number, record
    if replaced:
        print(f"note: {path}: {replaced} lone surrogates are replaced by U+FFFD", flush=True)


def parse_json(text: str, path, number: int = 1, kind: type = object):
    """The value of a JSON text that begins on line `number` of a file. UserError: it is not JSON,
    or not of that type."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits
        place = f"{path}:{number + getattr(error, 'lineno', 1) - 1}"
        reason = brief(getattr(error, "msg", error))
        raise UserError(f"{place}: not JSON ({reason}) — correct the file") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}:{number}: not a JSON object — write one on each line")
    return value


def value_of(keys: tuple[str, ...], record: dict, place: str):
    """What a record has under the first of these names. UserError: it has none of them."""
    for key in keys:
        if key in record:
            return record[key]
    raise UserError(f"{place}: no field has one of the names {', '.join(keys)} — rename a field")


def id_of(value, place: str) -> str:
    """An id, which may also be written as a whole number. UserError: it is something else, empty,
    or has white space, which runs cannot hold."""
    text = str(value) if type(value) in (str, int) else ""
    if not text or NO_ID.search(text):
        wrong = "is empty, has white space or is neither string nor whole number"
        raise UserError(f"{place}: the id {value!r:.40} {wrong} — rename it")
    return text
