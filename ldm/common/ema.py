"""Averages of a module's weights, as second modules; and averages of any length after the fact, from two of them.

A profile says how much of the past one update keeps. An exponential one forgets at a constant rate; a power-function one
(EDM2, 2312.02696, section 3.2) is always as wide as a fixed share of the training so far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.common.files import UserError, atomic_write


def warmed_decay(decay: float, updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)): a young average follows quickly. ``updates`` n counts from 1."""
    return min(decay, (1 + updates) / (10 + updates))


class Profile(Protocol):
    def keep(self, updates: int, images: int) -> float:
        """Weight of the past in update n, counted from 1, when so many images have been seen, this update's included."""


class HalfLife:
    """Half of the past is forgotten every so many images, or every so many steps: the same average whatever the batch.

    Args:
        images, steps: give one of them.
        ramp: the half-life is at most this share of the training so far (EDM, 2206.00364, appendix F.1: 0.05); None: no
            ramp, and the weights at the start stay in the average for some half-lives.
    """

    def __init__(self, images: float | None = None, steps: float | None = None, ramp: float | None = 0.05):
        if (images is None) == (steps is None) or not (images or steps or 0) > 0:
            raise ValueError(f"EMA half-life: give images or steps, above 0; got images {images}, steps {steps}")
        self.images, self.steps, self.ramp = images, steps, ramp

    def keep(self, updates: int, images: int) -> float:
        passed, half = (updates, self.steps) if self.images is None else (images, self.images)
        if not passed:
            raise ValueError("EMA half-life in images: update takes the number of images seen so far")
        if self.ramp is not None:
            half = min(half, self.ramp * passed)
        return 0.5 ** (passed / updates / half)


class Power:
    """A power function of time, t^gamma, cut at now (2312.02696, eq. 4); its relative width stays what it is.

    Args:
        width: sigma_rel, standard deviation of the profile as a share of the training so far; below 0.28.
    """

    def __init__(self, width: float = 0.1):
        self.width, self.gamma = width, gamma_of(width)

    def keep(self, updates: int, images: int) -> float:
        return (1 - 1 / updates) ** (self.gamma + 1)  # eq. 5


class Ema(nn.Module):
    """A shadow of ``module`` in fp32: call it where you would call the original.

    Args:
        module: what to average; it is copied, not kept, but for its frozen weights, which the shadow shares.
        decay: weight of the past in one update, in [0, 1), or a profile.
        warmup: with a number, shorten the memory of the first updates (``warmed_decay``).
    """

    def __init__(self, module: nn.Module, decay: float | Profile = 0.9999, warmup: bool = True):
        super().__init__()
        if isinstance(decay, (int, float)) and not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}; it must be in [0, 1)")
        frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.shadow = copy.deepcopy(module, dict(frozen)).requires_grad_(False).eval()
        self.shadow._apply(lambda t: t.float() if t.is_floating_point() and id(t) not in frozen else t)
        self.decay, self.warmup = decay, warmup
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.train()

    @torch.no_grad()
    def update(self, module: nn.Module, images: int = 0) -> None:
        """shadow += (1 - decay) * (module - shadow), buffers copied. images: seen so far, where the profile counts them."""
        self.updates += 1
        keep = self._keep(int(self.updates), images)
        pairs = [(s, p) for s, p in zip(self.shadow.parameters(), module.parameters(), strict=True) if s is not p]
        torch._foreach_lerp_([s for s, _ in pairs], [p.detach().to(s.dtype) for s, p in pairs], 1 - keep)
        for s, b in zip(self.shadow.buffers(), module.buffers(), strict=True):
            s.copy_(b)

    def _keep(self, updates: int, images: int) -> float:
        if not isinstance(self.decay, (int, float)):
            return self.decay.keep(updates, images)
        return warmed_decay(self.decay, updates) if self.warmup else self.decay

    def forward(self, *args, **kwargs) -> Tensor:
        return self.shadow(*args, **kwargs)

    def train(self, mode: bool = True) -> Ema:
        """An average is never trained: it stays in eval mode, whatever becomes of the module that it is a part of."""
        return super().train(False)


