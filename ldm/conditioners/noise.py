"""Noise on a condition, whose level the network is told (conditioning augmentation, 2106.15282, section 4.1): what a model
learns from clean pictures or embeddings then holds for those that another model made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.common.build import Block, build, is_block
from ldm.common.files import UserError
from ldm.common.random import normal
from ldm.conditioners.base import Draw
from ldm.conditioners.wants import Want
from ldm.process import Discrete, Process


class Augmentation:
    """c_s = alpha(s) c + sigma(s) eps for levels s, times of a discrete process.

    Args:
        process: or its block.
        stop: training draws levels from 0 to ``stop`` - 1; None: all.
        level: where the batch has no "noise_level", which is (B,) int.
        levels: how many the network knows; None: all of the process.

    The noise of a sample follows from its "position" in the batch (its place, where there is none), so that it is the same
    whatever the batch size.
    """

    def __init__(self, process: Process | Block, stop: int | None = None, level: int = 0, levels: int | None = None):
        if is_block(process):
            with torch.device("cpu"):  # its tables are numbers even where a model is planned without any
                process = build(process)
        if not isinstance(process, Discrete):
            raise UserError(f"noise: expected a discrete process such as ldm.process.DDPM, got {type(process).__name__}")
        steps = len(process.alpha_bar)
        self.process, self.levels = process, min(levels or steps, steps)
        self.stop, self.level = self.levels if stop is None else stop, level
        if not (0 < self.stop <= self.levels and 0 <= level < self.levels):
            raise UserError(f"noise: max_noise_level {self.stop}, noise_level {level}; there are levels 0 to {self.levels - 1}")
        self.wants = Want("noise_level", "class", f"a level of noise, 0 to {self.levels - 1} ({level})", needed=False)

    def drawn(self, batch: Mapping[str, Any], draw: Draw) -> Mapping[str, Any]:
        """The batch with a level for each sample, as training draws them."""
        return {"noise_level": (draw("noise_level") * self.stop).long(), **batch}

    def __call__(self, x: Tensor, batch: Mapping[str, Any], stream: str) -> tuple[Tensor, Tensor]:
        """x (B,...) -> noisy (B,...), level (B,)."""
        level = torch.as_tensor(batch.get("noise_level", self.level), device=x.device).expand(len(x))
        if level.is_floating_point() or ((level < 0) | (level >= self.levels)).any():
            raise UserError(f"'noise_level' holds whole numbers from 0 to {self.levels - 1}, got {level.tolist()}")
        positions = torch.as_tensor(batch.get("position", range(len(x)))).tolist()
        return self.process.add_noise(x, normal(x.shape[1:], 0, stream, positions, x.device), level), level
