"""Which jobs are measured, and how does the benchmark see that each one ran exactly
once?

Every job has a number. When a job begins, it writes the time under its number, and
counts the run, in a file that all processes map: its marks. This needs neither Redis
nor a system call, so it disturbs the measurement as little as possible.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import time

LIMIT = 1 << 21  # numbers of jobs; the file is sparse
SIZE = (1 + 8 + 4 + 8) * LIMIT  # bytes: a count, a time, a pid, an end for each number
WAIT = 0.2  # seconds that a waiting job takes


def marks(path):
    """Return four arrays by number: count of runs, last begin, pid, last end.

    Times are those of time.monotonic(). Pids are written by `stay` only, ends by
    waiting jobs only.
    """
    with open(path, "r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), SIZE))
    counts = view[:LIMIT]
    times = view[LIMIT : 9 * LIMIT].cast("d")
    pids = view[9 * LIMIT : 13 * LIMIT].cast("i")
    ends = view[13 * LIMIT :].cast("d")
    return counts, times, pids, ends


if "BENCH_MARKS" in os.environ:
    runs, times, pids, ends = marks(os.environ["BENCH_MARKS"])
    # Some workers log two lines for every job, others none.
    logging.disable(logging.INFO)


def noop(number):
    times[number] = time.monotonic()
    runs[number] += 1


def busy(number):
    """Compute for 1 ms."""
    noop(number)
    end = time.monotonic() + 0.001
    while time.monotonic() < end:
        pass


def stay(number):
    """Sleep for a minute, until killed; return at once when run again."""
    pids[number] = os.getpid()
    noop(number)
    if runs[number] == 1:
        time.sleep(60)


def wait(number):
    """Sleep; the run is counted when it ends."""
    times[number] = time.monotonic()
    time.sleep(WAIT)
    end(number)


def end(number):
    ends[number] = time.monotonic()
    runs[number] += 1


async def noop_coroutine(number):
    noop(number)


async def wait_coroutine(number):
    """Sleep in an event loop; the run is counted when it ends."""
    times[number] = time.monotonic()
    await asyncio.sleep(WAIT)
    end(number)


ALL = {"noop": noop, "busy": busy, "stay": stay, "wait": wait}
COROUTINES = {"noop_coroutine": noop_coroutine, "wait_coroutine": wait_coroutine}
