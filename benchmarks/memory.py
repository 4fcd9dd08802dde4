"""What something needs of memory while it runs: as tensors, or as the system sees it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what operations inside of the ``with`` allocate: ``peak`` bytes at once, the same on every machine, and on the
    meta device for free. Not counted: what was there before, and what an operation needs for itself while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._live, self._bound = 0, {}, 0  # storage -> bytes; their sum, with those that were freed since

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _storage(x) not in given:
                size = x.untyped_storage().nbytes()
                self._live[_storage(x)] = size
                self._bound += size
        if self._bound > self.peak:
            self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
            self._bound = sum(self._live.values())
            self.peak = max(self.peak, self._bound)
        return out


def _storage(x: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def resident_peak(step: Callable[[], object]) -> float:
    """MB by which the process's memory rises while ``step`` runs (Linux, glibc)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed would else be taken from the process's own store
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:  # MB
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
