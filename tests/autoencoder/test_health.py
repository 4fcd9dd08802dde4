"""Each sentence, provoked: something small is trained until it is ill. And nothing is said of what is well."""

import logging
import math

import pytest
import torch
from squares import Squares, fit, module

from autoencoder import health
from autoencoder.bottlenecks import KL, VQ, Plain
from ldm.data.loader import make_loader


def told(model, steps, caplog, **options):
    """-> what was said while training and at its end, and the validation's values."""
    validation = make_loader(Squares(20), 8, seed=0, infinite=False, shuffle=False)
    with caplog.at_level(logging.INFO):
        trainer = fit(model, steps, validation=validation, **options)
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return [record.message for record in caplog.records if record.name == "autoencoder.lit"], values


def flags(values):
    return {name.removeprefix("val/health_") for name, value in values.items() if name.startswith("val/health_") and value}


def test_a_healthy_run_hears_no_complaint(caplog):
    model = module(KL(2), critic={"norm": "group"}, adversarial={"weight": 0.1, "r1": 10.0}, lr=5e-3, loss={"pixel": "l2"})
    messages, values = told(model, 60, caplog)
    assert flags(values) == set() and len(messages) == 1
    assert messages[0].startswith("validation: ") and "2 of 2 channels active" in messages[0] and " dB" in messages[0]
    assert {f"val/health_{name}" for name in health.PROBLEMS} <= set(values)


def test_a_heavy_kl_weight_collapses_the_posterior(caplog):
    messages, values = told(module(KL(2), kl=1e4, lr=1e-2), 60, caplog)
    assert flags(values) == {"posterior_collapse"}
    assert any("posterior collapse: 0 of 2 channels active" in m and "loss.kl (now 10000)" in m and "kl_warmup" in m for m in messages)


def test_a_codebook_far_from_the_features_collapses(caplog):
    bottleneck = VQ(2, codes=64)
    bottleneck.codebook.data += 3
    messages, values = told(module(bottleneck, lr=1e-5), 101, caplog)
    assert flags(values) == {"codebook_collapse"}
    complaints = [m for m in messages if "codebook collapse" in m and "set bottleneck.restart" in m]
    assert len(complaints) == 2  # at batch 50, not again at 100, and at the validation


def test_a_codebook_that_recovers_is_not_complained_of(caplog):
    bottleneck = VQ(2, codes=64, restart=0.3, decay=0.5)
    bottleneck.codebook.data += 3
    messages, values = told(module(bottleneck, lr=1e-3), 50, caplog)
    assert flags(values) == set() and values["val/codebook_used"] > 0.1


def test_few_codes_cannot_use_a_large_codebook(caplog):
    bottleneck = VQ(2, codes=8192)
    with torch.no_grad():
        bottleneck.codebook.normal_().mul_(0.2)
    _, values = told(module(bottleneck, lr=1e-5), 1, caplog)
    attainable = 1 - math.exp(-20 * 64 / 8192)
    assert 0.1 * attainable < values["val/codebook_used"] < 0.1 and flags(values) == set()


def test_a_critic_against_an_autoencoder_that_stands_still_dominates(caplog):
    fast = {"target": "torch.optim.Adam", "params": {"lr": 5e-3}}
    model = module(KL(2), critic={"norm": "none"}, lr=1e-6, critic_optimizer=fast, adversarial={"weight": 0.5})
    messages, values = told(model, 90, caplog)
    assert flags(values) == {"critic_dominates"} and values["val/critic_right"] > 0.95
    assert any("the critic dominates" in m and "critic_optimizer" in m and "critic.r1" in m for m in messages)


def test_a_critic_that_is_not_heard_may_be_right(caplog):
    fast = {"target": "torch.optim.Adam", "params": {"lr": 5e-3}}
    model = module(KL(2), critic={"norm": "none"}, lr=1e-6, critic_optimizer=fast, adversarial={"start": 80, "lead": 80})
    _, values = told(model, 60, caplog)
    assert flags(values) == set() and "val/critic_right" not in values


@pytest.mark.parametrize(("factor", "change"), [(1000.0, "raise"), (1e-3, "lower")])
def test_latents_of_a_strange_size(caplog, factor, change):
    model = module(Plain(2), lr=1e-5)
    with torch.no_grad():
        model.autoencoder.pre.weight *= factor
        model.autoencoder.pre.bias *= factor
    messages, values = told(model, 2, caplog)
    assert flags(values) == {"latent_scale"}
    worst = max((values[f"val/latent_std_{c}"] for c in (0, 1)), key=lambda std: abs(math.log(std)))
    assert any(f"raw latents have deviation {worst:.3g}" in m and f"{change} loss.kl" in m for m in messages)


def test_a_channel_that_is_always_the_same(caplog):
    model = module(Plain(2), lr=1e-5)
    with torch.no_grad():
        model.autoencoder.pre.weight[1] = 0
    messages, values = told(model, 2, caplog)
    assert flags(values) == {"dead_channels"}
    assert any("dead channels: 1 of 2 (1)" in m for m in messages)


def test_what_is_not_measured_is_not_judged():
    assert health.problems({}, 4) == {} and health.line({}, 4) == ""


def test_each_problem_alone_and_every_latent_dead():
    assert list(health.problems({"critic_right": 0.99}, 4)) == ["critic_dominates"]
    assert "lower loss.kl, or" in health.problems({"active_units": 3.0}, 4)["posterior_collapse"]
    assert list(health.problems({"latent_std_0": 0.0, "latent_std_1": 0.0}, 2)) == ["dead_channels"]
    assert health.problems({"latent_std_0": 5.5, "latent_std_1": 0.6}, 2) == {}
