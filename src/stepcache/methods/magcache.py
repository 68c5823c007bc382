"""MagCache: reuse while the residual's magnitude is known to drift little (arXiv 2506.09045, section 3).

The ratio gamma_i = mean over tokens of |r_i| / |r_(i-1)| of the block stack's residual r hardly depends on the prompt,
so the drift since the last computed step is known beforehand, and MagCache compiles to a plan.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from stepcache.core.follow_plan import FollowPlan
from stepcache.core.plan import Plan
from stepcache.core.strategy import Call, Strategy
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.files import parse_document, read_text, write_atomically
from stepcache.methods.magcache_ratios import RATIOS, RECOMMENDED, SOURCES, WHOLE_FIRST_EXPERT

Interpolation = Literal["product", "nearest"]


RATIOS_SCHEMA, RATIOS_VERSION = "stepcache.magcache_ratios", 1


@dataclass(frozen=True)
class Ratios:
    """Magnitude ratios of a model: one tuple of `num_steps` numbers a branch, the first being padding (1.0).

    `std` (spread over tokens) and `cosine_distance` (1 - cosine of r_i and r_(i-1)) tell how far to trust them.
    """

    num_steps: int
    branches: dict[str, tuple[float, ...]]
    model: str | None = None
    std: dict[str, tuple[float, ...]] = field(default_factory=dict)
    cosine_distance: dict[str, tuple[float, ...]] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        if not self.branches:
            raise ValueError("there are no ratios; expected one list a branch, named for example cond and uncond.")
        for name, values in self.branches.items():
            if len(values) != self.num_steps:
                raise ValueError(
                    f"branch {name} has {len(values)} ratios; expected one for each of {self.num_steps} steps."
                )
            if not all(math.isfinite(v) and v > 0 for v in values):
                raise ValueError(f"branch {name} has a ratio that is not a positive number.")

    def at(self, num_steps: int, interp: Interpolation) -> Ratios:
        """The ratios for another step count.

        "product" keeps the running product P(k) = gamma_1 ... gamma_k as a function of the normalised step position
        k / (S - 1), so that the drift between two noise levels stays what was measured. "nearest" takes the ratio of
        the nearest step, as the original script does: too little drift at fewer steps, too much at more.
        """
        if num_steps == self.num_steps:
            return self
        resample = {"product": _keep_product, "nearest": _take_nearest}[interp]
        branches = {name: resample(values, num_steps) for name, values in self.branches.items()}
        return Ratios(num_steps, branches, self.model, source=f"{self.source} ({interp}, from {self.num_steps} steps)")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        document = {"schema": RATIOS_SCHEMA, "version": RATIOS_VERSION, **asdict(self)}
        write_atomically(path, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ratios:
        """Read `save`'s file; FileNotFoundError or ValueError, naming the file."""
        text = read_text(path, "ratios")
        try:
            data = parse_document(text, RATIOS_SCHEMA, RATIOS_VERSION)
            for name in ("branches", "std", "cosine_distance"):
                data[name] = {k: tuple(map(float, v)) for k, v in data.get(name, {}).items()}
            return cls(**data)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"ratios file {os.fspath(path)!r}: {error}") from error


def _keep_product(ratios: tuple[float, ...], num_steps: int) -> tuple[float, ...]:
    logs = [0.0]
    for ratio in ratios[1:]:
        logs.append(logs[-1] + math.log(ratio))
    last = len(ratios) - 1
    positions = [k * last / max(num_steps - 1, 1) for k in range(num_steps)]
    lower = [min(int(p), max(last - 1, 0)) for p in positions]
    drift = [logs[j] + (p - j) * (logs[min(j + 1, last)] - logs[j]) for p, j in zip(positions, lower, strict=True)]
    return (1.0, *(math.exp(b - a) for a, b in itertools.pairwise(drift)))


def _take_nearest(ratios: tuple[float, ...], num_steps: int) -> tuple[float, ...]:
    if num_steps == 1:
        return ratios[-1:]
    scale = (len(ratios) - 1) / (num_steps - 1)
    return tuple(ratios[round(k * scale)] for k in range(num_steps))


