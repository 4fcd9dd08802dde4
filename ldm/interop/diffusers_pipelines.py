"""A whole pipeline folder of diffusers as a model of ours: network, autoencoder, conditions and scheduler, each from its part.

model_index.json names the parts and their classes. Read are pipelines of a UNet: Stable Diffusion 1, 2 and XL with inpainting,
depth, upscaling and unCLIP, LDM with and without text, and UNets on pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.build import near
from ldm.common.files import UserError
from ldm.conditioners.vocabulary import Vocabulary
from ldm.conditioners.vocabulary import find as find_tokenizer
from ldm.interop import (
    component,
    diffusers,
    diffusers_unet,
    dit_diffusers,
    names,
    schedulers,
    text_folders,
    text_names,
    unet_names,
)
from ldm.interop.compvis_conditions import CLASSES, DROPOUT, GUIDED, Part, joined
from ldm.interop.folding import unfolded
from ldm.interop.foreign import autoencoder_rows
from ldm.interop.rows import Row, check, existing, inside, pair, to_us

INDEX, KEPT = "model_index.json", "ldm.safetensors"  # the second: what our own export changed
SKIPPED = ("safety_checker", "feature_extractor", "image_encoder", "watermark", "requires_safety_checker", "tokenizer",
           "tokenizer_2", "scheduler", "low_res_scheduler", "image_noising_scheduler", "image_normalizer", "unet", "vae",
           "vqvae", "text_encoder", "text_encoder_2", "bert", "depth_estimator")  # fmt: skip
STEPS = 50  # where nothing else is asked for, as the pipelines there


class Loaded(NamedTuple):
    """A conditioner, and its weights by our names, but for those that the network's file holds (``part.rows``)."""

    part: Part
    weights: dict[str, Tensor] = {}


class Folder(NamedTuple):
    """A pipeline folder: its index, the UNet's config and sizes."""

    path: Path
    index: Mapping[str, Any]
    unet: Mapping[str, Any]
    sizes: diffusers_unet.Sizes

    def has(self, part: str) -> bool:
        """Whether the index names it with a class; [null, null] is a part that is left out."""
        said = self.index.get(part)
        return isinstance(said, (list, tuple)) and len(said) == 2 and said[0] is not None

    def config(self, part: str, name: str = component.CONFIG) -> dict:
        return component.read_json(self.path / part / name)


