"""The development set of a training run: candidates of judged queries, re-ranked by the model as it
stands."""

import json

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from tqdm import tqdm

from lib.dist import world
from lib.files import UserError, positives, read_qrels, read_run
from lib.groups import GroupCollator, TrainingFile, pair_keys
from lib.metrics import mrr_at_k
from lib.texts import Texts, open_texts, require_rows

NUMBERS = 2**25  # of the vectors held at a time, 128 MB


def describe_best(folder, scores: dict[int, float]) -> str:
    """What `folder` holds when training ends. scores: MRR@10 at each evaluated step; step 0 is the
    model as it came."""
    best = max(scores, key=scores.get)  # of equals the first
    what = f"the model of step {best}" if best else "THE MODEL AS IT CAME (step 0)"
    steps = dict.fromkeys((0, best, max(scores)))
    shown = ", ".join(f"{scores[step]:.4f} at step {step}" for step in steps)
    why = "" if best else "; training has not improved it"
    return f"{folder} holds {what}, the best on the development set: MRR@10 {shown}{why}"


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

    def notes(self, file: TrainingFile) -> dict[str, str]:
        """What the echo says: how many of the judged pairs are also trained on, by their texts."""
        pairs = [(qid, pid) for qid, pids in positives(self.qrels).items() for pid in pids]
        queries = self.queries.rows([qid for qid, _ in pairs])
        passages = self.corpus.rows([pid for _, pid in pairs])
        keys = pair_keys(self.queries.text_keys[queries], self.corpus.text_keys[passages])
        known = (queries >= 0) & (passages >= 0)
        shared = int(np.isin(keys[known], file.positive_pairs()).sum())
        note = f"; NOTE: {shared} of its {len(pairs)} relevant pairs are also trained on, so MRR@10"
        note += " is too high: keep its queries out of --train"
        return {"development set": f"{len(self.candidates)} queries{note if shared else ''}"}

    @property
    def fingerprint(self) -> str:
        """Of queries, judgments and candidates."""
        content = json.dumps([self.queries.fingerprint, self.qrels, self.candidates])
        return xxhash.xxh3_128_hexdigest(content.encode())

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
