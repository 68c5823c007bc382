"""stepcache in diffusers: any pipeline with a transformer, without model-specific code.

    with stepcache.accelerate(pipe, LeMiCa(budget=25)) as run:
        video = pipe(prompt).frames[0]
    print(run.summary())

What all pipelines have in common is enough: new scheduler timesteps begin a run, `scheduler.step` ends a step and is
given the guided output, the latent is the first argument of the transformer, and a branch has a name (`cache_context`)
or a prompt of its own. The `blocks` boundary needs to know the block lists of a transformer: one row of `BLOCKS`.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, overload

import torch
import torch.distributed as dist

from stepcache.core.cache import StepCache
from stepcache.core.plan import Plan
from stepcache.core.strategy import Call, Policy
from stepcache.core.summary import RunSummary
from stepcache.core.tensors import narrow
from stepcache.core.trajectory import Boundary, Modulation, Trajectory
from stepcache.hosts.denoiser import DenoiserRun, accelerate_denoiser
from stepcache.hosts.entering import Method
from stepcache.hosts.patching import (
    Branches,
    ForeignBlockStack,
    LastingPatches,
    TreeEntrance,
    at_sampler,
    device_from,
    first_tensor,
    inside,
    shift_of,
)
from stepcache.named import named

PATCHING = LastingPatches.__init__.__code__.co_filename
"""File of our own replacements of others' methods."""
CONDITIONS = ("encoder_hidden_states", "cap_feats", "prompt_embeds", "class_labels", "input_ids", "text_bth")
"""Names of the transformers' text inputs; the first that is given distinguishes branches where pipelines name none."""
LATENTS = ("hidden_states", "vision_tokens")
"""Names of the transformers' noisy inputs, where that is not the first."""
TEXT_FIRST = ("Ideogram4Transformer2DModel", "QwenImage21Transformer2DModel")
"""Transformers whose input has the text's tokens before the latent's."""


@dataclass(frozen=True)
class Blocks:
    """A transformer's block lists in the order in which they run, and the streams a block takes and returns."""

    lists: tuple[str, ...] = ("transformer_blocks",)
    streams: tuple[str, ...] = ("hidden_states",)


_TWO = ("transformer_blocks", "single_transformer_blocks")
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_TEXT_LAST = ("hidden_states", "encoder_hidden_states")

BLOCKS = {
    "CogVideoXTransformer3DModel": Blocks(streams=_TEXT_LAST),
    "CogView4Transformer2DModel": Blocks(streams=_TEXT_LAST),
    "FluxTransformer2DModel": Blocks(_TWO, _TEXT_FIRST),
    "HunyuanVideo15Transformer3DModel": Blocks(streams=_TEXT_LAST),
    "HunyuanVideoTransformer3DModel": Blocks(_TWO, _TEXT_LAST),
    "LTXVideoTransformer3DModel": Blocks(),
    "MochiTransformer3DModel": Blocks(streams=_TEXT_LAST),
    "QwenImageTransformer2DModel": Blocks(streams=_TEXT_FIRST),
    "SD3Transformer2DModel": Blocks(streams=_TEXT_FIRST),
    "WanTransformer3DModel": Blocks(("blocks",)),
}

