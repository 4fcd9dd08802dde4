"""What a callable takes, read from its signature, and whether one value from a config fits one annotation."""

import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Union

from ldm.common.files import nearest

LISTS = (list, tuple, set, frozenset, Sequence, Collection, Iterable)
MAPPINGS = (dict, Mapping, MutableMapping)
UNSET = "???"  # how OmegaConf writes a value that is still to be filled in


class Block(TypedDict, total=False):
    """Annotation of a parameter that takes a config block unbuilt: {target: package.module.Name, params: {...}}."""

    target: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One named parameter: the alternatives of its annotation (None among them where null is allowed)."""

    options: tuple
    required: bool

    @property
    def takes_block(self) -> bool:
        """True where blocks are passed on unbuilt: Block, Block | None, list[Block], dict[str, Block]."""
        return any(option is Block or Block in typing.get_args(option) for option in self.options)


def is_block(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("target"), str)


def parameters(call: Callable) -> tuple[dict[str, Parameter], bool]:
    """-> the parameters that `call` takes by name, and whether it takes any other name as well (**kwargs)."""
    try:
        signature = inspect.signature(call)
    except ValueError:  # some builtins keep their signature to themselves
        return {}, True
    found, open_ended = {}, False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            options = _options(_resolve(call, name, parameter.annotation))
            if parameter.default is None or None in options:
                options = (*(option for option in options if option is not None), None)
            found[name] = Parameter(options, required=parameter.default is parameter.empty)
    return found, open_ended


def _resolve(call: Callable, name: str, annotation: Any) -> Any:
    """-> the annotation as an object; Any where that cannot be had (names that only type checkers import)."""
    if annotation is inspect.Parameter.empty:
        return Any
    function = inspect.unwrap(call.__init__ if isinstance(call, type) else call)
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", {}))[name]
    except (NameError, AttributeError, SyntaxError, TypeError):
        return Any


def _options(annotation: Any) -> tuple:
    """-> the alternatives of an annotation, unions taken apart; Literals merged into one."""
    if annotation is None or annotation is type(None):
        return (None,)
    if typing.get_origin(annotation) in (Union, types.UnionType):
        flat = [option for part in typing.get_args(annotation) for option in _options(part)]
        values = [value for option in flat if typing.get_origin(option) is Literal for value in typing.get_args(option)]
        rest = [option for option in flat if typing.get_origin(option) is not Literal]
        return (*rest, Literal[tuple(values)]) if values else tuple(rest)
    return (annotation,)


def accepted(parameter: Parameter) -> str:
    """-> what may stand there, in words: `int or list[int] or null`."""
    return " or ".join(dict.fromkeys(_name(option) for option in parameter.options))


def _name(option: Any) -> str:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    inner = [accepted(Parameter(_options(argument), True)) for argument in arguments if argument is not ...]
    if option is None:
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if option in LISTS or origin in LISTS:
        return f"list[{', '.join(inner)}]" if inner else "list"
    if option is Block or option is Callable or origin is Callable:
        return "block"
    if option in MAPPINGS or origin in MAPPINGS or typing.is_typeddict(option):
        return f"names with values ({inner[1]})" if len(inner) == 2 else "names with values"
    if option in (int, float, bool, str):
        return option.__name__
    if _is_path(option):
        return "path"
    return f"block that makes {option.__name__}" if isinstance(option, type) and option is not Any else "any value"


def _is_path(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, os.PathLike)


def mistyped(value: Any, parameter: Parameter, path: str) -> list[str]:
    """-> what is wrong with the value (plain data: dict, list, str, int, float, bool, None) for this parameter. Blocks
    inside it are not looked into."""
    if isinstance(value, str) and value == UNSET:
        return [f"{path}: must be filled in ({accepted(parameter)})"]
    tries = [_against(value, option, path) for option in parameter.options]
    if [] in tries:
        return []
    inside = [found for found in tries if found]
    if inside and all(found == inside[0] for found in inside):  # the value has the form of one alternative
        return inside[0]
    return [f"{path}: expected {accepted(parameter)}, got {_show(value)}{_hint(value, parameter.options)}"]


def _against(value: Any, option: Any, path: str) -> list[str] | None:
    """-> mistakes inside the value, held against one alternative; None where already its form is another."""
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if option in LISTS or origin in LISTS:
        return _items(value, arguments, path) if isinstance(value, list) else None
    if typing.is_typeddict(option) and option is not Block:
        return _fields(value, option, path) if isinstance(value, dict) and not is_block(value) else None
    if option is not Block and (option in MAPPINGS or origin in MAPPINGS):
        return _values(value, arguments, path) if isinstance(value, dict) and not is_block(value) else None
    if option is None:
        fits = value is None
    elif origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in arguments)
    elif option in (int, str, bool):
        fits = type(value) is option
    elif option is float:
        fits = type(value) in (int, float)
    elif _is_path(option):
        fits = isinstance(value, str)
    elif option is Block or option is Callable or origin is Callable:
        fits = is_block(value)
    elif isinstance(option, type) and option is not Any:  # Any is a class
        fits = is_block(value) or (not getattr(option, "_is_protocol", False) and isinstance(value, option))
    else:
        fits = True  # Any, type variables and whatever else we do not judge
    return [] if fits else None


def _items(value: list, arguments: tuple, path: str) -> list[str] | None:
    if len(arguments) > 1 and arguments[-1] is not ...:  # tuple[int, int]: as many as it says
        if len(value) != len(arguments):
            return None
        kinds = arguments
    else:
        kinds = arguments[:1] * len(value)
    return [
        line
        for i, (item, kind) in enumerate(zip(value, kinds, strict=False))
        for line in mistyped(item, Parameter(_options(kind), True), f"{path}[{i}]")
    ]


def _values(value: dict, arguments: tuple, path: str) -> list[str]:
    if len(arguments) != 2:
        return []
    kind = Parameter(_options(arguments[1]), True)
    return [line for key, item in value.items() for line in mistyped(item, kind, f"{path}.{key}")]


def _fields(value: dict, option: type, path: str) -> list[str]:
    """A mapping with names of its own (TypedDict), all of which may be left out."""
    kinds, lines = typing.get_type_hints(option), []
    for key, item in value.items():
        if key in kinds:
            lines += mistyped(item, Parameter(_options(kinds[key]), False), f"{path}.{key}")
        else:
            near = nearest(str(key), kinds)
            hint = f"; nearest: {near!r}" if near else ""
            lines.append(f"{path}.{key}: no such option{hint}; it takes {', '.join(kinds)}")
    return lines


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if is_block(value):
        return f"a block ({value['target']})"
    return f"text {value!r}" if isinstance(value, str) else repr(value)


def _hint(value: Any, options: tuple) -> str:
    """-> what to type instead, where that can be told."""
    if isinstance(value, str):
        literals = [option for option in options if typing.get_origin(option) is Literal]
        words = [word for literal in literals for word in typing.get_args(literal) if isinstance(word, str)]
        near = nearest(value, words)
        if near:
            return f"; nearest: {near!r}"
    if isinstance(value, str) and (float in options or int in options):
        return "; write the number without quotes" if _is_number(value) else ""
    if isinstance(value, float) and int in options and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, str) and bool in options and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return "; write true or false without quotes"
    if isinstance(value, (bool, int, float)) and str in options:
        return "; put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
