"""stepcache in one QwenImagePipeline of diffusers, for the drop-ins; the library's host is `hosts/diffusers.py`.

The pipeline names its branches (`transformer.cache_context`), calls the transformer with the latent as
`hidden_states`, and ends a step with `scheduler.step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stepcache.core.cache import StepCache
from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.entering import BlockStack, Entrance, Method, Patches


@contextmanager
def accelerated(pipe: Any, policy: Policy, model: str | None, guidance: float) -> Iterator[StepCache]:
    """While active, `pipe` runs with `policy`; `model` is the name plans are checked against, `guidance` the scale."""
    cache, patches, transformer, scheduler = StepCache(policy), Patches(), pipe.transformer, pipe.scheduler
    stack = None
    if cache.boundary == "blocks":
        streams = ("encoder_hidden_states", "hidden_states")
        stack = BlockStack(cache, list(transformer.transformer_blocks), patches, streams, 1)
    entrance, branch, begun = Entrance(cache, stack), "all", scheduler.timesteps

    def context(original: Method) -> Method:
        @contextmanager
        def cache_context(name: str) -> Iterator[None]:
            nonlocal branch
            with original(name):
                branch = name
                yield

        return cache_context

    def enter(original: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            if scheduler.timesteps is not begun:  # set anew for every image
                begun, name = scheduler.timesteps, type(scheduler).__name__
                timesteps = tuple(map(float, begun))
                run = Trajectory(len(timesteps), model, None, guidance, timesteps, scheduler=name, sampler=scheduler)
                cache.begin(run)
            return entrance(original, args, kwargs, kwargs["hidden_states"], branch)

        return call

    patches.set(transformer, "cache_context", context)
    patches.set(scheduler, "step", lambda step: lambda output, *a, **k: step(cache.step_over(output), *a, **k))
    patches.enter(transformer, enter)
    try:
        yield cache
    finally:
        patches.restore()
        cache.end()
