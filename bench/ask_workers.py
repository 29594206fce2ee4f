"""How many no-op jobs do 1, 2, 4 and 8 worker processes run in a second?  One pass."""

from __future__ import annotations

from ask_drain import drain

WHEN = "once"
RIVALS = ["microq", "rq", "huey"]
PROCESSES = [1, 2, 4, 8]


def ask(session, long=False):
    label = session.rival.usual
    count = 2 * session.rival.says["WORKERS"][label][1]
    name = "no-ops, per second"
    return {
        ("drain", n): drain(session, label, count, n)[label, name] for n in PROCESSES
    }
