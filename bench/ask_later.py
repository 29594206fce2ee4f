"""How late does a delayed job begin, on an idle worker?

Jobs with a delay of 2 s, enqueued at random moments of a second. All competitors are
measured at the same time, each on a server of its own.
"""

from __future__ import annotations

WHEN = "together"
COUNT = 20


def measure(deployment):
    deployment.clear()
    deployment.work()
    first = deployment.reserve_numbers(COUNT)
    due_times = deployment.call("enqueue_later", first, COUNT, 2)
    deployment.wait_for_runs(first, COUNT)
    delays = []
    for number, due_at in enumerate(due_times, first):
        seconds = deployment.times[number] - due_at
        delays.append(1000 * seconds)
    return {(deployment.competitor.usual, "ms late"): delays}
