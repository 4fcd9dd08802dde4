"""Conditions on the command line: which a model reads is asked of the model, which are given of the arguments.

A condition is known by its key in a batch. What is given for it is a text for each picture, or one for all: a prompt, a
number, the name of a file; in a picture's metadata the same stands under "prompt", "conditions" and "inputs".
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.common.files import UserError, file_sha256

if TYPE_CHECKING:
    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want

FLAGS = {  # key in a batch -> option, kind (see ldm.conditioners.wants), what it is called in help, help
    "class": ("--class", "class", "N", "classes, by their numbers"),
    "image": ("--image", "picture", "FILE", "pictures"),
    "mask": ("--mask", "mask", "FILE", "masks: white where to paint, black where the picture stays"),
    "low_res": ("--low-res", "picture", "FILE", "small pictures to be enlarged"),
    "segmentation": ("--segmentation", "map", "FILE", "maps of classes, a number a pixel (grey or palette PNG, .npy)"),
    "depth": ("--depth", "depth", "FILE", "depth maps (grey pictures, .npy)"),
    "boxes": ("--boxes", "boxes", "JSON", 'layouts: [{"box": [left, top, right, bottom], "class": 3}, ...], boxes in shares of '
                                          "the picture's sides"),
    "image_embedding": ("--image-embedding", "array", "NPY", "embeddings of pictures"),
    "neighbours": ("--neighbours", "array", "NPY", "embeddings (k,D) of the nearest pictures"),
    "noise_level": ("--noise-level", "class", "N", "level of noise that the condition is given, and the network told"),
}  # fmt: skip
ELSEWHERE = {"mask": "inpaint", "low_res": "upscale"}  # conditions whose pictures another command makes


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts, each in quotes")
    source.add_argument("--prompts-file", metavar="F", help="a text file (UTF-8) with a prompt on each line")
    for key, (flag, _, metavar, help) in FLAGS.items():
        parser.add_argument(flag, dest=key, nargs="+", metavar=metavar, help=f"{help}; one for all pictures, or one for each")
    parser.add_argument("--condition", nargs="+", default=[], metavar="KEY=VALUE",
                        help="any other condition of the model: numbers (crop=0,0), or the name of a file")


def flag_of(key: str) -> str:
    return "--prompt" if key == "caption" else FLAGS[key][0] if key in FLAGS else f"--condition {key}="


def asked(args: argparse.Namespace, old: dict) -> dict[str, list[str]]:
    """Key -> what is given for it, of each picture. old: metadata of a picture that is drawn again, {}: none."""
    given = {key: [str(text) for text in vars(args)[key]] for key in FLAGS if vars(args)[key]}
    if args.prompt or args.prompts_file:
        given["caption"] = args.prompt or read_prompts(args.prompts_file)
    for text in args.condition:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--condition {text}: expected KEY=VALUE")
        given.setdefault(key, []).append(value)
    before = [texts_in(about, given, args.from_image) for about in ([old, old["to"]] if "to" in old else [old])]
    given |= {key: [texts[key] for texts in before if key in texts] for key in before[0] if key not in given}
    lengths = {key: len(texts) for key, texts in given.items()}
    if len(set(lengths.values()) - {1}) > 1:
        told = ", ".join(f"{n} of {flag_of(key).rstrip('=')}" for key, n in lengths.items())
        raise UserError(f"one condition of each kind, or as many as there are of the others; got {told}")
    return given


def check_files(given: Mapping[str, Sequence[str]]) -> None:
    """UserError where a file is not there; before a model is loaded for nothing."""
    for key in FLAGS.keys() & given.keys():
        for path in given[key] if FLAGS[key][1] != "class" else ():
            if not Path(path).is_file():
                raise UserError(f"{flag_of(key)} {path}: no such file")


def texts_in(about: dict, given: dict, image: str | None) -> dict[str, str]:
    """Key -> what a picture's metadata names. UserError where a file is gone or is another now, unless one is given."""
    texts = {"caption": about["prompt"]} if isinstance(about.get("prompt"), str) else {}
    for key, value in (about.get("conditions") or {}).items():
        texts[key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    for key, file in (about.get("inputs") or {}).items():
        texts[key] = file["path"] if key in given else unchanged(file, image, flag_of(key))
    return texts


def unchanged(file: dict, image: str | None, flag: str) -> str:
    """The path of a file that a picture's metadata names. UserError where it is not there, or another by now."""
    path, there = file["path"], Path(file["path"]).is_file()
    if not there or file_sha256(path) != file["sha256"]:
        raise UserError(f"{image}: was drawn with {path} (SHA-256 {file['sha256'][:16]}...), which is "
                        f"{'another file now' if there else 'not there'}; give it with {flag}")
    return path


def read_prompts(name: str) -> list[str]:
    """The lines of a UTF-8 file, without the empty ones."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--prompts-file {name}: {'a folder; expected a text file' if path.is_dir() else 'no such file'}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file {name}: not UTF-8 (at byte {error.start}); save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {name}: no prompt in it; one is expected on each line")
    return prompts


def weighed(bundle: Bundle, texts: Sequence[str]) -> list[tuple[dict, float]]:
    """--also, TEXT[:weight] each: entries of a batch, and their weights. UserError where the model reads no such thing."""
    from ldm.conditioners.wants import wants_of

    reads = {want.key for want in wants_of(bundle.conditioner) or ()}
    if texts and not {"caption", "class"} & reads:
        raise UserError("--also: this model reads neither prompts nor classes")
    found = []
    for text in texts:
        words, _, number = text.rpartition(":")
        weight = as_number(number) if words else None
        what, weight = (text, 1.0) if weight is None else (words, weight)
        if "caption" not in reads and not what.isdigit():
            raise UserError(f"--also {text}: this model reads classes; expected a whole number, and a weight behind a colon")
        found.append(({"caption": what} if "caption" in reads else {"class": int(what)}, weight))
    return found


def as_number(text: str) -> float | None:
    """None where it is no finite number."""
    try:
        return number if isfinite(number := float(text)) else None
    except ValueError:
        return None


def wanted(bundle: Bundle, own: Sequence[Want], given: Mapping[str, Sequence[str]], text: bool) -> dict[str, Want]:
    """Key -> what is read under it, by the model or by the command (its `own`). UserError for what is given and not read, and
    for what is read and not given. text: prompts are needed where the model reads any."""
    from ldm.conditioners.wants import Want, missing, wants_of

    said = wants_of(bundle.conditioner)
    unknown = [Want("caption", "text", "a text", needed=False)] if said is None else []
    wants = {want.key: want for want in [*unknown, *(said or ()), *own]}
    for key in given:
        if key not in wants and said is not None:
            reads = ", ".join(f"{flag_of(want.key)} ({want.about})" for want in wants.values()) or "none"
            raise UserError(f"{flag_of(key)}: this model has no such condition; it reads {reads}")
        wants.setdefault(key, Want(key, FLAGS[key][1] if key in FLAGS else "number", key, 3))
    lacking = [want for want in missing(list(wants.values()), given) if text or want.kind != "text"]
    if lacking:
        told = ", ".join(f"{flag_of(want.key)} ({want.about})" for want in lacking)
        other = next((f"; or use `python -m ldm {ELSEWHERE[want.key]}`" for want in lacking if want.key in ELSEWHERE), "")
        raise UserError(f"this model draws under conditions: give {told}{other}")
    return wants
