import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autoencoder.critics import ActNorm, Adversarial, Frozen, Lpips, PatchCritic, frozen
from autoencoder.losses import ReconstructionLoss, gradient_penalty
from ldm.common.files import UserError

DATA = Path(__file__).parents[1] / "data/parity"


def close(found, expected, tolerance=1e-5):
    """To within a share of the largest value."""
    return (found.detach() - expected).abs().max() <= tolerance * expected.abs().max()


def published(io, prefix, **options):
    critic = PatchCritic(3, width=8, **options)
    critic.load_state_dict({k.removeprefix(prefix): v for k, v in io.items() if k.startswith(prefix)})
    return critic


def test_published_discriminator_gives_its_published_numbers():
    io = load_file(DATA / "discriminator/io.safetensors")
    critic = published(io, "in.bn3.", layers=3)
    assert close(critic.eval()(io["in.image"]), io["out.bn3_eval"])
    assert close(critic.train()(io["in.image"]), io["out.bn3_train"])
    assert close(critic.main[3].running_mean, io["out.bn3_running_mean_after"])
    assert close(critic.main[3].running_var, io["out.bn3_running_var_after"])


def test_published_discriminator_with_actnorm():
    """As it was saved; and from "not initialized", where the first training batch says what loc and scale are."""
    io = load_file(DATA / "discriminator/io.safetensors")
    critic = published(io, "in.act2.", layers=2, norm="act")
    assert bool(critic.main[3].initialized) and close(critic.train()(io["in.image"]), io["out.act2_initialized"])
    fresh = {**critic.state_dict(), **{f"main.{n}.initialized": torch.tensor(0, dtype=torch.uint8) for n in (3, 6)}}
    critic.load_state_dict(fresh)
    assert close(critic.train()(io["in.image"]), io["out.act2_first_train_call"])
    assert close(critic.main[3].loc, io["out.act2_loc_after_init"]) and close(critic.main[3].scale, io["out.act2_scale_after_init"])
    assert bool(critic.main[3].initialized) and bool(critic.main[6].initialized)


def test_actnorm_is_initialised_once_and_in_training_alone():
    norm, x = ActNorm(2), torch.randn(8, 2, 4, 4) * 3 + 1
    assert torch.equal(norm.eval()(x), x) and not norm.initialized
    y = norm.train()(x)
    assert torch.allclose(y.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(y.std(dim=(0, 2, 3)), torch.ones(2), atol=1e-4)
    assert torch.allclose(norm(x + 1) - y, norm.scale.expand_as(x))  # another batch changes nothing
    again = ActNorm(2)
    again.load_state_dict(norm.state_dict())
    assert torch.equal(again.train()(x + 1), norm(x + 1))


@pytest.mark.parametrize("norm", ["group", "none"])
def test_other_norms_do_not_depend_on_the_rest_of_the_batch(norm):
    critic, x = PatchCritic(1, width=8, layers=2, norm=norm), torch.randn(3, 1, 32, 32)
    assert torch.allclose(critic(x)[:1], critic(x[:1]), atol=1e-6)


def adversarial(**options):
    torch.manual_seed(0)
    return Adversarial(PatchCritic(1, width=4, layers=1, norm="none"), **options)


def test_shares_of_the_run_become_batches():
    critic = adversarial(start=0.5, ramp=3, lead=0.1)
    critic.plan(40)
    assert [critic.share(b) for b in (0, 19, 20, 21, 22, 23, 39)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [critic.learns(b) for b in (15, 16, 39)] == [False, True, True]
    critic.plan(80)  # a longer run has the same shares
    assert critic.share(39) == 0 and critic.share(40) > 0


def test_a_start_beyond_the_run_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        adversarial(start=50).plan(40)
    assert "50" in caplog.text and "40" in caplog.text


def test_times_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="critic.start: 1.5"):
        adversarial(start=1.5)
    with pytest.raises(UserError, match="critic.start"):
        adversarial(start=0.5).plan(None)


def test_judging_moves_the_picture_and_not_the_critic():
    critic = adversarial(start=0, ramp=0, lead=0, weight=0.5)
    critic.plan(10)
    last = torch.ones(1, 1, 16, 16, requires_grad=True)
    x_hat = last * 2
    terms = critic.judge(x_hat, x_hat.square().mean(), last, batch=0)
    terms["adversarial"].backward()
    assert last.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters()) and all(p.requires_grad for p in critic.parameters())
    assert terms["adversarial"].item() == pytest.approx((terms["adversarial_weight"] * terms["generator"]).item())


