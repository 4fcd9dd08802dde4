"""What a network may be conditioned on: one container with four named, optional fields.

Conditioners fill it, networks read it, guidance and caption dropout cut, join and mix it per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cond:
    """Conditions of a batch. A mask of None says that every token is real."""

    tokens: Tensor | None = None  # (B, L, D) a sequence to attend to
    mask: Tensor | None = None  # (B, L) bool, True where the token is real
    vector: Tensor | None = None  # (B, E) one embedding per sample, joins the time embedding
    spatial: Tensor | None = None  # (B, K, h, w) appended to the channels of x_t; sides of 1: the same everywhere

    def __len__(self) -> int:
        """The batch size; 0 when there is no condition at all."""
        return next((len(value) for value in self._values() if value is not None), 0)

    @property
    def device(self) -> torch.device | None:
        return next((value.device for value in self._values() if value is not None), None)

    def __bool__(self) -> bool:
        raise TypeError("a Cond is neither true nor false; ask for one of its fields: cond.tokens is not None")

    def __getitem__(self, index: slice | Tensor) -> Cond:
        """Some samples of the batch: a slice, or a tensor of indices or booleans."""
        if not isinstance(index, (slice, Tensor)):
            raise TypeError(f"Cond is indexed by a slice or a tensor, got {type(index).__name__}; use cond[i : i + 1]")
        return self._map(lambda value: value[index])

    def repeat_interleave(self, n: int) -> Cond:
        """Every sample n times in a row: a, a, b, b ..."""
        return self._map(lambda value: value.repeat_interleave(n, dim=0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """Moved; dtype is for the numbers, the mask stays boolean."""
        return self._map(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    def filled(self, other: Cond) -> Cond:
        """This condition where the other is, with the other's fields where it has none; a mask goes with its tokens. What is
        spatial gets the other's size where it has one pixel (and channel)."""
        ours, spatial = self.to(other.device), other.spatial
        text = other if ours.tokens is None else ours
        if ours.spatial is not None:
            spatial = ours.spatial if spatial is None else ours.spatial.expand(-1, *spatial.shape[1:])
        return Cond(text.tokens, text.mask, other.vector if ours.vector is None else ours.vector, spatial)

    def where(self, keep: Tensor, other: Cond) -> Cond:
        """This condition where keep (B,) is True, the other's elsewhere. `other` has B samples, or one for all; a field that
        it does not have stays."""

        def choose(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(keep.to(ours.device).reshape(-1, *[1] * (ours.dim() - 1)), ours, theirs)

        pairs = zip(*(cond._values() for cond in _aligned([self, other.filled(self)])), strict=True)
        return Cond(*(None if ours is None else choose(ours, theirs) for ours, theirs in pairs))

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Batches one after the other; shorter token sequences are padded with zeros that the mask hides, and spatial
        conditions of one pixel are the same everywhere."""
        columns = zip(*(cond._values() for cond in _aligned(conds)), strict=True)
        return Cond(*(None if column[0] is None else torch.cat(column) for column in columns))

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Cond:
        return Cond(*(None if value is None else change(value) for value in self._values()))


def _aligned(conds: Sequence[Cond]) -> list[Cond]:
    """The same conditions with equal token lengths and sides, and masks where any of them needs one."""
    for name in ("tokens", "vector", "spatial"):
        present = [getattr(cond, name) is not None for cond in conds]
        if any(present) and not all(present):
            raise ValueError(f"conditions cannot be joined: {name} is given in some ({present}) and missing in others")
    if conds and conds[0].spatial is not None:
        size = max(cond.spatial.shape[1:] for cond in conds)
        conds = [replace(cond, spatial=cond.spatial.expand(-1, *size)) for cond in conds]
    if not conds or conds[0].tokens is None:
        return list(conds)
    length = max(cond.tokens.shape[1] for cond in conds)
    if all(cond.mask is None and cond.tokens.shape[1] == length for cond in conds):
        return list(conds)
    return [_padded(cond, length) for cond in conds]


def _padded(cond: Cond, length: int) -> Cond:
    mask = cond.mask
    if mask is None:
        mask = torch.ones(cond.tokens.shape[:2], dtype=torch.bool, device=cond.tokens.device)
    extra = length - cond.tokens.shape[1]
    return Cond(F.pad(cond.tokens, (0, 0, 0, extra)), F.pad(mask, (0, extra)), cond.vector, cond.spatial)
