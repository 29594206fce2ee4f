"""Does it get slower the more jobs are queued?

Fills a queue in bulk to 10^3, 10^4 and 10^5 jobs, with --long also to 10^6; at that depth it
enqueues one by one, and then a worker in one process runs the first jobs of them.  One pass.
"""

from __future__ import annotations

import time

WHEN = "once"
RIVALS = ["microq", "rq", "huey"]
DEPTHS = [10**3, 10**4, 10**5, 10**6]
SLICE = 1.5  # run so long at each depth, in seconds


def ask(session, long=False):
    found, label = {}, session.rival.labels[0]
    for depth in DEPTHS if long else DEPTHS[:-1]:
        session.clear()
        first = session.next
        for _ in range(depth // 1000):
            session.enqueue(1000, "enqueue_many")
        _, seconds = session.enqueue(300)
        session.work(label, ready=False)
        times = begun(session, first, depth)
        session.stop()
        found["enqueue", depth] = 300 / seconds
        found["drain", depth] = (len(times) - 1) / (times[-1] - times[0])
    return found


def begun(session, first, depth):
    """Let the worker run for a while; return when its jobs began, but for the first 50."""
    session.delivered(first, 50)
    deadline = time.monotonic() + SLICE
    while time.monotonic() < deadline and bytes(
        session.runs[first : first + depth]
    ).count(0):
        time.sleep(0.05)
    return sorted(filter(None, session.times[first + 50 : first + depth]))
