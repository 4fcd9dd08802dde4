"""Sizes that a model cannot draw: drawn in the next larger one, and cut out of its middle."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal

import torch
from torch import Tensor

from ldm.bundle import Bundle, check_size

Fit = Literal["error", "pad"]


@dataclass(frozen=True)
class Frame:
    """Height and width that are wanted, those that are drawn, and where in these the former lie."""

    size: tuple[int, int]
    drawn: tuple[int, int]
    corner: tuple[int, int]  # top, left

    def pad(self, x: Tensor, per: int = 1) -> Tensor:
        """x (..., height, width) at the wanted size -> at the drawn one, its edges repeated. per: pixels of a picture for each
        of x, such as the autoencoder's factor."""
        rows, columns = ((torch.arange(drawn // per) - corner // per).clamp(0, size // per - 1)
                         for size, drawn, corner in zip(self.size, self.drawn, self.corner, strict=True))  # fmt: skip
        return x[..., rows, :][..., columns]

    def crop(self, pictures: Tensor) -> Tensor:  # (B,C, *drawn) -> (B,C, *size)
        (top, left), (height, width) = self.corner, self.size
        return pictures[..., top : top + height, left : left + width]


def unit(bundle: Bundle) -> int:
    """Both sides of what a model draws are multiples of this."""
    return bundle.autoencoder.factor * getattr(bundle.denoiser.network, "multiple", 1)


def framed(bundle: Bundle, height: int, width: int, fit: Fit = "error", step: int = 1) -> Frame:
    """The frame in which a model draws height x width.

    Args:
        fit: of sizes that are no multiples of what autoencoder and network divide by: "error", a UserError that names the
            nearest, or "pad", the next larger one.
        step: corner and drawn size are multiples of this too.
    """
    if fit == "error":
        check_size(height, width, bundle.autoencoder.factor, getattr(bundle.denoiser.network, "multiple", 1))
    side = lcm(unit(bundle), step)
    drawn = tuple(max(1, -(-length // side)) * side for length in (height, width))
    corner = tuple((outer - inner) // 2 // step * step for outer, inner in zip(drawn, (height, width), strict=True))
    return Frame((height, width), drawn, corner)
