"""Pre-training objectives. Each is a module that holds the masked language model `lm` and, if it
has one, its decoder; it turns a batch into loss terms.

B texts, L tokens of the longest, D hidden size, V vocabulary, n tokens with a label. attention_mask
1 = keep; other masks True = hidden, unless said otherwise. h (B, D) is the bottleneck. `places`
(n,) are the tokens with a label as indices of the flat (B·L); an LM head runs nowhere else. A
batch holds input_ids, attention_mask (B, L); rows (B,) in the batch of all processes; micro_step.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from lib import architectures, masking
from lib.architectures import bert_config, head_transform
from lib.decoders import CausalDecoder, Layer, SlotDecoder, initialize, own_positions
from lib.files import UserError
from lib.lm_head import Term, bag_of_words, linear_cross_entropy, max_pooled_logits
from lib.masking import DECODER_MASK, DECODER_ROW, ENCODER_MASK
from lib.spans import span_contrast
from lib.text import step_seed

# The options of each objective with their defaults, which pretrain_mae.py has as flags
OPTIONS = {
    "mlm": dict(encoder_mask_ratio=0.3, mask="whole_word"),
    "bow": dict(encoder_mask_ratio=0.3, mask="whole_word"),
    "retromae": dict(encoder_mask_ratio=0.3, mask="whole_word", decoder_mask_ratio=0.5),
    "dupmae": dict(encoder_mask_ratio=0.3, mask="whole_word", decoder_mask_ratio=0.5),
    "lexmae": dict(encoder_mask_ratio=0.3, mask="token", decoder_mask_ratio=0.5, decoder_layers=2),
    # decoder_layers of seed: None means 3, or 1 where the window is 8 or more
    "seed": dict(encoder_mask_ratio=0.15, mask="token", attention_window=2, decoder_layers=None),
    "condenser": dict(encoder_mask_ratio=0.15, mask="whole_word", decoder_layers=2),
    "cocondenser": dict(
        encoder_mask_ratio=0.15, mask="whole_word", decoder_layers=2, span_tokens=30, chunk_size=0
    ),
}
DECODER_MASKS = 256  # RetroMAE's decoder chooses one of so many masks for each row of a text
BAG_WEIGHT = 0.1  # of DupMAE's bag of words


def flat(mask: Tensor) -> Tensor:
    """(B, L) bool -> (n,) places where it is True. A GPU waits for n: call it before encoding."""
    return mask.flatten().nonzero()[:, 0]


class View(NamedTuple):
    """What the decoder reads of a text beside the bottleneck, and what it predicts."""

    ids: Tensor  # (B, L) that it reads
    places: Tensor  # (n,) that have a label
    rows: Tensor | None = None  # (B or 1, L or 1, L) bool, True = row i sees column j; None = all


class MLM(nn.Module):
    """Masked language modelling, the control that every other objective must beat: BERT (arXiv
    1810.04805) with masks of whole words, or of single tokens.

    The others add losses by `more_terms`, and a decoder by `view` and

        decode(h (B, D), view, middle (B, L, D) of `encode` or None, batch) -> Term"""

    name = "mlm"
    decoder_of = "mlm"  # the objective whose decoder this one continues
    weight = 1.0  # of the losses of encoder and decoder
    middle = None  # the number of the layer whose states the decoder reads

    def __init__(self, lm: nn.Module, tokenizer, **options):
        """options: those of OPTIONS that differ from their defaults."""
        super().__init__()
        assert options.keys() <= OPTIONS[self.name].keys()
        self.lm = lm
        self.architecture = architectures.of(lm.config)
        self.options = OPTIONS[self.name] | options
        self.encoder_mask_ratio = self.options["encoder_mask_ratio"]
        self.mask_id = tokenizer.mask_token_id
        special = masking.special_table(tokenizer)
        starts = masking.word_start_table(tokenizer) | (self.options["mask"] == "token")
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("ordinary_ids", flat(~special), persistent=False)

    @property
    def settings(self) -> dict:
        """What decoder.json keeps."""
        return {"objective": self.name, "decoder": self.decoder_of, **self.options}

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        """-> loss terms by name."""
        terms, hidden = self.main_terms(batch, seed)
        return terms | self.more_terms(hidden, batch)

    def main_terms(self, batch: dict, seed: int) -> tuple[dict[str, Term], Tensor]:
        """(loss terms of encoder and decoder, last hidden states (B, L, D))."""
        corrupted, mask = self.corrupt(batch, seed)
        view = self.view(batch, mask, seed)
        masked = flat(mask)
        hidden, middle = self.encode(corrupted, batch)
        terms = {"encoder": self.predict(hidden.flatten(0, 1)[masked], masked, batch)}
        if view:
            h = self.bottleneck(hidden, batch)
            terms["decoder"] = self.decode(h, view, middle, batch)
        return {name: term._replace(weight=self.weight) for name, term in terms.items()}, hidden

    def words(self, batch: dict) -> Tensor:
        """(B, L) number of each token's word; -1 at special tokens and padding."""
        ids, keep = batch["input_ids"], batch["attention_mask"]
        return masking.word_index(ids, keep, self.starts, self.special)

    def noise(self, batch: dict, seed: int, stream: int, *shape: int) -> Tensor:
        """(B, *shape) random numbers in [0, 1), a function of (seed, stream, micro-step, row)."""
        seed = step_seed(seed, stream)
        return masking.counter_uniform(seed, batch["micro_step"], batch["rows"], shape)

    def budget(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) tokens to hide from the encoder. RetroMAE counts [CLS] and [SEP] as tokens."""
        return masking.mask_budget(attention_mask.sum(1), self.encoder_mask_ratio)

    @torch.no_grad()
    def corrupt(self, batch: dict, seed: int) -> tuple[Tensor, Tensor]:
        """((B, L) ids that the encoder reads, (B, L) bool, True = has a label)."""
        ids, words = batch["input_ids"], self.words(batch)
        noise = self.noise(batch, seed, ENCODER_MASK, 3, ids.shape[1])
        budget = self.budget(words, batch["attention_mask"])
        mask = masking.whole_word_mask(words, budget, noise[:, :1])[:, 0]
        return masking.corrupt(ids, mask, noise[:, 1:], self.mask_id, self.ordinary_ids), mask

    def view(self, batch: dict, mask: Tensor, seed: int) -> View | None:
        """What the decoder reads where the encoder reads the text under `mask` (B, L) bool. None:
        there is no decoder."""
        return None

    def encode(self, ids: Tensor, batch: dict) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) states after the last layer, and after layer `middle` if there is one."""
        inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
        if self.middle is None:
            return self.lm.base_model(**inputs).last_hidden_state, None
        found = self.lm.base_model(**inputs, output_hidden_states=True)
        middle = found.hidden_states[self.middle]
        if self.architecture.final_norm:
            middle = self.lm.base_model.get_submodule(self.architecture.final_norm)(middle)
        return found.last_hidden_state, middle

    def predict(self, states: Tensor, places: Tensor, batch: dict) -> Term:
        """The LM head's loss from the states (n, D) of `places`."""
        output = self.lm.get_output_embeddings()
        states = head_transform(self.lm, states)
        labels = batch["input_ids"].flatten()[places]
        return linear_cross_entropy(states, output.weight, output.bias, labels)

    def pooled_logits(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, V) highest logit of each term over the True positions of a mask (B, L)."""
        output = self.lm.get_output_embeddings()
        return max_pooled_logits(head_transform(self.lm, hidden), output.weight, output.bias, mask)

    def positions(self, length: int) -> Tensor:
        """(L, D) embeddings of the positions: the encoder's, or else the decoder's own."""
        table = getattr(self.decoder, "positions", None)
        if table is None:
            table = self.lm.base_model.embeddings.position_embeddings
        first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's offset
        return table.weight[first : first + length]

    def embed(self, **inputs: Tensor | None) -> Tensor:
        """input_ids (B, L), or inputs_embeds (B, L, D) -> (B, L, D) as a decoder reads them, with
        positions: norm and dropout as the encoder has them, then the decoder's own positions."""
        embeddings = self.lm.base_model.embeddings(**inputs)
        if self.architecture.positions:
            return embeddings
        return embeddings + self.positions(embeddings.shape[1])

    def bottleneck(self, hidden: Tensor, batch: dict) -> Tensor:
        """(B, L, D) of the encoder -> (B, D)."""
        return hidden[:, 0]

    def more_terms(self, hidden: Tensor, batch: dict) -> dict[str, Term]:
        """Losses beside those of encoder and decoder. hidden: (B, L, D), the last states"""
        return {}

    def represent(self, batch: dict) -> Tensor:
        """For the probe: (B, d) vectors that retrieval would compare by dot product."""
        return self.encode(batch["input_ids"], batch)[0][:, 0]

    def rebuild(self, batch: dict) -> Term | None:
        """For the probe: the decoder reads [MASK] for all ordinary tokens, in RetroMAE no token at
        all, and predicts them from the bottleneck of the clean text."""
        if not hasattr(self, "decoder"):
            return None
        ids, ordinary = batch["input_ids"], self.words(batch) >= 0
        h_only = torch.arange(ids.shape[1], device=ids.device) == 0
        view = View(ids.masked_fill(ordinary, self.mask_id), flat(ordinary), h_only[None, None])
        h = self.bottleneck(self.encode(ids, batch)[0], batch)
        middle = None if self.middle is None else self.encode(view.ids, batch)[1]
        return self.decode(h, view, middle, batch)

    def preview(self, batch: dict, seed: int) -> dict[str, Tensor]:
        """(B, L) ids that a dry run shows of the first text; of a decoder, the middle row."""
        corrupted, mask = self.corrupt(batch, seed)
        shown = {"first text": batch["input_ids"], "encoder reads": corrupted}
        if view := self.view(batch, mask, seed):
            seen = view.ids
            if view.rows is not None:
                row = int(batch["attention_mask"][0].sum()) // 2
                seen = seen.where(view.rows[:, row], self.mask_id)
            shown["decoder sees h and"] = seen
        return shown


