"""The setup of evidence: what is run, in what order, in how much time, and what is announced beforehand.

A folder of evidence is a benchmark's folder (`results.Folder`) with a calibration, plans, and `evidence.json` in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepcache.bench.meter import Result, run_once
from stepcache.bench.methods import Contender, parse_one
from stepcache.bench.results import REFERENCE
from stepcache.files import parse_document, read_text, write_atomically
from stepcache.measure.generation import Request
from stepcache.methods.presets import all_presets

SCHEMA, VERSION = "stepcache.evidence", 1
SPEEDUPS = (2.0, 2.5, 3.0, 4.0)
"""Ideal speed-ups of the rows; a budget is the steps over one of them."""
CALIBRATION_PROMPTS, MOST_PROMPTS, TRIALS = 4, 16, (16, 8, 4)
PLANNING_SHARE, PEERS_SHARE = 0.35, 0.15
"""Of the hours, at most, for schedules that are tried and for thresholds that are searched."""
SEARCHED_RUNS = 30
"""Runs that a search for a threshold takes."""


@dataclass(frozen=True)
class Setup:
    """What is run. Decided once, from the hours there are, and kept for every later session of the same folder.

    Args:
        budgets: computed steps, one for each of `SPEEDUPS` that the step count allows.
        methods: what is run on every prompt, beside the uncached run, as `stepcache.named` writes it.
        trials: schedules tried for each budget; 0: no planned rows.
        prompts: evaluated, in order, as far as the hours go.
        calibration: prompts on which schedules are tried.
        planned: plan files to be made, budget -> name in the folder.
    """

    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    trials: int
    prompts: tuple[str, ...]
    calibration: tuple[str, ...]
    planned: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Cost:
    """Seconds of an uncached run: its loop, and what is around it."""

    loop: float
    around: float
    steps: int

    def run(self, computed: float) -> float:
        """A run of so many computed steps."""
        return self.around + self.loop * computed / self.steps

    def prompt(self, methods: Iterable[str]) -> float:
        """A prompt, uncached and with every method."""
        return self.run(self.steps) + sum(self.run(computed_of(m, self.steps)) for m in methods)

    def planning(self, setup: Setup) -> float:
        """The calibration, and the trials of every budget."""
        runs, loops = len(setup.calibration), self.loop / self.steps
        return runs * self.run(self.steps) + setup.trials * runs * loops * sum(b for b, _ in setup.planned)

    def searching(self, methods: Iterable[str]) -> float:
        """Thresholds that are searched."""
        return sum(SEARCHED_RUNS * self.run(computed_of(m, self.steps)) for m in methods if "@" in m)


def computed_of(method: str, steps: int) -> float:
    """Steps that a method computes, as its name tells; all of them where it does not."""
    value = method.partition(":")[2].split(",")[0].lstrip("@")
    if method.startswith("plan:"):
        value = Path(value).stem.rpartition("-")[2]
    if method.startswith("taylorseer"):
        value = method.rpartition("budget=")[2]
    return min(float(value), steps) if value.replace(".", "", 1).isdigit() else float(steps)


def budgets_of(steps: int) -> tuple[int, ...]:
    """Computed steps for each of `SPEEDUPS`; ValueError where there are too few steps to skip any."""
    found = tuple(dict.fromkeys(b for speed in SPEEDUPS if (b := round(steps / speed)) >= 4))
    if not found:
        raise ValueError(
            f"a run of {steps} steps is too short: half of them would be {steps // 2}; expected 8 or more."
        )
    return found


def published(model: str | None, budgets: Sequence[int], steps: int) -> list[str]:
    """Methods whose figures were published for a model and step count: LeMiCa's lists, MagCache as recommended."""
    found = []
    for entry in all_presets():
        if entry.model != model or entry.steps != steps:
            continue
        if entry.method == "lemica":
            found += [f"lemica:{b}" for b in entry.budgets if b in budgets]
        elif entry.method == "magcache" and entry.budgets:
            found.append("magcache")
    return found


def another_sampler(scheduler: Any) -> str:
    """A sampler that the pipeline's own is not: see `peers.SAMPLERS`."""
    name = type(scheduler).__name__
    if "prediction_type" not in scheduler.config or scheduler.config.get("prediction_type") == "flow_prediction":
        return "unipc" if name.startswith("FlowMatch") else "euler"
    return "dpm++" if "DPMSolver" not in name else "ddim"


