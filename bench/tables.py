"""How are the results written?  The tables of README.md, in Markdown."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from importlib import import_module

from competitors import Competitor
from figures import (
    BULK,
    IN_PROCESS,
    NOOPS,
    SINGLE,
    Figures,
    aims,
    is_met,
    number,
    percentile,
    spread,
)

import microq

BEGIN = "<!-- what was measured, written by python -m bench -->"
END = "<!-- end -->"


def table(head, rows):
    """Return a table, or nothing if there are no rows."""
    if not rows:
        return ""
    cells = [[str(cell or "") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def aims_table(figures):
    rows = []
    for name, aim, values, note in aims(figures):
        if values:
            met = "yes" if is_met(aim, values) else "no"
            rows.append([name, aim, spread(values) + note, met])
    return table(["microq", "aimed at", "measured", "met"], rows)


# ---- Tables of all competitors -------------------------------------------------------


def speed_table(figures, competitors):
    rows = []
    for competitor in competitors:
        for label in competitor.labels:
            if label != competitor.settings.get("FORKS"):
                rows.append(speed_row(figures, competitor, label))
    head = [
        "one worker",
        "enqueue /s",
        "in bulk /s",
        "run, no-ops /s",
        "microq in-process is x times",
        "run, 1 ms /s",
        "two processes, no-ops /s",
        "latency p50, ms",
        "p99, ms",
        "a job whose worker is killed",
    ]
    return table(head, rows)


def speed_row(figures, competitor, label):
    """Return the row of a configuration.

    Figures of the client stand in the first row of a competitor, those of two processes
    and of latency in the row of its usual configuration.
    """
    name = competitor.name
    is_first = label == competitor.labels[0]
    is_usual = label == competitor.usual
    single = bulk = safe = two = latency = p99 = ratio = None
    if is_first:
        single = figures.cell("enqueue", name, "", SINGLE)
        bulk = figures.cell("enqueue", name, "", BULK)
        safe = competitor.settings["SAFE"]
    if is_usual:
        two = figures.cell("scale", name, label, NOOPS)
        latency = figures.cell("latency", name, label, "ms")
    ratios = figures.ratios(IN_PROCESS, ("drain", name, label, NOOPS))
    if ratios:
        ratio = number(statistics.median(ratios))
    latencies = figures.all_of("latency", name, label, "ms")
    if latencies:
        p99 = number(percentile(latencies, 0.99))
    noops = figures.cell("drain", name, label, NOOPS)
    busy = figures.cell("drain", name, label, "1 ms, per second")
    title = f"{name}, {label}"
    return [title, single, bulk, noops, ratio, busy, two, latency, p99, safe]


def pair(figures, place, *names):
    """Write two medians of a place (question, competitor, label)."""
    return " and ".join(number(figures.median(*place, name)) for name in names)


def cost_table(figures, competitors):
    rows = [cost_row(figures, competitor) for competitor in competitors]
    head = [
        "",
        "enqueue: round trips and commands",
        "run: round trips and commands",
        "bytes queued and finished",
        "idle: round trips and commands /s",
        "idle: CPU, ms/s",
        "idle: memory, MB, and processes",
        "import, ms",
    ]
    return table(head, rows)


def cost_row(figures, competitor):
    name = competitor.name
    enqueue = ("enqueue", name, "")
    drain = ("drain", name, competitor.usual)
    idle = ("idle", name, "")
    return [
        name,
        pair(figures, enqueue, "one by one, round trips", "one by one, commands"),
        pair(figures, drain, "round trips", "commands"),
        pair(figures, ("bytes", name, ""), "queued", "finished"),
        pair(figures, idle, "round trips per second", "commands per second"),
        number(figures.median(*idle, "CPU, ms per second")),
        pair(figures, idle, "memory, MB", "processes"),
        number(figures.median("import", name, "", "ms")),
    ]


def time_table(figures, competitors):
    rows = [time_row(figures, competitor) for competitor in competitors]
    head = [
        "",
        "a delayed job is late: median and most, ms",
        "its process killed: runs again after, s",
        "the whole worker killed, s",
        "set for this (its default)",
        "by default, when a worker is killed",
    ]
    return table(head, rows)


def time_row(figures, competitor):
    name = competitor.name
    settings = competitor.settings
    label = settings.get("RECOVERS", competitor.usual)
    labels = dict.fromkeys([competitor.usual, label])
    delays = figures.all_of("later", name, competitor.usual, "ms late")
    if delays:
        late = f"{number(statistics.median(delays))} and {number(max(delays))}"
    else:
        late = settings["LACKS"].get("later")
    recovery = ("recovery", name, label)
    return [
        f"{name}, {' and '.join(labels)}",
        late,
        number(figures.median(*recovery, "its process")),
        number(figures.median(*recovery, "the whole worker")),
        settings.get("SHORT"),
        settings["SAFE"],
    ]


def fork_table(figures):
    bare = figures.cell("fork", "floor", "", "bare forks, per second")
    rows = [
        ["microq, fork per job", figures.cell("fork", "microq", "fork per job", NOOPS)],
        ["rq, Worker", figures.cell("fork", "rq", "Worker", NOOPS)],
        ["bare fork + exit + wait", bare],
    ]
    return table(["a process for every job", "no-ops /s"], rows)


def curve_table(figures, question, name, title):
    """Return a table of values by depth, or by number of processes."""
    curves = {}
    for (asked, competitor), columns in figures.results.values.items():
        if asked == question:
            curves[competitor] = curve_of(columns, name)
    points = sorted({x for curve in curves.values() for x in curve})
    rows = []
    for competitor, curve in curves.items():
        cells = [number(curve.get(x)) for x in points]
        rows.append([competitor, *cells])
    return table([title, *(f"{x:,}" for x in points)], rows)


def curve_of(columns, name):
    curve = {}
    for (column_name, x), column in columns.items():
        if column_name == name:
            curve[x] = column[0]
    return curve


def network_table(figures, competitors):
    ping = figures.cell("network", "floor", "", "ping, per second")
    rows = [["`Redis.ping()`", ping, ""]]
    for competitor in competitors:
        place = "network", competitor.name, competitor.usual
        if figures.median(*place, NOOPS):
            title = f"{competitor.name}, {competitor.usual}"
            enqueue = figures.cell(*place, "enqueue, per second")
            rows.append([title, enqueue, figures.cell(*place, NOOPS)])
    head = ["where a round trip takes 1 ms more", "enqueue /s", "run, no-ops /s"]
    return table(head, rows)


def cpu_table(figures, competitors):
    client = figures.cell("cpu", "floor", "", "ping, client")
    server = figures.cell("cpu", "floor", "", "ping, server")
    rows = [["`Redis.ping()`", client, server, "", ""]]
    names = ["enqueue, client", "enqueue, server", "run, worker", "run, server"]
    for competitor in competitors:
        place = "cpu", competitor.name, ""
        if figures.median(*place, names[0]):
            cells = [figures.cell(*place, name) for name in names]
            rows.append([competitor.name, *cells])
    columns = ["enqueue: client", "server", "run: worker", "server"]
    return table(["CPU for each job, us", *columns], rows)


def awaited_table(figures, competitors):
    """Return a table of calls on one event loop."""
    rows = []
    for competitor in competitors:
        place = "awaited", competitor.name, ""
        one_by_one = figures.cell(*place, "one by one, per second")
        if one_by_one:
            tasks = figures.cell(*place, "50 tasks, per second")
            rows.append([competitor.name, one_by_one, tasks])
    head = ["enqueue on an event loop", "one by one /s", "by 50 tasks /s"]
    return table(head, rows)


DRAIN_COLUMNS = ["coroutines, 10", "coroutines, 100", "functions, 10"]
WAITING_COLUMNS = [
    "coroutines, 50",
    "coroutines, 200",
    "functions, 50",
    "functions, 200",
]


def workers_of_many(competitors):
    """Yield (competitor, worker) names of the workers that run many jobs at once."""
    for competitor in competitors:
        for label in competitor.settings["CONCURRENT"]:
            yield competitor.name, label


def drain_at_once_table(figures, competitors):
    """Return a table of no-ops per second, many at once in one process."""
    rows = []
    for name, label in workers_of_many(competitors):
        cells = [f"{name}, {label}"]
        for column in DRAIN_COLUMNS:
            what = f"{column} at once, per second"
            cells.append(figures.cell("drain", name, label, what))
        rows.append(cells)
    head = [f"{column} at once" for column in DRAIN_COLUMNS]
    return table(["no-ops /s, in one process", *head], rows)


def waiting_table(figures, competitors):
    """Return a table of jobs that wait: time as a ratio to the ideal, and memory."""
    rows = []
    for name, label in workers_of_many(competitors):
        place = "waiting", name, label
        cells = [f"{name}, {label}"]
        for column in WAITING_COLUMNS:
            cells.append(figures.cell(*place, f"{column} at once, to the ideal"))
            memory = figures.median(*place, f"{column} at once, memory, MB")
            cells.append(number(memory))
        rows.append(cells)
    head = ["1,000 jobs that wait 200 ms"]
    for column in WAITING_COLUMNS:
        head += [f"{column} at once: time to the ideal", "MB"]
    return table(head, rows)


def competitors_table(competitors):
    rows = []
    for competitor in competitors:
        settings = competitor.settings
        pins = ", ".join(competitor.pins()).replace("==", " ").replace("@", " ")
        commands = "<br>".join(commands_of(settings))
        count = f"{settings['ENQUEUES']:,}"
        rows.append([competitor.name, pins, settings["ABOUT"], commands, count])
    head = [
        "",
        "versions",
        "configuration",
        "worker (and no-op jobs that it runs in a round)",
        "jobs enqueued in a round",
    ]
    return table(head, rows)


def commands_of(settings):
    """Return the commands of the workers, each with its number of jobs in a round."""
    workers = [*settings["WORKERS"].values()]
    for template, _, count in settings["CONCURRENT"].values():
        workers.append((template, count))
    lease = settings["LEASE"]["usual"]
    commands = []
    for template, count in workers:
        command = template.format(n=1, url="URL", lease=lease, c="N")
        commands.append(f"`{' '.join(command.split())}` ({count:,})")
    return commands


# ---- The whole text ------------------------------------------------------------------


def facts(options, seconds):
    """Return the facts that the figures depend on."""
    command = [options.server, "--version"]
    server = subprocess.check_output(command, text=True).split()
    return {
        "competitors": options.competitors,
        "questions": options.questions,
        "repeat": options.repeat,
        "seconds": seconds,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()}, {platform.machine()}",
        "server": " ".join(server[:3]),
        "node": node_version(),
        "microq": microq.__version__,
    }


def node_version():
    """Return the version of Node.js, or "none"."""
    node = shutil.which("node")
    if node is None:
        return "none"
    return subprocess.check_output([node, "--version"], text=True).strip("v\n")


def machine_text(facts):
    return (
        f"{facts['cores']} cores ({facts['system']}), shared with other processes; "
        f"Python {facts['python']}, Node.js {facts['node']}; {facts['server']} on a "
        f"unix socket, without persistence; microq {facts['microq']}. Versions of "
        f"libraries are below. {facts['repeat']} rounds, "
        f"{facts['seconds'] // 60} minutes. Figures are medians, in parentheses the "
        "spread of the rounds; ratios are medians of the ratios within a round.\n"
    )


def floors_text(figures):
    ping = figures.cell("enqueue", "floor", "", "ping, per second")
    trip = figures.cell("enqueue", "floor", "", "round trip, per second")
    push = figures.cell("enqueue", "floor", "", "pipelined LPUSH, per second")
    nothing = number(figures.median("import", "floor", "", "nothing, ms"))
    redis = number(figures.median("import", "floor", "", "redis, ms"))
    return (
        f"The floors: `Redis.ping()` {ping} per second, round trips of a bare socket "
        f"{trip}, pipelined LPUSH {push}. A Python process that does nothing takes "
        f"{nothing} ms, one that imports redis {redis} ms.\n"
    )


def failures_text(results):
    if not results.failures:
        return ""
    lines = ["What could not be measured:\n"]
    for (question, competitor), reason in results.failures.items():
        lines.append(f"- {competitor}, {question}: {reason}")
    return "\n".join(lines) + "\n"


def questions_text(facts):
    lines = []
    for name in facts["questions"]:
        question = " ".join(import_module(f"ask_{name}").__doc__.split())
        lines.append(f"- `{name}`: {question}")
    return "\n".join(lines) + "\n"


def text(results):
    """Return the measured part of the README, of the questions that were asked."""
    figures = Figures(results)
    facts = results.facts
    competitors = [Competitor(name) for name in ["microq", *facts["competitors"]]]
    enqueue_title = "one by one, enqueued /s, at a depth of"
    run_title = "one process runs /s, at a depth of"
    workers_title = "no-ops /s, so many processes"
    parts = [  # (text, questions of which one must have been asked, if any is named)
        (aims_table(figures), "enqueue awaited drain latency scale fork bytes waiting"),
        (machine_text(facts), ""),
        ("## Speed\n", ""),
        ("![](speed.svg)\n", ""),
        (speed_table(figures, competitors), "enqueue drain latency scale"),
        (awaited_table(figures, competitors), "awaited"),
        (floors_text(figures), "enqueue import"),
        (fork_table(figures), "fork"),
        (network_table(figures, competitors), "network"),
        ("## Many jobs at once in one process\n", "drain waiting"),
        (drain_at_once_table(figures, competitors), "drain"),
        (waiting_table(figures, competitors), "waiting"),
        ("## Delays and recovery\n", ""),
        (time_table(figures, competitors), "later recovery"),
        ("## Costs\n", ""),
        ("![](costs.svg)\n", ""),
        (cost_table(figures, competitors), "enqueue drain bytes idle import"),
        (cpu_table(figures, competitors), "cpu"),
        ("## Growth\n", ""),
        ("![](growth.svg)\n", ""),
        (curve_table(figures, "growth", "enqueue", enqueue_title), "growth"),
        (curve_table(figures, "growth", "drain", run_title), "growth"),
        (curve_table(figures, "workers", "drain", workers_title), "workers"),
        ("## Versions, configurations, commands\n", ""),
        (competitors_table(competitors), ""),
        (failures_text(results), ""),
        ("## Questions\n", ""),
        (questions_text(facts), ""),
    ]
    asked = set(facts["questions"])
    shown = []
    for part, needed in parts:
        if part and (not needed or asked & set(needed.split())):
            shown.append(part)
    return "\n".join(shown)


def write(path, text):
    """Put the text between the markers of a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
