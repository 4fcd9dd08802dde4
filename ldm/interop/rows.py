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


class Row(NamedTuple):
    """ours: our name; theirs: theirs, several where theirs are stacked along the first axis in ours."""

    ours: str
    theirs: tuple[str, ...]
    change: Change = SAME


def pair(ours: str, theirs: str | tuple[str, ...], names: Iterable[str] = ("weight", "bias"),
         **changes: Change) -> list[Row]:
    """Rows of a layer's tensors; ``changes``: of those that are not the same in both."""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return [Row(f"{ours}.{name}", tuple(f"{one}.{name}" for one in theirs), changes.get(name, SAME)) for name in names]


def existing(rows: Iterable[Row], ours: Iterable[str]) -> list[Row]:
    """The rows of tensors that there are: a table may hold more (a bias that a layer lacks)."""
    ours = set(ours)
    return [row for row in rows if row.ours in ours]


def to_us(rows: Iterable[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> tensors; rows whose tensors are not all there are left out (see ``check``)."""
    found = {}
    for ours, theirs, change in rows:
        given = [tensors[name] for name in theirs if name in tensors]
        if len(given) == len(theirs):
            changed = [change.to_us(value) for value in given]
            found[ours] = changed[0] if len(changed) == 1 else torch.cat(changed)
    return found


def back(rows: Iterable[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names -> tensors."""
    found = {}
    for ours, theirs, change in rows:
        parts = tensors[ours].chunk(len(theirs)) if len(theirs) > 1 else (tensors[ours],)
        found |= {name: change.back(part) for name, part in zip(theirs, parts, strict=True)}
    return found


def check(rows: Iterable[Row], tensors: Iterable[str], expected: Mapping[str, Tensor], found: Mapping[str, Tensor],
          origin: str, harmless: Callable[[str], bool] = lambda name: False) -> None:
    """UserError, in one line with counts for each group of names, unless every tensor of the file is in one row and every
    tensor of ours was found in the right shape. ``harmless``: names that are known to mean nothing to a model."""
    rows, tensors = list(rows), list(tensors)
    there = {name: row for row in rows for name in row.theirs}
    missing = [name for name in there if name not in set(tensors)]
    extra = [name for name in tensors if name not in there and not harmless(name)]
    shapes = [f"{row.theirs[0]} makes {size(found[row.ours])}, not {size(expected[row.ours])}" for row in rows
              if row.ours in found and row.ours in expected and found[row.ours].shape != expected[row.ours].shape]
    unfilled = [name for name in expected if name not in {row.ours for row in rows}]
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
