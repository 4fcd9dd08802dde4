"""What the time of a run goes into."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from pytorch_lightning import Callback


class Clock(Callback):
    """Seconds in training steps, in waiting for data, and in pauses that have names (pictures, checkpoints, validation).

    First in the list of callbacks: what the others do between two batches is then no waiting for data, provided that
    they do it inside `pause`.
    """

    def __init__(self) -> None:
        self.steps = self.waiting = 0.0
        self.pauses: dict[str, float] = defaultdict(float)
        self._mark = perf_counter()
        self._paused = 0.0  # of all pauses, when the mark was set
        self._validation = 0.0

    @property
    def training(self) -> float:
        """Seconds in steps and in waiting for their data."""
        return self.steps + self.waiting

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        finally:
            self.pauses[name] += perf_counter() - began

    def on_train_start(self, trainer, module) -> None:
        self._lap()

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.waiting += self._lap()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.steps += self._lap()

    def on_validation_start(self, trainer, module) -> None:
        self._validation = perf_counter()

    def on_validation_end(self, trainer, module) -> None:
        self.pauses["validation"] += perf_counter() - self._validation

    def _lap(self) -> float:
        now, paused = perf_counter(), sum(self.pauses.values())
        seconds = now - self._mark - (paused - self._paused)
        self._mark, self._paused = now, paused
        return seconds

    def shares(self) -> str:
        """-> `steps 93 %, waiting for data 1 %, pictures 4 % (12 s) ...`"""
        parts = {"steps": self.steps, "waiting for data": self.waiting, **self.pauses}
        total = sum(parts.values()) or 1.0
        return ", ".join(f"{name} {100 * seconds / total:.0f} % ({seconds:.0f} s)" for name, seconds in parts.items())
