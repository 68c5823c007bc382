"""stepcache in diffusers pipelines: WanPipeline and WanImageToVideoPipeline, at both boundaries.

    with stepcache.accelerate(pipe, LeMiCa(budget=25)) as run:
        video = pipe(prompt).frames[0]
    print(run.summary())

The transformer's `forward` and `cache_context` are replaced on the instance. A new trajectory is recognised by the
scheduler's timesteps: every pipeline makes new ones (`set_timesteps`) before its loop, also after an interruption.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from stepcache.cache import Call, Policy, RunSummary, StepCache
from stepcache.hosts.patching import BlockStack, Patches
from stepcache.plan import Boundary, Plan, Trajectory
from stepcache.policies import as_policy

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
BLOCKS = {"WanTransformer3DModel": "blocks"}
"""Transformer class -> the list of blocks that the `blocks` boundary cuts around."""

PUBLISHED = {  # (class, layers, heads, width of a head, input channels) of the released checkpoints
    ("WanTransformer3DModel", 30, 12, 128, 16): "wan2.1-t2v-1.3B",
    ("WanTransformer3DModel", 40, 40, 128, 16): "wan2.1-t2v-14B",
    ("WanTransformer3DModel", 40, 40, 128, 36): "wan2.1-i2v-14B",
}


class Run:
    """An accelerated pipeline: what `enable` returns and `accelerate` yields."""

    def __init__(self, cache: StepCache, patches: Patches, transformer: torch.nn.Module) -> None:
        self.cache, self._patches = cache, patches
        self._transformer = weakref.ref(transformer)
        _ENTERED.add(transformer)

    def summary(self) -> RunSummary:
        """What the last generation (or the one under way) did: fields, and text when printed."""
        return self.cache.summary()

    def stop(self) -> None:
        """Restore the pipeline and free the cache; the summary stays."""
        self._patches.restore()
        self.cache.end()
        if (transformer := self._transformer()) is not None:
            _ENTERED.discard(transformer)


_RUNS: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
_ENTERED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Transformers that carry a cache: one that is shared by two pipelines can carry one only."""


def enable(
    pipe: Any,
    policy: Policy | Plan,
    *,
    boundary: Boundary | None = None,
    cache_device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Run:
    """Put a cache into a pipeline until `disable`; all later calls of the pipeline use it.

    Args:
        pipe: a WanPipeline or WanImageToVideoPipeline.
        policy: a method with its settings, e.g. `LeMiCa(budget=25)`, or a `Plan`.
        boundary: "output" or "blocks"; default: the policy's.
        cache_device: where cached tensors live between steps, e.g. "cpu"; default: where they are made.
        group: process group of the ranks that work on one trajectory together (context parallelism).

    Raises:
        ValueError: the pipeline is not supported, is enabled already, or has diffusers' own cache enabled.
    """
    policy = as_policy(policy)
    transformer = _transformer(pipe)
    cache = StepCache(policy, boundary=boundary, cache_device=cache_device, group=group)
    patches = Patches()
    try:
        _Entrance(pipe, transformer, cache, patches)
    except Exception:
        patches.restore()
        raise
    run = _RUNS[pipe] = Run(cache, patches, transformer)
    return run


def disable(pipe: Any) -> None:
    """Restore the pipeline exactly and free the cache. Harmless when nothing is enabled."""
    run = _RUNS.pop(pipe, None)
    if run is not None:
        run.stop()


@contextmanager
def accelerate(pipe: Any, policy: Policy | Plan, **options: Any) -> Iterator[Run]:
    """`enable` on entry, `disable` on exit, also after an exception. Options are those of `enable`."""
    run = enable(pipe, policy, **options)
    try:
        yield run
    finally:
        disable(pipe)


def model_name(transformer: torch.nn.Module) -> str:
    """A published name when the configuration is that of a released checkpoint, else the structure in short."""
    c: Any = transformer.config
    cls = type(transformer).__name__
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    layers, heads, width, channels = (int(getattr(c, n, 0)) for n in names)
    return PUBLISHED.get((cls, layers, heads, width, channels), f"{cls}-{layers}x{heads}x{width}-{channels}ch")


def _transformer(pipe: Any) -> torch.nn.Module:
    if type(pipe).__name__ not in PIPELINES:
        raise ValueError(f"{type(pipe).__name__} is not supported; expected one of {', '.join(PIPELINES)}.")
    if pipe in _RUNS:
        raise ValueError("a cache is enabled on this pipeline already; call stepcache.disable(pipe) first.")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError("this pipeline has two transformers (Wan2.2); only Wan2.1 pipelines are supported so far.")
    transformer = pipe.transformer
    if transformer in _ENTERED:
        raise ValueError("another pipeline with the same transformer has a cache enabled; disable it there first.")
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("diffusers' own cache is enabled on this transformer; call its disable_cache() first.")
    return transformer


class _Entrance:
    """The place where the transformer is entered: finds trajectory, step and branch, and acts on the decision."""

    def __init__(self, pipe: Any, transformer: Any, cache: StepCache, patches: Patches) -> None:
        self.pipe, self.cache = weakref.ref(pipe), cache
        self.model = model_name(transformer)
        self.channels = transformer.config.out_channels or transformer.config.in_channels
        self.context: str | None = None
        self.timesteps: Any = None
        self.repack: Callable[[torch.Tensor], Any] = lambda sample: (sample,)
        self.blocks = None
        if cache.boundary == "blocks":
            blocks = getattr(transformer, BLOCKS[type(transformer).__name__])
            self.blocks = BlockStack(cache, list(blocks), patches)
        patches.set(transformer, "forward", self._forward)
        if hasattr(transformer, "cache_context"):
            patches.set(transformer, "cache_context", self._cache_context)

    def _cache_context(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            outer, self.context = self.context, name
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self.context = outer

        return cache_context

    def _forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._announce()
            x = args[0] if args else kwargs["hidden_states"]
            latent = x[:, : self.channels]  # condition channels (image to video) say nothing about the trajectory
            text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
            call = self.cache.enter(self.context or id(text), latent, holder=text)
            if self.blocks is not None:
                return self._through_blocks(call, original, args, kwargs)
            if not call.compute:
                sample = self.cache.predict(call, latent)
                self.cache.leave(call, sample)
                return self.repack(sample)
            result = original(*args, **kwargs)
            self.cache.keep(call, latent, result[0])
            self.cache.leave(call, latent)
            kind = type(result)
            self.repack = (lambda s: (s,)) if kind is tuple else (lambda s: kind(sample=s))
            return result

        return forward

    def _through_blocks(self, call: Call, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.blocks is None:
            raise RuntimeError("the blocks boundary was not installed.")
        with self.blocks.during(call):
            result = original(*args, **kwargs)
        self.cache.leave(call, result[0])
        return result

    def _announce(self) -> None:
        """Begin a trajectory when the scheduler's timesteps are new objects."""
        pipe = self.pipe()
        scheduler = pipe.scheduler if pipe is not None else None
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or timesteps is self.timesteps:
            return
        config = scheduler.config if scheduler is not None else {}
        run = Trajectory(
            num_steps=len(timesteps),
            model=self.model,
            shift=config.get("flow_shift", config.get("shift")),
            guidance=getattr(pipe, "guidance_scale", None),
            timesteps=tuple(float(t) for t in timesteps.tolist()),
        )
        self.cache.begin(run)
        self.timesteps = timesteps
