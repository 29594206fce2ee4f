"""The tables of README.md, in Markdown, from what was found."""

from __future__ import annotations

import functools
import importlib
import math
import os
import platform
import statistics
import subprocess
from importlib.metadata import version

from rivals import Rival

import microq

BEGIN, END = "<!-- what was measured, written by python -m bench -->", "<!-- end -->"
NOOPS = "no-ops, per second"
SINGLE, BULK = "one by one, per second", "in bulk, per second"


# ---- Numbers -------------------------------------------------------------------------------------


def number(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percentile(values, part):
    """Return the value that `part` of all are not above (nearest rank)."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


class Figures:
    """Medians, spreads and ratios; a place is (question, rival, label, figure)."""

    def __init__(self, results):
        self.results = results

    def rounds(self, place):
        """Return a number for each round, None where there is none; of latencies the medians."""
        question, rival, label, figure = place
        column = self.results.values.get((question, rival), {}).get((label, figure), [])
        return [statistics.median(each) if isinstance(each, list) else each for each in column]

    def median(self, *place):
        """Return the median of the rounds, or what stands there instead of a number."""
        found = [value for value in self.rounds(place) if value is not None]
        if not found or any(isinstance(value, str) for value in found):
            return next((value for value in found if isinstance(value, str)), None)
        return statistics.median(found)

    def cell(self, *place):
        """Return the median with its spread, or why there is none."""
        middle, found = self.median(*place), [v for v in self.rounds(place) if v is not None]
        if middle is None or isinstance(middle, str) or len(found) < 2:
            return number(middle)
        return f"{number(middle)} ({number(min(found))} to {number(max(found))})"

    def ratio(self, one, other):
        """Return the median of the ratios within the rounds, or None."""
        pairs = zip(self.rounds(one), self.rounds(other), strict=False)
        found = [a / b for a, b in pairs if a is not None and b is not None]
        return statistics.median(found) if found else None

    def all_of(self, *place):
        """Return all latencies of all rounds."""
        question, rival, label, figure = place
        column = self.results.values.get((question, rival), {}).get((label, figure), [])
        return [value for each in column if each for value in each]


def table(head, rows):
    rows = [[str(cell or "") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# ---- What was aimed at ---------------------------------------------------------------------------


def others(figures, question, figure):
    """Return the places of all rivals' figures."""
    return [
        (question, rival, label, name)
        for (asked, rival), found in figures.results.values.items()
        for label, name in found
        if asked == question and name == figure and rival not in ("microq", "floor")
    ]


def aims(figures):
    """Return rows of (what, aim, value, note), where an aim is (">=" or "<=", number)."""
    one, child = ("drain", "microq", "in-process", NOOPS), ("drain", "microq", "default", NOOPS)
    two, fork = ("scale", "microq", "default", NOOPS), ("fork", "microq", "fork per job", NOOPS)
    enqueue, latency = ("enqueue", "microq", "", SINGLE), ("latency", "microq", "default", "ms")
    bulk, ping = ("enqueue", "microq", "", BULK), ("enqueue", "floor", "", "ping, per second")
    push = ("enqueue", "floor", "", "pipelined LPUSH, per second")
    simple, bare = (
        ("drain", "rq", "SimpleWorker", NOOPS),
        ("fork", "floor", "", "bare forks, per second"),
    )
    ratios = [
        ("run in one process, to RQ's SimpleWorker", ">= 100", one, simple),
        ("jobs run in one process for each `Redis.ping()`", ">= 3", one, ping),
        ("run in one forked child (the default), to in-process", ">= 0.9", child, one),
        ("two processes, to one", ">= 1.5", two, child),
        ("a fork for every job, to bare fork + exit + wait", ">= 0.7", fork, bare),
        ("a fork for every job, to RQ's Worker", ">= 1.5", fork, ("fork", "rq", "Worker", NOOPS)),
        ("enqueue, to `Redis.ping()`", ">= 1", enqueue, ping),
        ("enqueue, to RQ", ">= 5", enqueue, ("enqueue", "rq", "", SINGLE)),
        ("enqueue in bulk, to RQ", ">= 12", bulk, ("enqueue", "rq", "", BULK)),
        ("enqueue in bulk, to pipelined LPUSH of the same bytes", ">= 0.5", bulk, push),
    ]
    pairs = zip(figures.rounds(latency), figures.rounds(ping), strict=False)
    pings = [ms * per_second / 1000 for ms, per_second in pairs if ms and per_second]
    slow = figures.ratio(latency, ("latency", "floor", "", "ms"))
    rows = [(what, aim, figures.ratio(a, b), "") for what, aim, a, b in ratios]
    rows.append(against_all(figures, "run in one process, to the fastest rival", ">= 1", one, min))
    rows.append(("latency p50, in pings", "<= 3", statistics.median(pings) if pings else None, ""))
    rows.append(("latency p50, in pings that come after the same pauses", "<= 3", slow, ""))
    rows.append(against_all(figures, "latency p50, to the quickest rival", "<= 1", latency, max))
    for state, bound in (("queued", 250), ("finished", 350)):
        value = figures.median("bytes", "microq", "", state)
        rows.append((f"bytes in Redis of a {state} job", f"<= {bound}", value, ""))
    return rows


def against_all(figures, what, aim, place, worst):
    """Compare with every rival in every configuration; the worst of these ratios counts."""
    ratios = [
        (ratio, f"{other[1]}, {other[2]}")
        for other in others(figures, place[0], place[3])
        if (ratio := figures.ratio(place, other)) is not None
    ]
    return (what, aim, *(worst(ratios) if ratios else (None, "")))


def aims_table(figures):
    rows = []
    for what, aim, value, note in aims(figures):
        if value is not None:
            sign, bound = aim.split()
            met = value >= float(bound) if sign == ">=" else value <= float(bound)
            measured = f"{value:.2f}" if value < 20 else number(value)
            rows.append(
                [what, aim, measured + (f" ({note})" if note else ""), "yes" if met else "no"]
            )
    return table(["microq", "aimed at", "measured", "met"], rows)


# ---- The rivals ----------------------------------------------------------------------------------


def speed_table(figures, rivals):
    mine, rows = ("drain", "microq", "in-process", NOOPS), []
    for rival in rivals:
        for label in rival.labels:
            if label == rival.says.get("FORKS"):
                continue
            row = [f"{rival.name}, {label}"]
            first, usual = label == rival.labels[0], label == rival.usual
            for figure in (SINGLE, BULK):
                row.append(first and figures.cell("enqueue", rival.name, "", figure))
            row.append(figures.cell("drain", rival.name, label, NOOPS))
            ratio = figures.ratio(mine, ("drain", rival.name, label, NOOPS))
            row.append(ratio and f"{ratio:.2f}")
            row.append(figures.cell("drain", rival.name, label, "1 ms, per second"))
            row.append(usual and figures.cell("scale", rival.name, label, NOOPS))
            row.append(usual and figures.cell("latency", rival.name, label, "ms"))
            every = figures.all_of("latency", rival.name, label, "ms")
            row.append(every and number(percentile(every, 0.99)))
            rows.append([*row, first and rival.says["SAFE"]])
    head = [
        "one worker",
        "enqueue /s",
        "in bulk /s",
        "run, no-ops /s",
        "microq in-process is x times",
    ]
    head += ["run, 1 ms /s", "two processes, no-ops /s", "latency p50, ms", "p99, ms"]
    return table([*head, "a job whose worker is killed"], rows)


def pair_of(figures, rival, question, label, *names):
    return " and ".join(number(figures.median(question, rival, label, name)) for name in names)


def cost_table(figures, rivals):
    rows = []
    for rival in rivals:
        name, usual = rival.name, rival.usual
        pair = functools.partial(pair_of, figures, name)
        rows.append([
            name,
            pair("enqueue", "", "one by one, round trips", "one by one, commands"),
            pair("drain", usual, "round trips", "commands"),
            pair("bytes", "", "queued", "finished"),
            pair("idle", "", "round trips per second", "commands per second"),
            number(figures.median("idle", name, "", "CPU, ms per second")),
            pair("idle", "", "memory, MB", "processes"),
            number(figures.median("import", name, "", "ms")),
        ])  # fmt: skip
    head = ["", "enqueue: round trips and commands", "run: round trips and commands"]
    head += ["bytes queued and finished", "idle: round trips and commands /s", "idle: CPU, ms/s"]
    return table([*head, "idle: memory, MB, and processes", "import, ms"], rows)


def time_table(figures, rivals):
    rows = []
    for rival in rivals:
        label = rival.says.get("RECOVERS", rival.usual)
        late = figures.all_of("later", rival.name, rival.usual, "ms late")
        killed = [
            figures.median("recovery", rival.name, label, what)
            for what in ("its process", "the whole worker")
        ]
        rows.append([
            f"{rival.name}, {' and '.join(dict.fromkeys([rival.usual, label]))}",
            f"{number(statistics.median(late))} and {number(max(late))}" if late else
            figures.results.failures.get(("later", rival.name)),
            *map(number, killed), rival.says.get("SHORT"), rival.says["SAFE"],
        ])  # fmt: skip
    head = [
        "",
        "a delayed job is late: median and most, ms",
        "its process killed: runs again after, s",
    ]
    head += ["the whole worker killed, s", "set for this", "by default, when a worker is killed"]
    return table(head, rows)


def fork_table(figures):
    rows = [
        [f"{name}, {label}", figures.cell("fork", name, label, figure)]
        for name, label, figure in [
            ("microq", "fork per job", NOOPS), ("rq", "Worker", NOOPS),
            ("floor", "", "bare forks, per second"),
        ]
    ]  # fmt: skip
    rows[-1][0] = "bare fork + exit + wait"
    return table(["a process for every job", "no-ops /s"], rows)


def curve_table(figures, question, what, head):
    found = {
        rival: {x: column[0] for (name, x), column in values.items() if name == what}
        for (asked, rival), values in figures.results.values.items()
        if asked == question
    }
    points = sorted({x for curve in found.values() for x in curve})
    rows = [[name, *(number(curve.get(x)) for x in points)] for name, curve in found.items()]
    return table([head, *(f"{x:,}" for x in points)], rows) if rows else ""


def network_table(figures, rivals):
    rows = [["`Redis.ping()`", figures.cell("network", "floor", "", "ping, per second"), ""]]
    for rival in rivals:
        place = "network", rival.name, rival.usual
        if figures.median(*place, NOOPS):
            both = figures.cell(*place, "enqueue, per second"), figures.cell(*place, NOOPS)
            rows.append([f"{rival.name}, {rival.usual}", *both])
    return table(["where a round trip takes 1 ms more", "enqueue /s", "run, no-ops /s"], rows)


def rivals_table(rivals):
    rows = []
    for rival in rivals:
        says, pins = rival.says, ", ".join(pin.replace("==", " ") for pin in rival.says["PINS"])
        commands = "<br>".join(
            f"`{command}` ({count:,})" for command, count in says["WORKERS"].values()
        )
        rows.append([rival.name, pins, says["ABOUT"], commands, f"{says['ENQUEUES']:,}"])
    head = ["", "versions", "configuration", "worker (and no-op jobs that it runs in a round)"]
    return table([*head, "jobs enqueued in a round"], rows)


# ---- The whole -----------------------------------------------------------------------------------


def facts(options, seconds):
    """Return what the figures depend on."""
    server = subprocess.check_output([options.server, "--version"], text=True).split()
    return {
        "rivals": options.rivals, "questions": options.questions, "repeat": options.repeat,
        "seconds": seconds, "python": platform.python_version(), "cores": os.cpu_count(),
        "system": f"{platform.system()}, {platform.machine()}", "server": " ".join(server[:3]),
        "redis-py": version("redis"), "hiredis": version("hiredis"), "microq": microq.__version__,
    }  # fmt: skip


def floors_line(figures):
    names = "ping", "round trip", "pipelined LPUSH"
    cells = [figures.cell("enqueue", "floor", "", f"{name}, per second") for name in names]
    bare, redis = (
        number(figures.median("import", "floor", "", f"{what}, ms"))
        for what in ("nothing", "redis")
    )
    return (
        f"The floors: `Redis.ping()` {cells[0]} per second, round trips of a bare socket "
        f"{cells[1]}, pipelined LPUSH {cells[2]}. A Python that does nothing takes {bare} ms, one "
        f"that imports redis {redis} ms.\n"
    )


def failures_list(results):
    lines = [f"- {rival}, {asked}: {why}" for (asked, rival), why in results.failures.items()]
    return "\n".join(["What could not be measured:\n", *lines]) + "\n" if lines else ""


def text(results):
    """Return the part of the README that is measured."""
    figures, facts = Figures(results), results.facts
    rivals = [Rival(name) for name in ["microq", *facts["rivals"]]]
    growth = "one by one, enqueued /s, at a depth of", "one process runs /s, at a depth of"
    docs = {name: importlib.import_module(f"ask_{name}").__doc__ for name in facts["questions"]}
    questions = [f"- `{name}`: {' '.join(doc.split())}" for name, doc in docs.items()]
    machine = (
        f"{facts['cores']} cores ({facts['system']}), shared with others; "
        f"Python {facts['python']}, redis-py {facts['redis-py']}, hiredis {facts['hiredis']}; "
        f"{facts['server']} on a unix socket, without persistence. {facts['repeat']} rounds; {facts['seconds'] // 60} minutes. "
        "Medians, in parentheses the spread of the rounds; ratios are medians of the ratios within "
        "a round.\n"
    )
    parts = [
        aims_table(figures), machine,
        "## Speed\n", "![](speed.svg)\n", speed_table(figures, rivals), floors_line(figures),
        fork_table(figures), network_table(figures, rivals),
        "## Delays, and deaths\n", time_table(figures, rivals),
        "## Costs\n", "![](costs.svg)\n", cost_table(figures, rivals),
        "## Growth\n", "![](growth.svg)\n", curve_table(figures, "growth", "enqueue", growth[0]),
        curve_table(figures, "growth", "drain", growth[1]),
        curve_table(figures, "workers", "drain", "no-ops /s, with so many processes"),
        "## Versions, configurations, commands\n", rivals_table(rivals), failures_list(results),
        "## Questions\n", "\n".join(questions) + "\n",
    ]  # fmt: skip
    return "\n".join(filter(None, parts))


def write(path, text):
    """Put the text between the markers of a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
