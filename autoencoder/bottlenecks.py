"""Bottlenecks: encoder features -> latent, with the losses and codes that belong to them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from autoencoder.base import Bottled


class KL(nn.Module):
    """Diagonal Gaussian posterior with a KL term to N(0, I) (1312.6114; LDM, 2112.10752, section G).

    Features carry mean and log-variance: 2 * channels. The log-variance is clamped to [-30, 20].
    """

    def __init__(self, channels: int = 4):
        super().__init__()
        self.channels, self.features = channels, 2 * channels

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (B,2C,h,w) -> (B,C,h,w) twice
        mean, logvar = features.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """A draw (``noise`` (B,C,h,w) replaces the generator) and {"kl": nats a picture, mean over the batch}."""
        mean, logvar = self.moments(features)
        noise = torch.randn_like(mean) if noise is None else noise
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))
        return Bottled(mean + (0.5 * logvar).exp() * noise, {"kl": kl.mean()})

    def quantise(self, z: Tensor) -> Tensor:  # what the decoder sees of a latent: itself
        return z


class Plain(nn.Module):
    """No bottleneck but the number of channels: a deterministic autoencoder."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.channels, self.features = channels, channels

    def moments(self, features: Tensor) -> tuple[Tensor, None]:
        return features, None

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        return Bottled(features)

    def quantise(self, z: Tensor) -> Tensor:
        return z


