"""What of ours reproduces a scheduler of diffusers: its process, list of times and sampler; and walks through recorded runs.

The network's recorded outputs are given back in the order of the calls; each x that the network is asked about and the
last x are compared. Their Euler, Heun, LMS and DPM2 keep x / alpha, ours x.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.common.named import pick
from ldm.parameterization import PARAMETERIZATIONS, Prediction, solve
from ldm.process import DDPM, EDM, Process, RectifiedFlow, Table
from ldm.samplers import SAMPLERS
from ldm.times import make_times

VE = ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")
DIVIDED = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep")  # T by n + 1


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


def process_of(case: Case) -> Process:
    kind, config = case.kind, case.config
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return RectifiedFlow()
    if kind.startswith("EDM") or config.get("timestep_type") == "continuous":
        return EDM(0.002, 80.0)
    steps = config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") is not None:
        return Table(betas=config["trained_betas"])
    schedule = {"squaredcos_cap_v2": "cosine"}.get(config["beta_schedule"], config["beta_schedule"])
    ends = {} if schedule == "cosine" else {"start": config.get("beta_start", 1e-4), "end": config.get("beta_end", 0.02)}
    in_log = config.get("interpolation_type") == "log_linear" or any(key.endswith("_sigmas") and config[key] for key in config)
    between = "log_alpha" if kind not in VE else "log_snr" if in_log else "level"
    if config.get("rescale_betas_zero_snr"):
        process = DDPM(schedule, steps, **ends, zero_terminal=True)
        if kind in ("DDPM", "DDIM", "LCM", "TCD"):
            return process
        return Table([*process.alpha_bar[:-1].tolist(), 2.0**-24])  # theirs, for sigma / alpha to be a number
    return DDPM(schedule, steps, **ends, between=between)


def times_of(case: Case, process: Process) -> str | dict:
    """What to ask ``make_times`` for."""
    kind, config, n = case.kind, case.config, case.n
    default = "leading" if kind in ("DDPM", "DDIM", "PNDM") else "linspace"
    spacing, offset = config.get("timestep_spacing", default), config.get("steps_offset", 0)
    to_first = kind in ("DDIM", "PNDM") and not config.get("set_alpha_to_one", kind == "DDIM")
    end = "first" if to_first or keeps_noise(case) else "data"
    if kind.startswith("FlowMatch"):
        shift = config.get("shift", 1.0)
        if config.get("use_dynamic_shifting"):
            shift = 0.9 if config.get("time_shift_type") == "linear" else math.exp(0.9)
        if case.step.get("sigmas"):  # of their own: 1 .. 1 / n
            return {"name": "shifted", "shift": shift}
        low = 0.001 if config.get("use_dynamic_shifting") else shift * 0.001 / (1 + (shift - 1) * 0.001)
        for name in ("karras", "exponential", "beta"):
            if config.get(f"use_{name}_sigmas"):
                return {"name": name, "over": "sigma", "sigma_min": shift * low / (1 + (shift - 1) * low), "sigma_max": 1.0}
        return {"name": "flow_match", "shift": shift, "low": low, "terminal": config.get("shift_terminal")}
    if config.get("use_flow_sigmas"):
        return {"name": "shifted", "shift": config["flow_shift"], "first": 0.999}
    if kind in ("LCM", "TCD"):
        return {"name": "lcm", "end": "data" if kind == "LCM" else "first"}
    if config.get("interpolation_type") == "log_linear":
        return "log_snr"  # n + 1 levels, and a 0 that is never reached
    asked = [name for name in ("karras", "exponential", "beta") if config.get(f"use_{name}_sigmas")]
    spaced = asked[0] if asked else "exponential" if config.get("use_lu_lambdas") else config.get("sigma_schedule")
    if kind.startswith("EDM") or config.get("timestep_type") == "continuous":
        return spaced or "karras"
    if spaced:
        over = {"over": "level"} if spaced == "beta" else {}
        if kind not in VE:
            return {"name": spaced, **over}
        whole = make_times({"leading": {"name": "leading", "offset": offset}, "linspace": {"name": "linspace", "round": False},
                            "trailing": {"name": "linear", "round": True}}[spacing], process, n)  # fmt: skip
        low, high = torch.exp(-process.log_snr(whole[[-2, 0]])).tolist()
        return {"name": spaced, "sigma_min": low, "sigma_max": high, **over}
    if spacing == "leading":
        return {"name": "leading", "offset": offset, "divide": "n+1" if kind in DIVIDED else "n", "end": end}
    overlap = {"overlap": True} if kind in ("DDIM", "PNDM") and (spacing == "linspace" or int(process.t_max + 1) % n) else {}
    if spacing == "linspace":
        return {"name": "linspace", "points": "n+1" if kind in DIVIDED else "n", "round": kind not in VE, "end": end, **overlap}
    return {"name": "linear", "round": True, "end": end, **overlap}


def keeps_noise(case: Case) -> bool:
    """Whether the last step ends at the noise of the first training step."""
    return case.config.get("final_sigmas_type") == "sigma_min" or case.kind == "DEISMultistep"


def sampler_of(case: Case) -> dict:
    """-> name and options in SAMPLERS."""
    kind, config, step, n = case.kind.removeprefix("EDM").removeprefix("FlowMatch"), case.config, case.step, case.n
    churn = {key: step[key] for key in ("s_churn", "s_tmin", "s_tmax", "s_noise") if key in step}
    order, lower = config.get("solver_order", 2), config.get("lower_order_final", True) and n < 15
    solver, algorithm = config.get("solver_type", "midpoint"), config.get("algorithm_type", "dpmsolver++")
    of, eta = "data" if algorithm.endswith("++") else "noise", float(algorithm.startswith("sde"))
    if kind == "DDPM":
        variance = config.get("variance_type", "fixed_small").removeprefix("fixed_").removesuffix("_log")
        return {"name": "ddpm", "variance": variance, "noisy_end": bool(case.out("timesteps")[-1] > 0)}
    if kind == "DDIM":
        return {"name": "ddim", "eta": step.get("eta", 0.0)}
    if kind == "PNDM":
        of = "v" if config.get("prediction_type") == "v_prediction" else "slope"
        return {"name": "plms" if config.get("skip_prk_steps") else "pndm", "of": of}
    if kind in ("EulerDiscrete", "Euler"):
        return {"name": "lcm", "scaling": 1e9} if config.get("stochastic_sampling") else {"name": "euler", **churn}
    if kind == "DPMSolverMultistep":
        options = {"eta": eta, "of": of, "solver": solver, "lower_order_final": lower}
        if order == 2:
            return {"name": "dpmpp_2m_sde", **options}
        return {"name": "dpmpp_3m_sde", "order": order, "curvature": "diffusers" if eta else 0.5, **options}
    if kind == "DPMSolverSinglestep":
        return {"name": "dpm_fast", "order": order, "of": of, "solver": solver,
                "lower_order_final": config.get("lower_order_final", False)}  # fmt: skip
    if kind == "UniPCMultistep":
        return {"name": "unipc", "order": order, "variant": config.get("solver_type", "bh2"),
                "corrector": not config.get("disable_corrector"), "of": "data" if config.get("predict_x0", True) else "noise",
                "lower_order_final": config.get("lower_order_final", True)}  # fmt: skip
    if kind == "DEISMultistep":
        return {"name": "deis", "order": order, "basis": "log_rho", "final_order": 1 if lower else order}
    if kind == "LMSDiscrete":
        return {"name": "lms", "order": step.get("order", 4)}
    if kind == "TCD":
        return {"name": "tcd", "gamma": step.get("eta", 0.3)}
    return {"name": {"EulerAncestralDiscrete": "euler_ancestral", "HeunDiscrete": "heun", "KDPM2Discrete": "dpm_2",
                     "KDPM2AncestralDiscrete": "dpm_2_ancestral", "LCM": "lcm"}[kind]}  # fmt: skip


def prepared(case: Case):
    """-> process, times, sampler."""
    process = process_of(case)
    times = make_times(times_of(case, process), process, case.n)
    if keeps_noise(case):
        times[-1] = process.t_min  # after Karras levels a step to where one is, which is the one of lower order
    return process, times, pick(sampler_of(case), SAMPLERS, "sampler")


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
