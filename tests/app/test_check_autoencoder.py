"""python -m ldm check-autoencoder."""

import sys

import pytest
import yaml

from ldm.__main__ import main
from ldm.bundle import Bundle
from ldm.common.build import build

SOURCE = '''
import torch
from torch import nn
from autoencoder.base import Autoencoder


class Mine(Autoencoder):
    def __init__(self, channels: int = 4, gain: float = 1.0):
        super().__init__(3, channels, 2)
        self.gain, self.down, self.up = gain, nn.Conv2d(3, channels, 2, 2), nn.ConvTranspose2d(channels, 3, 2, 2)

    def moments(self, x):
        return self.gain * self.down(x), None

    def decode_raw(self, z):
        return self.up(z / self.gain)


class Shaky(Mine):
    def moments(self, x):
        return self.down(x) + 0.1 * torch.randn(()), None


number = 3
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with mine.py in it, which is not otherwise importable."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    yield tmp_path
    sys.modules.pop("mine", None)


def said(capsys) -> dict[str, str]:
    """name of the promise -> status"""
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:9].strip() in ("ok", "note", "FAILED", "not tried")]
    return {line[10:].split("  ")[0].strip(): line[:9].strip() for line in lines}


@pytest.mark.parametrize("name", ["mine:Mine", "mine.Mine"])
def test_a_class_in_the_current_folder(here, capsys, name):
    assert main(["check-autoencoder", name, "--params", "channels=6", "gain=2.0", "--size", "8"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "mine.Mine" and "6 of the latent, factor 2" in out and "at 8x8, 8x10, 16x8" in out
    assert out.splitlines()[-1] == "20 ok, 1 note"
    assert "note      last layer" in out  # no critic, no failure


def test_a_broken_promise_is_exit_status_1(here, capsys):
    assert main(["check-autoencoder", "mine:Shaky"]) == 1
    statuses = said(capsys)
    assert statuses["same twice"] == statuses["no global randomness"] == "FAILED" and statuses["draws"] == "not tried"


@pytest.mark.parametrize(("arguments", "told"), [
    (["mine:Mime"], "mine has no 'Mime'; nearest: 'Mine'"),
    (["mime:Mine"], "no package 'mime' is installed or on PYTHONPATH; nearest: 'mine'"),
    (["mine:number"], "mine.number is of type int, not a class or function"),
    (["mine:Mine", "--params", "chanels=3", "gain=high"], "autoencoder.params.gain: expected float, got text 'high'; "
     "autoencoder.params.chanels: Mine has no such option; nearest: 'channels'"),
    (["mine:Mine", "--params", "channels"], "expected key.path=value"),
    ([], "which autoencoder? give one of PACKAGE.MODULE:CLASS, --config and --ckpt"),
    (["mine:Mine", "--ckpt", "x.ckpt"], "which autoencoder?"),
    (["--config", "data.yaml"], "data.yaml: no autoencoder in it"),
    (["--config", "dato.yaml"], "dato.yaml: no such config file; nearest: data.yaml"),
    (["--ckpt", "x.ckpt"], "x.ckpt: no such file"),
    (["mine:Mine", "--szie", "8"], "no argument --szie; nearest: --size"),
])  # fmt: skip
def test_mistakes_are_exit_status_2(here, capsys, arguments, told):
    (here / "data.yaml").write_text("data: {train: null}\n")
    assert main(["check-autoencoder", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and len(err.splitlines()) == 1


def test_configs_of_both_stages(here, capsys):
    block = {"target": "mine.Mine", "params": {"channels": 5}}
    ae = {"model": {"target": "autoencoder.lit.AutoencoderModule", "params": {"autoencoder": block}}}
    for name, config in (("ae", ae), ("ldm", {"autoencoder": {"config": "ae.yaml"}}), ("own", {"autoencoder": block})):
        (here / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert main(["check-autoencoder", "--config", f"{name}.yaml", "--params", "gain=3.0"]) == 0
        assert "5 of the latent" in capsys.readouterr().out


def test_a_checkpoint(here, capsys):
    block = {"target": "mine.Mine", "params": {"channels": 5}}
    config = {"model": {"target": "autoencoder.lit.AutoencoderModule", "params": {"autoencoder": block}}}
    Bundle(build(block), config=config).save(here / "mine.safetensors")
    assert main(["check-autoencoder", "--ckpt", "mine.safetensors"]) == 2
    assert "if you trust where it comes from, say --trust" in capsys.readouterr().err
    assert main(["check-autoencoder", "--ckpt", "mine.safetensors", "--trust"]) == 0
    assert set(said(capsys).values()) == {"ok", "note"}
    assert main(["check-autoencoder", "--ckpt", "mine.safetensors", "--trust", "--params", "gain=2"]) == 2
    assert "a checkpoint has its own" in capsys.readouterr().err
