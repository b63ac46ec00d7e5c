"""Turn training data as others publish it into a corpus, queries, qrels and a training file.

    flagembedding   {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [9], "neg_scores": [2]}
    tevatron        {"query_id": "1", "query": "q", "positive_passages": [{"docid": "7",
                    "text": "a"}], "negative_passages": [...]}; or {"query_id": "1", "query_text":
                    "q", "positive_document_ids": ["7"], "negative_document_ids": ["9"]}
    hard-negatives  {"qid": 1, "pos": [7], "neg": {"bm25": [9, 4], ...}}; an id may also be written
                    {"pid": 7, "ce-score": 9.1}
    sentence-transformers   columns in this order: query, positive, any number of negatives, perhaps
                    `label`, `labels`, `score` or `scores`; texts, or ids if all names end in _id
    text-triples    query TAB positive passage TAB negative passage
    id-triples      qid TAB pid TAB pid
    ance            qid TAB pid TAB pid,pid,...

The first line decides which of these it is, or --format does. Files may be gzipped; the first four
formats may also be Parquet. A query or passage without an id is named by a 64-bit hash of its text:
equal texts have equal ids in every import. All rows of a query are joined. A negative that is also
a positive of its query, by id or by text, is dropped. A query keeps its scores if all its passages
have one. Negatives of several systems are merged by rank. Labels that are margins (differences of
two scores) are refused: the training file has a score for each passage. `prompt` is not kept.
Memory is bounded: the pairs go to a temporary SQLite file in --output_dir and are sorted on disk,
for which SQLite uses $SQLITE_TMPDIR, else /var/tmp.

Writes  --output_dir: train.jsonl, qrels.tsv, of an input with texts corpus.jsonl and queries.jsonl,
        audit.json last

    python -m recipes.import_training_data --input triples.train.small.tsv --output_dir data
"""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

from lib import files
from lib.arguments import arg, identity, parse_args
from lib.files import TrainingRow, UserError
from lib.launch import claim_output, echo, make_accelerator, run
from lib.lines import first_line, header, id_of, json_lines, lines
from lib.texts import Row, Texts, open_texts, text_key, write_texts

