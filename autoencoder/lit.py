"""Stage 1 under Lightning: one forward pass a batch, one backward pass for autoencoder and critic together.

Their losses share no weight (the critic is frozen while it judges and sees detached pictures while it learns), so the
sum of both has the gradients of each. Every weight takes part in every backward pass: plain DDP needs no search for
unused ones. Only the autoencoder's optimizer steps through Lightning, so ``global_step`` counts optimizer steps as
with one optimizer and ``max_steps`` means what it says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from autoencoder.codes import summed
from autoencoder.critics import Adversarial
from autoencoder.health import PROBLEMS, line, problems
from autoencoder.losses import ReconstructionLoss, psnr
from autoencoder.regularisers import Chance, Regulariser, Regularisers
from autoencoder.statistics import IMAGES, Tally, measure
from ldm.common.build import Block
from ldm.common.ema import Ema
from ldm.common.finite import bad_rows, culprit, listed, samples_of
from ldm.common.limits import limits
from ldm.common.optim import make_optimizer, make_schedule
from ldm.common.random import normal
from ldm.common.weights import evaluating, wrapped

log = logging.getLogger(__name__)

MAX_SKIPPED = 3  # batches in a row with inf or nan that end the run


class AutoencoderModule(pl.LightningModule):
    """Trains an autoencoder on batches {"image": (B,C,H,W) in [-1,1], "position": (B,)}.

    Args:
        autoencoder: ``forward(x, noise) -> (x_hat, Bottled)`` besides the contract of ``Autoencoder``.
        loss: what a reconstruction costs.
        optimizer: block of the autoencoder's optimizer, and of the critic's unless that has its own.
        critic: adversarial term; None: none, and one optimizer.
        critic_optimizer: block of the critic's optimizer.
        regularisers: what is asked of the latents besides; see ``autoencoder.regularisers``.
        schedule: block of the learning rate's course over the run; None: constant. The critic's is constant.
        ema_decay: keep an average of the weights, which is then what is evaluated and used.
        gradient_clip: largest norm of the gradient, for autoencoder and critic alone; None: no limit.
        accumulate: batches to an optimizer step.
        seed: of the noise that latents are drawn with.
    """

    kind = "autoencoder"
    given = ("seed",)
    check_params = staticmethod(limits(accumulate=1, gradient_clip=0, ema_decay=(0, 1)))

    def __init__(self, autoencoder: Autoencoder, loss: ReconstructionLoss, optimizer: Block,
                 critic: Adversarial | None = None, critic_optimizer: Block | None = None,
                 regularisers: list[Regulariser] | None = None, schedule: Block | None = None,
                 ema_decay: float | None = None, gradient_clip: float | None = None, accumulate: int = 1, seed: int = 23):
        super().__init__()
        if accumulate < 1:
            raise ValueError(f"model.params.accumulate: {accumulate}; it takes 1 or more batches to a step")
        self.automatic_optimization = False
        self.autoencoder, self.loss, self.critic = autoencoder, loss, critic
        self.regularisers = Regularisers(regularisers or [])
        self.regularisers.connect(autoencoder)
        self.loss.check(autoencoder.image_channels)
        if critic is not None:
            critic.check(autoencoder)
        self.ema = None if ema_decay is None else Ema(autoencoder, ema_decay)
        self.optimizer, self.critic_optimizer, self.schedule = optimizer, critic_optimizer or optimizer, schedule
        self.gradient_clip, self.accumulate, self.seed = gradient_clip, accumulate, seed
        self.images_seen = self.batches_seen = self.skipped = 0  # images: of all ranks together
        self._accumulated = self._skipped_in_a_row = self._codes_seen = 0
        self._names: list[str] = []  # of the samples of the step at hand
        self._told: set[str] = set()  # problems that the last look at the codebook found
        self._validation = Tally()

    @property
    def best(self) -> Autoencoder:
        """The weights to use: the average where one is kept."""
        return self.autoencoder if self.ema is None else self.ema.shadow

    @property
    def trained(self) -> nn.ModuleDict:
        """What the first optimizer steps: everything but the critic. The loss has a weight where its logvar is learned."""
        return nn.ModuleDict({"autoencoder": self.autoencoder, "loss": self.loss, "regularisers": self.regularisers})

    def train(self, mode: bool = True) -> AutoencoderModule:
        super().train(mode)
        if self.ema is not None:
            self.ema.eval()
        return self

    def configure_optimizers(self) -> tuple[list, list]:
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        if steps is None and self.trainer.estimated_stepping_batches != float("inf"):
            steps = self.trainer.estimated_stepping_batches // self.accumulate
        optimizers = [make_optimizer(self.optimizer, self.trained)]
        if self.critic is not None:
            self.critic.plan(None if steps is None else steps * self.accumulate)
            optimizers.append(make_optimizer(self.critic_optimizer, self.critic))
        return optimizers, [make_schedule(self.schedule, optimizers[0], steps)]

    def on_fit_start(self) -> None:
        for turn in (0, 1):  # one rank of each machine downloads, the others find the file
            if (self.local_rank > 0) == turn:
                self.loss.prepare()
                self.regularisers.prepare()
            self.trainer.strategy.barrier()

    def training_step(self, batch: dict, index: int) -> None:
        x = batch["image"]
        number, self.batches_seen = self.batches_seen, self.batches_seen + 1
        self.images_seen += len(x) * self.trainer.world_size
        goal, x_hat, bottled = self.regularisers.reconstruct(self.autoencoder, x, self.noise(batch), self.chance(batch, number))
        terms = self.loss(goal, x_hat, bottled.losses, number)
        asked, logged = self.regularisers.terms(x, bottled.latent, terms["nll"])
        terms |= logged | {"loss": terms["loss"] + asked}
        self._names += samples_of(batch)
        # before the critic sees it: its running statistics would keep it
        if self.not_finite(terms, lambda: self.diagnosis(batch, goal, x_hat)):
            return
        total = terms["loss"]
        if self.critic is not None:
            last_layer = self.autoencoder.last_layer if self.critic.adaptive else None
            terms |= self.critic.judge(x_hat, terms["nll"], last_layer, number)
            terms |= self.critic.learn(goal, x_hat, number)
            total = total + terms["adversarial"] + terms["critic"]
        complete = self._accumulated + 1 == self.accumulate
        hold = nullcontext if complete else getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        with hold():
            self.manual_backward(total / self.accumulate)
        self._accumulated += 1
        if complete:
            terms |= self.step(terms, critic_learns=self.critic is not None and self.critic.learns(number))
        terms |= {"psnr": psnr(goal, x_hat.detach()).mean(), "skipped": float(self.skipped), **self.usage(bottled.codes)}
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(x))

    def usage(self, codes: Tensor | None) -> dict[str, float]:
        """How much of the codebook was used lately, every 50 batches; a collapse is told when it is first seen."""
        bottleneck = getattr(self.autoencoder, "bottleneck", None)
        if codes is None or not hasattr(bottleneck, "usage"):  # no codes, or a user's own kind that does not count them
            return {}
        self._codes_seen += codes.numel() * self.trainer.world_size
        if self.batches_seen % 50:
            return {}
        used = {f"codebook_{name}": value for name, value in bottleneck.usage().items()}
        seen = {"codebook_seen": self._codes_seen, "codebook_size": bottleneck.codes}
        found = problems({**used, **seen}, self.autoencoder.channels)
        self.tell(sentence for name, sentence in found.items() if name not in self._told)
        self._told = set(found)
        return used

    def chance(self, batch: dict, number: int) -> Chance:
        positions = batch["position"] if "position" in batch else torch.randint(2**40, (len(batch["image"]),))
        return Chance(self.seed, number, positions.tolist())

    def noise(self, batch: dict) -> Tensor | None:
        """What latents are drawn with: a function of the pictures' positions in the run, so that it can be resumed."""
        if "position" not in batch:
            return None
        x, factor = batch["image"], self.autoencoder.factor
        shape = (self.autoencoder.channels, x.shape[2] // factor, x.shape[3] // factor)
        return normal(shape, self.seed, "posterior", batch["position"].tolist(), x.device)

    def step(self, terms: dict[str, Tensor], critic_learns: bool) -> dict[str, Tensor]:
        """Clip, check and step; gives back what there is to log."""
        optimizers = self.listed_optimizers()
        modules = {"gradient_norm": self.trained}
        if critic_learns:
            modules["critic_gradient_norm"] = self.critic
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # fp16: gradients are scale times too large
        scale = scaler.get_scale() if scaler else 1.0
        norms = {name: clip(module, self.gradient_clip, scale) for name, module in modules.items()}
        lr = optimizers[0].param_groups[0]["lr"]
        if scaler is None and self.not_finite({**norms, **terms}, lambda: f"somewhere in {listed(self._names)}"):
            return {}
        self._skipped_in_a_row = 0
        optimizers[0].step()
        if critic_learns:
            self.trainer.strategy.optimizer_step(optimizers[1].optimizer, lambda: None)
        self.clear_gradients()
        self.lr_schedulers().step()
        if self.ema is not None:
            self.ema.update(self.autoencoder)
        return {**norms, "lr": lr}

    def not_finite(self, terms: dict[str, Tensor], where: Callable[[], str]) -> bool:
        """Whether a term is inf or nan on any rank. Then this optimizer step is dropped; after the third without a whole
        one in between, FloatingPointError names the term. where: which samples it was on this rank."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        if not summed((~values.isfinite()).any().float()):
            return False
        wrong = [name for name, value in zip(terms, values.tolist(), strict=True) if not abs(value) < float("inf")]
        said = f"{', '.join(wrong)} not finite, {where()}" if wrong else "a term on another rank not finite"
        self.clear_gradients()
        self.skipped += 1
        self._skipped_in_a_row += 1
        told = f"batch {self.batches_seen}: {said}"
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(f"{told}, the {MAX_SKIPPED}rd in a row: stopped before the weights were touched. "
                                     "Lower the learning rate, set gradient_clip, or use precision bf16 or 32")
        log.warning("%s: step skipped", told)
        return True

    def diagnosis(self, batch: dict, goal: Tensor, x_hat: Tensor) -> str:
        """Which samples, and which part of the autoencoder; it is asked once more, in eval mode, where it learns nothing."""
        with evaluating(self.autoencoder):
            where = culprit(self.autoencoder, lambda: self.autoencoder(batch["image"], self.noise(batch)))
        bad = bad_rows(goal, x_hat)
        return f"because of {listed(samples_of(batch, bad if bad.any() else None))}" + (f" ({where})" if where else "")

    def clear_gradients(self) -> None:
        for optimizer in self.listed_optimizers():
            optimizer.zero_grad()
        self._accumulated, self._names = 0, []

    def listed_optimizers(self) -> list:  # Lightning gives one alone without a list
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def on_validation_epoch_start(self) -> None:
        self._validation = Tally()

    def validation_step(self, batch: dict, index: int) -> None:
        x, tally = batch["image"], self._validation
        mean, logvar = self.best.moments(x)
        x_hat, bottled = self.best(x, torch.zeros_like(mean))  # the mode: no chance in what is compared
        tally.latents(mean, logvar)
        tally.terms({**self.loss(x, x_hat, bottled.losses, self.batches_seen), "psnr": psnr(x, x_hat).mean()}, len(x))
        size = getattr(getattr(self.best, "bottleneck", None), "codes", None)
        if bottled.codes is not None and size is not None:
            tally.codes(bottled.codes, size)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured, and say in sentences how things stand."""
        tally, channels = self._validation.gathered(), self.autoencoder.channels
        values = tally.summary() | (self.critic.right() if self.critic is not None else {})
        if "codes" in tally.sums:
            values |= {"codebook_seen": float(tally.sums["codes"].sum()), "codebook_size": len(tally.sums["codes"])}
        found = problems(values, channels, getattr(self.loss, "kl", None))
        if self.trainer.is_global_zero:
            log.info("validation: %s", line(values, channels))
        self.tell(found.values())
        values |= {f"health_{name}": float(name in found) for name in PROBLEMS}  # 1: there is this problem
        self.log_dict({f"val/{name}": float(value) for name, value in values.items()})

    def tell(self, sentences: Iterable[str]) -> None:
        for sentence in sentences:
            if self.trainer.is_global_zero:
                log.warning(sentence)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:  # (B,C,H,W) in [-1,1] twice
        with evaluating(self.best):
            return self.best.decode(self.best.encode(x))

    @torch.no_grad()
    def measure_statistics(self, loader: Iterable[dict], images: int = IMAGES, fingerprint: str | None = None) -> dict:
        """``statistics.measure`` of the weights to use; stored in both sets of weights. All ranks have to call."""
        with evaluating(self.best):
            found = measure(self.best, loader, images, fingerprint)
        spec = self.best.spec
        self.autoencoder.set_statistics(spec.shift, spec.scale, spec.count, spec.data_hash)
        return found

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["progress"] = {"images": self.images_seen, "batches": self.batches_seen, "skipped": self.skipped}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        progress = checkpoint["progress"]
        self.images_seen, self.batches_seen = progress["images"], progress["batches"]
        self.skipped = progress["skipped"]
        checkpoint["state_dict"] = wrapped(checkpoint["state_dict"], self)


def clip(module: nn.Module, limit: float | None, scale: float) -> Tensor:
    """Scale gradients down to norm ``limit``; gives the norm before, in units without the loss's ``scale``."""
    weights = [p for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in weights])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(weights, limit * scale, norm)
    return norm / scale
