"""The contract test: what is sound passes it, and each promise is missed by a class that breaks it alone."""

import threading

import pytest
import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder, Bottled, Identity
from autoencoder.bottlenecks import FSQ, KL, LFQ, VQ, Plain
from autoencoder.contract import PROMISES, Broken, check, promises
from autoencoder.model import convolutional


class Sound(Autoencoder):
    """Factor 2, drawn; the parts that the broken ones below change are methods."""

    def __init__(self):
        super().__init__(3, 4, 2)
        self.down, self.up = nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(4, 3, 2, stride=2)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(x).chunk(2, dim=1)

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.up(z)

    @property
    def last_layer(self) -> Tensor:
        return self.up.weight


class Construct(nn.Module):
    pass


class LatentShape(Sound):
    def __init__(self):
        super().__init__()
        self.factor = 4


class PictureShape(Sound):
    def decode_raw(self, z):
        return self.up(z)[..., :-1]


class SameTwice(Sound):
    calls = 0

    def moments(self, x):
        self.calls += 1
        mean, logvar = super().moments(x)
        return mean + 0.01 * self.calls, logvar


class NoGlobalRandomness(Sound):
    def decode_raw(self, z):
        torch.rand(1)
        return super().decode_raw(z)


class EvalChangesNothing(Sound):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def moments(self, x):
        self.seen += len(x)
        return super().moments(x)


class OneByOne(Sound):
    def moments(self, x):
        return super().moments(x - x.mean(dim=0))


class Draws(Sound):
    def encode(self, x, generator=None, tile=None):
        mean, std = self.posterior(x)
        return mean if generator is None else mean + std * torch.randn_like(mean)


class UnitScale(Sound):
    def normalise(self, raw):
        return raw


class Decoded(Sound):
    def denormalise(self, z):
        return z


class Sizes(Sound):
    def check(self, x):
        pass


class TrainingPass(Sound):
    def forward(self, x, noise=None):
        return super().forward(x)


class GradientOfThePicture(Sound):
    def moments(self, x):
        return super().moments(x.detach())


class GradientOfEveryWeight(Sound):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(2, 2)


class HalfPrecision(Sound):
    def moments(self, x):
        mean, logvar = super().moments(x)
        return nn.functional.conv2d(mean, torch.eye(4, device=x.device)[..., None, None]), logvar


class Devices(Sound):
    def moments(self, x):
        return super().moments(x + torch.zeros(3, 1, 1, dtype=x.dtype))


class Codes(Sound):
    def codes(self, x):
        return self.moments(x)[0].argmax(dim=1)

    def decode_codes(self, codes):
        return self.decode_raw(nn.functional.one_hot(codes, 4).movedim(-1, 1).float())


class LastLayer(Sound):
    @property
    def last_layer(self):
        return 1 * self.up.weight


class Copies(Sound):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class SavedAndLoaded(Sound):
    def __init__(self):
        super().__init__()
        self.register_buffer("drawn", torch.rand(3, 1, 1), persistent=False)

    def moments(self, x):
        return super().moments(x * self.drawn)


class MadeWithoutContents(Sound):
    def __init__(self):
        super().__init__()
        self.size = self.up.weight.abs().max().item()


BROKEN = {
    "construct": Construct, "latent shape": LatentShape, "picture shape": PictureShape, "same twice": SameTwice,
    "no global randomness": NoGlobalRandomness, "eval changes nothing": EvalChangesNothing, "one by one": OneByOne,
    "draws": Draws, "unit scale": UnitScale, "sizes": Sizes, "training pass": TrainingPass,
    "gradient of the picture": GradientOfThePicture, "gradient of every weight": GradientOfEveryWeight,
    "half precision": HalfPrecision, "devices": Devices, "codes": Codes, "last layer": LastLayer, "copies": Copies,
    "saved and loaded": SavedAndLoaded, "made without contents": MadeWithoutContents,
}  # fmt: skip


def kind(bottleneck):
    return lambda: convolutional(bottleneck(), width=8, mult=[1, 1], blocks=1, patch=2, attention=False)


KINDS = {
    "identity": Identity, "grey": lambda: Identity(1), "KL": kind(KL), "plain": kind(Plain),
    "VQ": kind(lambda: VQ(codes=16)), "VQ by averages": kind(lambda: VQ(codes=16, learn="ema", restart=0.1)),
    "VQ of directions": kind(lambda: VQ(codes=16, cosine=True)), "FSQ": kind(lambda: FSQ([8, 6, 5])), "LFQ": kind(LFQ),
    "sound": Sound,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_keeps_every_promise(name):
    assert [result for result in check(KINDS[name]) if result.status in ("FAILED", "not tried")] == []


@pytest.mark.parametrize("promise", promises(Sound), ids=str)
def test_as_pytest_runs_it(promise):
    promise()


def test_there_is_a_broken_class_for_every_promise():
    assert list(BROKEN) == [promise.name for promise in PROMISES]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found_alone(name):
    results = {result.name: result for result in check(BROKEN[name])}
    assert [found for found, result in results.items() if result.status == "FAILED"] == [name]
    with pytest.raises(Broken) as error:
        next(one for one in promises(BROKEN[name]) if str(one) == name)()
    assert str(error.value) == results[name].told and "; " in results[name].told  # what came; how to mend it


def test_what_rests_on_a_broken_promise_is_not_tried():
    results = {result.name: result for result in check(Draws)}
    assert (results["unit scale"].status, results["unit scale"].told) == ("not tried", "rests on: draws")
    assert results["sizes"].status == "ok"


def test_a_decoder_that_forgets_the_statistics():
    results = {result.name: result for result in check(Decoded)}
    assert results["unit scale"].status == "FAILED" and "change the reconstruction" in results["unit scale"].told


def test_where_a_users_code_went_wrong_is_told():
    class Raises(Sound):
        def moments(self, x):
            raise KeyError("nowhere")

    results = {result.name: result for result in check(Raises)}
    assert "KeyError: 'nowhere'" in results["latent shape"].told and "test_contract.py:" in results["latent shape"].told


def test_trained_weights_and_a_size():
    torch.manual_seed(4)
    model, sides = Sound(), set()
    weight = model.down.weight.clone()

    def watched():
        made = Sound()
        made.down.register_forward_pre_hook(lambda module, given: sides.update(given[0].shape[2:]))
        return made

    statuses = {result.name: result.status for result in check(watched, side=24, state=model.state_dict())}
    assert statuses["sizes"] == statuses["saved and loaded"] == "ok" and {24, 26, 48} == sides
    assert torch.equal(model.down.weight, weight)


def test_losses_take_part():
    class Weighted(Sound):
        def __init__(self):
            super().__init__()
            self.logvar = nn.Parameter(torch.zeros(()))

        def forward(self, x, noise=None):
            x_hat, bottled = super().forward(x, noise)
            return x_hat, Bottled(bottled.latent, {**bottled.losses, "prior": self.logvar.square()})

    assert {result.name: result.status for result in check(Weighted)}["gradient of every weight"] == "ok"


def test_nothing_global_is_touched():
    before = torch.get_rng_state()
    check(Sound)
    assert torch.equal(before, torch.get_rng_state())
