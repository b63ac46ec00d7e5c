"""Group-robust training: weights for groups of queries (iDRO), and the inner products of the
groups' gradients.

K groups, of which G are in the batch of all processes; B queries per device. Losses are per query
and depend on its own passages alone. A weight is the same on every process."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lib.dist import all_gather, world
from lib.files import UserError

LAYERS = 3  # whose gradients are compared, counted from the last: COCO-DR's


class GroupWeights:
    """How much each group of queries counts, h (K,): COCO-DR (arXiv 2210.15212; DRO/dro_loss.py).

    The loss is sum_i h_i L_i / sum_i h_i over the groups present, L_i the mean loss of group i.
    After each step, with r_ij = (L_i L_j)^alpha cos(g_i, g_j) and e_i = rho / K sum_j r_ij,
        h_i <- h_i^ema exp(e_i), normalised, at least eps

    Deviations from the official code:
      1. Losses and counts too are of the batch of all processes, as gradients are.
      2. A group that is not in the batch keeps its weight (theirs: eps); those that are share what
         they hold.
      3. h begins at 1 / K (theirs: 1), and the loss is a mean (theirs: a sum)."""

    def __init__(self, groups: int, alpha: float, ema: float, rho: float, eps: float):
        if eps * groups > 1:
            raise UserError(f"--dro_eps {eps}: {groups} groups — give at most 1 / {groups}")
        self.alpha = alpha
        self.ema = ema
        self.rho = rho
        self.eps = max(eps, 1e-12)  # from 0 no weight would come back
        self.h = torch.ones(groups, dtype=torch.float64) / groups

    def loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """losses (B,), groups (B,) int64 -> scalar: its mean over processes is the loss above.
        Keeps what `update` needs: which groups are present (K,), and their mean losses (K,)."""
        everyone = all_gather(groups.to(losses.device)).cpu()
        values = all_gather(losses).double().cpu()
        counts = torch.bincount(everyone, minlength=len(self.h))  # (K,)
        sums = torch.zeros_like(self.h).index_add_(0, everyone, values)
        self.present = counts > 0
        self.means = sums / counts.clamp(min=1)
        share = self.h * self.present
        share = share / share.sum().clamp(min=1e-30)
        factors = world()[1] * share / counts.clamp(min=1)
        return (losses * factors[groups.cpu()].to(losses)).sum()

    def update(self, products: Tensor) -> None:
        """products (G, G): of the gradients of the groups present."""
        if not torch.isfinite(products).all():  # fp16: a step that the scaler skips
            return
        norms = products.diagonal().clamp(min=0).sqrt() + 1e-12
        means = self.means[self.present]
        gain = (means[:, None] * means) ** self.alpha * products / (norms[:, None] * norms)
        exponent = self.rho / len(self.h) * gain.sum(1)
        before = self.h[self.present]
        new = torch.softmax(self.ema * before.log() + exponent, 0)
        new = new * (before.sum() / self.h.sum())
        self.h[self.present] = new.clamp(min=self.eps)


def groups_of_rows(batch: dict) -> Tensor:
    """The group of every row that the encoder has read: of the queries, then of the passages. An
    "order" (B·m,) has the place of each text of its side among the rows, see lib/groups.py."""
    groups = batch["clusters"]
    parts = []
    for order in (batch["query"]["order"], batch["passage"]["order"]):
        rows = torch.empty(int(order.max()) + 1, dtype=groups.dtype, device=groups.device)
        rows[order] = groups.repeat_interleave(len(order) // len(groups))
        parts.append(rows)
    return torch.cat(parts)


class GroupGradients:
    """Inner products between the gradients that groups of texts give the weights of some layers,
    from one ordinary backward pass over all of them.

    The gradient of a weight is a sum over tokens of outer products: the gradient at a Linear's
    output, and its input. So the layers keep both, and the sum is taken group by group. One weight
    at a time has its (G, out, in) numbers in memory, is summed over processes and adds its Gram
    matrix. (The official code: G backward passes, and all gradients in one matrix, 4 GB for BERT
    base and 50 groups.) UserError: a layer with parameters outside of Linear and LayerNorm."""

    def __init__(self, backbone: nn.Module, num_layers: int = LAYERS):
        depth = backbone.config.num_hidden_layers
        layers = next(
            m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth
        )
        # module -> [input, gradient at the output] of each call, in the order of the forward pass
        self.calls = {}
        for module in (m for layer in layers[-num_layers:] for m in layer.modules()):
            if isinstance(module, nn.Linear | nn.LayerNorm):
                self.calls[module] = []
                module.register_forward_hook(self._keep)
            elif next(module.parameters(recurse=False), None) is not None:
                kind = type(module).__name__
                wrong = f"--dro: {kind} is neither Linear nor LayerNorm"
                raise UserError(f"{wrong} — use BERT's kind")

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            call = [inputs[0].detach(), None]
            self.calls[module].append(call)
            output.register_hook(lambda gradient: call.__setitem__(1, gradient))

    @torch.no_grad()
    def products(self, groups: Tensor, present: Tensor) -> Tensor:
        """groups (R,): of each text, in the order in which the layers read them since the last
        call; present (K,) bool, the groups of all processes -> (G, G) float64 on the CPU. Forgets
        what it kept."""
        G = int(present.sum())
        slot = (present.cumsum(0) - 1)[groups.cpu()]  # (R,) in 0 ... G - 1
        total = 0
        for module, calls in self.calls.items():
            rows = slot.split([len(x) for x, _ in calls])
            for table in self._gradients(module, calls, rows, G):
                if world()[1] > 1:
                    dist.all_reduce(table)
                total = total + table @ table.T
            calls.clear()
        return total.double().cpu()

    @staticmethod
    def _gradients(module: nn.Module, calls: list, rows: tuple, G: int) -> Iterator[Tensor]:
        """(G, numbers of the weight), then (G, numbers of the bias), float32."""
        inputs, gradients, owner = [], [], []
        for (x, grad), own in zip(calls, rows, strict=True):
            # padding has no gradient; in the last layer only what is pooled has one
            used = (grad != 0).any(-1)
            inputs.append(x[used])
            gradients.append(grad[used])
            owner.append(own.to(x.device)[:, None].expand(used.shape)[used])
        owner, order = torch.cat(owner).sort(stable=True)
        ends = torch.bincount(owner, minlength=G).tolist()
        inputs = torch.cat(inputs)[order].float()
        gradients = torch.cat(gradients)[order].float()

        def per_group(values: Tensor) -> Tensor:
            return values.new_zeros(G, values.shape[1]).index_add_(0, owner, values)

        if isinstance(module, nn.LayerNorm):
            inputs = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
            yield per_group(inputs * gradients)
        else:
            table = inputs.new_empty(G, gradients.shape[1], inputs.shape[1])
            for out, x, grad in zip(table, inputs.split(ends), gradients.split(ends), strict=True):
                torch.mm(grad.T, x, out=out)
            yield table.flatten(1)
        if module.bias is not None:
            yield per_group(gradients)
