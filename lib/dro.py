"""Group-robust training (DRO): weights for groups of queries, and the inner products of the groups'
gradients.

K groups, of which G are in the batch of all processes; B queries per device, W processes. Losses
are per query and depend on the query's own passages alone. Everything a weight depends on is
global, so that it is the same on every process."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lib.dist import all_gather, world
from lib.files import UserError

LAYERS = 3  # whose gradients are compared, counted from the last: COCO-DR's


@dataclass
class Robustness:
    """The settings of GroupWeights, with COCO-DR's names and defaults."""

    kind: str = "idro"  # or "greedy"
    alpha: float = 0.25
    ema: float = 0.1
    rho: float = 0.05
    eps: float = 0.01


class GroupWeights:
    """How much each group of queries counts, h (K,), moved after every step towards those that gain
    most, or lag most.

    idro, COCO-DR (arXiv 2210.15212; DRO/dro_loss.py): loss = sum_i h_i L_i / sum_i h_i over the
    groups present, L_i the mean loss of group i. Then, with r_ij = (L_i L_j)^alpha cos(g_i, g_j)
    and e_i = rho / K sum_j r_ij,
        h_i <- h_i^ema exp(e_i), normalised, at least eps
    greedy, the same repository: the expected loss of the worst share alpha of the queries. With
    running means S of the loss and c of the number of queries, and f = c / sum c: loss = sum over
    queries h_i l / (W B); then h = 1 / alpha for the groups of highest S that make up alpha, the
    group at the border in proportion, all others eps.

    Deviations from the official code:
      1. Losses, counts and gradients are of the batch of all processes (theirs: gradients alone, so
         that two processes differ in their weights).
      2. A group that is not in the batch keeps its weight (theirs: eps); those that are share what
         they hold.
      3. h begins at 1 / K, and idro's loss is divided by the weight present, so that it stays a
         mean (theirs: 1 each, and a sum).
      4. The weight is not averaged over steps once more (their greedy's weight_ema, 0 in the
         recipe)."""

    def __init__(self, groups: int, settings: Robustness):
        if settings.eps * groups > 1:
            raise UserError(
                f"--dro_eps {settings.eps}: {groups} groups cannot all have this weight — give at "
                f"most 1 / {groups}"
            )
        self.settings = settings
        one = torch.ones(groups, dtype=torch.float64)
        self.h = one / groups if settings.kind == "idro" else one.clone()
        self.losses = torch.zeros_like(one)  # greedy: S
        self.counts = one.clone()  # greedy: c

    def state(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("h", "losses", "counts")}

    def load(self, state: dict[str, list[float]]) -> None:
        for name, values in state.items():
            setattr(self, name, torch.tensor(values, dtype=torch.float64))

    def loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """losses (B,), groups (B,) int64 -> scalar: its mean over processes is the loss above.
        Keeps what `update` needs: how many queries of each group the batch has, and their mean
        losses."""
        everyone = all_gather(groups.to(losses.device)).cpu()
        values = all_gather(losses).double().cpu()
        self.present = torch.bincount(everyone, minlength=len(self.h))  # (K,)
        sums = torch.zeros_like(self.h).index_add_(0, everyone, values)
        self.means = sums / self.present.clamp(min=1)  # L (K,)
        if self.settings.kind == "greedy":
            factors = self.h / len(losses)
        else:
            share = self.h * (self.present > 0)
            share = share / share.sum().clamp(min=1e-30)
            factors = world()[1] * share / self.present.clamp(min=1)
        return (losses * factors[groups.cpu()].to(losses)).sum()

    def update(self, gradients: "GroupGradients | None", groups: Tensor) -> None:
        """After the backward pass. groups: (R,) of each text in the order of encoding."""
        here, settings = self.present > 0, self.settings
        if settings.kind == "greedy":
            self.losses[here] += settings.ema * (self.means - self.losses)[here]
            self.counts += settings.ema * (self.present - self.counts)
            shares = self.counts / self.counts.sum()
            self.h = cvar_weights(self.losses, shares, settings.alpha, settings.eps)
            return
        products = gradients.products(groups, here)  # (G, G)
        if not torch.isfinite(products).all():  # fp16: a step that the scaler skips
            return
        norms = products.diagonal().clamp(min=0).sqrt() + 1e-12
        means = self.means[here]
        gain = (means[:, None] * means) ** settings.alpha * products / (norms[:, None] * norms)
        exponent = settings.rho / len(self.h) * gain.sum(1)
        new = torch.softmax(settings.ema * self.h[here].log() + exponent, 0)
        new = new * (self.h[here].sum() / self.h.sum())
        # from 0 no weight would come back
        self.h[here] = new.clamp(min=max(settings.eps, 1e-12))


