"""Train a model of the zoo from scratch: `python tools/train_zoo.py emoji --work outputs/emoji`.

Writes the finished pipeline, training.json and a sheet of samples to assets/zoo/NAME. Seeded; interrupt it at any time
and run the same command again. On two CPU cores each takes one to two hours; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from recipes import base
from recipes.emoji import Emoji
from recipes.landscapes import Landscapes
from recipes.patterns import Patterns
from training import Run, curve

ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, type[base.Recipe]] = {r.name: r for r in (Emoji, Landscapes, Patterns)}


def main() -> None:
    """Train, save, draw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, help="where the pipeline is written (default: assets/zoo/NAME)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.name]()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    pipe = recipe.untrained()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.to(device), pipe.vae.to(device)
    runs = {"vae": base.train_vae(recipe, pipe.vae, args.work, device, args.seed)}
    latents = base.encoded(recipe, pipe.vae, device)
    runs["transformer"] = base.train_transformer(recipe, pipe, latents, args.work, device, args.seed)
    if recipe.settings.distil_steps:
        teacher = copy.deepcopy(pipe.transformer).requires_grad_(False)
        runs["student"] = base.distil_guidance(recipe, teacher, pipe, latents, args.work, device, args.seed)
    save(recipe, pipe, runs, args.out or ROOT / "assets" / "zoo" / args.name, args.seed, device)


def save(recipe: base.Recipe, pipe: Any, runs: dict[str, Run], out: Path, seed: int, device: str) -> None:
    """The pipeline (transformer and VAE in float16), how to call it, how it was trained, and samples."""
    out.mkdir(parents=True, exist_ok=True)
    for part in (pipe.transformer, pipe.vae):
        part.half()
    pipe.save_pretrained(out, safe_serialization=True)
    for part in (pipe.transformer, pipe.vae):
        part.float()
    shown = prompts(recipe)
    about = {
        "seed": seed,
        "settings": vars(recipe.settings),
        "stages": {
            name: {"steps": run.done, "seconds": round(run.seconds), "loss": curve(run.losses)}
            for name, run in runs.items()
        },
        "torch": torch.__version__,
        "device": device,
    }
    about["psnr_25_against_50"] = half_the_steps(recipe, pipe, shown["development"])
    (out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / "README.md").write_text(card(recipe, pipe, about))
    (out / "call.json").write_text(json.dumps(recipe.call, indent=1) + "\n")
    (out / "prompts.json").write_text(json.dumps(shown, indent=1) + "\n")
    sheet(recipe, pipe, out / "samples.png")


def prompts(recipe: base.Recipe) -> dict[str, list[str]]:
    """Captions that training did not see, by what they are for."""
    texts = recipe.held_out(12 + 8 + 32)
    return {"development": texts[:12], "calibration": texts[12:20], "evaluation": texts[20:]}


def half_the_steps(recipe: base.Recipe, pipe: Any, captions: list[str]) -> dict[str, float]:
    """PSNR in dB of runs of 25 steps to runs of 50, same seeds: mean and worst."""
    runs = [sampled(recipe, pipe, captions, num_inference_steps=steps) for steps in (50, 25)]
    error = (runs[0] - runs[1]).square().flatten(1).mean(1)
    found = -10 * error.log10()
    return {"mean": round(float(found.mean()), 1), "worst": round(float(found.min()), 1), "prompts": len(captions)}


def card(recipe: base.Recipe, pipe: Any, about: dict[str, Any]) -> str:
    """The model's card."""
    parts = {name: getattr(pipe, name) for name in ("transformer", "vae")}
    sizes = ", ".join(
        f"{type(m).__name__} {sum(p.numel() for p in m.parameters()) / 1e6:.1f} M" for m in parts.values()
    )
    stages = [
        f"| {name} | {run['steps']:,} | {run['seconds'] / 60:.0f} | {run['loss'][0]:.3f} | {run['loss'][-1]:.3f} |"
        for name, run in about["stages"].items()
    ]
    half = about["psnr_25_against_50"]
    call = ", ".join(f"{k}={v!r}" for k, v in recipe.call.items())
    return f"""# {recipe.name}

A small trained `{type(pipe).__name__}` of the zoo (`bench/zoo.py`), with no other use: {recipe.doc}.

- **Made by** `python tools/train_zoo.py {recipe.name} --work outputs/{recipe.name}`, from scratch.
- **Data:** {recipe.data}.
- **Parts:** {sizes} parameters, in float16; text encoder with random weights; {type(pipe.scheduler).__name__}.
- **Call:** `{call}`
- **25 against 50 steps:** {half["mean"]} dB mean, {half["worst"]} dB worst of {half["prompts"]} prompts.

| stage | iterations | minutes | first loss | last loss |
|---|---|---|---|---|
{chr(10).join(stages)}

![samples](samples.png)

Upper row: captions of the training set. Lower row: prompts as the benchmark uses them.

**Limits.** {recipe.limits}
"""


def sampled(recipe: base.Recipe, pipe: Any, captions: list[str], **changes: Any) -> torch.Tensor:
    """Pictures or clips of the captions in one batch, seeds 0, 1, ...; values in [0, 1]."""
    call = {**recipe.call, **changes}
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(captions)
    generators = [torch.Generator().manual_seed(j) for j in range(len(captions))]
    with torch.no_grad():
        found = pipe(prompt=captions, generator=generators, output_type="pt", **call)
    pictures = found.frames if hasattr(found, "frames") else found.images
    return torch.as_tensor(pictures).clamp(0, 1)


def sheet(recipe: base.Recipe, pipe: Any, path: Path) -> None:
    """Eight known captions above eight new ones; of clips four frames, below one another."""
    from PIL import Image

    known = recipe.training_set[1]
    pictures = sampled(recipe, pipe, [known[j * len(known) // 8] for j in range(8)] + recipe.held_out(8))
    if pictures.ndim == 5:  # clips: four frames each
        frames = torch.linspace(0, pictures.shape[1] - 1, 4).long()
        pictures = torch.cat([pictures[:, f] for f in frames.tolist()], dim=-2)
    rows = [torch.cat(list(pictures[r : r + 8]), dim=-1) for r in (0, 8)]
    image = (torch.cat(rows, dim=-2) * 255).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(image).resize((2 * image.shape[1], 2 * image.shape[0]), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
