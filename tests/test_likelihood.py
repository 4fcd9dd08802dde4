"""Against closed forms: Gaussian data and its bound, a mixture and its density, a linear autoencoder and its marginal."""

import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from autoencoder.base import Autoencoder
from ldm.likelihood import (
    Bound,
    bits_per_dim,
    clamped,
    continuous_bound,
    decoder_nats,
    discretized_log_likelihood,
    dormand_prince,
    draw_latent,
    joined,
    laplace_log_density,
    normal_kl,
    normal_log_density,
    ode_likelihood,
    prior_kl,
    rate_distortion,
    variance_before,
    variational_bound,
)
from ldm.parameterization import Prediction
from ldm.process import DDPM, EDM, VP, RectifiedFlow
from ldm.times import karras, leading, linear
from tests.oracles import ENDLESS, MEAN, PROCESSES, STD, Mixture, gaussian

EXACT = 0.5 * math.log(2 * math.pi * math.e * STD**2)  # -E log p(x0) of the Gaussian, in nats
# the mean over these four is the expectation of everything quadratic in x0 ~ N(MEAN, STD^2) and eps ~ N(0, 1)
X0 = (MEAN + STD * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)).view(4, 1, 1, 1)
EPS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1)
EVERY = pytest.mark.parametrize("name", PROCESSES)


def four(step, shape):
    return EPS


def drawn(seed):
    source = torch.Generator().manual_seed(seed)
    return lambda step, shape: torch.randn(shape, generator=source, dtype=torch.float64)


def bound_of(process, times, **options):
    options = {"decoder": normal_log_density, "noise": four} | options
    return variational_bound(gaussian(process), X0, times, process, **options)


def log_density(mixture, x, t):
    """Of the mixture at time t; without noise where t is None."""
    z, spread = mixture.standardised(x, t)
    return torch.logsumexp(mixture.weights.log() - spread.log() - z.square() / 2 - 0.5 * math.log(2 * math.pi), -1).flatten()


# Pieces.


def test_kl_of_two_normals():
    one, two = (torch.distributions.Normal(torch.tensor(m).double(), s) for m, s in ((0.3, 0.2), (-1.0, 1.7)))
    found = normal_kl(one.mean, one.variance.log(), two.mean, two.variance.log())
    assert torch.isclose(found, torch.distributions.kl_divergence(one, two))


@pytest.mark.parametrize("cdf", ["normal", "tanh"])
@pytest.mark.parametrize(("mean", "log_std"), [(0.3, -1.0), (-0.99, -4.0), (2.0, -2.0), (0.0, 3.0), (0.1, -6.0)])
def test_masses_of_all_bins_add_up_to_one(mean, log_std, cdf):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    found = discretized_log_likelihood(x, torch.full_like(x, mean), torch.tensor(log_std).double(), cdf=cdf)
    assert math.isclose(float(found.exp().sum()), 1, rel_tol=1e-9)
    assert found.isfinite().all()


def test_mass_of_a_narrow_bin_is_density_times_width():
    x, mean, log_std = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 0.2, 0.7))
    mass = discretized_log_likelihood(x, mean, log_std, bins=100_001)
    assert torch.isclose(mass, normal_log_density(x, mean, log_std) + math.log(2 / 100_000), atol=1e-8)


def test_mass_far_from_the_mean_keeps_digits_and_gradient():
    """log of the mass is about -z^2 / 2, its gradient -z / std, on both sides."""
    std = math.exp(-6.0)
    for dtype in (torch.float32, torch.float64):
        x, mean = torch.tensor([-0.6, 0.6], dtype=dtype), torch.zeros(2, dtype=dtype, requires_grad=True)
        found = discretized_log_likelihood(x, mean, torch.tensor(-6.0, dtype=dtype))
        gradient, = torch.autograd.grad(found.sum(), mean)
        z = (0.6 - 1 / 255) / std
        assert torch.allclose(found.detach().double(), torch.tensor(-(z**2) / 2).double(), rtol=1e-3)
        assert torch.allclose(gradient.double(), torch.tensor([-z / std, z / std]).double(), rtol=1e-3)


