"""Vision models of random weights, saved as their users have them."""

import json

import torch


def tiny(kind, folder):
    """One of 16 px with features of width 16 in a grid of 4x4, in the folder; gives it back."""
    import transformers as t

    torch.manual_seed(0)
    shared = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    made = {
        "vit": lambda: t.ViTModel(t.ViTConfig(**shared, intermediate_size=16)),
        "registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**shared, mlp_ratio=1)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(vision_config={**shared, "intermediate_size": 16}, text_config=dict(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))),
        "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[4, 16], depths=[1, 1], num_stages=2, image_size=16)),
    }[kind]()
    made.save_pretrained(folder)
    pictures = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5], "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return made.eval()
