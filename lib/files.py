"""Plain files: reading and writing of everything but texts and embeddings. Formats:
docs/formats.md.

    qrels          q1 0 7 1 (TREC, MS MARCO) · query-id corpus-id score, then q1 7 1 (BEIR) · q1 7
                   (RetroMAE)
    run            q1 Q0 7 1 13.25 tag (TREC) · q1 7 1 (MS MARCO: qid, pid, rank)
    candidates     q1 \\t 7 \\t query \\t passage (top1000.dev) · q1 \\t 9,4,12 (lists, best first)
                   · a run
    training file  {"qid": "q1", "pos": ["7"], "neg": ["9", "4"], "neg_scores": [8.3, 2.0],
                   "cluster": 3}

Every text file may be gzipped. Ids are strings. Readers stream, and stop at a bad line with
`file:line: what is wrong — what to do`."""

import contextlib
import gzip
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class UserError(Exception):
    """A mistake that the user can correct. The message names the place and the remedy; launch.run
    prints it as one line and exits with status 1."""


# ------------------------------------------------------------------------------------------------
# plain files


def lines(path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline) of a plain or gzipped UTF-8 file, streaming.
    Blank lines are skipped."""
    path, number = Path(path), 0
    if not path.is_file():
        found = "this is a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found} — check the path")
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
                f"{path}:{number}: not UTF-8 ({error.reason}) — convert the file, for example with "
                "iconv"
            ) from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path}:{number + 1}: truncated or damaged gzip — download or write the file again"
            ) from error


def first_line(path) -> str:
    """The first line of a file that is not blank, or an empty string."""
    return next(lines(path), (0, ""))[1]


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
    """One line per row, atomically. A name that ends in .gz is gzipped, without a time stamp, so
    that equal content gives equal bytes."""
    with atomic(path) as temporary, open(temporary, "wb") as raw:
        zipped = str(path).endswith(".gz")
        stream = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if zipped else raw
        for row in rows:
            stream.write(f"{row}\n".encode())
        if zipped:
            stream.close()


def write_json(path, content) -> None:
    """Indented JSON, atomically: a reader sees the old file or the new one, never half of it."""
    write_lines(path, [json.dumps(content, indent=1, ensure_ascii=False)])


def read_json(path) -> dict:
    """The content of a JSON file. UserError names the line that does not parse."""
    text = "\n".join(line for _, line in lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}) — correct or remove the file"
        ) from error


def json_object(path, number: int, line: str) -> dict:
    """The object on one line of a JSONL file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg}) — correct the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: not a JSON object — correct the line")
    return record


def map_array(path: Path, dtype) -> np.ndarray:
    """The numbers of a binary file, memory-mapped. (An empty file cannot be mapped.)"""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.frombuffer(b"", dtype)


def line_of(path, *fields) -> str:
    """`file:line` of the first line that holds all `fields` as columns, list items or JSON strings,
    for an error that is found after reading; else `file`."""
    for number, line in lines(path):
        if line.lstrip().startswith("{"):
            if all(json.dumps(field, ensure_ascii=False) in line for field in fields):
                return f"{path}:{number}"
        elif set(fields) <= {*line.split(), *line.replace(",", " ").split()}:
            return f"{path}:{number}"
    return str(path)


def _number(value: str, place: str, what: str) -> float:
    try:
        result = float(value)
    except ValueError:
        result = float("nan")
    if not np.isfinite(result):
        raise UserError(f"{place}: {what} {value!r} is not a finite number — correct the line")
    return result


def _integer(value: str, place: str, what: str) -> int:
    result = _number(value, place, what)
    if result != int(result) or abs(result) >= 1 << 31:
        raise UserError(f"{place}: {what} {value!r} is not an integer — correct the line")
    return int(result)


# ------------------------------------------------------------------------------------------------
# judgments


def read_qrels(path) -> dict[str, dict[str, int]]:
    """qrels[qid][pid] = grade. Formats are told apart by shape: 4 columns are TREC's and MS MARCO's
    (qid, 0, pid, grade), 3 columns with BEIR's header, 2 columns RetroMAE's (qid, pid; grade 1).

    UserError: anything else; 3 columns without a header may be a run. A grade that is no whole
    number."""
    qrels, width = {}, None
    for number, line in lines(path):
        place = f"{path}:{number}"
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) not in (2, 3, 4):
            columns = line.split()
        if width is None:
            width = len(columns)
            if _is_header(place, columns):
                continue
        if len(columns) != width:
            raise UserError(
                f"{place}: {len(columns)} columns after lines of {width} — correct the line"
            )
        pid = columns[2 if width == 4 else 1]
        if width == 2 and "," in pid:
            raise UserError(
                f"{place}: several passages in column 2, as in lists of negatives — qrels have one "
                "per line"
            )
        grade = 1 if width == 2 else _integer(columns[-1], place, "the grade")
        if qrels.setdefault(columns[0], {}).setdefault(pid, grade) != grade:
            raise UserError(
                f"{place}: {columns[0]} {pid} is judged twice with different grades — keep one line"
            )
    if not qrels:
        raise UserError(f"{path}: the file has no judgments — check the path")
    return qrels


