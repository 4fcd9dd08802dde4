import copy
import math

import pytest
import torch
from torch import nn

from ldm.common.optim import Muon, make_optimizer, make_schedule, orthogonalise

SHAPES = [(8, 8), (6, 10), (10, 6), (4, 40), (40, 4), (16, 31), (16, 32), (1, 5), (5, 1)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network():
    """A matrix, a convolution, vectors, and layers whose names keep them from Muon."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
            self.norm = nn.GroupNorm(2, 6)
            self.embedding, self.linear, self.frozen = nn.Embedding(5, 6), nn.Linear(6, 3), nn.Linear(3, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x, index):
            h = self.norm(self.conv(self.conv_in(x))).mean((2, 3)) + self.embedding(index)
            return self.frozen(self.linear(h))

    return Net()


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        draws = torch.Generator().manual_seed(step)
        x, index = torch.randn(3, 2, 4, 4, generator=draws), torch.randint(5, (3,), generator=draws)
        optimizer.zero_grad()
        net(x, index).square().mean().backward()
        optimizer.step()


def conditioned(shape, low=0.2):
    """U S V^T with singular values from ``low`` to 1."""
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, low, u.shape[-1], dtype=torch.float64)
    return (u * s) @ vt, u, vt


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise_keeps_directions_and_evens_their_lengths(shape):
    g, u, vt = conditioned(shape)
    x = orthogonalise(g[None])[0]
    middle = u.mT @ x @ vt.mT  # diagonal where the singular vectors are the same
    s = middle.diagonal()
    assert ((s > 0.6) & (s < 1.3)).all()
    assert torch.allclose(middle, s.diag(), atol=1e-8)
    assert torch.allclose(x, (u * s) @ vt, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise_is_the_published_iteration(shape):
    """Written out on X itself, whichever way the shape is computed."""
    g = torch.randn(3, *shape, dtype=torch.float64)
    for found, one in zip(orthogonalise(g), g, strict=True):
        x = one.T if shape[0] > shape[1] else one
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        assert torch.allclose(found, x.T if shape[0] > shape[1] else x, atol=1e-9)


@pytest.mark.parametrize("shape", [(16, 144), (32, 32)])
def test_orthogonalise_in_single_precision(shape):
    g = conditioned(shape, low=0.05)[0]
    assert torch.allclose(orthogonalise(g.float()[None])[0], orthogonalise(g[None])[0].float(), atol=2e-2)


def test_size_of_the_gradient_does_not_matter():
    g = torch.randn(2, 6, 9)
    assert torch.allclose(orthogonalise(g), orthogonalise(1000 * g), atol=1e-4)
    assert not orthogonalise(torch.zeros(1, 3, 4)).any()


def test_first_step_of_a_matrix():
    """With momentum from zero, the update has the direction of the gradient: -lr 0.2 sqrt(max(m, n)) of its U V^T."""
    weight = nn.Parameter(torch.randn(4, 3, 2, 2))
    before = weight.detach().clone()
    optimizer = Muon([("weight", weight)], lr=0.1, weight_decay=0.5)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    update = orthogonalise(weight.grad.flatten(1)[None])[0].view_as(weight)
    assert torch.allclose(weight, before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(12) * update, atol=1e-5)


def test_momentum_is_nesterov():
    weight = nn.Parameter(torch.zeros(3, 5))
    optimizer = Muon([("weight", weight)], lr=1.0, momentum=0.9)
    gradients, momentum, expected = torch.randn(4, 3, 5), torch.zeros(3, 5), torch.zeros(3, 5)
    for g in gradients:
        weight.grad = g.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * g
        expected = expected - 0.2 * math.sqrt(5) * orthogonalise((0.9 * momentum + 0.1 * g)[None])[0]
        assert torch.equal(weight.grad, g)
    assert torch.allclose(weight, expected, atol=1e-3)


def test_everything_but_matrices_is_adamw():
    ours, theirs = network(), network()
    theirs.load_state_dict(ours.state_dict())
    everything = tuple(name for name, _ in ours.named_parameters())
    mine = Muon(ours.named_parameters(), lr=1e-2, adam_names=everything)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    train(ours, mine, 10)
    train(theirs, reference, 10)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_weights_without_gradient_now_and_then_count_their_own_steps():
    ours, theirs = ([nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    optimizers = (Muon([("a", ours[0]), ("b", ours[1])], lr=0.1),
                  torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=0))  # fmt: skip
    for step in range(5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for number, p in enumerate(params):
                p.grad = torch.tensor([1.0, -2.0, step]) if number == 0 or step % 2 else None
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_who_takes_which_weights():
    net = network()
    matrices, others = Muon(net.named_parameters(), lr=0.3, adam_lr=0.1).param_groups
    assert matrices["muon"] and {id(p) for p in matrices["params"]} == {id(net.conv.weight), id(net.linear.weight)}
    assert not others["muon"] and (matrices["lr"], others["lr"]) == (0.3, 0.1)
    counted = [id(p) for group in (matrices, others) for p in group["params"]]
    assert len(counted) == len(set(counted))
    assert set(counted) == {id(p) for p in net.parameters() if p.requires_grad}
    assert Muon(net.named_parameters(), lr=0.3).param_groups[1]["lr"] == 0.3
    assert Muon(net.named_parameters(), lr=0.3, adam_lr=0.0).param_groups[1]["lr"] == 0.0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_goes_on_from_a_state_dict_as_if_nothing_had_happened(memory_format):
    straight = network().to(memory_format=memory_format)
    optimizer = Muon(straight.named_parameters(), lr=1e-2, adam_lr=3e-3)
    train(straight, optimizer, 3)
    resumed = copy.deepcopy(straight)
    other = Muon(resumed.named_parameters(), lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, 4, start=3)
    train(resumed, other, 4, start=3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layout_in_memory_does_not_matter():
    plain = network()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for net in (plain, last):
        train(net, Muon(net.named_parameters(), lr=1e-3), 3)
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_step_takes_a_closure():
    net = nn.Linear(3, 2)
    optimizer = Muon(net.named_parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("target", ["ldm.common.optim.Muon", "torch.optim.AdamW", "torch.optim.SGD"])
def test_blocks_become_optimizers_of_all_that_is_trained(target):
    net = network()
    optimizer = make_optimizer({"target": target, "params": {"lr": 0.25}}, net)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters() if p.requires_grad} and len(held) == 9
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)


def test_schedules_move_all_groups_in_proportion():
    optimizer = Muon(network().named_parameters(), lr=0.4, adam_lr=0.1)
    block = {"target": "ldm.common.schedules.Warmup", "params": {"steps": 4, "decay": "linear"}}
    schedule = make_schedule(block, optimizer, total=10)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [a / b for a, b in seen] == pytest.approx([4.0] * 10)
    expected = [0.4 * min(1, (n + 1) / 4) * (1 - n / 10) for n in range(10)]
    assert [a for a, _ in seen] == pytest.approx(expected)


def test_no_schedule_is_constant():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    schedule = make_schedule(None, optimizer, None)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
