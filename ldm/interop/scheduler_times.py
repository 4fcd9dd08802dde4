"""The lists of times of diffusers' schedulers: what to ask ``make_times`` for.

"leading" and "linspace" have two meanings there: solvers (DPM, UniPC, DEIS) choose n of n + 1 even times, the other classes n
of n. Noise levels lie between the ends of the whole range; in the classes over alpha between those of the even times.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ldm.interop.scheduler_settings import OVER_ALPHA, SOLVERS, Settings
from ldm.process import Discrete, Process
from ldm.times import make_times


def times_of(o: Settings, process: Process) -> Any:
    """A name with options; or the times themselves for ``o.steps``, where they follow from that number as no name here says."""
    if o.kind.startswith("FlowMatch"):
        return flow(o)
    if o.is_flow:
        return solver_flow(o)
    if o.is_edm:
        name = o.spaced or o.get("sigma_schedule")
        if name not in ("karras", "exponential"):
            raise o.refused("use_karras_sigmas", True)
        return {"name": name, **({"rho": o["rho"]} if name == "karras" and "rho" in o else {}), **ended(o)}
    if o.kind in ("LCM", "TCD"):
        return {"name": "lcm", "trained": o["original_inference_steps"], **ended(o)}
    return levels(o, process) if o.spaced else even(o, process)


def even(o: Settings, process: Process) -> dict | list[float]:
    spacing, solver, end = o.get("timestep_spacing", "linspace"), o.kind in SOLVERS, ended(o)
    if o.get("lambda_min_clipped", -math.inf) > -math.inf:
        return clipped(o, process)
    if spacing == "leading":
        return {"name": "leading", "offset": o["steps_offset"], "divide": "n+1" if solver else "n", **end}
    if o.kind in ("DDIM", "PNDM"):  # step back by T // n, whatever lies between their times
        end |= {"overlap": True}
    if spacing == "linspace":
        if o.kind == "PNDM":
            raise o.refused("timestep_spacing", "leading", "begins with a step that the network is told wrongly of")
        return {"name": "linspace", "points": "n+1" if solver else "n", "round": o.kind not in OVER_ALPHA, **end}
    return {"name": "linear", "round": True, **end}


def clipped(o: Settings, process: Process) -> list[float]:
    """Even times from the first where lambda is not below the least that is asked for."""
    if o.get("timestep_spacing", "linspace") != "linspace" or o.end == "first":
        raise o.refused("lambda_min_clipped", -math.inf)
    known = process.log_snr(torch.arange(len(process.alpha_bar))) >= o["lambda_min_clipped"]
    return make_times({"name": "linspace", "points": "n+1"}, Discrete(process.alpha_bar[known]), o.steps).tolist()


def levels(o: Settings, process: Process) -> dict:
    name, given = {"lu": "exponential"}.get(o.spaced, o.spaced), {"over": "level"} if o.spaced == "beta" else {}
    given |= {"span": even(o, process)} if o.kind in OVER_ALPHA else {}
    given |= {key: o[key] for key in ("sigma_min", "sigma_max") if o.get(key) is not None}
    if o.kind.startswith("KDPM2") and name == "karras":
        raise o.refused("use_karras_sigmas", False, "tells the network whole times in some calls and not in others")
    if name == "beta" and o.end == "first":
        raise o.refused("use_beta_sigmas", False)
    return {"name": name, **given, **ended(o)}


def flow(o: Settings) -> dict:
    shift, least = shift_of(o), 1 / o["num_train_timesteps"]
    low = least if o.get("use_dynamic_shifting") else shifted(least, shift)
    terminal = o.get("shift_terminal") or None
    if not o.spaced:
        return {"name": "flow_match", "shift": shift, "low": low, "terminal": terminal}
    return {"name": o.spaced, "over": "sigma", "sigma_min": terminal or shifted(low, shift), "sigma_max": 1.0}


def solver_flow(o: Settings) -> dict:
    shift, least = shift_of(o), 1 / o["num_train_timesteps"]
    if o.kind == "DEISMultistep" or o.end == "first":
        raise o.refused("use_flow_sigmas", False, "does not end at clean data in this class with these settings")
    if o.spaced or o.get("shift_terminal"):
        raise o.refused("use_flow_sigmas", False, "together with other spacing has no counterpart here")
    if o.kind == "UniPCMultistep":  # from a little below 1, shifted
        return {"name": "shifted", "shift": shift, "first": shifted(1 - 1e-6, 1 / shift), "last": least}
    return {"name": "shifted", "shift": shift, "first": 1 - least}


def shift_of(o: Settings) -> float:
    if not o.get("use_dynamic_shifting"):
        return o["shift"] if "shift" in o else o["flow_shift"]
    if o.mu is None:
        raise o.refused("use_dynamic_shifting", False, "follows from the size of the picture, and the pipeline says how (mu)")
    return o.mu if o["time_shift_type"] == "linear" else math.exp(o.mu)


def shifted(share: float, shift: float) -> float:
    return shift * share / (1 + (shift - 1) * share)


def ended(o: Settings) -> dict:
    return {"end": "first"} if o.end == "first" else {}
