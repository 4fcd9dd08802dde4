"""What Stability's kinds of models have beside their text: a mask and a masked picture, depth, a small picture, a picture's
embedding."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.common.files import UserError, one_line
from ldm.interop.compvis_schedules import schedule_of
from ldm.interop.conditions import UNET, Around, Part
from ldm.interop.rows import Change, Row, pair
from ldm.interop.said import Said

log = logging.getLogger(__name__)

VISION = {768: "openai/clip-vit-large-patch14", 1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}  # by width of the embedding
EMBEDDERS = ("ClipImageEmbedder", "FrozenOpenCLIPImageEmbedder")
STATISTICS = {"mean": "noise_augmentor.data_mean", "std": "noise_augmentor.data_std"}  # where a file holds them


def masked(around: Around) -> Part:
    """Stable Diffusion's inpainting."""
    _keys(around, ("mask", "masked_image"))
    return Part("ldm.conditioners.spatial.MaskedImage", {})


def depth(around: Around) -> Part:
    _keys(around, ("midas_in",))
    return Part("ldm.conditioners.spatial.Depth", {})


def _keys(around: Around, expected: tuple[str, ...]) -> None:
    found = around.params.get("concat_keys", expected)
    if len(found) != len(expected) or (len(expected) > 1 and list(found) != list(expected)):
        raise around.params.refused("concat_keys", f"{list(expected)}, in this order")


def low_scale(around: Around) -> Part:
    """Stable Diffusion's x4 upscaler: a noisy small picture, and its noise's level as one of the network's classes."""
    model = around.params.block("low_scale_config")
    name, said = model.named
    if name != "ImageConcatWithNoiseAugmentation":
        raise UserError(f"{model.place}.target: {model['target']} is not known here; read is ImageConcatWithNoiseAugmentation")
    noise, levels = schedule_of(said.block("noise_schedule_config")), around.unet.whole("num_classes")
    steps = said.block("noise_schedule_config").whole("timesteps", 1000)
    values = {"channels": around.extra, "noise": noise, "max_noise_level": said.whole("max_noise_level", 1000),
              "level": "class", "level_width": 4 * around.unet.whole("model_channels"),
              **({"levels": levels} if levels != steps else {})}
    return Part("ldm.conditioners.low_resolution.LowResolution", values, pair("embedding", f"{UNET}label_emb", ["weight"]))


def image_embedding(around: Around) -> Part:
    """Stable unCLIP: CLIP's embedding of a picture; where there is noise on it, the noise's level stands behind."""
    augment, width = around.params.block("noise_aug_config"), around.unet.whole("adm_in_channels")
    values: dict[str, Any] = {"dropout": around.params.number("embedding_dropout", 0.5)}
    rows, weights = [], {}
    if augment:
        name, said = augment.named
        if name != "CLIPEmbeddingNoiseAugmentation":
            raise UserError(f"{augment.place}.target: {augment['target']} is not known here; read is "
                            "CLIPEmbeddingNoiseAugmentation")
        schedule, level = said.block("noise_schedule_config"), said.whole("timestep_dim", 256)
        width -= level
        values |= {"noise": schedule_of(schedule), "max_noise_level": said.whole("max_noise_level", 1000),
                   **({"level_width": level} if level != width else {})}  # fmt: skip
        held = {ours: theirs for ours, theirs in STATISTICS.items() if theirs in around.tensors}
        rows = [Row((ours,), (theirs,), UNBATCHED) for ours, theirs in held.items()]
        weights = {name: value for name, value in statistics(said, around, width).items() if name not in held}
    if width < 1:
        raise around.unet.refused("adm_in_channels", "the widths of an embedding and of its noise's level together")
    known = str(around.params.block("embedder_config").get("target")).rsplit(".")[-1] in EMBEDDERS and width in VISION
    values |= {"encoder": VISION[width]} if known else {"embedding_width": width}
    return Part("ldm.conditioners.image.ImageEmbedding", values, rows, weights=weights)


UNBATCHED = Change(lambda row: row.flatten(), lambda row: row[None])


def statistics(said: Said, around: Around, width: int) -> dict[str, Tensor]:
    """Mean and deviation (D,) of the embeddings, which the yaml has in a file of its own; 0 and 1 where it is not at hand."""
    path = said.word("clip_stats_path", None)
    file = next((file for file in (around.folder / str(path), around.folder / Path(str(path)).name) if file.is_file()), None)
    if file is None:
        if path is not None:
            log.warning("%s.clip_stats_path: there is no %s beside the checkpoint; embeddings are taken to have mean 0 and "
                        "deviation 1, so that noise on them is not what the model was trained with", said.place, path)
        return {"mean": torch.zeros(max(width, 0)), "std": torch.ones(max(width, 0))}
    try:
        mean, std = (each.flatten().float() for each in torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: expected mean and deviation of embeddings, two tensors: {one_line(error)}") from error
    if mean.shape != (width,) or std.shape != (width,):
        raise UserError(f"{file}: statistics of {len(mean)} and {len(std)} numbers, the embeddings have {width}")
    return {"mean": mean, "std": std}


def instruction(around: Around) -> Part:
    """InstructPix2Pix (2211.09800): the raw latent of the picture that is to be changed."""
    if around.extra != around.latent:
        raise UserError(f"{around.params.place}.conditioning_key: hybrid, with {around.extra} channels beside x_t; read is a "
                        f"picture's latent, {around.latent}")
    return Part("ldm.conditioners.spatial.Picture", {"key": "image", "latent": "raw", "dropout": 0.05})


BESIDE = {"LatentInpaintDiffusion": masked, "LatentDepth2ImageDiffusion": depth, "LatentUpscaleDiffusion": low_scale,
          "ImageEmbeddingConditionedLatentDiffusion": image_embedding}  # kinds of models  # fmt: skip
