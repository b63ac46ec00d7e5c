"""Sparse embeddings as Anserini reads them: integer impacts, for its inverted index and search.

A weight x becomes rint(100 x), half to even; what becomes 0 is left out (SPLADE; LexMAE, arXiv
2208.14754). Anserini repeats each term as often as it weighs: a score is the sum over the terms of
query weight x passage weight.

Reads   --embeddings, which encode.py wrote with a checkpoint of a sparse head; its tokenizer
Writes  --output_dir, for passages: collection/vectors-00.jsonl, ... with lines
            {"id": "7", "vector": {"ant": 113, "##s": 20}}
        for queries: queries.tsv with lines `q1 TAB ant ant ant ##s`
        then meta.json, without which the folder is not complete

    python -m recipes.export_anserini --embeddings corpus --output_dir export-corpus
    python -m recipes.export_anserini --embeddings queries --output_dir export-queries
    alias anserini='java -Dfile.encoding=UTF-8 -cp anserini-0.25.0-fatjar.jar'
    anserini io.anserini.index.IndexCollection -collection JsonVectorCollection \\
        -input export-corpus/collection -generator DefaultLuceneDocumentGenerator \\
        -impact -pretokenized -index index
    anserini io.anserini.search.SearchCollection -index index -topics export-queries/queries.tsv \\
        -topicReader TsvInt -impact -pretokenized -hits 1000 -output run.trec

bench/anserini.sh does all of it and compares with our search.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer

from lib.arguments import arg, identity, parse_args
from lib.checkpoint import loading
from lib.embeddings import Embeddings
from lib.files import UserError, atomic, write_json, write_lines
from lib.launch import claim_output, make_accelerator, run

ROWS_AT_A_TIME = 4096
PADDING = 128  # columns beyond the tokenizer: vocabularies are rounded up for the hardware
CLAUSES = 1024  # terms of a query that Lucene allows
LONGEST = 127  # characters of a term: Lucene's WhitespaceAnalyzer cuts after 255 UTF-16 units


@dataclass(kw_only=True)
class Args:
    embeddings: str = arg(group="data", help="folder of queries or passages that encode.py wrote")
    output_dir: str = arg(help="folder for the export")
    model: str | None = arg(
        None, help="folder with the tokenizer, if the checkpoint has moved since the encoding"
    )
    factor: float = arg(
        100.0,
        group="export",
        above=0,
        most=10_000,
        help="a weight x is exported as rint(factor * x)",
    )
    files: int = arg(
        24, least=1, help="number of files of a collection; an indexing thread reads one at a time"
    )


def terms(tokenizer, dim: int) -> np.ndarray:
    """(dim,) str objects: the term of each column. That is the token as the vocabulary has it, "##"
    included; "[v7]" for a column 7 without a token and for a token that white space or its length
    would break in two.

    UserError if columns and tokenizer do not belong together."""
    if not 0 <= dim - len(tokenizer) <= PADDING:
        sizes = f"{len(tokenizer)} tokens where vectors have {dim} columns"
        problem = f"{tokenizer.name_or_path}: {sizes}"
        raise UserError(f"{problem} — give the tokenizer of their checkpoint with --model")
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    names += [None] * (dim - len(tokenizer))
    for column, name in enumerate(names):
        if not name or len(name) > LONGEST or any(c.isspace() or c < "!" for c in name):
            names[column] = f"[v{column}]"
    if len(set(names)) < dim:
        twice = Counter(names).most_common(1)[0][0]
        problem = f"{tokenizer.name_or_path}: two columns share the term {twice}"
        raise UserError(f"{problem} — rename one in the tokenizer")
    return np.array(names, dtype=object)


def quantise(weights: csr_matrix, factor: float, unknown: int) -> csr_matrix:
    """(n, V) float32 -> (n, V) int32: rint(factor x), half to even, where that is positive; columns
    ascending. A row with nothing left gets the column `unknown` with 1: Anserini takes no empty
    document and no empty query."""
    impacts = np.maximum(np.rint(weights.data * np.float32(factor)), 0).astype(np.int32)
    impacts = csr_matrix((impacts, weights.indices, weights.indptr), weights.shape, copy=True)
    impacts.eliminate_zeros()
    empty = np.flatnonzero(np.diff(impacts.indptr) == 0)
    ones = np.ones(len(empty), dtype=np.int32)
    impacts += csr_matrix((ones, (empty, np.full(len(empty), unknown))), weights.shape)
    impacts.sort_indices()
    return impacts


def main():
    args = parse_args(Args)
    accelerator, out = make_accelerator(), Path(args.output_dir)
    vectors = Embeddings(args.embeddings)
    if not vectors.sparse:
        problem = f"{args.embeddings}: dense vectors, not weights of terms"
        raise UserError(f"{problem} — encode with a sparse checkpoint")
    model = args.model or vectors.meta["model"]
    with loading(model, "give the folder of the checkpoint with --model"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.unk_token_id is None:
        problem = f"{model}: the tokenizer has no unknown token, which stands for an empty text"
        raise UserError(f"{problem} — add one")
    names, counts = terms(tokenizer, vectors.dim), Counter()
    inputs = {"embeddings": vectors.fingerprint}
    if claim_output(accelerator, out, identity(args, inputs), "meta.json"):
        return

    def rows(start: int, stop: int) -> Iterator[tuple[str, list[str], list[int]]]:
        for first, block in vectors.blocks(start, stop, ROWS_AT_A_TIME):
            impacts = quantise(block, args.factor, tokenizer.unk_token_id)
            counts["weights"] += block.nnz
            counts["impacts"] += impacts.nnz
            counts["largest"] = max(counts["largest"], int(impacts.data.max()))
            ids, edges = vectors.ids(range(first, first + impacts.shape[0])), impacts.indptr
            for identifier, low, high in zip(ids, edges, edges[1:], strict=False):
                tokens = names[impacts.indices[low:high]].tolist()
                yield identifier, tokens, impacts.data[low:high].tolist()

    total, facts = len(vectors), {}
    if vectors.meta["kind"] == "passage":
        files = min(args.files, total)
        # a folder of its own: Anserini would take every other .json in it for documents
        with atomic(out / "collection") as folder:
            for index in range(files):
                part = rows(total * index // files, total * (index + 1) // files)
                vectors_of = ((pid, dict(zip(t, w, strict=True))) for pid, t, w in part)
                # in ASCII: Java before 18 reads files in the locale's encoding
                documents = (json.dumps({"id": pid, "vector": v}) for pid, v in vectors_of)
                write_lines(folder / f"vectors-{index:02d}.jsonl", documents)
        facts["files"] = files
    else:
        too_long = []

        def topics() -> Iterator[str]:
            for qid, tokens, impacts in rows(0, total):
                if len(tokens) > CLAUSES:
                    too_long.append(qid)
                repeated = [" ".join([t] * w) for t, w in zip(tokens, impacts, strict=True)]
                yield f"{qid}\t{' '.join(repeated)}"

        write_lines(out / "queries.tsv", topics())
        # read as an integer, "007" would come back as 7, and more than 31 bits stop the search
        small = re.compile("0|[1-9][0-9]{0,8}")
        other = [qid for qid in vectors.ids(range(total)) if not small.fullmatch(qid)]
        facts |= {"topic_reader": "TsvString" if other else "TsvInt", "too_long": too_long}
        if other:
            problem = f"note: TsvInt takes integers only, {other[0]} is none"
            print(f"{problem} — search with -topicReader TsvString")
        if too_long:
            problem = f"{len(too_long)} queries have more than {CLAUSES} terms ({too_long[0]}, ...)"
            print(f"note: {problem} — Anserini leaves them out of the run, without an error")
    made = {"model": model, "factor": args.factor, "unknown": tokenizer.unk_token_id}
    write_json(out / "meta.json", {**made, "source": vectors.meta, **facts, **counts})
    kind = "passages" if vectors.meta["kind"] == "passage" else "queries"
    terms_each = f"{counts['impacts'] / total:.1f} terms each of {counts['weights'] / total:.1f}"
    largest = f"the largest impact {counts['largest']}"
    print(f"{total} {kind}, {terms_each} with a weight, {largest} -> {out}")


if __name__ == "__main__":
    run(main)
