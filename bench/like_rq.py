"""For measure.py: what microq and RQ have in common, since their interfaces are one."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def calls_of(make):
    """Return the functions that the adapters share; `make(url)` returns the queue of a server."""
    queue_of = functools.cache(make)

    def enqueue_one(url, func):
        return queue_of(url).enqueue(func)

    def enqueue_each(url, count):
        queue = queue_of(url)
        for _ in range(count):
            queue.enqueue("measure.noop")

    def waiting(url):
        return len(queue_of(url))

    def finished(url):
        return len(queue_of(url).finished_job_registry)

    def result_of(job):
        return job.latest_result(timeout=5).return_value

    return queue_of, enqueue_one, enqueue_each, waiting, finished, result_of


@contextlib.contextmanager
def process(module, url, seconds):
    """An idle worker process of `python -m module`, with the default options."""
    command = [sys.executable, "-m", module, "worker", "bench", "-u", url, "-q", "-P", HERE]
    running = subprocess.Popen(command, cwd=HERE.parent)
    try:
        time.sleep(seconds)  # it begins
        yield
    finally:
        running.terminate()
        running.wait()
