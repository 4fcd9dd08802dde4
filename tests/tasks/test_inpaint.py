"""Painting in and around pictures: what is not masked stays to the bit."""

import pytest
import torch
from exact import classes, exact, pictures

from ldm import tasks
from ldm.common.files import UserError
from ldm.conditioners.spatial import MaskedImage
from ldm.samplers import SAMPLERS
from ldm.tasks.inpainting import kept, pasted


def half(n, height, width):
    mask = torch.zeros(n, 1, height, width)
    mask[..., width // 2 + 1 :] = 1
    return mask


@pytest.mark.parametrize("method", ["auto", "replace", "repaint"])
def test_pixels_beside_the_mask_stay_to_the_bit(bundle, method):
    x, mask = pictures(2, 32, 32), half(1, 32, 32)
    found = tasks.inpaint(bundle, x, mask, ["red", "blue"], method=method, jump=2, resample=2, steps=4, seed=3)
    inside = mask.bool().expand_as(x)
    assert torch.equal(found[~inside], x[~inside]) and (found[inside] - x[inside]).abs().mean() > 0.02
    alone = tasks.inpaint(bundle, x[1:], mask, "blue", method=method, jump=2, resample=2, steps=4, seed=4)
    torch.testing.assert_close(found[1:], alone, atol=1e-5, rtol=0)


def test_a_model_without_the_task_is_led_by_what_is_known():
    """Pixels are independent: under the mask the exact model draws what it draws anyway."""
    model, x, mask = exact(classes()), pictures(1, 8, 8), half(1, 8, 8)
    for method in ("replace", "repaint"):
        found = tasks.inpaint(model, x, mask, {"class": [0]}, method=method, resample=1, seed=2)
        plain = model.generate({"class": [0]}, seed=2)
        torch.testing.assert_close(found, torch.where(mask == 1, plain, x), atol=1e-6, rtol=0)
    calls = []
    tasks.inpaint(model, x, mask, {"class": [0]}, method="repaint", jump=1, resample=3, callback=lambda *_: calls.append(1))
    assert len(calls) == 4 + 2 * 3  # each of the first three steps walked thrice


def test_a_trained_model_sees_picture_and_mask():
    """The network adds what stands beside x_t: the mask's 1, and the picture's channels outside of it."""
    model, x, mask = exact(MaskedImage()), pictures(1, 8, 8), half(1, 8, 8)
    found = tasks.inpaint(model, x, mask, method="auto", seed=5)
    by_hand = model.generate({"image": x, "mask": mask}, seed=5)
    assert torch.equal(found, torch.where(mask == 1, by_hand, x))
    assert by_hand[mask.expand_as(x) == 1].mean() > 0.7 and tasks.inpaint(model, x, mask, method="replace", seed=5).shape == x.shape


def test_a_latent_pixel_is_known_if_all_of_its_part_is():
    mask = torch.zeros(1, 1, 4, 8)
    mask[..., 0, 3] = 1
    assert kept(mask, 4).tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dpm_adaptive"])
def test_with_every_sampler(sampler):
    model, x, mask = exact(), pictures(1, 8, 8), half(1, 8, 8)
    found = tasks.inpaint(model, x, mask, sampler=sampler, steps=3)
    assert torch.equal(found[..., :5], x[..., :5]) and found.isfinite().all()


def test_feathering_fades_out_beside_the_mask_only():
    x, painted, mask = torch.zeros(1, 3, 4, 12), torch.ones(1, 3, 4, 12), half(1, 4, 12)
    assert torch.equal(pasted(painted, x, mask), mask.expand_as(x))
    row = pasted(painted, x, mask, feather=3)[0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]))


def test_outpainting_keeps_the_picture(bundle):
    x = pictures(1, 24, 24)
    larger, mask = tasks.expanded(x, 8, 0, 0, 16)
    assert larger.shape == (1, 3, 40, 32) and mask.sum() == 40 * 32 - 24 * 24 and torch.equal(larger[:, :, :24, 8:], x)
    assert torch.equal(larger[0, :, 39, 8:], x[0, :, 23]) and torch.equal(larger[0, :, :24, 0], x[0, :, :, 0])
    found = tasks.inpaint(bundle, larger, mask, "red", seed=1)
    assert torch.equal(found[:, :, :24, 8:], x)
    inner = torch.zeros(1, 1, 24, 24)
    inner[..., 5, 5] = 1
    assert tasks.expanded(x, 8, 0, 0, 16, inner)[1].sum() == mask.sum() + 1
    with pytest.raises(UserError, match="expand: -1"):
        tasks.expanded(x, -1, 0, 0, 0)


def test_mistakes(bundle):
    x, mask = pictures(1, 32, 32), half(1, 32, 32)
    with pytest.raises(UserError, match="was not trained to inpaint .*; take replace or repaint"):
        tasks.inpaint(bundle, x, mask, method="model")
    with pytest.raises(UserError, match="method 'paint': there are auto, model"):
        tasks.inpaint(bundle, x, mask, method="paint")
    for wrong in (mask[..., :16], 0.5 * mask, mask.expand(-1, 3, -1, -1)):
        with pytest.raises(UserError, match=r"mask: expected 0 and 1 \(B,1,32,32\)"):
            tasks.inpaint(bundle, x, wrong)
