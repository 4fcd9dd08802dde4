"""One part of a folder of diffusers: its config.json, and its weights in one file or several, mapped into memory."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.common.build import near
from ldm.common.files import UserError, one_line, parse_json
from ldm.interop import pickles

CONFIG = "config.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of the weights' names: of diffusers' models, of transformers'
KINDS = (  # what is taken first: all of the precision, then halves; the new format, then pickles; one file, then several
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".fp16.safetensors", ".fp16.safetensors.index.json",
    ".safetensors.index.fp16.json", ".fp16.bin", ".fp16.bin.index.json", ".bin.index.fp16.json",
)  # fmt: skip


def read_json(file: Path) -> dict:
    """UserError where it is not the names and values of a config."""
    try:
        found = parse_json(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected the names and values of a config, got a {type(found).__name__}")
    return found


def weights_file(folder: Path) -> Path:
    """The file of a part's weights, or the index of several. UserError where there is none."""
    for kind in KINDS:
        for stem in STEMS:
            name = f"{stem}{kind}"
            if (folder / name).is_file():
                return folder / name
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise UserError(f"{folder}: no weights; expected {STEMS[0]}.safetensors{near(STEMS[0] + '.safetensors', inside)}")


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """-> config, tensors."""
    return read_json(folder / CONFIG), read_weights(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    file = weights_file(folder)
    if file.suffix != ".json":
        return tensors_in(file)
    shards = read_json(file).get("weight_map")
    if (not isinstance(shards, Mapping)
            or not all(isinstance(name, str) and Path(name).name == name for name in shards.values())):  # fmt: skip
        raise UserError(f"{file}: expected a weight_map of names of files beside it")
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(shards.values()):
        found |= tensors_in(folder / name)
    lost = [name for name in shards if name not in found]
    if lost:
        raise UserError(f"{file}: {len(lost)} tensors are in none of the files that it names ({', '.join(lost[:3])})")
    return found


def tensors_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .bin, of which nothing is executed."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (no mapping)
        saved, strange = pickles.read(file)
    except (SafetensorError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: damaged, or no weights ({one_line(error)})") from error
    if not isinstance(saved, dict) or strange or not all(isinstance(value, Tensor) for value in saved.values()):
        raise UserError(f"{file}: expected a mapping of names to tensors" + f", it names {', '.join(strange)}" * bool(strange))
    return saved
