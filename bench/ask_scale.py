"""How many queued jobs do two processes run in a second?

Compare with one process, the question of ask_drain.py.
"""

from __future__ import annotations

from ask_drain import drain

WHEN = "rounds"


def measure(deployment):
    label = deployment.competitor.usual
    count = 2 * deployment.competitor.settings["WORKERS"][label][1]
    return drain(deployment, label, count, 2)
