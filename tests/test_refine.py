"""Closed-loop refinement: what it tries, how it chooses, that it goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import sample, tiny_pipe

import stepcache
from stepcache import Plan, PlanFile
from stepcache.planning.refine import Trial, load_trials, neighbours, refine, rescheduled, save_trials

STEPS = 8
START = PlanFile(Plan(STEPS, (0, 1, 4, 7)), "hindsight", notes=("a note",))


def run(pipe):
    return lambda prompt, seed: sample(pipe, steps=STEPS, seed=seed)


@pytest.fixture(scope="module")
def truths():
    pipe = tiny_pipe()
    return {("a", seed): run(pipe)("a", seed) for seed in (1, 2)}


def error_of(pipe, computed, truths):
    """The worst prompt's relative error of a schedule, run plainly."""
    with stepcache.accelerate(pipe, rescheduled(START, computed)):
        found = [float((run(pipe)(*key) - t).norm() / t.norm()) for key, t in truths.items()]
    return max(found)


def test_it_finds_the_best_neighbour(truths):
    pipe = tiny_pipe()
    best, trials = refine(pipe, START, truths, run(pipe), trials=60)
    assert {t.computed for t in trials} >= {START.plan.computed, *neighbours(best.plan.computed, STEPS)}
    errors = {t.computed: error_of(pipe, t.computed, truths) for t in trials}
    assert errors[best.plan.computed] == pytest.approx(min(errors.values()))
    assert errors[best.plan.computed] < errors[START.plan.computed]
    assert (best.method, best.notes) == (START.method, START.notes)
    assert dict(best.figures)["measured_runs"] == 2


def test_the_worst_quarter_decides_not_the_mean():
    steady, gambler = Trial((0, 1), (0.1,) * 4), Trial((0, 1), (0.001,) * 3 + (0.5,))
    assert steady.score > gambler.score
    assert Trial((0, 1), (0.0, 0.0)).score > 100
    assert Trial((0, 1), (0.1, float("nan"))).score < Trial((0, 1), (0.1, 10.0)).score, "a run lost is the worst one"


def test_trials_end_where_they_were_told_to_and_go_on(truths, tmp_path):
    pipe, saved, ran = tiny_pipe(), [], []

    def counted(prompt, seed):
        ran.append(seed)
        return run(pipe)(prompt, seed)

    refine(pipe, START, truths, counted, trials=3, save=saved.append)
    assert len(ran) == 3 * 2
    assert [len(t) for t in saved] == [1, 2, 3]
    path, key = tmp_path / "trials.json", {"start": START.plan.computed}
    save_trials(path, saved[-1], key)
    known = load_trials(path, key)
    assert known == saved[-1]
    ran.clear()
    refine(pipe, START, truths, counted, trials=4, known=known)
    assert len(ran) == 2, "only the fourth is new"
    with pytest.raises(ValueError, match="another plan or calibration"):
        load_trials(path, {"start": (0, 7)})
    assert load_trials(tmp_path / "none.json", key) == ()


def test_neighbours_keep_ends_and_order():
    found = list(neighbours((0, 1, 4, 7), 8))
    assert found == [(0, 2, 4, 7), (0, 1, 3, 7), (0, 1, 5, 7)]


def test_what_was_measured_of_one_schedule_is_not_of_another():
    told = replace(START, errors=((2, 0.1),), figures=(("psnr_mean", 40.0),))
    moved = rescheduled(told, (0, 2, 4, 7))
    assert (moved.plan.computed, moved.errors, moved.figures) == ((0, 2, 4, 7), (), ())
    assert (moved.method, moved.notes) == (START.method, START.notes)


def test_bad_settings(truths):
    pipe = tiny_pipe()
    for trials, given in ((0, truths), (1, {})):
        with pytest.raises(ValueError, match="at least one of each"):
            refine(pipe, START, given, run(pipe), trials=trials)


def test_a_plan_with_its_measurement_is_saved(truths, tmp_path):
    pipe = tiny_pipe()
    best, _ = refine(pipe, START, truths, run(pipe), trials=2)
    best.save(tmp_path / "plan.json")
    assert PlanFile.load(tmp_path / "plan.json") == best
    assert json.loads((tmp_path / "plan.json").read_text())["method"] == "hindsight"
    assert torch.isfinite(torch.tensor([v for _, v in best.figures])).all()