class BagOfWords(MLM):
    """MLM, and the bag of words of the text predicted from [CLS] by the same LM head, without any
    decoder: "Drop your decoder" (arXiv 2401.11248), code `bowdpr`. Both read the masked text. The
    weight is 1 throughout (their recipes lower it to 0.1 along a cosine)."""

    name = decoder_of = "bow"

    def more_terms(self, hidden: Tensor, batch: dict) -> dict[str, Term]:
        output = self.lm.get_output_embeddings()
        logits = output(head_transform(self.lm, hidden[:, 0])).float()  # (B, V)
        return {"bow": bag_of_words(logits, batch["input_ids"], self.words(batch) >= 0)}


class RetroMAE(MLM):
    """MLM, and a one-layer decoder that rebuilds every token from h and a view of the text that is
    different in each row ("enhanced decoding"): RetroMAE (arXiv 2205.12035) section 3, official
    code `src/pretrain/`. Keys and values are the clean embeddings with h in slot 0. The decoder's
    masks are drawn independently of the encoder's. Both use the same LM head."""

    name = decoder_of = "retromae"

    def __init__(self, lm: nn.Module, tokenizer, **options):
        super().__init__(lm, tokenizer, **options)
        config = bert_config(lm.config)
        self.decoder = initialize(Layer(config), config)
        self.decoder.positions = own_positions(lm.config)

    @torch.no_grad()
    def view(self, batch: dict, mask: Tensor, seed: int) -> View:
        keep, words = batch["attention_mask"], self.words(batch)
        L = keep.shape[1]
        noise = self.noise(batch, seed, DECODER_MASK, min(L, DECODER_MASKS), L)
        budget = masking.mask_budget(keep.sum(1), self.options["decoder_mask_ratio"])
        hidden = masking.whole_word_mask(words, budget, noise)
        pick = self.noise(batch, seed, DECODER_ROW, L)
        rows = masking.position_specific_view(keep, hidden, pick)
        return View(batch["input_ids"], flat(words >= 0), rows)

    def states(self, h: Tensor, view: View) -> Tensor:
        """(B, D) -> (n, D) of the decoder."""
        keys = torch.cat([h[:, None], self.embed(input_ids=view.ids)[:, 1:]], 1)  # (B, L, D)
        return self.decoder(self.queries(h, keys.shape[1]), keys, view.rows, view.places)

    def queries(self, h: Tensor, length: int) -> Tensor:
        """(B, D) -> (B, L, D): h + the embedding of each position."""
        return h[:, None] + self.positions(length)

    def decode(self, h: Tensor, view: View, middle: None, batch: dict) -> Term:
        return self.predict(self.states(h, view), view.places, batch)


