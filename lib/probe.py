"""Does the bottleneck learn? Three numbers on fixed texts, while a pre-training runs, without any fine-tuning.

rebuild      how many of the tokens of a text its decoder predicts from the bottleneck alone, all context hidden. The
             floor is the share of the commonest token (about 0.05): a decoder that stays there gets by without it.
cosine       mean cosine of different texts. Near 1 all vectors point one way, whatever they hold (anisotropy).
recall@100   of queries that have met no training: positives found among a sample of passages, by dot product
"""

import random

import torch
from torch import Tensor

from lib.blocks import BlockCollator, Corpora
from lib.files import UserError, read_qrels
from lib.losses import spread
from lib.texts import open_texts

TEXTS, QUERIES, PASSAGES = 256, 200, 2_000  # drawn once, by the seed of the run
DEPTH, BATCH = 100, 32


class Probe:
    """Texts of the corpora, and with both files up to QUERIES judged queries and PASSAGES passages, the positives of
    the queries among them. The strings are held in memory (some megabytes). UserError: queries without a text, or
    positives that stand in no corpus."""

    def __init__(self, corpora: Corpora, collate: BlockCollator, queries=None, qrels=None):
        draw = random.Random(corpora.seed)
        self.collate = collate
        examples = draw.sample(range(len(corpora)), min(TEXTS, len(corpora)))
        self.texts = [part.strings(index, 0)[0] for part, index in map(corpora.place, examples)]
        self.queries = None
        if queries:
            self._read(corpora, open_texts(queries), read_qrels(qrels), draw, qrels)

    def _read(self, corpora, queries, qrels, draw, path) -> None:
        judged = {
            qid: {pid for pid, grade in grades.items() if grade > 0}
            for qid, grades in qrels.items()
        }
        judged = {qid: pids for qid, pids in judged.items() if pids}
        chosen = draw.sample(sorted(judged), min(QUERIES, len(judged)))
        rows = queries.rows(chosen)
        if not chosen or min(rows) < 0:
            raise UserError(
                f"{path}: no judged query, or one that {queries.source} lacks — give files that match"
            )
        found, passages = {}, {}  # pid -> its string, of positives and of all
        for part in corpora.parts.values():
            wanted = sorted(set().union(*(judged[qid] for qid in chosen)) - found.keys())
            places = zip(wanted, part.texts.rows(wanted).tolist(), strict=True)
            found |= {pid: part.whole(row) for pid, row in places if row >= 0}
            some = draw.sample(
                range(len(part.texts)), min(PASSAGES // len(corpora.parts), len(part.texts))
            )
            passages |= {part.texts.id(row): part.whole(row) for row in some}
        if not found:
            raise UserError(
                f"{path}: no positive of its queries is in the corpus — give the judgments of this corpus"
            )
        others = [pid for pid in passages if pid not in found][: max(PASSAGES - len(found), 0)]
        passages = {**found, **{pid: passages[pid] for pid in others}}
        place = {pid: column for column, pid in enumerate(passages)}
        self.queries, self.passages = [queries[row][1] for row in rows], [*passages.values()]
        self.positives = [[place[pid] for pid in judged[qid] if pid in place] for qid in chosen]

    def _batches(self, strings: list[str], device):
        """(rows, batch), the longest texts first."""
        order = sorted(range(len(strings)), key=lambda row: -len(strings[row]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = self.collate([(0, [strings[row]], 0, row) for row in rows])
            yield (
                rows,
                {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()},
            )

    @torch.no_grad()
    def __call__(self, model, device) -> dict[str, float]:
        """model: an objective of lib/objectives.py, not wrapped; it is in eval mode meanwhile."""
        training = [part for part in model.modules() if part.training]
        model.eval()
        reps, labels, correct = [], 0, 0
        for _, batch in self._batches(self.texts, device):
            reps.append(model.represent(batch).float())
            term = model.rebuild(batch)
            if term:
                labels, correct = labels + term.labels, correct + int(term.correct)
        values = {"probe_rebuild": correct / labels} if labels else {}
        values["probe_cosine"] = spread(torch.cat(reps))[1].item()
        if self.queries:
            q_reps = torch.empty(0)
            for rows, batch in self._batches(self.queries, device):
                reps = model.represent(batch).float()
                q_reps = q_reps if len(q_reps) else reps.new_empty(len(self.queries), reps.shape[1])
                q_reps[rows] = reps
            scores = q_reps.new_empty(len(self.queries), len(self.passages))
            for rows, batch in self._batches(self.passages, device):
                p_reps = model.represent(batch).float()
                with torch.autocast(device.type, enabled=False):
                    scores[:, rows] = q_reps @ p_reps.T
            best = scores.topk(min(DEPTH, scores.shape[1])).indices.tolist()
            recalls = [
                len({*top} & {*pids}) / len(pids)
                for top, pids in zip(best, self.positives, strict=True)
                if pids
            ]
            values["probe_recall@100"] = sum(recalls) / len(recalls)
        for part in training:
            part.training = True
        return values
