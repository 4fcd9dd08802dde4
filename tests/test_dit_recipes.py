"""The recipes of DiT, and their tiny twins, which train and draw."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import ldm
from main import main

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "diffusion").glob("dit_*.yaml"))
ALONE = {"width", "depth", "heads", "base_size"}  # what is smaller in the twin
SHORT = ["trainer.max_steps=2", "loader.batch_size=4", "validation={every: 2, batches: 1}",
         "logging={every: 1, images_every: 2, wandb: false}"]  # fmt: skip
FEW = {"train": 8, "validation": 4}


def network(folder, name):
    return yaml.safe_load((CONFIGS / folder / f"{name}.yaml").read_text())["model"]["params"]["network"]


@pytest.mark.parametrize("name", RECIPES)
def test_its_twin_is_the_same_but_smaller(name):
    big, tiny = network("diffusion", name), network("tiny", name)
    assert big["target"] == tiny["target"] == "ldm.networks.dit.DiT" and big["params"].keys() == tiny["params"].keys()
    assert {key for key in big["params"] if big["params"][key] != tiny["params"][key]} <= ALONE
    assert (big["params"]["width"], big["params"]["depth"], big["params"]["heads"]) == (1152, 28, 16)  # DiT-XL


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_twin_trains_and_draws(name, tmp_path, text_encoder):
    arguments = [*SHORT, *(f"stage1.{one}" for one in SHORT[:3])]
    data = yaml.safe_load((CONFIGS / f"tiny/{name}.yaml").read_text())["data"]
    for role, n in FEW.items():
        wrapped = "params.dataset.params" if "dataset" in data[role]["params"] else "params"
        arguments += [f"data.{role}.{wrapped}.count={n}", f"stage1.data.{role}.params.count={n}"]
    if "txt2img" in name:  # an encoder that is made here in place of a package's
        text = {"encoder": text_encoder, "layer": 1, "max_length": 24}
        arguments += [f"model.params.conditioner.params.{key}={value}" for key, value in text.items()]
    assert main(["-b", str(CONFIGS / f"tiny/{name}.yaml"), "-t", "-l", str(tmp_path), "--no-test", *arguments]) == 0
    (run,) = tmp_path.glob(f"tiny_{name}-*")
    assert (run / "samples" / "step-000002.png").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2 and losses[0] == pytest.approx(2, abs=1.5)  # a network that says 0: |eps - x0|^2
    bundle = ldm.load(run)
    batch = {"caption": ["a red circle", "a blue star"]} if "txt2img" in name else {"class": torch.tensor([3, 5])}
    assert bundle.generate(batch, steps=2).shape == (2, 3, 64, 64)