MARKS = ("guidance_embeds", "pos_embed_seq_len", "zero_cond_t", "use_meanflow")
"""Settings that tell models of one size apart: distilled or not, first and last frame or first only."""
RELEASED = {  # (transformer, layers, single layers, heads, input channels, transformers, marks): published names
    ("WanTransformer3DModel", 30, 0, 12, 16, 1): ("wan2.1-t2v-1.3B",),
    ("WanTransformer3DModel", 40, 0, 40, 16, 1): ("wan2.1-t2v-14B",),
    ("WanTransformer3DModel", 40, 0, 40, 36, 1): ("wan2.1-i2v-14B",),
    ("WanTransformer3DModel", 40, 0, 40, 16, 2): ("wan2.2-t2v-A14B",),
    ("WanTransformer3DModel", 40, 0, 40, 36, 2): ("wan2.2-i2v-A14B",),
    ("WanTransformer3DModel", 30, 0, 24, 48, 1): ("wan2.2-ti2v-5B-t2v", "wan2.2-ti2v-5B-i2v"),
    ("HunyuanVideoTransformer3DModel", 20, 40, 24, 16, 1, "guidance_embeds"): (
        "hunyuanvideo-720p",
        "hunyuanvideo-544p",
    ),
    ("HunyuanVideo15Transformer3DModel", 54, 0, 16, 65, 1): ("hunyuanvideo-1.5",),
    ("QwenImageTransformer2DModel", 60, 0, 24, 64, 1): ("qwen-image", "qwen-image-2512", "qwen-image-edit"),
    ("FluxTransformer2DModel", 19, 38, 24, 64, 1, "guidance_embeds"): ("flux.1-dev", "flux.1-kontext"),
    ("Flux2Transformer2DModel", 8, 48, 48, 128, 1, "guidance_embeds"): ("flux.2-dev",),
}
"""Structures of released checkpoints. One that several share is none of them for certain: the user must say which."""
_WAN, _WAN_I2V = ("WanPipeline", "WanModularPipeline"), ("WanImageToVideoPipeline", "WanImage2VideoModularPipeline")
_WAN22 = ("WanPipeline", "Wan22ModularPipeline")
_WAN22_I2V = ("WanImageToVideoPipeline", "Wan22Image2VideoModularPipeline")
_QWEN = ("QwenImagePipeline", "QwenImageModularPipeline")
PIPELINES = {
    "wan2.1-t2v-1.3B": _WAN,
    "wan2.1-t2v-14B": _WAN,
    "wan2.1-i2v-14B": _WAN_I2V,
    "wan2.2-t2v-A14B": _WAN22,
    "wan2.2-i2v-A14B": _WAN22_I2V,
    "wan2.2-ti2v-5B-t2v": _WAN,
    "wan2.2-ti2v-5B-i2v": _WAN_I2V,
    "qwen-image": _QWEN,
    "qwen-image-2512": _QWEN,
    "qwen-image-edit": ("QwenImageEditPipeline", "QwenImageEditModularPipeline"),
    "flux.1-dev": ("FluxPipeline", "FluxModularPipeline"),
    "flux.1-kontext": ("FluxKontextPipeline", "FluxKontextModularPipeline"),
    "flux.2-dev": ("Flux2Pipeline", "Flux2ModularPipeline"),
}
"""The pipelines a name belongs to, where pipelines of other tasks load transformers of the same structure."""


class Run:
    """An accelerated pipeline: what `enable` returns and `accelerate` yields."""

    finalizer: weakref.finalize

    def __init__(self, cache: StepCache, patches: LastingPatches, transformers: list[torch.nn.Module]) -> None:
        self.cache, self._patches = cache, patches
        self._transformers = weakref.WeakSet(transformers)
        _ENTERED.update(transformers)

    def summary(self) -> RunSummary:
        """What the last generation (or the one under way) did: fields, and text when printed."""
        return self.cache.summary()

    def _stop(self) -> None:
        self._patches.restore()
        self.cache.end()
        _ENTERED.difference_update(self._transformers)


