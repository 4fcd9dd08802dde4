"""Pictures through an autoencoder and back, beside the originals, with what was lost in figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.app import png
from ldm.app.judging import (
    AMPLIFIED,
    batched,
    check_source,
    find_lpips,
    fitted,
    list_pictures,
    load_autoencoder,
    lpips_arguments,
    panel,
    readable,
    trained_on,
)
from ldm.app.models import enough_memory, model_arguments, positive, precision_name
from ldm.app.png import SHEET, SHOWN, check_free
from ldm.common.files import UserError, atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from autoencoder.base import Autoencoder
    from ldm.bundle import Bundle

SUMMARY = "Encode and decode pictures; writes each beside its reconstruction, and what was lost."
FIGURES, MOST = "metrics.json", 256  # pixels, the largest side of a picture on the sheet
COLUMNS = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}"}


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder of images, or one image")
    parser.add_argument("--outdir", required=True, metavar="D",
                        help=f"folder for 00000.png, 00001.png ... (original, reconstruction, {AMPLIFIED} times their "
                             f"difference), {FIGURES} and a sheet")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=positive, metavar="PIXELS",
                      help="take the centred square, at this side; default: as trained, or else --whole")
    size.add_argument("--whole", action="store_true", help="take images as they are, at their own size and shape")
    parser.add_argument("--n", type=positive, default=16, help="images at most, in the order of their names (16)")
    parser.add_argument("--tile", type=positive, metavar="PIXELS",
                        help="work in tiles of this side: bounds the memory that large images take")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="B", help="images of one size at a time (1)")
    lpips_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are in the folder already")


def run(args: argparse.Namespace) -> None:
    import torch

    from ldm.callbacks.sheet import sheet, to_image
    from ldm.metrics.reconstruction import compare

    source, folder = Path(args.images), Path(args.outdir)
    check_source(source)
    check_free([folder / SHEET, folder / FIGURES], args.overwrite)
    bundle = load_autoencoder(args)
    autoencoder, weights, broken = bundle.autoencoder, bundle.autoencoder.content_hash(), {}
    paths = list_pictures(source, autoencoder.image_channels)[: args.n]
    files = {path: folder / f"{i:05d}.png" for i, path in enumerate(paths)}
    check_free(list(files.values()), args.overwrite)
    lpips, unmeasured = find_lpips(args, autoencoder.image_channels)
    through = reconstructor(autoencoder, args.tile)
    rows, shown = [], []
    for names, x in batched(readable(paths, reader(args, bundle), broken), args.batch_size):
        with torch.no_grad(), enough_memory():
            y = through(x.to(bundle.device)).clamp(-1, 1).cpu()
            found = compare(x, y, lpips)
        for i, path in enumerate(names):
            own = {name: values[i].item() for name, values in found.items()}
            rows.append({"image": str(path), "size": list(x.shape[2:]), **own})
            print(line(path.name, own), flush=True)
            picture = panel(x[i], y[i])
            png.write(files[path], to_image(picture), {**rows[-1], "weights": weights})
            if len(shown) < SHOWN:
                shown.append(panel(*fitted([x[i], y[i]], MOST)))
    if not rows:
        raise UserError(f"{args.images}: none of {len(paths)} pictures can be read; the first: {next(iter(broken.values()))}")
    total = mean(rows)
    about = {"mean": total, "pictures": rows, "not_measured": {"lpips": unmeasured} if unmeasured else {}, "broken": broken,
             "weights": weights, "precision": precision_name(bundle, "autoencoder"), "tile": args.tile}  # fmt: skip
    with atomic_write(folder / FIGURES) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")
    captions = [line(Path(row["image"]).name, row) for row in rows[:SHOWN]]
    png.write(folder / SHEET, sheet(fitted(shown, 3 * MOST), captions), {"mean": total, "weights": weights})
    print(line(f"mean of {len(rows)}", total))
    if unmeasured:
        print(f"LPIPS not measured: {unmeasured}")
    print(f"{len(rows)} picture{'s' * (len(rows) > 1)} in {folder}, with {FIGURES} and {SHEET}")


def reader(args: argparse.Namespace, bundle: Bundle) -> Callable[[Path], Tensor]:
    """-> path -> (C,H,W): the centred square of --size or as trained, or else the whole picture."""
    from ldm.data.transforms import prepare, whole

    trained, channels = trained_on(bundle), bundle.autoencoder.image_channels
    size = None if args.whole else args.size or trained["size"]
    if size is None:
        return lambda path: whole(path.read_bytes(), channels, trained["value_range"])
    factor = bundle.autoencoder.factor
    if size % factor:
        low = size // factor * factor
        near = " or ".join(str(side) for side in (low, low + factor) if side)
        raise UserError(f"--size {size}: no multiple of the autoencoder's factor {factor}; take {near}")
    return lambda path: prepare(path.read_bytes(), size, channels, trained["value_range"])


def reconstructor(autoencoder: Autoencoder, tile: int | None) -> Callable[[Tensor], Tensor]:
    """-> pictures (B,C,H,W) of any sides -> what the autoencoder makes of them. Sides are filled up to its factor with the
    last row and column, which are cut off again."""
    from torch.nn.functional import pad

    def through(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        filled = pad(x, (0, -width % autoencoder.factor, 0, -height % autoencoder.factor), mode="replicate")
        return autoencoder.decode(autoencoder.encode(filled, tile=tile), tile=tile)[:, :, :height, :width]

    return through


def mean(rows: list[dict]) -> dict[str, float]:
    """Of each figure over the pictures that have it, and the PSNR of the mean squared error."""
    import torch

    from ldm.metrics.pictures import psnr

    found = {}
    for name in ("mse", *COLUMNS):
        values = [row[name] for row in rows if name in row]
        found |= {name: sum(values) / len(values)} if values else {}
    return found | {"psnr_of_mean_error": psnr(torch.tensor(found["mse"])).item()}


def line(name: str, figures: dict[str, float]) -> str:
    return f"{name}: {', '.join(text.format(figures[key]) for key, text in COLUMNS.items() if key in figures)}"
