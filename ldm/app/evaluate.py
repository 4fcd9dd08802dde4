"""Figures of a model: how well it obeys its captions, what its autoencoder keeps of pictures, how likely it finds them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.app import evaluate_autoencoder, evaluate_likelihood
from ldm.app.models import (
    enough_memory,
    load_model,
    model_arguments,
    positive,
    precision_name,
    sampling_arguments,
    sampling_of,
)
from ldm.common.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "Measure a model."
SHARED = True  # several processes each do a part


def arguments(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_subparsers(metavar="METRIC", required=True)
    for name, fill, measure, about in (
        ("adherence", adherence_arguments, adherence, "draw captions of the drawn shapes that training never saw, and read "
                                                      "the pictures"),
        ("autoencoder", evaluate_autoencoder.arguments, evaluate_autoencoder.run,
         "PSNR, SSIM, LPIPS, Fréchet distance, rate, latent statistics and speed of reconstructions"),
        ("likelihood", evaluate_likelihood.arguments, evaluate_likelihood.run,
         "bits per dimension of pictures by the variational bound and the probability-flow ODE, and rate against distortion"),
    ):  # fmt: skip
        metric = metrics.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)
        metric.add_argument("-v", "--verbose", action="store_true", help="show where an error came from")
        fill(metric)
        metric.set_defaults(measure=measure)


def run(args: argparse.Namespace) -> None:
    args.measure(args)


def adherence_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    sampling_arguments(parser)
    parser.add_argument("--n", type=positive, default=256, help="captions, half with one object, half with two (256)")
    parser.add_argument("--n-held-out", type=positive, default=128, help="captions with a held-out pair (128)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of captions and pictures (0)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="B", help="pictures at a time (64)")
    parser.add_argument("--out", metavar="JSON", help="write the table to this file too")


def adherence(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ldm.common.team import place
    from ldm.metrics import adherence

    settings = sampling_of(args)
    bundle = load_model(args)
    chosen = bundle.plan(**settings)
    (rank, world), calls, drawn = place(), 0, 0

    with tqdm(total=args.n + args.n_held_out, desc="drawing", unit="picture", disable=True if rank else None) as bar:

        def generate(captions: Sequence[str]) -> Tensor | None:
            nonlocal calls, drawn
            calls, indices, drawn = calls + 1, range(drawn, drawn + len(captions)), drawn + len(captions)
            bar.update(len(captions))
            if calls % world != rank:
                return None
            return bundle.generate(captions, seed=args.seed, indices=indices, **chosen).cpu()

        with enough_memory():
            table = adherence.evaluate(generate, n=args.n, n_held_out=args.n_held_out, seed=args.seed,
                                       batch=args.batch_size)
    if rank > 0:
        return
    print(adherence.format_table(table))
    if args.out:
        about = {"seed": args.seed, "model": bundle.content_hash(), "precision": precision_name(bundle), **chosen}
        with atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps({"adherence": table, **about}, indent=2) + "\n")
