"""A rival: its environment, its client and its workers, each in a process of its own."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import select
import shlex
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
    """A rival that can't be measured, with the reason as it stands in the table."""


class Rival:
    """What an adapter says of itself, read without importing it: its library lives elsewhere."""

    def __init__(self, name):
        self.name = name
        tree = ast.parse((HERE / f"adapter_{name}.py").read_text())
        self.says = {
            "PINS": [],
            "WORKERS": {},
            "LEASE": {"usual": "", "short": ""},
            "LACKS": {},
        }
        for node in tree.body:
            if isinstance(node, ast.Assign):
                with contextlib.suppress(ValueError):
                    value = ast.literal_eval(node.value)
                    self.says |= {target.id: value for target in node.targets}
        self.labels = [*self.says["WORKERS"]]
        self.usual = self.says.get("USUAL", self.labels[0] if self.labels else None)
        self.python = (
            HOME / name / "bin" / "python"
            if self.says["PINS"]
            else Path(sys.executable)
        )

    def install(self):
        """Make the environment, unless one with these pins is there."""
        pins, done = self.says["PINS"], HOME / self.name / "pins.json"
        if not pins or (done.exists() and json.loads(done.read_text()) == pins):
            return
        make = [
            sys.executable,
            "-m",
            "venv",
            "--clear",
            "--without-pip",
            HOME / self.name,
        ]
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q"]
        for command in (make, [*pip, "--disable-pip-version-check", *pins]):
            ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if ended.returncode:
                raise Failure(f"can't be installed: {last_line(ended.stderr)}")
        done.write_text(json.dumps(pins))

    def command(self, label, **words):
        """Return the command of a worker, as a list."""
        first, *rest = shlex.split(self.says["WORKERS"][label][0].format(**words))
        return [
            str(self.python if first == "python" else self.python.parent / first),
            *rest,
        ]


def last_line(text):
    return ([*filter(None, text.strip().split("\n"))] or ["no reason given"])[-1][:200]


def family(pid):
    """Return the pids of a process and of all that descend from it."""
    return [pid, *(later for child in children_of(pid) for later in family(child))]


class Session:
    """A rival at work: on one server, with one who enqueues and at most one set of workers.

    Numbers of jobs are never used twice in a session, so its marks need no clearing.
    """

    def __init__(self, rival, url, home):
        self.rival, self.url = rival, url
        self.admin = redis.Redis.from_url(url)
        self.marks = home / f"marks-{rival.name}"
        with open(self.marks, "wb") as file:
            file.truncate(jobs.SIZE)
        self.runs, self.times, self.pids = jobs.marks(self.marks)
        self.log = open(home / f"log-{rival.name}", "w+b")  # noqa: SIM115
        self.next, self.running, self.kind, self.client = 0, [], None, None
        self.clear()

    def close(self):
        self.stop()
        self.leave()
        self.log.close()
        self.marks.unlink()

    def environment(self, processes=1, lease="usual"):
        found = os.environ | {
            "BENCH_URL": self.url, "BENCH_MARKS": str(self.marks),
            "BENCH_PROCESSES": str(processes), "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
        }  # fmt: skip
        if lease != "usual":
            found["BENCH_LEASE"] = self.rival.says["LEASE"][lease]
        return found

    def clear(self):
        """Begin anew: no workers, no jobs."""
        self.stop()
        self.admin.flushall()

    # ---- Who enqueues

    def ask(self, *words):
        """Have the client do something, client.py says what; return its answer."""
        if self.client is None:
            self.client = subprocess.Popen(
                [self.rival.python, HERE / "client.py", self.rival.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                env=self.environment(), cwd=HERE, bufsize=0,
            )  # fmt: skip
        self.client.stdin.write(json.dumps(words).encode() + b"\n")
        if not select.select([self.client.stdout], [], [], 4 * PATIENCE)[0]:
            raise Failure(f"{words[0]}: no answer within {4 * PATIENCE} s")
        if not (line := self.client.stdout.readline()):
            raise Failure(f"{words[0]}: {self.reason()}")
        return json.loads(line)

    def enqueue(self, count, how="enqueue", func="noop"):
        """Enqueue new jobs; return the number of the first, and the seconds."""
        first = self.new(count)
        return first, self.ask(how, first, count, func)

    def new(self, count):
        self.next += count
        return self.next - count

    def leave(self):
        """Have the client end, and close its connections."""
        if self.client is not None:
            self.client.kill()
            self.client.wait()
            self.client.stdin.close()
            self.client.stdout.close()
            self.client = None

    def reason(self):
        """Return the last line that the rival wrote."""
        time.sleep(0.2)
        self.log.seek(0)
        return last_line(self.log.read().decode(errors="replace"))

    # ---- Workers

    def work(self, label=None, processes=1, lease="usual", ready=True):
        """Start workers, unless these are running, and wait until they have run a warm-up."""
        says, label = self.rival.says, label or self.rival.usual
        alive = any(process.poll() is None for process in self.running)
        if alive and self.kind == (label, processes, lease):
            return self.delivered(*self.warm_up())
        self.stop()
        self.kind = label, processes, lease
        words = {"n": processes, "url": self.url, "lease": says["LEASE"][lease]}
        command = self.rival.command(label, **words)
        one = "{n}" in says["WORKERS"][label][0] or "ONE_FOR_ALL" in says
        for _ in range(1 if one else processes):
            started = subprocess.Popen(
                command, cwd=HERE, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
                env=self.environment(processes, lease), start_new_session=True,
            )  # fmt: skip
            self.running.append(started)
        return self.delivered(*self.warm_up()) if ready else None

    def warm_up(self):
        return self.enqueue(20)[0], 20

    def processes(self):
        return [pid for process in self.running for pid in family(process.pid)]

    def stop(self):
        """Kill the workers, who have nothing left to do."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.running:
            process.wait()
        deadline = time.monotonic() + PATIENCE
        while self.running and self.admin.info("clients")["blocked_clients"]:
            if time.monotonic() > deadline:
                raise Failure("somebody survived the end of the worker")
            time.sleep(0.005)  # else a job may still go to one who is dead
        self.running = []

    # ---- What was delivered

    def delivered(self, first, count, patience=PATIENCE):
        """Wait until the jobs have run, each of them once."""
        deadline, runs = time.monotonic() + patience, self.runs[first : first + count]
        while missing := bytes(runs).count(0):
            if time.monotonic() > deadline:
                raise Failure(f"{missing} of {count} jobs did not run: {self.reason()}")
            if any(process.poll() is not None for process in self.running):
                raise Failure(f"its worker ended: {self.reason()}")
            time.sleep(0.005)
        if twice := count - bytes(runs).count(1):
            raise Failure(f"{twice} of {count} jobs ran more than once")

    def twice(self, first):
        """Return how many of the jobs from `first` on ran more than once."""
        runs = bytes(self.runs[first : self.next])
        return len(runs) - runs.count(0) - runs.count(1)

    def rate(self, first, count):
        """Return jobs per second; the first and the last tenth of them don't count, since there the
        workers begin and end."""
        times, tenth = sorted(self.times[first : first + count]), count // 10
        return (count - 2 * tenth - 1) / (times[-tenth - 1] - times[tenth])

    def traffic(self):
        """Return (commands, reads, bytes read) of the server until now."""
        info = self.admin.info("stats")
        names = (
            "total_commands_processed",
            "total_reads_processed",
            "total_net_input_bytes",
        )
        return [info[name] for name in names]
