"""Plans as data, plan files as JSON and as policies, and what both refuse."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcache import Plan, PlanFile, Trajectory
from stepcache.core.follow_weights import FollowWeights, Planned
from stepcache.core.plan import even, timeline
from stepcache.hindsight.method import FollowHindsight


@st.composite
def plans(draw):
    steps = draw(st.integers(1, 60))
    computed = tuple(sorted({0, steps - 1} | draw(st.sets(st.integers(0, steps - 1)))))
    skipped = [k for k in range(steps) if k not in computed]
    weights = tuple(
        (k, tuple(draw(st.lists(st.floats(-2, 2), min_size=1, max_size=min(3, sum(c < k for c in computed))))))
        for k in skipped
        if draw(st.booleans())
    )
    return Plan(steps, computed, weights)


@st.composite
def files(draw):
    plan = draw(plans())
    numbers = st.floats(0, 10)
    return PlanFile(
        plan,
        draw(st.sampled_from(["lemica", "magcache", "custom"])),
        model=draw(st.none() | st.text(max_size=5)),
        shift=draw(st.none() | numbers),
        guidance=draw(st.none() | numbers),
        guidance_range=draw(st.none() | st.just((3.5, 6.5))),
        timesteps=draw(st.none() | st.just(tuple(float(k) for k in range(plan.num_steps)))),
        boundary=draw(st.sampled_from(["output", "blocks"])),
        errors=tuple((k, 0.5) for k in plan.skipped),
        figures=(("psnr_mean", draw(numbers)),),
        notes=tuple(draw(st.lists(st.text(max_size=9), max_size=2))),
    )


@given(files())
def test_what_is_saved_is_read_back_equal(tmp_path_factory, file):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    file.save(path)
    assert PlanFile.load(path) == file
    document = json.loads(path.read_text())
    assert (document["schema"], document["version"]) == ("stepcache.plan", 3)


@given(plans())
def test_computed_and_skipped_partition_the_steps(plan):
    assert sorted(plan.computed + plan.skipped) == list(range(plan.num_steps))
    marks = timeline(plan.num_steps, plan.computed, width=1000)
    assert [k for k, m in enumerate(marks) if m == "█"] == list(plan.computed)
    assert plan.ideal_speedup == plan.num_steps / plan.budget


@given(plans(), st.integers(2, 80), st.data())
def test_resampling_keeps_budget_and_ends(plan, steps, data):
    budget = data.draw(st.integers(2, steps))
    resampled = plan.resampled(steps, budget)
    assert len(resampled.computed) == budget
    assert resampled.computed[0] == 0
    assert resampled.computed[-1] == steps - 1
    assert resampled.weights == ()


def test_resampling_keeps_the_normalised_position():
    plan = Plan(50, (0, 1, 2, 7, 14, 28, 49))
    assert plan.resampled(99).computed == (0, 2, 4, 14, 28, 56, 98)
    assert plan.resampled(50).computed == plan.computed


@given(st.integers(2, 60), st.data())
def test_even_steps_differ_by_one_at_most(steps, data):
    budget = data.draw(st.integers(2, steps))
    computed = even(steps, budget).computed
    gaps = [b - a for a, b in itertools.pairwise(computed)]
    assert (len(computed), computed[0], computed[-1]) == (budget, 0, steps - 1)
    assert max(gaps) - min(gaps) <= 1


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


@pytest.mark.parametrize("budget", [1, 0, -3])
def test_even_steps_need_both_ends(budget):
    with pytest.raises(ValueError, match="2 or more"):
        even(10, budget)
    with pytest.raises(ValueError, match="use at most 10"):
        even(10, 11)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (((4, (1.0,)),), "not a skipped step"),
        (((2, (1.0, 0.0)),), "2 weights; 1 outputs"),
        (((2, (float("nan"),)),), "not a finite number"),
    ],
)
def test_weights_that_cannot_be_followed(weights, says):
    plan = Plan(5, (0, 4), weights)
    with pytest.raises(ValueError, match=says):
        FollowWeights(plan)
    with pytest.raises(ValueError, match=says):
        Planned(plan).begin(Trajectory(5))


def test_invalid_fields():
    plan = Plan(5, (0, 4))
    with pytest.raises(ValueError, match="boundary"):
        PlanFile(plan, boundary="middle")
    with pytest.raises(ValueError, match="4 timesteps for 5"):
        PlanFile(plan, timesteps=(1.0,) * 4)
    with pytest.raises(ValueError, match="lower end first"):
        PlanFile(plan, guidance_range=(6.0, 3.0))
    with pytest.raises(ValueError, match="a schedule only"):
        PlanFile(plan, "hindsight", boundary="blocks")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[]", "not a stepcache.plan file"),
        ("{}", "not a stepcache.plan file"),
        ('{"schema": "stepcache.plan", "version": 1}', "version 1 is unknown; this program reads version 3"),
        ('{"schema": "stepcache.plan", "version": 2}', "version 2 is unknown; this program reads version 3"),
        ('{"schema": "stepcache.plan", "version": 3}', "computed and num_steps is missing"),
        ('{"schema": "stepcache.plan", "version": 3, "num_steps": 5, "computed": [0], "colour": 1}', "unknown fields"),
        ('{"schema": "stepcache.plan", "version": 3, "num_steps": 5, "computed": 3}', "plan file"),
        ('{"schema": "stepcache.plan", "version": 3, "num_steps": 5, "computed": [0, 9]}', "ends at 4"),
    ],
)
def test_files_that_are_no_plans(text, says, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        PlanFile.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PlanFile.load(tmp_path / "none.json")


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PlanFile(Plan(5, (0, 4))).save(path)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disc full")))
    with pytest.raises(OSError, match="disc full"):
        PlanFile(Plan(9, (0, 8))).save(path)
    assert PlanFile.load(path).plan.num_steps == 5
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_for_something_else_is_refused_with_both_named():
    file = PlanFile(Plan(50, (0, 49)), "lemica", model="a", shift=5.0, guidance=4.0)
    run = Trajectory(40, "b", shift=3.0, guidance=4.0)
    with pytest.raises(
        ValueError, match=r"50 steps \(the run: 40\), model a \(the run: b\), shift 5.0 \(the run: 3.0\)"
    ):
        file.begin(run)
    with pytest.warns(UserWarning, match="resampling was asked for"):
        strategy = replace(file, resample=True).begin(run)
    assert strategy.plan == Plan(40, (0, 39))
    assert "resampled from 50 to 40 steps" in strategy.notes


def test_what_the_run_does_not_know_is_not_checked():
    file = PlanFile(Plan(5, (0, 4)), model="a", shift=5.0, timesteps=(5.0, 4.0, 3.0, 2.0, 1.0))
    assert file.fitted_to(Trajectory(5)) is file
    with pytest.raises(ValueError, match="other timesteps"):
        file.fitted_to(Trajectory(5, timesteps=(5.0, 4.0, 3.0, 2.0, 0.5)))


def test_guidance_outside_of_the_range():
    file = PlanFile(Plan(5, (0, 4)), guidance_range=(3.5, 6.5))
    assert file.fitted_to(Trajectory(5, guidance=6.5)) is file
    with pytest.raises(ValueError, match=r"guidance 3.5 to 6.5 \(the run: 9\)"):
        file.fitted_to(Trajectory(5, guidance=9.0))


def test_the_method_decides_how_a_plan_is_followed():
    plan = Plan(5, (0, 2, 4), ((3, (2.0, -1.0)),))
    assert type(PlanFile(plan, "taylorseer").begin(Trajectory(5))) is FollowWeights
    assert type(PlanFile(Plan(5, (0, 2, 4)), "hindsight").begin(Trajectory(5))) is FollowHindsight
    assert str(PlanFile(Plan(5, (0, 2, 4)), "hindsight")) == "hindsight, planned (budget 3)"
