"""How an autoencoder is put on trial: what a promise is, what it is tried on, and how a broken one is told."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autoencoder.base import Autoencoder

SMALL = 1e-4  # difference that rounding may make, in units of the largest value
LEAST = 16  # pixels: the side of the smallest picture, or two positions of the latent if these are more


class Broken(AssertionError):
    """A promise is not kept; the message says what came, what was expected, and how to mend it."""


class Unjudged(Exception):
    """A promise cannot be judged here, or has nothing to say of this kind; no failure."""


@dataclass(frozen=True)
class Result:
    name: str
    status: Literal["ok", "FAILED", "note", "not tried"]
    told: str


class Case:
    """An autoencoder under test.

    Args:
        factory: makes one, with new weights each time.
        side: of the pictures, made a multiple of the factor. None: small.
        state: its state dict, where it has been trained.
    """

    def __init__(self, factory: Callable[[], Autoencoder], side: int | None = None, state: Mapping[str, Tensor] | None = None):
        self.factory, self.side, self.state = factory, side, state

    def untrained(self, seed: int = 0) -> Autoencoder:
        with seeded(seed):
            return self.factory().eval()

    def model(self, seed: int = 0) -> Autoencoder:
        model = self.untrained(seed)
        if self.state is not None:
            model.load_state_dict(self.state)
        return model

    def size(self, model: Autoencoder) -> int:
        return model.factor * (math.ceil(self.side / model.factor) if self.side else max(2, math.ceil(LEAST / model.factor)))

    def pictures(self, model: Autoencoder, n: int = 2, height: int = 0, width: int = 0) -> Tensor:
        """(n,C,H,W) uniform in [-1,1], the same at every call."""
        side = self.size(model)
        shape = (n, model.image_channels, height or side, width or side)
        return torch.rand(shape, generator=torch.Generator().manual_seed(n)) * 2 - 1


@dataclass(frozen=True)
class Promise:
    """Call it: gives back what was found, raises Broken or Unjudged."""

    name: str
    keep: Callable[[Case], str]
    needs: str | None = None  # the promise without which this one cannot be judged

    def of(self, case: Case) -> str:
        try:
            with seeded(23):
                return self.keep(case)
        except (Broken, Unjudged):
            raise
        except Exception as error:  # whatever a user's class does
            raise Broken(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place(error)}") from error


def promise(name: str, needs: str | None = None) -> Callable[[Callable[[Case], str]], Promise]:
    """Makes a Promise of a function, which gives back a line about what it found."""
    return lambda keep: Promise(name, keep, needs)


def expect(kept: bool, came: str, mend: str) -> None:
    if not kept:
        raise Broken(f"{came}; {mend}")


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest value; inf where the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    return float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-12))


def weights_like(x: Tensor) -> Tensor:
    """Random weights: the gradient of a plain sum cancels in some networks."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators start from ``seed``; afterwards they are as they were."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def place(error: Exception) -> str:
    """Where in the user's code it went wrong: the innermost line that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
