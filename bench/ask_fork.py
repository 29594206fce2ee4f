"""How many no-op jobs run in a second if each job has a process of its own?

The floor: fork, exit and wait of a process that has a microq worker in memory.
"""

from __future__ import annotations

WHEN = "rounds"


def measure(deployment):
    settings = deployment.competitor.settings
    label = settings.get("FORKS")
    if label is None:
        return {}
    deployment.clear()
    count = settings["WORKERS"][label][1]
    first, _ = deployment.enqueue(count, "enqueue_many")
    deployment.work(label, warm_up=False)
    deployment.wait_for_runs(first, count)
    return {(label, "no-ops, per second"): deployment.rate(first, count)}


def measure_floor(deployment):
    forks = deployment.call("figure", "fork", 120)
    return {("", "bare forks, per second"): forks}
