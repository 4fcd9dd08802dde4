"""Bits per dimension of pictures under a diffusion model, of pixels or of latents: what ``ldm.likelihood`` gives for a batch,
averaged over a data set and named for what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder, Identity
from ldm.common.random import generator
from ldm.common.team import collected, everybodys, place
from ldm.cond import Cond
from ldm.conditioners.base import encoded
from ldm.denoiser import Denoiser, bind
from ldm.likelihood import (
    DECODERS,
    Bound,
    Decoder,
    Noise,
    bits_per_dim,
    clamped,
    continuous_bound,
    decoder_nats,
    discretized_log_likelihood,
    draw_latent,
    joined,
    normal_log_density,
    ode_likelihood,
    rate_distortion,
    variational_bound,
)
from ldm.parameterization import Denoise, Prediction

QUIET = 0.05  # of q(z|x), for diffusion models that were trained on latents without noise
LEVEL = math.log(127.5)  # nats: minus the logarithm of the distance between two of the 256 levels in [-1, 1]


@dataclass(frozen=True)
class Settings:
    """What is measured, and how; see ``ldm.likelihood``.

    Args:
        times: of the bound, (N+1,) down to clean data; None: no bound.
        variance: of the reverse steps, where the model has not learned it.
        continuous: intervals of the bound of infinitely many steps; None: none.
        ode: the probability-flow ODE too, with so many ``probes`` and this ``tolerance``.
        decoder, decoder_std: p(x|z) of latent models; None: the deviation of the pictures' own reconstructions.
        latent_std: of q(z|x) at unit scale; None: the autoencoder's own, or QUIET where it encodes without noise.
        clip: clamp the predicted x0 to the range of pixels.
        rate_distortion: the curve of progressive coding, from the bound.
        captions: under each picture's own condition; else under the empty one.
        seed: of all noise; picture k has generators of its own.
    """

    times: Tensor | None
    variance: Literal["small", "large"] = "large"
    continuous: int | None = None
    ode: bool = False
    probes: int = 1
    tolerance: float = 1e-5
    decoder: Literal["discretized", "gaussian", "laplace"] = "discretized"
    decoder_std: float | None = None
    latent_std: float | None = None
    clip: bool = False
    rate_distortion: bool = False
    captions: bool = True
    seed: int = 0


@dataclass
class Tally:
    """Of batches: nats a picture under names, whole bounds, and errors (B,N) of pictures predicted on the way."""

    nats: dict[str, list[Tensor]] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)

    def add(self, **nats: Tensor) -> None:
        for name, value in nats.items():
            self.nats.setdefault(name, []).append(value.double().cpu())

    def of(self, name: str) -> Tensor:  # (pictures,)
        return torch.cat(self.nats[name])

    def __iadd__(self, other: Tally) -> Tally:
        for name, values in other.nats.items():
            self.nats.setdefault(name, []).extend(values)
        self.bounds += other.bounds
        self.errors += other.errors
        self.evaluations += other.evaluations
        return self


def evaluate(autoencoder: Autoencoder, conditioner: nn.Module | None, denoiser: Denoiser,
             batches: Callable[[], Iterable[dict]], settings: Settings,
             progress: Callable[[float], None] = lambda pictures: None) -> dict:
    """The table. ``batches()`` gives dicts with "image" (B,C,H,W) in [-1,1] and what the conditioner takes, the same ones at
    every call, of several processes to each a part, numbered by "position"; rank 0 then has the table. ``progress`` is told how
    many more pictures are done, in parts. Everything in fp32, in eval mode."""
    pixels, parts, tally = isinstance(autoencoder, Identity), [], Tally()
    if not pixels:
        first = next(iter(batches()), None)
        if settings.latent_std is None and first and autoencoder.posterior(first["image"][:1])[1] is None:
            settings = replace(settings, latent_std=QUIET)
        std = settings.decoder_std or likeliest_std(autoencoder, batches, settings)
    for batch, positions in numbered(batches()):
        x, denoise, part = batch["image"], under(conditioner, denoiser, batch, settings.captions, autoencoder), Tally()
        if pixels:
            if settings.clip:
                denoise = clamped(denoise, *(autoencoder.normalise(torch.full_like(x[:1], side)) for side in (-1, 1)))
            z, decoder = autoencoder.normalise(x), level_masses(autoencoder)
            level = torch.special.ndtr(draws(settings.seed, "level", positions)(0, x.shape)).to(x) - 0.5
            smooth = autoencoder.normalise(x + level / 127.5)
        else:
            z, entropy = latents(autoencoder, x, positions, settings)
            smooth, decoder = z, normal_log_density
            part.add(entropy=entropy, misfit=decoder_nats(autoencoder, x, z, DECODERS[settings.decoder], std))
        look(part, settings, denoise, denoiser, autoencoder, x, z, smooth, decoder, positions, progress)
        parts.append((positions[0], part))
    for _, part in collected(parts, key=itemgetter(0)):
        tally += part
    if place()[0] > 0:
        return {}
    pictures = len(tally.of(next(iter(tally.nats))))
    about = {"pictures": pictures, "picture": list(x.shape[1:]),
             "condition": "each picture's own" if settings.captions and conditioner is not None else "none"}
    dims = x[0].numel()
    if pixels:
        scale = x[0, 0].numel() * float(autoencoder.scale.double().log().sum())
        return about | {"pixels": of_pixels(tally, dims, scale)} | curves(tally, denoiser, settings, dims)
    return about | of_latents(tally, settings, dims, list(z.shape[1:]), std) | curves(tally, denoiser, settings, dims)


def of_pixels(tally: Tally, dims: int, scale: float) -> dict:
    """Kind -> bits per dimension. Bounds are of the levels' masses; the ODE's density of pixels, with noise that is uniform
    over their level, gives a bound of them too, on average (2011.13456, section 4.3). scale: log of the latents' scale, all
    dimensions."""
    found = {name: in_bits(tally.of(name), dims) | parts(tally, name, dims) for name in BOUNDS if name in tally.nats}
    if "ode" in tally.nats:
        found["ode"] = in_bits(tally.of("ode") + scale + dims * LEVEL, dims) | {"evaluations": max(tally.evaluations)}
    return found


def of_latents(tally: Tally, settings: Settings, dims: int, shape: list[int], std: float) -> dict:
    """The latents' densities at unit scale by each kind, per latent dimension; and with each of them the bound of pixels."""
    kinds = [name for name in (*BOUNDS, "ode") if name in tally.nats]
    size = math.prod(shape)
    table = {"latents": {"shape": shape, "std": settings.latent_std} | {
        name: in_bits(tally.of(name), size) | parts(tally, name, size) for name in kinds}}
    if "ode" in kinds:
        table["latents"]["ode"]["evaluations"] = max(tally.evaluations)
    density = 0 if settings.decoder == "discretized" else dims * LEVEL
    misfit, entropy = tally.of("misfit") + density, tally.of("entropy")
    table["pixels"] = {"decoder": settings.decoder, "decoder_std": std,
                       "reconstruction": float(bits_per_dim(misfit, dims).mean()),
                       "posterior_entropy": float(bits_per_dim(entropy, dims).mean())}  # fmt: skip
    for name in kinds:
        prior = {"prior_of_latents": float(bits_per_dim(tally.of(name), dims).mean())}
        table["pixels"][name] = in_bits(misfit - entropy + tally.of(name), dims) | prior
    return table


