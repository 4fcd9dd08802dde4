"""Against numbers computed with facebookresearch/DiT and willisma/SiT: networks, guidance, paths, losses, ODE and SDE samples.

SiT's clock runs from noise (0) to data (1), ours the other way, and its velocities lead to the data: theirs is -ours.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ldm
from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.guidance import cfg, on_channels
from ldm.likelihood import dormand_prince
from ldm.loss import diffusion_loss
from ldm.networks.dit import position_angles, sincos
from ldm.networks.layers import timestep_embedding
from ldm.parameterization import Prediction
from ldm.process import VP, Cosine, RectifiedFlow
from ldm.samplers import DIFFUSIONS, diffusion_of, reverse_sde, runge_kutta
from ldm.times import linear
from ldm.weights import WEIGHTS

DATA = Path(__file__).parents[1] / "data" / "parity" / "dit"
IO = load_file(DATA / "io.safetensors")
PATHS = {"Linear": RectifiedFlow(), "GVP": Cosine(), "VP": VP(0.1, 20.0)}
WEIGHTED = {"None": "simple", "velocity": "velocity", "likelihood": "vlb"}  # theirs are on the error of eps


def close(found: Tensor, name: str, atol: float) -> None:
    torch.testing.assert_close(found, IO[f"out.{name}"].to(found), rtol=0, atol=atol)


@cache
def bundle(name):
    return ldm.load(DATA / f"{name}.pt")


def cond(name, labels=None):
    return bundle(name).conditioner({"class": IO["in.y"] if labels is None else labels})


def ours(t: Tensor) -> Tensor:
    """Their time (B,) -> ours, fp64."""
    return 1 - t.double()


# Networks.


@torch.no_grad()
def test_dit_and_all_that_is_in_it():
    model, seen = bundle("dit"), {}
    network = model.denoiser.network
    for k, block in enumerate(network.blocks):
        block.register_forward_hook(lambda _, given, out, k=k: seen.update({k: out, f"tokens{k}": given[0]}))
    close(model.denoiser.raw(IO["in.x"], IO["in.t"], cond("dit")), "dit.out", 1e-5)
    close(seen["tokens0"], "dit.tokens0", 1e-5)
    for k in (0, 1):
        close(seen[k][:1], f"dit.block{k}", 1e-5)
    features = timestep_embedding(IO["in.t"], 256)
    close(network.embedders[0].time(features), "dit.t_emb", 1e-5)
    close(cond("dit").vector, "dit.y_emb", 0)
    close(timestep_embedding(IO["in.t01"], 256), "timestep_embedding_256.sit_t01", 1e-6)


def test_gradient_of_dit():
    x = IO["in.x"].clone().requires_grad_()
    out = bundle("dit").denoiser.raw(x, IO["in.t"], cond("dit"))
    (gradient,) = torch.autograd.grad((out * IO["in.grad"]).sum(), x)
    close(gradient, "dit.grad_x", 1e-5 * float(IO["out.dit.grad_x"].abs().max()))


@torch.no_grad()
def test_sit():
    out = bundle("sit").denoiser.raw(IO["in.x"], ours(IO["in.t01"]), cond("sit"))
    close(-out[:, :4], "sit.out", 1e-5)


@pytest.mark.parametrize(("dim", "side"), [(16, 3), (48, 4)])
def test_positions(dim, side):
    close(sincos(position_angles(side, side, dim)), f"pos_embed.{dim}.{side}", 1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("name", "t"), [("dit", [500, 3, 500, 3]), ("sit", [0.2, 0.7, 0.2, 0.7])])
def test_guidance_of_three_channels(name, t):
    """Theirs takes the first half of the batch twice, with classes and without one."""
    model, x = bundle(name), IO["in.x"][:2]
    t = torch.tensor(t[:2]) if name == "dit" else ours(torch.tensor(t[:2]))
    towards, away = bind(model.denoiser, cond(name, [3, 7])), bind(model.denoiser, model.conditioner.null(2))
    scale = float(IO["in.cfg_scale"])
    guess = on_channels(cfg(towards, away, scale), towards, 3)(x, t)
    rest = on_channels(cfg(towards, away, scale), away, 3)(x, t)  # of the half that has no class
    theirs = IO[f"out.{name}.cfg"].chunk(2)
    if name == "dit":
        for found, expected, half in ((guess, theirs[0], cond(name, [3, 7])), (rest, theirs[1], model.conditioner.null(2))):
            torch.testing.assert_close(found.eps, expected[:, :4], rtol=0, atol=1e-5)
            torch.testing.assert_close(model.denoiser(x, t, half).var, expected[:, 4:], rtol=0, atol=1e-5)
    else:
        for found, expected in ((guess, theirs[0]), (rest, theirs[1])):
            torch.testing.assert_close(found.x0 - found.eps, expected[:, :4], rtol=0, atol=1e-5)


@torch.no_grad()
def test_generate_guides_three_channels():
    """The same through Bundle.generate, whose checkpoint says so: what a sampler is given at its first step."""
    model, x, seen = bundle("sit"), IO["in.x"][:2], []
    assert model.sampling["guidance"] == {"scale": 4.0, "channels": 3}
    model.generate({"class": [3, 7]}, x_T=x, times=[0.8, 0.3], steps=None, sampler="euler",
                   callback=lambda step, t, x, guess: seen.append(guess))  # fmt: skip
    model.generate({"class": [3, 7]}, x_T=x, times=[0.3, 0.1], steps=None, sampler="euler",
                   callback=lambda step, t, x, guess: seen.append(guess))  # fmt: skip
    expected = IO["out.sit.cfg"]  # at t = .2, .7
    torch.testing.assert_close((seen[0].x0 - seen[0].eps)[:1], expected[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close((seen[1].x0 - seen[1].eps)[1:], expected[1:2], rtol=0, atol=1e-5)


# Paths and losses.


def wide(c: Tensor) -> Tensor:
    return c.view(-1, 1, 1, 1)


class Says(torch.nn.Module):
    """Answers with what it is given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, time, cond):
        return self.answer