def test_densities():
    x, mean, log_std = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 0.2, 0.7))
    std = log_std.exp()
    assert torch.isclose(normal_log_density(x, mean, log_std), torch.distributions.Normal(mean, std).log_prob(x))
    laplace = torch.distributions.Laplace(mean, std / 2**0.5)
    assert torch.isclose(laplace.stddev, std) and torch.isclose(laplace_log_density(x, mean, log_std), laplace.log_prob(x))


# The bound of a chain.


@EVERY
@pytest.mark.parametrize("variance", ["small", "large"])
def test_every_term_has_its_closed_form(name, variance):
    """Expectations of the Gaussian: |x0 - x0(x_t)|^2 is the posterior's variance v; each step's KL follows from it."""
    process = PROCESSES[name]
    times = linear(process, 20)
    bound = bound_of(process, times, variance=variance)
    alpha, sigma = process.exact(times)
    v = STD**2 * sigma**2 / ((alpha * STD) ** 2 + sigma**2)
    assert torch.allclose(bound.error.mean(0), v[:-1])
    step = process.posterior(times[:-2], times[1:-1])
    model = step.variance if variance == "small" else step.beta
    kl = 0.5 * ((model / step.variance).log() + (step.variance + step.x0**2 * v[:-2]) / model - 1)
    assert torch.allclose(bound.terms.mean(0)[:-1], kl)
    last = sigma[-2] ** 2 / alpha[-1] ** 2  # beta of the step to the data
    assert torch.isclose(bound.decoder.mean(), 0.5 * ((2 * math.pi * last).log() + v[-2] / last))
    variance_T = process.prior_std() ** 2
    square = (alpha[0] ** 2 * (MEAN**2 + STD**2) + sigma[0] ** 2) / variance_T
    assert torch.isclose(bound.prior.mean(), 0.5 * ((variance_T / sigma[0] ** 2).log() + square - 1), atol=1e-12)
    assert torch.allclose(bound.total, bound.prior + bound.terms.sum(1))


