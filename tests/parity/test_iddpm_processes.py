"""Against numbers computed with guided-diffusion: schedules, respacing, posteriors, p(x_{t-1} | x_t) for every mean and
variance that a network may say. Its linear schedule ends at betas scaled by 1000 / T."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.betas import spaced
from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.process import DDPM, Discrete, log_variance, respaced

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "parity" / "iddpm_core" / "io.safetensors")
MEANS = {"eps": "noise", "x_start": "data", "previous_x": "previous"}
KINDS = {"fixed_small": "small", "fixed_large": "large", "learned": "learned", "learned_range": "learned_range"}


def out(key: str) -> torch.Tensor:
    return REFERENCE[f"out.{key}"]


def process_of(schedule: str, respacing: str, steps: int = 1000) -> Discrete:
    ends = dict(start=0.1 / steps, end=20 / steps) if schedule == "linear" else {}
    whole = DDPM(schedule, steps, **ends)
    return whole if respacing == str(steps) else respaced(whole, respacing)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max()) <= tolerance


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_betas(schedule, steps):
    assert torch.allclose(process_of(schedule, str(steps), steps).betas, out(f"betas.{schedule}.{steps}"), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("steps", "spec"), [(1000, "1"), (1000, "ddim50"), (300, "10,15,20"), (4000, "100")])
def test_which_steps_are_kept(steps, spec):
    assert spaced(steps, spec) == out(f"space.{steps}.{spec.replace(',', '_')}").tolist()


@pytest.mark.parametrize("name", sorted({key.removeprefix("out.sched.").rsplit(".", 1)[0] for key in REFERENCE
                                         if key.startswith("out.sched.")}))
def test_tables_and_posteriors(name):
    process = process_of(*name.split("."))
    t = torch.arange(len(process.alpha_bar), dtype=torch.float64)
    step = process.posterior(t, t - 1)
    ours = {
        "betas": process.betas, "alphas_cumprod": process.alpha_bar, "timestep_map": process.time(t),
        "alphas_cumprod_prev": process.exact(t - 1)[0] ** 2, "posterior_variance": step.variance,
        "alphas_cumprod_next": torch.cat([process.alpha_bar[1:], torch.zeros(1)]),
        "posterior_log_variance_clipped": log_variance(step, floor=process.posterior(1, 0).variance),
        "posterior_mean_coef1": step.x0, "posterior_mean_coef2": step.xt,
    }  # fmt: skip
    for key, found in ours.items():
        assert torch.allclose(found, out(f"sched.{name}.{key}").double(), rtol=1e-9, atol=1e-18), key


@pytest.mark.parametrize("respacing", ["25", "ddim25", "1000"])
def test_what_the_network_is_told(respacing):
    told = process_of("linear", respacing).time(REFERENCE["in.t25"])
    for rescale in (True, False):  # by 1000 / T, which is 1 here
        assert torch.equal(told.double(), out(f"model_t.{respacing}.rescale_{rescale}"))


@pytest.mark.parametrize("key", sorted(key for key in REFERENCE if key.startswith(("out.q_sample.", "out.q_posterior."))))
def test_forward_process_and_its_posterior(key):
    _, what, schedule, *part = key.split(".")
    process, t = process_of(schedule, "1000"), REFERENCE["in.t"].double().view(-1, 1, 1, 1)
    step, (alpha, sigma) = process.posterior(t, t - 1), process.exact(t)
    found = {
        "q_sample": alpha * REFERENCE["in.x_start"] + sigma * REFERENCE["in.noise"],
        "mean": step.x0 * REFERENCE["in.x_start"] + step.xt * REFERENCE["in.x_t"], "variance": step.variance,
        "log_variance": log_variance(step, floor=process.posterior(1, 0).variance),
    }[part[0] if part else what]  # fmt: skip
    assert near(found, REFERENCE[key], 1e-6)


class Says(nn.Module):
    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x, time, cond):
        return self.answer


@pytest.mark.parametrize("respacing", ["1000", "25"])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("kind", KINDS)
def test_distribution_of_the_next_step(respacing, mean, kind):
    prefix = f"pmv.linear.{respacing}.{mean}.{kind}."
    expected = {key.removeprefix(f"out.{prefix}"): value for key, value in REFERENCE.items() if key.startswith(f"out.{prefix}")}
    process, x_t = process_of("linear", respacing), REFERENCE["in.x_t"]
    answer = REFERENCE["in.model_output_learned" if kind == "learned" else "in.model_output"]
    t, learned = REFERENCE["in.t" if respacing == "1000" else "in.t25"], kind.startswith("learned")
    denoiser = Denoiser(Says(answer if learned else answer[:, :3]), process, MEANS[mean], kind if learned else "fixed")
    guess = denoiser(x_t, t, Cond())
    step = process.posterior(t.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1) - 1)
    if "log_variance" in expected:
        variance = log_variance(step, guess.var, KINDS[kind], process.posterior(1, 0).variance)
        assert near(variance, expected["log_variance"], 1e-6)
        exact = step.variance if kind == "fixed_small" else variance.exp()  # 0 at t = 0, where its logarithm is that of t = 1
        assert near(exact, expected["variance"], 1e-5)
    for clip in ("clip", "noclip"):
        x0 = guess.x0.clamp(-1, 1) if clip == "clip" else guess.x0
        if f"{clip}.pred_xstart" in expected:
            assert near(x0, expected[f"{clip}.pred_xstart"], 1e-5)
        if f"{clip}.mean" in expected and (mean, clip) != ("previous_x", "clip"):
            assert near(step.x0 * x0 + step.xt * x_t, expected[f"{clip}.mean"], 1e-5)
    if mean == "previous_x":  # theirs is what the network says, of a clipped x0 too
        assert near(step.x0 * guess.x0 + step.xt * x_t, answer[:, :3], 1e-5)
        assert all(torch.equal(value, answer[:, :3]) for key, value in expected.items() if key.endswith(".mean"))
