"""How few steps are enough: prompt adherence and distance to the exact solution, by sampler, times and guidance interval.

    python -m benchmarks.few_steps --ckpt RUN [--n 256] [--out benchmarks/results/few_steps]
    python -m benchmarks.few_steps --ckpt RUN --default --n 512 --seed 7 --out again      # the best of many, measured again

Adherence is the share of n captions whose picture has everything right (ldm.metrics.adherence); it is compared with that
of 250 steps of DDPM from the same noise, caption by caption. The exact solution is what 250 steps of Heun make of the same
noise under the same guidance; the distance to it is the root mean square over latents, whose deviation is 1. An evaluation
is one call of the guided network. Writes OUT.json after every row, and takes from it what is there already; then OUT.md and
OUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ldm.bundle import Bundle
    from ldm.data.shapes import Scene

LIMIT = 10  # network evaluations within which the best is looked for
REFERENCE = {"sampler": "ddpm", "steps": 250}
EXACT = {"sampler": "heun", "steps": 250, "times": "linear"}
# sampler -> steps; about 5, 10 and 20 evaluations
SAMPLERS = {
    "euler": (5, 10, 20), "dpmpp_2m": (5, 10, 20), "unipc": (5, 10), "heun": (3, 5, 10), "dpmpp_3m": (5, 10), "plms": (9,),
    "lms": (10,), "deis": (10,), "dpm_2": (5,), "dpmpp_2s": (5,), "ddpm": (5, 10, 20), "dpmpp_2m_sde": (5, 10, 20),
}  # fmt: skip
TIMES = ({"name": "shifted", "shift": 0.6}, {"name": "shifted", "shift": 1.7}, "beta", {"name": "karras", "sigma_max": 20.0})
INTERVALS = ((0.0, 0.9), (0.0, 0.8), (0.2, 1.0), (0.1, 0.9))  # shares of the time from clean data (0) to pure noise (1)
TRIED = ("dpmpp_2m", "unipc", "ddpm", "dpmpp_2m_sde")  # with all of TIMES
GUIDED = ("dpmpp_2m", "dpmpp_2m_sde")  # with all of INTERVALS


def rows(process) -> Iterable[dict]:
    """-> what to measure, as arguments of Bundle.generate. The first is the reference."""
    yield REFERENCE | {"times": "linear"}
    for sampler, counts in SAMPLERS.items():
        for steps in counts:
            yield {"sampler": sampler, "steps": steps, "times": "linear"}
    for sampler in TRIED:
        for times in TIMES:
            yield {"sampler": sampler, "steps": LIMIT, "times": times}
    for sampler in GUIDED:
        for ends in INTERVALS:
            low, high = (process.t_data + share * (process.t_max - process.t_data) for share in ends)
            yield {"sampler": sampler, "steps": LIMIT, "times": "linear", "guidance": {"low": low, "high": high}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="trained on the drawn shapes")
    parser.add_argument("--n", type=int, default=256, help="captions, half with one object, half with two (256)")
    parser.add_argument("--n-exact", type=int, default=32, help="of them, those solved exactly (32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/few_steps", help="of .json, .md and .png (%(default)s)")
    parser.add_argument("--cache", default="logs/few_steps", help="folder of the exact solutions (logs/few_steps)")
    parser.add_argument("--default", action="store_true", help="only the reference, and what the model draws with by default")
    parser.add_argument("--device", help="default: cuda where it is")
    args = parser.parse_args()
    from ldm.common.allocator import keep_memory

    keep_memory()
    from ldm.app.models import pick_device
    from ldm.load import load

    meter = Meter(load(args.ckpt, device=pick_device(args.device)), args)
    for row in (REFERENCE | {"times": "linear"}, {}) if args.default else rows(meter.bundle.denoiser.process):
        meter.measure(row)
    out = Path(args.out)
    text = markdown(meter.table)
    out.with_suffix(".md").write_text(text)
    plot(meter.table["rows"], out.with_suffix(".png"))
    print(text)


class Meter:
    """Measures rows of one model on one set of captions, and keeps them in a file."""

    def __init__(self, bundle: Bundle, args: argparse.Namespace):
        self.bundle, self.args = bundle, args
        self.file, self.cache = Path(args.out).with_suffix(".json"), Path(args.cache)
        model = bundle.content_hash()
        about = {"model": model, "n": args.n, "n_exact": args.n_exact, "seed": args.seed, "guidance": bundle.plan()["guidance"]}
        old = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.table = {"about": about, "rows": old["rows"] if old.get("about") == about else []}
        self.scenes = scenes_of(args.n, args.seed)
        captions = [str(scene.said) for scene in self.scenes]
        self.batch = {"caption": captions}
        if hasattr(bundle.conditioner, "encode"):
            states, mask = bundle.conditioner.encode(captions)
            self.batch |= {"text_states": states, "text_mask": mask}

    def measure(self, row: dict) -> None:
        """Adds a row to the table, unless it is there."""
        row = self.bundle.plan(**row)
        if any(all(old[key] == row[key] for key in row) for old in self.table["rows"]):
            return
        began = process_time()
        pictures, latents, evaluations, drew = self.draw(row, self.args.n)
        seconds = process_time() - began
        from ldm.metrics.adherence import ATTRIBUTES, read, score

        found = [score(read(picture), scene.said) for picture, scene in zip(pictures, self.scenes, strict=True)]
        distance = None
        if not drew:
            exact = self.exact(row["guidance"])
            distance = float((latents[: len(exact)] - exact).square().mean().sqrt())
        shares = {name: sum(one[name] for one in found) / len(found) for name in ATTRIBUTES}
        self.table["rows"].append({
            **row, "evaluations": evaluations, "adherence": shares["all"], "distance": distance, "attributes": shares,
            "right": "".join(str(int(one["all"])) for one in found), "seconds": round(seconds, 1),
        })  # fmt: skip
        from ldm.common.files import atomic_write

        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps(self.table, indent=1) + "\n")
        print(line(self.table["rows"][-1], self.table["rows"][0]), f"{seconds:.0f} s", flush=True)

    def draw(self, row: dict, n: int) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
        """-> pictures (n,3,H,W), latents (n,C,h,w), network evaluations for each, whether noise was drawn on the way."""
        import torch

        from ldm.common.named import pick
        from ldm.samplers import SAMPLERS as ALL

        sampler, kept, calls, drew = pick(row["sampler"], ALL, "sampler"), [], 0, False

        def spy(denoise, x, times, process, *, callback=None, noise=None):
            def counted(x, t):
                nonlocal calls
                calls += 1
                return denoise(x, t)

            def drawn(step, shape):
                nonlocal drew
                drew = True
                return noise(step, shape)

            kept.append(sampler(counted, x, times, process, callback=callback, noise=drawn))
            return kept[-1]

        part = {key: values[:n] for key, values in self.batch.items()}
        pictures = self.bundle.generate(part, **row | {"sampler": spy}, seed=self.args.seed, batch_size=self.args.batch_size)
        return pictures.cpu(), torch.cat(kept).cpu(), round(calls / len(kept)), drew

    def exact(self, guidance: dict) -> torch.Tensor:  # -> (n_exact,C,h,w)
        """The probability-flow ODE solved from the same noise; kept in a file."""
        import torch

        from ldm.common.files import digest

        row, n = EXACT | {"guidance": guidance}, min(self.args.n, self.args.n_exact)
        about = self.table["about"]
        path = self.cache / f"{digest({'model': about['model'], 'n': [about['n'], n], 'seed': about['seed'], **row})}.pt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.draw(row, n)[1], path)
        return torch.load(path, weights_only=True)


def scenes_of(n: int, seed: int) -> list[Scene]:
    """n scenes with captions outside of training, one object and two in turn."""
    from ldm.data.shapes import evaluation_scenes

    one, two = (evaluation_scenes(k, objects=kind, seed=seed) for k, kind in (((n + 1) // 2, "one"), (n // 2, "two")))
    mixed = [None] * n
    mixed[::2], mixed[1::2] = one, two
    return mixed


def named(spec: str | dict) -> str:
    """A choice as the command line writes it."""
    if isinstance(spec, str):
        return spec
    return f"{spec['name']}:{','.join(f'{key}={value:g}' for key, value in spec.items() if key != 'name')}"


def interval(guidance: dict) -> str:
    """Where it guides."""
    ends = [guidance["low"], guidance["high"]]
    return "everywhere" if ends == [None, None] else f"{ends[0]:g} .. {ends[1]:g}"


def against(row: dict, reference: dict) -> tuple[float, float]:
    """-> adherence as a share of the reference's, and the standard error of that, the captions being the same."""
    pairs = [(int(a), int(b)) for a, b in zip(row["right"], reference["right"], strict=True)]
    mean, n = reference["adherence"], len(pairs)
    if mean == 0:
        return math.nan, math.nan
    ratio = row["adherence"] / mean
    spread = sum((a - ratio * b) ** 2 for a, b in pairs) / n  # delta method
    return ratio, math.sqrt(spread / n) / mean


