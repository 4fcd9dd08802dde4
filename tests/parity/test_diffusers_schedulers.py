"""Against diffusers' schedulers: our lists of times have their noise levels, our samplers walk through their states.

Every recorded case is run on the process it was recorded on, over the list of times and by the sampler that reproduce it
(see diffusers_replay).
"""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers_replay import Case, own_levels, prepared, replay, said, told
from safetensors.torch import load_file

from ldm.parameterization import PARAMETERIZATIONS, target
from ldm.process import DDPM, RectifiedFlow
from ldm.samplers import ADAMS_BASHFORTH, ddim
from ldm.weights import MinSNR

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "diffusers_schedulers"
DATA = load_file(FOLDER / "io.safetensors")
ABOUT = json.loads((FOLDER / "configs.json").read_text())
LINEAR = DDPM("scaled_linear")  # 0.00085 .. 0.012, the fixture's
# name of a case (whole) -> why it is not reproduced here
NOT_COVERED = {
    r"PNDM\.linspace\..*": "its first step is tried from t = 999 to 899, told t = 888, and made from 988 to 888; "
                           "test_multistep_slopes_of_linspace has the others one by one",
}  # fmt: skip


def case_of(name: str) -> Case:
    about, prefix = ABOUT[name], f"out.{name}."
    return Case(
        about["cls"].removesuffix("Scheduler"), about["config"], about["step"] | about["set_timesteps"],
        int(name.rpartition(".n")[2]), {key.removeprefix(prefix): value for key, value in DATA.items() if key.startswith(prefix)},
        DATA["in.noise"], DATA["in.var_channel"],
    )  # fmt: skip


CASES = {name: case_of(name) for name in ABOUT if f"out.{name}.traj" in DATA}
COVERED = [name for name in CASES if not any(re.fullmatch(pattern, name) for pattern in NOT_COVERED)]


@pytest.mark.parametrize("name", [name for name in COVERED if "sigmas" in CASES[name].tensors])
def test_noise_levels(name):
    process, times, _ = prepared(CASES[name])
    alpha, sigma = process.exact(times)
    found, expected = sigma if isinstance(process, RectifiedFlow) else sigma / alpha, own_levels(CASES[name])[: len(times)]
    finite = expected.isfinite()  # theirs are of fp32 tables: 1 - alpha_bar at t = 0 has five digits
    assert torch.equal(finite, found.isfinite()) and torch.allclose(found[finite], expected[finite], rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("name", COVERED)
def test_trajectories(name):
    case = CASES[name]
    process, times, sampler = prepared(case)
    asked, errors = replay(case, sampler, times, process)
    if "s_churn" in case.step:
        errors = errors[-1:]  # the network sees x after churn, recorded is x before
    # theirs is fp32: weights of order 3 are small differences, zero terminal SNR begins at sigma = 4096
    assert max(errors) < (1e-4 if name.startswith("DEIS.order3") else 2e-5 if "zero_snr" in name or "sde" in name else 1e-5)
    assert len(asked) == len(case.out("model_output")) or times.flatten()[-1] == process.t_min  # no call for steps to where one is


@pytest.mark.parametrize("name", COVERED)
def test_what_the_network_is_told(name):
    case = CASES[name]
    process, times, sampler = prepared(case)
    found, expected = told(case, process, replay(case, sampler, times, process)[0])
    rounded = case.tensors["timesteps"].dtype == torch.int64 and (found != found.round()).any()
    churned = "s_churn" in case.step  # what is recorded is told before the noise is raised
    assert churned or torch.allclose(found, expected, rtol=1e-4, atol=1.0 if rounded else 2e-3)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("PNDM.linspace")])
def test_multistep_slopes_of_linspace(name):
    """Adams-Bashforth of the recorded eps, in DDIM's step from t back by 1000 // n; from the second step on."""
    case = CASES[name]
    states, outputs, times = case.out("traj"), case.out("model_output"), case.out("timesteps")
    past = [outputs[0]]
    for k, t in list(enumerate(times.tolist()))[2:-1]:  # the last is from t = 0 to t = 0
        past = [outputs[k], *past][:4]
        eps = sum(c * old for c, old in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
        steps = torch.tensor([[t, max(t - 1000 // case.n, 0)]], dtype=torch.float64)
        found = ddim(lambda x, t, eps=eps: said(eps, x, *(float(c[0]) for c in LINEAR.exact(t.double())), case), states[k], steps,
                     LINEAR)  # noqa: B023  # fmt: skip
        assert (found - states[k + 1]).abs().max() < 1e-5 * states[k + 1].abs().max()


def test_what_is_not_covered_is_known():
    """Every pattern names a case; nothing else is left out."""
    assert all(any(re.fullmatch(pattern, name) for name in ABOUT) for pattern in NOT_COVERED)
    assert len(CASES) - len(COVERED) == 2 and len(CASES) > 190


@pytest.mark.parametrize("key", [key for key in DATA if key.startswith("out.min_snr.")])
def test_min_snr_weights(key):
    """2303.09556. At zero SNR their weight of eps is 0 / 0."""
    process = DDPM("scaled_linear", zero_terminal="zero_snr" in key)
    alpha, sigma = process.exact(DATA["in.snr_t"].double())
    name = {"epsilon": "noise", "v_prediction": "v"}[key.rpartition(".")[2]]
    found, expected = MinSNR(5.0)(alpha, sigma, *PARAMETERIZATIONS[name](alpha, sigma)), DATA[key].double()
    known = ~expected.isnan()
    assert torch.equal(known, (alpha > 0) | torch.tensor(name == "v")) and found.isfinite().all()
    assert torch.allclose(found[known], expected[known], rtol=5e-5, atol=1e-12)


def test_tables():
    alpha, sigma = LINEAR.exact(DATA["in.snr_t"].double())
    assert torch.allclose((alpha / sigma).square(), DATA["out.snr.sd"].double(), rtol=5e-5)
    assert torch.allclose(LINEAR.alpha_bar, DATA["out.table.alphas_cumprod"].double(), rtol=2e-5)
    zero = DDPM("scaled_linear", zero_terminal=True)
    assert torch.allclose(zero.betas, DATA["out.table.zero_snr.betas"].double(), rtol=5e-5, atol=2e-6)
    for name in ("linear", "sigmoid"):
        assert torch.allclose(DDPM(name).betas, DATA[f"out.table.{name}.betas"].double(), rtol=2e-5)


@pytest.mark.parametrize(("key", "parameterization"), [("add_noise.zero_snr", None), ("get_velocity.sd", "v")])
def test_noising_and_velocity(key, parameterization):
    process, t = DDPM("scaled_linear", zero_terminal="zero_snr" in key), torch.tensor([0.0, 1.0, 500.0, 999.0])
    x0, eps = DATA["in.x_T"], DATA["in.noise"][0]
    found = process.add_noise(x0, eps, t)
    if parameterization:
        found = target(x0, eps, *PARAMETERIZATIONS[parameterization](*(c.view(-1, 1, 1, 1) for c in process.coefficients(t))))
    assert torch.allclose(found, DATA[f"out.{key}"], atol=2e-6)
