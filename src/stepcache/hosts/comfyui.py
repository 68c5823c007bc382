"""stepcache in ComfyUI: two hooks on a cloned model, one around a sampler's run, one around a guided evaluation.

A skipped evaluation does not call ComfyUI's own at all, so it does not depend on conditions, areas, batches, masks,
control nets or guiders. Every run of a sampler (of two in a row, of a part of the steps, of denoise below 1) is a
trajectory of its own. Nothing of ComfyUI is imported: its names for the hooks are strings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.hindsight.evaluations import Denoiser, probe
from stepcache.hosts.denoiser import Denoising

KEY = "stepcache"
SAMPLER_SAMPLE, PREDICT_NOISE = "sampler_sample", "predict_noise"
RIVALS = {"easycache": "EasyCache or LazyCache"}
"""Other caches by their entry in `transformer_options`."""
OLD = "this ComfyUI has no hooks for samplers; update it to 0.3.64 or newer."

log = logging.getLogger(KEY)


@dataclass(frozen=True)
class Patch:
    """What a patched model carries.

    Args:
        policy: the number of a run's evaluations -> a policy for it; ValueError if it does not fit.
        name: of the model, under which plans are checked and published figures looked up.
        ended: called with the policy when a run came to its end.
    """

    policy: Callable[[int], Policy]
    name: str | None = None
    ended: Callable[[Policy], None] | None = None


def patched(model: Any, patch: Patch) -> Any:
    """A clone of a ModelPatcher whose runs are accelerated; the given one stays as it is.

    Raises:
        ValueError: the model carries a cache, or ComfyUI is too old.
    """
    if not hasattr(model, "add_wrapper_with_key"):
        raise ValueError(OLD)
    refuse(model.model_options)
    if model.get_wrappers(SAMPLER_SAMPLE, KEY):
        raise ValueError("this model carries a StepCache already; one node is enough.")
    found = model.clone()
    found.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, lambda executor, *a, **k: _sampled(patch, executor, *a, **k))
    found.add_wrapper_with_key(PREDICT_NOISE, KEY, _evaluated)
    return found


def refuse(model_options: dict[str, Any]) -> None:
    """ValueError for what cannot go together with a cache around guided evaluations."""
    for key, name in RIVALS.items():
        if key in model_options.get("transformer_options", {}):
            raise ValueError(f"this model carries the native {name}; take that node out, two caches do not mix.")
    if model_options.get("context_handler") is not None:
        raise ValueError("this model has context windows, several evaluations a step; StepCache does not follow them.")


def _sampled(patch: Patch, executor: Any, guider: Any, sigmas: torch.Tensor, extra: Any, *args: Any, **kw: Any) -> Any:
    """Around the run of a sampler: prepare it, put it where evaluations find it, say what it did."""
    refuse(extra["model_options"])
    sampler, inner = executor.class_obj, guider.inner_model
    if len(sigmas) < 2 or not hasattr(sampler, "sampler_function"):
        log.warning("StepCache: %s is not one of ComfyUI's samplers; all of it is computed.", type(sampler).__name__)
        return executor(guider, sigmas, extra, *args, **kw)
    evaluations = probe(_walk(sampler, guider, sigmas))
    if not evaluations.fixed:
        log.warning("StepCache: every evaluation of %s is computed: %s.", _name(sampler), evaluations.why)
        return executor(guider, sigmas, extra, *args, **kw)
    policy = patch.policy(len(evaluations.sigmas))
    known = {"guidance": getattr(guider, "cfg", None), "model": patch.name, "scheduler": _name(sampler)}
    denoising = Denoising(policy, evaluations, flow=is_flow(inner.model_sampling), **known)
    options = extra["model_options"].setdefault("transformer_options", {})
    options[KEY] = denoising
    try:
        result = executor(guider, sigmas, extra, *args, **kw)
        log.info(line(denoising.summary()))
        if patch.ended is not None:
            patch.ended(policy)
        return result
    finally:
        options.pop(KEY, None)
        denoising.cache.end()


def _evaluated(executor: Any, x: torch.Tensor, sigma: torch.Tensor, options: Any = None, *args: Any, **kw: Any) -> Any:
    """Around a guided evaluation."""
    denoising = ((options or {}).get("transformer_options") or {}).get(KEY)
    if denoising is None:
        return executor(x, sigma, options, *args, **kw)
    return denoising.evaluate(x, sigma, lambda: executor(x, sigma, options, *args, **kw))


def _walk(sampler: Any, guider: Any, sigmas: torch.Tensor) -> Callable[[Denoiser, torch.Tensor], torch.Tensor]:
    """The sampler on any denoiser, from x on, without callbacks."""

    def walk(denoiser: Denoiser, x: torch.Tensor) -> torch.Tensor:
        levels = sigmas.detach().cpu().clone()  # uni_pc writes into them
        extra = {"model_options": {}, "seed": 0}
        options = dict(sampler.extra_options)
        return sampler.sampler_function(
            _Stand(denoiser, guider, levels), x, levels, extra_args=extra, callback=None, disable=True, **options
        )

    return walk


class _Stand:
    """What a sampler is handed instead of ComfyUI's wrapped model: samplers ask it for the model's noise schedule."""

    def __init__(self, denoiser: Denoiser, guider: Any, sigmas: torch.Tensor) -> None:
        self._denoiser, self.inner_model, self.sigmas = denoiser, guider, sigmas

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **options: Any) -> torch.Tensor:
        return self._denoiser(x, sigma, **options)


def is_flow(model_sampling: Any) -> bool:
    """Whether x = (1 - sigma) x_0 + sigma n: whether noise of level 1 leaves nothing of the picture."""
    noise, picture = torch.zeros(1), torch.ones(1)
    return float(model_sampling.noise_scaling(torch.ones(1), noise, picture)) == 0.0


def _name(sampler: Any) -> str:
    return str(getattr(sampler.sampler_function, "__name__", "sampler")).removeprefix("sample_")


def line(summary: RunSummary) -> str:
    """One line: computed steps, times, warnings."""
    kinds = (("computed", summary.seconds_per_computed_step), ("skipped", summary.seconds_per_skipped_step))
    times = [f"{1000 * seconds:.1f} ms a {kind} one" for kind, seconds in kinds if seconds is not None]
    told = f"StepCache, {summary.policy}: {len(summary.computed)} of {summary.num_steps} evaluations computed"
    return "; ".join([", ".join([told, *times]), *summary.warnings])
