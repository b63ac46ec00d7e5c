"""Search: the k best passages of each query, dense (exact or faiss) and BM25.

Every search returns (scores (Q, k) float32, rows (Q, k) int64): score descending, then corpus row, also for ties at
the
cut, so the same on every run; row -1 and score -inf where there are fewer than k. Rows count through the whole corpus.
With W processes each scans its own part (dense: a range of rows, BM25: a share of the queries), and all of them get
the
merged lists; the score matrix is never kept.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib.dist import all_gather
from lib.files import Embeddings, Texts, UserError, atomic, read_json, write_json

SCORES_AT_A_TIME = 1 << 24  # entries of one block of scores: 64 MB on a CPU
TRAINING_SAMPLE = 1 << 18  # vectors that train a faiss index

# ---------------------------------------------------------------------------------------------------------------------
# the k best, exactly


@numba.njit(cache=True, inline="always")
def _worse(score, row, other_score, other_row):
    return score < other_score or (score == other_score and row > other_row)


@numba.njit(cache=True)
def _push(scores, rows, size, score, row):
    """Add an entry to a heap whose root is the worst; once it is full, the root has to be worse than what comes."""
    k = len(scores)
    if size < k:  # sift up
        at = size
        while at > 0 and _worse(score, row, scores[(at - 1) // 2], rows[(at - 1) // 2]):
            scores[at], rows[at] = scores[(at - 1) // 2], rows[(at - 1) // 2]
            at = (at - 1) // 2
        scores[at], rows[at] = score, row
        return size + 1
    at = 0
    while True:  # replace the root, sift down
        child = 2 * at + 1
        if child >= k:
            break
        if child + 1 < k and _worse(scores[child + 1], rows[child + 1], scores[child], rows[child]):
            child += 1
        if not _worse(scores[child], rows[child], score, row):
            break
        scores[at], rows[at] = scores[child], rows[child]
        at = child
    scores[at], rows[at] = score, row
    return size


@numba.njit(parallel=True, cache=True)
def _scan(block, first_row, scores, rows, sizes, finite):
    """Put a block of scores (Q, n), of rows first_row ..., into the heaps (Q, k). Rows come in ascending order, so a
    later
    row needs a higher score than the root: a tie loses, as it should."""
    k = scores.shape[1]
    for q in numba.prange(block.shape[0]):
        size = sizes[q]
        worst = scores[q, 0] if size == k else -np.inf
        good = True
        for j in range(block.shape[1]):
            score = block[q, j]
            good &= abs(score) < np.inf  # False for NaN too
            if score > worst or size < k:
                size = _push(scores[q], rows[q], size, score, first_row + j)
                if size == k:
                    worst = scores[q, 0]
        sizes[q] = size
        finite[q] &= good


@numba.njit(parallel=True, cache=True)
def _scan_postings(data, documents, starts, tokens, token_starts, num_documents, scores, rows):
    """BM25: add up the postings of each query's tokens, keep the documents with a score in the heaps (Q, k)."""
    for q in numba.prange(len(token_starts) - 1):
        totals = np.zeros(num_documents, dtype=np.float32)
        for t in range(token_starts[q], token_starts[q + 1]):
            for at in range(starts[tokens[t]], starts[tokens[t] + 1]):
                totals[documents[at]] += data[at]
        size, k = 0, scores.shape[1]
        for row in range(num_documents):
            if totals[row] > 0 and (size < k or totals[row] > scores[q, 0]):
                size = _push(scores[q], rows[q], size, totals[row], row)


def _use_torch_threads() -> None:
    numba.set_num_threads(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))


