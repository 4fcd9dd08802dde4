"""The condition stages of CompVis' and Stability's yaml files as conditioners of ours, with the rows of their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop import text_names
from ldm.interop.rows import Row, inside, pair

COND, UNET = "cond_stage_model.", "model.diffusion_model."  # what their names begin with
VOCABULARIES = {"openai/clip-vit-large-patch14": "clip", "bert-base-uncased": "bert"}  # what a yaml calls them -> we
HEADS = {"ViT-L-14": 12, "ViT-H-14": 16, "ViT-bigG-14": 20, "tiny": 4}  # of OpenCLIP's text towers, which no shape tells
VISION = {768: "openai/clip-vit-large-patch14", 1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}  # by width of the embedding
TEXT_SIZES = {"n_embed": "width", "n_layer": "layers", "vocab_size": "vocab_size", "max_seq_len": "max_length",
              "max_length": "max_length"}  # fmt: skip
GUIDED, CLASSES = 7.5, 3.0  # scales that texts and classes are drawn with where nothing else is asked for
DROPOUT = 0.1  # share of samples that the published models were trained on without a condition


class Part(NamedTuple):
    """A conditioner of ours; rows of its weights, ours beginning where it does; and the scale of guidance that suits it."""

    target: str
    params: dict[str, Any]
    rows: list[Row] = []
    guidance: float = 1.0


class Around(NamedTuple):
    """What a condition stage is found in."""

    params: Mapping  # of the diffusion model
    unet: Mapping  # of its network
    tensors: Mapping[str, Tensor]
    origin: str
    folder: Path  # where files that the yaml names are looked for

    @property
    def extra(self) -> int:
        """Channels beside x_t."""
        return self.unet["in_channels"] - self.unet.get("out_channels", self.params.get("channels", 4))


def joined(parts: list[Part]) -> dict:
    """One block of all of them."""
    blocks = [{"target": part.target, "params": part.params} for part in parts]
    if len(blocks) == 1:
        return blocks[0]
    texts = [part for part in parts if part.target == text_names.CLIP]
    return {"target": "ldm.conditioners.join.Join", "params": {"parts": blocks} | ({"tokens": "width"} if texts[1:] else {})}


def table(parts: list[Part]) -> list[Row]:
    """The rows of all of them, by the names of a Bundle."""
    if len(parts) == 1:
        return inside(parts[0].rows, "conditioner.")
    return [row for i, part in enumerate(parts) for row in inside(part.rows, f"conditioner.parts.{i}.")]


def conditions_of(kind: str, params: Mapping, unet: Mapping, tensors: Mapping[str, Tensor], origin: str,
                  folder: Path) -> list[Part]:
    """The conditioners, in the order in which their channels and numbers stand side by side. ``kind``: of the model, as the
    yaml names it.

    Raises:
        UserError: for what has no counterpart here.
    """
    around = Around(params, unet, tensors, origin, folder)
    if "conditioner_config" in params:
        return list(_embedders(around))
    stage, found = params.get("cond_stage_config", "__is_unconditional__"), []
    if stage == "__is_first_stage__":
        found.append(_first_stage(around))
    elif stage not in ("__is_unconditional__", None):
        found.append(_stage(stage, around))
    if kind in BESIDE:
        found.append(BESIDE[kind](around))
    classes = unet.get("num_classes")
    if isinstance(classes, int) and kind not in BESIDE:
        width = 4 * unet["model_channels"]
        found.append(Part("ldm.conditioners.label.ClassLabel", {"classes": classes, "width": width, "null_row": False},
                          pair("embedding", f"{UNET}label_emb", ["weight"]), CLASSES))  # fmt: skip
    return found


def _stage(stage: Mapping, around: Around) -> Part:
    """cond_stage_config -> a conditioner."""
    name, params = str(stage.get("target")).rsplit(".")[-1], stage.get("params") or {}
    known = {"FrozenCLIPEmbedder": _clip, "FrozenOpenCLIPEmbedder": _open_clip, "BERTEmbedder": _bert, "Identity": _as_it_is,
             "ClassEmbedder": _class, "SpatialRescaler": _rescaler}  # fmt: skip
    if name not in known:
        raise UserError(f"{around.origin}: cond_stage_config.target: {stage.get('target')} is not known here{near(name, known)}; "
                        f"there are {', '.join(known)}")
    return known[name](params, around)


def _text(around: Around, layout: str, prefix: str, said: Mapping, **given: Any) -> Part:
    """The text encoder under this prefix, of this layout. ``said``: what the yaml says of it, which its shapes have to agree
    with."""
    found = text_names.infer(around.tensors, prefix, around.origin, **given)
    if found.layout != layout:
        raise UserError(f"{around.origin}: the yaml is of a model with a text encoder of {layout}, the weights have one of "
                        f"{found.layout}: it belongs to another checkpoint")
    params = {key: value for key, value in found.block["params"].items() if value is not None}
    for theirs, ours in TEXT_SIZES.items():
        if theirs in said and said[theirs] != params.get(ours, said[theirs]):
            raise UserError(f"{around.origin}: the yaml says {theirs} {said[theirs]} of the text encoder, the weights are of "
                            f"{params[ours]}: it belongs to another checkpoint")
    return Part(found.block["target"], params | {"dropout": DROPOUT}, found.rows, GUIDED)


def _clip(params: Mapping, around: Around, prefix: str = f"{COND}transformer.") -> Part:
    layer, which = params.get("layer", "last"), {}
    if layer == "hidden":
        which = {"layer": params["layer_idx"], "final_norm": False}
    elif layer != "last":
        raise UserError(f"{around.origin}: FrozenCLIPEmbedder's layer: {layer!r}; read are 'last' and 'hidden'")
    version = params.get("version", "openai/clip-vit-large-patch14")
    beside = around.folder / version / "config.json"
    if beside.is_file():  # what no shape tells
        sizes = json.loads(beside.read_text())
        which |= {"heads": sizes["num_attention_heads"], "activation": sizes["hidden_act"]}
    return _text(around, "hf_clip", prefix, params, vocabulary=vocabulary(version, around.folder), **which)


def _open_clip(params: Mapping, around: Around, prefix: str = f"{COND}model.", **others: Any) -> Part:
    layer, arch = params.get("layer", "last"), params.get("arch", "ViT-H-14")
    if layer not in ("last", "penultimate"):
        raise UserError(f"{around.origin}: FrozenOpenCLIPEmbedder's layer: {layer!r}; read are 'last' and 'penultimate'")
    if arch not in HEADS:
        raise UserError(f"{around.origin}: OpenCLIP's {arch} is not known here{near(arch, HEADS)}; there are {', '.join(HEADS)}")
    return _text(around, "open_clip", prefix, params, heads=HEADS[arch], layer=-1 if layer == "last" else -2, vocabulary="clip", **others)


def _bert(params: Mapping, around: Around) -> Part:
    part = _text(around, "x_transformer", f"{COND}transformer.", params)
    if around.params.get("cond_stage_key") in ("coordinates_bbox", "objects_bbox"):
        sizes = part.params
        boxes = {"classes": sizes["vocab_size"] - 1, "objects": (sizes["max_length"] - 2) // 3, "vocabulary": sizes["vocab_size"],
                 **{key: sizes[key] for key in ("width", "layers", "heads", "logits")}}  # fmt: skip
        return part._replace(target="ldm.conditioners.layout.BoxTokens", params=boxes, guidance=1.0)
    words = "bert" if params.get("use_tokenizer", True) else None
    return part._replace(params=part.params | {"vocabulary": words})


def _class(params: Mapping, around: Around) -> Part:
    classes = params.get("n_classes", 1000)
    guided = classes != 1000  # all of ImageNet's classes, and none for "no class"
    values = {"classes": classes, "width": params["embed_dim"], "to": "tokens", "null_row": False, "dropout": DROPOUT * guided}
    return Part("ldm.conditioners.label.ClassLabel", values, pair("embedding", f"{COND}embedding", ["weight"]),
                CLASSES if guided else 1.0)  # fmt: skip


def _rescaler(params: Mapping, around: Around) -> Part:
    if params.get("multiplier", 0.5) != 0.5:
        raise UserError(f"{around.origin}: SpatialRescaler's multiplier: {params['multiplier']}; read is 0.5")
    values = {"classes": params.get("in_channels", 3), "width": params.get("out_channels"), "stages": params.get("n_stages", 1),
              "resize": params.get("method", "bilinear"), "bias": params.get("bias", False)}  # fmt: skip
    kinds = ["weight", "bias"] if values["bias"] else ["weight"]
    rows = pair("channel_mapper", f"{COND}channel_mapper", kinds) if values["width"] else []
    return Part("ldm.conditioners.spatial.SemanticMap", values, rows)


def _as_it_is(params: Mapping, around: Around) -> Part:
    if around.extra:
        return Part("ldm.conditioners.low_resolution.LowResolution", {"channels": around.extra})
    width = around.unet.get("context_dim")
    return Part("ldm.conditioners.neighbours.Neighbours", {"embedding_width": width, "count": 20, "normalise": False}, [], CLASSES)


def _first_stage(around: Around) -> Part:
    """LDM's inpainting: the masked picture's raw latent, then the mask, from -1 to 1."""
    latent = around.params.get("channels", 3)
    if around.extra != latent + 1:
        raise UserError(f"{around.origin}: cond_stage_config __is_first_stage__ with {around.extra} channels beside x_t; read is a "
                        f"masked picture's latent and a mask, {latent + 1}")
    return Part("ldm.conditioners.spatial.MaskedImage", {"mask_first": False, "signed_mask": True, "raw": True, "fill": -1.0})


def _masked(around: Around) -> Part:
    return Part("ldm.conditioners.spatial.MaskedImage", {})


def _depth(around: Around) -> Part:
    return Part("ldm.conditioners.spatial.Depth", {})


def _low_scale(around: Around) -> Part:
    """Stable Diffusion's x4 upscaler: a noisy small picture, and its noise's level as one of the network's classes."""
    model = (around.params.get("low_scale_config") or {}).get("params") or {}
    schedule = model.get("noise_schedule_config") or {}
    if schedule.get("beta_schedule", "linear") != "linear" or not isinstance(around.unet.get("num_classes"), int):
        raise UserError(f"{around.origin}: low_scale_config with {schedule.get('beta_schedule')!r} noise and num_classes "
                        f"{around.unet.get('num_classes')!r}; read are linear noise and a number of classes")
    steps = schedule.get("timesteps", 1000)
    noise = {"target": "ldm.process.DDPM", "params": {
        "schedule": "scaled_linear", "steps": steps, "start": float(schedule.get("linear_start", 1e-4)),
        "end": float(schedule.get("linear_end", 2e-2))}}  # fmt: skip
    values = {"channels": around.extra, "noise": noise, "max_noise_level": model.get("max_noise_level", steps), "level": "class",
              "level_width": 4 * around.unet["model_channels"]}  # fmt: skip
    return Part("ldm.conditioners.low_resolution.LowResolution", values, pair("embedding", f"{UNET}label_emb", ["weight"]))


