"""Against numbers computed with CompVis' latent-diffusion: tables, q(x_t | x0), posterior, DDIM lists, embeddings.

Their "linear" is our scaled_linear, their "sqrt_linear" our linear.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.networks.layers import timestep_embedding
from ldm.parameterization import PARAMETERIZATIONS, Prediction, solve
from ldm.process import DDPM, Table, log_variance
from ldm.samplers import ddim
from ldm.times import compvis, quadratic
from ldm.weights import VLB

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "schedules.safetensors")
NAMES = {"linear": "scaled_linear", "sqrt_linear": "linear", "sqrt": "sqrt", "cosine": "cosine"}
TABLES = sorted(key.removeprefix("out.").removesuffix(".betas_f64") for key in REFERENCE if key.endswith("betas_f64"))
USUAL = "linear_1000_0.00085_0.012"
LISTS = {"uniform": compvis, "quad": quadratic}
TIMES = REFERENCE["in.t"]  # 0, 1, 999 of the first table
EVERY = pytest.mark.parametrize("table", TABLES)
EVERY_LIST = pytest.mark.parametrize(("kind", "n"), [(kind, n) for kind in LISTS for n in (1, 4, 10, 20, 30, 50, 200, 250)])


def out(key: str) -> torch.Tensor:
    return REFERENCE[f"out.{key}"]


def process_of(table: str) -> DDPM:
    """linear_1000_0.00085_0.012: their schedule, steps, first and last beta (cosine keeps its own)."""
    name, steps, start, end = table.rsplit("_", 3)
    ends = {} if name == "cosine" else dict(start=float(start), end=float(end))
    return DDPM(NAMES[name], int(steps), **ends)


def near(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-6, atol: float = 1e-37) -> bool:
    """Relative to each number, for many are next to 0; theirs are rounded to fp32."""
    return torch.allclose(found.double(), expected.double(), rtol=rtol, atol=atol)


def coefficients(process: DDPM, times: torch.Tensor, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> factor of eps and standard deviation of the noise in every step (N,): read off a walk that begins at 0 and sees
    x0 = 0 always, one sample eps = 1 and the other noise = 1."""
    eps, z = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    seen = []

    def denoise(x, t):
        seen.append(x)
        return Prediction(torch.zeros_like(x), eps)

    last = ddim(denoise, torch.zeros_like(eps), times, process, eta=eta, noise=lambda step, shape: z)
    return tuple(torch.stack([*seen[1:], last])[:, :, 0].unbind(1))


def test_there_are_tables():
    assert len(TABLES) == 7


@EVERY
def test_betas_in_double_precision(table):
    expected = out(f"{table}.betas_f64")
    assert ((process_of(table).betas - expected).abs() <= 1e-12 * expected).all()


@EVERY
def test_buffers(table):
    process = process_of(table)
    steps = torch.arange(len(process.alpha_bar), dtype=torch.float64)
    alpha, sigma = process.exact(steps)
    before, _ = process.exact(steps - 1)
    ours = {
        "betas": process.betas, "alphas_cumprod": process.alpha_bar, "alphas_cumprod_prev": before**2,
        "sqrt_alphas_cumprod": alpha, "sqrt_one_minus_alphas_cumprod": sigma, "log_one_minus_alphas_cumprod": 2 * sigma.log(),
        "sqrt_recip_alphas_cumprod": 1 / alpha, "sqrt_recipm1_alphas_cumprod": sigma / alpha,
    }  # fmt: skip
    for name, found in ours.items():
        rounded = 1e-15 if name.startswith("log") else 1e-37  # 1 - alpha_bar is 1 up to rounding at the end of "sqrt"
        assert near(found, out(f"{table}.{name}"), atol=rounded), name


@EVERY
def test_posterior(table):
    """Mean and variance of q(x_{t-1} | x_t, x0)."""
    process = process_of(table)
    t = torch.arange(len(process.alpha_bar), dtype=torch.float64)
    step = process.posterior(t, t - 1)
    assert near(step.variance, out(f"{table}.posterior_variance"), atol=1e-17)
    assert near(log_variance(step), out(f"{table}.posterior_log_variance_clipped"))  # of 0, 1e-20
    assert near(step.xt, out(f"{table}.posterior_mean_coef2"), atol=1e-12)
    assert near(step.x0, out(f"{table}.posterior_mean_coef1"), atol=1e-12)


@EVERY
def test_posterior_of_a_share(table):
    """Their v_posterior = 0.3."""
    process = process_of(table)
    t = torch.arange(len(process.alpha_bar), dtype=torch.float64)
    variance = log_variance(process.posterior(t, t - 1), kind=0.3).exp()
    assert near(variance, out(f"{table}.posterior_variance_v0.3"), atol=1e-17)


