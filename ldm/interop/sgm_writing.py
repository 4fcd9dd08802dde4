"""Stable Diffusion XL's layout (Stability's generative-models): several embedders in a list, texts and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.conditioners.clip import ClipText
from ldm.interop import compvis_schedules, compvis_unet, text_names, unet_names
from ldm.interop.compvis_texts import GENUINE, HEADS, TOKENIZERS
from ldm.interop.conditions import UNET
from ldm.interop.names import defaults
from ldm.interop.rows import Row, back, existing, inside
from ldm.interop.sgm_conditions import KEYS

SGM = "sgm.modules."
SCALINGS = {"noise": "EpsScaling", "v": "VScaling"}
UNSAID = ("image_size", "use_spatial_transformer", "legacy")  # what its UNetModel is not told: there is one way alone


def belongs(blocks: list[Mapping]) -> bool:
    """Whether these conditions are such as only that layout has."""
    return any(block["target"].endswith(".Numbers") or (block.get("params") or {}).get("pooled") for block in blocks)


def write(bundle: Bundle, parts: list, autoencoder: tuple[dict[str, Tensor], dict, float]) -> tuple[dict[str, Tensor], dict]:
    """-> state dict, yaml. ``parts``: ((prefix, conditioner), block) of every condition. UserError for what has no place."""
    params, network, process = bundle.config["model"]["params"], bundle.denoiser.network, bundle.denoiser.process
    name = bundle.denoiser.parameterization
    said = compvis_schedules.params_of(process, params.get("process"))
    if name not in SCALINGS or said.get("beta_schedule") != "linear":
        raise UserError("generative-models' discrete denoiser has a scaled_linear schedule and noise or v, not "
                        f"{params.get('process')} and {name!r}")
    weights, first_stage, factor = autoencoder
    embedders, rows = [], inside(unet_names.rows(network, "compvis", UNET), "denoiser.network.")
    for (prefix, conditioner), block in parts:
        if isinstance(conditioner, ClipText):
            embedder, table, tables = _text(conditioner, defaults(block), f"conditioner.embedders.{len(embedders)}.")
            embedders.append(embedder)
            rows += inside(table, prefix)
            weights |= tables
        elif block["target"].endswith(".Numbers"):
            embedders += _numbers(conditioner)
        else:
            raise UserError(f"generative-models has no embedder like {block['target']}; there are texts of CLIP, and numbers")
    settings = compvis_unet.params_of(network, defaults(params["network"], *network.given), network.conv_in.in_channels,
                                      network.conv_out.out_channels, bundle.conditioner.width, bundle.conditioner.vector_width)
    state = bundle.state_dict()
    weights |= back(existing(rows, state), state)
    discrete = {"target": f"{SGM}diffusionmodules.discretizer.LegacyDDPMDiscretization", "params": {
        "linear_start": said["linear_start"], "linear_end": said["linear_end"], "num_timesteps": said["timesteps"]}}
    size = bundle.sampling.get("size")
    model = {"target": "sgm.models.diffusion.DiffusionEngine", "params": {
        "scale_factor": factor,
        "denoiser_config": {"target": f"{SGM}diffusionmodules.denoiser.DiscreteDenoiser", "params": {
            "num_idx": said["timesteps"], "discretization_config": discrete,
            "scaling_config": {"target": f"{SGM}diffusionmodules.denoiser_scaling.{SCALINGS[name]}"}}},
        "network_config": {"target": compvis_unet.TARGETS[1], "params": {
            key: value for key, value in settings.items() if key not in UNSAID}},
        "conditioner_config": {"target": f"{SGM}GeneralConditioner", "params": {"emb_models": embedders}},
        "first_stage_config": first_stage | {"target": first_stage["target"].replace("ldm.", "sgm.", 1)}}}  # fmt: skip
    size = {"image_size": [side // bundle.autoencoder.factor for side in size]} if size else {}  # which nobody there reads
    return {key: value.detach() for key, value in weights.items()}, {"model": model, **size}


def _text(conditioner: ClipText, params: Mapping[str, Any], prefix: str) -> tuple[dict, list[Row], dict[str, Tensor]]:
    """An embedder, rows, and tables among the weights."""
    layers, heads = params["layers"], params["heads"] or max(1, params["width"] // 64)
    if params["activation"] == "quick_gelu" and params["projection"] is None and params["pooled"] != "projected":
        last = conditioner.layer == layers and params["final_norm"]
        values = {"layer": "last"} if last else {"layer": "hidden", "layer_idx": conditioner.layer}
        values |= {"always_return_pooled": True} if params["pooled"] else {}
        values |= {"version": TOKENIZERS[0]} if params["vocab_size"] != GENUINE else {}
        if not last and params["final_norm"]:
            raise UserError(f"FrozenCLIPEmbedder has no layer {conditioner.layer} with the final norm")
        at = f"{prefix}transformer."
        return (_embedder("FrozenCLIPEmbedder", params, values), text_names.hf_clip(layers, at),
                text_names.position_ids(params["max_length"], at))  # fmt: skip
    arch, behind = next((arch for arch, count in HEADS.items() if count == heads), None), layers - conditioner.layer
    if arch is None or behind > 1 or params["final_norm"] or params["pooled"] != "projected":
        raise UserError(f"FrozenOpenCLIPEmbedder2 has no encoder of {heads} heads, read {behind} blocks before its end, with "
                        f"pooled {params['pooled']!r} and final_norm {params['final_norm']}")
    values = {"arch": arch, "freeze": True, "layer": "penultimate" if behind else "last", "always_return_pooled": True,
              "legacy": False}  # fmt: skip
    rows = text_names.open_clip(layers, f"{prefix}model.", True, params["logit_scale"])
    return _embedder("FrozenOpenCLIPEmbedder2", params, values), rows, {}


def _embedder(name: str, params: Mapping, values: dict) -> dict:
    """One of a text. legacy_ucg_value: what stands for no text, where that is not zeros."""
    return {"input_key": "txt", "is_trainable": params["trainable"], "ucg_rate": params["dropout"],
            **({} if params["zero_null"] else {"legacy_ucg_value": ""}), "target": f"{SGM}encoders.modules.{name}",
            "params": values}  # fmt: skip


def _numbers(conditioner: Any) -> list[dict]:
    theirs = {ours: name for name, (ours, _) in KEYS.items()}
    unknown = [key for key in conditioner.keys if key not in theirs]
    if unknown:
        raise UserError(f"generative-models has no numbers called {', '.join(unknown)} here; there are {', '.join(theirs)}")
    target = f"{SGM}encoders.modules.ConcatTimestepEmbedderND"
    return [{"input_key": theirs[key], "target": target, "params": {"outdim": conditioner.each}} for key in conditioner.keys]
