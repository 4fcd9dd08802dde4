"""Class-conditional DiT and SiT in the layout of their authors (facebookresearch/DiT, willisma/SiT), read and written.

A file holds a flat state dict, one that training wrote has two, "model" and "ema". The names are the same in both, and so
nothing in a file tells a DiT, which says DDPM's noise at steps 0..999, from a SiT, which says a velocity towards the data at
times from 0 (noise) to 1 (data). A config tells (model: SiT-XL/2), or else the file's name. The number of heads leaves no
trace either. A SiT becomes one of our flows here: its last layer changes sign, and the network is told 1 - t.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.build import TRUSTED, build, near
from ldm.common.files import UserError
from ldm.denoiser import linear_map
from ldm.interop.rows import SAME, Change, Row, back, check, inside, pair, to_us
from ldm.networks.dit import DiT, position_angles, sincos

log = logging.getLogger(__name__)

CONFIG = "args.json"  # what may lie beside a file: the arguments of their network's constructor
NETWORK, LABEL = "denoiser.network.", "conditioner.embedding.weight"
TARGETS = {"network": "ldm.networks.dit.DiT", "conditioner": "ldm.conditioners.label.ClassLabel"}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of S, B, L, XL, by width; others: heads of 64
LABELS, POSITIONS, LAST = "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear"
OUTER = {"x_embedder.proj": "patches", "t_embedder.mlp.0": "embedders.0.time.0", "t_embedder.mlp.2": "embedders.0.time.2",
         "final_layer.adaLN_modulation.1": "modulation_out"}  # fmt: skip
INNER = {"attn.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"), "attn.proj": ("attention.out.0",),
         "mlp.fc1": ("mlp.0",), "mlp.fc2": ("mlp.3",), "adaLN_modulation.1": ("modulation",)}  # fmt: skip
MEANT = ("hidden_size", "in_channels", "patch_size", "input_size", "depth", "mlp_ratio", "num_classes", "learn_sigma",
         "num_heads", "class_dropout_prob", "model", "path_type", "prediction", "autoencoder")
IGNORED = {  # arguments of their scripts that change no model
    "data_path", "feature_path", "results_dir", "image_size", "epochs", "global_batch_size", "global_seed", "seed", "vae",
    "num_workers", "log_every", "ckpt_every", "sample_every", "ckpt", "cfg_scale", "num_sampling_steps", "wandb", "tf32",
    "loss_weight", "sample_eps", "train_eps", "sample_dir", "per_proc_batch_size", "num_fid_samples", "likelihood", "mode",
}  # fmt: skip
GUIDED = {"scale": 4.0, "channels": 3}  # both guide three channels of the latents' four

NEGATED = Change(torch.neg, torch.neg)


class Kind(NamedTuple):
    """How a network is spoken to: our process, what it says in our words, what it is told of clean data and of pure noise,
    and the sign of its last layer in the file."""

    process: dict
    says: str
    told: list[float]
    sign: int


LINEAR, GVP = {"target": "ldm.process.RectifiedFlow"}, {"target": "ldm.process.Cosine"}
VP = {"target": "ldm.process.VP", "params": {"beta_min": 0.1, "beta_max": 20.0}}
DDPM = {"target": "ldm.process.DDPM", "params": {"schedule": "linear"}}
KINDS = {  # model, path_type and prediction of SiT
    ("DiT", "", ""): Kind(DDPM, "noise", [0.0, 1000.0], 1), ("SiT", "Linear", "velocity"): Kind(LINEAR, "flow", [1.0, 0.0], -1),
    ("SiT", "GVP", "velocity"): Kind(GVP, "velocity", [1.0, 0.0], -1),
    ("SiT", "VP", "velocity"): Kind(VP, "velocity", [1.0, 0.0], -1), ("SiT", "VP", "noise"): Kind(VP, "noise", [1.0, 0.0], 1),
}  # fmt: skip


def holds(keys: Iterable[str]) -> bool:
    """Whether these names are those of such a network."""
    return any(re.match(r"((model|ema|module|_orig_mod)\.)*blocks\.\d+\.adaLN_modulation\.1\.", key) for key in keys)


def flat(saved: Mapping) -> Mapping:
    """A training checkpoint's two state dicts as one; anything else as it is."""
    parts = {name: {str(key): value for key, value in saved[name].items()}
             for name in ("model", "ema") if isinstance(saved.get(name), Mapping)}  # fmt: skip
    if not any(holds(part) for part in parts.values()):
        return saved
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


def table(depth: int, sign: int = 1) -> list[Row]:
    """``sign``: of the last layer in the file."""
    layers = OUTER | {f"blocks.{block}.{theirs}": tuple(f"blocks.{block}.{name}" for name in ours)
                      for block in range(depth) for theirs, ours in INNER.items()}  # fmt: skip
    found = [row for theirs, ours in layers.items() for row in pair(ours, theirs)]
    change = SAME if sign > 0 else NEGATED
    return [*inside([*found, *pair("out", LAST, weight=change, bias=change)], NETWORK), Row((LABEL,), (LABELS,))]