def _empty(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((num_queries, k), -np.inf, dtype=np.float32), np.full((num_queries, k), -1, dtype=np.int64)


def _sorted(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heaps to lists: score descending, then row; empty places (row -1, score -inf) last."""
    order = np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), -scores))
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def top_k(scores: Tensor, first_row: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of a block of scores (Q, n) on its device: (Q, min(k, n)) scores and rows, score descending, then
    row."""
    k = min(k, scores.shape[1])
    best, at = scores.topk(k)
    tied = (scores >= best[:, -1:]).sum(1) > k  # topk takes any of the entries that tie at the cut
    if tied.any():
        best[tied], at[tied] = (part[:, :k] for part in scores[tied].sort(dim=1, descending=True, stable=True))
    at, by_row = at.sort(1)
    best, by_score = best.gather(1, by_row).sort(dim=1, descending=True, stable=True)
    return best, at.gather(1, by_score) + first_row


def merge(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Lists (Q, k_i) over ascending ranges of rows -> the k best of all, in the same order."""
    scores, order = torch.cat([s for s, _ in parts], 1).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], torch.cat([r for _, r in parts], 1).gather(1, order)[:, :k]


# ---------------------------------------------------------------------------------------------------------------------
# dense


class Dense:
    """Inner-product search over a folder of embeddings: exact, by blocks over the memory-mapped shards, or through any
    faiss factory string (IVF4096,Flat  HNSW32  PQ48), built over the rows of this process."""

    def __init__(self, corpus: Embeddings, accelerator=None, factory: str | None = None, seed: int = 0):
        self.corpus, self.accelerator = corpus, accelerator
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        bounds = np.linspace(0, len(corpus), world + 1).astype(np.int64)
        self.start, self.stop = int(bounds[rank]), int(bounds[rank + 1])
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.approximate = self._build(factory, seed) if factory else None

    def _build(self, factory: str, seed: int):
        import faiss

        try:
            index = faiss.index_factory(self.corpus.dim, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UserError(f"--index {factory}: faiss does not know it — see faiss' index factory") from error
        if not index.is_trained:
            count = min(TRAINING_SAMPLE, self.stop - self.start)
            sample = np.random.default_rng(seed).choice(self.stop - self.start, count, replace=False) + self.start
            try:
                index.train(self.corpus.take(np.sort(sample)))
            except RuntimeError as error:
                raise UserError(
                    f"--index {factory}: {count} vectors cannot train it — choose a smaller index"
                ) from error
        for _, block in self._blocks(1 << 16):
            index.add(np.ascontiguousarray(block, dtype=np.float32))
        return index

    def _blocks(self, size: int):
        shown = not self.accelerator or self.accelerator.is_main_process
        bar = tqdm(total=self.stop - self.start, desc="corpus", unit=" rows", leave=False, disable=not shown, delay=5)
        for row, block in self.corpus.blocks(self.start, self.stop, size):
            yield row, block
            bar.update(len(block))
        bar.close()

    def search(self, queries: np.ndarray, k: int, at_a_time: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """queries (Q, D) float32 -> (scores (Q, k), rows (Q, k)), `at_a_time` queries to a pass over the corpus."""
        assert queries.ndim == 2 and queries.shape[1] == self.corpus.dim and k > 0
        if not np.isfinite(queries).all():
            raise UserError("a query vector is not finite — encode the queries again")
        parts = [self._search(queries[at : at + at_a_time], k) for at in range(0, len(queries), at_a_time)]
        if not parts:
            return _empty(0, k)
        return np.concatenate([s for s, _ in parts]), np.concatenate([r for _, r in parts])

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.approximate is not None:
            scores, rows = self.approximate.search(np.ascontiguousarray(queries, dtype=np.float32), k)
            scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)  # faiss pads with -1 and the lowest float
            scores, rows = _sorted(scores, np.where(rows < 0, -1, rows + self.start))
        elif self.device.type == "cuda":
            scores, rows = self._scan_on_device(queries, k)
        else:
            scores, rows = self._scan_on_cpu(queries, k)
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return scores, rows
        mine = torch.from_numpy(scores).to(self.device), torch.from_numpy(rows).to(self.device)
        world = self.accelerator.num_processes
        parts = zip(*(all_gather(part).chunk(world) for part in mine), strict=True)
        scores, rows = merge(list(parts), k)
        return scores.cpu().numpy(), rows.cpu().numpy()

    def _scan_on_cpu(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        _use_torch_threads()
        scores, rows = _empty(len(queries), k)
        sizes, finite = np.zeros(len(queries), dtype=np.int64), np.ones(len(queries), dtype=np.bool_)
        vectors = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        size = max(SCORES_AT_A_TIME // len(queries), 256)
        buffer = torch.empty(len(queries) * size)
        for row, block in self._blocks(size):
            block = torch.from_numpy(np.array(block, dtype=np.float32))
            out = buffer[: len(queries) * len(block)].view(len(queries), len(block))
            _scan(torch.mm(vectors, block.T, out=out).numpy(), row, scores, rows, sizes, finite)
            if not finite.all():
                self._not_finite(row, len(block))
        return _sorted(scores, rows)

    def _scan_on_device(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = torch.from_numpy(queries).to(self.device, torch.float32)
        best = [torch.from_numpy(part).to(self.device) for part in _empty(len(queries), k)]
        exact, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False  # fp32 products
        for row, block in self._blocks(max(16 * SCORES_AT_A_TIME // len(queries), 4096)):
            block = torch.from_numpy(np.array(block)).to(self.device, torch.float32)
            scores = vectors @ block.T
            if not scores.isfinite().all():
                self._not_finite(row, len(block))
            best = merge([best, top_k(scores, row, k)], k)
        torch.backends.cuda.matmul.allow_tf32 = exact
        return best[0].cpu().numpy(), best[1].cpu().numpy()

    def _not_finite(self, row: int, count: int):
        rows = np.arange(row, row + count)
        wrong = rows[~np.isfinite(self.corpus.take(rows)).all(1)]
        name = self.corpus.ids(wrong[:1])[0] if len(wrong) else f"one of rows {row} to {row + count - 1}"
        raise UserError(f"{self.corpus.folder}: the vector of {name} is not finite or too large — encode again")

    def score(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows: queries (Q, D), for each an array of rows -> for each a float32 array."""
        return [self.corpus.take(r) @ q.astype(np.float32) for q, r in zip(queries, rows, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# BM25

WORD = re.compile(r"\w+(?:['’.]\w+)*")  # close to Lucene's StandardTokenizer: don't, 3.14 and U.S are one token
TOKENIZER = "lower case, \\w+ joined by ' and ., possessive 's removed, Lucene's 33 stopwords, Porter2 stemmer"


class BM25:
    """Okapi BM25 in Lucene's variant through bm25s: its index of precomputed scores, saved and memory-mapped.

    The analyser follows Lucene's EnglishAnalyzer closely, not to the letter: scores are bm25s', not Anserini's."""

    def __init__(self, folder, accelerator=None):
        import bm25s
        import Stemmer
        from bm25s.stopwords import STOPWORDS_EN

        self.stem, self.stopwords, self.accelerator = (
            Stemmer.Stemmer("english").stemWord,
            set(STOPWORDS_EN),
            accelerator,
        )
        self.known = {}  # word -> token or None: a word is stemmed once
        if folder is not None:
            index = bm25s.BM25.load(folder, mmap=True)
            self.vocabulary, self.count = index.vocab_dict, int(index.scores["num_docs"])
            self.data, self.documents, self.starts = (index.scores[part] for part in ("data", "indices", "indptr"))

    @classmethod
    def open(cls, texts: Texts, folder, k1: float = 0.9, b: float = 0.4, accelerator=None) -> "BM25":
        """The index of `texts` in `folder`, built there if the folder is absent. k1 and b: Anserini's for passages.
        UserError if the folder holds an index of other texts or settings."""
        folder = Path(folder)
        manifest = {"fingerprint": texts.fingerprint, "count": len(texts), "k1": k1, "b": b, "tokenizer": TOKENIZER}
        if accelerator is None or accelerator.is_main_process:
            if not folder.exists():
                cls._build(texts, folder, manifest)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if not (folder / "manifest.json").is_file():
            raise UserError(f"{folder}: no BM25 index — choose another folder")
        stored = read_json(folder / "manifest.json")
        for key, value in manifest.items():
            if stored.get(key) != value:
                raise UserError(
                    f"{folder}: a BM25 index with {key} {stored.get(key)}, not {value} — remove it or choose "
                    "another folder"
                )
        return cls(folder, accelerator)

    @classmethod
    def _build(cls, texts: Texts, folder: Path, manifest: dict) -> None:
        import bm25s

        analyser, vocabulary, documents = cls(None), {}, []
        for _, title, text in tqdm(texts.stream(), "BM25", len(texts), leave=False, delay=5):
            tokens = analyser.tokens(f"{title} {text}")
            documents.append([vocabulary.setdefault(token, len(vocabulary)) for token in tokens])
        if not vocabulary:
            raise UserError(f"{texts.source}: no word to index — is it the right file?")
        index = bm25s.BM25(method="lucene", k1=manifest["k1"], b=manifest["b"])
        index.index((documents, vocabulary), show_progress=False)
        with atomic(folder) as temporary:
            index.save(temporary, show_progress=False)
            write_json(temporary / "manifest.json", manifest)

    def tokens(self, text: str) -> list[str]:
        """The terms of a text: what is indexed and what is searched."""
        found = []
        for word in WORD.findall(text.lower()):
            if word not in self.known:
                plain = word[:-2] if word.endswith(("'s", "’s")) else word
                self.known[word] = None if plain in self.stopwords or not plain else self.stem(plain)
            if self.known[word] is not None:
                found.append(self.known[word])
        return found

    def _postings(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        terms = [[self.vocabulary[t] for t in self.tokens(query) if t in self.vocabulary] for query in queries]
        starts = np.cumsum([0, *map(len, terms)], dtype=np.int64)
        return np.array([t for one in terms for t in one], dtype=np.int64), starts

    def search(self, queries: Sequence[str], k: int, at_a_time: int = 1024) -> tuple[np.ndarray, np.ndarray]:
        """texts -> (scores (Q, k), rows (Q, k)); documents that share no term with the query are not returned."""
        _use_torch_threads()
        rank, world = (self.accelerator.process_index, self.accelerator.num_processes) if self.accelerator else (0, 1)
        share = -(-len(queries) // world)  # the same on every process, for the gather: the last are filled up
        mine = queries[rank * share : (rank + 1) * share]
        scores, rows = _empty(share, k)
        for at in range(0, len(mine), at_a_time):
            tokens, starts = self._postings(mine[at : at + at_a_time])
            part = slice(at, at + len(starts) - 1)
            _scan_postings(
                self.data, self.documents, self.starts, tokens, starts, self.count, scores[part], rows[part]
            )
        scores, rows = _sorted(scores, rows)
        if world > 1:
            device = self.accelerator.device
            scores, rows = (all_gather(torch.from_numpy(x).to(device)).cpu().numpy() for x in (scores, rows))
        return scores[: len(queries)], rows[: len(queries)]

    def score(self, queries: Sequence[str], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows, 0 without a common term: for each query an array of rows -> a float32 array."""
        found = []
        for query, wanted in zip(queries, rows, strict=True):
            wanted, total = np.asarray(wanted, dtype=np.int64), np.zeros(len(wanted), dtype=np.float32)
            for term in self._postings([query])[0]:
                documents = self.documents[self.starts[term] : self.starts[term + 1]]
                at = np.minimum(np.searchsorted(documents, wanted), len(documents) - 1)
                hit = documents[at] == wanted
                total[hit] += self.data[self.starts[term] : self.starts[term + 1]][at[hit]]
            found.append(total)
        return found
