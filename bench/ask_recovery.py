"""How long after its process, or its whole worker, was killed by SIGKILL does a job begin again?

The killed worker is started again at once, which the time includes.  Leases and the like are as
short as 2 s where there is an option, as the adapters say; most defaults are longer.  All rivals
wait at the same time, each on a server of its own.
"""

from __future__ import annotations

import os
import signal
import time

WHEN = "together"
BOUND = 30  # seconds


def ask(session):
    label = session.rival.says.get("RECOVERS", session.rival.usual)
    found = {}
    for what in ("its process", "the whole worker"):
        session.clear()
        session.leave()
        session.work(label, lease="short")
        number, _ = session.enqueue(1, func="stay")
        session.delivered(number, 1)
        time.sleep(0.5)
        pid = session.pids[number]
        if what == "its process" and pid in [
            process.pid for process in session.running
        ]:
            found[label, what] = "it is the worker"
            continue
        began = time.monotonic()
        if what == "its process":
            os.kill(pid, signal.SIGKILL)
        else:
            session.stop()
            session.work(label, lease="short", ready=False)
        found[label, what] = again(session, number, began)
    return found


def again(session, number, began):
    while session.runs[number] < 2 and time.monotonic() < began + BOUND:
        if all(process.poll() is not None for process in session.running):
            session.work(*session.kind, ready=False)
        time.sleep(0.01)
    if session.runs[number] < 2:
        return f"not within {BOUND} s"
    return session.times[number] - began
