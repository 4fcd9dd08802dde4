"""Pictures from prompts, as numbered PNG files that tell how they were made."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.app import png
from ldm.app.models import (
    enough_memory,
    load_model,
    model_arguments,
    positive,
    precision_name,
    sampling_arguments,
    sampling_of,
)
from ldm.common.files import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.bundle import Bundle
    from ldm.parameterization import Prediction

log = logging.getLogger(__name__)

SUMMARY = "Draw pictures from prompts."
READING = ("prompt_weights", "long")
SHEET, SHOWN = "sheet.png", 64  # the contact sheet, and how many pictures it shows at most
PREVIEW = "preview.png"  # the batch that is being drawn


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts, each in quotes")
    source.add_argument("--prompts-file", metavar="F", help="a text file (UTF-8) with a prompt on each line")
    source.add_argument("--from-image", metavar="PNG", help="draw this picture again; other arguments change it")
    parser.add_argument("--outdir", required=True, metavar="D", help="folder for 00000.png, 00001.png ...")
    parser.add_argument("--n-samples", type=positive, default=1, metavar="N", help="pictures of each prompt (1)")
    sampling_arguments(parser)
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--prompt-weights", action=argparse.BooleanOptionalAction, default=None,
                        help="prompts have weights in them: (more), [less], (word:1.3); default: as stored with the model")
    parser.add_argument("--long", choices=("cut", "error", "window"), default=None,
                        help="of prompts that are longer than the text encoder reads at once: leave the rest out, refuse "
                             "them, or read all in several windows; default: as stored with the model")
    parser.add_argument("--seed", type=int, metavar="K", help="of the first picture; the next has K + 1 (0)")
    parser.add_argument("--height", type=positive, metavar="H", help="pixels; default: as stored with the model")
    parser.add_argument("--width", type=positive, metavar="W")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="B",
                        help="pictures at a time (1: each is the same to the last bit, whatever else is drawn; more: "
                             "faster, and the same up to rounding)")
    parser.add_argument("--tile", type=positive, metavar="PIXELS",
                        help="decode large pictures by tiles of that side, with less memory (256); default: at once")
    parser.add_argument("--preview", type=positive, metavar="N",
                        help=f"every N steps write {PREVIEW} to the folder: what the network believes of the pictures by then")
    parser.add_argument("--no-metadata", action="store_true", help="keep prompts and settings out of the files")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are in the folder already")


@dataclass(frozen=True)
class Order:
    """What is to be drawn. Settings that are None are the model's."""

    prompts: list[str]
    samples: int  # pictures of each prompt
    seed: int  # of the first picture
    negative: str | None
    size: list[int] | None  # height, width
    settings: dict  # of Bundle.plan
    reading: dict  # how prompts are read, of Bundle.generate: prompt_weights, long


def run(args: argparse.Namespace) -> None:
    order = order_from(args)
    folder = Path(args.outdir)
    files = [folder / f"{i:05d}.png" for i in range(len(order.prompts) * order.samples)]
    beside = [folder / SHEET] * (len(files) > 1) + [folder / PREVIEW] * bool(args.preview)
    check_free([*files, *beside], args.overwrite)
    if args.from_image:
        old = png.read(args.from_image)
        for name in ("precision", "autoencoder_precision", "tile"):
            if getattr(args, name) is None:
                setattr(args, name, old.get(name))
        args.lora = args.lora or old.get("lora") or []
    bundle = load_model(args)
    facts = facts_of(bundle, args.batch_size, args.tile) | ({"lora": args.lora} if args.lora else {})
    if args.from_image:
        warn_of_differences(args.from_image, facts)
    with enough_memory():
        draw(bundle, order, files, args.batch_size, args.tile, None if args.no_metadata else facts, args.preview)
    print(f"{len(files)} picture{'s' * (len(files) > 1)} in {folder}")
    if len(files) > 1:
        print(f"{'all' if len(files) <= SHOWN else f'the first {SHOWN}'} on {folder / SHEET}")


def order_from(args: argparse.Namespace) -> Order:
    """The arguments, over those of a picture where one is given. UserError for what cannot be."""
    if (args.height is None) != (args.width is None):
        raise UserError("--height and --width: give both or neither")
    settings, old = sampling_of(args), {}
    if args.from_image:
        old = png.read(args.from_image)
        if not isinstance(old.get("prompt"), str):
            raise UserError(f"{args.from_image}: its metadata names no prompt; was it made by txt2img?")
        guidance = old.get("guidance") or {"scale": old.get("scale"), "low": None, "high": None, "rescale": None}
        if args.times and not args.steps and isinstance(settings["times"], list):
            old.pop("steps", None)  # the list says how many
        settings = {key: old.get(key) if value is None else value for key, value in settings.items()}
        settings["guidance"] = guidance | (sampling_of(args)["guidance"] or {})
    return Order(
        prompts=[old["prompt"]] if old else args.prompt or read_prompts(args.prompts_file),
        samples=args.n_samples,
        seed=old.get("seed", 0) if args.seed is None else args.seed,
        negative=old.get("negative_prompt") if args.negative_prompt is None else args.negative_prompt,
        size=[args.height, args.width] if args.height else old.get("size"),
        settings=settings,
        reading={name: old.get(name) if getattr(args, name) is None else getattr(args, name) for name in READING},
    )


