"""Loading a model of Stable Diffusion 1.5's size (network, autoencoder, text encoder; random weights), beside the ways of
others.

    python -m benchmarks.loading [--rounds 3] [--folder logs/loading]

Writes the model once, as a folder of diffusers and as a checkpoint of CompVis' layout, and a tiny one of the same kind; then
each way loads it in a process of its own, in turns. "from the start" is from the start of the process to a model in eval mode,
which is what a user waits for; "load" is the call alone, after the tiny model was loaded once, so that all is imported;
"touched" adds reading a number of every page of the weights, for what is mapped is not read before. All in CPU
seconds, so that other programs on the same cores disturb little. Memory is what the process takes at most from then on, in
units of the file's size. CompVis' own code is not installed here: its way is torch.load, a network built with random weights,
and load_state_dict that copies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

WAYS = ("ldm, diffusers folder", "diffusers", "ldm, CompVis checkpoint", "CompVis' way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="logs/loading", help="where the model is kept (%(default)s); 8.6 GB")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder)
    if args.way:
        print(json.dumps(measure(args.way, folder)))
        return
    written(folder)
    from benchmarks.rounds import machine

    print(machine(), flush=True)
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            run = [sys.executable, "-m", "benchmarks.loading", "--folder", str(folder), "--way", way]
            printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
            found[way].append(json.loads(printed.splitlines()[-1]))
    print(table(found))


def written(folder: Path) -> None:
    """The models in both layouts, if they are not there."""
    write(folder / "tiny", tiny=True)
    write(folder)


def write(folder: Path, tiny: bool = False) -> None:
    import torch

    from ldm.bundle import Bundle
    from ldm.interop import compvis_published, compvis_writing, diffusers_writing
    from ldm.interop.compvis_configs import config_of

    if (folder / "model.ckpt").is_file() and (folder / "pipeline").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    yaml = compvis_published.stable_diffusion(1, inpainting=False)
    if tiny:
        yaml["model"]["params"]["unet_config"]["params"] |= {"model_channels": 32, "num_res_blocks": 1}
        yaml["model"]["params"]["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "num_res_blocks": 1}
    config, _ = config_of(yaml, text_shapes(), "sd.ckpt", folder)
    bundle = Bundle.from_config(config).to_empty(device="cpu")
    with torch.no_grad():
        for p in bundle.parameters():
            p.normal_(std=0.02)
    autoencoder = bundle.autoencoder
    autoencoder.shift.zero_()
    autoencoder.scale.fill_(1 / 0.18215)
    autoencoder.statistics_count.zero_()
    autoencoder.statistics_data.zero_()
    bundle.conditioner.vocabulary.hold(vocabulary())
    tensors, yaml = compvis_writing.write(bundle)
    torch.save({"state_dict": tensors, "global_step": 1}, folder / "model.ckpt")
    (folder / "model.yaml").write_text(json.dumps(yaml))
    diffusers_writing.write(bundle, folder / "pipeline")


def text_shapes() -> dict:
    """Names and shapes of CLIP ViT-L/14's text encoder."""
    import torch

    from ldm.conditioners.clip import ClipText
    from ldm.interop.rows import back
    from ldm.interop.text_names import hf_clip

    with torch.device("meta"):
        text = ClipText(vocabulary=None)
    return back(hf_clip(12, "cond_stage_model.transformer."), text.state_dict())


def vocabulary():
    """A tokenizer of CLIP's size: words without meaning."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}</w>": i for i in range(49406)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    made = Tokenizer(models.BPE(vocab=words, merges=[], end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    made.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return made


def measure(way: str, folder: Path) -> dict:
    """Seconds, megabytes and file size of one way, in this process."""
    from time import process_time

    source = folder / ("pipeline" if "diffusers" in way else "model.ckpt")
    load = loader(way)
    load(folder / "tiny" / source.name)
    imported, model, seconds = process_time(), [], []
    from benchmarks.memory import resident_peak

    def step() -> None:
        began = process_time()
        model.append(load(source))
        seconds.append(process_time() - began)

    def touch() -> None:
        began = process_time()
        for p in parameters(model[0]):
            float(p.flatten()[:: 4096 // p.element_size()].sum())  # a number of every page
        seconds.append(process_time() - began)

    peak = resident_peak(lambda: (step(), touch()))
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    return {"start": imported + seconds[0], "load": seconds[0], "touched": sum(seconds), "MB": peak,
            "file": sum(path.stat().st_size for path in files) / 1e6}  # fmt: skip


def parameters(model):
    from torch import nn

    parts = [model] if isinstance(model, nn.Module) else model.components.values()
    parts = [part for part in parts if isinstance(part, nn.Module)]
    return [p for part in parts for p in part.parameters()]


def loader(way: str) -> Callable[[Path], object]:
    """path -> model."""
    import logging

    logging.disable(logging.WARNING)
    if way == "diffusers":
        import ldm  # noqa: F401  (repairs torchvision, which diffusers then imports)

        # isort: split
        from diffusers import StableDiffusionPipeline

        return lambda path: StableDiffusionPipeline.from_pretrained(path)
    if way.startswith("ldm"):
        import ldm

        return ldm.load
    return compvis


def compvis(path: Path):
    import torch

    from ldm.bundle import Bundle
    from ldm.common.build import build
    from ldm.denoiser import build_denoiser
    from ldm.interop import compvis_models

    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    yaml = json.loads(path.with_suffix(".yaml").read_text())
    about, weights = compvis_models.read(saved, yaml, str(path))
    params = about["config"]["model"]["params"]
    autoencoder, conditioner = build(about["config"]["autoencoder"]), build(params["conditioner"])
    denoiser = build_denoiser(params["network"], build(params["process"]), "noise", autoencoder, conditioner)
    model = Bundle(autoencoder, conditioner, denoiser).eval()
    model.load_state_dict(weights, strict=False)
    return model


def table(found: dict[str, list[dict]]) -> str:
    """As Markdown; ratios within a round, of each of the others to ours in the same layout."""
    lines = ["| | from the start, s | load, s | touched, s | memory, MB | of the file "
             "| from the start, to ours | load | touched |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for i, (way, runs) in enumerate(found.items()):
        ours = found[WAYS[i - i % 2]]
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        ratios = []
        for key in ("start", "load", "touched"):
            each = [run[key] / mine[key] for run, mine in zip(runs, ours, strict=True)]
            ratios.append(f"x{statistics.median(each):.2f} [{min(each):.2f}-{max(each):.2f}]")
        lines.append(f"| {way} | {middle['start']:.2f} | {middle['load']:.2f} | {middle['touched']:.2f} | {middle['MB']:.0f} | "
                     f"{middle['MB'] / middle['file']:.2f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
