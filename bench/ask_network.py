"""How many jobs are enqueued one by one, and run by one worker, where a round trip takes 1 ms more?

Client and worker reach the server through proxy.py, which passes on what they send 1 ms later.  The
floor is Redis.ping() by the same way.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from ask_drain import drain
from rivals import HERE

WHEN = "rounds"
RIVALS = ["microq", "rq", "huey", "wakaq"]
SECONDS = 0.001


@contextlib.contextmanager
def slow(session):
    """Make the network of a session slow."""
    near, path = session.url, Path(session.url.removeprefix("unix://") + "-slow")
    command = [
        sys.executable,
        HERE / "proxy.py",
        path,
        near.removeprefix("unix://"),
        str(SECONDS),
    ]
    session.stop()
    session.leave()
    running = subprocess.Popen(command)
    try:
        while not path.exists():
            time.sleep(0.01)
        session.url = f"unix://{path}"
        yield
    finally:
        session.stop()
        session.leave()
        session.url = near
        running.kill()
        running.wait()
        path.unlink()


def ask(session):
    label = session.rival.usual
    with slow(session):
        session.enqueue(10)
        _, seconds = session.enqueue(60)
        count = max(40, session.rival.says["WORKERS"][label][1] // 10)
        rate = drain(session, label, count, 1)[label, "no-ops, per second"]
    return {
        (label, "enqueue, per second"): 60 / seconds,
        (label, "no-ops, per second"): rate,
    }


def floor(session):
    with slow(session):
        return {("", "ping, per second"): session.ask("figure", "ping", 200)}
