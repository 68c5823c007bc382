"""Checks that must pass on every machine, on tiny real pipelines: `stepcache selftest`, and the same in the test suite.

A check is a function of the device. It returns in one sentence what it measured, or raises `Wrong` with what does not
hold, or `NotHere` with what is missing.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from stepcache.bench.tiny import gentle_image_pipe, gentle_pipe, prompts, sample, sample_image
from stepcache.core.plan import Plan
from stepcache.core.strategy import Policy, Strategy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.hindsight.method import FollowHindsight, Hindsight
from stepcache.hindsight.schedule import noise_levels_of
from stepcache.hosts.diffusers import accelerate
from stepcache.methods import EasyCache, MagCacheCalibration, Off, TaylorSeer, Uniform
from stepcache.named import named

STEPS, BUDGET = 12, 6
BOTH: tuple[Boundary, ...] = ("output", "blocks")
WAN = "wan2.1-t2v-1.3B"
"""Whose published figures are borrowed."""
METHODS = (
    "uncached",
    f"hindsight:{BUDGET}",
    "hindsight:0.5",
    f"uniform:{BUDGET}",
    "uniform,interval=3",
    f"lemica:{BUDGET},table={WAN},resample=1",
    "easycache:0.3,ret_steps=3",
    f"magcache:0.12,table={WAN},interp=product",
    f"teacache:0.2,table={WAN},ret_steps=1",
    "taylorseer:3",
    f"spectrum:{BUDGET}",
)
"""Every method that needs no file, as `stepcache.named` writes it."""
MEASURING = ("easycache",)
"""Those that decide by what they measure while they run."""
PLANNED = tuple(named(text) for text in METHODS if not text.startswith(("uncached", *MEASURING)))
"""Those that know their schedule once a run begins, so that nothing has to be read from the device later."""
NEEDS_CARD = "needs a CUDA device"


class Wrong(Exception):
    """Something that must hold does not; the sentence says what was found."""


class NotHere(Exception):
    """The check cannot be made here; the sentence says why."""


# ------------------------------------------------------------------------------------------------ what the checks share


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


def _require_card(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotHere(NEEDS_CARD)


def _require_equal(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Bit by bit."""
    if not torch.equal(got, wanted):
        raise Wrong(f"{what}: the latents differ by up to {float((got - wanted).abs().max()):.3g}")


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def _pipe(device: torch.device, seed: int = 0) -> Any:
    pipe = gentle_pipe(seed)
    pipe.transformer.to(device)
    return pipe


def _run(
    pipe: Any, policy: Policy | Plan, device: torch.device, boundary: Boundary | None = None, **options: Any
) -> tuple[torch.Tensor, RunSummary]:
    """A generation under a policy: its latents, and what was done."""
    with accelerate(pipe, policy, boundary=boundary, cache_device=options.pop("cache_device", None)) as run:
        latents = sample(pipe, device=device, **options)
    return latents, run.summary()


