"""Each rule of guidance against what it is by definition. The oracle: a mixture whose two parts are two classes."""

import pytest
import torch
from oracles import PROCESSES, Mixture, at, gaussian
from torch import nn

from ldm import guidance
from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.networks import layers
from ldm.networks.dit import DiT
from ldm.networks.unet import UNet
from ldm.parameterization import PARAMETERIZATIONS, Prediction, solve, target
from ldm.samplers import ddim, ddpm, euler
from ldm.times import linear

MEANS, STDS = (-1.0, 1.0), (0.3, 0.5)  # the mixture's parts
SOME = pytest.mark.parametrize("name", ["scaled_linear", "vp", "flow", "edm"])


def noisy(process, n=7):  # times inside the process, and x_t there
    t = torch.linspace(0.9, 0.2, n, dtype=torch.float64) * (process.t_max - process.t_min) + process.t_min
    return torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64), t


def score_of(log_density, x, t):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(x, t).sum(), x)[0]


def log_normal(process, mean, std):
    """Up to a constant."""
    def log_density(x, t):
        alpha, sigma = at(process, t, x)
        variance = (alpha * std) ** 2 + sigma**2
        return (-((x - alpha * mean) ** 2) / variance / 2).flatten(1).sum(1)
    return log_density


def log_class(process, k):
    """log p(k | x_t) of the mixture."""
    def log_p(x, t):
        z, spread = Mixture(process).standardised(x, t)
        return torch.log_softmax(Mixture.weights.log() - spread.log() - z.square() / 2, dim=-1)[..., k].flatten(1).sum(1)
    return log_p


def consistent(process, guess, x, t):
    alpha, sigma = at(process, t, x)
    return torch.allclose(alpha * guess.x0 + sigma * guess.eps, x, atol=1e-9)


def same(a, b, atol=1e-9):
    return torch.allclose(a.x0, b.x0, atol=atol) and torch.allclose(a.eps, b.eps, atol=atol)


def says(x0, eps, var=None):
    return lambda x, t: Prediction(x0, eps, var)


def random_pair(process, shape=(3, 2, 4, 4), seed=0):
    """x, t, and two denoise functions with random x0 and the eps that belongs to it; the first has a variance."""
    g = torch.Generator().manual_seed(seed)
    x, a, b = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.full((shape[0],), 0.5 * (process.t_max + process.t_min), dtype=torch.float64)
    alpha, sigma = at(process, t, x)
    return x, t, says(a, (x - alpha * a) / sigma, torch.ones_like(x)), says(b, (x - alpha * b) / sigma)


@SOME
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_cfg_is_the_score_of_the_powers_of_both_densities(name, scale):
    process = PROCESSES[name]
    x, t = noisy(process)
    guided = guidance.cfg(gaussian(process, 1.0, 0.4), gaussian(process, 0.2, 0.9), scale)(x, t)
    cond, null = log_normal(process, 1.0, 0.4), log_normal(process, 0.2, 0.9)
    expected = score_of(lambda x, t: scale * cond(x, t) + (1 - scale) * null(x, t), x, t)
    assert torch.allclose(-guided.eps / at(process, t, x)[1], expected) and consistent(process, guided, x, t)


@SOME
def test_composition_is_the_product_of_the_conditions(name):
    process = PROCESSES[name]
    x, t = noisy(process)
    cases = ((1.0, 0.4, 2.0), (-0.5, 0.6, 1.5), (0.3, 0.3, -0.7))
    guided = guidance.compose(gaussian(process), [(gaussian(process, m, s), w) for m, s, w in cases])(x, t)
    null, parts = log_normal(process, 0.7, 0.4), [(log_normal(process, m, s), w) for m, s, w in cases]
    expected = score_of(lambda x, t: null(x, t) + sum(w * (part(x, t) - null(x, t)) for part, w in parts), x, t)
    assert torch.allclose(-guided.eps / at(process, t, x)[1], expected, atol=1e-7) and consistent(process, guided, x, t)


