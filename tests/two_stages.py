"""Configs of the smallest two stages: KL autoencoder f4 and UNet on drawn shapes."""

from pathlib import Path

import yaml


def write_configs(folder: Path, text_encoder: str) -> Path:
    """ae.yaml and ldm.yaml, which names ae.yaml."""
    bottleneck = {"target": "autoencoder.bottlenecks.KL", "params": {"channels": 4}}
    sizes = dict(bottleneck=bottleneck, width=8, mult=[1, 1], blocks=1, patch=2, attention=False)
    train, validation = ({"target": "ldm.data.shapes.Shapes", "params": params} for params in (
        {"count": 24}, {"count": 6, "start": 90}))  # fmt: skip
    common = {
        "data": {"train": train, "validation": validation}, "loader": {"batch_size": 4},
        "validation": {"every": 4, "batches": 2}, "checkpoint": {"every": 2, "keep": 2},
        "logging": {"every": 2, "images_every": 4, "wandb": False},
    }  # fmt: skip
    ae = {"name": "tiny_ae", "model": {"target": "autoencoder.lit.AutoencoderModule", "params": {
        "autoencoder": {"target": "autoencoder.model.convolutional", "params": sizes},
        "loss": {"target": "autoencoder.losses.ReconstructionLoss", "params": {"pixel": "l1"}},
        "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 1e-3}}}},
        "trainer": {"max_steps": 4, "accelerator": "cpu"}, **common}  # fmt: skip
    text = dict(encoder=text_encoder, width=16, depth=1, heads=2, dropout=0.1)
    unet = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, transformer_depth=[0, 1], num_heads=2)
    ldm = {"name": "tiny_ldm", "autoencoder": {"config": "ae.yaml"}, "model": {
        "target": "ldm.lit.DiffusionModule", "params": {
            "conditioner": {"target": "ldm.conditioners.text.TextConditioner", "params": text},
            "network": {"target": "ldm.networks.unet.UNet", "params": unet},
            "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 1e-3}}, "ema_decay": 0.9}},
        "cache": {"latents": True, "text": True}, "sampling": {"steps": 2, "count": 3},
        "trainer": {"max_steps": 6, "accelerator": "cpu"}, **common}  # fmt: skip
    for name, config in (("ae", ae), ("ldm", ldm)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder
