"""Nodes for tests only: a small trained Wan model with conditioning, sigmas and latents from files; no T5, no VAE.

The stock loader derives heads (dim // 128), patch size (1, 2, 2), freq_dim 256 and text_dim 4096 from nothing but key
shapes, so a model with other settings needs its own loader; everything after that is ComfyUI's own WAN21 model.
"""

import json
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from safetensors.torch import load_file, save_file

CATEGORY = "_for_testing/stepcache"


class TinyLatents(comfy.latent_formats.LatentFormat):
    latent_channels = 24
    latent_dimensions = 3


class TinyWan(comfy.supported_models.WAN21_T2V):
    latent_format = TinyLatents
    supported_inference_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012


class LoadTinyWan:
    """A model whose settings lie beside its weights. `batching` "split": cond and uncond are called one by one."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "folder": ("STRING", {"default": ""}),
                "batching": (["auto", "split"],),
                "dtype": (["float32", "bfloat16"],),
            }
        }

    def load(self, folder, batching, dtype):
        folder = Path(folder)
        settings = json.loads((folder / "tiny_wan.json").read_text())
        unet = {"image_model": "wan2.1", "model_type": "t2v", "window_size": (-1, -1), **settings["unet"]}
        unet["patch_size"] = tuple(unet["patch_size"])
        config = TinyWan(unet)
        config.sampling_settings = {"shift": settings["shift"]}
        device = comfy.model_management.get_torch_device()
        config.set_inference_dtype(getattr(torch, dtype), None)
        model = config.get_model({}, "")
        model.to(comfy.model_management.unet_offload_device())
        missing, unexpected = model.diffusion_model.load_state_dict(load_file(folder / "tiny_wan.safetensors"), False)
        if missing or unexpected:
            raise ValueError(f"keys do not fit: missing {missing[:4]}, unexpected {unexpected[:4]}")
        if batching == "split":
            model.memory_usage_factor = 1e12
        return (comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device()),)


class LoadCond:
    """One tensor of a safetensors file as CONDITIONING."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {"default": ""}), "key": ("STRING", {"default": "pos0"})}}

    def load(self, path, key):
        return ([[load_file(path)[key], {}]],)


class RandomCond:
    """Random CONDITIONING for models with random weights."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "tokens": ("INT", {"default": 16}),
                "width": ("INT", {"default": 4096}),
            }
        }

    def make(self, seed, tokens, width):
        return ([[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), {}]],)


class LoadSigmas:
    """The tensor `sigmas` of a safetensors file."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("SIGMAS",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {"default": ""})}}

    def load(self, path):
        return (load_file(path)["sigmas"],)


class SaveTensor:
    """A latent as it is, float32, to a safetensors file."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = CATEGORY, "save", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "path": ("STRING", {"default": ""})}}

    def save(self, latent, path):
        samples = latent["samples"].float().contiguous()
        save_file({"latents": samples}, path)
        return {"ui": {"std": [float(samples.std())]}}


NODE_CLASS_MAPPINGS = {
    "TestbedLoadTinyWan": LoadTinyWan,
    "TestbedLoadCond": LoadCond,
    "TestbedRandomCond": RandomCond,
    "TestbedLoadSigmas": LoadSigmas,
    "TestbedSaveTensor": SaveTensor,
}
