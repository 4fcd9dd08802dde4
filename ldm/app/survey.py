"""What a stage's model will be, before it is: parameters, memory, arithmetic.

Models are built of tensors that have shapes and no contents: the largest takes seconds and no memory.
Arithmetic is counted by torch's FlopCounterMode in one forward pass over one picture, and the memory of activations by
looking at what that pass keeps for the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.app.fitting import in_words, misfits
from ldm.app.parts import autoencoder_block, make_module
from ldm.app.stages import Stage
from ldm.common.build import build, locate
from ldm.common.config import Cache, section
from ldm.common.files import UserError
from ldm.common.signatures import is_block, parameters
from ldm.cond import Cond

WORD = 4  # bytes of a weight, gradient or moment: fp32
MOMENTS = 2  # of an Adam-like optimizer, for each weight; the most that any of ours keeps
EMA = "averaged (ema)"

Size = tuple[int, int, int]  # (C,H,W) of a picture


@dataclass
class Part:
    """Parameters of one part of the model. stored: in checkpoints."""

    name: str
    trainable: int
    frozen: int
    stored: bool = True


@dataclass
class Survey:
    """Of one stage. flops: of the forward pass over one picture, parts that are trained and frozen parts apart."""

    stage: Stage
    module: Any  # without contents
    parts: list[Part]
    world: int
    size: Size | None = None
    buffers: int = 0  # bytes of what is stored besides parameters
    flops: dict[str, int] = field(default_factory=dict)
    frozen_flops: dict[str, int] = field(default_factory=dict)
    activations: int = 0  # bytes a picture, kept for the backward pass
    recomputes: bool = False  # blocks are computed again in the backward pass

    @property
    def trainable(self) -> int:
        return sum(part.trainable for part in self.parts)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: weights, averages, the optimizer's moments; of a LoRA training those of the changes."""
        kept = [part for part in self.parts if part.stored]
        stored = sum(part.trainable + part.frozen * (not self.stage.lora or part.name == EMA) for part in kept)
        return WORD * (stored + MOMENTS * self.trainable) + self.buffers

    @property
    def global_batch(self) -> int:
        return self.stage.batch_size * self.world * self.stage.accumulate

    @property
    def steps(self) -> int | None:
        steps = self.stage.trainer.get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def seconds(self) -> float | None:
        """After which trainer.max_time (DD:HH:MM:SS, or names with numbers) ends the training."""
        limit = self.stage.trainer.get("max_time")
        if isinstance(limit, str):
            limit = dict(zip(("days", "hours", "minutes", "seconds"), map(float, limit.split(":")), strict=True))
        return timedelta(**limit).total_seconds() if limit else None

    @property
    def images(self) -> int | None:
        return None if self.steps is None else self.steps * self.global_batch

    @property
    def cache(self) -> Cache:
        return section(self.stage.config, Cache)

    @property
    def half(self) -> bool:
        return "16" in str(self.stage.trainer.get("precision") or "32")

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on one device, by what they hold."""
        averaged = sum(part.frozen for part in self.parts if part.name == EMA)
        # a text encoder whose states are cached is not there while training
        parts = [part for part in self.parts if part.name != "text encoder" or not self.cache.text]
        share = self.world if self.stage.trainer.get("strategy") == "fsdp2" else 1  # of what is trained, and its averages
        frozen = sum(part.frozen for part in parts) - averaged
        trained, averaged = -(-sum(part.trainable for part in parts) // share), -(-averaged // share)
        activations = self.activations * self.stage.batch_size // (2 if self.half else 1)
        return {"weights": WORD * (frozen + trained), "gradients": WORD * trained, "optimizer": WORD * MOMENTS * trained,
                "averaged": WORD * averaged, "activations": activations}  # fmt: skip

    @property
    def passes(self) -> int:
        """What training costs, in forward passes: backward is two, computing again one more."""
        return 4 if self.recomputes else 3

    @property
    def flops_per_step(self) -> int:
        """Of one device."""
        once = self.passes * sum(self.flops.values()) + sum(self.frozen_flops.values())
        return once * self.stage.batch_size * self.stage.accumulate


def surveys(stages: Sequence[Stage], world: int, trust: bool = False) -> tuple[list[Survey], list[str]]:
    """-> of each stage that can be built, and what is wrong with the others. trust: see `parts.autoencoder_of`."""
    found, problems = [], []
    for stage in stages:
        try:
            found.append(survey(stage, world, autoencoder_block(stage, trust), size_of(stage)))
            problems += [f"{stage.label}: {line}" for line in misfits(stage, found[-1].module)]
        except Exception as error:  # constructors may fail in any way at sizes of 0, heads of 0 ...: the config's mistake
            problems.append(f"{stage.label}: {in_words(error)}")
    return found, problems


def survey(stage: Stage, world: int, autoencoder: dict | None, size: Size | None) -> Survey:
    """Builds the stage's module without contents and walks through it.

    autoencoder: block of what the latents come from (stage 2). size: None where it is not known; then nothing is counted.
    Raises ValueError for what the constructors or the sizes do not allow.
    """
    real = replace(stage, config={**stage.config, "model": _without_modules(stage.config["model"])})
    with torch.device("meta"):
        module = make_module(real, None if autoencoder is None else build(autoencoder), size)
        found = Survey(stage, module, list(_parts(module)), world, size,
                       buffers=sum(b.numel() * b.element_size() for b in module.buffers()),
                       recomputes=any(getattr(part, "checkpointing", False) for part in module.modules()))  # fmt: skip
    if stage.kind == "diffusion":
        check_cache(found.cache, module.conditioner)
    if size is not None:
        check_channels(stage, getattr(module.autoencoder, "image_channels", size[0]), size[0])
        walk = {"autoencoder": _walk_autoencoder, "diffusion": _walk_diffusion, "classifier": _walk_classifier}[stage.kind]
        # tensors that say they are on the CPU (autocast asks) and have no contents either; attention by its formula
        with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
            walk(module.to_empty(device="cpu"), torch.empty(1, *size), found)
    return found


def check_channels(stage: Stage, taken: int, given: int) -> None:
    """UserError where the autoencoder takes pictures of another number of channels than the data gives."""
    if taken != given:
        alone = stage.kind == "autoencoder"
        where = "model.params.autoencoder.params.image_channels" if alone else "autoencoder"
        raise UserError(f"{where}: {taken}{'' if alone else ' channels'}, but the pictures of data.train have {given} "
                        "(data.train.params.channels); give both the same")


def check_cache(cache: Cache, conditioner: Any) -> None:
    """UserError where latents come from disk and the conditioner wants pictures."""
    if cache.latents and (pictures := getattr(conditioner, "encodes", None)):
        raise UserError(f"cache.latents: the conditioner encodes pictures of the batch ({', '.join(pictures)}), which are not "
                        "beside latents on disk; set cache.latents: false")


def prepare(module: Any) -> None:
    """Finds or downloads the files that a module reads when it is used. UserError names what is missing."""
    for name in ("conditioner", "loss", "regularisers"):
        part = getattr(module, name, None)
        if hasattr(part, "prepare"):
            part.prepare()


def size_of(stage: Stage) -> Size | None:
    """Of a stage's pictures; where the data is not there, what its block says of their size."""
    if stage.train is not None:
        return stage.picture

    def sizes(value: Any) -> Iterator[int]:
        for key, item in value.items() if isinstance(value, dict) else ():
            yield from [item] if key in ("size", "image_size", "resolution") and type(item) is int else sizes(item)

    block = stage.config["data"]["train"]
    side, channels = next(sizes(block), None), (block.get("params") or {}).get("channels")
    return None if side is None else (channels if type(channels) is int else 3, side, side)