def skip_schedule(
    ratios: Ratios,
    thresh: float,
    max_skips: int,
    retention: float,
    handover: int | None = None,
    whole_first: bool = False,
) -> tuple[int, ...]:
    """Computed steps by the paper's recursion (Algorithm 1), branch after branch as the original script counts calls.

    Branch b of step s is call i = s * branches + b. The first int(calls * retention) calls are computed. After that,
    since the last computed step, rho *= gamma, n += 1, E += |1 - rho|; the branch may be skipped while E < thresh
    and n <= max_skips. A step is skipped if all its branches may be (with published ratios they agree), and computed
    if it is the first or the last. Where a second transformer takes over (`handover`), its calls have a retention
    window of their own, as in the authors' script for Wan2.2; `whole_first`: and all of the first one's are computed.
    """
    branches = list(ratios.branches.values())
    calls, split = len(branches) * ratios.num_steps, len(branches) * (handover or ratios.num_steps)
    first, second = split if whole_first else int(split * retention), (calls - split) * retention + split
    rho, count, error = [1.0] * len(branches), [0] * len(branches), [0.0] * len(branches)
    computed = []
    for step in range(ratios.num_steps):
        skip = 0 < step < ratios.num_steps - 1
        for b, values in enumerate(branches):
            call = step * len(branches) + b
            if call < first or split <= call <= second:
                skip = False
                continue
            rho[b] *= values[step]
            count[b] += 1
            error[b] += abs(1 - rho[b])
            skip = skip and error[b] < thresh and count[b] <= max_skips
        if not skip:
            computed.append(step)
            rho, count, error = [1.0] * len(branches), [0] * len(branches), [0.0] * len(branches)
    return tuple(computed)


@dataclass(frozen=True)
class MagCache:
    """MagCache from published or calibrated ratios.

    Args:
        magcache_thresh: accumulated drift that ends a stretch of reuse; `None`: what the authors recommend, else 0.12.
        magcache_K: most consecutive skipped steps; `None`: recommended, else 2.
        retention_ratio: share of the run computed at its start, in [0, 1]; `None`: recommended, else 0.2.
        model: whose published ratios; `None`: those of the model that runs.
        ratios: calibrated ratios instead of published ones.
        interp: how ratios of another step count are brought to the run's (see `Ratios.at`). `None`: "product" for
            published ratios, an error for calibrated ones, which are better calibrated anew.
        boundary: "blocks" as published, or "output".
    """

    magcache_thresh: float | None = None
    magcache_K: int | None = None
    retention_ratio: float | None = None
    model: str | None = None
    ratios: Ratios | None = None
    interp: Interpolation | None = None
    boundary: Boundary = "output"

    def __post_init__(self) -> None:
        if self.magcache_thresh is not None and not self.magcache_thresh >= 0:
            raise ValueError(f"magcache_thresh is {self.magcache_thresh}; expected 0 or more, for example 0.12.")
        if self.magcache_K is not None and self.magcache_K < 0:
            raise ValueError(f"magcache_K is {self.magcache_K}; expected 0 or more steps.")
        if self.retention_ratio is not None and not 0 <= self.retention_ratio <= 1:
            raise ValueError(f"retention_ratio is {self.retention_ratio}; expected a share between 0 and 1.")
        if self.interp not in (None, "product", "nearest"):
            raise ValueError(f"interp is {self.interp!r}; expected product or nearest.")

    def plan(self, model: str | None = None, num_steps: int | None = None, handover: int | None = None) -> Plan:
        """Compile to a plan; `handover`: first step of a second transformer (Wan2.2).

        Raises:
            ValueError: no ratios for the model, or calibrated ones of another step count without `interp`.
        """
        return self._compiled(model, num_steps, handover)[0]

    def notes(self, model: str | None = None, num_steps: int | None = None) -> tuple[str, ...]:
        """What a reader should know of `plan`: that its ratios are of another step count. ValueError as `plan`."""
        return self._compiled(model, num_steps, None)[1]

    def _compiled(self, model: str | None, num_steps: int | None, handover: int | None) -> tuple[Plan, tuple[str, ...]]:
        name = model or self.model
        ratios = self.ratios or self._published(name)
        steps = ratios.num_steps if num_steps is None else num_steps
        notes: tuple[str, ...] = ()
        if steps != ratios.num_steps:
            if self.ratios is not None and self.interp is None:
                raise ValueError(
                    f"the ratios were calibrated for {ratios.num_steps} steps and the run has {steps}; "
                    "calibrate at that step count, or choose an interpolation (interp=...)."
                )
            interp = self.interp or "product"
            notes = (f"ratios of {ratios.num_steps} steps brought to {steps} ({interp})",)
            ratios = ratios.at(steps, interp)
        thresh, max_skips, retention = self.settings(name)
        computed = skip_schedule(ratios, thresh, max_skips, retention, handover, name in WHOLE_FIRST_EXPERT)
        return Plan(steps, computed), notes

    def settings(self, model: str | None) -> tuple[float, int, float]:
        """Threshold, K and retention ratio: as given, else as recommended for the model."""
        given = (self.magcache_thresh, self.magcache_K, self.retention_ratio)
        thresh, max_skips, retention = RECOMMENDED.get(model or "", (0.12, 2, 0.2))
        return (
            thresh if given[0] is None else given[0],
            max_skips if given[1] is None else given[1],
            retention if given[2] is None else given[2],
        )

    @staticmethod
    def _published(name: str | None) -> Ratios:
        if name not in RATIOS:
            near = [n for n in RATIOS if name and n.startswith(name)] or list(RATIOS)
            raise ValueError(
                f"MagCache has no published ratios for {name or 'this model'}; name one (model=...) of "
                f"{', '.join(near)}, or calibrate and pass the ratios file."
            )
        branches = dict(zip(("cond", "uncond"), RATIOS[name], strict=False))
        return Ratios(len(branches["cond"]), branches, name, source=SOURCES[name])

    def begin(self, run: Trajectory) -> Strategy:
        """Compile for the run."""
        measured = self.ratios.model if self.ratios else None
        if not self.model and measured and run.model and measured != run.model:
            raise ValueError(
                f"the ratios were calibrated on {measured} and the run is {run.model}; "
                "calibrate this model, or name model=... to use them all the same."
            )
        return FollowPlan(*self._compiled(self.model or measured or run.model, run.num_steps, run.handover))

    def __str__(self) -> str:
        thresh, max_skips, _ = self.settings(self.model)
        return f"magcache (thresh {thresh:g}, K {max_skips})"


