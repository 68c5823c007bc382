"""LPIPS v0.1 on AlexNet, in torch alone: the network, and where its weights come from.

The distance of two pictures is, over the five ReLU outputs of an AlexNet trained on ImageNet, the squared difference of
the channel-normalised features, weighted per channel and averaged over positions (Zhang, Isola, Efros, Shechtman and
Wang, CVPR 2018, arXiv 1801.03924). The 1,152 channel weights come with this package (`data/lpips_alex.json`, from
`lpips` 0.1.4, BSD-2). AlexNet itself (9.9 MB of it is used) no package ships: it is read from a file the user names, or
from the folder in which torch.hub and torchvision keep what they have downloaded, and fetched to it on request.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import pickle
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 31
"""Height and width a frame needs, for AlexNet's last features to have a position at all."""


UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    AssertionError,
    pickle.UnpicklingError,
    struct.error,
)
"""What reading a damaged or foreign file as a checkpoint raises; torch's reader has no error of its own."""


CHECKPOINT_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
"""Torchvision's; the name ends with the first digits of its SHA-256."""


SIZE, PATIENCE = "233 MiB", 15.0
"""Of the checkpoint; seconds after which a silent server is given up."""


OFFLINE = "HF_HUB_OFFLINE"
"""With this variable set to 1, as for models of the hub, nothing is fetched."""


_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of inputs in [-1, 1], as LPIPS was trained


_CONVOLUTIONS = {  # index in torchvision's `features`: in, out, kernel, stride, padding
    0: (3, 64, 11, 4, 2),
    3: (64, 192, 5, 1, 2),
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}


_POOLED = (3, 6)  # those that see their input max-pooled


