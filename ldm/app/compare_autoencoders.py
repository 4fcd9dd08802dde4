"""The same small diffusion model on several autoencoders, trained for the same budget: one table.

What an autoencoder is worth for diffusion is not seen from its reconstructions: latents that keep more are harder to learn.
So each row goes all the way: stage 1 by its own config, the same stage 2 on its latents, pictures drawn and judged.
Trainings are those of main.py, in a log folder inside --out: what is finished there is used again, what was interrupted
goes on.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.app.models import positive
from ldm.common.files import UserError, atomic_write, digest

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.app.stages import Stage
    from ldm.app.survey import Survey
    from ldm.bundle import Bundle

SUMMARY = "Train the same small diffusion model on several autoencoders and compare them in a table."
BASE = "configs/ldm_txt2img.yaml"
BATCH = 64  # pictures that are drawn, or reconstructed, at a time
SHOWN = 8  # pictures of each kind of caption on a sheet
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit statuses of a training that saved and left


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("autoencoders", nargs="+", metavar="CFG",
                        help="config of an autoencoder's training (.yaml), a trained one (checkpoint or run folder), or a "
                             "class that needs no training (autoencoder.base.Identity: pixels)")
    parser.add_argument("--base", default=BASE, metavar="YAML", help="config of the diffusion model (%(default)s)")
    parser.add_argument("--steps", type=positive, default=1000, help="of the diffusion model on each (%(default)s)")
    parser.add_argument("--stage1-steps", type=positive, metavar="N", help="of each autoencoder; default: as its config says")
    parser.add_argument("--n", type=positive, default=128, help="captions to draw, of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of captions and pictures (%(default)s)")
    parser.add_argument("--out", default="comparison", metavar="DIR", help="folder for all that comes out (%(default)s)")
    parser.add_argument("--trust", action="store_true", help="run code that a checkpoint names")


@dataclass(frozen=True)
class Entry:
    """An autoencoder to compare: its name in the table and in file names, and the arguments of main.py that choose it."""

    name: str
    overrides: list[str]

    @property
    def run(self) -> str:
        """Name of the diffusion model's run folder."""
        return f"on_{self.name}"


def run(args: argparse.Namespace) -> None:
    out, chosen = Path(args.out), entries(args)
    made: dict = {}
    planned = [plan(entry, args, made) for entry in chosen]  # every mistake is found before the first training
    print(f"{len(chosen)} autoencoders, {args.steps:,} steps of {args.base} on each; everything goes to {out}", flush=True)
    rows = []
    for number, (entry, surveys) in enumerate(zip(chosen, planned, strict=True), start=1):
        print(f"\n{number} of {len(chosen)}: {entry.name}", flush=True)
        rows.append(row(entry, surveys, args))
        write(rows, args, out)
    print(f"\n{table(rows)}\n\n{notes(rows, args)}\n\n{out / 'comparison.json'}, {out / 'comparison.md'}, and a sheet of each")


