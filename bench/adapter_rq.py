"""RQ 3.0, configured to recover as fast as its options allow: maintenance and heartbeats each 5 s
(its defaults are 600 and 30), a look at the clock while idle each 15 s (405), all workers with the
scheduler, and a Retry for every job, since RQ fails a job whose worker died unless it has one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import redis
from rq import Queue, Repeat, Retry, SimpleWorker, Worker
from rq.exceptions import DuplicateJobError
from rq.job import Job
from rq.results import Result

HERE = Path(__file__).resolve().parent


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


def queue_of(url, _queues={}):  # noqa: B006  one for each URL
    return _queues.setdefault(url, Queue("bench", connection=connect(url)))


def enqueue_one(url, func):
    return queue_of(url).enqueue(func)


def enqueue_each(url, count):
    queue = queue_of(url)
    for _ in range(count):
        queue.enqueue("measure.noop")


def enqueue_bulk(url, count, func="measure.noop"):
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        queue_of(url).enqueue_many([Queue.prepare_data(func) for _ in range(size)])


def waiting(url):
    return len(queue_of(url))


def finished(url):
    return len(queue_of(url).finished_job_registry)


def clear(url):
    connect(url).flushall()


def drain(url, mode):
    """RQ forks for every job, or not at all."""
    kind = SimpleWorker if mode == "in-process" else Worker
    kind([queue_of(url)], connection=connect(url)).work(burst=True, logging_level="WARNING")


@contextlib.contextmanager
def worker(url):
    command = [sys.executable, "-m", "rq.cli", "worker", "bench", "-u", url, "-q", "-P", HERE]
    process = subprocess.Popen(command, cwd=HERE)
    try:
        time.sleep(2)
        yield
    finally:
        process.terminate()
        process.wait()


def result_of(job):
    return job.latest_result(timeout=5).return_value
