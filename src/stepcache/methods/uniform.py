"""Uniform reuse: every n-th step computed, the oldest schedule of all (FORA, arXiv 2407.01425, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from stepcache.core.cache import Decider, FollowPlan
from stepcache.core.plan import Plan, spread
from stepcache.core.trajectory import Boundary, Trajectory


@dataclass(frozen=True)
class Uniform:
    """Evenly spread computed steps, first and last among them.

    Args:
        budget: computed steps, 2 or more; or
        interval: every `interval`-th step (FORA's N) and the last. Give one of the two.
        boundary: where reuse is applied; FORA reuses inside the blocks, which is nearest to "blocks".
    """

    budget: int | None = None
    interval: int | None = None
    boundary: Boundary = "output"

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.interval is None):
            raise ValueError("Uniform takes a budget or an interval; give exactly one of them.")
        if self.budget is not None and self.budget < 2:
            raise ValueError(f"budget is {self.budget}; expected 2 or more, for the first and the last step.")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval is {self.interval}; expected 1 (every step) or more.")

    def plan(self, num_steps: int) -> Plan:
        """The schedule for `num_steps`; ValueError if the budget is larger."""
        if self.interval is not None:
            computed = tuple(sorted({*range(0, num_steps, self.interval), num_steps - 1}))
        else:
            budget = self.budget or 0
            if budget > num_steps:
                raise ValueError(f"a budget of {budget} does not fit {num_steps} steps; use at most {num_steps}.")
            computed = spread([i * (num_steps - 1) / (budget - 1) for i in range(budget)], num_steps)
        return Plan(num_steps, computed, "uniform", boundary=self.boundary)

    def begin(self, run: Trajectory) -> Decider:
        """The schedule for the run's step count."""
        return FollowPlan(self.plan(run.num_steps))

    def __str__(self) -> str:
        return f"uniform (budget {self.budget})" if self.budget else f"uniform (every {self.interval})"
