"""Stage 2 under Lightning: DiffusionModule, and ClassifierModule for what guides it. They wire; the mathematics is in
loss.py, denoiser.py, classifier.py and process.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm.adapters import Lora, adapt, adapters, problems
from ldm.classifier import NoisyClassifier, build_classifier, cross_entropy
from ldm.common.build import Block
from ldm.common.ema import Ema, HalfLife, Power, Snapshots
from ldm.common.limits import limits
from ldm.common.optim import make_optimizer, make_schedule
from ldm.common.random import normal, uniform
from ldm.common.weights import wrapped
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, Draw, encoded, entry
from ldm.denoiser import build_denoiser, impossible
from ldm.densities import Density, LossSecondMoment, Uniform
from ldm.latents import Spread, check_scale, spread
from ldm.loss import Huber, Objective, PseudoHuber, Variational, diffusion_loss, misfits
from ldm.parameterization import Preconditioned
from ldm.process import Process, RectifiedFlow
from ldm.weights import Uncertainty, Weight

QUARTILES = 4


class OnLatents(pl.LightningModule):
    """What every training on the latents of a frozen autoencoder has in common. ``model`` (ModuleDict) is what is trained,
    and averaged where ``ema_decay`` is given. With it go the callbacks EmaUpdate and FiniteGradients (``ldm.callbacks``),
    which main.py adds. All randomness follows from the batch's "position" (B,), the samples' places in the run."""

    autoencoder_autocast = False

    def __init__(self, autoencoder: Autoencoder, model: dict[str, nn.Module], optimizer: Block, schedule: Block | None,
                 latents: Literal["sample", "mode"], statistics: Literal["check", "measure", "force"],
                 ema_decay: float | HalfLife | Power | None, snapshots: Snapshots | None, seed: int):
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.model = nn.ModuleDict(model)
        self.ema = None if ema_decay is None else Ema(self.model, ema_decay)
        self.snapshots, self.averages = snapshots, None if snapshots is None else snapshots.averages(self.model)
        self.optimizer, self.schedule = optimizer, schedule
        self.latents, self.statistics, self.seed = latents, statistics, seed
        self.images_seen = 0  # by all processes together
        self.train()

    @property
    def conditioner(self) -> nn.Module | None:
        """What reads conditions from batches, if anything does."""
        return None

    @property
    def trained(self) -> nn.Module:
        """What the optimizer steps."""
        return nn.ModuleDict({"model": self.model})

    @torch.no_grad()
    def latent(self, batch: dict, positions: list[int], stream: str) -> Tensor:
        """A draw of q(z|x) or its mode, (B,C,h,w) at unit scale, in fp32; computed so too, unless ``autoencoder_autocast``."""
        if "latent" in batch:
            mean, std = batch["latent"].float(), batch.get("latent_std")
        elif self.autoencoder_autocast:
            mean, std = self.autoencoder.posterior(batch["image"], autocast=True)
        else:
            mean, std = self.autoencoder.posterior(batch["image"].float())
        if std is None or self.latents == "mode":
            return mean
        return mean + std.float() * normal(mean.shape[1:], self.seed, stream, positions, mean.device)

    @property
    def measures(self) -> bool:
        """Whether the autoencoder's statistics are to be measured before training. A shift and scale that were set by hand
        (the table of published autoencoders) count as known, though their pictures were not counted."""
        spec = self.autoencoder.spec
        by_hand = bool(spec.shift.any() or (spec.scale != 1).any())
        return self.statistics == "measure" or (self.statistics == "check" and not spec.count and not by_hand)

    def verify(self, batches: Iterable[dict], data_hash: str | None = None) -> Spread:
        """The spread of the latents that training will see of these batches (on each rank its own; all have to call).
        UserError where it is not about 1, unless ``statistics`` is "force". data_hash: of the data set."""
        device = self.autoencoder.shift.device
        on_device = ({key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                     for batch in batches)  # fmt: skip
        found = spread(self.latent(batch, batch["position"].tolist(), "posterior") for batch in on_device)
        check_scale(found, self.autoencoder.spec, data_hash, force=self.statistics == "force")
        return found

    def configure_optimizers(self) -> dict:
        optimizer = make_optimizer(self.optimizer, self.trained)
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        return {"optimizer": optimizer,
                "lr_scheduler": {"scheduler": make_schedule(self.schedule, optimizer, steps), "interval": "step"}}

    def train(self, mode: bool = True) -> OnLatents:
        super().train(mode)
        for part in filter(None, (self.autoencoder, self.ema, self.averages, *self.model.children())):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.images_seen = checkpoint["images_seen"]
        checkpoint["state_dict"] = wrapped(checkpoint["state_dict"], self)


class DiffusionModule(OnLatents):
    """Trains a denoiser and the trainable part of its conditioner on the latents of a frozen autoencoder.

    A batch holds "image" (B,C,H,W) in [-1,1] and "caption" (list of B), or what a cache made of them: "latent",
    "latent_std" (B,C,h,w), "text_states" (B,L,D), "text_mask" (B,L); what other conditioners take; and always "position"
    (B,), the samples' places in the run, from which all randomness follows.

    Args:
        autoencoder, seed, sampling: given by the program.
        conditioner: batch -> Cond; None trains without conditions.
        network: block of the network; its sizes follow from the autoencoder and the conditioner.
        process, parameterization, variance, self_conditioning: see ``ldm.process``, ``ldm.parameterization``,
            ``ldm.denoiser``.
        density, weight, distance, uncertainty, variational, draws, offset_noise, immiscible: of the loss, see
            ``ldm.loss.Objective``, ``ldm.densities``, ``ldm.weights``.
        optimizer, schedule: blocks; no schedule: a constant learning rate.
        latents: train on draws of q(z|x), or on its mode, which suits decoders that were trained on wide posteriors.
        statistics: "check" refuses latents whose standard deviation is not about 1; an autoencoder that was never measured
            (one trained elsewhere, or pixels) is measured on the training data first. "measure" measures any autoencoder
            anew; "force" measures nothing and warns in place of refusing.
        ema_decay: of the averaged weights that sampling uses, a number or a profile (``ldm.common.ema``); None keeps none.
        snapshots: averages that are saved along the way, for others of any width after the fact.
        autoencoder_autocast: the autoencoder computes in the precision of the training too (trainer.precision); otherwise it
            stays in that of its weights, since some autoencoders overflow in half.
        lora: train low-rank changes of a given model alone (``ldm.adapters.Lora``); checkpoints then hold nothing else.
    """

    kind = "diffusion"
    given = ("autoencoder", "seed", "sampling")

    def __init__(self, autoencoder: Autoencoder, network: Block, optimizer: Block, conditioner: Conditioner | None = None,
                 process: Process | None = None,
                 parameterization: Literal["noise", "data", "v", "flow", "edm", "previous", "velocity"]
                 | Preconditioned = "flow",
                 variance: Literal["fixed", "learned", "learned_range"] = "fixed",
                 density: Density | None = None,
                 weight: Literal["uniform", "simple", "min_snr", "soft_min_snr", "p2", "edm", "sigmoid", "vlb", "velocity"]
                 | Weight = "uniform",
                 distance: Literal["mse", "l1", "huber", "pseudo_huber"] | Huber | PseudoHuber = "mse",
                 uncertainty: Uncertainty | None = None, variational: Variational | None = None,
                 draws: Literal["independent", "stratified"] = "independent", offset_noise: float = 0.0,
                 immiscible: bool = False, self_conditioning: bool = False,
                 schedule: Block | None = None, latents: Literal["sample", "mode"] = "sample",
                 statistics: Literal["check", "measure", "force"] = "check",
                 ema_decay: float | HalfLife | Power | None = 0.9999, snapshots: Snapshots | None = None,
                 autoencoder_autocast: bool = False, lora: Lora | None = None, seed: int = 23,
                 sampling: dict | None = None):
        denoiser = build_denoiser(network, process or RectifiedFlow(), parameterization, autoencoder, conditioner,
                                  variance=variance, self_conditioning=self_conditioning)
        model = nn.ModuleDict({"denoiser": denoiser} | ({} if conditioner is None else {"conditioner": conditioner}))
        if lora is not None:
            adapt(model, lora)
        super().__init__(autoencoder, model, optimizer, schedule, latents, statistics, ema_decay, snapshots, seed)
        self.loss = Objective(density, weight, distance, uncertainty, variational, draws, offset_noise, immiscible)
        self.loss.attach(denoiser.process, variance)
        self.sampling, self.autoencoder_autocast, self.lora = dict(sampling or {}), autoencoder_autocast, lora
        self.strict_loading = lora is None

    @property
    def trained(self) -> nn.Module:
        return nn.ModuleDict({"model": self.model, "loss": self.loss})

    def kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a state dict checkpoints hold: all, or of a LoRA training what is trained, and its averages."""
        if self.lora is None:
            return state
        whole = ("autoencoder", "model", "ema", "averages")
        own = {key: value for key, value in state.items() if key.split(".")[0] not in whole or key.endswith(".updates")}
        return adapters(state) | own

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = self.kept(checkpoint["state_dict"])

    @property
    def conditioner(self) -> nn.Module | None:
        return _conditioner(self.model)

    def parts(self, ema: bool = True) -> dict[str, nn.Module | None]:
        """Autoencoder, conditioner and denoiser as they sample now, with the averaged weights if there are any; shared."""
        model = self.ema.shadow if ema and self.ema is not None else self.model
        return {"autoencoder": self.autoencoder, "conditioner": _conditioner(model), "denoiser": model["denoiser"]}

    def training_step(self, batch: dict, index: int) -> Tensor:
        losses, t = self.losses(batch)
        loss = self.loss.reduce(losses, t, batch["position"], self.all_gather)
        self.images_seen += len(losses) * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True, batch_size=len(losses))
        return loss

    def losses(self, batch: dict) -> tuple[Tensor, Tensor]:  # (B,) twice: the samples' losses, and their times
        positions = batch["position"].tolist()
        z = self.latent(batch, positions, "posterior")

        def draw(stream: str) -> Tensor:  # (B,)
            return uniform(self.seed, stream, positions, z.device)

        t = self.loss.times(positions, self.seed, self.model["denoiser"].process, z.device)
        noise = self.loss.noise(z, positions, self.seed)
        cond = self.condition(self.model, batch, z, draw)
        again = draw("again") < 0.5
        return self.loss(self.model["denoiser"], z, cond, t, noise, again), t

    def validation_step(self, batch: dict, index: int) -> None:
        """The loss on the same noise and times every time, in each quarter of the time axis, for both sets of weights."""
        positions = batch["position"].tolist()
        z = self.latent(batch, positions, "val/posterior")
        noise = normal(z.shape[1:], self.seed, "val/noise", positions, z.device)
        share = uniform(self.seed, "val/t", positions, z.device)
        models = {"val/loss": self.model} | ({} if self.ema is None else {"val/loss_ema": self.ema.shadow})
        for name, model in models.items():
            cond, losses = self.condition(model, batch, z), []
            for quarter in range(QUARTILES):
                t = Uniform()((quarter + share) / QUARTILES, model["denoiser"].process)
                losses.append(diffusion_loss(model["denoiser"], z, cond, t, noise).mean())
                self.log(f"{name}_q{quarter + 1}", losses[-1], batch_size=len(z), sync_dist=True)
            self.log(name, torch.stack(losses).mean(), batch_size=len(z), sync_dist=True)

    def condition(self, model: nn.ModuleDict, batch: dict, z: Tensor, draw: Draw | None = None) -> Cond:
        """The condition of latents z (B,C,h,w); with ``draw`` some of it is dropped, as the conditioner says."""
        conditioner = _conditioner(model)
        if conditioner is None:
            return Cond()
        batch = encoded(conditioner, self.autoencoder, batch, z.shape[2:])
        return conditioner(batch) if draw is None else conditioner.with_dropout(batch, draw)


