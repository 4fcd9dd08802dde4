import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autoencoder.critics import Adversarial, Lpips, PatchCritic, frozen
from autoencoder.losses import ReconstructionLoss
from ldm.common.files import UserError

CRITIC, LPIPS = "tests/data/discriminator.safetensors", "tests/data/lpips_formula.safetensors"


def test_published_discriminator_gives_its_published_numbers():
    io = load_file(CRITIC)
    critic = PatchCritic(3, width=8, layers=3)
    critic.load_state_dict({k.removeprefix("in.bn3."): v for k, v in io.items() if k.startswith("in.bn3.")})
    assert torch.allclose(critic.eval()(io["in.image"]), io["out.bn3_eval"], atol=1e-5)
    assert torch.allclose(critic.train()(io["in.image"]), io["out.bn3_train"], atol=1e-5)
    assert torch.allclose(critic.main[3].running_mean, io["out.bn3_running_mean_after"], atol=1e-6)
    assert torch.allclose(critic.main[3].running_var, io["out.bn3_running_var_after"], atol=1e-6)


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
    io, lpips = load_file(LPIPS), Lpips(vgg)
    lpips.lins = [formula(26 + n, lin.shape, "lin") for n, lin in enumerate(lpips.lins)]
    y = io["in.y"].requires_grad_()
    value = lpips(io["in.x"], y)
    assert torch.allclose(value, io["out.lpips"].flatten(), rtol=1e-4)
    value.sum().backward()
    assert torch.allclose(y.grad, io["out.grad_y"], atol=1e-5)


def test_lpips_has_a_gradient_where_nothing_differs_or_all_is_flat(vgg):
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    Lpips(vgg)(torch.zeros(1, 1, 16, 16), x).sum().backward()
    assert x.grad.isfinite().all()


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
