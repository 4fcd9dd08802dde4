"""What an autoencoder promises as a module that is trained, moved, copied, saved and loaded."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.base import Bottled
from autoencoder.trial import SMALL, Broken, Case, Unjudged, expect, far, place, promise, seeded, weights_like
from ldm.common.weights import without_weights


@promise("training pass", needs="same twice")
def training_pass(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    noise = torch.randn(model.moments(x)[0].shape)
    x_hat, bottled = model(x, noise)
    expect(tuple(x_hat.shape) == tuple(x.shape) and isinstance(bottled, Bottled),
           f"forward gives {tuple(x_hat.shape)} and {type(bottled).__name__} for pictures {tuple(x.shape)}",
           "give back (reconstruction, autoencoder.base.Bottled(latent, losses))")
    odd = [name for name, loss in bottled.losses.items() if loss.numel() != 1 or not loss.isfinite()]
    expect(not odd, f"the losses {', '.join(odd)} are no single finite numbers", "take their mean over the batch")
    with seeded(1):
        again = model(x, noise)[0]
    expect(far(x_hat, again) == 0, "forward(x, noise) gives another reconstruction for the same noise",
           "use the noise that is given in place of torch.randn_like: runs are resumed by it")
    named = f", losses {', '.join(bottled.losses)}" if bottled.losses else ", no losses of its own"
    return f"forward(x, noise) gives reconstruction and Bottled{named}"


@promise("gradient of the picture", needs="training pass")
def gradient_of_the_picture(case: Case) -> str:
    model = case.model()
    x = case.pictures(model).requires_grad_()
    x_hat, _ = model(x)
    reached = x_hat.requires_grad and torch.autograd.grad((x_hat * weights_like(x_hat)).sum(), x, allow_unused=True)[0]
    expect(isinstance(reached, Tensor) and bool(reached.isfinite().all()) and bool(reached.any()),
           "no gradient comes from the reconstruction to the picture",
           "something is detached, rounded or under no_grad; quantise with a straight-through gradient: z + (q - z).detach()")
    return "the reconstruction's gradient reaches the picture"


@promise("gradient of every weight", needs="training pass")
def gradient_of_every_weight(case: Case) -> str:
    model = case.model().train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        return "it has no weights to train"
    x = case.pictures(model)
    x_hat, bottled = model(x)
    ((x_hat - x).square().mean() + sum(bottled.losses.values())).backward()
    unused = [name for name, weight in weights.items() if weight.grad is None]
    more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
    expect(not unused, f"no gradient for {', '.join(unused[:3])}{more}: on several devices DDP would wait for them",
           "remove what is not used, or freeze it with requires_grad_(False)")
    wild = [name for name, weight in weights.items() if not weight.grad.isfinite().all()]
    expect(not wild, f"inf or nan in the gradient of {', '.join(wild[:3])}",
           "look at divisions, roots and logarithms at 0")
    return f"all {len(weights)} weight tensors take part in every step (safe for DDP)"


@promise("half precision", needs="picture shape")
def half_precision(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    with torch.no_grad():
        full = model.encode(x)
        try:
            z = model.to(torch.bfloat16).encode(x)
            y = model.decode(z)
        except RuntimeError as error:
            raise Broken(f"fails with weights in bfloat16 ({' '.join(str(error).split())[:150]}){place(error)}; constants "
                         "belong into buffers (register_buffer), and new tensors get the dtype of x (x.new_tensor)") from error
    expect(z.dtype == y.dtype == torch.float32, f"with weights in bfloat16 it encodes to {z.dtype} and decodes to {y.dtype}, "
           "float32 is expected", "implement moments and decode_raw, and leave encode and decode as they are")
    gap = float((z.float() - full).square().mean().sqrt() / full.square().mean().sqrt().clamp(min=1e-12))
    expect(bool(y.isfinite().all()) and gap < 0.2, f"latents in bfloat16 are off by {gap:.2g} of their size",
           "compute the part that overflows or cancels in float32")
    model = case.model().train()
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, bottled = model(x)
    losses = [x_hat.float().mean(), *bottled.losses.values()]
    expect(all(bool(loss.isfinite().all()) for loss in losses), "inf or nan in training under autocast to bfloat16",
           "compute the part that overflows in float32")
    return f"bfloat16 weights and autocast work; latents differ by {gap:.1%}"


@promise("devices", needs="picture shape")
@torch.no_grad()
def devices(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    mend = "constants belong into buffers (register_buffer), and new tensors get the device of x (x.new_tensor)"
    if torch.cuda.is_available():
        z, there = model.encode(x), copy.deepcopy(model).cuda()
        found = there.encode(x.cuda())
        expect(there.decode(found).is_cuda, "decode leaves the GPU", mend)
        gap = far(z, found.cpu())
        expect(gap < 0.01, f"latents on the GPU are off by {gap:.2g} of the largest value", mend)
        return "the same on the GPU"
    try:
        z = model.to("meta").encode(x.to("meta"))
        y = model.decode(z)
    except (RuntimeError, NotImplementedError) as error:
        if re.search("same device|different devices|expected device", str(error)):
            raise Broken(f"a tensor stays on the CPU when the model is moved ({' '.join(str(error).split())[:150]})"
                         f"{place(error)}; {mend}") from error
        raise Unjudged(f"no GPU here, and without one it cannot be followed ({' '.join(str(error).split())[:100]})") from error
    expect(z.is_meta and y.is_meta, "latents or pictures stay on the CPU when the model is moved", mend)
    return "moves as a whole (followed without a GPU)"


@promise("codes", needs="same twice")
@torch.no_grad()
def codes(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    if not hasattr(model, "codes"):
        return "has none"
    try:
        found = model.codes(x)
    except ValueError:
        return "has none"
    expected = (len(x), *(side // model.factor for side in x.shape[2:]))
    expect(tuple(found.shape[:3]) == expected and not found.is_floating_point(),
           f"codes(x) are {found.dtype} {tuple(found.shape)}, whole numbers {expected} are expected",
           "give one index, or a row of them, for each position of the latent")
    gap = far(model.decode(model.encode(x)), model.decode_codes(found))
    expect(gap < 10 * SMALL, f"decode_codes(codes(x)) is off decode(encode(x)) by {gap:.2g} of the largest value",
           "decode_raw has to quantise as codes(x) does")
    return "decode_codes(codes(x)) is decode(encode(x))"


@promise("last layer", needs="training pass")
def last_layer(case: Case) -> str:
    model = case.model()
    try:
        weight = model.last_layer
    except NotImplementedError as error:
        raise Unjudged("has none: it trains without a critic; a property last_layer that gives the weight of the decoder's "
                       "last convolution lets it train with one") from error
    x_hat, _ = model(case.pictures(model))
    mine = any(weight is own for own in model.parameters())
    pulled = mine and torch.autograd.grad((x_hat * weights_like(x_hat)).sum(), weight, allow_unused=True)[0]
    expect(isinstance(pulled, Tensor) and bool(pulled.any()), "the reconstruction has no gradient by last_layer",
           "give the weight itself (self.conv_out.weight), of the last layer of the decoder")
    return f"a weight {tuple(weight.shape)}, for the balance with a critic"


@promise("copies", needs="same twice")
@torch.no_grad()
def copies(case: Case) -> str:
    model = case.model()
    x = case.pictures(model)
    z = model.encode(x)
    for name, copied in (("copy.deepcopy", copy.deepcopy), ("pickle", lambda model: pickle.loads(pickle.dumps(model)))):
        try:
            other = copied(model)
        except Exception as error:  # TypeError, PicklingError, AttributeError, whatever an attribute raises
            raise Broken(f"{name} fails ({' '.join(str(error).split())[:150]}); averaging (EMA) and processes copy the "
                         "module: keep no open files, locks, generators or lambdas in it") from error
        expect(far(z, other.encode(x)) < SMALL, f"the model that {name} makes encodes otherwise", "keep no state outside of it")
        shared = {p.data_ptr() for p in model.parameters() if p.numel()} & {p.data_ptr() for p in other.parameters()}
        expect(not shared, f"the model that {name} makes shares weights with its original", "let no weight be kept in a global")
    return "deepcopy and pickle make an equal model of its own"


@promise("saved and loaded", needs="same twice")
@torch.no_grad()
def saved_and_loaded(case: Case) -> str:
    from safetensors.torch import load_file, save_file

    model = case.model()
    model.set_statistics(torch.linspace(-1, 1, model.channels), torch.linspace(1, 2, model.channels), 7)
    x, mark = case.pictures(model), model.content_hash()
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "model.safetensors")
        state = load_file(Path(folder) / "model.safetensors")
    other = case.untrained(seed=1)
    other.load_state_dict(state)
    expect(other.content_hash() == mark, f"content_hash is {other.content_hash()} after loading, it was {mark}",
           "leave content_hash as the base class has it")
    z = model.encode(x)
    gap = max(far(z, other.encode(x)), far(model.decode(z), other.decode(z)))
    expect(gap < SMALL, f"another instance with the same state dict differs by {gap:.2g} of the largest value",
           "what is drawn or learned belongs into parameters or buffers (register_buffer, persistent)")
    return "another instance with its state dict is the same model, by its outputs and content_hash"


@promise("made without contents", needs="saved and loaded")
@torch.no_grad()
def made_without_contents(case: Case) -> str:
    model = case.model()
    try:
        with torch.device("meta"):
            case.factory()
    except Exception as error:  # whatever a user's class does
        raise Broken(f"it does not construct under torch.device('meta'), as checkpoints are loaded: {type(error).__name__}: "
                     f"{' '.join(str(error).split())[:200]}{place(error)}; read no values of tensors in __init__") from error
    loaded = without_weights(case.factory).eval()
    loaded.load_state_dict(model.state_dict(), assign=True)
    left = [name for name, value in (*loaded.named_parameters(), *loaded.named_buffers()) if value.is_meta]
    expect(not left, f"{', '.join(left[:3])} have no values after loading", "register buffers as persistent")
    x = case.pictures(model)
    expect(far(model.encode(x), loaded.encode(x)) < SMALL, "a model that is loaded as checkpoints are encodes otherwise",
           "what is computed in __init__ belongs into parameters or buffers (register_buffer, persistent)")
    return "constructs on the meta device, and takes its weights afterwards"
