"""The weak decoders: each rebuilds a text from the bottleneck vector h and little context.

B texts, L tokens of the longest, T positions of a shifted text, D hidden size, n positions with a
label. `places` (n,) are these as indices of the flat (B·L): nothing else is computed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lib import architectures
from lib.cpu import attention


def initialize(module: nn.Module, config) -> nn.Module:
    """The module with new weights as BERT's: normal, biases 0. (Norms are 1 and 0 already.)"""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=config.initializer_range)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return module


def own_positions(config) -> nn.Embedding | None:
    """Positions for a decoder, None if the encoder has learned ones: where they are rotary, what a
    decoder reads would not tell one from another."""
    if architectures.of(config).positions:
        return None
    return initialize(nn.Embedding(config.max_position_embeddings, config.hidden_size), config)


class Layer(nn.Module):
    """A BERT layer whose queries and keys may come from different streams. The residual is on the
    QUERY stream: on the other, a token would reach its own prediction past RetroMAE's mask.
    more: names of further linear maps (D, D)"""

    eps: float | None = None  # of the norms; None: as in the encoder

    def __init__(self, config, *more: str):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        eps = self.eps or config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = ACT2FN[config.hidden_act]
        for name in ("query", "key", "value", "attention_output", *more):
            self.add_module(name, nn.Linear(D, D))
        self.up = nn.Linear(D, inner)
        self.down = nn.Linear(inner, D)
        self.attention_norm = nn.LayerNorm(D, eps=eps)
        self.output_norm = nn.LayerNorm(D, eps=eps)

    def attend(self, queries: Tensor, keys: Tensor, view: Tensor) -> Tensor:
        """queries, keys: (B, L, D)   view: bool, True = visible, broadcast to (B, heads, L, L)"""
        projected = self.query(queries), self.key(keys), self.value(keys)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)
        dropout = self.attention_dropout if self.training else 0.0
        return attention(q, k, v, view, dropout).transpose(1, 2).flatten(2)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x))))

    def forward(self, queries: Tensor, keys: Tensor, view: Tensor, places: Tensor) -> Tensor:
        """queries, keys: (B, L, D)   view: (B, L or 1, L) bool, True = visible   -> (n, D)"""
        x = self.attend(queries, keys, view[:, None]).flatten(0, 1)[places]
        x = self.dropout(self.attention_output(x)) + queries.flatten(0, 1)[places]
        x = self.attention_norm(x)
        return self.output_norm(self.feed_forward(x) + x)


class SlotDecoder(nn.Module):
    """A few BERT layers over [bottleneck ; masked embeddings or states of a middle layer]."""

    def __init__(self, config, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(initialize(Layer(config), config) for _ in range(num_layers))

    def forward(self, slot: Tensor, rest: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """slot: (B, D)   rest: (B, L, D), position 0 is not read   mask: (B, L), 1 = keep
        -> (n, D)"""
        x = torch.cat([slot[:, None], rest[:, 1:]], 1)
        view = mask.bool()[:, None]
        everywhere = torch.arange(mask.numel(), device=x.device)
        for layer in self.layers[:-1]:
            x = layer(x, x, view, everywhere).view_as(x)
        return self.layers[-1](x, x, view, places)


class CausalDecoder(nn.Module):
    """SEED-Encoder's weak decoder (arXiv 2102.09206; `TransformerDecoder` of the repository): each
    position reads h, the token in slot 0, and `window` tokens that end with its own."""

    def __init__(self, config, num_layers: int, window: int):
        super().__init__()
        D, eps = config.hidden_size, CausalLayer.eps
        self.window = window
        self.positions = nn.Embedding(config.max_position_embeddings, D)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.embedding_norm = nn.LayerNorm(D, eps=eps)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(D, eps=eps)
        initialize(self, config)

    def view(self, T: int, device=None) -> Tensor:
        """(T, T) bool, True = visible: with a window of 2, row 4 sees columns 0, 3 and 4."""
        place = torch.arange(T, device=device)
        back = place[:, None] - place
        return ((back >= 0) & (back < self.window)) | (place == 0)

    def forward(self, embeddings: Tensor, h: Tensor, places: Tensor) -> Tensor:
        """embeddings: (B, T, D)   h: (B, D)   places: (n,) of the flat (B·T)   ->   (n, D)
        Needs no padding mask: padding is to the right, in no window of a token."""
        T = embeddings.shape[1]
        x = self.dropout(self.embedding_norm(embeddings + self.positions.weight[:T]))
        view = self.view(T, x.device)[None, None]
        for layer in self.layers:
            x = layer(x, h, view)
        return self.final_norm(x.flatten(0, 1)[places])


class CausalLayer(Layer):
    """Self-attention, cross-attention to h, feed-forward, each after a norm and added to its input.
    With one key every softmax is 1. So cross-attention adds Wo Wv h, with dropout per position and
    head, and has no query and key projections."""

    eps = 1e-5  # fairseq's, whatever the encoder has

    def __init__(self, config):
        super().__init__(config, "bottleneck_value", "bottleneck_output")

    def forward(self, x: Tensor, h: Tensor, view: Tensor) -> Tensor:
        """x: (B, T, D)   h: (B, D)   view: (1, 1, T, T) bool, True = visible   ->   (B, T, D)"""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention_output(self.attend(normed, normed, view)))
        kept = torch.ones(*x.shape[:2], self.heads, 1, device=x.device)
        kept = F.dropout(kept, self.attention_dropout, self.training)
        value = self.bottleneck_value(h).view(len(h), 1, self.heads, -1)
        x = x + self.dropout(self.bottleneck_output((kept * value).flatten(2)))
        return x + self.feed_forward(self.output_norm(x))
