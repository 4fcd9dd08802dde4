"""What an autoencoder keeps of pictures, measured in one walk over them.

Pictures are reconstructed from the mode of q(z|x), as ``encode`` gives it without a generator, and clamped to [-1,1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from ldm.common.team import collected, place
from ldm.metrics.features import Extractor, label
from ldm.metrics.frechet import Gaussian, distance
from ldm.metrics.pictures import mse, psnr, ssim

CLOSE = 0.1  # standard deviations by which measured statistics may differ from those stored
SHOWN = 8  # pictures of the first, and of the worst


class Tally(Protocol):
    """Sums over latents and codes: autoencoder.statistics.Tally."""

    def latents(self, mean: Tensor, logvar: Tensor | None) -> None: ...
    def codes(self, codes: Tensor, size: int) -> None: ...
    def moments(self) -> tuple[Tensor, Tensor, Tensor]: ...
    def summary(self) -> dict[str, float]: ...
    def gathered(self) -> Tally: ...


@dataclass
class Pair:
    """A picture and what came back, (C,H,W)."""

    number: int
    name: str
    psnr: float
    original: Tensor
    made: Tensor


@dataclass
class Report:
    """The figures, as plain data, and pictures to look at: the first, and those with the lowest PSNR."""

    table: dict[str, Any]
    first: list[Pair] = field(default_factory=list)
    worst: list[Pair] = field(default_factory=list)


class Stopwatch:
    """Seconds spent in each of several things. Waits for the device before it looks at the clock."""

    def __init__(self, device: torch.device):
        self.device, self.laps = device, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.wait()
        began = perf_counter()
        yield
        self.wait()
        self.laps.setdefault(name, []).append(perf_counter() - began)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(x: Tensor, y: Tensor, lpips: Callable | None = None) -> dict[str, Tensor]:  # (B,C,H,W) in [-1,1] twice
    """-> "mse", "psnr" and, where they can be had, "ssim" and "lpips" of every picture, (B,) each on the CPU."""
    error = mse(x, y)
    found = {"mse": error, "psnr": psnr(error), "ssim": ssim(x, y), "lpips": lpips(x, y) if lpips else None}
    return {name: value.float().cpu() for name, value in found.items() if value is not None}


@torch.no_grad()
def measure(autoencoder: Autoencoder, batches: Iterable[dict], tally: Tally, extractor: Extractor | None = None,
            lpips: Callable | None = None) -> Report:
    """Everything there is to measure on batches {"image": (B,C,H,W) in [-1,1], "caption" or "key": names, "position": (B,)
    numbers of the pictures}. Several processes each have some of the batches; rank 0 has the figures of all.

    tally: an empty one. extractor, lpips: what Fréchet distance and LPIPS are taken with; None: they are left out.
    Raises UserError where there are less than two pictures, or the extractor gives no features.
    """
    device, watch = autoencoder.shift.device, Stopwatch(autoencoder.shift.device)
    real, made, sizes, report, shapes = Gaussian(), Gaussian(), [], Report({}), None
    rows: list[tuple[int, dict[str, Tensor]]] = []  # of each batch: number of its first picture, figures (B,)
    codebook = codebook_of(autoencoder)
    for batch in batches:
        x = batch["image"].to(device)
        with watch("encode"):
            z, std = autoencoder.posterior(x)
        with watch("decode"):
            y = autoencoder.decode(z)
        y, mean = y.clamp(-1, 1), autoencoder.denormalise(z)
        logvar = None if std is None else 2 * (std * autoencoder.scale.view(-1, 1, 1)).log()
        tally.latents(mean, logvar)
        if codebook is not None:
            tally.codes(codebook.indices(mean).cpu(), codebook.codes)
        if extractor is not None:
            real.add(extractor(x))
            made.add(extractor(y))
        found = compare(x, y, lpips) | ({} if logvar is None else {"nats": kl(mean.cpu(), logvar.cpu())})
        number = int(batch["position"][0]) if "position" in batch else sum(sizes)
        rows.append((number, found))
        remember(report, number, batch, y, found["psnr"])
        sizes.append(len(x))
        shapes = list(x.shape[1:]), list(mean.shape[1:])
    scores: dict[str, list[Tensor]] = {}
    for _, found in collected(rows, key=itemgetter(0)):
        for name, values in found.items():
            scores.setdefault(name, []).append(values)
    if not scores:
        raise ValueError("there is no picture to measure with")
    tally, real, made = tally.gathered(), real.joined(), made.joined()
    report.first = collected(report.first, key=attrgetter("number"))[:SHOWN]
    report.worst = collected(report.worst, key=attrgetter("psnr"))[:SHOWN]
    if place()[0] > 0:
        return report
    (picture, latent), nats = shapes, scores.pop("nats", [])
    means = {name: torch.cat(values).double().mean().item() for name, values in scores.items()}
    report.table |= {
        "pictures": sum(map(len, scores["psnr"])), "picture": picture,
        "psnr": means["psnr"], "psnr_of_mean_error": psnr(torch.tensor(means["mse"])).item(),
        "ssim": means.get("ssim"), "lpips": means.get("lpips"),
        **({label(extractor): distance(real, made)} if extractor is not None else {}),
        "latents": latents(autoencoder, tally, latent),
        "rate": rate(nats, codebook, tally, math.prod(picture[1:]), math.prod(latent[1:])),
        "throughput": throughput(watch.laps, sizes, device),
    }  # fmt: skip
    return report


def kl(mean: Tensor, logvar: Tensor) -> Tensor:  # (B,C,h,w) twice -> (B,) nats a picture
    """KL(N(mean, exp(logvar)) || N(0, I)): what a picture's latent costs to send (1312.6114, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).double().sum(dim=(1, 2, 3))


