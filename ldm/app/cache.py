"""Latents and text states that a training keeps on disk, made before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.common.files import UserError

if TYPE_CHECKING:
    from ldm.app.stages import Stage

SUMMARY = "Encode the data of a config beforehand: what its training then finds on disk."
SHARED = True  # each process makes its share


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-b", "--base", nargs="+", required=True, metavar="CFG",
                        help="config files of a training on latents, merged left to right")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, such as cache.dir=DIR")
    parser.add_argument("-l", "--logdir", default="logs", metavar="D",
                        help="folder of run folders, where a first stage is looked for, and of the cache (%(default)s)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ...; default: cuda where it is")
    parser.add_argument("--trust", action="store_true", help="run code that the checkpoint in autoencoder.ckpt names")


def run(args: argparse.Namespace) -> None:
    from ldm.app import guards, parts, stages, starts, survey
    from ldm.app.models import pick_device
    from ldm.common.config import Cache, section

    overrides = [*args.overrides, *(word for word in args.base if "=" in word)]  # `-b CFG key=value` reads as two configs
    planned, mistakes = stages.read([word for word in args.base if "=" not in word], overrides)
    told(mistakes)
    *_, stage = starts.placed(planned, resumed=False)
    wanted = section(stage.config, Cache)
    if stage.kind == "autoencoder":
        raise UserError(f"{stage.name}: trains an autoencoder, which reads pictures; only trainings on latents keep any")
    if not (wanted.latents or wanted.text):
        raise UserError(f"{stage.name}: its config keeps nothing on disk; ask for it, cache.latents=true cache.text=true")
    made: dict = {}
    told([mistake for each in (stage.before, stage) if each for mistake in each.open(made)])
    surveys, mistakes = survey.surveys([stage], 1, args.trust)
    told(mistakes)
    survey.prepare(surveys[0].module)
    autoencoder, _ = parts.autoencoder_of(stage, first_stage(stage, args.logdir), args.trust)
    module = parts.make_module(stage, autoencoder, stage.picture)
    device = pick_device(args.device)
    guards.settle_latents(stage, module, device, False, print)
    train, validation, _ = parts.cached(stage, module, args.logdir, device, print)
    for name, dataset in (("train", train), ("validation", validation)):
        if dataset is not None:
            tables = {"latents": dataset.latents, "text states": dataset.texts}
            kept = ", ".join(f"{what} in {table.folder}" for what, table in tables.items() if table is not None)
            print(f"{name}: {len(dataset):,} samples, {kept}")


def told(mistakes: list[str]) -> None:
    if mistakes:
        raise UserError("; ".join(mistakes))


def first_stage(stage: Stage, logdir: str) -> Path | None:
    """The checkpoint of a first stage that the config has trained; None: the config names an autoencoder. UserError where it is
    still to be trained."""
    from ldm.app import runs
    from ldm.load import find

    if stage.before is None:
        return None
    folder = runs.finished(logdir, stage.before.key)
    if folder is None:
        config = stage.config["autoencoder"]["config"]
        raise UserError(f"autoencoder.config: {config}: no finished run of it in {logdir}; train it first: "
                        f"python main.py --base {config} -t")
    return find(folder)