def decided(
    steps: int,
    own: Sequence[str],
    peers: Sequence[str],
    prompts: tuple[Sequence[str], Sequence[str]],
    cost: Cost,
    seconds: float | None,
) -> Setup:
    """What is run in so many seconds.

    Peers are left out first, then trials; prompts are as many as fit while it runs, but one at least.

    Args:
        steps: of an uncached run.
        own: methods beside those at the budgets: published ones, another sampler.
        peers: searches for installed peers' thresholds.
        prompts: for evaluation, and for calibration.
        cost: of runs.
        seconds: None: as many as it takes.

    Raises:
        ValueError: too few seconds for one prompt.
    """
    budgets = budgets_of(steps)
    rows = [f"{kind}:{b}" for b in budgets for kind in ("hindsight", "uniform", "spectrum", "steps")]
    rows += [f"taylorseer,budget={b}" for b in budgets]
    evaluated, calibrated = tuple(prompts[0][:MOST_PROMPTS]), tuple(prompts[1][:CALIBRATION_PROMPTS])
    bare = Setup(budgets, (*rows, *own), 0, evaluated, calibrated)
    least = cost.prompt(bare.methods) + 2 * cost.run(steps)
    if seconds is None:
        seconds = math.inf
    if seconds < least:
        raise ValueError(
            f"{seconds / 3600:.2g} hours are too few: one prompt with every method takes about {least / 3600:.2g}; "
            f"give --hours {math.ceil(100 * least / 3600) / 100:g} or more, a smaller size or fewer steps."
        )
    if cost.searching(peers) <= PEERS_SHARE * seconds:
        bare = Setup(budgets, (*bare.methods, *peers), 0, evaluated, calibrated)
    planned = tuple((b, f"plan-{b}.json") for b in budgets)
    for trials in TRIALS if calibrated else ():
        full = Setup(budgets, (*bare.methods, *(f"plan:{n}" for _, n in planned)), trials, *prompts_of(bare), planned)
        if cost.planning(full) <= PLANNING_SHARE * seconds:
            return full
    return bare


def prompts_of(setup: Setup) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of evaluation and calibration."""
    return setup.prompts, setup.calibration


def control(pipe: Any, request: Request) -> tuple[str | None, tuple[Result, Result]]:
    """Why nothing may be said of caches here, None if all is well; and two uncached runs.

    The uncached run is repeated, then made with all steps computed at the model's door and at the sampler's. Each must
    be bit for bit the first one.
    """
    steps = request.steps
    checks = (
        (REFERENCE, "two uncached runs differ: the model or its kernels are not deterministic on this machine"),
        (f"uniform:{steps}", "all steps computed at the model's door differ from the uncached run"),
        (f"hindsight:{steps}", "all steps computed at the sampler's door differ from the uncached run"),
    )
    truth = run_once(pipe, request, _contender(REFERENCE))
    runs = [run_once(pipe, request, _contender(method)) for method, _ in checks]
    for (method, says), found in zip(checks, runs, strict=True):
        if not (found.frames == truth.frames).all():
            return f"{says} (the row {method})", (truth, runs[0])
    return None, (truth, runs[0])


def _contender(method: str) -> Contender:
    found = parse_one(method)
    if not isinstance(found, Contender):
        raise ValueError(f"{method} has a threshold to be searched.")
    return found


def save_setup(path: Path, setup: Setup, key: Mapping[str, Any]) -> None:
    """Write what was decided, so that a later session goes on with it."""
    found = {"schema": f"{SCHEMA}.setup", "version": VERSION, "key": dict(key), **asdict(setup)}
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def load_setup(path: Path, key: Mapping[str, Any]) -> Setup:
    """What was decided in an earlier session.

    Raises:
        ValueError: it was of another model, setting or version.
    """
    found = parse_document(read_text(path, "evidence"), f"{SCHEMA}.setup", VERSION)
    known = found.pop("key")
    if other := [f"{n} {known.get(n)} (asked for: {value})" for n, value in key.items() if known.get(n) != value]:
        raise ValueError(f"{path.parent} holds evidence of {', '.join(other)}; choose another --out.")
    fields = {name: found[name] for name in Setup.__dataclass_fields__}
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Setup(**{**fields, **lists, "planned": tuple((int(b), str(n)) for b, n in fields["planned"])})