def _is_header(place: str, columns: list[str]) -> bool:
    """Whether the first line of judgments is BEIR's header; UserError if it is of no known
    shape."""
    if len(columns) == 6:
        raise UserError(f"{place}: 6 columns are a run, not judgments — give the qrels file")
    if len(columns) == 3:
        if [column.lower() for column in columns[:2]] == ["query-id", "corpus-id"]:
            return True
        raise UserError(
            f"{place}: 3 columns without BEIR's header may be judgments or a run — put "
            "`query-id\\tcorpus-id\\tscore` on the first line"
        )
    if len(columns) not in (2, 4):
        raise UserError(
            f"{place}: {len(columns)} columns — qrels have 4 (TREC), 3 with a header (BEIR) or 2 "
            "(RetroMAE)"
        )
    return False


def read_positives(path) -> dict[str, list[str]]:
    """{qid: its passages with a grade above 0}, without the queries that have none. UserError: see
    read_qrels."""
    qrels = read_qrels(path)
    found = {qid: [p for p, grade in judged.items() if grade > 0] for qid, judged in qrels.items()}
    return {qid: pids for qid, pids in found.items() if pids}


def write_qrels(path, qrels: dict[str, dict[str, int]]) -> None:
    rows = ((qid, pid, grade) for qid, judged in qrels.items() for pid, grade in judged.items())
    write_lines(path, (f"{qid} 0 {pid} {grade}" for qid, pid, grade in rows))


# ------------------------------------------------------------------------------------------------
# the training file


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
        first = next(iter(record), None)
        if isinstance(record.get("neg"), dict):
            return "hard-negatives"
        if "pos" in record:
            return None if "qid" in record else "flagembedding"
        if "positive_passages" in record or "positive_document_ids" in record:
            return "tevatron"
        is_anchor = first in ("anchor", "query", "question")
        is_tuple = len(record) > 1 and (
            is_anchor or "positive" in record or "positive_id" in record
        )
        return "sentence-transformers" if is_tuple else None
    columns = line.split("\t") if "\t" in line else line.split()
    if len(columns) == 3 and " " in columns[0].strip():
        return "text-triples"
    if any(" " in column.strip() for column in columns):
        return None
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
            raise UserError(
                f"{place}: this is {whose} data — convert it: python -m "
                "recipes.import_training_data "
                f"--input {path} --output_dir OUT"
            )
        record = json_object(path, number, line)
        row = _training_row(record, place)
        if row.qid in seen:
            raise UserError(f"{place}: query {row.qid} has a line already — join the two lines")
        seen.add(row.qid)
        yield number, row


def _training_row(record: dict, place: str) -> TrainingRow:
    fields = {name: record[name] for name in TrainingRow._fields if record.get(name) is not None}
    if not isinstance(fields.get("qid"), str) or not fields.get("pos"):
        raise UserError(
            f'{place}: a line of a training file has a string "qid" and a list "pos" of passage '
            "ids that is not "
            "empty — correct the line"
        )
    row = TrainingRow(**fields)
    for name in ("pos", "neg"):
        ids = getattr(row, name)
        if not isinstance(ids, list) or not all(isinstance(pid, str) for pid in ids):
            raise UserError(
                f'{place}: "{name}" must be a list of ids, as strings — correct the line'
            )
        scores = getattr(row, f"{name}_scores")
        if scores is None:
            continue
        numbers = isinstance(scores, list) and all(isinstance(s, int | float) for s in scores)
        if not numbers or len(scores) != len(ids) or not np.isfinite(scores).all():
            raise UserError(
                f'{place}: "{name}_scores" must have one finite number for each of "{name}" — '
                "score the file again"
            )
    if row.cluster is not None and (type(row.cluster) is not int or row.cluster < 0):
        raise UserError(f'{place}: "cluster" must be an integer of at least 0 — correct the line')
    return row


def write_training_file(path, rows: Iterable[TrainingRow]) -> None:
    """One line per row, atomically; what a row does not have is left out."""
    present = ({k: v for k, v in row._asdict().items() if v not in (None, [])} for row in rows)
    write_lines(path, (json.dumps(record, ensure_ascii=False) for record in present))


