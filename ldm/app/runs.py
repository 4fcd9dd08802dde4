"""Run folders, and which of them is finished, can go on, or has to be started.

A run folder is logdir/<name>[_<postfix>]-<time>/ with config.yaml (and stage1.yaml, where stage 1 was trained for it),
checkpoints/, metrics.jsonl, pictures, and DONE once it is finished. The key in DONE stands for everything that the weights
depend on: a stage with that key is not trained twice.
"""

import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from ldm.app.stages import PLACE, Kind, Stage
from ldm.bundle import compare
from ldm.callbacks.checkpoints import saved_at
from ldm.common.files import UserError, atomic_write, free_bytes
from ldm.common.weights import unwrapped
from ldm.load import kind as kind_in

STATE = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "pytorch-lightning_version")
STAGE1 = "stage1.yaml"  # in a run folder of stage 2


def new_folder(logdir: str | Path, name: str, postfix: str | None = None) -> Path:
    """-> the name of a folder that is not there yet; it is not made."""
    stem = f"{name}{f'_{postfix}' if postfix else ''}-{datetime.now():%Y%m%d-%H%M%S}"
    tries = (Path(logdir) / f"{stem}{f'-{i}' if i else ''}" for i in range(1000))
    return next(path for path in tries if not path.exists())


def write_done(folder: Path, stage: Stage, checkpoint: str, **facts: Any) -> None:
    """checkpoint: path inside the folder."""
    said = {"key": stage.key, "kind": stage.kind, "name": stage.name, "checkpoint": checkpoint, **facts}
    with atomic_write(folder / "DONE") as temporary:
        temporary.write_text(json.dumps(said, indent=1) + "\n")


def finished(logdir: str | Path, key: str) -> Path | None:
    """-> the newest run folder of a finished stage with this key."""
    for folder in _runs(logdir):
        facts = _read(folder / "DONE")
        if facts.get("key") == key and (folder / facts.get("checkpoint", "")).is_file():
            return folder
    return None


def _read(path: Path) -> dict:
    """-> what a JSON file says; nothing where it is not there, or is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def unfinished(logdir: str | Path, stage: Stage, postfix: str | None = None) -> tuple[Path | None, list[str]]:
    """-> the checkpoint of the newest run of this name that can go on, and what there is to say of those that cannot."""
    name = re.escape(f"{stage.name}{f'_{postfix}' if postfix else ''}") + r"-\d{8}-\d{6}(-\d+)?"
    told = []
    for folder in _runs(logdir):
        if not re.fullmatch(name, folder.name) or (folder / "DONE").exists():
            continue
        checkpoint, config = newest(folder, told.append), _config_of(folder)
        if checkpoint is None or config is None or Stage(config).kind != stage.kind:
            continue
        differ = differences(config, stage.config)
        differ += ["autoencoder"] * (_read(folder / "run.json").get("autoencoder") != stage.autoencoder_key)
        if any(key.split(".")[0] in ("model", "autoencoder", "data", "init_from") for key in differ):
            told.append(f"{folder}: not continued, its config differs in {', '.join(differ)}")
            continue
        return checkpoint, told + [f"{folder}: its config differs in {key}, the new value counts" for key in differ]
    return None, told


def newest(folder: Path, tell: Callable[[str], None] = lambda text: None) -> Path | None:
    """-> the newest whole checkpoint of a run: last.ckpt, unless it is damaged, or a later step was saved when the run was
    killed before last.ckpt became a second name of it. What is damaged is told."""
    steps = sorted((folder / "checkpoints").glob("step-*.ckpt"), key=saved_at, reverse=True)
    last = folder / "checkpoints" / "last.ckpt"
    files = [last, *steps] if last.is_file() else steps
    if last.is_file() and steps and saved_at(steps[0]) > saved_at(last) and _step(steps[0]) > _step(last):
        files.insert(0, steps[0])
    for path in files:
        if _whole(path):
            return path
        tell(f"{path}: damaged, passed over")
    return None


def _whole(path: Path) -> bool:
    """Whether each part of a checkpoint (a zip) has its checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False


def _lacking(path: Path) -> str | None:
    """What keeps a run from going on from a checkpoint."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        missing = [key for key in STATE if key not in saved]
    except Exception as error:  # torch, and pickle in it, pass on whatever they ran into
        return (str(error).splitlines() or [type(error).__name__])[0]
    return f"it has no {', '.join(missing)}" if missing else None


def _step(path: Path) -> int:
    """Of a checkpoint that may be damaged: then -1."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        return -1


