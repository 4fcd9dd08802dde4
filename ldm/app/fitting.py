"""What of a stage does not fit together though each part can be made: the optimizer and what it trains, times and process,
guidance and dropout, what the conditioner reads and what the data holds. Found before anything is written."""

from collections.abc import Iterator
from pathlib import Path
from traceback import extract_tb
from typing import Any

from torch import nn

from ldm.app.stages import Stage
from ldm.common.build import build, near
from ldm.common.config import Sampling, section
from ldm.common.optim import make_optimizer
from ldm.conditioners.wants import wants_of
from ldm.times import make_times

PARAMS = "model.params"


def misfits(stage: Stage, module: Any) -> list[str]:
    """module: of the stage, without contents. It may be somebody's own, of which not all of this is known."""
    found = [*_optimizers(stage, module)]
    if stage.kind == "diffusion":
        found += [*_times(stage, module), *_guidance(stage, module.conditioner)]
    if stage.train is not None and stage.kind != "autoencoder":
        found += _data(stage, module)
    return found


def in_words(error: Exception) -> str:
    """One line about what the making of a model ran into: ours say it all, others are told with their place."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError):
        return line
    frames = [frame for frame in extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"model: cannot be made as its numbers say: {type(error).__name__}: {line[:300]}{place}"


def _optimizers(stage: Stage, module: Any) -> Iterator[str]:
    trained = {"optimizer": getattr(module, "trained", None), "critic_optimizer": getattr(module, "critic", None)}
    for name, part in trained.items():
        block = getattr(module, name, None)
        try:
            if isinstance(part, nn.Module) and block is not None:
                make_optimizer(block, part)
        except Exception as error:  # whatever a constructor of torch's, or somebody's own, says of its arguments
            yield f"{PARAMS}.{name}: {error}"
    block, steps = getattr(module, "schedule", None), stage.trainer.get("max_steps")
    if block is not None:
        try:
            float(build(block, total=steps if isinstance(steps, int) and steps > 0 else None)(0))
        except Exception as error:  # the same
            yield f"{PARAMS}.schedule: expected what gives a number for each step: {error}"


def _times(stage: Stage, module: Any) -> Iterator[str]:
    asked = section(stage.config, Sampling)
    try:
        make_times(asked.times, module.model["denoiser"].process, asked.steps)
    except ValueError as error:
        yield f"sampling.times: {error}"


def _guidance(stage: Stage, conditioner: Any) -> Iterator[str]:
    """What guidance leads away from has to be known, from this training or the one that it goes on from."""
    said = (stage.config.get("sampling") or {}).get("guidance")
    scale = said.get("scale", 1) if isinstance(said, dict) else said
    tells = conditioner is not None and (conditioner.width is not None or conditioner.vector_width is not None)
    if scale is not None and scale != 1 and tells and not conditioner.has_null and stage.init_from is None:
        yield (f"sampling.guidance: {scale:g} compares with the empty condition, which {PARAMS}.conditioner never shows the "
               "network: set its dropout, to 0.1 for example, or guidance: 1")  # fmt: skip


def _data(stage: Stage, module: Any) -> Iterator[str]:
    """The conditioner's wants, and a classifier's key, against the first item and the data set's numbers of classes."""
    conditioner, item = getattr(module, "conditioner", None), stage.train[0]
    wanted = {want.key: want.classes for want in wants_of(conditioner) or ()
              if want.needed and want.default is None and want.instead is None}  # fmt: skip
    owner = type(conditioner).__name__
    if stage.kind == "classifier":
        owner, network = type(module).__name__, module.classifier(ema=False).network
        wanted[module.key] = getattr(network, "classes", None)
    for key, classes in wanted.items():
        there = getattr(stage.train, "classes", {}).get(key)
        if key not in item:
            yield (f"data.train: items have no {key!r}, which {owner} reads{near(key, item)}; they hold {', '.join(item)}; "
                   "ldm.data.annotations, .drawn and .boxes add to them")  # fmt: skip
        elif classes is not None and there is not None and there > classes:
            yield f"classes: {classes} for {owner}, but {key!r} of data.train has {there}"

