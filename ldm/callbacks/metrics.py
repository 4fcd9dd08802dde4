"""Everything that the module logs, one JSON object a line."""

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from pytorch_lightning import Callback
from torch import Tensor

from ldm.callbacks.clock import Clock
from ldm.common.files import atomic_write

log = logging.getLogger(__name__)


class Reader(Protocol):
    """Whoever else wants the lines."""

    def log(self, row: dict) -> None: ...


class Metrics(Callback):
    """Every so many steps a line in `path`: step, images_seen, time (seconds since 1970), images_per_s and data_wait (share
    of the time that training waited for data) since the line before, and all logged numbers, means over all ranks and over
    the batches that were accumulated for this step; after each validation a line of its results. Only rank 0 writes. A
    resumed run drops the lines after the step that it starts from. Lines that the disk does not take are written when it does.
    """

    def __init__(self, path: Path, every: int, clock: Clock, readers: Sequence[Reader] = ()) -> None:
        self.path, self.every, self.clock, self.readers = Path(path), every, clock, readers
        self._step = self._images = 0
        self._unwritten: list[str] = []  # lines that the disk has not taken
        self._training = self._waiting = 0.0
        self._last: dict[str, Tensor] = {}  # logged values
        self._fresh: dict[str, list[Tensor]] = defaultdict(list)  # those of the batches of the step at hand

    def on_train_start(self, trainer, module) -> None:
        self._step = trainer.global_step
        self._mark(module)
        if trainer.is_global_zero:
            self._forget_after(self._step)

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except (json.JSONDecodeError, KeyError):
                continue  # a line that a killed run left half-written
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        self._collect(trainer)
        if step == self._step:
            return  # one of several batches to a step
        if step % self.every == 0:
            numbers = self._gathered(trainer)
            seconds, waited = self.clock.training - self._training, self.clock.waiting - self._waiting
            speed = (module.images_seen - self._images) / max(seconds, 1e-9)
            if not any(name.split("/")[-1] == "lr" for name in numbers):
                numbers["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            self._write(trainer, module, {**numbers, "images_per_s": speed, "data_wait": waited / max(seconds, 1e-9)})
            self._mark(module)
        self._step = step
        self._fresh.clear()

    def _collect(self, trainer) -> None:
        """What this batch has logged: Lightning keeps what earlier ones did beside it."""
        for name, value in trainer.callback_metrics.items():
            if not _validates(name) and (name not in self._last or self._last[name].data_ptr() != value.data_ptr()):
                self._last[name] = value
                self._fresh[name].append(value)

    def _gathered(self, trainer) -> dict[str, float]:
        """The means over the batches of this step and over all ranks, which log the same names."""
        values = [torch.stack(self._fresh.get(name, [last])).float().mean() for name, last in self._last.items()]
        means = trainer.strategy.reduce(torch.stack(values), reduce_op="mean").tolist() if values else []
        return dict(zip(self._last, means, strict=True))

    def on_validation_end(self, trainer, module) -> None:
        found = {name: value for name, value in trainer.callback_metrics.items() if _validates(name)}
        if found:
            self._write(trainer, module, found)

    def _mark(self, module) -> None:
        self._images, self._training, self._waiting = module.images_seen, self.clock.training, self.clock.waiting

    def _write(self, trainer, module, numbers: dict) -> None:
        if not trainer.is_global_zero:
            return
        row = {"step": trainer.global_step, "images_seen": module.images_seen, "time": round(time.time(), 2)}
        row |= {name: _number(value) for name, value in numbers.items()}
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            append(self.path, "".join(self._unwritten))
        except OSError as error:
            if len(self._unwritten) == 1:
                log.warning("%s: numbers not written, training goes on and tries again: %s", self.path, error)
        else:
            self._unwritten.clear()
        for reader in self.readers:
            reader.log(row)


def append(path: Path, text: str) -> None:
    """All of the text or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def _validates(name: str) -> bool:
    return name.startswith("val")


def _number(value) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None  # JSON knows no NaN
