import math

import pytest
import torch
from tiny_vision import tiny
from torch import nn

from autoencoder.base import Autoencoder, Identity
from autoencoder.bottlenecks import KL, VQ
from autoencoder.model import convolutional
from autoencoder.regularisers import (
    Alignment,
    Chance,
    DecoderNoise,
    Equivariance,
    Regularisers,
    marginal_cosine,
    marginal_distances,
    noised,
    transformed,
)
from ldm.common.build import build, check
from ldm.common.files import UserError

CHANCE = Chance(seed=1, batch=0, positions=[0, 1, 2, 3])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Own(Autoencoder):
    """A user's class: no more than the contract asks for."""

    def __init__(self, channels=4):
        super().__init__(3, channels, 4)
        self.down, self.up = nn.Conv2d(3, channels, 4, 4), nn.ConvTranspose2d(channels, 3, 4, 4)

    def moments(self, x):
        return self.down(x), None

    def decode_raw(self, z):
        return self.up(z)


def test_noise_is_in_units_of_each_channels_deviation():
    z = drawn(4, 3, 32, 32) * torch.tensor([0.1, 1.0, 50.0]).view(3, 1, 1) + 7
    noise, level = drawn(4, 3, 32, 32, seed=1), torch.tensor([0.0, 0.1, 0.2, 0.3])
    added = noised(z, level, noise) - z
    assert torch.equal(added[0], torch.zeros_like(added[0]))
    for i in (1, 2, 3):
        assert torch.allclose(added[i].std(dim=(1, 2)) / z.std(dim=(0, 2, 3)), level[i].expand(3), rtol=0.1)
    assert torch.allclose(noised(100 * z, level, noise), 100 * noised(z, level, noise), rtol=1e-4)  # larger latents win nothing


def test_a_decoders_noise_is_new_for_every_picture_and_the_same_when_resumed():
    z, x = drawn(4, 2, 8, 8), torch.zeros(4, 3, 32, 32)
    goal, first = DecoderNoise(0.5).present(x, z, CHANCE)
    assert goal is x and torch.equal(DecoderNoise(0.5).present(x, z, CHANCE)[1], first)
    levels = (first - z).std(dim=(1, 2, 3)) / z.std()
    assert len(set(levels.tolist())) == 4 and levels.max() < 0.6


def test_picture_and_latent_go_through_the_same_map():
    x = drawn(2, 3, 24, 16)
    goal, z = transformed(x, x, (9, 6), 1)  # an autoencoder of factor 1 that does nothing is equivariant under every map
    assert goal.shape == (2, 3, 6, 9) and torch.equal(goal, z)
    goal, z = transformed(x, drawn(2, 4, 6, 4), (3, 2), 3)
    assert goal.shape == (2, 3, 8, 12) and z.shape == (2, 4, 2, 3)
    quarter = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert transformed(quarter, quarter, (2, 2), 1)[0].tolist() == [[[[2.0, 4.0], [1.0, 3.0]]]]
    assert transformed(quarter, quarter, (1, 1), 0)[0].item() == 2.5  # with antialiasing: the mean


def test_equivariance_leaves_its_share_of_batches_alone():
    x, z = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 16, 16)
    same, sides = 0, []
    for batch in range(400):
        goal, latent = Equivariance(preserve=0.25, smallest=8).present(x, z, Chance(3, batch, [0]))
        same += latent is z
        sides += [latent.shape[-1]] * (latent is not z)
        assert goal.shape[-1] == 4 * latent.shape[-1]
    assert abs(same - 100) < 35  # four standard deviations
    assert min(sides) == 4 and max(sides) == 16 and abs(sum(sides) / len(sides) - 10) < 0.8  # uniform on [4, 16]


def test_equivariance_is_the_same_on_all_ranks_and_goes_below_no_size():
    x, z = drawn(1, 1, 64, 48), drawn(1, 1, 16, 12)
    for batch in range(20):
        one, other = (Equivariance(preserve=0.0).present(x, z, Chance(3, batch, [place]))[0] for place in (7, 8))
        assert torch.equal(one, other) and min(one.shape[2:]) >= 32
    whole = Equivariance(preserve=0.0, smallest=48).present(x, z, CHANCE)[1]
    assert any(torch.equal(whole, z.rot90(turns, (2, 3))) for turns in (1, 2, 3))  # no room for another scale
    assert Equivariance(preserve=0.0, smallest=48, rotate=False).present(x, z, CHANCE)[1].equal(z)


