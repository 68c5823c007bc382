"""Plans that are measured: try schedules on the calibration prompts and keep the best on the worst quarter of them.

An uncached run does not tell which of two schedules of one budget is better (docs/research.md): later outputs
respond to earlier errors. So the schedule and its neighbours, one computed step moved by one, are run on the
calibrated prompts, and the best on the worst quarter of the prompts is taken. The mean alone would choose schedules
that fail on single prompts.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stepcache.core.plan import Plan
from stepcache.files import parse_document, read_text, write_atomically
from stepcache.hosts.diffusers import accelerate
from stepcache.planning.plan_file import PlanFile

REFINEMENT_SCHEMA, REFINEMENT_VERSION = "stepcache.refinement", 1


@dataclass(frozen=True)
class Trial:
    """A schedule and the relative errors of the final latents it led to, one a prompt."""

    computed: tuple[int, ...]
    errors: tuple[float, ...]

    @property
    def score(self) -> float:
        """Signal-to-noise ratio in dB, the mean of the worst quarter of the prompts: higher is better."""
        decibels = np.sort([-20 * np.log10(max(error, 1e-12)) for error in np.nan_to_num(self.errors, nan=1e12)])
        return float(decibels[: max(1, len(decibels) // 4)].mean())


def refine(
    pipe: Any,
    plan: PlanFile,
    truths: dict[tuple[str, int], torch.Tensor],
    sample: Callable[[str, int], torch.Tensor],
    trials: int,
    *,
    known: tuple[Trial, ...] = (),
    save: Callable[[tuple[Trial, ...]], None] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[PlanFile, tuple[Trial, ...]]:
    """The best plan found in `trials` trials, and all trials.

    Args:
        pipe: a diffusers pipeline.
        plan: where the search begins.
        truths: (prompt, seed) -> final latent of the uncached run.
        sample: runs the pipeline once and returns the final latent.
        trials: how many schedules are tried, each on all prompts, known ones counted; the search ends earlier if no
            neighbour is better.
        known: trials of an earlier search, not run again.
        save: called with all trials after each.
        progress: called with 1 after every new trial.

    Raises:
        ValueError: fewer than 1 trial, or no prompts.
    """
    if trials < 1 or not truths:
        raise ValueError(f"{trials} trials over {len(truths)} prompts; expected at least one of each.")

    def errors_of(computed: tuple[int, ...]) -> tuple[float, ...]:
        candidate, errors = rescheduled(plan, computed), []
        for (prompt, seed), truth in truths.items():
            with accelerate(pipe, candidate):
                latent = sample(prompt, seed).float()
            errors.append(float((latent - truth.float()).norm() / truth.float().norm()))
        return tuple(errors)

    def told(done: tuple[Trial, ...]) -> None:
        if save is not None:
            save(done)
        if progress is not None:
            progress(1)

    best, done = climb(plan.plan, errors_of, trials, known=known, told=told)
    return _measured(rescheduled(plan, best.computed), best), done


def climb(
    start: Plan,
    errors_of: Callable[[tuple[int, ...]], tuple[float, ...]],
    trials: int,
    *,
    known: tuple[Trial, ...] = (),
    told: Callable[[tuple[Trial, ...]], None] | None = None,
) -> tuple[Trial, tuple[Trial, ...]]:
    """From a schedule to the first neighbour that is better, and on from there: the best trial, and all.

    Args:
        start: where the search begins.
        errors_of: the relative errors of a schedule, one a prompt.
        trials: most schedules that are tried, known ones counted.
        known: trials of an earlier search, not made again.
        told: called with all trials after each new one.

    Raises:
        ValueError: known trials leave no room for the start.
    """
    done = {trial.computed: trial for trial in known}

    def attempt(computed: tuple[int, ...]) -> Trial | None:
        """The trial of a schedule; `None` if it would be one too many."""
        if computed not in done and len(done) < trials:
            done[computed] = Trial(computed, errors_of(computed))
            if told is not None:
                told(tuple(done.values()))
        return done.get(computed)

    better = best = attempt(start.computed)
    if best is None:
        raise ValueError(f"the {len(done)} known trials leave no room to try the plan itself; ask for more than that.")
    while better is not None:
        best = better
        candidates = map(attempt, neighbours(best.computed, start.num_steps))
        better = next((t for t in candidates if t is not None and t.score > best.score), None)
    return best, tuple(done.values())


def neighbours(computed: tuple[int, ...], num_steps: int) -> Iterator[tuple[int, ...]]:
    """All schedules with one inner computed step moved by one, the earliest steps first."""
    for i in range(1, len(computed) - 1):
        for move in (-1, 1):
            moved = computed[i] + move
            if computed[i - 1] < moved < computed[i + 1]:
                yield (*computed[:i], moved, *computed[i + 1 :])


def rescheduled(plan: PlanFile, computed: tuple[int, ...]) -> PlanFile:
    """The plan on another schedule; what was predicted or measured of it is not of the new one."""
    return replace(plan, plan=Plan(plan.plan.num_steps, computed), errors=(), figures=())


def _measured(plan: PlanFile, trial: Trial) -> PlanFile:
    figures = (
        ("measured_error_mean", float(np.mean(trial.errors))),
        ("measured_snr_worst_quarter_db", trial.score),
        ("measured_runs", float(len(trial.errors))),
    )
    return replace(plan, figures=figures)


def refined(
    pipe: Any,
    plan: PlanFile,
    truths: dict[tuple[str, int], torch.Tensor],
    sample: Callable[[str, int], torch.Tensor],
    trials: int,
    path: Path,
    label: str = "trials",
) -> tuple[PlanFile, tuple[Trial, ...]]:
    """`refine` with a progress bar; every trial is kept in a file, with which the search resumes."""
    key = trials_key(plan, list(truths))
    known = load_trials(path, key)
    with tqdm(total=trials, initial=len(known), desc=label, dynamic_ncols=True) as bar:
        save = functools.partial(save_trials, path, key=key)
        return refine(pipe, plan, truths, sample, trials, known=known, save=save, progress=bar.update)


def trials_key(plan: PlanFile, runs: list[tuple[str, int]]) -> dict[str, Any]:
    """What the trials of a plan's search are of; `runs`: prompts and seeds."""
    return {"start": plan.plan.computed, "runs": runs, "method": plan.method}


def save_trials(path: str | os.PathLike[str], trials: tuple[Trial, ...], key: dict[str, Any]) -> None:
    """Write trials as JSON, whole or not at all; `key` says what they are of."""
    rows = [[list(t.computed), list(t.errors)] for t in trials]
    document = {"schema": REFINEMENT_SCHEMA, "version": REFINEMENT_VERSION, "key": key, "trials": rows}
    write_atomically(path, json.dumps(document) + "\n")


def load_trials(path: str | os.PathLike[str], key: dict[str, Any]) -> tuple[Trial, ...]:
    """Trials of an earlier, interrupted search; none if there is no file. ValueError if they are of something else."""
    if not Path(path).exists():
        return ()
    data = parse_document(read_text(path, "refinement"), REFINEMENT_SCHEMA, REFINEMENT_VERSION)
    if data.get("key") != json.loads(json.dumps(key)):
        raise ValueError(
            f"{os.fspath(path)!r} holds trials of another plan or calibration; remove it, or choose another --out."
        )
    return tuple(Trial(tuple(map(int, computed)), tuple(map(float, errors))) for computed, errors in data["trials"])
