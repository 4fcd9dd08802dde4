"""Between two prompts, seeds, pictures: the ends are the plain pictures, and mixed noise is noise."""

import pytest
import torch
from exact import MEANS, classes, exact, pictures

from ldm import tasks
from ldm.common.files import UserError
from ldm.conditioners.spatial import MaskedImage

PROMPTS = ["a red circle", "a large blue star on a white background"]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
@pytest.mark.parametrize("way", ["lerp", "slerp"])
def test_the_ends_are_the_plain_pictures(bundle, sampler, way):
    found = tasks.interpolate(bundle, *PROMPTS, [0, 0.5, 1], seeds=(3, 11), way=way, sampler=sampler)
    first, last = (bundle.generate([prompt], seed=seed, sampler=sampler) for prompt, seed in zip(PROMPTS, (3, 11), strict=True))
    torch.testing.assert_close(found[:1], first, atol=3e-5, rtol=0)
    torch.testing.assert_close(found[2:], last, atol=3e-5, rtol=0)
    assert min((found[1] - end).abs().mean() for end in (first, last)) > 0.01
    again = tasks.interpolate(bundle, *PROMPTS, [0.5], seeds=(3, 11), way=way, sampler=sampler)
    torch.testing.assert_close(again, found[1:2], atol=1e-5, rtol=0)  # whatever else is drawn
    back = tasks.interpolate(bundle, *PROMPTS[::-1], [1, 0.5, 0], seeds=(11, 3), way=way, sampler=sampler)
    torch.testing.assert_close(back, found, atol=1e-4, rtol=0)


def test_alone_the_ends_are_the_same_to_the_bit(bundle):
    for share, prompt, seed in ((0, PROMPTS[0], 3), (1, PROMPTS[1], 11)):
        found = tasks.interpolate(bundle, "a red circle", PROMPTS[1], [share], seeds=(3, 11), guidance=1.0)
        torch.testing.assert_close(found, bundle.generate([prompt], seed=seed, guidance=1.0), atol=3e-5, rtol=0)
    model = exact(classes())
    for share, kind, seed in ((0, 0, 3), (1, 2, 11)):
        found = tasks.interpolate(model, {"class": [0]}, {"class": [2]}, [share], seeds=(3, 11), sampler="ddpm")
        assert torch.equal(found, model.generate({"class": [kind]}, seed=seed, sampler="ddpm"))


def test_conditions_go_along_a_line_and_noise_keeps_its_spread():
    """With the same noise at both ends the exact model moves with the mean of its class."""
    model = exact(classes(), size=(32, 32))
    shares = [0, 0.25, 0.5, 1]
    found = tasks.interpolate(model, {"class": [0]}, {"class": [2]}, shares, sampler="heun", steps=30, decode=False)
    for picture, share in zip(found, shares, strict=True):
        torch.testing.assert_close(picture - found[0], torch.full_like(picture, share * (MEANS[2] - MEANS[0])), atol=1e-4, rtol=0)
    turned = tasks.interpolate(model, {"class": [1]}, {"class": [1]}, [0, 0.5, 1], seeds=(1, 2), sampler="heun", steps=30, decode=False)
    assert turned.flatten(1).std(dim=1).tolist() == pytest.approx([0.2] * 3, rel=0.06)
    assert torch.corrcoef(turned.flatten(1))[0, 2].abs() < 0.06 and torch.corrcoef(turned.flatten(1))[0, 1] == pytest.approx(0.5**0.5, abs=0.06)


def test_between_two_pictures(bundle):
    x = pictures(2, 32, 40)
    options = {"sampler": "ddpm", "steps": 4}
    found = tasks.interpolate(bundle, *PROMPTS, [0, 0.4, 1], images=x, strength=0.5, seeds=(5, 6), **options)
    for row, prompt, seed in ((0, PROMPTS[0], 5), (2, PROMPTS[1], 6)):
        plain = tasks.img2img(bundle, x[row // 2][None], [prompt], strength=0.5, seed=seed, **options)
        torch.testing.assert_close(found[row][None], plain, atol=3e-5, rtol=0)
    model = exact(size=(8, 8))  # strength near 0: the mean of both, as the autoencoder is the identity
    pair = pictures(2, 8, 8)
    half = tasks.interpolate(model, None, None, [0.5], images=pair, strength=1e-3)
    torch.testing.assert_close(half[0], pair.mean(dim=0), atol=5e-3, rtol=0)


def test_conditions_that_are_pictures(bundle):
    model, x = exact(MaskedImage()), 0.2 * pictures(2, 8, 8)
    ends = [{"image": x[i : i + 1], "mask": torch.zeros(1, 1, 8, 8)} for i in range(2)]
    found = tasks.interpolate(model, *ends, [0, 0.5, 1])
    torch.testing.assert_close(found[::2], torch.cat([model.generate(end) for end in ends]))
    torch.testing.assert_close(found[1], found[::2].mean(dim=0), atol=1e-5, rtol=0)  # all is linear here


def test_mistakes(bundle):
    for shares, told in (([], "one number or more"), ([0.5, 1.5], "shares: 1.5; it lies between 0 and 1")):
        with pytest.raises(UserError, match=told):
            tasks.interpolate(bundle, *PROMPTS, shares)
    with pytest.raises(UserError, match="one picture at either end, got 2 and 1"):
        tasks.interpolate(bundle, PROMPTS, "a", [0.5])
    with pytest.raises(UserError, match="two pictures, and a share"):
        tasks.interpolate(bundle, *PROMPTS, [0.5], images=pictures(3, 32, 32))
