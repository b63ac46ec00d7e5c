"""Inverted lists: exact search of sparse vectors (LexMAE, SPLADE) and BM25, which is the same with other weights.

    score of a passage = sum over the terms of the query of (weight in the query) · (weight in the passage)

Results are as lib/index.py states them; passages without a common term are not among them. A passage's score is added
up in float32 in the order of the query's terms, so it has the same bits from `search` and `score` and on any number of
processes, each of which searches its own range of rows.

The corpus is cut into tiles of TILE rows, small enough for a tile's scores to stay in the cache of a core while lists
are added to them. An index is a folder of arrays, memory-mapped and shared by all processes:

    documents.npy  uint16 (P)       row within its tile: by tile, by term, ascending
    weights.npy    (P)              float32; or uint16 or uint8, times the list's scale
    offsets.npy    int64 (L + 1)    where each list begins
    scales.npy     float32 (L)      1 where weights are float32
    terms.npy      int32 (L)        the term of each list, ascending within a tile
    tiles.npy      int64 (T + 1)    which list each tile begins with
    vocabulary.npy uint64 (V)       BM25: the sorted hashes of the terms
    manifest.json                   what was indexed and how

A posting takes 6 bytes (4 or 3 with quantised weights), a list 16; the zeros of frequent lists (FULL) add 7 to 14 %.

Every posting of a query's terms is added up, without bounds on what a list (MaxScore) or a block of documents (BMP,
arXiv 2405.01117) can still contribute: learned weights are spread over so many terms that at depth 1000 the bounds
rule out next to nothing, and at depth 10 less than it costs to keep them.

Shapes: Q queries, N passages, V terms, k depth, P postings, L lists, T tiles, W processes.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import Stemmer
from scipy.sparse import csc_matrix
from tqdm import tqdm

from lib.files import UserError, write_json
from lib.inverted import TILE, Inverted, open_folder, write
from lib.texts import Texts, id_hashes

# BM25
# Lucene's StandardTokenizer, as far as English needs it: words are letters and digits; an apostrophe, colon or full
# stop between two letters does not end one, nor does a comma, semicolon, apostrophe or full stop between two digits;
# ideographs and kana stand alone.
ALONE = "\u3041-\u3096\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


WORD = re.compile(
    rf"[{ALONE}]|[^\W{ALONE}]+(?:(?:(?<=[^\W\d_])['’.:·](?=[^\W\d_])|(?<=\d)['’.,;](?=\d))[^\W{ALONE}]+)*"
)


STOPWORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)


STEM = Stemmer.Stemmer("porter").stemWord


ANALYZER = (
    "lucene-english-1"  # what `term` does with WORD's matches; raise the number when it changes
)


def term(word: str) -> str | None:
    """What a lower-case word is indexed as, None for a stopword."""
    word = word[:-2] if word.endswith(("'s", "’s")) else word
    return STEM(word) if word and word not in STOPWORDS else None


class _Documents:
    """The terms of each document, out of one flat array: bm25s goes through them several times, and lists of lists
    would take ten times the memory."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray):
        self.flat, self.ends = flat, np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for end in self.ends.tolist():
            yield self.flat[start:end].tolist()
            start = end


class BM25(Inverted):
    """BM25 in Lucene's variant over title and text: a term's weight in a passage is its score there, which bm25s
    computes; in a query it weighs 1 each time it occurs.

    The analyser follows Lucene's EnglishAnalyzer: words, possessive 's, 33 stopwords, Porter's stemmer. Lengths of
    documents are exact where Lucene rounds them, so scores are close to Anserini's, not equal."""

    def __init__(self, folder, accelerator=None):
        super().__init__(folder, accelerator)
        self.vocabulary = np.load(self.folder / "vocabulary.npy", mmap_mode="r")

    @classmethod
    def open(
        cls, texts: Texts, folder, k1: float = 0.9, b: float = 0.4, accelerator=None
    ) -> "BM25":
        """The index of `texts` in `folder`, built there if the folder is absent. k1 and b: Anserini's for passages.
        To be called by all processes. UserError if the folder holds an index of other texts or settings."""
        manifest = {
            "fingerprint": texts.fingerprint,
            "count": len(texts),
            "k1": k1,
            "b": b,
            "analyzer": ANALYZER,
        }
        open_folder(
            folder, "BM25", {**manifest, "tile": TILE}, partial(cls._build, texts), accelerator
        )
        return cls(folder, accelerator)

    @staticmethod
    def _build(texts: Texts, folder: Path, manifest: dict) -> None:
        import bm25s

        known, terms = {}, {}  # known: word -> number of its term, -1 for a stopword
        flat, lengths = array("i"), array("i")
        for _, title, text in tqdm(
            texts.stream(), "BM25", len(texts), unit=" texts", leave=False, delay=5
        ):
            words = WORD.findall(f"{title} {text}".lower())
            for word in words:
                if word not in known:
                    stem = term(word)
                    known[word] = terms.setdefault(stem, len(terms)) if stem else -1
            ids = [i for i in map(known.__getitem__, words) if i >= 0]
            flat.extend(ids)
            lengths.append(len(ids))
        if not terms:
            raise UserError(f"{texts.source}: no word to index — is it the right file?")
        hashes = id_hashes(
            terms
        )  # a term's id becomes its place among the sorted hashes: no dict of terms is needed
        order = np.argsort(hashes)
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order))
        index = bm25s.BM25(method="lucene", k1=manifest["k1"], b=manifest["b"])
        documents = _Documents(
            place[np.frombuffer(flat, dtype=np.int32)], np.frombuffer(lengths, dtype=np.int32)
        )
        postings = index.build_index_from_ids(
            range(len(terms)), documents, show_progress=len(texts) > 100_000
        )
        arrays = postings["data"].astype(np.float32), postings["indices"], postings["indptr"]
        rows = csc_matrix(arrays, shape=(len(texts), len(terms))).tocsr()
        write(folder, (rows[start : start + TILE] for start in range(0, len(texts), TILE)), 32)
        np.save(folder / "vocabulary.npy", hashes[order])
        write_json(folder / "manifest.json", {**manifest, "bm25s": bm25s.__version__})

    def terms(self, text: str) -> list[str]:
        """What a text is indexed as and searched for: its words without stopwords, stemmed."""
        return [stem for stem in map(term, WORD.findall(text.lower())) if stem]

    def _queries(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The known terms of the queries, one after the other: where each query starts, terms, weights."""
        lists = [self.terms(query) for query in queries]
        hashes = id_hashes(stem for one in lists for stem in one)
        at = np.minimum(np.searchsorted(self.vocabulary, hashes), len(self.vocabulary) - 1)
        known = self.vocabulary[at] == hashes
        starts = np.concatenate([[0], np.cumsum(known)])[np.cumsum([0, *map(len, lists)])]
        return starts, at[known].astype(np.int32), np.ones(known.sum(), dtype=np.float32)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """texts -> (scores (Q, k), rows (Q, k)), the same on every process."""
        return self._search(*self._queries(queries), k)

    def score(self, queries: Sequence[str], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows, 0 without a common term: for each query an array of rows -> a float32 array."""
        return self._score(*self._queries(queries), rows)
