"""What a training is put together from: loaders, the first stage's autoencoder, caches, what checkpoints say of themselves."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.app.stages import Stage
from ldm.bundle import Bundle, versions
from ldm.callbacks.images import Panel, judged, reconstructions, samples
from ldm.common.build import build, plain
from ldm.common.config import Cache, Sampling, section
from ldm.common.files import UserError
from ldm.conditioners.base import entry
from ldm.conditioners.captions import STORED
from ldm.conditioners.prompts import reading
from ldm.data.loader import Placed, make_loader
from ldm.load import load, read

Tell = Callable[[str], None]
PICTURES = {"autoencoder": "reconstructions", "diffusion": "samples", "classifier": "judged"}  # folders of sheets, by the stage
SHOWN = 8  # reconstructions on a sheet
LINE = 10.0  # seconds between lines about a cache that is being made


def make_module(stage: Stage, autoencoder: nn.Module | None, size: tuple[int, int, int] | None) -> nn.Module:
    """The LightningModule of a stage. autoencoder: what stage 2 gets from the program; size: (C,H,W) of its pictures."""
    if stage.kind == "autoencoder":
        return build(stage.config["model"], seed=stage.seed)
    sampling = ({"size": list(size[1:])} if size else {}) | stage.sampling
    return build(stage.config["model"], autoencoder=autoencoder, seed=stage.seed, sampling=sampling,
                 size=list(size[1:]) if size else None)


def endless(stage: Stage, module: Any, dataset: Dataset) -> DataLoader:
    """From the picture on that the module has not seen."""
    return make_loader(dataset, seed=stage.seed, start=lambda: module.images_seen, **stage.config["loader"])


def one_pass(stage: Stage, dataset: Dataset | None, shuffle: bool = False) -> DataLoader | None:
    """Once through a data set, in its own order or shuffled by the seed."""
    if dataset is None:
        return None
    return make_loader(dataset, seed=stage.seed, shuffle=shuffle, infinite=False, **stage.config["loader"])


def autoencoder_of(stage: Stage, checkpoint: Path | None, trust: bool = False) -> tuple[nn.Module | None, dict | None]:
    """-> the autoencoder that stage 2 works with, and its block (what builds it anew, without weights); nothing for stage 1.

    checkpoint: a finished stage 1, or a stage 2 that goes on; None: what the config names. Raises UserError.
    trust: build what a checkpoint names even where it is neither ours nor in the config at hand.
    """
    if stage.kind == "autoencoder":
        return None, None
    source = stage.config["autoencoder"]
    checkpoint = None if stage.lora else checkpoint  # of which hold the changes alone
    if checkpoint is None and "target" in source:
        return build(source), source
    bundle = load_autoencoder(checkpoint or Path(source["ckpt"]), stage, trust)
    return bundle.autoencoder, block_of(bundle.config)


def load_autoencoder(path: Path, stage: Stage, trust: bool) -> Bundle:
    """A checkpoint that may name, besides ours, what this stage's own config (or stage 1's) names: no other code is run."""
    own = targets(stage.config) | (targets(stage.before.config) if stage.before else set())
    try:
        trust = trust or targets(read(path).about.get("config")) <= own
    except UserError:  # somebody else's file, or a damaged one: `load` reads it, or says what is wrong
        pass
    return load(path, trust=trust)


def targets(value: Any) -> set[str]:
    """All that a config names."""
    if isinstance(value, dict):
        named = {value["target"]} if isinstance(value.get("target"), str) else set()
        return named.union(*map(targets, value.values()))
    return set().union(*map(targets, value)) if isinstance(value, list) else set()


def autoencoder_block(stage: Stage, trust: bool = False) -> dict | None:
    """The block alone, before stage 1 is trained; None where the stage trains an autoencoder itself."""
    if stage.kind == "autoencoder":
        return None
    source = stage.config["autoencoder"]
    if stage.before is not None:
        return block_of(stage.before.config)
    return source if "target" in source else block_of(load_autoencoder(Path(source["ckpt"]), stage, trust).config)


def block_of(config: dict) -> dict:
    """The autoencoder in a config: at the top of a diffusion model's checkpoint, in an autoencoder's own model."""
    return config.get("autoencoder") or config["model"]["params"]["autoencoder"]


def describer(stage: Stage, block: dict | None) -> Callable[[Any], dict]:
    """-> module -> what its checkpoint says of itself: kind, config, sampling, versions, hashes."""
    config = stage.config if block is None else {**stage.config, "autoencoder": block}

    def describe(module: Any) -> dict:
        if stage.kind == "classifier":
            own = {"autoencoder_hash": module.autoencoder.content_hash(), "data": stage.train.fingerprint}
            return plain({"kind": stage.kind, "config": config, "versions": versions(), **module.classifier().about, **own})
        alone = stage.kind == "autoencoder"
        bundle = Bundle(getattr(module, "best", module.autoencoder)) if alone else bundle_of(module)
        bundle.config, bundle.about = config, {"data": stage.train.fingerprint}
        base = {"kind": "lora", "base": {"path": str(stage.init_from), "hash": stage.init_key}} if stage.lora else {}
        return bundle.describe() | base

    return describe


def bundle_of(module: Any) -> Bundle:
    """What a diffusion module samples with now: its averaged weights. The tensors are shared, not copied."""
    return Bundle(**module.parts(ema=True), sampling=module.sampling)


def originals(stage: Stage) -> Tensor:  # (N,C,H,W)
    """The pictures whose reconstructions are looked at: the first of the validation data, else of the training data."""
    dataset = stage.validation or stage.train
    return torch.stack([dataset[i]["image"] for i in range(min(SHOWN, len(dataset)))])


def prompts(stage: Stage) -> list[str]:
    """What is drawn on sheets: the config's prompts, else captions of the validation or training data."""
    sampling, dataset = section(stage.config, Sampling), stage.validation or stage.train
    texts = sampling.prompts or [dataset.caption(i) for i in range(min(sampling.count, len(dataset)))]
    return list(islice(cycle(texts), max(sampling.count, len(sampling.prompts or []))))


