"""One measurement, in a process of its own: python bench/measure.py ADAPTER QUESTION URL COUNT

Prints a JSON object with what was measured.  compare.py calls it, with the interpreter that the
adapter's library is installed for.  Every job must have been delivered once, else it fails.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import redis as redis_py

HERE = Path(__file__).resolve().parent


def noop():
    pass


def busy():
    """1 ms of work."""
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass


def now():
    return time.time()


def timed(call, *words):
    began = time.perf_counter()
    call(*words)
    return time.perf_counter() - began


# ---- Questions: (adapter, url, count) -> figures -------------------------------------------------


def enqueue(adapter, url, count):
    adapter.enqueue_each(url, 50)
    seconds = timed(adapter.enqueue_each, url, count)
    assert adapter.waiting(url) == count + 50
    return {"per second": count / seconds}


def bulk(adapter, url, count):
    adapter.enqueue_bulk(url, 50)
    seconds = timed(adapter.enqueue_bulk, url, count)
    assert adapter.waiting(url) == count + 50
    return {"per second": count / seconds}


def drain(adapter, url, count, mode="in-process", func="measure.noop"):
    adapter.enqueue_bulk(url, 50, func)
    adapter.drain(url, mode)
    adapter.enqueue_bulk(url, count, func)
    # Some workers take seconds to stop, which is not asked here: their adapters tell the time.
    began = time.perf_counter()
    seconds = adapter.drain(url, mode) or time.perf_counter() - began
    assert adapter.waiting(url) == 0 and adapter.finished(url) == count + 50
    return {"per second": count / seconds}


def drain_fork(adapter, url, count):
    return drain(adapter, url, count, "fork")


def drain_1ms(adapter, url, count):
    return drain(adapter, url, count, "in-process", "measure.busy")


def fork_per_job(adapter, url, count):
    return drain(adapter, url, count, "fork-per-job")


def latency(adapter, url, count):
    """From the call of enqueue to the first line of the job, on an idle worker process."""
    with adapter.worker(url):
        delays = []
        for number in range(count + 5):
            time.sleep(0.02)
            began = time.time()
            value = adapter.result_of(adapter.enqueue_one(url, "measure.now"))
            delays += [value - began] if number >= 5 else []
    delays.sort()
    return {
        "p50 ms": statistics.median(delays) * 1e3,
        "p99 ms": delays[int(0.99 * len(delays))] * 1e3,
    }


def memory(adapter, url, count):
    """Bytes in Redis per queued and per finished no-op job."""
    used = lambda: redis_py.Redis.from_url(url).info("memory")["used_memory"]  # noqa: E731
    for _ in range(2):  # the second time, the tables of the server have grown
        adapter.clear(url)
        before = used()
        adapter.enqueue_bulk(url, count)
        queued = (used() - before) / count
        adapter.drain(url, "in-process")
        finished = (used() - before) / count
    return {"bytes queued": queued, "bytes finished": finished}


# ---- Floors --------------------------------------------------------------------------------------


def floor(adapter, url, count):
    """What costs something before any queue does: round trips, a pipeline, a fork."""
    client = redis_py.Redis.from_url(url)
    client.ping()
    ping = timed(lambda: [client.ping() for _ in range(count)])
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(urlparse(url).path)

        def trips():
            for _ in range(count):
                raw.sendall(b"PING\r\n")
                raw.recv(100)

        trip = timed(trips)
    pipe = client.pipeline(transaction=False)
    for _ in range(count):
        pipe.lpush("floor", b"x" * 120)
    push = timed(pipe.execute)

    def forks():
        for _ in range(100):
            if (pid := os.fork()) == 0:
                os._exit(0)
            os.waitpid(pid, 0)

    fork = timed(forks)
    return {
        "ping per second": count / ping, "raw round trips per second": count / trip,
        "pipelined LPUSH per second": count / push, "bare forks per second": 100 / fork,
    }  # fmt: skip


def main(name, question, url, count):
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    adapter = importlib.import_module(f"adapter_{name}")
    if question in getattr(adapter, "LACKS", ()):
        return print("{}", flush=True)
    redis_py.Redis.from_url(url).flushall()
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        figures = globals()[question](adapter, url, int(count))
    return print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # whatever threads are left
