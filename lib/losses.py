"""Losses: pure functions of scores and tensors, in fp32.

Legend: B queries per device, P passages per query (the positive first, then its negatives), W
processes, N = W·B·P passages scored. scores (B, N) = q_reps @ p_reps.T / temperature: local
queries, passages of all processes. positives (B,) = the column that answers each query, (rank·B +
i)·P. mask (B, N) bool, True = the column counts. Losses come per query, (B,). The mean over the B
local queries, averaged over processes by DDP, is the mean over the batch of the whole world."""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lib.dist import all_gather, all_gather_with_grad, world
from lib.files import UserError

# ---- scores, and which columns count


def score_batch(
    batch: dict, q_reps: Tensor, p_reps: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Local queries against the passages of all processes -> scores (B, N), positives (B,), mask
    (B, N).

    batch: of lib/groups.py    q_reps: (B, D)    p_reps: (B·P·M, D), query-major
    The score of a passage is that of its best chunk. Raises an AssertionError if a label does not
    point at its positive."""
    B = len(q_reps)
    mine = torch.stack([batch["passage_rows"], batch["passage_keys"]], 1)
    rows, keys = all_gather(mine).unbind(1)  # (N,) each
    P = len(mine) // B
    positives = (world()[0] * B + torch.arange(B, device=q_reps.device)) * P
    assert torch.equal(rows[positives], batch["positive_rows"]), "a label misses its positive"
    scores = q_reps @ all_gather_with_grad(p_reps).T / temperature  # (B, N·M)
    scores = scores.unflatten(1, (len(rows), -1)).amax(2)  # (B, N)
    return scores, positives, candidate_mask(positives, rows < 0, keys, batch["positive_keys"])


def candidate_mask(
    positives: Tensor, filler: Tensor, passage_keys: Tensor, positive_keys: Tensor
) -> Tensor:
    """(B, N) bool: True where a passage counts as a candidate for a query.

    filler         (N,) bool, True = stands in for a missing negative
    passage_keys   (N,) int64, equal for equal texts
    positive_keys  (B, K) int64, the keys of all positives of each query, padded by repeating one

    A column that holds another positive of the query, or its own positive a second time, is no
    negative and is masked. The query's own positive always counts. Example: passages a b a c; a
    query answered by column 0, with the positives {a, c} -> True True False False."""
    mask = ~filler.expand(len(positives), -1)
    for keys in positive_keys.unbind(1):  # K comparisons of (B, N), never a (B, N, K) tensor
        mask = mask & (passage_keys != keys[:, None])
    return mask.scatter(1, positives[:, None], True)


def own_group(positives: Tensor, num_columns: int, passages_per_query: int) -> Tensor:
    """(B, N) bool: True for the P columns of each query's own group."""
    offset = torch.arange(num_columns, device=positives.device) - positives[:, None]
    return (offset >= 0) & (offset < passages_per_query)


# ---- contrastive losses


def info_nce(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """Softmax cross-entropy of each query over its candidates: DPR (arXiv 2004.04906).

    loss_i = -log( exp(s[i, positives[i]]) / sum_{j: mask[i, j]} exp(s[i, j]) )
    scores: (B, N)   positives: (B,)   mask: (B, N)   ->   (B,)
    Example: scores [2, 0], positive 0 -> 0.1269; with column 1 masked -> 0."""
    scores = scores.float().masked_fill(~mask, float("-inf"))
    return F.cross_entropy(scores, positives, reduction="none")


def triplet_nll(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of (query, positive, negative), mean over a query's negatives: ANCE
    (arXiv 2007.00808). Pass `mask & own_group(...)`: it uses no in-batch negatives.

    loss_i = mean_{j: mask[i, j], j != positives[i]} softplus(s[i, j] - s[i, positives[i]]),
    or 0 without a negative
    scores: (B, N)   positives: (B,)   mask: (B, N)   ->   (B,)
    Example: positive 2, negatives 0 and 3 -> (softplus(-2) + softplus(1)) / 2 = 0.7201."""
    negatives = mask.scatter(1, positives[:, None], False)
    scores = scores.float()
    terms = F.softplus(scores - scores.gather(1, positives[:, None])).masked_fill(~negatives, 0.0)
    return terms.sum(1) / negatives.sum(1).clamp(min=1)


# ---- distillation: over the own group of each query, for which alone the teacher has scores


def kl_divergence(scores: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(scores)): LexMAE stage 3, RetroMAE's distillation.

    loss_i = sum_{j: mask[i, j]} t_j (log t_j - log s_j), both softmaxes over the columns that count
    scores, teacher, mask: (B, P)   ->   (B,)
    Its mean over queries is KLDivLoss("batchmean"), LexMAE's; RetroMAE's "mean" is 1/P of it.
    Example: scores [0, 0], teacher [log 3, 0] -> 0.75 log 1.5 + 0.25 log 0.5 = 0.1308."""
    s = scores.float().masked_fill(~mask, float("-inf")).log_softmax(1)
    t = teacher.float().masked_fill(~mask, float("-inf")).log_softmax(1)
    return (t.exp() * (t - s).masked_fill(~mask, 0.0)).sum(1)


def margin_mse(scores: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared difference of the margins between positive and negatives: arXiv 2010.02666.

    loss_i = mean_{j > 0: mask[i, j]} ((s_0 - s_j) - (t_0 - t_j))^2;  0 without a negative
    scores, teacher, mask: (B, P), the positive first   ->   (B,)
    Example: scores [5, 3], teacher [9, 6] -> (2 - 3)^2 = 1."""
    gap = scores.float() - teacher.float()
    terms = (gap[:, :1] - gap).square().masked_fill(~mask, 0.0)[:, 1:]
    return terms.sum(1) / mask[:, 1:].sum(1).clamp(min=1)


def distillation(scores: Tensor, positives: Tensor, mask: Tensor, teacher: Tensor) -> dict:
    """Both losses, by name, over the own groups. scores, mask: (B, N)   teacher: (B, P)"""
    own = positives[:, None] + torch.arange(teacher.shape[1], device=positives.device)  # (B, P)
    student = scores.gather(1, own)
    keep = mask.gather(1, own)
    return {
        "kl": kl_divergence(student, teacher, keep),
        "margin_mse": margin_mse(student, teacher, keep),
    }


# ---- sparse vectors


def flops(reps: Tensor, counts: Tensor) -> Tensor:
    """FLOPS regulariser (arXiv 2004.05665, as SPLADE and LexMAE use it): sum_v (mean_n x[n, v])^2.

    reps: (n, V) >= 0   counts: (n,) bool, False = a filler   ->   scalar, the same on every process
    The mean runs over the batch of all processes; squaring comes after it."""
    local = (reps.float() * counts[:, None]).sum(0, keepdim=True)
    total = all_gather_with_grad(local).sum(0)  # (V,)
    return (total / all_gather(counts.sum()[None]).sum().clamp(min=1)).square().sum()


def sparsity(q_reps: Tensor, p_reps: Tensor, real: Tensor) -> dict[str, Tensor]:
    """FLOPS and mean numbers of terms of queries (B, V), and of passages (B·P, V) of which `real`
    (B·P,) bool count; and how many terms a query shares with its positive."""
    q, p = q_reps > 0, p_reps > 0
    return {
        "q_flops": flops(q_reps, torch.ones_like(real[: len(q_reps)])),
        "p_flops": flops(p_reps, real),
        "q_terms": q.sum(1).float().mean(),
        "p_terms": p[real].sum(1).float().mean(),
        "shared_terms": (q & p[:: len(p) // len(q)]).sum(1).float().mean(),
    }


def stop_on_collapse(step: int, values: dict[str, float], vocabulary: int, settled: bool) -> None:
    """UserError if the sparse vectors of a log line are nearly empty, or still dense once learning
    rate and regulariser have `settled` at their full size. A warning if all texts are alike."""
    if settled and max(values["q_cosine"], values["p_cosine"]) > 0.95:
        tqdm.write("warning: different texts have a mean cosine above 0.95 — a collapse")
    if "q_terms" not in values:
        return
    q_terms, p_terms = values["q_terms"], values["p_terms"]
    found = f"step {step}: {q_terms:.1f} terms per query, {p_terms:.1f} per passage"
    if min(q_terms, p_terms) < 1:
        raise UserError(f"{found}, nearly empty — lower --flops_passages and --flops_queries")
    if settled and max(q_terms, p_terms) > vocabulary / 2:
        raise UserError(f"{found}, still dense — raise --flops_passages or --learning_rate")


# ---- numbers for the log


def in_batch_accuracy(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """Fraction of queries whose positive outscores every other candidate (a tie is a miss)."""
    others = scores.detach().masked_fill(~mask.scatter(1, positives[:, None], False), float("-inf"))
    return (scores.gather(1, positives[:, None])[:, 0] > others.amax(1)).float().mean()


def spread(reps: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over dimensions of the standard deviation, mean cosine of different rows) of (n, D), n
    >= 2. A collapsed encoder shows std -> 0 and cosine -> 1."""
    reps = reps.detach().float()
    n, total = len(reps), F.normalize(reps, dim=-1).sum(0)
    return reps.std(0, correction=0).mean(), (total @ total - n) / max(n * (n - 1), 1)


def spreads(q_reps: Tensor, p_reps: Tensor, real: Tensor) -> dict[str, Tensor]:
    """`spread` of queries (B, D), and of passages (B·P·M, D), of which `real` (B·P,) count."""
    q_std, q_cosine = spread(q_reps)
    p_std, p_cosine = spread(p_reps[real.repeat_interleave(len(p_reps) // len(real))])
    return {"q_std": q_std, "q_cosine": q_cosine, "p_std": p_std, "p_cosine": p_cosine}
