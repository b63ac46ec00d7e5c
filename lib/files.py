"""Plain files: everything but texts and embeddings is read and written here. The formats are in
docs/formats.md. Every text file may be gzipped. Ids are strings. Readers stream, and stop at a bad
line with `file:line: what is wrong — what to do`."""

import contextlib
import gzip
import json
import math
import os
import shutil
import zlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np


class UserError(Exception):
    """A mistake that the user can correct. The message names the place and the remedy; launch.run
    prints it as one line and exits with status 1."""


# ---- plain files


def lines(path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline) of a plain or gzipped UTF-8 file, streaming.
    Blank lines are skipped."""
    path, number = Path(path), 0
    if not path.is_file():
        raise UserError(f"{path}: no such file — check the path")
    with open(path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            for number, line in enumerate(gzip.open(raw) if compressed else raw, 1):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line and not line.isspace():
                    yield number, line
        except UnicodeDecodeError as error:
            wrong = f"{path}:{number}: not UTF-8"
            raise UserError(f"{wrong} — convert the file with iconv") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            wrong = f"{path}:{number + 1}: truncated or damaged gzip"
            raise UserError(f"{wrong} — download or write the file again") from error


def first_line(path) -> str:
    """The first line of a file that is not blank, or an empty string."""
    return next(lines(path), (0, ""))[1]


def table(path, widths: tuple, expected: str, separator=None) -> Iterator[tuple[str, list[str]]]:
    """(`file:line`, columns) of each line, split at the separator or at white space. UserError with
    the text `expected`: a line has another number of columns than `widths`, or than the first."""
    width = 0
    for number, line in lines(path):
        columns = line.split(separator)
        if width == 0 and len(columns) in widths:
            width = len(columns)
        if len(columns) != width:
            after = f" after lines of {width}" if width else ""
            raise UserError(f"{path}:{number}: {len(columns)} columns{after} — {expected}")
        yield f"{path}:{number}", columns


@contextlib.contextmanager
def atomic(path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder. It becomes `path` when the block ends
    well, and is removed when the block fails."""
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
    """One line per row, atomically: a reader sees the old file or the new one, never half of it."""
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        stream.writelines(f"{row}\n".encode() for row in rows)


def write_json(path, content) -> None:
    write_lines(path, [json.dumps(content, indent=1, ensure_ascii=False)])


