"""pytest tests/test_mae.py — losses against loops written from the formulas, leaks, padding, two
processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from architectures import KINDS, tiny_config
from gloo import spawn_two
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lib.checkpoint import load_lm
from lib.files import UserError
from lib.objectives import (
    MLM,
    SEED,
    BagOfWords,
    CoCondenser,
    Condenser,
    DupMAE,
    LexMAE,
    RetroMAE,
    View,
)
from lib.spans import span_backward, span_contrast
from lib.text import pad
from pretrain_mae import mean_loss

OBJECTIVES = {
    "mlm": (MLM, {}),
    "bow": (BagOfWords, {}),
    "retromae": (RetroMAE, {}),
    "dupmae": (DupMAE, {}),
    "lexmae": (LexMAE, {}),
    "seed": (SEED, {}),
    "seed 8": (SEED, {"attention_window": 8}),
    "condenser": (Condenser, {}),
    "cocondenser": (CoCondenser, {}),
}
TEXTS = [
    "queen worker nest and the volcanoes, lava and ash of mount unpronounceablewordofmanypieces",
    "ice",
    "",
    "a b",
]


def build(tokenizer, architecture="bert", objective="retromae"):
    torch.manual_seed(0)
    config = tiny_config(architecture, tokenizer)
    cls, options = OBJECTIVES[objective]
    model = cls(AutoModelForMaskedLM.from_config(config), tokenizer, **options)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # biases and norms are constant at first: hide no mistake
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name.lower()), std=0.1)
    return model


def make_batch(tokenizer, texts=TEXTS, micro_step=3):
    return pad(tokenizer(texts)["input_ids"], tokenizer) | {
        "rows": torch.arange(len(texts)),
        "micro_step": micro_step,
    }


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def logits_of(lm, hidden):
    """The full LM head, as the model's own forward applies it."""
    if hasattr(lm, "cls"):
        return lm.cls(hidden)
    if hasattr(lm, "lm_head"):
        return lm.lm_head(hidden)
    if hasattr(lm, "head"):
        return lm.decoder(lm.head(hidden))
    return lm.vocab_projector(lm.vocab_layer_norm(lm.activation(lm.vocab_transform(hidden))))


def attend(layer, query, keys):
    """(D,) what a query state hears of (n, D) key states: four heads of 8, one by one."""
    k, v, heads = layer.key(keys), layer.value(keys), []
    for q, k1, v1 in zip(layer.query(query).split(8), k.split(8, 1), v.split(8, 1), strict=True):
        heads.append(torch.softmax(k1 @ q / math.sqrt(8), 0) @ v1)
    return layer.attention_output(torch.cat(heads))


def feed_forward(layer, x):
    return layer.down(F.gelu(layer.up(x)))


def slot_layers(layers, x):
    """(L, D) -> (L, D) of an unpadded text."""
    for layer in layers:
        x = torch.stack([layer.attention_norm(attend(layer, row, x) + row) for row in x])
        x = layer.output_norm(feed_forward(layer, x) + x)
    return x


def nll(logits, label):
    return -torch.log_softmax(logits, -1)[label]


def naive_retromae(model, b, ids, h, view):
    """[loss of each ordinary token] of one unpadded text."""
    layer, lm = model.decoder, model.lm
    embed = lm.base_model.embeddings
    clean, length = embed(input_ids=ids[None])[0], len(ids)
    normed = embed(input_ids=None, inputs_embeds=h.expand(1, length, -1))[0]
    if lm.config.model_type == "modernbert":
        positions = layer.positions.weight[:length]
        clean, normed = clean + positions, normed + positions
    else:
        first = 1 + lm.config.pad_token_id if hasattr(lm, "roberta") else 0
        positions = embed.position_embeddings.weight[first:]
    stream = torch.cat([h[None], clean[1:]])
    losses = []
    for i in range(1, length - 1):
        raw = h + positions[i]
        query = normed[i] if isinstance(model, DupMAE) else raw
        seen = [j for j in range(length) if view[b, i, j]]
        assert i not in seen and 0 in seen and length - 1 in seen
        x = layer.attention_norm(attend(layer, query, stream[seen]) + query)
        losses.append(nll(logits_of(lm, layer.output_norm(feed_forward(layer, x) + x)), ids[i]))
    return losses


