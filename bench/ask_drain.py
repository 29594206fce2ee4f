"""How many queued jobs does one worker in one process run in a second: no-ops, and of 1 ms of work?

Each rival in every configuration of one process that its adapter names.  A fork for every job is
asked elsewhere.
"""

from __future__ import annotations

WHEN = "rounds"
BUSY = 200  # jobs of 1 ms


def ask(session):
    """The usual configuration comes last, since its worker serves the next question too."""
    found, says = {}, session.rival.says
    for label in sorted(session.rival.labels, key=session.rival.usual.__eq__):
        if label != says.get("FORKS"):
            busy = (
                BUSY if label in (session.rival.labels[0], session.rival.usual) else 0
            )
            found |= drain(session, label, says["WORKERS"][label][1], 1, busy)
    return found


def drain(session, label, count, processes, busy=0):
    """Queue no-ops and `busy` jobs of 1 ms, then start the workers."""
    session.clear()
    first, _ = session.enqueue(count, "enqueue_many")
    slow, _ = session.enqueue(busy, "enqueue_many", "busy")
    before = session.traffic()
    session.work(label, processes, ready=False)
    session.delivered(first, count)
    after = session.traffic()
    found = {
        (label, "no-ops, per second"): session.rate(first, count),
        (label, "commands"): (after[0] - before[0]) / count,
        (label, "round trips"): (after[1] - before[1]) / count,
    }
    if busy:
        session.delivered(slow, busy)
        found[label, "1 ms, per second"] = session.rate(slow, busy)
    return found
