"""pytest tests/test_mae.py — losses against loops written from the formulas, leaks, padding, two processes."""

import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from lib import losses
from lib.files import UserError
from lib.losses import linear_cross_entropy
from lib.mae import MLM, RetroMAE, read_architecture
from lib.text import pad
from pretrain_mae import mean_loss

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
BERT = {**SIZES, "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
CONFIGS = {"bert": BERT, "roberta": BERT, "distilbert": {**DISTIL, "max_position_embeddings": 64}}
OBJECTIVES = [("mlm", None), ("retromae", "raw"), ("retromae", "normed")]
TEXTS = [
    "queen worker nest and the volcanoes, lava and ash of mount unpronounceablewordofmanypieces",
    "ice",
    "",
    "a b",
]


def build(tokenizer, architecture="bert", objective="retromae", query_stream="raw"):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.3}
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture], **sizes)
    lm = AutoModelForMaskedLM.from_config(config)
    for name, parameter in lm.named_parameters():  # biases and norms are constant at first: hide no mistake
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("orm.weight" in name), std=0.1)
    return MLM(lm, tokenizer) if objective == "mlm" else RetroMAE(lm, tokenizer, query_stream=query_stream)


def make_batch(tokenizer, texts=TEXTS, micro_step=3):
    return pad(tokenizer(texts)["input_ids"], tokenizer) | {"rows": torch.arange(len(texts)), "micro_step": micro_step}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def logits_of(lm, hidden):
    """The full LM head, as the model's own forward applies it."""
    if hasattr(lm, "cls"):
        return lm.cls(hidden)
    if hasattr(lm, "lm_head"):
        return lm.lm_head(hidden)
    return lm.vocab_projector(lm.vocab_layer_norm(lm.activation(lm.vocab_transform(hidden))))


def naive_terms(model, batch, seed):
    """{name: (sum, labels)} with dense logits and a loop over texts, rows, heads and visible columns."""
    lm, ids, keep = model.lm, batch["input_ids"], batch["attention_mask"]
    corrupted, mask = model.corrupt(batch, seed)
    labels = ids.masked_fill(~mask, -100)
    logits = lm(input_ids=corrupted, attention_mask=keep).logits
    terms = {"encoder": (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), mask.sum())}
    if isinstance(model, RetroMAE):
        view, layer, embed = model.view(batch, seed)[0], model.decoder, lm.base_model.embeddings
        hidden = lm.base_model(input_ids=corrupted, attention_mask=keep).last_hidden_state
        first, total, count = 1 + model.lm.config.pad_token_id if lm.config.model_type == "roberta" else 0, 0.0, 0
        for b, length in enumerate(keep.sum(1).tolist()):
            h, clean = hidden[b, 0], embed(input_ids=ids[b : b + 1, :length])[0]
            stream = torch.cat([h[None], clean[1:]])
            normed = embed(input_ids=None, inputs_embeds=h.expand(1, length, -1))[0]
            for i in range(1, length - 1):
                query = (
                    normed[i] if model.query_stream == "normed" else h + embed.position_embeddings.weight[first + i]
                )
                seen = [j for j in range(length) if view[b, i, j]]
                assert i not in seen and 0 in seen and length - 1 in seen
                k, v = layer.key(stream[seen]), layer.value(stream[seen])
                heads = []
                for q, k1, v1 in zip(layer.query(query).split(8), k.split(8, 1), v.split(8, 1), strict=True):
                    heads.append(torch.softmax(k1 @ q / math.sqrt(8), 0) @ v1)
                x = layer.attention_norm(layer.attention_output(torch.cat(heads)) + query)
                x = layer.output_norm(layer.down(F.gelu(layer.up(x))) + x)
                total = total - torch.log_softmax(logits_of(lm, x), -1)[ids[b, i]]
                count += 1
        terms["decoder"] = (total, count)
    return terms


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(g is not None for g in found), "an unused parameter would stop DDP"
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("objective", "query_stream"), OBJECTIVES)
def test_losses_are_those_of_the_formulas(tokenizer, architecture, objective, query_stream):
    model, batch = build(tokenizer, architecture, objective, query_stream), make_batch(tokenizer)
    terms, naive = model(batch, 7), naive_terms(model, batch, 7)
    assert terms.keys() == naive.keys()
    for name, (loss, labels) in naive.items():
        assert terms[name].labels == labels > 0
        torch.testing.assert_close(terms[name].loss / labels, loss / labels, atol=1e-5, rtol=0)
    ours = gradients(sum(t.loss / t.labels for t in terms.values()), model)
    theirs = gradients(sum(loss / labels for loss, labels in naive.values()), model)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("objective", "query_stream"), OBJECTIVES)
def test_texts_without_tokens_have_a_finite_loss_and_no_gradient(tokenizer, objective, query_stream):
    model = build(tokenizer, "bert", objective, query_stream)
    terms = model(make_batch(tokenizer, ["", ""]), 0)
    loss, sums = mean_loss(Accelerator(cpu=True), terms)
    assert loss == 0 and not sums.any() and not gradients(loss, model).any()


