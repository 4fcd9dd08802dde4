"""Numbers that cannot be, found in a config before anything is made."""

from collections.abc import Callable

Range = float | tuple[float, float]  # the least, or the least and the most


def limits(**allowed: Range) -> Callable[[dict, str], list[str]]:
    """-> a `check_params` hook (see ``ldm.common.build.check``) that refuses numbers outside of these, in lists too."""

    def check_params(params: dict, path: str) -> list[str]:
        return [line for name, reach in allowed.items() for line in outside(params.get(name), reach, f"{path}.{name}")]

    check_params.reads = ()  # it looks at each value by itself, whatever is wrong with the others
    return check_params


def outside(value: object, reach: Range, path: str) -> list[str]:
    """What is wrong with a number, or with those in a list; other values are not judged."""
    least, most = reach if isinstance(reach, tuple) else (reach, float("inf"))
    values = value if isinstance(value, list) else [value]
    wrong = [each for each in values if type(each) in (int, float) and not least <= each <= most]
    told = f"{least} or more" if most == float("inf") else f"{least} to {most}"
    return [f"{path.removeprefix('.')}: expected {told}, got {value}"] if wrong else []
