"""Which steps are computed where nothing has been calibrated: a schedule in noise levels.

Schedules travel between models by noise level, not by step index. The density of computed steps that plans of small
trained models of different kinds agree on (docs/research.md) is, nearly enough, half that of the sampler's own steps
and half one that falls as 1 / sqrt(1 - t) from pure noise (t = 1) on: computed steps are evenly spaced in

    (1 - SHARE) * k / (S - 1)  +  SHARE * sqrt(1 - t_k), scaled to [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

from stepcache.core.plan import Plan, even, spread

SHARE = 0.5
"""Of the density that falls from pure noise on; 0 is even steps."""


def spaced(num_steps: int, budget: int, timesteps: Sequence[float] | None = None) -> Plan:
    """The schedule of `budget` computed steps, first and last among them.

    Args:
        num_steps: of the run.
        budget: computed steps, 2 or more.
        timesteps: of the run, falling, out of 1000 or out of 1; `None`: they are not known, and steps are even.

    Raises:
        ValueError: a budget below 2, or above the step count.
    """
    if timesteps is None or len(timesteps) != num_steps or num_steps < 2:
        return even(num_steps, budget)
    whole = 1000.0 if timesteps[0] > 2 else 1.0
    roots = [max(1 - t / whole, 0.0) ** 0.5 for t in timesteps]
    span = roots[-1] - roots[0]
    if not span > 0:
        return even(num_steps, budget)
    places = [(1 - SHARE) * k / (num_steps - 1) + SHARE * (root - roots[0]) / span for k, root in enumerate(roots)]
    even(num_steps, budget)  # or the error that says what is wrong with the budget
    return Plan(num_steps, spread([_crossing(places, i / (budget - 1)) for i in range(budget)], num_steps))


def _crossing(places: list[float], wanted: float) -> float:
    """Where the rising line through `places` comes to `wanted`."""
    k = next((k for k in range(1, len(places) - 1) if places[k] >= wanted), len(places) - 1)
    rise = places[k] - places[k - 1]
    return k - 1 + (min(max((wanted - places[k - 1]) / rise, 0.0), 1.0) if rise > 0 else 1.0)
