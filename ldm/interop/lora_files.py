"""LoRA files: diffusers' format, new and old, peft's and kohya's are read, diffusers' is written.

All are pairs of matrices by the name of a layer. diffusers: unet.<its name>.lora_A.weight (once .processor.to_q_lora.down),
text_encoder.<transformers' name>...; peft: base_model.model.<name>.lora_A.weight, and adapter_config.json beside; kohya:
lora_unet_<name with _ for .>.lora_down.weight and .alpha, in the names of diffusers or of CompVis.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.adapters import Change
from ldm.common.files import UserError, atomic_write, one_line, parse_json
from ldm.interop import component, pickles
from ldm.interop.rows import some

WEIGHTS, PEFT, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' settings of each part, as JSON: "unet.lora_alpha" ...
OWN = "ldm"  # ours, in a checkpoint
SIDE = re.compile(r"^(.+?)[._](?:lora_(A|B|down|up)|lora(?:_linear_layer)?\.(down|up))(?:\.default)?\.weight$")
DOWN = ("A", "down")
KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
PARTS = ("unet", "text_encoder", "text_encoder_2", "denoiser", "conditioner")  # the last two in our names
OLD = {"to_out": "to_out.0"}
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
NOT_READ = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
            "lora_mid": "CP-decomposed", ".bias": "biased"}  # fmt: skip
NAMED = ("dora_", "hada_", "lokr_")  # of changes that have no "lora" in their names

Layer = tuple[str | None, str]  # part (None: not said), name of a layer in it


def read(path: str | Path) -> dict[Layer, Change]:
    """The changes in a file, or in a folder that holds one. UserError for all that is none, or of a kind that is not read."""
    file = find(Path(path).expanduser())
    tensors, about = contents(file)
    if not any("lora" in key or mark in key for key in tensors for mark in NAMED):
        raise UserError(f"{file}: no LoRA: none of its {len(tensors)} tensors ({some(list(tensors))}) is a change of a layer; "
                        "a whole model is given as --ckpt")
    for mark, kind in NOT_READ.items():
        if any(mark in key for key in tensors):
            name = next(key for key in tensors if mark in key)
            raise UserError(f"{file}: its changes are of the kind {kind} ({name}); read are those of plain LoRA")
    sides: dict[str, dict[str, Tensor]] = {}
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    left = []
    for key, value in tensors.items():
        found = SIDE.match(key)
        if found:
            sides.setdefault(found[1], {})["down" if (found[2] or found[3]) in DOWN else "up"] = value
        elif not key.endswith(".alpha"):
            left.append(key)
    alone = [name for name, pair in sides.items() if len(pair) < 2]
    if not sides or alone or left:
        said = f"{len(left)} unknown ({some(left)})" if left else f"{len(alone)} without their other half ({some(alone)})"
        raise UserError(f"{file}: no LoRA, or a damaged one: of its {len(tensors)} tensors {said}")
    return {layer_of(name): Change(pair["down"], pair["up"], scale(name, pair, alphas, about)) for name, pair in sides.items()}


def find(path: Path) -> Path:
    """The file that a path means."""
    if path.is_file():
        return path
    for name in (WEIGHTS, PEFT, "pytorch_lora_weights.bin", "adapter_model.bin", "checkpoints/last.ckpt"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: {f'a folder without {WEIGHTS} or {PEFT}' if path.is_dir() else 'no such file or folder'}")


def contents(file: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors, and what is said of them: settings of parts by diffusers, peft or, in a checkpoint, us."""
    beside = file.parent / PEFT_CONFIG
    about = component.read_json(beside) if file.name.startswith("adapter_model") and beside.is_file() else {}
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                text = (opened.metadata() or {}).get(METADATA)
                names = opened.keys()
                said = parse_json(text, f"{file}: its metadata") if text else {}
                return {key: opened.get_tensor(key) for key in names}, about | (said if isinstance(said, dict) else {})
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged, or no .safetensors file ({one_line(error)})") from error
    try:
        saved, strange = pickles.read(file)
    except (OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: damaged, or no file of weights ({one_line(error)})") from error
    tensors = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if strange or not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file}: holds no weights by name; a LoRA is a file of tensors")
    own = saved.get(OWN)
    if isinstance(own, dict) and own:
        return _of_checkpoint(file, tensors, own)
    return tensors, about


