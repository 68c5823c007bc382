"""Does the embedded model show what was asked? Plain image statistics over prompts held out from training.

    python tools/eval_tiny_wan.py --model assets/tiny-wan --out assets/tiny-wan/evaluation.json

For each of 64 held-out prompts (combinations of words that training never showed together) one clip at 50 steps:

- colour: saturated pixels (HSV saturation > 0.45, value > 0.35) are named by their nearest hue; the asked colour is
  shown if, in most frames, it covers at least 0.6 % of the frame and, when one subject was asked for, no other hue
  covers more;
- direction: the centroid of the asked colour's pixels moves, from the mean of the first four frames to that of the
  last four, at least 4 pixels in the asked direction and more along that axis than across it.

The same statistics are taken of the generator's own clips for these prompts, as a check of the measure itself. And the
same clips are made in 25 uncached steps: their PSNR against 50 steps says how far from converged the model is.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_wan_clips import COLOURS, DIRECTIONS, FRAMES, SIZE, Scene, caption, random_scene, render
from tqdm import tqdm

try:
    import stepcache
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    import stepcache

from stepcache.files import write_atomically
from stepcache.measure.metrics import psnr

HUES = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOURS.items()}


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes whose first subject moves left, right, up or down."""
    rng = random.Random(f"evaluation-{seed}")
    return [random_scene(rng, held_out=True, directional=True) for _ in range(count)]


def colour_masks(clip: np.ndarray) -> dict[str, np.ndarray]:
    """Saturated pixels by their nearest hue: name -> boolean (T, H, W); `clip` uint8 (T, H, W, 3)."""
    rgb = clip.astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    saturated = (spread > 0.45 * np.maximum(high, 1e-6)) & (high > 0.35)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(spread, 1e-6)
    hue = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)) / 6
    names = list(HUES)
    distance = np.stack([np.abs((hue - HUES[n] + 0.5) % 1 - 0.5) for n in names])
    nearest = distance.argmin(0)
    return {n: saturated & (nearest == i) for i, n in enumerate(names)}


def shows_colour(masks: dict[str, np.ndarray], colour: str, alone: bool) -> bool:
    """Whether most frames show the colour (see the module's head)."""
    areas = {n: m.mean(axis=(1, 2)) for n, m in masks.items()}
    enough = areas[colour] >= 0.006
    most = np.all([areas[colour] >= a for a in areas.values()], axis=0)
    return bool((enough & (most if alone else True)).mean() > 0.5)


def shows_direction(mask: np.ndarray, direction: str) -> bool:
    """Whether the mask's centroid moves in the direction (see the module's head)."""
    centres = []
    for frame in mask:
        y, x = np.nonzero(frame)
        centres.append((x.mean(), y.mean()) if len(x) else (np.nan, np.nan))
    if np.isnan(centres[:4]).all() or np.isnan(centres[-4:]).all():
        return False
    moved = np.nanmean(centres[-4:], axis=0) - np.nanmean(centres[:4], axis=0)
    wanted = np.array(DIRECTIONS[direction])
    along, across = float(moved @ wanted), float(abs(moved @ wanted[::-1]))
    return along >= 4 and along > across


def judge(clips: list[np.ndarray], scenes: list[Scene]) -> list[dict[str, Any]]:
    """Colour and direction of every clip."""
    verdicts = []
    for clip, scene in zip(clips, scenes, strict=True):
        subject, masks = scene.subjects[0], colour_masks(clip)
        verdicts.append(
            {
                "prompt": caption(scene),
                "colour": shows_colour(masks, subject.colour, len(scene.subjects) == 1),
                "direction": shows_direction(masks[subject.colour], subject.motion.split()[1]),
            }
        )
    return verdicts


def make_clips(pipe: Any, scenes: list[Scene], steps: int, guidance: float, batch: int, seed: int) -> list[np.ndarray]:
    """One clip a scene, uint8 (T, H, W, 3); the noise depends on seed and scene alone."""
    clips: list[np.ndarray] = []
    for i in tqdm(range(0, len(scenes), batch), desc=f"{steps} steps", dynamic_ncols=True):
        part = scenes[i : i + batch]
        videos = pipe(
            prompt=[caption(s) for s in part],
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(1000 * seed + i + j) for j in range(len(part))],
        ).frames
        clips += [(np.clip(v, 0, 1) * 255).round().astype(np.uint8) for v in videos]
    return clips


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--flow_shift", type=float, help="default: the model's own")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from diffusers import UniPCMultistepScheduler, WanPipeline

    pipe = WanPipeline.from_pretrained(args.model)
    if args.flow_shift:
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=args.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.prompts, args.seed)
    truth = [((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy() for clip in render(scenes)]
    clips = make_clips(pipe, scenes, 50, args.guidance, args.batch, args.seed)
    fewer = make_clips(pipe, scenes, 25, args.guidance, args.batch, args.seed)
    verdicts, check = judge(clips, scenes), judge(truth, scenes)
    quality = [float(psnr(a, b).mean()) for a, b in zip(clips, fewer, strict=True)]
    share = lambda rows, key: sum(r[key] for r in rows) / len(rows)  # noqa: E731
    result = {
        "prompts": len(scenes),
        "steps": 50,
        "guidance": args.guidance,
        "flow_shift": pipe.scheduler.config.flow_shift,
        "seed": args.seed,
        "colour": share(verdicts, "colour"),
        "direction": share(verdicts, "direction"),
        "colour_of_real_clips": share(check, "colour"),
        "direction_of_real_clips": share(check, "direction"),
        "psnr_25_against_50_mean": float(np.mean(quality)),
        "psnr_25_against_50_worst": float(np.min(quality)),
        "stepcache": stepcache.__version__,
        "clips": [{**v, "psnr_25_against_50": round(q, 2)} for v, q in zip(verdicts, quality, strict=True)],
    }
    write_atomically(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "clips"}, indent=1))


if __name__ == "__main__":
    main()