def _image_embedding(around: Around) -> Part:
    """Stable unCLIP: CLIP's embedding of a picture under noise, and the noise's level."""
    params = (around.params.get("noise_aug_config") or {}).get("params") or {}
    schedule = params.get("noise_schedule_config") or {}
    if schedule.get("beta_schedule", "squaredcos_cap_v2") != "squaredcos_cap_v2":
        raise UserError(f"{around.origin}: noise_aug_config: beta_schedule {schedule['beta_schedule']!r}; read is squaredcos_cap_v2")
    width = around.unet["adm_in_channels"] // 2
    noise = {"target": "ldm.process.DDPM", "params": {"schedule": "cosine", "steps": schedule.get("timesteps", 1000)}}
    source = {"encoder": VISION[width]} if width in VISION else {"embedding_width": width}
    return Part("ldm.conditioners.image.ImageEmbedding",
                {**source, "noise": noise, "dropout": float(around.params.get("embedding_dropout", 0.0))})  # fmt: skip


BESIDE = {  # kinds of models -> what they have beside their condition stage
    "LatentInpaintDiffusion": _masked, "LatentDepth2ImageDiffusion": _depth, "LatentUpscaleDiffusion": _low_scale,
    "LatentUpscaleFinetuneDiffusion": _low_scale, "ImageEmbeddingConditionedLatentDiffusion": _image_embedding,
}  # fmt: skip
NUMBERS = {"original_size_as_tuple": ("original_size", 2), "crop_coords_top_left": ("crop", 2),
           "target_size_as_tuple": ("target_size", 2), "aesthetic_score": ("aesthetic", 1)}  # fmt: skip


