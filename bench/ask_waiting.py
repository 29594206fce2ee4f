"""How long does one worker in one process take for 1,000 jobs that wait 200 ms, if it
runs 50 or 200 at once?

Coroutines that await asyncio.sleep(), and functions that call time.sleep(), each with
the workers that can run many of them at once. The jobs are queued before the worker
starts. The time is that from the begin of the first job to the end of the last one, as
a ratio to the ideal: 1000 / 50 * 0.2 s, or 1000 / 200 * 0.2 s. It is a failure if a job
runs more than once, or if more jobs run at once than asked. Memory is that of all
processes of the worker, measured when half of the jobs have ended; memory that they
share counts once (PSS).
"""

from __future__ import annotations

import time

from ask_idle import memory
from competitors import PATIENCE, Failure
from jobs import WAIT

WHEN = "rounds"
COUNT = 1000
AT_ONCE = [50, 200]
JOBS = {"coroutines": "wait_coroutine", "functions": "wait"}


def measure(deployment):
    figures = {}
    for label, kind in deployment.competitor.concurrent_kinds():
        for at_once in AT_ONCE:
            figures |= wait(deployment, label, kind, at_once)
    return figures


def wait(deployment, label, kind, at_once):
    """Queue jobs that wait, start a worker, return the figures."""
    deployment.clear()
    first, _ = deployment.enqueue(COUNT, "enqueue_many", JOBS[kind])
    deployment.work(label, at_once=at_once, warm_up=False)
    wait_for_half(deployment, first)
    kilobytes = sum(map(memory, deployment.processes()))
    deployment.wait_for_runs(first, COUNT)
    begin_times = list(deployment.times[first : first + COUNT])
    end_times = list(deployment.ends[first : first + COUNT])
    most = most_at_once(begin_times, end_times)
    if most > at_once:
        raise Failure(f"{most} jobs ran at once, not {at_once}")
    ideal = COUNT / at_once * WAIT
    seconds = max(end_times) - min(begin_times)
    return {
        (label, f"{kind}, {at_once} at once, to the ideal"): seconds / ideal,
        (label, f"{kind}, {at_once} at once, memory, MB"): kilobytes / 1000,
    }


def wait_for_half(deployment, first):
    """Wait until half of the jobs have ended, and others have begun."""
    deadline = time.monotonic() + PATIENCE
    runs = deployment.runs[first : first + COUNT]
    while bytes(runs).count(0) > COUNT / 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(WAIT / 2)


def most_at_once(begin_times, end_times):
    """Return the highest number of jobs that had begun and not yet ended."""
    changes = [(moment, 1) for moment in begin_times]
    changes += [(moment, -1) for moment in end_times]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
