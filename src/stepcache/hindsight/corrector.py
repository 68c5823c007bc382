"""The corrector: once a computed step shows how the skipped ones before it went, bring the latent where it should be.

Between the computed steps k1 and k the sampler was given forecasts. With the output of k known, interpolation would
have been right there: at step s it differs from the forecast by a_s M, where a_s = (s - k1) / (k - k1) and M is what
the forecast misses at k itself. Samplers are linear in the outputs (`hindsight.response`); g_s is what one unit of
output s moves the final latent by. So all of the gap is made good by adding rho M to the output of step k,

    rho = sum over the gap of g_s a_s / g_k.

The output of k was evaluated at the uncorrected latent, and later forecasts feed on it: a predictor-corrector without
a second evaluation, in the manner of UniPC (arXiv 2302.04867). Such schemes swing where the output answers strongly to
the latent, as it does under guidance (DC-Solver, 2409.03755). So only a part of what was missed is believed,

    M = (output - forecast) * gap ** -DAMPING,        gap = k - k1,

in the latent and in what later forecasts are made of. On the test equation dx/dt = -z x, t in gaps, the rule is stable
up to z = 0.5, 1.0, 1.4, 1.8, 2.5 for shares 1, 0.8, 0.7, 0.6, 0.5 (tests/test_hindsight.py); reuse is up to 2 and
extrapolation up to 1. Wider gaps are stiffer and get smaller shares. No model, guidance or noise level enters.
"""

from __future__ import annotations

import torch

from stepcache.core.tensors import weighted
from stepcache.hindsight.forecast import order_one

DAMPING = 1 / 3
"""Of what a forecast missed over a gap of so many steps, gap ** -DAMPING is believed."""


class Corrector:
    """The guided outputs of one run at one sampler: forecasts, and corrections at computed steps. Float32 throughout.

    Args:
        answers: the sampler's response, float64 (S + 1, S + 1); `None`: forecast without correcting the latent.
        device: where tensors are held between steps; default: where they were made.
    """

    def __init__(self, answers: torch.Tensor | None, device: torch.device | str | None = None) -> None:
        self._final: list[float] | None = None if answers is None else answers[-1, 1:].tolist()
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
        if self._skipped and self._nodes:
            forecast = self._forecast(step, output.device)
            missed = (output - forecast) * (step - self._nodes[0][0]) ** -DAMPING
            output, correction = forecast + missed, missed * self._made_good(step)
        self._skipped = []
        held = output if self._device is None else output.to(self._device, non_blocking=True)
        self._nodes = [(step, held), *self._nodes[:1]]
        return output if correction is None else output + correction

    def _forecast(self, step: int, device: torch.device) -> torch.Tensor:
        outputs = [output.to(device, non_blocking=True) for _, output in self._nodes]
        return weighted(order_one(step, [node for node, _ in self._nodes]), outputs)

    def _made_good(self, step: int) -> float:
        """The factor rho of the gap that ends at `step`."""
        if self._final is None or not self._final[step]:
            return 0.0
        start = self._nodes[0][0]
        return sum(self._final[s] * (s - start) / (step - start) for s in self._skipped) / self._final[step]
