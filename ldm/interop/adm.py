"""guided-diffusion's files (ADM, 2105.05233): a state dict alone, of a UNet, an upsampler or a classifier, in and out.

The same names as CompVis' UNet, without a prefix. Classes are rows that are added to the embedding of time: here they
belong to the conditioner. Pixels are the latents. What such a file leaves open ``adm_words`` knows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ldm.betas import spaced
from ldm.bundle import Bundle
from ldm.classifier import NoisyClassifier, same
from ldm.common.build import build, locate
from ldm.common.files import UserError
from ldm.interop import adm_words, compvis_unet, names, unet_names
from ldm.interop.rows import SAME, Row, back, check, existing, inside, pair, squeezed, to_us
from ldm.interop.said import Said

ORDERS: tuple[unet_names.Order, ...] = ("heads first", "q k v first")  # by use_new_attention_order
LABEL, LOW, JOIN = (f"ldm.conditioners.{name}" for name in ("label.ClassLabel", "low_resolution.LowResolution", "join.Join"))
CLASSIFIER, DDPM = "ldm.networks.classifier.Classifier", "ldm.process.DDPM"
SETTINGS = {"dropout": "dropout", "use_scale_shift_norm": "scale_shift", "resblock_updown": "resblock_updown",
            "conv_resample": "conv_resample"}  # fmt: skip
BODY = {"time.0": "time_embed.0", "time.2": "time_embed.2", "conv_in": "input_blocks.0.0"}
HEADS = {  # of classifiers: ours -> theirs, by the pool
    "adaptive": {"norm_out": "out.0", "head": "out.3"}, "spatial": {"head.0": "out.0", "head.2": "out.2"},
    "attention": {"norm_out": "out.0", "head.qkv": "out.2.qkv_proj", "head.out": "out.2.c_proj"},
    "spatial_v2": {"head.0": "out.0", "head.1": "out.1", "head.3": "out.3"},
}  # fmt: skip


def holds(keys: Iterable[str]) -> bool:
    """Whether these names are those of a UNet of guided-diffusion."""
    keys = set(keys)
    return holds_any(keys) and any(key.startswith("output_blocks.") for key in keys)


def holds_classifier(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return holds_any(keys) and not any(key.startswith("output_blocks.") for key in keys)


def holds_any(keys: Iterable[str]) -> bool:
    keys = set(keys)
    is_text = any(".transformer_blocks." in key for key in keys)  # LDM's UNet, cut out of its checkpoint
    return {"input_blocks.0.0.weight", "time_embed.0.weight"} <= keys and not is_text


def read(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> tuple[dict, dict[str, Tensor]]:
    """-> what a checkpoint of ours would say of this UNet, and its weights by our names.

    config: arguments of the constructor or flags of the scripts; None: what the shapes tell, see ``adm_words.told_by``.
    """
    words = adm_words.words(tensors, config, origin)
    ours, order = config_of(words, origin), ORDERS[words["use_new_attention_order"]]
    try:
        bundle = Bundle.from_config(ours)
    except ValueError as error:
        raise UserError(f"{origin}: the model that its arguments describe cannot be built: {error}") from error
    own = {f"autoencoder.{name}": value for name, value in names.own(bundle.autoencoder.state_dict()).items()}
    expected = {name: value for name, value in bundle.state_dict().items() if name not in own}
    table = rows(bundle, order)
    found = to_us(table, tensors)
    check(table, tensors, expected, found, origin)
    return {"kind": "diffusion", "config": ours, "layout": "adm", "order": order}, found | own


def write(bundle: Bundle, order: unet_names.Order | None = None) -> tuple[dict[str, Tensor], dict]:
    """The bundle's UNet as guided-diffusion has it: the state dict, and the arguments for it. order: of queries, keys and
    values; None: that of the file which the bundle came from, else the first.

    Raises:
        UserError: where there is no place for the model.
    """
    order = order or bundle.about.get("order") or ORDERS[0]
    words = arguments_of(bundle.config, bundle.denoiser.network) | {"use_new_attention_order": order == ORDERS[1]}
    return _on_cpu(back(rows(bundle, order), bundle.state_dict())), words


def rows(bundle: Bundle, order: unet_names.Order) -> list[Row]:
    table, ours = unet_names.rows(bundle.denoiser.network, "compvis", order=order), bundle.state_dict()
    table = inside(table, "denoiser.network.")
    table += [Row((name,), ("label_emb.weight",)) for name in ours if name.startswith("conditioner.")]
    return existing(table, ours)


def config_of(words: Mapping[str, Any], origin: str) -> dict:
    """Our config of a UNet."""
    channels, out = words["in_channels"], words["out_channels"]
    if out not in (channels, 2 * channels):
        raise UserError(f"{origin}: out_channels: {out}; of pictures with {channels} channels it is {channels}, or "
                        f"{2 * channels} with learn_sigma")
    label = {"classes": words["num_classes"], "width": 4 * words["model_channels"], "to": "vector", "null_row": False}
    parts = [{"target": LABEL, "params": label}] * (words["num_classes"] is not None)
    parts += [{"target": LOW, "params": {"channels": channels, "resize": "bilinear"}}] * (words["cls"] == adm_words.UPSAMPLER)
    conditioner = {"target": JOIN, "params": {"parts": parts}} if len(parts) > 1 else parts[0] if parts else None
    params = {"network": network_of(words, origin), "conditioner": conditioner, "process": process_of(words),
              "parameterization": "data" if words["predict_xstart"] else "noise",
              "variance": "fixed" if out == channels else "learned_range"}  # fmt: skip
    return {
        "autoencoder": {"target": "autoencoder.base.Identity", "params": {"image_channels": channels}},
        "model": {"target": "ldm.lit.DiffusionModule", "params": {k: v for k, v in params.items() if v is not None}},
        "sampling": sampling_of(words, learned=out != channels),
    }  # fmt: skip


def network_of(words: Mapping[str, Any], origin: str) -> dict:
    """The block of a UNet, or of a classifier, whose words are almost the same."""
    ours = ("cls", "pool", *adm_words.DIFFUSION)
    block = compvis_unet.block_of(Said({name: value for name, value in words.items() if name not in ours}, origin))
    if words["cls"] != adm_words.CLASSIFIER:
        return block
    known = inspect.signature(locate(CLASSIFIER)).parameters
    params = {name: value for name, value in block["params"].items() if name in known}
    params |= {"classes": words["out_channels"], "in_channels": words["in_channels"], "pool": words["pool"],
               "size": words["image_size"]}  # fmt: skip
    return {"target": CLASSIFIER, "params": {"head_channels": None} | params}


def process_of(words: Mapping[str, Any]) -> dict:
    """Linear betas are those of 1000 steps, scaled."""
    steps = words["diffusion_steps"]
    params = {"schedule": words["noise_schedule"], "steps": steps}
    if words["noise_schedule"] == "linear" and steps != 1000:
        params |= {"start": 1e-4 * 1000 / steps, "end": 2e-2 * 1000 / steps}
    if words["rescale_timesteps"]:
        params["tells"] = "thousandth"
    return {"target": DDPM, "params": params}


def sampling_of(words: Mapping[str, Any], learned: bool) -> dict:
    """As its scripts sample: ancestral steps or DDIM at some of the times, x0 clipped."""
    spacing, steps = str(words["timestep_respacing"] or words["diffusion_steps"]), words["diffusion_steps"]
    kept = spaced(steps, spacing)
    times: Any = "linspace"  # even from the first to the last
    if spacing.startswith("ddim"):
        times = {"name": "leading", "offset": 0}
    elif "," in spacing:
        times = [*map(float, reversed(kept)), -1.0]
    clip = {"clip_x0": bool(words["clip_denoised"])}
    sampler = {"name": "ddpm", "variance": "learned_range" if learned else "large"}
    sampler = {"name": "ddim"} if words["use_ddim"] or spacing.startswith("ddim") else sampler
    found = {"sampler": sampler | clip, "steps": len(kept), "times": times, "guidance": 1.0}
    return found | ({"size": [words["image_size"]] * 2} if words["image_size"] else {})


def arguments_of(config: Mapping, network: nn.Module) -> dict:
    """A constructor's arguments, and those of the diffusion, for a config of ours. UserError for what has no counterpart."""
    params, autoencoder = config["model"]["params"], config["autoencoder"]
    only("model", params, self_conditioning=(False,), parameterization=("noise", "data"), variance=("fixed", "learned_range"))
    only("autoencoder", autoencoder, target=("autoencoder.base.Identity",))
    conditioner = params.get("conditioner")
    parts = [conditioner] if conditioner else []
    parts = conditioner["params"]["parts"] if parts and conditioner["target"] == JOIN else parts
    targets = [part["target"] for part in parts]
    if targets not in ([], [LABEL], [LOW], [LABEL, LOW]):
        raise UserError(f"guided-diffusion has models of classes and of low resolution, not of {', '.join(targets)}")
    channels = (autoencoder.get("params") or {}).get("image_channels", 3)
    learned, size = params.get("variance", "fixed") != "fixed", (config.get("sampling") or {}).get("size")
    words = {"cls": adm_words.UPSAMPLER if LOW in targets else adm_words.UNET, "image_size": size[0] if size else None,
             "in_channels": channels, "out_channels": channels * (2 if learned else 1),
             **unet_words(params["network"], compvis_unet.UNET, network), **process_words(params.get("process")),
             "predict_xstart": params.get("parameterization") == "data"}  # fmt: skip
    for target, said in zip(targets, (part["params"] for part in parts), strict=True):
        if target == LABEL:
            only("ClassLabel", said, to=("vector",), width=(4 * words["model_channels"],))
            only("UNet", params["network"]["params"], vector=("add",))
            words["num_classes"] = said["classes"] + said.get("null_row", True)
        else:
            only("LowResolution", {"resize": "none", **said}, resize=("bilinear",), noise=(None,), channels=(channels,))
    return words | sampling_words(config.get("sampling") or {})


