"""Pictures from pictures: noised part of the way, and drawn anew from there (SDEdit)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from ldm.app import drawing
from ldm.app.drawing import Make, Task
from ldm.app.generate import several
from ldm.common.files import UserError

if TYPE_CHECKING:
    from ldm.app.reading import Row
    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want
    from ldm.tasks import Frame

SUMMARY = "Draw a picture anew, under a prompt, keeping as much of it as --strength leaves."
SHARED = drawing.SHARED


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser)
    parser.add_argument("--strength", type=float, metavar="S",
                        help="0: what the autoencoder makes of the picture; 1: nothing is left of it (0.6)")


def run(args: argparse.Namespace) -> None:
    drawing.carry_out(args, TASK)


def begins_with(args: argparse.Namespace, bundle: Bundle) -> Sequence[Want]:
    from ldm.conditioners.wants import Want

    return (Want("image", "picture", "the picture to begin with", 3, "picture"),)


def walks(args: argparse.Namespace, steps: int) -> int:
    return ceil(args.strength * steps - 1e-6)


def plan(args: argparse.Namespace, bundle: Bundle, rows: list[Row], frame: Frame) -> tuple[list[Row], Make]:
    from ldm import tasks

    check_share(args.strength)

    def make(batch: dict, options: dict):
        return frame.crop(tasks.img2img(bundle, batch["image"], batch, strength=args.strength, **options))

    return several(args, rows), make


def check_share(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise UserError(f"--strength {strength:g}: it lies between 0, the picture, and 1, nothing of it")


TASK = Task("img2img", plan, begins_with, options={"strength": 0.6}, walks=walks)
