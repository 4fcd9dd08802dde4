"""What a picture says of how it was drawn, and drawing it again: its metadata in place of arguments that are not given."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.app import png
from ldm.app.conditions import unchanged
from ldm.app.models import precision_name
from ldm.common.files import UserError, file_sha256

if TYPE_CHECKING:
    from ldm.app.drawing import Task
    from ldm.bundle import Bundle
    from ldm.tasks import Frame

log = logging.getLogger(__name__)
READING = ("prompt_weights", "long")  # how prompts are read
KEPT = ("precision", "autoencoder_precision", "tile", "window", "fit", "negative_prompt", "also", *READING)


def recalled(args: argparse.Namespace, task: Task) -> dict:
    """The metadata of --from-image, {} without; arguments that are not given are filled in from it, or by their defaults."""
    old = png.read(args.from_image) if args.from_image else {}
    if old and not is_drawn(old):
        raise UserError(f"{args.from_image}: its metadata is not that of one drawn picture; was it drawn by this program?")
    if old and old.get("task", "") != task.name:
        raise UserError(f"{args.from_image}: `python -m ldm {old.get('task') or 'generate'}` has drawn it, and draws it again")
    for name in (*KEPT, *task.options):
        if getattr(args, name) is None:
            setattr(args, name, old.get(name))
    args.seed, args.lora = old.get("seed", 0) if args.seed is None else args.seed, args.lora or old.get("lora") or []
    if args.height is None and old.get("size"):
        left, top, right, bottom = old.get("expand") or (0, 0, 0, 0)
        args.height, args.width = old["size"][0] - top - bottom, old["size"][1] - left - right
    if args.classifier is None and "classifier" in old:
        args.classifier = unchanged(old["classifier"], args.from_image, "--classifier")
        args.classifier_scale = old["classifier"]["scale"] if args.classifier_scale is None else args.classifier_scale
    for name, value in task.options.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return old


def is_drawn(old: dict) -> bool:
    """Whether this is what one drawn picture says of itself; sheets and other commands' pictures say other things."""
    ends, size = (old, old.get("to", {})), old.get("size", [0, 0])
    if "prompts" in old or not isinstance(old.get("seed"), int) or not all(isinstance(end, dict) for end in ends):
        return False
    groups = [end.get(name, {}) for end in ends for name in ("conditions", "inputs")]
    if not all(isinstance(group, dict) for group in groups):
        return False
    files = [file for group in groups[1::2] for file in group.values()] + [old[key] for key in ("classifier",) if key in old]
    return (isinstance(size, list) and [type(side) for side in size] == [int, int]
            and all(isinstance(file, dict) and {"path", "sha256"} <= file.keys() for file in files))  # fmt: skip


def merged(args: argparse.Namespace, settings: dict, old: dict) -> dict:
    """What sampling_of gives, over what a picture was drawn with."""
    if not old:
        return settings
    guidance = old.get("guidance") or {"scale": old.get("scale")}
    steps = None if isinstance(settings["times"], list) else old.get("steps")  # a list of times says how many
    found = {key: old.get(key) if value is None else value for key, value in (settings | {"steps": None}).items()}
    return found | {"steps": args.steps or steps, "guidance": guidance | (settings["guidance"] or {})}


def facts_of(bundle: Bundle, batch_size: int, tile: int | None, lora: list[str]) -> dict:
    """What the pixels depend on beside what was asked for."""
    from ldm.bundle import versions

    return {"model": bundle.content_hash(), "precision": precision_name(bundle),
            "autoencoder_precision": precision_name(bundle, "autoencoder"), "batch_size": batch_size, "tile": tile,
            "versions": versions(), **({"lora": lora} if lora else {})}  # fmt: skip


def about_of(args: argparse.Namespace, task: Task, chosen: dict, frame: Frame) -> dict:
    """What was asked for: what all pictures of a run say."""
    guidance = {name: value for name, value in chosen["guidance"].items() if value is not None}
    extra = {name: getattr(args, name) for name in (*READING, "also", "window", "fit", *task.options)}
    if args.classifier:
        from ldm.load import find

        file = find(Path(args.classifier))
        extra["classifier"] = {"path": str(file), "sha256": file_sha256(file), "scale": args.classifier_scale}
    return {"negative_prompt": args.negative_prompt, "sampler": chosen["sampler"], "steps": chosen["steps"],
            "times": chosen["times"], "scale": guidance["scale"], **({"guidance": guidance} if len(guidance) > 1 else {}),
            "size": list(frame.size), **{name: value for name, value in extra.items() if value is not None}}  # fmt: skip


def warn_of_differences(image: str, facts: dict) -> None:
    """What keeps a picture from being drawn again exactly."""
    old = png.read(image)
    for key, value in facts.items():
        if key in old and old[key] != value:
            log.warning("%s was made with %s %s, now it is %s: the picture may differ", image, key, old[key], value)
