"""LeMiCa: the schedules its authors found as lexicographic minimax paths (arXiv 2511.00090) and published."""

from __future__ import annotations

from dataclasses import dataclass

from stepcache.core.follow_plan import FollowPlan
from stepcache.core.plan import Plan
from stepcache.core.strategy import Strategy
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.methods.lemica_schedules import SCHEDULES


@dataclass(frozen=True)
class LeMiCa:
    """A published LeMiCa schedule: the steps between its computed ones reuse the last one, as published.

    Args:
        budget: computed steps, one of the model's published budgets (or any, with `resample`).
        model: whose table, e.g. "wan2.1-t2v-1.3B"; `None`: that of the model that runs.
        resample: allow budgets and step counts that are not published (see `Plan.resampled`).
        boundary: "blocks", the residual of the block stack, as the published code reuses it; or "output".
    """

    budget: int = 25
    model: str | None = None
    resample: bool = False
    boundary: Boundary = "output"

    def plan(self, model: str | None = None, num_steps: int | None = None) -> Plan:
        """The schedule for `model` (default: this policy's) at `num_steps` (default: the published count).

        Raises:
            ValueError: model, budget or step count not published; the sentence lists what is.
        """
        return self._scheduled(model, num_steps)[0]

    def notes(self, model: str | None = None, num_steps: int | None = None) -> tuple[str, ...]:
        """What a reader should know of `plan`: that it was resampled. ValueError as `plan`."""
        return self._scheduled(model, num_steps)[1]

    def _scheduled(self, model: str | None, num_steps: int | None) -> tuple[Plan, tuple[str, ...]]:
        table, published, schedules = self._table(model)
        steps = published if num_steps is None else num_steps
        if not self.resample and (steps != published or self.budget not in schedules):
            raise ValueError(
                f"LeMiCa has no published schedule for {table} with {self.budget} of {steps} steps; "
                f"published are {', '.join(map(str, sorted(schedules)))} of {published} steps. "
                "Choose one of these, or ask for resampling (resample=True)."
            )
        nearest = min(schedules, key=lambda b: (abs(b - self.budget), -b))
        plan = Plan(published, schedules[nearest])
        if (self.budget, steps) == (nearest, published):
            return plan, ()
        note = f"resampled from {nearest} of {published} to {self.budget} of {steps} steps; no published figures"
        return plan.resampled(steps, self.budget), (note,)

    def _table(self, model: str | None) -> tuple[str, int, dict[int, tuple[int, ...]]]:
        name = model or self.model
        if name not in SCHEDULES:
            raise ValueError(
                f"LeMiCa has no published table for {name or 'this model'}; "
                f"name one (model=...) of {', '.join(SCHEDULES)}, or bring a plan of your own."
            )
        return name, *SCHEDULES[name]

    def begin(self, run: Trajectory) -> Strategy:
        """Take the table of the named model, else of the one that runs."""
        plan, notes = self._scheduled(self.model or run.model, run.num_steps)
        return FollowPlan(plan.including(run.handover), notes)

    def __str__(self) -> str:
        return f"lemica (budget {self.budget})"
