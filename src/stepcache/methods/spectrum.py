"""Spectrum: forecasts by Chebyshev polynomials fitted to past outputs (arXiv 2603.01623).

With T_0 .. T_M at t = 2 s / S - 1 of step s, X the polynomials at the last computed steps, one row each:

    weights over their outputs = T(t)^T (X^T X + lambda I)^-1 X^T

blended with the line through the last two outputs: w of the first, 1 - w of the second. All of it is linear in the
outputs, so it is a plan with weights. The authors' schedule grows its gaps; here steps are spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from stepcache.core.follow_weights import FollowWeights
from stepcache.core.plan import Plan, check_budget, computed_steps, even
from stepcache.core.strategy import Strategy
from stepcache.core.trajectory import Boundary, Trajectory

Row = tuple[float, ...]
"""Weights over the computed outputs before a step, newest first."""


@dataclass(frozen=True)
class Spectrum:
    """Spectrum on evenly spread steps.

    Args:
        budget: computed steps, 2 or more, or a share of the run's steps, a float above 0 and up to 1.
        blend: w, share of the Chebyshev forecast, 0 to 1 (the authors: 0.5 to 1).
        boundary: "output" or "blocks".

    Raises:
        ValueError: a budget or blend out of range.
    """

    budget: float
    blend: float = 0.5
    boundary: Boundary = "output"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend is {self.blend:g}; expected 0 to 1.")

    def plan(self, num_steps: int) -> Plan:
        """Schedule and weights for `num_steps`; ValueError if the budget is larger."""
        return spectrum_weights(even(num_steps, computed_steps(self.budget, num_steps)), self.blend)

    def begin(self, run: Trajectory) -> Strategy:
        """Schedule and weights for the run's step count; ValueError if it does not fit."""
        schedule = even(run.num_steps, computed_steps(self.budget, run.num_steps)).including(run.handover)
        return FollowWeights(spectrum_weights(schedule, self.blend))

    def __str__(self) -> str:
        return f"spectrum (budget {self.budget:g}, w {self.blend:g})"


def spectrum_weights(plan: Plan, blend: float, degree: int = 4, ridge: float = 0.1, window: int = 10) -> Plan:
    """The schedule with Spectrum's weights.

    Args:
        plan: the schedule.
        blend: share w of the Chebyshev forecast.
        degree: M, the highest polynomial.
        ridge: lambda of the regression.
        window: most outputs it is fitted to.
    """

    def features(steps: list[int]) -> torch.Tensor:  # (steps, degree + 1)
        t = torch.tensor([2 * s / plan.num_steps - 1 for s in steps], dtype=torch.float64).clamp(-1, 1)
        return torch.cos(torch.arange(degree + 1) * torch.arccos(t)[:, None])

    def row(step: int, nodes: list[int]) -> Row:
        if len(nodes) < 2:
            return (1.0,)
        x = features(nodes[:window])
        weights = (
            blend
            * features([step])[0]
            @ torch.linalg.solve(x.T @ x + ridge * torch.eye(degree + 1, dtype=x.dtype), x.T)
        )
        weights[:2] += (1 - blend) * torch.tensor(line(step, nodes), dtype=weights.dtype)
        return tuple(weights.tolist())

    return with_rows(plan, row)


def line(step: int, nodes: list[int]) -> Row:
    """Weights of the line through the last two outputs."""
    along = (step - nodes[0]) / (nodes[0] - nodes[1])
    return (1 + along, -along)


def with_rows(plan: Plan, row: Callable[[int, list[int]], Row]) -> Plan:
    """The schedule with `row(step, computed steps before it, newest first)` as the weights of every skipped step."""
    before = {s: [k for k in plan.computed if k < s][::-1] for s in plan.skipped}
    return replace(plan, weights=tuple((s, row(s, nodes)) for s, nodes in before.items()))
