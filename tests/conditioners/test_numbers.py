"""Numbers: sinusoids by their formula, in the order of the keys."""

import math

import pytest
import torch

from ldm.common.files import UserError
from ldm.conditioners.numbers import Numbers

BATCH = {"original_size": torch.tensor([[512, 768], [64, 64]]), "crop": torch.tensor([[0, 128], [0, 0]]),
         "target_size": torch.tensor([[512, 512], [64, 64]]), "aesthetic": torch.tensor([6.0, 2.5])}  # fmt: skip


def sinusoids(number: float, width: int) -> list[float]:
    angles = [number * 10000 ** (-k / (width // 2)) for k in range(width // 2)]
    return [math.cos(a) for a in angles] + [math.sin(a) for a in angles]


def test_the_vector_of_sdxl():
    conditioner = Numbers()
    assert conditioner.vector_width == 1536 and conditioner.width is None
    found = conditioner(BATCH).vector
    expected = [value for number in (512, 768, 0, 128, 512, 512) for value in sinusoids(number, 256)]
    torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-4, rtol=0)  # of angles up to 768 in float32


def test_the_vector_of_its_refiner():
    conditioner = Numbers({"original_size": 2, "crop": 2, "aesthetic": 1})
    assert conditioner.vector_width == 1280
    torch.testing.assert_close(conditioner(BATCH).vector[1, -256:], torch.tensor(sinusoids(2.5, 256)), atol=1e-5, rtol=0)


def test_numbers_stay_in_the_null_unless_they_were_dropped():
    assert Numbers().with_null(BATCH)[1] is None
    cond, null = Numbers(width=4, dropout=0.1).with_null(BATCH)
    assert null.vector.shape == cond.vector.shape and not null.vector.any()
    cond = Numbers(width=4, dropout=0.1).with_dropout(BATCH, {"drop": torch.tensor([0.2, 0.05])}.get)
    assert cond.vector[0].any() and not cond.vector[1].any()


def test_missing_and_misshapen_numbers_are_told():
    with pytest.raises(UserError, match="no 'crop'; nearest: 'crops'"):
        Numbers()({"original_size": torch.zeros(2, 2), "crops": 0})
    with pytest.raises(UserError, match=r"'crop' has to be \(B, 2\), got \(2, 4\)"):
        Numbers()({**BATCH, "crop": torch.zeros(2, 4)})
