"""How is celery 5.7 used?  With Redis as broker and for results.

As its guide to Redis begins.
"""

from __future__ import annotations

import os

import celery
import jobs

PINS = ["celery[redis]==5.7.0", "redis==8.1.0", "hiredis==3.5.0"]
ABOUT = (
    "prefork with one process (its default), or solo; results are stored (an option)"
)
SAFE = "no, lost: acknowledged before it runs (its default)"
WORKERS = {
    "prefork": ("celery -A adapter_celery worker -P prefork -c {n} -l ERROR", 250),
    "solo": ("celery -A adapter_celery worker -P solo -l ERROR", 250),
}
CONCURRENT = {
    "threads": (
        "celery -A adapter_celery worker -P threads -c {c} -l ERROR",
        ["functions"],
        300,
    )
}
ENQUEUES = 400
IMPORT = "import celery, celery.app.base, kombu.transport.redis"
SHORT = "late acknowledgement, `visibility_timeout` 2 s (1 hour)"
LEASE = {"usual": "", "short": "2"}

URL = os.environ["BENCH_URL"].replace("unix://", "redis+socket://")
app = celery.Celery("bench", broker=URL, backend=URL)
if os.environ.get("BENCH_LEASE"):  # its options for jobs that must survive a kill
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        broker_transport_options={"visibility_timeout": int(os.environ["BENCH_LEASE"])},
    )
TASKS = {name: app.task(job, name=name) for name, job in jobs.ALL.items()}


def enqueue(numbers, job):
    for number in numbers:
        TASKS[job].delay(number)


def enqueue_later(number, seconds):
    TASKS["noop"].apply_async((number,), countdown=seconds)


def waiting():
    with app.connection_or_acquire() as connection:
        return connection.default_channel.client.llen("celery")
