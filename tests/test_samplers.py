import math
from functools import cache, partial
from itertools import product

import pytest
import torch
from oracles import ENDLESS, MEAN, PROCESSES, STD, Lattice, Mixture, at, gaussian, moments, slope, transported

from ldm.common.random import normal
from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.guidance import cfg
from ldm.parameterization import PARAMETERIZATIONS, Prediction, target
from ldm.process import DDPM, EDM, Process
from ldm.samplers import SAMPLERS, ddim_inversion, orders_of
from ldm.times import TIMES, karras, linear

VARIANTS = {
    **SAMPLERS, "ddim_half": partial(SAMPLERS["ddim"], eta=0.5), "ddpm_large": partial(SAMPLERS["ddpm"], variance="large"),
    "deis_log_rho": partial(SAMPLERS["deis"], basis="log_rho"), "unipc_3": partial(SAMPLERS["unipc"], order=3),
    "unipc_bh1": partial(SAMPLERS["unipc"], variant="bh1"), "lms_2": partial(SAMPLERS["lms"], order=2),
    "dpmpp_3m_sde_half": partial(SAMPLERS["dpmpp_3m_sde"], eta=0.5),
    **{f"{name}_churn": partial(SAMPLERS[name], s_churn=20.0) for name in ("euler", "heun", "dpm_2")},
}  # fmt: skip
DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp_2m", "plms", "pndm", "dpm_2", "lms", "lms_2", "deis", "deis_log_rho",
                 "dpmpp_2s", "dpmpp_3m", "unipc", "unipc_3", "unipc_bh1", "dpm_solver_2m", "dpm_solver_3m", "dpm_fast",
                 "dpmpp_fast")  # fmt: skip
OTHERS = ("dpm_adaptive", "lcm", "tcd", "runge_kutta", "reverse_sde")  # no fixed steps; not for a denoiser; see test_transport.py
AFFINE = [name for name in VARIANTS if name not in OTHERS]
HIGHER = [name for name in DETERMINISTIC if name not in ("ddim", "euler")]  # of second order or more
ORDERS = {  # the sampler, its order of convergence
    "ddim": (SAMPLERS["ddim"], 1), "euler": (SAMPLERS["euler"], 1), "heun": (SAMPLERS["heun"], 2),
    "dpm_2": (SAMPLERS["dpm_2"], 2), "dpmpp_2m": (SAMPLERS["dpmpp_2m"], 2), "dpmpp_2s": (SAMPLERS["dpmpp_2s"], 2),
    "dpmpp_3m": (SAMPLERS["dpmpp_3m"], 3),
    "dpmpp_2m_heun": (partial(SAMPLERS["dpmpp_2m_sde_heun"], eta=0.0), 2),
    **{f"lms_{order}": (partial(SAMPLERS["lms"], order=order, final_order=order), order) for order in (1, 2, 3, 4)},
    **{f"deis_{basis}": (partial(SAMPLERS["deis"], basis=basis, final_order=3), 3) for basis in ("t", "log_rho")},
    **{f"unip_{order}_{of}": (partial(SAMPLERS["unipc"], order=order, corrector=False, lower_order_final=False, of=of), order)
       for order in (2, 3) for of in ("data", "noise")},
    **{f"unipc_{order}": (partial(SAMPLERS["unipc"], order=order, lower_order_final=False), order + 1) for order in (1, 2, 3)},
    "plms": (SAMPLERS["plms"], 2), "plms_2": (partial(SAMPLERS["plms"], order=2), 2), "pndm": (SAMPLERS["pndm"], 2),
    "dpm_solver_2m": (SAMPLERS["dpm_solver_2m"], 2), "dpm_solver_3m": (SAMPLERS["dpm_solver_3m"], 3),
    **{f"{name}_{order}": (partial(SAMPLERS[name], order=order, lower_order_final=False), order)
       for name in ("dpm_fast", "dpmpp_fast") for order in (1, 2, 3)},
}  # fmt: skip


def times(name, n):
    return karras(PROCESSES[name], n)


