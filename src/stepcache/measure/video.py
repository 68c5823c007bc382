"""Read and write clips: containers (mp4, mkv, ...), folders of PNG frames, `.npy` arrays.

A clip, here, is a sequence of 8-bit RGB frames: what a viewer sees, and what published numbers were measured on.
Reading streams, so a clip of any length takes the memory of a frame; writing is atomic, so a file that is there is
whole. Formats, and what they are for:

| name      | content              | bit-exact | for                             |
|-----------|----------------------|-----------|---------------------------------|
| `x.mkv`   | FFV1                 | yes       | measuring, and keeping          |
| `x.npy`   | uint8 [T, H, W, 3]   | yes       | measuring, without any codec    |
| `x`       | folder of PNG frames | yes       | measuring, and looking at frames |
| `x.mp4`   | H.264, yuv420p       | no        | viewing                         |

Needs numpy; PyAV for containers and Pillow for PNG, both in the extra `stepcache[video]`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stepcache.files import replacing
from stepcache.measure.lossless import loss_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


Frame = NDArray[np.uint8]
"""One picture: uint8 [H, W, 3], RGB."""


Frames = Iterable[Any]
"""What can be written: an array [T, H, W, 3] or an iterable of [H, W, 3]; uint8, or float in [0, 1]."""


CONTAINERS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".gif", ".y4m")
"""Suffixes taken for video files when a folder is searched for clips; `open_clip` itself tries any file."""


@dataclass(frozen=True)
class Clip:
    """A clip that can be read, once or many times, frame by frame: `for frame in clip` gives uint8 [H, W, 3]."""

    path: Path
    height: int
    width: int
    frames: int | None
    """How many frames, as the file announces it; None when only reading to the end can tell (mkv)."""
    fps: float | None
    """Frames per second; None for PNG folders and arrays, which do not say."""
    encoding: str
    """How the pixels are stored, e.g. "h264 yuv420p", "png", "npy uint8"."""
    loss: str | None
    """Why the frames may not be those that were written; None if they are known to be, bit for bit."""
    _read: Callable[[], Iterator[Frame]] = field(repr=False, compare=False)
    depth: int = 8
    """Bits a channel in the file; of more than 8 the first 8 are read."""

    @property
    def lossy(self) -> bool:
        """Whether the frames may differ from those that were written."""
        return self.loss is not None

    def __iter__(self) -> Iterator[Frame]:
        number = -1
        for number, frame in enumerate(self._read()):
            if frame.shape != (self.height, self.width, 3):
                size = f"{frame.shape[1]} x {frame.shape[0]}"
                raise ValueError(
                    f"{self.path}: frame {number} is {size} but the clip starts at {self.width} x {self.height}; "
                    "all frames of a clip must have one size."
                )
            yield frame
        if number < 0:
            raise ValueError(f"{self.path} has no frames; write it again.")

    def read(self) -> Frame:
        """All frames at once: uint8 [T, H, W, 3]."""
        return np.stack(list(self))


def open_clip(path: str | os.PathLike[str]) -> Clip:
    """Open a clip for streaming.

    Args:
        path: a video file (anything FFmpeg reads), a folder of PNG frames (taken in natural order: 2 before 10), one
            PNG (a clip of one frame), or an `.npy` of uint8, or of floats in [0, 1], shaped [T, H, W, 3]. Floats are
            rounded to 8 bits; arrays are memory-mapped.

    Returns:
        The clip; its first frame has been decoded, so it is known to be readable.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: it is empty, unreadable, not a video, or of the wrong shape.
        ImportError: the format needs PyAV or Pillow, which `stepcache[video]` brings.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a video, a folder of PNG frames or an .npy array.")
    if path.is_dir():
        return _open_pngs(path, png_frames(path))
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); write it again.")
    if path.suffix.lower() == ".npy":
        return _open_npy(path)
    if path.suffix.lower() == ".png":
        return _open_pngs(path, [path])
    return _open_container(path)


