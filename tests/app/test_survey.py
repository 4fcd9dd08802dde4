import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from ldm.app import plan
from ldm.app.parts import autoencoder_block, make_module
from ldm.app.stages import read
from ldm.app.survey import MOMENTS, size_of, survey, surveys, world
from ldm.common.build import build


@pytest.fixture
def planned(configs):
    stages, mistakes = read([configs / "ldm.yaml"])
    assert mistakes == [] and [stage.open() for stage in stages] == [[], []]
    return stages


def test_counts_are_those_of_the_real_module(planned):
    found, problems = surveys(planned, 2)
    assert problems == []
    for one in found:
        block = autoencoder_block(one.stage)
        module = make_module(one.stage, block and build(block), one.stage.picture)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert one.trainable == trainable
        assert sum(p.trainable + p.frozen for p in one.parts if p.stored) == sum(p.numel() for p in module.parameters())
        state = sum(value.numel() * value.element_size() for value in module.state_dict().values())
        assert 0 <= one.checkpoint - state - 4 * MOMENTS * trainable < 100  # buffers that are not stored
    assert found[1].global_batch == 8 and found[1].steps == 6 and found[1].images == 48


def test_arithmetic_of_one_convolution(planned, monkeypatch):
    first = planned[0]

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.autoencoder = torch.nn.Conv2d(3, 5, 3, padding=1)
            self.autoencoder.encode, self.autoencoder.decode = self.autoencoder.forward, lambda z: z

    monkeypatch.setattr("ldm.app.survey.make_module", lambda *_: One())
    found = survey(first, 1, None, (3, 64, 64))
    assert found.flops["autoencoder"] == 2 * 5 * 3 * 9 * 64 * 64
    assert found.activations == 4 * 3 * 64 * 64  # the input, of which the weights' gradient is made
    assert found.flops_per_step == 3 * 4 * found.flops["autoencoder"]


def test_nothing_is_computed(planned):
    found, _ = surveys(planned, 1)
    assert all(isinstance(p, FakeTensor) for one in found for p in one.module.parameters())


def test_sizes_that_do_not_fit_are_found(configs):
    stages, _ = read([configs / "ldm.yaml"], ["model.params.network.params.transformer_depth=[1]"])
    for stage in stages:
        stage.open()
    found, problems = surveys(stages, 1)
    assert len(found) == 1 and problems[0].startswith("stage 2 of 2, diffusion: ") and "transformer_depth" in problems[0]


def test_without_data_the_config_says_the_size(configs):
    missing = "data.train={target: ldm.data.folder.ImageFolder, params: {root: /no, size: 32}}"
    (stage,), _ = read([configs / "ae.yaml"], [missing])
    assert stage.open() != [] and size_of(stage) == (3, 32, 32)
    found = survey(stage, 1, None, size_of(stage))
    text = "\n".join(plan.summary(found) + plan.details(found))
    assert "one image of 32x32" in text and "4 steps: 16 images\n" in text


def test_what_is_told(planned):
    found, _ = surveys(planned, 2)
    text = "\n".join(line for one in found for line in plan.summary(one) + plan.details(one))
    length = "global batch 8 = 4 x 2 devices x accumulation 1, 6 steps: 48 images, 2 epochs"
    for part in (f"effective lr 0.001 (not scaled), {length}", "text encoder", "averaged (ema)", "checkpoint ",
                 "memory of a device about ", "arithmetic of a device "):
        assert part in text, part


@pytest.mark.parametrize("trainer, devices", [({}, 1), ({"devices": "auto"}, 1), ({"devices": 2, "num_nodes": 3}, 6),
                                              ({"devices": [0, 2]}, 2), ({"devices": "0,3"}, 2), ({"devices": "4"}, 4),
                                              ({"devices": -1}, 1)])  # fmt: skip
def test_devices(trainer, devices):
    assert world(trainer) == devices


def test_units():
    assert plan.size(3.5 * 2**30) == "3.5 GiB" and plan.size(0) == "0 MiB" and plan.flops(2.5e12) == "2.5 TFLOP"