def _runs(logdir: str | Path) -> list[Path]:
    """Run folders, newest first."""
    folders = [path.parent for path in Path(logdir).glob("*/config.yaml")]
    return sorted(folders, key=lambda folder: (folder / "config.yaml").stat().st_mtime, reverse=True)


def _config_of(folder: Path) -> dict | None:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def differences(old: dict, new: dict) -> list[str]:
    """-> names of the values that differ in what a stage's weights depend on."""

    def leaves(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {path: value}
        return {name: leaf for key, item in value.items() for name, leaf in leaves(item, f"{path}.{key}").items()}

    def relevant(config: dict) -> dict[str, Any]:
        trainer = {key: value for key, value in (config.get("trainer") or {}).items() if key not in PLACE}
        parts = {"model": config["model"], "data.train": config["data"]["train"], "loader": config.get("loader"),
                 "trainer": trainer, "seed": config.get("seed"), "init_from": config.get("init_from")}  # fmt: skip
        return {name: leaf for part, value in parts.items() for name, leaf in leaves(value, part).items()}

    before, after = relevant(old), relevant(new)
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


@dataclass(frozen=True)
class Job:
    """A stage, by its number, and where it starts: from nothing, from a run's checkpoint, or finished already."""

    action: Literal["train", "resume", "reuse"]
    number: int
    checkpoint: Path | None = None

    @property
    def run(self) -> Path | None:
        """The run folder that the checkpoint lies in."""
        folder = self.checkpoint.parent.parent if self.checkpoint else None
        return folder if folder and (folder / "config.yaml").is_file() else None


def jobs(stages: Sequence[Stage], logdir: str | Path, resume: str | None = None, postfix: str | None = None
         ) -> tuple[list[Job], list[str]]:
    """-> what to do for each stage that something is left to do for, and lines that explain it. UserError for a `resume`
    that cannot be."""
    *_, last = stages
    told: list[str] = []
    explicit = checkpoint_to_resume(resume, told.append) if resume not in (None, "auto") else None
    if explicit and (kind := kind_of(explicit)) not in {stage.kind for stage in stages}:
        raise UserError(f"--resume {resume}: this is a run of {kind} training; the config given trains {last.kind}")

    def job(stage: Stage) -> Job:
        if explicit and kind_of(explicit) == stage.kind:
            return Job("resume", stage.number, explicit)
        done = finished(logdir, stage.key)
        if done:
            return Job("reuse", stage.number, done / _read(done / "DONE")["checkpoint"])
        own = postfix if stage is last else None
        checkpoint, notes = unfinished(logdir, stage, own)
        if checkpoint and resume == "auto":
            told.extend(notes)
            return Job("resume", stage.number, checkpoint)
        if checkpoint:
            told.append(f"{checkpoint.parent.parent} was not finished; `--resume auto` would continue it")
        return Job("train", stage.number)

    listed = [job(last)]
    anew = listed[0].action == "train"  # a run that goes on has its autoencoder in its checkpoint
    if last.before is not None and (anew or (explicit and kind_of(explicit) == "autoencoder")):
        listed.insert(0, job(last.before))
    if resume == "auto" and all(job.action == "train" for job in listed):
        told.append(f"--resume auto: no unfinished run of {last.name} in {logdir}: starting anew")
    return listed, told


def alone(stages: list[Stage], resume: str) -> list[Stage]:
    """-> stage 2 by itself, where its own run folder says all about it: the autoencoder is in the checkpoint, and neither
    stage 1 nor its data is asked for. All stages where it does not."""
    checkpoint, last = checkpoint_to_resume(resume), stages[-1]
    key = stage1_key(Job("resume", last.number, checkpoint))
    if last.before is None or key is None or kind_of(checkpoint) != "diffusion":
        return stages
    return [replace(last, latents_key=key)]


def kept_sampling(job: Job, stage: Stage) -> list[str]:
    """What there is to say where a finished run is used whose sampling is not what the config now says."""
    config = _config_of(job.run) if job.run else None
    before, now = ((one or {}).get("sampling") or {} for one in (config, stage.config))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not changed:
        return []
    return [f"{stage.label}: sampling differs in {', '.join(changed)}; the finished checkpoint and its sheet keep their own. "
            "The arguments of `python -m ldm txt2img` draw otherwise, and `--resume` of the run stores the new ones"]


def other_batch(job: Job, stage: Stage, batch: int) -> list[str]:
    """What there is to say where a run saw another number of images in each step than this command would show it."""
    before = _read(job.run / "run.json").get("batch") if job.run else None
    if before in (None, batch):
        return []
    return [f"{stage.label}: its global batch was {before}, this command's is {batch} (batch size x devices x accumulation): "
            + ("the finished weights are used as they are" if job.action == "reuse" else "the run goes on at the next image")]


def stage1_key(job: Job) -> str | None:
    """Of the autoencoder (`Stage.autoencoder_key`) that the run of this job was begun with."""
    return None if job.run is None else _read(job.run / "run.json").get("autoencoder")


def checkpoint_to_resume(resume: str, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The checkpoint file that `--resume RUN_OR_CKPT` means; what is damaged, and therefore not meant, is told."""
    path = Path(resume)
    if path.is_file():
        if not _whole(path):
            raise UserError(f"--resume {resume}: not a whole checkpoint; for the newest whole one give its run folder")
        if lacking := _lacking(path):
            raise UserError(f"--resume {resume}: no run can go on from it: {lacking}; --init-from begins with the weights of a "
                            "model")
        return path
    found = newest(path, tell) if path.is_dir() else None
    if found is None:
        raise UserError(f"--resume {resume}: expected a run folder that holds checkpoints/last.ckpt, a .ckpt file, or auto")
    return found


def kind_of(checkpoint: Path) -> Kind:
    """Of the stage that left it."""
    found = kind_in(checkpoint)
    return "diffusion" if found == "lora" else found


def run_folder(job: Job, stage: Stage, module: nn.Module, logdir: str | Path, postfix: str | None, need: int, batch: int
               ) -> Path:
    """Makes (or goes on with) the run folder of a job and writes the config and the global batch there. UserError, and no
    folder, where the disk does not hold the checkpoints (`need` bytes), or the one to go on from is not of this module."""
    free = free_bytes(logdir) + sum(path.stat().st_size for path in (job.run or Path("-")).glob("checkpoints/step-*.ckpt"))
    if need > free:  # those that are there already make place
        raise UserError(f"{logdir}: no space for the checkpoints: {need / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB "
                        "free; lower checkpoint.keep, or choose another place with --logdir")
    if job.checkpoint is not None:
        saved = torch.load(job.checkpoint, map_location="cpu", mmap=True, weights_only=True)
        kept = getattr(module, "kept", lambda state: state)
        if problems := compare(unwrapped(kept(module.state_dict())), saved["state_dict"]):
            raise UserError(f"--resume: {job.checkpoint} is not of the model in this config: {problems}")
        base = (saved.get("ldm") or {}).get("base", {}).get("hash")
        if base is not None and base != stage.init_key:
            raise UserError(f"--resume: {stage.init_from} is no longer the model that {job.checkpoint} changes (hash {base}, "
                            f"now {stage.init_key}); to train changes of the new one, give --init-from in place of --resume")
    folder = job.run or new_folder(logdir, stage.name, postfix if stage.number == stage.count else None)
    config = stage.config
    try:
        (folder / "DONE").unlink(missing_ok=True)  # until it is again
        if stage.before is not None:  # as it was, arguments included: the folder needs no other config
            _write_config(folder / STAGE1, stage.before.config)
            config = {**config, "autoencoder": {"config": STAGE1}}
        _write_config(folder / "config.yaml", config)
        _write_facts(folder, {**_read(folder / "run.json"), "autoencoder": stage.autoencoder_key, "batch": batch})
    except OSError as error:
        raise UserError(f"--logdir {logdir}: the run folder cannot be written ({error}); choose another place") from error
    return folder


def add_seconds(folder: Path, seconds: float) -> int:
    """-> how long a run has taken so far, its interruptions left out."""
    facts = _read(folder / "run.json")
    facts["seconds"] = round(facts.get("seconds", 0) + seconds)
    _write_facts(folder, facts)
    return facts["seconds"]


def _write_facts(folder: Path, facts: dict) -> None:
    with atomic_write(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(facts) + "\n")


def _write_config(path: Path, config: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
