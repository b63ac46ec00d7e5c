"""What the loaders of the two training scripts yield. Text becomes ids here, in the workers; every draw is a function
of (seed, step, row)."""

from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from lib.dist import world
from lib.files import UserError, read_qrels, read_run
from lib.groups import GroupCollator, length_chunks
from lib.metrics import mrr_at_k
from lib.texts import Texts, known_rows, open_texts


# development set: candidates to re-rank while training
def open_dev(
    corpus: Texts | None, queries_path, qrels_path, candidates_path, wanted
) -> tuple | None:
    """(queries, qrels, candidates) of a development set: the judgments, and the passages to re-rank for judged
    queries; None if there is none, and it is not wanted.
    UserError: a file is missing, an id has no text, or no judged query has candidates."""
    files = queries_path, qrels_path, candidates_path
    if not any(files) and not wanted:
        return None
    if not all(files) or corpus is None:
        raise UserError(
            "the development set is incomplete — give --dev_queries, --dev_qrels, --dev_candidates and --corpus"
        )
    queries = open_texts(queries_path)
    qrels = read_qrels(qrels_path)
    candidates = {
        qid: entry.pids for qid, entry in read_run(candidates_path).items() if qid in qrels
    }
    if not candidates:
        raise UserError(
            f"{candidates_path}: no query of {qrels_path} is in it — give the candidates of these queries"
        )
    known_rows(queries, list(candidates), candidates_path, "query")
    for qid, pids in candidates.items():
        known_rows(corpus, pids, candidates_path, "passage", qid)
    return queries, qrels, candidates


@torch.no_grad()
def rerank(
    encoder: Callable,
    device,
    collate: GroupCollator,
    queries: Texts,
    candidates: dict,
    k: int,
    at_once: int = 25_000,
) -> dict:
    """{qid: the best k of its candidates by dot product, that of their best chunk where they have several, best
    first}; ties keep the order of the candidates. encoder(query, passage) -> (q_reps, p_reps), either side None. As
    many queries at a time as have about `at_once` candidates, each of which is encoded once for them: memory does not
    grow with the number of queries."""
    ranked, qids, corpus = {}, list(candidates), collate.groups.corpus
    size = max(at_once // max(map(len, candidates.values()), default=1), 1)

    def reps(side: int, texts: list) -> Tensor:
        kind = ("query", "passage")[side]
        chunks, order = length_chunks(kind, texts, collate.form, collate.tokenizer, chunk_rows=64)
        found = []
        for chunk in chunks:
            chunk = {name: values.to(device) for name, values in chunk.items()}
            found.append(encoder(*((chunk, None), (None, chunk))[side])[side].float().cpu())
        return torch.cat(found)[order]

    for start in tqdm(range(0, len(qids), size), "dev", leave=False, disable=world()[0] > 0):
        block = qids[start : start + size]
        pids = sorted({pid for qid in block for pid in candidates[qid]})
        place = {pid: row for row, pid in enumerate(pids)}
        q_reps = reps(0, [queries[row] for row in queries.rows(block)])
        p_reps = reps(1, [corpus[row] for row in corpus.rows(pids)]).unflatten(
            0, (len(pids), -1)
        )  # (n, M, D)
        for qid, q in zip(block, q_reps, strict=True):
            scores = (p_reps[[place[pid] for pid in candidates[qid]]] @ q).amax(1)
            ranked[qid] = [
                candidates[qid][i] for i in scores.argsort(descending=True, stable=True)[:k]
            ]
    return ranked


def dev_mrr(
    accelerator,
    model,
    collate,
    queries: Texts,
    qrels: dict,
    candidates: dict,
    k: int = 10,
    at_once: int = 25_000,
) -> float:
    """MRR@k of the candidates re-ranked by the model as it stands, each process its share of the queries; judged
    queries without candidates count 0."""
    rank, W = accelerator.process_index, accelerator.num_processes
    mine = {qid: candidates[qid] for qid in sorted(candidates)[rank::W]}
    encoder = accelerator.unwrap_model(model).eval()
    parts = gather_object([rerank(encoder, accelerator.device, collate, queries, mine, k, at_once)])
    model.train()
    return mrr_at_k({qid: pids for part in parts for qid, pids in part.items()}, qrels, k)
