"""Which tokens are hidden from a language model: masks made on the device. B texts, L tokens of the
longest, V vocabulary. attention_mask 1 = keep; all other masks True = hidden."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.text import step_seed

# Streams of random numbers in pre-training. 0 is the order of the data, 1 negatives in fine-tuning.
DROPOUT, ENCODER_MASK, DECODER_MASK, DECODER_ROW = 2, 3, 4, 5
ROUNDS = 4  # of whole_word_mask
LONGEST_WORD = 16  # tokens

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # constants of splitmix64, as signed integers
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def special_table(tokenizer) -> Tensor:
    """(V,) bool, True for special tokens, but not for [UNK], an ordinary word."""
    table = torch.zeros(len(tokenizer), dtype=torch.bool)
    table[[i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]] = True
    return table


def word_start_table(tokenizer) -> Tensor:
    """(V,) bool, True for tokens that open a word: those without "##" in WordPiece, those with "Ġ"
    in byte-level BPE or "▁" in SentencePiece."""
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    for mark in ("Ġ", "▁"):
        opens = torch.tensor([token.startswith(mark) for token in tokens])
        if opens.sum() > len(tokens) // 10:
            return opens
    return torch.tensor([not token.startswith("##") for token in tokens])


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, with the sign bits cleared that >> copies."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def counter_uniform(seed: int, step: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float32 random numbers in [0, 1): a hash of (seed, step, rows[b], i, j) at
    [b, i, j]. So they do not depend on the other texts, the processes, the device, or padding.
    rows: (B,) int64, of each text in the batch of all processes"""
    keys = _mix((rows + 1) * GOLDEN + step_seed(seed, step))
    for size in shape:
        counter = torch.arange(1, size + 1, device=keys.device) * GOLDEN
        keys = _mix(keys[..., None] + counter)
    return ((keys >> 40) & 0xFFFFFF).float() * 2.0**-24  # float32 holds 24 bits exactly


def word_index(ids: Tensor, attention_mask: Tensor, starts: Tensor, special: Tensor) -> Tensor:
    """(B, L) int64 number 0, 1, 2, ... of each token's word; -1 at special tokens and padding.
    starts, special: (V,) bool, word_start_table and special_table

    The token after a special one opens a word too: byte-level BPE does not mark a text's first.
    After LONGEST_WORD tokens another word begins: to SentencePiece, a sentence of Chinese or Thai
    is one word, which no budget would ever hide."""
    ordinary = attention_mask.bool() & ~special[ids]
    after_special = F.pad(~ordinary[:, :-1], (1, 0), value=True)
    opens = ordinary & (starts[ids] | after_special)
    place = torch.arange(ids.shape[1], device=ids.device)
    first = place.where(opens, 0).cummax(1).values  # of the word
    opens |= ordinary & ((place - first) % LONGEST_WORD == 0)
    return (opens.cumsum(1) - 1).masked_fill(~ordinary, -1)


def mask_budget(lengths: Tensor, ratio: float) -> Tensor:
    """(B,) int64: how many tokens to hide of a text of n tokens, max(1, round(n * ratio))."""
    return (lengths.double() * ratio).round().long().clamp(min=1)


def whole_word_mask(words: Tensor, budget: Tensor, noise: Tensor) -> Tensor:
    """BERT's whole-word masking: whole words in random order, as many as fit the budget.

    words: (B, L) of word_index   budget: (B,) tokens   noise: (B, m, L) for m masks per text;
    words are taken in the order of noise[..., word]   ->   (B, m, L) bool, True = hidden
    Example: words of 1, 3 and 1 tokens in this order, budget 2 -> the first and the third word.
    Each of the ROUNDS takes words up to the first that does not fit and skips that one. Four rounds
    leave room only in texts of very long words."""
    B, L = words.shape
    sizes = torch.zeros(B, L + 1, dtype=torch.int32, device=words.device)
    sizes.scatter_add_(1, words + 1, torch.ones_like(words, dtype=torch.int32))  # column 0: no word
    sizes = sizes[:, None, 1:].expand(noise.shape)  # tokens of each word, 0 = no such word
    order = noise.masked_fill(sizes == 0, 2.0).argsort(dim=-1, stable=True)
    sizes = sizes.gather(-1, order)
    room = budget.to(torch.int32)[:, None, None]
    taken = torch.zeros_like(order, dtype=torch.bool)
    for _ in range(ROUNDS):
        fits = sizes.masked_fill(taken | (sizes > room), 0)
        new = (fits > 0) & (fits.cumsum(-1, dtype=torch.int32) <= room)
        taken |= new
        room = room - fits.masked_fill(~new, 0).sum(-1, keepdim=True, dtype=torch.int32)
    taken = torch.zeros_like(taken).scatter_(-1, order, taken)  # (B, m, L) by number of the word
    hidden = taken.gather(-1, words.clamp(min=0)[:, None].expand(noise.shape))
    return hidden & (words >= 0)[:, None]


def corrupt(ids: Tensor, mask: Tensor, noise: Tensor, mask_id: int, ordinary: Tensor) -> Tensor:
    """(B, L) ids: a token under `mask` becomes [MASK] (80%), an ordinary token (10%), or stays.
    mask: (B, L) bool   noise: (B, 2, L) in [0, 1)   ordinary: (n,) ids of ordinary tokens
    (A special token would do harm: a [PAD] inside a text shifts RoBERTa's positions.)"""
    fate, which = noise.unbind(1)
    other = ordinary[(which * len(ordinary)).long().clamp(max=len(ordinary) - 1)]
    replaced = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, other, ids))
    return torch.where(mask, replaced, ids)


def position_specific_view(attention_mask: Tensor, hidden: Tensor, noise: Tensor) -> Tensor:
    """(B, L, L) bool, True = row i may attend to column j: RetroMAE (arXiv 2205.12035, Eq. 7).

    hidden: (B, m, L), m masks; row i of a text of n tokens takes one of the first min(n, m), chosen
    by noise (B, L). It sees neither column i nor padding. Row 0, which has no label, may be left
    without a column; it then sees all of them, because a softmax needs one."""
    B, m, L = hidden.shape
    choices = attention_mask.sum(1, keepdim=True).clamp(max=m)  # (B, 1)
    pick = torch.minimum((noise * choices).long(), choices - 1)
    view = ~hidden.gather(1, pick[..., None].expand(B, L, L)) & attention_mask.bool()[:, None]
    view &= ~torch.eye(L, dtype=torch.bool, device=view.device)
    return view | ~view.any(-1, keepdim=True)
