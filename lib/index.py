"""The searchable side of mining and evaluation: BM25 over texts, or embeddings of any kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import xxhash

from lib.bm25 import Weighting, open_bm25
from lib.embeddings import Embeddings
from lib.files import UserError
from lib.inverted import Inverted, open_sparse
from lib.search import DenseIndex
from lib.texts import Texts, open_texts


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
    kinds = queries.meta["kind"], corpus.meta["kind"]
    if kinds != ("query", "passage"):
        problem = f"{queries.folder}: vectors of kind {kinds[0]}, and {corpus.folder} of {kinds[1]}"
        raise UserError(f"{problem} — give those of queries, then those of passages")
    # one checkpoint without a head of its own gives sparse or dense vectors, by --head
    made = [(part.meta["model_hash"], part.sparse) for part in (queries, corpus)]
    if made[0] != made[1]:
        problem = f"{queries.folder}: made by another checkpoint or --head than {corpus.folder}"
        raise UserError(f"{problem} — encode both with the same")


@dataclass
class Index:
    """Queries and a corpus, and the search of the one for the other."""

    queries: Texts | Embeddings
    corpus: Texts | Embeddings
    name: str  # of the retriever
    folder: Path  # of inverted lists; dense vectors have none
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
        """Rows of Q queries -> (scores (Q, k), rows of passages (Q, k)), see lib/search.py."""
        return self.engine.search(self._asked(queries), k)

    def score(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Rows of Q queries and Q arrays of rows of passages -> Q float32 arrays of scores."""
        return self.engine.score(self._asked(queries), rows)


def open_index(args, accelerator) -> Index | None:
    """What the arguments of mine_negatives.py or evaluate.py say; None for --run. The first search
    builds or opens the index. UserError: not one source, an incomplete one, embeddings that do not
    belong together, --index with sparse vectors."""
    vectors = args.queries_embeddings, args.corpus_embeddings
    texts = args.queries, args.corpus
    if args.bm25 + any(vectors) + bool(args.run) != 1 or any(vectors) != all(vectors):
        either = "--bm25, or --run, or --queries_embeddings and --corpus_embeddings"
        raise UserError(f"nothing to search, or several sources — give {either}")
    if args.bm25 and not all(texts):
        raise UserError("--bm25 searches texts — give --queries and --corpus")
    if args.run:
        return None
    folder = Path(args.bm25_index or Path(args.output_dir) / "index")
    if args.bm25:
        with accelerator.main_process_first():
            queries, corpus = map(open_texts, texts)
        name = f"BM25, k1 {args.k1}, b {args.b} (Lucene's variant)"
        inputs = {"queries": queries.fingerprint, "corpus": corpus.fingerprint}
        build = partial(open_bm25, corpus, folder, Weighting(args.k1, args.b), accelerator)
        return Index(queries, corpus, name, folder, inputs, build)
    queries, corpus = map(Embeddings, vectors)
    check_pair(queries, corpus)
    if corpus.sparse and args.index:
        raise UserError("--index is for dense vectors — leave it out, or use --bits 8")
    how = f"{args.bits} bits a weight" if corpus.sparse else args.index or "exact search"
    folders = {"queries_embeddings": queries, "corpus_embeddings": corpus}
    keys = ["model_hash", "input_fingerprint"]
    inputs = {name: str([part.meta.get(k) for k in keys]) for name, part in folders.items()}
    build = partial(DenseIndex, corpus, accelerator, args.index, args.seed)
    if corpus.sparse:
        build = partial(open_sparse, corpus, folder, args.bits, accelerator)
    return Index(queries, corpus, f"{corpus.meta['model']}, {how}", folder, inputs, build)
