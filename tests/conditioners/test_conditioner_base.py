"""The contract of conditioners, on ones that are made of it alone; and what is added to a batch before they see it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from autoencoder.base import Identity
from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, encoded, tensor
from ldm.conditioners.image import ImageEmbedding
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.layout import Boxes, BoxTokens
from ldm.conditioners.low_resolution import LowResolution
from ldm.conditioners.neighbours import Neighbours
from ldm.conditioners.spatial import SemanticMap
from ldm.denoiser import build_denoiser
from ldm.process import DDPM, RectifiedFlow


class Numbers(Conditioner):
    """The numbers of the batch as a vector, and spatial ones that nothing turns off."""

    vector_width, spatial_channels = 3, 2

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = dropout

    def forward(self, batch):
        return Cond(vector=batch["numbers"], spatial=batch["map"])

    def null(self, n):
        return Cond(vector=torch.zeros(n, 3))


BATCH = {"numbers": torch.arange(1.0, 13).view(4, 3), "map": torch.randn(4, 2, 5, 5)}


def test_dropout_puts_in_the_null_where_the_number_is_below_it():
    cond = Numbers(dropout=0.3).with_dropout(BATCH, {"drop": torch.tensor([0.0, 0.29, 0.3, 0.9])}.get)
    assert torch.equal(cond.vector, torch.cat([torch.zeros(2, 3), BATCH["numbers"][2:]]))
    assert torch.equal(cond.spatial, BATCH["map"])


def test_without_dropout_nothing_is_drawn():
    assert Numbers().with_dropout(BATCH, None).vector is BATCH["numbers"]


def test_guidance_compares_with_the_null_beside_what_stays():
    cond, null = Numbers().with_null(BATCH)
    assert cond.vector is BATCH["numbers"] and null.vector.shape == (4, 3) and not null.vector.any()
    assert null.spatial is cond.spatial


def test_sizes_of_the_network_follow():
    class Network(nn.Module):
        given = ("in_channels", "out_channels", "context_dim", "vector_dim")

        def __init__(self, in_channels, out_channels, context_dim, vector_dim):
            super().__init__()
            self.sizes = in_channels, out_channels, context_dim, vector_dim

    here = f"{__name__}.Network"
    globals()["Network"] = Network
    denoiser = build_denoiser({"target": here}, RectifiedFlow(), "flow", Identity(3), Numbers(), self_conditioning=True)
    assert denoiser.network.sizes == (3 + 3 + 2, 3, None, 3)
    example = Numbers().example(torch.zeros(1, 4, 6, 7))
    assert example.vector.shape == (1, 3) and example.spatial.shape == (1, 2, 6, 7) and example.tokens is None
    conditioner = Numbers()
    conditioner.encodes = {"low_res": False}  # whose latents are beside x too
    assert build_denoiser({"target": here}, RectifiedFlow(), "flow", Identity(3), conditioner).network.sizes[0] == 3 + 2 + 3
    assert conditioner.example(torch.zeros(1, 4, 6, 7)).spatial.shape == (1, 2 + 4, 6, 7)


def test_pictures_are_encoded_at_unit_scale_or_raw_once():
    autoencoder, pictures = Identity(3), torch.randn(2, 3, 4, 4)
    autoencoder.set_statistics(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 8]), 1)
    conditioner = Numbers()
    conditioner.encodes = {"masked_image": False, "low_res": True}
    batch = {"masked_image": pictures, "low_res": pictures}
    found = encoded(conditioner, autoencoder, batch, (4, 4))
    assert found["latent_size"] == (4, 4) and "masked_image_latent" not in batch
    torch.testing.assert_close(found["low_res_latent"], pictures)
    by_hand = (pictures - torch.tensor([1.0, 2, 3]).view(3, 1, 1)) / torch.tensor([2.0, 4, 8]).view(3, 1, 1)
    torch.testing.assert_close(found["masked_image_latent"], by_hand)
    assert encoded(conditioner, autoencoder, found)["low_res_latent"] is found["low_res_latent"]


def test_bad_batches_are_told():
    conditioner = Numbers()
    with pytest.raises(UserError, match="no 'numbers'; nearest: 'number'; it holds number"):
        tensor({"number": 1}, "numbers", conditioner, ())
    with pytest.raises(UserError, match=r"'numbers' has to be \(B, any, 3\), got \(2, 4, 5\)"):
        tensor({"numbers": torch.zeros(2, 4, 5)}, "numbers", conditioner, (None, 3))
    with pytest.raises(UserError, match=r"\(B\), got \(\)"):
        tensor({"numbers": 5}, "numbers", conditioner, ())
    conditioner.encodes = {"masked_image": False}
    with pytest.raises(UserError, match="no 'masked_image'"):
        encoded(conditioner, Identity(3), {"image": torch.zeros(1, 3, 4, 4)})


E = {"image_embedding": torch.randn(2, 6), "class": torch.tensor([1, 2]), "neighbours": torch.randn(2, 3, 6),
     "segmentation": torch.zeros(2, 4, 4, dtype=torch.long), "low_res": torch.randn(2, 3, 4, 4), "latent_size": (4, 4),
     "boxes": torch.rand(2, 1, 2).repeat(1, 1, 2), "box_classes": torch.zeros(2, 1, dtype=torch.long)}  # fmt: skip
NOISE = DDPM("linear")


@pytest.mark.parametrize("make", [
    lambda: ClassLabel(3, 8, dropout=0.1), lambda: ImageEmbedding(embedding_width=6, to="tokens", width=8),
    lambda: ImageEmbedding(embedding_width=6, noise=NOISE), lambda: Neighbours(6, 3, width=8), lambda: SemanticMap(3, 2, dropout=0.1),
    lambda: LowResolution(noise=NOISE, level="class", level_width=4), lambda: Boxes(3, 1, 8),
    lambda: BoxTokens(3, 1, vocabulary=40, width=8, layers=1, heads=2, head_dim=4)])  # fmt: skip
def test_all_of_them_work_in_half_precision(make):
    conditioner = make()
    full, null = conditioner.with_null(E)
    half, half_null = conditioner.to(torch.bfloat16).with_null(E)
    for a, b in ((full, half), (null, half_null)):
        for field in ("tokens", "vector", "spatial"):
            x, y = getattr(a, field, None), getattr(b, field, None)
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y.float(), atol=0.1, rtol=0.1)


def test_one_of_your_own_as_the_docs_have_it():
    page = (Path(__file__).parents[2] / "docs/conditioning.md").read_text()
    names = {"Conditioner": Conditioner, "Cond": Cond, "tensor": tensor, "torch": torch}
    exec(page.split("## One of your own")[1].split("```python")[1].split("```")[0], names)
    cond, null = names["Weather"]().with_null({"weather": torch.ones(2, 3)})
    assert cond.vector.eq(1).all() and not null.vector.any() and names["Weather"]().example(torch.zeros(1, 4, 8, 8)).vector.shape == (1, 3)
