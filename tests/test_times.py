import math

import pytest
import torch
from oracles import PROCESSES
from scipy import stats

from ldm.process import DDPM, EDM, VP, RectifiedFlow
from ldm.times import (
    TIMES,
    ays_sd1,
    beta,
    blocks,
    compvis,
    dpm_fast,
    exponential,
    flow_match,
    karras,
    lcm,
    leading,
    linear,
    linspace,
    log_snr,
    make_times,
    polyexponential,
    quadratic,
    shifted,
    sigmas,
    vp,
)

DISCRETE = ("leading", "compvis")
FROM_MOST_NOISE = [name for name in TIMES if name not in (*DISCRETE, "quadratic", "lcm", "log_snr", "dpm_fast", "sigmas")]


def levels(process, times):
    return torch.exp(-process.log_snr(times))


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("name", FROM_MOST_NOISE)
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_from_the_most_noise_to_the_data(process, name, n):
    if name == "linspace" and process.t_min == process.t_data:
        return
    times = TIMES[name](process, n)
    assert times.shape == (n + 1,) and times.dtype is torch.float64
    assert times[0] == process.t_max and times[-1] == process.t_data
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("n", [1, 2, 10, 50, 333, 500])
@pytest.mark.parametrize("name", [*DISCRETE, "quadratic"])
def test_discrete_lists_decrease_and_stay_in_the_process(name, n):
    process = DDPM()
    if name == "compvis" and 1000 % n:
        return
    times = TIMES[name](process, n)
    assert (times.diff() < 0).all() and times[0] <= process.t_max and times[-2] == 1
    assert times[-1] == (process.t_data if name == "leading" else process.t_min)


def test_linear_is_trailing_on_discrete_processes():
    assert linear(DDPM(), 4).tolist() == [999, 749, 499, 249, -1]  # 2305.08891, table 2: 1000, 750, 500, 250, counted from 1
    assert linear(DDPM(), 1000).tolist() == list(range(999, -2, -1))
    assert TIMES["trailing"] is linear
    assert linear(DDPM(), 4, end="first").tolist() == [999, 749, 499, 249, 0]
    assert linear(DDPM(), 3, round=True).tolist() == [999, 666, 332, -1]


def test_levels_between_those_of_another_list():
    process = DDPM()
    for of in (karras, exponential, polyexponential):
        found, other = of(process, 10, span="leading"), leading(process, 10)
        assert torch.allclose(found[[0, -2]], other[[0, -2]].double(), atol=1e-6) and found[-1] == -1
        ended = of(process, 10, end="first")
        assert torch.equal(ended[:-1], of(process, 10)[:-1]) and ended[-1] == 0


def test_known_lists():
    assert leading(DDPM(), 5).tolist() == [801, 601, 401, 201, 1, -1]
    assert TIMES["lcm"](DDPM(), 4).tolist() == [999, 759, 499, 259, -1]  # of 19, 39, ... 999: the 50th, 38th, 25th, 13th
    with pytest.raises(ValueError, match="take 50 at most"):
        TIMES["lcm"](DDPM(), 51)
    assert shifted(RectifiedFlow(), 3, shift=1.0, first=0.9).tolist() == pytest.approx([0.9, 0.6, 0.3, 0])
    assert shifted(RectifiedFlow(), 2, shift=3.0, last=0.5).tolist() == pytest.approx([1, 0.9, 0])
    assert leading(DDPM(), 5, offset=0, end="first").tolist() == [800, 600, 400, 200, 0, 0]
    assert leading(DDPM(), 10, divide="n+1").tolist() == [901, 811, 721, 631, 541, 451, 361, 271, 181, 91, -1]
    assert linspace(DDPM(), 4).tolist() == [999, 666, 333, 0, -1]
    assert linspace(DDPM(), 4, points="n+1").tolist() == [999, 749, 500, 250, -1]
    assert compvis(DDPM(), 5).tolist() == [801, 601, 401, 201, 1, 0]
    assert len(compvis(DDPM(), 30)) - 1 == 31  # 1000 = 30 * 33 + 10
    assert quadratic(DDPM(), 3).tolist() == [801, 201, 1, 0]
    assert quadratic(RectifiedFlow(), 2).tolist() == [1, 0.25, 0]
    assert lcm(DDPM(), 4).tolist() == [999, 759, 499, 259, -1]  # of 999, 979 ... 19 the 0th, 12th, 25th and 37th
    assert lcm(DDPM(), 2, trained=10, end="first").tolist() == [999, 499, 0]
    assert linspace(DDPM(), 4, overlap=True).tolist() == [[999, 749], [666, 416], [333, 83], [0, -1]]
    assert linear(DDPM(), 3, round=True, overlap=True, end="first").tolist() == [[999, 666], [666, 333], [332, 0]]


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_shifted_times_of_a_flow_are_the_times_of_a_shifted_flow(shift):
    ours, theirs = RectifiedFlow(), RectifiedFlow(shift)
    assert torch.allclose(ours.exact(shifted(ours, 9, shift=shift))[1], theirs.exact(linear(theirs, 9))[1], atol=1e-12)


