"""How many jobs can one event loop enqueue in a second, one by one, and by 50 tasks?

Also, of microq: how late is the latest tick of a timer on the loop (ms), while the
server is paused for a second, and 200 calls and waits for results are under way?
"""

from __future__ import annotations

from competitors import Failure

WHEN = "rounds"
COMPETITORS = ["microq", "arq", "saq", "taskiq", "streaq"]
TASKS = {"one by one": 1, "50 tasks": 50}


def measure(deployment):
    figures = {}
    for name, tasks in TASKS.items():
        deployment.clear()
        deployment.enqueue_in_tasks(50, tasks)
        count = deployment.competitor.settings["ENQUEUES"] * (2 if tasks > 1 else 1)
        seconds = deployment.enqueue_in_tasks(count, tasks)
        waiting = deployment.call("waiting")
        if waiting != count + 50:
            raise Failure(f"{waiting} jobs are queued, not {count + 50}")
        figures["", f"{name}, per second"] = count / seconds
    if deployment.call("offers", "late_tick"):
        figures["", "late tick, ms"] = 1000 * deployment.call("figure", "late_tick")
    return figures