def sampling_words(sampling: Mapping) -> dict:
    """Of its scripts, where they sample so."""
    sampler, times, steps = sampling.get("sampler"), sampling.get("times"), sampling.get("steps")
    if not isinstance(sampler, Mapping) or sampler.get("name") not in ("ddpm", "ddim"):
        return {}
    spacing = str(steps) if times == "linspace" else f"ddim{steps}" if times == {"name": "leading", "offset": 0} else None
    found = {"use_ddim": sampler["name"] == "ddim", "clip_denoised": sampler.get("clip_x0", False)}
    return found | ({"timestep_respacing": spacing} if spacing else {})


def process_words(block: Mapping | None) -> dict:
    params = (block or {}).get("params") or {}
    words = {"noise_schedule": params.get("schedule"), "diffusion_steps": params.get("steps", 1000),
             "rescale_timesteps": params.get("tells") == "thousandth"}  # fmt: skip
    known = bool(block) and block["target"] == DDPM and words["noise_schedule"] in adm_words.SCHEDULES
    if not known or not same(build(block), build(process_of(words))):
        raise UserError(f"guided-diffusion has DDPM's linear and cosine betas, not the process {dict(block or {})}")
    return words


def unet_words(block: Mapping, target: str, network: nn.Module) -> dict:
    """The arguments of the constructor for a network of ours and its block: a UNet, or a classifier."""
    if block["target"] != target:
        raise UserError(f"guided-diffusion has no network {block['target']}; here its counterpart is {target}")
    known = inspect.signature(locate(target)).parameters
    said = {name: each.default for name, each in known.items()} | dict(block["params"])
    only("UNet", said, attention=("self",), patch_size=(1,), dims=(2,), attention_blocks=(None,))
    groups = {part.num_groups for part in network.modules() if isinstance(part, nn.GroupNorm)}
    if groups != {compvis_unet.GROUPS} or network.middle[0].attention is None:
        raise UserError(f"guided-diffusion's networks have {compvis_unet.GROUPS} groups in every normalisation, and attention "
                        f"in the middle; this one has groups {sorted(groups)}, middle_depth {said.get('middle_depth')}")
    width, mult = said["time_channels"] or said["model_channels"], said["channel_mult"]
    single = {name: set(given) if isinstance(given := said[name], (list, tuple)) else {given}
              for name in ("num_res_blocks", "num_heads")}  # fmt: skip
    if mult[0] != 1 or any(len(values) > 1 for values in single.values()):
        raise UserError(f"guided-diffusion has no network whose first convolution, numbers of blocks or heads differ from "
                        f"those of its levels: channel_mult {list(mult)}, {single}")
    return {
        "model_channels": width, "channel_mult": [_ratio(int(said["model_channels"] * m + 1e-6), width) for m in mult],
        **{name: values.pop() for name, values in single.items()}, "num_head_channels": said["head_channels"] or -1,
        "num_heads_upsample": said.get("up_heads") or -1,
        "attention_resolutions": [2**level for level, depth in enumerate(said["transformer_depth"]) if depth],
        **{theirs: said[ours] for theirs, ours in SETTINGS.items()},
    }  # fmt: skip


