"""The searchable side of mining and evaluation: BM25 over texts, or embeddings of any kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from lib.bm25 import BM25, Weighting
from lib.embeddings import Embeddings
from lib.files import UserError
from lib.inverted import Sparse
from lib.search import DenseIndex
from lib.texts import open_texts


@dataclass(kw_only=True)
class Source:
    """What is searched and how: the flags that mine_negatives.py and evaluate.py share.

    UserError unless there is one source, and all of it: BM25, embeddings, or run files."""

    bm25: bool = False
    queries: str | None = None  # texts, as corpus
    corpus: str | None = None
    queries_embeddings: str | None = None
    corpus_embeddings: str | None = None
    run: str | list[str] | None = None
    folder: Path  # of the inverted lists
    index: str | None = None  # a faiss factory string
    bits: int = 32
    weighting: Weighting = Weighting()
    seed: int = 0  # of faiss' training

    def __post_init__(self):
        vectors = self.queries_embeddings, self.corpus_embeddings
        if self.bm25 + any(vectors) + bool(self.run) != 1 or any(vectors) != all(vectors):
            raise UserError(
                "nothing to search, or several sources — give --bm25, or --run, or both "
                "--queries_embeddings and --corpus_embeddings"
            )
        if self.bm25 and not (self.queries and self.corpus):
            raise UserError("--bm25 searches texts — give --queries and --corpus")


def file_fingerprint(*paths) -> str:
    """A hash of the content of files, for lib/launch.claim_output."""
    digest = xxhash.xxh3_64()
    for path in paths:
        with open(path, "rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def check_pair(queries: Embeddings, corpus: Embeddings) -> None:
    """UserError unless these are queries and passages of one checkpoint."""
    for part, kind in ((queries, "query"), (corpus, "passage")):
        if part.meta["kind"] != kind:
            found = part.meta["kind"]
            raise UserError(
                f"{part.folder}: vectors of kind {found}, not {kind} — swap the folders"
            )
    if queries.meta["model_hash"] != corpus.meta["model_hash"]:
        other = f"{queries.folder}: made by another checkpoint than {corpus.folder}"
        raise UserError(f"{other} — encode both with one checkpoint")
    if queries.sparse != corpus.sparse:  # one checkpoint without a head of its own, two --head
        part = queries if queries.sparse else corpus
        other = f"{part.folder}: sparse vectors, but the others are dense"
        raise UserError(f"{other} — encode both with one --head")


class Index:
    """queries and corpus (Texts or Embeddings), and the search of the one for the other. The index
    is built, or opened, by the first search, which all processes make.

    UserError: embeddings that do not belong together, --index with sparse vectors."""

    def __init__(self, source: Source, accelerator):
        self.source, self.accelerator = source, accelerator
        if source.bm25:
            with accelerator.main_process_first():
                self.corpus, self.queries = open_texts(source.corpus), open_texts(source.queries)
            k1, b = source.weighting
            self.name = f"BM25, k1 {k1}, b {b} (Lucene's variant)"
            return
        self.queries = Embeddings(source.queries_embeddings)
        self.corpus = Embeddings(source.corpus_embeddings)
        check_pair(self.queries, self.corpus)
        if self.corpus.sparse and source.index:
            raise UserError(
                "--index is for dense vectors — leave it out; --bits 8 makes a sparse index small"
            )
        how = f"{source.bits} bits a weight" if self.corpus.sparse else source.index
        self.name = f"{self.corpus.meta['model']}, {how or 'exact search'}"

    @cached_property
    def engine(self) -> BM25 | Sparse | DenseIndex:
        source, corpus = self.source, self.corpus
        if source.bm25:
            return BM25.open(corpus, source.folder, source.weighting, self.accelerator)
        if corpus.sparse:
            return Sparse.open(corpus, source.folder, source.bits, self.accelerator)
        return DenseIndex(corpus, self.accelerator, source.index, source.seed)

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the queries and the corpus, see lib/launch.claim_output."""
        if self.source.bm25:
            return {"queries": self.queries.fingerprint, "corpus": self.corpus.fingerprint}
        folders = {"queries_embeddings": self.queries, "corpus_embeddings": self.corpus}
        keys = "model_hash", "input_fingerprint"
        return {name: str([part.meta.get(k) for k in keys]) for name, part in folders.items()}

    def _asked(self, queries: np.ndarray):
        if self.source.bm25:
            return [self.queries[row][1] for row in queries]
        return self.queries.take(queries)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of Q queries -> (scores (Q, k), rows of passages (Q, k)), see lib/search.py."""
        return self.engine.search(self._asked(queries), k)

    def score(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Rows of Q queries and Q arrays of rows of passages -> Q float32 arrays of scores."""
        return self.engine.score(self._asked(queries), rows)


def open_index(source: Source, accelerator) -> Index:
    return Index(source, accelerator)
