"""Posterior sampling where the posterior is known: normal data, with independent pixels or two correlated ones."""

import math

import pytest
import torch
from oracles import MEAN, PROCESSES, STD, at, gaussian, transported

from ldm import edit
from ldm.guidance import once
from ldm.parameterization import Prediction
from ldm.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, euler, heun
from ldm.times import compvis, linear

SOME = pytest.mark.parametrize("name", ["scaled_linear", "vp", "flow", "edm"])
RHO = 0.8  # correlation of two pixels of mean MEAN and deviation STD


def silent(step, shape):
    return torch.zeros(shape)


def noise_of(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda step, shape: torch.randn(shape, generator=g, dtype=torch.float64)


def correlated(process):
    """x0 | x_t of two pixels (B,1,1,2) with covariance C: mean + alpha C (alpha^2 C + sigma^2)^-1 (x_t - alpha mean)."""
    c = STD**2 * torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)

    def denoise(x, t):
        alpha, sigma = at(process, t, x)
        both = torch.linalg.solve(alpha**2 * c + sigma**2 * torch.eye(2).double(), c)  # (B,1,2,2), symmetric
        x0 = MEAN + alpha * ((x - alpha * MEAN) @ both)
        return Prediction(x0, (x - alpha * x0) / sigma)
    return denoise


def latent(process, *shape, seed=0):
    return process.prior_std() * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def towards_data(process, steps, high=10.0, low=0.03):
    """Times of the EDM process, sigma in equal ratios, then the data."""
    return torch.cat([torch.logspace(math.log10(high), math.log10(low), steps), torch.zeros(1)]).double()


@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "zero_terminal", "vp", "trigonometric", "flow", "edm"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_are_exact_at_the_end_and_independent_ones_untouched(name, sampler):
    process, run = PROCESSES[name], SAMPLERS[sampler]
    times, x = linear(process, 6), latent(process, 2, 1, 2, 2)
    known, mask = 1.5 * latent(PROCESSES["flow"], 2, 1, 2, 2, seed=1), torch.tensor([1.0, 0.0]).double()
    denoise = gaussian(process)
    found, plain = (run(each, x, times, process, noise=noise_of(1))
                    for each in (edit.replace(denoise, known, mask, process), denoise))
    if sampler not in ("runge_kutta", "reverse_sde"):  # they integrate dx/dt, which ends near the data that it is told
        assert torch.allclose(found[..., 0], known[..., 0], atol=1e-6)
    if sampler != "dpm_adaptive":  # it chooses its steps by all pixels
        assert torch.allclose(found[..., 1], plain[..., 1], atol=1e-6)


@SOME
def test_the_network_sees_the_known_data_noised_to_t(name):
    """ODE samplers: alpha known + sigma eps with the one eps that x began with; the ancestral one: as many as samples."""
    process = PROCESSES[name]
    times, known = linear(process, 10), torch.full((3000, 1, 1, 2), 0.5).double()
    x, mask = latent(process, 3000, 1, 1, 2), torch.tensor([1.0, 0.0])
    alpha, sigma = process.exact(times)
    eps = (x - alpha[0] * known) / sigma[0]
    for sampler in (ddim, heun, dpmpp_2m):
        seen = []
        sampler(edit.replace(gaussian(process), known, mask, process), x, times, process,
                callback=lambda step, t, x, guess, seen=seen: seen.append(x[..., 0]))
        assert all(torch.allclose(found, (a * known + s * eps)[..., 0], atol=1e-5)
                   for found, a, s in zip(seen, alpha, sigma, strict=False))
    seen = []
    ddpm(edit.replace(gaussian(process), known, mask, process), x, times, process, noise=noise_of(2),
         callback=lambda step, t, x, guess: seen.append(x[..., 0]))
    for found, a, s in zip(seen, alpha, sigma, strict=False):
        assert abs(found.mean() - 0.5 * a) < 0.06 * s and abs(found.std() / s - 1) < 0.05


