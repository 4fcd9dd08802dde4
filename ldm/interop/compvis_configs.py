"""What a yaml of CompVis or Stability says of a diffusion model, as a config of ours: process, network, conditions, sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop import compvis, compvis_unet
from ldm.interop.compvis_conditions import Part, conditions_of, joined

SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "sqrt": "sqrt", "cosine": "cosine"}  # theirs -> ours
PARAMETERIZATIONS = {"eps": "noise", "x0": "data", "v": "v"}
DISTANCES = {"l2": "mse", "l1": "l1"}
DIFFUSION = ("LatentDiffusion", "LatentInpaintDiffusion", "LatentDepth2ImageDiffusion", "LatentUpscaleDiffusion",
             "LatentFinetuneDiffusion", "LatentUpscaleFinetuneDiffusion", "ImageEmbeddingConditionedLatentDiffusion",
             "DDPM", "DiffusionEngine", "MiniImagenBaseDiffusion")  # fmt: skip


def config_of(yaml: Mapping, tensors: Mapping[str, Tensor], origin: str, folder: Path) -> tuple[dict, list[Part]]:
    """Our config of the model that a yaml describes, and its conditions. ``tensors``: of the checkpoint, whose shapes tell
    sizes that the yaml leaves to the code; ``folder``: where files that the yaml names are looked for.

    Raises:
        UserError: for what has no counterpart here, naming the key.
    """
    model = yaml.get("model") or {}
    name, params = str(model.get("target")).rsplit(".")[-1], model.get("params") or {}
    if name not in DIFFUSION:
        raise UserError(f"{origin}: model.target {model.get('target')} is no diffusion model known here{near(name, DIFFUSION)}")
    network = params.get("network_config") or params.get("unet_config") or {}
    if network.get("target", compvis_unet.TARGETS[0]) not in compvis_unet.TARGETS:
        raise UserError(f"{origin}: the network {network['target']} is not known here; read is {compvis_unet.TARGETS[0]}")
    unet = network.get("params") or {}
    if "in_channels" not in unet:
        raise UserError(f"{origin}: model.params.unet_config.params: missing, or without in_channels")
    conditions = conditions_of(name, params, unet, tensors, origin, folder)
    channels = params.get("channels", unet.get("out_channels", 4))
    if name == "DDPM":
        autoencoder = {"target": "autoencoder.base.Identity", "params": {"image_channels": channels}}
    else:
        autoencoder = compvis.first_stage(params.get("first_stage_config") or {}, channels, origin)
    ours: dict[str, Any] = {
        "network": compvis_unet.block_of(unet, origin), "process": process_of(params, origin),
        "parameterization": parameterization_of(params, origin),
        "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": float(model.get("base_learning_rate", 1e-4))}},
    }  # fmt: skip
    if conditions:
        ours["conditioner"] = joined(conditions)
    if params.get("loss_type", "l2") != "l2":
        ours["distance"] = DISTANCES[params["loss_type"]]
    return {"name": Path(origin).stem, "autoencoder": autoencoder,
            "model": {"target": "ldm.lit.DiffusionModule", "params": ours},
            "sampling": sampling_of(name, params, conditions)}, conditions


def process_of(params: Mapping, origin: str) -> dict:
    denoiser = (params.get("denoiser_config") or {}).get("params") or {}
    if denoiser:  # Stability's generative-models: noise levels of the same table
        known = {"DiscreteDenoiser", "LegacyDDPMDiscretization"}
        parts = [params["denoiser_config"], denoiser.get("discretization_config") or {}]
        names = [str(part.get("target")).rsplit(".")[-1] for part in parts]
        if not known.issuperset(names):
            raise UserError(f"{origin}: denoiser_config: {', '.join(names)}; read is a DiscreteDenoiser on a "
                            "LegacyDDPMDiscretization")
        params = (parts[1].get("params") or {}) | {"timesteps": denoiser.get("num_idx", 1000)}
    schedule = params.get("beta_schedule", "linear")
    if schedule not in SCHEDULES:
        raise UserError(f"{origin}: beta_schedule: {schedule!r}{near(str(schedule), SCHEDULES)}; there are {', '.join(SCHEDULES)}")
    if params.get("given_betas") is not None:
        return {"target": "ldm.process.Table", "params": {"betas": list(params["given_betas"])}}
    ends = ({"start": params.get("cosine_s", 8e-3)} if schedule == "cosine" else
            {"start": params.get("linear_start", 1e-4 if not denoiser else 0.00085),
             "end": params.get("linear_end", 2e-2 if not denoiser else 0.012)})  # fmt: skip
    return {"target": "ldm.process.DDPM", "params": {"schedule": SCHEDULES[schedule], "steps": params.get("timesteps", 1000),
                                                     **{key: float(value) for key, value in ends.items()}}}  # fmt: skip


def parameterization_of(params: Mapping, origin: str) -> str:
    denoiser = (params.get("denoiser_config") or {}).get("params") or {}
    if denoiser:
        name = str((denoiser.get("scaling_config") or {}).get("target")).rsplit(".")[-1]
        found = {"EpsScaling": "noise", "VScaling": "v"}.get(name)
        if found is None:
            raise UserError(f"{origin}: denoiser_config.params.scaling_config: {name}; read are EpsScaling and VScaling")
        return found
    name = params.get("parameterization", "eps")
    if name not in PARAMETERIZATIONS:
        raise UserError(f"{origin}: parameterization: {name!r}{near(str(name), PARAMETERIZATIONS)}; there are "
                        f"{', '.join(PARAMETERIZATIONS)}")
    return PARAMETERIZATIONS[name]


def sampling_of(name: str, params: Mapping, conditions: Sequence[Part]) -> dict:
    """How it draws where nothing else is asked for. Pictures have the side of image_size times the autoencoder's factor."""
    dd = ((params.get("first_stage_config") or {}).get("params") or {}).get("ddconfig")
    factor = 1 if dd is None else 2 ** (len(dd.get("ch_mult", (1, 2, 4, 8))) - 1)
    side = params.get("image_size") if isinstance(params.get("image_size"), int) else None
    if name == "DDPM":
        steps = params.get("timesteps", 1000)
        found = {"sampler": {"name": "ddpm", "clip_x0": bool(params.get("clip_denoised", True))}, "steps": steps, "guidance": 1.0}
    else:
        found = {"sampler": "dpmpp_2m", "steps": 25, "guidance": max([1.0, *(part.guidance for part in conditions)])}
    return found | {"times": "linear"} | ({"size": [side * factor, side * factor]} if side else {})


