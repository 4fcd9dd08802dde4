"""Super-resolution, by models that have a small picture as their condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.conditioners.low_resolution import LowResolution
from ldm.tasks.picture import Prompts, paired, part_of


def upscale(bundle: Bundle, image: Tensor, prompts: Prompts = None, *, factor: int | None = None,
            noise_level: int | None = None, **options: Any) -> Tensor:
    """Pictures (B,C,h,w) -> (B,C,h factor,w factor).

    Args:
        factor: what ``enlargement`` says, if None.
        noise_level: how noisy the small picture is made, and the network told that it is, where it was trained so
            (2106.15282, section 4.1); None: the conditioner's own.
    """
    part, factor, more = small_picture(bundle), factor_of(bundle, factor), {}
    if noise_level is not None:
        if part.noise is None:
            raise UserError(f"noise_level: {noise_level}; this model was trained on small pictures without noise")
        more["noise_level"] = torch.tensor([noise_level])
    batch = paired(prompts, **{part.key: image}, **more)
    return bundle.generate(batch, size=[side * factor for side in image.shape[2:]], **options)


def small_picture(bundle: Bundle) -> LowResolution:
    """The condition that is enlarged. UserError where there is none."""
    part = part_of(bundle, LowResolution)
    if part is None:
        raise UserError("this model was not trained to enlarge (it has no LowResolution condition); train "
                        "configs/tasks/super_resolution.yaml, or load an upscaler")
    return part


def factor_of(bundle: Bundle, asked: int | None) -> int:
    """By how much is enlarged. UserError where the model cannot do what is asked, or says nothing and nothing is asked."""
    known = enlargement(bundle)
    if (asked or known) is None:
        raise UserError("factor: this model does not say by how much it enlarges; give the factor that it was trained with")
    if asked not in (None, known) and small_picture(bundle).resize == "none":
        raise UserError(f"factor: {asked}; this model enlarges {known} times")
    return asked or known


def enlargement(bundle: Bundle) -> int | None:
    """By how much the model enlarges: a small picture of the latents' size is smaller by the autoencoder's factor; of others
    the data that it was trained on tells; None: nobody does."""
    if small_picture(bundle).resize == "none":
        return bundle.autoencoder.factor
    block = ((bundle.config or {}).get("data") or {}).get("train")
    while isinstance(block, Mapping):
        params = block.get("params") or {}
        if "factor" in params:
            return params["factor"]
        block = params.get("dataset")
    return None
