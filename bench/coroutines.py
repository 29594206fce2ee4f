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


def coroutine_of(function):
    """Return a job as a coroutine function.

    Some queues pass a context before the number, which is ignored; some pass the number
    by keyword.
    """

    async def run(*args, number=None):
        if number is None:
            number = args[-1]
        function(number)

    run.__name__ = function.__name__
    run.__qualname__ = function.__name__
    return run


JOBS = {name: coroutine_of(function) for name, function in jobs.ALL.items()}
