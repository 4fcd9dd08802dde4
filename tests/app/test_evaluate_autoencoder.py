"""`python -m ldm evaluate autoencoder`."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from autoencoder.base import Identity
from ldm.__main__ import main
from ldm.app import png
from ldm.app.judging import below
from ldm.bundle import Bundle

MODULE = {"target": "autoencoder.lit.AutoencoderModule"}
SHAPES = {"target": "ldm.data.shapes.Shapes", "params": {"count": 6}}


@pytest.fixture(scope="module")
def vq(tmp_path_factory) -> str:
    """f4 with 8 codes, trained on nothing, on drawn shapes by its config."""
    from ldm.common.build import build

    bottleneck = {"target": "autoencoder.bottlenecks.VQ", "params": {"channels": 4, "codes": 8}}
    block = {"target": "autoencoder.model.convolutional",
             "params": dict(bottleneck=bottleneck, width=8, mult=[1], blocks=1, patch=4, attention=False)}  # fmt: skip
    torch.manual_seed(0)
    config = {"name": "vq", "model": {**MODULE, "params": {"autoencoder": block}},
              "data": {"train": SHAPES, "validation": {**SHAPES, "params": {"count": 5, "split": "evaluation"}}}}  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "vq.ckpt"
    Bundle(build(block), config=config).save(path)
    return str(path)


def identity(folder, channels=3, data=None) -> str:
    block = {"target": "autoencoder.base.Identity", "params": {"image_channels": channels}}
    config = {"name": "id", "model": {**MODULE, "params": {"autoencoder": block}}, "data": data or {}}
    Bundle(Identity(channels), config=config).save(folder / "id.safetensors")
    return str(folder / "id.safetensors")


def run(*arguments) -> None:
    assert main(["evaluate", "autoencoder", *map(str, arguments)]) == 0


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def test_on_the_checkpoints_own_validation_data(vq, tmp_path, capsys):
    run("--ckpt", vq, "--outdir", tmp_path / "out", "--batch-size", 2)
    said = capsys.readouterr().out
    for text in ("BottleneckAutoencoder (VQ), factor 4, latents 4 x 16 x 16", "5 of 3 x 64 x 64", " dB, mean over pictures; ",
                 "rFD-random-conv", "no FID", "768 bits a picture, 0.188 a pixel; entropy-coded", "of 8 entries used",
                 "no latent statistics: they were never measured", "pictures/s on cpu, 2 at a time",
                 "not measured: weights not found", "--download fetches it"):  # fmt: skip
        assert text in said
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    table, about = found["autoencoder"], found["about"]
    assert table["pictures"] == 5 and table["rate"]["bits"] == 16 * 16 * 3 and "rFID" not in table
    assert table["lpips"] is None and "VGG16" not in table["not_measured"]["lpips"]
    assert about["data"]["role"] == "validation" and about["data"]["block"]["params"]["count"] == 5
    assert png.read(tmp_path / "out" / "sheet.png")["weights"] == about["weights"]
    assert Image.open(tmp_path / "out" / "sheet.png").width > 2 * 3 * 192
    assert "is there already" in fails(capsys, "autoencoder", "--ckpt", vq, "--outdir", tmp_path / "out")
    run("--ckpt", vq, "--n", 3, "--outdir", tmp_path / "out", "--overwrite", "--out", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["autoencoder"]["pictures"] == 3


def test_on_the_data_of_another_config(vq, tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"data": {"train": SHAPES}}))
    run("--ckpt", vq, "--data", tmp_path / "other.yaml", "--out", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["autoencoder"]["pictures"] == 6 and found["about"]["data"]["role"] == "train"


def test_on_a_folder_with_a_class_of_ones_own(tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "mine.py").write_text(
        "class Mean:\n    name = 'colour'\n    def __init__(self, factor: float = 1.0): self.factor = factor\n"
        "    def __call__(self, x): return self.factor * x.mean(dim=(2, 3))\n")  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (80 * i, 0, 200)).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "3.png").write_bytes(b"broken")
    options = ("--ckpt", identity(tmp_path), "--images", tmp_path / "in", "--size", 16)
    run(*options, "--out", tmp_path / "a.json", "--features", "mine:Mean", "factor=2.5")
    found = json.loads((tmp_path / "a.json").read_text())
    table = found["autoencoder"]
    assert table["rFD-colour"] == 0 and table["psnr"] == 100 and table["picture"] == [3, 16, 16] and table["pictures"] == 3
    assert list(found["about"]["broken"]) == [str(tmp_path / "in" / "3.png")] and "3.png: left out" in caplog.text
    assert "rFD-colour" in capsys.readouterr().out
    assert "nearest: 'Mean'" in fails(capsys, "autoencoder", *options, "--features", "mine:Maen")
    assert "nearest: 'factor'" in fails(capsys, "autoencoder", *options, "--features", "mine:Mean", "facktor=1")
    assert "--features: there is no 'incepton'; nearest: inception" in fails(
        capsys, "autoencoder", *options, "--features", "incepton")  # fmt: skip
    assert "no such file; Inception's weights" in fails(
        capsys, "autoencoder", *options, "--features", "inception", "weights=/no/such")  # fmt: skip


def test_of_more_channels(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        np.save(tmp_path / "in" / f"{i}.npy", np.random.default_rng(i).integers(0, 255, (16, 16, 5), dtype=np.uint8))
    run("--ckpt", identity(tmp_path, 5), "--images", tmp_path / "in", "--size", 16, "--outdir", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())["autoencoder"]
    assert table["picture"] == [5, 16, 16] and table["psnr"] == 100 and table["rFD-random-conv"] == 0
    assert table["not_measured"]["lpips"].startswith("it sees 3 channels or 1")


def test_of_a_diffusion_model(bundle, tmp_path):
    bundle.save(tmp_path / "ldm.ckpt")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"train": SHAPES}}))
    run("--ckpt", tmp_path / "ldm.ckpt", "--data", tmp_path / "data.yaml", "--out", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["about"]["weights"] == bundle.autoencoder.content_hash()
    assert found["autoencoder"]["rate"]["kind"] == "kl" and found["autoencoder"]["latents"]["as_stored"] is False


def test_the_pictures_depend_on_the_seed_alone(vq, tmp_path):
    figures = []
    for name, options in {"a": (), "b": ("--batch-size", 1), "c": ("--seed", 3)}.items():
        run("--ckpt", vq, "--n", 2, "--out", tmp_path / name, *options)
        figures.append(json.loads((tmp_path / name).read_text())["autoencoder"]["psnr"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) != pytest.approx(figures[2], rel=1e-5)


def test_mistakes(vq, tmp_path, capsys):
    bare = identity(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "pictures" / "a.png")
    ae = ("autoencoder", "--ckpt", bare)
    assert "names no data to measure with" in fails(capsys, *ae)
    assert f"nearest: {tmp_path / 'pictures'}" in fails(capsys, *ae, "--images", tmp_path / "picture")
    assert "no image in this folder" in fails(capsys, *ae, "--images", tmp_path / "empty", "--size", 8)
    assert "does not say at what size it was trained; give --size" in fails(capsys, *ae, "--images", tmp_path / "pictures")
    assert "needs two or more" in fails(capsys, *ae, "--images", tmp_path / "pictures", "--size", 8)
    assert "--size: belongs to --images" in fails(capsys, *ae, "--size", 8)
    assert "not allowed with" in fails(capsys, *ae, "--images", "a", "--data", "b")
    assert "no such config file" in fails(capsys, *ae, "--data", tmp_path / "no.yaml")
    assert "/no/such: no such file or folder" in fails(capsys, "autoencoder", "--ckpt", "/no/such")
    assert "invalid choice: 'autoencodre'" in fails(capsys, "autoencodre", "--ckpt", vq)
    assert "no argument --n-held-out" in fails(capsys, *ae, "--n-held-out", 3)
    assert "METRIC" in fails(capsys)
    foreign = identity(tmp_path, data={"train": {"target": "os.getcwd"}})
    assert "may not name os.getcwd" in fails(capsys, "autoencoder", "--ckpt", foreign)


def test_batches_below_a_number():
    batches = [{"image": torch.arange(3), "key": list("abc"), "position": torch.arange(k, k + 3)} for k in (0, 6)]
    assert [batch["key"] for batch in below(batches, 7)] == [["a", "b", "c"], ["a"]]
    assert [len(batch["image"]) for batch in below(batches, 6)] == [3]
    assert [len(batch["image"]) for batch in below(batches, 99)] == [3, 3]
