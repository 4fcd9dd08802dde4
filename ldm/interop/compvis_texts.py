"""The text encoders that CompVis' and Stability's yaml files name, as conditioners of ours."""

from __future__ import annotations

from typing import Any

from ldm.common.files import UserError
from ldm.interop import component, text_folders, text_names
from ldm.interop.conditions import COND, DROPOUT, GUIDED, Around, Part
from ldm.interop.said import Said

VOCABULARIES = {"openai/clip-vit-large-patch14": "clip", "bert-base-uncased": "bert"}  # what a yaml calls them -> we
HEADS = {"ViT-L-14": 12, "ViT-H-14": 16, "ViT-bigG-14": 20, "tiny": 4}  # of OpenCLIP's text towers, which no shape tells
GENUINE = 49408  # words of CLIP's vocabulary; of other ones there are folders beside a checkpoint, of one encoder or of two:
TOKENIZERS = ("tokenizer", "tokenizer_2")
HEAD = 64  # width of each in all that are published
SIZES = {"n_embed": "width", "n_layer": "layers", "vocab_size": "vocab_size", "max_seq_len": "max_length",
         "max_length": "max_length"}  # fmt: skip


def clip(said: Said, around: Around, prefix: str = f"{COND}transformer.") -> Part:
    """FrozenCLIPEmbedder."""
    layer, which = said.word("layer", "last"), {}
    if layer == "hidden":
        which = {"layer": said.whole("layer_idx", least=-100), "final_norm": False}
    elif layer != "last":
        raise said.refused("layer", "'last' or 'hidden'")
    if said.flag("always_return_pooled"):
        which["pooled"] = "state"
    version = said.word("version", "openai/clip-vit-large-patch14")
    beside = around.folder / version / component.CONFIG
    if beside.is_file():  # what no shape tells
        config = component.read_json(beside)
        sizes = Said(config.get("text_config", config), str(beside))
        which |= {"heads": sizes.whole("num_attention_heads"), "activation": sizes.word("hidden_act")}
    return _text(said, around, "hf_clip", prefix, vocabulary=vocabulary(version, around), **which)


def open_clip(said: Said, around: Around, prefix: str = f"{COND}model.", pools: bool = False) -> Part:
    """FrozenOpenCLIPEmbedder, or FrozenOpenCLIPEmbedder2, which ``pools`` and, unless it is legacy, has no norm at its end."""
    layer, heads = said.word("layer", "last"), said.one("arch", HEADS, "ViT-H-14")
    if layer not in ("last", "penultimate"):
        raise said.refused("layer", "'last' or 'penultimate'")
    which: dict[str, Any] = {"layer": -1 if layer == "last" else -2}
    if pools and said.flag("always_return_pooled"):
        which["pooled"] = "projected"
    if pools and not said.flag("legacy", True):
        which["final_norm"] = False
    part = _text(said, around, "open_clip", prefix, heads=heads, vocabulary="clip", **which)
    arch, width = said.word("arch", "ViT-H-14"), part.params["width"]
    if arch != "tiny" and width != HEAD * heads:
        raise UserError(f"{said.place}.arch: {arch} is {HEAD * heads} wide, the weights are of {width}: it belongs to another "
                        "checkpoint")
    own = next((own for name in TOKENIZERS[::-1] if (own := around.folder / name).is_dir()), None)
    return part if part.params["vocab_size"] == GENUINE or own is None else part._replace(
        params=part.params | {"vocabulary": str(own)} | (text_folders.ids_in(own) or {}))


def bert(said: Said, around: Around) -> Part:
    """BERTEmbedder, which reads words, or the tokens of boxes."""
    part = _text(said, around, "x_transformer", f"{COND}transformer.", trainable=around.params.flag("cond_stage_trainable"))
    if around.params.get("cond_stage_key") in ("coordinates_bbox", "objects_bbox"):
        sizes = part.params
        boxes = {"classes": sizes["vocab_size"] - 1, "objects": (sizes["max_length"] - 2) // 3,
                 "vocabulary": sizes["vocab_size"], **{key: sizes[key] for key in ("width", "layers", "heads", "logits")}}
        return part._replace(target="ldm.conditioners.layout.BoxTokens", params=boxes, guidance=1.0)
    return part._replace(params=part.params | {"vocabulary": "bert" if said.flag("use_tokenizer", True) else None})


def vocabulary(version: str, around: Around) -> str:
    """What a yaml calls a text encoder -> where its vocabulary is: beside the checkpoint, or known by name."""
    beside = around.folder / version
    return str(beside) if beside.is_dir() else VOCABULARIES.get(version, version)


def _text(said: Said, around: Around, layout: str, prefix: str, **given: Any) -> Part:
    """The text encoder under this prefix, of this layout. ``said``: what the yaml says of it, which its shapes have to agree
    with."""
    found = text_names.infer(around.tensors, prefix, said.place, **given)
    if found.layout != layout:
        raise UserError(f"{said.place}: the yaml is of a model with a text encoder of {layout}, the weights have one of "
                        f"{found.layout}: it belongs to another checkpoint")
    params = {key: value for key, value in found.block["params"].items() if value is not None}
    for theirs, ours in SIZES.items():
        if said.get(theirs, params.get(ours)) != params.get(ours):
            raise UserError(f"{said.place}: the yaml says {theirs} {said[theirs]} of the text encoder, the weights are of "
                            f"{params.get(ours)}: it belongs to another checkpoint")
    return Part(found.block["target"], params | {"dropout": DROPOUT}, found.rows, GUIDED)
