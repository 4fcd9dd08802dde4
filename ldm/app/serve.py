"""A web page that draws: what `generate` and `img2img` do, with fields for what the model reads."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.app import drawing, generate, img2img
from ldm.app.conditions import flag_of
from ldm.app.models import load_model, model_arguments, positive
from ldm.common.files import UserError

if TYPE_CHECKING:
    from ldm.bundle import Bundle

SUMMARY = "Open a web page that draws with a model (needs gradio)."
MOST = 16  # pictures at once


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--lora", nargs="+", default=[], metavar="FILE[:W]", help="LoRA files that are merged into the model")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME",
                        help="address to listen at; 0.0.0.0: everybody who reaches this machine may draw (%(default)s)")
    parser.add_argument("--port", type=positive, default=7860, metavar="N", help="%(default)s")


def run(args: argparse.Namespace) -> None:
    gradio = find_gradio()
    bundle = load_model(args)
    with tempfile.TemporaryDirectory() as folder:
        page(gradio, bundle, args, Path(folder)).launch(server_name=args.host, server_port=args.port)


def find_gradio() -> Any:
    """UserError where it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"serve needs the gradio library ({error}): pip install -c constraints.txt gradio") from error
    return gradio


def reads(bundle: Bundle) -> set[str]:
    """Which of "caption" and "class" the model reads. UserError where it cannot do without something that has no field."""
    from ldm.conditioners.wants import missing, wants_of

    wants = wants_of(bundle.conditioner) or ()
    lacking = [want for want in missing(list(wants), {"caption": [""], "class": ["0"]}) if want.key not in ("caption", "class")]
    if lacking:
        raise UserError(f"serve: this model draws under {', '.join(want.about for want in lacking)}, for which the page has no "
                        f"field; `python -m ldm generate` takes {', '.join(flag_of(want.key) for want in lacking)}")
    return {"caption", "class"} & {want.key for want in wants}


def draw(bundle: Bundle, args: argparse.Namespace, folder: Path, said: Mapping[str, Any]) -> list[Path]:
    """The pictures that somebody has asked for, as files that tell how they were made. said: options of `generate` by their
    names, and "image" and "strength", of `img2img`, cut to the model's own size; None and "": not given. UserError for what
    cannot be."""
    from ldm.__main__ import Parser

    command = img2img if said.get("image") else generate
    parser, words = Parser(prog="serve", allow_abbrev=False), []
    command.arguments(parser)
    for name, value in said.items():
        if (value not in (None, "") or name == "prompt") and (name != "strength" or command is img2img):
            words.append(f"--{name.replace('_', '-')}={value}")
    if command is img2img and (size := bundle.sampling.get("size")):
        words += [f"--height={size[0]}", f"--width={size[1]}"]
    place = tempfile.mkdtemp(dir=folder)
    asked = parser.parse_args(["--ckpt", args.ckpt, "--outdir", place, *words])
    asked.lora, asked.no_ema, asked.trust = args.lora, args.no_ema, args.trust
    return drawing.carry_out(asked, command.TASK, bundle)


def page(gradio: Any, bundle: Bundle, args: argparse.Namespace, folder: Path) -> Any:
    """The page; the model draws for one visitor at a time."""
    from ldm.samplers import SAMPLERS

    known, plan = reads(bundle), bundle.plan()
    sampler = plan["sampler"] if isinstance(plan["sampler"], str) else plan["sampler"]["name"]
    fields: dict[str, Any] = {}
    with gradio.Blocks(title="ldm", analytics_enabled=False) as blocks:
        gradio.Markdown(f"### {Path(args.ckpt).name}")
        with gradio.Row():
            with gradio.Column():
                if "caption" in known:
                    fields["prompt"] = gradio.Textbox(label="prompt", autofocus=True)
                    fields["negative_prompt"] = gradio.Textbox(label="negative prompt")
                if "class" in known:
                    fields["class"] = gradio.Number(0, label="class", precision=0, minimum=0)
                fields["n_samples"] = gradio.Slider(1, MOST, 4, step=1, label="pictures")
                fields["seed"] = gradio.Number(0, label="seed of the first", precision=0)
                fields["steps"] = gradio.Slider(1, 100, plan["steps"], step=1, label="steps")
                fields["scale"] = gradio.Slider(0, 15, plan["guidance"]["scale"], step=0.1, label="guidance")
                fields["sampler"] = gradio.Dropdown(sorted(SAMPLERS), value=sampler, label="sampler")
                fields["image"] = gradio.Image(type="filepath", label="begin with a picture (may be left out)")
                fields["strength"] = gradio.Slider(0, 1, 0.6, label="how much of that picture is drawn anew")
                button = gradio.Button("draw", variant="primary")
            gallery = gradio.Gallery(label="pictures", format="png", columns=2)

        def answer(*values: Any) -> list[str]:
            try:
                files = draw(bundle, args, folder, dict(zip(fields, values, strict=True)))
            except ValueError as error:
                raise gradio.Error(" ".join(str(error).split())) from error
            return [str(file) for file in files]

        given = list(fields.values())
        button.click(answer, given, gallery, concurrency_limit=1, api_name="draw")
    return blocks
