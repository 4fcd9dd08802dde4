"""No condition at all, under the interface of a conditioner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.cond import Cond
from ldm.conditioners.base import Conditioner


class Unconditional(Conditioner):
    """For models of images alone: every condition is empty."""

    encoder_hash = "none"
    wants = ()

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        return Cond()