def line(row: dict, reference: dict) -> str:
    """A row of the Markdown table."""
    ratio, error = against(row, reference)
    distance = "" if row["distance"] is None else f"{row['distance']:.3f}"
    shares = f"{100 * row['adherence']:.1f} | {100 * ratio:.1f} ± {100 * error:.1f}"
    return (f"| {row['evaluations']} | {named(row['sampler'])} | {row['steps']} | {named(row['times'])} | "
            f"{interval(row['guidance'])} | {shares} | {distance} |")


def best(table: list[dict]) -> dict:
    """The highest adherence within LIMIT evaluations; of equal ones the nearest to the exact solution."""
    few = [row for row in table if row["evaluations"] <= LIMIT]
    return max(few, key=lambda row: (row["adherence"], -math.inf if row["distance"] is None else -row["distance"]))


def markdown(table: dict) -> str:
    found, about = table["rows"], table["about"]
    reference, rest = found[0], sorted(found[1:], key=lambda row: (row["evaluations"], -row["adherence"]))
    top = best(rest)
    ratio, error = against(top, reference)
    head = ("| evaluations | sampler | steps | times | guided at t | adherence, % | of the reference, % | distance |\n"
            "|---:|---|---:|---|---|---:|---:|---:|")
    return "\n".join([
        f"Model {about['model']}, {about['n']} captions, guidance {about['guidance']['scale']:g}; distances on "
        f"{min(about['n'], about['n_exact'])} of them. Reference: {reference['steps']} steps of DDPM.",
        "", f"Best within {LIMIT} evaluations: {named(top['sampler'])}, {top['steps']} steps, times {named(top['times'])}, "
        f"guided {interval(top['guidance'])}: {100 * ratio:.1f} ± {100 * error:.1f} % of the reference.",
        "", head, line(reference, reference), *(line(row, reference) for row in rest), "",
    ])  # fmt: skip


