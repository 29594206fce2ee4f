"""How many no-op jobs do 1, 2, 4 and 8 worker processes run in a second?  One pass."""

from __future__ import annotations

from ask_drain import drain

WHEN = "once"
COMPETITORS = ["microq", "rq", "huey"]
PROCESSES = [1, 2, 4, 8]


def measure(deployment, long=False):
    label = deployment.competitor.usual
    count = 2 * deployment.competitor.settings["WORKERS"][label][1]
    figures = {}
    for processes in PROCESSES:
        drained = drain(deployment, label, count, processes)
        figures["drain", processes] = drained[label, "no-ops, per second"]
    return figures