def test_one_condition_composed_is_cfg_and_autoguidance_leads_away_from_the_weak_one():
    process = PROCESSES["vp"]
    x, t, first, second = random_pair(process)
    guided = guidance.cfg(first, second, 4.0)(x, t)
    assert same(guidance.compose(second, [(first, 4.0)])(x, t), guided)
    assert same(guidance.auto(first, second, 4.0)(x, t), guided)
    weak, strong = gaussian(process, 0.7, 0.8), gaussian(process, 0.7, 0.4)
    spread = [ddim(denoise, x, linear(process, 20), process).std() for denoise in (strong, guidance.auto(strong, weak, 2.0))]
    assert spread[1] < 0.95 * spread[0]  # a weak model is broader: away from it is narrower


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_composition_commutes_with_the_parameterization(parameterization):
    torch.manual_seed(0)
    x, *fs = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(4))
    alpha, sigma = at(PROCESSES["linear"], torch.tensor([100.0, 700.0]).double(), x)
    row = (alpha, sigma, *PARAMETERIZATIONS[parameterization](alpha, sigma))
    null, a, b = ((lambda x, t, f=f: solve(x, f, *row)) for f in fs)
    found = guidance.compose(null, [(a, 5.0), (b, -2.0)])(x, None)
    assert same(found, solve(x, fs[0] + 5 * (fs[1] - fs[0]) - 2 * (fs[2] - fs[0]), *row))


@SOME
@pytest.mark.parametrize("k", [0, 1])
def test_exact_classifier_at_scale_1_gives_the_condition(name, k):
    """Bayes: grad log p(x_t) + grad log p(k | x_t) = grad log p(x_t | k)."""
    process = PROCESSES[name]
    x, t = noisy(process)
    guided = guidance.classifier(Mixture(process).denoise, log_class(process, k), 1.0, process)
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad():
            found = guided(x, t)
        assert not found.x0.requires_grad and same(found, gaussian(process, MEANS[k], STDS[k])(x, t), atol=1e-7)


def test_classifier_where_nothing_is_left_of_the_data():
    process = PROCESSES["flow"]
    x, t = torch.ones(2, 1, 1, 1).double(), torch.ones(2).double()  # alpha = 0
    guided = guidance.classifier(gaussian(process), lambda x, t: 0 * x.flatten(1).sum(1), 5.0, process)
    assert same(guided(x, t), gaussian(process)(x, t))


@SOME
def test_mean_form_moves_the_ancestral_step_by_variance_times_gradient(name):
    process = PROCESSES[name]
    times = linear(process, 8)
    x = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    t, log_p, denoise = times[3].expand(5), log_class(process, 1), Mixture(process).denoise
    step = process.posterior(times[3], times[4])
    mean = step.x0 * denoise(x, t).x0 + step.xt * x
    guided = guidance.classifier_mean(denoise, log_p, 3.0, process, times)
    found = guided(x, t)
    expected = mean + 3.0 * step.variance * score_of(log_p, x, t)
    assert torch.allclose(step.x0 * found.x0 + step.xt * x, expected) and consistent(process, found, x, t)
    walked = ddpm(guided, x, times[3:5], process, noise=lambda step, shape: torch.zeros(shape))
    assert torch.allclose(walked, expected, atol=1e-5)  # samplers tell the time in fp32
    large = guidance.classifier_mean(denoise, log_p, 3.0, process, times, "large")(x, t)
    assert torch.allclose(step.x0 * large.x0 + step.xt * x, mean + 3.0 * step.beta * score_of(log_p, x, t))


def test_mean_form_samples_the_class():
    """Many small steps with the exact classifier: the moments of the class."""
    process = PROCESSES["vp"]
    times = linear(process, 100)
    torch.manual_seed(0)
    x = torch.randn(2000, 1, 1, 1, dtype=torch.float64)
    guided = guidance.classifier_mean(Mixture(process).denoise, log_class(process, 0), 1.0, process, times)
    found = ddpm(guided, x, times, process)
    assert abs(found.mean() + 1.0) < 0.04 and abs(found.std() - 0.3) < 0.03


