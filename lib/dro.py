"""Group-robust training (DRO): weights for groups of queries, and the inner products of the groups' gradients.

K groups, of which G are in the batch of all processes; B queries per device, W processes. Losses are per query and
depend on the query's own passages alone. Everything a weight depends on is global, so it is the same on every process.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lib.dist import all_gather, world
from lib.files import UserError


class GroupWeights:
    """How much each group of queries counts, h (K,), moved after every step towards those that gain most, or lag most.

    idro, COCO-DR (arXiv 2210.15212; DRO/dro_loss.py): loss = sum_i c_i L_i / sum_i c_i over the groups present, L_i
    the mean loss of group i. Then, with r_ij = (L_i L_j)^alpha <g_i, g_j> and e_i = rho / K sum_j r_ij,
        official   c_i = h_i             h_i <- h_i^ema exp(e_i)   normalised, at least eps   <,> the cosine
        paper      c_i = h_i L_i^alpha   h_i <- h_i exp(e_i)       normalised                 <,> the inner product
    greedy, the same repository: the expected loss of the worst share alpha of the queries. With running means S of the
    loss and c of the number of queries, and f = c / sum c: loss = sum over queries h_i l / (W B); then h = 1 / alpha
    for the groups of highest S that make up alpha, the group at the border in proportion, all others eps.

    Deviations from the official code:
      1. Losses, counts and gradients are of the batch of all processes (theirs: gradients alone, so that two processes
         differ in their weights).
      2. A group that is not in the batch keeps its weight (theirs: eps); those that are share what they hold.
      3. h begins at 1 / K, and idro's loss is divided by the weight present, so that it stays a mean (theirs: 1 each,
         and a sum).
      4. The weight is not averaged over steps once more (their greedy's weight_ema, 0 in the recipe)."""

    def __init__(
        self, clusters, kind: str, form: str, alpha: float, ema: float, rho: float, eps: float
    ):
        groups = int(max(clusters)) + 1
        assert kind in ("idro", "greedy") and form in ("official", "paper")
        if not 0 < alpha <= 1 or not 0 <= ema <= 1 or rho < 0 or not 0 <= eps * groups <= 1:
            raise UserError(
                f"--dro_alpha {alpha} --dro_ema {ema} --dro_rho {rho} --dro_eps {eps}: alpha in (0, 1], ema in [0, "
                f"1], rho from 0, eps at most 1 / {groups} groups — mend them"
            )
        self.kind, self.form, self.alpha, self.ema, self.rho, self.eps = (
            kind,
            form,
            alpha,
            ema,
            rho,
            eps,
        )
        one = torch.ones(groups, dtype=torch.float64)
        self.h = one / groups if kind == "idro" else one.clone()
        self.losses, self.counts = torch.zeros_like(one), one.clone()  # greedy: S and c

    def state(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("h", "losses", "counts")}

    def load(self, state: dict[str, list[float]]) -> None:
        for name, values in state.items():
            setattr(self, name, torch.tensor(values, dtype=torch.float64))

    def loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """losses (B,), groups (B,) int64 -> scalar: its mean over processes is the loss above. Keeps what `update`
        needs: the statistics of the batch, and `factors` (K,), by which each query's loss was multiplied."""
        groups, K = groups.cpu(), len(self.h)
        everyone, values = (
            all_gather(groups.to(losses.device)).cpu(),
            all_gather(losses).double().cpu(),
        )
        self.present = torch.bincount(everyone, minlength=K)  # n (K,)
        self.means = torch.zeros_like(self.h).index_add_(0, everyone, values) / self.present.clamp(
            min=1
        )  # L (K,)
        if self.kind == "greedy":
            self.factors = self.h / len(losses)
        else:
            share = (
                self.h
                * (self.means**self.alpha if self.form == "paper" else 1)
                * (self.present > 0)
            )
            share = share / share.sum().clamp(min=1e-30)
            self.factors = world()[1] * share / self.present.clamp(min=1)
        return (losses * self.factors[groups].to(losses)).sum()

    def update(
        self, gradients: "GroupGradients | None", groups: Tensor, scale: float = 1.0
    ) -> None:
        """After the backward pass. groups: (R,) of each text in the order of encoding; scale: by which the backward
        pass multiplied the loss (fp16's scaler, accumulation)."""
        here = self.present > 0
        if self.kind == "greedy":
            self.losses[here] += self.ema * (self.means - self.losses)[here]
            self.counts += self.ema * (self.present - self.counts)
            self.h = cvar_weights(
                self.losses, self.counts / self.counts.sum(), self.alpha, self.eps
            )
            return
        products = gradients.products(
            groups, here
        )  # (G, G) of gradients of sum_q factor · scale · l_q
        if not torch.isfinite(products).all():  # fp16: a step that the scaler passes over
            return
        if self.form == "official":
            norms = products.diagonal().clamp(min=0).sqrt() + 1e-12
        else:  # back to gradients of L_i
            norms = (self.factors * self.present)[here].clamp(min=1e-30) * scale
        gain = (
            (self.means[here, None] * self.means[here]) ** self.alpha
            * products
            / (norms[:, None] * norms)
        )
        exponent = self.rho / len(self.h) * gain.sum(1)
        power = self.ema if self.form == "official" else 1
        new = torch.softmax(power * self.h[here].log() + exponent, 0) * (
            self.h[here].sum() / self.h.sum()
        )
        self.h[here] = new.clamp(min=max(self.eps, 1e-12))  # from 0 no weight would come back


def cvar_weights(losses: Tensor, shares: Tensor, alpha: float, eps: float) -> Tensor:
    """(K,) weights under which the mean over queries is that of the worst `alpha` of them: 1 / alpha for the groups of
    highest loss while their shares (K,), which sum to 1, stay below alpha; then what is left; then eps.
    Example: losses 3, 2, 1, shares 0.2, 0.3, 0.5, alpha 0.4, eps 0.01 -> 2.5, (1 - 0.2 / 0.4) / 0.3 = 1.667, 0.01."""
    order = losses.argsort(descending=True, stable=True)
    full = min(int((shares[order].cumsum(0) < alpha).sum()), len(order) - 1)
    weights = torch.full_like(losses, eps)
    weights[order[:full]] = 1 / alpha
    rest = (1 - shares[order[:full]].sum() / alpha) / shares[order[full]].clamp(min=1e-30)
    weights[order[full]] = rest.clamp(min=eps)
    return weights


class GroupGradients:
    """Inner products between the gradients that groups of texts give the weights of some layers, from one ordinary
    backward pass over all of them.

    The gradient of a weight is a sum over tokens, of outer products of the gradient at a Linear's output and its
    input; a token belongs to one text, a text to one group. So the layers keep both, and the sum is taken group by
    group: once more the cost of these weights' gradients, no backward pass of its own. One weight at a time has its
    (G, out, in) numbers in memory, is summed over processes and adds its Gram matrix. (The official code: G backward
    passes, and all gradients of all layers in one matrix, 4 GB for BERT base and 50 groups.)

    UserError: more layers than there are, or one with parameters outside of Linear and LayerNorm."""

    def __init__(self, backbone: nn.Module, num_layers: int):
        """The last layers of a Hugging Face encoder are watched."""
        depth = backbone.config.num_hidden_layers
        layers = next(
            m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth
        )
        if not 1 <= num_layers <= depth:
            raise UserError(
                f"--dro_layers {num_layers}: the model has {depth} layers — give 1 to {depth}"
            )
        self.calls = {}  # module -> [input, gradient at the output] of each call, in the order of the forward pass
        for layer in layers[-num_layers:]:
            for module in layer.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    self.calls[module] = []
                    module.register_forward_hook(self._keep)
                elif next(module.parameters(recurse=False), None) is not None:
                    raise UserError(
                        f"--dro: {type(module).__name__} is neither Linear nor LayerNorm — use BERT's kind"
                    )

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            call = [inputs[0].detach(), None]
            self.calls[module].append(call)
            output.register_hook(lambda gradient: call.__setitem__(1, gradient))

    @torch.no_grad()
    def products(self, groups: Tensor, present: Tensor) -> Tensor:
        """groups (R,): of each text, in the order in which the layers read them since the last call; present (K,)
        bool, the groups of all processes -> (G, G) float64 on the CPU. Forgets what it kept."""
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
            used = (grad != 0).any(
                -1
            )  # padding never, in the last layer nothing but what is pooled
            inputs.append(x[used])
            gradients.append(grad[used])
            owner.append(own.to(x.device)[:, None].expand(used.shape)[used])
        owner, order = torch.cat(owner).sort(stable=True)
        ends = torch.bincount(owner, minlength=G).tolist()
        inputs = torch.cat(inputs)[order].float()
        gradients = torch.cat(gradients)[order].float()
        if isinstance(module, nn.LayerNorm):
            inputs = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
            yield torch.zeros(G, inputs.shape[1], device=inputs.device).index_add_(
                0, owner, inputs * gradients
            )
        else:
            table = inputs.new_empty(G, gradients.shape[1], inputs.shape[1])
            for out, x, grad in zip(table, inputs.split(ends), gradients.split(ends), strict=True):
                torch.mm(grad.T, x, out=out)
            yield table.flatten(1)
        if module.bias is not None:
            yield torch.zeros(G, gradients.shape[1], device=inputs.device).index_add_(
                0, owner, gradients
            )
