"""Decisions that depend on data are agreed between ranks before anyone acts: two real processes."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stepcache import EasyCache, StepCache, Trajectory

STEPS = 30


def _rank(rank, folder, agree):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    cache = StepCache(EasyCache(0.3, 3), group=dist.group.WORLD if agree else None)
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
            assert k == STEPS - 1 or cache._decider.error == 0
        decisions.append(call.compute)
    (folder / f"{rank}.json").write_text(json.dumps(decisions))
    dist.barrier()
    dist.destroy_process_group()


def decisions(folder, agree):
    mp.spawn(_rank, args=(folder, agree), nprocs=2)
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
