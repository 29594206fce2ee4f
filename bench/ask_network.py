"""How many jobs are enqueued one by one, and run by one worker, if a round trip takes 1
ms more?

Client and worker reach the server through proxy.py, which passes on requests 1 ms
later. The floor: Redis.ping() through the same proxy.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from ask_drain import drain
from competitors import HERE

WHEN = "rounds"
COMPETITORS = ["microq", "rq", "huey", "wakaq"]
SECONDS = 0.001


@contextlib.contextmanager
def slow_network(deployment):
    """Have the client and the workers of a deployment use the proxy."""
    url = deployment.url
    target = url.removeprefix("unix://")
    path = Path(target + "-slow")
    command = [sys.executable, HERE / "proxy.py", path, target, str(SECONDS)]
    deployment.stop_workers()
    deployment.stop_client()
    proxy = subprocess.Popen(command)
    try:
        while not path.exists():
            time.sleep(0.01)
        deployment.url = f"unix://{path}"
        yield
    finally:
        deployment.stop_workers()
        deployment.stop_client()
        deployment.url = url
        proxy.kill()
        proxy.wait()
        path.unlink()


def measure(deployment):
    label = deployment.competitor.usual
    usual_count = deployment.competitor.settings["WORKERS"][label][1]
    with slow_network(deployment):
        deployment.enqueue(10)
        _, seconds = deployment.enqueue(60)
        figures = drain(deployment, label, max(40, usual_count // 10), 1)
    return {
        (label, "enqueue, per second"): 60 / seconds,
        (label, "no-ops, per second"): figures[label, "no-ops, per second"],
    }


def measure_floor(deployment):
    with slow_network(deployment):
        pings = deployment.call("figure", "ping", 200)
    return {("", "ping, per second"): pings}
