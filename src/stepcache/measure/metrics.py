"""How close two clips are: PSNR, SSIM and LPIPS, per frame and under the protocol of a paper.

`psnr` and `ssim` work on arrays, `compare_clips` on clips of any length in the memory of a few frames. Everything is
computed on RGB values in [0, 1], PSNR and SSIM in float64 (float32 on devices without it), so that neither uint8
wrap-around nor TF32 nor cancellation can touch a digit that is printed.

Papers differ in how frames become one number, so a number needs its protocol's name beside it:

| protocol    | PSNR                                  | SSIM                            | LPIPS (alex)      |
|-------------|---------------------------------------|---------------------------------|-------------------|
| `reference` | per frame, mean over those that differ | reference, valid area          | plain             |
| `teacache`  | per frame, at most 100, mean over all | reference, valid area           | spatial, averaged |
| `easycache` | one, from the mean error of all frames | whole frame, edges reflected   | spatial, averaged |
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stepcache.measure.lpips import LPIPS, SMALLEST
from stepcache.measure.video import Clip, Frame, array_clip, open_clip

WINDOW = 11
"""Taps of SSIM's Gaussian window, standard deviation 1.5 (Wang, Bovik, Sheikh and Simoncelli 2004)."""


BATCH_PIXELS = 1 << 20
"""Frames are measured in batches of about this many pixels (at least one frame): 0.4 GB of float64 at most."""


@dataclass(frozen=True)
class Protocol:
    """How a paper's script turns frames into numbers."""

    name: str
    description: str
    whole_clip: bool
    """PSNR from the error of all frames together, rather than averaged over frames."""
    psnr_cap: float
    """Largest PSNR a frame can have, in dB; infinity: none."""
    reflect: bool
    """SSIM over the whole frame with reflected edges, rather than where the window fits."""
    spatial: bool
    """LPIPS layers interpolated to the frame before averaging."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "reference",
            "PSNR per frame, mean over the frames that differ; SSIM of Wang et al. 2004; LPIPS v0.1 alex",
            whole_clip=False,
            psnr_cap=math.inf,
            reflect=False,
            spatial=False,
        ),
        Protocol(
            "teacache",
            "as eval/teacache/common_metrics (also MagCache): PSNR per frame, at most 100; spatial LPIPS",
            whole_clip=False,
            psnr_cap=100.0,
            reflect=False,
            spatial=True,
        ),
        Protocol(
            "easycache",
            "as EasyCache's video_metrics.py: one PSNR over all frames; SSIM with reflected edges; spatial LPIPS",
            whole_clip=True,
            psnr_cap=math.inf,
            reflect=True,
            spatial=True,
        ),
    )
}


ClipLike = Clip | str | os.PathLike[str] | NDArray[Any] | Tensor
"""A clip, its path, or its frames: [T, H, W, 3], uint8 or float in [0, 1]."""


def psnr(a: NDArray[Any] | Tensor, b: NDArray[Any] | Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every frame, 10 log10(1 / mean squared error), in dB.

    Args:
        a: frames [T, H, W, 3], uint8, or float in [0, 1] (used as they are, not rounded to 8 bits).
        b: the same shape.

    Returns:
        float64 [T], on the CPU; infinity for identical frames (`mean_psnr` averages with that in mind).

    Raises:
        ValueError: shapes that differ or are not [T, H, W, 3], another dtype, values outside [0, 1].
    """
    errors = [_squared_error(x, y) for x, y in _array_batches(a, b)]
    return torch.cat([_psnr(error.cpu().double()) for error in errors])


def ssim(a: NDArray[Any] | Tensor, b: NDArray[Any] | Tensor, reflect: bool = False) -> Tensor:
    """Structural similarity of every frame (Wang, Bovik, Sheikh and Simoncelli 2004), mean of the colour channels.

    Gaussian window of 11 x 11 and standard deviation 1.5, K1 = 0.01, K2 = 0.03, population (co)variances, averaged over
    the positions where the window fits. scikit-image agrees with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1`; its defaults are another measure (up to 0.07 away).

    Args:
        a: frames [T, H, W, 3], uint8 or float in [0, 1]; H and W at least 11.
        b: the same shape.
        reflect: average over all positions of the frame reflected at its edges, as torchmetrics does (up to 0.006
            away).

    Returns:
        float64 [T] in [-1, 1], on the CPU; 1 for identical frames.

    Raises:
        ValueError: as `psnr`, or frames smaller than the window.
    """
    return torch.cat([_ssim(x, y, reflect).cpu().double() for x, y in _array_batches(a, b)])


