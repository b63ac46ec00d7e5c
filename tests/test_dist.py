"""Two gloo processes of batch B give the loss and gradient of one process of batch 2B, for every
loss.

Run: python -m pytest tests/test_dist.py
"""

import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from gloo import spawn_two
from torch import nn

from lib.dist import all_gather, all_gather_with_grad, from_main, world
from lib.files import UserError
from lib.gradcache import contrastive_backward
from lib.losses import candidate_mask, info_nce, own_group, triplet_nll

B, P, MICRO_STEPS = 3, 4, 2  # per process
CASES = list(itertools.product(["info_nce", "triplet"], [False, True]))  # loss, chunked


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, query, passage):
        return [None if texts is None else self.layers(texts) for texts in (query, passage)]


def world_batch(micro_step, queries):
    """Texts, keys, fillers of the batch of all processes: passages that repeat, several positives
    per query."""
    generator = torch.Generator().manual_seed(micro_step)
    keys = torch.randint(0, 9, (queries * P,), generator=generator)
    filler = torch.rand(queries * P, generator=generator) < 0.2
    filler[::P] = False
    positive_keys = torch.stack(
        [keys[::P], torch.randint(0, 9, (queries,), generator=generator)], 1
    )
    q, p = (torch.randn(n, 8, generator=generator) for n in (queries, queries * P))
    return q, p, keys, filler, positive_keys


def train_step(accelerator, loss_name, chunked):
    """(loss of the last micro-step averaged over processes, gradient) as finetune_biencoder.py
    computes them."""
    rank, processes = world()
    batch = 2 * B // processes
    model = accelerator.prepare(Encoder())
    for micro_step in range(MICRO_STEPS):
        q, p, keys, filler, positive_keys = world_batch(micro_step, 2 * B)
        mine, groups = (
            slice(rank * batch, (rank + 1) * batch),
            slice(rank * batch * P, (rank + 1) * batch * P),
        )
        positives = (rank * batch + torch.arange(batch)) * P
        mask = candidate_mask(
            positives, all_gather(filler[groups]), all_gather(keys[groups]), positive_keys[mine]
        )

        def loss_fn(batch, q_reps, p_reps, positives=positives, mask=mask):
            scores = q_reps @ all_gather_with_grad(p_reps).T
            if loss_name == "info_nce":
                return info_nce(scores, positives, mask).mean(), {}
            return triplet_nll(
                scores, positives, mask & own_group(positives, scores.shape[1], P)
            ).mean(), {}

        with accelerator.accumulate(model):
            if chunked:
                sides = {
                    "query": {"chunks": q[mine].split(2), "order": torch.arange(batch)},
                    "passage": {"chunks": p[groups].split(5), "order": torch.arange(batch * P)},
                }
                loss, _ = contrastive_backward(accelerator, model, sides, loss_fn, seed=0)
            else:
                loss, _ = loss_fn(None, *model(q[mine], p[groups]))
                accelerator.backward(loss)
                loss = loss.detach()
    assert accelerator.sync_gradients
    return all_gather(loss[None]).mean(), torch.cat([p.grad.flatten() for p in model.parameters()])


def all_cases():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_STEPS)
    return accelerator, [train_step(accelerator, *case) for case in CASES]


def one_of_two(rank, folder):
    accelerator, results = all_cases()
    assert accelerator.num_processes == 2 and world() == (rank, 2)

    def refuse():
        raise UserError("refused on the main process")

    with pytest.raises(UserError, match="refused on the main process"):
        from_main(accelerator, refuse)
    assert from_main(accelerator, lambda: f"asked on {rank}") == "asked on 0"

    x = torch.tensor([[float(rank)]], requires_grad=True)
    gathered = all_gather_with_grad(x)
    (
        gathered * torch.tensor([[1.0], [10.0]]) * (rank + 1)
    ).sum().backward()  # rank 0 weighs 1, rank 1 weighs 2
    torch.save(
        {"results": results, "order": gathered.detach(), "grad": x.grad}, f"{folder}/{rank}.pt"
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn_two(one_of_two, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gather_keeps_the_order_and_sums_the_gradients_of_all_processes(both):
    for rank, found in enumerate(both):
        assert found["order"].tolist() == [[0.0], [1.0]]
        assert found["grad"].tolist() == [[[3.0], [30.0]][rank]]


def test_two_processes_are_one_with_twice_the_batch(both):
    _, single = all_cases()
    assert len(both) == 2 and world() == (0, 1)
    for index, case in enumerate(CASES):
        loss, grad = single[index]
        assert grad.abs().max() > 1e-3
        for found in both:
            torch.testing.assert_close(
                found["results"][index][0], loss, atol=1e-5, rtol=0, msg=str(case)
            )
            torch.testing.assert_close(
                found["results"][index][1], grad, atol=1e-5, rtol=0, msg=str(case)
            )


def test_one_process_gathers_nothing():
    x = torch.ones(2, 3, requires_grad=True)
    assert (
        all_gather_with_grad(x) is x
        and torch.equal(all_gather(x), x)
        and not all_gather(x).requires_grad
    )
