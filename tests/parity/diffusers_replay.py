"""Walks through recorded runs of diffusers' schedulers, on the process, over the times and by the sampler that are read of
their settings (``ldm.interop.schedulers``).

The network's recorded outputs are given back in the order of the calls; each x that the network is asked about and the
last x are compared. Their Euler, Heun, LMS and DPM2 keep x / alpha, ours x.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.common.build import build
from ldm.common.named import pick
from ldm.interop.scheduler_settings import OVER_ALPHA as VE
from ldm.interop.schedulers import Scheduler, read
from ldm.parameterization import PARAMETERIZATIONS, Prediction, solve
from ldm.process import EDM, Process
from ldm.samplers import SAMPLERS
from ldm.times import make_times


@dataclass(frozen=True)
class Case:
    """One scheduler with its options, run for n steps; ``tensors``: traj, model_output, timesteps, sigmas where it has any.
    ``noise`` (K, ...) was drawn in this order, ``var`` is what a network says that learned its variance."""

    kind: str  # class name without Scheduler
    config: dict
    step: dict  # options of its step()
    n: int
    tensors: dict[str, Tensor]
    noise: Tensor
    var: Tensor

    def out(self, key: str) -> Tensor:
        return self.tensors[key].double()


def reading(case: Case) -> Scheduler:
    """What is read of the settings, with what diffusers takes at the call in place of them."""
    config, step = {"_class_name": f"{case.kind}Scheduler", **case.config}, case.step
    in_log = config.pop("interpolation_type", "linear") == "log_linear"  # tells the network of other levels: it is not read
    found = read(config, steps=case.n, mu=step.get("mu"))
    options = {key: step[key] for key in ("s_churn", "s_tmin", "s_tmax", "s_noise", "order", "eta") if key in step}
    if case.kind == "TCD" and "eta" in options:
        options["gamma"] = options.pop("eta")
    sampling = found.sampling | {"sampler": {**found.sampling["sampler"], **options}}
    process = found.process
    if step.get("sigmas"):  # of their own: 1 .. 1 / n
        sampling["times"] = {"name": "shifted", "shift": sampling["times"]["shift"]}
    if in_log:  # n + 1 levels, and a 0 that is never reached
        sampling["times"] = "log_snr"
        process = {**process, "params": {**process["params"], "between": "log_snr"}}
    return found._replace(process=process, sampling=sampling)


def prepared(case: Case):
    """-> process, times, sampler."""
    found = reading(case)
    process = build(found.process)
    return process, make_times(found.sampling["times"], process, case.n), pick(found.sampling["sampler"], SAMPLERS, "sampler")


def own_levels(case: Case) -> Tensor:
    """The sigma / alpha that were recorded, of flows the sigma, (n + 1,), each once."""
    levels = case.out("sigmas")
    if case.kind.endswith("HeunDiscrete"):
        levels = torch.cat([levels[:1], levels[1:-1:2], levels[-1:]])
    if case.kind.startswith("KDPM2"):
        levels = torch.cat([levels[:1], levels[1:-1:2]])
    return levels


def threshold(x0: Tensor, config: dict) -> Tensor:
    """Their dynamic thresholding (2205.11487, section 2.3) with an upper limit."""
    s = torch.quantile(x0.flatten(1).abs(), config["dynamic_thresholding_ratio"], dim=1)
    s = s.clamp(1, config["sample_max_value"]).view(-1, 1, 1, 1)
    return x0.clamp(-s, s) / s


def said(f: Tensor, x: Tensor, alpha: float, sigma: float, case: Case) -> Prediction:
    """What a recorded output means."""
    config, kind, var = case.config, case.kind, None
    if config.get("variance_type") == "learned_range":
        f, var = f.chunk(2, dim=1) if f.shape[1] == 2 else (f, case.var.double())
    if kind.startswith("EDM"):  # F = (x0 - c_skip x) / c_out, data of deviation 0.5
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        x0 = c_skip * x + (-c_out if config.get("prediction_type") == "v_prediction" else c_out) * f
        return Prediction(x0, (x - alpha * x0) / sigma)
    default = "flow_prediction" if kind.startswith("FlowMatch") else "epsilon"
    name = {"epsilon": "noise", "sample": "data", "v_prediction": "v", "flow_prediction": "flow"}[
        config.get("prediction_type") or default]  # fmt: skip
    a, s = (torch.tensor(c, dtype=torch.float64) for c in (alpha, sigma))
    if name == "v" and config.get("timestep_type") == "continuous":  # of x / sqrt(1 + sigma^2)
        size = math.hypot(1, sigma)
        a, s, x = a / size, s / size, x / size
        return solve(x, f, a, s, *PARAMETERIZATIONS[name](a, s))
    guess = solve(x, f, a, s, *PARAMETERIZATIONS[name](a, s))
    x0, eps = guess.x0, guess.eps
    if config.get("clip_sample"):
        bound = config.get("clip_sample_range", 1.0)
        x0 = x0.clamp(-bound, bound)
    if config.get("thresholding"):
        x0 = threshold(x0, config)
    if case.step.get("use_clipped_model_output"):
        eps = (x - alpha * x0) / sigma
    return Prediction(x0, eps, var)


def replay(case: Case, sampler, times: Tensor, process: Process) -> tuple[list[float], list[float]]:
    """Runs a sampler on the recorded outputs. -> the times that it asks at, and the error of each state relative to its
    greatest number."""
    outputs, states, noises = case.out("model_output"), case.out("traj"), iter(case.noise.double())
    asked, errors = [], []

    def compare(x: Tensor, t: float) -> None:
        alpha = float(process.exact(torch.tensor(float(t), dtype=torch.float64))[0]) if case.kind in VE else 1.0
        k = len(asked)
        errors.append(float((x / alpha - states[k]).abs().max() / states[k].abs().max()))

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (float(c[0]) for c in process.exact(t[:1].double()))
        compare(x, t[0])
        asked.append(float(t[0]))
        return said(outputs[len(asked) - 1], x, alpha, sigma, case)

    alpha, _ = process.exact(times.flatten()[0]) if case.kind in VE else (1.0, None)
    last = sampler(denoise, states[0] * alpha, times, process, noise=lambda step, shape: next(noises))
    if len(asked) < len(states):
        compare(last, times.flatten()[-1])
    return asked, errors


def told(case: Case, process: Process, asked: list[float]) -> tuple[Tensor, Tensor]:
    """What our network and theirs are told at these calls, in the same units; theirs may be rounded to whole steps."""
    theirs, ours = case.out("timesteps")[: len(asked)], torch.tensor(asked, dtype=torch.float64)
    if isinstance(process, EDM):
        return ours.log() / 4, theirs
    return process.time(ours), theirs
