"""A diffusers pipeline of which a folder or hub id is known: what its call takes, its defaults, loading it."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepcache.files import read_text
from stepcache.measure.device import find_device

VARIANT = re.compile(r"\.(fp16|bf16|fp8|non_ema)[.-]")
"""In names of files that are loaded only when asked for."""
REQUIRED = inspect.Parameter.empty
"""The default of an argument that has none."""


DEFAULTS_FILE = "generation_defaults.json"
"""A model folder may hold this JSON object of numbers, named as in `DEFAULTS`."""


DEFAULTS: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "height": (int,),
    "width": (int,),
    "num_frames": (int,),
    "fps": (int, float),
    "guidance": (int, float),
    "max_sequence_length": (int,),
}


@dataclass(frozen=True)
class Inputs:
    """What the call of a pipeline takes, as its signature tells.

    Args:
        kind: class name of the pipeline.
        defaults: argument -> its default, `REQUIRED` where there is none.
    """

    kind: str
    defaults: Mapping[str, Any]

    @property
    def video(self) -> bool:
        """Whether it makes a clip; else one picture."""
        return "num_frames" in self.defaults

    @property
    def scale(self) -> str | None:
        """The argument that is the guidance scale; None where the pipeline has a guider of its own, or no guidance.

        Qwen-Image's `guidance_scale` is for models to come, and its true scale is above 1; FLUX has it the other way.
        """
        if isinstance(true := self.defaults.get("true_cfg_scale"), int | float) and true > 1:
            return "true_cfg_scale"
        return "guidance_scale" if "guidance_scale" in self.defaults else None

    @property
    def mixes(self) -> bool:
        """Whether the guidance scale mixes two branches; else it is an input of the model (distilled)."""
        if self.scale is None or "negative_prompt" not in self.defaults:
            return False
        return self.scale == "true_cfg_scale" or "true_cfg_scale" not in self.defaults

    @property
    def needs_image(self) -> bool:
        """Whether it makes nothing without a picture, whatever its signature says."""
        kinds = ("ImageToVideo", "Img2Img", "Edit", "Inpaint")
        return self.defaults.get("image") is REQUIRED or (
            "image" in self.defaults and any(k in self.kind for k in kinds)
        )


def inputs_of(pipe: Any) -> Inputs:
    """Of a pipeline, or of a class of pipelines."""
    kind = pipe if isinstance(pipe, type) else type(pipe)
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    return Inputs(kind.__name__, {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD})


def model_inputs(model: str, image: bool | None = False) -> Inputs:
    """What the pipeline in a folder or on the hub takes, before anything of it but its index is loaded.

    Args:
        model: folder, or hub id such as owner/name.
        image: whether a picture is given; None: not known, and not checked.

    Raises:
        FileNotFoundError: no such folder or hub id, or none of a diffusers pipeline.
        ValueError: it makes neither videos nor pictures from a text, or needs a picture, or takes none.
        ImportError: diffusers is not installed.
    """
    kind = pipeline_kind(model)
    found = getattr(_diffusers(), kind, None)
    if not isinstance(found, type):
        raise ValueError(f"{model!r} is a {kind}, which this version of diffusers does not have.")
    inputs = inputs_of(found)
    makes = inputs.video or {"height", "width"} <= set(inputs.defaults)
    if "prompt" not in inputs.defaults or "VideoToVideo" in kind or not makes:
        raise ValueError(f"{model!r} is a {kind}; expected a text-to-video or text-to-image pipeline.")
    if inputs.needs_image and image is False:
        raise ValueError(f"{model!r} is a {kind}, which needs a picture; expected one that works from text alone.")
    if image and "image" not in inputs.defaults:
        raise ValueError(f"{model!r} is a {kind}, which takes no picture.")
    wanted = [n for n, default in inputs.defaults.items() if default is REQUIRED and n not in ("prompt", "image")]
    if wanted:
        raise ValueError(f"{model!r} is a {kind}, which also needs {', '.join(wanted)}; use it through the library.")
    return inputs


def model_defaults(model: str) -> dict[str, Any]:
    """Defaults of a model by the names in `DEFAULTS`: its folder's, else its pipeline's; unknown ones are left out.

    Raises:
        ValueError: a damaged file; and what `model_inputs` raises.
    """
    inputs = model_inputs(model, image=None)
    names = {"steps": "num_inference_steps", "guidance": inputs.scale or "", "fps": "frame_rate"}
    signature = {name: inputs.defaults.get(names.get(name, name)) for name in DEFAULTS}
    known = {name: value for name, value in signature.items() if type(value) in DEFAULTS[name]}
    return {**known, **_folder_defaults(model)}


def _folder_defaults(model: str) -> dict[str, Any]:
    path = _folder(model) / DEFAULTS_FILE
    if not path.is_file():
        return {}
    defaults = _json_object(path, "defaults")
    for name, value in defaults.items():
        if name not in DEFAULTS or type(value) not in DEFAULTS[name]:
            raise ValueError(f"{path}: {name} is {value!r}; expected numbers named {', '.join(DEFAULTS)}.")
    return defaults


def pipeline_kind(model: str) -> str:
    """Class name of the pipeline in a folder or on the hub.

    Raises:
        FileNotFoundError: no such folder or hub id, or none of a diffusers pipeline.
        ValueError: its model_index.json is damaged.
    """
    folder = _folder(model)
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise FileNotFoundError(
                f"model folder {model!r} does not exist; give a folder or a hub id such as owner/name."
            )
        return _hub_kind(model)
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"model folder {model!r} has no model_index.json; it is not a diffusers pipeline.")
    return str(_json_object(index, "model index").get("_class_name"))


@functools.cache
def _hub_kind(model: str) -> str:
    """Of a hub id; the hub is asked once."""
    try:
        return str(_diffusers().DiffusionPipeline.load_config(model).get("_class_name"))
    except OSError as error:  # missing, gated, or no network: one long text each
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise FileNotFoundError(
            f"{model!r} is no folder here, and the hub cannot be reached or has no such model ({reason})."
        ) from error


def load_pipeline(model: str, device: str | None = None, dtype: str | None = None, offload: bool = False) -> Any:
    """Load a diffusers pipeline.

    Args:
        model: folder, or hub id such as owner/name.
        device: default cuda if there is one, else cpu.
        dtype: float32, bfloat16 or float16; default bfloat16 on cuda, float32 on cpu. Wan's VAE stays in float32: it
            loses colours in half precision.
        offload: keep parts in the CPU's memory while they are not needed (diffusers' model offload).

    Raises:
        FileNotFoundError: no such folder or hub id.
        ValueError: a device that is not there, said before any weights are read; or damaged files, or too large ones.
        ImportError: diffusers is not installed.
    """
    place, kind = find_device(device), pipeline_kind(model)
    diffusers = _diffusers()
    from safetensors import SafetensorError

    precision: Any = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    if kind.startswith("Wan"):
        precision = {"default": precision, "vae": torch.float32}
    source = _folder(model) if _folder(model).is_dir() else model
    try:
        with warnings.catch_warnings():  # newer diffusers say `dtype`, older ones know only `torch_dtype`
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=precision)
        if offload:
            pipe.enable_model_cpu_offload(device=place)
            return pipe
        return pipe.to(place)
    except (SafetensorError, RuntimeError, LookupError, TypeError) as error:  # damaged files, or no memory for them
        raise ValueError(f"model {model!r} cannot be loaded on {place}: {error}") from error


def weights_bytes(model: str, dtype: str) -> int | None:
    """Bytes of a folder's weights once they are loaded in a precision; None for a hub id, or without safetensors.

    Raises:
        ValueError: a file is damaged, or only the pointer that git keeps instead of it.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in _folder(model).glob("*/*.safetensors"):
        if VARIANT.search(path.name):
            continue
        try:
            with safe_open(path, "pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}); fetch it again.") from error
    return total * getattr(torch, dtype).itemsize or None


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this needs diffusers: pip install 'stepcache[diffusers,video]'.") from error
    return diffusers


def _folder(model: str) -> Path:
    return Path(model).expanduser()


def _json_object(path: Path, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path, kind))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return found
