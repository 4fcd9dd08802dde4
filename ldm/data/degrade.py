"""Small pictures to learn super-resolution with: made of large ones, cleanly, or as cameras and the web make them."""

from __future__ import annotations

import io
import random
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.common.files import UserError
from ldm.data.add import Add


def bicubic(x: Tensor, factor: int) -> Tensor:  # (C,H,W) in [-1,1] -> (C,H/factor,W/factor)
    """With a filter as wide as the factor, so that nothing is skipped."""
    size = [side // factor for side in x.shape[-2:]]
    return F.interpolate(x[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)


def blind(x: Tensor, factor: int, chance: random.Random) -> Tensor:  # (C,H,W) in [-1,1] -> (C,H/factor,W/factor)
    """Blurred, made small in a way drawn at random, with noise, and through JPEG half of the time: a short form of the
    degradations of BSRGAN (2103.14006), in a fixed order."""
    x = blurred(x, chance.uniform(0.1, 0.6 * factor))
    size = [side // factor for side in x.shape[-2:]]
    mode = chance.choice(["area", "bilinear", "bicubic"])
    x = F.interpolate(x[None], size, mode=mode, antialias=mode != "area")[0].clamp(-1, 1)
    source = torch.Generator().manual_seed(chance.getrandbits(32))
    x = (x + chance.uniform(0, 0.1) * torch.randn(x.shape, generator=source)).clamp(-1, 1)
    return jpeg(x, chance.randint(30, 95)) if chance.random() < 0.5 and len(x) in (1, 3) else x


def blurred(x: Tensor, sigma: float) -> Tensor:  # (C,H,W)
    """Under a Gaussian of ``sigma`` pixels, edges repeated."""
    reach = max(1, round(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = weights / weights.sum()
    x = F.pad(x[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[:, 0]


def jpeg(x: Tensor, quality: int) -> Tensor:  # (C,H,W) in [-1,1], C of 1 or 3
    pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if len(x) == 1 else pixels).save(file, "JPEG", quality=quality)
    pixels = np.asarray(Image.open(file), dtype=np.float32)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1) / 127.5 - 1


class AddLowResolution(Add):
    """"low_res" (C,H/factor,W/factor) in [-1,1].

    Args:
        degradation: "bicubic", always the same; or "blind", another at each time that a picture is seen.
    """

    def __init__(self, dataset: Dataset, factor: int = 4, degradation: Literal["bicubic", "blind"] = "bicubic"):
        super().__init__(dataset)
        if factor < 1:
            raise UserError(f"factor: {factor}; it takes a whole number from 1")
        self.factor, self.degradation = factor, degradation
        self.settings = [factor, degradation]

    def more(self, i: int, item: dict) -> dict:
        x = item["image"]
        if any(side % self.factor for side in x.shape[-2:]):
            raise UserError(f"factor: {self.factor} does not divide pictures of {x.shape[-2]} x {x.shape[-1]}")
        if self.degradation == "bicubic":
            return {"low_res": bicubic(x, self.factor)}
        return {"low_res": blind(x, self.factor, random.Random(random.getrandbits(64)))}

    def told(self) -> str:
        return f"low resolution: 1/{self.factor}, {self.degradation}"
