"""What guided-diffusion (ADM, 2105.05233) says of a model: the arguments of its constructors, the flags of its scripts, or
nothing but the shapes of the weights; all become the arguments of a constructor and, beside them, those of the diffusion."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ldm.common.build import near
from ldm.common.files import UserError

log = logging.getLogger(__name__)

SCHEDULES = ("linear", "cosine")
UNET, UPSAMPLER, CLASSIFIER = "UNetModel", "SuperResModel", "EncoderUNetModel"
NEEDED = ("model_channels", "out_channels", "num_res_blocks", "attention_resolutions")
MODEL = {"cls": None, "image_size": None, "in_channels": 3, "dropout": 0.0, "channel_mult": (1, 2, 4, 8), "num_classes": None,
         "conv_resample": True, "dims": 2, "num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1,
         "use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": False, "pool": "adaptive"}
DIFFUSION = {"diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "250", "use_ddim": False,
             "clip_denoised": True, "predict_xstart": False, "rescale_timesteps": False}  # fmt: skip
FLAGS = {"num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1, "num_head_channels": -1,
         "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False, "learn_sigma": False,
         "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False}  # fmt: skip
CLASSIFIER_FLAGS = {"classifier_width": 128, "classifier_depth": 2, "classifier_attention_resolutions": "32,16,8",
                    "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True,
                    "classifier_pool": "attention"}  # fmt: skip
SIDES = ("image_size", "large_size", "small_size")
IGNORED = {  # of training, of a sampling script, of memory
    "use_fp16", "classifier_use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "batch_size", "num_samples",
    "model_path", "classifier_path", "classifier_scale", "base_samples", "data_dir", "val_data_dir", "schedule_sampler", "lr",
    "weight_decay", "anneal_lr", "lr_anneal_steps", "iterations", "microbatch", "ema_rate", "log_interval", "save_interval",
    "eval_interval", "resume_checkpoint", "fp16_scale_growth", "noised",
}  # fmt: skip
MULTS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}  # by the side
UPSAMPLER_MULTS = {512: MULTS[256], 256: MULTS[256], 64: MULTS[64]}
# (class, model_channels, channel_mult, num_res_blocks, attention_resolutions) of a published model -> what shapes do not tell
PUBLISHED = {
    (UNET, 192, MULTS[64], 3, (2, 4, 8)):
        {"image_size": 64, "use_new_attention_order": True, "noise_schedule": "cosine", "dropout": 0.1},
    (UNET, 256, MULTS[128], 2, (4, 8, 16)): {"image_size": 128, "num_heads": 4, "num_head_channels": -1},
    (UNET, 256, MULTS[256], 2, (8, 16, 32)): {"image_size": 256},  # with and without classes, LSUN
    (UNET, 256, MULTS[512], 2, (16, 32, 64)): {"image_size": 512},
    (UPSAMPLER, 192, MULTS[256], 2, (8, 16, 32)): {"image_size": 256, "num_heads": 4, "num_head_channels": -1},
    (UPSAMPLER, 192, MULTS[256], 2, (16, 32)): {"image_size": 512},
    (CLASSIFIER, 128, MULTS[64], 4, (2, 4, 8)): {"image_size": 64, "noise_schedule": "cosine"},
    (CLASSIFIER, 128, MULTS[128], 2, (4, 8, 16)): {"image_size": 128},
    (CLASSIFIER, 128, MULTS[256], 2, (8, 16, 32)): {"image_size": 256},
    (CLASSIFIER, 128, MULTS[512], 2, (16, 32, 64)): {"image_size": 512},
}  # fmt: skip
MOST = {"num_head_channels": 64}  # and a linear schedule, queries, keys and values in the first order


def words(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> dict[str, Any]:
    """Everything of MODEL, NEEDED and DIFFUSION. UserError for what is unknown, missing, or cannot be."""
    kind = kind_of(tensors)
    if config is None:
        said = told_by(tensors, kind, origin)
    else:
        said = arguments(config, origin) if "model_channels" in config else flags(config, tensors, kind, origin)
    said = {**MODEL, **DIFFUSION, **said}
    if said["cls"] not in (None, kind):
        raise UserError(f"{origin}: cls: {said['cls']}, but its weights are those of a {kind}")
    for name, only in (("dims", (2,)), ("noise_schedule", SCHEDULES)):
        if said[name] not in only:
            raise UserError(f"{origin}: {name}: {said[name]!r}; read is {' or '.join(map(str, only))}")
    if said["num_head_channels"] not in (None, -1):  # numbers of heads then mean nothing
        said |= {"num_heads": 1, "num_heads_upsample": -1}
    return {**said, "cls": kind}


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """The class whose weights these are."""
    if not any(name.startswith("output_blocks.") for name in tensors):
        return CLASSIFIER
    first = tensors.get("input_blocks.0.0.weight")
    return UPSAMPLER if first is not None and first.shape[1] in (2, 6) else UNET  # of pictures with 1 or 3 channels


def arguments(config: Mapping, origin: str) -> dict[str, Any]:
    """In the words of a constructor."""
    refuse_unknown(config, (*MODEL, *NEEDED, *DIFFUSION), origin)
    if missing := [name for name in NEEDED if name not in config]:
        raise UserError(f"{origin}: {', '.join(missing)}: missing; a model of guided-diffusion has {', '.join(NEEDED)}")
    return {name: value for name, value in config.items() if name not in IGNORED}


def flags(config: Mapping, tensors: Mapping[str, Tensor], kind: str, origin: str) -> dict[str, Any]:
    """In the words of a script. How many classes there are is not among them, but in the weights."""
    refuse_unknown(config, (*FLAGS, *CLASSIFIER_FLAGS, *DIFFUSION, *SIDES), origin)
    given = {**FLAGS, **CLASSIFIER_FLAGS, **config}
    side = int(config.get("large_size", 256) if kind == UPSAMPLER else config.get("image_size", 64))
    mults = UPSAMPLER_MULTS if kind == UPSAMPLER else MULTS
    mult = _numbers(given["channel_mult"]) if kind != CLASSIFIER else []
    if not mult and side not in mults:
        raise UserError(f"{origin}: channel_mult: it has to be given for sides of {side}; known are those of "
                        f"{', '.join(map(str, mults))}")
    said = {name: config[name] for name in DIFFUSION if name in config}
    said |= {"image_size": side, "channel_mult": mult or mults[side]}
    if kind == CLASSIFIER:
        own = {name.removeprefix("classifier_"): given[name] for name in CLASSIFIER_FLAGS}
        said |= {"model_channels": own["width"], "num_res_blocks": own["depth"], "out_channels": classes(tensors), **MOST}
        said |= {name: own[name] for name in ("use_scale_shift_norm", "resblock_updown", "pool")}
        resolutions = own["attention_resolutions"]
    else:
        labels = len(tensors.get("label_emb.weight", range(1000)))
        said |= {"model_channels": given["num_channels"], "out_channels": 6 if given["learn_sigma"] else 3,
                 "num_classes": labels if given["class_cond"] else None}  # fmt: skip
        said |= {name: given[name] for name in FLAGS if name in MODEL and name != "channel_mult"}
        said["num_res_blocks"], resolutions = given["num_res_blocks"], given["attention_resolutions"]
    return {**said, "attention_resolutions": [side // resolution for resolution in _numbers(resolutions)]}


def _numbers(text: str | Iterable[float]) -> list:
    return [int(part) for part in text.split(",") if part] if isinstance(text, str) else list(text)


def refuse_unknown(config: Mapping, known: Iterable[str], origin: str) -> None:
    for name in config:
        if name not in IGNORED and name not in known:
            raise UserError(f"{origin}: {name}: no argument or flag of guided-diffusion{near(name, known)}")


def classes(tensors: Mapping[str, Tensor]) -> int:
    """Of a classifier: the width of its last layer."""
    biases = [name for name in tensors if re.fullmatch(r"out\.\d+(\.c_proj)?\.bias", name)]
    return tensors[biases[-1]].shape[0] if biases else 0


def told_by(tensors: Mapping[str, Tensor], kind: str, origin: str) -> dict[str, Any]:
    """What the shapes tell, and of a published model of these shapes the rest. Heads, the order of queries, keys and values
    and the process leave no trace: of other models they are guessed, with a warning."""
    try:
        said = structure(tensors, kind)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{origin}: the shapes of its weights do not tell the architecture ({type(error).__name__}: {error}); "
                        "give the arguments or flags that it was made with, as yaml or json") from error
    known = PUBLISHED.get((kind, said["model_channels"], tuple(said["channel_mult"]), said["num_res_blocks"],
                           tuple(said["attention_resolutions"])))  # fmt: skip
    if known is None:
        told = (f"{origin}: its shapes are those of no published model, and do not tell heads, the order of queries, keys and "
                "values, or the noise schedule; the arguments or flags that it was made with, as yaml or json, say it")
        if any(len(value) // 3 % MOST["num_head_channels"] for name, value in tensors.items() if name.endswith("qkv.bias")):
            raise UserError(told)
        log.warning("%s: taken are 64 channels a head, the first order, linear", told)
    return said | MOST | (known or {})


def structure(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    """The arguments that shapes tell."""
    shape = {name: tuple(value.shape) for name, value in tensors.items()}
    width, out = shape["time_embed.0.weight"][1], shape.get("out.2.weight", (0,))[0]
    count = 1 + max(int(found[1]) for name in shape if (found := re.match(r"input_blocks\.(\d+)\.", name)))
    step, halves = stride(shape, count)
    firsts = range(1, count, step)  # of each level: its first residual block
    widths = [shape[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts]
    mult = [int(w / width) if w % width == 0 else w / width for w in widths]
    said = {
        "model_channels": width, "channel_mult": tuple(mult), "num_res_blocks": step - 1,
        "in_channels": shape["input_blocks.0.0.weight"][1] // (2 if kind == UPSAMPLER else 1), "out_channels": out,
        "num_classes": shape["label_emb.weight"][0] if "label_emb.weight" in shape else None,
        "attention_resolutions": [2**level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in shape],
        "use_scale_shift_norm": shape["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        "resblock_updown": count > step and not halves,
        "conv_resample": not halves or f"input_blocks.{step}.0.op.weight" in shape,
    }  # fmt: skip
    if kind == CLASSIFIER:
        said |= {"out_channels": classes(tensors), "pool": pool(shape)}
        if said["pool"] == "attention":
            positions = shape["out.2.positional_embedding"][1] - 1
            said["image_size"] = math.isqrt(positions) * 2 ** (len(widths) - 1)
    return said


def pool(shape: Mapping[str, tuple[int, ...]]) -> str:
    if "out.2.positional_embedding" in shape:
        return "attention"
    return "adaptive" if len(shape["out.0.weight"]) == 1 else "spatial_v2" if "out.3.weight" in shape else "spatial"


def stride(shape: Mapping[str, tuple[int, ...]], count: int) -> tuple[int, bool]:
    """Blocks from one level to the next, and whether something else than a residual block halves.

    Of ``count`` blocks on the way down (the first convolution is one) each level has its residual blocks and one that
    halves. A residual block that halves looks like the others; the way up shows where levels end. Without that: widths
    change only where a level begins, all residual blocks of a level have attention or none, and what halves has none.
    """
    others = [i for i in range(1, count) if f"input_blocks.{i}.0.out_layers.3.weight" not in shape]
    if others:
        return others[0], True
    if "output_blocks.0.0.in_layers.0.weight" in shape:
        ends = [i for i in range(count) for k in (1, 2) if f"output_blocks.{i}.{k}.in_layers.0.weight" in shape]
        return (ends[0] + 1 if ends else count), False
    widths = [shape[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in range(1, count)]
    attends = [f"input_blocks.{i}.1.qkv.weight" in shape for i in range(1, count)]
    fits = math.gcd(count, *(i for i in range(1, count - 1) if widths[i] != widths[i - 1]))
    for step in (step for step in range(fits, 1, -1) if fits % step == 0):
        levels = [attends[start : start + step] for start in range(0, count, step)]
        if all(len(set(level[: step - 1])) == 1 and not any(level[step - 1 :]) for level in levels):
            return step, False
    raise ValueError("no number of blocks to a level goes with the widths and the attention")
