"""What a conditioner reads of a batch, told so that a program can ask a person for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["text", "class", "number", "picture", "mask", "map", "depth", "boxes", "array"]
Sides = Literal["picture", "latent", "any"] | int  # those of what is drawn, of its latent, its own; n: 1/n of what is drawn


@dataclass(frozen=True)
class Want:
    """An entry of the batch.

    kind: text; class, a whole number; number, ``size`` of them; picture of ``size`` channels, mask, map of classes, depth;
        boxes, which come with "box_classes"; array, numbers (..., size).
    about: what it is, in words.
    sides: of pictures, masks and maps.
    instead: another key that does as well; it has a Want of its own, which is not needed.
    classes: how many there are, of a class and of boxes.
    default: of a number that is not given, a row of ``size``, or "size", height and width of what is drawn.
    """

    key: str
    kind: Kind
    about: str
    size: int = 1
    classes: int | None = None
    sides: Sides = "any"
    needed: bool = True
    instead: str | None = None
    default: Sequence[float] | Literal["size"] | None = None


def wants_of(conditioner: nn.Module | None) -> tuple[Want, ...] | None:
    """Everything that is read, each key once; None where a conditioner does not say."""
    return () if conditioner is None else getattr(conditioner, "wants", None)


def united(wants: Sequence[tuple[Want, ...] | None]) -> tuple[Want, ...] | None:
    """Of several conditioners; what one of them needs is needed."""
    if any(each is None for each in wants):
        return None
    found: dict[str, Want] = {}
    for want in (want for each in wants for want in each):
        if want.key not in found or (want.needed and not found[want.key].needed):
            found[want.key] = want
    return tuple(found.values())


def missing(wants: Sequence[Want], batch: Mapping[str, Any]) -> list[Want]:
    """What the batch lacks."""
    return [want for want in wants if want.needed and want.default is None and not {want.key, want.instead} & batch.keys()]


def completed(conditioner: nn.Module | None, batch: Mapping[str, Any], size: Sequence[int], n: int) -> dict[str, Any]:
    """The batch of n pictures of that height and width, with the defaults of numbers that are not in it."""
    batch = dict(batch)
    for want in wants_of(conditioner) or ():
        if want.default is not None and want.key not in batch:
            row = size if want.default == "size" else want.default
            batch[want.key] = torch.tensor(row, dtype=torch.float32).expand(n, -1)
    return batch
