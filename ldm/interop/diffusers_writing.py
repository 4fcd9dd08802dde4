"""Models of ours as pipeline folders of diffusers, written whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError, atomic_write
from ldm.conditioners.clip import ClipText
from ldm.interop import diffusers, diffusers_unet, dit_diffusers, scheduler_configs, text_folders, text_names, unet_names
from ldm.interop.compvis_writing import parts
from ldm.interop.diffusers_conditions import class_rows
from ldm.interop.diffusers_pipelines import INDEX, KEPT
from ldm.interop.folding import folded, originals, scale_factor
from ldm.interop.foreign import autoencoder_rows
from ldm.interop.names import defaults
from ldm.interop.rows import Row, back, existing, inside
from ldm.networks.dit import DiT
from ldm.networks.unet import UNet

log = logging.getLogger(__name__)
Piece = tuple[dict, dict[str, Tensor]]  # config.json, weights
VERSION = "0.35.0"  # of diffusers, whose layout this is: its loader asks an inpainting pipeline how old it is


def write(bundle: Bundle, path: Path) -> None:
    """A folder that diffusers loads: a pipeline, or an autoencoder where that is all there is. Latents that are shifted, or
    scaled by channel, are at unit scale there already (see ``folding``); what was changed for that stands in ldm.safetensors,
    so that reading gives back every bit.

    Raises:
        UserError: where diffusers has no such network, process, condition or pipeline, or the folder exists.
    """
    if path.exists():
        raise UserError(f"{path}: is there already; give the name of a new folder")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if bundle.denoiser is None:
            weights, config = diffusers.write(bundle)
            _part(partial, config, weights, "diffusion_pytorch_model")
        else:
            _write(bundle, partial)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(bundle: Bundle, path: Path) -> None:
    config, network = bundle.resolved(), bundle.denoiser.network
    params = config["model"]["params"]
    index: dict[str, Any] = {}
    vae, kept = _autoencoder(bundle)
    if isinstance(network, DiT):
        return _dit(bundle, path, vae, kept)
    if not isinstance(network, UNet):
        raise UserError(f"a pipeline of diffusers is written of a UNet or a DiT, not of {type(network).__name__}")
    conditions = [(prefix, part, block) for (prefix, part), block in parts(bundle.conditioner, params.get("conditioner"))]
    kind = _pipeline([part for _, part, _ in conditions], vae)
    unet = _network(bundle, defaults(params["network"], *network.given), conditions, kind)
    _part(path / "unet", *unet, "diffusion_pytorch_model")
    index["unet"] = ["diffusers", unet[0]["_class_name"]]
    if vae is not None:
        name = "vqvae" if kind.startswith("LDM") else "vae"
        _part(path / name, *vae, "diffusion_pytorch_model")
        index[name] = ["diffusers", vae[0]["_class_name"]]
    for _, part, block in conditions:
        CONDITIONS[type(part).__name__](part, defaults(block), path, index, kind)
    _end(bundle, path, index, kind, kept)


def _dit(bundle: Bundle, path: Path, vae: Piece | None, kept: dict[str, Tensor]) -> None:
    """DiT's pipeline, which works on latents alone."""
    if vae is None:
        raise UserError("diffusers' DiTPipeline is on latents, this model on pixels")
    weights, config = dit_diffusers.write(bundle)
    _part(path / "transformer", config, weights, "diffusion_pytorch_model")
    _part(path / "vae", *vae, "diffusion_pytorch_model")
    index = {"transformer": ["diffusers", config["_class_name"]], "vae": ["diffusers", vae[0]["_class_name"]]}
    _end(bundle, path, index, "DiTPipeline", kept, id2label={str(i): str(i) for i in range(config["num_embeds_ada_norm"])})


def _end(bundle: Bundle, path: Path, index: dict, kind: str, kept: dict[str, Tensor], **more: Any) -> None:
    """The scheduler, the index, and what was changed of the weights."""
    params = bundle.config["model"]["params"]
    schedule = scheduler_configs.write(params.get("process"), params.get("parameterization", "flow"),
                                       params.get("variance", "fixed"), bundle.sampling)
    _json(path / "scheduler" / "scheduler_config.json", schedule)
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    _json(path / INDEX, {"_class_name": kind, "_diffusers_version": VERSION, **EMPTY.get(kind, {}), **index, **more})
    if kept:
        _save(path / KEPT, kept)


