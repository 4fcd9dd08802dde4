"""Pictures of 1, 4 and 5 channels and of 16 bits, through both stages, reconstruction and drawing."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_stages import write_configs

import ldm
from ldm.__main__ import main as use
from main import main as train

sys.path.append(str(Path(__file__).parent / "data"))
from deep_pictures import png  # noqa: E402

SIDE, COUNT = 32, 12


def discs(channels: int) -> list[np.ndarray]:
    """(H,W,C) uint16: a disc in another place on each picture, a slope of less than one step of 8 bits inside it."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pictures = []
    for i in range(COUNT):
        inside = (x - 8 - i) ** 2 + (y - 16) ** 2 < 36
        levels = [np.where(inside, 40000 + 5000 * c + 4 * x, 9000 + 3000 * c) for c in range(channels)]
        pictures.append(np.stack(levels, axis=2).astype(np.uint16))
    return pictures


def write(folder: Path, channels: int) -> Path:
    root = folder / "pictures"
    root.mkdir()
    for i, pixels in enumerate(discs(channels)):
        file = io.BytesIO()
        np.save(file, pixels.transpose(2, 0, 1))
        name, data = (f"a small disc {i:02d}.png", png(pixels)) if channels <= 4 else (f"a disc {i:02d}.npy", file.getvalue())
        (root / name).write_bytes(data)
    return root


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def arguments(folder: Path, root: Path, channels: int, declared: int | None = None) -> list[str]:
    data = f"{{target: ldm.data.folder.ImageFolder, params: {{root: {root}, size: {SIDE}, channels: {channels}}}}}"
    shared = [f"data.train={data}", "data.validation=null", "trainer.max_steps=2", "logging.images_every=0"]
    first = [f"stage1.{word}" for word in shared]
    first += [f"stage1.model.params.autoencoder.params.image_channels={declared or channels}"]
    return ["-b", str(folder / "ldm.yaml"), "-l", str(folder / "logs"), *shared, *first, "sampling.count=2"]


# picture that is drawn and sheet of reconstructions: mode, and how often its side is the picture's
@pytest.mark.parametrize(("channels", "mode", "tiles"), [(1, "L", (1, 1)), (4, "RGBA", (1, 1)), (5, "L", (3, 2))])
def test_from_files_to_pictures(tmp_path, text_encoder, capsys, channels, mode, tiles):
    write_configs(tmp_path, text_encoder)
    root = write(tmp_path, channels)
    assert train([*arguments(tmp_path, root, channels), "-t"]) == 0
    assert "12 images have more than 8 bits a channel" in capsys.readouterr().out
    (first,), (second,) = (tmp_path / "logs").glob("tiny_ae-*"), (tmp_path / "logs").glob("tiny_ldm-*")
    sheets = [Image.open(first / "reconstructions" / "final.png"), Image.open(second / "samples" / "final.png")]
    assert [sheet.mode for sheet in sheets] == ["RGB", "RGB"] and all(len(set(sheet.get_flattened_data())) > 2 for sheet in sheets)
    autoencoder = ldm.load(first).autoencoder
    assert (autoencoder.image_channels, autoencoder.statistics_count) == (channels, COUNT)
    assert ldm.load(second).generate(["a disc"], steps=2).shape == (1, channels, SIDE, SIDE)
    assert use(["txt2img", "--ckpt", str(second), "--prompt", "a disc", "--outdir", str(tmp_path / "out"), "--steps", "2"]) == 0
    drawn = Image.open(tmp_path / "out" / "00000.png")
    assert (drawn.mode, drawn.size) == (mode, (SIDE * tiles[0], SIDE * tiles[1]))
    assert json.loads(drawn.text["ldm"])["prompt"] == "a disc"
    made = tmp_path / "made"
    assert use(["reconstruct", "--ckpt", str(first), "--images", str(root), "--outdir", str(made), "--n", "2"]) == 0
    assert Image.open(made / "00001.png").mode == mode and Image.open(made / "sheet.png").mode == "RGB"


def test_the_autoencoder_has_to_say_the_same_number(tmp_path, text_encoder, capsys):
    write_configs(tmp_path, text_encoder)
    root = write(tmp_path, 4)
    for declared in (1, 3):
        assert train([*arguments(tmp_path, root, 4, declared), "--check"]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 2 and all("data.train.params.channels" in line for line in errors)
        assert f"model.params.autoencoder.params.image_channels: {declared}, but the pictures of data.train have 4" in errors[0]
        assert errors[1].startswith(f"error: stage 2 of 2, diffusion: autoencoder: {declared} channels")
    for path in root.iterdir():
        path.unlink()
    root.rmdir()  # what can be told without the data
    assert train([*arguments(tmp_path, root, 4, 3), "--check"]) == 2
    assert "image_channels: 3, but the pictures of data.train have 4" in capsys.readouterr().err


def test_slopes_finer_than_8_bits_reach_the_network(tmp_path):
    from ldm.data.folder import ImageFolder

    root = write(tmp_path, 1)
    image = ImageFolder(str(root), size=SIDE, channels=1)[3]["image"]
    inside = image[image > 0]
    assert len(inside.unique()) > 8 and (inside.max() - inside.min()) < 2 / 255
    assert torch.allclose(image, torch.from_numpy(discs(1)[3].transpose(2, 0, 1) / 65535 * 2 - 1).float(), atol=1e-7)
