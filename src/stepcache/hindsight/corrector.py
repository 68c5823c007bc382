"""Forecasts; and once a computed step shows how the skipped ones before it went, bring the latent where it should be.

At the skipped steps s between the computed k1 and k the sampler was given forecasts f_s; with the output of k known,
interpolation i_s would have been right. Samplers are linear in the outputs (`hindsight.response`); g_s is what one unit
of output s moves the final latent by. So the gap is made good by giving the sampler v_k + sum of g_s (i_s - f_s) / g_k.

The output of k was evaluated at the uncorrected latent: a predictor-corrector without a second evaluation, as UniPC's
(arXiv 2302.04867). Such schemes swing where the output answers strongly to the latent, as under guidance (DC-Solver,
2409.03755). So only a share of what the forecast missed is believed, v_k = f_k + share (output of k - f_k). On
dx/dt = -z x, t in gaps, that is stable up to z = 0.5, 1.0, 1.8, 2.5 for shares 1, 0.8, 0.6, 0.5 (reuse: 2). How stiff a
model is shows in the misses M: where forecasts lag, one points where the last did; where they swing, it turns round.
The share of a sample is |M + M'| / sqrt(|M|^2 + |M'|^2), M' being the miss before, but at most 1 (misses at a right
angle, or pointing the same way), averaged with the former share: an alpha-beta filter with a response rate that adapts
to the signs of its errors, as in Trigg and Leach (1967).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

Row = tuple[float, ...]
"""Coefficients over the computed outputs, newest first."""
MEMORY = 0.7
"""Weight of the former share in the average, and the first share."""


class Corrector:
    """The guided outputs of one run at one sampler: forecasts, and corrections at computed steps. Float32 throughout.

    `answers`: the sampler's response, float64 (S + 1, S + 1); `None`: the latent is not corrected.
    `device`: where tensors are held between steps; default: where they were made.
    `places`: where the steps stand along the run, see `schedule.places_of`; default: their numbers.
    """

    def __init__(self, answers: torch.Tensor | None, device: Any = None, places: Sequence[float] | None = None) -> None:
        self._final: list[float] | None = None if answers is None else answers[-1, 1:].tolist()
        self._device, self._places = device, range(sys.maxsize) if places is None else places
        self.step = -1  # of the last forecast or correction
        self.restart()

    def restart(self) -> None:
        """Outputs before and after are not of one curve: another transformer, another shape."""
        self._nodes: list[tuple[float, torch.Tensor]] = []  # places and outputs of computed steps, newest first
        self._skipped: list[int] = []
        self._missed: torch.Tensor | None = None  # by the last forecast
        self._share: torch.Tensor | None = None  # a number a sample

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps."""
        return [output for _, output in self._nodes] + ([] if self._missed is None else [self._missed])

    def skipped(self, step: int, device: torch.device) -> torch.Tensor:
        """The forecast of a skipped step."""
        self.step = step
        self._skipped.append(step)
        return self._forecast(step, *self._line(device))

    def computed(self, step: int, output: torch.Tensor) -> torch.Tensor:
        """What the sampler gets at a computed step: the output, and what makes good the gap before it."""
        self.step = step
        output = output.detach().to(torch.float32, copy=True)
        if self._nodes and self._nodes[0][1].shape != output.shape:
            self.restart()
        correction = None
        if self._skipped and self._nodes:
            newest, moved = self._line(output.device)
            forecast = self._forecast(step, newest, moved)
            missed = output - forecast
            output = torch.addcmul(forecast, missed, self._believed(missed))
            correction = self._made_good(step, output, newest, moved)
            self._missed = self._held(missed)
        self._skipped = []
        place = self._places[step]
        self._nodes = [(place, self._held(output)), *(node for node in self._nodes if node[0] != place)][:2]
        return output if correction is None else output + correction

    def _forecast(self, step: int, newest: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        return torch.add(newest, moved, alpha=reach(self._places[step], [place for place, _ in self._nodes]))

    def _line(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [output.to(device, non_blocking=True) for _, output in self._nodes]
        return outputs[0], outputs[0] - outputs[-1]  # of one alone: moved by nothing

    def _held(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._device is None else x.to(self._device, non_blocking=True)

    def _believed(self, missed: torch.Tensor) -> torch.Tensor:
        """The share of a miss that is believed, shaped (samples, 1, ...)."""
        if self._missed is None or self._share is None:
            self._share = torch.full((len(missed),), MEMORY, device=missed.device)
        else:
            before = self._missed.to(missed.device, non_blocking=True)
            size, former, both = (x.flatten(1).norm(dim=1) for x in (missed, before, missed + before))
            agreed = (both / size.hypot(former).clamp_min(torch.finfo(missed.dtype).tiny)).clamp_max(1)
            self._share = MEMORY * self._share + (1 - MEMORY) * agreed
        return self._share.view(-1, *[1] * (missed.ndim - 1))

    def _made_good(
        self, step: int, output: torch.Tensor, newest: torch.Tensor, moved: torch.Tensor
    ) -> torch.Tensor | None:
        """Sum over the gap that ends at `step` of g_s (i_s - f_s) / g_k; `None` where the sampler is not known."""
        if self._final is None or not self._final[step]:
            return None
        nodes, width = [place for place, _ in self._nodes], self._places[step] - self._nodes[0][0]
        moves = [(self._final[s] / self._final[step], self._places[s]) for s in self._skipped]
        inward = sum(move * ((s - nodes[0]) / width if width else 1.0) for move, s in moves)
        return torch.mul(output - newest, inward).sub_(moved, alpha=sum(move * reach(s, nodes) for move, s in moves))


def reach(place: float, nodes: Sequence[float]) -> float:
    """How far the line through the last two computed steps is followed, in gaps: no farther than it was measured."""
    if len(nodes) < 2:
        return 0.0
    return max(-1.0, min((place - nodes[0]) / (nodes[0] - nodes[1]), 1.0))


def order_one(step: int, nodes: Sequence[int]) -> Row:
    """Weights of the forecast over the last two computed outputs; of one alone, reuse.

    Args:
        step: the step that is forecast.
        nodes: computed steps before it, newest first, at least one.
    """
    along = reach(step, nodes)
    return (1 + along, -along) if len(nodes) > 1 else (1.0,)