def array_clip(array: NDArray[Any], name: str | os.PathLike[str] = "array") -> Clip:
    """A clip over an array in memory: uint8, or float in [0, 1], [T, H, W, 3]; `name` is what messages call it.

    Raises:
        ValueError: another shape or dtype. (That floats lie in [0, 1] is checked frame by frame, as they are read.)
    """
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        hint = " (channels come last: transpose it)" if array.ndim == 4 and array.shape[1] == 3 else ""
        raise ValueError(f"{name} has shape {list(array.shape)}; expected frames as [T, H, W, 3]{hint}.")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} holds {array.dtype}; expected uint8, or float in [0, 1].")

    def read() -> Iterator[Frame]:
        return (to_uint8(frame, f"{name}, frame {number}") for number, frame in enumerate(array))

    count, height, width, _ = array.shape
    return Clip(Path(name), height, width, count, None, f"npy {array.dtype}", loss=None, _read=read)


def to_uint8(frame: Any, name: str = "the frame") -> Frame:
    """One frame as uint8 [H, W, 3]: itself, or from floats in [0, 1], rounded to the nearest of 256 levels.

    Args:
        frame: an array, a PIL image or a CPU tensor, [H, W, 3].
        name: what error messages call it.

    Raises:
        ValueError: another shape or dtype, not-a-number, or floats outside [0, 1] (by more than 0.001).
    """
    array = np.asarray(frame)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; expected [H, W, 3].")
    if array.dtype == np.uint8:
        return np.array(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} holds {array.dtype}; expected uint8, or float in [0, 1].")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # so written that not-a-number is refused too
        raise ValueError(f"{name} holds floats from {low:g} to {high:g}; expected [0, 1]: rescale it first.")
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def png_frames(folder: Path) -> list[Path]:
    """The PNG files right in a folder, in natural order (frame 2 before frame 10); hidden files are left out."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name.lower())]

    pngs = (p for p in folder.iterdir() if p.suffix.lower() == ".png" and not p.name.startswith("."))
    return sorted(pngs, key=natural)


def _open_pngs(path: Path, files: Sequence[Path]) -> Clip:
    if not files:
        raise ValueError(f"{path} is a folder without PNG frames; expected a clip.")
    height, width, _ = _read_png(files[0]).shape
    return Clip(path, height, width, len(files), None, "png", loss=None, _read=lambda: map(_read_png, files))


def _read_png(path: Path) -> Frame:
    image_module = _need("PIL.Image", "PNG frames need Pillow")
    operations = _need("PIL.ImageOps", "PNG frames need Pillow")
    try:
        with image_module.open(path, formats=["PNG"]) as image:  # a JPEG of that name would pass for lossless
            depth = _png_depth(path)
            if image.mode not in ("RGB", "RGBA", "P", "L", "LA", "1") or depth > 8:
                raise ValueError(f"{path} is a PNG of mode {image.mode}, {depth} bits; expected 8 bits per channel.")
            if (count := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"{path} is an animation of {count} frames; expected one, or a video file.")
            upright = operations.exif_transpose(image)  # as it is shown
            opaque = not upright.has_transparency_data or upright.convert("RGBA").getchannel("A").getextrema()[0] == 255
            if not opaque:
                raise ValueError(
                    f"{path} has transparent pixels, which are not compared; put it on a background first."
                )
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow calls some broken PNGs a syntax error
        raise ValueError(f"{path} cannot be read as a PNG ({error}); write it again.") from error


def _png_depth(path: Path) -> int:
    """Bits a channel, from the header: Pillow reads 16 bits as if they were 8."""
    with path.open("rb") as file:
        header = file.read(25)
    return header[24] if len(header) == 25 else 0


def _open_npy(path: Path) -> Clip:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npy array ({error}); expected [T, H, W, 3].") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays; expected one .npy array [T, H, W, 3].")
    return array_clip(array, path)


def _open_container(path: Path) -> Clip:
    with _decoding(path) as container:
        stream = _pictures(path, container)
        start, first = b"", None
        for packet in container.demux(stream):
            start = start or bytes(packet)
            first = next(iter(packet.decode()), None)
            if first is not None:
                break
        else:
            raise ValueError(f"{path} has a video stream without a frame; write it again.")
        codec, depth = stream.codec_context.name, max(part.bits for part in first.format.components)
        fps = float(stream.average_rate) if stream.average_rate else None
        height, width, _ = _upright(path, first).shape
        return Clip(
            path=path,
            height=height,
            width=width,
            frames=stream.frames or None,
            fps=fps,
            encoding=f"{codec} {first.format.name}",
            loss=loss_of(codec, first.format, start),
            _read=lambda: _decode(path),
            depth=depth,
        )


def _decode(path: Path) -> Iterator[Frame]:
    """All frames; ValueError where the decoder finds the file damaged, which it does not say itself."""
    with _decoding(path) as container:
        stream = _pictures(path, container)
        frames = container.decode(stream)
        for number in itertools.count():
            frame = _next(path, frames, stream.codec_context.name, number)
            if frame is None:
                return
            yield _upright(path, frame)


def _next(path: Path, frames: Iterator[Any], codec: str, number: int) -> Any:
    """The next frame; None at the end. FFmpeg's log is the process's: it is listened to for this one frame."""
    logging = _need("av.logging", "reading video files needs PyAV")
    level = logging.get_level()
    with logging.Capture(local=False) as said:
        logging.set_level(logging.ERROR)
        try:
            frame = next(frames, None)
        finally:
            logging.set_level(level)
    if errors := [text.strip() for _, name, text in said if name == codec]:
        raise ValueError(f"{path}: frame {number} is damaged ({errors[0]}); write the file again.")
    return frame


def _pictures(path: Path, container: Any) -> Any:
    """The first video stream that is no cover art; ValueError if there is nothing else."""
    covers = _need("av.stream", "reading video files needs PyAV").Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & covers), None)
    if stream is None:
        raise ValueError(f"{path} has no video stream but cover art; expected a video.")
    return stream


def _upright(path: Path, frame: Any) -> Frame:
    """A frame as players show it; ValueError where part of what is stored would not be compared."""
    if frame.rotation % 90:
        raise ValueError(f"{path} is shown turned by {frame.rotation} degrees; write it as it is to be compared.")
    picture = frame.to_ndarray(format="rgb24")
    if any(part.is_alpha for part in frame.format.components) and frame.to_ndarray(format="rgba")[..., 3].min() < 255:
        raise ValueError(f"{path} has transparent pixels, which are not compared; put it on a background first.")
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


@contextmanager
def _decoding(path: Path) -> Iterator[Any]:
    """An open container with at least one video stream; FFmpeg's errors become one sentence with the path in it."""
    av = _need("av", f"reading {path.suffix or 'video'} files needs PyAV")
    try:
        with av.open(_unambiguous(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream; expected a video.")
            yield container
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error.strerror}); expected mp4, mkv, ...") from error


