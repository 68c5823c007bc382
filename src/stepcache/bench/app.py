"""A page in the browser: one clip, uncached and with a method, side by side in lock-step.

The players are those of the report. Nothing is fetched from elsewhere and nothing is sent there.
"""

from __future__ import annotations

import base64
import html
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from stepcache.bench.labels import label
from stepcache.bench.methods import CALIBRATION, KINDS, PEERS, read, single
from stepcache.bench.report.page import embedded, rendered
from stepcache.bench.results import REFERENCE
from stepcache.core.strategy import Policy
from stepcache.files import read_text
from stepcache.measure.generation import (
    Request,
    check_policy,
    check_request,
    generate,
    load_pipeline,
    model_defaults,
    pipeline_kind,
    sample_latent,
)
from stepcache.measure.metrics import compare_clips, finite
from stepcache.methods import Off

METHODS = [name for name in KINDS if name not in (REFERENCE, CALIBRATION, "plan", *PEERS)]
"""What the drop-down offers; others, and options, can be typed."""
KEPT = 6
"""Clips that are kept, so that the same settings are not computed again."""
WIDTH = 416
"""Pixels to which wider clips are shrunk for the page."""
SIZES = ("height", "width", "num_frames")
STYLE = """
iframe[title=clips] { width: 100%; border: 0; color-scheme: light; }
.dark iframe[title=clips] { color-scheme: dark; }
"""
FAILURES = (ValueError, OSError, ImportError, RuntimeError)
"""What a wrong input or too small a machine ends in; torch's lack of memory is a RuntimeError."""

Tell = Callable[[str, int, int], None]
"""Gets what is under way, steps done, steps in all (0: not known); raises to end the run."""


class Stopped(Exception):
    """The user wants no more of it."""


@dataclass(frozen=True)
class Made:
    """A clip, frames [T, H, W, 3] uint8, and what its run did."""

    frames: np.ndarray
    loop_seconds: float
    computed: int
    ideal_speedup: float
    summary: str


