"""Variations: by an embedding of the picture, by noise, by its own noise."""

import pytest
import torch
from exact import STD, exact, pictures

from ldm import tasks
from ldm.common.files import UserError
from ldm.tasks.varying import way_of


def test_without_an_encoder_they_are_img2img(bundle):
    x = pictures(1, 32, 32)
    assert way_of(bundle) == "img2img"
    found = tasks.variations(bundle, x, ["red"] * 2, strength=0.5, seed=3)
    assert torch.equal(found, tasks.img2img(bundle, x, ["red"] * 2, strength=0.5, seed=3))
    with pytest.raises(UserError, match="does not read pictures by an encoder"):
        tasks.variations(bundle, x, method="embedding")


def test_turned_noise():
    """The exact flow keeps numbers of deviations: turned by 0 this is the picture, by 1 what is drawn anyway."""
    model, x = exact(size=(16, 16), sampler="ddim", steps=100), STD * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    same, turned, new = (tasks.variations(model, x, method="inversion", strength=s, seed=5) for s in (0, 0.5, 1))
    assert (same - x).abs().mean() < 0.02 and torch.equal(new, model.generate(1, seed=5))
    correlated = torch.corrcoef(torch.stack([value.flatten() for value in (x, turned, new)]))
    assert correlated[0, 1] == pytest.approx(0.5**0.5, abs=0.08) and correlated[1, 2] == pytest.approx(0.5**0.5, abs=0.08)
    assert turned.std() == pytest.approx(STD, rel=0.1)


def test_what_an_encoder_sees(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from ldm.conditioners.image import ImageEmbedding

    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**size, image_size=32, patch_size=16, projection_dim=8)).save_pretrained(tmp_path)
    model = exact(ImageEmbedding(str(tmp_path)))
    x = pictures(2, 40, 24)
    found = tasks.variations(model, x, seed=2)
    embedding = model.conditioner({"image": x}).vector
    assert way_of(model) == "embedding" and found.shape == (2, 3, 8, 8)
    torch.testing.assert_close(found, model.generate({"image_embedding": embedding}, seed=2))
