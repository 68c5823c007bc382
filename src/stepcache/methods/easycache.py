"""EasyCache: reuse while the output is expected to have changed little (arXiv 2507.02860, section 3.3).

The transformer's change is taken as proportional to the latent's, with a rate k measured at computed steps:

    k   = |y_a - y_b| / |x_a - x_b|       a, b: the last two computed steps, |.| the mean absolute value
    E  += k |x_s - x_(s-1)| / |y_a|       at every step s after a
    reuse while E < thresh, as  x_s + (y_a - x_a)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stepcache.core.strategy import Call, Strategy
from stepcache.core.tensors import as_float, narrow, vote
from stepcache.core.trajectory import Boundary, Trajectory


@dataclass(frozen=True)
class EasyCache:
    """EasyCache with its authors' settings for Wan2.1.

    Args:
        thresh: accumulated relative change that ends a stretch of reuse; 0 computes every step.
        ret_steps: steps computed at the start, before any reuse (the paper's R); the last step is always computed.
        boundary: where reuse is applied; the paper's is "output".
    """

    thresh: float = 0.05
    ret_steps: int = 10
    boundary: Boundary = "output"

    def __post_init__(self) -> None:
        if not math.isfinite(self.thresh) or self.thresh < 0:
            raise ValueError(f"thresh is {self.thresh}; expected a number that is not negative, for example 0.05.")
        if self.ret_steps < 0:
            raise ValueError(f"ret_steps is {self.ret_steps}; expected 0 or more steps.")

    def begin(self, run: Trajectory) -> Strategy:
        """Fresh state for a run."""
        return _EasyCacheRun(self, run)

    def __str__(self) -> str:
        return f"easycache (thresh {self.thresh:g})"


class _EasyCacheRun(Strategy):
    """Decisions and measurements of one run; all on the first branch (cond), the others obey."""

    def __init__(self, settings: EasyCache, run: Trajectory) -> None:
        self.settings, self.num_steps, self.blocks = settings, run.num_steps, run.boundary == "blocks"
        self.x: torch.Tensor | None = None  # latent of the last step, computed or not
        self.x_a: torch.Tensor | None = None  # latent of the last computed step
        self.c_a: torch.Tensor | None = None  # y_a - x_a, the cache's own tensor
        self.y_a: torch.Tensor | None = None  # output of the last computed step, where c_a does not give it
        self.size_a = torch.tensor(1.0)  # |y_a|
        self.k: torch.Tensor | None = None
        self.error: torch.Tensor | float = 0.0

    def compute(self, step: int, x: torch.Tensor) -> bool:
        """The rule of the module's head, with the first `ret_steps` steps and the last computed."""
        return vote(self._decide(step, x), x, self.group)

    def _decide(self, step: int, x: torch.Tensor) -> bool:
        before = self.x
        if step == self.num_steps - 1:
            self.release()
            return True
        self.x = x.detach().clone()  # callbacks may write into the pipeline's latents
        if step < self.settings.ret_steps or self.k is None or before is None or before.shape != x.shape:
            self.error = 0.0
            return True
        self.error = self.error + self.k * _mean_abs(x, before) / self.size_a
        if bool(self.error < self.settings.thresh):
            return False
        self.error = 0.0
        return True

    def feature(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """Output minus input (ValueError if they are not alike), or the residual of the blocks, which is that already.

        Refreshes k on the first branch. Computed for whatever reason, also outvoted by another rank, E starts anew.
        """
        if call.last:
            return None
        x = x if self.blocks else narrow(x, output.shape)
        if x.shape != output.shape:
            raise ValueError(
                f"EasyCache reuses the difference of output and input, but this model maps {tuple(x.shape)} to "
                f"{tuple(output.shape)}; use a policy that reuses the output itself, such as uniform."
            )
        change = output if self.blocks else as_float(output) - as_float(x)
        if call.leader and self.x is not None:
            self._measure(x, x + output if self.blocks else output, change)
        return change

    def _measure(self, x: torch.Tensor, output: torch.Tensor, change: torch.Tensor) -> None:
        self.error, latent = 0.0, self.x
        if latent is None:
            return
        if not self.blocks:  # conditions beside the latent do not count
            latent = narrow(latent, x.shape)
            output, change = narrow(output, latent.shape), narrow(change, latent.shape)
        self.size_a = output.detach().float().abs().mean()
        before = self.y_a if self.blocks else self._output_a(x.device)
        if before is not None and before.shape == output.shape and self.x_a is not None:
            self.k = _mean_abs(output, before) / _mean_abs(latent, self.x_a)
        self.x = self.x_a = latent
        self.c_a, self.y_a = change, output.detach() if self.blocks else None

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return kept[0] if self.blocks else narrow(x, kept[0].shape) + kept[0]

    def release(self) -> None:
        self.x = self.x_a = self.c_a = self.y_a = None

    def _output_a(self, device: torch.device) -> torch.Tensor | None:
        """y_a from what is kept anyway, x_a and y_a - x_a: one latent less to hold."""
        if self.x_a is None or self.c_a is None or self.c_a.shape != self.x_a.shape:
            return None
        return self.x_a.float() + self.c_a.to(device)

    def handover(self) -> None:
        """The rate k and the output's size are another model's: measure anew."""
        self.x_a = self.c_a = self.y_a = self.k = None

    def tensors(self) -> list[torch.Tensor]:
        """The last latent, and what is known of the last computed step."""
        return [t for t in (self.x, self.x_a, self.c_a, self.y_a) if t is not None]


def _mean_abs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.detach().float() - b.float()).abs().mean()
