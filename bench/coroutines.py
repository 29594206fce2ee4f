"""How does a synchronous client call a queue on asyncio? All calls run on one event
loop.

For the adapters of these queues: their jobs are coroutine functions, and so are their
calls.
"""

from __future__ import annotations

import asyncio
import functools

import jobs

LOOP = asyncio.new_event_loop()


def sync(call):
    """Return a function that runs a coroutine function to its end."""

    @functools.wraps(call)
    def run(*args, **options):
        return LOOP.run_until_complete(call(*args, **options))

    return run


async def in_tasks(enqueue, numbers, count):
    """Await enqueue(number) for all numbers, by so many tasks at the same time."""
    numbers = iter(numbers)

    async def work():
        for number in numbers:
            await enqueue(number)

    await asyncio.gather(*[work() for _ in range(count)])


def number_of(args, number):
    """Return the number of a job.

    Some queues pass a context before the number, which is ignored; some pass the number
    by keyword.
    """
    return args[-1] if number is None else number


def coroutine_of(function):
    """Return a job that is a function as a coroutine function."""

    async def run(*args, number=None):
        function(number_of(args, number))

    return named(run, function)


def coroutine_like(coroutine_function):
    """Return a job that is a coroutine function as one that takes any arguments."""

    async def run(*args, number=None):
        await coroutine_function(number_of(args, number))

    return named(run, coroutine_function)


def named(run, function):
    """Give `run` the name of a job, by which some queues find it."""
    run.__name__ = function.__name__
    run.__qualname__ = function.__name__
    return run


JOBS = {name: coroutine_of(function) for name, function in jobs.ALL.items()}
for name, coroutine_function in jobs.COROUTINES.items():
    JOBS[name] = coroutine_like(coroutine_function)
