"""Losses of autoencoders, as functions; the sign of each says: lower is better.

Distances are means over the values of a picture, so a loss of 0.05 means the same at every size. The KL term is
divided by the number of values as well: weights that LDM (2112.10752) gives for sums over a picture carry over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return 10 * torch.log10(4 / l2(x, y.clamp(-1, 1)).clamp(min=4e-10))


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:  # (B,C,h,w) twice -> (B,) in nats
    """KL(N(mean, exp(logvar)) || N(0, I)), summed over the latent (1312.6114, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:  # logits of any shape -> ()
    """Real logits are pushed above 1, fake ones below -1 (1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_critic(real: Tensor, fake: Tensor) -> Tensor:  # logits of any shape -> ()
    """Cross entropy with real = 1, fake = 0 (1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


CRITIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge_critic, "vanilla": vanilla_critic}


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:  # () three times
    """|d nll / d last| / (|d g_loss / d last| + 1e-4) in [0, limit]: both then pull equally (VQGAN, 2012.09841, eq. 7)."""
    by_nll, = torch.autograd.grad(nll, last_layer, retain_graph=True)
    by_critic, = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    return (by_nll.norm() / (by_critic.norm() + 1e-4)).clamp(0, limit).detach()


class ReconstructionLoss:
    """Everything but the critic: distance in pixels and in features, and what the bottleneck asks for.

    Args:
        pixel: distance in pixels.
        perceptual: weight of LPIPS; above 0 the weights of VGG16 are needed.
        kl: weight of the KL term in nats for each value of a picture (LDM's 1e-6 is the same number here).
        codebook: weight of the codebook term.
        kl_warmup: batches in which the KL weight grows linearly from 0.
        perceptual_weights: file with torchvision's VGG16; None: torch's hub cache, else a download.
    """

    def __init__(self, pixel: Literal["l1", "l2", "charbonnier"] = "l1", perceptual: float = 0.0, kl: float = 1e-6,
                 codebook: float = 1.0, kl_warmup: int = 0, perceptual_weights: str | None = None):
        if pixel not in PIXEL:
            raise ValueError(f"loss.pixel: {pixel!r} is unknown; it takes {', '.join(PIXEL)}")
        for name, weight in {"perceptual": perceptual, "kl": kl, "codebook": codebook, "kl_warmup": kl_warmup}.items():
            if weight < 0:
                raise ValueError(f"loss.{name}: {weight} is negative; it takes 0 (off) or more")
        self.pixel, self.perceptual, self.kl, self.codebook = pixel, perceptual, kl, codebook
        self.kl_warmup, self.perceptual_weights = kl_warmup, perceptual_weights
        self._lpips = None

    def prepare(self) -> None:
        """Load what is needed, so that a missing file is reported before the first batch. Raises UserError."""
        if self.perceptual and self._lpips is None:
            from autoencoder.critics import Lpips  # which needs this module's functions

            self._lpips = Lpips(self.perceptual_weights)

    def __call__(self, x: Tensor, x_hat: Tensor, bottleneck: dict[str, Tensor], batch: int = 0) -> dict[str, Tensor]:
        """Named scalars, means over the batch.

        Args:
            x, x_hat: pictures and reconstructions (B,C,H,W).
            bottleneck: ``Bottled.losses``: "kl" in nats a picture, "codebook", or a user's own (weight 1).
            batch: how many batches came before, for ``kl_warmup``.
        Returns:
            unweighted "pixel", "perceptual" and the bottleneck's own; weighted sums "reconstruction" (pixel and
            perceptual) and "loss" (everything).
        """
        terms = {"pixel": PIXEL[self.pixel](x, x_hat).mean()}
        reconstruction = terms["pixel"]
        if self.perceptual:
            self.prepare()
            terms["perceptual"] = self._lpips(x, x_hat).mean()
            reconstruction = reconstruction + self.perceptual * terms["perceptual"]
        weights = {"kl": self.kl * min(1.0, (batch + 1) / (self.kl_warmup + 1)) / x[0].numel(),
                   "codebook": self.codebook}
        terms |= bottleneck
        asked = sum(weights.get(name, 1.0) * term for name, term in bottleneck.items())
        return {**terms, "reconstruction": reconstruction, "loss": reconstruction + asked}
