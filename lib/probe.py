"""Does the bottleneck learn? Three numbers on fixed texts, during pre-training.

rebuild      share of a text's tokens that the decoder predicts from the bottleneck alone. At the
             share of the commonest token (about 0.05) it does not use the bottleneck.
cosine       mean cosine of different texts. Near 1, all vectors point one way (anisotropy).
recall@100   share of the positives of queries among the 100 best of a sample of passages
"""

import random

import torch
from accelerate.utils import send_to_device

from lib.blocks import Corpora
from lib.files import UserError, read_positives
from lib.losses import spread
from lib.texts import open_texts, require_rows

TEXTS, QUERIES, PASSAGES = 256, 200, 2_000  # maximum numbers, drawn by the seed of the run
DEPTH, BATCH = 100, 32


class Probe:
    """Texts of the corpora and, with both files, judged queries and passages with their positives.
    UserError: a query without a text, or no positive in the corpora."""

    def __init__(self, corpora: Corpora, collate, queries=None, qrels=None):
        draw = random.Random(corpora.seed)
        self.collate = collate
        examples = draw.sample(range(len(corpora)), min(TEXTS, len(corpora)))
        texts = [part.strings(index, 0)[0] for part, index in map(corpora.place, examples)]
        self.texts = sorted(texts, key=len, reverse=True)  # batches of similar lengths
        self.queries = []
        if queries:
            self._read(corpora, open_texts(queries), qrels, draw)

    def _read(self, corpora: Corpora, queries, qrels, draw: random.Random) -> None:
        judged = read_positives(qrels)
        chosen = draw.sample(sorted(judged), min(QUERIES, len(judged)))
        rows = require_rows(queries, chosen, qrels, "query")
        self.queries = [queries[row][1] for row in rows]
        wanted = sorted(set().union(*(judged[qid] for qid in chosen)))
        passages = {}  # pid -> string, the positives first
        for part in corpora.parts:
            places = zip(wanted, part.texts.rows(wanted).tolist(), strict=True)
            passages |= {pid: part.whole(row) for pid, row in places if row >= 0}
        if not passages:
            raise UserError(f"{qrels}: no positive is in the corpus — give other files")
        for part in corpora.parts:
            count = min(PASSAGES // len(corpora.parts), len(part.texts))
            for row in draw.sample(range(len(part.texts)), count):
                passages.setdefault(part.texts.id(row), part.whole(row))
        pids = sorted([*passages][:PASSAGES], key=lambda pid: len(passages[pid]), reverse=True)
        self.passages = [passages[pid] for pid in pids]
        self.positives = [{at for at, pid in enumerate(pids) if pid in judged[q]} for q in chosen]

    def _batches(self, strings: list[str], device):
        for start in range(0, len(strings), BATCH):
            items = [(0, [string], 0, 0) for string in strings[start : start + BATCH]]
            yield send_to_device(self.collate(items), device)

    @torch.no_grad()
    def __call__(self, model, device) -> dict[str, float]:
        """model: an objective of lib/objectives.py, not wrapped; it is in eval mode meanwhile."""
        training = [part for part in model.modules() if part.training]
        model.eval()
        reps, terms = [], []
        for batch in self._batches(self.texts, device):
            reps.append(model.represent(batch).float())
            terms.append(model.rebuild(batch))
        values = {"probe_cosine": spread(torch.cat(reps))[1].item()}
        if labels := sum(term.labels for term in terms if term):
            values["probe_rebuild"] = sum(int(term.correct) for term in terms) / labels
        if self.queries:
            values["probe_recall@100"] = self._recall(model, device)
        for part in training:
            part.training = True
        return values

    def _recall(self, model, device) -> float:
        queries = self._batches(self.queries, device)
        q_reps = torch.cat([model.represent(batch).float() for batch in queries])
        scores = []
        for batch in self._batches(self.passages, device):
            p_reps = model.represent(batch).float()  # of sparse models, too wide to keep all
            with torch.autocast(device.type, enabled=False):
                scores.append(q_reps @ p_reps.T)
        scores = torch.cat(scores, 1)
        best = scores.topk(min(DEPTH, scores.shape[1])).indices.tolist()
        pairs = zip(best, self.positives, strict=True)
        recalls = [len(pids.intersection(top)) / len(pids) for top, pids in pairs if pids]
        return sum(recalls) / len(recalls)
