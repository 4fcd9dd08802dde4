"""What the commands that use a model have in common: their arguments, and a model from them."""

from __future__ import annotations

import argparse
import logging
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.common.files import UserError

if TYPE_CHECKING:
    import torch

    from ldm.bundle import Bundle

log = logging.getLogger(__name__)
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # name -> of torch's type


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="checkpoint (.ckpt, .safetensors) or run folder")
    parser.add_argument("--config", metavar="YAML", help="config to compare with the one in the checkpoint")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ...; default: cuda where it is")
    parser.add_argument("--precision", choices=PRECISIONS, help="of conditioner and network; default: as saved")
    parser.add_argument("--autoencoder-precision", choices=PRECISIONS,
                        help="default: as saved, whatever --precision says; some autoencoders overflow in half")
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not the averaged ones")
    parser.add_argument("--trust", action="store_true", help="run code that the checkpoint's config names")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    stored = "default: as stored with the model"
    parser.add_argument("--lora", nargs="+", default=[], metavar="FILE[:W]",
                        help="LoRA files, or runs that trained one, which are merged into the model, each with its weight (1)")
    parser.add_argument("--steps", type=positive, metavar="N", help=stored)
    parser.add_argument("--sampler", metavar="NAME", help=f"name, or name:option=value,option=value; {stored}")
    parser.add_argument("--times", metavar="NAME|LIST",
                        help=f"how times are spaced: name (with options as above), or the times themselves, 1,0.7,0; {stored}")
    parser.add_argument("--eta", type=float, metavar="E", help="share of fresh noise, for samplers that have this option")
    parser.add_argument("--scale", type=float, metavar="S", help=f"of guidance, 1: none; {stored}")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help=f"guide at these times of the noise process alone; {stored}")
    parser.add_argument("--rescale", type=float, metavar="PHI",
                        help=f"share in which guided predictions get back their standard deviation, 0..1; {stored}")


def sampling_of(args: argparse.Namespace) -> dict:
    """The arguments of `generate` that sampling_arguments asks for, names checked; None where nothing was said."""
    from ldm.common.named import parse, problems

    sampler, times = (None if text is None else parse(text) for text in (args.sampler, args.times))
    if args.eta is not None:
        if sampler is None:
            raise UserError("--eta: give --sampler too, such as --sampler ddim --eta 0.5")
        sampler = ({"name": sampler} if isinstance(sampler, str) else sampler) | {"eta": args.eta}
    if sampler or times:
        from ldm.samplers import SAMPLERS
        from ldm.times import TIMES

        wrong = [] if sampler is None else problems(sampler, SAMPLERS, "--sampler")
        wrong += [] if times is None or isinstance(times, list) else problems(times, TIMES, "--times")
        if wrong:
            raise UserError("; ".join(wrong))
    low, high = args.guidance_interval or (None, None)
    guidance = {"scale": args.scale, "low": low, "high": high, "rescale": args.rescale}
    guidance = {key: value for key, value in guidance.items() if value is not None}
    return {"sampler": sampler, "steps": args.steps, "times": times, "guidance": guidance or None}


def lora_of(text: str) -> tuple[str, float]:
    """FILE[:weight] -> file, weight. UserError where the weight is no number."""
    path, colon, weight = text.rpartition(":")
    if not colon or (Path(text).exists() and not Path(path).exists()):
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise UserError(f"--lora {text}: the weight after the colon has to be a number, such as {path}:0.8") from error


def load_model(args: argparse.Namespace, draws: bool = True) -> Bundle:
    """The model that model_arguments names. UserError where it `draws` nothing and has to."""
    from ldm.load import load

    device, began = pick_device(args.device), time.perf_counter()
    bundle = load(args.ckpt, args.config, ema=not args.no_ema, device=device,
                  dtype=dtype_of("--precision", args.precision, device), trust=args.trust)  # fmt: skip
    bundle.lay_out()
    own = dtype_of("--autoencoder-precision", args.autoencoder_precision, device)
    if own is not None:
        bundle.autoencoder.to(own)
    if getattr(args, "lora", None):
        from ldm import lora

        for path, weight in map(lora_of, args.lora):
            lora.apply(bundle, path, weight)
    if draws and bundle.denoiser is None:
        raise UserError(f"{args.ckpt}: holds an autoencoder alone; that of a diffusion model (stage 2) is needed")
    log.info("%s: loaded in %.1f s, on %s", args.ckpt, time.perf_counter() - began, device)
    return bundle


def dtype_of(flag: str, name: str | None, device: torch.device) -> torch.dtype | None:
    """What a precision is in torch; None: as saved. A CPU computes with float16 slowly and coarsely, if at all: it takes
    float32, and that is told."""
    import torch

    if name == "fp16" and device.type == "cpu":
        log.warning("%s fp16: computed in fp32 on the CPU, which is faster there and loses nothing", flag)
        name = "fp32"
    return getattr(torch, PRECISIONS[name]) if name in PRECISIONS else None


def pick_device(name: str | None) -> torch.device:
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:  # of several processes on a machine each has its own
        own = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) if has["cuda"] else 0
        cuda = f"cuda:{own % torch.cuda.device_count()}" if own else "cuda"
        return torch.device(cuda if has["cuda"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; there are {', '.join(k for k in has if has[k])}") from error
    if not has.get(device.type, True) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device {name}: not on this machine; there are {', '.join(k for k in has if has[k])}")
    return device


@contextmanager
def enough_memory():
    """A device that is full is told in a line, with what helps."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("the device's memory is full; try a smaller --batch-size or size, --precision bf16, --tile 256 "
                        "(txt2img, reconstruct), or --device cpu") from error


def precision_name(bundle: Bundle, part: str = "denoiser") -> str:
    """Of the part's weights, as --precision spells it."""
    module = getattr(bundle, part)
    kind = str(module.dtype if part == "autoencoder" else next(module.parameters()).dtype).removeprefix("torch.")
    return {full: short for short, full in PRECISIONS.items()}.get(kind, kind)
