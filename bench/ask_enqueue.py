"""How many jobs can one process enqueue in a second, one by one and in bulk?

The floors: Redis.ping(), a round trip on a bare socket, and LPUSH in pipelines of
1,000, where each command has as many bytes as a job of microq's enqueue_many. Commands
and round trips are the server's own counts; commands that a script calls are included.
"""

from __future__ import annotations

from competitors import Failure

WHEN = "rounds"
# Bytes of a job in a request of microq's enqueue_many; measured before the floor.
measured = {"bulk bytes": 150}


def measure(deployment):
    count = deployment.competitor.settings["ENQUEUES"]
    figures = enqueue(deployment, "enqueue", count, "one by one")
    if deployment.call("offers", "enqueue_many"):
        figures |= enqueue(deployment, "enqueue_many", 5 * count, "in bulk")
    return figures


def enqueue(deployment, function, count, name):
    deployment.clear()
    deployment.enqueue(50, function)
    before = deployment.traffic()
    _, seconds = deployment.enqueue(count, function)
    after = deployment.traffic()
    commands, round_trips, size = [
        (b - a) / count for a, b in zip(before, after, strict=True)
    ]
    waiting = deployment.call("waiting")
    if waiting != count + 50:
        raise Failure(f"{waiting} jobs are queued, not {count + 50}")
    if deployment.competitor.name == "microq" and function == "enqueue_many":
        measured["bulk bytes"] = int(size)
    return {
        ("", f"{name}, per second"): count / seconds,
        ("", f"{name}, commands"): commands,
        ("", f"{name}, round trips"): round_trips,
    }


def measure_floor(deployment):
    ping = deployment.call("figure", "ping", 3000)
    trip = deployment.call("figure", "trip", 5000)
    push = deployment.call("figure", "push", 20000, measured["bulk bytes"])
    return {
        ("", "ping, per second"): ping,
        ("", "round trip, per second"): trip,
        ("", "pipelined LPUSH, per second"): push,
    }
