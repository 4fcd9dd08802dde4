"""A classifier of noisy latents is trained by main.py, goes on, comes back from its checkpoint, and guides."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.classifier import by_classifier
from ldm.common.config import check_config, load
from ldm.common.files import UserError
from ldm.load import load_classifier
from main import main

CONFIG = Path(__file__).parents[1] / "configs/tiny/classifier.yaml"
COUNTS = {"train": 16, "validation": 4}
SHORT = ["loader.batch_size=4", "validation={every: 2, batches: 1}", "logging={every: 1, images_every: 2, wandb: false}"]
ARGUMENTS = [*SHORT, *(f"stage1.{one}" for one in SHORT), "stage1.trainer.max_steps=2",
             *(f"data.{role}.params.dataset.params.count={n}" for role, n in COUNTS.items()),
             *(f"stage1.data.{role}.params.count={n}" for role, n in COUNTS.items())]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    assert main(["-b", str(CONFIG), "-t", "-l", str(logs), *ARGUMENTS, "trainer.max_steps=2"]) == 0
    (folder,) = logs.glob("tiny_classifier-*")
    return folder


def rows(run, name):
    return [row for line in (run / "metrics.jsonl").read_text().splitlines() if name in (row := json.loads(line))]


def test_it_trains_and_shows_what_it_judges(run):
    assert [row["step"] for row in rows(run, "train/accuracy")] == [1, 2]
    (validated,) = rows(run, "val/accuracy")
    assert {f"val/{name}_q{quarter}" for name in ("loss", "accuracy") for quarter in range(1, 5)} <= validated.keys()
    assert (run / "judged/step-000002.png").is_file() and (run / "judged/final.png").is_file()


def test_it_comes_back_averaged_or_raw(run):
    averaged, raw = load_classifier(run), load_classifier(run, ema=False)
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for found, prefix in ((averaged, "ema.shadow.classifier."), (raw, "model.classifier.")):
        assert all(torch.equal(value, saved[prefix + name]) for name, value in found.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), raw.parameters(), strict=True))
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([0.1, 0.9])
    assert averaged(x, t).shape == (2, 48) and averaged.about["kind"] == "classifier"


def test_what_load_gives_is_the_autoencoder_below(run):
    bundle = ldm.load(run)
    assert bundle.denoiser is None and bundle.autoencoder.content_hash() == load_classifier(run).about["autoencoder_hash"]


def test_it_goes_on(run):
    assert main(["-t", "-l", str(run.parent), "-r", str(run), "trainer.max_steps=4", "--no-test"]) == 0
    assert [row["step"] for row in rows(run, "train/accuracy")] == [1, 2, 3, 4]


def test_it_guides_models_on_the_same_latents_alone(run, bundle, tmp_path):
    classifier = load_classifier(run)
    with pytest.raises(UserError, match="latents of another autoencoder"):
        by_classifier(classifier, 1.0, bundle.denoiser.process, bundle.autoencoder)
    guide = by_classifier(classifier, 20.0, bundle.denoiser.process)
    batch = {"caption": ["a circle", "a star"], "class": [3, 40]}
    assert not torch.allclose(bundle.generate(batch, steps=2, size=64, guide=guide), bundle.generate(batch, steps=2, size=64))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "other.safetensors", next(run.parent.glob("tiny_autoencoder_kl-*"))):
        with pytest.raises(UserError, match="and no classifier"):
            load_classifier(path)


@pytest.mark.parametrize(("change", "told"), [("sampling={steps: 5}", "sampling: belongs to diffusion models"),
                                              ("autoencoder=null", "a classifier needs one of config"),
                                              ("model.params.classifier.params.in_channels=4", "in_channels"),
                                              ("model.params.classifier.params.pool=max", "pool")])  # fmt: skip
def test_mistakes_are_told(change, told):
    assert any(told in mistake for mistake in check_config(load([CONFIG], [change])))


def test_data_without_classes_is_refused(tmp_path, capsys):
    plain = "data.train={target: ldm.data.shapes.Shapes, params: {count: 16}}"
    arguments = [a for a in ARGUMENTS if not a.startswith("data.")] + [plain, "data.validation=null", "trainer.max_steps=1"]
    assert main(["-b", str(CONFIG), "-t", "-l", str(tmp_path), *arguments]) == 2
    assert "have no 'class'" in capsys.readouterr().err
