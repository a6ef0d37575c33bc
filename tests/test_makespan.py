"""When units start and end on a target: nothing overlaps beyond what there is, and what can start does."""

from __future__ import annotations

import random

from scaling_ray.sweep.capacity import Capacity
from scaling_ray.sweep.makespan import Demand, Job, Span, schedule

ONE = Demand(1.0, 0.0)


def most_at_once(jobs: list[Job], spans: list[Span]) -> Demand:
    """The most that runs at the same time, of each resource."""
    most = [0.0, 0.0]
    for moment in {span.start for span in spans}:
        running = [job for job, span in zip(jobs, spans, strict=True) if span.start <= moment < span.end]
        most = [max(most[k], sum(job.demand[k] for job in running)) for k in (0, 1)]
    return Demand(*most)


def test_the_longest_of_what_is_ready_starts_first() -> None:
    spans = schedule([Job(1.0, ONE), Job(3.0, ONE), Job(2.0, ONE)], Capacity.local(1))
    assert spans == [Span(5.0, 6.0), Span(0.0, 3.0), Span(3.0, 5.0)]
    assert max(span.end for span in schedule([Job(1.0, ONE)] * 4, Capacity.local(2))) == 2.0


def test_a_job_waits_for_what_it_needs_and_for_nothing_else() -> None:
    jobs = [Job(5.0, ONE), Job(1.0, ONE), Job(4.0, ONE, needs=(1,)), Job(9.0, ONE, needs=(0, 0))]
    spans = schedule(jobs, Capacity.local(2))
    assert spans[2].start == 1.0 and spans[3] == Span(5.0, 14.0)


def test_shares_of_a_gpu_run_together_and_whole_ones_alone() -> None:
    share, whole = Demand(1.0, 0.25), Demand(1.0, 1.0)
    spans = schedule([Job(1.0, share)] * 4 + [Job(2.0, whole)], Capacity.local(8, 1))
    assert spans[4] == Span(0.0, 2.0) and {span.start for span in spans[:4]} == {2.0}


def test_what_is_larger_than_the_target_runs_alone() -> None:
    spans = schedule([Job(1.0, Demand(4.0, 0.0)), Job(2.0, ONE)], Capacity.local(2))
    assert sorted((span.start, span.end) for span in spans) == [(0.0, 2.0), (2.0, 3.0)]


def test_no_draw_overcommits_or_idles() -> None:
    draw = random.Random(0)
    for _ in range(50):
        jobs = [
            Job(
                draw.uniform(1, 5),
                Demand(float(draw.randint(1, 3)), draw.choice((0.0, 0.25, 1.0))),
                tuple(draw.sample(range(number), min(number, draw.choice((0, 0, 2))))),
            )
            for number in range(40)
        ]
        capacity = Capacity.local(8, 2)
        spans = schedule(jobs, capacity)
        most = most_at_once(jobs, spans)
        assert most.cpus <= 8 and most.gpus <= 2 + 1e-6
        for job, span in zip(jobs, spans, strict=True):
            assert all(spans[needed].end <= span.start for needed in job.needs)
        work = sum(job.seconds * job.demand.cpus for job in jobs)
        assert max(span.end for span in spans) >= work / 8
        assert min(span.start for span in spans) == 0.0
