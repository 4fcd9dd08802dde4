"""Prompts, names and files that people give with ill will: pictures land in the folder that was asked for and nowhere else, what
is there already stays, and what cannot be is told in a line."""

import json

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.__main__ import main
from main import main as train


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where commands run; `told` sees that nothing beside the output is touched there."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def contents(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draws(ckpt, capsys, *arguments) -> None:
    assert main(["txt2img", "--ckpt", str(ckpt), "--steps", "1", "--outdir", "out", *map(str, arguments)]) == 0, capsys.readouterr().err


def fails(capsys, *arguments) -> str:
    status, said = main(list(map(str, arguments))), capsys.readouterr().err
    last = said.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and "Traceback" not in said and len(last) < 1000
    return last


PROMPTS = ["../../../evil", "/etc/passwd", "a\0b", "%s%n{0}{x.__class__}", "a\nb\r\n\tc", "$(touch evil)`touch evil`", "\x1b[2J", "x" * 20_000, "🦊\u202e\u0000", "", "(((((((((", "-h"]


def test_prompts_name_no_files(ckpt, place, capsys):
    (place / "mine.txt").write_text("mine")
    draws(ckpt, capsys, "--prompts-file", written(place.parent / "prompts.txt", "\n".join(p.replace("\n", " ") for p in PROMPTS if p).encode()), "--batch-size", "16")
    drawn = len("\n".join(p.replace("\n", " ") for p in PROMPTS if p).splitlines())
    assert set(contents(place)) == {"mine.txt", *(f"out/{i:05d}.png" for i in range(drawn)), "out/sheet.png"}
    draws(ckpt, capsys, "--overwrite", f"--prompt={PROMPTS[0]}")
    assert json.loads(Image.open("out/00000.png").text["ldm"])["prompt"] == PROMPTS[0] and not (place.parent.parent / "evil").exists()


def written(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("data", "said"), [
    (b"", "no prompt in it"), (b"\n \n\t\n", "no prompt in it"), ("a fox".encode("utf-16"), "not UTF-8 (at byte 0)"), (bytes(range(256)), "not UTF-8"),
    ("ein Füchslein".encode("latin-1"), "not UTF-8"), (None, "no such file"),
])  # fmt: skip
def test_files_that_hold_no_prompts(ckpt, place, capsys, data, said):
    name = place.parent / "p.txt"
    if data is not None:
        name.write_bytes(data)
    assert said in fails(capsys, "txt2img", "--ckpt", ckpt, "--prompts-file", name, "--outdir", "out") and not contents(place)


def test_outputs_that_cannot_be(ckpt, place, capsys):
    (place / "file").write_text("mine")
    for out in ("file", "file/x", "", "/dev/null", "/proc/none", "x" * 300, "\0"):
        fails(capsys, "txt2img", "--ckpt", ckpt, "--steps", 1, "--prompt", "a", "--outdir", out)
        fails(capsys, "convert", "--ckpt", ckpt, "--to", "ldm", "--out", f"{out}.safetensors" if out.startswith(("/proc", "x", "\0")) else out)
    assert contents(place) == {"file": b"mine"}


def test_nothing_is_overwritten_in_silence(ckpt, place, capsys):
    draws(ckpt, capsys, "--prompt", "a", "b")
    before = contents(place)
    assert "is there already" in fails(capsys, "txt2img", "--ckpt", ckpt, "--prompt", "a", "--outdir", "out")
    (place / "x.safetensors").write_text("mine")
    assert "is there already" in fails(capsys, "convert", "--ckpt", ckpt, "--to", "ldm", "--out", "x.safetensors")
    assert contents(place) == {**before, "x.safetensors": b"mine"}


@pytest.mark.parametrize("arguments", [
    ["--sampler", "ddim:eta=[["], ["--sampler", "ddim:eta=!!python/object:x"], ["--sampler", "../x"], ["--times", "1,nan,0"], ["--times", "0,1"], ["--scale", "nan"],
    ["--seed", str(10**30)], ["--height", "100000000", "--width", "100000000"], ["--n-samples", "0"], ["--lora", "/etc/passwd"], ["--device", "x" * 99],
    ["--steps", str(10**30)], ["--from-image", "/etc/passwd"], ["--prompt-file", "x"],
])  # fmt: skip
def test_values_that_cannot_be(ckpt, place, capsys, arguments):
    fails(capsys, "txt2img", "--ckpt", ckpt, "--prompt", "a", "--outdir", "out", *arguments)
    assert not contents(place)


