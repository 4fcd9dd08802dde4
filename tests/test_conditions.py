"""Conditions on their way: what guidance makes of them in sampling, and dropout in training, on a network that only adds them up."""

import pytest
import torch
from torch import nn

from autoencoder.base import Identity
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.common.random import uniform
from ldm.conditioners.join import Join
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.spatial import MaskedImage, Picture
from ldm.denoiser import Denoiser
from ldm.lit import DiffusionModule
from ldm.process import RectifiedFlow


class Sum(nn.Module):
    """x0 = the vector's first number + everything beside x_t, whatever x_t is."""

    given = ("in_channels", "out_channels")

    def __init__(self, in_channels=3, out_channels=3):
        super().__init__()
        self.taken, self.out = in_channels, out_channels
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, time, cond):
        beside = x[:, self.out :].sum(dim=1, keepdim=True)
        vector = 0 if cond.vector is None else cond.vector[:, :1, None, None]
        return self.weight * (beside + vector).expand(-1, self.out, *x.shape[2:])


def bundle(*parts, **more):
    denoiser = Denoiser(Sum(), RectifiedFlow(), "data")
    made = Bundle(Identity(3), Join(list(parts), **more), denoiser, sampling={"size": [4, 4], "sampler": "euler", "steps": 2})
    return made.eval()


def label(**more):
    conditioner = ClassLabel(4, 2, **more)
    nn.init.constant_(conditioner.embedding.weight, 0.25)
    with torch.no_grad():
        conditioner.embedding.weight[:, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4, -0.05])
    return conditioner


MAP = torch.full((2, 1, 4, 4), 0.1)


def test_guidance_turns_off_what_has_a_null_and_leaves_the_rest():
    model = bundle(label(dropout=0.1), Picture("map", 1))
    found = model.generate({"class": [1, 3], "map": MAP}, guidance=2.0)
    for picture, guided in zip(found, (-0.05 + 2 * 0.25, -0.05 + 2 * 0.45), strict=True):
        torch.testing.assert_close(picture, torch.full((3, 4, 4), 0.1 + guided))
    plain = model.generate({"class": [1, 3], "map": MAP}, guidance=1.0)
    torch.testing.assert_close(plain[1], torch.full((3, 4, 4), 0.5))


def test_a_map_that_was_dropped_in_training_is_guided_too():
    model = bundle(label(dropout=0.1), Picture("map", 1, dropout=0.1))
    found = model.generate({"class": [1, 1], "map": MAP}, guidance=2.0)
    torch.testing.assert_close(found, torch.full((2, 3, 4, 4), -0.05 + 2 * (0.3 + 0.05)))


def test_a_single_number_is_that_of_all_pictures():
    model = bundle(label(dropout=0.1), Picture("map", 1))
    torch.testing.assert_close(model.generate({"class": 1, "map": MAP}, guidance=1.0), torch.full((2, 3, 4, 4), 0.3))
    with pytest.raises(UserError, match="as many of each kind"):
        model.generate({"class": [1, 2, 3], "map": MAP})


def test_pictures_are_encoded_for_sampling():
    image, mask = torch.full((2, 3, 4, 4), 0.2), torch.zeros(2, 1, 4, 4)
    mask[:, :, 2:] = 1
    found = bundle(MaskedImage()).generate({"image": image, "mask": mask}, guidance=3.0)
    torch.testing.assert_close(found[:, :, :2], torch.full((2, 3, 2, 4), 0.6))  # three channels of 0.2, no mask
    torch.testing.assert_close(found[:, :, 2:], torch.full((2, 3, 2, 4), 1.0))  # nothing but the mask


def test_guidance_without_dropout_in_training_is_warned_of(caplog):
    bundle(label()).generate({"class": [1]}, guidance=2.0)
    assert "trained without" in caplog.text
    caplog.clear()
    bundle(label(dropout=0.1)).generate({"class": [1]}, guidance=2.0)
    bundle(Picture("map", 1)).generate({"map": MAP}, guidance=2.0)
    assert not caplog.text


def test_training_drops_each_part_by_its_own_stream():
    network = {"target": f"{__name__}.Sum"}
    optimizer = {"target": "torch.optim.SGD", "params": {"lr": 0.1}}
    join = Join([label(dropout=0.5), Picture("map", 1, dropout=0.5), MaskedImage()])
    module = DiffusionModule(Identity(3), network, optimizer, join, parameterization="data", seed=3)
    assert module.model["denoiser"].network.taken == 3 + 1 + 3 + 1
    positions = list(range(64))
    batch = {"image": torch.zeros(64, 3, 4, 4), "class": torch.ones(64, dtype=torch.long), "map": MAP[:1].expand(64, -1, -1, -1),
             "mask": torch.zeros(64, 1, 4, 4), "position": torch.tensor(positions)}  # fmt: skip
    cond = module.condition(module.model, batch, batch["image"], lambda stream: uniform(3, stream, positions))
    drops = [uniform(3, f"drop/{i}", positions) < 0.5 for i in range(2)]
    torch.testing.assert_close(cond.vector[:, 0], torch.where(drops[0], -0.05, 0.2))
    torch.testing.assert_close(cond.spatial[:, 0, 1, 1], torch.where(drops[1], 0.0, 0.1))
    assert cond.spatial.shape == (64, 5, 4, 4) and 10 < (drops[0] & ~drops[1]).sum() < 22
    assert torch.equal(module.condition(module.model, batch, batch["image"]).vector[:, 0], torch.full((64,), 0.2))
