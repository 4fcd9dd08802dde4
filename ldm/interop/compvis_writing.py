"""Diffusion models of ours in the layout of CompVis and Stability: the state dict of a checkpoint, and the yaml for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.build import plain
from ldm.common.files import UserError, atomic_write
from ldm.conditioners.base import Conditioner
from ldm.conditioners.clip import ClipText
from ldm.interop import compvis, compvis_schedules, compvis_unet, sgm_writing, text_folders, text_names, unet_names
from ldm.interop.compvis_beside import STATISTICS, UNBATCHED
from ldm.interop.compvis_models import FIRST_STAGE
from ldm.interop.compvis_texts import GENUINE, HEADS, TOKENIZERS
from ldm.interop.conditions import COND, UNET
from ldm.interop.folding import folded, originals, scale_factor
from ldm.interop.foreign import autoencoder_rows
from ldm.interop.names import defaults
from ldm.interop.rows import Row, back, existing, inside, pair

ENCODERS, DIFFUSION = "ldm.modules.encoders.modules.", "ldm.models.diffusion.ddpm."
PARAMETERIZATIONS = {"noise": "eps", "data": "x0", "v": "v"}


class Stage(NamedTuple):
    """A condition as CompVis has it: what it adds to the diffusion model's params and to its network's, rows of its weights,
    its kind of model, tables that stand among the weights."""

    params: dict[str, Any]
    rows: list[Row] = []
    kind: str = "LatentDiffusion"
    unet: dict[str, Any] = {}
    tables: dict[str, Tensor] = {}


def write(bundle: Bundle) -> tuple[dict[str, Tensor], dict]:
    """-> state dict, yaml.

    Latents that are shifted, or scaled by channel, are at unit scale there already (see ``folding``), and the weights that were
    changed for that stand beside, so that reading gives back every bit.

    Raises:
        UserError: where CompVis has no such network, process or condition.
    """
    config = bundle.resolved()
    params, network, conditioner = config["model"]["params"], bundle.denoiser.network, bundle.conditioner
    if not params["network"]["target"].endswith(".UNet") or bundle.denoiser.variance != "fixed":
        raise UserError(f"CompVis has no diffusion model with {params['network']['target']} and variance "
                        f"{bundle.denoiser.variance!r}, only UNets without learned variance")
    conditions = parts(conditioner, params.get("conditioner"))
    if sgm_writing.belongs([block for _, block in conditions]):
        return sgm_writing.write(bundle, conditions, _autoencoder(bundle))
    stages = [_stage(part, block) for part, block in conditions]
    kinds = {stage.kind for stage in stages} - {"LatentDiffusion"}
    if len(kinds) > 1:
        raise UserError(f"CompVis has no model that is {' and '.join(sorted(kinds))} at once")
    weights, first_stage, factor = _autoencoder(bundle)
    settings = compvis_unet.params_of(
        network, defaults(params["network"], *network.given), network.conv_in.in_channels, network.conv_out.out_channels,
        getattr(conditioner, "width", None), getattr(conditioner, "vector_width", None))  # fmt: skip
    size = (bundle.sampling or {}).get("size")
    said: dict[str, Any] = {
        **compvis_schedules.params_of(bundle.denoiser.process, params.get("process")), "channels": bundle.autoencoder.channels,
        "parameterization": _parameterization(bundle.denoiser.parameterization), "scale_factor": factor, "use_ema": False,
        "first_stage_config": first_stage, "cond_stage_config": "__is_unconditional__",
        "unet_config": {"target": compvis_unet.TARGETS[0], "params": settings},
        **({"image_size": size[0] // bundle.autoencoder.factor} if size else {}),
        **({"scale_by_std": True} if "scale_factor" in weights else {}),
    }  # fmt: skip
    for stage in stages:
        said |= stage.params
        settings |= stage.unet
        weights |= stage.tables
    state = bundle.state_dict()
    rows = [*inside(unet_names.rows(network, "compvis", UNET), "denoiser.network."), *(row for s in stages for row in s.rows)]
    weights |= back(existing(rows, state), state)
    weights |= compvis_schedules.buffers(bundle.denoiser.process)
    if said["cond_stage_config"] == "__is_first_stage__":
        weights |= {COND + name.removeprefix(FIRST_STAGE): value for name, value in weights.items()
                    if name.startswith(FIRST_STAGE)}  # fmt: skip
    model = {"target": DIFFUSION + (kinds.pop() if kinds else "LatentDiffusion"), "params": plain(said)}
    return {name: value.detach() for name, value in weights.items()}, {"model": model}


def parts(conditioner: Conditioner | None, block: Mapping | None) -> list[tuple[tuple[str, Conditioner], Mapping]]:
    """((prefix of its weights, conditioner), its block) for every part of a condition."""
    if conditioner is None or block is None:
        return []
    if hasattr(conditioner, "parts"):
        return [((f"conditioner.parts.{i}.", part), each) for i, (part, each) in
                enumerate(zip(conditioner.parts, block["params"]["parts"], strict=True))]
    return [(("conditioner.", conditioner), block)]


def _stage(at: tuple[str, Conditioner], block: Mapping) -> Stage:
    (prefix, conditioner), name = at, type(at[1]).__name__
    if name not in STAGES:
        raise UserError(f"CompVis has no condition like {block['target']}; there are counterparts of {', '.join(STAGES)}")
    stage = STAGES[name](conditioner, defaults(block))
    return stage._replace(rows=inside(stage.rows, prefix))


def _clip(conditioner: Any, params: Mapping) -> Stage:
    layers = params["layers"]
    heads = params["heads"] or max(1, params["width"] // 64)
    if conditioner.pad == conditioner.end and params["activation"] == "quick_gelu" and params["projection"] is None:
        table = text_names.hf_clip(layers, f"{COND}transformer.")
        tables = text_names.position_ids(params["max_length"], f"{COND}transformer.")
        last = conditioner.layer == layers and params["final_norm"]
        which = {} if last else {"layer": "hidden", "layer_idx": conditioner.layer}
        if which and params["final_norm"]:
            raise UserError(f"FrozenCLIPEmbedder has no layer {conditioner.layer} with the final norm")
        version = "openai/clip-vit-large-patch14" if params["vocab_size"] == GENUINE else TOKENIZERS[0]
        target, values = "FrozenCLIPEmbedder", {"version": version, "max_length": params["max_length"], **which}
    else:
        arch = next((arch for arch, count in HEADS.items() if count == heads), None)
        behind = layers - conditioner.layer
        if arch is None or behind > 1 or not params["final_norm"] or params["activation"] != "gelu":
            raise UserError(f"FrozenOpenCLIPEmbedder has no encoder of {heads} heads read {behind} blocks before its end with "
                            f"final_norm {params['final_norm']}, {params['activation']}")
        projects, tables = params["projection"] is not None, {}
        table = text_names.open_clip(layers, f"{COND}model.", projects, params["logit_scale"])
        target, values = "FrozenOpenCLIPEmbedder", {"arch": arch, "layer": "penultimate" if behind else "last"}
    return _words(target, values, table)._replace(tables=tables)


def _bert(conditioner: Any, params: Mapping) -> Stage:
    values = {"n_embed": params["width"], "n_layer": params["layers"], "vocab_size": params["vocab_size"],
              "max_seq_len": params["max_length"], "use_tokenizer": params["vocabulary"] is not None}  # fmt: skip
    stage = _words("BERTEmbedder", values, text_names.x_transformer(params["layers"], f"{COND}transformer.", params["logits"]))
    return stage._replace(params=stage.params | {"cond_stage_trainable": params["trainable"]})


def _boxes(conditioner: Any, params: Mapping) -> Stage:
    values = {"n_embed": params["width"], "n_layer": params["layers"], "vocab_size": params["vocabulary"],
              "max_seq_len": conditioner.length, "use_tokenizer": False}  # fmt: skip
    stage = _words("BERTEmbedder", values, text_names.x_transformer(params["layers"], f"{COND}transformer.", params["logits"]))
    return stage._replace(params=stage.params | {"cond_stage_trainable": True, "cond_stage_key": "coordinates_bbox"})


def _words(target: str, values: dict, rows: list) -> Stage:
    stage = {"target": ENCODERS + target, "params": values}
    return Stage({"conditioning_key": "crossattn", "cond_stage_key": "txt", "cond_stage_config": stage}, rows)


def _label(conditioner: Any, params: Mapping) -> Stage:
    rows = conditioner.rows
    if conditioner.to_vector:
        return Stage({}, pair("embedding", f"{UNET}label_emb", ["weight"]), unet={"num_classes": rows})
    values = {"embed_dim": params["width"], "n_classes": rows, "key": "class_label"}
    stage = {"target": f"{ENCODERS}ClassEmbedder", "params": values}
    return Stage({"conditioning_key": "crossattn", "cond_stage_key": "class_label", "cond_stage_trainable": True,
                  "cond_stage_config": stage}, pair("embedding", f"{COND}embedding", ["weight"]))  # fmt: skip


def _semantic(conditioner: Any, params: Mapping) -> Stage:
    if params["width"] is None or params["stages"] is None:
        raise UserError("SpatialRescaler has a number of stages and of channels: SemanticMap with both")
    values = {"n_stages": params["stages"], "in_channels": params["classes"], "out_channels": params["width"],
              "method": params["resize"], "bias": params["bias"]}  # fmt: skip
    stage = {"target": f"{ENCODERS}SpatialRescaler", "params": values}
    return Stage({"concat_mode": True, "cond_stage_key": "segmentation", "cond_stage_trainable": True,
                  "cond_stage_config": stage}, pair("channel_mapper", f"{COND}channel_mapper"))  # fmt: skip


def _low_resolution(conditioner: Any, params: Mapping) -> Stage:
    if params["noise"] is None:
        return Stage({"concat_mode": True, "cond_stage_key": "LR_image", "cond_stage_config": {"target": "torch.nn.Identity"}})
    if params["level"] != "class" or params["resize"] != "none":
        raise UserError("Stable Diffusion's upscaler has pictures of the latents' size, and their noise's level as a class")
    model = {"target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
             "params": {"noise_schedule_config": _schedule(conditioner.noise, params),
                        "max_noise_level": conditioner.noise.stop}}
    return Stage({"low_scale_key": "lr", "low_scale_config": model, "conditioning_key": "hybrid-adm"},
                 pair("embedding", f"{UNET}label_emb", ["weight"]), "LatentUpscaleDiffusion",
                 {"num_classes": conditioner.embedding.num_embeddings},
                 compvis_schedules.buffers(conditioner.noise.process, "low_scale_model."))  # fmt: skip


def _masked(conditioner: Any, params: Mapping) -> Stage:
    ldm, sd = ({"mask_first": False, "signed_mask": True, "raw": True, "fill": -1.0}, defaults({"target": MASKED}))
    if dict(params) == ldm:
        return Stage({"concat_mode": True, "cond_stage_key": "masked_image", "cond_stage_config": "__is_first_stage__"})
    if dict(params) != sd:
        raise UserError(f"CompVis has no inpainting like {dict(params)}; there are {ldm} and {sd}")
    return Stage({"conditioning_key": "hybrid"}, kind="LatentInpaintDiffusion")


def _depth(conditioner: Any, params: Mapping) -> Stage:
    return Stage({"conditioning_key": "hybrid"}, kind="LatentDepth2ImageDiffusion")


def _neighbours(conditioner: Any, params: Mapping) -> Stage:
    if params["width"] is not None:
        raise UserError("CompVis' retrieval has no projection of the neighbours (Neighbours with a width)")
    return Stage({"conditioning_key": "crossattn", "cond_stage_key": "nn_embeddings",
                  "cond_stage_config": {"target": "torch.nn.Identity"}})  # fmt: skip


def _image(conditioner: Any, params: Mapping) -> Stage:
    if params["to"] != "vector":
        raise UserError("Stable unCLIP has a vector of a picture's embedding: ImageEmbedding with to: vector")
    said = {"embedder_config": {"target": f"{ENCODERS}ClipImageEmbedder"}, "embedding_dropout": params["dropout"],
            "conditioning_key": "crossattn-adm"}  # fmt: skip
    kind = "ImageEmbeddingConditionedLatentDiffusion"
    if conditioner.noise is None:
        return Stage(said, kind=kind)
    values = {"timestep_dim": conditioner.level_width, "noise_schedule_config": _schedule(conditioner.noise, params),
              "max_noise_level": conditioner.noise.stop}  # fmt: skip
    said |= {"noise_aug_config": {"target": f"{ENCODERS}CLIPEmbeddingNoiseAugmentation", "params": values}}
    measured = bool(conditioner.mean.any() or (conditioner.std != 1).any())  # else as there, where no statistics are given
    rows = [Row((ours,), (theirs,), UNBATCHED) for ours, theirs in STATISTICS.items()] if measured else []
    return Stage(said, rows, kind, tables=compvis_schedules.buffers(conditioner.noise.process, "noise_augmentor."))


def _schedule(noise: Any, params: Mapping) -> dict:
    """noise_schedule_config of a condition's noise."""
    said = compvis_schedules.params_of(noise.process, params["noise"])
    if "given_betas" in said:
        raise UserError("CompVis has no noise on a condition but of the schedules that it has names for")
    return said


