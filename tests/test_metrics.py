"""PSNR, SSIM, LPIPS: against closed forms, scikit-image, and values taken once from the papers' own tools."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import math
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from stepcache.measure import lpips as lpips_module
from stepcache.measure import metrics
from stepcache.measure.lpips import LPIPS, find_lpips, float32_convolutions
from stepcache.measure.metrics import PROTOCOLS, compare_clips, mean_psnr, psnr, ssim
from stepcache.measure.video import Clip, array_clip, open_clip, write_clip

HEADS = Path(metrics.__file__).parent / "data" / "lpips_alex.json"
SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


def pair(frames=3, height=48, width=64):
    """Two clips from a formula, so that values computed elsewhere stay comparable."""
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    a = (3 * x + 5 * y + 40 * c + 7 * t + 60 * np.sin(x * y / 90 + c + t)) % 256
    b = np.clip(a + 12 * np.sin(x / 3 + 2 * y + 5 * c) * (1 + t), 0, 255)
    return a.astype(np.uint8), np.rint(b).astype(np.uint8)


def noise(frames=4, height=32, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def backbone():
    """AlexNet's convolutions with weights from a formula."""
    state = {}
    for index, shape in SHAPES.items():
        count, outputs = math.prod(shape), shape[0]
        n = np.arange(count)
        weight = np.sin(n * (0.7 + 0.01 * index) + np.sin(n * 0.013)) * (2 * outputs / count) ** 0.5
        state[f"features.{index}.weight"] = torch.tensor(weight.reshape(shape), dtype=torch.float32)
        state[f"features.{index}.bias"] = torch.tensor(np.cos(np.arange(outputs)) * 0.1, dtype=torch.float32)
    return state


@pytest.fixture(scope="module")
def lpips():
    return LPIPS(backbone(), "a formula")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch.hub folder."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder.parent))
    return folder


def pictures(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


# --------------------------------------------------------------------------------------------------------- PSNR


@pytest.mark.parametrize(("difference", "expected"), [(1, 48.1308), (16, 24.0484), (40, 16.0896), (255, 0.0)])
def test_psnr_of_a_constant_difference(difference, expected):
    """16 and 40 are where a subtraction in uint8 wraps around."""
    a = np.zeros((2, 16, 16, 3), np.uint8)
    b = np.full_like(a, difference)
    for x, y in ((a, b), (b, a)):
        assert psnr(x, y).tolist() == pytest.approx([expected] * 2, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_psnr_is_its_formula_and_symmetric(seed, frames, height, width):
    a, b = noise(frames, height, width, seed), noise(frames, height, width, seed + 1)
    expected = [-10 * math.log10(np.mean((x / 255 - y / 255) ** 2)) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-10)
    assert torch.equal(psnr(a, b), psnr(b, a))
    assert psnr(a / 255.0, b).tolist() == pytest.approx(expected, abs=1e-10)
    assert torch.equal(psnr(torch.from_numpy(a), torch.from_numpy(b)), psnr(a, b))


def test_identical_frames_have_infinite_psnr():
    a, b = pair()
    b[1] = a[1]
    assert [math.isinf(value) for value in psnr(a, b).tolist()] == [False, True, False]


@pytest.mark.parametrize(
    ("values", "mean"), [([20.0, 30.0], 25.0), ([20.0, math.inf], 20.0), ([math.inf, math.inf], math.inf)]
)
def test_mean_psnr_leaves_out_what_is_infinite(values, mean):
    assert mean_psnr(values) == mean


# --------------------------------------------------------------------------------------------------------- SSIM


def wang2004(a, b):
    """scikit-image with the settings that make it the reference."""
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return [
        structural_similarity(x, y, data_range=1, channel_axis=-1, **options)
        for x, y in zip(a / 255, b / 255, strict=True)
    ]


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 64), (48, 64), (37, 53), (120, 200)])
def test_ssim_is_scikit_images(height, width):
    for a, b in (pair(2, height, width), (noise(2, height, width), noise(2, height, width, seed=1))):
        assert ssim(a, b).tolist() == pytest.approx(wang2004(a, b), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(11, 40), st.integers(11, 40), st.integers(1, 255))
def test_ssim_is_scikit_images_everywhere(seed, height, width, strength):
    a = noise(1, height, width, seed)
    change = np.random.default_rng(seed + 1).integers(-strength, strength + 1, a.shape)
    b = (a.astype(int) + change).clip(0, 255).astype(np.uint8)
    assert ssim(a, b).tolist() == pytest.approx(wang2004(a, b), abs=1e-9)
    assert torch.equal(ssim(a, b), ssim(b, a))