@pytest.mark.parametrize("of", PARAMETERIZATIONS)
def test_rescale_keeps_the_deviation_of_the_condition(of):
    process = PROCESSES["linear"]
    x, t, cond, null = random_pair(process)
    alpha, sigma = at(process, t, x)
    row = PARAMETERIZATIONS[of](alpha, sigma)
    guided = guidance.cfg(cond, null, 9.0)

    def f(denoise):
        guess = denoise(x, t)
        return target(guess.x0, guess.eps, *row).flatten(1)
    full, none, half = (guidance.rescale(guided, cond, process, share, of) for share in (1.0, 0.0, 0.5))
    assert torch.allclose(f(full).std(1), f(cond).std(1)) and (f(guided).std(1) > 2 * f(cond).std(1)).all()
    assert same(none(x, t), guided(x, t)) and torch.allclose(f(half), (f(full) + f(guided)) / 2)
    assert consistent(process, full(x, t), x, t)


def test_dynamic_threshold_is_per_sample_and_bounded():
    process = PROCESSES["linear"]
    x, t, denoise, _ = random_pair(process)
    x0 = denoise(x, t).x0 * torch.tensor([0.1, 2.0, 5.0]).view(3, 1, 1, 1)
    found = guidance.dynamic_threshold(says(x0, x), process, 0.9)(x, t)
    assert found.x0.abs().max() <= 1 and consistent(process, found, x, t)
    assert torch.equal(found.x0[0], x0[0])  # below 1: as it is
    for row, now in zip(x0[1:], found.x0[1:], strict=True):
        s = row.abs().quantile(0.9)
        inner = row.abs() < s
        assert torch.allclose(now[inner], (row / s)[inner]) and (now[~inner].abs() == 1).all()
    capped = guidance.dynamic_threshold(says(x0, x), process, 0.9, most=1.0)(x, t)
    assert same(capped, guidance.clip(says(x0, x), process)(x, t))


def test_changed_data_with_eps_found_or_kept():
    process = PROCESSES["linear"]
    x, t, denoise, _ = random_pair(process)
    kept = guidance.change_data(denoise, process, torch.round, "kept")(x, t)
    found = guidance.change_data(denoise, process, torch.round)(x, t)
    assert torch.equal(kept.x0, denoise(x, t).x0.round()) and torch.equal(kept.x0, found.x0)
    assert torch.equal(kept.eps, denoise(x, t).eps) and consistent(process, found, x, t)
    assert guidance.clip(denoise, process, 0.5)(x, t).x0.abs().max() == 0.5


def test_apg_with_all_of_the_difference_is_cfg():
    process = PROCESSES["edm"]
    x, t, cond, null = random_pair(process)
    assert same(guidance.apg(cond, null, 5.0, process, eta=1.0)(x, t), guidance.cfg(cond, null, 5.0)(x, t))


def test_apg_projects_bounds_and_remembers():
    process = PROCESSES["edm"]
    x, t, cond, null = random_pair(process)
    a, difference = cond(x, t).x0, cond(x, t).x0 - null(x, t).x0
    found = guidance.apg(cond, null, 5.0, process)(x, t)
    added = found.x0 - a
    assert consistent(process, found, x, t)
    assert torch.allclose((added * a).flatten(1).sum(1), torch.zeros(3).double(), atol=1e-9)  # orthogonal to the condition
    assert torch.allclose(((4 * difference - added) / a).flatten(1).std(1), torch.zeros(3).double(), atol=1e-9)  # rest: along it
    short = guidance.apg(cond, null, 2.0, process, eta=1.0, threshold=0.5)(x, t).x0 - a
    assert torch.allclose(short.flatten(1).norm(dim=1), torch.full((3,), 0.5).double())
    assert torch.allclose(short / short.norm(), difference / difference.flatten(1).norm(dim=1).view(3, 1, 1, 1) / 3**0.5)
    one = guidance.apg(cond, null, 2.0, process, eta=1.0, momentum=-0.5)
    steps = [one(x, t).x0 - a for _ in range(3)]
    for step, factor in zip(steps, (1.0, 0.5, 0.75), strict=True):  # d, d - d / 2, d - (d / 2) / 2
        assert torch.allclose(step, factor * difference)
    fresh = guidance.apg(cond, null, 2.0, process, eta=1.0, momentum=-0.5)
    assert torch.allclose(fresh(x, t).x0 - a, difference)


