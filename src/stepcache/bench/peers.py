"""Other projects' caches, entered through their public API, so that a benchmark can run them beside ours.

diffusers' own come with diffusers; cache-dit comes with `pip install 'stepcache[peers]'`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from stepcache.hosts.patching import shift_of
from stepcache.methods import Ratios

Entered = Callable[[Any, int], AbstractContextManager[None]]
"""(pipeline, steps) -> a context in which the cache is enabled on the pipeline's transformer."""
FORECASTS = {"taylorseer": "TaylorSeerCalibratorConfig", "dmd": "DMDCalibratorConfig", "foca": "FoCaCalibratorConfig"}
"""cache-dit's calibrators and the names of their settings there."""


def first_block_cache(threshold: float) -> Entered:
    """FirstBlockCache of diffusers: the first block always runs, the others when its output moved by `threshold`."""
    return _diffusers("FirstBlockCacheConfig", lambda steps: {"threshold": threshold})


def sea_cache(threshold: float, order: int = 1, most: int = 2) -> Entered:
    """SeaCache of diffusers (arXiv 2602.18993); the residual extrapolated by `order`, `most` steps reused in a row."""
    settings = {"threshold": threshold, "residual_order": order, "max_consecutive_cached": most}
    return _diffusers("SeaCacheConfig", lambda steps: settings)


def mag_cache(threshold: float, K: int = 3, R: float = 0.2, ratios: Ratios | None = None) -> Entered:
    """MagCache of diffusers with the first branch's ratios (one list serves all branches there).

    Raises:
        ValueError: no ratios; they belong to a model and a step count.
    """
    if ratios is None:
        raise ValueError(
            "diffusers' MagCache needs ratios=FILE; stepcache generate --policy magcache-calibration:FILE writes it."
        )
    measured = ratios

    def settings(steps: int) -> dict[str, Any]:
        table = next(iter(measured.at(steps, "product").branches.values()))
        return {
            "threshold": threshold,
            "max_skip_steps": K,
            "retention_ratio": R,
            "num_inference_steps": steps,
            "mag_ratios": list(table),
        }

    return _diffusers("MagCacheConfig", settings)


def taylorseer_cache(interval: int, order: int = 1) -> Entered:
    """TaylorSeer of diffusers, lite: the last layer's output is predicted between steps computed `interval` apart.

    (Its other mode looks for attentions by names that Wan's transformer does not have: diffusers 0.42.)
    """
    import torch

    settings = {
        "cache_interval": interval,
        "max_order": order,
        "taylor_factors_dtype": torch.float32,
        "use_lite_mode": True,
    }
    return _diffusers("TaylorSeerCacheConfig", lambda steps: settings)


SAMPLERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
}
"""Samplers an uncached run may be made with instead of the pipeline's own: how far are two right answers apart?"""


def other_sampler(name: str) -> Entered:
    """The uncached run with another sampler, on the noise levels of the pipeline's own.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r}; expected one of {', '.join(SAMPLERS)}.")

    @contextmanager
    def entered(pipe: Any, steps: int) -> Iterator[None]:
        import diffusers

        own, kind = pipe.scheduler, getattr(diffusers, SAMPLERS[name])
        pipe.scheduler = kind.from_config(own.config, **_flow(own.config, kind))
        try:
            yield
        finally:
            pipe.scheduler = own

    return entered


def _flow(config: Any, kind: type) -> dict[str, Any]:
    """A flow model's settings in the words of another sampler."""
    if not is_flow(config):
        return {}
    shift = shift_of(config)
    if kind.__name__.startswith("FlowMatch"):
        return {} if shift is None else {"shift": shift}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return flow if shift is None else {**flow, "flow_shift": shift}


def is_flow(config: Any) -> bool:
    """Whether a sampler is of a flow model."""
    return config.get("prediction_type") == "flow_prediction" or "shift" in config


