"""Which steps are computed where nothing has been calibrated: one schedule for all models, in noise levels.

Schedules travel between models by noise level, not by step index: the plans that calibrations of four small models of
different kinds lead to agree, within one step or so, on steps that are evenly spaced in

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
    """The schedule of `budget` computed steps, first and last among them.

    Args:
        num_steps: of the run.
        budget: computed steps, 2 or more.
        levels: noise levels of the steps, falling, in [0, 1]; `None`: they are not known, and steps are even.

    Raises:
        ValueError: a budget below 2, or above the step count.
    """
    plan = even(num_steps, budget)
    if levels is None or len(levels) != num_steps:
        return plan
    places = [math.log((1 - level + CLEAN) / (level + NOISY)) for level in levels]
    if places[-1] <= places[0] or any(b < a for a, b in itertools.pairwise(places)):
        return plan
    wanted = [places[0] + (places[-1] - places[0]) * i / (budget - 1) for i in range(budget)]
    computed = spread([_crossing(places, place) for place in wanted], num_steps)
    return Plan(num_steps, _steadied(computed))


def noise_levels_of(run: Trajectory) -> list[float] | None:
    """Noise levels sigma of a run's steps, x = (1 - sigma) x_0 + sigma n but for a factor; `None`: not known.

    Flow matching has timesteps 1000 sigma; other schedulers say by `alphas_cumprod` what a timestep means.
    """
    if not run.timesteps:
        return None
    clean, config = getattr(run.sampler, "alphas_cumprod", None), getattr(run.sampler, "config", {})
    if clean is None or config.get("use_flow_sigmas"):
        levels = [t / 1000 for t in run.timesteps]
        return levels if all(0 <= level <= 1.001 for level in levels) else None
    shares = [math.sqrt(float(clean[min(int(t), len(clean) - 1)])) for t in run.timesteps]
    return [(noise := math.sqrt(max(1 - a * a, 0.0))) / (a + noise) for a in shares]


def _crossing(places: list[float], wanted: float) -> float:
    """Where the rising line through `places` comes to `wanted`."""
    k = next((k for k in range(1, len(places) - 1) if places[k] >= wanted), len(places) - 1)
    rise = places[k] - places[k - 1]  # 0 where whole timesteps repeat
    return k - 1 + (min(max((wanted - places[k - 1]) / rise, 0.0), 1.0) if rise else 1.0)


def _steadied(computed: tuple[int, ...]) -> tuple[int, ...]:
    """The same gaps, growing up to the widest and shrinking from there: rounding leaves them to waver."""
    gaps = [b - a for a, b in itertools.pairwise(computed)]
    around = [sum(gaps[max(0, i - 1) : i + 2]) for i in range(len(gaps))]
    widest = around.index(max(around)) + 1
    steady = sorted(gaps[:widest]) + sorted(gaps[widest:], reverse=True)
    return tuple(itertools.accumulate(steady, initial=0))
