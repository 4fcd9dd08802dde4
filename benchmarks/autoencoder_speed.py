"""Encoding and decoding with KL f8 (83.7 M parameters), at once and by tiles, beside diffusers with the same weights.

    python -m benchmarks.autoencoder_speed [--sizes 256 512] [--rounds 3] [--threads 1]

Times are CPU seconds of this process, so that other programs on the same cores disturb little. Memory is what the process
takes above what it holds before (the weights). Both by tiles of 256 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import process_time

BLOCK = {"target": "autoencoder.model.convolutional",
         "params": {"bottleneck": {"target": "autoencoder.bottlenecks.KL", "params": {"channels": 4}}}}
TILE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    from benchmarks.rounds import machine

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ours, theirs = pair()
    print(machine(), flush=True)
    with torch.no_grad():
        for size in args.sizes:
            x = torch.rand(1, 3, size, size) * 2 - 1
            z = torch.randn(1, 4, size // 8, size // 8)
            for name, given in (("encode", x), ("decode", z)):
                print(f"\n**{name}, {size} px**\n\n{report(name, given, ours, theirs, args.rounds)}", flush=True)


def pair() -> tuple:
    """Our autoencoder and diffusers' with the same random weights."""
    from ldm.bundle import Bundle  # before diffusers: ldm repairs torchvision
    from ldm.common.build import build
    from ldm.interop.diffusers import write
    from diffusers import AutoencoderKL  # isort: skip

    bundle = Bundle(build(BLOCK), config={"model": {"params": {"autoencoder": BLOCK}}}).eval()
    weights, config = write(bundle)
    theirs = AutoencoderKL.from_config(config)
    theirs.load_state_dict(weights)
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = TILE, TILE // 8
    return bundle.autoencoder, theirs.eval()


def report(name: str, given, ours, theirs, rounds: int) -> str:
    """-> a table: time, speed and memory of the four ways, and how far they are from ours at once."""
    import torch

    from benchmarks.memory import resident_peak
    from benchmarks.rounds import interleaved, show

    def foreign(tiling: bool) -> torch.Tensor:
        theirs.use_tiling = tiling
        return theirs.encode(given).latent_dist.mode() if name == "encode" else theirs.decode(given).sample

    way: Callable = getattr(ours, name)
    ways = {"diffusers": lambda: foreign(False), "ours": lambda: way(given), "ours, tiled": lambda: way(given, tile=TILE),
            "diffusers, tiled": lambda: foreign(True)}
    peaks, results = {}, {}

    def measured(key: str) -> Callable[[], None]:
        def step() -> None:
            peaks[key] = max(peaks.get(key, 0), resident_peak(lambda: results.__setitem__(key, ways[key]())))

        return step

    table = show(interleaved({key: measured(key) for key in ways}, rounds, warmup=0, clock=process_time))
    head, line, *rows = table.split("\n")
    exact = results["ours"]
    more = [f" {peaks[key]:.0f} | {(value - exact).abs().max() / exact.abs().max():.0e} |" for key, value in results.items()]
    return "\n".join([f"{head} peak MB | furthest from ours, of its largest |", f"{line}---|---|",
                      *(row + extra for row, extra in zip(rows, more, strict=True))])


if __name__ == "__main__":
    main()
