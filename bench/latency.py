"""Latency at true sizes with random weights: what skipped steps save on released structures, nothing to download.

    python bench/latency.py --out bench/latency.json                        on a GPU: all cases, hours; see --cases
    python bench/latency.py --out latency.json --device cpu                 a test of itself, seconds
    python bench/latency.py --out latency.json --device cpu --cases flux-1024 --blocks 1 --shrink 8

The pipelines, transformers and samplers are those of diffusers, with the released settings and as many blocks as fit
into the card's memory; prompts are random embeddings, and no text encoder or VAE runs. In one process, after a warm-up
and interleaved: the pipeline as it is, uniform reuse at both boundaries, and Hindsight. Speed-ups are over the uncached
loop of the same repeat; medians, with the lowest and highest. A loop lasts from the first call of the transformer to
the end of the sampler's last step, and the device is waited for only after that. A step that is computed or skipped is
timed as in a run's summary: calls of the transformer and what the method does, without the sampler. The file is
written anew after every case.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import stepcache
from stepcache import Hindsight, Uniform
from stepcache.core.strategy import Policy
from stepcache.core.summary import elapsed, timestamp
from stepcache.core.trajectory import Boundary
from stepcache.files import check_writable, write_atomically
from stepcache.hosts.diffusers import BLOCKS
from stepcache.measure.device import find_device

Text = Callable[..., Tensor]
"""Random embeddings of a shape."""
PROMPT = 128  # tokens of a prompt, where the pipeline does not pad it
GIB = 2**30
SHARE = 0.95  # of the free memory that is used; the rest is left to fragmentation
CPU_CASE = "tiny"


def _guided(text: Text, tokens: int, width: int, suffix: str = "") -> dict[str, Tensor]:
    names = (f"prompt_embeds{suffix}", f"negative_prompt_embeds{suffix}")
    return {name: text(1, tokens, width) for name in names}


def _masks(text: Text, tokens: int, filled: int, suffix: str = "") -> dict[str, Tensor]:
    mask = (torch.arange(tokens, device=text(1).device) < filled)[None]
    return {f"prompt_embeds_mask{suffix}": mask, f"negative_prompt_embeds_mask{suffix}": mask}


def _wan(text: Text) -> dict[str, Any]:
    return {**_guided(text, 512, 4096), "guidance_scale": 5.0}


def _hunyuan(text: Text) -> dict[str, Any]:
    """Padded to 1000 tokens, and to 256 of a second encoder, which sees quoted words only: here there are none."""
    qwen = {**_guided(text, 1000, 3584), **_masks(text, 1000, PROMPT)}
    return {**qwen, **_guided(text, 256, 1472, "_2"), **_masks(text, 256, 0, "_2")}


def _qwen(text: Text) -> dict[str, Any]:
    return {**_guided(text, PROMPT, 3584), **_masks(text, PROMPT, PROMPT), "true_cfg_scale": 4.0}


def _flux(text: Text) -> dict[str, Any]:
    return {"prompt_embeds": text(1, 512, 4096), "pooled_prompt_embeds": text(1, 768), "guidance_scale": 3.5}


def _z_image(text: Text) -> dict[str, Any]:
    return {**{name: [x[0]] for name, x in _guided(text, PROMPT, 2560).items()}, "guidance_scale": 4.0}


def _hunyuan_parts() -> dict[str, Any]:
    """A small VAE, of which the pipeline reads the latents' channels and nothing else here; guidance."""
    vae = diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(16,) * 5, layers_per_block=1)
    return {"vae": vae, "guider": diffusers.ClassifierFreeGuidance(guidance_scale=6.0)}