@contextmanager
def _counted(transformer: torch.nn.Module) -> Iterator[list[int]]:
    """Counts evaluations of a transformer's first block in a list of one number, by a hook that knows nothing of us."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    block: Any = transformer.blocks[0]  # type: ignore[index]
    hook = block.attn1.register_forward_hook(count)  # inside the block, which a skipped call at boundary blocks enters
    try:
        yield calls
    finally:
        hook.remove()


def _require_counts(calls: int, summary: RunSummary, steps: int = STEPS) -> None:
    """Every step was computed or skipped, and the transformer was evaluated as often as the summary says."""
    said = sum(len(branch.computed) for branch in summary.branches)
    _require(calls == said, f"{summary.policy}: {calls} evaluations seen, and the summary says {said}")
    done = sorted((*summary.computed, *summary.skipped))
    _require(done == list(range(steps)), f"{summary.policy}: of {steps} steps the summary tells of {len(done)}")


# ------------------------------------------------------------------------------------------------ the checks


def control(device: torch.device) -> str:
    """Computing every step is bit-identical to the plain pipeline, and leaving puts back the very objects."""
    pipe = _pipe(device)
    plain = sample(pipe, device=device)
    _require_equal(sample(pipe, device=device), plain, "two plain runs, without any cache")
    before = _objects(pipe)
    runs: list[tuple[Policy | Plan, Boundary]] = [(Hindsight(STEPS), "output")]
    for boundary in BOTH:
        every: tuple[Policy | Plan, ...] = (Off(), Uniform(STEPS), Plan(STEPS, tuple(range(STEPS))), EasyCache(0.0))
        runs += [(policy, boundary) for policy in every]
    for policy, boundary in runs:
        latents, summary = _run(pipe, policy, device, boundary)
        _require_equal(latents, plain, f"{policy}, boundary {boundary}, all steps computed")
        _require(len(summary.computed) == STEPS, f"{policy} computed {len(summary.computed)} of {STEPS} steps")
        _require(_objects(pipe) == before, f"{policy}, boundary {boundary}: the pipeline was not put back as it was")
    _require_equal(sample(pipe, device=device), plain, "the plain pipeline afterwards")
    return f"{len(runs)} policies that compute all steps: bit-identical to the plain pipeline, which is put back"


def _objects(pipe: Any) -> dict[tuple[str, str], int]:
    """Identities of all that hangs on the modules of the transformer, and of the scheduler's own methods."""
    modules = {f"transformer.{name}": module for name, module in pipe.transformer.named_modules()}
    found = {(name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}
    return found | {("scheduler", key): id(value) for key, value in vars(pipe.scheduler).items() if callable(value)}


def methods(device: torch.device) -> str:
    """Every method computes the steps its summary tells of, counted by a hook, at both boundaries; and skips some."""
    pipe, told = _pipe(device), {}
    policies: list[Policy | Plan] = [named(text) for text in METHODS]
    policies += [Plan(STEPS, (0, 1, 2, 5, 8, 11)), MagCacheCalibration()]
    for policy, boundary in itertools.product(policies, BOTH):
        if isinstance(policy, Hindsight) and boundary == "blocks":
            continue  # it stands at the sampler's door
        with _counted(pipe.transformer) as calls:
            _, summary = _run(pipe, policy, device, boundary)
        _require_counts(calls[0], summary)
        computed, whole = len(summary.computed), isinstance(policy, Off | MagCacheCalibration)
        _require(whole == (computed == STEPS), f"{policy}, boundary {boundary}: computed {computed} of {STEPS} steps")
        budget = getattr(policy, "budget", None)
        _require(budget in (None, 0.5, computed), f"{policy}, boundary {boundary}: computed {computed}")
        told[summary.policy] = computed
    return f"computed of {STEPS} steps: " + ", ".join(f"{name.split(' (')[0]} {n}" for name, n in told.items())


@dataclass(frozen=True)
class ForecastOnly(Hindsight):
    """Hindsight without its corrections."""

    def begin(self, run: Trajectory) -> Strategy:
        """The schedule of `Hindsight`, followed without knowing the sampler."""
        return _Uncorrected(self.plan(run.num_steps, noise_levels_of(run)), run)


class _Uncorrected(FollowHindsight):
    def guided(self, step: int, output: torch.Tensor, computed: bool, sampler: Any) -> torch.Tensor:
        return super().guided(step, output, computed, None)


Settings = dict[str, Any]
FLOW_SETTINGS: Settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLOW: dict[str, Settings] = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": FLOW_SETTINGS,
    "DPMSolverMultistepScheduler": FLOW_SETTINGS,
    "DPMSolverSinglestepScheduler": FLOW_SETTINGS,
    "DEISMultistepScheduler": FLOW_SETTINGS,
}
"""Samplers of flow matching that are linear in the outputs, run in Wan's pipeline: class -> settings."""
DIFFUSION: dict[str, Settings] = {
    "DDIMScheduler": {"clip_sample": False},
    "CogVideoXDDIMScheduler": {"clip_sample": False},
    "UniPCMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "IPNDMScheduler": {},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
}
"""The same of noise prediction, run in PixArt's."""
NOISY_FLOW: dict[str, Settings] = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0, "stochastic_sampling": True},
    "FlowMatchLCMScheduler": {"shift": 3.0},
}
NOISY_DIFFUSION: dict[str, Settings] = {
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DDPMScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "SASolverScheduler": {},
}
"""Samplers that add noise, of both kinds."""