class LPIPS(nn.Module):
    """LPIPS v0.1 (alex), equal to the `lpips` package's to the last bit.

    Args:
        backbone: AlexNet's convolutions by their torchvision names, with or without the `features.` in front
            ("features.0.weight", ...); further entries, such as a classifier's, are ignored.
        source: where the backbone is from, for reports.

    Raises:
        ValueError: a tensor is missing or of another shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Mapping[str, Tensor], source: str = "a state dict") -> None:
        super().__init__()
        self.source = source
        self.convolutions = nn.ModuleDict(
            {
                str(index): nn.Conv2d(*shape) for index, shape in _CONVOLUTIONS.items()
            }  # in, out, kernel, stride, padding
        )
        names = {f"{prefix}{key}": key for key in self.convolutions.state_dict() for prefix in ("", "features.")}
        wanted = {names[name]: tensor for name, tensor in backbone.items() if name in names}
        try:
            self.convolutions.load_state_dict(wanted)
        except RuntimeError as error:
            raise ValueError(
                f"{source} is not torchvision's AlexNet: expected features.0.weight [64, 3, 11, 11] to "
                f"features.10.bias [256], found {_summary(backbone)}."
            ) from error
        self.heads = nn.ParameterList([torch.tensor(head).view(1, -1, 1, 1) for head in _heads()])
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor, spatial: bool = False) -> Tensor:
        """Distances of pictures, pair by pair; 0 for equal ones, and the larger the less alike.

        Args:
            a: pictures, float32 [N, 3, H, W] in [0, 1], H and W at least 31.
            b: the same shape.
            spatial: average over the pixels of each layer's distances interpolated to H x W, as TeaCache's and
                EasyCache's scripts do, instead of over the layer's own positions; the difference is small.

        Returns:
            float32 [N].
        """
        total = torch.zeros(1, device=a.device)
        with float32_convolutions():
            for left, right, head in zip(self._features(a), self._features(b), self.heads, strict=True):
                distance = F.conv2d((_normalised(left) - _normalised(right)) ** 2, head)
                if spatial:
                    distance = F.interpolate(distance, size=a.shape[-2:], mode="bilinear", align_corners=False)
                else:
                    distance = distance.mean(dim=(2, 3), keepdim=True)
                total = total + distance
        return total.mean(dim=(1, 2, 3))

    def _features(self, pictures: Tensor) -> Iterator[Tensor]:
        x = (2 * pictures - 1 - self.mean) / self.std
        for index in _CONVOLUTIONS:
            if index in _POOLED:
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            x = F.relu(self.convolutions[str(index)](x))
            yield x


def find_lpips(backbone: str | os.PathLike[str] | None = None, fetch: bool = False) -> tuple[LPIPS | None, str]:
    """LPIPS with the first AlexNet there is: the named file, else torch.hub's folder of downloaded checkpoints.

    That folder is also where torchvision keeps its weights, so there is nothing to gain from importing torchvision.

    Args:
        backbone: a file with AlexNet's state dict, whole or only its `features`: a torch file (read without
            unpickling objects) or `.safetensors`.
        fetch: whether to fetch torchvision's checkpoint into that folder where there is none, with a progress bar.

    Returns:
        The network and the name of the file its weights are from, or None and why there is none.

    Raises:
        FileNotFoundError: the named file does not exist.
        ValueError: the named file is not such a checkpoint. (One in torch.hub's folder is passed over, and the
            reason says so.)
    """
    if backbone is not None:
        return _from_file(Path(backbone)), Path(backbone).name
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    why = f"no AlexNet weights: give {CHECKPOINT_URL} as --lpips-backbone FILE, or put it into {folder}"
    if fetch and not any(folder.glob("alexnet-*.pth")):
        try:
            _fetch(folder)
        except (OSError, RuntimeError) as error:  # no network, a full disc; another hash
            why = why.replace("no AlexNet weights", f"AlexNet's weights could not be fetched ({error})")
    for file in sorted(folder.glob("alexnet-*.pth")):
        try:
            return _from_file(file), file.name
        except ValueError as error:
            why = str(error)
    return None, why


def _fetch(folder: Path) -> None:
    """Torchvision's AlexNet into torch.hub's folder: whole, and of the expected SHA-256, or not at all."""
    if os.environ.get(OFFLINE, "0").lower() not in ("", "0", "false", "no", "off"):
        raise OSError(f"{OFFLINE} is set")
    name = CHECKPOINT_URL.rsplit("/", 1)[1]
    print(f"fetching AlexNet's weights for LPIPS, once: {CHECKPOINT_URL} ({SIZE}) into {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        torch.hub.download_url_to_file(CHECKPOINT_URL, str(folder / name), name.split("-")[-1].split(".")[0])
    finally:
        socket.setdefaulttimeout(patience)


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Keep cuDNN from computing float32 convolutions in TF32, whose 10 bits of mantissa show in the third digit."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    # torch 2.9 gave the convolutions a setting of their own; where it is in use, reading the older one may raise.
    owner, name, exact = (
        (torch.backends.cudnn, "allow_tf32", False) if conv is None else (conv, "fp32_precision", "ieee")
    )
    before = getattr(owner, name)
    setattr(owner, name, exact)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _from_file(path: Path) -> LPIPS:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a file with AlexNet's weights, e.g. {CHECKPOINT_URL}."
        )
    try:
        state = _tensors(path)
    except UNREADABLE as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}); expected {CHECKPOINT_URL}.") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors); expected {CHECKPOINT_URL}.")
    return LPIPS(state, source=str(path))


def _tensors(path: Path) -> Any:
    """What a checkpoint holds; one of UNREADABLE if it is none."""
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _heads() -> list[list[float]]:
    data = importlib.resources.files(__package__).joinpath("data", "lpips_alex.json").read_text(encoding="utf-8")
    heads: list[list[float]] = json.loads(data)["heads"]
    return heads


def _normalised(features: Tensor) -> Tensor:
    """Unit length across channels at every position; the epsilon is the lpips package's."""
    return features / (torch.sqrt(torch.sum(features**2, dim=1, keepdim=True)) + 1e-10)


def _summary(state: Mapping[str, Tensor]) -> str:
    entries = [f"{name} {list(tensor.shape)}" for name, tensor in state.items()]
    return ", ".join(entries[:2]) + (f" and {len(entries) - 2} more" if len(entries) > 2 else "") or "nothing"