class MagCacheCalibration:
    """Measures the ratios: every step is computed, and the magnitudes of the residual are recorded.

    One run is enough (the authors' ratios come from one prompt); over several, `ratios` gives the mean.
    """

    boundary: Boundary = "blocks"

    def __init__(self) -> None:
        self._runs: list[_CalibrationRun] = []

    def begin(self, run: Trajectory) -> Strategy:
        """Measure one more run."""
        self._runs.append(_CalibrationRun(run))
        return self._runs[-1]

    def ratios(self) -> Ratios:
        """The mean over all complete runs of the last run's step count; ValueError if there is none."""
        runs = [r for r in self._runs if r.complete and r.run.num_steps == self._runs[-1].run.num_steps]
        if not runs:
            raise ValueError("no complete run was measured; let one generation run to its end first.")
        tables = [r.table() for r in runs]
        names = [n for n in tables[0] if all(n in t for t in tables)]

        def mean(column: int) -> dict[str, tuple[float, ...]]:
            return {
                n: tuple(
                    round(sum(t[n][k][column] for t in tables) / len(tables), 5) for k in range(runs[0].run.num_steps)
                )
                for n in names
            }

        run = runs[-1].run
        source = f"calibrated on {len(runs)} run(s)"
        return Ratios(run.num_steps, mean(0), run.model, mean(1), mean(2), source)

    def __str__(self) -> str:
        return "magcache calibration"


class _CalibrationRun(Strategy):
    """Residual magnitudes of one run, per branch: (ratio, its spread over tokens, 1 - cosine)."""

    history = 0
    skips = False

    def __init__(self, run: Trajectory) -> None:
        self.run = run
        self._last: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[torch.Tensor]] = {}

    @property
    def complete(self) -> bool:
        return any(len(rows) == self.run.num_steps for rows in self._rows.values())

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return True

    def feature(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        residual = output.detach().float() - (0 if self.run.boundary == "blocks" else x.detach().float())
        before = self._last.get(call.branch)
        row = torch.tensor([1.0, 0.0, 0.0])
        if before is not None and before.shape == residual.shape:
            ratio = residual.norm(dim=-1) / before.norm(dim=-1)
            cosine = torch.cosine_similarity(residual, before, dim=-1)
            row = torch.stack([ratio.mean(), ratio.std(), 1 - cosine.mean()]).cpu()
        self._rows.setdefault(call.branch, []).append(row)
        if call.last:
            self._last.pop(call.branch, None)
        else:
            self._last[call.branch] = residual
        return None

    def release(self) -> None:
        self._last.clear()

    def tensors(self) -> list[torch.Tensor]:
        return list(self._last.values())

    def table(self) -> dict[str, list[list[float]]]:
        complete = {n: rows for n, rows in self._rows.items() if len(rows) == self.run.num_steps}
        return {name: [row.tolist() for row in rows] for name, rows in complete.items()}
