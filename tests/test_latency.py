"""The benchmark at true sizes: its structures are the released ones, it measures what it says, it refuses."""

import json

import latency
import pytest
import torch


@pytest.fixture
def run(tmp_path):
    """What a run writes."""

    def run(*flags):
        latency.main(["--out", str(tmp_path / "latency.json"), "--device", "cpu", *flags])
        return json.loads((tmp_path / "latency.json").read_text())

    return run


@pytest.mark.parametrize("name", latency.CASES)
def test_structures_have_the_released_numbers_of_parameters(name):
    case = latency.CASES[name]
    count, held = latency.weights(case, case.blocks, torch.bfloat16)
    assert count / 1e9 == pytest.approx(case.billions, rel=0.02)
    assert 2 <= held / count < 2.1, "what stays in float32 is little"


def test_a_run_on_the_cpu(run, capsys):
    found = run("--steps", "8", "--budget", "3", "--repeats", "2")
    assert found["about"]["repeats"] == 2
    assert found["not_fitting"] == {}
    (case,) = found["cases"]
    rows = {row["method"]: row for row in case["rows"]}
    assert list(rows) == list(latency.METHODS)
    assert [row["computed"] for row in rows.values()] == [8, 3, 3, 3]
    assert rows["uncached"]["speedup"] == {"median": 1, "min": 1, "max": 1}
    for row in case["rows"]:
        loop, faster, share = row["loop_seconds"], row["speedup"], row["percent_of_ideal"]
        assert 0 < loop["min"] <= loop["median"] <= loop["max"]
        assert 0 < faster["min"] <= faster["median"] <= faster["max"]
        assert share["median"] == pytest.approx(100 * faster["median"] / (8 / row["computed"]), rel=0.01)
    for method in ("uniform, output", "uniform, blocks", "hindsight"):
        row = rows[method]
        assert row["ms_per_computed_step"]["min"] > 0
        assert row["ms_per_skipped_step"]["min"] > 0
        assert row["cache_bytes"] > 0
    for method in ("uniform, output", "hindsight"):
        assert rows[method]["skipped_step_percent"]["median"] < 50
    said = capsys.readouterr().out
    assert "true sizes need a GPU" in said
    assert "| hindsight | 3 of 8 |" in said


def test_fewer_blocks_at_a_smaller_size_are_said(run, capsys, monkeypatch):
    """One of the real structures; two methods, for time's sake."""
    monkeypatch.setattr(latency, "METHODS", {name: latency.METHODS[name] for name in ("uncached", latency.BY_BLOCK)})
    flags = (
        "--cases",
        "wan-1.3b-480p",
        "--blocks",
        "1",
        "--shrink",
        "16",
        "--steps",
        "3",
        "--budget",
        "2",
        "--repeats",
        "1",
    )
    (case,) = run(*flags)["cases"]
    assert (case["blocks"], case["blocks_released"], case["true_size"]) == (1, 30, False)
    assert case["size"] == [32, 48, 81]
    assert "32 x 48 x 81 (shrunk), 1 of 30 blocks" in capsys.readouterr().out


@pytest.mark.parametrize(("room", "blocks"), [(0.5, 1), (1.5, 2), (99, 3)])
def test_as_many_blocks_as_fit(room, blocks, monkeypatch):
    """Beside what a run with one block took, on a card that is made up, there is room for so many more."""
    case, device, used = latency.CASES[latency.CPU_CASE], torch.device("cpu"), 10**6
    each = latency.weights(case, 3, torch.float32)[1] - latency.weights(case, 2, torch.float32)[1]
    free = (used + room * each) / latency.SHARE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: used)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    arguments = case.arguments(device, torch.float32, 1)
    assert latency.that_fit(case, arguments, device, torch.float32) == blocks


def test_a_method_that_a_model_has_not_is_said():
    case = latency.CASES["z-image-1024"]
    assert list(latency.methods(case)) == ["uncached", "uniform, output", "hindsight"]
    assert list(latency.methods(latency.CASES["flux-1024"])) == list(latency.METHODS)


def test_a_case_that_does_not_fit_is_said_and_the_others_go_on(run, capsys, monkeypatch):
    real = latency.once
    seen = []

    def once(pipe, *args, **kwargs):
        seen.append(pipe)
        if len(seen) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB. GPU 0 has none.")
        return real(pipe, *args, **kwargs)

    monkeypatch.setattr(latency, "once", once)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
    found = run("--cases", "tiny", "tiny", "--steps", "4", "--repeats", "1")
    assert [case["case"] for case in found["cases"]] == ["tiny"]
    (why,) = found["not_fitting"].values()
    assert why.startswith("0.0 GiB of weights with all blocks")
    assert why.endswith("Tried to allocate 12.00 GiB.")
    assert "tiny does not fit and is skipped: 0.0 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cases", "wan"], "case 'wan' is unknown; choose from wan-1.3b-480p"),
        (["--cases", "flux-1024"], "true sizes need a GPU"),
        (["--budget", "12"], "tiny cannot compute 12 of 12 steps; give a --budget from 2 to 11"),
        (["--steps", "0"], "--steps must be 1 or more, not 0"),
        (["--blocks", "4"], "--blocks 4 is more than tiny has (3)"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--out", "{folder}"], "is a folder; give the name of a file"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "measure", lambda *_: pytest.fail("something was built"))
    flags = [flag.format(folder=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        latency.main(["--out", str(tmp_path / "latency.json"), "--device", "cpu", *flags])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
