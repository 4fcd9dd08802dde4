"""Another average of the weights of a finished run, from the snapshots that it kept (EDM2, 2312.02696, section 3.2)."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Make a model whose weights are averaged over any share of the training, after the fact."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="RUN", help="run folder that was trained with model.params.snapshots")
    parser.add_argument("--width", required=True, type=float, metavar="S",
                        help="standard deviation of the average as a share of the training, 0.01 to 0.28 (sigma_rel of EDM2)")
    parser.add_argument("--step", type=int, metavar="N", help="as if training had ended at this snapshot; default: at the last")
    parser.add_argument("--out", required=True, metavar="FILE", help="the model, .safetensors or .ckpt")
    parser.add_argument("--trust", action="store_true", help="build what the checkpoint names outside of this program too")


def run(args: argparse.Namespace) -> None:
    from ldm.common.ema import gamma_of, reconstruct
    from ldm.common.files import UserError
    from ldm.load import load

    try:
        gamma_of(args.width)
    except ValueError as error:
        raise UserError(f"--width: {error}") from error
    weights = reconstruct(Path(args.ckpt).glob("averages/*.safetensors"), args.width, args.step)
    bundle = load(args.ckpt, trust=args.trust)
    known = bundle.state_dict()
    strangers = [name for name, value in weights.items() if name not in known or known[name].shape != value.shape]
    if strangers:
        raise UserError(f"{args.ckpt}: its snapshots are of another model: {len(strangers)} weights differ, {strangers[0]} ...")
    bundle.load_state_dict(weights, strict=False)
    bundle.save(args.out)
    print(f"{args.out}: {len(weights)} weights averaged with width {args.width:g}")