def world(trainer: dict) -> int:
    """Devices that a config asks for; what is left to the machine ("auto") counts as one."""
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str):
        devices = len([d for d in devices.split(",") if d.strip()]) if "," in devices else 1
    return (len(devices) if isinstance(devices, list) else max(1, devices)) * nodes


def _without_modules(block: dict) -> dict:
    """The block with those of its params built that are no torch modules (noise processes, losses): they look into their
    tables, which have to be real."""

    def ready(value: Any) -> Any:
        if not is_block(value):
            return value
        call = locate(value["target"])
        return build(value) if isinstance(call, type) and not issubclass(call, nn.Module) else value

    known, _ = parameters(locate(block["target"]))
    params = block.get("params") or {}
    return {**block, "params": {name: value if name in known and known[name].takes_block else ready(value)
                                for name, value in params.items()}}  # fmt: skip


def _parts(module: nn.Module) -> Iterator[Part]:
    for name, child in module.named_children():
        if name == "model":  # what is trained in stage 2, part by part
            yield from _parts(child)
        elif weights := list(child.parameters()):
            if name == "ema":  # it shares what is frozen
                others = {id(p) for other in module.children() if other is not child for p in other.parameters()}
                weights = [p for p in weights if id(p) not in others]
            trainable = sum(p.numel() for p in weights if p.requires_grad)
            yield Part(EMA if name == "ema" else name, trainable, sum(p.numel() for p in weights) - trainable)
        for part in child.modules() if name == "conditioner" else ():
            if hasattr(encoder := getattr(part, "encoder", None), "facts"):  # not a submodule
                reads = "text" if hasattr(part, "encode") else "picture"
                yield Part(f"{reads} encoder", 0, encoder.facts.parameters, stored=False)


