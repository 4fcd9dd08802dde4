"""What has to hold in every training: looked at when it begins, and some of it when it ends."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from ldm.common.files import UserError

NAMED = 5  # weights that a message names


class Promises(Callback):
    """Each weight that is trained is in one group of one optimizer; what is frozen is in none, is in eval mode, and the
    autoencoder under a diffusion model is the same at the end, to the bit; no two ranks have the same samples or random
    numbers. And it tells in which precision each part really computes. Goes behind the callback that seeds each batch.

    Raises:
        UserError: for weights, by name. RuntimeError: for the rest.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self._hash: str | None = None
        self._looked = False
        self._watch: Any = None

    def on_train_start(self, trainer, module) -> None:
        problems = weight_problems(module, trainer.optimizers)
        if problems:
            raise UserError("; ".join(problems))
        self._hash = frozen_hash(module)
        self._looked = False

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if self._looked:
            return
        self._looked = True
        if trainer.world_size > 1:
            ranks_differ(batch)
        if trainer.is_global_zero:
            self._watch = watched(module)
            self._found = self._watch.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if self._watch is None:
            return
        self._watch.__exit__(None, None, None)
        self._watch = None
        self.tell(precision_line(module, self._found))

    def on_train_end(self, trainer, module) -> None:
        if self._hash != frozen_hash(module):
            raise RuntimeError("the autoencoder was changed by the training that only uses it: its hash was "
                               f"{self._hash}, and is {frozen_hash(module)}")


def weight_problems(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """What is wrong between a module's weights and its optimizers; empty if nothing is."""
    names = {id(p): name for name, p in module.named_parameters()}
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    trained = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    awake = [name for name, part in parts_of(module) if not any(p.requires_grad for p in part.parameters())
             and any(inner.training for inner in part.modules())]  # fmt: skip
    found = {
        "in no optimizer, though it asks for gradients": [name for key, name in trained.items() if key not in held],
        "in several groups of optimizers": [names.get(key, "a weight of no part") for key, n in held.items() if n > 1],
        "frozen, but in an optimizer": [names[key] for key in held if key in names and key not in trained],
        "in an optimizer, but in no part of the module": ["a weight"] * sum(key not in names for key in held),
        "frozen, but in training mode": awake,
    }
    return [f"{_some(weights)}: {what}" for what, weights in found.items() if weights]


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def frozen_hash(module: nn.Module) -> str | None:
    """Of the autoencoder, where it is not trained."""
    autoencoder = getattr(module, "autoencoder", None)
    trained = autoencoder is None or any(p.requires_grad for p in autoencoder.parameters())
    return None if trained else autoencoder.content_hash()


def ranks_differ(batch: dict) -> None:
    """RuntimeError where two ranks have a sample, or torch's random numbers, in common. All ranks have to call."""
    positions = batch["position"].tolist() if "position" in batch else []
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, (torch.initial_seed(), positions))
    seeds, places = [seed for seed, _ in every], [place for _, own in every for place in own]
    if len(set(places)) < len(places):
        twice = sorted(place for place, n in Counter(places).items() if n > 1)
        raise RuntimeError(f"several ranks train on the same samples, those at {twice} of the run: their noise would be the "
                           "same too")
    if len(set(seeds)) < len(seeds):
        raise RuntimeError(f"several ranks draw the same random numbers: their seeds are {seeds}")


@contextmanager
def watched(module: nn.Module) -> Iterator[dict[str, Counter]]:
    """-> part -> kinds of numbers that come out of those of its layers that have weights, while the block runs."""
    found: dict[str, Counter] = defaultdict(Counter)

    def look(name: str, out: Any) -> None:
        if isinstance(out, Tensor):
            found[name][out.dtype] += 1

    hooks = [layer.register_forward_hook(lambda layer, given, out, name=name: look(name, out))
             for name, part in parts_of(module) for layer in part.modules()
             if any(p.ndim > 1 for p in layer.parameters(recurse=False))]  # fmt: skip
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def parts_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if name == "model":  # of stage 2: its parts
            yield from child.named_children()
        elif any(True for _ in child.parameters()):
            yield name, child


def precision_line(module: nn.Module, found: dict[str, Counter]) -> str:
    """`precision: denoiser computes in bfloat16, weights float32; autoencoder computes in float32`"""
    told = []
    for name, part in parts_of(module):
        if name in found:
            kinds, weights = found[name], Counter(p.dtype for p in part.parameters())
            other = f", weights {_kinds(weights)}" if set(weights) != set(kinds) else ""
            told.append(f"{name} computes in {_kinds(kinds)}{other}")
    return f"precision: {'; '.join(told)}"


def _kinds(counted: Counter) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype, _ in counted.most_common())
