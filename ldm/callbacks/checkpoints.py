"""Checkpoints that are whole or absent, hold plain data only, and never end a run."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from ldm.callbacks.clock import Clock
from ldm.common.files import UserError, atomic_write, free_bytes
from ldm.common.weights import unwrapped

log = logging.getLogger(__name__)


class AtomicIO(TorchCheckpointIO):
    """How Lightning writes and reads: beside the target, flushed, then renamed; tensors and plain types only, so that
    torch.load(weights_only=True) reads it. A save that the disk does not take is a warning, an error if not `forgiving`."""

    forgiving = True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with self.forgiven():
            self._save(plain(checkpoint), Path(path))

    @contextmanager
    def forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.forgiving:
                raise UserError(f"the finished model cannot be saved: {error}; make space, then --resume auto") from error
            log.warning("checkpoint not saved, training goes on: %s", error)

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        size, free = nbytes(checkpoint), free_bytes(path)
        if size > free:  # told before half of it is written
            raise OSError(f"{path}: {size / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB free")
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path, map_location=lambda storage, place: storage, weights_only: bool | None = None) -> dict:
        return super().load_checkpoint(path, map_location, weights_only=True)


def plain(value: Any, path: str = "checkpoint") -> Any:
    """-> the same with plain types only; TypeError names what cannot be had so."""
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, dict):
        return {plain(key, path): plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    for kind in (bool, int, float, str):  # subclasses: enums, versions, numpy's numbers
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{path}: a {type(value).__name__} cannot be stored in a checkpoint; keep tensors and plain data only")


def nbytes(value: Any) -> int:
    """Of all tensors in plain data, those that share memory counted once."""
    found: dict[int, int] = {}

    def walk(item: Any) -> None:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (dict, list, tuple)):
            for inner in item.values() if isinstance(item, dict) else item:
                walk(inner)

    walk(value)
    return sum(found.values())


class Checkpoints(Checkpoint):  # Lightning calls this kind after all other callbacks: the EMA has had its step
    """Every so many optimizer steps checkpoints/step-N.ckpt, the newest `keep` of them stay; last.ckpt is the newest.

    describe: module -> plain data about the model, stored under "ldm".
    """

    def __init__(self, folder: Path, every: int, keep: int, describe: Callable[[Any], dict], clock: Clock) -> None:
        self.folder, self.every, self.keep, self.describe, self.clock = Path(folder), every, keep, describe, clock
        self.io = AtomicIO()  # for the Trainer's plugins
        self._step = 0

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        checkpoint["ldm"], checkpoint["state_dict"] = self.describe(module), unwrapped(checkpoint["state_dict"])

    def on_train_start(self, trainer, module) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        if step != self._step and step % self.every == 0:
            self.save(trainer)
        self._step = step

    def save_final(self, trainer) -> None:
        """What must not fail: UserError where there is no space."""
        self.io.forgiving = False
        self.save(trainer)

    def save(self, trainer) -> None:
        """All ranks have to call."""
        with self.clock.pause("checkpoints"):
            path = self.folder / f"step-{trainer.global_step:06d}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            if trainer.is_global_zero and path.exists():
                with self.io.forgiven():
                    link(path, self.last)
                    for old in sorted(self.folder.glob("step-*.ckpt"), key=saved_at)[: -self.keep]:
                        old.unlink()
            trainer.strategy.barrier()  # a rank that has gone on may be the first to leave, and end the others


def saved_at(path: Path) -> int:
    """Not its step: a run may have gone on from an older checkpoint than the newest."""
    return path.stat().st_mtime_ns


def link(path: Path, name: Path) -> None:
    """The file under a second name, in place of what had it; a copy where the file system knows no links."""
    with atomic_write(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