BOUNDS = ("bound", "continuous_bound")


def look(tally: Tally, settings: Settings, denoise: Denoise, denoiser: Denoiser, autoencoder: Autoencoder, x: Tensor, z: Tensor,
         smooth: Tensor, decoder: Decoder, positions: list[int], progress: Callable[[float], None]) -> None:
    """Add -log p(z) by every kind that is asked for; ``smooth`` stands for z with the ODE."""
    process, errors = denoiser.process, []
    kinds = (settings.times is not None) + (settings.continuous is not None) + settings.ode
    part = len(z) / kinds

    def see(step: int, t: float, x_t: Tensor, guess: Prediction) -> None:
        progress(part / (len(settings.times) - 1))
        if settings.rate_distortion:
            shown = autoencoder.decode(guess.x0).clamp(-1, 1)
            errors.append((shown - x).double().square().flatten(1).mean(1).cpu())

    if settings.times is not None:
        variance = settings.variance if denoiser.variance == "fixed" else denoiser.variance
        bound = variational_bound(denoise, z, settings.times, process, variance=variance, decoder=decoder,
                                  noise=draws(settings.seed, "chain", positions), callback=see)
        tally.bounds.append(bound)
        tally.errors += [torch.stack(errors, 1)] if errors else []
        add_bound(tally, "bound", bound)
    if settings.continuous is not None:
        steps = settings.continuous
        add_bound(tally, "continuous_bound", continuous_bound(
            denoise, z, process, steps, decoder=decoder, noise=draws(settings.seed, "continuous", positions),
            callback=lambda *_: progress(part / (steps + 1))))
    if settings.ode:
        way = Way(lambda share: progress(part * share))
        flow = ode_likelihood(denoise, smooth, process, probes=settings.probes, tolerance=settings.tolerance,
                              noise=draws(settings.seed, "probe", positions), callback=way)
        tally.add(ode=-flow.log_likelihood)
        tally.evaluations.append(flow.evaluations)


