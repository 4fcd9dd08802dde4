"""CLIP's text encoder in folders of transformers and diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.bundle import Bundle
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.interop import names, rows, text_folders, text_names

PARITY = Path(__file__).parents[1] / "data" / "parity" / "diffusers_models"
PROMPTS = json.loads((PARITY / "prompts.json").read_text())
BLOCK = {"target": "ldm.interop.text_folders.clip", "params": {"folder": str(PARITY / "text_encoder"), "dropout": 0.1}}


def test_transformers_reads_what_is_written(tmp_path):
    import transformers as tf

    ours = build(BLOCK)
    (tmp_path / "text_encoder").mkdir()
    config = text_folders.config_of(ours, names.defaults(ours.block))
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config))
    weights = rows.back(text_names.hf_clip(3), ours.state_dict())
    save_file(weights, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    text_folders.write_tokenizer(ours, tmp_path / "tokenizer")
    theirs, found = tf.CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tf.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens.input_ids).last_hidden_state, ours({"caption": PROMPTS}).tokens)
    again = text_folders.clip(str(tmp_path / "text_encoder"))
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in again.state_dict().items() if "vocab" not in name)
    assert torch.equal(again({"caption": PROMPTS}).tokens, ours({"caption": PROMPTS}).tokens)


def test_a_checkpoint_holds_the_encoder_and_asks_for_no_folder(model_config, tmp_path):
    shutil.copytree(PARITY / "text_encoder", tmp_path / "model" / "text_encoder")
    shutil.copytree(PARITY / "tokenizer", tmp_path / "model" / "tokenizer")
    params = {**BLOCK["params"], "folder": str(tmp_path / "model" / "text_encoder")}
    config = {**model_config, "model": {**model_config["model"], "params": {**model_config["model"]["params"], "conditioner": {**BLOCK, "params": params}}}}
    made = Bundle.from_config(config, trust=True).to_empty(device="cpu")
    made.conditioner = build(config["model"]["params"]["conditioner"])
    for name, weights in made.named_parameters():
        if not name.startswith("conditioner"):
            torch.nn.init.normal_(weights, std=0.1)
    made.autoencoder.set_statistics(torch.zeros(4), torch.ones(4), 1)
    before = made.generate(["a (cat:1.4)"], steps=2, prompt_weights=True)
    made.save(tmp_path / "saved.safetensors")
    shutil.rmtree(tmp_path / "model")
    import ldm

    again = ldm.load(tmp_path / "saved.safetensors")
    assert again.config["model"]["params"]["conditioner"]["target"] == "ldm.conditioners.clip.ClipText"
    assert again.content_hash() == made.content_hash()
    assert torch.equal(again.generate(["a (cat:1.4)"], steps=2, prompt_weights=True), before)
    assert not torch.equal(again.generate(["a (cat:1.4)"], steps=2), before)
    long = ["cat " * 90, "a cat"]
    windows = again.generate(long, steps=2, long="window")
    assert not torch.equal(windows[0], again.generate(long[:1], steps=2)[0])
    torch.testing.assert_close(windows[1], again.generate(long[1:], steps=2, indices=[1])[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="more than 77 tokens"):
        again.generate(long, steps=2, long="error")
    negative = again.generate(["a cat"], steps=2, long="window", negative_prompt="cat " * 90)
    assert not torch.equal(negative, again.generate(["a cat"], steps=2))


def test_the_tokenizer_says_which_ids_are_special(tmp_path):
    shutil.copytree(PARITY / "tokenizer", tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "!"}))  # as Stable Diffusion 2
    made = text_folders.clip(str(PARITY / "text_encoder"), str(tmp_path / "tokenizer"))
    assert (made.start, made.end, made.pad) == (567, 568, 0)
    assert made.tokenizer([""]).ids[0, 0, :4].tolist() == [567, 568, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "config of a clip_text_model, got 'bert'"),
        ({"hidden_size": ...}, "without hidden_size"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
    ],
)
def test_other_configs_are_refused(change, message):
    config = json.loads((PARITY / "text_encoder" / "config.json").read_text()) | change
    with pytest.raises(UserError, match=message):
        text_folders.settings({key: value for key, value in config.items() if value is not ...})
