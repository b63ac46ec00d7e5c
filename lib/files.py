"""Plain files: everything but texts and embeddings is read and written here, in the formats of
docs/formats.md. Readers stop at a bad line with a UserError."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import xxhash

from lib.lines import (
    UserError,
    entries,
    first_line,
    header,
    id_of,
    is_json,
    json_lines,
    lines,
    one_line,
    parse_json,
    value_of,
)

MAX_RANK = 1 << 24  # float32 does not tell greater whole numbers apart
MAX_SCORE = float(np.finfo(np.float32).max)
MAX_GRADE = 2**15  # trec_eval takes memory for every grade up to the highest
QRELS_FIELDS = (
    ("query-id", "query_id", "qid"),
    ("corpus-id", "corpus_id", "docid", "doc_id", "pid"),
    ("score", "relevance", "rel", "grade", "label"),
)

# ---- plain files


@contextlib.contextmanager
def atomic(path) -> Iterator[Path]:
    """A temporary name for a file or folder, which becomes `path` when the block ends well, and is
    removed when it fails."""
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
        _remove(temporary)


def make_once(path, make: Callable[[Path], None]) -> None:
    """Make a file or folder by make(temporary name), unless it exists. One process does it; others
    wait, and remove what it has left if it was killed. UserError: it cannot be written."""
    path = Path(path)
    remedy = "change that, or choose another folder (for the cache: ISTHMUS_CACHE)"
    with one_line(f"{path}: cannot be written", remedy, OSError):
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(path.with_name(f".lock-{path.name}"), wait=True)
        try:
            for leftover in path.parent.glob(".tmp-*"):
                if leftover.name.split("-", 2)[2:] == [path.name]:
                    _remove(leftover)
            if not path.exists():
                with atomic(path) as temporary:
                    make(temporary)
        finally:
            unlock(held)


def lock(path: Path, wait: bool) -> TextIO:
    """The lock file, locked: give it to `unlock`. The lock ends with its process, and forks do not
    inherit it. UserError: another process holds it, and `wait` is false."""
    while True:
        file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = f"{path.parent}: {file.read()} is writing to it"
            raise UserError(f"{holder} — wait for its end, or stop it") from error
        except OSError as error:
            wrong = f"note: {path.parent} cannot be locked ({error})"
            print(f"{wrong} — let no other run write to it")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()  # the process before has removed this one meanwhile
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    return file


def unlock(file: TextIO) -> None:
    """Remove a lock file, and give up its lock."""
    with contextlib.suppress(OSError):
        os.remove(file.name)
    file.close()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_lines(path, rows: Iterable[str]) -> None:
    """One line per row, atomically: a reader sees the old file or the new one, never half of it."""
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        stream.writelines(f"{row}\n".encode() for row in rows)


def write_json(path, content) -> None:
    write_lines(path, [json.dumps(content, indent=1, ensure_ascii=False)])


def read_json(path):
    return parse_json("\n".join(line for _, line in lines(path)), path)


def map_array(path: Path, dtype) -> np.ndarray:
    """The numbers of a binary file, memory-mapped. (An empty file cannot be mapped.) UserError: the
    file is missing, or ends within a number."""
    remedy = "remove its folder; it is then written again"
    with one_line(f"{path}: missing or truncated", remedy, (OSError, ValueError)):
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def file_fingerprint(*paths) -> str:
    """A hash of the content of files, for lib/launch.claim_output."""
    digest = xxhash.xxh3_64()
    for path in paths:
        with open(path, "rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def line_of(path, identifier: str) -> str:
    """`file:line` of the first line with an id as a column, in a list or as a string of JSON, for
    an error that is found after reading; else `file`."""
    quoted = json.dumps(identifier, ensure_ascii=False)
    for number, line in lines(path):
        if quoted in line or identifier in {*line.split(), *line.replace(",", " ").split()}:
            return f"{path}:{number}"
    return str(path)


def is_score(value) -> bool:
    """Whether a value is a number that float32 holds."""
    return type(value) in (int, float) and abs(value) <= MAX_SCORE


def _number(text: str, place: str, what: str, whole: bool = False) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if is_score(value) and (value.is_integer() or not whole):
            return value
    kind = "whole" if whole else "finite"
    raise UserError(f"{place}: {what} {text!r:.40} is not a {kind} number — correct the line")


# ---- judgments


def read_qrels(path) -> dict[str, dict[str, int]]:
    """qrels[qid][pid] = grade, from 4 columns (qid, 0, pid, grade), 3 (BEIR, after its header) or
    2 (qid, pid; the grade is 1), or from JSONL or Parquet with the fields of BEIR's header.
    UserError: other columns, a grade that is no whole number, two grades of a pair, ..."""
    qrels = {}
    shapes = "4 (TREC), 2 (RetroMAE), or 3 after BEIR's header query-id, corpus-id, score"
    for place, entry in entries(path, (2, 4), f"judgments have {shapes}", QRELS_FIELDS):
        if isinstance(entry, dict):
            entry = [value_of(keys, entry, place) for keys in QRELS_FIELDS]
        elif len(entry) == 2:
            if "," in entry[1]:
                remedy = "write one per line, or 4 columns if it is one id"
                raise UserError(f"{place}: several passages — {remedy}")
            entry.append("1")
        qid, *_, pid, grade = entry
        qid, pid = id_of(qid, place), id_of(pid, place)
        grade = int(_number(str(grade), place, "the grade", whole=True))
        if abs(grade) > MAX_GRADE:
            raise UserError(f"{place}: the grade {grade} is above {MAX_GRADE} — correct the line")
        if qrels.setdefault(qid, {}).setdefault(pid, grade) != grade:
            raise UserError(f"{place}: {qid} {pid} is judged twice, differently — keep one line")
    if not qrels:
        raise UserError(f"{path}: the file has no judgments — check the path")
    return qrels


def positives(qrels: dict[str, dict[str, int]]) -> dict[str, list[str]]:
    """{qid: its passages with a grade above 0}, without the queries that have none."""
    found = {qid: [p for p, grade in judged.items() if grade > 0] for qid, judged in qrels.items()}
    return {qid: pids for qid, pids in found.items() if pids}


def read_positives(path) -> dict[str, list[str]]:
    """The positives of a file of judgments. UserError: see read_qrels."""
    return positives(read_qrels(path))


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
    """The format of somebody else's training data by its first line, named as in
    recipes/import_training_data.py; None for a training file of ours, qrels and what is unknown."""
    columns = line.split("\t" if "\t" in line else None)
    if header(columns):
        return None
    if is_json(line):
        try:
            record = parse_json(line, "", kind=dict)
        except UserError:
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
    blanks = [" " in column.strip() for column in columns]
    if any(blanks):
        return "text-triples" if len(columns) == 3 and blanks[0] else None
    if len(columns) == 3 and columns[2].lower() not in ("score", "0", "1", "2", "3", "4"):
        return "ance" if "," in columns[2] else "id-triples"  # qrels and runs end in 0 to 4
    return "negative-lists" if len(columns) == 2 and "," in columns[1] else None


def read_training_file(path) -> Iterator[tuple[int, TrainingRow]]:
    """(line number, row) of a `train.jsonl`. UserError: a line of another form; for the training
    data of others it has the command that imports it."""
    if whose := foreign_format(first_line(path)):
        command = f"python -m recipes.import_training_data --input {path} --output_dir OUT"
        raise UserError(f"{path}:1: this is {whose} data — convert it: {command}")
    seen = set()
    for number, record in json_lines(path):
        place = f"{path}:{number}"
        row = TrainingRow(**{name: record.get(name) for name in TrainingRow._fields})
        row = row._replace(neg=row.neg or [])
        cluster = row.cluster is None or (type(row.cluster) is int and 0 <= row.cluster < 2**31)
        lists = _is_list(row.pos, row.pos_scores) and _is_list(row.neg, row.neg_scores)
        if not (row.pos and _is_list([row.qid], None) and lists and cluster):
            wrong = "ids must be strings without white space, pos not empty, one finite score per"
            raise UserError(f"{place}: {wrong} id, cluster from 0 — correct the line")
        if row.qid in seen:
            raise UserError(f"{place}: query {row.qid} has a line already — join the two lines")
        seen.add(row.qid)
        yield number, row


def _is_list(ids, scores) -> bool:
    """Whether ids is a list of strings without white space, and scores None or a list of as many
    numbers that float32 holds."""
    if not isinstance(ids, list) or not set(map(type, ids)) <= {str}:
        return False
    joined = "".join(ids)
    if not all(ids) or joined.split() != [joined] * bool(ids):
        return False
    if scores is None:
        return True
    return isinstance(scores, list) and len(scores) == len(ids) and all(map(is_score, scores))


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

    A run of TREC, or of MS MARCO (qid, pid, rank): the score is -rank. Mined lists (qid TAB
    pid,pid,...) or top1000.dev (qid TAB pid TAB query TAB passage), best first: repeated ids count
    once, the scores are -1, -2, ... A training file: the negatives, then the positives, with their
    scores if all have one. An empty file: a run that found nothing.

    UserError: another shape, a passage that a run lists twice for a query."""
    first = first_line(path)
    if is_json(first):
        return _run_of_training_file(path)
    columns = first.split("\t")
    judgments = len(columns) == 4 and columns[1] in ("0", "Q0") and columns[3].isdigit()
    lists = len(columns) in (2, 4) and not judgments
    expected = "a run has 6 (TREC) or 3 (MS MARCO); with tabs, lists have 2 and top1000.dev has 4"
    widths, separator = ((2, 4), "\t") if lists else ((3, 6), None)
    run, names = {}, {}
    for place, columns in entries(path, widths, expected, separator=separator):
        qid, pids, score = columns[0], columns[1:2], None
        if lists:
            if len(columns) == 2:
                pids = pids[0].split(",") if pids[0].strip() else []
            pids = [id_of(pid.strip(), place) for pid in pids]
            qid = id_of(qid.strip(), place)
        elif len(columns) == 3:
            score = -_number(columns[2], place, "the rank", whole=True)
            if abs(score) > MAX_RANK:
                wrong = f"the rank {columns[2]} is above {MAX_RANK}"
                raise UserError(f"{place}: {wrong} — number the passages of a query from 1")
        else:
            pids, score = columns[2:3], _number(columns[4], place, "the score")
        found, scores = run.setdefault(qid, ({}, array("f")))
        for pid in pids:
            if pid not in found:
                found[names.setdefault(pid, pid)] = None  # one string for all its lines
                scores.append(-len(found) if lists else score)
            elif not lists:
                pair = f"passage {pid} is listed twice for query {qid}"
                raise UserError(f"{place}: {pair} — remove one line")
    for qid, (found, scores) in run.items():
        run[qid] = RunList(list(found), np.array(scores, dtype=np.float32))
    return run


def _run_of_training_file(path) -> dict[str, RunList]:
    run = {}
    for _, row in read_training_file(path):
        pids = [*row.neg, *row.pos]
        scores = -np.arange(1, len(pids) + 1)
        if row.neg_scores is not None and row.pos_scores is not None:
            scores = [*row.neg_scores, *row.pos_scores]
        run[row.qid] = RunList(pids, np.array(scores, dtype=np.float32))
    return run


def write_run(path, rows: Iterable[tuple[str, list[str], Iterable[float]]]) -> None:
    """TREC run; ranks from 1 in the order given. Nine digits bring a float32 score back
    unchanged."""
    ranked = (
        f"{qid} Q0 {pid} {rank} {score:.9g} isthmus"
        for qid, pids, scores in rows
        for rank, (pid, score) in enumerate(zip(pids, scores, strict=True), 1)
    )
    write_lines(path, ranked)
