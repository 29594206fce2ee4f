"""How is huey 3.5 used? With RedisHuey and its consumer.

As its documentation begins.
"""

from __future__ import annotations

import os

import jobs
from huey import RedisHuey

PINS = ["huey==3.5.4", "redis==8.1.0", "hiredis==3.5.0"]
ABOUT = (
    "one thread (its default), or one process; results are stored (`store_none=True`)"
)
SAFE = "no, lost: the consumer pops it"
WORKERS = {
    "one thread": ("huey_consumer adapter_huey.huey -q -n -k thread -w {n}", 800),
    "one process": ("huey_consumer adapter_huey.huey -q -n -k process -w {n}", 800),
}
USUAL = RECOVERS = "one process"
ENQUEUES = 1500
IMPORT = "import huey"

huey = RedisHuey("bench", url=os.environ["BENCH_URL"], store_none=True)
TASKS = {name: huey.task()(job) for name, job in jobs.ALL.items()}


def enqueue(numbers, job):
    for number in numbers:
        TASKS[job](number)


def enqueue_later(number, seconds):
    TASKS["noop"].schedule((number,), delay=seconds)


def waiting():
    return huey.pending_count()
