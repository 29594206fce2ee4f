"""How long does it take from the call of enqueue to the first line of the job, on an idle worker?

Jobs come after random pauses of 20 to 40 ms.  The floor: Redis.ping() after such pauses, which
takes longer than one ping after the other.
"""

from __future__ import annotations

WHEN = "rounds"
COUNT = 25
PAUSE = 0.02, 0.04  # seconds


def ask(session):
    session.work()
    first = session.new(COUNT)
    moments = session.ask("enqueue_at_times", first, COUNT, *PAUSE)
    session.delivered(first, COUNT)
    delays = [session.times[first + i] - moment for i, moment in enumerate(moments)]
    return {(session.rival.usual, "ms"): [1000 * delay for delay in delays]}


def floor(session):
    return {("", "ms"): session.ask("figure", "slow_pings", COUNT, *PAUSE)}
