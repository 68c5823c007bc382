"""stepcache in the Wan2.1 repository (Wan-Video/Wan2.1): T2V, T2I, I2V, FLF2V and VACE, one process or several.

Upstream's `generate.py` creates its pipeline object inside a function, as `wan.WanT2V(...)`, and that creates a sampler
for every video. So these names are replaced, for as long as `installed` is active, by factories that put a cache into
the one pipeline they make and stand at the door of the samplers. The transformer is entered as an object, outside of
the `forward` that upstream may have set (sequence parallelism) or wrapped (FSDP): both keep working, and a skipped
call gathers no shards.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from stepcache.core.cache import StepCache
from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Trajectory
from stepcache.hindsight.response import Remembered
from stepcache.hosts.entering import BlockStack, Branches, Entrance, Method, Patches

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
            cache = StepCache(policy, group=dist.group.WORLD if _ranks() > 1 else None)
            caches.append(cache)
            _Host(pipe, cache, model, patches)
            return pipe

        return create

    for name in FACTORIES:
        if hasattr(wan, name):
            patches.set(wan, name, factory)
    try:
        yield caches
    finally:
        patches.restore()


def _ranks() -> int:
    """Upstream gives all ranks one video, so they all share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Host:
    """A pipeline of upstream's: every `generate` is a run, its sampler ends steps and is given the guided output."""

    def __init__(self, pipe: Any, cache: StepCache, model: str | None, patches: Patches) -> None:
        self.pipe, self.cache, self.model = pipe, cache, model
        self.branches, self.response = Branches(), Remembered()
        self.run: Trajectory | None = None  # of the video under way, until its first evaluation begins it
        self.sampler: Any = None
        patches.set(pipe, "generate", self._generate)
        module = sys.modules[type(pipe).__module__]
        for name in SAMPLERS:
            if hasattr(module, name):
                patches.set(module, name, self._make_sampler)

    def _generate(self, original: Method) -> Method:
        def generate(*args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(original).bind(*args, **kwargs)
            call.apply_defaults()
            steps, shift, guidance = (call.arguments[n] for n in ("sampling_steps", "shift", "guide_scale"))
            self.run = Trajectory(int(steps), self.model, float(shift), float(guidance))
            self.branches.clear()
            patches = Patches()
            try:
                self._install(patches)
                return original(*args, **kwargs)
            finally:
                patches.restore()
                self.cache.end()

        return generate

    def _make_sampler(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            self.sampler = sampler = original(*args, **kwargs)
            step = sampler.step

            def guided_step(model_output: Any, *more: Any, **named: Any) -> Any:
                model_output = self.cache.guide(model_output)
                self.cache.step_over()
                return step(model_output, *more, **named)

            sampler.step = guided_step  # the sampler lives as long as the video
            return sampler

        return create

    def _begin(self) -> None:
        """The first evaluation of a video: its sampler is ready."""
        if self.run is None:
            return
        run, self.run, sampler = self.run, None, self.sampler
        self.cache.begin(
            replace(
                run,
                timesteps=tuple(float(t) for t in sampler.timesteps.tolist()),
                scheduler=type(sampler).__name__,
                response=lambda: self.response(sampler),
            )
        )

    def _install(self, patches: Patches) -> None:
        """Enter `model(x, t=, context=, ...)`: x a list of one latent (C, F, H, W), the result likewise."""
        model, cache = self.pipe.model, self.cache
        stack = BlockStack(cache, list(model.blocks), patches) if cache.boundary == "blocks" else None
        entrance = Entrance(cache, stack)

        def enter(original: Method) -> Method:
            def call(x: list[Any], *args: Any, **kwargs: Any) -> Any:
                self._begin()
                branch = self.branches.name(kwargs["context"][0])
                return entrance(original, (x, *args), kwargs, x, branch)

            return call

        patches.enter(model, enter)
        inner = getattr(model, "_fsdp_wrapped_module", model)
        if stack is not None and hasattr(inner, "forward_vace"):  # VACE's own blocks feed only those that are skipped

            def hints(original: Method) -> Method:
                return lambda *a, **k: original(*a, **k) if stack.call is None or stack.call.compute else None

            patches.set(inner, "forward_vace", hints)