def velocity(guess):
    return guess.eps - guess.x0


def test_cfg_zero_star():
    process = PROCESSES["flow"]
    x, t, cond, null = random_pair(process)
    found = guidance.cfg_zero(cond, null, 4.0, process)(x, t)
    a, b = (velocity(each(x, t)) for each in (cond, null))
    s = torch.stack([(p * q).sum() / (q * q).sum() for p, q in zip(a, b, strict=True)]).view(3, 1, 1, 1)
    assert torch.allclose(velocity(found), s * b + 4 * (a - s * b)) and consistent(process, found, x, t)
    assert same(guidance.cfg_zero(cond, null, 1.0, process)(x, t), cond(x, t))
    doubled = solve(x, 2 * a, *at(process, t, x), *PARAMETERIZATIONS["flow"](*at(process, t, x)))
    assert same(guidance.cfg_zero(cond, lambda x, t: doubled, 7.0, process)(x, t), cond(x, t))  # null says nothing else


def test_first_steps_that_stand_still():
    process = PROCESSES["flow"]
    times, x = linear(process, 10), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    moves = gaussian(process)
    denoise = guidance.within(0.85, 1.1, inside=guidance.still(process), outside=moves)
    expected = ddim(moves, x, times[2:], process)
    for sampler in (ddim, euler):
        assert torch.allclose(sampler(denoise, x, times, process), expected, atol=1e-6)


def test_an_interval_for_each_sample():
    """An adaptive sampler has a time for each."""
    process = PROCESSES["flow"]
    x, t, a, b = random_pair(process)
    t, calls = torch.tensor([0.9, 0.5, 0.1]).double(), []
    denoise = guidance.within(0.4, 0.6, inside=a, outside=lambda x, t: calls.append(1) or b(x, t))
    found = denoise(x, t)
    for row, chosen in enumerate((b, a, b)):
        assert torch.equal(found.x0[row], chosen(x, t).x0[row]) and torch.equal(found.eps[row], chosen(x, t).eps[row])
    assert same(denoise(x, 0 * t + 0.5), a(x, t), 0) and len(calls) == 1


def test_guidance_on_some_channels():
    process = PROCESSES["vp"]
    x, t, cond, null = random_pair(process, (2, 4, 3, 3))
    guided = guidance.cfg(cond, null, 4.0)
    found = guidance.on_channels(guided, cond, 3)(x, t)
    assert torch.equal(found.x0[:, :3], guided(x, t).x0[:, :3]) and torch.equal(found.x0[:, 3:], cond(x, t).x0[:, 3:])
    assert torch.equal(found.eps[:, 3:], cond(x, t).eps[:, 3:])


def test_the_learned_variance_is_that_of_the_condition():
    process = PROCESSES["linear"]
    x, t, cond, null = random_pair(process)
    times = linear(process, 10)
    rules = [
        guidance.cfg(cond, null, 3.0), guidance.compose(null, [(cond, 2.0), (null, 1.0)]),
        guidance.rescale(guidance.cfg(cond, null, 3.0), cond, process), guidance.clip(cond, process),
        guidance.dynamic_threshold(cond, process), guidance.apg(cond, null, 3.0, process),
        guidance.cfg_zero(cond, null, 3.0, process), guidance.classifier(cond, log_normal(process, 0, 1), 1.0, process),
        guidance.classifier_mean(cond, log_normal(process, 0, 1), 1.0, process, times, "learned_range"),
        guidance.on_channels(cond, null, 1),
    ]  # fmt: skip
    assert all(torch.equal(rule(x, t).var, torch.ones_like(x)) for rule in rules)


