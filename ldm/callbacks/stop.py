"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave."""

import os
import signal
from time import monotonic
from types import FrameType

import torch
from pytorch_lightning import Callback

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EVERY, TOGETHER = 1.0, 10  # ranks ask one another after about so many seconds, but at most so many steps


class Stop(Callback):
    """The first signal, to whichever rank, ends training after the optimizer step at hand (with several ranks: when they next
    ask one another); the second kills the process at once (the last checkpoint is whole even then). `signal` is the number
    of the signal that ended the run, the same on all ranks, None if it ran to its end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # what all ranks know
        self._asked: int | None = None  # what this process was sent
        self._before: dict[int, object] = {}
        self._step = 0

    def on_train_start(self, trainer, module) -> None:  # Lightning's own handlers are in place by now: they are replaced
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._last, self._next, self._began = trainer.global_step, trainer.global_step + 1, monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._asked = number

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # between two batches of one optimizer step nothing can be saved
        if trainer.world_size == 1:
            self.signal = self._asked
        elif step >= self._next:
            self._ask(trainer, step)
        if self.signal is not None:
            trainer.fit_loop.epoch_loop.max_steps = step  # should_stop would have it validate once more

    def _ask(self, trainer, step: int) -> None:
        """All ranks at the same step; the slowest one's pace decides when the next time is, for all of them."""
        pace = (monotonic() - self._began) / (step - self._last)
        said = torch.tensor([self._asked or 0, pace], device=trainer.strategy.root_device)
        number, pace = trainer.strategy.reduce(said, reduce_op="max").tolist()
        self.signal = int(number) or None
        self._last, self._next, self._began = step, step + min(TOGETHER, max(1, int(EVERY / pace))), monotonic()

    def on_train_end(self, trainer, module) -> None:
        self.restore()

    def on_exception(self, trainer, module, exception) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
