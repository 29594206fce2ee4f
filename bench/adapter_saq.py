"""How is saq 0.26 used? With a Redis queue and settings.

As its documentation begins.
"""

from __future__ import annotations

import os
import time

from coroutines import JOBS, in_tasks, sync
from redis.asyncio import Redis
from saq.queue.redis import RedisQueue

PINS = [
    "saq[redis]==0.26.4",
    "redis==7.4.1",
    "hiredis==3.5.0",
    "typing-extensions==4.16.0",
]
ABOUT = "asyncio, 10 jobs at a time (its default); results are stored (its default)"
SAFE = "it is aborted after its timeout (10 s), or runs again if it has retries"
WORKERS = {"asyncio": ("saq adapter_saq.settings --workers {n}", 250)}
CONCURRENT = {"asyncio": ("saq adapter_saq.settings", ["coroutines"], 1500)}
ENQUEUES = 700
IMPORT = "import saq.queue.redis"
SHORT = "`timeout=2` (10), `retries=3` (1), a sweep each 2 s (60)"
LEASE = {"usual": "", "short": "2"}

timers = {}
if "BENCH_LEASE" in os.environ:
    timers["sweep"] = 2  # seconds
queue = RedisQueue(Redis.from_url(os.environ["BENCH_URL"]))
settings = {
    "queue": queue,
    "functions": list(JOBS.values()),
    "concurrency": int(os.environ.get("BENCH_AT_ONCE", 10)),
    "timers": timers,
}


@sync
async def enqueue(numbers, job):
    await queue.connect()
    options = {}
    if job == "stay":
        options = {"timeout": 2, "retries": 3}
    for number in numbers:
        await queue.enqueue(job, number=number, **options)


@sync
async def enqueue_in_tasks(numbers, tasks):
    await queue.connect()

    async def enqueue_one(number):
        await queue.enqueue("noop", number=number)

    await in_tasks(enqueue_one, numbers, tasks)


@sync
async def enqueue_later(number, seconds):
    await queue.connect()
    await queue.enqueue("noop", number=number, scheduled=time.time() + seconds)


@sync
async def waiting():
    await queue.connect()
    return await queue.count("queued")
