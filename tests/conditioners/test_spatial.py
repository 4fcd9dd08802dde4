"""What stands beside x_t, against torch's own resizing, hand-written maps, and the numbers of LDM's inpainting model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from autoencoder.base import Identity
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.conditioners.base import encoded
from ldm.conditioners.spatial import Depth, MaskedImage, Picture, SemanticMap
from ldm.interop import compvis

PARITY = Path(__file__).parents[1] / "data/parity/inpaint_concat"


def test_a_picture_comes_at_the_size_of_the_latents():
    x, size = torch.randn(2, 3, 8, 12), (4, 6)
    for mode in ("nearest", "bilinear", "bicubic", "area"):
        found = Picture("sketch", resize=mode)({"sketch": x, "latent_size": size}).spatial
        torch.testing.assert_close(found, F.interpolate(x, size, mode=mode))
    assert Picture("sketch", resize="none")({"sketch": x}).spatial is x
    assert Picture("sketch").beside(4) == 3
    with pytest.raises(UserError, match="no 'latent_size'"):
        Picture("sketch")({"sketch": x})
    with pytest.raises(UserError, match=r"'sketch' has to be \(B, 3, any, any\), got \(2, 1, 8, 12\)"):
        Picture("sketch")({"sketch": x[:, :1], "latent_size": size})


def test_a_picture_as_a_latent():
    autoencoder, x = Identity(3), torch.randn(2, 3, 4, 4)
    autoencoder.set_statistics(torch.ones(3), torch.full((3,), 2.0), 1)
    for kind, expected in (("unit", (x - 1) / 2), ("raw", x)):
        conditioner = Picture("before", latent=kind)
        assert conditioner.beside(3) == 3
        torch.testing.assert_close(conditioner(encoded(conditioner, autoencoder, {"before": x}, (4, 4))).spatial, expected)


def test_a_dropped_picture_is_zeros_and_without_dropout_it_stays():
    x = torch.randn(2, 3, 4, 4)
    dropped = Picture("x", resize="none", dropout=0.5).with_dropout({"x": x}, {"drop": torch.tensor([0.9, 0.1])}.get).spatial
    assert torch.equal(dropped[0], x[0]) and not dropped[1].any()
    cond, null = Picture("x", resize="none", dropout=0.5).with_null({"x": x})
    assert torch.equal(cond.spatial, x) and null.spatial.shape == x.shape and not null.spatial.any()
    assert Picture("x", resize="none").with_null({"x": x})[1] is None


def inpainting():
    """LDM's inpainting model: the autoencoder of its checkpoint, the picture (2,3,16,12) in 0..1, the mask, its condition."""
    weights, config = load_file(PARITY / "model.safetensors"), yaml.safe_load((PARITY / "config.yaml").read_text())
    about, tensors = compvis.read(weights, config, "inpaint_concat", compvis.FIRST_STAGE)
    return Bundle.from_config(about["config"]).assign(tensors).autoencoder, load_file(PARITY / "io.safetensors")


def test_the_condition_of_ldms_inpainting():
    autoencoder, io = inpainting()
    autoencoder.set_statistics(torch.full((3,), 0.3), torch.full((3,), 1.7), 1)  # which raw latents do not feel
    conditioner = MaskedImage(mask_first=False, signed_mask=True, raw=True, fill=-1.0)
    batch = {"image": 2 * io["in.image01"] - 1, "mask": io["in.mask01"]}
    cond = conditioner(encoded(conditioner, autoencoder, batch, (8, 6)))
    mask = 2 * F.interpolate(io["in.mask01"], (8, 6)) - 1
    torch.testing.assert_close(cond.spatial, torch.cat([io["out.c_masked_image"], mask], dim=1), atol=2e-5, rtol=1e-5)
    assert conditioner.beside(3) == 4 and conditioner.with_null(encoded(conditioner, autoencoder, batch))[1] is None


def test_the_condition_of_stable_diffusions_inpainting():
    autoencoder, io = inpainting()
    autoencoder.set_statistics(torch.zeros(3), torch.full((3,), 2.0), 1)
    conditioner, image, mask = MaskedImage(), 2 * io["in.image01"] - 1, io["in.mask01"]
    given = encoded(conditioner, autoencoder, {"image": image, "mask": mask}, (8, 6))
    found = conditioner(given).spatial
    assert torch.equal(found[:, :1], F.interpolate(mask, (8, 6)))
    with torch.no_grad():
        torch.testing.assert_close(found[:, 1:], autoencoder.encode(image * (mask < 0.5)))
    again = encoded(conditioner, autoencoder, {"masked_image": image * (1 - mask), "mask": mask}, (8, 6))
    torch.testing.assert_close(conditioner(again).spatial, found)


def test_masks_are_zero_or_one():
    with pytest.raises(UserError, match="got values from 0 to 255"):
        MaskedImage()({"masked_image_latent": torch.zeros(1, 4, 2, 2), "mask": torch.tensor([[0.0, 255]]).view(1, 1, 1, 2)})
    with pytest.raises(UserError, match="no 'mask'"):
        MaskedImage().picture("masked_image", {"image": torch.zeros(1, 3, 8, 8)})


def test_depth_fills_its_range_in_each_picture():
    near = torch.arange(16.0).view(1, 4, 4).expand(2, -1, -1) * torch.tensor([1.0, 1000]).view(2, 1, 1) + 7
    found = Depth()({"depth": near, "latent_size": (4, 4)}).spatial
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0, 0].flatten(), torch.linspace(-1, 1, 16))
    half = Depth()({"depth": near[:, None], "latent_size": (2, 2)}).spatial
    by_hand = F.interpolate(near[:, None], (2, 2), mode="bicubic")
    torch.testing.assert_close(half[0, 0, 0, 1] + 1, 2 * (by_hand[0, 0, 0, 1] - by_hand[0].min()) / (by_hand[0].max() - by_hand[0].min()))
    assert Depth()({"depth": torch.full((1, 4, 4), 3.0), "latent_size": (4, 4)}).spatial.eq(-1).all()
    with pytest.raises(UserError, match=r"'depth' has to be \(B, 1, any, any\)"):
        Depth()({"depth": torch.zeros(1, 3, 4, 4)})


def test_a_semantic_map_has_a_channel_for_each_class():
    classes = torch.tensor([[[0, 1], [2, -1]]])
    found = SemanticMap(3)({"segmentation": classes, "latent_size": (2, 2)}).spatial
    assert found[0].tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]]
    halved = SemanticMap(3, stages=1)({"segmentation": classes}).spatial
    assert halved[0, :, 0, 0].tolist() == [0.25, 0.25, 0.25]


def test_ldms_rescaler():
    conditioner = SemanticMap(182, 3, stages=2)
    assert {name: tuple(w.shape) for name, w in conditioner.state_dict().items()} == {"channel_mapper.weight": (3, 182, 1, 1)}
    classes = torch.randint(0, 182, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(classes, 182).permute(0, 3, 1, 2).float()
    by_hand = F.avg_pool2d(one_hot, 2)  # halving bilinearly takes the mean of two by two
    by_hand = torch.einsum("oc,bchw->bohw", conditioner.channel_mapper.weight[:, :, 0, 0], F.avg_pool2d(by_hand, 2))
    torch.testing.assert_close(conditioner({"segmentation": classes}).spatial, by_hand)
    assert conditioner.beside(3) == 3


def test_wrong_classes_are_told():
    with pytest.raises(UserError, match="classes from 0 to 2, or -1, got 3, 255"):
        SemanticMap(3)({"segmentation": torch.tensor([[[3, 255]]]), "latent_size": (1, 2)})
