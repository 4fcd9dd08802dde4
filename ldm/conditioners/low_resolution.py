"""A small picture as the condition of a large one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from ldm.common.build import Block
from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.base import Draw, tensor
from ldm.conditioners.noise import Augmentation
from ldm.conditioners.spatial import Resize, Spatial, resized
from ldm.conditioners.wants import Want
from ldm.networks.layers import timestep_embedding
from ldm.process import Process


class LowResolution(Spatial):
    """Super-resolution: "low_res" (B,C,H,W) in [-1,1] beside x_t.

    The default is LDM's (2112.10752, section 4.4): a picture of the latents' size, without noise. ADM (2105.05233): resize
    bilinear, on pixels. Stable Diffusion's x4 upscaler: noise DDPM(scaled_linear, start 1e-4, end 0.02), max_noise_level 350,
    level class.

    Args:
        channels: C.
        resize: to the latents' size, or "none" for pictures that have it.
        noise: process of the noise augmentation (2106.15282), None: none; max_noise_level: training draws levels below it.
        noise_level: where a batch does not say another.
        level: the network is told the level by a vector of ``level_width``: one learned for each level ("class"), or
            sinusoids. levels: how many are learned; None: as many as the process has.
        key: of the batch.
    """

    def __init__(self, channels: int = 3, resize: Resize | Literal["none"] = "none", noise: Process | Block | None = None,
                 max_noise_level: int | None = None, noise_level: int = 0, level: Literal["none", "class", "sinusoid"] = "none",
                 level_width: int | None = None, levels: int | None = None, dropout: float = 0.0, key: str = "low_res"):
        super().__init__(channels, dropout)
        self.channels, self.resize, self.level, self.key = channels, resize, level, key
        self.noise = None if noise is None else Augmentation(noise, max_noise_level, noise_level, levels)
        if (level != "none") != (level_width is not None) or (level != "none" and noise is None):
            raise UserError(f"LowResolution: level {level!r}, level_width {level_width}, noise {noise}: the network is told "
                            "the level of noise by a vector of level_width; give all three, or level: none")
        self.wants = (Want(key, "picture", "the small picture", channels, "latent" if resize == "none" else "any"),
                      *(() if self.noise is None else (self.noise.wants,)))  # fmt: skip
        self.vector_width = level_width
        self.embedding = nn.Embedding(levels or self.noise.levels, level_width) if level == "class" else None

    def with_dropout(self, batch: Mapping[str, Any], draw: Draw) -> Cond:
        return super().with_dropout(batch if self.noise is None else self.noise.drawn(batch, draw), draw)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        x = tensor(batch, self.key, self, (self.channels, None, None)).float()
        if self.noise is None:
            return Cond(spatial=resized(x, batch, self.resize, self))
        x, level = self.noise(x, batch, f"{self.key}/noise")
        vector = {"none": lambda level: None, "class": self.embedding,
                  "sinusoid": lambda level: timestep_embedding(level, self.vector_width)}[self.level](level)  # fmt: skip
        return Cond(vector=vector, spatial=resized(x, batch, self.resize, self))
