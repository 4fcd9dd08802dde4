"""What somebody else's yaml or config.json says, read value by value: what is of another kind than the program needs is refused
with its place in the file, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from ldm.common.build import near
from ldm.common.files import UserError

NEEDED: Any = object()  # in place of a default: the value has to be there
Choice = TypeVar("Choice")


class Said(Mapping[str, Any]):
    """Names and values of one block, where null counts as unsaid. ``place``: of the block, such as "sd.yaml: model.params"."""

    def __init__(self, values: object, place: str):
        if isinstance(values, Said):
            values = values.values
        if not (values is None or isinstance(values, Mapping)):
            raise UserError(f"{place}: expected names with values, got {values!r:.60}")
        self.values, self.place = {name: value for name, value in (values or {}).items() if value is not None}, place

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def block(self, name: str) -> Said:
        """The block of this name; an empty one where there is none."""
        return Said(self.get(name), f"{self.place}.{name}")

    def blocks(self, name: str) -> list[Said]:
        """A list of blocks."""
        given = self.get(name, [])
        if not isinstance(given, (list, tuple)):
            raise self.refused(name, "a list of blocks")
        return [Said(each, f"{self.place}.{name}[{i}]") for i, each in enumerate(given)]

    @property
    def named(self) -> tuple[str, Said]:
        """Of a block {target, params}: the last word of the target, and the params."""
        return self.word("target").rsplit(".")[-1], self.block("params")

    def whole(self, name: str, default: Any = NEEDED, least: int = 1) -> int:
        value = self._value(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise self.refused(name, f"a whole number from {least}")
        return value

    def wholes(self, name: str, default: Any = NEEDED, least: int = 1) -> list[int]:
        return self._list(name, default, (int,), least, f"a list of whole numbers from {least}")

    def numbers(self, name: str, default: Any = NEEDED) -> list[int | float]:
        """From 0 on."""
        return self._list(name, default, (int, float), 0, "a list of numbers from 0")

    def each(self, name: str, count: int, default: int = 1) -> list[int]:
        """A whole number for each of so many, or one for all."""
        value = self.get(name, default)
        found = self.wholes(name, least=0) if isinstance(value, (list, tuple)) else [self.whole(name, default, 0)] * count
        if len(found) != count:
            raise self.refused(name, f"a whole number for each of {count}")
        return found

    def number(self, name: str, default: Any = NEEDED, above: float | None = None) -> float:
        value = self._value(name, default)
        if value is default:
            return value
        try:  # yaml takes 1e-4 for a word
            number = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            number = float("nan")
        if not (number > above if above is not None else abs(number) < float("inf")):
            raise self.refused(name, "a number" if above is None else f"a number above {above:g}")
        return number

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if value not in (True, False):
            raise self.refused(name, "true or false")
        return bool(value)

    def flags(self, name: str) -> list[bool] | None:
        value = self.get(name)
        if value is not None and not (isinstance(value, (list, tuple)) and all(each in (True, False) for each in value)):
            raise self.refused(name, "a list of true and false")
        return None if value is None else [bool(each) for each in value]

    def word(self, name: str, default: Any = NEEDED) -> str:
        value = self._value(name, default)
        if value is not default and not isinstance(value, str):
            raise self.refused(name, "a name")
        return value

    def one(self, name: str, choices: Mapping[str, Choice], default: Any = NEEDED) -> Choice:
        """What stands for this name in ``choices``."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise UserError(f"{self.place}.{name}: {value!r:.60} is not known here{near(str(value), choices)}; there are "
                            f"{', '.join(choices)}")
        return choices[value]

    def among(self, name: str, choices: tuple, default: Any) -> Any:
        """One of these values."""
        if (value := self.get(name, default)) not in choices:
            raise self.refused(name, f"one of {', '.join(map(repr, choices))}")
        return value

    def only(self, **accepted: object) -> None:
        """UserError unless these have this value, or are unsaid: whatever else there is has no counterpart here."""
        for name, value in accepted.items():
            if self.get(name, value) != value:
                raise UserError(f"{self.place}.{name}: {self[name]!r:.60} has no counterpart here; read is {value!r}")

    def refused(self, name: str, expected: str, hint: str = "") -> UserError:
        return UserError(f"{self.place}.{name}: expected {expected}, got {self.get(name)!r:.60}{hint}")

    def _list(self, name: str, default: Any, kinds: tuple[type, ...], least: float, expected: str) -> list:
        value = self._value(name, default)
        if value is default:
            return value
        if not isinstance(value, (list, tuple)) or not all(type(each) in kinds and each >= least for each in value):
            raise self.refused(name, expected)
        return list(value)

    def _value(self, name: str, default: Any) -> Any:
        if default is NEEDED and name not in self:
            raise UserError(f"{self.place}.{name}: missing")
        return self.get(name, default)