def affine(sampler, name, n):
    """On Gaussian data a sampler is an affine map of x_T and of every step's noise: -> offset, gain, gains of the noise
    (2n,), read off runs that see one unit impulse each."""
    x = torch.zeros(2 * n + 2, 1, 1, 1, dtype=torch.float64)  # some draw twice in a step
    x[1] = 1

    def noise(key, shape):
        unit = torch.zeros(shape, dtype=torch.float64)
        unit[2 + key] = 1
        return unit

    out = sampler(gaussian(PROCESSES[name]), x, times(name, n), PROCESSES[name], noise=noise).flatten()
    return out[0].item(), (out[1] - out[0]).item(), out[2:] - out[0]


def prior(name):
    """alpha at the start, and the standard deviation of the noisy Gaussian there."""
    process = PROCESSES[name]
    alpha, sigma = (c.item() for c in process.exact(torch.tensor([process.t_max], dtype=torch.float64)))
    return alpha, math.hypot(alpha * STD, sigma)


SOME = pytest.mark.parametrize("name", ["scaled_linear", "cosine", "zero_terminal", "flow", "edm"])


@SOME
@pytest.mark.parametrize("sampler", AFFINE)
def test_samples_have_the_moments_of_a_gaussian(name, sampler):
    """Exactly, by the affine map that a sampler is on such data. Errors of first order are extrapolated to no steps at all."""
    alpha, spread = prior(name)
    stds = []
    for n in (32, 64):
        offset, gain, noises = affine(VARIANTS[sampler], name, n)
        assert offset + gain * alpha * MEAN == pytest.approx(MEAN, abs=1e-6)
        stds.append(math.sqrt((gain * spread) ** 2 + noises.square().sum().item()))
    if sampler in DETERMINISTIC:  # the map of the probability-flow ODE
        assert not noises.any()
        assert gain == pytest.approx(STD / spread, rel=0.01 if sampler in HIGHER else 0.06)
    assert (stds[1] if sampler in HIGHER else 2 * stds[1] - stds[0]) == pytest.approx(
        STD, rel=0.01 if sampler in HIGHER else 0.005 if sampler in DETERMINISTIC else 0.065)


@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
@pytest.mark.parametrize("sampler", AFFINE)
def test_samples_have_the_moments_of_a_mixture(name, sampler):
    """Mean, deviation, third moment and the share of one part, by quadrature: the quantiles of what sampling starts from, and
    noise from a lattice. Again extrapolated where they converge with the first order."""
    process, size, found = PROCESSES[name], 1000, []
    mixture = Mixture(process)
    share = ((torch.arange(size, dtype=torch.float64) + 0.5) / size).view(-1, 1, 1, 1)
    for n in (50,) if sampler in HIGHER else (50, 100):
        lattice = Lattice(size)
        found.append(moments(VARIANTS[sampler](mixture.denoise, mixture.quantiles(share, process.t_max), times(name, n), process,
                                               noise=lattice, callback=lattice.see)))  # fmt: skip
    error = (found[0] if sampler in HIGHER else 2 * found[1] - found[0]) - Mixture.moments()
    assert (error.abs() < torch.tensor([0.001, 0.005, 0.01, 0.001] if sampler in DETERMINISTIC else [0.008, 0.015, 0.03, 0.008])).all()


@cache
def smooth(name):
    """Between two times where everything is smooth: begin, end, x, and where the ODE brings it."""
    process = PROCESSES[name]
    begin, end = (process.t_min + share * (process.t_max - process.t_min) for share in (0.7, 0.15))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1) * max(1.0, begin if name == "edm" else 0.0)
    return begin, end, x, Mixture(process).transported(x, begin, end)


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("name", ["scaled_linear", "trigonometric", "flow", "edm"])
def test_order_of_convergence(name, sampler):
    """Against the exact solution for a mixture of two Gaussians. The first steps are short: multistep methods make them by
    lower orders."""
    (run, order), process, (begin, end, x, exact), errors = ORDERS[sampler], PROCESSES[name], smooth(name), {}
    for n in (42, 84):  # whole blocks of two and three
        share = torch.linspace(0, 1, n + 1, dtype=torch.float64) ** 2
        path = begin + share * (end - begin)
        if name == "edm":
            path = begin * (end / begin) ** share
        errors[n] = (run(Mixture(process).denoise, x, path, process) - exact).abs().max().item()
    low, high = (0.79, 1.0) if sampler.startswith("p") else (0.83, 0.7)  # plms is of second order with a small constant
    assert low * order < slope(errors) < order + high, errors


