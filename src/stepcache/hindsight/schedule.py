"""Which steps are computed where nothing has been calibrated: one schedule for all models, in noise levels.

Schedules transfer between models by noise level, not by step index: the plans from calibrations of four small models
of different kinds agree, within one step or so, on steps that are evenly spaced in

    log((1 - sigma + CLEAN) / (sigma + NOISY)),

the logarithm of the signal-to-noise ratio, softened at both ends (docs/research.md, with each model left out in turn).
Even spacing in log-SNR is DPM-Solver's choice for its steps (arXiv 2206.00927).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from stepcache.core.plan import Plan, even, spread
from stepcache.core.trajectory import Trajectory

CLEAN, NOISY = 0.03, 0.5


def spaced(num_steps: int, budget: int, levels: Sequence[float] | None = None) -> Plan:
    """The schedule of `budget` computed steps, 2 or more, first and last among them; ValueError if it does not fit.

    `levels`: noise levels of the steps, falling, in [0, 1]; `None`: they are not known, and steps are even.
    """
    plan = even(num_steps, budget)
    if levels is None or len(levels) != num_steps:
        return plan
    places = [math.log((1 - level + CLEAN) / (level + NOISY)) for level in levels]
    places = list(itertools.accumulate(places, max))  # some samplers look ahead and come back
    if places[-1] <= places[0]:
        return plan
    gap, wanted, k = (places[-1] - places[0]) / (budget - 1), [0.0], 0
    while len(wanted) < budget - 1:  # where the line through `places` comes to the next place
        while places[k + 1] < (place := places[0] + gap * len(wanted)):
            k += 1
        wanted.append(k + (place - places[k]) / (places[k + 1] - places[k]))
    return Plan(num_steps, _steadied(spread([*wanted, num_steps - 1.0], num_steps)))


def noise_levels_of(run: Trajectory) -> list[float] | None:
    """Noise levels sigma of a run's steps, x = (1 - sigma) x_0 + sigma n but for a factor; `None`: not known."""
    if not run.timesteps:
        return None
    # Flow matching has timesteps 1000 sigma; other schedulers say by `alphas_cumprod` what a timestep means.
    clean, config = getattr(run.sampler, "alphas_cumprod", None), getattr(run.sampler, "config", {})
    if clean is None or config.get("use_flow_sigmas"):
        levels = [t / 1000 for t in run.timesteps]
        return levels if all(0 <= level <= 1.001 for level in levels) else None
    shares = [math.sqrt(float(clean[min(int(t), len(clean) - 1)])) for t in run.timesteps]
    return [(noise := math.sqrt(max(1 - a * a, 0.0))) / (a + noise) for a in shares]


def places_of(levels: Sequence[float]) -> list[float]:
    """Where steps stand along a run: their numbers, but where a noise level is evaluated again, as by Heun's method."""
    rank = {level: float(k) for k, level in enumerate(sorted({round(level, 5) for level in levels}, reverse=True))}
    return [rank[round(level, 5)] for level in levels]


def _steadied(computed: tuple[int, ...]) -> tuple[int, ...]:
    """The same gaps, sorted: growing up to the widest, shrinking from there; rounding leaves them irregular."""
    gaps = [b - a for a, b in itertools.pairwise(computed)]
    around = [sum(gaps[max(0, i - 1) : i + 2]) for i in range(len(gaps))]
    widest = around.index(max(around)) + 1
    return tuple(itertools.accumulate([*sorted(gaps[:widest]), *sorted(gaps[widest:])[::-1]], initial=0))
