"""`python -m ldm reconstruct` on pictures of every kind."""

import json
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.base import Identity
from ldm.__main__ import main
from ldm.app import png
from ldm.app.judging import batched, fitted, panel, trained_on
from ldm.bundle import Bundle

MODULE = {"target": "autoencoder.lit.AutoencoderModule"}


@pytest.fixture(scope="module")
def alone(bundle, model_config, tmp_path_factory) -> str:
    """Its autoencoder alone, which does not say at what size it was trained."""
    path = tmp_path_factory.mktemp("model") / "ae.safetensors"
    config = {"name": "ae", "model": {**MODULE, "params": {"autoencoder": model_config["autoencoder"]}}}
    Bundle(bundle.autoencoder, config=config).save(path)
    return str(path)


def identity(path, channels: int, **train) -> str:
    block = {"target": "autoencoder.base.Identity", "params": {"image_channels": channels}}
    config = {"name": "id", "model": {**MODULE, "params": {"autoencoder": block}}, "data": {"train": {"params": train}}}
    Bundle(Identity(channels), config=config).save(path)
    return str(path)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    smooth = torch.rand(1, channels, 5, 4, generator=torch.Generator().manual_seed(seed))
    grown = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")
    return (grown[0].permute(1, 2, 0) * 255).round().byte().numpy()


def save(path, *size, **more):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture(*size, **more).squeeze()).save(path)


def run(ckpt, images, out, *more) -> tuple[dict, list[np.ndarray]]:
    """-> metrics.json, and the pictures' pixels (H,W,C)."""
    assert main(["reconstruct", "--ckpt", ckpt, "--images", str(images), "--outdir", str(out), *more]) == 0
    return json.loads((out / "metrics.json").read_text()), pixels(out)


