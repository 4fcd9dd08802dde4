"""What a picture or a checkpoint says of itself, as JSON; and how two checkpoints differ."""

from __future__ import annotations

import argparse
import json
from collections import Counter

from ldm.common.files import UserError

SUMMARY = "Show how a picture was made, what is in a checkpoint, or how two differ."
NAMED = 10  # differences that are shown of a part


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="IMAGE_OR_CKPT", help="a PNG of ours, a checkpoint, or a run folder")
    parser.add_argument("--compare", metavar="CKPT", help="instead: hold all that is in two checkpoints side by side, to the "
                                                          "bit; exit status 1 where something differs")


def run(args: argparse.Namespace) -> int | None:
    from ldm.app import png

    if args.compare is not None:
        return compare(args.path, args.compare)
    about = png.read(args.path) if png.is_png(args.path) else about_checkpoint(args.path)
    print(json.dumps(about, indent=2, ensure_ascii=False))


def compare(one: str, other: str) -> int:
    """Prints what differs, part by part (weights, optimizers ...) -> 1 if anything does, else 0."""
    from ldm.common.equal import differences, leaves

    first, second = everything(one), everything(other)
    found = differences(first, second)
    numbers = Counter(path.split(".")[0] for path in {**dict(leaves(first)), **dict(leaves(second))})
    for part, count in numbers.items():
        here = {path: said for path, said in found.items() if path.split(".")[0] == part}
        print(f"{part}: {count - len(here):,} of {count:,} the same")
        for path, said in list(here.items())[:NAMED]:
            print(f"  {path}: {said}")
        if len(here) > NAMED:
            print(f"  and {len(here) - NAMED:,} more")
    print("the same, to the bit" if not found else f"{len(found):,} of {numbers.total():,} values differ")
    return 1 if found else 0


def everything(path: str) -> dict:
    """In a checkpoint, mapped into memory."""
    import torch

    from ldm.load import read

    found = read(path)  # a file that is none ends here, in a line
    if found.path.suffix == ".safetensors":
        return {"state_dict": found.tensors}
    try:
        return torch.load(found.path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever torch runs into in a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged, or not written by this program: {reason}") from error


def about_checkpoint(path: str) -> dict:
    """The model is not built, nor its code imported."""
    from ldm.common.files import digest
    from ldm.common.weights import content
    from ldm.load import read

    found = read(path)
    weights = found.weights(ema=True)
    numbers: Counter = Counter()
    for key, value in weights.items():
        numbers[key.split(".")[0]] += value.numel()
    about = dict(found.about)
    config = about.pop("config")
    return {
        "file": str(found.path),
        "bytes": found.path.stat().st_size,
        "step": found.step,
        "model": digest({key: content(value) for key, value in weights.items()}),
        "weights": "averaged (EMA) and raw" if found.has_ema else "one set",
        "numbers": dict(numbers),
        "latents": latents(weights),
        "sampling": about.pop("sampling", None) or config.get("sampling"),
        **about,
        "config": config,
    }


def latents(weights: dict) -> dict | None:
    """The statistics that the autoencoder carries: mean and deviation per channel, over how many images of which data."""
    names = ("shift", "scale", "statistics_count")
    if not all(f"autoencoder.{name}" in weights for name in names):
        return None
    shift, scale, count = (weights[f"autoencoder.{name}"].tolist() for name in names)
    data = weights.get("autoencoder.statistics_data")
    known = data is not None and bool(data.any())
    return {"mean": shift, "std": scale, "images": count, "data": bytes(data.tolist()).hex() if known else None}
