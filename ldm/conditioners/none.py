"""No condition at all, under the interface of a conditioner."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.cond import Cond


class Unconditional(nn.Module):
    """For models of images alone: every condition is empty."""

    width = None
    dropout = 0.0
    encoder_hash = "none"

    def forward(self, batch: dict) -> Cond:
        return Cond()

    def null(self, n: int) -> Cond:
        return Cond()

    def drop(self, cond: Cond, keep: Tensor) -> Cond:  # keep: (B,) bool
        return cond
