"""Pre-training objectives: one class each, holding the masked language model `lm` and, if it has one, its decoder.

Legend: B texts, L tokens of the longest, D hidden size, V vocabulary, n labelled positions. attention_mask 1 = keep.
h (B, D) = the bottleneck, for all but LexMAE the encoder's last hidden state at position 0. `places` (n,) index the
flat (B·L) positions that have a label; an LM head runs there and nowhere else. Masks True = hidden from a model.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from lib.decoders import CausalDecoder, SlotDecoder, Transform, TwoStreamLayer, sizes_of
from lib.dist import all_gather_with_grad, world
from lib.files import UserError
from lib.gradcache import cached_backward
from lib.lm_head import head_transform, linear_cross_entropy, max_pooled_logits
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

# streams of random numbers, beside data order (0), negatives (1) and dropout (2)
ENCODER_MASK, DECODER_MASK, DECODER_ROW = 3, 4, 5


class Term(NamedTuple):
    """One loss term of a batch: sum over its labels, so that the caller can divide by the labels of all processes."""

    loss: Tensor  # sum over the labels
    labels: int
    correct: Tensor  # labels that scored highest
    weight: float = 1.0  # of the mean, in the loss


def flat(mask: Tensor) -> Tensor:
    """(B, L) bool -> (n,) places where it is True. A GPU waits here for the count: call it before the encoder."""
    return mask.flatten().nonzero()[:, 0]


class MLM(nn.Module):
    """Masked language modelling, the control every other objective must beat. BERT (arXiv 1810.04805) with whole-word
    masks, or with single tokens: exactly the budget, drawn without replacement, where BERT flips a coin per token.

    Batches hold input_ids, attention_mask (B, L); rows (B,), counted in the batch of all processes; micro_step."""

    objective = decoder_of = "mlm"  # decoder_of: the objective whose decoder this one goes on with

    def __init__(
        self, lm: nn.Module, tokenizer, encoder_mask_ratio: float = 0.3, mask: str = "whole_word"
    ):
        super().__init__()
        self.lm, self.encoder_mask_ratio, self.mask_id = (
            lm,
            encoder_mask_ratio,
            tokenizer.mask_token_id,
        )
        special, starts = special_table(tokenizer), word_start_table(tokenizer)
        self.register_buffer("special", special, persistent=False)
        whole = mask == "whole_word"
        self.register_buffer(
            "starts", starts if whole else torch.ones_like(starts), persistent=False
        )
        self.register_buffer("ordinary_ids", (~special).nonzero()[:, 0], persistent=False)
        self.settings = {"objective": self.objective, "decoder": self.decoder_of}
        self.settings |= {"encoder_mask_ratio": encoder_mask_ratio, "mask": mask}

    @classmethod
    def options(cls) -> set[str]:
        """Names of what it may be built with, beside `lm` and `tokenizer`."""
        kinds = [kind.__init__ for kind in cls.__mro__ if issubclass(kind, MLM)]
        names = {
            n
            for kind in kinds
            for n, p in inspect.signature(kind).parameters.items()
            if p.kind != p.VAR_KEYWORD
        }
        return names - {"self", "lm", "tokenizer"}

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        """-> loss terms by name."""
        corrupted, mask = self.corrupt(batch, seed)
        places = flat(mask)
        hidden = self.encode(corrupted, batch["attention_mask"])
        return {"encoder": self.predict(hidden, places, batch["input_ids"])}

    def words(self, batch: dict) -> Tensor:
        """(B, L) number of each token's word, -1 where no ordinary token stands."""
        return word_index(batch["input_ids"], batch["attention_mask"], self.starts, self.special)

    def budget(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) tokens to hide from the encoder: of a text of n tokens max(1, round(n * ratio)), [CLS] and [SEP]
        counted, as in RetroMAE."""
        return mask_budget(attention_mask.sum(1), self.encoder_mask_ratio)

    @torch.no_grad()
    def corrupt(self, batch: dict, seed: int) -> tuple[Tensor, Tensor]:
        """((B, L) ids that the encoder reads, (B, L) bool, True = has a label)."""
        ids, keep, seed = batch["input_ids"], batch["attention_mask"], step_seed(seed, ENCODER_MASK)
        noise = counter_uniform(
            seed, batch["micro_step"], batch["rows"], (3, ids.shape[1]), ids.device
        )
        words = self.words(batch)
        mask = whole_word_mask(words, self.budget(words, keep), noise[:, 0])
        return corrupt(ids, mask, noise[:, 1:], self.mask_id, self.ordinary_ids), mask

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.lm.base_model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state  # (B, L, D)

    def predict(self, hidden: Tensor, places: Tensor, input_ids: Tensor) -> Term:
        """The LM head's loss at `places`. hidden: (B, L, D), or (n, D) if it holds those only   input_ids: (B, L)."""
        hidden = hidden.flatten(0, 1)[places] if hidden.ndim == 3 else hidden
        output, labels = self.lm.get_output_embeddings(), input_ids.flatten()[places]
        loss, correct = linear_cross_entropy(
            head_transform(self.lm, hidden), output.weight, output.bias, labels
        )
        return Term(loss, len(labels), correct)

    # ---- what the probe asks, and what a dry run shows

    def represent(self, batch: dict) -> Tensor:
        """(B, d) the vectors of clean texts that retrieval would compare by dot product, before any fine-tuning."""
        return self.encode(batch["input_ids"], batch["attention_mask"])[:, 0]

    def rebuild(self, batch: dict) -> Term | None:
        """All ordinary tokens predicted by the decoder from the bottleneck of the clean text alone, its context
        hidden; None without a decoder."""
        return None

    def preview(self, batch: dict, seed: int, tokenizer) -> dict[str, str]:
        """The first text of a batch as the models see it."""
        length = int(batch["attention_mask"][0].sum())
        corrupted, mask = self.corrupt(batch, seed)
        return {
            "first text": tokenizer.decode(batch["input_ids"][0, :length]),
            "encoder reads": tokenizer.decode(corrupted[0, :length]),
            "encoder predicts": f"{mask.sum() / batch['attention_mask'].sum():.1%} of the tokens",
        }


