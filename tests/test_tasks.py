"""Every task trains, and draws from a batch of its conditions, at the smallest size; all of it comes back from the checkpoint."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import default_collate

import ldm
from ldm.app.stages import read
from ldm.common.build import build
from main import main

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = sorted(path.stem for path in (CONFIGS / "tasks").glob("*.yaml"))
SHORT = ["trainer.max_steps=2", "loader.batch_size=4", "validation={every: 2, batches: 1}",
         "logging={every: 1, images_every: 2, wandb: false}"]  # fmt: skip
FEW = {"train": 8, "validation": 4}
HINTS = {  # task -> the command and conditions that are told at the end of its training
    "class_conditional": ("generate", "--class 0"), "image_variations": ("variations", "--image IMAGE.png"),
    "inpainting": ("inpaint", '" --image IMAGE.png --mask MASK.png'), "layout_to_image": ("generate", "--boxes LAYOUT.json"),
    "semantic_synthesis": ("generate", "--segmentation SEGMENTATION.png"), "super_resolution": ("upscale", "--image LOW_RES.png"),
    "unconditional": ("generate", "--n-samples 4"),
}  # fmt: skip


def shortened(name, encoders):
    """Arguments that make the tiny config of a task shorter, and name encoders that are made here."""
    config = read([CONFIGS / f"tiny/{name}.yaml"])[0][-1].config
    said = [*SHORT, *(f"stage1.{one}" for one in SHORT[:3]), *(f"stage1.data.{role}.params.count={n}" for role, n in FEW.items())]
    for role, n in FEW.items():
        wrapped = "params.dataset.params" if "dataset" in config["data"][role]["params"] else "params"
        said.append(f"data.{role}.{wrapped}.count={n}")
    conditioner = config["model"]["params"].get("conditioner") or {}
    if "parts" in conditioner.get("params", {}):
        conditioner["params"]["parts"][0]["params"] |= {"encoder": encoders[0], "layer": 1, "max_length": 24}
        said.append(f"model.params.conditioner.params.parts={json.dumps(conditioner['params']['parts'])}")
    if "encoder" in conditioner.get("params", {}):
        said.append(f"model.params.conditioner.params.encoder={encoders[1]}")
    return said


@pytest.fixture(scope="module")
def encoders(text_encoder, tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**size, image_size=32, patch_size=16, projection_dim=8)).save_pretrained(folder)
    return text_encoder, str(folder)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


def test_every_task_has_a_twin():
    assert {"class_conditional", "image_variations", "inpainting", "layout_to_image", "semantic_synthesis", "super_resolution",
            "unconditional"} == set(TASKS)  # fmt: skip
    for name in TASKS:
        big, tiny = (yaml.safe_load((CONFIGS / f"{folder}/{name}.yaml").read_text()) for folder in ("tasks", "tiny"))
        kinds = [config["model"]["params"].get("conditioner", {}).get("target") for config in (big, tiny)]
        assert kinds[0] == kinds[1]
        assert big["data"]["train"]["target"] == tiny["data"]["train"]["target"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_and_draws(name, logs, encoders, capsys):
    arguments = shortened(name, encoders)
    config = CONFIGS / f"tiny/{name}.yaml"
    assert main(["-b", str(config), "-t", "-l", str(logs), "-n", name, "--no-test", *arguments]) == 0
    hint = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("try next:"))
    assert f"python -m ldm {HINTS[name][0]} --ckpt" in hint and f"{HINTS[name][1]} --outdir out" in hint
    (run,) = logs.glob(f"{name}-*")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2] and list(run.rglob("step-000002.png"))
    bundle = ldm.load(run)
    data = build(read([config], [a for a in arguments if not a.startswith("stage1.")])[0][-1].config["data"]["validation"])
    batch = default_collate([data[i] for i in range(3)])
    batch.pop("key")
    pictures = bundle.generate(batch, steps=2, seed=5)
    assert pictures.shape == (3, 3, 64, 64) and pictures.isfinite().all()
    alone = bundle.generate({key: value[1:2] for key, value in batch.items()}, steps=2, seed=5, indices=[1])
    torch.testing.assert_close(alone, pictures[1:2], atol=1e-4, rtol=0)  # whatever the batch


def test_a_number_of_pictures_without_captions(bundle):
    assert torch.equal(bundle.generate(2, steps=1), bundle.generate(["", ""], steps=1))


def test_latents_on_disk_know_nothing_of_pictures_that_are_encoded(logs, encoders, capsys):
    arguments = [*shortened("inpainting", encoders), "cache.latents=true", "trainer.max_steps=3"]
    assert main(["-b", str(CONFIGS / "tiny/inpainting.yaml"), "-t", "-l", str(logs), "-n", "refused", *arguments]) == 2
    told = capsys.readouterr()
    assert "set cache.latents: false" in told.err and "stage 1 of 2, autoencoder: training" not in told.out


def test_what_was_trained_draws_on_the_command_line(logs, encoders, tmp_path):
    """From training to a picture: of a layout, as the last line of the training says."""
    from ldm.__main__ import main as ldm_main

    arguments = [*shortened("layout_to_image", encoders), "seed=5"]
    assert main(["-b", str(CONFIGS / "tiny/layout_to_image.yaml"), "-t", "-l", str(logs), "-n", "end_to_end", "--no-test", *arguments]) == 0
    (run,) = logs.glob("end_to_end-*")
    (tmp_path / "layout.json").write_text(json.dumps([{"box": [0.1, 0.1, 0.6, 0.5], "class": 7}]))
    command = ["generate", "--ckpt", str(run), "--boxes", str(tmp_path / "layout.json"), "--outdir", str(tmp_path / "out"), "--steps", "2"]
    assert ldm_main(command) == 0 and [file.name for file in (tmp_path / "out").iterdir()] == ["00000.png"]


def test_a_picture_encoder_that_is_not_there_is_told_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    from ldm.common.files import UserError
    from ldm.conditioners import vision

    def nowhere(name, only_config=False):
        raise UserError(f"picture encoder {name}: not to be had")

    monkeypatch.setattr(vision, "find", nowhere)
    command = ["-b", str(CONFIGS / "tiny/image_variations.yaml"), "-t", "-l", str(tmp_path / "logs"),
               "model.params.conditioner.params.encoder=openai/clip-vit-large-patch14"]
    assert main(command) == 2
    assert "picture encoder openai/clip-vit-large-patch14: not to be had" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