LABELS = ("label", "labels", "score", "scores")  # the names that sentence-transformers looks for
TABLES = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -128000; -- in kB
CREATE TABLE queries (number INTEGER PRIMARY KEY, key INTEGER UNIQUE, id TEXT, text TEXT);
CREATE TABLE passages (key INTEGER PRIMARY KEY, content INTEGER);
CREATE TABLE pairs (query INTEGER, negative INTEGER, content INTEGER, id TEXT, score REAL);
BEGIN;
"""


@dataclass(kw_only=True)
class Args:
    input: list[str] = arg(group="data", help="files of training data, all of one format")
    format: str | None = arg(None, help="name of the format, where the first line does not tell")
    corpus: str | None = arg(None, help="the corpus of an input of ids: an id must be in it")
    output_dir: str = arg(group="output", help="folder for the training file and its texts")


class BadRow(ValueError):
    """What is wrong with a row; collect() adds its place."""


class Passage(NamedTuple):
    id: str | int | None = None  # None: the id is made from the text
    text: str | None = None  # None: the input has ids only
    titles: tuple[str, ...] = ()
    score: float | None = None


class Example(NamedTuple):
    qid: str | int | None
    query: str | None
    pos: list[Passage]
    neg: list[Passage]


# one function for each format: a row of the input -> Example, whose values Pairs.add checks
def each(values) -> list:
    if not isinstance(values, list):
        raise BadRow(f"{values!r:.40} is not a list — fix the line")
    return values


def scored(field: str, values: list, scores: list | None) -> list[Passage]:
    """A passage for each value of its field, "id" or "text", with its score if there are scores."""
    scores = [None] * len(each(values)) if scores is None else each(scores)
    if len(scores) != len(each(values)):
        raise BadRow(f"{len(scores)} scores for {len(values)} passages — write one for each")
    values = map(text_of, values) if field == "text" else values
    pairs = zip(values, scores, strict=True)
    return [Passage(**{field: value}, score=score) for value, score in pairs]


def text_of(value) -> str:
    """A text or title; null is an empty one."""
    if value is not None and not isinstance(value, str):
        raise BadRow(f"the text {value!r:.40} is not a string — fix the line")
    return value or ""


def flagembedding(row: dict) -> Example:
    pos = scored("text", row["pos"], row.get("pos_scores"))
    neg = scored("text", row.get("neg") or [], row.get("neg_scores"))
    return Example(None, text_of(row["query"]), pos, neg)


def passage_of(entry) -> Passage:
    if not isinstance(entry, dict):
        return Passage(entry)
    if "pid" in entry:
        return Passage(entry["pid"], score=entry["ce-score"])
    title = text_of(entry.get("title"))
    return Passage(entry["docid"], text_of(entry["text"]), (title,) if title.strip() else ())


def tevatron(row: dict) -> Example:
    inline = "positive_passages" in row
    kind = "passages" if inline else "document_ids"
    pos = [passage_of(entry) for entry in each(row[f"positive_{kind}"])]
    neg = [passage_of(entry) for entry in each(row.get(f"negative_{kind}") or [])]
    query = text_of(row["query" if inline else "query_text"])
    return Example(row["query_id"], query, pos, neg)


def hard_negatives(row: dict) -> Example:
    ranks = zip_longest(*(each(pids) for pids in row["neg"].values()))
    neg = [passage_of(entry) for rank in ranks for entry in rank if entry is not None]
    return Example(row["qid"], None, [passage_of(entry) for entry in each(row["pos"])], neg)


def sentence_transformers(row: dict) -> Example:
    label = next((row[name] for name in LABELS if name in row), None)
    columns = {name: value for name, value in row.items() if name not in LABELS}
    query, *passages = columns.values()
    if label is not None and len(passages) == 1:
        raise BadRow("a pair with a label may be no positive — write positives without labels")
    if label is not None and not (isinstance(label, list) and len(label) == len(passages)):
        raise BadRow("the label is a margin, not a score for each passage — remove the label")
    has_ids = all(name.endswith("_id") for name in columns)
    if label is None:  # rows of different lengths: null stands for a negative that is not there
        passages[1:] = [passage for passage in passages[1:] if passage is not None]
    pos, *neg = scored("id" if has_ids else "text", passages, label)
    return Example(query if has_ids else None, None if has_ids else text_of(query), [pos], neg)


def text_triples(query: str, positive: str, negative: str) -> Example:
    return Example(None, query, [Passage(text=positive)], [Passage(text=negative)])


def id_triples(qid: str, positive: str, negative: str) -> Example:
    return Example(qid, None, [Passage(positive)], [Passage(negative)])


def ance(qid: str, positive: str, negatives: str) -> Example:
    neg = [Passage(pid.strip()) for pid in negatives.split(",")]
    return Example(qid, None, [Passage(positive)], neg)


functions = (flagembedding, tevatron, hard_negatives, sentence_transformers)
functions += (text_triples, id_triples, ance)
FORMATS = {function.__name__.replace("_", "-"): function for function in functions}


def read_rows(path: str, name: str) -> Iterator[tuple[int, dict | list[str]]]:
    """(line or row from 1, dictionary or columns) of a file of the format, streaming."""
    if FORMATS[name] in (text_triples, id_triples, ance):
        for number, line in lines(path):
            columns = line.split("\t" if "\t" in line or name == "text-triples" else None)
            if header(columns):
                raise UserError(f"{path}:{number}: a header, no training data — remove the line")
            yield number, columns
    else:
        yield from json_lines(path)


def name_of(letter: str, key: int) -> str:
    """The id of a query or passage that has none, from the key of its text."""
    return f"{letter}{key + (1 << 63):016x}"


class Pairs:
    """The pairs of a query and a passage, in an SQLite file; counts is the audit."""

    def __init__(self, path: Path):
        self.counts = Counter()
        self.place = ""  # of the row that is read
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.executescript(TABLES)
        self.execute = self.database.execute

    def collect(self, inputs: list[str], name: str) -> Iterator[Row]:
        """Add all rows of the input; yields the (id, titles, text) of corpus.jsonl.

        UserError: a damaged row, an id that comes with two texts."""
        for path in inputs:
            for line, row in read_rows(path, name):
                self.counts["rows of the input"] += 1
                self.place = f"{path}:{line}"
                try:
                    example = FORMATS[name](*row) if isinstance(row, list) else FORMATS[name](row)
                    yield from self.add(example)
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    other = f"not a row of {name} as --help shows it — fix it or give --format"
                    reason = error if isinstance(error, BadRow) else other
                    raise UserError(f"{self.place}: {reason}") from None

    def add(self, example: Example) -> Iterator[Row]:
        query = self.query(example.qid, example.query)
        for negative, passages in enumerate((example.pos, example.neg)):
            for pid, text, titles, score in passages:
                pid = id_of(pid, self.place) if text is None or pid is not None else None
                content = None if text is None else text_key(titles, text)
                if text is not None and self.is_new(pid, content):
                    self.counts["empty passages, kept"] += not (text.strip() or titles)
                    yield pid or name_of("p", content), titles, text
                if score is not None and not files.is_score(score):
                    raise BadRow(f"the score {score!r:.40} is not a finite number — fix the line")
                row = (query, negative, content, pid, score)
                self.execute("INSERT INTO pairs VALUES (?, ?, ?, ?, ?)", row)

    def query(self, qid: str | int | None, text: str | None) -> int:
        """Number of a query, which is added if it is new."""
        key = text_key((), text if qid is None else id_of(qid, self.place))
        known = self.execute("SELECT number, text FROM queries WHERE key = ?", [key]).fetchone()
        if known is None:
            self.counts["empty queries, kept"] += text is not None and not text.strip()
            row = (key, name_of("q", key) if qid is None else str(qid), text)
            return self.execute("INSERT INTO queries VALUES (NULL, ?, ?, ?)", row).lastrowid
        if qid is not None and known[1] != text:
            raise BadRow(f"query {qid} has another text than before — rename one of the two")
        return known[0]

    def is_new(self, pid: str | None, content: int) -> bool:
        """Whether a passage with a text is new; it is known then."""
        key = content if pid is None else text_key((), pid)
        known = self.execute("SELECT content FROM passages WHERE key = ?", [key]).fetchone()
        if known is None:
            self.execute("INSERT INTO passages VALUES (?, ?)", (key, content))
        elif known[0] != content:
            raise BadRow(f"passage {pid} has another text than before — rename one of the two")
        return known is None

    def training_rows(self, corpus: Texts | None) -> Iterator[TrainingRow]:
        """Queries, and the passages of each, in the order of the input."""
        pairs = self.execute("SELECT * FROM pairs ORDER BY query, rowid")
        for number, group in groupby(pairs, key=lambda pair: pair[0]):
            qid = self.execute("SELECT id FROM queries WHERE number = ?", [number]).fetchone()[0]
            scores, contents = ({}, {}), {}  # scores of positives and of negatives
            for _, negative, content, pid, score in group:
                pid = pid or name_of("p", content)
                self.counts["repeated pairs, dropped"] += pid in scores[negative]
                scores[negative].setdefault(pid, score)
                contents[pid] = content
            if corpus:
                rows = corpus.rows(contents)
                if rows.min() < 0:
                    unknown = [*contents][int(rows.argmin())]
                    reason = f"has no passage {unknown}, which query {qid} names"
                    raise UserError(f"{corpus.source}: {reason} — give the corpus of the input")
                contents = dict(zip(contents, corpus.text_keys[rows].tolist(), strict=True))
            pos, neg = scores
            taken = {contents[pid] for pid in pos} - {None}
            kept = {p: neg[p] for p in neg if p not in pos and contents[p] not in taken}
            scores = [*pos.values(), *kept.values()]
            self.counts["queries without a positive, dropped"] += not pos
            self.counts["queries without a negative"] += not kept
            self.counts["negatives dropped, positives of their query"] += len(neg) - len(kept)
            self.counts["queries with incomplete scores"] += 0 < scores.count(None) < len(scores)
            if pos:
                self.counts.update(queries=1, positives=len(pos), negatives=len(kept))
                row = TrainingRow(qid, [*pos], [*kept])
                if None not in scores:
                    row = row._replace(pos_scores=[*pos.values()], neg_scores=[*kept.values()])
                yield row


def format_of(path: str) -> str:
    """The format of a file by its first line. UserError: an unknown one, or lists of negatives."""
    name = files.foreign_format(first_line(path))
    if name == "negative-lists":
        command = f"python mine_negatives.py --run {path} --qrels QRELS --corpus CORPUS"
        raise UserError(f"{path}:1: lists of negatives without positives — run `{command}`")
    if name is None:
        raise UserError(f"{path}:1: unknown format — --format takes {', '.join(FORMATS)}")
    return name


def convert(inputs: list[str], name: str, corpus: Texts | None, out: Path) -> Counter:
    """Write everything but the audit, and return its counts."""
    temporary = out / ".tmp-pairs.sqlite"
    try:
        pairs = Pairs(temporary)
        with closing(pairs.database):
            write_texts(out / "corpus.jsonl", pairs.collect(inputs, name))
            queries = pairs.execute("SELECT id, text FROM queries WHERE text IS NOT NULL")
            write_texts(out / "queries.jsonl", ((qid, (), text) for qid, text in queries))
            files.write_training_file(out / "train.jsonl", pairs.training_rows(corpus))
    except sqlite3.Error as error:
        wrong = f"{temporary}: {error}"
        raise UserError(f"{wrong} — check the space there and in /var/tmp") from error
    finally:
        temporary.unlink(missing_ok=True)
    for path in (out / "corpus.jsonl", out / "queries.jsonl"):
        if not path.stat().st_size:  # an input of ids
            path.unlink()
    if not pairs.counts["queries"]:
        raise UserError(f"{inputs[0]}:1: no query with a positive — is this the right file?")
    rows = files.read_training_file(out / "train.jsonl")
    files.write_lines(out / "qrels.tsv", (f"{r.qid} 0 {pid} 1" for _, r in rows for pid in r.pos))
    return pairs.counts


def main():
    args = parse_args(Args)
    accelerator, out = make_accelerator(), Path(args.output_dir)
    for path in args.input:  # so that a missing file stops now and not after hours
        first_line(path)
    name = args.format or format_of(args.input[0])
    if name not in FORMATS:
        raise UserError(f"--format {name}: unknown — choose one of {', '.join(FORMATS)}")
    corpus = open_texts(args.corpus) if args.corpus else None
    inputs = {"corpus": corpus and corpus.fingerprint}
    inputs |= {path: [os.path.getsize(path), os.path.getmtime(path)] for path in args.input}
    if claim_output(accelerator, out, identity(args, inputs), "audit.json"):
        return
    counts = convert(args.input, name, corpus, out)
    audit = {"format": name, **counts}
    echo(accelerator, f"audit of {out / 'train.jsonl'}", audit)
    files.write_json(out / "audit.json", audit)


if __name__ == "__main__":
    run(main)
