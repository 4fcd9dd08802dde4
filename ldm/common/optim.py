"""Optimizers and learning-rate schedules by name, from configuration blocks.

Muon orthogonalises the momentum of every weight matrix (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon) and
leaves vectors, embeddings and first/last layers to AdamW. A convolution's weight (O, I, kh, kw) is the matrix
(O, I*kh*kw).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.common.build import Block, build, locate
from ldm.common.files import UserError
from ldm.common.limits import limits


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards U V^T of g = U S V^T, for a batch of matrices (N, m, n).

    X <- P(X X^T) X with the quintic P of Jordan, which leaves singular values in about [0.7, 1.2]. Where n >= 2 m the
    iteration runs on the small Gram matrix X X^T and touches X at both ends only: a third of the work for convolutions.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-1] >= 2 * x.shape[-2]
    gram, product = x @ x.mT, None
    for step in range(steps):
        p = b * gram + c * gram @ gram
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        if wide:
            product = p if product is None else p @ product
        else:
            x = p @ x
        if step + 1 < steps:
            gram = p @ gram @ p if wide else x @ x.mT
    x = product @ x if wide else x
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon for matrices, AdamW for the rest, in one optimizer.

    Args:
        named_parameters: (name, parameter) pairs, as ``module.named_parameters()`` gives them.
        lr: learning rate of the matrices, in units of RMS change per entry (2502.16982, section 2.2: the update is
            scaled by 0.2 * sqrt(max(m, n)), so that AdamW's learning rates carry over).
        adam_lr: learning rate of everything else; ``lr`` if None.
        adam_names: substrings of the names of matrices that AdamW is to have (embeddings, first and last layers).
        weight_decay: decoupled, on matrices only.
    """

    given = ("named_parameters",)
    check_params = staticmethod(limits(lr=0, adam_lr=0, momentum=(0, 1), weight_decay=0, eps=0, steps=1))

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float = 1e-3, momentum: float = 0.95,
                 adam_lr: float | None = None, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.0, steps: int = 5,
                 adam_names: tuple[str, ...] = ("conv_in", "conv_out", "embed", "time")):
        pairs = [(name, p) for name, p in named_parameters if p.requires_grad]
        matrices = [p for n, p in pairs if p.ndim >= 2 and not any(part in n for part in adam_names)]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in pairs if id(p) not in chosen]
        groups = [dict(params=matrices, lr=lr, muon=True),
                  dict(params=others, lr=lr if adam_lr is None else adam_lr, muon=False)]
        super().__init__([g for g in groups if g["params"]],
                         dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adam)(group, params)
        return loss

    def _muon(self, group: dict, params: list[Tensor]) -> None:
        by_shape = defaultdict(list)  # equal shapes go through one batched iteration
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        for p, update in zip(params, torch._foreach_lerp(grads, momenta, group["momentum"]), strict=True):  # Nesterov
            by_shape[p.flatten(1).shape].append((p, update.flatten(1)))
        for (m, n), pairs in by_shape.items():
            updates = orthogonalise(torch.stack([u for _, u in pairs]), group["steps"])
            for (p, _), update in zip(pairs, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * math.sqrt(max(m, n)))

    def _adam(self, group: dict, params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        by_step = defaultdict(list)  # one group, unless some weights have no gradient now and then
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
            self.state[p]["step"] += 1
            by_step[self.state[p]["step"].item()].append(p)
        for k, same in by_step.items():
            grads, m, v = ([p.grad for p in same], *([self.state[p][name] for p in same] for name in "mv"))
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            denominator = torch._foreach_sqrt(torch._foreach_div(v, 1 - beta2**k))
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(same, m, denominator, value=-group["lr"] / (1 - beta1**k))


def make_optimizer(block: Block, module: nn.Module) -> Optimizer:
    """The optimizer of a configuration block over ``module``'s trainable parameters."""
    target = locate(block["target"])
    if "named_parameters" in getattr(target, "given", ()):
        optimizer = build(block, named_parameters=list(module.named_parameters()))
    else:
        optimizer = build(block, params=[p for p in module.parameters() if p.requires_grad])
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"{block['target']} makes no optimizer; take torch.optim.AdamW, for example")
    return optimizer


def make_schedule(block: Block | None, optimizer: Optimizer, total: int | None) -> LambdaLR:
    """The learning rate's course over a run of ``total`` optimizer steps (None: unlimited); no block: constant."""
    course = (lambda step: 1.0) if block is None else build(block, total=total)
    return LambdaLR(optimizer, lambda step: course(step))  # a function: LambdaLR would save an object, and its old total
