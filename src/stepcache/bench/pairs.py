"""Pairs of clips or pictures: one uncached and one with a method, of one prompt and seed; the latest are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stepcache.bench.methods import CALIBRATION, KINDS, Method, number, read
from stepcache.bench.results import REFERENCE
from stepcache.core.strategy import Policy
from stepcache.measure.generation import (
    Request,
    check_policy,
    check_request,
    generate,
    requested,
    sample_latent,
    shows_latents,
)
from stepcache.measure.pipelines import load_pipeline, model_inputs
from stepcache.methods import Off

KEPT = 6
"""Clips that are kept, so that the same settings are not computed again."""

Tell = Callable[[str, int, int], None]
"""Gets what is under way, steps done, steps in all (0: not known); raises to end the run."""


class Stopped(Exception):
    """The user wants no more of it."""


@dataclass(frozen=True)
class Made:
    """A clip, frames [T, H, W, 3] uint8, and what its run did."""

    frames: np.ndarray
    loop_seconds: float
    computed: int
    ideal_speedup: float
    summary: str


@dataclass
class Maker:
    """Makes clips, one at a time, with the pipeline that was asked for last."""

    device: str | None = None
    dtype: str | None = None
    _loaded: tuple[str, Any] | None = None
    _made: dict[tuple[str, Request, str], Made] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pair(self, model: str, request: Request, method: str, policy: Policy, tell: Tell) -> tuple[Made, Made]:
        """The clip uncached and with a method; raises what `load_pipeline`, `check_policy` and `tell` raise."""
        inputs = model_inputs(model)
        check_request(request, inputs)
        check_policy(policy, request, inputs)
        with self._lock:
            pipe = self._pipe(model, request, tell)
            check_policy(policy, request, inputs, pipe)
            runs = ((REFERENCE, Off()), (method, policy))
            plain, cached = [self._clip(pipe, model, request, *run, tell) for run in runs]
            return plain, cached

    def _pipe(self, model: str, request: Request, tell: Tell) -> Any:
        if self._loaded is None or self._loaded[0] != model:
            tell("loading the model", 0, 0)
            self._loaded = None  # frees its memory
            pipe = load_pipeline(model, self.device, self.dtype)
            pipe.set_progress_bar_config(disable=True)
            tell("warming up", 0, 0)  # else the first run, the uncached one, would be timed with it
            sample_latent(pipe, replace(request, steps=min(2, request.steps)))
            self._loaded = (model, pipe)
        return self._loaded[1]

    def _clip(self, pipe: Any, model: str, request: Request, method: str, policy: Policy, tell: Tell) -> Made:
        """A clip, if it is not kept from before; policies are compared by what is in them, not in their files."""
        key = (model, request, repr(policy))
        if key not in self._made:

            def ended(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                tell(method, step + 1, request.steps)
                return values

            tell(method, 0, request.steps)
            watched: dict[str, Any] = {"callback_on_step_end": ended} if shows_latents(pipe) else {}
            frames, run = generate(pipe, request, policy, **watched)
            self._made[key] = Made(frames, run.loop_seconds, len(run.computed), run.ideal_speedup, str(run))
        self._made[key] = self._made.pop(key)  # the latest used is last
        while len(self._made) > KEPT:
            del self._made[next(iter(self._made))]
        return self._made[key]


def takes_budget(method: str) -> bool:
    """Whether the page's budget belongs to a method as written: it has one, and does not say it itself."""
    name, _, options = method.strip().partition(",")
    return name in KINDS and KINDS[name].value == "budget" and "interval=" not in options


def chosen(method: str, budget: int) -> Method:
    """A method as written, with the page's budget where that belongs to it; ValueError for none that makes a clip."""
    name, comma, options = method.strip().partition(",")
    found = read(f"{name}:{budget}{comma}{options}" if takes_budget(method) else method.strip())
    if found.name == CALIBRATION:
        raise ValueError(f"{found.text!r} is for stepcache generate; here its ratios would be lost.")
    return found


def request_from(model: str, prompt: str, **numbers: str | int) -> Request:
    """What the fields ask for; empty ones are the model's, then its pipeline's. ValueError: no prompt, no number."""
    if not prompt.strip():
        raise ValueError("The prompt is empty; say what to generate.")
    given = {name: _read(name, text) for name, value in numbers.items() if (text := str(value).strip())}
    return requested(model, prompt.strip(), **given)


def _read(name: str, text: str) -> Any:
    try:
        return number(text) if name == "guidance" else int(text)
    except ValueError:
        kind = "a number" if name == "guidance" else "a whole number"
        raise ValueError(f"{name} is {text!r}; expected {kind}, or nothing for the model's.") from None
