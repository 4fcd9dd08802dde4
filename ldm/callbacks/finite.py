"""Gradient norm, and what happens when it is not a number."""

import logging
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.common.finite import bad_rows, culprit, listed, samples_of

log = logging.getLogger(__name__)
PATIENCE = 3  # skipped steps in a row that end the run


class FiniteGradients(pl.Callback):
    """Logs ``train/grad_norm`` and ``train/skipped``. A step whose gradient is not finite (a loss that is not makes it so, on
    all ranks) is skipped and counted, and what was wrong is named: each rank computes the losses of its batches once more,
    where the module has ``losses(batch) -> (B,), ...``, and tells which samples and which part of the module it was.

    Under fp16 the gradient scaler skips steps by itself, which is how it finds its scale; they count only where its scale has
    fallen below 1.

    Raises:
        FloatingPointError: after ``patience`` skipped steps in a row, before the weights were touched.
    """

    def __init__(self, patience: int = PATIENCE):
        self.patience, self.in_a_row, self.skipped = patience, 0, 0
        self._batches: list[dict] = []  # of the step at hand
        self._step = -1

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step != self._step:
            self._batches, self._step = [], trainer.global_step
        self._batches.append(batch)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients that lie in shares
        module.log("train/grad_norm", norm)
        if torch.isfinite(norm) or (scaler is not None and scaler.get_scale() >= 1):
            self.in_a_row = 0
        else:
            self.skip(trainer, module, params, norm)
        module.log("train/skipped", float(self.skipped))

    def state_dict(self) -> dict:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = state["skipped"]

    def skip(self, trainer: pl.Trainer, module: pl.LightningModule, params: list, norm: torch.Tensor) -> None:
        self.in_a_row += 1
        self.skipped += 1
        told = [text for batch in self._batches if (text := self.diagnosis(trainer, module, batch))]
        if trainer.is_global_zero or told:
            ids = {id(p): name for name, p in module.named_parameters()}
            first = next((ids.get(id(p), "a weight") for p in params if not own(p.grad).isfinite().all()), "another rank")
            found = "; ".join(told) or f"losses here are finite, the first gradient that is not is that of {first}"
            log.warning("step %d skipped: the gradient norm is %s; %s", trainer.global_step, float(norm), found)
        if self.in_a_row >= self.patience:
            raise FloatingPointError(f"the gradient was not finite for {self.patience} steps in a row; the last was step "
                                     f"{trainer.global_step}; {'; '.join(told) or 'see the lines above'}; lower the learning "
                                     "rate, or set trainer.gradient_clip_val")
        for p in params:
            p.grad = None

    @staticmethod
    def diagnosis(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> str | None:
        """What of a batch is not finite; None where its losses are, or are not known."""
        if not hasattr(module, "losses"):
            return None
        found: list[torch.Tensor] = []
        with trainer.precision_plugin.train_step_context():
            where = culprit(module, lambda: found.append(module.losses(batch)[0]))
        bad = bad_rows(found[0])
        if not bad.any():
            return None
        return f"the loss is not finite for {listed(samples_of(batch, bad))}" + (f" ({where})" if where else "")


def own(gradient: torch.Tensor) -> torch.Tensor:
    """What of it lies on this rank."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
