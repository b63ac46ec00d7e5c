"""Losses: pure functions of scores and tensors, in fp32.

Legend: B queries per device, P passages per query (the positive first, then its negatives), W processes,
N = W·B·P passages scored. scores (B, N) = q_reps @ p_reps.T / temperature: local queries, passages of all processes.
positives (B,) = the column that answers each query, (rank·B + i)·P. mask (B, N) bool, True = the column counts.
Contrastive losses come per query, (B,): the caller takes the mean, or weights them. The mean over the B local queries,
averaged over processes by DDP, is the mean over the batch of the whole world.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# which columns count


def candidate_mask(positives: Tensor, filler: Tensor, passage_keys: Tensor, positive_keys: Tensor | None) -> Tensor:
    """(B, N) bool: True where a passage counts as a candidate for a query.

    positives: (B,) column of each query's own positive    filler: (N,) bool, True = stands in for a missing negative
    passage_keys: (N,) int64, equal for equal texts    positive_keys: (B, M) int64, the keys of all judged positives of
    each query, padded by repeating one; None = mask the fillers only, as the papers do
    A column that holds another judged positive of the query, or its own positive a second time (a batch may hold a
    passage several times), is no negative and is masked. The query's own positive always counts.
    Example: passages a b a c; a query answered by column 0 and judged {a, c} -> True True False False."""
    mask = ~filler.expand(len(positives), -1)
    if positive_keys is not None:
        for keys in positive_keys.unbind(1):  # M comparisons of (B, N), never a (B, N, M) tensor
            mask = mask & (passage_keys != keys[:, None])
    return mask.scatter(1, positives[:, None], True)


def own_group(positives: Tensor, num_columns: int, passages_per_query: int) -> Tensor:
    """(B, N) bool: True for the P columns of each query's own group, which begins at its positive."""
    offset = torch.arange(num_columns, device=positives.device) - positives[:, None]
    return (offset >= 0) & (offset < passages_per_query)


# ---------------------------------------------------------------------------------------------------------------------
# contrastive losses


def info_nce(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """Softmax cross-entropy of each query over its candidates: DPR (arXiv 2004.04906), across processes.

    loss_i = -log( exp(s[i, positives[i]]) / sum_{j: mask[i, j]} exp(s[i, j]) )
    scores: (B, N)   positives: (B,)   mask: (B, N), True = counts   ->   (B,)
    Example: scores [2, 0], positive 0 -> 0.1269; with column 1 masked -> 0.
    Does not normalise and knows no temperature: both belong to the scores."""
    assert scores.shape == mask.shape and positives.shape == scores.shape[:1]
    return F.cross_entropy(scores.float().masked_fill(~mask, float("-inf")), positives, reduction="none")


def triplet_nll(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of (query, positive, negative), mean over a query's negatives: ANCE (arXiv 2007.00808).

    loss_i = mean_{j: mask[i, j], j != positives[i]} softplus(s[i, j] - s[i, positives[i]]);  0 without a negative
    scores: (B, N)   positives: (B,)   mask: (B, N), True = counts   ->   (B,)
    Pass `mask & own_group(...)`: this loss uses no in-batch negatives.
    Example: positive 2, negatives 0 and 3 -> (softplus(-2) + softplus(1)) / 2 = (0.1269 + 1.3133) / 2 = 0.7201.
    With one negative it is -log softmax([s_pos, s_neg])[0]. A query of few negatives weighs as much as any other."""
    assert scores.shape == mask.shape and positives.shape == scores.shape[:1]
    negatives = mask.scatter(1, positives[:, None], False)
    scores = scores.float()
    terms = F.softplus(scores - scores.gather(1, positives[:, None])).masked_fill(~negatives, 0.0)
    return terms.sum(1) / negatives.sum(1).clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# numbers for the log


def in_batch_accuracy(scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
    """Fraction of queries whose positive outscores every other candidate that counts (a tie is a miss) -> scalar."""
    others = scores.masked_fill(~mask.scatter(1, positives[:, None], False), float("-inf"))
    return (scores.gather(1, positives[:, None])[:, 0] > others.amax(1)).float().mean()


def spread(reps: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over dimensions of the standard deviation, mean cosine of different rows) of (n, D), n >= 2.
    A collapsed encoder shows std -> 0 and cosine -> 1."""
    reps = reps.detach().float()
    n, total = len(reps), F.normalize(reps, dim=-1).sum(0)
    return reps.std(0, correction=0).mean(), (total @ total - n) / max(n * (n - 1), 1)
