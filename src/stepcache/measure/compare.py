"""How close clips are to their references: pairs, tables and JSON of `stepcache compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stepcache.measure.lpips import LPIPS
from stepcache.measure.metrics import PROTOCOLS, ClipComparison, compare_clips, finite, mean_psnr
from stepcache.measure.video import CONTAINERS, png_frames


@dataclass(frozen=True)
class Pair:
    """Two clips to compare, and a name for the pair."""

    name: str
    original: Path
    generated: Path


def find_pairs(original: Path, generated: Path) -> list[Pair]:
    """What is to be compared with what: the two clips themselves, or the clips of equal name in two folders.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder beside a clip, a clip without a partner, a folder of which one cannot tell what it is.
    """
    names = [clips_in(path) for path in (original, generated)]
    if names[0] is None and names[1] is None:
        return [Pair(generated.name, original, generated)]
    if names[0] is None or names[1] is None:
        folder, clip = (original, generated) if names[1] is None else (generated, original)
        raise ValueError(f"{folder} is a folder of clips but {clip} is one clip; expected two of a kind.")
    alone = [f"{original / name}" for name in names[0] if name not in names[1]]
    alone += [f"{generated / name}" for name in names[1] if name not in names[0]]
    if alone:
        listed = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
        raise ValueError(f"No clip of the same name in the other folder for {listed}; add or remove them.")
    return [Pair(name, original / name, generated / name) for name in names[0]]


def clips_in(path: Path) -> list[str] | None:
    """Names of the clips in a folder of clips, sorted; None if `path` is itself a clip (a file, or PNG frames).

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: a folder with neither, or with both, clips and PNG frames.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a clip or a folder of clips.")
    if not path.is_dir():
        return None

    def is_clip(entry: Path) -> bool:
        return bool(png_frames(entry)) if entry.is_dir() else entry.suffix.lower() in (*CONTAINERS, ".npy")

    clips = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and is_clip(entry))
    frames = png_frames(path)
    if clips and frames:
        raise ValueError(
            f"{path} holds PNG images ({frames[0].name}, ...) beside clips ({clips[0]}, ...); separate them."
        )
    if not clips and not frames:
        raise ValueError(f"{path} holds neither clips nor PNG frames.")
    return clips or None


def table(pairs: Sequence[Pair], results: Sequence[ClipComparison]) -> list[str]:
    """Lines of text: one row per pair, then mean and worst if there are several."""
    rows = [("", "frames", "size", "PSNR dB", "SSIM", "LPIPS", "worst frame")]
    for pair, result in zip(pairs, results, strict=True):
        size = f"{result.width} x {result.height}"
        worst = "-" if result.identical else f"{_number(result.worst.psnr, 2)} dB at {result.worst.index}"
        rows.append((pair.name, str(result.frames), size, *_numbers(_values(result)), worst))
    if len(results) > 1:
        summary = summarise(pairs, results)
        rows.append(("mean", "", "", *_numbers(summary["mean"]), ""))
        worst_pairs = {metric: entry and entry["value"] for metric, entry in summary["worst"].items()}
        rows.append(("worst", "", "", *_numbers(worst_pairs), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return lines


def notes(results: Sequence[ClipComparison], device: torch.device, lpips: LPIPS | None, source: str) -> list[str]:
    """Lines of text to read the table with: the protocol, and everything about the input one should know."""
    protocol = PROTOCOLS[results[0].protocol]
    lines = ["", f"protocol {protocol.name}: {protocol.description}; computed on {device}"]
    if lpips is None:
        lines.append(f"LPIPS n/a: {source}")
    for reason in sorted({result.lpips_note for result in results if lpips is not None and result.lpips_note}):
        lines.append(f"LPIPS n/a: {reason}")
    deep = " in the 8 bits a channel that are read" if any(_equal_so_far(result) for result in results) else ""
    identical = sum(result.identical_frames for result in results)
    if identical:
        frames = sum(result.frames for result in results)
        outside = ", and not in the mean PSNR over frames" if protocol.name == "reference" else ""
        lines.append(f"{identical} of {frames} frames are identical to the original's{deep}{outside}")
    unbounded = sum(finite(result.psnr) is None for result in results)
    if unbounded and len(results) > 1:
        lines.append(f"pairs that are identical, and not in the mean PSNR over pairs: {unbounded} of {len(results)}")
    lossy = [result.lossy for result in results if result.lossy]
    if lossy:
        more = f" (And {len(lossy) - 1} more pairs.)" if len(lossy) > 1 else ""
        lines.append(f"WARNING: {lossy[0]}{more}")
    return lines


def summarise(pairs: Sequence[Pair], results: Sequence[ClipComparison]) -> dict[str, Any]:
    """Mean and worst over pairs: {"mean": {metric: value}, "worst": {metric: {"name", "value"} or None}, ...}.

    The mean PSNR is over the pairs that differ, as in `mean_psnr`. A metric that some pair lacks is None.
    """
    values = [_values(result) for result in results]
    mean: dict[str, float | None] = {"psnr": mean_psnr([result.psnr for result in results])}
    worst: dict[str, dict[str, Any] | None] = {}
    for metric, worst_of in (("psnr", min), ("ssim", min), ("lpips", max)):
        column = [value for row in values if (value := row[metric]) is not None]
        if len(column) < len(values):
            mean[metric], worst[metric] = None, None
            continue
        index = column.index(worst_of(column))
        worst[metric] = {"name": pairs[index].name, "value": column[index]}
        if metric != "psnr":
            mean[metric] = sum(column) / len(column)
    return {"mean": mean, "worst": worst, "identical_pairs": sum(result.identical for result in results)}


def to_json(
    pairs: Sequence[Pair], results: Sequence[ClipComparison], device: str, lpips: LPIPS | None, source: str
) -> dict[str, Any]:
    """The `--json` file: what was compared and how, one entry per pair, mean and worst. Infinite PSNRs are null."""
    summary = summarise(pairs, results)
    mean, worst = summary["mean"], summary["worst"]["psnr"]
    summary["mean"] = {**mean, "psnr": finite(mean["psnr"])}
    summary["worst"]["psnr"] = {**worst, "value": finite(worst["value"])}
    protocol = PROTOCOLS[results[0].protocol]
    return {
        "format": "stepcache.comparison",
        "version": 1,
        "protocol": protocol.name,
        "protocol_description": protocol.description,
        "device": device,
        "lpips_backbone": None if lpips is None else source,
        "lpips_note": source if lpips is None else "",
        **summary,
        "pairs": [
            {"name": pair.name, "original": str(pair.original), "generated": str(pair.generated), **result.to_json()}
            for pair, result in zip(pairs, results, strict=True)
        ],
    }


def compare(pairs: Sequence[Pair], protocol: str, lpips: LPIPS | None, device: torch.device) -> list[ClipComparison]:
    bar = tqdm(pairs, unit="pair", disable=len(pairs) == 1, leave=False)
    return [
        compare_clips(pair.original, pair.generated, protocol=protocol, lpips=lpips, device=device, progress=True)
        for pair in bar
    ]


def _equal_so_far(result: ClipComparison) -> bool:
    """Whether nothing differs in what was read, and more is stored."""
    return result.identical_frames == result.frames and not result.identical


def _values(result: ClipComparison) -> dict[str, float | None]:
    return {"psnr": result.psnr, "ssim": result.ssim, "lpips": result.lpips}


def _numbers(values: dict[str, float | None]) -> tuple[str, str, str]:
    return _number(values["psnr"], 2), _number(values["ssim"], 4), _number(values["lpips"], 4)


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"  # infinity prints as inf
