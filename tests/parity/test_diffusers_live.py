"""diffusers' schedulers run here, with options that are not recorded, against what of ours reproduces them."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers_replay import own_levels, prepared, replay
from safetensors.torch import load_file

from ldm.parameterization import Prediction
from ldm.process import DDPM, RectifiedFlow
from ldm.samplers import ddim_inversion

pytest.importorskip("diffusers")
from diffusers_runs import run  # noqa: E402

FOLDER = Path(__file__).parents[1] / "data" / "parity" / "diffusers_schedulers"
DATA = load_file(FOLDER / "io.safetensors")
INPUTS = {key.removeprefix("in."): value for key, value in DATA.items() if key.startswith("in.")}
ABOUT = json.loads((FOLDER / "configs.json").read_text())
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
LINSPACE, TRAILING = {**SD, "timestep_spacing": "linspace"}, {**SD, "timestep_spacing": "trailing"}
NO_CLIP = {"clip_sample": False}
MORE = [  # kind, options, options of step(), steps
    *(("DDIM", {**spacing, **NO_CLIP}, {"eta": eta}, n) for spacing in (LINSPACE, TRAILING) for eta in (0.0, 0.7) for n in (7, 30)),
    ("DDIM", {**LEADING, "clip_sample": True, "clip_sample_range": 0.8}, {"use_clipped_model_output": True}, 7),
    ("DDIM", {"beta_schedule": "linear", "num_train_timesteps": 400, **NO_CLIP}, {}, 20),
    ("DDPM", {"beta_schedule": "linear", "num_train_timesteps": 500, **NO_CLIP}, {}, 25),
    ("DDPM", {"beta_schedule": "sigmoid", **NO_CLIP}, {}, 25),
    ("DDPM", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large", **NO_CLIP}, {}, 40),
    ("DDPM", {**TRAILING, "variance_type": "learned_range", **NO_CLIP}, {}, 12),
    *(("PNDM", {**SD, "skip_prk_steps": skip, "steps_offset": 1, "set_alpha_to_one": True}, {}, n)
      for skip, n in ((True, 5), (True, 8), (True, 40), (False, 5), (False, 25))),  # where T // n is odd, their middles are two
    ("PNDM", {**SD, "skip_prk_steps": False, "steps_offset": 1, "prediction_type": "v_prediction"}, {}, 10),
    *(("DPMSolverMultistep", {**spacing, "algorithm_type": algorithm, "solver_order": order, "solver_type": solver,
                              "final_sigmas_type": "zero" if algorithm.endswith("++") else "sigma_min"}, {}, n)
      for spacing in (LINSPACE, TRAILING) for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
      for order in (2, 3) for solver, n in (("midpoint", 7), ("heun", 20)) if (algorithm, order) != ("sde-dpmsolver", 3)),
    *(("DPMSolverMultistep", {**LEADING, "use_beta_sigmas": True}, {}, n) for n in (6, 20)),
    *(("DPMSolverSinglestep", {**SD, "algorithm_type": algorithm, "solver_order": order, "solver_type": solver,
                               "final_sigmas_type": "zero" if algorithm.endswith("++") else "sigma_min"}, {}, n)
      for algorithm in ("dpmsolver++", "dpmsolver") for order in (1, 2, 3) for solver in ("midpoint", "heun") for n in (9, 10, 11)),
    ("DPMSolverSinglestep", {**SD, "use_karras_sigmas": True}, {}, 9),
    *(("UniPCMultistep", {**spacing, "solver_order": order, "solver_type": "bh1", "final_sigmas_type": "sigma_min",
                          "predict_x0": predict_x0}, {}, n)
      for spacing in (LINSPACE, TRAILING) for order in (1, 2, 3) for predict_x0, n in ((True, 7), (False, 20))),
    ("UniPCMultistep", {**SD, "lower_order_final": False, "solver_order": 3, "final_sigmas_type": "sigma_min"}, {}, 12),
    *(("DEISMultistep", {**spacing, "solver_order": order}, {}, n)
      for spacing in (LINSPACE, TRAILING) for order in (1, 2, 3) for n in (7, 20)),
    *((kind, {**spacing, **levels}, {}, n) for kind in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete")
      for spacing in (LINSPACE, TRAILING) for levels in ({}, {"use_karras_sigmas": True}) for n in (7, 30)),
    ("EulerDiscrete", {**LINSPACE, "interpolation_type": "log_linear"}, {}, 9),
    ("EulerDiscrete", {**LINSPACE, "use_beta_sigmas": True}, {}, 9),
    ("EulerDiscrete", {**LINSPACE, "use_exponential_sigmas": True}, {}, 9),
    ("EulerAncestralDiscrete", LINSPACE, {}, 7),
    ("KDPM2Discrete", LINSPACE, {}, 7),
    ("KDPM2AncestralDiscrete", TRAILING, {}, 7),
    *(("LCM", {**SD, **NO_CLIP}, {}, n) for n in (1, 3, 8)),
    *(("TCD", {**SD, **NO_CLIP, "prediction_type": name}, {"eta": gamma}, n)
      for name in ("epsilon", "v_prediction") for gamma, n in ((0.0, 3), (0.5, 8), (1.0, 4))),
    *(("FlowMatchEulerDiscrete", {"shift": shift, **levels}, {}, 7) for shift in (1.0, 2.5)
      for levels in ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "stochastic_sampling": True}, {}, 6),
    ("FlowMatchHeunDiscrete", {"shift": 2.0}, {}, 9),
    ("EDMDPMSolverMultistep", {"solver_order": 2, "solver_type": "heun"}, {}, 9),
    ("EDMEuler", {"sigma_schedule": "exponential"}, {"s_churn": 3.0, "s_noise": 1.01}, 9),
]  # fmt: skip


def same(case):
    process, times, sampler = prepared(case)
    if "sigmas" in case.tensors:
        alpha, sigma = process.exact(times)
        found, expected = sigma if isinstance(process, RectifiedFlow) else sigma / alpha, own_levels(case)[: len(times)]
        assert torch.allclose(found[: len(expected)], expected, rtol=2e-5, atol=1e-12)
    asked, errors = replay(case, sampler, times, process)
    errors = errors[-1:] if "s_churn" in case.step else errors  # the network sees x after churn, theirs is x before
    weights_are_differences = case.kind == "DEISMultistep" and case.config.get("solver_order") == 3  # in fp32
    assert max(errors) < (1e-3 if weights_are_differences else 3e-5), errors
    assert len(asked) == len(case.out("model_output")) or times.flatten()[-1] == process.t_min


@pytest.mark.parametrize("name", [name for name in ABOUT if f"out.{name}.traj" not in DATA
                                  and not re.match(r"PNDM\.linspace|FlowMatchEuler\.dynamic_exponential_flux", name)])  # fmt: skip
def test_of_the_recorded_kinds(name):
    about = ABOUT[name]
    same(run(about["cls"].removesuffix("Scheduler"), about["config"], about["step"], int(name.rpartition(".n")[2]), INPUTS,
             **about["set_timesteps"]))


@pytest.mark.parametrize("k", range(len(MORE)), ids=[f"{kind}-{n}-{k}" for k, (kind, _, _, n) in enumerate(MORE)])
def test_with_other_options(k):
    kind, config, step, n = MORE[k]
    same(run(kind, config, step, n, INPUTS))


@pytest.mark.parametrize("to_one", [True, False])
def test_inversion(to_one):
    """Told the time where a step ends, and at the first t = 1 the data, which are at alpha = 1 or at that of t = 0."""
    config = {**LEADING, **NO_CLIP, "set_alpha_to_one": to_one}
    case = run("DDIMInverse", config, {}, 10, INPUTS)
    times = torch.tensor([-1.0 if to_one else 0.0, *case.tensors["timesteps"].tolist()]).double()
    process, outputs, seen = DDPM(), iter(case.out("model_output")), []

    def denoise(x, t):
        seen.append((x, int(t[0])))
        eps = next(outputs)
        return Prediction(x, eps)

    last = ddim_inversion(denoise, case.out("traj")[0], times, process, asks="end")
    states = case.out("traj")
    found = torch.stack([*(x for x, _ in seen), last])
    assert [t for _, t in seen] == case.tensors["timesteps"].tolist() and (found - states).abs().max() < 1e-5 * states.abs().max()
