"""What a method is: a policy with its settings, and the strategy that decides during one run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from stepcache.core.plan import Plan
    from stepcache.core.trajectory import Boundary, Trajectory


class Policy(Protocol):
    """A method with its settings: `begin` makes the decisions for one trajectory."""

    @property
    def boundary(self) -> Boundary:
        """Where reuse is applied unless the host is told otherwise."""
        ...

    def begin(self, run: Trajectory) -> Strategy:
        """Check the settings against the run (ValueError) and return fresh state for it."""
        ...


class Strategy:
    """What a method knows and decides during one run. Subclasses override what they need."""

    plan: Plan | None = None
    """What is followed, if the decisions are known beforehand."""
    notes: tuple[str, ...] = ()
    """What a reader of the summary should know, e.g. that the schedule was resampled."""
    skips = True
    """Whether steps are to be skipped at all."""
    relative = False
    """At the `output` boundary: keep output minus input and add the new input, instead of reusing the output."""
    data_dependent = False
    """Decisions depend on tensors, so ranks that share the trajectory must agree before acting."""
    history = 1
    """How many past features a branch keeps; 0 if nothing is reused at the model's door."""
    predicts_guided = False
    """The method stands at the sampler's door: skipped calls return stand-ins, `guided` makes the forecast."""
    cache_device: torch.device | None = None
    """Where tensors live between steps, if not where they were made; set by the cache."""

    def compute(self, step: int, x: torch.Tensor) -> bool:
        """Whether to evaluate the model at `step`; asked once a step, on its first call, with the latent `x`."""
        raise NotImplementedError

    def needs(self, step: int) -> int:
        """How many features of the last computed steps the prediction of skipped step `step` is made of."""
        return 1

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The feature of a skipped call from those kept, newest first; may be one of them."""
        return kept[0]

    def observe(self, call: Call, x: torch.Tensor, output: torch.Tensor, kept: torch.Tensor | None) -> None:
        """See an evaluation and what the cache keeps of it (`None` if nothing).

        x and output are what the boundary cuts at: latents without condition channels, or tokens before and after the
        block stack.
        """

    def guided(
        self, step: int, output: torch.Tensor, computed: bool, stream: Hashable, response: Callable[[], Any] | None
    ) -> torch.Tensor:
        """What the sampler gets for the guided output of a step.

        Args:
            step: of the run.
            output: the guided output; of a skipped step only its shape and dtype mean anything.
            computed: whether every call of the step was evaluated.
            stream: which sampler asks, where one step has several (sound beside pictures).
            response: gives that sampler's response.
        """
        return output

    def handover(self) -> None:
        """Another transformer takes over (Wan2.2's second expert): what was measured on the first is void."""

    def warnings(self) -> tuple[str, ...]:
        """What went otherwise than expected."""
        return ()

    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps, for the memory figure."""
        return []


@dataclass(frozen=True)
class Call:
    """One call of the transformer: where it stands in the run and what was decided.

    `planned`: the policy wanted this step computed. `forced`: it did not, but there is nothing to predict it from.
    `leader`: the first call of its step. `last`: of the run's last step. `own`: shape of the latent without condition
    channels or tokens, if known.
    """

    step: int
    branch: str
    compute: bool
    forced: bool
    planned: bool
    leader: bool
    last: bool
    own: torch.Size | None
    start: Any
