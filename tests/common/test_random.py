"""Draws depend on what they are for, and on nothing else."""

import hashlib

import numpy
import pytest
import torch

from ldm.common.random import generator, key_to_seed, normal, uniform

SHAPE = (4, 8, 8)


def test_a_draw_depends_neither_on_the_batch_nor_on_its_order():
    whole = normal(SHAPE, 23, "noise", range(8))
    assert whole.shape == (8, *SHAPE) and whole.dtype == torch.float32
    for positions in ([3], [7, 0, 3], [3, 3]):
        assert torch.equal(normal(SHAPE, 23, "noise", positions), whole[positions])
    times = uniform(23, "time", range(8))
    assert times.shape == (8,)
    assert torch.equal(uniform(23, "time", [5, 2]), times[[5, 2]])


def test_each_row_is_the_stream_of_its_own_generator():
    row = normal(SHAPE, 1, "noise", [10**12])[0]
    assert torch.equal(row, torch.randn(SHAPE, generator=generator(1, "noise", 10**12)))
    assert torch.equal(uniform(1, "time", [4])[0], torch.rand((), generator=generator(1, "time", 4)))


def test_other_keys_are_other_streams():
    draws = [
        normal((1000,), seed, stream, [position])[0]
        for seed in (23, 24)
        for stream in ("noise", "step")
        for position in (0, 1, 2)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / 1000**0.5  # five standard deviations of independent samples


def test_the_numbers_are_normal_and_uniform():
    x = normal((64,), 0, "noise", range(1000)).double()  # 64,000 numbers, no two rows of one generator
    assert abs(x.mean()) < 5 / 64000**0.5
    assert abs(x.var() - 1) < 5 * (2 / 64000) ** 0.5
    u = uniform(0, "time", range(4000)).double()
    assert u.min() >= 0 and u.max() < 1
    distance = (u.sort().values - (torch.arange(4000) + 0.5) / 4000).abs().max()
    assert distance < 2 / 4000**0.5  # Kolmogorov-Smirnov: passed by 99.9% of uniform samples


def test_keys_cannot_be_confused():
    keys = [(1, 23), (12, 3), (123,), (1, 2, 3), (1, "23"), (1, "2", 3), (1, "a"), (1, "a", ""), (1, "", "a"), (-1, 23)]
    assert len({key_to_seed(*key) for key in keys}) == len(keys)
    assert len({key_to_seed(23, "noise", position) for position in range(10_000)}) == 10_000


def test_integers_of_every_kind_are_the_same_key():
    expected = normal((3,), 23, "noise", [5, 6])
    assert torch.equal(normal((3,), numpy.int64(23), "noise", numpy.array([5, 6])), expected)
    assert torch.equal(normal((3,), 23, "noise", torch.tensor([5, 6])), expected)
    with pytest.raises(TypeError):
        generator(23, 1.5)


def test_the_streams_stay_what_they_are():
    """Runs are resumed, and pictures made again, with later versions: the mapping from keys to numbers is a promise."""
    told = hashlib.blake2b(b"i2:23s5:noisei1:5", digest_size=8).digest()
    assert key_to_seed(23, "noise", 5) == int.from_bytes(told, "little")
    assert torch.allclose(normal((2,), 23, "noise", [5]), torch.tensor([[0.2964, 0.2417]]), atol=1e-4)


def test_global_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = normal(SHAPE, 23, "noise", [1])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(normal(SHAPE, 23, "noise", [1]), first)


def test_numbers_are_real_under_the_meta_device():
    with torch.device("meta"):
        assert torch.equal(normal((2,), 0, "noise", [1]), normal((2,), 0, "noise", [1]))