@dataclass
class Maker:
    """Makes clips, one at a time, with the pipeline that was asked for last."""

    device: str | None = None
    dtype: str | None = None
    _loaded: tuple[str, Any] | None = None
    _made: dict[tuple[str, Request, str], Made] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pair(self, model: str, request: Request, method: str, policy: Policy, tell: Tell) -> tuple[Made, Made]:
        """The clip uncached and with a method; raises what `load_pipeline`, `check_policy` and `tell` raise."""
        check_request(request)
        check_policy(policy, request)
        with self._lock:
            pipe = self._pipe(model, request, tell)
            check_policy(policy, request, pipe)
            runs = ((REFERENCE, Off()), (method, policy))
            plain, cached = [self._clip(pipe, model, request, *run, tell) for run in runs]
            return plain, cached

    def _pipe(self, model: str, request: Request, tell: Tell) -> Any:
        if self._loaded is None or self._loaded[0] != model:
            tell("loading the model", 0, 0)
            pipeline_kind(model)
            self._loaded = None  # frees its memory
            pipe = load_pipeline(model, self.device, self.dtype)
            pipe.set_progress_bar_config(disable=True)
            tell("warming up", 0, 0)  # else the first run, the uncached one, would be timed with it
            sample_latent(pipe, replace(request, steps=min(2, request.steps)))
            self._loaded = (model, pipe)
        return self._loaded[1]

    def _clip(self, pipe: Any, model: str, request: Request, method: str, policy: Policy, tell: Tell) -> Made:
        """A clip, if it is not kept from before; policies are compared by what is in them, not in their files."""
        key = (model, request, repr(policy))
        if key not in self._made:

            def ended(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                tell(method, step + 1, request.steps)
                return values

            tell(method, 0, request.steps)
            frames, run = generate(pipe, request, policy, callback_on_step_end=ended)
            self._made[key] = Made(frames, run.loop_seconds, len(run.computed), run.ideal_speedup, str(run))
        self._made[key] = self._made.pop(key)  # the latest used is last
        while len(self._made) > KEPT:
            del self._made[next(iter(self._made))]
        return self._made[key]


def takes_budget(method: str) -> bool:
    """Whether the page's budget belongs to a method as written: it has one, and does not say it itself."""
    name = method.partition(",")[0]
    return name in KINDS and KINDS[name].value == "budget"


def with_budget(method: str, budget: int) -> str:
    """A method as written, with the page's budget where that belongs to it."""
    name, comma, options = method.partition(",")
    return f"{name}:{budget}{comma}{options}" if takes_budget(method) else method


def requested(model: str, prompt: str, **numbers: float | None) -> Request:
    """What the fields ask for; those left empty are the model's, then Wan2.1's. ValueError: no prompt."""
    if not prompt.strip():
        raise ValueError("The prompt is empty; say what to generate.")
    known = {name: value for name, value in model_defaults(model).items() if name != "fps"}
    given = {name: value for name, value in numbers.items() if value is not None}
    return Request(prompt.strip(), **{**known, **given})


def shown(plain: Made, cached: Made, name: str, request: Request, fps: float) -> str:
    """HTML of both clips in lock-step, how far apart they are, and what the run of the method of that name did."""
    apart, count = compare_clips(plain.frames, cached.frames), len(plain.frames)
    clips = {"plain": plain, "cached": cached}
    keys = {of: f"{of}|0|{request.seed}" for of in clips}
    data = {
        "prompts": [{"index": 0, "seed": request.seed, "text": request.prompt}],
        "methods": list(clips),
        "reference": "plain",
        "labels": {"plain": REFERENCE, "cached": name},
        "figures": {
            keys[of]: [finite(apart.psnr), apart.ssim, made.computed, apart.identical] for of, made in clips.items()
        },
        "clips": list(keys.values()),
        "frames": dict.fromkeys(keys.values(), count),
        "fps": fps,
        "lossless": True,
    }
    closeness = "The same clip" if apart.identical else f"PSNR {apart.psnr:.2f} dB, SSIM {apart.ssim:.4f}"
    page = rendered(
        "clips.html",
        method=name,
        lossless=True,
        frames=count,
        figures=f"{closeness}{f' (mean of {count} frames)' if count > 1 else ''}: computed {cached.computed} of "
        f"{request.steps} steps, loop {plain.loop_seconds / cached.loop_seconds:.2f}x faster as measured "
        f"({plain.loop_seconds:.2f} s to {cached.loop_seconds:.2f} s), ideal {cached.ideal_speedup:.2f}x.",
        shrunk=WIDTH if plain.frames.shape[2] > WIDTH else None,
        summary=cached.summary,
        data=embedded(data),
        clips={keys[of]: pictures(made.frames) for of, made in clips.items()},
    )
    return f'<iframe title="clips" srcdoc="{html.escape(page)}"></iframe>'


def pictures(frames: np.ndarray) -> str:
    """Frames [T, H, W, 3] uint8 as base64 of lossless pictures, one a line: the difference view shows no codec."""
    lines = []
    for frame in frames:
        picture, content = Image.fromarray(frame), io.BytesIO()
        if picture.width > WIDTH:
            picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
        picture.save(content, "WEBP", lossless=True, method=0)
        lines.append(base64.b64encode(content.getvalue()).decode())
    return "\n".join(lines)


def example_prompts(model: str) -> list[str]:
    """The first of the evaluation prompts that an embedded model brings along; none of other models."""
    path = Path(model).expanduser() / "prompts.json"
    return list(json.loads(read_text(path, "prompts"))["evaluation"][:4]) if path.is_file() else []


class Page:
    """The page itself.

    Args:
        maker: makes the clips.
        model: what the page begins with.
        said: an error's message as one sentence.
    """

    def __init__(self, maker: Maker, model: str, said: Callable[[Exception], str]) -> None:
        self.maker, self.model, self.said = maker, model, said
        self._stops: dict[str, threading.Event] = {}  # of the run under way or waiting, by browser tab

    def make(
        self,
        model: str,
        prompt: str,
        method: str,
        budget: int,
        steps: int,
        seed: float | None,
        guidance: float | None,
        height: float | None,
        width: float | None,
        num_frames: float | None,
        tab: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  how Gradio is asked for one
    ) -> str:
        """What the button does: both clips, as HTML; gr.Error with one sentence for what cannot be made."""
        model, key, stop = model.strip(), str(tab.session_hash), threading.Event()
        self._stops[key] = stop

        def tell(what: str, done: int, of: int) -> None:
            if stop.is_set():
                raise Stopped
            progress((done, of) if of else None, desc=what, unit="steps")

        try:
            sizes = {"height": height, "width": width, "num_frames": num_frames}
            request = requested(model, prompt, steps=int(steps), seed=seed, guidance=guidance, **sizes)
            name = with_budget(method.strip(), int(budget))
            policy, schedule = single(read(name))
            plain, cached = self.maker.pair(model, request, name, policy, tell)
            fps = float(model_defaults(model).get("fps", 16.0))
            return shown(plain, cached, label(name, schedule).row, request, fps)
        except Stopped:
            raise gr.Error("Stopped.", visible=False, print_exception=False) from None
        except FAILURES as error:
            raise gr.Error(html.escape(self.said(error)), print_exception=False) from error
        finally:
            if self._stops.get(key) is stop:
                del self._stops[key]

    def stop(self, tab: gr.Request) -> None:
        """End the tab's run at its next step."""
        if stop := self._stops.pop(str(tab.session_hash), None):
            stop.set()
            gr.Info("Stopped.")

    def stop_all(self) -> None:
        """End every run at its next step."""
        for stop in list(self._stops.values()):
            stop.set()

    def blocks(self) -> gr.Blocks:
        """Fields on the left, clips on the right; on a phone below."""
        prompts = example_prompts(self.model)
        with gr.Blocks(title="stepcache", analytics_enabled=False, fill_width=True) as blocks:
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    prompt = gr.Textbox(prompts[0] if prompts else "", label="prompt", lines=3, elem_id="prompt")
                    model = gr.Textbox(
                        self.model, label="model", elem_id="model", info="folder or hub id of a diffusers Wan pipeline"
                    )
                    method = gr.Dropdown(
                        METHODS,
                        value=METHODS[0],
                        label="method",
                        allow_custom_value=True,
                        info="or typed with options, such as easycache:0.05,ret_steps=5 or plan:plan.json",
                    )
                    budget = gr.Slider(1, 100, 25, step=1, label="budget", info="steps to compute", elem_id="budget")
                    steps = gr.Slider(1, 100, 50, step=1, label="steps", elem_id="steps")
                    with gr.Accordion("seed, guidance, size", open=False):
                        seed = gr.Number(0, label="seed", precision=0)
                        guidance = gr.Number(None, label="guidance", placeholder="the model's")
                        sizes = [gr.Number(None, label=n, precision=0, placeholder="the model's") for n in SIZES]
                    with gr.Row():
                        make = gr.Button("make both clips", variant="primary", elem_id="make")
                        stop = gr.Button("stop", elem_id="stop")
                    if prompts:
                        gr.Examples(prompts, prompt, label="prompts of the kind this model was trained on")
                with gr.Column(scale=3, min_width=320):
                    clips = gr.HTML("<p>Both clips are shown here.</p>", elem_id="clips", min_height=240)
            method.change(
                lambda text: gr.Slider(interactive=takes_budget(text)), method, budget, show_progress="hidden"
            )
            fields = [model, prompt, method, budget, steps, seed, guidance, *sizes]
            made = make.click(self.make, fields, clips, concurrency_limit=1)
            stop.click(self.stop, cancels=[made])
            blocks.unload(self.stop)
        return blocks


def serve(page: Page, host: str, port: int | None) -> None:
    """Serve a page until Ctrl-C."""
    blocks = page.blocks()
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )
    print(f"{url}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.stop_all()
        blocks.close(verbose=False)
