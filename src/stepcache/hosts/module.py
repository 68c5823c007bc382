"""stepcache in any code that calls a denoiser as a module: `denoiser(x, t, ...)`.

    with stepcache.attach(model, Hindsight(15), sample="x", num_steps=30, scheduler=scheduler, guidance=5.0) as run:
        video = sample(model, scheduler, ...)
    print(run.summary())

A step ends when the scheduler takes its step. Without a scheduler it ends when the timestep changes; without either,
when a branch is called again (one call a step, unless `condition` distinguishes branches).
"""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from stepcache.core.cache import StepCache
from stepcache.core.plan import Plan
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.entering import Method
from stepcache.hosts.patching import (
    Branches,
    ForeignBlockStack,
    LastingPatches,
    TreeEntrance,
    at_sampler,
    device_from,
    first_tensor,
    inside,
    shift_of,
)
from stepcache.named import named


class Attached:
    """A module with a cache; also a context manager that detaches on exit."""

    def __init__(self, cache: StepCache, patches: LastingPatches, run: Trajectory, branches: Branches) -> None:
        self.cache, self.run, self._patches, self._branches = cache, run, patches, branches

    def restart(self) -> None:
        """Begin a new run with the next call, e.g. after an abort that nothing else shows."""
        self._branches.clear()
        self.cache.begin(self.run)

    def summary(self) -> RunSummary:
        """What the last run (or the one under way) did."""
        return self.cache.summary()

    def detach(self) -> None:
        """Restore module and scheduler exactly and free the cache; the summary stays."""
        self._patches.restore()
        self.cache.end()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(
    module: torch.nn.Module,
    policy: Policy | Plan | str,
    *,
    sample: str,
    num_steps: int,
    timestep: str | None = None,
    condition: str | None = None,
    scheduler: Any = None,
    guidance: float | None = None,
    blocks: list[torch.nn.Module] | None = None,
    streams: tuple[str, ...] = ("x",),
    model: str | None = None,
    cache_device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Attached:
    """Put a cache around `module(...)` until `detach`.

    Args:
        module: the denoiser, entered on the instance; its class and other instances stay as they are.
        policy: a method with its settings, a plan file, a `Plan`, or a name such as
            "hindsight:25" (`stepcache.named`).
        sample: name of the argument of `module.forward` that holds the noisy latent.
        num_steps: steps of the sampling loop.
        timestep: name of the argument that holds the timestep. A step ends when it changes, and a run begins when it
            is back where the last one began (one that was aborted); reading it costs one synchronisation a call on a
            GPU. Timesteps that repeat need the scheduler instead.
        condition: name of the argument whose identity or content distinguishes branches; default: their order.
        scheduler: the sampler that steps with the outputs (a diffusers scheduler, or one with its `timesteps` and
            `step(model_output, ...)`). It ends steps, new timesteps begin a run, plans are checked against it, and
            `Hindsight` acts at its `step`.
        guidance: the guidance scale that mixes the branches; 1 where there is none. Plans are checked against it.
        blocks: the block list, for boundary "blocks".
        streams: names of the arguments that a block takes and returns, the first of them the tokens.
        model: name under which published figures are looked up and plans are checked.
        cache_device: where cached tensors are held between steps; default: where they are made.
        group: process group of the ranks that work on one run together.

    Raises:
        ValueError: no such argument, the policy does not fit, it asks for "blocks" and none are given, or for the
            sampler and there is none.
    """
    policy = named(policy)
    names = list(inspect.signature(inside(module).forward).parameters)
    for given in (sample, timestep, condition):
        if given is not None and given not in names:
            raise ValueError(
                f"{type(module).__name__}.forward has no argument {given!r}; its arguments are {', '.join(names)}."
            )
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}; expected a finite number, 1 for none.")
    rounds = scheduler is None and timestep is None
    cache = StepCache(policy, cache_device=device_from(cache_device), group=group, rounds=rounds)
    patches = LastingPatches()
    if cache.boundary == "blocks" and not blocks:
        raise ValueError("boundary blocks needs the block list: attach(..., blocks=list(module.blocks)).")
    host = _Host(cache, num_steps, model, scheduler, guidance)
    if cache.strategy.predicts_guided and scheduler is None:
        raise ValueError(f"{policy} forecasts what the sampler gets; name it: attach(..., scheduler=scheduler).")
    with ExitStack() as failed:
        failed.callback(patches.restore)
        _enter(module, names, host, patches, (sample, timestep, condition), blocks, streams)
        failed.pop_all()
    return Attached(cache, patches, host.run, host.branches)


