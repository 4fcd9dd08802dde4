"""Every file in configs/ is right, and what it describes can be built: of tensors without contents, without its data."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensor

from ldm.app.parts import autoencoder_block
from ldm.app.stages import Stage, read
from ldm.app.survey import size_of, survey
from ldm.bundle import Bundle
from ldm.classifier import NoisyClassifier
from ldm.common.build import build
from ldm.common.config import Sampling, check_config, load, section
from ldm.common.named import pick
from ldm.common.optim import make_optimizer
from ldm.samplers import SAMPLERS
from ldm.times import make_times

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {str(path.relative_to(CONFIGS)): path for path in sorted(CONFIGS.rglob("*.yaml"))}
EVERY = pytest.mark.parametrize("path", FILES.values(), ids=FILES)
SIDE = 64  # of the pictures where a config leaves it to its data


@pytest.fixture(scope="module")
def surveyed():
    """-> the survey of the stage that a file itself describes, made once for all tests."""
    made = {}

    def get(path):
        if path not in made:
            stages, mistakes = read([path])
            assert mistakes == []
            stage: Stage = stages[-1]
            made[path] = survey(stage, 1, autoencoder_block(stage), size_of(stage) or (3, SIDE, SIDE))
        return made[path]

    return get


def test_there_are_configs():
    assert {"autoencoder_kl.yaml", "autoencoder_vq.yaml", "tiny/ldm_txt2img.yaml", "autoencoder/kl_f8.yaml",
            "diffusion/ldm_txt2img_256.yaml", "classifier.yaml"} <= set(FILES)  # fmt: skip


@EVERY
def test_nothing_is_wrong_with_it(path):
    assert check_config(load([path])) == []
    stages, mistakes = read([path])
    assert mistakes == []
    assert [stage.kind for stage in stages] in (["autoencoder"], ["diffusion"], ["autoencoder", "diffusion"],
                                                ["autoencoder", "classifier"])  # fmt: skip


@EVERY
def test_a_wrong_key_in_it_would_be_found(path):
    mistakes = check_config(load([path], ["model.params.nonsense=1", "trainer.max_stepz=3"]))
    assert len(mistakes) == 2 and mistakes[0].startswith(("model.params.nonsense", "trainer.max_stepz"))


def test_names_differ_so_that_runs_do():
    names = [OmegaConf.load(path).name for path in FILES.values()]
    assert len(set(names)) == len(names)


@EVERY
def test_its_model_is_built_and_a_picture_passes_through(path, surveyed):
    found = surveyed(path)
    assert all(p.is_meta or isinstance(p, FakeTensor) for p in found.module.parameters())
    assert found.trainable > 0 and all(flops > 0 for flops in found.flops.values())
    assert ("autoencoder" if found.stage.kind == "autoencoder" else "network") in found.flops
    frozen = [part.name for part in found.parts if part.frozen and not part.trainable]
    assert set(frozen) <= {"autoencoder", "text encoder", "picture encoder", "averaged (ema)", "loss"}


@EVERY
def test_every_trained_weight_is_in_one_optimizer_group(path, surveyed):
    found = surveyed(path)
    module = found.module
    parts = [module.trained]
    parts += [module.critic] if getattr(module, "critic", None) is not None else []
    held = []
    for part in parts:
        optimizer = make_optimizer(found.stage.config["model"]["params"]["optimizer"], part)
        held += [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert len(held) == len(set(held)) and set(held) == trained


@EVERY
def test_its_learning_rate_ends_where_the_run_does(path):
    config = read([path])[0][-1].config
    block, total = config["model"]["params"].get("schedule"), config["trainer"]["max_steps"]
    course = build(block, total=total) if block else lambda step: 1.0
    values = [course(step) for step in range(0, total, max(1, total // 200))]
    assert all(0 < value <= 1 for value in values) and max(values) >= 0.9
    assert course(total) in (0.0, 1.0)


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if "autoencoder" in OmegaConf.load(path)])
def test_a_checkpoint_with_it_can_be_read_without_trust(name, surveyed):
    stage = surveyed(FILES[name]).stage
    bundle = Bundle.from_config({**stage.config, "autoencoder": autoencoder_block(stage)}, sampling=stage.sampling)
    if stage.kind == "classifier":
        assert bundle.denoiser is None and NoisyClassifier.from_about(surveyed(FILES[name]).module.classifier().about)
        return
    asked, process = section(stage.config, Sampling), bundle.denoiser.process
    times = make_times(asked.times, process, asked.steps)
    assert (times.diff() < 0).all() and times[0] == process.t_max
    scale = asked.guidance["scale"] if isinstance(asked.guidance, dict) else asked.guidance
    assert scale >= 1 and callable(pick(asked.sampler, SAMPLERS, "sampler"))
    side = (size_of(stage) or (3, SIDE, SIDE))[1]
    assert side % (bundle.autoencoder.factor * bundle.denoiser.network.multiple) == 0


def test_the_large_recipe_has_the_sizes_of_stable_diffusion_1(surveyed):
    """UNet 859,520,964 and autoencoder 83,653,863 parameters as published; CLIP ViT-L/14's text tower 123 M."""
    found = surveyed(FILES["diffusion/ldm_txt2img_256.yaml"])
    counts = {part.name: part.trainable + part.frozen for part in found.parts}
    assert counts["denoiser"] == 859_520_964 and counts["autoencoder"] == 83_653_863
    assert 122e6 < counts["text encoder"] < 125e6
