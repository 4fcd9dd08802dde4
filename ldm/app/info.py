"""What a picture or a checkpoint says of itself, as JSON."""

from __future__ import annotations

import argparse
import json
from collections import Counter

SUMMARY = "Show how a picture was made, or what is in a checkpoint."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="IMAGE_OR_CKPT", help="a PNG of ours, a checkpoint, or a run folder")


def run(args: argparse.Namespace) -> None:
    from ldm.app import png

    about = png.read(args.path) if png.is_png(args.path) else about_checkpoint(args.path)
    print(json.dumps(about, indent=2, ensure_ascii=False))


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