def _diffusers(name: str, settings: Callable[[int], dict[str, Any]]) -> Entered:
    """Raises ImportError now, before any model is loaded, if this diffusers has no such cache."""
    try:
        import diffusers
        from diffusers import hooks
    except ImportError as error:
        raise ImportError("this needs diffusers: pip install 'stepcache[diffusers]'.") from error
    config = getattr(hooks, name, None)
    if config is None:
        raise ImportError(f"diffusers {diffusers.__version__} has no {name}; install a newer one.")

    @contextmanager
    def entered(pipe: Any, steps: int) -> Iterator[None]:
        pipe.transformer.enable_cache(config(**settings(steps)))
        try:
            yield None
        finally:
            pipe.transformer.disable_cache()

    return entered


def dbcache(
    threshold: float, F: int = 1, B: int = 0, W: int = 8, MC: int = -1, taylor: int = 0, forecast: str = ""
) -> Entered:
    """DBCache of cache-dit: the first `F` and last `B` blocks always run, `W` warm-up steps, `MC` reused in a row.

    `forecast`: its calibrator, see `FORECASTS`, of order `taylor` if it is taylorseer; none repeats the residual.
    """
    settings = {
        "Fn_compute_blocks": F,
        "Bn_compute_blocks": B,
        "max_warmup_steps": W,
        "max_continuous_cached_steps": MC,
        "residual_diff_threshold": threshold,
    }
    return _cache_dit(lambda module, steps: settings, forecast, taylor)


def dbcache_mask(policy: str, F: int = 1, taylor: int = 0, forecast: str = "") -> Entered:
    """Static step masks of cache-dit: slow, medium, fast or ultra."""
    if policy not in ("slow", "medium", "fast", "ultra"):
        raise ValueError(f"the mask is {policy!r}; expected slow, medium, fast or ultra.")
    return _masked(lambda module, steps: module.steps_mask(mask_policy=policy, total_steps=steps), F, forecast, taylor)


def dbcache_on(computed: Collection[int], forecast: str = "") -> Entered:
    """cache-dit on given computed steps; its first block runs at skipped ones too."""
    return _masked(lambda module, steps: [int(step in computed) for step in range(steps)], 1, forecast, 0)


def _masked(mask: Callable[[Any, int], list[int]], F: int, forecast: str, taylor: int) -> Entered:
    def settings(module: Any, steps: int) -> dict[str, Any]:
        given = mask(module, steps)
        return {"Fn_compute_blocks": F, "steps_computation_mask": given, "steps_computation_policy": "static"}

    return _cache_dit(settings, forecast, taylor)


def _cache_dit(settings: Callable[[Any, int], dict[str, Any]], forecast: str, taylor: int) -> Entered:
    """Raises, now, before any model is loaded: ImportError if cache-dit is not installed, ValueError for a forecast."""
    forecast = forecast or ("taylorseer" if taylor else "")
    if forecast and forecast not in FORECASTS:
        raise ValueError(f"the forecast is {forecast!r}; expected {', '.join(FORECASTS)}.")
    if taylor and forecast != "taylorseer":
        raise ValueError(f"taylor={taylor} is the order of the taylorseer forecast; it has no effect on {forecast}.")
    if importlib.util.find_spec("cache_dit") is None:
        raise ImportError("cachedit needs cache-dit: pip install 'stepcache[peers]'.")

    @contextmanager
    def entered(pipe: Any, steps: int) -> Iterator[None]:
        import cache_dit

        for name in [n for n in logging.root.manager.loggerDict if n.startswith("cache_dit")]:
            logging.getLogger(name).setLevel(logging.ERROR)  # a dozen lines each time it is enabled
        config = cache_dit.DBCacheConfig(num_inference_steps=steps, **settings(cache_dit, steps))
        order = {"taylorseer_order": taylor or 1} if forecast == "taylorseer" else {}
        calibrator = getattr(cache_dit, FORECASTS[forecast])(**order) if forecast else None
        with _left_as_found(pipe):
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
            try:
                yield None
            finally:
                cache_dit.disable_cache(pipe)

    return entered


@contextmanager
def _left_as_found(pipe: Any) -> Iterator[None]:
    """Put back what a module of a transformer had: cache-dit 1.5 leaves hooks on FLUX's, and the next cache fails."""
    roots = [part for name, part in pipe.components.items() if name.startswith("transformer") and part is not None]
    before = [(m, dict(vars(m)), dict(m._modules)) for root in roots for m in root.modules()]
    try:
        yield
    finally:
        for module, attributes, children in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
