"""Lists of times for samplers: (process, n) -> (n + 1,) decreasing, from t_max to the time of clean data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.process import Process


def linear(process: Process, n: int) -> Tensor:
    """n + 1 evenly spaced times from t_max to t_data: "trailing" for discrete kinds (2305.08891, table 2)."""
    return torch.linspace(process.t_max, process.t_data, n + 1, dtype=torch.float64)


def leading(process: Process, n: int) -> Tensor:
    """DDIM's choice on T steps (2010.02502): 1 + k * (T // n), rounded down; never reaches t_max. Discrete kinds only."""
    if process.t_data >= 0:
        raise ValueError(f"times 'leading' belong to discrete processes; {type(process).__name__} takes 'linear'")
    steps = int(process.t_max) + 1
    ladder = torch.arange(n, dtype=torch.float64) * (steps // n) + 1
    return torch.cat([ladder.clamp(max=process.t_max).flip(0), torch.tensor([process.t_data], dtype=torch.float64)])


def shifted(shift: float) -> Callable[[Process, int], Tensor]:
    """Linear times moved towards noise: share u -> shift * u / (1 + (shift - 1) * u) (2403.03206, eq. 23)."""
    def times(process: Process, n: int) -> Tensor:
        share = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        share = shift * share / (1 + (shift - 1) * share)
        return process.t_data + share * (process.t_max - process.t_data)
    return times


TIMES: dict[str, Callable[[Process, int], Tensor]] = {
    "linear": linear, "leading": leading, "shift2": shifted(2.0), "shift3": shifted(3.0),
}
