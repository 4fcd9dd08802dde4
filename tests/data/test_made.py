"""What is made for pictures: masks, small pictures, maps and boxes of drawn shapes, neighbours."""

import random

import pytest
import torch
import torch.nn.functional as F

from autoencoder.cached import CachedDataset
from ldm.common.files import UserError
from ldm.data.degrade import AddLowResolution, bicubic, blind, blurred, jpeg
from ldm.data.drawn import NAMES, AddDrawn
from ldm.data.embeddings import AddEmbedding, nearest, read, write
from ldm.data.loader import make_loader
from ldm.data.masks import KINDS, AddMask, random_mask
from ldm.data.shapes import COLOURS, Shapes

EVERYTHING = ["class", "boxes", "segmentation", "depth"]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_zero_and_one_and_of_every_size(kind):
    masks = [random_mask(32, 48, random.Random(n), {kind: 1.0}) for n in range(40)]
    assert all(mask.shape == (1, 32, 48) and set(mask.unique().tolist()) <= {0.0, 1.0} and mask.any() for mask in masks)
    shares = torch.stack(masks).mean(dim=(1, 2, 3))
    assert (shares == 1).all() if kind == "whole" else shares.std() > 0.05 and shares.max() < 1
    assert torch.equal(masks[3], random_mask(32, 48, random.Random(3), {kind: 1.0}))


def test_a_mask_follows_from_the_place_in_the_run():
    data = AddMask(Shapes(count=4))
    first, second = (next(iter(make_loader(data, 4, seed=1, workers=workers))) for workers in (0, 1))
    assert torch.equal(first["mask"], second["mask"]) and first["mask"].shape == (4, 1, 64, 64)
    two = list(zip(range(2), make_loader(data, 2, seed=1), strict=False))
    assert torch.equal(torch.cat([batch["mask"] for _, batch in two]), first["mask"])
    epochs = [batch["mask"] for _, batch in zip(range(2), make_loader(data, 4, seed=1), strict=False)]
    assert not torch.equal(*epochs)  # another one at the next time
    cached = CachedDataset(data)  # of captions, say: masks are drawn as without
    assert torch.equal(next(iter(make_loader(cached, 4, seed=1)))["mask"], first["mask"])


def test_wrong_kinds_of_masks_are_told():
    with pytest.raises(UserError, match="no masks 'stroke'; nearest: 'strokes'"):
        AddMask(Shapes(count=1), {"stroke": 1.0})
    with pytest.raises(UserError, match="one of them is above 0"):
        AddMask(Shapes(count=1), {"strokes": 0.0})


