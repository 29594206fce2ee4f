"""How long after a SIGKILL of its process, or of its whole worker, does a job begin
again?

The killed worker is started again at once; that time is included. Leases and similar
options are as short as 2 s where there is an option, as the adapters say; most defaults
are longer. All competitors are measured at the same time, each on a server of its own.
"""

from __future__ import annotations

import os
import signal
import time

WHEN = "together"
BOUND = 30  # seconds


def measure(deployment):
    competitor = deployment.competitor
    label = competitor.settings.get("RECOVERS", competitor.usual)
    return {
        (label, "its process"): kill_process(deployment, label),
        (label, "the whole worker"): kill_worker(deployment, label),
    }


def start_job(deployment, label):
    """Start a worker and a job that runs until killed; return the job's number."""
    deployment.clear()
    deployment.stop_client()
    deployment.work(label, lease="short")
    number, _ = deployment.enqueue(1, job="stay")
    deployment.wait_for_runs(number, 1)
    time.sleep(0.5)
    return number


def kill_process(deployment, label):
    """Return the seconds until the job of a killed process begins again, or why not."""
    number = start_job(deployment, label)
    pid = deployment.pids[number]
    if any(process.pid == pid for process in deployment.workers):
        return "it is the worker"
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return time_of_recovery(deployment, number, killed_at)


def kill_worker(deployment, label):
    """Return the seconds until the job of a killed worker begins again, or why not."""
    number = start_job(deployment, label)
    killed_at = time.monotonic()
    deployment.stop_workers()
    deployment.work(label, lease="short", warm_up=False)
    return time_of_recovery(deployment, number, killed_at)


def time_of_recovery(deployment, number, killed_at):
    while deployment.runs[number] < 2:
        if time.monotonic() > killed_at + BOUND:
            return f"not within {BOUND} s"
        if all(process.poll() is not None for process in deployment.workers):
            deployment.work(*deployment.kind, warm_up=False)
        time.sleep(0.01)
    return deployment.times[number] - killed_at