_RUNS: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
_ENTERED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Transformers that carry a cache: one that is shared by two pipelines can carry one only."""


def enable(
    pipe: Any,
    policy: Policy | Plan | str,
    *,
    boundary: Boundary | None = None,
    cache_device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Run:
    """Put a cache into a pipeline until `disable`; all later calls of the pipeline use it.

    Compile first: a transformer that is compiled after this would take the cache into its graph.

    Args:
        pipe: any diffusers pipeline with a transformer.
        policy: a method with its settings, e.g. `Hindsight(budget=25)`, a plan file, a `Plan`, or a name such as
            "hindsight:25" (`stepcache.named`).
        boundary: "output" or "blocks"; default: the policy's.
        cache_device: where cached tensors live between steps, e.g. "cpu"; default: where they are made.
        group: process group of the ranks that work on one trajectory together (context parallelism).

    Raises:
        ValueError: the pipeline has no transformer, is enabled already, or has diffusers' own cache enabled; or the
            blocks of its transformer are not known.
    """
    policy = named(policy)
    transformers = _transformers(pipe)
    cache = StepCache(policy, boundary=boundary, cache_device=device_from(cache_device), group=group)
    patches = LastingPatches()
    with ExitStack() as failed:
        failed.callback(patches.restore)
        _Host(pipe, transformers, cache, patches)
        failed.pop_all()
    run = _RUNS[pipe] = Run(cache, patches, list(transformers.values()))
    run.finalizer = weakref.finalize(pipe, run._stop)  # its transformer may live on in another pipeline
    return run


def disable(pipe: Any) -> None:
    """Restore the pipeline exactly and free the cache. Harmless when nothing is enabled."""
    run = _RUNS.pop(pipe, None)
    if run is not None:
        run.finalizer()


@overload
def accelerate(
    pipe: Any,
    policy: Policy | Plan | str,
    *,
    sampler: Callable[..., torch.Tensor],
    sigmas: torch.Tensor,
    **options: Any,
) -> AbstractContextManager[DenoiserRun]: ...
@overload
def accelerate(pipe: Any, policy: Policy | Plan | str, **options: Any) -> AbstractContextManager[Run]: ...
def accelerate(pipe: Any, policy: Policy | Plan | str, **options: Any) -> AbstractContextManager[Any]:
    """`enable` on entry, `disable` on exit, also after an exception. Options are those of `enable`.

    With `sampler` and `sigmas` among them, `pipe` is a denoiser(x, sigma): see `hosts.denoiser.accelerate_denoiser`.
    """
    if "sampler" in options or "sigmas" in options:
        return accelerate_denoiser(pipe, policy, **options)
    return _enabled(pipe, policy, **options)


@contextmanager
def _enabled(pipe: Any, policy: Policy | Plan | str, **options: Any) -> Iterator[Run]:
    run = enable(pipe, policy, **options)
    try:
        yield run
    finally:
        disable(pipe)


def model_name(pipe: Any) -> str:
    """A published name when structure and pipeline are those of one released checkpoint, else the structure in short.

    Where several published models fit, the name is all of theirs, joined by " or ".
    """
    module = _first(pipe)
    c, cls = module.config, type(module).__name__
    names = ("num_layers", "num_single_layers", "num_attention_heads", "in_channels")
    layers, singles, heads, channels = (_whole(getattr(c, n, None)) for n in names)
    count = 1 if getattr(pipe, "transformer_2", None) is None else 2
    marks = tuple(n for n in MARKS if getattr(c, n, None))
    known = RELEASED.get((cls, layers, singles, heads, channels, count, *marks), ())
    fitting = [n for n in known if type(pipe).__name__ in PIPELINES.get(n, (type(pipe).__name__,))]
    if fitting:
        return " or ".join(fitting)
    blocks = f"{layers}+{singles}" if singles else str(layers)
    experts = "" if count == 1 else f"-{count}experts"
    return f"{cls}-{blocks}x{heads}x{_whole(getattr(c, 'attention_head_dim', None))}-{channels}ch{experts}"


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def is_transformer(component: str) -> bool:
    """Whether a component of this name is one: `transformer`, `transformer_2`, `unconditional_transformer`."""
    return component.startswith("transformer") or component.endswith("_transformer")


def _transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """Name -> module of the pipeline's transformers; ValueError if none can be used."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ValueError(f"{type(pipe).__name__} is not a diffusers pipeline; for other code use stepcache.attach.")
    found = {n: m for n, m in components.items() if is_transformer(n) and isinstance(m, torch.nn.Module)}
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no transformer: looked for a component of that name, "
            f"found {', '.join(sorted(n for n, m in components.items() if m is not None)) or 'none at all'}."
        )
    if not callable(getattr(getattr(pipe, "scheduler", None), "step", None)):
        raise ValueError(f"{type(pipe).__name__} has no scheduler, whose step would end a step; its loop is its own.")
    if pipe in _RUNS:
        raise ValueError("a cache is enabled on this pipeline already; call stepcache.disable(pipe) first.")
    for module in found.values():
        if module in _ENTERED:
            raise ValueError("another pipeline with the same transformer has a cache enabled; disable it there first.")
        if getattr(module, "is_cache_enabled", False):
            raise ValueError("diffusers' own cache is enabled on this transformer; call its disable_cache() first.")
    return found


