"""microq, for the benchmarks.  Each adapter has the functions that this one has."""

from __future__ import annotations

import sys

import redis
from like_rq import calls_of, process

from microq import DuplicateJobError, Job, Queue, Repeat, Retry, Worker


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
    worker = [sys.executable, "-m", "microq", "worker", *queues, "-u", url, "--lease", str(lease)]
    return [
        [*worker, "--processes", "2", "--with-scheduler"],
        [*worker, "--jobs-per-fork", "1", "--dequeue-strategy", "round_robin"],
        [*worker, "--in-process"],
    ]


def is_idle(connection, queues):
    """Whether nothing is left to do."""
    queues = [Queue(name, connection) for name in queues]
    containers = ("queued", "started", "scheduled")
    return not any(connection.exists(q.prefix + name) for q in queues for name in containers)


def outcome(connection, ids):
    """Return {id: status}, and {id: how many successful results are recorded}."""
    jobs = {job.id: job for job in Job.fetch_many(ids, connection) if job}
    statuses = {id: str(job.get_status(refresh=False)) for id, job in jobs.items()}
    good = {id: [r.type for r in job.results()].count("successful") for id, job in jobs.items()}
    return statuses, good


def faults(connection):
    """Return what is wrong with the keys that are left."""
    from test_microq import check_invariants

    try:
        check_invariants(connection)
    except AssertionError as error:
        return [str(error)]
    return []


# ---- For measure.py ------------------------------------------------------------------------------


queue_of, enqueue_one, enqueue_each, waiting, finished, result_of = calls_of(
    lambda url: Queue("bench", connect(url))
)


def enqueue_bulk(url, count, func="measure.noop"):
    queue_of(url).enqueue_many(Queue.prepare_data(func) for _ in range(count))


def clear(url):
    queue_of(url).delete()


def drain(url, mode):
    """Run what is queued: in this process, in one child, or in a child per job."""
    options = {"fork": mode != "in-process", "jobs_per_fork": 1 if mode == "fork-per-job" else 1000}
    Worker(queue_of(url), **options).work(burst=True, logging_level="WARNING")


def worker(url):
    return process("microq", url, 1)
