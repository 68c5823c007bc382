"""StepCache: what is remembered of a run, and whether a call of the transformer is computed or skipped.

A host (see `hosts/`) stands at two doors. At the model's door it asks `enter` for every call: compute or skip? Then it
evaluates the model and gives the result to `keep`, or takes what `predict` gives. At the sampler's door it shows the
guided output of every step to `guide` and says `step_over`. The host knows the model and names its branches; the
policy knows the method; this module knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from stepcache.core.strategy import Call, Policy, Strategy
from stepcache.core.summary import BranchSummary, Log, RunSummary, timestamp
from stepcache.core.tensors import arrived, as_float, narrow
from stepcache.core.trajectory import BOUNDARIES, Boundary, Trajectory


@dataclass
class _Branch:
    """One conditioning stream: what is kept of it, newest first, with the steps it is of."""

    kept: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    owner: Hashable = None
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None
    last_step: int = -1


class StepCache:
    """The cache of one pipeline for one policy.

    Args:
        policy: decides; a method with its settings, or a plan file.
        boundary: "output" (the whole call is predicted) or "blocks" (the residual of the block stack is); default:
            the policy's.
        cache_device: where features live between steps; default: where they were made.
        group: ranks that share a trajectory, as a process group; decisions that depend on data are put to the vote
            there (one rank for computing is enough). `None`: this process decides alone.
        rounds: the host sees no sampler, so a branch that comes round again ends a step, and the call after the last
            step begins a new run. Otherwise the host says `step_over` and `begin`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        boundary: Boundary | None = None,
        cache_device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
        rounds: bool = False,
    ) -> None:
        self.boundary: Boundary = boundary or policy.boundary
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary is {self.boundary!r}; expected one of {', '.join(BOUNDARIES)}.")
        try:
            self.cache_device = None if cache_device is None else torch.device(cache_device)
        except RuntimeError as error:
            raise ValueError(f"cache_device is {cache_device!r}; expected a device such as cpu or cuda:1.") from error
        self.policy, self.group, self.rounds = policy, group, rounds
        self.run: Trajectory | None = None
        self.strategy: Strategy | None = None
        self._clear()

    def _clear(self) -> None:
        self.log = Log()
        self._branches: dict[str, _Branch] = {}
        self._visited: dict[str, int] = {}
        self._step, self._planned, self._decision, self._over = -1, True, True, False
        self._owner: Hashable = None
        self._scheduled: list[int] = []  # steps that were computed by decision
        self._computed = True  # every call of the step so far
        self._inputs: dict[Hashable, None] = {}  # what the calls of this step looked like, and
        self._known: dict[Hashable, None] = {}  # those of the last step that was computed as a whole
        self._streams: set[Hashable] = set()  # samplers of the step before, and
        self._guided: set[Hashable] = set()  # those of this one that have had their guided output
        self._lost = ""  # why the rest of the run is computed
        self._about: Strategy | None = None  # what the summary tells of, also when the run is over
        self._said: tuple[str, ...] = ()

    def begin(self, run: Trajectory) -> None:
        """Start a run: forget all of the last one, check the policy against this one (ValueError)."""
        self._clear()
        self.run = replace(run, boundary=self.boundary)
        self.strategy = self.policy.begin(self.run)
        self.strategy.cache_device = self.cache_device
        if self.strategy.predicts_guided and self.boundary != "output":
            raise ValueError(f"{self.policy} forecasts the guided output; boundary {self.boundary} has no effect.")
        self._about = self.strategy

    def end(self) -> None:
        """Free all tensors; the summary of the run stays readable."""
        self._branches.clear()
        if self.strategy is not None:
            self._said = self.strategy.warnings()
        self.strategy = None

    def enter(self, branch: str, x: torch.Tensor, *, own: torch.Size | None = None, owner: Hashable = None) -> Call:
        """Take the next call of the transformer.

        Args:
            branch: the branch's name. Several calls of one branch in a step (windows, tiles) are branches of their own.
            x: what is fed to the model; condition channels or tokens may follow the latent's own.
            own: the shape of the latent without them, if it is smaller.
            owner: which transformer is entered, where the steps are divided among several.
        """
        if self.run is None:
            raise RuntimeError("StepCache.enter was called before StepCache.begin; the host must announce the run.")
        start, final = timestamp(x), self.run.num_steps - 1
        ended = self._over or self._step < 0 or (self.rounds and branch in self._visited)
        if ended and self._step == final and self.rounds:
            self.begin(self.run)
        strategy = self.strategy
        if strategy is None or (ended and self._step == final and not self.rounds):
            self.log.beyond += 1
            return Call(final + 1, branch, True, True, False, False, True, own, start)
        if ended:
            self._next_step(strategy, x, own, owner)
        leader = not self._visited
        count = self._visited[branch] = self._visited.get(branch, 0) + 1
        name = branch if count == 1 else f"{branch} #{count}"
        state = self._branches.setdefault(name, _Branch())
        wanting = not self._decision
        changed = self._renew(state, x, owner)
        forced = wanting and self._lacking(strategy, state, x, owner)
        if changed:
            self.log.changed.append(self._step)
        if forced:
            self.log.forced.append((self._step, name))
        compute = not wanting or forced
        self._computed &= compute
        self._inputs[(owner, x.shape, x.dtype)] = None
        self.log.call(self._step, name, compute)
        last = self._step == final
        return Call(self._step, name, compute, forced, self._planned, leader, last, own, start)

    def _next_step(self, strategy: Strategy, x: torch.Tensor, own: torch.Size | None, owner: Hashable) -> None:
        handover = self._step >= 0 and owner != self._owner
        if self._computed and self._step >= 0:
            self._known = self._inputs
        self._step += 1
        self._visited, self._inputs, self._over, self._computed = {}, {}, False, True
        self._streams, self._guided = self._guided, set()
        self._owner = owner
        if handover:  # the new transformer has nothing to reuse: its part begins with an evaluation
            strategy.handover()
        for state in self._branches.values():  # guidance switched off, or left to another transformer: free it
            if state.last_step < self._step - 1:
                state.kept.clear()
        self._planned = self._agree(strategy, narrow(x, own))
        self._decision = self._planned or handover or bool(self._lost)
        if self._planned:
            self._scheduled.append(self._step)

    def _renew(self, state: _Branch, x: torch.Tensor, owner: Hashable) -> bool:
        """Note what a branch looks like now; whether its shape changed, so that what is kept is of no use."""
        changed = state.shape is not None and state.shape != x.shape
        if changed or state.owner != owner:
            state.kept.clear()
        state.last_step, state.shape, state.owner = self._step, x.shape, owner
        return changed

    def _lacking(self, strategy: Strategy, state: _Branch, x: torch.Tensor, owner: Hashable) -> bool:
        """Whether there is nothing to predict a skipped call from."""
        if strategy.predicts_guided:
            return (owner, x.shape, x.dtype) not in self._known
        count = strategy.needs(self._step)
        wanted, nodes = self._scheduled[: -count - 1 : -1], [node for node, _ in state.kept[:count]]
        if count == 1:  # computed for want of a feature since then: newer than wanted is as good
            return not nodes or nodes[0] < wanted[0]
        return nodes != wanted

    def keep(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> None:
        """Keep what an evaluation gave: latents in and out, or tokens before and after the block stack.

        Raises:
            ValueError: the policy reuses output minus input, and the two are not alike.
        """
        strategy, state = self.strategy, self._branches.get(call.branch)
        if strategy is None or state is None:
            return  # beyond the run's last step
        output = arrived(output)
        self.log.see(call.step, output)
        if strategy.predicts_guided:
            return
        x = narrow(x, output.shape) if self.boundary == "output" else x
        if self._relative(strategy) and x.shape != output.shape:
            raise ValueError(
                f"{self.policy} reuses the difference of output and input, but this model maps {tuple(x.shape)} to "
                f"{tuple(output.shape)}; use a policy that reuses the output itself, such as lemica."
            )
        feature = None
        # Weights over several outputs were made for the planned steps: others would only stand between them.
        wanted = strategy.history == 1 or (strategy.history > 1 and call.planned)
        if wanted and not call.last:
            # A copy: the pipeline may write into the output, and a captured CUDA graph certainly will.
            feature = as_float(output) - as_float(x) if self._relative(strategy) else output.detach().clone()
            if self.cache_device is not None:
                feature = feature.to(self.cache_device, non_blocking=True)
        own = call.own if self.boundary == "output" else None
        kept = None if feature is None else narrow(feature, own)
        strategy.observe(call, narrow(x, own), narrow(output, own), kept)
        state.dtype = output.dtype
        if feature is not None:
            state.kept[:] = [(call.step, feature), *state.kept][: strategy.history]
        elif call.last:
            state.kept.clear()
        self._weigh(strategy)

    def predict(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """The output of a skipped call, or the tokens after the block stack; a tensor of the caller's own."""
        strategy, state = self.strategy, self._branches[call.branch]
        if strategy is None:
            raise RuntimeError("this call belongs to a run that has ended.")
        kept = [feature.to(x.device, non_blocking=True) for _, feature in state.kept[: strategy.needs(call.step)]]
        output = strategy.predict(call, kept, x)
        if self._relative(strategy):
            output = (narrow(x, output.shape) if self.boundary == "output" else x) + output
        elif any(output is feature for _, feature in state.kept):
            output = output.clone()  # whoever receives it may write into it
        if call.last:
            state.kept.clear()
        self._weigh(strategy)
        return output if state.dtype is None else output.to(state.dtype)

    def leave(self, call: Call, x: torch.Tensor) -> None:
        """The call is over; `x` is on the device it ran on. Only times are taken here."""
        if self.run is not None and call.step < self.run.num_steps:
            self.log.spans.append((call.compute, call.step, call.start, timestamp(x)))

    def guide(
        self, output: torch.Tensor, stream: Hashable = "", response: Callable[[], Any] | None = None
    ) -> torch.Tensor:
        """The sampler's door: what a sampler gets instead of the guided output of the step under way.

        Args:
            output: the guided output, as the pipeline hands it to the sampler.
            stream: which sampler, where one step has several.
            response: gives that sampler's linear response; default: the run's.
        """
        strategy, run = self.strategy, self.run
        if strategy is None or run is None or self._step < 0 or not strategy.predicts_guided:
            return output
        if stream in self._guided:
            self._lost = "the sampler takes several steps for one evaluation"
            return output
        self._guided.add(stream)
        guided = strategy.guided(self._step, output, self._computed, stream, response or run.response)
        self._weigh(strategy)
        return guided

    def step_over(self) -> None:
        """The sampler took its step: the next call belongs to the next one. Frees all after the last."""
        self._over = True
        final = self.run is not None and self._step == self.run.num_steps - 1
        if final and not (self._streams - self._guided):
            self.end()

    def summary(self) -> RunSummary:
        """What the current or last run did so far."""
        strategy, run, log = self._about, self.run, self.log
        said = self._said if self.strategy is None else self.strategy.warnings()
        num_steps = run.num_steps if run else 0
        loop, computed, skipped = log.times()
        lost = (f"{self._lost}; the rest of the run was computed",) if self._lost else ()
        return RunSummary(
            policy=str(self.policy),
            boundary=self.boundary,
            num_steps=num_steps,
            branches=tuple(BranchSummary(n, tuple(c), tuple(s)) for n, (c, s) in log.branches.items()),
            forced=tuple(log.forced),
            loop_seconds=loop,
            seconds_per_computed_step=computed,
            seconds_per_skipped_step=skipped,
            cache_bytes=log.peak_bytes,
            warnings=(
                *(run.remarks if run else ()),
                *log.warnings(num_steps, strategy is None or strategy.skips),
                *lost,
                *said,
            ),
            plan=strategy.plan if strategy else None,
            notes=strategy.notes if strategy else (),
        )

    def _weigh(self, strategy: Strategy) -> None:
        kept = [feature for state in self._branches.values() for _, feature in state.kept]
        self.log.hold(kept + strategy.tensors())

    def _relative(self, strategy: Strategy) -> bool:
        return self.boundary == "blocks" or strategy.relative

    def _agree(self, strategy: Strategy, x: torch.Tensor) -> bool:
        compute = strategy.compute(self._step, x)
        if self.group is not None and strategy.data_dependent:
            vote = torch.tensor([int(compute)], device=x.device)
            dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.group)
            compute = bool(vote.item())
        return compute
