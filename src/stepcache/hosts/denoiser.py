"""stepcache in samplers that are functions of a denoiser: k-diffusion's, or your own.

    with stepcache.accelerate(denoiser, Hindsight(10), sampler=sample_heun, sigmas=sigmas) as run:
        x = sample_heun(run, x, sigmas)
    print(run.summary())

`run` takes the place of the denoiser. The unit is an evaluation of it, guidance included: budgets count evaluations,
and a skipped one does not call the denoiser at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stepcache.core.cache import StepCache
from stepcache.core.plan import Plan
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.hindsight.evaluations import Denoiser, Evaluations, probe
from stepcache.hosts.patching import device_from
from stepcache.named import named


class Denoising:
    """One run of a sampler over a denoiser: every guided evaluation is computed, or forecast without it."""

    def __init__(
        self,
        policy: Policy,
        evaluations: Evaluations,
        *,
        flow: bool,
        cache_device: torch.device | str | None = None,
        **known: Any,
    ) -> None:
        """ValueError as the policy's `begin`.

        Args:
            policy: with its settings.
            evaluations: of the sampler, see `probe`; ValueError if they are not fixed.
            flow: whether x = (1 - sigma) x_0 + sigma n; else x = x_0 + sigma n.
            cache_device: where tensors live between evaluations, if not where they are made.
            known: further fields of the `Trajectory`.
        """
        self.evaluations = evaluations
        if not evaluations.fixed:
            raise ValueError(f"no evaluation of this sampler can be skipped: {evaluations.why}.")
        levels = [s if flow else s / (1 + s) for s in evaluations.sigmas]
        timesteps = tuple(1000 * level for level in levels)
        self._trajectory = Trajectory(len(levels), timesteps=timesteps, sampler=evaluations, **known)
        self.cache = StepCache(policy, cache_device=device_from(cache_device))
        self.begin()

    def begin(self) -> None:
        """Another run of the same sampler."""
        self.cache.begin(self._trajectory)

    def evaluate(self, x: torch.Tensor, sigma: torch.Tensor, denoised: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the sampler gets; `denoised` evaluates the denoiser at (x, sigma) and is called if that is needed."""
        cache, level = self.cache, sigma.view(-1, *[1] * (x.ndim - 1)).to(x)
        call, found, output = cache.enter("all", x), None, None
        if call.compute:
            found = denoised()
            output = (x - found) / level
            cache.keep(call, x, output)
        else:
            output = torch.empty_like(x) if cache.strategy.predicts_guided else cache.predict(call, x)
        given = cache.step_over(output)
        cache.leave(call, x)
        if given is None or (found is not None and given is output):
            return x if found is None else found
        return x - level * given

    def summary(self) -> RunSummary:
        """What the current or last run did so far."""
        return self.cache.summary()


class DenoiserRun(Denoising):
    """An accelerated denoiser: call it as the denoiser itself."""

    def __init__(self, denoiser: Denoiser, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._denoiser = denoiser
        self._next = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **options: Any) -> torch.Tensor:
        """The denoised x, computed or forecast.

        Raises:
            ValueError: the sampler evaluates at other noise levels than it did when it was probed.
        """
        expected, level = self.evaluations.sigmas, float(sigma.flatten()[0])
        if self._next and (self._next == len(expected) or not _near(level, expected[self._next])):
            if not _near(level, expected[0]):
                raise ValueError(
                    f"evaluation {self._next} is at noise level {level:g}, and of the sampler and sigmas that "
                    f"accelerate() was given at {expected[self._next % len(expected)]:g}. Give it the ones that run."
                )
            self._next = 0
            self.begin()  # the last run ended, perhaps before its end
        self._next += 1
        return self.evaluate(x, sigma, lambda: self._denoiser(x, sigma, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_denoiser"], name)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * abs(b)  # samplers may hold their levels in bfloat16


@contextmanager
def accelerate_denoiser(
    denoiser: Denoiser,
    policy: Policy | Plan | str,
    *,
    sampler: Callable[..., torch.Tensor],
    sigmas: torch.Tensor,
    flow: bool | None = None,
    guidance: float | None = None,
    model: str | None = None,
    cache_device: torch.device | str | None = None,
    **arguments: Any,
) -> Iterator[DenoiserRun]:
    """Stand in for a denoiser while its sampler runs.

    Args:
        denoiser: (x, sigma of shape (samples,), ...) -> denoised x, guidance done.
        policy: a method with its settings, a plan file, a `Plan`, or a name; of so many evaluations.
        sampler: the function that will run: sampler(denoiser, x, sigmas, ...).
        sigmas: the noise levels it will be given, the last one 0 as usual.
        flow: whether x = (1 - sigma) x_0 + sigma n (flow matching); else x = x_0 + sigma n. Default: by whether sigmas
            are above 1.
        guidance: the guidance scale; plans are checked against it. Default: not checked.
        model: its name, likewise.
        cache_device: where tensors live between evaluations; default: where they are made.
        arguments: what else the sampler will be given, such as its order.

    Raises:
        ValueError: the policy does not fit the sampler's evaluations, or the sampler cannot be run on unit vectors.
    """

    def walk(stand: Denoiser, x: torch.Tensor) -> torch.Tensor:
        return sampler(stand, x, sigmas.detach().cpu().clone(), **arguments)

    flow = float(sigmas.max()) <= 1 if flow is None else flow
    known = {"guidance": guidance, "model": model, "scheduler": getattr(sampler, "__name__", None)}
    run = DenoiserRun(denoiser, named(policy), probe(walk), flow=flow, cache_device=cache_device, **known)
    try:
        yield run
    finally:
        run.cache.end()