class Snapshots:
    """Power-function averages beside the one that sampling uses, saved every so many steps: from the files an average of
    any width can be put together later (``reconstruct``; ``python -m ldm average``).

    Args:
        every: optimizer steps. On a random walk, 20 snapshots in a run give any average from 0.03 to 0.25 with an error of 1 %
            of its distance to the last weights, 40 with 0.2 %.
        widths: sigma_rel of the averages that are tracked (EDM2: 0.05 and 0.10).
    """

    def __init__(self, every: int = 1000, widths: tuple[float, ...] = (0.05, 0.10)):
        if every < 1 or not widths:
            raise ValueError(f"snapshots: expected every from 1 and at least one width, got every {every}, widths {widths}")
        self.every, self.widths = every, tuple(widths)

    def averages(self, module: nn.Module) -> nn.ModuleList:
        """One Ema for each width."""
        return nn.ModuleList(Ema(module, Power(width)) for width in self.widths)

    @staticmethod
    def save(averages: Iterable[Ema], module: nn.Module, folder: Path) -> None:
        """A file for each: what of the module's weights is trained, averaged; with the width and the number of updates."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
        for ema in averages:
            updates, width = int(ema.updates), ema.decay.width
            weights = {name: p.cpu().contiguous() for name, p in ema.shadow.named_parameters() if name in trained}
            with atomic_write(folder / f"step-{updates:06d}-width-{width:g}.safetensors") as temporary:
                save_file(weights, temporary, {"updates": str(updates), "width": repr(width)})


def reconstruct(files: Iterable[Path], width: float, updates: int | None = None) -> dict[str, Tensor]:
    """The average of any ``width`` after ``updates`` steps (None: the last snapshot's), from the files of ``Snapshots``:
    the trained weights by name, in fp32. UserError for a step without a snapshot: its last weights are in none, so that the
    shares of what there is would not add up to 1."""
    from safetensors import safe_open

    about = []
    for file in files:
        with safe_open(file, "pt") as snapshot:
            said = snapshot.metadata() or {}
        if not {"updates", "width"} <= said.keys():
            raise UserError(f"{file}: this is no snapshot of an average; those are in the run folder, under averages")
        about.append((int(said["updates"]), float(said["width"]), file))
    if not about:
        raise UserError("there is no snapshot to make an average from; train with "
                        "model.params.snapshots={target: ldm.common.ema.Snapshots}")
    steps = sorted({step for step, *_ in about})
    if updates is not None and updates not in steps:
        near = min(steps, key=lambda step: abs(step - updates))
        raise UserError(f"there is no snapshot of step {updates} to make an average from; nearest: {near}; there are "
                        f"{len(steps)}, from {steps[0]} to {steps[-1]}")
    about = sorted(one for one in about if updates is None or one[0] <= updates)
    times, widths, paths = zip(*about, strict=True)
    shares = posthoc_coefficients(times, widths, times[-1] if updates is None else updates, width)
    sums: dict[str, Tensor] = {}
    for share, path in zip(shares.tolist(), paths, strict=True):
        with safe_open(path, "pt") as snapshot:
            for key in snapshot.keys():  # noqa: SIM118  (a reader, not a dict)
                sums[key] = sums.get(key, 0) + share * snapshot.get_tensor(key).double()
    return {key: value.float() for key, value in sums.items()}


def gamma_of(width: float) -> float:
    """gamma of the profile t^gamma whose standard deviation is ``width`` (2312.02696, eq. 126):
    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    if not 0 < width < 12**-0.5:  # gamma = 0, the plain mean
        raise ValueError(f"EMA width is {width}; a power function takes 0 to {12**-0.5:.4f}, excluded")
    low, high = 0.0, 1 / width**2  # the width falls with gamma
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width_of(middle) > width else (low, middle)
    return (low + high) / 2


def width_of(gamma: float) -> float:
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def inner(t: Tensor, gamma: Tensor, t_: Tensor, gamma_: Tensor) -> Tensor:
    """Integral of the product of two profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] (2312.02696, appendix C.3);
    fp64, shapes broadcast."""
    both = gamma + gamma_ + 1
    least = torch.minimum(t, t_)
    shape = (gamma + 1) * (least / t).log() + (gamma_ + 1) * (least / t_).log()
    return (gamma + 1) * (gamma_ + 1) / both / least * shape.exp()


def posthoc_coefficients(times: Sequence[float], widths: Sequence[float], time: float, width: float) -> Tensor:
    """Shares (N,), fp64, of snapshots that were taken at ``times`` of averages of ``widths``, whose sum is closest to the
    average of ``width`` at ``time``: least squares between profiles (2312.02696, appendix C.3)."""
    t = torch.tensor(times, dtype=torch.float64)
    gamma = torch.tensor([gamma_of(one) for one in widths], dtype=torch.float64)
    wanted = inner(t, gamma, torch.tensor(float(time), dtype=torch.float64), torch.tensor(gamma_of(width), dtype=torch.float64))
    matrix = inner(t[:, None], gamma[:, None], t[None], gamma[None])
    return torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
