"""stepcache in any code that calls a denoiser as a module: `denoiser(x, t, ...)`.

    with stepcache.attach(model, Uniform(budget=15), sample="x", timestep="timestep", num_steps=30) as run:
        video = scheduler.sample(model, ...)
    print(run.summary())

One call is one step, unless `condition` names the argument that tells branches apart (prompt and empty prompt in calls
of their own); then a step ends when a branch comes round again.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from stepcache.cache import Policy, RunSummary, StepCache
from stepcache.hosts.patching import BlockStack, Entrance, Method, Patches
from stepcache.plan import Plan, Trajectory
from stepcache.policies.fixed import as_policy


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
    cache_device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Attached:
    """Put a cache around `module(...)` until `detach`.

    Args:
        module: the denoiser, entered on the instance; its class and other instances stay as they are.
        policy: a method with its settings, or a `Plan`.
        sample: name of the argument of `module.forward` that holds the noisy latent.
        num_steps: steps of the sampling loop.
        timestep: name of the argument that holds the timestep. Given, a trajectory also begins when it turns round
            (a run that was aborted); reading it costs one synchronisation a call on a GPU.
        condition: name of the argument whose identity tells branches apart; default: one branch.
        blocks: the block list, for boundary "blocks".
        streams: names of the arguments that a block takes and returns, the first of them the tokens.
        model: name under which published figures are looked up and plans are checked.
        cache_device: where cached tensors live between steps; default: where they are made.
        group: process group of the ranks that work on one trajectory together.

    Raises:
        ValueError: no such argument, the policy does not fit, or it asks for "blocks" and none are given.
    """
    policy = as_policy(policy)
    names = list(inspect.signature(module.forward).parameters)
    for given in (sample, timestep, condition):
        if given is not None and given not in names:
            raise ValueError(
                f"{type(module).__name__}.forward has no argument {given!r}; its arguments are {', '.join(names)}."
            )
    cache, patches = StepCache(policy, cache_device=cache_device, group=group), Patches()
    if cache.boundary == "blocks" and not blocks:
        raise ValueError("boundary blocks needs the block list: attach(..., blocks=list(module.blocks)).")
    run = Trajectory(num_steps, model)
    cache.begin(run)
    stack = BlockStack(cache, blocks, patches, streams) if blocks and cache.boundary == "blocks" else None
    entrance, turn = Entrance(cache, stack), _Turn()

    def enter(original: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            known = {**dict(zip(names, args, strict=False)), **kwargs}
            if timestep is not None and turn.seen(known[timestep]):
                cache.begin(run)
            tensors = pytree.tree_leaves(known.get(condition)) if condition else []
            holder = tensors[0] if tensors else None
            return entrance(original, args, kwargs, known[sample], "all" if holder is None else id(holder), holder)

        return call

    patches.enter(module, enter)
    return Attached(cache, patches, run)


class _Turn:
    """Notices when a monotonous sequence of timesteps starts again."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._direction = 0

    def seen(self, timestep: Any) -> bool:
        """Whether `timestep` (a number or a tensor of equal ones) begins a new sequence."""
        value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        change = 0 if self._last is None or value == self._last else (1 if value > self._last else -1)
        self._last = value
        turned = change != 0 and self._direction not in (0, change)
        self._direction = 0 if turned else (change or self._direction)
        return turned
