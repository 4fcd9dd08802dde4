"""What two processes have to agree on; started twice by test_two_ranks.py. Arguments: output folder."""

# ruff: noqa: I001
import ldm  # noqa: F401  first: it repairs torchvision

import os
import signal
import sys

import torch
from pytorch_lightning import Callback
from tiny_training import fit

from ldm.app.launch import leave
from ldm.callbacks.checkpoints import Checkpoints
from ldm.callbacks.clock import Clock
from ldm.callbacks.metrics import Metrics
from ldm.callbacks.seeding import Seeding
from ldm.callbacks.stop import Stop


class Asked(Callback):
    """A signal for rank 1 alone."""

    def on_train_batch_end(self, trainer, module, *_) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def gathered(value) -> list:
    others = [None, None]
    torch.distributed.all_gather_object(others, value)
    return others


folder, clock, stop = sys.argv[1], Clock(), Stop()
save = Checkpoints(f"{folder}/checkpoints", 4, 2, lambda module: {}, clock)
metrics = Metrics(f"{folder}/metrics.jsonl", 2, clock)
trainer, module = fit([clock, Seeding(1), Asked(), metrics, stop, save], steps=50, devices=2, strategy="ddp", plugins=[save.io])
(number, steps), other = gathered((stop.signal, trainer.global_step))
assert number == signal.SIGTERM and 4 <= steps <= 11 and other == (number, steps)  # stopped, and together
weights = gathered([p.detach().clone() for p in module.parameters()])
assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
assert list(torch.load(save.last, weights_only=True)["state_dict"]) == list(module.state_dict())
positions = gathered(module.positions)
assert sorted(positions[0] + positions[1]) == list(range(8 * steps))  # no sample twice, none left out
draws = gathered(torch.rand(3).tolist())
assert draws[0] != draws[1]
leave()  # an interpreter that ends with an open gloo group may abort
