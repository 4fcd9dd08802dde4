"""Latent diffusion: conditioners, noise processes, networks, samplers and what binds them into one model.

Importing the package costs next to nothing, not even torch: it prepares torchvision for being imported later (see
torchvision_repair) and offers `ldm.load(path)` and `ldm.lora.apply(bundle, path)`, whose modules are read on first use.
"""

import sys
from importlib import import_module
from types import ModuleType

from ldm.common import torchvision_repair

torchvision_repair.repair()


class _Package(ModuleType):
    """Keeps `ldm.load` the function. The import of the submodule `ldm.load`, by whomever, sets the package's attribute
    of that name to the module; a plain attribute or `__getattr__` would be overwritten by it."""

    @property
    def load(self):
        from ldm.load import load

        return load

    @load.setter
    def load(self, submodule: ModuleType) -> None:
        pass

    def __getattr__(self, name: str) -> ModuleType:
        if name == "lora":
            return import_module("ldm.lora")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