def corrector(device: torch.device) -> str:
    """The correction lowers the error with every sampler that is linear in the outputs; of others it is said."""
    video, images = _pipe(device), gentle_image_pipe()
    images.transformer.to(device)
    # Few of many steps: there is much to be made good.
    kinds: tuple[tuple[Any, Callable[[], torch.Tensor], dict[str, Settings], dict[str, Settings]], ...] = (
        (video, lambda: sample(video, 20, device=device), FLOW, NOISY_FLOW),
        (images, lambda: sample_image(images, 20, device), DIFFUSION, NOISY_DIFFUSION),
    )
    shares, said = [], 0
    for pipe, generate, linear, noisy in kinds:
        for scheduler in _schedulers(linear):
            pipe.scheduler = scheduler
            shares.append(_share_left(pipe, generate))
        for scheduler in _schedulers(noisy):
            pipe.scheduler = scheduler
            _require(_uncorrected(pipe, generate)[0], f"{_name(pipe)} adds noise, and the summary says nothing of it")
            said += 1
    return (
        f"with {len(shares)} samplers the error is {min(shares):.2f} to {max(shares):.2f} of what it is without "
        f"correction; {said} that add noise are said not to be corrected"
    )


def _share_left(pipe: Any, generate: Callable[[], torch.Tensor]) -> float:
    """The error with the correction over that without; below 1."""
    plain = generate()
    uncorrected, corrected = _uncorrected(pipe, generate)
    _require(not uncorrected, f"{_name(pipe)}: the summary says that nothing was corrected")
    with accelerate(pipe, ForecastOnly(BUDGET)):
        forecast = generate()
    ours, theirs = _error(corrected, plain), _error(forecast, plain)
    _require(ours < theirs, f"{_name(pipe)}: error {ours:.4f} with the correction, {theirs:.4f} without")
    return ours / theirs


def _uncorrected(pipe: Any, generate: Callable[[], torch.Tensor]) -> tuple[bool, torch.Tensor]:
    """Whether Hindsight's summary says that nothing was corrected, and the latents."""
    with accelerate(pipe, Hindsight(BUDGET)) as run:
        latents = generate()
    return any("forecast but not corrected" in warning for warning in run.summary().warnings), latents


def _name(pipe: Any) -> str:
    return type(pipe.scheduler).__name__


def _schedulers(table: dict[str, Settings]) -> Iterator[Any]:
    """Those that this version of diffusers has."""
    import diffusers

    return (getattr(diffusers, name)(**settings) for name, settings in table.items() if hasattr(diffusers, name))


def bfloat16(device: torch.device) -> str:
    """In bfloat16 runs are finite, the counts hold, and errors are those of float32 but for rounding."""
    return _low_precision(device, torch.bfloat16)


def float16(device: torch.device) -> str:
    """In float16 likewise."""
    return _low_precision(device, torch.float16)


def _low_precision(device: torch.device, dtype: torch.dtype) -> str:
    policies = (Hindsight(BUDGET), Uniform(BUDGET), TaylorSeer(3), EasyCache(0.3, 3))
    full, low = _pipe(device), _pipe(device)
    low.transformer.to(dtype)
    exact = sample(full, device=device)
    try:
        plain = sample(low, device=device)
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        raise NotHere(f"this build of torch lacks it on {device.type} ({error})") from error
    rounding, errors = _error(plain, exact), []
    for policy in policies:
        with _counted(low.transformer) as calls:
            latents, summary = _run(low, policy, device)
        _require_counts(calls[0], summary)
        _require(bool(latents.isfinite().all()), f"{policy}: the latents are not finite")
        _require(bool(summary.skipped), f"{policy}: no step was skipped")
        if isinstance(policy, EasyCache):  # which may decide otherwise where its threshold is near
            continue
        found, wanted = _error(latents, plain), _error(_run(full, policy, device)[0], exact)
        # Both of the runs that are compared are rounded, each by about as much as the plain one.
        _require(
            found <= wanted + 3 * rounding,
            f"{policy}: error {found:.4f}; {wanted:.4f} in float32, and rounding is {rounding:.4f}",
        )
        errors.append(f"{str(policy).split(' (')[0]} {found:.4f} ({wanted:.4f})")
    return f"error against uncached, in float32 in brackets: {', '.join(errors)}; rounding alone {rounding:.4f}"


