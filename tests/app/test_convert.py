"""python -m ldm convert: every layout in and out, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ldm
from ldm.__main__ import main

PARITY = Path(__file__).parents[1] / "data" / "parity"
KL = [str(PARITY / "txt2img_kl" / "model.safetensors"), "--config", str(PARITY / "txt2img_kl" / "config.yaml")]


def weights(path, config=None):
    return {name: value for name, value in ldm.load(path, config).state_dict().items() if "vocabulary" not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def convert(ckpt, layout, out, *more):
    return main(["convert", "--ckpt", *(ckpt if isinstance(ckpt, list) else [str(ckpt)]), "--to", layout, "--out", str(out), *more])


def test_around_the_layouts_and_back(tmp_path, capsys):
    """CompVis -> diffusers -> CompVis -> ours -> diffusers: the same weights everywhere, and the vocabulary goes with them."""
    start = weights(KL[0], KL[2])
    assert convert(KL, "diffusers", tmp_path / "folder") == 0
    assert "denoiser 792,964 parameters" in capsys.readouterr().out
    assert convert(tmp_path / "folder", "compvis", tmp_path / "a.ckpt") == 0
    assert (tmp_path / "a.yaml").is_file() and torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert convert(tmp_path / "a.ckpt", "ldm", tmp_path / "b.safetensors") == 0
    assert convert(tmp_path / "b.safetensors", "diffusers", tmp_path / "again") == 0
    for path in (tmp_path / "folder", tmp_path / "a.ckpt", tmp_path / "b.safetensors", tmp_path / "again"):
        assert same(weights(path), start), path
    moved = tmp_path / "elsewhere.safetensors"
    (tmp_path / "b.safetensors").rename(moved)
    assert main(["txt2img", "--ckpt", str(moved), "--prompt", "a cat", "--steps", "2", "--height", "32", "--width", "32",
                 "--outdir", str(tmp_path / "pictures")]) == 0  # fmt: skip


def test_an_autoencoder_alone(tmp_path):
    source = [str(PARITY / "ae_kl_f4" / "model.safetensors"), "--config", str(PARITY / "ae_kl_f4" / "config.yaml")]
    start = weights(source[0], source[2])
    assert convert(source, "diffusers", tmp_path / "vae") == 0
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert convert(tmp_path / "vae", "compvis", tmp_path / "a.safetensors") == 0
    assert same(weights(tmp_path / "a.safetensors"), start) and same(weights(tmp_path / "vae"), start)
    assert convert(source, "dit", tmp_path / "x.pt") == 2


def test_precision_and_averages(tmp_path):
    assert convert(KL, "compvis", tmp_path / "half.safetensors", "--precision", "fp16") == 0
    found = load_file(tmp_path / "half.safetensors")
    assert found["model.diffusion_model.time_embed.0.weight"].dtype == torch.float16
    assert found["first_stage_model.encoder.conv_in.weight"].dtype == torch.float32
    case = PARITY / "inpaint_concat"
    for flags, prefix in (([], "model_ema.diffusion_modeltime_embed0weight"),
                          (["--no-ema"], "model.diffusion_model.time_embed.0.weight")):  # fmt: skip
        out = tmp_path / f"{len(flags)}.safetensors"
        assert convert([str(case / "model.safetensors"), "--config", str(case / "config.yaml")], "compvis", out, *flags) == 0
        given = load_file(case / "model.safetensors")[prefix].float()
        assert torch.equal(load_file(out)["model.diffusion_model.time_embed.0.weight"].float(), given)


@pytest.mark.parametrize(("layout", "out", "said"), [
    ("ldm", "a.bin", ".safetensors or .ckpt"), ("compvis", "a.pt", ".ckpt or .safetensors"), ("diffusers", "a.ckpt", "new folder"),
    ("dit", "a.pt", "DiT"), ("adm", "a.pt", "Identity"), ("ldm", "taken.ckpt", "is there already"),
])  # fmt: skip
def test_what_is_refused_writes_nothing(tmp_path, capsys, layout, out, said):
    (tmp_path / "taken.ckpt").write_text("mine")
    assert convert(KL, layout, tmp_path / out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["taken.ckpt"] and (tmp_path / "taken.ckpt").read_text() == "mine"


def test_overwriting_is_asked_for(tmp_path):
    (tmp_path / "a.ckpt").write_text("old")
    assert convert(KL, "ldm", tmp_path / "a.ckpt", "--overwrite") == 0
    assert same(weights(tmp_path / "a.ckpt"), weights(KL[0], KL[2]))
    (tmp_path / "folder").mkdir()
    assert convert(KL, "diffusers", tmp_path / "folder", "--overwrite") == 2
