"""Search: the k best passages of each query, dense (exact or faiss) and BM25.

Every search returns (scores (Q, k) float32, rows (Q, k) int64): score descending, then corpus row, also for ties at
the cut, so the same on every run; row -1 and score -inf where there are fewer than k. Rows count through the whole
corpus. With W processes each searches its own part (dense: a range of rows, BM25: a share of the queries), and all of
them get the merged lists; the score matrix is never kept.

A score and a row are held as one int64 key whose order is the order of the results (see `pack`). Keys are unique, so
the k largest are the k best passages whatever selects them, and merging lists is sorting keys.

Shapes: Q queries, N passages, D dimensions, k depth, W processes.
"""

import mmap
import re
import warnings
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numba
import numpy as np
import Stemmer
import torch
from torch import Tensor
from tqdm import tqdm

from lib.dist import all_gather
from lib.files import Embeddings, Texts, UserError, atomic, id_hashes, read_json, write_json
from lib.packed import product

EMPTY = np.iinfo(np.int64).min  # the key of "no passage": below every other
ROW_MASK = (1 << 32) - 1
KEYS_AT_A_TIME = 1 << 24  # bound on Q·k of a pass over the corpus, all processes together
QUERY_TILE, ROW_TILE = 1024, 2048  # scores computed at a time by each thread of a CPU: 8 MB
DEVICE_QUERY_TILE, DEVICE_ROW_TILE = 2048, 65536  # on a GPU: 512 MB
DOCUMENT_TILE = 1 << 15  # BM25: the totals of so many documents stay in the cache of a core


# ---------------------------------------------------------------------------------------------------------------------
# keys


