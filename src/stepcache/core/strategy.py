"""What a method is: a policy with its settings, and the strategy that decides during one run."""

from __future__ import annotations

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
    history = 1
    """How many past features a branch keeps; 0 if nothing is reused at the model call."""
    predicts_guided = False
    """The method acts at the sampler step: skipped calls return placeholders, `guided` makes the forecast."""
    stand_ins: dict[str, torch.Tensor] | None = None
    """Of such a method: the last outputs of branches, placeholders at skipped calls, where the host keeps them."""
    cache_device: torch.device | str | None = None
    """Where tensors are held between steps, if not where they were made; set by the cache."""
    group: Any = None
    """Ranks that share the run: decisions that depend on tensors are put to a `vote`; set by the cache."""

    def compute(self, step: int, x: torch.Tensor) -> bool:
        """Whether to evaluate the model at `step`; asked once a step, on its first call, with the latent `x`."""
        raise NotImplementedError

    def can_predict(self, step: int, nodes: list[int], evaluated: bool) -> bool:
        """Whether a skipped call can be predicted.

        `nodes`: steps of the features its branch has kept, newest first. `evaluated`: the branch was evaluated before,
        with an input of this shape.
        """
        return bool(nodes)

    def feature(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """What to keep of an evaluation; `None`: nothing.

        Args:
            call: which.
            x: the input, condition channels included; at boundary blocks the tokens before the block stack.
            output: of the model; at boundary blocks the stack's residual.
        """
        # A copy, since pipelines write into outputs and captured CUDA graphs reuse their memory.
        return output.detach().clone() if self.history and not call.last else None

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The output of a skipped call from the features kept, newest first; may be one of them."""
        return kept[0]

    def guided(self, step: int, output: torch.Tensor, computed: bool, sampler: Any) -> torch.Tensor:
        """What `sampler` gets for the guided output of a step.

        `computed`: every call of the step was evaluated; else only the output's shape and dtype mean anything.
        """
        return output

    def handover(self) -> None:
        """Another transformer takes over (Wan2.2's second expert): what was measured on the first is void."""

    def reshaped(self) -> None:
        """The model is fed another shape, e.g. one branch instead of two: outputs are not of one curve with earlier."""

    def warnings(self) -> tuple[str, ...]:
        """What went otherwise than expected."""
        return ()

    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps, for the memory figure."""
        return []

    def release(self) -> None:
        """The run is over, perhaps before its end: hold no tensor any longer."""


@dataclass(frozen=True)
class Call:
    """One call of the transformer: where it stands in the run and what was decided.

    `leader`: the first call of its step. `last`: of the run's last step. `begin`: when it began (`timestamp`).
    """

    step: int
    branch: str
    compute: bool
    leader: bool
    last: bool
    begin: Any
