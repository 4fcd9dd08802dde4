"""Half-lives, power-function averages, and averages that are put together after the fact."""

import math

import pytest
import torch
from torch import nn

from ldm.common.ema import (
    Ema,
    HalfLife,
    Power,
    Snapshots,
    gamma_of,
    inner,
    posthoc_coefficients,
    reconstruct,
    width_of,
)
from ldm.common.files import UserError


class Walker(nn.Module):
    """Weights that walk at random, a frozen one, and a buffer."""

    def __init__(self, size=20):
        super().__init__()
        self.walking = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.source = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo):  # generators cannot be copied
        other = Walker(len(self.walking))
        other.load_state_dict(self.state_dict())
        return other

    @torch.no_grad()
    def step(self):
        self.walking += torch.randn(self.walking.shape, generator=self.source, dtype=torch.float64)
        self.steps += 1


def profile(kind, n: int) -> torch.Tensor:
    """Share of each of n updates in the average, and of the start (first): by following what an update keeps."""
    shares = torch.zeros(n + 1, dtype=torch.float64)
    shares[0] = 1
    for k in range(1, n + 1):
        keep = kind.keep(k, 32 * k)
        shares *= keep
        shares[k] += 1 - keep
    return shares


def test_widths_are_those_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3) and gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)  # section 3.2
    for width in (0.01, 0.1, 0.25):
        gamma = gamma_of(width)
        assert width_of(gamma) == pytest.approx(width, rel=1e-12)
        cubic = [1, 7, 16 - width**-2, 12 - width**-2]  # its only positive root
        assert sum(c * gamma**k for c, k in zip(cubic, (3, 2, 1, 0), strict=True)) == pytest.approx(0, abs=1e-6 * gamma**3)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, 1.0])
def test_widths_have_bounds(width):
    with pytest.raises(ValueError, match="takes 0 to 0.2887, excluded"):
        gamma_of(width)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_power_averages_have_their_width_whatever_the_time(width):
    """Update k of n has the share (k/n)^(gamma+1) - ((k-1)/n)^(gamma+1): the integral of the profile over its step."""
    for n in (500, 2000):
        shares, edges = profile(Power(width), n), torch.arange(n + 1, dtype=torch.float64) / n
        assert shares[0] == 0 and torch.allclose(shares[1:], (edges ** (gamma_of(width) + 1)).diff(), atol=1e-12)
        middles = (edges[1:] + edges[:-1]) / 2
        mean = (shares[1:] * middles).sum()
        assert ((shares[1:] * (middles - mean) ** 2).sum().sqrt()).item() == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize(("options", "updates"), [({"images": 3200.0}, 100), ({"steps": 100.0}, 100), ({"images": 320.0}, 10)])
def test_half_of_the_past_is_forgotten_in_a_half_life(options, updates):
    n = 400
    shares = profile(HalfLife(**options, ramp=None), n)
    assert shares[: n + 1 - updates].sum().item() == pytest.approx(0.5, rel=1e-9)


def test_half_life_in_images_is_the_same_for_any_batch():
    small, large = HalfLife(images=1000.0, ramp=None), HalfLife(images=1000.0, ramp=None)
    assert math.prod(small.keep(k, 16 * k) for k in range(1, 5)) == pytest.approx(large.keep(1, 64))


def test_half_life_is_ramped_up():
    """At most 5 % of the training so far: the first update starts anew, and late ones have the whole half-life."""
    kind = HalfLife(steps=100.0)
    assert kind.keep(1, 0) == pytest.approx(0.5**20)
    assert kind.keep(1000, 0) == pytest.approx(0.5 ** (1 / 50)) and kind.keep(5000, 0) == pytest.approx(0.5 ** (1 / 100))


@pytest.mark.parametrize("options", [{}, {"images": 1.0, "steps": 1.0}, {"steps": 0.0}, {"images": -1.0}])
def test_half_life_needs_one_length(options):
    with pytest.raises(ValueError, match="give images or steps, above 0"):
        HalfLife(**options)