class RetroMAE(MLM):
    """MLM, and a one-layer decoder that rebuilds every token of the text from h and a view of the text that is another
    in each row ("enhanced decoding"). RetroMAE (arXiv 2205.12035) section 3; official code `src/pretrain/`.

    query_stream: how h meets the positions. "raw": h + position, the RetroMAE repository; "normed": through the whole
    embedding layer (token type, norm, dropout), FlagEmbedding and DupMAE. Keys and values are the clean embeddings
    with h in slot 0, the decoder's masks are drawn apart from the encoder's, and both share the LM head."""

    objective = decoder_of = "retromae"

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        encoder_mask_ratio: float = 0.3,
        mask: str = "whole_word",
        decoder_mask_ratio: float = 0.5,
        decoder_masks: int = 256,
        query_stream: str = "raw",
    ):
        super().__init__(lm, tokenizer, encoder_mask_ratio, mask)
        self.decoder = TwoStreamLayer(sizes_of(lm.config))
        self.decoder_mask_ratio, self.decoder_masks = decoder_mask_ratio, decoder_masks
        self.query_stream = query_stream
        self.settings |= {
            "decoder_mask_ratio": decoder_mask_ratio,
            "decoder_masks": decoder_masks,
            "query_stream": query_stream,
        }

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        return self.auto_encode(batch, seed)[0]

    def auto_encode(self, batch: dict, seed: int) -> tuple[dict[str, Term], Tensor, Tensor]:
        """(loss terms, (B, L, D) hidden states, (B, L) the encoder's mask)."""
        ids = batch["input_ids"]
        corrupted, mask = self.corrupt(batch, seed)
        view, target = self.view(batch, seed)
        masked, targets = flat(mask), flat(target)
        hidden = self.encode(corrupted, batch["attention_mask"])
        decoded = self.decode(hidden[:, 0], ids, view, targets)
        terms = {
            "encoder": self.predict(hidden, masked, ids),
            "decoder": self.predict(decoded, targets, ids),
        }
        return terms, hidden, mask

    @torch.no_grad()
    def view(self, batch: dict, seed: int) -> tuple[Tensor, Tensor]:
        """((B, L, L) bool, True = row i may attend to column j; (B, L) bool, True = has a label: ordinary tokens)."""
        keep, words, L = batch["attention_mask"], self.words(batch), batch["input_ids"].shape[1]
        place = batch["micro_step"], batch["rows"]
        noise = counter_uniform(
            step_seed(seed, DECODER_MASK), *place, (min(L, self.decoder_masks), L), keep.device
        )
        budget = mask_budget(keep.sum(1), self.decoder_mask_ratio)
        pick = counter_uniform(step_seed(seed, DECODER_ROW), *place, (L,), keep.device)
        return position_specific_view(
            words, keep, whole_word_mask(words, budget, noise), pick
        ), words >= 0

    def decode(self, h: Tensor, input_ids: Tensor, view: Tensor, places: Tensor) -> Tensor:
        """h: (B, D)   input_ids: (B, L) clean   view: (B, L, L) bool, True = visible   ->   (n, D) at `places`."""
        embeddings, config = self.lm.base_model.embeddings, self.lm.config
        keys = torch.cat([h[:, None], embeddings(input_ids=input_ids)[:, 1:]], 1)  # (B, L, D)
        if self.query_stream == "raw":
            first = config.pad_token_id + 1 if config.model_type == "roberta" else 0
            positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            queries = h[:, None] + embeddings.position_embeddings(positions)
        else:
            queries = embeddings(input_ids=None, inputs_embeds=h[:, None].expand_as(keys))
        return self.decoder(queries, keys, view, places)

    def rebuild(self, batch: dict) -> Term:
        ids, targets = batch["input_ids"], flat(self.words(batch) >= 0)
        h_only = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool, device=ids.device)
        h_only[..., 0] = True
        return self.predict(self.decode(self.represent(batch), ids, h_only, targets), targets, ids)

    def preview(self, batch: dict, seed: int, tokenizer) -> dict[str, str]:
        length = int(batch["attention_mask"][0].sum())
        tokens, row = tokenizer.convert_ids_to_tokens(batch["input_ids"][0, :length]), length // 2
        seen = self.view(batch, seed)[0][0, row, :length].tolist()
        context = " ".join(
            token if see else "_" for token, see in zip(tokens, seen, strict=True)
        ).split(" ", 1)[-1]
        return super().preview(batch, seed, tokenizer) | {
            f"decoder row {row}": f"{tokens[row]} from h and {context}"
        }


