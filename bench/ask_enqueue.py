"""How many jobs can one process enqueue in a second, one by one and in bulk?

The floors: Redis.ping(), a round trip on a bare socket, and LPUSH in pipelines of 1,000, each of as
many bytes on the wire as a job of microq's enqueue_many.  Commands and round trips are the server's
own counts; commands that a script calls are among them.
"""

from __future__ import annotations

from rivals import Failure

WHEN = "rounds"
KNOWN = {"bulk bytes": 150}  # on the wire for each job; microq's session says


def ask(session):
    count = session.rival.says["ENQUEUES"]
    found = measure(session, "enqueue", count, "one by one")
    if session.ask("offers", "enqueue_many"):
        found |= measure(session, "enqueue_many", 5 * count, "in bulk")
    return found


def measure(session, how, count, name):
    session.clear()
    session.enqueue(50, how)
    before = session.traffic()
    _, seconds = session.enqueue(count, how)
    spent = [(b - a) / count for a, b in zip(before, session.traffic(), strict=True)]
    if (waiting := session.ask("waiting")) != count + 50:
        raise Failure(f"{waiting} jobs are queued, not {count + 50}")
    if session.rival.name == "microq" and how == "enqueue_many":
        KNOWN["bulk bytes"] = spent[2]
    return {
        ("", f"{name}, per second"): count / seconds,
        ("", f"{name}, commands"): spent[0],
        ("", f"{name}, round trips"): spent[1],
    }


def floor(session):
    figures = {
        "ping": session.ask("figure", "ping", 3000),
        "round trip": session.ask("figure", "trip", 5000),
        "pipelined LPUSH": session.ask(
            "figure", "push", 20000, int(KNOWN["bulk bytes"])
        ),
    }
    return {("", f"{name}, per second"): value for name, value in figures.items()}