def _unambiguous(path: Path) -> str:
    """The path as FFmpeg is given it: absolute, because it takes what stands before a colon for a protocol."""
    return os.path.abspath(path)


def _need(module: str, why: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{why}: pip install 'stepcache[video]' ({error}).") from error


def check_video() -> None:
    """ImportError now, before any work, if clips cannot be written for want of a library."""
    _need("av", "writing video files needs PyAV")


def write_clip(path: str | os.PathLike[str], frames: Frames, fps: float = 16.0) -> None:
    """Write a clip; on any error, nothing: neither a part of a file nor a lost older one.

    Args:
        path: the suffix decides. `.mkv` (FFV1) and `.npy` (uint8) and a folder of PNG frames (no suffix, or a folder
            that exists; its older frames are replaced) are bit-exact; `.mp4` (H.264, yuv420p, BT.709) is for viewing,
            and repeats the last row or column of an odd-sized frame, which yuv420p cannot hold; `.png` is one frame.
            Missing parent folders are made.
        frames: an array [T, H, W, 3], or an iterable of arrays, PIL images or CPU tensors [H, W, 3], consumed one by
            one; uint8, or float in [0, 1] (rounded to 8 bits).
        fps: frames per second, for the containers.

    Raises:
        ValueError: no frames, frames of several sizes, a wrong shape, dtype or range, an unknown suffix, an fps that
            is not positive, or a folder that holds more than PNG frames.
        ImportError: the format needs PyAV or Pillow, which `stepcache[video]` brings.
    """
    path = Path(path)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps:g}; expected a positive number of frames per second.")
    write = _writer(path)
    checked = _checked(frames)
    first = next(checked, None)
    if first is None:
        raise ValueError(f"There are no frames to write to {path}.")
    with replacing(path) as temporary:
        write(temporary, first, chain([first], checked), fps)


