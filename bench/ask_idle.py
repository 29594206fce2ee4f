"""What does an idle worker cost: commands to the server, CPU and memory?

Over 5 seconds, 5 seconds after its last job; all rivals wait at the same time, each on a server of
its own.  Memory is that of all processes of the worker; what they share counts once (PSS).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

WHEN = "together"
SECONDS = 5


def ask(session):
    session.clear()
    session.work()
    session.leave()
    time.sleep(5)
    before, spent = session.traffic(), cpu(session)
    time.sleep(SECONDS)
    after = session.traffic()
    return {
        ("", "commands per second"): (after[0] - before[0] - 1)
        / SECONDS,  # one is INFO
        ("", "round trips per second"): (after[1] - before[1] - 1) / SECONDS,
        ("", "CPU, ms per second"): 1000 * (cpu(session) - spent) / SECONDS,
        ("", "memory, MB"): sum(map(share, session.processes())) / 1e3,
        ("", "processes"): len(session.processes()),
    }


def cpu(session):
    """Return the seconds that the processes have used."""
    ticks = 0
    for pid in session.processes():
        user, system = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        )
        ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def share(pid):
    """Return the kB that a process has for itself, and its share of what it has with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