def test_pndm_is_of_fourth_order_over_even_steps():
    """Where its weights are those of Adams-Bashforth and its start is Runge and Kutta's."""
    process, errors = PROCESSES["flow"], {}
    mixture, x = Mixture(process), torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    for n in (20, 40):
        out = SAMPLERS["pndm"](mixture.denoise, x, torch.linspace(0.7, 0.15, n + 1, dtype=torch.float64), process, final_order=4)
        errors[n] = (out - mixture.transported(x, 0.7, 0.15)).abs().max().item()
    assert 3.5 < slope(errors) < 4.7, errors


def test_second_order_is_worth_its_calls():
    """On a straight flow: with as many calls of the network, Heun and 2M are nearer than Euler."""
    process = PROCESSES["flow"]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    exact = transported(process, x, 1.0, 0.0)
    error = {name: (SAMPLERS[name](gaussian(process), x, linear(process, n), process) - exact).abs().max()
             for name, n in (("euler", 40), ("heun", 20), ("dpmpp_2m", 40))}  # fmt: skip
    assert error["heun"] < 0.2 * error["euler"] and error["dpmpp_2m"] < 0.4 * error["euler"]


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("name", ["zero_terminal", "cosine", "flow", "trigonometric"])
def test_few_steps_from_pure_noise_stay_in_bounds(name, sampler):
    process = PROCESSES[name]
    out = VARIANTS[sampler](gaussian(process), torch.full((1, 1, 1, 1), 2.0), linear(process, 4), process)
    assert out.isfinite().all() and MEAN - 0.1 < float(out) < MEAN + 2 * STD + 0.1


class Perfect(torch.nn.Module):
    """A network that says F of the Gaussian's best denoiser."""

    def __init__(self, process, parameterization):
        super().__init__()
        self.process, self.pair, self.t = process, PARAMETERIZATIONS[parameterization], None

    def forward(self, x, time, cond):
        if hasattr(self.pair, "c_in"):  # it is shown x scaled to unit variance
            x = x / self.pair.c_in(*at(self.process, self.t, x))
        best = gaussian(self.process)(x.double(), self.t)
        p, q = self.pair(*at(self.process, self.t, x))
        return target(best.x0, best.eps, p, q).float()


@pytest.mark.parametrize(("name", "parameterization"), [(process, name) for process in ("linear", "zero_terminal", "vp", "flow", "edm")
                                                        for name in PARAMETERIZATIONS
                                                        if not (name == "noise" and process in ENDLESS)])  # fmt: skip
def test_every_parameterization_samples_the_same(name, parameterization):
    process = PROCESSES[name]
    network = Perfect(process, parameterization)
    denoiser = Denoiser(network, process, parameterization)

    def denoise(x, t):
        network.t = t
        return denoiser(x, t, Cond())

    x = process.prior_std() * torch.linspace(-2, 2, 5).view(-1, 1, 1, 1)
    for sampler in (SAMPLERS["heun"], SAMPLERS["dpmpp_2m"]):
        found = sampler(denoise, x, times(name, 20), process)
        expected = sampler(gaussian(process), x.double(), times(name, 20), process).float()
        assert torch.allclose(found, expected, atol=2e-3 if parameterization == "noise" else 2e-5)


def test_ddim_of_eta_1_is_the_posterior():
    """One step of DDPM in its own words: 2006.11239, eq. 6 and 7, from betas."""
    process, t = DDPM("linear"), 500
    beta, bar, before = process.betas[t], process.alpha_bar[t], process.alpha_bar[t - 1]
    draws = torch.Generator().manual_seed(0)
    x0, x_t, z = (torch.randn(2, 1, 4, 4, generator=draws, dtype=torch.float64) for _ in range(3))
    fixed = Prediction(x0, (x_t - bar.sqrt() * x0) / (1 - bar).sqrt())
    found = SAMPLERS["ddpm"](lambda x, t: fixed, x_t, torch.tensor([t, t - 1.0]), process, noise=lambda step, shape: z)
    mean = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t
    assert torch.allclose(found, mean + ((1 - before) / (1 - bar) * beta).sqrt() * z, atol=1e-12)


def test_euler_is_edm_algorithm_1_without_correction():
    process = EDM()
    x, denoise = torch.randn(2, 1, 2, 2, dtype=torch.float64), gaussian(process)
    found = SAMPLERS["euler"](denoise, x, torch.tensor([2.0, 0.5], dtype=torch.float64), process)
    assert torch.allclose(found, x + (0.5 - 2.0) * (x - denoise(x, torch.tensor(2.0)).x0) / 2.0)