class ClassifierModule(OnLatents):
    """Trains a classifier of noisy latents (2105.05233, section 4.3), which guides a diffusion model on the same latents.

    A batch holds "image" (B,C,H,W) in [-1,1], or "latent" and "latent_std" of a cache, the class (B,) int under ``key``, and
    "position" (B,).

    Args:
        autoencoder, seed, size: given by the program.
        classifier: block of the network; its channels and the side that it sees follow from the autoencoder and the pictures.
        process: block of the process whose noise it learns: that of the model which it is to guide.
        density: of the times that it is trained at.
        key: of the class in the batch.
        optimizer, schedule, latents, statistics, ema_decay: as for ``DiffusionModule``.
    """

    kind = "classifier"
    given = ("autoencoder", "seed", "size")
    check_params = staticmethod(limits(ema_decay=(0, 1)))

    def __init__(self, autoencoder: Autoencoder, classifier: Block, optimizer: Block, process: Block | None = None,
                 density: Density | None = None, key: str = "class", schedule: Block | None = None,
                 latents: Literal["sample", "mode"] = "sample", statistics: Literal["check", "measure", "force"] = "check",
                 ema_decay: float | HalfLife | Power | None = 0.9999, seed: int = 23, size: list[int] | None = None):
        process = process or {"target": "ldm.process.RectifiedFlow"}
        made = build_classifier(classifier, process, autoencoder, size)
        super().__init__(autoencoder, {"classifier": made}, optimizer, schedule, latents, statistics, ema_decay, None, seed)
        if isinstance(density, LossSecondMoment):
            raise ValueError("density: LossSecondMoment follows the losses of a diffusion model; take another one")
        self.density, self.key = density or Uniform(), key

    def classifier(self, ema: bool = True) -> NoisyClassifier:
        """As it guides now, with the averaged weights if there are any; shared."""
        return (self.ema.shadow if ema and self.ema is not None else self.model)["classifier"]

    def training_step(self, batch: dict, index: int) -> Tensor:
        losses, right = self.losses(batch)
        self.images_seen += len(losses) * self.trainer.world_size
        loss, accuracy = losses.mean(), right.float().mean()
        self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, prog_bar=True, batch_size=len(losses))
        return loss

    def losses(self, batch: dict) -> tuple[Tensor, Tensor]:  # (B,) twice: the samples' losses, and whether they were right
        positions = batch["position"].tolist()
        z = self.latent(batch, positions, "posterior")
        t = self.density(uniform(self.seed, "t", positions, z.device), self.classifier(ema=False).process)
        noise = normal(z.shape[1:], self.seed, "noise", positions, z.device)
        return cross_entropy(self.classifier(ema=False), z, entry(batch, self.key, self), t, noise)

    def validation_step(self, batch: dict, index: int) -> None:
        """Loss and accuracy in each quarter of the time axis, on the same noise and times every time."""
        positions = batch["position"].tolist()
        z = self.latent(batch, positions, "val/posterior")
        noise = normal(z.shape[1:], self.seed, "val/noise", positions, z.device)
        share, classifier = uniform(self.seed, "val/t", positions, z.device), self.classifier()
        found = []
        for quarter in range(QUARTILES):
            t = Uniform()((quarter + share) / QUARTILES, classifier.process)
            found.append([each.float().mean() for each in cross_entropy(classifier, z, batch[self.key], t, noise)])
        for name, values in zip(("val/loss", "val/accuracy"), torch.tensor(found).T, strict=True):
            shares = {f"{name}_q{quarter + 1}": value for quarter, value in enumerate(values)}
            self.log_dict(shares | {name: values.mean()}, batch_size=len(z), sync_dist=True)


