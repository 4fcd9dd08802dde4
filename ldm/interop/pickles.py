"""Tensors out of files that hold more than tensors, without running any of it.

Lightning's checkpoints of other people are pickles that name classes (callbacks, configs). A pickle may name anything and
call it. Here every name but those that put tensors together becomes a stand-in: a class that takes whatever is done to it
and does nothing; nothing is imported.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import _utils

OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before 1.6, when they were no zip yet


class StandIn:
    """What a pickle gets in place of a class or function that it names."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def nothing(self, *args, **kwargs) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = nothing


class Unpickler(pickle.Unpickler):
    """Knows no names but ALLOWED. torch adds the typed storages, which hold numbers alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]()
        return type(str(name), (StandIn,), {"__module__": str(module)})


def _wrapped(name: str) -> Callable[[], Callable]:
    def fresh() -> Callable:  # a pickle can change the attributes of what it is given: let them be nobody else's
        return lambda *args: getattr(_utils, name)(*args)

    return fresh


ALLOWED = {
    ("collections", "OrderedDict"): lambda: OrderedDict,
    **{("torch._utils", name): _wrapped(name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")},
}


def read(path: Path) -> Any:
    """What torch.save wrote to the file: tensors, numbers, text and containers as they were, stand-ins for the rest.

    Raises:
        pickle.UnpicklingError: whatever is wrong with the file.
    """
    careful = SimpleNamespace(__name__="pickles", Unpickler=Unpickler, load=lambda file, **how: Unpickler(file, **how).load())
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip and any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise ValueError("a TorchScript program, not weights")
        return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=False, pickle_module=careful)
    except Exception as error:  # a pickle that was written to do harm can fail in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
