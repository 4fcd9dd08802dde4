"""Autoencoders in the layout of CompVis (latent-diffusion, stable-diffusion, taming-transformers, Stability, flux).

A checkpoint is a pickled dict whose "state_dict" holds encoder.*, decoder.*, quant_conv.*, post_quant_conv.*, for VQ kinds
quantize.*; beside them what only training needs: loss.* (discriminator, perceptual network, logvar), and model_ema.*, the
averaged weights, whose names have lost their dots.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop import names
from ldm.interop.foreign import about, refuse_others, renamed, settings_for, translated
from ldm.interop.said import Said

log = logging.getLogger(__name__)

KINDS = {"AutoencoderKL": "kl", "AutoencoderKLInferenceWrapper": "kl", "AutoencodingEngineLegacy": "kl", "VQModel": "vq",
         "VQModelInterface": "vq", "VQModelInferenceWrapper": "vq", "VQNoDiscModel": "vq", "VQSegmentationModel": "vq",
         "IdentityFirstStage": "identity"}  # fmt: skip
ATTENTION = {"vanilla": "softmax", "vanilla-xformers": "softmax", "memory-efficient-cross-attn": "softmax",
             "linear": "linear", "none": None}  # fmt: skip
TRAINING = ("loss.", "model_ema.", "colorize")  # colorize: how segmentation maps are shown
FIRST_STAGE = "first_stage_model."  # what its names begin with inside a diffusion model's checkpoint


def holds(keys: Iterable[str], prefix: str = "") -> bool:
    """Whether these names are those of such an autoencoder."""
    return any(re.match(rf"{re.escape(prefix)}(encoder\.down|decoder\.up)\.\d", key) for key in keys)


def read(
    tensors: Mapping[str, Tensor], config: Mapping | None, origin: str, prefix: str = ""
) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of the autoencoder among these tensors, and its weights by our names:
    "autoencoder.*", and "ema.*" where there are averaged ones. Shift 0, scale 1.

    Args:
        config: the yaml that it was trained with, as a mapping; None: the architecture is read from the shapes.
        prefix: what its names begin with; other names are left alone.
    """
    inside = {key: value for key, value in tensors.items() if key.startswith(prefix)}
    if f"{prefix}quantize.used" in inside:
        raise UserError(f"{origin}: a VQ autoencoder with remapped codes (remap), which are not read")
    training = Counter(next((kind for kind in TRAINING if key.startswith(kind, len(prefix))), "") for key in inside)
    raw = {key: value for key, value in inside.items() if not key.startswith(TRAINING, len(prefix))}
    block = infer(raw, origin, prefix) if config is None else block_of(config, origin)
    weights = {f"autoencoder.{key}": value for key, value in translated(block, "compvis", raw, origin, prefix).items()}
    averaged = _averaged(raw, inside, prefix)
    if averaged:
        weights |= {f"ema.{key}": value for key, value in translated(block, "compvis", averaged, origin, prefix).items()}
    elif training["model_ema."]:
        log.warning("%s: model_ema does not cover all weights; the raw ones are taken", origin)
    left = ", ".join(f"{count} of {kind.strip('.')}" for kind, count in training.items() if kind in ("loss.", "colorize"))
    log.info("%s: %d weights in the layout of CompVis; left behind: %s", origin, len(raw), left or "nothing")
    return about(block, "compvis"), weights


