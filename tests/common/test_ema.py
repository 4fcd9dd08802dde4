import pytest
import torch
from torch import nn

from ldm.common.ema import Ema, HalfLife, warmed_decay


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x, scale=1.0):
        return scale * self.linear(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@torch.no_grad()
def wander(net):
    """A step of training; -> the weights after it."""
    net.linear.weight.add_(torch.randn_like(net.linear.weight))
    net.seen.add_(1)
    return net.linear.weight.clone()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_average_by_the_sum(net, decay):
    ema, start = Ema(net, decay, warmup=False), net.linear.weight.detach().clone()
    path = []
    for _ in range(6):
        path.append(wander(net))
        ema.update(net)
    expected = decay**6 * start + sum((1 - decay) * decay ** (5 - k) * w for k, w in enumerate(path))
    assert torch.allclose(ema.shadow.linear.weight, expected, atol=1e-6)
    assert ema.updates == 6 and ema.shadow.seen == 6  # buffers are copied


def test_warm_up_follows_quickly_at_first():
    assert [warmed_decay(0.9999, n) for n in (1, 2, 90)] == [2 / 11, 3 / 12, 0.91]
    assert warmed_decay(0.5, 100) == 0.5
    assert warmed_decay(0.9999, 10**6) == 0.9999


def test_warm_up_is_used(net):
    ema, start = Ema(net, 0.9999), net.linear.weight.detach().clone()
    wander(net)
    ema.update(net)
    assert torch.allclose(ema.shadow.linear.weight, start.lerp(net.linear.weight, 9 / 11), atol=1e-6)


def test_shadow_is_a_module_of_its_own(net):
    ema, x = Ema(net), torch.randn(1, 3)
    assert torch.equal(ema(x, scale=2.0), net(x, scale=2.0))
    wander(net)
    assert not torch.equal(ema(x), net(x))
    assert not any(p.requires_grad for p in ema.parameters()) and net.linear.weight.requires_grad
    assert not ema.shadow.training


def test_training_in_half_precision_is_averaged_in_full(net):
    half = net.bfloat16()
    ema = Ema(half, 0.999, warmup=False)
    assert ema.shadow.linear.weight.dtype is torch.float32
    before = ema.shadow.linear.weight.clone()
    with torch.no_grad():
        half.linear.weight.add_(1.0)
    ema.update(half)
    moved = ema.shadow.linear.weight - before  # a thousandth: bf16 would have lost it
    assert torch.allclose(moved, 0.001 * (half.linear.weight.float() - before), atol=1e-6) and moved.abs().min() > 5e-4


def test_what_is_frozen_is_shared_and_left_as_it_is(net):
    net.linear.weight.requires_grad_(False)
    half = net.bfloat16()
    ema = Ema(half, 0.9)
    assert ema.shadow.linear.weight is half.linear.weight and half.linear.weight.dtype is torch.bfloat16
    assert ema.shadow.linear.bias is not half.linear.bias and ema.shadow.linear.bias.dtype is torch.float32
    before, bias = half.linear.weight.clone(), ema.shadow.linear.bias.clone()
    with torch.no_grad():
        half.linear.bias.add_(1.0)
    ema.update(half)
    assert torch.equal(half.linear.weight, before) and not torch.equal(ema.shadow.linear.bias, bias)


def test_state_travels(net):
    ema = Ema(net, 0.9)
    for _ in range(3):
        wander(net)
        ema.update(net)
    other = Ema(Net(), 0.9)
    other.load_state_dict(ema.state_dict())
    wander(net)
    for one in (ema, other):
        one.update(net)
    assert torch.equal(ema.shadow.linear.weight, other.shadow.linear.weight) and other.updates == 4


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_decay_has_bounds(net, decay):
    with pytest.raises(ValueError, match=rf"EMA decay is {decay}; it must be in \[0, 1\)"):
        Ema(net, decay)


def test_an_average_stays_in_eval_mode_inside_of_what_is_trained(net):
    whole = nn.ModuleDict({"net": net, "ema": Ema(net, 0.9)}).train()
    assert net.training and not any(part.training for part in whole["ema"].modules())


def test_a_half_life_in_images_asks_for_their_number():
    module = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="number of images"):
        Ema(module, HalfLife(images=10)).update(module)
