"""Losses of autoencoders, as functions; the sign of each says: lower is better.

Distances are means over the values of a picture, so a loss of 0.05 means the same at every size. The KL term is
divided by the number of values as well: weights that LDM (2112.10752) gives for sums over a picture carry over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.limits import limits


def l1(x: Tensor, y: Tensor) -> Tensor:  # (B,C,H,W) twice -> (B,)
    return (x - y).abs().mean(dim=(1, 2, 3))


def l2(x: Tensor, y: Tensor) -> Tensor:  # (B,C,H,W) twice -> (B,)
    return (x - y).square().mean(dim=(1, 2, 3))


def charbonnier(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:  # (B,C,H,W) twice -> (B,)
    """sqrt(d^2 + eps^2) - eps: l2 for differences below ``eps``, l1 above (1710.01992)."""
    return ((x - y).square() + eps**2).sqrt().mean(dim=(1, 2, 3)) - eps


PIXEL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "l2": l2, "charbonnier": charbonnier}


def psnr(x: Tensor, y: Tensor) -> Tensor:  # (B,C,H,W) in [-1,1] twice -> (B,) in decibels
    """10 log10(range^2 / mse) with range 2, at most 100; the second picture is clamped, as it is when shown."""
    return 10 * torch.log10(4 / l2(x, y.float().clamp(-1, 1)).clamp(min=4e-10))


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:  # (B,C,h,w) twice -> (B,) in nats
    """KL(N(mean, exp(logvar)) || N(0, I)), summed over the latent (1312.6114, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def with_logvar(distance: Tensor, logvar: Tensor) -> Tensor:  # () twice -> ()
    """distance / exp(s) + s, a negative log-likelihood with output variance exp(s): least where s = log distance."""
    return distance / logvar.exp() + logvar


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:  # logits of any shape -> ()
    """Real logits are pushed above 1, fake ones below -1 (1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_critic(real: Tensor, fake: Tensor) -> Tensor:  # logits of any shape -> ()
    """Cross entropy with real = 1, fake = 0 (1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def lsgan_critic(real: Tensor, fake: Tensor) -> Tensor:  # logits of any shape -> ()
    """Real logits are pulled to 1, fake ones to 0 (1611.04076)."""
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def higher(fake: Tensor) -> Tensor:  # logits of any shape -> ()
    """What the autoencoder is told beside hinge (1705.02894), and in LDM beside vanilla too: larger logits."""
    return -fake.mean()


def lsgan_generator(fake: Tensor) -> Tensor:  # logits of any shape -> ()
    """Logits of what was made are pulled to 1 (1611.04076)."""
    return (fake - 1).square().mean()


# kind -> loss of the critic, loss of the autoencoder, logit between what looks made and what looks real
ADVERSARIAL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], float]] = {
    "hinge": (hinge_critic, higher, 0.0), "vanilla": (vanilla_critic, higher, 0.0),
    "lsgan": (lsgan_critic, lsgan_generator, 0.5)}


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:  # (B,...), (B,C,H,W) that they come from -> ()
    """Mean over the batch of |d D / d x|^2, D the sum of a picture's logits: R1 where x is real (1801.04406)."""
    gradient, = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def adaptive_weight(loss: Tensor, other: Tensor, at: Tensor, limit: float = 1e4, eps: float = 1e-4,
                    size: Callable[[Tensor], Tensor] = Tensor.norm) -> Tensor:
    """|d loss / d at| / (|d other / d at| + eps) in [0, limit] (): times this, ``other`` pulls at the tensor ``at`` as ``loss``
    does. With the last layer's weight as ``at`` and a generator's loss as ``other``: VQGAN, 2012.09841, eq. 7.
    size: of a gradient (), the same on all ranks if it asks them all."""
    by_loss, by_other = (size(torch.autograd.grad(value, at, retain_graph=True)[0].float()) for value in (loss, other))
    return (by_loss / (by_other + eps)).clamp(0, limit).detach()


