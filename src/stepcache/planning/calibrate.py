"""Record uncached runs of a diffusers pipeline: what a calibration is made from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stepcache.hindsight.method import Hindsight
from stepcache.hosts.diffusers import accelerate
from stepcache.measure.metrics import mean_psnr, psnr
from stepcache.planning.calibration import Calibration, Recorder

LEAST_BUDGET = 3
"""Of fewer computed steps nothing can be extrapolated."""


ANCHOR = 5
"""The accelerated run computes every so many-th step."""


def calibrate(
    pipe: Any,
    runs: Iterable[tuple[str, int]],
    sample: Callable[[str, int], torch.Tensor],
    *,
    shown: Callable[[str, int], tuple[torch.Tensor, np.ndarray]] | None = None,
    known: Calibration | None = None,
    save: Callable[[Calibration], None] | None = None,
    dtype: torch.dtype = torch.float32,
    folder: str | None = None,
) -> Calibration:
    """Record uncached runs of a diffusers pipeline.

    Args:
        pipe: any pipeline, whatever its guidance.
        runs: (prompt, seed) pairs; those that `known` has are left out.
        sample: `sample(prompt, seed)` runs the pipeline once and returns the final latent.
        shown: `shown(prompt, seed)` likewise returns the latent and the frames [T, H, W, 3] uint8. Given, the first run
            is made once more in a fifth of its steps, to learn what PSNR forecasts come to.
        known: a calibration to go on with.
        save: called with the calibration after every run.
        dtype: precision of the outputs held during a run.
        folder: where they are held, default memory (see `Recorder`).

    Raises:
        ValueError: the sampler adds noise, or `known` is of another model or setting.
    """
    recorder = Recorder(dtype, folder, known.size if known else None)
    calibration, done = known, known.done if known else set()
    for prompt, seed in runs:
        if (prompt, seed) in done:
            continue
        first = shown if calibration is None else None
        with accelerate(pipe, recorder):
            truth = first(prompt, seed) if first else sample(prompt, seed)
        found = recorder.finish((prompt, seed))
        if first is not None and found.num_steps >= ANCHOR * LEAST_BUDGET:
            anchor = _anchor(pipe, found.num_steps // ANCHOR, truth, functools.partial(first, prompt, seed))
            found = replace(found, runs=(replace(found.runs[0], anchors=(anchor,)),))
        calibration = found if calibration is None else calibration.merged(found)
        if save is not None:
            save(calibration)
    if calibration is None:
        raise ValueError("no runs were asked for; give at least one prompt and seed.")
    return calibration


def _anchor(
    pipe: Any,
    budget: int,
    truth: Any,
    run: Callable[[], tuple[torch.Tensor, np.ndarray]],
) -> tuple[int, float, float]:
    """(budget, error of the final latent, PSNR) of one accelerated run."""
    with accelerate(pipe, Hindsight(budget)):
        latent, frames = run()
    reference = truth[0].float()
    error = float((latent.float() - reference).norm() / reference.norm())
    return budget, error, mean_psnr(psnr(truth[1], frames).tolist())


def describe(calibration: Calibration) -> str:
    """What was learnt, in a few lines: runs, ratios, rates and their spread."""
    lines = [
        f"calibration of {calibration.model}: {len(calibration.runs)} run(s) of {calibration.num_steps} steps, "
        f"{calibration.scheduler}, guidance {calibration.guidance}, latent {list(calibration.size)}",
        f"  latents agree with the sampler's response to {max(run.mismatch for run in calibration.runs):.1e}",
    ]
    for branch in calibration.branches:
        ratios = np.stack([run.magnitude[branch][1:, 0] for run in calibration.runs])
        cosine = np.stack([run.magnitude[branch][1:, 2] for run in calibration.runs])
        rates = np.stack([run.rates[branch][1:] for run in calibration.runs])
        lines.append(
            f"  {branch}: magnitude ratio {ratios.mean():.4f} (spread over runs {_spread(ratios):.4f}), "
            f"1 - cosine {cosine.mean():.4f}, transformation rate {rates.mean():.3f} (spread {_spread(rates):.3f})"
        )
    return "\n".join(lines)


def _spread(rows: np.ndarray) -> float:
    """Standard deviation over runs, root mean square over steps."""
    return float(np.sqrt(rows.var(0).mean()))