@pytest.mark.parametrize("path", PATHS)
def test_paths(path):
    process, t = PATHS[path], ours(IO["in.u"])
    x1, x0 = IO["in.x1"].double(), IO["in.x0"].double()
    alpha, sigma, alpha_rate, sigma_rate = (*process.exact(t), *process.rates(t))
    atol = 1e-4 if path == "VP" else 1e-5  # slopes of up to 10, in fp32
    x_t = wide(alpha) * x1 + wide(sigma) * x0
    if path == "GVP":
        close(torch.stack([alpha, -alpha_rate, sigma, -sigma_rate]), "path.GVP.alpha_dalpha_sigma_dsigma", 1e-6)
    else:
        close(x_t, f"path.{path}.xt", 1e-5)
        close(-(wide(alpha_rate) * x1 + wide(sigma_rate) * x0), f"path.{path}.ut", atol)
    own = sigma * (sigma_rate - sigma * alpha_rate / alpha)
    close(own, f"path.{path}.drift_var", 1e-4 * float(IO[f"out.path.{path}.drift_var"].max()))
    theirs = IO[f"out.path.{path}.drift_mean"]
    close(wide(alpha_rate / alpha) * x_t, f"path.{path}.drift_mean", 1e-4 * float(theirs.abs().max()))
    if path == "GVP":  # the score of a velocity
        said = Says(-(wide(-alpha_rate) * x1 + wide(-sigma_rate) * x0).float())
        score = -Denoiser(said, process, "velocity")(x_t.float(), t, Cond()).eps / wide(sigma)
        theirs = IO[f"out.path.{path}.score_from_velocity"]
        close(score, f"path.{path}.score_from_velocity", 1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", DIFFUSIONS)
def test_diffusions(path, form):
    theirs = {"sbdm": "SBDM", "increasing_decreasing": "inccreasing-decreasing"}.get(form, form)
    found = torch.tensor([diffusion_of(form, PATHS[path], t, norm=1.5) for t in ours(IO["in.u"]).tolist()])
    expected = IO[f"out.path.{path}.diffusion.{theirs}"]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in IO if name.startswith("out.loss.") and name.endswith(tuple(WEIGHTED))])
def test_losses(name):
    """The network of the flow, told what each path says that it is: its last layer turned back where it is no velocity."""
    _, _, path, prediction, weight = name.split(".")
    low, high = IO[f"out.loss.{path}.{prediction}.t_range"].tolist()
    process, sign = PATHS[path], 1 if prediction == "velocity" else -1
    network = bundle("sit").denoiser.network
    says = {"velocity": "velocity", "noise": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(sigma)),
            "score": lambda alpha, sigma: (torch.zeros_like(alpha), -1 / sigma)}[prediction]
    denoiser = Denoiser(lambda_network(lambda *given: sign * network(*given)[:, :4]), process, "velocity")
    denoiser.parameterization = says  # which is refused where it has to name x0 at pure noise
    t = ours(IO["in.u"].double() * (high - low) + low)
    weigh = "uniform" if prediction == "velocity" else WEIGHTED[weight]
    # our bound is that from t_min on, theirs of the whole way
    factor = process.t_max / (process.t_max - process.t_min) if weigh == "vlb" else 1.0
    loss = factor * diffusion_loss(denoiser, IO["in.x1"], cond("sit"), t, IO["in.x0"], WEIGHTS[weigh])
    torch.testing.assert_close(loss, IO[name], rtol=1e-4, atol=1e-5)
    if prediction == "velocity":
        x_t = process.add_noise(IO["in.x1"], IO["in.x0"], t)
        close(-denoiser.raw(x_t, t, cond("sit")), f"loss.{path}.velocity.pred", 1e-5)