class Labelled(nn.Module):
    """Adds the condition's vector, and counts its calls."""

    calls = 0

    def forward(self, x, time, cond):
        self.calls += 1
        return x.tanh() + cond.vector.mean(1).view(-1, 1, 1, 1) + 1e-3 * time.view(-1, 1, 1, 1)


def test_one_pass_answers_every_wrapper():
    network, process = Labelled(), PROCESSES["vp"]
    denoiser = Denoiser(network, process, "v")
    conds = [Cond(vector=torch.full((3, 2), value)) for value in (1.0, 0.0, -2.0)]
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0.9, 0.5, 0.2])

    def rules(cond, null, other):
        return guidance.rescale(guidance.compose(null, [(cond, 3.0), (other, -1.0)]), cond, process, 0.5)
    shared = rules(*guidance.batched(denoiser, *conds))
    found = shared(x, t)
    assert network.calls == 1
    assert same(found, rules(*(bind(denoiser, cond) for cond in conds))(x, t), atol=1e-5)
    network.calls = 0
    shared(x, t), shared(x, t.clone()), shared(x.clone(), t)
    assert network.calls == 2  # the first call is still known


def test_what_is_remembered_belongs_to_its_input():
    calls = []
    ask = guidance.once(lambda x, t: calls.append(1) or x + 1)
    x, t = torch.zeros(2), torch.zeros(2)
    ask(x, t), ask(x, t)
    assert len(calls) == 1
    x += 1  # in place
    assert torch.equal(ask(x, t), torch.full((2,), 2.0)) and len(calls) == 2
    with torch.no_grad():
        ask(x, t)
    assert len(calls) == 3
    with torch.inference_mode():
        x, t = torch.zeros(2), torch.zeros(2)
        ask(x, t), ask(x, t)
    assert len(calls) == 4


def every_rule(process, first, second, times):
    """All that wraps denoise functions."""
    def log_p(x, t):
        return -x.square().flatten(1).sum(1)
    return {
        "cfg": guidance.cfg(first, second, 3.0), "compose": guidance.compose(second, [(first, 2.0)]),
        "within": guidance.within(0.2, 0.8, first, second), "on_channels": guidance.on_channels(first, second, 1),
        "rescale": guidance.rescale(guidance.cfg(first, second, 3.0), first, process),
        "clip": guidance.clip(first, process), "dynamic_threshold": guidance.dynamic_threshold(first, process),
        "apg": guidance.apg(first, second, 3.0, process, threshold=1.0, momentum=-0.5),
        "cfg_zero": guidance.cfg_zero(first, second, 3.0, process), "still": guidance.still(process),
        "classifier": guidance.classifier(first, log_p, 1.0, process),
        "classifier_mean": guidance.classifier_mean(first, log_p, 1.0, process, times),
    }  # fmt: skip


@pytest.mark.parametrize("rule", every_rule(PROCESSES["flow"], None, None, None))
@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (2, 1, 1, 1), (2, 1, 4, 4)])
def test_no_pictures_one_number_and_half_precision(rule, shape):
    process = PROCESSES["flow"]
    x, t = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.full(shape[:1], 0.5)

    def says(mean, std):
        def denoise(x, t):
            guess = gaussian(process, mean, std)(x.float(), t)
            return Prediction(guess.x0.to(x.dtype), guess.eps.to(x.dtype))
        return denoise

    def run(x):
        return every_rule(process, says(0.7, 0.4), says(0.0, 1.0), linear(process, 4))[rule](x, t)

    exact = run(x)
    assert exact.x0.shape == exact.eps.shape == shape and exact.x0.isfinite().all()
    for dtype, close in ((torch.float16, 0.05), (torch.bfloat16, 0.3)):
        assert torch.allclose(run(x.to(dtype)).x0.float(), exact.x0, atol=close)


