"""How long does a Python process take that only imports the library?

Its bytecode is in a cache, from a first run that does not count.
"""

from __future__ import annotations

import subprocess
import time

WHEN = "rounds"


def run_python(deployment, code):
    """Return the milliseconds of the second of two runs."""
    environment = deployment.environment()
    environment["PYTHONPYCACHEPREFIX"] = f"{deployment.marks}.bytecode"
    command = [deployment.competitor.python, "-c", code]
    for _ in range(2):
        begun_at = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
    return 1000 * (time.perf_counter() - begun_at)


def measure(deployment):
    code = deployment.competitor.settings["IMPORT"]
    return {("", "ms"): run_python(deployment, code)}


def measure_floor(deployment):
    return {
        ("", "nothing, ms"): run_python(deployment, ""),
        ("", "redis, ms"): run_python(deployment, "import redis"),
    }
