"""Classifiers of noisy latents whose answer is known: two classes, constant pictures -m and m, of unit-variance pixels."""

import math

import pytest
import torch
from oracles import PROCESSES, at, gaussian
from torch import nn

from autoencoder.base import Identity
from ldm.classifier import NoisyClassifier, build_classifier, by_classifier, cross_entropy, same
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.parameterization import Prediction
from ldm.process import DDPM, RectifiedFlow
from ldm.samplers import ddim

M, STD = 0.5, 0.4
NETWORK = {"target": "ldm.networks.classifier.Classifier", "params": {
    "classes": 2, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "transformer_depth": [0], "head_channels": 16,
    "pool": "adaptive"}}  # fmt: skip
FLOW = {"target": "ldm.process.RectifiedFlow"}


class Exact(nn.Module):
    """log p(y | x_t) for the classes N(-M, STD^2) and N(M, STD^2) of every pixel. Told 1000 t, as the flow tells it."""

    classes = 2

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, time):
        alpha, sigma = at(self.process, time / 1000, x)
        spread = (alpha * STD) ** 2 + sigma**2
        return torch.cat([(-((x - alpha * m) ** 2) / (2 * spread)).flatten(1).sum(1, keepdim=True) for m in (-M, M)], dim=1)


def mixture(process):
    """E[x0 | x_t] of both classes together, equally likely."""
    parts, exact = [gaussian(process, m, STD) for m in (-M, M)], Exact(process)

    def denoise(x, t):
        share = exact(x, 1000 * t).softmax(1)
        x0 = sum(share[:, y].view(-1, 1, 1, 1) * part(x, t).x0 for y, part in enumerate(parts))
        alpha, sigma = at(process, t, x)
        return Prediction(x0, (x - alpha * x0) / sigma)
    return denoise


@pytest.fixture
def flow():
    process = RectifiedFlow()
    return process, NoisyClassifier(Exact(process), process)


def test_guidance_by_the_exact_classifier_is_the_class(flow):
    """grad log p(x) + grad log p(y | x) = grad log p(x | y)."""
    process, classifier = flow
    guide = by_classifier(classifier, 1.0, process)
    torch.manual_seed(0)
    x, t = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    for y, m in enumerate((-M, M)):
        found = guide(mixture(process), {"class": torch.full((4,), y)})(x, t)
        assert torch.allclose(found.x0, gaussian(process, m, STD)(x, t).x0, atol=1e-6)


def test_what_is_sampled_is_the_class(flow):
    process, classifier = flow
    guide, x = by_classifier(classifier, 1.0, process), torch.randn(400, 1, 1, 1, dtype=torch.float64)
    times = torch.linspace(0.999, 0, 30, dtype=torch.float64)
    out = ddim(guide(mixture(process), {"class": torch.ones(400, dtype=torch.long)}), x, times, process)
    assert abs(out.mean() - M) < 0.08 and abs(out.std() - STD) < 0.05


@pytest.mark.parametrize("process", [DDPM(), RectifiedFlow(3.0)], ids=["ddpm", "shifted"])
def test_another_process_is_refused(flow, process):
    with pytest.raises(UserError, match="the noise of RectifiedFlow"):
        by_classifier(flow[1], 1.0, process)


def test_another_autoencoder_is_refused(flow):
    flow[1].about["autoencoder_hash"] = "0123456789abcdef"
    with pytest.raises(UserError, match="another autoencoder .hash 0123456789abcdef"):
        by_classifier(flow[1], 1.0, flow[0], Identity())


@pytest.mark.parametrize(("batch", "told"), [({"klass": [1]}, "no 'class'; nearest: 'klass'"), ({"class": [2]}, "from 0 to 1, got .2"),
                                             ({"class": [0.5]}, "whole numbers")])  # fmt: skip
def test_classes_that_cannot_be(flow, batch, told):
    with pytest.raises(UserError, match=told):
        by_classifier(flow[1], 1.0, flow[0])(mixture(flow[0]), batch)


def test_processes_are_the_same_by_their_numbers():
    assert same(DDPM("linear"), DDPM("linear", start=1e-4)) and not same(DDPM("linear"), DDPM("cosine"))
    assert not same(DDPM("linear", steps=4000), DDPM("linear", steps=4000, tells="thousandth"))
    assert all(same(process, process) for process in PROCESSES.values())


def test_sizes_follow_from_the_autoencoder():
    block = {**NETWORK, "params": {**NETWORK["params"], "pool": "attention"}}
    made = build_classifier(block, FLOW, Identity(1), [8, 8])
    assert made.network.conv_in.in_channels == 1 and made.network.size == 8
    again = NoisyClassifier.from_about(made.about).assign(made.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9])
    assert torch.equal(again(x, t), made.eval()(x, t)) and not again.training
    with pytest.raises(UserError, match="network 0/.*1 that it has no place for"):
        again.assign({"other": torch.zeros(1)})


def test_a_config_of_a_checkpoint_may_not_run_what_it_likes():
    about = {"network": {"target": "os.system", "params": {}}, "process": FLOW}
    with pytest.raises(UserError, match="--trust"):
        NoisyClassifier.from_about(about)


def test_it_learns_to_tell_as_well_as_can_be():
    """At t the classes are alpha M apart from the middle, and pixels deviate by r: all N pixels together are right with
    probability Phi(alpha M sqrt(N) / r)."""
    torch.manual_seed(0)
    classifier = build_classifier(NETWORK, FLOW, Identity(1), None)
    optimizer = torch.optim.Adam(classifier.parameters(), 3e-3)

    def batch(n):
        y = torch.randint(2, (n,))
        return M * (2 * y - 1).view(-1, 1, 1, 1) + STD * torch.randn(n, 1, 2, 2), y
    for _ in range(150):
        z, y = batch(64)
        losses, _ = cross_entropy(classifier, z, y, torch.rand(64), torch.randn_like(z))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    for t in (0.3, 0.6, 0.8):
        z, y = batch(4000)
        with torch.no_grad():
            losses, right = cross_entropy(classifier, z, y, torch.full((4000,), t), torch.randn_like(z))
        reach = (1 - t) * M * 2 / math.hypot((1 - t) * STD, t)
        best = 0.5 * (1 + math.erf(reach / math.sqrt(2)))
        assert abs(right.float().mean() - best) < 0.03 and losses.mean() < 0.69


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_bundle_clips_what_the_model_says_and_not_what_the_guide_makes_of_it(bundle, sampler):
    seen = []

    def guide(denoise, batch):
        assert batch["caption"] == ["a circle", "a star"]

        def moved(x, t):
            guess = denoise(x, t)
            seen.append(guess.x0.abs().max())
            return Prediction(guess.x0 + 2, guess.eps, guess.var)
        return moved
    kept = []
    bundle.generate(["a circle", "a star"], sampler={"name": sampler, "clip_x0": True}, steps=2, guide=guide,
                    callback=lambda step, t, x, guess: kept.append(guess.x0.max()))  # fmt: skip
    assert len(seen) == 2 and max(seen) <= 1 and max(kept) > 1.5
    plain = bundle.generate(["a circle"], sampler={"name": sampler, "clip_x0": True}, steps=2)
    nothing = bundle.generate(["a circle"], sampler={"name": sampler, "clip_x0": True}, steps=2, guide=lambda denoise, batch: denoise)
    assert torch.allclose(plain, nothing, atol=1e-5)


def test_process_blocks_travel():
    made = build_classifier(NETWORK, {"target": "ldm.process.DDPM", "params": {"schedule": "linear"}}, Identity(1), None)
    assert same(build(made.about["process"]), made.process)