def test_heun_is_edm_algorithm_1():
    process = EDM()
    x, denoise = torch.randn(2, 1, 2, 2, dtype=torch.float64), gaussian(process)
    first = (x - denoise(x, torch.tensor(2.0)).x0) / 2.0
    guess = x - 1.5 * first
    second = (guess - denoise(guess, torch.tensor(0.5)).x0) / 0.5
    found = SAMPLERS["heun"](denoise, x, torch.tensor([2.0, 0.5], dtype=torch.float64), process)
    assert torch.allclose(found, x - 1.5 * (first + second) / 2)


@pytest.mark.parametrize(("sampler", "calls"), [("ddpm", 7), ("ddim", 7), ("euler", 7), ("heun", 13), ("dpmpp_2m", 7),
                                                ("plms", 8), ("pndm", 16), ("dpm_2", 13), ("lms", 7), ("deis", 7),
                                                ("dpmpp_2s", 12), ("dpmpp_sde", 12), ("dpmpp_3m", 7), ("unipc", 7),
                                                ("lcm", 7)])
def test_calls_of_the_network(sampler, calls):
    process, seen = PROCESSES["flow"], []

    def denoise(x, t):
        seen.append(t)
        return gaussian(process)(x, t)

    SAMPLERS[sampler](denoise, torch.randn(3, 1, 2, 2), linear(process, 7), process)
    assert len(seen) == calls
    assert all(t.shape == (3,) and t.unique().numel() == 1 for t in seen) and all(t.min() > 0 for t in seen)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback_sees_every_step(sampler):
    process, seen = PROCESSES["flow"], []
    SAMPLERS[sampler](gaussian(process), torch.randn(1, 1, 2, 2), linear(process, 4), process,
                      callback=lambda step, t, x, guess: seen.append((step, t, x.shape, guess.x0.shape)))  # fmt: skip
    if sampler == "dpm_adaptive":  # its own steps
        assert [s[0] for s in seen] == list(range(len(seen))) and sorted((s[1] for s in seen), reverse=True) == [s[1] for s in seen]
    else:
        assert [s[0] for s in seen] == [0, 1, 2, 3] and [s[1] for s in seen] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert all(shape == (1, 1, 2, 2) for s in seen for shape in s[2:])


@pytest.mark.parametrize("sampler", VARIANTS)
def test_runs_can_be_replayed(sampler):
    process, stored = PROCESSES["scaled_linear"], {}

    def record(step, shape):
        stored[step] = torch.randn(shape)
        return stored[step]

    run = partial(VARIANTS[sampler], gaussian(process), torch.randn(2, 3, 4, 4), linear(process, 10), process)
    first = run(noise=record)
    assert torch.equal(first, run(noise=lambda step, shape: stored[step]))
    keys = 18 if sampler == "dpmpp_sde" else 10 if sampler.endswith("churn") else 9  # the last step ends at the data
    assert sorted(stored) == ([] if sampler in (*DETERMINISTIC, "dpm_adaptive", "runge_kutta") else list(range(keys)))


@pytest.mark.parametrize("sampler", VARIANTS)
def test_a_picture_does_not_depend_on_its_batch(sampler):
    process = PROCESSES["zero_terminal"]

    def pictures(positions):
        def noise(step, shape):
            return normal(shape[1:], 5, f"step {step}", positions)
        x = normal((2, 3, 3), 5, "x", positions)
        return VARIANTS[sampler](gaussian(process), x, linear(process, 8), process, noise=noise)

    together = pictures([0, 1, 2, 3])
    assert torch.allclose(together, torch.cat([pictures([0]), pictures([1, 2]), pictures([3])]), atol=1e-6)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stays_in_the_type_of_x(sampler):
    process = PROCESSES["flow"]
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(1, 1, 2, 2, dtype=dtype)
        out = SAMPLERS[sampler](lambda x, t: Prediction(x * 0.5, x * 0.5), x, linear(process, 3), process)
        assert out.dtype is dtype


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["compvis", "leading", "quadratic"])
def test_lists_of_published_samplers_can_be_walked(sampler, name):
    process = PROCESSES["scaled_linear"]
    out = SAMPLERS[sampler](gaussian(process), torch.randn(1, 1, 8, 8), TIMES[name](process, 30), process)
    assert out.isfinite().all() and abs(float(out.mean()) - MEAN) < 0.5


