"""A whole pipeline folder of diffusers as a model of ours: network, autoencoder, conditions and scheduler, each from its part.

model_index.json names the parts and their classes. Read are pipelines of a UNet: Stable Diffusion 1, 2 and XL with inpainting,
depth, upscaling and unCLIP, LDM with and without text, and UNets on pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop import component, diffusers, diffusers_unet, dit_diffusers, names, schedulers, text_names, unet_names
from ldm.interop.conditions import joined, table, weights
from ldm.interop.diffusers_conditions import STEPS, Folder, conditions_of
from ldm.interop.folding import unfolded
from ldm.interop.foreign import autoencoder_rows, made
from ldm.interop.rows import check, existing, inside, to_us
from ldm.interop.said import Said

INDEX, KEPT = "model_index.json", "ldm.safetensors"  # the second: what our own export changed
SKIPPED = ("safety_checker", "feature_extractor", "image_encoder", "watermark", "requires_safety_checker", "tokenizer",
           "tokenizer_2", "scheduler", "low_res_scheduler", "image_noising_scheduler", "image_normalizer", "unet", "vae",
           "vqvae", "text_encoder", "text_encoder_2", "bert", "depth_estimator")  # fmt: skip
OPTIMIZER = {"target": "torch.optim.AdamW", "params": {"lr": 1e-4}}


def holds(path: Path) -> bool:
    return (path / INDEX).is_file()


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of this model, and its weights by the names of a Bundle."""
    return planned(path)[:2]


def planned(path: Path) -> tuple[dict, dict[str, Tensor], Bundle | None]:
    """-> what a checkpoint of ours would say of this model; its weights by the names of a Bundle; the Bundle without weights,
    if one was made.

    Raises:
        UserError: for parts that are missing, damaged, or have no counterpart here.
    """
    folder = Folder(path, Said(component.read_json(path / INDEX), str(path / INDEX)))
    if folder.kind("transformer") in dit_diffusers.NAMES:
        return *_transformer(folder), None
    if "unet" not in folder.index:
        alone = f"; its autoencoder alone is in {path / 'vae'}" * (path / "vae").is_dir()
        raise UserError(f"{path}: a pipeline folder of diffusers without a unet ({folder.index.get('_class_name')}); read are "
                        f"those with one, and DiT's{alone}")
    unknown = [name for name in folder.index if folder.kind(name) and name not in SKIPPED]
    if unknown:
        raise UserError(f"{path / INDEX}: parts that are not known here: {', '.join(unknown)}{near(unknown[0], SKIPPED)}")
    unet, tensors = component.read(path / "unet")
    network, sizes = diffusers_unet.block_of(unet, str(path / "unet" / component.CONFIG))
    folder = folder._replace(unet=Said(unet, str(path / "unet" / component.CONFIG)), sizes=sizes)
    conditions = conditions_of(folder)
    if sizes.context_dim and not any(part.target in (text_names.CLIP, text_names.BERT) for part in conditions):
        raise UserError(f"{path}: its UNet reads tokens of {sizes.context_dim} numbers, and no part that is read makes them: "
                        "text_encoder, text_encoder_2 or bert")
    autoencoder, vae, latents = _autoencoder(folder)
    schedule = schedulers.read(folder.config("scheduler", "scheduler_config.json"), str(path / "scheduler"), STEPS)
    params = {"network": network, "process": schedule.process, "parameterization": schedule.parameterization,
              "variance": schedule.variance, "optimizer": OPTIMIZER}  # fmt: skip
    if conditions:
        params["conditioner"] = joined(conditions)
    guidance = max([1.0, *(each.guidance for each in conditions)])
    config = {"name": path.name, "autoencoder": autoencoder, "model": {"target": "ldm.lit.DiffusionModule", "params": params},
              "sampling": schedule.sampling | {"guidance": guidance, **_size(folder, autoencoder)}}  # fmt: skip
    bundle, found = made(config, str(path)), weights(conditions)
    expected = bundle.state_dict()
    rows = inside(unet_names.rows(bundle.denoiser.network, "diffusers", vector=sizes.vector), "denoiser.network.")
    encoding = inside(autoencoder_rows(autoencoder, "diffusers"), "autoencoder.")
    for part, of, given in (("unet", [*rows, *table(conditions)], tensors), ("vae", encoding, vae)):
        wanted = {name: value for name, value in expected.items()
                  if name.startswith("autoencoder.") == (part == "vae") and not statistic(name) and name not in found}
        of = existing(of, expected)
        ours = to_us(of, given)
        check(of, given, wanted, ours, str(path / part))
        found |= ours if part == "unet" else {name: value.float() for name, value in ours.items()}
    found |= {f"autoencoder.{name}": value for name, value in names.own(bundle.autoencoder.state_dict()).items()} | latents
    if (path / KEPT).is_file():
        found = unfolded(found, component.tensors_in(path / KEPT))
    return {"kind": "diffusion", "config": config, "sampling": config["sampling"], "layout": "diffusers"}, found, bundle


def _transformer(folder: Folder) -> tuple[dict, dict[str, Tensor]]:
    """DiT's pipeline: a transformer, classes, an autoencoder."""
    place = folder.path / "transformer"
    config, tensors = component.read(place)
    about, found = dit_diffusers.read(tensors, config, str(place))
    if not folder.kind("vae"):
        raise UserError(f"{folder.path}: a DiT without an autoencoder; expected a vae")
    vae, latents = component.read(folder.path / "vae")
    said, encoding = diffusers.read(latents, vae, str(folder.path / "vae"))
    block = said["config"]["model"]["params"]["autoencoder"]
    schedule = schedulers.read(folder.config("scheduler", "scheduler_config.json"), str(folder.path / "scheduler"), STEPS)
    params = about["config"]["model"]["params"] | {"process": schedule.process, "parameterization": schedule.parameterization,
                                                   "optimizer": OPTIMIZER}  # fmt: skip
    sampling = schedule.sampling | {"guidance": 4.0, **_size(folder._replace(unet=Said(config, str(place))), block)}
    ours = {"name": folder.path.name, "autoencoder": block, "model": about["config"]["model"] | {"params": params},
            "sampling": sampling}  # fmt: skip
    found = {name: value for name, value in found.items() if not name.startswith("autoencoder.")} | encoding
    return {**about, "config": ours, "sampling": sampling}, found


def _size(folder: Folder, autoencoder: Mapping) -> dict:
    if "sample_size" not in folder.unet:
        return {}
    factor = 2 ** (len(autoencoder["params"]["mult"]) - 1) if "mult" in autoencoder["params"] else 1
    return {"size": [side * factor for side in folder.unet.each("sample_size", 2)]}


def statistic(name: str) -> bool:
    """Whether only our files have this tensor of an autoencoder."""
    return name.partition(".")[2] in names.OURS_ALONE


def _autoencoder(folder: Folder) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Block, weights by their names, shift and scale by ours; of an identity where there is no such part."""
    part = next((name for name in ("vae", "vqvae") if folder.kind(name)), None)
    if part is None:
        return {"target": "autoencoder.base.Identity", "params": {"image_channels": folder.sizes.in_channels}}, {}, {}
    config, tensors = component.read(folder.path / part)
    block = diffusers.block_of(config, str(folder.path / part))
    shift, scale = diffusers.statistics(config, str(folder.path / part))
    like = torch.ones(block["params"]["bottleneck"]["params"]["channels"])
    return block, diffusers.modern(tensors), {"autoencoder.shift": like * shift, "autoencoder.scale": like * scale}
