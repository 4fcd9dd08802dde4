"""Scheduler settings of diffusers, read and written, against diffusers itself with a network that depends on x and time."""

import inspect
import json
import logging
import math
import sys

import pytest
import torch
from torch import nn

from ldm.common.build import build
from ldm.common.files import UserError
from ldm.common.named import pick
from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.guidance import BOUNDS
from ldm.interop.scheduler_configs import write
from ldm.interop.scheduler_settings import CLASSES
from ldm.interop.schedulers import Scheduler, read
from ldm.process import steps_of
from ldm.samplers import SAMPLERS
from ldm.times import make_times

diffusers = pytest.importorskip("diffusers")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
KARRAS, LEADING, TRAILING = ({"use_karras_sigmas": True}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"})
EPS = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
SHORT = {"num_train_timesteps": 300, "beta_end": 0.03}  # diffusers takes seconds for 1000 of this kind
BETAS = {"trained_betas": torch.linspace(0.001, 0.03, 500).tolist(), "num_train_timesteps": 500}
CASES = {  # name -> class, settings
    "DDPM": ("DDPM", SD), "DDPM clip": ("DDPM", {}), "DDPM sigmoid": ("DDPM", {"beta_schedule": "sigmoid"}),
    "DDPM large": ("DDPM", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    "DDPM cosine": ("DDPM", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
    "DDPM large trailing": ("DDPM", TRAILING | {"variance_type": "fixed_large", "clip_sample": False}),
    "DDPM threshold": ("DDPM", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
    "DDIM": ("DDIM", SD | {"set_alpha_to_one": False}), "DDIM clip": ("DDIM", {}), "DDIM table": ("DDIM", BETAS),
    "DDIM zero": ("DDIM", SD | ZERO | TRAILING), "DDIM threshold": ("DDIM", {"thresholding": True}),
    "DDIM linspace": ("DDIM", SD | {"timestep_spacing": "linspace"}), "DDIM trailing": ("DDIM", SD | TRAILING | SHORT),
    "PNDM v": ("PNDM", SD | V | {"skip_prk_steps": True}), "PNDM": ("PNDM", SD | {"skip_prk_steps": True}), "PNDM prk": ("PNDM", SD),
    "LMS": ("LMSDiscrete", SD), "LMS karras": ("LMSDiscrete", SD | KARRAS | LEADING),
    "Euler": ("EulerDiscrete", SD), "Euler leading": ("EulerDiscrete", SD | LEADING), "Euler v": ("EulerDiscrete", SD | V),
    "Euler trailing": ("EulerDiscrete", SD | TRAILING), "Euler zero": ("EulerDiscrete", SD | ZERO | TRAILING),
    "Euler karras": ("EulerDiscrete", SD | LEADING | KARRAS), "Euler table": ("EulerDiscrete", BETAS),
    "Euler exponential": ("EulerDiscrete", SD | LEADING | {"use_exponential_sigmas": True}),
    "Euler beta": ("EulerDiscrete", SD | LEADING | {"use_beta_sigmas": True}),
    "Euler sigma_min": ("EulerDiscrete", SD | LEADING | {"final_sigmas_type": "sigma_min"}),
    "Euler range": ("EulerDiscrete", SD | LEADING | KARRAS | {"sigma_min": 0.1, "sigma_max": 8.0}),
    "CosXL": ("EulerDiscrete", SD | V | LEADING | {"timestep_type": "continuous", "use_exponential_sigmas": True,
                                                   "sigma_min": 0.002, "sigma_max": 120.0}),
    "Euler ancestral": ("EulerAncestralDiscrete", SD | TRAILING),
    "Heun": ("HeunDiscrete", SD | LEADING), "Heun karras": ("HeunDiscrete", SD | KARRAS),
    "Heun clip": ("HeunDiscrete", SD | {"clip_sample": True}),
    "KDPM2": ("KDPM2Discrete", SD | LEADING | SHORT), "KDPM2 ancestral": ("KDPM2AncestralDiscrete", SD | SHORT),
    "DPM": ("DPMSolverMultistep", SD), "DPM trailing": ("DPMSolverMultistep", SD | TRAILING),
    "DPM leading": ("DPMSolverMultistep", SD | LEADING | V), "DPM karras": ("DPMSolverMultistep", SD | KARRAS),
    "DPM lu": ("DPMSolverMultistep", SD | {"use_lu_lambdas": True}),
    "DPM exponential": ("DPMSolverMultistep", SD | {"use_exponential_sigmas": True}),
    "DPM sigma_min": ("DPMSolverMultistep", SD | {"final_sigmas_type": "sigma_min"}),
    "DPM karras sigma_min": ("DPMSolverMultistep", SD | KARRAS | {"final_sigmas_type": "sigma_min"}),
    "DPM 1": ("DPMSolverMultistep", SD | {"solver_order": 1}), "DPM 3": ("DPMSolverMultistep", SD | {"solver_order": 3}),
    "DPM heun": ("DPMSolverMultistep", SD | {"solver_type": "heun"}),
    "DPM sde": ("DPMSolverMultistep", SD | {"algorithm_type": "sde-dpmsolver++"}),
    "DPM sde 1": ("DPMSolverMultistep", SD | {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    "DPM sde 3": ("DPMSolverMultistep", SD | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "DPM eps": ("DPMSolverMultistep", SD | EPS), "DPM eps 3": ("DPMSolverMultistep", SD | EPS | {"solver_order": 3}),
    "DPM eps sde": ("DPMSolverMultistep", SD | EPS | {"algorithm_type": "sde-dpmsolver", "solver_type": "heun"}),
    "single": ("DPMSolverSinglestep", SD), "single 3": ("DPMSolverSinglestep", SD | {"solver_order": 3, "solver_type": "heun"}),
    "single karras": ("DPMSolverSinglestep", SD | KARRAS), "single eps": ("DPMSolverSinglestep", SD | EPS | {"solver_order": 3}),
    "DPM zero": ("DPMSolverMultistep", SD | ZERO | TRAILING),
    "DPM threshold": ("DPMSolverMultistep", {"thresholding": True}),
    "DPM clipped": ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    "DPM flow": ("DPMSolverMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    "UniPC": ("UniPCMultistep", SD), "UniPC karras": ("UniPCMultistep", SD | KARRAS),
    "UniPC 3": ("UniPCMultistep", SD | {"solver_order": 3}), "UniPC P": ("UniPCMultistep", SD | {"disable_corrector": [*range(50)]}),
    "UniPC eps": ("UniPCMultistep", SD | {"predict_x0": False, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    "UniPC flow": ("UniPCMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    "DEIS": ("DEISMultistep", SD), "DEIS karras": ("DEISMultistep", SD | KARRAS),
    "LCM": ("LCM", SD), "LCM v": ("LCM", SD | V), "TCD": ("TCD", SD), "TCD v": ("TCD", SD | V),
    "EDM": ("EDMEuler", {}), "EDM v": ("EDMEuler", {"sigma_data": 1.0, "prediction_type": "v_prediction"}),
    "EDM exponential": ("EDMEuler", {"sigma_schedule": "exponential"}), "EDM DPM": ("EDMDPMSolverMultistep", {}),
    "flow": ("FlowMatchEulerDiscrete", {"shift": 3.0}), "flow 1": ("FlowMatchEulerDiscrete", {}),
    "flow dynamic": ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
    "flow karras": ("FlowMatchEulerDiscrete", {"shift": 3.0} | KARRAS),
    "flow beta": ("FlowMatchEulerDiscrete", {"use_beta_sigmas": True}),
    "flow stochastic": ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    "flow heun": ("FlowMatchHeunDiscrete", {"shift": 3.0}), "flow LCM": ("FlowMatchLCM", {"shift": 3.0}),
}  # fmt: skip
MU = {"flow dynamic": 0.9}
UNSAID = ("DPM clipped", "flow dynamic")  # whose times are a list of numbers here, or follow from what a pipeline says
EVERY = pytest.mark.parametrize("name", CASES)


class Net(nn.Module):
    """(B,4,2,2), time (B,) in 0..1000 or ln(sigma) / 4."""

    def __init__(self):
        super().__init__()
        source = torch.Generator().manual_seed(1)
        self.weight = torch.randn(16, 16, generator=source) / 4
        self.slope = torch.randn(16, generator=source)

    def forward(self, x, time, cond=None):
        told = time.float()[:, None] / (100 if time.abs().max() > 5 else 1)
        return torch.tanh(x.flatten(1).float() @ self.weight + torch.sin(told * self.slope)).reshape(x.shape)


NOISE = torch.randn(60, 3, 4, 2, 2, generator=torch.Generator().manual_seed(2))


def config_of(name):
    kind, settings = CASES[name]
    made = getattr(diffusers, f"{kind}Scheduler").from_config(settings)
    return json.loads(made.to_json_string())


def theirs(config, n, mu=None, monkeypatch=None):
    """-> what diffusers makes of NOISE in n steps with Net, and the times it tells."""
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    made.set_timesteps(n, **({} if mu is None else {"mu": mu}))
    noises = iter(NOISE[1:])
    module = sys.modules[type(made).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises))
    x, net = NOISE[0] * getattr(made, "init_noise_sigma", 1.0), Net()
    for t in made.timesteps:
        given = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
        x = made.step(net(given, t.expand(len(x))), t, x).prev_sample
    return x, made.timesteps


def ours(found, n):
    process, sampling = build(found.process), found.sampling
    pair = build(found.parameterization) if isinstance(found.parameterization, dict) else found.parameterization
    denoise = bind(Denoiser(Net(), process, pair), Cond())
    if "x0" in sampling:
        denoise = pick(sampling["x0"], BOUNDS, "x0")(denoise, process)
    times = make_times(sampling["times"], process, n)
    alpha, sigma = (float(c) for c in process.exact(steps_of(times)[0, 0]))
    start = {None: math.hypot(alpha, sigma), "noise": sigma}.get(sampling.get("start"), sampling.get("start"))
    noises = iter(NOISE[1:])
    sampler = pick(sampling["sampler"], SAMPLERS, "sampler")
    return sampler(denoise, NOISE[0] * start, times, process, noise=lambda step, shape: next(noises))


@pytest.mark.parametrize("n", [5, 20])
@EVERY
def test_what_is_read_samples_as_diffusers_does(name, n, monkeypatch):
    found = read(config_of(name), steps=n, mu=MU.get(name))
    expected, _ = theirs(config_of(name), n, MU.get(name), monkeypatch)
    if name == "Euler sigma_min":  # which leaves x / alpha as it is, with the noise of t = 0
        expected = expected * build(found.process).alpha_bar[0].sqrt()
    assert (ours(found, n) - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)


def test_the_settings_of_every_class_are_known():
    for kind, known in CLASSES.items():
        signature = inspect.signature(getattr(diffusers, f"{kind}Scheduler").__init__).parameters
        if kind != "DPMSolverSDE":  # which has none without torchsde
            assert known == {name: one.default for name, one in signature.items() if name != "self"}


@EVERY
def test_what_is_written_is_what_was_read(name, monkeypatch, caplog):
    """Settings -> ours -> settings: the same times told, the same walk."""
    n, mu = 10, MU.get(name)
    found = read(config_of(name), steps=n, mu=mu)
    with caplog.at_level(logging.WARNING):
        config = write(found.process, found.parameterization, found.variance, found.sampling)
    assert bool(caplog.records) == (name in UNSAID), caplog.text
    if name in UNSAID:
        assert "times; the model's own: " in caplog.text
        return
    json.dumps(config)
    (first, told), (second, again) = (theirs(c, n, m, monkeypatch) for c, m in ((config_of(name), mu), (config, None)))
    assert torch.allclose(told.double(), again.double(), rtol=1e-5, atol=1e-3)
    assert (first - second).abs().max() < 1e-4 * first.abs().max().clamp(min=1)


# What is not read, and what is not written.


@pytest.mark.parametrize("settings, told", [
    ({"_class_name": "DDIMSchedulerr"}, "_class_name: DDIMSchedulerr is not read; nearest: 'DDIMScheduler'"),
    ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler is not read; .*read are DDPM, DDIM, PNDM"),
    ({"_class_name": "DDIMScheduler", "beta_strat": 1}, "DDIMScheduler has no setting 'beta_strat'; nearest: 'beta_start'"),
    ({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"}, "beta_schedule: 'exp' .*; nearest: 'linear'"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type: 'learned' .*; nearest: 'learned_range'"),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "nearest: 'linear'"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "the pipeline says how"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas: True .*; nearest: False"),
    ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "nearest: 'v_prediction'"),
])  # fmt: skip
def test_what_is_not_read_is_told_in_a_line(settings, told):
    with pytest.raises(UserError, match=f"^here: .*{told}") as error:
        read(settings, "here")
    assert "\n" not in str(error.value)


def test_settings_of_other_classes_are_ignored_as_diffusers_does():
    sdxl = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0", "sample_max_value": 1.0, "clip_sample": True,
            "skip_prk_steps": True, "set_alpha_to_one": False, **SD, **LEADING}  # fmt: skip
    found = read(sdxl, steps=30)
    assert found.sampling == {"sampler": {"name": "euler"}, "steps": 30, "times": {"name": "leading", "offset": 1, "divide": "n"}}


def test_the_brownian_solver_is_read():
    """Its class cannot be made without torchsde."""
    found = read({"_class_name": "DPMSolverSDEScheduler", **KARRAS}, steps=4)
    assert found.sampling["sampler"] == {"name": "dpmpp_sde"} and found.sampling["start"] == "noise"
    assert make_times(found.sampling["times"], build(found.process), 4).shape == (5,)


DDPM = {"target": "ldm.process.DDPM"}


@pytest.mark.parametrize("process, parameterization, told", [
    ({"target": "ldm.process.VP"}, "noise", "no scheduler for the process ldm.process.VP; it has them for DDPM"),
    ({"target": "ldm.process.Cosine"}, "v", "ldm.process.Cosine"),
    (DDPM, "flow", "no parameterization 'flow' of a discrete process; it has noise, data, v"),
    (None, "v", "no parameterization 'v' of a flow; it has flow and data"),
    ({"target": "ldm.process.EDM"}, "edm", "told its share of a thousand; train with process.params.tells=c_noise"),
    ({"target": "ldm.process.EDM", "params": {"tells": "c_noise"}}, "data", "no parameterization 'data' of the process EDM"),
])  # fmt: skip
def test_what_diffusers_does_not_have(process, parameterization, told):
    with pytest.raises(UserError, match=told):
        write(process, parameterization)


@pytest.mark.parametrize("process, parameterization, sampler, times", [
    (DDPM, "noise", "dpmpp_2m", "linear"), (DDPM, "v", "ddim", "leading"), (DDPM, "noise", "ddim", "compvis"),
    (DDPM, "noise", "ddpm", "linear"), (DDPM, "noise", "dpmpp_2m_sde", "linspace"), (DDPM, "noise", "dpmpp_3m_sde", "linear"),
    ({**DDPM, "params": {"schedule": "sqrt"}}, "data", "ddim", "leading"), (None, "flow", "euler", "flow_match"),
    ({"target": "ldm.process.EDM", "params": {"tells": "c_noise"}}, "edm", "euler", "karras"),
])  # fmt: skip
def test_our_own_models_are_sampled_alike_by_diffusers(process, parameterization, sampler, times, monkeypatch, caplog):
    """To the 1e-3 that exported models are held to; what cannot be had is told, and then it need not be alike."""
    sampling = {"sampler": sampler, "times": times, "steps": 10}
    config = write(process, parameterization, sampling=sampling)
    process = process or {"target": "ldm.process.RectifiedFlow"}
    expected = ours(Scheduler(process, parameterization, "fixed", sampling), 10)
    if not caplog.records:
        found, _ = theirs(config, 10, None, monkeypatch)
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    else:
        assert sampler == "dpmpp_3m_sde" or times in ("flow_match", "linspace"), caplog.text
