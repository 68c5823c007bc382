"""Hindsight: first-order extrapolation of the transformer's output, believed as far as a self-check bears it out.

Extrapolating the output through the last two computed ones is closer than repeating it on some prompts; on others
multistep samplers become unstable under it. The self-check (`stepcache.selfcheck`) measures at every computed step how
much of the predicted change came true and damps the next predictions accordingly, at no extra evaluation.

Nothing here needs a calibration; one gives a better schedule (`stepcache plan`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from stepcache.core.cache import Decider, FollowPlan
from stepcache.core.plan import Check, Plan
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.methods.lemica import LeMiCa
from stepcache.methods.uniform import Uniform

Schedule = Literal["uniform", "published"]


@dataclass(frozen=True)
class Hindsight:
    """Self-checked extrapolation on a schedule that needs no calibration.

    Args:
        budget: computed steps, 2 or more; of fewer than 3 nothing can be extrapolated.
        schedule: "uniform", or "published": LeMiCa's list for the model that runs, at one of its budgets.
        check: settings of the self-check.
        boundary: "output" (recommended), or "blocks".

    Raises:
        ValueError: a budget below 2 or an unknown schedule.
    """

    budget: int = 25
    schedule: Schedule = "uniform"
    check: Check = field(default_factory=Check)
    boundary: Boundary = "output"

    def __post_init__(self) -> None:
        if self.schedule not in ("uniform", "published"):
            raise ValueError(f"schedule is {self.schedule!r}; expected uniform or published.")
        Uniform(self.budget)

    def plan(self, num_steps: int, model: str | None = None) -> Plan:
        """The plan for `num_steps`; ValueError if the budget is larger, or not published for the model."""
        return self._scheduled(num_steps, model).checked(self.check)

    def begin(self, run: Trajectory) -> Decider:
        """Schedule and weights for the run's step count."""
        return FollowPlan(replace(self.plan(run.num_steps, run.model), boundary=run.boundary))

    def _scheduled(self, num_steps: int, model: str | None) -> Plan:
        if self.schedule == "published":
            return LeMiCa(self.budget, boundary=self.boundary).plan(model, num_steps)
        return Uniform(self.budget, boundary=self.boundary).plan(num_steps)

    def __str__(self) -> str:
        return f"hindsight (budget {self.budget}, {self.schedule})"
