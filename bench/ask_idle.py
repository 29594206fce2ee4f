"""What does an idle worker cost: commands to the server, CPU and memory?

Over 5 seconds, 5 seconds after its last job. All competitors are measured at the same
time, each on a server of its own. Memory is that of all processes of the worker; memory
that they share counts once (PSS).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

WHEN = "together"
SECONDS = 5


def measure(deployment):
    deployment.clear()
    deployment.work()
    deployment.stop_client()
    time.sleep(5)
    commands, reads, _ = deployment.traffic()
    cpu = cpu_seconds(deployment)
    time.sleep(SECONDS)
    commands_after, reads_after, _ = deployment.traffic()
    cpu_after = cpu_seconds(deployment)
    # traffic() itself sends one command: INFO.
    return {
        ("", "commands per second"): (commands_after - commands - 1) / SECONDS,
        ("", "round trips per second"): (reads_after - reads - 1) / SECONDS,
        ("", "CPU, ms per second"): 1000 * (cpu_after - cpu) / SECONDS,
        ("", "memory, MB"): sum(map(memory, deployment.processes())) / 1000,
        ("", "processes"): len(deployment.processes()),
    }


def cpu_seconds(deployment):
    """Return the seconds that the worker's processes have spent on a CPU."""
    ticks = 0
    for pid in deployment.processes():
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        user, system = fields[11:13]
        ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pid):
    """Return the kB of a process: its own pages, and its share of pages with others."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    for line in text.split("\n"):
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0
