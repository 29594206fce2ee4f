"""For the adapters of queues on asyncio: their jobs are coroutines, and so are their calls."""

from __future__ import annotations

import asyncio
import functools

import jobs

LOOP = asyncio.new_event_loop()


def sync(call):
    """Make a function of a coroutine function; all run on one loop."""

    @functools.wraps(call)
    def run(*args, **options):
        return LOOP.run_until_complete(call(*args, **options))

    return run


def coroutine_of(func):
    """Return a job as a coroutine function; a context before its number is left out."""

    async def run(*args, number=None):
        func(args[-1] if number is None else number)

    run.__name__ = run.__qualname__ = func.__name__
    return run


JOBS = {name: coroutine_of(func) for name, func in jobs.ALL.items()}