def holds(path: Path) -> bool:
    return (path / INDEX).is_file()


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of this model, and its weights by the names of a Bundle."""
    return planned(path)[:2]


def planned(path: Path) -> tuple[dict, dict[str, Tensor], Bundle | None]:
    """-> what a checkpoint of ours would say of this model; its weights by the names of a Bundle; the Bundle without weights, if
    one was made.

    Raises:
        UserError: for parts that are missing, damaged, or have no counterpart here.
    """
    index = component.read_json(path / INDEX)
    if isinstance(index.get("transformer"), (list, tuple)) and index["transformer"][1] in dit_diffusers.NAMES:
        return *_transformer(Folder(path, index, {}, diffusers_unet.Sizes(0, 0))), None
    if not isinstance(index.get("unet"), (list, tuple)):
        alone = f"; its autoencoder alone is in {path / 'vae'}" * (path / "vae").is_dir()
        raise UserError(f"{path}: a pipeline folder of diffusers without a unet ({index.get('_class_name')}); read are those with "
                        f"one, and DiT's{alone}")
    unknown = [name for name, said in index.items() if isinstance(said, (list, tuple)) and said[0] and name not in SKIPPED]
    if unknown:
        raise UserError(f"{path / INDEX}: parts that are not known here: {', '.join(unknown)}{near(unknown[0], SKIPPED)}")
    unet, tensors = component.read(path / "unet")
    network, sizes = diffusers_unet.block_of(unet, str(path / "unet" / component.CONFIG))
    folder = Folder(path, index, unet, sizes)
    conditions, found = _conditions(folder), {}
    autoencoder, vae, latents = _autoencoder(folder)
    schedule = schedulers.read(folder.config("scheduler", "scheduler_config.json"), str(path / "scheduler"), STEPS)
    params = {"network": network, "process": schedule.process, "parameterization": schedule.parameterization,
              "variance": schedule.variance, "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 1e-4}}}  # fmt: skip
    if conditions:
        params["conditioner"] = joined([each.part for each in conditions])
    guidance = max([1.0, *(each.part.guidance for each in conditions)])
    config = {"name": path.name, "autoencoder": autoencoder, "model": {"target": "ldm.lit.DiffusionModule", "params": params},
              "sampling": schedule.sampling | {"guidance": guidance, **_size(folder, autoencoder)}}  # fmt: skip
    bundle = Bundle.from_config(config)
    expected = bundle.state_dict()
    rows = inside(unet_names.rows(bundle.denoiser.network, "diffusers", vector=sizes.vector), "denoiser.network.")
    for i, each in enumerate(conditions):
        at = "conditioner." if len(conditions) == 1 else f"conditioner.parts.{i}."
        rows += inside(each.part.rows, at)
        found |= {at + name: value for name, value in each.weights.items()}
    encoding = inside(autoencoder_rows(autoencoder, "diffusers"), "autoencoder.")
    for part, table, given in (("denoiser", rows, tensors), ("autoencoder", encoding, vae)):
        wanted = {name: value for name, value in expected.items() if name.startswith(f"{part}.") and not statistic(name)}
        table = existing(table, expected)
        mine = to_us(table, given)
        check(table, given, wanted, mine, f"{path}: {part}")
        found |= mine if part == "denoiser" else {name: value.float() for name, value in mine.items()}
    found |= {f"autoencoder.{name}": value for name, value in names.own(bundle.autoencoder.state_dict()).items()} | latents
    if (path / KEPT).is_file():
        found = unfolded(found, component.tensors_in(path / KEPT))
    return {"kind": "diffusion", "config": config, "sampling": config["sampling"], "layout": "diffusers"}, found, bundle


def _transformer(folder: Folder) -> tuple[dict, dict[str, Tensor]]:
    """DiT's pipeline: a transformer, classes, an autoencoder."""
    config, tensors = component.read(folder.path / "transformer")
    about, found = dit_diffusers.read(tensors, config, str(folder.path / "transformer"))
    if not (folder.has("vae") or folder.has("vqvae")):
        raise UserError(f"{folder.path}: a DiT without an autoencoder; expected a vae")
    vae, latents = component.read(folder.path / "vae")
    said, weights = diffusers.read(latents, vae, str(folder.path / "vae"))
    block = said["config"]["model"]["params"]["autoencoder"]
    schedule = schedulers.read(folder.config("scheduler", "scheduler_config.json"), str(folder.path / "scheduler"), STEPS)
    params = about["config"]["model"]["params"] | {"process": schedule.process, "parameterization": schedule.parameterization,
                                                   "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 1e-4}}}
    sampling = schedule.sampling | {"guidance": 4.0, **_size(folder._replace(unet=config), block)}
    ours = {"name": folder.path.name, "autoencoder": block, "model": about["config"]["model"] | {"params": params},
            "sampling": sampling}  # fmt: skip
    found = {name: value for name, value in found.items() if not name.startswith("autoencoder.")} | weights
    return {**about, "config": ours, "sampling": sampling}, found


def _size(folder: Folder, autoencoder: Mapping) -> dict:
    side = folder.unet.get("sample_size")
    if side is None:
        return {}
    sides = [side, side] if isinstance(side, int) else list(side)
    factor = 2 ** (len(autoencoder["params"]["mult"]) - 1) if "mult" in autoencoder["params"] else 1
    return {"size": [each * factor for each in sides]}


def statistic(name: str) -> bool:
    """Whether only our files have this tensor of an autoencoder."""
    return name.partition(".")[2] in names.OURS_ALONE


def _autoencoder(folder: Folder) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Block, weights by their names, shift and scale by ours; of an identity where there is no such part."""
    part = next((name for name in ("vae", "vqvae") if folder.has(name)), None)
    if part is None:
        channels = folder.sizes.in_channels
        block = {"target": "autoencoder.base.Identity", "params": {"image_channels": channels}}
        return block, {}, {}
    config, tensors = component.read(folder.path / part)
    block = diffusers.block_of(config, str(folder.path / part))
    shift, scale = diffusers.statistics(config, str(folder.path / part))
    like = torch.ones(block["params"]["bottleneck"]["params"]["channels"])
    return block, diffusers.modern(tensors), {"autoencoder.shift": like * shift, "autoencoder.scale": like * scale}


def _conditions(folder: Folder) -> list[Loaded]:
    """In the order in which their numbers and channels stand side by side."""
    found, xl = list(_texts(folder)), "XL" in str(folder.index.get("_class_name"))
    if xl:
        third = {"aesthetic": 1} if folder.index.get("requires_aesthetics_score") else {"target_size": 2}
        keys = {"original_size": 2, "crop": 2, **third}
        width = folder.unet.get("addition_time_embed_dim") or 256
        found.append(Loaded(Part("ldm.conditioners.numbers.Numbers", {"keys": keys, "width": width})))
    if folder.has("image_noising_scheduler"):
        found.append(_image_embedding(folder))
    classes, extra = folder.unet.get("num_class_embeds"), folder.sizes.in_channels - folder.sizes.out_channels
    if folder.unet.get("out_channels") == 2 * folder.sizes.in_channels:
        extra = 0  # a learned variance
    table = class_rows() if classes else []
    if folder.has("low_res_scheduler"):
        noise = schedulers.read(folder.config("low_res_scheduler", "scheduler_config.json"), str(folder.path), STEPS).process
        values = {"channels": extra, "noise": noise, "max_noise_level": folder.index.get("max_noise_level", 350), "level": "class",
                  "level_width": folder.sizes.vector_dim}  # fmt: skip
        found.append(Loaded(Part("ldm.conditioners.low_resolution.LowResolution", values, table)))
    elif extra:
        found.append(Loaded(_beside(folder, extra)))
    if classes and not folder.has("low_res_scheduler"):
        values = {"classes": classes, "width": folder.sizes.vector_dim, "null_row": False}
        found.append(Loaded(Part("ldm.conditioners.label.ClassLabel", values, table, CLASSES)))
    return found


def _beside(folder: Folder, extra: int) -> Part:
    """What a UNet with more channels than x_t was trained with."""
    latent = folder.sizes.out_channels
    if "SuperResolution" in str(folder.index.get("_class_name")):
        return Part("ldm.conditioners.low_resolution.LowResolution", {"channels": extra})
    if extra == latent + 1:
        return Part("ldm.conditioners.spatial.MaskedImage", {})
    if extra == 1:
        return Part("ldm.conditioners.spatial.Depth", {})
    if extra == latent:  # InstructPix2Pix; its latent is the encoder's own
        return Part("ldm.conditioners.spatial.Picture", {"key": "image", "latent": "raw", "dropout": 0.05})
    raise UserError(f"{folder.path}: the UNet takes {extra} channels beside x_t, which belong to no task known here (mask and masked "
                    f"picture {latent + 1}, depth 1, a picture's latent {latent})")


def _texts(folder: Folder) -> list[Loaded]:
    found, xl = [], "XL" in str(folder.index.get("_class_name"))
    for part, words in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if not folder.has(part):
            continue
        if not str(folder.index[part][1]).startswith("CLIPText"):
            raise UserError(f"{folder.path}: {part}: {folder.index[part][1]} is not read; read are CLIPTextModel and "
                            "CLIPTextModelWithProjection")
        options: dict[str, Any] = {"dropout": DROPOUT}
        if xl:
            options |= {"layer": -2, "final_norm": False}
            options |= {"pooled": "projected"} if part == "text_encoder_2" else {}
            options |= {"zero_null": bool(folder.index.get("force_zeros_for_empty_prompt", True))}
        tokenizer = str(folder.path / words) if (folder.path / words).is_dir() else None
        block, weights = text_folders.read(folder.path / part, tokenizer, later=True, **options)
        held = {"vocabulary": None} if "vocabulary.text" in weights else {}
        found.append(Loaded(Part(block["target"], block["params"] | held, [], GUIDED), weights))
    if folder.has("bert"):
        tensors = component.read_weights(folder.path / "bert")
        text = text_names.infer(tensors, "", str(folder.path / "bert"), dropout=DROPOUT)
        params = {key: value for key, value in text.block["params"].items() if value is not None}
        weights = text_names.read(text, tensors, str(folder.path / "bert"))
        if (folder.path / "tokenizer").is_dir():
            weights["vocabulary.text"] = Vocabulary(None).hold(find_tokenizer(str(folder.path / "tokenizer")))
        found.append(Loaded(Part(text.block["target"], params | {"vocabulary": None}, [], GUIDED), weights))
    return found


def _image_embedding(folder: Folder) -> Loaded:
    noise = schedulers.read(folder.config("image_noising_scheduler", "scheduler_config.json"), str(folder.path), STEPS).process
    width = folder.sizes.vector_dim // 2
    source = {"encoder": str(folder.path / "image_encoder")} if folder.has("image_encoder") else {"embedding_width": width}
    normal = component.read_weights(folder.path / "image_normalizer")
    weights = {name: normal[name].flatten() for name in ("mean", "std")}
    return Loaded(Part("ldm.conditioners.image.ImageEmbedding", {**source, "noise": noise, "dropout": DROPOUT}), weights)


def class_rows() -> list[Row]:
    """The row of a table of classes, which diffusers keeps in the network."""
    return pair("embedding", "class_embedding", ["weight"])
