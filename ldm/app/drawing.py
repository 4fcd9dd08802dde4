"""What the commands that draw have in common: arguments, numbered files that tell how they were made, a sheet, previews.

A command is a Task. ``carry_out`` reads its arguments (over those in the metadata of --from-image), refuses what cannot be
before anything is written, and draws batch by batch; each file is there as soon as it is drawn. Several processes draw
the same files as one: each takes its turn at the batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.app import conditions, png
from ldm.app.again import READING, about_of, facts_of, merged, recalled, warn_of_differences
from ldm.app.models import (
    enough_memory,
    load_model,
    model_arguments,
    positive,
    sampling_arguments,
    sampling_of,
)
from ldm.app.png import SHEET, SHOWN, check_free
from ldm.app.reading import Row, read, stacked
from ldm.common.files import UserError
from ldm.common.team import agreed, collected, place

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want
    from ldm.parameterization import Prediction
    from ldm.tasks import Frame

SHARED = True  # several processes each draw a part
PREVIEW, SMALL = "preview.png", 256  # the batch that is being drawn; pixels, the largest side of its pictures there
Make = Callable[[dict, dict], "Tensor"]  # (rows of a batch, options of Bundle.generate) -> pictures


@dataclass(frozen=True)
class Task:
    """A command that draws.

    name: in the metadata of what it draws; "": drawn from conditions alone.
    plan: (args, bundle, rows of conditions, frame) -> a row for each picture, and what makes pictures of a batch of these.
    wants: (args, bundle) -> conditions that it reads itself.
    count: (args, number of rows of conditions) -> pictures.
    options: arguments of its own that pixels depend on, by their names, with defaults.
    walks: (args, steps) -> steps of the network for one batch, as far as a progress bar shows them.
    text: prompts are needed where the model reads any.
    """

    name: str
    plan: Callable[[argparse.Namespace, Bundle, list[Row], Frame], tuple[list[Row], Make]]
    wants: Callable[[argparse.Namespace, Bundle], Sequence[Want]] = lambda args, bundle: ()
    count: Callable[[argparse.Namespace, int], int] = lambda args, n: n * args.n_samples
    options: dict[str, Any] = field(default_factory=dict)
    walks: Callable[[argparse.Namespace, int], int] = lambda args, steps: steps
    text: bool = False


def arguments(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    """samples: there may be several pictures of one condition."""
    model_arguments(parser)
    conditions.arguments(parser)
    parser.add_argument("--from-image", metavar="PNG", help="draw this picture again; other arguments change it")
    parser.add_argument("--outdir", required=True, metavar="D", help="folder for 00000.png, 00001.png ...")
    if samples:
        parser.add_argument("--n-samples", type=positive, default=1, metavar="N", help="pictures of each condition (1)")
    sampling_arguments(parser)
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--also", nargs="+", metavar="TEXT[:W]",
                        help="further prompts that guide all pictures at the same time, each with its weight (1), below 0 away "
                             "from it; classes, of models that read no text")
    parser.add_argument("--prompt-weights", action=argparse.BooleanOptionalAction, default=None,
                        help="prompts have weights in them: (more), [less], (word:1.3); default: as stored with the model")
    parser.add_argument("--long", choices=("cut", "error", "window"), default=None,
                        help="of prompts that are longer than the text encoder reads at once: leave the rest out, refuse "
                             "them, or read all in several windows; default: as stored with the model")
    parser.add_argument("--classifier", metavar="CKPT", help="a classifier of noisy latents that guides towards --class")
    parser.add_argument("--classifier-scale", type=float, metavar="S", help="factor of its gradient (1)")
    parser.add_argument("--seed", type=int, metavar="K", help="of the first picture; the next has K + 1 (0)")
    parser.add_argument("--height", type=positive, metavar="H",
                        help="pixels; pictures that are given are cut in their middle and resized to that; default: as they "
                             "are, or as stored with the model")
    parser.add_argument("--width", type=positive, metavar="W")
    parser.add_argument("--fit", choices=("error", "pad"), default=None,
                        help="of sizes that the model cannot draw: refuse them, naming the nearest (error), or draw the next "
                             "larger one and cut out its middle (pad)")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="B",
                        help="pictures at a time (1: each is the same to the last bit, whatever else is drawn; more: "
                             "faster, and the same up to rounding)")
    parser.add_argument("--tile", type=positive, metavar="PIXELS",
                        help="encode and decode large pictures by tiles of that side, with less memory (256); default: at once")
    parser.add_argument("--window", type=positive, metavar="PIXELS",
                        help="the network sees large pictures through overlapping windows of that side; default: at once")
    parser.add_argument("--preview", "--preview-every", type=positive, metavar="N",
                        help=f"every N steps write {PREVIEW} to the folder: what the network believes of the pictures by then")
    parser.add_argument("--no-metadata", action="store_true", help="keep prompts and settings out of the files")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are in the folder already")


def carry_out(args: argparse.Namespace, task: Task, bundle: Bundle | None = None) -> list[Path]:
    """-> the files that were drawn. bundle: the model, where it is loaded already. Several processes have to call together."""
    with agreed():  # nobody writes before all have looked
        files, drawn = prepare(args, task, bundle)
    with enough_memory():
        drawn()
    if place()[0] == 0:
        print(f"{len(files)} picture{'s' * (len(files) > 1)} in {files[0].parent}")
        if len(files) > 1:
            print(f"{'all' if len(files) <= SHOWN else f'the first {SHOWN}'} on {files[0].parent / SHEET}")
    return files


def prepare(args: argparse.Namespace, task: Task, bundle: Bundle | None) -> tuple[list[Path], Callable[[], None]]:
    """-> the files that are asked for, and what draws them. Nothing is written. UserError for what cannot be."""
    if (args.height is None) != (args.width is None):
        raise UserError("--height and --width: give both or neither")
    settings, old = sampling_of(args), recalled(args, task)
    given = conditions.asked(args, old)
    conditions.check_files(given)
    settings = merged(args, settings, old)
    n = max(map(len, given.values()), default=1)
    folder = Path(args.outdir)
    files = [folder / f"{i:05d}.png" for i in range(task.count(args, n))]
    extra = [folder / SHEET] * (len(files) > 1) + [folder / PREVIEW] * bool(args.preview)
    check_free([*files, *extra], args.overwrite)
    bundle = bundle or load_model(args)
    wants = conditions.wanted(bundle, [*task.wants(args, bundle), *guiding(args)], given, task.text)
    if "caption" in wants:
        given.setdefault("caption", [""])
    elif args.negative_prompt is not None:
        raise UserError("--negative-prompt: this model reads no text")
    size = [args.height, args.width] if args.height else None
    rows, frame = read(bundle, wants, given, size, args.fit or "error", getattr(args, "expand", None) or (0, 0, 0, 0))
    rows, make = task.plan(args, bundle, rows, frame)
    chosen, options = bundle.plan(**settings), options_of(args, bundle)
    facts = facts_of(bundle, args.batch_size, args.tile, args.lora)
    if args.from_image:
        warn_of_differences(args.from_image, facts)
    about = {**({"task": task.name} if task.name else {}), **about_of(args, task, chosen, frame), **facts}
    steps = task.walks(args, chosen["steps"])
    return files, lambda: draw(args, bundle, files, rows, make, {**options, **chosen}, about, steps)


def guiding(args: argparse.Namespace) -> Sequence[Want]:
    """What a classifier has to be told."""
    if not args.classifier:
        return ()
    from ldm.conditioners.wants import Want

    return (Want("class", "class", "a class, which --classifier guides towards"),)


def options_of(args: argparse.Namespace, bundle: Bundle) -> dict:
    """Of Bundle.generate, beside those of its plan."""
    options = {"negative_prompt": args.negative_prompt, "tile": args.tile, "window": args.window,
               "also": conditions.weighed(bundle, args.also or ()),
               **{name: getattr(args, name) for name in READING}}  # fmt: skip
    if args.classifier:
        from ldm.classifier import by_classifier
        from ldm.load import load_classifier

        classifier = load_classifier(args.classifier, ema=not args.no_ema, device=bundle.device, trust=args.trust)
        args.classifier_scale = 1.0 if args.classifier_scale is None else args.classifier_scale
        options["guide"] = by_classifier(classifier, args.classifier_scale, bundle.denoiser.process, bundle.autoencoder)
    elif args.classifier_scale is not None:
        raise UserError("--classifier-scale: give --classifier too")
    return options


def draw(args: argparse.Namespace, bundle: Bundle, files: list[Path], rows: list[Row], make: Make, options: dict, about: dict,
         steps: int) -> None:
    """Writes this process's share of the pictures, and the first one a sheet of all processes' pictures. steps: of the network
    for one batch."""
    import torch
    from tqdm import tqdm

    from ldm.callbacks.sheet import sheet, to_image

    (rank, world), shown, captions = place(), [], [caption(row.said) for row in rows]
    batches = [range(len(files))[start : start + args.batch_size] for start in range(0, len(files), args.batch_size)]
    own_batches = batches[rank::world]
    with tqdm(total=len(own_batches) * steps, desc="drawing", unit="step", disable=True if rank else None) as bar:
        for batch in own_batches:
            watch = Watch(bar, bundle, files[0].parent / PREVIEW, None if rank else args.preview, args.tile)
            pictures = make(stacked([rows[i].values for i in batch]),
                            {**options, "seed": args.seed, "indices": batch, "callback": watch})  # fmt: skip
            for i, picture in zip(batch, pictures.cpu(), strict=True):
                own = {"seed": args.seed + i, **about, **rows[i].said}
                png.write(files[i], to_image(picture), None if args.no_metadata else own)
                shown += [(i, picture)] if i < SHOWN else []
    shown = [picture for _, picture in collected(shown, key=itemgetter(0))]
    if len(files) > 1 and rank == 0:
        samples = getattr(args, "n_samples", 1)
        page = sheet(torch.stack(shown), captions[:SHOWN], samples if 1 < samples < len(files) else None)
        own = {"prompts": captions[:SHOWN], "seed": args.seed, **about}
        png.write(files[0].parent / SHEET, page, None if args.no_metadata else own)


class Watch:
    """What sampling calls at every step: it moves a progress bar and, every so many steps, writes what is believed by then."""

    def __init__(self, bar: Any, bundle: Bundle, file: Path, every: int | None, tile: int | None):
        self.bar, self.bundle, self.file, self.every, self.tile = bar, bundle, file, every, tile

    def __call__(self, step: int, t: float, x: Tensor, guess: Prediction) -> None:
        from torch.nn.functional import interpolate

        from ldm.callbacks.sheet import sheet

        self.bar.update()
        if self.every and step % self.every == 0:
            pictures = self.bundle.preview(guess, self.tile).cpu()
            share = SMALL / max(pictures.shape[2:])
            pictures = interpolate(pictures, scale_factor=share, mode="bilinear", antialias=True) if share < 1 else pictures
            png.write(self.file, sheet(pictures, [f"step {step}"] * len(pictures)), None)


def caption(said: dict) -> str:
    """What stands under a picture on the sheet."""
    files = [Path(file["path"]).name for file in (said.get("inputs") or {}).values()]
    texts = [said["prompt"]] if said.get("prompt") else []
    texts += [f"{key} {value}" for key, value in (said.get("conditions") or {}).items()]
    told = ", ".join([*texts, *files])
    return f"{told} -> {caption(said['to'])}" if "to" in said else told
