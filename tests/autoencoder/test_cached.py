import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from autoencoder import cached
from autoencoder.base import Autoencoder, Identity
from autoencoder.cached import CachedDataset, write_latents, write_text
from ldm.common.files import UserError

WORDS = ["a red square", "a blue circle", "a red square", "two green triangles side by side"]


class Toy(Dataset):
    def __init__(self, captions=WORDS, contents=None, transform="8"):
        self.captions, self.contents = list(captions), contents or list(range(len(captions)))
        self.transform_fingerprint, self.fingerprint = transform, "toy"

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(self.contents[i]))
        return {"image": image, "caption": self.captions[i], "key": str(i)}

    def caption(self, i):
        return self.captions[i]

    def identity(self, i):
        return str(self.contents[i])

    def report(self):
        return "toy"


class Gaussian(Autoencoder):
    """Mean: every second pixel; standard deviation 0.5 everywhere."""

    def __init__(self):
        super().__init__(3, 3, 2)
        self.calls = 0

    def moments(self, x):
        self.calls += len(x)
        mean = x[..., ::2, ::2]
        return mean, torch.full_like(mean, 0.25).log()


class Encode:
    """Captions -> one state a word, its length in letters; asked = what it was given."""

    def __init__(self):
        self.asked = []

    def __call__(self, captions):
        self.asked += captions
        lengths = [len(caption.split()) for caption in captions]
        states, mask = torch.ones(len(captions), max(lengths), 2), torch.zeros(len(captions), max(lengths), dtype=torch.bool)
        for row, real, caption in zip(states, mask, captions, strict=True):
            for k, word in enumerate(caption.split()):
                row[k], real[k] = len(word), True
        return states, mask


def test_latents_are_the_posterior_at_unit_scale(tmp_path):
    autoencoder = Gaussian()
    autoencoder.set_statistics(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 4.0]), 10)
    data = Toy()
    held = CachedDataset(data, write_latents(data, autoencoder, tmp_path, batch_size=3))
    for i in range(4):
        mean, std = autoencoder.posterior(data[i]["image"][None])
        assert torch.equal(held[i]["latent"], mean[0]) and torch.equal(held[i]["latent_std"], std[0])
        assert held[i]["caption"] == WORDS[i] and "image" not in held[i]


def test_deterministic_autoencoders_store_no_deviation(tmp_path):
    data = Toy()
    held = CachedDataset(data, write_latents(data, Identity(), tmp_path))
    assert "latent_std" not in held[0] and torch.equal(held[2]["latent"], data[2]["image"])


def test_only_what_changed_is_encoded_again(tmp_path):
    autoencoder = Gaussian()

    def encoded(**changes):
        before = autoencoder.calls
        write_latents(Toy(**changes), autoencoder, tmp_path)
        return autoencoder.calls - before

    assert encoded() == 4
    assert encoded() == 0
    assert encoded(captions=["other"] * 4) == 0
    assert encoded(contents=[0, 1, 2, 9]) == 1
    assert encoded(contents=[9, 2, 1, 0]) == 0
    assert encoded(contents=[5, 5, 5, 5]) == 1  # the same picture four times
    assert encoded(transform="16") == 4
    autoencoder.set_statistics(torch.ones(3), torch.ones(3), 7)
    assert encoded() == 4


def test_each_caption_is_encoded_once_and_padded_with_zeros(tmp_path):
    encode = Encode()
    texts = write_text(Toy(), encode, "e1", tmp_path)
    assert sorted(encode.asked) == sorted(set(WORDS))
    held = CachedDataset(Toy(), texts=texts)
    assert held[0]["text_mask"].tolist() == [True] * 3 + [False] * 3
    assert held[0]["text_states"].tolist() == [[1, 1], [3, 3], [6, 6]] + [[0, 0]] * 3
    assert held[3]["text_mask"].all() and torch.equal(held[0]["text_states"], held[2]["text_states"])
    assert torch.equal(held[1]["image"], Toy()[1]["image"])
    write_text(Toy([*WORDS[:3], "new words"]), encode, "e1", tmp_path)
    assert encode.asked[3:] == ["new words"]
    write_text(Toy(), encode, "e2", tmp_path)
    assert len(encode.asked) == 7


def test_a_vector_for_each_caption_is_kept_with_its_states(tmp_path):
    def encode(captions):
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return torch.ones(len(captions), 2, 3), torch.ones(len(captions), 2, dtype=torch.bool), lengths[:, None]

    held = CachedDataset(Toy(), texts=write_text(Toy(), encode, "e", tmp_path))
    assert held.batch(range(4))["text_vector"].tolist() == [[float(len(caption))] for caption in WORDS]
    assert held[3]["text_vector"].dtype == torch.float32


def test_states_beyond_half_precision_are_kept_whole(tmp_path):
    def encode(captions):
        return torch.full((len(captions), 1, 2), 1e6), torch.ones(len(captions), 1, dtype=torch.bool)

    held = CachedDataset(Toy(), texts=write_text(Toy(), encode, "e", tmp_path))
    assert held[0]["text_states"].tolist() == [[1e6, 1e6]]


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "ROWS", 2)
    autoencoder, data = Gaussian(), Toy(["x"] * 7)

    class Killed(Toy):
        def __getitem__(self, i):
            if i == 5:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    with pytest.raises(KeyboardInterrupt):
        write_latents(Killed(["x"] * 7), autoencoder, tmp_path, batch_size=1)
    autoencoder.calls, seen = 0, []
    table = write_latents(data, autoencoder, tmp_path, batch_size=1, progress=lambda done, all: seen.append((done, all)))
    assert autoencoder.calls == 3 and seen == [(2, 3), (3, 3)]
    assert torch.equal(table.take([6, 0])["latent"][0], autoencoder.posterior(data[6]["image"][None])[0][0])


def test_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "ROWS", 2)
    autoencoder = Gaussian()
    write_latents(Toy(), autoencoder, tmp_path)
    victim = min(tmp_path.rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:40])
    autoencoder.calls = 0
    write_latents(Toy(), autoencoder, tmp_path)
    assert autoencoder.calls == 2 and load_file(victim)["latent"].shape == (2, 3, 4, 4)


def test_rows_deleted_behind_its_back_are_an_error_with_a_way_out(tmp_path):
    table = write_latents(Toy(), Gaussian(), tmp_path)
    table.places.clear()
    with pytest.raises(UserError, match="4 of 4 rows are missing"):
        table.open()


@pytest.mark.parametrize("ram", [2**30, 0])
def test_batches_are_the_stacked_items_from_memory_and_from_the_files(tmp_path, monkeypatch, ram):
    monkeypatch.setattr(cached, "ROWS", 3)
    data = Toy()
    latents, texts = write_latents(data, Gaussian(), tmp_path), write_text(data, Encode(), "e", tmp_path)
    held = CachedDataset(data, latents.open(ram), texts.open(ram))
    batch, items = held.batch([3, 1, 1]), [held[3], held[1], held[1]]
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, torch.stack([item[name] for item in items])), name
        else:
            assert value == [item[name] for item in items]
    loaded = next(iter(DataLoader(held, batch_size=4)))
    assert torch.equal(loaded["latent"], held.batch(range(4))["latent"]) and loaded["caption"] == WORDS


def test_ranks_share_the_work(tmp_path, monkeypatch):
    keys = [f"{k:x}" for k in range(10)]
    shares = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(cached, "place", lambda rank=rank: (rank, 3))
        shares.append(set(cached.Table(tmp_path, keys).missing()))
    assert set.union(*shares) == set(keys) and sum(map(len, shares)) == 10
