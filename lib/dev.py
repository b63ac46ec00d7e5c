"""The development set of a training run: candidates of judged queries, re-ranked by the model as it
stands."""

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from tqdm import tqdm

from lib.dist import world
from lib.files import UserError, read_qrels, read_run
from lib.groups import GroupCollator
from lib.metrics import mrr_at_k
from lib.texts import Texts, open_texts, require_rows

NUMBERS = 2**25  # of the vectors held at a time, 128 MB


def open_dev_set(queries_path, qrels_path, candidates_path, corpus: Texts) -> "DevSet | None":
    """None if no file is given. UserError: some files are given, and others not."""
    paths = [queries_path, qrels_path, candidates_path]
    if not any(paths):
        return None
    if not all(paths):
        remedy = "give --dev_queries, --dev_qrels and --dev_candidates"
        raise UserError(f"the development set is incomplete — {remedy}")
    return DevSet(queries_path, qrels_path, candidates_path, corpus)


class DevSet:
    """Queries, their judgments, and the passages to re-rank for each judged query. UserError: an id
    has no text, or no judged query has candidates."""

    def __init__(self, queries_path, qrels_path, candidates_path, corpus: Texts):
        self.queries = open_texts(queries_path)
        self.corpus = corpus
        self.qrels = read_qrels(qrels_path)
        listed = read_run(candidates_path)
        self.candidates = {q: one.pids for q, one in listed.items() if q in self.qrels}
        if not self.candidates:
            raise UserError(f"{candidates_path}: no query of {qrels_path} — give its candidates")
        require_rows(self.queries, list(self.candidates), candidates_path, "query")
        for pids in self.candidates.values():
            require_rows(corpus, pids, candidates_path, "passage")

    def mrr(self, accelerator, model, collate: GroupCollator, k: int = 10) -> float:
        """MRR@k over all judged queries; those without candidates count 0. Each process ranks its
        share."""
        mine = sorted(self.candidates)[accelerator.process_index :: accelerator.num_processes]
        encoder = accelerator.unwrap_model(model).eval()
        parts = gather_object([self.rerank(encoder, collate, mine, k)])
        model.train()
        ranked = {qid: pids for part in parts for qid, pids in part.items()}
        return mrr_at_k(ranked, self.qrels, k)

    @torch.no_grad()
    def rerank(self, encoder, collate: GroupCollator, qids: list, k: int) -> dict[str, list[str]]:
        """{qid: the best k of its candidates, best first} by the dot product of their best chunk;
        ties keep the order of the candidates. As many queries at a time as memory for their
        candidates allows, each candidate encoded once for them."""
        ranked = {}
        most = max(map(len, self.candidates.values()))
        size = max(NUMBERS // encoder.dim // most, 1)
        for start in tqdm(range(0, len(qids), size), "dev", leave=False, disable=world()[0] > 0):
            block = qids[start : start + size]
            pids = sorted({pid for qid in block for pid in self.candidates[qid]})
            place = {pid: row for row, pid in enumerate(pids)}
            q_reps = self._encode(encoder, collate, "query", self.queries, block)
            p_reps = self._encode(encoder, collate, "passage", self.corpus, pids)
            p_reps = p_reps.unflatten(0, (len(pids), -1))  # (n, M, D)
            for qid, q in zip(block, q_reps, strict=True):
                own = self.candidates[qid]
                scores = (p_reps[[place[pid] for pid in own]] @ q).amax(1)
                best = scores.argsort(descending=True, stable=True)[:k]
                ranked[qid] = [own[i] for i in best]
        return ranked

    @staticmethod
    def _encode(encoder, collate, kind: str, texts: Texts, ids: list[str]) -> Tensor:
        side = collate.encoder_input(kind, [texts[row] for row in texts.rows(ids)])
        device = next(encoder.parameters()).device
        chunks = (send_to_device(chunk, device) for chunk in side["chunks"])
        reps = [encoder.encode(chunk, kind).float().cpu() for chunk in chunks]
        return torch.cat(reps)[side["order"]]
