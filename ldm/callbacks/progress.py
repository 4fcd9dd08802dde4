"""How far a run is, how fast, and how long it will take: a bar in a terminal, else a plain line now and then."""

import sys
from collections.abc import Callable
from time import monotonic

from pytorch_lightning import Callback
from tqdm import tqdm

SHOWN = {"train/loss": "loss", "train/psnr": "psnr"}  # logged name -> shown as
REFRESH = 0.5  # seconds between two looks at the bar
LINE = 30.0  # seconds between lines where there is no terminal
FIRST = 5.0  # seconds after which the first estimate is made


def duration(seconds: float) -> str:
    """-> `45 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`"""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min" + (f" {seconds % 60:02d} s" if seconds < 600 else "")
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


class Progress(Callback):
    """Of one stage. The time left is what the rest takes at the mean pace of this run, pictures, validation and all.

    Args:
        label: what is trained.
        total: optimizer steps of the whole run; None where only `seconds` end it.
        seconds: after which trainer.max_time ends it.
        tell: where lines go.
        terminal: draw a bar; None: where stderr is one.
    """

    def __init__(self, label: str, total: int | None, tell: Callable[[str], None], seconds: float | None = None,
                 terminal: bool | None = None) -> None:
        self.label, self.total, self.seconds, self.tell = label, total, seconds, tell
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: tqdm | None = None
        self._told = self._warm = False

    def on_train_start(self, trainer, module) -> None:
        self._step = self._first = trainer.global_step
        self._images = module.images_seen
        self._began = self._looked = self._line = monotonic()
        if self.terminal and trainer.is_global_zero:
            self._bar = tqdm(total=self.total, initial=self._step, desc=self.label, dynamic_ncols=True, leave=False,
                             bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}")

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        now, step = monotonic(), trainer.global_step
        if step == self._step:
            return
        self._step = step
        if not self._warm:  # the first step takes longer: it is not counted in the pace
            self._began, self._images, self._first, self._warm = now, module.images_seen, step, True
            return
        if not trainer.is_global_zero or now - self._looked < REFRESH:
            return
        self._looked = now
        if not self._told and now - self._began > FIRST:
            self._told = True
            self.tell(f"{self.label}: about {self._left(now)} to go, {self._speed(module, now):.3g} images/s")
            self._line = now
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(", ".join(self._state(trainer, module, now)))
        elif now - self._line > LINE:
            self._line = now
            self.tell(f"{self.label}: step {step}/{self.total or '-'}, {', '.join(self._state(trainer, module, now))}")

    def _state(self, trainer, module, now: float) -> list[str]:
        logged = trainer.callback_metrics
        shown = [f"{short} {float(logged[name]):.4g}" for name, short in SHOWN.items() if name in logged]
        return [*shown, f"{self._speed(module, now):.3g} images/s", f"{self._left(now)} left"]

    def _speed(self, module, now: float) -> float:
        return (module.images_seen - self._images) / max(now - self._began, 1e-9)

    def _left(self, now: float) -> str:
        times = [self.seconds - (now - self._began)] if self.seconds else []
        if self.total and self._step > self._first:
            times.append((self.total - self._step) * (now - self._began) / (self._step - self._first))
        return duration(max(0.0, min(times))) if times else "an unknown time"

    def on_train_end(self, trainer, module) -> None:
        self._close()

    def on_exception(self, trainer, module, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