Writer = Callable[[Path, Frame, Iterator[Frame], float], None]
"""Writes to the path; gets the first frame (for the size), all frames including it, and the frames per second."""


def _writer(path: Path) -> Writer:
    by_suffix: dict[str, Writer] = {".mp4": _write_mp4, ".mkv": _write_mkv, ".npy": _write_npy, ".png": _write_png}
    if path.is_dir() or not path.suffix:
        if path.exists() and (not path.is_dir() or len(png_frames(path)) < len(list(path.iterdir()))):
            raise ValueError(f"{path} exists and is not a folder of nothing but PNG frames; choose another name.")
        return _write_pngs
    if path.suffix.lower() not in by_suffix:
        raise ValueError(
            f"{path}: clips are written as .mp4, .mkv, .npy, one .png or a folder of them (a name without suffix), "
            f"not as {path.suffix}."
        )
    return by_suffix[path.suffix.lower()]


def _checked(frames: Frames) -> Iterator[Frame]:
    size: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        checked = to_uint8(frame, f"Frame {number}")
        size = size or checked.shape
        if checked.shape != size:
            raise ValueError(
                f"Frame {number} is {checked.shape[1]} x {checked.shape[0]} but the first was {size[1]} x {size[0]}; "
                "all frames of a clip must have one size."
            )
        yield checked


@dataclass(frozen=True)
class _Format:
    """What FFmpeg is to make."""

    container: str
    codec: str
    pixels: str
    codec_options: dict[str, str]
    container_options: dict[str, str]


_MP4 = _Format("mp4", "libx264", "yuv420p", {"crf": "16"}, {"movflags": "+faststart"})  # faststart: plays while loading


_PREVIEW = _Format("mp4", "libx264", "yuv420p", {"crf": "27"}, {"movflags": "+faststart"})


_MKV = _Format("matroska", "ffv1", "bgr0", {"level": "3", "slicecrc": "1"}, {})


def _write_mp4(path: Path, first: Frame, frames: Iterator[Frame], fps: float) -> None:
    below, right = (size % 2 for size in first.shape[:2])

    def even(frame: Frame) -> Frame:
        return np.pad(frame, ((0, below), (0, right), (0, 0)), mode="edge")

    _encode(path, even(first), map(even, frames), fps, _MP4)


def write_preview(path: str | os.PathLike[str], clip: Clip, width: int) -> None:
    """Write a small MP4 of a clip for a page: at most `width` pixels wide; a small MP4 is copied as it is."""
    if clip.width <= width and clip.path.suffix.lower() == ".mp4":
        with replacing(path) as temporary:
            shutil.copyfile(clip.path, temporary)
        return
    image_module = _need("PIL.Image", "shrinking frames needs Pillow")
    share = min(1.0, width / clip.width)
    size = [max(2, round(n * share / 2) * 2) for n in (clip.width, clip.height)]

    def shrunk() -> Iterator[Frame]:
        for frame in clip:
            yield np.asarray(image_module.fromarray(frame).resize(size, image_module.Resampling.LANCZOS))

    frames = shrunk()
    first = next(frames)
    with replacing(path) as temporary:
        _encode(temporary, first, chain([first], frames), clip.fps or 16.0, _PREVIEW)


