"""What do Redis, redis-py and the system cost without any queue? The floors of the
tables.
"""

from __future__ import annotations

import os
import random
import socket
import time
from urllib.parse import urlparse

import redis

import microq

ENVIRONMENT = "microq"
URL = os.environ["BENCH_URL"]
CLIENT = redis.Redis.from_url(URL)
EMPTY_LPUSH = b"*3\r\n$5\r\nLPUSH\r\n$5\r\nfloor\r\n$100\r\n\r\n"


def ping(count):
    """Return calls of Redis.ping() per second."""
    CLIENT.ping()
    begun_at = time.perf_counter()
    for _ in range(count):
        CLIENT.ping()
    return count / (time.perf_counter() - begun_at)


def slow_pings(count, least, most):
    """Return the ms of each Redis.ping(), after a pause of `least` to `most` s."""
    durations = []
    for _ in range(count):
        time.sleep(random.uniform(least, most))
        begun_at = time.perf_counter()
        CLIENT.ping()
        durations.append(1000 * (time.perf_counter() - begun_at))
    return durations


def trip(count):
    """Return round trips of a bare socket per second."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(urlparse(URL).path)
        begun_at = time.perf_counter()
        for _ in range(count):
            connection.sendall(b"PING\r\n")
            connection.recv(100)
        return count / (time.perf_counter() - begun_at)


def push(count, size):
    """Return LPUSH per second in pipelines of 1,000, each command of `size` bytes."""
    value = b"x" * max(1, size - len(EMPTY_LPUSH))
    begun_at = time.perf_counter()
    for _ in range(count // 1000):
        pipe = CLIENT.pipeline(transaction=False)
        for _ in range(1000):
            pipe.lpush("floor", value)
        pipe.execute()
    seconds = time.perf_counter() - begun_at
    CLIENT.delete("floor")
    return count / seconds


def fork(count):
    """Return fork + exit + wait per second, with a microq worker in memory."""
    worker = microq.Worker(["bench"], connection=CLIENT)
    begun_at = time.perf_counter()
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    seconds = time.perf_counter() - begun_at
    del worker  # it was in memory until here
    return count / seconds