def guidance_off(device: torch.device) -> str:
    """Without guidance there is one branch; control and counts hold."""
    pipe = _pipe(device)
    plain = sample(pipe, guidance=1.0, device=device)
    _require_equal(_run(pipe, Off(), device, guidance=1.0)[0], plain, "all steps computed")
    for policy in (Hindsight(BUDGET), Uniform(BUDGET), EasyCache(0.3, 3)):
        with _counted(pipe.transformer) as calls:
            _, summary = _run(pipe, policy, device, guidance=1.0)
        _require_counts(calls[0], summary)
        _require(len(summary.branches) == 1, f"{policy}: {len(summary.branches)} branches; expected 1")
        _require(0 < calls[0] < STEPS, f"{policy}: {calls[0]} evaluations of {STEPS}")
    return "bit-identical with all steps computed; one evaluation a computed step"


def batch(device: torch.device) -> str:
    """Every clip of a batch is what it is alone, as closely as without a cache."""
    pipe, worst = _pipe(device), 0.0
    cond, uncond = prompts(2, device)
    noise = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)

    def apart(policy: Policy) -> float:
        """How far the clips of a batch are from those made one by one."""
        parts = []
        for chosen in (slice(0, 2), slice(0, 1), slice(1, 2)):
            given: dict[str, Any] = {
                "latents": noise[chosen],
                "prompt_embeds": cond[chosen],
                "negative_prompt_embeds": uncond[chosen],
            }
            latents, summary = _run(pipe, policy, device, **given)
            _require(isinstance(policy, Off) or bool(summary.skipped), f"{policy}: no step was skipped")
            parts.append(latents)
        return _error(torch.cat(parts[1:]), parts[0])

    uncached = apart(Off())
    for policy in PLANNED:
        found = apart(policy)
        _require(found <= 10 * uncached + 1e-4, f"{policy}: {found:.2g} apart, uncached {uncached:.2g}")
        worst = max(worst, found)
    return f"two clips at once are those made one by one: {worst:.1g} apart at most, uncached {uncached:.1g}"