class Way:
    """Told the share of a way that is done, tells what is new of it."""

    def __init__(self, tell: Callable[[float], None]):
        self.tell, self.done = tell, 0.0

    def __call__(self, share: float) -> None:
        self.tell(share - self.done)
        self.done = share


def add_bound(tally: Tally, name: str, bound: Bound) -> None:
    tally.add(**{name: bound.total, f"{name}.prior": bound.prior, f"{name}.steps": bound.terms[:, :-1].sum(1),
                 f"{name}.last_step": bound.decoder})


def parts(tally: Tally, name: str, dims: int) -> dict:
    """Of a bound: what L_T, the steps, and the last step to the data add."""
    return {part: float(bits_per_dim(tally.of(f"{name}.{part}"), dims).mean()) for part in ("prior", "steps", "last_step")
            if f"{name}.{part}" in tally.nats}


def in_bits(nats: Tensor, dims: int) -> dict:
    """Mean over pictures and its standard error."""
    bits = bits_per_dim(nats, dims)
    error = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else None
    return {"bits_per_dim": float(bits.mean()), "standard_error": error}


def curves(tally: Tally, denoiser: Denoiser, settings: Settings, dims: int) -> dict:
    """The bound step by step; rate against distortion: bits per dimension of pictures, root mean squared error of 0..255."""
    if not tally.bounds:
        return {}
    bound = joined(tally.bounds)
    noise = torch.exp(-denoiser.process.log_snr(bound.times))
    table = {"steps": {"t": bound.times.tolist(), "noise_level": [float(n) if n.isfinite() else None for n in noise],
                       "bits_per_dim": bits_per_dim(bound.terms.mean(0), dims).tolist()}}
    if settings.rate_distortion:
        rate, rmse = rate_distortion(bound, dims, torch.cat(tally.errors))
        table["rate_distortion"] = {"t": bound.times.tolist(), "bits_per_dim": rate.tolist(), "rmse": rmse.tolist()}
    return table


def numbered(batches: Iterable[dict]) -> Iterable[tuple[dict, list[int]]]:
    """Batches and the numbers of their pictures: their "position", or else as they come."""
    seen = 0
    for batch in batches:
        n = len(batch["image"])
        yield batch, batch["position"].tolist() if "position" in batch else list(range(seen, seen + n))
        seen += n


def draws(seed: int, use: str, positions: list[int]) -> Noise:
    """Normal noise (step, shape) -> (B,...), from a generator of each picture."""
    sources = [generator(seed, f"likelihood/{use}", position) for position in positions]
    return lambda step, shape: torch.stack([torch.randn(shape[1:], generator=source) for source in sources])


@torch.no_grad()
def under(conditioner: nn.Module | None, denoiser: Denoiser, batch: dict, captions: bool, autoencoder: Autoencoder) -> Denoise:
    """The network without guidance, under the pictures' own conditions or the empty one."""
    if conditioner is None:
        return bind(denoiser, Cond())
    if not captions:
        return bind(denoiser, conditioner.null(len(batch["image"])))
    size = (side // autoencoder.factor for side in batch["image"].shape[2:])
    return bind(denoiser, conditioner(encoded(conditioner, autoencoder, batch, size)))


def level_masses(space: Identity) -> Decoder:
    """The masses of pixels' levels, for latents that are pixels with a shift and a scale."""
    log_scale = space.scale.double().log().view(-1, 1, 1)

    def decoder(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return discretized_log_likelihood(space.denormalise(z), space.denormalise(mean), log_std + log_scale)

    return decoder


def latents(autoencoder: Autoencoder, x: Tensor, positions: list[int], settings: Settings) -> tuple[Tensor, Tensor]:
    """z ~ q(z|x), the same at every call, and the entropy of q(z|x)."""
    return draw_latent(autoencoder, x, draws(settings.seed, "posterior", positions), settings.latent_std)


@torch.no_grad()
def likeliest_std(autoencoder: Autoencoder, batches: Callable[[], Iterable[dict]], settings: Settings) -> float:
    """The standard deviation under which the reconstructions of these pictures are likeliest (1e-3 at least)."""
    total, count = 0.0, 0
    for batch, positions in numbered(batches()):
        wrong = (batch["image"] - autoencoder.decode(latents(autoencoder, batch["image"], positions, settings)[0])).double()
        total += float(wrong.abs().sum() if settings.decoder == "laplace" else wrong.square().sum())
        count += wrong.numel()
    total, count = map(sum, zip(*everybodys((total, count)), strict=True))
    return max(1e-3, 2**0.5 * total / count if settings.decoder == "laplace" else (total / count) ** 0.5)