def groups_of_rows(groups: Tensor, *orders: Tensor) -> Tensor:
    """The group of every encoded row: groups (B,) of the queries; orders: for each side (B·m,) the
    place of its texts among the encoded rows, as lib/groups.py gives it."""
    parts = []
    for order in orders:
        rows = torch.empty(int(order.max()) + 1, dtype=groups.dtype, device=groups.device)
        rows[order] = groups.repeat_interleave(len(order) // len(groups))
        parts.append(rows)
    return torch.cat(parts)


def cvar_weights(losses: Tensor, shares: Tensor, alpha: float, eps: float) -> Tensor:
    """(K,) weights under which the mean over queries is that of the worst `alpha` of them: 1 /
    alpha for the groups of highest loss while their shares (K,), which sum to 1, stay below alpha;
    then what is left; then eps. Example: losses 3, 2, 1, shares 0.2, 0.3, 0.5, alpha 0.4, eps 0.01
    -> 2.5, (1 - 0.2 / 0.4) / 0.3 = 1.667, 0.01."""
    order = losses.argsort(descending=True, stable=True)
    full = min(int((shares[order].cumsum(0) < alpha).sum()), len(order) - 1)
    weights = torch.full_like(losses, eps)
    weights[order[:full]] = 1 / alpha
    rest = (1 - shares[order[:full]].sum() / alpha) / shares[order[full]].clamp(min=1e-30)
    weights[order[full]] = rest.clamp(min=eps)
    return weights


class GroupGradients:
    """Inner products between the gradients that groups of texts give the weights of some layers,
    from one ordinary backward pass over all of them.

    The gradient of a weight is a sum over tokens, of outer products of the gradient at a Linear's
    output and its input; a token belongs to one text, a text to one group. So the layers keep both,
    and the sum is taken group by group: once more the cost of these weights' gradients, no backward
    pass of its own. One weight at a time has its (G, out, in) numbers in memory, is summed over
    processes and adds its Gram matrix. (The official code: G backward passes, and all gradients of
    all layers in one matrix, 4 GB for BERT base and 50 groups.)

    UserError: a layer with parameters outside of Linear and LayerNorm."""

    def __init__(self, backbone: nn.Module, num_layers: int = LAYERS):
        """The last layers of a Hugging Face encoder are watched, or all if it has fewer."""
        depth = backbone.config.num_hidden_layers
        layers = next(
            m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth
        )
        # module -> [input, gradient at the output] of each call, in the order of the forward pass
        self.calls = {}
        for layer in layers[-num_layers:]:
            for module in layer.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    self.calls[module] = []
                    module.register_forward_hook(self._keep)
                elif next(module.parameters(recurse=False), None) is not None:
                    raise UserError(
                        f"--dro: {type(module).__name__} is neither Linear nor LayerNorm — use "
                        "BERT's kind"
                    )

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
        G, slot = int(present.sum()), (present.cumsum(0) - 1)[groups.cpu()]  # (R,) in 0 ... G - 1
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
    def _gradients(module: nn.Module, calls: list, rows: tuple, G: int):
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

        def per_group(values: Tensor, owner=owner) -> Tensor:
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
