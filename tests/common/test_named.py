"""Choices by name with options."""

from functools import partial

import pytest

from ldm.common.files import UserError
from ldm.common.named import options_of, parse, pick, problems


def walk(x, y, *, pace: float = 1.0, gait: str = "trot", noise=None):
    return x, y, pace, gait


TABLE = {"walk": walk, "run": partial(walk, gait="gallop")}


def test_the_options_are_filled_in():
    assert pick("walk", TABLE, "how") is walk
    assert pick({"name": "walk", "pace": 2}, TABLE, "how")(1, 2) == (1, 2, 2, "trot")
    assert pick({"name": "run", "pace": 2}, TABLE, "how")(1, 2) == (1, 2, 2, "gallop")
    assert list(options_of(walk)) == list(options_of(TABLE["run"])) == ["pace", "gait"]


def test_all_mistakes_are_told():
    assert problems("wlak", TABLE, "how") == ["how: there is no 'wlak'; nearest: 'walk'; there are walk, run"]
    assert problems({"name": "walk", "pase": 1, "gait": 3}, TABLE, "how") == [
        "how: walk has no option 'pase'; nearest: 'pace'; it takes pace, gait",
        "how: walk.gait: expected str, got 3; put it in quotes",
    ]
    for wrong in (3, {"pace": 1}, None, ["walk"]):
        assert problems(wrong, TABLE, "how")[0].startswith("how: expected a name")
    with pytest.raises(UserError, match="has no option 'noise'"):
        pick({"name": "walk", "noise": 1}, TABLE, "how")


@pytest.mark.parametrize(("text", "meant"), [
    ("karras", "karras"),
    ("karras:rho=5,round=true", {"name": "karras", "rho": 5, "round": True}),
    ("sigmas:values=[14.6, 1, 0],x=a", {"name": "sigmas", "values": [14.6, 1, 0], "x": "a"}),
    ("lcm:scaling=1e9,x=1e-3", {"name": "lcm", "scaling": 1e9, "x": 1e-3}),
    ("1,0.5,0", [1.0, 0.5, 0.0]),
])  # fmt: skip
def test_as_the_command_line_writes_it(text, meant):
    assert parse(text) == meant


def test_an_option_has_a_value():
    with pytest.raises(UserError, match="karras:rho: 'rho': options are written option=value"):
        parse("karras:rho")