def entries(args: argparse.Namespace) -> list[Entry]:
    """What the command line names. UserError for what is no config, checkpoint, or class."""
    found: list[Entry] = []
    for given in args.autoencoders:
        path = Path(given)
        if path.suffix in (".yaml", ".yml"):
            source, name = "config", path.stem
        elif path.exists():
            source, name = "ckpt", path.stem if path.is_file() and path.stem != "last" else path.resolve().name
        elif "." in given and all(part.isidentifier() for part in given.split(".")):
            source, name = "target", given.split(".")[-1]
        else:
            raise UserError(f"{given}: no such file; expected the config of an autoencoder's training, a checkpoint, or a "
                            "class such as autoencoder.base.Identity")
        taken = [entry.name for entry in found]
        name = next(f"{name}{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, 1000))) if f"{name}{suffix}" not in taken)
        value = given if source == "target" else str(path.resolve())
        overrides = [f"autoencoder={{{source}: {json.dumps(value)}}}", f"trainer.max_steps={args.steps}", "logging.wandb=false"]
        if source == "config" and args.stage1_steps:
            overrides.append(f"stage1.trainer.max_steps={args.stage1_steps}")
        found.append(Entry(name, overrides))
    return found


def plan(entry: Entry, args: argparse.Namespace, made: dict) -> list[Survey]:
    """The stages that make this entry, opened and counted. made: data sets, see `Stage.open`. UserError with all that is
    wrong."""
    from ldm.app.stages import read
    from ldm.app.survey import surveys, world

    planned, mistakes = read([args.base], entry.overrides, name=entry.run)
    mistakes = mistakes or [mistake for stage in planned for mistake in stage.open(made)]
    if not mistakes and planned[-1].kind != "diffusion":
        mistakes = ["expected the config of a diffusion model"]
    if mistakes:
        raise UserError(f"{args.base} with {entry.name}: {'; '.join(mistakes)}")
    found, problems = surveys(planned, world(planned[-1].trainer), args.trust)
    if problems:
        raise UserError(f"{args.base} with {entry.name}: {'; '.join(problems)}")
    return found


def row(entry: Entry, surveys: Sequence[Survey], args: argparse.Namespace) -> dict:
    """One line of the table: from its file if that was made of the same, else trained and measured."""
    stages = [survey.stage for survey in surveys]
    file, last = Path(args.out) / f"{entry.name}.json", stages[-1]
    key = digest(last.key, last.sampling, last.config["data"], args.n, args.seed)
    if file.is_file() and (known := json.loads(file.read_text())).get("key") == key:
        print(f"{entry.name}: measured already, {file} is used")
        return known
    logs = Path(args.out) / "logs"
    train([*main_py(), "--base", args.base, "-t", "--resume", "auto", "--no-test", "--logdir", str(logs), "--name", entry.run,
           *["--trust"] * args.trust, *entry.overrides])  # fmt: skip
    found = {"name": entry.name, "key": key, **figures(entry, surveys, args, logs)}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    return found


def main_py() -> list[str]:
    import ldm

    path = Path(ldm.__file__).parents[1] / "main.py"
    if not path.is_file():
        raise UserError(f"{path}: not there; comparing trains by main.py, which lies beside the package in its repository")
    return [sys.executable, str(path)]


def train(command: Sequence[str]) -> None:
    """main.py in a process of its own, which hears SIGINT and SIGTERM from here, saves, and ends before this one does."""
    process = subprocess.Popen(command, process_group=0)
    before = {number: signal.signal(number, lambda number, frame: process.send_signal(number))
              for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status in STOPPED:
        print("the same command goes on from here", flush=True)
        raise KeyboardInterrupt
    if status:
        raise UserError(f"the training ended with status {status}; what it said stands above. The same command tries again")


def figures(entry: Entry, surveys: Sequence[Survey], args: argparse.Namespace, logs: Path) -> dict:
    """What is known of a finished entry: its autoencoder, its pictures, its cost. A sheet of pictures is written too."""
    from ldm.app.models import pick_device
    from ldm.app.runs import finished
    from ldm.load import load

    folders = [finished(logs, survey.stage.key) for survey in surveys]
    seconds = {survey.stage.kind: json.loads((folder / "DONE").read_text())["seconds"] if folder else None
               for survey, folder in zip(surveys, folders, strict=True)}  # fmt: skip
    bundle, survey = load(folders[-1], device=pick_device(None), trust=True), surveys[-1]  # trained just now
    kept = reconstruction(bundle, survey.stage)
    latent, network = kept["latents"]["shape"], bundle.denoiser.network
    judged = downstream(entry, bundle, survey.stage, args)
    autoencoder = bundle.autoencoder
    return {
        "kind": type(getattr(autoencoder, "bottleneck", autoencoder)).__name__, "factor": autoencoder.factor,
        "latent": latent, "rate": kept["rate"],
        "psnr": kept["psnr"], "ssim": kept["ssim"], "latents": kept["latents"], **judged, "seconds": seconds,
        "tokens": latent[1] * latent[2] // getattr(network, "patch_size", 1) ** 2, "flops_per_step": survey.flops_per_step,
        "trained_parameters": survey.trainable, "images": survey.images, "autoencoder_hash": autoencoder.content_hash(),
        "run": str(folders[-1]),
    }  # fmt: skip


def unseen(stage: Stage) -> Any:
    """The pictures that are measured with: the validation data, or the training data where there is no other."""
    return stage.validation or stage.train


def reconstruction(bundle: Bundle, stage: Stage) -> dict:
    from ldm.data.loader import make_loader
    from ldm.metrics.reconstruction import measure

    batches = make_loader(unseen(stage), BATCH, seed=0, shuffle=False, infinite=False)
    return measure(bundle.autoencoder, batches, import_module("autoencoder.statistics").Tally()).table


def downstream(entry: Entry, bundle: Bundle, stage: Stage, args: argparse.Namespace) -> dict:
    """How well the diffusion model draws: adherence to captions where the data are drawn shapes, else a Fréchet distance
    to the unseen pictures. From the same captions and noise for each autoencoder (as far as latents are of one shape)."""
    from tqdm import tqdm

    from ldm.app import png
    from ldm.callbacks.sheet import sheet
    from ldm.data.shapes import Shapes
    from ldm.metrics import adherence

    shapes = isinstance(stage.train, Shapes)
    drawn: list[tuple[str, Tensor]] = []
    with tqdm(total=2 * args.n, desc=f"{entry.name}: drawing", unit="picture", disable=None) as bar:

        def generate(captions: Sequence[str]) -> Tensor:
            pictures = bundle.generate(captions, seed=args.seed, indices=range(len(drawn), len(drawn) + len(captions))).cpu()
            drawn.extend(zip(captions, pictures, strict=True))
            bar.update(len(captions))
            return pictures

        if shapes:
            judged = {"adherence": adherence.evaluate(generate, n=2 * args.n, n_held_out=0, seed=args.seed, batch=BATCH)}
        else:
            judged = {"distance": frechet(generate, unseen(stage), 2 * args.n)}
    shown = [*drawn[:SHOWN], *drawn[len(drawn) // 2 :][:SHOWN]]
    captions, pictures = zip(*shown, strict=True)
    png.write(Path(args.out) / f"{entry.name}.png", sheet(pictures, captions), {"prompts": captions, "seed": args.seed})
    return judged


def frechet(generate: Any, dataset: Any, n: int) -> dict:
    """-> {"name", "value"}: distance of n drawn pictures to those of the data set, in the features that its name says."""
    from ldm.data.loader import make_loader
    from ldm.metrics.features import default_extractor, label
    from ldm.metrics.frechet import Gaussian, distance

    real, made, captions = Gaussian(), Gaussian(), cycle(dataset.caption(i) for i in range(len(dataset)))
    extractor = default_extractor(dataset[0]["image"].shape[0])
    for batch in make_loader(dataset, BATCH, seed=0, shuffle=False, infinite=False):
        real.add(extractor(batch["image"]))
    for start in range(0, n, BATCH):
        made.add(extractor(generate(list(islice(captions, min(BATCH, n - start))))))
    return {"name": label(extractor).removeprefix("r"), "value": distance(real, made), "pictures": n}


# The table.


def columns(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Heading -> a cell for each row; headings of what no row has are left out."""

    def rate(found: dict, name: str) -> str:
        bits = (found["rate"] or {}).get(name)
        return "-" if bits is None else f"{bits:,.0f}"

    def seconds(found: dict, kind: str) -> str:
        return "-" if found["seconds"].get(kind) is None else f"{found['seconds'][kind]:,}"

    cells = {
        "autoencoder": lambda r: r["name"], "kind": lambda r: r["kind"], "factor": lambda r: f"{r['factor']}",
        "latent": lambda r: "x".join(map(str, r["latent"])), "bits": lambda r: rate(r, "bits"),
        "entropy-coded": lambda r: rate(r, "entropy_bits"), "PSNR": lambda r: f"{r['psnr']:.1f}",
        **{group: lambda r, group=group: f"{100 * r['adherence'][group]['all']:.1f} %"
           for found in rows for group in found.get("adherence", {})},
        **{found["distance"]["name"]: lambda r: f"{r['distance']['value']:.4g}" for found in rows if "distance" in found},
        "stage 1 (s)": lambda r: seconds(r, "autoencoder"), "stage 2 (s)": lambda r: seconds(r, "diffusion"),
        "tokens": lambda r: f"{r['tokens']:,}", "GFLOP a step": lambda r: f"{r['flops_per_step'] / 1e9:,.1f}",
        "parameters": lambda r: f"{r['trained_parameters']:,}",
    }  # fmt: skip
    return {heading: [cell(found) for found in rows] for heading, cell in cells.items()}


def table(rows: Sequence[dict]) -> str:
    """As markdown, in columns of even width."""
    found = columns(rows)
    widths = [max(len(heading), *map(len, cells)) for heading, cells in found.items()]
    lines = [list(found), ["-" * width for width in widths], *zip(*found.values(), strict=True)]
    return "\n".join("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
                     for line in lines)


def notes(rows: Sequence[dict], args: argparse.Namespace) -> str:
    """What the columns mean, and what was not equal."""
    if "adherence" in rows[0]:
        drawn = (f"One object, two objects: of {args.n} captions each, which training never saw, the share that was drawn "
                 "right in every attribute")
    else:
        drawn = (f"{rows[0]['distance']['name']}: Fréchet distance of {2 * args.n} drawn pictures to unseen ones in these "
                 "features, to be compared within this table alone; less is better")
    lines = [
        f"The same diffusion model ({args.base}) for {args.steps:,} steps, {rows[0]['images']:,} images, on each.",
        "bits: of a picture's latent, by the KL divergence to N(0, I) or by the length of its codes; entropy-coded: the codes "
        "one by one by their frequencies. PSNR: dB, reconstructions of pictures that neither stage was trained on.",
        f"{drawn}. Seconds with caches and validation; parameters: those that stage 2 trains.",
    ]
    if len({found["tokens"] for found in rows}) > 1:
        lines.append("The latent sides differ: the same network then sees more or fewer tokens, and a step costs more or less.")
    return "\n".join(lines)


def write(rows: Sequence[dict], args: argparse.Namespace, out: Path) -> None:
    """The table so far, for people and for programs."""
    about = {name: getattr(args, name) for name in ("base", "steps", "stage1_steps", "n", "seed")}
    with atomic_write(out / "comparison.json") as temporary:
        temporary.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    with atomic_write(out / "comparison.md") as temporary:
        temporary.write_text(f"{table(rows)}\n\n{notes(rows, args)}\n")