def test_learning_moves_the_critic_and_not_the_picture():
    critic = adversarial(start=5, lead=2)
    critic.plan(10)
    x, x_hat = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16, requires_grad=True)
    idle = critic.learn(x, x_hat, batch=2)
    idle["critic"].backward()
    assert idle["critic"] == 0 and all((p.grad == 0).all() for p in critic.parameters())
    critic.learn(x, x_hat, batch=3)["critic"].backward()
    assert x_hat.grad is None and any(p.grad.abs().sum() > 0 for p in critic.parameters())


class Plane(torch.nn.Module):
    """D(x) = w . x, spread over two logits."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(1.0, 5.0).view(1, 1, 2, 2))

    def forward(self, x):
        return (self.w * x).sum(dim=(1, 2, 3))[:, None] * torch.tensor([0.25, 0.75])


def test_r1_of_a_plane():
    """|d D / d x|^2 = |w|^2 = 30 at every picture, and its gradient with gamma/2 is gamma w; every third batch, three times."""
    critic = Adversarial(Plane(), start=0, ramp=0, lead=0, r1=0.5, r1_every=3)
    critic.plan(10)
    x, x_hat = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    without, plain = critic.learn(x, x_hat, batch=1), Adversarial(critic.net, start=0)
    plain.plan(10)
    assert "r1" not in without and torch.equal(without["critic"], plain.learn(x, x_hat, 0)["critic"])
    terms = critic.learn(x, x_hat, batch=3)
    assert terms["r1"].item() == pytest.approx(30, rel=1e-6)
    assert (terms["critic"] - without["critic"]).item() == pytest.approx(3 * 0.25 * 30, rel=1e-6)
    of_penalty, = torch.autograd.grad(terms["critic"] - without["critic"], critic.net.w)
    assert torch.allclose(of_penalty, 3 * 0.5 * critic.net.w, rtol=1e-4)
    assert not x.requires_grad and x.grad is None


@pytest.mark.parametrize("norm", ["batch", "act", "group", "none"])
def test_r1_makes_a_critic_flatter(norm):
    torch.manual_seed(0)
    slopes = {}
    for r1 in (0.0, 10.0):
        critic = Adversarial(PatchCritic(1, width=8, layers=1, norm=norm), start=0, lead=0, ramp=0, r1=r1, r1_every=2)
        critic.plan(40)
        optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
        x, x_hat = torch.randn(4, 1, 16, 16) + 1, torch.randn(4, 1, 16, 16)
        for batch in range(30):
            optimizer.zero_grad()
            critic.learn(x, x_hat, batch)["critic"].backward()
            optimizer.step()
        x.requires_grad_(True)
        slopes[r1] = gradient_penalty(critic.net(x), x).item()
    assert slopes[10.0] < 0.1 * slopes[0.0]


def test_each_kind_has_its_own_generator_loss():
    last = torch.ones(1, 1, 16, 16, requires_grad=True)
    for kind, expected in {"hinge": lambda d: -d.mean(), "vanilla": lambda d: -d.mean(), "lsgan": lambda d: ((d - 1) ** 2).mean()}.items():
        critic = adversarial(start=0, ramp=0, lead=0, kind=kind)
        critic.plan(10)
        terms = critic.judge(last * 2, last.sum(), last, batch=0)
        assert torch.equal(terms["generator"], expected(critic.net(last * 2)))


def test_a_fixed_weight_and_a_limit():
    last = torch.ones(1, 1, 16, 16, requires_grad=True)
    x_hat = last * 2

    def weight(**options):
        critic = adversarial(start=0, ramp=1, lead=0, weight=0.5, **options)
        critic.plan(10)
        return [critic.judge(x_hat, x_hat.square().sum(), last, batch)["adversarial_weight"].item() for batch in (0, 1)]

    assert weight(adaptive=False) == [0.25, 0.5]  # the ramp counts here too
    assert weight(limit=3.0) == [0.75, 1.5] and weight()[1] > 1.5
    fixed = adversarial(start=0, adaptive=False)
    fixed.plan(10)
    assert fixed.judge(x_hat, x_hat.square().sum(), None, 9)["adversarial"].requires_grad  # asks for no last layer


def test_how_often_the_critic_is_right():
    critic = Adversarial(Plane(), start=3, lead=3, ramp=0, kind="lsgan")
    critic.plan(100)
    up, down = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert critic.learn(up, down, 0)["critic_right"] == 1.0  # 2.5 and 7.5 against 0: beyond 0.5 on both sides
    assert critic.learn(down, down, 0)["critic_right"] == 0.5
    for batch in range(22):
        critic.learn(up, down, batch)
    assert critic.right() == {}  # 19 of them with the autoencoder listening
    critic.learn(down, down, 22)
    assert critic.right()["critic_right"] == pytest.approx((19 + 0.5) / 20)


def test_pictures_that_do_not_fit_the_critic_are_named():
    with pytest.raises(ValueError, match="critic.net.image_channels: 3, but the pictures have 4"):
        PatchCritic(3, width=4, layers=1)(torch.zeros(1, 4, 16, 16))
    for layers in (1, 2, 3):
        critic = PatchCritic(1, width=4, layers=layers, norm="none")
        assert critic(torch.zeros(1, 1, critic.smallest, critic.smallest)).shape == (1, 1, 1, 1)
        with pytest.raises(ValueError, match=f"critic.net.layers.*{critic.smallest} pixels"):
            critic(torch.zeros(1, 1, critic.smallest - 1, 64))


def test_what_is_frozen_is_part_of_nothing():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    holder = torch.nn.Module()
    holder.distance = Frozen(net)
    assert list(holder.parameters()) == [] and holder.state_dict() == {}
    x = torch.randn(3, 2, requires_grad=True)
    holder.train()
    holder.distance(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters()) and not net.training


def test_frozen_gives_back_what_was_trained():
    net = PatchCritic(1, width=4, layers=1)
    net.main[0].bias.requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(RuntimeError), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in net.parameters()] == before


def formula(n, shape, kind):
    """The fixture's weights: n-th tensor, see its notes."""
    j = np.arange(math.prod(shape))
    s = np.sin(0.37 * (n + 1) + 1.9898 * j + 0.1 * (j % 7))
    scale = {"lin": 0.3, "weight": 1.2 * math.sqrt(3 / math.prod(shape[1:])), "bias": 0.05}[kind]
    return torch.from_numpy((scale * (abs(s) if kind == "lin" else s)).astype(np.float32)).view(shape)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file as torchvision's VGG16 has it (without the classifier), filled by the formula."""
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    state = {}
    for k, index in enumerate(convolutions):
        state[f"features.{index}.weight"] = formula(2 * k, (widths[k + 1], widths[k], 3, 3), "weight")
        state[f"features.{index}.bias"] = formula(2 * k + 1, (widths[k + 1],), "bias")
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return str(path)