def compile_default(device: torch.device) -> str:
    """A compiled transformer is not compiled anew when steps are skipped, and gives what it gives uncompiled."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if device.type == "cuda" or found:
        return _compiled(device, "inductor", backend="inductor")
    return _compiled(device, "aot_eager, since no C++ compiler was found", backend="aot_eager")


def compile_reduce_overhead(device: torch.device) -> str:
    """The same of mode reduce-overhead: CUDA graphs, whose outputs the next evaluation overwrites."""
    _require_card(device)
    # Two branches would overwrite each other's outputs in the pipeline itself, whether cached or not.
    return _compiled(device, "reduce-overhead, guidance off", guidance=1.0, mode="reduce-overhead")


def _compiled(device: torch.device, how: str, guidance: float = 5.0, **options: Any) -> str:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise NotHere("torch.compile needs Triton here")
    pipe = _pipe(device)
    policies: tuple[Policy, ...] = (Hindsight(BUDGET), Uniform(BUDGET), TaylorSeer(3))
    eager = [_run(pipe, policy, device, guidance=guidance)[0] for policy in policies]
    torch._dynamo.reset()
    pipe.transformer.compile(**options)
    evaluate, calls, graphs, worst = pipe.transformer._compiled_call_impl, [0], [_graphs()], 0.0

    def counted(*args: Any, **kwargs: Any) -> Any:  # between the cache and the graph: a hook would be compiled too
        calls[0] += 1
        return evaluate(*args, **kwargs)

    def note(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        graphs.append(_graphs())
        return inputs

    pipe.transformer._compiled_call_impl = counted
    try:
        for (policy, wanted), _ in itertools.product(zip(policies, eager, strict=True), range(2)):
            calls[0] = 0
            latents, summary = _run(pipe, policy, device, guidance=guidance, callback_on_step_end=note)
            _require_counts(calls[0], summary)
            worst = max(worst, _error(latents, wanted))
            _require(worst < 0.01, f"{policy}: {worst:.3g} from what it gives uncompiled")
    finally:
        torch._dynamo.reset()
    before, first, last = graphs[0], graphs[1], graphs[-1]
    _require(first > before, "nothing was compiled")
    _require(last == first, f"{first - before} graphs compiled at the first step, {last - first} later")
    return f"{how}: nothing compiled anew after the first step in {len(graphs) // STEPS} runs; {worst:.1g} from eager"


def _graphs() -> int:
    """Graphs compiled so far in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def offload_models(device: torch.device) -> str:
    """With the model moved in and out by accelerate, runs are bit-identical to those without, twice."""
    _require_card(device)
    if importlib.util.find_spec("accelerate") is None:
        raise NotHere("needs accelerate (pip install accelerate)")
    pipe = gentle_pipe()
    return _offloaded(device, pipe, lambda: pipe.enable_model_cpu_offload(device=device))


def offload_groups(device: torch.device) -> str:
    """With diffusers' group offload likewise; on the CPU from and to the CPU, as far as that goes."""
    pipe = gentle_pipe()
    return _offloaded(
        device,
        pipe,
        lambda: pipe.transformer.enable_group_offload(
            onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level"
        ),
    )


def _offloaded(device: torch.device, pipe: Any, offload: Callable[[], None]) -> str:
    at_home, runs = _pipe(device), 0
    offload()
    for boundary in BOTH:
        for policy in (Uniform(BUDGET), *(() if boundary == "blocks" else (Hindsight(BUDGET), EasyCache(0.3, 3)))):
            wanted, summary = _run(at_home, policy, device, boundary)
            for _ in range(2):  # accelerate takes its hooks out and puts them in again after a run
                latents, offloaded = _run(pipe, policy, device, boundary)
                _require_equal(latents.to(device), wanted, f"{policy}, boundary {boundary}, offloaded")
                _require(offloaded.computed == summary.computed, f"{policy}: other steps are computed when offloaded")
                runs += 1
    where = "" if device.type == "cuda" else ", here from CPU to CPU"
    return f"{runs} runs at both boundaries are bit-identical to those without offloading{where}"


def cache_on_cpu(device: torch.device) -> str:
    """With cached tensors kept on the CPU between steps every method gives the same, bit by bit."""
    pipe, count = _pipe(device), 0
    for text in METHODS[1:]:
        wanted, _ = _run(pipe, named(text), device)
        latents, summary = _run(pipe, named(text), device, cache_device="cpu")
        _require_equal(latents, wanted, f"{text}, cached tensors on the CPU")
        _require(summary.cache_bytes > 0, f"{text}: nothing was held")
        count += 1
    return f"{count} methods give the same, bit by bit"


def memory(device: torch.device) -> str:
    """All that a run held is freed when it is over, and it does not grow over 20 runs."""
    pipe = _pipe(device)
    policies: tuple[tuple[Policy, Boundary], ...] = (
        (Hindsight(BUDGET), "output"),
        (EasyCache(0.3, 3), "output"),
        (TaylorSeer(3), "output"),
        (Uniform(BUDGET), "blocks"),
    )

    def held(runs: int) -> int:
        """The most that was held in so many runs."""
        turns = itertools.islice(itertools.cycle(policies), runs)
        return max(_run(pipe, policy, device, boundary)[1].cache_bytes for policy, boundary in turns)

    held(len(policies))  # workspaces, and tables that are worked out once
    before = _allocated(device)
    most = held(20)
    left = _allocated(device) - before
    _require(most > 0, "nothing was held in any run, so nothing is shown")
    _require(left <= 0, f"{left} bytes more are allocated after 20 runs; one holds {most} at most")
    return f"a run holds {most} bytes at most, and after 20 of them no more is allocated than before"