class _Entrance(TreeEntrance):
    """Knows the latent's own part of inputs and outputs, which may have conditions as further channels or tokens."""

    own: torch.Size | None = None
    text_first = False
    _output: torch.Size | None = None

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """Without condition channels or tokens, once the output has shown which they are."""
        return narrow(x, self.own, self.text_first)

    def learn(self, call: Call, result: Any) -> torch.Tensor:
        """Also the shape of the output."""
        output = super().learn(call, result)
        if output.shape != self._output:
            self._output = self.own = output.shape
        return output

    def latent_is(self, shape: torch.Size) -> None:
        """The latent that the sampler works on has this shape.

        The output may have condition tokens behind it: shapes (batch, tokens, channels). In grids a smaller latent
        means other things (a first frame that is given), so they are left as they are.
        """
        own = self.own
        if own and len(shape) == len(own) == 3 and all(a <= b for a, b in zip(shape, own, strict=True)):
            self.own = shape

    def forget(self) -> None:
        """A new run."""
        self.own = self._output = None


class _Host:
    """Finds trajectory, step and branch of every call of a pipeline's transformers."""

    def __init__(
        self, pipe: Any, transformers: dict[str, torch.nn.Module], cache: StepCache, patches: LastingPatches
    ) -> None:
        self.pipe, self.cache, self.patches = weakref.ref(pipe), cache, patches
        self.transformers = weakref.WeakValueDictionary(transformers)
        self.context: str | None = None
        self.branches, self.entrances = Branches(), []
        self.timesteps = getattr(pipe.scheduler, "timesteps", None)  # of no run of ours
        self.watched: weakref.WeakSet[Any] = weakref.WeakSet()
        self._watch(pipe.scheduler)
        for name, module in transformers.items():
            if cache.boundary == "blocks" and (module is not inside(module) or module._compiled_call_impl):
                raise ValueError(
                    "the transformer is compiled as a whole, so its blocks cannot be entered one by one; compile the "
                    "blocks instead (compile_repeated_blocks), or use boundary output."
                )
            blocks = _block_stack(inside(module), cache, patches) if cache.boundary == "blocks" else None
            entrance = _Entrance(cache, blocks)
            entrance.text_first = type(inside(module)).__name__ in TEXT_FIRST
            self.entrances.append(entrance)
            patches.enter(module, self._enter(name, inside(module), entrance))
            if hasattr(module, "cache_context"):
                patches.set(inside(module), "cache_context", self._cache_context)

    def _cache_context(self, original: Method) -> Method:
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            self._check_entrance()
            outer, self.context = self.context, name
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self.context = outer

        return cache_context

    def _enter(self, name: str, module: Any, entrance: _Entrance) -> Callable[[Method], Method]:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if names[:1] in ([], ["args"]):
            raise ValueError(f"{type(module).__name__}.forward does not say what its arguments are; unwrap it first.")

        noisy = next((n for n in LATENTS if n in names), names[0])

        def make(original: Method) -> Method:
            def call(*args: Any, **kwargs: Any) -> Any:
                if (_caller() or self.pipe()) is not self.pipe():  # another pipeline's, with the same transformer
                    return original(*args, **kwargs)
                self._announce()
                if not self.cache.run.num_steps:  # outside of the denoising loop, before the first set_timesteps
                    return original(*args, **kwargs)
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                return entrance.enter(original, args, kwargs, given[noisy], self._branch(given), owner=name)

            return call

        return make

    def _branch(self, given: dict[str, Any]) -> str:
        """The branch's name: the pipeline's own, or one for its prompt; one branch where there is neither."""
        if self.context:
            return self.context
        found = (first_tensor(given.get(name)) for name in CONDITIONS)
        condition = next((tensor for tensor in found if tensor is not None), None)
        return "all" if condition is None else self.branches.name(condition)

    def _announce(self) -> None:
        """Begin a trajectory when the scheduler's timesteps are new objects."""
        pipe = self.pipe()
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or timesteps is self.timesteps:
            return
        self._check_entrance()
        if scheduler is not self.scheduler:  # replaced since
            self._watch(scheduler)
        self.cache.begin(_trajectory(pipe, scheduler, timesteps))
        self.branches.clear()
        for entrance in self.entrances:
            entrance.forget()
        self.timesteps = timesteps

    def _check_entrance(self) -> None:
        pipe = self.pipe()
        if self.patches.overridden() or any(getattr(pipe, n) is not m for n, m in self.transformers.items()):
            raise ValueError(
                "the pipeline's transformer was compiled or replaced after the cache was enabled; enable it last."
            )

    def _watch(self, scheduler: Any) -> None:
        """Hook the `step` of the pipeline's scheduler, and of others it has for a part of the latent (sound)."""
        self.scheduler = scheduler
        components = getattr(self.pipe(), "components", {}).values()
        others = [c for c in components if hasattr(c, "timesteps") and callable(getattr(c, "step", None))]
        for found in (scheduler, *others):
            if found not in self.watched:
                self.watched.add(found)
                step = self._step_of  # some pipelines step sound with a copy of their scheduler
                self.patches.set(found, "step", step(found), copies=step)

    def _step_of(self, scheduler: Any) -> Callable[[Method], Method]:
        """The replacement of `scheduler.step`."""
        own = scheduler is self.scheduler

        def make(original: Method) -> Method:
            def step(*args: Any, **kwargs: Any) -> Any:
                if (_caller() or self.pipe()) is not self.pipe():
                    return original(*args, **kwargs)
                self._check_entrance()
                sample = kwargs.get("sample", args[2] if len(args) > 2 else None)
                if own and isinstance(sample, torch.Tensor):
                    for entrance in self.entrances:
                        entrance.latent_is(sample.shape)
                args, kwargs = at_sampler(self.cache, args, kwargs, scheduler)
                if self.cache.finished:
                    self.branches.clear()  # the prompts are no longer needed
                return original(*args, **kwargs)

            return step

        return make


