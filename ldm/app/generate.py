"""Pictures from conditions: prompts, classes, maps, boxes, whatever the model reads; or from nothing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.app import drawing
from ldm.app.drawing import Make, Task

if TYPE_CHECKING:
    from ldm.app.reading import Row
    from ldm.bundle import Bundle
    from ldm.tasks import Frame

SUMMARY = "Draw pictures from what the model reads: prompts, classes, maps, boxes ..., or from nothing."
SHARED = drawing.SHARED


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser)


def run(args: argparse.Namespace) -> None:
    drawing.carry_out(args, TASK)


def plan(args: argparse.Namespace, bundle: Bundle, rows: list[Row], frame: Frame) -> tuple[list[Row], Make]:
    def make(batch: dict, options: dict):
        drawn = bundle.generate(batch or len(options["indices"]), size=frame.drawn, **options)
        return frame.crop(drawn)

    return several(args, rows), make


def several(args: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """Each row --n-samples times."""
    return [row for row in rows for _ in range(args.n_samples)]


TASK = Task("", plan, text=True)
