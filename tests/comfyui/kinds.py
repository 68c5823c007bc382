"""Kinds of models and patches in the real ComfyUI, in one process, with random weights: a line of JSON for each.

    COMFYUI=checkout PYTHONPATH=src python tests/comfyui/kinds.py

"none": the largest difference from the run without the node where nothing is skipped. "half" and "uniform": relative
error of the latent with half the evaluations computed. "model": calls of the diffusion model in the whole run and in
the half. For compiled models, "graphs" says how many were compiled after the second step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.environ["COMFYUI"]]
import run_comfy

run_comfy.prepare()
sys.argv = ["comfyui"]
import comfy.options

comfy.options.enable_args_parsing(False)
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.cldm.cldm
import comfy.controlnet
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.nested_tensor
import comfy.ops
import comfy.sample
import comfy.supported_models as known
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper

from stepcache import Hindsight, Off, Uniform
from stepcache.hosts.comfyui import Patch, patched

STEPS, WIDTH = 12, 32
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "window_size": (-1, -1), "dim": 64, "out_dim": 16, "in_dim": 16,
    "num_heads": 2, "ffn_dim": 128, "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 32, "text_dim": WIDTH,
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
SOUND = {
    "image_model": "ltxav", "in_channels": 8, "audio_in_channels": 128, "cross_attention_dim": 32,
    "audio_cross_attention_dim": 32, "attention_head_dim": 16, "audio_attention_head_dim": 16, "num_attention_heads": 2,
    "audio_num_attention_heads": 2, "caption_channels": WIDTH // 2, "num_layers": 1,
}  # fmt: skip
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "num_heads": 2, "num_head_channels": -1, "context_dim": WIDTH,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None,
    "use_temporal_attention": False,
}  # fmt: skip


def filled(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a usual size."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
            else:
                p.fill_(1.0 if name.rsplit(".", 1)[-1] in ("weight", "scale") else 0.0)


def model(config: type, unet: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A ModelPatcher with random weights."""

    class Tiny(config):
        supported_inference_dtypes = (torch.float32, torch.bfloat16)

    tiny = Tiny(unet)
    tiny.set_inference_dtype(dtype, torch.float32 if dtype == torch.float8_e4m3fn else None)
    made = tiny.get_model({}, "")
    filled(made.diffusion_model)
    made.diffusion_model.eval()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(made, device, comfy.model_management.unet_offload_device())


def condition(seed: int, **more: Any) -> list[Any]:
    """CONDITIONING of eight random tokens."""
    return [[torch.randn(1, 8, WIDTH, generator=torch.Generator().manual_seed(seed)), more]]


def sample(patcher: Any, latent: Any, callback: Any = None, positive: Any = None, **more: Any) -> torch.Tensor:
    """The final latent; of nested ones, in a row."""
    noise = comfy.sample.prepare_noise(latent, 7)
    conditions = positive or condition(1, **more), condition(2, **more)
    with torch.inference_mode():
        found = comfy.sample.sample(
            patcher,
            noise,
            STEPS,
            5.0,
            "euler",
            "simple",
            *conditions,
            latent,
            seed=7,
            disable_pbar=True,
            callback=callback,
        )
    return torch.cat([x.flatten() for x in (found.unbind() if found.is_nested else [found])]).clone()


