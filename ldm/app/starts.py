"""Where a training begins: at the weights of a model (--init-from), at step 0 and with a new optimizer. And how LoRA ends."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm import lora
from ldm.adapters import fill, plain
from ldm.app.parts import targets
from ldm.app.stages import Stage, is_name
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.common.weights import compare, required
from ldm.interop.lora_files import WEIGHTS
from ldm.load import kind, load, read

log = logging.getLogger(__name__)


def check_names(postfix: str | None) -> None:
    """UserError for an ending that would put a run folder elsewhere."""
    if postfix is not None and not is_name(postfix):
        raise UserError(f"--postfix: expected an ending for a folder's name, got {postfix!r}")


def placed(stages: Sequence[Stage], resumed: bool) -> list[Stage]:
    """The stages, of which one begins with the model that the config's `init_from` names: the one that trains such a model. A
    diffusion model brings its autoencoder, so that no first stage is trained for it.

    resumed: a run that goes on by its name, which needs that model for LoRA alone. UserError where nothing fits.
    """
    *_, last = stages
    path = last.config.get("init_from")
    if path is None or (resumed and not last.lora):
        if last.lora and path is None:
            raise UserError("model.params.lora changes a given model: name it, --init-from RUN_OR_CHECKPOINT")
        return list(stages)
    found, others = kind(path), {key: value for key, value in last.config.items() if key != "init_from"}
    if found == last.kind == "diffusion" and last.before is not None:
        return [replace(last, config={**last.config, "autoencoder": {"ckpt": path}}, before=None, number=1, count=1)]
    if found == last.kind == "diffusion" or (last.kind == "autoencoder" and found != "lora"):
        return list(stages)
    if found == "autoencoder" and last.before is not None and not last.lora:
        first = replace(last.before, config={**last.before.config, "init_from": path})
        return [first, replace(last, config=others, before=first)]
    raise UserError(f"--init-from {path}: holds {'an' if found[0] == 'a' else 'a'} {found} model, and this config trains a "
                    f"{last.kind} model; " + ("to train on its latents: autoencoder={ckpt: " + str(path) + "}"
                                              if found == "autoencoder" else "give the config of such a model"))  # fmt: skip


def outline(stage: Stage, trust: bool) -> tuple[Bundle, bool]:
    """The model that a stage begins with, without contents, and whether its file keeps averaged weights. No other code is run
    than this config names."""
    found = read(stage.init_from)
    trust = trust or targets(found.about.get("config")) <= targets(stage.config)
    return Bundle.from_config(found.about["config"], about=found.about, trust=trust), found.has_ema


def parts_of(module: Any) -> dict[str, nn.Module]:
    """What is trained, by the names of a Bundle."""
    return {"autoencoder": module.autoencoder} if not hasattr(module, "model") else dict(module.model.items())


def misfits(stage: Stage, module: Any, bundle: Bundle) -> list[str]:
    """Why a module cannot begin with this model, in one line at most."""
    told = []
    for name, part in parts_of(module).items():
        given = getattr(bundle, name, None)
        if given is None:
            told.append(f"{name}: it has none")
        elif problem := compare(*({f"{name}.{key}": value for key, value in required(one, plain(one.state_dict())).items()}
                                  for one in (part, given))):
            told.append(problem)
    conditioner = parts_of(module).get("conditioner")
    expected, found = bundle.about.get("encoder_hash"), getattr(conditioner, "encoder_hash", None) if not told else None
    if expected and found and expected != found:
        told.append(f"conditioner: its text encoder has the hash {expected}, this config's {found}")
    return [f"--init-from {stage.init_from}: it is not the model of this config: {'; '.join(told)}; give the config that it "
            "was trained with (its run folder has it); --resume goes on with a run"] if told else []  # fmt: skip


def begin(stage: Stage, module: Any, trust: bool) -> str:
    """Puts the model's weights into a module, and into its averages; gives back a line about it. UserError where they do not
    fit."""
    sketch, averaged = outline(stage, trust)
    for line in misfits(stage, module, sketch):
        raise UserError(line)
    bundle, counts = load(stage.init_from, trust=True), []  # what it names is known by now
    for name, part in parts_of(module).items():
        weights = getattr(bundle, name).state_dict()
        fill(part, weights)
        counts.append(f"{name} ({len(weights)} tensors)")
    whole = module.autoencoder if not hasattr(module, "model") else module.model
    if bundle.denoiser is not None and whole is not module.autoencoder:
        hashes = [model.content_hash() for model in (bundle.autoencoder, module.autoencoder)]
        if hashes[0] != hashes[1]:
            log.warning("%s was trained on the latents of another autoencoder (hash %s) than this config names (hash %s); to "
                        "keep its own: autoencoder={ckpt: %s}", stage.init_from, *hashes, stage.init_from)
    for ema in (module.ema, *(getattr(module, "averages", None) or ())):
        if ema is not None:
            ema.shadow.load_state_dict(whole.state_dict())
    what = "frozen, under adapters that are trained" if stage.lora else "step 0, new optimizer"
    which = "averaged (EMA) weights" if averaged else "weights, of which there is one set,"
    return f"{stage.label}: begins with the {which} of {stage.init_from}: {', '.join(counts)}; {what}"


def checked(stages: Sequence[Stage], modules: Sequence[Any], trust: bool) -> list[str]:
    """What is in the way of beginning so, before anything is written. modules: of the stages; without contents will do."""
    problems = []
    for stage, module in zip(stages, modules, strict=True):
        if stage.init_from is not None:
            problems += misfits(stage, module, outline(stage, trust)[0])
    return problems


def write_lora(module: Any, folder: Path) -> Path:
    """What a LoRA training has learned, its averages if there are any, as diffusers loads it."""
    parts = module.parts(ema=True)
    lora.save(parts["denoiser"], parts["conditioner"], folder / WEIGHTS)
    return folder / WEIGHTS
