"""How many no-op jobs run in a second if each has a process of its own?

The floor: fork, exit and wait of a process that has a microq worker in memory.
"""

from __future__ import annotations

WHEN = "rounds"


def ask(session):
    label = session.rival.says.get("FORKS")
    if label is None:
        return {}
    session.clear()
    count = session.rival.says["WORKERS"][label][1]
    first, _ = session.enqueue(count, "enqueue_many")
    session.work(label, ready=False)
    session.delivered(first, count)
    return {(label, "no-ops, per second"): session.rate(first, count)}


def floor(session):
    return {("", "bare forks, per second"): session.ask("figure", "fork", 120)}
