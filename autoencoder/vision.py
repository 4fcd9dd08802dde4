"""Features of a frozen vision model, by the name of its folder or its id on the model hub. What knows transformers here."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.common.files import UserError
from ldm.common.quiet import quiet_transformers


class Vision:
    """A model of transformers that is never trained, saved or averaged: part of no module.

    Its config is read at once, its weights by ``load``.

    Args:
        name: folder or hub id; ViT, DINOv2, CLIP, SigLIP, Swin, ConvNeXt ... (``AutoModel``).
    Raises:
        UserError: where it cannot be read.
    """

    def __init__(self, name: str):
        from transformers import AutoConfig
        from transformers.image_processing_base import ImageProcessingMixin

        self.name, self.model = name, None
        try:
            config = AutoConfig.from_pretrained(name)
            pictures, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except (OSError, ValueError) as error:
            raise UserError(self._problem("config.json and preprocessor_config.json", error)) from error
        config = getattr(config, "vision_config", config)  # CLIP and the like have a part for text as well
        self.width = (getattr(config, "hidden_sizes", None) or [config.hidden_size])[-1]
        self.mean, self.std = (pictures.get(key) or [0.5] * 3 for key in ("image_mean", "image_std"))
        self.side = _side(pictures.get("crop_size")) or _side(pictures.get("size")) or _side(config.image_size)

    def check(self, channels: int) -> None:
        if channels not in (1, 3):
            raise UserError(f"regularisers: vision models see pictures of 1 or 3 channels, the autoencoder's have {channels}; "
                            "train without Alignment")

    def load(self) -> None:
        if self.model is not None:
            return
        from transformers import AutoModel

        try:
            with quiet_transformers(), torch.device("cpu"):
                model = AutoModel.from_pretrained(self.name, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(self._problem("model.safetensors", error)) from error
        self.model = getattr(model, "vision_model", model).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:  # (B,3 or 1,H,W) in [-1,1] -> (B,D,g,g) in fp32
        self.load()
        x = F.interpolate(x.float(), (self.side, self.side), mode="bilinear", antialias=True).clamp(-1, 1)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        x = ((x + 1) / 2 - mean) / std
        states = self.model.to(x.device)(pixel_values=x).last_hidden_state.float()
        if states.ndim == 4:  # convolutional
            return states
        grid = isqrt(states.shape[1])  # special tokens come first, and are fewer than another row and column
        return states[:, -grid * grid :].mT.unflatten(2, (grid, grid))

    def _problem(self, files: str, error: Exception) -> str:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (f"regularisers: vision model {self.name}: cannot read {files} ({reason}); give a folder that holds them, or a "
                f"hub id; without network: `hf download {self.name}` elsewhere, and copy its cache (HF_HOME) here")


def _side(size: dict | list | int | None) -> int | None:
    if isinstance(size, dict):
        return size.get("height") or size.get("shortest_edge")
    return size[0] if isinstance(size, (list, tuple)) else size
