"""One who enqueues, in a process of its own with the library of a rival: client.py ADAPTER

Reads a JSON list [what, *arguments] from each line of stdin, where `what` is a function below, and
answers with a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time


def timed(call, *args):
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def enqueue(adapter, first, count, func="noop"):
    """Enqueue one by one; return the seconds."""
    return timed(adapter.enqueue, range(first, first + count), func)


def enqueue_many(adapter, first, count, func="noop"):
    """Enqueue in bulk, or one by one where there is no such call; return the seconds."""
    call = getattr(adapter, "enqueue_many", adapter.enqueue)
    return timed(call, range(first, first + count), func)


def enqueue_at_times(adapter, first, count, least, most):
    """Enqueue after random pauses between `least` and `most` seconds; return when each call began,
    by time.monotonic()."""
    dice, moments = random.Random(first), []
    for number in range(first, first + count):
        time.sleep(dice.uniform(least, most))
        moments.append(time.monotonic())
        adapter.enqueue([number], "noop")
    return moments


def enqueue_later(adapter, first, count, seconds):
    """Enqueue to run after `seconds`, at random moments of a second; return when they are due,
    by time.monotonic()."""
    due = []
    for number in range(first, first + count):
        time.sleep(random.Random(number).uniform(0, 2 / count))
        due.append(time.monotonic() + seconds)
        adapter.enqueue_later(number, seconds)
    return due


def offers(adapter, name):
    return hasattr(adapter, name)


def waiting(adapter):
    return adapter.waiting()


def figure(adapter, name, *args):
    """Call a function that only this adapter has: the floors."""
    return getattr(adapter, name)(*args)


def main(name):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    adapter = importlib.import_module(f"adapter_{name}")
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(
            json.dumps(globals()[what](adapter, *arguments)), file=answers, flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # whatever threads are left
