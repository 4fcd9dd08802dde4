"""The processes that do one job together: which of them this is, and what the others have."""

from __future__ import annotations

from typing import Any

import torch


def place() -> tuple[int, int]:
    """Rank and number of processes: of torch.distributed where it runs, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def everybodys(value: Any) -> list:
    """The value of each process, by rank. All have to call."""
    rank, world = place()
    values = [value] * world
    if world > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def collected(items: list, key: Any = None) -> list:
    """The items of all processes in one list; sorted by ``key``, if there is one. All have to call."""
    every = [item for items in everybodys(items) for item in items]
    return every if key is None else sorted(every, key=key)


def wait() -> None:
    """Until all processes are here."""
    if place()[1] > 1:
        torch.distributed.barrier()
