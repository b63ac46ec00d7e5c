"""BM25 in Lucene's variant, over title and text, as inverted lists.

    weight of a term in a passage = idf · tf / (tf + k1 · (1 - b + b · length / mean length))
    idf = log(1 + (N - df + 0.5) / (df + 0.5))

A term of a query weighs 1 each time it occurs there. The analyser follows Lucene's
EnglishAnalyzer: words, possessive 's, 33 stopwords, Porter's stemmer. Document lengths are exact
where Lucene rounds them, so scores are close to Anserini's, not equal.
"""

import math
import re
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import Stemmer
from scipy.sparse import csr_matrix
from tqdm import tqdm

from lib.files import UserError, map_array
from lib.inverted import TILE, Inverted, open_folder, write
from lib.texts import Texts, id_hashes, places

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


def terms(text: str) -> list[str]:
    """What a text is indexed as and searched for: its words without stopwords, stemmed."""
    return [stem for stem in map(term, WORD.findall(text.lower())) if stem]


def _weights(flat: np.ndarray, lengths: np.ndarray, k1: float, b: float) -> Iterator[csr_matrix]:
    """The weights (TILE, V), tile by tile. flat: the terms of all documents, one after the other;
    lengths (N,): how many a document has."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    number = int(flat.max()) + 1

    def counts(first: int) -> csr_matrix:
        edges = ends[first : first + TILE + 1]
        found = flat[edges[0] : edges[-1]]
        parts = np.ones(len(found)), found, edges - edges[0]
        tile = csr_matrix(parts, shape=(len(edges) - 1, number), copy=True)
        tile.sum_duplicates()
        return tile

    starts = range(0, len(lengths), TILE)
    df = sum(np.bincount(counts(first).indices, minlength=number) for first in starts)
    idf = [math.log(1 + (len(lengths) - n + 0.5) / (n + 0.5)) for n in df.tolist()]
    idf = np.float32(idf)
    norms = k1 * ((1 - b) + b * lengths / lengths.mean())
    for first in starts:
        tile = counts(first)
        norm = np.repeat(norms[first : first + TILE], np.diff(tile.indptr))
        tile.data = (idf[tile.indices] * (tile.data / (norm + tile.data))).astype(np.float32)
        yield tile


def _build(texts: Texts, k1: float, b: float, folder: Path) -> None:
    """Write the index of the texts; vocabulary.bin has the sorted hashes (uint64) of its terms."""
    term_of, stems = {}, {}  # term_of: word -> number of its stem, -1 for a stopword
    flat, lengths = array("i"), array("i")
    for _, titles, text in tqdm(texts.stream(), "BM25", len(texts), leave=False, delay=5):
        words = WORD.findall(" ".join([*titles, text]).lower())
        for word in words:
            if word not in term_of:
                stem = term(word)
                term_of[word] = stems.setdefault(stem, len(stems)) if stem else -1
        found = [number for number in map(term_of.__getitem__, words) if number >= 0]
        flat.extend(found)
        lengths.append(len(found))
    if not stems:
        raise UserError(f"{texts.source}: no text has a word — is this the right file?")
    hashes = id_hashes(stems)
    order = np.argsort(hashes)
    place = np.argsort(order).astype(np.int32)  # a stem's number among the sorted hashes
    flat = place[np.frombuffer(flat, dtype=np.int32)]
    write(folder, _weights(flat, np.frombuffer(lengths, dtype=np.int32), k1, b))
    hashes[order].tofile(folder / "vocabulary.bin")


def open_bm25(texts: Texts, folder, k1: float = 0.9, b: float = 0.4) -> Inverted:
    """The index of `texts` in `folder`, built if absent; its queries are strings. All processes
    call it. UserError: the folder holds an index of other texts or settings."""
    manifest = {"fingerprint": texts.fingerprint, "count": len(texts), "k1": k1, "b": b}
    manifest |= {"analyzer": ANALYZER, "tile": TILE}
    open_folder(folder, manifest, partial(_build, texts, k1, b))
    vocabulary = map_array(Path(folder) / "vocabulary.bin", np.uint64)
    return Inverted(folder, partial(_queries, vocabulary=vocabulary))


def _queries(queries: Sequence[str], vocabulary: np.ndarray) -> csr_matrix:
    """(Q, V), a 1 for each time a term occurs. vocabulary (V,): the terms' hashes, ascending."""
    lists = [terms(query) for query in queries]
    at = places(id_hashes(stem for one in lists for stem in one), vocabulary)
    known = at >= 0
    before = np.concatenate([[0], np.cumsum(known)])  # known terms before each term
    starts = before[np.cumsum([0, *map(len, lists)])]
    weights = np.ones(known.sum(), dtype=np.float32)
    return csr_matrix((weights, at[known], starts), shape=(len(queries), len(vocabulary)))