@pytest.mark.parametrize(("key", "value"), [
    ("size", [10**9, 10**9]), ("size", [-8, 8]), ("size", "x"), ("tile", {}), ("tile", -1), ("window", "x"), ("precision", {}), ("scale", "x"), ("guidance", {"low": 1}),
    ("guidance", {"scale": "x"}), ("steps", 0), ("steps", [1]), ("sampler", []), ("sampler", {"name": "os.system"}), ("times", "x"), ("times", [[1]]), ("seed", "x"), ("seed", -1),
    ("lora", "x"), ("lora", ["/etc/passwd"]), ("expand", [1]), ("classifier", {"path": 5, "sha256": 5}), ("inputs", {"image": {"path": "/etc/passwd", "sha256": "x"}}), ("to", []),
    ("conditions", {"x": {}}), ("long", "x"), ("prompt_weights", 5), ("negative_prompt", 5), ("fit", "x"),
])  # fmt: skip
def test_pictures_that_ask_for_what_cannot_be(ckpt, place, capsys, key, value):
    """Metadata of a picture that is to be drawn again."""
    info, about = PngInfo(), {"seed": 0, "prompt": "a", "size": [32, 32], "steps": 1, "scale": 1.0, "sampler": "ddim", "times": "linear"}
    info.add_itxt("ldm", json.dumps({**about, key: value}))
    Image.new("RGB", (4, 4)).save(place.parent / "x.png", pnginfo=info)
    fails(capsys, "txt2img", "--ckpt", ckpt, "--from-image", place.parent / "x.png", "--outdir", "out")
    assert not contents(place)


SAID = [("sampling", "size", [[1], 2]), ("sampling", "size", [0, -1]), ("sampling", "sampler", {"path": "x"}), ("sampling", "steps", "x"), ("config", "model", []), ("config", "model", {"target": "os.system"}),
        ("config", "model", {"params": {"network": {"target": "os.system", "params": {"command": "touch evil"}}}}), ("config", "autoencoder", {"target": "builtins.exec", "params": {"x": "1"}}),
        ("config", "autoencoder", {"target": "autoencoder.model.convolutional", "params": {"width": {}}}), ("config", "autoencoder", {"target": "autoencoder.model.convolutional", "params": {"width": 10**30}})]  # fmt: skip


@pytest.mark.parametrize(("part", "key", "value"), SAID)
def test_checkpoints_that_ask_for_what_cannot_be(ckpt, place, capsys, part, key, value):
    """Whole files, of which one thing that they say of themselves is changed: drawn with, taken an autoencoder from, begun with."""
    saved = torch.load(ckpt, weights_only=True)
    saved["ldm"][part] = {**saved["ldm"][part], key: value}
    torch.save(saved, place.parent / "x.ckpt")
    fails(capsys, "txt2img", "--ckpt", place.parent / "x.ckpt", "--steps", 1, "--prompt", "a", "--outdir", "out")
    config = "configs/tiny/class_conditional.yaml"
    root = __file__.rsplit("/tests/", 1)[0]
    if part == "config":
        fails(capsys, "convert", "--ckpt", place.parent / "x.ckpt", "--to", "ldm", "--out", "o.safetensors")
        for how in ([f"autoencoder={{ckpt: {place.parent / 'x.ckpt'}}}"], ["--init-from", str(place.parent / "x.ckpt")]):
            assert train(["-b", f"{root}/{config}", "--check", *how]) == 2 and "Traceback" not in capsys.readouterr().err
    assert not contents(place)


def test_a_model_is_no_run_to_go_on_with(ckpt, place, capsys):
    root = __file__.rsplit("/tests/", 1)[0]
    for action in ("-t", "--check"):
        assert train(["-b", f"{root}/configs/tiny/pixel.yaml", action, "-r", str(ckpt), "-l", "logs"]) == 2
        assert "no run can go on from it: it has no optimizer_states" in capsys.readouterr().err and not contents(place)
