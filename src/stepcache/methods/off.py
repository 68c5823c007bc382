"""No reuse at all: the uncached run, measured with the same instruments."""

from __future__ import annotations

from dataclasses import dataclass

from stepcache.core.follow_plan import FollowPlan
from stepcache.core.plan import Plan
from stepcache.core.strategy import Strategy
from stepcache.core.trajectory import Boundary, Trajectory


@dataclass(frozen=True)
class Off:
    """Every step computed."""

    boundary: Boundary = "output"

    def begin(self, run: Trajectory) -> Strategy:
        """Compute everything."""
        strategy = FollowPlan(Plan(run.num_steps, tuple(range(run.num_steps))))
        strategy.skips = False
        return strategy

    def __str__(self) -> str:
        return "uncached"
