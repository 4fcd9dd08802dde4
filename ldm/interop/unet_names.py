"""What the weights of the UNet are called: here, by CompVis (and guided-diffusion, Stability), by diffusers. One walk over the
network's stages; the network may be without weights (meta device)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ldm.interop.rows import Row, interleaved, pair, squeezed
from ldm.networks.layers import Downsample, ResBlock, SelfAttention, SpatialTransformer
from ldm.networks.unet import Stage, UNet

Layout = Literal["compvis", "diffusers"]
Order = Literal["heads first", "q k v first"]  # of CompVis' and ADM's qkv; ADM's use_new_attention_order is the second

RESIDUAL = {  # ours -> CompVis', diffusers'
    "norm1": ("in_layers.0", "norm1"), "conv1": ("in_layers.2", "conv1"), "embed": ("emb_layers.1", "time_emb_proj"),
    "norm2": ("out_layers.0", "norm2"), "conv2": ("out_layers.3", "conv2"),
    "shortcut": ("skip_connection", "conv_shortcut"),
}  # fmt: skip
BLOCK = {  # the same in both
    "norm1": "norm1", "norm2": "norm2", "norm3": "norm3", "ff.proj": "ff.net.0.proj", "ff.out.1": "ff.net.2",
    **{f"{attn}.{ours}": f"{attn}.{theirs}" for attn in ("attn1", "attn2")
       for ours, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("out.0", "to_out.0"))},
}  # fmt: skip


def rows(network: UNet, layout: Layout, prefix: str = "", order: Order = "heads first",
         vector: str = "add_embedding") -> list[Row]:
    """The table of a UNet, for every tensor that may exist (see ``rows.existing``). Ours begin where the network does,
    theirs with ``prefix``.

    order: of queries, keys and values in ``attention: self``. vector: what diffusers calls the layers of the vector.
    """
    i = ("compvis", "diffusers").index(layout)
    found = []
    for ours, *theirs in ends(network, vector):
        found += pair(ours, prefix + theirs[i])
    for ours, stage, *theirs in stages(network):
        found += of_stage(stage, ours, prefix, theirs[i], i, order)
    return found


def ends(network: UNet, vector: str = "add_embedding") -> Iterator[tuple[str, str, str]]:
    """(ours, CompVis', diffusers') of the layers before and after the stages."""
    yield "time.0", "time_embed.0", "time_embedding.linear_1"
    yield "time.2", "time_embed.2", "time_embedding.linear_2"
    yield "vector.0", "label_emb.0.0", f"{vector}.linear_1"
    yield "vector.2", "label_emb.0.2", f"{vector}.linear_2"
    yield "vector", "label_emb", vector
    yield "conv_in", "input_blocks.0.0", "conv_in"
    yield "norm_out", "out.0", "conv_norm_out"
    yield "conv_out", "out.2", "conv_out"


def stages(network: UNet) -> Iterator[tuple[str, Stage, dict[str, str], dict[str, str]]]:
    """(ours, stage, and what its "res", "attention" and "resample" are called by CompVis, by diffusers)."""
    level = block = 0
    for k, stage in enumerate(network.down):
        if stage.res is None:  # the end of a level
            name = f"down_blocks.{level}.downsamplers.0"
            yield f"down.{k}", stage, {"resample": f"input_blocks.{k + 1}.0"}, {"resample": name}
            level, block = level + 1, 0
            continue
        yield f"down.{k}", stage, slots(stage, f"input_blocks.{k + 1}"), inside(f"down_blocks.{level}", block)
        block += 1
    has_attention = network.middle[0].attention is not None
    names = {"res": "middle_block.0", "attention": "middle_block.1"}
    yield "middle.0", network.middle[0], names, inside("mid_block", 0)
    yield "middle.1", network.middle[1], {"res": f"middle_block.{1 + has_attention}"}, inside("mid_block", 1)
    level = block = 0  # here from the lowest resolution up
    for k, stage in enumerate(getattr(network, "up", ())):  # a classifier has none
        yield f"up.{k}", stage, slots(stage, f"output_blocks.{k}"), inside(f"up_blocks.{level}", block)
        level, block = (level + 1, 0) if stage.resample is not None else (level, block + 1)


def slots(stage: Stage, block: str) -> dict[str, str]:
    """CompVis numbers what there is in a block."""
    there = [name for name in ("res", "attention", "resample") if getattr(stage, name) is not None]
    return {name: f"{block}.{i}" for i, name in enumerate(there)}


def inside(block: str, i: int) -> dict[str, str]:
    """diffusers keeps residual blocks and attention of a level in two lists."""
    return {"res": f"{block}.resnets.{i}", "attention": f"{block}.attentions.{i}", "resample": f"{block}.upsamplers.0"}


def of_stage(stage: Stage, ours: str, prefix: str, names: dict[str, str], layout: int, order: Order) -> list[Row]:
    found = []
    for part, theirs in names.items():
        layer, ours_part, theirs = getattr(stage, part), f"{ours}.{part}", prefix + theirs
        if isinstance(layer, ResBlock):
            for inner, names_inside in RESIDUAL.items():
                found += pair(f"{ours_part}.{inner}", f"{theirs}.{names_inside[layout]}")
        elif isinstance(layer, SpatialTransformer):
            for inner in ("norm", "proj_in", "proj_out"):
                found += pair(f"{ours_part}.{inner}", f"{theirs}.{inner}")
            for k in range(len(layer.blocks)):
                for inner, name in BLOCK.items():
                    found += pair(f"{ours_part}.blocks.{k}.{inner}", f"{theirs}.transformer_blocks.{k}.{name}")
        elif isinstance(layer, SelfAttention):
            found += _self_attention(layer, ours_part, theirs, layout, order)
        elif layer is not None:
            conv = "conv" if layout == 1 or not isinstance(layer, Downsample) else "op"
            found += pair(f"{ours_part}.conv", f"{theirs}.{conv}")
    return found


def _self_attention(layer: SelfAttention, ours: str, theirs: str, layout: int, order: Order) -> list[Row]:
    if layout == 1:
        return [*pair(f"{ours}.norm", f"{theirs}.group_norm"), *pair(f"{ours}.out", f"{theirs}.to_out.0"),
                *pair(f"{ours}.qkv", tuple(f"{theirs}.{name}" for name in ("to_q", "to_k", "to_v")))]
    change = interleaved(layer.heads) if order == "heads first" else squeezed(1)
    return [*pair(f"{ours}.norm", f"{theirs}.norm"), *pair(f"{ours}.out", f"{theirs}.proj_out", weight=squeezed(1)),
            *pair(f"{ours}.qkv", f"{theirs}.qkv", weight=change, bias=change)]
