"""diffusers' scheduler_config.json in our words, and back.

A scheduler there is a process, a parameterization, a list of times and a sampler in one. Classes over alpha (Euler, Heun, LMS
...) keep x / alpha, the others x, which here is one and the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ldm.common.build import build
from ldm.interop.scheduler_settings import OVER_ALPHA, SOLVERS, Settings, settings
from ldm.interop.scheduler_times import times_of

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
SAYS = {"epsilon": "noise", "sample": "data", "v_prediction": "v", "flow_prediction": "flow"}
LEAST = 2.0**-24  # alpha_bar of the last step, in classes that divide by it
FEW = 15  # lower_order_final means runs of fewer steps


class Scheduler(NamedTuple):
    """What a scheduler_config.json says, as plain data."""

    process: dict  # block
    parameterization: str | dict  # name, or block
    variance: str  # "learned_range" where half of the network's channels are about the variance, else "fixed"
    sampling: dict  # sampler, steps, times, and where they say something x0, start: see ``ldm.common.config.Sampling``


def read(config: Mapping, origin: str = "scheduler_config.json", steps: int = 50, mu: float | None = None) -> Scheduler:
    """What the settings of a scheduler of diffusers mean.

    Args:
        steps: how many the reading is exact for. Most lists of times have a name here, which is right for any number; the
            others are given as they are for ``steps``, and interpolated for another number.
        mu: exponent of the shift of a flow, where the config leaves it to the pipeline (use_dynamic_shifting).

    Raises:
        UserError: for a class or setting that changes the result and has no counterpart here, naming the nearest.
    """
    o = settings(config, origin, steps, mu)
    process = process_of(o)
    sampling = {"sampler": READ[o.kind](o), "steps": steps, "times": times_of(o, build(process)), "x0": bound_of(o),
                "start": start_of(o)}  # fmt: skip
    variance = "learned_range" if o.get("variance_type") in ("learned", "learned_range") else "fixed"
    return Scheduler(process, parameterization_of(o), variance, {k: v for k, v in sampling.items() if v is not None})


def process_of(o: Settings) -> dict:
    """Block of the process."""
    tells = tells_of(o)
    if o.is_flow:
        return block("RectifiedFlow", **tells)
    if o.is_edm:
        if o["sigma_min"] is None or o["sigma_max"] is None:
            raise o.refused("sigma_min", 0.002, "needs a number, as sigma_max does")
        return block("EDM", sigma_min=o["sigma_min"], sigma_max=o["sigma_max"], tells="c_noise")
    zero = {"zero_terminal": True} if o.get("rescale_betas_zero_snr") else {}
    zero |= {"floor": LEAST} if zero and o.kind not in ("DDPM", "DDIM", "LCM", "TCD") else {}
    if o.spaced or o.kind in OVER_ALPHA:  # in the classes over alpha even times may lie between the steps
        zero |= {"between": "log_snr" if o.spaced else "level"}
    if o["trained_betas"] is not None:
        return block("Table", betas=list(o["trained_betas"]), **zero, **tells)
    ends = {} if o["beta_schedule"] == "squaredcos_cap_v2" else {"start": o["beta_start"], "end": o["beta_end"]}
    return block("DDPM", schedule=SCHEDULES[o["beta_schedule"]], steps=o["num_train_timesteps"], **ends, **zero, **tells)


def block(name: str, **params: Any) -> dict:
    return {"target": f"ldm.process.{name}", "params": params}


def tells_of(o: Settings) -> dict:
    """Solvers tell the network whole times: of levels between the steps the nearest one, or the one below."""
    if o.kind not in SOLVERS or not (o.spaced or o.is_flow):
        return {}
    rounded = o.spaced in ("karras", "lu") and (o.kind != "DPMSolverMultistep" or o["beta_schedule"] != "squaredcos_cap_v2")
    return {"tells": "whole" if rounded and not o.is_flow else "below"}


def parameterization_of(o: Settings) -> str | dict:
    if o.kind.startswith("FlowMatch"):
        return "flow"
    says = o["prediction_type"]
    if o.is_edm:
        if says == "sample":
            raise o.refused("prediction_type", "epsilon")
        params = {"sigma_data": o.get("sigma_data", 1.0), "negative": says == "v_prediction"}
        return {"target": "ldm.parameterization.Preconditioned", "params": params}
    if says == "flow_prediction" and not o.is_flow:
        raise o.refused("prediction_type", "v_prediction", "belongs to use_flow_sigmas")
    if says == "v_prediction" and o.is_flow:
        raise o.refused("prediction_type", "flow_prediction", "is not the v of a flow")
    return SAYS[says]


def bound_of(o: Settings) -> dict | None:
    """How every x0 is kept in range. DDIM keeps the noise that the network said, the others find it anew."""
    kept = {"eps": "kept"} if o.kind == "DDIM" else {}
    if o.kind == "TCD":  # which has the settings and does not look at them
        return None
    if o.get("thresholding") and o.get("algorithm_type", "++").endswith(("++", "deis")) and o.get("predict_x0", True):
        return {"name": "dynamic_threshold", "quantile": o["dynamic_thresholding_ratio"], "most": o["sample_max_value"], **kept}
    return {"name": "clip", "bound": o["clip_sample_range"], **kept} if o.get("clip_sample") else None


def start_of(o: Settings) -> str | float | None:
    """What noise is multiplied by, where it is not what keeps the variance of noisy data at one."""
    if o.kind in OVER_ALPHA and o["timestep_spacing"] != "leading":
        return "noise"
    return 1.0 if o.kind in SOLVERS and o.is_flow else None


# Samplers.


def fewer(o: Settings) -> dict:
    """lower_order_final, where it makes a difference."""
    return {"lower_order_final": True} if o["lower_order_final"] and o.steps < FEW else {}


def ddpm(o: Settings) -> dict:
    kinds = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned_range"}
    if o["variance_type"] not in kinds:
        raise o.refused("variance_type", "learned_range" if o["variance_type"] == "learned" else "fixed_large")
    last = {"trailing": o.steps < o["num_train_timesteps"], "linspace": False}.get(o["timestep_spacing"], o["steps_offset"] > 0)
    variance = kinds[o["variance_type"]]
    return {"name": "ddpm", "variance": variance, **({"noisy_end": True} if last and variance != "small" else {})}


def pndm(o: Settings) -> dict:
    of = {"of": "v"} if o["prediction_type"] == "v_prediction" else {}
    return {"name": "plms" if o["skip_prk_steps"] else "pndm", **of}


def solver_of(o: Settings) -> str:
    return o["solver_type"] if o["solver_type"] == "heun" else "midpoint"  # others are taken for it


def predicted(o: Settings) -> dict:
    """What is extrapolated: x0, or in the solvers without ++ eps."""
    known = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis")
    if o["algorithm_type"] not in known or (o.is_edm and not o["algorithm_type"].endswith("++")):
        raise o.refused("algorithm_type", "dpmsolver++")
    return {"of": "noise"} if o["algorithm_type"].endswith("dpmsolver") else {}


def dpm(o: Settings) -> dict:
    order, of, eta = o["solver_order"], predicted(o), float(o["algorithm_type"].startswith("sde"))
    if order not in (1, 2, 3):
        raise o.refused("solver_order", 3)
    if o["euler_at_final"] and o.end == "first":
        raise o.refused("euler_at_final", False)
    if order == 1 and not (of and eta):
        return {"name": "ddim", **({"eta": eta} if eta else {})}
    if order != 2:
        curvature = {"curvature": "diffusers"} if eta else {}
        return {"name": "dpmpp_3m_sde", "eta": eta, "order": order, "solver": solver_of(o), **curvature, **of, **fewer(o)}
    if eta or solver_of(o) == "heun":
        return {"name": "dpmpp_2m_sde", "eta": eta, "solver": solver_of(o), **of, **fewer(o)}
    return {"name": "dpmpp_2m", **of, **fewer(o)}


def singlestep(o: Settings) -> dict:
    if o["algorithm_type"].startswith("sde"):
        raise o.refused("algorithm_type", "dpmsolver++")
    return {"name": "dpm_fast", "order": o["solver_order"], "of": predicted(o).get("of", "data"), "solver": solver_of(o),
            "lower_order_final": o["lower_order_final"]}  # fmt: skip


def unipc(o: Settings) -> dict:
    corrected = [step for step in range(o.steps - 1) if step not in o["disable_corrector"]]
    if 0 < len(corrected) < o.steps - 1:
        raise o.refused("disable_corrector", [])
    if o.spaced and o.end == "first":
        raise o.refused("final_sigmas_type", "zero", "corrects a last step of no length")
    variant = o["solver_type"] if o["solver_type"] == "bh1" else "bh2"
    return {"name": "unipc", "order": o["solver_order"], "variant": variant, "corrector": bool(corrected),
            "lower_order_final": o["lower_order_final"], **({} if o["predict_x0"] else {"of": "noise"})}  # fmt: skip


def deis(o: Settings) -> dict:
    return {"name": "deis", "order": o["solver_order"], "basis": "log_rho",
            "final_order": 1 if fewer(o) else o["solver_order"]}  # fmt: skip


def named(name: str, **options: Any) -> Callable[[Settings], dict]:
    return lambda o: {"name": name, **options}


LCM = named("lcm", scaling=1e9)  # of c_skip and c_out nothing is left
READ: dict[str, Callable[[Settings], dict]] = {
    "DDPM": ddpm, "DDIM": named("ddim"), "PNDM": pndm, "LMSDiscrete": named("lms", order=4), "EulerDiscrete": named("euler"),
    "EulerAncestralDiscrete": named("euler_ancestral"), "HeunDiscrete": named("heun"), "KDPM2Discrete": named("dpm_2"),
    "KDPM2AncestralDiscrete": named("dpm_2_ancestral"), "DPMSolverSDE": named("dpmpp_sde"), "DPMSolverMultistep": dpm,
    "DPMSolverSinglestep": singlestep, "UniPCMultistep": unipc, "DEISMultistep": deis,
    "LCM": lambda o: {"name": "lcm", "scaling": o["timestep_scaling"]}, "TCD": named("tcd", gamma=0.3),
    "EDMEuler": named("euler"), "EDMDPMSolverMultistep": dpm, "FlowMatchHeunDiscrete": named("heun"), "FlowMatchLCM": LCM,
    "FlowMatchEulerDiscrete": lambda o: LCM(o) if o["stochastic_sampling"] else {"name": "euler"},
}  # fmt: skip
