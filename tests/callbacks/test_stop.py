import os
import signal

import pytest
from pytorch_lightning import Callback
from tiny_training import fit

from ldm.callbacks.stop import Stop


class Send(Callback):
    """A signal in the middle of the batch after `step` optimizer steps."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)
            self.step = -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_ends_after_the_step_at_hand(number, accumulate):
    before = signal.getsignal(number)
    stop = Stop()
    trainer, module = fit([Send(number, 2), stop], steps=50, accumulate_grad_batches=accumulate)
    assert stop.signal == number and trainer.global_step == 3
    assert module.images_seen == 3 * accumulate * 4  # whole steps only
    assert signal.getsignal(number) == before


def test_without_a_signal_it_is_not_there():
    stop = Stop()
    trainer, _ = fit([stop], steps=3)
    assert stop.signal is None and trainer.global_step == 3
