"""How many queued jobs does one worker in one process run in a second: no-ops, and of 1
ms of work?

Each competitor in every configuration of one process that its adapter names. A fork for
every job is another question. Workers that can run many jobs at once in one process
also run no-ops that way: 10 and 100 coroutines at once, 10 functions at once.
"""

from __future__ import annotations

WHEN = "rounds"
BUSY = 200  # jobs of 1 ms
AT_ONCE = {"coroutines": [10, 100], "functions": [10]}
NOOPS = {"coroutines": "noop_coroutine", "functions": "noop"}


def measure(deployment):
    competitor = deployment.competitor
    labels = [label for label in competitor.labels if label != competitor.usual]
    # The usual configuration comes last, since its worker serves the next question too.
    labels.append(competitor.usual)
    figures = {}
    for label, kind in competitor.concurrent_kinds():
        for at_once in AT_ONCE[kind]:
            figures |= drain_at_once(deployment, label, kind, at_once)
    for label in labels:
        if label == competitor.settings.get("FORKS"):
            continue
        with_busy_jobs = label in (competitor.labels[0], competitor.usual)
        count = competitor.settings["WORKERS"][label][1]
        figures |= drain(deployment, label, count, 1, BUSY if with_busy_jobs else 0)
    return figures


def drain(deployment, label, count, processes, busy=0):
    """Queue no-ops and `busy` jobs of 1 ms, start the workers, return the figures."""
    deployment.clear()
    first, _ = deployment.enqueue(count, "enqueue_many")
    first_busy, _ = deployment.enqueue(busy, "enqueue_many", "busy")
    commands, reads, _ = deployment.traffic()
    deployment.work(label, processes, warm_up=False)
    deployment.wait_for_runs(first, count)
    commands_after, reads_after, _ = deployment.traffic()
    figures = {
        (label, "no-ops, per second"): deployment.rate(first, count),
        (label, "commands"): (commands_after - commands) / count,
        (label, "round trips"): (reads_after - reads) / count,
    }
    if busy:
        deployment.wait_for_runs(first_busy, busy)
        figures[label, "1 ms, per second"] = deployment.rate(first_busy, busy)
    return figures


def drain_at_once(deployment, label, kind, at_once):
    """Queue no-ops, start a worker that runs many at once, return its rate."""
    count = deployment.competitor.settings["CONCURRENT"][label][2]
    deployment.clear()
    first, _ = deployment.enqueue(count, "enqueue_many", NOOPS[kind])
    deployment.work(label, at_once=at_once, warm_up=False)
    deployment.wait_for_runs(first, count)
    name = f"{kind}, {at_once} at once, per second"
    return {(label, name): deployment.rate(first, count)}
