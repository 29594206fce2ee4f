"""dramatiq 2.2: RedisBroker as its documentation begins; results are not stored.

Its worker has eight threads in one process, its default: with one it is several times slower."""

from __future__ import annotations

import functools
import time

import dramatiq
import measure
from dramatiq.brokers.redis import RedisBroker

LACKS = {"bulk", "drain_fork", "fork_per_job", "latency", "memory"}


class Counter(dramatiq.Middleware):
    count = 0

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self.count += 1


@functools.cache
def actors_of(url):
    """Return the broker of a URL, its counter, and its actors by the names of their functions."""
    broker, counter = RedisBroker(url=url), Counter()
    broker.add_middleware(counter)
    dramatiq.set_broker(broker)
    functions = {"measure.noop": measure.noop, "measure.busy": measure.busy}
    actors = {name: dramatiq.actor(func, broker=broker) for name, func in functions.items()}
    return broker, counter, actors


def enqueue_each(url, count, func="measure.noop"):
    actor = actors_of(url)[2][func]
    for _ in range(count):
        actor.send()


enqueue_bulk = enqueue_each


def waiting(url):
    return actors_of(url)[0].do_qsize("default")


def finished(url):
    return actors_of(url)[1].count


def drain(url, mode):
    """Run what is queued; return the seconds until the last job has ended."""
    began, (broker, counter, _) = time.perf_counter(), actors_of(url)
    count = counter.count + waiting(url)
    worker = dramatiq.Worker(broker, worker_threads=8)
    worker.start()
    while counter.count < count:
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    worker.stop()
    return seconds
