"""DiT in the layout of diffusers (DiTTransformer2DModel, Transformer2DModel before 0.28), read and written without it.

A folder holds config.json and diffusion_pytorch_model.safetensors. Every block has a copy of the embedders of time and class:
copies that are all the same are read as one, others as each block's own. Three numbers differ from the authors' DiT: the
frequencies of time go down to 1 / 10000 itself; the norm before the feed-forward layer has its own epsilon; and pictures
of another size than sample_size have their positions brought to its grid.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.interop.dit import KINDS, LABEL, NETWORK, TARGETS, about, settings, without_autoencoder
from ldm.interop.rows import Change, Row, back, check, inside, pair, to_us

log = logging.getLogger(__name__)

CONFIG = "config.json"
NAMES = ("DiTTransformer2DModel", "Transformer2DModel")
DEFAULTS = {  # of its constructor
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
    "dropout": 0.0, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-5,
}  # fmt: skip
FIXED = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
         "norm_elementwise_affine": False}  # fmt: skip
OUTER = {"patches": "pos_embed.proj", "modulation_out": "proj_out_1", "out": "proj_out_2"}
INNER = {"attention.to_q": "attn1.to_q", "attention.to_k": "attn1.to_k", "attention.to_v": "attn1.to_v",
         "attention.out.0": "attn1.to_out.0", "mlp.0": "ff.net.0.proj", "mlp.3": "ff.net.2",
         "modulation": "norm1.linear"}  # fmt: skip
TIME = {"time.0": "norm1.emb.timestep_embedder.linear_1", "time.2": "norm1.emb.timestep_embedder.linear_2"}
CLASS = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"


def holds(keys: Iterable[str]) -> bool:
    """Whether these names are those of such a network."""
    return any(re.match(r"transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.", key) for key in keys)


def table(depth: int, own: bool) -> list[Row]:
    """``own``: every block has embedders of its own; else those of the first are all that there is."""
    rows = [row for name, theirs in OUTER.items() for row in pair(name, theirs)]
    for block in range(depth):
        place = f"transformer_blocks.{block}."
        rows += [row for name, theirs in INNER.items() for row in pair(f"blocks.{block}.{name}", place + theirs)]
        if own or block == 0:
            rows += [row for name, theirs in TIME.items() for row in pair(f"embedders.{block}.{name}", place + theirs)]
    count = depth if own else 1
    classes = Row((LABEL,), tuple(CLASS.format(block) for block in range(count)), side_by_side(count))
    return [*inside(rows, NETWORK), classes]


def side_by_side(count: int) -> Change:
    """So many tables one below the other there, one beside the other here."""
    return Change(lambda w: torch.cat(w.chunk(count), dim=1), lambda w: torch.cat(w.chunk(count, dim=1)))


def first_of(name: str) -> str:
    """Of a tensor of a block's embedders, that of the first block."""
    return re.sub(r"^transformer_blocks\.\d+(\.norm1\.emb\.)", r"transformer_blocks.0\1", name)


def sizes_of(config: Mapping, origin: str = CONFIG) -> dict[str, Any]:
    """The numbers in a config.json, as arguments of the constructor of DiT's authors. UserError for what is no such network."""
    if config.get("_class_name", NAMES[0]) not in NAMES:
        raise UserError(f"{origin}: {CONFIG}: _class_name: {config['_class_name']}; expected {NAMES[0]}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{origin}: {CONFIG}: {name}: {config[name]!r}; read is {value!r} alone")
    given = DEFAULTS | {name: config[name] for name in DEFAULTS if config.get(name) is not None}
    channels = given["in_channels"]
    outward = given["out_channels"] or channels
    if outward not in (channels, 2 * channels):
        raise UserError(f"{origin}: {CONFIG}: out_channels: {outward}; read are {channels}, and {2 * channels} with a variance")
    return {
        "input_size": given["sample_size"], "patch_size": given["patch_size"], "in_channels": channels,
        "hidden_size": given["num_attention_heads"] * given["attention_head_dim"], "depth": given["num_layers"],
        "num_heads": given["num_attention_heads"], "mlp_ratio": 4.0, "class_dropout_prob": 0.1,
        "num_classes": given["num_embeds_ada_norm"], "learn_sigma": outward == 2 * channels, "dropout": given["dropout"],
        "norm_eps": given["norm_eps"]}  # fmt: skip