def read(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of this model, and its weights by our names, averaged ones as "ema.*".

    Args:
        config: arguments of their constructor, of which num_heads is needed where the width does not tell; model, path_type
            and prediction as on their command lines; autoencoder: a block of ours, for pictures in place of latents.

    Raises:
        UserError: where names or shapes do not fit.
    """
    config = dict(config or {})
    if unknown := [name for name in config if name not in MEANT and name not in IGNORED]:
        raise UserError(f"{origin}: {unknown[0]}: no argument of DiT's or SiT's{near(unknown[0], MEANT)}")
    sets = {name: {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
            for name in ("model.", "ema.")}  # fmt: skip
    raw = sets["model."] or sets["ema."] or dict(tensors)
    sizes, kind = sizes_of(raw, config, origin), kind_of(config, origin)
    said, autoencoder = about(block_of(sizes, kind), sizes, kind, config, origin)
    expected = Bundle.from_config(said["config"]).state_dict()
    found = _weights(raw, expected, sizes, kind.sign, origin)
    if sets["model."] and sets["ema."]:
        averaged = _weights(sets["ema."], expected, sizes, kind.sign, origin)
        found |= {f"ema.{name}": value for name, value in averaged.items()}
    return said, found | autoencoder


def sizes_of(tensors: Mapping[str, Tensor], config: Mapping, origin: str) -> dict[str, Any]:
    """The arguments of their constructor, from the shapes; what the config says of them has to be the same."""
    shape = {key: tuple(value.shape) for key, value in tensors.items()}
    try:
        width, channels, patch, _ = shape["x_embedder.proj.weight"]
        sizes = {
            "hidden_size": width, "in_channels": channels, "patch_size": patch,
            "input_size": round(shape["pos_embed"][1] ** 0.5) * patch,
            "depth": 1 + max(int(found[1]) for key in shape if (found := re.match(r"blocks\.(\d+)\.", key))),
            "mlp_ratio": shape["blocks.0.mlp.fc1.weight"][0] / width,
            "num_classes": shape["y_embedder.embedding_table.weight"][0] - 1,
            "learn_sigma": shape["final_layer.linear.weight"][0] == 2 * channels * patch**2,
        }  # fmt: skip
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{origin}: a DiT whose sizes cannot be told from its weights ({error})") from error
    for name, value in sizes.items():
        if config.get(name, value) != value:
            raise UserError(f"{origin}: its config says {name}: {config[name]}, its weights {value}")
    heads = config.get("num_heads") or HEADS.get(width) or width // 64
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{origin}: into how many heads {width} numbers are divided leaves no trace in the weights; give a "
                        f"config with num_heads, or {CONFIG} beside the file")
    return sizes | {"num_heads": heads, "class_dropout_prob": config.get("class_dropout_prob", 0.1)}


def kind_of(config: Mapping, origin: str) -> Kind:
    """By what the config says of model, path_type or prediction, else by the file's name."""
    path, says = config.get("path_type"), config.get("prediction")
    model = str(config.get("model") or ("SiT" if path or says else ""))
    if not model:
        model, other = ("DiT", "SiT")[:: -1 if re.search(r"(?<![a-z])sit(?![a-z])", Path(origin).stem.lower()) else 1]
        log.info("%s: taken for a %s, by its name; a config may say otherwise (model: %s)", origin, model, other)
    key = (model[:3], path or "Linear", says or "velocity") if model[:3] == "SiT" else (model[:3], "", "")
    if key not in KINDS:
        raise UserError(f"{origin}: model, path_type, prediction: {_words(key)}; read are {', '.join(map(_words, KINDS))}")
    return KINDS[key]


def _words(key: tuple[str, ...]) -> str:
    return " ".join(filter(None, key))


def block_of(sizes: Mapping, kind: Kind = KINDS["DiT", "", ""]) -> dict:
    """Our block of the network that has these arguments of their constructor."""
    return {"target": TARGETS["network"], "params": {
        "width": sizes["hidden_size"], "depth": sizes["depth"], "heads": sizes["num_heads"], "patch_size": sizes["patch_size"],
        "mlp_ratio": sizes["mlp_ratio"], "vector": "direct", "told": kind.told}}  # fmt: skip


def about(network: Mapping, sizes: Mapping, kind: Kind, config: Mapping, origin: str) -> tuple[dict, dict[str, Tensor]]:
    """What a checkpoint of ours says of such a model, and the weights "autoencoder.*" of the one that the config names;
    without one, latents stay what they are."""
    channels, width = sizes["in_channels"], sizes["hidden_size"]
    block = config.get("autoencoder") or {"target": "autoencoder.base.Identity", "params": {"image_channels": channels}}
    made = build(block, allowed=TRUSTED)
    if made.channels != channels:
        raise UserError(f"{origin}: autoencoder: its latents have {made.channels} channels, the network takes {channels}")
    variance = "learned_range" if sizes["learn_sigma"] else "fixed"  # SiT has its channels too, and asks nothing of them
    label = {"classes": sizes["num_classes"], "dropout": sizes["class_dropout_prob"],
             "width": width * (sizes["depth"] if network["params"].get("embedders") == "own" else 1)}  # fmt: skip
    model = {"target": "ldm.lit.DiffusionModule", "params": {
        "network": network, "conditioner": {"target": TARGETS["conditioner"], "params": label},
        "process": kind.process, "parameterization": kind.says, "variance": variance}}  # fmt: skip
    ancestral = {"name": "ddpm", "variance": "learned_range" if sizes["learn_sigma"] else "large"}
    sampling = {"sampler": ancestral, "steps": 250, "times": "linspace"} if kind.sign > 0 else {"sampler": "heun", "steps": 50}
    sampling |= {"guidance": GUIDED, "size": [sizes["input_size"] * made.factor] * 2}
    whole = {"autoencoder": getattr(made, "block", block), "model": model}
    weights = {f"autoencoder.{name}": value for name, value in made.state_dict().items()}
    return {"kind": "diffusion", "config": whole, "sampling": sampling, "layout": "dit"}, weights


def _weights(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], sizes: Mapping, sign: int,
             origin: str) -> dict[str, Tensor]:
    rows = table(sizes["depth"], sign)
    found = to_us(rows, tensors)
    check(rows, tensors, without_autoencoder(expected), found, origin, lambda name: name == POSITIONS)
    positions, given = positions_of(sizes), tensors[POSITIONS]
    if given.shape != positions.shape or not torch.allclose(given.float(), positions, atol=1e-3):
        raise UserError(f"{origin}: {POSITIONS} is not the fixed table of sines and cosines; learned positions are not read")
    return found


