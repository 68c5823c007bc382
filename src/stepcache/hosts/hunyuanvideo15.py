"""stepcache in the HunyuanVideo-1.5 repository (Tencent-Hunyuan/HunyuanVideo-1.5): T2V and I2V, one process or several.

Upstream has a place for caches: before its loop the pipeline calls `cache_helper.clear_states()`, and at every step it
sets `cache_helper.cur_timestep`. `install` puts a helper there and enters the transformer of that one pipeline and its
sampler; the super-resolution stage, whose transformer is of the same class, is a pipeline of its own and stays as it
is. Guidance is one batched call ([uncond, cond]), so there is one branch.
"""

from __future__ import annotations

import weakref
from typing import Any

from stepcache.core.cache import StepCache
from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.entering import BlockStack, DoesNotFit, Entrance, Method, Patches

MODEL = "hunyuanvideo-1.5"


class CacheHelper:
    """What upstream's loop expects of a cache, turned into runs and steps of a StepCache."""

    def __init__(self, pipe: Any, cache: StepCache, patches: Patches) -> None:
        self.cache, self._pipe, self._patches = cache, weakref.ref(pipe), patches
        self.cur_timestep = 0  # index of the step that begins; upstream sets it, at the sampler step we learn of it
        self._samplers: list[Any] = []

    def clear_states(self) -> None:
        """A new video: upstream has set its timesteps just before. DoesNotFit if the policy is for other runs."""
        pipe = self._pipe()
        if pipe is None:
            return
        scheduler = pipe.scheduler
        if all(scheduler is not seen for seen in self._samplers):
            self._samplers.append(scheduler)
            self._patches.set(scheduler, "step", self._at_sampler)
        run = Trajectory(
            num_steps=len(scheduler.timesteps),
            model=MODEL,
            shift=scheduler.config.get("shift"),
            guidance=float(pipe.guidance_scale),
            timesteps=tuple(map(float, scheduler.timesteps)),
            scheduler=type(scheduler).__name__,
            sampler=scheduler,
        )
        try:
            self.cache.begin(run)
        except ValueError as error:
            raise DoesNotFit(str(error)) from error

    def _at_sampler(self, original: Method) -> Method:
        def step(model_output: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self.cache.step_over(model_output), *args, **kwargs)

        return step

    def remove(self) -> None:
        """Restore transformer and sampler and free the cache."""
        self._patches.restore()
        self.cache.end()


def install(pipe: Any, policy: Policy) -> CacheHelper:
    """Enter `pipe.transformer`; the caller makes the result the pipeline's `cache_helper`."""
    cache, patches = StepCache(policy), Patches()
    transformer = pipe.transformer
    stack = None
    if cache.boundary == "blocks":
        stack = BlockStack(cache, list(transformer.double_blocks), patches, ("img", "txt"))
    entrance = Entrance(cache, stack)

    def enter(original: Method) -> Method:
        def call(latents: Any, *args: Any, **kwargs: Any) -> Any:
            return entrance(original, (latents, *args), kwargs, latents, "batched")

        return call

    patches.enter(transformer, enter)
    return CacheHelper(pipe, cache, patches)