def mean_psnr(values: Sequence[float]) -> float:
    """Mean of PSNRs in dB over those that are finite; infinity when none is.

    An identical pair has no finite PSNR, and any number put in its place would decide the mean. Leaving it out can only
    lower the mean: the others are what was lost.
    """
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


def _array_batches(a: NDArray[Any] | Tensor, b: NDArray[Any] | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for frames in (a, b):
        if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"Frames have shape {list(frames.shape)}; expected [T, H, W, 3].")
    if a.shape != b.shape:
        raise ValueError(
            f"Frames of shapes {list(a.shape)} and {list(b.shape)} cannot be compared; both must be alike."
        )

    count, height, width, _ = a.shape
    step = _batch_size(height, width)
    for start in range(0, count, step):
        part = slice(start, start + step)
        yield _unit(_tensor(a[part])), _unit(_tensor(b[part]))


def _tensor(frames: NDArray[Any] | Tensor) -> Tensor:
    return frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))  # a memory map is read-only


def _batch_size(height: int, width: int) -> int:
    return max(1, BATCH_PIXELS // (height * width))


def _unit(frames: Tensor) -> Tensor:
    """Frames [N, H, W, 3] as float64 (float32 on devices without it) [N, 3, H, W] in [0, 1]."""
    wide = torch.float32 if frames.device.type == "mps" else torch.float64
    if frames.dtype == torch.uint8:
        return frames.permute(0, 3, 1, 2).to(wide).div_(255)
    if not frames.is_floating_point():
        raise ValueError(f"Frames hold {frames.dtype}; expected uint8, or float in [0, 1].")
    low, high = frames.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # so written that not-a-number is refused too
        raise ValueError(f"Frames hold floats from {low:g} to {high:g}; expected [0, 1]: rescale them first.")
    return frames.permute(0, 3, 1, 2).to(wide)


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square_().mean(dim=(1, 2, 3))


def _psnr(squared_error: Tensor) -> Tensor:
    return -10 * torch.log10(squared_error)  # of zero: infinity


def _ssim(x: Tensor, y: Tensor, reflect: bool) -> Tensor:
    """Mean SSIM [N] of pictures [N, C, H, W] in [0, 1].

    From the sum s = x + y and the difference d = x - y, four blurred maps do instead of five (x, y, x^2, y^2, xy):
    2 mu_x mu_y = (mu_s^2 - mu_d^2) / 2, mu_x^2 + mu_y^2 = (mu_s^2 + mu_d^2) / 2, and the same for the variances. The
    halves go into the constants. Equal pictures have d = 0 and so exactly 1.
    """
    smallest = WINDOW // 2 + 1 if reflect else WINDOW
    if min(x.shape[-2:]) < smallest:
        raise ValueError(
            f"Frames of {x.shape[-1]} x {x.shape[-2]} are too small for SSIM; it needs {smallest} x {smallest}."
        )
    if reflect:
        x, y = (F.pad(picture, [WINDOW // 2] * 4, mode="reflect") for picture in (x, y))
    c1, c2 = 2 * 0.01**2, 2 * 0.03**2
    s, d = x + y, x - y
    mean_s, mean_d = _blur(s).square_(), _blur(d).square_()
    var_s, var_d = _blur(s.square_()).sub_(mean_s), _blur(d.square_()).sub_(mean_d)
    likeness = (mean_s - mean_d + c1) * (var_s - var_d + c2)
    return (likeness / ((mean_s + mean_d + c1) * (var_s + var_d + c2))).mean(dim=(1, 2, 3))


def _blur(maps: Tensor) -> Tensor:
    """Gaussian window where it fits: [..., H, W] to [..., H - 10, W - 10].

    A symmetric sum of slices: on a CPU several times faster than a float64 convolution, and never TF32.
    """
    half = WINDOW // 2
    weights = [math.exp(-0.5 * (offset / 1.5) ** 2) for offset in range(half + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim in (-2, -1):
        size = maps.shape[dim] - 2 * half
        blurred = maps.narrow(dim, half, size) * (weights[0] / total)
        for offset in range(1, half + 1):
            pair = maps.narrow(dim, half - offset, size) + maps.narrow(dim, half + offset, size)
            blurred.add_(pair, alpha=weights[offset] / total)
        maps = blurred
    return maps


@dataclass(frozen=True)
class WorstFrame:
    """The frame with the lowest PSNR (the first of them), and what it measures."""

    index: int
    psnr: float
    ssim: float
    lpips: float | None


@dataclass(frozen=True)
class ClipComparison:
    """Two clips compared under a protocol. PSNR in dB, infinite where nothing differs; SSIM up to 1; LPIPS from 0."""

    protocol: str
    frames: int
    height: int
    width: int
    psnr: float
    """The clip's PSNR as the protocol has it."""
    ssim: float
    """Mean over frames."""
    lpips: float | None
    """Mean over frames; None when it was not computed."""
    psnr_whole_clip: float
    """PSNR of the squared error averaged over all frames, whatever the protocol."""
    psnr_per_frame: tuple[float, ...]
    ssim_per_frame: tuple[float, ...]
    lpips_per_frame: tuple[float, ...] | None
    worst: WorstFrame
    identical: bool
    """Every pixel of every frame is equal; never said of files with more than 8 bits a channel, of which 8 are read."""
    identical_frames: int
    """Frames that are equal; in the `reference` protocol they are not in the mean PSNR."""
    lossy: str | None
    """A sentence that says which input is lossy, and why; None when neither is."""
    lpips_note: str
    """Why LPIPS was not computed; empty when it was."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; an infinite PSNR becomes None, because JSON has no infinity."""
        worst = self.worst
        return {
            "protocol": self.protocol,
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "psnr": finite(self.psnr),
            "ssim": self.ssim,
            "lpips": self.lpips,
            "lpips_note": self.lpips_note,
            "psnr_whole_clip": finite(self.psnr_whole_clip),
            "identical": self.identical,
            "identical_frames": self.identical_frames,
            "worst_frame": {
                "index": worst.index,
                "psnr": finite(worst.psnr),
                "ssim": worst.ssim,
                "lpips": worst.lpips,
            },
            "lossy": self.lossy,
            "per_frame": {
                "psnr": [finite(value) for value in self.psnr_per_frame],
                "ssim": list(self.ssim_per_frame),
                "lpips": None if self.lpips_per_frame is None else list(self.lpips_per_frame),
            },
        }


def finite(value: float) -> float | None:
    """The value, or None where JSON would have to write infinity."""
    return value if math.isfinite(value) else None


def compare_clips(
    a: ClipLike,
    b: ClipLike,
    *,
    protocol: str = "reference",
    lpips: LPIPS | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> ClipComparison:
    """Compare two clips frame by frame, streaming; frames are 8-bit (floats are rounded, see `measure/video.py`).

    Args:
        a: the original.
        b: the generated clip; as many frames of the same size.
        protocol: "reference", "teacache" or "easycache": a name in `PROTOCOLS`.
        lpips: the network, from `stepcache.measure.lpips.find_lpips`; None leaves LPIPS out. It is moved to `device`.
        device: where to compute.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: unreadable clips, clips of different size or length, frames below 11 x 11, an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"There is no protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    rules = PROTOCOLS[protocol]
    left, right = _as_clip(a, "the first clip"), _as_clip(b, "the second clip")
    _check_alike(left, right)
    note = "" if lpips is not None else "not asked for"
    if lpips is not None and min(left.height, left.width) < SMALLEST:
        lpips, note = None, f"frames of {left.width} x {left.height} are too small; it needs {SMALLEST} x {SMALLEST}"
    if lpips is not None:
        lpips.to(device)

    errors: list[float] = []
    similarities: list[float] = []
    distances: list[float] = []
    with tqdm(total=left.frames or right.frames, unit="frame", disable=not progress, leave=False) as bar:
        for batch_a, batch_b in _clip_batches(left, right):
            x, y = (_unit(torch.from_numpy(batch).to(device)) for batch in (batch_a, batch_b))
            errors += _squared_error(x, y).tolist()
            similarities += _ssim(x, y, rules.reflect).tolist()
            if lpips is not None:
                distances += lpips(x.float(), y.float(), spatial=rules.spatial).tolist()
            bar.update(len(x))
    return _summarise(rules, left, right, errors, similarities, distances if lpips is not None else None, note)


def _summarise(
    rules: Protocol,
    a: Clip,
    b: Clip,
    errors: Sequence[float],
    similarities: Sequence[float],
    distances: Sequence[float] | None,
    note: str,
) -> ClipComparison:
    """Turn the frames' squared errors, SSIM and LPIPS into the protocol's numbers."""
    count = len(errors)
    per_frame = [min(value, rules.psnr_cap) for value in _psnr(torch.tensor(errors, dtype=torch.float64)).tolist()]
    whole_clip = float(_psnr(torch.tensor(sum(errors) / count, dtype=torch.float64)))
    worst = min(range(count), key=per_frame.__getitem__)
    return ClipComparison(
        protocol=rules.name,
        frames=count,
        height=a.height,
        width=a.width,
        psnr=whole_clip if rules.whole_clip else mean_psnr(per_frame),
        ssim=sum(similarities) / count,
        lpips=None if distances is None else sum(distances) / count,
        psnr_whole_clip=whole_clip,
        psnr_per_frame=tuple(per_frame),
        ssim_per_frame=tuple(similarities),
        lpips_per_frame=None if distances is None else tuple(distances),
        worst=WorstFrame(worst, per_frame[worst], similarities[worst], None if distances is None else distances[worst]),
        identical=not any(errors) and max(a.depth, b.depth) <= 8,
        identical_frames=errors.count(0.0),
        lossy=_lossy_note(a, b),
        lpips_note=note,
    )


def _as_clip(clip: ClipLike, name: str) -> Clip:
    if isinstance(clip, Clip):
        return clip
    if isinstance(clip, Tensor):
        clip = clip.detach().cpu()
        return array_clip((clip.float() if clip.is_floating_point() else clip).numpy(), name)
    return array_clip(clip, name) if isinstance(clip, np.ndarray) else open_clip(clip)


def _check_alike(a: Clip, b: Clip) -> None:
    if (a.height, a.width) != (b.height, b.width):
        raise ValueError(
            f"{a.path} is {a.width} x {a.height} but {b.path} is {b.width} x {b.height}; "
            "generate both at the same size: frames are never rescaled or cropped to be compared."
        )
    if a.frames and b.frames and a.frames != b.frames:
        # Containers can announce frames that an edit list then hides: count before refusing.
        _check_length(a, sum(1 for _ in a), b, sum(1 for _ in b))


def _check_length(a: Clip, frames_a: int, b: Clip, frames_b: int) -> None:
    if frames_a != frames_b:
        raise ValueError(
            f"{a.path} has {frames_a} frame{'s' * (frames_a != 1)} but {b.path} has {frames_b}; "
            "generate both with the same number of frames: clips are never cut to be compared."
        )


def _clip_batches(a: Clip, b: Clip) -> Iterator[tuple[Frame, Frame]]:
    """Both clips in step, as pairs of [N, H, W, 3]; the end of one before the other is an error."""
    size = _batch_size(a.height, a.width)
    batch: list[tuple[Frame, Frame]] = []
    counts = [0, 0]
    for left, right in zip_longest(a, b):
        counts = [counts[0] + (left is not None), counts[1] + (right is not None)]
        if counts[0] != counts[1]:
            continue  # only count on: the message names both lengths
        batch.append((left, right))
        if len(batch) == size:
            yield np.stack([p[0] for p in batch]), np.stack([p[1] for p in batch])
            batch = []
    _check_length(a, counts[0], b, counts[1])
    if batch:
        yield np.stack([p[0] for p in batch]), np.stack([p[1] for p in batch])


def _lossy_note(a: Clip, b: Clip) -> str | None:
    lossy = {str(clip.path): f"({clip.encoding}): {clip.loss}" for clip in (a, b) if clip.lossy}
    if not lossy:
        return None
    named = "; ".join(f"{path} {why}" for path, why in lossy.items())
    return f"Lossy input: {named}. Compare .mkv (FFV1), .npy or PNG frames instead."
