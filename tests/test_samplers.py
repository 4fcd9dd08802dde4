import math
from functools import partial

import pytest
import torch
from oracles import ENDLESS, MEAN, PROCESSES, STD, Mixture, at, gaussian, slope, transported

from ldm.common.random import normal
from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.parameterization import PARAMETERIZATIONS, Prediction, target
from ldm.process import DDPM, EDM
from ldm.samplers import SAMPLERS, ddim_inversion
from ldm.times import TIMES, linear

VARIANTS = {
    **SAMPLERS, "ddim_half": partial(SAMPLERS["ddim"], eta=0.5), "ddpm_large": partial(SAMPLERS["ddpm"], variance="large"),
    "deis_log_rho": partial(SAMPLERS["deis"], basis="log_rho"), "unipc_3": partial(SAMPLERS["unipc"], order=3),
    "unipc_bh1": partial(SAMPLERS["unipc"], variant="bh1"), "lms_2": partial(SAMPLERS["lms"], order=2),
    "dpmpp_3m_sde_half": partial(SAMPLERS["dpmpp_3m_sde"], eta=0.5),
    **{f"{name}_churn": partial(SAMPLERS[name], s_churn=20.0) for name in ("euler", "heun", "dpm_2")},
}  # fmt: skip
DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp_2m", "plms", "pndm", "dpm_2", "lms", "lms_2", "deis", "deis_log_rho",
                 "dpmpp_2s", "dpmpp_3m", "unipc", "unipc_3", "unipc_bh1")  # fmt: skip
OTHERS = ("dpm_adaptive", "lcm", "runge_kutta", "reverse_sde")  # no fixed steps; not for a denoiser; see test_transport.py
AFFINE = [name for name in VARIANTS if name not in OTHERS]
FIRST_ORDER = ("ddim", "euler")
ORDERS = {  # the sampler, its order of convergence
    "ddim": (SAMPLERS["ddim"], 1), "euler": (SAMPLERS["euler"], 1), "heun": (SAMPLERS["heun"], 2),
    "dpm_2": (SAMPLERS["dpm_2"], 2), "dpmpp_2m": (SAMPLERS["dpmpp_2m"], 2), "dpmpp_2s": (SAMPLERS["dpmpp_2s"], 2),
    "dpmpp_3m": (SAMPLERS["dpmpp_3m"], 3),
    "dpmpp_2m_heun": (partial(SAMPLERS["dpmpp_2m_sde_heun"], eta=0.0), 2),
    **{f"lms_{order}": (partial(SAMPLERS["lms"], order=order), order) for order in (1, 2, 3, 4)},
    **{f"deis_{basis}": (partial(SAMPLERS["deis"], basis=basis), 3) for basis in ("t", "log_rho")},
    "unip_2": (partial(SAMPLERS["unipc"], corrector=False, lower_order_final=False), 2),
    "unip_3": (partial(SAMPLERS["unipc"], order=3, corrector=False, lower_order_final=False), 3),
}  # fmt: skip


def times(name, n):
    """Even in t; for EDM even in log sigma, as its noise spans many orders of magnitude."""
    process = PROCESSES[name]
    if name != "edm":
        return linear(process, n)
    ladder = torch.logspace(math.log10(process.t_max), math.log10(process.t_min), n, dtype=torch.float64)
    return torch.cat([ladder, torch.zeros(1, dtype=torch.float64)])


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


@pytest.mark.parametrize("sampler", AFFINE)
@pytest.mark.parametrize(("name", "n"), [*((name, 80) for name in PROCESSES), ("flow", 320), ("edm", 320)])
def test_samples_have_the_moments_of_the_data(name, sampler, n):
    alpha, spread = prior(name)
    offset, gain, noises = affine(VARIANTS[sampler], name, n)
    assert offset + gain * alpha * MEAN == pytest.approx(MEAN, abs=1e-6)
    std = math.sqrt((gain * spread) ** 2 + noises.square().sum().item())
    first_order, second_order = (0.16, 0.05) if n == 80 else (0.04, 0.012)
    assert std == pytest.approx(STD, rel=second_order if sampler in DETERMINISTIC and sampler not in FIRST_ORDER else first_order)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("name", PROCESSES)
def test_deterministic_samplers_are_the_map_of_the_ode(name, sampler):
    alpha, spread = prior(name)
    offset, gain, noises = affine(VARIANTS[sampler], name, 100)
    close = 0.06 if sampler in FIRST_ORDER else 0.03
    assert not noises.any()
    assert gain == pytest.approx(STD / spread, rel=close)
    assert offset == pytest.approx(MEAN - alpha * MEAN * STD / spread, abs=close * alpha * MEAN + 1e-6)


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("name", ["scaled_linear", "vp", "trigonometric", "flow", "flow_shift", "edm"])
def test_order_of_convergence(name, sampler):
    """Between two times where everything is smooth, against the exact solution for a mixture of two Gaussians. The first
    steps are short: multistep methods make them by lower orders."""
    (run, order), process = ORDERS[sampler], PROCESSES[name]
    begin, end = (process.t_min + share * (process.t_max - process.t_min) for share in (0.7, 0.15))
    mixture = Mixture(process)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1) * max(1.0, begin if name == "edm" else 0.0)
    exact, errors = mixture.transported(x, begin, end), {}
    for n in (40, 80):
        share = torch.linspace(0, 1, n + 1, dtype=torch.float64) ** 2
        path = begin + share * (end - begin)
        if name == "edm":
            path = begin * (end / begin) ** share
        errors[n] = (run(mixture.denoise, x, path, process) - exact).abs().max().item()
    assert 0.83 * order < slope(errors) < order + 0.7, errors


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


@pytest.mark.parametrize(("name", "parameterization"), [(process, name) for process in PROCESSES for name in PARAMETERIZATIONS
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
    assert (noise[0] - transported(process, x, process.t_data, process.t_max)).abs().max() < 0.2 * process.prior_std()


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", PROCESSES)
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


def test_adaptive_with_noise_has_the_moments_of_the_data():
    process, x = PROCESSES["flow"], torch.randn(600, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.Generator().manual_seed(1)
    out = SAMPLERS["dpm_adaptive"](gaussian(process), x, times("flow", 2), process, eta=1.0, rtol=0.02, joint=True,
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