class lambda_network(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.forward = call


# Samples.


def denoise():
    return bind(bundle("sit").denoiser, cond("sit"))


@torch.no_grad()
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sde(method):
    """11 steps with noise to t = 1 - 0.04, and one without."""
    times = torch.cat([ours(torch.linspace(0, 0.96, 12, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64)])
    found = reverse_sde(denoise(), IO["in.x0"], times, PATHS["Linear"], method=method, diffusion="linear",
                        noise=lambda step, shape: IO["in.sde_noise"][step])  # fmt: skip
    close(found, f"sde.sit.linear.{method.capitalize()}.Mean.n12", 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["euler", "heun2", "midpoint", "heun3"])
def test_ode(method):
    path = []
    found = runge_kutta(denoise(), IO["in.x0"], linear(PATHS["Linear"], 10), PATHS["Linear"], method=method, to_the_end=True,
                        callback=lambda step, t, x, guess: path.append(x))  # fmt: skip
    expected = IO[f"out.ode.sit.{method}.11"]
    if expected.ndim == 5:
        torch.testing.assert_close(torch.stack([*path, found]), expected, rtol=0, atol=1e-4)
    else:
        close(found, f"ode.sit.{method}.11", 1e-4)


@torch.no_grad()
def test_ode_from_data_to_noise():
    found = runge_kutta(denoise(), IO["in.x1"], linear(PATHS["Linear"], 10).flip(0), PATHS["Linear"], method="euler")
    close(found, "ode.sit.euler.11.reverse", 1e-4)


@torch.no_grad()
def test_ode_with_steps_of_its_own():
    """Theirs has steps of a relative tolerance of 1e-3: it is that far from the solution, which ours has come to."""
    found = runge_kutta(denoise(), IO["in.x0"], linear(PATHS["Linear"], 10), PATHS["Linear"], method="rk4", to_the_end=True)
    fine = runge_kutta(denoise(), IO["in.x0"], linear(PATHS["Linear"], 20), PATHS["Linear"], method="rk4", to_the_end=True)
    torch.testing.assert_close(found, fine, rtol=0, atol=1e-5)
    torch.testing.assert_close(fine, IO["out.ode.sit.dopri5.5"], rtol=1e-3, atol=1e-3)


# An exact mixture of Gaussians, fp64.


def mixture(x: Tensor, t: Tensor) -> Prediction:  # (B,1,2,2), (B,)
    means, stds, weights = (IO[f"in.gm.{name}"] for name in ("means", "stds", "weights"))  # (K,D), (K,), (K,)
    alpha, sigma = (c.view(-1, 1, 1) for c in PATHS["Linear"].exact(t.double()))
    spread = (alpha * stds[None, :, None]).square() + sigma**2  # (B,K,1)
    away = x.flatten(1)[:, None] - alpha * means  # (B,K,D)
    log = weights.log() - away.square().sum(-1) / (2 * spread[..., 0]) - means.shape[1] / 2 * spread[..., 0].log()
    share = log.softmax(-1)[..., None]
    x0 = (share * (means + alpha * stds[:, None] ** 2 / spread * away)).sum(1)
    eps = (share * (sigma / spread * away)).sum(1)
    return Prediction(x0.view_as(x), eps.view_as(x))


@pytest.mark.parametrize("name", [name for name in IO if name.startswith("out.gm.") and name.endswith(".final")])
def test_solvers_on_a_mixture(name):
    _, _, method, points, _ = name.split(".")
    found = runge_kutta(mixture, IO["in.gm.x0"], linear(PATHS["Linear"], int(points) - 1), PATHS["Linear"], method=method,
                        to_the_end=True)  # fmt: skip
    torch.testing.assert_close(found, IO[name], rtol=0, atol=1e-6)
    error = (found - IO["out.gm.exact"]).square().mean().sqrt()
    torch.testing.assert_close(error, IO[name.replace("final", "rmse")], rtol=1e-3, atol=1e-7)


def test_velocity_of_a_mixture():
    x = IO["in.gm.x0"]
    for t, expected in zip(torch.tensor([0.0, 0.3, 0.9, 1.0]), IO["out.gm.velocity"], strict=True):
        guess = mixture(x, ours(t).expand(len(x)))
        torch.testing.assert_close(guess.x0 - guess.eps, expected, rtol=0, atol=1e-9)


def test_the_solution_on_a_mixture():
    x = IO["in.gm.x0"]

    def field(share: Tensor, state: Tensor) -> Tensor:  # from noise to data
        guess = mixture(state.view_as(x), 1 - share)
        return (guess.x0 - guess.eps).flatten(1)

    found = dormand_prince(field, x.flatten(1), 0.0, 1.0, 1e-9).view_as(x)
    torch.testing.assert_close(found, IO["out.gm.exact"], rtol=0, atol=1e-6)