@EVERY
def test_bound_is_above_and_comes_down_with_the_steps(name):
    """Like one over their number; slowest on EDM, where beta is the wrong variance as long as the noise is larger than data."""
    process = PROCESSES[name]
    gaps = [float(bound_of(process, karras(process, n)).total.mean()) - EXACT for n in (10, 50, 500)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < gaps[1] / 5 and gaps[2] < (0.05 if name == "edm" else 0.01)


@pytest.mark.parametrize("name", ["edm", "flow", "scaled_linear"])
def test_a_chain_that_begins_lower_has_a_bound_of_its_own(name):
    """Its prior is that of the x it begins with: else what noise above takes away of the data would be told by nobody. Of this
    Gaussian KL(q(x_t) || N(0, alpha^2 + sigma^2)) is what the prior being another costs, whatever the steps."""
    process = PROCESSES[name]
    times = karras(process, 400, sigma_max=0.5)
    alpha, sigma = process.exact(times[:1])
    own = (alpha * STD).square() + sigma.square()
    cost = float(normal_kl(alpha * MEAN, own.log(), torch.zeros(1), (alpha.square() + sigma.square()).log()))
    assert 0 < float(bound_of(process, times).total.mean()) - EXACT - cost < 0.01


def test_a_bound_takes_a_list_of_times():
    process = DDPM()
    with pytest.raises(ValueError, match="not pairs of times"):
        bound_of(process, linear(process, 10, overlap=True))


@EVERY
def test_continuous_bound_is_the_limit(name):
    process = PROCESSES[name]
    bound = continuous_bound(gaussian(process), X0, process, 100, decoder=normal_log_density, noise=four)
    assert -1e-4 < float(bound.total.mean()) - EXACT < 2e-3
    assert bound.terms.shape == bound.error.shape == (4, 101) and bound.times.shape == (101,)


def test_another_prior():
    """k-diffusion takes N(0, sigma_max^2)."""
    process = EDM(0.01, 20.0)
    expected = normal_kl(X0, torch.tensor(2 * math.log(20.0)), torch.zeros(()), torch.tensor(2 * math.log(25.0)))
    assert torch.allclose(prior_kl(X0, process, prior_std=25.0), expected.flatten())


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variances(kind):
    """A network that says log(beta), or the upper end of the range, has the bound of the fixed large variance."""
    process = DDPM("linear", 50)
    times = linear(process, 50)

    def denoise(x, t):
        guess = gaussian(process)(x, t)
        log_beta = process.posterior(t, t - 1).beta.log().view(-1, 1, 1, 1)
        return Prediction(guess.x0, guess.eps, log_beta.expand_as(x) if kind == "learned" else torch.ones_like(x))

    found = variational_bound(denoise, X0, times, process, variance=kind, decoder=normal_log_density, noise=four)
    assert torch.allclose(found.terms, bound_of(process, times).terms)


def test_the_decoders_variance():
    process = DDPM("linear", 50)
    times = linear(process, 50)
    usual, theirs = (bound_of(process, times, floor=floor) for floor in (None, variance_before(process, times)))
    assert torch.equal(usual.terms[:, :-1], theirs.terms[:, :-1]) and not torch.allclose(usual.decoder, theirs.decoder)
    assert math.isclose(variance_before(process, times), float(process.posterior(1, 0).variance))


def test_what_is_seen_and_drawn():
    process, seen = DDPM(steps=10), []
    bound_of(process, linear(process, 10), callback=lambda step, t, x, guess: seen.append((step, t)),
             noise=lambda step, shape: seen.append(step) or EPS)
    assert seen == [item for k in range(10) for item in (k, (k, 9.0 - k))]


def test_same_noise_same_numbers():
    process = RectifiedFlow()
    one, two, other = (bound_of(process, linear(process, 5), noise=drawn(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.terms, two.terms) and not torch.equal(one.terms, other.terms)
    without = bound_of(process, linear(process, 5), noise=None)
    assert without.terms.shape == (4, 5)


def test_times_have_to_end_at_clean_data():
    process = DDPM()
    with pytest.raises(ValueError, match=r"end at t = 0, where DDPM still has noise: .*t = -1"):
        bound_of(process, leading(process, 10, end="first"))


def test_clamped():
    process = VP()
    guess = clamped(gaussian(process))(torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64), torch.tensor([0.1]))
    assert float(guess.x0) == 1.0


@pytest.mark.parametrize("process", [DDPM(), VP(), RectifiedFlow(), EDM()], ids=["ddpm", "vp", "flow", "edm"])
def test_bound_of_a_mixture_is_above_its_entropy(process):
    """The mean over data and noise, by Gauss and Hermite's points; it comes down with the steps to the bound of infinitely many,
    which is the entropy but for the prior, that is not a mixture, and the little noise where it ends."""
    mixture = Mixture(process)
    points, shares = (torch.from_numpy(each) for each in hermegauss(40))
    shares = shares / shares.sum()
    x0, eps = torch.broadcast_tensors((mixture.means + mixture.stds * points[:, None])[..., None], points)  # (40, parts, 40)
    weights = (shares[:, None, None] * mixture.weights[:, None] * shares).flatten()
    x0, eps = (each.reshape(-1, 1, 1, 1) for each in (x0, eps))
    options = {"decoder": normal_log_density, "noise": lambda step, shape: eps}
    coarse, fine, limit = (float((weights * (bound.total + log_density(mixture, x0, process.t_data))).sum()) for bound in (
        variational_bound(mixture.denoise, x0, karras(process, 20), process, **options),
        variational_bound(mixture.denoise, x0, karras(process, 200), process, **options),
        continuous_bound(mixture.denoise, x0, process, 100, **options)))  # fmt: skip
    assert coarse > fine > limit > -1e-4 and limit < 2e-3 and fine < 0.2, (coarse, fine, limit)


# Rate and distortion.


def test_rate_and_distortion():
    bound = Bound(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]),
                  torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    rate, rmse = rate_distortion(bound, dims=2)
    assert torch.allclose(rate * 2 * math.log(2), torch.tensor([2.0, 4.0, 7.0]))
    assert torch.allclose(rmse, 127.5 * torch.tensor([2**0.5, 1.0, 0.0]))
    assert torch.equal(rate_distortion(bound, 2, error=torch.ones(2, 3))[1], torch.full((3,), 127.5))


def test_rate_is_that_of_the_noisy_data():
    """Sending x_t ~ q(x_t | x0) costs KL(q(x_t | x0) || p(x_t)) at least: for the Gaussian, the mutual information."""
    process = RectifiedFlow()
    times = karras(process, 400)
    rate, rmse = rate_distortion(bound_of(process, times), 1)
    alpha, sigma = process.exact(times[:-1])
    snr = (alpha * STD / sigma) ** 2
    information = 0.5 * torch.log2(1 + snr)
    assert ((rate - information)[1:] > -1e-9).all() and ((rate - information) < 0.02).all()
    assert torch.allclose(rmse, 127.5 * (STD**2 / (1 + snr)).sqrt())


def test_batches_joined():
    process = VP()
    whole = bound_of(process, linear(process, 4))
    parts = [variational_bound(gaussian(process), X0[rows], linear(process, 4), process, decoder=normal_log_density,
                               noise=lambda k, shape, rows=rows: EPS[rows]) for rows in (slice(0, 1), slice(1, 4))]
    for name in ("times", "prior", "terms", "error"):
        assert torch.equal(getattr(joined(parts), name), getattr(whole, name))


# The probability-flow ODE.

POINTS = torch.tensor([-1.6, -1.0, -0.4, 0.1, 1.0, 2.2], dtype=torch.float64).view(-1, 1, 1, 1)


def exact_density(x):
    return log_density(Mixture(VP()), x, 0.0)


@pytest.mark.parametrize("process", [VP(0.1, 40.0), EDM(0.002, 2000.0), RectifiedFlow(), RectifiedFlow(3.0)])
def test_ode_gives_the_density_of_a_mixture(process):
    found = ode_likelihood(Mixture(process).denoise, POINTS, process, probes="exact", level=0.002)
    assert (found.log_likelihood - exact_density(POINTS)).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "vp", "trigonometric", "edm"])
