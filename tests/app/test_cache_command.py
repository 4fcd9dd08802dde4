"""`cache`: what it makes is what the training would make, which then makes nothing."""

import pytest
from drawn import fails
from two_stages import write_configs

from ldm.__main__ import main as tool
from ldm.app import parts
from ldm.data.shapes import Shapes
from main import main

PIXELS = "autoencoder={target: autoencoder.base.Identity}"


@pytest.fixture(scope="module")
def configs(tmp_path_factory, text_encoder):
    return write_configs(tmp_path_factory.mktemp("configs"), text_encoder)


def made(out):
    return [line.split(": ", 1)[1] for line in out.splitlines() if " made in " in line]


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))


def test_a_training_finds_all_of_it(configs, tmp_path, capsys):
    base = ["-b", str(configs / "ldm.yaml"), "-l", str(tmp_path / "logs"), PIXELS, "trainer.max_steps=1"]
    assert tool(["cache", *base]) == 0
    out = capsys.readouterr().out
    different = [len({shapes.caption(i) for i in range(len(shapes))}) for shapes in (Shapes(24), Shapes(6, start=90))]
    assert [line.rsplit(" in ", 1)[0] for line in made(out)] == [
        "latents: 24 made", f"text states: {different[0]} made", "latents: 6 made", f"text states: {different[1]} made"]
    cache, (*_, train, validation) = tmp_path / "logs" / "cache", out.splitlines()
    assert train.startswith(f"train: 24 samples, latents in {cache / 'latents-'}") and validation.startswith("validation: 6 samples, ")
    before = files(cache)
    assert len(before) == 4 and [path.name for path in (tmp_path / "logs").iterdir()] == ["cache"]
    assert tool(["cache", *base]) == 0 and made(capsys.readouterr().out) == []
    assert main([*base, "-t", "--no-test"]) == 0
    assert made(capsys.readouterr().out) == [] and files(cache) == before


def test_a_first_stage_has_to_be_there(configs, tmp_path, capsys, monkeypatch):
    base = ["cache", "-l", tmp_path / "logs", "-b", configs / "ldm.yaml"]
    told = fails(capsys, *base)
    assert "ae.yaml: no finished run of it in" in told and f"main.py --base {configs / 'ae.yaml'} -t" in told
    assert main(["-b", str(configs / "ae.yaml"), "-t", "-l", str(tmp_path / "logs"), "--no-test", "trainer.max_steps=1"]) == 0
    capsys.readouterr()
    assert tool([str(each) for each in [*base, "stage1.trainer.max_steps=1"]]) == 0
    (run,) = (tmp_path / "logs").glob("tiny_ae-*")
    hashed = parts.load(run).autoencoder.content_hash()
    assert (tmp_path / "logs" / "cache" / f"latents-{hashed}").is_dir()


def test_mistakes(configs, tmp_path, capsys):
    base = ["cache", "-l", tmp_path / "logs", "-b"]
    assert "only trainings on latents keep any" in fails(capsys, *base, configs / "ae.yaml")
    assert "keeps nothing on disk; ask for it, cache.latents=true" in fails(
        capsys, *base, configs / "ldm.yaml", PIXELS, "cache={latents: false, text: false}")
    assert "nearest: 'latents'" in fails(capsys, *base, configs / "ldm.yaml", PIXELS, "cache={latent: true}")
    assert "data.train: " in fails(capsys, *base, configs / "ldm.yaml", PIXELS, "data.train={target: ldm.data.folder.ImageFolder, params: {root: /no/such, size: 32}}")
    assert not (tmp_path / "logs").exists()
