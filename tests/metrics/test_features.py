"""What Fréchet distances are taken in: honest names, the same numbers for everybody, and what makes them grow."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.common.files import UserError
from ldm.data.shapes import Shapes
from ldm.metrics import features
from ldm.metrics.features import Inception, RandomConv, default_extractor, label, make_extractor
from ldm.metrics.frechet import Gaussian, distance


class Means:
    def __init__(self, scale: float = 1.0, image_channels: int = 0):
        self.scale, self.channels = scale, image_channels

    def __call__(self, x):
        return self.scale * x.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def pictures():
    data = Shapes(count=64)
    return torch.stack([data[i]["image"] for i in range(64)])


def apart(extractor, x, y) -> float:
    first, second = Gaussian(), Gaussian()
    first.add(extractor(x))
    second.add(extractor(y))
    return distance(first, second)


def blurred(x):
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


@pytest.mark.parametrize("spoilt", [
    lambda x, much: x + 0.05 * much * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    lambda x, much: (1 - 0.1 * much) * x,
    lambda x, much: x.lerp(blurred(x), 0.4 * much),
    lambda x, much: x + torch.tensor([0.05, 0, -0.05]).view(3, 1, 1) * much,
], ids=["noise", "contrast", "blur", "colour"])  # fmt: skip
def test_random_filters_see_damage_and_how_much_of_it(pictures, spoilt):
    net = RandomConv()
    equal, little, much = (apart(net, pictures, spoilt(pictures, strength)) for strength in (0, 1, 2))
    assert equal < 1e-9 < 1e-5 < little < much


def test_random_filters_are_the_same_for_everybody():
    net = RandomConv()
    torch.manual_seed(1)
    again = RandomConv()
    x = torch.linspace(-1, 1, 3 * 8 * 9).view(1, 3, 8, 9)
    assert net(x).shape == (1, 256) and torch.equal(net(x), again(x)) and not torch.equal(net(x), RandomConv(seed=1)(x))
    assert not any(p.requires_grad for p in net.parameters())
    # computed once: whoever changes the filters changes every number that was ever reported
    assert net(x)[0, :3].tolist() == pytest.approx([0.00229448, 0.00709648, 0.0338895], rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 5, 1, 1), (1, 4, 33, 7)])
def test_random_filters_take_any_channels_and_sizes(shape):
    found = RandomConv(shape[1], width=6)(torch.ones(shape))
    assert found.shape == (shape[0], 48) and found.isfinite().all()


def test_names_are_honest():
    assert label(RandomConv(5)) == "rFD-random-conv" and label(RandomConv(width=4)) == "rFD-random-conv-4-0"
    assert label(Means()) == "rFD-Means"
    assert label(SimpleNamespace(name="rFID")) == "rFD-rFID"  # only Inception makes a FID
    assert label(Inception.__new__(Inception)) == "rFID"


def test_make_extractor():
    assert make_extractor("random-conv", {"width": 4}, 5).layers[0].weight.shape == (4, 5, 3, 3)
    own = make_extractor(f"{__name__}:Means", {"scale": 2.0}, 7)
    assert type(own).__name__ == "Means" and own.scale == 2.0 and own.channels == 7


@pytest.mark.parametrize(("name", "params", "said"), [
    ("random_conf", {}, "--features: there is no 'random_conf'; nearest: random-conv; there are random-conv, inception"),
    ("ldm.metrics.features:RandomConf", {}, "--features ldm.metrics.features:RandomConf: .* nearest: 'RandomConv'"),
    ("no_such_package.x:Y", {}, "no package 'no_such_package'"),
    ("random-conv", {"widht": 4}, "widht: RandomConv has no such option; nearest: 'width'"),
    ("random-conv", {"width": "many"}, "width: "),
    ("random-conv", {"image_channels": 4}, "the program supplies"),
])  # fmt: skip
def test_mistakes(name, params, said):
    with pytest.raises(UserError, match=said):
        make_extractor(name, params, 3)


def test_inception_without_weights_package_or_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert isinstance(default_extractor(3), RandomConv)
    with pytest.raises(UserError, match="weights-inception-2015-12-05-6726825d.pth: no such file"):
        Inception()
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, Inception.cached())
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        Inception()
    assert isinstance(default_extractor(3), RandomConv)
    with pytest.raises(UserError, match="these pictures have 4; take random-conv"):
        Inception(image_channels=4)


def test_inception_gets_bytes_of_three_channels(tmp_path, monkeypatch):
    class Network(nn.Module):  # in place of torch-fidelity's
        def __init__(self, name, features, weights):
            super().__init__()
            assert features == ["2048"]

        def forward(self, x):
            return (x,)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, Inception.cached())
    fake = SimpleNamespace(FeatureExtractorInceptionV3=Network)
    monkeypatch.setattr(features.importlib, "import_module", lambda name: fake)
    found = default_extractor(1)
    assert label(found) == "rFID"
    levels = found(torch.tensor([-1.5, -1.0, 0.0, 1.0]).view(1, 1, 2, 2))
    assert levels.dtype == torch.uint8 and levels.shape == (1, 3, 2, 2) and levels[0, 1].flatten().tolist() == [0, 0, 128, 255]
    Inception.cached().write_bytes(b"no weights")
    with pytest.raises(UserError, match="not Inception's weights"):
        Inception()
