"""The example workflows of the ComfyUI node pack, laid out and drawn by ComfyUI's own page.

    python tools/comfyui_workflows.py --url http://127.0.0.1:8188 --out comfyui/example_workflows

A ComfyUI with the node pack must run there; Chromium and selenium must be installed. Of each workflow a JSON for the
page and a picture of it are written. Models need not be there: the files' names are those of ComfyUI's own examples.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

Graph = dict[str, dict[str, Any]]
"""Node id -> class_type and inputs; an input that is [id, n] is the n-th output of another node."""
PROMPT = "A red fox trots through fresh snow between birch trees, morning light."
TABLE = "wan2.1-t2v-1.3B"  # of method lemica alone
SIZE = (2300, 1150)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Of the graph."""
    return {"class_type": kind, "inputs": inputs}


def stepcache(model: list[Any], budget: float = 0.5) -> dict[str, Any]:
    """Our node."""
    return node("StepCache", model=model, method="hindsight", budget=budget, enabled=True, threshold=0.05, table=TABLE)


def texts(graph: Graph, negative: str = "") -> None:
    """Both prompts."""
    graph["positive"] = node("CLIPTextEncode", clip=["clip", 0], text=PROMPT)
    graph["negative"] = node("CLIPTextEncode", clip=["clip", 0], text=negative)


