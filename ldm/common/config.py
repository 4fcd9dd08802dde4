"""Config files: read and merged, checked as a whole, and the plain sections as typed objects.

Top level: name, seed, autoencoder, model, data, loader, cache, sampling, validation, logging, checkpoint, trainer. The
blocks (model, data.*) are held against the signatures of what they name, the plain sections against SECTIONS below.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.build import Block, check_call, is_block, locate, near, plain
from ldm.common.files import UserError, nearest
from ldm.common.limits import limits
from ldm.common.named import problems

Section = TypeVar("Section")
RESOLVER = re.compile(r"\$\{[^{}$]*:")
AUTOENCODER = ("encode", "decode")  # what has these
SOURCES = ("config", "ckpt", "target")  # where a diffusion model's autoencoder comes from: exactly one of them


@dataclass(frozen=True)
class Data:
    """What is trained on, and what the loss is watched on (no validation where it is absent)."""

    train: Block
    validation: Block | None = None


@dataclass(frozen=True)
class Cache:
    """What is computed once and kept on disk instead of at every step. dir: where; null: beside the runs."""

    latents: bool = False
    text: bool = False
    dir: str | None = None


class Guidance(TypedDict, total=False):
    """Classifier-free guidance: its scale; the times low <= t <= high of the process at which it guides (null: all); the
    share in which the guided prediction gets back its standard deviation (null: none); and how many of the latents' channels
    it guides, the first ones (null: all)."""

    scale: float
    low: float | None
    high: float | None
    rescale: float | None
    channels: int | None


@dataclass(frozen=True)
class Sampling:
    """How pictures are made where nothing else is asked for; stored with the model. sampler, times: a name, or name and
    options ({name: karras, rho: 5}); times: also a list of times, which is brought to that many steps. count: pictures in a
    sample grid; prompts: their captions (null: captions of the validation data), repeated as needed. prompt_weights: prompts
    may have weights in them, "(word:1.3)" (null: as the conditioner is set). x0: how every guess of the data is kept in range,
    a name in ldm.guidance.BOUNDS with options, for pixels (null: not at all). start: standard deviation of what sampling starts
    from, "noise": that of the noise alone (null: that of noisy data of unit variance)."""

    sampler: str | dict = "dpmpp_2m"
    steps: int = 20
    times: str | dict | list[float] = "linear"
    guidance: float | Guidance = 3.0
    prompts: list[str] | None = None
    count: int = 8
    prompt_weights: bool | None = None
    x0: str | dict | None = None
    start: Literal["noise"] | float | None = None
    check_params = staticmethod(limits(steps=1, count=1))


@dataclass(frozen=True)
class Validation:
    """Every so many steps, the loss over so many batches of the validation data."""

    every: int = 1000
    batches: int = 8
    check_params = staticmethod(limits(every=1, batches=1))


@dataclass(frozen=True)
class Logging:
    """Steps between lines of metrics, and between grids of images (0: none). wandb: true, or what wandb.init takes."""

    every: int = 50
    images_every: int = 1000
    wandb: bool | dict = True
    check_params = staticmethod(limits(every=1, images_every=0))


@dataclass(frozen=True)
class Checkpoint:
    """Every so many steps a checkpoint; the newest `keep` stay."""

    every: int = 1000
    keep: int = 3
    check_params = staticmethod(limits(every=1, keep=1))


@dataclass(frozen=True)
class Config:
    """The top level."""

    name: str
    model: Block
    data: dict
    seed: int = 23
    autoencoder: Block | dict | None = None
    loader: dict | None = None
    cache: dict | None = None
    sampling: dict | None = None
    validation: dict | None = None
    logging: dict | None = None
    checkpoint: dict | None = None
    trainer: dict | None = None
    init_from: str | None = None
    check_params = staticmethod(limits(seed=(0, 2**32 - 1)))  # numpy takes no more


def load(paths: Sequence[str | Path], overrides: Iterable[str] = (), environment: bool = True) -> DictConfig:
    """-> the files merged left to right, then the `key.path=value` arguments, with every interpolation resolved.

    Mappings merge key by key, all else is replaced. A block whose `target` changes starts anew, without the params of
    the former target; so does `autoencoder` where its source changes. A relative `autoencoder.config` counts from the
    folder of the file that says so. UserError for what cannot be read or resolved.
    environment: whether interpolations may ask resolvers (${oc.env:HOME}), which the file of a stranger may not.
    """
    merged: dict = {}
    for path in map(Path, paths):
        merged = merge(merged, _from_folder(_read(path), path.parent))
    for override in overrides:
        merged = merge(merged, _parse(override))
    if not environment and (asked := RESOLVER.search(str(merged))):
        where = ", ".join(map(str, paths))
        raise UserError(f"{where}: {asked[0]}...: the config of a checkpoint may not ask for values of this machine")
    try:
        return OmegaConf.create(OmegaConf.to_container(OmegaConf.create(merged), resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {_first_line(error)}") from error


def as_dict(cfg: DictConfig) -> dict:
    """-> plain data; a value that is still to be filled in ("???") stays text."""
    return OmegaConf.to_container(cfg, resolve=True)


def merge(old: Any, new: Any) -> Any:
    """-> `new` over `old`, by the rules of `load`; neither is changed."""
    if not (isinstance(old, dict) and isinstance(new, dict)) or _starts_anew(old, new):
        return new
    return {**old, **{key: merge(old[key], value) if key in old else value for key, value in new.items()}}


def _starts_anew(old: dict, new: dict) -> bool:
    if "target" in new and "target" in old:
        return new["target"] != old["target"]
    sources = [set(SOURCES) & mapping.keys() for mapping in (old, new)]
    return all(sources) and sources[0] != sources[1]


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: no such config file{_files_near(path)}")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or _first_line(error)}") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as a config: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected names with values at the top, got a {type(found).__name__}")
    return found


def _files_near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    found = nearest(path.name, names)
    if found:
        return f"; nearest: {path.parent / found}"
    return f"; {path.parent} holds {', '.join(names) or 'no yaml files'}"


def _from_folder(found: dict, folder: Path) -> dict:
    """-> the config with `autoencoder.config` as an absolute path."""
    autoencoder = found.get("autoencoder")
    named = autoencoder.get("config") if isinstance(autoencoder, dict) else None
    if not isinstance(named, str) or "${" in named:
        return found
    return {**found, "autoencoder": {**autoencoder, "config": str((folder / named).resolve())}}


def _parse(override: str) -> dict:
    key, equals, _ = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"{override!r}: expected key.path=value, for example trainer.max_steps=100")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"{override!r}: the value is not valid YAML: {problem}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_config(cfg: Mapping, allowed: Iterable[str] | None = None) -> list[str]:
    """-> every mistake in the whole config, one line each with its path; [] if there is none. Makes no model and reads
    no data. `allowed` is the argument of `ldm.common.build.locate`."""
    config = as_dict(cfg) if isinstance(cfg, DictConfig) else plain(cfg)
    mistakes = check_call(Config, config, "", allowed=allowed)
    for name, (target, given) in SECTIONS.items():
        section = config.get(name)
        if isinstance(section or {}, dict):
            try:
                mistakes += check_call(locate(target), section or {}, name, given, allowed)
            except UserError as error:
                mistakes.append(f"{name}: {error}")
    mistakes += _check_kind(config) + _check_autoencoder(config.get("autoencoder")) + _check_names(config)
    return list(dict.fromkeys(mistakes))  # blocks inside sections were seen twice


def _check_kind(config: dict) -> list[str]:
    """The sections that only some trainings have. A training module says what it trains by its attribute `kind`."""
    try:
        module = locate(config["model"]["target"]) if is_block(config.get("model")) else None
    except UserError:
        return []  # `check` has told it
    if module is not None and not hasattr(module, "kind"):
        return [f"model.target: {config['model']['target']} is not trained by this program; ldm.lit.DiffusionModule is, and "
                "autoencoder.lit.AutoencoderModule"]  # fmt: skip
    kind = getattr(module, "kind", None)
    if kind in ("diffusion", "classifier") and not config.get("autoencoder"):
        what = {"diffusion": "diffusion model", "classifier": "classifier"}[kind]
        return [f"autoencoder: missing; a {what} needs one of {', '.join(SOURCES)}"]
    foreign = {"autoencoder": ("autoencoder", "cache", "sampling"), "classifier": ("sampling",)}.get(kind, ())
    reason = f"belongs to diffusion models, this config trains {'an autoencoder' if kind == 'autoencoder' else 'a classifier'}"
    return [f"{key}: {reason}" for key in foreign if config.get(key)]


def _check_autoencoder(section: Any) -> list[str]:
    if not section or not isinstance(section, dict):
        return []
    named = [key for key in SOURCES if key in section]
    mistakes = [
        f"autoencoder.{key}: no such option; it takes one of {', '.join(SOURCES)} (with params)"
        for key in section
        if key not in SOURCES and not (key == "params" and "target" in section)
    ]
    with suppress(UserError):  # told by whoever looks at blocks
        if "target" in section and lacking(locate(section["target"]), AUTOENCODER):
            mistakes.append(f"autoencoder.target: expected what makes an autoencoder, such as autoencoder.base.Identity; got "
                            f"{section['target']}")  # fmt: skip
    if len(named) != 1:
        mistakes.append(f"autoencoder: expected exactly one of {', '.join(SOURCES)}, got {', '.join(named) or 'none'}")
    for key in ("config", "ckpt"):
        value = section.get(key)
        if key in section and not isinstance(value, str):
            mistakes.append(f"autoencoder.{key}: expected path, got {value!r}")
        elif key in section and not (Path(value).is_file() if key == "config" else Path(value).exists()):
            instead = _files_near(Path(value)) if key == "config" else ""
            mistakes.append(f"autoencoder.{key}: no such file {value}{instead}")
    return mistakes


def _check_names(config: dict) -> list[str]:
    mistakes = []
    for (name, key), registry in NAMES.items():
        module, _, attribute = registry.rpartition(".")
        value = (config.get(name) or {}).get(key)
        choices = getattr(import_module(module), attribute) if isinstance(value, str) else ()
        if isinstance(value, str) and value not in choices:
            mistakes.append(f"{name}.{key}: expected one of {', '.join(choices)}, got {value!r}{near(value, choices)}")
        if isinstance(value, dict):
            mistakes += problems(value, getattr(import_module(module), attribute), f"{name}.{key}")
    return mistakes


def lacking(call: Any, names: Iterable[str]) -> bool:
    """Whether a class lacks some of these; a function may make anything."""
    return isinstance(call, type) and not all(hasattr(call, name) for name in names)


def section(cfg: Mapping, kind: type[Section]) -> Section:
    """-> a plain section of a checked config as its object, defaults filled in: `section(cfg, Sampling).steps`."""
    return kind(**plain(cfg.get(kind.__name__.lower()) or {}))


# section -> (callable whose signature is its schema, parameters that main.py supplies)
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("ldm.common.config.Data", ()),
    "loader": ("ldm.data.loader.make_loader", ("dataset", "seed", "start", "shuffle", "infinite")),
    "cache": ("ldm.common.config.Cache", ()),
    "sampling": ("ldm.common.config.Sampling", ()),
    "validation": ("ldm.common.config.Validation", ()),
    "logging": ("ldm.common.config.Logging", ()),
    "checkpoint": ("ldm.common.config.Checkpoint", ()),
    "trainer": ("pytorch_lightning.Trainer", ("logger", "callbacks", "default_root_dir", "use_distributed_sampler")),
}

# (section, key) -> registry that holds the value
NAMES: dict[tuple[str, str], str] = {
    ("sampling", "sampler"): "ldm.samplers.SAMPLERS",
    ("sampling", "times"): "ldm.times.TIMES",
    ("sampling", "x0"): "ldm.guidance.BOUNDS",
}
