"""RQ 3.0, configured to recover as fast as its options allow: maintenance and heartbeats each 5 s
(its defaults are 600 and 30), a look at the clock while idle each 15 s (405), all workers with the
scheduler, and a Retry for every job, since RQ fails a job whose worker died unless it has one."""

from __future__ import annotations

import sys
from datetime import timedelta

import redis
from like_rq import calls_of, process
from rq import Queue, Repeat, Retry, SimpleWorker, Worker
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
    worker += [
        "--maintenance-interval",
        "5",
        "--job-monitoring-interval",
        "5",
        "--worker-ttl",
        "30",
    ]
    simple = ["-w", "rq.worker.SimpleWorker"]
    worker += ["--with-scheduler"]
    return [worker, worker, worker, [*worker, *simple]]


def is_idle(connection, queues):
    keys = ("rq:queue:{}", "rq:queue:{}:intermediate", "rq:wip:{}", "rq:scheduled:{}")
    return not any(connection.exists(key.format(name)) for key in keys for name in queues)


def outcome(connection, ids):
    jobs = {id: job for id, job in zip(ids, Job.fetch_many(ids, connection), strict=True) if job}
    statuses = {id: job.get_status(refresh=False).value for id, job in jobs.items()}
    good = {
        id: [result.type for result in job.results()].count(Result.Type.SUCCESSFUL)
        for id, job in jobs.items()
    }
    return statuses, good


def faults(connection):
    return []


# ---- For measure.py; the defaults, as the documentation shows them -------------------------------


queue_of, enqueue_one, enqueue_each, waiting, finished, result_of = calls_of(
    lambda url: Queue("bench", connection=connect(url))
)


def enqueue_bulk(url, count, func="measure.noop"):
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        queue_of(url).enqueue_many([Queue.prepare_data(func) for _ in range(size)])


def clear(url):
    connect(url).flushall()


def drain(url, mode):
    """RQ forks for every job, or not at all."""
    kind = SimpleWorker if mode == "in-process" else Worker
    kind([queue_of(url)], connection=connect(url)).work(burst=True, logging_level="WARNING")


def worker(url):
    return process("rq.cli", url, 2)
