"""pytest tests/test_dro.py — group-robust training: weights by the formulas, gradients of groups by
autograd."""

import math

import pytest
import torch
from architectures import KINDS, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lib.dro import GroupGradients, GroupWeights
from lib.files import UserError


def weights(groups, eps=0.01):
    return GroupWeights(groups, alpha=0.25, ema=0.1, rho=0.05, eps=eps)


def products(vectors):
    """Of gradients of groups."""
    vectors = torch.tensor(vectors, dtype=torch.float64)
    return vectors @ vectors.T


LOSSES, GROUPS = torch.tensor([1.0, 3.0, 0.5, 0.5]), torch.tensor([0, 0, 1, 2])  # means 2, 0.5, 0.5
VECTORS = [[3.0, 4.0], [4.0, 3.0], [0.0, -2.0]]  # cosines: 01 0.96, 02 -0.8, 12 -0.6


def test_official_weights_on_a_worked_example():
    dro = weights(3)
    assert dro.loss(LOSSES, GROUPS).item() == pytest.approx((2 + 0.5 + 0.5) / 3)
    cosines = [[1, 0.96, -0.8], [0.96, 1, -0.6], [-0.8, -0.6, 1]]
    means, h = [2, 0.5, 0.5], [1 / 3] * 3
    for _ in range(2):  # the second step starts from weights that differ
        gains = [
            [(means[i] * means[j]) ** 0.25 * cosines[i][j] for j in range(3)] for i in range(3)
        ]
        exponents = [0.05 / 3 * sum(row) for row in gains]
        new = [h[i] ** 0.1 * math.exp(exponents[i]) for i in range(3)]
        h = [max(x / sum(new), 0.01) for x in new]
        dro.update(products(VECTORS))
        assert dro.h.tolist() == pytest.approx(h, abs=1e-6)
        assert dro.loss(LOSSES, GROUPS).item() == pytest.approx(
            sum(w * m for w, m in zip(h, means, strict=True))
        )
    assert h[0] > h[1] > h[2]


def test_absent_groups_keep_their_weight_and_the_others_share_theirs():
    dro = weights(5)
    dro.h = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1], dtype=torch.float64)
    dro.loss(LOSSES, torch.tensor([4, 4, 1, 0]))
    dro.update(products([VECTORS[1], VECTORS[2], VECTORS[0]]))
    assert dro.h[[2, 3]].tolist() == [0.2, 0.3] and dro.h.sum().item() == pytest.approx(1)
    assert dro.h[4] > dro.h[0]  # the same before, a higher loss


def test_a_step_that_overflows_leaves_the_weights_alone():
    dro = weights(3)
    dro.loss(LOSSES, GROUPS)
    dro.update(products([[math.inf, 0.0]] * 3))
    assert dro.h.tolist() == [1 / 3] * 3


def test_weights_that_cannot_sum_to_one_are_refused():
    with pytest.raises(UserError, match="--dro_eps 0.5: 3 groups — give at most 1 / 3"):
        weights(3, eps=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_gradients_that_autograd_gives_each_group(kind, tiny_model_dir):
    """Texts of several chunks of different lengths, padded; dropout off; one backward pass against
    one per group."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = tiny_config(kind, tokenizer, num_hidden_layers=3, hidden_size=16)
    model = AutoModel.from_config(config).eval()
    watch = GroupGradients(model, 2)
    layers = model.transformer.layer if kind == "distilbert" else None
    layers = layers or (model.layers if kind == "modernbert" else model.encoder.layer)
    layers = layers[1:]
    chunks = []
    for rows, length in ((4, 9), (5, 6), (3, 12)):
        ids, mask = torch.randint(9, 50, (rows, length)), torch.ones(rows, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        chunks.append(
            {
                "input_ids": ids.masked_fill(mask == 0, tokenizer.pad_token_id),
                "attention_mask": mask,
            }
        )
    groups = torch.tensor([3, 0, 0, 4, 3, 3, 0, 4, 4, 0, 3, 4])
    present = torch.tensor([True, False, False, True, True])
    target = torch.randn(12, 16)

    def losses():
        reps = torch.cat([model(**chunk).last_hidden_state[:, 0] for chunk in chunks])
        return (reps * target).sum(1)

    losses().sum().backward()
    found = watch.products(groups, present)
    assert not any(watch.calls.values()), "what was kept is forgotten"
    weights = [p for layer in layers for p in layer.parameters()]
    rows = []
    for group in (0, 3, 4):
        grads = torch.autograd.grad(losses()[groups == group].sum(), weights, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in grads if g is not None]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(
        found, expected.double(), rtol=1e-4, atol=1e-6 * expected.abs().max().item()
    )


def test_layers_that_cannot_be_watched_are_refused():
    model = AutoModel.from_config(AutoConfig.for_model("bert", num_hidden_layers=2, hidden_size=24))
    model.encoder.layer[1].extra = nn.Embedding(3, 4)
    with pytest.raises(UserError, match="Embedding is neither Linear nor LayerNorm"):
        GroupGradients(model, 1)
