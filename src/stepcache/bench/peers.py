"""Other projects' caches, entered through their public API, so that a benchmark can run them beside ours.

diffusers' own come with diffusers; cache-dit comes with `pip install 'stepcache[peers]'`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from stepcache.methods import Ratios

Entered = Callable[[Any, int], AbstractContextManager[None]]
"""(pipeline, steps) -> a context in which the cache is enabled on the pipeline's transformer."""


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


def dbcache(threshold: float, F: int = 1, B: int = 0, W: int = 8, MC: int = -1, taylor: int = 0) -> Entered:
    """DBCache of cache-dit: the first `F` and last `B` blocks always run, `W` warm-up steps, `MC` reused in a row.

    `taylor`: order of its TaylorSeer calibrator; 0 repeats the residual.
    """
    settings = {
        "Fn_compute_blocks": F,
        "Bn_compute_blocks": B,
        "max_warmup_steps": W,
        "max_continuous_cached_steps": MC,
        "residual_diff_threshold": threshold,
    }
    return _cache_dit(lambda module, steps: settings, taylor)


def dbcache_mask(policy: str, F: int = 1, taylor: int = 0) -> Entered:
    """Static step masks of cache-dit: slow, medium, fast or ultra."""

    def settings(module: Any, steps: int) -> dict[str, Any]:
        mask = module.steps_mask(mask_policy=policy, total_steps=steps)
        return {"Fn_compute_blocks": F, "steps_computation_mask": mask, "steps_computation_policy": "static"}

    if policy not in ("slow", "medium", "fast", "ultra"):
        raise ValueError(f"the mask is {policy!r}; expected slow, medium, fast or ultra.")
    return _cache_dit(settings, taylor)


def _cache_dit(settings: Callable[[Any, int], dict[str, Any]], taylor: int) -> Entered:
    """Raises ImportError now, before any model is loaded, if cache-dit is not installed."""
    if importlib.util.find_spec("cache_dit") is None:
        raise ImportError("cachedit needs cache-dit: pip install 'stepcache[peers]'.")

    @contextmanager
    def entered(pipe: Any, steps: int) -> Iterator[None]:
        import cache_dit

        for name in [n for n in logging.root.manager.loggerDict if n.startswith("cache_dit")]:
            logging.getLogger(name).setLevel(logging.ERROR)  # a dozen lines each time it is enabled
        config = cache_dit.DBCacheConfig(num_inference_steps=steps, **settings(cache_dit, steps))
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor) if taylor else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        try:
            yield None
        finally:
            cache_dit.disable_cache(pipe)

    return entered
