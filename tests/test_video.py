"""Reading and writing clips: bit-exact where promised, whole or not at all, and one clear sentence for bad input."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepcache.files import replacing
from stepcache.measure.video import array_clip, contact_sheet, open_clip, png_frames, to_uint8, write_clip

av = pytest.importorskip("av", reason="the dev extra brings PyAV")

LOSSLESS = ["clip.mkv", "clip.npy", "clip"]
EVERY = [*LOSSLESS, "clip.mp4"]


def noise(frames=5, height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def smooth(frames=6, height=64, width=96):
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    return np.rint(127.5 + 100 * np.sin(x / 19 + t / 4 + c) * np.cos(y / 23 - c)).astype(np.uint8)


def encode(path, frames, codec, pixels, container, **options):
    """A file made by other means than the code under test."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        output.mux(stream.encode(None))


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(("height", "width"), [(24, 32), (23, 31)])
def test_lossless_formats_return_every_bit(tmp_path, name, height, width):
    frames = noise(height=height, width=width)
    write_clip(tmp_path / name, frames, fps=12.5)
    clip = open_clip(tmp_path / name)
    assert np.array_equal(clip.read(), frames)
    assert (clip.height, clip.width, clip.lossy) == (height, width, False)
    assert clip.frames == (None if name.endswith("mkv") else 5)
    assert clip.fps == (12.5 if name.endswith("mkv") else None)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(LOSSLESS),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(2, 20)),
    seed=st.integers(0, 99),
)
def test_any_size_survives(tmp_path_factory, name, shape, seed):
    path = tmp_path_factory.mktemp("any") / name
    frames = noise(*shape, seed=seed)
    write_clip(path, iter(frames))
    assert np.array_equal(open_clip(path).read(), frames)


def test_npy_is_an_ordinary_npy_however_many_frames_are_streamed(tmp_path):
    for count in (1, 9, 10, 1234):
        write_clip(tmp_path / "clip.npy", (np.full((1, 2, 3), n % 256, np.uint8) for n in range(count)))
        array = np.load(tmp_path / "clip.npy")
        assert array.shape == (count, 1, 2, 3)
        assert np.array_equal(array[:, 0, 0, 0], np.arange(count) % 256)


def test_mp4_looks_right_and_says_it_is_lossy(tmp_path):
    frames = smooth()
    write_clip(tmp_path / "clip.mp4", frames, fps=16)
    clip = open_clip(tmp_path / "clip.mp4")
    assert (clip.encoding, clip.lossy, clip.frames, clip.fps) == ("h264 yuv420p", True, 6, 16.0)
    assert np.abs(clip.read().astype(int) - frames).mean() < 3


