"""Courses of the learning rate: optimizer step (from 0) -> multiplier of the rate. What ``schedule:`` blocks name."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Literal

from ldm.common.limits import limits


class Warmup:
    """Linear warm-up over ``steps``, then constant or down to 0 at the run's end.

    Args:
        total: optimizer steps of the run; given by the program.
    """

    given = ("total",)
    check_params = staticmethod(limits(steps=0))

    def __init__(self, steps: int = 100, decay: Literal["constant", "linear", "cosine"] = "constant",
                 total: int | None = None):
        if total is None and decay != "constant":
            raise ValueError(f"decay {decay!r} needs to know where the run ends: set trainer.max_steps")
        self.steps, self.decay, self.total = steps, decay, total

    def __call__(self, step: int) -> float:
        share = 0.0 if self.decay == "constant" else min(1.0, step / self.total)
        decayed = 0.5 * (1 + math.cos(math.pi * share)) if self.decay == "cosine" else 1 - share
        return min(1.0, (step + 1) / max(1, self.steps)) * decayed


class Cycles:
    """LDM's courses (ldm/lr_scheduler.py of 2112.10752): cycles of a linear warm-up and a fall, each list one number a
    cycle. A single cycle with a cosine is the two-phase course of its autoencoders.

    A linear fall counts from the start of the cycle, as published models were trained, so the rate drops from ``peak``
    at the end of the warm-up by the share that is over. After the last cycle its ``end`` stays.

    Args:
        lengths: steps of a cycle, warm-up included; warmups: steps of its warm-up.
        start, peak, end: multiplier at its first step, at the end of the warm-up, at its last step.
    """

    def __init__(self, lengths: list[int], warmups: list[int], start: list[float], peak: list[float], end: list[float],
                 fall: Literal["linear", "cosine"] = "linear"):
        given = dict(lengths=lengths, warmups=warmups, start=start, peak=peak, end=end)
        for problem in self.check_params(given, "schedule"):
            raise ValueError(problem)
        self.cycles = list(zip(lengths, warmups, start, peak, end, strict=True))
        self.ends, self.fall = list(accumulate(lengths)), fall

    @staticmethod
    def check_params(params: dict, path: str) -> list[str]:
        """What is wrong with the numbers together."""
        counts = {name: len(value) for name, value in params.items() if name != "fall"}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            return [f"{path}: expected one number a cycle in every list, got {told}"]
        return [f"{path}.warmups: {warmup} steps in a cycle of {length}; it takes 0 to {length - 1}"
                for length, warmup in zip(params["lengths"], params["warmups"], strict=True) if not 0 <= warmup < length]

    def __call__(self, step: int) -> float:
        cycle = next((i for i, end in enumerate(self.ends) if step <= end), len(self.ends) - 1)
        length, warmup, start, peak, end = self.cycles[cycle]
        n = min(step - self.ends[cycle] + length, length)  # a cycle's last step is the next one's first: it stays here
        if n < warmup:
            return start + (peak - start) * n / warmup
        if self.fall == "cosine":
            return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (n - warmup) / (length - warmup)))
        return end + (peak - end) * (length - n) / length
