"""The settings that each class of diffusers' schedulers has, with their defaults, and those of a scheduler_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm.common.build import near
from ldm.common.files import UserError

BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
         "prediction_type": "epsilon"}  # fmt: skip
LATENT = BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
ZERO = {"rescale_betas_zero_snr": False}
SHIFTED = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
SOLVER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
CLIPPED = {"lambda_min_clipped": -math.inf, "variance_type": None}
DISTILLED = {**LATENT, "beta_schedule": "scaled_linear", **SPACED, "timestep_spacing": "leading", **THRESHOLD, **CLIP, **ZERO,
             "original_inference_steps": 50, "set_alpha_to_one": True, "timestep_scaling": 10.0}  # fmt: skip
PRECONDITIONED = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0,
                  "num_train_timesteps": 1000, "prediction_type": "epsilon", "final_sigmas_type": "zero"}  # fmt: skip
FLOW = {"num_train_timesteps": 1000, "shift": 1.0}
DYNAMIC = {**FLOW, **LEVELS, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15,
           "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
           "time_shift_type": "exponential"}  # fmt: skip

CLASSES: dict[str, dict[str, Any]] = {  # without "Scheduler" -> its settings and their defaults
    "DDPM": {**BETAS, **SPACED, "timestep_spacing": "leading", **THRESHOLD, **CLIP, "clip_sample": True, **ZERO,
             "variance_type": "fixed_small"},
    "DDIM": {**BETAS, **SPACED, "timestep_spacing": "leading", **THRESHOLD, **CLIP, "clip_sample": True, **ZERO,
             "set_alpha_to_one": True},
    "PNDM": {**BETAS, **SPACED, "timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "LMSDiscrete": {**BETAS, **SPACED, **LEVELS},
    "EulerDiscrete": {**BETAS, **SPACED, **LEVELS, **ZERO, "interpolation_type": "linear", "sigma_min": None, "sigma_max": None,
                      "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "EulerAncestralDiscrete": {**BETAS, **SPACED, **ZERO},
    "HeunDiscrete": {**LATENT, **SPACED, **LEVELS, **CLIP},
    "KDPM2Discrete": {**LATENT, **SPACED, **LEVELS},
    "KDPM2AncestralDiscrete": {**LATENT, **SPACED, **LEVELS},
    "DPMSolverSDE": {**LATENT, **SPACED, **LEVELS, "noise_sampler_seed": None},
    "DPMSolverMultistep": {**BETAS, **SPACED, **LEVELS, **THRESHOLD, **ZERO, **SHIFTED, **SOLVER, **CLIPPED,
                           "euler_at_final": False, "use_lu_lambdas": False, "final_sigmas_type": "zero"},
    "DPMSolverSinglestep": {**BETAS, **LEVELS, **THRESHOLD, **SHIFTED, **SOLVER, "lower_order_final": False, **CLIPPED,
                            "final_sigmas_type": "zero"},
    "UniPCMultistep": {**BETAS, **SPACED, **LEVELS, **THRESHOLD, **ZERO, **SHIFTED, "solver_order": 2, "solver_type": "bh2",
                       "predict_x0": True, "lower_order_final": True, "disable_corrector": [], "solver_p": None,
                       "final_sigmas_type": "zero", "sigma_min": None, "sigma_max": None, "shift_terminal": None},
    "DEISMultistep": {**BETAS, **SPACED, **LEVELS, **THRESHOLD, **SHIFTED, **SOLVER, "algorithm_type": "deis",
                      "solver_type": "logrho"},
    "LCM": DISTILLED,
    "TCD": DISTILLED,
    "EDMEuler": PRECONDITIONED,
    "EDMDPMSolverMultistep": {**PRECONDITIONED, **THRESHOLD, **SOLVER, "euler_at_final": False},
    "FlowMatchEulerDiscrete": {**DYNAMIC, "stochastic_sampling": False},
    "FlowMatchHeunDiscrete": FLOW,
    "FlowMatchLCM": {**DYNAMIC, "scale_factors": None, "upscale_mode": "bicubic"},
}  # fmt: skip
WITHOUT_EFFECT = {"noise_sampler_seed", "upscale_mode", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
                  "use_clipped_model_output", "skip_type", "tensor_format", "timestep_values"}  # fmt: skip
KNOWN = {name for settings in CLASSES.values() for name in settings} | WITHOUT_EFFECT  # a class ignores those of others
ONLY = {  # settings that have no counterpart here but for these values
    "interpolation_type": ("linear",), "invert_sigmas": (False,), "scale_factors": (None, []), "solver_p": (None,),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "timestep_spacing": ("leading", "linspace", "trailing"), "final_sigmas_type": ("zero", "sigma_min"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"), "sigma_schedule": ("karras", "exponential"),
}  # fmt: skip
OVER_ALPHA = ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete",
              "KDPM2AncestralDiscrete", "DPMSolverSDE")  # that keep x / alpha
SOLVERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep")


class Settings(dict):
    """Of a class, defaults filled in. steps: how many are asked for; mu: the shift's exponent, where the pipeline says it."""

    def __init__(self, kind: str, values: Mapping, origin: str, steps: int, mu: float | None):
        super().__init__(values)
        self.kind, self.origin, self.steps, self.mu = kind, origin, steps, mu

    def refused(self, name: str, nearest: object, why: str = "has no counterpart here") -> UserError:
        return UserError(f"{self.origin}: {self.kind}Scheduler with {name}: {self[name]!r} {why}; nearest: {nearest!r}")

    @property
    def spaced(self) -> str | None:
        """How noise levels are spaced, if it is they and not the times."""
        names = {"use_karras_sigmas": "karras", "use_lu_lambdas": "lu", "use_exponential_sigmas": "exponential",
                 "use_beta_sigmas": "beta"}  # fmt: skip
        return next((name for key, name in names.items() if self.get(key)), None)

    @property
    def is_flow(self) -> bool:
        return self.kind.startswith("FlowMatch") or self.get("use_flow_sigmas", False)

    @property
    def is_edm(self) -> bool:
        continuous = self.get("timestep_type") == "continuous" and self["prediction_type"] == "v_prediction"
        return self.kind.startswith("EDM") or continuous

    @property
    def end(self) -> str:
        """Of a list of times: clean data, or the noise of the first training step."""
        first = (self.kind in ("DEISMultistep", "TCD") or self.get("final_sigmas_type") == "sigma_min"
                 or (self.kind in ("DDIM", "PNDM") and not self["set_alpha_to_one"]))  # fmt: skip
        return "first" if first else "data"


