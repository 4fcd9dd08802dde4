"""A part of a picture painted anew, or what is around it; every other pixel stays what it was."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.app import drawing
from ldm.app.drawing import Make, Task
from ldm.app.generate import several
from ldm.app.models import positive
from ldm.common.files import UserError

if TYPE_CHECKING:
    from ldm.app.reading import Row
    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want
    from ldm.tasks import Frame

SUMMARY = "Paint what a mask shows white, or around a picture; the other pixels stay as they are, to the bit."
SHARED = drawing.SHARED
OPTIONS = {"method": "auto", "jump": 10, "resample": 10, "feather": 0, "expand": None}


def pixels(text: str) -> int:
    """argparse type: a whole number from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0")
    return int(text)


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser)
    parser.add_argument("--expand", type=pixels, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                        help="paint so many pixels around the picture")
    parser.add_argument("--method", choices=("auto", "model", "replace", "repaint"),
                        help="model: one that was trained for it; replace: any, by the known pixels at every step; repaint: "
                             "the same, back and forth until both parts agree, slower; auto: model or else replace (auto)")
    parser.add_argument("--jump", type=positive, metavar="N", help="of repaint: steps that are gone back (10)")
    parser.add_argument("--resample", type=positive, metavar="N", help="of repaint: times that they are walked (10)")
    parser.add_argument("--feather", type=pixels, metavar="N",
                        help="blend so many pixels beside the mask too, which then are no longer the picture's own (0)")


def run(args: argparse.Namespace) -> None:
    drawing.carry_out(args, Task("inpaint", plan, wants, options=OPTIONS, walks=walks))


def wants(args: argparse.Namespace, bundle: Bundle) -> Sequence[Want]:
    from ldm.conditioners.wants import Want

    if args.expand and not any(args.expand):
        raise UserError("--expand 0 0 0 0: nothing to paint; give pixels at the left, top, right, bottom")
    return (Want("image", "picture", "the picture to paint in", 3, "picture"),
            Want("mask", "mask", "white where to paint; or --expand", 1, "picture", needed=not args.expand))  # fmt: skip


def walks(args: argparse.Namespace, steps: int) -> int:
    again = (steps - 1) // args.jump if args.method == "repaint" and args.resample > 1 else 0
    return steps + again * args.jump * (args.resample - 1)


def plan(args: argparse.Namespace, bundle: Bundle, rows: list[Row], frame: Frame) -> tuple[list[Row], Make]:
    from ldm import tasks

    own = {name: getattr(args, name) for name in ("method", "jump", "resample", "feather")}

    def make(batch: dict, options: dict):
        return frame.crop(tasks.inpaint(bundle, batch["image"], batch["mask"], batch, **own, **options))

    return several(args, rows), make
