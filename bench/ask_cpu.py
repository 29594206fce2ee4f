"""How much CPU does a job cost: of who enqueues it, of the worker, and of the server?

No-ops, enqueued one by one, and run by a worker in one process that was stopped while they were
enqueued.  The floor: Redis.ping().  By the scheduler's own count (schedstat of Linux).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

WHEN = "rounds"
RIVALS = ["microq", "rq", "huey", "wakaq"]
PINGS = 5000


def spent(pids):
    """Return the microseconds that processes have spent on a CPU."""
    tasks = [
        task for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat")
    ]
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1000


def compare(session, pids, count, call, *args):
    """Return what a call costs for each of `count`: the processes, and the server."""
    both = list(pids), [session.admin.info("server")["process_id"]]
    before = [spent(each) for each in both]
    call(*args)
    return [
        (spent(each) - then) / count for each, then in zip(both, before, strict=True)
    ]


def ask(session):
    says, label = session.rival.says, session.rival.labels[0]
    session.clear()
    session.enqueue(50)
    count = says["ENQUEUES"]
    enqueue = compare(session, [session.client.pid], count, session.enqueue, count)
    session.clear()
    session.work(label)
    workers, count = session.processes(), 2 * says["WORKERS"][label][1]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    first, _ = session.enqueue(count, "enqueue_many")
    run = compare(session, workers, count, finish, session, workers, first, count)
    names = "enqueue, client", "enqueue, server", "run, worker", "run, server"
    return {
        ("", name): value for name, value in zip(names, [*enqueue, *run], strict=True)
    }


def finish(session, workers, first, count):
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    session.delivered(first, count)


def floor(session):
    session.ask("figure", "ping", 100)
    words = "figure", "ping", PINGS
    client, server = compare(session, [session.client.pid], PINGS, session.ask, *words)
    return {("", "ping, client"): client, ("", "ping, server"): server}
