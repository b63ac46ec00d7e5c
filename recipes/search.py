"""Search a collection by typing queries: ranks, scores, titles and beginnings of passages.

    python -m recipes.search FOLDER                     vectors of passages, dense or sparse
    python -m recipes.search FOLDER --bm25              the same and BM25, fused
    python -m recipes.search --bm25 --corpus corpus.jsonl
    python -m recipes.search runs/quickstart            what recipes/quickstart.sh leaves behind
    python -m recipes.search FOLDER --query "what?" --json

The folders stand first. encode.py --kind passage wrote them, and their meta.json names checkpoint
and corpus. Several, or one and BM25, are fused by reciprocal rank. Queries are encoded as the
checkpoint states, so a query has the ranking that encode.py and evaluate.py give it. BM25 and
sparse models mark the words that a query and a passage share. Without --query, queries are lines
of the terminal or of a pipe; an empty line ends the program.

Reads   the vectors, the checkpoint, the corpus
Writes  only to the cache of texts, where it keeps inverted lists. --json prints a line for each
        passage: query, rank, id, score, title, text, terms (what each adds to the score, by
        retriever), ranks (in each of the lists that were fused), seconds
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from scipy.sparse import csr_matrix

from lib.arguments import arg, parse_args
from lib.bm25 import WORD, open_bm25, term
from lib.checkpoint import checkpoint_folder, load_encoder, model_hash
from lib.embeddings import Embeddings
from lib.encoder import Head
from lib.files import RunList, UserError
from lib.inverted import open_sparse
from lib.launch import make_accelerator, run
from lib.metrics import in_order, reciprocal_rank_fusion
from lib.search import DenseIndex
from lib.text import format_texts, pad, to_ids
from lib.texts import Texts, open_texts

DEPTH = 1000  # of the lists that are fused, as in evaluate.py
SHOWN = 240  # characters of a passage on the terminal
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # characters that would steer the terminal
MOST_TERMS = 10  # of a passage: those that add most to its score


@dataclass(kw_only=True)
class Args:
    folders: list[str] = arg([], help="folders of passages; the flag itself may be left out")
    bm25: bool = arg(False, help="search with BM25 too, or, without folders, with BM25 alone")
    corpus: str | None = arg(None, help="passage texts, if meta.json does not name them")
    model: list[str] = arg([], help="the checkpoint of each folder, if meta.json does not name it")
    query_prompt: str | None = arg(None, help="text before every query, if not the checkpoint's")
    query: str | None = arg(None, help="search for this alone, and stop")
    top: int = arg(10, least=1, most=DEPTH, help="number of passages that are shown")
    json: bool = arg(False, help="print JSON lines")


class Vectors:
    """Passages by their vectors, and the checkpoint that encodes queries for them."""

    def __init__(
        self, corpus: Embeddings, model: str, texts: Texts, prompt: str | None, accelerator
    ):
        """model: the checkpoint. UserError: the vectors are not of these texts, or not of it."""
        folder, meta, sparse = corpus.folder, corpus.meta, corpus.sparse
        self.corpus, self.accelerator, self.name = corpus, accelerator, str(folder)
        if meta.get("input_fingerprint") not in (None, texts.fingerprint):
            wrong = f"{folder}: these are vectors of other texts than {texts.source}"
            raise UserError(f"{wrong} — give their texts with --corpus, or encode again")
        checkpoint = checkpoint_folder(model)
        if meta.get("model_hash") not in (None, model_hash(checkpoint)):
            wrong = f"{folder}: made by another checkpoint than {checkpoint}"
            raise UserError(f"{wrong} — give theirs with --model, or encode again")
        head = Head(meta.get("pooling"), "dense", normalize=meta.get("normalized", False))
        head = Head(kind="sparse") if sparse else head
        encoder = load_encoder(checkpoint, head, {"query_prompt": prompt})
        self.encoder = encoder.to(accelerator.device)
        if encoder.dim != self.corpus.dim:
            sizes = f"{self.corpus.dim} dimensions, and {checkpoint} has {encoder.dim}"
            raise UserError(f"{folder}: vectors of {sizes} — give their checkpoint with --model")
        if sparse:
            lists = texts.folder.parent / f"sparse-{self.corpus.fingerprint}"
            self.engine = open_sparse(self.corpus, lists)
        else:
            self.engine = DenseIndex(self.corpus, accelerator.device)

    @torch.inference_mode()
    def ask(self, text: str) -> np.ndarray | csr_matrix:
        """The vector (1, D) of a query, rounded as encode.py stores it."""
        tokenizer, form = self.encoder.tokenizer, self.encoder.format
        strings = format_texts([((), text)], "query", form, tokenizer)
        batch = pad(to_ids(strings, tokenizer, form.max_query_length), tokenizer)
        with self.accelerator.autocast():
            batch = send_to_device(batch, self.accelerator.device)
            vector = self.encoder.encode(batch, "query").float().cpu().numpy()
        if not np.isfinite(vector).all():
            wrong = f"{self.name}: the query's vector is not finite"
            raise UserError(f"{wrong} — check the checkpoint")
        if self.corpus.sparse:
            return csr_matrix(vector)
        return vector.astype(self.corpus.meta.get("dtype", "float32")).astype(np.float32)

    def split(self, asked: np.ndarray | csr_matrix) -> tuple[list[str], list | csr_matrix]:
        """The T terms of a query, and a query (T, V) of each alone. A dense vector has none."""
        if not self.corpus.sparse:
            return [], []
        parts = asked.data, asked.indices, np.arange(asked.nnz + 1)
        alone = csr_matrix(parts, shape=(asked.nnz, asked.shape[1]))
        return self.encoder.tokenizer.convert_ids_to_tokens(asked.indices.tolist()), alone

    def places(self, text: str, terms: Collection[str]) -> Iterator[tuple[int, int]]:
        """(start, end) of the tokens of a text that are among the terms."""
        tokenizer = self.encoder.tokenizer
        if terms and tokenizer.is_fast:  # a slow one does not know where its tokens are
            read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            tokens = tokenizer.convert_ids_to_tokens(read["input_ids"])
            pairs = zip(tokens, read["offset_mapping"], strict=True)
            yield from (place for token, place in pairs if token in terms)


class BM25:
    """Passages by their words."""

    name = "BM25"

    def __init__(self, texts: Texts):
        self.corpus = texts
        self.engine = open_bm25(texts, texts.folder.parent / f"bm25-{texts.fingerprint}")

    def ask(self, text: str) -> list[str]:
        return [text]

    def split(self, asked: list[str]) -> tuple[list[str], list[str]]:
        """The stems of a query, and for each the query of its words alone."""
        words = {}
        for word in WORD.findall(asked[0].lower()):
            words.setdefault(term(word), []).append(word)
        words.pop(None, None)  # stopwords
        return list(words), [" ".join(some) for some in words.values()]

    def places(self, text: str, terms: Collection[str]) -> Iterator[tuple[int, int]]:
        found = WORD.finditer(text)
        return (match.span() for match in found if term(match.group().lower()) in terms)


def stated(vectors: Embeddings, what: str, given: str | None) -> str:
    """The path of the checkpoint or corpus: as given, or as meta.json has it."""
    path = given or vectors.meta.get({"model": "model", "corpus": "input"}[what])
    if not path or vectors.meta.get("kind") != "passage":
        wrong = f"{vectors.folder}: its meta.json is not of passages, or names no {what}"
        raise UserError(f"{wrong} — give vectors of passages, and --{what}")
    return path


def open_all(args: Args, accelerator) -> tuple[list[Vectors | BM25], Texts]:
    """The retrievers, and the texts of their passages. UserError: nothing to search, or the parts
    do not belong together."""
    folders, models, corpus = [*map(Path, args.folders)], args.model, args.corpus
    if not (folders or args.bm25 and corpus) or len(models) not in (0, len(folders)):
        ways = "FOLDER ..., or --bm25 and --corpus; with --model, one for each folder"
        raise UserError(f"nothing to search — give {ways}")
    models = models or [None] * len(folders)
    for at, folder in enumerate(folders):
        if (folder / "stage2-corpus").is_dir():  # of the quickstart; it may have moved
            corpus = corpus or str(folder / "collection" / "corpus.jsonl")
            folders[at] = folder / "stage2-corpus"
            models[at] = models[at] or str(folder / "stage2")
    opened = [Embeddings(folder) for folder in folders]
    texts = open_texts(corpus or stated(opened[0], "corpus", None))
    found = []
    for vectors, model in zip(opened, models, strict=True):
        model = stated(vectors, "model", model)
        found.append(Vectors(vectors, model, texts, args.query_prompt, accelerator))
    return [*found, BM25(texts)] if args.bm25 else found, texts


def ranking(retriever: Vectors | BM25, asked) -> RunList:
    corpus = retriever.corpus
    scores, rows = retriever.engine.search(asked, min(DEPTH, len(corpus)))
    known = rows[0] >= 0
    return in_order(RunList(corpus.ids(rows[0][known]), scores[0][known]))


def shares(retriever: Vectors | BM25, asked, pids: list[str]) -> list[dict[str, float]]:
    """For each passage what the terms of a query add to its score, the greatest first."""
    names, alone = retriever.split(asked)
    rows = retriever.corpus.rows(pids)
    added = retriever.engine.score(alone, [rows] * len(names)) if names else []
    found = []
    for at in range(len(pids)):
        own = {name: float(values[at]) for name, values in zip(names, added, strict=True)}
        best = sorted(own, key=own.get, reverse=True)[:MOST_TERMS]
        found.append({name: own[name] for name in best if own[name] > 0})
    return found


def search(retrievers: list, texts: Texts, query: str, top: int) -> tuple[list[dict], float]:
    """The records of --json for a query, best first, and the seconds that the ranking took."""
    start = time.perf_counter()
    asked = [retriever.ask(query) for retriever in retrievers]
    lists = [ranking(one, query) for one, query in zip(retrievers, asked, strict=True)]
    fused = lists[0]
    if len(lists) > 1:
        fused = in_order(reciprocal_rank_fusion([{query: entry} for entry in lists])[query])
    seconds = time.perf_counter() - start
    pids = fused.pids[:top]
    names = [retriever.name for retriever in retrievers]
    terms = [shares(one, query, pids) for one, query in zip(retrievers, asked, strict=True)]
    records = []
    for at, (pid, row) in enumerate(zip(pids, texts.rows(pids), strict=True)):
        if row < 0:
            wrong = f"{texts.source}: passage {pid} is not in it"
            raise UserError(f"{wrong} — give the corpus that was encoded with --corpus")
        titles, text = texts[row]
        record = {"query": query, "rank": at + 1, "id": pid, "score": float(fused.scores[at])}
        record |= {"title": " ".join(titles), "text": text}
        record["terms"] = {name: own[at] for name, own in zip(names, terms, strict=True) if own[at]}
        pairs = [(name, entry.pids) for name, entry in zip(names, lists, strict=True)]
        record["ranks"] = {name: found.index(pid) + 1 for name, found in pairs if pid in found}
        records.append({**record, "seconds": seconds})
    return records, seconds


def marked(text: str, retrievers: list, terms: dict[str, dict]) -> str:
    """The beginning of a text with its terms marked: bold on a terminal, else by asterisks."""
    text = " ".join(CONTROL.sub(" ", text).split())
    text = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    places = (one.places(text, terms.get(one.name, ())) for one in retrievers)
    inside = {at for place in chain(*places) for at in range(*place)}
    mark = "\033[1m{}\033[0m" if sys.stdout.isatty() else "**{}**"
    shown = ""
    for is_term, run_of in groupby(range(len(text)), inside.__contains__):
        part = "".join(text[at] for at in run_of)
        shown += mark.format(part) if is_term else part
    return shown


def show(retrievers: list, records: list[dict]) -> None:
    for record in records:
        title, text = (marked(record[k], retrievers, record["terms"]) for k in ("title", "text"))
        heading = f"{record['rank']:>3}  {record['score']:<9.4f} {record['id']}   {title}"
        ranks = ", ".join(f"{name} {rank}" for name, rank in record["ranks"].items())
        print(heading, f"({ranks})" if len(retrievers) > 1 else "")
        print(f"     {text}")


def main():
    # the folders may stand without their flag, but only before all others
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--folders")
    args = parse_args(Args)
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise UserError("several processes cannot share a terminal — start it with python alone")
    retrievers, texts = open_all(args, accelerator)
    if args.query is None:
        search(retrievers, texts, "warm", 1)  # the first search waits for kernels and pages
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed and args.query is None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited and called back
        print(f"{len(texts)} passages of {texts.source}; an empty line ends")
    queries = iter(lambda: input("query: " if typed else "").strip(), "")
    with contextlib.suppress(EOFError):
        for query in queries if args.query is None else [args.query]:
            records, seconds = search(retrievers, texts, query, args.top)
            if args.json:
                for record in records:
                    print(json.dumps(record, ensure_ascii=False))
            else:
                show(retrievers, records)
                print(f"     {len(records)} of {len(texts)} passages in {seconds:.3f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    run(main)
