"""Are these latents at the scale that noise processes are made for? Standard deviation 1, give or take a factor of two.

Latents of another scale train to grey or to noise, for days and without a word: at deviation 5 the signal drowns in no
noise that the process knows, at 0.1 it is gone after the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder.base import LatentSpec
from ldm.common.files import UserError

log = logging.getLogger(__name__)

LOW, HIGH = 0.5, 2.0  # of the standard deviation


@dataclass(frozen=True)
class Spread:
    """Of the latents of some pictures: mean and standard deviation over everything, and the latter for each channel."""

    pictures: int
    mean: float
    std: float
    channels: list[float]

    @property
    def fits(self) -> bool:
        return LOW <= self.std <= HIGH  # nan does not


def spread(latents: Iterable[Tensor]) -> Spread:
    """Of latents (B,C,h,w), batch by batch, of all ranks together: all have to call, and all get the same."""
    sums = sum(_sums(z.detach().cpu().double()) for z in latents)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list[Tensor] = [sums] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, sums)
        sums = sum(shares)
    pictures, values, total, squares = sums  # (C,) each
    mean, std = _moments(values.sum(), total.sum(), squares.sum())
    return Spread(int(pictures[0]), mean.item(), std.item(), _moments(values, total, squares)[1].tolist())


def _moments(values: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / values
    return mean, (squares / values - mean.square()).clamp(min=0).sqrt()


def _sums(z: Tensor) -> Tensor:  # (B,C,h,w) -> (4,C): pictures, values, their sum, the sum of their squares
    ones = torch.ones_like(z)
    return torch.stack([ones[:, :, 0, 0].sum(0), *(part.sum(dim=(0, 2, 3)) for part in (ones, z, z.square()))])


def check_scale(found: Spread, spec: LatentSpec, data_hash: str | None = None, force: bool = False) -> None:
    """Refuse latents that a diffusion model would not learn.

    One channel outside of the band is a warning: a channel that collapsed is small where the mode is trained on.

    Args:
        spec: of the autoencoder that they come from.
        data_hash: of the data that they come from.
        force: warn in place of refusing.

    Raises:
        UserError: where the standard deviation over everything is outside of [LOW, HIGH].
    """
    if not found.fits:
        told = (f"the latents of the first {found.pictures} images have standard deviation {found.std:.3g} (mean "
                f"{found.mean:.3g}); a diffusion model expects 1, and {LOW:g} to {HIGH:g} at least")
        if not force:
            raise UserError(f"{told}. {_origin(spec, data_hash)}. Ways out: model.params.statistics=measure measures them on "
                            "this data; train the autoencoder with main.py, which measures them at its end; "
                            "model.params.statistics=force trains on these latents as they are")
        log.warning("%s; training goes on because statistics: force says so", told)
    odd = [f"{number} ({std:.2g})" for number, std in enumerate(found.channels) if not LOW <= std <= HIGH]
    if odd and found.fits:
        log.warning("latent channels outside of %g to %g, by number (standard deviation): %s. A small one is collapsed: it "
                    "says little of a picture, and costs little", LOW, HIGH, ", ".join(odd))


def _origin(spec: LatentSpec, data_hash: str | None) -> str:
    if not spec.count:
        return "The autoencoder's shift and scale were set by hand, not measured"
    if spec.data_hash and data_hash and spec.data_hash != data_hash:
        return (f"The autoencoder's shift and scale were measured over {spec.count:,} images of other data (hash "
                f"{spec.data_hash}, this is {data_hash})")
    return f"The autoencoder's shift and scale were measured over {spec.count:,} images"