def settings(config: Mapping, origin: str, steps: int, mu: float | None) -> Settings:
    """UserError for what is unknown or means nothing here."""
    name = str(config.get("_class_name"))
    kind = name.removesuffix("Scheduler")
    if kind not in CLASSES:
        hint = near(name, [f"{each}Scheduler" for each in CLASSES])
        raise UserError(f"{origin}: _class_name: {name} is not read{hint}; read are {', '.join(CLASSES)}")
    if "predict_epsilon" in config:  # until 0.9
        old = {"prediction_type": "epsilon" if config["predict_epsilon"] else "sample"}
        config = {key: value for key, value in (old | dict(config)).items() if key != "predict_epsilon"}
    unknown = [key for key in config if key not in KNOWN and not key.startswith("_")]
    if unknown:
        raise UserError(f"{origin}: {name} has no setting {unknown[0]!r}{near(unknown[0], CLASSES[kind])}")
    given = {key: value for key, value in config.items() if key in CLASSES[kind]}
    o = Settings(kind, CLASSES[kind] | given, origin, steps, mu)
    for key, values in ONLY.items():
        if key in o and o[key] not in values:
            raise o.refused(key, values[0])
    if o.is_flow and o["num_train_timesteps"] != 1000:
        raise o.refused("num_train_timesteps", 1000)
    return o
