"""How many bytes does Redis need for a queued and for a finished no-op job, whose
argument is a number?

The memory that the server has allocated, without the buffers of its clients, before and
after up to 500 jobs. Finished jobs are measured while the worker that has run as many
jobs before is idle.
"""

from __future__ import annotations

import time

WHEN = "together"


def measure(deployment):
    count = min(500, deployment.competitor.settings["ENQUEUES"] // 4)
    deployment.clear()
    deployment.enqueue(50, "enqueue_many")
    before = used_memory(deployment)
    first, _ = deployment.enqueue(count, "enqueue_many")
    queued = used_memory(deployment) - before
    deployment.work()
    deployment.wait_for_runs(first, count)
    before = used_memory(deployment)
    first, _ = deployment.enqueue(2 * count)
    deployment.wait_for_runs(first, 2 * count)
    finished = used_memory(deployment) - before
    return {
        ("", "queued"): queued / count,
        ("", "finished"): finished / (2 * count),
    }


def used_memory(deployment):
    # Until then outcomes are recorded, and hash tables that grew are moved.
    time.sleep(1)
    info = deployment.admin.info("memory")
    return info["used_memory"] - info["mem_clients_normal"]