def parse_json(text: str, path, number: int = 1, kind: type = object):
    """The value of a JSON text that begins on line `number` of a file. UserError: it is not JSON,
    or not of that type."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{number + error.lineno - 1}"
        raise UserError(f"{place}: not JSON ({error.msg}) — correct the file") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}:{number}: not a JSON object — correct the line")
    return value


def read_json(path):
    return parse_json("\n".join(line for _, line in lines(path)), path)


def map_array(path: Path, dtype) -> np.ndarray:
    """The numbers of a binary file, memory-mapped. (An empty file cannot be mapped.) UserError: the
    file is missing, or ends within a number."""
    size = path.stat().st_size if path.is_file() else None
    if size is None or size % np.dtype(dtype).itemsize:
        wrong = f"{path}: missing or truncated"
        raise UserError(f"{wrong} — remove its folder; it is then written again")
    return np.memmap(path, dtype, "r") if size else np.frombuffer(b"", dtype)


def line_of(path, *fields) -> str:
    """`file:line` of the first line that holds all `fields` as columns, list items or JSON strings,
    for an error that is found after reading; else `file`."""
    for number, line in lines(path):
        words = {*line.split(), *line.replace(",", " ").split()}
        if all(f in words or json.dumps(f, ensure_ascii=False) in line for f in fields):
            return f"{path}:{number}"
    return str(path)


def _number(text: str, place: str, what: str, whole: bool = False) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and (value.is_integer() or not whole):
            return value
    kind = "whole" if whole else "finite"
    raise UserError(f"{place}: {what} {text!r} is not a {kind} number — correct the line")


# ---- judgments


def read_qrels(path) -> dict[str, dict[str, int]]:
    """qrels[qid][pid] = grade, from 4 columns (qid, 0, pid, grade), 3 (BEIR, after its header) or
    2 (qid, pid; the grade is 1). UserError: other columns, two grades of a pair, ..."""
    qrels = {}
    header = first_line(path).lower().split()[:2] == ["query-id", "corpus-id"]
    expected = "judgments have 4 (TREC), 2 (RetroMAE), or 3 after BEIR's header"
    rows = table(path, (3,) if header else (2, 4), f"{expected} query-id, corpus-id, score")
    for place, columns in islice(rows, int(header), None):
        qid, pid = columns[0], columns[2 if len(columns) == 4 else 1]
        if len(columns) == 2 and "," in pid:
            raise UserError(f"{place}: several passages — qrels have one per line, lists do not")
        grade = int(_number(columns[-1], place, "the grade", whole=True)) if len(columns) > 2 else 1
        if qrels.setdefault(qid, {}).setdefault(pid, grade) != grade:
            raise UserError(f"{place}: {qid} {pid} is judged twice, differently — keep one line")
    if not qrels:
        raise UserError(f"{path}: the file has no judgments — check the path")
    return qrels


def read_positives(path) -> dict[str, list[str]]:
    """{qid: its passages with a grade above 0}, without the queries that have none. UserError: see
    read_qrels."""
    qrels = read_qrels(path)
    found = {qid: [p for p, grade in judged.items() if grade > 0] for qid, judged in qrels.items()}
    return {qid: pids for qid, pids in found.items() if pids}


def write_qrels(path, qrels: dict[str, dict[str, int]]) -> None:
    rows = ((qid, pid, grade) for qid, judged in qrels.items() for pid, grade in judged.items())
    write_lines(path, (f"{qid} 0 {pid} {grade}" for qid, pid, grade in rows))


# ---- the training file


class TrainingRow(NamedTuple):
    """One query with everything that training on it needs; negatives come best first."""

    qid: str
    pos: list[str]
    neg: list[str] = []
    pos_scores: list[float] | None = None  # of a teacher, one for each of pos
    neg_scores: list[float] | None = None
    cluster: int | None = None


def foreign_format(line: str) -> str | None:
    """Format of a file of somebody else's training data by its first line, named as in
    recipes/import_training_data.py; None for a training file of ours, qrels and what is unknown."""
    if line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if isinstance(record.get("neg"), dict):
            return "hard-negatives"
        if "pos" in record:
            return None if "qid" in record else "flagembedding"
        if "positive_passages" in record or "positive_document_ids" in record:
            return "tevatron"
        first = next(iter(record), None)
        known = first in ("anchor", "query", "question") or {"positive", "positive_id"} & {*record}
        return "sentence-transformers" if known and len(record) > 1 else None
    columns = line.split("\t") if "\t" in line else line.split()
    blanks = [" " in column.strip() for column in columns]
    if any(blanks):
        return "text-triples" if len(columns) == 3 and blanks[0] else None
    if len(columns) == 3 and columns[2].lower() not in ("score", "0", "1", "2", "3", "4"):
        return "ance" if "," in columns[2] else "id-triples"  # qrels and runs end in 0 to 4
    return "negative-lists" if len(columns) == 2 and "," in columns[1] else None


def read_training_file(path) -> Iterator[tuple[int, TrainingRow]]:
    """(line number, row) of a `train.jsonl`. UserError: a line of another form; another project's
    training data is answered with the command that imports it."""
    seen = set()
    for number, line in lines(path):
        place = f"{path}:{number}"
        if not seen and (whose := foreign_format(line)):
            command = f"python -m recipes.import_training_data --input {path} --output_dir OUT"
            raise UserError(f"{place}: this is {whose} data — convert it: {command}")
        record = parse_json(line, path, number, dict)
        row = TrainingRow(**{name: record.get(name) for name in TrainingRow._fields})
        row = row._replace(neg=row.neg or [])
        cluster = row.cluster is None or (type(row.cluster) is int and row.cluster >= 0)
        lists = _is_list(row.pos, row.pos_scores) and _is_list(row.neg, row.neg_scores)
        if not (isinstance(row.qid, str) and row.pos and lists and cluster):
            wrong = "ids must be strings, pos not empty, one finite score per id, cluster from 0"
            raise UserError(f"{place}: {wrong} — correct the line")
        if row.qid in seen:
            raise UserError(f"{place}: query {row.qid} has a line already — join the two lines")
        seen.add(row.qid)
        yield number, row


def _is_list(ids, scores) -> bool:
    """Whether ids is a list of strings, and scores None or a finite number for each."""
    if not isinstance(ids, list) or not set(map(type, ids)) <= {str}:
        return False
    if scores is None:
        return True
    numbers = isinstance(scores, list) and set(map(type, scores)) <= {int, float}
    return numbers and len(scores) == len(ids) and all(map(math.isfinite, scores))


def write_training_file(path, rows: Iterable[TrainingRow]) -> None:
    """One line per row, atomically; what a row does not have is left out."""
    present = ({k: v for k, v in row._asdict().items() if v not in (None, [])} for row in rows)
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in present))


# ---- runs


class RunList(NamedTuple):
    """What a run holds for one query, in the order of the file."""

    pids: list[str]
    scores: np.ndarray  # (n,) float32; -1, -2, ... where the file states no score


def read_run(path) -> dict[str, RunList]:
    """run[qid] from any file that lists passages for queries; its first line decides which it is.

    A run of TREC, or of MS MARCO (qid, pid, rank), of which the score is -rank. Mined lists
    (qid TAB pid,pid,...) or top1000.dev (qid TAB pid TAB query TAB passage), best first: the scores
    are -1, -2, ..., and repeated ids count once. A training file: the negatives, then the
    positives, with their scores where all of them have one.

    An empty file is a run that found nothing. UserError: another shape, a passage that a run lists
    twice for a query."""
    columns = first_line(path).split("\t")
    judgments = len(columns) == 4 and columns[1] in ("0", "Q0") and columns[3].isdigit()
    expected = "a run has 6 (TREC) or 3 (MS MARCO); with tabs, lists have 2 and top1000.dev has 4"
    if columns[0].startswith("{"):
        run = _run_of_training_file(path)
    elif len(columns) in (2, 4) and not judgments:
        run = _run_of_lists(table(path, (2, 4), expected, "\t"))
    else:
        run = _run_of_columns(table(path, (3, 6), expected))
    return run


MAX_RANK = 1 << 24  # float32 does not tell greater whole numbers apart


def _run_of_columns(rows) -> dict[str, RunList]:
    run, names = {}, {}
    for place, columns in rows:
        pid = columns[1] if len(columns) == 3 else columns[2]
        pid = names.setdefault(pid, pid)  # one string for all its lines
        if len(columns) == 3:
            score = -_number(columns[2], place, "the rank", whole=True)
            if abs(score) > MAX_RANK:
                wrong = f"the rank {columns[2]} is above {MAX_RANK}"
                raise UserError(f"{place}: {wrong} — number the passages of a query from 1")
        else:
            score = _number(columns[4], place, "the score")
        pids, scores = run.setdefault(columns[0], ({}, array("f")))
        if pid in pids:
            pair = f"passage {pid} is listed twice for query {columns[0]}"
            raise UserError(f"{place}: {pair} — remove one line")
        pids[pid] = None
        scores.append(score)
    for qid, (pids, scores) in run.items():
        run[qid] = _run_list(pids, scores)
    return run


def _run_of_lists(rows) -> dict[str, RunList]:
    run = {}
    for place, columns in rows:
        listed = columns[1].split(",") if len(columns) == 2 else columns[1:2]
        pids = [pid.strip() for pid in listed]
        if "" in pids and len(pids) > 1:
            raise UserError(f"{place}: a passage id in the list is empty — correct the line")
        run.setdefault(columns[0].strip(), {}).update(dict.fromkeys(filter(None, pids)))
    return {qid: _run_list(pids) for qid, pids in run.items()}


def _run_of_training_file(path) -> dict[str, RunList]:
    run = {}
    for _, row in read_training_file(path):
        scored = row.neg_scores is not None and row.pos_scores is not None
        scores = [*row.neg_scores, *row.pos_scores] if scored else None
        run[row.qid] = _run_list([*row.neg, *row.pos], scores)
    return run


def _run_list(pids: Iterable[str], scores: Iterable[float] | None = None) -> RunList:
    pids = list(pids)
    scores = -np.arange(1, len(pids) + 1) if scores is None else scores
    return RunList(pids, np.array(scores, dtype=np.float32))


def write_run(path, rows: Iterable[tuple[str, list[str], Iterable[float]]]) -> None:
    """TREC run; ranks from 1 in the order given. Nine digits bring a float32 score back
    unchanged."""
    ranked = (
        f"{qid} Q0 {pid} {rank} {score:.9g} isthmus"
        for qid, pids, scores in rows
        for rank, (pid, score) in enumerate(zip(pids, scores, strict=True), 1)
    )
    write_lines(path, ranked)
