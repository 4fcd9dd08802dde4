"""Overlapping tiles, blended: a function of pictures in bounded memory, whatever it does inside.

An approximation: each tile is normalised, attended and padded for itself. Autoencoders that know how
(``autoencoder.strips``) give the exact result instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25  # of a tile's side; of it the outer quarters count nothing, since padding has spoilt them


def blended(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, inside: int = 1, outside: int = 1) -> Tensor:
    """function(x), (B,C,h*inside,w*inside) -> (B,C',h*outside,w*outside), from overlapping tiles with linear ramps between.

    Args:
        function: keeps that ratio of sides for parts of x, too.
        tile: side of a tile, counted in h and w.
        inside, outside: pixels of x and of the result for each unit of h and w; one of them is 1.
    """
    height, width = x.shape[2] // inside, x.shape[3] // inside
    out = total = None
    for top, end, down in _spans(height, tile, outside):
        for left, right, across in _spans(width, tile, outside):
            part = function(x[:, :, top * inside : end * inside, left * inside : right * inside])
            weight = (down[:, None] * across).to(part)
            if out is None:
                out = part.new_zeros(*part.shape[:2], height * outside, width * outside)
                total = part.new_zeros(out.shape[2:])
            place = (..., slice(top * outside, end * outside), slice(left * outside, right * outside))
            out[place] += weight * part
            total[place] += weight
    return out / total


def _spans(size: int, tile: int, unit: int) -> list[tuple[int, int, Tensor]]:
    """First and end of each tile along a side, and the weight of each of its pixels: 1, but falling over the overlaps."""
    if tile >= size:
        return [(0, size, torch.ones(size * unit))]
    overlap = max(1, round(tile * OVERLAP))
    count = -(-(size - overlap) // max(1, tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]  # evenly, so that none overlaps less
    spans = []
    for i, start in enumerate(starts):
        position = torch.arange(tile * unit) + 0.5
        rise = (position / (overlap * unit) * 2 - 0.5).clamp(0, 1)
        weight = torch.ones(tile * unit)
        if i > 0:
            weight = rise
        if i < count - 1:
            weight = weight * rise.flip(0)
        spans.append((start, start + tile, weight))
    return spans
