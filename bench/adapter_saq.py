"""saq 0.26: a Redis queue and settings as its documentation begins."""

from __future__ import annotations

import os
import time

from coroutines import JOBS, sync
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
ENQUEUES = 700
IMPORT = "import saq.queue.redis"
SHORT = "`timeout=2` (10), `retries=3` (1), a sweep each 2 s (60)"
LEASE = {"usual": "", "short": "2"}

LEASED = os.environ.get("BENCH_LEASE")
queue = RedisQueue(Redis.from_url(os.environ["BENCH_URL"]))
settings = {
    "queue": queue,
    "functions": [*JOBS.values()],
    "concurrency": 10,
    "timers": {"sweep": 2} if LEASED else {},
}


@sync
async def enqueue(numbers, func):
    await queue.connect()
    options = {"timeout": 2, "retries": 3} if func == "stay" else {}
    for number in numbers:
        await queue.enqueue(func, number=number, **options)


@sync
async def enqueue_later(number, seconds):
    await queue.connect()
    await queue.enqueue("noop", number=number, scheduled=time.time() + seconds)


@sync
async def waiting():
    await queue.connect()
    return await queue.count("queued")