def _ratio(wide: int, width: int) -> float:
    """What times width is wide, as int() rounds it."""
    if wide % width == 0:
        return wide // width
    return wide / width if int(wide / width * width) == wide else math.nextafter(wide / width, math.inf)


def only(where: str, said: Mapping[str, Any], **values: Iterable[Any]) -> None:
    """UserError unless every setting that is given has one of the values that there are in guided-diffusion."""
    for name, there in values.items():
        if name in said and said[name] not in there:
            raise UserError(f"guided-diffusion has no {where} with {name} {said[name]!r}, only {' or '.join(map(repr, there))}")


def read_classifier(tensors: Mapping[str, Tensor], config: Mapping | None, origin: str) -> NoisyClassifier:
    """The classifier among these tensors, in eval mode. config: as for ``read``."""
    words = adm_words.words(tensors, config, origin)
    order = ORDERS[words["use_new_attention_order"]]
    about = {"kind": "classifier", "network": network_of(words, origin), "process": process_of(words), "order": order}
    try:
        classifier = NoisyClassifier.from_about(about)
    except ValueError as error:
        raise UserError(f"{origin}: the classifier that its arguments describe cannot be built: {error}") from error
    expected, table = classifier.state_dict(), classifier_rows(classifier.network, order)
    found = to_us(table, tensors)
    check(table, tensors, expected, found, origin)
    return classifier.assign(found, origin)


