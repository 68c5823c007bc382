"""Conformance: each policy against a plain computation of its paper's formulas, written here independently."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepcache import EasyCache, LeMiCa, MagCache, Ratios, Spectrum, StepCache, TaylorSeer, Trajectory, Uniform
from stepcache.methods.lemica_schedules import SCHEDULES
from stepcache.methods.magcache_ratios import RATIOS

# ------------------------------------------------------------------ LeMiCa


@pytest.mark.parametrize("model", SCHEDULES)
def test_lemica_gives_the_published_lists(model):
    steps, schedules = SCHEDULES[model]
    for budget, expected in schedules.items():
        plan = LeMiCa(budget=budget).plan(model=model)
        assert plan.computed == expected
        assert (plan.num_steps, plan.budget) == (steps, budget)
        assert plan.computed[0] == 0
        assert plan.computed[-1] == steps - 1


def test_lemica_t2v_13b_as_printed_in_the_published_script():
    plan = LeMiCa(budget=14).plan(model="wan2.1-t2v-1.3B")
    assert plan.computed == (0, 1, 2, 3, 4, 5, 7, 10, 16, 23, 30, 37, 44, 49)


def test_lemica_refuses_what_is_not_published_and_lists_what_is():
    with pytest.raises(ValueError, match=r"14, 17, 20, 25 of 50 steps"):
        LeMiCa(budget=24).plan(model="wan2.1-t2v-1.3B")
    with pytest.raises(ValueError, match=r"of 40 steps"):
        LeMiCa(budget=25).plan(model="wan2.1-i2v-14B", num_steps=50)
    with pytest.raises(ValueError, match=r"no published table for sora.*wan2.1-t2v-1.3B"):
        LeMiCa(budget=25).plan(model="sora")


def test_lemica_resampled():
    policy = LeMiCa(budget=25, resample=True)
    plan = policy.plan("wan2.1-t2v-1.3B", 30)
    assert (plan.num_steps, plan.budget) == (30, 25)
    assert plan.computed[0] == 0
    assert plan.computed[-1] == 29
    assert "resampled from 25 of 50 to 25 of 30" in policy.notes("wan2.1-t2v-1.3B", 30)[0]
    assert policy.notes("wan2.1-t2v-1.3B", 50) == ()
    between = LeMiCa(budget=22, resample=True).plan("wan2.1-t2v-1.3B")
    assert between.budget == 22
    with pytest.raises(ValueError, match="does not fit 20 steps"):
        LeMiCa(budget=25, resample=True).plan("wan2.1-t2v-1.3B", 20)


# ---------------------------------------------------------------- MagCache


def original_magcache(cond, uncond, thresh, max_skips, retention):
    """The original script's loop: one counter over interleaved calls, separate accumulators (algorithms, 3.2)."""
    ratios = [g for pair in zip(cond, uncond, strict=True) for g in pair]
    rho, n, err = [1.0, 1.0], [0, 0], [0.0, 0.0]
    computed = []
    for i, g in enumerate(ratios):
        b = i % 2
        skip = False
        if i >= int(len(ratios) * retention):
            rho[b] *= g
            n[b] += 1
            err[b] += abs(1 - rho[b])
            if err[b] < thresh and n[b] <= max_skips:
                skip = True
            else:
                rho[b], n[b], err[b] = 1.0, 0, 0.0
        if not skip:
            computed.append((b, i // 2))
    return [[s for c, s in computed if c == b] for b in (0, 1)]


@pytest.mark.parametrize(
    ("model", "thresh", "max_skips", "count"),
    [
        ("wan2.1-t2v-1.3B", 0.12, 2, 25),
        ("wan2.1-t2v-1.3B", 0.12, 4, 21),
        ("wan2.1-t2v-14B", 0.24, 6, 18),
        ("wan2.1-i2v-14B-720p", 0.12, 2, 20),
        ("wan2.1-i2v-14B-720p", 0.12, 4, 17),
        ("wan2.1-i2v-14B-720p", 0.24, 6, 14),
    ],
)
def test_magcache_computes_what_the_original_computes_plus_the_last_step(model, thresh, max_skips, count):
    cond, uncond = original_magcache(*RATIOS[model], thresh, max_skips, 0.2)
    assert cond == uncond
    assert len(cond) == count
    plan = MagCache(thresh, max_skips, 0.2).plan(model)
    assert list(plan.computed) == sorted({*cond, plan.num_steps - 1})


@given(
    st.lists(st.floats(0.8, 1.2), min_size=2, max_size=40),
    st.floats(0, 1),
    st.integers(0, 6),
    st.floats(0, 1),
)
def test_magcache_single_branch_equals_the_recursion(ratios, thresh, max_skips, retention):
    """With both branches alike, our joint decision is the original's."""
    steps = len(ratios)
    ratios[0] = 1.0
    even = int(2 * steps * retention) // 2 / steps  # an odd count would retain half a step
    cond, _ = original_magcache(ratios, ratios, thresh, max_skips, even)
    both = Ratios(steps, {"cond": tuple(ratios), "uncond": tuple(ratios)})
    plan = MagCache(thresh, max_skips, even, ratios=both).plan()
    if plan.computed != (*sorted({0, *cond, steps - 1}),):  # a forced first step resets the accumulators
        assert 0 not in cond


@given(st.lists(st.floats(0.5, 1.5), min_size=3, max_size=60), st.integers(2, 120))
def test_magcache_resampling_keeps_the_running_product(values, steps):
    ratios = Ratios(len(values), {"cond": (1.0, *values[1:])})
    resampled = ratios.at(steps, "product").branches["cond"]
    assert len(resampled) == steps
    assert math.prod(resampled) == pytest.approx(math.prod(values[1:]), rel=1e-6)


def test_magcache_nearest_is_the_original_interpolation_and_breaks_the_product():
    cond, uncond = RATIOS["wan2.1-t2v-14B"]
    ratios = Ratios(50, {"cond": cond, "uncond": uncond})
    nearest = ratios.at(20, "nearest").branches["cond"]
    assert nearest == tuple(cond[round(k * 49 / 19)] for k in range(20))
    full = math.prod(cond)
    assert full == pytest.approx(0.36, abs=0.01)
    assert math.prod(nearest) == pytest.approx(0.64, abs=0.02)  # the defect described in the notes
    assert math.prod(ratios.at(20, "product").branches["cond"]) == pytest.approx(full, rel=1e-9)


def test_magcache_at_another_step_count():
    policy = MagCache(0.12, 2, 0.2)
    assert policy.plan("wan2.1-t2v-1.3B", 30).num_steps == 30
    assert "product" in policy.notes("wan2.1-t2v-1.3B", 30)[0]
    nearest = MagCache(0.12, 2, 0.2, interp="nearest")
    assert "nearest" in nearest.notes("wan2.1-t2v-1.3B", 30)[0]


def test_magcache_zero_retention_still_computes_the_first_step():
    assert MagCache(10.0, 3, 0.0).plan("wan2.1-t2v-1.3B").computed[:2] == (0, 4)


def test_magcache_recommended_settings():
    assert MagCache().settings("wan2.1-t2v-14B") == (0.24, 6, 0.2)
    assert MagCache(magcache_K=1).settings("wan2.1-t2v-14B") == (0.24, 1, 0.2)


def test_ratios_files(tmp_path):
    path = tmp_path / "ratios.json"
    ratios = Ratios(3, {"cond": (1.0, 0.9, 0.8)}, "m", {"cond": (0.0, 0.1, 0.1)}, {"cond": (0.0, 0.1, 0.2)}, "here")
    ratios.save(path)
    assert Ratios.load(path) == ratios
    with pytest.raises(ValueError, match="calibrated for 3 steps and the run has 5"):
        MagCache(ratios=ratios).plan(num_steps=5)
    assert MagCache(ratios=ratios, interp="product").plan(num_steps=5).num_steps == 5
    with pytest.raises(FileNotFoundError, match="ratios file"):
        Ratios.load(tmp_path / "none.json")
    path.write_text(
        '{"schema": "stepcache.magcache_ratios", "version": 1, "num_steps": 4, "branches": {"cond": [1, 1]}}'
    )
    with pytest.raises(ValueError, match="2 ratios; expected one for each of 4"):
        Ratios.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"ratios.json.*magcache_ratios"):
        Ratios.load(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MagCache(magcache_thresh=-1),
        lambda: MagCache(magcache_K=-1),
        lambda: MagCache(retention_ratio=1.5),
        lambda: MagCache(interp="cubic"),
        lambda: EasyCache(thresh=-0.1),
        lambda: EasyCache(thresh=float("nan")),
        lambda: EasyCache(ret_steps=-1),
        lambda: Ratios(2, {}),
        lambda: Ratios(2, {"cond": (1.0, 0.0)}),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match=r"expected|positive"):
        make()


# --------------------------------------------------------------- EasyCache


def smooth_run(steps, seed=0):
    """Latents that drift and a model whose output bends along the way: the decisions are not all alike."""
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(1, 4, 2, 4, 4, generator=g) for _ in range(3))
    for k in range(steps):
        t = k / steps
        yield a * (1 - t) + b * t * t, lambda x, t=t: c * math.cos(3 * t) + 0.5 * x


