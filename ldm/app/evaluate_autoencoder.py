"""`python -m ldm evaluate autoencoder`: what an autoencoder keeps of pictures, in figures and on a sheet."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.app import png
from ldm.app.judging import (
    AMPLIFIED,
    batched,
    below,
    check_source,
    fetch,
    find_lpips,
    fitted,
    list_pictures,
    load_autoencoder,
    lpips_arguments,
    panel,
    readable,
    shared,
    trained_on,
)
from ldm.app.models import enough_memory, model_arguments, positive, precision_name
from ldm.app.png import SHEET, check_free
from ldm.common.files import UserError, atomic_write

if TYPE_CHECKING:
    from ldm.bundle import Bundle
    from ldm.metrics.reconstruction import Report

FIGURES, MOST = "metrics.json", 192  # the file in --outdir; pixels, the largest side on the sheet


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="YAML", help="config whose validation data is measured with (its training data "
                                                       "where it has none); default: the checkpoint's own")
    source.add_argument("--images", metavar="DIR", help="a folder of images instead")
    parser.add_argument("--size", type=positive, help="of --images: side of the centred square; default: as trained")
    parser.add_argument("--n", type=positive, default=2000, help="pictures at most, drawn from all by --seed (2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of which pictures are taken (0)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="B", help="pictures at a time (32)")
    parser.add_argument("--features", nargs="+", metavar=("NAME", "KEY=VALUE"),
                        help="what the Fréchet distance is taken in: random-conv, inception, or a class of your own, "
                             "package.module:Class, with its params; default: inception where its weights are, then called "
                             "rFID, else random-conv")
    lpips_arguments(parser)
    parser.add_argument("--out", metavar="JSON", help=f"write the figures to this file; default: {FIGURES} in --outdir")
    parser.add_argument("--outdir", metavar="D", help="folder for a sheet of the first and the worst pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder already")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ldm.common.team import agreed, place
    from ldm.metrics.reconstruction import measure

    with agreed():  # nobody writes before all have looked
        if args.size and not args.images:
            raise UserError("--size: belongs to --images; data sets have their own size")
        if args.images:
            check_source(Path(args.images))
        files = figures_and_sheet(args)
        check_free([file for file in files if file and args.outdir and file.parent == Path(args.outdir)], args.overwrite)
        check_free([Path(args.out)] if args.out else [], overwrite=True)
    bundle = load_autoencoder(args)
    autoencoder = bundle.autoencoder
    extractor = extractor_from(args, autoencoder.image_channels, bundle.device)
    lpips, unmeasured = find_lpips(args, autoencoder.image_channels)
    broken: dict[str, str] = {}
    source, batches = data_from(args, bundle, broken)
    tally = import_module("autoencoder.statistics").Tally()  # by name: ldm knows no concrete part of stage 1
    with enough_memory():
        bar = tqdm(batches, desc="measuring", unit="batch", disable=True if place()[0] else None)
        report = measure(autoencoder, bar, tally, extractor, lpips)
    if place()[0] > 0:
        return
    report.table["not_measured"] = {"lpips": unmeasured} if unmeasured else {}
    about = {"weights": autoencoder.content_hash(), "autoencoder": kind(autoencoder), "data": source, "seed": args.seed,
             "features": args.features, "precision": precision_name(bundle, "autoencoder"), "broken": broken}  # fmt: skip
    print("\n".join(lines(report.table, about)))
    write(report, about, *files)


def figures_and_sheet(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    folder = Path(args.outdir) if args.outdir else None
    return Path(args.out) if args.out else folder and folder / FIGURES, folder and folder / SHEET


def extractor_from(args: argparse.Namespace, channels: int, device: Any) -> Any:
    """--features, on the device."""
    from torch import nn

    from ldm.common.build import plain
    from ldm.common.config import load
    from ldm.metrics.features import Inception, default_extractor, make_extractor

    name, *pairs = args.features or ["auto"]
    if args.download and channels in (1, 3) and (name == "inception" or (name == "auto" and find_spec("torch_fidelity"))):
        fetch(Inception.URL, Inception.cached())
    found = make_extractor(name, plain(load([], pairs)), channels) if args.features else default_extractor(channels)
    return found.to(device).eval() if isinstance(found, nn.Module) else found


def data_from(args: argparse.Namespace, bundle: Bundle, broken: dict[str, str]) -> tuple[dict, Iterator[dict]]:
    """-> what the pictures are, and this process's batches of them; "position" (B,) numbers the pictures."""
    from ldm.common.build import DATA, build, plain
    from ldm.common.config import load
    from ldm.data.loader import make_loader

    if args.images:
        return images(args, bundle, broken)
    config = plain(load([args.data])) if args.data else bundle.config or {}
    data = config.get("data") or {}
    role = "validation" if data.get("validation") else "train"
    if not data.get(role):
        raise UserError(f"{args.data or args.ckpt}: names no data to measure with (data.validation or data.train); "
                        "give --images or --data")
    dataset = build(data[role], allowed=None if args.data or args.trust else DATA)
    batches = make_loader(dataset, args.batch_size, seed=args.seed, infinite=False)
    source = {"block": data[role], "role": role, "fingerprint": getattr(dataset, "fingerprint", None)}
    return source, below(batches, args.n)


