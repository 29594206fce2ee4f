"""A competitor: its environment, its client and its workers, each in a process of its
own.

A Competitor is what an adapter says about its queue; a Deployment is a competitor that
works on a server: one client process, which enqueues, and at most one set of worker
processes.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import redis
from torture import children_of

HERE = Path(__file__).resolve().parent
HOME = HERE.parent / ".bench"  # git ignores it
PATIENCE = 30  # seconds for an answer, and for all jobs to have run


class Failure(Exception):
    """A competitor can't be measured; the message is the reason, for the table."""


class Competitor:
    """The constants of an adapter, read without importing it.

    The adapter can't be imported here, since its library is in another environment.

    PINS        - packages of its environment
    NODE_PINS   - packages of an environment of Node.js, in place of PINS
    ENVIRONMENT - the competitor whose environment it has, if it has none of its own
    CLIENT      - the command of its client
    WORKERS     - {label: (command of a worker, no-op jobs that it runs in a round)}
    CONCURRENT  - {label: (command of a worker that runs {c} jobs at once, kinds of
                  jobs, no-op jobs in a round)}; a kind: "coroutines" or "functions"
    LEASE       - what replaces {lease} in commands, and is BENCH_LEASE
    LACKS       - {question that it can't be asked: why}
    """

    def __init__(self, name):
        self.name = name
        self.settings = {
            "PINS": [],
            "NODE_PINS": [],
            "ENVIRONMENT": name,
            "CLIENT": f"python client.py {name}",
            "WORKERS": {},
            "CONCURRENT": {},
            "LEASE": {"usual": "", "short": ""},
            "LACKS": {},
        }
        tree = ast.parse((HERE / f"adapter_{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign):
                self.read_assignment(node)
        self.labels = [*self.settings["WORKERS"]]
        first_label = self.labels[0] if self.labels else None
        self.usual = self.settings.get("USUAL", first_label)
        self.home = HOME / self.settings["ENVIRONMENT"]
        self.python = self.home / "bin" / "python"

    def read_assignment(self, node):
        """Keep the value of an assignment if it is a literal."""
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            return
        for target in node.targets:
            self.settings[target.id] = value

    def pins(self):
        """Return the packages of the environment, with their versions."""
        return [*self.settings["PINS"], *self.settings["NODE_PINS"]]

    def install(self):
        """Make the environment, unless there is one with these pins."""
        if self.settings["NODE_PINS"]:
            find_program("node")
        pins = self.pins()
        done = self.home / "pins.json"
        if done.exists() and json.loads(done.read_text()) == pins:
            return
        for command in self.install_commands():
            ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if ended.returncode:
                raise Failure(f"can't be installed: {self.install_error(ended.stderr)}")
        done.write_text(json.dumps(pins))

    def install_error(self, text):
        """Return the reason: the first line of npm's errors, the last one of pip's."""
        if self.settings["NODE_PINS"]:
            text = text.partition("\n")[0]
        return last_line(text)

    def install_commands(self):
        """Return the commands that make the environment, of Python or of Node.js."""
        if self.settings["NODE_PINS"]:
            quiet = ["--loglevel", "error", "--no-audit", "--no-fund"]
            npm = [find_program("npm"), "install", *quiet, "--prefix", self.home]
            return [[*npm, *self.settings["NODE_PINS"]]]
        python = sys.executable
        make = [python, "-m", "venv", "--clear", "--without-pip", self.home]
        pip = [python, "-m", "pip", "--python", self.python, "install", "-q"]
        return [make, [*pip, "--disable-pip-version-check", *self.settings["PINS"]]]

    def worker_template(self, label, at_once):
        """Return the command of a worker, with {names} in place of values."""
        setting = "CONCURRENT" if at_once else "WORKERS"
        return self.settings[setting][label][0]

    def command(self, template, **values):
        """Return a command of the adapter as a list."""
        program, *arguments = shlex.split(template.format(**values))
        if program == "python":
            path = self.python
        elif program == "node":
            path = find_program("node")
        else:
            path = self.python.parent / program
        return [str(path), *arguments]

    def concurrent_kinds(self):
        """Return (label, kind) of the workers that run many jobs at once."""
        pairs = []
        for label, (_, kinds, _) in self.settings["CONCURRENT"].items():
            pairs += [(label, kind) for kind in kinds]
        return pairs


def find_program(name):
    path = shutil.which(name)
    if path is None:
        raise Failure(f"{name} is not installed")
    return path


def last_line(text):
    """Return the last line of a text that is not empty, up to 200 characters of it."""
    lines = [line for line in text.strip().split("\n") if line]
    if not lines:
        return "no reason given"
    return lines[-1][:200]


def family(pid):
    """Return the pids of a process and of all its descendants."""
    pids = [pid]
    for child in children_of(pid):
        pids += family(child)
    return pids


class Deployment:
    """A competitor on a server, with one client and at most one set of workers.

    It uses each number of a job once, so its marks (see jobs.py) are never cleared.
    """

    def __init__(self, competitor, url, home):
        self.competitor = competitor
        self.url = url
        self.admin = redis.Redis.from_url(url)
        self.marks = home / f"marks-{competitor.name}"
        with open(self.marks, "wb") as file:
            file.truncate(jobs.SIZE)
        self.runs, self.times, self.pids, self.ends = jobs.marks(self.marks)
        self.log = open(home / f"log-{competitor.name}", "w+b")  # noqa: SIM115
        self.next_number = 0
        self.client = None
        self.workers = []
        self.kind = None  # (label, processes, lease, at_once) of the workers
        self.clear()

    def close(self):
        self.stop_workers()
        self.stop_client()
        self.log.close()
        self.marks.unlink()

    def environment(self, processes=1, lease="usual", at_once=None):
        environment = dict(os.environ)
        environment["BENCH_URL"] = self.url
        environment["BENCH_MARKS"] = str(self.marks)
        environment["BENCH_PROCESSES"] = str(processes)
        environment["PYTHONPATH"] = f"{HERE}{os.pathsep}{HERE.parent}"
        environment["NODE_PATH"] = str(self.competitor.home / "node_modules")
        # All libraries have their bytecode in a cache; microq too, as if installed.
        environment["PYTHONDONTWRITEBYTECODE"] = ""
        if lease != "usual":
            environment["BENCH_LEASE"] = self.competitor.settings["LEASE"][lease]
        if at_once:
            environment["BENCH_AT_ONCE"] = str(at_once)
        return environment

    def clear(self):
        """Kill the workers, and delete all keys."""
        self.stop_workers()
        self.admin.flushall()

    # ---- The client

    def call(self, function, *arguments):
        """Have the client call a function of client.py; return its answer."""
        if self.client is None:
            self.start_client()
        request = json.dumps([function, *arguments])
        self.client.stdin.write(request.encode() + b"\n")
        seconds = 4 * PATIENCE
        if not select.select([self.client.stdout], [], [], seconds)[0]:
            raise Failure(f"{function}: no answer within {seconds} s")
        line = self.client.stdout.readline()
        if not line:
            raise Failure(f"{function}: {self.last_log_line()}")
        return json.loads(line)

    def start_client(self):
        self.client = subprocess.Popen(
            self.competitor.command(self.competitor.settings["CLIENT"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=self.environment(),
            cwd=HERE,
            bufsize=0,
        )

    def stop_client(self):
        """Kill the client, which closes its connections."""
        if self.client is not None:
            self.client.kill()
            self.client.wait()
            self.client.stdin.close()
            self.client.stdout.close()
            self.client = None

    def enqueue(self, count, function="enqueue", job="noop"):
        """Enqueue new jobs; return the number of the first one, and the seconds."""
        first = self.reserve_numbers(count)
        return first, self.call(function, first, count, job)

    def enqueue_in_tasks(self, count, tasks):
        """Enqueue new jobs by so many tasks of an event loop; return the seconds."""
        first = self.reserve_numbers(count)
        return self.call("enqueue_in_tasks", first, count, tasks)

    def reserve_numbers(self, count):
        """Return the first of `count` numbers that no job has."""
        first = self.next_number
        self.next_number += count
        return first

    def last_log_line(self):
        """Return the last line that the competitor logged."""
        time.sleep(0.2)
        self.log.seek(0)
        return last_line(self.log.read().decode(errors="replace"))

    # ---- The workers

    def work(
        self, label=None, processes=1, lease="usual", at_once=None, *, warm_up=True
    ):
        """Have these workers run, and run 20 jobs unless `warm_up` is false.

        at_once - how many jobs each process runs at once; None: as WORKERS says

        Workers of this kind that are running stay; workers of another kind are killed.
        """
        label = label or self.competitor.usual
        kind = (label, processes, lease, at_once)
        alive = any(process.poll() is None for process in self.workers)
        reused = alive and self.kind == kind
        if not reused:
            self.stop_workers()
            self.start_workers(*kind)
        if warm_up or reused:
            count = 20
            first, _ = self.enqueue(count)
            self.wait_for_runs(first, count)

    def start_workers(self, label, processes, lease, at_once):
        self.kind = (label, processes, lease, at_once)
        settings = self.competitor.settings
        lease_value = settings["LEASE"][lease]
        template = self.competitor.worker_template(label, at_once)
        command = self.competitor.command(
            template, n=processes, url=self.url, lease=lease_value, c=at_once
        )
        takes_number = "{n}" in template
        one_for_all = takes_number or "ONE_FOR_ALL" in settings
        for _ in range(1 if one_for_all else processes):
            process = subprocess.Popen(
                command,
                cwd=HERE,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env=self.environment(processes, lease, at_once),
                start_new_session=True,
            )
            self.workers.append(process)

    def processes(self):
        """Return the pids of the workers and of all their descendants."""
        return [pid for process in self.workers for pid in family(process.pid)]

    def stop_workers(self):
        """Kill the workers, and wait until the server has noticed.

        Before that it could still hand a job to a dead worker.
        """
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.workers:
            process.wait()
        deadline = time.monotonic() + PATIENCE
        while self.workers and self.admin.info("clients")["blocked_clients"]:
            if time.monotonic() > deadline:
                raise Failure("a process survived the end of the worker")
            time.sleep(0.005)
        self.workers = []

    # ---- What was run

    def wait_for_runs(self, first, count):
        """Wait until the jobs have run; raise Failure if one didn't, or ran twice."""
        deadline = time.monotonic() + PATIENCE
        runs = self.runs[first : first + count]
        while True:
            missing = bytes(runs).count(0)
            if not missing:
                break
            if time.monotonic() > deadline:
                reason = self.last_log_line()
                raise Failure(f"{missing} of {count} jobs did not run: {reason}")
            if any(process.poll() is not None for process in self.workers):
                raise Failure(f"its worker ended: {self.last_log_line()}")
            time.sleep(0.005)
        repeated = count - bytes(runs).count(1)
        if repeated:
            raise Failure(f"{repeated} of {count} jobs ran more than once")

    def count_repeated(self, first):
        """Return how many of the jobs from `first` on ran more than once."""
        runs = bytes(self.runs[first : self.next_number])
        return len(runs) - runs.count(0) - runs.count(1)

    def rate(self, first, count):
        """Return jobs per second, without the first and the last tenth of the jobs.

        Those run while the workers start and stop.
        """
        times = sorted(self.times[first : first + count])
        tenth = count // 10
        seconds = times[-tenth - 1] - times[tenth]
        return (count - 2 * tenth - 1) / seconds

    def traffic(self):
        """Return (commands, reads, bytes read) of the server until now."""
        info = self.admin.info("stats")
        return [
            info["total_commands_processed"],
            info["total_reads_processed"],
            info["total_net_input_bytes"],
        ]
