"""How is streaq 7.2 used?  With a worker and its tasks, as its documentation begins."""

from __future__ import annotations

import itertools
import os

from coroutines import JOBS, in_tasks, sync
from streaq import Worker

PINS = ["streaq==7.2.0", "coredis==6.9.0", "hiredis==3.5.0"]
ABOUT = "asyncio, 16 jobs at a time (its default); results are stored (its default)"
SAFE = "yes, runs again after 60 s"
WORKERS = {"asyncio": ("streaq run adapter_streaq:worker --workers {n}", 300)}
CONCURRENT = {"asyncio": ("streaq run adapter_streaq:worker", ["coroutines"], 1000)}
ENQUEUES = 700
IMPORT = "import streaq"
SHORT = "`idle_timeout=2` (60)"
LEASE = {"usual": "60", "short": "2"}

idle_timeout = int(os.environ.get("BENCH_LEASE", 60))  # seconds
worker = Worker(
    os.environ["BENCH_URL"],
    idle_timeout=idle_timeout,
    concurrency=int(os.environ.get("BENCH_AT_ONCE", 16)),
)
TASKS = {name: worker.task(name=name)(job) for name, job in JOBS.items()}


@sync
async def enqueue(numbers, job):
    async with worker:
        for number in numbers:
            await TASKS[job].enqueue(number)


@sync
async def enqueue_many(numbers, job):
    numbers = iter(numbers)
    async with worker:
        while True:
            batch = list(itertools.islice(numbers, 1000))
            if not batch:
                return
            tasks = [TASKS[job].enqueue(number) for number in batch]
            await worker.enqueue_many(tasks)


@sync
async def enqueue_in_tasks(numbers, tasks):
    async def enqueue_one(number):
        await TASKS["noop"].enqueue(number)

    async with worker:
        await in_tasks(enqueue_one, numbers, tasks)


@sync
async def enqueue_later(number, seconds):
    async with worker:
        await TASKS["noop"].enqueue(number).start(delay=seconds)


@sync
async def waiting():
    async with worker:
        return await worker.queue_size()
