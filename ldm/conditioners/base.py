"""The contract that every conditioner keeps: a batch (a dict) becomes a Cond.

    conditioner(batch)              the condition
    conditioner.null(n)             what guidance compares with: it names only what is turned off
    conditioner.with_dropout(...)   the condition in training: some samples get the null
    conditioner.with_null(batch)    both sides of guidance
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm.common.build import near
from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.wants import Want

Draw = Callable[[str], Tensor]  # name of a stream -> (B,) uniform on [0,1), a number for each sample


class Conditioner(nn.Module):
    """Base of all conditioners. A kind implements ``forward``, and ``null`` where guidance is to turn something off.

    What it gives is a function of the batch alone. Sizes of networks are derived from what it says of itself:

    width: of its tokens, vector_width: of its vector; None: it gives none. length: tokens at most.
    spatial_channels: of its spatial condition, without the latents that it ``encodes``: each has the autoencoder's channels.
    dropout: share of samples that training gives the null (p_uncond; 2207.12598).
    encoder_hash: of the frozen encoders that it works with; None: it has none.
    encodes: pictures of the batch that it wants as latents, ``{"masked_image": raw}``; see ``encoded`` and ``picture``.
    wants: what it reads of the batch, for programs that ask people for it; None: it does not say.
    """

    width: int | None = None
    vector_width: int | None = None
    spatial_channels: int = 0
    length: int = 1
    dropout: float = 0.0
    encoder_hash: str | None = None
    encodes: Mapping[str, bool] = {}
    wants: tuple[Want, ...] | None = None

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        raise NotImplementedError(f"{type(self).__name__} has to implement forward(batch)")

    def null(self, n: int) -> Cond:
        """The condition of n samples that says nothing; a field that is None stays what it is in the condition."""
        return Cond()

    def with_dropout(self, batch: Mapping[str, Any], draw: Draw) -> Cond:
        """The condition, with the null where the sample's number in stream "drop" is below ``dropout``."""
        cond = self(batch)
        return cond.where(draw("drop") >= self.dropout, self.null(1)) if self.dropout else cond

    def with_null(self, batch: Mapping[str, Any]) -> tuple[Cond, Cond | None]:
        """The condition and what guidance leads away from; None where there is nothing to lead away from."""
        cond = self(batch)
        null = self.null(len(cond))
        return cond, null.filled(cond) if len(null) else None

    @property
    def has_null(self) -> bool:
        """Whether training has shown the null to the network."""
        return self.dropout > 0

    def picture(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        """One of the pictures that it ``encodes``, (B,C,H,W) in [-1,1]."""
        return entry(batch, key, self)

    def beside(self, channels: int) -> int:
        """Channels of its spatial condition, beside latents of so many."""
        return self.spatial_channels + channels * len(self.encodes)

    def example(self, z: Tensor) -> Cond:
        """A condition of the right shapes for a latent z (1,C,h,w): what a network is planned with."""
        tokens = None if self.width is None else z.new_zeros(1, self.length, self.width)
        vector = None if self.vector_width is None else z.new_zeros(1, self.vector_width)
        channels = self.beside(z.shape[1])
        return Cond(tokens, None, vector, z.new_zeros(1, channels, *z.shape[2:]) if channels else None)


def check_dropout(dropout: float) -> float:
    if not 0 <= dropout <= 1:
        raise UserError(f"dropout {dropout}: the share of dropped conditions lies between 0 and 1")
    return dropout


def entry(batch: Mapping[str, Any], key: str, owner: nn.Module) -> Any:
    """What the batch has under this key. UserError, naming the nearest, where it has no such thing."""
    if key not in batch:
        raise UserError(f"{type(owner).__name__}: the batch has no {key!r}{near(key, batch)}; it holds {', '.join(batch)}")
    return batch[key]


def tensor(batch: Mapping[str, Any], key: str, owner: nn.Module, shape: Sequence[int | None]) -> Tensor:
    """The tensor (B, *shape) that the batch has under this key; a side of None may be any. UserError where it is another."""
    return shaped(entry(batch, key, owner), key, owner, shape)


def shaped(value: Any, key: str, owner: nn.Module, shape: Sequence[int | None]) -> Tensor:
    """The value as a tensor (B, *shape), as ``tensor`` has it."""
    value = torch.as_tensor(value)
    sides = zip(shape, value.shape[1:], strict=False)
    if value.ndim != len(shape) + 1 or any(side not in (None, found) for side, found in sides):
        wanted = ", ".join(["B", *("any" if side is None else str(side) for side in shape)])
        raise UserError(f"{type(owner).__name__}: {key!r} has to be ({wanted}), got {tuple(value.shape)}")
    return value


def like(x: Tensor, layer: nn.Module) -> Tensor:
    """x where the layer's weights are, in their precision; as it is where it has none."""
    weight = next(layer.parameters(), None)
    return x if weight is None else x.to(weight)


def encoded(conditioner: nn.Module | None, autoencoder: Autoencoder, batch: Mapping[str, Any],
            size: Sequence[int] | None = None) -> dict[str, Any]:
    """The batch with what a conditioner cannot know by itself: "latent_size", height and width of the latents, and
    KEY_latent (B,C,h,w) for the pictures KEY that it ``encodes``, unless they are there.

    Latents are the posterior's mode at unit scale; raw ones are as they come, before shift and scale, which the
    inpainting model of LDM was trained with. Without gradients, and in the autoencoder's own precision.
    """
    batch = dict(batch)
    if size is not None:
        batch["latent_size"] = tuple(size)
    for key, raw in getattr(conditioner, "encodes", {}).items():
        if f"{key}_latent" not in batch:
            with torch.no_grad():
                z = autoencoder.encode(conditioner.picture(key, batch).to(autoencoder.shift.device).float())
                batch[f"{key}_latent"] = autoencoder.denormalise(z) if raw else z
    return batch