def _picture(conditioner: Any, params: Mapping) -> Stage:
    if params["latent"] != "raw" or params["key"] != "image":
        raise UserError("CompVis has a picture as a condition as InstructPix2Pix has it: Picture with key: image, latent: raw")
    return Stage({"conditioning_key": "hybrid", "cond_stage_key": "edit"})


MASKED = "ldm.conditioners.spatial.MaskedImage"
STAGES = {"ClipText": _clip, "BertText": _bert, "BoxTokens": _boxes, "ClassLabel": _label, "SemanticMap": _semantic,
          "LowResolution": _low_resolution, "MaskedImage": _masked, "Depth": _depth, "Neighbours": _neighbours,
          "ImageEmbedding": _image, "Picture": _picture}  # fmt: skip


def _autoencoder(bundle: Bundle) -> tuple[dict[str, Tensor], dict, float]:
    """Weights by their names, first_stage_config, scale_factor."""
    ours = bundle.autoencoder.state_dict()
    block = bundle.config.get("autoencoder")
    if type(bundle.autoencoder).__name__ == "Identity":
        factor = scale_factor(ours["shift"], ours["scale"])
        if factor is None:
            raise UserError("CompVis' IdentityFirstStage has one scale for all channels of the latent, and no shift")
        return {}, {"target": "ldm.models.autoencoder.IdentityFirstStage"}, factor
    factor = scale_factor(ours["shift"], ours["scale"])
    kept = {} if factor is not None else originals(ours)
    ours = ours if factor is not None else folded(ours)
    yaml = compvis.yaml_of(bundle)
    rows = existing(autoencoder_rows(block, "compvis", FIRST_STAGE), ours)
    stage = yaml["model"]
    if "n_embed" in stage["params"]:
        stage["target"] = "ldm.models.autoencoder.VQModelInterface"
    weights = {**back(rows, ours), **kept}
    if factor is not None and bundle.autoencoder.spec.count:  # measured, not written down by somebody
        weights["scale_factor"] = torch.tensor(factor)
    return weights, stage, 1.0 if factor is None else factor


def _parameterization(name: Any) -> str:
    if name not in PARAMETERIZATIONS:
        raise UserError(f"CompVis has no parameterization {name!r}; it has those called {', '.join(PARAMETERIZATIONS)} here")
    return PARAMETERIZATIONS[name]


def write_tokenizer(bundle: Bundle, folder: Path) -> None:
    """A vocabulary of its own, if a text encoder has one, with what no shape tells of the encoder, as a folder beside the
    checkpoint."""
    own = [(conditioner, defaults(block)) for (_, conditioner), block in
           parts(bundle.conditioner, bundle.config["model"]["params"].get("conditioner")) if isinstance(conditioner, ClipText)]
    for name, (conditioner, params) in zip(TOKENIZERS, own, strict=False):
        if params["vocab_size"] != GENUINE:
            text_folders.write_tokenizer(conditioner, folder / name)
            with atomic_write(folder / name / text_folders.CONFIG) as temporary:
                temporary.write_text(json.dumps(text_folders.config_of(conditioner, params)))
