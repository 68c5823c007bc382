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

import torch

from stepcache.bench.meter import Result, run_once
from stepcache.bench.methods import Contender, parse_one
from stepcache.bench.results import REFERENCE
from stepcache.bench.suite import duration
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
        if not setup.planned:
            return 0.0
        runs, loops = len(setup.calibration), self.loop / self.steps
        return runs * self.run(self.steps) + setup.trials * runs * loops * sum(b for b, _ in setup.planned)

    def control(self) -> float:
        """Four runs with all steps computed."""
        return 4 * self.run(self.steps)

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
    hours: float | None,
    spent: float = 0.0,
) -> Setup:
    """What is run in so many hours.

    Peers are left out first, then trials; prompts are as many as fit while it runs, but one at least.

    Args:
        steps: of an uncached run.
        own: methods beside those at the budgets: published ones, another sampler.
        peers: searches for installed peers' thresholds.
        prompts: for evaluation, and for calibration.
        cost: of runs.
        hours: there are; None: as many as it takes.
        spent: seconds of them that are over.

    Raises:
        ValueError: too few hours for one prompt.
    """
    budgets = budgets_of(steps)
    rows = [f"{kind}:{b}" for b in budgets for kind in ("hindsight", "uniform", "spectrum", "steps")]
    rows += [f"taylorseer,budget={b}" for b in budgets]
    evaluated, calibrated = tuple(prompts[0][:MOST_PROMPTS]), tuple(prompts[1][:CALIBRATION_PROMPTS])
    bare = Setup(budgets, (*rows, *own), 0, evaluated, calibrated)
    least = cost.control() + cost.prompt(bare.methods)
    seconds = math.inf if hours is None else 3600 * hours - spent
    if hours is not None and seconds < least:
        raise ValueError(
            f"--hours {hours:g} are too few: loading the model, a control, and one prompt with every method take about "
            f"{duration(spent + least)}; give --hours {math.ceil(100 * (spent + least) / 3600) / 100:g} or more, a "
            "smaller size or fewer steps."
        )
    seconds -= least
    if cost.searching(peers) <= PEERS_SHARE * seconds:
        bare = Setup(budgets, (*bare.methods, *peers), 0, evaluated, calibrated)
    planned = tuple((b, f"plan-{b}.json") for b in budgets)
    for trials in TRIALS if calibrated else ():
        methods = (*bare.methods, *(f"plan:{name}" for _, name in planned))
        full = Setup(budgets, methods, trials, evaluated, calibrated, planned)
        if cost.planning(full) <= PLANNING_SHARE * seconds:
            return full
    return bare


def control(pipe: Any, request: Request) -> tuple[str | None, tuple[Result, Result]]:
    """Why nothing may be said of caches here, None if all is well; and two uncached runs.

    The uncached run is repeated, then made with all steps computed, at the model's call and at the sampler's step.
    Latents after every step and frames must be bit for bit those of the first one.
    """
    steps = request.steps
    checks = (
        (REFERENCE, "two uncached runs differ: the model or its kernels are not deterministic on this machine"),
        (f"uniform:{steps}", "all steps computed at the model's call differ from the uncached run"),
        (f"hindsight:{steps}", "all steps computed at the sampler's step differ from the uncached run"),
    )
    truth = run_once(pipe, request, _contender(REFERENCE))
    runs = [run_once(pipe, request, _contender(method)) for method, _ in checks]
    if not all(bool(x.isfinite().all()) for x in truth.latents):
        return "the uncached run's latents are not finite", (truth, runs[0])
    for (method, says), found in zip(checks, runs, strict=True):
        if not _equal(truth, found):
            return f"{says} (the row {method})", (truth, runs[0])
    return None, (truth, runs[0])


def _equal(a: Result, b: Result) -> bool:
    """Bit for bit: latents after every step, and frames."""
    return (
        len(a.latents) == len(b.latents)
        and all(torch.equal(x, y) for x, y in zip(a.latents, b.latents, strict=True))
        and bool((a.frames == b.frames).all())
    )


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
        ValueError: it was of another model, machine, setting or version, or the file is damaged.
    """
    try:
        found = parse_document(read_text(path, "evidence"), f"{SCHEMA}.setup", VERSION)
        known = dict(found.pop("key"))
        fields = {name: found[name] for name in Setup.__dataclass_fields__}
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        setup = Setup(**{**fields, **lists, "planned": tuple((int(b), str(n)) for b, n in fields["planned"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error}); choose another --out.") from error
    if other := [f"{n} {known.get(n)} (here: {value})" for n, value in key.items() if known.get(n) != value]:
        raise ValueError(f"{path.parent} holds evidence of {', '.join(other)}; choose another --out.")
    return setup
