"""Pictures on the way from one to another: between prompts, seeds, other conditions, or two given pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.app import drawing
from ldm.app.drawing import Make, Task
from ldm.app.edit import ends
from ldm.app.img2img import check_share
from ldm.app.models import positive
from ldm.app.png import check_free
from ldm.common.files import UserError, atomic_write
from ldm.common.team import agreed, place

if TYPE_CHECKING:
    from ldm.app.reading import Row
    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want
    from ldm.tasks import Frame

SUMMARY = "Draw pictures on the way between two prompts (--prompt A B), seeds, other conditions, or pictures (--image A B)."
SHARED = drawing.SHARED
ANIMATED = (".gif", ".webp")


def arguments(parser: argparse.ArgumentParser) -> None:
    drawing.arguments(parser, samples=False)
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--frames", type=positive, metavar="N", help="pictures, both ends among them (8)")
    number.add_argument("--shares", type=float, nargs="+", metavar="X", help="how far from the first, 0, to the second, 1")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("A", "B"),
                        help="of both ends; default: --seed for both, and the next one where nothing else differs")
    parser.add_argument("--way", choices=("lerp", "slerp"),
                        help="of tokens and vectors: a straight line or a great circle; noise always takes the latter (lerp)")
    parser.add_argument("--strength", type=float, metavar="S", help="noise that --image A B are given (0.6)")
    parser.add_argument("--animation", metavar="FILE", help=f"all of them as one moving picture, {' or '.join(ANIMATED)}")
    parser.add_argument("--fps", type=positive, default=8, metavar="N", help="of --animation: pictures a second (8)")


def run(args: argparse.Namespace) -> None:
    with agreed():
        if args.animation and Path(args.animation).suffix not in ANIMATED:
            raise UserError(f"--animation {args.animation}: expected a name that ends in {' or '.join(ANIMATED)}")
        check_free([Path(args.animation)] if args.animation else [], args.overwrite)
    if args.frames:
        args.shares = [i / max(1, args.frames - 1) for i in range(args.frames)]
    options = {"shares": [i / 7 for i in range(8)], "seeds": None, "way": "lerp", "strength": None}
    files = drawing.carry_out(args, Task("interpolate", plan, wants, lambda args, n: len(args.shares), options))
    if args.animation and place()[0] == 0:
        animate(files, Path(args.animation), args.fps)


def wants(args: argparse.Namespace, bundle: Bundle) -> Sequence[Want]:
    """Pictures to go between, unless the model reads them itself."""
    from ldm.conditioners.wants import Want, wants_of

    if any(want.key == "image" for want in wants_of(bundle.conditioner) or ()):
        return ()
    return (Want("image", "picture", "pictures to go between", 3, "picture", needed=False),)


def plan(args: argparse.Namespace, bundle: Bundle, rows: list[Row], frame: Frame) -> tuple[list[Row], Make]:
    import torch

    from ldm import tasks
    from ldm.app.reading import Row, stacked

    if wrong := [share for share in args.shares if not 0 <= share <= 1]:
        raise UserError(f"--shares {wrong[0]:g}: each lies between 0 and 1")
    first, second = ends(rows)
    args.seeds = args.seeds or [args.seed, args.seed + (first.said == second.said)]
    between = "image" in first.values and bool(wants(args, bundle))
    args.strength = (0.6 if args.strength is None else args.strength) if between else None
    check_share(args.strength or 0)
    if args.strength == 0:
        raise UserError("--strength 0: the pictures themselves; it takes a share of the steps above 0")
    a, b = (stacked([end.values]) for end in (first, second))
    more = {"images": torch.cat([a["image"], b["image"]]), "strength": args.strength} if between else {"size": frame.drawn}

    def make(batch: dict, options: dict):
        options = {key: value for key, value in options.items() if key not in ("seed", "indices")}
        found = tasks.interpolate(bundle, a or None, b or None, batch["share"].tolist(), seeds=tuple(args.seeds),
                                  way=args.way, **more, **options)  # fmt: skip
        return frame.crop(found)

    return [Row({"share": torch.tensor(share, dtype=torch.float64)}, {**first.said, "to": second.said, "shares": [share]})
            for share in args.shares], make  # fmt: skip


def animate(files: Sequence[Path], path: Path, fps: int) -> None:
    from PIL import Image

    frames = [Image.open(file).convert("RGB") for file in files]
    with atomic_write(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    print(f"moving: {path}")
