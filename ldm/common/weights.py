"""Modules before they have weights, and weights before they are in a module."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ldm.common.files import UserError

COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
SLACK = 2**26  # bytes
NAMED = 3  # keys of a kind that a message names


class Unfilled(TorchFunctionMode):
    """Tensors are made on the meta device, and as there is nothing to fill there, what initialises weights is left out: a large
    network is made in half the time that ``torch.device("meta")`` needs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FILLING and (filled := args[0] if args else kwargs["tensor"]).is_meta:
            return filled
        if function in MAKING and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


MAKING = {getattr(torch, name) for name in ("arange empty empty_strided eye full linspace logspace ones rand randint randn "
                                            "randperm scalar_tensor tensor zeros").split()}  # fmt: skip
FILLING = {Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_, nn.init.uniform_, nn.init.normal_, nn.init.constant_,
           nn.init.kaiming_uniform_, nn.init.kaiming_normal_}  # fmt: skip


def without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """A module on the meta device; a real one where it holds tensors that its state dict lacks, which would be lost."""
    with Unfilled():
        module = make()
    buffers = {name for name, _ in module.named_buffers()}
    lost = bool(buffers) and not buffers <= module.state_dict().keys()
    lost |= any(isinstance(value, Tensor) for part in module.modules() for value in vars(part).values())
    return make() if lost else module


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """UserError where modules are made, in this thread, that these weights cannot be those of: a config of a few words can ask
    for a thousand million layers."""
    parts, size, thread = 10_000 + 20 * len(weights), SLACK + 4 * sum(value.nbytes for value in weights.values()), get_ident()

    def count(module: nn.Module, name: str, value: object) -> None:
        nonlocal parts, size
        if get_ident() == thread:
            parts -= 1
            size -= value.nbytes if isinstance(value, Tensor) and not value.is_meta else 0
            if parts < 0 or size < 0:
                raise UserError("it is much larger than the weights in the file")

    hooks = [add(count) for add in (register_module_parameter_registration_hook, register_module_module_registration_hook)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def required(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights but for those that a checkpoint may hold or not, of any size (a part's ``optional``: names of buffers)."""
    free = {f"{name}.{key}" for name, part in module.named_modules() for key in getattr(part, "optional", ())}
    return {key: value for key, value in weights.items() if key not in free}


def is_meta(module: nn.Module) -> bool:
    """Whether it has no contents yet."""
    return any(p.is_meta for p in module.parameters())


def compare(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What is missing, misshapen or too much, part by part (the first word of the names); "" where all fits."""
    fits = {key for key in expected.keys() & given.keys() if expected[key].shape == given[key].shape}
    if len(fits) == len(expected) == len(given):
        return ""
    told = []
    for part in dict.fromkeys(key.split(".")[0] for key in expected):
        names = [key for key in expected if key.split(".")[0] == part]
        missing = [key for key in names if key not in given]
        shapes = [f"{key} is {_size(given[key])}, not {_size(expected[key])}"
                  for key in names if key in given and key not in fits]  # fmt: skip
        details = [f"missing {_some(missing)}"] * bool(missing) + [_some(shapes)] * bool(shapes)
        told.append(f"{part} {len(fits & set(names))}/{len(names)}" + f" ({'; '.join(details)})" * bool(details))
    extra = [key for key in given if key not in expected]
    return ", ".join(told + [f"{len(extra)} that it has no place for ({_some(extra)})"] * bool(extra))


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what torch.compile puts in front of the names of a module that it wraps."""
    return {COMPILED.sub("", key): value for key, value in weights.items()}


def wrapped(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The weights under the names that ``module`` has for them, some of whose parts may be compiled."""
    names = {COMPILED.sub("", name): name for name in module.state_dict()}
    return {names.get(key, key): value for key, value in unwrapped(weights).items()}


def content(tensor: Tensor) -> str:
    """Type, shape and SHA-256 of the values: equal for equal tensors, wherever they are."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype} {_size(tensor)} {hashlib.sha256(values).hexdigest()}"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every part of the module is in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
