"""How is microq used? As its README begins.

Every adapter has what stands below the second line, for the benchmarks. Those of microq
and RQ also have what stands above it, for torture.py. `layout_errors` uses
test_microq.py, whose check of the keys runs there after every test.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import time
import zlib

import coroutines
import redis
from like_rq import Calls
from redis.asyncio import Redis as AsyncRedis

from microq import AsyncQueue, DuplicateJobError, Job, Queue, Repeat, Retry

# ---- For torture.py ------------------------------------------------------------------


def connect(url):
    return redis.Redis.from_url(url)


def enqueue_job(connection, queue, id, kind, arguments):
    """Enqueue torture.job(*arguments), or for half of the ids the coroutine.

    If there is a job of this id, an earlier call stored it, and its reply was lost.
    """
    queue = Queue(queue, connection)
    name = "job_async" if zlib.crc32(id.encode()) % 2 else "job"
    call = (f"torture.{name}", *arguments)
    options = {"job_id": id}
    if kind == "retry":
        options["retry"] = Retry(max=3, interval=[0, 0.5])
    if kind == "repeat":
        options["repeat"] = Repeat(times=2, interval=[0, 0.5])
    try:
        if kind == "later":
            queue.enqueue_in(1, *call, **options)
        else:
            queue.enqueue(*call, **options)
    except DuplicateJobError:
        pass


def worker_commands(url, queues, lease):
    worker = [sys.executable, "-m", "microq", "worker", *queues]
    worker += ["--url", url, "--lease", str(lease)]
    return [
        [*worker, "--processes", "2", "--with-scheduler"],
        [*worker, "--jobs-per-fork", "1", "--dequeue-strategy", "round_robin"],
        [*worker, "--in-process"],
        [*worker, "--concurrency", "8"],
        [*worker, "--concurrency", "8", "--in-process"],
    ]


def is_idle(connection, queues):
    """Return whether no job is queued, started or scheduled."""
    for name in queues:
        prefix = Queue(name, connection).prefix
        for container in ("queued", "started", "scheduled"):
            if connection.exists(prefix + container):
                return False
    return True


def outcome(connection, ids):
    """Return {id: status}, and {id: how many successful results are recorded}."""
    statuses = {}
    successes = {}
    for job in Job.fetch_many(ids, connection):
        if job is not None:
            statuses[job.id] = str(job.get_status(refresh=False))
            types = [result.type for result in job.results()]
            successes[job.id] = types.count("successful")
    return statuses, successes


def layout_errors(connection):
    """Return what is wrong with the keys in Redis, as texts."""
    from test_microq import check_invariants

    try:
        check_invariants(connection)
    except AssertionError as error:
        return [str(error)]
    return []


# ---- For the benchmarks --------------------------------------------------------------

PINS = ["redis==8.1.0", "hiredis==3.5.0"]
ABOUT = "in-process; default: one forked child; results are stored (its default)"
SAFE = "yes, runs again"
WORKERS = {
    "in-process": ("python -m microq worker bench -u {url} -q --in-process", 5000),
    "default": (
        "python -m microq worker bench -u {url} -q --processes {n} --lease {lease}",
        5000,
    ),
    "fork per job": ("python -m microq worker bench -u {url} -q --jobs-per-fork 1", 80),
}
CONCURRENT = {
    "in-process": (
        "python -m microq worker bench -u {url} -q --in-process --concurrency {c}",
        ["coroutines", "functions"],
        5000,
    ),
    "default": (
        "python -m microq worker bench -u {url} -q --concurrency {c}",
        ["coroutines", "functions"],
        5000,
    ),
}
USUAL = RECOVERS = "default"
FORKS = "fork per job"
ENQUEUES = 2000
IMPORT = "import microq"
SHORT = "`--lease 2` (15)"
LEASE = {"usual": "15", "short": "2"}

if "BENCH_URL" in os.environ:
    calls = Calls(Queue("bench", connect(os.environ["BENCH_URL"])))
    enqueue = calls.enqueue
    enqueue_many = calls.enqueue_many
    enqueue_later = calls.enqueue_later
    waiting = calls.waiting
    async_queue = AsyncQueue("bench", AsyncRedis.from_url(os.environ["BENCH_URL"]))


def enqueue_in_tasks(numbers, tasks):
    enqueue_one = functools.partial(async_queue.enqueue, "jobs.noop")
    coroutines.sync(coroutines.in_tasks)(enqueue_one, numbers, tasks)


@coroutines.sync
async def late_tick():
    """Return by how many seconds the latest tick of a timer was late; see
    ask_awaited.py."""
    late = []

    async def tick():
        while True:
            due_at = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            late.append(time.perf_counter() - due_at)

    job = await async_queue.enqueue("jobs.noop", 0)
    ticker = asyncio.ensure_future(tick())
    under_way = [job.latest_result(timeout=1) for _ in range(100)]
    under_way += [async_queue.enqueue("jobs.noop", 0) for _ in range(100)]
    connect(os.environ["BENCH_URL"]).execute_command("CLIENT", "PAUSE", 1000, "ALL")
    await asyncio.gather(*under_way)
    ticker.cancel()
    return max(late)
