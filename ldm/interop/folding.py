"""Latent statistics in an autoencoder's own weights, for programs that know one scale alone.

Here a latent is (z - shift) / scale, a number of each for every channel. The 1x1 convolutions around a KL bottleneck can do
that themselves: mean and log-variance leave the first at unit scale, the second takes such latents. What the weights were is
kept beside, so that a model comes back bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.common.files import UserError

KEPT = ("shift", "scale", "statistics_count", "statistics_data", "pre.weight", "pre.bias", "post.weight", "post.bias")
ORIGINAL = "ldm.autoencoder."  # what the names of those begin with in somebody else's layout


def scale_factor(shift: Tensor, scale: Tensor) -> float | None:
    """What latents are multiplied by, if one number says it."""
    return None if bool(shift.any()) or len(scale.unique()) > 1 else 1 / float(scale[0])


def folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a KL autoencoder (by our names) whose raw latents are at unit scale.

    Raises:
        UserError: where it lacks one of the convolutions, or has a codebook, whose nearest entries would be others.
    """
    shift, scale = weights["shift"], weights["scale"]
    if "bottleneck.codebook" in weights or not all(name in weights for name in KEPT):
        raise UserError("this autoencoder's latents have a shift and scale for every channel, which other programs do not "
                        "know, and no pair of 1x1 convolutions that could do it: one scale for all channels would be "
                        "(set_statistics), or a KL autoencoder with pre: true, post: true")
    w, b, c = weights["pre.weight"].double(), weights["pre.bias"].double(), len(shift)
    s, m = scale.double(), shift.double()
    pre = torch.cat([w[:c] / s.view(-1, 1, 1, 1), w[c:]])
    bias = torch.cat([(b[:c] - m) / s, b[c:] - 2 * s.log()])
    w, b = weights["post.weight"].double(), weights["post.bias"].double()
    post, out = w * s.view(1, -1, 1, 1), b + w.flatten(1) @ m
    changed = {"pre.weight": pre, "pre.bias": bias, "post.weight": post, "post.bias": out}
    return {**weights, **{name: value.to(weights[name].dtype) for name, value in changed.items()},
            "shift": torch.zeros_like(shift), "scale": torch.ones_like(scale)}  # fmt: skip


def originals(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``folded`` changes of an autoencoder's weights, by the names that they have in somebody else's layout."""
    return {ORIGINAL + name: weights[name] for name in KEPT if name in weights}


def unfolded(found: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a bundle as they were before folding, where the file tells."""
    kept = {name.removeprefix("ldm."): value for name, value in tensors.items() if name.startswith(ORIGINAL)}
    return {**found, **kept}
