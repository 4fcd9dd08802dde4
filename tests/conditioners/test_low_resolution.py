"""LowResolution: resizing, and noise of a known level that follows from the sample's place alone."""

import pytest
import torch
import torch.nn.functional as F

from ldm.common.files import UserError
from ldm.common.random import normal
from ldm.common.weights import without_weights
from ldm.conditioners.low_resolution import LowResolution
from ldm.networks.layers import timestep_embedding
from ldm.process import DDPM, RectifiedFlow

X = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
UPSCALER = dict(noise={"target": "ldm.process.DDPM", "params": {"schedule": "linear"}}, max_noise_level=350, noise_level=20,
                level="class", level_width=16)  # fmt: skip


def test_it_is_concatenated_as_it_is_or_resized():
    assert torch.equal(LowResolution()({"low_res": X}).spatial, X)
    found = LowResolution(resize="bilinear")({"low_res": X, "latent_size": (8, 12)}).spatial
    torch.testing.assert_close(found, F.interpolate(X, (8, 12), mode="bilinear"))
    assert LowResolution().vector_width is None and LowResolution(channels=4).beside(7) == 4


def test_noise_is_that_of_the_process_at_its_level():
    conditioner, level = LowResolution(**UPSCALER), torch.tensor([0, 20, 349])
    cond = conditioner({"low_res": X, "noise_level": level, "position": torch.tensor([7, 8, 9])})
    eps = normal((3, 4, 6), 0, "low_res/noise", [7, 8, 9])
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)[level].float().view(3, 1, 1, 1)
    torch.testing.assert_close(cond.spatial, alpha_bar.sqrt() * X + (1 - alpha_bar).sqrt() * eps)
    assert torch.equal(cond.vector, conditioner.embedding.weight[level]) and len(conditioner.embedding.weight) == 1000
    assert conditioner.vector_width == 16 and conditioner.spatial_channels == 3


def test_a_picture_s_noise_does_not_depend_on_its_batch():
    conditioner = LowResolution(**UPSCALER)
    whole = conditioner({"low_res": X, "position": torch.tensor([5, 6, 7])})
    alone = conditioner({"low_res": X[1:2], "position": torch.tensor([6])})
    assert torch.equal(whole.spatial[1:2], alone.spatial) and torch.equal(whole.vector[1:2], alone.vector)


def test_training_draws_levels_below_the_highest():
    conditioner = LowResolution(**UPSCALER)
    given = {"low_res": X, "position": torch.arange(3)}
    found = conditioner.with_dropout(given, {"noise_level": torch.tensor([0.0, 0.5, 0.999999])}.get)
    assert torch.equal(found.vector, conditioner.embedding.weight[[0, 175, 349]])
    told = conditioner.with_dropout({**given, "noise_level": torch.tensor([1, 2, 3])}, lambda stream: torch.zeros(3))
    assert torch.equal(told.vector, conditioner.embedding.weight[[1, 2, 3]])
    assert torch.equal(conditioner(given).vector, conditioner.embedding.weight[[20] * 3])  # sampling: the one of the config


def test_the_level_as_sinusoids():
    conditioner = LowResolution(noise=DDPM("linear"), level="sinusoid", level_width=8)
    level = torch.tensor([3, 40, 500])
    assert torch.equal(conditioner({"low_res": X, "noise_level": level}).vector, timestep_embedding(level, 8))


def test_the_null_keeps_the_level():
    conditioner = LowResolution(**UPSCALER, dropout=0.1)
    cond, null = conditioner.with_null({"low_res": X})
    assert null.vector is cond.vector and not null.spatial.any() and null.spatial.shape == X.shape
    assert LowResolution(**UPSCALER).with_null({"low_res": X})[1] is None


def test_a_plan_without_contents_has_the_levels_all_the_same():
    conditioner = without_weights(lambda: LowResolution(**UPSCALER))
    assert conditioner.embedding.weight.is_meta and not conditioner.noise.process.alpha_bar.is_meta


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="give all three"):
        LowResolution(level="class", level_width=8)
    with pytest.raises(UserError, match="give all three"):
        LowResolution(noise=DDPM(), level="sinusoid")
    with pytest.raises(UserError, match="got RectifiedFlow"):
        LowResolution(noise=RectifiedFlow())
    with pytest.raises(UserError, match="max_noise_level 2000"):
        LowResolution(noise=DDPM(), max_noise_level=2000)
    with pytest.raises(UserError, match=r"'noise_level' holds whole numbers from 0 to 999, got \[1000, 0, 0\]"):
        LowResolution(**UPSCALER)({"low_res": X, "noise_level": torch.tensor([1000, 0, 0])})
    with pytest.raises(UserError, match="'low_res' has to be"):
        LowResolution()({"low_res": X[:, :1]})