def reference_easycache(steps, thresh, ret_steps, seed=0):
    """Section 3.1 of the notes, step by step, for one branch: decisions and outputs."""
    decisions, outputs = [], []
    k = x_prev = x_a = y_a = None
    error = 0.0
    for s, (x, model) in enumerate(smooth_run(steps, seed)):
        compute = s < ret_steps or s >= steps - 1
        if not compute and k is None:
            compute = True
        if not compute:
            error += k * (x - x_prev).abs().mean().item() / y_a.abs().mean().item()
            compute = not error < thresh
        if compute:
            y = model(x)
            if x_a is not None:
                k = (y - y_a).abs().mean().item() / (x - x_a).abs().mean().item()
            x_a, y_a, error = x, y, 0.0
        else:
            y = x + (y_a - x_a)
        x_prev = x
        decisions.append(compute)
        outputs.append(y)
    return decisions, outputs


def drive(policy, steps, seed=0, branches=("cond", "uncond")):
    """Run a policy's StepCache over the same latents; the second branch's model gives twice the first's output."""
    cache = StepCache(policy, rounds=True)
    cache.begin(Trajectory(steps))
    decisions, outputs = [], []
    for x, model in smooth_run(steps, seed):
        for i, branch in enumerate(branches):
            call = cache.enter(branch, x)
            if call.compute:
                y = model(x) * (i + 1)
                cache.keep(call, x, y)
            else:
                y = cache.predict(call, x)
            cache.leave(call, y)
            if i == 0:
                decisions.append(call.compute)
                outputs.append(y)
    return decisions, outputs, cache


