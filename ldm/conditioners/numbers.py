"""Numbers about a picture as a condition: its size before it was cropped, where it was cropped, how it was rated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, check_dropout, entry, shaped
from ldm.conditioners.wants import Want
from ldm.networks.layers import timestep_embedding

SDXL = {"original_size": 2, "crop": 2, "target_size": 2}  # height and width; top and left; height and width
DEFAULTS = {"original_size": "size", "crop": (0, 0), "target_size": "size", "aesthetic": (6,)}  # in sampling


class Numbers(Conditioner):
    """Numbers (B,) or (B,n) of the batch -> sinusoids of each, one after the other, as a vector (SDXL, 2307.01952, 2.2).

    Args:
        keys: of the batch, each with how many numbers it has; None: SDXL's. Its refiner has {original_size: 2, crop: 2,
            aesthetic: 1}.
        width: of the sinusoids of one number.
        dropout: share of samples that training gives zeros, which are then the null too; else the numbers stay in it.
    """

    def __init__(self, keys: dict[str, int] | None = None, width: int = 256, dropout: float = 0.0):
        super().__init__()
        self.keys, self.each, self.dropout = dict(SDXL if keys is None else keys), width, check_dropout(dropout)
        self.vector_width = width * sum(self.keys.values())
        self.wants = tuple(Want(key, "number", f"{count} number{'s' * (count > 1)}", count, default=DEFAULTS.get(key))
                           for key, count in self.keys.items())  # fmt: skip

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        columns = []
        for key, count in self.keys.items():
            value = torch.as_tensor(entry(batch, key, self))
            columns.append(shaped(value[:, None] if value.ndim == 1 else value, key, self, (count,)).float())
        numbers = torch.cat(columns, dim=1)
        return Cond(vector=timestep_embedding(numbers.flatten(), self.each).reshape(len(numbers), -1))

    def null(self, n: int) -> Cond:
        return Cond(vector=torch.zeros(n, self.vector_width)) if self.dropout else Cond()
