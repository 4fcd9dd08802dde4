"""The stages of a training: their configs, checked, their data, and the key of what comes out of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from ldm.app import trainer as trainer_words
from ldm.common.build import build
from ldm.common.config import as_dict, check_config, load
from ldm.common.files import UserError, digest, file_sha256
from ldm.load import find

Kind = Literal["autoencoder", "diffusion", "classifier"]
FIRST = "stage1."  # key=value arguments that begin so are for the config that autoencoder.config names
SHARED = {"trainer": ("accelerator", "devices", "num_nodes"), "logging": ("wandb",)}  # stage 2 says it for both stages
PLACE = {  # arguments of the Trainer that say where and how a run is computed, not what comes out: not part of the key
    "accelerator", "devices", "num_nodes", "strategy", "benchmark", "profiler", "detect_anomaly", "deterministic",
    "inference_mode", "enable_autolog_hparams", "sync_batchnorm", "plugins", "min_steps",
}  # fmt: skip


NEEDED = ("caption", "identity", "fingerprint", "report")  # of a data set, besides its items and their number


@dataclass(eq=False)
class Stage:
    """One training: its resolved config and, once opened, its data."""

    config: dict
    number: int = 1
    count: int = 1
    before: "Stage | None" = None  # the stage whose autoencoder this one uses
    train: Dataset | None = None
    validation: Dataset | None = None
    scaled: int = 1  # what the config's learning rates were multiplied by
    latents_key: str | None = None  # autoencoder_key, where it is known without stage 1's data

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def seed(self) -> int:
        return self.config.get("seed", 23)

    @property
    def kind(self) -> Kind:
        if not self.config.get("autoencoder"):
            return "autoencoder"
        return "classifier" if "classifier" in (self.config["model"].get("params") or {}) else "diffusion"

    @property
    def trainer(self) -> dict:
        return self.config.get("trainer") or {}

    @property
    def lora(self) -> dict | None:
        """Options of a LoRA training (``ldm.adapters.Lora``)."""
        return (self.config["model"].get("params") or {}).get("lora")

    @property
    def init_from(self) -> Path | None:
        """A model whose weights the training begins with."""
        return Path(self.config["init_from"]) if self.config.get("init_from") else None

    @property
    def label(self) -> str:
        return f"stage {self.number} of {self.count}, {self.kind}"

    @property
    def batch_size(self) -> int:
        """Of one device."""
        return self.config["loader"]["batch_size"]

    @property
    def accumulate(self) -> int:
        """Batches to an optimizer step."""
        params = self.config["model"].get("params") or {}
        return self.trainer.get("accumulate_grad_batches") or params.get("accumulate") or 1

    @property
    def sampling(self) -> dict:
        """What the config says about sampling and goes with the model."""
        said = self.config.get("sampling") or {}
        return {key: value for key, value in said.items() if key not in ("prompts", "count")}

    @cached_property
    def picture(self) -> tuple[int, int, int]:
        """(C, H, W) of the data."""
        return tuple(self.train[0]["image"].shape)

    def open(self, made: dict[str, Dataset] | None = None) -> list[str]:
        """Makes the data sets; gives back what is wrong with them. made: by digests of their blocks, to share equal ones."""
        made = {} if made is None else made
        mistakes = []
        for role in ("train", "validation"):
            block = self.config["data"].get(role)
            if block is None:
                continue
            try:
                dataset = made.get(digest(block)) or build(block)
                if len(dataset) == 0:
                    raise UserError("the data set is empty; point it at a folder with pictures")
                if missing := [name for name in NEEDED if not hasattr(dataset, name)]:
                    raise UserError(f"{type(dataset).__name__} lacks {', '.join(missing)}, which ldm.data.shapes.Shapes shows")
                made[digest(block)] = dataset
                setattr(self, role, dataset)
                if role == "train":
                    _ = self.picture
            except (ValueError, OSError) as error:
                mistakes.append(f"{f'{self.label}: ' if self.count > 1 else ''}data.{role}: {error}")
        return mistakes

    @cached_property
    def key(self) -> str:
        """Hash of all that the weights depend on."""
        trainer = {name: value for name, value in self.trainer.items() if name not in PLACE}
        return digest({
            "model": self.config["model"], "data": self.train.fingerprint, "batch_size": self.batch_size,
            "trainer": trainer, "seed": self.seed, "autoencoder": self.autoencoder_key,
            **({} if self.init_from is None else {"init_from": self.init_key}),
        })  # fmt: skip

    @cached_property
    def init_key(self) -> str:
        """Hash of the model that the training begins with."""
        return _contents(self.init_from)

    @cached_property
    def autoencoder_key(self) -> str | None:
        """Hash of all that the latents depend on; None in stage 1."""
        if self.latents_key is not None:
            return self.latents_key
        if self.before is not None:
            return self.before.key
        source = self.config.get("autoencoder")
        if not source:
            return None
        return _contents(Path(source["ckpt"])) if "ckpt" in source else digest(source)


def _contents(path: Path) -> str:
    """Hash of a checkpoint; of all files in a folder that is somebody else's."""
    try:
        return file_sha256(find(path))
    except UserError:
        if not path.is_dir():
            raise
        return digest({str(file.relative_to(path)): file_sha256(file) for file in path.rglob("*") if file.is_file()})


