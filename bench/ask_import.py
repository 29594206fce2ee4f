"""How long does a Python process take that does nothing but import the library?

Its bytecode is there already, from a run that does not count.
"""

from __future__ import annotations

import subprocess
import time

WHEN = "rounds"


def run(session, code):
    bytecode = {
        "PYTHONPYCACHEPREFIX": f"{session.marks}.bytecode",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    for _ in range(2):
        began = time.perf_counter()
        command = [session.rival.python, "-c", code]
        subprocess.run(command, check=True, env=session.environment() | bytecode)
    return 1000 * (time.perf_counter() - began)


def ask(session):
    return {("", "ms"): run(session, session.rival.says["IMPORT"])}


def floor(session):
    return {
        ("", "nothing, ms"): run(session, ""),
        ("", "redis, ms"): run(session, "import redis"),
    }
