"""Pictures from prompts: `generate`, whose prompts have to be given."""

from __future__ import annotations

import argparse

from ldm.app import drawing
from ldm.app.generate import run

SUMMARY = "Draw pictures from prompts."

__all__ = ["SUMMARY", "arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser, text=True)
