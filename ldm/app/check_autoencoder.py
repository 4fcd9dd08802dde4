"""Does an autoencoder keep what every autoencoder promises? Any class that can be imported, the current folder included."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.app.models import positive
from ldm.common.files import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

SUMMARY = "Check that an autoencoder keeps the contract: shapes, scale, gradients, copies, files ..."
KEY = "autoencoder"  # what errors call the class and its params


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar="PACKAGE.MODULE:CLASS", help="a class, or a function that makes one")
    parser.add_argument("--params", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the constructor")
    parser.add_argument("--config", metavar="YAML", help="take class and arguments from a config of either stage")
    parser.add_argument("--ckpt", metavar="PATH", help="take class, arguments and weights from a checkpoint")
    parser.add_argument("--trust", action="store_true", help="run code that the checkpoint's config names")
    parser.add_argument("--size", type=positive, metavar="N",
                        help="side of the pictures that it is tried on, made a multiple of the factor; default: small")


def run(args: argparse.Namespace) -> int:
    """0 where every promise is kept, else 1."""
    from importlib import import_module

    from ldm.common.build import build

    if sum(source is not None for source in (args.target, args.config, args.ckpt)) != 1:
        raise UserError("which autoencoder? give one of PACKAGE.MODULE:CLASS, --config and --ckpt")
    block, state = described(args)
    contract = import_module("autoencoder.contract")  # by name: ldm knows autoencoder.base alone
    results = contract.check(lambda: build(block), args.size, state, also=[in_a_file(block)])
    print("\n".join(report(block, results)))
    return int(any(result.status == "FAILED" for result in results))


def described(args: argparse.Namespace) -> tuple[dict, Mapping[str, Tensor] | None]:
    """The block (target, params) of the autoencoder, and its weights where a checkpoint has them. UserError for every
    mistake in it."""
    from ldm.common.build import check, plain
    from ldm.common.config import load, merge

    given, state = plain(load([], args.params)), None
    if args.target:
        block = {"target": args.target.replace(":", ".")}
    elif args.config:
        block = block_in(plain(load([args.config])), args.config)
    elif given:
        raise UserError(f"--params {args.params[0]}: a checkpoint has its own; they go with a class or --config")
    else:
        from ldm.load import load as load_model

        bundle = load_model(args.ckpt, trust=args.trust)
        block, state = block_in(bundle.config or {}, args.ckpt), bundle.autoencoder.state_dict()
    block = {**block, "params": merge(block.get("params") or {}, given)}
    if mistakes := check(block, KEY):
        raise UserError("; ".join(mistakes))
    return block, state


def block_in(config: dict, where: str) -> dict:
    """The autoencoder's block in a config: of stage 1, of stage 2 (or in the stage 1 that it names), or alone."""
    from ldm.common.build import is_block, plain
    from ldm.common.config import load

    source = config.get("autoencoder") or ((config.get("model") or {}).get("params") or {}).get("autoencoder")
    if isinstance(source, dict) and isinstance(source.get("config"), str):
        return block_in(plain(load([source["config"]])), source["config"])
    found = next((block for block in (source, config) if is_block(block)), None)
    if found is None:
        raise UserError(f"{where}: no autoencoder in it; expected autoencoder or model.params.autoencoder, a block (target, "
                        "params)")  # fmt: skip
    return found


def in_a_file(block: dict) -> object:
    """The promise that a saved model is loaded again by what is in its file."""
    from importlib import import_module
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import torch

    from ldm.bundle import Bundle
    from ldm.load import load

    trial = import_module("autoencoder.trial")

    @torch.no_grad()
    def keep(case) -> str:
        model = case.model()
        config = {"model": {"target": "autoencoder.lit.AutoencoderModule", "params": {"autoencoder": block}}}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            Bundle(model, config=config).save(path)
            loaded = load(path, trust=True).autoencoder
        x = case.pictures(model)
        gap = trial.far(model.encode(x), loaded.encode(x))  # of rounding: weights may lie otherwise in memory
        kept = loaded.content_hash() == model.content_hash() and gap < trial.SMALL
        trial.expect(kept, "the model that ldm.load makes of its file encodes otherwise, or has another content_hash",
                     "what outputs depend on belongs into the constructor's arguments, parameters and buffers")
        return "Bundle.save and ldm.load give the same model back"

    return trial.Promise("file", keep, needs="made without contents")


def report(block: dict, results: Sequence) -> list[str]:
    """A line for each promise, and one about them all."""
    width = max(len(result.name) for result in results)
    lines = [f"{result.status:9} {result.name:{width}}  {result.told}" for result in results]
    counts = {status: sum(result.status == status for result in results) for status in ("ok", "note", "FAILED", "not tried")}
    return [block["target"], *lines, ", ".join(f"{count} {status}" for status, count in counts.items() if count)]