def test_mp4_keeps_colours(tmp_path):
    """Plain colours come back within rounding: the file names its YUV, and it is the one that was used."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)], np.uint8)
    frames = np.tile(colours[:, None, None], (1, 32, 32, 1))
    write_clip(tmp_path / "clip.mp4", frames)
    assert np.abs(open_clip(tmp_path / "clip.mp4").read().astype(int) - frames).max() <= 4
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited


def test_mp4_pads_odd_sizes_and_does_not_rescale(tmp_path):
    frames = smooth(height=33, width=47)
    write_clip(tmp_path / "clip.mp4", frames)
    read = open_clip(tmp_path / "clip.mp4").read()
    assert read.shape == (6, 34, 48, 3)
    assert np.abs(read[:, :33, :47].astype(int) - frames).mean() < 3
    assert np.abs(read[:, 33, :47].astype(int) - frames[:, 32]).mean() < 6  # the row below repeats the last one


@pytest.mark.parametrize(
    ("codec", "pixels", "options", "lossy"),
    [
        ("libx264rgb", "rgb24", {"crf": "0"}, False),
        ("libx264rgb", "rgb24", {"crf": "18"}, True),
        ("libx264rgb", "rgb24", {"qp": "10"}, True),
        ("libvpx-vp9", "gbrp", {"crf": "40", "b": "0"}, True),
        ("libvpx-vp9", "gbrp", {"lossless": "1"}, False),
        ("libvpx-vp9", "yuv444p", {"lossless": "1"}, True),
        ("libx264", "yuv444p", {"crf": "0"}, True),
        ("qtrle", "rgb24", {}, False),
        ("qtrle", "argb", {}, False),
        ("png", "rgba", {}, False),
        ("wrapped_avframe", "yuv444p", {}, True),  # .y4m
        ("ffv1", "bgr0", {}, False),
        ("ffv1", "yuv420p", {}, True),
    ],
)
def test_lossy_is_what_changed_the_pixels(tmp_path, codec, pixels, options, lossy):
    frames = noise()
    containers = {"qtrle": "mov", "png": "mov", "wrapped_avframe": "yuv4mpegpipe"}
    encode(tmp_path / "clip", frames, codec, pixels, containers.get(codec, "matroska"), **options)
    clip = open_clip(tmp_path / "clip")
    assert clip.lossy is lossy
    assert np.array_equal(clip.read(), frames) is not lossy


def test_why_a_file_is_lossy(tmp_path):
    frames = noise()
    for codec, pixels, says in (
        ("ffv1", "yuv420p", "colour is stored at less than full resolution"),
        ("ffv1", "yuv444p", "RGB was rounded to YUV and back, which alone holds PSNR near 52 dB"),
        ("ffv1", "gbrp10le", "it has 10 bits a channel, of which 8 are read"),
        ("libx264", "yuv420p", "the codec's own error"),
    ):
        encode(tmp_path / "clip.mkv", frames, codec, pixels, "matroska")
        clip = open_clip(tmp_path / "clip.mkv")
        assert says in clip.loss
    encode(tmp_path / "clip.mkv", frames, "ffv1", "yuv444p", "matroska")
    error = (open_clip(tmp_path / "clip.mkv").read().astype(float) - frames) ** 2
    assert 10 * np.log10(255**2 / error.mean()) == pytest.approx(52.1, abs=0.2)


def test_frames_may_be_floats_tensors_or_images(tmp_path):
    frames = noise()
    for number, given_frames in enumerate(
        [frames / 255.0, torch.from_numpy(frames), torch.from_numpy(frames) / 255, [Image.fromarray(f) for f in frames]]
    ):
        write_clip(tmp_path / f"{number}.npy", given_frames)
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), frames)


@given(st.floats(0, 1))
def test_floats_round_to_the_nearest_level(value):
    assert abs(int(to_uint8(np.full((1, 1, 3), value))[0, 0, 0]) - value * 255) <= 0.5


def test_a_clip_streams_and_can_be_read_again(tmp_path):
    write_clip(tmp_path / "clip.mkv", noise())
    clip = open_clip(tmp_path / "clip.mkv")
    assert np.array_equal(next(iter(clip)), noise()[0])
    assert np.array_equal(clip.read(), clip.read())


def test_float_npy_is_read_as_eight_bits(tmp_path):
    np.save(tmp_path / "clip.npy", noise().astype(np.float32) / 255)
    clip = open_clip(tmp_path / "clip.npy")
    assert clip.encoding == "npy float32"
    assert np.array_equal(clip.read(), noise())


def test_png_frames_come_in_natural_order(tmp_path):
    for number in (10, 9, 2, 1, 100):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / ".frame0.png").write_bytes(b"hidden")
    (tmp_path / "notes.txt").write_text("ignored")
    assert [int(frame[0, 0, 0]) for frame in open_clip(tmp_path)] == [1, 2, 9, 10, 100]


def test_one_png_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(noise()[0]).save(tmp_path / "image.png")
    assert np.array_equal(open_clip(tmp_path / "image.png").read(), noise()[:1])


# --------------------------------------------------------------------------------------------------- bad input


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4 does not exist; expected a video"):
        open_clip(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.npy", "a.png"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"is empty \(0 bytes\)"):
        open_clip(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.mp4", "cannot be read as a video"),
        ("a.npy", "cannot be read as an .npy"),
        ("a.png", "cannot be read as a PNG"),
    ],
)
def test_garbage(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"no such thing " * 50)
    with pytest.raises(ValueError, match=message) as caught:
        open_clip(tmp_path / name)
    assert str(caught.value).count("\n") == 0


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="folder without PNG frames"):
        open_clip(tmp_path)


def test_sound_without_pictures(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        open_clip(tmp_path / "a.wav")


def test_truncated_files(tmp_path):
    write_clip(tmp_path / "a.mp4", noise(20))
    write_clip(tmp_path / "b.npy", noise())
    write_clip(tmp_path / "c", noise())
    for path in (tmp_path / "a.mp4", tmp_path / "b.npy", tmp_path / "c" / "00000.png"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    for name in ("a.mp4", "b.npy", "c"):
        with pytest.raises(ValueError, match="cannot be read as"):
            open_clip(tmp_path / name).read()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 3, 8, 8), np.uint8), "channels come last"),
        (np.zeros((8, 8, 3), np.uint8), r"expected frames as \[T, H, W, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"shape \[0, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.int64), "holds int64"),
    ],
)
def test_npy_of_another_kind(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        open_clip(tmp_path / "a.npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 255.0])
def test_floats_out_of_range(tmp_path, value):
    np.save(tmp_path / "a.npy", np.full((2, 8, 8, 3), value, np.float32))
    with pytest.raises(ValueError, match=r"a\.npy, frame 0 holds floats from .* expected \[0, 1\]"):
        open_clip(tmp_path / "a.npy").read()


def test_npy_never_unpickles(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot be read as an \.npy"):
        open_clip(tmp_path / "a.npy")


def test_archive_of_arrays(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, frames=noise())
    with pytest.raises(ValueError, match="archive of arrays"):
        open_clip(tmp_path / "a.npy")


def test_jpeg_cannot_pass_for_a_lossless_png(tmp_path):
    Image.fromarray(noise()[0]).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        open_clip(tmp_path / "a.png")


def test_sixteen_bit_png(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected 8 bits per channel"):
        open_clip(tmp_path / "a.png")


def test_frames_of_two_sizes_in_one_folder(tmp_path):
    for number, size in enumerate([(8, 6), (8, 6), (6, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="frame 2 is 6 x 8 but the clip starts at 8 x 6"):
        open_clip(tmp_path).read()


# ----------------------------------------------------------------------------------------------------- writing


def broken(error):
    yield from noise(2)
    raise error


@pytest.mark.parametrize("error", [RuntimeError("decoder died"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", EVERY)
def test_an_interrupted_writer_leaves_nothing(tmp_path, name, error):
    with pytest.raises(type(error)):
        write_clip(tmp_path / name, broken(error))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EVERY)
def test_an_interrupted_writer_leaves_the_older_clip(tmp_path, name):
    write_clip(tmp_path / name, noise())
    before = open_clip(tmp_path / name).read()
    with pytest.raises(RuntimeError):
        write_clip(tmp_path / name, broken(RuntimeError()))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert np.array_equal(open_clip(tmp_path / name).read(), before)


@pytest.mark.parametrize("name", EVERY)
def test_a_new_clip_replaces_the_older_one(tmp_path, name):
    write_clip(tmp_path / name, noise(9))
    write_clip(tmp_path / name, noise(3, seed=1))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert len(open_clip(tmp_path / name).read()) == 3


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames to write"),
        ([noise()[0], noise(height=20)[0]], "Frame 1 is 32 x 20 but the first was 32 x 24"),
        (noise()[0], r"Frame 0 has shape \[32, 3\]"),
        (noise().transpose(0, 3, 1, 2), r"Frame 0 has shape \[3, 24, 32\]"),
        (noise().astype(int), "Frame 0 holds int64"),
        (noise() * 1.0, r"expected \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_frames_that_cannot_be_written(tmp_path, name, frames, message):
    with pytest.raises(ValueError, match=message):
        write_clip(tmp_path / name, frames)
    assert list(tmp_path.iterdir()) == []


def test_what_the_encoder_refuses(tmp_path):
    with pytest.raises(ValueError, match="FFmpeg cannot write 1 x 2 frames as ffv1"):
        write_clip(tmp_path / "a.mkv", noise(1, 2, 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_bad_fps(tmp_path, fps):
    with pytest.raises(ValueError, match="expected a positive number of frames per second"):
        write_clip(tmp_path / "a.mkv", noise(), fps=fps)


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"clips are written as \.mp4, \.mkv, \.npy, one \.png or a folder"):
        write_clip(tmp_path / "a.xyz", noise())


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a folder of nothing but PNG frames"):
        write_clip(tmp_path, noise())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_parents_are_made(tmp_path):
    write_clip(tmp_path / "a" / "b" / "clip.npy", noise())
    assert open_clip(tmp_path / "a" / "b" / "clip.npy").frames == 5


def test_png_frames_are_numbered(tmp_path):
    write_clip(tmp_path / "clip", noise(2))
    assert [p.name for p in png_frames(tmp_path / "clip")] == ["00000.png", "00001.png"]


def test_replacing_removes_its_temporary_folder(tmp_path):
    def interrupted():
        with replacing(tmp_path / "x") as temporary:
            temporary.mkdir()
            (temporary / "y").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ contact sheets


def holds(sheet, picture):
    """True when `picture` occurs in `sheet`, pixel for pixel."""
    height, width = picture.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (height, width))
    for top, left in np.argwhere(windows[..., 0, 0] == picture[0, 0, 0]):
        if np.array_equal(sheet[top : top + height, left : left + width], picture):
            return True
    return False


def test_contact_sheet_shows_evenly_spread_frames_enlarged_pixel_for_pixel(tmp_path):
    frames = noise(17, 16, 16)
    contact_sheet([("full", frames), ("lemica", frames[::-1])], tmp_path / "sheet.png", columns=5, scale=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for number in range(17):
        enlarged = frames[number].repeat(3, axis=0).repeat(3, axis=1)
        assert holds(sheet, enlarged) == (number in (0, 4, 8, 12, 16))


def test_contact_sheet_labels_are_dark_on_light_and_inside(tmp_path):
    label = "a rather long label for two very small frames"
    contact_sheet([(label, np.full((2, 8, 8, 3), 255, np.uint8))], tmp_path / "sheet.png", scale=1)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert sheet[0].min() > 230
    assert sheet.min() < 80
    assert sheet[:, -12:].min() > 230  # the right margin is free: nothing was cut off


def test_contact_sheet_sizes_small_and_large_frames(tmp_path):
    contact_sheet([("small", noise(1, 64, 64))], tmp_path / "small.png")
    contact_sheet([("large", noise(1, 480, 832))], tmp_path / "large.png")
    small, large = (Image.open(tmp_path / f"{name}.png") for name in ("small", "large"))
    assert holds(np.asarray(small), noise(1, 64, 64)[0].repeat(2, axis=0).repeat(2, axis=1))
    assert 320 < large.width < 400


@pytest.mark.parametrize(
    ("rows", "options"), [([], {}), ([("a", noise())], {"columns": 0}), ([("a", noise())], {"scale": 0})]
)
def test_contact_sheet_of_nothing(tmp_path, rows, options):
    with pytest.raises(ValueError, match="at least one row, one column and a scale of 1"):
        contact_sheet(rows, tmp_path / "sheet.png", **options)


def test_contact_sheet_names_the_row_with_bad_frames(tmp_path):
    with pytest.raises(ValueError, match=r"lemica has shape \[24, 32, 3\]"):
        contact_sheet([("full", noise()), ("lemica", noise()[0])], tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []


def test_array_clip_reads_an_array():
    clip = array_clip(noise(), "mine")
    assert (str(clip.path), clip.frames, clip.lossy) == ("mine", 5, False)
    assert np.array_equal(clip.read(), noise())


# ------------------------------------------------------------------------------- what a reader must not drop in silence


def turned(path, angle):
    """The mp4 with a display matrix that turns it clockwise by `angle`, as phones write it."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows forty bytes of other fields
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[angle]
    matrix = (cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_clip_is_read_as_players_show_it(tmp_path, angle):
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :16, :16] = 250  # a bright corner, top left
    write_clip(tmp_path / "a.mp4", frames)
    turned(tmp_path / "a.mp4", angle)
    clip = open_clip(tmp_path / "a.mp4")
    expected = np.rot90(frames, -angle // 90, axes=(1, 2))
    assert (clip.height, clip.width) == expected.shape[1:3]
    assert np.abs(clip.read().astype(int) - expected).mean() < 8


def test_a_picture_is_read_as_it_is_shown(tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert (open_clip(tmp_path / "a.png").read()[0] == np.rot90(picture, -1)).all()


def test_transparency_is_refused_not_dropped(tmp_path):
    picture = np.full((4, 6, 4), 255, np.uint8)
    Image.fromarray(picture).save(tmp_path / "opaque.png")
    assert (open_clip(tmp_path / "opaque.png").read() == 255).all()
    picture[0, 0, 3] = 10
    Image.fromarray(picture).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="transparent pixels, which are not compared"):
        open_clip(tmp_path / "a.png")
    indexed = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    indexed.save(tmp_path / "p.png", transparency=0)
    with pytest.raises(ValueError, match="transparent pixels"):
        open_clip(tmp_path / "p.png")


def test_transparent_videos_are_refused(tmp_path):
    import av

    for value in (255, 40):
        with av.open(str(tmp_path / f"{value}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=8)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "bgra"
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 4), value, np.uint8), format="bgra")
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert (open_clip(tmp_path / "255.mkv").read() == 255).all()
    with pytest.raises(ValueError, match="transparent pixels"):
        open_clip(tmp_path / "40.mkv")


