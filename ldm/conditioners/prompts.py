r"""Weights in prompts, and what else may be said about how prompts are read.

    (text)  1.1       (text:1.3)  1.3       [text]  1/1.1

Brackets nest, and their weights multiply. \( \) \[ \] \\ are these characters themselves. Whatever is no such syntax, such as a
bracket without its partner or with nothing inside, is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Long = Literal["cut", "error", "window"]  # what becomes of texts that are longer than the encoder's window
STEP = 1.1
OPENING = {")": "(", "]": "["}
SYNTAX = "()[]\\"
NUMBER = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")


def parse(prompt: str) -> list[tuple[str, float]]:
    """A prompt's pieces, syntax removed, each with its weight: "a (red:1.5) fox" -> [("a ", 1), ("red", 1.5), (" fox", 1)]."""
    if not any(character in SYNTAX for character in prompt):
        return [(prompt, 1.0)]
    starts, ends = _brackets(prompt)
    pieces: list[tuple[str, float]] = []
    weights, i = [1.0], 0
    while i < len(prompt):
        if i in starts:
            weights.append(weights[-1] * starts[i])
        elif i in ends:
            weights.pop()
            i = ends[i]
        else:
            i += _escapes(prompt, i)
            if not pieces or pieces[-1][1] != weights[-1]:
                pieces.append(("", weights[-1]))
            pieces[-1] = (pieces[-1][0] + prompt[i], weights[-1])
        i += 1
    return pieces or [("", 1.0)]


def _brackets(prompt: str) -> tuple[dict[int, float], dict[int, int]]:
    """-> place of each opening bracket that means something: its weight; the end of its text: place of its closing bracket."""
    starts, ends, waiting, i = {}, {}, [], 0
    while i < len(prompt):
        character = prompt[i]
        i += _escapes(prompt, i)
        if character in OPENING.values():
            waiting.append(i)
        elif character in OPENING and (same := [k for k in waiting if prompt[k] == OPENING[character]]):
            start = same[-1]
            del waiting[waiting.index(start) :]  # openings in between found no partner: they are text
            given = NUMBER.search(prompt, start + 1, i) if character == ")" else None
            end = i if given is None else given.start()
            if end > start + 1:
                starts[start] = float(given[1]) if given else STEP if character == ")" else 1 / STEP
                ends[end] = i
        i += 1
    return starts, ends


def _escapes(prompt: str, i: int) -> int:
    """1 where a backslash stands before a character of the syntax, else 0."""
    return int(prompt[i] == "\\" and i + 1 < len(prompt) and prompt[i + 1] in SYNTAX)


def weigh(states: Tensor, weights: Tensor, empty: Tensor) -> Tensor:  # (B,L,D), (B,L), (1,L,D) -> (B,L,D)
    """empty + w (state - empty): 0 says nothing, 1 leaves the state as it is to the last bit, above 1 leads on from the empty
    prompt. Unlike w state, with the mean put back, it does not hang on a mean that may be near zero."""
    return torch.lerp(empty, states, weights[..., None].to(states))


@contextmanager
def reading(conditioner: nn.Module | None, prompt_weights: bool | None = None, long: Long | None = None) -> Iterator[None]:
    """Every text conditioner in the module reads prompts in this way for a while; None: as it is set."""
    asked = {name: value for name, value in (("prompt_weights", prompt_weights), ("long", long)) if value is not None}
    parts = [part for part in (conditioner.modules() if conditioner is not None else ()) if hasattr(part, "prompt_weights")]
    before = [{name: getattr(part, name) for name in asked} for part in parts]
    for part in parts:
        vars(part).update(asked)
    try:
        yield
    finally:
        for part, values in zip(parts, before, strict=True):
            vars(part).update(values)