def test_fresh_noise_and_inexact_ends_are_those_of_compvis():
    """Their loop: x = mask q(x_t | known) + (1 - mask) x before every step, and nothing after the last."""
    process = PROCESSES["scaled_linear"]
    times, x, known = compvis(process, 10), latent(process, 3, 1, 1, 2), torch.randn(3, 1, 1, 2).double()
    mask, fresh = torch.tensor([1.0, 0.0]).double(), torch.randn(10, 3, 1, 1, 2).double()
    denoise, expected = correlated(process), x
    for k in range(10):
        alpha, sigma = at(process, times[k].float(), x)
        alpha_s, sigma_s = at(process, times[k + 1], x)
        expected = mask * (alpha * known + sigma * fresh[k]) + (1 - mask) * expected
        guess = denoise(expected, times[k].float())
        expected = alpha_s * guess.x0 + sigma_s * guess.eps
    wrap = {"noise": lambda call, shape: fresh[call]}
    found = ddim(edit.replace(denoise, known, mask, process, **wrap, exact=False), x, times, process)
    assert torch.allclose(found, expected, atol=1e-9)
    exact = ddim(edit.replace(denoise, known, mask, process, **wrap), x, times, process)
    assert torch.allclose(exact[..., 1], expected[..., 1], atol=1e-9)  # what is drawn is the same
    assert not torch.allclose(exact[..., 0], expected[..., 0], atol=1e-2)


def painted(resample, sampler=ddpm, steps=20, jump=1):
    """The mean that is drawn beside a known pixel, in units of how far that one is from the mean: RHO where exact.

    Everything is linear in x and the noise, so a run without noise gives the mean.
    """
    process, known = PROCESSES["edm"], torch.full((1, 1, 1, 2), MEAN + STD).double()
    run = edit.repaint(sampler, known, torch.tensor([1.0, 0.0]), jump=jump, resample=resample)
    x = torch.zeros(1, 1, 1, 2).double()
    found = run(correlated(process), x, towards_data(process, steps, low=0.01), process, noise=silent)
    return (float(found[..., 1]) - MEAN) / STD


def test_repaint_comes_to_the_posterior_mean_as_resampling_grows():
    errors = [abs(painted(n) - RHO) for n in (1, 2, 5, 20, 80)]
    assert errors[0] > 0.3 and errors == sorted(errors, reverse=True) and errors[-1] < 0.01
    for sampler in (ddpm, dpmpp_2m):
        once_, often = (abs(painted(n, sampler, 40, jump=5) - RHO) for n in (1, 20))
        assert often < 0.06 and once_ > 0.3


def test_repaint_once_is_replacement():
    process = PROCESSES["vp"]
    x, known, mask = latent(process, 2, 1, 1, 2), torch.randn(2, 1, 1, 2).double(), torch.tensor([1.0, 0.0])
    times = linear(process, 12)
    for sampler in (ddpm, dpmpp_2m):
        found = edit.repaint(sampler, known, mask, resample=1)(correlated(process), x, times, process, noise=noise_of(0))
        plain = sampler(edit.replace(correlated(process), known, mask, process), x, times, process, noise=noise_of(0))
        assert torch.equal(found, plain)


def test_repaint_draws_the_posterior():
    """Mean, deviation, and the known pixel, by many samples."""
    process, known = PROCESSES["edm"], MEAN - STD
    run = edit.repaint(ddpm, torch.full((2000, 1, 1, 2), known).double(), torch.tensor([1.0, 0.0]), jump=1, resample=15)
    found = run(correlated(process), latent(process, 2000, 1, 1, 2), towards_data(process, 60), process, noise=noise_of(3))
    assert torch.allclose(found[..., 0], torch.tensor(known).double(), atol=1e-6)
    assert abs(found[..., 1].mean() - (MEAN - RHO * STD)) < 0.03
    assert abs(found[..., 1].std() / (STD * (1 - RHO**2) ** 0.5) - 1) < 0.08


def test_repaint_walks_the_authors_list():
    """Of 6 steps, jumps of 2: states 5 4 3 2, back to 4, 3 2 1 0, back to 2, 1 0, and the data, each a step down."""
    process, visited = PROCESSES["vp"], []
    times = linear(process, 6)

    def count(step, t, x, guess):
        assert step == len(visited)
        visited.append(int((times - t).abs().argmin()))
    run = edit.repaint(ddim, torch.zeros(1, 1, 1, 2), torch.ones(2), jump=2, resample=2)
    run(correlated(process), torch.zeros(1, 1, 1, 2).double(), times, process, callback=count)
    assert visited == [0, 1, 2, 1, 2, 3, 4, 3, 4, 5]
    with pytest.raises(ValueError, match="jump 0"):
        edit.repaint(ddim, torch.zeros(1), torch.ones(1), jump=0)


