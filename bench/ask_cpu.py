"""How much CPU does a job cost: of the client that enqueues it, of the worker, and of
the server?

No-ops, enqueued one by one, and run by a worker in one process that was stopped while
they were enqueued. The floor: Redis.ping(). CPU time as the scheduler counts it
(schedstat of Linux).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

WHEN = "rounds"
COMPETITORS = ["microq", "rq", "huey", "wakaq"]
PINGS = 5000


def cpu_time(pids):
    """Return the microseconds that processes have spent on a CPU."""
    nanoseconds = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            nanoseconds += int(task.read_text().split()[0])
    return nanoseconds / 1000


def compare(deployment, pids, count, call, *args):
    """Return the microseconds of the processes, and of the server, by `count`."""
    pids = list(pids)
    server = [deployment.admin.info("server")["process_id"]]
    before = cpu_time(pids)
    server_before = cpu_time(server)
    call(*args)
    spent = cpu_time(pids) - before
    server_spent = cpu_time(server) - server_before
    return spent / count, server_spent / count


def measure(deployment):
    settings = deployment.competitor.settings
    label = deployment.competitor.labels[0]
    deployment.clear()
    deployment.enqueue(50)
    count = settings["ENQUEUES"]
    client = [deployment.client.pid]
    enqueue = compare(deployment, client, count, deployment.enqueue, count)
    deployment.clear()
    deployment.work(label)
    workers = deployment.processes()
    count = 2 * settings["WORKERS"][label][1]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    first, _ = deployment.enqueue(count, "enqueue_many")
    arguments = deployment, workers, first, count
    run = compare(deployment, workers, count, run_all, *arguments)
    return {
        ("", "enqueue, client"): enqueue[0],
        ("", "enqueue, server"): enqueue[1],
        ("", "run, worker"): run[0],
        ("", "run, server"): run[1],
    }


def run_all(deployment, workers, first, count):
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    deployment.wait_for_runs(first, count)


def measure_floor(deployment):
    deployment.call("figure", "ping", 100)
    pids = [deployment.client.pid]
    arguments = "figure", "ping", PINGS
    client, server = compare(deployment, pids, PINGS, deployment.call, *arguments)
    return {("", "ping, client"): client, ("", "ping, server"): server}
