"""StepCache: the cache of a run, and whether a call of the transformer is computed or skipped.

A host (see `hosts/`) hooks two places. At the model call it asks `enter` whether to compute or skip; then it
evaluates the model and gives the result to `keep`, or returns what `predict` gives. At the sampler step it calls
`step_over` with the guided output of the step, and passes the result to the sampler. The host knows the model and
names its branches; the strategy knows the method; this module knows neither.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stepcache.core.strategy import Call, Policy, Strategy
from stepcache.core.summary import RunSummary, timestamp
from stepcache.core.tensors import arrived
from stepcache.core.trajectory import BOUNDARIES, Boundary, Trajectory


@dataclass
class _Branch:
    """One conditioning stream: its cached features, newest first, with their steps."""

    kept: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    owner: Hashable = None
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None  # of its outputs; `None`: not evaluated yet as it is now
    last_step: int = -1


class StepCache:
    """The cache of one pipeline for one policy.

    Args:
        policy: decides; a method with its settings, or a plan file.
        boundary: "output" (the whole call is predicted) or "blocks" (the residual of the block stack is); default:
            the policy's.
        cache_device: where features are held between steps; default: where they were made.
        group: ranks that share a run, as a process group: decisions that depend on tensors are put to a vote (one rank
            for computing is enough). `None`: this process decides alone.
        rounds: the host sees no sampler, so a branch that is called again ends a step, and the call after the last
            step begins a new run. Otherwise the host calls `step_over` and `begin`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        boundary: Boundary | None = None,
        cache_device: torch.device | str | None = None,
        group: Any = None,
        rounds: bool = False,
    ) -> None:
        self.boundary: Boundary = boundary or policy.boundary
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary is {self.boundary!r}; expected one of {', '.join(BOUNDARIES)}.")
        self.policy, self.cache_device, self.group, self.rounds = policy, cache_device, group, rounds
        self._start(Trajectory(0), Strategy())

    def begin(self, run: Trajectory) -> None:
        """Start a run: forget all of the last one, check the policy against this one (ValueError)."""
        run = replace(run, boundary=self.boundary)
        strategy = self.policy.begin(run)
        if strategy.predicts_guided and self.boundary != "output":
            raise ValueError(f"{self.policy} forecasts the guided output; boundary {self.boundary} has no effect.")
        strategy.cache_device, strategy.group = self.cache_device, self.group
        self._start(run, strategy)

    def _start(self, run: Trajectory, strategy: Strategy) -> None:
        self.run, self.strategy = run, strategy
        self.log = RunSummary(str(self.policy), self.boundary, run, strategy)
        self._branches: dict[str, _Branch] = {}
        self._visited: dict[str, int] = {}  # branch -> its calls in this step
        self._step, self._over, self._decision, self._whole = -1, True, True, True
        self._owner: Hashable = None
        self._shapes: tuple[set[torch.Size], set[torch.Size]] = set(), set()  # inputs of the last step, of this one

    def end(self) -> None:
        """Free all tensors; the summary of the run stays readable."""
        self._branches.clear()
        self.strategy.release()
        self.run = replace(self.run, sampler=None)

    def enter(
        self, branch: str, x: torch.Tensor, *, latent: torch.Tensor | None = None, owner: Hashable = None
    ) -> Call:
        """Take the next call of the transformer.

        Args:
            branch: the branch's name. Several calls of one branch in a step (windows, tiles) are branches of their own.
            x: what is fed to the model.
            latent: the part of it that is the latent's own, without condition channels or tokens; default: all.
            owner: which transformer is entered, where the steps are divided among several.
        """
        begin = timestamp(x)
        if self._over or (self.rounds and branch in self._visited):
            self._next_step(x if latent is None else latent, owner)
        leader, count = not self._visited, self._visited.get(branch, 0) + 1
        self._visited[branch] = count
        name = branch if count == 1 else f"{branch} #{count}"
        state = self._branches.setdefault(name, _Branch())
        self._shapes[1].add(x.shape)
        if self._step and x.shape not in self._shapes[0]:
            self.log.changed.add(self._step)
            self.strategy.reshaped()
        if (state.shape, state.owner) != (x.shape, owner):
            state.kept, state.dtype = [], None
        state.last_step, state.shape, state.owner = self._step, x.shape, owner
        able = self.strategy.can_predict(self._step, [node for node, _ in state.kept], state.dtype is not None)
        compute = self._decision or not able
        self._whole &= compute
        self.log.call(self._step, name, compute, compute and not self._decision)
        return Call(self._step, name, compute, leader, self._step >= self.run.num_steps - 1, begin)

    def _next_step(self, latent: torch.Tensor, owner: Hashable) -> None:
        if self.rounds and self._step == self.run.num_steps - 1:
            self.begin(self.run)
        handover, self._step = self._step >= 0 and owner != self._owner, self._step + 1
        self._visited, self._over, self._whole, self._owner = {}, False, True, owner
        self._shapes = (self._shapes[1], set())
        self._decision = self._step >= self.run.num_steps  # more rows than timesteps, or somebody else's loop
        if self._decision:
            return
        if handover:  # the new transformer has nothing to reuse: its part begins with an evaluation
            self.strategy.handover()
        for state in self._branches.values():  # guidance switched off, or left to another transformer: free it
            if state.last_step < self._step - 1:
                state.kept = []
        self._decision = self.strategy.compute(self._step, latent) or handover

    def keep(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> None:
        """Keep what the strategy wants of an evaluation.

        Args:
            call: as `enter` gave it.
            x: the input; at boundary blocks the tokens before the block stack.
            output: of the model; at boundary blocks the stack's residual.
        """
        state = self._branches.get(call.branch)
        if state is None or call.step >= self.run.num_steps:
            return
        output = arrived(output)
        state.dtype = output.dtype
        self.log.finite.append((call.step, output.sum(dtype=torch.float32).isfinite()))  # read later: no waiting
        feature = self.strategy.feature(call, x, output)
        if feature is not None:
            held = feature if self.cache_device is None else feature.to(self.cache_device, non_blocking=True)
            alike = [(step, other) for step, other in state.kept if other.shape == held.shape]
            state.kept = [(call.step, held), *alike][: self.strategy.history]
        elif call.last:
            state.kept = []
        self._weigh()

    def predict(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """The output of a skipped call, or the residual of its block stack; a tensor of the caller's own."""
        state = self._branches[call.branch]
        kept = [feature.to(x.device, non_blocking=True) for _, feature in state.kept]
        output = self.strategy.predict(call, kept, x)
        if any(output is feature for feature in kept):
            output = output.clone()  # whoever receives it may write into it
        if call.last:
            state.kept = []
        return output.to(state.dtype or output.dtype)

    def leave(self, call: Call, x: torch.Tensor) -> None:
        """The call is over; `x` is on the device it ran on."""
        self.log.spans.append((call.compute, call.step, call.begin, timestamp(x)))

    def step_over(self, output: torch.Tensor | None = None, sampler: Any = None) -> torch.Tensor | None:
        """The sampler step: the current step is over, the next call belongs to the next one.

        Args:
            output: its guided output, as the pipeline gives it to the sampler.
            sampler: which one, where a step has several; default: the run's.

        Returns:
            what the sampler gets instead of `output`.
        """
        if output is not None and self.strategy.predicts_guided and 0 <= self._step < self.run.num_steps:
            begin = timestamp(output)
            output = self.strategy.guided(self._step, output, self._whole, sampler or self.run.sampler)
            self.log.spans.append((self._whole, self._step, begin, timestamp(output)))
            self._weigh()
        self._over = True
        return output

    @property
    def finished(self) -> bool:
        """Whether the last step of the run is over."""
        return self._over and self._step >= self.run.num_steps - 1

    def summary(self) -> RunSummary:
        """What the current or last run did so far."""
        return self.log

    def _weigh(self) -> None:
        kept = [feature for state in self._branches.values() for _, feature in state.kept]
        self.log.hold(kept + self.strategy.tensors())
