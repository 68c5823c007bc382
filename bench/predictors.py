"""Which predictor is closest, in closed form: history length, latent term, weights shared by the branches or not.

    python bench/predictors.py                       the table of docs/planning.md; seconds, no model

From the Gram matrices of `assets/tiny-wan/calibration.json`: weights are fitted on four runs and judged on the other
four, both ways round. A figure is the error of a predicted output over the norm of the output, root mean square over
steps, runs and branches; the steps are those of a schedule that computes every second, third, ... step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from stepcache.planning.calibration import Calibration, quadratic
from stepcache.planning.costs import RIDGE, fit

CALIBRATION = Path(__file__).resolve().parent.parent / "assets" / "tiny-wan" / "calibration.json"
Weights = tuple[tuple[float, ...], float]
"""Weights over the sources, newest first, and of the latent's change since the newest."""


def error(calibration: Calibration, branch: int, step: int, sources: Sequence[int], weights: Weights) -> np.ndarray:
    """(runs,): squared relative error of one branch's predicted output."""
    steps, count = calibration.num_steps, len(calibration.branches)
    vector, truth = np.zeros((2, steps * (count + 1)))
    vector[[branch * steps + k for k in sources]] = weights[0]
    vector[count * steps + step] += weights[1]
    vector[count * steps + sources[0]] -= weights[1]
    truth[branch * steps + step] = 1.0
    grams = calibration.grams
    return np.asarray(quadratic(vector - truth, grams) / quadratic(truth, grams))


def finite_difference(step: int, sources: Sequence[int]) -> Weights:
    """The polynomial through the sources, read off at the step (Lagrange)."""
    weights = []
    for i in sources:
        others = [j for j in sources if j != i]
        weights.append(float(np.prod([(step - j) / (i - j) for j in others])))
    return tuple(weights), 0.0


def fitted(calibration: Calibration, step: int, sources: Sequence[int], latent: bool, ridge: float) -> Weights:
    """Least squares on the calibration's runs."""
    found = fit(calibration, step, sources, ridge=ridge, latent=latent)
    return found.weights, found.latent


def of_branch(calibration: Calibration, branch: int) -> Calibration:
    """The calibration with one branch only."""
    steps, count = calibration.num_steps, len(calibration.branches)
    rows = [*range(branch * steps, (branch + 1) * steps), *range(count * steps, (count + 1) * steps)]
    name = calibration.branches[branch]
    runs = tuple(replace(run, gram=np.asarray(run.gram)[np.ix_(rows, rows)]) for run in calibration.runs)
    return replace(calibration, runs=runs, branches=(name,), guidance=None, alpha=(1.0,))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default=str(CALIBRATION))
    args = parser.parse_args()
    calibration = Calibration.load(args.calibration)
    half = len(calibration.runs) // 2
    halves = [replace(calibration, runs=r) for r in (calibration.runs[:half], calibration.runs[half:])]
    gaps = (2, 3, 4, 6)
    print("| predictor | " + " | ".join(f"every {g}th step" for g in gaps) + " |")
    print("|---" * (len(gaps) + 1) + "|")
    for name, arguments in {
        "repeat (1 output)": (1, False, False, None),
        "polynomial through 2": (2, False, False, None),
        "polynomial through 3": (3, False, False, None),
        "fitted, 1 output": (1, False, False, RIDGE),
        "fitted, 2 outputs": (2, False, False, RIDGE),
        "fitted, 3 outputs": (3, False, False, RIDGE),
        "fitted, 2 outputs and the latent": (2, True, False, RIDGE),
        "fitted, 2 outputs, each branch its own": (2, False, True, RIDGE),
        "fitted, 2 outputs, no ridge": (2, False, False, 0.0),
        "fitted, 3 outputs, no ridge": (3, False, False, 0.0),
        "fitted, 2 outputs and the latent, no ridge": (2, True, False, 0.0),
        "fitted, 2 outputs, each branch its own, no ridge": (2, False, True, 0.0),
    }.items():
        cells = [row(halves, gap, *arguments) for gap in gaps]
        print(f"| {name} | " + " | ".join(f"{c:.2%}" for c in cells) + " |")


def row(halves: list[Calibration], gap: int, history: int, latent: bool, by_branch: bool, ridge: float | None) -> float:
    """Root mean square relative error of a predictor on runs it was not fitted on."""
    squares = []
    for train, test in (halves, halves[::-1]):
        branches = range(len(test.branches))
        for step in range(2 * gap + 1, test.num_steps):
            if step % gap == 0:
                continue
            newest = step - step % gap
            sources = [newest - i * gap for i in range(history)]
            if ridge is None:
                weights = [finite_difference(step, sources)] * len(branches)
            elif by_branch:
                weights = [fitted(of_branch(train, b), step, sources, latent, ridge) for b in branches]
            else:
                weights = [fitted(train, step, sources, latent, ridge)] * len(branches)
            squares += [error(test, b, step, sources, w).mean() for b, w in zip(branches, weights, strict=True)]
    return float(np.sqrt(np.mean(squares)))


if __name__ == "__main__":
    main()
