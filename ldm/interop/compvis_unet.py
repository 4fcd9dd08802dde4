"""CompVis', Stability's and guided-diffusion's settings of a UNet, as a block of ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop.said import Said

UNET = "ldm.networks.unet.UNet"
TARGETS = ("ldm.modules.diffusionmodules.openaimodel.UNetModel", "sgm.modules.diffusionmodules.openaimodel.UNetModel")
SAME = {"model_channels": "model_channels", "num_res_blocks": "num_res_blocks", "dropout": "dropout", "dims": "dims",
        "resblock_updown": "resblock_updown", "use_scale_shift_norm": "scale_shift", "conv_resample": "conv_resample",
        "use_linear_in_transformer": "linear_projections", "use_checkpoint": "checkpointing",
        "num_attention_blocks": "attention_blocks"}  # fmt: skip
DEFAULTS = {"dropout": 0.0, "dims": 2, "resblock_updown": False, "use_scale_shift_norm": False, "conv_resample": True,
            "use_linear_in_transformer": False, "use_checkpoint": False, "num_attention_blocks": None}  # fmt: skip
READ_HERE = ("attention_resolutions", "channel_mult", "num_classes", "num_heads", "num_head_channels", "num_heads_upsample",
             "use_new_attention_order", "use_spatial_transformer", "transformer_depth", "transformer_depth_middle",
             "context_dim", "legacy", "disable_self_attentions", "disable_middle_self_attn", "adm_in_channels", "in_channels",
             "out_channels")  # fmt: skip
IGNORED = ("image_size", "use_fp16", "spatial_transformer_attn_type", "use_bf16")  # what leaves no trace in the model
REFUSED = {"n_embed": None, "disable_middle_transformer": False}  # but for this value
VECTORS = {"continuous": "linear", "sequential": "mlp"}  # num_classes -> how the vector joins
GROUPS = 32


def block_of(unet: Said, attends: bool = False) -> dict:
    """Our block of the network that ``unet``, the params of a UNetModel, describes. UserError for what has no counterpart.

    attends: its attention is a transformer even where the params do not say so (generative-models).
    """
    known = (*SAME, *READ_HERE, *IGNORED, *REFUSED)
    for name in unet:
        if name not in known:
            raise UserError(f"{unet.place}.{name}: {unet[name]!r:.60} has no counterpart here{near(name, known)}")
    unet.only(**REFUSED)
    mult, where = unet.numbers("channel_mult", [1, 2, 4, 8]), unet.wholes("attention_resolutions")
    levels, text = len(mult), unet.flag("use_spatial_transformer", attends or "context_dim" in unet)
    if not mult or not mult[0]:
        raise unet.refused("channel_mult", "a number above 0 for each level")
    depths = unet.each("transformer_depth", levels) if text else [1] * levels
    channels, heads, upward = (_number(unet, name) for name in ("num_head_channels", "num_heads", "num_heads_upsample"))
    if text and not attends and "context_dim" not in unet:
        raise UserError(f"{unet.place}.context_dim: missing, and use_spatial_transformer needs it")
    if heads is channels is None and where:
        raise UserError(f"{unet.place}: neither num_heads nor num_head_channels is given")
    every = isinstance(unet.get("num_res_blocks"), (list, tuple))
    params: dict[str, Any] = {
        "model_channels": unet.whole("model_channels"), "channel_mult": mult,
        "num_res_blocks": unet.each("num_res_blocks", levels) if every else unet.whole("num_res_blocks"),
        "attention": "transformer" if text else "self", "groups": GROUPS, "head_channels": channels, "num_heads": heads or 1,
        "transformer_depth": [depths[level] if 2**level in where else 0 for level in range(levels)],
        "middle_depth": unet.whole("transformer_depth_middle", depths[-1]),
        "dropout": unet.number("dropout", 0.0), "dims": unet.among("dims", (1, 2, 3), 2),
        "attention_blocks": unet.each("num_attention_blocks", levels) if "num_attention_blocks" in unet else None,
        **{SAME[name]: unet.flag(name, default) for name, default in DEFAULTS.items() if isinstance(default, bool)},
    }  # fmt: skip
    if upward and not text and channels is None and unet.flag("legacy", True):
        params["up_heads"] = upward
    if any(unet.flags("disable_self_attentions") or []):
        params["cross_only"] = unet.flags("disable_self_attentions")
    if unet.flag("disable_middle_self_attn"):
        params["middle_cross_only"] = True
    if "num_classes" in unet:
        params["vector"] = unet.one("num_classes", VECTORS) if isinstance(unet["num_classes"], str) else "add"
    if mult[0] != 1:  # there the first convolution is as wide as the first level
        params |= {"time_channels": params["model_channels"], "model_channels": int(params["model_channels"] * mult[0]),
                   "channel_mult": [m / mult[0] for m in mult]}  # fmt: skip
    return {"target": UNET, "params": {name: value for name, value in params.items() if value is not None}}


def _number(unet: Said, name: str) -> int | None:
    """-1 stands for none."""
    return None if unet.get(name) == -1 else unet.whole(name, None)


def params_of(network: nn.Module, params: Mapping[str, Any], in_channels: int, out_channels: int, context_dim: int | None,
              vector_dim: int | None) -> dict:
    """The params of a UNetModel for a network that was built from these params (all of them, defaults too).

    Raises:
        UserError: where there is no such network there.
    """
    for name, value in (("patch_size", 1), ("qk_norm", False), ("ff_mult", 4), ("time_channels", None)):
        if params[name] != value:
            raise UserError(f"CompVis has no UNet with {name}: {params[name]!r}, only {value!r}")
    groups = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    if groups != {GROUPS}:
        raise UserError(f"CompVis' UNets have {GROUPS} groups in every normalisation, this one {sorted(groups)}: train with "
                        f"network.params.groups: {GROUPS}")
    mult, depths, middle = list(params["channel_mult"]), list(params["transformer_depth"]), network.middle[0].attention
    if mult[0] != 1 or middle is None:
        raise UserError(f"CompVis has no UNet with channel_mult that begins with {mult[0]}, only 1" if mult[0] != 1 else
                        "CompVis has no UNet without attention in the middle")
    found = {theirs: params[ours] for theirs, ours in SAME.items()
             if theirs not in DEFAULTS or params[ours] != DEFAULTS[theirs]}  # fmt: skip
    found |= {"image_size": 32, "in_channels": in_channels, "out_channels": out_channels, "channel_mult": mult,
              "attention_resolutions": [2**level for level, depth in enumerate(depths) if depth]}  # fmt: skip
    text = params["attention"] == "transformer"
    heads = params["num_heads"]
    heads = list(heads) if isinstance(heads, (list, tuple)) else [heads] * len(mult)
    widths = {int(params["model_channels"] * m) // n for m, n in zip(mult, heads, strict=True)}
    if params["head_channels"]:
        found["num_head_channels"] = params["head_channels"]
    elif len(set(heads)) == 1:
        found["num_heads"] = heads[0]
    elif len(widths) == 1:  # as diffusers says it of Stable Diffusion 2 and XL
        found["num_head_channels"] = widths.pop()
    else:
        raise UserError(f"CompVis has no UNet with num_heads {heads}: one number for all levels, or head_channels")
    if text:
        depth, inside = len(middle.blocks), {each for each in depths if each}
        found |= {"use_spatial_transformer": True, "context_dim": context_dim, "legacy": False,
                  "transformer_depth": depth if inside <= {depth} else [each or 1 for each in depths]}  # fmt: skip
        if not inside <= {depth}:
            found["transformer_depth_middle"] = depth
    if params["up_heads"]:
        found["num_heads_upsample"] = params["up_heads"]
    if params["cross_only"]:
        found["disable_self_attentions"] = list(params["cross_only"])
    if params["middle_cross_only"]:
        found["disable_middle_self_attn"] = True
    if vector_dim is not None and params["vector"] != "add":
        found |= {"mlp": {"num_classes": "sequential", "adm_in_channels": vector_dim}, "linear": {"num_classes": "continuous"}}[
            params["vector"]]
    return found