def test_ode_on_processes_that_keep_some_data_at_their_end(name):
    """With the exact density there in place of the prior."""
    process = PROCESSES[name]
    mixture = Mixture(process)
    found = ode_likelihood(mixture.denoise, POINTS, process, probes="exact", level=0.002)
    corrected = found.log_likelihood - found.log_prior + log_density(mixture, found.latent, process.t_max)
    assert (corrected - exact_density(POINTS)).abs().max() < 1e-3
    assert (name in ENDLESS) == bool((found.log_likelihood - corrected).abs().max() < 1e-6)


def test_ode_in_four_dimensions():
    """A Gaussian with another deviation in each; one probe is exact, for the field has a diagonal Jacobian."""
    process, std = RectifiedFlow(), torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64).view(1, 2, 2)

    def denoise(x, t):
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.exact(t))
        x0 = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x
        return Prediction(x0, (x - alpha * x0) / sigma)

    x = std * torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = normal_log_density(x, torch.zeros(()), std.log()).flatten(1).sum(1)
    trace, probed = (ode_likelihood(denoise, x, process, probes=probes, level=1e-3, tolerance=1e-7, noise=drawn(0))
                     for probes in ("exact", 1))
    assert (trace.log_likelihood - exact).abs().max() < 1e-3
    assert torch.allclose(trace.log_likelihood, probed.log_likelihood, atol=1e-6)


def test_ode_does_not_depend_on_the_batch():
    process = RectifiedFlow()
    together = ode_likelihood(Mixture(process).denoise, POINTS, process, probes="exact", tolerance=1e-3)
    alone = ode_likelihood(Mixture(process).denoise, POINTS[2:3], process, probes="exact", tolerance=1e-3)
    assert torch.allclose(together.log_likelihood[2:3], alone.log_likelihood, atol=1e-12)
    assert alone.evaluations <= together.evaluations < 200


def test_ode_is_below_no_bound():
    """-log p of the model by its ODE, and the bounds above it."""
    process = RectifiedFlow()
    nats = -float(ode_likelihood(gaussian(process), X0, process, probes="exact").log_likelihood.mean())
    assert abs(nats - EXACT) < 1e-3
    assert nats < float(bound_of(process, karras(process, 100)).total.mean())


