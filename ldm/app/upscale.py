"""Small pictures enlarged, by a model that was trained to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.app import drawing
from ldm.app.drawing import Make, Task
from ldm.app.generate import several
from ldm.app.models import positive

if TYPE_CHECKING:
    from ldm.app.reading import Row
    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want
    from ldm.tasks import Frame

SUMMARY = "Enlarge pictures with a super-resolution model."
SHARED = drawing.SHARED


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser)
    parser.add_argument("--factor", type=positive, metavar="N", help="of models that do not say by how much they enlarge")


def run(args: argparse.Namespace) -> None:
    args.low_res, args.image = args.low_res or args.image, None
    drawing.carry_out(args, Task("upscale", plan, wants, options={"factor": None}))


def wants(args: argparse.Namespace, bundle: Bundle) -> Sequence[Want]:
    """The model's own, which it has to have: what is drawn is so many times as large."""
    from ldm.tasks.upscaling import factor_of, small_picture

    return (replace(small_picture(bundle).wants[0], sides=factor_of(bundle, args.factor)),)


def plan(args: argparse.Namespace, bundle: Bundle, rows: list[Row], frame: Frame) -> tuple[list[Row], Make]:
    from ldm.tasks.upscaling import small_picture, upscale

    key, side = small_picture(bundle).key, bundle.sampling.get("size")
    if args.window is None and side and max(frame.drawn) > max(side):
        args.window = max(side)

    def make(batch: dict, options: dict):
        return frame.crop(upscale(bundle, batch[key], batch, factor=args.factor, **options))

    return several(args, rows), make