def test_shift_1_is_linear():
    assert torch.allclose(shifted(DDPM(), 8, shift=1), linear(DDPM(), 8))


def test_a_terminal_share_is_the_last():
    assert float(flow_match(RectifiedFlow(), 9, shift=2.5, terminal=0.02)[-2]) == pytest.approx(0.02, abs=1e-15)


@pytest.mark.parametrize("process", [DDPM(), VP(), RectifiedFlow(), EDM()], ids=["ddpm", "vp", "flow", "edm"])
def test_spacing_of_the_noise_levels(process):
    """Each is even in what it says, on every process; the levels are asked for, so that no end is replaced."""
    ends = dict(sigma_min=0.05, sigma_max=10.0)
    even = {
        "karras": (karras(process, 9, **ends), lambda s: s ** (1 / 7)),
        "karras, rho 3": (karras(process, 9, rho=3.0, **ends), lambda s: s ** (1 / 3)),
        "exponential": (exponential(process, 9, **ends), torch.log),
        "polyexponential": (polyexponential(process, 9, rho=2.0, **ends), lambda s: (s / 0.05).log().clamp(min=0).sqrt()),
        "vp": (vp(process, 9, **ends), lambda s: (0.01 + 39.8 * torch.log1p(s**2)).sqrt()),
    }
    for name, (times, flat) in even.items():
        found = levels(process, times)
        assert torch.allclose(found[[0, -2]], torch.tensor([10.0, 0.05], dtype=torch.float64), rtol=1e-9), name
        assert found[-1] == 0 and times[-1] == process.t_data, name
        steps = flat(found[:-1]).diff()
        assert torch.allclose(steps, steps.mean().expand(8), rtol=1e-6), name
    steps = process.log_snr(log_snr(process, 9, **ends)).diff()
    assert torch.allclose(steps, torch.full((9,), math.log(200) / 9, dtype=torch.float64), rtol=1e-9)


def test_whole_steps_where_they_are_asked_for():
    for times in (karras(DDPM(), 12, round=True), exponential(DDPM(), 6, round=True)):
        assert (times == times.round()).all() and (times.diff() < 0).all()
    with pytest.raises(ValueError, match="discrete processes"):
        karras(RectifiedFlow(), 5, round=True)


def test_beta_is_the_quantile_of_the_beta_distribution():
    for a, b in ((0.6, 0.6), (1.0, 1.0), (0.5, 1.5), (3.0, 2.0)):
        share = torch.from_numpy(stats.beta.ppf(torch.linspace(1, 0, 21).double().numpy(), a, b))
        assert torch.allclose(beta(RectifiedFlow(), 20, alpha=a, beta=b), share, atol=2e-7), (a, b)


def test_align_your_steps():
    process = DDPM()
    times = ays_sd1(process, 10)
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # the authors' times for the same levels
    assert torch.allclose(times[:-1], torch.tensor(published).double(), atol=1.0) and times[-1] == -1
    finer = levels(process, ays_sd1(process, 20))
    assert torch.allclose(finer[2:20:2], levels(process, times)[1:10], rtol=1e-6)  # log-linear: every second is the same
    assert torch.allclose(finer[3:18:2].square(), finer[2:17:2] * finer[4:19:2], rtol=1e-6)