def _averaged(weights: Mapping[str, Tensor], inside: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """For every weight its average, whose name is the weight's without dots; nothing unless there is one for each."""
    short = {key: f"{prefix}model_ema." + key.removeprefix(prefix).replace(".", "") for key in weights}
    return {key: inside[average] for key, average in short.items()} if inside.keys() >= set(short.values()) else {}


def block_of(config: Mapping, origin: str = "config") -> dict:
    """Our block of the autoencoder that a CompVis yaml describes: an autoencoder's, or a diffusion model's first stage."""
    model = Said(Said(config, origin).get("model"), f"{origin}: model")
    if "first_stage_config" in model.block("params"):
        params = model.block("params")
        return first_stage(params.block("first_stage_config"), params.whole("channels", 3))
    if "target" not in model:
        raise UserError(f"{origin}: expected a yaml of CompVis, with model.target and model.params.ddconfig")
    return first_stage(model, 3)


def first_stage(model: Said, channels: int) -> dict:
    """{target, params} of CompVis -> our block. ``channels``: of pictures, for an identity, whose config does not say."""
    name, params = model.named
    if name not in KINDS:
        raise UserError(f"{model.place}.target: {model['target']} is no autoencoder known here{near(name, KINDS)}; known are "
                        f"{', '.join(KINDS)}")
    if KINDS[name] == "identity":
        return {"target": "autoencoder.base.Identity", "params": {"image_channels": channels}}
    params.only(remap=None)
    latent = params.whole("embed_dim")
    bottleneck = _kl(latent) if KINDS[name] == "kl" else _vq(latent, params.whole("n_embed"))
    return _block(_numbers(params.block("ddconfig"), KINDS[name]), bottleneck)


def _numbers(dd: Said, kind: str) -> dict[str, Any]:
    """``ddconfig`` in the names of ``autoencoder.model.convolutional``."""
    if dd.flag("double_z", True) != (kind == "kl"):
        raise dd.refused("double_z", "true for KL kinds, false for VQ")
    attention = dd.one("attn_type", ATTENTION, "vanilla")
    attention = "linear" if dd.flag("use_linear_attn") else attention
    mult, side = dd.wholes("ch_mult", [1, 2, 4, 8]), dd.whole("resolution")
    # attention is placed by the side that a training picture has at a level; both halves count by halving and doubling
    sides = [side // 2**level for level in range(len(mult))]
    rising = [sides[-1] * 2 ** (len(mult) - 1 - level) for level in range(len(mult))]
    wanted = set(dd.wholes("attn_resolutions", [])) if attention else set()
    return dict(
        image_channels=dd.whole("in_channels"), out_channels=dd.whole("out_ch"), width=dd.whole("ch"), mult=mult,
        blocks=dd.whole("num_res_blocks"), attention=attention is not None, attention_kind=attention or "softmax",
        attention_levels=[level for level, side in enumerate(sides) if side in wanted],
        decoder_attention_levels=[level for level, side in enumerate(rising) if side in wanted],
        features=dd.whole("z_channels"), dropout=dd.number("dropout", 0.0), conv_resample=dd.flag("resamp_with_conv", True),
        tanh=dd.flag("tanh_out"), head=not dd.flag("give_pre_end"))  # fmt: skip


def infer(tensors: Mapping[str, Tensor], origin: str, prefix: str = "") -> dict:
    """Our block of the autoencoder that has tensors of these names and shapes.

    What leaves no trace is taken to be as in every published one: no tanh at the end, no dropout.
    """
    shape = {key.removeprefix(prefix): tuple(value.shape) for key, value in tensors.items()}
    try:
        return _inferred(shape)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{origin}: the shapes of its weights do not tell the architecture ({type(error).__name__}: {error}); "
                        "give the yaml that it was trained with: one with model.target and model.params.ddconfig") from error


def _inferred(shape: Mapping[str, tuple[int, ...]]) -> dict:
    def numbers(pattern: str) -> list[int]:
        return sorted({int(found[1]) for key in shape if (found := re.match(pattern, key))})

    levels = numbers(r"encoder\.down\.(\d+)\.")
    width = shape["encoder.conv_in.weight"][0]
    outward, inner = shape["encoder.conv_out.weight"][0], shape["decoder.conv_in.weight"][1]
    pre, post = "quant_conv.weight" in shape, "post_quant_conv.weight" in shape
    latent = shape["post_quant_conv.weight"][1] if post else inner
    if "quantize.embedding.weight" in shape:
        codes, latent = shape["quantize.embedding.weight"]
        bottleneck = _vq(latent, codes)
    elif outward == 2 * inner:
        bottleneck = _kl(latent)
    else:
        raise ValueError(f"the encoder gives {outward} channels, the decoder takes {inner}, and there is no codebook")
    linear = any(".to_qkv." in key for key in shape)
    return _block(dict(
        image_channels=shape["encoder.conv_in.weight"][1], out_channels=shape["decoder.conv_out.weight"][0], width=width,
        mult=[shape[f"encoder.down.{level}.block.0.conv1.weight"][0] // width for level in levels],
        blocks=len(numbers(r"encoder\.down\.0\.block\.(\d+)\.")),
        attention=any(key.startswith("encoder.mid.attn_1.") for key in shape),
        attention_kind="linear" if linear else "softmax",
        attention_levels=numbers(r"encoder\.down\.(\d+)\.attn\."),
        decoder_attention_levels=numbers(r"decoder\.up\.(\d+)\.attn\."),
        features=inner, pre=pre, post=post,
        conv_resample=len(levels) == 1 or "encoder.down.0.downsample.conv.weight" in shape), bottleneck)  # fmt: skip


def write(bundle: Bundle) -> tuple[dict[str, Tensor], dict]:
    """The bundle's autoencoder as CompVis has it: the state dict of its checkpoint, and the yaml for it.

    Shift and scale have no place there: one number, scale_factor, is part of the diffusion model's config.

    Raises:
        UserError: where there is no place for the autoencoder.
    """
    yaml, spec = yaml_of(bundle), bundle.autoencoder.spec
    if bool(spec.shift.any()) or not bool((spec.scale == 1).all()):
        log.warning("shift and scale of the latents have no place in the layout of CompVis: %s, %s", spec.shift.tolist(),
                    spec.scale.tolist())  # fmt: skip
    return renamed(bundle, "compvis"), yaml


def yaml_of(bundle: Bundle) -> dict:
    """The yaml of the bundle's autoencoder. UserError where there is no such autoencoder there."""
    params = settings_for(bundle, "compvis")
    refuse_others(params, "CompVis", pre=True, post=True, groups=32)
    levels, mult = params["attention_levels"] or [], list(params["mult"] or (1, 2, 4, 4))
    if params["decoder_attention_levels"] is not None:
        refuse_others(params, "CompVis", decoder_attention_levels=levels)
    spec, bottleneck = bundle.autoencoder.spec, params["bottleneck"]
    side = 256  # of a training picture; it only places attention
    kinds = {"softmax": "vanilla", "linear": "linear"}
    dd = dict(double_z="codes" not in bottleneck, z_channels=params["features"] or spec.channels, resolution=side,
              in_channels=params["image_channels"], out_ch=params["out_channels"] or params["image_channels"],
              ch=params["width"], ch_mult=mult, num_res_blocks=params["blocks"],
              attn_resolutions=[side // 2**level for level in levels], dropout=params["dropout"],
              attn_type=kinds[params["attention_kind"]] if params["attention"] else "none",
              resamp_with_conv=params["conv_resample"], tanh_out=params["tanh"], give_pre_end=not params["head"])  # fmt: skip
    if levels and not params["attention"]:
        raise UserError("CompVis has no attention at levels without attention in the middle")
    own = {"n_embed": bottleneck["codes"]} if "codes" in bottleneck else {}
    model = {"target": f"ldm.models.autoencoder.{'VQModel' if own else 'AutoencoderKL'}",
             "params": {"embed_dim": spec.channels, **own, "ddconfig": dd, "lossconfig": {"target": "torch.nn.Identity"}}}
    return {"model": model}


def _kl(channels: int) -> dict:
    return {"target": "autoencoder.bottlenecks.KL", "params": {"channels": channels}}


def _vq(channels: int, codes: int) -> dict:
    # all were trained with the weight on the codebook's term
    params = {"channels": channels, "codes": codes, "beta": 0.25, "legacy": True}
    return {"target": "autoencoder.bottlenecks.VQ", "params": params}


def _block(numbers: dict, bottleneck: dict) -> dict:
    return {"target": names.CONVOLUTIONAL, "params": {"bottleneck": bottleneck, **numbers}}
