"""What a training refuses: latents of the wrong scale, another autoencoder under a run that goes on, code that nobody named."""

from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ldm.app.parts import Tell, in_words, load_autoencoder, one_pass
from ldm.app.runs import Job, finished, stage1_key
from ldm.app.stages import Stage
from ldm.common.build import build, plain
from ldm.common.files import OnAllRanks, UserError
from ldm.data.loader import make_loader
from ldm.load import read

BATCHES, IMAGES = 4, 64  # of a rank: the first so many of both, whichever is more, are looked at


def settle_latents(stage: Stage, module: Any, device: torch.device, resumed: bool, tell: Tell) -> None:
    """Before stage 2 trains (or a cache is made): the autoencoder's statistics are measured on the training data where the
    module says so, then the latents of the first batches are looked at. All ranks have to call, and all decide alike.

    A run that goes on (`resumed`) keeps the statistics in its checkpoint. UserError for latents of the wrong scale.
    """
    if stage.kind == "autoencoder":
        return
    autoencoder = module.autoencoder.to(device)
    statistics = import_module("autoencoder.statistics")  # by name: ldm knows no concrete part of stage 1
    fingerprint = stage.train.fingerprint
    try:
        if module.measures and not resumed:
            loader = one_pass(stage, stage.train, shuffle=True)
            measured = statistics.measure(autoencoder, loader, fingerprint=fingerprint)
            tell(f"{stage.label}: the autoencoder's statistics were not known and are measured now: {in_words(measured)}")
        first = make_loader(stage.train, stage.batch_size, seed=stage.seed)
        batches = islice(first, max(BATCHES, -(-IMAGES // stage.batch_size)))
        found = module.verify(batches, statistics.data_hash(fingerprint))
    except ValueError as error:
        raise OnAllRanks(f"{stage.label}: {error}") from error
    tell(f"{stage.label}: latents of the first {found.pictures} images have standard deviation {found.std:.3f} and mean "
         f"{found.mean:.3f}")


def keeps_autoencoder(job: Job, stage: Stage, module: Any, logdir: str | Path, trust: bool = False) -> None:
    """UserError, with both hashes, where a stage 2 goes on under a config that names another autoencoder than the one in
    its checkpoint, which the module has got."""
    if stage.kind == "autoencoder" or job.action != "resume" or stage.latents_key is not None or stage.lora:
        return  # the last: its own run folder says all about it, and names no other
    own, source = module.autoencoder, stage.config["autoencoder"]
    origin = next(f"{key}: {source[key]}" for key in ("config", "ckpt", "target") if key in source)
    if "target" in source:
        before = read(job.checkpoint).about["config"]["autoencoder"]
        other = None if plain(source) == plain(before) else build(source)
    elif "ckpt" in source:
        other = load_autoencoder(Path(source["ckpt"]), stage, trust).autoencoder
    else:
        run = finished(logdir, stage.autoencoder_key)
        trained_on = stage1_key(job)
        if run is None and trained_on not in (None, stage.autoencoder_key):
            raise UserError(f"{_refusal(job)} comes from another stage 1 than autoencoder.{origin} now describes (hash of its "
                            f"config and data {trained_on}, now {stage.autoencoder_key}); {_ways_out()}")
        other = None if run is None else load_autoencoder(run, stage, trust).autoencoder
    if other is None:
        return
    spec, same_kind = own.spec, other.shift.shape == own.shift.shape
    if same_kind and (not other.spec.count or module.statistics == "measure"):  # measured in this run, not by its origin
        other.set_statistics(spec.shift, spec.scale, spec.count, spec.data_hash)
    hashes = own.content_hash(), other.content_hash()
    if hashes[0] != hashes[1]:
        raise UserError(f"{_refusal(job)} has the hash {hashes[0]}, but autoencoder.{origin} is now one with the hash "
                        f"{hashes[1]}; {_ways_out()}")


def _refusal(job: Job) -> str:
    return f"--resume: the autoencoder that {job.checkpoint} was trained with"


def _ways_out() -> str:
    return ("a diffusion model draws only in the latents that it was trained on: name the former autoencoder (--resume RUN "
            "without --base keeps a stage 1), or train anew without --resume")
