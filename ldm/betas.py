"""What the tables of discrete processes are made of: schedules of betas, numbers from lists and files, steps to keep. fp64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.common.files import UserError


def linear_betas(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """DDPM, 2006.11239, section 4: betas linear in t (CompVis calls this one sqrt_linear)."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """LDM, Stable Diffusion: square roots of the betas linear in t (CompVis calls this one linear)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def sqrt_betas(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """CompVis' sqrt: the square root of the linear betas."""
    return torch.linspace(start, end, steps, dtype=torch.float64) ** 0.5


def cosine_betas(steps: int, start: float = 8e-3, end: float = 0.999) -> Tensor:
    """Improved DDPM, 2102.09672, eq. 17: alpha_bar = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) * pi / 2); s = start,
    betas <= end."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + start) / (1 + start) * math.pi / 2) ** 2
    alpha_bar = f / f[0]
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, end)


def sigmoid_betas(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """DDPM's sigmoid schedule: betas follow a sigmoid over [-6, 6]."""
    return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas, "scaled_linear": scaled_linear_betas, "sqrt": sqrt_betas, "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first is kept (2305.08891, algorithm 1)."""
    if len(alpha_bar) < 2:
        raise UserError("zero_terminal: the first step is kept and the last is pure noise, so there are two steps or more")
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def numbers(name: str, given: Sequence[float] | str | Path) -> Tensor:
    """(T,) in fp64."""
    table = given
    if isinstance(given, (str, Path)):
        path = Path(given)
        if not path.is_file():
            raise UserError(f"{name}: there is no file {path}")
        if path.suffix == ".npy":
            table = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            table = list(load_file(path).values())
            table = table[0] if len(table) == 1 else table
        elif path.suffix == ".pt":
            table = torch.load(path, weights_only=True, map_location="cpu")
        else:
            raise UserError(f"{name}: {path}; it takes a file that ends in .npy, .pt or .safetensors, or a list of numbers")
        if not isinstance(table, (Tensor, np.ndarray)):
            raise UserError(f"{name}: {path} has to hold one tensor and nothing else")
    table = torch.as_tensor(table, dtype=torch.float64)
    if table.ndim != 1 or len(table) == 0 or not table.isfinite().all():
        raise UserError(f"{name}: expected a list of T finite numbers, got shape {tuple(table.shape)}")
    return table


def spaced(steps: int, spec: str) -> list[int]:
    """Steps of 0..T-1 as Improved DDPM writes them. "25": so many, evenly from the first to the last; "10,15,20": so many
    of each third; "ddim25": so many at one whole stride from 0, which ends below the last. Positions are summed up stride by
    stride, as there, for the rounding of halves depends on it."""
    if not re.fullmatch(r"ddim\d+|\d+(,\d+)*", spec):
        raise UserError(f"kept: {spec!r}; it reads like 25, 10,15,20 or ddim25")
    if spec.startswith("ddim"):
        count = int(spec.removeprefix("ddim"))
        stride = next((s for s in range(1, steps + 1) if len(range(0, steps, s)) == count), None)
        if stride is None:
            raise UserError(f"kept: no whole stride takes {count} of {steps} steps")
        return list(range(0, steps, stride))
    counts = [int(count) for count in spec.split(",")]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise UserError(f"kept: {count} steps of a section of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        kept += [start + round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += size
    return kept