def images(args: argparse.Namespace, bundle: Bundle, broken: dict[str, str]) -> tuple[dict, Iterator[dict]]:
    """Of a folder, as centred squares."""
    import torch

    from ldm.common.random import generator
    from ldm.data.transforms import prepare

    channels = bundle.autoencoder.image_channels
    paths = list_pictures(Path(args.images), channels)
    picked = torch.randperm(len(paths), generator=generator(args.seed, "pictures"))[: args.n].sort().values
    trained = trained_on(bundle)
    size, value_range = args.size or trained.get("size"), trained.get("value_range")
    if size is None:
        raise UserError(f"{args.ckpt}: does not say at what size it was trained; give --size")
    found = readable((paths[i] for i in picked), lambda path: prepare(path.read_bytes(), size, channels, value_range), broken)
    batches = ({"key": [path.name for path in names], "image": x, "position": numbers}
               for numbers, (names, x) in shared(batched(found, args.batch_size)))  # fmt: skip
    return {"images": args.images, "size": size}, batches


def kind(autoencoder: Any) -> str:
    """Its class, and that of its bottleneck."""
    bottleneck = getattr(autoencoder, "bottleneck", None)
    return type(autoencoder).__name__ + (f" ({type(bottleneck).__name__})" if bottleneck is not None else "")


def lines(table: dict, about: dict) -> list[str]:
    """The figures as they are printed."""
    latents, rate, speed = table["latents"], table["rate"], table["throughput"]
    (channels, height, width), active = table["picture"], latents["active_units"]
    distances = {name: value for name, value in table.items() if name.startswith(("rFID", "rFD-"))}
    rows = [
        ("autoencoder", f"{about['autoencoder']}, factor {latents['factor']}, latents "
                        f"{' x '.join(map(str, latents['shape']))}; weights {about['weights']}"),
        ("pictures", f"{table['pictures']:,} of {channels} x {height} x {width}, encoded without noise (the posterior's mode)"),
        ("PSNR", f"{table['psnr']:.2f} dB, mean over pictures; {table['psnr_of_mean_error']:.2f} dB of the mean squared error"),
        ("SSIM", "not measured: pictures are smaller than its window" if table["ssim"] is None else f"{table['ssim']:.4f}"),
        ("LPIPS", f"{table['lpips']:.4f} (VGG16)" if table["lpips"] is not None else
                  f"not measured: {table['not_measured'].get('lpips') or 'pictures are too small'}"),
        *((name, f"{value:.5g}" + ("" if name == "rFID" else " (no FID: other features, other units)"))
          for name, value in distances.items()),
        *rate_rows(rate),
        *([("active units", f"{active} of {latents['shape'][0]} channels")] if active is not None else []),
        ("latent mean", series(latents["mean"])),
        ("latent std", f"{series(latents['std'])}; of all, at the scale diffusion gets: {latents['overall_std']:.3f}"),
        ("stored", stored(latents)),
        ("speed", f"encode {speed['encode_per_second']:.1f}, decode {speed['decode_per_second']:.1f} pictures/s on "
                  f"{speed['device']}, {speed['batch']} at a time, {speed['threads']} thread{'s' * (speed['threads'] > 1)}"),
    ]  # fmt: skip
    return [f"{name:<{max(len(name) for name, _ in rows)}}  {value}" for name, value in rows]


def rate_rows(rate: dict | None) -> list[tuple[str, str]]:
    if rate is None:
        return [("rate", "none: the latents are real numbers without noise")]
    bits = f"{rate['bits']:,.0f} bits a picture, {rate['bits_per_pixel']:.3f} a pixel"
    if rate["kind"] == "kl":
        return [("rate", f"{bits} (KL divergence to N(0, I))")]
    return [
        ("rate", f"{bits}; entropy-coded {rate['entropy_bits']:,.0f}, {rate['entropy_bits_per_pixel']:.3f} a pixel"),
        ("codebook", f"{rate['used']:.1%} of {rate['codes']:,} entries used, perplexity {rate['perplexity']:.1f}"),
    ]


def stored(latents: dict) -> str:
    count = latents["stored"]["count"]
    if latents["as_stored"] is None:
        known = any(latents["stored"]["shift"]) or set(latents["stored"]["scale"]) != {1.0}
        return "no latent statistics: they were never measured" + ("; shift and scale as published" if known else "")
    if latents["as_stored"]:
        return f"the latent statistics of {count:,} pictures, which these agree with"
    return (f"the latent statistics of {count:,} pictures, which these do not agree with: at unit scale mean "
            f"{series(latents['unit_mean'])}, std {series(latents['unit_std'])}")


def series(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def write(report: Report, about: dict, figures: Path | None, page: Path | None) -> None:
    """The figures as JSON, and the sheet."""
    if figures is not None:
        with atomic_write(figures) as temporary:
            temporary.write_text(json.dumps({"autoencoder": report.table, "about": about}, indent=2) + "\n")
        print(f"figures in {figures}")
    if page is not None:
        import torch

        from ldm.callbacks.sheet import sheet

        pairs = {pair.number: pair for pair in [*report.first, *report.worst]}.values()
        worst = {pair.number for pair in report.worst}
        panels = [fitted([pair.original, pair.made], MOST) for pair in pairs]
        captions = [f"{pair.psnr:.1f} dB{' (one of the worst)' if pair.number in worst else ''}: {pair.name}" for pair in pairs]
        png.write(page, sheet(torch.stack([panel(x, y) for x, y in panels]), captions, columns=2), about)
        print(f"original, reconstruction and {AMPLIFIED} times their difference of {len(captions)} pictures on {page}")
