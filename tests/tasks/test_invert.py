"""DDIM inversion: there and back is the identity, and another condition moves the picture by its own map."""

import pytest
import torch
from exact import MEANS, STD, classes, exact, pictures

from ldm import tasks
from ldm.common.files import UserError
from ldm.samplers import ddim


def test_there_and_back_is_the_identity():
    model, x = exact(classes()), pictures(2, 8, 8)
    batch = {"class": [0, 2]}
    errors = [float((tasks.edit(model, x, batch, batch, steps=steps) - x).abs().mean()) for steps in (50, 200)]
    assert errors[1] < 0.3 * errors[0] < 0.02  # of first order
    found = tasks.edit(model, x, batch, batch, steps=10, refine=60)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)
    half = tasks.edit(model, x, batch, batch, steps=10, refine=60, strength=0.45)
    torch.testing.assert_close(half, x, atol=1e-5, rtol=0)


def test_the_noise_is_that_of_the_exact_flow():
    """Pixels of a class stand as many deviations from its mean in the noise as in the picture."""
    model, x = exact(classes()), pictures(1, 8, 8)
    found = tasks.invert(model, x, {"class": [2]}, steps=400)
    torch.testing.assert_close(found, (x - MEANS[2]) / STD, atol=1e-2, rtol=1e-2)
    part = tasks.invert(model, x, {"class": [2]}, steps=200, strength=0.5)
    spread = (0.25 * STD**2 + 0.25) ** 0.5
    torch.testing.assert_close(part, 0.5 * MEANS[2] + spread * (x - MEANS[2]) / STD, atol=1e-2, rtol=2e-2)


def test_another_condition_moves_every_pixel_to_the_same_place_of_its_own_distribution():
    model, x = exact(classes()), 0.5 * pictures(1, 8, 8)
    found = tasks.edit(model, x, {"class": [1]}, {"class": [2]}, steps=40, refine=10)
    torch.testing.assert_close(found, x + MEANS[2] - MEANS[1], atol=2e-2, rtol=0)
    exactly = tasks.edit(model, x, {"class": [1]}, {"class": [2]}, steps=40, refine=10, sampler=ddim)
    assert torch.equal(found, exactly)


def test_a_trained_kind_of_model_comes_back_near(bundle):
    x = bundle.decode(bundle.encode(pictures(1, 32, 32)))
    plain = bundle.decode(bundle.encode(x))
    error = [float((tasks.edit(bundle, x, "red", "red", guidance=1.0, steps=steps, refine=refine) - plain).abs().mean())
             for steps, refine in ((8, 0), (8, 8))]
    assert error[1] < 0.5 * error[0] and error[1] < 0.02
    other = tasks.edit(bundle, x, "red", "a blue star", guidance=3.0, steps=8, refine=8)
    assert (other - plain).abs().mean() > 0.02


def test_a_picture_alone_and_in_a_batch(bundle):
    x = pictures(3, 32, 32)
    together = tasks.edit(bundle, x, ["red", "blue", "green"], "a star", steps=3, batch_size=2, guidance=2.0)
    alone = tasks.edit(bundle, x[2:], ["green"], "a star", steps=3, guidance=2.0)
    torch.testing.assert_close(together[2:], alone, atol=2e-5, rtol=0)


def test_mistakes(bundle):
    with pytest.raises(UserError, match="0 is the picture itself"):
        tasks.invert(bundle, pictures(1, 32, 32), strength=0)
