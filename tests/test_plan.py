import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcache import Plan, Trajectory


@st.composite
def plans(draw):
    steps = draw(st.integers(1, 60))
    computed = tuple(sorted({0, steps - 1} | draw(st.sets(st.integers(0, steps - 1)))))
    reused = [k for k in range(steps) if k not in computed]
    weights = tuple(
        (k, tuple(draw(st.lists(st.floats(-2, 2), min_size=1, max_size=min(3, sum(c < k for c in computed))))))
        for k in reused
        if draw(st.booleans())
    )
    return Plan(
        steps,
        computed,
        "test",
        draw(st.none() | st.text(max_size=5)),
        shift=draw(st.none() | st.just(5.0)),
        weights=weights,
    )


@given(plans())
def test_json_round_trip(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["schema"] == "stepcache.plan"


@given(plans())
def test_computed_and_reused_partition_the_steps(plan):
    assert sorted(plan.computed + plan.reused) == list(range(plan.num_steps))
    marks = plan.timeline(width=1000).splitlines()[0]
    assert [k for k, m in enumerate(marks) if m == "█"] == list(plan.computed)
    assert plan.ideal_speedup == plan.num_steps / plan.budget


@given(plans(), st.integers(2, 80), st.data())
def test_resampling_keeps_budget_and_ends(plan, steps, data):
    budget = data.draw(st.integers(2, steps))
    resampled = plan.resampled(steps, budget)
    assert len(resampled.computed) == budget
    assert resampled.computed[0] == 0
    assert resampled.computed[-1] == steps - 1
    assert any("resampled" in n for n in resampled.notes)


def test_resampling_keeps_the_normalised_position():
    plan = Plan(50, (0, 1, 2, 7, 14, 28, 49))
    assert plan.resampled(99).computed == (0, 2, 4, 14, 28, 56, 98)
    assert plan.resampled(50).computed == plan.computed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, (0,)), "at least 1"),
        ((5, (1, 4)), "start with step 0"),
        ((5, ()), "start with step 0"),
        ((5, (0, 2, 2)), "increase strictly"),
        ((5, (0, 5)), "ends at 4"),
        ((5, [0, 4]), "tuple"),
        ((5, (0, 4.0)), "tuple of step indices"),
    ],
)
def test_invalid_plans_say_what_was_expected(arguments, says):
    with pytest.raises(ValueError, match=says):
        Plan(*arguments)


def test_invalid_fields():
    with pytest.raises(ValueError, match="boundary"):
        Plan(5, (0, 4), boundary="middle")
    with pytest.raises(ValueError, match="not a reused step"):
        Plan(5, (0, 4), weights=((4, (1.0,)),))
    with pytest.raises(ValueError, match="2 weights; 1 outputs"):
        Plan(5, (0, 4), weights=((2, (1.0, 0.0)),))
    with pytest.raises(ValueError, match="4 timesteps for 5"):
        Plan(5, (0, 4), timesteps=(1.0,) * 4)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": "stepcache.plan", "version": 1}', '{"schema": "stepcache.plan", "version": 2}',
     '{"schema": "stepcache.plan", "version": 2, "num_steps": 5, "computed": [0], "colour": 1}',
     '{"schema": "stepcache.plan", "version": 2, "num_steps": 5, "computed": 3}'],
)  # fmt: skip
def test_files_that_are_no_plans(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan|JSON"):
        Plan.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Plan.load(tmp_path / "none.json")


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    Plan(5, (0, 4)).save(path)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disc full")))
    with pytest.raises(OSError, match="disc full"):
        Plan(9, (0, 8)).save(path)
    assert Plan.load(path).num_steps == 5
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_for_something_else_is_refused_with_both_named():
    plan = Plan(50, (0, 49), "lemica", model="a", shift=5.0, guidance=4.0)
    run = Trajectory(40, "b", shift=3.0, guidance=4.0)
    with pytest.raises(
        ValueError, match=r"50 steps \(the run: 40\), model a \(the run: b\), shift 5.0 \(the run: 3.0\)"
    ):
        plan.fitted_to(run)
    with pytest.warns(UserWarning, match="resampling was asked for"):
        fitted = plan.fitted_to(run, resample=True)
    assert (fitted.num_steps, fitted.computed, fitted.model) == (40, (0, 39), "b")


def test_what_the_run_does_not_know_is_not_checked():
    plan = Plan(5, (0, 4), model="a", shift=5.0, timesteps=(5.0, 4.0, 3.0, 2.0, 1.0))
    assert plan.fitted_to(Trajectory(5)) is plan
    with pytest.raises(ValueError, match="other timesteps"):
        plan.fitted_to(Trajectory(5, timesteps=(5.0, 4.0, 3.0, 2.0, 0.5)))
