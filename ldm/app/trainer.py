"""Arguments of Lightning's Trainer: those for which something else stands here, and values that it would refuse."""

import re
from typing import Any

from ldm.common.build import near
from ldm.common.limits import outside

INSTEAD = {
    "max_epochs": "trainer.max_steps (batches follow one another without end)", "min_epochs": "trainer.max_steps",
    "check_val_every_n_epoch": "validation.every", "val_check_interval": "validation.every",
    "limit_val_batches": "validation.batches", "num_sanity_val_steps": "validation.every",
    "log_every_n_steps": "logging.every", "enable_checkpointing": "checkpoint.every", "fast_dev_run": "trainer.max_steps=1",
    "enable_progress_bar": "nothing", "enable_model_summary": "nothing", "reload_dataloaders_every_n_epochs": "nothing",
    "barebones": "nothing",
}  # fmt: skip
MANUAL = {  # where the training module steps its optimizers itself, which an autoencoder's does
    "gradient_clip_val": "model.params.gradient_clip", "gradient_clip_algorithm": "model.params.gradient_clip",
    "accumulate_grad_batches": "model.params.accumulate",
}  # fmt: skip
LIMITS = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "num_nodes": 1}
TIME = r"\d+:\d\d:\d\d:\d\d"


def mistakes(trainer: dict, manual: bool) -> list[str]:
    """manual: the module steps its optimizers itself."""
    instead = INSTEAD | (MANUAL if manual else {})
    found = [f"trainer.{key}: not used here; instead: {instead[key]}" for key in trainer if key in instead]
    found += [line for key, reach in LIMITS.items() if key not in instead
              for line in outside(trainer.get(key), reach, f"trainer.{key}")]  # fmt: skip
    if any(kind in str(trainer.get("strategy")) for kind in ("spawn", "fork", "notebook")):
        found.append(f"trainer.strategy: processes are started by this program, got {trainer['strategy']!r}; take ddp")
    if any(kind in str(trainer.get("strategy")) for kind in ("fsdp", "deepspeed", "xla")) and trainer["strategy"] != "fsdp2":
        found.append(f"trainer.strategy: {trainer['strategy']!r} is not known here; take ddp, or fsdp2, which keeps weights in "
                     "shares")  # fmt: skip
    if trainer.get("precision") in ("bf16-true", "16-true"):
        found.append(f"trainer.precision: {trainer['precision']}: weights and averages of so few digits lose small changes; "
                     f"take {trainer['precision'].replace('true', 'mixed')}")  # fmt: skip
    steps, limit = trainer.get("max_steps"), trainer.get("max_time")
    if not limit and (not isinstance(steps, int) or steps < 1):
        found.append("trainer.max_steps: missing; expected the number of optimizer steps (or trainer.max_time: DD:HH:MM:SS)")
    if isinstance(limit, str) and not re.fullmatch(TIME, limit):
        found.append(f"trainer.max_time: expected DD:HH:MM:SS, such as 00:12:00:00 for half a day, got {limit!r}")
    return found + _names(trainer) + _devices(trainer.get("devices", "auto"))


def _names(trainer: dict) -> list[str]:
    from pytorch_lightning.accelerators import AcceleratorRegistry
    from pytorch_lightning.strategies import StrategyRegistry

    known = {"accelerator": ("auto", "cpu", "gpu", *AcceleratorRegistry.available_accelerators()),
             "strategy": ("auto", "fsdp2", *StrategyRegistry.available_strategies())}  # fmt: skip
    given = {key: trainer.get(key) for key in known}
    return [f"trainer.{key}: there is no {value!r}{near(value, known[key]) or '; auto finds one'}"
            for key, value in given.items() if isinstance(value, str) and value.lower() not in known[key]]  # fmt: skip


def _devices(devices: Any) -> list[str]:
    """How many (-1: all), which ("0,2", [0, 2]), or auto."""
    text = str(devices) if isinstance(devices, int) else devices
    which = isinstance(devices, list) and devices and all(type(one) is int and one >= 0 for one in devices)
    if which or devices is None or (isinstance(text, str) and re.fullmatch(r"auto|-1|0*[1-9]\d*|\d+(,\s*\d+)*,?", text)
                                    and text != "0"):  # fmt: skip
        return []
    return [f"trainer.devices: expected how many (-1: all), which of them (\"0,2\" or [0, 2]), or auto, got {devices!r}"]
