"""Follow a plan: decisions that were written down before the run."""

from __future__ import annotations

import torch

from stepcache.core.plan import Plan
from stepcache.core.strategy import Strategy


class FollowPlan(Strategy):
    """A computed step is evaluated; a skipped one reuses the last computed feature."""

    def __init__(self, plan: Plan, notes: tuple[str, ...] = ()) -> None:
        self.plan, self.notes = plan, notes
        self.schedule, self.history = frozenset(plan.computed), min(1, len(plan.skipped))

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return step in self.schedule
