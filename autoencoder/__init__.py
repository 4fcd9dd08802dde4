"""Stage 1: autoencoders between pictures and latents. Knows nothing of diffusion."""

import ldm  # noqa: F401  (repairs torchvision before Lightning and lpips import it)
