"""How far two checkpoints are the same: leaf by leaf through plain data and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """-> (dotted path, leaf) of dicts and lists in one another; what is empty is a leaf."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    if not inner or not len(value):
        yield path, value
    else:
        for key, item in inner:
            yield from leaves(item, f"{path}.{key}" if path else str(key))


def differences(one: Any, other: Any) -> dict[str, str]:
    """-> path -> how the leaf there differs; nothing where both are the same, tensors to the bit."""
    first, second = dict(leaves(one)), dict(leaves(other))
    found = {}
    for path in {**first, **second}:
        if path not in first or path not in second:
            found[path] = f"only in the {'first' if path in first else 'second'}"
        elif said := difference(first[path], second[path]):
            found[path] = said
    return found


def difference(a: Any, b: Any) -> str | None:
    """How two leaves differ, in words; None where they do not."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None if type(a) is type(b) and (a == b or (a != a and b != b)) else f"{_short(a)} and {_short(b)}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{_short(a)} and {_short(b)}"
    if torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)):
        return None
    gap = (a.double() - b.double()).abs().nan_to_num(nan=torch.inf)
    differ = int((gap > 0).sum())
    return f"{differ} of {gap.numel()} values differ, by {gap.max():.3g} at most" if differ else "equal in value, not in bits"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