def _write_mkv(path: Path, first: Frame, frames: Iterator[Frame], fps: float) -> None:
    _encode(path, first, frames, fps, _MKV)


def _encode(path: Path, first: Frame, frames: Iterator[Frame], fps: float, form: _Format) -> None:
    av = _need("av", "writing video files needs PyAV")
    try:
        with av.open(_unambiguous(path), "w", format=form.container, options=form.container_options) as output:
            stream = output.add_stream(
                form.codec, rate=Fraction(fps).limit_denominator(1001), options=form.codec_options
            )
            stream.height, stream.width, _ = first.shape
            stream.pix_fmt = form.pixels
            conversion = {"format": form.pixels}
            if form.pixels.startswith("yuv"):  # say which YUV it is: players guess, by size, when a file does not
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
                context.color_range = 1  # limited
                conversion |= {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                output.mux(stream.encode(picture.reformat(**conversion)))
            output.mux(stream.encode(None))
    except av.FFmpegError as error:
        size = f"{first.shape[1]} x {first.shape[0]}"
        raise ValueError(f"FFmpeg cannot write {size} frames as {form.codec} ({error.strerror}).") from error


def _write_npy(path: Path, first: Frame, frames: Iterator[Frame], fps: float) -> None:
    """Stream an .npy: its header is written again at the end, when the number of frames is known.

    numpy pads the header so that the first dimension can grow in place; should it ever not, the check below says so.
    """

    def write_header(count: int) -> int:
        file.seek(0)
        shape = (count, *first.shape)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.tell()

    with open(path, "wb") as file:
        size, count = write_header(0), 0
        for frame in frames:
            file.write(frame.tobytes())
            count += 1
        if write_header(count) != size:
            raise RuntimeError(f"numpy {np.__version__} does not keep the size of an .npy header; write .mkv instead.")


def _write_pngs(path: Path, first: Frame, frames: Iterator[Frame], fps: float) -> None:
    image_module = _need("PIL.Image", "PNG frames need Pillow")
    path.mkdir()
    for number, frame in enumerate(frames):
        image_module.fromarray(frame).save(path / f"{number:05d}.png")


def _write_png(path: Path, first: Frame, frames: Iterator[Frame], fps: float) -> None:
    image_module = _need("PIL.Image", "PNG frames need Pillow")
    if sum(1 for _ in frames) > 1:
        raise ValueError("a .png holds one frame; write a clip as .mkv, .mp4, .npy or a folder of PNG frames.")
    image_module.fromarray(first).save(path, format="PNG")


def contact_sheet(
    rows: Sequence[tuple[str, Any]],
    path: str | os.PathLike[str],
    columns: int = 8,
    scale: int | None = None,
) -> None:
    """Write a PNG with one labelled row of evenly spread frames per clip, first and last frame included.

    Args:
        rows: (label, frames) per clip, top to bottom; frames [T, H, W, 3], uint8 or float in [0, 1].
        path: where the PNG goes.
        columns: frames per row; a shorter clip shows all it has.
        scale: integer factor by which frames are enlarged, pixel for pixel. By default small frames grow to about
            128 pixels, and large ones shrink to 320, on the longer side.

    Raises:
        ValueError: no rows, fewer than one column, a scale below one, or frames of a wrong shape, dtype or range.
    """
    if not rows or columns < 1 or (scale is not None and scale < 1):
        got = f"{len(rows)} rows, {columns} columns, scale {scale}"
        raise ValueError(f"A contact sheet needs at least one row, one column and a scale of 1; got {got}.")
    strips = []
    for label, frames in rows:
        array = np.asarray(frames)
        clip = array_clip(array, label)  # checks the shape
        shown = np.unique(np.rint(np.linspace(0, len(array) - 1, min(columns, len(array)))).astype(int)).tolist()
        pictures = [_resized(to_uint8(array[i], f"{label}, frame {i}"), scale) for i in shown]
        strips.append(_Strip(label, f"{clip.frames} frames, {clip.width} x {clip.height}", shown, pictures))
    sheet = _sheet(strips)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def animation(clips: Sequence[tuple[str, Any]], path: str | os.PathLike[str], fps: float, height: int = 160) -> None:
    """Write an animated WebP of clips side by side, for viewing, each with its label below.

    Args:
        clips: (label, frames) left to right; frames [T, H, W, 3] uint8 of one shape.
        path: where it goes.
        fps: frames a second, above 0.
        height: of a clip in the picture, pixels.

    Raises:
        ValueError: no clips, or clips of several shapes.
    """
    shapes = {np.asarray(frames).shape for _, frames in clips}
    if len(shapes) != 1:
        raise ValueError(f"An animation needs clips of one shape; got {sorted(shapes)}.")
    image_module, drawing = _need("PIL.Image", "an animation needs Pillow"), _need("PIL.ImageDraw", "it needs Pillow")
    (length, rows, columns, _), gap, band = shapes.pop(), 6, 22
    width = round(columns * height / rows)
    pictures = []
    for i in range(length):
        picture = image_module.new("RGB", (len(clips) * (width + gap) + gap, height + band + gap), "white")
        pen = drawing.Draw(picture)
        for k, (text, frames) in enumerate(clips):
            left = gap + k * (width + gap)
            frame = image_module.fromarray(to_uint8(np.asarray(frames)[i], f"{text}, frame {i}"))
            picture.paste(frame.resize((width, height), image_module.Resampling.NEAREST), (left, gap))
            pen.text((left + 2, height + gap + 4), text, fill="black")
        pictures.append(picture)
    with replacing(path) as temporary:
        options = {"save_all": True, "append_images": pictures[1:], "duration": round(1000 / fps), "loop": 0}
        pictures[0].save(temporary, format="WEBP", quality=85, **options)


@dataclass(frozen=True)
class _Strip:
    """One row of a contact sheet."""

    label: str
    detail: str
    numbers: list[int]
    pictures: list[Picture]


def _resized(frame: Frame, scale: int | None) -> Picture:
    image_module = _need("PIL.Image", "a contact sheet needs Pillow")
    image: Picture = image_module.fromarray(frame)
    longer = max(image.size)
    if scale is None and longer > 320:
        return image.resize([max(1, round(n * 320 / longer)) for n in image.size], image_module.Resampling.LANCZOS)
    factor = scale or max(1, round(128 / longer))
    return image.resize([n * factor for n in image.size], image_module.Resampling.NEAREST)


def _sheet(strips: Sequence[_Strip]) -> Picture:
    """Draw labels, frames and frame numbers on a light ground."""
    from PIL import Image, ImageDraw, ImageFont

    label_font, small_font = ImageFont.load_default(size=18), ImageFont.load_default(size=12)
    margin, gap, label_height, number_height, space = 24, 6, 30, 20, 14
    ground, ink, grey = (250, 250, 248), (30, 30, 34), (120, 120, 126)

    def width(strip: _Strip) -> int:
        labels = label_font.getlength(strip.label) + margin + small_font.getlength(strip.detail)
        return max(sum(p.width + gap for p in strip.pictures) - gap, math.ceil(labels))

    heights = [label_height + strip.pictures[0].height + number_height + space for strip in strips]
    size = max(map(width, strips)) + 2 * margin, sum(heights) - space + 2 * margin
    sheet = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(sheet)
    top = margin
    for strip, height in zip(strips, heights, strict=True):
        baseline = top + 18
        draw.text((margin, baseline), strip.label, fill=ink, font=label_font, anchor="ls")
        after = 2 * margin + label_font.getlength(strip.label)
        draw.text((after, baseline), strip.detail, fill=grey, font=small_font, anchor="ls")
        left = margin
        for number, picture in zip(strip.numbers, strip.pictures, strict=True):
            sheet.paste(picture, (left, top + label_height))
            below = top + label_height + picture.height + 4
            draw.text((left + picture.width / 2, below), str(number), fill=grey, font=small_font, anchor="ma")
            left += picture.width + gap
        top += height
    return sheet
