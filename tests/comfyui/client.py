"""Queue graphs on a running ComfyUI and wait for them: /prompt and /history, nothing else."""

import json
import time
import urllib.error
import urllib.request


class Comfy:
    def __init__(self, url="http://127.0.0.1:8188"):
        self.url = url

    def _get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as r:
            return json.load(r)

    def wait_until_up(self, seconds=120):
        end = time.time() + seconds
        while time.time() < end:
            try:
                return self._get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise TimeoutError("ComfyUI did not come up")

    def run(self, graph, seconds=300):
        """Queue a graph; returns (outputs, seconds it took). RuntimeError with ComfyUI's own message if it failed."""
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as r:
                prompt_id = json.load(r)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error
        end = time.time() + seconds
        while time.time() < end:
            history = self._get(f"/history/{prompt_id}")
            if prompt_id in history:
                entry = history[prompt_id]
                messages = {m[0]: m[1] for m in entry["status"]["messages"]}
                if entry["status"]["status_str"] != "success":
                    e = messages.get("execution_error", {})
                    raise RuntimeError(f"{e.get('node_type')}: {e.get('exception_type')}: {e.get('exception_message')}")
                took = (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000
                return entry["outputs"], took
            time.sleep(0.05)
        raise TimeoutError(prompt_id)


def graph(
    *,
    bed,
    out,
    model=None,
    patch=None,
    steps=50,
    cfg=5.0,
    sampler="euler",
    scheduler="simple",
    seed=7,
    cond="pos0",
    batching="auto",
    dtype="float32",
    sigmas=None,
    size=(64, 64, 17),
    denoise=1.0,
):
    """Loader -> (patch node) -> KSampler or SamplerCustom -> save. `patch`: (class_type, inputs) that takes `model`."""
    w, h, n = size
    g = {
        "model": model
        or {"class_type": "TestbedLoadTinyWan", "inputs": {"folder": bed, "batching": batching, "dtype": dtype}},
        "pos": {"class_type": "TestbedLoadCond", "inputs": {"path": f"{bed}/conds.safetensors", "key": cond}},
        "neg": {"class_type": "TestbedLoadCond", "inputs": {"path": f"{bed}/conds.safetensors", "key": "neg"}},
        "empty": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": w, "height": h, "length": n, "batch_size": 1},
        },
        "save": {"class_type": "TestbedSaveTensor", "inputs": {"latent": ["sample", 0], "path": out}},
    }
    source = ["model", 0]
    if patch:
        g["patch"] = {"class_type": patch[0], "inputs": {"model": source, **patch[1]}}
        source = ["patch", 0]
    if sigmas:
        g["sigmas"] = {"class_type": "TestbedLoadSigmas", "inputs": {"path": sigmas}}
        g["ks"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": sampler}}
        g["sample"] = {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": source,
                "add_noise": True,
                "noise_seed": seed,
                "cfg": cfg,
                "positive": ["pos", 0],
                "negative": ["neg", 0],
                "sampler": ["ks", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["empty", 0],
            },
        }
    else:
        g["sample"] = {
            "class_type": "KSampler",
            "inputs": {
                "model": source,
                "seed": seed,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": sampler,
                "scheduler": scheduler,
                "positive": ["pos", 0],
                "negative": ["neg", 0],
                "latent_image": ["empty", 0],
                "denoise": denoise,
            },
        }
    return g