class VQ(nn.Module):
    """The nearest of K codebook entries, with a straight-through gradient (VQ-VAE, 1711.00937; VQGAN, 2012.09841).

    The latent of a picture is what comes *before* quantisation (as in LDM); the decoder quantises.

    Args:
        channels: size of an entry.
        codes: number K of entries.
        beta: weight of the commitment term |z - sg(e)|^2 beside the codebook term |sg(z) - e|^2.
        legacy: put ``beta`` on the other term, as published autoencoders were trained (``VectorQuantizer2``).
        learn: entries follow the "gradient" of the codebook term or an "ema" of what they stand for (1711.00937, A.1).
        decay: of the average use of each entry, and of the codebook with "ema"; for one batch.
        restart: an entry used less than this share of the uniform use is put where a random feature is; 0: never.
        window: how many of the last codes ``usage`` looks at, on each rank.
    """

    def __init__(self, channels: int = 4, codes: int = 1024, beta: float = 0.25, legacy: bool = False,
                 learn: Literal["gradient", "ema"] = "gradient", decay: float = 0.99, restart: float = 0.0,
                 window: int = 65536):
        super().__init__()
        if learn not in ("gradient", "ema"):
            raise ValueError(f"bottleneck.learn: {learn!r} is unknown; it takes gradient, ema")
        if legacy and learn == "ema":
            raise ValueError("bottleneck.legacy: the order of two terms; with learn: ema there is but one")
        if not 0 <= restart < 1:
            raise ValueError(f"bottleneck.restart: {restart}; it takes a share of the uniform use in [0, 1)")
        self.channels = self.features = channels
        self.codes, self.beta, self.legacy = codes, beta, legacy
        self.learn, self.decay, self.restart, self.window = learn, decay, restart, window
        entries = torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes)
        if learn == "gradient":
            self.codebook = nn.Parameter(entries)
        else:
            self.register_buffer("codebook", entries)
            self.register_buffer("sums", entries.clone())  # of the features of each entry, averaged over batches
        self.register_buffer("use", torch.ones(codes))  # codes a batch and entry, averaged, in units of the uniform use
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._recent = torch.empty(0, dtype=torch.int64)  # of this rank, so no buffer: DDP would copy rank 0's

    def moments(self, features: Tensor) -> tuple[Tensor, None]:
        return features, None

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:  # (B,C,h,w)
        """Quantised features, {"codebook": mean squared distance, both terms}, codes (B,h,w)."""
        z = features.float()  # distances in half precision choose wrong neighbours
        flat = rearrange(z.detach(), "b c h w -> (b h w) c")
        if self.training and self.restart:
            self._restart_dead(flat)
        codes = self.nearest(flat)
        e = rearrange(self.codebook[codes], "(b h w) c -> b c h w", h=z.shape[2], w=z.shape[3])
        commitment, codebook = F.mse_loss(z, e.detach()), F.mse_loss(e, z.detach())
        if self.learn == "ema":
            loss = self.beta * commitment
        else:
            loss = commitment + self.beta * codebook if self.legacy else codebook + self.beta * commitment
        if self.training:
            self._follow(flat, codes)
        codes = rearrange(codes, "(b h w) -> b h w", h=z.shape[2], w=z.shape[3])
        return Bottled(z + (e - z).detach(), {"codebook": loss}, codes)

    def quantise(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> the nearest entries
        return self.lookup(self.indices(z))

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w)
        return self.nearest(rearrange(z.float(), "b c h w -> (b h w) c")).view(len(z), *z.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w)
        return rearrange(self.codebook[codes], "b h w c -> b c h w")

    @torch.no_grad()
    def nearest(self, flat: Tensor) -> Tensor:  # (N,C) -> (N,) index of the nearest entry, the first of equals
        with torch.autocast(flat.device.type, enabled=False):
            norms = self.codebook.square().sum(dim=1)
            rows = max(1, 2**26 // self.codes)  # at most 256 MB of distances at a time
            return torch.cat([torch.addmm(norms, part, self.codebook.T, alpha=-2).argmin(dim=1)
                              for part in flat.split(rows)])

    def usage(self) -> dict[str, float]:
        """Of the last ``window`` codes of every rank: share of entries "used" and "perplexity", exp of the entropy.
        All ranks have to call."""
        return usage(summed(torch.bincount(self._recent, minlength=self.codes)))

    @torch.no_grad()
    def _follow(self, flat: Tensor, codes: Tensor) -> None:  # (N,C), (N,)
        self._recent = torch.cat([self._recent.to(codes.device), codes])[-self.window:]
        self.updates += 1
        hits = torch.bincount(codes, minlength=self.codes).to(flat.dtype)
        sums = torch.zeros_like(self.codebook).index_add_(0, codes, flat)
        both = summed(torch.cat([hits[:, None], sums], dim=1))
        both = both * self.codes / both[:, 0].sum()  # so that uniform use is 1, whatever the batch size
        hits, sums = both[:, 0], both[:, 1:]
        self.use.lerp_(hits, 1 - self.decay)
        if self.learn == "ema":
            # inf or nan in a batch must not stay for ever, and entries without use stay where they are
            self.sums.copy_(torch.where(sums.isfinite().all(), self.sums.lerp(sums, 1 - self.decay), self.sums))
            used = self.use[:, None]
            self.codebook.copy_(torch.where(used > 1e-4, self.sums / used, self.codebook))

    @torch.no_grad()
    def _restart_dead(self, flat: Tensor) -> None:  # (N,C)
        dead = self.use < self.restart
        if not dead.any():
            return
        generator = torch.Generator().manual_seed(int(self.updates))  # no global state: a resumed run draws the same
        pick = torch.randint(len(flat), (int(dead.sum()),), generator=generator)
        fresh = from_rank_0(flat[pick.to(flat.device)])
        fresh = torch.where(fresh.isfinite().all(dim=1, keepdim=True), fresh, self.codebook[dead])
        self.codebook.data[dead] = fresh
        self.use[dead] = 1.0
        if self.learn == "ema":
            self.sums[dead] = fresh


def usage(hits: Tensor) -> dict[str, float]:  # (K,) how often each entry was taken
    """Share of entries that were "used" at all and "perplexity": how many equally used entries say as much."""
    p = hits / hits.sum().clamp(min=1)
    return {"used": (hits > 0).float().mean().item(), "perplexity": torch.special.entr(p).sum().exp().item()}


def summed(x: Tensor) -> Tensor:
    """``x``, in place the sum over all ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def from_rank_0(x: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(x, src=0)
    return x
