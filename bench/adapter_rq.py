"""How is RQ 3.0 used? For the benchmarks with its defaults, as its documentation
begins.

For torture.py it is configured to recover as fast as its options allow: maintenance and
heartbeats every 5 s (its defaults are 600 and 30), an idle worker looks for due jobs
every 15 s (405), all workers run the scheduler, and every job has a Retry, since RQ
fails a job without one when its worker died.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import redis
from like_rq import Calls
from rq import Queue, Repeat, Retry
from rq.exceptions import DuplicateJobError
from rq.job import Job
from rq.results import Result

# ---- For torture.py ------------------------------------------------------------------


def connect(url):
    return redis.Redis.from_url(url)


def enqueue_job(connection, queue, id, kind, arguments):
    queue = Queue(queue, connection=connection)
    call = ("torture.job", *arguments)
    retry_interval = [0, 1] if kind == "retry" else 0
    options = {
        "job_id": id,
        "unique": True,
        "retry": Retry(max=3, interval=retry_interval),
    }
    if kind == "repeat":
        options["repeat"] = Repeat(times=2, interval=[0, 1])
    try:
        if kind == "later":
            queue.enqueue_in(timedelta(seconds=1), *call, **options)
        else:
            queue.enqueue(*call, **options)
    except DuplicateJobError:
        pass


def worker_commands(url, queues, lease):
    worker = [sys.executable, "-m", "rq.cli", "worker", *queues, "-u", url]
    worker += [*LEASE["short"].split(), "--with-scheduler"]
    simple = [*worker, "-w", "rq.worker.SimpleWorker"]
    return [worker, worker, worker, simple]


def is_idle(connection, queues):
    """Return whether no job is queued, started or scheduled."""
    patterns = [
        "rq:queue:{}",
        "rq:queue:{}:intermediate",
        "rq:wip:{}",
        "rq:scheduled:{}",
    ]
    for name in queues:
        for pattern in patterns:
            if connection.exists(pattern.format(name)):
                return False
    return True


def outcome(connection, ids):
    """Return {id: status}, and {id: how many successful results are recorded}."""
    statuses = {}
    successes = {}
    for job in Job.fetch_many(ids, connection):
        if job is not None:
            statuses[job.id] = job.get_status(refresh=False).value
            types = [result.type for result in job.results()]
            successes[job.id] = types.count(Result.Type.SUCCESSFUL)
    return statuses, successes


def layout_errors(connection):
    """Return nothing: RQ's keys are not checked."""
    return []


# ---- For the benchmarks --------------------------------------------------------------

PINS = ["rq==3.0.0", "redis==8.1.0", "hiredis==3.5.0"]
ABOUT = (
    "`SimpleWorker`, or `Worker` (its default), with its scheduler, since microq's "
    "workers have one; results are stored (its default)"
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
    bench_queue = Queue("bench", connection=connect(os.environ["BENCH_URL"]))
    calls = Calls(bench_queue, retry=Retry(max=3))
    enqueue = calls.enqueue
    enqueue_many = calls.enqueue_many
    enqueue_later = calls.enqueue_later
    waiting = calls.waiting
