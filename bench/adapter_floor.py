"""What costs something before any queue does, with redis-py or without."""

from __future__ import annotations

import os
import random
import socket
import time
from urllib.parse import urlparse

import redis

import microq

URL = os.environ["BENCH_URL"]
CLIENT = redis.Redis.from_url(URL)


def ping(count):
    """Redis.ping() per second."""
    CLIENT.ping()
    began = time.perf_counter()
    for _ in range(count):
        CLIENT.ping()
    return count / (time.perf_counter() - began)


def slow_pings(count, least, most):
    """Milliseconds of Redis.ping(), each after a pause of `least` to `most` seconds."""
    found = []
    for _ in range(count):
        time.sleep(random.uniform(least, most))
        began = time.perf_counter()
        CLIENT.ping()
        found.append(1000 * (time.perf_counter() - began))
    return found


def trip(count):
    """Round trips of a bare socket per second."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(urlparse(URL).path)
        began = time.perf_counter()
        for _ in range(count):
            raw.sendall(b"PING\r\n")
            raw.recv(100)
        return count / (time.perf_counter() - began)


def push(count, size):
    """LPUSH per second in pipelines of 1,000, each of as many bytes on the wire as `size`."""
    value = b"x" * max(
        1, size - len(b"*3\r\n$5\r\nLPUSH\r\n$5\r\nfloor\r\n$100\r\n\r\n")
    )
    began = time.perf_counter()
    for _ in range(count // 1000):
        pipe = CLIENT.pipeline(transaction=False)
        for _ in range(1000):
            pipe.lpush("floor", value)
        pipe.execute()
    seconds = time.perf_counter() - began
    CLIENT.delete("floor")
    return count / seconds


def fork(count):
    """fork + exit + wait per second, of a process that has what a microq worker has in memory."""
    worker = microq.Worker(["bench"], connection=CLIENT)
    began = time.perf_counter()
    for _ in range(count):
        if (pid := os.fork()) == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return count / (time.perf_counter() - began) if worker else 0