def _block_stack(transformer: torch.nn.Module, cache: StepCache, patches: LastingPatches) -> ForeignBlockStack:
    row = BLOCKS.get(type(transformer).__name__)
    if row is None:
        raise ValueError(
            f"the blocks of {type(transformer).__name__} are not known; use boundary output, which any transformer "
            f"has, or one of {', '.join(BLOCKS)}."
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError("the blocks see shards of the tokens under context parallelism; use boundary output.")
    blocks = [block for name in row.lists for block in getattr(transformer, name)]
    return ForeignBlockStack(cache, blocks, patches, row.streams, row.streams.index("hidden_states"))


def _trajectory(pipe: Any, scheduler: Any, timesteps: torch.Tensor) -> Trajectory:
    """What the pipeline is about to do. With `strength` (image to image) it walks only the last of the timesteps."""
    steps = len(timesteps) - (getattr(scheduler, "begin_index", None) or 0)
    said = getattr(pipe, "_num_timesteps", None)
    if isinstance(said, int):
        steps = min(steps, said)
    values = [float(t) for t in timesteps.tolist()][-steps:]
    config = scheduler.config
    shift = shift_of(config)
    transformer = _first(pipe)
    handover, ratio = None, getattr(pipe.config, "boundary_ratio", None)
    if ratio is not None and getattr(pipe, "transformer_2", None) is not None:
        handover = sum(t >= ratio * config["num_train_timesteps"] for t in values)
    return Trajectory(
        num_steps=steps,
        model=model_name(pipe),
        shift=shift,
        guidance=acting_guidance(pipe),
        timesteps=tuple(values),
        handover=handover if handover and handover < steps else None,
        modulation=_modulation(transformer),
        remarks=_remarks(pipe, transformer, scheduler, steps),
        scheduler=type(scheduler).__name__,
        sampler=scheduler,
    )


def acting_guidance(pipe: Any) -> float | None:
    """The guidance scale that mixes branches in the call under way: 1 where none does, `None` where it is not known.

    A distilled scale (FLUX's `guidance_scale`, an input of the model) is none of them. What only the pipeline's call
    knows (`true_cfg_scale`) is read there.
    """
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        scale = getattr(guider, "guidance_scale", None) if getattr(guider, "_enabled", True) else 1.0
        return float(scale) if isinstance(scale, int | float) else None
    call = _arguments(pipe)
    if "true_cfg_scale" in call:
        scale = call["true_cfg_scale"]
        return float(scale) if call.get("do_true_cfg", scale > 1) else 1.0
    acts = getattr(pipe, "do_classifier_free_guidance", None)
    scale = getattr(pipe, "guidance_scale", call.get("guidance_scale"))
    if acts is False or (acts is None and getattr(_first(pipe).config, "guidance_embeds", False)):
        return 1.0
    return float(scale) if isinstance(scale, int | float) else None


def _arguments(pipe: Any) -> dict[str, Any]:
    """What the pipeline's `__call__` under way alone knows of guidance; nothing outside of one."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" not in parameters and hasattr(pipe, "guidance_scale"):
        return {}
    for frame in _calls():
        found = _variables(frame, "self", "true_cfg_scale", "do_true_cfg", "guidance_scale")
        if found.pop("self", None) is pipe:
            return found
    return {}


def _caller() -> Any:
    """The pipeline whose `__call__` is under way, the innermost; `None` in a loop of somebody's own."""
    for frame in _calls():
        found = _variables(frame, "self").get("self")
        if hasattr(found, "components") and hasattr(found, "scheduler"):
            return found
    return None


def _calls() -> Iterator[FrameType]:
    """The frames of methods `__call__` on the stack, ours excepted, innermost first."""
    frame = sys._getframe().f_back
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",) and code.co_filename != PATCHING:
            yield frame
        frame = frame.f_back


def _variables(frame: FrameType, *names: str) -> dict[str, Any]:
    """Some of a frame's variables.

    Before Python 3.13 `f_locals` is a copy that stays with the frame: it is emptied, or it would hold latents for as
    long as the pipeline runs. (Where it is no mere copy, under a debugger or given out by `locals()`, it is left.)
    """
    variables = frame.f_locals
    found = {name: variables[name] for name in names if name in variables}
    if sys.version_info < (3, 13) and sys.gettrace() is None and "locals" not in frame.f_code.co_names:
        variables.clear()
    return found


def _modulation(transformer: Any) -> Modulation | None:
    """The time embedding and its projection, where the transformer has Wan's embedder; (1, D) and (1, 6 D)."""
    embedder: Any = getattr(transformer, "condition_embedder", None)
    if not all(hasattr(embedder, n) for n in ("timesteps_proj", "time_embedder", "act_fn", "time_proj")):
        return None

    @torch.no_grad()
    def modulation(timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = next(embedder.time_embedder.parameters())
        if weight.is_meta:
            raise ValueError("the time embedder's weights are offloaded one by one; offload whole models instead.")
        t = embedder.timesteps_proj(torch.tensor([timestep], device=weight.device))
        e = embedder.time_embedder(t.to(_floating(embedder.time_embedder, t.dtype)))
        e = e.to(_floating(embedder.time_proj, e.dtype))  # the embedder stays in float32 where the rest is in bfloat16
        return e, embedder.time_proj(embedder.act_fn(e))

    return modulation


def _floating(module: torch.nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The precision a module computes in; quantised weights are kept as whole numbers and do not tell."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), otherwise)


def _first(pipe: Any) -> Any:
    return inside(next(m for n, m in pipe.components.items() if is_transformer(n) and m is not None))


def _remarks(pipe: Any, model: Any, scheduler: Any, steps: int) -> tuple[str, ...]:
    """Reasons to doubt that neighbouring steps of this run are alike."""
    remarks, config, name = [], scheduler.config, type(scheduler).__name__
    schnell = type(model).__name__ == "FluxTransformer2DModel" and not getattr(model.config, "guidance_embeds", True)
    if getattr(pipe.config, "is_distilled", False) or getattr(model.config, "use_meanflow", False) or schnell:
        remarks.append(f"this model is distilled to few steps, each of which does the work of many; {steps} here")
    guiders = [getattr(pipe, name, None) for name in ("guider", "ocr_guider")]
    if any(getattr(g, "adaptive_projected_guidance_momentum", None) is not None for g in guiders):
        remarks.append(
            "guidance with momentum averages over the outputs of all steps, of skipped ones over the last again"
        )
    noisy = ("Ancestral", "SDE", "LCM", "SCM", "DDPM", "TCD")
    if (
        any(part in name for part in noisy)
        or config.get("stochastic_sampling")
        or str(config.get("algorithm_type", "")).startswith("sde")
    ):
        remarks.append(
            f"{name} adds fresh noise at every step, so neighbouring steps are less alike than skipping assumes"
        )
    return tuple(remarks)