def _embedders(around: Around) -> Iterator[Part]:
    """conditioner_config of Stability's generative-models (SDXL): a list of embedders; numbers that follow one another are one
    conditioner of ours."""
    numbers: dict[str, int] = {}
    embedders = ((around.params["conditioner_config"].get("params") or {}).get("emb_models")) or []
    for i, embedder in enumerate(embedders):
        name, params = str(embedder.get("target")).rsplit(".")[-1], embedder.get("params") or {}
        prefix = f"conditioner.embedders.{i}."
        if name == "FrozenCLIPEmbedder":
            part = _clip(params, around, f"{prefix}transformer.")
        elif name in ("FrozenOpenCLIPEmbedder2", "FrozenOpenCLIPEmbedder"):
            second = name.endswith("2")
            pooled = {"pooled": "projected"} if second and params.get("always_return_pooled") else {}
            norm = {} if params.get("legacy", True) or not second else {"final_norm": False}
            part = _open_clip(params, around, f"{prefix}model.", **pooled, **norm)
        elif name == "ConcatTimestepEmbedderND" and embedder.get("input_key") in NUMBERS:
            key, count = NUMBERS[embedder["input_key"]]
            numbers[key] = count
            width = params.get("outdim", 256)
            continue
        else:
            raise UserError(f"{around.origin}: conditioner_config: {name} of {embedder.get('input_key')!r} is not known here")
        zeros = "txt" in (around.params.get("force_uc_zero_embeddings") or ["txt"])
        yield part._replace(params=part.params | ({"zero_null": True} if zeros else {}))
    if numbers:
        yield Part("ldm.conditioners.numbers.Numbers", {"keys": numbers, "width": width})


def vocabulary(version: str, folder: Path) -> str:
    """What a yaml calls a text encoder -> where its vocabulary is: beside the checkpoint, or known by name."""
    return str(folder / version) if (folder / version).is_dir() else VOCABULARIES.get(version, version)
