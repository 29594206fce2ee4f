"""How is dramatiq 2.2 used?  With RedisBroker and the Results middleware.

As its documentation begins.
"""

from __future__ import annotations

import os

import dramatiq
import jobs
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

PINS = ["dramatiq==2.2.1", "redis==8.1.0", "hiredis==3.5.0"]
ABOUT = "one process of 8 threads (its default); results are stored (an option)"
SAFE = "yes, runs again after 60 s"
WORKERS = {"8 threads": ("dramatiq adapter_dramatiq -p {n} -t 8 --skip-logging", 600)}
CONCURRENT = {
    "threads": (
        "dramatiq adapter_dramatiq -p 1 -t {c} --skip-logging",
        ["functions"],
        1500,
    )
}
ENQUEUES = 1000
IMPORT = "import dramatiq.brokers.redis"
SHORT = "`heartbeat_timeout=2000, maintenance_chance=10**5` (1,000)"
LEASE = {"usual": "60000", "short": "2000"}

URL = os.environ["BENCH_URL"]
options = {}
if "BENCH_LEASE" in os.environ:
    options = {
        "heartbeat_timeout": int(os.environ["BENCH_LEASE"]),
        "maintenance_chance": 10**5,
    }
broker = RedisBroker(url=URL, **options)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)
ACTORS = {
    name: dramatiq.actor(job, broker=broker, store_results=True)
    for name, job in jobs.ALL.items()
}


def enqueue(numbers, job):
    for number in numbers:
        ACTORS[job].send(number)


def enqueue_later(number, seconds):
    ACTORS["noop"].send_with_options(args=(number,), delay=int(seconds * 1000))


def waiting():
    return broker.do_qsize("default")
