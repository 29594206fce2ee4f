"""How is WakaQ 4.0 used?  With tasks and a worker, as its documentation begins.

It reaches the server by a unix socket, as all competitors do.
"""

from __future__ import annotations

import os
from datetime import timedelta

import jobs
import redis
from wakaq import WakaQ

PINS = ["wakaq==4.0.4", "redis==8.1.0", "hiredis==3.5.0"]
ABOUT = "one process; it has no results"
SAFE = "no, lost: the worker pops it"
WORKERS = {"one process": ("wakaq-worker --app adapter_wakaq.wakaq", 1500)}
ONE_FOR_ALL = True  # the number of processes is an option of the app
ENQUEUES = 2000
IMPORT = "import wakaq"

URL = os.environ["BENCH_URL"]
processes = int(os.environ.get("BENCH_PROCESSES", 1))
wakaq = WakaQ(queues=["bench"], concurrency=processes)
# WakaQ has options for a host and a port, but none for a unix socket.
wakaq.broker = redis.Redis.from_url(URL, decode_responses=True)
TASKS = {name: wakaq.task(job) for name, job in jobs.ALL.items()}


def enqueue(numbers, job):
    for number in numbers:
        TASKS[job].delay(number)


def enqueue_later(number, seconds):
    TASKS["noop"].delay(number, eta=timedelta(seconds=seconds))


def waiting():
    return wakaq.broker.llen(wakaq.queues[0].broker_key)
