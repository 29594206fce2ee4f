"""Does a queue get slower the more jobs are queued?

Fills a queue in bulk to 10^3, 10^4 and 10^5 jobs, with --long also to 10^6. At each
depth it enqueues one by one, and then a worker in one process runs the first jobs of
the queue. One pass.
"""

from __future__ import annotations

import time

WHEN = "once"
COMPETITORS = ["microq", "rq", "huey"]
DEPTHS = [10**3, 10**4, 10**5]
LONG_DEPTHS = [*DEPTHS, 10**6]
SECONDS = 1.5  # that the worker runs at each depth


def measure(deployment, long=False):
    figures = {}
    label = deployment.competitor.labels[0]
    for depth in LONG_DEPTHS if long else DEPTHS:
        deployment.clear()
        first = deployment.next_number
        for _ in range(depth // 1000):
            deployment.enqueue(1000, "enqueue_many")
        _, seconds = deployment.enqueue(300)
        deployment.work(label, warm_up=False)
        times = begin_times(deployment, first, depth)
        deployment.stop_workers()
        figures["enqueue", depth] = 300 / seconds
        figures["drain", depth] = (len(times) - 1) / (times[-1] - times[0])
    return figures


def begin_times(deployment, first, depth):
    """Let the worker run for SECONDS; return when its jobs began, but for 50."""
    deployment.wait_for_runs(first, 50)
    deadline = time.monotonic() + SECONDS
    runs = deployment.runs[first : first + depth]
    while time.monotonic() < deadline and bytes(runs).count(0):
        time.sleep(0.05)
    times = deployment.times[first + 50 : first + depth]
    return sorted(begun_at for begun_at in times if begun_at)