def _pipeline(conditions: list, vae: Piece | None) -> str:
    """The class of the pipeline that these conditions belong to. UserError where there is none."""
    names = sorted(type(part).__name__ for part in conditions)
    if not names:
        return "DDPMPipeline" if vae is None else "LDMPipeline"
    if vae is None or any(name not in CONDITIONS for name in names):
        unknown = [name for name in names if name not in CONDITIONS]
        raise UserError(f"diffusers has no pipeline with {', '.join(unknown or ['text on pixels'])}; it has them with "
                        f"{', '.join(CONDITIONS)} on latents")
    if tuple(names) not in PIPELINES:
        raise UserError(f"diffusers has no pipeline with {' and '.join(names)}; there are those with "
                        f"{'; '.join(' and '.join(each) for each in PIPELINES)}")
    return PIPELINES[tuple(names)]


PIPELINES = {
    ("ClipText",): "StableDiffusionPipeline", ("ClipText", "MaskedImage"): "StableDiffusionInpaintPipeline",
    ("ClipText", "ClipText", "Numbers"): "StableDiffusionXLPipeline",
    ("ClipText", "Numbers"): "StableDiffusionXLImg2ImgPipeline",
    ("ClipText", "ClipText", "MaskedImage", "Numbers"): "StableDiffusionXLInpaintPipeline",
    ("ClipText", "Picture"): "StableDiffusionInstructPix2PixPipeline",
    ("ClipText", "LowResolution"): "StableDiffusionUpscalePipeline",
    ("BertText",): "LDMTextToImagePipeline", ("LowResolution",): "LDMSuperResolutionPipeline",
}  # fmt: skip
EMPTY = {  # parts that a pipeline may lack, and says so
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionInstructPix2PixPipeline"), {
        "requires_safety_checker": False, "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None]}),
    "StableDiffusionUpscalePipeline": {"safety_checker": [None, None], "feature_extractor": [None, None],
                                       "watermarker": [None, None]},
    "StableDiffusionXLImg2ImgPipeline": {"text_encoder": [None, None], "tokenizer": [None, None],
                                         "requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
}  # fmt: skip


def _network(bundle: Bundle, params: Mapping, conditions: list, kind: str) -> Piece:
    """The UNet; a table of classes is part of it there."""
    network, conditioner = bundle.denoiser.network, bundle.conditioner
    vector = "add_embedding" if "XL" in kind else "class_embedding"
    sizes = diffusers_unet.Sizes(network.conv_in.in_channels, network.conv_out.out_channels,
                                 getattr(conditioner, "width", None), getattr(conditioner, "vector_width", None),
                                 vector)  # fmt: skip
    size = bundle.sampling.get("size")
    config = diffusers_unet.config_of(network, params, sizes, size[0] // bundle.autoencoder.factor if size else None)
    if vector == "add_embedding":
        config["addition_time_embed_dim"] = next(part.each for _, part, _ in conditions if type(part).__name__ == "Numbers")
    rows: list[Row] = inside(unet_names.rows(network, "diffusers", vector=vector), "denoiser.network.")
    for prefix, part, _ in conditions:
        if getattr(part, "embedding", None) is not None and part.vector_width:
            rows += inside(class_rows(), prefix)
            config |= {"class_embed_type": None, "num_class_embeds": part.embedding.num_embeddings}
    state = bundle.state_dict()
    return config, back(existing(rows, state), state)


def _autoencoder(bundle: Bundle) -> tuple[Piece | None, dict[str, Tensor]]:
    """The autoencoder (None on pixels), and what was changed of its weights."""
    ours = bundle.autoencoder.state_dict()
    if type(bundle.autoencoder).__name__ == "Identity":
        if scale_factor(ours["shift"], ours["scale"]) != 1:
            raise UserError("diffusers has no pipeline on pixels that are shifted or scaled")
        return None, {}
    config, kept = diffusers.config_of(bundle), {}
    if scale_factor(ours["shift"], ours["scale"]) is None:
        kept, ours = originals(ours), folded(ours)
        config = {key: value for key, value in config.items() if key not in ("shift_factor", "latents_mean", "latents_std")}
        config["scaling_factor"] = 1.0
    return (config, back(existing(autoencoder_rows(bundle.config["autoencoder"], "diffusers"), ours), ours)), kept


def _clip(part: ClipText, params: dict, path: Path, index: dict, kind: str) -> None:
    xl = "XL" in kind
    layers, second = params["layers"], xl and params["pooled"] is not None
    if xl and (part.layer != layers - 1 or params["final_norm"]):
        raise UserError("Stable Diffusion XL reads its texts one block before the end, without the final norm; this one reads "
                        f"block {part.layer} of {layers}, final_norm {params['final_norm']}")
    if not xl and not params["final_norm"]:
        raise UserError("Stable Diffusion reads texts after the final norm, this model before it (final_norm: false)")
    if not xl and part.layer < layers:
        log.warning("%s: the text encoder's blocks after the %dth, which the model does not read, are left out", path,
                    part.layer)
        layers = part.layer
    name, words = ("text_encoder_2", "tokenizer_2") if second else ("text_encoder", "tokenizer")
    config = text_folders.config_of(part, params | {"layers": layers})
    state = part.state_dict()
    projected = second and part.projection is not None
    if not projected:
        config |= {"architectures": ["CLIPTextModel"]}
    weights = back(text_names.hf_clip(layers, projection=projected), state)
    _part(path / name, config, weights, "model")
    text_folders.write_tokenizer(part, path / words)
    index[name] = ["transformers", config["architectures"][0]]
    index[words] = ["transformers", "CLIPTokenizer"]


def _bert(part: Any, params: dict, path: Path, index: dict, kind: str) -> None:
    config = {"model_type": "ldmbert", "vocab_size": params["vocab_size"], "max_position_embeddings": params["max_length"],
              "encoder_layers": params["layers"], "encoder_ffn_dim": params["mlp"] or 4 * params["width"],
              "encoder_attention_heads": params["heads"], "head_dim": params["head_dim"], "d_model": params["width"],
              "pad_token_id": part.pad, "architectures": ["LDMBertModel"]}  # fmt: skip
    if params["head_dim"] != 64:
        raise UserError(f"LDMBertModel has heads of 64 channels, not {params['head_dim']}")
    weights = back(text_names.diffusers_bert(params["layers"], logits=params["logits"]), part.state_dict())
    if not params["logits"]:  # it has that layer, and nobody uses it
        shape = params["vocab_size"], params["width"]
        weights |= {"to_logits.weight": torch.zeros(shape), "to_logits.bias": torch.zeros(shape[0])}
    _part(path / "bert", config, weights, "model")
    index["bert"] = ["latent_diffusion", "LDMBertModel"]
    if part.vocabulary.text is not None or part.vocabulary.name is not None:
        words = part.vocabulary.tokenizer.get_vocab()
        (path / "tokenizer").mkdir(parents=True)
        (path / "tokenizer" / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)) + "\n", encoding="utf-8")
        _json(path / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True,
                                                             "model_max_length": params["max_length"]})  # fmt: skip
        index["tokenizer"] = ["transformers", "BertTokenizer"]


