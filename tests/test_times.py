import pytest
import torch
from oracles import PROCESSES

from ldm.process import DDPM, RectifiedFlow
from ldm.times import TIMES, compvis, leading, linear, quadratic, shifted

DISCRETE = ("leading", "compvis", "quadratic")


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("name", [name for name in TIMES if name not in DISCRETE])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_from_the_most_noise_to_the_data(process, name, n):
    times = TIMES[name](process, n)
    assert times.shape == (n + 1,) and times.dtype is torch.float64
    assert times[0] == process.t_max and times[-1] == process.t_data
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("n", [1, 2, 10, 50, 333, 500])
@pytest.mark.parametrize("name", DISCRETE)
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


def test_known_lists():
    assert leading(DDPM(), 5).tolist() == [801, 601, 401, 201, 1, -1]
    assert compvis(DDPM(), 5).tolist() == [801, 601, 401, 201, 1, 0]
    assert len(compvis(DDPM(), 30)) - 1 == 31  # 1000 = 30 * 33 + 10
    assert quadratic(DDPM(), 3).tolist() == [801, 201, 1, 0]


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_shifted_times_of_a_flow_are_the_times_of_a_shifted_flow(shift):
    ours, theirs = RectifiedFlow(), RectifiedFlow(shift)
    assert torch.allclose(ours.exact(shifted(shift)(ours, 9))[1], theirs.exact(linear(theirs, 9))[1], atol=1e-12)


def test_shift_1_is_linear():
    assert torch.allclose(shifted(1.0)(DDPM(), 8), linear(DDPM(), 8))


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("process", ["flow", "vp", "edm"])
def test_lists_of_steps_need_steps(name, process):
    with pytest.raises(ValueError, match=f"times '{name}' belong to discrete processes; .* takes 'linear'"):
        TIMES[name](PROCESSES[process], 10)


@pytest.mark.parametrize(("name", "n"), [("compvis", 3), ("compvis", 999), ("compvis", 501), ("leading", 1000)])
def test_lists_that_leave_the_process_are_refused(name, n):
    with pytest.raises(ValueError, match="begin at t = 1000, the process ends at 999; take a number .* that divides 1000"):
        TIMES[name](DDPM(), n)


@pytest.mark.parametrize("name", DISCRETE)
def test_more_steps_than_there_are_is_refused(name):
    with pytest.raises(ValueError, match="1001 steps of a process that has 1000"):
        TIMES[name](DDPM(), 1001)
