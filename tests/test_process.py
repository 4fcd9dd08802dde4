import math

import numpy as np
import pytest
import torch
from oracles import ENDLESS, PROCESSES
from safetensors.torch import save_file

from ldm.betas import SCHEDULES, spaced
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.process import (
    DDPM,
    EDM,
    VP,
    Cosine,
    RectifiedFlow,
    StepPosterior,
    Table,
    flux_shift,
    log_variance,
    respaced,
    sd3_shift,
    step_posterior,
    steps_of,
)

EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(process, n=101):
    return torch.linspace(process.t_max, process.t_min, n, dtype=torch.float64)


@EVERY
def test_noise_grows_with_time_and_data_is_clean(process):
    t = times(process)
    assert (process.log_snr(t).diff() > 0).all()  # t decreases
    alpha, sigma = process.exact(torch.tensor([process.t_data], dtype=torch.float64))
    assert alpha == 1 and sigma == 0


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "sigmoid", "zero_terminal", "vp", "trigonometric"])
def test_variance_is_preserved(name):
    process = PROCESSES[name]
    t = torch.cat([times(process, 777), torch.tensor([process.t_data], dtype=torch.float64)])
    alpha, sigma = process.exact(t)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-14)
    assert process.prior_std() == pytest.approx(1)


@pytest.mark.parametrize("name", ENDLESS)
def test_ends_in_pure_noise(name):
    process = PROCESSES[name]
    alpha, sigma = process.exact(torch.tensor([process.t_max], dtype=torch.float64))
    assert alpha.abs() < 1e-15 and sigma == 1


@EVERY
def test_coefficients_keep_the_type_of_t(process):
    t = times(process, 7)
    exact = process.exact(t)
    for dtype in (torch.float32, torch.float64):
        found = process.coefficients(t.to(dtype))
        assert all(c.dtype is dtype for c in found)
        assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(found, exact, strict=True))
    found = process.coefficients(torch.ones(3, dtype=torch.int64))
    assert all(c.dtype is torch.float32 and c.shape == (3,) for c in found)


@EVERY
def test_add_noise_has_the_moments_that_it_says(process):
    draws = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 64, 64, generator=draws) for _ in range(2))
    x0 = 0.5 + 0.2 * x0
    t = torch.tensor([process.t_max, process.t_min + 0.3 * (process.t_max - process.t_min)])
    alpha, sigma = process.coefficients(t)
    x = process.add_noise(x0, eps, t)
    assert torch.allclose(x.mean((1, 2, 3)), alpha * 0.5, atol=float(0.05 * sigma.max()))
    assert torch.allclose(x.std((1, 2, 3)), torch.hypot(0.2 * alpha, sigma), rtol=0.03)
    assert torch.equal(x[1], alpha[1] * x0[1] + sigma[1] * eps[1])


@EVERY
def test_network_is_told_a_time_between_0_and_1000(process):
    told = process.time(times(process).float())
    assert told.dtype is torch.float32
    assert told.min() >= -1e-3 and 999 <= told.max() <= 1000 + 1e-2
    assert (told.diff() < 0).all()


