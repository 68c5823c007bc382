"""From a calibration to plans and the errors to expect of them, without another evaluation of the model.

Everything here is a quadratic form of the calibration's Gram matrices. A plan's error in the guided output of step s is
a combination of recorded ones; weighted with the sampler's influence g_s it is its error in the final latent (open
loop: as if the later outputs did not respond to it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from stepcache.core.plan import Plan
from stepcache.hindsight.corrector import order_one
from stepcache.hindsight.method import Hindsight
from stepcache.methods.magcache import MagCache, Ratios
from stepcache.planning.calibration import Calibration, quadratic
from stepcache.planning.paths import Edges, Objective, best_path
from stepcache.planning.plan_file import PlanFile

LONGEST_GAP = 12
"""Steps from one computed step to the next, at most; no published schedule (`methods/`) jumps more."""


GUIDANCE_MARGIN = 0.3
"""A plan may be used at guidance scales this share below and above the calibrated one."""


def step_errors(calibration: Calibration, plan: PlanFile) -> np.ndarray:
    """(S, runs): norm of the error a plan makes in each step's guided output over the norm of that output."""
    errors = np.zeros((calibration.num_steps, len(calibration.runs)))
    for step, weights in _deviations(plan, corrected=False):
        error = calibration.norms(_over(calibration, weights))
        errors[step] = error / calibration.norms(_over(calibration, {step: 1.0}))
    return errors


def plan_error(calibration: Calibration, plan: PlanFile) -> np.ndarray:
    """(runs,): error of the final latent over its norm, open loop, cross terms and guidance included.

    Of a hindsight plan it is the error of interpolating its gaps: what the corrector achieves if forecast errors are
    fully trusted.

    Raises:
        ValueError: the plan is of another step count.
    """
    if plan.plan.num_steps != calibration.num_steps:
        raise ValueError(f"the plan has {plan.plan.num_steps} steps, the calibration {calibration.num_steps}.")
    return np.asarray(calibration.norms(final_error(calibration, plan)) / calibration.final_norms)


def final_error(calibration: Calibration, plan: PlanFile) -> np.ndarray:
    """(S + 1,): the plan's open-loop error in the final latent over the Gram matrix's vectors (see `plan_error`)."""
    total: dict[int, float] = {}
    for step, weights in _deviations(plan, corrected=True):
        for row, value in weights.items():
            total[row] = total.get(row, 0.0) + float(calibration.influence[step]) * value
    return _over(calibration, total)


def _deviations(plan: PlanFile, corrected: bool) -> Iterator[tuple[int, dict[int, float]]]:
    """(skipped step, step -> weight): predicted minus true output; `corrected`: as hindsight leaves it in the end."""
    rows, computed, hindsight = dict(plan.plan.weights), plan.plan.computed, plan.method == "hindsight"
    for step in plan.plan.skipped:
        before, ahead = [k for k in computed if k < step][::-1], [k for k in computed if k > step]
        if hindsight and corrected and ahead:  # interpolated between the two ends of the gap
            along = (step - before[0]) / (ahead[0] - before[0])
            yield step, {before[0]: 1 - along, ahead[0]: along, step: -1.0}
        else:
            weights = order_one(step, before) if hindsight else rows.get(step, (1.0,))
            yield step, {**dict(zip(before, weights, strict=False)), step: -1.0}


def _over(calibration: Calibration, by_step: dict[int, float]) -> np.ndarray:
    vector = np.zeros(calibration.num_steps + 1)
    for step, value in by_step.items():
        vector[step] = value
    return vector


def gram_edges(calibration: Calibration, longest: int = LONGEST_GAP) -> dict[tuple[int, int], float]:
    """LeMiCa's graph in closed form: (i, j) -> change of the final latent when the steps between repeat output i.

    The mean over runs of the root mean square change of an entry; LeMiCa measures the mean absolute change in a run
    where later outputs respond to it (arXiv 2511.00090; `replay.measured_edges`).
    """
    steps, edges = calibration.num_steps, {}
    size = math.sqrt(math.prod(calibration.size))
    guided = calibration.grams
    for i in range(steps - 1):
        reach = min(i + longest, steps - 1)
        window = np.arange(i, reach + 1)
        inner = guided[:, window[:, None], window]
        vector = np.zeros(len(window))
        for j in range(i + 1, reach + 1):
            if j > i + 1:
                vector[0] += calibration.influence[j - 1]
                vector[j - 1 - i] -= calibration.influence[j - 1]
            edges[i, j] = float(np.sqrt(quadratic(vector, inner)).mean() / size)
    return edges