def read_prompts(name: str) -> list[str]:
    """The lines of a UTF-8 file, without the empty ones."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--prompts-file {name}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file {name}: not UTF-8 (at byte {error.start}); save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {name}: no prompt in it; one is expected on each line")
    return prompts


def check_free(files: list[Path], overwrite: bool) -> None:
    """UserError where a file would be lost, or cannot be written; before there is anything to write."""
    for file in files:
        standing = next(place for place in file.absolute().parents if place.exists())
        if not standing.is_dir():
            raise UserError(f"{standing}: is a file; expected a folder for what is written, or the name of a new one")
        if not os.access(standing, os.W_OK):
            raise UserError(f"{standing}: nothing can be written here; give another folder")
        if file.is_dir():
            raise UserError(f"{file}: is a folder; expected the name of a file")
    taken = [file for file in files if file.exists()]
    if taken and not overwrite:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise UserError(f"{taken[0]}: is there already{more}; give another --outdir, or --overwrite to replace it")


def facts_of(bundle: Bundle, batch_size: int, tile: int | None) -> dict:
    """What the pixels depend on beside the order."""
    from ldm.bundle import versions

    return {"model": bundle.content_hash(), "precision": precision_name(bundle),
            "autoencoder_precision": precision_name(bundle, "autoencoder"), "batch_size": batch_size, "tile": tile,
            "versions": versions()}  # fmt: skip


def warn_of_differences(image: str, facts: dict) -> None:
    """What keeps a picture from being drawn again exactly."""
    old = png.read(image)
    for key, value in facts.items():
        if key in old and old[key] != value:
            log.warning("%s was made with %s %s, now it is %s: the picture may differ", image, key, old[key], value)


def draw(bundle: Bundle, order: Order, files: list[Path], batch_size: int, tile: int | None, facts: dict | None,
         preview: int | None = None) -> None:
    """Writes the pictures, each file as soon as it is drawn, and a sheet of them all. facts: goes into the files; preview: how
    many steps a look at the unfinished ones is worth."""
    import torch
    from tqdm import tqdm

    from ldm.callbacks.sheet import sheet, to_image

    prompts = [prompt for prompt in order.prompts for _ in range(order.samples)]
    chosen = bundle.plan(**order.settings)
    guidance = chosen["guidance"]
    more = any(value is not None for part, value in guidance.items() if part != "scale")
    about = {"negative_prompt": order.negative, "sampler": chosen["sampler"], "steps": chosen["steps"],
             "times": chosen["times"], "scale": guidance["scale"], **({"guidance": guidance} if more else {}),
             "size": order.size or bundle.sampling.get("size"), **(facts or {}),
             **{name: value for name, value in order.reading.items() if value is not None}}  # fmt: skip
    shown, folder = [], files[0].parent
    batches = [range(len(files))[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with tqdm(total=len(batches) * chosen["steps"], desc="drawing", unit="step", disable=None) as bar:
        def look(step: int, t: float, x: Tensor, guess: Prediction) -> None:
            bar.update()
            if preview and step % preview == 0:
                png.write(folder / PREVIEW, sheet(bundle.preview(guess, tile).cpu(), [f"step {step}"] * len(x)), None)

        for batch in batches:
            pictures = bundle.generate([prompts[i] for i in batch], seed=order.seed, indices=batch, size=order.size,
                                       negative_prompt=order.negative, callback=look, tile=tile, **order.reading, **chosen)
            for i, picture in zip(batch, pictures.cpu(), strict=True):
                own = {"prompt": prompts[i], "seed": order.seed + i, **about}
                png.write(files[i], to_image(picture), own if facts else None)
                shown += [picture] if i < SHOWN else []
    if len(files) > 1:
        columns = order.samples if 1 < order.samples < len(files) else None
        page = sheet(torch.stack(shown), prompts[:SHOWN], columns)
        own = {"prompts": prompts[:SHOWN], "seed": order.seed, **about}
        png.write(folder / SHEET, page, own if facts else None)