def read(paths: Sequence[str | Path], overrides: Sequence[str] = (), *, name: str | None = None, seed: int | None = None,
         init_from: str | None = None) -> tuple[list[Stage], list[str]]:
    """-> the stages in the order in which they are trained, and every mistake in their configs."""
    config = as_dict(load(paths, [o for o in overrides if not o.startswith(FIRST)]))
    given = {"name": name, "seed": seed, "init_from": init_from or config.get("init_from")}
    config |= {key: value for key, value in given.items() if value is not None}
    if isinstance(config.get("init_from"), str):
        config["init_from"] = str(Path(config["init_from"]).expanduser().absolute())
    mistakes = mistakes_in(config)
    source = config.get("autoencoder")
    first = source.get("config") if isinstance(source, dict) else None
    own = [o.removeprefix(FIRST) for o in overrides if o.startswith(FIRST)]
    if own and first is None:
        mistakes.append(f"{FIRST}{own[0]}: there is no other stage; it belongs to configs with autoencoder.config")
    if not isinstance(first, str) or not Path(first).is_file():
        return [Stage(config)], mistakes
    try:
        earlier = _shared(as_dict(load([first], own)), config)
    except UserError as error:
        return [Stage(config)], [*mistakes, str(error)]
    earlier |= {"seed": seed} if seed is not None else {}
    shared = tuple(f"{section}.{key}" for section, keys in SHARED.items() for key in keys)
    told = {mistake for mistake in mistakes if mistake.startswith(shared)}
    mistakes += [f"{first}: {mistake}" for mistake in mistakes_in(earlier) if mistake not in told]
    if earlier.get("autoencoder"):
        mistakes.append(f"{first}: expected the config of an autoencoder's training, this one trains on top of one")
    stage1 = Stage(earlier, 1, 2)
    return [stage1, Stage(config, 2, 2, before=stage1)], mistakes


def _shared(earlier: dict, config: dict) -> dict:
    """Stage 1's config with what stage 2 says for both: the devices, and whether wandb hears of it."""
    for section, names in SHARED.items():
        said = config.get(section)
        said = {key: said[key] for key in names if key in said} if isinstance(said, dict) else {}
        if said and isinstance(earlier.get(section) or {}, dict):
            earlier = {**earlier, section: {**(earlier.get(section) or {}), **said}}
    return earlier


def mistakes_in(config: dict) -> list[str]:
    """All that can be told of one config before anything is made."""
    mistakes = [_with_way_out(mistake) for mistake in check_config(config)]
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    mistakes += trainer_words.mistakes(trainer, manual=not config.get("autoencoder"))
    if trainer.get("strategy") == "fsdp2":
        mistakes += _unshared(config, trainer)
    name = config.get("name")
    if isinstance(name, str) and not is_name(name):
        mistakes.append(f"name: expected a name for a folder, got {name!r}")
    return mistakes + _check_numbers(config, trainer)


def _unshared(config: dict, trainer: dict) -> list[str]:
    """What cannot be where weights lie in shares."""
    model = config.get("model")
    params = (model.get("params") if isinstance(model, dict) else None) or {}
    optimizer = params.get("optimizer") if isinstance(params, dict) else None
    why = {
        "it shares out diffusion models; this config trains another": not config.get("autoencoder") or "classifier" in params,
        "model.params.lora is small, and what it changes is frozen": "lora" in params,
        "model.params.snapshots are written of whole weights": "snapshots" in params,
        "Muon works on whole matrices": str((optimizer or {}).get("target")).endswith("Muon"),
        "fp16's scaler does not know shares; trainer.precision: bf16-mixed does": "16-" in str(trainer.get("precision"))
        and not str(trainer.get("precision")).startswith("bf"),
    }
    return [f"trainer.strategy: fsdp2: {reason}; or take ddp" for reason, true in why.items() if true]


def is_name(text: str) -> bool:
    """Whether a folder can be called so."""
    return text.isprintable() and bool(text.strip(". ")) and not set("/\\") & set(text)


def _check_numbers(config: dict, trainer: dict) -> list[str]:
    """Values of the right type that cannot be."""
    mistakes, loader = [], config.get("loader")
    for name, least in (("batch_size", 1), ("workers", 0)):
        value = loader.get(name, least) if isinstance(loader, dict) else least
        if isinstance(value, int) and value < least:
            mistakes.append(f"loader.{name}: {value}; it takes a whole number from {least}")
    model = config.get("model")
    params = model.get("params") if isinstance(model, dict) else None
    schedule = params.get("schedule") if isinstance(params, dict) else None
    course = schedule.get("params") if isinstance(schedule, dict) else None
    ends = isinstance(trainer.get("max_steps"), int) and trainer["max_steps"] > 0
    if isinstance(course, dict) and course.get("decay", "constant") != "constant" and not ends:
        mistakes.append(f"model.params.schedule: decay {course['decay']!r} has to know where the run ends: "
                        "set trainer.max_steps, or take decay: constant")
    return mistakes


def _with_way_out(mistake: str) -> str:
    if not mistake.startswith("autoencoder.ckpt: no such file"):
        return mistake
    return (f"{mistake}; stage 2 learns on the latents of a trained autoencoder: make one with `python main.py --base "
            "configs/autoencoder_kl.yaml -t`, or name its config instead (autoencoder: {config: ...}) to have it trained first")


def scale_lr(stage: Stage, world: int) -> None:
    """Multiplies every learning rate of the stage's optimizers by its global batch."""
    stage.scaled = world * stage.batch_size * stage.accumulate

    def scaled(value: Any, inside: bool) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item * stage.scaled if inside and key.endswith("lr") and isinstance(item, (int, float))
                else scaled(item, inside or "optimizer" in key) for key, item in value.items()}  # fmt: skip

    stage.config = {**stage.config, "model": scaled(stage.config["model"], inside=False)}


def learning_rate(config: dict) -> float | None:
    """Of the first optimizer in the config."""
    block = (config["model"].get("params") or {}).get("optimizer") or {}
    return (block.get("params") or {}).get("lr")