def test_inner_products_are_integrals():
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * 3.0
    for (t, gamma), (t_, gamma_) in [((2.0, 6.94), (3.0, 16.97)), ((3.0, 1.5), (1.0, 0.3)), ((2.5, 4.0), (2.5, 4.0))]:
        one, other = ((g + 1) * tau**g / end ** (g + 1) * (tau <= end) for end, g in ((t, gamma), (t_, gamma_)))
        found = inner(*(torch.tensor(x, dtype=torch.float64) for x in (t, gamma, t_, gamma_)))
        assert found.item() == pytest.approx(((one * other).mean() * 3.0).item(), rel=1e-4)


def test_what_was_tracked_is_found_again():
    times, widths = [100, 100, 200, 200, 300, 300], [0.05, 0.1] * 3
    for i in range(6):
        shares = posthoc_coefficients(times, widths, times[i], widths[i])
        assert torch.allclose(shares, torch.eye(6, dtype=torch.float64)[i], atol=1e-9)


def walk(folder, steps, every, widths, tracked=()):
    """-> averages that were tracked directly, beside the snapshots."""
    module, snapshots = Walker(), Snapshots(every, widths)
    averages = snapshots.averages(module).double()
    direct = nn.ModuleList(Ema(module, Power(width)) for width in tracked).double()
    for k in range(1, steps + 1):
        module.step()
        for ema in (*averages, *direct):
            ema.update(module)
        if k % every == 0:
            snapshots.save(averages, module, folder)
    return module, direct


@pytest.mark.parametrize(("every", "worst"), [(100, 6e-2), (50, 1.5e-2), (25, 3e-3)])
def test_averages_after_the_fact_are_those_that_were_tracked(tmp_path, every, worst):
    """On a random walk; in units of the distance between the average and the last weights. Fewer snapshots, more error."""
    widths = (0.03, 0.07, 0.15, 0.25)
    module, direct = walk(tmp_path, 1000, every, (0.05, 0.10), widths)
    assert len(list(tmp_path.iterdir())) == 2 * 1000 // every
    for width, ema in zip(widths, direct, strict=True):
        found = reconstruct(tmp_path.iterdir(), width)
        assert list(found) == ["walking"] and found["walking"].dtype is torch.float32
        scale = (ema.shadow.walking - module.walking).norm()
        assert (found["walking"] - ema.shadow.walking).norm() < worst * scale


def test_an_average_as_of_an_earlier_step(tmp_path):
    walk(tmp_path, 400, 50, (0.05, 0.10))
    early = tmp_path / "early"
    _, (ema,) = walk(early, 200, 50, (0.05, 0.10), (0.08,))
    files = list(tmp_path.glob("*.safetensors"))
    found = reconstruct(files, 0.08, updates=200)["walking"]
    assert torch.equal(found, reconstruct(early.iterdir(), 0.08)["walking"])
    assert torch.allclose(found.double(), ema.shadow.walking, atol=0.5)  # four snapshots of each
    for step, near in ((40, 50), (199, 200), (5000, 400)):  # shares that add up to 0.6 at 199, and to nothing at 5000
        with pytest.raises(UserError, match=f"no snapshot of step {step} to make an average from; nearest: {near}"):
            reconstruct(files, 0.08, updates=step)
    with pytest.raises(UserError, match="no snapshot to make an average from; train with"):
        reconstruct([], 0.08)


@pytest.mark.parametrize("options", [{"every": 0}, {"widths": ()}])
def test_snapshots_need_steps_and_widths(options):
    with pytest.raises(ValueError, match="expected every from 1 and at least one width"):
        Snapshots(**options)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"walking": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors: this is no snapshot"):
        reconstruct([tmp_path / "a.safetensors"], 0.1)


def test_profiles_of_an_ema_are_used():
    module = Walker(4)
    ema = Ema(module, Power(0.1))
    path = []
    for _ in range(30):
        module.step()
        ema.update(module)
        path.append(module.walking.detach().clone())
    expected = (profile(Power(0.1), 30)[1:, None] * torch.stack(path)).sum(0)
    assert torch.allclose(ema.shadow.walking.double(), expected, atol=1e-5)
    assert ema.shadow.steps == 30 and list(ema.state_dict()) == list(Ema(module, 0.9).state_dict())
