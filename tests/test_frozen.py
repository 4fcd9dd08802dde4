"""What a diffusion model only uses stays what it was, and in its own precision."""

import hashlib

import pytest
import torch
from stages import words
from torch import nn

from ldm.callbacks.promises import Promises
from ldm.common.files import digest
from ldm.conditioners.text import TextConditioner


class Captions(words.Pictures):
    def __getitem__(self, i):
        return {**super().__getitem__(i), "caption": ["a red circle", "a blue star", "a green square", "the small red star"][i]}


def content(module: nn.Module) -> str:
    return digest({name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in module.state_dict().items()})


def with_text(text_encoder, **options):
    torch.manual_seed(3)
    conditioner = TextConditioner(text_encoder, width=8, depth=1, heads=2, dropout=0.2)
    network = {"target": "ldm.networks.unet.UNet", "params": dict(
        model_channels=32, channel_mult=[1], num_res_blocks=1, transformer_depth=[1], num_heads=2)}  # fmt: skip
    return words.DiffusionModule(words.kl(), network, {"target": "torch.optim.AdamW", "params": {"lr": 1e-3}}, conditioner,
                                 ema_decay=0.9, **options)


def test_autoencoder_and_text_encoder_are_the_same_after_training(text_encoder):
    module = with_text(text_encoder)
    encoder, caption = module.conditioner.encoder.model, ["a red circle"]
    before = content(encoder), module.autoencoder.content_hash(), module.conditioner.encode(caption)[0]
    trainer = words.fit(module, 20, Captions(), callbacks=[Promises(print)])
    assert (content(encoder), module.autoencoder.content_hash()) == before[:2]
    module.train()
    assert torch.equal(module.conditioner.encode(caption)[0], before[2])  # its own dropout is asleep
    assert not any(part.training or p.requires_grad for part in encoder.modules() for p in part.parameters(recurse=False))
    frozen = {id(p) for part in (encoder, module.autoencoder, module.ema) for p in part.parameters()}
    held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert not frozen & set(held) and sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_the_autoencoder_stays_in_float32_unless_told_otherwise(text_encoder, autocast):
    told, kinds = [], {}
    module = with_text(text_encoder, autoencoder_autocast=autocast)
    parts = {"network": module.model["denoiser"].network.time[-1], "autoencoder": module.autoencoder.encoder.conv_in,
             "text": module.conditioner.encoder.model}  # fmt: skip
    hooks = [part.register_forward_hook(lambda part, given, out, name=name: kinds.update({name: getattr(out, "last_hidden_state", out).dtype}))
             for name, part in parts.items()]  # fmt: skip
    trainer = words.fit(module, 4, Captions(), callbacks=[Promises(told.append)], precision="bf16-mixed")
    for hook in hooks:
        hook.remove()
    autoencoder = torch.bfloat16 if autocast else torch.float32
    assert kinds == {"network": torch.bfloat16, "autoencoder": autoencoder, "text": torch.float32}
    (line,) = told
    assert "denoiser computes in bfloat16, weights float32" in line and ("autoencoder computes in float32" in line) != autocast
    z = module.latent({"image": torch.rand(1, 3, 8, 8)}, [0], "posterior")
    assert z.dtype == torch.float32 and z.isfinite().all() and torch.isfinite(trainer.callback_metrics["train/loss"])
    assert {value.dtype for value in module.state_dict().values() if value.is_floating_point()} == {torch.float32}