def test_reflected_ssim_is_scikit_images_on_reflected_frames():
    a, b = pair()
    edges = ((0, 0), (5, 5), (5, 5), (0, 0))
    expected = wang2004(np.pad(a, edges, mode="reflect"), np.pad(b, edges, mode="reflect"))
    assert ssim(a, b, reflect=True).tolist() == pytest.approx(expected, abs=1e-9)


def test_reflected_ssim_is_torchmetrics():
    """Values of torchmetrics 1.9.0 `structural_similarity_index_measure(..., data_range=1.0)` in float64."""
    expected = [0.9270552578681711, 0.8042383737743952, 0.7172830676872191]
    assert ssim(*pair(), reflect=True).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_flat_frames():
    """Where float32 would lose the fourth digit to cancellation; variances are zero, so only the means count."""
    a, b = np.full((1, 16, 16, 3), 0.9), np.full((1, 16, 16, 3), 0.8)
    expected = (2 * 0.9 * 0.8 + 1e-4) / (0.9**2 + 0.8**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_identical_frames_is_exactly_one():
    assert ssim(noise(), noise()).tolist() == [1.0] * 4


@pytest.mark.parametrize(("reflect", "smallest"), [(False, 11), (True, 6)])
def test_ssim_of_frames_smaller_than_its_window(reflect, smallest):
    ssim(noise(1, smallest, 20), noise(1, smallest, 20), reflect=reflect)
    small = noise(1, smallest - 1, 20)
    with pytest.raises(
        ValueError, match=f"20 x {smallest - 1} are too small for SSIM; it needs {smallest} x {smallest}"
    ):
        ssim(small, small, reflect=reflect)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_batches_do_not_change_anything(metric, monkeypatch):
    a, b = pair(7)
    whole = metric(a, b)
    monkeypatch.setattr(metrics, "BATCH_PIXELS", 2 * 48 * 64)
    assert torch.allclose(metric(a, b), whole, rtol=1e-13, atol=0)


def test_inputs_stay_as_they_are():
    a, b = (torch.from_numpy(x) / 255.0 for x in pair())
    before = a.clone(), b.clone()
    psnr(a, b), ssim(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (noise(1), noise(4), "cannot be compared"),
        (noise(), noise(height=33), "cannot be compared"),
        (noise()[0], noise()[0], r"shape \[32, 40, 3\]; expected \[T, H, W, 3\]"),
        (noise().transpose(0, 3, 1, 2), noise().transpose(0, 3, 1, 2), r"expected \[T, H, W, 3\]"),
        (noise(0), noise(0), r"expected \[T, H, W, 3\]"),
        (noise().astype(int), noise(), "expected uint8, or float"),
        (noise() * 1.0, noise(), r"floats from 0 to 255; expected \[0, 1\]"),
        (noise() / 127.5 - 1, noise(), r"floats from -1 to 1; expected \[0, 1\]"),
        (noise() * np.nan, noise(), r"floats from nan to nan; expected \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_arrays_that_cannot_be_measured(metric, a, b, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b)


# -------------------------------------------------------------------------------------------------------- LPIPS


def lpips_by_hand(state, a, b, spatial):
    """The definition, written out layer by layer, in float64."""
    mean = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    heads = json.loads(HEADS.read_text())["heads"]
    state = {name: tensor.double() for name, tensor in state.items()}

    def convolved(x, index, stride, padding):
        return F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], stride, padding).clamp(
            min=0
        )

    def features(x):
        first = convolved(((2 * x.double() - 1) - mean) / std, 0, 4, 2)
        second = convolved(F.max_pool2d(first, 3, 2), 3, 1, 2)
        third = convolved(F.max_pool2d(second, 3, 2), 6, 1, 1)
        fourth = convolved(third, 8, 1, 1)
        return first, second, third, fourth, convolved(fourth, 10, 1, 1)

    total = torch.zeros(len(a), dtype=torch.float64)
    for left, right, head in zip(features(a), features(b), heads, strict=True):
        unit_left, unit_right = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-10) for x in (left, right))
        distance = torch.einsum("nchw,c->nhw", (unit_left - unit_right) ** 2, torch.tensor(head, dtype=torch.float64))
        if spatial:
            distance = F.interpolate(distance[:, None], a.shape[-2:], mode="bilinear")[:, 0]
        total += distance.mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("spatial", [False, True])