def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """int64 keys of float32 scores and their rows: greater = better score, then lower row; EMPTY where the row is -1.

    The bits of a float, read as an integer, are in the order of the floats; of negative ones in the opposite order,
    which flipping their 31 low bits mends. They stand above the 32 bits of the row, counted downwards."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0 becomes 0, they are equal scores
    keys = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (ROW_MASK - rows)
    return keys.masked_fill_(rows < 0, EMPTY)


def unpack(keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """keys -> (scores float32, rows int64); -inf and -1 for EMPTY."""
    high, empty = keys >> 32, keys == EMPTY
    scores = torch.where(high < 0, high ^ 0x7FFFFFFF, high).to(torch.int32).view(torch.float32)
    rows = (ROW_MASK - (keys & ROW_MASK)).masked_fill_(empty, -1)
    return scores.masked_fill_(empty, -torch.inf).cpu().numpy(), rows.cpu().numpy()


def top_keys(keys: Tensor, k: int) -> Tensor:
    """The k largest of each row, best first, filled up with EMPTY."""
    best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=EMPTY)


@numba.njit(nogil=True, cache=True)
def _flip(bits):
    return bits ^ 0x7FFFFFFF if bits < 0 else bits


@numba.njit(nogil=True, cache=True)
def _best_first(keys, k):
    """Quickselect: reorder unique keys so that the k largest come first; the k-th. (np.partition takes numba 5 s to
    compile, this a tenth of a second.)"""
    low, high = 0, len(keys) - 1
    while low < high:
        pivot, i, j = keys[(low + high) // 2], low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return keys[k - 1]


@numba.njit(nogil=True, cache=True)
def _push(score, bits, row, keys, count, bar, k):
    """Put one score above `bar` into keys[:count]; (count, bar) after that. `bits`: the score as int32.

    `keys` has more than k places; when it is full, the k best stay and the worst of them is the new bar. Rows come in
    ascending order, so that a later row which ties with the bar has lost already."""
    high = _flip(np.int64(bits)) if score != 0 else np.int64(0)
    keys[count] = (high << 32) | (0xFFFFFFFF - row)
    count += 1
    if count == len(keys):
        bar = np.int32(_flip(_best_first(keys, k) >> 32)).view(np.float32)
        count = k
    return count, bar


@numba.njit(nogil=True, cache=True)
def _scan(scores, first_row, keys, counts, bars, k):
    """Offer the scores (n, Q) of rows first_row ... to the lists of Q queries."""
    bits = scores.view(np.int32)
    for j in range(len(scores)):
        for start in range(0, scores.shape[1], 64):
            line, least, hit = scores[j, start : start + 64], bars[start : start + 64], False
            for i in range(len(line)):  # no branch, so that the compiler compares 16 at a time
                hit |= line[i] > least[i]
            if hit:
                for i in range(len(line)):
                    if line[i] > least[i]:
                        q = start + i
                        counts[q], bars[q] = _push(line[i], bits[j, q], first_row + j, keys[q], counts[q], bars[q], k)


def _everywhere(keys: Tensor, accelerator) -> Tensor:
    """keys (n, k) of this process -> (W·n, k) of all, in the order of the ranks, on the CPU."""
    return all_gather(keys.to(accelerator.device)).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# dense


def check_pair(queries: Embeddings, corpus: Embeddings) -> None:
    """UserError unless the two folders are queries and passages of one checkpoint."""
    for part, kind in ((queries, "query"), (corpus, "passage")):
        if part.meta["kind"] != kind:
            raise UserError(f"{part.folder}: embeddings of kind {part.meta['kind']}, not {kind} — swap the folders?")
    if queries.meta["model_hash"] != corpus.meta["model_hash"]:
        raise UserError(f"{queries.folder}: made by another checkpoint than {corpus.folder} — encode both with one")


def scan_device(queries: Tensor, block: Tensor, first_row: int, best: Tensor, k: int) -> Tensor:
    """The k best keys (Q, k) of `best` (Q, k) and of one block (n, D), all on one device. Scores are fp32.

    topk takes any of the entries that tie at the cut, so the queries where more than k reach it are selected again by
    their keys, which do not tie."""
    scores = queries @ block.T
    kept = min(k, len(block))
    top, at = scores.topk(kept, sorted=False)
    new = pack(top, at + first_row)
    tied = (scores >= top.min(1, keepdim=True).values).sum(1) > kept
    if tied.any():
        rows = torch.arange(first_row, first_row + len(block), device=block.device)
        new[tied] = top_keys(pack(scores[tied], rows.expand(int(tied.sum()), -1)), kept)
    return top_keys(torch.cat([best, new], 1), k)


class Dense:
    """Inner-product search over a folder of embeddings: exact, by blocks over the memory-mapped shards, or through any
    faiss factory string, with search parameters after a colon (IVF4096,Flat:nprobe=32  HNSW32:efSearch=128  PQ48)."""

    def __init__(self, corpus: Embeddings, accelerator=None, factory: str | None = None, seed: int = 0):
        assert len(corpus) <= ROW_MASK, "a row has 32 bits of a key"
        self.corpus, self.accelerator = corpus, accelerator
        rank, self.world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        self.start, self.stop = len(corpus) * rank // self.world, len(corpus) * (rank + 1) // self.world
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.approximate = self._build(factory, seed) if factory else None

    def _blocks(self, size: int, what: str) -> Iterator[tuple[int, np.ndarray]]:
        """The blocks of this process's rows. Pages that were read are given back at once: a shard that stays mapped
        would count as ours until its end."""
        shown, total = not self.accelerator or self.accelerator.is_main_process, self.stop - self.start
        with tqdm(total=total, desc=what, unit=" rows", leave=False, disable=not shown, delay=5) as bar:
            for row, block in self.corpus.blocks(self.start, self.stop, size):
                yield row, block
                bar.update(len(block))
                if hasattr(mmap, "MADV_DONTNEED") and getattr(block, "_mmap", None) is not None:
                    block._mmap.madvise(mmap.MADV_DONTNEED)

    def search(self, queries: np.ndarray, k: int, at_a_time: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """queries (Q, D) -> (scores (Q, k) float32, rows (Q, k) int64), the same on every process. `at_a_time` queries
        to a pass over the corpus; None: as many as keep the lists of all processes within 128 MB."""
        if queries.ndim != 2 or queries.shape[1] != self.corpus.dim:
            raise UserError(
                f"{self.corpus.folder}: vectors of {self.corpus.dim} dimensions, but queries of "
                f"{queries.shape[-1]} — encode both with one checkpoint"
            )
        assert k > 0
        if not np.isfinite(queries).all():
            raise UserError(
                f"query vector {int(np.isfinite(queries).all(1).argmin())} is not finite — encode the queries again"
            )
        scores, rows = np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
        at_a_time = at_a_time or min(max(KEYS_AT_A_TIME // (k * self.world), 256), 1 << 16)
        for at in range(0, len(queries), at_a_time):
            part = torch.from_numpy(np.ascontiguousarray(queries[at : at + at_a_time], dtype=np.float32))
            if self.approximate is not None:
                keys = self._search_faiss(part, k)
            else:
                keys = self._search_device(part, k) if self.device.type == "cuda" else self._search_cpu(part, k)
            if self.world > 1:
                keys = top_keys(torch.cat(_everywhere(keys, self.accelerator).chunk(self.world), 1), k)  # of (q, W·k)
            scores[at : at + at_a_time], rows[at : at + at_a_time] = unpack(keys)
        return scores, rows

    def _search_cpu(self, queries: Tensor, k: int) -> Tensor:
        depth = min(k, self.stop - self.start)
        if depth == 0:  # more processes than rows
            return torch.full((len(queries), k), EMPTY)
        keys = np.full((len(queries), 2 * depth), EMPTY)
        counts, bars = np.zeros(len(queries), dtype=np.int64), np.full(len(queries), -np.inf, dtype=np.float32)
        threads = torch.get_num_threads()
        size = min(-(-len(queries) // threads), QUERY_TILE)
        parts = [slice(at, at + size) for at in range(0, len(queries), size)]
        products = [product(queries[part].contiguous()) for part in parts]

        @torch.inference_mode()
        def scan(number: int, block: Tensor, row: int) -> None:
            part = parts[number]
            for at in range(0, len(block), ROW_TILE):
                scores = products[number](block[at : at + ROW_TILE]).numpy()  # (n, Q)
                if number == 0:
                    self._check_finite(scores[:, 0], row + at)
                _scan(scores, row + at, keys[part], counts[part], bars[part], depth)

        # each thread multiplies and scans for its own queries, so that none waits for another within a block
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for row, block in self._blocks(8 * ROW_TILE, "exact search"):
                    with warnings.catch_warnings():  # torch says that a mapped array is read-only; nobody writes to it
                        warnings.simplefilter("ignore")
                        block = torch.from_numpy(block).float()
                    list(pool.map(scan, range(len(parts)), repeat(block), repeat(row)))
        finally:
            torch.set_num_threads(threads)
        keys[np.arange(2 * depth) >= counts[:, None]] = EMPTY
        return top_keys(torch.from_numpy(keys), k)

    def _search_device(self, queries: Tensor, k: int) -> Tensor:
        queries = queries.to(self.device)
        best = torch.full((len(queries), k), EMPTY, device=self.device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # no TF32
        try:
            for row, block in self._blocks(DEVICE_ROW_TILE, "exact search"):
                block = torch.from_numpy(np.array(block)).to(self.device).float()
                self._check_finite((block @ queries[0]).cpu().numpy(), row)
                for at in range(0, len(queries), DEVICE_QUERY_TILE):
                    part = slice(at, at + DEVICE_QUERY_TILE)
                    best[part] = scan_device(queries[part], block, row, best[part], k)
        finally:
            torch.set_float32_matmul_precision(precision)
        return best

    def _check_finite(self, scores: np.ndarray, row: int) -> None:
        """scores: of one query with consecutive rows. Whatever the query, the score of a vector with a NaN or an
        infinity is none."""
        if not np.isfinite(scores).all():
            row += int(np.isfinite(scores).argmin())
            raise UserError(
                f"{self.corpus.folder}: the vector of {self.corpus.ids([row])[0]} is not finite or too large — "
                "encode the corpus again"
            )

    def _build(self, factory: str, seed: int):
        import faiss

        description, _, parameters = factory.partition(":")
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            index = faiss.index_factory(self.corpus.dim, description, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UserError(f"--index {factory}: faiss cannot make it — see faiss' index factory") from error
        if not index.is_trained:  # on the same sample everywhere, so that the parts are parts of one index
            inverted = faiss.try_extract_index_ivf(index)
            wanted = max(1 << 16, 64 * inverted.nlist if inverted else 0)
            sample = np.random.default_rng(seed).permutation(len(self.corpus))[:wanted]
            try:
                index.train(self.corpus.take(np.sort(sample)))
            except RuntimeError as error:
                raise UserError(
                    f"--index {factory}: {len(sample)} vectors cannot train it — choose a smaller index"
                ) from error
        for row, block in self._blocks(1 << 16, f"faiss {description}"):
            block = np.ascontiguousarray(block, dtype=np.float32)
            self._check_finite(block.sum(1), row)
            index.add(block)
        if parameters:
            try:
                faiss.ParameterSpace().set_index_parameters(index, parameters)
            except RuntimeError as error:
                raise UserError(
                    f"--index {factory}: faiss does not know {parameters} — nprobe=32 or efSearch=128, for example"
                ) from error
        return index

    def _search_faiss(self, queries: Tensor, k: int) -> Tensor:
        scores, rows = self.approximate.search(queries.numpy(), k)  # faiss fills up with row -1
        return pack(torch.from_numpy(scores), torch.from_numpy(np.where(rows < 0, -1, rows + self.start)))

    def score(self, queries: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows: queries (Q, D), for each an array of rows -> for each a float32 array."""
        return [self.corpus.take(r) @ q.astype(np.float32) for q, r in zip(queries, rows, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
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
ANALYZER = "lucene-english-1"  # what `term` does with WORD's matches; raise the number when it changes


def term(word: str) -> str | None:
    """What a lower-case word is indexed as, None for a stopword."""
    word = word[:-2] if word.endswith(("'s", "’s")) else word
    return STEM(word) if word and word not in STOPWORDS else None


@numba.njit(nogil=True, cache=True)
def _scan_postings(terms, starts, queries, data, documents, offsets, num_documents, keys, k):
    """BM25 of queries[0] ... queries[1] - 1: add up the postings of each query's terms, tile by tile of documents."""
    totals = np.empty(DOCUMENT_TILE, dtype=np.float32)
    for q in range(queries[0], queries[1]):
        mine = terms[starts[q] : starts[q + 1]]
        at, count, bar = offsets[mine], 0, np.float32(0)  # a document without a term scores 0: not above the bar
        for first_row in range(0, num_documents, DOCUMENT_TILE):
            stop, touched = min(first_row + DOCUMENT_TILE, num_documents), False
            totals[:] = 0
            for t in range(len(mine)):
                end, j = offsets[mine[t] + 1], at[t]
                touched |= j < end and documents[j] < stop
                while j < end and documents[j] < stop:
                    totals[documents[j] - first_row] += data[j]
                    j += 1
                at[t] = j
            if touched:
                bits = totals.view(np.int32)
                for j in range(stop - first_row):
                    if totals[j] > bar:
                        count, bar = _push(totals[j], bits[j], first_row + j, keys[q], count, bar, k)
        keys[q, count:] = EMPTY


@numba.njit(nogil=True, cache=True)
def _score_postings(terms, rows, data, documents, offsets):
    """BM25 of one query with given rows, in the order of addition of `_scan_postings`: the same float32."""
    totals = np.zeros(len(rows), dtype=np.float32)
    for term in terms:
        postings = documents[offsets[term] : offsets[term + 1]]
        for i in range(len(rows)):
            at = np.searchsorted(postings, rows[i])
            if at < len(postings) and postings[at] == rows[i]:
                totals[i] += data[offsets[term] + at]
    return totals


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


class BM25:
    """BM25 in Lucene's variant over title and text. bm25s computes the score of each posting; they are saved as .npy,
    by term, memory-mapped and shared by all processes.

    The analyser follows Lucene's EnglishAnalyzer: words, possessive 's, 33 stopwords, Porter's stemmer. Lengths of
    documents are exact where Lucene rounds them, so scores are close to Anserini's, not equal."""

    def __init__(self, folder, accelerator=None):
        self.folder, self.accelerator = Path(folder), accelerator
        self.meta = read_json(self.folder / "manifest.json")
        parts = ("scores", "documents", "offsets", "terms")
        self.data, self.documents, self.offsets, self.vocabulary = (
            np.load(self.folder / f"{part}.npy", mmap_mode="r") for part in parts
        )

    @classmethod
    def open(cls, texts: Texts, folder, k1: float = 0.9, b: float = 0.4, accelerator=None) -> "BM25":
        """The index of `texts` in `folder`, built there if the folder is absent. k1 and b: Anserini's for passages.
        To be called by all processes. UserError if the folder holds an index of other texts or settings."""
        folder = Path(folder)
        manifest = {"fingerprint": texts.fingerprint, "count": len(texts), "k1": k1, "b": b, "analyzer": ANALYZER}
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

        known, terms = {}, {}  # known: word -> number of its term, -1 for a stopword
        flat, lengths = array("i"), array("i")
        for _, title, text in tqdm(texts.stream(), "BM25", len(texts), unit=" texts", leave=False, delay=5):
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
        hashes = id_hashes(terms)  # a term's id becomes its place among the sorted hashes: no dict of terms is needed
        order = np.argsort(hashes)
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order))
        index = bm25s.BM25(method="lucene", k1=manifest["k1"], b=manifest["b"])
        documents = _Documents(place[np.frombuffer(flat, dtype=np.int32)], np.frombuffer(lengths, dtype=np.int32))
        postings = index.build_index_from_ids(range(len(terms)), documents, show_progress=len(texts) > 100_000)
        with atomic(folder) as temporary:
            temporary.mkdir(parents=True)
            np.save(temporary / "scores.npy", postings["data"].astype(np.float32))
            np.save(temporary / "documents.npy", postings["indices"].astype(np.int32))
            np.save(temporary / "offsets.npy", postings["indptr"].astype(np.int64))
            np.save(temporary / "terms.npy", hashes[order])
            write_json(temporary / "manifest.json", {**manifest, "bm25s": bm25s.__version__})

    def terms(self, text: str) -> list[str]:
        """What a text is indexed as and searched for: its words without stopwords, stemmed."""
        return [stem for stem in map(term, WORD.findall(text.lower())) if stem]

    def _terms(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The known terms of the queries, one after the other, and where each query starts."""
        lists = [self.terms(query) for query in queries]
        hashes = id_hashes(stem for one in lists for stem in one)
        at = np.minimum(np.searchsorted(self.vocabulary, hashes), len(self.vocabulary) - 1)
        known = self.vocabulary[at] == hashes
        starts = np.cumsum([0, *map(len, lists)])
        return at[known], np.concatenate([[0], np.cumsum(known)])[starts]

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """texts -> (scores (Q, k), rows (Q, k)), the same on every process; documents that share no term with the
        query are not returned."""
        rank, world = (self.accelerator.process_index, self.accelerator.num_processes) if self.accelerator else (0, 1)
        scores, rows = np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
        depth, at_a_time = min(k, self.meta["count"]), min(max(KEYS_AT_A_TIME // (k * world), 1), 1 << 16) * world
        for at in range(0, len(queries), at_a_time):
            block = queries[at : at + at_a_time]
            share = -(-len(block) // world)  # the same on every process, for the gather; the last are filled up
            terms, starts = self._terms(block[rank * share : (rank + 1) * share])
            keys = np.full((share, 2 * depth), EMPTY)

            def scan(start, keys=keys, terms=terms, starts=starts):
                postings = self.data, self.documents, self.offsets, self.meta["count"]
                _scan_postings(terms, starts, (start, min(start + 16, len(starts) - 1)), *postings, keys, depth)

            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(scan, range(0, len(starts) - 1, 16)))
            keys = top_keys(torch.from_numpy(keys), k)
            keys = _everywhere(keys, self.accelerator) if world > 1 else keys
            scores[at : at + at_a_time], rows[at : at + at_a_time] = unpack(keys[: len(block)])
        return scores, rows

    def score(self, queries: Sequence[str], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given rows, 0 without a common term: for each query an array of rows -> a float32 array."""
        terms, starts = self._terms(queries)
        return [
            _score_postings(terms[a:b], np.asarray(r, dtype=np.int64), self.data, self.documents, self.offsets)
            for a, b, r in zip(starts[:-1], starts[1:], rows, strict=True)
        ]
