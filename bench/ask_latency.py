"""How long does it take from the call of enqueue to the first line of the job, on an idle worker?

Jobs come after random pauses of 20 to 40 ms.
"""

from __future__ import annotations

WHEN = "rounds"
COUNT = 25


def ask(session):
    session.work()
    first = session.new(COUNT)
    moments = session.ask("enqueue_at_times", first, COUNT, 0.02, 0.04)
    session.delivered(first, COUNT)
    delays = [session.times[first + i] - moment for i, moment in enumerate(moments)]
    return {(session.rival.usual, "ms"): [1000 * delay for delay in delays]}
