"""What an autoencoder promises of its latents: their shape, their scale, and what they depend on."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from autoencoder.trial import SMALL, Broken, Case, Unjudged, expect, far, promise, seeded


@promise("construct")
def construct(case: Case) -> str:
    model = case.model()
    expect(isinstance(model, Autoencoder), f"{type(model).__name__} is no autoencoder.base.Autoencoder",
           "derive from it, and call super().__init__(image_channels, channels, factor)")
    sizes = {name: getattr(model, name, None) for name in ("image_channels", "channels", "factor")}
    expect(all(type(size) is int and size > 0 for size in sizes.values()), f"{sizes}; whole numbers from 1 are expected",
           "give them to super().__init__")
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    measured = f", latents measured on {model.spec.count:,} pictures" if model.spec.count else ""
    return (f"{model.image_channels} channels of the picture, {model.channels} of the latent, factor {model.factor}; "
            f"{trained:,} weights to train{measured}")


@promise("latent shape", needs="construct")
@torch.no_grad()
def latent_shape(case: Case) -> str:
    model = case.model()
    side, factor, tried = case.size(model), model.factor, []
    for n, height, width in ((1, side, side), (2, side, side + factor), (3, 2 * side, side)):
        x = case.pictures(model, n, height, width)
        expected = (n, model.channels, height // factor, width // factor)
        mean, logvar = model.moments(x)
        for name, z in (("moments' mean", mean), ("moments' log-variance", logvar), ("encode", model.encode(x))):
            expect(z is None or tuple(z.shape) == expected, f"{name} of pictures {tuple(x.shape)} is "
                   f"{z is not None and tuple(z.shape)}, expected {expected}",
                   f"declare the channels and factor that it has (now {model.channels} and {factor})")
            expect(z is None or bool(z.isfinite().all()), f"{name} has inf or nan", "clamp the log-variance, to [-30, 20] say")
        tried.append(f"{height}x{width}")
    return f"C={model.channels}, 1/{factor} of each side, at {', '.join(tried)}"


@promise("picture shape", needs="latent shape")
@torch.no_grad()
def picture_shape(case: Case) -> str:
    model = case.model()
    side, factor = case.size(model), model.factor
    for n, height, width in ((1, side, side), (2, side, side + factor), (3, 2 * side, side)):
        x = case.pictures(model, n, height, width)
        y = model.decode(model.encode(x))
        expect(y.shape == x.shape, f"decode(encode(x)) of {tuple(x.shape)} is {tuple(y.shape)}, expected the same shape",
               f"decode_raw has to enlarge each side by the factor {factor} and give {model.image_channels} channels")
        expect(bool(y.isfinite().all()), "decode gives inf or nan", "look at divisions and logarithms in decode_raw")
    return "decode(encode(x)) has the shape of x"


@promise("same twice", needs="picture shape")
@torch.no_grad()
def same_twice(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    z = model.encode(x)
    gap = far(z, model.encode(x))
    expect(gap == 0, f"two encodings of one picture differ by {gap:.2g} of the largest value",
           "moments(x) has to depend on x and the weights alone; the draw is made by encode and by forward")
    gap = far(model.decode(z), model.decode(z))
    expect(gap == 0, f"two decodings of one latent differ by {gap:.2g} of the largest value",
           "decode_raw(z) has to depend on z and the weights alone")
    return "encode and decode give the same twice, in eval mode"


@promise("no global randomness", needs="picture shape")
@torch.no_grad()
def no_global_randomness(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model.decode(model.encode(x))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    used = [name for name, a, b in zip(("torch", "numpy", "random"), before, after, strict=True)
            if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)]  # fmt: skip
    expect(not used, f"encode or decode drew from the global generator of {', '.join(used)}",
           "draw nothing in eval mode: everything after it would be other numbers")
    return "encode and decode draw nothing from torch, numpy, random"


@promise("eval changes nothing", needs="picture shape")
@torch.no_grad()
def eval_changes_nothing(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    model.decode(model.encode(x))
    model(x)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = [name for name in before if not torch.equal(before[name], after.get(name, before[name] + 1))]
    expect(not changed, f"{', '.join(changed[:3])} changed in eval mode", "change buffers only where self.training is true")
    return "weights and buffers are the same afterwards"


@promise("one by one", needs="same twice")
@torch.no_grad()
def one_by_one(case: Case) -> str:
    model = case.model()
    x = case.pictures(model, 3)
    z = model.encode(x)
    gap = far(z, torch.cat([model.encode(row) for row in x.split(1)]))
    expect(gap < SMALL, f"a latent differs by {gap:.2g} of the largest value with the other pictures of its batch",
           "normalise over a picture (GroupNorm), or let BatchNorm keep running statistics")
    gap = far(model.decode(z), torch.cat([model.decode(row) for row in z.split(1)]))
    expect(gap < SMALL, f"a decoded picture differs by {gap:.2g} of the largest value with the others of its batch",
           "normalise over a picture (GroupNorm), or let BatchNorm keep running statistics")
    return "a picture's latent does not depend on the batch that it is in"


@promise("draws", needs="same twice")
@torch.no_grad()
def draws(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    drawn = []
    for seed, world in ((5, 1), (5, 2), (6, 1)):
        with seeded(world):
            drawn.append(model.encode(x, torch.Generator().manual_seed(seed)))
    expect(torch.equal(drawn[0], drawn[1]), "encode(x, generator) gives another draw from a generator in the same state",
           "draw with torch.randn(..., generator=generator); encode of the base class does")
    if model.moments(x)[1] is None:
        expect(torch.equal(drawn[0], model.encode(x)), "without a log-variance encode(x, generator) is not encode(x)",
               "give the log-variance back, or None and no draw")
        return "deterministic: there is nothing to draw"
    expect(not torch.equal(drawn[0], drawn[2]), "encode(x, generator) is the same for every generator",
           "draw with the generator; encode of the base class does")
    return "encode(x, generator) depends on picture and generator alone"


@promise("unit scale", needs="draws")
@torch.no_grad()
def unit_scale(case: Case) -> str:
    model = case.model()
    x = case.pictures(model, 8)

    def drawn() -> Tensor:
        return model.encode(x, torch.Generator().manual_seed(5))

    model.set_statistics(torch.zeros(model.channels), torch.ones(model.channels), 1)
    z = drawn()
    y, mean, std = model.decode(z), z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    if (std < 1e-6).any():
        raise Unjudged("the latents of untrained weights do not vary: try it on trained ones, with --ckpt")
    model.set_statistics(mean, std, len(x))
    spec, now = model.spec, drawn()
    expect(torch.equal(spec.shift, mean) and torch.equal(spec.scale, std) and spec.count == len(x),
           "spec gives other statistics than set_statistics stored", "leave spec and set_statistics as the base class has them")
    gap = far(now, (z - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    expect(gap < SMALL, f"encode gives channels of mean {now.mean():.3g} and standard deviation {now.std():.3g} after the "
           "statistics were stored; 0 and 1 are expected", "implement moments, which are raw, and leave encode as it is")
    gap = far(y, model.decode(now))
    expect(gap < 10 * SMALL, f"stored statistics change the reconstruction by {gap:.2g} of the largest value",
           "implement decode_raw, which gets raw latents, and leave decode as it is")
    return "mean 0 and deviation 1 a channel once statistics are stored; decode undoes it"


@promise("sizes", needs="latent shape")
@torch.no_grad()
def sizes(case: Case) -> str:
    model = case.model()
    side, factor = case.size(model), model.factor
    if factor == 1:
        return "every size divides"
    for height, width in ((side + 1, side), (side, side + factor - 1)):
        try:
            z = model.encode(case.pictures(model, 1, height, width))
        except ValueError as error:
            expect(str(side) in str(error) and str(side + factor) in str(error),
                   f"{height}x{width} is refused with {str(error)!r}, which does not name {side} and {side + factor}",
                   "call self.check(x) first; encode of the base class does")
        else:
            raise Broken(f"{height}x{width}, no multiple of {factor}, gives a latent {tuple(z.shape)}; a ValueError that names "
                         f"{side} and {side + factor} is expected: call self.check(x) first; encode of the base class does")
    return f"what {factor} does not divide is refused, with the nearest sizes"
