"""The searchable side of mining and evaluation: BM25 over texts, or embeddings of any kind."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from accelerate import PartialState

from lib.bm25 import open_bm25
from lib.embeddings import Embeddings
from lib.files import UserError
from lib.inverted import Inverted, open_sparse
from lib.search import DenseIndex
from lib.texts import Texts, open_texts


def check_pair(queries: Embeddings, corpus: Embeddings) -> None:
    """UserError unless these are queries and passages of one checkpoint."""
    kinds = queries.meta.get("kind"), corpus.meta.get("kind")
    if kinds != ("query", "passage"):
        problem = f"{queries.folder}: vectors of kind {kinds[0]}, and {corpus.folder} of {kinds[1]}"
        raise UserError(f"{problem} — give those of queries, then those of passages")
    # one checkpoint without a head of its own gives sparse or dense vectors, by --head
    made = [(part.meta.get("model_hash"), part.sparse, part.dim) for part in (queries, corpus)]
    if made[0] != made[1]:
        problem = f"{queries.folder}: made by another checkpoint or --head than {corpus.folder}"
        raise UserError(f"{problem} — encode both with the same")


def check_identical_ids(path, positives: dict[str, Collection[str]]) -> None:
    """For --ignore_identical_ids. UserError: a query has the passage with its own id among its
    positives, and would lose this answer."""
    answers = [qid for qid, pids in positives.items() if qid in pids]
    if answers:
        wrong = f"{path}: the passage with the id of the query is relevant to {answers[0]}"
        counted = f"{len(answers)} of {len(positives)} queries"
        raise UserError(f"{wrong} ({counted}) — leave out --ignore_identical_ids")


@dataclass
class Index:
    """Queries and a corpus, and the search of the one for the other."""

    queries: Texts | Embeddings
    corpus: Texts | Embeddings
    name: str  # of the retriever
    folder: Path  # of inverted lists; dense vectors need none
    inputs: dict[str, str]  # fingerprints, see lib/launch.claim_output
    open: Callable[[], Inverted | DenseIndex]  # builds the index if necessary; on all processes

    @cached_property
    def engine(self) -> Inverted | DenseIndex:
        return self.open()

    def _asked(self, queries: np.ndarray):
        if isinstance(self.queries, Texts):
            return [self.queries[row][1] for row in queries]
        return self.queries.take(queries)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of Q queries -> (scores (Q, k), rows of passages (Q, k)), see lib/search.py. A k
        above the number of passages is that number."""
        return self.engine.search(self._asked(queries), min(k, len(self.corpus)))

    def score(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Rows of Q queries and Q arrays of rows of passages -> Q float32 arrays of scores."""
        return self.engine.score(self._asked(queries), rows)


def open_index(
    *,
    bm25: tuple[float, float] | None,
    run: bool,
    texts: tuple[str | None, str | None],
    embeddings: tuple[str | None, str | None],
    folder: Path,
) -> Index | None:
    """What a script searches: BM25 over texts, embeddings, or nothing where it reads a run.

    bm25                k1 and b
    texts, embeddings   (of queries, of passages)
    folder              of the inverted lists of BM25 or of sparse vectors; the first search builds
                        them if they are absent
    UserError: not one source, an incomplete one, embeddings that do not belong together."""
    if bool(bm25) + any(embeddings) + run != 1 or any(embeddings) != all(embeddings):
        either = "--bm25, or --run, or --queries_embeddings and --corpus_embeddings"
        raise UserError(f"nothing to search, or several sources — give {either}")
    if run:
        return None
    if bm25:
        if not all(texts):
            raise UserError("--bm25 searches texts — give --queries and --corpus")
        queries, corpus = map(open_texts, texts)
        k1, b = bm25
        name = f"BM25, k1 {k1}, b {b} (Lucene's variant)"
        inputs = {"queries": queries.fingerprint, "corpus": corpus.fingerprint}
        build = partial(open_bm25, corpus, folder, k1, b)
        return Index(queries, corpus, name, folder, inputs, build)
    queries, corpus = map(Embeddings, embeddings)
    check_pair(queries, corpus)
    inputs = {"queries_embeddings": queries.fingerprint, "corpus_embeddings": corpus.fingerprint}
    build = partial(DenseIndex, corpus, PartialState().device)
    if corpus.sparse:
        build = partial(open_sparse, corpus, folder)
    name = f"{corpus.meta.get('model')}, exact search"
    return Index(queries, corpus, name, folder, inputs, build)
