"""Where numbers stop being numbers: which part of a module, and which samples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

NAMED = 5  # samples that a message names


def culprit(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """The first part of ``module`` that gives inf or nan while ``run`` is called (without gradients), and why: because of
    what it was given, of its weights, or of neither. None where all is finite."""
    found: list[str] = []

    def look(name: str, part: nn.Module, given: tuple, out: Any) -> None:
        if found or finite(out):
            return
        bad = [key for key, weight in part.named_parameters(recurse=False) if not finite(weight)]
        why = "was given inf or nan" if not finite(given) else f"has inf or nan in its {', '.join(bad)}" if bad else None
        found.append(f"{name} {why or 'made inf or nan of what was finite'}")

    hooks = [part.register_forward_hook(lambda part, given, out, name=name: look(name, part, given, out))
             for name, part in module.named_modules() if not any(part.children())]  # fmt: skip
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def finite(value: Any) -> bool:
    """Whether all tensors in it are, in lists and dicts too."""
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def bad_rows(*tensors: Tensor) -> Tensor:  # (B,...) each -> (B,) True where one of them has inf or nan
    return torch.stack([~tensor.detach().isfinite().reshape(len(tensor), -1).all(dim=1) for tensor in tensors]).any(dim=0)


def samples_of(batch: Mapping[str, Any], bad: Tensor | None = None) -> list[str]:
    """Names of a batch's samples, of those where ``bad`` (B,) if it is given: their keys, or else their places in the run."""
    names = batch.get("key") or [f"number {place} of the run" for place in batch.get("position", torch.empty(0)).tolist()]
    return [str(name) for i, name in enumerate(names) if bad is None or bad[i]]


def listed(names: list[str]) -> str:
    """`a.png, b.png and 3 more`"""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
