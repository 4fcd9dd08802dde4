"""SDEdit: what its ends are, and what lies between."""

import pytest
import torch
from exact import MEANS, STD, classes, exact, pictures
from random_models import random_model

from ldm import edit, tasks
from ldm.common.files import UserError
from ldm.samplers import SAMPLERS
from ldm.times import linear

PROMPTS = ["a red circle", "a large blue star"]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm", {"name": "ddim", "eta": 0.5}, "heun", "unipc", "euler_ancestral"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_ends_are_the_reconstruction_and_txt2img(bundle, sampler, steps):
    x, options = pictures(2, 32, 40), {"sampler": sampler, "steps": steps, "seed": 3}
    rebuilt = tasks.img2img(bundle, x, PROMPTS, strength=0, **options)
    assert torch.equal(rebuilt, bundle.autoencoder.decode(bundle.autoencoder.encode(x)).clamp(-1, 1))
    assert torch.equal(tasks.img2img(bundle, x, PROMPTS, strength=1, **options), bundle.generate(PROMPTS, size=(32, 40), **options))
    found = [tasks.img2img(bundle, x, PROMPTS, strength=s, **options) for s in (0.001, 0.25, 0.5, 0.999)]
    assert all(each.isfinite().all() and each.shape == x.shape for each in found)
    near = [(each - rebuilt).abs().mean() for each in found]
    assert near[0] < 0.05 and near[0] < min(near[1:])


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("dpm_adaptive", "lcm")])
def test_every_sampler_keeps_what_fits_the_data(sampler):
    """Normal data: what starts as a sample ends as one, whatever the strength, though one step is coarse."""
    model, x = exact(size=(64, 64)), STD * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for strength in (0.1, 0.33, 0.7):
        found = tasks.img2img(model, x.clamp(-1, 1), strength=strength, sampler=sampler, steps=12)
        assert abs(found.mean()) < 0.02 and found.std() == pytest.approx(STD, rel=0.35)


def test_a_share_that_is_no_whole_step_begins_inside_of_one():
    process = exact().denoiser.process
    times, x0, eps = linear(process, 10), torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for strength, first, left in ((1.0, 1.0, 10), (0.7, 0.7, 7), (0.25, 0.25, 3), (0.01, 0.01, 1)):
        x, rest = edit.partway(x0, eps, times, process, strength)
        assert len(rest) == left + 1 and rest[0] == pytest.approx(first) and torch.equal(rest[1:], times[-left:])
        torch.testing.assert_close(x, (1 - first) * x0 + first * eps)
    for strength in (0.2, 0.5, 0.9):  # whole steps: as published programs do
        ours, theirs = edit.partway(x0, eps, times, process, strength), edit.img2img(x0, eps, times, process, strength)
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0], theirs[0])


def test_strength_says_how_much_stays_whatever_the_number_of_steps():
    """The exact map of a class: x0 of strength s is mean + std / spread (x_s - alpha mean)."""
    model, x = exact(classes()), pictures(1, 8, 8)
    for strength in (0.2, 0.55):
        x_s = (1 - strength) * x + strength * model.generate({"class": [2]}, decode=False, seed=7, edit=noise_of)
        alpha, sigma, mean = 1 - strength, strength, MEANS[2]
        expected = mean + STD / (alpha**2 * STD**2 + sigma**2) ** 0.5 * (x_s - alpha * mean)
        for steps in (40, 61):
            found = tasks.img2img(model, x, {"class": [2]}, strength=strength, steps=steps, sampler="heun", seed=7)
            torch.testing.assert_close(found, expected.clamp(-1, 1), atol=8e-3, rtol=0)


def noise_of(sampler, batch):
    return lambda denoise, x, times, process, **more: x


def test_a_picture_alone_and_in_a_batch(bundle):
    x = pictures(3, 32, 32)
    together = tasks.img2img(bundle, x, ["red", "blue", "green"], strength=0.5, sampler="ddpm", seed=4, batch_size=2)
    alone = tasks.img2img(bundle, x[1:2], "blue", strength=0.5, sampler="ddpm", seed=4, indices=[1])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    same = tasks.img2img(bundle, x[:1], ["red"] * 2, strength=0.5, seed=4)  # one picture, two seeds
    assert same.shape == (2, 3, 32, 32) and not torch.equal(same[0], same[1])


def test_mistakes(bundle):
    x = pictures(1, 32, 32)
    for strength in (-0.1, 1.2):
        with pytest.raises(UserError, match="strength: .* between 0 and 1"):
            tasks.img2img(bundle, x, strength=strength)
    with pytest.raises(UserError, match="3 of caption, 2 of image"):
        tasks.img2img(bundle, pictures(2, 32, 32), ["a", "b", "c"])
    with pytest.raises(ValueError, match="a share of the steps above 0"):
        edit.shortened(linear(bundle.denoiser.process, 4), 0.0)
    with pytest.raises(ValueError, match="factor"):
        tasks.img2img(bundle, pictures(1, 33, 32))


@pytest.mark.parametrize(("process", "parameterization"), [
    ({"target": "ldm.process.DDPM"}, "noise"), ({"target": "ldm.process.DDPM", "params": {"zero_terminal": True}}, "v"),
    ({"target": "ldm.process.EDM"}, {"target": "ldm.parameterization.Preconditioned"}), ({"target": "ldm.process.Cosine"}, "v")])
def test_on_every_kind_of_process(model_config, process, parameterization):
    made = random_model(model_config, model_config["model"]["params"]["conditioner"], process=process, parameterization=parameterization)
    x, options = pictures(1, 32, 32), {"steps": 5, "sampler": "ddim", "seed": 2}
    rebuilt = made.decode(made.encode(x))
    assert torch.equal(tasks.img2img(made, x, "red", strength=0, **options), rebuilt)
    assert torch.equal(tasks.img2img(made, x, "red", strength=1, **options), made.generate(["red"], **options))
    way = [float((tasks.img2img(made, x, "red", strength=s, **options) - rebuilt).abs().mean()) for s in (5e-4, 0.5)]
    assert way[0] < 0.5 * way[1]
    found = tasks.interpolate(made, "red", "blue", [0, 1], seeds=(1, 2), **{"steps": 3, "sampler": "ddpm"})
    torch.testing.assert_close(found[1:], made.generate(["blue"], seed=2, steps=3, sampler="ddpm"), atol=1e-4, rtol=0)
