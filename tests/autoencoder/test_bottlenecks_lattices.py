"""FSQ and LFQ against their formulas."""

import itertools
import math

import pytest
import torch

from autoencoder.bottlenecks import FSQ, LFQ


def grid(*values):  # numbers -> (1,C,1,N): all channels run through them
    return torch.tensor(values).view(1, 1, 1, -1)


@pytest.mark.parametrize("levels", range(2, 12))
def test_fsq_has_its_levels_and_zero_is_one_of_them(levels):
    book = FSQ([levels])
    latent, _ = book.moments(torch.linspace(-12, 12, 4001).view(1, 1, 1, -1))
    q = book.quantise(latent)
    steps = [n / (levels // 2) for n in range(-(levels // 2), (levels + 1) // 2)]
    assert q.unique().tolist() == pytest.approx(steps) and len(steps) == levels
    assert latent.abs().max() <= 1.001 and (latent.diff() >= 0).all()
    assert book.moments(grid(0.0))[0].abs().item() < 1e-6
    assert torch.equal(book.indices(latent).unique(), torch.arange(levels))


@pytest.mark.parametrize(("levels", "y", "expected"), [
    (5, 0.7, math.tanh(0.7) * 2.002 / 2),  # odd: no shift
    (4, 0.7, (math.tanh(0.7 + math.atanh(0.5 / 1.5015)) * 1.5015 - 0.5) / 2),
])  # fmt: skip
def test_fsq_bound(levels, y, expected):
    assert FSQ([levels]).moments(grid(y))[0].item() == pytest.approx(expected, rel=1e-5)


def test_fsq_codes_count_in_mixed_radix():
    book = FSQ([3, 2, 4])
    digits = torch.tensor(list(itertools.product(range(3), range(2), range(4))))  # (24,3)
    half = torch.tensor([1, 1, 2])
    entries = ((digits - half) / half).T.reshape(1, 3, 1, 24)
    expected = digits[:, 0] + 3 * digits[:, 1] + 6 * digits[:, 2]
    assert torch.equal(book.indices(entries).flatten(), expected) and sorted(expected.tolist()) == list(range(24))
    assert torch.equal(book.lookup(expected.view(1, 1, 24)), entries)


def test_fsq_takes_latents_that_a_diffusion_model_overshot():
    book = FSQ([4, 5])
    wild = torch.tensor([[-7.0, 7.0], [-7.0, 7.0]]).view(1, 2, 1, 2)
    assert book.quantise(wild).flatten().tolist() == [-1.0, 0.5, -1.0, 1.0]


def test_fsq_gradient_is_that_of_the_bound():
    book, y = FSQ([5]), torch.tensor([[[[0.3, -1.1]]]], requires_grad=True)
    out = book(y)
    out.latent.sum().backward()
    assert torch.allclose(y.grad, (1 - y.detach().tanh() ** 2) * 1.001) and out.losses == {}
    assert not list(book.parameters()) and not book.state_dict()


def test_lfq_bits():
    book = LFQ(3)
    z = torch.tensor([[-0.1, 2.0, -3.0], [0.4, -1.0, 0.2]]).T.reshape(1, 3, 1, 2)
    assert book.indices(z).flatten().tolist() == [2, 5]
    assert book.quantise(z)[0, :, 0].T.tolist() == [[-1, 1, -1], [1, -1, 1]]
    assert book.codes == 8 and torch.equal(book.moments(z)[0], z) and not book.state_dict()


def by_definition(z, temperature):
    """E[H(p)] and H(E[p]) with p = softmax(-|z - c|^2 / temperature) over all entries; z: (N,C)."""
    entries = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=z.shape[1])), dtype=z.dtype)
    p = (-(z[:, None] - entries).square().sum(dim=2) / temperature).softmax(dim=1)
    return torch.special.entr(p).sum(dim=1).mean(), torch.special.entr(p.mean(dim=0)).sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_lfq_entropies_are_those_over_all_entries(temperature):
    z = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = LFQ(6, temperature=temperature).entropies(z.T.reshape(1, 6, 5, 10))
    assert torch.allclose(torch.stack(found), torch.stack(by_definition(z, temperature)))


def test_lfq_above_ten_bits_bounds_the_entropy_of_the_mean():
    """Equal for independent bits, more where bits repeat one another; the other entropy stays exact."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 11, dtype=torch.float64, generator=generator)
    z[:, 1] = z[:, 0]
    decided, used = LFQ(11).entropies(z.T.reshape(1, 11, 4, 10))
    exact_decided, exact_used = by_definition(z, 1.0)
    assert torch.allclose(decided, exact_decided) and used > exact_used
    same = torch.zeros(4, 11, dtype=torch.float64)  # p is uniform for each: bits are independent in the mean
    assert LFQ(11).entropies(same.T.reshape(1, 11, 2, 2))[1].item() == pytest.approx(11 * math.log(2))


def test_lfq_losses():
    book = LFQ(2, entropy=0.5, gamma=0.25, beta=0.1)
    z = torch.tensor([[0.5, -1.0], [2.0, 0.5]]).T.reshape(1, 2, 1, 2)
    losses, (decided, used) = book(z).losses, book.entropies(z)
    assert losses["codebook"].item() == pytest.approx(0.1 * (0.25 + 0 + 1 + 0.25) / 4)
    assert losses["entropy"].item() == pytest.approx(0.5 * (decided - 0.25 * used).item())


@pytest.mark.parametrize("channels", [4, 12])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_lfq_gradients_are_finite_where_probabilities_are_0(channels, temperature):
    z = (50 * torch.ones(2, channels, 2, 2)).requires_grad_()
    losses = LFQ(channels, temperature=temperature)(z).losses
    sum(losses.values()).backward()
    assert z.grad.isfinite().all() and all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("channels", [6, 12])
def test_lfq_entropy_revives_dead_bits(channels):
    """Features that all have the same signs: without the entropy nothing moves, with it every bit is used."""
    def trained(entropy):
        generator = torch.Generator().manual_seed(0)
        book = LFQ(channels, entropy=entropy)
        bias = torch.full((channels, 1, 1), 1.5, requires_grad=True)
        optimizer = torch.optim.Adam([bias], lr=0.05)
        for _ in range(100):
            out = book(torch.randn(4, channels, 4, 4, generator=generator) * 0.5 + bias)
            optimizer.zero_grad()
            sum(out.losses.values()).backward()
            optimizer.step()
        p = (out.codes.unsqueeze(-1) >> torch.arange(channels) & 1).float().mean(dim=(0, 1, 2))
        return p
    assert trained(0.0).min() > 0.9
    assert (trained(1.0) - 0.5).abs().max() < 0.25
