"""From config blocks to objects. A block is {target: package.module.Name, params: {...}}; it may stand for any value.

`check` finds what is wrong with a block without making anything; the signature of what the block names is its schema
(see signatures.py for how one value is held against one annotation).
"""

import importlib
import os
import pkgutil
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from ldm.common.files import UserError, nearest
from ldm.common.signatures import Block, Parameter, accepted, is_block, mistyped, parameters

__all__ = ["TRUSTED", "Block", "build", "check", "check_call", "locate", "plain"]
TRUSTED = (  # what a config that came with a checkpoint may name of a model: what makes networks, and writes nothing
    "ldm.networks", "ldm.conditioners", "ldm.process", "ldm.parameterization", "torch.nn", "autoencoder.base",
    "autoencoder.model", "autoencoder.nets", "autoencoder.bottlenecks", "autoencoder.lattices",
    "autoencoder.pretrained.Pretrained",
)  # fmt: skip
READERS = ("ldm.conditioners.encoders", "ldm.conditioners.vision", "ldm.conditioners.vocabulary")  # ... but for these
MAKERS = ("autoencoder.model", "ldm.process")  # whose functions are among it; of all others only classes are
DATA = ("ldm.data",)  # ... and of its data
MANY = 20  # options: more are listed only where none of them is near


