"""LoRA files on models: what training leaves is written for diffusers, what anybody's training left is merged into a model.

    bundle = ldm.load("model.safetensors")
    ldm.lora.apply(bundle, "pytorch_lora_weights.safetensors", weight=0.8)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.adapters import changes, merge
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.conditioners.clip import ClipText
from ldm.interop import lora_files, text_names, unet_names
from ldm.interop.rows import Row, back, existing, size, to_us
from ldm.networks.unet import UNet

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Of a layer in somebody's names: the module of ours that it is in, and the row of its weight there."""

    module: nn.Module
    row: Row
    theirs: str  # of the row's


def apply(bundle: Bundle, path: str | Path, weight: float = 1.0) -> int:
    """Merges a LoRA into the weights of a bundle; gives back how many of its layers were changed.

    Args:
        path: diffusers' pytorch_lora_weights.safetensors (new and old names), peft's adapter_model.safetensors, kohya's, a
            folder with one of these, or the checkpoint or run folder of a LoRA training here.
        weight: how much of it; below 0 it is taken away.

    Raises:
        UserError: where it is no LoRA, or one of another model; then nothing is changed.
    """
    if bundle.denoiser is None:
        raise UserError(f"{path}: a LoRA changes diffusion models; this checkpoint holds an autoencoder alone")
    found, parts = lora_files.read(path), places(bundle)
    placed = {layer: lora_files.named(layer, parts) for layer in found}
    lost = [layer for layer, place in placed.items() if place is None]
    if lost:
        raise UserError(f"{path}: {len(lost)} of its {len(found)} layers are none of this model ({lora_files.grouped(lost)}); "
                        "it belongs to another one")
    deltas: dict[int, tuple[Place, dict[str, Tensor]]] = {}
    for layer, place in placed.items():
        deltas.setdefault(id(place.row), (place, {}))[1][place.theirs] = found[layer].delta()
    for merging in (False, True):  # all fit, or none is merged
        for place, given in deltas.values():
            _merge(place, given, weight, merging, str(path))
    log.info("%s: %d layers changed, weight %g", path, len(found), weight)
    return len(found)


def _merge(place: Place, given: dict[str, Tensor], weight: float, merging: bool, origin: str) -> None:
    """A row's layers: those of theirs that are stacked in ours together."""
    own = dict(place.module.named_parameters())
    shapes = back([place.row], {name: own[name].detach() for name in place.row.ours})
    for name, delta in given.items():
        expected = shapes[name]
        if len(delta) != len(expected) or delta.numel() != expected.numel():
            raise UserError(f"{origin}: {name} is changed by {size(delta)}, but the model's is {size(expected)}; it belongs to "
                            "another model")
    if merging:
        whole = {name: given[name].reshape(like.shape) if name in given else torch.zeros_like(like, dtype=torch.float32)
                 for name, like in shapes.items()}  # fmt: skip
        for name, delta in to_us([place.row], whole).items():
            merge(own[name], delta, weight)


def places(bundle: Bundle) -> dict[str, dict[str, Place]]:
    """Part -> name of a layer -> where it is here: in the names of diffusers, CompVis and our own."""
    network, conditioner = bundle.denoiser.network, bundle.conditioner
    found = {"denoiser": _own(bundle.denoiser), "conditioner": {} if conditioner is None else _own(conditioner)}
    if isinstance(network, UNet):
        tables = [unet_names.rows(network, "compvis"), unet_names.rows(network, "diffusers", vector="class_embedding"),
                  unet_names.rows(network, "diffusers")]  # fmt: skip
        found["unet"] = _table(network, [row for table in tables for row in table])
    for name, module in text_encoders(conditioner).items():
        layers, projection = len(module.transformer.blocks), module.projection is not None
        rows = [row for wrapped in (False, True) for row in text_names.hf_clip(layers, "", wrapped, projection)]
        found[name] = _table(module, rows)
    return found


def text_encoders(conditioner: nn.Module | None) -> dict[str, ClipText]:
    """By the names that they have in a pipeline."""
    parts = [] if conditioner is None else [part for part in conditioner.modules() if isinstance(part, ClipText)]
    return {f"text_encoder{f'_{i + 1}' if i else ''}": part for i, part in enumerate(parts)}


def _table(module: nn.Module, rows: Iterable[Row]) -> dict[str, Place]:
    weights = [name for name, _ in module.named_parameters()]
    return {theirs.removesuffix(".weight"): Place(module, row, theirs) for row in existing(rows, weights)
            for theirs in row.theirs if theirs.endswith(".weight")}  # fmt: skip


def _own(module: nn.Module) -> dict[str, Place]:
    rows = [Row((name,), (name,)) for name, _ in module.named_parameters()]
    return _table(module, rows)


# What training leaves.


def save(denoiser: nn.Module, conditioner: nn.Module | None, path: str | Path) -> None:
    """The adapters of a denoiser and its conditioner (``ldm.adapters.adapt``) as diffusers' ``load_lora_weights`` takes them.
    Where diffusers has no such layer its name is ours ("conditioner.blocks.0.out"), which ``apply`` reads."""
    model = nn.ModuleDict({"denoiser": denoiser} | ({} if conditioner is None else {"conditioner": conditioner}))
    known, written = destinations(model), {}
    for name, change in changes(model):
        part, names = known.get(name) or (name.partition(".")[0], (name.partition(".")[2],))
        # of a layer that is several there each has the same A, and its rows of B
        divided = (change._replace(up=up) for up in change.up.chunk(len(names)))
        written.setdefault(part, {}).update(zip(names, divided, strict=True))
    lora_files.write(Path(path), written)


def destinations(model: nn.ModuleDict) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Our layer -> part and names in diffusers' pipelines."""
    tables = []
    if isinstance(model["denoiser"].network, UNet):
        tables.append(("unet", "denoiser.network", unet_names.rows(model["denoiser"].network, "diffusers")))
    modules = {id(part): name for name, part in model.named_modules()}
    for name, part in text_encoders(model["conditioner"] if "conditioner" in model else None).items():
        tables.append((name, modules[id(part)], text_names.hf_clip(len(part.transformer.blocks))))
    return {f"{prefix}.{row.ours[0].removesuffix('.weight')}": (part, tuple(t.removesuffix(".weight") for t in row.theirs))
            for part, prefix, rows in tables for row in rows if row.ours[0].endswith(".weight")}  # fmt: skip
