"""How long does it take from the call of enqueue to the first line of the job, on an
idle worker?

Jobs are enqueued after random pauses of 20 to 40 ms. The floor: Redis.ping() after such
pauses, which takes longer than pings without pauses.
"""

from __future__ import annotations

WHEN = "rounds"
COUNT = 25
PAUSE = 0.02, 0.04  # seconds


def measure(deployment):
    deployment.work()
    first = deployment.reserve_numbers(COUNT)
    call_times = deployment.call("enqueue_at_times", first, COUNT, *PAUSE)
    deployment.wait_for_runs(first, COUNT)
    latencies = []
    for number, called_at in enumerate(call_times, first):
        seconds = deployment.times[number] - called_at
        latencies.append(1000 * seconds)
    return {(deployment.competitor.usual, "ms"): latencies}


def measure_floor(deployment):
    durations = deployment.call("figure", "slow_pings", COUNT, *PAUSE)
    return {("", "ms"): durations}
