"""What is done with a model, beside drawing from conditions (``Bundle.generate``): functions of a Bundle and of pictures.

    from ldm import tasks
    tasks.img2img(bundle, picture, "a red circle", strength=0.6, seed=3)

Pictures are (B,C,H,W) in [-1,1], one for all or as many as there are prompts. ``prompts`` are what ``generate`` takes: texts, a
batch of any conditions, None for the empty text. Whatever else ``generate`` takes (steps, sampler, times, guidance, seed,
indices, batch_size, callback, guide ...) is passed on to it; each picture has its own random numbers here too.
"""

from ldm.tasks.frames import Frame, framed, unit
from ldm.tasks.inpainting import expanded, inpaint
from ldm.tasks.interpolating import interpolate
from ldm.tasks.inverting import edit, invert
from ldm.tasks.picture import img2img
from ldm.tasks.upscaling import enlargement, upscale
from ldm.tasks.varying import variations

__all__ = ["Frame", "edit", "enlargement", "expanded", "framed", "img2img", "inpaint", "interpolate", "invert", "unit",
           "upscale", "variations"]  # fmt: skip
