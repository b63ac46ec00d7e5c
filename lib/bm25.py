"""BM25 in Lucene's variant, over title and text, as inverted lists.

The weight of a term in a passage is its BM25 score there, which bm25s computes; in a query it
weighs 1 each time it occurs. The analyser follows Lucene's EnglishAnalyzer: words, possessive 's,
33 stopwords, Porter's stemmer. Document lengths are exact where Lucene rounds them, so scores are
close to Anserini's, not equal.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import Stemmer
from scipy.sparse import csc_matrix
from tqdm import tqdm

from lib.files import UserError, write_json
from lib.inverted import TILE, Inverted, Queries, map_array, open_folder, write
from lib.texts import Texts, id_hashes

# Lucene's StandardTokenizer, as far as English needs it: a word is letters and digits. An
# apostrophe, colon or full stop between two letters does not end it, nor does a comma, semicolon,
# apostrophe or full stop between two digits. Ideographs and kana stand alone.
ALONE = "\u3041-\u3096\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
INSIDE = r"(?<=[^\W\d_])['’.:·](?=[^\W\d_])|(?<=\d)['’.,;](?=\d)"
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+(?:(?:{INSIDE})[^\W{ALONE}]+)*")
STOPWORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)
STEM = Stemmer.Stemmer("porter").stemWord
ANALYZER = "lucene-english-1"  # raise the number when WORD or `term` changes


def term(word: str) -> str | None:
    """What a lower-case word is indexed as; None for a stopword."""
    word = word[:-2] if word.endswith(("'s", "’s")) else word
    return STEM(word) if word and word not in STOPWORDS else None


class Weighting(NamedTuple):
    """BM25's parameters; the defaults are Anserini's for passages."""

    k1: float = 0.9
    b: float = 0.4


class _Documents:
    """The terms of each document, out of one flat array: bm25s reads them several times, and lists
    of lists would take ten times the memory."""

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
    """An index of texts; vocabulary.bin has the sorted hashes (uint64) of its terms."""

    def __init__(self, folder, accelerator=None):
        super().__init__(folder, accelerator)
        self.vocabulary = map_array(folder, "vocabulary", np.uint64)

    @classmethod
    def open(cls, texts: Texts, folder, how=Weighting(), accelerator=None) -> "BM25":  # noqa: B008
        """The index of `texts` in `folder`, which is built if the folder is absent. All processes
        call it. UserError: the folder holds an index of other texts or settings."""
        manifest = {"fingerprint": texts.fingerprint, "count": len(texts), **how._asdict()}
        manifest |= {"analyzer": ANALYZER, "tile": TILE}
        open_folder(folder, "BM25", manifest, partial(cls._build, texts), accelerator)
        return cls(folder, accelerator)

    @staticmethod
    def _build(texts: Texts, folder: Path, manifest: dict) -> None:
        import bm25s

        known, terms = {}, {}  # known: word -> number of its term, -1 for a stopword
        flat, lengths = array("i"), array("i")
        stream = tqdm(texts.stream(), "BM25", len(texts), leave=False, delay=5)
        for _, titles, text in stream:
            words = WORD.findall(' '.join([*titles, text]).lower())
            for word in words:
                if word not in known:
                    stem = term(word)
                    known[word] = terms.setdefault(stem, len(terms)) if stem else -1
            ids = [i for i in map(known.__getitem__, words) if i >= 0]
            flat.extend(ids)
            lengths.append(len(ids))
        if not terms:
            raise UserError(f"{texts.source}: no text has a word — is this the right file?")
        hashes = id_hashes(terms)
        order = np.argsort(hashes)
        place = np.empty(len(order), dtype=np.int32)  # a term's number among the sorted hashes
        place[order] = np.arange(len(order))
        flat = place[np.frombuffer(flat, dtype=np.int32)]
        documents = _Documents(flat, np.frombuffer(lengths, dtype=np.int32))
        model = bm25s.BM25(method="lucene", k1=manifest["k1"], b=manifest["b"])
        found = model.build_index_from_ids(range(len(terms)), documents, show_progress=False)
        arrays = found["data"].astype(np.float32), found["indices"], found["indptr"]
        rows = csc_matrix(arrays, shape=(len(texts), len(terms))).tocsr()
        write(folder, (rows[start : start + TILE] for start in range(0, len(texts), TILE)), 32)
        hashes[order].tofile(folder / "vocabulary.bin")
        write_json(folder / "manifest.json", {**manifest, "bm25s": bm25s.__version__})

    def terms(self, text: str) -> list[str]:
        """What a text is indexed as and searched for: its words without stopwords, stemmed."""
        return [stem for stem in map(term, WORD.findall(text.lower())) if stem]

    def _queries(self, queries: Sequence[str]) -> Queries:
        lists = [self.terms(query) for query in queries]
        hashes = id_hashes(stem for one in lists for stem in one)
        at = np.minimum(np.searchsorted(self.vocabulary, hashes), len(self.vocabulary) - 1)
        known = self.vocabulary[at] == hashes
        before = np.concatenate([[0], np.cumsum(known)])  # known terms before each term
        starts = before[np.cumsum([0, *map(len, lists)])]
        weights = np.ones(known.sum(), dtype=np.float32)
        return Queries(starts, at[known].astype(np.int32), weights)
