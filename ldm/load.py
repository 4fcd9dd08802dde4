"""ldm.load: from a path to a Bundle. Files are mapped into memory, and nothing in them is ever executed."""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.classifier import NoisyClassifier
from ldm.common import config as configs
from ldm.common.build import plain
from ldm.common.files import UserError, nearest, one_line, parse_json
from ldm.common.weights import no_larger_than
from ldm.interop import (
    adm,
    component,
    compvis,
    compvis_models,
    diffusers,
    diffusers_pipelines,
    dit,
    dit_diffusers,
    pickles,
)

log = logging.getLogger(__name__)

READ = ("read are a .ckpt or .safetensors that this program wrote, a run folder, models and autoencoders of CompVis, "
        "Stability, diffusers, guided-diffusion, DiT and SiT")
READERS = (compvis_models, compvis, diffusers, dit, dit_diffusers, adm)  # of other people's files, the most telling names first
PARTS = ("autoencoder", "conditioner", "denoiser")
LEFT_BEHIND = ("critic", "loss", "regularisers", "averages", "classifier")  # no part of a Bundle
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module)\.")  # torch.compile, DistributedDataParallel
FOREIGN = {  # names of tensors in other people's files -> what such a file is
    "lora": "a LoRA, which changes another model and is none by itself",
    r"^(first_stage_model|cond_stage_model)\.": "a part of a CompVis or Stable Diffusion checkpoint, without its network",
    r"^(encoder\.)?down_blocks\.\d": "a UNet or autoencoder of diffusers",
    r"^(text_model|encoder\.block|embeddings)\.": "a text encoder",
    r"^input_blocks\.0\.0\.": "a UNet alone, or a classifier of guided-diffusion, which guides other models",
    r"^(control_model|controlnet_\w+)\.": "a ControlNet, which steers another model and is none by itself",
    r"^(double_blocks|joint_blocks)\.": "a transformer of flux or Stable Diffusion 3",
    r"^string_to_param$": "a textual inversion: words for another model",
    r"^param_groups$": "an optimizer's state",
}
DIFFERENCES = 5  # between configs, that a warning names
KINDS = ("model.target", *(f"model.params.{part}.target" for part in ("autoencoder", "network", "conditioner", "process")))


@dataclass(frozen=True)
class Checkpoint:
    """A file as it is: what it says of itself, and tensors by the names that they have in it (wrappers removed)."""

    path: Path
    about: dict
    tensors: dict[str, Tensor]
    step: int | None = None
    foreign: bool = False  # written by another program; names and config are ours nevertheless
    planned: Bundle | None = None  # the model without weights, where the reader had to make it

    @property
    def has_ema(self) -> bool:
        return any(key.startswith("ema.") for key in self.tensors)

    def weights(self, ema: bool) -> dict[str, Tensor]:
        """By the names of a Bundle: the averaged weights where they are there and wanted."""
        raw = {key.removeprefix("model."): value for key, value in self.tensors.items() if not key.startswith("ema.")}
        found = {key: value for key, value in raw.items() if key.split(".")[0] not in LEFT_BEHIND}
        if ema:
            averaged = (key for key in self.tensors if key.startswith("ema.") and key != "ema.updates")
            names = {key: key.removeprefix("ema.").removeprefix("shadow.") for key in averaged}
            names = {key: name for key, name in names.items() if name.split(".")[0] not in LEFT_BEHIND}
            alone = self.about["kind"] == "autoencoder"  # its average is of the autoencoder, without that word
            found |= {f"autoencoder.{name}" if alone and name.split(".")[0] not in PARTS else name: self.tensors[key]
                      for key, name in names.items()}  # fmt: skip
        if "autoencoder.statistics_count" in found:  # saved before the hash of their data was kept beside it
            found.setdefault("autoencoder.statistics_data", torch.zeros(8, dtype=torch.uint8))
        return found


