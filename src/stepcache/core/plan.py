"""Plan: which denoising steps are computed and how the others are predicted, as plain data.

A plan is known before the run starts, so it can be read, printed, checked, saved, shared and rebuilt for another step
count. Every method that decides beforehand (LeMiCa, MagCache, ...) is a function that returns one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from stepcache.core.trajectory import BOUNDARIES, Boundary, Trajectory
from stepcache.files import parse_document, read_text, write_atomically

Basis = Literal["branch", "guidance"]


BASES = ("branch", "guidance")


SCHEMA, SCHEMA_VERSION = "stepcache.plan", 2


@dataclass(frozen=True)
class Check:
    """How far a plan's predictions are trusted, measured anew at every computed step (see `selfcheck`).

    Args:
        bands: edges, in latent pixels, of the mean filters that split an increment into frequency bands, coarse first;
            each band has a gain of its own, and so has what the finest filter leaves. Empty: one gain for all.
        average: share of the last gain in the new one, in [0, 1).
        basis: "branch" (a gain for each branch), or "guidance" (for the difference of the two branches, which guidance
            multiplies, and for the unconditional one).

    Raises:
        ValueError: if any of this does not hold.
    """

    bands: tuple[int, ...] = (5,)
    average: float = 0.5
    basis: Basis = "guidance"

    def __post_init__(self) -> None:
        odd = all(type(edge) is int and edge >= 3 and edge % 2 for edge in self.bands)
        if not odd or any(a <= b for a, b in itertools.pairwise(self.bands)):
            raise ValueError(f"bands is {list(self.bands)}; expected odd edges of 3 or more, falling, such as 11, 5.")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; expected 0 or more and below 1.")
        if self.basis not in BASES:
            raise ValueError(f"basis is {self.basis!r}; expected one of {', '.join(BASES)}.")


@dataclass(frozen=True)
class HindsightSettings:
    """How a plan puts right what its predictions missed, once the next computed step shows it (see `hindsight`).

    The guided output follows the latent: a band of frequencies of it changes by feedback * (guidance scale - 1) /
    (1 - sigma) times the change of the latent there, sigma being the noise level of flow matching. A band that the
    noise has left has a feedback of 1: the unconditional branch then takes x / (1 - sigma) for the clip, so its output
    (x - clip) / sigma answers with -1 / (1 - sigma), and guidance multiplies that by 1 - scale.

    Args:
        feedback: one number a band and one for what the bands leave, coarse first, 0 or more; what a run begins with
            before it finds its own (`hindsight.Ledger`).
        bands: edges of the mean filters, in latent pixels, as of `Check`.
        knee: 1 - sigma below which the feedback falls in proportion to it, above 0.
        floor: least gain of the self-check where the feedback is known, in [0, 1]; less in wide gaps
            (`hindsight.WIDE`).

    Raises:
        ValueError: if any of this does not hold.
    """

    feedback: tuple[float, ...] = (1.0, 0.7)
    bands: tuple[int, ...] = (5,)
    knee: float = 0.12
    floor: float = 0.5

    def __post_init__(self) -> None:
        Check(self.bands)
        if len(self.feedback) != len(self.bands) + 1 or not all(0 <= f < math.inf for f in self.feedback):
            raise ValueError(
                f"feedback is {list(self.feedback)}; expected {len(self.bands) + 1} numbers of 0 or more, one a band."
            )
        if not 0 < self.knee <= 1 or not 0 <= self.floor <= 1:
            raise ValueError(f"knee {self.knee} and floor {self.floor}; expected shares of 1, the knee above 0.")


@dataclass(frozen=True)
class Plan:
    """A schedule with the weights that predict its reused steps.

    Args:
        num_steps: steps S of the denoising loop, at least 1.
        computed: strictly increasing indices in 0..S-1 at which the transformer is evaluated; step 0 is one of them.
        method: what made the plan, e.g. "lemica".
        model, shift, guidance, timesteps: what the plan was made for; `None` is "any".
        boundary: where reuse is applied, "output" or "blocks"; `None` leaves it to the run.
        weights: pairs (step, (w0, w1, ...)): that reused step is predicted as w0 * (last computed output) +
            w1 * (the one before) + ...; a reused step that is not named repeats the last output, weights (1.0,).
            With a check, computed steps have them too: what would have been predicted there is compared with what came.
        check: the self-check that damps the predictions towards reuse, if any.
        scheduler: the sampler's class name the plan was made for; `None` is "any".
        guidance_range: lowest and highest guidance scale the plan may be used at, where `guidance` is left open.
        errors: pairs (step, predicted root mean square error of the output there), from the calibration.
        hindsight: how computed steps put right what the reused ones before them missed, if they do.
        figures: pairs (name, value) of what was predicted or measured of the plan, e.g. ("psnr_mean", 38.1).
        source: where the figures come from.
        notes: what a reader should know, e.g. that the schedule was resampled.

    Raises:
        ValueError: if any of this does not hold; the sentence says what was expected.
    """

    num_steps: int
    computed: tuple[int, ...]
    method: str = "custom"
    model: str | None = None
    shift: float | None = None
    guidance: float | None = None
    timesteps: tuple[float, ...] | None = None
    boundary: Boundary | None = None
    weights: tuple[tuple[int, tuple[float, ...]], ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    check: Check | None = None
    scheduler: str | None = None
    guidance_range: tuple[float, float] | None = None
    errors: tuple[tuple[int, float], ...] = ()
    figures: tuple[tuple[str, float], ...] = ()
    hindsight: HindsightSettings | None = None

    def __post_init__(self) -> None:
        steps = self.computed
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps!r}; a plan needs a whole number of steps, at least 1.")
        if not isinstance(steps, tuple) or not all(type(k) is int for k in steps):
            raise ValueError(f"computed is {steps!r}; expected a tuple of step indices.")
        if not steps or steps[0] != 0:
            raise ValueError(f"computed is {list(steps)}; it must start with step 0, there is nothing to reuse before.")
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"computed is {list(steps)}; indices must increase strictly.")
        if steps[-1] >= self.num_steps:
            raise ValueError(
                f"computed names step {steps[-1]}, but a run of {self.num_steps} steps ends at {self.num_steps - 1}."
            )
        if self.boundary not in (None, *BOUNDARIES):
            raise ValueError(f"boundary is {self.boundary!r}; expected one of {', '.join(BOUNDARIES)}.")
        if self.timesteps is not None and len(self.timesteps) != self.num_steps:
            raise ValueError(f"{len(self.timesteps)} timesteps for {self.num_steps} steps; expected one a step.")
        for step, weights in self.weights:
            before = sum(k < step for k in steps)
            if not 0 < step < self.num_steps or (step in self.computed and self.check is None):
                raise ValueError(f"weights are given for step {step}, which is not a reused step of this plan.")
            if not 1 <= len(weights) <= before:
                raise ValueError(f"step {step} has {len(weights)} weights; {before} outputs are known by then.")
            if not all(math.isfinite(w) for w in weights):
                raise ValueError(f"step {step} has a weight that is not a finite number.")
        if self.guidance_range is not None and not self.guidance_range[0] <= self.guidance_range[1]:
            raise ValueError(f"guidance_range is {list(self.guidance_range)}; expected the lower end first.")

    @property
    def budget(self) -> int:
        """Number of computed steps, B."""
        return len(self.computed)

    @property
    def reused(self) -> tuple[int, ...]:
        """Indices of the steps that are predicted."""
        computed = set(self.computed)
        return tuple(k for k in range(self.num_steps) if k not in computed)

    @property
    def ideal_speedup(self) -> float:
        """S / B: the speed-up of the loop if reused steps cost nothing."""
        return self.num_steps / self.budget

    @property
    def history(self) -> int:
        """How many past outputs the plan's predictions reach back to, at least 1."""
        return max((len(w) for _, w in self.weights), default=1)

    def weights_at(self, step: int) -> tuple[float, ...]:
        """Weights of reused step `step` over the computed outputs, newest first."""
        return dict(self.weights).get(step, (1.0,))

    def timeline(self, width: int = 100) -> str:
        """The plan as two lines of text for the eye: computed steps as `█`, reused ones as `·`."""
        return "\n".join((timeline(self.num_steps, self.computed, width), self.describe()))

    def describe(self) -> str:
        """One line: method, model, counts, ideal speed-up."""
        name = f"{self.method} for {self.model}" if self.model else self.method
        return f"{name}: {self.budget} of {self.num_steps} steps computed, ideal speed-up {self.ideal_speedup:.2f}x"

    def __str__(self) -> str:
        return "\n".join((self.timeline(), *(f"note: {n}" for n in self.notes)))

    def fitted_to(self, run: Trajectory, *, resample: bool = False) -> Plan:
        """The plan itself if it was made for `run`; with `resample`, the plan made to fit, with a warning.

        Raises:
            ValueError: what the plan is for, what the run is, what to do.
        """
        differences = [
            f"{name} {mine} (the run: {theirs})"
            for name in ("model", "scheduler", "shift", "guidance", "boundary")
            if (mine := getattr(self, name)) is not None
            and (theirs := getattr(run, name)) is not None
            and not (math_close(mine, theirs) if isinstance(mine, float) else mine == theirs)
        ]
        if self.guidance_range and run.guidance is not None:
            low, high = self.guidance_range
            if not low <= run.guidance <= high:
                differences.append(f"guidance {low:g} to {high:g} (the run: {run.guidance:g})")
        if self.num_steps != run.num_steps:
            differences.insert(0, f"{self.num_steps} steps (the run: {run.num_steps})")
        elif self.timesteps and run.timesteps and not all(map(math_close, self.timesteps, run.timesteps)):
            differences.append("other timesteps than the run's")
        if not differences:
            return self
        what = f"this plan ({self.method}) was made for " + ", ".join(differences)
        if not resample:
            raise ValueError(
                f"{what}. Make one for this run, or use it all the same by resampling (resample=True, --resample)."
            )
        warnings.warn(f"{what}; used all the same because resampling was asked for.", stacklevel=2)
        fitted = replace(
            self,
            model=run.model,
            scheduler=run.scheduler,
            shift=run.shift,
            guidance=run.guidance,
            guidance_range=None,
            boundary=run.boundary,
            timesteps=None,
        )
        return fitted if self.num_steps == run.num_steps else fitted.resampled(run.num_steps)

    def resampled(self, num_steps: int, budget: int | None = None) -> Plan:
        """The schedule mapped through its normalised step position k / (S - 1) onto another step count or budget.

        `budget` defaults to the plan's own; it is kept exactly, first and last step included, and is at most
        `num_steps`. Weights belong to a step count: a plan with a check gets finite-difference ones, others repeat.

        Raises:
            ValueError: if the budget does not fit the step count.
        """
        budget = min(self.budget, num_steps) if budget is None else budget
        if not min(2, num_steps) <= budget <= num_steps:
            raise ValueError(
                f"a budget of {budget} does not fit {num_steps} steps; use {min(2, num_steps)} to {num_steps}."
            )
        scale = (num_steps - 1) / max(self.num_steps - 1, 1)
        computed = spread([k * scale for k in stretch(self.computed, budget)], num_steps)
        note = (
            f"resampled from {self.budget} of {self.num_steps} to {budget} of {num_steps} steps; no published figures"
        )
        return replace(
            self,
            num_steps=num_steps,
            computed=computed,
            weights=first_order(computed, num_steps) if self.check else (),
            timesteps=None,
            errors=(),
            figures=(),
            notes=(*self.notes, note),
        )

    def checked(self, check: Check | None = None) -> Plan:
        """The same schedule with first-order extrapolation under the self-check and hindsight, method "hindsight"."""
        weights = first_order(self.computed, self.num_steps)
        return replace(self, method="hindsight", weights=weights, check=check or Check(), hindsight=HindsightSettings())

    def extrapolated(self) -> Plan:
        """The same schedule with first-order extrapolation of the reused steps and no check, method "static"."""
        weights = tuple((k, w) for k, w in first_order(self.computed, self.num_steps) if k not in self.computed)
        return replace(self, method="static", weights=weights, check=None, hindsight=None)

    def to_json(self) -> str:
        """JSON text with the schema's name and version inside; `Plan.from_json` reads it back equal."""
        return json.dumps({"schema": SCHEMA, "version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read `to_json`'s text; ValueError if it is not a plan of a known version."""
        data = parse_document(text, SCHEMA, SCHEMA_VERSION)
        unknown = set(data) - {f.name for f in fields(cls)}
        if missing := {"num_steps", "computed"} - set(data):
            raise ValueError(f"not a valid plan: {' and '.join(sorted(missing))} is missing.")
        if unknown:
            raise ValueError(f"not a valid plan: it has unknown fields {', '.join(sorted(unknown))}.")
        try:
            for name in ("computed", "timesteps", "notes"):
                data[name] = tuple(data[name]) if data.get(name) is not None else cls.__dataclass_fields__[name].default
            data["weights"] = tuple((int(k), tuple(float(w) for w in ws)) for k, ws in data.get("weights") or ())
            for name in ("errors", "figures"):
                data[name] = tuple((key, float(value)) for key, value in data.get(name) or ())
            if data.get("guidance_range") is not None:
                low, high = data["guidance_range"]
                data["guidance_range"] = (float(low), float(high))
            for name, kind in (("check", Check), ("hindsight", HindsightSettings)):
                if (settings := data.get(name)) is not None:
                    lists = {k: tuple(v) for k, v in settings.items() if isinstance(v, list)}
                    data[name] = kind(**{**settings, **lists})
            return cls(**data)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a valid plan: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON, whole or not at all."""
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a plan.
        """
        text = read_text(path, "plan")
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"plan file {os.fspath(path)!r}: {error}") from error


def first_order(computed: tuple[int, ...], num_steps: int) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """(step, weights) of first-order extrapolation through the last two computed outputs, for every step but them.

    Weights (1 + c, -c) with c = (step - k1) / (k1 - k2), the newest output first; computed steps are named too.
    """
    nodes, rows = list(computed), []
    for step in range(nodes[1] + 1 if len(nodes) > 1 else num_steps, num_steps):
        last, before = [k for k in nodes if k < step][:-3:-1]
        c = (step - last) / (last - before)
        rows.append((step, (1 + c, -c)))
    return tuple(rows)


def timeline(num_steps: int, computed: tuple[int, ...], width: int = 100) -> str:
    """One mark a step, `█` computed and `·` reused, wrapped at `width` marks."""
    marks = "".join("█" if k in computed else "·" for k in range(num_steps))
    return "\n".join(marks[i : i + width] for i in range(0, num_steps, width))


def stretch(values: tuple[int, ...], count: int) -> list[float]:
    """`count` values read off the polygon through `values`, ends included."""
    if count == 1 or len(values) == 1:
        return [float(values[0])] + [float(values[-1])] * (count - 1)
    positions = [i * (len(values) - 1) / (count - 1) for i in range(count)]
    lower = [min(int(p), len(values) - 2) for p in positions]
    return [values[j] + (p - j) * (values[j + 1] - values[j]) for p, j in zip(positions, lower, strict=True)]


def spread(wanted: list[float], num_steps: int) -> tuple[int, ...]:
    """Distinct indices in 0..num_steps-1 near the rising positions `wanted`, the first at 0 and the last at the end."""
    count, chosen = len(wanted), [0]
    for i, position in enumerate(wanted[1:], start=1):
        latest = num_steps - (count - i)  # leave room for those still to come
        chosen.append(min(max(round(position), chosen[-1] + 1), latest))
    if count > 1:
        chosen[-1] = num_steps - 1
    return tuple(chosen)


def math_close(a: float, b: float) -> bool:
    """Equal to float32 precision, which is what schedulers keep."""
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b), 1.0)