def _allocated(device: torch.device) -> int:
    """Bytes in tensors: on CUDA the allocator's figure, elsewhere that of all tensors Python knows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def no_waiting(device: torch.device) -> str:
    """After the first step nothing waits for the device; methods that measure while running have to, and are exempt."""
    from diffusers import DPMSolverMultistepScheduler

    _require_card(device)
    pipe = _pipe(device)
    # UniPC's own code waits, and Wan's pipeline reads Euler's noise levels back from the device.
    pipe.scheduler = DPMSolverMultistepScheduler(**FLOW_SETTINGS)
    for policy in PLANNED:
        _run(pipe, policy, device)  # what is made once, and tells of it
    if where := _first_wait(lambda note: sample(pipe, device=device, callback_on_step_end=note)):
        raise NotHere(f"the pipeline waits by itself in this version of diffusers ({where})")
    for policy in PLANNED:
        with accelerate(pipe, policy):
            where = _first_wait(lambda note: sample(pipe, device=device, callback_on_step_end=note))
        _require(not where, f"{policy} waits for the device: {where}")
    names = dict.fromkeys(str(policy).split(" (")[0] for policy in PLANNED)
    exempt = ", ".join(MEASURING)
    return f"{', '.join(names)}: no synchronisation after step 1 (exempt, since it measures while it runs: {exempt})"


def _first_wait(generate: Callable[[Callable[..., Any]], Any]) -> str:
    """Where a generation synchronises after its first step, as file:line; empty if it does not.

    `generate` is given a callback for the end of every step.
    """

    def note(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("error" if step < STEPS - 1 else "default")
        return inputs

    try:
        generate(note)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{frame.filename}:{frame.lineno}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def side_by_side(device: torch.device) -> str:
    """Two pipelines in two threads, on CUDA in two streams, in step with each other, give what they give alone."""
    works = [(_pipe(device, seed), policy) for seed, policy in ((0, Hindsight(BUDGET)), (7, EasyCache(0.3, 3)))]
    alone = [_run(pipe, policy, device) for pipe, policy in works]
    meeting = threading.Barrier(2, timeout=60)

    def meet(pipe: Any, step: int, t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        meeting.wait()
        return inputs

    def work(pipe: Any, policy: Policy) -> tuple[torch.Tensor, RunSummary]:
        found = None
        try:
            with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
                found = _run(pipe, policy, device, callback_on_step_end=meet)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                return found
        finally:
            if found is None:
                meeting.abort()  # the other one need not wait

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with ThreadPoolExecutor(2) as threads:
        together = [future.result() for future in [threads.submit(work, *given) for given in works]]
    for (latents, summary), (wanted, before) in zip(together, alone, strict=True):
        _require_equal(latents, wanted, f"{summary.policy} beside another pipeline")
        _require(summary.computed == before.computed, f"{summary.policy} beside another computes other steps")
    how = "streams" if device.type == "cuda" else "threads"
    return f"two pipelines in two {how}, step by step in turn, give what they give alone, bit by bit"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "control": control,
    "methods": methods,
    "corrector": corrector,
    "bfloat16": bfloat16,
    "float16": float16,
    "guidance-off": guidance_off,
    "batch": batch,
    "compile": compile_default,
    "compile-reduce-overhead": compile_reduce_overhead,
    "offload-models": offload_models,
    "offload-groups": offload_groups,
    "cache-on-cpu": cache_on_cpu,
    "memory": memory,
    "no-waiting": no_waiting,
    "side-by-side": side_by_side,
}
"""In the order in which they run."""
