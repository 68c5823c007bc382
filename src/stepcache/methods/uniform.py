"""Uniform reuse: every n-th step computed, the oldest schedule of all (FORA, arXiv 2407.01425, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from stepcache.core.follow_plan import FollowPlan
from stepcache.core.plan import Plan, check_budget, computed_steps, even
from stepcache.core.strategy import Strategy
from stepcache.core.trajectory import Boundary, Trajectory


@dataclass(frozen=True)
class Uniform:
    """Evenly spread computed steps, first and last among them.

    Args:
        budget: computed steps, 2 or more, or a share of the run's steps, a float above 0 and up to 1; or
        interval: every `interval`-th step (FORA's N) and the last. Give one of the two.
        boundary: where reuse is applied; FORA reuses inside the blocks, which is nearest to "blocks".

    Raises:
        ValueError: both or neither are given, or one is too small.
    """

    budget: float | None = None
    interval: int | None = None
    boundary: Boundary = "output"

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.interval is None):
            raise ValueError("Uniform takes a budget or an interval; give exactly one of them.")
        if self.budget is not None:
            check_budget(self.budget)
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval is {self.interval}; expected 1 (every step) or more.")

    def plan(self, num_steps: int) -> Plan:
        """The schedule for `num_steps`; ValueError if the budget is larger."""
        if self.interval is None:
            return even(num_steps, computed_steps(self.budget or 0, num_steps))
        return Plan(num_steps, tuple(sorted({*range(0, num_steps, self.interval), num_steps - 1})))

    def begin(self, run: Trajectory) -> Strategy:
        """The schedule for the run's step count; ValueError if it does not fit."""
        return FollowPlan(self.plan(run.num_steps).including(run.handover))

    def __str__(self) -> str:
        return f"uniform (budget {self.budget:g})" if self.budget else f"uniform (every {self.interval})"
