"""Densities over t: against the densities that the papers write down, and against guided-diffusion's numbers."""

import math
from pathlib import Path

import pytest
import torch
from oracles import PROCESSES
from safetensors.torch import load_file

from ldm.densities import LogitNormal, LogNormal, LossSecondMoment, Mode, Uniform, stratified, time_of
from ldm.process import DDPM, RectifiedFlow

U = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
FEW = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
REFERENCE = load_file(Path(__file__).parent / "data" / "parity" / "iddpm_core" / "io.safetensors")


def shares(t: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    return torch.histogram(t.double(), edges.double()).hist / len(t)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.8, 1.29, 1.75])
def test_mode_has_the_density_of_its_inverse(scale):
    """f(u) falls from 1 to 0, so the density at t = f(u) is 1 / |f'(u)|, f' = -1 - s (1 - pi/2 sin(pi u))."""
    t = Mode(scale)(U, PROCESSES["flow"])
    assert t.min() >= 0 and t.max() <= 1 and (t.diff() <= 1e-12).all()
    assert t.mean() == pytest.approx(0.5, abs=1e-4)  # symmetric about the middle
    found = -(t[1:] - t[:-1]) * len(U)
    assert torch.allclose(found, 1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * (U[1:] + U[:-1]) / 2)), atol=1e-4)


@pytest.mark.parametrize("scale", [-1.1, 1.76])
def test_mode_has_bounds(scale):
    with pytest.raises(ValueError, match="takes -1 to 1.7519"):
        Mode(scale)


@pytest.mark.parametrize("name", ["edm", "vp", "flow", "trigonometric", "linear"])
def test_log_normal_has_a_normal_logarithm_of_noise_to_signal(name):
    process = PROCESSES[name]
    t = LogNormal(-1.0, 0.5)(FEW, process)
    assert t.min() >= process.t_min and t.max() <= process.t_max
    level = -process.log_snr(t)
    rounded = 0.02 if name == "linear" else 1e-3
    assert level.mean() == pytest.approx(-1.0, abs=rounded) and level.std() == pytest.approx(0.5, abs=rounded + 2e-3)
    assert name != "linear" or torch.equal(t, t.round())


def test_edm_draws_its_noise_levels():
    t = LogNormal()(FEW, PROCESSES["edm"])
    expected = torch.exp(-1.2 + 1.2 * torch.special.ndtri(FEW)).clamp(0.01, 20.0)
    assert torch.allclose(t, expected, rtol=1e-3)  # the normal numbers are fp32


@pytest.mark.parametrize("name", PROCESSES)
def test_time_of_is_the_inverse_of_log_snr(name):
    process = PROCESSES[name]
    t = process.t_min + torch.linspace(0.01, 0.99, 23, dtype=torch.float64) * (process.t_max - process.t_min)
    assert torch.allclose(time_of(process, process.log_snr(t)), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", [0, 64, 4096, 64 * 12345])
@pytest.mark.parametrize("batch", [2, 16, 64])
def test_stratified_draws_put_one_into_each_stratum(start, batch):
    u = stratified(7, "t", range(start, start + batch))
    assert torch.equal((u * batch).long().sort().values, torch.arange(batch))
    halves = torch.cat([stratified(7, "t", range(start + half, start + batch, 2)) for half in (0, 1)])
    assert torch.equal(halves.sort().values, u.sort().values)  # whoever draws them


def test_stratified_draws_are_even_for_any_batch_and_differ_between_seeds():
    for batch in (3, 7, 100):
        for start in range(0, 40 * batch, batch):
            gaps = torch.cat([torch.zeros(1), stratified(1, "t", range(start, start + batch)).sort().values, torch.ones(1)]).diff()
            assert gaps.max() <= 2.01 * 2 / batch
    one, other = (stratified(seed, "t", range(8)) for seed in (1, 2))
    assert not torch.equal(one, other) and one.min() >= 0 and one.max() < 1
    assert stratified(1, "t", range(4096)).mean() == pytest.approx(0.5, abs=1e-3)
    assert stratified(1, "t", [2**30]).isfinite().all()


def test_every_density_takes_stratified_draws():
    u = stratified(0, "t", range(1024))
    for density in (Uniform(), LogitNormal(), Mode(), LogNormal()):
        t = density(u, PROCESSES["flow"])
        assert (t >= 0).all() and (t <= 1).all()


def observed(updates: int = 60) -> LossSecondMoment:
    """After guided-diffusion's updates of 8 losses, T = 10."""
    density = LossSecondMoment()
    density.allocate(DDPM("linear", 10))
    density.double()
    for ts, losses in zip(REFERENCE["in.resample.ts"][:updates], REFERENCE["in.resample.losses"], strict=False):
        density.observe(ts, losses)
    return density


def test_second_moment_is_that_of_guided_diffusion():
    density = observed()
    assert torch.equal(density.counts, REFERENCE["out.resample.counts"])
    assert torch.allclose(density.losses, REFERENCE["out.resample.history"], rtol=1e-12)
    t = density(REFERENCE["in.resample.u"], DDPM("linear", 10))
    assert torch.equal(t.long(), REFERENCE["out.resample.indices"])
    assert torch.equal(observed(0).shares() * 10, REFERENCE["out.resample.weights_before"])


def test_second_moment_is_uniform_until_every_step_has_its_history():
    density, process = LossSecondMoment(history=2), DDPM("linear", 4)
    density.allocate(process)
    for t in (0, 1, 2, 3, 0, 1, 2):
        density.observe(torch.tensor([t]), torch.tensor([1.0 + t]))
        assert torch.equal(density.shares(), torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.equal(density.importance(torch.tensor([0.0, 3.0])), torch.ones(2))
    density.observe(torch.tensor([3]), torch.tensor([4.0]))
    expected = 0.999 * torch.tensor([1.0, 2, 3, 4]).double() / 10 + 0.001 / 4
    assert torch.allclose(density.shares(), expected)
    density.observe(torch.tensor([3]), torch.tensor([0.0]))  # the oldest is forgotten
    assert density.losses[3].tolist() == [4.0, 0.0]


def test_importance_keeps_the_expectation():
    density, process = observed(), DDPM("linear", 10)
    t = density(U, process)
    values = torch.arange(10.0) ** 2
    assert (density.importance(t) * values[t.long()]).mean() == pytest.approx(values.mean().item(), rel=1e-3)
    assert torch.allclose(shares(t, torch.arange(11) - 0.5), density.shares(), atol=1e-4)


def test_second_moment_needs_steps():
    with pytest.raises(ValueError, match="RectifiedFlow has no steps; take a discrete process"):
        LossSecondMoment().allocate(RectifiedFlow())


def test_second_moment_has_a_history_and_survives_losses_of_zero():
    with pytest.raises(ValueError, match="history 0"):
        LossSecondMoment(history=0)
    density = LossSecondMoment(history=1)
    density.allocate(DDPM("linear", 2))
    density.observe(torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert density.shares().tolist() == [0.5, 0.5]
