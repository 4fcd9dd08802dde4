"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import os
import signal
from types import FrameType

import torch
from pytorch_lightning import Callback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 10  # ranks ask one another every so many steps: a question costs one exchange between all of them


class Stop(Callback):
    """The first signal ends training after the optimizer step at hand; the second kills the process at once (the last
    checkpoint is whole even then). `signal` is the number of the signal that ended the run, None if it ran to its end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # what all ranks know
        self._asked: int | None = None  # what this process was sent
        self._before: dict[int, object] = {}
        self._step = 0

    def on_train_start(self, trainer, module) -> None:  # Lightning's own handlers are in place by now: they are replaced
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

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
        elif step % TOGETHER == 0:
            number = torch.tensor(self._asked or 0, device=trainer.strategy.root_device)
            self.signal = int(trainer.strategy.reduce(number, reduce_op="max")) or None
        if self.signal is not None:
            trainer.fit_loop.epoch_loop.max_steps = step  # should_stop would have it validate once more

    def on_train_end(self, trainer, module) -> None:
        self.restore()

    def on_exception(self, trainer, module, exception) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
