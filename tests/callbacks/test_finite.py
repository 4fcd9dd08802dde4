import logging

import pytest
import torch
from pytorch_lightning import Callback
from tiny_training import Tiny, fit

from ldm.callbacks.finite import FiniteGradients


class Poison(Callback):
    """One entry of the gradient of the batches named; keeps the weights after each batch and the norm before each step."""

    def __init__(self, *batches: int, value: float = float("inf")) -> None:
        self.batches, self.value, self.weights, self.norms = batches, value, [], []

    def on_train_start(self, trainer, module) -> None:
        self.keep(module)

    def on_after_backward(self, trainer, module) -> None:
        if len(self.weights) - 1 in self.batches:
            module.net[2].weight.grad[0, 3] = self.value
        self.norms.append(sum(p.grad.double().square().sum() for p in module.parameters()).sqrt().item())

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.keep(module)

    def keep(self, module) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))


def changed(poison: Poison) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(poison.weights, poison.weights[1:], strict=False)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_is_skipped_and_training_goes_on(value, clip, caplog):
    poison, finite = Poison(1, 2, 4, 5, value=value), FiniteGradients(patience=3)
    with caplog.at_level(logging.WARNING):
        trainer, module = fit([poison, finite], 8, gradient_clip_val=clip)
    assert changed(poison) == [True, False, False, True, False, False, True, True]
    assert poison.weights[-1].isfinite().all() and trainer.global_step == 8
    assert (finite.skipped, finite.in_a_row) == (4, 0)
    assert [message.split(":")[0] for message in caplog.messages] == [f"step {k} skipped" for k in (1, 2, 4, 5)]


def test_three_in_a_row_stop_the_run_with_finite_weights():
    poison, finite, module = Poison(2, 3, 4), FiniteGradients(), Tiny()
    with pytest.raises(FloatingPointError, match="3 steps in a row; the last was step 4"):
        fit([poison, finite], 8, module)
    assert finite.skipped == 3 and changed(poison) == [True, True, False, False]
    poison.keep(module)
    assert torch.equal(poison.weights[-1], poison.weights[2]) and poison.weights[-1].isfinite().all()


def test_the_norm_is_that_of_all_gradients_before_clipping():
    poison = Poison()
    trainer, _ = fit([poison, FiniteGradients()], 3, gradient_clip_val=1e-3)
    assert float(trainer.callback_metrics["train/grad_norm"]) == pytest.approx(poison.norms[-1], rel=1e-5)
