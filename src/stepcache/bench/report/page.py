"""A benchmark's folder as one page that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stepcache.bench.report.charts import charts, key, named_methods
from stepcache.bench.report.contents import Results, columns, headline
from stepcache.bench.results import REFERENCE, Folder
from stepcache.fleet.places import at_hand
from stepcache.measure.drawing import Tips, as_svg, drawing
from stepcache.measure.video import open_clip, write_preview

HERE = Path(__file__).parent
FILES = {"style": "style.css", "script": "player.js"}
"""What every page has in it."""


WIDTH = 320
"""Pixels to which clips are shrunk for the page; smaller ones stay as they are."""


def load_clips(folder: Folder, results: Results, width: int, count: int | None) -> tuple[dict[str, str], list[str]]:
    """Clips as base64 of small MP4s, "method|index|seed" -> text, and what could not be read."""
    items = [i for group in results.items.values() for i in group if i.clip and (count is None or i.index < count)]
    found, missing = {}, []
    with tempfile.TemporaryDirectory(prefix="stepcache-") as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = [(folder.root / item.clip, Path(scratch) / f"{n}.mp4", width) for n, item in enumerate(items)]
        bar = tqdm(
            pool.map(_shrunk, paths), total=len(items), desc="clips", unit="clip", dynamic_ncols=True, leave=False
        )
        for item, content in zip(items, bar, strict=True):
            if content is None:
                missing.append(item.clip)
            else:
                found[f"{item.method}|{item.index}|{item.seed}"] = base64.b64encode(content).decode()
    return found, missing


def _shrunk(task: tuple[Path, Path, int]) -> bytes | None:
    """A small copy of a clip, made in a scratch file; `None` if it cannot be read."""
    path, scratch, width = task
    try:
        with at_hand(path) as local:
            write_preview(scratch, open_clip(local), width)
        content = scratch.read_bytes()
        scratch.unlink()
    except (OSError, ValueError):
        return None
    return content


def page(results: Results, clips: dict[str, str]) -> str:
    """The page's HTML."""
    return rendered(
        "page.html",
        about=results.description,
        rows=[r.method for r in results.rows if r.failed < r.items],
        methods=results.methods,
        columns=columns(results),
        reference=REFERENCE,
        headline=headline(results),
        charts=drawn(results),
        keys=keys(results),
        labels=results.labels,
        failures=[r for r in results.rows if r.failed],
        own_script=(HERE / "page.js").read_text(encoding="utf-8"),
        data=embedded(player_data(results, clips)),
        clips=clips,
    )


def rendered(name: str, **values: Any) -> str:
    """The HTML of a template of this folder, with its style sheet and the players' script; ImportError: no Jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, select_autoescape
    except ImportError as error:
        raise ImportError("the report needs Jinja2: pip install 'stepcache[report]'.") from error
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True
    )
    files = {key: (HERE / file).read_text(encoding="utf-8") for key, file in FILES.items()}
    return environment.get_template(name).render(**files, **values)


def drawn(results: Results) -> list[tuple[str, str, str]]:
    """(title, explanation, SVG) of every chart there is data for."""
    found = []
    with drawing() as figure:
        for chart in charts(results):
            tips = Tips()
            found.append((chart.title, chart.text, as_svg(chart.draw(figure, tips), chart.name, chart.title, tips)))
    return found


def keys(results: Results) -> dict[str, str]:
    """Method -> its line and mark as SVG, for the table."""
    named = named_methods(results)
    with drawing() as figure:
        return {
            method: as_svg(key(figure, named.look(method)), f"key{n}", "line and mark", Tips(), "key")
            for n, method in enumerate(named.labels)
        }


def player_data(results: Results, clips: dict[str, str]) -> dict[str, Any]:
    """What the players need to know: prompts, methods, and which clips there are."""
    items = [i for group in results.items.values() for i in group]
    prompts = {(i.index, i.seed): i.prompt for i in items}
    figures_of = {f"{i.method}|{i.index}|{i.seed}": [i.psnr, i.ssim, round(i.computed, 1), i.identical] for i in items}
    return {
        "prompts": [{"index": i, "seed": s, "text": text} for (i, s), text in sorted(prompts.items())],
        "methods": [r.method for r in results.rows if r.failed < r.items],
        "reference": REFERENCE,
        "labels": {r.method: results.labels[r.method].row for r in results.rows},
        "figures": figures_of,
        "clips": sorted(clips),
        "frames": {f"{i.method}|{i.index}|{i.seed}": len(i.psnr_per_frame) for i in items},
        "fps": results.description["fps"],
    }


def embedded(data: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
