"""Diffusion models in the layouts of CompVis and Stability: latent-diffusion, Stable Diffusion 1 and 2, SDXL.

A checkpoint's "state_dict" holds model.diffusion_model.* (the network), first_stage_model.* (the autoencoder),
cond_stage_model.* or conditioner.embedders.* (conditions), model_ema.* (averaged weights of the network, their names without
dots), and tables of the noise schedule. The yaml says the rest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ldm.bundle import Bundle
from ldm.interop import names, unet_names
from ldm.interop.compvis_configs import config_of
from ldm.interop.compvis_published import recognised
from ldm.interop.conditions import UNET, Part, table, weights
from ldm.interop.folding import unfolded
from ldm.interop.foreign import autoencoder_rows, made
from ldm.interop.rows import Row, check, existing, inside, to_us
from ldm.interop.said import Said

log = logging.getLogger(__name__)

FIRST_STAGE, AVERAGED = "first_stage_model.", "model_ema."
HARMLESS = re.compile(  # what a model does not need: tables that follow from the schedule, what only training or its demos use
    r"(betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor|scaling_factor"
    r"|global_step|epoch|denoiser\.\w+)$|first_stage_model\.(loss|model_ema|colorize)|(low_scale_model|noise_augmentor)\.\w+$"
    r"|ldm\.autoencoder\.|model_ema\.|(depth_model|embedder|embedding_manager|loss|loss_fn)\.|.*\.position_ids$"
    r"|cond_stage_model\.model\.(attn_mask$|visual\.)"
    r"|conditioner\.embedders\.\d+\.(model\.(attn_mask$|visual\.)|transformer\.logit_scale$)"
)


def holds(keys: Iterable[str]) -> bool:
    return any(key.startswith(UNET) for key in keys)


def read(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of this model, and its weights by the names of a Bundle."""
    return planned(tensors, config, origin)[:2]


def planned(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> tuple[dict, dict[str, Tensor], Bundle]:
    """-> what a checkpoint of ours would say of this model; its weights by the names of a Bundle, the averaged ones behind
    "ema."; the Bundle without weights. Every tensor is in one row of the tables, or known to mean nothing to a model.

    Args:
        config: the yaml that it was trained with; None: one of the published models, known by its shapes.

    Raises:
        UserError: where yaml and tensors do not belong together, or something has no counterpart here.
    """
    config = recognised(tensors, origin) if config is None else config
    ours, conditions = config_of(config, tensors, origin, Path(origin).parent)
    bundle, beside = made(ours, origin), weights(conditions)
    rows, expected = rows_of(bundle, ours, conditions), bundle.state_dict()
    found, params = to_us(rows, tensors), Said(config["model"].get("params"), f"{origin}: model.params")
    twice = ("cond_stage_model.",) if params.get("cond_stage_config") == "__is_first_stage__" else ()  # the first stage again
    wanted = {name: value for name, value in expected.items() if name not in beside and not is_own(name)}
    check(rows, tensors, wanted, found, origin, lambda name: bool(HARMLESS.match(name)) or name.startswith(twice))
    found = {name: value.float() if name.startswith("autoencoder.") else value for name, value in found.items()}
    found |= averaged(rows, tensors, origin) | beside
    found |= {f"autoencoder.{name}": value for name, value in names.own(bundle.autoencoder.state_dict()).items()}
    factor = tensors.get("scale_factor", params.number("scale_factor", 1.0, above=0))
    found["autoencoder.scale"] = found["autoencoder.scale"] / factor
    if "scale_factor" in tensors:
        found["autoencoder.statistics_count"] += 1  # measured, on a batch of nobody knows how many
    found = unfolded(found, tensors)
    return {"kind": "diffusion", "config": ours, "sampling": ours["sampling"], "layout": "compvis"}, found, bundle


def rows_of(bundle: Bundle, config: Mapping, conditions: list[Part]) -> list[Row]:
    """The table of a whole model."""
    rows = inside(autoencoder_rows(config["autoencoder"], "compvis", FIRST_STAGE), "autoencoder.")
    rows += inside(unet_names.rows(bundle.denoiser.network, "compvis", UNET), "denoiser.network.")
    return existing([*rows, *table(conditions)], bundle.state_dict())


def is_own(name: str) -> bool:
    """Whether only our files have this tensor of an autoencoder."""
    part, _, rest = name.partition(".")
    return part == "autoencoder" and rest in names.OURS_ALONE


def averaged(rows: Iterable[Row], tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The averaged weights of the network: model_ema.* has the names of model.* without dots."""
    if not any(name.startswith(AVERAGED) for name in tensors):
        return {}
    short = [Row(row.ours, tuple(AVERAGED + name.removeprefix("model.").replace(".", "") for name in row.theirs), row.change)
             for row in rows if all(name.startswith(UNET) for name in row.theirs)]
    found = to_us(short, tensors)
    if len(found) != sum(len(row.ours) for row in short):
        log.warning("%s: %s* does not cover all weights of the network; the raw ones are taken", origin, AVERAGED)
        return {}
    return {f"ema.{name}": value for name, value in found.items()}
