"""For the adapters of microq and RQ, whose interfaces are one."""

from __future__ import annotations

import itertools
from datetime import timedelta


def calls_of(queue, **of_stay):
    """Return the functions of an adapter; `of_stay` are options of the job that will be killed."""

    def enqueue(numbers, func):
        options = of_stay if func == "stay" else {}
        for number in numbers:
            queue.enqueue("jobs." + func, number, **options)

    def enqueue_many(numbers, func):
        numbers = iter(numbers)
        while batch := [*itertools.islice(numbers, 1000)]:
            queue.enqueue_many(
                [queue.prepare_data("jobs." + func, (n,)) for n in batch]
            )

    def enqueue_later(number, seconds):
        queue.enqueue_in(timedelta(seconds=seconds), "jobs.noop", number)

    def waiting():
        return len(queue)

    return enqueue, enqueue_many, enqueue_later, waiting