def test_nothing_is_asked_of_an_autoencoder_that_is_equivariant():
    x = drawn(4, 3, 32, 32)
    goal, x_hat, bottled = Regularisers([Equivariance(preserve=0.0, smallest=8)]).reconstruct(Identity(), x, None, CHANCE)
    assert torch.equal(goal, x_hat) and goal.shape != x.shape and bottled.latent is x


def fitted(autoencoder, regularisers, steps=150):
    """Trained on pictures that have a direction."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-2)
    for batch in range(steps):
        x = saws(batch)
        goal, x_hat, _ = Regularisers(regularisers).reconstruct(autoencoder, x, None, Chance(0, batch, range(8 * batch, 8 * batch + 8)))
        optimizer.zero_grad()
        (goal - x_hat).square().mean().backward()
        optimizer.step()
    return autoencoder


def saws(seed):
    """Of one colour, but that every 4 pixels it grows from dark to bright, from the left to the right."""
    colour = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) - 0.5
    return (colour + torch.tensor([-0.5, -0.2, 0.2, 0.5] * 4)).expand(8, 3, 16, 16) + 0.1 * drawn(8, 3, 16, 16, seed=seed)


def own(channels=4):
    torch.manual_seed(0)
    return Own(channels)


def test_equivariance_is_learned():
    def error(autoencoder):
        x = saws(1000)
        with torch.no_grad():
            return (autoencoder.decode_raw(autoencoder.moments(x)[0].rot90(1, (2, 3))) - x.rot90(1, (2, 3))).square().mean().item()

    assert error(fitted(own(), [Equivariance(preserve=0.0, smallest=8)])) < 0.75 * error(fitted(own(), []))


def test_a_decoder_learns_to_forgive_noise():
    def error(autoencoder):
        x = saws(1000)
        with torch.no_grad():
            z = autoencoder.moments(x)[0]
            return (autoencoder.decode_raw(noised(z, torch.full((8,), 0.8), drawn(*z.shape))) - x).square().mean().item()

    assert error(fitted(own(32), [DecoderNoise(1.0)])) < 0.9 * error(fitted(own(32), []))


def test_a_kind_with_codes_is_refused_where_its_latent_would_be_changed():
    autoencoder = convolutional(VQ(2, codes=8), width=8, mult=[1, 2], blocks=1, attention=False)
    for regulariser in (DecoderNoise(), Equivariance(preserve=0.0, smallest=8)):
        with pytest.raises(UserError, match="DecoderNoise and Equivariance.*codes"):
            Regularisers([regulariser]).reconstruct(autoencoder, torch.zeros(4, 3, 16, 16), None, CHANCE)
        with pytest.raises(UserError, match="DecoderNoise and Equivariance.*codes"):  # before training, not at the first
            Regularisers([regulariser]).connect(autoencoder)  # batch that it would change


def test_margins_by_hand():
    a = torch.zeros(1, 2, 1, 2)
    a[0, 0] = 1.0  # two places with the direction (1, 0)
    b = torch.zeros(1, 2, 1, 2)
    b[0, 0, 0, 0], b[0, 1, 0, 1] = 5.0, 5.0  # (1, 0) and (0, 1)
    assert marginal_cosine(a, a, 0.0) == 0 and marginal_cosine(a, -a, 0.5) == 1.5
    assert marginal_cosine(a, b, 0.25).item() == pytest.approx(0.75 / 2)
    assert marginal_distances(a, -3 * a, 0.0).item() == pytest.approx(0, abs=1e-6)  # how places compare is the same
    assert marginal_distances(a, b, 0.25).item() == pytest.approx(2 * 0.75 / 4)  # of four pairs, two differ by 1
    assert marginal_distances(a, b, 1.0) == 0


# ------------------------------------------------------------------------------------------------------------- alignment
@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return folder, tiny("vit", folder)


def test_features_are_those_of_the_model_at_every_place(vit):
    folder, model = vit
    alignment, x = Alignment(str(folder)), drawn(2, 3, 16, 16).clamp(-1, 1)
    pixels = ((x + 1) / 2 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    with torch.no_grad():
        states = model(pixels).last_hidden_state
    found = alignment.vision(x)
    assert found.shape == (2, 16, 4, 4) and states.shape == (2, 17, 16)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        assert torch.allclose(found[:, :, row, column], states[:, 1 + 4 * row + column], atol=1e-5)
    assert alignment.vision(drawn(2, 1, 32, 24)).shape == (2, 16, 4, 4)  # grey, of another size


@pytest.mark.parametrize("kind", ["registers", "clip", "convnext"])
def test_other_vision_models(kind, tmp_path):
    tiny(kind, tmp_path)
    regularisers = Regularisers([Alignment(str(tmp_path))])
    regularisers.connect(own())
    regularisers.prepare()
    z = drawn(2, 4, 4, 4).requires_grad_()
    term, logged = regularisers.terms(drawn(2, 3, 16, 16), z, z.square().mean())
    assert term.isfinite() and term > 0 and set(logged) == {"alignment_cosine", "alignment_distances", "alignment_weight"}


def test_the_vision_model_is_in_no_checkpoint_and_its_projection_is(vit):
    autoencoder = own()
    regularisers = Regularisers([Alignment(str(vit[0]))])
    regularisers.connect(autoencoder)
    regularisers.prepare()
    assert {name: tuple(p.shape) for name, p in regularisers.named_parameters()} == {"0.projection.weight": (16, 4, 1, 1)}
    assert list(regularisers.state_dict()) == ["0.projection.weight"]


def test_the_adaptive_weight_is_a_share_of_the_reconstructions_pull_at_the_latent(vit):
    alignment, autoencoder, x = Alignment(str(vit[0]), weight=0.25, cosine_margin=0.0, distance_margin=0.0), own(), drawn(4, 3, 16, 16)
    alignment.connect(autoencoder)
    x_hat, bottled = autoencoder(x)
    nll = (x - x_hat).square().mean()
    term, _ = alignment.term(x, bottled.latent, nll)
    of_term, of_nll = (torch.autograd.grad(loss, bottled.latent, retain_graph=True)[0].norm() for loss in (term, nll))
    assert of_term.item() == pytest.approx(0.25 * of_nll.item(), rel=1e-3)
    fixed = Alignment(str(vit[0]), weight=0.25, adaptive=False)
    fixed.connect(autoencoder)
    term, logged = fixed.term(x, bottled.latent, nll)
    assert term.item() == pytest.approx(0.25 * (logged["alignment_cosine"] + logged["alignment_distances"]).item())


def test_alignment_is_learned(vit):
    autoencoder = own(8)
    alignment = Alignment(str(vit[0]), weight=1.0, cosine_margin=0.0, distance_margin=0.0)
    alignment.connect(autoencoder)
    optimizer = torch.optim.Adam([*autoencoder.parameters(), *alignment.parameters()], lr=1e-2)
    seen = []
    for batch in range(60):
        x = saws(batch)
        x_hat, bottled = autoencoder(x)
        nll = (x - x_hat).square().mean()
        term, logged = alignment.term(x, bottled.latent, nll)
        seen.append({**logged, "nll": nll.detach()})
        optimizer.zero_grad()
        (nll + term).backward()
        optimizer.step()
    first, last = ({name: sum(row[name].item() for row in rows) / 10 for name in seen[0]} for rows in (seen[:10], seen[-10:]))
    assert last["alignment_cosine"] < 0.6 * first["alignment_cosine"] and last["nll"] < 0.8 * first["nll"]


def test_mistakes_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"vision model .*nowhere: cannot read config.json"):
        Alignment(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="DecoderNoise.tau: 0"):
        DecoderNoise(0)
    with pytest.raises(ValueError, match="Equivariance.preserve: 2"):
        Equivariance(preserve=2)
    with pytest.raises(ValueError, match="Alignment.weight"):
        Alignment("any", weight=-1.0)


def test_vision_models_see_1_or_3_channels(vit):
    rgba = convolutional(KL(2), image_channels=4, width=8, mult=[1, 2], blocks=1, attention=False)
    with pytest.raises(UserError, match="1 or 3 channels, the autoencoder's have 4"):
        Regularisers([Alignment(str(vit[0]))]).connect(rgba)


def test_a_config_names_them(vit):
    blocks = [{"target": "autoencoder.regularisers.Equivariance", "params": {"preserve": 0.5}},
              {"target": "autoencoder.regularisers.Alignment", "params": {"encoder": str(vit[0])}}]
    autoencoder = {"target": f"{__name__}.Own"}
    module = {"target": "autoencoder.lit.AutoencoderModule", "params": {
        "autoencoder": autoencoder, "loss": {"target": "autoencoder.losses.ReconstructionLoss"},
        "optimizer": {"target": "torch.optim.AdamW"}, "regularisers": blocks}}
    assert check(module) == []
    made = build(module, seed=1)
    assert [type(r).__name__ for r in made.regularisers] == ["Equivariance", "Alignment"]
    assert math.prod(made.regularisers[1].projection.weight.shape) == 16 * 4
    blocks[0]["params"] = {"preserv": 0.5}
    assert len(check(module)) == 1 and "preserve" in check(module)[0]
