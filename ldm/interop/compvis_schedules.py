"""Noise schedules as CompVis and Stability say them, as processes of ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.common.build import build
from ldm.common.files import UserError
from ldm.interop.names import defaults
from ldm.interop.said import Said
from ldm.process import Discrete, step_posterior

SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "sqrt": "sqrt", "cosine": "cosine",
             "squaredcos_cap_v2": "cosine"}  # theirs -> ours  # fmt: skip
WRITTEN = {ours: theirs for theirs, ours in reversed(SCHEDULES.items())}
DENOISER, TABLE = "DiscreteDenoiser", "LegacyDDPMDiscretization"  # of generative-models


def process_of(params: Said) -> dict:
    """The block of the process of a diffusion model."""
    if "denoiser_config" not in params:
        return schedule_of(params)
    denoiser = params.block("denoiser_config")
    name, inner = denoiser.named
    kind, table = inner.block("discretization_config").named
    if name != DENOISER or kind != TABLE:
        raise UserError(f"{denoiser.place}: {name} on {kind}; read is a {DENOISER} on a {TABLE}")
    steps = table.whole("num_timesteps", 1000)
    if inner.whole("num_idx", steps) != steps:
        raise inner.refused("num_idx", f"as many as the table has, {steps}")
    return _ddpm("scaled_linear", steps, start=table.number("linear_start", 0.00085), end=table.number("linear_end", 0.012))


def schedule_of(said: Said) -> dict:
    """The block of the process that these betas make: of a diffusion model's params, or a noise_schedule_config."""
    if "given_betas" in said:
        block = {"target": "ldm.process.Table", "params": {"betas": said.numbers("given_betas")}}
        try:
            build(block)
        except UserError as error:
            raise UserError(f"{said.place}.given_betas: {error}") from error
        return block
    name, steps = said.one("beta_schedule", SCHEDULES, "linear"), said.whole("timesteps", 1000)
    if name != "cosine":
        ends = {"start": said.number("linear_start", 1e-4, above=0), "end": said.number("linear_end", 2e-2, above=0)}
        return _ddpm(name, steps, **ends)
    own = said.get("beta_schedule") == "cosine"  # the other has one shift, this one's default
    return _ddpm(name, steps, start=said.number("cosine_s", 8e-3, above=0) if own else 8e-3)


def _ddpm(schedule: str, steps: int, **ends: float) -> dict:
    return {"target": "ldm.process.DDPM", "params": {"schedule": schedule, "steps": steps, **ends}}


def params_of(process: Any, block: Mapping | None) -> dict:
    """What their DDPM is told of the schedule. Tables that none of their schedules makes are given as betas."""
    if not isinstance(process, Discrete):
        raise UserError(f"CompVis has no diffusion model on {type(process).__name__}, only on DDPM's steps")
    steps = len(process.alpha_bar)
    said = defaults(block) if block and block["target"].endswith(".DDPM") else {}
    whole = torch.arange(steps, dtype=torch.float64)  # between steps every sampler has its own way, which is not the model's
    if not torch.equal(process.time(whole + (process.tells == "below")), whole):
        raise UserError("CompVis tells its networks the step itself: there is no process respaced, or told other times")
    named = said.get("schedule") in WRITTEN and not (said["schedule"] == "cosine" and said["end"] not in (None, 0.999))
    if not named or said["zero_terminal"] or said["floor"]:
        return {"timesteps": steps, "given_betas": process.betas.tolist()}
    names = {"start": "cosine_s"} if said["schedule"] == "cosine" else {"start": "linear_start", "end": "linear_end"}
    ends = {theirs: said[ours] for ours, theirs in names.items() if said[ours] is not None}
    if len(ends) < len(names) and said["schedule"] == "scaled_linear":
        ends = {"linear_start": 0.00085, "linear_end": 0.012} | ends
    return {"timesteps": steps, "beta_schedule": WRITTEN[said["schedule"]], **ends}


def buffers(process: Discrete, prefix: str = "") -> dict[str, Tensor]:
    """The tables that their checkpoints hold: computed in double precision, kept in single. Those of the reverse chain belong
    to the model itself, which has no prefix."""
    betas, bar = process.betas, process.alpha_bar
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    step = step_posterior(bar.sqrt(), (1 - bar).sqrt(), before.sqrt(), (1 - before).sqrt())
    tables = {
        "betas": betas, "alphas_cumprod": bar, "alphas_cumprod_prev": before, "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(), "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(), "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": step.variance, "posterior_log_variance_clipped": step.variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": step.x0, "posterior_mean_coef2": step.xt,
    }  # fmt: skip
    return {prefix + name: table.float() for name, table in tables.items() if not (prefix and name.startswith("posterior"))}