class DupMAE(RetroMAE):
    """RetroMAE, and the set of the text's tokens predicted from the highest logit of each term over the positions, so
    that ordinary tokens carry the text too. DupMAE (arXiv 2305.02564), code `modeling_duplex.py` of RetroMAE.

    mu (B, V) = the encoder's own logits, of the masked text, at their maximum over all positions but [CLS]; with the
    distinct tokens T of N ordinary ones:
    bow "official", the code:  (1/N) sum_{v in T} -log softmax(mu)[v], weight 0.1
    bow "paper", eq. 6 to 9:    sum_{v in T} -log softmax(mu)[v], weight 1, hidden tokens kept out of the maximum
    (but with the LM head, as the code, where the paper has a linear layer of its own). Mean over the texts that have a
    token; `correct` counts those whose highest term is one of T."""

    objective = decoder_of = "dupmae"

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        query_stream: str = "normed",
        bow: str = "official",
        bow_weight: float | None = None,
        **retromae,
    ):
        super().__init__(lm, tokenizer, query_stream=query_stream, **retromae)
        self.bow = bow
        self.bow_weight = {"official": 0.1, "paper": 1.0}[bow] if bow_weight is None else bow_weight
        self.settings |= {"bow": bow, "bow_weight": self.bow_weight}

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        terms, hidden, mask = self.auto_encode(batch, seed)
        counts = batch["attention_mask"].bool()
        counts = counts & ~mask if self.bow == "paper" else counts
        counts = counts & (torch.arange(counts.shape[1], device=counts.device) > 0)
        return {**terms, "bow": self.bag_of_words(hidden, counts, batch)}

    def bag_of_words(self, hidden: Tensor, counts: Tensor, batch: dict) -> Term:
        """hidden: (B, L, D)   counts: (B, L) bool, True = in the maximum."""
        output, ordinary = self.lm.get_output_embeddings(), self.words(batch) >= 0
        mu = max_pooled_logits(
            head_transform(self.lm, hidden), output.weight, output.bias, counts
        )  # (B, V)
        tokens = batch["input_ids"].masked_fill(~ordinary, -1).sort(1).values
        distinct = (tokens >= 0) & (tokens != F.pad(tokens[:, :-1], (1, 0), value=-1))
        found = mu.gather(1, tokens.clamp(min=0))  # (B, L)
        loss = ((mu.logsumexp(1, keepdim=True) - found) * distinct).sum(1)
        loss = loss / ordinary.sum(1).clamp(min=1) if self.bow == "official" else loss
        correct = ((found == mu.amax(1, keepdim=True)) & distinct).any(1).sum()
        return Term(loss.sum(), int(ordinary.any(1).sum()), correct, self.bow_weight)