def test_bound_denoiser_is_a_denoise_function():
    process = PROCESSES["flow"]
    network = Perfect(process, "flow")
    network.t = torch.tensor([0.5, 0.5])
    x = torch.randn(2, 1, 2, 2)
    found = bind(Denoiser(network, process, "flow"), Cond())(x, network.t)
    assert torch.allclose(found.x0, gaussian(process)(x.double(), network.t).x0.float(), atol=1e-6)


def step_of(sampler, prediction, **options):
    """One step of DDPM from 500 to 499."""
    x_t, z = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sampler(lambda x, t: prediction, x_t, torch.tensor([500.0, 499.0]), DDPM("linear"), noise=lambda k, shape: z, **options)


def test_variances_of_ddpm():
    """Learned ones: the log variance itself, or a share of the way from the posterior's to beta (2102.09672, eq. 15)."""
    ddpm, posterior, shape = SAMPLERS["ddpm"], DDPM("linear").posterior(500.0, 499.0), (1, 2, 4, 4)
    x0 = torch.full(shape, 1.7, dtype=torch.float64)

    def run(variance, says=None):
        return step_of(ddpm, Prediction(x0, x0, None if says is None else torch.full_like(x0, says)), variance=variance)

    small, large = run("small"), run("large")
    assert torch.allclose(run("learned_range", -1.0), small) and torch.allclose(run("learned_range", 1.0), large)
    assert torch.allclose(run("learned", math.log(posterior.variance)), small)
    assert torch.allclose(large - small, (small - run("learned", -100.0)) * (posterior.beta.sqrt() / posterior.variance.sqrt() - 1))
    clipped = step_of(ddpm, Prediction(x0, x0), clip_x0=True)
    assert torch.allclose(small - clipped, torch.full_like(x0, 0.7 * posterior.x0))
    with pytest.raises(ValueError, match="does not say its variance"):
        run("learned")


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "flow", "vp", "edm"])
def test_inversion_then_sampling_returns(name):
    process = PROCESSES[name]
    x, path = torch.linspace(-0.5, 2, 6, dtype=torch.float64).view(-1, 1, 1, 1), times(name, 40)
    denoise = gaussian(process)
    noise = {refine: ddim_inversion(denoise, x, path.flip(0), process, refine=refine) for refine in (0, 60)}
    back = {refine: (SAMPLERS["ddim"](denoise, noise[refine], path, process) - x).abs().max() for refine in noise}
    assert back[60] < 1e-6 and 1e-6 < back[0] < 0.5
    assert (noise[0] - transported(process, x, process.t_data, process.t_max)).abs().max() < 0.26 * process.prior_std()


def test_inversion_may_ask_at_the_end_of_a_step():
    process, x = PROCESSES["scaled_linear"], torch.randn(2, 1, 2, 2, dtype=torch.float64)
    path = torch.tensor([100.0, 300.0]).double()
    (alpha, sigma), (alpha_s, sigma_s) = (at(process, t, x) for t in path)
    found = ddim_inversion(gaussian(process), x, path, process, asks="end")
    expected = alpha_s * (x / alpha + (sigma_s / alpha_s - sigma / alpha) * gaussian(process)(x, path[1:].expand(2)).eps)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("order", [2, 3])
