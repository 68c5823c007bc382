"""Samplers that are functions of a denoiser (k-diffusion, ComfyUI): their evaluations, and their response.

Such a sampler has no `step` that could be hooked: it is given a function denoiser(x, sigma) and evaluates it as
often, and at whatever noise levels, it needs (Heun's method 39 times in 20 steps). So it is run beforehand on zeros, on
noise and on unit vectors, as `hindsight.response` does with schedulers. An evaluation is a step here.

The output of an evaluation is v = (x - denoised) / sigma: the velocity of flow matching, the noise of other models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Denoiser = Callable[..., torch.Tensor]
"""(x, sigma as a tensor (samples,), ...) -> denoised x."""
Walk = Callable[[Denoiser, torch.Tensor], torch.Tensor]
"""A sampler, all decided but its denoiser and first latent: (denoiser, x) -> final latent."""
MOST_EVALUATIONS = 2000
ASIDE = "sampler_post_cfg_function"
"""In `model_options`: how a sampler of ComfyUI asks to be shown the unconditional output."""


@dataclass(frozen=True)
class Evaluations:
    """What a sampler asks of its denoiser.

    Args:
        sigmas: noise level of every evaluation, in order.
        response: float64 (E + 1, E + 1): row k is the latent of evaluation k over (x_0, v_0, ..., v_(E-1)), the last
            row the final latent; `None`: it is not a sum of them.
        why: what keeps it from being corrected, or from being skipped, if anything does.
        fixed: every run makes these very evaluations, and of (x, sigma) alone; otherwise none can be skipped.
    """

    sigmas: tuple[float, ...]
    response: torch.Tensor | None = None
    why: str = ""
    fixed: bool = True

    def answers(self) -> torch.Tensor:
        """The response; ValueError if there is none."""
        if self.response is None:
            raise ValueError(f"of the sampler: {self.why}")
        return self.response


class _LooksAside(Exception):
    """The sampler asks for more than the denoised latent."""


@torch.no_grad()
def probe(walk: Walk) -> Evaluations:
    """Run a sampler on zeros, on noise and on unit vectors, on the CPU; the global random state is not touched.

    Raises:
        ValueError: it makes no evaluation, or more than 2000.
    """
    with torch.random.fork_rng(devices=[]):
        zeros = _Stand(torch.zeros(1, 0))
        try:
            final = walk(zeros, torch.zeros(1, 1, 1, 1))
        except _LooksAside:
            return Evaluations((), why="it looks at the unconditional output as well", fixed=False)
        sigmas, count = tuple(zeros.sigmas), len(zeros.sigmas)
        if not count:
            raise ValueError("the sampler never evaluates its denoiser.")
        noise = _Stand(torch.randn(2, count))
        walk(noise, torch.randn(2, 1, 1, 1))
        once, tripled = (_unit(walk, count, scale) for scale in (1.0, 3.0))
    if any(tuple(stand.sigmas) != sigmas for stand in (noise, once, tripled)):
        return Evaluations(sigmas, why="which evaluations it makes depends on the data", fixed=False)
    if bool(final.any()) or not torch.allclose(3 * once.rows, tripled.rows, rtol=1e-4, atol=1e-6):
        return Evaluations(sigmas, why="it adds noise, or is not linear in its denoiser's outputs")
    return Evaluations(sigmas, once.rows)


def _unit(walk: Walk, count: int, scale: float) -> _Stand:
    """The sampler on unit vectors: sample 0 carries the first latent, the others one output each."""
    stand = _Stand(scale * torch.eye(count + 1)[:, 1:])
    x = torch.zeros(count + 1, 1, 1, 1)
    x[0] = scale
    stand.latents.append(walk(stand, x))
    return stand


class _Stand:
    """In place of a denoiser: its n-th output v is the n-th column of a matrix, whose rows are the samples."""

    def __init__(self, columns: torch.Tensor) -> None:
        self.columns = columns
        self.sigmas: list[float] = []
        self.latents: list[torch.Tensor] = []

    @property
    def rows(self) -> torch.Tensor:
        """The latents, (E + 1, samples)."""
        return torch.stack([x.flatten().double() for x in self.latents])

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **options: Any) -> torch.Tensor:
        number = len(self.sigmas)
        if number >= MOST_EVALUATIONS:
            raise ValueError(f"the sampler makes more than {MOST_EVALUATIONS} evaluations.")
        if (options.get("model_options") or {}).get(ASIDE):
            raise _LooksAside
        self.sigmas.append(float(sigma.flatten()[0]))
        self.latents.append(x.clone())
        if number >= self.columns.shape[1]:  # being counted, or more than were counted
            return x.clone()
        return x - self.sigmas[-1] * self.columns[:, number].view(-1, 1, 1, 1).to(x)
