"""pytest tests/test_attention.py — attention in pieces against the plain formula, and in an
encoder."""

import pytest
import torch
import torch.nn.functional as F
from architectures import KINDS, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from lib import cpu as module
from lib.cpu import attention, speed_up_attention
from lib.optim import recompute_activations

B, H, L, S, D = 5, 3, 7, 9, 8


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(B, H, n, D, dtype=dtype, requires_grad=True) for n in (L, S, S)]


def masks():
    visible = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[..., 0] = True
    return {"none": None, "bool": visible, "one": visible[:1]}


@pytest.mark.parametrize("mask", masks())
def test_pieces_are_the_plain_formula(monkeypatch, mask):
    mask = masks()[mask]
    monkeypatch.setattr(module, "PIECE", 2 * H * L * S)  # two texts at a time, of five
    q, k, v = inputs()
    torch.manual_seed(5)
    ours = attention(q, k, v, mask, 0.25)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    scores = q @ k.transpose(-1, -2) / D**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    parts = module._pieces(q.detach(), k.detach(), mask, 0.25, seed)
    dropped = torch.cat([dropped for _, _, dropped, _ in parts])
    assert (
        0.15 < dropped.float().mean() < 0.35
        and len({tuple(d.flatten().tolist()) for d in dropped}) == B
    )
    plain = (scores.softmax(-1).masked_fill(dropped, 0.0) / 0.75) @ v
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad(x, (q, k, v), upstream) for x in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_it_is_unbiased_and_pytorchs_own_without_dropout():
    q, k, v = inputs()
    torch.manual_seed(0)
    mean = sum(attention(q, k, v, None, 0.1) for _ in range(600)) / 600
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(mean, plain, atol=0.08, rtol=0)
    assert torch.equal(attention(q, k, v, None, 0.0), plain)


def test_under_autocast_it_stays_near():
    q, k, v = inputs()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(2)
        low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*low, None, 0.1)
        assert out.dtype == dtype
        found.append([out, *torch.autograd.grad(out.sum(), low)])
    for full, half in zip(*found, strict=True):
        torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoders_attend_by_it(architecture, checkpointing, tmp_path, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = tiny_config(architecture, tokenizer, **dropout)
    torch.manual_seed(0)
    plain, model = (
        AutoModelForMaskedLM.from_config(config),
        AutoModelForMaskedLM.from_config(config),
    )
    model.load_state_dict(plain.state_dict())
    speed_up_attention(model)
    if checkpointing:
        recompute_activations(model)
    ids, keep = torch.randint(5, 99, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    keep[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": keep}
    torch.testing.assert_close(
        model.eval()(**batch).logits, plain.eval()(**batch).logits, atol=1e-5, rtol=1e-5
    )
    model.train()
    calls = []
    original = module._Attention.forward
    module._Attention.forward = staticmethod(lambda *args: calls.append(1) or original(*args))
    try:
        grads = []
        for _ in range(2):
            torch.manual_seed(3)
            loss = model(**batch).logits.logsumexp(-1)[keep.bool()].sum()
            model.zero_grad()
            loss.backward()
            grads.append(
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            )
    finally:
        module._Attention.forward = original
    assert len(calls) == 2 * 2 * (1 + checkpointing) and torch.equal(*grads), (
        "two layers, again if checkpointed"
    )
    model.gradient_checkpointing_disable()
    torch.manual_seed(3)
    loss = model(**batch).logits.logsumexp(-1)[keep.bool()].sum()
    again = torch.autograd.grad(loss, [p for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in again]), grads[0], atol=1e-5, rtol=1e-5
    )
    model.save_pretrained(tmp_path)
    assert module.NAME not in (tmp_path / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("key_heads", [2, 4])
def test_decoders_stay_causal(key_heads):
    """Their attention is PyTorch's own, also without padding, and with fewer heads of keys."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_heads}
    config = AutoConfig.for_model("qwen2", vocab_size=50, attention_dropout=1e-6, **sizes, **heads)
    model = AutoModel.from_config(config).train()
    speed_up_attention(model)
    ids = torch.arange(3, 9)[None]
    other = ids.clone()
    other[:, -1] = 40
    found = [model(input_ids=x, attention_mask=x > 0).last_hidden_state for x in (ids, other)]
    torch.testing.assert_close(found[0][:, :-1], found[1][:, :-1])
