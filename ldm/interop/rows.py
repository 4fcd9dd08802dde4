"""Key tables: which tensors of another program's file make which of ours, and back. Every tensor stands in one row.

Names are all that a table knows of; what a row changes of a tensor is its layout, so that a way there and back is bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.common.files import UserError

NAMED = 3  # names of a kind that a message shows


class Change(NamedTuple):
    """What is done to a tensor on its way to us, and on its way back."""

    to_us: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def _same(value: Tensor) -> Tensor:
    return value


SAME = Change(_same, _same)


def squeezed(dims: int) -> Change:
    """A convolution of size 1 over ``dims`` axes there, a matrix here."""
    return Change(lambda w: w.reshape(w.shape[:2]) if w.ndim == 2 + dims else w,
                  lambda w: w.reshape(*w.shape, *[1] * dims) if w.ndim == 2 else w)


def interleaved(heads: int, dims: int = 1) -> Change:
    """Queries, keys and values in the order [head][q k v][channel] there (ADM's first order), [q k v][head][channel] here;
    and a convolution of size 1 there, if ``dims``."""
    flat = squeezed(dims)

    def swapped(w: Tensor, first: int, second: int) -> Tensor:
        return w.view(first, second, -1, *w.shape[1:]).transpose(0, 1).reshape(w.shape)

    return Change(lambda w: swapped(flat.to_us(w), heads, 3), lambda w: flat.back(swapped(w, 3, heads)))


TRANSPOSED = Change(lambda w: w.mT, lambda w: w.mT.contiguous())


class Row(NamedTuple):
    """Tensors of theirs and what they are here. One name on a side with several on the other: those are stacked along the
    first axis in the one. ``change`` is done to the whole."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    change: Change = SAME


def pair(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], kinds: Iterable[str] = ("weight", "bias"),
         **changes: Change) -> list[Row]:
    """Rows of a layer's tensors, or of several that the other side has as one; ``changes``: of kinds that are not the same
    in both."""
    ours, theirs = ((one,) if isinstance(one, str) else one for one in (ours, theirs))
    return [Row(tuple(f"{name}.{kind}" for name in ours), tuple(f"{name}.{kind}" for name in theirs), changes.get(kind, SAME))
            for kind in kinds]


def existing(rows: Iterable[Row], ours: Iterable[str]) -> list[Row]:
    """The rows of tensors that there are: a table may hold more (a bias that a layer lacks)."""
    ours = set(ours)
    return [row for row in rows if ours.issuperset(row.ours)]


def inside(rows: Iterable[Row], prefix: str) -> list[Row]:
    """The rows of a part of ours whose names begin so."""
    return [Row(tuple(prefix + name for name in row.ours), row.theirs, row.change) for row in rows]


def to_us(rows: Iterable[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> tensors, views of what was given where that will do; rows whose tensors are not all there are left out."""
    found = {}
    for ours, theirs, change in rows:
        if all(name in tensors for name in theirs):
            found |= _divided(change.to_us(_stacked([tensors[name] for name in theirs])), ours)
    return found


def back(rows: Iterable[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names -> tensors."""
    found = {}
    for ours, theirs, change in rows:
        found |= _divided(change.back(_stacked([tensors[name] for name in ours])), theirs)
    return found


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _divided(tensor: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    if len(names) > 1 and len(tensor) % len(names):
        raise UserError(f"{names[0]} and {len(names) - 1} more: a tensor of shape {size(tensor)} does not divide into these")
    return dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True))


def check(rows: Iterable[Row], tensors: Iterable[str], expected: Mapping[str, Tensor], found: Mapping[str, Tensor],
          origin: str, harmless: Callable[[str], bool] = lambda name: False) -> None:
    """UserError, in one line with counts for each group of names, unless every tensor of the file is in one row and every
    tensor of ours was found in the right shape. ``harmless``: names that are known to mean nothing to a model."""
    rows, tensors = list(rows), dict.fromkeys(tensors)
    there = dict.fromkeys(name for row in rows for name in row.theirs)
    ours = dict.fromkeys(name for row in rows for name in row.ours)
    missing = [name for name in there if name not in tensors]
    extra = [name for name in tensors if name not in there and not harmless(name)]
    shapes = [f"{row.theirs[0]} makes {size(found[name])}, not {size(expected[name])}" for row in rows for name in row.ours
              if name in found and name in expected and found[name].shape != expected[name].shape]
    unfilled = [name for name in expected if name not in ours]
    told = [f"missing {grouped(missing, there)}"] * bool(missing) + [f"unknown {grouped(extra, tensors)}"] * bool(extra)
    told += [f"{len(shapes)} of other shapes ({some(shapes)})"] * bool(shapes)
    told += [f"no counterpart of our {grouped(unfilled, expected)}"] * bool(unfilled)
    if told:
        raise UserError(f"{origin}: its tensors are not those of the model that is described: {'; '.join(told)}")


def group(name: str) -> str:
    """What names are counted by: "model.diffusion_model", "first_stage_model" ..."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("model", "conditioner", "denoiser") and len(parts) > 2 else parts[0]


def grouped(names: Iterable[str], of: Iterable[str]) -> str:
    """-> "model.diffusion_model 2 of 686 (a, b), first_stage_model ..."."""
    names, total = list(names), {}
    for name in of:
        total[group(name)] = total.get(group(name), 0) + 1
    return ", ".join(f"{part} {len(inside)} of {total[part]} ({some(inside)})" for part in dict.fromkeys(map(group, names))
                     if (inside := [name for name in names if group(name) == part]))


def some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)


def size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