def plot(table: list[dict], path: Path) -> None:
    """Adherence and distance over evaluations: a line for each sampler with linear times, points for the rest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    plain = [row for row in table[1:] if row["times"] == "linear" and row["guidance"]["low"] is row["guidance"]["high"] is None]
    others = [row for row in table[1:] if row not in plain]
    for panel, key, scale in zip(panels, ("adherence", "distance"), (100, 1), strict=True):
        for i, name in enumerate(dict.fromkeys(named(row["sampler"]) for row in plain)):
            mine = sorted((row["evaluations"], scale * row[key]) for row in plain
                          if named(row["sampler"]) == name and row[key] is not None)  # fmt: skip
            if mine:
                colour = pyplot.get_cmap("tab20")(2 * i % 20 + i // 10)
                panel.plot(*zip(*mine, strict=True), marker="os^vDP"[i % 6], color=colour, label=name)
        seen = [(row["evaluations"], scale * row[key]) for row in others if row[key] is not None]
        if seen:
            panel.scatter(*zip(*seen, strict=True), marker="x", color="grey", label="other times or intervals", zorder=3)
        panel.set(xlabel="network evaluations", xscale="log", xticks=(5, 10, 20), xticklabels=(5, 10, 20))
        panel.minorticks_off()
    panels[0].axhline(100 * table[0]["adherence"], color="black", linestyle="--", label=f"ddpm, {table[0]['steps']}")
    panels[0].set(ylabel="adherence, %")
    panels[1].set(ylabel="distance to the exact solution", yscale="log")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
