"""Pictures from prompts: `generate`, whose prompts have to be given."""

from __future__ import annotations

import argparse

from ldm.app import generate
from ldm.common.files import OnAllRanks

SUMMARY = "Draw pictures from prompts."
SHARED = generate.SHARED

arguments = generate.arguments


def run(args: argparse.Namespace) -> None:
    if not (args.prompt or args.prompts_file or args.from_image):
        raise OnAllRanks("one of the arguments --prompt --prompts-file --from-image is required; see txt2img --help")
    generate.run(args)
