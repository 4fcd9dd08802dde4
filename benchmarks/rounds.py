"""Timing as a ratio: the candidates take turns in one process, and the median of the ratios within a round counts."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch


def interleaved(candidates: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 2,
                clock: Callable[[], float] = perf_counter) -> dict[str, dict]:
    """-> name -> {"ms": median, "ratio": median of first/this by round, "low", "high": range of the ratio}.

    clock: time.process_time where other programs use the same cores.
    """
    for step in candidates.values():
        for _ in range(warmup):
            step()
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, step in candidates.items():
            began = clock()
            step()
            seconds[name].append(clock() - began)
    first = next(iter(seconds.values()))
    table = {}
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(first, mine, strict=True)]
        table[name] = {"ms": 1000 * statistics.median(mine), "ratio": statistics.median(ratios),
                       "low": min(ratios), "high": max(ratios)}
    return table


def show(table: Mapping[str, dict]) -> str:
    """The table as Markdown."""
    rows = [f"| {name} | {row['ms']:.0f} | x{row['ratio']:.2f} [{row['low']:.2f}-{row['high']:.2f}] |"
            for name, row in table.items()]
    return "\n".join(["| | ms | speed against the first row |", "|---|---|---|", *rows])


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
