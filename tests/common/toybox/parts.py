"""Parts with every kind of annotation that a config meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import system as borrowed  # noqa: F401  (named by a test: what a module imported is not what it offers)
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Protocol

from ldm.common.build import Block, build

if TYPE_CHECKING:
    from nowhere import Unknown

calls: list[str] = []  # constructors that ran
CONSTANT = 3


class Process(Protocol):
    def sigma(self, t: float) -> float: ...


class Encoder:
    def __init__(self, channels: int, rate: float = 0.1, act: Literal["silu", "gelu"] = "silu"):
        calls.append("Encoder")
        self.channels, self.rate, self.act = channels, rate, act


class Model:
    """Takes its network unbuilt and gives it the size that it derives."""

    def __init__(self, encoder: Encoder, network: Block, critic: Encoder | None = None, extras: list[Block] = ()):
        self.encoder, self.critic, self.extras = encoder, critic, extras
        self.network = build(network, in_channels=encoder.channels)


class UNet:
    given = ("in_channels",)

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        mult: list[int] | tuple[int, ...] = (1, 2),
        size: int | tuple[int, int] = 8,
        dropout: float | None = None,
        attention: bool = True,
        name: str = "unet",
        root: Path | None = None,
        norm: Callable[[int], Any] | None = None,
        weights: dict[str, float] | None = None,
        legacy: Optional[int] = 3,  # noqa: UP045
        kernel: int = None,  # noqa: RUF013
        free=1,
        unknown: Unknown = None,
        stages: Sequence[Encoder] = (),
        process: Process | None = None,
    ):
        calls.append("UNet")
        self.in_channels, self.model_channels, self.mult = in_channels, model_channels, mult
        self.norm, self.stages = norm, stages


@dataclass
class Schedule:
    steps: int
    shape: Literal["linear", "cosine"] = "linear"
    betas: list[float] = field(default_factory=list)

    @staticmethod
    def check_params(params: dict, path: str) -> list[str]:
        return (
            [f"{path}.shape: cosine needs steps > 1"] if params.get("shape") == "cosine" and params["steps"] < 2 else []
        )


def anything(width: int, **options):
    return {"width": width, **options}


def fails(width: int):
    raise ValueError(f"width {width} is not to my taste")


class Autoencoding:
    """A training module of the kind that makes autoencoders."""

    kind = "autoencoder"

    def __init__(self, width: int = 8):
        self.width = width


class Diffusing(Autoencoding):
    kind = "diffusion"


class Coder:
    """What makes latents."""

    def encode(self, x):
        return x

    decode = encode
