"""Weights in prompts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.conditioners.prompts import parse, reading, weigh


def rounded(prompt):
    return [(text, round(weight, 4)) for text, weight in parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a red fox", [("a red fox", 1)]),
        ("", [("", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a [red] fox", [("a ", 1), ("red", 0.9091), (" fox", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("((a)) b", [("a", 1.21), (" b", 1)]),
        ("(a [b] c:2)", [("a ", 2), ("b", 1.8182), (" c", 2)]),
        ("((a:1.5):2)", [("a", 3)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
        (r"(a\):2)", [("a)", 2)]),
        (r"C:\new", [(r"C:\new", 1)]),  # a backslash before anything else is a backslash
    ],
)
def test_syntax(prompt, pieces):
    assert rounded(prompt) == pieces


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("(a", [("(a", 1)]),
        ("a) :)", [("a) :)", 1)]),
        ("()", [("()", 1)]),
        ("(:1.3)", [("(:1.3)", 1)]),
        ("(a:x)", [("a:x", 1.1)]),
        ("[a:1.3]", [("a:1.3", 0.9091)]),  # only round brackets take a number
        ("([a)]", [("[a", 1.1), ("]", 1)]),
    ],
)
def test_what_is_no_syntax_is_text(prompt, pieces):
    assert rounded(prompt) == pieces


@given(st.text(alphabet="ab ()[]\\", max_size=40))
def test_any_text_can_be_read(prompt):
    pieces = parse(prompt)
    assert [c for text, _ in pieces for c in text if c in "ab "] == [c for c in prompt if c in "ab "]
    assert all(weight > 0 for _, weight in pieces)


def test_weights_are_read_off_a_line_through_the_empty_prompt():
    states, empty = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    weights = torch.tensor([[1.0, 0.0, 1.5], [1.0, 1.0, 1.0]])
    found = weigh(states, weights, empty)
    assert torch.equal(found[0, 0], states[0, 0]) and torch.equal(found[1], states[1])
    torch.testing.assert_close(found[0, 1], empty[0, 1])
    torch.testing.assert_close(found[0, 2], empty[0, 2] + 1.5 * (states[0, 2] - empty[0, 2]))


def test_a_way_of_reading_lasts_as_long_as_it_is_asked_for():
    part = nn.Linear(1, 1)
    part.prompt_weights, part.long = False, "cut"
    whole = nn.ModuleList([part, nn.Linear(1, 1)])
    with pytest.raises(KeyError), reading(whole, prompt_weights=True):
        assert (part.prompt_weights, part.long) == (True, "cut")
        raise KeyError
    with reading(whole, long="window"):
        assert (part.prompt_weights, part.long) == (False, "window")
    with reading(None, True, "error"):
        pass
    assert (part.prompt_weights, part.long) == (False, "cut") and not hasattr(whole[1], "long")
