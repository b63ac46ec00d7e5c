"""The weak decoders: each rebuilds a text from the bottleneck vector h and as much context as its objective leaves it.

Legend: B texts, L tokens of the longest, T positions of a shifted text, D hidden size, n positions that have a label.
h (B, D) = the bottleneck. `places` (n,) index the flat (B·L) positions: what no label needs is not computed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lib.cpu import attention


class Sizes(NamedTuple):
    """What a decoder takes from the encoder's config, whose names differ by architecture."""

    hidden: int
    heads: int
    inner: int
    positions: int
    dropout: float
    attention_dropout: float
    activation: str
    eps: float
    std: float  # of new weights


def sizes_of(config) -> Sizes:
    bert = config.model_type != "distilbert"  # which names the same things otherwise
    return Sizes(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size if bert else config.hidden_dim,
        config.max_position_embeddings,
        config.hidden_dropout_prob if bert else config.dropout,
        config.attention_probs_dropout_prob if bert else config.attention_dropout,
        config.hidden_act if bert else config.activation,
        config.layer_norm_eps if bert else 1e-12,
        config.initializer_range,
    )


def initialize(module: nn.Module, std: float) -> None:
    """New weights as BERT's: N(0, std), biases 0, norms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class TwoStreamLayer(nn.Module):
    """A BERT layer whose queries and keys may come from different streams, with the residual on the QUERY stream: by
    the other one a token would reach its own prediction past RetroMAE's mask. That holds for depth one only: a second
    layer would see token i through its neighbours. With one stream for both it is BERT's layer."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, self.heads, self.attention_dropout = sizes.hidden, sizes.heads, sizes.attention_dropout
        self.dropout, self.activation = nn.Dropout(sizes.dropout), ACT2FN[sizes.activation]
        self.query, self.key, self.value, self.attention_output = (
            nn.Linear(D, D) for _ in range(4)
        )
        self.up, self.down = nn.Linear(D, sizes.inner), nn.Linear(sizes.inner, D)
        self.attention_norm, self.output_norm = (nn.LayerNorm(D, eps=sizes.eps) for _ in range(2))
        initialize(self, sizes.std)

    def forward(self, queries: Tensor, keys: Tensor, view: Tensor, places: Tensor) -> Tensor:
        """queries, keys: (B, L, D)   view: (B, L or 1, L) bool, True = visible   places: (n,)   ->   (n, D).
        All rows attend (one product), but only those at `places` go on: padding costs no feed-forward."""
        B, L, D = queries.shape
        q, k, v = (
            layer(x).view(B, L, self.heads, -1).transpose(1, 2)  # (B, heads, L, D / heads)
            for layer, x in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        dropout = self.attention_dropout if self.training else 0.0
        x = attention(q, k, v, view[:, None], dropout)
        x = x.transpose(1, 2).reshape(B * L, D)[places]
        x = self.attention_norm(
            self.dropout(self.attention_output(x)) + queries.flatten(0, 1)[places]
        )
        return self.output_norm(self.dropout(self.down(self.activation(self.up(x)))) + x)


class SlotDecoder(nn.Module):
    """A few BERT layers over [slot 0 ; rest]. What stands in the slot and where the rest comes from makes the method:
    the lexicon bottleneck and masked embeddings (LexMAE), h and masked embeddings (SimLM), h and the states of a
    middle layer (Condenser)."""

    def __init__(self, sizes: Sizes, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(TwoStreamLayer(sizes) for _ in range(num_layers))

    def forward(self, slot: Tensor, rest: Tensor, attention_mask: Tensor, places: Tensor) -> Tensor:
        """slot: (B, D)   rest: (B, L, D), of which position 0 is not read   attention_mask: (B, L), 1 = keep
        places: (n,)   ->   (n, D)"""
        x, view = torch.cat([slot[:, None], rest[:, 1:]], 1), attention_mask.bool()[:, None]
        everywhere = torch.arange(attention_mask.numel(), device=x.device)
        for layer in self.layers[:-1]:
            x = layer(x, x, view, everywhere).view_as(x)
        return self.layers[-1](x, x, view, places)


class CausalDecoder(nn.Module):
    """SEED-Encoder's weak decoder (arXiv 2102.09206; `TransformerDecoder` of the repository): position i reads h, the
    token in slot 0, and its own and the K - 1 tokens before it. Pre-LN layers, positions of its own; the token
    embeddings are the encoder's, and so, without bias or transform, is the output matrix (the caller's)."""

    def __init__(self, sizes: Sizes, num_layers: int, window: int):
        super().__init__()
        self.window = window
        self.positions = nn.Embedding(sizes.positions, sizes.hidden)
        self.dropout, self.embedding_norm = (
            nn.Dropout(sizes.dropout),
            nn.LayerNorm(sizes.hidden, eps=sizes.eps),
        )
        self.layers = nn.ModuleList(CausalLayer(sizes) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(sizes.hidden, eps=sizes.eps)
        initialize(self, sizes.std)

    def view(self, T: int, device=None) -> Tensor:
        """(T, T) bool, True = row i may attend to column j: the window of K that ends at i, and column 0.
        Example: K = 2 -> row 4 sees columns 0, 3 and 4."""
        place = torch.arange(T, device=device)
        back = place[:, None] - place
        return ((back >= 0) & (back < self.window)) | (place == 0)

    def forward(self, embeddings: Tensor, h: Tensor, places: Tensor) -> Tensor:
        """embeddings: (B, T, D) of the clean tokens   h: (B, D)   places: (n,) of the flat (B·T)   ->   (n, D).
        Needs no padding mask: to the right of a text, padding is in no window of its tokens."""
        T = embeddings.shape[1]
        x = embeddings + self.positions.weight[:T]
        x, view = self.dropout(self.embedding_norm(x)), self.view(T, x.device)
        for layer in self.layers:
            x = layer(x, h, view)
        return self.final_norm(x.flatten(0, 1)[places])


class CausalLayer(nn.Module):
    """Self-attention, cross-attention to h, feed-forward, each after a norm and added to its input. Over one key every
    softmax is 1, so the cross-attention adds Wo Wv h, less what its dropout takes per position and head; its query and
    key projections, which never have a gradient, are left out."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, self.heads, self.attention_dropout = sizes.hidden, sizes.heads, sizes.attention_dropout
        self.dropout, self.activation = nn.Dropout(sizes.dropout), ACT2FN[sizes.activation]
        self.query, self.key, self.value, self.attention_output = (
            nn.Linear(D, D) for _ in range(4)
        )
        self.bottleneck_value, self.bottleneck_output = (nn.Linear(D, D) for _ in range(2))
        self.up, self.down = nn.Linear(D, sizes.inner), nn.Linear(sizes.inner, D)
        self.attention_norm, self.feed_forward_norm = (
            nn.LayerNorm(D, eps=sizes.eps) for _ in range(2)
        )

    def forward(self, x: Tensor, h: Tensor, view: Tensor) -> Tensor:
        """x: (B, T, D)   h: (B, D)   view: (T, T) bool, True = visible   ->   (B, T, D)"""
        B, T, D = x.shape
        dropout, normed = self.attention_dropout if self.training else 0.0, self.attention_norm(x)
        q, k, v = (
            layer(normed).view(B, T, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = attention(q, k, v, view, dropout)
        x = x + self.dropout(self.attention_output(attended.transpose(1, 2).reshape(B, T, D)))
        weight = F.dropout(torch.ones(B, T, self.heads, 1, device=x.device), dropout, self.training)
        heard = weight * self.bottleneck_value(h).view(
            B, 1, self.heads, -1
        )  # (B, T, heads, D / heads)
        x = x + self.dropout(self.bottleneck_output(heard.reshape(B, T, D)))
        return x + self.dropout(self.down(self.activation(self.up(self.feed_forward_norm(x)))))


class Transform(nn.Module):
    """The part of BERT's LM head before its output layer: dense, activation, norm."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.dense, self.norm = (
            nn.Linear(sizes.hidden, sizes.hidden),
            nn.LayerNorm(sizes.hidden, eps=sizes.eps),
        )
        self.activation = ACT2FN[sizes.activation]
        initialize(self, sizes.std)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))
