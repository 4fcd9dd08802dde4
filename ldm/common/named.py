"""Choices by name with options, as configs and the command line write them: "karras", {name: karras, rho: 5}, and on the
command line "karras:rho=5". The options of a function are its keyword-only parameters, and those that have a default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any

import yaml

from ldm.common.files import UserError, nearest
from ldm.common.signatures import mistyped, parameters

Spec = str | Mapping[str, Any]  # name, or {name: ..., option: ...}
GIVEN = ("callback", "noise")  # keyword-only parameters that the program supplies


def pick(spec: Spec, table: Mapping[str, Callable], what: str) -> Callable:
    """The function with its options filled in. UserError that tells all mistakes."""
    mistakes = problems(spec, table, what)
    if mistakes:
        raise UserError("; ".join(mistakes))
    name, options = split(spec)
    return partial(table[name], **options) if options else table[name]


def split(spec: Spec) -> tuple[str, dict]:
    """-> the name and the options."""
    return (spec, {}) if isinstance(spec, str) else (spec["name"], {k: v for k, v in spec.items() if k != "name"})


def problems(spec: Any, table: Mapping[str, Callable], what: str) -> list[str]:
    """What is wrong with a choice, each with what would be right."""
    if not isinstance(spec, str) and not (isinstance(spec, Mapping) and isinstance(spec.get("name"), str)):
        return [f"{what}: expected a name, or name and options ({{name: ...}}), got {spec!r}"]
    name, options = split(spec)
    if name not in table:
        return [f"{what}: there is no {name!r}{_near(name, table)}; there are {', '.join(table)}"]
    takes = options_of(table[name])
    unknown = [key for key in options if key not in takes]
    missing = [key for key, one in takes.items() if one.required and key not in options]
    return [
        *(f"{what}: {name} has no option {key!r}{_near(key, takes)}; it takes {', '.join(takes) or 'none'}" for key in unknown),
        *(f"{what}: {name} needs {key}" for key in missing),
        *(line for key in options if key in takes for line in mistyped(options[key], takes[key], f"{what}: {name}.{key}")),
    ]


def options_of(call: Callable) -> dict:
    """-> the keyword-only parameters that a user may give."""
    own = {key for key, one in signature(call).parameters.items()
           if one.kind is Parameter.KEYWORD_ONLY or one.default is not Parameter.empty}
    found = parameters(call.func if isinstance(call, partial) else call)[0]
    return {key: one for key, one in found.items() if key in own and key not in GIVEN}


def parse(text: str) -> str | dict | list[float]:
    """What the command line writes: "name", "name:option=value,option=value", or "1,0.8,0.5,0". UserError."""
    name, colon, rest = text.partition(":")
    if not colon:
        try:
            return [float(part) for part in text.split(",")]
        except ValueError:
            return text
    spec: dict[str, Any] = {"name": name}
    for part in _parts(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{text}: {part!r}: options are written option=value")
        spec[key.strip()] = _value(value)
    return spec


def _value(text: str) -> Any:
    """What YAML reads, and numbers such as 1e9, which it takes for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{text!r}: not a value that YAML can read") from error
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _parts(text: str) -> list[str]:
    """Split at the commas that are not inside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _near(word: str, choices: Mapping) -> str:
    found = nearest(word, choices)
    return f"; nearest: {found!r}" if found else ""
