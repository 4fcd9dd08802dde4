"""`python -m ldm compare-autoencoders` at the smallest size."""

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import ldm
import main
from ldm.__main__ import make_parser
from ldm.app import compare_autoencoders as comparison
from ldm.common.files import UserError

ROOT = Path(__file__).parents[2]
train = comparison.train


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Trainings run in this process: starting another costs more than the training."""
    monkeypatch.setattr(comparison, "train", in_process)
    monkeypatch.setattr(comparison, "BATCH", 4)
    for name in ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK"):  # what is set while a test runs is gone afterwards
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def in_process(command):
    assert command[1] == str(ROOT / "main.py") and main.main(command[2:]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_encoder):
    """Configs of stage 1 (KL and VQ) and of stage 2."""
    from two_stages import write_configs

    folder = write_configs(tmp_path_factory.mktemp("comparison"), text_encoder)
    vq = yaml.safe_load((folder / "ae.yaml").read_text())
    vq["name"] = "tiny_vq"
    vq["model"]["params"]["autoencoder"]["params"]["bottleneck"] = {
        "target": "autoencoder.bottlenecks.VQ", "params": {"channels": 2, "codes": 16}}  # fmt: skip
    (folder / "vq.yaml").write_text(yaml.safe_dump(vq))
    return folder


def arguments(place, *given, steps=2, n=2, out="out") -> argparse.Namespace:
    options = ["--base", place / "ldm.yaml", "--steps", steps, "--stage1-steps", 2, "--n", n, "--out", place / out]
    return make_parser().parse_args(["compare-autoencoders", *map(str, (*given, *options))])


@pytest.fixture(scope="module")
def compared(place):
    """What a comparison of both leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "train", in_process)
        comparison.run(arguments(place, place / "ae.yaml", place / "vq.yaml"))
    return json.loads((place / "out" / "comparison.json").read_text())


def test_a_row_is_what_the_trained_parts_say(place, compared):
    kl, vq = compared["rows"]
    assert [row["name"] for row in (kl, vq)] == ["ae", "vq"] and [row["kind"] for row in (kl, vq)] == ["KL", "VQ"]
    for row, channels in ((kl, 4), (vq, 2)):
        bundle = ldm.load(row["run"])
        assert row["autoencoder_hash"] == bundle.autoencoder.content_hash() and row["latent"] == [channels, 16, 16]
        assert (row["factor"], row["tokens"], row["images"]) == (4, 256, 8) and row["flops_per_step"] > 0
        unseen = torch.stack([comparison_data()[i]["image"] for i in range(6)])
        with torch.no_grad():
            made = bundle.autoencoder.decode(bundle.autoencoder.encode(unseen)).clamp(-1, 1)
        db = 10 * torch.log10(4 / (made - unseen).square().mean(dim=(1, 2, 3)))
        assert row["psnr"] == pytest.approx(db.mean().item(), rel=1e-4)
        assert {group: found["captions"] for group, found in row["adherence"].items()} == {"one object": 2, "two objects": 2}
        assert all(seconds >= 0 for seconds in row["seconds"].values()) and len(row["seconds"]) == 2
        assert json.loads(Image.open(place / "out" / f"{row['name']}.png").text["ldm"])["seed"] == 0
    assert vq["rate"]["bits"] == 16 * 16 * 4 and 0 <= vq["rate"]["entropy_bits"] <= vq["rate"]["bits"]


def comparison_data():
    from ldm.data.shapes import Shapes

    return Shapes(count=6, start=90)


def test_what_is_finished_is_used_again(place, compared, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "train", None)  # nothing is trained
    comparison.run(arguments(place, place / "ae.yaml", place / "vq.yaml"))
    assert "ae: measured already" in capsys.readouterr().out
    assert json.loads((place / "out" / "comparison.json").read_text()) == compared


def test_other_captions_need_no_other_training(place, compared, capsys):
    comparison.run(arguments(place, place / "vq.yaml", n=3))
    assert "stage 2 of 2, diffusion: finished already" in capsys.readouterr().out
    (row,) = json.loads((place / "out" / "comparison.json").read_text())["rows"]
    assert row["adherence"]["two objects"]["captions"] == 3 and row["run"] == compared["rows"][1]["run"]


