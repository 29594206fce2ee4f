"""huey 3.5.4: RedisHuey as its documentation begins, with results stored also where they are None.

Its consumer has one worker thread (its default), or one worker process."""

from __future__ import annotations

import functools
import time

import measure
from huey import RedisHuey

LACKS = {"bulk", "fork_per_job", "latency"}


@functools.cache
def tasks_of(url):
    """Return the huey of a URL, and its tasks by the names of their functions."""
    huey = RedisHuey("bench", url=url, store_none=True)
    functions = {"measure.noop": measure.noop, "measure.busy": measure.busy}
    return huey, {name: huey.task()(function) for name, function in functions.items()}


def enqueue_each(url, count, func="measure.noop"):
    task = tasks_of(url)[1][func]
    for _ in range(count):
        task()


enqueue_bulk = enqueue_each


def waiting(url):
    return tasks_of(url)[0].pending_count()


def finished(url):
    return tasks_of(url)[0].result_count()


def clear(url):
    tasks_of(url)[0].flush()


def drain(url, mode):
    """Run the consumer until everything has a result, since it can't stop by itself; return the
    seconds until then."""
    began, huey = time.perf_counter(), tasks_of(url)[0]
    count = huey.pending_count() + huey.result_count()
    kind = "thread" if mode == "in-process" else "process"
    consumer = huey.create_consumer(workers=1, worker_type=kind, periodic=False)
    consumer.start()
    while huey.result_count() < count:
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    consumer.stop(graceful=True)
    return seconds
