"""One video on two real processes: decisions agreed before anyone acts, diffusers' context parallelism, lost ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forkserver import free_port, on_ranks, torchrun

from stepcache import EasyCache, Hindsight, MagCache, Off, StepCache, TaylorSeer, TeaCache, Trajectory, Uniform
from stepcache.commands.main import main
from stepcache.fleet.ranks import Ranks, together
from stepcache.measure.generation import Request, generate
from stepcache.measure.pipelines import load_pipeline

STEPS = 30


def _rank(rank, folder, agree):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    cache = StepCache(EasyCache(0.3, 3), group=dist.group.WORLD if agree else None, rounds=True)
    cache.begin(Trajectory(STEPS))
    g = torch.Generator().manual_seed(rank)  # the ranks' own measures differ on purpose
    decisions = []
    x = torch.randn(1, 4, 2, 4, 4, generator=g)
    for k in range(STEPS):
        x = x + (0.02 + 0.1 * rank * (k % 3)) * torch.randn(x.shape, generator=g)
        call = cache.enter("cond", x)
        if call.compute:
            cache.keep(call, x, torch.sin(x))
        else:
            cache.predict(call, x)
        if call.compute:  # also where this rank alone would have reused
            assert k == STEPS - 1 or cache.strategy.error == 0
        decisions.append(call.compute)
    (folder / f"{rank}.json").write_text(json.dumps(decisions))
    dist.barrier()
    dist.destroy_process_group()


def decisions(folder, agree):
    on_ranks(_rank, folder, agree)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_ranks_that_measure_differently_decide_alike(tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    a, b = decisions(tmp_path / "alone", agree=False)
    assert a != b
    c, d = decisions(tmp_path / "together", agree=True)
    assert c == d
    assert not all(c)


# ------------------------------------------------------------------------------------------- context parallelism

REQUEST = Request("a red circle", steps=12, guidance=4.0, height=64, width=64, num_frames=5)
CONSTANT = (0.0, 0.0, 0.0, 0.0, 0.1)
RATIOS = {"cond": (1.0, *[0.97] * 11), "uncond": (1.0, *[0.97] * 11)}


def policies():
    from stepcache import Ratios

    return {
        "uncached": Off(),
        "uniform": Uniform(6),
        "hindsight": Hindsight(6),
        "taylorseer": TaylorSeer(3, 1),
        "magcache": MagCache(0.1, 2, 0.2, ratios=Ratios(12, RATIOS)),
        "easycache": EasyCache(0.3, 3),
        "teacache": TeaCache(0.25, coefficients=CONSTANT),
    }


def contrary(policy, rank):
    """The same policy, whose measure says the opposite on the second rank."""
    original = policy.begin

    def begin(run):
        strategy = original(run)
        wants = strategy.wants
        if rank:
            strategy.wants = lambda step, x: not wants(step, x)
        return strategy

    object.__setattr__(policy, "begin", begin)
    return policy


def _video(rank, model, folder, forced):
    with together(60) as mine:
        pipe = load_pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        mine.split(pipe, "ulysses", REQUEST)
        for name, policy in policies().items():
            if forced and name not in ("easycache", "teacache"):
                continue
            frames, summary = generate(pipe, REQUEST, contrary(policy, rank) if forced else policy, group=mine.group)
            np.save(folder / f"{name}-{rank}.npy", frames)
            (folder / f"{name}-{rank}.json").write_text(json.dumps(summary.computed))


def videos(model, folder, forced=False):
    folder.mkdir()
    on_ranks(_video, model, folder, forced)

    def read(name):
        return [
            (np.load(folder / f"{name}-{rank}.npy"), tuple(json.loads((folder / f"{name}-{rank}.json").read_text())))
            for rank in (0, 1)
        ]

    return read


@pytest.mark.slow
def test_every_policy_on_two_ranks_makes_the_clip_of_one(model, tmp_path):
    read = videos(model, tmp_path / "two")
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    for name, policy in policies().items():
        frames, summary = generate(pipe, REQUEST, policy)
        for there, computed in read(name):
            assert computed == summary.computed, name
            assert np.abs(there.astype(int) - frames.astype(int)).max() <= 1, name
        assert name == "uncached" or len(summary.computed) < REQUEST.steps


@pytest.mark.slow
def test_ranks_forced_to_disagree_neither_wait_nor_diverge(model, tmp_path):
    read = videos(model, tmp_path / "forced", forced=True)
    for name in ("easycache", "teacache"):
        (a, computed), (b, also) = read(name)
        assert computed == also, name
        assert len(computed) == REQUEST.steps  # one of the two always wants to compute
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1, name


def command(model, output, *flags):
    generate = ["generate", "--model", model, "--prompt", "a red circle", "--output", str(output)]
    sizes = ["--height", "64", "--width", "64", "--num_frames", "5"]
    return [*generate, *sizes, "--device", "cpu", *flags]


@pytest.mark.slow
def test_the_command_under_torchrun(model, tmp_path, capsys):
    flags = ("--steps", "12", "--policy", "easycache:0.3,ret_steps=3")
    assert main(command(model, tmp_path / "one.npy", *flags)) == 0
    assert capsys.readouterr().out.count("wrote") == 1
    run = [*torchrun(sys.executable, 2), "-m", "stepcache", *command(model, tmp_path / "two.npy", *flags)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    one, two = (np.load(tmp_path / f"{name}.npy").astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1
    records = [json.loads((tmp_path / f"{name}.json").read_text())["result"]["computed"] for name in ("one", "two")]
    assert records[0] == records[1]


@pytest.mark.slow
def test_a_rank_that_dies_is_an_error_and_no_hang(model, tmp_path):
    port = str(free_port())
    processes = []
    for rank in (0, 1):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        run = [
            sys.executable,
            "-m",
            "stepcache",
            *command(model, tmp_path / "x.npy", "--steps", "4000", "--rank_timeout", "20"),
        ]
        processes.append(
            subprocess.Popen(
                run, env={**os.environ, **ranks}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    said = ""
    while "/4000" not in said:  # the first rank's progress bar: the loop is under way
        more = processes[0].stderr.read(1)
        assert more, said
        said += more
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    rest = processes[0].communicate(timeout=600)[1]
    assert processes[0].returncode == 2
    assert time.monotonic() - began < 40
    assert "rank 0 of 2 failed, or another was lost" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "x.npy").exists()


def test_what_cannot_be_divided():
    class WanPipeline(SimpleNamespace):
        vae_scale_factor_temporal, vae_scale_factor_spatial = 4, 8

    config = SimpleNamespace(num_attention_heads=2, patch_size=(1, 2, 2))
    pipe = WanPipeline(transformer=SimpleNamespace(config=config))
    odd = Request("", num_frames=9, height=48, width=16)  # 3 x 3 x 1 tokens
    with pytest.raises(ValueError, match="2 attention heads cannot be divided over 3 ranks"):
        Ranks(0, 3).split(pipe, "ulysses", odd)
    with pytest.raises(ValueError, match="9 tokens cannot be divided over 2 ranks"):
        Ranks(0, 2).split(pipe, "ring", odd)
    Ranks().split(None, "ulysses", odd)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"), together(timeout):
            pass
