import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from autoencoder import losses
from autoencoder.losses import ReconstructionLoss
from ldm.common.build import build, check


def pictures(seed=0, shape=(3, 3, 8, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pixel_distances_are_means_over_each_picture():
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([[1.0, -1, 0, 2], [0, 0, 0, 0]]).view(2, 1, 2, 2)
    assert losses.l1(x, y).tolist() == [1.0, 0.0]
    assert losses.l2(x, y).tolist() == [1.5, 0.0]


def test_charbonnier_lies_between_l2_and_l1():
    x, y = pictures(0), pictures(1)
    assert (losses.charbonnier(x, x) == 0).all()
    assert torch.allclose(losses.charbonnier(x, y), losses.l1(x, y), atol=1e-3)
    assert torch.allclose(losses.charbonnier(x, x + 1e-4), torch.full((3,), 1e-8 / 2e-3), rtol=0.01)


def test_psnr_of_a_known_error():
    x = torch.zeros(1, 3, 4, 4)
    assert losses.psnr(x, x + 0.2).item() == pytest.approx(20.0, abs=1e-4)  # 10 log10(4 / 0.04)
    assert losses.psnr(x + 1, x + 5).item() == pytest.approx(100.0)  # white beyond white is white


def test_kl_is_that_of_torch_distributions():
    mean, logvar = pictures(0), pictures(1)
    posterior, prior = Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = kl_divergence(Independent(posterior, 3), Independent(prior, 3))
    assert torch.allclose(losses.kl_divergence(mean, logvar), expected, rtol=1e-5)


def test_critic_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.hinge_critic(real, fake).item() == 0.5 * (0.25 + 0.5)
    zero = torch.zeros(4)
    assert losses.vanilla_critic(zero, zero).item() == pytest.approx(math.log(2))


def test_lsgan_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.lsgan_critic(real, fake).item() == 0.5 * ((1 + 0.25) / 2 + 9 / 2)
    assert losses.lsgan_generator(fake).item() == (16 + 1) / 2


def test_adaptive_weight_on_two_parameters():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    nll, g = (w * torch.tensor([3.0, 4.0])).sum(), 2 * w[0]
    assert losses.adaptive_weight(nll, g, w).item() == pytest.approx(5 / (2 + 1e-4))
    assert losses.adaptive_weight(nll, 0 * w.sum(), w).item() == 1e4  # a silent critic cannot make it infinite
    assert not losses.adaptive_weight(nll, g, w).requires_grad


def test_reconstruction_loss_sums_its_terms_with_their_weights():
    x, y = pictures(0), pictures(1)
    loss = ReconstructionLoss(pixel="l2", kl=0.1, codebook=2.0)
    terms = loss(x, y, {"kl": torch.tensor(5.0), "codebook": torch.tensor(0.25), "own": torch.tensor(1.0)})
    pixel = (x - y).square().mean()
    assert torch.allclose(terms["pixel"], pixel) and torch.allclose(terms["reconstruction"], pixel)
    assert terms["loss"].item() == pytest.approx(pixel.item() + 0.1 * 5 / 144 + 0.5 + 1.0)
    assert terms["kl"].item() == 5.0  # reported as it is


def test_kl_weight_warms_up():
    x, loss = pictures(), ReconstructionLoss(kl=1.0, kl_warmup=3)
    asked = [loss(x, x, {"kl": torch.tensor(144.0)}, batch)["loss"].item() for batch in range(6)]
    assert asked == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_sums_are_means_times_the_values_of_a_picture():
    x, y, bottleneck = pictures(0), pictures(1), {"kl": torch.tensor(5.0), "codebook": torch.tensor(0.25)}
    mean, total = (ReconstructionLoss(kl=0.1, logvar=0.3, reduction=reduction)(x, y, bottleneck) for reduction in ("mean", "sum"))
    values = 3 * 8 * 6
    assert total["nll"].item() == pytest.approx(values * mean["nll"].item())
    assert total["loss"].item() - 0.25 == pytest.approx(values * (mean["loss"].item() - 0.25))  # the codebook term is a mean
    summed = ((x - y).abs() / math.exp(0.3) + 0.3).sum() / 3  # as LDM writes it
    assert total["loss"].item() == pytest.approx(summed.item() + 0.1 * 5 + 0.25)
    assert total["reconstruction"] == mean["reconstruction"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("error", [0.05, 0.7])
def test_a_learned_logvar_goes_to_the_logarithm_of_the_error(error, reduction):
    loss = ReconstructionLoss(logvar=0.0, learn_logvar=True, reduction=reduction)
    optimizer, x = torch.optim.Adam(loss.parameters(), lr=0.05), torch.zeros(2, 1, 4, 4)
    for _ in range(300):
        optimizer.zero_grad()
        terms = loss(x, x + error, {})
        terms["loss"].backward()
        optimizer.step()
    assert terms["logvar"].item() == pytest.approx(math.log(error), abs=0.01)
    assert terms["reconstruction"].item() == pytest.approx(error, rel=1e-5)


def test_a_logvar_that_is_not_learned_is_no_weight():
    fixed, learned = ReconstructionLoss(logvar=0.2), ReconstructionLoss(logvar=0.2, learn_logvar=True)
    assert list(fixed.parameters()) == [] and [name for name, _ in learned.named_parameters()] == ["logvar"]
    x, y = pictures(0), pictures(1)
    assert torch.equal(fixed(x, y, {})["nll"], learned(x, y, {})["nll"])
    assert "logvar" not in ReconstructionLoss()(x, y, {})


class Darkness(torch.nn.Module):
    """A user's own distance, with weights."""

    def __init__(self, power=2):
        super().__init__()
        self.power, self.weight = power, torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x, y):
        return self.weight * (x - y).abs().mean(dim=(1, 2, 3), keepdim=True) ** self.power


def test_a_distance_of_ones_own_in_place_of_lpips():
    block = {"target": f"{__name__}.Darkness", "params": {"power": 1}}
    loss = {"target": "autoencoder.losses.ReconstructionLoss", "params": {"perceptual": 0.5, "perceptual_distance": block}}
    assert check(loss) == []
    loss, x, y = build(loss), pictures(0), pictures(1)
    loss.prepare()  # looks for no VGG
    terms = loss(x, y, {})
    assert terms["perceptual"].item() == pytest.approx(3 * (x - y).abs().mean().item())
    assert terms["reconstruction"].item() == pytest.approx(2.5 * (x - y).abs().mean().item())
    assert list(loss.parameters()) == [] and loss.state_dict() == {}


def test_terms_are_in_fp32_whatever_the_reconstruction_is_in():
    x, y = pictures(0), pictures(1).bfloat16()
    terms = ReconstructionLoss(logvar=0.0)(x, y, {"kl": torch.tensor(5.0, dtype=torch.bfloat16)})
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert torch.equal(terms["pixel"], (x - y.float()).abs().mean(dim=(1, 2, 3)).mean())


@pytest.mark.parametrize(("options", "named"), [({"pixel": "l3"}, "l3"), ({"kl": -1.0}, "loss.kl"), ({"reduction": "max"}, "max"),
                                                ({"learn_logvar": True}, "loss.logvar")])
def test_mistakes_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        ReconstructionLoss(**options)
