"""Sparse vectors of queries without a model: a weight for each distinct token ("inference-free"
retrieval: arXiv 2411.04403, 2504.14839; code `opensearch-sparse-model-tuning-sample`).

B queries, L tokens of the longest, V vocabulary, N passages."""

from itertools import islice

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from lib.lines import UserError
from lib.text import TextFormat, format_texts, to_ids
from lib.texts import Texts

# AdamW moves a parameter by about the learning rate. A weight is a parameter times this: at a rate
# of 2e-5, which suits the model, it moves by 1e-3.
RATE = 50.0
PASSAGES_AT_A_TIME = 4096


class QueryTable(nn.Module):
    """weights: (V,)   ordinary: (V,) bool, False for special tokens, whose weight is 0
    learned: whether training changes the weights"""

    def __init__(self, weights: Tensor, ordinary: Tensor, learned: bool):
        super().__init__()
        self.scaled = nn.Parameter(weights.float() / RATE, requires_grad=learned)
        self.register_buffer("ordinary", ordinary, persistent=False)

    @property
    def learned(self) -> bool:
        return self.scaled.requires_grad

    @property
    def weights(self) -> Tensor:
        """(V,), 0 or more."""
        return (self.scaled * RATE).relu() * self.ordinary

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L), (B, L) 1 = keep -> (B, V)"""
        present = torch.zeros(len(ids), len(self.scaled), device=ids.device)
        return present.scatter_(1, ids, mask.float()) * self.weights

    def rows(self, tokens: np.ndarray, lengths: np.ndarray) -> csr_matrix:
        """The same (n, V) of n queries whose tokens stand one behind the other, without a dense
        row. tokens: (sum of lengths,)   lengths: (n,)"""
        weights = self.weights.detach().cpu().numpy()
        query = np.repeat(np.arange(len(lengths)), lengths)
        query, term = np.divmod(np.unique(query * len(weights) + tokens), len(weights))
        vectors = csr_matrix((weights[term], (query, term)), shape=(len(lengths), len(weights)))
        vectors.eliminate_zeros()
        return vectors


def use_query_table(model: nn.Module, weights: str, corpus: Texts) -> None:
    """Let a table encode the queries of a SparseBiEncoder. weights: "table", those that it has, or
    1, to be learned; or "idf", those of the corpus. UserError: the model is a dense one."""
    if not hasattr(model, "make_table"):
        raise UserError("--query_encoder: it is for sparse vectors — add --head sparse")
    if weights == "idf":
        idf = inverse_document_frequency(corpus, model.format, model.tokenizer, model.dim)
        model.query_table = model.make_table(idf, learned=False)
    elif model.query_table is None:
        model.query_table = model.make_table(torch.ones(model.dim), learned=True)
    else:
        model.query_table.scaled.requires_grad_()


def inverse_document_frequency(corpus: Texts, form: TextFormat, tokenizer, size: int) -> Tensor:
    """(size,) weights of terms, ln(1 + (N - n + 0.5) / (n + 0.5)), where n of the N passages have
    the term, cut as the encoder reads them; 1 for a term of none, as in the official tables."""
    counts = np.zeros(size, dtype=np.int64)
    rows = corpus.stream()
    while block := [(titles, text) for _, titles, text in islice(rows, PASSAGES_AT_A_TIME)]:
        strings = format_texts(block, "passage", form, tokenizer)
        for ids in to_ids(strings, tokenizer, form.max_passage_length):
            counts[np.unique(ids)] += 1
    idf = np.log1p((len(corpus) - counts + 0.5) / (counts + 0.5))
    return torch.from_numpy(np.where(counts > 0, idf, 1.0)).float()
