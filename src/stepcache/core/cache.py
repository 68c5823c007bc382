"""StepCache: what one transformer remembers during a run, and whether it is evaluated or predicted.

A host (see `hosts/`) puts a StepCache where a model is entered. For every call it asks `enter`: which step and branch
is this, compute or reuse? Then it either evaluates the model and hands the result to `keep`, or takes `predict`.
The host knows the model; the policy knows the method; this module knows neither.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from stepcache.core.plan import Plan
from stepcache.core.summary import RunSummary, _summarise, timestamp
from stepcache.core.trajectory import BOUNDARIES, Boundary, Trajectory
from stepcache.hindsight.corrector import LookBack
from stepcache.hindsight.selfcheck import Increment, SelfCheck

MAX_BRANCHES = 16
"""More conditions than any guidance has in one run."""


class Policy(Protocol):
    """A method with its settings: `begin` makes the decisions for one trajectory."""

    @property
    def boundary(self) -> Boundary:
        """Where reuse is applied unless the host is told otherwise."""
        ...

    def begin(self, run: Trajectory) -> Decider:
        """Check the settings against the run (ValueError) and return fresh state for it."""
        ...


class Decider:
    """What a policy knows and decides during one trajectory. Subclasses override what they need."""

    plan: Plan | None = None
    relative = False
    """At the `output` boundary: cache output minus input and add the new input, instead of repeating the output."""
    data_dependent = False
    """Decisions depend on tensors, so ranks that share the trajectory must agree before acting."""
    history = 1
    """How many past features a branch must keep; 0 if nothing will be reused."""

    def compute(self, step: int, x: torch.Tensor) -> bool:
        """Whether to evaluate the model at `step`; asked once a step, on its first branch, with the latent `x`."""
        raise NotImplementedError

    def weights(self, step: int) -> tuple[float, ...]:
        """Weights of reused step `step` over the kept features, newest first."""
        return (1.0,)

    def recall(self, step: int, branch: str) -> torch.Tensor | None:
        """The output of this call, where it is known from an earlier run (replays do); else `None`."""
        return None

    def observe(self, call: Call, x: torch.Tensor, output: torch.Tensor, kept: torch.Tensor | None) -> None:
        """See an evaluation and what the cache keeps of it (`None` if nothing).

        x and output are what the boundary cuts at: latents, or tokens before and after the block stack.
        """

    def handover(self) -> None:
        """Another transformer takes over (Wan2.2's second expert): what was measured on the first is void."""

    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps, for the memory figure."""
        return []


class FollowPlan(Decider):
    """Decisions that were written down beforehand."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.history = plan, plan.history if plan.reused else 0
        self._computed = frozenset(plan.computed)
        self._weights = dict(plan.weights)

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return step in self._computed

    def weights(self, step: int) -> tuple[float, ...]:
        return self._weights.get(step, (1.0,))


@dataclass(frozen=True)
class Call:
    """One call of the transformer: where it stands in the trajectory and what was decided."""

    step: int
    branch: str
    compute: bool
    forced: bool
    planned: bool
    leader: bool
    last: bool
    start: Any
    recalled: torch.Tensor | None = None


@dataclass(frozen=True)
class _Kept:
    """A feature, the step it is of, and how often it had been written into when it was kept."""

    feature: torch.Tensor
    node: int
    version: int


@dataclass
class _Branch:
    """One conditioning stream: what is kept of it, newest first, and what was done."""

    name: str
    key: Hashable = None
    holder: Any = None
    kept: list[_Kept] = field(default_factory=list)
    owner: Hashable = None
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None
    computed: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    last_step: int = -1
    increment: Increment | None = None

    @property
    def features(self) -> list[torch.Tensor]:
        """The kept tensors, newest first."""
        return [k.feature for k in self.kept]


class StepCache:
    """One transformer's cache for one policy.

    Args:
        policy: decides; a `Plan` decides too.
        boundary: "output" (the whole call is predicted) or "blocks" (the residual of the block stack is); default:
            the policy's.
        cache_device: where features live between steps; default: where they were made.
        group: ranks that share a trajectory, as a process group; decisions that depend on data are put to the vote
            there (one rank for computing is enough). `None`: this process decides alone.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        boundary: Boundary | None = None,
        cache_device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.boundary: Boundary = boundary or policy.boundary
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary is {self.boundary!r}; expected one of {', '.join(BOUNDARIES)}.")
        try:
            self.cache_device = None if cache_device is None else torch.device(cache_device)
        except RuntimeError as error:
            raise ValueError(f"cache_device is {cache_device!r}; expected a device such as cpu or cuda:1.") from error
        self.policy, self.group = policy, group
        self.run: Trajectory | None = None
        self._clear()

    batched = True
    """Whether the first dimension of the latent counts samples; hosts that hand over one sample bare say no."""
    grid: tuple[int, int] | None = None
    """Height and width of a latent that comes as tokens (batch, frames * height * width, channels), if known."""
    own: torch.Size | None
    """Shape of the pipeline's own latent: the output's, or smaller if the host knows better (see `narrow`)."""

    def _clear(self) -> None:
        self._decider: Decider | None = None
        self._branches: list[_Branch] = []
        self._visited: set[str] = set()
        self.own = self.grid = None
        self._step, self._decision, self._planned, self._step_over = -1, True, True, False
        self._owner: Hashable = None
        self._scheduled: list[int] = []  # steps that were computed by decision
        self._forced: list[tuple[int, str]] = []
        self._spans: list[tuple[bool, int, Any, Any]] = []
        self._peak_bytes = 0
        self._plan: Plan | None = None
        self._check: SelfCheck | None = None
        self._back: LookBack | None = None
        self._start: torch.Tensor | None = None
        self._not_back = ""
        self._expects_reuse = True

    def begin(self, run: Trajectory) -> None:
        """Start a trajectory: forget all of the last one, check the policy against this one (ValueError)."""
        self._clear()
        self.run = replace(run, boundary=self.boundary)
        self._decider = self.policy.begin(self.run)
        plan = self._decider.plan
        self._plan = None if plan is None else replace(plan, boundary=self.boundary)
        self._check = SelfCheck(plan.check) if plan is not None and plan.check is not None else None
        self._expects_reuse = self._decider.history > 0 if plan is None else plan.method != "none"

    def end(self) -> None:
        """Free all tensors; the summary of the run stays readable."""
        for branch in self._branches:
            branch.kept.clear()
            branch.holder = branch.increment = None
        self._decider = self._check = self._back = self._start = None

    @property
    def wants_grid(self) -> bool:
        """Whether the run has a use for `grid` and does not know it."""
        return self.grid is None and self._check is not None and bool(self._check.check.bands)

    def step_over(self) -> None:
        """The sampler took its step: the next call belongs to the next one. Hosts that cannot know need not say."""
        self._step_over = True

    def knows_own(self, shape: torch.Size) -> None:
        """The latent that the sampler works on has this shape.

        The output may have condition tokens behind it: shapes (batch, tokens, channels). In grids a smaller latent
        means other things (a first frame that is given), so they are left as they are.
        """
        if self.own and len(shape) == len(self.own) == 3 and all(a <= b for a, b in zip(shape, self.own, strict=True)):
            self.own = shape

    def enter(self, key: Hashable, x: torch.Tensor, *, holder: Any = None, owner: Hashable = None) -> Call:
        """Take the next call of the transformer.

        Args:
            key: the branch's name, or the identity of its conditioning input.
            x: what is fed to the model; condition channels or tokens may follow the latent's own.
            holder: the conditioning input, kept alive so that its identity is not given to another. One that is new
                but equal to a branch's is that branch's: some pipelines make it anew at every step.
            owner: which transformer is entered, where the steps are divided among several.
        """
        if self.run is None:
            raise RuntimeError("StepCache.enter was called before StepCache.begin; the host must announce the run.")
        start = timestamp(x)
        branch = self._find(key, holder)
        ended = self._step_over or (branch is not None and branch.name in self._visited)  # it came round again
        if self._decider is None or (ended and self._step == self.run.num_steps - 1):
            self.begin(self.run)  # the trajectory is complete: this call belongs to a new one
            branch = None
        decider = self._decider
        if decider is None:
            raise RuntimeError("the policy made no decisions for this run.")
        if self._step < 0 or ended:
            self._next_step(decider, x, owner)
        leader = not self._visited
        if leader:
            self._look_back(x)
        if branch is None:
            if len(self._branches) >= MAX_BRANCHES:
                raise ValueError(
                    f"more than {MAX_BRANCHES} different conditions in one run: they seem to be new tensors at every "
                    "call, so branches cannot be told apart; pass the same ones (attach: name the timestep as well)."
                )
            branch = _Branch(self._name(key))
            self._branches.append(branch)
        branch.key, branch.holder = key, holder
        self._visited.add(branch.name)
        last = self._step == self.run.num_steps - 1
        if branch.owner != owner or branch.shape != x.shape:
            branch.kept.clear()
        recalled = decider.recall(self._step, branch.name)
        wanting = not self._decision and recalled is None
        forced = wanting and self._lacking(branch, len(decider.weights(self._step)))
        branch.last_step, branch.shape, branch.owner = self._step, x.shape, owner
        if forced:
            self._forced.append((self._step, branch.name))
        if recalled is not None:
            branch.reused.append(self._step)
            recalled = recalled.to(x.device)
        compute = recalled is None and (self._decision or forced)
        return Call(self._step, branch.name, compute, forced, self._planned, leader, last, start, recalled)

    def _find(self, key: Hashable, holder: Any) -> _Branch | None:
        for branch in self._branches:
            if branch.key == key:
                return branch
        for branch in self._branches:  # two prompts of one step may be equal too: each takes a branch of its own
            if (self._step_over or branch.name not in self._visited) and _equal(branch.holder, holder):
                return branch
        return None

    def _next_step(self, decider: Decider, x: torch.Tensor, owner: Hashable) -> None:
        handover = self._step >= 0 and owner != self._owner
        if handover and self._back is not None:
            self._back.interrupted()
        self._learn()
        self._step += 1
        self._visited.clear()
        self._owner, self._step_over = owner, False
        if handover:  # the new transformer has nothing to reuse: its trajectory begins with an evaluation
            decider.handover()
        for branch in self._branches:  # guidance switched off, or left to another transformer: free it
            if branch.last_step < self._step - 1:
                branch.kept.clear()
        self._planned = self._agree(decider, narrow(x, self.own))
        self._decision = self._planned or handover
        if self._planned:
            self._scheduled.append(self._step)

    def _lacking(self, branch: _Branch, count: int, before: bool = False) -> bool:
        """Whether the branch was absent at one of the `count` computed steps that the reuse is defined on.

        `before`: the steps before the present one, which is computed itself.
        """
        scheduled = self._scheduled[:-1] if before else self._scheduled
        wanted, nodes = scheduled[: -count - 1 : -1], [k.node for k in branch.kept[:count]]
        if count == 1:  # computed for want of a feature since then: newer than wanted is as good
            return not nodes or nodes[0] < wanted[0]
        return nodes != wanted

    def keep(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Keep what an evaluation gave: latents in and out, or tokens before and after the block stack.

        Returns:
            what to hand on: the output itself, unless the plan looks back and something is to be put right.

        Raises:
            ValueError: the policy reuses output minus input, and the two are not alike.
        """
        branch, decider = self._state(call)
        output = _arrived(output)
        feature, x = None, self._like(x, output)
        if self._relative(decider) and x.shape != output.shape:
            raise ValueError(
                f"{self.policy} reuses the difference of output and input, but this model maps {tuple(x.shape)} to "
                f"{tuple(output.shape)}; use a policy that reuses the output itself, such as lemica."
            )
        # Weights over several outputs were made for the planned steps: others would only stand between them.
        wanted = decider.history == 1 or (decider.history > 1 and call.planned)
        if wanted and not call.last:
            feature = _float(output) - _float(x) if self._relative(decider) else output.detach()
            if self.cache_device is not None:
                feature = feature.to(self.cache_device, non_blocking=True)
        if self.boundary == "output":
            self.own = self.own or output.shape
        kept = None if feature is None else narrow(feature, self.own)
        decider.observe(call, narrow(x, self.own), narrow(output, self.own), kept)
        branch.dtype = output.dtype
        branch.computed.append(call.step)
        expected = self._expected(call, branch, decider.weights(call.step), output.device)
        if self._check is not None and feature is not None and call.planned:
            branch.increment = self._compare(branch, decider.weights(call.step), feature.to(output.device))
        if feature is not None:
            branch.kept[:] = [_Kept(feature, call.step, _version(feature)), *branch.kept][: decider.history]
        elif call.last:
            branch.kept.clear()
        output = self._hand_on(call, output, decider.weights(call.step), expected)
        self._weigh(decider)
        return output

    def _expected(
        self, call: Call, branch: _Branch, weights: tuple[float, ...], device: torch.device
    ) -> torch.Tensor | None:
        """What would have been predicted of a computed step, where the plan looks back and it is known."""
        if self._back is None or not call.planned or self._lacking(branch, len(weights), before=True):
            return None
        believed = self._believed(branch, weights, device)
        return None if believed is None else _float(branch.features[0].to(device)) + believed

    def _look_back(self, x: torch.Tensor) -> None:
        """A step's first call: begin to look back if the plan does, or learn from where the sampler went."""
        plan, run = self._plan, self.run
        if plan is None or plan.hindsight is None or not plan.reused or self.boundary != "output" or self._not_back:
            return
        if self._step == 0 and run is not None:
            try:
                if run.response is None:
                    raise ValueError("the host does not know the sampler")
                answers = run.response()
                if len(answers) != run.num_steps + 1:
                    raise ValueError("the run does not walk all of the sampler's steps")
                self._back = LookBack(plan.hindsight, answers, self.cache_device)
                self._start = x.detach().clone()
            except Exception as error:  # a stranger's sampler, asked what it would do: whatever it says to that
                self._not_back = str(error)
        elif self._step == 1 and self._back is not None and self._start is not None:
            start, self._start = narrow(self._start, self.own), None
            self._not_back = self._back.moved(narrow(x, self.own), start, self.grid, self.batched)
        if self._not_back:
            self._back = None

    def _hand_on(
        self, call: Call, output: torch.Tensor, weights: tuple[float, ...], expected: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The branch's output with what is put right of earlier ones."""
        if self._back is None:
            return output
        try:
            output = self._back.hand_on(call.step, call.branch, output, call.compute, weights, expected)
        except KeyError:
            self._back, self._not_back = None, "its branches changed within the run"
        if self._check is not None and self._plan is not None and call.compute:
            ahead = next((k for k in self._plan.computed if k > call.step), self._plan.num_steps)
            self._check.floor = 0.0 if self._back is None else self._back.floor(ahead - call.step)
        return output

    def predict(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """The output of a reused call from the branch's features; as the model's own, it must not be written into.

        Raises:
            ValueError: an output was written into after it was returned.
        """
        branch, decider = self._state(call)
        weights = decider.weights(call.step)
        if any(_version(k.feature) != k.version for k in branch.kept):
            raise ValueError(
                "the model's output was changed in place by the code that received it, so it cannot be reused; "
                "let that code work on a copy."
            )
        output = branch.features[0].to(x.device, non_blocking=True)
        if self._check is not None:
            believed = self._believed(branch, weights, x.device)
            output, weights = (output, (1.0,)) if believed is None else (_float(output) + believed, weights)
        elif weights != (1.0,):
            output = _combine(branch, weights, x.device)
        if self._relative(decider):
            output = self._like(x, output) + output
        branch.reused.append(call.step)
        if call.last:
            branch.kept.clear()
        output = self._hand_on(call, output, weights).to(branch.dtype)
        self._weigh(decider)
        return output

    def _compare(self, branch: _Branch, weights: tuple[float, ...], feature: torch.Tensor) -> Increment | None:
        """What happened at a computed step beside what would have been predicted; `None` if that is plain reuse."""
        if len(weights) < 2 or self._lacking(branch, len(weights), before=True):
            return None
        happened = _float(feature) - _float(branch.features[0].to(feature.device))
        return Increment(happened, _increment(branch, weights, feature.device))

    def _learn(self) -> None:
        """A step is over: let the self-check see what its branches did."""
        seen = {b.name: b.increment for b in self._branches if b.increment is not None}
        if self._check is not None and seen:
            self._check.batched, self._check.grid = self.batched, self.grid
            self._check.learn(seen)
        for branch in self._branches:
            branch.increment = None

    def _believed(self, branch: _Branch, weights: tuple[float, ...], device: torch.device) -> torch.Tensor | None:
        """The part of the branch's predicted increment that the self-check believes."""
        if self._check is None or len(weights) < 2:
            return None
        names = {branch.name, *self._check.together}
        members = [b for b in self._branches if b.name in names and len(b.kept) >= len(weights)]
        return self._check.damp(branch.name, {b.name: _increment(b, weights, device) for b in members})

    def leave(self, call: Call, x: torch.Tensor) -> None:
        """The call is over; `x` is on the device it ran on. Only times are taken here."""
        self._spans.append((call.compute, call.step, call.start, timestamp(x)))

    def summary(self) -> RunSummary:
        """What the current or last trajectory did so far."""
        return _summarise(self)

    def _weigh(self, decider: Decider) -> None:
        held = [t for b in self._branches for t in b.features] + decider.tensors()
        held += self._back.tensors if self._back is not None else []
        storages = [t.untyped_storage() for t in held]  # a tensor held under two names weighs once
        distinct = {s.data_ptr(): s.nbytes() for s in storages}
        self._peak_bytes = max(self._peak_bytes, sum(distinct.values()))

    def _like(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The part of the input that the output is of; tokens have nothing behind them."""
        return narrow(x, output.shape) if self.boundary == "output" else x

    def _relative(self, decider: Decider) -> bool:
        return self.boundary == "blocks" or decider.relative

    def _state(self, call: Call) -> tuple[_Branch, Decider]:
        for branch in self._branches:
            if branch.name == call.branch and self._decider is not None:
                return branch, self._decider
        raise RuntimeError("this call belongs to a trajectory that has ended.")

    def _agree(self, decider: Decider, x: torch.Tensor) -> bool:
        compute = decider.compute(self._step, x)
        if self.group is not None and decider.data_dependent:
            vote = torch.tensor([int(compute)], device=x.device)
            dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.group)
            compute = bool(vote.item())
        return compute

    def _name(self, key: Hashable) -> str:
        if isinstance(key, str):
            return key
        taken = len(self._branches)
        return ("cond", "uncond")[taken] if taken < 2 else f"branch{taken + 1}"


def _arrived(output: torch.Tensor) -> torch.Tensor:
    """The tensor behind what torch's functional collectives give, which has no memory of its own to keep or weigh."""
    wait = getattr(output, "trigger_wait", None)
    return output if wait is None else wait()


def _combine(branch: _Branch, weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The weighted sum of a branch's features, newest first: a sum with cancellation, so never in half precision."""
    features = [f.to(device, non_blocking=True) for f in branch.features[: len(weights)]]
    total = _float(features[0]) * weights[0]
    for weight, feature in zip(weights[1:], features[1:], strict=True):
        total = torch.add(total, feature, alpha=weight)
    return total


def _increment(branch: _Branch, weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """By how much the weighted sum differs from repeating the newest feature."""
    return _combine(branch, weights, device) - _float(branch.features[0].to(device))


def narrow(x: torch.Tensor, shape: torch.Size | None) -> torch.Tensor:
    """The first entries of `x` along every dimension in which `shape` is smaller, the batch (first) dimension excepted.

    Pipelines append conditions to the latent, as channels (image to video) or as tokens (editing).
    """
    if shape is None or x.ndim != len(shape) or any(a < b for a, b in zip(x.shape[1:], shape[1:], strict=True)):
        return x
    for dim in range(1, x.ndim):
        if x.shape[dim] != shape[dim]:
            x = x.narrow(dim, 0, shape[dim])
    return x


def _equal(a: Any, b: Any) -> bool:
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return tensors and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _version(x: torch.Tensor) -> int:
    """How often the tensor was written into; tensors made in inference mode do not count."""
    return 0 if x.is_inference() else x._version


def _float(x: torch.Tensor) -> torch.Tensor:
    """Differences of half-precision tensors are taken in float32: they are small against what is subtracted."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
