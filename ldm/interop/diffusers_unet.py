"""diffusers' settings of a UNet (config.json of UNet2DConditionModel and UNet2DModel) as a block of ours, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.interop.compvis_unet import GROUPS, UNET
from ldm.interop.said import Said
from ldm.networks.unet import UNet

TEXT, PLAIN = "UNet2DConditionModel", "UNet2DModel"
BLOCKS = {  # names of blocks of the way down -> kind of attention; those of the way up have Up in place of Down
    "CrossAttnDownBlock2D": "transformer", "AttnDownBlock2D": "self", "DownBlock2D": None, "ResnetDownsampleBlock2D": None,
}  # fmt: skip
ONLY = {  # settings that have one value here; others build another network
    "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,), "downsample_padding": (1,), "mid_block_scale_factor": (1,), "dual_cross_attention": (False,),
    "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1.0,), "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,), "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "cross_attention_norm": (None,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "reverse_transformer_layers_per_block": (None,), "attn_norm_num_groups": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None, "projection", "simple_projection", "identity"),
    "resnet_time_scale_shift": ("default", "scale_shift"), "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}  # fmt: skip
READ_HERE = ("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
             "attention_head_dim", "num_attention_heads", "transformer_layers_per_block", "cross_attention_dim",
             "use_linear_projection", "only_cross_attention", "norm_num_groups", "dropout",
             "num_class_embeds", "projection_class_embeddings_input_dim", "addition_time_embed_dim",
             "add_attention")  # fmt: skip
IGNORED = ("sample_size", "upcast_attention", "addition_embed_type_num_heads", "num_train_timesteps",
           "mid_block_only_cross_attention")  # fmt: skip  (the last: its middle block does not look at it)


class Sizes(NamedTuple):
    """What the parts around the network decide, and what diffusers calls the layers of the vector."""

    in_channels: int
    out_channels: int
    context_dim: int | None = None
    vector_dim: int | None = None
    vector: str = "add_embedding"


def block_of(config: Mapping, origin: str) -> tuple[dict, Sizes]:
    """Our block of the network that a config.json describes, and the sizes that it takes. UserError for what has no
    counterpart."""
    kind = config.get("_class_name")
    if kind not in (TEXT, PLAIN):
        raise UserError(f"{origin}: _class_name: {kind!r}; read are {TEXT} and {PLAIN}")
    for name, value in config.items():
        if name in ONLY and value not in ONLY[name]:
            raise UserError(f"{origin}: {name}: {value!r} has no counterpart here; read is "
                            f"{' or '.join(map(repr, ONLY[name]))}")
        if name not in (*ONLY, *READ_HERE, *IGNORED) and not name.startswith("_") and value is not None:
            raise UserError(f"{origin}: {name}: {value!r} has no counterpart here{near(name, READ_HERE)}")
    said, text = Said(config, origin), kind == TEXT
    widths = said.wholes("block_out_channels", [320, 640, 1280, 1280] if text else [224, 448, 672, 896])
    levels = len(widths)
    attended, resnets = _levels(said, text, levels)
    depth, only = said.each("transformer_layers_per_block", levels), said.get("only_cross_attention", False)
    if config.get("norm_num_groups", GROUPS) is None or not widths:
        raise UserError(f"{origin}: norm_num_groups and block_out_channels: expected numbers, got null or none")
    every = isinstance(said.get("layers_per_block"), (list, tuple))
    params: dict[str, Any] = {
        "model_channels": widths[0], "channel_mult": [_ratio(width, widths[0]) for width in widths],
        "num_res_blocks": said.each("layers_per_block", levels) if every else said.whole("layers_per_block", 2),
        "attention": "transformer" if text else "self",
        "transformer_depth": [layers if there else 0 for layers, there in zip(depth, attended, strict=True)],
        "middle_depth": depth[-1] if said.flag("add_attention", True) else 0, "groups": said.whole("norm_num_groups", GROUPS),
        "scale_shift": said.get("resnet_time_scale_shift") == "scale_shift", "dropout": said.number("dropout", 0.0),
        "resblock_updown": resnets,
    }  # fmt: skip
    if text:
        heads = said.each("num_attention_heads" if said.get("num_attention_heads") else "attention_head_dim", levels, 8)
        params |= {"linear_projections": said.flag("use_linear_projection"),
                   "num_heads": heads if len(set(heads)) > 1 else heads[0]}  # fmt: skip
        if only is not False:
            params["cross_only"] = said.flags("only_cross_attention") if isinstance(only, (list, tuple)) else [said.flag(
                "only_cross_attention")] * levels
    elif config.get("attention_head_dim", 8) is None:
        params["num_heads"] = 1
    else:
        params["head_channels"] = said.whole("attention_head_dim", 8)  # here the name says what it is
    vector, width, name = _vector(said, widths[0])
    params |= {"vector": vector} if vector else {}
    contexts = set(said.each("cross_attention_dim", levels, 1280)) if text else {None}
    if len(contexts) > 1:
        raise said.refused("cross_attention_dim", "one width for all levels")
    given, made = (said.whole(name, 4 if text else 3) for name in ("in_channels", "out_channels"))
    return {"target": UNET, "params": params}, Sizes(given, made, contexts.pop(), width, name)


def config_of(network: UNet, params: Mapping[str, Any], sizes: Sizes, size: int | None = None) -> dict:
    """config.json for a network that was built from these params (all of them, defaults too). UserError where diffusers has
    no such network.

    size: side of the latents that it was trained on.
    """
    for name, value in (("patch_size", 1), ("qk_norm", False), ("dims", 2), ("conv_resample", True), ("ff_mult", 4),
                        ("attention_blocks", None), ("up_heads", None), ("middle_cross_only", False)):  # fmt: skip
        if params[name] != value:
            raise UserError(f"diffusers has no UNet with {name}: {params[name]!r}, only {value!r}")
    depths, levels = list(params["transformer_depth"]), len(params["channel_mult"])
    text = params["attention"] == "transformer" and any(depths)
    widths = [int(params["model_channels"] * m + 1e-6) for m in params["channel_mult"]]
    if params["time_channels"] not in (None, widths[0]) or widths[0] != params["model_channels"]:
        raise UserError("diffusers has no UNet whose first convolution or time embedding has another width than its first "
                        f"level: model_channels {params['model_channels']}, channel_mult {list(params['channel_mult'])}")
    groups = {module.num_groups for module in network.modules() if hasattr(module, "num_groups")}
    if len(groups) > 1:
        raise UserError(f"diffusers has no UNet whose normalisations have different numbers of groups ({sorted(groups)}): "
                        "train with network.params.groups, such as 32")
    kinds = ["CrossAttnDownBlock2D" if text else "AttnDownBlock2D",
             "ResnetDownsampleBlock2D" if params["resblock_updown"] else "DownBlock2D"]  # fmt: skip
    down = [kinds[0] if depth else kinds[1] for depth in depths]
    middle = network.middle[0].attention
    config = {
        "_class_name": TEXT if text else PLAIN, "sample_size": size, "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels, "block_out_channels": widths, "norm_num_groups": groups.pop(),
        "layers_per_block": params["num_res_blocks"], "dropout": params["dropout"],
        "down_block_types": down, "up_block_types": [_up(name) for name in reversed(down)],
        "resnet_time_scale_shift": "scale_shift" if params["scale_shift"] else "default",
    }  # fmt: skip
    heads = [width // params["head_channels"] for width in widths] if params["head_channels"] else per_level(
        params["num_heads"], levels)
    if text:
        if params["resblock_updown"] or middle is None:
            raise UserError("diffusers has no UNet with text and resblock_updown: true, or without attention in the middle")
        layers = [depth or 1 for depth in depths]
        layers[-1] = len(middle.blocks)
        if depths[-1] not in (0, layers[-1]):
            raise UserError(f"diffusers has no UNet whose middle_depth ({layers[-1]}) is another than its last level's")
        only = list(params["cross_only"] or [])
        config |= {
            "cross_attention_dim": sizes.context_dim, "attention_head_dim": heads if len(set(heads)) > 1 else heads[0],
            "transformer_layers_per_block": layers if len(set(layers)) > 1 else layers[0],
            "use_linear_projection": params["linear_projections"], "only_cross_attention": only or False,
        }  # fmt: skip
    else:
        narrow = {width // n for width, n, depth in zip(widths, heads, depths, strict=True) if depth}
        narrow |= set() if middle is None else {widths[-1] // heads[-1]}
        if len(narrow) > 1:
            raise UserError(f"diffusers' {PLAIN} has heads of one width; these are {sorted(narrow)} wide")
        config |= {"attention_head_dim": narrow.pop() if narrow else 8, "add_attention": middle is not None}
        if params["resblock_updown"]:
            config |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if sizes.vector_dim is not None:
        config |= _vector_config(params["vector"], sizes, text)
    return config


def _levels(said: Said, text: bool, levels: int) -> tuple[list[bool], bool]:
    """Whether each level attends, and whether resolutions change inside residual blocks. UserError where the way up does not
    mirror the way down, or levels differ in the latter."""
    kind = "transformer" if text else "self"
    known = {name: attends for name, attends in BLOCKS.items() if attends in (kind, None)}
    default = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"] if text else ["DownBlock2D"] + ["AttnDownBlock2D"] * 3
    down, up = said.get("down_block_types", default), said.get("up_block_types", [_up(name) for name in reversed(default)])
    for name, given, accepted in (("down_block_types", down, list(known)), ("up_block_types", up, list(map(_up, known)))):
        if not isinstance(given, (list, tuple)) or any(each not in accepted for each in given) or len(given) != levels:
            raise UserError(f"{said.place}: {name}: {given}; expected {levels} of {', '.join(accepted)}")
    attended = [known[each] is not None for each in down]
    if [known[_down(each)] is not None for each in up][::-1] != attended:
        raise UserError(f"{said.place}: up_block_types do not mirror down_block_types; read are those that do")
    resnets = {_resnet(each, said.get("downsample_type")) for each in down[:-1]}
    resnets |= {_resnet(_down(each), said.get("upsample_type")) for each in up[:-1]}
    if len(resnets) > 1:
        raise UserError(f"{said.place}: some levels change their resolution inside a residual block and some do not "
                        f"(down_block_types {down}, up_block_types {up}, downsample_type, upsample_type); read are all alike")
    return attended, resnets == {True}


def _resnet(name: str, kind: str | None) -> bool:
    return name == "ResnetDownsampleBlock2D" or (name == "AttnDownBlock2D" and kind == "resnet")


def _up(name: str) -> str:
    return name.replace("Downsample", "Upsample").replace("DownBlock", "UpBlock")


def _down(name: str) -> str:
    return name.replace("Upsample", "Downsample").replace("UpBlock", "DownBlock")


def _vector(said: Said, first: int) -> tuple[str | None, int | None, str]:
    """How the condition's vector joins, its width, and the name of its layers. ``first``: width of the first level."""
    kind, classes = said.get("class_embed_type"), said.whole("num_class_embeds", None)
    if said.get("addition_embed_type") == "text_time":
        if kind is not None or classes is not None:
            raise said.refused("addition_embed_type", "it alone, without "
                               f"class_embed_type {kind!r} and num_class_embeds {classes}")
        return "mlp", said.whole("projection_class_embeddings_input_dim"), "add_embedding"
    if kind == "projection":
        return "mlp", said.whole("projection_class_embeddings_input_dim"), "class_embedding"
    if kind == "simple_projection":
        return "linear", said.whole("projection_class_embeddings_input_dim"), "class_embedding"
    if kind == "identity" or classes is not None:
        return "add", 4 * first, "class_embedding"
    return None, None, "add_embedding"


def _vector_config(vector: str, sizes: Sizes, text: bool) -> dict:
    if vector == "add":
        return {"class_embed_type": "identity"}  # the conditioner's own table replaces it, where there is one
    if not text:
        raise UserError(f"diffusers' {PLAIN} has no vector of another width than the embedding of time")
    if vector == "linear":
        return {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": sizes.vector_dim}
    name = {"add_embedding": {"addition_embed_type": "text_time"}, "class_embedding": {"class_embed_type": "projection"}}
    return {**name[sizes.vector], "projection_class_embeddings_input_dim": sizes.vector_dim}


def per_level(given: Any, levels: int) -> list:
    return list(given) if isinstance(given, (list, tuple)) else [given] * levels


def _ratio(width: int, first: int) -> int | float:
    return width // first if width % first == 0 else width / first
