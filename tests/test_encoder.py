"""pytest tests/test_encoder.py — pooling and heads against plain transformers, what padding must
not change, what is saved, and what cannot be loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, T5Config, T5Model

from lib.checkpoint import (
    check_checkpoint,
    load_encoder,
    load_lm,
    model_hash,
    save_checkpoint,
    save_encoder,
)
from lib.cpu import pack_linears
from lib.encoder import POOLINGS, Dense, Head, LayerNorm
from lib.files import UserError
from lib.groups import GroupCollator
from lib.text import pad, to_ids
from tests.fuzz_checkpoints import fuzz

CARD = {"base": "tiny", "data": {"corpus": "c.jsonl"}, "metrics": {"MRR@10": 0.5}}
TEXTS = [
    "ants and sugar",
    "the lava of a crater " * 9,
    "bow",
    "orchestra",
    "rind mould goat whey milk, curd",
]


def batch_of(model, texts=TEXTS, **settings):
    for name, value in settings.items():
        setattr(model.tokenizer, name, value)
    return pad(to_ids(texts, model.tokenizer, 128), model.tokenizer)


@torch.no_grad()
def vectors(model, texts=TEXTS, **settings):
    return model.encode(batch_of(model, texts, **settings))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_is_what_transformers_gives_text_by_text(tiny_model_dir, pooling):
    model = load_encoder(tiny_model_dir, Head(pooling))
    plain, tokenizer = (
        AutoModel.from_pretrained(tiny_model_dir).eval(),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    with torch.no_grad():
        for text, found in zip(TEXTS, vectors(model), strict=True):  # no padding in the reference
            hidden = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(found, hidden[0] if pooling == "cls" else hidden.mean(0))
    assert found.dtype == torch.float32 and model.dim == 32 and model.backbone.pooler is None


def test_projection_and_normalisation(tiny_model_dir):
    plain = load_encoder(tiny_model_dir, Head("cls"))
    torch.manual_seed(1)
    model = load_encoder(tiny_model_dir, Head("cls", projection=24, normalize=True))
    dense, norm = model.head[0].linear, model.head[1].norm
    assert model.dim == 24 and 0.018 < dense.weight.std() < 0.022 and not dense.bias.any()
    expected = torch.layer_norm(vectors(plain) @ dense.weight.T, (24,), norm.weight, norm.bias)
    torch.testing.assert_close(vectors(model), expected / expected.norm(dim=1, keepdim=True))
    torch.manual_seed(1)
    assert torch.equal(
        load_encoder(tiny_model_dir, Head("cls", projection=24)).head[0].linear.weight, dense.weight
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_width_of_the_padding_does_not_matter(tiny_model_dir, pooling):
    model = load_encoder(tiny_model_dir, Head(pooling))
    expected, batch = vectors(model), batch_of(model)
    wide = {name: torch.nn.functional.pad(values, (0, 20)) for name, values in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(model.encode(wide), expected)
    rows = [((), text) for text in TEXTS]
    side = GroupCollator(None, model.tokenizer, model.format, 2).encoder_input("query", rows)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(side), vectors(model))
        q_reps, p_reps = model(None, side)
    assert q_reps is None and torch.equal(p_reps, model.encode(side))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_poolings_are_the_plain_formula(tiny_model_dir, pooling, side):
    model = load_encoder(tiny_model_dir, Head(pooling))
    batch = batch_of(model, padding_side=side)
    with torch.no_grad():
        hidden = model.backbone(**batch).last_hidden_state
        found = model.encode(batch)
    for row, mask, reps in zip(hidden, batch["attention_mask"].bool(), found, strict=True):
        plain = {"cls": row[mask][0], "mean": row[mask].mean(0), "last_token": row[mask][-1]}
        torch.testing.assert_close(reps, plain[pooling])


def test_left_padding_pools_the_first_real_token(tiny_model_dir):
    model = load_encoder(tiny_model_dir, Head("cls"))
    batch = batch_of(model, padding_side="left")
    assert (batch["attention_mask"][:, 0] == 0).any()
    with torch.no_grad():
        hidden = model.backbone(**batch).last_hidden_state
        for row, mask in enumerate(batch["attention_mask"]):
            torch.testing.assert_close(
                model.encode(batch)[row], hidden[row, len(mask) - mask.sum()]
            )


def test_every_parameter_has_a_gradient_and_pooling_is_fp32_under_autocast(tiny_model_dir):
    model = load_encoder(tiny_model_dir, Head("mean", projection=16)).train()
    with torch.autocast("cpu", torch.bfloat16):
        q_reps, p_reps = model(batch_of(model), batch_of(model))
    assert q_reps.dtype == torch.float32
    (q_reps @ p_reps.T).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("title", ["space", "sep"])
def test_a_saved_checkpoint_comes_back_whole(tiny_model_dir, tmp_path, title):
    texts = {
        "title": title,
        "query_prompt": "q: ",
        "passage_prompt": "",
        "max_query_length": 9,
        "max_passage_length": 99,
    }
    model = load_encoder(tiny_model_dir, Head("cls", projection=24, normalize=True), texts)
    save_encoder(model.train(), tmp_path / "a", CARD)
    assert model.training
    again = load_encoder(tmp_path / "a", Head(normalize=True), texts, strict=True)
    torch.testing.assert_close(vectors(again), vectors(model.eval()))
    assert again.format == model.format and again.pooling == "cls"
    assert (tmp_path / "a" / "modules.json").exists()
    _, report = AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert (
        all(key.startswith("pooler.") for key in report["missing_keys"])
        and not report["unexpected_keys"]
    )
    card = (tmp_path / "a" / "README.md").read_text()
    assert "tiny" in card and "'MRR@10': 0.5" in card and "command" in card
    for name, value in [("title", "none"), ("query_prompt", ""), ("max_query_length", 8)]:
        with pytest.raises(UserError, match=f"its {name} is"):
            load_encoder(tmp_path / "a", overrides={name: value}, strict=True)
        assert getattr(load_encoder(tmp_path / "a", overrides={name: value}).format, name) == value


def test_saving_again_keeps_what_a_run_put_beside_the_checkpoint(tiny_model_dir, tmp_path):
    model = load_encoder(tiny_model_dir, Head("cls", projection=24))
    (tmp_path / "state").mkdir()
    (tmp_path / "args.json").write_text("{}")
    save_encoder(model, tmp_path, CARD)
    first, names = model_hash(tmp_path), sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "args.json").write_text('{"a": 1}')
    assert model_hash(tmp_path) == first and {"state", "2_Dense", "model.safetensors"} <= set(names)
    with torch.no_grad():
        weights = {name: values.clone() for name, values in model.state_dict().items()}
        for values in model.parameters():
            values *= 2
    save_encoder(model, tmp_path, CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert model_hash(tmp_path) != first
    torch.testing.assert_close(load_encoder(tmp_path).state_dict(), model.state_dict())
    model.load_state_dict(weights)
    save_encoder(model, tmp_path, CARD)
    assert model_hash(tmp_path) == first
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(
        UserError, match=r"another model when .* it is in .*\.refused — look for NaN"
    ):
        save_encoder(model, tmp_path, CARD)
    assert model_hash(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    refused = tmp_path.with_name(f"{tmp_path.name}.refused")
    assert (refused / "model.safetensors").is_file()
    shutil.rmtree(refused)


def test_a_model_that_cannot_be_kept_is_refused_before_it_is_trained(tiny_model_dir, tmp_path):
    model = load_encoder(tiny_model_dir, Head("cls"))

    def save(folder):
        save_encoder(model, folder, {})

    check_checkpoint(tmp_path, save)
    assert not list(tmp_path.iterdir())
    model.vectors = lambda ids, *_: torch.rand(len(ids), 32)  # a pooling that no file states
    with pytest.raises(UserError, match="another model"):
        check_checkpoint(tmp_path, save)


def test_a_model_card_publishes_no_path_of_this_machine(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/b/train.py", "--corpus", "/a/c.tsv", "--train=/a/b/t/"])
    model = load_encoder(tiny_model_dir, Head("cls"), {"query_prompt": "a|b `c`\n# d: "})
    card = {"base": "/home/me/model", "data": ["/a/c.tsv", "org/name", "data/q.tsv"]}
    save_encoder(model, tmp_path / "out", card)
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert "- **command**: `train.py --corpus c.tsv --train=t`" in lines
    assert "- **base**: `model`" in lines and "- **data**: `c.tsv org/name data/q.tsv`" in lines
    assert "- **query prompt**: `a|b 'c' # d:`" in lines


def test_positions_of_special_tokens_may_be_left_out_from_now_on(tiny_model_dir, tmp_path):
    save_encoder(load_encoder(tiny_model_dir, Head(kind="sparse")), tmp_path / "all", CARD)
    head = Head(kind="sparse", exclude_special_tokens=True)
    model = load_encoder(tmp_path / "all", head)
    save_encoder(model, tmp_path / "some", CARD)
    again = load_encoder(tmp_path / "some")
    assert again.exclude_special_tokens and torch.equal(vectors(again), vectors(model))
    assert not torch.equal(vectors(again), vectors(load_encoder(tmp_path / "all")))
    with pytest.raises(UserError, match="its exclude_special_tokens is False, not True"):
        load_encoder(tmp_path / "all", head, strict=True)
    for kind in (None, "dense"):
        head = Head("cls", kind=kind, exclude_special_tokens=True)
        with pytest.raises(UserError, match="--exclude_special_tokens is for sparse ones"):
            load_encoder(tiny_model_dir, head)


def test_so_is_a_masked_lm(tiny_model_dir, tmp_path):
    lm, tokenizer, origin = load_lm(str(tiny_model_dir))
    assert origin == str(tiny_model_dir)
    model = SimpleNamespace(lm=lm, settings={"objective": "mlm"})

    def save(folder):
        save_checkpoint(model, tokenizer, folder, "space", {})

    check_checkpoint(tmp_path, save)
    assert not list(tmp_path.iterdir())
    next(lm.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="another model"):
        check_checkpoint(tmp_path, save)


def test_the_encoder_of_t5_is_saved_alone(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    T5Model(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    model = load_encoder(tmp_path / "t5", Head("mean"))
    save_encoder(model, tmp_path / "a", CARD)
    assert torch.equal(vectors(load_encoder(tmp_path / "a")), vectors(model))
    assert not any("decoder" in name for name in model.state_dict())


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def swap_module(folder, kind):
    path = folder / "modules.json"
    path.write_text(path.read_text().replace("sentence_transformers.models.Dense", kind))


def lose_a_weight(folder):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    weights = {k: v for k, v in model.state_dict().items() if "layer.1.output.dense" not in k}
    model.save_pretrained(folder, state_dict=weights)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "modules.json").unlink(), "states no pooling.*--pooling"),
        (
            lambda f: edit(f / "1_Pooling/config.json", pooling_mode_max_tokens=True),
            r"cls \+ max_tokens",
        ),
        (
            lambda f: edit(f / "1_Pooling/config.json", pooling_mode="weightedmean"),
            "pooling by weightedmean",
        ),
        (lambda f: edit(f / "1_Pooling/config.json", include_prompt=False), "include_prompt"),
        (lambda f: swap_module(f, "sentence_transformers.models.CNN"), "a model of .* CNN"),
        (lambda f: swap_module(f, "my_code.Dense"), "my_code.Dense"),
        (lambda f: edit(f / "2_Dense/config.json", activation_function="os.system"), "os.system"),
        (lambda f: edit(f / "2_Dense/config.json", use_residual=True), "residual"),
        (lambda f: (f / "2_Dense/model.safetensors").unlink(), "2_Dense/pytorch_model.bin"),
        (
            lambda f: edit(f / "2_Dense/config.json", out_features=7),
            "cannot be loaded .*size mismatch",
        ),
        (
            lambda f: edit(f / "config_sentence_transformers.json", model_type="SparseEncoder"),
            "model_type SparseEncoder",
        ),
        (
            lambda f: edit(f / "sentence_bert_config.json", query_expansion={"length": 3}),
            "query_expansion",
        ),
        (
            lambda f: edit(f / "isthmus.json", tokenizer={"ids": "other", "version": "0"}),
            "other ids",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut short"), "cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
        (lose_a_weight, "2 weights are missing"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_cannot_be_loaded_says_why(tiny_model_dir, tmp_path, damage, message):
    save_encoder(load_encoder(tiny_model_dir, Head("cls", projection=24)), tmp_path / "a", CARD)
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message) as error:
        load_encoder(tmp_path / "a")
    assert "—" in str(error.value) and "\n" not in str(error.value)


def test_flags_that_contradict_a_checkpoint(tiny_model_dir, tmp_path):
    model = load_encoder(tiny_model_dir, Head("cls", projection=24))
    save_encoder(model, tmp_path / "a", CARD)
    assert [type(m) for m in load_encoder(tmp_path / "a", Head("cls", projection=24)).head] == [
        Dense,
        LayerNorm,
    ]
    for arguments in [
        (Head("mean"),),
        (Head(projection=25),),
        (Head("cls"), {"max_query_length": 129}),
        (Head(normalize=True), None, True),
    ]:
        with pytest.raises(UserError):
            load_encoder(tmp_path / "a", *arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_weights_give_the_same_vectors(tiny_model_dir, dtype, tolerance):
    plain, packed = (load_encoder(tiny_model_dir, Head("mean")) for _ in range(2))
    pack_linears(packed.backbone, dtype)
    linears = [m for m in packed.backbone.modules() if isinstance(m, torch.nn.Linear)]
    assert linears and all("forward" in vars(linear) for linear in linears)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        torch.testing.assert_close(vectors(packed), vectors(plain), rtol=tolerance, atol=tolerance)


def test_packed_weights_on_a_cpu_without_bf16():
    code = """
import torch
from lib.launch import make_accelerator
from lib.cpu import onednn, product
assert onednn(torch.float32) and not onednn(torch.bfloat16)
weight, bias, x = (torch.randn(*size, dtype=torch.bfloat16) for size in ((5, 8), (5,), (3, 8)))
expected = (x.double() @ weight.double().T + bias.double()).bfloat16()
torch.testing.assert_close(product(weight, bias)(x), expected)
make_accelerator()
"""
    old = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_CPU": "true",
    }
    call = [sys.executable, "-c", code]
    shown = subprocess.check_output(
        call, cwd=Path(__file__).parents[1], env={**os.environ, **old}, text=True
    )
    assert "this CPU has no bf16 — --mixed_precision no" in shown


def test_damaged_checkpoints_are_loaded_or_refused_in_one_line():
    found = fuzz(seed=7, times=60)
    assert not found.failures, "\n".join(found.failures)
    assert min(found.counts["loaded"], found.counts["refused"]) > 5
