"""RQ 3.0: for the benchmarks with its defaults, as its documentation begins.

For torture.py it is configured to recover as fast as its options allow: maintenance and heartbeats
each 5 s (its defaults are 600 and 30), a look at the clock while idle each 15 s (405), all workers
with the scheduler, and a Retry for every job, since RQ fails a job whose worker died unless it has
one.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import redis
from like_rq import calls_of
from rq import Queue, Repeat, Retry
from rq.exceptions import DuplicateJobError
from rq.job import Job
from rq.results import Result


def connect(url):
    return redis.Redis.from_url(url)


def enqueue(connection, queue, id, kind, arguments):
    queue, options = Queue(queue, connection=connection), {"job_id": id, "unique": True}
    options["retry"] = Retry(max=3, interval=[0, 1] if kind == "retry" else 0)
    if kind == "repeat":
        options["repeat"] = Repeat(times=2, interval=[0, 1])
    try:
        if kind == "later":
            queue.enqueue_in(timedelta(seconds=1), "torture.job", *arguments, **options)
        else:
            queue.enqueue("torture.job", *arguments, **options)
    except DuplicateJobError:
        pass


def worker_commands(url, queues, lease):
    worker = [sys.executable, "-m", "rq.cli", "worker", *queues, "-u", url]
    worker += [*LEASE["short"].split(), "--with-scheduler"]
    simple = ["-w", "rq.worker.SimpleWorker"]
    return [worker, worker, worker, [*worker, *simple]]


def is_idle(connection, queues):
    keys = ("rq:queue:{}", "rq:queue:{}:intermediate", "rq:wip:{}", "rq:scheduled:{}")
    return not any(
        connection.exists(key.format(name)) for key in keys for name in queues
    )


def outcome(connection, ids):
    jobs = {
        id: job
        for id, job in zip(ids, Job.fetch_many(ids, connection), strict=True)
        if job
    }
    statuses = {id: job.get_status(refresh=False).value for id, job in jobs.items()}
    good = {
        id: [result.type for result in job.results()].count(Result.Type.SUCCESSFUL)
        for id, job in jobs.items()
    }
    return statuses, good


def faults(connection):
    return []


# ---- For the benchmarks --------------------------------------------------------------------------


PINS = ["rq==3.0.0", "redis==8.1.0", "hiredis==3.5.0"]
ABOUT = (
    "`SimpleWorker`, or `Worker` (its default), with its scheduler, since microq's workers have "
    "one; results are stored (its default)"
)
SAFE = "it is failed, or runs again if it has a Retry"
WORKERS = {
    "SimpleWorker": (
        "rq worker bench -u {url} -q -s {lease} -w rq.worker.SimpleWorker",
        120,
    ),
    "Worker": ("rq worker bench -u {url} -q -s {lease}", 40),
}
FORKS = RECOVERS = "Worker"
ENQUEUES = 400
IMPORT = "import rq"
SHORT = "`Retry(max=3)`, intervals of 5 s (600, 30), `--worker-ttl 30` (420)"
LEASE = {
    "usual": "",
    "short": "--maintenance-interval 5 --job-monitoring-interval 5 --worker-ttl 30",
}

if "BENCH_URL" in os.environ:
    calls = calls_of(
        Queue("bench", connection=connect(os.environ["BENCH_URL"])), retry=Retry(max=3)
    )
    enqueue, enqueue_many, enqueue_later, waiting = calls