def betas_by_steps(schedule, steps):
    """The published formulas in a plain loop."""
    def alpha_bar(share):
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
    share = [i / (steps - 1) for i in range(steps)]
    return {
        "linear": [1e-4 + s * (0.02 - 1e-4) for s in share],
        "scaled_linear": [(math.sqrt(0.00085) + s * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for s in share],
        "sqrt": [math.sqrt(1e-4 + s * (0.02 - 1e-4)) for s in share],
        "sigmoid": [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * s)) for s in share],
        "cosine": [min(0.999, 1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps)) for i in range(steps)],
    }[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_of_the_schedules(schedule):
    process, expected, product = DDPM(schedule, steps=50), betas_by_steps(schedule, 50), 1.0
    assert process.betas.tolist() == pytest.approx(expected, rel=1e-10)
    for t, beta in enumerate(expected):
        product *= 1 - beta
        alpha, _ = process.exact(torch.tensor([float(t)], dtype=torch.float64))
        assert float(alpha) ** 2 == pytest.approx(product, rel=1e-10)


def test_first_and_last_beta_can_be_set():
    assert DDPM("linear", 10, start=0.1, end=0.2).betas[[0, -1]].tolist() == pytest.approx([0.1, 0.2])


def test_fractions_of_a_step_interpolate():
    process = DDPM(zero_terminal=True)
    t = torch.linspace(-1, 999, 20001, dtype=torch.float64)
    assert (process.log_snr(t).diff() < 0).all()
    alpha, _ = process.exact(torch.tensor([10.0, 10.5, 11.0], dtype=torch.float64))
    assert float(alpha[1]) == pytest.approx(float((alpha[0] * alpha[2]).sqrt()), rel=1e-14)


@pytest.mark.parametrize(("between", "flat"), [("log_alpha", lambda alpha, sigma: alpha.log()), ("level", lambda alpha, sigma: sigma / alpha),
                                               ("log_snr", lambda alpha, sigma: (alpha / sigma).log())])  # fmt: skip
def test_what_is_linear_between_the_steps(between, flat):
    process, plain = DDPM(between=between), DDPM()
    low, high = torch.tensor([0.0, 3.0, 500.0, 998.0]).double(), torch.tensor([1.0, 4.0, 501.0, 999.0]).double()
    for t in (low, high):
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(process.exact(t), plain.exact(t), strict=True))
    alpha, sigma = process.exact(torch.lerp(low, high, 0.3))
    assert torch.allclose(flat(alpha, sigma), torch.lerp(flat(*process.exact(low)), flat(*process.exact(high)), 0.3), rtol=1e-9)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))
    t = torch.linspace(-1, 999, 5001, dtype=torch.float64)
    assert (process.log_snr(t).diff() < 0).all()
    assert torch.allclose(process.when(process.log_snr(t[1:])), t[1:], atol=1e-6)
    again = Table(plain.alpha_bar.tolist(), between=between)
    assert torch.allclose(build(again.block).exact(t)[0], process.exact(t)[0], rtol=1e-12)


def test_sigma_over_alpha_has_no_end_in_pure_noise():
    with pytest.raises(ValueError, match="take 'log_alpha'"):
        DDPM(between="level", zero_terminal=True)
    assert DDPM(between="log_snr", zero_terminal=True).exact(torch.tensor([998.5]).double())[0].isfinite().all()


def test_what_the_network_is_told():
    """Improved DDPM's rescale_timesteps, for tables of any length and their respaced parts; k-diffusion's whole steps."""
    t = torch.tensor([0.0, 1999.0, 3999.0])
    assert DDPM("linear", 4000, start=0.1 / 4000, end=20 / 4000, tells="thousandth").time(t).tolist() == [0.0, 499.75, 999.75]
    whole = DDPM("cosine", 4000, tells="thousandth")
    some = respaced(whole, "100")
    assert torch.allclose(some.time(torch.arange(100.0)).double(), torch.tensor(spaced(4000, "100")).double() / 4)
    assert DDPM(tells="whole").time(torch.tensor([3.4, 3.6])).tolist() == [3, 4]
    assert DDPM(tells="thousandth").time(torch.tensor([5], dtype=torch.int64)).tolist() == [5]


@pytest.mark.parametrize(("options", "told"), [
    ({"steps": 0}, "steps: 0; it takes a whole number from 1"), ({"schedule": "linear", "end": 1.5}, "betas between 0 and 1, got .* to .1.5"),
    ({"steps": 1, "zero_terminal": True}, "two steps or more"),
])  # fmt: skip
def test_schedules_that_cannot_be_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        DDPM(**options)


def test_steps_of_times():
    assert steps_of(torch.tensor([3.0, 2.0, 0.0])).tolist() == [[3, 2], [2, 0]]
    assert torch.equal(steps_of(torch.tensor([[3.0, 1.0], [2.0, 0.0]])), torch.tensor([[3.0, 1.0], [2.0, 0.0]]).double())