def test_lpips_is_its_definition(lpips, spatial):
    a, b = (pictures(x) for x in pair(2, 49, 67))
    expected = lpips_by_hand(backbone(), a, b, spatial)
    assert torch.allclose(lpips(a, b, spatial=spatial).double(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("spatial", "expected"),
    [
        (False, [0.0042308419942855835, 0.009870372712612152, 0.01601160503923893]),
        (True, [0.004229581914842129, 0.009871343150734901, 0.01600802317261696]),
    ],
)
def test_lpips_is_the_lpips_packages(lpips, spatial, expected):
    """Values of lpips 0.1.4 (net="alex", version "0.1") with the same backbone."""
    a, b = (pictures(x) for x in pair())
    assert lpips(a, b, spatial=spatial).tolist() == pytest.approx(expected, rel=1e-4)


def test_lpips_of_equal_pictures_is_zero_and_it_is_symmetric(lpips):
    a, b = (pictures(x) for x in pair())
    assert lpips(a, a).tolist() == [0.0] * 3
    assert torch.equal(lpips(a, b), lpips(b, a))


def test_lpips_needs_31_pixels(lpips):
    smallest = torch.zeros(1, 3, 31, 31)
    assert lpips(smallest, smallest).tolist() == [0.0]
    with pytest.raises(RuntimeError):
        lpips(smallest[..., :30], smallest[..., :30])


def test_heads_are_those_of_the_paper():
    data = json.loads(HEADS.read_text())
    assert [len(head) for head in data["heads"]] == [64, 192, 384, 256, 256]
    assert all(weight >= 0 for head in data["heads"] for weight in head)
    assert "lpips 0.1.4" in data["source"]
    assert "Redistribution and use" in HEADS.with_suffix(".LICENSE").read_text()


def test_convolutions_are_float32_not_tf32():
    """No GPU here: what can be checked is that the setting is exact inside, and outside what it was."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    owner, name, values = (
        (torch.backends.cudnn, "allow_tf32", (True, False))
        if conv is None
        else (conv, "fp32_precision", ("tf32", "ieee"))
    )
    before = getattr(owner, name)
    try:
        for value in values:
            setattr(owner, name, value)
            with float32_convolutions():
                assert getattr(owner, name) == values[1]
            assert getattr(owner, name) == value
    finally:
        setattr(owner, name, before)


def full_checkpoint():
    return {**backbone(), "classifier.1.weight": torch.zeros(4, 4)}


def features_only():
    return {name.removeprefix("features."): tensor for name, tensor in backbone().items()}


@pytest.mark.parametrize("state", [full_checkpoint, features_only])
@pytest.mark.parametrize("name", ["alexnet.pth", "alexnet.safetensors"])
def test_backbone_from_a_file(tmp_path, lpips, state, name):
    if name.endswith("safetensors"):
        from safetensors.torch import save_file

        save_file(state(), tmp_path / name)
    else:
        torch.save(state(), tmp_path / name)
    found, source = find_lpips(tmp_path / name)
    a, b = (pictures(x) for x in pair())
    assert source == name
    assert torch.equal(found(a, b), lpips(a, b))


def test_backbone_from_the_hub_folder(hub, lpips):
    torch.save(full_checkpoint(), hub / "alexnet-owt-7be5be79.pth")
    found, source = find_lpips()
    assert source == "alexnet-owt-7be5be79.pth"
    a, b = (pictures(x) for x in pair())
    assert torch.equal(found(a, b), lpips(a, b))


def test_no_backbone_is_none_and_why(hub):
    found, why = find_lpips()
    assert found is None
    assert "no AlexNet weights" in why
    assert "--lpips-backbone" in why


@pytest.fixture
def served(hub, tmp_path, monkeypatch):
    """A server on this machine that has the checkpoint; yields its folder and the name of the file."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(full_checkpoint(), folder / "whole.pth")
    digest = hashlib.sha256((folder / "whole.pth").read_bytes()).hexdigest()[:8]
    name = f"alexnet-owt-{digest}.pth"
    (folder / "whole.pth").rename(folder / name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(lpips_module, "CHECKPOINT_URL", f"http://127.0.0.1:{server.server_port}/{name}")
        yield folder, name
        server.shutdown()


def test_the_backbone_is_fetched_once_if_that_is_asked_for(hub, served, lpips, capsys):
    assert find_lpips()[0] is None
    found, source = find_lpips(fetch=True)
    assert source == served[1]
    said = capsys.readouterr().err
    assert "fetching AlexNet's weights for LPIPS, once:" in said
    assert "100%" in said
    a, b = (pictures(x) for x in pair())
    assert torch.equal(found(a, b), lpips(a, b))
    (served[0] / served[1]).unlink()
    assert find_lpips(fetch=True)[1] == served[1]
    assert capsys.readouterr().err == ""


def test_a_backbone_that_cannot_be_fetched(hub, served, monkeypatch):
    """Another file than expected, no such file, offline: one sentence, and nothing is left behind."""
    (served[0] / served[1]).write_bytes(b"another file")
    assert "invalid hash value" in find_lpips(fetch=True)[1]
    (served[0] / served[1]).unlink()
    assert "404" in find_lpips(fetch=True)[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    why = find_lpips(fetch=True)[1]
    assert "(HF_HUB_OFFLINE is set): give http" in why
    assert list(hub.iterdir()) == []


def test_a_broken_hub_file_is_none_and_why(hub):
    (hub / "alexnet-owt-7be5be79.pth").write_bytes(b"half a download")
    found, why = find_lpips()
    assert found is None
    assert "alexnet-owt-7be5be79.pth cannot be read as a checkpoint" in why


def test_a_named_backbone_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        find_lpips(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.zeros(2, 3)}, r"not torchvision's AlexNet: expected .* found fc.weight \[2, 3\]"),
        ({}, "found nothing"),
        ({**backbone(), "features.0.weight": torch.zeros(64, 3, 3, 3)}, r"found features.0.weight \[64, 3, 3, 3\]"),
        ([1, 2, 3], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        (np.float64, "cannot be read as a checkpoint"),  # a pickled object: weights_only refuses it
    ],
)
def test_a_named_backbone_that_is_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message) as caught:
        find_lpips(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- clips


def unannounced(frames):
    """A clip that does not know its length, as an mkv."""
    return replace(array_clip(frames, f"clip of {len(frames)}"), frames=None)


def test_compare_is_the_array_functions_frame_by_frame(lpips):
    a, b = pair()
    result = compare_clips(a, b, lpips=lpips)
    assert result.psnr_per_frame == tuple(psnr(a, b).tolist())
    assert result.ssim_per_frame == tuple(ssim(a, b).tolist())
    assert result.psnr == pytest.approx(psnr(a, b).mean().item(), abs=1e-12)
    assert result.ssim == pytest.approx(ssim(a, b).mean().item(), abs=1e-12)
    assert result.lpips_per_frame == pytest.approx(lpips(pictures(a), pictures(b)).tolist(), rel=1e-4)
    assert (result.protocol, result.frames, result.height, result.width) == ("reference", 3, 48, 64)
    assert (result.identical, result.identical_frames, result.lossy, result.lpips_note) == (False, 0, None, "")


def test_worst_frame_is_the_one_with_the_lowest_psnr(lpips):
    a, b = pair()
    result = compare_clips(a[::-1], b[::-1], lpips=lpips)
    assert result.worst.index == 0
    assert result.worst.psnr == min(result.psnr_per_frame)
    assert result.worst.ssim == result.ssim_per_frame[0]
    assert result.worst.lpips == result.lpips_per_frame[0]


def test_protocols_aggregate_as_their_scripts_do(lpips):
    """Three frames that differ and one that does not; values of the scripts of TeaCache and EasyCache themselves."""
    a, b = pair()
    a, b = np.concatenate([a, a[:1]]), np.concatenate([b, a[:1]])
    reference, teacache, easycache = (compare_clips(a, b, protocol=name, lpips=lpips) for name in PROTOCOLS)
    assert reference.psnr == pytest.approx(24.599771, abs=1e-5)  # the three
    assert teacache.psnr == pytest.approx(43.449828, abs=1e-5)  # the three and 100
    assert easycache.psnr == pytest.approx(24.423126, abs=1e-5)  # of the mean error
    assert reference.psnr_whole_clip == teacache.psnr_whole_clip == easycache.psnr
    assert (reference.psnr_per_frame[3], teacache.psnr_per_frame[3]) == (math.inf, 100.0)
    assert reference.ssim == teacache.ssim == pytest.approx((0.9306310818 + 0.8290255916 + 0.7607424324 + 1) / 4)
    assert easycache.ssim == pytest.approx(0.8621441748, abs=1e-9)
    assert teacache.lpips == easycache.lpips == pytest.approx((0.00422958 + 0.00987134 + 0.01600802) / 4, rel=1e-4)
    assert reference.lpips == pytest.approx((0.00423084 + 0.00987037 + 0.01601161) / 4, rel=1e-4)
    assert reference.lpips != teacache.lpips
    assert [r.identical_frames for r in (reference, teacache, easycache)] == [1, 1, 1]


def test_averages_differ_when_the_error_varies_over_time():
    """What makes the protocols incomparable: nine perfect-looking frames and a bad one."""
    a = np.zeros((10, 16, 16, 3), np.uint8)
    b = np.full_like(a, 1)
    b[9] = 128
    assert compare_clips(a, b).psnr > compare_clips(a, b, protocol="easycache").psnr + 20


@pytest.mark.parametrize(
    ("protocol", "expected"), [("reference", math.inf), ("teacache", 100.0), ("easycache", math.inf)]
)
def test_identical_clips(protocol, expected, lpips):
    result = compare_clips(noise(), noise(), protocol=protocol, lpips=lpips)
    assert (result.psnr, result.ssim, result.lpips) == (expected, 1.0, 0.0)
    assert (result.identical, result.identical_frames, result.worst.index) == (True, 4, 0)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["identical"] is True
    assert data["psnr_whole_clip"] is None
    assert data["psnr"] == (100.0 if protocol == "teacache" else None)


def test_one_identical_frame_does_not_poison_the_mean():
    a, b = pair()
    b[0] = a[0]
    result = compare_clips(a, b)
    assert result.psnr == pytest.approx(psnr(a[1:], b[1:]).mean().item(), abs=1e-12)
    assert (result.identical, result.identical_frames) == (False, 1)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["per_frame"]["psnr"][0] is None


@pytest.mark.parametrize("wrap", [array_clip, unannounced])
@pytest.mark.parametrize(("first", "second"), [(7, 8), (8, 7), (1, 5), (5, 1)])
def test_clips_of_different_length(wrap, first, second, monkeypatch):
    monkeypatch.setattr(metrics, "BATCH_PIXELS", 3 * 32 * 40)
    with pytest.raises(
        ValueError, match=f"has {first} frames? but .* has {second}; generate both with the same number"
    ):
        compare_clips(wrap(noise(first)), wrap(noise(second)))


def test_a_wrong_announcement_alone_is_no_mismatch():
    """Containers may announce frames that an edit list hides; what counts is what can be read."""
    announced = replace(array_clip(noise()), frames=9)
    assert compare_clips(announced, noise()).frames == 4


def test_clips_of_different_size():
    with pytest.raises(ValueError, match="is 40 x 32 but the second clip is 41 x 32; generate both at the same size"):
        compare_clips(noise(), noise(width=41))


def test_unknown_protocol():
    with pytest.raises(ValueError, match="choose one of reference, teacache, easycache"):
        compare_clips(noise(), noise(), protocol="vbench")


def test_frames_too_small_for_lpips_are_measured_without_it(lpips):
    result = compare_clips(noise(height=30), noise(height=30, seed=1), lpips=lpips)
    assert (result.lpips, result.lpips_per_frame, result.worst.lpips) == (None, None, None)
    assert result.lpips_note == "frames of 40 x 30 are too small; it needs 31 x 31"


def test_every_kind_of_clip_measures_the_same(tmp_path):
    a, b = pair()
    expected = compare_clips(a, b)
    for name in ("clip.mkv", "clip.npy", "clip"):
        write_clip(tmp_path / name, b)
        assert compare_clips(a, tmp_path / name) == expected
        assert compare_clips(torch.from_numpy(a), open_clip(tmp_path / name)) == expected
    assert compare_clips(a / 255.0, torch.from_numpy(b).to(torch.float64) / 255) == expected


def test_lossy_input_is_said(tmp_path):
    a, b = pair()
    write_clip(tmp_path / "b.mp4", b)
    note = compare_clips(a, tmp_path / "b.mp4").lossy
    assert "b.mp4 (h264 yuv420p)" in note
    assert "the first clip" not in note


def test_memory_is_bounded(monkeypatch):
    """However long the clips, no more than a batch of frames of each is alive."""
    monkeypatch.setattr(metrics, "BATCH_PIXELS", 4 * 32 * 40)
    alive, most = 0, 0

    def freed():
        nonlocal alive
        alive -= 1

    def read():
        nonlocal alive, most
        for number in range(60):
            frame = noise(1, seed=number)[0].copy()
            weakref.finalize(frame, freed)
            alive += 1
            most = max(most, alive)
            yield frame

    clips = [Clip(Path(name), 32, 40, None, None, "made up", False, read) for name in "ab"]
    assert compare_clips(*clips).frames == 60
    assert 2 * 4 <= most <= 2 * (4 + 2)


def test_batches_hold_at_least_one_frame_and_at_most_a_megapixel():
    assert metrics._batch_size(720, 1280) == 1
    assert metrics._batch_size(4320, 7680) == 1
    assert metrics._batch_size(480, 832) == 2
    assert metrics._batch_size(64, 64) == 256


def test_progress_counts_frames(capsys):
    compare_clips(noise(), noise(), progress=True)
    assert "/4 [" in capsys.readouterr().err
    compare_clips(noise(), noise())
    assert capsys.readouterr().err == ""
