"""stepcache in the Wan2.1 repository (Wan-Video/Wan2.1): T2V, T2I, I2V, FLF2V and VACE, one process or several.

Upstream's `generate.py` creates its pipeline object inside a function, as `wan.WanT2V(...)`. So these names are
replaced, for as long as `installed` is active, by factories that put a cache into the one object they make. The
transformer is then entered as an object, outside of the `forward` that upstream may have set (sequence parallelism)
or wrapped (FSDP): both keep working, and a skipped call gathers no shards.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from stepcache.core.cache import Policy, StepCache
from stepcache.core.trajectory import Trajectory
from stepcache.hindsight.response import response
from stepcache.hosts.entering import BlockStack, Entrance, Patches

FACTORIES = ("WanT2V", "WanI2V", "WanFLF2V", "WanVace")
SAMPLERS = ("FlowUniPCMultistepScheduler", "FlowDPMSolverMultistepScheduler")


@contextmanager
def installed(
    wan: Any, policy: Policy, model: str | None = None, on_sampler: Callable[[Any], None] | None = None
) -> Iterator[list[StepCache]]:
    """While active, every pipeline made from the upstream package `wan` runs with `policy`.

    Yields the caches of the pipelines made so far, for their summaries. `model` is the name plans are checked against;
    `on_sampler` is shown the sampler that upstream makes for a run.
    """
    caches: list[StepCache] = []
    made: list[Any] = []  # the sampler of the run
    patches = Patches()

    def see(sampler: Any) -> None:
        made[:] = [sampler]
        if on_sampler is not None:
            on_sampler(sampler)

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            pipe = original(*args, **kwargs)
            cache = StepCache(policy, group=dist.group.WORLD if _ranks() > 1 else None)
            caches.append(cache)
            patches.set(pipe, "generate", lambda generate: _generate(generate, pipe, cache, model, made))
            _show_samplers(sys.modules[type(pipe).__module__], see, patches)
            return pipe

        return create

    for name in FACTORIES:
        if hasattr(wan, name):
            patches.set(wan, name, factory)
    try:
        yield caches
    finally:
        patches.restore()


def _show_samplers(module: Any, on_sampler: Callable[[Any], None], patches: Patches) -> None:
    """Replace the names of the samplers in the pipeline's module by factories that show what they make."""

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            sampler = original(*args, **kwargs)
            on_sampler(sampler)
            return sampler

        return create

    for name in SAMPLERS:
        if hasattr(module, name):
            patches.set(module, name, factory)


def _ranks() -> int:
    """Upstream gives all ranks one video, so they all share the trajectory."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _generate(
    original: Callable[..., Any], pipe: Any, cache: StepCache, model: str | None, made: list[Any]
) -> Callable[..., Any]:
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs)
        call.apply_defaults()
        steps, shift, guidance = (call.arguments[n] for n in ("sampling_steps", "shift", "guide_scale"))
        made.clear()
        run = Trajectory(int(steps), model, float(shift), float(guidance), response=lambda: response(made[-1]))
        cache.begin(run)
        patches = Patches()
        try:
            _install(pipe.model, cache, patches)
            return original(*args, **kwargs)
        finally:
            patches.restore()
            cache.end()

    return generate


def _install(model: Any, cache: StepCache, patches: Patches) -> None:
    """Enter `model(x, t=, context=, ...)`: x a list of one latent (C, F, H, W), the result likewise."""
    stack = BlockStack(cache, list(model.blocks), patches) if cache.boundary == "blocks" else None
    entrance = Entrance(cache, stack)

    def enter(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
            context = kwargs["context"]
            return entrance(original, (x, *args), kwargs, x, id(context), context)

        return call

    patches.enter(model, enter)
    inner = getattr(model, "_fsdp_wrapped_module", model)
    if stack is not None and hasattr(inner, "forward_vace"):  # VACE's own blocks feed only those that are skipped

        def hints(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *a, **k: original(*a, **k) if stack.call is None or stack.call.compute else None

        patches.set(inner, "forward_vace", hints)
