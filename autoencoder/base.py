"""The contract that every autoencoder keeps, and the simplest one that keeps it.

Whoever calls ``encode`` gets latents of zero mean and unit variance per channel; whoever calls ``decode`` gives such
latents. Both may be in any precision: what comes out is float32 at least, and inside it goes in the precision of the
weights, autocast or not, since some autoencoders overflow in half.

The statistics that make it so (``shift``, ``scale``) belong to the autoencoder and travel in its state dict.
They are those of draws from q(z|x): the mode, which ``encode`` gives without a generator, varies a little less, and hardly
at all in a channel that collapsed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoencoder.tiled import blended
from ldm.common.weights import unwrapped


@dataclass(frozen=True)
class LatentSpec:
    """What a diffusion model needs to know of its latents: (C, h, w) = (channels, H / factor, W / factor)."""

    channels: int
    factor: int
    shift: Tensor  # (C,) mean of the raw latents
    scale: Tensor  # (C,) standard deviation of the raw latents
    count: int = 0  # pictures that shift and scale were measured over; 0: never measured
    data_hash: str | None = None  # of the data set that these pictures came from


@dataclass
class Bottled:
    """What a bottleneck gives back: the latent (B,C,h,w), named scalar losses, and (B,h,w) code indices if it has any."""

    latent: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    codes: Tensor | None = None


class Autoencoder(nn.Module):
    """Base of all autoencoders. A kind implements ``moments`` (raw) and ``decode_raw``; the rest follows.

    Args:
        image_channels: channels of the pictures.
        channels: channels C of the latent.
        factor: side of a picture / side of its latent.
    """

    def __init__(self, image_channels: int, channels: int, factor: int):
        super().__init__()
        self.image_channels, self.channels, self.factor = image_channels, channels, factor
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("statistics_count", torch.zeros((), dtype=torch.int64))  # pictures measured; 0: never
        self.register_buffer("statistics_data", torch.zeros(8, dtype=torch.uint8))  # hash of their data set, as bytes

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # (B,3,H,W) -> (B,C,h,w) twice
        """Mean and log-variance of q(z|x) before shift and scale; the log-variance of a deterministic kind is None."""
        raise NotImplementedError(f"{type(self).__name__} has to implement moments(x)")

    def decode_raw(self, z: Tensor) -> Tensor:  # (B,C,h,w) raw -> (B,3,H,W)
        raise NotImplementedError(f"{type(self).__name__} has to implement decode_raw(z)")

    def tiled_moments(self, x: Tensor, tile: int) -> tuple[Tensor, Tensor | None]:
        """``moments`` with less memory, by tiles of ``tile`` pixels a side. A kind that can do it exactly overrides this."""

        def joined(part: Tensor) -> Tensor:
            mean, logvar = self.moments(part)
            return mean if logvar is None else torch.cat([mean, logvar], dim=1)

        both = blended(joined, x, max(2, tile // self.factor), inside=self.factor)
        return (both, None) if both.shape[1] == self.channels else tuple(both.chunk(2, dim=1))

    def tiled_decode_raw(self, z: Tensor, tile: int) -> Tensor:
        """``decode_raw`` with less memory. A kind that can do it exactly overrides this."""
        return blended(self.decode_raw, z, max(2, tile // self.factor), outside=self.factor)

    @property
    def spec(self) -> LatentSpec:
        known = bool(self.statistics_data.any())
        return LatentSpec(self.channels, self.factor, self.shift, self.scale, int(self.statistics_count),
                          bytes(self.statistics_data.tolist()).hex() if known else None)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial term (VQGAN, 2012.09841, eq. 7)."""
        raise NotImplementedError(f"{type(self).__name__} trains with a critic only if it has a property last_layer: the "
                                  "weight of its decoder's last convolution")

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Bottled]:
        """The training pass: reconstruction (B,3,H,W) of a draw from q(z|x), and what it costs: "kl" in nats a picture.

        ``noise`` (B,C,h,w) replaces the generator. A deterministic kind has no costs; one with its own overrides this.
        """
        self.check(x)
        mean, logvar = self.moments(x)
        if logvar is None:
            return self.decode_raw(mean), Bottled(mean)
        z = mean + (0.5 * logvar).exp() * (torch.randn_like(mean) if noise is None else noise)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))
        return self.decode_raw(z), Bottled(z, {"kl": kl.mean()})

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.shift.view(-1, 1, 1)) / self.scale.view(-1, 1, 1)

    def denormalise(self, z: Tensor) -> Tensor:
        return z * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)

    def posterior(self, x: Tensor, tile: int | None = None, autocast: bool = False) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation (B,C,h,w) of q(z|x) at unit scale; None for deterministic kinds. autocast: where there is
        one, compute in it."""
        self.check(x)
        check_tile(tile)
        with nullcontext() if autocast else without_autocast(x.device):
            x = x.to(self.dtype)
            mean, logvar = (at_least_float32(part) for part in
                            (self.moments(x) if tile is None else self.tiled_moments(x, tile)))
            std = None if logvar is None else ((0.5 * logvar).exp() / self.scale.view(-1, 1, 1)).contiguous()
            return self.normalise(mean).contiguous(), std  # not channels-last, as convolutions may leave them

    def encode(self, x: Tensor, generator: torch.Generator | None = None, tile: int | None = None) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] -> latents (B,C,h,w) at unit scale: the mode, or a draw if a generator is given.

        tile: side in pixels of the tiles that large pictures are encoded by, with less memory; None: at once. Exact, up to
            rounding, with the encoder and decoder of ``autoencoder.nets``; with others tiles are blended.

        Raises:
            ValueError: where the channels are not the autoencoder's, or a side is no multiple of ``factor``.
        """
        mean, std = self.posterior(x, tile)
        if generator is None or std is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=generator.device)
        return mean + std * noise.to(mean.device)

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Latents (B,C,h,w) at unit scale -> pictures (B,3,H,W), [-1,1] up to overshoot. The inverse of ``encode``."""
        check_tile(tile)
        with without_autocast(z.device):
            raw = self.denormalise(at_least_float32(z)).to(self.dtype)
            return at_least_float32(self.decode_raw(raw) if tile is None else self.tiled_decode_raw(raw, tile)).contiguous()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), self.shift.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Autoencoder:
        """As of any module, except that the statistics stay in float32 where the weights go to half precision."""
        kept = {name: getattr(self, name) for name in ("shift", "scale")}
        super()._apply(fn, recurse)
        for name, exact in kept.items():
            moved = getattr(self, name)
            if moved.itemsize < exact.itemsize:
                setattr(self, name, exact.to(moved.device))
        return self

    @torch.no_grad()
    def set_statistics(self, shift: Tensor, scale: Tensor, count: int, data_hash: str | None = None) -> None:
        """Store mean and standard deviation (C,) of the raw latents, measured over ``count`` pictures.

        ``data_hash``: 16 hex digits that name the data set of these pictures.
        """
        if not (scale >= 1e-6).all():  # nan too
            dead = (~(scale >= 1e-6)).nonzero().flatten().tolist()
            raise ValueError(f"latent channels {dead} have no variance: the autoencoder collapsed; lower its kl weight")
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        self.statistics_count.fill_(count)
        self.statistics_data.copy_(torch.tensor(list(bytes.fromhex(data_hash or "00" * 8)), dtype=torch.uint8))

    def check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.image_channels:
            raise ValueError(f"expected pictures (B,{self.image_channels},H,W), got {tuple(x.shape)}")
        for name, side in zip(("height", "width"), x.shape[2:], strict=True):
            if side % self.factor:
                low = side // self.factor * self.factor
                near = " or ".join(str(s) for s in (low, low + self.factor) if s)
                raise ValueError(f"{name} {side} is no multiple of the autoencoder's factor {self.factor}: take {near}")

    def content_hash(self) -> str:
        """16 hex digits over every weight and buffer: two autoencoders with the same hash have the same latents."""
        digest = hashlib.sha256()
        for name, tensor in sorted(unwrapped(self.state_dict()).items()):
            if name == "statistics_data" and not tensor.any():
                continue  # not known: the hash is what it was when there was no such buffer
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def at_least_float32(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.itemsize >= 4 else x.float()


def check_tile(tile: int | None) -> None:
    if tile is not None and tile < 1:
        raise ValueError(f"tile: {tile}; it takes the side of a tile in pixels, from 1, or None")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside it nothing is cast to half precision behind anybody's back."""
    known = torch.amp.is_autocast_available(device.type)  # the meta device has none
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class Identity(Autoencoder):
    """No autoencoder: diffusion in pixel space by configuration. Factor 1, the picture is its latent."""

    def __init__(self, image_channels: int = 3):
        super().__init__(image_channels, image_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def decode_raw(self, z: Tensor) -> Tensor:
        return z