@SOME
def test_a_measurement_gives_the_posterior_of_normal_data(name):
    """y = x0 + s noise: precisions add; the tilted denoiser is that of the posterior, at every time."""
    process, y, s = PROCESSES[name], 1.5, 0.3
    precision = STD**-2 + s**-2
    exact = gaussian(process, (MEAN / STD**2 + y / s**2) / precision, precision**-0.5)
    log_r = edit.measured(torch.full((6, 1, 2, 2), y).double(), lambda x0: x0, s)
    denoise = edit.product(gaussian(process), log_r, process, data_std=STD)
    x = latent(process, 6, 1, 2, 2)
    for share in (0.9, 0.5, 0.1):
        t = torch.full((6,), process.t_min + share * (process.t_max - process.t_min)).double()
        with torch.no_grad():
            found, expected = denoise(x, t), exact(x, t)
        assert torch.allclose(found.x0, expected.x0) and torch.allclose(found.eps, expected.eps)
        assert not found.x0.requires_grad
    times = torch.linspace(0.99, 0, 12).double() * (process.t_max - process.t_data) + process.t_data  # alpha > 0
    assert torch.allclose(*(dpmpp_2m(each, x, times, process) for each in (denoise, exact)), atol=1e-6)


def test_measured_pixels_draw_the_posterior():
    """A mask as measurement, in flow coordinates: measured pixels N(posterior), the others N(prior), by the exact map."""
    process, y, s = PROCESSES["edm"], 0.2, 0.2
    mask = torch.tensor([1.0, 0.0]).double()
    log_r = edit.measured(y * mask.expand(5, 1, 1, 2), lambda x0: mask * x0, s)
    x = latent(process, 5, 1, 1, 2)
    times = process.t_max * torch.logspace(0, -3.3, 200).double()
    found = dpmpp_2m(edit.product(gaussian(process), log_r, process, data_std=STD), x, times, process)
    precision = STD**-2 + s**-2
    mean, std = (MEAN / STD**2 + y / s**2) / precision, precision**-0.5
    standard = (x - mean) / (std**2 + process.t_max**2) ** 0.5
    assert torch.allclose(found[..., 0], (mean + std * standard)[..., 0], atol=5e-3)
    assert torch.allclose(found[..., 1], transported(process, x, process.t_max, float(times[-1]))[..., 1], atol=5e-3)


@SOME
def test_dps_is_the_gradient_through_the_network(name):
    """Normal data: x0 is linear in x_t with slope k, so the slope of -|y - x0|^2 / 2 s^2 is k (y - x0) / s^2."""
    process, y, s = PROCESSES[name], 1.5, 0.3
    x, t = latent(process, 4, 1, 2, 2), torch.full((4,), 0.5 * (process.t_min + process.t_max)).double()
    alpha, sigma = at(process, t, x)
    k = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    plain = gaussian(process)(x, t)
    slope = k * (y - plain.x0) / s**2
    found = edit.product(gaussian(process), edit.measured(torch.tensor(y), lambda x0: x0, s), process)(x, t)
    assert torch.allclose(found.eps, plain.eps - sigma * slope)
    assert torch.allclose(alpha * found.x0 + sigma * found.eps, x)
    # the step of algorithm 1: after the ancestral one, -step * gradient of |r|^2 / |r| = 2 step k r / |r|
    times = torch.tensor([float(t[0]), 0.4 * float(t[0])]).double()
    residual = y - plain.x0
    shift = 2 * 0.7 * k * residual / residual.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    denoise = edit.dps(gaussian(process), torch.full((4, 1, 2, 2), y), lambda x0: x0, process, times, 0.7)
    before, after = (ddpm(each, x, times, process, noise=noise_of(0)) for each in (gaussian(process), denoise))
    assert torch.allclose(after - before, shift, atol=1e-5)