@pytest.mark.parametrize("query_stream", ["raw", "normed"])
def test_no_token_reaches_its_own_prediction(tokenizer, query_stream):
    model, batch = build(tokenizer, query_stream=query_stream), make_batch(tokenizer)
    ids, (view, _) = batch["input_ids"], model.view(batch, 0)
    places, h = torch.arange(ids.numel()), torch.randn(len(ids), 32)
    length = int(batch["attention_mask"][0].sum())

    def rows(h, ids):
        return model.decode(h, ids, view, places).view(*ids.shape, -1)[0, :length]

    before, moved = rows(h, ids), 0
    for i in range(1, length - 1):
        other = ids.clone()
        other[0, i] = tokenizer.vocab_size - 1 - ids[0, i]
        change = (rows(h, other) - before).abs().amax(-1)
        assert change[i] == 0 and ((change > 1e-6) == view[0, :length, i]).all()
        moved += int((change > 1e-6).sum())
    assert moved > length
    assert ((rows(h + 0.1 * torch.randn(32), ids) - before).abs().amax(-1) > 1e-6).all(), "h reaches every row"
    swapped = ids.clone()
    swapped[0, 0] = tokenizer.mask_token_id
    assert torch.equal(rows(h, swapped), before), "slot 0 is h, not an embedding"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_padding_changes_nothing(tokenizer, architecture):
    model, batch = build(tokenizer, architecture).eval(), make_batch(tokenizer)
    wide = {name: F.pad(batch[name], (0, 9), value=value) for name, value in (("input_ids", 0), ("attention_mask", 0))}
    for name, term in model(batch | wide, 5).items():
        torch.testing.assert_close(term.loss, model(batch, 5)[name].loss, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 23])
def test_linear_cross_entropy_is_the_plain_formula(monkeypatch, n, with_bias):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", {"cpu": 5 * 50})
    torch.manual_seed(n)
    leaves = [torch.randn(n, 6), torch.randn(50, 6), torch.randn(50)][: 2 + with_bias]
    leaves = [x.requires_grad_() for x in leaves]
    hidden, weight, bias = [*leaves, None][:3]
    labels = torch.randint(0, 50, (n,))
    tied = hidden + weight[:n]  # the weight has a second use, as tied embeddings do
    logits = F.linear(tied, weight, bias)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    loss, correct = linear_cross_entropy(tied, weight, bias, labels)
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-6)
    assert correct == (logits.argmax(1) == labels).sum() and not correct.requires_grad
    ours, theirs = (
        torch.autograd.grad(1024 * x / 3, leaves, retain_graph=True) for x in (loss, plain)
    )  # a loss scale
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = linear_cross_entropy(tied, weight, bias, labels)
    assert low.dtype == torch.float32 and torch.allclose(low, plain, rtol=0.05)
    for a, b in zip(
        torch.autograd.grad(low, leaves, retain_graph=True), torch.autograd.grad(plain, leaves), strict=True
    ):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=0.05 * (1 + b.abs().max()) if n else 0)


def test_other_architectures_are_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("electra", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="electra is not supported.* — use bert, roberta, distilbert"):
        read_architecture(str(tmp_path))
    AutoConfig.for_model("bert", vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="9 embeddings for"):
        read_architecture(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# two processes


def world_step(folder, objective):
    """(loss over the world, gradient) of a batch of eight ragged texts on however many processes there are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    tokenizer, W = AutoTokenizer.from_pretrained(folder), accelerator.num_processes
    model = accelerator.prepare(build(tokenizer, objective=objective))
    mine = range(accelerator.process_index * 8 // W, (accelerator.process_index + 1) * 8 // W)
    texts = [*TEXTS, "lava", "", "ash and ice and lava, lava", "the queen of bees and ants"]
    batch = make_batch(tokenizer, [texts[i] for i in mine]) | {"rows": torch.tensor(mine)}
    loss, sums = mean_loss(accelerator, model(batch, 11))
    accelerator.backward(loss)
    return (sums[:, 0] / sums[:, 1]).sum(), torch.cat([p.grad.flatten() for p in model.parameters()]), W


def one_of_two(rank, port, folder, out):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.save([world_step(folder, objective) for objective in ("mlm", "retromae")], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_twice_the_batch(tiny_model_dir, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    mp.spawn(one_of_two, (port, str(tiny_model_dir), str(tmp_path)), nprocs=2)
    single = [world_step(tiny_model_dir, objective) for objective in ("mlm", "retromae")]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (loss, grad, W), (loss_1, grad_1, W_1) in zip(found, single, strict=True):
            assert (W, W_1) == (2, 1) and grad_1.abs().max() > 1e-2
            torch.testing.assert_close(loss, loss_1, atol=1e-5, rtol=0)
            torch.testing.assert_close(grad, grad_1, atol=1e-5, rtol=0)