class LexMAE(MLM):
    """MLM, and two layers over [b ; masked embeddings] that predict what is hidden from them, where the bottleneck b
    is a mixture of word embeddings. LexMAE (arXiv 2208.14754), code `proj_sparse` of its repository:

    a = softmax over the vocabulary of the encoder's logits, of the masked text, at their maximum over all positions
    but those of special tokens;  b = a @ E. By this product no gradient reaches the embeddings E, all of it goes
    through a. The decoder's mask holds the encoder's and of the other tokens so many that its ratio is met; its
    80/10/10 is drawn anew. Its LM head has a transform and bias of its own, and the encoder's output matrix."""

    objective = decoder_of = "lexmae"

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        encoder_mask_ratio: float = 0.3,
        mask: str = "token",
        decoder_mask_ratio: float = 0.5,
        decoder_layers: int = 2,
    ):
        super().__init__(lm, tokenizer, encoder_mask_ratio, mask)
        if decoder_mask_ratio < encoder_mask_ratio:
            raise UserError(
                f"--decoder_mask_ratio {decoder_mask_ratio}: the decoder's mask holds the encoder's — choose it at "
                f"least --encoder_mask_ratio {encoder_mask_ratio}"
            )
        sizes, output = sizes_of(lm.config), lm.get_output_embeddings()
        self.decoder = nn.ModuleDict(
            {"layers": SlotDecoder(sizes, decoder_layers), "head": Transform(sizes)}
        )
        self.decoder.register_parameter("bias", nn.Parameter(torch.zeros_like(output.bias)))
        self.decoder_mask_ratio = decoder_mask_ratio
        self.settings |= {
            "decoder_mask_ratio": decoder_mask_ratio,
            "decoder_layers": decoder_layers,
        }

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        ids, keep = batch["input_ids"], batch["attention_mask"]
        corrupted, mask = self.corrupt(batch, seed)
        decoder_ids, decoder_mask = self.corrupt_again(batch, mask, seed)
        masked, targets = flat(mask), flat(decoder_mask)
        hidden = self.encode(corrupted, keep)
        b = self.bottleneck(self.lexicon(hidden, batch))
        return {
            "encoder": self.predict(hidden, masked, ids),
            "decoder": self.decode(b, decoder_ids, targets, batch),
        }

    def budget(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return ((words >= 0).sum(1).double() * self.encoder_mask_ratio).ceil().long()

    @torch.no_grad()
    def corrupt_again(self, batch: dict, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """((B, L) ids that the decoder reads, (B, L) bool, True = has a label there). mask: the encoder's."""
        ids, rate = batch["input_ids"], self.encoder_mask_ratio
        seed, place = step_seed(seed, DECODER_MASK), (batch["micro_step"], batch["rows"])
        noise = counter_uniform(seed, *place, (3, ids.shape[1]), ids.device)
        more = noise[:, 0] < (self.decoder_mask_ratio - rate) / (1 - rate)
        mask = mask | (more & (self.words(batch) >= 0))
        return corrupt(ids, mask, noise[:, 1:], self.mask_id, self.ordinary_ids), mask

    def lexicon(self, hidden: Tensor, batch: dict) -> Tensor:
        """(B, V) the highest logit of each term over the places of ordinary tokens, hidden ones among them."""
        output, states = self.lm.get_output_embeddings(), head_transform(self.lm, hidden)
        return max_pooled_logits(states, output.weight, output.bias, self.words(batch) >= 0)

    def bottleneck(self, lexicon: Tensor) -> Tensor:
        """(B, V) -> b (B, D)."""
        return lexicon.softmax(1) @ self.lm.get_input_embeddings().weight.detach()

    def decode(self, b: Tensor, decoder_ids: Tensor, places: Tensor, batch: dict) -> Term:
        rest = self.lm.base_model.embeddings(input_ids=decoder_ids)
        states = self.decoder["head"](
            self.decoder["layers"](b, rest, batch["attention_mask"], places)
        )
        weight, labels = (
            self.lm.get_output_embeddings().weight,
            batch["input_ids"].flatten()[places],
        )
        loss, correct = linear_cross_entropy(states, weight, self.decoder.bias, labels)
        return Term(loss, len(labels), correct)

    def represent(self, batch: dict) -> Tensor:
        """Term weights as of the sparse retriever that this objective prepares: log(1 + relu(logits))."""
        return (
            self.lexicon(self.encode(batch["input_ids"], batch["attention_mask"]), batch)
            .relu()
            .log1p()
        )

    def rebuild(self, batch: dict) -> Term:
        hidden, ordinary = (
            self.encode(batch["input_ids"], batch["attention_mask"]),
            self.words(batch) >= 0,
        )
        hidden_ids = batch["input_ids"].masked_fill(ordinary, self.mask_id)
        return self.decode(
            self.bottleneck(self.lexicon(hidden, batch)), hidden_ids, flat(ordinary), batch
        )

    def preview(self, batch: dict, seed: int, tokenizer) -> dict[str, str]:
        length = int(batch["attention_mask"][0].sum())
        decoder_ids, mask = self.corrupt_again(batch, self.corrupt(batch, seed)[1], seed)
        return super().preview(batch, seed, tokenizer) | {
            "decoder reads": tokenizer.decode(decoder_ids[0, :length]),
            "decoder predicts": f"{mask.sum() / batch['attention_mask'].sum():.1%} of the tokens",
        }


class SEED(MLM):
    """MLM, and a causal decoder that is too weak to do without h: each token from h and the few tokens before it.
    SEED-Encoder (arXiv 2102.09206); model of the repository, task and loss of the authors' fairseq fork.

    Input [CLS] x1 ... xn, target x1 ... xn [SEP], both clean; loss 0.5 MLM + 0.5 decoder. attention_window counts the
    tokens a position reads, its own input among them: 2 (with 3 layers) or 8 (with 1)."""

    objective = decoder_of = "seed"

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        encoder_mask_ratio: float = 0.15,
        mask: str = "token",
        attention_window: int = 2,
        decoder_layers: int | None = None,
    ):
        super().__init__(lm, tokenizer, encoder_mask_ratio, mask)
        layers = decoder_layers or (1 if attention_window >= 8 else 3)
        self.decoder = CausalDecoder(sizes_of(lm.config), layers, attention_window)
        self.settings |= {"attention_window": attention_window, "decoder_layers": layers}

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        corrupted, mask = self.corrupt(batch, seed)
        masked, targets = flat(mask), self.targets(batch)
        hidden = self.encode(corrupted, batch["attention_mask"])
        terms = {
            "encoder": self.predict(hidden, masked, batch["input_ids"]),
            "decoder": self.decode(hidden[:, 0], batch["input_ids"], targets, batch),
        }
        return {name: term._replace(weight=0.5) for name, term in terms.items()}

    def targets(self, batch: dict) -> Tensor:
        """(n,) places, of the flat (B·(L - 1)) inputs, that a token follows."""
        return flat(batch["attention_mask"][:, 1:].bool())

    def decode(self, h: Tensor, decoder_ids: Tensor, places: Tensor, batch: dict) -> Term:
        """h: (B, D)   decoder_ids: (B, L), of which the last is not read."""
        embedding = self.lm.get_input_embeddings()
        states = self.decoder(embedding(decoder_ids[:, :-1]), h, places)
        labels = batch["input_ids"][:, 1:].flatten()[places]
        loss, correct = linear_cross_entropy(states, embedding.weight, None, labels)
        return Term(loss, len(labels), correct)

    def rebuild(self, batch: dict) -> Term:
        hidden_ids = batch["input_ids"].masked_fill(self.words(batch) >= 0, self.mask_id)
        followed = flat(self.words(batch)[:, 1:] >= 0)
        return self.decode(self.represent(batch), hidden_ids, followed, batch)

    def preview(self, batch: dict, seed: int, tokenizer) -> dict[str, str]:
        length = int(batch["attention_mask"][0].sum())
        tokens, row = (
            tokenizer.convert_ids_to_tokens(batch["input_ids"][0, :length]),
            max(length // 2 - 1, 0),
        )
        context = " ".join(
            t for t, see in zip(tokens, self.decoder.view(length)[row], strict=True) if see
        )
        return super().preview(batch, seed, tokenizer) | {
            f"decoder row {row}": f"{tokens[row + 1]} from h and {context}"
        }


class Condenser(MLM):
    """MLM by a head of a few layers over [last state at position 0 ; states of layer skip_from elsewhere], so that
    late layers can pass on what they know through h only. Condenser (arXiv 2104.08253), code `modeling.py`.

    skip_from: None = half of the layers (6 of 12, as in all recipes); 0 would be the embeddings. late_mlm adds the MLM
    of the encoder itself, with the same mask and LM head. Whole-word masks of 0.15, [CLS] and [SEP] not counted."""

    objective = decoder_of = "condenser"

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        encoder_mask_ratio: float = 0.15,
        mask: str = "whole_word",
        decoder_layers: int = 2,
        skip_from: int | None = None,
        late_mlm: bool = True,
    ):
        super().__init__(lm, tokenizer, encoder_mask_ratio, mask)
        layers = lm.config.num_hidden_layers
        self.skip_from, self.late_mlm = layers // 2 if skip_from is None else skip_from, late_mlm
        if not 0 <= self.skip_from < layers:
            raise UserError(
                f"--skip_from {skip_from}: the encoder has {layers} layers — choose one before the last"
            )
        self.decoder = SlotDecoder(sizes_of(lm.config), decoder_layers)
        self.settings |= {
            "decoder_layers": decoder_layers,
            "skip_from": self.skip_from,
            "late_mlm": late_mlm,
        }

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        return self.condense(batch, seed)[0]

    def budget(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return mask_budget((words >= 0).sum(1), self.encoder_mask_ratio)

    def condense(self, batch: dict, seed: int) -> tuple[dict[str, Term], Tensor]:
        """(loss terms, h (B, D))."""
        ids, keep = batch["input_ids"], batch["attention_mask"]
        corrupted, mask = self.corrupt(batch, seed)
        places = flat(mask)
        hidden, middle = self.states(corrupted, keep)
        decoded = self.decoder(hidden[:, 0], middle, keep, places)
        terms = {"encoder": self.predict(hidden, places, ids)} if self.late_mlm else {}
        return {**terms, "decoder": self.predict(decoded, places, ids)}, hidden[:, 0]

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) after the last layer and after layer skip_from."""
        found = self.lm.base_model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        )
        return found.last_hidden_state, found.hidden_states[self.skip_from]

    def rebuild(self, batch: dict) -> Term:
        """The middle states are those of a text of as many [MASK]."""
        ids, keep, ordinary = batch["input_ids"], batch["attention_mask"], self.words(batch) >= 0
        middle, places = (
            self.states(ids.masked_fill(ordinary, self.mask_id), keep)[1],
            flat(ordinary),
        )
        return self.predict(self.decoder(self.represent(batch), middle, keep, places), places, ids)


class CoCondenser(Condenser):
    """Condenser on two spans of one document at a time, and a contrastive loss: among the spans of all processes,
    which one is of the same document? coCondenser (arXiv 2108.05540); on the target corpora it is the pre-training of
    COCO-DR (2210.15212). Rows 2i and 2i + 1 of a batch are the spans of a document; similarity is the dot product."""

    objective = "cocondenser"  # goes on with the head of condenser

    def forward(
        self, batch: dict, seed: int, chunk: bool = False
    ) -> dict[str, Term] | tuple[dict[str, Term], Tensor]:
        """Of a chunk, some rows of a batch: (terms but "contrast", h), and without gradient h alone."""
        if chunk and not torch.is_grad_enabled():
            return {}, self.encode(self.corrupt(batch, seed)[0], batch["attention_mask"])[:, 0]
        terms, h = self.condense(batch, seed)
        return (terms, h) if chunk else {**terms, "contrast": span_contrast(h)}

    def preview(self, batch: dict, seed: int, tokenizer) -> dict[str, str]:
        second = batch["input_ids"][1, : batch["attention_mask"][1].sum()]
        return {
            **super().preview(batch, seed, tokenizer),
            "its other span": tokenizer.decode(second),
        }


def span_contrast(h: Tensor) -> Term:
    """Cross-entropy of each span over all others of all processes, of which its partner, row r XOR 1, is right.

    loss_r = -log( exp(s[r, r ^ 1]) / sum_{j != r} exp(s[r, j]) ),  s = h @ h_all.T in fp32
    h: (n, D), n even, equal on all processes   ->   the sum over the n local rows. Copies of a document count as
    negatives."""
    everyone, n = all_gather_with_grad(h.float()), len(h)  # (W·n, D)
    rows = world()[0] * n + torch.arange(n, device=h.device)
    with torch.autocast(h.device.type, enabled=False):
        scores = h.float() @ everyone.T
    scores = scores.scatter(1, rows[:, None], float("-inf"))
    loss = F.cross_entropy(scores, rows ^ 1, reduction="sum")
    return Term(loss, n, (scores.argmax(1) == rows ^ 1).sum())


def span_backward(
    accelerator: Accelerator, model: nn.Module, batch: dict, seed: int, rows: int, dropout_seed: int
) -> dict[str, Term]:
    """coCondenser's step by `rows` spans at a time: the MLM losses belong to a chunk, the contrast to all of them.
    model: the prepared CoCondenser. Backpropagates what the plain step would; returns its loss terms, detached.
    The labels are counted first: a chunk's share of the mean needs those of all chunks and processes."""
    W, B = accelerator.num_processes, len(batch["rows"])
    parts = [slice(start, start + rows) for start in range(0, B, rows)]
    widths = [int(batch["attention_mask"][part].sum(1).max()) for part in parts]
    tensors = {name: x for name, x in batch.items() if torch.is_tensor(x) and len(x) == B}
    chunks = [
        {name: x[part, :width] if x.ndim == 2 else x[part] for name, x in tensors.items()}
        for part, width in zip(parts, widths, strict=True)
    ]
    labels = accelerator.unwrap_model(model).corrupt(batch, seed)[1].sum()
    labels, found = accelerator.reduce(labels, "sum").clamp(min=1), {}

    def encode(index: int) -> tuple[Tensor, Tensor | float]:
        terms, h = model({**chunks[index], "micro_step": batch["micro_step"]}, seed, chunk=True)
        for name, term in terms.items():
            found.setdefault(name, []).append(term)
        return h, sum(W * term.loss / labels for term in terms.values())

    def contrast(reps: list[Tensor]) -> tuple[Tensor, Term]:
        term = span_contrast(torch.cat(reps))
        return term.loss / term.labels, term

    _, term = cached_backward(accelerator, model, encode, len(chunks), contrast, dropout_seed)
    terms = {
        name: Term(*map(sum, list(zip(*some, strict=True))[:3])) for name, some in found.items()
    }
    return {
        name: t._replace(loss=t.loss.detach()) for name, t in {**terms, "contrast": term}.items()
    }
