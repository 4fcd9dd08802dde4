"""What the weights of the convolutional autoencoder are called: here, by CompVis, by diffusers. One walk over its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.common.build import locate
from ldm.common.files import UserError

CONVOLUTIONAL = "autoencoder.model.convolutional"
SAME = ("norm1", "conv1", "norm2", "conv2")
# names inside a layer: ours -> CompVis', diffusers'
RESIDUAL = {**{name: (name, name) for name in SAME}, "shortcut": ("nin_shortcut", "conv_shortcut")}
SOFTMAX = {"norm": ("norm", "group_norm"), "q": ("q", "to_q"), "k": ("k", "to_k"), "v": ("v", "to_v"),
           "out": ("proj_out", "to_out.0")}  # fmt: skip
LINEAR = {"qkv": ("to_qkv", None), "out": ("to_out", None)}
ATTENTION = {"softmax": SOFTMAX, "linear": LINEAR}
ITSELF = {"": ("", "")}
OURS_ALONE = {"shift": 0.0, "scale": 1.0, "statistics_count": 0, "statistics_data": 0,  # what nobody else keeps
              "bottleneck.use": 1.0, "bottleneck.updates": 0}  # fmt: skip


class Layer(NamedTuple):
    """Where one layer is, in the three layouts, and the names inside it."""

    ours: str
    compvis: str
    diffusers: str
    inside: Mapping[str, tuple[str, str | None]]


@dataclass(frozen=True)
class Layout:
    """The numbers that decide which layers there are."""

    levels: int
    blocks: int
    attention: bool
    kind: str
    encoder_levels: frozenset[int]
    decoder_levels: frozenset[int]

    @classmethod
    def of(cls, block: Mapping) -> Layout:
        """The layout that a block of ``convolutional`` describes. UserError for any other autoencoder."""
        params = settings(block)
        if params["patch"] != 1:
            raise UserError(f"autoencoder.params.patch: {params['patch']}; other programs have no such layer, only 1")
        encoder_levels = params["attention_levels"] or []
        decoder_levels = params["decoder_attention_levels"]
        return cls(len(params["mult"] or (1, 2, 4, 4)), params["blocks"], params["attention"], params["attention_kind"],
                   frozenset(encoder_levels), frozenset(encoder_levels if decoder_levels is None else decoder_levels))


def settings(block: Mapping) -> dict[str, Any]:
    """The params of a block of ``convolutional``, defaults filled in. UserError for any other autoencoder."""
    if block.get("target") != CONVOLUTIONAL:
        raise UserError(f"autoencoder.target: {block.get('target')} has no counterpart in other programs; {CONVOLUTIONAL} has")
    return defaults(block)


def defaults(block: Mapping, *given: str) -> dict[str, Any]:
    """The params of a block, those that it leaves out as its target's signature has them; without those that the program
    gives."""
    bound = inspect.signature(locate(block["target"])).bind_partial(**(block.get("params") or {}))
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name not in given}


def layers(at: Layout) -> Iterator[Layer]:
    """Every layer with weights that such an autoencoder can have, outermost first."""
    last = at.levels - 1
    attention = ATTENTION[at.kind]
    for half in ("encoder", "decoder"):
        yield Layer(f"{half}.conv_in", f"{half}.conv_in", f"{half}.conv_in", ITSELF)
        middle = [("block_1", "resnets.0", RESIDUAL), ("attn_1", "attentions.0", attention), ("block_2", "resnets.1", RESIDUAL)]
        for k, (compvis, diffusers, inside) in enumerate(middle if at.attention else middle[::2]):
            yield Layer(f"{half}.middle.{k}", f"{half}.mid.{compvis}", f"{half}.mid_block.{diffusers}", inside)
        yield Layer(f"{half}.norm_out", f"{half}.norm_out", f"{half}.conv_norm_out", ITSELF)
        yield Layer(f"{half}.conv_out", f"{half}.conv_out", f"{half}.conv_out", ITSELF)
    for level in range(at.levels):
        ours, compvis, diffusers = f"encoder.levels.{level}", f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        k = int(level > 0)  # our level begins with the halving that theirs ends with
        if level:
            yield Layer(f"{ours}.0.conv", f"encoder.down.{level - 1}.downsample.conv",
                        f"encoder.down_blocks.{level - 1}.downsamplers.0.conv", ITSELF)  # fmt: skip
        yield from _blocks(ours, compvis, diffusers, k, at.blocks, attention if level in at.encoder_levels else None)
        # from the lowest resolution up, where CompVis counts from the highest
        turn = last - level
        ours, compvis, diffusers = f"decoder.levels.{turn}", f"decoder.up.{level}", f"decoder.up_blocks.{turn}"
        inside = attention if level in at.decoder_levels else None
        yield from _blocks(ours, compvis, diffusers, 0, at.blocks + 1, inside)
        if level:
            end = (at.blocks + 1) * (2 if inside else 1)
            yield Layer(f"{ours}.{end}.conv", f"{compvis}.upsample.conv", f"{diffusers}.upsamplers.0.conv", ITSELF)
    yield Layer("pre", "quant_conv", "quant_conv", ITSELF)
    yield Layer("post", "post_quant_conv", "post_quant_conv", ITSELF)


def _blocks(ours: str, compvis: str, diffusers: str, k: int, count: int, attention: Mapping | None) -> Iterator[Layer]:
    """The residual blocks of a level, each followed by attention if there is any; ours are numbered through from k."""
    for j in range(count):
        yield Layer(f"{ours}.{k}", f"{compvis}.block.{j}", f"{diffusers}.resnets.{j}", RESIDUAL)
        k += 1
        if attention:
            yield Layer(f"{ours}.{k}", f"{compvis}.attn.{j}", f"{diffusers}.attentions.{j}", attention)
            k += 1


def inner(layer: Layer, name: str, layout: str, prefix: str = "") -> str:
    """What "compvis" or "diffusers" calls a part of a layer."""
    theirs = layer.inside[name][("compvis", "diffusers").index(layout)]
    if theirs is None:
        raise UserError(f"attention_kind: linear; there is no such layer in the layout of {layout}")
    return prefix + ".".join(part for part in (getattr(layer, layout), theirs) if part)


def table(at: Layout, layout: str, prefix: str = "") -> dict[str, str]:
    """Our name -> the name in "compvis" or "diffusers", for every weight that may exist; ``prefix`` stands before theirs."""
    found = {"bottleneck.codebook": f"{prefix}quantize.embedding.weight"}
    for layer in layers(at):
        for name in layer.inside:
            for kind in ("weight", "bias"):
                ours = ".".join(part for part in (layer.ours, name, kind) if part)
                found[ours] = f"{inner(layer, name, layout, prefix)}.{kind}"
    return found


def own(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What only our files hold, as it is before anything was measured."""
    return {name: torch.full(expected[name].shape, value, dtype=expected[name].dtype)
            for name, value in OURS_ALONE.items() if name in expected}  # fmt: skip
