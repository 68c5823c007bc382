"""The order of a benchmark's jobs: references first, everything once, whatever is lost on the way."""

import random

from hypothesis import given
from hypothesis import strategies as st

from stepcache.fleet.jobs import Alone, Job, Jobs, Outcome

METHODS = ("a", "b", "c")


def everything(pairs, methods=METHODS):
    found = []
    for i in range(pairs):
        pair = (i, f"prompt {i}", 0)
        found += [Job("reference", pair), *(Job("item", pair, m) for m in methods)]
    return found


def test_one_process_keeps_with_a_pair():
    done = []
    Alone(lambda job: Outcome()).run(
        Jobs(everything(2)), lambda job, _: done.append((job.task, job.pair[0], job.method))
    )
    assert done == [("reference", i, "") if m is None else ("item", i, m) for i in (0, 1) for m in (None, *METHODS)]


def test_a_reference_is_made_only_where_it_is_needed():
    pairs = [(i, "p", 0) for i in range(3)]
    jobs = Jobs([Job("item", pairs[0], "a"), Job("item", pairs[1], "a"), Job("reference", pairs[2])], there=[pairs[1]])
    taken = []
    while (job := jobs.take("w")) is not None:
        taken.append((job.task, job.pair[0]))
        jobs.settled(job)
    assert sorted(taken) == [("item", 0), ("item", 1), ("reference", 0), ("reference", 2)]
    assert not jobs


def test_workers_begin_new_pairs_before_they_help_with_others():
    jobs = Jobs(everything(2))
    first, second = jobs.take("x"), jobs.take("y")
    assert {first.pair[0], second.pair[0]} == {0, 1}
    assert jobs.take("z") is None  # nothing can begin before a reference is there
    jobs.settled(first)
    assert jobs.take("z") == Job("item", first.pair, "a")
    assert jobs.take("x") == Job("item", first.pair, "b")


def test_what_fails_with_its_reference():
    told = []

    def work(job):
        return Outcome("no luck" if job.task == "reference" and job.pair[0] == 0 else "")

    Alone(work).run(Jobs(everything(2)), lambda job, outcome: told.append((job.pair[0], job.method, outcome.error)))
    assert told[0] == (0, "", "no luck")
    assert told[1:4] == [(0, m, "the uncached run failed: no luck") for m in METHODS]
    assert [t[2] for t in told[4:]] == [""] * 4


def test_search_comes_first_and_retries_end():
    jobs = Jobs([*everything(1, ("a",)), Job("search", method="s")], retries=2)
    search = jobs.take("w")
    assert search.task == "search"
    assert [jobs.again(search), jobs.again(jobs.take("w")), jobs.again(jobs.take("w"))] == [True, True, False]
    jobs.settled(search, failed=True)
    reference = jobs.take("w")
    assert reference.task == "reference"
    assert jobs.take("v") is None
    assert jobs.again(reference)
    assert jobs.take("v") == reference


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000), st.floats(0, 0.5))
def test_everything_is_settled_once_in_a_good_order(pairs, workers, seed, loss):
    """Random workers, random ends, random losses."""
    rng = random.Random(seed)
    wanted = everything(pairs)
    jobs = Jobs(wanted, retries=10_000)
    busy, settled = {}, []
    while jobs:
        for worker in range(workers):
            if worker not in busy and (job := jobs.take(worker)) is not None:
                if job.follows:
                    assert Job("reference", job.pair) in settled
                busy[worker] = job
        worker = rng.choice(list(busy))  # there is always somebody at work: no deadlock
        job = busy.pop(worker)
        if rng.random() < loss:
            jobs.forget(worker)
            assert jobs.again(job)
        else:
            assert jobs.settled(job) == []
            settled.append(job)
    assert sorted(settled, key=repr) == sorted(wanted, key=repr)
    assert not busy