def _enter(
    module: torch.nn.Module,
    names: list[str],
    host: _Host,
    patches: LastingPatches,
    arguments: tuple[str, str | None, str | None],
    blocks: list[torch.nn.Module] | None,
    streams: tuple[str, ...],
) -> None:
    """Hook the model call and the sampler step; ValueError if another cache is there."""
    cache, (sample, timestep, condition) = host.cache, arguments
    stack = ForeignBlockStack(cache, blocks, patches, streams) if blocks and cache.boundary == "blocks" else None
    entrance = TreeEntrance(cache, stack)

    def enter(original: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            known = {**dict(zip(names, args, strict=False)), **kwargs}
            host.see(None if timestep is None else known[timestep])
            found = first_tensor(known.get(condition)) if condition else None
            branch = "all" if found is None else host.branches.name(found)
            try:
                return entrance.enter(original, args, kwargs, known[sample], branch)
            except BaseException:  # the loop is over; the next call begins another
                host.aborted()
                raise

        return call

    patches.enter(module, enter)
    if host.scheduler is not None:
        patches.set(host.scheduler, "step", host.at_sampler)


class _Host:
    """Finds runs and steps: by the scheduler, by the timesteps of successive calls, or not at all."""

    def __init__(
        self,
        cache: StepCache,
        num_steps: int,
        model: str | None,
        scheduler: Any,
        guidance: float | None,
    ) -> None:
        self.cache, self.scheduler, self.branches = cache, scheduler, Branches()
        self.timesteps: Any = None
        self.first: float | None = None
        self.last = 0.0
        if scheduler is None:
            self.run = Trajectory(num_steps, model, guidance=guidance)
        else:
            config = getattr(scheduler, "config", {})
            shift = shift_of(config)
            self.run = Trajectory(
                num_steps,
                model,
                None if shift is None else float(shift),
                guidance,
                scheduler=type(scheduler).__name__,
                sampler=scheduler,
            )
        cache.begin(self.run)

    def see(self, timestep: Any) -> None:
        """A call is about to be made: did a step end, or a run begin?"""
        if self.scheduler is not None:
            if self.scheduler.timesteps is not self.timesteps:
                self.timesteps = self.scheduler.timesteps
                self._begin()
        elif timestep is not None:
            self._read(timestep)

    def aborted(self) -> None:
        """The run under way is over."""
        self.first = None
        self._begin()

    def _begin(self) -> None:
        self.branches.clear()
        if self.scheduler is None:
            self.cache.begin(self.run)
        else:  # its timesteps are set by now
            timesteps = tuple(float(t) for t in self.scheduler.timesteps)
            self.cache.begin(replace(self.run, timesteps=timesteps))

    def at_sampler(self, original: Method) -> Method:
        """What the scheduler's `step` becomes."""

        def step(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = at_sampler(self.cache, args, kwargs)
            if self.cache.finished:
                self.branches.clear()  # the prompts are no longer needed
            return original(*args, **kwargs)

        return step

    def _read(self, timestep: Any) -> None:
        """Take the timestep of the next call, a number or a tensor of equal ones."""
        value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        if self.first is None:
            self.first = value
        elif value != self.last and (value - self.first) * (self.first - self.last) >= 0 and self.last != self.first:
            self._begin()  # back at the start, or before it
            self.first = value
        elif value != self.last:
            self.cache.step_over()
        self.last = value
