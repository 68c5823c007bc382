"""Forecast skipped steps; correct the latent at the next computed step, when they can be interpolated instead.

At the skipped steps s between the computed k1 and k the sampler was given forecasts f_s; with the output of k known,
they can be interpolated, i_s. Samplers are linear in the outputs (`hindsight.response`); g_s is the change of the final
latent per unit of output s. So the gap is corrected by giving the sampler v_k + sum of g_s (i_s - f_s) / g_k.

The output of k was evaluated at the uncorrected latent: a predictor-corrector without a second evaluation, as UniPC's
(arXiv 2302.04867). Such schemes oscillate where the output responds strongly to the latent, as under guidance
(DC-Solver, 2409.03755). So only a share of the forecast error is trusted, v_k = f_k + share (output of k - f_k). On
dx/dt = -z x, t in gaps, that is stable up to z = 0.5, 1.0, 1.8, 2.5 for shares 1, 0.8, 0.6, 0.5 (reuse: 2). How stiff a
model is shows in the errors M: where forecasts lag, one has the direction of the last; where they oscillate, it
reverses. The share of a sample is |M + M'| / sqrt(|M|^2 + |M'|^2), M' being the error before, but at most 1 (errors
that are orthogonal or agree), averaged with the former share: an alpha-beta filter with a response rate that adapts
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

    `response`: the sampler's, float64 (S + 1, S + 1); `None`: the latent is not corrected.
    `device`: where tensors are held between steps; default: where they were made.
    `places`: positions of the steps along the run, see `schedule.places_of`; default: their numbers.
    """

    def __init__(
        self, response: torch.Tensor | None, device: Any = None, places: Sequence[float] | None = None
    ) -> None:
        self._final: list[float] | None = None if response is None else response[-1, 1:].tolist()
        self._device, self._places = device, range(sys.maxsize) if places is None else places
        self.step = -1  # of the last forecast or correction
        self.restart()

    def restart(self) -> None:
        """Forget past outputs, which cannot be extrapolated: another transformer, another shape."""
        self._nodes: list[tuple[float, torch.Tensor]] = []  # places and outputs of computed steps, newest first
        self._skipped: list[int] = []
        self._error: torch.Tensor | None = None  # of the last forecast
        self._share: torch.Tensor | None = None  # one number per sample

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps."""
        return [output for _, output in self._nodes] + ([] if self._error is None else [self._error])

    def skipped(self, step: int, device: torch.device) -> torch.Tensor:
        """The forecast of a skipped step."""
        self.step = step
        self._skipped.append(step)
        return self._forecast(step, *self._line(device))

    def computed(self, step: int, output: torch.Tensor) -> torch.Tensor:
        """What the sampler gets at a computed step: the output, and the correction for the gap before it."""
        self.step = step
        output = output.detach().to(torch.float32, copy=True)
        if self._nodes and self._nodes[0][1].shape != output.shape:
            self.restart()
        correction = None
        if self._skipped and self._nodes:
            newest, moved = self._line(output.device)
            forecast = self._forecast(step, newest, moved)
            error = output - forecast
            output = torch.addcmul(forecast, error, self._trusted(error))
            correction = self._correction(step, output, newest, moved)
            self._error = self._held(error)
        self._skipped = []
        place = self._places[step]
        self._nodes = [(place, self._held(output)), *(node for node in self._nodes if node[0] != place)][:2]
        return output if correction is None else output + correction

    def _forecast(self, step: int, newest: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        return torch.add(newest, moved, alpha=reach(self._places[step], [place for place, _ in self._nodes]))

    def _line(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [output.to(device, non_blocking=True) for _, output in self._nodes]
        return outputs[0], outputs[0] - outputs[-1]  # of one alone: zero

    def _held(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._device is None else x.to(self._device, non_blocking=True)

    def _trusted(self, error: torch.Tensor) -> torch.Tensor:
        """The share of a forecast error that is trusted, shaped (samples, 1, ...)."""
        if self._error is None or self._share is None:
            self._share = torch.full((len(error),), MEMORY, device=error.device)
        else:
            before = self._error.to(error.device, non_blocking=True)
            size, former, both = (x.flatten(1).norm(dim=1) for x in (error, before, error + before))
            agreed = (both / size.hypot(former).clamp_min(torch.finfo(error.dtype).tiny)).clamp_max(1)
            self._share = MEMORY * self._share + (1 - MEMORY) * agreed
        return self._share.view(-1, *[1] * (error.ndim - 1))

    def _correction(
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
    """How far to extrapolate through the last two computed steps, in units of their distance: at most 1."""
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
