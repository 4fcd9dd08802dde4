"""Runs diffusers' schedulers on the best denoiser of a recorded mixture in R^4, which the recorded cases were run on too."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from unittest.mock import patch

import torch
from diffusers_replay import Case
from torch import Tensor


def data_of(x: Tensor, alpha: float, sigma: float, mixture: dict[str, Tensor]) -> Tensor:
    """E[x0 | x_t], fp64."""
    weights, means, stds = (mixture[name].double() for name in ("weights", "means", "stds"))
    flat, variance = x.double().flatten(1)[:, None], (alpha * stds) ** 2 + sigma**2
    log = weights.log() - ((flat - alpha * means) ** 2).sum(-1) / variance / 2 - means.shape[1] / 2 * variance.log()
    each = means + (alpha * stds**2 / variance)[:, None] * (flat - alpha * means)
    return (log.softmax(1)[..., None] * each).sum(1).view(x.shape)


def level_of(scheduler, kind: str, t: float, step: int) -> tuple[float, float]:
    """alpha, sigma of what the network is shown."""
    config = scheduler.config
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        sigma = t / config["num_train_timesteps"] if kind.startswith("FlowMatch") else float(scheduler.sigmas[step])
        return 1 - sigma, sigma
    if kind.startswith("EDM"):
        return 1.0, math.exp(4 * t)
    if config.get("timestep_type") == "continuous":
        return 1 / math.hypot(1, math.exp(4 * t)), math.exp(4 * t) / math.hypot(1, math.exp(4 * t))
    bar = scheduler.alphas_cumprod.double()
    if t == round(t):
        return math.sqrt(bar[int(t)]), math.sqrt(1 - bar[int(t)])
    log = ((1 - bar) / bar).log() / 2  # of sigma / alpha, linear in t
    level = math.exp(torch.lerp(log[int(t)], log[int(t) + 1], t - int(t)))
    return 1 / math.hypot(1, level), level / math.hypot(1, level)


def output(x: Tensor, alpha: float, sigma: float, kind: str, config: dict, mixture: dict[str, Tensor]) -> Tensor:
    x0 = data_of(x, alpha, sigma, mixture)
    eps = (x.double() - alpha * x0) / sigma
    if kind.startswith("EDM"):
        sign = -1 if config["prediction_type"] == "v_prediction" else 1
        return sign * (x0 - 0.25 / (sigma**2 + 0.25) * x.double()) / (sigma * 0.5 / math.sqrt(sigma**2 + 0.25))
    name = "flow_prediction" if kind.startswith("FlowMatch") else config["prediction_type"]
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}[name]


def run(kind: str, config: dict, step: dict, n: int, inputs: dict[str, Tensor], **setting) -> Case:
    """``inputs``: x_T, noise, var_channel and the mixture (gm.*) of the recording; ``setting``: of set_timesteps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        import diffusers

        scheduler = getattr(diffusers, f"{kind}Scheduler")(**config)
    mixture = {name.removeprefix("gm."): value for name, value in inputs.items() if name.startswith("gm.")}
    noises = iter(inputs["noise"])

    def draw(shape, *_, **__) -> Tensor:
        return next(noises).clone().view(tuple(shape))

    modules = [module for name, module in sys.modules.items() if name.startswith("diffusers.schedulers.scheduling_")]
    scheduler.set_timesteps(**({"num_inference_steps": n} | setting))
    x = inputs["x_T"] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    states, outputs = [x], []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        f = output(seen, *level_of(scheduler, kind, float(t), i), kind, scheduler.config, mixture).float()
        f = torch.cat([f, inputs["var_channel"]], 1) if config.get("variance_type") == "learned_range" else f
        drawn = [patch.object(module, "randn_tensor", draw) for module in modules if hasattr(module, "randn_tensor")]
        for each in drawn:
            each.start()
        x = scheduler.step(f, t, x, **step).prev_sample
        for each in drawn:
            each.stop()
        states, outputs = [*states, x], [*outputs, f]
    tensors = {"traj": torch.stack(states), "model_output": torch.stack(outputs), "timesteps": scheduler.timesteps}
    if kind not in ("DDPM", "DDIM", "PNDM") and getattr(scheduler, "sigmas", None) is not None:
        tensors["sigmas"] = torch.as_tensor(scheduler.sigmas)
    return Case(kind, config, step | setting, n, tensors, inputs["noise"], inputs["var_channel"])
