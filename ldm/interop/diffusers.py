"""Autoencoders in the layout of diffusers, AutoencoderKL and VQModel, read and written without that package.

A folder holds config.json and diffusion_pytorch_model.safetensors. Levels of the decoder are counted from the lowest
resolution, attention has matrices where CompVis has 1x1 convolutions. Its latents for diffusion are
(z - shift_factor) * scaling_factor, which is our shift and 1 / scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.interop import names
from ldm.interop.foreign import about, refuse_others, renamed, settings_for, translated

CONFIG = "config.json"
WEIGHTS = tuple(f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin", "fp16.safetensors", "fp16.bin"))
KINDS = ("AutoencoderKL", "VQModel")
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of attention's parts until 0.17
BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True,  # -> whether it has attention
          "UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}  # fmt: skip
FIXED = {"act_fn": ("silu", "swish"), "norm_type": ("group",)}  # what there is no other of


def holds(keys: Iterable[str]) -> bool:
    """Whether these names are those of an autoencoder of diffusers."""
    return any(re.match(r"(encoder\.down_blocks|decoder\.up_blocks)\.\d", key) for key in keys)


def read(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of this autoencoder, and its weights by our names ("autoencoder.*")."""
    if config is None:
        raise UserError(f"{origin}: an autoencoder of diffusers; its {CONFIG} is expected beside it")
    block = block_of(config, origin)
    found = translated(block, "diffusers", modern(tensors), origin)
    shift, scale = statistics(config, origin)
    found["shift"], found["scale"] = found["shift"] + shift, found["scale"] * scale
    return about(block, "diffusers"), {f"autoencoder.{key}": value for key, value in found.items()}


def modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names that the parts of attention have since 0.17."""
    if not any(".attentions." in key and key.rsplit(".", 2)[-2] in OLD for key in tensors):
        return dict(tensors)
    return {re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\b", lambda m: m[1] + OLD[m[2]], key): value
            for key, value in tensors.items()}  # fmt: skip


def statistics(config: Mapping, origin: str) -> tuple[Tensor, Tensor]:  # numbers or (C,) each
    """Our shift and scale: what is taken from latents and what they are divided by, before diffusion sees them."""
    scaling = config.get("scaling_factor", 0.18215)
    if not isinstance(scaling, (int, float)) or scaling <= 0:
        raise UserError(f"{origin}: {CONFIG}: scaling_factor: {scaling!r}; expected a number above 0")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift = torch.tensor(mean if mean is not None else config.get("shift_factor") or 0.0).flatten()
    return shift, torch.tensor(std if std is not None else 1.0).flatten() / scaling


def block_of(config: Mapping, origin: str = CONFIG) -> dict:
    """Our block of the autoencoder that a config.json describes. UserError for what has no counterpart."""
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise UserError(f"{origin}: {CONFIG}: _class_name: {kind}; read are {' and '.join(KINDS)}; others run through "
                        "diffusers itself: {target: autoencoder.pretrained.pretrained, params: {path: FOLDER}}")  # fmt: skip
    for name, accepted in FIXED.items():
        if config.get(name, accepted[0]) not in accepted:
            raise UserError(f"{origin}: {CONFIG}: {name}: {config[name]!r}; read is {accepted[0]!r} alone")
    widths = list(config.get("block_out_channels", [64]))
    if any(width % widths[0] for width in widths):
        raise UserError(f"{origin}: {CONFIG}: block_out_channels: {widths}; expected multiples of the first")
    down, up = config.get("down_block_types", ["DownEncoderBlock2D"]), config.get("up_block_types", ["UpDecoderBlock2D"])
    foreign = sorted({name for name in (*down, *up) if name not in BLOCKS})
    if foreign:
        raise UserError(f"{origin}: {CONFIG}: blocks {', '.join(foreign)}; known are {', '.join(BLOCKS)}")
    latent, params = config.get("latent_channels", 4 if kind == "AutoencoderKL" else 3), {}
    if kind == "AutoencoderKL":
        bottleneck = {"target": "autoencoder.bottlenecks.KL", "params": {"channels": latent}}
        params = {"pre": config.get("use_quant_conv", True), "post": config.get("use_post_quant_conv", True)}
    else:
        sizes = {"channels": config.get("vq_embed_dim") or latent, "codes": config.get("num_vq_embeddings", 256)}
        bottleneck = {"target": "autoencoder.bottlenecks.VQ", "params": {**sizes, "beta": 0.25, "legacy": True}}
    return {"target": names.CONVOLUTIONAL, "params": dict(
        bottleneck=bottleneck, image_channels=config.get("in_channels", 3), out_channels=config.get("out_channels", 3),
        width=widths[0], mult=[width // widths[0] for width in widths], blocks=config.get("layers_per_block", 1),
        attention=config.get("mid_block_add_attention", True), groups=config.get("norm_num_groups", 32), features=latent,
        attention_levels=[level for level, name in enumerate(down) if BLOCKS[name]],
        decoder_attention_levels=[level for level, name in enumerate(reversed(up)) if BLOCKS[name]], **params)}  # fmt: skip


def write(bundle: Bundle) -> tuple[dict[str, Tensor], dict]:
    """The bundle's autoencoder as diffusers has it: weights, and what goes into config.json.

    Raises:
        UserError: where it has no place for it.
    """
    config = config_of(bundle)
    return renamed(bundle, "diffusers"), config


def config_of(bundle: Bundle) -> dict:
    """config.json of the bundle's autoencoder. UserError where there is no such autoencoder there."""
    params = settings_for(bundle, "diffusers")
    spec, mult = bundle.autoencoder.spec, params["mult"] or [1, 2, 4, 4]
    inner, outer = params["attention_levels"] or [], params["decoder_attention_levels"]
    outer = inner if outer is None else outer
    latent, vq = params["features"] or spec.channels, "codes" in params["bottleneck"]
    refuse_others(params, "diffusers", tanh=False, head=True, conv_resample=True)
    if vq:
        refuse_others(params, "diffusers' VQModel", pre=True, post=True)
    elif latent != spec.channels:
        refuse_others(params, "diffusers' AutoencoderKL", features=spec.channels)
    config = {
        "_class_name": KINDS[1] if vq else KINDS[0], "act_fn": "silu", "in_channels": params["image_channels"],
        "out_channels": params["out_channels"] or params["image_channels"], "latent_channels": latent,
        "block_out_channels": [params["width"] * m for m in mult], "layers_per_block": params["blocks"],
        "norm_num_groups": params["groups"], "mid_block_add_attention": params["attention"],
        "down_block_types": ["AttnDownEncoderBlock2D" if level in inner else "DownEncoderBlock2D"
                             for level in range(len(mult))],
        "up_block_types": ["AttnUpDecoderBlock2D" if level in outer else "UpDecoderBlock2D"
                           for level in reversed(range(len(mult)))],
        **(_scaling(spec.shift, spec.scale, vq)),
    }  # fmt: skip
    if vq:
        config |= {"vq_embed_dim": spec.channels, "num_vq_embeddings": params["bottleneck"]["codes"]}
    else:
        config |= {"use_quant_conv": params["pre"], "use_post_quant_conv": params["post"]}
    return config


def _scaling(shift: Tensor, scale: Tensor, vq: bool) -> dict:
    """One number each where that will do; else a mean and deviation for every channel, which VQModel cannot say."""
    if len(shift.unique()) == len(scale.unique()) == 1 and not (vq and shift.any()):
        one = {"scaling_factor": 1 / float(scale[0])}
        return one if vq else one | {"shift_factor": float(shift[0])}
    if vq:
        raise UserError("diffusers' VQModel has one scale for all channels of the latent, and no shift: set_statistics first")
    return {"scaling_factor": 1.0, "latents_mean": shift.tolist(), "latents_std": scale.tolist()}