def locate(target: str, allowed: Iterable[str] | None = None) -> Callable:
    """-> the class or function with this dotted name. UserError says how far the name was understood, and what is near.

    `allowed`: prefixes of names (TRUSTED); nothing outside of them is imported, nothing defined elsewhere is returned.
    """
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"a target reads package.module.Name, got {target!r}")
    _refuse_foreign(target, target, allowed)
    found = _import(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        prefix = ".".join(parts[:i])
        is_last = i == len(parts) - 1
        if _has_submodule(found, part) and not (is_last and hasattr(found, part)):
            found = _import(f"{found.__name__}.{part}")
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            raise UserError(f"{prefix} has no {part!r}{near(part, _names_in(found))}")
    if not callable(found):
        kind = "a module" if isinstance(found, ModuleType) else f"of type {type(found).__name__}"
        raise UserError(f"{target} is {kind}, not a class or function")
    own = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    _refuse_foreign(target, own, allowed if isinstance(found, type) or _is_inside(own, MAKERS) else allowed and ())
    return found


def _refuse_foreign(target: str, name: str, allowed: Iterable[str] | None) -> None:
    if allowed is not None and (not _is_inside(name, allowed) or _is_inside(name, READERS)):
        raise UserError(
            f"this config came with a checkpoint and may not name {target}, only what makes parts of models (such as "
            f"{TRUSTED[0]}.unet.UNet); if you trust where it comes from, say --trust"
        )


def _is_inside(name: str, prefixes: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a user's module does while it is imported: tell it as his, with his line
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            if _look_here():
                return _import(name)
            packages = {module.name for module in pkgutil.iter_modules()}
            raise UserError(f"no package {name!r} is installed or on PYTHONPATH{near(name, packages)}") from error
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
        places = [f" ({frame.filename}:{frame.lineno})" for frame in theirs if not frame.filename.startswith("<frozen")]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}{places[-1] if places else ''}"
        raise UserError(f"{name} fails to import: {reason}") from error


def _look_here() -> bool:
    """Has modules looked for in the current folder too, after all others: a program that is started by its path has its
    own folder in that place. -> whether that is new."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        return False
    sys.path.append(here)
    importlib.invalidate_caches()
    return True


def _has_submodule(found: Any, name: str) -> bool:
    if not isinstance(found, ModuleType) or not hasattr(found, "__path__"):
        return False
    full_name = f"{found.__name__}.{name}"
    return full_name in sys.modules or find_spec(full_name) is not None


def _names_in(found: Any) -> set[str]:
    submodules = {module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))}
    return {name for name in dir(found) if not name.startswith("_")} | submodules


def near(word: str, choices: Iterable[str]) -> str:
    """-> `; nearest: 'word'`, to be put behind an error; nothing where no choice is near."""
    found = nearest(word, choices)
    return f"; nearest: {found!r}" if found else ""


def plain(value: Any) -> Any:
    """-> the value with every mapping as dict and every list (OmegaConf's too) as list, interpolations resolved."""
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [plain(item) for item in value]
    return value


def build(block: Mapping, /, *, allowed: Iterable[str] | None = None, **given: Any) -> Any:
    """Calls what the block names with its params. Params that are blocks are built first, in lists and dicts too,
    unless the parameter is annotated `Block`: those go on as they are, to whoever knows the sizes that they depend on.

    `given` are values that the program derives (channels, widths); of them the callable gets those that it has a
    parameter for. `allowed` is the argument of `locate`, for every target in the block, passed on or not.
    Names that are unknown, missing or given twice raise UserError.
    """
    block = plain(block)
    if allowed is not None:
        for target in _targets(block):
            locate(target, allowed)
    mistakes = _malformed(block, "block")
    if mistakes:
        raise UserError("; ".join(mistakes))
    call, params = locate(block["target"]), block.get("params") or {}
    known, open_ended = parameters(call)
    derived = {name: value for name, value in given.items() if name in known or open_ended}
    twice = sorted(derived.keys() & params.keys())
    if twice:
        raise UserError(f"{block['target']}: the program supplies {', '.join(twice)}; remove it from the config")
    mistakes = _wrong_names(call, params, "params", supplied=derived)
    if mistakes:
        raise UserError(f"{block['target']}: {'; '.join(mistakes)}")
    made = {
        name: value if name in known and known[name].takes_block else _build_inside(value)
        for name, value in params.items()
    }
    return call(**made, **derived)


def _build_inside(value: Any) -> Any:
    if is_block(value):
        return build(value)
    if isinstance(value, dict):
        return {key: _build_inside(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_build_inside(item) for item in value]
    return value


def _targets(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["target"]] if is_block(value) else []
        return own + [target for item in value.values() for target in _targets(item)]
    return [target for item in value for target in _targets(item)] if isinstance(value, list) else []


def check(block: Any, path: str = "model", allowed: Iterable[str] | None = None) -> list[str]:
    """-> everything that is wrong with the block and the blocks inside it, one line each with its path; [] if nothing.

    Nothing is constructed; modules that targets live in are imported. A callable may carry
      `given`: tuple of the names of parameters that the program supplies, neither required nor allowed in a config;
      `check_params(params: dict, path: str) -> list[str]`: finds combinations that cannot work; called where the params
      that it looks at, `check_params.reads` or else all, are right one by one.
    """
    block = plain(block)
    mistakes = _malformed(block, path)
    if not is_block(block):
        return mistakes
    params = block.get("params") or {}
    try:
        call = locate(block["target"], allowed)
    except UserError as error:
        return [*mistakes, f"{path}.target: {error}", *_check_inside(params, f"{path}.params", allowed)]
    if not isinstance(params, dict) or (mistakes and "params" not in block):
        return mistakes
    return mistakes + check_call(call, params, f"{path}.params", allowed=allowed)


def _bases(call: Callable) -> tuple[type, ...]:
    return call.__mro__ if isinstance(call, type) else ()


def check_call(
    call: Callable, params: Mapping, path: str, given: Iterable[str] = (), allowed: Iterable[str] | None = None
) -> list[str]:
    """-> everything that is wrong with `call(**params)`, as `check` says it; `given` adds to the callable's own."""
    supplied = {*given, *getattr(call, "given", ())}
    if any(f"{base.__module__}.{base.__name__}" == "torch.optim.optimizer.Optimizer" for base in _bases(call)):
        supplied.add("params")  # torch's optimizers cannot say it themselves
    known, _ = parameters(call)
    mistakes = []
    for name, value in params.items():
        if name in supplied:
            mistakes.append(f"{join(path, name)}: the program supplies this to {_name(call)}; remove it")
        elif name in known:
            mistakes += mistyped(value, known[name], join(path, name)) or _misplaced(value, known[name], join(path, name))
    mistakes += _wrong_names(call, params, path, supplied)
    mistakes += _check_inside(params, path, allowed)
    hook = getattr(call, "check_params", None)
    if hook and not _about(mistakes, path, getattr(hook, "reads", None)):
        mistakes += [mistake for mistake in hook(params, path) if mistake not in mistakes]
    return mistakes


def _about(mistakes: list[str], path: str, names: Iterable[str] | None) -> list[str]:
    """Those in params of these names; None: in any."""
    starts = tuple(f"{join(path, name)}{end}" for name in names or () for end in ".:[")
    return mistakes if names is None else [mistake for mistake in mistakes if mistake.startswith(starts)]


def _misplaced(value: Any, parameter: Parameter, path: str) -> list[str]:
    """A block of a class where only others fit: a loss in the place of a noise process."""
    kinds = [option for option in parameter.options if option is not None and typing.get_origin(option) is not Literal]
    if not is_block(value) or not kinds or not all(map(_is_judged, kinds)):
        return []
    try:
        made = locate(value["target"])
    except UserError:
        return []  # `check` tells it
    fits = not isinstance(made, type) or issubclass(made, tuple(kinds))
    return [] if fits else [f"{path}.target: expected {accepted(parameter)}, got {value['target']}"]


def _is_judged(option: Any) -> bool:
    """Whether an annotation is a class of which instances are."""
    kind = isinstance(option, type) and option not in (Any, Callable) and not typing.is_typeddict(option)
    return kind and not getattr(option, "_is_protocol", False)


def _malformed(block: Any, path: str) -> list[str]:
    """Mistakes in the form of the block itself."""
    if not isinstance(block, dict) or "target" not in block:
        return [f"{path}: expected a block (target: package.module.Name, params: {{...}}), got {block!r}"]
    mistakes = [
        f"{join(path, key)}: a block holds target and params, nothing else{near(str(key), ('target', 'params'))}"
        for key in block
        if key not in ("target", "params")
    ]
    if not isinstance(block["target"], str):
        mistakes.append(f"{path}.target: expected package.module.Name, got {block['target']!r}")
    if not isinstance(block.get("params") or {}, dict):
        mistakes.append(f"{path}.params: expected names with values, got {block['params']!r}")
    return mistakes


def _wrong_names(call: Callable, params: Mapping, path: str, supplied: Iterable[str]) -> list[str]:
    """Unknown and missing parameters."""
    known, open_ended = parameters(call)
    names = [name for name in known if name not in supplied]
    unknown = [
        f"{join(path, key)}: {_name(call)} has no such option{_instead(str(key), names)}"
        for key in params
        if key not in known and key not in supplied and not open_ended
    ]
    missing = [
        f"{join(path, name)}: missing; {_name(call)} needs it ({accepted(known[name])})"
        for name in names
        if known[name].required and name not in params
    ]
    return unknown + missing


def _instead(key: str, names: list[str]) -> str:
    found = near(key, names)
    if found and len(names) > MANY:
        return found
    return f"{found}; it takes {', '.join(names) or 'none'}"


def _name(call: Callable) -> str:
    return getattr(call, "__name__", type(call).__name__)


def _check_inside(value: Any, path: str, allowed: Iterable[str] | None) -> list[str]:
    """The blocks somewhere inside params, lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    mistakes = []
    for key, item in items:
        here = f"{path}[{key}]" if isinstance(value, list) else join(path, key)
        look_in = check if isinstance(item, dict) and "target" in item else _check_inside
        mistakes += look_in(item, here, allowed)
    return mistakes


def join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
