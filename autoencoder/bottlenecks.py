"""Bottlenecks: encoder features -> latent, with the losses and codes that belong to them. All kinds by name, FSQ and LFQ
from ``autoencoder.lattices`` among them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from autoencoder.base import Bottled, without_autocast
from autoencoder.codes import Codebook, straight_through, summed, usage
from autoencoder.lattices import FSQ, LFQ
from autoencoder.losses import kl_divergence
from ldm.common.limits import limits
from ldm.common.team import place

__all__ = ["FSQ", "KL", "LFQ", "Plain", "VQ", "summed", "usage"]


class KL(nn.Module):
    """Diagonal Gaussian posterior with a KL term to N(0, I) (1312.6114; LDM, 2112.10752, section G).

    Features carry mean and log-variance: 2 * channels. The log-variance is clamped to [-30, 20].
    """

    check_params = staticmethod(limits(channels=1))

    def __init__(self, channels: int = 4):
        super().__init__()
        self.channels, self.features = channels, 2 * channels

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (B,2C,h,w) -> (B,C,h,w) twice
        mean, logvar = features.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """A draw (``noise`` (B,C,h,w) replaces the generator) and {"kl": nats a picture, mean over the batch}."""
        mean, logvar = (part.float() for part in self.moments(features))  # a sum over a picture is too much for bf16
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + (0.5 * logvar).exp() * noise
        return Bottled(z.to(features.dtype), {"kl": kl_divergence(mean, logvar).mean()})

    def quantise(self, z: Tensor) -> Tensor:  # what the decoder sees of a latent: itself
        return z


class Plain(nn.Module):
    """No bottleneck but the number of channels: a deterministic autoencoder."""

    check_params = staticmethod(limits(channels=1))

    def __init__(self, channels: int = 4):
        super().__init__()
        self.channels, self.features = channels, channels

    def moments(self, features: Tensor) -> tuple[Tensor, None]:
        return features, None

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        return Bottled(features)

    def quantise(self, z: Tensor) -> Tensor:
        return z


class VQ(Codebook):
    """The nearest of K codebook entries, with a straight-through gradient (VQ-VAE, 1711.00937; VQGAN, 2012.09841).

    Args:
        channels: size of an entry.
        codes: number K of entries.
        beta: weight of the commitment term |z - sg(e)|^2 beside the codebook term |sg(z) - e|^2.
        legacy: put ``beta`` on the other term, as published autoencoders were trained (``VectorQuantizer2``).
        learn: entries follow the "gradient" of the codebook term or an "ema" of what they stand for (1711.00937, A.1).
        cosine: features and entries are directions: both have length 1 (ViT-VQGAN, 2110.04627), the latent too.
        decay: of the average use of each entry, and of the codebook with "ema"; for one batch.
        restart: an entry used less than this share of the uniform use is put where a random feature is; 0: never.
        window: how many of the last codes ``usage`` looks at, on each rank; None: 65,536, or 4 K if that is more.
    """

    check_params = staticmethod(limits(channels=1, codes=1, beta=0, decay=(0, 1), window=1))

    def __init__(self, channels: int = 4, codes: int = 1024, beta: float = 0.25, legacy: bool = False,
                 learn: Literal["gradient", "ema"] = "gradient", cosine: bool = False, decay: float = 0.99,
                 restart: float = 0.0, window: int | None = None):
        if learn not in ("gradient", "ema"):
            raise ValueError(f"bottleneck.learn: {learn!r} is unknown; it takes gradient, ema")
        if legacy and learn == "ema":
            raise ValueError("bottleneck.legacy: the order of two terms; with learn: ema there is but one")
        if not 0 <= restart < 1:
            raise ValueError(f"bottleneck.restart: {restart}; it takes a share of the uniform use in [0, 1)")
        super().__init__(channels, codes, window)
        self.beta, self.legacy, self.learn, self.cosine = beta, legacy, learn, cosine
        self.decay, self.restart = decay, restart
        entries = torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes)
        entries = F.normalize(entries, dim=1) if cosine else entries
        if learn == "gradient":
            self.codebook = nn.Parameter(entries)
        else:
            self.register_buffer("codebook", entries)
            self.register_buffer("sums", entries.clone())  # of the features of each entry, averaged over batches
        self.register_buffer("use", torch.ones(codes))  # codes a batch and entry, averaged, in units of the uniform use
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def entries(self) -> Tensor:  # (K,C) in fp32: distances in half precision choose wrong neighbours
        entries = self.codebook.float()
        return F.normalize(entries, dim=1) if self.cosine else entries

    def moments(self, features: Tensor) -> tuple[Tensor, None]:
        if not self.cosine:
            return features, None
        return F.normalize(features.float(), dim=1).to(features.dtype), None

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:  # (B,C,h,w)
        """Quantised features, {"codebook": mean squared distance, both terms}, codes (B,h,w)."""
        z = self.moments(features)[0].float()
        flat = rearrange(z.detach(), "b c h w -> (b h w) c")
        if self.training and self.restart:
            self._restart_dead(flat)
        codes = self.indices(z)
        e = self.lookup(codes).float()
        commitment, codebook = F.mse_loss(z, e.detach()), F.mse_loss(e, z.detach())
        if self.learn == "ema":
            loss = self.beta * commitment
        else:
            loss = commitment + self.beta * codebook if self.legacy else codebook + self.beta * commitment
        if self.training:
            self.remember(codes)
            self._follow(flat, codes.flatten())
        return Bottled(straight_through(z, e).to(features.dtype), {"codebook": loss}, codes)

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w)
        return self.nearest(rearrange(z.float(), "b c h w -> (b h w) c")).view(len(z), *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w)
        return rearrange(self.entries[codes].to(self.codebook.dtype), "b h w c -> b c h w")

    @torch.no_grad()
    def nearest(self, flat: Tensor) -> Tensor:  # (N,C) -> (N,) index of the nearest entry, the first of equals
        with without_autocast(flat.device):
            entries = self.entries
            norms = entries.square().sum(dim=1)
            rows = max(1, 2**26 // self.codes)  # at most 256 MB of distances at a time
            return torch.cat([torch.addmm(norms, part, entries.T, alpha=-2).argmin(dim=1) for part in flat.split(rows)])

    @torch.no_grad()
    def _follow(self, flat: Tensor, codes: Tensor) -> None:  # (N,C), (N,)
        self.updates += 1
        hits = torch.bincount(codes, minlength=self.codes).to(flat.dtype)
        sums = flat.new_zeros(self.codes, self.channels).index_add_(0, codes, flat)
        both = summed(torch.cat([hits[:, None], sums], dim=1))
        both = (both * self.codes / both[:, 0].sum()).to(self.use.dtype)  # so that uniform use is 1, whatever the batch size
        hits, sums = both[:, 0], both[:, 1:]
        self.use.lerp_(hits, 1 - self.decay)
        if self.learn == "ema":
            # inf or nan in a batch must not stay for ever, and entries without use stay where they are
            self.sums.copy_(torch.where(sums.isfinite().all(), self.sums.lerp(sums, 1 - self.decay), self.sums))
            used = self.use[:, None]
            self.codebook.copy_(torch.where(used > 1e-4, self.sums / used, self.codebook))

    @torch.no_grad()
    def _restart_dead(self, flat: Tensor) -> None:  # (N,C) on each rank
        """Puts entries without use where features of the whole batch are, that of all ranks together."""
        dead = self.use < self.restart
        if not dead.any():
            return
        generator = torch.Generator().manual_seed(int(self.updates))  # no global state: a resumed run draws the same
        rank, world = place()
        order = torch.randperm(len(flat) * world, generator=generator)  # two entries get one only where there are too few
        pick = order[torch.arange(int(dead.sum())) % len(order)].to(flat.device)
        own = (pick // len(flat) == rank)[:, None]  # of other ranks: zero here, and the sum has them
        fresh = summed(torch.where(own, flat[pick % len(flat)], 0.0).to(self.codebook.dtype))
        fresh = torch.where(fresh.isfinite().all(dim=1, keepdim=True), fresh, self.codebook[dead])
        self.codebook.data[dead] = fresh
        self.use[dead] = 1.0
        if self.learn == "ema":
            self.sums[dead] = fresh