def test_lists_of_ones_own():
    flow = RectifiedFlow()
    assert make_times([1, 0.6, 0.2, 0], flow).tolist() == make_times([1, 0.6, 0.2, 0], flow, 3).tolist() == [1, 0.6, 0.2, 0]
    stretched = make_times([1, 0.8, 0.5, 0.2, 0], flow, 7)
    assert len(stretched) == 8 and torch.allclose(stretched[2::2], torch.tensor([0.8, 0.5, 0.2]).double()[:3])
    assert stretched[0] == 1 and stretched[-1] == 0 and stretched[-2] == pytest.approx(0.2)
    assert float(levels(flow, stretched)[3]) == pytest.approx(2)  # between 4 and 1
    assert len(make_times([0.9, 0.5], flow, 4)) == 5  # stops in the noise
    assert torch.allclose(levels(DDPM(), sigmas(DDPM(), 2, values=[9.0, 1.0, 0.0])), torch.tensor([9.0, 1.0, 0.0]).double())
    assert torch.equal(make_times({"name": "karras", "rho": 5}, flow, 4), karras(flow, 4, rho=5))
    for wrong in ([0.5], [0.2, 0.5], [1.2, 0.5, 0], [1, 0.5, -0.1]):
        with pytest.raises(ValueError, match="times: expected two or more decreasing times from 1 down to 0"):
            make_times(wrong, flow, 4)
    with pytest.raises(ValueError, match="values"):
        sigmas(flow, 4, values=[1.0, 2.0])


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("process", ["flow", "vp", "edm"])
def test_lists_of_steps_need_steps(name, process):
    with pytest.raises(ValueError, match=f"times '{name}' belong to discrete processes; .* takes 'linear'"):
        TIMES[name](PROCESSES[process], 10)


def test_linspace_is_not_for_flows():
    with pytest.raises(ValueError, match="RectifiedFlow has at the same time; take 'linear'"):
        linspace(RectifiedFlow(), 10)


@pytest.mark.parametrize(("name", "n"), [("compvis", 3), ("compvis", 999), ("compvis", 501), ("leading", 1000)])
def test_lists_that_leave_the_process_are_refused(name, n):
    with pytest.raises(ValueError, match="begin at t = 1000, the process ends at 999; take a number .* that divides 1000"):
        TIMES[name](DDPM(), n)


@pytest.mark.parametrize("name", [*DISCRETE, "quadratic"])
def test_more_steps_than_there_are_is_refused(name):
    with pytest.raises(ValueError, match="1001 steps of a process that has 1000"):
        TIMES[name](DDPM(), 1001)


def test_blocks_of_singlestep_methods():
    """2206.00927: blocks of three; what is left, or else a block of two and one of one."""
    assert [blocks(n, 3) for n in (1, 2, 3, 9, 10, 11)] == [[1], [2], [2, 1], [3, 3, 2, 1], [3, 3, 3, 1], [3, 3, 3, 2]]
    assert [blocks(n, 2) for n in (0, 4, 5)] == [[], [2, 1, 1], [2, 2, 1]] and blocks(3, 1) == [1, 1, 1]
    assert blocks(9, 3, lower_order_final=False) == [3, 3, 3]
    assert blocks(9, 3, False, clean=True) == [3, 3, 2, 1] and blocks(11, 3, clean=True) == [3, 3, 3, 1, 1]


@pytest.mark.parametrize("process", [DDPM(), VP(), RectifiedFlow(), EDM()], ids=["ddpm", "vp", "flow", "edm"])
@pytest.mark.parametrize("n", [5, 9, 20])
def test_blocks_are_even_steps_of_the_log_snr(process, n):
    times = dpm_fast(process, n, sigma_min=0.05, sigma_max=10.0)
    assert len(times) == n + 1 and (times.diff() < 0).all()
    log, sizes = process.log_snr(times), blocks(n, 3)
    ends = log[torch.tensor([0, *sizes]).cumsum(0)]
    assert torch.allclose(ends.diff(), ends.diff().mean().expand(len(sizes)), rtol=1e-6)
    assert torch.allclose(log[:4].diff(), (ends[1] - ends[0]).expand(3) / 3, rtol=1e-6)
    assert levels(process, times)[[0, -1]].tolist() == pytest.approx([10, 0.05])