def _of_checkpoint(file: Path, tensors: Mapping[str, Tensor], about: Mapping) -> tuple[dict[str, Tensor], dict]:
    """Of a run of ours: the averaged changes, where they are kept."""
    if about.get("kind") != "lora":
        raise UserError(f"{file}: a whole model ({about.get('kind')}), not a LoRA: give it as --ckpt")
    prefix = "ema.shadow." if any(key.startswith("ema.shadow.") for key in tensors) else "model."
    options = about["config"]["model"]["params"]["lora"]
    own = {"lora_alpha": options["alpha"]} if "alpha" in options else {}
    chosen = [key for key in tensors if key.startswith(prefix) and ".lora_" in key]
    return {key.removeprefix(prefix): tensors[key] for key in chosen}, own


def layer_of(name: str) -> Layer:
    """(part, name inside it), in the file's own names, but those of old diffusers as the new ones."""
    name = name.removeprefix("base_model.model.").replace(".processor", "")
    for prefix, part in KOHYA.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    part = next((part for part in PARTS if name.startswith(f"{part}.")), None)
    name = name if part is None else name.removeprefix(f"{part}.")
    before, dot, last = name.rpartition(".")
    if before.endswith("self_attn"):
        last = OLD_TEXT.get(last, last)
    elif ".attn" in f".{before}" or ".attentions" in before:
        last = OLD.get(last, last)
    return part, f"{before}{dot}{last}"


def scale(name: str, pair: Mapping[str, Tensor], alphas: Mapping[str, float], about: Mapping) -> float:
    """alpha / rank; alpha is the rank where nothing is said of it."""
    rank = len(pair["down"])
    if name in alphas:
        return alphas[name] / rank
    part, layer = layer_of(name)
    said = {key.removeprefix(f"{part}."): value for key, value in about.items() if part and key.startswith(f"{part}.")} or about
    alpha = said.get("lora_alpha", rank)
    patterns = (said.get("alpha_pattern") or {}).items()
    alpha = next((value for pattern, value in patterns if re.search(rf"(^|\.){pattern.removeprefix('^')}$", layer)), alpha)
    return float(alpha) / (rank**0.5 if said.get("use_rslora") else rank)


def write(path: Path, parts: Mapping[str, Mapping[str, Change]]) -> None:
    """As diffusers' ``load_lora_weights`` takes it. parts: "unet", "text_encoder" ... -> names of layers -> changes.

    The scale is multiplied into B, and alpha is the rank: readers that look for no alpha are right too.
    """
    from safetensors.torch import save_file

    tensors, about = {}, {}
    for part, layers in parts.items():
        for name, (down, up, scale) in layers.items():
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up * scale}
        rank = len(next(iter(layers.values())).down)
        # transformers 5 has other names than the files: endings fit both
        targets = sorted({name.rpartition(".")[2] for name in layers} if part.startswith("text") else layers)
        about |= {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": targets}
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", METADATA: json.dumps(about, indent=2, sort_keys=True)})


def named(layer: Layer, parts: Mapping[str, Mapping[str, Any]]) -> Any | None:
    """What the tables of a model's parts (name of a layer -> anything) have for a layer of a file, None if nothing."""
    part, name = layer
    for each in [part] if part else parts:
        table = parts.get(each, {})
        if name in table:
            return table[name]
    flat = {key.replace(".", "_"): value for key, value in parts.get(part or "", {}).items()}
    return flat.get(name)


def grouped(layers: Iterable[Layer]) -> str:
    return some([f"{part}.{name}" if part else name for part, name in layers])
