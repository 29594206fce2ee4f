"""How are jobs enqueued with microq and with RQ?  By the same calls.

For the adapters of both, whose interfaces are the same.
"""

from __future__ import annotations

import itertools
from datetime import timedelta


class Calls:
    """The functions of an adapter; `stay_options` are options of the job `stay`."""

    def __init__(self, queue, **stay_options):
        self.queue = queue
        self.stay_options = stay_options

    def enqueue(self, numbers, job):
        options = self.stay_options if job == "stay" else {}
        for number in numbers:
            self.queue.enqueue("jobs." + job, number, **options)

    def enqueue_many(self, numbers, job):
        numbers = iter(numbers)
        while True:
            batch = list(itertools.islice(numbers, 1000))
            if not batch:
                return
            prepare = self.queue.prepare_data
            self.queue.enqueue_many([prepare("jobs." + job, (n,)) for n in batch])

    def enqueue_later(self, number, seconds):
        self.queue.enqueue_in(timedelta(seconds=seconds), "jobs.noop", number)

    def waiting(self):
        return len(self.queue)
