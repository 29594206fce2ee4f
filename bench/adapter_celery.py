"""celery 5.7 with Redis as broker and for results, as its guide to Redis begins."""

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
ENQUEUES = 400
IMPORT = "import celery, celery.app.base, kombu.transport.redis"
SHORT = "late acknowledgement, `visibility_timeout` 2 s (1 hour)"
LEASE = {"usual": "", "short": "2"}

URL = os.environ["BENCH_URL"]
app = celery.Celery(
    "bench", broker="redis+socket" + URL[4:], backend="redis+socket" + URL[4:]
)
if os.environ.get("BENCH_LEASE"):  # what it has for jobs that are to survive
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        broker_transport_options={"visibility_timeout": int(os.environ["BENCH_LEASE"])},
    )
TASKS = {name: app.task(func, name=name) for name, func in jobs.ALL.items()}


def enqueue(numbers, func):
    for number in numbers:
        TASKS[func].delay(number)


def enqueue_later(number, seconds):
    TASKS["noop"].apply_async((number,), countdown=seconds)


def waiting():
    with app.connection_or_acquire() as connection:
        return connection.default_channel.client.llen("celery")