class DupMAE(RetroMAE):
    """RetroMAE, and the bag of words of the text predicted from the highest logit of each term:
    DupMAE (arXiv 2305.02564), code `modeling_duplex.py`.

        (1/N) sum_{v in T} -log softmax(mu)[v]      weight 0.1, see bag_of_words

    mu (B, V) = the encoder's logits of the masked text, maximum over all positions but [CLS].
    (Paper, eq. 6 to 9: no 1/N, weight 1.)"""

    name = decoder_of = "dupmae"

    def queries(self, h: Tensor, length: int) -> Tensor:
        """(B, D) -> (B, L, D): h + position and token type, norm, dropout, as in FlagEmbedding."""
        everywhere = h[:, None].expand(-1, length, -1)
        return self.embed(input_ids=None, inputs_embeds=everywhere)

    def more_terms(self, hidden: Tensor, batch: dict) -> dict[str, Term]:
        after_cls = F.pad(batch["attention_mask"][:, 1:], (1, 0)).bool()
        mu = self.pooled_logits(hidden, after_cls)  # (B, V)
        ordinary = self.words(batch) >= 0
        bag = bag_of_words(mu, batch["input_ids"], ordinary, ordinary.sum(1))
        return {"bow": bag._replace(weight=BAG_WEIGHT)}