def test_zero_terminal_keeps_the_first_step_and_the_shape():
    plain, rescaled = (DDPM(zero_terminal=z).alpha_bar.sqrt() for z in (False, True))
    assert rescaled[0] == pytest.approx(float(plain[0]), rel=1e-14) and rescaled[-1] == 0
    share = (plain - plain[-1]) / (plain[0] - plain[-1])  # algorithm 1 of 2305.08891: an affine map of sqrt(alpha_bar)
    assert torch.allclose(rescaled / rescaled[0], share, atol=1e-14)


def test_vp_solves_its_differential_equation():
    process, t, h = VP(), torch.tensor([0.37], dtype=torch.float64), 1e-5
    beta = 0.1 + t * 19.9
    slope = (process.exact(t + h)[0].log() - process.exact(t - h)[0].log()) / (2 * h)
    assert float(slope) == pytest.approx(float(-beta / 2), rel=1e-8)  # dx = -beta x / 2 dt


def test_shift_divides_the_signal_to_noise_ratio():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    gap = RectifiedFlow().log_snr(t) - RectifiedFlow(3.0).log_snr(t)
    assert torch.allclose(gap, torch.full_like(t, math.log(3.0)))


def test_a_shifted_flow_tells_the_network_the_same_noise_level():
    shifted, plain = RectifiedFlow(3.0), RectifiedFlow()
    t = torch.linspace(0, 1, 11)
    assert torch.allclose(shifted.time(t), plain.time(shifted.coefficients(t)[1]), atol=1e-3)


def test_edm_and_trigonometric_at_known_times():
    assert EDM().coefficients(torch.tensor([80.0])) == (1.0, 80.0)
    assert EDM(0.002, 80.0).prior_std() == pytest.approx(math.hypot(1, 80))
    alpha, sigma = Cosine().exact(torch.tensor([1 / 3], dtype=torch.float64))
    assert float(alpha) == pytest.approx(math.sqrt(3) / 2) and float(sigma) == pytest.approx(0.5)


def gauss(x, mean, variance):
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("seed", range(8))
def test_posterior_is_bayes_rule(seed):
    """Densities at three points: q(x_s | x_t, x0) q(x_t | x0) = q(x_t | x_s) q(x_s | x0), with coefficients drawn at random,
    of variance-exploding and straight processes too."""
    draws = torch.Generator().manual_seed(seed)
    alpha_s, sigma_s, less, more, x0, x_s, x_t = torch.randn(7, generator=draws, dtype=torch.float64).abs().tolist()
    alpha, sigma = {
        0: (alpha_s, sigma_s + more), 1: (0.0, 1.0), 2: (1e-3 * alpha_s, sigma_s + more),
    }.get(seed, (alpha_s * math.exp(-less), sigma_s * math.exp(-less) + more))  # fmt: skip
    step = step_posterior(alpha, sigma, alpha_s, sigma_s)
    left = gauss(x_s, step.x0 * x0 + step.xt * x_t, step.variance) * gauss(x_t, alpha * x0, sigma**2)
    right = gauss(x_t, alpha / alpha_s * x_s, step.beta) * gauss(x_s, alpha_s * x0, sigma_s**2)
    assert left == pytest.approx(right, rel=1e-9)


def test_posterior_of_ddpm():
    """Equations 6 and 7 of 2006.11239 with its alpha_t = 1 - beta_t."""
    process = DDPM("linear")
    t = torch.arange(1, 1000, dtype=torch.float64)
    step = process.posterior(t, t - 1)
    beta, bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[1:], process.alpha_bar[1:]
    before = process.alpha_bar[:-1]
    assert torch.allclose(step.beta, beta, rtol=1e-10)
    assert torch.allclose(step.x0, before.sqrt() * beta / (1 - bar), rtol=1e-10)
    assert torch.allclose(step.xt, (1 - beta).sqrt() * (1 - before) / (1 - bar), rtol=1e-10)
    assert torch.allclose(step.variance, (1 - before) / (1 - bar) * beta, rtol=1e-10)


@EVERY
def test_posterior_of_a_step_to_the_data_is_the_data(process):
    step = process.posterior(process.t_max, process.t_data)
    assert (float(step.x0), float(step.xt), float(step.variance)) == pytest.approx((1, 0, 0), abs=1e-12)