def _conditioner(model: nn.ModuleDict) -> nn.Module | None:
    return model["conditioner"] if "conditioner" in model else None  # noqa: SIM401  (a ModuleDict has no get)


def _check_params(params: dict, path: str) -> list[str]:
    """Combinations that cannot be, found before anything is built (see ``ldm.common.build.check``)."""
    from ldm.common.build import build, is_block

    parts = {name: params.get(name) for name in ("process", "parameterization", "density", "uncertainty", "variational")}
    for name, part in parts.items():
        try:
            parts[name] = build(part) if is_block(part) else part
        except ValueError as error:
            return [f"{path}.{name}: {error}"]
    process, parameterization = parts["process"] or RectifiedFlow(), parts["parameterization"] or "flow"
    variance = params.get("variance", "fixed")
    return [*limits(ema_decay=(0, 1), offset_noise=0)(params, path),
            *(f"{path}.lora.{problem}" for problem in problems(params.get("lora") or {})),
            *(f"{path}.parameterization: {problem}" for problem in impossible(process, parameterization, variance)),
            *(f"{path}.{problem}" for problem in misfits(process, variance, parts["density"], parts["uncertainty"],
                                                         parts["variational"]))]  # fmt: skip


_check_params.reads = ("process", "parameterization", "density", "uncertainty", "variational", "variance", "lora")
DiffusionModule.check_params = staticmethod(_check_params)
