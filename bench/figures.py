"""What do the measured values say?  Medians, spreads and ratios, and microq's aims.

A place names values: (question, competitor, label, figure).
"""

from __future__ import annotations

import math
import statistics

NOOPS = "no-ops, per second"
SINGLE = "one by one, per second"
BULK = "in bulk, per second"


def number(value):
    """Write a number with three digits or more; return a text as it is, None as ""."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percentile(values, part):
    """Return the smallest value that is at least as high as `part` of all values."""
    rank = math.ceil(part * len(values))  # nearest rank
    return sorted(values)[rank - 1]


def spread(values):
    """Write the median, and in parentheses the lowest and the highest value."""
    if len(values) < 2:
        return number(values[0])
    median = number(statistics.median(values))
    return f"{median} ({number(min(values))} to {number(max(values))})"


class Figures:
    """Medians, spreads and ratios of results."""

    def __init__(self, results):
        self.results = results

    def column(self, place):
        question, competitor, label, figure = place
        columns = self.results.values.get((question, competitor), {})
        return columns.get((label, figure), [])

    def rounds(self, place):
        """Return a value for each round, or None; for latencies the median."""
        values = []
        for entry in self.column(place):
            if isinstance(entry, list):
                values.append(statistics.median(entry))
            else:
                values.append(entry)
        return values

    def median(self, *place):
        """Return the median of the rounds, a text in place of a number, or None."""
        values = [value for value in self.rounds(place) if value is not None]
        texts = [value for value in values if isinstance(value, str)]
        if texts:
            return texts[0]
        if not values:
            return None
        return statistics.median(values)

    def cell(self, *place):
        """Write the median with its spread, or the text in place of a number."""
        median = self.median(*place)
        if median is None or isinstance(median, str):
            return number(median)
        return spread([value for value in self.rounds(place) if value is not None])

    def ratios(self, place, other):
        """Return the ratio of two places, for each round that has values of both."""
        ratios = []
        pairs = zip(self.rounds(place), self.rounds(other), strict=False)
        for value, other_value in pairs:
            if value is not None and other_value is not None:
                ratios.append(value / other_value)
        return ratios

    def all_of(self, *place):
        """Return all latencies of all rounds."""
        latencies = []
        for entry in self.column(place):
            if entry:
                latencies += entry
        return latencies


# ---- microq's aims -------------------------------------------------------------------

IN_PROCESS = ("drain", "microq", "in-process", NOOPS)
CHILD = ("drain", "microq", "default", NOOPS)
TWO = ("scale", "microq", "default", NOOPS)
FORK = ("fork", "microq", "fork per job", NOOPS)
ENQUEUE = ("enqueue", "microq", "", SINGLE)
MANY = ("enqueue", "microq", "", BULK)
LATENCY = ("latency", "microq", "default", "ms")
RQ_SIMPLE = ("drain", "rq", "SimpleWorker", NOOPS)
RQ_WORKER = ("fork", "rq", "Worker", NOOPS)
RQ_ENQUEUE = ("enqueue", "rq", "", SINGLE)
RQ_MANY = ("enqueue", "rq", "", BULK)
PING = ("enqueue", "floor", "", "ping, per second")
PAUSED_PING = ("latency", "floor", "", "ms")
BARE_FORK = ("fork", "floor", "", "bare forks, per second")
PUSH = ("enqueue", "floor", "", "pipelined LPUSH, per second")
RATIOS = [  # (name of the ratio, aim, the two places)
    ("run in one process, to RQ's SimpleWorker", ">= 100", IN_PROCESS, RQ_SIMPLE),
    ("jobs run in one process for each `Redis.ping()`", ">= 3", IN_PROCESS, PING),
    (
        "run in one forked child (the default), to in-process",
        ">= 0.9",
        CHILD,
        IN_PROCESS,
    ),
    ("two processes, to one", ">= 1.5", TWO, CHILD),
    (
        "a fork for every job, to bare fork + exit + wait, one by one",
        ">= 0.7",
        FORK,
        BARE_FORK,
    ),
    ("a fork for every job, to RQ's Worker", ">= 1.5", FORK, RQ_WORKER),
    ("enqueue, to `Redis.ping()`", ">= 1", ENQUEUE, PING),
    ("enqueue, to RQ", ">= 5", ENQUEUE, RQ_ENQUEUE),
    ("enqueue in bulk, to RQ", ">= 12", MANY, RQ_MANY),
    ("enqueue in bulk, to pipelined LPUSH of the same bytes", ">= 0.5", MANY, PUSH),
    ("latency p50, to pings after the same pauses", "<= 3", LATENCY, PAUSED_PING),
]
AWAITED = [("one by one", ">= 1.2"), ("50 tasks", ">= 3")]
BYTES = {"queued": 250, "finished": 350}
ON_ASYNCIO = ["arq", "saq", "streaq", "taskiq"]
ON_THREADS = ["dramatiq", "celery"]
WAITING = [  # (jobs, aim of their time as a ratio to the ideal, competitors)
    ("coroutines, 50 at once", "<= 1.05", ON_ASYNCIO),
    ("coroutines, 200 at once", "<= 1.1", ON_ASYNCIO),
    ("functions, 50 at once", "<= 1.1", ON_THREADS),
    ("functions, 200 at once", "<= 1.25", ON_THREADS),
]
DRAIN_AT_ONCE = [  # (no-op jobs, aim of their rate, competitors)
    ("coroutines, 100 at once", ">= 10", ON_ASYNCIO),
    ("coroutines, 100 at once", ">= 1", ["bullmq"]),
    ("functions, 10 at once", ">= 4", ["dramatiq"]),
]


def aims(figures):
    """Return rows of (name, aim, values, note); an aim is an operator and a number."""
    rows = []
    for name, aim, place, other in RATIOS:
        rows.append((name, aim, figures.ratios(place, other), ""))
    pings = latency_in_pings(figures)
    rows.append(("latency p50, to pings one after the other", "<= 3", pings, ""))
    name = "run in one process, to the fastest competitor"
    rows.append(against_all(figures, name, ">= 1", IN_PROCESS))
    name = "latency p50, to the fastest competitor"
    rows.append(against_all(figures, name, "<= 1", LATENCY))
    for state, bound in BYTES.items():
        value = figures.median("bytes", "microq", "", state)
        values = [] if value is None else [value]
        name = f"bytes in Redis of a {state} job"
        rows.append((name, f"<= {bound}", values, ""))
    rows += awaited_aims(figures)
    return rows + waiting_aims(figures) + drain_at_once_aims(figures)


def awaited_aims(figures):
    """Return rows of calls on an event loop, beside the fastest competitor."""
    rows = []
    for calls, aim in AWAITED:
        place = ("awaited", "microq", "", f"{calls}, per second")
        name = f"enqueue on an event loop, {calls}, to the fastest competitor"
        rows.append(against_all(figures, name, aim, place))
    place = ("awaited", "microq", "", "late tick, ms")
    late = [value for value in figures.rounds(place) if value is not None]
    rows.append(
        ("late tick of the loop while the server is paused, ms", "<= 50", late, "")
    )
    return rows


def waiting_aims(figures):
    """Return rows of jobs that wait: time, time beside others, memory beside saq."""
    rows = []
    for jobs, aim, competitors in WAITING:
        place = ("waiting", "microq", "default", f"{jobs}, to the ideal")
        values = [value for value in figures.rounds(place) if value is not None]
        name = f"jobs that wait, {jobs}"
        rows.append((f"{name}: time to the ideal", aim, values, ""))
        name = f"{name}: time to the fastest of {', '.join(competitors)}"
        rows.append(against_all(figures, name, "<= 1", place, competitors))
    for jobs, _, competitors in WAITING:
        if "saq" in competitors:
            figure = f"{jobs}, memory, MB"
            place = ("waiting", "microq", "in-process", figure)
            ratios = figures.ratios(place, ("waiting", "saq", "asyncio", figure))
            name = f"jobs that wait, {jobs}: memory in-process to saq's"
            rows.append((name, "<= 1.2", ratios, ""))
    return rows


def drain_at_once_aims(figures):
    rows = []
    for jobs, aim, competitors in DRAIN_AT_ONCE:
        place = ("drain", "microq", "default", f"{jobs}, per second")
        name = f"no-ops, {jobs}, to the fastest of {', '.join(competitors)}"
        if len(competitors) == 1:
            name = f"no-ops, {jobs}, to {competitors[0]}"
        rows.append(against_all(figures, name, aim, place, competitors))
    return rows


def latency_in_pings(figures):
    """Return for each round the latency, in durations of a ping."""
    ratios = []
    pairs = zip(figures.rounds(LATENCY), figures.rounds(PING), strict=False)
    for milliseconds, pings_per_second in pairs:
        if milliseconds and pings_per_second:
            ratios.append(milliseconds * pings_per_second / 1000)
    return ratios


def against_all(figures, name, aim, place, competitors=None):
    """Compare with every configuration of competitors; return the worst row.

    competitors - their names; None: all
    """
    question, _, _, figure = place
    rows = []
    for (asked, competitor), columns in figures.results.values.items():
        if asked != question or competitor in ("microq", "floor"):
            continue
        if competitors and competitor not in competitors:
            continue
        for label, column_figure in columns:
            if column_figure != figure:
                continue
            other = (question, competitor, label, figure)
            ratios = figures.ratios(place, other)
            if ratios:
                rows.append((name, aim, ratios, f", {competitor}, {label}"))
    if not rows:
        return name, aim, [], ""
    worst = min if aim.startswith(">=") else max
    return worst(rows, key=median_of_row)


def median_of_row(row):
    return statistics.median(row[2])


def is_met(aim, values):
    operator, bound = aim.split()
    median = statistics.median(values)
    if operator == ">=":
        return median >= float(bound)
    return median <= float(bound)
