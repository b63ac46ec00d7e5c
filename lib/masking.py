"""Text to ids: the only place where titles are joined, prompts put in front, texts cut, and tokens hidden from a
language model.

Shapes: B texts, L tokens of the longest, V vocabulary. Masks: attention_mask 1 = keep; mlm masks True = hidden.
"""

import torch
from torch import Tensor

from lib.text import step_seed


def special_table(tokenizer) -> Tensor:
    """(V,) bool, True for the ids of special tokens ([CLS], [SEP], [PAD], ...). [UNK] stands for ordinary text and is
    none of them."""
    table = torch.zeros(len(tokenizer), dtype=torch.bool)
    table[[i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]] = True
    return table


def word_start_table(tokenizer) -> Tensor:
    """(V,) bool, True where a token opens a word: not "##..." in WordPiece, "Ġ..." in byte-level BPE, "▁..." in
    SentencePiece."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for mark in ("Ġ", "▁"):
        if sum(t.startswith(mark) for t in tokens if t) > len(tokens) // 10:
            return torch.tensor([bool(t) and t.startswith(mark) for t in tokens])
    return torch.tensor([not (t or "").startswith("##") for t in tokens])


# hiding tokens from a language model, on the device and without a loop over tokens
GOLDEN, MIX_1, MIX_2 = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


ROUNDS = 4  # of whole_word_mask


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64; the shifts are logical, so the sign bits they bring in are masked away."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def counter_uniform(
    seed: int, step: int, rows: Tensor, shape: tuple[int, ...], device=None
) -> Tensor:
    """Random numbers in [0, 1) that are a function of their place: (B, *shape) float32, the same on CPU and CUDA.

    rows: (B,) int64, the row of each text in the batch of all processes. The number at [b, i, j] is a hash of (seed,
    step, rows[b], i, j): it depends on no other text, nor on the number of processes, nor on `shape` (padding)."""
    keys = _mix((rows.to(device) + 1) * GOLDEN + step_seed(seed, step))
    for size in shape:
        counter = torch.arange(1, size + 1, device=keys.device) * GOLDEN
        keys = _mix(keys[..., None] + counter)
    return ((keys >> 40) & 0xFFFFFF).float() * 2.0**-24  # 24 bits are what float32 holds exactly


def word_index(
    input_ids: Tensor, attention_mask: Tensor, starts: Tensor, special: Tensor
) -> Tensor:
    """(B, L) int64: 0, 1, 2, ... the word that each token belongs to; -1 at special tokens and padding.

    starts, special: (V,) bool, word_start_table and special_table; a table that is True everywhere makes every token a
    word. What follows a special token opens a word too (byte-level BPE does not mark the first word of a text)."""
    ordinary = attention_mask.bool() & ~special[input_ids]
    after_special = torch.nn.functional.pad(~ordinary[:, :-1], (1, 0), value=True)
    return ((ordinary & (starts[input_ids] | after_special)).cumsum(1) - 1).masked_fill(
        ~ordinary, -1
    )


def mask_budget(lengths: Tensor, ratio: float) -> Tensor:
    """(B,) int64: how many tokens of a text to hide, max(1, round(n * ratio)) of n."""
    return (lengths.double() * ratio).round().long().clamp(min=1)


def whole_word_mask(words: Tensor, budget: Tensor, noise: Tensor) -> Tensor:
    """Whole words in random order, as many as fit the budget; True = hidden. BERT's whole-word masking, vectorised.

    words: (B, L) of word_index    budget: (B,) tokens    noise: (B, L), or (B, m, L) for m masks per text: the
    words come in the order of noise[..., word]   ->   bool of noise's shape
    A word that would overshoot the budget is passed over, later ones may still fit; so at most `budget` tokens are
    hidden, and fewer if only long words are left. Each of the ROUNDS takes the words up to the first that overshoots;
    the room left is below the size of that word, so four rounds leave room unused only in texts of very long words.
    Example: words of 1, 3 and 1 tokens in this order, budget 2 -> the first and the third."""
    B, L = words.shape
    many = noise.reshape(B, -1, L)
    sizes = torch.zeros(B, L + 1, dtype=torch.int32, device=words.device)
    sizes.scatter_add_(1, words + 1, torch.ones_like(words, dtype=torch.int32))  # column 0: no word
    sizes = sizes[:, None, 1:].expand(many.shape)  # (B, m, L) tokens of each word, 0 = no such word
    order = many.masked_fill(sizes == 0, 2.0).argsort(dim=-1, stable=True)
    sizes = sizes.gather(-1, order)
    room = budget.to(torch.int32)[:, None, None]
    taken = torch.zeros_like(order, dtype=torch.bool)
    for _ in range(ROUNDS):
        fits = sizes.masked_fill(taken | (sizes > room), 0)
        new = (fits > 0) & (fits.cumsum(-1, dtype=torch.int32) <= room)
        taken |= new
        room = room - fits.masked_fill(~new, 0).sum(-1, keepdim=True, dtype=torch.int32)
    taken = torch.zeros_like(taken).scatter_(-1, order, taken)  # back from random order
    hidden = (
        taken.gather(-1, words.clamp(min=0)[:, None].expand(many.shape)) & (words >= 0)[:, None]
    )
    return hidden.view(noise.shape)


def corrupt(
    input_ids: Tensor, mask: Tensor, noise: Tensor, mask_id: int, ordinary_ids: Tensor
) -> Tensor:
    """(B, L) ids in which tokens under `mask` are 80% [MASK], 10% any ordinary token, 10% left, drawn per token.

    mask: (B, L) bool, True = corrupt    noise: (B, 2, L) in [0, 1)    ordinary_ids: ids that may stand in.
    The usual routine also draws special tokens; [PAD] in the middle would shift the positions of a RoBERTa."""
    fate, which = noise.unbind(1)
    other = ordinary_ids[(which * len(ordinary_ids)).long().clamp(max=len(ordinary_ids) - 1)]
    return torch.where(
        mask & (fate < 0.8), mask_id, torch.where(mask & (fate < 0.9), other, input_ids)
    )


def position_specific_view(
    words: Tensor, attention_mask: Tensor, hidden: Tensor, noise: Tensor
) -> Tensor:
    """(B, L, L) bool, True = row i may attend to column j: RetroMAE's enhanced decoding (arXiv 2205.12035, Eq. 7).

    hidden: (B, m, L), m masks; row i of a text of n tokens takes one of the first min(n, m), chosen by noise (B, L).
    Row i never sees column i. [CLS], column 0, and other special tokens are in no mask; nobody sees padding. A row
    left without a column sees all: a softmax needs one, and it has no label, as all rows but 0 see column 0."""
    B, m, L = hidden.shape
    choices = attention_mask.sum(1, keepdim=True).clamp(max=m)  # (B, 1)
    pick = torch.minimum((noise * choices).long(), choices - 1)
    view = ~hidden.gather(1, pick[..., None].expand(B, L, L)) & attention_mask.bool()[:, None]
    view &= ~torch.eye(L, dtype=torch.bool, device=view.device)
    return view | ~view.any(-1, keepdim=True)