def naive_lexmae(model, ids, logits, decoder_ids, decoder_mask):
    lm, length = model.lm, len(ids)
    inner = logits[1 : length - 1]
    u = inner.max(0).values if len(inner) else torch.zeros(logits.shape[-1])
    embedding = lm.get_input_embeddings().weight
    slot = torch.softmax(u, 0) @ embedding.detach()
    rest = lm.base_model.embeddings(input_ids=decoder_ids[None])[0]
    if lm.config.model_type == "modernbert":
        slot = lm.base_model.embeddings.norm(slot)
        rest = rest + model.decoder["positions"].weight[:length]
    x = torch.cat([slot[None], rest[1:]])
    x = slot_layers(model.decoder["layers"].layers, x)
    head = model.decoder["head"]
    scores = (
        head.LayerNorm(F.gelu(head.dense(x))) @ lm.get_output_embeddings().weight.T
        + model.decoder.bias
    )
    return [nll(scores[i], ids[i]) for i in range(length) if decoder_mask[i]]


def naive_seed(model, ids, h):
    decoder, embedding = model.decoder, model.lm.get_input_embeddings().weight
    T = len(ids) - 1
    x = decoder.embedding_norm(embedding[ids[:-1]] + decoder.positions.weight[:T])
    for layer in decoder.layers:
        normed, rows = layer.attention_norm(x), []
        for i in range(T):
            seen = sorted({0, *range(max(i - decoder.window + 1, 0), i + 1)})
            rows.append(attend(layer, normed[i], normed[seen]))
        x = x + torch.stack(rows)
        x = x + layer.bottleneck_output(layer.bottleneck_value(h))
        x = x + feed_forward(layer, layer.output_norm(x))
    return [nll(row @ embedding.T, ids[i + 1]) for i, row in enumerate(decoder.final_norm(x))]


def mask_of(view):
    """(B, L) bool, True = the decoder has a label there."""
    mask = torch.zeros_like(view.ids, dtype=torch.bool)
    mask.flatten()[view.places] = True
    return mask


def naive_bag(ids, logits):
    return sum(nll(logits, token) for token in set(ids[1:-1].tolist()))


