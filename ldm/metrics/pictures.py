"""How far a picture is from another: mean squared error, PSNR, SSIM. Pictures (B,C,H,W) are in [-1,1]."""

from __future__ import annotations

import torch
from torch import Tensor

RANGE = 2.0  # of a value
LOUDEST = 100.0  # dB, for pictures that are equal
WINDOW = 11  # pixels, side of SSIM's Gaussian window
STRIP = 2**19  # values that SSIM looks at at a time, at about 250 bytes each


def mse(x: Tensor, y: Tensor) -> Tensor:  # (B,C,H,W) twice -> (B,)
    return (x - y).square().mean(dim=(1, 2, 3))


def psnr(error: Tensor) -> Tensor:
    """Mean squared errors -> decibels, 10 log10(range^2 / mse), at most 100 (of equal pictures it is infinite)."""
    return (10 * torch.log10(RANGE**2 / error)).clamp(max=LOUDEST)


def ssim(x: Tensor, y: Tensor) -> Tensor | None:  # (B,C,H,W) twice -> (B,)
    """Structural similarity (Wang et al., 2004) with a Gaussian window of 11 pixels and sigma 1.5, mean over all places,
    the borders mirrored, as torchmetrics has it. Equal pictures have 1. None where pictures are smaller than the window.
    """
    channels, height, width = x.shape[1:]
    if min(height, width) < WINDOW:
        return None
    pictures = max(1, STRIP // (channels * height * width))
    return torch.cat([_ssim(*pair) for pair in zip(x.split(pictures), y.split(pictures), strict=True)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Strip by strip, each with the rows beside it that its windows see."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    batch, channels, height, width = x.shape
    total, rows, reach = 0, max(1, STRIP // (batch * channels * width)), WINDOW // 2
    for top in range(0, height, rows):
        above, below = max(0, min(top - reach, height - WINDOW)), max(WINDOW, min(top + rows + reach, height))
        strips = ((picture[:, :, above:below] + 1) / 2 for picture in (x, y))
        _, places = structural_similarity_index_measure(*strips, data_range=1.0, reduction="none", return_full_image=True)
        total = total + places[:, :, top - above : top - above + rows].sum(dim=(1, 2, 3))
    return total / (channels * height * width)
