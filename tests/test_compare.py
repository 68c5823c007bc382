"""The command `stepcache compare`: what it prints and writes, and that every mistake costs one sentence and code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from stepcache.commands.main import main as stepcache
from stepcache.measure.metrics import PROTOCOLS, compare_clips
from stepcache.measure.video import write_clip

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


def main(arguments):
    return stepcache(["compare", *arguments])


def noise(frames=4, height=32, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Run in an empty folder, without anybody's AlexNet."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def backbone(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {f"features.{i}.weight": 0.05 * torch.randn(shape, generator=generator) for i, shape in SHAPES.items()}
    state |= {f"features.{i}.bias": torch.zeros(shape[0]) for i, shape in SHAPES.items()}
    torch.save(state, tmp_path / "alexnet.pth")
    return str(tmp_path / "alexnet.pth")


def run(*arguments):
    return main(["--original_video", "a.mkv", "--generated_video", "b.mkv", "--device", "cpu", *arguments])


@pytest.fixture
def two_clips():
    write_clip("a.mkv", noise())
    write_clip("b.mkv", noise(seed=1))


@pytest.fixture
def two_folders():
    for number, name in enumerate(["cat-0.mkv", "dog-0.npy", "frames-0"]):
        write_clip(Path("a.mkv") / name, noise(seed=number))
        write_clip(Path("b.mkv") / name, noise(seed=10 + number))


# ----------------------------------------------------------------------------------------------------- it works


def test_two_clips(two_clips, capsys):
    assert run() == 0
    expected = compare_clips("a.mkv", "b.mkv")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["frames", "size", "PSNR", "dB", "SSIM", "LPIPS", "worst", "frame"]
    numbers = [f"{expected.psnr:.2f}", f"{expected.ssim:.4f}"]
    assert lines[1].split()[:7] == ["b.mkv", "4", "40", "x", "32", *numbers]
    assert lines[1].endswith(f"{expected.worst.psnr:.2f} dB at {expected.worst.index}")
    assert not any(line.startswith(("mean", "worst")) for line in lines)


def test_lpips_is_na_and_says_why(two_clips, capsys):
    run()
    out = capsys.readouterr().out
    assert "  n/a  " in out
    assert "LPIPS n/a: AlexNet's weights could not be fetched (HF_HUB_OFFLINE is set): give https://" in out


def test_lpips_with_a_backbone(two_clips, backbone, capsys):
    assert run("--lpips_backbone", backbone, "--json", "out.json") == 0
    assert "n/a" not in capsys.readouterr().out
    data = json.loads(Path("out.json").read_text())
    assert data["lpips_backbone"] == "alexnet.pth"
    assert data["pairs"][0]["lpips"] > 0
    assert len(data["pairs"][0]["per_frame"]["lpips"]) == 4


def test_no_lpips(two_clips, backbone, capsys):
    assert run("--no_lpips") == 0
    assert "LPIPS n/a: --no-lpips" in capsys.readouterr().out


def test_frames_too_small_for_lpips(backbone, capsys):
    write_clip("a.mkv", noise(height=20))
    write_clip("b.mkv", noise(height=20, seed=1))
    assert run("--lpips_backbone", backbone) == 0
    assert "LPIPS n/a: frames of 40 x 20 are too small" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_are_named_in_what_comes_out(two_clips, capsys, protocol):
    assert run("--protocol", protocol, "--json", "out.json") == 0
    assert f"protocol {protocol}: {PROTOCOLS[protocol].description}" in capsys.readouterr().out
    data = json.loads(Path("out.json").read_text())
    assert data["protocol"] == data["pairs"][0]["protocol"] == protocol
    assert data["pairs"][0]["psnr"] == compare_clips("a.mkv", "b.mkv", protocol=protocol).psnr


def test_identical_clips(capsys):
    write_clip("a.mkv", noise())
    write_clip("b.mkv", noise())
    assert run("--json", "out.json") == 0
    out = capsys.readouterr().out
    assert " inf " in out
    assert "4 of 4 frames are identical" in out
    data = json.loads(Path("out.json").read_text())
    assert data["pairs"][0]["identical"] is True
    assert data["pairs"][0]["psnr"] is data["mean"]["psnr"] is data["worst"]["psnr"]["value"] is None
    assert data["identical_pairs"] == 1


def test_identical_is_said_only_of_all_that_is_stored(tmp_path, capsys):
    """Two 10-bit files of equal first 8 bits."""
    frames = noise()
    for name in ("a.mkv", "b.mkv"):
        with av.open(str(tmp_path / name), "w") as output:
            stream = output.add_stream("ffv1", rate=8)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "gbrp10le"
            for frame in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="gbrp10le")))
            output.mux(stream.encode(None))
    found = tmp_path / "found.json"
    assert main([str(tmp_path / "a.mkv"), str(tmp_path / "b.mkv"), "--json", str(found)]) == 0
    said = capsys.readouterr().out
    assert "frames are identical to the original's in the 8 bits a channel that are read" in said
    assert "it has 10 bits a channel, of which 8 are read" in said
    assert json.loads(found.read_text())["pairs"][0]["identical"] is False


def test_lossy_input_is_said_aloud(two_clips, capsys):
    run()
    assert "WARNING" not in capsys.readouterr().out
    write_clip("c.mp4", noise())
    assert main(["--original_video", "a.mkv", "--generated_video", "c.mp4", "--json", "out.json"]) == 0
    assert (
        "WARNING: Lossy input: c.mp4 (h264 yuv420p): the codec's own error is in these numbers. Compare"
        in capsys.readouterr().out
    )
    assert "c.mp4" in json.loads(Path("out.json").read_text())["pairs"][0]["lossy"]


def test_two_folders(two_folders, capsys):
    assert run("--json", "out.json") == 0
    names = ["cat-0.mkv", "dog-0.npy", "frames-0"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == [*names, "mean", "worst"]
    data = json.loads(Path("out.json").read_text())
    assert [pair["name"] for pair in data["pairs"]] == names
    assert [pair["original"] for pair in data["pairs"]] == [str(Path("a.mkv") / name) for name in names]
    for metric in ("psnr", "ssim"):
        values = [pair[metric] for pair in data["pairs"]]
        assert data["mean"][metric] == pytest.approx(sum(values) / 3)
        assert data["worst"][metric] == {"name": names[values.index(min(values))], "value": min(values)}
    assert data["mean"]["lpips"] is data["worst"]["lpips"] is None


def test_an_identical_pair_does_not_poison_the_mean(two_folders, capsys):
    write_clip("b.mkv/cat-0.mkv", noise(seed=0))
    assert run("--json", "out.json") == 0
    assert "not in the mean PSNR over pairs: 1 of 3" in capsys.readouterr().out
    data = json.loads(Path("out.json").read_text())
    values = [pair["psnr"] for pair in data["pairs"]]
    assert values[0] is None
    assert data["mean"]["psnr"] == pytest.approx(sum(values[1:]) / 2)
    assert data["identical_pairs"] == 1


def test_the_worst_lpips_is_the_largest(two_folders, backbone):
    write_clip("b.mkv/cat-0.mkv", noise(seed=0))
    assert run("--json", "out.json", "--lpips_backbone", backbone) == 0
    data = json.loads(Path("out.json").read_text())
    values = [pair["lpips"] for pair in data["pairs"]]
    assert values[0] == 0
    assert data["worst"]["lpips"]["value"] == max(values) > 0


def test_a_folder_of_png_frames_is_one_clip(capsys):
    write_clip("frames", noise())
    write_clip("b.mkv", noise(seed=1))
    assert main(["--original_video", "frames", "--generated_video", "b.mkv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["b.mkv", "4"]


def test_json_has_the_documented_keys(two_clips):
    assert run("--json", "out.json") == 0
    data = json.loads(Path("out.json").read_text())
    assert (data["format"], data["version"], data["device"]) == ("stepcache.comparison", 1, "cpu")
    assert set(data) == {
        *("format", "version", "protocol", "protocol_description", "device", "lpips_backbone", "lpips_note"),
        *("mean", "worst", "identical_pairs", "pairs"),
    }
    (pair,) = data["pairs"]
    assert set(pair) == {
        *("name", "original", "generated", "protocol", "frames", "height", "width", "psnr", "ssim", "lpips"),
        *("lpips_note", "psnr_whole_clip", "identical", "identical_frames", "worst_frame", "lossy", "per_frame"),
    }
    assert set(pair["worst_frame"]) == {"index", "psnr", "ssim", "lpips"}
    assert set(data["mean"]) == set(data["worst"]) == {"psnr", "ssim", "lpips"}
    assert {name: len(values) for name, values in pair["per_frame"].items() if values} == {"psnr": 4, "ssim": 4}


def test_progress_goes_to_stderr(two_folders, capsys):
    run()
    captured = capsys.readouterr()
    assert "pair" in captured.err
    assert "pair/s" not in captured.out


# --------------------------------------------------------------------------------------------------- bad input


def fails(capsys, *arguments):
    """Run, expect code 2 and one sentence on stderr, and nothing else; return the sentence."""
    before = sorted(Path().rglob("*"))
    assert main([*arguments, "--json", "out.json"]) == 2
    captured = capsys.readouterr()
    error = captured.err.split("\r")[-1]  # what a progress bar wrote before is wiped
    assert captured.out == ""
    assert error.startswith("stepcache compare: error: ")
    assert error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return error


def paths(a="a.mkv", b="b.mkv"):
    return ["--original_video", a, "--generated_video", b]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (noise(7), noise(8), "a.mkv has 7 frames but b.mkv has 8; generate both with the same number of frames"),
        (noise(1), noise(8), "a.mkv has 1 frame but b.mkv has 8"),
        (noise(), noise(width=48), "a.mkv is 40 x 32 but b.mkv is 48 x 32; generate both at the same size"),
        (noise(height=10), noise(height=10), "too small for SSIM"),
    ],
)
def test_clips_that_do_not_match(capsys, first, second, message):
    write_clip("a.mkv", first)
    write_clip("b.mkv", second)
    assert message in fails(capsys, *paths())


def test_missing_clip(two_clips, capsys):
    assert "nothing.mp4 does not exist" in fails(capsys, *paths("nothing.mp4"))


def test_empty_clip(two_clips, capsys):
    Path("c.mp4").touch()
    assert "c.mp4 is empty (0 bytes)" in fails(capsys, *paths(b="c.mp4"))


def test_unreadable_clip(two_clips, capsys):
    Path("c.mp4").write_text("<html>404</html>" * 99)
    assert "c.mp4 cannot be read as a video" in fails(capsys, *paths(b="c.mp4"))


def test_clip_that_breaks_off(two_clips, capsys):
    write_clip("c", noise())
    Path("c/00002.png").write_bytes(b"")
    assert "00002.png cannot be read as a PNG" in fails(capsys, *paths(b="c"))


def test_a_clip_without_a_partner(two_folders, capsys):
    Path("b.mkv/cat-0.mkv").unlink()
    error = fails(capsys, *paths())
    assert f"No clip of the same name in the other folder for {Path('a.mkv/cat-0.mkv')}; add or remove" in error


def test_many_clips_without_a_partner_are_not_all_listed(two_folders, capsys):
    for number in range(20):
        write_clip(f"b.mkv/new-{number}.npy", noise())
    assert "and 15 more" in fails(capsys, *paths())


def test_a_folder_beside_a_clip(two_folders, capsys):
    write_clip("c.mkv", noise())
    assert "a.mkv is a folder of clips but c.mkv is one clip" in fails(capsys, *paths(b="c.mkv"))
    assert "b.mkv is a folder of clips but c.mkv is one clip" in fails(capsys, *paths(a="c.mkv"))


def test_a_folder_of_both_clips_and_frames(two_folders, capsys):
    write_clip("frames", noise())
    Path("frames/00000.png").rename("a.mkv/sheet.png")
    assert "PNG images (sheet.png, ...) beside clips (cat-0.mkv, ...)" in fails(capsys, *paths())


def test_a_folder_of_nothing(two_clips, capsys):
    Path("c").mkdir()
    assert "c holds neither clips nor PNG frames" in fails(capsys, *paths(b="c"))


def test_unusable_device(two_clips, capsys):
    for device in ("warp", "cuda:99"):
        assert f"--device {device} cannot be used" in fails(capsys, *paths(), "--device", device)


def test_bad_backbone(two_clips, capsys):
    Path("weights.pth").write_text("not weights")
    assert "weights.pth cannot be read as a checkpoint" in fails(capsys, *paths(), "--lpips_backbone", "weights.pth")
    assert "nothing.pth does not exist" in fails(capsys, *paths(), "--lpips_backbone", "nothing.pth")


def test_json_into_a_folder_fails_before_the_work(two_clips, capsys):
    Path("results").mkdir()
    assert main([*paths("nothing.mkv"), "--json", "results"]) == 2
    assert "'results' is a folder; give the name of a file" in capsys.readouterr().err


def test_a_failure_keeps_the_older_json(two_clips, capsys):
    Path("out.json").write_text("precious")
    fails(capsys, *paths(b="nothing.mkv"))
    assert Path("out.json").read_text() == "precious"


def test_json_that_cannot_be_written_fails_before_the_work(two_clips, capsys):
    assert main([*paths("nothing.mkv"), "--json", "a.mkv/out.json"]) == 2
    assert "'a.mkv' is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "0 given; compare takes two clips or folders: `stepcache compare A B`"),
        (["--original_video", "a"], "1 given; compare takes two"),
        (["a", "b", "c"], "3 given; compare takes two"),
        (["a", "b", "--original_video", "c"], "the clips are given twice"),
    ],
)
def test_two_clips_given_one_way(arguments, says, capsys):
    assert says in fails(capsys, *arguments)


def test_a_wrong_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main([*paths(), "--protocol", "vbench"])
    assert caught.value.code == 2
    assert "stepcache compare: error: " in capsys.readouterr().err


def test_clips_may_be_given_by_place_and_flags_with_hyphens(two_clips, capsys):
    assert main([*paths(), "--no_lpips"]) == 0
    named = capsys.readouterr().out
    assert main([*paths()[1::2], "--no-lpips"]) == 0
    assert capsys.readouterr().out == named


def test_a_flag_without_effect(two_clips, capsys):
    error = fails(capsys, *paths(), "--no_lpips", "--lpips_backbone", "weights.pth")
    assert "--lpips-backbone has no effect here; it needs LPIPS (no --no-lpips)" in error


# ------------------------------------------------------------------------------------------------------- script


def test_the_script_runs_from_a_clone(two_clips):
    """In a fresh process, from another folder, with nothing on the path that the script does not put there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [sys.executable, str(ROOT / "tools" / "video_metrics.py")]
    done = subprocess.run([*script, *paths(), "--no_lpips"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "protocol reference" in done.stdout