def block_of(config: Mapping, origin: str = CONFIG, own: bool = False) -> dict:
    """Our block of the network that a config.json describes; ``own``: see ``has_own``."""
    sizes = sizes_of(config, origin)
    return {"target": TARGETS["network"], "params": {
        "width": sizes["hidden_size"], "depth": sizes["depth"], "heads": sizes["num_heads"], "patch_size": sizes["patch_size"],
        "base_size": sizes["input_size"] // sizes["patch_size"], "vector": "direct", "embedders": "own" if own else "shared",
        "endpoint": True, "mlp_eps": sizes["norm_eps"], "dropout": sizes["dropout"]}}  # fmt: skip


def has_own(tensors: Mapping[str, Tensor], depth: int) -> bool:
    """Whether the blocks' embedders differ."""
    ends = [f"{theirs}.{part}" for theirs in TIME.values() for part in ("weight", "bias")] + [CLASS.partition("{}.")[2]]
    every = [[tensors.get(f"transformer_blocks.{block}.{end}") for block in range(depth)] for end in ends]
    return any(one is None or first is None or not torch.equal(first, one) for first, *rest in every for one in rest)


def read(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of this model, and its weights by our names. The noise process is DDPM's with a
    linear schedule, as DiT was trained with: a transformer's config.json does not say; its pipeline's scheduler does.

    Args:
        config: the content of config.json; beside that autoencoder, a block of ours, for pictures in place of latents.

    Raises:
        UserError: where names or shapes do not fit.
    """
    if config is None or "num_attention_heads" not in config:
        raise UserError(f"{origin}: a DiT of diffusers; its {CONFIG} is expected beside it")
    sizes = sizes_of(config, origin)
    network = block_of(config, origin, has_own(tensors, sizes["depth"]))
    said, autoencoder = about(network, sizes, KINDS["DiT", "", ""], config, origin)
    said["layout"], said["sampling"]["guidance"] = "diffusers", 4.0  # on all channels
    return said, weights_of(tensors, config, origin) | autoencoder


def weights_of(tensors: Mapping[str, Tensor], config: Mapping, origin: str) -> dict[str, Tensor]:
    """Network and classes alone: "denoiser.network.*" and "conditioner.embedding.weight"."""
    sizes = sizes_of(config, origin)
    own = has_own(tensors, sizes["depth"])
    said, _ = about(block_of(config, origin, own), sizes, KINDS["DiT", "", ""], {}, origin)
    given = {name: value for name, value in tensors.items() if own or first_of(name) == name}
    rows, expected = table(sizes["depth"], own), without_autoencoder(Bundle.from_config(said["config"]).state_dict())
    found = to_us(rows, given)
    check(rows, given, expected, found, origin, lambda name: name == "pos_embed.pos_embed")  # computed here
    return found


def write(bundle: Bundle) -> tuple[dict[str, Tensor], dict]:
    """The bundle's network and classes as diffusers has them: weights, and what goes into config.json.

    Raises:
        UserError: where it has no place for the network.
    """
    params, sizes = settings(bundle, "diffusers", mlp_ratio=4.0)
    if list(params["told"]) != KINDS["DiT", "", ""].told:
        raise UserError(f"diffusers tells its DiT steps 0..1000; this one is told {list(params['told'])}")
    if not params["endpoint"]:
        log.warning("diffusers spaces the frequencies of its DiT's time a little wider (endpoint: true) than those that this "
                    "network was trained with: there, its pictures are others")
    if params["base_size"] not in (None, sizes["input_size"] // sizes["patch_size"]):
        sizes["input_size"] = params["base_size"] * sizes["patch_size"]
    heads, channels = sizes["num_heads"], sizes["in_channels"]
    config = {
        "_class_name": NAMES[0], **FIXED, "num_attention_heads": heads, "attention_head_dim": sizes["hidden_size"] // heads,
        "in_channels": channels, "out_channels": channels * (2 if sizes["learn_sigma"] else 1), "num_layers": sizes["depth"],
        "dropout": params["dropout"], "sample_size": sizes["input_size"], "patch_size": sizes["patch_size"],
        "num_embeds_ada_norm": sizes["num_classes"], "norm_eps": params["mlp_eps"]}  # fmt: skip
    weights = {name: value.detach().cpu() for name, value in bundle.state_dict().items()}
    every = [name for row in table(sizes["depth"], own=True) for name in row.theirs]
    found = back(table(sizes["depth"], params["embedders"] == "own"), weights)
    return {name: found.get(name, found[first_of(name)]).contiguous().clone() for name in every}, config