def test_spacing_of_a_flows_own_sigma():
    """diffusers' flow matching: sigma itself, not sigma / alpha, follows the rule; times are sigma where nothing is shifted."""
    flow, ends = RectifiedFlow(), dict(sigma_min=0.01, over="sigma")
    even = {"karras": (karras(flow, 9, **ends), lambda s: s ** (1 / 7)), "exponential": (exponential(flow, 9, **ends), torch.log)}
    for times, flat in even.values():
        steps = flat(times[:-1]).diff()
        assert times[0] == 1 and times[-1] == 0 and torch.allclose(steps, steps.mean().expand(8), rtol=1e-6)
        assert float(times[-2]) == pytest.approx(0.01)
    share = torch.from_numpy(stats.beta.ppf(torch.linspace(1, 0, 7).double().numpy(), 0.6, 0.6))
    assert torch.allclose(beta(flow, 7, **ends)[:-1], 0.01 + 0.99 * share, atol=1e-6)
    found = levels(DDPM(), beta(DDPM(), 7, over="level", sigma_min=0.1, sigma_max=9.0))
    assert torch.allclose(found[:-1], 0.1 + 8.9 * share, rtol=1e-5)
    shifted_flow = RectifiedFlow(3.0)
    assert torch.allclose(shifted_flow.exact(karras(shifted_flow, 9, **ends))[1], karras(flow, 9, **ends), atol=1e-9)
    for process in (DDPM(), EDM(), VP()):
        with pytest.raises(ValueError, match="for flows, where alpha = 1 - sigma"):
            karras(process, 5, over="sigma")
    with pytest.raises(ValueError, match="sigma_max <= 1"):
        karras(flow, 5, over="sigma", sigma_max=2.0)


def test_shifted_times_may_begin_below_the_end():
    assert torch.allclose(shifted(RectifiedFlow(), 4, shift=1, first=0.8), torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0]).double())


def test_steps_of_ones_own():
    steps = [[0.9, 0.5], [0.6, 0.0]]
    assert make_times(steps, RectifiedFlow()).tolist() == make_times(steps, RectifiedFlow(), 2).tolist() == steps
    with pytest.raises(ValueError, match="2 steps from and to where cannot be brought to 5"):
        make_times(steps, RectifiedFlow(), 5)
    with pytest.raises(ValueError, match="expected two or more decreasing times"):
        make_times([[0.5, 0.9]], RectifiedFlow())


def test_lists_for_consistency_models_know_their_steps():
    with pytest.raises(ValueError, match="8 steps of the 4 that it was trained at"):
        lcm(DDPM(), 8, trained=4)
    with pytest.raises(ValueError, match="times 'overlap' belong to discrete processes"):
        linear(RectifiedFlow(), 4, overlap=True)


@pytest.mark.parametrize("spec", [
    {"name": "shifted", "shift": 0.0}, {"name": "shifted", "first": 2.0}, {"name": "shifted", "first": 0.0}, {"name": "karras", "rho": 0},
    {"name": "flow_match", "shift": -1.0}, {"name": "flow_match", "terminal": 1.5}, {"name": "dpm_fast", "order": 0}, {"name": "vp", "beta_d": 0},
    {"name": "beta", "alpha": 0.0}, {"name": "beta", "beta": -1.0}, {"name": "beta", "sigma_max": 10.0}, {"name": "polyexponential", "rho": -1}])
def test_options_beyond_their_range_are_told(spec):
    with pytest.raises(ValueError, match="^times.*" + list(spec)[1]):
        make_times(spec, PROCESSES["flow"], 6)


@pytest.mark.parametrize("n", [0, None])
def test_a_name_needs_a_number_of_steps(n):
    with pytest.raises(ValueError, match="a whole number from 1"):
        make_times("karras", PROCESSES["flow"], n)


def test_one_step_to_a_terminal_share_begins_in_noise():
    assert flow_match(PROCESSES["flow"], 1, terminal=0.1).tolist() == [1, 0]
