"""The methods of bench/rivals.py predict what their papers say, seen on signals of which that is known."""

import math

import numpy as np
import pytest
import torch
from rivals import DMD, VDE, Following, Replay, hicache, spectrum_schedule, taylor, zeus
from tiny import sample, tiny_pipe

import stepcache
from stepcache import Hindsight, Plan
from stepcache.core.follow_weights import check_weights
from stepcache.core.plan import even
from stepcache.core.strategy import Call
from stepcache.methods.spectrum import spectrum_weights

PLAN = Plan(20, (0, 1, 4, 7, 10, 13, 16, 19))


def predicted(plan, signal):
    """Step -> what the plan's weights make of a signal of the step index."""
    rows = dict(check_weights(plan).weights)
    before = {s: [k for k in plan.computed if k < s][::-1] for s in rows}
    return {s: sum(w * signal(k) for w, k in zip(rows[s], before[s], strict=False)) for s in rows}


def test_a_line_is_extrapolated_exactly():
    line = lambda s: 3.0 - 0.5 * s  # noqa: E731
    for plan in (taylor(PLAN, 1), spectrum_weights(PLAN, 0.0)):
        for step, value in predicted(plan, line).items():
            assert value == pytest.approx(line(step))


def test_spectrum_is_the_ridge_regression_of_its_paper():
    rng = np.random.default_rng(0)
    values = {k: float(v) for k, v in zip(PLAN.computed, rng.normal(size=8), strict=True)}
    for step, value in predicted(spectrum_weights(PLAN, 1.0), values.__getitem__).items():
        nodes = [k for k in PLAN.computed if k < step]
        if len(nodes) < 2:
            continue
        basis = lambda s: [math.cos(m * math.acos(2 * s / 20 - 1)) for m in range(5)]  # noqa: E731
        x = np.array([basis(k) for k in nodes])
        fitted = np.linalg.lstsq(
            np.vstack([x, math.sqrt(0.1) * np.eye(5)]), [*(values[k] for k in nodes), *[0.0] * 5], rcond=None
        )[0]
        assert value == pytest.approx(float(np.array(basis(step)) @ fitted), abs=1e-9)


@pytest.mark.parametrize(("steps", "budget"), [(50, 25), (50, 20), (50, 14), (50, 10), (28, 14), (28, 10)])
def test_spectrum_s_schedule_has_the_budget_and_growing_gaps(steps, budget):
    plan = spectrum_schedule(steps, budget)
    assert plan.budget == budget
    gaps = np.diff(plan.computed[4:-1])
    assert (np.diff(gaps) >= -1).all()  # floor(N), N growing evenly
    with pytest.raises(ValueError, match="has no 4 of 50"):
        spectrum_schedule(50, 4)


def test_zeus_never_extrapolates_twice_in_a_row():
    rows = dict(zeus(PLAN).weights)
    assert rows[5] == rows[6] == pytest.approx((1 + 1 / 3, -1 / 3))
    assert rows[2] == rows[3] == (2.0, -1.0)


def test_hicache_s_first_order_is_half_a_line():
    """H_1(y) = 2 y; contracted by one half twice over that is half of the step."""
    rows = dict(hicache(PLAN, 1).weights)
    assert rows[5] == pytest.approx((1 + 0.5 / 3, -0.5 / 3, 0)[: len(rows[5])])
    for weights in dict(hicache(PLAN, 2).weights).values():
        assert sum(weights) == pytest.approx(1.0)  # a constant is kept


def outputs_of(strategy, curve, until):
    """Feed a strategy the computed steps of a curve of (x, v) and return what it predicts at skipped ones."""
    kept, found = [], {}
    for step in range(until):
        x, v = curve(step)
        call = Call(step, "all", strategy.compute(step, x), True, False, None)
        if call.compute:
            kept = [strategy.feature(call, x, v), *kept][: strategy.history]
        else:
            found[step] = strategy.predict(call, kept, x)
    return found


def test_vde_follows_shares_that_change_evenly():
    """v = a x + b |x| d with a and b linear in the step and d fixed, x moving: exact."""
    generator = torch.Generator().manual_seed(0)
    e, d = torch.linalg.qr(torch.randn(30, 2, generator=generator))[0].T

    def curve(step):
        x = ((1 + 0.1 * step) * e).view(1, 2, 15)
        return x, ((0.5 - 0.02 * step) * x.flatten() + (0.3 + 0.05 * step) * x.norm() * d).view(1, 2, 15)

    for step, value in outputs_of(VDE(PLAN), curve, 19).items():
        if step > 1:
            torch.testing.assert_close(value, curve(step)[1], rtol=1e-4, atol=1e-5)


def test_dmd_follows_decaying_modes():
    """A sum of two exponentials is what a linear propagator moves."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(2, 1, 40, generator=generator)

    def curve(step):
        return modes[0], 0.95**step * modes[0] + 0.8**step * modes[1]

    found = outputs_of(DMD(PLAN), curve, 19)
    for step in (14, 15, 17, 18):
        torch.testing.assert_close(found[step], curve(step)[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", [Hindsight(5), stepcache.Uniform(5)])
def test_a_replay_of_a_run_that_computed_all_is_that_run(policy):
    pipe = tiny_pipe()
    truth = sample(pipe, steps=10)
    whole = Replay(type(policy)(10))
    with stepcache.accelerate(pipe, whole.first):
        torch.testing.assert_close(sample(pipe, steps=10), truth)
    with stepcache.accelerate(pipe, whole.again) as run:
        torch.testing.assert_close(sample(pipe, steps=10), truth, rtol=1e-4, atol=1e-5)
        assert run.summary().computed == (0,)
    part = Replay(policy)
    with stepcache.accelerate(pipe, part.first) as run:
        sample(pipe, steps=10)
        assert len(run.summary().computed) == 5
        assert sorted(part.outputs) == list(run.summary().computed)


def test_strategies_run_in_a_pipeline():
    pipe = tiny_pipe()
    for strategy in (VDE, DMD):
        with stepcache.accelerate(pipe, Following(even(12, 5), strategy)) as run:
            sample(pipe, steps=12)
        assert len(run.summary().computed) == 5
