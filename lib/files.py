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
    """A mistake the user can mend. The message names the place and the remedy; launch.run prints it as one line and
    exits with 1."""


# plain files
def lines(path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline) of a plain or gzipped UTF-8 file, streaming; lines of white space
    alone are passed over."""
    path, number = Path(path), 0
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'} — check the path"
        )
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
        stream = (
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)
            if str(path).endswith(".gz")
            else raw
        )
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
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}) — repair or remove the file"
        ) from error


def split_columns(path, number, line, separator, allowed, what) -> list[str]:
    columns = line.split(separator)
    if len(columns) not in allowed:
        raise UserError(
            f"{path}:{number}: {len(columns)} columns where {what} has {' or '.join(map(str, allowed))} — mend "
            "the line"
        )
    return columns


# judgments, negatives, runs
def _integer(value, path, number, what) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{path}:{number}: {what} {value!r} is not an integer — mend the line"
        ) from None


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
                raise UserError(
                    f"{path}:{number}: 6 columns, a run and not judgments — give the qrels file"
                )
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
            raise UserError(
                f"{path}:{number}: {len(columns)} columns after lines of {width} — mend the line"
            )
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
            raise UserError(
                f"{path}:{number}: {qid} {pid} is judged twice with different grades — keep one line"
            )
    if not qrels:
        raise UserError(f"{path}: no judgments in it — is it the right file?")
    return qrels


def line_of(path, *fields) -> str:
    """`file:line` of the first line that holds all `fields` as columns, list items or JSON
    strings, for an error found after reading; else `file`."""
    for number, line in lines(path):
        words = {*line.split(), *line.replace(",", " ").split()}
        if all(field in words or f'"{field}"' in line for field in fields):
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
            columns = split_columns(path, number, line, None, (6,), "a TREC run")
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
    scores: np.ndarray  # (n,) float32; -1, -2, ... where the file states no score


def read_run(path) -> dict[str, RunList]:
    """run[qid] from any file that lists passages for queries. The first line tells the shape:

        q1 Q0 7 1 13.25 tag             TREC run
        q1 7 1                          MS MARCO run: qid, pid, rank; the score is -rank
        q1 TAB 7 TAB what? TAB Ants     top1000.dev; the scores are -1, -2, ... as the lines come
        q1 TAB 9,4,12                   mined lists, best first; the same; repeated ids count once
        {"qid": "q1", "neg": ["9"]}     training file: the negatives, best first, then the positives,
                                        with their scores where all of them have one

    UserError: another shape, a line of another shape than the first, a passage that a run lists
    twice for a query, an empty file."""
    _, first = next(lines(path), (0, ""))
    columns = first.split("\t")
    judgments = len(columns) == 4 and columns[1] in ("0", "Q0") and columns[3].isdigit()
    if first.startswith("{"):
        run = _run_of_training_file(path)
    elif len(columns) in (2, 4) and not judgments:
        run = _run_of_lists(path, len(columns))
    else:
        run = _run_of_columns(path)
    if not run:
        raise UserError(f"{path}: the run is empty — is this the right file?")
    return run


def _run_of_columns(path) -> dict[str, RunList]:
    gathered, names, width = {}, {}, None
    for number, line in lines(path):
        columns = line.split()
        width = width or len(columns)
        if len(columns) != width or width not in (3, 6):
            raise UserError(
                f"{path}:{number}: {len(columns)} columns — a run has 6 (TREC) or 3 (qid, pid, rank) "
                "in every line; mined lists and top1000.dev have tabs between their columns"
            )
        pid = columns[1] if width == 3 else columns[2]
        pid = names.setdefault(pid, pid)  # one string for all its lines
        if width == 3:
            score = float(-_integer(columns[2], path, number, "rank"))
        else:
            score = _number(columns[4], path, number, "score")
        pids, scores = gathered.setdefault(columns[0], ({}, array("f")))
        if pid in pids:
            raise UserError(
                f"{path}:{number}: passage {pid} is listed twice for query {columns[0]} — remove one "
                "line"
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
                f"{path}:{number}: {len(columns)} columns after lines of {width} — fix the line"
            )
        listed = columns[1].split(",") if width == 2 else columns[1:2]
        pids = [pid.strip() for pid in listed]
        if "" in pids and len(pids) > 1:
            raise UserError(f"{path}:{number}: a passage id in the list is empty — fix the line")
        gathered.setdefault(columns[0].strip(), {}).update(dict.fromkeys(filter(None, pids)))
    return {qid: RunList(list(pids), _falling(len(pids))) for qid, pids in gathered.items()}


def _run_of_training_file(path) -> dict[str, RunList]:
    run = {}
    for number, row in read_training_file(path):
        if row.qid in run:
            raise UserError(f"{path}:{number}: query {row.qid} has two lines — join them")
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
    """TREC run; ranks from 1 in the order given. Nine digits bring a float32 score back unchanged."""
    write_lines(
        path,
        (
            f"{qid} Q0 {pid} {rank} {score:.9g} {tag}"
            for qid, pids, scores in rows
            for rank, (pid, score) in enumerate(zip(pids, scores, strict=True), 1)
        ),
    )


def write_qrels(path, qrels: dict[str, dict[str, int]]) -> None:
    write_lines(
        path,
        (
            f"{qid} 0 {pid} {grade}"
            for qid, judged in qrels.items()
            for pid, grade in judged.items()
        ),
    )


def read_scores(path) -> Iterator[tuple[str, str, float]]:
    """(qid, pid, teacher score); white space between, the score bare or in [ ] as RetroMAE's cross-encoder writes
    it."""
    for number, line in lines(path):
        qid, pid, score = split_columns(path, number, line, None, (3,), "a file of teacher scores")
        yield qid, pid, _number(score, path, number, "score")


def write_scores(path, rows: Iterable[tuple[str, str, float]]) -> None:
    write_lines(path, (f"{qid}\t{pid}\t{score:.9g}" for qid, pid, score in rows))


def read_clusters(path) -> Iterator[tuple[str, int]]:
    for number, line in lines(path):
        qid, cluster = split_columns(path, number, line, None, (2,), "a file of clusters")
        yield qid, _integer(cluster, path, number, "cluster")


def read_triples(path) -> Iterator[tuple[str, str, str]]:
    """(query, positive passage, negative passage) as texts: triples.train.small.tsv."""
    for number, line in lines(path):
        query, positive, negative = split_columns(
            path, number, line, "\t", (3,), "a file of text triples"
        )
        yield query, positive, negative


def read_id_triples(path) -> Iterator[tuple[str, str, str]]:
    """(qid, positive pid, negative pid): qidpidtriples.train.*"""
    for number, line in lines(path):
        qid, positive, negative = split_columns(
            path, number, line, None, (3,), "a file of id triples"
        )
        yield qid, positive, negative


# the training file
class TrainingRow(NamedTuple):
    """One query of a training file; scores are None where the file states none."""

    qid: str
    pos: list[str]
    neg: list[str]
    pos_scores: list[float] | None = None
    neg_scores: list[float] | None = None
    cluster: int | None = None


def read_training_file(path) -> Iterator[tuple[int, TrainingRow]]:
    """(line number, row) of train.jsonl: "qid", "pos" and the optional "neg", "pos_scores",
    "neg_scores", "cluster"; one query per line, negatives best first.

    UserError: a line is not such an object, or does not have a finite score for each passage."""
    for number, line in lines(path):
        try:
            record = json.loads(line)
            row = TrainingRow(**{"neg": [], **record})
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a line of a training file ({error}) — mine_negatives.py writes "
                "such a file"
            ) from error
        ids = [row.qid, *row.pos, *row.neg]
        if not row.pos or not all(isinstance(identifier, str) for identifier in ids):
            raise UserError(
                f"{path}:{number}: qid must be a string, pos and neg lists of strings, and pos not "
                "empty — fix the line"
            )
        for name, scores, pids in (
            ("pos_scores", row.pos_scores, row.pos),
            ("neg_scores", row.neg_scores, row.neg),
        ):
            if scores is None:
                continue
            numbers = all(isinstance(score, int | float) for score in scores)
            if len(scores) != len(pids) or not numbers or not np.isfinite(scores).all():
                raise UserError(
                    f"{path}:{number}: {name} must have a finite number for each passage — fix the "
                    "line"
                )
        yield number, row


def write_training_file(path, rows: Iterable[TrainingRow]) -> None:
    """One JSON object per row; what is None is left out."""
    write_lines(
        path,
        (
            json.dumps(
                {k: v for k, v in row._asdict().items() if v is not None}, ensure_ascii=False
            )
            for row in rows
        ),
    )
