"""StepCache beside ComfyUI's own caches, inside the real ComfyUI: PSNR of final latents, equal evaluations.

    COMFYUI=checkout PYTHONPATH=src python bench/comfyui.py --bed DIR --out bench/comfyui.json

Run it with ComfyUI's Python. `--bed` is what tests/comfyui/export_tiny_wan.py wrote. ComfyUI's EasyCache and LazyCache
add their cached difference into the sampler's own tensor; both get a copy here, or they would be far worse. Their
thresholds are searched on the first two prompts for the count of evaluations that is wanted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests" / "comfyui"), os.environ.get("COMFYUI", "")]
import run_comfy

run_comfy.prepare()
ARGUMENTS, sys.argv = sys.argv[1:], ["comfyui"]
import comfy.cli_args
import comfy.options

comfy.options.enable_args_parsing(False)
comfy.cli_args.args.cpu = True
import comfy.sample
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from stepcache import Hindsight, Uniform
from stepcache.hosts.comfyui import Patch, patched

SAMPLERS = ("euler", "dpmpp_2m", "res_multistep", "heun", "uni_pc")
SETTINGS = ((50, 0.5), (50, 0.28), (20, 0.5))
NATIVE = ("EasyCache", "LazyCache")
LATENT = (1, 24, 5, 8, 8)


def loaded(name: str, path: Path) -> Any:
    """A module of a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Bed:
    """The embedded model in ComfyUI, with prompts."""

    def __init__(self, folder: str) -> None:
        loader = loaded("testbed", HERE.parent / "tests" / "comfyui" / "testbed" / "__init__.py").LoadTinyWan()
        (self.model,) = loader.load(folder, "auto", "float32")
        self.conditions = load_file(f"{folder}/conds.safetensors")
        self.native = loaded("native", Path(os.environ["COMFYUI"]) / "comfy_extras" / "nodes_easycache.py")
        self.evaluated = 0
        self.model.model.diffusion_model.blocks[-1].register_forward_pre_hook(self._count, with_kwargs=True)

    def sample(self, model: Any, sampler: str, steps: int, prompt: int) -> tuple[torch.Tensor, int]:
        """The final latent of a prompt and how many evaluations (of two branches each) it took."""
        self.evaluated = 0
        latent = torch.zeros(LATENT)
        noise = comfy.sample.prepare_noise(latent, 7 + prompt)
        positive, negative = ([[self.conditions[key], {}]] for key in (f"pos{prompt}", "neg"))
        with torch.inference_mode():
            found = comfy.sample.sample(
                model, noise, steps, 5.0, sampler, "simple", positive, negative, latent, seed=7, disable_pbar=True
            )
        return found.clone(), self.evaluated

    def _count(self, block: Any, args: Any, kwargs: Any) -> None:
        self.evaluated += len(args[0] if args else kwargs["x"])

    def with_native(self, name: str, threshold: float) -> Any:
        """ComfyUI's own cache on the model, mended."""
        node = getattr(self.native, f"{name}Node")
        model = node.execute(self.model, threshold, 0.0, 1.0, False).result[0]
        holder = model.model_options["transformer_options"]["easycache"]
        kind = type(holder)
        if not hasattr(kind, "mended"):
            original = kind.apply_cache_diff
            kind.apply_cache_diff = lambda self, x, *args: original(self, x.clone(), *args)
            kind.mended = True
        return model


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of latents, over the span of the uncached one."""
    span = float(b.max() - b.min())
    return float(10 * torch.log10(span**2 / (a - b).double().square().mean()))


def measured(bed: Bed, make: Callable[[], Any], sampler: str, steps: int, truths: list[torch.Tensor]) -> dict[str, Any]:
    """PSNR of every prompt and the mean count of evaluations."""
    rows = [bed.sample(make(), sampler, steps, prompt) for prompt in range(len(truths))]
    scores = [psnr(found, truth) for (found, _), truth in zip(rows, truths, strict=True)]
    return {"psnr": scores, "evaluations": sum(count for _, count in rows) / len(rows) / 2}


def searched(bed: Bed, name: str, wanted: int, sampler: str, steps: int) -> float:
    """The threshold whose count on two prompts is nearest."""
    low, high, best = 1e-4, 5.0, (float("inf"), 0.0)
    for _ in range(9):
        middle = (low * high) ** 0.5
        counts = [bed.sample(bed.with_native(name, middle), sampler, steps, prompt)[1] / 2 for prompt in (0, 1)]
        count = sum(counts) / 2
        best = min(best, (abs(count - wanted), middle))
        low, high = (middle, high) if count > wanted else (low, middle)
    return best[1]


def cell(bed: Bed, sampler: str, steps: int, share: float, prompts: int) -> dict[str, Any]:
    """All methods on one sampler."""
    truths = [bed.sample(bed.model, sampler, steps, prompt) for prompt in range(prompts)]
    total, latents = truths[0][1] // 2, [truth for truth, _ in truths]
    wanted = max(2, round(share * total))
    row: dict[str, Any] = {"sampler": sampler, "steps": steps, "evaluations": total, "wanted": wanted}
    for name, policy in (("hindsight", Hindsight), ("uniform", Uniform)):
        make = lambda policy=policy: patched(bed.model, Patch(lambda n: policy(wanted)))  # noqa: E731
        row[name] = measured(bed, make, sampler, steps, latents)
    for name in NATIVE:
        threshold = searched(bed, name, wanted, sampler, steps)
        make = lambda name=name, threshold=threshold: bed.with_native(name, threshold)  # noqa: E731
        row[name] = {"threshold": threshold, **measured(bed, make, sampler, steps, latents)}
    return row


def main() -> None:
    """Parse, run, write after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", required=True)
    parser.add_argument("--out", type=Path, default=HERE / "comfyui.json")
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args(ARGUMENTS)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(row["sampler"], row["steps"], row["wanted"]) for row in rows}
    bed = Bed(args.bed)
    for sampler in tqdm(SAMPLERS, desc="samplers"):
        for steps, share in SETTINGS:
            total = 2 * steps - 1 if sampler == "heun" else steps
            if (sampler, steps, max(2, round(share * total))) not in done:
                rows.append(cell(bed, sampler, steps, share, args.prompts))
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