def _walk_autoencoder(module: Any, x: Tensor, found: Survey) -> None:
    autoencoder, critic = module.autoencoder, getattr(getattr(module, "critic", None), "net", None)
    with _kept(module) as kept:
        found.flops["autoencoder"] = _count(lambda: autoencoder.decode(autoencoder.encode(x)))
        if critic is not None:  # once to judge, and to learn from a real and a made picture
            found.flops["critic"] = 3 * _count(lambda: critic(x))
    found.activations = kept()


def _walk_diffusion(module: Any, x: Tensor, found: Survey) -> None:
    z = _latent(module, x, found)
    with _kept(module) as kept:
        cond = Cond()
        if module.conditioner is not None:
            flops, cond = _count(lambda: module.conditioner.example(z)), module.conditioner.example(z)
            found.flops |= {"conditioner": flops} if flops else {}
        found.flops["network"] = _count(lambda: module.model["denoiser"].raw(z, torch.full((1,), 0.5), cond))
    found.activations = kept()


def _walk_classifier(module: Any, x: Tensor, found: Survey) -> None:
    z = _latent(module, x, found)
    with _kept(module) as kept:
        found.flops["network"] = _count(lambda: module.classifier(ema=False)(z, torch.full((1,), 0.5)))
    found.activations = kept()


def _latent(module: Any, x: Tensor, found: Survey) -> Tensor:
    with torch.no_grad():
        z, _ = module.autoencoder.posterior(x)
        if not found.cache.latents:
            found.frozen_flops["autoencoder"] = _count(lambda: module.autoencoder.posterior(x))
    return z


def _count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def _kept(module: nn.Module) -> Iterator[Callable[[], int]]:
    """-> how many bytes a pass keeps for its backward pass, weights left out. What is computed again (checkpointing) keeps
    its inputs, which the blocks of a module with `checkpointing` are asked for."""
    weights = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    def keep_inputs(block: nn.Module, given: tuple) -> None:
        for tensor in given:
            if isinstance(tensor, Tensor):
                pack(tensor)

    hooks = [block.register_forward_pre_hook(keep_inputs) for part in module.modules() if getattr(part, "checkpointing", False)
             for blocks in part.children() if isinstance(blocks, nn.ModuleList) for block in blocks]  # fmt: skip
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(t.untyped_storage().nbytes() for t in kept.values())
    for hook in hooks:
        hook.remove()