class ReconstructionLoss(nn.Module):
    """Everything but the critic: distance in pixels and in features, and what the bottleneck asks for.

    Args:
        pixel: distance in pixels.
        perceptual: weight of the distance in features: LPIPS, for which the weights of VGG16 are needed.
        kl: weight of the KL term in nats for each value of a picture (LDM's 1e-6 is the same number here).
        codebook: weight of the codebook term.
        kl_warmup: batches in which the KL weight grows linearly from 0.
        perceptual_weights: file with torchvision's VGG16; None: torch's hub cache, else a download.
        perceptual_distance: block of a distance in place of LPIPS: (x, x_hat) -> one number a picture, of any shape. If it is
            a module it is frozen, and in no checkpoint.
        reduction: "sum" makes losses ``C*H*W`` times larger: distances and KL are sums over a picture, as in LDM's KL recipe.
            Learning rates of Adam do not feel it; ``gradient_clip`` and ``critic.limit`` do.
        logvar: logarithm s of the output variance: the distance d becomes d / exp(s) + s. None: none.
        learn_logvar: s is trained (from ``logvar`` on) with the autoencoder's optimizer.
    """

    check_params = staticmethod(limits(perceptual=0, kl=0, codebook=0, kl_warmup=0))

    def __init__(self, pixel: Literal["l1", "l2", "charbonnier"] = "l1", perceptual: float = 0.0, kl: float = 1e-6,
                 codebook: float = 1.0, kl_warmup: int = 0, perceptual_weights: str | None = None,
                 perceptual_distance: Callable[[Tensor, Tensor], Tensor] | None = None,
                 reduction: Literal["mean", "sum"] = "mean", logvar: float | None = None, learn_logvar: bool = False):
        super().__init__()
        if pixel not in PIXEL:
            raise ValueError(f"loss.pixel: {pixel!r} is unknown; it takes {', '.join(PIXEL)}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"loss.reduction: {reduction!r} is unknown; it takes mean, sum")
        for name, weight in {"perceptual": perceptual, "kl": kl, "codebook": codebook, "kl_warmup": kl_warmup}.items():
            if weight < 0:
                raise ValueError(f"loss.{name}: {weight} is negative; it takes 0 (off) or more")
        if learn_logvar and logvar is None:
            raise ValueError("loss.learn_logvar: there is nothing to learn; give loss.logvar, its first value (such as 0.0)")
        self.pixel, self.perceptual, self.kl, self.codebook = pixel, perceptual, kl, codebook
        self.kl_warmup, self.perceptual_weights, self.reduction = kl_warmup, perceptual_weights, reduction
        self.logvar = nn.Parameter(torch.tensor(float(logvar))) if learn_logvar else logvar
        self._distance = None
        if perceptual_distance is not None:
            from autoencoder.critics import Frozen  # which needs this module's functions

            self._distance = Frozen(perceptual_distance)

    def check(self, channels: int) -> None:
        """Raises UserError where pictures of so many channels cannot be judged."""
        if self.perceptual and self._distance is None:
            from autoencoder.critics import Lpips

            Lpips.check(channels)

    def prepare(self) -> None:
        """Load what is needed, so that a missing file is reported before the first batch. Raises UserError."""
        if self.perceptual and self._distance is None:
            from autoencoder.critics import Lpips

            self._distance = Lpips(self.perceptual_weights)

    def forward(self, x: Tensor, x_hat: Tensor, bottleneck: dict[str, Tensor], batch: int = 0) -> dict[str, Tensor]:
        """Named scalars in fp32, means over the batch.

        Args:
            x, x_hat: pictures and reconstructions (B,C,H,W).
            bottleneck: ``Bottled.losses``: "kl" in nats a picture, "codebook", or a user's own (weight 1).
            batch: how many batches came before, for ``kl_warmup``.
        Returns:
            unweighted "pixel", "perceptual" and the bottleneck's own; their weighted sum "reconstruction" (pixel and
            perceptual); by ``reduction`` and ``logvar``: "nll", from "reconstruction", and "loss", everything.
        """
        x, x_hat = x.float(), x_hat.float()
        terms = {"pixel": PIXEL[self.pixel](x, x_hat).mean()}
        reconstruction = terms["pixel"]
        if self.perceptual:
            self.prepare()
            terms["perceptual"] = self._distance(x, x_hat).float().mean()
            reconstruction = reconstruction + self.perceptual * terms["perceptual"]
        nll = reconstruction
        if self.logvar is not None:
            logvar = torch.as_tensor(self.logvar, device=x.device)
            nll, terms["logvar"] = with_logvar(reconstruction, logvar), logvar.detach()
        values = x[0].numel()
        warm = min(1.0, (batch + 1) / (self.kl_warmup + 1))
        weights = {"kl": self.kl * warm / values, "codebook": self.codebook}
        if self.reduction == "sum":
            nll, weights["kl"] = nll * values, self.kl * warm
        bottleneck = {name: term.float() for name, term in bottleneck.items()}
        asked = sum(weights.get(name, 1.0) * term for name, term in bottleneck.items())
        return {**terms, **bottleneck, "reconstruction": reconstruction, "nll": nll, "loss": nll + asked}
