"""pytest tests/test_sparse.py — the sparse head: the plain formula, sentence-transformers' vectors,
refusals."""

import json

import pytest
import torch
from architectures import KINDS, tiny_config
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head, SparseBiEncoder
from lib.files import UserError
from lib.text import TextFormat, format_texts, pad, to_ids

TEXTS = [
    "ants and sugar",
    "The lava of a crater, " * 30,
    "bow",
    "Orchestra: mould, curd & whey [SEP] ice",
    "what is it",
]


def batch_of(texts, model, kind="passage"):
    strings = format_texts([("", text) for text in texts], kind, model.format, model.tokenizer)
    return pad(to_ids(strings, model.tokenizer, model.format.max_length(kind)), model.tokenizer)


@torch.no_grad()
def vectors(model, texts=TEXTS, kind="passage"):
    return model.encode(batch_of(texts, model, kind))


def plain(lm, ids, mask, special=()):
    """The formula with its (B, L, V) logits."""
    logits = lm(input_ids=ids, attention_mask=mask).logits
    counts = mask.bool() & ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))
    return torch.log1p(logits.relu() * counts[..., None]).amax(1)


@pytest.mark.parametrize("exclude", [False, True])
def test_vectors_and_gradients_are_the_plain_formula(tiny_model_dir, exclude):
    model = load_encoder(tiny_model_dir, Head(kind="sparse", exclude_special_tokens=exclude))
    lm = AutoModelForMaskedLM.from_pretrained(tiny_model_dir).eval()
    batch = batch_of(TEXTS, model)
    batch["attention_mask"][4] = 0  # a text of padding alone
    tokenizer = model.tokenizer
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id] if exclude else []
    expected = plain(lm, batch["input_ids"], batch["attention_mask"], special)
    reps = model.encode(batch)
    assert reps.shape == (5, model.dim) == (5, len(tokenizer)) and reps.dtype == torch.float32
    torch.testing.assert_close(reps, expected, atol=1e-5, rtol=1e-5)
    assert not reps[4].any() and (reps[:4] > 0).any(1).all() and (reps == 0).any()
    upstream = torch.randn(reps.shape, generator=torch.Generator().manual_seed(0))
    (reps * upstream).sum().backward()
    (expected * upstream).sum().backward()
    theirs, seen = dict(lm.named_parameters()), 0
    for name, parameter in model.backbone.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4, msg=name
        )
        seen += bool(parameter.grad.abs().max() > 1e-3)
    assert seen > 20


def test_special_tokens_are_a_matter_of_positions_not_of_terms(tiny_model_dir):
    included, excluded = (
        load_encoder(tiny_model_dir, Head(kind="sparse", exclude_special_tokens=exclude))
        for exclude in (False, True)
    )
    a, b = vectors(included), vectors(excluded)
    assert (b <= a + 1e-6).all() and (b < a - 1e-3).any()  # a maximum over fewer positions
    columns = [included.tokenizer.cls_token_id, included.tokenizer.pad_token_id]
    with torch.no_grad():
        excluded.backbone.get_output_embeddings().bias[columns] += 10
    assert (vectors(excluded)[:, columns] > 0).any()  # their terms stay
    empty = {"input_ids": torch.tensor([columns]), "attention_mask": torch.tensor([[1, 0]])}
    assert not excluded.encode(empty).any() and included.encode(empty).any()


@pytest.mark.parametrize("exclude", [False, True])
def test_padding_and_company_do_not_matter(tiny_model_dir, exclude):
    model = load_encoder(tiny_model_dir, Head(kind="sparse", exclude_special_tokens=exclude))
    together = vectors(model)
    for text, vector in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(vectors(model, [text])[0], vector, atol=1e-5, rtol=1e-5)


def test_autocast_is_near_fp32_and_gives_fp32(tiny_model_dir):
    model = load_encoder(tiny_model_dir, Head(kind="sparse"))
    with torch.autocast("cpu", torch.bfloat16):
        low = vectors(model)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, vectors(model), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("lengths", [{}, {"max_query_length": 12, "max_passage_length": 40}])
@pytest.mark.parametrize("prompts", [{}, {"query_prompt": "query: ", "passage_prompt": "bow of "}])
def test_ours_in_sentence_transformers_and_back(tiny_model_dir, tmp_path, lengths, prompts):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = load_encoder(tiny_model_dir, Head(kind="sparse"), {**lengths, **prompts})
    save_encoder(model, tmp_path / "a", {"base": "x"})
    theirs = sentence_transformers.SparseEncoder(
        str(tmp_path / "a"), device="cpu", local_files_only=True
    )
    for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        torch.testing.assert_close(
            vectors(model, kind=kind), encode(TEXTS).to_dense(), atol=1e-5, rtol=1e-5
        )
    theirs.save_pretrained(str(tmp_path / "b"))  # in the newest spelling
    again = load_encoder(tmp_path / "b")
    assert isinstance(again, SparseBiEncoder) and not again.exclude_special_tokens
    for kind in ("query", "passage"):
        assert torch.equal(vectors(again, kind=kind), vectors(model, kind=kind))
    AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    assert "Sparse retriever" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("exclude", [False, True])
