"""Data sets: made, and looked at before they are trained on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.app.models import positive
from ldm.common.files import UserError, nearest

if TYPE_CHECKING:
    from torch.utils.data import Dataset

SUMMARY = "Make a data set, or check one."
YAML = (".yaml", ".yml")
LISTED = 5  # captions that are cut


def arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(metavar="TASK", required=True)
    emoji = tasks.add_parser("emoji", help="draw the emoji of an installed font into WebDataset shards")
    emoji.add_argument("--out", required=True, metavar="DIR")
    emoji.add_argument("--font", metavar="F", help="NotoColorEmoji.ttf; default: where systems install it")
    emoji.add_argument("--overwrite", action="store_true", help="replace shards that are there already")
    emoji.set_defaults(task=make_emoji)
    check = tasks.add_parser("check", help="report what is in the data of a config, in a folder, or in shards")
    check.add_argument("source", metavar="CONFIG_OR_FOLDER", help="a yaml, a folder of images, or .tar shards")
    check.add_argument("--size", type=positive, default=64, help="side of the pictures, for folders and shards (64)")
    check.add_argument("--channels", type=positive, default=3, metavar="C",
                       help="of the pictures, for folders and shards: 1 grey, 3 RGB, 4 RGBA; any number of arrays (3)")
    check.set_defaults(task=check_data)


def run(args: argparse.Namespace) -> None:
    args.task(args)


def make_emoji(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ldm.data.emoji import make

    there = sorted(Path(args.out).glob("*.tar"))
    if there and not args.overwrite:
        raise UserError(f"{there[0]}: is there already; give another --out, or --overwrite to replace it")
    font = None if args.font is None else Path(args.font)
    if font and not font.is_file():
        raise UserError(f"--font {font}: no such file")
    with tqdm(desc="emoji", unit="picture", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = make(Path(args.out), font, progress)
    print(report)


def check_data(args: argparse.Namespace) -> None:
    source = Path(args.source)
    if source.suffix in YAML:
        check_config(source)
    elif source.is_dir() and not any(source.glob("*.tar")):
        from ldm.data.folder import ImageFolder

        print(ImageFolder(str(source), args.size, channels=args.channels, empty_ok=True).report())
    elif source.is_dir() or ".tar" in source.name:
        from ldm.data.webdataset import WebDataset

        print(WebDataset(str(source), args.size, channels=args.channels, empty_ok=True).report())
    else:
        names = [entry.name for entry in source.parent.iterdir()] if source.parent.is_dir() else []
        near = nearest(source.name, names)
        hint = f"; nearest: {source.parent / near}" if near else ""
        raise UserError(f"{source}: expected a .yaml, a folder, or .tar shards{hint}")


def check_config(path: Path) -> None:
    """Reports on the data sets of a config, and which captions are longer than its text encoder reads."""
    from ldm.common.build import build, check, is_block, plain
    from ldm.common.config import load

    config = plain(load([path]))
    blocks = {f"data.{role}": block for role, block in (config.get("data") or {}).items() if block is not None}
    if "data.train" not in blocks:
        raise UserError(f"{path}: data.train: missing; it is a block (target, params) that makes a data set")
    mistakes = [mistake for name, block in blocks.items() for mistake in check(block, name)]
    if mistakes:
        raise UserError(f"{path}: {'; '.join(mistakes)}")
    conditioner = ((config.get("model") or {}).get("params") or {}).get("conditioner")
    conditioner = build(conditioner) if is_block(conditioner) else None
    for name, block in blocks.items():
        dataset = build(block)
        print("\n".join([f"{name}:", *cut_captions(dataset, conditioner), dataset.report()]))


def cut_captions(dataset: Dataset, conditioner: object) -> Iterator[str]:
    """Lines about the captions that do not fit into the encoder's window."""
    if not hasattr(conditioner, "dropped_words"):
        return
    captions = list(dict.fromkeys(dataset.caption(i) for i in range(len(dataset))))
    cut = [(text, words) for text, words in zip(captions, conditioner.dropped_words(captions), strict=True) if words]
    yield (f"{len(cut):,} of {len(captions):,} different captions ({len(cut) / len(captions):.1%}) are cut at the "
           f"{conditioner.max_length} tokens that the text encoder reads" + ":" * bool(cut))
    for text, words in cut[:LISTED]:
        yield f"  {text[:60]!r} ... not read: {words[:60]!r}"
