"""What a training step of the embedded default costs, and what each of its choices is worth.

    python -m benchmarks.training_step [--rounds 15] [--plain-allocator]

Latents and text states are random numbers of the right shapes, except in the row that computes them in the step. The row
"no huge pages" cannot be timed in the same process: run the command twice, once with --plain-allocator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs/ldm_txt2img.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plain-allocator", action="store_true", help="leave malloc as it is")
    args = parser.parse_args()
    if not args.plain_allocator:
        from ldm.common.allocator import keep_memory

        keep_memory()
    import torch

    from benchmarks.rounds import interleaved, machine, show
    from ldm.app.stages import read

    stage1, stage2 = read([CONFIG])[0]
    torch.manual_seed(0)
    batch_size = stage2.batch_size
    candidates = {
        f"as configured, batch {batch_size}": step_of(stage1, stage2),
        "AdamW (fused) in place of Muon": step_of(stage1, stage2, optimizer={
            "target": "torch.optim.AdamW", "params": {"lr": 1e-3, "fused": True}}),
        "channels first": step_of(stage1, stage2, channels_last=False),
        "latents and text computed in the step": step_of(stage1, stage2, cached=False),
    }
    print(f"{machine()}\n\n{show(interleaved(candidates, args.rounds))}")


def step_of(stage1, stage2, optimizer: dict | None = None, channels_last: bool = True, cached: bool = True
            ) -> Callable[[], None]:
    """-> one training step of a fresh model: draw, forward, backward, optimizer, average."""
    import torch

    from ldm.common.build import build
    from ldm.common.optim import make_optimizer
    from ldm.loss import diffusion_loss

    autoencoder = build(stage1.config["model"]["params"]["autoencoder"])
    module = build(stage2.config["model"], autoencoder=autoencoder, seed=0, sampling={})
    model, n = module.model, stage2.batch_size
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    chosen = make_optimizer(optimizer or module.optimizer, model)
    caption = ["a large purple star left of a small white ring on a gray background"] * n
    batch = {"image": torch.rand(n, 3, 64, 64) * 2 - 1, "caption": caption}
    states, mask = module.conditioner.encode(caption)
    side = 64 // autoencoder.factor
    stored = {"latent": torch.randn(n, autoencoder.channels, side, side), "text_states": states, "text_mask": mask}

    def step() -> None:
        source = stored if cached else batch
        z = module.latent(source, list(range(n)), "posterior")
        t = module.loss.density(torch.rand(n), model["denoiser"].process)
        cond = module.condition(model, source, z, lambda stream: torch.rand(n))
        loss = diffusion_loss(model["denoiser"], z, cond, t, torch.randn_like(z), module.loss.weight).mean()
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        module.ema.update(model)

    return step


if __name__ == "__main__":
    main()