def write_classifier(classifier: NoisyClassifier, order: unet_names.Order | None = None) -> tuple[dict[str, Tensor], dict]:
    """Its state dict and its arguments in guided-diffusion, as ``write`` has those of a UNet."""
    about, network = classifier.about, classifier.network
    order, params = order or about.get("order") or ORDERS[0], about["network"]["params"]
    words = unet_words(about["network"], CLASSIFIER, network) | process_words(about["process"])
    words |= {"cls": adm_words.CLASSIFIER, "image_size": params.get("size"), "in_channels": params["in_channels"],
              "out_channels": network.classes, "pool": network.pool, "use_new_attention_order": order == ORDERS[1]}  # fmt: skip
    return _on_cpu(back(classifier_rows(network, order), classifier.state_dict())), words


def classifier_rows(network: nn.Module, order: unet_names.Order) -> list[Row]:
    table = [row for ours, theirs in BODY.items() for row in pair(ours, theirs)]
    for ours, stage, theirs, _ in unet_names.stages(network):
        table += unet_names.of_stage(stage, ours, "", theirs, 0, order)
    matrix = {"adaptive": squeezed(2), "attention": squeezed(1)}.get(network.pool, SAME)  # convolutions of size 1 there
    for ours, theirs in HEADS[network.pool].items():
        table += pair(ours, theirs, weight=matrix)
    table.append(Row(("head.positions",), ("out.2.positional_embedding",)))
    return inside(existing(table, network.state_dict()), "network.")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As files have them; tensors without contents stay so."""
    return {name: (value if value.is_meta else value.cpu()).contiguous() for name, value in tensors.items()}