def load(path: str | Path, config: str | Path | Mapping | None = None, *, ema: bool = True,
         device: torch.device | str = "cpu", dtype: torch.dtype | None = None, trust: bool = False) -> Bundle:
    """The model in a file or run folder, in eval mode.

    Args:
        path: .ckpt or .safetensors, or a run folder, of which the finished or else the last checkpoint is taken.
            Of other programs: an autoencoder's checkpoint of CompVis, an autoencoder's folder of diffusers, a DiT or SiT.
        config: of a foreign file, the yaml that it was trained with; None: the architecture is read from the shapes.
            Our own files hold theirs, which is used; one given here is compared with it.
        ema: take the averaged weights, if there are any, in place of those that the optimizer moves.
        dtype: of conditioner and denoiser, as in the file if None, but float32 in place of float16 on a CPU. The autoencoder
            keeps its own, as it overflows in half; foreign ones become float32. It is changed only where it is all there is.
        trust: build what the checkpoint's config names even outside of this program and torch, that is, run that code.

    Raises:
        UserError: for whatever is not such a file, is damaged, or does not belong together; in one line.
    """
    found = read(path, config)
    if config is not None and not found.foreign:
        _warn_of_differences(found, config)
    about = found.about
    with _told(f"{found.path}: the model that its config describes cannot be built"), no_larger_than(found.tensors):
        _announce(found)
        bundle = found.planned or Bundle.from_config(about["config"], sampling=about.get("sampling"), about=about, trust=trust)
    with _told(f"{found.path}: its weights cannot be used"):
        bundle.assign(found.weights(ema), origin=str(found.path))
        _check_autoencoder(found, bundle)
    if found.has_ema:
        log.info("%s: %s weights", found.path, "averaged (EMA)" if ema else "raw, not the averaged (EMA),")
    device = torch.device(device)
    parts = [part for part in ([bundle.conditioner, bundle.denoiser] if bundle.denoiser else [bundle.autoencoder]) if part]
    for part in parts:
        if kind := dtype or _usable(part, device, found.path):
            part.to(dtype=kind)
    return bundle if device.type == "cpu" else bundle.to(device)


def _usable(part: nn.Module, device: torch.device, path: Path) -> torch.dtype | None:
    """float32 for weights in double precision, and for float16 on a CPU, which computes with it slowly and coarsely, if at
    all; None: as they are."""
    found = {p.dtype for p in part.parameters()}
    if device.type == "cpu" and torch.float16 in found:
        log.info("%s: float16 weights become float32 on the CPU", path)
        return torch.float32
    return torch.float32 if torch.float64 in found else None


def read(path: str | Path, config: str | Path | Mapping | None = None) -> Checkpoint:
    """A checkpoint's contents, mapped into memory; the model is not built. ``config``: of a foreign file, as for ``load``."""
    folder = Path(path).expanduser()
    if diffusers_pipelines.holds(folder):
        with _told(f"{folder}: cannot be read"):
            about, tensors, planned = diffusers_pipelines.planned(folder)
        return Checkpoint(folder, about, tensors, foreign=True, planned=planned)
    file, about, tensors, step = _contents(path)
    if about is None:
        reader = _reader(tensors)
        if reader is None:
            raise UserError(f"{file}: this is {_kind(tensors)}; {READ}")
        tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}  # no "epoch" beside them
        layout = reader.__name__.split(".")[-1].split("_")[0]
        with _told(f"{file}: it has names of {layout}'s, but cannot be read as such"), no_larger_than(tensors):
            given = _given(config, file, reader)
            if reader is compvis_models:
                about, tensors, planned = reader.planned(tensors, given, str(file))
                return Checkpoint(file, about, tensors, step, foreign=True, planned=planned)
            return Checkpoint(file, *reader.read(tensors, given, str(file)), step, foreign=True)
    if about.get("kind") == "lora":
        raise UserError(f"{file}: this is {FOREIGN['lora']}: give the model as --ckpt, this as --lora")
    config = about.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if about.get("kind") not in ("diffusion", "autoencoder", "classifier") or not isinstance(model, dict):
        raise UserError(f"{file}: what it says of itself lacks its kind or the config of its model; {READ}")
    return Checkpoint(file, about, tensors, step)


def kind(path: str | Path) -> str:
    """What a checkpoint holds: "diffusion", "autoencoder", "classifier", or "lora", which is no model by itself."""
    about = None if diffusers_pipelines.holds(Path(path).expanduser()) else _contents(path)[1]
    return "lora" if (about or {}).get("kind") == "lora" else read(path).about["kind"]


