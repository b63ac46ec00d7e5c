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

from lib.arguments import arg, parse_args
from lib.embeddings import Embeddings
from lib.files import UserError, atomic, read_json, write_json, write_lines
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
        100.0, group="export", above=0, help="a weight x is exported as rint(factor * x)"
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
        raise UserError(
            f"{tokenizer.name_or_path}: {len(tokenizer)} tokens where the vectors have {dim} "
            "columns — give the tokenizer of their checkpoint with --model"
        )
    names = [
        *tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        *[None] * (dim - len(tokenizer)),
    ]
    for column, name in enumerate(names):
        if not name or len(name) > LONGEST or any(c.isspace() or c < "!" for c in name):
            names[column] = f"[v{column}]"
    if len(set(names)) < dim:
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(
            f"{tokenizer.name_or_path}: two columns share the term {twice} — rename one in the "
            "tokenizer"
        )
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
        raise UserError(
            f"{args.embeddings}: dense vectors, not weights of terms — encode with a sparse "
            "checkpoint"
        )
    model = args.model or vectors.meta["model"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{model}: no tokenizer ({reason}) — give the folder of the checkpoint with --model"
        ) from error
    if tokenizer.unk_token_id is None:
        raise UserError(
            f"{model}: the tokenizer has no unknown token, which stands for an empty text — add one"
        )
    names, counts = terms(tokenizer, vectors.dim), Counter()
    source = {
        key: vectors.meta.get(key) for key in ("model_hash", "input_fingerprint", "kind", "count")
    }
    if claim_output(args, accelerator, "meta.json"):
        if read_json(out / "meta.json")["source"] != source:
            raise UserError(
                f"{out}: made from other embeddings than {args.embeddings} holds now — remove the "
                "folder"
            )
        return print(f"{out} is complete")

    def rows(start: int, stop: int) -> Iterator[tuple[str, list[str], list[int]]]:
        for first, block in vectors.blocks(start, stop, ROWS_AT_A_TIME):
            impacts = quantise(block, args.factor, tokenizer.unk_token_id)
            counts["weights"] += block.nnz
            counts["impacts"] += impacts.nnz
            counts["largest"] = max(counts["largest"], int(impacts.data.max()))
            ids, edges = vectors.ids(range(first, first + impacts.shape[0])), impacts.indptr
            for identifier, low, high in zip(ids, edges, edges[1:], strict=False):
                yield (
                    identifier,
                    names[impacts.indices[low:high]].tolist(),
                    impacts.data[low:high].tolist(),
                )

    total, facts = len(vectors), {}
    if vectors.meta["kind"] == "passage":
        files = min(args.files, total)
        # a folder of its own: Anserini would take every other .json in it for documents
        with atomic(out / "collection") as folder:
            for index in range(files):
                part = rows(total * index // files, total * (index + 1) // files)
                write_lines(  # in ASCII: Java before 18 reads files in the locale's encoding
                    folder / f"vectors-{index:02d}.jsonl",
                    (
                        json.dumps({"id": pid, "vector": dict(zip(t, w, strict=True))})
                        for pid, t, w in part
                    ),
                )
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
        other = [
            qid for qid in vectors.ids(range(total)) if not re.fullmatch("0|[1-9][0-9]{0,8}", qid)
        ]
        facts |= {"topic_reader": "TsvString" if other else "TsvInt", "too_long": too_long}
        if other:
            print(
                f"note: TsvInt takes integers only, {other[0]} is none — search with "
                "-topicReader TsvString"
            )
        if too_long:
            print(
                f"note: {len(too_long)} queries have more than {CLAUSES} terms ({too_long[0]}, "
                "...) — Anserini leaves them out of the run and ends without an error"
            )
    facts = (
        {"model": model, "factor": args.factor, "unknown": tokenizer.unk_token_id, "source": source}
        | facts
        | counts
    )
    write_json(out / "meta.json", facts)
    kind = "passages" if vectors.meta["kind"] == "passage" else "queries"
    print(
        f"{total} {kind}, {counts['impacts'] / total:.1f} terms each of "
        f"{counts['weights'] / total:.1f} with a weight, the largest impact {counts['largest']} "
        f"-> {out}"
    )


if __name__ == "__main__":
    run(main)