@EVERY
def test_posterior_keeps_the_marginals(process):
    """Mean and variance of x_s for given data, x_t integrated out."""
    t, s = process.t_min + 0.8 * (process.t_max - process.t_min), process.t_min + 0.3 * (process.t_max - process.t_min)
    (alpha, sigma), (alpha_s, sigma_s) = (process.exact(torch.tensor(time, dtype=torch.float64)) for time in (t, s))
    step = process.posterior(t, s)
    assert float(step.x0 + step.xt * alpha) == pytest.approx(float(alpha_s), rel=1e-9)
    assert float(step.xt**2 * sigma**2 + step.variance) == pytest.approx(float(sigma_s**2), rel=1e-9)


def test_log_variances():
    process = DDPM("linear")
    t = torch.tensor([0.0, 1.0, 500.0, 999.0], dtype=torch.float64)
    step, floor = process.posterior(t, t - 1), process.posterior(1, 0).variance
    small, large = (log_variance(step, kind=kind, floor=floor) for kind in ("small", "large"))
    assert small.dtype is torch.float64 and small[0] == small[1] == large[0]  # Improved DDPM clips both
    assert torch.equal(small[1:], step.variance[1:].log()) and torch.equal(large[1:], step.beta[1:].log())
    assert log_variance(step)[0] == pytest.approx(math.log(1e-20))
    # 2102.09672, eq. 15: sigma^2 = exp(v log beta + (1 - v) log variance), v from the network's [-1, 1]
    var = torch.tensor([-1.0, 1.0, 0.2, -0.4])
    found = log_variance(step, var, "learned_range", floor)
    share = (var.double() + 1) / 2
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), share * step.beta.log() + (1 - share) * small, rtol=1e-6)
    assert torch.equal(log_variance(step, var, "learned"), var)


def test_log_variance_of_numbers():
    var = torch.zeros(2, 3, 4, 4)
    found = log_variance(StepPosterior(0.5, 0.5, 0.01, 0.04), var, "learned_range")
    assert torch.allclose(found.exp(), torch.full_like(var, 0.02))
    assert log_variance(StepPosterior(1.0, 0.0, 0.0, 0.04), var + 1, "learned_range").isfinite().all()


def test_tables_from_files(tmp_path):
    process = DDPM("cosine", 30)
    np.save(tmp_path / "bar.npy", process.alpha_bar.numpy())
    torch.save(process.betas, tmp_path / "betas.pt")
    save_file({"any name": process.alpha_bar}, tmp_path / "bar.safetensors")
    t = torch.linspace(-1, 29, 91, dtype=torch.float64)
    for given in ({"alpha_bar": tmp_path / "bar.npy"}, {"betas": str(tmp_path / "betas.pt")},
                  {"alpha_bar": tmp_path / "bar.safetensors"}):  # fmt: skip
        found = Table(**given)
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found.exact(t), process.exact(t), strict=True))
        again = build(found.block)  # what a checkpoint holds needs no file
        assert isinstance(again, Table) and torch.equal(again.alpha_bar, found.alpha_bar)
    assert Table(process.alpha_bar.tolist(), zero_terminal=True).alpha_bar[-1] == 0


@pytest.mark.parametrize(("given", "told"), [
    ({"alpha_bar": [0.9, 0.5, 0.6]}, r"alpha_bar\[2\] is 0.6 after 0.5: .* has to decrease"),
    ({"alpha_bar": [1.0, 0.5]}, r"alpha_bar\[0\] is 1 after 1"),
    ({"alpha_bar": [0.5, -0.1]}, r"alpha_bar\[1\] is -0.1"),
    ({"betas": [0.1, 0.0]}, r"alpha_bar\[1\] is 0.9 after 0.9"),
    ({"betas": [0.1, 1.5]}, r"alpha_bar\[1\] is -0.45"),
    ({"betas": [0.1, float("nan")]}, "finite"),
    ({"alpha_bar": []}, "expected a list of T finite numbers"),
    ({"alpha_bar": "no/such.npy"}, "there is no file no/such.npy"),
    ({}, "one of both"),
    ({"alpha_bar": [0.5], "betas": [0.5]}, "one of both"),
])  # fmt: skip
def test_what_is_no_table_is_told(given, told):
    with pytest.raises(ValueError, match=told):
        Table(**given)