def test_likelihoods_of_no_pictures_are_none():
    process, none = RectifiedFlow(), torch.zeros(0, 1, 2, 2).double()
    denoise, options = gaussian(process), {"decoder": normal_log_density}
    assert ode_likelihood(denoise, none, process).log_likelihood.shape == (0,)
    assert variational_bound(denoise, none, karras(process, 4), process, **options).total.shape == (0,)
    assert continuous_bound(denoise, none, process, 4, **options).total.shape == (0,)


def test_how_far_the_ode_is_and_that_it_ends():
    seen = []
    ode_likelihood(gaussian(RectifiedFlow()), X0, RectifiedFlow(), tolerance=1e-2, callback=seen.append)
    assert seen == sorted(seen) and 0 < seen[0] and seen[-1] == pytest.approx(1)
    with pytest.raises(ValueError, match="not solved after 3 steps, at .* of 1; take a larger tolerance than 1e-06"):
        dormand_prince(lambda w, state: state.cos(), torch.zeros(2, 2).double(), 0.0, 1.0, 1e-6, most=3)


def test_a_network_of_nan_is_told():
    process = RectifiedFlow()
    with pytest.raises(ValueError, match="gave nan"):
        ode_likelihood(lambda x, t: Prediction(x * math.nan, x), POINTS, process)


# Latents.


class Linear(Autoencoder):
    """q(z|x) = N(a x, s^2) around one pixel, x(z) = z / a; shift and scale apply on top."""

    a, s = 0.5, 0.1

    def __init__(self, noisy: bool = True):
        super().__init__(1, 1, 1)
        self.noisy = noisy
        self.set_statistics(torch.tensor([0.2]), torch.tensor([0.25]), 1)

    def moments(self, x):
        return self.a * x, torch.full_like(x, 2 * math.log(self.s)) if self.noisy else None

    def decode_raw(self, z):
        return z / self.a


@pytest.mark.parametrize("noisy", [True, False])
def test_latent_bound_of_a_linear_autoencoder(noisy):
    """x ~ N(MEAN, STD^2), z's prior the aggregate of q(z|x), p(x|z) = N(x(z), std^2): everything is Gaussian. The bound is
    above the model's marginal by KL(q(z|x) || p(z|x)), which has a closed form."""
    model, std = Linear(noisy).double(), 0.2
    scale, shift = float(model.scale), float(model.shift)
    spread = model.s / scale  # of q(z|x) at unit scale
    m, v = (model.a * MEAN - shift) / scale, (model.a * STD / scale) ** 2 + spread**2  # of the prior of z
    gain = scale / model.a  # x(z) = gain z + offset
    offset = shift / model.a
    z, entropy = draw_latent(model, X0, noise=four, std=None if noisy else spread)
    nats = -normal_log_density(z, torch.tensor(m), torch.tensor(0.5 * math.log(v))).flatten()
    total = decoder_nats(model, X0, z, normal_log_density, std) - entropy + nats

    marginal = -normal_log_density(X0, torch.tensor(gain * m + offset), torch.tensor(0.5 * math.log(gain**2 * v + std**2)))
    precision = 1 / v + gain**2 / std**2  # of p(z|x)
    middle = (m / v + gain * (X0 - offset) / std**2) / precision
    mean = (model.a * X0 - shift) / scale
    gap = normal_kl(mean, torch.tensor(2 * math.log(spread)), middle, torch.tensor(-math.log(precision)))
    assert float(gap.mean()) > 0.01
    assert torch.isclose(total.mean(), (marginal + gap).mean(), rtol=1e-6)


def test_latents_without_noise_have_no_entropy():
    with pytest.raises(ValueError, match="Linear encodes without noise"):
        draw_latent(Linear(noisy=False), X0.float())


def test_bits():
    assert float(bits_per_dim(torch.tensor(8 * math.log(2.0)), 4)) == pytest.approx(2.0)


def test_ode_where_gradients_are_off():
    """As in the validation of a training loop."""
    process, x = PROCESSES["flow"], torch.tensor([[[[0.3, 0.9]]]])
    exact = torch.distributions.Normal(MEAN, STD).log_prob(x).sum()
    with torch.inference_mode():
        found = ode_likelihood(gaussian(process), x.clone(), process, probes="exact").log_likelihood
    assert found.item() == pytest.approx(exact.item(), abs=1e-3)