@dataclass(frozen=True)
class Case:
    """A released model at a size it is used at.

    Args:
        model, size: what it is called; height and width in pixels, and frames where there are any.
        kinds: the pipeline's and the transformer's class in diffusers.
        layers: numbers of blocks, by the names of the transformer's settings.
        inputs: prompts and guidance for the pipeline's call.
        sampler: settings of UniPC for Wan, of Euler for the others.
        billions: of parameters, as the released checkpoint has.
        settings: of the transformer, where they are not the class's defaults.
        parts: of the pipeline, beside transformer and sampler.
        steps: of the loop; large models get fewer, to be done in hours.
    """

    model: str
    size: dict[str, int]
    kinds: tuple[str, str]
    layers: dict[str, int]
    inputs: Callable[[Text], dict[str, Any]]
    sampler: dict[str, Any]
    billions: float
    settings: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[], dict[str, Any]] = dict
    steps: int = 20

    @property
    def blocks(self) -> int:
        """Of the first list; a second one (FLUX) is shortened in proportion."""
        return next(iter(self.layers.values()))

    def build(self, blocks: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """The transformer; random weights are made where and in the precision in which they are used."""
        kind = getattr(diffusers, self.kinds[1])
        layers = {name: count * blocks // self.blocks for name, count in self.layers.items()}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                made = kind(**self.settings, **layers)
        finally:
            torch.set_default_dtype(before)
        kept = set(kind._keep_in_fp32_modules or ())  # Wan's norms and time embedder, as `from_pretrained` leaves them
        for name, parameter in made.named_parameters():
            if kept.intersection(name.split(".")):
                parameter.data = parameter.data.float()
        return made.eval().requires_grad_(False)

    def assemble(self, blocks: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline without text encoders, silent."""
        kind = getattr(diffusers, self.kinds[0])
        sampler = getattr(diffusers, "UniPCMultistepScheduler" if self.kinds == WAN else EULER)(**self.sampler)
        parts = {**self.parts(), "transformer": self.build(blocks, device, dtype), "scheduler": sampler}
        wanted = inspect.signature(kind).parameters.values()
        absent = [p.name for p in wanted if p.default is p.empty and p.name not in parts]
        pipe = kind(**parts, **dict.fromkeys(absent)).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, device: torch.device, dtype: torch.dtype, shrink: int) -> dict[str, Any]:
        """Of the pipeline's call; height and width divided by `shrink`, to a multiple of 16."""
        random = torch.Generator(device).manual_seed(0)
        text = lambda *shape: torch.randn(*shape, generator=random, device=device, dtype=dtype)  # noqa: E731
        size = {n: v if n == "num_frames" else max(32, v // shrink // 16 * 16) for n, v in self.size.items()}
        return {**self.inputs(text), **size, "output_type": "latent"}


EULER = "FlowMatchEulerDiscreteScheduler"
WAN = ("WanPipeline", "WanTransformer3DModel")
HUNYUAN = ("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel")
QWEN = ("QwenImagePipeline", "QwenImageTransformer2DModel")
FLUX = ("FluxPipeline", "FluxTransformer2DModel")
Z_IMAGE = ("ZImagePipeline", "ZImageTransformer2DModel")
SD, HD = {"height": 480, "width": 832, "num_frames": 81}, {"height": 720, "width": 1280, "num_frames": 81}
LONG, TINY = {**HD, "num_frames": 121}, {"height": 32, "width": 32, "num_frames": 5}
SQUARE, LARGE = {"height": 1024, "width": 1024}, {"height": 1328, "width": 1328}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True}
SMALL = {"num_attention_heads": 12, "ffn_dim": 8960}
SMALLEST = {"num_attention_heads": 2, "attention_head_dim": 24, "freq_dim": 32, "ffn_dim": 64}
T2V = {"task_type": "t2v", "target_size": 960}
DEPTHS, DISTILLED = {"num_layers": 19, "num_single_layers": 38}, {"guidance_embeds": True}
TO_QWEN = {**DYNAMIC, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
# Settings are those of transformer/config.json and scheduler/scheduler_config.json in the models' repositories on the
# hub: Wan-AI/Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers, hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v,
# Qwen/Qwen-Image, black-forest-labs/FLUX.1-dev, Tongyi-MAI/Z-Image. Written down from memory, not read from there;
# tests/test_latency.py holds that they give the numbers of parameters of the released checkpoints.
CASES = {
    "wan-1.3b-480p": Case("Wan2.1 T2V 1.3B", SD, WAN, {"num_layers": 30}, _wan, FLOW, 1.42, SMALL, steps=50),
    "wan-14b-480p": Case("Wan2.1 T2V 14B", SD, WAN, {"num_layers": 40}, _wan, FLOW, 14.3),
    "wan-14b-720p": Case("Wan2.1 T2V 14B", HD, WAN, {"num_layers": 40}, _wan, {**FLOW, "flow_shift": 5.0}, 14.3),
    "hunyuanvideo-1.5-720p": Case(
        "HunyuanVideo-1.5 T2V", LONG, HUNYUAN, {"num_layers": 54}, _hunyuan, {"shift": 9.0}, 8.3, T2V, _hunyuan_parts
    ),
    "qwen-image-1328": Case("Qwen-Image", LARGE, QWEN, {"num_layers": 60}, _qwen, TO_QWEN, 20.4),
    "flux-1024": Case("FLUX.1-dev", SQUARE, FLUX, DEPTHS, _flux, {**DYNAMIC, "shift": 3.0}, 11.9, DISTILLED),
    "z-image-1024": Case("Z-Image", SQUARE, Z_IMAGE, {"n_layers": 30}, _z_image, {"shift": 6.0}, 6.15),
    CPU_CASE: Case("of Wan's kind", TINY, WAN, {"num_layers": 3}, _wan, FLOW, 0.0003, SMALLEST, steps=12),
}
BY_BLOCK = "uniform, blocks"
METHODS: dict[str, Callable[[int], Policy] | None] = {
    "uncached": None,
    "uniform, output": lambda budget: Uniform(budget, boundary="output"),
    BY_BLOCK: lambda budget: Uniform(budget, boundary="blocks"),
    "hindsight": Hindsight,
}


@dataclass(frozen=True)
class Run:
    """What one run took: seconds of the loop and of a step, bytes held between steps and at most (0 on a CPU)."""

    seconds: float
    computed: int
    computed_step: float | None = None
    skipped_step: float | None = None
    cache: int = 0
    peak: int = 0


@contextmanager
def watching(pipe: Any, bar: Any) -> Iterator[list[Any]]:
    """The two ends of the loop, as timestamps; the bar moves with every step."""
    here, step = torch.empty(0, device=pipe.device), pipe.scheduler.step
    marks: list[Any] = []

    def called(*_: Any) -> None:
        if not marks:
            marks[:] = [timestamp(here)] * 2

    def stepped(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        marks[1] = timestamp(here)
        bar.update()
        return found

    hook = pipe.transformer.register_forward_pre_hook(called)
    pipe.scheduler.step = stepped
    try:
        yield marks
    finally:
        hook.remove()
        del pipe.scheduler.step


def once(pipe: Any, arguments: dict[str, Any], steps: int, policy: Policy | None, bar: Any, seed: int = 0) -> Run:
    """One run of the pipeline, as it is or under a policy."""
    cuda = pipe.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    generator = torch.Generator(pipe.device).manual_seed(seed)
    entered = nullcontext() if policy is None else stepcache.accelerate(pipe, policy)
    with watching(pipe, bar) as marks, entered as run:
        pipe(**arguments, num_inference_steps=steps, generator=generator)
        seconds = elapsed(*marks)
        peak = torch.cuda.max_memory_allocated(pipe.device) if cuda else 0
        if run is None:
            return Run(seconds, steps, peak=peak)
        done = run.summary()
        times = (done.seconds_per_computed_step, done.seconds_per_skipped_step)
        return Run(seconds, len(done.computed), *times, done.cache_bytes, peak)


def methods(case: Case) -> dict[str, Callable[[int], Policy] | None]:
    """Those that can run on a model."""
    return {name: make for name, make in METHODS.items() if name != BY_BLOCK or case.kinds[1] in BLOCKS}


def warm_up(case: Case, pipe: Any, arguments: dict[str, Any]) -> None:
    """Three steps, one of them skipped, at the boundary that holds the most."""
    boundary: Boundary = "blocks" if BY_BLOCK in methods(case) else "output"
    once(pipe, arguments, 3, Uniform(2, boundary=boundary), tqdm(disable=True))


def weights(case: Case, blocks: int, dtype: torch.dtype) -> tuple[int, int]:
    """Parameters of the transformer and their bytes; nothing is allocated."""
    parameters = list(case.build(blocks, torch.device("meta"), dtype).parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def that_fit(case: Case, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype) -> int:
    """Blocks that fit into the free memory, by what a run with one block takes; OutOfMemoryError if that does not."""
    free, _ = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    warm_up(case, case.assemble(1, device, dtype), arguments)
    each = weights(case, 2, dtype)[1] - weights(case, 1, dtype)[1]
    left = SHARE * free - torch.cuda.max_memory_reserved(device)
    return min(case.blocks, 1 + max(0, int(left // each)))


def emptied() -> None:
    """Give back what the last model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, lowest, highest; None where nothing was measured."""
    if not values:
        return None
    return {name: round(of(values), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def row(method: str, runs: Sequence[Run], uncached: Sequence[Run], steps: int) -> dict[str, Any]:
    """What the repeats of a method say."""
    ideal = steps / runs[0].computed
    faster = [u.seconds / r.seconds for u, r in zip(uncached, runs, strict=True)]
    timed = [(1000 * r.computed_step, 1000 * r.skipped_step) for r in runs if r.computed_step and r.skipped_step]
    peak, before = (max(r.peak for r in group) for group in (runs, uncached))
    return {
        "method": method,
        "steps": steps,
        "computed": runs[0].computed,
        "ideal": round(ideal, 4),
        "loop_seconds": spread([r.seconds for r in runs]),
        "speedup": spread(faster),
        "percent_of_ideal": spread([100 * f / ideal for f in faster]),
        "ms_per_computed_step": spread([computed for computed, _ in timed]),
        "ms_per_skipped_step": spread([skipped for _, skipped in timed]),
        "skipped_step_percent": spread([100 * skipped / computed for computed, skipped in timed]),
        "cache_bytes": max(r.cache for r in runs),
        "peak_bytes": peak or None,
        "peak_bytes_over_uncached": peak - before if peak else None,
    }


def measure(name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All methods on one case."""
    case = CASES[name]
    steps = args.steps or case.steps
    budget = args.budget or steps // 2
    arguments = case.arguments(device, dtype, args.shrink)
    blocks = args.blocks or (that_fit(case, arguments, device, dtype) if device.type == "cuda" else case.blocks)
    emptied()
    count, held = weights(case, blocks, dtype)
    about = {
        "case": name,
        "model": case.model,
        "size": [arguments[n] for n in case.size],
        "true_size": args.shrink == 1,
        "blocks": blocks,
        "blocks_released": case.blocks,
        "parameters": count,
        "weight_bytes": held,
        "not_run": {m: f"the blocks of {case.kinds[1]} are not known" for m in METHODS if m not in methods(case)},
    }
    print(
        f"\n{name}: {case.model}, {' x '.join(map(str, about['size']))}{'' if args.shrink == 1 else ' (shrunk)'}, "
        f"{blocks} of {case.blocks} blocks, {count / 1e9:.4g} B parameters, {held / GIB:.2f} GiB; "
        f"{budget} of {steps} steps computed"
    )
    pipe = case.assemble(blocks, device, dtype)
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    warm_up(case, pipe, arguments)
    runs: dict[str, list[Run]] = {m: [] for m in methods(case)}
    with tqdm(total=args.repeats * len(runs) * steps, unit="step", leave=False, dynamic_ncols=True) as bar:
        for repeat in range(args.repeats):
            for method, done in runs.items():
                bar.set_description(f"{name}: {method}")
                make = METHODS[method]
                done.append(once(pipe, arguments, steps, make and make(budget), bar, repeat))
    return {**about, "rows": [row(method, done, runs["uncached"], steps) for method, done in runs.items()]}


def table(measured: dict[str, Any]) -> str:
    """The rows of a case, in Markdown."""
    shown = {"loop_seconds": ".2f", "speedup": ".3f", "percent_of_ideal": ".1f"}
    shown |= {"ms_per_computed_step": ".1f", "ms_per_skipped_step": ".3f", "skipped_step_percent": ".2f"}
    heads = ("method", "computed", "loop, s", "speed-up", "% of S/B", "computed step, ms", "skipped, ms", "% of it")
    lines = [(*heads, "peak, GiB", "over uncached, MiB"), ("---",) * 10]
    for r in measured["rows"]:
        spreads = [(r[key], form) for key, form in shown.items()]
        cells = [f"{v['median']:{f}} [{v['min']:{f}}, {v['max']:{f}}]" if v else "-" for v, f in spreads]
        more = r["peak_bytes_over_uncached"]
        peak = ("-", "-") if more is None else (f"{r['peak_bytes'] / GIB:.2f}", f"{more / 2**20:.0f}")
        lines.append((r["method"], f"{r['computed']} of {r['steps']}", *cells, *peak))
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*text, *(f"{m}: not run, {why}" for m, why in measured["not_run"].items())])


def checked(args: argparse.Namespace) -> tuple[list[str], torch.device, torch.dtype]:
    """Cases, device and precision; ValueError or OSError for what cannot be, before anything is built."""
    check_writable(args.out)
    for flag in ("steps", "budget", "repeats", "blocks", "shrink"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise ValueError(f"--{flag} must be 1 or more, not {value}.")
    device = find_device(args.device)
    cpu = device.type == "cpu"
    names = args.cases or ([CPU_CASE] if cpu else [name for name in CASES if name != CPU_CASE])
    for name in names:
        if name not in CASES:
            raise ValueError(f"case {name!r} is unknown; choose from {', '.join(CASES)}.")
        steps, most = args.steps or CASES[name].steps, CASES[name].blocks
        budget = args.budget or steps // 2
        if not 2 <= budget < steps:
            raise ValueError(f"{name} cannot compute {budget} of {steps} steps; give a --budget from 2 to {steps - 1}.")
        if args.blocks is not None and args.blocks > most:
            raise ValueError(f"--blocks {args.blocks} is more than {name} has ({most}).")
    if cpu and args.shrink == 1 and set(names) != {CPU_CASE}:
        raise ValueError("true sizes need a GPU; on a CPU try them with --blocks 1 --shrink 8, or leave --cases out.")
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    return names, device, getattr(torch, dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure case after case, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help=f"of {', '.join(CASES)}; all but {CPU_CASE} on a GPU"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--steps", type=int, help="of the loop (50 for Wan 1.3B, 20 for larger models, 12 for tiny)")
    parser.add_argument("--budget", type=int, help="steps that are computed (half of them)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="so many, whatever fits")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide height and width: to try a case out")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (compile_repeated_blocks)")
    args = parser.parse_args(argv)
    try:
        names, device, dtype = checked(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"bench/latency.py: {error}\n")
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    versions = {"stepcache": stepcache.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    about = {"date": time.strftime("%Y-%m-%d"), "device": card, "dtype": str(dtype).removeprefix("torch."), **versions}
    about |= {"compiled": args.compile, "repeats": args.repeats}
    print(f"{card}, {about['dtype']}, {args.repeats} repeats" + ("" if cuda else "; true sizes need a GPU"))
    document: dict[str, Any] = {"about": about, "cases": [], "not_fitting": {}}
    for name in names:
        try:
            document["cases"].append(measure(name, args, device, dtype))
            print(table(document["cases"][-1]), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            whole, had = weights(CASES[name], CASES[name].blocks, dtype)[1], torch.cuda.max_memory_allocated(device)
            more = str(error).split(" GPU ")[0]
            why = f"{whole / GIB:.1f} GiB of weights with all blocks; {had / GIB:.1f} GiB were in use at most. {more}"
            document["not_fitting"][name] = why
            print(f"{name} does not fit and is skipped: {why}", flush=True)
        emptied()
        write_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
