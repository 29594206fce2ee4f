"""How many bytes does Redis need for a queued no-op job with a number as its argument, and for a
finished one?

What the server has allocated, without the buffers of its clients, before and after up to 500 jobs;
the finished ones while the worker that ran as many before is there.
"""

from __future__ import annotations

import time

WHEN = "together"


def ask(session):
    count = min(500, session.rival.says["ENQUEUES"] // 4)
    session.clear()
    session.enqueue(50, "enqueue_many")
    before = used(session)
    first, _ = session.enqueue(count, "enqueue_many")
    queued = used(session) - before
    session.work()
    session.delivered(first, count)
    before = used(session)
    first, _ = session.enqueue(2 * count)
    session.delivered(first, 2 * count)
    finished = used(session) - before
    return {("", "queued"): queued / count, ("", "finished"): finished / count / 2}


def used(session):
    time.sleep(1)  # what has ended is recorded, and tables that grew have moved
    info = session.admin.info("memory")
    return info["used_memory"] - info["mem_clients_normal"]