def test_lpips_has_the_reference_values_and_gradient(vgg):
    io, lpips = load_file(DATA / "lpips_formula/io.safetensors"), Lpips(vgg)
    lpips.lins = [formula(26 + n, lin.shape, "lin") for n, lin in enumerate(lpips.lins)]
    probes = [lpips.trunk[0].weight, lpips.trunk[10].weight, lpips.trunk[28].bias, lpips.lins[2]]
    assert close(torch.stack([probe.flatten()[:4] for probe in probes]), io["out.weight_probe"], 1e-6)
    y = io["in.y"].requires_grad_()
    value = lpips(io["in.x"], y)
    assert close(value, io["out.lpips"].flatten())
    value.sum().backward()
    assert close(y.grad, io["out.grad_y"])
    assert close(lpips.features(io["in.x"])[-1], io["out.feat4"] / io["out.feat4"].norm(dim=1, keepdim=True))


def test_lpips_has_a_gradient_where_nothing_differs_or_all_is_flat(vgg):
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    Lpips(vgg)(torch.zeros(1, 1, 16, 16), x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_lpips_takes_1_or_3_channels(vgg, channels):
    with pytest.raises(UserError, match=f"these have {channels}; .*loss.perceptual=0.*perceptual_distance"):
        Lpips(vgg)(torch.zeros(1, channels, 16, 16), torch.zeros(1, channels, 16, 16))


def test_perceptual_weights_that_cannot_be_had_name_the_ways_out(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="perceptual_weights.*perceptual=0"):
        ReconstructionLoss(perceptual=1.0, perceptual_weights=str(tmp_path / "none.pth")).prepare()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("autoencoder.critics.VGG", "http://127.0.0.1:9/vgg16-397923af.pth")
    with pytest.raises(UserError, match="perceptual=0"):
        ReconstructionLoss(perceptual=1.0).prepare()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: 1 of 26"):
        ReconstructionLoss(perceptual=1.0, perceptual_weights=str(tmp_path / "other.pth")).prepare()
    (tmp_path / "no.pth").write_bytes(b"\x89PNG and what follows")
    with pytest.raises(UserError, match="no.pth cannot be read as weights.*expected torchvision's VGG16.*perceptual=0"):
        ReconstructionLoss(perceptual=1.0, perceptual_weights=str(tmp_path / "no.pth")).prepare()
