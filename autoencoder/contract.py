"""What every autoencoder promises, as a test that anybody's class can be put through.

    from autoencoder.contract import promises

    @pytest.mark.parametrize("promise", promises(MyAutoencoder), ids=str)
    def test_contract(promise):
        promise()

``check`` gives all results at once; ``python -m ldm check-autoencoder package.module:Class`` prints them. Weights are as
they are drawn, and pictures are noise: nothing here asks for a trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from autoencoder.base import Autoencoder
from autoencoder.promises_of_latents import (
    construct,
    draws,
    eval_changes_nothing,
    latent_shape,
    no_global_randomness,
    one_by_one,
    picture_shape,
    same_twice,
    sizes,
    unit_scale,
)
from autoencoder.promises_of_models import (
    codes,
    copies,
    devices,
    gradient_of_every_weight,
    gradient_of_the_picture,
    half_precision,
    last_layer,
    made_without_contents,
    saved_and_loaded,
    training_pass,
)
from autoencoder.trial import Broken, Case, Promise, Result, Unjudged

__all__ = ["PROMISES", "Broken", "Case", "Promise", "Result", "Unjudged", "check", "promises"]

PROMISES = (
    construct, latent_shape, picture_shape, same_twice, no_global_randomness, eval_changes_nothing, one_by_one, draws,
    unit_scale, sizes, training_pass, gradient_of_the_picture, gradient_of_every_weight, half_precision, devices, codes,
    last_layer, copies, saved_and_loaded, made_without_contents,
)  # fmt: skip


def check(factory: Callable[[], Autoencoder], side: int | None = None, state: Mapping[str, Tensor] | None = None,
          also: Sequence[Promise] = ()) -> list[Result]:
    """Every promise, in order; one that rests on a broken one is not tried."""
    case, found = Case(factory, side, state), {}
    for one in (*PROMISES, *also):
        if one.needs and found[one.needs].status in ("FAILED", "not tried"):
            found[one.name] = Result(one.name, "not tried", f"rests on: {one.needs}")
            continue
        try:
            found[one.name] = Result(one.name, "ok", one.of(case))
        except Broken as error:
            found[one.name] = Result(one.name, "FAILED", str(error))
        except Unjudged as error:
            found[one.name] = Result(one.name, "note", str(error))
    return list(found.values())


def promises(factory: Callable[[], Autoencoder], side: int | None = None) -> list[Callable[[], None]]:
    """For pytest: each raises Broken where it is not kept, and prints as its name."""

    class One:
        def __init__(self, promise: Promise):
            self.promise = promise

        def __call__(self) -> None:
            try:
                self.promise.of(Case(factory, side))
            except Unjudged:
                return

        def __str__(self) -> str:
            return self.promise.name

    return [One(promise) for promise in PROMISES]
