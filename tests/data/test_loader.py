import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"
from torch.utils.data import Dataset

from ldm.common.files import UserError
from ldm.data import loader
from ldm.data.loader import make_loader


class Numbers(Dataset):
    """n items that tell their index, and draws from every global generator."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        drawn = torch.rand(2, dtype=torch.float64), np.random.rand(), random.random()
        return {"image": torch.full((3, 2, 2), float(i)), "caption": f"number {i}", "key": str(i),
                "drawn": torch.cat([drawn[0], torch.tensor(drawn[1:])])}  # fmt: skip


def take(n: int, *arguments, **options) -> list[tuple[int, int]]:
    """(position, index) of the first n batches."""
    return pairs(islice(make_loader(*arguments, **options), n))


def pairs(batches) -> list[tuple[int, int]]:
    return [(int(p), int(i)) for batch in batches for p, i in zip(batch["position"], batch["key"], strict=True)]


@pytest.fixture
def on_rank(monkeypatch):
    return lambda rank, world: monkeypatch.setattr(loader, "place", lambda: (rank, world))


def test_batch_is_tensors_and_lists():
    batch = next(iter(make_loader(Numbers(5), 3, seed=1)))
    assert batch["image"].shape == (3, 3, 2, 2) and batch["image"].dtype == torch.float32
    assert batch["caption"] == [f"number {i}" for i in batch["key"]]
    assert batch["position"].dtype == torch.int64 and batch["position"].tolist() == [0, 1, 2]
    assert [str(int(v)) for v in batch["image"][:, 0, 0, 0]] == batch["key"]


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (7, 7), (2, 5), (1, 4), (12, 5)])
def test_every_epoch_is_a_permutation_though_batches_straddle(n, batch_size):
    seen = take(-(-4 * n // batch_size), Numbers(n), batch_size, seed=3)
    assert [p for p, _ in seen] == list(range(len(seen)))
    epochs = [[i for _, i in seen[e * n : (e + 1) * n]] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 7:
        assert len(set(map(tuple, epochs))) == 4


def test_order_depends_on_the_seed_and_not_on_the_global_generator():
    first = take(4, Numbers(50), 8, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert take(4, Numbers(50), 8, seed=1) == first != take(4, Numbers(50), 8, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_resume_in_mid_epoch_continues_exactly(steps, workers):
    whole = take(14, Numbers(11), 4, seed=5)
    rest = take(14 - steps, Numbers(11), 4, seed=5, start=lambda: steps * 4, workers=workers)
    assert rest == whole[steps * 4 :]


def test_start_is_read_when_the_iteration_begins():
    done = 0
    loop = make_loader(Numbers(11), 4, seed=5, start=lambda: done)
    whole = pairs(islice(loop, 4))
    done = 8
    assert pairs(islice(loop, 2)) == whole[8:]


@pytest.mark.parametrize(("world", "batch_size"), [(2, 4), (4, 2), (8, 1)])
def test_ranks_share_the_same_stream(on_rank, world, batch_size):
    alone = take(6, Numbers(13), 8, seed=7)
    batches = []
    for rank in range(world):
        on_rank(rank, world)
        own = take(6, Numbers(13), batch_size, seed=7)
        batches += [(k, rank, own[k * batch_size : (k + 1) * batch_size]) for k in range(6)]
    assert [pair for _, _, batch in sorted(batches) for pair in batch] == alone


def test_ranks_resume_together(on_rank):
    on_rank(1, 2)
    assert take(3, Numbers(13), 4, seed=7, start=lambda: 16) == take(5, Numbers(13), 4, seed=7)[8:]


def test_another_number_of_ranks_goes_on_where_the_first_stopped(on_rank):
    whole = take(9, Numbers(13), 4, seed=7)
    parts = []
    for rank in range(3):
        on_rank(rank, 3)
        own = take(2, Numbers(13), 4, seed=7, start=lambda: 8)  # of two batches, in which there were no whole three
        parts += [(p, i) for p, i in own]
    assert sorted(parts) == whole[8:32]


def test_rank_and_world_are_those_of_torch_distributed():
    assert loader.place() == (0, 1)
    torch.distributed.init_process_group("fake", rank=2, world_size=5, store=FakeStore())
    try:
        assert loader.place() == (2, 5)
    finally:
        torch.distributed.destroy_process_group()


def test_draws_from_global_generators_depend_on_the_position_alone():
    def drawn(**options):
        return [batch["drawn"] for batch in islice(make_loader(Numbers(9), 3, seed=2, **options), 4)]

    plain = drawn()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    for other in (drawn(workers=2), drawn()):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert len(torch.cat(plain).unique()) == 4 * 3 * 4


def test_training_draws_are_untouched_by_loading():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loop = iter(make_loader(Numbers(9), 3, seed=2))
    first = torch.rand(1)
    next(loop)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 6, 8, 13])
def test_validation_sees_everything_once(on_rank, n, world, shuffle):
    seen = []
    for rank in range(world):
        on_rank(rank, world)
        loop = make_loader(Numbers(n), 3, seed=0, shuffle=shuffle, infinite=False)
        batches = list(loop)
        assert len(loop) == len(batches) and pairs(loop) == pairs(batches)
        seen += pairs(batches)
    assert sorted(p for p, _ in seen) == sorted(i for _, i in seen) == list(range(n))
    if not shuffle:
        assert all(p == i for p, i in seen)


def test_infinite_loader_has_no_length():
    with pytest.raises(TypeError):
        len(make_loader(Numbers(3), 2, seed=0))


@pytest.mark.parametrize(
    ("n", "batch_size", "workers", "message"),
    [(0, 2, 0, "data set is empty.*folder"), (3, 0, 0, "loader.batch_size: 0"), (3, 2, -1, "loader.workers: -1")],
)
def test_mistakes(n, batch_size, workers, message):
    with pytest.raises(UserError, match=message):
        make_loader(Numbers(n), batch_size, seed=0, workers=workers)
