"""`python -m ldm evaluate likelihood`: how likely pictures are under a diffusion model, in bits per dimension."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.app.evaluate_autoencoder import data_from
from ldm.app.judging import check_source
from ldm.app.models import enough_memory, load_model, model_arguments, positive
from ldm.app.png import check_free
from ldm.common.files import UserError, atomic_write

if TYPE_CHECKING:
    from ldm.bundle import Bundle
    from ldm.metrics.likelihood import Settings

FIGURES, CURVE, PLOT = "likelihood.json", "rate_distortion.csv", "rate_distortion.png"
STEPS = 100  # of the bound on a process that has no steps of its own
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="YAML", help="config whose validation data is measured with (its training data "
                                                       "where it has none); default: the checkpoint's own")
    source.add_argument("--images", metavar="DIR", help="a folder of images instead, without captions")
    parser.add_argument("--size", type=positive, help="of --images: side of the centred square; default: as trained")
    parser.add_argument("--n", type=positive, default=64, help="pictures at most, drawn from all by --seed (64)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of which pictures are taken, and of all noise (0)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="B", help="pictures at a time (16)")
    parser.add_argument("--no-captions", action="store_true", help="under the empty condition, where the data has captions")
    parser.add_argument("--kind", choices=("bound", "ode", "both"), default="bound",
                        help="bound: of the variational chain; ode: by the probability-flow ODE, several times dearer")
    parser.add_argument("--steps", type=positive, metavar="N",
                        help=f"of the bound; default: the process's own, {STEPS} where it has none")
    parser.add_argument("--times", metavar="NAME", help="how its times are spaced, as in txt2img; default: linear on processes "
                                                        "with steps, else karras")
    parser.add_argument("--variance", choices=("small", "large"), default="large",
                        help="of the reverse steps where the model has not learned it (large)")
    parser.add_argument("--continuous", action="store_true",
                        help="the bound of infinitely many steps too, integrated with --steps")
    parser.add_argument("--clip", action="store_true", help="clamp the predicted x0 to [-1, 1]; pixel models only")
    parser.add_argument("--decoder", choices=("discretized", "gaussian", "laplace"), default="discretized",
                        help="p(x|z) of latent models around the decoded picture (discretized: a normal's mass of each of "
                             "the 256 levels)")
    parser.add_argument("--decoder-std", type=float, metavar="S",
                        help="its standard deviation, of pixels in [-1, 1]; default: that of these pictures' reconstructions")
    parser.add_argument("--latent-std", type=float, metavar="S",
                        help="of q(z|x) at unit scale, any value gives a bound; default: the autoencoder's own, 0.05 where "
                             "that has none or the model was trained on latents without it")
    parser.add_argument("--probes", type=positive, default=1, metavar="K", help="of the ODE's trace estimate (1)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the ODE's solver (1e-4)")
    parser.add_argument("--rate-distortion", action="store_true", help="the curve of progressive coding: in the figures, and "
                                                                       f"as {CURVE} and {PLOT} in --outdir")
    parser.add_argument("--out", metavar="JSON", help=f"write the figures to this file; default: {FIGURES} in --outdir")
    parser.add_argument("--outdir", metavar="D", help="folder for figures, curve and plot")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder already")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ldm.common.team import agreed, place
    from ldm.common.weights import evaluating
    from ldm.metrics.likelihood import evaluate

    folder = Path(args.outdir) if args.outdir else None
    figures = Path(args.out) if args.out else folder and folder / FIGURES
    curve = [folder / CURVE, folder / PLOT] if folder and args.rate_distortion else []
    with agreed():  # nobody writes before all have looked
        check(args)
        check_free([*curve, folder / FIGURES] if folder and not args.out else curve, args.overwrite)
    bundle = load_model(args).float().requires_grad_(False)
    bundle.check_conditioner(1.0)
    settings, about = settings_from(args, bundle)

    def batches() -> Iterator[dict]:
        about["data"], found = data_from(args, bundle, {})
        for batch in found:
            yield {key: value.to(bundle.device) if hasattr(value, "to") else value for key, value in batch.items()}

    hidden = True if place()[0] else None
    with tqdm(total=args.n, desc="measuring", disable=hidden, bar_format=BAR) as bar, evaluating(bundle), enough_memory():
        table = evaluate(bundle.autoencoder, bundle.conditioner, bundle.denoiser, batches, settings, bar.update)
    if place()[0] > 0:
        return
    print("\n".join(lines(table, about)))
    if figures:
        with atomic_write(figures) as temporary:
            temporary.write_text(json.dumps({"likelihood": table, "about": about}, indent=2) + "\n")
        print(f"figures in {figures}")
    if curve:
        write_curve(table["rate_distortion"], *curve)
        print(f"rate and distortion in {curve[0]} and {curve[1]}")


def check(args: argparse.Namespace) -> None:
    """UserError for what does not go together; before a model is loaded for nothing."""
    for name in ("decoder_std", "latent_std", "tolerance"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0")
    if args.precision not in (None, "fp32") or args.autoencoder_precision not in (None, "fp32"):
        raise UserError("--precision: likelihoods are computed in fp32, whatever the weights were saved in")
    if args.size and not args.images:
        raise UserError("--size: belongs to --images; data sets have their own size")
    for name in ("rate_distortion", "continuous"):
        if args.kind == "ode" and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: comes from the bound; give --kind bound, or both")
    if args.images:
        check_source(Path(args.images))


def settings_from(args: argparse.Namespace, bundle: Bundle) -> tuple[Settings, dict]:
    """-> what is measured, and what the figures say of it beside the data."""
    from autoencoder.base import Identity
    from ldm.common.named import parse
    from ldm.conditioners.none import Unconditional
    from ldm.metrics.likelihood import QUIET, Settings
    from ldm.times import make_times

    denoiser = bundle.denoiser
    process, pixels = denoiser.process, isinstance(bundle.autoencoder, Identity)
    for name in ("decoder_std", "latent_std") * pixels + ("clip",) * (not pixels):
        if getattr(args, name):
            kinds = ("latents", "pixels") if pixels else ("pixels", "latents")
            raise UserError(f"--{name.replace('_', '-')}: belongs to models of {kinds[0]}; this is one of {kinds[1]}")
    discrete = process.t_data < 0
    steps = args.steps or (int(process.t_max) + 1 if discrete else STEPS)
    spacing = parse(args.times or ("linear" if discrete else "karras"))
    times = None if args.kind == "ode" else make_times(spacing, process, steps)
    conditions = bundle.conditioner is not None and not isinstance(bundle.conditioner, Unconditional)
    captions = conditions and not (args.no_captions or args.images)
    quiet = ((bundle.config or {}).get("model", {}).get("params") or {}).get("latents") == "mode"
    settings = Settings(
        times, args.variance, steps if args.continuous else None, args.kind != "bound", args.probes, args.tolerance,
        args.decoder, args.decoder_std, args.latent_std or (QUIET if quiet else None), args.clip, args.rate_distortion,
        captions, args.seed)
    about = {"model": bundle.content_hash(), "process": type(process).__name__, "seed": args.seed, "clip": args.clip,
             "bound": None if times is None else {
                 "steps": len(times) - 1, "times": spacing,
                 "variance": args.variance if denoiser.variance == "fixed" else denoiser.variance},
             "ode": {"probes": args.probes, "tolerance": args.tolerance} if settings.ode else None}  # fmt: skip
    return settings, about


def lines(table: dict, about: dict) -> list[str]:
    """The figures as they are printed."""
    named = "each picture's own" if table["condition"] != "none" else "none"
    rows = [("pictures", f"{table['pictures']:,} of {' x '.join(map(str, table['picture']))}; condition: {named}, no guidance")]
    chain = about["bound"]
    how = {"bound": chain and f"upper bound, {chain['steps']} steps, {chain['variance']} variance",
           "continuous_bound": "upper bound, of infinitely many steps", "ode": "probability-flow ODE"}
    latents, pixels = table.get("latents"), table["pixels"]
    for kind, what in how.items():
        if latents and kind in latents:
            rows.append(("latents", f"{told(latents[kind])} of latents, a density at unit scale: {what}{split(latents[kind])}"))
    for kind, what in how.items():
        if latents and kind in pixels:
            rows.append(("pixels", f"{told(pixels[kind])}: upper bound with the decoder's term, of reconstruction "
                                   f"{pixels['reconstruction']:.4f} - entropy of q(z|x) {pixels['posterior_entropy']:.4f} + "
                                   f"latents {pixels[kind]['prior_of_latents']:.4f} ({what})"))
        elif kind in pixels:
            smooth = " of pixels with noise uniform over their level" * (kind == "ode")
            rows.append(("pixels", f"{told(pixels[kind])}: {what}{smooth}{split(pixels[kind])}"))
    if latents:
        spread = "the autoencoder's own" if latents["std"] is None else f"{latents['std']:g}"
        unit = "" if pixels["decoder"] == "discretized" else ", a density times the width of a level"
        rows += [("p(x|z)", f"{pixels['decoder']}, standard deviation {pixels['decoder_std']:.4f} of pixels in [-1, 1]{unit}"),
                 ("q(z|x)", f"standard deviation at unit scale: {spread}")]  # fmt: skip
    return aligned(rows)


def told(entry: dict) -> str:
    error = entry["standard_error"]
    return f"{entry['bits_per_dim']:.4f}{'' if error is None else f' +- {error:.4f}'} bits/dim"


def split(entry: dict) -> str:
    """What a bound is the sum of."""
    if "prior" not in entry:
        return ""
    return f" (prior {entry['prior']:.4f} + steps {entry['steps']:.4f} + last step {entry['last_step']:.4f})"


def aligned(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<{max(len(name) for name, _ in rows)}}  {value}" for name, value in rows]


def write_curve(curve: dict, table: Path, plot: Path) -> None:
    """t, rate and distortion as CSV, and drawn as in figure 5 of DDPM (2006.11239)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ("t", "bits_per_dim", "rmse")
    with atomic_write(table) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(curve[name] for name in columns), strict=True))
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    step = range(len(curve["t"]))
    left.plot(step, curve["rmse"])
    middle.plot(step, curve["bits_per_dim"])
    right.plot(curve["bits_per_dim"], curve["rmse"])
    rate, distortion = "rate: bits/dim sent", "distortion: RMSE of 0..255"
    for axes, x, y in ((left, "steps from noise", distortion), (middle, "steps from noise", rate), (right, rate, distortion)):
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    right.set_xscale("log")
    with atomic_write(plot) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
