"""Bundle: autoencoder, conditioner and denoiser, which is what a checkpoint is; built, filled, saved, sampled from.

Names of its weights, and of those in a .safetensors file: autoencoder.*, conditioner.*, denoiser.network.*
"""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm.common.build import TRUSTED, build, is_block, plain
from ldm.common.files import UserError, atomic_write, digest
from ldm.common.named import Spec, pick
from ldm.common.random import generator
from ldm.common.weights import compare, content, evaluating, required, without_weights
from ldm.cond import Cond
from ldm.conditioners.base import encoded
from ldm.conditioners.between import replaced
from ldm.conditioners.prompts import Long, reading
from ldm.conditioners.vocabulary import Vocabulary
from ldm.conditioners.wants import completed
from ldm.denoiser import Denoiser, Remembering, bind, build_denoiser
from ldm.edit import Sampler
from ldm.guidance import BOUNDS, clip, planned
from ldm.parameterization import Denoise, Prediction
from ldm.process import RectifiedFlow, steps_of
from ldm.samplers import SAMPLERS, Callback
from ldm.times import make_times
from ldm.windows import Windows

log = logging.getLogger(__name__)

GUIDANCE = {"scale": 3.0, "low": None, "high": None, "rescale": None, "channels": None}
DEFAULTS = {"sampler": "dpmpp_2m", "steps": 20, "times": "linear", "guidance": 3.0}
PACKAGES = ("torch", "transformers", "safetensors")  # whose versions a checkpoint and a picture name
Also = Sequence[tuple[str | Mapping[str, Any], float]]
DECODED = 2**20  # pixels that are decoded at a time


class Bundle(nn.Module):
    """The parts of a latent diffusion model. Without conditioner and denoiser: an autoencoder alone.

    Args:
        config: the resolved config that the parts were built from; ``describe`` and ``save`` need it.
        sampling: what ``generate`` does where it is not told otherwise: sampler, steps, times, guidance, size [H, W],
            prompt_weights, x0, start; plain data, as a config writes it.
        about: what else a checkpoint says of itself: encoder_hash, data.
    """

    def __init__(self, autoencoder: Autoencoder, conditioner: nn.Module | None = None, denoiser: Denoiser | None = None,
                 config: dict | None = None, sampling: dict | None = None, about: dict | None = None):
        super().__init__()
        self.autoencoder, self.conditioner, self.denoiser = autoencoder, conditioner, denoiser
        self.config, self.about = config, about or {}
        self.sampling = DEFAULTS | {key: value for key, value in (sampling or {}).items() if value is not None}
        self._checked = self._warned = False

    @classmethod
    def from_config(cls, config: Mapping, *, sampling: dict | None = None, about: dict | None = None,
                    trust: bool = False) -> Bundle:
        """The parts that a config describes, in eval mode and without weights (meta device): ``assign`` brings them.

        config: of a diffusion model, whose "autoencoder" is a block; or of an autoencoder, which is then all there is.
        trust: build targets outside of TRUSTED too, that is, run whatever code the config names.
        """
        config, allowed = plain(config), None if trust else TRUSTED
        params = config["model"].get("params") or {}
        block = config.get("autoencoder") or params.get("autoencoder")
        if not is_block(block):
            raise UserError(f"autoencoder: a checkpoint's config holds it as a block (target, params), got {block!r}")
        autoencoder = without_weights(lambda: build(block, allowed=allowed))
        conditioner = denoiser = None
        if config.get("autoencoder") and "classifier" not in params:  # a classifier's checkpoint has its autoencoder alone
            if params.get("conditioner") is not None:
                conditioner = without_weights(lambda: build(params["conditioner"], allowed=allowed))
            process = build(params["process"], allowed=allowed) if params.get("process") else RectifiedFlow()
            network, parameterization = params.get("network"), params.get("parameterization", "flow")
            variance = params.get("variance", "fixed")
            denoiser = without_weights(lambda: build_denoiser(network, process, parameterization, autoencoder, conditioner,
                                                              allowed, variance, params.get("self_conditioning", False)))
        return cls(autoencoder, conditioner, denoiser, config, sampling or config.get("sampling"), about).eval()

    def assign(self, weights: Mapping[str, Tensor], origin: str = "weights") -> Bundle:
        """Take these tensors as the weights. UserError, with a count for each part, where names or shapes differ."""
        problems = compare(required(self, self.state_dict()), required(self, weights))
        if problems:
            raise UserError(f"{origin}: the weights do not fit the model that its config describes: {problems}")
        self.load_state_dict(weights, assign=True, strict=True)
        return self

    def lay_out(self) -> None:
        """Weights of convolutions channels-last, which are faster so without gradients. Those that were mapped from a file are
        copied, which is why loading leaves them; whoever draws calls it. Weights in shares (FSDP2) stay as they are."""
        for part in (self.autoencoder, self.denoiser):
            if part is not None and not any(hasattr(p, "device_mesh") for p in part.parameters()):
                part.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.autoencoder.shift.device

    def content_hash(self) -> str:
        """16 hex digits over all weights: the same for the same model, whatever file it comes from."""
        return digest({key: content(value) for key, value in required(self, self.state_dict()).items()})

    def describe(self) -> dict:
        """What a checkpoint of this model says of itself under "ldm": plain data."""
        if self.config is None:
            raise UserError("this model was put together by hand: give Bundle(..., config=...) what it is built from")
        return plain({
            "kind": "autoencoder" if self.denoiser is None else "diffusion", "config": self.resolved(),
            "sampling": self.sampling if self.denoiser is not None else None, "versions": versions(),
            "autoencoder_hash": self.autoencoder.content_hash(),
            "encoder_hash": self.about.get("encoder_hash") or getattr(self.conditioner, "encoder_hash", None),
            "data": self.about.get("data"),
        })  # fmt: skip

    def resolved(self) -> dict:
        """The config, in which parts that came from a file (those with a ``block``) are built anew without it."""
        config, block = plain(self.config), getattr(self.autoencoder, "block", None)
        if block is not None:
            (config if config.get("autoencoder") else config["model"]["params"])["autoencoder"] = block
        block = getattr(self.denoiser and self.denoiser.process, "block", None)
        if block is not None:
            config["model"]["params"]["process"] = block
        if self.conditioner is not None:
            config["model"]["params"]["conditioner"] = _rebuilt(config["model"]["params"]["conditioner"], self.conditioner)
        return config

    def save(self, path: str | Path) -> None:
        """Write a .safetensors or a .ckpt (torch.save of tensors and plain data), whole or not at all."""
        path, about = Path(path), self.describe()
        for part in self.modules():
            if isinstance(part, Vocabulary):
                part.complete()
        weights = {key: value.detach().cpu().contiguous().clone() for key, value in self.state_dict().items()}
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            with atomic_write(path) as temporary:
                save_file(weights, temporary, {"format": "pt", "ldm": json.dumps(about)})
        elif path.suffix == ".ckpt":
            with atomic_write(path) as temporary:
                torch.save({"state_dict": weights, "ldm": about}, temporary)
        else:
            raise UserError(f"{path}: expected a name that ends in .safetensors or .ckpt")

    @torch.no_grad()
    def generate(self, prompts: str | int | Sequence[str] | Mapping[str, Any], *, steps: int | None = None,
                 sampler: Spec | Callable | None = None, guidance: float | Mapping | None = None, seed: int = 0,
                 size: int | Sequence[int] | None = None, x_T: Tensor | None = None, callback: Callback | None = None,
                 times: Spec | Sequence[float] | Tensor | None = None, negative_prompt: str | Sequence[str] | None = None,
                 batch_size: int | None = None, indices: Sequence[int] | None = None, tile: int | None = None,
                 prompt_weights: bool | None = None, long: Long | None = None,
                 guide: Callable[[Denoise, Mapping[str, Any]], Denoise] | None = None,
                 edit: Callable[[Sampler, Mapping[str, Any]], Sampler] | None = None, window: int | None = None,
                 decode: bool = True, also: Also = ()) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1], one for each prompt. Where an argument is None, ``self.sampling`` decides.

        Picture k has random numbers of its own, from generator(seed + indices[k]), for its start and for the noise of
        every step: it depends neither on the other pictures nor, up to rounding, on the batch size.

        Args:
            prompts: texts, or a batch of what the conditioner takes, such as {"caption": [...]} or {"class": [3, 5]}, where a
                single number is that of all; or how many pictures, without any.
            sampler: a name in SAMPLERS, {"name": "ddim", "eta": 0.5}, or a function like those.
            guidance: scale of classifier-free guidance, 1: none; or of {"scale", "low", "high", "rescale", "channels"} what is
                to be another than the model's: guided where low <= t <= high (2404.07724), rescaled by that share (2305.08891),
                on the first channels alone. None: everywhere, not at all, on all.
            size: height and width of the pictures.
            x_T: (B,C,h,w) what sampling starts from, in place of noise.
            times: a name in TIMES, {"name": "karras", "rho": 5}, or decreasing times (N+1,) of the process: as they are
                without ``steps``, else brought to that number (see ``ldm.times.make_times``).
            callback: called as callback(step, t, x, prediction) at every step of every batch; see ``preview``.
            negative_prompt: what guidance leads away from, one text or one for each picture; None: the empty condition.
            batch_size: pictures at a time; None: all.
            indices: numbers of the pictures; None: 0, 1, 2 ...
            tile: side in pixels of the tiles that the autoencoder decodes by, with less memory; None: at once.
            prompt_weights: whether prompts have weights in them, "(word:1.3)"; long: what becomes of those that are longer than
                the text encoder's window (``ldm.conditioners.captions.Captions``); None: as the conditioner is set.
            guide: what else guides: (denoise, batch) -> denoise, such as ``ldm.classifier.by_classifier`` makes. A sampler's
                clip_x0 then clips what the model says, and not what becomes of it (ADM).
            edit: what wraps the sampler: (sampler, batch) -> sampler, as ``ldm.edit.repaint`` and ``ldm.tasks`` do.
            window: side in pixels of the windows through which the network sees pictures that are larger
                (``ldm.windows``); None: at once.
            also: further conditions of every picture with their weights, [("in the snow", 0.7), ({"class": 3}, -0.5)]: texts or
                entries in place of the batch's, guided by together with its own, whose weight is 1 (2206.01714).
            decode: False: latents (B,C,h,w) at unit scale in place of pictures.

        Raises:
            UserError: for all that cannot be, such as a size that does not divide, or a text encoder that is another.
        """
        if self.denoiser is None:
            raise UserError("this checkpoint holds an autoencoder alone, which draws nothing from prompts; "
                            "give the checkpoint of a diffusion model (stage 2)")
        self.lay_out()
        batch, n = as_batch(prompts)
        plan = self.plan(sampler=sampler, steps=steps, times=times, guidance=guidance)
        sampler, guidance = plan["sampler"], plan["guidance"]
        clips = guide is not None and isinstance(sampler, Mapping) and bool(sampler.get("clip_x0"))
        if not callable(sampler):
            sampler = pick({**sampler, "clip_x0": False} if clips else sampler, SAMPLERS, "sampler")
        times = make_times(plan["times"], self.denoiser.process, plan["steps"])
        shape = self._latent_shape(size, x_T)
        indices = list(range(n)) if indices is None else list(indices)
        negative = [negative_prompt] * n if isinstance(negative_prompt, str) else negative_prompt
        for name, given in (("indices", indices), ("negative_prompt", negative), ("x_T", x_T)):
            if given is not None and len(given) != n:
                raise UserError(f"{name}: {len(given)} for {n} prompts; it takes as many")
        self.check_conditioner(guidance["scale"])
        spread, pictures = self.start_std(times), []
        if prompt_weights is None:
            prompt_weights = self.sampling.get("prompt_weights")
        with evaluating(self), reading(self.conditioner, prompt_weights, long):
            for rows in _parts(n, batch_size):
                sources = [generator(seed + index) for index in indices[rows]]
                x = _normal(shape, sources) * spread if x_T is None else x_T[rows].float()
                part = {key: value[rows].to(self.device) if isinstance(value, Tensor) else value[rows]
                        for key, value in batch.items()}  # fmt: skip
                part.setdefault("position", torch.tensor([seed + index for index in indices[rows]]))
                denoise = self._guided(part, negative and negative[rows], guidance, shape[1:], window, also)
                if guide is not None:
                    denoise = guide(clip(denoise, self.denoiser.process) if clips else denoise, part)
                walk = sampler if edit is None else edit(sampler, part)
                z = walk(denoise, x.to(self.device), times, self.denoiser.process, callback=callback,
                         noise=lambda step, shape, sources=sources: _normal(shape[1:], sources))  # fmt: skip
                pictures.append(self.decode(z, tile) if decode else z)
        return torch.cat(pictures)

    def start_std(self, times: Tensor) -> float:
        """Standard deviation of what sampling over these times starts from."""
        alpha, sigma = (float(c) for c in self.denoiser.process.exact(steps_of(times)[0, 0]))
        return {None: math.hypot(alpha, sigma), "noise": sigma}.get(start := self.sampling.get("start"), start)

    def plan(self, *, sampler: Spec | Callable | None = None, steps: int | None = None,
             times: Spec | Sequence[float] | Tensor | None = None, guidance: float | Mapping | None = None) -> dict:
        """What ``generate`` does with these arguments: all four, None being replaced by what the model says."""
        asked = {"sampler": sampler, "steps": steps, "times": times}
        plan = {key: self.sampling[key] if value is None else value for key, value in asked.items()}
        if not isinstance(plan["times"], (str, Mapping)) and (steps is None and times is not None):
            plan["steps"] = len(steps_of(torch.as_tensor(times)))
        if not isinstance(plan["steps"], int) or plan["steps"] < 1:
            raise UserError(f"steps: {plan['steps']}; it takes a whole number from 1")
        said = [{} if each is None or each is ... else each if isinstance(each, Mapping) else {"scale": float(each)}
                for each in (self.sampling["guidance"], guidance)]  # fmt: skip
        plan["guidance"] = GUIDANCE | dict(said[0]) | dict(said[1])
        if unknown := plan["guidance"].keys() - GUIDANCE.keys():
            raise UserError(f"guidance: no such part {', '.join(sorted(unknown))}; there are {', '.join(GUIDANCE)}")
        return plan

    def _guided(self, batch: dict, negative: Sequence[str] | None, guidance: Mapping, size: Sequence[int],
                window: int | None, also: Also) -> Denoise:
        """The network under the conditions of the batch, in the precision of its weights; samplers stay in float32."""
        batch = completed(self.conditioner, batch, [side * self.autoencoder.factor for side in size], len(batch["position"]))
        if negative is not None:
            batch = {**batch, "negative_caption": negative}
        cond, away, others = Cond(), None, []
        if self.conditioner is not None:
            own = encoded(self.conditioner, self.autoencoder, batch, size)
            alone = guidance["scale"] == 1 and not also
            cond, away = (self.conditioner(own), None) if alone else self.conditioner.with_null(own)
            others = [(self.conditioner(encoded(self.conditioner, self.autoencoder, replaced(batch, what), size)), weight)
                      for what, weight in also]  # fmt: skip
        if also and away is None:
            raise UserError("also: this model has no empty condition, against which several are weighed")
        denoiser = Remembering(self.denoiser if window is None else Windows(self.denoiser, self._latent_shape(window, None)[1]))
        denoise = bind(denoiser, cond)
        if away is not None:
            denoise = planned(denoise, denoiser, cond, away, guidance, self.denoiser.process, others)
        if self.sampling.get("x0"):
            denoise = pick(self.sampling["x0"], BOUNDS, "x0")(denoise, self.denoiser.process)
        dtype = next(self.denoiser.parameters()).dtype

        def in_precision(x: Tensor, t: Tensor) -> Prediction:
            with torch.autocast(x.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
                return denoise(x, t)

        return in_precision

    def preview(self, guess: Prediction, tile: int | None = None) -> Tensor:
        """For a ``callback`` of ``generate``: the pictures (B,3,H,W) that the network believes in by then."""
        return self.decode(guess.x0, tile)

    @torch.no_grad()
    def encode(self, x: Tensor, tile: int | None = None) -> Tensor:  # (B,3,H,W) in [-1,1] -> (B,C,h,w)
        """The latents of pictures, the mode, a few at a time; on the model's device."""
        self.lay_out()
        rows = max(1, DECODED // (x.shape[2] * x.shape[3]))
        return torch.cat([self.autoencoder.encode(part.to(self.device), tile=tile) for part in x.split(rows)])

    @torch.no_grad()
    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:  # (B,C,h,w) -> (B,3,H,W) in [-1,1]
        """The pictures of latents, a few at a time."""
        self.lay_out()
        rows = max(1, DECODED // (z.shape[2] * z.shape[3] * self.autoencoder.factor**2))
        return torch.cat([self.autoencoder.decode(part, tile) for part in z.split(rows)]).clamp(-1, 1)

    def _latent_shape(self, size: Sequence[int] | None, x_T: Tensor | None) -> tuple[int, int, int]:
        factor = self.autoencoder.factor
        if x_T is not None and (x_T.ndim != 4 or x_T.shape[1] != self.autoencoder.channels):
            raise UserError(f"x_T: expected latents (B,{self.autoencoder.channels},h,w), got {tuple(x_T.shape)}")
        if x_T is not None:
            size = [side * factor for side in x_T.shape[2:]]
        size = (size, size) if isinstance(size, int) else size or self.sampling.get("size")
        if size is None:
            raise UserError("size: the checkpoint does not say at what size it was trained; give height and width")
        check_size(*size, factor, getattr(self.denoiser.network, "multiple", 1))
        return self.autoencoder.channels, size[0] // factor, size[1] // factor

    def check_conditioner(self, guidance: float) -> None:
        """The text encoder found here is the one that the model was trained with, and guidance means something."""
        expected = self.about.get("encoder_hash")
        if expected and self.conditioner is not None and not self._checked:
            found = self.conditioner.encoder_hash
            if found != expected:
                raise UserError(f"the text encoder found here (hash {found}) is not the one that this model was "
                                f"trained with (hash {expected}); install or name that one")
            self._checked = True
        part = self.conditioner
        guidable = part is not None and (part.width is not None or part.vector_width is not None)
        if guidance > 1 and guidable and not part.has_null and not self._warned:
            log.warning("guidance %g: this model was trained without caption dropout and knows no empty prompt to "
                        "compare with; guidance 1 is what it was trained for", guidance)
            self._warned = True


def _rebuilt(block: dict, part: nn.Module) -> dict:
    """The block of a conditioner, or of one of several in it, that builds it without the file that it came from."""
    own, parts = getattr(part, "block", None), getattr(part, "parts", None)
    if own is not None or parts is None:
        return block if own is None else own
    params = block["params"]
    return {**block, "params": params | {"parts": [_rebuilt(*each) for each in zip(params["parts"], parts, strict=True)]}}


def check_size(height: int, width: int, factor: int, multiple: int) -> None:
    """UserError, naming the two nearest sizes, where a side is not what autoencoder and network can divide."""
    unit = factor * multiple
    if min(height, width) > 0 and height % unit == width % unit == 0:
        return
    low = [max(unit, side // unit * unit) for side in (height, width)]
    high = [max(unit, -(-side // unit) * unit) for side in (height, width)]
    near = " or ".join(dict.fromkeys(f"{h} x {w}" for h, w in (low, high)))
    raise UserError(f"height {height} x width {width}: both have to be multiples of {unit} (autoencoder {factor}, "
                    f"network {multiple}); nearest: {near}")


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def as_batch(prompts: str | int | Sequence[str] | Mapping[str, Any]) -> tuple[dict, int]:
    """What ``Bundle.generate`` takes as ``prompts`` -> a batch, texts and tensors of equal length, and that length."""
    if isinstance(prompts, int):
        batch = {"caption": [""] * prompts}
    elif isinstance(prompts, Mapping):
        batch = dict(prompts)
    else:
        batch = {"caption": [prompts] if isinstance(prompts, str) else list(prompts)}
    batch = {key: value if _is_text(value) else torch.as_tensor(value) for key, value in batch.items()}
    lengths = {key: len(value) for key, value in batch.items() if not isinstance(value, Tensor) or value.ndim}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise UserError(f"prompts: expected one or more, as many of each kind; got {lengths}")
    n = next(iter(lengths.values()))
    return {key: value if key in lengths else value.expand(n) for key, value in batch.items()}, n


def _is_text(value: Any) -> bool:
    return isinstance(value, Sequence) and any(isinstance(each, str) for each in value)


def _parts(n: int, size: int | None) -> Iterator[slice]:
    if size is not None and size < 1:
        raise UserError(f"batch_size: {size}; it takes a whole number from 1")
    return (slice(start, start + (size or n)) for start in range(0, n, size or n))


def _normal(shape: Sequence[int], sources: Sequence[torch.Generator]) -> Tensor:  # -> (B, *shape), a row of each source
    return torch.stack([torch.randn(*shape, generator=source) for source in sources])
