"""What is decided before a run without any method: a plan made beforehand, or no reuse at all."""

from __future__ import annotations

from dataclasses import dataclass

from stepcache.core.cache import Decider, FollowPlan, Policy
from stepcache.core.plan import Plan
from stepcache.core.trajectory import Boundary, Trajectory


@dataclass(frozen=True)
class Fixed:
    """A plan that was made beforehand. `resample` lets it run where it was not made for, with a warning."""

    decided: Plan
    resample: bool = False

    @property
    def boundary(self) -> Boundary:
        """The plan's, else `output`."""
        return self.decided.boundary or "output"

    def begin(self, run: Trajectory) -> Decider:
        """Check the plan against the run."""
        return FollowPlan(self.decided.fitted_to(run, resample=self.resample))

    def __str__(self) -> str:
        return f"plan ({self.decided.method})"


@dataclass(frozen=True)
class Off:
    """Every step computed: the uncached run, measured with the same instruments."""

    boundary: Boundary = "output"

    def begin(self, run: Trajectory) -> Decider:
        """Compute everything."""
        return FollowPlan(Plan(run.num_steps, tuple(range(run.num_steps)), method="none"))

    def __str__(self) -> str:
        return "uncached"


def as_policy(policy: Policy | Plan) -> Policy:
    """A plan as the policy that follows it; a policy as itself."""
    if isinstance(policy, Plan):
        return Fixed(policy)
    if not hasattr(policy, "begin"):
        raise TypeError(f"{policy!r} is not a policy; expected for example LeMiCa(budget=25) or a Plan.")
    return policy
