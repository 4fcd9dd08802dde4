"""The condition stages of CompVis' and Stability's yaml files as conditioners of ours, with the rows of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop import compvis_texts, sgm_conditions
from ldm.interop.compvis_beside import BESIDE, instruction
from ldm.interop.conditions import CLASSES, COND, DROPOUT, UNET, Around, Part
from ldm.interop.rows import pair
from ldm.interop.said import Said


def conditions_of(kind: str, params: Said, unet: Said, tensors: Mapping[str, Tensor], folder: Path) -> list[Part]:
    """The conditioners, in the order in which their channels and numbers stand side by side. ``kind``: of the model, as the
    yaml names it.

    Raises:
        UserError: for what has no counterpart here.
    """
    around = Around(params, unet, tensors, folder)
    if "conditioner_config" in params:
        return list(sgm_conditions.embedders(around))
    stage, found = params.get("cond_stage_config", "__is_unconditional__"), []
    if stage == "__is_first_stage__":
        found.append(_first_stage(around))
    elif stage != "__is_unconditional__":
        found += _stage(params.block("cond_stage_config"), around)
    if kind in BESIDE:
        found.append(BESIDE[kind](around))
    elif params.get("conditioning_key") == "hybrid" and around.extra:
        found.append(instruction(around))
    classes = unet.get("num_classes")
    if isinstance(classes, int) and kind not in BESIDE:
        width = 4 * unet.whole("model_channels")
        found.append(Part("ldm.conditioners.label.ClassLabel", {"classes": classes, "width": width, "null_row": False},
                          pair("embedding", f"{UNET}label_emb", ["weight"]), CLASSES))  # fmt: skip
    return found


def _stage(stage: Said, around: Around) -> list[Part]:
    """cond_stage_config -> a conditioner, or nothing where it only hands on what another condition is made of."""
    name, said = stage.named
    known = {"FrozenCLIPEmbedder": compvis_texts.clip, "FrozenOpenCLIPEmbedder": compvis_texts.open_clip,
             "BERTEmbedder": compvis_texts.bert, "Identity": _as_it_is, "ClassEmbedder": _class, "SpatialRescaler": _rescaler}
    if name not in known:
        raise UserError(f"{stage.place}.target: {stage['target']} is not known here{near(name, known)}; there are "
                        f"{', '.join(known)}")
    if name == "Identity" and not around.extra and isinstance(around.unet.get("num_classes"), int):
        return []  # classes (conditioning_key: adm)
    return [known[name](said, around)]


def _class(said: Said, around: Around) -> Part:
    classes = said.whole("n_classes", 1000)
    guided = classes != 1000  # all of ImageNet's classes, and none for "no class"
    values = {"classes": classes, "width": said.whole("embed_dim"), "to": "tokens", "null_row": False,
              "dropout": DROPOUT * guided}  # fmt: skip
    return Part("ldm.conditioners.label.ClassLabel", values, pair("embedding", f"{COND}embedding", ["weight"]),
                CLASSES if guided else 1.0)  # fmt: skip


def _rescaler(said: Said, around: Around) -> Part:
    said.only(multiplier=0.5)
    values = {"classes": said.whole("in_channels", 3), "width": said.whole("out_channels", None),
              "stages": said.whole("n_stages", 1), "resize": said.one("method", RESIZED, "bilinear"), "bias": said.flag("bias")}
    kinds = ["weight", "bias"] if values["bias"] else ["weight"]
    rows = pair("channel_mapper", f"{COND}channel_mapper", kinds) if values["width"] else []
    return Part("ldm.conditioners.spatial.SemanticMap", values, rows)


RESIZED = {name: name for name in ("nearest", "bilinear", "bicubic", "area")}


def _as_it_is(said: Said, around: Around) -> Part:
    """A small picture, or embeddings of neighbours."""
    if around.extra:
        return Part("ldm.conditioners.low_resolution.LowResolution", {"channels": around.extra})
    values = {"embedding_width": around.unet.whole("context_dim"), "count": 20, "normalise": False}
    return Part("ldm.conditioners.neighbours.Neighbours", values, [], CLASSES)


def _first_stage(around: Around) -> Part:
    """LDM's inpainting: the masked picture's raw latent, then the mask, from -1 to 1."""
    latent = around.params.whole("channels", 3)
    if around.extra != latent + 1:
        raise UserError(f"{around.params.place}.cond_stage_config: __is_first_stage__ with {around.extra} channels beside x_t; "
                        f"read is a masked picture's latent and a mask, {latent + 1}")
    return Part("ldm.conditioners.spatial.MaskedImage", {"mask_first": False, "signed_mask": True, "raw": True, "fill": -1.0})
