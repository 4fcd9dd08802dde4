"""What is no model, no config of it, no LoRA, no prompts: one line that names it, exit status 2, and nothing is written."""

import copy
import json

import pytest
import torch
import yaml
from drawn import fails, run, same
from safetensors.torch import load_file, save_file

from ldm.app import png


@pytest.fixture(scope="module")
def files(bundle, tmp_path_factory):
    """Folder with a model as .ckpt and .safetensors, halves of both, weights in float16, and a LoRA."""
    folder = tmp_path_factory.mktemp("files")
    for suffix in ("ckpt", "safetensors"):
        bundle.save(folder / f"whole.{suffix}")
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"half.{suffix}").write_bytes(data[: len(data) // 2])
    small = copy.deepcopy(bundle)
    small.conditioner.half()
    small.denoiser.half()
    small.save(folder / "fp16.safetensors")
    save_file({"unet.a.lora_A.weight": torch.zeros(2, 4), "unet.a.lora_B.weight": torch.zeros(4, 2)}, folder / "lora.safetensors")
    return folder


@pytest.mark.parametrize("command", ["txt2img", "img2img", "inpaint", "upscale", "edit", "interpolate", "variations"])
@pytest.mark.parametrize(("name", "said"), [
    ("half.ckpt", "damaged: its end is missing"), ("half.safetensors", "damaged, or no .safetensors file"),
    ("lora.safetensors", "this is a LoRA, which changes another model and is none by itself")])
def test_what_is_no_model(files, tmp_path, capsys, command, name, said):
    given = [] if command in ("txt2img", "interpolate") else ["--image", files / "picture.png"]
    (files / "picture.png").write_bytes(b"never read")
    told = fails(capsys, command, "--ckpt", files / name, "--prompt", "a", *given, "--outdir", tmp_path / "out")
    assert name in told and said in told and not (tmp_path / "out").exists()


def test_a_whole_model_as_lora(files, tmp_path, capsys):
    for name in ("whole.safetensors", "whole.ckpt"):
        told = fails(capsys, "txt2img", "--ckpt", files / "whole.ckpt", "--lora", files / name, "--prompt", "a", "--outdir", tmp_path / "out")
        assert name in told and ("a whole model is given as --ckpt" in told or "not a LoRA: give it as --ckpt" in told)
    told = fails(capsys, "txt2img", "--ckpt", files / "whole.ckpt", "--lora", files / "lora.safetensors", "--prompt", "a", "--outdir",
                 tmp_path / "out")
    assert "1 of its 1 layers are none of this model" in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"network": {"target": "ldm.networks.dit.DiT"}}, "model.params.network.target: 'ldm.networks.unet.UNet' (given: 'ldm.networks.dit.DiT')"),
    ({"conditioner": {"target": "ldm.conditioners.label.ClassLabel"}}, "(given: 'ldm.conditioners.label.ClassLabel')"),
    ({"process": {"target": "ldm.process.DDPM"}}, "(given: 'ldm.process.DDPM')"),
])
def test_the_yaml_of_another_model(files, tmp_path, capsys, change, said):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"model": {"target": "ldm.lit.DiffusionModule", "params": change}}))
    base = ["txt2img", "--ckpt", files / "whole.ckpt", "--prompt", "a", "--outdir", tmp_path / "out", "--config"]
    told = fails(capsys, *base, tmp_path / "other.yaml")
    assert "other.yaml: the config of another model than the one in" in told and said in told and "so give none" in told
    (tmp_path / "data.yaml").write_text("data: {train: {target: ldm.data.shapes.Shapes}}")
    assert "data.yaml: the config of no model (it lacks model:)" in fails(capsys, *base, tmp_path / "data.yaml")
    assert "compvis.yaml: the config of another model" in fails(capsys, *base, compvis(tmp_path))
    assert not (tmp_path / "out").exists()


def compvis(folder):
    """A yaml of latent-diffusion's kind."""
    path = folder / "compvis.yaml"
    path.write_text("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {timesteps: 1000}}")
    return path


def test_half_on_a_cpu_is_computed_in_float32_and_told(files, tmp_path, caplog):
    """Weights that are kept in half, and half that is asked for."""
    base = ["--prompt", "a red star", "--steps", 2]
    with caplog.at_level("INFO"):
        kept = run("txt2img", files / "fp16.safetensors", tmp_path / "kept", *base)
    assert caplog.text.count("fp16.safetensors: float16 weights become float32 on the CPU") == 1
    whole = run("txt2img", files / "whole.ckpt", tmp_path / "whole", *base)
    assert not same(kept, whole) and abs(kept[0].astype(int) - whole[0]).max() < 8  # weights were rounded, nothing else
    caplog.clear()
    asked = run("txt2img", files / "whole.ckpt", tmp_path / "asked", *base, "--precision", "fp16", "--autoencoder-precision", "fp16")
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == [f"{flag} fp16: computed in fp32 on the CPU, which is faster there and loses nothing"
                    for flag in ("--precision", "--autoencoder-precision")]
    assert same(asked, whole) and png.read(tmp_path / "asked" / "00000.png")["precision"] == "fp32"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp437"])
def test_prompts_in_another_encoding(files, tmp_path, capsys, encoding):
    (tmp_path / "prompts.txt").write_bytes("ein grüner Kreis\n".encode(encoding))
    told = fails(capsys, "txt2img", "--ckpt", files / "whole.ckpt", "--prompts-file", tmp_path / "prompts.txt", "--outdir", tmp_path / "out")
    assert "prompts.txt: not UTF-8 (at byte " in told and "save it as UTF-8" in told and not (tmp_path / "out").exists()


def test_prompts_that_are_no_file(files, tmp_path, capsys):
    base = ["txt2img", "--ckpt", files / "whole.ckpt", "--outdir", tmp_path / "out", "--prompts-file"]
    assert "a folder; expected a text file" in fails(capsys, *base, tmp_path)
    assert "no such file" in fails(capsys, *base, tmp_path / "none.txt")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_size_or_none(files, tmp_path, capsys):
    """Weights and the config in one file that do not go together."""
    weights = load_file(files / "whole.safetensors")
    about = json.loads(header(files / "whole.safetensors")["__metadata__"]["ldm"])
    name = next(key for key in weights if key.startswith("denoiser.") and weights[key].ndim == 4)
    for changed in ({**weights, name: weights[name][1:].clone()}, {key: value for key, value in weights.items() if key != name}):
        save_file(changed, tmp_path / "mixed.safetensors", {"ldm": json.dumps(about)})
        told = fails(capsys, "txt2img", "--ckpt", tmp_path / "mixed.safetensors", "--prompt", "a", "--outdir", tmp_path / "out")
        assert "mixed.safetensors" in told and name in told and not (tmp_path / "out").exists()


def header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
