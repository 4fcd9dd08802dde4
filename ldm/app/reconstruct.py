"""Pictures through an autoencoder and back, beside the originals."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.app import png
from ldm.app.models import enough_memory, load_model, model_arguments, positive
from ldm.app.txt2img import SHEET, check_free
from ldm.common.files import UserError

SUMMARY = "Encode and decode pictures; writes each original beside its reconstruction."


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder of images, or one image")
    parser.add_argument("--outdir", required=True, metavar="D", help="folder for 00000.png, 00001.png ... and a sheet")
    parser.add_argument("--size", type=positive, help="side that images get; default: as trained, or the first's own")
    parser.add_argument("--n", type=positive, default=16, help="images at most, in the order of their names (16)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are in the folder already")


def run(args: argparse.Namespace) -> None:
    import torch

    from ldm.callbacks.sheet import sheet, to_image
    from ldm.data.folder import list_files
    from ldm.data.transforms import prepare

    source, folder = Path(args.images), Path(args.outdir)
    paths = [source] if source.is_file() else [source / name for name in list_files(source)[0]]
    paths = paths[: args.n]
    files = [folder / f"{i:05d}.png" for i in range(len(paths))]
    check_free([*files, folder / SHEET], args.overwrite)
    autoencoder = load_model(args, draws=False).autoencoder
    size = args.size or trained_size(args.ckpt) or own_size(paths[0], autoencoder.factor)
    pairs, captions = [], []
    for path, file in zip(paths, files, strict=True):
        with named(path):
            x = prepare(path.read_bytes(), size, autoencoder.image_channels)[None]
        with torch.no_grad(), enough_memory():
            y = autoencoder.decode(autoencoder.encode(x.to(autoencoder.shift.device))).clamp(-1, 1).cpu()
        psnr = float(10 * torch.log10(4 / (x - y).square().mean().clamp(min=1e-10)))
        pairs.append(torch.cat([x, y], dim=3)[0])
        captions.append(f"{path.name}: {psnr:.1f} dB")
        png.write(file, to_image(pairs[-1]), {"image": path.name, "psnr": psnr, "size": [size, size]})
        print(captions[-1])
    png.write(folder / SHEET, sheet(torch.stack(pairs), captions), {"images": [path.name for path in paths]})
    print(f"{len(files)} pairs in {folder}, all on {folder / SHEET}")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """A broken picture is told with its name."""
    from ldm.data.transforms import BrokenImage

    try:
        yield
    except BrokenImage as error:
        raise UserError(f"{path}: {error}") from error


def own_size(path: Path, factor: int) -> int:
    """The smaller side of a picture, as far as the autoencoder divides it."""
    from ldm.data.transforms import decode

    with named(path):
        return max(factor, min(decode(path.read_bytes()).size) // factor * factor)


def trained_size(checkpoint: str) -> int | None:
    from ldm.load import read

    about = read(checkpoint).about
    size = (about.get("sampling") or {}).get("size")
    train = ((about["config"].get("data") or {}).get("train") or {}).get("params") or {}
    return size[0] if size else train.get("size")