def naive_terms(model, batch, seed):
    """{name: (sum, labels)} with dense logits and a loop over texts, rows, heads and visible
    columns."""
    lm, ids, keep = model.lm, batch["input_ids"], batch["attention_mask"]
    corrupted, mask = model.corrupt(batch, seed)
    view = model.view(batch, mask, seed)
    found = lm.base_model(input_ids=corrupted, attention_mask=keep, output_hidden_states=True)
    hidden, logits = found.last_hidden_state, lm(input_ids=corrupted, attention_mask=keep).logits
    terms = {"encoder": [], "decoder": [], "bow": [], "contrast": []}
    for b, length in enumerate(keep.sum(1).tolist()):
        text, h = ids[b, :length], hidden[b, 0]
        terms["encoder"] += [nll(logits[b, i], text[i]) for i in range(length) if mask[b, i]]
        if isinstance(model, RetroMAE):
            terms["decoder"] += naive_retromae(model, b, text, h, view.rows)
        if isinstance(model, DupMAE) and length > 2:
            most = logits[b, 1:length].max(0).values
            terms["bow"].append(naive_bag(text, most) / (length - 2))
        if isinstance(model, BagOfWords) and length > 2:
            terms["bow"].append(naive_bag(text, logits[b, 0]) / len(set(text[1:-1].tolist())))
        if isinstance(model, LexMAE):
            labelled = mask_of(view)
            terms["decoder"] += naive_lexmae(
                model, text, logits[b, :length], view.ids[b, :length], labelled[b]
            )
        if isinstance(model, SEED):
            terms["decoder"] += naive_seed(model, text, h)
        if isinstance(model, Condenser):
            middle = found.hidden_states[model.middle]
            if lm.config.model_type == "modernbert":
                middle = lm.base_model.final_norm(middle)
            x = torch.cat([h[None], middle[b, 1:length]])
            x = logits_of(lm, slot_layers(model.decoder.layers, x))
            terms["decoder"] += [nll(x[i], text[i]) for i in range(length) if mask[b, i]]
        if isinstance(model, CoCondenser):
            others = [c for c in range(len(ids)) if c != b]
            scores = torch.stack([h @ hidden[c, 0] for c in others])
            terms["contrast"].append(nll(scores, others.index(b + 1 if b % 2 == 0 else b - 1)))
    return {name: (sum(x), len(x)) for name, x in terms.items() if x}


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(g is not None for g in found), "an unused parameter would stop DDP"
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_those_of_the_formulas(tokenizer, architecture, objective):
    model, batch = build(tokenizer, architecture, objective), make_batch(tokenizer)
    terms, naive = model(batch, 7), naive_terms(model, batch, 7)
    assert terms.keys() == naive.keys()
    for name, (loss, labels) in naive.items():
        assert terms[name].labels == labels > 0
        torch.testing.assert_close(terms[name].loss / labels, loss / labels, atol=1e-5, rtol=1e-6)
    weights = {"seed": {"encoder": 0.5, "decoder": 0.5}, "dupmae": {"bow": 0.1}}.get(
        objective.split()[0], {}
    )
    theirs = sum(weights.get(name, 1.0) * loss / labels for name, (loss, labels) in naive.items())
    loss, _ = mean_loss(Accelerator(cpu=True), terms)
    torch.testing.assert_close(loss, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradients(loss, model), gradients(theirs, model), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_under_autocast_losses_are_fp32_and_near(tokenizer, architecture, objective, dtype):
    """Also: no NaN comes from padding or from a text without tokens (RetroMAE issue 35)."""
    model, batch = build(tokenizer, architecture, objective), make_batch(tokenizer)
    full = model(batch, 7)
    with torch.autocast("cpu", dtype):
        low = model(batch, 7)
    for name, term in low.items():
        assert term.loss.dtype == torch.float32
        torch.testing.assert_close(term.loss, full[name].loss, rtol=0.1, atol=0.1)
    grads = [gradients(mean_loss(Accelerator(cpu=True), terms)[0], model) for terms in (full, low)]
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_texts_without_tokens_have_a_finite_loss_and_no_mlm(tokenizer, objective):
    model = build(tokenizer, "bert", objective)
    terms = model(make_batch(tokenizer, ["", ""]), 0)
    loss, _ = mean_loss(Accelerator(cpu=True), terms)
    own = {name for name, term in terms.items() if term.labels}
    assert own == (
        {"decoder"} if objective.startswith("seed") else {"contrast"} & terms.keys()
    )  # SEED's [SEP]
    grad = gradients(loss, model)
    assert torch.isfinite(grad).all() and (own or not (loss or grad.any()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_labels_stand_at_ordinary_tokens_only(tokenizer, objective):
    model, batch = build(tokenizer, "bert", objective), make_batch(tokenizer)
    ordinary = model.words(batch) >= 0
    corrupted, mask = model.corrupt(batch, 1)
    assert (
        mask.any()
        and not (mask & ~ordinary).any()
        and torch.equal(corrupted[~mask], batch["input_ids"][~mask])
    )
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    assert not special & set(batch["input_ids"][ordinary].tolist())
    rebuilt = model.rebuild(batch)
    assert rebuilt is None if objective in ("mlm", "bow") else rebuilt.labels == ordinary.sum()


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("objective", ["retromae", "dupmae"])
def test_retromae_no_token_reaches_its_own_prediction(tokenizer, objective, architecture):
    model, batch = build(tokenizer, architecture, objective), make_batch(tokenizer)
    ids, view = batch["input_ids"], model.view(batch, None, 0).rows
    places, h = torch.arange(ids.numel()), torch.randn(len(ids), 32)
    length = int(batch["attention_mask"][0].sum())

    def rows(h, ids):
        return model.states(h, View(ids, places, view)).view(*ids.shape, -1)[0, :length]

    before, moved = rows(h, ids), 0
    for i in range(1, length - 1):
        other = ids.clone()
        other[0, i] = tokenizer.vocab_size - 1 - ids[0, i]
        change = (rows(h, other) - before).abs().amax(-1)
        assert change[i] == 0 and ((change > 1e-6) == view[0, :length, i]).all()
        moved += int((change > 1e-6).sum())
    assert moved > length
    assert ((rows(h + 0.1 * torch.randn(32), ids) - before).abs().amax(-1) > 1e-6).all(), (
        "h reaches every row"
    )
    swapped = ids.clone()
    swapped[0, 0] = tokenizer.mask_token_id
    assert torch.equal(rows(h, swapped), before), "slot 0 is h, not an embedding"


def test_dupmae_counts_each_token_once(tokenizer):
    model = build(tokenizer, "bert", "dupmae")
    batch = make_batch(tokenizer, ["ash ice", "ash ash ash ash ice ice"])
    hidden = torch.randn(32).expand(
        2, batch["input_ids"].shape[1], 32
    )  # equal maxima: the targets alone can differ
    texts = [{name: batch[name][[b]] for name in ("input_ids", "attention_mask")} for b in (0, 1)]
    one = [model.more_terms(hidden[[b]], text)["bow"] for b, text in enumerate(texts)]
    lengths = batch["attention_mask"].sum(1) - 2
    assert lengths[1] > lengths[0]
    torch.testing.assert_close(one[0].loss * lengths[0], one[1].loss * lengths[1])
    parts = model.lm.cls.predictions.transform.dense.weight, model.lm.get_output_embeddings().weight
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(one[0].loss, parts))


def test_lexmae_bottleneck_and_masks(tokenizer, monkeypatch):
    model = build(tokenizer, "bert", "lexmae")
    E = model.lm.get_input_embeddings().weight
    u = torch.randn(2, len(E), requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(model, "lexicon", lambda hidden, batch: u)
        b = model.bottleneck(None, None)
    torch.testing.assert_close(b, torch.softmax(u, 1) @ E.detach())
    grad_u, grad_e = torch.autograd.grad(b.pow(2).sum(), (u, E), allow_unused=True)
    assert grad_e is None and grad_u.abs().sum() > 0, (
        "all gradient goes through the weights, none into E"
    )
    texts = ["ash ice lava queen worker nest soldier larvae trail sugar " * 5] * 400
    batch = make_batch(tokenizer, texts)
    batch = {k: v[:, :64] if torch.is_tensor(v) and v.ndim == 2 else v for k, v in batch.items()}
    _, mask = model.corrupt(batch, 3)
    view = model.view(batch, mask, 3)
    again, more = view.ids, mask_of(view)
    tokens = (model.words(batch) >= 0).sum(1)
    assert (
        torch.equal(mask.sum(1), (0.3 * tokens.double()).ceil().long()) and not (mask & ~more).any()
    )
    assert (more.sum() / tokens.sum()).item() == pytest.approx(0.5, abs=0.01)
    fate = again[mask]
    assert (fate == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.02), (
        "drawn anew"
    )
    corrupted, _ = model.corrupt(batch, 3)
    assert (corrupted[mask] == again[mask]).float().mean() == pytest.approx(
        0.8**2 + 0.1**2, abs=0.02
    )
    with pytest.raises(UserError, match="is below --encoder_mask_ratio"):
        LexMAE(model.lm, tokenizer, decoder_mask_ratio=0.2)


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("objective", [LexMAE, Condenser, CoCondenser])
def test_a_token_hidden_from_encoder_and_decoder_reaches_no_prediction(
    tokenizer, objective, architecture
):
    """[MASK] stands in its place for both, so no state may tell which token it was, there or
    elsewhere."""
    model, batch = (
        objective(build(tokenizer, architecture, "mlm").lm, tokenizer, mask="token"),
        make_batch(tokenizer),
    )
    corrupted, mask = model.corrupt(batch, 2)
    read = model.view(batch, mask, 2).ids
    hidden = mask & (corrupted == tokenizer.mask_token_id) & (read == tokenizer.mask_token_id)
    assert hidden.sum() > 2
    other = {**batch, "input_ids": torch.where(hidden, model.ordinary_ids[9], batch["input_ids"])}
    decoder, seen = model.decoder["layers"] if objective is LexMAE else model.decoder, []
    decoder.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    losses = [model(x, 2)["decoder"].loss for x in (batch, other)]
    assert torch.equal(*seen) and losses[0] != losses[1], "equal states, other labels"


@pytest.mark.parametrize(
    ("window", "row", "seen"), [(2, 4, [0, 3, 4]), (8, 9, [0, 2, 3, 4, 5, 6, 7, 8, 9])]
)
def test_seed_window(tokenizer, window, row, seen):
    model = SEED(
        build(tokenizer, "bert", "mlm").lm, tokenizer, attention_window=window, decoder_layers=1
    )
    assert (
        len(SEED(model.lm, tokenizer, attention_window=window).decoder.layers)
        == {2: 3, 8: 1}[window]
    )
    view = model.decoder.view(12)
    assert view[row].nonzero()[:, 0].tolist() == seen
    for i in range(12):
        assert view[i].nonzero()[:, 0].tolist() == sorted(
            {0, *range(max(i - window + 1, 0), i + 1)}
        )
    E, h, places = torch.randn(1, 12, 32), torch.randn(1, 32), torch.arange(12)
    before = model.decoder(E, h, places)
    for j in range(12):
        other = E.clone()
        other[0, j] = torch.randn(32)
        change = (model.decoder(other, h, places) - before).abs().amax(-1) > 1e-6
        assert torch.equal(change, view[:, j]), (
            "a token is read where the window says, never before it"
        )
    assert ((model.decoder(E, torch.randn(1, 32), places) - before).abs().amax(-1) > 1e-6).all()


def test_seed_predicts_what_follows_from_h_alone(tokenizer):
    model, batch = build(tokenizer, "bert", "seed"), make_batch(tokenizer)
    terms = model(batch, 0)
    assert terms["decoder"].labels == (batch["attention_mask"].sum(1) - 1).sum(), "x1 ... xn [SEP]"
    hidden = torch.randn(*batch["input_ids"].shape, 32)
    other = torch.cat([hidden[:, :1], torch.randn_like(hidden[:, 1:])], 1)
    places = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])[:, 1:].flatten()
    view = View(batch["input_ids"], places)
    of = [model.decode(x[:, 0], view, None, batch).loss for x in (hidden, other)]
    assert of[0] == of[1]


def test_condenser_head_reads_late_cls_and_middle_states(tokenizer):
    model, batch = build(tokenizer, "bert", "condenser"), make_batch(tokenizer)
    keep, places = batch["attention_mask"], torch.arange(batch["input_ids"].numel())
    late, middle = model.encode(batch["input_ids"], batch)
    lm = model.lm.base_model
    assert torch.equal(
        middle, lm.encoder.layer[0](lm.embeddings(batch["input_ids"]), keep[:, None, None].bool())
    )
    before = model.decoder(late[:, 0], middle, keep, places)
    assert torch.equal(
        before, model.decoder(late[:, 0], torch.cat([late[:, :1], middle[:, 1:]], 1), keep, places)
    )
    assert not torch.allclose(before, model.decoder(late[:, 0] + 0.1, middle, keep, places))
    assert not torch.allclose(before, model.decoder(late[:, 0], middle + 0.1, keep, places))
    shallow = tiny_config("bert", tokenizer, num_hidden_layers=1)
    shallow = Condenser(AutoModelForMaskedLM.from_config(shallow), tokenizer)
    embeddings = shallow.lm.base_model.embeddings(batch["input_ids"])
    assert torch.equal(shallow.encode(batch["input_ids"], batch)[1], embeddings)


def test_span_partners_are_their_own_inverse():
    h = torch.eye(6).repeat_interleave(2, 0) * 9 + torch.arange(12)[:, None] * 0.01
    term = span_contrast(h)
    assert term.labels == 12 and term.correct == 12 and term.loss < 1e-3
    rows = torch.arange(12)
    assert torch.equal((rows ^ 1) ^ 1, rows)
    swapped = h.view(6, 2, 6).flip(1).reshape(12, 6)
    torch.testing.assert_close(span_contrast(swapped).loss, term.loss)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_changes_nothing(tokenizer, architecture, objective):
    model, batch = build(tokenizer, architecture, objective).eval(), make_batch(tokenizer)
    pads = ("input_ids", tokenizer.pad_token_id), ("attention_mask", 0)
    wide = batch | {name: F.pad(batch[name], (0, 9), value=value) for name, value in pads}
    for name, term in model(wide, 5).items():
        torch.testing.assert_close(term.loss, model(batch, 5)[name].loss, atol=1e-4, rtol=1e-5)
    if model.rebuild(batch):
        torch.testing.assert_close(
            model.rebuild(wide).loss, model.rebuild(batch).loss, atol=1e-4, rtol=1e-5
        )
    torch.testing.assert_close(model.represent(wide), model.represent(batch), atol=1e-5, rtol=1e-5)


def test_other_architectures_are_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    from_scratch = {"model_config": tmp_path / "config.json", "tokenizer": tmp_path}
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    message = "electra is not supported.* — use bert, roberta, xlm-roberta, .*modernbert"
    with pytest.raises(UserError, match=message):
        load_lm(None, **from_scratch)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 9}')
    with pytest.raises(UserError, match="9 embeddings for"):
        load_lm(None, **from_scratch)