def codebook_of(autoencoder: Autoencoder) -> Any:
    """The bottleneck, if it has a finite number of `codes` and says by `indices` which of them stand for a latent."""
    found = getattr(autoencoder, "bottleneck", None)
    return found if isinstance(getattr(found, "codes", None), int) and hasattr(found, "indices") else None


def latents(autoencoder: Autoencoder, tally: Tally, shape: Sequence[int]) -> dict:
    """Moments of raw latents by channel, whether they are those stored, and their deviation as diffusion gets them."""
    mean, variance, noise = tally.moments()
    spec, summary = autoencoder.spec, tally.summary()
    std = (variance + noise).sqrt()
    shift, scale = spec.shift.cpu().double(), spec.scale.cpu().double()
    unit_mean, unit_std = (mean - shift) / scale, std / scale
    pooled = (unit_std.square() + unit_mean.square()).mean() - unit_mean.mean().square()
    near = bool((unit_mean.abs() < CLOSE).all() and ((unit_std - 1).abs() < CLOSE).all())
    return {
        "shape": list(shape), "factor": spec.factor, "mean": mean.tolist(), "std": std.tolist(),
        "unit_mean": unit_mean.tolist(), "unit_std": unit_std.tolist(), "overall_std": pooled.sqrt().item(),
        "stored": {"shift": shift.tolist(), "scale": scale.tolist(), "count": spec.count, "data": spec.data_hash},
        "as_stored": near if spec.count else None,
        "active_units": int(summary["active_units"]) if "active_units" in summary else None,
    }  # fmt: skip


def rate(nats: Sequence[Tensor], codebook: Any, tally: Tally, pixels: int, places: int) -> dict | None:
    """Bits of a picture's latent: its KL divergence, or its codes, of equal length and as an ideal entropy coder would
    send them one by one. None for kinds whose latents are real numbers without noise."""
    if nats:
        bits = torch.cat(nats).mean().item() / math.log(2)
        return {"kind": "kl", "bits": bits, "bits_per_pixel": bits / pixels}
    if codebook is None:
        return None
    summary = tally.summary()
    perplexity, bits = summary["codebook_perplexity"], places * math.log2(codebook.codes)
    entropy = places * math.log2(perplexity)
    return {"kind": "codes", "bits": bits, "bits_per_pixel": bits / pixels, "entropy_bits": entropy,
            "entropy_bits_per_pixel": entropy / pixels, "codes": codebook.codes, "used": summary["codebook_used"],
            "perplexity": perplexity}  # fmt: skip


def throughput(laps: dict[str, list[float]], sizes: Sequence[int], device: torch.device) -> dict:
    """Pictures a second; the first batch warms up and counts only where there is no other."""
    first = 1 if len(sizes) > 1 else 0
    return {f"{name}_per_second": sum(sizes[first:]) / sum(seconds[first:]) for name, seconds in laps.items()} | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "batch": max(sizes), "threads": torch.get_num_threads(),
    }  # fmt: skip


def remember(report: Report, seen: int, batch: dict, made: Tensor, scores: Tensor) -> None:
    """Keeps the first pictures, and of all so far those with the lowest PSNR."""
    names = batch.get("caption") or batch.get("key") or [""] * len(made)
    for i, score in enumerate(scores.tolist()):
        number = seen + i
        pair = Pair(number, names[i] or f"{number}", score, batch["image"][i].clone(), made[i].cpu())
        report.first += [pair] if number < SHOWN else []
        report.worst = sorted([*report.worst, pair], key=lambda pair: pair.psnr)[:SHOWN]