def pixels(out) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(out.glob("*.png")) if file.stem.isdigit()]


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["reconstruct", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def test_side_by_side_with_figures(ckpt, bundle, tmp_path, capsys):
    for i, name in enumerate("ba"):
        save(tmp_path / "in" / f"{name}.png", 32, 32, seed=i)
    found, shown = run(ckpt, tmp_path / "in", tmp_path / "out", "--batch-size", "2")
    x = torch.stack([torch.from_numpy(picture(32, 32, seed=i)).permute(2, 0, 1) for i in (1, 0)]) / 127.5 - 1
    with torch.no_grad():
        y = bundle.autoencoder.decode(bundle.autoencoder.encode(x)).clamp(-1, 1)
    for part, expected in enumerate((x, y, (4 * (y - x)).clamp(-1, 1))):
        levels = ((expected + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        assert np.abs(np.stack(shown)[:, :, 32 * part : 32 * part + 32] - levels).max() <= 0.51
    error = (y - x).square().mean(dim=(1, 2, 3))
    assert [row["psnr"] for row in found["pictures"]] == pytest.approx((10 * torch.log10(4 / error)).tolist(), rel=1e-4)
    assert [row["image"] for row in found["pictures"]] == [str(tmp_path / "in" / name) for name in ("a.png", "b.png")]
    assert found["mean"]["psnr_of_mean_error"] == pytest.approx(10 * np.log10(4 / error.mean().item()), rel=1e-4)
    assert found["mean"]["ssim"] == pytest.approx(sum(row["ssim"] for row in found["pictures"]) / 2)
    assert found["weights"] == bundle.autoencoder.content_hash() and found["broken"] == {}
    about = png.read(tmp_path / "out" / "00000.png")
    assert about == {**found["pictures"][0], "weights": found["weights"]} and about["size"] == [32, 32]
    said = capsys.readouterr().out
    assert said.startswith("a.png: PSNR ") and "mean of 2: PSNR" in said and "LPIPS not measured" in said
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_whole_pictures_of_any_shape(alone, ckpt, tmp_path):
    save(tmp_path / "in" / "wide.png", 21, 50)
    save(tmp_path / "in" / "tall.jpg", 67, 18)
    found, shown = run(alone, tmp_path / "in", tmp_path / "out", "--batch-size", "4")
    assert [row["size"] for row in found["pictures"]] == [[67, 18], [21, 50]]
    assert [image.shape for image in shown] == [(67, 54, 3), (21, 150, 3)]
    assert np.array_equal(shown[1][:, :50], picture(21, 50))
    again, _ = run(ckpt, tmp_path / "in", tmp_path / "again", "--whole")
    assert again["mean"] == pytest.approx(found["mean"], rel=1e-4)
    square, shown = run(ckpt, tmp_path / "in", tmp_path / "square")
    assert [image.shape for image in shown] == [(32, 96, 3)] * 2
    assert [row["size"] for row in square["pictures"]] == [[32, 32]] * 2


def test_tiles_give_nearly_the_same(alone, tmp_path):
    save(tmp_path / "large.png", 150, 190)
    once, shown = run(alone, tmp_path / "large.png", tmp_path / "a")
    tiled, other = run(alone, tmp_path / "large.png", tmp_path / "b", "--tile", "64")
    assert tiled["tile"] == 64 and once["tile"] is None
    assert np.abs(shown[0][:, 190:380].astype(int) - other[0][:, 190:380]).mean() < 1


@pytest.mark.parametrize(("channels", "name", "data"), [
    (1, "a.png", picture(12, 20, 1)[..., 0]),
    (4, "a.png", picture(12, 20, 4)),
    (5, "a.npy", picture(12, 20, 5)),
    (1, "a.png", picture(12, 20, 1)[..., 0].astype(np.uint16) * 257),
])  # fmt: skip
def test_channels_and_bits(channels, name, data, tmp_path):
    ckpt = identity(tmp_path / "id.safetensors", channels)
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / name, data) if name.endswith(".npy") else Image.fromarray(data).save(folder / name)
    found, _ = run(ckpt, folder, tmp_path / "out")
    assert found["pictures"][0] == {"image": str(folder / name), "size": [12, 20], "mse": 0, "psnr": 100, "ssim": pytest.approx(1)}
    assert ("these pictures have" in found["not_measured"]["lpips"]) == (channels > 3)
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_the_range_of_numbers_that_training_had(tmp_path):
    np.save(tmp_path / "a.npy", np.full((16, 16, 2), 300.0))
    ckpt = identity(tmp_path / "id.safetensors", 2, value_range=[0, 400])
    _, shown = run(ckpt, tmp_path / "a.npy", tmp_path / "out")
    assert shown[0][0, 0] == 191  # 300 of 400


def test_broken_files_are_told_and_left_out(alone, tmp_path, caplog, capsys):
    save(tmp_path / "in" / "c.png", 16, 16)
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found, shown = run(alone, tmp_path / "in", tmp_path / "out")
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == [
        f"{tmp_path / 'in' / 'a.png'}: left out: not an image that Pillow can read"]  # fmt: skip
    assert list(found["broken"]) == [str(tmp_path / "in" / "a.png")] and len(found["pictures"]) == 1
    assert (tmp_path / "out" / "00001.png").is_file() and not (tmp_path / "out" / "00000.png").is_file()
    only = ("--images", str(tmp_path / "in" / "a.png"), "--outdir", str(tmp_path / "other"))
    assert "a.png: none of 1 pictures can be read; the first: not an image" in fails(capsys, "--ckpt", alone, *only)


def test_small_pictures_have_no_ssim(alone, tmp_path):
    save(tmp_path / "small.png", 8, 9)
    found, _ = run(alone, tmp_path / "small.png", tmp_path / "out")
    assert set(found["mean"]) == {"mse", "psnr", "psnr_of_mean_error"}


def test_mistakes(ckpt, alone, tmp_path, capsys):
    save(tmp_path / "pictures" / "a.png", 16, 16)
    (tmp_path / "empty").mkdir()
    base = ("--ckpt", ckpt, "--outdir", str(tmp_path / "out"), "--images")
    assert f"nearest: {tmp_path / 'pictures'}" in fails(capsys, *base, str(tmp_path / "pictuers"))
    assert "no image in this folder" in fails(capsys, *base, str(tmp_path / "empty"))
    here = (*base, str(tmp_path / "pictures"))
    assert "--size 30: no multiple of the autoencoder's factor 4; take 28 or 32" in fails(capsys, *here, "--size", "30")
    assert "not allowed with argument" in fails(capsys, *here, "--size", "32", "--whole")
    assert "--lpips-weights /no/such: no such file" in fails(capsys, *here, "--lpips-weights", "/no/such")
    assert "nearest: --whole" in fails(capsys, *here, "--wohle")
    file = str(tmp_path / "pictures" / "a.png")
    assert f"{file}: is a file; expected a folder" in fails(capsys, *here, "--outdir", file)
    assert not (tmp_path / "out").exists()
    run(ckpt, tmp_path / "pictures", tmp_path / "out")
    assert "is there already" in fails(capsys, *here)
    run(ckpt, tmp_path / "pictures", tmp_path / "out", "--overwrite")
    (tmp_path / "other.ckpt").write_bytes(b"no checkpoint")
    other = ("--ckpt", str(tmp_path / "other.ckpt"), "--overwrite")
    assert "not a checkpoint" in fails(capsys, *here[2:], *other)


def test_the_size_of_training_is_known_from_the_data_set_that_has_but_one():
    def size(block: dict) -> int | None:
        bundle = SimpleNamespace(config={"data": {"train": block}}, sampling={})
        return trained_on(bundle)["size"]

    assert size({"target": "ldm.data.shapes.Shapes"}) == 64
    assert size({"target": "ldm.data.folder.ImageFolder", "params": {"size": 96}}) == 96
    assert size({"target": "ldm.data.folder.ImageFolder"}) is None
    assert size({"target": "theirs.Data"}) is None  # not imported


def test_batches_hold_one_shape():
    pictures = [(name, torch.zeros(1, size, 2)) for name, size in zip("abcdef", (2, 2, 2, 3, 3, 2), strict=True)]
    found = [("".join(names), tuple(x.shape)) for names, x in batched(pictures, 2)]
    assert found == [("ab", (2, 1, 2, 2)), ("c", (1, 1, 2, 2)), ("de", (2, 1, 3, 2)), ("f", (1, 1, 2, 2))]


def test_panels():
    x, y = torch.zeros(4, 2, 2), torch.full((4, 2, 2), 0.1)
    found = panel(x, y)
    assert found.shape == (4, 2, 6) and torch.equal(found[:, :, 2:4], y)
    assert found[:3, :, 4:].unique().tolist() == pytest.approx([0.4]) and found[3, :, 4:].eq(1).all()
    page = fitted([torch.zeros(3, 5, 9), torch.zeros(3, 40, 10)], 20)
    assert page.shape == (2, 3, 20, 18) and page[0, :, :10].eq(0).all() and page[0, :, 10:].eq(1).all()
    assert page[1, 0, 0].tolist() == [0] * 5 + [1] * 13


def test_lpips_where_its_weights_are(alone, tmp_path, monkeypatch, capsys):
    given = []

    class Judge:  # in place of VGG16, which is half a gigabyte
        def __init__(self, weights):
            given.append(weights)

        def __call__(self, x, y):
            return (x - y).abs().amax(dim=(1, 2, 3))

    monkeypatch.setattr("autoencoder.critics.Lpips", Judge)
    (tmp_path / "vgg.pth").touch()
    save(tmp_path / "in" / "a.png", 16, 24)
    save(tmp_path / "in" / "small.png", 12, 24)
    found, shown = run(alone, tmp_path / "in", tmp_path / "out", "--lpips-weights", str(tmp_path / "vgg.pth"))
    first, small = found["pictures"]
    worst = np.abs(shown[0][:, :24].astype(int) - shown[0][:, 24:48]).max() / 127.5
    assert given == [str(tmp_path / "vgg.pth")] and first["lpips"] == pytest.approx(worst, abs=0.01)
    assert "lpips" not in small and found["mean"]["lpips"] == first["lpips"] and found["not_measured"] == {}
    said = capsys.readouterr().out
    assert "LPIPS" in said and "not measured" not in said
    monkeypatch.setattr("ldm.app.judging.GREATEST", 16 * 24 - 1)
    assert "lpips" not in run(alone, tmp_path / "in", tmp_path / "b", "--lpips-weights", str(tmp_path / "vgg.pth"))[0]["mean"]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert run(alone, tmp_path / "in", tmp_path / "c")[0]["not_measured"]["lpips"].startswith("weights not found: there is no")
    prefixes = []

    def download(url, file, hash_prefix, progress):
        prefixes.append(hash_prefix)
        Path(file).touch()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    run(alone, tmp_path / "in", tmp_path / "d", "--download")
    run(alone, tmp_path / "in", tmp_path / "e")  # from the cache
    assert prefixes == ["397923af"] and given[2:] == [str(tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")] * 2


def test_a_download_that_fails(alone, tmp_path, monkeypatch, capsys):
    def refuse(url, file, hash_prefix, progress):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    save(tmp_path / "a.png", 16, 24)
    paths = ("--ckpt", alone, "--images", str(tmp_path / "a.png"), "--outdir", str(tmp_path / "out"))
    told = fails(capsys, *paths, "--download")
    assert "no network" in told and f"put the file at {tmp_path / 'hub' / 'checkpoints' / 'vgg16-397923af.pth'}" in told
