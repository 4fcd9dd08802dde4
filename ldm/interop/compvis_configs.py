"""What a yaml of CompVis or Stability says of a diffusion model, as a config of ours: process, network, conditions, sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop import compvis, compvis_unet
from ldm.interop.compvis_conditions import conditions_of
from ldm.interop.compvis_schedules import process_of
from ldm.interop.conditions import NUMBERS, Part, joined
from ldm.interop.said import Said

PARAMETERIZATIONS = {"eps": "noise", "x0": "data", "v": "v"}
SCALINGS = {"EpsScaling": "noise", "VScaling": "v"}
DISTANCES = {"l2": "mse", "l1": "l1"}
ENGINE = "DiffusionEngine"  # of generative-models
DIFFUSION = ("LatentDiffusion", "LatentInpaintDiffusion", "LatentDepth2ImageDiffusion", "LatentUpscaleDiffusion",
             "ImageEmbeddingConditionedLatentDiffusion", "Layout2ImgDiffusion", "DDPM", ENGINE)  # fmt: skip


def config_of(yaml: Mapping, tensors: Mapping[str, Tensor], origin: str, folder: Path) -> tuple[dict, list[Part]]:
    """Our config of the model that a yaml describes, and its conditions. ``tensors``: of the checkpoint, whose shapes tell
    sizes that the yaml leaves to the code; ``folder``: where files that the yaml names are looked for.

    Raises:
        UserError: for what has no counterpart here, naming the key.
    """
    model = Said(Said(yaml, origin).get("model"), f"{origin}: model")
    if "target" not in model:
        raise UserError(f"{origin}: expected a yaml of CompVis or Stability, with model.target and model.params")
    name, params = model.named
    if name not in DIFFUSION:
        raise UserError(f"{origin}: model.target {model['target']} is no diffusion model known here{near(name, DIFFUSION)}")
    network = params.block("network_config" if name == ENGINE else "unet_config")
    if (target := network.word("target", compvis_unet.TARGETS[0])) not in compvis_unet.TARGETS:
        raise UserError(f"{network.place}: the network {target} is not known here; read is {compvis_unet.TARGETS[0]}")
    unet = network.block("params")
    conditions = conditions_of(name, params, unet, tensors, folder)
    channels = params.whole("channels", unet.whole("out_channels", 4))
    autoencoder = ({"target": "autoencoder.base.Identity", "params": {"image_channels": channels}} if name == "DDPM" else
                   compvis.first_stage(params.block("first_stage_config"), channels))
    ours: dict[str, Any] = {
        "network": compvis_unet.block_of(unet, attends=target == compvis_unet.TARGETS[1]),
        "process": process_of(params), "parameterization": parameterization_of(params),
        "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": model.number("base_learning_rate", 1e-4)}},
    }  # fmt: skip
    if conditions:
        ours["conditioner"] = joined(conditions)
    if (distance := params.one("loss_type", DISTANCES, "l2")) != "mse":
        ours["distance"] = distance
    return {"name": Path(origin).stem, "autoencoder": autoencoder,
            "model": {"target": "ldm.lit.DiffusionModule", "params": ours},
            "sampling": sampling_of(name, Said(yaml, origin), params, conditions)}, conditions


def parameterization_of(params: Said) -> str:
    if "denoiser_config" not in params:
        return params.one("parameterization", PARAMETERIZATIONS, "eps")
    scaling = params.block("denoiser_config").block("params").block("scaling_config")
    if scaling.named[0] not in SCALINGS:
        raise UserError(f"{scaling.place}: {scaling['target']} is not known here; there are {', '.join(SCALINGS)}")
    return SCALINGS[scaling.named[0]]


def sampling_of(name: str, yaml: Said, params: Said, conditions: Sequence[Part]) -> dict:
    """How it draws where nothing else is asked for. Pictures have the side of image_size times the autoencoder's factor.
    generative-models does not say it: Stable Diffusion XL's is 128."""
    dd = params.block("first_stage_config").block("params").block("ddconfig")
    factor = 2 ** (len(dd.wholes("ch_mult", [1, 2, 4, 8])) - 1) if dd else 1
    if name == "DDPM":
        ancestral = {"name": "ddpm", "clip_x0": params.flag("clip_denoised", True)}
        found: dict[str, Any] = {"sampler": ancestral, "steps": params.whole("timesteps", 1000), "guidance": 1.0}
    else:
        found = {"sampler": "dpmpp_2m", "steps": 25, "guidance": max([1.0, *(part.guidance for part in conditions)])}
    said = yaml if "image_size" in yaml else params
    if "image_size" not in said and not any(part.target == NUMBERS for part in conditions):
        return found | {"times": "linear"}
    return found | {"times": "linear", "size": [side * factor for side in said.each("image_size", 2, 128)]}
