"""The command line: pictures from a checkpoint and nothing else, and mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.__main__ import COMMANDS, main
from ldm.app import png
from ldm.bundle import Bundle, versions
from ldm.load import load

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "tests" / "data" / "parity" / "txt2img_kl" / "clip_tiny"


def draw(ckpt, outdir, *more):
    """-> the pictures' pixels (N,3,H,W) uint8."""
    assert main(["txt2img", "--ckpt", ckpt, "--outdir", str(outdir), "--device", "cpu", *more]) == 0
    return pixels(outdir)


def pixels(folder):
    files = sorted(file for file in Path(folder).glob("*.png") if file.stem.isdigit())
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2).contiguous()


def fails(capsys, *arguments):
    """-> the one line that says what is wrong."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


# Pictures.


def test_from_an_empty_directory(ckpt, bundle, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "ldm", "txt2img", "--ckpt", ckpt, "--prompt", "a red star", "--outdir", "out"]
    done = subprocess.run([*command, "--steps", "2"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 picture in out\n" and "tiny.ckpt: loaded" in done.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["00000.png"]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and again.stdout == "" and again.stderr.count("\n") == 1
    assert again.stderr.startswith("error: out/00000.png: is there already; ") and "--overwrite" in again.stderr


def test_a_look_at_what_is_being_drawn(ckpt, bundle, tmp_path, capsys):
    """What the network believes of x0 in the last step that is shown, decoded; an old one is not written over unasked."""
    draw(ckpt, tmp_path, "--prompt", "a red star", "--steps", "5", "--preview", "2", "--sampler", "ddim")
    seen = []
    bundle.generate(["a red star"], steps=5, sampler="ddim", callback=lambda step, t, x, guess: seen.append(bundle.preview(guess)))
    assert len(seen) == 5 and all(each.shape == (1, 3, 32, 32) and each.abs().max() <= 1 for each in seen)
    page = np.asarray(Image.open(tmp_path / "preview.png"))[8:168:5, 8:168:5]  # a sheet enlarges small pictures
    assert (page == ((seen[4][0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()).all()
    (tmp_path / "00000.png").unlink()
    capsys.readouterr()
    arguments = ["txt2img", "--ckpt", ckpt, "--prompt", "a", "--outdir", str(tmp_path), "--preview", "1"]
    assert "preview.png: is there already" in fails(capsys, *arguments)


def test_numbers_seeds_and_metadata(ckpt, bundle, tmp_path, capsys):
    more = ["--negative-prompt", "green", "--sampler", "ddpm", "--steps", "3", "--scale", "1.5", "--seed", "5"]
    found = draw(ckpt, tmp_path, "--prompt", "a red star", "a blue square", "--n-samples", "2", *more)
    assert capsys.readouterr().out == f"4 pictures in {tmp_path}\nall on {tmp_path / 'sheet.png'}\n"
    prompts = ["a red star"] * 2 + ["a blue square"] * 2
    settings = {"guidance": 1.5, "negative_prompt": "green", "sampler": "ddpm", "steps": 3}
    made = bundle.generate(prompts, seed=5, batch_size=1, **settings)
    assert torch.equal(found, ((made + 1) * 127.5).round().to(torch.uint8))
    for i, prompt in enumerate(prompts):
        about = png.read(tmp_path / f"{i:05d}.png")
        assert about == {
            "prompt": prompt, "seed": 5 + i, "negative_prompt": "green", "sampler": "ddpm", "steps": 3, "scale": 1.5,
            "times": "linear", "size": [32, 32], "batch_size": 1, "precision": "fp32", "autoencoder_precision": "fp32",
            "tile": None, "model": bundle.content_hash(), "versions": versions(),
        }  # fmt: skip
    assert png.read(tmp_path / "sheet.png")["prompts"] == prompts


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_a_picture_draws_itself_again(ckpt, tmp_path, sampler, caplog):
    more = ["--sampler", sampler, "--height", "40", "--width", "24", "--negative-prompt", "blue", "--scale", "4"]
    first = draw(ckpt, tmp_path / "a", "--prompt", "red", "a large blue star on a white background", *more)
    again = draw(ckpt, tmp_path / "b", "--from-image", str(tmp_path / "a" / "00001.png"))
    assert torch.equal(first[1], again[0]) and not torch.equal(first[0], again[0])
    assert png.read(tmp_path / "a" / "00001.png") == png.read(tmp_path / "b" / "00000.png")
    assert "may differ" not in caplog.text
    other = draw(ckpt, tmp_path / "c", "--from-image", str(tmp_path / "a" / "00001.png"), "--seed", "9")
    assert not torch.equal(again, other) and png.read(tmp_path / "c" / "00000.png")["scale"] == 4


@pytest.mark.parametrize("about", [
    {"prompt": "a"}, {"prompts": ["a"], "seed": 1}, {"prompt": "a", "seed": "x"}, {"prompt": "a", "seed": 1, "size": "64"},
    {"seed": 1, "inputs": {"image": "a.png"}}, {"seed": 1, "inputs": []}, {"seed": 1, "to": 3}, {"seed": 1, "conditions": 3},
    {"seed": 1, "classifier": {"scale": 1}}])
def test_metadata_of_something_else_draws_nothing(ckpt, tmp_path, capsys, about):
    png.write(tmp_path / "x.png", Image.new("RGB", (8, 8)), about)
    base = ["txt2img", "--ckpt", ckpt, "--outdir", str(tmp_path / "out"), "--from-image", str(tmp_path / "x.png")]
    told = fails(capsys, *base)
    assert "x.png: its metadata is not that of one drawn picture" in told
    png.write(tmp_path / "x.png", Image.new("RGB", (8, 8)), {"seed": 1, "prompt": "a", "task": "upscale"})
    assert "`python -m ldm upscale` has drawn it" in fails(capsys, *base)


def test_another_prompt_in_place_of_a_pictures_own(ckpt, tmp_path):
    draw(ckpt, tmp_path / "a", "--prompt", "red", "--seed", "4", "--steps", "3")
    found = draw(ckpt, tmp_path / "b", "--from-image", str(tmp_path / "a" / "00000.png"), "--prompt", "blue")
    assert torch.equal(found, draw(ckpt, tmp_path / "c", "--prompt", "blue", "--seed", "4", "--steps", "3"))


def test_how_prompts_are_read_is_asked_for_and_kept(ckpt, bundle, tmp_path, capsys):
    long, heavy = "a red star on white " * 8, "a (red:1.8) star"
    plain = draw(ckpt, tmp_path / "a", "--prompt", heavy, long, "--steps", "2")
    read = draw(ckpt, tmp_path / "b", "--prompt", heavy, long, "--steps", "2", "--prompt-weights", "--long", "window")
    assert not any(torch.equal(a, b) for a, b in zip(plain, read, strict=True))
    made = bundle.generate([heavy], steps=2, prompt_weights=True)
    assert torch.equal(read[0], ((made + 1) * 127.5).round().to(torch.uint8)[0])
    about = png.read(tmp_path / "b" / "00001.png")
    assert (about["prompt_weights"], about["long"]) == (True, "window")
    assert torch.equal(draw(ckpt, tmp_path / "c", "--from-image", str(tmp_path / "b" / "00001.png"))[0], read[1])
    again = draw(ckpt, tmp_path / "d", "--from-image", str(tmp_path / "b" / "00000.png"), "--no-prompt-weights")
    assert torch.equal(again[0], plain[0])
    capsys.readouterr()
    assert "has more than 24 tokens" in fails(capsys, "txt2img", "--ckpt", ckpt, "--outdir", str(tmp_path / "e"), "--prompt",
                                              long, "--long", "error")  # fmt: skip


def test_how_it_was_drawn_is_in_the_picture(ckpt, bundle, tmp_path):
    more = ["--sampler", "ddim:s_noise=1.01", "--eta", "0.5", "--times", "karras:rho=5", "--steps", "3", "--scale", "2",
            "--guidance-interval", "0.2", "0.8", "--rescale", "0.5"]  # fmt: skip
    first = draw(ckpt, tmp_path / "a", "--prompt", "a red star", *more)
    settings = {"sampler": {"name": "ddim", "s_noise": 1.01, "eta": 0.5}, "times": {"name": "karras", "rho": 5}, "steps": 3,
                "guidance": {"scale": 2.0, "low": 0.2, "high": 0.8, "rescale": 0.5}}  # fmt: skip
    made = bundle.generate(["a red star"], **settings)
    assert torch.equal(first, ((made + 1) * 127.5).round().to(torch.uint8))
    about = png.read(tmp_path / "a" / "00000.png")
    assert {key: about[key] for key in settings} == settings and about["scale"] == 2
    source = ["--from-image", str(tmp_path / "a" / "00000.png")]
    assert torch.equal(first, draw(ckpt, tmp_path / "b", *source))
    draw(ckpt, tmp_path / "c", *source, "--times", "1,0.6,0", "--scale", "3")
    about = png.read(tmp_path / "c" / "00000.png")
    assert about["times"] == [1, 0.6, 0] and about["steps"] == 2 and about["scale"] == 3
    assert about["guidance"] == settings["guidance"] | {"scale": 3} and about["sampler"] == settings["sampler"]


def test_wrong_choices_are_told(ckpt, tmp_path, capsys):
    begin = ["txt2img", "--ckpt", ckpt, "--prompt", "red", "--outdir", str(tmp_path)]
    for more, told in (
        (["--sampler", "ddimm"], "--sampler: there is no 'ddimm'; nearest: 'ddim'"),
        (["--sampler", "heun", "--eta", "1"], "--sampler: heun has no option 'eta'"),
        (["--eta", "1"], "--eta: give --sampler too"),
        (["--times", "karras:rho"], "options are written option=value"),
        (["--times", "karras:rho=x"], "--times: karras.rho: expected float, got text 'x'"),
        (["--times", "1,2"], "times: expected two or more decreasing times"),
    ):
        assert told in fails(capsys, *begin, *more)


def test_another_model_draws_another_picture_and_says_so(ckpt, bundle, tmp_path, caplog):
    draw(ckpt, tmp_path / "a", "--prompt", "red")
    other = load(ckpt)
    with torch.no_grad():
        other.denoiser.network.conv_out.bias += 0.1
    other.save(tmp_path / "other.safetensors")
    draw(str(tmp_path / "other.safetensors"), tmp_path / "b", "--from-image", str(tmp_path / "a" / "00000.png"))
    assert f"made with model {bundle.content_hash()}, now it is {other.content_hash()}: the picture" in caplog.text


def test_prompts_from_a_file_in_batches(ckpt, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red star\r\n\r\n  \r\nein grüner Kreis\nblue".encode())
    found = draw(ckpt, tmp_path / "a", "--prompts-file", str(tmp_path / "prompts.txt"), "--batch-size", "2")
    read = [png.read(tmp_path / "a" / f"{i:05d}.png")["prompt"] for i in range(3)]
    assert read == ["a red star", "ein grüner Kreis", "blue"]
    alone = draw(ckpt, tmp_path / "b", "--prompt", "blue", "--seed", "2")
    assert (found[2].int() - alone[0].int()).abs().max() <= 1


def test_without_metadata(ckpt, tmp_path, capsys):
    draw(ckpt, tmp_path, "--prompt", "red", "blue", "--no-metadata")
    capsys.readouterr()
    assert "without metadata" in fails(capsys, "info", str(tmp_path / "00000.png"))
    assert "without metadata" in fails(capsys, "info", str(tmp_path / "sheet.png"))


def test_words_that_do_not_fit_are_told(ckpt, tmp_path, caplog):
    draw(ckpt, tmp_path, "--prompt", "a " * 21 + "red circle of the star")
    assert "not read: 'circle of the star'" in caplog.text


def test_half_precision(ckpt, tmp_path):
    draw(ckpt, tmp_path, "--prompt", "red", "--precision", "bf16", "--steps", "2")
    assert png.read(tmp_path / "00000.png")["precision"] == "bf16"
    again = draw(ckpt, tmp_path / "again", "--from-image", str(tmp_path / "00000.png"))
    assert torch.equal(again, pixels(tmp_path))


def test_tiles_and_the_autoencoders_own_precision(ckpt, tmp_path):
    options = ["--prompt", "red", "--steps", "1", "--height", "96", "--width", "96"]
    plain = draw(ckpt, tmp_path / "plain", *options)
    tiled = draw(ckpt, tmp_path / "tiled", *options, "--tile", "64")
    half = draw(ckpt, tmp_path / "half", *options, "--autoencoder-precision", "bf16")
    assert (tiled.int() - plain.int()).abs().max() <= 1 and 0 < (half.int() - plain.int()).abs().float().mean() < 3
    found = {name: png.read(tmp_path / name / "00000.png") for name in ("plain", "tiled", "half")}
    assert [found[name]["tile"] for name in found] == [None, 64, None]
    assert [found[name]["autoencoder_precision"] for name in found] == ["fp32", "fp32", "bf16"]
    assert {about["precision"] for about in found.values()} == {"fp32"}
    again = draw(ckpt, tmp_path / "again", "--from-image", str(tmp_path / "half" / "00000.png"))
    assert torch.equal(again, half)


# Other commands.


def test_info_of_a_checkpoint(ckpt, bundle, capsys):
    assert main(["info", ckpt]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["model"] == bundle.content_hash() and about["kind"] == "diffusion"
    assert about["numbers"] == {
        part: sum(value.numel() for value in getattr(bundle, part).state_dict().values())
        for part in ("autoencoder", "conditioner", "denoiser")
    }
    assert about["sampling"]["steps"] == 4 and about["config"] == bundle.config and "torch" in about["versions"]


def test_evaluate_adherence(ckpt, tmp_path, capsys):
    out = tmp_path / "a.json"
    arguments = ["--n", "4", "--n-held-out", "2", "--steps", "1", "--batch-size", "3", "--out", str(out)]
    assert "(3,64,64)" in fails(capsys, "evaluate", "adherence", "--ckpt", ckpt, *arguments)
    big = load(ckpt)
    big.sampling["size"] = [64, 64]
    big.save(tmp_path / "big.ckpt")
    assert main(["evaluate", "adherence", "--ckpt", str(tmp_path / "big.ckpt"), *arguments]) == 0
    assert "held-out pair" in capsys.readouterr().out
    table = json.loads(out.read_text())
    assert table["adherence"]["two objects"]["captions"] == 2 and table["steps"] == 1


def test_data_check(model_config, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a red circle.png")
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "1 images" in capsys.readouterr().out
    train = {"target": "ldm.data.shapes.Shapes", "params": {"count": 40}}
    config = tmp_path / "shapes.yaml"
    config.write_text(json.dumps({"model": model_config["model"], "data": {"train": train}}))
    assert main(["data", "check", str(config)]) == 0
    said = capsys.readouterr().out
    assert "drawn shapes: 40 images" in said and "24 tokens" in said
    clip = {"target": "ldm.conditioners.clip.ClipText", "params": {
        "vocab_size": 589, "width": 8, "layers": 1, "max_length": 9, "vocabulary": str(CLIP)}}  # fmt: skip
    for long, count in (("cut", "39 of 39"), ("window", "0 of 39")):
        model = {"params": {"conditioner": {**clip, "params": clip["params"] | {"long": long}}}}
        config.write_text(json.dumps({"model": model, "data": {"train": train}}))
        assert main(["data", "check", str(config)]) == 0
        assert f"{count} different captions" in capsys.readouterr().out
    train["params"] = {"cuont": 4}
    config.write_text(json.dumps({"data": {"train": train}}))
    assert "nearest: 'count'" in fails(capsys, "data", "check", str(config))
    assert "expected a .yaml" in fails(capsys, "data", "check", str(tmp_path / "shape.yml.txt"))


# Mistakes.


TXT2IMG = ["txt2img", "--ckpt", "x", "--outdir", "y"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["txt2image"], "no command 'txt2image'; nearest: txt2img; there are txt2img, "),
        (["txt2img", "--prompt", "a", "--promts-file", "x"], "no argument --promts-file; nearest: --prompts-file"),
        (TXT2IMG, "one of the arguments --prompt --prompts-file"),
        ([*TXT2IMG, "--prompt", "a", "--steps", "0"], "--steps: '0': expected a whole"),
        ([*TXT2IMG, "--prompt", "a", "--sampler", "dim"], "nearest: 'ddim'; there are ddpm"),
        ([*TXT2IMG, "--prompt", "a", "--height", "64"], "--height and --width"),
        (["txt2img", "--ckpt", "/no/such", "--outdir", "y", "--prompt", "a"], "/no/such: no such file or folder"),
        ([*TXT2IMG, "--prompts-file", "/no/such"], "/no/such: no such file"),
        (["data", "emoji", "--out", "x", "--font", "/no/such.ttf"], "--font /no/such.ttf: no such file"),
        (["info", "/no/such"], "/no/such: no such file or folder"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, said, capsys):
    assert said in fails(capsys, *arguments)


def test_mistakes_that_need_the_model(ckpt, tmp_path, capsys):
    base = ["txt2img", "--ckpt", ckpt, "--prompt", "a", "--outdir", str(tmp_path / "out")]
    assert "nearest: 96 x 72" in fails(capsys, *base, "--height", "100", "--width", "72")[-200:]
    assert "no such device" in fails(capsys, *base, "--device", "cuba")
    if not torch.cuda.is_available():
        assert "not on this machine; there are cpu" in fails(capsys, *base, "--device", "cuda")
    (tmp_path / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    assert "not UTF-8 (at byte 6)" in fails(capsys, *base[:3], *base[5:], "--prompts-file", str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "no prompt" in fails(capsys, *base[:3], *base[5:], "--prompts-file", str(tmp_path / "empty.txt"))
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_alone_is_refused(bundle, model_config, tmp_path, capsys):
    block = model_config["autoencoder"]
    config = {"name": "ae", "model": {"target": "autoencoder.lit.AutoencoderModule", "params": {"autoencoder": block}}}
    Bundle(bundle.autoencoder, config=config).save(tmp_path / "ae.ckpt")
    for command in (["txt2img", "--prompt", "a", "--outdir", str(tmp_path / "out")], ["evaluate", "adherence"]):
        assert "ae.ckpt: holds an autoencoder alone" in fails(capsys, *command, "--ckpt", str(tmp_path / "ae.ckpt"))


def test_a_wrong_text_encoder_writes_nothing(ckpt, bundle, tmp_path, capsys):
    other = load(ckpt)
    other.about = {"encoder_hash": "0123456789abcdef"}
    other.save(tmp_path / "other.ckpt")
    base = ["txt2img", "--ckpt", str(tmp_path / "other.ckpt"), "--outdir", str(tmp_path / "out")]
    assert "0123456789abcdef" in fails(capsys, *base, "--prompt", "a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command):
    code = f"import sys; from ldm.__main__ import main\ntry: main(['{command}', '--help'])\n" \
           "except SystemExit as e: assert e.code == 0\nassert not {'torch', 'pytorch_lightning'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"python -m ldm {command}" in done.stdout, done.stderr
