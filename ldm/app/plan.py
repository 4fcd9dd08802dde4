"""What is said of a training: before it (all of it with --check), and at its end."""

import math
from pathlib import Path

from ldm.app.parts import PICTURES, prompts
from ldm.app.stages import Stage, learning_rate
from ldm.app.survey import WORD, Survey
from ldm.common.config import Checkpoint, section


def summary(survey: Survey) -> list[str]:
    """What every training begins with: parameters, learning rate, batch, length."""
    stage, width = survey.stage, max(len(part.name) for part in survey.parts)
    lines = [f"{'parameters':{width}}  {'trainable':>15}  {'frozen':>15}"]
    for part in survey.parts:
        note = "" if part.stored else "  (read from its own files, in no checkpoint)"
        lines.append(f"{part.name:{width}}  {part.trainable:>15,}  {part.frozen:>15,}{note}")
    devices = f"{survey.world} device{'s' if survey.world > 1 else ''}"
    batch = f"{survey.global_batch} = {stage.batch_size} x {devices} x accumulation {stage.accumulate}"
    told = f"effective lr {_rate(stage)}, global batch {batch}, {_length(survey)}"
    return [f"{stage.label}: {stage.name} ({stage.config['model']['target']})", *lines, told]


def details(survey: Survey) -> list[str]:
    """What --check adds: sizes of checkpoints, memory, arithmetic, each with how it is reckoned."""
    batch, copies = survey.stage.batch_size, section(survey.stage.config, Checkpoint).keep + 1
    memory = " + ".join(f"{name} {size(held)}" for name, held in survey.memory.items() if held)
    halved = ", halved for 16 bit" if survey.half else ""
    inputs = ", only inputs of blocks that are computed again" if survey.recomputes else ""
    lines = [
        f"checkpoint {size(survey.checkpoint)} ({WORD} bytes for each weight, average, and two moments of the optimizer for "
        f"each trained weight); disk for {copies} of them {size(copies * survey.checkpoint)}",
        f"memory of a device about {size(sum(survey.memory.values()))} = {memory}",
        f"  ({WORD} bytes for each weight, gradient, moment and average; activations: what the backward pass of {batch} "
        f"images keeps{halved}{inputs}; not the allocator's waste)",
    ]
    if not survey.flops:
        return [*lines, "the size of the pictures is not known without the data: activations and arithmetic not counted"]
    forward = ", ".join(f"{name} {flops(n)}" for name, n in {**survey.flops, **survey.frozen_flops}.items())
    side = "x".join(map(str, survey.size[1:]))
    return [*lines, f"arithmetic of a device {flops(survey.flops_per_step)} a step ({survey.passes} x the forward pass of what "
            f"is trained, 1 x that of the rest); forward pass over one image of {side}: {forward}"]  # fmt: skip


def closing(stage: Stage, checkpoint: Path) -> list[str]:
    """What there is now, and what to try next."""
    run = checkpoint.parent.parent
    shown = {"checkpoint": checkpoint, PICTURES[stage.kind]: run / PICTURES[stage.kind], "numbers": run / "metrics.jsonl"}
    lines = [f"{name + ':':16} {path}" for name, path in shown.items() if path.exists()]
    command = f"python -m ldm info {checkpoint}"
    if stage.kind == "diffusion":
        model = f"{stage.init_from} --lora {run}" if stage.lora else checkpoint
        command = f'python -m ldm txt2img --ckpt {model} --prompt "{prompts(stage)[0]}" --outdir out'
    return [*lines, f"{'try next:':16} {command}"]


def _length(survey: Survey) -> str:
    if survey.images is None:
        return f"until {survey.stage.trainer.get('max_time')} (DD:HH:MM:SS) are over"
    data = survey.stage.train
    epochs = "" if data is None else f", {survey.images / len(data):.3g} epochs"
    return f"{survey.steps:,} steps: {survey.images:,} images{epochs}"


def _rate(stage: Stage) -> str:
    rate = learning_rate(stage.config)
    scaled = f"scaled by the global batch, {stage.scaled}" if stage.scaled > 1 else "not scaled"
    return "as the optimizer's default" if rate is None else f"{rate:g} ({scaled})"


def size(count: float) -> str:
    """Bytes in words."""
    unit = min(4, max(2, int(math.log2(max(count, 1)) // 10)))
    return f"{count / 2 ** (10 * unit):.3g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][unit]}"


def flops(count: float) -> str:
    unit = min(5, int(math.log10(max(count, 1)) // 3))
    return f"{count / 10 ** (3 * unit):.3g} {['', 'K', 'M', 'G', 'T', 'P'][unit]}FLOP"