def plan_lemica(
    calibration: Calibration,
    budget: int,
    edges: Edges,
    *,
    objective: Objective = "lexminimax",
    gamma: float = 2.0,
    source: str = "",
) -> PlanFile:
    """LeMiCa's schedule for this model: the best path through `edges`, reused as published."""
    computed = best_path(edges, calibration.num_steps, budget, objective, gamma)
    return finished(calibration, PlanFile(Plan(calibration.num_steps, computed), "lemica", source=source))


def plan_hindsight(calibration: Calibration, budget: int) -> PlanFile:
    """Hindsight's own schedule for the calibrated noise levels, with the errors that the calibration expects of it.

    A starting point: the closed form knows nothing better (docs/research.md); what is better is found by trials
    (`refine`).

    Raises:
        ValueError: a budget below 2 or above the step count.
    """
    return finished(calibration, own_schedule(calibration, budget))


def own_schedule(calibration: Calibration, budget: int) -> PlanFile:
    """The same, nothing worked out of the calibration but the schedule; ValueError likewise."""
    return PlanFile(Hindsight(budget).plan(calibration.num_steps, calibration.levels or None), "hindsight")


def magcache_ratios(calibration: Calibration) -> Ratios:
    """Magnitude ratios of the transformer's output, mean over runs: for policy `MagCache(ratios=...)`.

    MagCache's authors measure the block stack's residual (`--magcache_calibration` does); this is of what the `output`
    boundary reuses.
    """

    def mean(column: int) -> dict[str, tuple[float, ...]]:
        tables = {
            b: np.mean([run.magnitude[b][:, column] for run in calibration.runs], 0) for b in calibration.branches
        }
        return {b: tuple(round(float(v), 5) for v in row) for b, row in tables.items()}

    source = f"calibrated on {len(calibration.runs)} run(s), outputs"
    return Ratios(calibration.num_steps, mean(0), calibration.model, mean(1), mean(2), source)


def plan_magcache(ratios: Ratios, budget: int, max_skips: int, retention: float) -> PlanFile:
    """MagCache's schedule of exactly `budget` computed steps: the smallest threshold that gives it.

    Args:
        ratios: published or calibrated.
        budget: computed steps.
        max_skips: K, most consecutive skipped steps.
        retention: share of the run computed at its start, in [0, 1].

    Raises:
        ValueError: no threshold gives this budget; the sentence names the nearest ones that are reached.
    """
    found: dict[int, PlanFile] = {}
    for thresh in np.geomspace(1e-5, 10.0, 800):
        plan = MagCache(float(thresh), max_skips, retention, ratios=ratios).plan()
        figures = (("magcache_thresh", float(thresh)),)
        found.setdefault(plan.budget, PlanFile(plan, "magcache", ratios.model, figures=figures, source=ratios.source))
    if budget not in found:
        near = sorted(sorted(found, key=lambda b: abs(b - budget))[:2])
        raise ValueError(
            f"with K = {max_skips} and retention {retention:g} no threshold makes MagCache compute {budget} of "
            f"{ratios.num_steps} steps; it reaches {' and '.join(map(str, near))}. Allow more (--magcache_K, "
            "--retention_ratio), or take one of those."
        )
    return found[budget]


def finished(calibration: Calibration, plan: PlanFile) -> PlanFile:
    """The plan with the calibration's key and its predicted errors."""
    guidance = calibration.guidance
    margin = None if guidance is None else (guidance * (1 - GUIDANCE_MARGIN), guidance * (1 + GUIDANCE_MARGIN))
    plan = replace(
        plan,
        model=calibration.model,
        scheduler=calibration.scheduler,
        shift=calibration.shift,
        timesteps=calibration.timesteps,
        guidance_range=margin,
        boundary="output",
        source=plan.source or f"planned from {len(calibration.runs)} calibrated run(s)",
    )
    errors = step_errors(calibration, plan).mean(1)
    total = plan_error(calibration, plan)
    worst = np.sort(total)[-max(1, len(total) // 4) :].mean()
    return replace(
        plan,
        errors=tuple((int(k), round(float(errors[k]), 6)) for k in plan.plan.skipped),
        figures=(
            *plan.figures,
            ("open_loop_error_mean", float(total.mean())),
            ("open_loop_error_worst_quarter", float(worst)),
        ),
    )
