"""The conditions of a pipeline folder of diffusers, as conditioners of ours with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm.common.files import UserError
from ldm.conditioners.vocabulary import Vocabulary
from ldm.conditioners.vocabulary import find as find_tokenizer
from ldm.interop import component, diffusers_unet, schedulers, text_folders, text_names
from ldm.interop.conditions import CLASSES, DROPOUT, GUIDED, NUMBERS, Part
from ldm.interop.rows import Row, pair
from ldm.interop.said import Said

STEPS = 50  # where nothing else is asked for, as the pipelines there


class Folder(NamedTuple):
    """A pipeline folder: its index, the UNet's config and sizes."""

    path: Path
    index: Said
    unet: Said = Said(None, "unet")
    sizes: diffusers_unet.Sizes = diffusers_unet.Sizes(0, 0)

    def kind(self, part: str) -> str | None:
        """The class that the index names for it; None where there is none: [null, null] is a part that is left out."""
        said = self.index.get(part)
        return str(said[1]) if isinstance(said, (list, tuple)) and len(said) == 2 and said[0] is not None else None

    def config(self, part: str, name: str = component.CONFIG) -> dict:
        return component.read_json(self.path / part / name)

    def noise(self, part: str) -> dict:
        """The block of the process of a scheduler."""
        return schedulers.read(self.config(part, "scheduler_config.json"), str(self.path / part), STEPS).process

    @property
    def is_xl(self) -> bool:
        return "XL" in str(self.index.get("_class_name"))

    @property
    def extra(self) -> int:
        """Channels beside x_t; with a learned variance as many channels go out as come in, twice."""
        taken, given = self.sizes.in_channels, self.sizes.out_channels
        return 0 if given == 2 * taken else taken - given


def conditions_of(folder: Folder) -> list[Part]:
    """In the order in which their numbers and channels stand side by side."""
    found = [*_texts(folder), *_bert(folder)]
    if folder.is_xl:
        third = {"aesthetic": 1} if folder.index.flag("requires_aesthetics_score") else {"target_size": 2}
        keys = {"original_size": 2, "crop": 2, **third}
        found.append(Part(NUMBERS,
                          {"keys": keys, "width": folder.unet.whole("addition_time_embed_dim", 256)}))  # fmt: skip
    if folder.kind("image_noising_scheduler"):
        found.append(_image_embedding(folder))
    if folder.kind("low_res_scheduler"):
        found.append(_low_resolution(folder))
        return found
    if folder.extra:
        found.append(_beside(folder))
    if classes := folder.unet.whole("num_class_embeds", None):
        values = {"classes": classes, "width": folder.sizes.vector_dim, "null_row": False}
        found.append(Part("ldm.conditioners.label.ClassLabel", values, class_rows(), CLASSES))
    return found


def _beside(folder: Folder) -> Part:
    """What a UNet with more channels than x_t was trained with."""
    latent, extra = folder.sizes.out_channels, folder.extra
    if "SuperResolution" in str(folder.index.get("_class_name")):
        return Part("ldm.conditioners.low_resolution.LowResolution", {"channels": extra})
    if extra == latent + 1:
        return Part("ldm.conditioners.spatial.MaskedImage", {})
    if extra == 1:
        return Part("ldm.conditioners.spatial.Depth", {})
    if extra == latent:  # InstructPix2Pix; its latent is the encoder's own
        return Part("ldm.conditioners.spatial.Picture", {"key": "image", "latent": "raw", "dropout": 0.05})
    raise UserError(f"{folder.path}: the UNet takes {extra} channels beside x_t, which belong to no task known here (mask and "
                    f"masked picture {latent + 1}, depth 1, a picture's latent {latent})")


def _low_resolution(folder: Folder) -> Part:
    """Of the x4 upscaler: a noisy small picture, its noise's level as a class."""
    noise, levels = folder.noise("low_res_scheduler"), folder.unet.whole("num_class_embeds")
    steps = noise["params"].get("steps", 1000)
    values = {"channels": folder.extra, "noise": noise, "max_noise_level": folder.index.whole("max_noise_level", 350),
              "level": "class", "level_width": folder.sizes.vector_dim,
              **({"levels": levels} if levels != steps else {})}  # fmt: skip
    return Part("ldm.conditioners.low_resolution.LowResolution", values, class_rows())


def _texts(folder: Folder) -> Iterator[Part]:
    """CLIP's, one or two."""
    for part, words in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        kind = folder.kind(part)
        if kind is None:
            continue
        if not kind.startswith("CLIPText"):
            raise UserError(f"{folder.path}: {part}: {kind} is not read; read are CLIPTextModel and "
                            "CLIPTextModelWithProjection")
        options: dict[str, Any] = {"dropout": DROPOUT}
        if folder.is_xl:
            options |= {"layer": -2, "final_norm": False, "zero_null": folder.index.flag("force_zeros_for_empty_prompt", True)}
            options |= {"pooled": "projected"} if part == "text_encoder_2" else {}
        tokenizer = str(folder.path / words) if (folder.path / words).is_dir() else None
        block, weights = text_folders.read(folder.path / part, tokenizer, later=True, **options)
        held = {"vocabulary": None} if "vocabulary.text" in weights else {}
        yield Part(block["target"], block["params"] | held, [], GUIDED, weights)


def _bert(folder: Folder) -> Iterator[Part]:
    """LDM's own text encoder."""
    if folder.kind("bert") is None:
        return
    place = folder.path / "bert"
    tensors = component.read_weights(place)
    text = text_names.infer(tensors, "", str(place), dropout=DROPOUT)
    params = {key: value for key, value in text.block["params"].items() if value is not None}
    weights = text_names.read(text, tensors, str(place))
    if (folder.path / "tokenizer").is_dir():
        weights["vocabulary.text"] = Vocabulary(None).hold(find_tokenizer(str(folder.path / "tokenizer")))
    yield Part(text.block["target"], params | {"vocabulary": None}, [], GUIDED, weights)


def _image_embedding(folder: Folder) -> Part:
    """Of Stable unCLIP."""
    noise, place = folder.noise("image_noising_scheduler"), folder.path / "image_encoder"
    source = {"encoder": str(place)} if folder.kind("image_encoder") else {"embedding_width": folder.sizes.vector_dim // 2}
    normal = component.read_weights(folder.path / "image_normalizer")
    if not normal.keys() >= {"mean", "std"}:
        raise UserError(f"{folder.path / 'image_normalizer'}: expected tensors mean and std, got {', '.join(normal)}")
    weights = {name: normal[name].flatten() for name in ("mean", "std")}
    return Part("ldm.conditioners.image.ImageEmbedding", {**source, "noise": noise, "dropout": DROPOUT}, weights=weights)


def class_rows() -> list[Row]:
    """The row of a table of classes, which diffusers keeps in the network."""
    return pair("embedding", "class_embedding", ["weight"])
