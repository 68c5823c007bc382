"""What a budget is expected to cost: the trade-off curve of a calibration, in error and in dB."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import own_schedule, plan_error, plan_hindsight
from stepcache.planning.plan_file import PlanFile


@dataclass(frozen=True)
class Forecast:
    """What a budget is expected to cost: mean over runs of the final latent's relative error, and the PSNR it means.

    `psnr` is None where the calibration has no accelerated run to scale it.
    """

    budget: int
    error: float
    psnr: float | None
    plan: PlanFile


def forecasts(calibration: Calibration) -> list[Forecast]:
    """The trade-off curve error(B), for every budget from 3 on."""
    found = []
    for budget in range(3, calibration.num_steps + 1):
        plan = plan_hindsight(calibration, budget)
        error = dict(plan.figures)["open_loop_error_mean"]
        found.append(Forecast(budget, error, psnr_of(calibration, error), plan))
    return found


def psnr_of(calibration: Calibration, error: float) -> float | None:
    """PSNR in dB that an open-loop error of the final latent comes to; `None` if no accelerated run was made.

    Open loop ignores that later outputs respond to earlier errors. The calibration's accelerated run shows how
    much that matters: PSNR = its PSNR - 20 log10(error / open-loop error of its plan).
    """
    if error <= 0:
        return math.inf
    found = []
    for run in calibration.runs:
        alone = replace(calibration, runs=(run,))
        for budget, _, psnr in run.anchors:
            found.append(psnr + 20 * math.log10(float(plan_error(alone, own_schedule(alone, budget))[0]) / error))
    return float(np.mean(found)) if found else None


def knee(curve: list[Forecast]) -> Forecast:
    """Where the curve of log error over budget bends most: the point farthest below the chord of its ends."""
    usable = [f for f in curve if f.error > 0]
    if len(usable) < 3:
        return curve[-1]
    x = np.array([f.budget for f in usable], float)
    y = np.log([f.error for f in usable])
    chord = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    return usable[int(np.argmax(chord - y))]
