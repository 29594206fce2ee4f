"""The tables of README.md, in Markdown, from what was found."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import statistics
import subprocess
from importlib.metadata import version

from figures import (
    BULK,
    NOOPS,
    ONE,
    SINGLE,
    Figures,
    aims,
    is_met,
    number,
    percentile,
    spread,
)
from rivals import Rival

import microq

BEGIN, END = "<!-- what was measured, written by python -m bench -->", "<!-- end -->"


def table(head, rows):
    """Return a table, or nothing if there are no rows."""
    if not rows:
        return ""
    rows = [[str(cell or "") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def aims_table(figures):
    rows = [
        [what, aim, spread(values) + note, "yes" if is_met(aim, values) else "no"]
        for what, aim, values, note in aims(figures)
        if values
    ]
    return table(["microq", "aimed at", "measured", "met"], rows)


# ---- The rivals ----------------------------------------------------------------------------------


def speed_table(figures, rivals):
    rows = []
    for rival in rivals:
        for label in rival.labels:
            if label == rival.says.get("FORKS"):
                continue
            row = [f"{rival.name}, {label}"]
            first, usual = label == rival.labels[0], label == rival.usual
            for figure in (SINGLE, BULK):
                row.append(first and figures.cell("enqueue", rival.name, "", figure))
            row.append(figures.cell("drain", rival.name, label, NOOPS))
            ratios = figures.ratios(ONE, ("drain", rival.name, label, NOOPS))
            row.append(ratios and number(statistics.median(ratios)))
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
    return " and ".join(
        number(figures.median(question, rival, label, name)) for name in names
    )


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
    head += [
        "bytes queued and finished",
        "idle: round trips and commands /s",
        "idle: CPU, ms/s",
    ]
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
            rival.says["LACKS"].get("later"),
            *map(number, killed), rival.says.get("SHORT"), rival.says["SAFE"],
        ])  # fmt: skip
    head = [
        "",
        "a delayed job is late: median and most, ms",
        "its process killed: runs again after, s",
    ]
    head += [
        "the whole worker killed, s",
        "set for this (its default)",
        "by default, when a worker is killed",
    ]
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
    rows = [
        [name, *(number(curve.get(x)) for x in points)] for name, curve in found.items()
    ]
    return table([head, *(f"{x:,}" for x in points)], rows)


def network_table(figures, rivals):
    rows = [
        ["`Redis.ping()`", figures.cell("network", "floor", "", "ping, per second"), ""]
    ]
    for rival in rivals:
        place = "network", rival.name, rival.usual
        if figures.median(*place, NOOPS):
            both = (
                figures.cell(*place, "enqueue, per second"),
                figures.cell(*place, NOOPS),
            )
            rows.append([f"{rival.name}, {rival.usual}", *both])
    return table(
        ["where a round trip takes 1 ms more", "enqueue /s", "run, no-ops /s"], rows
    )


def cpu_table(figures, rivals):
    names = "enqueue, client", "enqueue, server", "run, worker", "run, server"
    pings = [
        figures.cell("cpu", "floor", "", f"ping, {who}") for who in ("client", "server")
    ]
    rows = [["`Redis.ping()`", *pings, "", ""]]
    for rival in rivals:
        if figures.median("cpu", rival.name, "", names[0]):
            rows.append(
                [rival.name, *(figures.cell("cpu", rival.name, "", n) for n in names)]
            )
    head = [
        "CPU for each job, us",
        "enqueue: client",
        "server",
        "run: worker",
        "server",
    ]
    return table(head, rows)


def rivals_table(rivals):
    rows = []
    for rival in rivals:
        says, pins = (
            rival.says,
            ", ".join(pin.replace("==", " ") for pin in rival.says["PINS"]),
        )
        words = {"n": 1, "url": "URL", "lease": says["LEASE"]["usual"]}
        commands = "<br>".join(
            f"`{' '.join(command.format(**words).split())}` ({count:,})"
            for command, count in says["WORKERS"].values()
        )
        rows.append(
            [rival.name, pins, says["ABOUT"], commands, f"{says['ENQUEUES']:,}"]
        )
    head = [
        "",
        "versions",
        "configuration",
        "worker (and no-op jobs that it runs in a round)",
    ]
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
    cells = [
        figures.cell("enqueue", "floor", "", f"{name}, per second") for name in names
    ]
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
    lines = [
        f"- {rival}, {asked}: {why}" for (asked, rival), why in results.failures.items()
    ]
    return "\n".join(["What could not be measured:\n", *lines]) + "\n" if lines else ""


def text(results):
    """Return the part of the README that is measured."""
    figures, facts = Figures(results), results.facts
    rivals = [Rival(name) for name in ["microq", *facts["rivals"]]]
    growth = (
        "one by one, enqueued /s, at a depth of",
        "one process runs /s, at a depth of",
    )
    docs = {
        name: importlib.import_module(f"ask_{name}").__doc__
        for name in facts["questions"]
    }
    questions = [f"- `{name}`: {' '.join(doc.split())}" for name, doc in docs.items()]
    machine = (
        f"{facts['cores']} cores ({facts['system']}), shared with others; Python "
        f"{facts['python']}, redis-py {facts['redis-py']}, hiredis {facts['hiredis']}; "
        f"{facts['server']} on a unix socket, without persistence; microq {facts['microq']}. "
        f"{facts['repeat']} rounds, {facts['seconds'] // 60} minutes. Medians, in parentheses the "
        "spread of the rounds; ratios are medians of the ratios within a round.\n"
    )
    parts = [
        (aims_table(figures), "enqueue drain latency scale fork bytes"), (machine, ""),
        ("## Speed\n", ""), ("![](speed.svg)\n", ""),
        (speed_table(figures, rivals), "enqueue drain latency scale"),
        (floors_line(figures), "enqueue import"), (fork_table(figures), "fork"),
        (network_table(figures, rivals), "network"),
        ("## Delays, and deaths\n", ""), (time_table(figures, rivals), "later recovery"),
        ("## Costs\n", ""), ("![](costs.svg)\n", ""),
        (cost_table(figures, rivals), "enqueue drain bytes idle import"),
        (cpu_table(figures, rivals), "cpu"),
        ("## Growth\n", ""), ("![](growth.svg)\n", ""),
        (curve_table(figures, "growth", "enqueue", growth[0]), "growth"),
        (curve_table(figures, "growth", "drain", growth[1]), "growth"),
        (curve_table(figures, "workers", "drain", "no-ops /s, so many processes"), "workers"),
        ("## Versions, configurations, commands\n", ""), (rivals_table(rivals), ""),
        (failures_list(results), ""), ("## Questions\n", ""), ("\n".join(questions) + "\n", ""),
    ]  # fmt: skip
    asked = set(facts["questions"])
    return "\n".join(
        part for part, need in parts if part and (not need or asked & {*need.split()})
    )


def write(path, text):
    """Put the text between the markers of a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
