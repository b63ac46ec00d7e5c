"""pytest tests/test_masks.py — random numbers by place, whole words, corruption, RetroMAE's
rows."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.masking import (
    corrupt,
    counter_uniform,
    mask_budget,
    position_specific_view,
    special_table,
    whole_word_mask,
    word_index,
    word_start_table,
)
from lib.text import step_seed


def random_words(rows, length, generator=None):
    """(B, L) word numbers of ragged texts [CLS] ... [SEP] padding, and their attention mask."""
    generator = torch.Generator().manual_seed(0)
    words = (torch.rand(rows, length, generator=generator) < 0.6).long()
    words[:, 1] = 1
    words = words.cumsum(1) - 1 - words[:, :1]
    keep = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=generator)
    last = keep.sum(1, keepdim=True) - 1
    inside = keep & (torch.arange(length) > 0) & (torch.arange(length) < last)
    return words.masked_fill(~inside, -1), keep.long()


def splitmix(seed, step, *places):
    """The same number in unbounded integers."""
    state = step_seed(seed, step)
    for place in places:
        state = (state + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return (state >> 40) / 2**24


def test_numbers_depend_on_their_place_only():
    rows = torch.tensor([3, 0, 7])
    noise = counter_uniform(1, 5, rows, (4, 9))
    assert torch.equal(noise[1:2, :3, :5], counter_uniform(1, 5, rows[1:2], (3, 5))), (
        "batch, shape, padding"
    )
    assert torch.equal(noise[[2, 0]], counter_uniform(1, 5, rows[[2, 0]], (4, 9)))
    for seed, step, row in ((2, 5, 3), (1, 6, 3), (1, 5, 4)):
        assert not torch.isclose(
            noise[0], counter_uniform(seed, step, torch.tensor([row]), (4, 9))[0]
        ).any()
    assert torch.equal(
        noise[:, 0],
        torch.tensor([[splitmix(1, 5, row, 0, i) for i in range(9)] for row in (3, 0, 7)]),
    )


def test_numbers_are_uniform_and_uncorrelated():
    noise = counter_uniform(0, 0, torch.arange(200), (20, 50)).double()  # 200,000 numbers
    assert noise.min() >= 0 and noise.max() < 1 and len(noise.unique()) > 0.98 * noise.numel()
    counts = torch.histc(noise, 20, 0, 1)
    assert (counts - 10_000).abs().max() < 500  # 5 standard deviations
    for dim in range(3):
        a, b = (
            noise.narrow(dim, 0, noise.shape[dim] - 1),
            noise.narrow(dim, 1, noise.shape[dim] - 1),
        )
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.012


def one_by_one(words, budget, noise):
    """Whole-word masking as the recipes do it: a shuffled list of words, one after the other."""
    hidden = [False] * len(words)
    for word in sorted(set(words) - {-1}, key=lambda w: noise[w]):
        places = [i for i, w in enumerate(words) if w == word]
        if sum(hidden) + len(places) <= budget:
            for place in places:
                hidden[place] = True
    return hidden


@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_whole_words_in_random_order_within_the_budget(ratio):
    words, keep = random_words(40, 30)
    budget = mask_budget(keep.sum(1), ratio)
    assert budget.tolist() == [max(1, round(int(n) * ratio)) for n in keep.sum(1)]
    noise = counter_uniform(0, 0, torch.arange(40), (3, 30))
    hidden = whole_word_mask(words, budget, noise)
    for b in range(40):
        for m in range(3):
            assert hidden[b, m].tolist() == one_by_one(
                words[b].tolist(), budget[b], noise[b, m].tolist()
            )
    assert torch.equal(hidden[:, 1:2], whole_word_mask(words, budget, noise[:, 1:2])), (
        "one mask per text is the same"
    )
    assert hidden.sum() > 0.9 * 3 * budget.sum() and not (hidden & (words < 0)[:, None]).any()


def test_texts_of_one_long_word_keep_it():
    words = torch.tensor([[-1, 0, 0, 0, 0, -1], [-1, 0, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])
    hidden = whole_word_mask(words, torch.tensor([3, 1, 1]), torch.rand(3, 1, 6))
    assert hidden[:, 0].tolist() == [[False] * 6, [False, True, *[False] * 4], [False] * 6]


def test_corruption_is_80_10_10_and_touches_nothing_else():
    ids, mask = torch.full((50, 400), 7), torch.rand(50, 400) < 0.3
    ordinary = torch.arange(10, 1000)
    made = corrupt(
        ids, mask, counter_uniform(0, 0, torch.arange(50), (2, 400)), mask_id=4, ordinary=ordinary
    )
    assert (made[~mask] == 7).all()
    masked = made[mask]
    shares = [
        (masked == 4).float().mean(),
        (masked >= 10).float().mean(),
        (masked == 7).float().mean(),
    ]
    assert torch.allclose(torch.stack(shares), torch.tensor([0.8, 0.1, 0.1]), atol=0.02)
    assert len(masked[masked >= 10].unique()) > 350 and set(masked.tolist()) <= {
        4,
        7,
        *range(10, 1000),
    }


def test_words_of_wordpiece_and_specials(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    strings = ["unbelievable volcanoes erupt", "a [SEP] b [MASK] queen", "x"]
    batch = tokenizer(strings, padding=True, return_tensors="pt")
    ids, keep = batch["input_ids"], batch["attention_mask"]
    words = word_index(ids, keep, word_start_table(tokenizer), special_table(tokenizer))
    for row, (one, numbers) in enumerate(zip(ids, words, strict=True)):
        for i, (token, number) in enumerate(
            zip(tokenizer.convert_ids_to_tokens(one), numbers.tolist(), strict=True)
        ):
            assert (number == -1) == (token in tokenizer.all_special_tokens and token != "[UNK]"), (
                row,
                token,
            )
            if token.startswith("##"):
                assert number == words[row, i - 1]
            elif number >= 0:
                assert number == words[row, :i].max().clamp(min=-1) + 1
    each = word_index(
        ids, keep, torch.ones(len(tokenizer), dtype=torch.bool), special_table(tokenizer)
    )
    assert each.max(1).values.tolist() == [(row >= 0).sum() - 1 for row in each], (
        "token masks: every token a word"
    )


def test_words_of_byte_level_bpe():
    vocab = {
        "<s>": 0,
        "<pad>": 1,
        "</s>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "t": 5,
        "he": 6,
        "Ġcat": 7,
        "s": 8,
        "Ġt": 9,
    }
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {
        "bos": "<s>",
        "cls": "<s>",
        "eos": "</s>",
        "sep": "</s>",
        "pad": "<pad>",
        "unk": "<unk>",
        "mask": "<mask>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{k}_token": v for k, v in names.items()}
    )
    ids = torch.tensor([[0, 5, 6, 7, 8, 2, 1], [0, 7, 8, 9, 6, 7, 2]])  # the cats; Ġcats Ġthe Ġcat
    words = word_index(
        ids, (ids != 1).long(), word_start_table(tokenizer), special_table(tokenizer)
    )
    assert words.tolist() == [[-1, 0, 0, 1, 1, -1, -1], [-1, 0, 0, 1, 1, 2, -1]]


def test_rows_of_the_decoder():
    """Row i never sees i; column 0 and special tokens are open; at most the budget and i are
    hidden; none is blind."""
    words, keep = random_words(20, 24)
    words[0], keep[0] = -1, torch.tensor([1, *[0] * 23])  # not even a [SEP]
    budget = mask_budget(keep.sum(1), 0.5)
    hidden = whole_word_mask(words, budget, counter_uniform(0, 0, torch.arange(20), (10, 24)))
    noise = counter_uniform(1, 0, torch.arange(20), (24,))
    view = position_specific_view(keep, hidden, noise)
    masks = {tuple(m) for m in (~hidden[5]).tolist()}
    used = set()
    for b in range(1, 20):
        n = int(keep[b].sum())
        for i in range(n):
            row = view[b, i, :n]
            assert (
                not row[i]
                and (i == 0 or row[0])
                and (i == n - 1 or row[n - 1])
                and not view[b, i, n:].any()
            )
            assert (~row).sum() <= budget[b] + 1
            pick = min(int(noise[b, i] * min(n, 10)), min(n, 10) - 1)
            assert torch.equal(row, ~hidden[b, pick, :n] & (torch.arange(n) != i))
            used |= {pick} if b == 5 else set()
    assert view.any(-1).all() and len(used) > 2 and len(masks) > 2
    longer = torch.nn.functional.pad(words, (0, 6), value=-1), torch.nn.functional.pad(keep, (0, 6))
    more = whole_word_mask(longer[0], budget, counter_uniform(0, 0, torch.arange(20), (16, 30)))[
        :, :10
    ]
    again = position_specific_view(longer[1], more, counter_uniform(1, 0, torch.arange(20), (30,)))
    inside = keep.bool()[:, :, None] & keep.bool()[:, None]
    assert torch.equal((again[:, :24, :24] & inside)[1:], (view & inside)[1:]), (
        "padding changes nothing"
    )
