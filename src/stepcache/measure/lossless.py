"""Whether a video file gives back the frames that were written, from its codec, pixel format and first packet."""

from __future__ import annotations

import re
from typing import Any

LOSSLESS = ("ffv1", "ffvhuff", "huffyuv", "utvideo", "magicyuv", "png", "rawvideo", "qtrle", "wrapped_avframe")
"""Codecs that keep whatever pixel format they are given."""

CODED = "the codec's own error is in these numbers"
SUBSAMPLED = "colour is stored at less than full resolution, which alone can hold PSNR near 30 dB"
ROUNDED = "RGB was rounded to YUV and back, which alone holds PSNR near 52 dB"


def loss_of(codec: str, pixels: Any, packet: bytes) -> str | None:
    """Why frames may not be those that were written; None if they are, bit for bit.

    The pixel format counts as much as the codec: FFV1 keeps yuv420p perfectly, but the way there from RGB did not.

    Args:
        codec: FFmpeg's name of the decoder.
        pixels: PyAV's `VideoFormat` of the first frame.
        packet: the stream's first packet, which shows how H.264 and VP9 were coded.
    """
    channels = [part for part in pixels.components if not part.is_alpha]
    if (depth := max(part.bits for part in channels)) > 8:
        return f"it has {depth} bits a channel, of which 8 are read"
    if not _keeps(codec, packet) or min(part.bits for part in channels) < 8:
        return CODED
    if pixels.is_rgb or len(channels) == 1:
        return None
    sizes = {(part.width, part.height) for part in channels}
    return ROUNDED if len(sizes) == 1 else SUBSAMPLED


def _keeps(codec: str, packet: bytes) -> bool:
    if codec == "h264":  # x264 leaves its settings in the first packet; crf 0 shows as constant quantiser 0
        return re.search(rb"x264 .*\bqp=0\b", packet, re.DOTALL) is not None
    if codec.startswith(("vp9", "libvpx-vp9")):
        return _vp9_keeps(packet)
    return codec in LOSSLESS


def _vp9_keeps(packet: bytes) -> bool:
    """Whether a VP9 key frame is coded without loss: base_q_idx and its three differences are 0.

    The uncompressed header of the VP9 bitstream specification, section 6.2, read as far as its quantiser.
    """
    bits = _Bits(packet)
    bits.take(2)  # frame marker
    profile = bits.take(1) + 2 * bits.take(1)
    if profile == 3:
        bits.take(1)
    if bits.take(1) or bits.take(1):  # shows an earlier frame, or is no key frame
        return False
    bits.take(1)
    resilient = bits.take(1)
    bits.take(24)  # sync code
    if profile >= 2:
        bits.take(1)  # 10 or 12 bits
    if bits.take(3) != 7:  # colour space: not RGB
        bits.take(1)
        bits.take(3 if profile in (1, 3) else 0)
    elif profile in (1, 3):
        bits.take(1)
    bits.take(32)  # width and height
    if bits.take(1):
        bits.take(32)
    if not resilient:
        bits.take(2)
    bits.take(2)  # frame context
    bits.take(9)  # loop filter: level, sharpness
    if bits.take(1) and bits.take(1):
        for _ in range(6):  # differences of reference frames and modes
            if bits.take(1):
                bits.take(7)
    return bits.take(8) == 0 and not any(bits.take(1) for _ in range(3))


class _Bits:
    """A packet's bits, the highest first; zeros behind its end."""

    def __init__(self, packet: bytes) -> None:
        self.head, self.at = packet[:64].ljust(64, b"\0"), 0

    def take(self, count: int) -> int:
        """The next `count` bits as a number."""
        found = int.from_bytes(self.head, "big") >> (512 - self.at - count) & ((1 << count) - 1)
        self.at += count
        return found
