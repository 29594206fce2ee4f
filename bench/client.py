"""Which client enqueues? This one, in a process of its own with the competitor's
library.

    client.py ADAPTER

It reads a JSON list [function, *arguments] from each line of stdin, calls that function
of this file, and answers with a line of JSON on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time


def timed(call, *args):
    """Return the seconds that a call takes."""
    begun_at = time.perf_counter()
    call(*args)
    return time.perf_counter() - begun_at


def enqueue(adapter, first, count, job="noop"):
    """Enqueue one by one; return the seconds."""
    return timed(adapter.enqueue, range(first, first + count), job)


def enqueue_many(adapter, first, count, job="noop"):
    """Enqueue in bulk, or one by one if the adapter can't; return the seconds."""
    call = getattr(adapter, "enqueue_many", adapter.enqueue)
    return timed(call, range(first, first + count), job)


def enqueue_in_tasks(adapter, first, count, tasks):
    """Enqueue by so many tasks of an event loop; return the seconds."""
    adapter.enqueue_in_tasks([], 1)  # connect
    return timed(adapter.enqueue_in_tasks, range(first, first + count), tasks)


def enqueue_at_times(adapter, first, count, least, most):
    """Enqueue after random pauses between `least` and `most` seconds.

    Return when each call began, by time.monotonic().
    """
    generator = random.Random(first)
    call_times = []
    for number in range(first, first + count):
        time.sleep(generator.uniform(least, most))
        call_times.append(time.monotonic())
        adapter.enqueue([number], "noop")
    return call_times


def enqueue_later(adapter, first, count, seconds):
    """Enqueue jobs with a delay of `seconds`, at random moments of about a second.

    Return when each job is due, by time.monotonic().
    """
    due_times = []
    for number in range(first, first + count):
        time.sleep(random.Random(number).uniform(0, 2 / count))
        due_times.append(time.monotonic() + seconds)
        adapter.enqueue_later(number, seconds)
    return due_times


def offers(adapter, name):
    """Return whether the adapter has a function of this name."""
    return hasattr(adapter, name)


def waiting(adapter):
    """Return how many jobs are queued."""
    return adapter.waiting()


def figure(adapter, name, *args):
    """Call a function that only this adapter has: those of adapter_floor.py."""
    return getattr(adapter, name)(*args)


FUNCTIONS = {
    "enqueue": enqueue,
    "enqueue_many": enqueue_many,
    "enqueue_in_tasks": enqueue_in_tasks,
    "enqueue_at_times": enqueue_at_times,
    "enqueue_later": enqueue_later,
    "offers": offers,
    "waiting": waiting,
    "figure": figure,
}


def main(name):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout; send that to stderr
    adapter = importlib.import_module(f"adapter_{name}")
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        answer = FUNCTIONS[function](adapter, *arguments)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # does not wait for threads of the library
