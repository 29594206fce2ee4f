"""How late does a delayed job begin, on an idle worker?

Jobs that are due after 2 s, enqueued at random moments of a second.  All rivals wait at the same
time, each on a server of its own.
"""

from __future__ import annotations

WHEN = "together"
COUNT = 20


def ask(session):
    session.clear()
    session.work()
    first = session.new(COUNT)
    due = session.ask("enqueue_later", first, COUNT, 2)
    session.delivered(first, COUNT)
    late = [session.times[first + i] - moment for i, moment in enumerate(due)]
    return {(session.rival.usual, "ms late"): [1000 * value for value in late]}