def shown(stage: Stage) -> dict:
    """The batch that sheets are drawn for: the captions of ``prompts``, and what else the items of the validation or training
    data hold, the first ones again and again, as a run would begin with them."""
    captions, dataset = prompts(stage), stage.validation or stage.train
    placed = Placed(dataset, stage.seed)
    batch = default_collate([placed[(i, i % len(dataset))] for i in range(len(captions))])
    return {key: value for key, value in batch.items() if key not in ("key", "position")} | {"caption": captions}


def prepared(stage: Stage, module: Any, logdir: str | Path, device: torch.device, tell: Tell
             ) -> tuple[Dataset, Dataset | None, Callable[[Any], Panel]]:
    """-> training data, validation data, and what sheets show: from caches where the config says so."""
    if stage.kind == "autoencoder":
        return stage.train, stage.validation, reconstructions(originals(stage))
    train, validation, batch = cached(stage, module, logdir, device, tell)
    if stage.kind == "classifier":
        pictures, dataset = originals(stage), stage.validation or stage.train
        items = default_collate([dataset[i] for i in range(len(pictures))])
        return train, validation, judged(pictures, entry(items, module.key, module))
    return train, validation, samples(batch, bundle_of)


def finish(stage: Stage, module: Any) -> str:
    """What is left to do after the last step, and a line about it. All ranks have to call."""
    if stage.kind != "autoencoder":
        return f"{stage.label}: {module.images_seen:,} images seen"
    try:
        measured = module.measure_statistics(one_pass(stage, stage.train, shuffle=True), fingerprint=stage.train.fingerprint)
    except ValueError as error:  # a channel without any variance
        raise UserError(f"{stage.label}: {error}") from error
    unused = measured["collapsed"]
    note = (f"; in channels {unused} less than a tenth of the variance tells pictures apart, the rest is noise (a lower kl "
            "weight keeps them)") if unused else ""
    return (f"{stage.label}: {in_words(measured)}; stored with the autoencoder, which from now on draws them with mean 0 and "
            f"deviation 1{note}")


def in_words(measured: dict) -> str:
    """What `autoencoder.statistics.measure` gave."""
    mean, std = (", ".join(f"{value:.3g}" for value in measured[name]) for name in ("mean", "std"))
    return f"latents of {measured['count']:,} images have mean {mean} and standard deviation {std} by channel"


def cached(stage: Stage, module: Any, logdir: str | Path, device: torch.device, tell: Tell
           ) -> tuple[Dataset, Dataset | None, dict]:
    """-> training and validation data, with what the config wants computed once taken from disk (and put there first), and
    the batch of prompts for sheets. The module is moved to `device`. Each rank makes its share of the cache."""
    wanted, batch = section(stage.config, Cache), shown(stage)
    key = getattr(module.conditioner, "states_hash", None) if wanted.text else None
    encodes = module.conditioner.encode if key else None
    if wanted.text and not key and hasattr(module.conditioner, "encode"):
        tell(f"{stage.label}: text states are not kept: what makes them is trained")
    wanted = replace(wanted, text=wanted.text and encodes is not None)
    if not (wanted.latents or wanted.text):
        return stage.train, stage.validation, batch
    disk = import_module("autoencoder.cached")  # by name: ldm knows no concrete part of stage 1
    root, workers = wanted.dir or Path(logdir) / "cache", stage.config["loader"].get("workers", 0)
    module.to(device)

    def stored(dataset: Dataset) -> Dataset:
        latents = texts = None
        if wanted.latents:
            latents = disk.write_latents(dataset, module.autoencoder, root, device=device, workers=workers,
                                    progress=_pace(tell, f"{stage.label}: latents"))  # fmt: skip
        if wanted.text:
            texts = disk.write_text(dataset, encodes, key, root,
                               progress=_pace(tell, f"{stage.label}: text states"))  # fmt: skip
        return disk.CachedDataset(dataset, latents, texts)

    tell(f"{stage.label}: what is computed once ({' and '.join(_names(wanted))}) is kept in {root}")
    train, validation = stored(stage.train), None if stage.validation is None else stored(stage.validation)
    if wanted.text:
        with reading(module.conditioner, stage.sampling.get("prompt_weights")):
            batch |= dict(zip(STORED, encodes(batch["caption"]), strict=False))
        conditioners = [part for part in module.modules() if hasattr(part, "null_states")]  # the averaged one as well
        for part in conditioners:
            part.null_states()  # guidance compares with it
        module.conditioner.release()
    return train, validation, batch


def _names(wanted: Cache) -> list[str]:
    return [name for name, on in (("latents", wanted.latents), ("text states", wanted.text)) if on]


def _pace(tell: Tell, label: str) -> Callable[[int, int], None]:
    """-> (done, total) -> a line now and then about how long the rest takes."""
    began = last = monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = monotonic()
        if now - last >= LINE and done < total:
            last = now
            tell(f"{label}: {done:,} of {total:,}, about {(total - done) * (now - began) / done:.0f} s left")
        elif done >= total:
            tell(f"{label}: {total:,} made in {now - began:.0f} s")

    return progress