def test_pixels_and_a_trained_autoencoder_are_compared_too(place, compared):
    (run,) = (place / "out" / "logs").glob("tiny_ae-*")
    network = yaml.safe_load((place / "ldm.yaml").read_text())
    network["model"]["params"]["network"]["params"] = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
                                                       "transformer_depth": [0], "num_heads": 2, "patch_size": 4}  # fmt: skip
    (place / "pixels.yaml").write_text(yaml.safe_dump(network))
    args = arguments(place, "autoencoder.base.Identity", run, out="other", n=1)
    args.base = str(place / "pixels.yaml")
    comparison.run(args)
    pixels, trained = json.loads((place / "other" / "comparison.json").read_text())["rows"]
    assert (pixels["name"], pixels["kind"], pixels["factor"], pixels["latent"]) == ("Identity", "Identity", 1, [3, 64, 64])
    assert pixels["psnr"] == 100.0 and pixels["rate"] is None and pixels["seconds"] == {"diffusion": pixels["seconds"]["diffusion"]}
    assert (pixels["tokens"], trained["tokens"]) == (256, 16) and trained["autoencoder_hash"] == compared["rows"][0]["autoencoder_hash"]
    text = (place / "other" / "comparison.md").read_text()
    assert "The latent sides differ" in text and text.startswith("| autoencoder")


def test_pictures_that_no_reader_knows_are_judged_by_a_distance(place, compared, tmp_path):
    from ldm.data.shapes import Shapes

    for i in range(8):
        pixels = ((Shapes(count=8)[i]["image"] + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    config = yaml.safe_load((place / "ldm.yaml").read_text())
    folder = {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(tmp_path), "size": 64, "empty_ok": True}}
    config |= {"data": {"train": folder, "validation": folder}}
    (place / "folder.yaml").write_text(yaml.safe_dump(config))
    (run,) = (place / "out" / "logs").glob("tiny_vq-*")
    args = arguments(place, run, out="folder")
    args.base = str(place / "folder.yaml")
    comparison.run(args)
    (row,) = json.loads((place / "folder" / "comparison.json").read_text())["rows"]
    assert "adherence" not in row and row["distance"]["value"] > 0 and row["distance"]["name"].startswith(("FD-", "FID"))
    assert row["distance"]["name"] in (place / "folder" / "comparison.md").read_text()


def test_mistakes_are_found_before_anything_is_trained(place, tmp_path):
    for given, told in (("nowhere.yaml", "no such"), ("Identity", "no such file; expected the config"),
                        (place / "ldm.yaml", "this one trains on top of one"), ("autoencoder.base.Identty", "nearest")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            comparison.run(arguments(place, place / "ae.yaml", given, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_names_are_different(place):
    found = comparison.entries(arguments(place, "a/x.yaml", "b/x.yaml", "autoencoder.base.Identity"))
    assert [entry.name for entry in found] == ["x", "x_2", "Identity"]


def test_an_interrupted_comparison_goes_on(place, compared, tmp_path, capsys):
    shutil.copytree(place / "out", tmp_path / "out")
    (run,) = (tmp_path / "out" / "logs").glob("on_ae-*")
    (run / "DONE").unlink()  # as if it was stopped after its last checkpoint
    (tmp_path / "out" / "ae.json").unlink()
    comparison.run(arguments(place, place / "ae.yaml", out=tmp_path / "out"))
    (row,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert Path(row["run"]) == run and (run / "DONE").is_file() and "starting anew" not in capsys.readouterr().out
    assert row["psnr"] == compared["rows"][0]["psnr"] and row["seconds"]["diffusion"] >= compared["rows"][0]["seconds"]["diffusion"]


CHILD = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.kill(os.getppid(), signal.SIGTERM)
signal.pause()
"""


def test_a_signal_reaches_the_training_and_ends_the_comparison(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train([sys.executable, "-c", CHILD])
    assert "the same command goes on from here" in capsys.readouterr().out and signal.getsignal(signal.SIGTERM) == before


def test_a_training_that_fails_is_told():
    with pytest.raises(UserError, match="ended with status 2"):
        train([sys.executable, "-c", "raise SystemExit(2)"])
    train([sys.executable, "-c", "pass"])
