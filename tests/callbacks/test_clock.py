import time

from pytorch_lightning import Callback
from tiny_training import Tiny, fit

from ldm.callbacks.clock import Clock


class Slow(Tiny):
    def training_step(self, batch, index):
        time.sleep(0.02)
        return super().training_step(batch, index)


class Draws(Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, module, *_):
        with self.clock.pause("pictures"):
            time.sleep(0.05)


def test_pauses_are_neither_steps_nor_waiting():
    clock = Clock()
    fit([clock, Draws(clock)], steps=4, module=Slow(), val_check_interval=2)
    assert clock.pauses["pictures"] >= 0.2 and clock.steps >= 0.08 and clock.pauses["validation"] > 0
    assert clock.waiting < 0.1  # the pictures alone would be 0.15
    assert clock.shares().startswith("steps ") and "pictures" in clock.shares()
