"""From a picture to another: SDEdit (2108.01073)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.bundle import Bundle, as_batch
from ldm.common.files import UserError
from ldm.edit import Sampler, partway

Prompts = str | int | Sequence[str] | Mapping[str, Any] | None
Edit = Callable[[Sampler, Mapping[str, Any]], Sampler]
X0 = "edit/x0"  # of a batch: the latents that sampling begins with


def img2img(bundle: Bundle, image: Tensor, prompts: Prompts = None, *, strength: float = 0.6, tile: int | None = None,
            **options: Any) -> Tensor:
    """The picture noised part of the way, and drawn anew from there.

    Args:
        image: (B,C,H,W) in [-1,1], of the size that is drawn. It is "image" in the batch too, for conditioners that read it.
        strength: share of the steps, from 0 to 1. 0: nothing is drawn, this is what the autoencoder makes of the picture; 1:
            nothing is left of the picture, this is what ``generate`` draws with the same seed; in between see
            ``ldm.edit.partway``.
    """
    share_of(strength, "strength")
    batch, edit = paired(prompts, image=image), from_picture(bundle, strength)
    z = bundle.encode(batch["image"], tile)
    if strength == 0:
        return bundle.decode(z, tile)
    return bundle.generate(batch | {X0: z}, size=image.shape[2:], edit=edit, tile=tile, **options)


def from_picture(bundle: Bundle, strength: float) -> Edit:
    """What has a sampler begin with the noised latents batch[X0], a share of the steps before the data; at 1 with noise."""

    def edit(sampler: Sampler, batch: Mapping[str, Any]) -> Sampler:
        def sample(denoise, x, times, process, **more):
            eps = x / bundle.start_std(times)
            return sampler(denoise, *partway(batch[X0], eps, times, process, strength), process, **more)

        return sampler if strength == 1 else sample

    return edit


def paired(prompts: Prompts, **pictures: Tensor) -> dict[str, Any]:
    """A batch of prompts and of these entries, what is one being that of all. UserError for two different numbers."""
    batch = as_batch(1 if prompts is None else prompts)[0] | pictures
    lengths = {key: len(value) for key, value in batch.items()}
    n = max(lengths.values())
    if set(lengths.values()) - {1, n}:
        told = ", ".join(f"{count} of {key}" for key, count in lengths.items())
        raise UserError(f"conditions: one of each kind, or as many; got {told}")
    return {key: value if len(value) == n else repeated(value, n) for key, value in batch.items()}


def repeated(value: Any, n: int) -> Any:
    """A single entry n times."""
    return value.expand(n, *value.shape[1:]) if isinstance(value, Tensor) else list(value) * n


def share_of(value: float, name: str) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name}: {value}; it lies between 0 and 1")
    return value


def part_of(bundle: Bundle, kind: type) -> torch.nn.Module | None:
    """The first part of the model's conditioner that is of this kind."""
    return next((part for part in bundle.conditioner.modules() if isinstance(part, kind)), None) if bundle.conditioner else None
