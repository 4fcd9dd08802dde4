"""What the commands that judge reconstructions have in common: pictures from files, LPIPS, and what is shown of a pair."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from ldm.app.models import load_model
from ldm.common.build import DATA, locate
from ldm.common.files import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.bundle import Bundle

log = logging.getLogger(__name__)

AMPLIFIED = 4  # times that differences are shown enlarged
LEAST = 16  # pixels, the side of the smallest picture that VGG16 halves four times
GREATEST = 2**22  # pixels: of more, VGG16's features fill gigabytes


def lpips_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lpips-weights", metavar="FILE", help="torchvision's VGG16, for LPIPS; default: torch's hub cache")
    parser.add_argument("--download", action="store_true", help="fetch weights that are not in the cache")


def find_lpips(args: argparse.Namespace, channels: int) -> tuple[Callable | None, str]:
    """-> LPIPS (2 x (B,C,H,W) -> (B,)), or None and why it is not measured. UserError where it was asked for in vain."""
    import torch

    critics = import_module("autoencoder.critics")  # by name: ldm knows no concrete part of stage 1
    if channels not in (1, 3):
        return None, f"it sees 3 channels or 1, these pictures have {channels}"
    if args.lpips_weights and not Path(args.lpips_weights).is_file():
        raise UserError(f"--lpips-weights {args.lpips_weights}: no such file; expected torchvision's VGG16 ({critics.VGG})")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(critics.VGG).name
    if not (args.lpips_weights or args.download or cached.is_file()):
        return None, (f"weights not found: there is no {cached}; --download fetches it (528 MB), --lpips-weights FILE "
                      "says where it is")
    if not args.lpips_weights:
        fetch(critics.VGG, cached)
    judge = critics.Lpips(args.lpips_weights or str(cached))
    return (lambda x, y: judge(x, y) if min(x.shape[2:]) >= LEAST and x[0, 0].numel() <= GREATEST else None), ""


def fetch(url: str, file: Path) -> None:
    """Download a file whose name ends in the beginning of its SHA-256, whole or not at all, unless it is there."""
    import torch

    if file.is_file():
        return
    log.info("downloading %s to %s", url, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.split("-")[-1], progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(f"{url}: {error}; put the file at {file} by hand") from error


def load_autoencoder(args: argparse.Namespace) -> Bundle:
    """The model of model_arguments, whose autoencoder is what is used: --precision is its."""
    args.autoencoder_precision = args.autoencoder_precision or args.precision
    return load_model(args, draws=False)


def check_source(source: Path) -> None:
    """UserError where there is no such file or folder; before a model is loaded for nothing."""
    from ldm.data.folder import no_folder

    if not source.exists():
        raise UserError(no_folder(source))


def list_pictures(source: Path, channels: int) -> list[Path]:
    """A file itself, or the pictures of so many channels in a folder and below, by their names. UserError where there is
    none."""
    from ldm.data.folder import list_files

    return [source] if source.is_file() else [source / name for name in list_files(source, channels)[0]]


def trained_on(bundle: Bundle) -> dict:
    """What is known of the pictures that the model was trained on: "size" and "value_range", where it says so."""
    block = ((bundle.config or {}).get("data") or {}).get("train") or {}
    train = block.get("params") or {}
    size = bundle.sampling.get("size") or [train.get("size")]
    if size[0] is None and str(block.get("target")).startswith(DATA):  # a class of one size says which
        size = [getattr(locate(block["target"]), "size", None)]
    return {"size": size[0], "value_range": train.get("value_range")}


def readable(paths: Iterable[Path], read: Callable[[Path], Tensor], broken: dict[str, str]) -> Iterator[tuple[Path, Tensor]]:
    """Pictures one after the other. Files that are none are told in a line each, and noted in `broken`."""
    from ldm.data.transforms import BrokenImage

    for path in paths:
        try:
            yield path, read(path)
        except BrokenImage as error:
            log.warning("%s: left out: %s", path, error)
            broken[str(path)] = str(error)


def batched(pictures: Iterable[tuple[Path, Tensor]], size: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Neighbours of the same shape together, at most `size` of them: their paths, and (B,C,H,W)."""
    import torch

    held: list[tuple[Path, Tensor]] = []

    def stacked() -> tuple[list[Path], Tensor]:
        return [path for path, _ in held], torch.stack([picture for _, picture in held])

    for path, picture in pictures:
        if held and (len(held) == size or held[0][1].shape != picture.shape):
            yield stacked()
            held = []
        held.append((path, picture))
    if held:
        yield stacked()


def shared(batches: Iterable[tuple[list[Path], Tensor]]) -> Iterator[tuple[Tensor, tuple[list[Path], Tensor]]]:
    """Those of these batches that are this process's share, each with the numbers of its pictures."""
    import torch

    from ldm.common.team import place

    (rank, world), seen = place(), 0
    for k, (names, x) in enumerate(batches):
        if k % world == rank:
            yield torch.arange(seen, seen + len(names)), (names, x)
        seen += len(names)


def below(batches: Iterable[dict], n: int) -> Iterator[dict]:
    """The items of batches {"image": (B,C,H,W), "position": (B,) growing, ...} whose position is below n."""
    for batch in batches:
        left = int((batch["position"] < n).sum())
        if not left:
            return
        yield {name: values[:left] for name, values in batch.items()}


def panel(x: Tensor, y: Tensor) -> Tensor:  # (C,H,W) in [-1,1] twice -> (C,H,3W)
    """Original, reconstruction, and four times their difference around grey; opaque where the picture is not."""
    import torch

    difference = (AMPLIFIED * (y - x)).clamp(-1, 1)
    if len(x) == 4:
        difference[3] = 1.0
    return torch.cat([x, y, difference], dim=2)


def fitted(pictures: Sequence[Tensor], most: int) -> Tensor:  # (C,H,W) each -> (N,C,h,w)
    """Of one size, on white, with no side above `most`: large ones are shrunk, small ones enlarged by a whole number."""
    import torch
    from torch.nn.functional import interpolate, pad

    fits = []
    for picture in pictures:
        share = most / max(picture.shape[1:])
        size = [max(1, round(side * share)) for side in picture.shape[1:]]
        fits.append(picture.repeat_interleave(int(share), 1).repeat_interleave(int(share), 2) if share >= 1 else
                    interpolate(picture[None], size, mode="bilinear", antialias=True)[0])  # fmt: skip
    height, width = (max(picture.shape[axis] for picture in fits) for axis in (1, 2))
    return torch.stack([pad(p, (0, width - p.shape[2], 0, height - p.shape[1]), value=1.0) for p in fits])

