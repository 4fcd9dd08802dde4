"""LoRA (2106.09685): of a frozen layer W a low-rank change alone is trained, W + (alpha / rank) B A, by the peft library.

peft puts a layer of its own around each that it changes: "to_q.weight" is then called "to_q.base_layer.weight", and beside it
are "to_q.lora_A.default.weight" and "to_q.lora_B.default.weight". B begins at zero, so that the model begins as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ldm.common.build import near
from ldm.common.files import UserError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION = re.compile(r"(^|\.)((to_)?(q|k|v|qkv)|out(\.0)?)$")  # queries, keys, values and what joins the heads
INSERTED = ".base_layer"
MARK = ".lora_"


class Lora(TypedDict, total=False):
    """rank (8): of the changes; alpha (the rank): they count alpha / rank. targets ("attention"): which layers: those of
    attention, "all" linear layers and convolutions, or endings of names such as [to_q, ff.proj]. text (false): of the
    conditioner too. dropout (0): of what goes into A."""

    rank: int
    alpha: float
    targets: Literal["attention", "all"] | list[str]
    text: bool
    dropout: float


class Change(NamedTuple):
    """Of a layer: its weight becomes W + scale * up down. down (r,I,...) and up (O,r,...) as peft has them."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """(O, I, ...), flat after the first side, in float32."""
        return self.scale * self.up.float().flatten(1) @ self.down.float().flatten(1)


def problems(options: Mapping) -> list[str]:
    """Numbers that cannot be."""
    lowest = {"rank": (1, "a whole number from 1"), "alpha": (0, "a number above 0"), "dropout": (0, "a share below 1")}
    wrong = [f"{name}: {options[name]}; it takes {takes}" for name, (least, takes) in lowest.items()
             if name in options and (options[name] < least or (name == "alpha" and options[name] == 0)
                                     or (name == "dropout" and options[name] >= 1))]  # fmt: skip
    return wrong + (["targets: none are named"] if options.get("targets") == [] else [])


def chosen(model: nn.ModuleDict, options: Mapping) -> list[str]:
    """The names of the layers of denoiser and (with ``text``) conditioner that are to be changed. UserError where none is."""
    targets = options.get("targets", "attention")
    parts = ("denoiser", "conditioner") if options.get("text") else ("denoiser",)
    layers = [name for name, part in model.named_modules() if isinstance(part, LAYERS) and name.split(".")[0] in parts]
    if targets == "attention":
        found = [name for name in layers if ATTENTION.search(name) and isinstance(model.get_submodule(name), nn.Linear)]
    elif targets == "all":
        found = layers
    else:
        found = [name for name in layers if any(f".{name}".endswith(f".{ending}") for ending in targets)]
        for ending in targets:
            if not any(f".{name}".endswith(f".{ending}") for name in layers):
                endings = {".".join(name.split(".")[-k:]) for name in layers for k in (1, 2)}
                raise UserError(f"lora.targets: no layer ends in {ending!r}{near(ending, endings)}")
    for part in parts:
        if not any(name.split(".")[0] == part for name in found):
            raise UserError(f"lora: the {part} has no layers of its own that could be changed"
                            + ("; leave out text: true" if part == "conditioner" else ""))  # fmt: skip
    return found


def adapt(model: nn.ModuleDict, options: Mapping) -> None:
    """Freezes the model and puts adapters, which are trained, on the chosen layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"lora needs the peft library ({error}): pip install -c constraints.txt peft") from error
    layers, rank = chosen(model, options), options.get("rank", 8)
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=options.get("alpha", rank), lora_dropout=options.get("dropout", 0.0),
                        target_modules=layers)  # fmt: skip
    inject_adapter_in_model(config, model)


def changes(model: nn.Module) -> Iterator[tuple[str, Change]]:
    """(name of the layer, its change) for every adapter in a model."""
    for name, part in model.named_modules():
        if "default" in getattr(part, "lora_A", ()):
            down, up = (getattr(part, f"lora_{side}")["default"].weight.detach() for side in "AB")
            yield name, Change(down, up, float(part.scaling["default"]))


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without adapters, by the names that it would have if there were none."""
    return {key.replace(INSERTED, ""): value for key, value in state.items() if MARK not in key}


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Weights by the names of the module without adapters, which stay as they are."""
    names = {key.replace(INSERTED, ""): key for key in module.state_dict() if MARK not in key}
    module.load_state_dict({names[key]: value for key, value in weights.items()}, strict=False)


def adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone."""
    return {key: value for key, value in state.items() if MARK in key}


@torch.no_grad()
def merge(weight: nn.Parameter, delta: Tensor, share: float) -> None:
    """weight += share * delta, which has its size; in a tensor of its own: the old one may be a part of a file."""
    weight.data = (weight.float() + share * delta.to(weight.device).reshape(weight.shape)).to(weight.dtype)