class LexMAE(MLM):
    """MLM, and a decoder over [b ; masked embeddings] that predicts what is hidden from it, where
    the bottleneck b mixes word embeddings: LexMAE (arXiv 2208.14754), code `proj_sparse`.

    a = softmax over the vocabulary of the encoder's logits of the masked text, their maximum over
    all positions but those of special tokens;  b = a @ E, without a gradient to the embeddings E.
    The decoder's mask contains the encoder's and as many other tokens as its own ratio needs; its
    80/10/10 is drawn anew. Its LM head has a transform and bias of its own, and the encoder's
    output matrix. ModernBERT's decoder reads b after the embedding norm, as it reads the rest."""

    name = decoder_of = "lexmae"

    def __init__(self, lm: nn.Module, tokenizer, **options):
        super().__init__(lm, tokenizer, **options)
        rate, ratio = self.encoder_mask_ratio, self.options["decoder_mask_ratio"]
        if ratio < rate:
            raise UserError("--decoder_mask_ratio is below --encoder_mask_ratio — raise it")
        self.more = (ratio - rate) / (1 - rate)  # share that is hidden from the decoder alone
        config = bert_config(lm.config)
        layers = SlotDecoder(config, self.options["decoder_layers"])
        head = initialize(BertPredictionHeadTransform(config), config)
        self.decoder = nn.ModuleDict({"layers": layers, "head": head})
        self.decoder.register_parameter("bias", nn.Parameter(torch.zeros(lm.config.vocab_size)))
        self.decoder.add_module("positions", own_positions(lm.config))

    def budget(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return ((words >= 0).sum(1).double() * self.encoder_mask_ratio).ceil().long()

    @torch.no_grad()
    def view(self, batch: dict, mask: Tensor, seed: int) -> View:
        ids = batch["input_ids"]
        noise = self.noise(batch, seed, DECODER_MASK, 3, ids.shape[1])
        mask = mask | ((noise[:, 0] < self.more) & (self.words(batch) >= 0))
        ids = masking.corrupt(ids, mask, noise[:, 1:], self.mask_id, self.ordinary_ids)
        return View(ids, flat(mask))

    def lexicon(self, hidden: Tensor, batch: dict) -> Tensor:
        """(B, V) highest logit of each term over ordinary tokens, hidden or not."""
        return self.pooled_logits(hidden, self.words(batch) >= 0)

    def bottleneck(self, hidden: Tensor, batch: dict) -> Tensor:
        weights = self.lexicon(hidden, batch).softmax(1)
        b = weights @ self.lm.get_input_embeddings().weight.detach()
        if self.architecture.positions:
            return b
        return self.lm.base_model.embeddings(inputs_embeds=b[:, None])[:, 0]

    def decode(self, h: Tensor, view: View, middle: None, batch: dict) -> Term:
        rest = self.embed(input_ids=view.ids)
        states = self.decoder["layers"](h, rest, batch["attention_mask"], view.places)
        weight = self.lm.get_output_embeddings().weight
        labels = batch["input_ids"].flatten()[view.places]
        return linear_cross_entropy(self.decoder["head"](states), weight, self.decoder.bias, labels)

    def represent(self, batch: dict) -> Tensor:
        """Weights of the terms as in sparse retrieval, log(1 + relu(logits))."""
        hidden, _ = self.encode(batch["input_ids"], batch)
        return self.lexicon(hidden, batch).relu().log1p()


class SEED(MLM):
    """MLM, and a causal decoder that predicts each token from h and the few tokens before.
    SEED-Encoder (arXiv 2102.09206): model of the repository, task and loss of the authors' fairseq
    fork. Input [CLS] x1 ... xn, target x1 ... xn [SEP], both clean."""

    name = decoder_of = "seed"
    weight = 0.5

    def __init__(self, lm: nn.Module, tokenizer, **options):
        super().__init__(lm, tokenizer, **options)
        window = self.options["attention_window"]
        self.options["decoder_layers"] = self.options["decoder_layers"] or (1 if window >= 8 else 3)
        self.decoder = CausalDecoder(bert_config(lm.config), self.options["decoder_layers"], window)

    def view(self, batch: dict, mask: Tensor, seed: int) -> View:
        ids, keep = batch["input_ids"], batch["attention_mask"]
        rows = self.decoder.view(ids.shape[1], ids.device)
        return View(ids, flat(F.pad(keep[:, 1:], (1, 0))), rows[None])

    def decode(self, h: Tensor, view: View, middle: None, batch: dict) -> Term:
        ids, places = view.ids, view.places
        embedding = self.lm.get_input_embeddings()
        before = places - 1 - places // ids.shape[1]  # the inputs are (B, L - 1)
        states = self.decoder(embedding(ids[:, :-1]), h, before)
        labels = batch["input_ids"].flatten()[places]
        return linear_cross_entropy(states, embedding.weight, None, labels)


class Condenser(MLM):
    """MLM, and MLM of the same mask by a head of a few layers over [h ; middle layer states]:
    Condenser (arXiv 2104.08253), code `modeling.py`. The middle layer is half way (6 of 12), as in
    all recipes; ModernBERT's states pass its final norm. The mask ratio is of the tokens without
    [CLS] and [SEP]."""

    name = decoder_of = "condenser"

    def __init__(self, lm: nn.Module, tokenizer, **options):
        super().__init__(lm, tokenizer, **options)
        self.middle = lm.config.num_hidden_layers // 2
        self.decoder = SlotDecoder(bert_config(lm.config), self.options["decoder_layers"])

    def budget(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return masking.mask_budget((words >= 0).sum(1), self.encoder_mask_ratio)

    def view(self, batch: dict, mask: Tensor, seed: int) -> View:
        return View(self.corrupt(batch, seed)[0], flat(mask))

    def decode(self, h: Tensor, view: View, middle: Tensor, batch: dict) -> Term:
        states = self.decoder(h, middle, batch["attention_mask"], view.places)
        return self.predict(states, view.places, batch)


class CoCondenser(Condenser):
    """Condenser on two spans of each document, rows 2i and 2i + 1 of a batch, and a contrastive
    loss: which span of all processes is of the same document? coCondenser (arXiv 2108.05540); on
    the target corpora it is the pre-training of COCO-DR (2210.15212)."""

    name = "cocondenser"  # continues the head of condenser

    def forward(self, batch: dict, seed: int, chunk: bool = False) -> dict[str, Term] | tuple:
        """-> loss terms; of a chunk (terms without the contrast, h), without gradient ({}, h)."""
        if not chunk:
            return super().forward(batch, seed)
        if torch.is_grad_enabled():
            terms, hidden = self.main_terms(batch, seed)
            return terms, hidden[:, 0]
        return {}, self.encode(self.corrupt(batch, seed)[0], batch)[0][:, 0]

    def more_terms(self, hidden: Tensor, batch: dict) -> dict[str, Term]:
        return {"contrast": span_contrast(hidden[:, 0])}


OBJECTIVES = {
    cls.name: cls
    for cls in (MLM, BagOfWords, RetroMAE, DupMAE, LexMAE, SEED, Condenser, CoCondenser)
}
