"""Medians, spreads and ratios of what was found, and what microq aims at."""

from __future__ import annotations

import math
import statistics

NOOPS = "no-ops, per second"
SINGLE, BULK = "one by one, per second", "in bulk, per second"


def number(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percentile(values, part):
    """Return the value that `part` of all are not above (nearest rank)."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def spread(values):
    """Write the median, and in parentheses the least and the most."""
    if len(values) < 2:
        return number(values[0])
    middle, *ends = map(number, (statistics.median(values), min(values), max(values)))
    return f"{middle} ({ends[0]} to {ends[1]})"


class Figures:
    """Medians, spreads and ratios; a place is (question, rival, label, figure)."""

    def __init__(self, results):
        self.results = results

    def rounds(self, place):
        """Return a number for each round, None where there is none; of latencies the medians."""
        question, rival, label, figure = place
        column = self.results.values.get((question, rival), {}).get((label, figure), [])
        return [
            statistics.median(each) if isinstance(each, list) else each
            for each in column
        ]

    def median(self, *place):
        """Return the median of the rounds, or what stands there instead of a number."""
        found = [value for value in self.rounds(place) if value is not None]
        if not found or any(isinstance(value, str) for value in found):
            return next((value for value in found if isinstance(value, str)), None)
        return statistics.median(found)

    def cell(self, *place):
        """Return the median with its spread, or why there is none."""
        middle = self.median(*place)
        if middle is None or isinstance(middle, str):
            return number(middle)
        return spread([value for value in self.rounds(place) if value is not None])

    def ratios(self, one, other):
        """Return the ratio of two figures within each round that has both."""
        pairs = zip(self.rounds(one), self.rounds(other), strict=False)
        return [a / b for a, b in pairs if a is not None and b is not None]

    def all_of(self, *place):
        """Return all latencies of all rounds."""
        question, rival, label, figure = place
        column = self.results.values.get((question, rival), {}).get((label, figure), [])
        return [value for each in column if each for value in each]


# ---- What microq aims at -------------------------------------------------------------------------

ONE, CHILD = (
    ("drain", "microq", "in-process", NOOPS),
    ("drain", "microq", "default", NOOPS),
)
TWO, FORK = (
    ("scale", "microq", "default", NOOPS),
    ("fork", "microq", "fork per job", NOOPS),
)
ENQUEUE, MANY = ("enqueue", "microq", "", SINGLE), ("enqueue", "microq", "", BULK)
LATENCY, PING = (
    ("latency", "microq", "default", "ms"),
    ("enqueue", "floor", "", "ping, per second"),
)
SIMPLE, WORKER = ("drain", "rq", "SimpleWorker", NOOPS), ("fork", "rq", "Worker", NOOPS)
FORKS = ("fork", "floor", "", "bare forks, per second")
PUSH = ("enqueue", "floor", "", "pipelined LPUSH, per second")
PAUSED = ("latency", "floor", "", "ms")
RATIOS = [  # what, the aim, and of which two figures it is the ratio
    ("run in one process, to RQ's SimpleWorker", ">= 100", ONE, SIMPLE),
    ("jobs run in one process for each `Redis.ping()`", ">= 3", ONE, PING),
    ("run in one forked child (the default), to in-process", ">= 0.9", CHILD, ONE),
    ("two processes, to one", ">= 1.5", TWO, CHILD),
    (
        "a fork for every job, to bare fork + exit + wait, one by one",
        ">= 0.7",
        FORK,
        FORKS,
    ),
    ("a fork for every job, to RQ's Worker", ">= 1.5", FORK, WORKER),
    ("enqueue, to `Redis.ping()`", ">= 1", ENQUEUE, PING),
    ("enqueue, to RQ", ">= 5", ENQUEUE, ("enqueue", "rq", "", SINGLE)),
    ("enqueue in bulk, to RQ", ">= 12", MANY, ("enqueue", "rq", "", BULK)),
    ("enqueue in bulk, to pipelined LPUSH of the same bytes", ">= 0.5", MANY, PUSH),
    ("latency p50, in pings that come after the same pauses", "<= 3", LATENCY, PAUSED),
]
BYTES = {"queued": 250, "finished": 350}


def aims(figures):
    """Return rows of (what, aim, values, note); an aim is an operator and a number."""
    rows = [(what, aim, figures.ratios(a, b), "") for what, aim, a, b in RATIOS]
    pairs = zip(figures.rounds(LATENCY), figures.rounds(PING), strict=False)
    pings = [ms * per_second / 1000 for ms, per_second in pairs if ms and per_second]
    rows.append(("latency p50, in pings one after the other", "<= 3", pings, ""))
    rows.append(
        against_all(figures, "run in one process, to the fastest rival", ">= 1", ONE)
    )
    rows.append(
        against_all(figures, "latency p50, to the quickest rival", "<= 1", LATENCY)
    )
    for state, bound in BYTES.items():
        value = figures.median("bytes", "microq", "", state)
        values = [value] if value is not None else []
        rows.append((f"bytes in Redis of a {state} job", f"<= {bound}", values, ""))
    return rows


def against_all(figures, what, aim, place):
    """Compare with every rival in every configuration; the worst of these ratios counts."""
    question, _, _, figure = place
    others = [
        (question, rival, label, name)
        for (asked, rival), found in figures.results.values.items()
        for label, name in found
        if asked == question and name == figure and rival not in ("microq", "floor")
    ]
    found = [
        (ratios, other) for other in others if (ratios := figures.ratios(place, other))
    ]
    if not found:
        return what, aim, [], ""
    worst = min if aim.startswith(">=") else max
    ratios, other = worst(found, key=lambda pair: statistics.median(pair[0]))
    return what, aim, ratios, f", {other[1]}, {other[2]}"


def is_met(aim, values):
    sign, bound = aim.split()
    middle = statistics.median(values)
    return middle >= float(bound) if sign == ">=" else middle <= float(bound)
