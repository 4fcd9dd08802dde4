"""Other pictures like a given one."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.app import drawing
from ldm.app.drawing import Make, Task
from ldm.app.generate import several
from ldm.app.img2img import check_share

if TYPE_CHECKING:
    from ldm.app.reading import Row
    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want
    from ldm.tasks import Frame

log = logging.getLogger(__name__)
SUMMARY = "Draw pictures like a given one."
SHARED = drawing.SHARED
TOLD = {"embedding": "from what its encoder sees in the picture", "img2img": "by noise on the picture, strength {:g} (SDEdit)",
        "inversion": "by the picture's own noise (DDIM inversion), turned by {:g} of the way to new noise"}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser)
    parser.add_argument("--method", choices=("auto", "embedding", "img2img", "inversion"),
                        help="embedding: of models that read pictures by an encoder; img2img, inversion: of any; auto: "
                             "embedding where there is an encoder, else img2img (auto)")
    parser.add_argument("--strength", type=float, metavar="S",
                        help="of img2img and inversion: from 0, the picture itself, to 1, another (0.6)")


def run(args: argparse.Namespace) -> None:
    drawing.carry_out(args, Task("variations", plan, wants, options={"method": "auto", "strength": 0.6}))


def wants(args: argparse.Namespace, bundle: Bundle) -> Sequence[Want]:
    """The picture: as its encoder reads it, of any size, or of the size that is drawn."""
    from ldm.conditioners.wants import Want
    from ldm.tasks.varying import way_of

    args.method = way_of(bundle, args.method)
    return () if args.method == "embedding" else (Want("image", "picture", "the picture to vary", 3, "picture"),)


def plan(args: argparse.Namespace, bundle: Bundle, rows: list[Row], frame: Frame) -> tuple[list[Row], Make]:
    from ldm import tasks
    from ldm.conditioners.image import ImageEmbedding
    from ldm.tasks.picture import part_of

    check_share(args.strength)
    log.info("variations %s", TOLD[args.method].format(args.strength))
    embedding = args.method == "embedding"
    key = part_of(bundle, ImageEmbedding).key if embedding else "image"

    def make(batch: dict, options: dict):
        found = tasks.variations(bundle, batch[key], batch, method=args.method, strength=args.strength,
                                 **({"size": frame.drawn} if embedding else {}), **options)  # fmt: skip
        return frame.crop(found)

    return several(args, rows), make