def _masked(part: Any, params: dict, path: Path, index: dict, kind: str) -> None:
    if not params["mask_first"] or params["signed_mask"] or params["raw"] or params["fill"] != 0:
        raise UserError("Stable Diffusion's inpainting has the mask first, from 0 to 1, and a scaled latent")


def _low_resolution(part: Any, params: dict, path: Path, index: dict, kind: str) -> None:
    """Stable Diffusion's upscaler tells the network how noisy the small picture is; LDM's has no noise."""
    upscaler = kind == "StableDiffusionUpscalePipeline"
    if params["resize"] != "none" or params["level"] != ("class" if upscaler else "none") or bool(params["noise"]) != upscaler:
        raise UserError(f"diffusers' {kind} has a small picture of the latents' size, "
                        + ("with noise, its level as a class" if upscaler else "without noise"))
    if upscaler:
        schedule = scheduler_configs.write(params["noise"], "noise", "fixed", {"sampler": "ddpm", "times": "linspace"})
        _json(path / "low_res_scheduler" / "scheduler_config.json", schedule)
        index |= {"low_res_scheduler": ["diffusers", schedule["_class_name"]], "max_noise_level": part.noise.stop}


def _picture(part: Any, params: dict, path: Path, index: dict, kind: str) -> None:
    if params["latent"] != "raw" or params["key"] != "image":
        raise UserError("InstructPix2Pix has a picture's raw latent beside x_t: Picture with key: image, latent: raw")


def _nothing(part: Any, params: dict, path: Path, index: dict, kind: str) -> None:
    """A condition that is no part of the folder."""


CONDITIONS = {"ClipText": _clip, "BertText": _bert, "MaskedImage": _masked, "Numbers": _nothing, "Picture": _picture,
              "LowResolution": _low_resolution}


def _part(folder: Path, config: dict, weights: Mapping[str, Tensor], stem: str) -> None:
    _json(folder / "config.json", config)
    _save(folder / f"{stem}.safetensors", weights)


def _json(file: Path, value: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(file: Path, weights: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