def test_small_pictures():
    x = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = F.interpolate(x[None], (4, 6), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(bicubic(x, 4), expected.clamp(-1, 1))
    flat = torch.full((3, 16, 16), 0.25)
    torch.testing.assert_close(blurred(flat, 2.0), flat)
    dot = torch.zeros(1, 33, 33)
    dot[0, 16, 16] = 1
    spread = blurred(dot, 2.0)[0]
    torch.testing.assert_close(spread.sum(), torch.tensor(1.0))
    assert (spread.sum(0) * (torch.arange(33) - 16) ** 2).sum().item() == pytest.approx(4.0, rel=0.05)  # variance 2^2
    assert (jpeg(flat, 95) - flat).abs().max() < 0.02 and jpeg(flat[:1], 95).shape == (1, 16, 16)


def test_blind_degradation_differs_and_can_be_repeated():
    x = Shapes(count=1)[0]["image"]
    found = [blind(x, 4, random.Random(n)) for n in range(20)]
    assert all(small.shape == (3, 16, 16) and small.abs().max() <= 1 for small in found)
    errors = torch.stack([(small - bicubic(x, 4)).square().mean() for small in found])
    assert (errors > 0).all() and errors.mean() < 0.1
    assert torch.equal(found[7], blind(x, 4, random.Random(7)))
    data = AddLowResolution(Shapes(count=2), 4, "blind")
    a, b = (next(iter(make_loader(data, 2, seed=1)))["low_res"] for _ in range(2))
    assert torch.equal(a, b)
    with pytest.raises(UserError, match="factor: 5 does not divide pictures of 64 x 64"):
        AddLowResolution(Shapes(count=1), 5)[0]


@pytest.mark.parametrize("i", range(12))
def test_drawn_figures_are_where_they_are_said_to_be(i):
    data = AddDrawn(Shapes(count=12), EVERYTHING)
    item, scene = data[i], data.scene(i)
    kinds = [f"{noun.colour} {noun.shape}" for noun in scene.said.objects]
    assert NAMES[item["class"]] == kinds[0]
    assert [NAMES[k] for k in item["box_classes"].tolist() if k >= 0] == kinds
    for (left, top, right, bottom), figure in zip((64 * item["boxes"]).long().tolist(), scene.figures, strict=False):
        assert left <= figure.x <= right and top <= figure.y <= bottom
        assert (right - left) / 2 == pytest.approx(figure.radius, abs=3.5)
    found = {NAMES[k - 1] for k in item["segmentation"].unique().tolist() if k}
    assert found == set(kinds)
    for noun, figure in zip(scene.said.objects, scene.figures, strict=True):
        inside = item["segmentation"] == NAMES.index(f"{noun.colour} {noun.shape}") + 1
        colour = 127.5 * (item["image"][:, inside] + 1)
        assert (colour.median(dim=1).values - torch.tensor(COLOURS[noun.colour], dtype=torch.float)).abs().max() <= 8
        assert item["depth"][0][inside].min() > 0 and figure.radius > 0
    assert (item["depth"] > 0).eq(item["segmentation"] > 0).all() and item["depth"].max() <= 1
    assert {key: value for key, value in data.extra(i).items() if key == "class"} == {"class": item["class"]}


def test_only_drawn_shapes_are_known_so_well():
    with pytest.raises(UserError, match="no 'box'; nearest: 'boxes'"):
        AddDrawn(Shapes(count=1), ["box"])
    with pytest.raises(UserError, match="got CachedDataset"):
        AddDrawn(CachedDataset(Shapes(count=1)), ["class"])


def test_nearest_is_exact(monkeypatch):
    monkeypatch.setattr("ldm.data.embeddings.ROWS", 7)  # several pieces
    source = torch.Generator().manual_seed(0)
    queries, collection = torch.randn(5, 4, generator=source), torch.randn(30, 4, generator=source)
    cosines = F.cosine_similarity(queries[:, None], collection[None], dim=-1)
    rows, found = nearest(queries, collection, 6)
    best = cosines.topk(6, dim=1)
    assert torch.equal(rows, best.indices)
    torch.testing.assert_close(found, best.values)
    rows, found = nearest(collection[:3], collection, 2, leave_out=torch.tensor([0, 1, -1]))
    assert (found[:2] < 0.9999).all() and rows[2, 0] == 2 and 0 not in rows[0] and 1 not in rows[1]
    with pytest.raises(UserError, match="k: 31; there are 30"):
        nearest(queries, collection, 31)


def test_embeddings_and_neighbours_of_items(tmp_path):
    shapes, e = Shapes(count=5), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).half()
    write(tmp_path / "e.safetensors", e, [shapes.key(4 - i) for i in range(5)])
    data = AddEmbedding(shapes, tmp_path / "e.safetensors", k=2)
    item = data[1]
    assert torch.equal(item["image_embedding"], e[3].float()) and item["neighbours"].shape == (2, 4)
    rows, _ = nearest(e[3:4], e, 3)
    assert rows[0, 0] == 3 and torch.equal(item["neighbours"], e[rows[0, 1:]].float())
    write(tmp_path / "other.safetensors", e[:2], ["x", "y"])
    assert AddEmbedding(shapes, tmp_path / "e.safetensors", k=2, collection=tmp_path / "other.safetensors")[0]["neighbours"].shape == (2, 4)
    assert torch.equal(read(tmp_path / "e.safetensors")[0], e)
    with pytest.raises(UserError, match="5 of 5 pictures have no embedding"):
        AddEmbedding(shapes, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="expected a .safetensors"):
        read(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="with a key each"):
        write(tmp_path / "z.safetensors", e, ["x"])
