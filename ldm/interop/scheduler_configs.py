"""A diffusion model's process, parameterization and sampling as a scheduler_config.json that diffusers loads.

Several schedulers there may be the same sampler with other lists of times. Those that may do are read back
(``schedulers.read``) and compared with the model: what is written is the first that samples alike, or that differs least.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ldm.betas import SCHEDULES as MADE
from ldm.common.build import build, plain
from ldm.common.files import UserError
from ldm.common.named import options_of, split
from ldm.interop.names import defaults
from ldm.interop.scheduler_settings import CLASSES
from ldm.interop.schedulers import LEAST, SAYS, SCHEDULES, read
from ldm.process import EDM, Discrete, Process, RectifiedFlow, steps_of
from ldm.samplers import SAMPLERS, ddim, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, euler
from ldm.times import make_times

log = logging.getLogger(__name__)

Settings = dict[str, Any]
BETAS = {ours: theirs for theirs, ours in SCHEDULES.items()}
PREDICTION = {ours: theirs for theirs, ours in SAYS.items()}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
DPM = "DPMSolverMultistep"
APART = 0.2  # of a training step, in what the network is told


def write(process: Mapping | None, parameterization: str | Mapping = "flow", variance: str = "fixed",
          sampling: Mapping | None = None) -> dict:
    """The scheduler_config.json of a model; where no scheduler samples as the model does here, the nearest one, and a warning
    that says what is other.

    Args:
        process, parameterization, variance: of the model, as its config writes them; None: the default process.
        sampling: sampler, steps, times, x0, start, as ``ldm.common.config.Sampling`` has them.

    Raises:
        UserError: where diffusers has no such process, or no such parameterization of it.
    """
    process = plain(process) or {"target": "ldm.process.RectifiedFlow", "params": {}}
    sampling = {"sampler": "dpmpp_2m", "steps": 20, "times": "linear"} | plain(sampling or {})
    made = build(process)
    if isinstance(made, RectifiedFlow):
        tries = of_flow(made, parameterization, sampling)
    elif isinstance(made, EDM):
        tries = of_edm(made, parameterization, sampling)
    elif process["target"].endswith((".DDPM", ".Table")):
        tries = of_betas(made, defaults(process), parameterization, variance, sampling)
    else:
        raise UserError(f"diffusers has no scheduler for the process {process['target']}; it has them for DDPM, Table, EDM and "
                        "RectifiedFlow")  # fmt: skip
    best, told = {}, None
    for kind, settings in tries:
        known, settings = CLASSES[kind], settings | bounds(sampling.get("x0"))
        config = {"_class_name": f"{kind}Scheduler"} | {key: settings.get(key, value) for key, value in known.items()}
        found = differences(config, made, sampling)
        if found is not None and (told is None or len(found) < len(told)):
            best, told = config, found
        if told == []:
            return best
    log.warning("%s samples otherwise than this model does here: %s; the model's own: %s", best["_class_name"], ", ".join(told),
                {key: sampling[key] for key in ("sampler", "times", "steps")})  # fmt: skip
    return best


# What may be written, the nearest first: class and settings.


def of_betas(made: Discrete, params: Mapping, parameterization: str | Mapping, variance: str, sampling: Mapping
             ) -> Iterator[tuple[str, Settings]]:
    if parameterization not in ("noise", "data", "v"):
        raise UserError(f"diffusers has no parameterization {parameterization!r} of a discrete process; it has noise, data, v")
    for kind, settings in [*classes(sampling["sampler"]), (DPM, {})]:
        learned = {} if variance == "fixed" else {"variance_type": variance}
        own = {"prediction_type": PREDICTION[parameterization], **schedule(kind, made, params), **settings, **learned}
        for levels in (None, *SPACINGS):
            yield kind, spacing(sampling["times"]) | own | ({levels: True} if levels else {})


def schedule(kind: str, made: Discrete, params: Mapping) -> Settings:
    """The betas: by name where the class knows it, else one by one."""
    name, found = params.get("schedule"), {"num_train_timesteps": len(made.alpha_bar)}  # a Table has none
    plain_cosine = name == "cosine" and params["start"] is params["end"] is None
    named = name in ("linear", "scaled_linear") or plain_cosine or (name == "sigmoid" and kind == "DDPM")
    if not named or (params["zero_terminal"] and "rescale_betas_zero_snr" not in CLASSES[kind]):
        floor = 0.0 if kind in ("DDPM", "DDIM", "LCM", "TCD") else LEAST
        return found | {"trained_betas": Discrete(made.alpha_bar.clamp(min=floor)).betas.tolist()}
    ends = {} if plain_cosine else {f"beta_{end}": inspect.signature(MADE[name]).parameters[end].default if params[end] is None
                                    else params[end] for end in ("start", "end")}  # fmt: skip
    return found | {"beta_schedule": BETAS[name], "rescale_betas_zero_snr": params["zero_terminal"], **ends}


def of_edm(made: EDM, parameterization: str | Mapping, sampling: Mapping) -> Iterator[tuple[str, Settings]]:
    block = {"target": "ldm.parameterization.Preconditioned"} if parameterization == "edm" else parameterization
    if not isinstance(block, Mapping) or not block["target"].endswith(".Preconditioned"):
        raise UserError(f"diffusers has no parameterization {parameterization!r} of the process EDM; it has edm")
    if made.tells != "c_noise":
        raise UserError("diffusers tells the network of an EDM process ln(sigma) / 4, and this one was told its share of a "
                        "thousand; train with process.params.tells=c_noise")  # fmt: skip
    how, said = defaults(block), options_said(sampling["times"])
    own = {"sigma_min": made.t_min, "sigma_max": made.t_max, "sigma_data": how["sigma_data"], "rho": said.get("rho", 7.0),
           "prediction_type": "v_prediction" if how["negative"] else "epsilon", **spacing(sampling["times"])}  # fmt: skip
    for kind, settings in [*classes(sampling["sampler"]), (DPM, {})]:
        for levels in ("karras", "exponential"):
            yield {DPM: "EDMDPMSolverMultistep"}.get(kind, "EDMEuler"), own | settings | {"sigma_schedule": levels}


def of_flow(made: RectifiedFlow, parameterization: str | Mapping, sampling: Mapping) -> Iterator[tuple[str, Settings]]:
    if parameterization not in ("flow", "data"):
        raise UserError(f"diffusers has no parameterization {parameterization!r} of a flow; it has flow and data")
    said = options_said(sampling["times"])
    shift = made.shift * said.get("shift", 1.0)
    if said.get("over") == "sigma" and 0 < said.get("sigma_min", 0) < 1:  # their least is 0.001, shifted twice
        shift = math.sqrt(999 * said["sigma_min"] / (1 - said["sigma_min"]))
    solver = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": PREDICTION[parameterization]}
    matching = {"EulerDiscrete": ("FlowMatchEulerDiscrete", {}), "HeunDiscrete": ("FlowMatchHeunDiscrete", {}),
                "DDIM": ("FlowMatchEulerDiscrete", {}), "LCM": ("FlowMatchLCM", {})}  # fmt: skip
    for kind, settings in [*classes(sampling["sampler"]), (DPM, {}), ("EulerDiscrete", {})]:
        if kind in (DPM, "UniPCMultistep"):
            yield kind, solver | settings
        elif kind in matching and parameterization == "flow":
            for levels in (None, *SPACINGS[:3]):
                own = {"shift": shift, "shift_terminal": said.get("terminal"), **({levels: True} if levels else {})}
                yield matching[kind][0], own | settings


def classes(sampler: str | Mapping) -> list[tuple[str, Settings]]:
    """Classes of a discrete process that are this sampler, with the settings that make them it."""
    call, o = sampler_of(sampler)
    name, said = call.__name__, {key: o[key] for key in ("lower_order_final",) if key in o}
    if name == "ddim":
        first, second = ("EulerDiscrete", "DDIM") if split(sampler)[0] == "euler" else ("DDIM", "EulerDiscrete")
        if o["eta"]:
            return [("EulerAncestralDiscrete", {}), (DPM, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"})]
        return [(first, {}), (second, {}), (DPM, {"solver_order": 1})]
    if name in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        return [(DPM, said | algorithm(o) | {"solver_order": o.get("order", 2), "solver_type": o.get("solver", "midpoint")})]
    if name == "dpm_fast":
        rule = "heun" if o["solver"] == "heun" else "midpoint"
        return [("DPMSolverSinglestep", said | algorithm(o) | {"solver_order": o["order"], "solver_type": rule})]
    if name == "ddpm":
        kinds = {"large": "fixed_large", "learned_range": "learned_range"}
        return [("DDPM", {"variance_type": kinds.get(o["variance"], "fixed_small")})]
    if name == "unipc":
        return [("UniPCMultistep", said | {"solver_order": o["order"], "solver_type": o["variant"],
                                           "predict_x0": o["of"] == "data",
                                           "disable_corrector": [] if o["corrector"] else list(range(1000))})]  # fmt: skip
    return {
        "plms": [("PNDM", {"skip_prk_steps": o.get("start") == "euler"})], "euler": [("EulerDiscrete", {})],
        "heun": [("HeunDiscrete", {})], "dpm_2": [("KDPM2AncestralDiscrete" if o.get("eta") else "KDPM2Discrete", {})],
        "lms": [("LMSDiscrete", {})], "dpmpp_sde": [("DPMSolverSDE", {})], "tcd": [("TCD", {})],
        "deis": [("DEISMultistep", {"solver_order": o.get("order"), "lower_order_final": o.get("final_order") == 1})],
        "lcm": [("LCM", {"timestep_scaling": o.get("scaling")}), ("EulerDiscrete", {"stochastic_sampling": True})],
    }.get(name, [])  # fmt: skip


def algorithm(o: Mapping) -> Settings:
    """That of DPM-Solver, which only with ++ goes all the way to the data."""
    name = f"{'sde-' * bool(o.get('eta'))}dpmsolver"
    return {"algorithm_type": f"{name}++"} if o["of"] == "data" else {"algorithm_type": name, "final_sigmas_type": "sigma_min"}


def spacing(times: Any) -> Settings:
    """Of a discrete process: how even times are chosen, and what lies between them."""
    name, said = (times if isinstance(times, str) else times["name"] if isinstance(times, Mapping) else ""), options_said(times)
    if said.get("span"):
        return spacing(said["span"]) | {key: said[key] for key in ("sigma_min", "sigma_max") if key in said}
    first = said.get("end") == "first" or name == "compvis"
    return {"timestep_spacing": {"leading": "leading", "compvis": "leading", "linspace": "linspace"}.get(name, "trailing"),
            "steps_offset": said.get("offset", 1) if name in ("leading", "compvis") else 0,
            "original_inference_steps": said.get("trained", 50), "set_alpha_to_one": not first,
            "final_sigmas_type": "sigma_min" if first else "zero"}  # fmt: skip


def bounds(x0: str | Mapping | None) -> Settings:
    name, said = (None, {}) if x0 is None else split(x0)
    if name == "dynamic_threshold":
        limits = {"dynamic_thresholding_ratio": said.get("quantile", 0.995), "sample_max_value": said.get("most", float("inf"))}
        return {"clip_sample": False, "thresholding": True, **limits}
    return {"clip_sample": name == "clip", "clip_sample_range": said.get("bound", 1.0)}


# What became of it.


def differences(config: Mapping, made: Process, sampling: Mapping) -> list[str] | None:
    """What is other in diffusers' walk than in the model's; None where the settings make no sense."""
    steps = sampling["steps"]
    try:
        found = read(config, "what is written", steps)
    except UserError:
        return None
    again, walk = build(found.process), found.sampling
    told = [name for name in ("x0", "start") if sampling.get(name) != walk.get(name)]
    if sampler_of(sampling["sampler"]) != sampler_of(walk["sampler"]):
        told.append("sampler")
    ours, theirs = (steps_of(make_times(each["times"], process, steps)) for process, each in ((made, sampling), (again, walk)))
    near = partial(torch.allclose, rtol=1e-4, atol=1e-5)
    if len(ours) != len(theirs) or not all(map(near, made.exact(ours), again.exact(theirs))):
        told.append("times")
    elif (made.time(ours[:, 0]) - again.time(theirs[:, 0])).abs().max() > APART:
        told.append("what the network is told of time")
    return told


def options_said(spec: Any) -> dict:
    """Options of a list of times, those that are left out where they matter filled in."""
    if not isinstance(spec, (str, Mapping)):
        return {}
    name, said = split(spec)
    return ({"shift": 3.0} if name in ("shifted", "flow_match") else {}) | said


def sampler_of(spec: str | Mapping) -> tuple[Callable, dict]:
    """The function and those of its options that matter; one of several where they mean the same."""
    name, said = split(spec)
    call, given = SAMPLERS[name], {}
    if isinstance(call, partial):
        call, given = call.func, call.keywords
    o = {key: inspect.signature(call).parameters[key].default for key in options_of(call)} | given | said
    if call is euler and o["s_churn"] == 0:
        call, o = ddim, sampler_of("ddim")[1]
    if call is dpmpp_3m_sde and o["order"] == 2:
        call = dpmpp_2m_sde
    if call is dpmpp_2m_sde and o["eta"] == 0 and o["solver"] == "midpoint":
        call = dpmpp_2m
    idle = {key for key in o if key.startswith("s_")} if not (o.get("eta") or o.get("s_churn")) else set()
    idle |= {"curvature"} if o.get("order") != 3 else set()
    return call, {key: value for key, value in o.items() if key in options_of(call) and key not in idle}