def test_files_that_hold_no_table_are_told(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    torch.save({"alpha_bar": torch.ones(2)}, tmp_path / "dict.pt")
    (tmp_path / "table.csv").write_text("0.5")
    for name, told in (("two.safetensors", "one tensor"), ("dict.pt", "one tensor"), ("table.csv", "ends in .npy")):
        with pytest.raises(ValueError, match=told):
            Table(tmp_path / name)


def test_the_network_may_be_told_a_scale_of_1000_steps():
    told = DDPM("linear", steps=4000, tells="thousandth").time(torch.tensor([0, 1, 617, 3999]))
    assert told.tolist() == [0.0, 0.25, 154.25, 999.75]
    assert DDPM("linear", steps=4000).time(torch.tensor([3999.0])).item() == 3999


def test_respacing_keeps_the_noise_levels():
    whole = DDPM("linear")
    some = respaced(whole, "25")
    kept = spaced(1000, "25")
    assert len(kept) == 25 and kept[0] == 0 and kept[-1] == 999
    index, steps = torch.arange(25, dtype=torch.float64), torch.tensor(kept, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(some.exact(index), whole.exact(steps), strict=True))
    assert torch.equal(some.time(index), steps) and some.time(torch.tensor([3])).dtype is torch.float32
    assert some.t_max == 24 and some.time(torch.tensor([0.5]).double()) == pytest.approx((kept[0] + kept[1]) / 2)
    step, known = some.posterior(index[1:], index[:-1]), whole.posterior(steps[1:], steps[:-1])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(step, known, strict=True))
    twice = respaced(respaced(whole, [1, 5, 9]), [0, 2])
    assert twice.time(torch.tensor([0.0, 1.0])).tolist() == [1, 9]
    table = respaced(Table(whole.alpha_bar.tolist()), "5")
    assert torch.equal(build(table.block).alpha_bar, table.alpha_bar)


@pytest.mark.parametrize(("kept", "told"), [("ddim999", "no whole stride takes 999 of 1000"), ("1001", "1001 steps of a section"),
                                            ("all", "it reads like"), ([5, 1000], "between 0 and 999"), ([], "got")])  # fmt: skip
def test_what_cannot_be_kept_is_told(kept, told):
    with pytest.raises(ValueError, match=told):
        respaced(DDPM(), kept)


def test_shift_that_follows_from_the_number_of_tokens():
    assert sd3_shift(4096, base=1024) == 2  # twice the side, eq. 23
    assert RectifiedFlow("sd3", 4096).shift == 2
    assert flux_shift(256) == pytest.approx(math.exp(0.5)) and flux_shift(4096) == pytest.approx(math.exp(1.15))
    mu = 0.5 + 0.65 * (1024 - 256) / 3840
    t = torch.linspace(0.01, 1, 12, dtype=torch.float64)
    sigma = RectifiedFlow("flux", 1024).exact(t)[1]
    assert torch.allclose(sigma, math.exp(mu) / (math.exp(mu) + 1 / t - 1), rtol=1e-12)
    for given in ({"shift": "flux"}, {"shift": 3.0, "tokens": 256}):
        with pytest.raises(ValueError, match="need tokens, a number takes none"):
            RectifiedFlow(**given)


@pytest.mark.parametrize(("kind", "options"), [(RectifiedFlow, {"shift": 0.0}), (RectifiedFlow, {"shift": -1.0}), (EDM, {"sigma_min": 80.0}),
                                               (EDM, {"sigma_min": -1.0}), (VP, {"beta_max": 0.05}), (VP, {"beta_min": -1.0})])
def test_constants_that_cannot_be_are_told(kind, options):
    with pytest.raises(UserError, match=f"{kind.__name__}: .*{next(iter(options))}"):
        kind(**options)
