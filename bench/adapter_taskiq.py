"""How is taskiq 0.13 used? With taskiq-redis 1.2: RedisStreamBroker and its results.

As taskiq-redis recommends.
"""

from __future__ import annotations

import functools
import os

import redis
from coroutines import JOBS, in_tasks, sync
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

PINS = ["taskiq==0.13.0", "taskiq-redis==1.2.4", "redis==8.1.0", "hiredis==3.5.0"]
ABOUT = (
    "streams, asyncio, 100 jobs at a time (its default); results are stored (an option)"
)
SAFE = "yes, runs again after 10 minutes, once another job comes"
WORKERS = {
    "asyncio": (
        "taskiq worker adapter_taskiq:broker --workers {n} --log-level ERROR",
        300,
    )
}
CONCURRENT = {
    "asyncio": (
        "taskiq worker adapter_taskiq:broker --workers 1 --log-level ERROR"
        " --max-async-tasks {c}",
        ["coroutines"],
        1000,
    )
}
LACKS = {"later": "needs a process of its own"}
ENQUEUES = 700
IMPORT = "import taskiq_redis"
SHORT = "`idle_timeout=2000` (10 minutes)"
LEASE = {"usual": "600000", "short": "2000"}

URL = os.environ["BENCH_URL"]
idle_timeout = int(os.environ.get("BENCH_LEASE", 600000))  # milliseconds
# consumer_id "0": the worker also runs jobs that were enqueued before it started.
broker = RedisStreamBroker(url=URL, idle_timeout=idle_timeout, consumer_id="0")
broker = broker.with_result_backend(RedisAsyncResultBackend(redis_url=URL))
TASKS = {}
for name, job in JOBS.items():
    TASKS[name] = broker.register_task(job, task_name=name)


@functools.cache
@sync
async def start():
    await broker.startup()


def enqueue(numbers, job):
    start()
    kick(numbers, job)


@sync
async def kick(numbers, job):
    for number in numbers:
        await TASKS[job].kiq(number)


def enqueue_in_tasks(numbers, tasks):
    start()
    sync(in_tasks)(TASKS["noop"].kiq, numbers, tasks)


def waiting():
    return redis.Redis.from_url(URL).xlen("taskiq")
