import pytest
import torch
from tiny_training import Tiny, fit
from torch import nn

from ldm.callbacks import promises
from ldm.callbacks.promises import Promises, ranks_differ, weight_problems
from ldm.common.files import UserError


class Other(Tiny):
    """With optimizers of its own."""

    def __init__(self, groups) -> None:
        super().__init__()
        self.groups = groups

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": group} for group in self.groups(self)], lr=0.1)


def weights(module, *names):
    return [dict(module.named_parameters())[name] for name in names]


def problems(groups, change=lambda module: None):
    module = Other(groups)
    change(module)
    return weight_problems(module.train(), [module.configure_optimizers()])


FIRST, LAST = ("net.0.weight", "net.0.bias"), ("net.2.weight", "net.2.bias")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_every_weight_has_one_place():
    assert problems(lambda m: [m.parameters()]) == [] == problems(lambda m: [weights(m, *FIRST), weights(m, *LAST)])
    assert problems(lambda m: [weights(m, *FIRST)]) == ["net.2.weight, net.2.bias: in no optimizer, though it asks for gradients"]
    stranger = nn.Parameter(torch.zeros(1))
    assert problems(lambda m: [[*m.parameters(), stranger]]) == ["a weight: in an optimizer, but in no part of the module"]
    module = Other(lambda m: [m.parameters()])
    twice = [torch.optim.SGD(module.parameters()), torch.optim.SGD(weights(module, "net.0.bias"))]
    assert weight_problems(module, twice) == ["net.0.bias: in several groups of optimizers"]


def test_what_is_frozen_is_asleep_and_in_no_optimizer():
    def freeze(module):
        module.net[0].requires_grad_(False)
        module.judge = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).requires_grad_(False)

    assert problems(lambda m: [m.parameters()], freeze) == [
        "net.0.weight, net.0.bias, judge.0.weight, judge.0.bias: frozen, but in an optimizer", "judge: frozen, but in training mode"]  # fmt: skip
    module = Other(lambda m: [weights(m, *LAST)])
    freeze(module)
    module.judge.eval()
    assert weight_problems(module, [module.configure_optimizers()]) == []


def test_a_run_with_a_forgotten_weight_does_not_begin():
    with pytest.raises(UserError, match="^net.2.weight, net.2.bias: in no optimizer"):
        fit([Promises(print)], 1, Other(lambda m: [weights(m, *FIRST)]))


def test_the_precision_is_told_once():
    told = []
    fit([Promises(told.append)], 3, precision="bf16-mixed")
    assert told == ["precision: net computes in bfloat16, weights float32"]


def test_an_autoencoder_that_changes_is_noticed():
    class Frozen(Tiny):
        def __init__(self):
            super().__init__()
            self.autoencoder = nn.Linear(1, 1).requires_grad_(False).eval()
            self.autoencoder.content_hash = lambda: str(self.autoencoder.weight.item())

        def on_train_batch_end(self, *_):
            self.autoencoder.weight.data += moved

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    moved = 0.0
    fit([Promises(print)], 2, Frozen())
    moved = 1e-3
    with pytest.raises(RuntimeError, match="the autoencoder was changed"):
        fit([Promises(print)], 2, Frozen())


@pytest.mark.parametrize("other, told", [
    ((7, [4, 5]), None), ((7, [1, 2]), r"same samples, those at \[1\] of the run"), ((3, [4, 5]), "same random numbers")])  # fmt: skip
def test_ranks_have_nothing_in_common(monkeypatch, other, told):
    def gather(every, mine):
        every[:] = [mine, other]

    monkeypatch.setattr(promises.torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(promises.torch.distributed, "all_gather_object", gather)
    torch.manual_seed(3)
    batch = {"position": torch.tensor([0, 1])}
    if told is None:
        ranks_differ(batch)
    else:
        with pytest.raises(RuntimeError, match=told):
            ranks_differ(batch)