@EVERY
def test_weights_of_the_bound(table):
    """On the error of eps, once a step; theirs divides fp32 differences. Those of x0 are a slip: 0.5 sqrt(alpha_bar) over
    2 - alpha_bar, where 2 (1 - alpha_bar) is meant; they are not ours."""
    process = process_of(table)
    t = torch.arange(len(process.alpha_bar), dtype=torch.float64)
    alpha, sigma = process.exact(t)
    found = VLB().at(process, t)(alpha, sigma, *PARAMETERIZATIONS["noise"](alpha, sigma)) / len(t)
    assert near(found, out(f"{table}.lvlb_weights"), rtol=5e-3)
    if f"out.{table}.lvlb_weights_x0" in REFERENCE:
        assert near((0.5 * alpha / (2 - alpha**2))[1:], out(f"{table}.lvlb_weights_x0")[1:], atol=1e-23)


@EVERY
def test_tables_of_numbers_are_the_same_process(table):
    process = process_of(table)
    for given in (Table(betas=process.betas.tolist()), Table(alpha_bar=process.alpha_bar.tolist())):
        assert torch.allclose(given.alpha_bar, process.alpha_bar, rtol=1e-10, atol=0)


def test_forward_process():
    process, x0 = process_of(USUAL), REFERENCE["in.x0"]
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.coefficients(TIMES))
    assert near(process.add_noise(x0, REFERENCE["in.noise"], TIMES), out("q_sample"), atol=1e-6)
    assert near(alpha * x0, out("q_mean"))
    assert near(sigma.flatten() ** 2, out("q_variance"), atol=1e-7)  # theirs is 1 - alpha_bar in fp32
    assert near((sigma.flatten() ** 2).log(), out("q_log_variance"), atol=1e-6)


def test_data_from_noise():
    process, x_t, noise = process_of(USUAL), REFERENCE["in.x_t"], REFERENCE["in.noise"]
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.coefficients(TIMES))
    found = solve(x_t, noise, alpha, sigma, *PARAMETERIZATIONS["noise"](alpha, sigma))
    assert near(found.x0, out("predict_start_from_noise"), atol=1e-5)
    assert near(found.eps, noise, atol=1e-6)


def test_posterior_of_pictures():
    process, x0, x_t, t = process_of(USUAL), REFERENCE["in.x0"], REFERENCE["in.x_t"], TIMES.view(-1, 1, 1, 1)
    step = process.posterior(t, t - 1)
    assert near(step.x0 * x0 + step.xt * x_t, out("q_posterior_mean"), atol=1e-6)
    assert near(step.variance.flatten(), out("q_posterior_variance"))
    assert near(log_variance(step).flatten(), out("q_posterior_log_variance_clipped"))


@EVERY_LIST
def test_ddim_lists(kind, n):
    """Theirs ascend. Where a time is there more than once, the steps between do nothing; ours has it once."""
    expected, process = out(f"ddim.{kind}.{n}.timesteps"), process_of(USUAL)
    once = torch.cat([torch.tensor([True]), expected.diff() > 0])
    times = LISTS[kind](process, n)
    assert torch.equal(times[:-1].flip(0), expected[once].double())
    assert kind == "quad" or once.all()
    squares = process.exact(times)[0] ** 2
    assert near(squares[:-1].flip(0), out(f"ddim.{kind}.{n}.alphas")[once])
    assert near(squares[1:].flip(0), out(f"ddim.{kind}.{n}.alphas_prev")[once])  # the last step ends at t = 0


@EVERY_LIST
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_sigmas(kind, n, eta):
    process, expected = process_of(USUAL), out(f"ddim.{kind}.{n}.eta{eta}.sigmas")
    steps = out(f"ddim.{kind}.{n}.timesteps")
    once = torch.cat([torch.tensor([True]), steps.diff() > 0])
    _, std = coefficients(process, LISTS[kind](process, n), eta)
    assert near(std.flip(0), expected[once], rtol=1e-4)  # theirs is 1 - a / a_prev in fp32
    assert near(torch.zeros(()), expected[~once], atol=1e-3)


def test_a_list_that_reaches_1000_is_refused():
    assert out("ddim.uniform.999.timesteps")[-1] == 1000  # where the reference fails with an IndexError
    with pytest.raises(ValueError, match="begin at t = 1000, the process ends at 999"):
        compvis(process_of(USUAL), 999)


@pytest.mark.parametrize("dim", [32, 33, 320])
def test_timestep_embedding(dim):
    times = torch.tensor([0.0, 1.0, 37.0, 498.7, 999.0])
    # angles reach 999, where the step of fp32 is 6e-5: the last bit of exp, which processors differ in, is as large
    assert torch.allclose(timestep_embedding(times, dim), out(f"timestep_embedding.{dim}"), atol=1e-4)
    assert torch.allclose(timestep_embedding(times[:2], dim), out(f"timestep_embedding.{dim}")[:2], atol=1e-6)


