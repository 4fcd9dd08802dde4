"""Lists of times for samplers: (process, n) -> (n + 1,) decreasing, from t_max to the time of clean data.

The lists of published samplers begin below t_max, and some hold more or fewer steps than n: see each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.process import Process


def linear(process: Process, n: int) -> Tensor:
    """n + 1 evenly spaced times from t_max to t_data: "trailing" for discrete kinds (2305.08891, table 2)."""
    return torch.linspace(process.t_max, process.t_data, n + 1, dtype=torch.float64)


def leading(process: Process, n: int) -> Tensor:
    """DDIM's choice on T steps (2010.02502): 1 + k * (T // n), k < n; never reaches t_max. Discrete kinds only."""
    steps = _steps(process, n, "leading")
    return _ladder(torch.arange(n) * (steps // n) + 1, process.t_data, steps, "leading")


def compvis(process: Process, n: int) -> Tensor:
    """LDM's and Stable Diffusion's DDIM list: 1 + k * (T // n) as long as there are any (n or more), then t = 0, not the
    data: their last step leaves the noise of the first training step. Discrete kinds only."""
    steps = _steps(process, n, "compvis")
    return _ladder(torch.arange(0, steps, steps // n) + 1, process.t_min, steps, "compvis")


def quadratic(process: Process, n: int) -> Tensor:
    """Their "quad" list: 1 + floor(u^2), u even in [0, sqrt(0.8 T)], then t = 0. Discrete kinds only.

    Small times that are found more than once are kept once: a step from t to t does nothing.
    """
    steps = _steps(process, n, "quadratic")
    ladder = torch.linspace(0, math.sqrt(0.8 * steps), n, dtype=torch.float64).square().long() + 1
    return _ladder(ladder.unique(), process.t_min, steps, "quadratic")


def _steps(process: Process, n: int, name: str) -> int:
    """T of a discrete process that has n steps and more."""
    if process.t_data >= 0:
        raise ValueError(f"times {name!r} belong to discrete processes; {type(process).__name__} takes 'linear'")
    steps = int(process.t_max) + 1
    if n > steps:
        raise ValueError(f"times {name!r}: {n} steps of a process that has {steps}; take {steps // 2} at most, or 'linear'")
    return steps


def _ladder(ladder: Tensor, end: float, steps: int, name: str) -> Tensor:
    """The ladder (N,) walked down, then ``end``. ValueError where it begins beyond the process."""
    if ladder[-1] >= steps:
        raise ValueError(f"times {name!r}: these begin at t = {int(ladder[-1])}, the process ends at {steps - 1}; take a "
                         f"number of steps that divides {steps}, {steps // 2} at most, or 'linear'")
    return torch.cat([ladder.flip(0).double(), torch.tensor([end], dtype=torch.float64)])


def shifted(shift: float) -> Callable[[Process, int], Tensor]:
    """Linear times moved towards noise: share u -> shift * u / (1 + (shift - 1) * u) (2403.03206, eq. 23)."""
    def times(process: Process, n: int) -> Tensor:
        share = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        share = shift * share / (1 + (shift - 1) * share)
        return process.t_data + share * (process.t_max - process.t_data)
    return times


TIMES: dict[str, Callable[[Process, int], Tensor]] = {
    "linear": linear, "leading": leading, "compvis": compvis, "quadratic": quadratic, "shift2": shifted(2.0),
    "shift3": shifted(3.0),
}
