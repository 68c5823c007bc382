"""TaylorSeer: predict instead of repeat, by a Taylor series from finite differences (arXiv 2503.06923, equations 4-6).

At computed step a, after the computed step b before it, with F_0 the feature itself:

    F_(j+1)(a) = (F_j(a) - F_j(b)) / (a - b)                 j < order, as far as F_j(b) is known
    predicted at step s > a:  sum over j of F_j(a) (s - a)^j / j!

All of this is linear in the features of the last order + 1 computed steps, so it is a plan with weights. The authors
predict every attention and MLP output; here it is the transformer's output ("output") or block residual ("blocks"),
which needs a few latents of memory instead of hundreds of gigabytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepcache.core.follow_weights import FollowWeights
from stepcache.core.plan import Plan, check_budget, computed_steps, even
from stepcache.core.strategy import Strategy
from stepcache.core.trajectory import Boundary, Trajectory

Row = tuple[float, ...]
"""Coefficients over the computed features, newest first."""


@dataclass(frozen=True)
class TaylorSeer:
    """TaylorSeer at a fixed interval.

    Args:
        interval: every `interval`-th step is computed (the authors: 5 for Wan2.1 and HunyuanVideo, 6 for FLUX).
        order: highest difference used: 0 repeats, 1 extrapolates linearly (the authors' choice), 2 quadratically.
        first_enhance: steps computed at the start (1 for Wan2.1 and HunyuanVideo, 3 for FLUX); the last always is.
        boundary: "output" or "blocks".
        budget: computed steps, spread evenly, instead of an interval: plain extrapolation at any budget.
    """

    interval: int = 5
    order: int = 1
    first_enhance: int = 1
    boundary: Boundary = "output"
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_budget(self.budget)
            if (self.interval, self.first_enhance) != (5, 1):
                raise ValueError("TaylorSeer takes a budget, or an interval and first_enhance; give one of the two.")
        if self.interval < 1:
            raise ValueError(f"interval is {self.interval}; expected 1 (every step) or more.")
        if self.order not in (0, 1, 2):
            raise ValueError(f"order is {self.order}; expected 0, 1 or 2.")
        if self.first_enhance < 1:
            raise ValueError(f"first_enhance is {self.first_enhance}; expected 1 or more, the first step is computed.")

    def plan(self, num_steps: int) -> Plan:
        """Schedule and weights for `num_steps`."""
        if self.budget is not None:
            computed = even(num_steps, computed_steps(self.budget, num_steps)).computed
        else:
            last = min(self.first_enhance, num_steps) - 1
            every = range(last + self.interval, num_steps, self.interval)
            computed = tuple(sorted({*range(last + 1), *every, num_steps - 1}))
        weights = taylor_weights(computed, num_steps, self.order)
        return Plan(num_steps, computed, weights)

    def begin(self, run: Trajectory) -> Strategy:
        """Schedule and weights for the run's step count."""
        return FollowWeights(self.plan(run.num_steps))

    def __str__(self) -> str:
        spread = f"interval {self.interval}" if self.budget is None else f"budget {self.budget:g}"
        return f"taylorseer ({spread}, order {self.order})"


def taylor_weights(computed: tuple[int, ...], num_steps: int, order: int) -> tuple[tuple[int, Row], ...]:
    """(step, weights) of every reused step of a schedule, for a Taylor series of at most `order`."""
    weights: list[tuple[int, Row]] = []
    differences: list[Row] = []
    node = 0
    for step in range(num_steps):
        if step in computed:
            differences = _differences(differences, step - node, order)
            node = step
        else:
            terms = [(step - node) ** j / math.factorial(j) for j in range(len(differences))]
            row = tuple(sum(t * d[i] for t, d in zip(terms, differences, strict=True)) for i in range(len(differences)))
            weights.append((step, row))
    return tuple(weights)


def _differences(before: list[Row], gap: int, order: int) -> list[Row]:
    """F_0 .. F_order at a new computed step, from those at the one before, `gap` steps ago; rows of equal length."""
    width = min(len(before) + 1, order + 1)
    shifted = [(0.0, *row)[:width] for row in before]  # its features are now one place older
    new: list[Row] = [(1.0, *[0.0] * (width - 1))]
    for j in range(width - 1):
        new.append(tuple((a - b) / gap for a, b in zip(new[j], shifted[j], strict=True)))
    return new
