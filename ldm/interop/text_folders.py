"""CLIP's text encoder in a folder of transformers or diffusers: config.json, model.safetensors, and the tokenizer's files.

A config that trains with one takes it from there, and its checkpoints then hold it:
    conditioner: {target: ldm.interop.text_folders.clip, params: {folder: path/to/text_encoder, layer: -2}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm.common.build import build
from ldm.common.files import UserError, atomic_write
from ldm.conditioners.clip import ClipText
from ldm.conditioners.encoders import find as find_encoder
from ldm.conditioners.tokens import specials
from ldm.conditioners.vocabulary import Vocabulary
from ldm.conditioners.vocabulary import find as find_tokenizer
from ldm.interop import component, text_names

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = "config.json"
SIZES = {  # of config.json -> ours
    "vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "mlp", "max_position_embeddings": "max_length", "hidden_act": "activation",
}  # fmt: skip


def clip(folder: str, tokenizer: str | None = None, **params: Any) -> ClipText:
    """ClipText with the weights and the vocabulary of a folder, or of a model of the hub (its cache, else downloaded).

    Args:
        folder: with config.json and model.safetensors, or the hub's id of such a model.
        tokenizer: see ``ldm.conditioners.vocabulary``; None: the folder itself, or the one beside it that diffusers has.
        params: of ClipText, such as layer, pooled or dropout.
    """
    place = find_encoder(folder)
    block, weights = read(place, str(tokenizer_beside(place)) if tokenizer is None else tokenizer, **params)
    made = build(block)
    if not made.transformer.position.is_meta:  # a plan is made, for which sizes are enough
        made.load_state_dict(weights)
    made.block = block
    return made


def read(folder: Path, tokenizer: str | None, later: bool = False, **params: Any) -> tuple[dict, dict[str, Tensor]]:
    """-> our block, and the weights by our names, the vocabulary among them where there is one. later: the tokenizer is made
    when it is asked for.

    Raises:
        UserError: for an encoder of another kind, and names or shapes that do not fit.
    """
    said = settings(component.read_json(folder / CONFIG), str(folder / CONFIG))
    weights = component.read_weights(folder)
    if later and tokenizer is not None and (ids := ids_in(Path(tokenizer))):
        found = text_names.infer(weights, "", str(folder), **{**said, **ids, "vocabulary": tokenizer, **params})
        return found.block, text_names.read(found, weights, str(folder))
    words = None if tokenizer is None else find_tokenizer(tokenizer)
    ids = {} if words is None else special_ids(words, pad_token(Path(tokenizer)))
    found = text_names.infer(weights, "", str(folder), **{**said, **ids, "vocabulary": tokenizer, **params})
    ours = text_names.read(found, weights, str(folder))
    return found.block, ours if words is None else ours | {"vocabulary.text": Vocabulary(None).hold(words)}


def settings(config: Mapping, origin: str = CONFIG) -> dict:
    """Params of ClipText from transformers' config.json, of a CLIPTextModel or of a whole CLIP. The ids of special tokens are
    not among them: published ones are wrong, and the tokenizer knows them."""
    config = config.get("text_config", config)
    missing = [name for name in SIZES if name not in config]
    if missing or config.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise UserError(f"{origin}: expected the config of a clip_text_model, got {config.get('model_type')!r}"
                        + f" without {', '.join(missing)}" * bool(missing))  # fmt: skip
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(f"{origin}: layer_norm_eps {config['layer_norm_eps']}; only 1e-05 is known")
    return {ours: config[theirs] for theirs, ours in SIZES.items()}


def config_of(conditioner: ClipText, params: Mapping[str, Any]) -> dict:
    """transformers' config.json for such an encoder. params: all of ClipText's, defaults filled in."""
    projection = conditioner.projection
    width = params["width"]
    sizes = {theirs: params[ours] for theirs, ours in SIZES.items()}
    sizes |= {"num_attention_heads": params["heads"] or max(1, width // 64), "intermediate_size": params["mlp"] or 4 * width}
    return {**sizes, "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
            "model_type": "clip_text_model", "projection_dim": width if projection is None else projection.out_features,
            "bos_token_id": conditioner.start, "eos_token_id": conditioner.end, "pad_token_id": conditioner.pad,
            "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "dropout": 0.0, "torch_dtype": "float32"}  # fmt: skip


def special_ids(tokenizer: Tokenizer, pad: str | None) -> dict[str, int]:
    """start, end, pad."""
    before, after = specials(tokenizer)
    return {"start": before[-1], "end": after[0], "pad": after[0] if pad is None else tokenizer.token_to_id(pad)}


def ids_in(folder: Path) -> dict[str, int] | None:
    """start, end, pad by a folder's vocab.json, without the tokenizer; None where that does not tell."""
    names = [marked(folder, f"{mark}_token") for mark in ("bos", "eos", "pad")]
    words = component.read_json(folder / "vocab.json") if (folder / "vocab.json").is_file() else {}
    found = [words.get(names[1] if name is None else name) for name in names]
    return dict(zip(("start", "end", "pad"), found, strict=True)) if all(isinstance(each, int) for each in found) else None


def pad_token(folder: Path) -> str | None:
    """The token that fills texts up, as the tokenizer's folder says; None where it does not."""
    return marked(folder, "pad_token")


def marked(folder: Path, mark: str) -> str | None:
    """What a tokenizer's folder says that a special token is."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        token = component.read_json(folder / name).get(mark) if (folder / name).is_file() else None
        if token:
            return token["content"] if isinstance(token, Mapping) else token
    return None


def tokenizer_beside(folder: Path) -> Path:
    """The folder itself, or `tokenizer` beside `text_encoder`, as diffusers lays models out."""
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    here = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return folder if here or not beside.is_dir() else beside


def write_tokenizer(conditioner: ClipText, folder: Path) -> None:
    """The tokenizer as transformers' CLIPTokenizer reads it."""
    backend = conditioner.vocabulary.tokenizer
    model = json.loads(backend.to_str())["model"]
    start, end, pad = (backend.id_to_token(i) for i in (conditioner.start, conditioner.end, conditioner.pad))
    marks = {"bos_token": start, "eos_token": end, "unk_token": model.get("unk_token") or end, "pad_token": pad}
    config = {**marks, "model_max_length": conditioner.max_length, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    texts = {"vocab.json": json.dumps(model["vocab"], ensure_ascii=False), "special_tokens_map.json": json.dumps(marks),
             "merges.txt": "\n".join(["#version: 0.2", *pairs, ""]), "tokenizer_config.json": json.dumps(config, indent=1)}
    for name, text in texts.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