def test_dps_brings_samples_to_a_nonlinear_measurement():
    process = PROCESSES["vp"]
    times, x = linear(process, 60), latent(process, 50, 1, 1, 4)
    y = torch.tensor([[[[0.3]]]]).double().expand(50, 1, 1, 1)

    def residual(found):
        return (y - found.square().mean(-1, keepdim=True)).abs().mean()
    denoise = edit.dps(gaussian(process), y, lambda x0: x0.square().mean(-1, keepdim=True), process, times, 0.1)
    found, plain = (ddpm(each, x, times, process, noise=noise_of(0)) for each in (denoise, gaussian(process)))
    assert residual(found) < 0.3 * residual(plain)


def test_sdedit():
    process = PROCESSES["scaled_linear"]
    times, x0, eps = linear(process, 10), torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for strength, left in ((1.0, 10), (0.7, 7), (0.3, 3), (0.39, 3), (0.01, 1)):
        x, rest = edit.img2img(x0, eps, times, process, strength)
        alpha, sigma = process.exact(times[10 - left])
        assert torch.equal(rest, times[10 - left:]) and torch.allclose(x, (alpha * x0 + sigma * eps).float(), atol=1e-6)
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="strength"):
            edit.img2img(x0, eps, times, process, wrong)


def test_steps_from_and_to_where_are_edited_too():
    process, x0, eps = PROCESSES["scaled_linear"], torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    path = linear(process, 10)
    pairs = torch.stack([path[:-1], path[1:]], 1)
    x, rest = edit.img2img(x0, eps, pairs, process, 0.3)
    assert torch.equal(x, edit.img2img(x0, eps, path, process, 0.3)[0]) and torch.equal(rest, pairs[7:])
    with pytest.raises(ValueError, match="repaint walks a list"):
        edit.repaint(ddpm, x0, torch.ones(2))(gaussian(process), x, pairs, process)


def test_sdedit_keeps_what_fits_the_data():
    """Normal data: what starts as a sample ends as one, nearer to where it began, the less it was noised."""
    process = PROCESSES["edm"]
    x0 = MEAN + STD * torch.randn(3000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps, ways = latent(PROCESSES["flow"], 3000, 1, 1, 1, seed=1), []
    for strength in (0.2, 0.5, 1.0):
        x, times = edit.img2img(x0, eps, towards_data(process, 100), process, strength)
        found = ddpm(gaussian(process), x, times, process, noise=noise_of(2))
        assert abs(found.mean() - MEAN) < 0.03 and abs(found.std() / STD - 1) < 0.05
        ways.append((found - x0).abs().mean())
    assert ways[0] < ways[1] < ways[2]


def test_wrappers_ask_the_network_once():
    process, calls = PROCESSES["vp"], []
    plain = gaussian(process)
    denoise = once(lambda x, t: calls.append(1) or plain(x, t))
    known = torch.zeros(1, 1, 1, 2)
    euler(edit.replace(denoise, known, torch.ones(2), process), latent(process, 1, 1, 1, 2), linear(process, 5), process)
    assert len(calls) == 5


def test_a_bundle_edits(bundle):
    """A wrapped sampler is a sampler, and what ``img2img`` gives is where sampling starts."""
    prompts, process, seen = ["red circle", "blue square"], bundle.denoiser.process, []
    latents = torch.randn(2, bundle.autoencoder.channels, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1

    def sampler(*args, **options):
        seen.append(edit.repaint(ddpm, latents, mask, jump=1, resample=2)(*args, **options))
        return seen[-1]
    first, again = (bundle.generate(prompts, sampler=sampler, steps=3, size=32, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.allclose(seen[0][..., :4], latents[..., :4], atol=1e-5) and not torch.allclose(seen[0], latents, atol=0.1)
    x, times = edit.img2img(latents, torch.randn_like(latents), linear(process, 10), process, 0.3)
    assert bundle.generate(prompts, x_T=x, times=times, sampler="ddim").shape == (2, 3, 32, 32)

    def measuring(denoise, x, times, process, **options):
        forward = torch.nn.AvgPool2d(4)
        return ddpm(edit.dps(denoise, forward(latents), forward, process, times, 0.01), x, times, process, **options)
    assert bundle.generate(prompts, sampler=measuring, steps=3, size=32).isfinite().all()
