"""stepcache in any code that calls a denoiser as a module: `denoiser(x, t, ...)`.

    with stepcache.attach(model, Uniform(budget=15), sample="x", timestep="timestep", num_steps=30) as run:
        video = scheduler.sample(model, ...)
    print(run.summary())

One call is one step, unless `condition` names the argument that tells branches apart (prompt and empty prompt in calls
of their own); then a step ends when a branch comes round again.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from stepcache.core.cache import Policy, StepCache
from stepcache.core.plan import Plan
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.hindsight.response import response
from stepcache.hosts.entering import BlockStack, Entrance, Method, Patches, inside
from stepcache.methods.fixed import as_policy


class Attached:
    """A module with a cache; also a context manager that detaches on exit."""

    def __init__(self, cache: StepCache, patches: Patches, run: Trajectory) -> None:
        self.cache, self.run, self._patches = cache, run, patches

    def restart(self) -> None:
        """Begin a new trajectory with the next call, e.g. after an abort that the timestep does not show."""
        self.cache.begin(self.run)

    def summary(self) -> RunSummary:
        """What the last trajectory (or the one under way) did."""
        return self.cache.summary()

    def detach(self) -> None:
        """Restore the module exactly and free the cache; the summary stays."""
        self._patches.restore()
        self.cache.end()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(
    module: torch.nn.Module,
    policy: Policy | Plan,
    *,
    sample: str,
    num_steps: int,
    timestep: str | None = None,
    condition: str | None = None,
    blocks: list[torch.nn.Module] | None = None,
    streams: tuple[str, ...] = ("x",),
    model: str | None = None,
    scheduler: Any = None,
    cache_device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Attached:
    """Put a cache around `module(...)` until `detach`.

    Args:
        module: the denoiser, entered on the instance; its class and other instances stay as they are. The code that
            receives its outputs must not write into them.
        policy: a method with its settings, or a `Plan`.
        sample: name of the argument of `module.forward` that holds the noisy latent.
        num_steps: steps of the sampling loop.
        timestep: name of the argument that holds the timestep. Given, a step ends when it changes, and a trajectory
            begins when it is back where the last one began (a run that was aborted); reading it costs one
            synchronisation a call on a GPU.
        condition: name of the argument whose identity tells branches apart; default: one branch. Tensors that are
            made anew at every call are recognised by their content, if `timestep` is given too.
        blocks: the block list, for boundary "blocks".
        streams: names of the arguments that a block takes and returns, the first of them the tokens.
        model: name under which published figures are looked up and plans are checked.
        scheduler: the sampler that steps with the outputs (a diffusers scheduler, or one with its `timesteps` and
            `step`); its timesteps must be set when the loop begins. Known, plans may look back (`Plan.hindsight`).
        cache_device: where cached tensors live between steps; default: where they are made.
        group: process group of the ranks that work on one trajectory together.

    Raises:
        ValueError: no such argument, the policy does not fit, or it asks for "blocks" and none are given.
    """
    policy = as_policy(policy)
    names = list(inspect.signature(inside(module).forward).parameters)
    for given in (sample, timestep, condition):
        if given is not None and given not in names:
            raise ValueError(
                f"{type(module).__name__}.forward has no argument {given!r}; its arguments are {', '.join(names)}."
            )
    cache, patches = StepCache(policy, cache_device=cache_device, group=group), Patches()
    if cache.boundary == "blocks" and not blocks:
        raise ValueError("boundary blocks needs the block list: attach(..., blocks=list(module.blocks)).")
    run = Trajectory(num_steps, model, response=None if scheduler is None else lambda: response(scheduler))
    cache.begin(run)
    stack = BlockStack(cache, blocks, patches, streams) if blocks and cache.boundary == "blocks" else None
    entrance, clock = Entrance(cache, stack), _Clock()

    def enter(original: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            known = {**dict(zip(names, args, strict=False)), **kwargs}
            if timestep is not None:
                clock.see(known[timestep], cache, run, alone=condition is None)
            tensors = pytree.tree_leaves(known.get(condition)) if condition else []
            holder = tensors[0] if tensors else None
            key = "all" if holder is None else id(holder)
            try:
                return entrance(original, args, kwargs, known[sample], key, holder)
            except BaseException:  # the loop is over; the next call begins another
                clock.first = None
                cache.begin(run)
                raise

        return call

    patches.enter(module, enter)
    return Attached(cache, patches, run)


class _Clock:
    """Reads steps and trajectories off the timesteps of successive calls."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0

    def see(self, timestep: Any, cache: StepCache, run: Trajectory, *, alone: bool) -> None:
        """Take the timestep of the next call, a number or a tensor of equal ones."""
        value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        if self.first is None:
            self.first = value
        elif value == self.last and alone:
            warnings.warn(
                "two calls at one timestep are taken as two steps; if they are guidance's two branches, name the "
                "argument that tells them apart (condition=...).",
                stacklevel=4,
            )
        elif value != self.last and (value - self.first) * (self.first - self.last) >= 0 and self.last != self.first:
            cache.begin(run)  # back at the start, or before it
            self.first = value
        elif value != self.last:
            cache.step_over()
        self.last = value