def test_what_they_cannot_express_fails_there(tiny_model_dir, tmp_path, exclude):
    head = Head(kind="sparse", exclude_special_tokens=exclude)
    model = load_encoder(tiny_model_dir, head, {"title": "sep"})
    save_encoder(model, tmp_path / "a", {})
    sentence_transformers = pytest.importorskip("sentence_transformers")
    if exclude:
        with pytest.raises((ImportError, ValueError, OSError)):
            sentence_transformers.SparseEncoder(str(tmp_path / "a"), local_files_only=True)
    again = load_encoder(tmp_path / "a")
    assert (
        again.exclude_special_tokens == model.exclude_special_tokens
        and again.format == model.format
    )
    assert torch.equal(vectors(again), vectors(model))
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_new_head_is_made_only_where_allowed(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.encoder.NEW_HEAD", 1.5)  # the vocabulary is too small for fewer terms
    save_encoder(load_encoder(tiny_model_dir, Head("mean")), tmp_path / "dense", {})
    with pytest.raises(UserError, match="no LM head for --head sparse — .* --head new_sparse"):
        load_encoder(tmp_path / "dense", Head(kind="sparse"))
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(vectors(load_encoder(tmp_path / "dense", Head(kind="new_sparse"))))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert all(0 < (one > 0).float().mean() < 0.7 for one in heads)  # sparse from the start
    model = load_encoder(tmp_path / "dense", Head(kind="new_sparse"))
    tied = {p.data_ptr() for p in model.parameters()}
    assert (
        len(tied) == len(list(model.parameters()))
        and model.backbone.cls.predictions.decoder.bias.requires_grad
    )
    save_encoder(model, tmp_path / "new", {})
    assert torch.equal(vectors(load_encoder(tmp_path / "new")), vectors(model))


def test_refusals_name_the_remedy(tiny_model_dir, tmp_path):
    save_encoder(load_encoder(tiny_model_dir, Head(kind="sparse")), tmp_path / "sparse", {})
    save_encoder(load_encoder(tiny_model_dir, Head("mean")), tmp_path / "dense", {})
    pooling = tmp_path / "sparse" / "1_SpladePooling" / "config.json"
    settings = json.loads(pooling.read_text())
    pooling.write_text(json.dumps({**settings, "pooling_strategy": "sum"}))
    with pytest.raises(UserError, match="pooling_strategy sum"):
        load_encoder(tmp_path / "sparse")
    pooling.write_text(json.dumps(settings))
    cases = [
        ("a sparse checkpoint, not a dense one — add --head sparse", "sparse", {"kind": "dense"}),
        ("a dense checkpoint, not a sparse one — add --head dense", "dense", {"kind": "sparse"}),
        ("leave out --pooling", "sparse", {"pooling": "mean"}),
        ("leave out --pooling", "sparse", {"normalize": True}),
        ("leave --exclude_special_tokens out", "sparse", {"exclude_special_tokens": True}),
    ]
    for what, folder, how in cases:
        with pytest.raises(UserError, match=what):
            load_encoder(tmp_path / folder, Head(**how), strict=True)
    again = load_encoder(tmp_path / "sparse", Head(exclude_special_tokens=True))
    assert again.exclude_special_tokens and not again.portable
    from transformers import ElectraConfig, ElectraForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    small = {
        "embedding_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ElectraForMaskedLM(ElectraConfig(vocab_size=len(tokenizer), **small)).save_pretrained(
        tmp_path / "electra"
    )
    tokenizer.save_pretrained(tmp_path / "electra")
    with pytest.raises(UserError, match="LM head of electra .* — use bert, .*, modernbert"):
        load_encoder(tmp_path / "electra", Head(kind="sparse"))


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures(tiny_model_dir, tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    config = tiny_config(kind, tokenizer)
    lm = AutoModelForMaskedLM.from_config(config).eval()
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_encoder(tmp_path, Head(kind="sparse"), {"max_passage_length": 48})
    batch = batch_of(TEXTS, model)
    with torch.no_grad():
        expected = plain(lm, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(vectors(model), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(model.format, TextFormat) and (expected > 0).any()