def test_sixteen_bits_of_colour_are_refused(tmp_path):
    """Pillow reads them as eight, and would call two such pictures identical."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(4))
    header = (4).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    with pytest.raises(ValueError, match="16 bits; expected 8 bits per channel"):
        open_clip(tmp_path / "a.png")


def test_animated_pictures_are_refused(tmp_path):
    pictures = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (0, 90, 200)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match="an animation of 3 frames; expected one"):
        open_clip(tmp_path / "a.png")


@pytest.mark.parametrize("place", [0.4, 0.6, 0.9])
def test_damage_is_an_error_with_its_frame(tmp_path, place):
    """FFV1 has checksums; FFmpeg notes the mismatch in its log and goes on with what is left of the picture."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)
    write_clip(tmp_path / "a.mkv", frames)
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    for k in range(4):
        data[int(place * len(data)) + k] ^= 0x5A
    (tmp_path / "a.mkv").write_bytes(data)
    with pytest.raises(ValueError, match=r"frame \d is damaged .*CRC mismatch"):
        open_clip(tmp_path / "a.mkv").read()
    write_clip(tmp_path / "whole.mkv", frames)
    level = av.logging.get_level()
    for first, second in (("a.mkv", "whole.mkv"), ("whole.mkv", "a.mkv")):  # read in turn: which of them is it?
        with pytest.raises(ValueError, match=r"a\.mkv: frame \d is damaged"):
            list(zip(open_clip(tmp_path / first), open_clip(tmp_path / second), strict=True))
    assert av.logging.get_level() == level