def shown(patcher: Any, latent: Any, **more: Any) -> dict[str, Any]:
    """What is said of a model."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    hook = patcher.model.diffusion_model.register_forward_pre_hook(count)

    def run(given: Any) -> tuple[torch.Tensor, int]:
        calls[0] = 0
        return sample(given, latent, **more), calls[0]

    def with_policy(policy: Callable[[], Any]) -> Any:
        return patched(patcher, Patch(lambda n: policy()))

    truth, whole = run(patcher)
    none, _ = run(with_policy(Off))
    half, part = run(with_policy(lambda: Hindsight(STEPS // 2)))
    reuse, _ = run(with_policy(lambda: Uniform(STEPS // 2)))
    again, _ = run(with_policy(lambda: Hindsight(STEPS // 2)))
    hook.remove()
    return {
        "none": float((none - truth).abs().max()),
        "half": float((half - truth).norm() / truth.norm()),
        "uniform": float((reuse - truth).norm() / truth.norm()),
        "model": [whole, part],
        "again": bool(torch.equal(again, half)),
    }


VIDEO, IMAGE = torch.zeros(1, 16, 3, 8, 8), torch.zeros(1, 4, 8, 8)


def t2v() -> dict[str, Any]:
    """Wan, nothing else."""
    return shown(model(known.WAN21_T2V, WAN), VIDEO)


def i2v() -> dict[str, Any]:
    """Wan image-to-video: the first picture and a mask in further channels."""
    unet = {**WAN, "model_type": "i2v", "in_dim": 36}
    picture = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 1, 3, 8, 8)
    mask[:, :, :1] = 0
    more = {"concat_latent_image": picture, "concat_mask": mask, "clip_vision_output": None}
    return shown(model(known.WAN21_I2V, unet), VIDEO, **more)


def sound() -> dict[str, Any]:
    """LTX-2: video and sound in one nested latent."""
    audio = torch.zeros(1, 8, 10, 16)
    return shown(model(known.LTXAV, SOUND), comfy.nested_tensor.NestedTensor((torch.zeros(1, 8, 3, 4, 4), audio)))


def control() -> dict[str, Any]:
    """A Stable Diffusion UNet with a ControlNet."""
    settings = {k: v for k, v in UNET.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(
        **settings, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    filled(net, 1)
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    made = comfy.controlnet.ControlNet(net, compression_ratio=8, load_device=torch.device("cpu"))
    return shown(
        model(known.SD15, UNET), IMAGE, control=made.set_cond_hint(hint, 1.0, (0.0, 1.0)), control_apply_to_uncond=False
    )


def areas() -> dict[str, Any]:
    """Wan with three conditions: one of an area, one of the first half of the run."""
    base = condition(1) + condition(3, area=(1, 4, 4, 0, 0, 0), strength=0.7) + condition(4, end_percent=0.5)
    return shown(model(known.WAN21_T2V, WAN), VIDEO, positive=base)


def lora() -> dict[str, Any]:
    """A LoRA on the attention of Wan, put on before the node and after it."""
    base = model(known.WAN21_T2V, WAN)
    key = "diffusion_model.blocks.0.self_attn.q"
    g = torch.Generator().manual_seed(5)
    weights = {f"{key}.lora_{x}.weight": torch.randn(s, generator=g) for x, s in (("up", (64, 4)), ("down", (4, 64)))}
    patches = comfy.lora.load_lora(weights, {key: f"{key}.weight"})
    plain = sample(base, VIDEO)
    with_lora = base.clone()
    with_lora.add_patches(patches, 0.5)
    result = shown(with_lora, VIDEO)
    before = sample(patched(with_lora, Patch(lambda n: Hindsight(6))), VIDEO)
    later = patched(base, Patch(lambda n: Hindsight(6)))
    later.add_patches(patches, 0.5)
    after = sample(later, VIDEO)
    changed = not torch.equal(sample(with_lora, VIDEO), plain)
    return {**result, "before as after": torch.equal(before, after), "changed": changed}


def compiled() -> dict[str, Any]:
    """TorchCompileModel around Wan."""
    base = model(known.WAN21_T2V, WAN).clone()
    set_torch_compile_wrapper(model=base, backend="eager")
    result = shown(base, VIDEO)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs: list[int] = []
    node = patched(base, Patch(lambda n: Hindsight(STEPS // 2)))
    for _ in range(2):
        sample(node, VIDEO, callback=lambda *_: graphs.append(counters["stats"]["unique_graphs"]))
    return {**result, "graphs": graphs}


def experts() -> dict[str, Any]:
    """Wan2.2: two models, each for a part of the steps, each with a node of its own."""
    high, low = model(known.WAN21_T2V, WAN), model(known.WAN21_T2V, WAN)
    filled(low.model.diffusion_model, 6)
    noise, conditions = comfy.sample.prepare_noise(VIDEO, 7), (condition(1), condition(2))

    def run(policy: Callable[[int], Any] | None) -> torch.Tensor:
        given = [m if policy is None else patched(m, Patch(policy)) for m in (high, low)]
        options = {"seed": 7, "disable_pbar": True}
        with torch.inference_mode():
            middle = comfy.sample.sample(
                given[0], noise, STEPS, 5.0, "euler", "simple", *conditions, VIDEO, last_step=5, **options
            )
            return comfy.sample.sample(
                given[1], torch.zeros_like(noise), STEPS, 5.0, "euler", "simple", *conditions, middle, start_step=5,
                disable_noise=True, force_full_denoise=True, **options,
            ).clone()  # fmt: skip

    truth = run(None)
    found = {
        name: run(policy) for name, policy in (("none", lambda n: Off()), ("half", lambda n: Hindsight(-(-n // 2))))
    }
    return {
        "none": float((found["none"] - truth).abs().max()),
        "half": float((found["half"] - truth).norm() / truth.norm()),
    }


def fp8() -> dict[str, Any]:
    """Weights in float8, computed in float32, as ComfyUI's loaders do."""
    return shown(model(known.WAN21_T2V, WAN, torch.float8_e4m3fn), VIDEO)


def bf16() -> dict[str, Any]:
    """Weights and outputs in bfloat16."""
    return shown(model(known.WAN21_T2V, WAN, torch.bfloat16), VIDEO)


if __name__ == "__main__":
    for kind in (t2v, i2v, sound, control, areas, lora, compiled, experts, fp8, bf16):
        print(json.dumps({"kind": kind.__name__, **kind()}), flush=True)
