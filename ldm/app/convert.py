"""A model in another program's layout, or in ours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.app.models import PRECISIONS
from ldm.common.files import UserError, atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.bundle import Bundle

SUMMARY = "Write a model in the layout of another program (CompVis, diffusers, guided-diffusion, DiT), or in ours."
LAYOUTS = {  # name -> what --out names
    "ldm": "a .safetensors or .ckpt of this program", "compvis": "a .ckpt or .safetensors; its yaml is written beside it",
    "diffusers": "a new folder", "adm": "a .pt of guided-diffusion; its arguments are written beside it",
    "dit": "a .pt of DiT or SiT; its arguments are written beside it",
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="whatever `ldm.load` reads")
    parser.add_argument("--config", metavar="YAML", help="of a checkpoint of another program")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="; ".join(f"{k}: {v}" for k, v in LAYOUTS.items()))
    parser.add_argument("--out", required=True, metavar="PATH", help="what is written; see --to")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the network and the text encoder; default: as they are")
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not the averaged ones")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there (never a folder)")
    parser.add_argument("--trust", action="store_true", help="run code that the checkpoint's config names")


def run(args: argparse.Namespace) -> None:
    import torch

    from ldm.load import load

    out = Path(args.out)
    files = [out] + [out.with_suffix(kind) for layout, kind in (("compvis", ".yaml"), ("adm", ".json"), ("dit", ".json"))
                     if layout == args.to]  # fmt: skip
    for file in files:
        if file.exists() and (not args.overwrite or file.is_dir()):
            raise UserError(f"{file}: is there already; give another --out" + ", or --overwrite to replace it" * file.is_file())
    _check_name(out, args.to)
    dtype = getattr(torch, PRECISIONS[args.precision]) if args.precision else None
    bundle = load(args.ckpt, args.config, ema=not args.no_ema, dtype=dtype, trust=args.trust)
    WRITERS[args.to](bundle, out)
    parts = {name: sum(p.numel() for p in part.parameters()) for name in ("autoencoder", "conditioner", "denoiser")
             if (part := getattr(bundle, name)) is not None}  # fmt: skip
    print(f"{out}: " + ", ".join(f"{name} {count:,} parameters" for name, count in parts.items()))


def _check_name(out: Path, layout: str) -> None:
    either, pickled = (".safetensors", ".ckpt"), (".pt",)
    wanted = {"ldm": either, "compvis": either[::-1], "adm": pickled, "dit": pickled}.get(layout)
    if wanted and out.suffix not in wanted:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(wanted)}")
    if layout == "diffusers" and out.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        raise UserError(f"--out {out}: expected the name of a new folder")


def _ldm(bundle: Bundle, out: Path) -> None:
    bundle.save(out)


def _compvis(bundle: Bundle, out: Path) -> None:
    from omegaconf import OmegaConf

    from ldm.interop import compvis, compvis_writing

    tensors, yaml = (compvis if bundle.denoiser is None else compvis_writing).write(bundle)
    _tensors(out, {"state_dict": tensors} if out.suffix == ".ckpt" else tensors)
    _text(out.with_suffix(".yaml"), OmegaConf.to_yaml(OmegaConf.create(yaml)))
    if bundle.denoiser is not None:
        compvis_writing.write_tokenizer(bundle, out.parent)


def _diffusers(bundle: Bundle, out: Path) -> None:
    from ldm.interop import diffusers_writing

    diffusers_writing.write(bundle, out)


def _adm(bundle: Bundle, out: Path) -> None:
    from ldm.interop import adm

    _with_arguments(bundle, out, adm.write)


def _dit(bundle: Bundle, out: Path) -> None:
    from ldm.interop import dit

    _with_arguments(bundle, out, dit.write)


def _with_arguments(bundle: Bundle, out: Path, write: Callable[[Bundle], tuple[dict[str, Tensor], dict]]) -> None:
    if bundle.denoiser is None:
        raise UserError("an autoencoder alone; this layout is of diffusion models")
    tensors, said = write(bundle)
    _tensors(out, tensors)
    _text(out.with_suffix(".json"), json.dumps(said, indent=1) + "\n")


WRITERS = {"ldm": _ldm, "compvis": _compvis, "diffusers": _diffusers, "adm": _adm, "dit": _dit}


def _tensors(out: Path, tensors: dict) -> None:
    import torch
    from safetensors.torch import save_file

    with atomic_write(out) as temporary:
        if out.suffix == ".safetensors":
            save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, temporary, {"format": "pt"})
        else:
            torch.save(tensors, temporary)


def _text(out: Path, text: str) -> None:
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
