"""A page in the browser: one clip or picture, uncached and with a method, side by side in lock-step.

The players are those of the report. Nothing is loaded from the web and nothing is sent to it.
"""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr

from stepcache.bench.labels import label
from stepcache.bench.methods import CALIBRATION, KINDS, PEERS, single
from stepcache.bench.pairs import Maker, Stopped, chosen, request_from, takes_budget
from stepcache.bench.report.clips import page_of
from stepcache.bench.results import REFERENCE
from stepcache.files import read_text
from stepcache.measure.pipelines import model_defaults

METHODS = [name for name in KINDS if name not in (REFERENCE, CALIBRATION, "plan", *PEERS)]
"""What the drop-down offers; others, and options, can be typed."""
MORE = ("guidance", "height", "width", "num_frames")
"""Fields that may stay empty; Gradio's own fields for numbers would then say 0."""
STYLE = """
iframe[title=clips] { width: 100%; border: 0; color-scheme: light; }
.dark iframe[title=clips] { color-scheme: dark; }
"""
FAILURES = (ValueError, OSError, ImportError, RuntimeError)
"""What a wrong input or too small a machine ends in; torch's lack of memory is a RuntimeError."""


def examples(folder: Path) -> list[str]:
    """Some of the prompts that the embedded model is evaluated on."""
    return list(json.loads(read_text(folder / "prompts.json", "prompts"))["evaluation"][:4])


class Page:
    """The page itself.

    Args:
        maker: makes the clips.
        model: what the page begins with.
        prompts: examples of what the model knows; the page begins with the first.
        said: an error's message as one sentence.
    """

    def __init__(self, maker: Maker, model: str, prompts: Sequence[str], said: Callable[[Exception], str]) -> None:
        self.maker, self.model, self.prompts, self.said = maker, model, list(prompts), said
        self._stops: dict[str, threading.Event] = {}  # of the run under way or waiting, by browser tab

    def make(
        self,
        model: str,
        prompt: str,
        method: str,
        budget: int,
        steps: int,
        seed: str,
        guidance: str,
        height: str,
        width: str,
        num_frames: str,
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
            request = request_from(model, prompt, steps=int(steps), seed=seed, guidance=guidance, **sizes)
            written = chosen(method, int(budget))
            policy, schedule = single(written)
            plain, cached = self.maker.pair(model, request, written.text, policy, tell)
            fps = float(model_defaults(model).get("fps", 16.0))
            clips = page_of(plain, cached, label(written.text, schedule).row, request, fps)
            return f'<iframe title="clips" srcdoc="{html.escape(clips)}"></iframe>'
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
        prompts = self.prompts
        with gr.Blocks(title="stepcache", analytics_enabled=False, fill_width=True) as blocks:
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    prompt = gr.Textbox(prompts[0] if prompts else "", label="prompt", lines=3, elem_id="prompt")
                    model = gr.Textbox(
                        self.model, label="model", elem_id="model", info="folder or hub id of a diffusers pipeline"
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
                        seed = gr.Textbox("0", label="seed", elem_id="seed")
                        more = [gr.Textbox("", label=n, placeholder="the model's", elem_id=n) for n in MORE]
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
            fields = [model, prompt, method, budget, steps, seed, *more]
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
