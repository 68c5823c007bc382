"""stepcache in the repositories of Wan2.1 and Wan2.2 (Wan-Video/Wan2.1, Wan-Video/Wan2.2), one process or several.

Upstream's `generate.py` creates its pipeline object inside a function, as `wan.WanT2V(...)`, and that creates a sampler
for every video; of speech to video and of animation, for every clip that the video is put together from. So these names
are replaced, for as long as `installed` is active, by factories that put a cache into the one pipeline they make and
hook the `step` of its samplers. The transformer is entered as an object, outside of the `forward` that upstream may
have set (sequence parallelism) or wrapped (FSDP): both keep working.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from stepcache.core.cache import StepCache
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.entering import BlockStack, DoesNotFit, Entrance, Method, Patches

FACTORIES = ("WanT2V", "WanI2V", "WanFLF2V", "WanVace", "WanTI2V", "WanS2V", "WanAnimate")
TRANSFORMERS = ("model", "high_noise_model", "low_noise_model", "noise_model")
"""Where pipelines keep them; Wan2.2's A14B has two, one for each part of the steps."""
SAMPLERS = ("FlowUniPCMultistepScheduler", "FlowDPMSolverMultistepScheduler")


@contextmanager
def installed(wan: Any, policy: Policy, model: str | None = None) -> Iterator[list[RunSummary]]:
    """While active, every pipeline made from the upstream package `wan` runs with `policy`.

    Yields the summaries of the runs so far, a sampler's life each. `model` is the name plans are checked against.
    """
    runs: list[RunSummary] = []
    patches = Patches()

    def factory(original: Method) -> Method:
        def create(*args: Any, **kwargs: Any) -> Any:
            pipe = original(*args, **kwargs)
            alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
            cache = StepCache(policy, group=None if alone else dist.group.WORLD)  # all ranks make one video
            _Host(pipe, cache, model, patches, runs)
            return pipe

        return create

    for name in filter(vars(wan).__contains__, FACTORIES):
        patches.set(wan, name, factory)
    try:
        yield runs
    finally:
        patches.restore()


class _Host:
    """A pipeline of upstream's: every sampler it makes is a run, ends its steps and is given the guided output."""

    sampler: Any = None
    prompt: Any = None  # of the first evaluation of a run; `None` before that

    def __init__(
        self, pipe: Any, cache: StepCache, model: str | None, patches: Patches, runs: list[RunSummary]
    ) -> None:
        self.pipe, self.cache, self.model, self.runs = pipe, cache, model, runs
        patches.set(pipe, "generate", self._generate)
        module = sys.modules[type(pipe).__module__]
        for name in filter(vars(module).__contains__, SAMPLERS):
            patches.set(module, name, self._make_sampler)

    def _generate(self, original: Method) -> Method:
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(*args, **kwargs)
            given.apply_defaults()
            steps, shift, guidance = (given.arguments[name] for name in ("sampling_steps", "shift", "guide_scale"))
            patches = Patches()
            try:
                run = Trajectory(int(steps), self.model, float(shift), first_guidance(guidance))
                for name in filter(vars(self.pipe).__contains__, TRANSFORMERS):
                    self._enter(patches, name, run)
                return original(*args, **kwargs)
            finally:
                patches.restore()
                self.cache.end()
                self.sampler = self.prompt = None

        return generate

    def _make_sampler(self, original: Method) -> Method:
        def create(*args: Any, **kwargs: Any) -> Any:
            self.sampler, self.prompt = original(*args, **kwargs), None
            step = self.sampler.step
            self.sampler.step = lambda output, *a, **k: step(self.cache.step_over(output), *a, **k)  # dies with the run
            return self.sampler

        return create

    def _enter(self, patches: Patches, name: str, run: Trajectory) -> None:
        """Enter `model(x, t=, context=, ...)`: x a list of one latent (C, F, H, W), the result likewise."""
        model = getattr(self.pipe, name)
        stack = BlockStack(self.cache, list(model.blocks), patches) if self.cache.boundary == "blocks" else None
        entrance = Entrance(self.cache, stack)

        def enter(original: Method) -> Method:
            def call(x: Any, *args: Any, **kwargs: Any) -> Any:
                prompt = kwargs["context"][0]
                if self.prompt is None:  # the first evaluation, of the prompt: by now the sampler has its timesteps
                    self._begin(run)
                    self.prompt = prompt
                branch = "cond" if prompt is self.prompt else "uncond"
                return entrance(original, (x, *args), kwargs, x[0], branch, name)

            return call

        patches.enter(model, enter)
        inner = getattr(model, "_fsdp_wrapped_module", model)
        if stack is not None and hasattr(inner, "forward_vace"):  # VACE's own blocks feed only those that are skipped
            skips = lambda: stack.call is not None and not stack.call.compute  # noqa: E731
            patches.set(inner, "forward_vace", lambda hints: lambda *a, **k: None if skips() else hints(*a, **k))

    def _begin(self, run: Trajectory) -> None:
        """A run of the sampler that was made last; DoesNotFit if the policy cannot do it."""
        timesteps, handover = tuple(map(float, self.sampler.timesteps)), None
        if hasattr(self.pipe, "low_noise_model"):  # as upstream decides
            handover = sum(t >= self.pipe.boundary * self.pipe.num_train_timesteps for t in timesteps) % len(timesteps)
        known = {"timesteps": timesteps, "scheduler": type(self.sampler).__name__, "sampler": self.sampler}
        try:
            self.cache.begin(replace(run, **known, handover=handover or None))
        except ValueError as error:
            raise DoesNotFit(str(error)) from error
        self.runs.append(self.cache.summary())


def first_guidance(scale: Any) -> float:
    """The guidance scale that acts first: of Wan2.2's pairs (low noise, high noise) the second."""
    return float(scale[-1] if isinstance(scale, list | tuple) else scale)