# ------------------------------------------------------------------------------------------------
# two processes


def world_step(folder, objective, rows=0, architecture="bert"):
    """(loss over the world, gradient) of a batch of eight ragged texts on however many processes
    there are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    tokenizer, W = AutoTokenizer.from_pretrained(folder), accelerator.num_processes
    model = accelerator.prepare(build(tokenizer, architecture, objective))
    mine = range(accelerator.process_index * 8 // W, (accelerator.process_index + 1) * 8 // W)
    texts = [*TEXTS, "lava", "", "ash and ice and lava, lava", "the queen of bees and ants"]
    batch = make_batch(tokenizer, [texts[i] for i in mine]) | {"rows": torch.tensor(mine)}
    if rows:
        loss, stats = mean_loss(accelerator, span_backward(accelerator, model, batch, 11, rows))
    else:
        loss, stats = mean_loss(accelerator, model(batch, 11))
        accelerator.backward(loss)
    losses = sum(value for name, value in stats.items() if name.endswith("_loss"))
    return losses, torch.cat([p.grad.flatten() for p in model.parameters()]), W


CASES = [(objective, 0, "bert") for objective in OBJECTIVES]
CASES += [("retromae", 0, "modernbert"), ("lexmae", 0, "modernbert"), ("dupmae", 0, "xlm-roberta")]
CASES += [("cocondenser", 2, "bert")]  # with GradCache


def one_of_two(rank, folder, out):
    torch.save([world_step(folder, *case) for case in CASES], f"{out}/{rank}.pt")


def test_two_processes_are_one_with_twice_the_batch(tiny_model_dir, tmp_path):
    spawn_two(one_of_two, str(tiny_model_dir), str(tmp_path))
    single = [world_step(tiny_model_dir, objective, 0, kind) for objective, _, kind in CASES]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for case, (loss, grad, W), (loss_1, grad_1, W_1) in zip(CASES, found, single, strict=True):
            assert (W, W_1) == (2, 1) and grad_1.abs().max() > 1e-2
            torch.testing.assert_close(loss, loss_1, atol=1e-5, rtol=1e-6, msg=f"{case}")
            torch.testing.assert_close(grad, grad_1, atol=1e-5, rtol=1e-4, msg=f"{case}")