def test_a_prediction_without_spread_is_rescaled_to_itself():
    process, x = PROCESSES["flow"], torch.ones(2, 1, 4, 4)
    flat = says(torch.zeros_like(x), torch.zeros_like(x))
    assert guidance.rescale(flat, flat, process)(x, torch.full((2,), 0.5)).x0.isfinite().all()


NETWORKS = {
    "transformer": lambda: UNet(1, 1, context_dim=6, model_channels=32, channel_mult=[1, 1], num_res_blocks=1, transformer_depth=[1, 1], num_heads=2),
    "self": lambda: UNet(1, 1, model_channels=32, channel_mult=[1, 1], num_res_blocks=1, transformer_depth=[0, 1], attention="self", num_heads=4),
    "dit": lambda: DiT(1, 1, context_dim=6, width=32, depth=2, heads=2, positions="rotary", qk_norm=True),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_perturbed_attention_is_attention_through_a_mask_of_ones_own_place(kind, monkeypatch):
    torch.manual_seed(0)
    network, process, x, t = NETWORKS[kind]().eval().double(), PROCESSES["flow"], torch.randn(2, 1, 4, 8).double(), torch.full((2,), 0.5).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    cond = Cond() if kind == "self" else Cond(torch.randn(2, 3, 6).double())
    plain = guidance.once(bind(Denoiser(network, process), cond))
    usual, weak = plain(x, t).x0, guidance.perturbed(plain, network)
    found, guided = weak(x, t).x0, guidance.auto(plain, weak, 2.5)(x, t).x0
    middle = guidance.perturbed(plain, network.blocks[1] if kind == "dit" else network.middle)(x, t).x0
    assert torch.equal(bind(Denoiser(network, process), cond)(x, t).x0, usual)  # as before
    attend = layers.F.scaled_dot_product_attention

    def masked(q, k, v, attn_mask=None):
        own = torch.eye(q.shape[-2], dtype=torch.bool) if q.shape[-2] == k.shape[-2] else attn_mask
        return attend(q, k, v, attn_mask=own)

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", masked)
    exact = bind(Denoiser(network, process), cond)(x, t).x0
    assert torch.allclose(found, exact, atol=1e-6) and not torch.allclose(usual, exact, atol=1e-2)
    assert torch.allclose(guided, exact + 2.5 * (usual - exact), atol=1e-5)
    assert not torch.allclose(middle, exact, atol=1e-4) and not torch.allclose(middle, usual, atol=1e-4)


def test_a_network_without_attention_cannot_be_perturbed():
    with pytest.raises(ValueError, match="Conv2d has no attention"):
        guidance.perturbed(gaussian(PROCESSES["flow"]), nn.Conv2d(1, 1, 1))(torch.ones(1, 1, 1, 1), torch.ones(1))


@pytest.mark.parametrize(("name", "low", "high", "said"), [
    ("flow", 200, 800, "low 200, high 800: no time of RectifiedFlow is between them: nothing is guided; its t goes from 0 to 1"), ("flow", 0.8, 0.2, "no time"),
    ("scaled_linear", 0.2, 0.8, "no time of DDPM is between them: nothing is guided; its t goes from 0 to 999"), ("edm", None, 0.001, "no time of EDM")])
def test_an_interval_of_another_process_is_told(name, low, high, said, caplog):
    plan = {"scale": 2.0, "low": low, "high": high, "rescale": None, "channels": None}
    guidance.planned(None, None, Cond(), Cond(), plan | {"low": None, "high": None}, PROCESSES[name])
    assert not caplog.records
    guidance.planned(None, None, Cond(), Cond(), plan, PROCESSES[name])
    assert said in caplog.text
