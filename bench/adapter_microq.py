"""microq, as its README begins.

Each adapter has what stands here below the second rule, for the benchmarks; those of microq and RQ
also have what stands above it, for torture.py.
"""

from __future__ import annotations

import os
import sys

import redis
from like_rq import calls_of

from microq import DuplicateJobError, Job, Queue, Repeat, Retry


def connect(url):
    return redis.Redis.from_url(url)


def enqueue(connection, queue, id, kind, arguments):
    """Enqueue torture.job(*arguments); a job that is there already was accepted before."""
    queue, call = Queue(queue, connection), ("torture.job", *arguments)
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
    worker = [
        sys.executable,
        "-m",
        "microq",
        "worker",
        *queues,
        "-u",
        url,
        "--lease",
        str(lease),
    ]
    return [
        [*worker, "--processes", "2", "--with-scheduler"],
        [*worker, "--jobs-per-fork", "1", "--dequeue-strategy", "round_robin"],
        [*worker, "--in-process"],
    ]


def is_idle(connection, queues):
    """Whether nothing is left to do."""
    queues = [Queue(name, connection) for name in queues]
    containers = ("queued", "started", "scheduled")
    return not any(
        connection.exists(q.prefix + name) for q in queues for name in containers
    )


def outcome(connection, ids):
    """Return {id: status}, and {id: how many successful results are recorded}."""
    jobs = {job.id: job for job in Job.fetch_many(ids, connection) if job}
    statuses = {id: str(job.get_status(refresh=False)) for id, job in jobs.items()}
    good = {
        id: [r.type for r in job.results()].count("successful")
        for id, job in jobs.items()
    }
    return statuses, good


def faults(connection):
    """Return what is wrong with the keys that are left."""
    from test_microq import check_invariants

    try:
        check_invariants(connection)
    except AssertionError as error:
        return [str(error)]
    return []


# ---- For the benchmarks --------------------------------------------------------------------------


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
USUAL = RECOVERS = "default"
FORKS = "fork per job"
ENQUEUES = 2000
IMPORT = "import microq"
SHORT = "`--lease 2` (15)"
LEASE = {"usual": "15", "short": "2"}

if "BENCH_URL" in os.environ:
    calls = calls_of(Queue("bench", connect(os.environ["BENCH_URL"])))
    enqueue, enqueue_many, enqueue_later, waiting = calls
