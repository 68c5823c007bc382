"""stepcache in the Wan2.1 repository (Wan-Video/Wan2.1): T2V, T2I, I2V, FLF2V and VACE, one process or several.

Upstream's `generate.py` creates its pipeline object inside a function, as `wan.WanT2V(...)`, and that creates a sampler
for every video. So these names are replaced, for as long as `installed` is active, by factories that put a cache into
the one pipeline they make and stand at the door of its samplers. The transformer is entered as an object, outside of
the `forward` that upstream may have set (sequence parallelism) or wrapped (FSDP): both keep working.
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
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.entering import BlockStack, DoesNotFit, Entrance, Method, Patches

FACTORIES = ("WanT2V", "WanI2V", "WanFLF2V", "WanVace")
SAMPLERS = ("FlowUniPCMultistepScheduler", "FlowDPMSolverMultistepScheduler")


@contextmanager
def installed(wan: Any, policy: Policy, model: str | None = None) -> Iterator[list[StepCache]]:
    """While active, every pipeline made from the upstream package `wan` runs with `policy`.

    Yields the caches of the pipelines made so far, for their summaries. `model` is the name plans are checked against.
    """
    caches: list[StepCache] = []
    patches = Patches()

    def factory(original: Method) -> Method:
        def create(*args: Any, **kwargs: Any) -> Any:
            pipe = original(*args, **kwargs)
            alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
            caches.append(StepCache(policy, group=None if alone else dist.group.WORLD))  # all ranks make one video
            _Host(pipe, caches[-1], model, patches)
            return pipe

        return create

    for name in filter(vars(wan).__contains__, FACTORIES):
        patches.set(wan, name, factory)
    try:
        yield caches
    finally:
        patches.restore()


class _Host:
    """A pipeline of upstream's: every `generate` is a run, its sampler ends steps and is given the guided output."""

    sampler: Any = None

    def __init__(self, pipe: Any, cache: StepCache, model: str | None, patches: Patches) -> None:
        self.pipe, self.cache, self.model = pipe, cache, model
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
                self._enter(patches, Trajectory(int(steps), self.model, float(shift), float(guidance)))
                return original(*args, **kwargs)
            finally:
                patches.restore()
                self.cache.end()
                self.sampler = None

        return generate

    def _make_sampler(self, original: Method) -> Method:
        def create(*args: Any, **kwargs: Any) -> Any:
            self.sampler = sampler = original(*args, **kwargs)
            step = sampler.step
            sampler.step = lambda output, *a, **k: step(self.cache.step_over(output), *a, **k)  # it dies with the video
            return sampler

        return create

    def _enter(self, patches: Patches, run: Trajectory) -> None:
        """Enter `model(x, t=, context=, ...)`: x a list of one latent (C, F, H, W), the result likewise."""
        model, prompts = self.pipe.model, list[Any]()
        stack = BlockStack(self.cache, list(model.blocks), patches) if self.cache.boundary == "blocks" else None
        entrance = Entrance(self.cache, stack)

        def enter(original: Method) -> Method:
            def call(x: list[Any], *args: Any, **kwargs: Any) -> Any:
                prompt = kwargs["context"][0]
                if not prompts:  # the first evaluation, of the prompt: by now the sampler has its timesteps
                    timesteps, name = tuple(map(float, self.sampler.timesteps)), type(self.sampler).__name__
                    try:
                        self.cache.begin(replace(run, timesteps=timesteps, scheduler=name, sampler=self.sampler))
                    except ValueError as error:
                        raise DoesNotFit(str(error)) from error
                    prompts.append(prompt)
                return entrance(original, (x, *args), kwargs, x[0], "cond" if prompt is prompts[0] else "uncond")

            return call

        patches.enter(model, enter)
        inner = getattr(model, "_fsdp_wrapped_module", model)
        if stack is not None and hasattr(inner, "forward_vace"):  # VACE's own blocks feed only those that are skipped
            skips = lambda: stack.call is not None and not stack.call.compute  # noqa: E731
            patches.set(inner, "forward_vace", lambda hints: lambda *a, **k: None if skips() else hints(*a, **k))
