"""Conditions that stand beside x_t, as further channels of the network's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, check_dropout, entry, like, shaped, tensor
from ldm.conditioners.wants import Want

Resize = Literal["nearest", "bilinear", "bicubic", "area"]


def resized(x: Tensor, batch: Mapping[str, Any], mode: Resize | Literal["none"], owner: nn.Module) -> Tensor:
    """x (B,C,H,W) at the size of the latents, which the batch knows as "latent_size"; "none": as it is."""
    if mode == "none" or tuple(x.shape[2:]) == tuple(entry(batch, "latent_size", owner)):
        return x
    return F.interpolate(x, batch["latent_size"], mode=mode)


class Spatial(Conditioner):
    """Base: dropped samples, and the null of models that were trained with ``dropout``, are 0; else it stays in the null."""

    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__()
        self.spatial_channels, self.dropout = channels, check_dropout(dropout)

    def null(self, n: int) -> Cond:
        return Cond(spatial=torch.zeros(n, 1, 1, 1)) if self.dropout else Cond()


class Picture(Spatial):
    """Any picture of the batch, (B,C,H,W) in [-1,1].

    Args:
        key: of the batch.
        channels: C.
        resize: to the latents' size, or "none" for pictures that have it.
        latent: the picture as a latent of the autoencoder, at unit scale or raw (InstructPix2Pix, 2211.09800), in place of
            its pixels; then it has the size of the pictures that are made.
    """

    def __init__(self, key: str, channels: int = 3, resize: Resize | Literal["none"] = "bilinear",
                 latent: Literal["no", "unit", "raw"] = "no", dropout: float = 0.0):
        super().__init__(channels if latent == "no" else 0, dropout)
        self.key, self.channels, self.resize = key, channels, resize
        beside = "latent" if latent == "no" and resize == "none" else "picture"
        self.wants = (Want(key, "picture", f"a picture of {channels} channels", channels, beside),)
        if latent != "no":
            self.encodes = {key: latent == "raw"}

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        if self.encodes:
            return Cond(spatial=entry(batch, f"{self.key}_latent", self))
        x = tensor(batch, self.key, self, (self.channels, None, None)).float()
        return Cond(spatial=resized(x, batch, self.resize, self))


class MaskedImage(Conditioner):
    """Inpainting: "mask" (B,1,H,W), 1 where the model is to paint, and the picture without what is under it, as a latent.

    The batch has "masked_image" (B,3,H,W) in [-1,1], or "image", whose part under the mask becomes ``fill``. Both stay in
    the null. The defaults are Stable Diffusion's; LDM's inpainting model has mask_first: false, signed_mask: true,
    raw: true, fill: -1.

    Args:
        mask_first: the mask's channel comes before the latent's.
        signed_mask: the mask is -1 and 1 instead of 0 and 1.
        raw: the latent is taken before shift and scale.
        fill: what is under the mask: 0 grey, -1 black.
    """

    spatial_channels = 1
    wants = (Want("image", "picture", "the picture to paint in", 3, "picture", instead="masked_image"),
             Want("mask", "mask", "white where to paint", 1, "picture"),
             Want("masked_image", "picture", "the picture, nothing under the mask", 3, "picture", needed=False))  # fmt: skip

    def __init__(self, mask_first: bool = True, signed_mask: bool = False, raw: bool = False, fill: float = 0.0):
        super().__init__()
        self.mask_first, self.signed_mask, self.fill = mask_first, signed_mask, fill
        self.encodes = {"masked_image": raw}

    def picture(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        if key in batch:
            return batch[key]
        image, mask = entry(batch, "image", self), tensor(batch, "mask", self, (1, None, None))
        return torch.where(mask.to(image.device) >= 0.5, self.fill, image)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        latent, mask = entry(batch, "masked_image_latent", self), tensor(batch, "mask", self, (1, None, None)).float()
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError(f"MaskedImage: 'mask' is 1 where the model is to paint and 0 elsewhere, got values from "
                            f"{mask.min():g} to {mask.max():g}")
        mask = F.interpolate(mask.to(latent), latent.shape[2:], mode="nearest")
        mask = 2 * mask - 1 if self.signed_mask else mask
        return Cond(spatial=torch.cat([mask, latent] if self.mask_first else [latent, mask], dim=1))


class Depth(Spatial):
    """"depth" (B,1,H,W) or (B,H,W), in any unit -> (B,1,h,w) from -1 to 1 in each picture (Stable Diffusion 2). A map that
    is flat is -1."""

    wants = (Want("depth", "depth", "a depth map", 1, "picture"),)

    def __init__(self, resize: Resize = "bicubic", dropout: float = 0.0):
        super().__init__(1, dropout)
        self.resize = resize

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        depth = torch.as_tensor(entry(batch, "depth", self)).float()
        depth = shaped(depth[:, None] if depth.ndim == 3 else depth, "depth", self, (1, None, None))
        depth = resized(depth, batch, self.resize, self)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        return Cond(spatial=2 * (depth - low) / (high - low).clamp(min=1e-6) - 1)


class SemanticMap(Spatial):
    """"segmentation" (B,H,W) int, -1 where there is no class -> one channel a class, made smaller, mixed to ``width``
    channels by a 1x1 convolution (LDM's rescaler, 2112.10752, section 4.3.2).

    Args:
        classes: how many there are, from 0.
        width: channels that stand beside x_t; None: one a class, no convolution.
        stages: so many times halved; None: brought to the latents' size at once.
        resize: how.
        bias: of the convolution.
    """

    def __init__(self, classes: int, width: int | None = None, stages: int | None = None, resize: Resize = "bilinear",
                 bias: bool = False, dropout: float = 0.0):
        super().__init__(width or classes, dropout)
        self.classes, self.stages, self.resize = classes, stages, resize
        self.wants = (Want("segmentation", "map", f"a map of classes 0 to {classes - 1}", 1, "picture"),)
        self.channel_mapper = nn.Identity() if width is None else nn.Conv2d(classes, width, 1, bias=bias)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        classes = tensor(batch, "segmentation", self, (None, None)).long()
        wrong = (classes < -1) | (classes >= self.classes)
        if wrong.any():
            raise UserError(f"SemanticMap: 'segmentation' holds classes from 0 to {self.classes - 1}, or -1, got "
                            f"{', '.join(map(str, classes[wrong].unique()[:5].tolist()))}")
        x = torch.zeros(len(classes), self.classes + 1, *classes.shape[1:], device=classes.device)
        x = x.scatter_(1, classes[:, None] % (self.classes + 1), 1.0)[:, : self.classes]  # -1 is the last one, cut off
        for _ in range(self.stages or 0):
            x = F.interpolate(x, scale_factor=0.5, mode=self.resize)
        x = resized(x, batch, self.resize, self) if self.stages is None else x
        return Cond(spatial=self.channel_mapper(like(x, self.channel_mapper)))