def sampled(graph: Graph, steps: int, cfg: float, sampler: str, positive: str = "positive") -> None:
    """Sampler and decoder."""
    graph["sampler"] = node(
        "KSampler",
        model=["stepcache", 0],
        seed=7,
        steps=steps,
        cfg=cfg,
        sampler_name=sampler,
        scheduler="simple",
        positive=[positive, 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        denoise=1.0,
    )
    graph["decoded"] = node("VAEDecode", samples=["sampler", 0], vae=["vae", 0])


def saved_video(graph: Graph, fps: float) -> None:
    """As a file."""
    graph["video"] = node("CreateVideo", images=["decoded", 0], fps=fps)
    graph["saved"] = node("SaveVideo", video=["video", 0], filename_prefix="stepcache", format="auto", codec="auto")


def wan21() -> Graph:
    """Text to video, 1.3B."""
    graph = {
        "unet": node("UNETLoader", unet_name="wan2.1_t2v_1.3B_fp16.safetensors", weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan", device="default"),
        "vae": node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "shift": node("ModelSamplingSD3", model=["unet", 0], shift=8.0),
        "stepcache": stepcache(["shift", 0]),
        "latent": node("EmptyHunyuanLatentVideo", width=832, height=480, length=81, batch_size=1),
    }
    texts(graph)
    sampled(graph, 50, 6.0, "uni_pc")
    saved_video(graph, 16.0)
    return graph


def wan22() -> Graph:
    """Text to video, two experts: each is sampled and accelerated by itself."""
    graph: Graph = {
        "clip": node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan", device="default"),
        "vae": node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "latent": node("EmptyHunyuanLatentVideo", width=832, height=480, length=81, batch_size=1),
    }
    texts(graph)
    latent = "latent"
    for noise, start, end in (("high", 0, 20), ("low", 20, 40)):
        name = f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors"
        graph[f"unet {noise}"] = node("UNETLoader", unet_name=name, weight_dtype="default")
        graph[f"shift {noise}"] = node("ModelSamplingSD3", model=[f"unet {noise}", 0], shift=8.0)
        graph[f"stepcache {noise}"] = stepcache([f"shift {noise}", 0])
        graph[f"sampler {noise}"] = node(
            "KSamplerAdvanced",
            model=[f"stepcache {noise}", 0],
            add_noise="enable" if noise == "high" else "disable",
            noise_seed=7,
            steps=40,
            cfg=3.5,
            sampler_name="euler",
            scheduler="simple",
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=[latent, 0],
            start_at_step=start,
            end_at_step=end if noise == "high" else 10000,
            return_with_leftover_noise="enable" if noise == "high" else "disable",
        )
        latent = f"sampler {noise}"
    graph["decoded"] = node("VAEDecode", samples=[latent, 0], vae=["vae", 0])
    saved_video(graph, 16.0)
    return graph


def hunyuanvideo15() -> Graph:
    """Text to video, 720p."""
    graph = {
        "unet": node("UNETLoader", unet_name="hunyuanvideo1.5_720p_t2v_fp16.safetensors", weight_dtype="default"),
        "clip": node(
            "DualCLIPLoader",
            clip_name1="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            clip_name2="byt5_small_glyphxl_fp16.safetensors",
            type="hunyuan_video_15",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="hunyuanvideo15_vae_fp16.safetensors"),
        "shift": node("ModelSamplingSD3", model=["unet", 0], shift=9.0),
        "stepcache": stepcache(["shift", 0]),
        "latent": node("EmptyHunyuanVideo15Latent", width=1280, height=720, length=121, batch_size=1),
    }
    texts(graph)
    sampled(graph, 50, 6.0, "euler")
    saved_video(graph, 24.0)
    return graph


def qwen_image() -> Graph:
    """Text to image."""
    graph = {
        "unet": node("UNETLoader", unet_name="qwen_image_fp8_e4m3fn.safetensors", weight_dtype="default"),
        "clip": node(
            "CLIPLoader", clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image", device="default"
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "shift": node("ModelSamplingAuraFlow", model=["unet", 0], shift=3.1),
        "stepcache": stepcache(["shift", 0]),
        "latent": node("EmptySD3LatentImage", width=1328, height=1328, batch_size=1),
    }
    texts(graph)
    sampled(graph, 50, 4.0, "euler")
    graph["saved"] = node("SaveImage", images=["decoded", 0], filename_prefix="stepcache")
    return graph


def flux() -> Graph:
    """Text to image, guidance-distilled: one branch, 28 steps."""
    graph = {
        "unet": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "clip": node(
            "DualCLIPLoader",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl_fp8_e4m3fn_scaled.safetensors",
            type="flux",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="ae.safetensors"),
        "stepcache": stepcache(["unet", 0]),
        "latent": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
    }
    texts(graph)
    graph["guidance"] = node("FluxGuidance", conditioning=["positive", 0], guidance=3.5)
    sampled(graph, 28, 1.0, "euler", positive="guidance")
    graph["saved"] = node("SaveImage", images=["decoded", 0], filename_prefix="stepcache")
    return graph


WORKFLOWS = {
    "Wan2.1 T2V": wan21,
    "Wan2.2 T2V": wan22,
    "HunyuanVideo-1.5 T2V": hunyuanvideo15,
    "Qwen-Image": qwen_image,
    "FLUX.1 dev": flux,
}


def check(graph: Graph, url: str) -> None:
    """ValueError for nodes or inputs that this ComfyUI does not have."""
    with urllib.request.urlopen(f"{url}/object_info", timeout=60) as answer:
        known = json.load(answer)
    for name, found in graph.items():
        kind, given = found["class_type"], set(found["inputs"])
        if kind not in known:
            raise ValueError(f"{name}: this ComfyUI has no node {kind}.")
        required, optional = (set(known[kind]["input"].get(part, {})) for part in ("required", "optional"))
        if wrong := (given - required - optional) | (required - given):
            raise ValueError(f"{name}: {kind} has other inputs than were given: {', '.join(sorted(wrong))}.")


def numbered(graph: Graph) -> Graph:
    """The same with numbers for names, as the page wants them."""
    number = {name: str(i + 1) for i, name in enumerate(graph)}
    linked = lambda v: [number[v[0]], v[1]] if isinstance(v, list) else v  # noqa: E731
    return {
        number[name]: {**found, "inputs": {key: linked(v) for key, v in found["inputs"].items()}}
        for name, found in graph.items()
    }


def browser() -> Any:
    """Headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={SIZE[0]},{SIZE[1]}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
    driver.set_script_timeout(60)
    return driver


LOAD = """
const done = arguments[1], app = window.comfyAPI ? window.comfyAPI.app.app : window.app;
(async () => {
  await app.loadApiJson(arguments[0], 'workflow');
  app.graph.arrange(60);
  await new Promise(r => setTimeout(r, 500));
  const nodes = app.graph._nodes;
  let box = [1e9, 1e9, -1e9, -1e9];
  for (const n of nodes) {
    box = [Math.min(box[0], n.pos[0]), Math.min(box[1], n.pos[1] - 40),
           Math.max(box[2], n.pos[0] + n.size[0]), Math.max(box[3], n.pos[1] + n.size[1])];
  }
  const scale = Math.min((innerWidth - 120) / (box[2] - box[0]), (innerHeight - 140) / (box[3] - box[1]), 1);
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [-box[0] + 80 / scale, -box[1] + 80 / scale];
  app.canvas.setDirty(true, true);
  await new Promise(r => setTimeout(r, 1000));
  done(JSON.stringify(app.graph.serialize()));
})().catch(error => done('error: ' + error));
"""


def main() -> None:
    """Draw and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8188")
    parser.add_argument("--out", type=Path, default=Path("comfyui/example_workflows"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    driver = browser()
    try:
        for name, make in WORKFLOWS.items():
            graph = make()
            check(graph, args.url)
            driver.get(args.url)
            time.sleep(12)
            driver.execute_script("document.querySelectorAll('.p-dialog-mask').forEach(e => e.remove())")
            text = driver.execute_async_script(LOAD, numbered(graph))
            if text.startswith("error"):
                sys.exit(f"{name}: {text}")
            (args.out / f"{name}.json").write_text(json.dumps(json.loads(text), indent=1) + "\n")
            picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
            picture.save(args.out / f"{name}.jpg", quality=85)
            print(f"wrote {name}")
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