@pytest.mark.parametrize("thresh", [0.0, 0.02, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("ret_steps", [0, 1, 5, 10])
def test_easycache_equals_the_formulas(thresh, ret_steps):
    expected, outputs = reference_easycache(40, thresh, ret_steps)
    decisions, ours, cache = drive(EasyCache(thresh, ret_steps), 40)
    assert decisions == expected
    for a, b in zip(outputs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert cache.summary().branches[0].computed == cache.summary().branches[1].computed


def test_easycache_ret_steps_are_honoured():
    for ret_steps in (2, 7, 20):
        decisions, _, _ = drive(EasyCache(1e9, ret_steps), 30)
        assert decisions == [True] * ret_steps + [False] * (29 - ret_steps) + [True]


def test_easycache_threshold_zero_computes_all():
    decisions, _, cache = drive(EasyCache(0.0), 30)
    assert all(decisions)
    assert "no step was skipped" in cache.summary().warnings[0]


# ----------------------------------------------------------------- uniform


@given(st.integers(2, 60), st.integers(0, 60))
def test_uniform_has_its_budget_and_even_gaps(steps, spare):
    budget = max(2, steps - spare)
    plan = Uniform(budget=budget).plan(steps)
    gaps = [b - a for a, b in itertools.pairwise(plan.computed)]
    assert plan.budget == budget
    assert (plan.computed[0], plan.computed[-1]) == (0, steps - 1)
    assert max(gaps) - min(gaps) <= 1


def test_uniform_interval_and_mistakes():
    assert Uniform(interval=4).plan(10).computed == (0, 4, 8, 9)
    assert Uniform(interval=1).plan(5).computed == (0, 1, 2, 3, 4)
    for bad, match in (
        ({}, "exactly one"),
        ({"budget": 5, "interval": 2}, "exactly one"),
        ({"budget": 1}, "2 or more"),
        ({"interval": 0}, "1 "),
    ):
        with pytest.raises(ValueError, match=match):
            Uniform(**bad)
    with pytest.raises(ValueError, match="does not fit 10 steps"):
        Uniform(budget=11).plan(10)


# -------------------------------------------------------------- TaylorSeer


def taylor_by_the_book(values, computed, order):
    """The authors' recursion run on numbers (algorithms, 3.4): factors renewed at full steps, summed at others."""
    factors, last, out = [], 0, []
    for s, value in enumerate(values):
        if s in computed:
            new = [value]
            for j in range(min(order, len(factors))):
                new.append((new[j] - factors[j]) / (s - last))
            factors, last = new, s
            out.append(value)
        else:
            out.append(sum(f * (s - last) ** j / math.factorial(j) for j, f in enumerate(factors)))
    return out


@given(
    st.integers(0, 2),
    st.integers(1, 7),
    st.integers(1, 4),
    st.lists(st.floats(-10, 10), min_size=2, max_size=30),
)
def test_taylorseer_is_the_recursion(order, interval, first, values):
    plan = TaylorSeer(interval, order, first).plan(len(values))
    counter, full = 0, []
    for s in range(len(values)):  # the authors' calendar
        if s < first or counter == interval - 1:
            counter = 0
            full.append(s)
        else:
            counter += 1
    assert set(plan.computed) == {*full, len(values) - 1}
    expected = taylor_by_the_book(values, plan.computed, order)
    for step in plan.skipped:
        known = [values[k] for k in reversed(plan.computed) if k < step]
        got = sum(w * v for w, v in zip(dict(plan.weights).get(step, (1.0,)), known, strict=False))
        assert math.isclose(got, expected[step], rel_tol=1e-9, abs_tol=1e-6)


def test_taylorseer_continues_straight_lines_exactly():
    """Order 1 is exact on lines. Order 2 is TaylorSeer's backward difference: exact on lines, not on parabolas."""
    line = [3 + 2 * s for s in range(20)]
    for order in (1, 2):
        plan = TaylorSeer(3, order, 3).plan(20)
        for step in plan.skipped:
            known = [line[k] for k in reversed(plan.computed) if k < step]
            assert math.isclose(
                sum(w * v for w, v in zip(dict(plan.weights).get(step, (1.0,)), known, strict=False)), line[step]
            )


@given(st.integers(4, 60), st.floats(0.0, 1.0), st.sampled_from(["output", "blocks"]))
def test_spectrum_has_its_budget_and_weights_for_every_skipped_step(steps, blend, boundary):
    plan = Spectrum(3, blend, boundary).plan(steps)
    assert plan.computed == Uniform(3).plan(steps).computed
    assert tuple(step for step, _ in plan.weights) == plan.skipped
    assert str(Spectrum(3)) == "spectrum (budget 3, w 0.5)"


def test_spectrum_without_its_polynomials_is_taylorseer_of_order_one_on_even_steps():
    ours, lines = Spectrum(9, 0.0).plan(30), TaylorSeer(budget=9).plan(30)
    assert ours.computed == lines.computed
    for (_, a), (_, b) in zip(ours.weights[2:], lines.weights[2:], strict=True):
        assert a[: len(b)] == pytest.approx(b)
        assert not any(a[len(b) :])
    with pytest.raises(ValueError, match="blend is 2; expected 0 to 1"):
        Spectrum(9, 2)
    for beside in ({"interval": 7}, {"first_enhance": 3}):
        with pytest.raises(ValueError, match="takes a budget, or an interval and first_enhance"):
            TaylorSeer(budget=9, **beside)


def test_taylorseer_mistakes():
    for bad, match in (({"interval": 0}, "interval"), ({"order": 3}, "order is 3"), ({"first_enhance": 0}, "first_")):
        with pytest.raises(ValueError, match=match):
            TaylorSeer(**bad)
