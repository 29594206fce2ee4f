"""How is arq 0.28 used?  With functions, WorkerSettings and create_pool.

As its documentation begins.
"""

from __future__ import annotations

import functools
import os

from arq import create_pool
from arq.connections import RedisSettings
from arq.constants import default_queue_name
from coroutines import JOBS, in_tasks, sync

PINS = ["arq==0.28.0", "redis==5.3.1", "hiredis==3.5.0"]
ABOUT = "asyncio, 10 jobs at a time (its default); results are stored (its default)"
SAFE = "yes, runs again after 310 s"
WORKERS = {"asyncio": ("arq adapter_arq.WorkerSettings", 200)}
CONCURRENT = {"asyncio": ("arq adapter_arq.WorkerSettings", ["coroutines"], 600)}
ENQUEUES = 700
IMPORT = "import arq"
SHORT = "`job_timeout=2` (300)"
LEASE = {"usual": "300", "short": "2"}

SETTINGS = RedisSettings(
    unix_socket_path=os.environ["BENCH_URL"].removeprefix("unix://")
)


class WorkerSettings:
    functions = tuple(JOBS.values())
    redis_settings = SETTINGS
    max_jobs = int(os.environ.get("BENCH_AT_ONCE", 10))
    job_timeout = int(os.environ.get("BENCH_LEASE", 300))


@functools.cache
@sync
async def pool():
    return await create_pool(SETTINGS)


def enqueue(numbers, job):
    redis = pool()

    @sync
    async def enqueue_each():
        for number in numbers:
            await redis.enqueue_job(job, number)

    enqueue_each()


def enqueue_in_tasks(numbers, tasks):
    enqueue_one = functools.partial(pool().enqueue_job, "noop")
    sync(in_tasks)(enqueue_one, numbers, tasks)


def enqueue_later(number, seconds):
    sync(pool().enqueue_job)("noop", number, _defer_by=seconds)


def waiting():
    return sync(pool().zcard)(default_queue_name)
