"""The corrector: once a computed step shows how the skipped ones before it went, bring the latent where it should be.

Between the computed steps k1 and k the sampler was given forecasts. With the output of k known, interpolation would
have been right there: at step s it differs from the forecast by a_s M, where a_s = (s - k1) / (k - k1) and M is what
the forecast misses at k itself. Samplers are linear in the outputs (`hindsight.response`); g_s is what one unit of
output s moves the final latent by. So all of the gap is made good by adding rho M to the output of step k,

    rho = sum over the gap of g_s a_s / g_k.

The output of k was evaluated at the uncorrected latent. The correction moves that latent by A M, A = sum over the gap
of R[k, s] a_s, negative where sampling goes towards less noise. Under guidance the output follows the latent with a
slope f. The output that belongs to the corrected latent is therefore forecast + M with M = (output - forecast) + f A M,
an implicit step:

    M = (output - forecast) / (1 - f A).

It damps: with f = 0 wide gaps make the sampler swing. What f stands for was measured (docs/planning.md): not the
model's own answer to a moved latent, but a damping that keeps the rule stable. A predictor-corrector in the manner of
UniPC (arXiv 2302.04867), whose corrector DC-Solver (2409.03755) found in need of such compensation under guidance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stepcache.core.tensors import weighted
from stepcache.hindsight.forecast import order_one
from stepcache.hindsight.response import noise_levels

FEEDBACK = (1.0, 0.7)
"""Slope f of the output on the latent in units of (guidance - 1) / (1 - sigma): low frequencies, and the others."""
KNEE = 0.12
"""1 - sigma below which the slope falls in proportion to it."""
EDGE = 5
"""Latent pixels of the mean filter that tells low frequencies from the others."""
SHORT = 3
"""Without guidance: steps up to which a gap is corrected in full; longer ones by (SHORT / steps)^2."""


class Corrector:
    """The guided outputs of one run at one sampler: forecasts, and corrections at computed steps. Float32 throughout.

    Args:
        answers: the sampler's response, float64 (S + 1, S + 1); `None`: forecast without correcting.
        guidance: the guidance scale that acts; 1 or less: none.
        device: where tensors are held between steps; default: where they were made.
    """

    def __init__(
        self, answers: torch.Tensor | None, guidance: float = 1.0, device: torch.device | str | None = None
    ) -> None:
        self._moves: list[list[float]] | None = None if answers is None else answers[:, 1:].tolist()
        self._levels = None if answers is None else noise_levels(answers.double().cpu())
        self._strength = max(guidance - 1, 0.0) if self._levels is not None else 0.0
        self._device = device
        self.step = -1  # of the last forecast or correction
        self.restart()

    def restart(self) -> None:
        """Outputs before and after are not of one curve: another transformer, another shape."""
        self._nodes: list[tuple[int, torch.Tensor]] = []  # computed steps and their outputs, newest first
        self._skipped: list[int] = []

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held between steps."""
        return [output for _, output in self._nodes]

    def skipped(self, step: int, device: torch.device) -> torch.Tensor:
        """The forecast of a skipped step."""
        self.step = step
        self._skipped.append(step)
        return self._forecast(step, device)

    def computed(self, step: int, output: torch.Tensor) -> torch.Tensor:
        """What the sampler gets at a computed step: the output, and what makes good the gap before it."""
        self.step = step
        output = output.detach().to(torch.float32, copy=True)
        if self._nodes and self._nodes[0][1].shape != output.shape:
            self.restart()
        correction = None
        if self._skipped and self._nodes and self._moves is not None:
            forecast = self._forecast(step, output.device)
            missed, share = self._damped(step, output - forecast, self._moves)
            output, correction = forecast + missed, missed * share
        self._skipped = []
        held = output if self._device is None else output.to(self._device, non_blocking=True)
        self._nodes = [(step, held), *self._nodes[:1]]
        return output if correction is None else output + correction

    def _forecast(self, step: int, device: torch.device) -> torch.Tensor:
        outputs = [output.to(device, non_blocking=True) for _, output in self._nodes]
        return weighted(order_one(step, [node for node, _ in self._nodes]), outputs)

    def _damped(self, step: int, missed: torch.Tensor, moves: list[list[float]]) -> tuple[torch.Tensor, float]:
        """M and rho of the gap that ends at `step`."""
        start = self._nodes[0][0]
        along = [(s, (s - start) / (step - start)) for s in self._skipped]
        final = moves[-1]
        rho = sum(final[s] * a for s, a in along) / final[step] if final[step] else 0.0
        if not self._strength or self._levels is None:
            return missed, rho * min(1.0, (SHORT / (step - start)) ** 2)
        clean = max(1 - self._levels[step], 1e-3)
        slope = self._strength * min(clean / KNEE, 1.0) / clean
        moved = sum(moves[step][s] * a for s, a in along)
        low, high = (1 / max(1.0, 1 - slope * f * moved) for f in FEEDBACK)
        if missed.ndim < 4:  # tokens: one band
            return missed * high, rho
        return torch.add(missed * high, _smooth(missed), alpha=low - high), rho


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """Mean over EDGE x EDGE latent pixels (..., height, width), fewer at the border."""
    flat = x.reshape(-1, 1, *x.shape[-2:])
    return F.avg_pool2d(flat, EDGE, stride=1, padding=EDGE // 2, count_include_pad=False).view(x.shape)
