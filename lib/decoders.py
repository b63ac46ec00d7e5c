"""The weak decoders: each rebuilds a text from the bottleneck vector h and little context.

Legend: B texts, L tokens of the longest, T positions of a shifted text, D hidden size, n positions
with a label. `places` (n,) are these as indices of the flat (B·L): nothing else is computed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lib.cpu import attention


class Sizes(NamedTuple):
    """What a decoder takes from the encoder's config, where the names differ by architecture."""

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
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        inner=config.intermediate_size if bert else config.hidden_dim,
        positions=config.max_position_embeddings,
        dropout=config.hidden_dropout_prob if bert else config.dropout,
        attention_dropout=(
            config.attention_probs_dropout_prob if bert else config.attention_dropout
        ),
        activation=config.hidden_act if bert else config.activation,
        eps=config.layer_norm_eps if bert else 1e-12,
        std=config.initializer_range,
    )


def initialize(module: nn.Module, std: float) -> None:
    """New weights as BERT's: N(0, std), biases 0. (Norms are 1 and 0 already.)"""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class Layer(nn.Module):
    """What the two kinds of decoder layers share: multi-head attention and the feed-forward part.
    more: names of further linear maps (D, D)"""

    def __init__(self, sizes: Sizes, *more: str):
        super().__init__()
        D = sizes.hidden
        self.heads = sizes.heads
        self.attention_dropout = sizes.attention_dropout
        self.dropout = nn.Dropout(sizes.dropout)
        self.activation = ACT2FN[sizes.activation]
        for name in ("query", "key", "value", "attention_output", *more):
            self.add_module(name, nn.Linear(D, D))
        self.up, self.down = nn.Linear(D, sizes.inner), nn.Linear(sizes.inner, D)
        self.attention_norm, self.output_norm = (nn.LayerNorm(D, eps=sizes.eps) for _ in range(2))

    def attend(self, queries: Tensor, keys: Tensor, view: Tensor) -> Tensor:
        """queries, keys: (B, L, D)   view: bool, True = visible, to (B, heads, L, L)   -> (B, L,
        D)"""
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)
            for x in (self.query(queries), self.key(keys), self.value(keys))
        )
        dropout = self.attention_dropout if self.training else 0.0
        return attention(q, k, v, view, dropout).transpose(1, 2).flatten(2)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x))))


class TwoStreamLayer(Layer):
    """A BERT layer whose queries and keys may come from different streams. The residual is on the
    QUERY stream: on the other, a token would reach its own prediction past RetroMAE's mask. In a
    second layer it would reach it through its neighbours. With one stream it is BERT's layer."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        initialize(self, sizes.std)

    def forward(self, queries: Tensor, keys: Tensor, view: Tensor, places: Tensor) -> Tensor:
        """queries, keys: (B, L, D)   view: (B, L or 1, L) bool, True = visible   places: (n,)
        -> (n, D). All rows attend, in one product; only those at `places` continue, so padding
        needs no feed-forward."""
        x = self.attend(queries, keys, view[:, None]).flatten(0, 1)[places]
        x = self.dropout(self.attention_output(x)) + queries.flatten(0, 1)[places]
        x = self.attention_norm(x)
        return self.output_norm(self.feed_forward(x) + x)


class SlotDecoder(nn.Module):
    """A few BERT layers over [slot 0 ; rest]: the lexicon bottleneck and masked embeddings
    (LexMAE), or h and the states of a middle layer (Condenser)."""

    def __init__(self, sizes: Sizes, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(TwoStreamLayer(sizes) for _ in range(num_layers))

    def forward(self, slot: Tensor, rest: Tensor, attention_mask: Tensor, places: Tensor) -> Tensor:
        """slot: (B, D)   rest: (B, L, D), position 0 is not read   attention_mask: (B, L), 1 = keep
        places: (n,)   ->   (n, D)"""
        x = torch.cat([slot[:, None], rest[:, 1:]], 1)
        view = attention_mask.bool()[:, None]
        everywhere = torch.arange(attention_mask.numel(), device=x.device)
        for layer in self.layers[:-1]:
            x = layer(x, x, view, everywhere).view_as(x)
        return self.layers[-1](x, x, view, places)


class CausalDecoder(nn.Module):
    """SEED-Encoder's weak decoder (arXiv 2102.09206; `TransformerDecoder` of the repository):
    position i reads h, the token in slot 0, and K tokens that end with its own. Pre-LN layers,
    positions of its own. The caller applies the output matrix, the encoder's token embeddings."""

    def __init__(self, sizes: Sizes, num_layers: int, window: int):
        super().__init__()
        self.window = window
        self.positions = nn.Embedding(sizes.positions, sizes.hidden)
        self.dropout = nn.Dropout(sizes.dropout)
        self.embedding_norm = nn.LayerNorm(sizes.hidden, eps=sizes.eps)
        self.layers = nn.ModuleList(CausalLayer(sizes) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(sizes.hidden, eps=sizes.eps)
        initialize(self, sizes.std)

    def view(self, T: int, device=None) -> Tensor:
        """(T, T) bool, True = row i may attend to column j: column 0 and the K that end with i.
        Example: K = 2 -> row 4 sees columns 0, 3 and 4."""
        place = torch.arange(T, device=device)
        back = place[:, None] - place
        return ((back >= 0) & (back < self.window)) | (place == 0)

    def forward(self, embeddings: Tensor, h: Tensor, places: Tensor) -> Tensor:
        """embeddings: (B, T, D) of the clean tokens   h: (B, D)   places: (n,) of the flat (B·T)
        -> (n, D). Needs no padding mask: padding is to the right, in no window of a token."""
        T = embeddings.shape[1]
        x = self.dropout(self.embedding_norm(embeddings + self.positions.weight[:T]))
        view = self.view(T, x.device)
        for layer in self.layers:
            x = layer(x, h, view)
        return self.final_norm(x.flatten(0, 1)[places])


class CausalLayer(Layer):
    """Self-attention, cross-attention to h, feed-forward, each after a norm and added to its input.
    With one key every softmax is 1. So cross-attention adds Wo Wv h, with dropout per position and
    head; its query and key projections would never have a gradient and are left out."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes, "bottleneck_value", "bottleneck_output")

    def forward(self, x: Tensor, h: Tensor, view: Tensor) -> Tensor:
        """x: (B, T, D)   h: (B, D)   view: (T, T) bool, True = visible   ->   (B, T, D)"""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention_output(self.attend(normed, normed, view)))
        B, T, _ = x.shape
        kept = torch.ones(B, T, self.heads, 1, device=x.device)
        kept = F.dropout(kept, self.attention_dropout, self.training)
        value = self.bottleneck_value(h).view(B, 1, self.heads, -1)
        x = x + self.dropout(self.bottleneck_output((kept * value).flatten(2)))
        return x + self.feed_forward(self.output_norm(x))


class Transform(nn.Module):
    """The part of BERT's LM head before its output layer: dense, activation, norm."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.dense = nn.Linear(sizes.hidden, sizes.hidden)
        self.norm = nn.LayerNorm(sizes.hidden, eps=sizes.eps)
        self.activation = ACT2FN[sizes.activation]
        initialize(self, sizes.std)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))
