"""A picture under another prompt: inverted under the one that tells what it shows, and drawn from there under the other."""

from __future__ import annotations

import argparse
from math import ceil
from typing import TYPE_CHECKING

from ldm.app import drawing
from ldm.app.drawing import Make, Task
from ldm.app.img2img import begins_with, check_share
from ldm.app.inpaint import pixels
from ldm.common.files import UserError

if TYPE_CHECKING:
    from ldm.app.reading import Row
    from ldm.bundle import Bundle
    from ldm.tasks import Frame

SUMMARY = "Edit a picture by its prompt: --prompt WHAT_IT_SHOWS WHAT_IT_IS_TO_SHOW (DDIM inversion)."
SHARED = drawing.SHARED


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser, samples=False)
    parser.add_argument("--refine", type=pixels, metavar="N",
                        help="rounds of fixed-point iteration at every step of the inversion, which make it exact (0)")
    parser.add_argument("--strength", type=float, metavar="S",
                        help="how far towards noise it is inverted; below 1 more of the picture stays (1)")


def run(args: argparse.Namespace) -> None:
    args.sampler = args.sampler or (None if args.from_image else "ddim")
    options = {"refine": 0, "strength": 1.0}
    drawing.carry_out(args, Task("edit", plan, begins_with, lambda args, n: 1, options, walks))


def walks(args: argparse.Namespace, steps: int) -> int:
    return 2 * ceil(args.strength * steps - 1e-6)


def plan(args: argparse.Namespace, bundle: Bundle, rows: list[Row], frame: Frame) -> tuple[list[Row], Make]:
    from ldm import tasks
    from ldm.app.reading import Row, stacked

    check_share(args.strength)
    if args.strength == 0:
        raise UserError("--strength 0: the picture itself; it takes a share of the steps above 0")
    source, target = ends(rows)
    before = stacked([source.values])

    def make(batch: dict, options: dict):
        found = tasks.edit(bundle, before["image"], before, batch, strength=args.strength, refine=args.refine, **options)
        return frame.crop(found)

    return [Row(target.values, {**source.said, "to": target.said})], make


def ends(rows: list[Row]) -> tuple[Row, Row]:
    """The conditions of both ends, where one is that of both. UserError for more."""
    if len(rows) > 2:
        raise UserError(f"conditions of two pictures, from one to the other, got {len(rows)}")
    return rows[0], rows[-1]