@SOME
def test_adaptive_steps_keep_their_tolerance(name, order):
    process = PROCESSES[name]
    x = process.prior_std() * torch.linspace(-2, 2, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    exact, steps, errors = transported(process, x, process.t_max, process.t_data), [], []
    for tolerance in (0.05, 0.005):
        steps.append(0)

        def count(step, t, x, guess):
            steps[-1] += 1

        out = SAMPLERS["dpm_adaptive"](gaussian(process), x, times(name, 2), process, order=order, rtol=tolerance,
                                       atol=tolerance / 5, callback=count)  # fmt: skip
        errors.append((out - exact).abs().max().item())
    assert errors[1] < 0.01 < errors[0] < 0.3 and 5 < steps[0] < steps[1] < 50


@pytest.mark.parametrize("joint", [True, False])
def test_adaptive_with_noise_has_the_moments_of_the_data(joint):
    process, x = PROCESSES["flow"], torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.Generator().manual_seed(1)
    out = SAMPLERS["dpm_adaptive"](gaussian(process), x, times("flow", 2), process, eta=1.0, rtol=0.005, atol=0.002, joint=joint,
                                   noise=lambda k, shape: torch.randn(shape, generator=draws))  # fmt: skip
    assert out.mean().item() == pytest.approx(MEAN, abs=0.05) and out.std().item() == pytest.approx(STD, abs=0.04)


@pytest.mark.parametrize("name", PROCESSES)
def test_lcm_of_a_consistency_function(name):
    """Each of its steps starts from samples of the data, so every number of steps has the data's moments."""
    process = PROCESSES[name]

    def consistent(x, t):
        x0 = transported(process, x, float(t[0]), process.t_data)
        return Prediction(x0, x0)

    x = torch.zeros(6, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    path = times(name, 4)[[0, 1, 2, 4]]
    out = SAMPLERS["lcm"](consistent, x, path, process, scaling=1e6,
                          noise=lambda key, shape: torch.eye(6, dtype=torch.float64)[2 + key].view(shape)).flatten()  # fmt: skip
    alpha, spread = prior(name)
    gains = out[1:] - out[0]
    assert out[0] + gains[0] * alpha * MEAN == pytest.approx(MEAN, abs=1e-6)
    assert ((gains[0] * spread) ** 2 + gains[1:].square().sum()).sqrt() == pytest.approx(STD, rel=1e-6)


@pytest.mark.parametrize("sampler", [name for name in AFFINE if SAMPLERS.get(name)])
def test_a_time_that_is_named_twice_changes_nothing(sampler):
    process, x = PROCESSES["flow"], torch.randn(1, 1, 2, 2, dtype=torch.float64)
    once, twice = (SAMPLERS[sampler](gaussian(process), x, torch.tensor(path, dtype=torch.float64), process,
                                     noise=lambda key, shape: torch.ones(shape))
                   for path in ([1.0, 0.7, 0.4, 0.2, 0.0], [1.0, 0.7, 0.4, 0.4, 0.2, 0.0]))  # fmt: skip
    assert torch.allclose(once, twice)


@pytest.mark.parametrize("name", PROCESSES)
def test_times_are_found_by_their_log_snr(name):
    process = PROCESSES[name]
    wanted = torch.linspace(-2.0, 3.0, 11, dtype=torch.float64)
    assert torch.allclose(process.log_snr(process.when(wanted)), wanted, atol=1e-9)


# Options that bring other people's numbers, and what must be true of them.


def test_steps_from_and_to_where():
    """Pairs of times: a list as pairs is the list; where a step ends beyond the next one's beginning, x is taken as it is."""
    process, x = PROCESSES["scaled_linear"], torch.randn(2, 1, 2, 2, dtype=torch.float64)
    denoise, path = gaussian(process), linear(process, 6)
    pairs = torch.stack([path[:-1], path[1:]], 1)
    for name in AFFINE:
        if name in SAMPLERS:
            once, again = (SAMPLERS[name](denoise, x, each, process, noise=lambda key, shape: torch.ones(shape)) for each in (path, pairs))
            assert torch.equal(once, again), name
    overlapping = torch.tensor([[900.0, 500.0], [600.0, 100.0]]).double()
    found = SAMPLERS["ddim"](denoise, x, overlapping, process)
    for t, s in overlapping:
        x = SAMPLERS["ddim"](denoise, x, torch.stack([t, s]), process)
    assert torch.equal(found, x)


@pytest.mark.parametrize("name", ["scaled_linear", "vp", "edm"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_3m", "unipc", "dpm_fast"])
def test_extrapolating_eps_is_extrapolating_x0_of_the_swapped_process(name, sampler):
    """DPM-Solver is DPM-Solver++ where data and noise change places: alpha with sigma, x0 with eps, time with its reverse.
    So over one path there and back, each is the other's mirror image."""
    process, shape = PROCESSES[name], (1, 1, 2, 2)
    source = torch.Generator().manual_seed(0)
    said = [torch.randn(2, *shape, generator=source, dtype=torch.float64) for _ in range(9)]
    path = torch.linspace(0.9, 0.2, 10, dtype=torch.float64) * process.t_max

    class Swapped(Process):
        def exact(self, t):
            return process.exact(t)[::-1]

    def run(process, of, swap):
        guesses = iter(said)

        def denoise(x, t):
            x0, eps = next(guesses)
            return Prediction(eps, x0) if swap else Prediction(x0, eps)

        return SAMPLERS[sampler](denoise, torch.ones(shape, dtype=torch.float64), path, process, of=of)

    swapped = Swapped()
    swapped.t_max, swapped.t_min = process.t_max, process.t_min
    assert torch.allclose(run(process, "noise", False), run(swapped, "data", True), rtol=1e-9)


def test_orders_of_multistep_methods():
    flow, ddpm = PROCESSES["flow"], PROCESSES["scaled_linear"]
    assert orders_of(4, None, linear(flow, 10), flow) == [4, 4, 4, 4, 3, 3, 3, 2, 2, 2]
    assert orders_of(3, None, linear(flow, 4), flow) == [3, 2, 2, 2] and orders_of(1, None, linear(flow, 2), flow) == [1, 1]
    assert orders_of(4, 1, linear(flow, 6), flow) == [4, 4, 4, 3, 2, 1]
    assert orders_of(4, 4, linear(flow, 3), flow) == orders_of(4, None, linear(ddpm, 3), ddpm) == [4, 4, 4]  # as published
    assert orders_of(4, None, linear(flow, 40)[:30], flow) == [4] * 29  # short steps, which end in the noise


@pytest.mark.parametrize(("sampler", "order", "left"), [("lms", 1, 0.0), ("lms", 2, 0.5), ("lms", 3, 11 / 12), ("lms", 4, 31 / 24),
                                                        ("plms", 2, 0.5), ("plms", 4, 31 / 24)])
def test_what_a_step_to_the_data_leaves_of_an_error(sampler, order, left):
    """Data that are one point: the ODE forgets everything. An error made before the last step is multiplied by 1 - b."""
    process, calls = PROCESSES["flow"], []
    point, path = gaussian(process, std=0.0), torch.linspace(0.6, 0.0, 7, dtype=torch.float64)

    def jolted(x, t):
        calls.append(t)
        return point(x + (len(calls) == 6 + (sampler == "plms")), t)  # what the network sees in the last step is 1 too large

    found = SAMPLERS[sampler](jolted, torch.ones(1, 1, 1, 1, dtype=torch.float64), path, process, order=order, final_order=order)
    b = {1: 1, 2: 3 / 2, 3: 23 / 12, 4: 55 / 24}[order]
    assert abs(float(found) - MEAN) == pytest.approx(b, rel=1e-9)  # which adds the x that it was: b - 1
    assert b - 1 == pytest.approx(left)


def test_guided_multistep_methods_stay_near_the_solution():
    """10 steps in flow coordinates under guidance 3, where order 4 to the end diverges."""
    process = PROCESSES["flow"]
    guided = cfg(gaussian(process, 0.7, 0.01), gaussian(process, 0.0, 1.0), 3.0)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    exact = SAMPLERS["heun"](guided, x, linear(process, 2000), process)
    for name, path in product(("lms", "plms", "pndm"), (linear(process, 10), TIMES["beta"](process, 10))):
        plain, published = (SAMPLERS[name](guided, x, path, process, **options) for options in ({}, {"final_order": 4}))
        assert (plain - exact).abs().max() < 0.5 * (published - exact).abs().max()


def test_slopes_of_v():
    """Of one step, with the history that v has: diffusers' formula in its own words."""
    process, path = PROCESSES["scaled_linear"], torch.tensor([900.0, 700.0, 500.0]).double()
    x, said = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64), []

    def denoise(x, t):
        guess = gaussian(process)(x, t)
        alpha, sigma = at(process, t, x)
        said.append(alpha * guess.eps - sigma * guess.x0)
        return guess

    seen = []
    found = SAMPLERS["plms"](denoise, x, path, process, of="v", callback=lambda step, t, x, guess: seen.append(x))
    v = (3 * said[2] - said[1 - 1]) / 2  # of both steps; the call between them only tried the first
    (alpha, sigma), (alpha_s, sigma_s) = at(process, path[1], x), at(process, path[2], x)
    eps = alpha * v + sigma * seen[1]
    assert torch.allclose(found, alpha_s * (seen[1] - sigma * eps) / alpha + sigma_s * eps)


@pytest.mark.parametrize("name", ["scaled_linear", "flow", "edm"])
def test_tcd_between_ddim_and_consistency_sampling(name):
    source = torch.Generator().manual_seed(0)
    process, x = PROCESSES[name], torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=source)
    draws = torch.randn(6, 3, 1, 2, 2, dtype=torch.float64, generator=source)

    def run(sampler, **options):
        return SAMPLERS[sampler](gaussian(process), x, times(name, 6), process, noise=lambda key, shape: draws[key], **options)

    assert torch.allclose(run("tcd", gamma=0.0), run("ddim"), atol=1e-12)
    data = run("lcm", scaling=1e9)
    if name != "edm":  # where lcm knows that its last time is the data
        assert torch.allclose(run("tcd", gamma=1.0), data, atol=0.1 if name == "scaled_linear" else 1e-6)  # to t = 0, not -1
    assert not torch.allclose(run("tcd"), data, atol=0.1) and not torch.allclose(run("tcd"), run("ddim"), atol=0.1)


def test_noise_at_the_end_and_a_share_of_the_variance():
    """LDM's v_posterior is a share of the way from the posterior's variance to beta; diffusers noises the data once more."""
    process, z = DDPM("linear"), torch.ones(1, 1, 1, 1).double()
    fixed = Prediction(torch.full_like(z, 0.5), z)

    def run(path, **options):
        return float(SAMPLERS["ddpm"](lambda x, t: fixed, 0 * z, torch.tensor(path), process, noise=lambda k, shape: z, **options))

    posterior = process.posterior(500.0, 499.0)
    plain = float(0.5 * posterior.x0)
    for share in (0.0, 0.3, 1.0):
        expected = ((1 - share) * posterior.variance + share * posterior.beta).sqrt()
        assert run([500.0, 499.0], variance=share) - plain == pytest.approx(float(expected))
    assert run([1.0, -1.0]) == run([1.0, -1.0], variance="large") == 0.5
    beta = process.posterior(1.0, -1.0).beta.sqrt()
    assert run([1.0, -1.0], variance="large", noisy_end=True) - 0.5 == pytest.approx(float(beta))
    assert run([1.0, -1.0], noisy_end=True) - 0.5 == pytest.approx(1e-10)


def test_an_adaptive_step_of_nan_is_told():
    process = PROCESSES["flow"]
    with pytest.raises(ValueError, match="the network gave nan"):
        SAMPLERS["dpm_adaptive"](lambda x, t: Prediction(x * math.nan, x * math.nan), torch.ones(1, 1, 2, 2), linear(process, 2), process)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_pictures_at_all(sampler):
    process, none = PROCESSES["flow"], torch.zeros(0, 1, 2, 2)
    assert SAMPLERS[sampler](gaussian(process), none, linear(process, 3), process).shape == none.shape


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_in_half_precision(sampler, dtype):
    """The network is told the time in fp32, and what comes is near to what fp32 gives."""
    process, seen = PROCESSES["flow"], []
    x = torch.linspace(-1, 1, 8).view(2, 1, 2, 2)

    def denoise(x, t):
        seen.append(t.dtype)
        guess = gaussian(process)(x.float(), t)
        return Prediction(guess.x0.to(x.dtype), guess.eps.to(x.dtype))

    half, full = (SAMPLERS[sampler](denoise, x.to(each), linear(process, 6), process, noise=lambda key, shape: torch.ones(shape))
                  for each in (dtype, torch.float32))  # fmt: skip
    assert half.dtype is dtype and half.isfinite().all() and set(seen) == {torch.float32}
    if sampler != "dpm_adaptive":  # its steps are other ones
        assert (half.float() - full).abs().max() < (0.02 if dtype is torch.float16 else 0.15)


@pytest.mark.parametrize(("sampler", "options"), [
    ("lms", {"order": 0}), ("deis", {"order": 0}), ("plms", {"order": 0}), ("unipc", {"order": 0}), ("dpmpp_sde", {"r": 0}), ("dpmpp_sde", {"r": -0.5}),
    ("tcd", {"gamma": -1}), ("ddim", {"eta": -1}), ("dpmpp_2m_sde", {"eta": -0.5}), ("dpm_adaptive", {"eta": -1})])
@pytest.mark.parametrize("name", ["flow", "scaled_linear"])
def test_options_beyond_their_range_are_told(name, sampler, options):
    process, (option, value) = PROCESSES[name], next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^{option}: {value}; "):
        SAMPLERS[sampler](gaussian(process), torch.ones(1, 1, 2, 2), linear(process, 4), process, **options)