def _given(config: str | Path | Mapping | None, file: Path, reader: ModuleType) -> dict | None:
    """The config of a foreign file: what is given, over what stands beside the file (a yaml of its name, or the reader's own
    kind of file)."""
    if config is None and reader in (compvis_models, compvis) and file.with_suffix(".yaml").is_file():
        config = file.with_suffix(".yaml")
        log.info("%s: read by %s beside it", file, config.name)
    given = config if config is None or isinstance(config, Mapping) else configs.load([config], environment=False)
    beside = file.parent / getattr(reader, "CONFIG", "")
    return plain(component.read_json(beside) | dict(given or {})) if beside.is_file() else plain(given)


def load_classifier(path: str | Path, config: str | Path | Mapping | None = None, *, ema: bool = True,
                    device: torch.device | str = "cpu", trust: bool = False) -> NoisyClassifier:
    """The classifier of noisy pictures or latents in a file or run folder, in eval mode; it guides other models
    (``ldm.classifier.by_classifier``). What ``load`` gives for a checkpoint of one is the autoencoder that it stands on.

    path: of our own, or guided-diffusion's .pt. config: of the latter, arguments or flags, as yaml or json; None: what the
    shapes tell. ema, trust: as for ``load``. UserError for whatever is no classifier.
    """
    file, about, tensors, _ = _contents(path)
    if about is None and adm.holds_classifier(tensors):
        given = config if config is None or isinstance(config, Mapping) else configs.load([config], environment=False)
        with _told(f"{file}: cannot be read"), no_larger_than(tensors):
            return adm.read_classifier(tensors, plain(given), str(file)).to(device)
    if (about or {}).get("kind") != "classifier":
        raise UserError(f"{file}: this is {_kind(tensors) if about is None else 'a checkpoint of other training'}, and no "
                        "classifier; read are those that this program trained, and guided-diffusion's")
    averaged, raw = ({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                     for prefix in ("ema.shadow.classifier.", "model.classifier."))  # fmt: skip
    weights = averaged if ema and averaged else raw
    with _told(f"{file}: the classifier that it describes cannot be built"), no_larger_than(tensors):
        return NoisyClassifier.from_about(about, trust).assign(weights, str(file)).to(device)


def _contents(path: str | Path) -> tuple[Path, dict | None, dict[str, Tensor], int | None]:
    """-> the file, what it says of itself, its tensors, and the step."""
    file = find(Path(path))
    about, tensors, step = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    if about is not None:
        with _told(f"{file}: what it says of itself is no plain data"):
            json.dumps(about)
        if not isinstance(about, dict):
            raise UserError(f"{file}: what it says of itself is a {type(about).__name__}, not names with values")
    tensors = {WRAPPERS.sub("", key): value for key, value in tensors.items()}
    return file, about, tensors, step if isinstance(step, int) else None


def find(path: Path) -> Path:
    """The checkpoint file that a path means."""
    path = path.expanduser()
    if path.is_file():
        return path
    if not path.exists():
        folder = path.parent
        near = nearest(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else None
        raise UserError(f"{path}: no such file or folder" + (f"; nearest: {folder / near}" if near else ""))
    tries = [path / "checkpoints" / "last.ckpt", path / "last.ckpt", *(path / name for name in diffusers.WEIGHTS)]
    if (path / "DONE").is_file():
        named = component.read_json(path / "DONE").get("checkpoint")
        tries = [path / named, *tries] if isinstance(named, str) else tries  # an absolute name stays as it is
    for file in tries:
        if file.is_file():
            return file
    inside = sorted(str(file.parent.parent) for file in path.glob("*/checkpoints/last.ckpt"))
    hint = f"; run folders in it: {', '.join(inside)}" if inside else "; a run folder holds checkpoints/last.ckpt"
    raise UserError(f"{path}: a folder without a checkpoint{hint}")


def _read_safetensors(file: Path) -> tuple[dict | None, dict[str, Tensor], int | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            tensors = {key: opened.get_tensor(key) for key in names}
            text = (opened.metadata() or {}).get("ldm")
        return parse_json(text, f"{file}: what it says of itself") if text else None, tensors, None
    except (SafetensorError, OSError) as error:
        said = _instead(file) or f"damaged, or no .safetensors file ({one_line(error)})"
        raise UserError(f"{file}: {said}") from error


def _read_torch(file: Path) -> tuple[dict | None, dict[str, Tensor], int | None]:
    head = _head(file)
    if not head.startswith(pickles.OLD) and not zipfile.is_zipfile(file):  # its directory is at its end: half a zip has none
        said = "damaged: its end is missing" if head.startswith(b"PK") else _instead(file) or "not a checkpoint"
        raise UserError(f"{file}: {said} ({file.stat().st_size:,} bytes); {READ}")
    try:
        saved, strange = pickles.read(file)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: damaged, or no checkpoint ({one_line(error)}); {READ}") from error
    if not isinstance(saved, dict):
        raise UserError(f"{file}: holds a {type(saved).__name__}, not a model; {READ}")
    state = saved.get("state_dict", saved)
    state = dit.flat({str(key): value for key, value in state.items()}) if isinstance(state, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) or not (strange or "ldm" in saved)}
    if strange and ("ldm" in saved or _reader(tensors) is None):
        raise UserError(f"{file}: holds more than tensors and plain data ({', '.join(sorted(strange)[:3])}), which could run "
                        f"code and is not read; {READ}")
    return saved.get("ldm"), tensors, saved.get("global_step")


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """One line about whatever goes wrong meanwhile: a file that was written to do harm can make anything fail."""
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        raise UserError(said if said.startswith(doing.split(": ")[0]) else f"{doing}: {said}") from error


def _announce(found: Checkpoint) -> None:
    """Files of this machine that a checkpoint's config names are not read in silence."""
    model = found.about["config"]["model"].get("params") or {}
    for key, value in (*_leaves(model, "model"), *_leaves(found.about["config"].get("autoencoder"), "autoencoder")):
        if not found.foreign and isinstance(value, str) and "/" in value and Path(value).expanduser().exists():
            log.info("%s: its config names %s (%s)", found.path, value, key)


def _reader(keys: Iterable[str]) -> ModuleType | None:
    """Who reads files with tensors of these names."""
    return next((reader for reader in READERS if reader.holds(keys)), None)


def _head(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(200)


def _instead(file: Path) -> str | None:
    """What a download left in place of the file, if that is what happened."""
    head = _head(file).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a checkpoint: the download was refused or redirected"
    return None


def _kind(tensors: Mapping[str, Tensor]) -> str:
    """What a file without our mark seems to be."""
    for pattern, kind in FOREIGN.items():
        if any(re.search(pattern, key) for key in tensors):
            return kind
    return f"a file that does not say what model it holds (it has {', '.join(list(tensors)[:2]) or 'nothing'} ...)"


def _check_autoencoder(found: Checkpoint, bundle: Bundle) -> None:
    expected = found.about.get("autoencoder_hash")
    if found.about["kind"] == "diffusion" and expected and (got := bundle.autoencoder.content_hash()) != expected:
        raise UserError(f"{found.path}: its autoencoder (hash {got}) is not the one that the model was trained with "
                        f"(hash {expected}); weights of two models were put together, or edited: take the file as it was saved")


def _warn_of_differences(found: Checkpoint, given: str | Path | Mapping) -> None:
    """UserError for the config of no model, or of one of another kind; other values are told."""
    name = "the config that is given" if isinstance(given, Mapping) else str(given)
    given = plain(given if isinstance(given, Mapping) else configs.load([given]))
    if not isinstance(given.get("model"), dict):
        raise UserError(f"{name}: the config of no model (it lacks model:); {found.path} holds its own, so give none")
    ours = dict(_leaves(found.about["config"]["model"], "model"))
    changed = {key: f"{key}: {ours.get(key)!r} (given: {value!r})"
               for key, value in _leaves(given["model"], "model") if ours.get(key) != value}  # fmt: skip
    if other := [changed[key] for key in KINDS if key in changed]:
        raise UserError(f"{name}: the config of another model than the one in {found.path}: {', '.join(other)}; the checkpoint "
                        "holds its own, so give none")
    if changed:
        more = f" and {len(changed) - DIFFERENCES} more" if len(changed) > DIFFERENCES else ""
        log.warning("%s holds its own config, which is used; the one given differs in %s%s", found.path,
                    ", ".join(list(changed.values())[:DIFFERENCES]), more)


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
    for key, item in items or ():
        yield from _leaves(item, f"{path}.{key}")