# ------------------------------------------------------------------------------------------------
# runs


class RunList(NamedTuple):
    """What a run holds for one query, in the order of the file."""

    pids: list[str]
    scores: np.ndarray  # (n,) float32; -1, -2, ... where the file states no score


def read_run(path) -> dict[str, RunList]:
    """run[qid] from any file that lists passages for queries. The first line tells the shape:

        q1 Q0 7 1 13.25 tag             TREC run
        q1 7 1                          MS MARCO run: qid, pid, rank; the score is -rank
        q1 TAB 7 TAB what? TAB Ants     top1000.dev; the scores are -1, -2, ... as the lines come
        q1 TAB 9,4,12                   mined lists, best first; the same; repeated ids count once
        {"qid": "q1", "neg": ["9"]}     training file: the negatives, best first, then the
                                        positives, with their scores where all of them have one

    UserError: another shape, a line of another shape than the first, a passage that a run lists
    twice for a query, an empty file."""
    first = first_line(path)
    columns = first.split("\t")
    judgments = len(columns) == 4 and columns[1] in ("0", "Q0") and columns[3].isdigit()
    if first.startswith("{"):
        run = _run_of_training_file(path)
    elif len(columns) in (2, 4) and not judgments:
        run = _run_of_lists(path, len(columns))
    else:
        run = _run_of_columns(path)
    if not run:
        raise UserError(f"{path}: the run is empty — check the path")
    return run


def _run_of_columns(path) -> dict[str, RunList]:
    gathered, names, width = {}, {}, None
    for number, line in lines(path):
        place = f"{path}:{number}"
        columns = line.split()
        width = width or len(columns)
        if len(columns) != width or width not in (3, 6):
            raise UserError(
                f"{place}: {len(columns)} columns — a run has 6 (TREC) or 3 (qid, pid, rank) in "
                "every line; mined lists and top1000.dev have tabs between their columns"
            )
        pid = columns[1] if width == 3 else columns[2]
        pid = names.setdefault(pid, pid)  # one string for all its lines
        if width == 3:
            score = float(-_integer(columns[2], place, "the rank"))
        else:
            score = _number(columns[4], place, "the score")
        pids, scores = gathered.setdefault(columns[0], ({}, array("f")))
        if pid in pids:
            raise UserError(
                f"{place}: passage {pid} is listed twice for query {columns[0]} — remove one line"
            )
        pids[pid] = None
        scores.append(score)
    run = {}
    for qid in list(gathered):
        pids, scores = gathered.pop(qid)
        run[qid] = RunList(list(pids), np.array(scores, dtype=np.float32))
    return run


def _run_of_lists(path, width: int) -> dict[str, RunList]:
    gathered = {}
    for number, line in lines(path):
        columns = line.split("\t")
        if len(columns) != width:
            raise UserError(
                f"{path}:{number}: {len(columns)} columns after lines of {width} — correct the line"
            )
        listed = columns[1].split(",") if width == 2 else columns[1:2]
        pids = [pid.strip() for pid in listed]
        if "" in pids and len(pids) > 1:
            raise UserError(
                f"{path}:{number}: a passage id in the list is empty — correct the line"
            )
        gathered.setdefault(columns[0].strip(), {}).update(dict.fromkeys(filter(None, pids)))
    return {qid: RunList(list(pids), _falling(len(pids))) for qid, pids in gathered.items()}


def _run_of_training_file(path) -> dict[str, RunList]:
    run = {}
    for _, row in read_training_file(path):
        scores = _falling(len(row.neg) + len(row.pos))
        if row.neg_scores is not None and row.pos_scores is not None:
            scores = np.array([*row.neg_scores, *row.pos_scores], dtype=np.float32)
        run[row.qid] = RunList([*row.neg, *row.pos], scores)
    return run


def _falling(n: int) -> np.ndarray:
    """(n,) float32 scores -1, -2, ... of a list that states none."""
    return -np.arange(1, n + 1, dtype=np.float32)


def write_run(
    path, rows: Iterable[tuple[str, list[str], Iterable[float]]], tag: str = "isthmus"
) -> None:
    """TREC run; ranks from 1 in the order given. Nine digits bring a float32 score back
    unchanged."""
    write_lines(
        path,
        (
            f"{qid} Q0 {pid} {rank} {score:.9g} {tag}"
            for qid, pids, scores in rows
            for rank, (pid, score) in enumerate(zip(pids, scores, strict=True), 1)
        ),
    )
