"""The processes that do one job together: which of them this is, and what the others have."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldm.common.files import OnAllRanks


def place() -> tuple[int, int]:
    """Rank and number of processes: of torch.distributed where it runs, else (0, 1)."""
    torch = sys.modules.get("torch")  # who has not imported it is alone; commands tell mistakes before they do
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def everybodys(value: Any) -> list:
    """The value of each process, by rank. All have to call."""
    rank, world = place()
    values = [value] * world
    if world > 1:
        import torch

        torch.distributed.all_gather_object(values, value)
    return values


def collected(items: list, key: Any = None) -> list:
    """The items of all processes in one list; sorted by ``key``, if there is one. All have to call."""
    every = [item for items in everybodys(items) for item in items]
    return every if key is None else sorted(every, key=key)


@contextmanager
def agreed() -> Iterator[None]:
    """What all processes do alike, before they part: what one cannot do ends them all, none goes on before all are through,
    and warnings are the first one's. All have to call, and nothing in here may wait for others.

    Raises:
        OnAllRanks: with the mistake (ValueError, OSError) of the first process that made one; alone, the mistake itself.
    """
    rank, world = place()
    if world == 1:
        yield
        return
    mine, level = None, logging.root.manager.disable
    logging.disable(logging.WARNING if rank else level)
    try:
        yield
    except (ValueError, OSError) as error:
        mine = error
    finally:
        logging.disable(level)
    told = [text for text in everybodys(None if mine is None else str(mine) or type(mine).__name__) if text is not None]
    if told:
        raise OnAllRanks(told[0]) from mine


def wait() -> None:
    """Until all processes are here."""
    if place()[1] > 1:
        import torch

        torch.distributed.barrier()
