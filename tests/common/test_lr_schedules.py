import pytest

from ldm.common.build import build, check
from ldm.common.schedules import Cycles, Warmup

ONE = dict(lengths=[100], warmups=[10], start=[0.1], peak=[1.0], end=[0.01])


def test_warmup_begins_above_zero_and_arrives():
    assert [Warmup(4)(n) for n in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Warmup(0)(0) == Warmup(1)(0) == 1


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_decay_ends_with_the_run(decay, half):
    course = Warmup(0, decay, total=1000)
    assert course(0) == 1 and course(500) == pytest.approx(half)
    assert course(1000) == course(2000) == (1.0 if decay == "constant" else 0.0)
    values = [course(n) for n in range(1001)]
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))


def test_a_decay_without_an_end_is_refused():
    with pytest.raises(ValueError, match="decay 'linear' needs to know where the run ends: set trainer.max_steps"):
        Warmup(decay="linear")


def test_the_program_supplies_the_length():
    block = {"target": "ldm.common.schedules.Warmup", "params": {"steps": 0, "decay": "linear"}}
    assert check(block, "schedule") == [] and build(block, total=10)(5) == 0.5
    assert build({"target": "ldm.common.schedules.Cycles", "params": ONE}, total=10)(10) == pytest.approx(0.901)


@pytest.mark.parametrize("fall", ["linear", "cosine"])
def test_cycles_start_peak_and_end_where_they_say(fall):
    course = Cycles(lengths=[100, 50], warmups=[10, 0], start=[0.1, 0.5], peak=[1.0, 0.5], end=[0.01, 0.02], fall=fall)
    assert course(0) == 0.1 and course(5) == pytest.approx(0.55)
    assert course(100) == pytest.approx(0.01)  # still the first cycle's
    assert course(101) == pytest.approx(0.5, rel=0.03)
    assert course(150) == course(151) == course(10**9) == pytest.approx(0.02)
    assert course(10) == pytest.approx(1.0 if fall == "cosine" else 1 - 0.99 * 0.1)


@pytest.mark.parametrize(("change", "told"), [
    (dict(peak=[1.0, 2.0]), "expected one number a cycle in every list, got lengths 1, warmups 1, start 1, peak 2, end 1"),
    (dict(warmups=[100]), "warmups: 100 steps in a cycle of 100; it takes 0 to 99"),
    (dict(warmups=[-1]), "warmups: -1 steps in a cycle of 100"),
    (dict.fromkeys(ONE, []), "expected one number a cycle"),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_told_before_training(change, told):
    params = {**ONE, **change}
    with pytest.raises(ValueError, match=told):
        Cycles(**params)
    found = check({"target": "ldm.common.schedules.Cycles", "params": params}, "model.params.schedule")
    assert len(found) == 1 and told in found[0] and found[0].startswith("model.params.schedule")
