"""Frozen picture encoders (CLIP's vision tower): where their files are, their sizes, and what they make of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.base import without_autocast
from ldm.common.files import UserError, digest, file_sha256
from ldm.common.quiet import quiet_transformers
from ldm.common.weights import content

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels in 0..1 (2103.00020)
FILES = ["config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Facts:
    """Sizes of a picture encoder."""

    width: int  # of the embedding that is compared with texts
    hidden: int  # of the last hidden states
    side: int  # of the pictures that it reads
    length: int  # hidden states: one for the picture, one for each patch
    parameters: int


RANDOM = "random"  # a name: a small tower with random weights, always the same, for trying things out without a network
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8,
             projection_dim=32)  # fmt: skip
KNOWN = {
    RANDOM: Facts(32, 32, 64, 65, 26_496),
    "openai/clip-vit-large-patch14": Facts(768, 1024, 224, 257, 303_966_208),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": Facts(1024, 1280, 224, 257, 632_076_800),
}


class FrozenVision:
    """A picture encoder that is never trained, saved or copied: a deep copy of its owner shares it.

    name: a local folder (transformers layout), a model hub id, or RANDOM. Nothing is read until it is needed, but for the sizes
    of encoders that are not in KNOWN.
    """

    def __init__(self, name: str):
        self.name = name
        self.facts = KNOWN[name] if name in KNOWN and not Path(name).is_dir() else read_facts(name)

    def __deepcopy__(self, memo: dict) -> FrozenVision:
        return self

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "model"}

    @cached_property
    def folder(self) -> Path:
        return find(self.name)

    @cached_property
    def hash(self) -> str:
        """Of the weights."""
        if self.name == RANDOM:
            return digest({key: content(value) for key, value in self.model.state_dict().items()})
        return digest({path.name: file_sha256(path) for path in sorted(self.folder.glob("*.safetensors"))})

    def prepare(self) -> None:
        """Finds the files, or downloads them. UserError names what is missing."""
        if self.name != RANDOM:
            _ = self.folder

    @cached_property
    def model(self) -> nn.Module:
        """The module, float32, eval, without gradients."""
        import transformers

        if self.name == RANDOM:
            with torch.random.fork_rng(devices=()), torch.device("cpu"):
                torch.manual_seed(0)
                made = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SMALL))
            return made.eval().requires_grad_(False)
        try:
            with quiet_transformers(), torch.device("cpu"):
                model, found = transformers.CLIPVisionModelWithProjection.from_pretrained(
                    self.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"picture encoder {self.name}: cannot read {self.folder}: {_first_line(error)}") from error
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"picture encoder {self.name}: the weights in {self.folder} lack {', '.join(missing[:5])} ...")
        return model.eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B,3,H,W) in [-1,1] -> embedding (B,D), last hidden states (B,L,E), in fp32, on the pictures' device."""
        with torch.no_grad(), without_autocast(x.device):
            found = self.model.to(x.device)(pixel_values=prepared(x, self.facts.side))
        return found.image_embeds, found.last_hidden_state


def prepared(x: Tensor, side: int) -> Tensor:
    """(B,3,H,W) in [-1,1] -> (B,3,side,side), resized to the shorter side, cropped in the middle, normalised."""
    short = min(x.shape[2:])
    size = [round(length * side / short) for length in x.shape[2:]]
    x = F.interpolate(x.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((length - side) // 2 for length in size)
    x = x[:, :, top : top + side, left : left + side] / 2 + 0.5
    mean, std = (torch.tensor(each, device=x.device).view(3, 1, 1) for each in (MEAN, STD))
    return (x - mean) / std


def read_facts(name: str) -> Facts:
    """From config.json; no weights are read."""
    import transformers

    folder = find(name, only_config=True)
    try:
        config = transformers.CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"picture encoder {name}: cannot read {folder}/config.json: {_first_line(error)}") from error
    with torch.device("meta"):
        parameters = sum(p.numel() for p in transformers.CLIPVisionModelWithProjection(config).parameters())
    patches = (config.image_size // config.patch_size) ** 2
    return Facts(config.projection_dim, config.hidden_size, config.image_size, patches + 1, parameters)


def find(name: str, only_config: bool = False) -> Path:
    """The folder of an encoder's config and weights: local, in the hub's cache, or downloaded."""
    folder, problem = Path(name), "no such folder"
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "~", "/")):
        from huggingface_hub import snapshot_download

        for offline in (True, False):  # the cache first: no question to the network when all is there
            try:
                files = FILES[:1] if only_config else FILES
                folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=offline))
                break
            except (OSError, ValueError) as error:  # huggingface_hub: not cached, offline, no such id, no connection
                problem = _first_line(error)
    lacking = [kind for kind in ["config.json"] + ["*.safetensors"] * (not only_config) if not any(folder.glob(kind))]
    if lacking:
        problem = f"{folder} lacks {', '.join(lacking)}" if folder.is_dir() else problem
        raise UserError(f"picture encoder {name}: {problem}; give a folder that holds config.json and model.safetensors, or "
                        f"`hf download {name}` on a machine with network and copy its cache (HF_HOME) here")
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
