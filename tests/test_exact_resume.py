"""A run that was interrupted is, to the bit, the run that was not: weights, averages, optimizers, schedules, counters."""

import os
import signal

import pytest
import torch
from pytorch_lightning import Callback
from stages import differing, first_stage, second_stage, train
from torch import nn

STEPS, HALF = 7, 3


@pytest.mark.parametrize("make", [first_stage, second_stage])
@pytest.mark.parametrize("world, accumulate", [(1, 1), (1, 2), (2, 2)])
def test_the_rest_after_half_is_the_rest_of_the_whole(tmp_path, make, world, accumulate):
    """With other workers, too."""
    options = dict(world=world, accumulate=accumulate, batch=4 // world, every=HALF)
    whole = train(tmp_path / "whole", make, STEPS, workers=0, **options)
    half = whole.with_name(f"step-{HALF:06d}.ckpt")
    assert torch.load(half, weights_only=True)["global_step"] == HALF
    assert differing(whole, train(tmp_path / "rest", make, STEPS, resume=half, workers=2, **options)) == {}


class Sent(Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == HALF - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("make", [first_stage, second_stage])
def test_the_rest_after_a_signal_is_the_rest_of_the_whole(tmp_path, make):
    whole = train(tmp_path / "whole", make, STEPS)
    half = train(tmp_path / "parts", make, STEPS, callbacks=[Sent()])
    assert torch.load(half, weights_only=True)["global_step"] == HALF
    found = differing(whole, train(tmp_path / "parts", make, STEPS, resume=half))
    assert {path for path in found if not path.startswith("loops.fit_loop.epoch_progress")} == {"epoch"}  # Lightning ended one


class Compiled(nn.Module):
    """As torch.compile wraps a module."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

    def forward(self, *arguments):
        return self._orig_mod(*arguments)


@pytest.mark.parametrize("make, part", [(first_stage, lambda m: (m.autoencoder, "encoder")), (second_stage, lambda m: (m.model["denoiser"], "network"))])
def test_compiled_or_not_a_run_goes_on(tmp_path, make, part):
    def compiled(*arguments):
        module, data = make(*arguments)
        owner, name = part(module)
        setattr(owner, name, Compiled(getattr(owner, name)))
        assert any("_orig_mod" in key for key in module.state_dict())
        return module, data

    whole = train(tmp_path / "whole", make, 4, every=2)
    half = train(tmp_path / "first", compiled, 4, every=2).with_name("step-000002.ckpt")
    assert differing(whole.with_name(half.name), half) == {} == differing(whole, train(tmp_path / "second", compiled, 4, resume=half))
