import pytest
import torch
from torch import nn

from ldm.common.finite import bad_rows, culprit, finite, listed, samples_of


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_the_part_that_made_it_is_named():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(Root(), nn.Linear(3, 1)))
    nn.init.constant_(net[0].weight, -1.0), nn.init.zeros_(net[0].bias)
    x = torch.ones(4, 2, requires_grad=True)
    assert culprit(net, lambda: net(x)) == "1.0 made inf or nan of what was finite"
    assert culprit(net, lambda: net(-x)) is None
    assert culprit(net, lambda: net(x * float("nan"))) == "0 was given inf or nan"
    net[0].bias.data[1] = float("inf")
    assert culprit(net, lambda: net(-x)) == "0 has inf or nan in its bias"
    assert not any(part._forward_hooks for part in net.modules())


def test_hooks_go_away_when_the_call_fails():
    net = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        culprit(net, lambda: net(torch.ones(1, 5)))
    assert not net._forward_hooks


def test_values_and_rows():
    x = torch.ones(3, 2, 2)
    y = x.clone()
    y[1, 0, 1] = float("nan")
    assert finite({"a": [x, 3, "b"], "c": torch.arange(2)}) and not finite({"a": [x, y]})
    assert bad_rows(x, y).tolist() == [False, True, False]


def test_samples_have_names():
    batch = {"key": list("abcdefg"), "position": torch.arange(7)}
    assert samples_of(batch, torch.tensor([True, False] * 3 + [True])) == ["a", "c", "e", "g"]
    assert listed(samples_of(batch)) == "a, b, c, d, e and 2 more" and listed(["x"]) == "x"
    assert samples_of({"position": torch.tensor([5, 9])}, torch.tensor([False, True])) == ["number 9 of the run"]
    assert samples_of({"image": 1}) == []
