"""Conditioners of ours that stand for what other programs have, with the rows of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.interop import text_names
from ldm.interop.rows import Row, inside
from ldm.interop.said import Said

COND, UNET = "cond_stage_model.", "model.diffusion_model."  # what names begin with in CompVis' and Stability's files
NUMBERS = "ldm.conditioners.numbers.Numbers"
GUIDED, CLASSES = 7.5, 3.0  # scales that texts and classes are drawn with where nothing else is asked for
DROPOUT = 0.1  # share of samples that the published models were trained on without a condition


class Part(NamedTuple):
    """A conditioner of ours; rows of its weights, ours beginning where it does; the scale of guidance that suits it; and
    weights that are not among the tensors of the file."""

    target: str
    params: dict[str, Any]
    rows: list[Row] = []
    guidance: float = 1.0
    weights: dict[str, Tensor] = {}


class Around(NamedTuple):
    """What a condition of CompVis or Stability is found in."""

    params: Said  # of the diffusion model
    unet: Said  # of its network
    tensors: Mapping[str, Tensor]
    folder: Path  # where files that the yaml names are looked for

    @property
    def latent(self) -> int:
        """Channels of x_t."""
        return self.unet.whole("out_channels", self.params.whole("channels", 4))

    @property
    def extra(self) -> int:
        """Channels beside x_t."""
        return self.unet.whole("in_channels") - self.latent


def joined(parts: list[Part]) -> dict:
    """One block of all of them."""
    blocks = [{"target": part.target, "params": part.params} for part in parts]
    if len(blocks) == 1:
        return blocks[0]
    texts = [part for part in parts if part.target == text_names.CLIP]
    return {"target": "ldm.conditioners.join.Join", "params": {"parts": blocks} | ({"tokens": "width"} if texts[1:] else {})}


def placed(parts: list[Part]) -> Iterator[tuple[str, Part]]:
    """Each with what the names of its weights begin with in a Bundle."""
    yield from ((f"conditioner.parts.{i}." if parts[1:] else "conditioner.", part) for i, part in enumerate(parts))


def table(parts: list[Part]) -> list[Row]:
    """The rows of all of them, by the names of a Bundle."""
    return [row for prefix, part in placed(parts) for row in inside(part.rows, prefix)]


def weights(parts: list[Part]) -> dict[str, Tensor]:
    """Those of all of them that are not among the tensors of the file, by the names of a Bundle."""
    return {prefix + name: value for prefix, part in placed(parts) for name, value in part.weights.items()}