@pytest.mark.parametrize(
    "name", ["a:b", "100%d", "take #1", "two  words", "видео", "視頻", "a'b\"c", "$(id)", "-v", "[0-9]*", "a&b;c?d"]
)
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".npy", ".png", ""])
def test_names_are_only_names(tmp_path, name, suffix, monkeypatch):
    """Of files and folders alike: no protocol, no pattern, no option."""
    monkeypatch.chdir(tmp_path)
    frames = noise()[:1]
    write_clip(name + suffix, frames)
    assert [path.name for path in tmp_path.iterdir()] == [name + suffix]
    found = open_clip(name + suffix).read()
    assert found.shape == frames.shape
    if suffix != ".mp4":
        assert np.array_equal(found, frames)


def test_cover_art_is_no_video(tmp_path):
    """A file with a cover and a film gives the film; one with sound and a cover gives nothing."""
    cover = np.zeros((1, 48, 48, 3), np.uint8)
    for name, film in (("film.mp4", True), ("song.mp4", False)):
        with av.open(str(tmp_path / name), "w") as output:
            art = output.add_stream("png", rate=1)
            art.height, art.width, art.pix_fmt = 48, 48, "rgb24"
            art.disposition = av.stream.Disposition.attached_pic
            sound = output.add_stream("aac", rate=8000)
            sound.layout = "mono"
            video = output.add_stream("libx264", rate=8) if film else None
            if video is not None:
                video.height, video.width, video.pix_fmt = 24, 32, "yuv420p"
            output.mux(art.encode(av.VideoFrame.from_ndarray(cover[0], format="rgb24")))
            output.mux(art.encode(None))
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            output.mux(sound.encode(tone))
            output.mux(sound.encode(None))
            if video is not None:
                for frame in noise():
                    output.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                output.mux(video.encode(None))
    assert open_clip(tmp_path / "film.mp4").read().shape == (5, 24, 32, 3)
    with pytest.raises(ValueError, match="no video stream but cover art"):
        open_clip(tmp_path / "song.mp4")
