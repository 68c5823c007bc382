"""Plan files: a plan with what it was made for, as JSON, and the policy that follows it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from stepcache.core.plan import Plan, timeline
from stepcache.core.strategy import Strategy
from stepcache.core.trajectory import BOUNDARIES, Boundary, Trajectory
from stepcache.files import parse_document, read_text, write_atomically

PLAN_SCHEMA, PLAN_VERSION = "stepcache.plan", 3
Follower = Callable[[Plan, Trajectory, tuple[str, ...]], Strategy]
FOLLOWERS: dict[str, Follower] = {}
"""Method -> what follows its plans; "weights" follows those of all other methods (see `planning/__init__.py`)."""


@dataclass(frozen=True)
class PlanFile:
    """A plan, its method, and the runs it is for. It is a policy: `accelerate(pipe, PlanFile.load("plan.json"))`.

    Args:
        plan: schedule and weights.
        method: "hindsight" forecasts the guided output and corrects; any other applies the weights at the model call.
        model, shift, guidance, timesteps, scheduler: what the plan was made for; `None` is "any".
        guidance_range: lowest and highest guidance scale the plan may be used at, where `guidance` is left open.
        boundary: where reuse is applied.
        errors: pairs (step, predicted root mean square error of the output there), from the calibration.
        figures: pairs (name, value) of what was predicted or measured of the plan, e.g. ("psnr_mean", 38.1).
        source: where the figures come from.
        notes: what a reader should know, e.g. that the schedule was resampled.
        resample: let the plan run where it was not made for, with a warning; not part of the file.

    Raises:
        ValueError: if any of this does not hold; the sentence says what was expected.
    """

    plan: Plan
    method: str = "custom"
    model: str | None = None
    shift: float | None = None
    guidance: float | None = None
    guidance_range: tuple[float, float] | None = None
    timesteps: tuple[float, ...] | None = None
    scheduler: str | None = None
    boundary: Boundary = "output"
    errors: tuple[tuple[int, float], ...] = ()
    figures: tuple[tuple[str, float], ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    resample: bool = False

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary is {self.boundary!r}; expected one of {', '.join(BOUNDARIES)}.")
        if self.timesteps is not None and len(self.timesteps) != self.plan.num_steps:
            raise ValueError(f"{len(self.timesteps)} timesteps for {self.plan.num_steps} steps; expected one a step.")
        if self.guidance_range is not None and not self.guidance_range[0] <= self.guidance_range[1]:
            raise ValueError(f"guidance_range is {list(self.guidance_range)}; expected the lower end first.")
        if self.method == "hindsight" and (self.plan.weights or self.boundary != "output"):
            raise ValueError("a hindsight plan has a schedule only, at boundary output: its weights are the method's.")

    @property
    def budget(self) -> int:
        """Number of computed steps, B."""
        return self.plan.budget

    def begin(self, run: Trajectory) -> Strategy:
        """Check the plan against the run (ValueError) and follow it."""
        fitted = self.fitted_to(run)
        follow = FOLLOWERS.get(self.method) or FOLLOWERS["weights"]
        return follow(fitted.plan, run, fitted.notes)

    def fitted_to(self, run: Trajectory) -> PlanFile:
        """The plan itself if it was made for `run`; with `resample`, the plan made to fit, with a warning.

        Raises:
            ValueError: what the plan is for, what the run is, what to do.
        """
        differences = self._differences(run)
        if not differences:
            return self
        what = f"this plan ({self.method}) was made for " + ", ".join(differences)
        if not self.resample:
            alone = differences[0].split(" (")[0] if len(differences) == 1 else ""
            make = f"Run with {alone}, make" if alone.startswith("guidance") and " to " not in alone else "Make"
            raise ValueError(f"{what}. {make} one for this run, or use it all the same by resampling (resample=True).")
        warnings.warn(f"{what}; used all the same because resampling was asked for.", stacklevel=2)
        if self.plan.num_steps == run.num_steps:
            return replace(self, notes=(*self.notes, f"used outside of what it was made for: {', '.join(differences)}"))
        note = f"resampled from {self.plan.num_steps} to {run.num_steps} steps"
        plan = self.plan.resampled(run.num_steps)
        return replace(self, plan=plan, timesteps=None, errors=(), figures=(), notes=(*self.notes, note))

    def _differences(self, run: Trajectory) -> list[str]:
        """In words, how the run is not what the plan was made for."""
        found = [
            f"{name} {mine} (the run: {theirs})"
            for name in ("model", "scheduler", "shift", "guidance", "boundary")
            if (mine := getattr(self, name)) is not None
            and (theirs := getattr(run, name)) is not None
            and not (math_close(mine, theirs) if isinstance(mine, float) else mine == theirs)
        ]
        if self.guidance_range and run.guidance is not None:
            low, high = self.guidance_range
            if not low <= run.guidance <= high:
                found.append(f"guidance {low:g} to {high:g} (the run: {run.guidance:g})")
        if self.plan.num_steps != run.num_steps:
            found.insert(0, f"{self.plan.num_steps} steps (the run: {run.num_steps})")
        elif self.timesteps and run.timesteps and not all(map(math_close, self.timesteps, run.timesteps)):
            found.append("other timesteps than the run's")
        return found

    def describe(self) -> str:
        """One line: method, model, counts, ideal speed-up."""
        name = f"{self.method}, planned" + (f", for {self.model}" if self.model else "")
        plan = self.plan
        return f"{name}: {plan.budget} of {plan.num_steps} steps computed, ideal speed-up {plan.ideal_speedup:.2f}x"

    def text(self) -> str:
        """Timeline, one line, notes: for the eye."""
        lines = (timeline(self.plan.num_steps, self.plan.computed), self.describe())
        return "\n".join((*lines, *(f"note: {n}" for n in self.notes)))

    def __str__(self) -> str:
        return f"{self.method}, planned (budget {self.budget})"

    def document(self) -> dict[str, Any]:
        """What `save` writes."""
        fields = asdict(self)
        del fields["resample"]
        return {"schema": PLAN_SCHEMA, "version": PLAN_VERSION, **fields.pop("plan"), **fields}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.document(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], resample: bool = False) -> PlanFile:
        """Read `save`'s file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a plan, or one of another version.
        """
        text = read_text(path, "plan")
        try:
            return replace(_from_document(parse_document(text, PLAN_SCHEMA, PLAN_VERSION)), resample=resample)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"plan file {os.fspath(path)!r}: {error}") from error


def _from_document(data: dict[str, Any]) -> PlanFile:
    if missing := {"num_steps", "computed"} - set(data):
        raise ValueError(f"not a valid plan: {' and '.join(sorted(missing))} is missing.")
    weights = tuple((int(k), tuple(map(float, ws))) for k, ws in data.pop("weights", None) or ())
    plan = Plan(data.pop("num_steps"), tuple(data.pop("computed")), weights)
    known = set(PlanFile.__dataclass_fields__) - {"plan", "resample"}
    if unknown := set(data) - known:
        raise ValueError(f"not a valid plan: it has unknown fields {', '.join(sorted(unknown))}.")
    for name in ("timesteps", "notes"):
        if data.get(name) is not None:
            data[name] = tuple(data[name])
    for name in ("errors", "figures"):
        data[name] = tuple((key, float(value)) for key, value in data.get(name) or ())
    if data.get("guidance_range") is not None:
        low, high = data["guidance_range"]
        data["guidance_range"] = (float(low), float(high))
    return PlanFile(plan, **data)


def math_close(a: float, b: float) -> bool:
    """Equal to float32 precision, which is what schedulers keep."""
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b), 1.0)