def without_autoencoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("autoencoder.")}


def positions_of(sizes: Mapping) -> Tensor:  # (1,N,D)
    side = sizes["input_size"] // sizes["patch_size"]
    return sincos(position_angles(side, side, sizes["hidden_size"])).float()[None]


def write(bundle: Bundle) -> tuple[dict[str, Tensor], dict]:
    """The bundle's network and classes as their authors have them: the state dict, and the arguments that go with it.

    Raises:
        UserError: where that layout has no place for the model.
    """
    params, sizes = settings(bundle, "DiT", embedders="shared", base_size=None, endpoint=False, mlp_eps=1e-6)
    found = [key for key, kind in KINDS.items() if list(params["told"]) == kind.told and _speaks(bundle, kind)]
    if not found:
        said = f"{type(bundle.denoiser.process).__name__}, {bundle.denoiser.parameterization}, told {list(params['told'])}"
        raise UserError(f"the layout of DiT has no model of {said}; it has {', '.join(map(_words, KINDS))}")
    weights = {name: value.detach().cpu().contiguous() for name, value in bundle.state_dict().items()}
    tensors = {POSITIONS: positions_of(sizes)} | back(table(sizes["depth"], KINDS[found[0]].sign), weights)
    model, path, says = found[0]
    return tensors, {"model": model, **sizes, **({"path_type": path, "prediction": says} if path else {})}


def _speaks(bundle: Bundle, kind: Kind) -> bool:
    """Whether the bundle's denoiser has the process of this kind, and its network says the same."""
    process = build(kind.process)
    times = torch.linspace(process.t_min, process.t_max, 7, dtype=torch.float64).round(decimals=3)
    ours, theirs = bundle.denoiser.exact(times), linear_map(process, kind.says, times)
    return bundle.denoiser.process.t_max == process.t_max and all(map(torch.allclose, ours, theirs))


def settings(bundle: Bundle, where: str, **only: object) -> tuple[dict, dict]:
    """For writing: the settings of the bundle's network, and its sizes as arguments of DiT's constructor.

    Raises:
        UserError: unless it is a DiT of classes alone, whose settings are these where there is no other.
    """
    blocks = bundle.config["model"]["params"]
    for part, target in TARGETS.items():
        if (found := (blocks.get(part) or {}).get("target")) != target:
            raise UserError(f"{where} has no {part} {found}, only {target}")
    signature = inspect.signature(DiT).parameters
    params = {name: one.default for name, one in signature.items()} | dict(blocks["network"].get("params") or {})
    label, network = bundle.conditioner, bundle.denoiser.network
    for name, value in {"positions": "sincos", "vector": "direct", "qk_norm": False, **only}.items():
        if params[name] != value:
            raise UserError(f"{where} has no network with {name}: {params[name]!r}, only {value!r}")
    size = bundle.sampling.get("size")
    if label.vector_width is None:
        raise UserError(f"{where} has classes as vectors (conditioner.params.to: vector), not as tokens")
    if not size or size[0] != size[1]:
        raise UserError(f"{where} has square pictures of one size (sampling.size: [S, S]), here: {size}")
    channels = bundle.autoencoder.channels
    return params, {
        "input_size": size[0] // bundle.autoencoder.factor, "patch_size": params["patch_size"], "in_channels": channels,
        "hidden_size": params["width"], "depth": params["depth"], "num_heads": params["heads"],
        "mlp_ratio": params["mlp_ratio"], "class_dropout_prob": label.dropout, "num_classes": len(label.embedding.weight) - 1,
        "learn_sigma": network.out.out_features == 2 * channels * params["patch_size"] ** 2}  # fmt: skip
