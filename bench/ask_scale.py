"""How many queued jobs do two processes run in a second?  To compare with one, from ask_drain."""

from __future__ import annotations

from ask_drain import drain

WHEN = "rounds"


def ask(session):
    label = session.rival.usual
    return drain(session, label, 2 * session.rival.says["WORKERS"][label][1], 2)
